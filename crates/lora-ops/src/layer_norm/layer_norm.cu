// LayerNorm of the rows of x [tokens, features]: one block per row, whose threads process adjacent
// runs of 16 bytes. The elements that a thread sums, and their order, depend only on `features`.
// The bias may be null.
#include "rows.cuh"

// What the norm of a row subtracts, and what it then multiplies by.
struct Stats {
    float mean, rstd;
};

template <typename T, bool WIDE>
__device__ __forceinline__ void normalize_row(T* __restrict__ y, const T* x, const float* __restrict__ weight,
                                              const float* __restrict__ bias, Stats stats,
                                              unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        Run<N> normed;
#pragma unroll
        for (unsigned k = 0; k < N; k++) normed.at[k] = w.at[k] * ((of_x.at[k] - stats.mean) * stats.rstd);
        if (bias != nullptr) {
            const Run<N> b = load_run<WIDE, N>(bias + at, count);
#pragma unroll
            for (unsigned k = 0; k < N; k++) normed.at[k] += b.at[k];
        }
        store_run<WIDE>(y + at, normed, count);
    }
}

// ADD: x first becomes x + residual, rounded to T.
template <typename T, bool WIDE, bool ADD>
__device__ __forceinline__ Stats stats_of_row(T* __restrict__ x, const T* __restrict__ residual, float eps,
                                              unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    float total = 0.0f;
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
        for (unsigned k = 0; k < N; k++) total += of_x.at[k];
    }
    const float mean = block_sum(total) / static_cast<float>(features);
    float squares = 0.0f;
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count);
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            const float centered = WIDE || k < count ? of_x.at[k] - mean : 0.0f;
            squares += centered * centered;
        }
    }
    const float variance = block_sum(squares) / static_cast<float>(features);
    return {mean, 1.0f / sqrtf(variance + eps)};
}

template <typename T, bool WIDE, bool ADD>
__device__ __forceinline__ void forward_row(T* y, float* mean, float* rstd, T* x, const T* residual,
                                            const float* weight, const float* bias, float eps,
                                            unsigned features) {
    const Stats stats = stats_of_row<T, WIDE, ADD>(x, residual, eps, features);
    if (threadIdx.x == 0) mean[blockIdx.x] = stats.mean, rstd[blockIdx.x] = stats.rstd;
    normalize_row<T, WIDE>(y, x, weight, bias, stats, features);
}

template <typename T, bool ADD>
__device__ __forceinline__ void forward(T* y, float* mean, float* rstd, T* x, const T* residual,
                                        const float* weight, const float* bias, float eps,
                                        unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    if (features % RUN<T> == 0 && aligned(y, x, residual, weight, bias)) {
        forward_row<T, true, ADD>(y + row, mean, rstd, x + row, residual + row, weight, bias, eps, features);
    } else {
        forward_row<T, false, ADD>(y + row, mean, rstd, x + row, residual + row, weight, bias, eps, features);
    }
}

template <typename T>
__device__ __forceinline__ void recompute(T* y, const float* mean, const float* rstd, const T* x,
                                          const float* weight, const float* bias, unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    const Stats stats = {mean[blockIdx.x], rstd[blockIdx.x]};
    if (features % RUN<T> == 0 && aligned(y, x, weight, bias)) {
        normalize_row<T, true>(y + row, x + row, weight, bias, stats, features);
    } else {
        normalize_row<T, false>(y + row, x + row, weight, bias, stats, features);
    }
}

// dx = rstd (w dy - mean(w dy)) - (x - mean) rstd^3 sum(w dy (x - mean)) / features, plus the
// gradient `residual` if it is not null.
template <typename T, bool WIDE>
__device__ __forceinline__ void backward_row(T* __restrict__ dx, Stats stats, const T* __restrict__ x,
                                             const float* __restrict__ weight, const T* __restrict__ dy,
                                             const T* __restrict__ residual, unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    float total = 0.0f, projection = 0.0f;
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        const Run<N> of_dy = load_run<WIDE, N>(dy + at, count);
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            const float gradient = w.at[k] * of_dy.at[k];
            total += gradient;
            projection += gradient * (of_x.at[k] - stats.mean);
        }
    }
    const float rstd = stats.rstd, mean_gradient = block_sum(total) / static_cast<float>(features);
    const float factor = block_sum(projection) * rstd * rstd * rstd / static_cast<float>(features);
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = features - at;
        const Run<N> of_x = load_run<WIDE, N>(x + at, count), w = load_run<WIDE, N>(weight + at, count);
        const Run<N> of_dy = load_run<WIDE, N>(dy + at, count);
        Run<N> of_dx;
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            const float gradient = rstd * (w.at[k] * of_dy.at[k] - mean_gradient);
            of_dx.at[k] = fmaf(-factor, of_x.at[k] - stats.mean, gradient);
        }
        if (residual != nullptr) {
            const Run<N> added = load_run<WIDE, N>(residual + at, count);
#pragma unroll
            for (unsigned k = 0; k < N; k++) of_dx.at[k] += added.at[k];
        }
        store_run<WIDE>(dx + at, of_dx, count);
    }
}

template <typename T>
__device__ __forceinline__ void backward(T* dx, const float* mean, const float* rstd, const T* x,
                                         const float* weight, const T* dy, const T* residual,
                                         unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    const Stats stats = {mean[blockIdx.x], rstd[blockIdx.x]};
    const T* added = residual == nullptr ? nullptr : residual + row;
    if (features % RUN<T> == 0 && aligned(dx, x, weight, dy, residual)) {
        backward_row<T, true>(dx + row, stats, x + row, weight, dy + row, added, features);
    } else {
        backward_row<T, false>(dx + row, stats, x + row, weight, dy + row, added, features);
    }
}

#define LAYER_NORM(T, dtype)                                                                               \
    KERNEL(256, layer_norm_forward_##dtype, T* y, float* mean, float* rstd, T* x, const float* weight,     \
           const float* bias, float eps, unsigned features) {                                              \
        forward<T, false>(y, mean, rstd, x, x, weight, bias, eps, features);                               \
    }                                                                                                      \
    KERNEL(256, layer_norm_add_forward_##dtype, T* y, float* mean, float* rstd, T* x, const T* residual,   \
           const float* weight, const float* bias, float eps, unsigned features) {                         \
        forward<T, true>(y, mean, rstd, x, residual, weight, bias, eps, features);                         \
    }                                                                                                      \
    KERNEL(256, layer_norm_recompute_##dtype, T* y, const float* mean, const float* rstd, const T* x,      \
           const float* weight, const float* bias, unsigned features) {                                    \
        recompute(y, mean, rstd, x, weight, bias, features);                                               \
    }                                                                                                      \
    KERNEL(256, layer_norm_backward_##dtype, T* dx, const float* mean, const float* rstd, const T* x,      \
           const float* weight, const T* dy, const T* residual, unsigned features) {                       \
        backward(dx, mean, rstd, x, weight, dy, residual, features);                                       \
    }
LAYER_NORM(float, f32)
LAYER_NORM(bf16, bf16)
