// Memory. Device memory is memory of the process, with a table of its allocations. New and freed
// memory contains NaN. Freed memory is returned to the system late. Canary bytes around each
// allocation detect writes past its ends.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

#include "driver.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace driver {

namespace {

constexpr unsigned char POISON = 0xff;
constexpr unsigned char CANARY = 0xa5;
constexpr size_t CANARY_BYTES = 256;        // also the alignment of allocations
constexpr size_t GRAIN = 512;               // sizes of allocations are counted in multiples of GRAIN
constexpr size_t CHUNK = size_t{2} << 20;   // pools get memory from the device in multiples of CHUNK
constexpr size_t QUARANTINE = size_t{64} << 20;

struct Allocation {
    size_t bytes;
    Device* device;
    Pool* pool;   // null: cuMemAlloc
    size_t block;  // bytes that the pool reserved for the allocation
    bool freeing = false;
};

struct Memory {
    std::mutex mutex;
    std::map<uint64_t, Allocation> device;        // by address
    std::map<uint64_t, size_t> pinned;            // pinned and registered host memory
    std::deque<std::pair<unsigned char*, size_t>> quarantine;
    size_t quarantined = 0;
};

Memory& memory() {
    static auto& memory = *new Memory;
    return memory;
}

// With LORA_SIM_FRAGMENT=1 a pool does not join freed blocks. A hole serves one allocation that is
// not larger, which uses it up.
bool fragments() {
    static const bool fragments = [] {
        const char* text = getenv("LORA_SIM_FRAGMENT");
        return text != nullptr && *text != '\0' && *text != '0';
    }();
    return fragments;
}

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

template <typename Map>
auto find_covering(Map& map, uint64_t address) {
    auto next = map.upper_bound(address);
    return next == map.begin() ? map.end() : std::prev(next);
}

bool covers(uint64_t address, size_t bytes, uint64_t from, size_t size) {
    return address - from <= size && bytes <= size - (address - from);
}

unsigned char* allocate(size_t bytes) {
    const size_t size = round_up(bytes, CANARY_BYTES) + 2 * CANARY_BYTES;
    auto* raw = static_cast<unsigned char*>(aligned_alloc(CANARY_BYTES, size));
    if (raw == nullptr) return nullptr;
    memset(raw, CANARY, CANARY_BYTES);
    memset(raw + CANARY_BYTES, POISON, bytes);
    memset(raw + CANARY_BYTES + bytes, CANARY, size - CANARY_BYTES - bytes);
#if defined(__SANITIZE_ADDRESS__)  // detects reads too
    ASAN_POISON_MEMORY_REGION(raw, CANARY_BYTES);
    ASAN_POISON_MEMORY_REGION(raw + CANARY_BYTES + bytes, size - CANARY_BYTES - bytes);
#endif
    return raw + CANARY_BYTES;
}

void check_canaries(const unsigned char* from, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(from - CANARY_BYTES, round_up(bytes, CANARY_BYTES) + 2 * CANARY_BYTES);
#endif
    const size_t after = round_up(bytes, CANARY_BYTES) - bytes + CANARY_BYTES;
    const auto intact = [](const unsigned char* at, size_t count) {
        for (size_t i = 0; i < count; i++) {
            if (at[i] != CANARY) return false;
        }
        return true;
    };
    if (intact(from - CANARY_BYTES, CANARY_BYTES) && intact(from + bytes, after)) return;
    fprintf(stderr, "simulated GPU: an allocation of %zu bytes was written %s\n", bytes,
            intact(from + bytes, after) ? "before its beginning" : "past its end");
    abort();
}

// The caller holds the lock of memory.
void release(unsigned char* from, size_t bytes) {
    check_canaries(from, bytes);
#if defined(__SANITIZE_ADDRESS__)
    free(from - CANARY_BYTES);
#else
    Memory& all = memory();
    memset(from, POISON, bytes);
    all.quarantine.emplace_back(from - CANARY_BYTES, bytes);
    all.quarantined += bytes;
    while (all.quarantined > QUARANTINE || all.quarantine.size() > 4096) {
        all.quarantined -= all.quarantine.front().second;
        free(all.quarantine.front().first);
        all.quarantine.pop_front();
    }
#endif
}

// The caller holds the lock of memory.
size_t reserved(const Device& device) {
    return device.direct + device.default_pool.reserved +
           (device.pool == &device.default_pool ? 0 : device.pool->reserved);
}

bool take(Device& device, Pool* pool, size_t bytes, uint64_t* address) {
    const size_t counted = round_up(bytes, GRAIN);
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    size_t block = counted, more = counted;
    if (pool != nullptr && fragments()) {
        const auto hole = pool->holes.lower_bound(counted);
        const bool found = hole != pool->holes.end();
        block = found ? *hole : round_up(counted, CHUNK);
        more = found ? 0 : block;
    } else if (pool != nullptr) {
        more = pool->used + counted > pool->reserved ? round_up(pool->used + counted - pool->reserved, CHUNK)
                                                     : 0;
    }
    if (reserved(device) + more > device.total) {
        // Like CUDA's, a pool keeps what it had reserved for an allocation that failed.
        const size_t rest = (device.total - reserved(device)) / CHUNK * CHUNK;
        if (pool != nullptr && rest != 0) {
            pool->reserved += rest;
            if (pool->reserved > pool->reserved_high) pool->reserved_high = pool->reserved;
            if (fragments()) pool->holes.insert(rest);
        }
        return false;
    }
    unsigned char* from = allocate(bytes);
    if (from == nullptr) return false;
    if (pool == nullptr) {
        device.direct += counted;
    } else {
        if (fragments() && more == 0) pool->holes.erase(pool->holes.find(block));
        pool->used += counted;
        pool->reserved += more;
        if (pool->used > pool->used_high) pool->used_high = pool->used;
        if (pool->reserved > pool->reserved_high) pool->reserved_high = pool->reserved;
    }
    *address = reinterpret_cast<uint64_t>(from);
    all.device[*address] = {bytes, &device, pool, block};
    return true;
}

int allocate_on(Device& device, Pool* pool, size_t bytes, uint64_t* address) {
    if (bytes == 0) return INVALID_VALUE;
    if (take(device, pool, bytes, address)) return SUCCESS;
    device.wait();  // memory that is being freed may be enough
    return take(device, pool, bytes, address) ? SUCCESS : OUT_OF_MEMORY;
}

void give_back(uint64_t address) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    const auto found = all.device.find(address);
    const Allocation allocation = found->second;
    all.device.erase(found);
    const size_t counted = round_up(allocation.bytes, GRAIN);
    (allocation.pool == nullptr ? allocation.device->direct : allocation.pool->used) -= counted;
    if (allocation.pool != nullptr && fragments()) allocation.pool->holes.insert(allocation.block);
    release(reinterpret_cast<unsigned char*>(address), allocation.bytes);
}

