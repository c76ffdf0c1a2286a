// Tests of devices and memory.
#include <cstring>

#include "api.h"

namespace {

void devices() {
    int number;
    OK(cuDeviceGetCount(&number));
    EQUAL(number, 3);
    char text[64];
    OK(cuDeviceGetName(text, sizeof text, 0));
    CHECK(strcmp(text, "Simulated GPU") == 0);
    EQUAL(cuDeviceGetName(text, sizeof text, 3), 101);
    OK(cuDeviceGetPCIBusId(text, sizeof text, 1));
    CHECK(strcmp(text, "0000:02:00.0") == 0);
    OK(cuDeviceGetAttribute(&number, 75, 0));
    EQUAL(number, 9);
    OK(cuDeviceGetAttribute(&number, 115, 0));
    EQUAL(number, 1);
    OK(cuDeviceCanAccessPeer(&number, 0, 1));
    EQUAL(number, 1);
    size_t total;
    OK(cuDeviceTotalMem_v2(&total, 0));
    EQUAL(total, size_t{256} << 20);
    const char* name;
    OK(cuGetErrorName(2, &name));
    CHECK(strcmp(name, "CUDA_ERROR_OUT_OF_MEMORY") == 0);
    EQUAL(cuGetErrorName(12345, &name), 1);
    void *module, *missing;
    OK(cuModuleLoadData(&module, "image"));
    EQUAL(cuModuleGetFunction(&missing, module, "no such kernel"), 500);
    fprintf(stderr, "(one function that is not simulated)\n");
    EQUAL(cuGraphLaunch(nullptr, nullptr), 801);
}

void copies() {
    const std::vector<float> x = Numbers(1).many(1000);
    const Buffer fresh(4000), a(x);
    for (const float value : fresh.read<float>()) CHECK(std::isnan(value));
    OK(cuMemcpyDtoDAsync_v2(fresh.address, a.address, 4000, nullptr));
    CHECK(fresh.read<float>() == x);
    std::vector<float> host(1001);
    EQUAL(cuMemcpyDtoH_v2(host.data(), a.address, 4004), 1);
    EQUAL(cuMemcpyDtoH_v2(host.data(), a.address + 8, 3996), 1);
    EQUAL(cuMemcpyHtoD_v2(reinterpret_cast<uint64_t>(host.data()), x.data(), 4), 1);
    OK(cuMemsetD8_v2(a.address + 4, 0, 8));
    OK(cuMemsetD32Async(a.address + 12, 0x3f800000, 2, nullptr));
    const auto y = a.read<float>();
    CHECK(y[0] == x[0] && y[1] == 0 && y[2] == 0 && y[3] == 1 && y[4] == 1 && y[5] == x[5]);
    void* pinned;
    OK(cuMemHostAlloc(&pinned, 4000, 0));
    OK(cuMemcpyDtoHAsync_v2(pinned, a.address, 4000, nullptr));
    OK(cuStreamSynchronize(nullptr));
    CHECK(memcmp(pinned, y.data(), 4000) == 0);
    OK(cuMemFreeHost(pinned));
    EQUAL(cuMemFreeHost(pinned), 1);
}

void limits() {
    void* pool;
    uint64_t used, reserved, high, threshold = 0;
    size_t before, after, total;
    const auto read = [&] {
        OK(cuMemPoolGetAttribute(pool, 5, &reserved));
        OK(cuMemPoolGetAttribute(pool, 7, &used));
        OK(cuMemPoolGetAttribute(pool, 8, &high));
    };
    OK(cuDeviceGetDefaultMemPool(&pool, 0));
    OK(cuMemPoolSetAttribute(pool, 4, &threshold));
    OK(cuCtxSynchronize());
    OK(cuMemPoolSetAttribute(pool, 8, &threshold));
    read();
    EQUAL(used, 0u);
    EQUAL(reserved, 0u);
    OK(cuMemGetInfo_v2(&before, &total));
    EQUAL(before, total);

    uint64_t direct, most, refused = 0;
    EQUAL(cuMemAllocAsync(&direct, 0, nullptr), 1);
    OK(cuMemAlloc_v2(&direct, size_t{50} << 20));
    OK(cuMemAllocAsync(&most, size_t{150} << 20, nullptr));
    EQUAL(cuMemAllocAsync(&refused, size_t{60} << 20, nullptr), 2);
    EQUAL(cuMemAlloc_v2(&refused, size_t{60} << 20), 2);
    OK(cuMemGetInfo_v2(&after, &total));
    EQUAL(after, size_t{56} << 20);
    read();
    EQUAL(used, uint64_t{150} << 20);
    EQUAL(high, uint64_t{150} << 20);

    threshold = uint64_t{100} << 20;  // the bytes that the pool keeps
    OK(cuMemPoolSetAttribute(pool, 4, &threshold));
    OK(cuMemFreeAsync(most, nullptr));
    EQUAL(cuMemFreeAsync(most, nullptr), 1);
    OK(cuStreamSynchronize(nullptr));
    read();
    EQUAL(used, 0u);
    EQUAL(reserved, threshold);
    OK(cuMemFree_v2(direct));
    EQUAL(cuMemFree_v2(direct), 1);
    OK(cuMemGetInfo_v2(&after, &total));
    EQUAL(after, size_t{156} << 20);
    threshold = 0;
    OK(cuMemPoolSetAttribute(pool, 4, &threshold));
}

}  // namespace

