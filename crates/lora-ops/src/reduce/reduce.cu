// Sums over long vectors, and sums of several vectors in a given order.
#include "flat.cuh"

// The sum of squares of each `chunk` elements, with one block per chunk.
KERNEL(256, reduce_sum_of_squares_f32, const float* x, size_t n, unsigned chunk, float* partial) {
    const size_t first = static_cast<size_t>(blockIdx.x) * chunk;
    const size_t end = min(n, first + chunk);
    float sum = 0.0f;
#pragma unroll 4
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

KERNEL(256, reduce_scale_f32, float* x, float factor, size_t n) {
    flat(
        n, aligned4(x),
        [=](size_t i) {
            const float4 a = load4(x + i);
            store4(x + i, make_float4(a.x * factor, a.y * factor, a.z * factor, a.w * factor));
        },
        [=](size_t i) { x[i] *= factor; });
}

// The finalizer of splitmix64.
__device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Adds the hashes of the elements' bits to two sums; element 0 has the index `first`. Integer sums
// do not depend on their order.
template <typename T>
__device__ __forceinline__ void fingerprint(const T* x, size_t n, unsigned long long first,
                                            unsigned long long key0, unsigned long long key1,
                                            unsigned long long* sums) {
    const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
    unsigned long long sum0 = 0, sum1 = 0;
#pragma unroll 4
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
        const unsigned long long word = static_cast<unsigned long long>(x[i]) << 32 ^ (first + i);
        sum0 += mix(word ^ key0);
        sum1 += mix(word ^ key1);
    }
    sum0 = warp_sum(sum0);
    sum1 = warp_sum(sum1);
    if (threadIdx.x % 32 == 0) {
        atomicAdd(&sums[0], sum0);
        atomicAdd(&sums[1], sum1);
    }
}

KERNEL(256, reduce_fingerprint_f32, const unsigned* x, size_t n, unsigned long long first,
       unsigned long long key0, unsigned long long key1, unsigned long long* sums) {
    fingerprint(x, n, first, key0, key1, sums);
}

KERNEL(256, reduce_fingerprint_u8, const unsigned char* x, size_t n, unsigned long long first,
       unsigned long long key0, unsigned long long key1, unsigned long long* sums) {
    fingerprint(x, n, first, key0, key1, sums);
}

struct Pairs {
    unsigned count;
    uint2 pair[64];
};

// vectors[pair.x] += vectors[pair.y] for each pair in order.
KERNEL(256, reduce_tree_combine_f32, float* vectors, size_t elements, Pairs order) {
    flat(
        elements, aligned4(vectors) && elements % 4 == 0,
        [&](size_t i) {
            for (unsigned k = 0; k < order.count; k++) {
                float* to = vectors + order.pair[k].x * elements + i;
                const float4 a = load4(to), b = load4(vectors + order.pair[k].y * elements + i);
                store4(to, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
            }
        },
        [&](size_t i) {
            for (unsigned k = 0; k < order.count; k++) {
                vectors[order.pair[k].x * elements + i] += vectors[order.pair[k].y * elements + i];
            }
        });
}