// Marks an allocation as being freed. Returns null if `address` is not an allocation or is being
// freed already.
Device* begin_free(uint64_t address) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    const auto found = all.device.find(address);
    if (found == all.device.end() || found->second.freeing) return nullptr;
    found->second.freeing = true;
    return found->second.device;
}

unsigned char* at(uint64_t address) { return reinterpret_cast<unsigned char*>(address); }

// Fills `count` elements at `address`, in the stream's order.
template <typename T>
int fill(Stream* stream, uint64_t address, T value, size_t count, bool wait) {
    if (stream == nullptr) return INVALID_HANDLE;
    if (count == 0) return SUCCESS;
    if (address % sizeof(T) != 0 || !on_device(address, count * sizeof(T))) return INVALID_VALUE;
    stream->submit([=] {
        for (size_t i = 0; i < count; i++) memcpy(at(address) + i * sizeof(T), &value, sizeof(T));
    });
    if (wait) stream->wait();
    return SUCCESS;
}
template <>
int fill(Stream* stream, uint64_t address, unsigned char value, size_t count, bool wait) {
    if (stream == nullptr) return INVALID_HANDLE;
    if (count == 0) return SUCCESS;
    if (!on_device(address, count)) return INVALID_VALUE;
    stream->submit([=] { memset(at(address), value, count); });
    if (wait) stream->wait();
    return SUCCESS;
}

