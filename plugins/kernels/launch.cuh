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

// Whether a kernel may start while the one before it ends (programmatic dependent launch). The two need compute
// capability 9.0, and CUDA 12.3 to be captured in a graph.
#ifndef Y7_OVERLAP
#define Y7_OVERLAP 1
#endif
#if Y7_OVERLAP && defined(__CUDACC__) && CUDART_VERSION >= 12030
#define Y7_CAN_OVERLAP 1
#else
#define Y7_CAN_OVERLAP 0
#endif

#ifdef __USE_FAST_MATH__
#error "The kernels require IEEE arithmetic: compile without -use_fast_math."
#endif

namespace y7 {

// Returns Y7_OK, or Y7_CUDA_ERROR after storing the error for y7_status_text (status.cu).
int32_t status_of(cudaError_t error);

// Returns whether code of the kernel that waits for the kernel before it is what this GPU executes (status.cu).
bool can_overlap(const void* kernel);

// Waits until the kernels before this one in the stream have ended and their writes are visible. A kernel of
// `launch_overlapping` calls it before it reads what they write; elsewhere it does nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if Y7_CAN_OVERLAP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel of `launch_overlapping` start when every block of this one has called it or has ended.
__device__ __forceinline__ void allow_next_kernel() {
#if Y7_CAN_OVERLAP && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

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

// The same, after another kernel: where the GPU can do that, the start of this kernel overlaps with the end of that
// one.
template <class... Parameters>
int32_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
                           typename NonDeduced<Parameters>::type... arguments) {
#if Y7_CAN_OVERLAP
  const auto function = reinterpret_cast<const void*>(kernel);
  if (can_overlap(function)) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = 1;
    void* pointers[] = {static_cast<void*>(&arguments)...};
    return status_of(cudaLaunchKernelExC(&config, function, pointers));
  }
#endif
  return launch(kernel, grid, block, stream, arguments...);
}

}  // namespace y7

#endif  // Y7_LAUNCH_CUH
