// Signal handlers that name the running kernel and thread if a simulated thread accesses memory
// that is not mapped or is misaligned (kernels are built to trap on misaligned accesses). Only
// simulated.cpp includes this file.
#pragma once

#include <csignal>

#include "simulated.h"

namespace sim {

#if defined(__SANITIZE_ADDRESS__)
inline void catch_faults() {}  // the sanitizer reports them
#else

constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
inline struct sigaction before_us[65];

bool runs_kernel();  // whether this thread runs a kernel

inline void on_fault(int signal, siginfo_t* info, void*) {
    sigaction(signal, &before_us[signal], nullptr);
    if (!runs_kernel()) return;  // the fault happens again, and the previous handler gets it
    ::signal(SIGABRT, SIG_DFL);
    switch (signal) {
        case SIGILL: fail("a misaligned access, or another undefined operation");
        case SIGFPE: fail("an integer division by zero");
        default: fail("an access to memory at %p, which does not exist or is misaligned", info->si_addr);
    }
}

// Installs the handlers at the first launch.
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
