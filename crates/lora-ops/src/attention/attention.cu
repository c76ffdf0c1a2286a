// Attention in f32 arithmetic, for every shape and type: tiles of queries and keys in shared
// memory, with 16 x 16 threads for a product. Shapes that tensor cores support are computed by
// attention_forward_mma.cu and attention_backward_mma.cu instead.
//
// q, output: [batch * seq, heads * dim]; k, v: [batch * kv_seq, kv_heads * dim]; first:
// [batch * seq] or null; lse: [batch, heads, seq]. rows: [batch, heads, seq], the inputs of the
// backward pass for each query: the log-sum-exp in base 2, sum(d_output * output), and the bits of
// the first key.
#include "view.cuh"

namespace {

constexpr int THREADS = 256;

// A thread's row and column among 16 x 16. Of a product, a thread computes the R rows from ty * R
// on and every 16th column from tx on.
__device__ __forceinline__ int tx() { return static_cast<int>(threadIdx.x % 16); }
__device__ __forceinline__ int ty() { return static_cast<int>(threadIdx.x / 16); }

// Distance between the rows of a tile of WIDTH columns: with the padding, 16-byte reads of eight
// rows use different banks.
__host__ __device__ constexpr int stride(int width) { return width + 4; }

// Fills a tile [ROWS, DIM] from `rows` rows of `dim` elements; all other elements are zero.
template <typename T, int ROWS, int DIM>
__device__ __forceinline__ void load_tile(float* tile, const T* from, size_t width, int rows, int dim) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    for (int row = warp; row < ROWS; row += THREADS / 32) {
        for (int d = lane; d < DIM; d += 32) {
            tile[row * stride(DIM) + d] = row < rows && d < dim ? to_f32(from[row * width + d]) : 0.0f;
        }
    }
}

// s = a b^T of tiles [16 R, DIM] and [16 C, DIM].
template <int R, int C, int DIM>
__device__ __forceinline__ void scores(float (&s)[R][C], const float* a, const float* b, int dim) {
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < C; j++) s[i][j] = 0.0f;
    }
#pragma unroll 1
    for (int d = 0; d < dim; d += 4) {
        float4 x[R], y[C];
#pragma unroll
        for (int i = 0; i < R; i++) x[i] = load4(a + (ty() * R + i) * stride(DIM) + d);
#pragma unroll
        for (int j = 0; j < C; j++) y[j] = load4(b + (tx() + 16 * j) * stride(DIM) + d);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < C; j++) {
                s[i][j] = fmaf(x[i].x, y[j].x, s[i][j]);
                s[i][j] = fmaf(x[i].y, y[j].y, s[i][j]);
                s[i][j] = fmaf(x[i].z, y[j].z, s[i][j]);
                s[i][j] = fmaf(x[i].w, y[j].w, s[i][j]);
            }
        }
    }
}

// A thread's rows of a product with DIM columns; the thread computes columns 64 g + 4 tx .. + 3.
template <int R, int DIM>
struct Rows {
    float at[R][DIM / 16];

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int e = 0; e < DIM / 16; e++) at[i][e] = 0.0f;
        }
    }
    __device__ __forceinline__ void scale(int row, float factor) {
#pragma unroll
        for (int e = 0; e < DIM / 16; e++) at[row][e] *= factor;
    }
    // at += p x of tiles [16 R, K] and [K, DIM].
    template <int K>
    __device__ __forceinline__ void add(const float* p, const float* x) {
#pragma unroll 1
        for (int k = 0; k < K; k += 4) {
            float4 weights[R];
#pragma unroll
            for (int i = 0; i < R; i++) weights[i] = load4(p + (ty() * R + i) * stride(K) + k);
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int g = 0; g < DIM / 64; g++) {
                    const float4 y = load4(x + (k + n) * stride(DIM) + 64 * g + 4 * tx());
#pragma unroll
                    for (int i = 0; i < R; i++) {
                        const float weight = n == 0   ? weights[i].x
                                             : n == 1 ? weights[i].y
                                             : n == 2 ? weights[i].z
                                                      : weights[i].w;
                        at[i][4 * g + 0] = fmaf(weight, y.x, at[i][4 * g + 0]);
                        at[i][4 * g + 1] = fmaf(weight, y.y, at[i][4 * g + 1]);
                        at[i][4 * g + 2] = fmaf(weight, y.z, at[i][4 * g + 2]);
                        at[i][4 * g + 3] = fmaf(weight, y.w, at[i][4 * g + 3]);
                    }
                }
            }
        }
    }
    // Writes the first `rows` rows of the tile, `dim` columns of each.
    template <typename T>
    __device__ __forceinline__ void store(T* to, size_t width, int rows, int dim) const {
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = ty() * R + i;
#pragma unroll
            for (int e = 0; e < DIM / 16; e++) {
                const int d = 64 * (e / 4) + 4 * tx() + e % 4;
                if (row < rows && d < dim) to[row * width + d] = from_f32<T>(at[i][e]);
            }
        }
    }
};

