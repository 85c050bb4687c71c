// What every kernel file needs to be launched: by nvcc on a GPU, or by a host compiler on an emulated one, whose
// headers then stand in for CUDA's own (tests/cuda_on_cpu).
#ifndef Y7_LAUNCH_H
#define Y7_LAUNCH_H

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"

// A variable in static shared memory, of a named type without constructors: Y7_SHARED(Scratch, scratch);
#ifdef __CUDACC__
#define Y7_SHARED(type, name) __shared__ type name
#else
#define Y7_SHARED(type, name) \
  static char name##_key;     \
  type& name = cuda_on_cpu::shared<type>(&name##_key)
#endif

// For a large parameter struct that is indexed at run time: keeps it in constant memory instead of copying it.
#if !defined(__CUDACC__) || CUDART_VERSION < 11070
#define Y7_GRID_CONSTANT
#else
#define Y7_GRID_CONSTANT __grid_constant__
#endif

#ifdef __USE_FAST_MATH__
#error "The kernels promise the results of IEEE arithmetic: compile without -use_fast_math."
#endif

namespace y7 {

// Y7_OK, or Y7_CUDA_ERROR after remembering the error for y7_status_text (status.cu).
int32_t status_of(cudaError_t error);

template <class T>
struct Exactly {  // keeps template deduction away from a parameter
  using type = T;
};

// Queues kernel(arguments...) on the stream. grid.x up to 2^31 - 1, grid.y and grid.z up to 65535.
template <class... Parameters>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
               typename Exactly<Parameters>::type... arguments) {
#ifdef __CUDACC__
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return status_of(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0,
                                    static_cast<cudaStream_t>(stream)));
#else
  return status_of(cuda_on_cpu::launch(grid, block, static_cast<cudaStream_t>(stream), [&] { kernel(arguments...); }));
#endif
}

}  // namespace y7

#endif  // Y7_LAUNCH_H
