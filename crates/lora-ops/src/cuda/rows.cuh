// Rows in runs of consecutive elements. A run is what a thread loads or stores at a time: 16 bytes
// if the rows are aligned to 16 bytes. The elements of a run are f32.
#pragma once

#include "kernel.cuh"

// Elements of T in 16 bytes.
template <typename T>
constexpr unsigned RUN = 16 / sizeof(T);

template <unsigned N>
struct Run {
    float at[N];
};

// The number of runs of a row; the last run may be incomplete.
__device__ __forceinline__ unsigned runs_of(unsigned features, unsigned run) {
    return features / run + (features % run != 0);
}

// Whether all these addresses are multiples of 16 bytes. If rows consist of whole runs, every run
// is then aligned.
template <typename... T>
__device__ __forceinline__ bool aligned(const T*... addresses) {
    return ((reinterpret_cast<size_t>(addresses) % 16 == 0) && ...);
}

// Loads N elements in 16-byte accesses.
template <unsigned N>
__device__ __forceinline__ void load_wide(const float* from, Run<N>& run) {
#pragma unroll
    for (unsigned i = 0; i < N; i += 4) {
        const float4 four = load4(from + i);
        run.at[i] = four.x, run.at[i + 1] = four.y, run.at[i + 2] = four.z, run.at[i + 3] = four.w;
    }
}
__device__ __forceinline__ void load_wide(const bf16* from, Run<8>& run) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        const float2 pair = unpack_bf16(pairs[i]);
        run.at[2 * i] = pair.x, run.at[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void store_wide(float* to, const Run<4>& run) {
    store4(to, make_float4(run.at[0], run.at[1], run.at[2], run.at[3]));
}
__device__ __forceinline__ void store_wide(bf16* to, const Run<8>& run) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack_bf16(run.at[0], run.at[1]), pack_bf16(run.at[2], run.at[3]),
                   pack_bf16(run.at[4], run.at[5]), pack_bf16(run.at[6], run.at[7]));
}

// Loads the first `count` elements of a run; the others are 0. WIDE: loads all elements, from an
// aligned address.
template <bool WIDE, unsigned N, typename T>
__device__ __forceinline__ Run<N> load_run(const T* from, size_t count) {
    Run<N> run;
    if constexpr (WIDE) {
        load_wide(from, run);
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; i++) run.at[i] = i < count ? to_f32(from[i]) : 0.0f;
    }
    return run;
}
template <bool WIDE, unsigned N, typename T>
__device__ __forceinline__ void store_run(T* to, const Run<N>& run, size_t count) {
    if constexpr (WIDE) {
        store_wide(to, run);
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; i++) {
            if (i < count) to[i] = from_f32<T>(run.at[i]);
        }
    }
}
