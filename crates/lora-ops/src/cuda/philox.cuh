// The counter-based random number generator of the host, with the same bits.
#pragma once

#include "kernel.cuh"

struct Key {
    unsigned low, high;
};

// Philox4x32-10; see `lora_spec::Philox`.
__device__ __forceinline__ uint4 philox(Key key, uint4 counter) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = counter.x * 0xD2511F53ull, p1 = counter.z * 0xCD9E8D57ull;
        counter =
            make_uint4(static_cast<unsigned>(p1 >> 32) ^ counter.y ^ key.low, static_cast<unsigned>(p1),
                       static_cast<unsigned>(p0 >> 32) ^ counter.w ^ key.high, static_cast<unsigned>(p0));
        key.low += 0x9E3779B9u;
        key.high += 0xBB67AE85u;
    }
    return counter;
}

// A number in [0, 1) on a grid of 2^-24.
__device__ __forceinline__ float unit(unsigned word) {
    return static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
}
