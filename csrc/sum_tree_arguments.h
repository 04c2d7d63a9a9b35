// What every op checks before it touches memory: sizes, devices, contiguity. PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "sum_tree.h"

namespace sum_tree {

using torch::stable::Tensor;

inline void check(const Tensor& tensor, const char* name, int64_t numel, const Tensor& nodes) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": must hold ", numel, " numbers, not ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
  STD_TORCH_CHECK(
      tensor.is_cuda() == nodes.is_cuda() && tensor.get_device_index() == nodes.get_device_index(),
      name, ": must be on the device of nodes");
}

inline Layout checked_layout(const Tensor& nodes, int64_t capacity) {
  STD_TORCH_CHECK(
      1 <= capacity && capacity <= int64_t{1} << 31, "capacity=", capacity, ": must be between 1 and 2^31");
  const Layout layout = layout_of(capacity);
  check(nodes, "nodes", layout.size, nodes);
  return layout;
}

inline int64_t checked_draws(const Tensor& slots, const Tensor& nodes) {
  const int64_t n = slots.numel();
  check(slots, "slots", n, nodes);
  STD_TORCH_CHECK(n <= int64_t{1} << 31, "slots: at most 2^31 draws at once, not ", n);
  return n;
}

}  // namespace sum_tree
