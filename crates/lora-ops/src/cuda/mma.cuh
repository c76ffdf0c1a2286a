// Tensor cores (products of bf16 tiles by a warp) and asynchronous copies into shared memory, for
// sm_80 and later.
#pragma once

#include "kernel.cuh"

#ifdef LORA_SIMULATED
#include "tensor_core.h"
#else

// d += a b for a 16 x 16 tile `a` and a 16 x 8 tile `b`, accumulated in f32. All 32 lanes must call
// it. With g = lane / 4 and t = lane % 4, a register has two elements, the first in its lower half:
//   a[0]: row g,     columns 2t, 2t+1        a[2]: row g,     columns 2t+8, 2t+9
//   a[1]: row g + 8, columns 2t, 2t+1        a[3]: row g + 8, columns 2t+8, 2t+9
//   b[0]: rows 2t, 2t+1, column g            b[1]: rows 2t+8, 2t+9, column g
//   d[0], d[1]: row g, columns 2t, 2t+1      d[2], d[3]: row g + 8, columns 2t, 2t+1
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4],
                                                  const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Loads four 8 x 8 matrices of 16-bit elements. All 32 lanes must call it. Lane i passes the
// address of row i % 8 of matrix i / 8 (16 bytes in shared memory, aligned to 16). r[m] receives
// elements of matrix m: row lane / 4, columns 2 (lane % 4) and the next one.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Does the same with the transpose of each matrix: r[m] receives rows 2 (lane % 4) and the next one
// of column lane / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Starts copying 16 bytes between addresses that are aligned to 16. If not `valid`, it writes zeros
// and does not read `global`. This thread may read the bytes after the cp_async_wait that covers
// their group, and the other threads of the block after a barrier that follows that wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes this thread's group of the copies that were started since the previous group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the PENDING newest groups of this thread are still pending.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
