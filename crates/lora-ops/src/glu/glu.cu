// Gated activations. Both activations are g sigmoid(a(g)) for an inner function a. A tensor is
// processed as one long row; a thread computes one run of it.
#include "rows.cuh"

// a(g) and g a'(g).
struct Inner {
    float value, slope;
};

struct Silu {
    static __device__ __forceinline__ Inner inner(float g) { return {g, g}; }
};

struct GeluTanh {
    static __device__ __forceinline__ Inner inner(float g) {
        const float twice_root = 1.5957691216f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
        // Beyond these gates the sigmoid is 0 or 1, and their powers would overflow.
        g = g < -100.0f ? -100.0f : g > 100.0f ? 100.0f : g;
        const float scaled = twice_root * g, bent = cubic * g * g;
        return {scaled * (1.0f + bent), scaled * (1.0f + 3.0f * bent)};
    }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename Activation, bool WIDE, typename T>
__device__ __forceinline__ void forward_run(T* y, const T* gate, const T* up, size_t count) {
    constexpr unsigned N = RUN<T>;
    const Run<N> g = load_run<WIDE, N>(gate, count), u = load_run<WIDE, N>(up, count);
    Run<N> product;
#pragma unroll
    for (unsigned k = 0; k < N; k++)
        product.at[k] = g.at[k] * sigmoid(Activation::inner(g.at[k]).value) * u.at[k];
    store_run<WIDE>(y, product, count);
}

template <typename Activation, typename T>
__device__ __forceinline__ void forward(T* y, const T* gate, const T* up, size_t elements) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= elements) return;
    if (elements - at >= N && aligned(y, gate, up)) {
        forward_run<Activation, true>(y + at, gate + at, up + at, N);
    } else {
        forward_run<Activation, false>(y + at, gate + at, up + at, elements - at);
    }
}

template <typename Activation, bool WIDE, typename T>
__device__ __forceinline__ void backward_run(T* dgate, T* dup, const T* gate, const T* up, const T* dy,
                                             size_t count) {
    constexpr unsigned N = RUN<T>;
    const Run<N> g = load_run<WIDE, N>(gate, count), u = load_run<WIDE, N>(up, count),
                 d = load_run<WIDE, N>(dy, count);
    Run<N> of_gate, of_up;
#pragma unroll
    for (unsigned k = 0; k < N; k++) {
        const Inner inner = Activation::inner(g.at[k]);
        const float s = sigmoid(inner.value);
        of_up.at[k] = d.at[k] * (g.at[k] * s);
        of_gate.at[k] = d.at[k] * u.at[k] * (s * (1.0f + inner.slope * (1.0f - s)));
    }
    store_run<WIDE>(dgate, of_gate, count);
    store_run<WIDE>(dup, of_up, count);
}

template <typename Activation, typename T>
__device__ __forceinline__ void backward(T* dgate, T* dup, const T* gate, const T* up, const T* dy,
                                         size_t elements) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= elements) return;
    if (elements - at >= N && aligned(dgate, dup, gate, up, dy)) {
        backward_run<Activation, true>(dgate + at, dup + at, gate + at, up + at, dy + at, N);
    } else {
        backward_run<Activation, false>(dgate + at, dup + at, gate + at, up + at, dy + at, elements - at);
    }
}

// GRADIENT: y is the gradient of x from that of the activation, dy. Otherwise y is the activation.
template <typename Activation, bool GRADIENT, bool WIDE, typename T>
__device__ __forceinline__ void activation_run(T* y, const T* x, const T* dy, size_t count) {
    constexpr unsigned N = RUN<T>;
    const Run<N> g = load_run<WIDE, N>(x, count), d = load_run<WIDE, N>(dy, count);
    Run<N> of_y;
#pragma unroll
    for (unsigned k = 0; k < N; k++) {
        const Inner inner = Activation::inner(g.at[k]);
        const float s = sigmoid(inner.value);
        of_y.at[k] = GRADIENT ? d.at[k] * (s * (1.0f + inner.slope * (1.0f - s))) : g.at[k] * s;
    }
    store_run<WIDE>(y, of_y, count);
}

template <typename Activation, bool GRADIENT, typename T>
__device__ __forceinline__ void activation(T* y, const T* x, const T* dy, size_t elements) {
    constexpr unsigned N = RUN<T>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= elements) return;
    if (elements - at >= N && aligned(y, x, dy)) {
        activation_run<Activation, GRADIENT, true>(y + at, x + at, dy + at, N);
    } else {
        activation_run<Activation, GRADIENT, false>(y + at, x + at, dy + at, elements - at);
    }
}

KERNEL(256, glu_forward_silu_f32, float* y, const float* gate, const float* up, size_t elements) {
    forward<Silu>(y, gate, up, elements);
}
KERNEL(256, glu_forward_silu_bf16, bf16* y, const bf16* gate, const bf16* up, size_t elements) {
    forward<Silu>(y, gate, up, elements);
}
KERNEL(256, glu_forward_gelu_tanh_f32, float* y, const float* gate, const float* up, size_t elements) {
    forward<GeluTanh>(y, gate, up, elements);
}
KERNEL(256, glu_forward_gelu_tanh_bf16, bf16* y, const bf16* gate, const bf16* up, size_t elements) {
    forward<GeluTanh>(y, gate, up, elements);
}

KERNEL(256, glu_backward_silu_f32, float* dgate, float* dup, const float* gate, const float* up,
       const float* dy, size_t elements) {
    backward<Silu>(dgate, dup, gate, up, dy, elements);
}
KERNEL(256, glu_backward_silu_bf16, bf16* dgate, bf16* dup, const bf16* gate, const bf16* up, const bf16* dy,
       size_t elements) {
    backward<Silu>(dgate, dup, gate, up, dy, elements);
}
KERNEL(256, glu_backward_gelu_tanh_f32, float* dgate, float* dup, const float* gate, const float* up,
       const float* dy, size_t elements) {
    backward<GeluTanh>(dgate, dup, gate, up, dy, elements);
}
KERNEL(256, glu_backward_gelu_tanh_bf16, bf16* dgate, bf16* dup, const bf16* gate, const bf16* up,
       const bf16* dy, size_t elements) {
    backward<GeluTanh>(dgate, dup, gate, up, dy, elements);
}

#define ACTIVATION(Type, name, T, dtype)                                                                \
    KERNEL(256, glu_activation_forward_##name##_##dtype, T* y, const T* x, size_t elements) {           \
        activation<Type, false>(y, x, x, elements);                                                     \
    }                                                                                                   \
    KERNEL(256, glu_activation_backward_##name##_##dtype, T* dx, const T* x, const T* dy,               \
           size_t elements) {                                                                           \
        activation<Type, true>(dx, x, dy, elements);                                                    \
    }
ACTIVATION(Silu, silu, float, f32)
ACTIVATION(Silu, silu, bf16, bf16)
ACTIVATION(GeluTanh, gelu_tanh, float, f32)
ACTIVATION(GeluTanh, gelu_tanh, bf16, bf16)
