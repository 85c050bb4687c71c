// A kernel with one of the errors that the emulation detects, chosen by `fault`; 0, 7 and 10 are correct, and 9, 11 and
// 12 only the observer of memory accesses detects.
#include "launch.cuh"

namespace {

using Numbers = float[64];

// Every thread reads the number of its neighbor.
__global__ void neighbour(float* x, int fault) {
  Y7_SHARED(Numbers, numbers);
  const int t = int(threadIdx.x);
  numbers[t] = x[t];
  if (fault == 1) {
    return void(x[t] = numbers[(t + 1) % 64]);  // no barrier
  }
  if (fault == 2 && t < 3) {
    return;  // some threads do not reach the barrier
  }
  if (fault == 3) {
    numbers[t + 1] = x[t];  // beyond the end
  }
  if (fault == 4 && t % 32 < 16) {
    (void)__ballot_sync(~0u, 1);  // half of the lanes of the mask
  }
  if (fault == 5 && t % 32 < 16) {
    (void)__shfl_sync(0xffffu, t, 20);  // a lane outside the mask
  }
  if (fault == 6 && t % 32 == 7) {
    __syncwarp(1);  // a mask without the thread itself
  }
  if (fault == 7 && t < 32) {
    __syncwarp();  // correct: one warp alone
  }
  if (fault == 8) {
    return void(t < 32 ? __syncthreads() : void(__syncthreads_or(1)));  // two kinds of barrier
  }
  if (fault == 9) {
    (void)__shfl_sync(~0u, t, 0);
    return void(x[t] = numbers[t ^ 1]);  // of the same warp, but a shuffle orders nothing
  }
  if (fault == 10) {
    __syncwarp();
    return void(x[t] = numbers[t ^ 1]);  // correct: of the same warp
  }
  if (fault == 11) {
    x[0] = 1;  // all threads
  }
  if (fault == 12) {
    atomicAdd(&numbers[0], 0.0f);
    return void(x[t] = numbers[0]);
  }
  __syncthreads();
  x[t] = numbers[(t + 1) % 64];
}

}  // namespace

extern "C" int32_t y7_neighbour(float* x, int32_t fault) {
  return y7::launch(neighbour, dim3(1), dim3(64), nullptr, x, fault);
}
