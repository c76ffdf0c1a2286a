// Tiles of bf16 rows in shared memory, and their products on tensor cores.
#pragma once

#include "mma.cuh"
#include "view.cuh"

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
// The shuffle shows the compiler that all lanes of a warp have the same value, so that it keeps the
// value, and values computed from it, once per warp.
__device__ __forceinline__ int warp_id() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
}

// Returns x, but hides its value from the compiler: values computed from the result are recomputed
// where they are used and occupy no register elsewhere.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#ifndef LORA_SIMULATED
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// 2^x to 22 bits; 0 if the result is below the normal numbers.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef LORA_SIMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Rows of DIM elements in chunks of 8 (16 bytes). The position of a chunk in its row depends on the
// row, so that the eight rows that a matrix load reads at once are in different banks.
template <int DIM>
struct Tile {
    static constexpr int CHUNKS = DIM / 8;

    // Address of chunk `fixed` ^ `of_lane`, where `of_lane` is below 8. The part that is known at
    // compile time becomes an immediate offset of the instruction.
    static __device__ __forceinline__ bf16* at(bf16* tile, int row, int fixed, int of_lane) {
        const int turn = DIM % 64 == 0 ? row & 7 : (row >> 1) & 3;
        return tile + row * DIM + 8 * (fixed & ~7) + 8 * ((fixed & 7) ^ of_lane ^ turn);
    }
    static __device__ __forceinline__ const bf16* at(const bf16* tile, int row, int fixed, int of_lane) {
        return at(const_cast<bf16*>(tile), row, fixed, of_lane);
    }

    // Starts filling ROWS rows from `rows` rows of `dim` elements; all other elements become zero.
    // All THREADS threads of the block must call it.
    template <int THREADS, int ROWS>
    static __device__ __forceinline__ void load(bf16* tile, const bf16* from, size_t width, int rows,
                                                int dim) {
        constexpr int LANES = CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32, STEP = THREADS / LANES;
        static_assert(ROWS % STEP == 0);
        const int row = static_cast<int>(threadIdx.x) / LANES, chunk = static_cast<int>(threadIdx.x) % LANES;
        if (CHUNKS < LANES && chunk >= CHUNKS) return;
        from += row * width + 8 * chunk;
        if (8 * chunk >= dim) rows = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP) {
            cp_async_16(at(tile, i + row, chunk & ~7, chunk & 7), from, i + row < rows);
            from += STEP * width;
        }
    }
};

// 16 M rows x 8 N columns of a warp, as mma accumulates them: at[m][n] has, of rows 16 m + lane / 4
// and that + 8, columns 8 n + 2 (lane % 4) and that + 1.
template <int M, int N>
struct Accumulator {
    float at[M][N][4];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) at[m][n][i] = 0.0f;
            }
        }
    }
};

// 16 M x 16 K elements of a warp as the left operand of a product.
template <int M, int K>
struct Fragments {
    unsigned at[M][K][4];

    // Loads the rows of a tile from `row` on.
    template <int DIM>
    __device__ __forceinline__ void load(const bf16* tile, int row) {
        static_assert(DIM == 16 * K);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int k = 0; k < K; k++)
                ldmatrix_x4(at[m][k],
                            Tile<DIM>::at(tile, row + 16 * m + lane_id() % 16, 2 * k, lane_id() / 16));
        }
    }
    // Rounds accumulators to bf16.
    __device__ __forceinline__ void round(const Accumulator<M, 2 * K>& x) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    at[m][k][i] =
                        pack_bf16(x.at[m][2 * k + i / 2][i % 2 * 2], x.at[m][2 * k + i / 2][i % 2 * 2 + 1]);
                }
            }
        }
    }
};

template <int M, int N>
__device__ __forceinline__ void multiply_pair(Accumulator<M, N>& sum, int n, const unsigned (&a)[4], int m,
                                              const unsigned (&b)[4]) {
    const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    mma_m16n8k16_bf16(sum.at[m][n], a, low);
    mma_m16n8k16_bf16(sum.at[m][n + 1], a, high);
}

