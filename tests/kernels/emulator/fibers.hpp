// GPU threads as fibers of one thread of the CPU. Which of those that can run goes on next is drawn from a seeded
// generator at every point where a thread waits, so a seed is one schedule, and can be had again.
//
// Under ThreadSanitizer every fiber counts as a thread, and only what the primitives below say orders two accesses:
// switching does not. Under AddressSanitizer the stacks are announced.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
inline void AnnotateIgnoreReadsBegin(const char*, int) {}
inline void AnnotateIgnoreReadsEnd(const char*, int) {}
inline void AnnotateIgnoreWritesBegin(const char*, int) {}
inline void AnnotateIgnoreWritesEnd(const char*, int) {}
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// The emulator's own state is shared by all fibers on purpose.
struct Untracked {
    Untracked() { ignore(AnnotateIgnoreReadsBegin, AnnotateIgnoreWritesBegin); }
    ~Untracked() { ignore(AnnotateIgnoreReadsEnd, AnnotateIgnoreWritesEnd); }

  private:
    using Annotation = void(const char*, int);
    static void ignore(Annotation* reads, Annotation* writes) {
        reads(__FILE__, __LINE__);
        writes(__FILE__, __LINE__);
    }
};

// "What I did before this comes before what others do after `acquired` on the same object."
inline void released([[maybe_unused]] const void* object) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(const_cast<void*>(object));
#endif
}
inline void acquired([[maybe_unused]] const void* object) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(const_cast<void*>(object));
#endif
}

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    int block = 0, thread = 0;
    bool done = false;
    void* tsan = nullptr;
    void* fake_stack = nullptr;
};

constexpr size_t STACK_BYTES = 128 << 10;

class Scheduler {
  public:
    explicit Scheduler(uint64_t seed) : random(seed) {}

    void add(int block, int thread, std::function<void()> body) {
        auto fiber = std::make_unique<Fiber>();
        fiber->block = block, fiber->thread = thread, fiber->body = std::move(body);
        fiber->stack.reset(new char[STACK_BYTES]);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, &Scheduler::enter, 0);
#ifdef __SANITIZE_THREAD__
        fiber->tsan = __tsan_create_fiber(0);
#endif
        ready.push_back(fiber.get());
        fibers.push_back(std::move(fiber));
    }

    // Until all fibers are done; `tick` is called now and then, and says whether it did something.
    void run(const std::function<bool()>& tick) {
        instance = this;
        Untracked untracked;
#ifdef __SANITIZE_THREAD__
        main_tsan = __tsan_get_current_fiber();
#endif
        released(this);
        size_t remaining = fibers.size();
        while (remaining) {
            if (ready.empty() || random() % 64 == 0) {
                if (!tick() && ready.empty()) throw std::runtime_error("deadlock: every thread of the kernel waits");
                continue;
            }
            const size_t i = random() % ready.size();
            current = ready[i];
            ready[i] = ready.back();
            ready.pop_back();
            swap(main, current->context, &main_fake_stack, current->stack.get(), current->tsan);
            if (error) std::rethrow_exception(error);
            remaining -= current->done;
        }
        acquired(this);
#ifdef __SANITIZE_THREAD__
        for (auto& fiber : fibers) __tsan_destroy_fiber(fiber->tsan);
#endif
    }

    // Let others run until `good`, which can become true only by an action that notifies of `object`.
    template <class Good> void wait(const void* object, Good&& good) {
        Untracked untracked;
        while (!good()) {
            waiting[object].push_back(current);
            leave(current);
        }
    }
    void yield() {
        Untracked untracked;
        ready.push_back(current);
        leave(current);
    }
    void notify(const void* object) {
        Untracked untracked;
        const auto found = waiting.find(object);
        if (found == waiting.end()) return;
        for (Fiber* fiber : found->second) ready.push_back(fiber);
        waiting.erase(found);
    }

    const Fiber& self() const {
        Untracked untracked;
        return *current;
    }

    static inline Scheduler* instance = nullptr;
    Fiber* current = nullptr;
    std::mt19937_64 random;

  private:
    void leave(Fiber* me) { swap(me->context, main, &me->fake_stack, nullptr, main_tsan); }

    void swap(ucontext_t& from, ucontext_t& to, [[maybe_unused]] void** fake, [[maybe_unused]] const char* stack,
              [[maybe_unused]] void* tsan) {
#ifdef __SANITIZE_ADDRESS__
        if (stack) __sanitizer_start_switch_fiber(fake, stack, STACK_BYTES);
        else __sanitizer_start_switch_fiber(current->done ? nullptr : fake, main_stack, main_stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
        __tsan_switch_to_fiber(tsan, __tsan_switch_to_fiber_no_sync);
#endif
        swapcontext(&from, &to);
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(*fake, stack ? nullptr : &main_stack, stack ? nullptr : &main_stack_bytes);
#endif
    }

    static void enter() {
        Scheduler* self;
        Fiber* me;
        {
            Untracked untracked;
            self = instance;
            me = self->current;
#ifdef __SANITIZE_ADDRESS__
            __sanitizer_finish_switch_fiber(nullptr, &self->main_stack, &self->main_stack_bytes);
#endif
        }
        acquired(self);
        try {
            me->body();
        } catch (...) {
            Untracked untracked;
            self->error = std::current_exception();
        }
        released(self);
        void* home;
        {
            Untracked untracked;
            me->done = true;
            home = self->main_tsan;
        }
        self->swap(me->context, self->main, &me->fake_stack, nullptr, home);
    }

    ucontext_t main;
    std::exception_ptr error;
    void* main_tsan = nullptr;
    void* main_fake_stack = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_bytes = 0;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> ready;
    std::unordered_map<const void*, std::vector<Fiber*>> waiting;
};

}  // namespace emulator
