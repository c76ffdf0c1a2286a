// The fiber of a simulated thread, and the switch between stacks. A fiber has a stack of
// STACK_BYTES, aligned to its size, with the fiber's data above the stack. Only simulated.cpp
// includes this file.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "simulated.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sim {

#if defined(__x86_64__)

// Saves the callee-saved registers and the stack pointer in *from, and continues where `to` was
// saved.
extern "C" void sim_switch(void** from, void* to) __attribute__((visibility("hidden")));

struct Context {
    void* stack_pointer = nullptr;

    // Prepares a context that starts `entry` on a new stack. `entry` never returns.
    void prepare(unsigned char* low, unsigned char* high, void (*entry)()) {
        (void)low;
        auto* top = reinterpret_cast<void**>(high);
        // The return address of `entry`, so that the stack pointer is 8 bytes off a multiple of 16,
        // as after a call.
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; saved++) *--top = nullptr;
        stack_pointer = top;
    }
    static void swap(Context& from, Context& to) { sim_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Context {
    std::unique_ptr<ucontext_t> context = std::make_unique<ucontext_t>();

    void prepare(unsigned char* low, unsigned char* high, void (*entry)()) {
        getcontext(context.get());
        context->uc_stack.ss_sp = low;
        context->uc_stack.ss_size = static_cast<size_t>(high - low);
        context->uc_link = nullptr;
        makecontext(context.get(), entry, 0);
    }
    static void swap(Context& from, Context& to) { swapcontext(from.context.get(), to.context.get()); }
};

#endif

// A cp.async for which the thread has not waited yet.
struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;  // null: zeros
    unsigned group;
};

struct Fiber : Thread {
    enum State { ready, in_collective, at_barrier, exited } state = exited;
    int line = 0;  // source line of the barrier at which the fiber waits
    struct {
        unsigned mask;
        Operation operation;
        void* argument;
        const char* name;
    } collective{};
    std::vector<AsyncCopy> copies;
    unsigned committed_groups = 0;
    Context context;

    static Fiber& here() { return static_cast<Fiber&>(sim::here()); }

    // Maps a stack whose lowest page is a guard page.
    static Fiber* create() {
        void* mapped = mmap(nullptr, 2 * STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        auto* const all = static_cast<unsigned char*>(mapped);
        const size_t before = -reinterpret_cast<uintptr_t>(all) & (STACK_BYTES - 1);
        if (before > 0) munmap(all, before);
        if (before < STACK_BYTES) munmap(all + before + STACK_BYTES, STACK_BYTES - before);
        mprotect(all + before, static_cast<size_t>(getpagesize()), PROT_NONE);
        return new (reinterpret_cast<void*>(place_of_thread(reinterpret_cast<uintptr_t>(all + before))))
            Fiber;
    }

    unsigned char* stack_low() {
        return reinterpret_cast<unsigned char*>(reinterpret_cast<uintptr_t>(this) & ~(STACK_BYTES - 1)) +
               getpagesize();
    }
    unsigned char* stack_high() { return reinterpret_cast<unsigned char*>(this); }

    // Initializes the fiber as thread `of_rank` of a block, which will start in `entry`.
    void begin(Block& of_block, unsigned of_rank, const dim3& block, const dim3& dim, const dim3& grid,
               void (*entry)()) {
        index = dim3(of_rank % dim.x, of_rank / dim.x % dim.y, of_rank / dim.x / dim.y);
        block_index = &block;
        block_dim = &dim;
        grid_dim = &grid;
        rank = of_rank;
        lane = of_rank % WARP;
        this->block = &of_block;
        state = ready;
        copies.clear();
        committed_groups = 0;
        context.prepare(stack_low(), stack_high(), entry);
    }
};
static_assert(sizeof(Fiber) <= THREAD_BYTES);

}  // namespace sim
