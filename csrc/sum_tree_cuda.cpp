// The sum tree's ops on CUDA tensors: PyTorch's stable ABI around the launchers. Schemas are in sum_tree_cpu.cpp.
#include "sum_tree_arguments.h"
#include "sum_tree_cuda.h"

namespace sum_tree {
namespace {

// The tensor's device is current for as long as this lives, and its stream is the caller's.
class Queue {
 public:
  explicit Queue(const Tensor& nodes) : guard_(nodes.get_device_index()) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(nodes.get_device_index(), &stream_) == 0, "no current CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "sum tree: ", error ? error : ""); }

void update(
    Tensor nodes, int64_t capacity, double alpha, Tensor indices, Tensor priorities, Tensor refused) {
  checked_layout(nodes, capacity);
  const int64_t n = indices.numel();
  check(indices, "indices", n, nodes);
  check(priorities, "priorities", n, nodes);
  check(refused, "refused", 3, nodes);
  const Queue queue(nodes);
  check_launch(launch_update(
      nodes.mutable_data_ptr<int64_t>(), capacity, alpha, indices.const_data_ptr<int64_t>(),
      priorities.const_data_ptr<double>(), n, refused.mutable_data_ptr<int64_t>(), queue.stream()));
}

void sample(Tensor nodes, int64_t capacity, Tensor key, Tensor slots) {
  checked_layout(nodes, capacity);
  const int64_t n = checked_draws(slots, nodes);
  check(key, "key", 2, nodes);
  const Queue queue(nodes);
  check_launch(launch_sample(
      nodes.const_data_ptr<int64_t>(), capacity, key.const_data_ptr<int64_t>(), n, slots.mutable_data_ptr<int64_t>(),
      queue.stream()));
}

void sample_distinct(Tensor nodes, int64_t capacity, Tensor key, Tensor slots, Tensor taken, Tensor ended) {
  checked_layout(nodes, capacity);
  const int64_t n = checked_draws(slots, nodes);
  check(key, "key", 2, nodes);
  check(taken, "taken", n, nodes);
  check(ended, "ended", 1, nodes);
  const Queue queue(nodes);
  check_launch(launch_sample_distinct(
      nodes.mutable_data_ptr<int64_t>(), capacity, key.const_data_ptr<int64_t>(), n,
      slots.mutable_data_ptr<int64_t>(), taken.mutable_data_ptr<int64_t>(), ended.mutable_data_ptr<int64_t>(),
      queue.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rethinker, CUDA, library) {
  library.impl("sum_tree_update_", TORCH_BOX(&update));
  library.impl("sum_tree_sample_", TORCH_BOX(&sample));
  library.impl("sum_tree_sample_distinct_", TORCH_BOX(&sample_distinct));
}

}  // namespace sum_tree
