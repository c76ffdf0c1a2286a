// Attention in bf16 on tensor cores, for heads whose number of features is a multiple of 8. The
// algorithm is FlashAttention-2 (arXiv 2307.08691). See attention.cu for the tensors.
#include "tensor.cuh"

namespace {

// A block computes 16 M queries of a head in each of its WARPS warps, in a loop over tiles of KEYS
// keys and values; the next tiles are loaded meanwhile. Shared memory: one tile of queries, two of
// keys and two of values.
template <int DIM, int WARPS, int M, int KEYS>
__device__ __forceinline__ void forward(const bf16* q, const bf16* k, const bf16* v, const unsigned* first,
                                        bf16* output, float* lse, unsigned seq, unsigned kv_seq,
                                        unsigned heads, unsigned kv_heads, unsigned head_dim, float scale) {
    constexpr int THREADS = 32 * WARPS, QUERIES = 16 * M * WARPS;
    DYNAMIC_SHARED(memory);
    bf16* const q_tile = reinterpret_cast<bf16*>(memory);
    bf16* const k_tile = q_tile + QUERIES * DIM;
    bf16* const v_tile = k_tile + 2 * KEYS * DIM;

    const unsigned tiles = ceil_div(seq, static_cast<unsigned>(QUERIES));
    const Work work(tiles, heads);
    const View view(first, work.sequence, seq, kv_seq);
    const int dim = static_cast<int>(head_dim);
    const int query = static_cast<int>(tiles - 1 - work.tile) * QUERIES;  // longest rows first
    const int rows = min(QUERIES, view.seq - query);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t q_at =
        (static_cast<size_t>(work.sequence) * seq + query) * q_width + static_cast<size_t>(work.head) * dim;
    const size_t k_at = static_cast<size_t>(work.sequence) * kv_seq * k_width +
                        static_cast<size_t>(work.head / (heads / kv_heads)) * dim;
    const int end = view.last_key(query + rows - 1) + 1;
    int key = view.first_key(query);

    Tile<DIM>::template load<THREADS, QUERIES>(q_tile, q + q_at, q_width, rows, dim);
    const auto load_keys = [&](int key, int stage) {
        Tile<DIM>::template load<THREADS, KEYS>(k_tile + stage * KEYS * DIM, k + k_at + key * k_width,
                                                k_width, end - key, dim);
        Tile<DIM>::template load<THREADS, KEYS>(v_tile + stage * KEYS * DIM, v + k_at + key * k_width,
                                                k_width, end - key, dim);
        cp_async_commit();
    };
    load_keys(key, 0);

    // This warp's rows, and the first keys that the first and the last of its rows see.
    const int my_row = 16 * M * warp_id(), my_rows = min(16 * M, rows - my_row);
    const int first_row = query + min(my_row, rows - 1), last_row = query + min(my_row + 16 * M, rows) - 1;
    const int lowest = view.first_key(first_row), low = view.first_key(last_row);
    float top[M][2], total[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            top[m][h] = Max::identity();
            total[m][h] = 0.0f;
        }
    }
    const float scale2 = scale * LOG2_E;  // powers of 2 instead of e
    Accumulator<M, DIM / 8> values;
    values.zero();

    for (int stage = 0; key < end; key += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is loaded, and the previous one is no longer read
        if (key + KEYS < end) load_keys(key + KEYS, stage ^ 1);
        if (my_rows <= 0 || key > view.last_key(last_row) || key + KEYS <= lowest) continue;
        Accumulator<M, KEYS / 8> s;
        s.zero();
        multiply_transposed<DIM>(s, q_tile, my_row, k_tile + stage * KEYS * DIM);
        if (key < low || key + KEYS - 1 > view.last_key(first_row)) {
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = query + min(my_row + 16 * m + 8 * h + lane_id() / 4, rows - 1);
                    const int from = view.first_key(row), to = view.last_key(row);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const int at = key + 8 * n + lane_id() % 4 * 2 + i;
                            if (at < from || at > to) s.at[m][n][2 * h + i] = Max::identity();
                        }
                    }
                }
            }
        }
        float rescale[M][2];
        bool higher = false;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float largest = top[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    largest = fmaxf(largest, fmaxf(s.at[m][n][2 * h], s.at[m][n][2 * h + 1]));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
                // 0 for a row that has not seen a key yet.
                const float base = largest == Max::identity() ? 0.0f : largest * scale2;
                rescale[m][h] = fast_exp2(top[m][h] * scale2 - base);
                higher |= largest > top[m][h];
                top[m][h] = largest;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; i++) {
                        s.at[m][n][i] = fast_exp2(fmaf(s.at[m][n][i], scale2, -base));
                        sum += s.at[m][n][i];
                    }
                }
                total[m][h] = fmaf(total[m][h], rescale[m][h], sum);  // over this thread's columns
            }
        }
        if (__any_sync(0xffffffffu, higher)) {
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) values.at[m][n][i] *= rescale[m][i / 2];
                }
            }
        }
        Fragments<M, KEYS / 16> p;
        p.round(s);
        multiply<DIM>(values, p, v_tile + stage * KEYS * DIM);
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[m][h] += __shfl_xor_sync(0xffffffffu, total[m][h], 1);
            total[m][h] += __shfl_xor_sync(0xffffffffu, total[m][h], 2);
            factor[m][h] = 1.0f / total[m][h];
            const int row = my_row + 16 * m + 8 * h + lane_id() / 4;
            if (lane_id() % 4 == 0 && row < rows) {
                lse[(static_cast<size_t>(work.sequence) * heads + work.head) * seq + query + row] =
                    top[m][h] * scale + logf(total[m][h]);
            }
        }
    }
    store<DIM, M>(values, factor, q_tile, my_row, output + q_at + my_row * q_width, q_width, my_rows, dim);
}

}  // namespace

// A kernel's DIM is at least the number of features of a head. The kernel's name contains its
// template arguments: cuda.rs builds the name from the same values as the grid and the shared
// memory.
#define ATTENTION(DIM, WARPS, M, KEYS, BLOCKS)                                                     \
    KERNEL_RESIDENT(32 * WARPS, BLOCKS,                                                            \
                    attention_forward_mma_##DIM##_##WARPS##_##M##_##KEYS##_bf16, const bf16* q,    \
                    const bf16* k, const bf16* v, const unsigned* first, bf16* output, float* lse, \
                    unsigned seq, unsigned kv_seq, unsigned heads, unsigned kv_heads,              \
                    unsigned head_dim, float scale) {                                              \
        forward<DIM, WARPS, M, KEYS>(q, k, v, first, output, lse, seq, kv_seq, heads, kv_heads,    \
                                     head_dim, scale);                                             \
    }
ATTENTION(64, 4, 2, 64, 2)
ATTENTION(96, 4, 2, 64, 2)
ATTENTION(128, 4, 2, 32, 2)
ATTENTION(256, 4, 1, 32, 1)
