// Python bindings other than tensor ops. Importing the module registers torch.ops.mtp_ext.*.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/chunk_size.h"
#include "cpu/capability.h"
#include "cpu/huge_pages.h"
#include "cpu/workspace.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#ifdef MTP_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cpu_capability"] = mtp::capability_name(mtp::cpu_capability());
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native backend of mtp_ext; importing it registers torch.ops.mtp_ext.*";
  m.def(
      "advise_huge_pages",
      [](uintptr_t address, size_t bytes) { mtp::advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for huge pages behind a fresh allocation.");
  m.attr("HUGE_PAGE_BYTES") = mtp::kHugePageBytes;
  m.attr("KEPT_BYTES") = mtp::kKeptBytes;
  m.def("release_workspace", &mtp::release_workspace, "Frees the block that the loss keeps; returns its bytes.");
  m.def(
      "chunk_size",
      [](int64_t rows, int64_t vocab_size, int64_t item_size, int64_t gpu_width, int64_t limit_rows,
         int64_t limit_bytes, int64_t sum_width) {
        return mtp::chunk_size(rows, vocab_size, item_size, gpu_width, {limit_rows, limit_bytes}, sum_width);
      },
      "Rows of one chunk of logits: see csrc/core/chunk_size.h.");
  m.def("build_info", &build_info, "How this extension was built, and what it runs on.");
}
