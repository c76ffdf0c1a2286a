// Weights in 4 and 8 bits, as f32 or bf16: elements `start` to `start + n` of a matrix, row after row.
#include "flat.cuh"

// The scale of each block: f32 [blocks], or with `nested_block` map[code] * absmax[block / nested_block] + offset.
struct Scales {
    const void* scales;
    const float* map;
    const float* absmax;
    float offset;
    unsigned nested_block;

    // Not fused, as on the CPU.
    __device__ __forceinline__ float at(size_t i) const {
        if (nested_block == 0) return static_cast<const float*>(scales)[i];
        const float nested = map[static_cast<const unsigned char*>(scales)[i]];
        return __fadd_rn(__fmul_rn(nested, absmax[i / nested_block]), offset);
    }
};

// Element i is codebook[its four bits] * the scale of its block.
template <typename T>
__device__ __forceinline__ void four_bit(const unsigned char* codes, const float* codebook, Scales scales, unsigned block,
                                         size_t start, T* out, size_t n) {
    const auto value = [=](size_t i, float scale) {
        const unsigned char pair = codes[i / 2];
        return __fmul_rn(codebook[i % 2 == 0 ? pair >> 4 : pair & 15], scale);
    };
    flat(
        n, aligned4(out) && start % 4 == 0,
        [=](size_t i) {
            // Four elements that begin at a multiple of four have one block.
            const size_t at = start + i;
            const float scale = scales.at(at / block);
            store4(out + i, make_float4(value(at, scale), value(at + 1, scale), value(at + 2, scale), value(at + 3, scale)));
        },
        [=](size_t i) { out[i] = from_f32<T>(value(start + i, scales.at((start + i) / block))); });
}

template <typename T>
__device__ __forceinline__ void int8(const signed char* codes, const float* scales, unsigned cols, size_t start, T* out,
                                     size_t n) {
    flat(
        n, false, [](size_t) {},
        [=](size_t i) {
            const float factor = __fmul_rn(scales[(start + i) / cols], 1.0f / 127.0f);
            out[i] = from_f32<T>(__fmul_rn(static_cast<float>(codes[start + i]), factor));
        });
}

KERNEL(256, quant_four_bit_f32, const unsigned char* codes, const float* codebook, const void* scales, const float* map,
       const float* absmax, float offset, unsigned nested_block, unsigned block, size_t start, float* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_block}, block, start, out, n);
}

KERNEL(256, quant_four_bit_bf16, const unsigned char* codes, const float* codebook, const void* scales, const float* map,
       const float* absmax, float offset, unsigned nested_block, unsigned block, size_t start, bf16* out, size_t n) {
    four_bit(codes, codebook, Scales{scales, map, absmax, offset, nested_block}, block, start, out, n);
}

KERNEL(256, quant_int8_f32, const signed char* codes, const float* scales, unsigned cols, size_t start, float* out, size_t n) {
    int8(codes, scales, cols, start, out, n);
}

KERNEL(256, quant_int8_bf16, const signed char* codes, const float* scales, unsigned cols, size_t start, bf16* out, size_t n) {
    int8(codes, scales, cols, start, out, n);
}
