// Dropout with the mask of the CPU version, bit for bit. Block x is a token, y a part of its row; a
// thread computes one run.
#include "philox.cuh"
#include "rows.cuh"

template <typename T, bool WIDE>
__device__ __forceinline__ void drop_run(T* y, const T* x, unsigned count, Key key, uint4 counter,
                                         float probability, float keep) {
    constexpr unsigned N = RUN<T>;
    Run<N> run = load_run<WIDE, N>(x, count);
#pragma unroll
    for (unsigned k = 0; k < N; k += 4, counter.w++) {
        const uint4 drawn = philox(key, counter);
        const unsigned words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            run.at[k + i] = unit(words[i]) < probability ? 0.0f : run.at[k + i] * keep;
    }
    store_run<WIDE>(y, run, count);
}

// `tokens` has dataset row and position of each token. The counter of the generator is (step, row,
// position, feature / 4).
template <typename T>
__device__ __forceinline__ void drop(T* y, const T* x, const unsigned* tokens, unsigned features, Key key,
                                     unsigned step, float probability, float keep) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (at >= features) return;
    const size_t token = blockIdx.x, from = token * features + at;
    const uint4 counter =
        make_uint4(step, tokens[2 * token], tokens[2 * token + 1], static_cast<unsigned>(at / 4));
    const unsigned count = features - static_cast<unsigned>(at);
    if (features % N == 0 && aligned(y, x)) {
        drop_run<T, true>(y + from, x + from, count, key, counter, probability, keep);
    } else {
        drop_run<T, false>(y + from, x + from, count, key, counter, probability, keep);
    }
}

KERNEL(256, dropout_apply_f32, float* y, const float* x, const unsigned* tokens, unsigned features,
       unsigned key_low, unsigned key_high, unsigned step, float probability, float keep) {
    drop(y, x, tokens, features, Key{key_low, key_high}, step, probability, keep);
}
KERNEL(256, dropout_apply_bf16, bf16* y, const bf16* x, const unsigned* tokens, unsigned features,
       unsigned key_low, unsigned key_high, unsigned step, float probability, float keep) {
    drop(y, x, tokens, features, Key{key_low, key_high}, step, probability, keep);
}
