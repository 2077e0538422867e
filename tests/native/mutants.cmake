# Mistakes made on purpose in the kernels' own source, one at a time: each must be caught by the test of its kernel.
#   mtp_ext_mutant(name FILE of-csrc/kernels TEST kernel OLD text NEW text EXPECT regex-of-the-test's-output)
function(mtp_ext_mutant name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "FILE;TEST;OLD;NEW;EXPECT" "")
  set(source ${PROJECT_SOURCE_DIR}/csrc/kernels/${arg_FILE})
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/mutants/${name})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source})
  file(READ ${source} text)
  string(REPLACE "${arg_OLD}" "${arg_NEW}" mutated "${text}")
  if(mutated STREQUAL text)
    message(FATAL_ERROR "mtp_ext: mutant ${name}: csrc/kernels/${arg_FILE} has no '${arg_OLD}' any more; name another mistake")
  endif()
  file(CONFIGURE OUTPUT ${folder}/kernels/${arg_FILE} CONTENT "${mutated}" @ONLY)
  set(kernel ${PROJECT_SOURCE_DIR}/csrc/kernels/${arg_TEST}.cu)
  if(arg_FILE MATCHES "\\.cu$")
    set(kernel ${folder}/kernels/${arg_FILE})
    set_source_files_properties(${kernel} PROPERTIES LANGUAGE CXX)
  endif()
  add_executable(mutant_${name} test_emulated_${arg_TEST}.cpp ${kernel})
  target_include_directories(mutant_${name} BEFORE PRIVATE ${folder})
  target_link_libraries(mutant_${name} PRIVATE mtp_emulator)
  add_test(NAME mutant_${name} COMMAND mutant_${name})
  set_tests_properties(mutant_${name} PROPERTIES TIMEOUT 120 ENVIRONMENT MTP_STOP_AT_FAILURE=1 PASS_REGULAR_EXPRESSION "${arg_EXPECT}")
endfunction()

set(wrong_result "passed, [1-9][0-9]* failed")
mtp_ext_mutant(removed_barrier FILE reduce.cuh TEST select_rows
  OLD "  __syncthreads();\n" NEW "" EXPECT "${wrong_result}|emulator: arithmetic fault")
mtp_ext_mutant(divergent_barrier FILE reduce.cuh TEST select_rows
  OLD "  __syncthreads();" NEW "  if (lane < 31) __syncthreads();" EXPECT "emulator: divergent barrier")
mtp_ext_mutant(wrong_shuffle_mask FILE reduce.cuh TEST select_rows
  OLD "kFullMask = 0xffffffffu" NEW "kFullMask = 0x0000ffffu" EXPECT "emulator: a (warp operation's|shuffle)")
mtp_ext_mutant(removed_cluster_barrier FILE loss_rows_cached.cuh TEST loss_rows
  OLD "    if (thread == 0) scratch.block_part = part;\n    cluster_sync();" NEW "    if (thread == 0) scratch.block_part = part;"
  EXPECT "${wrong_result}|emulator: map_shared_rank")
mtp_ext_mutant(early_exit_of_cluster FILE loss_rows_cached.cuh TEST loss_rows
  OLD "  if constexpr (kBlocks == Blocks::kCluster) cluster_wait();  // nobody" NEW "  // nobody"
  EXPECT "emulator: a thread ends between the halves of a cluster barrier")
mtp_ext_mutant(no_barrier_for_the_gradient FILE loss_rows_cached.cuh TEST loss_rows
  OLD "  __syncthreads();\n  if constexpr" NEW "  if constexpr" EXPECT "${wrong_result}|emulator: map_shared_rank")
mtp_ext_mutant(wrong_merge FILE loss_rows_parts.cuh TEST loss_rows
  OLD "rescaled_sum(a, max) + rescaled_sum(b, max)" NEW "a.sum + b.sum" EXPECT "${wrong_result}")
mtp_ext_mutant(missed_row_end FILE logit_row.cuh TEST loss_rows
  OLD "    if (owns_ragged<kThreads>()) visit(whole_end, std::false_type{});" NEW "" EXPECT "${wrong_result}")
mtp_ext_mutant(missed_padding FILE logit_row.cuh TEST loss_rows
  OLD "if (!holds(vector, j)) u[j] = -INFINITY;" NEW "{}" EXPECT "${wrong_result}")
mtp_ext_mutant(wrong_owner FILE logit_row.cuh TEST loss_rows
  OLD "(vector - begin) % kThreads ==" NEW "(vector - begin + 1) % kThreads ==" EXPECT "${wrong_result}")
mtp_ext_mutant(stale_argmax FILE loss_rows_cached.cuh TEST loss_rows
  OLD "    scratch.argmax = kNowhere;\n" NEW "" EXPECT "${wrong_result}")
mtp_ext_mutant(target_not_left_out FILE loss_rows_cached.cuh TEST loss_rows
  OLD "if (!Row::kScaled && i == target_vector) return;" NEW "" EXPECT "${wrong_result}")
mtp_ext_mutant(out_of_bounds FILE select_rows.cu TEST select_rows
  OLD "in_head(step) < rows_per_head" NEW "in_head(step) <= rows_per_head" EXPECT "emulator: out-of-bounds access")
