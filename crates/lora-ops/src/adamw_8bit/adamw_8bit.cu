// AdamW with moments in 8 bits: one thread block for each block of moments. No product is fused
// with a sum, so roundings and bits are those of the CPU.
#include "kernel.cuh"

struct Coefficients {
    float factor, beta1, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, eps, decay,
        step_size;
};

// `values` has the number of each code, `bounds` the largest number whose nearest code is not above
// that code.
struct QuantMap {
    const float* values;
    const float* bounds;

    // The code of the number nearest to x.
    __device__ __forceinline__ unsigned char code(float x) const {
        unsigned first = 0;
        for (unsigned step = 128; step > 0; step /= 2) {
            if (bounds[first + step - 1] < x) first += step;
        }
        return static_cast<unsigned char>(first);
    }
};

// Writes the block's maximum and this thread's code. Every thread of the block must call it.
__device__ __forceinline__ void quantize(QuantMap map, float x, bool valid, unsigned char* code,
                                         float* absmax) {
    const float largest = block_max(valid ? fabsf(x) : 0.0f);
    if (threadIdx.x == 0) *absmax = largest;
    if (valid) *code = largest == 0.0f ? 0 : map.code(__fdiv_rn(x, largest));
}

// blocks: for each block its first parameter, its first code (within the codes of this launch) and
// its number of elements. maps: values and bounds of the first moment's map, then of the second
// moment's, 256 each.
KERNEL(256, adamw_8bit_step_f32, float* params, const float* gradient, unsigned char* m_codes,
       float* m_absmax, unsigned char* v_codes, float* v_absmax, const unsigned* blocks, const float* maps,
       float factor, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
       float sqrt_bias_correction2, float eps, float decay, float step_size) {
    const Coefficients coefficients = {
        factor, beta1, one_minus_beta1, beta2, one_minus_beta2, sqrt_bias_correction2, eps, decay, step_size};
    const QuantMap first_map = {maps, maps + 256}, second_map = {maps + 512, maps + 768};
    const unsigned block = blockIdx.x;
    const unsigned* of_block = blocks + 3 * static_cast<size_t>(block);
    const bool valid = threadIdx.x < of_block[2];
    const size_t param = static_cast<size_t>(of_block[0]) + threadIdx.x,
                 code = static_cast<size_t>(of_block[1]) + threadIdx.x;
    float m = 0.0f, v = 0.0f;
    if (valid) {
        const float g = __fmul_rn(gradient[param], coefficients.factor);
        m = __fmul_rn(first_map.values[m_codes[code]], m_absmax[block]);
        v = __fmul_rn(second_map.values[v_codes[code]], v_absmax[block]);
        m = __fadd_rn(__fmul_rn(m, coefficients.beta1), __fmul_rn(coefficients.one_minus_beta1, g));
        v = __fadd_rn(__fmul_rn(v, coefficients.beta2),
                      __fmul_rn(__fmul_rn(coefficients.one_minus_beta2, g), g));
        const float denominator =
            __fadd_rn(__fdiv_rn(__fsqrt_rn(v), coefficients.sqrt_bias_correction2), coefficients.eps);
        const float step = __fmul_rn(coefficients.step_size, __fdiv_rn(m, denominator));
        params[param] = __fsub_rn(__fmul_rn(params[param], coefficients.decay), step);
    }
    // All threads have read the maxima before they change: the reductions wait for every thread.
    quantize(first_map, m, valid, m_codes + code, m_absmax + block);
    quantize(second_map, v, valid, v_codes + code, v_absmax + block);
}
