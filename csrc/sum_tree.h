// The sum tree's arithmetic, one text for g++ and nvcc: layout, fixed point, random numbers, descent.
//
// Everything that decides a draw is integer arithmetic, and priorities become weights by additions, products and
// divisions that IEEE 754 rounds in one way only (compile without contraction into fused multiply-adds). CPU and CUDA
// therefore agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SUM_TREE_FN __host__ __device__ __forceinline__
#else
#define SUM_TREE_FN inline
#endif
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define SUM_TREE_UNROLL _Pragma("GCC unroll 16")
#else
#define SUM_TREE_UNROLL _Pragma("unroll")
#endif

namespace sum_tree {

constexpr int kFanOutBits = 5;
constexpr int kFanOut = 1 << kFanOutBits;
constexpr int kMaxLevels = 8;     // 2^31 leaves
constexpr int kSumBits = 62;      // the sum of all weights stays at or below 2^62
constexpr int kWeightBits = 27;   // priority^alpha lies below 2^27
constexpr int64_t kNothing = -1;  // what a draw from weights that are all 0 returns

// Why an update was refused: refused[0]; refused[1] is the index, refused[2] the bits of the priority as fp64.
constexpr int64_t kBadIndex = 1, kBadPriority = 2;

// All nodes in one array: leaves first, root last, every level but the root padded to a multiple of 32.
struct Layout {
  int levels;                 // the leaves and the root included
  int64_t begin[kMaxLevels];  // where each level starts
  int64_t size;               // nodes
};

inline Layout layout_of(int64_t capacity) {
  Layout layout{};
  int64_t nodes = capacity;
  do {
    const int64_t blocks = (nodes + kFanOut - 1) / kFanOut;
    layout.begin[layout.levels++] = layout.size;
    layout.size += blocks * kFanOut;
    nodes = blocks;
  } while (nodes > 1);
  layout.begin[layout.levels++] = layout.size++;
  return layout;
}

// Bits of a weight behind the binary point: capacity * 2^(kWeightBits + fraction_bits) <= 2^kSumBits.
inline int fraction_bits(int64_t capacity) {
  int bits = 0;
  while ((capacity - 1) >> bits) ++bits;
  return kSumBits - kWeightBits - bits;
}

SUM_TREE_FN double as_double(int64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SUM_TREE_FN int64_t as_bits(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// x^alpha for finite x > 0 and alpha >= 0: exact for alpha 0 and 1, else within 1e-14 relative where it is below 2^27
// and above 2^-62 (what lies outside is refused or rounds to one unit). The libraries' pow differ in their last bit.
SUM_TREE_FN double power(double x, double alpha) {
  if (alpha == 1.0) return x;
  if (alpha == 0.0) return 1.0;
  int64_t exponent = 0;
  if (x < 0x1p-1022) {  // a subnormal number
    x = x * 0x1p54;
    exponent = -54;
  }
  const int64_t bits = as_bits(x);
  exponent += (bits >> 52) - 1023;
  double m = as_double((bits & 0xFFFFFFFFFFFFF) | (int64_t{1023} << 52));  // [1, 2)
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    exponent += 1;
  }
  // log2(m) = 2 / ln 2 * (s + s^3 / 3 + s^5 / 5 + ...), |s| < 0.172
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 1.0 / 23;
  SUM_TREE_UNROLL
  for (int k = 21; k >= 1; k -= 2) series = series * z + 1.0 / k;
  const double log2x = static_cast<double>(exponent) + (s * series) * 2.8853900817779268;
  double y = alpha * log2x;
  y = y < -1000.0 ? -1000.0 : (y > 1000.0 ? 1000.0 : y);
  const double whole = rint(y), t = (y - whole) * 0.6931471805599453;
  double factorial = 6227020800.0, e = 1.0 / factorial;  // 13!, exact
  SUM_TREE_UNROLL
  for (int k = 13; k >= 1; --k) {
    factorial = factorial / k;
    e = e * t + 1.0 / factorial;
  }
  return e * as_double((static_cast<int64_t>(whole) + 1023) << 52);
}

// The weight of a priority as an integer, or false where the priority is refused. Above 0 it never becomes 0.
SUM_TREE_FN bool fixed_point(double priority, double alpha, int fraction, int64_t* weight) {
  *weight = 0;
  if (!(priority >= 0.0 && priority <= 0x1.fffffffffffffp1023)) return false;
  if (priority == 0.0) return true;
  const double value = power(priority, alpha);
  if (!(value < static_cast<double>(1 << kWeightBits))) return false;
  const int64_t most = (int64_t{1} << (kWeightBits + fraction)) - 1;
  const int64_t rounded = static_cast<int64_t>(rint(value * static_cast<double>(int64_t{1} << fraction)));
  *weight = rounded < 1 ? 1 : (rounded > most ? most : rounded);
  return true;
}

SUM_TREE_FN uint64_t multiply_high(uint64_t x, uint64_t y) {
#ifdef __CUDA_ARCH__
  return __umul64hi(x, y);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x) * y >> 64);
#endif
}

// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3), in place.
SUM_TREE_FN void philox(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  SUM_TREE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t c1 = counter[1], c3 = counter[3];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    counter[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// The 64 random bits of a draw: a function of the caller's seed and offset, of the draw and of its round.
SUM_TREE_FN uint64_t random_64(uint64_t seed, uint64_t offset, uint32_t draw, uint32_t round) {
  uint32_t counter[4] = {draw, round, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)};
  philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return counter[0] | static_cast<uint64_t>(counter[1]) << 32;
}

// The first child whose running sum exceeds `rest`: its own weight is then above 0. Takes what stands before it from
// `rest`. First among 8 groups of 4 children, then among the 4; without branches, as the outcomes are random.
SUM_TREE_FN int child_of(const int64_t* block, int64_t& rest) {
  int64_t running = 0, before = 0;
  int group = 0;
  SUM_TREE_UNROLL
  for (int g = 0; g < 7; ++g) {
    running += (block[4 * g] + block[4 * g + 1]) + (block[4 * g + 2] + block[4 * g + 3]);
    const bool passed = running <= rest;
    group += passed;
    before = passed ? running : before;
  }
  running = before;
  int child = 4 * group;
  block += child;
  SUM_TREE_UNROLL
  for (int i = 0; i < 3; ++i) {
    running += block[i];
    const bool passed = running <= rest;
    child += passed;
    before = passed ? running : before;
  }
  rest -= before;
  return child;
}

}  // namespace sum_tree

// The ops, of which each library has its own. All memory is the caller's, on the library's device. `key` [2] holds a seed
// and an offset. On CUDA each op queues one kernel on `stream` and waits for nothing. Returns an error's text, or null.
extern "C" {
const char* sum_tree_update(
    int64_t* nodes, int64_t capacity, double alpha, const int64_t* indices, const double* priorities, int64_t n,
    int64_t* refused, void* stream);
const char* sum_tree_sample(
    const int64_t* nodes, int64_t capacity, const int64_t* key, uint32_t round, int64_t n, int64_t* slots,
    void* stream);
}
