// The gradients of attention in bf16 on tensor cores, for heads whose number of features is a
// multiple of 8. The algorithm is FlashAttention-2 (arXiv 2307.08691), except for its sums: each
// block owns the elements that it writes, so no sum is atomic. See attention.cu for the tensors.
#include "tensor.cuh"

namespace {

// Heads for which the registers can hold neither the gradients of keys and of values together, nor
// the queries together with their gradients. cuda.rs has the same condition.
template <int DIM>
constexpr bool WIDE = DIM > 128;

// Writes a warp's rows of a gradient of keys or values, times `factor`, to `to` from element `at`
// on: bf16 through the rows of `tile` from `row` on, or, if `partial`, f32.
template <int DIM, int M>
__device__ __forceinline__ void store_gradient(const Accumulator<M, DIM / 8>& x, float factor, bool partial,
                                               bf16* tile, int row, void* to, size_t at, size_t width,
                                               int rows, int dim) {
    float factors[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = factor;
    if (partial) {
        store_f32<DIM, M>(x, factors, static_cast<float*>(to) + at, width, rows, dim);
    } else {
        store<DIM, M>(x, factors, tile, row, static_cast<bf16*>(to) + at, width, rows, dim);
    }
}

// The gradients of keys and values through one query head: a block computes 16 M keys in each of
// its WARPS warps, in a loop over tiles of QUERIES queries that see these keys; the next tiles are
// loaded meanwhile. Scores are transposed here: a row is a key. Shared memory: one tile of keys and
// one of values, and two tiles of queries, of output gradients and of `rows`. dk and dv:
// [batch * seq, heads * dim], bf16 if heads == kv_heads. Otherwise they are the f32 partial
// gradients of each query head, which sum_groups adds.
template <int DIM, int WARPS, int M, int QUERIES, bool D_KEYS, bool D_VALUES>
__device__ __forceinline__ void gradients_of_keys(const bf16* q, const bf16* k, const bf16* v,
                                                  const bf16* d_output, const unsigned* first,
                                                  const float4* rows, void* dk, void* dv, unsigned seq,
                                                  unsigned heads, unsigned kv_heads, unsigned head_dim,
                                                  float scale) {
    constexpr int THREADS = 32 * WARPS, KEYS = 16 * M * WARPS;
    DYNAMIC_SHARED(memory);
    float4* const row_tile = reinterpret_cast<float4*>(memory);
    bf16* const k_tile = reinterpret_cast<bf16*>(row_tile + 2 * QUERIES);
    bf16 *const v_tile = k_tile + KEYS * DIM, *const q_tile = v_tile + KEYS * DIM;
    bf16* const d_tile = q_tile + 2 * QUERIES * DIM;

    const unsigned tiles = ceil_div(seq, static_cast<unsigned>(KEYS));
    const Work work(tiles, heads);  // the first keys are seen by the most queries
    const View view(first, work.sequence, seq, seq);
    const int dim = static_cast<int>(head_dim);
    const int key = static_cast<int>(work.tile) * KEYS, keys = min(KEYS, view.seq - key);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t k_at = (static_cast<size_t>(work.sequence) * seq + key) * k_width +
                        static_cast<size_t>(work.head / (heads / kv_heads)) * dim;
    const int end = view.end_query(key + keys - 1);
    int query = view.first_query(key);

    const size_t rows_at = (static_cast<size_t>(work.sequence) * heads + work.head) * seq;
    const size_t q_at =
        static_cast<size_t>(work.sequence) * seq * q_width + static_cast<size_t>(work.head) * dim;
    const auto load_queries = [&](int query, int stage) {
        const size_t at = q_at + query * q_width;
        const int queries = end - query;
        Tile<DIM>::template load<THREADS, QUERIES>(q_tile + stage * QUERIES * DIM, q + at, q_width, queries,
                                                   dim);
        Tile<DIM>::template load<THREADS, QUERIES>(d_tile + stage * QUERIES * DIM, d_output + at, q_width,
                                                   queries, dim);
        const int row = static_cast<int>(threadIdx.x);
        const float4* const from = rows + rows_at + query;
        if (row < QUERIES) cp_async_16(row_tile + stage * QUERIES + row, from + row, row < queries);
        cp_async_commit();
    };
    Tile<DIM>::template load<THREADS, KEYS>(k_tile, k + k_at, k_width, keys, dim);
    Tile<DIM>::template load<THREADS, KEYS>(v_tile, v + k_at, k_width, keys, dim);
    load_queries(query, 0);

    const int my_row = 16 * M * warp_id(), my_key = key + my_row, my_keys = min(16 * M, keys - my_row);
    const float scale2 = scale * LOG2_E;  // powers of 2 instead of e
    Accumulator<M, DIM / 8> d_keys, d_values;
    d_keys.zero();
    d_values.zero();

    for (int stage = 0; query < end; query += QUERIES, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is loaded, and the previous one is no longer read
        if (query + QUERIES < end) load_queries(query + QUERIES, stage ^ 1);

        const float4* const of_row = row_tile + stage * QUERIES;
        const int queries = min(QUERIES, end - query);
        const int low = __float_as_int(of_row[0].z), high = __float_as_int(of_row[queries - 1].z);
        if (my_keys <= 0 || my_key > view.last_key(query + queries - 1) || my_key + 16 * M <= low) continue;
        Accumulator<M, QUERIES / 8> p, ds;
        p.zero();
        multiply_transposed<DIM>(p, k_tile, my_row, q_tile + stage * QUERIES * DIM);
        if (my_key < high || my_key + 16 * M - 1 > view.last_key(query)) {
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int column = 8 * n + lane_id() % 4 * 2 + i;
                    const int from = __float_as_int(of_row[column].z), to = view.last_key(query + column);
#pragma unroll
                    for (int m = 0; m < M; m++) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const int at = my_key + 16 * m + 8 * h + lane_id() / 4;
                            if (at < from || at > to) p.at[m][n][2 * h + i] = Max::identity();
                        }
                    }
                }
            }
        }
        if (D_KEYS) {
            ds.zero();
            multiply_transposed<DIM>(ds, v_tile, my_row, d_tile + stage * QUERIES * DIM);
        }
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float4 row = of_row[8 * n + lane_id() % 4 * 2 + i];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float &of_p = p.at[m][n][2 * h + i], &of_ds = ds.at[m][n][2 * h + i];
                        of_p = fast_exp2(fmaf(of_p, scale2, -row.x));
                        if (D_KEYS) of_ds = of_p * (of_ds - row.y);
                    }
                }
            }
        }
        Fragments<M, QUERIES / 16> rounded;
        if (D_VALUES) {
            rounded.round(p);
            multiply<DIM>(d_values, rounded, d_tile + stage * QUERIES * DIM);
        }
        if (D_KEYS) {
            rounded.round(ds);
            multiply<DIM>(d_keys, rounded, q_tile + stage * QUERIES * DIM);
        }
    }
    const Work output(opaque(tiles), heads);  // recomputed: no register holds the offset during the loop
    const size_t to = (static_cast<size_t>(output.sequence) * seq + output.tile * KEYS + my_row) * q_width +
                      static_cast<size_t>(output.head) * dim;
    const bool partial = heads != kv_heads;
    if (D_KEYS) {
        store_gradient<DIM, M>(d_keys, scale, partial, k_tile, my_row, dk, to, q_width, my_keys, dim);
    }
    if (D_VALUES) {
        store_gradient<DIM, M>(d_values, 1.0f, partial, v_tile, my_row, dv, to, q_width, my_keys, dim);
    }
}

