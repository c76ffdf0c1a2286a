// Matrix products and random numbers.
#include "api.h"

namespace {

constexpr int F32 = 0, BF16 = 14, COMPUTE_32F = 68, DEFAULT = -1;

struct Case {
    int m, n, k, in, out;
    bool transposed_a, transposed_b;
    float alpha, beta;
};

void product(void* handle, const Case& c) {
    const int batches = 2, rows_a = c.transposed_a ? c.k : c.m, rows_b = c.transposed_b ? c.n : c.k;
    const int columns_a = c.transposed_a ? c.m : c.k, columns_b = c.transposed_b ? c.k : c.n;
    const int lda = rows_a + 3, ldb = rows_b + 1, ldc = c.m + 2;
    const long long stride_a = static_cast<long long>(lda) * columns_a + 5,
                    stride_b = static_cast<long long>(ldb) * columns_b + 4;
    const long long stride_c = static_cast<long long>(ldc) * c.n + 1;
    Numbers numbers(static_cast<uint64_t>(c.m * 31 + c.n));
    const auto a = bf16_of(numbers.many(static_cast<size_t>(stride_a * batches))),
               b = bf16_of(numbers.many(static_cast<size_t>(stride_b * batches)));
    const auto start = bf16_of(numbers.many(static_cast<size_t>(stride_c * batches)));
    const auto upload = [](const std::vector<uint16_t>& bits, int type) {
        std::vector<float> values;
        for (const uint16_t one : bits) values.push_back(f32_of(one));
        return type == BF16 ? std::make_unique<Buffer>(bits) : std::make_unique<Buffer>(values);
    };
    const auto left = upload(a, c.in), right = upload(b, c.in), out = upload(start, c.out);
    const auto nan = std::make_unique<Buffer>(out->bytes);
    const Buffer& target = c.beta == 0 ? *nan : *out;  // with beta = 0 the output is not read
    OK(cublasGemmStridedBatchedEx(handle, c.transposed_a, c.transposed_b, c.m, c.n, c.k, &c.alpha,
                                  left->as<void>(), c.in, lda, stride_a, right->as<void>(), c.in, ldb,
                                  stride_b, &c.beta, target.as<void>(), c.out, ldc, stride_c, batches,
                                  COMPUTE_32F, DEFAULT));
    std::vector<float> result;
    if (c.out == F32) result = target.read<float>();
    else for (const uint16_t bits : target.read<uint16_t>()) result.push_back(f32_of(bits));
    for (int batch = 0; batch < batches; batch++) {
        for (int i = 0; i < c.m; i++) {
            for (int j = 0; j < c.n; j++) {
                double sum = 0;
                for (int l = 0; l < c.k; l++) {
                    const auto at_a =
                        static_cast<size_t>(batch * stride_a + (c.transposed_a ? l + i * lda : i + l * lda));
                    const auto at_b =
                        static_cast<size_t>(batch * stride_b + (c.transposed_b ? j + l * ldb : l + j * ldb));
                    sum += static_cast<double>(f32_of(a[at_a])) * f32_of(b[at_b]);
                }
                const auto at = static_cast<size_t>(batch * stride_c + i + j * ldc);
                const double expected = c.alpha * sum + (c.beta == 0 ? 0 : c.beta * f32_of(start[at]));
                CHECK(std::fabs(result[at] - expected) <
                      (c.out == F32 ? 1e-5 : 1.0 / 128) * (1 + std::fabs(expected)));
            }
        }
        // Elements between the columns do not change.
        const float between = result[static_cast<size_t>(batch * stride_c + c.m)];
        CHECK(c.beta == 0 ? std::isnan(between)
                          : between == f32_of(start[static_cast<size_t>(batch * stride_c + c.m)]));
    }
}

}  // namespace

