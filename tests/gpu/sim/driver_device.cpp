// Devices, contexts and errors of the driver.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

namespace driver {

namespace {

bool is_initialized = false;
std::mutex init_mutex;

// The initial value is not zero: see static shared memory in simulated.cpp.
thread_local Device* current_device = reinterpret_cast<Device*>(1);

size_t memory_limit() {
    const char* text = getenv("LORA_SIM_MEMORY");
    if (text == nullptr) return size_t{8} << 30;
    char* end = nullptr;
    size_t bytes = strtoull(text, &end, 10);
    switch (*end) {
        case 'G': bytes <<= 10; [[fallthrough]];
        case 'M': bytes <<= 10; [[fallthrough]];
        case 'K': bytes <<= 10;
    }
    return bytes;
}

constexpr struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {PEER_ACCESS_NOT_ENABLED, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

Device* device_of(int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices().size()) return nullptr;
    return devices()[static_cast<size_t>(ordinal)];
}

}  // namespace

std::vector<Device*>& devices() {
    static auto& all = *new std::vector<Device*>();  // never destroyed, because threads may outlive main
    return all;
}

bool initialized() { return is_initialized; }

Device* current() { return reinterpret_cast<uintptr_t>(current_device) == 1 ? nullptr : current_device; }
void set_current(Device* device) {
    current_device = device == nullptr ? reinterpret_cast<Device*>(1) : device;
}

}  // namespace driver

using namespace driver;

EXPORT int cuInit(unsigned flags) {
    if (flags != 0) return INVALID_VALUE;
    const std::lock_guard lock(init_mutex);
    if (!is_initialized) {
        const char* count = getenv("LORA_SIM_GPUS");
        for (int ordinal = 0; ordinal < (count == nullptr ? 1 : atoi(count)); ordinal++) {
            auto* device = new Device(ordinal);
            device->total = memory_limit();
            device->legacy = new Stream(*device, 0, 0);
            device->per_thread = new Stream(*device, 0, 0);
            device->streams = {device->legacy, device->per_thread};
            devices().push_back(device);
        }
        is_initialized = true;
    }
    return devices().empty() ? NO_DEVICE : SUCCESS;
}

EXPORT int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

EXPORT int cuGetErrorName(int error, const char** name) {
    for (const auto& known : ERRORS) {
        if (known.code == error) return *name = known.name, SUCCESS;
    }
    return *name = nullptr, INVALID_VALUE;
}

EXPORT int cuGetErrorString(int error, const char** text) {
    for (const auto& known : ERRORS) {
        if (known.code == error) return *text = known.text, SUCCESS;
    }
    return *text = nullptr, INVALID_VALUE;
}

// ---- devices ----

EXPORT int cuDeviceGetCount(int* count) {
    if (!initialized()) return NOT_INITIALIZED;
    *count = static_cast<int>(devices().size());
    return SUCCESS;
}

EXPORT int cuDeviceGet(int* device, int ordinal) {
    if (!initialized()) return NOT_INITIALIZED;
    if (device_of(ordinal) == nullptr) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

EXPORT int cuDeviceGetName(char* name, int bytes, int ordinal) {
    if (device_of(ordinal) == nullptr) return INVALID_DEVICE;
    snprintf(name, static_cast<size_t>(bytes), "Simulated GPU");
    return SUCCESS;
}

EXPORT int cuDeviceGetUuid_v2(unsigned char* uuid, int ordinal) {
    if (device_of(ordinal) == nullptr) return INVALID_DEVICE;
    memcpy(uuid, "lora simulated  ", 16);
    uuid[15] = static_cast<unsigned char>(ordinal);
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid(unsigned char* uuid, int ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int ordinal) {
    const Device* device = device_of(ordinal);
    if (device == nullptr) return INVALID_DEVICE;
    *bytes = device->total;
    return SUCCESS;
}

EXPORT int cuDeviceGetPCIBusId(char* id, int bytes, int ordinal) {
    if (device_of(ordinal) == nullptr) return INVALID_DEVICE;
    snprintf(id, static_cast<size_t>(bytes), "0000:%02X:00.0", ordinal + 1);
    return SUCCESS;
}

EXPORT int cuDeviceGetByPCIBusId(int* ordinal, const char* id) {
    for (const Device* device : devices()) {
        char own[16];
        cuDeviceGetPCIBusId(own, sizeof own, device->ordinal);
        if (strcmp(own, id) == 0) return *ordinal = device->ordinal, SUCCESS;
    }
    return INVALID_DEVICE;
}

// The attributes of an H100. Attributes that are not listed are 0: the feature is not supported.
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
    if (device_of(ordinal) == nullptr) return INVALID_DEVICE;
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break;      // threads of a block, and along x and y
        case 4: *value = 64; break;                        // along z
        case 5: *value = 2147483647; break;                // blocks of a grid along x
        case 6: case 7: *value = 65535; break;             // along y, z
        case 8: *value = 48 * 1024; break;                 // shared memory of a block
        case 9: *value = 64 * 1024; break;                 // constant memory
        case 10: *value = 32; break;                       // warp
        case 12: case 82: *value = 65536; break;           // registers of a block, of a multiprocessor
        case 13: *value = 1980000; break;                  // clock, kHz
        case 16: *value = 132; break;                      // multiprocessors
        case 19: case 31: *value = 1; break;               // maps host memory; concurrent kernels
        case 33: *value = ordinal + 1; break;              // PCI bus
        case 36: *value = 2619000; break;                  // memory clock, kHz
        case 37: *value = 5120; break;                     // memory bus, bits
        case 38: *value = 50 << 20; break;                 // L2
        case 39: *value = 2048; break;                     // threads of a multiprocessor
        case 40: *value = 3; break;                        // copy engines
        case 41:
        case 78:
        case 79:
        case 80: *value = 1; break;  // unified addressing, stream priorities, L1 caches
        case 75: *value = 9; break;                        // compute capability
        case 76: *value = 0; break;
        case 81: *value = 228 * 1024; break;               // shared memory of a multiprocessor
        case 97: *value = 227 * 1024; break;               // shared memory of a block, opt-in
        case 99: *value = 1; break;                        // host memory can be registered
        case 106: *value = 32; break;                      // blocks of a multiprocessor
        case 111: *value = 1024; break;  // shared memory of a block that the system reserves
        case 115: {                                        // memory pools
            const char* pools = getenv("LORA_SIM_POOLS");
            *value = pools == nullptr || *pools != '0';
            break;
        }
        default: *value = 0;
    }
    return attribute < 1 || attribute > 200 ? INVALID_VALUE : SUCCESS;
}

