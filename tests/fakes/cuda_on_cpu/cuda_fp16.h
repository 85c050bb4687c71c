// IEEE half precision for the emulated kernels: storage and exact conversions only.
#ifndef CUDA_ON_CPU_CUDA_FP16_H
#define CUDA_ON_CPU_CUDA_FP16_H

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000) << 16;
  const uint32_t exponent = (half.bits >> 10) & 31, mantissa = half.bits & 1023;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}

// Rounds to nearest, ties to even.
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return {uint16_t(sign | 0x7fff)};
  }
  if (magnitude >= 0x477ff000) {
    return {uint16_t(sign | 0x7c00)};  // 65520 and more
  }
  if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24
    return {uint16_t(sign | uint16_t(rintf(__uint_as_float(magnitude) * 16777216.0f)))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

#endif  // CUDA_ON_CPU_CUDA_FP16_H
