// Status codes and their descriptions.
#include "launch.cuh"

namespace y7 {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

int32_t status_of(cudaError_t error) {
  if (error == cudaSuccess) {
    return Y7_OK;
  }
  last_error = error;
  return Y7_CUDA_ERROR;
}

#if Y7_CAN_OVERLAP
// PTX of an older architecture that the driver compiled for this GPU does not wait.
bool can_overlap(const void* kernel) {
  int driver = 0;
  cudaFuncAttributes code = {};
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaFuncGetAttributes(&code, kernel) != cudaSuccess) {
    cudaGetLastError();  // the launch reports it
    return false;
  }
  return driver >= 12030 && code.ptxVersion >= 90;
}
#endif

}  // namespace y7

extern "C" const char* y7_status_text(int32_t status) {
  switch (status) {
    case Y7_OK:
      return "no error";
    case Y7_BAD_ARGUMENT:
      return "an argument is out of range, null or misaligned";
    case Y7_WORKSPACE_TOO_SMALL:
      return "the workspace is smaller than the size function asks for";
    case Y7_CUDA_ERROR:
      return cudaGetErrorString(y7::last_error);
    default:
      return "unknown status";
  }
}

extern "C" int32_t y7_kernels_abi(void) { return Y7_KERNELS_ABI; }
