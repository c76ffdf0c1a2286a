// Rows of a matrix by index. Block x is a token, y a part of its row; a thread copies one run.
#include "rows.cuh"

template <typename T>
__device__ __forceinline__ void copy_rows(T* y, const T* weight, const unsigned* tokens, unsigned features) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (at >= features) return;
    const T* from = weight + size_t(tokens[blockIdx.x]) * features + at;
    T* to = y + size_t(blockIdx.x) * features + at;
    if (features % N == 0 && aligned(y, weight)) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
        for (unsigned k = 0; k < N && at + k < features; k++) to[k] = from[k];
    }
}

KERNEL(256, embedding_forward_f32, float* y, const float* weight, const unsigned* tokens, unsigned features) {
    copy_rows(y, weight, tokens, features);
}
KERNEL(256, embedding_forward_bf16, bf16* y, const bf16* weight, const unsigned* tokens, unsigned features) {
    copy_rows(y, weight, tokens, features);
}
