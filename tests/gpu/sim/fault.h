// Names the running kernel and thread when a simulated thread touches memory that is not there, or misaligned (kernels are built to trap on
// that). For simulated.cpp alone.
#pragma once

#include <csignal>

#include "simulated.h"

namespace sim {

#if defined(__SANITIZE_ADDRESS__)
inline void catch_faults() {}  // the sanitizer reports them
#else

constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
inline struct sigaction before_us[65];

bool runs_kernel();  // on this thread

inline void on_fault(int signal, siginfo_t* info, void*) {
    sigaction(signal, &before_us[signal], nullptr);
    if (!runs_kernel()) return;  // happens again, and goes to whoever was there before us
    ::signal(SIGABRT, SIG_DFL);
    switch (signal) {
        case SIGILL: fail("a misaligned access, or another undefined operation");
        case SIGFPE: fail("an integer division by zero");
        default: fail("an access to memory at %p, which does not exist or is misaligned", info->si_addr);
    }
}

// From the first launch on.
inline void catch_faults() {
    static const bool once = [] {
        struct sigaction ours = {};
        ours.sa_sigaction = on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (const int signal : FAULTS) sigaction(signal, &ours, &before_us[signal]);
        return true;
    }();
    (void)once;
}
#endif

}  // namespace sim
