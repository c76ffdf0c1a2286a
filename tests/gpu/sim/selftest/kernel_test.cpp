// Tests of kernels: reductions, warps, tensor cores, and the detection of faults.
#include <algorithm>

#include "api.h"

namespace {

constexpr bool SANITIZED =
#if defined(__SANITIZE_ADDRESS__)
    true;
#else
    false;
#endif

void reductions() {
    uint64_t hash = 1469598103934665603u;
    for (const unsigned threads : {32u, 64u, 96u, 256u, 992u, 1024u}) {
        for (const unsigned columns : {1u, 31u, 257u, 3001u}) {
            const unsigned rows = 7;
            const std::vector<float> x = Numbers(threads + columns).many(rows * columns);
            for (const bool half : {false, true}) {
                const Buffer input = half ? Buffer(bf16_of(x)) : Buffer(x);
                const Buffer sums(rows * 4), largest(rows * 4);
                const Dim block = threads == 96 ? Dim{8, 4, 3} : Dim{threads};
                OK(launch(half ? "selftest_sums_bf16" : "selftest_sums_f32", {3}, block, 0, sums.address,
                          largest.address, input.address, rows, columns));
                const auto sum = sums.read<float>(), most = largest.read<float>();
                for (unsigned row = 0; row < rows; row++) {
                    double expected = 0;
                    float greatest = -INFINITY;
                    for (unsigned i = 0; i < columns; i++) {
                        const float value =
                            half ? f32_of(bf16_of(x[row * columns + i])) : x[row * columns + i];
                        expected += value;
                        greatest = std::max(greatest, value);
                    }
                    CHECK(std::fabs(sum[row] - expected) < 1e-4);
                    CHECK(most[row] == greatest);
                    uint32_t bits;
                    __builtin_memcpy(&bits, &sum[row], 4);
                    hash = (hash ^ bits) * 1099511628211u;
                }
            }
        }
    }
    // check.sh compares this line between seeds.
    printf("sums %016llx\n", static_cast<unsigned long long>(hash));
}

void vectors() {
    const std::vector<float> x = Numbers(5).many(4004);
    const Buffer a(x), b(x.size() * 4), c(bf16_of(x)), d(x.size() * 2);
    OK(launch("selftest_fours_f32", {4}, {256}, 0, b.address, a.address, x.size()));
    OK(launch("selftest_fours_bf16", {4}, {256}, 0, d.address, c.address, x.size()));
    const auto y = b.read<float>();
    const auto z = d.read<uint16_t>();
    for (size_t i = 0; i < x.size(); i++) {
        CHECK(y[i] == 2 * x[i] + 1);
        CHECK(z[i] == bf16_of(2 * f32_of(bf16_of(x[i])) + 1));
    }
}

void barriers() {
    const std::vector<float> x = Numbers(6).many(512);
    const Buffer reversed(x), exited(x);
    OK(launch("selftest_reverse", {4}, {128}, 512, reversed.address, false));
    OK(launch("selftest_reverse", {4}, {128}, 512, exited.address, true));
    const auto y = reversed.read<float>(), z = exited.read<float>();
    for (size_t i = 0; i < x.size(); i++) {
        CHECK(y[i] == x[i / 128 * 128 + 127 - i % 128]);
        CHECK(z[i] == x[i]);
    }
}

void warps() {
    const Buffer results(7 * 32 * 4);
    OK(launch("selftest_warp", {1}, {32}, 0, results.address));
    const auto r = results.read<unsigned>();
    for (unsigned lane = 0; lane < 32; lane++) {
        EQUAL(r[lane], lane ^ 5);
        EQUAL(r[32 + lane], lane + 3 < 32 ? lane + 3 : lane);
        EQUAL(r[64 + lane], lane % 8 >= 3 ? lane - 3 : lane);
        EQUAL(r[96 + lane], 49u);
        EQUAL(r[128 + lane], 0x49249249u);
        EQUAL(r[160 + lane], lane < 16 ? (lane ^ 1) + 100 : (lane ^ 2) + 200);
        EQUAL(r[192 + lane], 496u);
    }
}

void products() {
    for (const bool transposed : {false, true}) {
        const unsigned m = 37, n = 24, k = 40;
        const auto a = bf16_of(Numbers(1).many(m * k)), b = bf16_of(Numbers(2).many(k * n));
        const Buffer left(a), right(b), out(std::vector<float>(m * n, 1.0f));
        OK(launch("selftest_product", {(n + 15) / 16, (m + 15) / 16}, {32}, 0, out.address, left.address,
                  right.address, m, n, k, transposed));
        const auto c = out.read<float>();
        for (unsigned i = 0; i < m; i++) {
            for (unsigned j = 0; j < n; j++) {
                double expected = 1;
                for (unsigned l = 0; l < k; l++)
                    expected += static_cast<double>(f32_of(a[i * k + l])) *
                                f32_of(b[transposed ? j * k + l : l * n + j]);
                CHECK(std::fabs(c[i * n + j] - expected) < 1e-5);
            }
        }
    }
}

void wrong_results() {
    for (const char* name : {"wrong_without_barrier", "wrong_without_initialization", "wrong_without_wait"}) {
        const Buffer x(std::vector<float>(128, 1.0f));
        OK(launch(name, {1}, {name[14] == 'w' ? 32u : 128u}, 0, x.address));
        bool nan = false;
        for (const float value : x.read<float>()) nan |= std::isnan(value);
        if (!nan) fprintf(stderr, "%s wrote no NaN\n", name);
        CHECK(nan);
    }
}

void faults() {
    const std::pair<const char*, const char*> expected[] = {
        {"fault_far_address", "which does not exist"},
        {"fault_past_the_end", "past its end"},
        {"fault_misaligned", "misaligned access"},
        {"fault_two_barriers", "waits at the __syncthreads of line"},
        {"fault_shuffle_in_a_branch", "deadlock: waits in __shfl_xor_sync"},
        {"fault_foreign_mask", "which lacks its own lane"},
        {"fault_past_shared_memory", "wrote past its 512 bytes of dynamic shared memory"},
        {"fault_row_in_global_memory", "ldmatrix: the row is not in shared memory"},
        {"fault_half_a_warp_multiplies", "mma without lane"},
    };
    for (const auto& [name, message] : expected) {
        const Ending ending = run_scene({"kernel", name});
        const bool shown = ending.code == -6 && ending.said.find(message) != std::string::npos;
        if (!shown)
            fprintf(stderr, "%s ended with %d and printed: %s\n", name, ending.code, ending.said.c_str());
        CHECK(shown);
        CHECK(ending.said.find(name) != std::string::npos || std::string(message) == "past its end");
    }
}

void refusals() {
    const Buffer x(std::vector<float>(512));
    fprintf(stderr, "(four launches that are refused)\n");
    EQUAL(launch("selftest_reverse", {1}, {512}, 0, x.address, false), 701);
    EQUAL(launch("selftest_reverse", {1, 65536}, {32}, 128, x.address, false), 1);
    EQUAL(launch("selftest_reverse", {0}, {32}, 128, x.address, false), 1);
    EQUAL(launch("selftest_reverse", {1}, {32}, 64 * 1024, x.address, false), 1);
    EQUAL(cuFuncSetAttribute(function("selftest_reverse"), 8, 228 * 1024), 1);
    OK(cuFuncSetAttribute(function("selftest_reverse"), 8, 227 * 1024));
    OK(launch("selftest_reverse", {1}, {32}, 64 * 1024, x.address, false));
}

}  // namespace

void test_kernels() {
    reductions();
    vectors();
    barriers();
    warps();
    products();
    wrong_results();
    if (!SANITIZED) faults();  // a sanitizer reports faults with other messages
    refusals();
}

int kernel_scene(const std::string& name) {
    use_device();
    const std::string past = "fault_past_the_end";
    {
        const Buffer x(std::vector<float>(name == past ? 100 : 128));
        OK(launch(name.c_str(), {1}, {name == "fault_half_a_warp_multiplies" ? 32u : 128u}, 512, x.address));
    }
    OK(cuCtxSynchronize());
    return 0;
}
