// CUDA C++ for a CPU. If LORA_SIMULATED is defined, `kernel.cuh` includes this file instead of
// CUDA's headers. The threads of a block are fibers on the calling thread (simulated.cpp). The
// lanes of a warp wait for each other in collectives.
#pragma once

#include <climits>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local storage, so that launches from several threads do not share it. It is filled with
// NaN before each block.
#define __shared__ static thread_local

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

#define SIM_VECTOR2(type, element, alignment) \
    struct alignas(alignment) [[gnu::may_alias]] type { \
        element x, y; \
    }; \
    inline type make_##type(element x, element y) { return type{x, y}; }
#define SIM_VECTOR4(type, element, alignment) \
    struct alignas(alignment) [[gnu::may_alias]] type { \
        element x, y, z, w; \
    }; \
    inline type make_##type(element x, element y, element z, element w) { return type{x, y, z, w}; }
SIM_VECTOR2(float2, float, 8)
SIM_VECTOR4(float4, float, 16)
SIM_VECTOR2(int2, int, 8)
SIM_VECTOR4(int4, int, 16)
SIM_VECTOR2(uint2, unsigned, 8)
SIM_VECTOR4(uint4, unsigned, 16)
SIM_VECTOR2(double2, double, 16)
SIM_VECTOR2(ulonglong2, unsigned long long, 16)
#undef SIM_VECTOR2
#undef SIM_VECTOR4

// ---- threads, blocks, launches ----

namespace sim {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned WARP = 32, MOST_THREADS = 1024;

struct Block;

struct Thread {
    dim3 index;
    const dim3 *block_index, *block_dim, *grid_dim;
    unsigned rank, lane;
    Block* block;
};

// The address of a thread's data, which lies above the thread's stack. The stack is aligned to its
// size, so the address follows from the stack pointer without a lookup. The offset differs from
// stack to stack, because otherwise all threads would compete for the same cache lines.
constexpr size_t THREAD_BYTES = 256;
constexpr uintptr_t place_of_thread(uintptr_t in_stack) {
    const uintptr_t end = (in_stack | (STACK_BYTES - 1)) + 1;
    return end - THREAD_BYTES - end / STACK_BYTES % 64 * THREAD_BYTES;
}
inline Thread& here() {
    return *reinterpret_cast<Thread*>(
        place_of_thread(reinterpret_cast<uintptr_t>(__builtin_frame_address(0))));
}

unsigned char* dynamic_shared();
void sync_block(int line);

// A collective operation of the lanes of a warp. Each lane calls this function with its own
// `argument`. When all lanes of `mask` that have not exited have called it, `operation` runs once
// with all arguments (null: an absent lane).
using Operation = void (*)(void* (&arguments)[WARP]);
void warp_collective(unsigned mask, Operation operation, void* argument, const char* name);

// Ends the process with a message that names the running kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Whether `bytes` from `address` lie in the running block's shared memory.
bool is_shared(const void* address, size_t bytes);

struct Kernel {
    const char *name, *file;
    unsigned threads;  // largest number of threads of a block
    void (*function)();
    // Returns the function that every thread runs: `function` with copies of the values that
    // `arguments` point to.
    std::function<void()> (*bind)(void (*function)(), void** arguments);
    size_t dynamic_limit = 48 * 1024;  // cuFuncSetAttribute raises it
};

void register_kernel(Kernel*);
std::vector<Kernel*>& kernels();
Kernel* find_kernel(const char* name);  // null if the kernel does not exist

// The reason why a launch is not allowed, or null if it is.
const char* refuse(const Kernel&, dim3 grid, dim3 block, size_t shared_bytes);
// Runs a kernel to its end. `arguments` are pointers to the values. Ends the process if the launch
// is not allowed.
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void** arguments);
void launch(const Kernel&, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Launches a kernel: run("name", grid, block, shared_bytes, a, b, c). The arguments must have
// exactly the types of the kernel's parameters.
template <typename... Args>
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Args... arguments) {
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    launch(name, grid, block, shared_bytes, pointers);
}

template <typename... Args, size_t... I>
std::function<void()> bind_kernel(void (*function)(Args...), void** arguments, std::index_sequence<I...>) {
    const std::tuple<std::remove_cv_t<Args>...> values(
        *static_cast<std::remove_cv_t<Args>*>(arguments[I])...);
    return [function, values] { std::apply(function, values); };
}

struct Registration {
    Kernel kernel;
    template <typename... Args>
    Registration(const char* name, const char* file, unsigned threads, void (*function)(Args...))
        : kernel{name, file, threads, reinterpret_cast<void (*)()>(function),
                 [](void (*f)(), void** arguments) {
                     return bind_kernel(reinterpret_cast<void (*)(Args...)>(f), arguments,
                                        std::index_sequence_for<Args...>());
                 }} {
        register_kernel(&kernel);
    }
};

}  // namespace sim

#define KERNEL(threads, name, ...) \
    static void name(__VA_ARGS__); \
    static ::sim::Registration sim_kernel_##name(#name, __FILE__, threads, &name); \
    static void name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) unsigned char* const name = ::sim::dynamic_shared()

#define threadIdx (::sim::here().index)
#define blockIdx (*::sim::here().block_index)
#define blockDim (*::sim::here().block_dim)
#define gridDim (*::sim::here().grid_dim)
#define warpSize 32
#define __syncthreads() ::sim::sync_block(__LINE__)

#include "intrinsics.h"