int to_device(Stream* stream, uint64_t to, const void* from, size_t bytes, bool wait) {
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (from == nullptr || !on_device(to, bytes)) return INVALID_VALUE;
    // Pageable memory may be read late too: CUDA only documents that such a copy "might" be
    // synchronous.
    stream->submit([=] { memcpy(at(to), from, bytes); });
    if (wait) stream->wait();
    return SUCCESS;
}

int to_host(Stream* stream, void* to, uint64_t from, size_t bytes, bool wait) {
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (to == nullptr || !on_device(from, bytes)) return INVALID_VALUE;
    stream->submit([=] { memcpy(to, at(from), bytes); });
    if (wait) stream->wait();
    return SUCCESS;
}

int between_devices(Stream* stream, uint64_t to, uint64_t from, size_t bytes, bool wait) {
    if (stream == nullptr) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!on_device(to, bytes) || !on_device(from, bytes)) return INVALID_VALUE;
    stream->submit([=] { memmove(at(to), at(from), bytes); });
    if (wait) stream->wait();
    return SUCCESS;
}

int pin(void* host, size_t bytes) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    return all.pinned.emplace(reinterpret_cast<uint64_t>(host), bytes).second
               ? SUCCESS
               : HOST_MEMORY_ALREADY_REGISTERED;
}

bool unpin(void* host) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    return all.pinned.erase(reinterpret_cast<uint64_t>(host)) != 0;
}

}  // namespace

bool on_device(uint64_t address, size_t bytes) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    const auto found = find_covering(all.device, address);
    return found != all.device.end() && !found->second.freeing &&
           covers(address, bytes, found->first, found->second.bytes);
}

// Releases the unused memory of a pool above `keep` bytes. The caller holds the lock of memory.
static void trim(Pool& pool, size_t keep) {
    if (pool.reserved <= keep) return;
    if (!fragments()) {
        const size_t least = round_up(pool.used > keep ? pool.used : keep, CHUNK);
        if (pool.reserved > least) pool.reserved = least;
        return;
    }
    while (pool.reserved > keep && !pool.holes.empty()) {
        const auto largest = std::prev(pool.holes.end());
        pool.reserved -= *largest;
        pool.holes.erase(largest);
    }
}

void trim_pools(Device& device) {
    const std::lock_guard lock(memory().mutex);
    for (Pool* pool : {&device.default_pool, device.pool}) trim(*pool, pool->threshold);
}

}  // namespace driver

using namespace driver;

EXPORT bool lora_sim_on_device(const void* address, size_t bytes) {
    return on_device(reinterpret_cast<uint64_t>(address), bytes);
}

// ---- allocation ----

EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    Device* device = current();
    return device == nullptr ? INVALID_CONTEXT : allocate_on(*device, nullptr, bytes, address);
}

EXPORT int cuMemFree_v2(uint64_t address) {
    if (address == 0) return SUCCESS;
    Device* device = begin_free(address);
    if (device == nullptr) return INVALID_VALUE;
    device->wait();
    give_back(address);
    return SUCCESS;
}

EXPORT int cuMemAllocFromPoolAsync(uint64_t* address, size_t bytes, void* handle, void* stream_handle) {
    auto* pool = static_cast<Pool*>(handle);
    if (pool == nullptr || stream_of(stream_handle) == nullptr) return INVALID_HANDLE;
    return allocate_on(pool->device, pool, bytes, address);
}

EXPORT int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream_handle) {
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr) return INVALID_HANDLE;
    return allocate_on(stream->device, stream->device.pool, bytes, address);
}

EXPORT int cuMemFreeAsync(uint64_t address, void* stream_handle) {
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (address == 0) return SUCCESS;
    if (begin_free(address) == nullptr) return INVALID_VALUE;
    stream->submit([address] { give_back(address); });
    return SUCCESS;
}

EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    Device* device = current();
    if (device == nullptr) return INVALID_CONTEXT;
    const std::lock_guard lock(memory().mutex);
    *total = device->total;
    *free_bytes = device->total - reserved(*device);
    return SUCCESS;
}

EXPORT int cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t address) {
    Memory& all = memory();
    const std::lock_guard lock(all.mutex);
    const auto found = find_covering(all.device, address);
    if (found == all.device.end() || !covers(address, 1, found->first, found->second.bytes)) return NOT_FOUND;
    if (base != nullptr) *base = found->first;
    if (bytes != nullptr) *bytes = found->second.bytes;
    return SUCCESS;
}

EXPORT int cuMemHostAlloc(void** host, size_t bytes, unsigned) {
    if (current() == nullptr) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    *host = aligned_alloc(4096, round_up(bytes, 4096));
    if (*host == nullptr) return OUT_OF_MEMORY;
    memset(*host, POISON, bytes);
    return pin(*host, bytes);
}
EXPORT int cuMemAllocHost_v2(void** host, size_t bytes) { return cuMemHostAlloc(host, bytes, 0); }

EXPORT int cuMemFreeHost(void* host) {
    if (!unpin(host)) return INVALID_VALUE;
    if (Device* device = current()) device->wait();  // a copy may be running
    free(host);
    return SUCCESS;
}

EXPORT int cuMemHostRegister_v2(void* host, size_t bytes, unsigned) {
    if (current() == nullptr) return INVALID_CONTEXT;
    return host == nullptr || bytes == 0 ? INVALID_VALUE : pin(host, bytes);
}
EXPORT int cuMemHostUnregister(void* host) { return unpin(host) ? SUCCESS : HOST_MEMORY_NOT_REGISTERED; }

// ---- pools ----

namespace {
struct PoolProperties {  // CUmemPoolProps
    int allocation_type, handle_types, location_type, location_id;
    void* security;
    size_t max_size;
    unsigned short usage;
    unsigned char unused[54];
};

enum PoolAttribute {
    RELEASE_THRESHOLD = 4,
    RESERVED_CURRENT = 5,
    RESERVED_HIGH = 6,
    USED_CURRENT = 7,
    USED_HIGH = 8,
};
}  // namespace

EXPORT int cuDeviceGetDefaultMemPool(void** pool, int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices().size()) return INVALID_DEVICE;
    *pool = &devices()[static_cast<size_t>(ordinal)]->default_pool;
    return SUCCESS;
}

EXPORT int cuDeviceGetMemPool(void** pool, int ordinal) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices().size()) return INVALID_DEVICE;
    *pool = devices()[static_cast<size_t>(ordinal)]->pool;
    return SUCCESS;
}

EXPORT int cuDeviceSetMemPool(int ordinal, void* pool) {
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices().size()) return INVALID_DEVICE;
    if (pool == nullptr) return INVALID_VALUE;
    const std::lock_guard lock(memory().mutex);
    devices()[static_cast<size_t>(ordinal)]->pool = static_cast<Pool*>(pool);
    return SUCCESS;
}

EXPORT int cuMemPoolCreate(void** pool, const PoolProperties* properties) {
    const int ordinal = properties->location_id;
    if (properties->location_type != 1) return NOT_SUPPORTED;
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= devices().size()) return INVALID_DEVICE;
    *pool = new Pool{*devices()[static_cast<size_t>(ordinal)]};
    return SUCCESS;
}

EXPORT int cuMemPoolDestroy(void* handle) {
    auto* pool = static_cast<Pool*>(handle);
    const std::lock_guard lock(memory().mutex);
    if (pool == nullptr || pool == &pool->device.default_pool || pool->used != 0) return INVALID_VALUE;
    if (pool->device.pool == pool) pool->device.pool = &pool->device.default_pool;
    delete pool;
    return SUCCESS;
}

