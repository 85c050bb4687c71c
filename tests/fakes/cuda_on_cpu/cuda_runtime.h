// The CUDA execution model on one CPU thread, for tests of kernels on machines without a GPU.
//
// The threads of a block are fibers. A fiber runs alone until it waits: at a barrier, at a warp operation, sometimes at
// an atomic. A seed determines which fiber runs next, the order of the blocks and the garbage in shared memory. So a
// missing barrier gives results that differ between seeds. In half of the phases between two barriers the warps run one
// after the other, in random order, so that one is far ahead of another. Each of these errors ends the launch with
// cudaErrorLaunchFailure and a message: a barrier that some threads do not reach, a warp operation whose mask contains
// a lane that waits elsewhere, a shuffle from a lane that does not participate, a write beyond the end of a shared
// variable. More than 48 KiB of shared memory ends the process. Compiled with accesses.cpp and -fsanitize=thread, a
// race is such an error, too.
//
// Launches from several host threads run one after the other.
//
// Not emulated: concurrent threads, weak memory order, dynamic shared memory, streams (a launch runs synchronously) and
// alignment faults (-fsanitize=undefined finds those).
#ifndef CUDA_ON_CPU_CUDA_RUNTIME_H
#define CUDA_ON_CPU_CUDA_RUNTIME_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define CUDA_ON_CPU_VECTOR(base, name)                                        \
  struct name##2 { base x, y; };                                              \
  struct name##3 { base x, y, z; };                                           \
  struct alignas(4 * sizeof(base)) name##4 { base x, y, z, w; };              \
  inline name##2 make_##name##2(base x, base y) { return {x, y}; }            \
  inline name##3 make_##name##3(base x, base y, base z) { return {x, y, z}; } \
  inline name##4 make_##name##4(base x, base y, base z, base w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float)
CUDA_ON_CPU_VECTOR(int, int)
CUDA_ON_CPU_VECTOR(unsigned, uint)
CUDA_ON_CPU_VECTOR(unsigned char, uchar)
#undef CUDA_ON_CPU_VECTOR

// --- host API ------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
typedef struct CUstream_st* cudaStream_t;

const char* cudaGetErrorString(cudaError_t error);
// Device memory is host memory.
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
namespace cuda_on_cpu {
void count_memset();
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t = nullptr) {
  cuda_on_cpu::count_memset();
  memset(data, value, bytes);
  return cudaSuccess;
}

// --- device API ----------------------------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

enum class Operation { barrier, barrier_count, barrier_and, barrier_or, warp_sync, ballot, index, up, down, exclusive };

// Runs body once per thread of the grid, one block after the other.
cudaError_t launch_grid(dim3 grid, dim3 block, void (*body)(void*), void* argument);
template <class Body>
cudaError_t launch(dim3 grid, dim3 block, cudaStream_t, Body body) {
  return launch_grid(grid, block, [](void* pointer) { (*static_cast<Body*>(pointer))(); }, &body);
}

// Returns the block's variable with this key, initially filled with garbage.
void* shared_bytes(const void* key, size_t bytes, size_t alignment);
template <class T>
T& shared(const void* key) {
  static_assert(std::is_trivially_default_constructible<T>::value, "CUDA allows no constructors in shared memory");
  return *static_cast<T*>(shared_bytes(key, sizeof(T), alignof(T)));
}

// Waits until every thread of the block (barriers) or of the mask arrives, and returns the operation's result.
uint64_t synchronize(Operation operation, unsigned mask, uint64_t value, unsigned lane, unsigned width);
// Sometimes switches to other threads first.
void maybe_yield();

#if defined(__SANITIZE_THREAD__) || defined(CUDA_ON_CPU_OBSERVED)
void observe_atomic(const void* address, size_t bytes);
#define CUDA_ON_CPU_UNOBSERVED __attribute__((no_sanitize_thread))
#else
inline void observe_atomic(const void*, size_t) {}
#define CUDA_ON_CPU_UNOBSERVED
#endif

template <class T>
T exchange(Operation operation, unsigned mask, T value, unsigned lane, unsigned width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffles carry up to 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = synchronize(operation, mask, bits, lane, width);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::synchronize(cuda_on_cpu::Operation::barrier, ~0u, 0, 0, 32); }
inline int __syncthreads_count(int x) {
  return int(cuda_on_cpu::synchronize(cuda_on_cpu::Operation::barrier_count, ~0u, x != 0, 0, 32));
}
inline int __syncthreads_and(int x) {
  return int(cuda_on_cpu::synchronize(cuda_on_cpu::Operation::barrier_and, ~0u, x != 0, 0, 32));
}
inline int __syncthreads_or(int x) {
  return int(cuda_on_cpu::synchronize(cuda_on_cpu::Operation::barrier_or, ~0u, x != 0, 0, 32));
}
inline void __syncwarp(unsigned mask = ~0u) {
  cuda_on_cpu::synchronize(cuda_on_cpu::Operation::warp_sync, mask, 0, 0, 32);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return unsigned(cuda_on_cpu::synchronize(cuda_on_cpu::Operation::ballot, mask, x != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, !x) == 0; }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Operation::index, mask, value, unsigned(lane), unsigned(width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Operation::up, mask, value, delta, unsigned(width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Operation::down, mask, value, delta, unsigned(width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_on_cpu::exchange(cuda_on_cpu::Operation::exclusive, mask, value, unsigned(lanes), unsigned(width));
}

inline void __threadfence() {}
inline void __threadfence_block() {}

#define CUDA_ON_CPU_ATOMIC(name, result)                                                \
  template <class T>                                                                    \
  CUDA_ON_CPU_UNOBSERVED T name(T* address, typename std::common_type<T>::type value) { \
    cuda_on_cpu::maybe_yield();                                                         \
    cuda_on_cpu::observe_atomic(address, sizeof(T));                                    \
    const T old = *address;                                                             \
    *address = T(result);                                                               \
    return old;                                                                         \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicAnd, (old & value))
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)
#undef CUDA_ON_CPU_ATOMIC

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline int __float2int_rd(float x) { return int(floorf(x)); }
inline int __float2int_ru(float x) { return int(ceilf(x)); }
inline int __float2int_rz(float x) { return int(x); }

template <class To, class From>
To cuda_on_cpu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return cuda_on_cpu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_bits<float>(x); }

#endif  // CUDA_ON_CPU_CUDA_RUNTIME_H
