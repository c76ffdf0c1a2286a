// CUDA's built-in functions and the bf16 type for simulated kernels. Included by simulated.h.
#pragma once

// ---- bf16 ----

struct bf16 {
    unsigned short bits;
};
inline unsigned short bf16_bits(bf16 x) { return x.bits; }
inline bf16 bf16_from_bits(unsigned short bits) { return bf16{bits}; }

// ---- bits ----

namespace sim {
template <typename To, typename From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace sim
inline unsigned __float_as_uint(float x) { return sim::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return sim::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return sim::bit_cast<float>(x); }
inline float __int_as_float(int x) { return sim::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline float bf16_to_f32(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline bf16 f32_to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return bf16{0x7fff};
    return bf16{static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// ---- arithmetic ----

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// Macros, because the C library declares some of these names for itself.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __fdividef(x, y) ((x) / (y))
#define __frcp_rn(x) (1.0f / (x))
#define __fsqrt_rn(x) sqrtf(x)
#define __frsqrt_rn(x) rsqrtf(x)
#define __fdiv_rn(x, y) ((x) / (y))
#define __fmul_rn(x, y) ((x) * (y))
#define __fadd_rn(x, y) ((x) + (y))
#define __fsub_rn(x, y) ((x) - (y))
#define __fmaf_rn(x, y, z) fmaf(x, y, z)

template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
    const std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
using std::isfinite;
using std::isinf;
using std::isnan;

// ---- memory ----

template <typename T>
inline T __ldg(const T* from) {
    return *from;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
// For integers only, because a sum of floats would depend on timing. Threads of one launch never
// run concurrently, but launches on several devices may.
template <typename T, typename V>
inline T atomicAdd(T* to, V value) {
    static_assert(std::is_integral_v<T>, "no floating-point atomics");
    return __atomic_fetch_add(to, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
template <typename T, typename V>
inline T atomicOr(T* to, V value) {
    static_assert(std::is_integral_v<T>);
    return __atomic_fetch_or(to, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
template <typename T, typename V>
inline T atomicMax(T* to, V value) {
    static_assert(std::is_integral_v<T>, "no floating-point atomics");
    const T before = *to;
    if (before < static_cast<T>(value)) *to = static_cast<T>(value);
    return before;
}
template <typename T, typename V>
inline T atomicMin(T* to, V value) {
    static_assert(std::is_integral_v<T>, "no floating-point atomics");
    const T before = *to;
    if (static_cast<T>(value) < before) *to = static_cast<T>(value);
    return before;
}

// ---- warps ----

namespace sim {

struct Shuffle {
    uint64_t value, result;
    unsigned source;
};

inline void exchange(void* (&arguments)[WARP]) {
    for (void* argument : arguments) {
        if (argument == nullptr) continue;
        auto* mine = static_cast<Shuffle*>(argument);
        const auto* other = static_cast<const Shuffle*>(arguments[mine->source]);
        // The value of an absent lane is undefined, so it is NaN here.
        mine->result = other == nullptr ? ~uint64_t{0} : other->value;
    }
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* name) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_arithmetic_v<T>);
    Shuffle argument{0, 0, source};
    memcpy(&argument.value, &value, sizeof value);
    warp_collective(mask, exchange, &argument, name);
    T result;
    memcpy(&result, &argument.result, sizeof result);
    return result;
}

struct Vote {
    bool value;
    unsigned result;
};

inline void vote(void* (&arguments)[WARP]) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (arguments[lane] != nullptr && static_cast<Vote*>(arguments[lane])->value) result |= 1u << lane;
    }
    for (void* argument : arguments) {
        if (argument != nullptr) static_cast<Vote*>(argument)->result = result;
    }
}

inline void meet(void* (&)[WARP]) {}

}  // namespace sim

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    sim::warp_collective(mask, sim::meet, nullptr, "__syncwarp");
}

// As the PTX ISA defines shfl: `width` splits the warp into segments. A source outside of the
// lane's segment is replaced by the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = sim::here().lane, segment = lane & ~(width - 1u);
    return sim::shuffle(mask, value, segment | (static_cast<unsigned>(source) & (width - 1u)), "__shfl_sync");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    const unsigned lane = sim::here().lane, source = lane ^ static_cast<unsigned>(with);
    const bool outside = source > (lane | (width - 1u));
    return sim::shuffle(mask, value, outside ? lane : source, "__shfl_xor_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const unsigned lane = sim::here().lane, source = lane + distance;
    const bool outside = source > (lane | (width - 1u));
    return sim::shuffle(mask, value, outside ? lane : source, "__shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    const unsigned lane = sim::here().lane;
    const bool outside = (lane & (width - 1u)) < distance;
    return sim::shuffle(mask, value, outside ? lane : lane - distance, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    sim::Vote argument{value, 0};
    sim::warp_collective(mask, sim::vote, &argument, "__ballot_sync");
    return argument.result;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, !value) == 0; }
