// libcublas: handles, and products of f32 and bf16 matrices with sums in f32. Arguments are checked
// as cuBLAS checks them. In addition, all operands must lie in device memory.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "gemm.h"
#include "shared.h"

namespace {

enum Status : int {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    NOT_SUPPORTED = 15,
};

struct Handle {
    void* stream = nullptr;
    int pointer_mode = 0;  // 0: alpha and beta on the host, 1: on the device
    int math_mode = 0, atomics_mode = 0, sm_count_target = 0;
};

struct Matrix {
    const void* base;
    int type, leading;
    long long stride;
};

struct Product {
    int transposed_a, transposed_b, m, n, k;
    const float *alpha, *beta;
    Matrix a, b, c;
    int batches;
};

std::atomic<uint64_t> products, unaligned_products;

// Whether the address, the leading dimension and, in a batch, the stride are multiples of 16 bytes,
// as cuBLAS's fast kernels require.
bool is_aligned(const Matrix& matrix, int batches, gemm::Type type) {
    const auto multiple = [&](long long elements) {
        return elements * static_cast<long long>(gemm::size_of(type)) % 16 == 0;
    };
    return reinterpret_cast<uintptr_t>(matrix.base) % 16 == 0 && multiple(matrix.leading) &&
           (batches == 1 || multiple(matrix.stride));
}

bool known(int type, gemm::Type* as) {
    constexpr int R_32F = 0, R_16BF = 14;
    if (type != R_32F && type != R_16BF) return false;
    *as = type == R_32F ? gemm::Type::f32 : gemm::Type::bf16;
    return true;
}

// Ends the process if an operand is not in device memory. On a GPU this would be an illegal access
// at some later time.
void check_extent(const char* name, const Matrix& matrix, size_t rows, size_t columns, int batches,
                  gemm::Type type) {
    const size_t elements = (columns - 1) * static_cast<size_t>(matrix.leading) + rows;
    const size_t bytes = (elements + static_cast<size_t>(matrix.stride) * static_cast<size_t>(batches - 1)) *
                         gemm::size_of(type);
    if (reinterpret_cast<uintptr_t>(matrix.base) % gemm::size_of(type) == 0 &&
        lora_sim_on_device(matrix.base, bytes))
        return;
    fprintf(stderr,
            "simulated GPU: gemm: %s (%zu x %zu, leading dimension %d, %d of them) is not in one allocation "
            "on the device\n",
            name, rows, columns, matrix.leading, batches);
    abort();
}

int enqueue(Handle* handle, const Product& p) {
    if (handle == nullptr) return NOT_INITIALIZED;
    if (p.transposed_a < 0 || p.transposed_a > 2 || p.transposed_b < 0 || p.transposed_b > 2)
        return INVALID_VALUE;
    if (p.m < 0 || p.n < 0 || p.k < 0 || p.batches < 0) return INVALID_VALUE;
    const int rows_a = p.transposed_a ? p.k : p.m, rows_b = p.transposed_b ? p.n : p.k;
    if (p.a.leading < std::max(1, rows_a) || p.b.leading < std::max(1, rows_b) ||
        p.c.leading < std::max(1, p.m))
        return INVALID_VALUE;
    if (p.m == 0 || p.n == 0 || p.batches == 0) return SUCCESS;
    if (p.alpha == nullptr || p.beta == nullptr || p.a.base == nullptr || p.b.base == nullptr ||
        p.c.base == nullptr)
        return INVALID_VALUE;
    gemm::Type in, in_b, out;
    if (!known(p.a.type, &in) || !known(p.b.type, &in_b) || !known(p.c.type, &out) || in != in_b)
        return NOT_SUPPORTED;
    if (in == gemm::Type::f32 && out != gemm::Type::f32) return NOT_SUPPORTED;

    const auto m = static_cast<size_t>(p.m), n = static_cast<size_t>(p.n), k = static_cast<size_t>(p.k);
    if (k > 0) check_extent("A", p.a, p.transposed_a ? k : m, p.transposed_a ? m : k, p.batches, in);
    if (k > 0) check_extent("B", p.b, p.transposed_b ? n : k, p.transposed_b ? k : n, p.batches, in);
    check_extent("C", p.c, m, n, p.batches, out);
    products++;
    if ((k > 0 && !(is_aligned(p.a, p.batches, in) && is_aligned(p.b, p.batches, in))) ||
        !is_aligned(p.c, p.batches, out))
        unaligned_products++;
    const bool on_host = handle->pointer_mode == 0;
    const float alpha = on_host ? *p.alpha : 0.0f, beta = on_host ? *p.beta : 0.0f;
    const bool submitted = submit(handle->stream, [=] {
        for (int batch = 0; batch < p.batches; batch++) {
            const auto operand = [&](const Matrix& matrix, bool transposed) {
                const auto* base = static_cast<const char*>(matrix.base) +
                                   matrix.stride * batch * static_cast<long long>(gemm::size_of(in));
                return gemm::Operand{base, static_cast<size_t>(matrix.leading), transposed, in};
            };
            char* const c = static_cast<char*>(const_cast<void*>(p.c.base)) +
                            p.c.stride * batch * static_cast<long long>(gemm::size_of(out));
            gemm::multiply(m, n, k, on_host ? alpha : *p.alpha, operand(p.a, p.transposed_a != 0),
                           operand(p.b, p.transposed_b != 0), on_host ? beta : *p.beta, c,
                           static_cast<size_t>(p.c.leading), out);
        }
    });
    return submitted ? SUCCESS : EXECUTION_FAILED;
}

// COMPUTE_32F and its variants. Other numbers are other types; 64 and 65 are half precision, 70 is
// f64.
bool computes_in_f32(int compute_type) {
    return compute_type == 68 || compute_type == 69 || compute_type == 74 || compute_type == 75 ||
           compute_type == 77;
}

}  // namespace