// WIDE: blocks with y 0 compute the gradients of keys, blocks with y 1 those of values.
template <int DIM, int WARPS, int M, int QUERIES>
__device__ __forceinline__ void backward_keys(const bf16* q, const bf16* k, const bf16* v,
                                              const bf16* d_output, const unsigned* first,
                                              const float4* rows, void* dk, void* dv, unsigned seq,
                                              unsigned heads, unsigned kv_heads, unsigned head_dim,
                                              float scale) {
    if constexpr (!WIDE<DIM>) {
        gradients_of_keys<DIM, WARPS, M, QUERIES, true, true>(q, k, v, d_output, first, rows, dk, dv, seq,
                                                              heads, kv_heads, head_dim, scale);
    } else if (blockIdx.y == 0) {
        gradients_of_keys<DIM, WARPS, M, QUERIES, true, false>(q, k, v, d_output, first, rows, dk, dv, seq,
                                                               heads, kv_heads, head_dim, scale);
    } else {
        gradients_of_keys<DIM, WARPS, M, QUERIES, false, true>(q, k, v, d_output, first, rows, dk, dv, seq,
                                                               heads, kv_heads, head_dim, scale);
    }
}

// Each row of `sum` is the sum of `group` rows of `partial`, added in order. A thread sums four
// columns.
__device__ __forceinline__ void sum_groups(const float* partial, bf16* sum, unsigned rows, unsigned group,
                                           unsigned head_dim) {
    const unsigned threads_per_row = head_dim / 4, rows_per_block = blockDim.x / threads_per_row;
    const unsigned of_block = threadIdx.x / threads_per_row, column = threadIdx.x % threads_per_row * 4;
    const size_t row = static_cast<size_t>(blockIdx.x) * rows_per_block + of_block;
    if (of_block >= rows_per_block || row >= rows) return;
    const float* const from = partial + row * group * head_dim + column;
    float4 total = load4(from);
#pragma unroll 4
    for (unsigned head = 1; head < group; head++) {
        const float4 x = load4(from + head * head_dim);
        total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    }
    store4(sum + row * head_dim + column, total);
}

