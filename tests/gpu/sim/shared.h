// Declarations that the simulated libraries share: exports, and the driver's functions for the
// other libraries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs `work` in the stream's order, at once if the stream is idle. Returns false if the stream
// does not exist. libcuda.so.1 exports this function for the other libraries.
EXPORT bool lora_sim_submit(void* stream, void (*work)(void*), void* argument);
// Whether `bytes` from `address` lie in one allocation on a device that has not been freed.
EXPORT bool lora_sim_on_device(const void* address, size_t bytes);

// Like lora_sim_submit, with any callable.
inline bool submit(void* stream, std::function<void()> work) {
    auto* const owned = new std::function<void()>(std::move(work));
    const auto run = [](void* argument) {
        auto* const owned = static_cast<std::function<void()>*>(argument);
        (*owned)();
        delete owned;
    };
    if (lora_sim_submit(stream, run, owned)) return true;
    delete owned;
    return false;
}
