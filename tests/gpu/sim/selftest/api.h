// The functions of the simulated libraries that the tests call, and helpers of the tests.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

extern "C" {
int cuInit(unsigned);
int cuDriverGetVersion(int*);
int cuGetErrorName(int, const char**);
int cuGetErrorString(int, const char**);
int cuDeviceGetCount(int*);
int cuDeviceGetName(char*, int, int);
int cuDeviceTotalMem_v2(size_t*, int);
int cuDeviceGetAttribute(int*, int, int);
int cuDeviceGetPCIBusId(char*, int, int);
int cuDeviceCanAccessPeer(int*, int, int);
int cuDevicePrimaryCtxRetain(void**, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxSetCurrent(void*);
int cuCtxGetCurrent(void**);
int cuCtxSynchronize();
int cuMemAlloc_v2(uint64_t*, size_t);
int cuMemFree_v2(uint64_t);
int cuMemAllocAsync(uint64_t*, size_t, void*);
int cuMemFreeAsync(uint64_t, void*);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuDeviceGetDefaultMemPool(void**, int);
int cuMemPoolGetAttribute(void*, int, void*);
int cuMemPoolTrimTo(void*, size_t);
int cuMemPoolSetAttribute(void*, int, void*);
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t);
int cuMemcpyDtoH_v2(void*, uint64_t, size_t);
int cuMemcpyHtoDAsync_v2(uint64_t, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*);
int cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void*);
int cuMemsetD8_v2(uint64_t, unsigned char, size_t);
int cuMemsetD32Async(uint64_t, unsigned, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamQuery(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuLaunchHostFunc(void*, void (*)(void*), void*);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuEventSynchronize(void*);
int cuEventElapsedTime_v2(float*, void*, void*);
int cuEventDestroy_v2(void*);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                   void**);
int cuGraphLaunch(void*, void*);

int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasSetStream_v2(void*, void*);
int cublasSetWorkspace_v2(void*, void*, size_t);
int cublasGemmEx(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                 const void*, void*, int, int, int, int);
int cublasGemmStridedBatchedEx(void*, int, int, int, int, int, const void*, const void*, int, int, long long,
                               const void*, int, int, long long, const void*, void*, int, int, long long, int,
                               int, int);
uint64_t lora_sim_products();
uint64_t lora_sim_unaligned_products();

int curandCreateGenerator(void**, int);
int curandSetPseudoRandomGeneratorSeed(void*, unsigned long long);
int curandGenerateUniform(void*, float*, size_t);
int curandGenerateNormal(void*, float*, size_t, float, float);
int curandDestroyGenerator(void*);

struct UniqueId {
    char bytes[128];
};
struct NcclConfig {
    size_t size;
    unsigned magic, version;
    int blocking;
};
int ncclGetVersion(int*);
int ncclGetUniqueId(UniqueId*);
int ncclCommInitRank(void**, int, UniqueId, int);
int ncclCommInitRankConfig(void**, int, UniqueId, int, NcclConfig*);
int ncclCommGetAsyncError(void*, int*);
int ncclCommAbort(void*);
int ncclCommFinalize(void*);
int ncclCommDestroy(void*);
int ncclCommCount(void*, int*);
int ncclCommUserRank(void*, int*);
int ncclGroupStart();
int ncclGroupEnd();
int ncclSend(const void*, size_t, int, int, void*, void*);
int ncclRecv(void*, size_t, int, int, void*, void*);
int ncclAllGather(const void*, void*, size_t, int, void*, void*);
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*);
}

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);  \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)
#define EQUAL(value, expected) \
    do { \
        const auto is_ = (value); \
        if (is_ != (expected)) { \
            fprintf(stderr, "%s:%d: %s is %s\n", __FILE__, __LINE__, #value, std::to_string(is_).c_str()); \
            exit(1); \
        } \
    } while (0)
#define OK(call) EQUAL(call, 0)

// Device memory from the pool.
struct Buffer {
    uint64_t address = 0;
    size_t bytes;
    explicit Buffer(size_t bytes) : bytes(bytes) { OK(cuMemAllocAsync(&address, bytes, nullptr)); }
    template <typename T>
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size() * sizeof(T)) {
        OK(cuMemcpyHtoD_v2(address, values.data(), bytes));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { OK(cuMemFreeAsync(address, nullptr)); }
    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(address);
    }
    template <typename T>
    std::vector<T> read() const {
        std::vector<T> values(bytes / sizeof(T));
        OK(cuMemcpyDtoH_v2(values.data(), address, bytes));
        return values;
    }
};

inline void use_device(int ordinal = 0) {
    void* context = nullptr;
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&context, ordinal));
    OK(cuCtxSetCurrent(context));
}

inline void* function(const char* name) {
    void *module = nullptr, *found = nullptr;
    OK(cuModuleLoadData(&module, "any image"));
    OK(cuModuleGetFunction(&found, module, name));
    return found;
}

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
template <typename... Args>
int launch_on(void* stream, const char* name, Dim grid, Dim block, unsigned shared_bytes, Args... arguments) {
    void* pointers[] = {static_cast<void*>(&arguments)...};
    return cuLaunchKernel(function(name), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes,
                          stream, pointers, nullptr);
}
template <typename... Args>
int launch(const char* name, Dim grid, Dim block, unsigned shared_bytes, Args... arguments) {
    return launch_on(nullptr, name, grid, block, shared_bytes, arguments...);
}

// Numbers in [-1, 1), the same in every run.
class Numbers {
  public:
    explicit Numbers(uint64_t seed) : state(seed) {}
    float next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f;
    }
    std::vector<float> many(size_t count) {
        std::vector<float> values(count);
        for (float& value : values) value = next();
        return values;
    }

  private:
    uint64_t state;
};

inline float f32_of(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
}
inline uint16_t bf16_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline std::vector<uint16_t> bf16_of(const std::vector<float>& values) {
    std::vector<uint16_t> bits;
    for (const float value : values) bits.push_back(bf16_of(value));
    return bits;
}

// The result of a process: the exit code, or minus the signal that ended it, and its output on
// stderr.
struct Ending {
    int code;
    std::string said;
};
// Runs `scene` of this program in its own process, with the variables of `environment` set.
Ending run_scene(const std::vector<std::string>& scene,
                 const std::vector<std::pair<std::string, std::string>>& environment = {});
