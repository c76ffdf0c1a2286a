// Norm of the rows of x [tokens, features]: one block per row, whose threads process adjacent runs
// of 16 bytes. The elements that a thread sums, and their order, depend only on `features`.
//
// CENTERED: LayerNorm, which subtracts the mean; otherwise RMSNorm, whose `mean` is null. The bias
// may be null.
#include "rows.cuh"

// What the norm of a row subtracts (0 in an RMSNorm), and what it then multiplies by.
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
template <typename T, bool WIDE, bool CENTERED, bool ADD>
__device__ __forceinline__ Stats stats_of_row(T* __restrict__ x, const T* __restrict__ residual, float eps,
                                              unsigned features) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(features, N);
    // Of the elements, or of their squares.
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
        for (unsigned k = 0; k < N; k++) total += CENTERED ? of_x.at[k] : of_x.at[k] * of_x.at[k];
    }
    const float mean = block_sum(total) / static_cast<float>(features);
    if constexpr (CENTERED) {
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
    } else {
        return {0.0f, 1.0f / sqrtf(mean + eps)};
    }
}

template <typename T, bool WIDE, bool CENTERED, bool ADD>
__device__ __forceinline__ void forward_row(T* y, float* mean, float* rstd, T* x, const T* residual,
                                            const float* weight, const float* bias, float eps,
                                            unsigned features) {
    const Stats stats = stats_of_row<T, WIDE, CENTERED, ADD>(x, residual, eps, features);
    if (threadIdx.x == 0) {
        if constexpr (CENTERED) mean[blockIdx.x] = stats.mean;
        rstd[blockIdx.x] = stats.rstd;
    }
    normalize_row<T, WIDE>(y, x, weight, bias, stats, features);
}

template <typename T, bool CENTERED, bool ADD>
__device__ __forceinline__ void forward(T* y, float* mean, float* rstd, T* x, const T* residual,
                                        const float* weight, const float* bias, float eps,
                                        unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    if (features % RUN<T> == 0 && aligned(y, x, residual, weight, bias)) {
        forward_row<T, true, CENTERED, ADD>(y + row, mean, rstd, x + row, residual + row, weight, bias, eps,
                                            features);
    } else {
        forward_row<T, false, CENTERED, ADD>(y + row, mean, rstd, x + row, residual + row, weight, bias, eps,
                                             features);
    }
}

template <bool CENTERED>
__device__ __forceinline__ Stats saved_stats(const float* mean, const float* rstd) {
    return {CENTERED ? mean[blockIdx.x] : 0.0f, rstd[blockIdx.x]};
}

template <typename T, bool CENTERED>
__device__ __forceinline__ void recompute(T* y, const float* mean, const float* rstd, const T* x,
                                          const float* weight, const float* bias, unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    const Stats stats = saved_stats<CENTERED>(mean, rstd);
    if (features % RUN<T> == 0 && aligned(y, x, weight, bias)) {
        normalize_row<T, true>(y + row, x + row, weight, bias, stats, features);
    } else {
        normalize_row<T, false>(y + row, x + row, weight, bias, stats, features);
    }
}

// dx = rstd (w dy - mean(w dy)) - (x - mean) rstd^3 sum(w dy (x - mean)) / features, where both
// means are 0 in an RMSNorm, plus the gradient `residual` if it is not null.
template <typename T, bool WIDE, bool CENTERED>
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
            if constexpr (CENTERED) total += gradient;
            projection += gradient * (of_x.at[k] - stats.mean);
        }
    }
    const float rstd = stats.rstd;
    const float mean_gradient = CENTERED ? block_sum(total) / static_cast<float>(features) : 0.0f;
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

template <typename T, bool CENTERED>
__device__ __forceinline__ void backward(T* dx, const float* mean, const float* rstd, const T* x,
                                         const float* weight, const T* dy, const T* residual,
                                         unsigned features) {
    const size_t row = size_t(blockIdx.x) * features;
    const Stats stats = saved_stats<CENTERED>(mean, rstd);
    const T* added = residual == nullptr ? nullptr : residual + row;
    if (features % RUN<T> == 0 && aligned(dx, x, weight, dy, residual)) {
        backward_row<T, true, CENTERED>(dx + row, stats, x + row, weight, dy + row, added, features);
    } else {
        backward_row<T, false, CENTERED>(dx + row, stats, x + row, weight, dy + row, added, features);
    }
}

#define NORM(kind, CENTERED, T, dtype)                                                                     \
    KERNEL(256, kind##_norm_forward_##dtype, T* y, float* mean, float* rstd, T* x, const float* weight,    \
           const float* bias, float eps, unsigned features) {                                              \
        forward<T, CENTERED, false>(y, mean, rstd, x, x, weight, bias, eps, features);                     \
    }                                                                                                      \
    KERNEL(256, kind##_norm_add_forward_##dtype, T* y, float* mean, float* rstd, T* x, const T* residual,  \
           const float* weight, const float* bias, float eps, unsigned features) {                         \
        forward<T, CENTERED, true>(y, mean, rstd, x, residual, weight, bias, eps, features);               \
    }                                                                                                      \
    KERNEL(256, kind##_norm_recompute_##dtype, T* y, const float* mean, const float* rstd, const T* x,     \
           const float* weight, const float* bias, unsigned features) {                                    \
        recompute<T, CENTERED>(y, mean, rstd, x, weight, bias, features);                                  \
    }                                                                                                      \
    KERNEL(256, kind##_norm_backward_##dtype, T* dx, const float* mean, const float* rstd, const T* x,     \
           const float* weight, const T* dy, const T* residual, unsigned features) {                       \
        backward<T, CENTERED>(dx, mean, rstd, x, weight, dy, residual, features);                          \
    }
NORM(rms, false, float, f32)
NORM(rms, false, bf16, bf16)
NORM(layer, true, float, f32)
NORM(layer, true, bf16, bf16)