// The gradients of queries: a block computes 16 M queries of a head in each of its WARPS warps, in
// a loop over tiles of KEYS keys and values; the next tiles are loaded meanwhile. Shared memory:
// one tile of queries and one of output gradients, two of keys and two of values. HELD: queries and
// output gradients are kept in registers, and the tiles of keys and values reuse their shared
// memory.
template <int DIM, int WARPS, int M, int KEYS, bool HELD = !WIDE<DIM>>
__device__ __forceinline__ void backward_queries(const bf16* q, const bf16* k, const bf16* v,
                                                 const bf16* d_output, const unsigned* first,
                                                 const float4* rows, bf16* dq, unsigned seq, unsigned heads,
                                                 unsigned kv_heads, unsigned head_dim, float scale) {
    constexpr int THREADS = 32 * WARPS, QUERIES = 16 * M * WARPS;
    DYNAMIC_SHARED(memory);
    bf16* const q_tile = reinterpret_cast<bf16*>(memory);
    bf16* const d_tile = q_tile + QUERIES * DIM;
    bf16* const k_tile = HELD ? q_tile : d_tile + QUERIES * DIM;
    bf16* const v_tile = k_tile + 2 * KEYS * DIM;

    const unsigned tiles = ceil_div(seq, static_cast<unsigned>(QUERIES));
    const Work work(tiles, heads);
    const View view(first, work.sequence, seq, seq);
    const int dim = static_cast<int>(head_dim);
    const int query = static_cast<int>(tiles - 1 - work.tile) * QUERIES;  // longest rows first
    const int queries = min(QUERIES, view.seq - query);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t q_at =
        (static_cast<size_t>(work.sequence) * seq + query) * q_width + static_cast<size_t>(work.head) * dim;
    const size_t k_at = static_cast<size_t>(work.sequence) * seq * k_width +
                        static_cast<size_t>(work.head / (heads / kv_heads)) * dim;
    const int end = view.last_key(query + queries - 1) + 1;
    int key = view.first_key(query);

    Tile<DIM>::template load<THREADS, QUERIES>(q_tile, q + q_at, q_width, queries, dim);
    Tile<DIM>::template load<THREADS, QUERIES>(d_tile, d_output + q_at, q_width, queries, dim);
    cp_async_commit();
    // This warp's rows, and the first keys that the first and the last of its rows see.
    const int my_row = 16 * M * warp_id(), my_rows = min(16 * M, queries - my_row);
    const int first_row = query + min(my_row, queries - 1),
              last_row = query + min(my_row + 16 * M, queries) - 1;
    const int lowest = view.first_key(first_row), low = view.first_key(last_row);
    float of_lse[M][2], of_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = query + min(my_row + 16 * m + 8 * h + lane_id() / 4, queries - 1);
            const float4 of_row = rows[(static_cast<size_t>(work.sequence) * heads + work.head) * seq + row];
            of_lse[m][h] = of_row.x;
            of_delta[m][h] = of_row.y;
        }
    }
    Fragments<M, DIM / 16> of_q, of_d;
    if (HELD) {
        cp_async_wait<0>();
        __syncthreads();
        of_q.template load<DIM>(q_tile, my_row);
        of_d.template load<DIM>(d_tile, my_row);
        __syncthreads();
    }

    const auto load_keys = [&](int key, int stage) {
        Tile<DIM>::template load<THREADS, KEYS>(k_tile + stage * KEYS * DIM, k + k_at + key * k_width,
                                                k_width, end - key, dim);
        Tile<DIM>::template load<THREADS, KEYS>(v_tile + stage * KEYS * DIM, v + k_at + key * k_width,
                                                k_width, end - key, dim);
        cp_async_commit();
    };
    load_keys(key, 0);
    const float scale2 = scale * LOG2_E;  // powers of 2 instead of e
    Accumulator<M, DIM / 8> d_queries;
    d_queries.zero();

    for (int stage = 0; key < end; key += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is loaded, and the previous one is no longer read
        if (key + KEYS < end) load_keys(key + KEYS, stage ^ 1);
        if (my_rows <= 0 || key > view.last_key(last_row) || key + KEYS <= lowest) continue;
        Accumulator<M, KEYS / 8> p, ds;
        p.zero();
        if (HELD) {
            multiply_transposed<DIM>(p, of_q, k_tile + stage * KEYS * DIM);
        } else {
            multiply_transposed<DIM>(p, q_tile, my_row, k_tile + stage * KEYS * DIM);
        }
        if (key < low || key + KEYS - 1 > view.last_key(first_row)) {
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = query + min(my_row + 16 * m + 8 * h + lane_id() / 4, queries - 1);
                    const int from = view.first_key(row), to = view.last_key(row);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const int at = key + 8 * n + lane_id() % 4 * 2 + i;
                            if (at < from || at > to) p.at[m][n][2 * h + i] = Max::identity();
                        }
                    }
                }
            }
        }
        ds.zero();
        if (HELD) {
            multiply_transposed<DIM>(ds, of_d, v_tile + stage * KEYS * DIM);
        } else {
            multiply_transposed<DIM>(ds, d_tile, my_row, v_tile + stage * KEYS * DIM);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float of_p = fast_exp2(fmaf(p.at[m][n][i], scale2, -of_lse[m][i / 2]));
                    ds.at[m][n][i] = of_p * (ds.at[m][n][i] - of_delta[m][i / 2]);
                }
            }
        }
        Fragments<M, KEYS / 16> rounded;
        rounded.round(ds);
        multiply<DIM>(d_queries, rounded, k_tile + stage * KEYS * DIM);
    }
    __syncthreads();
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = scale;
    store<DIM, M>(d_queries, factor, q_tile, my_row, dq + q_at + my_row * q_width, q_width, my_rows, dim);
}

}  // namespace

