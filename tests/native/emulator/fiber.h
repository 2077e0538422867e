// A user-level thread with its own stack. One fiber runs at a time: the scheduler resumes it, and it suspends itself.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  // Prepares the fiber to run `entry` on `stack` at the first resume(). `entry` must end in finish(), not return.
  void prepare(char* stack, size_t stack_bytes, void (*entry)());
  // From the scheduler: runs this fiber until it suspends or finishes.
  void resume();
  // From a fiber: returns to the scheduler until the next resume().
  void suspend();
  // From a fiber: returns to the scheduler for good.
  [[noreturn]] void finish();
  // Must be the first statement of `entry`.
  static void started();

 private:
  struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t registers;
#endif
    const void* stack = nullptr;  // the running stack, for AddressSanitizer
    size_t stack_bytes = 0;
    void* sanitizer_state = nullptr;
  };
  enum class Leave { kForNow, kForEver };

  static void switch_to(Context& from, Context& to, Leave leave);
  static Context& scheduler();

  Context context_;
};

}  // namespace emulator