EXPORT int cuMemPoolTrimTo(void* handle, size_t keep) {
    auto* pool = static_cast<Pool*>(handle);
    if (pool == nullptr) return INVALID_VALUE;
    const std::lock_guard lock(memory().mutex);
    trim(*pool, keep);
    return SUCCESS;
}

EXPORT int cuMemPoolGetAttribute(void* handle, int attribute, void* value) {
    auto* pool = static_cast<Pool*>(handle);
    if (pool == nullptr) return INVALID_VALUE;
    const std::lock_guard lock(memory().mutex);
    switch (attribute) {
        case 1: case 2: case 3: *static_cast<int*>(value) = pool->reuse[attribute - 1]; return SUCCESS;
        case RELEASE_THRESHOLD: *static_cast<uint64_t*>(value) = pool->threshold; return SUCCESS;
        case RESERVED_CURRENT: *static_cast<uint64_t*>(value) = pool->reserved; return SUCCESS;
        case RESERVED_HIGH: *static_cast<uint64_t*>(value) = pool->reserved_high; return SUCCESS;
        case USED_CURRENT: *static_cast<uint64_t*>(value) = pool->used; return SUCCESS;
        case USED_HIGH: *static_cast<uint64_t*>(value) = pool->used_high; return SUCCESS;
        default: return INVALID_VALUE;
    }
}

EXPORT int cuMemPoolSetAttribute(void* handle, int attribute, void* value) {
    auto* pool = static_cast<Pool*>(handle);
    if (pool == nullptr) return INVALID_VALUE;
    const std::lock_guard lock(memory().mutex);
    const auto number = [value] { return *static_cast<uint64_t*>(value); };
    switch (attribute) {
        case 1: case 2: case 3: pool->reuse[attribute - 1] = *static_cast<int*>(value); return SUCCESS;
        case RELEASE_THRESHOLD: pool->threshold = number(); return SUCCESS;
        case RESERVED_HIGH:
            return number() == 0 ? (pool->reserved_high = pool->reserved, SUCCESS) : INVALID_VALUE;
        case USED_HIGH: return number() == 0 ? (pool->used_high = pool->used, SUCCESS) : INVALID_VALUE;
        default: return INVALID_VALUE;
    }
}

EXPORT int cuMemPoolSetAccess(void* pool, const void*, size_t) {
    return pool == nullptr ? INVALID_VALUE : SUCCESS;
}

// ---- copies and fills ----

EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    return to_device(stream_of(nullptr), to, from, bytes, true);
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    return to_device(stream_of(stream), to, from, bytes, false);
}
EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    return to_host(stream_of(nullptr), to, from, bytes, true);
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    return to_host(stream_of(stream), to, from, bytes, false);
}
EXPORT int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    return between_devices(stream_of(nullptr), to, from, bytes, true);
}
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    return between_devices(stream_of(stream), to, from, bytes, false);
}
EXPORT int cuMemcpyPeerAsync(uint64_t to, void*, uint64_t from, void*, size_t bytes, void* stream) {
    return between_devices(stream_of(stream), to, from, bytes, false);
}
EXPORT int cuMemcpyPeer(uint64_t to, void*, uint64_t from, void*, size_t bytes) {
    return between_devices(stream_of(nullptr), to, from, bytes, true);
}

EXPORT int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t count) {
    return fill(stream_of(nullptr), address, value, count, true);
}
EXPORT int cuMemsetD16_v2(uint64_t address, unsigned short value, size_t count) {
    return fill(stream_of(nullptr), address, value, count, true);
}
EXPORT int cuMemsetD32_v2(uint64_t address, unsigned value, size_t count) {
    return fill(stream_of(nullptr), address, value, count, true);
}
EXPORT int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void* stream) {
    return fill(stream_of(stream), address, value, count, false);
}
EXPORT int cuMemsetD16Async(uint64_t address, unsigned short value, size_t count, void* stream) {
    return fill(stream_of(stream), address, value, count, false);
}
EXPORT int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void* stream) {
    return fill(stream_of(stream), address, value, count, false);
}
