// Tests of streams and events: order, and the detection of a missing wait.
#include <condition_variable>
#include <mutex>

#include "api.h"

namespace {

// Work on a stream that waits until `release` is called.
struct Gate {
    std::mutex mutex;
    std::condition_variable changed;
    bool open = false;
    static void pass(void* gate) {
        auto& self = *static_cast<Gate*>(gate);
        std::unique_lock lock(self.mutex);
        self.changed.wait(lock, [&] { return self.open; });
    }
    void release() {
        const std::lock_guard lock(mutex);
        open = true;
        changed.notify_all();
    }
};

void order() {
    void *first, *second, *reached, *later;
    OK(cuStreamCreate(&first, 1));
    OK(cuStreamCreate(&second, 1));
    OK(cuEventCreate(&reached, 0));
    OK(cuEventCreate(&later, 0));
    OK(cuEventQuery(reached));
    const Buffer a(std::vector<float>(4, 1.0f)), b(16);
    std::vector<float> source(4, 5.0f);

    Gate gate;
    OK(cuLaunchHostFunc(first, Gate::pass, &gate));
    OK(cuMemcpyHtoDAsync_v2(a.address, source.data(), 16, first));
    source.assign(4, 9.0f);  // a copy may read pageable memory after the call has returned
    float two = 0;
    OK(launch_on(first, "selftest_reverse", {1}, {4}, 16, a.address, false));
    OK(cuEventRecord(reached, first));
    OK(cuStreamWaitEvent(second, reached, 0));
    OK(cuMemcpyDtoDAsync_v2(b.address, a.address, 16, second));
    OK(cuEventRecord(later, second));
    EQUAL(cuEventQuery(reached), 600);
    EQUAL(cuEventQuery(later), 600);
    EQUAL(cuStreamQuery(first), 600);
    EQUAL(cuStreamQuery(second), 600);
    EQUAL(a.as<float>()[0], 1.0f);
    gate.release();
    OK(cuEventSynchronize(later));
    OK(cuEventQuery(reached));
    OK(cuEventElapsedTime_v2(&two, reached, later));
    CHECK(two >= 0);
    CHECK(b.read<float>() == std::vector<float>(4, 9.0f));
    OK(cuStreamSynchronize(first));
    OK(cuStreamQuery(first));
    OK(cuEventDestroy_v2(reached));
    OK(cuEventDestroy_v2(later));
    OK(cuStreamDestroy_v2(first));
    EQUAL(cuStreamSynchronize(first), 400);
    OK(cuStreamDestroy_v2(second));
}

void freed_memory_is_poisoned() {
    uint64_t address;
    void* stream;
    OK(cuStreamCreate(&stream, 1));
    OK(cuMemAllocAsync(&address, 16, stream));
    OK(cuMemsetD32Async(address, 0, 4, stream));
    OK(cuStreamSynchronize(stream));
    const auto* values = reinterpret_cast<const float*>(address);
    EQUAL(values[3], 0.0f);
    OK(cuMemFreeAsync(address, stream));
    OK(cuStreamSynchronize(stream));
#if !defined(__SANITIZE_ADDRESS__)
    CHECK(std::isnan(values[3]));
#endif
    OK(cuStreamDestroy_v2(stream));
}

}  // namespace

void test_streams() {
    order();
    freed_memory_is_poisoned();
    const std::pair<std::string, std::string> late{"LORA_SIM_LATE", "1"};
    EQUAL(run_scene({"stream", "waits"}, {late}).code, 0);
    EQUAL(run_scene({"stream", "forgets"}, {late}).code, 3);
}

// One stream writes, and another one reads the result, with or without waiting.
int stream_scene(const std::string& name) {
    use_device();
    void *writer, *reader, *written;
    OK(cuStreamCreate(&writer, 1));
    OK(cuStreamCreate(&reader, 1));
    OK(cuEventCreate(&written, 2));
    const Buffer a(16), b(16);
    OK(cuCtxSynchronize());
    OK(cuMemsetD32Async(a.address, 0, 4, writer));
    OK(cuEventRecord(written, writer));
    if (name == "waits") OK(cuStreamWaitEvent(reader, written, 0));
    OK(cuMemcpyDtoDAsync_v2(b.address, a.address, 16, reader));
    OK(cuStreamSynchronize(reader));
    const bool right = b.as<float>()[0] == 0.0f;
    OK(cuCtxSynchronize());
    return right ? 0 : 3;
}
