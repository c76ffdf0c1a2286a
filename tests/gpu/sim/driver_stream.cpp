// Streams and events.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "driver.h"

namespace driver {

namespace {

bool late() {
    static const bool late = [] {
        const char* text = getenv("LORA_SIM_LATE");
        return text != nullptr && *text != '\0' && *text != '0';
    }();
    return late;
}
constexpr auto LATE = std::chrono::milliseconds(20);

constexpr unsigned NON_BLOCKING = 1;
// Waits as CUDA's implicit synchronization does: the legacy stream and blocking streams wait for
// each other's work.
void wait_for_implicit(Stream& stream) {
    if (stream.flags & NON_BLOCKING) return;
    Device& device = stream.device;
    std::vector<Stream*> others;
    if (&stream == device.legacy) {
        const std::lock_guard lock(device.mutex);
        for (Stream* other : device.streams) {
            if (other != &stream && !(other->flags & NON_BLOCKING)) others.push_back(other);
        }
    } else {
        others = {device.legacy};
    }
    for (Stream* other : others) {
        if (!other->idle()) other->wait();
    }
}

}  // namespace

void Stream::submit(std::function<void()> work) {
    wait_for_implicit(*this);
    std::unique_lock lock(mutex);
    if (late() || busy || !queue.empty()) return push(lock, std::move(work));
    busy = true;
    lock.unlock();
    work();
    lock.lock();
    busy = false;
    changed.notify_all();
}

void Stream::submit_to_thread(std::function<void()> work) {
    wait_for_implicit(*this);
    std::unique_lock lock(mutex);
    push(lock, std::move(work));
}

void Stream::push(std::unique_lock<std::mutex>&, std::function<void()> work) {
    queue.push_back(std::move(work));
    if (!has_thread) {
        has_thread = true;
        std::thread([this] { serve(); }).detach();  // until destroy()
    }
    changed.notify_all();
}

void Stream::serve() {
    std::unique_lock lock(mutex);
    for (;;) {
        changed.wait(lock, [this] { return !busy && (!queue.empty() || ended); });
        if (queue.empty()) break;
        if (late()) changed.wait_for(lock, LATE, [this] { return wanted || ended; });
        while (!queue.empty()) {
            const auto work = std::move(queue.front());
            queue.pop_front();
            busy = true;
            lock.unlock();
            work();
            lock.lock();
            busy = false;
        }
        wanted = false;
        changed.notify_all();
    }
    lock.unlock();
    delete this;
}

bool Stream::idle() {
    const std::lock_guard lock(mutex);
    return queue.empty() && !busy;
}

void Stream::hurry() {
    const std::lock_guard lock(mutex);
    if (queue.empty()) return;
    wanted = true;
    changed.notify_all();
}

void Stream::wait() {
    std::unique_lock lock(mutex);
    if (!queue.empty()) wanted = true;
    changed.notify_all();
    changed.wait(lock, [this] { return queue.empty() && !busy; });
}

void Stream::destroy(Stream* stream) {
    std::unique_lock lock(stream->mutex);
    if (stream->has_thread) {
        stream->ended = true;
        stream->changed.notify_all();
    } else {
        stream->changed.wait(lock, [stream] { return !stream->busy; });
        lock.unlock();
        delete stream;
    }
}

void Device::wait() {
    std::vector<Stream*> all;
    {
        const std::lock_guard lock(mutex);
        all = streams;
    }
    for (Stream* stream : all) stream->wait();
    trim_pools(*this);
}

Stream* stream_of(void* handle) {
    Device* device = current();
    const auto number = reinterpret_cast<uintptr_t>(handle);
    if (number <= 2) {
        if (device == nullptr) return nullptr;
        return number == 2 ? device->per_thread : device->legacy;
    }
    for (Device* each : devices()) {
        const std::lock_guard lock(each->mutex);
        const auto& all = each->streams;
        if (std::find(all.begin(), all.end(), handle) != all.end()) return static_cast<Stream*>(handle);
    }
    return nullptr;
}

namespace {

// One recording of an event.
struct StreamEvent {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    std::chrono::steady_clock::time_point at;
    Stream* stream = nullptr;

    bool is_done() {
        const std::lock_guard lock(mutex);
        return done;
    }
    void wait() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return done; });
    }
    void finish() {
        const std::lock_guard lock(mutex);
        done = true;
        at = std::chrono::steady_clock::now();
        changed.notify_all();
    }
};

struct Event {
    std::mutex mutex;
    std::shared_ptr<StreamEvent> last;  // null: never recorded
    const bool timed;

    std::shared_ptr<StreamEvent> mark() {
        const std::lock_guard lock(mutex);
        return last;
    }
};

