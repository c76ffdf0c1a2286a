// Rotary embedding in place: a thread rotates one run of a head's lower half together with the
// paired run of its upper half.
#include "rows.cuh"

template <typename T, bool WIDE>
__device__ __forceinline__ void rotate_runs(T* __restrict__ low, T* __restrict__ high,
                                            const float* __restrict__ cos, const float* __restrict__ sin,
                                            unsigned count, float direction) {
    constexpr unsigned N = RUN<T>;
    const Run<N> l = load_run<WIDE, N>(low, count), h = load_run<WIDE, N>(high, count);
    const Run<N> c = load_run<WIDE, N>(cos, count), s = load_run<WIDE, N>(sin, count);
    Run<N> new_low, new_high;
#pragma unroll
    for (unsigned k = 0; k < N; k++) {
        const float turned = s.at[k] * direction;
        new_low.at[k] = fmaf(l.at[k], c.at[k], -(h.at[k] * turned));
        new_high.at[k] = fmaf(h.at[k], c.at[k], l.at[k] * turned);
    }
    store_run<WIDE>(low, new_low, count);
    store_run<WIDE>(high, new_high, count);
}

// x [tokens, heads, width], of which the first 2 half features of a head are rotated; cos and sin
// [positions, half]; token t has position first + t % seq. Block x is a token, y a part of its
// runs.
template <typename T>
__device__ __forceinline__ void rotate(T* x, const float* cos, const float* sin, unsigned heads,
                                       unsigned width, unsigned half, unsigned seq, unsigned first,
                                       float direction) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(half, N), run = blockIdx.y * blockDim.x + threadIdx.x;
    const unsigned head = run / runs, at = run % runs * N;
    if (head >= heads) return;
    T* low = x + (size_t(blockIdx.x) * heads + head) * width + at;
    const size_t angle = size_t(first + blockIdx.x % seq) * half + at;
    if (half % N == 0 && width % N == 0 && aligned(x, cos, sin)) {
        rotate_runs<T, true>(low, low + half, cos + angle, sin + angle, half - at, direction);
    } else {
        rotate_runs<T, false>(low, low + half, cos + angle, sin + angle, half - at, direction);
    }
}

KERNEL(256, rope_rotate_f32, float* x, const float* cos, const float* sin, unsigned heads, unsigned width,
       unsigned half, unsigned seq, unsigned first, float direction) {
    rotate(x, cos, sin, heads, width, half, seq, first, direction);
}
KERNEL(256, rope_rotate_bf16, bf16* x, const float* cos, const float* sin, unsigned heads, unsigned width,
       unsigned half, unsigned seq, unsigned first, float direction) {
    rotate(x, cos, sin, heads, width, half, seq, first, direction);
}

// As `rotate`, for pairs of adjacent features. A thread rotates one pair.
template <typename T>
__device__ __forceinline__ void rotate_interleaved(T* x, const float* cos, const float* sin, unsigned heads,
                                                   unsigned width, unsigned half, unsigned seq,
                                                   unsigned first, float direction) {
    const unsigned pair = blockIdx.y * blockDim.x + threadIdx.x, head = pair / half, at = pair % half;
    if (head >= heads) return;
    T* low = x + (size_t(blockIdx.x) * heads + head) * width + 2 * at;
    const size_t angle = size_t(first + blockIdx.x % seq) * half + at;
    const float l = to_f32(low[0]), h = to_f32(low[1]), c = cos[angle], turned = sin[angle] * direction;
    low[0] = from_f32<T>(fmaf(l, c, -(h * turned)));
    low[1] = from_f32<T>(fmaf(h, c, l * turned));
}

KERNEL(256, rope_rotate_interleaved_f32, float* x, const float* cos, const float* sin, unsigned heads,
       unsigned width, unsigned half, unsigned seq, unsigned first, float direction) {
    rotate_interleaved(x, cos, sin, heads, width, half, seq, first, direction);
}
KERNEL(256, rope_rotate_interleaved_bf16, bf16* x, const float* cos, const float* sin, unsigned heads,
       unsigned width, unsigned half, unsigned seq, unsigned first, float direction) {
    rotate_interleaved(x, cos, sin, heads, width, half, seq, first, direction);
}
