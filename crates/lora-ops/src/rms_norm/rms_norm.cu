// RMSNorm of the rows of x [tokens, features]: one block per row, whose threads process adjacent
// runs of 16 bytes. The elements that a thread sums, and their order, depend only on `features`.
#include "rows.cuh"

template <typename T, bool WIDE>
__device__ __forceinline__ void normalize_row(T* __restrict__ y, const T* x, const float* __restrict__ weight,
                                              float rstd, unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        Run<N> normed;
#pragma unroll
        for (unsigned k = 0; k < N; k++) normed.at[k] = w.at[k] * (of_x.at[k] * rstd);
        store_run<WIDE>(y + at, normed, count);
    }
}

// ADD: x first becomes x + residual, rounded to T.
template <typename T, bool WIDE, bool ADD>
__device__ __forceinline__ void forward_row(T* __restrict__ y, float* __restrict__ rstd, T* __restrict__ x,
                                            const T* __restrict__ residual, const float* __restrict__ weight,
                                            float eps, unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    float squares = 0.0f;
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        Run<N> of_x = load_run<WIDE, N>(x + at, count);
        if constexpr (ADD) {
            const Run<N> added = load_run<WIDE, N>(residual + at, count);
#pragma unroll
            for (unsigned k = 0; k < N; k++) of_x.at[k] = to_f32(from_f32<T>(of_x.at[k] + added.at[k]));
            store_run<WIDE>(x + at, of_x, count);
        }
#pragma unroll
        for (unsigned k = 0; k < N; k++) squares += of_x.at[k] * of_x.at[k];
    }
    const float mean = block_sum(squares) / static_cast<float>(features);
    const float scale = 1.0f / sqrtf(mean + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    normalize_row<T, WIDE>(y, x, weight, scale, features);
}

template <typename T, bool ADD>
__device__ __forceinline__ void forward(T* y, float* rstd, T* x, const T* residual, const float* weight,
                                        float eps, unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    if (features % RUN<T> == 0 && aligned(y, x, residual, weight)) {
        forward_row<T, true, ADD>(y + row, rstd, x + row, residual + row, weight, eps, features);
    } else {
        forward_row<T, false, ADD>(y + row, rstd, x + row, residual + row, weight, eps, features);
    }
}

template <typename T>
__device__ __forceinline__ void recompute(T* y, const float* rstd, const T* x, const float* weight,
                                          unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    if (features % RUN<T> == 0 && aligned(y, x, weight)) {
        normalize_row<T, true>(y + row, x + row, weight, rstd[blockIdx.x], features);
    } else {
        normalize_row<T, false>(y + row, x + row, weight, rstd[blockIdx.x], features);
    }
}

// dx = rstd w dy - x rstd^3 sum(w dy x) / features, plus the gradient `residual` if it is not null.
template <typename T, bool WIDE>
__device__ __forceinline__ void backward_row(T* __restrict__ dx, float rstd, const T* __restrict__ x,
                                             const float* __restrict__ weight, const T* __restrict__ dy,
                                             const T* __restrict__ residual, unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    float projection = 0.0f;
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        const Run<N> of_dy = load_run<WIDE, N>(dy + at, count);
#pragma unroll
        for (unsigned k = 0; k < N; k++) projection += w.at[k] * of_dy.at[k] * of_x.at[k];
    }
    const float factor = block_sum(projection) * rstd * rstd * rstd / static_cast<float>(features);
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        const Run<N> of_dy = load_run<WIDE, N>(dy + at, count);
        Run<N> of_dx;
#pragma unroll
        for (unsigned k = 0; k < N; k++)
            of_dx.at[k] = fmaf(-factor, of_x.at[k], rstd * (w.at[k] * of_dy.at[k]));
        if (residual != nullptr) {
            const Run<N> added = load_run<WIDE, N>(residual + at, count);
#pragma unroll
            for (unsigned k = 0; k < N; k++) of_dx.at[k] += added.at[k];
        }
        store_run<WIDE>(dx + at, of_dx, count);
    }
}

template <typename T>
__device__ __forceinline__ void backward(T* dx, const float* rstd, const T* x, const float* weight,
                                         const T* dy, const T* residual, unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    const T* added = residual == nullptr ? nullptr : residual + row;
    if (features % RUN<T> == 0 && aligned(dx, x, weight, dy, residual)) {
        backward_row<T, true>(dx + row, rstd[blockIdx.x], x + row, weight, dy + row, added, features);
    } else {
        backward_row<T, false>(dx + row, rstd[blockIdx.x], x + row, weight, dy + row, added, features);
    }
}

KERNEL(256, rms_norm_forward_f32, float* y, float* rstd, float* x, const float* weight, float eps,
       unsigned features) {
    forward<float, false>(y, rstd, x, x, weight, eps, features);
}
KERNEL(256, rms_norm_forward_bf16, bf16* y, float* rstd, bf16* x, const float* weight, float eps,
       unsigned features) {
    forward<bf16, false>(y, rstd, x, x, weight, eps, features);
}

KERNEL(256, rms_norm_add_forward_f32, float* y, float* rstd, float* x, const float* residual,
       const float* weight, float eps, unsigned features) {
    forward<float, true>(y, rstd, x, residual, weight, eps, features);
}
KERNEL(256, rms_norm_add_forward_bf16, bf16* y, float* rstd, bf16* x, const bf16* residual,
       const float* weight, float eps, unsigned features) {
    forward<bf16, true>(y, rstd, x, residual, weight, eps, features);
}

KERNEL(256, rms_norm_recompute_f32, float* y, const float* rstd, const float* x, const float* weight,
       unsigned features) {
    recompute(y, rstd, x, weight, features);
}
KERNEL(256, rms_norm_recompute_bf16, bf16* y, const float* rstd, const bf16* x, const float* weight,
       unsigned features) {
    recompute(y, rstd, x, weight, features);
}

KERNEL(256, rms_norm_backward_f32, float* dx, const float* rstd, const float* x, const float* weight,
       const float* dy, const float* residual, unsigned features) {
    backward(dx, rstd, x, weight, dy, residual, features);
}
KERNEL(256, rms_norm_backward_bf16, bf16* dx, const float* rstd, const bf16* x, const float* weight,
       const bf16* dy, const bf16* residual, unsigned features) {
    backward(dx, rstd, x, weight, dy, residual, features);
}