// A kernel's DIM is at least the number of features of a head. The kernel's name contains its
// template arguments: cuda.rs builds the name from the same values as the grid and the shared
// memory.
#define BACKWARD_KEYS(DIM, WARPS, M, QUERIES, BLOCKS)                                             \
    KERNEL_RESIDENT(32 * WARPS, BLOCKS,                                                           \
                    attention_backward_keys_mma_##DIM##_##WARPS##_##M##_##QUERIES##_bf16,         \
                    const bf16* q, const bf16* k, const bf16* v, const bf16* d_output,            \
                    const unsigned* first, const float4* rows, void* dk, void* dv, unsigned seq,  \
                    unsigned heads, unsigned kv_heads, unsigned head_dim, float scale) {          \
        backward_keys<DIM, WARPS, M, QUERIES>(q, k, v, d_output, first, rows, dk, dv, seq, heads, \
                                              kv_heads, head_dim, scale);                         \
    }
BACKWARD_KEYS(64, 4, 2, 32, 2)
BACKWARD_KEYS(96, 8, 1, 32, 1)
BACKWARD_KEYS(128, 8, 1, 32, 1)
BACKWARD_KEYS(256, 4, 1, 16, 1)

#define BACKWARD_QUERIES(DIM, WARPS, M, KEYS, BLOCKS)                                         \
    KERNEL_RESIDENT(32 * WARPS, BLOCKS,                                                       \
                    attention_backward_queries_mma_##DIM##_##WARPS##_##M##_##KEYS##_bf16,     \
                    const bf16* q, const bf16* k, const bf16* v, const bf16* d_output,        \
                    const unsigned* first, const float4* rows, bf16* dq, unsigned seq,        \
                    unsigned heads, unsigned kv_heads, unsigned head_dim, float scale) {      \
        backward_queries<DIM, WARPS, M, KEYS>(q, k, v, d_output, first, rows, dq, seq, heads, \
                                              kv_heads, head_dim, scale);                     \
    }
BACKWARD_QUERIES(64, 4, 2, 32, 2)
BACKWARD_QUERIES(96, 8, 1, 64, 1)
BACKWARD_QUERIES(128, 8, 1, 64, 1)
BACKWARD_QUERIES(256, 4, 1, 16, 1)

// Sums the partial gradients of the query heads of each group: blocks with y 0 sum those of keys,
// blocks with y 1 those of values. partial_dk, partial_dv: [rows, group, head_dim]; dk, dv:
// [rows, head_dim]. There are positions x kv_heads rows, and head_dim is a multiple of 4 and at
// most 1024.
KERNEL(256, attention_sum_groups_bf16, const float* partial_dk, const float* partial_dv, bf16* dk, bf16* dv,
       unsigned rows, unsigned group, unsigned head_dim) {
    if (blockIdx.y == 0) {
        sum_groups(partial_dk, dk, rows, group, head_dim);
    } else {
        sum_groups(partial_dv, dv, rows, group, head_dim);
    }
}
