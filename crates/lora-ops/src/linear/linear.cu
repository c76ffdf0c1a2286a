// The bias of a linear layer.
#include "kernel.cuh"

// Every row of y [tokens, features] becomes bias [features]. A block writes 256 features of 16
// rows.
template <typename T>
__device__ void bias_rows(const float* bias, T* y, unsigned tokens, unsigned features) {
  const unsigned feature = blockIdx.x * 256 + threadIdx.x;
  if (feature >= features) return;
  const T value = from_f32<T>(bias[feature]);
  const unsigned first = blockIdx.y * 16;
  const unsigned end = first + 16 < tokens ? first + 16 : tokens;
  for (unsigned row = first; row < end; ++row) y[size_t(row) * features + feature] = value;
}

KERNEL(256, linear_bias_f32, const float* bias, float* y, unsigned tokens, unsigned features) {
  bias_rows(bias, y, tokens, features);
}

KERNEL(256, linear_bias_bf16, const float* bias, bf16* y, unsigned tokens, unsigned features) {
  bias_rows(bias, y, tokens, features);
}
