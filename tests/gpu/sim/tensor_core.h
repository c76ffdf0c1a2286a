// The simulated side of `mma.cuh`: tensor-core products with the fragments of the PTX ISA, and
// asynchronous copies.
#pragma once

#include "simulated.h"

namespace sim {

struct Product {
    float* d;
    const unsigned *a, *b;
};

inline float half_of(unsigned pair, unsigned which) {
    return __uint_as_float(which == 0 ? pair << 16 : pair & 0xffff0000u);
}

// Sums in f64 and rounds once. Hardware also adds with more bits than f32, in an unspecified order.
inline void multiply_tiles(void* (&arguments)[WARP]) {
    float a[16][16], b[8][16];  // b in column-major order
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (arguments[lane] == nullptr) fail("mma without lane %u of the warp", lane);
        const auto& of = *static_cast<const Product*>(arguments[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned half = 0; half < 2; half++) {
            for (unsigned r = 0; r < 4; r++)
                a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = half_of(of.a[r], half);
            for (unsigned r = 0; r < 2; r++) b[g][2 * t + r * 8 + half] = half_of(of.b[r], half);
        }
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        float* const d = static_cast<const Product*>(arguments[lane])->d;
        for (unsigned i = 0; i < 4; i++) {
            const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
            double sum = d[i];
            for (unsigned k = 0; k < 16; k++) sum += static_cast<double>(row[k]) * column[k];
            d[i] = static_cast<float>(sum);
        }
    }
}

struct MatrixLoad {
    unsigned* r;
    const void* row;
};

template <bool TRANSPOSED>
void load_matrices(void* (&arguments)[WARP]) {
    unsigned short rows[WARP][8];
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (arguments[lane] == nullptr) fail("ldmatrix without lane %u of the warp", lane);
        memcpy(rows[lane], static_cast<const MatrixLoad*>(arguments[lane])->row, sizeof rows[lane]);
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        unsigned* const r = static_cast<const MatrixLoad*>(arguments[lane])->r;
        for (unsigned m = 0; m < 4; m++) {
            const unsigned first = lane % 4 * 2, other = lane / 4;
            const unsigned low = TRANSPOSED ? rows[m * 8 + first][other] : rows[m * 8 + other][first];
            const unsigned high =
                TRANSPOSED ? rows[m * 8 + first + 1][other] : rows[m * 8 + other][first + 1];
            r[m] = low | high << 16;
        }
    }
}

template <bool TRANSPOSED>
void ldmatrix(unsigned* r, const void* row, const char* name) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail("%s: the row's address is not a multiple of 16", name);
    if (!is_shared(row, 16)) fail("%s: the row is not in shared memory", name);
    MatrixLoad argument{r, row};
    warp_collective(0xffffffffu, load_matrices<TRANSPOSED>, &argument, name);
}

// A copy is done by the wait that covers it. Until then the destination contains NaN.
void start_copy(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(unsigned pending_groups);

}  // namespace sim

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    sim::Product argument{d, a, b};
    sim::warp_collective(0xffffffffu, sim::multiply_tiles, &argument, "mma");
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    sim::ldmatrix<false>(r, shared_row, "ldmatrix");
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    sim::ldmatrix<true>(r, shared_row, "ldmatrix.trans");
}
inline void cp_async_16(void* shared, const void* global, bool valid) {
    sim::start_copy(shared, global, valid);
}
inline void cp_async_commit() { sim::commit_copies(); }
template <int PENDING>
void cp_async_wait() {
    sim::wait_for_copies(PENDING);
}
