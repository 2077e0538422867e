# mtp_ext_own_code(target): what every target of our own code gets: C++17, warnings as errors, the sanitizers asked for.
set(MTP_EXT_SANITIZE "" CACHE STRING "Sanitizers for the native code, e.g. address,undefined")

function(mtp_ext_own_code target)
  target_compile_features(${target} PUBLIC cxx_std_17)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror>)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo -Xptxas=-v,--warn-on-spills --Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
  if(MTP_EXT_SANITIZE)
    set(flags -fsanitize=${MTP_EXT_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${flags}>)
    target_link_options(${target} PUBLIC ${flags})
  endif()
endfunction()
