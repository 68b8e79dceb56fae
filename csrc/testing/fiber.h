// Switching between stacks, with what the sanitizers need to know about it.
#pragma once

#include <cstddef>

#ifdef SIMT_ADDRESSES  // AddressSanitizer
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_RACES  // ThreadSanitizer
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStack = 128 << 10;

#ifdef __x86_64__
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch,@function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch,.-simt_switch
)");
#endif

// A place to run, or (default constructed) where the scheduler itself runs.
class Fiber {
  public:
    // Anew on the kStack bytes at `stack`; `entry` must not return.
    void start(char* stack, void (*entry)()) {
        bottom = stack, size = kStack, fake = nullptr;
#ifdef SIMT_ADDRESSES
        __asan_unpoison_memory_region(stack, kStack);
#endif
#ifdef SIMT_RACES
        race = __tsan_create_fiber(0);
#endif
#ifdef __x86_64__
        void** top = reinterpret_cast<void**>(stack + kStack) - 1;
        *top = nullptr;  // where entry would return to, so that the stack is aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        at = top;
#else
        getcontext(&context);
        context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
        makecontext(&context, entry, 0);
#endif
    }

    void stop() {
#ifdef SIMT_RACES
        if (race) __tsan_destroy_fiber(race);
        race = nullptr;
#endif
    }

    // From this one, which is running, to `other`; returns when `other` switches back.
    void switch_to(Fiber& other) {
#ifdef SIMT_ADDRESSES
        __sanitizer_start_switch_fiber(&fake, other.bottom, other.size);
#endif
#ifdef SIMT_RACES
        if (!race) race = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(other.race, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
        simt_switch(&at, other.at);
#else
        swapcontext(&context, &other.context);
#endif
        arrive(other);
    }

    // The first thing a fresh fiber does; `from` is where it came from.
    void arrive(Fiber& from) {
#ifdef SIMT_ADDRESSES
        __sanitizer_finish_switch_fiber(fake, &from.bottom, &from.size);
#else
        (void)from;
#endif
    }

  private:
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake = nullptr;
    void* race = nullptr;
#ifdef __x86_64__
    void* at = nullptr;
#else
    ucontext_t context;
#endif
};

}  // namespace simt
