// Dequantizes weights in 4 and 8 bits to f32 or bf16. A thread writes runs of 16 bytes, and
// adjacent threads write adjacent runs, so every access of a warp is to consecutive bytes.
#include "rows.cuh"

// Runs per thread in the 4-bit kernels; a block writes RUNS * blockDim.x consecutive runs.
constexpr unsigned RUNS = 4;

// The scale of each block: f32 [blocks] or, if `map` is not null,
// map[code] * absmax[block >> nested_shift] + offset.
struct Scales {
    const void* scales;
    const float* map;
    const float* absmax;
    float offset;
    unsigned nested_shift;

    // Product and sum are not fused, as on the CPU.
    __device__ __forceinline__ float nested(size_t block) const {
        const float scale = map[static_cast<const unsigned char*>(scales)[block]];
        return __fadd_rn(__fmul_rn(scale, absmax[block >> nested_shift]), offset);
    }
    __device__ __forceinline__ float plain(size_t block) const {
        return static_cast<const float*>(scales)[block];
    }
    __device__ __forceinline__ float at(size_t block) const {
        return map == nullptr ? plain(block) : nested(block);
    }
};

// Loads N codes of 4 bits in one access; `from` is aligned to the size of the access.
template <unsigned N>
__device__ __forceinline__ unsigned load_codes(const unsigned char* from) {
    static_assert(N == 4 || N == 8);
    if constexpr (N == 8) return *reinterpret_cast<const unsigned*>(from);
    else return *reinterpret_cast<const unsigned short*>(from);
}

// Dequantizes elements `start` to `start + n` of a matrix, in row-major order. Element i is
// codebook[its four bits] times the scale of block i >> shift.
template <typename T>
__device__ __forceinline__ void four_bit(const unsigned char* __restrict__ codes,
                                         const float* __restrict__ codebook, const Scales& scales,
                                         unsigned shift, size_t start, T* __restrict__ out, size_t n) {
    constexpr unsigned N = RUN<T>;
    // The 16 words are in 16 banks, so the lookups of a warp never conflict. A table that was
    // multiplied by the scale would be needed once for each block that the warp reads.
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
    __syncthreads();

    const size_t step = size_t(blockDim.x) * N, first = size_t(blockIdx.x) * RUNS * step;
    const bool codes_aligned = reinterpret_cast<size_t>(codes) % (N / 2) == 0 && start % N == 0;
    if (!codes_aligned || !aligned(out) || first + RUNS * step > n) {
        for (size_t i = first + threadIdx.x; i < n && i < first + RUNS * step; i += blockDim.x) {
            const size_t at = start + i;
            const unsigned pair = codes[at / 2];
            out[i] =
                from_f32<T>(__fmul_rn(table[at % 2 == 0 ? pair >> 4 : pair & 15], scales.at(at >> shift)));
        }
        return;
    }
    // Blocks have at least 32 elements, so a run is in one block.
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

// Dequantizes row blockIdx.x of codes [rows, cols]: element j is
// code j * (scales[row] * (1 / 127)).
template <typename T, bool WIDE>
__device__ __forceinline__ void int8_row(const signed char* __restrict__ codes, float factor,
                                         T* __restrict__ out, unsigned cols) {
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
                if (k < count)
                    words[k / 4] |= static_cast<unsigned>(static_cast<unsigned char>(codes[at + k]))
                                    << 8 * (k % 4);
            }
        }
        Run<N> values;
#pragma unroll
        for (unsigned k = 0; k < N; k++) {
            values.at[k] =
                __fmul_rn(static_cast<float>(static_cast<signed char>(words[k / 4] >> 8 * (k % 4))), factor);
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

KERNEL(256, quant_four_bit_f32, const unsigned char* codes, const float* codebook, const void* scales,
       const float* map, const float* absmax, float offset, unsigned nested_shift, unsigned shift,
       size_t start, float* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_shift}, shift, start, out, n);
}

KERNEL(256, quant_four_bit_bf16, const unsigned char* codes, const float* codebook, const void* scales,
       const float* map, const float* absmax, float offset, unsigned nested_shift, unsigned shift,
       size_t start, bf16* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_shift}, shift, start, out, n);
}

KERNEL(256, quant_int8_f32, const signed char* codes, const float* scales, unsigned cols, float* out) {
    int8(codes, scales, cols, out);
}

KERNEL(256, quant_int8_bf16, const signed char* codes, const float* scales, unsigned cols, bf16* out) {
    int8(codes, scales, cols, out);
}
