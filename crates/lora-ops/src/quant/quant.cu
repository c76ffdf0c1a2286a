// Weights in 4 and 8 bits, as f32 or bf16. A thread makes runs of 16 bytes; neighbouring threads store neighbouring runs.
#include "rows.cuh"

// Runs of a thread of the 4-bit kernels. A block makes RUNS * blockDim.x consecutive runs.
constexpr unsigned RUNS = 4;

// The scale of each block: f32 [blocks], or where there is a `map` map[code] * absmax[block >> nested_shift] + offset.
struct Scales {
    const void* scales;
    const float* map;
    const float* absmax;
    float offset;
    unsigned nested_shift;

    // Not fused, as on the CPU.
    __device__ __forceinline__ float nested(size_t block) const {
        const float scale = map[static_cast<const unsigned char*>(scales)[block]];
        return __fadd_rn(__fmul_rn(scale, absmax[block >> nested_shift]), offset);
    }
    __device__ __forceinline__ float plain(size_t block) const { return static_cast<const float*>(scales)[block]; }
    __device__ __forceinline__ float at(size_t block) const { return map == nullptr ? plain(block) : nested(block); }
};

// N codes of 4 bits in one access; `from` is aligned to them.
template <unsigned N>
__device__ __forceinline__ unsigned load_codes(const unsigned char* from) {
    static_assert(N == 4 || N == 8);
    if constexpr (N == 8) return *reinterpret_cast<const unsigned*>(from);
    else return *reinterpret_cast<const unsigned short*>(from);
}

// Elements `start` to `start + n` of a matrix, row after row: element i is codebook[its four bits] * the scale of its block, i >> shift.
template <typename T>
__device__ __forceinline__ void four_bit(const unsigned char* __restrict__ codes, const float* __restrict__ codebook, const Scales& scales,
                                         unsigned shift, size_t start, T* __restrict__ out, size_t n) {
    constexpr unsigned N = RUN<T>;
    // The lanes of a warp look up any of 16 neighbouring words, which lie in 16 banks: no conflicts. The values are multiplied by the scale
    // after the look-up, as lanes have different scales.
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
    __syncthreads();

    const size_t step = size_t(blockDim.x) * N, first = size_t(blockIdx.x) * RUNS * step;
    const bool codes_aligned = reinterpret_cast<size_t>(codes) % (N / 2) == 0 && start % N == 0;
    if (!codes_aligned || !aligned(out) || first + RUNS * step > n) {
        for (size_t i = first + threadIdx.x; i < n && i < first + RUNS * step; i += blockDim.x) {
            const size_t at = start + i;
            const unsigned pair = codes[at / 2];
            out[i] = from_f32<T>(__fmul_rn(table[at % 2 == 0 ? pair >> 4 : pair & 15], scales.at(at >> shift)));
        }
        return;
    }
    // Blocks have 32 elements at least, so a run lies in one of them.
    const size_t mine = first + threadIdx.x * N;
    unsigned words[RUNS];
    float scale[RUNS];
#pragma unroll
    for (unsigned i = 0; i < RUNS; i++) words[i] = load_codes<N>(codes + (start + mine + i * step) / 2);
    if (scales.map == nullptr) {
#pragma unroll
        for (unsigned i = 0; i < RUNS; i++) scale[i] = scales.plain((start + mine + i * step) >> shift);
    } else {
#pragma unroll
        for (unsigned i = 0; i < RUNS; i++) scale[i] = scales.nested((start + mine + i * step) >> shift);
    }
#pragma unroll
    for (unsigned i = 0; i < RUNS; i++) {
        Run<N> values;
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            // The first of two codes is in the upper half of their byte.
            const unsigned code = words[i] >> (4 * (k ^ 1)) & 15;
            values.at[k] = __fmul_rn(table[code], scale[i]);
        }
        store_run<true>(out + mine + i * step, values, N);
    }
}

// Row blockIdx.x of codes [rows, cols]: element j is its code * (scales[row] * (1 / 127)).
template <typename T, bool WIDE>
__device__ __forceinline__ void int8_row(const signed char* __restrict__ codes, float factor, T* __restrict__ out, unsigned cols) {
    constexpr unsigned N = RUN<T>;
    const unsigned runs = runs_of(cols, N);
    for (unsigned i = threadIdx.x; i < runs; i += blockDim.x) {
        const size_t at = size_t(i) * N, count = cols - at;
        unsigned words[N / 4] = {};
        if constexpr (WIDE && N == 8) {
            const uint2 raw = *reinterpret_cast<const uint2*>(codes + at);
            words[0] = raw.x, words[1] = raw.y;
        } else if constexpr (WIDE) {
            words[0] = *reinterpret_cast<const unsigned*>(codes + at);
        } else {
#pragma unroll
            for (unsigned k = 0; k < N; k++) {
                if (k < count) words[k / 4] |= static_cast<unsigned>(static_cast<unsigned char>(codes[at + k])) << 8 * (k % 4);
            }
        }
        Run<N> values;
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            values.at[k] = __fmul_rn(static_cast<float>(static_cast<signed char>(words[k / 4] >> 8 * (k % 4))), factor);
        }
        store_run<WIDE>(out + at, values, count);
    }
}

template <typename T>
__device__ __forceinline__ void int8(const signed char* codes, const float* scales, unsigned cols, T* out) {
    const size_t row = size_t(blockIdx.x) * cols;
    const float factor = __fmul_rn(scales[blockIdx.x], 1.0f / 127.0f);
    if (cols % RUN<T> == 0 && reinterpret_cast<size_t>(codes) % RUN<T> == 0 && aligned(out)) {
        int8_row<T, true>(codes + row, factor, out + row, cols);
    } else {
        int8_row<T, false>(codes + row, factor, out + row, cols);
    }
}

KERNEL(256, quant_four_bit_f32, const unsigned char* codes, const float* codebook, const void* scales, const float* map,
       const float* absmax, float offset, unsigned nested_shift, unsigned shift, size_t start, float* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_shift}, shift, start, out, n);
}

KERNEL(256, quant_four_bit_bf16, const unsigned char* codes, const float* codebook, const void* scales, const float* map,
       const float* absmax, float offset, unsigned nested_shift, unsigned shift, size_t start, bf16* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_shift}, shift, start, out, n);
}

KERNEL(256, quant_int8_f32, const signed char* codes, const float* scales, unsigned cols, float* out) { int8(codes, scales, cols, out); }

KERNEL(256, quant_int8_bf16, const signed char* codes, const float* scales, unsigned cols, bf16* out) { int8(codes, scales, cols, out); }
