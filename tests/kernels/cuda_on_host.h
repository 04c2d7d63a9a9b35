// Runs csrc's CUDA kernels on a CPU: every thread of a block is a fiber, blocks run one after another.
//
// A fiber runs until it waits (at __syncthreads, or in a warp for its other lanes) or, at random, at an atomic. Which
// fiber goes on next is random too, so that what depends on the order of threads shows. Warp functions expect all 32
// lanes, as the kernels call them. Only what the kernels use is here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __CUDACC__
#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;

namespace fibers {

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};

struct Fiber {
  static constexpr size_t kStack = 64 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;            // where it begins
  jmp_buf place;                 // where it goes on: unlike a context's, such a jump is no system call
  bool begun = false, done = false;
  unsigned parity = 0;           // of the warp's exchanges
  Barrier* waits = nullptr;      // for what it waits, if it does,
  uint64_t generation = 0;       // and since when
};

struct Warp {
  Barrier barrier;
  int64_t values[2][32];
};

static jmp_buf scheduler;
static std::vector<Fiber> threads;
static std::vector<Warp> warps;
static Barrier block;
static std::mt19937 order;
static std::function<void()> body;

static void yield() {
  if (!_setjmp(threads[threadIdx.x].place)) _longjmp(scheduler, 1);
}

// Until the fiber yields.
static void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

static void wait(Barrier& barrier, unsigned expected) {
  Fiber& self = threads[threadIdx.x];
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self.waits = &barrier;
  self.generation = barrier.generation;
  yield();
}

static void start() {
  body();
  threads[threadIdx.x].done = true;
  yield();
}

// All lanes' values, once every lane of the warp has given its own.
static const int64_t* exchange(int64_t value) {
  Warp& warp = warps[threadIdx.x / 32];
  int64_t* values = warp.values[threads[threadIdx.x].parity ^= 1];
  values[threadIdx.x % 32] = value;
  wait(warp.barrier, 32);
  return values;
}

static void atomic() {
  if (order() % 4 == 0) yield();
}

static void run(unsigned blocks, unsigned count, std::function<void()> kernel) {
  body = kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    threads = std::vector<Fiber>(count);
    warps = std::vector<Warp>(count / 32);
    block = Barrier();
    for (Fiber& fiber : threads) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      makecontext(&fiber.context, start, 0);
    }
    for (unsigned left = count; left > 0;) {
      bool moved = false;
      const unsigned first = order() % count, step = 2 * (order() % count) + 1;  // odd: reaches every thread
      for (unsigned i = 0; i < count; ++i) {
        threadIdx.x = (first + i * step) % count;
        Fiber& fiber = threads[threadIdx.x];
        if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
        fiber.waits = nullptr;
        resume(fiber);
        moved = true;
        left -= fiber.done;
      }
      if (!moved) abort();  // all wait for a thread that has ended, or that waits elsewhere
    }
  }
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::block, static_cast<unsigned>(fibers::threads.size())); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const int64_t* values = fibers::exchange(predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(values[lane]) << lane;
  return ballot;
}
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int64_t __shfl_sync(unsigned, int64_t value, int lane) { return fibers::exchange(value)[lane]; }
inline int64_t __shfl_xor_sync(unsigned, int64_t value, int distance) {
  return fibers::exchange(value)[threadIdx.x % 32 ^ distance];
}
inline int64_t __shfl_up_sync(unsigned, int64_t value, int distance) {
  const int lane = threadIdx.x % 32;
  return fibers::exchange(value)[lane < distance ? lane : lane - distance];
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline long long __ldcg(const long long* address) { return *address; }

template <typename T, typename F>
T atomic_update(T* address, F change) {
  fibers::atomic();
  const T before = *address;
  *address = change(before);
  return before;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return atomic_update(address, [=](T before) { return before + value; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return atomic_update(address, [=](T before) { return before == expected ? value : before; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return atomic_update(address, [=](T before) { return before < value ? before : value; });
}
template <typename T>
T atomicMax(T* address, T value) {
  return atomic_update(address, [=](T before) { return before > value ? before : value; });
}
