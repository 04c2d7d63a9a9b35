// The sum tree on a GPU: one launch per op, no host synchronisation, results that do not depend on thread order.
//
// Integer additions commute, so atomics leave the same tree in any order. What must be ordered (of duplicate writes the
// last holds, of duplicate draws the first counts) is settled inside one block, through a hash table in shared memory.
// That is made for batches of hundreds to thousands, as replay has them; larger ones take tile after tile.
#include "sum_tree_cuda.h"

namespace sum_tree {
namespace {

constexpr int kThreads = kRound;  // of the single block; a tile or a round has one element per thread
constexpr int kWarps = kThreads / 32;
constexpr int kTable = 2 * kThreads;
constexpr unsigned kEmpty = 0xFFFFFFFF;  // no slot: those lie below 2^31
constexpr int kSampleWarps = 4;

struct Table {
  unsigned slot[kTable];
  int place[kTable];  // the first or last element that has this slot
};

__device__ void clear(Table& table, int place) {
  for (int i = threadIdx.x; i < kTable; i += kThreads) {
    table.slot[i] = kEmpty;
    table.place[i] = place;
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
    clear(table, -1);
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
    const int64_t* nodes, const __grid_constant__ Layout layout, const int64_t* key, int64_t n, int64_t* slots) {
  const int64_t draw = int64_t{blockIdx.x} * kSampleWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (draw >= n) return;
  const uint64_t total = __ldcg(reinterpret_cast<const long long*>(nodes) + layout.size - 1);
  int64_t slot = kNothing;
  if (total) {
    const uint64_t random = random_64(key[0], key[1], static_cast<uint32_t>(draw), 0);
    slot = warp_slot_of(nodes, layout, static_cast<int64_t>(multiply_high(random, total)), lane);
  }
  if (lane == 0) slots[draw] = slot;
}

// The rounds of sample_distinct in sum_tree_cpu.cpp, each by one warp per draw and then one thread per draw.
__global__ void __launch_bounds__(kThreads) sample_distinct(
    int64_t* nodes, const __grid_constant__ Layout layout, const int64_t* key, int64_t n, int64_t* slots,
    int64_t* taken) {
  __shared__ Table table;
  __shared__ unsigned drawn[kRound];
  __shared__ int fresh[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t seed = key[0], offset = key[1];
  const long long* root = reinterpret_cast<const long long*>(nodes) + layout.size - 1;
  int64_t found = 0;
  for (uint32_t round = 0; found < n; ++round) {
    const uint64_t total = __ldcg(root);
    if (total == 0) break;
    const int count = n - found < kRound ? static_cast<int>(n - found) : kRound;
    for (int draw = warp; draw < count; draw += kWarps) {
      const int64_t rest = static_cast<int64_t>(multiply_high(random_64(seed, offset, draw, round), total));
      const int64_t slot = warp_slot_of(nodes, layout, rest, lane);
      if (lane == 0) drawn[draw] = static_cast<unsigned>(slot);
    }
    clear(table, kRound);
    __syncthreads();
    const int draw = threadIdx.x;
    const bool present = draw < count;
    const unsigned slot = present ? drawn[draw] : 0;
    const int at = present ? place_of(table, slot) : 0;
    if (present) atomicMin(&table.place[at], draw);
    __syncthreads();
    const bool first = present && table.place[at] == draw;
    const unsigned firsts = __ballot_sync(kWarp, first);
    if (lane == 0) fresh[warp] = __popc(firsts);
    __syncthreads();
    int64_t position = found + __popc(firsts & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      position += w < warp ? fresh[w] : 0;
      found += fresh[w];
    }
    int64_t weight = 0;
    if (first) {
      weight = exchange(nodes + slot, 0);
      slots[position] = slot;
      taken[position] = weight;
    }
    add_to_parents(nodes, layout, slot, -weight, first);
    __syncthreads();
  }
  for (int64_t start = 0; start < found; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const bool present = i < found;
    const int64_t slot = present ? slots[i] : 0, weight = present ? taken[i] : 0;
    if (present) exchange(nodes + slot, weight);
    add_to_parents(nodes, layout, slot, weight, present);
  }
  for (int64_t i = found + threadIdx.x; i < n; i += kThreads) slots[i] = kNothing;
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_update(
    int64_t* nodes, int64_t capacity, double alpha, const int64_t* indices, const double* priorities, int64_t n,
    int64_t* refused, void* stream) {
  if (n == 0) return nullptr;
  update<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      nodes, layout_of(capacity), capacity, alpha, fraction_bits(capacity), indices, priorities, n, refused);
  return launched();
}

const char* launch_sample(const int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots,
                          void* stream) {
  if (n == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>((n + kSampleWarps - 1) / kSampleWarps);
  sample<<<blocks, 32 * kSampleWarps, 0, static_cast<cudaStream_t>(stream)>>>(
      nodes, layout_of(capacity), key, n, slots);
  return launched();
}

const char* launch_sample_distinct(int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots,
                                   int64_t* taken, void* stream) {
  if (n == 0) return nullptr;
  sample_distinct<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      nodes, layout_of(capacity), key, n, slots, taken);
  return launched();
}

}  // namespace sum_tree
