// AdamW over flat vectors. No product is fused with a sum, so the roundings are those of the CPU.
#include "flat.cuh"

struct Coefficients {
    float factor, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, eps, decay, step_size;
};

__device__ __forceinline__ void update(const Coefficients& coefficients, float gradient, float& p, float& m,
                                       float& v) {
    const float g = __fmul_rn(gradient, coefficients.factor);
    m = __fadd_rn(m, __fmul_rn(coefficients.one_minus_beta1, __fsub_rn(g, m)));
    v = __fadd_rn(__fmul_rn(v, coefficients.beta2), __fmul_rn(coefficients.one_minus_beta2, __fmul_rn(g, g)));
    const float denominator =
        __fadd_rn(__fdiv_rn(__fsqrt_rn(v), coefficients.sqrt_bias_correction2), coefficients.eps);
    p = __fsub_rn(__fmul_rn(p, coefficients.decay),
                  __fmul_rn(coefficients.step_size, __fdiv_rn(m, denominator)));
}

KERNEL(256, adamw_step_f32, float* params, float* m, float* v, const float* gradient, size_t n, float factor,
       float one_minus_beta1, float beta2, float one_minus_beta2, float sqrt_bias_correction2, float eps,
       float decay, float step_size) {
    const Coefficients coefficients = {
        factor, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, eps, decay, step_size};
    flat(
        n, aligned4(params) && aligned4(m) && aligned4(v) && aligned4(gradient),
        [=](size_t i) {
            const float4 g = load4(gradient + i);
            float4 p = load4(params + i), first = load4(m + i), second = load4(v + i);
            update(coefficients, g.x, p.x, first.x, second.x);
            update(coefficients, g.y, p.y, first.y, second.y);
            update(coefficients, g.z, p.z, first.z, second.z);
            update(coefficients, g.w, p.w, first.w, second.w);
            store4(params + i, p);
            store4(m + i, first);
            store4(v + i, second);
        },
        [=](size_t i) { update(coefficients, gradient[i], params[i], m[i], v[i]); });
}
