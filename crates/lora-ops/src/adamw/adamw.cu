// AdamW over flat vectors. No product is fused with a sum: the same roundings as on a CPU.
#include "flat.cuh"

struct Numbers {
    float factor, rest1, beta2, rest2, correction2, eps, decay, step_size;
};

__device__ __forceinline__ void update(const Numbers& with, float gradient, float& p, float& m, float& v) {
    const float g = __fmul_rn(gradient, with.factor);
    m = __fadd_rn(m, __fmul_rn(with.rest1, __fsub_rn(g, m)));
    v = __fadd_rn(__fmul_rn(v, with.beta2), __fmul_rn(with.rest2, __fmul_rn(g, g)));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), with.correction2), with.eps);
    p = __fsub_rn(__fmul_rn(p, with.decay), __fmul_rn(with.step_size, __fdiv_rn(m, denominator)));
}

KERNEL(256, adamw_step_f32, float* params, float* m, float* v, const float* gradient, size_t n, float factor, float rest1, float beta2,
       float rest2, float correction2, float eps, float decay, float step_size) {
    const Numbers with = {factor, rest1, beta2, rest2, correction2, eps, decay, step_size};
    flat(
        n, aligned4(params) && aligned4(m) && aligned4(v) && aligned4(gradient),
        [=](size_t i) {
            const float4 g = load4(gradient + i);
            float4 p = load4(params + i), first = load4(m + i), second = load4(v + i);
            update(with, g.x, p.x, first.x, second.x);
            update(with, g.y, p.y, first.y, second.y);
            update(with, g.z, p.z, first.z, second.z);
            update(with, g.w, p.w, first.w, second.w);
            store4(params + i, p);
            store4(m + i, first);
            store4(v + i, second);
        },
        [=](size_t i) { update(with, gradient[i], params[i], m[i], v[i]); });
}
