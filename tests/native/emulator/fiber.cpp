#include "emulator/fiber.h"

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Pushes the callee-saved registers, stores the stack pointer and continues on the other stack. swapcontext would make
// two system calls for the signal mask per switch, most of an emulated kernel's time.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(.text
.globl emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack,.-emulator_switch_stack
)");
#endif

namespace emulator {

Fiber::Context& Fiber::scheduler() {
  static Context context;
  return context;
}

void Fiber::prepare(char* stack, size_t stack_bytes, void (*entry)()) {
  context_ = Context{};
  context_.stack = stack;
  context_.stack_bytes = stack_bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, stack_bytes);  // the stack's last user left its redzones
#endif
#if defined(__x86_64__)
  constexpr int kSavedRegisters = 6;
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{63};
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // entry's return address: aligns the stack as after a call
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  context_.stack_pointer = slot;
#else
  getcontext(&context_.registers);
  context_.registers.uc_stack.ss_sp = stack;
  context_.registers.uc_stack.ss_size = stack_bytes;
  context_.registers.uc_link = nullptr;
  makecontext(&context_.registers, entry, 0);
#endif
}

void Fiber::switch_to(Context& from, Context& to, Leave leave) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leave == Leave::kForEver ? nullptr : &from.sanitizer_state, to.stack, to.stack_bytes);
#else
  static_cast<void>(leave);
#endif
#if defined(__x86_64__)
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#endif
}

void Fiber::started() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler().stack, &scheduler().stack_bytes);
#endif
}

void Fiber::resume() { switch_to(scheduler(), context_, Leave::kForNow); }

void Fiber::suspend() { switch_to(context_, scheduler(), Leave::kForNow); }

void Fiber::finish() {
  switch_to(context_, scheduler(), Leave::kForEver);
  std::abort();  // a finished fiber was resumed
}

}  // namespace emulator