// sum += a b^T with the first 8 N rows of the tile `b`; `a` is in registers.
template <int DIM, int M, int N>
__device__ __forceinline__ void multiply_transposed(Accumulator<M, N>& sum, const Fragments<M, DIM / 16>& a,
                                                    const bf16* b) {
    const unsigned lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned of_b[4];
            ldmatrix_x4(of_b, Tile<DIM>::at(b, 8 * n + lane / 16 * 8 + lane % 8, 2 * k, lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(sum, n, a.at[m][k], m, of_b);
        }
    }
}

// Does the same with the rows of the tile `a` from `row` on.
template <int DIM, int M, int N>
__device__ __forceinline__ void multiply_transposed(Accumulator<M, N>& sum, const bf16* a, int row,
                                                    const bf16* b) {
    const unsigned lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        unsigned of_a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            ldmatrix_x4(of_a[m], Tile<DIM>::at(a, row + 16 * m + lane % 16, 2 * k, lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned of_b[4];
            ldmatrix_x4(of_b, Tile<DIM>::at(b, 8 * n + lane / 16 * 8 + lane % 8, 2 * k, lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(sum, n, of_a[m], m, of_b);
        }
    }
}

// sum += a b with the first 16 K rows of the tile `b`.
template <int DIM, int M, int K>
__device__ __forceinline__ void multiply(Accumulator<M, DIM / 8>& sum, const Fragments<M, K>& a,
                                         const bf16* b) {
    const unsigned lane = opaque(threadIdx.x % 32);
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int n = 0; n < DIM / 8; n += 2) {
            unsigned of_b[4];
            ldmatrix_x4_trans(of_b, Tile<DIM>::at(b, 16 * k + lane % 16, n, lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(sum, n, a.at[m][k], m, of_b);
        }
    }
}

// Writes 16 M rows, with row 16 m + lane / 4 + 8 h multiplied by factor[m][h], through the rows of
// a tile from `row` on, which no other warp uses. Only `rows` rows exist, with `dim` elements each.
template <int DIM, int M>
__device__ __forceinline__ void store(const Accumulator<M, DIM / 8>& x, const float (&factor)[M][2],
                                      bf16* tile, int row, bf16* to, size_t width, int rows, int dim) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                bf16* const pair =
                    Tile<DIM>::at(tile, row + 16 * m + 8 * h + lane_id() / 4, n, 0) + lane_id() % 4 * 2;
                *reinterpret_cast<unsigned*>(pair) =
                    pack_bf16(x.at[m][n][2 * h] * factor[m][h], x.at[m][n][2 * h + 1] * factor[m][h]);
            }
        }
    }
    __syncwarp();
    for (int i = lane_id(); i < 16 * M * Tile<DIM>::CHUNKS; i += 32) {
        const int of = i / Tile<DIM>::CHUNKS, chunk = i % Tile<DIM>::CHUNKS;
        if (of < rows && 8 * chunk < dim) {
            *reinterpret_cast<uint4*>(to + of * width + 8 * chunk) =
                *reinterpret_cast<const uint4*>(Tile<DIM>::at(tile, row + of, chunk & ~7, chunk & 7));
        }
    }
}

// Writes the same rows in f32, directly from the registers: four lanes write 32 consecutive bytes.
// `dim` is a multiple of 8.
template <int DIM, int M>
__device__ __forceinline__ void store_f32(const Accumulator<M, DIM / 8>& x, const float (&factor)[M][2],
                                          float* to, size_t width, int rows, int dim) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = 16 * m + 8 * h + lane_id() / 4;
            if (row >= rows) continue;
            float* const of_row = to + row * width + lane_id() % 4 * 2;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                const float* const pair = x.at[m][n] + 2 * h;
                if (8 * n >= dim) continue;
                *reinterpret_cast<float2*>(of_row + 8 * n) =
                    make_float2(pair[0] * factor[m][h], pair[1] * factor[m][h]);
            }
        }
    }
}