void test_gemm() {
    void* handle;
    OK(cublasCreate_v2(&handle));
    OK(cublasSetStream_v2(handle, nullptr));
    for (const auto& [in, out] : {std::pair{F32, F32}, std::pair{BF16, F32}, std::pair{BF16, BF16}}) {
        for (const bool a : {false, true}) {
            for (const bool b : {false, true}) {
                product(handle, {1, 1, 1, in, out, a, b, 1.0f, 0.0f});
                product(handle, {33, 19, 70, in, out, a, b, 0.5f, 1.0f});
                product(handle, {16, 100, 8, in, out, a, b, 1.0f, -2.0f});
                product(handle, {5, 7, 0, in, out, a, b, 1.0f, 1.0f});
                product(handle, {9, 5, 700, in, out, a, b, 1.0f, 0.0f});
            }
        }
    }
    const Buffer x(4096);
    const float one = 1;
    const auto gemm = [&](int m, int n, int k, int lda, int ldb, int ldc, int compute) {
        return cublasGemmEx(handle, 0, 0, m, n, k, &one, x.as<void>(), F32, lda, x.as<void>(), F32, ldb, &one,
                            x.as<void>(), F32, ldc, compute, DEFAULT);
    };
    EQUAL(gemm(4, 4, 4, 3, 4, 4, COMPUTE_32F), 7);
    EQUAL(gemm(4, 4, 4, 4, 3, 4, COMPUTE_32F), 7);
    EQUAL(gemm(4, 4, 4, 4, 4, 3, COMPUTE_32F), 7);
    EQUAL(gemm(-1, 4, 4, 4, 4, 4, COMPUTE_32F), 7);
    EQUAL(gemm(4, 4, 4, 4, 4, 4, 64), 15);
    const auto unaligned = [&](size_t bytes, int type, int lda, int ldb, int ldc) {
        const uint64_t all_before = lora_sim_products(), before = lora_sim_unaligned_products();
        OK(cublasGemmEx(handle, 0, 0, 4, 4, 4, &one, x.as<char>() + bytes, type, lda, x.as<void>(), type, ldb,
                        &one, x.as<char>() + 2048, type, ldc, COMPUTE_32F, DEFAULT));
        EQUAL(lora_sim_products() - all_before, 1u);
        return lora_sim_unaligned_products() - before;
    };
    EQUAL(unaligned(0, F32, 4, 4, 4), 0u);
    EQUAL(unaligned(16, BF16, 8, 16, 24), 0u);
    EQUAL(unaligned(8, BF16, 8, 8, 8), 1u);
    EQUAL(unaligned(4, F32, 4, 4, 4), 1u);
    EQUAL(unaligned(0, BF16, 4, 8, 8), 1u);
    EQUAL(unaligned(0, BF16, 8, 12, 8), 1u);
    EQUAL(unaligned(0, F32, 4, 4, 5), 1u);
    const uint64_t before = lora_sim_products();
    OK(gemm(0, 4, 4, 1, 4, 1, COMPUTE_32F));
    EQUAL(lora_sim_products(), before);
    EQUAL(cublasSetWorkspace_v2(handle, x.as<char>() + 8, 1024), 7);
    OK(cublasSetWorkspace_v2(handle, x.as<char>(), 4096));
    OK(cublasDestroy_v2(handle));

    void* generator;
    const Buffer uniform(40000), normal(40000);
    OK(curandCreateGenerator(&generator, 100));
    OK(curandSetPseudoRandomGeneratorSeed(generator, 7));
    OK(curandGenerateUniform(generator, uniform.as<float>(), 10000));
    OK(curandGenerateNormal(generator, normal.as<float>(), 10000, 3.0f, 2.0f));
    double mean = 0, normal_mean = 0, square = 0;
    for (const float value : uniform.read<float>()) {
        CHECK(value > 0 && value <= 1);
        mean += value / 10000;
    }
    for (const float value : normal.read<float>())
        normal_mean += value / 10000, square += (value - 3.0) * (value - 3.0) / 10000;
    CHECK(std::fabs(mean - 0.5) < 0.02 && std::fabs(normal_mean - 3) < 0.1 && std::fabs(square - 4) < 0.3);
    OK(curandDestroyGenerator(generator));
}
