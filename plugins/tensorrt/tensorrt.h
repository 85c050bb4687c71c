// TensorRT's headers, and which shell they ask for.
#ifndef Y7_TENSORRT_H
#define Y7_TENSORRT_H

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

// TensorRT-RTX counts its own versions from 1 and has the interfaces of TensorRT 10 and later.
#if NV_TENSORRT_MAJOR >= 10 || defined(TRT_MAJOR_RTX)
#define Y7_SHELL_V3 1
#elif NV_TENSORRT_MAJOR == 9 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 5)
#define Y7_SHELL_V3 0
#else
#error "TensorRT 8.5 or later is needed"
#endif

#endif  // Y7_TENSORRT_H
