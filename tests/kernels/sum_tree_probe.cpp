// Opens csrc/sum_tree.h to the tests: its arithmetic as C functions.
#include "sum_tree.h"

using namespace sum_tree;

extern "C" {

void probe_philox(uint32_t* counter, uint32_t key0, uint32_t key1) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  philox(words, key0, key1);
  for (int i = 0; i < 4; ++i) counter[i] = words[i];
}

void probe_random(int64_t seed, int64_t offset, int64_t n, uint32_t round, uint64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = random_64(seed, offset, static_cast<uint32_t>(i), round);
}

uint64_t probe_multiply_high(uint64_t x, uint64_t y) { return multiply_high(x, y); }

void probe_power(const double* x, double alpha, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = power(x[i], alpha);
}

void probe_slots(const int64_t* nodes, int64_t capacity, const uint64_t* random, int64_t n, int64_t* out) {
  const Layout layout = layout_of(capacity);
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = multiply_high(random[i], nodes[layout.size - 1]);
    out[i] = 0;
    for (int level = layout.levels - 2; level >= 0; --level)
      out[i] = out[i] * kFanOut + child_of(nodes + layout.begin[level] + out[i] * kFanOut, rest);
  }
}

int64_t probe_layout(int64_t capacity, int64_t* begin, int* fraction) {
  const Layout layout = layout_of(capacity);
  for (int i = 0; i < layout.levels; ++i) begin[i] = layout.begin[i];
  *fraction = fraction_bits(capacity);
  return layout.size;
}
}
