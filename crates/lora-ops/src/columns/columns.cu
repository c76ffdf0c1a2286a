// Some columns of a matrix, copied to columns of another one. Block x is a row, y a part of it; a
// thread copies one run.
#include "rows.cuh"

template <typename T>
__device__ __forceinline__ void copy_columns(const T* source, T* target, unsigned source_columns,
                                             unsigned target_columns, unsigned from, unsigned to,
                                             unsigned width) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (at >= width) return;
    source += size_t(blockIdx.x) * source_columns + from + at;
    target += size_t(blockIdx.x) * target_columns + to + at;
    if (at + N <= width && aligned(source, target)) {
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    } else {
        for (unsigned k = 0; k < N && at + k < width; k++) target[k] = source[k];
    }
}

KERNEL(256, columns_copy_f32, const float* source, float* target, unsigned source_columns,
       unsigned target_columns, unsigned from, unsigned to, unsigned width) {
    copy_columns(source, target, source_columns, target_columns, from, to, width);
}
KERNEL(256, columns_copy_bf16, const bf16* source, bf16* target, unsigned source_columns,
       unsigned target_columns, unsigned from, unsigned to, unsigned width) {
    copy_columns(source, target, source_columns, target_columns, from, to, width);
}