template <int R, int C>
__device__ __forceinline__ void put(float* tile, const float (&s)[R][C]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < C; j++) tile[(ty() * R + i) * stride(16 * C) + tx() + 16 * j] = s[i][j];
    }
}

// tanh(score / softcap), of which softcap times the value is the capped score.
__device__ __forceinline__ float bent(float score, float softcap) { return tanhf(score / softcap); }

__device__ __forceinline__ float capped(float score, float softcap) {
    return softcap > 0.0f ? softcap * bent(score, softcap) : score;
}

// Reduces over the 16 threads that compute the columns of a row.
template <typename Op>
__device__ __forceinline__ float of_row(float value) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
        value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

// A block computes a tile of 16 R queries of a head, in a loop over tiles of 16 R keys. Shared
// memory: tiles of queries, of keys or values, and of probabilities.
template <typename T, int DIM, int R>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, const unsigned* first, T* output,
                                        float* lse, unsigned seq, unsigned kv_seq, unsigned heads,
                                        unsigned kv_heads, unsigned head_dim, float scale, float softcap) {
    constexpr int TILE = 16 * R;
    DYNAMIC_SHARED(memory);
    float* const q_tile = reinterpret_cast<float*>(memory);
    float* const kv_tile = q_tile + TILE * stride(DIM);
    float* const p_tile = kv_tile + TILE * stride(DIM);

    const unsigned tiles = ceil_div(seq, static_cast<unsigned>(TILE));
    const Work work(tiles, heads);
    const View view(first, work.sequence, seq, kv_seq);
    const int dim = static_cast<int>(head_dim), dim4 = ceil_div(dim, 4) * 4;
    const int query = static_cast<int>(tiles - 1 - work.tile) * TILE;  // longest rows first
    const int rows = min(TILE, view.seq - query);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t q_at =
        (static_cast<size_t>(work.sequence) * seq + query) * q_width + static_cast<size_t>(work.head) * dim;
    const size_t k_at = static_cast<size_t>(work.sequence) * kv_seq * k_width +
                        static_cast<size_t>(work.head / (heads / kv_heads)) * dim;

    int from[R], to[R];  // first and last key that each row sees; none for rows past the last query
    float top[R], total[R];
    Rows<R, DIM> values;
    values.zero();
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = ty() * R + i;
        from[i] = row < rows ? view.first_key(query + row) : 0;
        to[i] = row < rows ? view.last_key(query + row) : -1;
        top[i] = Max::identity();
        total[i] = 0.0f;
    }
    load_tile<T, TILE, DIM>(q_tile, q + q_at, q_width, rows, dim);

    const int end = view.last_key(query + rows - 1) + 1;
    for (int key = view.first_key(query); key < end; key += TILE) {
        __syncthreads();
        load_tile<T, TILE, DIM>(kv_tile, k + k_at + key * k_width, k_width, end - key, dim);
        __syncthreads();
        float s[R][R];
        scores<R, R, DIM>(s, q_tile, kv_tile, dim4);
        __syncthreads();
        load_tile<T, TILE, DIM>(kv_tile, v + k_at + key * k_width, k_width, end - key, dim);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float largest = top[i];
#pragma unroll
            for (int j = 0; j < R; j++) {
                const int at = key + tx() + 16 * j;
                const float score = capped(s[i][j] * scale, softcap);
                s[i][j] = at >= from[i] && at <= to[i] ? score : Max::identity();
                largest = fmaxf(largest, s[i][j]);
            }
            largest = of_row<Max>(largest);
            // 0 for a row that has not seen a key yet.
            const float base = largest == Max::identity() ? 0.0f : largest;
            const float rescale = expf(top[i] - base);
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < R; j++) {
                s[i][j] = expf(s[i][j] - base);
                sum += s[i][j];
            }
            total[i] = total[i] * rescale + of_row<Sum>(sum);
            values.scale(i, rescale);
            top[i] = largest;
        }
        put(p_tile, s);
        __syncthreads();
        values.template add<TILE>(p_tile, kv_tile);
    }

