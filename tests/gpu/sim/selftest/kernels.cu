// Correct kernels for the simulation's own tests. nvcc compiles them too.
#include "mma.cuh"

template <typename T>
__device__ __forceinline__ void sums_of_rows(float* sums, float* largest, const T* x, unsigned rows,
                                             unsigned columns) {
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum = 0.0f, most = -INFINITY;
        for (unsigned i = thread_rank(); i < columns; i += block_threads()) {
            const float value = to_f32(x[static_cast<size_t>(row) * columns + i]);
            sum += value;
            most = fmaxf(most, value);
        }
        sum = block_sum(sum);
        sum += block_sum(1.0f) - static_cast<float>(block_threads());  // adds 0: two reductions in a row
        most = block_max(most);
        // Every thread has the result, so any thread may write it.
        if (thread_rank() == row % block_threads()) sums[row] = sum;
        if (thread_rank() == (row + 1) % block_threads()) largest[row] = most;
    }
}

KERNEL(1024, selftest_sums_f32, float* sums, float* largest, const float* __restrict__ x, unsigned rows,
       unsigned columns) {
    sums_of_rows(sums, largest, x, rows, columns);
}
KERNEL(1024, selftest_sums_bf16, float* sums, float* largest, const bf16* __restrict__ x, unsigned rows,
       unsigned columns) {
    sums_of_rows(sums, largest, x, rows, columns);
}

// y = 2 x + 1 with four elements for each thread. n must be a multiple of 4.
template <typename T>
__device__ __forceinline__ void fours(T* y, const T* x, size_t n) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const float4 v = load4(x + i);
    store4(y + i, make_float4(2 * v.x + 1, 2 * v.y + 1, 2 * v.z + 1, 2 * v.w + 1));
}
KERNEL(256, selftest_fours_f32, float* y, const float* __restrict__ x, size_t n) { fours(y, x, n); }
KERNEL(256, selftest_fours_bf16, bf16* y, const bf16* __restrict__ x, size_t n) { fours(y, x, n); }

// Reverses the elements of each block in dynamic shared memory.
KERNEL(256, selftest_reverse, float* x, bool early_exit) {
    DYNAMIC_SHARED(raw);
    float* const shared = reinterpret_cast<float*>(raw);
    float* const mine = x + static_cast<size_t>(blockIdx.x) * blockDim.x;
    if (early_exit && threadIdx.x >= blockDim.x / 2) {  // threads that have exited count as arrived
        shared[threadIdx.x] = 1.0f;
        return;
    }
    shared[threadIdx.x] = mine[threadIdx.x];
    __syncthreads();
    const unsigned from = early_exit ? threadIdx.x : blockDim.x - 1 - threadIdx.x;
    mine[threadIdx.x] = shared[from];
}

// The collectives of a warp. Each writes one row of 32 results.
KERNEL(32, selftest_warp, unsigned* results) {
    const unsigned lane = threadIdx.x;
    results[lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
    results[32 + lane] = __shfl_down_sync(0xffffffffu, lane, 3);
    results[64 + lane] = __shfl_up_sync(0xffffffffu, lane, 3, 8);
    results[96 + lane] = __shfl_sync(0xffffffffu, lane * lane, 7);
    results[128 + lane] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    if (lane < 16) results[160 + lane] = __shfl_xor_sync(0x0000ffffu, lane + 100, 1);
    else results[160 + lane] = __shfl_xor_sync(0xffff0000u, lane + 200, 2);
    __syncwarp();
    results[192 + lane] = static_cast<unsigned>(warp_sum(static_cast<float>(lane)));
}

// c += a b for row-major a [m, k] and b [k, n] in bf16 and c [m, n] in f32. Each warp computes a 16
// x 16 tile of c. k and n must be multiples of 8. If `transposed`, b is [n, k].
KERNEL(32, selftest_product, float* c, const bf16* __restrict__ a, const bf16* __restrict__ b, unsigned m,
       unsigned n, unsigned k, bool transposed) {
    __shared__ __align__(16) bf16 tile_a[2][16][16];
    __shared__ __align__(16) bf16 tile_b[2][16][16];
    const unsigned lane = threadIdx.x, row = blockIdx.y * 16, column = blockIdx.x * 16;
    const auto fetch = [&](unsigned step) {
        const unsigned r = lane / 2, half = lane % 2 * 8;
        const bool a_valid = row + r < m && step * 16 + half < k;
        cp_async_16(&tile_a[step % 2][r][half],
                    a_valid ? a + static_cast<size_t>(row + r) * k + step * 16 + half : a, a_valid);
        const unsigned b_row = transposed ? column + r : step * 16 + r,
                       b_column = transposed ? step * 16 + half : column + half;
        const unsigned b_rows = transposed ? n : k, b_columns = transposed ? k : n;
        const bool b_valid = b_row < b_rows && b_column < b_columns;
        cp_async_16(&tile_b[step % 2][r][half],
                    b_valid ? b + static_cast<size_t>(b_row) * b_columns + b_column : b, b_valid);
    };
    float sums[2][4] = {};
    const unsigned steps = ceil_div(k, 16u);
    fetch(0);
    cp_async_commit();
    for (unsigned step = 0; step < steps; step++) {
        if (step + 1 < steps) fetch(step + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncwarp();
        unsigned of_a[4], of_b[4];
        // Matrices 0 and 1 are the upper and lower rows of the left half, 2 and 3 those of the
        // right half.
        ldmatrix_x4(of_a, &tile_a[step % 2][lane % 16][lane / 16 * 8]);
        if (transposed) {
            // The rows of the tile are columns of c.
            ldmatrix_x4(of_b, &tile_b[step % 2][lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
        } else {
            ldmatrix_x4_trans(of_b, &tile_b[step % 2][lane % 16][lane / 16 * 8]);
        }
        const unsigned left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
        mma_m16n8k16_bf16(sums[0], of_a, left);
        mma_m16n8k16_bf16(sums[1], of_a, right);
        __syncwarp();
    }
    for (unsigned half = 0; half < 2; half++) {
        for (unsigned i = 0; i < 4; i++) {
            const unsigned r = row + lane / 4 + i / 2 * 8, s = column + half * 8 + lane % 4 * 2 + i % 2;
            if (r < m && s < n) c[static_cast<size_t>(r) * n + s] += sums[half][i];
        }
    }
}
