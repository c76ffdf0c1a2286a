// Kernels with one fault each, which the simulation must detect. nvcc compiles them too.
#include "mma.cuh"

KERNEL(128, fault_far_address, float* x) { x[static_cast<size_t>(threadIdx.x + 1) << 40] = 1.0f; }

KERNEL(128, fault_past_the_end, float* x) { x[threadIdx.x] = 1.0f; }

KERNEL(128, fault_misaligned, float* x) {
    const float4 v = load4(x + threadIdx.x);
    x[0] = v.x;
}

KERNEL(128, fault_two_barriers, float* x) {
    if (threadIdx.x < 64) {
        x[threadIdx.x] = 1.0f;
        __syncthreads();
    } else {
        __syncthreads();
    }
}

KERNEL(128, fault_shuffle_in_a_branch, float* x) {
    if (threadIdx.x < 5) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
    else __syncthreads();
}

KERNEL(128, fault_foreign_mask, float* x) { x[threadIdx.x] = __shfl_xor_sync(1u, x[threadIdx.x], 1); }

KERNEL(128, fault_past_shared_memory, float* x) {
    DYNAMIC_SHARED(raw);
    float* const shared = reinterpret_cast<float*>(raw);
    shared[threadIdx.x + 1] = x[threadIdx.x];
}

KERNEL(128, fault_row_in_global_memory, float* x) {
    unsigned r[4];
    ldmatrix_x4(r, x + threadIdx.x % 32 * 4);
    x[threadIdx.x] = __uint_as_float(r[0]);
}

KERNEL(32, fault_half_a_warp_multiplies, float* x) {
    float d[4] = {};
    const unsigned a[4] = {}, b[2] = {};
    if (threadIdx.x >= 16) return;
    mma_m16n8k16_bf16(d, a, b);
    x[threadIdx.x] = d[0];
}

// The results of these kernels contain NaN.
KERNEL(128, wrong_without_barrier, float* x) {
    __shared__ float shared[128];
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    x[threadIdx.x] = shared[127 - threadIdx.x];
}

KERNEL(128, wrong_without_initialization, float* x) {
    __shared__ float shared[128];
    if (threadIdx.x != 77) shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    x[threadIdx.x] = shared[127 - threadIdx.x];
}

KERNEL(32, wrong_without_wait, float* x) {
    __shared__ __align__(16) float shared[128];
    cp_async_16(shared + threadIdx.x * 4, x + threadIdx.x * 4, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    x[threadIdx.x] = shared[127 - threadIdx.x];
}
