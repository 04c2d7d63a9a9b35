// Launchers of the sum tree's CUDA kernels. Each queues one kernel on `stream`, waits for nothing, and returns an error's
// text or null.
#pragma once

#include "sum_tree.h"

namespace sum_tree {

const char* launch_update(
    int64_t* nodes, int64_t capacity, double alpha, const int64_t* indices, const double* priorities, int64_t n,
    int64_t* refused, void* stream);
const char* launch_sample(const int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots,
                          void* stream);
const char* launch_sample_distinct(int64_t* nodes, int64_t capacity, const int64_t* key, int64_t n, int64_t* slots,
                                   int64_t* taken, int64_t* ended, void* stream);

}  // namespace sum_tree
