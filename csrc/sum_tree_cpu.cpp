// The sum tree's ops: their schemas, and the CPU implementation.
#include "sum_tree_arguments.h"

namespace sum_tree {
namespace {

void add_to_parents(int64_t* nodes, const Layout& layout, int64_t slot, int64_t change) {
  for (int level = 1; level < layout.levels; ++level) {
    slot >>= kFanOutBits;
    nodes[layout.begin[level] + slot] += change;
  }
}

// All or nothing; the first element that is refused is reported.
void update(
    Tensor nodes_tensor, int64_t capacity, double alpha, Tensor indices_tensor, Tensor priorities_tensor,
    Tensor refused_tensor) {
  const Layout layout = checked_layout(nodes_tensor, capacity);
  const int64_t n = indices_tensor.numel();
  check(indices_tensor, "indices", n, nodes_tensor);
  check(priorities_tensor, "priorities", n, nodes_tensor);
  check(refused_tensor, "refused", 3, nodes_tensor);
  int64_t* nodes = nodes_tensor.mutable_data_ptr<int64_t>();
  int64_t* refused = refused_tensor.mutable_data_ptr<int64_t>();
  const int64_t* indices = indices_tensor.const_data_ptr<int64_t>();
  const double* priorities = priorities_tensor.const_data_ptr<double>();
  const int fraction = fraction_bits(capacity);
  std::vector<int64_t> weights(n);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = 0 <= indices[i] && indices[i] < capacity;
    if (inside && fixed_point(priorities[i], alpha, fraction, &weights[i])) continue;
    if (refused[0] == 0) {
      refused[0] = inside ? kBadPriority : kBadIndex;
      refused[1] = indices[i];
      refused[2] = as_bits(priorities[i]);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {  // in their order: of duplicates the last holds
    const int64_t change = weights[i] - nodes[indices[i]];
    nodes[indices[i]] = weights[i];
    add_to_parents(nodes, layout, indices[i], change);
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

void sample(Tensor nodes_tensor, int64_t capacity, Tensor key, Tensor slots_tensor) {
  const Layout layout = checked_layout(nodes_tensor, capacity);
  const int64_t n = checked_draws(slots_tensor, nodes_tensor);
  check(key, "key", 2, nodes_tensor);
  const int64_t* nodes = nodes_tensor.const_data_ptr<int64_t>();
  int64_t* slots = slots_tensor.mutable_data_ptr<int64_t>();
  if (nodes[layout.size - 1])
    draw(nodes, layout, key.const_data_ptr<int64_t>(), n, 0, slots);
  else
    for (int64_t i = 0; i < n; ++i) slots[i] = kNothing;
}

// Successive draws. Independent draws, of which only each slot's first counts, are just that: given the slots found so
// far, the next new one comes in proportion to the weights of the others. A round makes as many draws as are missing and
// keeps the new slots. If some are missing still, the next round finds them in a tree without those found before, so
// that it finds one at least; in the end they come back.
void sample_distinct(
    Tensor nodes_tensor, int64_t capacity, Tensor key, Tensor slots_tensor, Tensor taken_tensor, Tensor ended) {
  const Layout layout = checked_layout(nodes_tensor, capacity);
  const int64_t n = checked_draws(slots_tensor, nodes_tensor);
  check(key, "key", 2, nodes_tensor);
  check(taken_tensor, "taken", n, nodes_tensor);
  check(ended, "ended", 1, nodes_tensor);  // only CUDA needs it
  int64_t* nodes = nodes_tensor.mutable_data_ptr<int64_t>();
  int64_t* slots = slots_tensor.mutable_data_ptr<int64_t>();
  int64_t* taken = taken_tensor.mutable_data_ptr<int64_t>();
  int64_t found = 0, removed = 0;  // slots[0, found) are kept; the tree's parents are without slots[0, removed)
  for (uint32_t round = 0; found < n; ++round) {
    for (; removed < found; ++removed) add_to_parents(nodes, layout, slots[removed], -taken[removed]);
    if (nodes[layout.size - 1] == 0) break;
    draw(nodes, layout, key.const_data_ptr<int64_t>(), n - found, round, slots + found);
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
}

}  // namespace

// A trailing underscore: the op writes into its arguments. `key` is int64 [2] (seed, offset). `taken` int64 [n] is work
// space; `ended` int64 [1] belongs to a tree and is 0 between calls.
STABLE_TORCH_LIBRARY_FRAGMENT(rethinker, library) {
  library.def(
      "sum_tree_update_(Tensor(a!) nodes, int capacity, float alpha, Tensor indices, Tensor priorities, "
      "Tensor(b!) refused) -> ()");
  library.def("sum_tree_sample_(Tensor nodes, int capacity, Tensor key, Tensor(a!) slots) -> ()");
  library.def(
      "sum_tree_sample_distinct_(Tensor(a!) nodes, int capacity, Tensor key, Tensor(b!) slots, Tensor(c!) taken, "
      "Tensor(d!) ended) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rethinker, CPU, library) {
  library.impl("sum_tree_update_", TORCH_BOX(&update));
  library.impl("sum_tree_sample_", TORCH_BOX(&sample));
  library.impl("sum_tree_sample_distinct_", TORCH_BOX(&sample_distinct));
}

}  // namespace sum_tree
