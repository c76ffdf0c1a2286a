// Random tensors with the bits of the CPU version. The counter of the generator is (number of the
// draw, `stream`).
#include "flat.cuh"
#include "philox.cuh"

__device__ __forceinline__ uint4 counter(size_t block, unsigned stream) {
    return make_uint4(static_cast<unsigned>(block), static_cast<unsigned>(block >> 32), stream, 0);
}

// A number in [center - bound, center + bound). No operations are fused, as on the CPU.
__device__ __forceinline__ float uniform_value(unsigned word, float center, float bound) {
    const float in_one = __fsub_rn(__fmul_rn(2.0f, unit(word)), 1.0f);
    return __fadd_rn(center, __fmul_rn(in_one, bound));
}

// One word per element, four words per draw.
template <typename T>
__device__ __forceinline__ void uniform(T* out, size_t n, Key key, unsigned stream, float center,
                                        float bound) {
    flat(
        n, aligned4(out),
        [=](size_t i) {
            const uint4 words = philox(key, counter(i / 4, stream));
            store4(out + i,
                   make_float4(uniform_value(words.x, center, bound), uniform_value(words.y, center, bound),
                               uniform_value(words.z, center, bound), uniform_value(words.w, center, bound)));
        },
        [=](size_t i) {
            const uint4 drawn = philox(key, counter(i / 4, stream));
            const unsigned words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
            out[i] = from_f32<T>(uniform_value(words[i % 4], center, bound));
        });
}

KERNEL(256, random_uniform_f32, float* out, size_t n, unsigned key_low, unsigned key_high, unsigned stream,
       float center, float bound) {
    uniform(out, n, Key{key_low, key_high}, stream, center, bound);
}
KERNEL(256, random_uniform_bf16, bf16* out, size_t n, unsigned key_low, unsigned key_high, unsigned stream,
       float center, float bound) {
    uniform(out, n, Key{key_low, key_high}, stream, center, bound);
}

// 16 bytes per draw, the lowest byte of a word first. A thread writes one draw.
KERNEL(256, random_bytes_u8, unsigned char* out, size_t n, unsigned key_low, unsigned key_high,
       unsigned stream) {
    const size_t block = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x, first = 16 * block;
    if (first >= n) return;
    const uint4 drawn = philox(Key{key_low, key_high}, counter(block, stream));
    if (first + 16 <= n && reinterpret_cast<size_t>(out) % 16 == 0) {
        *reinterpret_cast<uint4*>(out + first) = drawn;
        return;
    }
    const unsigned words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
    for (unsigned i = 0; i < 16 && first + i < n; i++)
        out[first + i] = static_cast<unsigned char>(words[i / 4] >> 8 * (i % 4));
}
