// c = alpha op(a) op(b) + beta c on column-major matrices in host memory, for cublas.cpp. Every
// output is a sum in f32 over blocks of k in order. The order does not depend on m and n, so the
// same inputs give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace gemm {

enum class Type { f32, bf16 };

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

inline float load(const void* base, size_t index, Type type) {
    if (type == Type::f32) return static_cast<const float*>(base)[index];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(void* base, size_t index, Type type, float value) {
    if (type == Type::f32) {
        static_cast<float*>(base)[index] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const bool nan = value != value;
    static_cast<uint16_t*>(base)[index] =
        nan ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Operand {
    const void* base;
    size_t leading;
    bool transposed;
    Type type;

    size_t index(size_t row, size_t column) const {
        return transposed ? column + row * leading : row + column * leading;
    }
};

constexpr size_t ROWS = 16, COLUMNS = 6;  // size of a tile in registers
constexpr size_t PANEL = 16 * COLUMNS;    // number of columns that are packed at once
// Number of elements of k with a partial sum of their own, so that a long sum keeps its precision,
// as on a GPU.
constexpr size_t BLOCK = 256;

using Vector = float __attribute__((vector_size(32), aligned(4)));
constexpr size_t LANES = sizeof(Vector) / sizeof(float);

#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
inline void multiply_tile(float (&tile)[COLUMNS][ROWS], const float* a, const float* b, size_t k) {
    Vector total[COLUMNS][ROWS / LANES] = {};
    for (size_t block = 0; block < k; block += BLOCK) {
        Vector sums[COLUMNS][ROWS / LANES] = {};
        for (size_t l = block; l < std::min(k, block + BLOCK); l++, a += ROWS, b += COLUMNS) {
#pragma GCC unroll 6
            for (size_t j = 0; j < COLUMNS; j++) {
#pragma GCC unroll 2
                for (size_t i = 0; i < ROWS / LANES; i++)
                    sums[j][i] += reinterpret_cast<const Vector*>(a)[i] * b[j];
            }
        }
        for (size_t j = 0; j < COLUMNS; j++) {
            for (size_t i = 0; i < ROWS / LANES; i++) total[j][i] += sums[j][i];
        }
    }
    memcpy(tile, total, sizeof total);
}

inline void multiply(size_t m, size_t n, size_t k, float alpha, const Operand& a, const Operand& b,
                     float beta, void* c, size_t ldc, Type type) {
    std::vector<float> packed_a(ROWS * k), packed_b(PANEL * k);
    for (size_t column = 0; column < n; column += PANEL) {
        const size_t columns = std::min(PANEL, n - column);
        std::fill(packed_b.begin(), packed_b.end(), 0.0f);
        for (size_t j = 0; j < columns; j++) {
            float* const to = packed_b.data() + j / COLUMNS * COLUMNS * k + j % COLUMNS;
            for (size_t l = 0; l < k; l++) to[l * COLUMNS] = load(b.base, b.index(l, column + j), b.type);
        }
        for (size_t row = 0; row < m; row += ROWS) {
            const size_t rows = std::min(ROWS, m - row);
            if (rows < ROWS) std::fill(packed_a.begin(), packed_a.end(), 0.0f);
            // Both loops read `a` in memory order.
            if (a.transposed) {
                for (size_t i = 0; i < rows; i++) {
                    for (size_t l = 0; l < k; l++)
                        packed_a[l * ROWS + i] = load(a.base, a.index(row + i, l), a.type);
                }
            } else {
                for (size_t l = 0; l < k; l++) {
                    for (size_t i = 0; i < rows; i++)
                        packed_a[l * ROWS + i] = load(a.base, a.index(row + i, l), a.type);
                }
            }
            for (size_t j = 0; j < columns; j += COLUMNS) {
                float tile[COLUMNS][ROWS];
                multiply_tile(tile, packed_a.data(), packed_b.data() + j * k, k);
                for (size_t s = 0; s < std::min(COLUMNS, columns - j); s++) {
                    for (size_t i = 0; i < rows; i++) {
                        const size_t at = row + i + (column + j + s) * ldc;
                        // With beta = 0, c is not read, because it may be uninitialized.
                        const float old = beta == 0.0f ? 0.0f : beta * load(c, at, type);
                        store(c, at, type, alpha * tile[s][i] + old);
                    }
                }
            }
        }
    }
}

}  // namespace gemm
