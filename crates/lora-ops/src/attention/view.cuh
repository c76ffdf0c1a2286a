// The part of the work that each block computes, and the keys that each query sees.
#pragma once

#include "kernel.cuh"

// A KERNEL with a limited number of registers, so that `blocks` of its blocks fit on a
// multiprocessor.
#ifdef LORA_SIMULATED
#define KERNEL_RESIDENT(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)
#else
#define KERNEL_RESIDENT(threads, blocks, name, ...) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#endif

constexpr float LOG2_E = 1.44269504f;

// One sequence: query `i` sees the keys first_key(i) ..= last_key(i); neither end decreases with i.
struct View {
    const unsigned* first;  // null: 0 for all
    int seq, kv_seq;

    __device__ __forceinline__ View(const unsigned* of_all, unsigned sequence, unsigned seq, unsigned kv_seq)
        : first(of_all == nullptr ? nullptr : of_all + static_cast<size_t>(sequence) * seq),
          seq(static_cast<int>(seq)),
          kv_seq(static_cast<int>(kv_seq)) {}

    __device__ __forceinline__ int first_key(int query) const {
        return first == nullptr ? 0 : static_cast<int>(first[query]);
    }
    __device__ __forceinline__ int last_key(int query) const { return kv_seq - seq + query; }

    // The queries that see `key` are those from `first_query(key)` to before `end_query(key)`.
    __device__ __forceinline__ int first_query(int key) const {
        return key > kv_seq - seq ? key - (kv_seq - seq) : 0;
    }
    __device__ __forceinline__ int end_query(int key) const {
        if (first == nullptr) return seq;
        int low = 0, high = seq;
        while (low < high) {
            const int middle = low + (high - low) / 2;
            if (static_cast<int>(first[middle]) <= key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// The tile, head and sequence of a block, in a grid of tiles x sequences x heads. Blocks start in
// the order of their numbers. Tiles vary slowest: a kernel numbers the tiles with the most work
// first, so the longest blocks of all heads and sequences start first and the short ones fill the
// end. Heads vary fastest: query heads that share keys and values run at the same time.
struct Work {
    unsigned tile, head, sequence;

    __device__ __forceinline__ Work(unsigned tiles, unsigned heads) {
        const unsigned blocks_per_tile = gridDim.x / tiles, of_tile = blockIdx.x % blocks_per_tile;
        tile = blockIdx.x / blocks_per_tile;
        head = of_tile % heads;
        sequence = of_tile / heads;
    }
};
