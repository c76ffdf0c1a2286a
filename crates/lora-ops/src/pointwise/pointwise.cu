// Sums of two vectors, multiples of a vector, and copies into another type.
#include "flat.cuh"

template <typename T>
__device__ __forceinline__ void add(T* a, const T* b, size_t n) {
    flat(
        n, aligned4(a) && aligned4(b),
        [=](size_t i) {
            const float4 x = load4(a + i), y = load4(b + i);
            store4(a + i, make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w));
        },
        [=](size_t i) { a[i] = from_f32<T>(to_f32(a[i]) + to_f32(b[i])); });
}

template <typename T>
__device__ __forceinline__ void scale(const T* x, T* y, float factor, size_t n) {
    flat(
        n, aligned4(x) && aligned4(y),
        [=](size_t i) {
            const float4 v = load4(x + i);
            store4(y + i, make_float4(factor * v.x, factor * v.y, factor * v.z, factor * v.w));
        },
        [=](size_t i) { y[i] = from_f32<T>(factor * to_f32(x[i])); });
}

template <typename T>
__device__ __forceinline__ void round_into(const float* from, T* to, size_t n) {
    flat(
        n, aligned4(from) && aligned4(to), [=](size_t i) { store4(to + i, load4(from + i)); },
        [=](size_t i) { to[i] = from_f32<T>(from[i]); });
}

// y = cap tanh(x / cap).
KERNEL(256, pointwise_softcap_f32, const float* x, float* y, float cap, size_t n) {
    const auto one = [=](float v) { return cap * tanhf(v / cap); };
    flat(
        n, aligned4(x) && aligned4(y),
        [=](size_t i) {
            const float4 v = load4(x + i);
            store4(y + i, make_float4(one(v.x), one(v.y), one(v.z), one(v.w)));
        },
        [=](size_t i) { y[i] = one(x[i]); });
}
KERNEL(256, pointwise_add_f32, float* a, const float* b, size_t n) { add(a, b, n); }
KERNEL(256, pointwise_add_bf16, bf16* a, const bf16* b, size_t n) { add(a, b, n); }
KERNEL(256, pointwise_scale_f32, const float* x, float* y, float factor, size_t n) { scale(x, y, factor, n); }
KERNEL(256, pointwise_scale_bf16, const bf16* x, bf16* y, float factor, size_t n) { scale(x, y, factor, n); }
KERNEL(256, pointwise_round_f32, const float* from, float* to, size_t n) { round_into(from, to, n); }
KERNEL(256, pointwise_round_bf16, const float* from, bf16* to, size_t n) { round_into(from, to, n); }