void test_memory() {
    devices();
    copies();
    limits();
    EQUAL(run_scene({"memory", "fragment"}, {{"LORA_SIM_FRAGMENT", "1"}, {"LORA_SIM_MEMORY", "64M"}}).code,
          0);
    for (const auto& [name, message] :
         {std::pair{"before", "before its beginning"}, std::pair{"after", "past its end"}}) {
        const Ending ending = run_scene({"memory", name});
        CHECK(ending.code == -6 && ending.said.find(message) != std::string::npos);
    }
}

// Holes of 10 and 20 MiB do not serve an allocation that is larger than each of them. A used hole
// does not serve a second allocation. Trimming releases the unused hole.
static int fragment() {
    void* pool;
    uint64_t small, medium, large, refused = 0, reserved, threshold = UINT64_MAX;
    OK(cuDeviceGetDefaultMemPool(&pool, 0));
    OK(cuMemPoolSetAttribute(pool, 4, &threshold));
    OK(cuMemAllocAsync(&small, size_t{10} << 20, nullptr));
    OK(cuMemAllocAsync(&medium, size_t{20} << 20, nullptr));
    OK(cuMemFreeAsync(small, nullptr));
    OK(cuMemFreeAsync(medium, nullptr));
    OK(cuStreamSynchronize(nullptr));
    OK(cuMemAllocAsync(&small, size_t{8} << 20, nullptr));
    OK(cuMemPoolGetAttribute(pool, 5, &reserved));
    EQUAL(reserved, uint64_t{30} << 20);
    EQUAL(cuMemAllocAsync(&refused, size_t{40} << 20, nullptr), 2);
    OK(cuMemPoolTrimTo(pool, 0));
    OK(cuMemPoolGetAttribute(pool, 5, &reserved));
    EQUAL(reserved, uint64_t{10} << 20);
    OK(cuMemAllocAsync(&large, size_t{40} << 20, nullptr));
    OK(cuMemFreeAsync(small, nullptr));
    OK(cuMemFreeAsync(large, nullptr));
    OK(cuStreamSynchronize(nullptr));
    return 0;
}

int memory_scene(const std::string& name) {
    use_device();
    if (name == "fragment") return fragment();
    {
        const Buffer x(1000);
        x.as<char>()[name == "before" ? -1 : 1000] = 1;
    }
    OK(cuCtxSynchronize());
    return 0;
}
