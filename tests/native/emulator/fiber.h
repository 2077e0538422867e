// A user-level thread with a stack of its own. One fiber runs at a time; the scheduler resumes it, it suspends itself.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // Readies the fiber to run `entry` on `stack` when it is first resumed. `entry` must not return: it ends in finish().
  void prepare(char* stack, size_t stack_bytes, void (*entry)());
  // From the scheduler: runs this fiber until it suspends or finishes.
  void resume();
  // From a fiber: back to the scheduler, until the next resume().
  void suspend();
  // From a fiber: back to the scheduler for ever.
  [[noreturn]] void finish();
  // The first statement of `entry`.
  static void started();

 private:
  struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t registers;
#endif
    const void* stack = nullptr;  // what AddressSanitizer has to know of the stack that runs
    size_t stack_bytes = 0;
    void* sanitizer_state = nullptr;
  };
  enum class Leave { kForNow, kForEver };

  static void switch_to(Context& from, Context& to, Leave leave);
  static Context& scheduler();

  Context context_;
};

}  // namespace emulator
