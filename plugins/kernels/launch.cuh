// Kernel launches, for nvcc and a GPU or for a host compiler and the CPU emulation of CUDA, whose headers then replace
// CUDA's own (tests/fakes/cuda_on_cpu).
#ifndef Y7_LAUNCH_CUH
#define Y7_LAUNCH_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"

// Declares a variable in static shared memory, of a named type without constructors: Y7_SHARED(Scratch, scratch);
#ifdef __CUDACC__
#define Y7_SHARED(type, name) __shared__ type name
#else
#define Y7_SHARED(type, name) \
  static char name##_key;     \
  type& name = cuda_on_cpu::shared<type>(&name##_key)
#endif

// For a large parameter struct that is indexed at run time: keeps it in constant memory instead of copying it to local
// memory. CUDA 11.7 and later.
#if !defined(__CUDACC__) || CUDART_VERSION < 11070
#define Y7_GRID_CONSTANT
#else
#define Y7_GRID_CONSTANT __grid_constant__
#endif

#ifdef __USE_FAST_MATH__
#error "The kernels require IEEE arithmetic: compile without -use_fast_math."
#endif

namespace y7 {

// Returns Y7_OK, or Y7_CUDA_ERROR after storing the error for y7_status_text (status.cu).
int32_t status_of(cudaError_t error);

template <class T>
struct NonDeduced {  // excludes a parameter from template argument deduction
  using type = T;
};

// Enqueues kernel(arguments...) on the stream. grid.x is at most 2^31 - 1, grid.y and grid.z are at most 65535.
template <class... Parameters>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
               typename NonDeduced<Parameters>::type... arguments) {
#ifdef __CUDACC__
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return status_of(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0,
                                    static_cast<cudaStream_t>(stream)));
#else
  return status_of(cuda_on_cpu::launch(grid, block, static_cast<cudaStream_t>(stream), [&] { kernel(arguments...); }));
#endif
}

}  // namespace y7

#endif  // Y7_LAUNCH_CUH
