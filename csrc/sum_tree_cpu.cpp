// The sum tree on a CPU.
#include "sum_tree.h"

#include <vector>

using namespace sum_tree;

// All or nothing; the first element that is refused is reported.
const char* sum_tree_update(
    int64_t* nodes, int64_t capacity, double alpha, const int64_t* indices, const double* priorities, int64_t n,
    int64_t* refused, void*) {
  const Layout layout = layout_of(capacity);
  const int fraction = fraction_bits(capacity);
  std::vector<int64_t> weights(n);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = 0 <= indices[i] && indices[i] < capacity;
    if (inside && fixed_point(priorities[i], alpha, fraction, &weights[i])) continue;
    refused[0] = inside ? kBadPriority : kBadIndex;
    refused[1] = indices[i];
    refused[2] = as_bits(priorities[i]);
    return nullptr;
  }
  for (int64_t i = 0; i < n; ++i) {  // in their order: of duplicates the last holds
    int64_t node = indices[i];
    const int64_t change = weights[i] - nodes[node];
    for (int level = 0; level < layout.levels; ++level, node >>= kFanOutBits)
      nodes[layout.begin[level] + node] += change;
  }
  return nullptr;
}

// Level by level over a few draws at once, with the next level's blocks on their way meanwhile: leaves of a large tree
// lie in memory, not in a cache.
const char* sum_tree_sample(
    const int64_t* nodes, int64_t capacity, const int64_t* key, uint32_t round, int64_t n, int64_t* slots, void*) {
  constexpr int64_t kTogether = 32;
  const Layout layout = layout_of(capacity);
  const uint64_t total = nodes[layout.size - 1];
  int64_t rest[kTogether];
  for (int64_t start = 0; start < n; start += kTogether) {
    const int64_t group = n - start < kTogether ? n - start : kTogether;
    int64_t* node = slots + start;
    for (int64_t i = 0; i < group; ++i) {
      rest[i] = multiply_high(random_64(key[0], key[1], static_cast<uint32_t>(start + i), round), total);
      node[i] = total ? 0 : kNothing;
    }
    for (int level = total ? layout.levels - 2 : -1; level >= 0; --level) {
      const int64_t* below = level ? nodes + layout.begin[level - 1] : nullptr;
      for (int64_t i = 0; i < group; ++i) {
        node[i] = node[i] * kFanOut + child_of(nodes + layout.begin[level] + node[i] * kFanOut, rest[i]);
        if (below)
          for (int line = 0; line < kFanOut; line += 8) __builtin_prefetch(below + node[i] * kFanOut + line);
      }
    }
  }
  return nullptr;
}
