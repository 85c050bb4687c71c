// Kernels with the mistakes that the emulation promises to find, one each, and one without.
#include "launch.h"

namespace {

using Numbers = float[64];

// Every thread reads its neighbour's number.
__global__ void neighbour(float* x, int fault) {
  Y7_SHARED(Numbers, numbers);
  const int t = int(threadIdx.x);
  numbers[t] = x[t];
  if (fault == 1) return void(x[t] = numbers[(t + 1) % 64]);      // no barrier
  if (fault == 2 && t < 3) return;                                // some threads never reach it
  if (fault == 3) numbers[t + 1] = x[t];                          // beyond the end
  if (fault == 4 && t % 32 < 16) (void)__ballot_sync(~0u, 1);     // half of the lanes that the mask names
  if (fault == 5 && t % 32 < 16) (void)__shfl_sync(0xffffu, t, 20);  // a lane outside the mask
  if (fault == 6 && t % 32 == 7) __syncwarp(1);                   // a mask without the thread itself
  if (fault == 7 && t < 32) __syncwarp();                         // allowed: one warp for itself
  if (fault == 8) return void(t < 32 ? __syncthreads() : void(__syncthreads_or(1)));  // two kinds of barrier
  __syncthreads();
  x[t] = numbers[(t + 1) % 64];
}

}  // namespace

extern "C" int32_t y7_neighbour(float* x, int32_t fault) {
  return y7::launch(neighbour, dim3(1), dim3(64), nullptr, x, fault);
}
