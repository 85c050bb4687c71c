// A description of this library, which programs can read without TensorRT.

#include <cuda_runtime_api.h>

#include "params.h"

#ifdef Y7_WITH_TENSORRT
#include "tensorrt.h"
#define Y7_TEXT_OF(value) #value
#define Y7_TEXT(value) Y7_TEXT_OF(value)
#ifdef TRT_MAJOR_RTX
#define Y7_HEADERS_PRODUCT "tensorrt_rtx"
#else
#define Y7_HEADERS_PRODUCT "tensorrt"
#endif
#define Y7_HEADERS Y7_TEXT(NV_TENSORRT_MAJOR) "." Y7_TEXT(NV_TENSORRT_MINOR) "." Y7_TEXT(NV_TENSORRT_PATCH)
constexpr const char* kAbi = Y7_PLUGIN_V3 ? "v3" : "v2";
#else
#define Y7_HEADERS_PRODUCT ""
#define Y7_HEADERS ""
constexpr const char* kAbi = "kernels";
#endif

// Returns a JSON object. For `compute_capabilities` the library contains machine code, for those of `exact` code that
// runs on no other GPU; the code of `ptx` is compiled by the driver on first use.
extern "C" __attribute__((visibility("default"))) const char* y7_plugin_description() {
  static const std::string text =
      std::string("{\"name\": \"") + y7::kPluginName + "\", \"version\": \"" + y7::kPluginVersion +
      "\", \"namespace\": \"" + y7::kPluginNamespace + "\", \"abi\": \"" + kAbi +
      "\", \"kernels_abi\": " + std::to_string(y7_kernels_abi()) +
      ", \"compute_capabilities\": [" Y7_COMPUTE_CAPABILITIES "], \"exact\": [" Y7_EXACT "], \"ptx\": [" Y7_PTX
      "], \"cuda\": \"" +
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
      "\", \"headers\": \"" Y7_HEADERS "\", \"product\": \"" Y7_HEADERS_PRODUCT "\"}";
  return text.c_str();
}
