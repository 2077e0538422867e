// The loss row kernel from C++, without torch: loss and gradient of a few rows of logits in device memory.
//   cmake -S . -B build/native && cmake --build build/native --target example_loss_rows
// In your own project: add_subdirectory(mtp_ext) and link the target mtp_kernels.
#include "kernels/loss_rows.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* to_device(const std::vector<T>& values) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, values.size() * sizeof(T)));
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

template <typename T>
std::vector<T> to_host(const T* values, size_t size) {
  std::vector<T> result(size);
  check(cudaMemcpy(result.data(), values, size * sizeof(T), cudaMemcpyDeviceToHost));
  return result;
}

}  // namespace

int main() {
  constexpr int64_t kRows = 3, kVocab = 8;
  std::vector<float> logits(kRows * kVocab, 0.0f);
  logits[5] = 2.0f;                                            // row 0 prefers class 5
  const std::vector<int64_t> labels{5, 1, 7}, rows{0, 1, -1};  // the last row has no target
  mtp::LossRowsParams<float> p{};
  p.logits = to_device(logits);
  p.dtype = mtp::DType::kFloat32;
  p.row_stride = p.vocab_size = p.options.vocab_size = kVocab;
  p.rows = to_device(rows);
  p.targets.labels = to_device(labels);
  p.targets.label_type = mtp::IndexType::kInt64;
  p.targets.batch = 1;
  p.targets.seq_len = p.targets.label_len = p.targets.label_stride = kRows;
  p.head_scale = to_device(std::vector<float>{0.5f});  // a mean over two rows
  p.options.logit_scale = 1.0;
  p.gradient = mtp::Gradient::kWrite;
  p.tables.loss = to_device(std::vector<float>(kRows, 0.0f));
  p.tables.lse = to_device(std::vector<float>(kRows, 0.0f));
  p.tables.predicted = to_device(std::vector<int32_t>(kRows, -1));
  check(mtp::launch_loss_rows(p, kRows, nullptr));
  check(cudaDeviceSynchronize());
  const std::vector<float> loss = to_host(p.tables.loss, kRows),
                           gradient = to_host(static_cast<float*>(p.logits), kVocab);
  for (const float x : loss) std::printf("loss %.6f\n", static_cast<double>(x));
  for (const float g : gradient) std::printf("%+.6f ", static_cast<double>(g));
  std::printf("\n");
  return 0;
}
