// The current CUDA stream through torch's stable ABI, and the checks of the CUDA ops.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>

#include "ops/check.h"

// torch's shim declares it only if torch was configured with USE_CUDA; libtorch_cuda has exported it since 2.6.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace mtp {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else torch would report the error after its own next launch
  STD_TORCH_CHECK(false, name, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

// The dispatcher looks at one argument only; a kernel given another device's pointer corrupts memory.
template <typename Tensors = std::initializer_list<OptionalTensor>>
void check_same_device(const Tensor& first, const Tensors& others) {
  const auto check = [&](const OptionalTensor& x) {
    STD_TORCH_CHECK(!x.has_value() || (x->is_cuda() && x->get_device_index() == first.get_device_index()),
                    "every tensor must be on CUDA device ", first.get_device_index());
  };
  for (const auto& x : others) check(x);
}

}  // namespace mtp
