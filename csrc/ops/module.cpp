// What is not a tensor op. Importing the module registers torch.ops.mtp_ext.*.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/huge_pages.h"

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
  m.def("build_info", &build_info, "How this extension was built, and what it runs on.");
}
