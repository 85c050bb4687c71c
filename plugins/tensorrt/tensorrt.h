// TensorRT's headers, and the plugin interface to implement for them.
#ifndef Y7_TENSORRT_H
#define Y7_TENSORRT_H

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

// TensorRT-RTX has its own version numbers, from 1, and the interfaces of TensorRT 10 and later.
#if NV_TENSORRT_MAJOR >= 10 || defined(TRT_MAJOR_RTX)
#define Y7_PLUGIN_V3 1
#elif NV_TENSORRT_MAJOR == 9 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 5)
#define Y7_PLUGIN_V3 0
#else
#error "TensorRT 8.5 or later is required"
#endif

#endif  // Y7_TENSORRT_H
