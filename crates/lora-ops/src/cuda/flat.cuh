// Vectors whose elements are each worked on alone: a thread takes four neighbours, in one access where they lie on a boundary.
#pragma once

#include "kernel.cuh"

// Whether load4 and store4 may be used at `address` and at every fourth element after it.
template <typename T>
__device__ __forceinline__ bool aligned4(const T* address) {
    return reinterpret_cast<size_t>(address) % (4 * sizeof(T)) == 0;
}

// The calling thread's share of a vector of `n`: `four(i)` for elements i to i + 3 where there are four and they are `aligned`, else
// `one(i)` for each there is. The launcher starts a thread for each four elements.
template <typename Four, typename One>
__device__ __forceinline__ void flat(size_t n, bool aligned, Four four, One one) {
    const size_t first = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (aligned && first + 4 <= n) {
        four(first);
        return;
    }
    for (size_t i = first; i < n && i < first + 4; i++) one(i);
}
