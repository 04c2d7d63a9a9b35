// The sum tree on a CPU.
#include "sum_tree.h"

#include <vector>

namespace sum_tree {
namespace {

void add_to_parents(int64_t* nodes, const Layout& layout, int64_t slot, int64_t change) {
  for (int level = 1; level < layout.levels; ++level) {
    slot >>= kFanOutBits;
    nodes[layout.begin[level] + slot] += change;
  }
}

// The first `count` draws of a round. Level by level over a few draws at once, with the next level's blocks
// on their way meanwhile: leaves of a large tree lie in memory, not in a cache.
void draw(
    const int64_t* nodes, const Layout& layout, const int64_t* key, int64_t count, uint32_t round, int64_t* slots) {
  constexpr int64_t kTogether = 32;
  const uint64_t total = nodes[layout.size - 1];
  int64_t rest[kTogether];
  for (int64_t start = 0; start < count; start += kTogether) {
    const int64_t group = count - start < kTogether ? count - start : kTogether;
    int64_t* node = slots + start;
    for (int64_t i = 0; i < group; ++i) {
      rest[i] = multiply_high(random_64(key[0], key[1], static_cast<uint32_t>(start + i), round), total);
      node[i] = 0;
    }
    for (int level = layout.levels - 2; level >= 0; --level) {
      const int64_t* below = level ? nodes + layout.begin[level - 1] : nullptr;
      for (int64_t i = 0; i < group; ++i) {
        node[i] = node[i] * kFanOut + child_of(nodes + layout.begin[level] + node[i] * kFanOut, rest[i]);
        if (below)
          for (int line = 0; line < kFanOut; line += 8) __builtin_prefetch(below + node[i] * kFanOut + line);
      }
    }
  }
}

}  // namespace
}  // namespace sum_tree

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
    const int64_t change = weights[i] - nodes[indices[i]];
    nodes[indices[i]] = weights[i];
    add_to_parents(nodes, layout, indices[i], change);
  }
  return nullptr;
}

const char* sum_tree_sample(
    const int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots, void*) {
  const Layout layout = layout_of(capacity);
  if (nodes[layout.size - 1])
    draw(nodes, layout, key, n, 0, slots);
  else
    for (int64_t i = 0; i < n; ++i) slots[i] = kNothing;
  return nullptr;
}

// Successive draws. Independent draws, of which only each slot's first counts, are just that: given the slots found so
// far, the next new one comes in proportion to the weights of the others. A round makes as many draws as are missing and
// keeps the new slots. If some are missing still, the next round finds them in a tree without those found before, so
// that it finds one at least; in the end they come back.
const char* sum_tree_sample_distinct(
    int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots, int64_t* taken, int64_t*, void*) {
  const Layout layout = layout_of(capacity);
  int64_t found = 0, removed = 0;  // slots[0, found) are kept; the tree's parents are without slots[0, removed)
  for (uint32_t round = 0; found < n; ++round) {
    for (; removed < found; ++removed) add_to_parents(nodes, layout, slots[removed], -taken[removed]);
    if (nodes[layout.size - 1] == 0) break;
    draw(nodes, layout, key, n - found, round, slots + found);
    for (int64_t i = found; i < n; ++i) {
      const int64_t slot = slots[i], weight = nodes[slot];
      if (weight == 0) continue;  // came before in this round
      nodes[slot] = 0;
      slots[found] = slot;
      taken[found++] = weight;
    }
    if (found == removed) break;  // only where parents are not their children's sums: no hang
  }
  for (int64_t i = 0; i < found; ++i) {
    nodes[slots[i]] = taken[i];
    if (i < removed) add_to_parents(nodes, layout, slots[i], taken[i]);
  }
  for (int64_t i = found; i < n; ++i) slots[i] = kNothing;
  return nullptr;
}