// Lets the stream of a recorded event start its work, because a thread waits for the event.
void hurry(const StreamEvent& mark) {
    for (Device* device : devices()) {
        const std::lock_guard lock(device->mutex);
        if (std::find(device->streams.begin(), device->streams.end(), mark.stream) != device->streams.end())
            mark.stream->hurry();
    }
}

}  // namespace

}  // namespace driver

using namespace driver;

EXPORT bool lora_sim_submit(void* handle, void (*work)(void*), void* argument) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return false;
    stream->submit([=] { work(argument); });
    return true;
}

// ---- streams ----

EXPORT int cuStreamCreateWithPriority(void** handle, unsigned flags, int priority) {
    Device* device = current();
    if (device == nullptr) return INVALID_CONTEXT;
    if (flags > NON_BLOCKING) return INVALID_VALUE;
    auto* stream = new Stream(*device, flags, priority);
    const std::lock_guard lock(device->mutex);
    device->streams.push_back(stream);
    *handle = stream;
    return SUCCESS;
}
EXPORT int cuStreamCreate(void** handle, unsigned flags) {
    return cuStreamCreateWithPriority(handle, flags, 0);
}

EXPORT int cuStreamDestroy_v2(void* handle) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr || stream == stream->device.legacy || stream == stream->device.per_thread)
        return INVALID_HANDLE;
    {
        const std::lock_guard lock(stream->device.mutex);
        auto& all = stream->device.streams;
        all.erase(std::find(all.begin(), all.end(), stream));
    }
    Stream::destroy(stream);
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(void* handle) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    stream->wait();
    trim_pools(stream->device);
    return SUCCESS;
}

EXPORT int cuStreamQuery(void* handle) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    return stream->idle() ? SUCCESS : NOT_READY;
}

EXPORT int cuStreamGetPriority(void* handle, int* priority) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *priority = stream->priority;
    return SUCCESS;
}

EXPORT int cuStreamGetFlags(void* handle, unsigned* flags) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *flags = stream->flags;
    return SUCCESS;
}

EXPORT int cuStreamGetCtx(void* handle, void** context) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *context = &stream->device;
    return SUCCESS;
}

EXPORT int cuStreamIsCapturing(void* handle, int* status) {
    if (stream_of(handle) == nullptr) return INVALID_HANDLE;
    *status = 0;
    return SUCCESS;
}

EXPORT int cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (function == nullptr) return INVALID_VALUE;
    stream->submit_to_thread([=] { function(argument); });
    return SUCCESS;
}

// ---- events ----

EXPORT int cuEventCreate(void** handle, unsigned flags) {
    if (current() == nullptr) return INVALID_CONTEXT;
    *handle = new Event{{}, nullptr, (flags & 2) == 0};
    return SUCCESS;
}

EXPORT int cuEventDestroy_v2(void* handle) {
    if (handle == nullptr) return INVALID_HANDLE;
    delete static_cast<Event*>(handle);
    return SUCCESS;
}

EXPORT int cuEventRecordWithFlags(void* handle, void* stream_handle, unsigned) {
    auto* event = static_cast<Event*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (event == nullptr || stream == nullptr) return INVALID_HANDLE;
    auto mark = std::make_shared<StreamEvent>();
    mark->stream = stream;
    {
        const std::lock_guard lock(event->mutex);
        event->last = mark;
    }
    stream->submit([mark] { mark->finish(); });
    return SUCCESS;
}
EXPORT int cuEventRecord(void* handle, void* stream) { return cuEventRecordWithFlags(handle, stream, 0); }

EXPORT int cuEventQuery(void* handle) {
    if (handle == nullptr) return INVALID_HANDLE;
    const auto mark = static_cast<Event*>(handle)->mark();
    return mark == nullptr || mark->is_done() ? SUCCESS : NOT_READY;
}

EXPORT int cuEventSynchronize(void* handle) {
    if (handle == nullptr) return INVALID_HANDLE;
    const auto mark = static_cast<Event*>(handle)->mark();
    if (mark == nullptr) return SUCCESS;
    hurry(*mark);
    mark->wait();
    return SUCCESS;
}

EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    auto *start = static_cast<Event*>(start_handle), *end = static_cast<Event*>(end_handle);
    if (start == nullptr || end == nullptr || !start->timed || !end->timed) return INVALID_HANDLE;
    const auto from = start->mark(), to = end->mark();
    if (from == nullptr || to == nullptr) return INVALID_HANDLE;
    if (!from->is_done() || !to->is_done()) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
    return SUCCESS;
}
EXPORT int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

EXPORT int cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr || handle == nullptr) return INVALID_HANDLE;
    const auto mark = static_cast<Event*>(handle)->mark();
    if (mark == nullptr || mark->is_done() || mark->stream == stream) return SUCCESS;
    stream->submit_to_thread([mark] {
        hurry(*mark);
        mark->wait();
    });
    return SUCCESS;
}