#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = ty() * R + i;
        values.scale(i, 1.0f / total[i]);
        if (tx() == 0 && row < rows) {
            lse[(static_cast<size_t>(work.sequence) * heads + work.head) * seq + query + row] =
                top[i] + logf(total[i]);
        }
    }
    values.store(output + q_at, q_width, rows, dim);
}

// Computes the inputs of the backward pass (`rows`) for each query of each head, one warp for each.
template <typename T>
__device__ __forceinline__ void rows_of(const T* output, const T* d_output, const float* lse,
                                        const unsigned* first, float4* rows, unsigned queries, unsigned seq,
                                        unsigned heads, unsigned head_dim) {
    const size_t at = static_cast<size_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= static_cast<size_t>(queries) * heads) return;
    const unsigned lane = threadIdx.x % 32;
    const T *o = output + at * head_dim, *d_o = d_output + at * head_dim;
    float delta = 0.0f;
    if (head_dim % 4 == 0 &&
        (reinterpret_cast<size_t>(output) | reinterpret_cast<size_t>(d_output)) % (4 * sizeof(T)) == 0) {
        for (unsigned d = 4 * lane; d < head_dim; d += 128) {
            const float4 a = load4(o + d), b = load4(d_o + d);
            delta += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
        }
    } else {
        for (unsigned d = lane; d < head_dim; d += 32) delta += to_f32(o[d]) * to_f32(d_o[d]);
    }
    delta = warp_sum(delta);
    if (lane != 0) return;
    const size_t query = at / heads, row = (query / seq * heads + at % heads) * seq + query % seq;
    rows[row] =
        make_float4(lse[row] * LOG2_E, delta, __uint_as_float(first == nullptr ? 0 : first[query]), 0.0f);
}

// Whether a tile of 16 rows is so large that only two of the four tiles of a backward pass fit into
// shared memory. The others take their places in turn, and are read again for every tile of the
// loop.
__host__ __device__ constexpr bool has_two_tiles(int dim) { return dim > 256; }