// Numbers of products of this process: all, and those with an unaligned operand.
EXPORT uint64_t lora_sim_products() { return products; }
EXPORT uint64_t lora_sim_unaligned_products() { return unaligned_products; }

EXPORT int cublasCreate_v2(Handle** handle) {
    *handle = new Handle;
    return SUCCESS;
}

EXPORT int cublasDestroy_v2(Handle* handle) {
    if (handle == nullptr) return NOT_INITIALIZED;
    delete handle;
    return SUCCESS;
}

EXPORT int cublasGetVersion_v2(Handle*, int* version) {
    *version = 130100;
    return SUCCESS;
}

EXPORT int cublasGetProperty(int which, int* value) {
    if (which < 0 || which > 2) return INVALID_VALUE;
    *value = which == 0 ? 13 : which == 1 ? 1 : 0;
    return SUCCESS;
}

EXPORT const char* cublasGetStatusName(int status) {
    switch (status) {
        case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "unknown error";
    }
}
EXPORT const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

EXPORT int cublasSetStream_v2(Handle* handle, void* stream) {
    if (handle == nullptr) return NOT_INITIALIZED;
    handle->stream = stream;
    return SUCCESS;
}

EXPORT int cublasGetStream_v2(Handle* handle, void** stream) {
    if (handle == nullptr) return NOT_INITIALIZED;
    *stream = handle->stream;
    return SUCCESS;
}

EXPORT int cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t bytes) {
    if (handle == nullptr) return NOT_INITIALIZED;
    if (reinterpret_cast<uintptr_t>(workspace) % 256 != 0) return INVALID_VALUE;
    if (bytes > 0 && !lora_sim_on_device(workspace, bytes)) return INVALID_VALUE;
    return SUCCESS;
}

#define SETTING(Name, field)                                   \
    EXPORT int cublasSet##Name(Handle* handle, int value) {    \
        if (handle == nullptr) return NOT_INITIALIZED;         \
        handle->field = value;                                 \
        return SUCCESS;                                        \
    }                                                          \
    EXPORT int cublasGet##Name(Handle* handle, int* value) {   \
        if (handle == nullptr) return NOT_INITIALIZED;         \
        *value = handle->field;                                \
        return SUCCESS;                                        \
    }
SETTING(PointerMode_v2, pointer_mode)
SETTING(MathMode, math_mode)
SETTING(AtomicsMode, atomics_mode)
SETTING(SmCountTarget, sm_count_target)

// ---- products ----

EXPORT int cublasGemmStridedBatchedEx(Handle* handle, int transa, int transb, int m, int n, int k,
                                      const float* alpha, const void* a, int a_type, int lda,
                                      long long stride_a, const void* b, int b_type, int ldb,
                                      long long stride_b, const float* beta, void* c, int c_type, int ldc,
                                      long long stride_c, int batches, int compute_type, int) {
    if (!computes_in_f32(compute_type)) return NOT_SUPPORTED;
    const Matrix of_a = {a, a_type, lda, stride_a}, of_b = {b, b_type, ldb, stride_b};
    const Matrix of_c = {c, c_type, ldc, stride_c};
    return enqueue(handle, {transa, transb, m, n, k, alpha, beta, of_a, of_b, of_c, batches});
}

EXPORT int cublasGemmEx(Handle* handle, int transa, int transb, int m, int n, int k, const float* alpha,
                        const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                        const float* beta, void* c, int c_type, int ldc, int compute_type, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, a_type, lda, 0, b, b_type,
                                      ldb, 0, beta, c, c_type, ldc, 0, 1, compute_type, algorithm);
}

EXPORT int cublasSgemmStridedBatched(Handle* handle, int transa, int transb, int m, int n, int k,
                                     const float* alpha, const float* a, int lda, long long stride_a,
                                     const float* b, int ldb, long long stride_b, const float* beta, float* c,
                                     int ldc, long long stride_c, int batches) {
    const Matrix of_a = {a, 0, lda, stride_a}, of_b = {b, 0, ldb, stride_b}, of_c = {c, 0, ldc, stride_c};
    return enqueue(handle, {transa, transb, m, n, k, alpha, beta, of_a, of_b, of_c, batches});
}

EXPORT int cublasSgemm_v2(Handle* handle, int transa, int transb, int m, int n, int k, const float* alpha,
                          const float* a, int lda, const float* b, int ldb, const float* beta, float* c,
                          int ldc) {
    return cublasSgemmStridedBatched(handle, transa, transb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c,
                                     ldc, 0, 1);
}
