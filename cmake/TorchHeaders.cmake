# mtp_ext_torch_headers(): the interface target mtp_ext_torch_headers, with the headers of Python, torch and pybind11 that
# the interpreter finds. The target is absent, and MTP_EXT_TORCH_MISSING names the reason, when one of them is not there.
function(mtp_ext_torch_headers)
  find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
  if(NOT Python_FOUND)
    set(MTP_EXT_TORCH_MISSING "Python 3.10 with its C headers" PARENT_SCOPE)
    return()
  endif()
  set(directories ${Python_INCLUDE_DIRS})
  # pybind11 before torch, whose own copy refuses to be included beside the stable ABI (torch 2.11). Found, not imported:
  # an import of torch takes seconds.
  foreach(module pybind11 torch)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
              "from importlib.util import find_spec as f; s = f('${module}'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    if(NOT root)
      set(MTP_EXT_TORCH_MISSING "'${module}' in ${Python_EXECUTABLE}" PARENT_SCOPE)
      return()
    endif()
    list(APPEND directories ${root}/include)
  endforeach()
  add_library(mtp_ext_torch_headers INTERFACE)
  target_include_directories(mtp_ext_torch_headers SYSTEM INTERFACE ${directories})
endfunction()