// The gradients of keys and values: a block computes a tile of 16 R keys of a key/value head, in a
// loop over the heads of its group and over the queries that see these keys. Shared memory: tiles
// of keys, values, queries and output gradients (or two of them at a time), and the transpose of
// the probabilities or of their gradients.
template <typename T, int DIM, int R>
__device__ __forceinline__ void backward_keys(const T* q, const T* k, const T* v, const T* d_output,
                                              const unsigned* first, const float4* rows, T* dk, T* dv,
                                              unsigned seq, unsigned heads, unsigned kv_heads,
                                              unsigned head_dim, float scale, float softcap) {
    constexpr int TILE = 16 * R, SIZE = TILE * stride(DIM);
    constexpr bool TWO = has_two_tiles(DIM);
    DYNAMIC_SHARED(memory);
    float* const k_tile = reinterpret_cast<float*>(memory);
    float *const v_tile = TWO ? k_tile : k_tile + SIZE, *const q_tile = v_tile + SIZE,
                 *const d_tile = TWO ? q_tile : q_tile + SIZE, *const p_tile = d_tile + SIZE;

    const Work work(ceil_div(seq, static_cast<unsigned>(TILE)), kv_heads);
    const View view(first, work.sequence, seq, seq);
    const int dim = static_cast<int>(head_dim), dim4 = ceil_div(dim, 4) * 4;
    const int key = static_cast<int>(work.tile) * TILE, keys = min(TILE, view.seq - key);
    const int group = static_cast<int>(heads / kv_heads);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t k_at =
        (static_cast<size_t>(work.sequence) * seq + key) * k_width + static_cast<size_t>(work.head) * dim;

    if (!TWO) {
        load_tile<T, TILE, DIM>(k_tile, k + k_at, k_width, keys, dim);
        load_tile<T, TILE, DIM>(v_tile, v + k_at, k_width, keys, dim);
    }
    Rows<R, DIM> d_keys, d_values;
    d_keys.zero();
    d_values.zero();
    const float scale2 = scale * LOG2_E;  // powers of 2 instead of e
    const int end = view.end_query(key + keys - 1);
    for (int head = static_cast<int>(work.head) * group; head < static_cast<int>(work.head + 1) * group;
         head++) {
        const size_t rows_at = (static_cast<size_t>(work.sequence) * heads + head) * seq;
        for (int query = view.first_query(key); query < end; query += TILE) {
            const size_t q_at = (static_cast<size_t>(work.sequence) * seq + query) * q_width +
                                static_cast<size_t>(head) * dim;
            __syncthreads();
            if (TWO) load_tile<T, TILE, DIM>(k_tile, k + k_at, k_width, keys, dim);
            load_tile<T, TILE, DIM>(q_tile, q + q_at, q_width, end - query, dim);
            if (!TWO) load_tile<T, TILE, DIM>(d_tile, d_output + q_at, q_width, end - query, dim);
            __syncthreads();
            float p[R][R], dp[R][R];  // rows are keys, columns are queries
            scores<R, R, DIM>(p, k_tile, q_tile, dim4);
            if (TWO) {
                __syncthreads();
                load_tile<T, TILE, DIM>(v_tile, v + k_at, k_width, keys, dim);
                load_tile<T, TILE, DIM>(d_tile, d_output + q_at, q_width, end - query, dim);
                __syncthreads();
            }
            scores<R, R, DIM>(dp, v_tile, d_tile, dim4);
#pragma unroll
            for (int j = 0; j < R; j++) {
                const int at = query + tx() + 16 * j;
                const float4 row = at < end ? rows[rows_at + at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const int from = __float_as_int(row.z), to = at < end ? view.last_key(at) : -1;
#pragma unroll
                for (int i = 0; i < R; i++) {
                    const int mine = key + ty() * R + i;
                    const bool is_visible = mine >= from && mine <= to;
                    if (softcap > 0.0f) {
                        const float b = bent(p[i][j] * scale, softcap);
                        p[i][j] = is_visible ? exp2f(softcap * b * LOG2_E - row.x) : 0.0f;
                        dp[i][j] = p[i][j] * (dp[i][j] - row.y) * (1.0f - b * b);
                    } else {
                        p[i][j] = is_visible ? exp2f(p[i][j] * scale2 - row.x) : 0.0f;
                        dp[i][j] = p[i][j] * (dp[i][j] - row.y);
                    }
                }
            }
            put(p_tile, p);
            __syncthreads();
            d_values.template add<TILE>(p_tile, d_tile);
            __syncthreads();
            if (TWO) load_tile<T, TILE, DIM>(q_tile, q + q_at, q_width, end - query, dim);
            put(p_tile, dp);
            __syncthreads();
            d_keys.template add<TILE>(p_tile, q_tile);
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) d_keys.scale(i, scale);
    d_keys.store(dk + k_at, k_width, keys, dim);
    d_values.store(dv + k_at, k_width, keys, dim);
}

// The gradients of queries: a block computes a tile of 16 R queries of a head, in a loop over the
// keys that they see. Shared memory: tiles of queries, output gradients, keys and values (or two of
// them at a time), and the gradients of scores.
template <typename T, int DIM, int R>
__device__ __forceinline__ void backward_queries(const T* q, const T* k, const T* v, const T* d_output,
                                                 const unsigned* first, const float4* rows, T* dq,
                                                 unsigned seq, unsigned heads, unsigned kv_heads,
                                                 unsigned head_dim, float scale, float softcap) {
    constexpr int TILE = 16 * R, SIZE = TILE * stride(DIM);
    constexpr bool TWO = has_two_tiles(DIM);
    DYNAMIC_SHARED(memory);
    float* const q_tile = reinterpret_cast<float*>(memory);
    float *const d_tile = TWO ? q_tile : q_tile + SIZE, *const k_tile = d_tile + SIZE,
                 *const v_tile = TWO ? k_tile : k_tile + SIZE, *const ds_tile = v_tile + SIZE;

    const unsigned tiles = ceil_div(seq, static_cast<unsigned>(TILE));
    const Work work(tiles, heads);
    const View view(first, work.sequence, seq, seq);
    const int dim = static_cast<int>(head_dim), dim4 = ceil_div(dim, 4) * 4;
    const int query = static_cast<int>(tiles - 1 - work.tile) * TILE;  // longest rows first
    const int queries = min(TILE, view.seq - query);
    const size_t q_width = static_cast<size_t>(heads) * dim, k_width = static_cast<size_t>(kv_heads) * dim;
    const size_t q_at =
        (static_cast<size_t>(work.sequence) * seq + query) * q_width + static_cast<size_t>(work.head) * dim;
    const size_t k_at = static_cast<size_t>(work.sequence) * seq * k_width +
                        static_cast<size_t>(work.head / (heads / kv_heads)) * dim;
    const size_t rows_at = (static_cast<size_t>(work.sequence) * heads + work.head) * seq + query;

    int from[R], to[R];  // first and last key that each row sees; none for rows past the last query
    float of_lse[R], of_delta[R];
    Rows<R, DIM> d_queries;
    d_queries.zero();
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = ty() * R + i;
        from[i] = row < queries ? view.first_key(query + row) : 0;
        to[i] = row < queries ? view.last_key(query + row) : -1;
        const float4 of_row = row < queries ? rows[rows_at + row] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        of_lse[i] = of_row.x;
        of_delta[i] = of_row.y;
    }
    if (!TWO) {
        load_tile<T, TILE, DIM>(q_tile, q + q_at, q_width, queries, dim);
        load_tile<T, TILE, DIM>(d_tile, d_output + q_at, q_width, queries, dim);
    }

    const float scale2 = scale * LOG2_E;  // powers of 2 instead of e
    const int end = view.last_key(query + queries - 1) + 1;
    for (int key = view.first_key(query); key < end; key += TILE) {
        __syncthreads();
        if (TWO) load_tile<T, TILE, DIM>(d_tile, d_output + q_at, q_width, queries, dim);
        load_tile<T, TILE, DIM>(v_tile, v + k_at + key * k_width, k_width, end - key, dim);
        if (!TWO) load_tile<T, TILE, DIM>(k_tile, k + k_at + key * k_width, k_width, end - key, dim);
        __syncthreads();
        float p[R][R], dp[R][R];
        scores<R, R, DIM>(dp, d_tile, v_tile, dim4);
        if (TWO) {
            __syncthreads();
            load_tile<T, TILE, DIM>(q_tile, q + q_at, q_width, queries, dim);
            load_tile<T, TILE, DIM>(k_tile, k + k_at + key * k_width, k_width, end - key, dim);
            __syncthreads();
        }
        scores<R, R, DIM>(p, q_tile, k_tile, dim4);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < R; j++) {
                const int at = key + tx() + 16 * j;
                const bool is_visible = at >= from[i] && at <= to[i];
                if (softcap > 0.0f) {
                    const float b = bent(p[i][j] * scale, softcap);
                    p[i][j] = is_visible ? exp2f(softcap * b * LOG2_E - of_lse[i]) : 0.0f;
                    dp[i][j] = p[i][j] * (dp[i][j] - of_delta[i]) * (1.0f - b * b);
                } else {
                    p[i][j] = is_visible ? exp2f(p[i][j] * scale2 - of_lse[i]) : 0.0f;
                    dp[i][j] = p[i][j] * (dp[i][j] - of_delta[i]);
                }
            }
        }
        put(ds_tile, dp);
        __syncthreads();
        d_queries.template add<TILE>(ds_tile, k_tile);
    }
