// The simulated driver's own view: devices, memory, streams. The exported functions (cuda.h's names and binary interface) are in
// driver_*.cpp; the other libraries use the exported functions and those of shared.h.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "shared.h"

namespace driver {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_OUT_OF_RESOURCES = 701,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    PEER_ACCESS_NOT_ENABLED = 705,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
};

struct Device;

// A queue of work. Work submitted to an idle stream is done at once, on the calling thread; what has to wait (for an event, for peers) goes
// to the stream's own thread, and everything submitted after it too. With LORA_SIM_LATE=1 all work goes there, and starts only after a while
// or when somebody waits for it: so what a program forgot to wait for has not happened yet.
class Stream {
  public:
    Stream(Device& device, unsigned flags, int priority) : device(device), flags(flags), priority(priority) {}

    Device& device;
    const unsigned flags;
    const int priority;

    void submit(std::function<void()> work);
    void submit_to_thread(std::function<void()> work);  // never on the calling thread
    bool idle();
    void hurry();
    void wait();
    // Frees it once its work is done. Nobody uses the stream afterwards.
    static void destroy(Stream*);

  private:
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool busy = false, wanted = false, has_thread = false, ended = false;

    void push(std::unique_lock<std::mutex>&, std::function<void()>);
    void serve();
};

struct Pool {
    explicit Pool(Device& device) : device(device) {}

    Device& device;
    size_t used = 0, used_high = 0, reserved = 0, reserved_high = 0, threshold = 0;  // bytes
    int reuse[3] = {1, 1, 1};
    std::multiset<size_t> holes;  // with LORA_SIM_FRAGMENT: what was freed, each as large as it was
};

struct Device {
    explicit Device(int ordinal) : ordinal(ordinal) {}

    const int ordinal;
    unsigned retained = 0;  // its primary context; the handle of the context is the device's address
    std::mutex mutex;       // of what follows
    std::vector<Stream*> streams;
    Stream* legacy = nullptr;
    Stream* per_thread = nullptr;
    // Of memory, under the lock of memory.
    size_t total = 0, direct = 0;  // direct: not from a pool
    Pool default_pool{*this};
    Pool* pool = &default_pool;

    void wait();  // for all its streams
};

// After cuInit, all devices.
std::vector<Device*>& devices();
bool initialized();

// The calling thread's context, or null.
Device* current();
void set_current(Device*);

// A stream's handle to the stream; the null, legacy and per-thread handles are of the current context. Null where it is none.
Stream* stream_of(void* handle);

// Whether `bytes` from `address` lie in one living allocation of a device.
bool on_device(uint64_t address, size_t bytes);
// Gives back what pools hold beyond their release threshold, as a synchronization does.
void trim_pools(Device&);

}  // namespace driver
