// What the simulated libraries share: how they export, report and reach the driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Exported by libcuda.so.1 for the libraries above it. `work` runs in the stream's order, at once where the stream is idle; false where
// there is no such stream.
EXPORT bool lora_sim_submit(void* stream, void (*work)(void*), void* argument);
// Whether `bytes` from `address` lie in one living allocation on a device.
EXPORT bool lora_sim_on_device(const void* address, size_t bytes);

// The same of any callable.
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
