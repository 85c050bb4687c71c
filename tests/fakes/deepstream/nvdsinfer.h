// The types of Gst-nvinfer's parser interface, written from the API reference of DeepStream 7.0 to 9.1.
// DEEPSTREAM selects the release: 9.0 added a field to the objects.
#pragma once

#define NVDSINFER_MAX_DIMS 8

typedef struct {
  unsigned int numDims;
  unsigned int d[NVDSINFER_MAX_DIMS];
  unsigned int numElements;
} NvDsInferDims;

typedef enum {
  FLOAT = 0,
  HALF = 1,
  INT8 = 2,
  INT32 = 3,
#if DEEPSTREAM >= 90
  INT64 = 4,
  UINT8 = 5,
#endif
} NvDsInferDataType;

typedef struct {
  NvDsInferDataType dataType;
  union {
    NvDsInferDims inferDims;
    NvDsInferDims dims;
  };
  int bindingIndex;
  const char* layerName;
  void* buffer;
  int isInput;
} NvDsInferLayerInfo;

typedef struct {
  unsigned int width;
  unsigned int height;
  unsigned int channels;
} NvDsInferNetworkInfo;

typedef struct {
  unsigned int classId;
  float left;
  float top;
  float width;
  float height;
  float detectionConfidence;
#if DEEPSTREAM >= 90
  float rotation_angle;
#endif
} NvDsInferObjectDetectionInfo;
