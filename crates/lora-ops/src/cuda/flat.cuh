// Elementwise kernels over vectors: a thread computes four adjacent elements, in one access if they
// are aligned.
#pragma once

#include "kernel.cuh"

// Whether load4 and store4 may be used at `address` and at every fourth element after it.
template <typename T>
__device__ __forceinline__ bool aligned4(const T* address) {
    return reinterpret_cast<size_t>(address) % (4 * sizeof(T)) == 0;
}

// Processes the calling thread's elements of a vector of `n`: with `four(i)` for the elements from
// i to i + 3 if all four exist and are `aligned`, and otherwise with `one(i)` for each that exists.
// The launcher starts a thread for each four elements.
template <typename Four, typename One>
__device__ __forceinline__ void flat(size_t n, bool aligned, Four four, One one) {
    const size_t first = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (aligned && first + 4 <= n) {
        four(first);
        return;
    }
    for (size_t i = first; i < n && i < first + 4; i++) one(i);
}
