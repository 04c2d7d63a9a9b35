// The sum tree on a GPU: one launch per op, no host synchronisation, results that do not depend on thread order.
//
// Integer additions commute, so atomics leave the same tree in any order. What must be ordered (of duplicate writes the
// last holds) is settled inside one block. That is made for batches of hundreds to thousands, as replay has them; larger
// ones take tile after tile.
#include "sum_tree.h"

namespace sum_tree {
namespace {

constexpr int kThreads = 512;  // of the block that orders; a tile has one element per thread
constexpr int kTable = 2 * kThreads;
constexpr unsigned kEmpty = 0xFFFFFFFF;  // no slot: those lie below 2^31
constexpr int kSampleWarps = 4;
constexpr unsigned kWarp = 0xFFFFFFFF;

// child_of by a warp: a scan by shuffles and a ballot. Loads go to L2, where this kernel's own atomics are.
__device__ __forceinline__ int warp_child_of(const int64_t* block, int64_t& rest, int lane) {
  const int64_t weight = __ldcg(reinterpret_cast<const long long*>(block) + lane);
  int64_t running = weight;
  SUM_TREE_UNROLL
  for (int distance = 1; distance < kFanOut; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWarp, running, distance);
    if (lane >= distance) running += other;
  }
  const int child = __popc(__ballot_sync(kWarp, lane < kFanOut - 1 && running <= rest));
  rest -= __shfl_sync(kWarp, running - weight, child);
  return child;
}

__device__ __forceinline__ int64_t warp_slot_of(const int64_t* nodes, const Layout& layout, int64_t rest, int lane) {
  int64_t node = 0;
  for (int level = layout.levels - 2; level >= 0; --level)
    node = node * kFanOut + warp_child_of(nodes + layout.begin[level] + node * kFanOut, rest, lane);
  return node;
}

struct Table {
  unsigned slot[kTable];
  int place[kTable];  // the last element that has this slot
};

__device__ void clear(Table& table) {
  for (int i = threadIdx.x; i < kTable; i += kThreads) {
    table.slot[i] = kEmpty;
    table.place[i] = -1;
  }
}

// Where a slot stands in the table; it is put there if it is new.
__device__ int place_of(Table& table, unsigned slot) {
  unsigned at = slot * 2654435761u >> 22;
  static_assert(kTable == 1 << 10, "the hash above has 10 bits");
  for (;; at = (at + 1) % kTable) {
    const unsigned found = atomicCAS(&table.slot[at], kEmpty, slot);
    if (found == kEmpty || found == slot) return at;
  }
}

__device__ void add(int64_t* node, int64_t change) {
  atomicAdd(reinterpret_cast<unsigned long long*>(node), static_cast<unsigned long long>(change));
}

__device__ int64_t exchange(int64_t* node, int64_t weight) {
  return static_cast<int64_t>(
      atomicExch(reinterpret_cast<unsigned long long*>(node), static_cast<unsigned long long>(weight)));
}

// From L2, where atomics and the stores of other multiprocessors are.
__device__ int64_t load(const int64_t* node) { return __ldcg(reinterpret_cast<const long long*>(node)); }

// Adds to all ancestors of the warp's slots; lanes that are not `active` have change 0. Where the lanes share an
// ancestor, one of them adds their sum: always at the root, and below it when neighbours are updated together.
__device__ void add_to_parents(int64_t* nodes, const Layout& layout, int64_t slot, int64_t change, bool active) {
  const unsigned mask = __ballot_sync(kWarp, active);
  if (mask == 0) return;
  int64_t sum = change;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kWarp, sum, distance);
  const int leader = __ffs(mask) - 1;
  for (int level = 1; level < layout.levels; ++level) {
    slot >>= kFanOutBits;
    const int64_t node = __shfl_sync(kWarp, slot, leader);
    if (__all_sync(kWarp, !active || slot == node)) {
      if (static_cast<int>(threadIdx.x % 32) == leader) add(nodes + layout.begin[level] + node, sum);
    } else if (active) {
      add(nodes + layout.begin[level] + slot, change);
    }
  }
}

__global__ void __launch_bounds__(kThreads) update(
    int64_t* nodes, const __grid_constant__ Layout layout, int64_t capacity, double alpha, int fraction,
    const int64_t* indices, const double* priorities, int64_t n, int64_t* refused) {
  __shared__ Table table;
  __shared__ unsigned long long first_refused;
  if (threadIdx.x == 0) first_refused = n;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    int64_t weight;
    const bool inside = 0 <= indices[i] && indices[i] < capacity;
    if (!inside || !fixed_point(priorities[i], alpha, fraction, &weight))
      atomicMin(&first_refused, static_cast<unsigned long long>(i));
  }
  __syncthreads();
  if (first_refused < static_cast<unsigned long long>(n)) {  // all or nothing
    if (threadIdx.x == 0 && refused[0] == 0) {
      const int64_t slot = indices[first_refused];
      refused[0] = 0 <= slot && slot < capacity ? kBadPriority : kBadIndex;
      refused[1] = slot;
      refused[2] = as_bits(priorities[first_refused]);
    }
    return;
  }
  for (int64_t start = 0; start < n; start += kThreads) {  // tiles in their order: a later tile's writes hold
    const int64_t i = start + threadIdx.x;
    const bool present = i < n;
    clear(table);
    __syncthreads();
    const int64_t slot = present ? indices[i] : 0;
    const int at = present ? place_of(table, static_cast<unsigned>(slot)) : 0;
    if (present) atomicMax(&table.place[at], static_cast<int>(threadIdx.x));
    __syncthreads();
    const bool last = present && table.place[at] == static_cast<int>(threadIdx.x);
    int64_t change = 0;
    if (last) {
      int64_t weight;
      fixed_point(priorities[i], alpha, fraction, &weight);
      change = weight - exchange(nodes + slot, weight);
    }
    add_to_parents(nodes, layout, slot, change, last);
    __syncthreads();
  }
}

// One warp per draw.
__global__ void __launch_bounds__(32 * kSampleWarps) sample(
    const int64_t* nodes, const __grid_constant__ Layout layout, const int64_t* key, uint32_t round, int64_t n,
    int64_t* slots) {
  const int64_t draw = int64_t{blockIdx.x} * kSampleWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (draw >= n) return;
  const uint64_t total = load(nodes + layout.size - 1);
  int64_t slot = kNothing;
  if (total) {
    const uint64_t random = random_64(key[0], key[1], static_cast<uint32_t>(draw), round);
    slot = warp_slot_of(nodes, layout, static_cast<int64_t>(multiply_high(random, total)), lane);
  }
  if (lane == 0) slots[draw] = slot;
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace sum_tree

using namespace sum_tree;

const char* sum_tree_update(
    int64_t* nodes, int64_t capacity, double alpha, const int64_t* indices, const double* priorities, int64_t n,
    int64_t* refused, void* stream) {
  if (n == 0) return nullptr;
  update<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      nodes, layout_of(capacity), capacity, alpha, fraction_bits(capacity), indices, priorities, n, refused);
  return launched();
}

const char* sum_tree_sample(
    const int64_t* nodes, int64_t capacity, const int64_t* key, uint32_t round, int64_t n, int64_t* slots,
    void* stream) {
  const unsigned blocks = static_cast<unsigned>((n + kSampleWarps - 1) / kSampleWarps);
  sample<<<blocks, 32 * kSampleWarps, 0, static_cast<cudaStream_t>(stream)>>>(
      nodes, layout_of(capacity), key, round, n, slots);
  return launched();
}
