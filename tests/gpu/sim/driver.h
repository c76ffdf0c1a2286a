// Internal types of the simulated driver: devices, memory, streams. The exported functions
// (cuda.h's names and binary interface) are in driver_*.cpp. The other libraries use the exported
// functions and those of shared.h.
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

// A queue of work. Work that is submitted to an idle stream runs at once, on the calling thread.
// Work that has to wait for an event or for peers runs on the stream's own thread, and so does all
// work that is submitted after it. With LORA_SIM_LATE=1 all work runs on the stream's thread, and
// starts only after a delay or when a thread waits for it, so a missing wait shows that the work
// has not happened yet.
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
    // Frees the stream once its work is done. The stream must not be used afterwards.
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
    std::multiset<size_t> holes;  // with LORA_SIM_FRAGMENT: the sizes of freed blocks
};

struct Device {
    explicit Device(int ordinal) : ordinal(ordinal) {}

    const int ordinal;
    unsigned retained = 0;  // references to the primary context, whose handle is the device's address
    std::mutex mutex;       // guards the streams
    std::vector<Stream*> streams;
    Stream* legacy = nullptr;
    Stream* per_thread = nullptr;
    // The lock of memory guards these fields. `direct` counts bytes that are not from a pool.
    size_t total = 0, direct = 0;
    Pool default_pool{*this};
    Pool* pool = &default_pool;

    void wait();  // waits for all streams of the device
};

// All devices, after cuInit.
std::vector<Device*>& devices();
bool initialized();

// The calling thread's context, or null.
Device* current();
void set_current(Device*);

// Returns the stream of a handle, or null if the handle is invalid. The null, legacy and per-thread
// handles belong to the current context.
Stream* stream_of(void* handle);

// Whether `bytes` from `address` lie in one allocation of a device that has not been freed.
bool on_device(uint64_t address, size_t bytes);
// Releases the unused memory of pools above their release threshold, as a synchronization does.
void trim_pools(Device&);

}  // namespace driver
