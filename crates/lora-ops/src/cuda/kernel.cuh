// Basics of kernels beyond plain C++: declaration, storage types and block-wide reductions. The
// source of a kernel is compiled twice: by nvcc for a GPU, and (with LORA_SIMULATED) by a C++
// compiler for the simulated GPU of the tests, which emulates blocks and threads on a CPU.
#pragma once

#ifdef LORA_SIMULATED
#include "simulated.h"
#else
#include <cuda_bf16.h>

// An exported kernel; `threads` is the maximum number of threads per block. Its name is unique over
// all files: `<operation>_<what>_<dtype>`.
#define KERNEL(threads, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)

// Declares `unsigned char name[]`: the dynamic shared memory of the block, aligned to 16 bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float bf16_to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 f32_to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ unsigned short bf16_bits(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ bf16 bf16_from_bits(unsigned short bits) { return __ushort_as_bfloat16(bits); }
#endif

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

// Conversion from storage to f32 and back, rounded to the nearest, ties to even.
__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return bf16_to_f32(x); }

template <typename T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) { return f32_to_bf16(x); }

// Packs two bf16 into a register, `low` in the lower half (at the lower address).
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    return bf16_bits(f32_to_bf16(low)) | static_cast<unsigned>(bf16_bits(f32_to_bf16(high))) << 16;
}
__device__ __forceinline__ float2 unpack_bf16(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Loads or stores four consecutive elements in one access. The address must be aligned to the size
// of the four: 16 bytes for f32, 8 for bf16.
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 load4(const bf16* from) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack_bf16(raw.x), high = unpack_bf16(raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ __forceinline__ void store4(bf16* to, float4 x) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}

// The index of a thread in its block, and the number of threads of a block.
__device__ __forceinline__ unsigned thread_rank() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ unsigned block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

struct Sum {
    static __device__ __forceinline__ float identity() { return 0.0f; }
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float identity() { return __uint_as_float(0xff800000u); }
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces over the 32 lanes of a warp. Every lane gets the result, with the same bits, because each
// step of the butterfly is commutative.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

// Reduces over all threads of a block, whose number must be a multiple of 32, in an order that
// depends only on that number. Every thread gets the result. All threads of the block must call it;
// it is a barrier, and calls may follow each other.
template <typename Op>
__device__ __forceinline__ float block_reduce(float value) {
    __shared__ float of_warp[32];
    const unsigned lane = thread_rank() % 32, warp = thread_rank() / 32;
    value = warp_reduce<Op>(value);
    __syncthreads();  // the previous reduction may still be reading
    if (lane == 0) of_warp[warp] = value;
    __syncthreads();
    return warp_reduce<Op>(lane < block_threads() / 32 ? of_warp[lane] : Op::identity());
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce<Sum>(value); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce<Max>(value); }
__device__ __forceinline__ float block_sum(float value) { return block_reduce<Sum>(value); }
__device__ __forceinline__ float block_max(float value) { return block_reduce<Max>(value); }
