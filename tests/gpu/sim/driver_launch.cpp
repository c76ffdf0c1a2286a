// Modules, functions and launches. Every image is accepted. Each module has all kernels that were
// compiled into the simulation.
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "driver.h"
#include "simulated.h"

using namespace driver;

namespace {

struct Module {
    Device* device;
};

constexpr size_t SHARED_MOST = 227 * 1024;

enum FunctionAttribute {
    MAX_THREADS = 0,
    REGISTERS = 4,
    PTX_VERSION = 5,
    BINARY_VERSION = 6,
    MAX_DYNAMIC_SHARED = 8,
    PREFERRED_CARVEOUT = 9,
};

int load(void** handle) {
    Device* device = current();
    if (device == nullptr) return INVALID_CONTEXT;
    *handle = new Module{device};
    return SUCCESS;
}

int blocks_of_multiprocessor(int threads, size_t dynamic_bytes) {
    const size_t by_shared = 228 * 1024 / (dynamic_bytes + 1024);
    return static_cast<int>(
        std::min({size_t{32}, static_cast<size_t>(2048 / ((threads + 31) / 32 * 32)), by_shared}));
}

}  // namespace

// ---- modules and functions ----

EXPORT int cuModuleLoadData(void** module, const void* image) {
    return image == nullptr ? INVALID_VALUE : load(module);
}
EXPORT int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
EXPORT int cuModuleLoadFatBinary(void** module, const void* image) { return cuModuleLoadData(module, image); }
EXPORT int cuModuleLoad(void** module, const char* file) {
    return access(file, R_OK) == 0 ? load(module) : FILE_NOT_FOUND;
}

EXPORT int cuModuleUnload(void* module) {
    if (module == nullptr) return INVALID_HANDLE;
    delete static_cast<Module*>(module);
    return SUCCESS;
}

EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (module == nullptr) return INVALID_HANDLE;
    *function = sim::find_kernel(name);
    if (*function == nullptr) fprintf(stderr, "simulated GPU: kernel %s does not exist\n", name);
    return *function == nullptr ? NOT_FOUND : SUCCESS;
}

// Every module has all kernels.
EXPORT int cuModuleGetFunctionCount(unsigned* count, void* module) {
    if (module == nullptr) return INVALID_HANDLE;
    *count = static_cast<unsigned>(sim::kernels().size());
    return SUCCESS;
}

EXPORT int cuModuleEnumerateFunctions(void** functions, unsigned count, void* module) {
    if (module == nullptr) return INVALID_HANDLE;
    if (count > sim::kernels().size()) return INVALID_VALUE;
    std::copy_n(sim::kernels().begin(), count, functions);
    return SUCCESS;
}

EXPORT int cuFuncGetName(const char** name, void* function) {
    if (function == nullptr) return INVALID_HANDLE;
    *name = static_cast<const sim::Kernel*>(function)->name;
    return SUCCESS;
}

EXPORT int cuFuncLoad(void* function) { return function == nullptr ? INVALID_HANDLE : SUCCESS; }

EXPORT int cuModuleGetGlobal_v2(uint64_t*, size_t*, void* module, const char*) {
    return module == nullptr ? INVALID_HANDLE : NOT_FOUND;
}

EXPORT int cuFuncGetAttribute(int* value, int attribute, void* function) {
    const auto* kernel = static_cast<const sim::Kernel*>(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    switch (attribute) {
        case MAX_THREADS: *value = static_cast<int>(kernel->threads); break;
        case REGISTERS: *value = 32; break;
        case PTX_VERSION: case BINARY_VERSION: *value = 90; break;
        case MAX_DYNAMIC_SHARED: *value = static_cast<int>(kernel->dynamic_limit); break;
        default: *value = 0;
    }
    return SUCCESS;
}

EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
    auto* kernel = static_cast<sim::Kernel*>(function);
    if (kernel == nullptr) return INVALID_HANDLE;
    if (attribute == PREFERRED_CARVEOUT) return SUCCESS;
    if (attribute != MAX_DYNAMIC_SHARED || value < 0 || static_cast<size_t>(value) > SHARED_MOST)
        return INVALID_VALUE;
    kernel->dynamic_limit = static_cast<size_t>(value);
    return SUCCESS;
}

EXPORT int cuFuncSetCacheConfig(void* function, int) {
    return function == nullptr ? INVALID_HANDLE : SUCCESS;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads,
                                                       size_t dynamic_bytes) {
    if (function == nullptr) return INVALID_HANDLE;
    if (threads < 1) return INVALID_VALUE;
    *blocks = blocks_of_multiprocessor(threads, dynamic_bytes);
    return SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int threads,
                                                                size_t dynamic_bytes, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic_bytes);
}

// ---- launches ----

EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle,
                          void** parameters, void** extra) {
    const auto* kernel = static_cast<const sim::Kernel*>(function);
    Stream* stream = stream_of(stream_handle);
    if (kernel == nullptr || stream == nullptr) return INVALID_HANDLE;
    if (&stream->device != current()) return INVALID_CONTEXT;
    if (extra != nullptr) return NOT_SUPPORTED;
    const dim3 grid(grid_x, grid_y, grid_z), block(block_x, block_y, block_z);
    if (const char* reason = sim::refuse(*kernel, grid, block, shared_bytes)) {
        fprintf(stderr,
                "simulated GPU: kernel %s, grid (%u, %u, %u), block (%u, %u, %u), %u bytes of dynamic shared "
                "memory: %s\n",
                kernel->name, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, reason);
        return block_x * block_y * block_z > kernel->threads ? LAUNCH_OUT_OF_RESOURCES : INVALID_VALUE;
    }
    stream->submit([=, thread = kernel->bind(kernel->function, parameters)] {
        sim::launch(*kernel, grid, block, shared_bytes, thread);
    });
    return SUCCESS;
}

EXPORT int cuLaunchCooperativeKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                     unsigned, void*, void**) {
    return NOT_SUPPORTED;  // blocks run one after the other
}
