// The loss of rows of logits and its gradient. Rows are gathered for the product that computes the
// logits, and scattered back.
#include "kernel.cuh"

// Logits that a thread loads at a time.
constexpr unsigned UNROLL = 8;

// softcap tanh(logit / softcap), or the logit itself if softcap is 0.
__device__ __forceinline__ float capped(float logit, float softcap) {
    return softcap > 0.0f ? softcap * tanhf(logit / softcap) : logit;
}

// Loads the thread's next logits; the threads of a block read adjacent elements. Past the end of
// the row it loads -infinity, which does not change the result.
__device__ __forceinline__ void load(const float* logits, unsigned first, unsigned vocab, float softcap,
                                     float (&to)[UNROLL]) {
#pragma unroll
    for (unsigned j = 0; j < UNROLL; j++) {
        const unsigned i = first + j * blockDim.x;
        to[j] = i < vocab ? capped(logits[i], softcap) : __uint_as_float(0xff800000u);
    }
}

// A block computes a row: its loss `weight * -log softmax(logits)[token]` and, unless `gradients`
// is null, the gradient of the loss with respect to the logits, which may overwrite the logits.
template <typename T>
__device__ __forceinline__ void row(const float* logits, T* gradients, const unsigned* tokens,
                                    const float* weights, double* losses, unsigned first, unsigned vocab,
                                    float softcap) {
    const size_t start = static_cast<size_t>(blockIdx.x) * vocab;
    logits += start;
    const unsigned token = tokens[first + blockIdx.x];
    const float weight = weights[first + blockIdx.x];
    const float at_token = capped(logits[token], softcap);

    // One pass for maximum and sum: the sum of e^(logit - top) is rescaled when a larger top is
    // found. The first top is the lowest finite number, because subtracting -infinity from
    // -infinity gives NaN. A logit that is NaN makes the sum NaN.
    float top = -3.402823466e38f, total = 0.0f;
    for (unsigned i = threadIdx.x; i < vocab; i += UNROLL * blockDim.x) {
        float l[UNROLL];
        load(logits, i, vocab, softcap, l);
        float most = l[0];
#pragma unroll
        for (unsigned j = 1; j < UNROLL; j++) most = fmaxf(most, l[j]);
        if (most > top) {
            total *= expf(top - most);
            top = most;
        }
        float sum = 0.0f;
#pragma unroll
        for (unsigned j = 0; j < UNROLL; j++) sum += expf(l[j] - top);
        total += sum;
    }
    const float row_top = block_max(top);
    const float row_total = block_sum(total * expf(top - row_top));
    if (threadIdx.x == 0) {
        const double log_p = static_cast<double>(at_token) - static_cast<double>(row_top) -
                             log(static_cast<double>(row_total));
        losses[first + blockIdx.x] = -log_p * static_cast<double>(weight);
    }

    if (gradients == nullptr) return;
    gradients += start;
    const float factor = weight / row_total;
    for (unsigned i = threadIdx.x; i < vocab; i += UNROLL * blockDim.x) {
        float l[UNROLL];
        load(logits, i, vocab, softcap, l);
#pragma unroll
        for (unsigned j = 0; j < UNROLL; j++) {
            const unsigned at = i + j * blockDim.x;
            const float p = expf(l[j] - row_top) * factor;
            const float gradient = at == token ? p - weight : p;
            const float slope = softcap > 0.0f ? 1.0f - l[j] / softcap * (l[j] / softcap) : 1.0f;
            if (at < vocab) gradients[at] = from_f32<T>(gradient * slope);
        }
    }
}

template <typename T>
__device__ __forceinline__ void copy_row(const T* from, T* to, unsigned features) {
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < features; i += blockDim.x) to[i] = from[i];
}

__device__ __forceinline__ size_t offset(unsigned row, unsigned features) {
    return static_cast<size_t>(row) * features;
}

KERNEL(512, cross_entropy_row_f32, const float* logits, float* gradients, const unsigned* tokens,
       const float* weights, double* losses, unsigned first, unsigned vocab, float softcap) {
    row(logits, gradients, tokens, weights, losses, first, vocab, softcap);
}
KERNEL(512, cross_entropy_row_bf16, const float* logits, bf16* gradients, const unsigned* tokens,
       const float* weights, double* losses, unsigned first, unsigned vocab, float softcap) {
    row(logits, gradients, tokens, weights, losses, first, vocab, softcap);
}

// Block i copies row rows[first + i] of `all` to row i of `some`; scatter copies it back.
KERNEL(256, cross_entropy_gather_f32, const float* all, float* some, const unsigned* rows, unsigned first,
       unsigned features) {
    copy_row(all + offset(rows[first + blockIdx.x], features), some + offset(blockIdx.x, features), features);
}
KERNEL(256, cross_entropy_gather_bf16, const bf16* all, bf16* some, const unsigned* rows, unsigned first,
       unsigned features) {
    copy_row(all + offset(rows[first + blockIdx.x], features), some + offset(blockIdx.x, features), features);
}
KERNEL(256, cross_entropy_scatter_f32, float* all, const float* some, const unsigned* rows, unsigned first,
       unsigned features) {
    copy_row(some + offset(blockIdx.x, features), all + offset(rows[first + blockIdx.x], features), features);
}
KERNEL(256, cross_entropy_scatter_bf16, bf16* all, const bf16* some, const unsigned* rows, unsigned first,
       unsigned features) {
    copy_row(some + offset(blockIdx.x, features), all + offset(rows[first + blockIdx.x], features), features);
}