#pragma unroll
    for (int i = 0; i < R; i++) d_queries.scale(i, scale);
    d_queries.store(dq + q_at, q_width, queries, dim);
}

}  // namespace

// A kernel's DIM is at least the number of features of a head. Tiles have 16 R queries or keys, as
// many as fit into the 99 KiB of shared memory of the smallest GPU. BLOCKS: how many blocks of the
// kernel for the keys fit on a multiprocessor without spilled registers.
#define ATTENTION(T, dtype, DIM, R_FORWARD, R_BACKWARD, BLOCKS)                                       \
    KERNEL_RESIDENT(THREADS, 2, attention_forward_##DIM##_##dtype, const T* q, const T* k,            \
                    const T* v, const unsigned* first, T* output, float* lse, unsigned seq,           \
                    unsigned kv_seq, unsigned heads, unsigned kv_heads, unsigned head_dim,            \
                    float scale, float softcap) {                                                     \
        forward<T, DIM, R_FORWARD>(q, k, v, first, output, lse, seq, kv_seq, heads, kv_heads,         \
                                   head_dim, scale, softcap);                                         \
    }                                                                                                 \
    KERNEL_RESIDENT(THREADS, BLOCKS, attention_backward_keys_##DIM##_##dtype, const T* q, const T* k, \
                    const T* v, const T* d_output, const unsigned* first, const float4* rows,         \
                    T* dk, T* dv, unsigned seq, unsigned heads, unsigned kv_heads,                    \
                    unsigned head_dim, float scale, float softcap) {                                  \
        backward_keys<T, DIM, R_BACKWARD>(q, k, v, d_output, first, rows, dk, dv, seq, heads,         \
                                          kv_heads, head_dim, scale, softcap);                        \
    }                                                                                                 \
    KERNEL_RESIDENT(THREADS, 2, attention_backward_queries_##DIM##_##dtype, const T* q,               \
                    const T* k, const T* v, const T* d_output, const unsigned* first,                 \
                    const float4* rows, T* dq, unsigned seq, unsigned heads, unsigned kv_heads,       \
                    unsigned head_dim, float scale, float softcap) {                                  \
        backward_queries<T, DIM, R_BACKWARD>(q, k, v, d_output, first, rows, dq, seq, heads,          \
                                             kv_heads, head_dim, scale, softcap);                     \
    }
ATTENTION(float, f32, 64, 4, 4, 2)
ATTENTION(float, f32, 128, 4, 2, 2)
ATTENTION(float, f32, 256, 2, 1, 2)
ATTENTION(float, f32, 512, 1, 1, 1)
ATTENTION(bf16, bf16, 64, 4, 4, 2)
ATTENTION(bf16, bf16, 128, 4, 2, 2)
ATTENTION(bf16, bf16, 256, 2, 1, 2)
ATTENTION(bf16, bf16, 512, 1, 1, 1)

#define ATTENTION_ROWS(T, dtype)                                                                  \
    KERNEL(THREADS, attention_rows_##dtype, const T* output, const T* d_output, const float* lse, \
           const unsigned* first, float4* rows, unsigned queries, unsigned seq, unsigned heads,   \
           unsigned head_dim) {                                                                   \
        rows_of(output, d_output, lse, first, rows, queries, seq, heads, head_dim);               \
    }
ATTENTION_ROWS(float, f32)
ATTENTION_ROWS(bf16, bf16)