EXPORT int cuDeviceCanAccessPeer(int* can, int ordinal, int peer) {
    if (device_of(ordinal) == nullptr || device_of(peer) == nullptr) return INVALID_DEVICE;
    *can = ordinal != peer;
    return SUCCESS;
}

EXPORT int cuDeviceGetP2PAttribute(int* value, int attribute, int source, int destination) {
    if (device_of(source) == nullptr || device_of(destination) == nullptr || source == destination)
        return INVALID_DEVICE;
    *value = attribute == 2 || attribute == 3;  // access is supported
    return SUCCESS;
}

// ---- contexts ----

EXPORT int cuDevicePrimaryCtxRetain(void** context, int ordinal) {
    if (!initialized()) return NOT_INITIALIZED;
    Device* device = device_of(ordinal);
    if (device == nullptr) return INVALID_DEVICE;
    const std::lock_guard lock(device->mutex);
    device->retained++;
    *context = device;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int ordinal) {
    Device* device = device_of(ordinal);
    if (device == nullptr) return INVALID_DEVICE;
    const std::lock_guard lock(device->mutex);
    if (device->retained == 0) return INVALID_CONTEXT;
    device->retained--;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxGetState(int ordinal, unsigned* flags, int* active) {
    Device* device = device_of(ordinal);
    if (device == nullptr) return INVALID_DEVICE;
    const std::lock_guard lock(device->mutex);
    *flags = 0;
    *active = device->retained > 0;
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxSetFlags_v2(int ordinal, unsigned) {
    return device_of(ordinal) == nullptr ? INVALID_DEVICE : SUCCESS;
}

EXPORT int cuCtxSetCurrent(void* context) {
    set_current(static_cast<Device*>(context));
    return SUCCESS;
}

EXPORT int cuCtxGetCurrent(void** context) {
    *context = current();
    return SUCCESS;
}

EXPORT int cuCtxGetDevice(int* ordinal) {
    if (current() == nullptr) return INVALID_CONTEXT;
    *ordinal = current()->ordinal;
    return SUCCESS;
}

EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

EXPORT int cuCtxSetFlags(unsigned) { return current() == nullptr ? INVALID_CONTEXT : SUCCESS; }
EXPORT int cuCtxGetFlags(unsigned* flags) { return *flags = 0, SUCCESS; }
EXPORT int cuCtxSetLimit(int, size_t) { return current() == nullptr ? INVALID_CONTEXT : SUCCESS; }
EXPORT int cuCtxSetCacheConfig(int) { return current() == nullptr ? INVALID_CONTEXT : SUCCESS; }

EXPORT int cuCtxEnablePeerAccess(void* peer, unsigned flags) {
    if (current() == nullptr || peer == nullptr || peer == current()) return INVALID_CONTEXT;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}

EXPORT int cuCtxSynchronize() {
    Device* device = current();
    if (device == nullptr) return INVALID_CONTEXT;
    device->wait();
    return SUCCESS;
}
