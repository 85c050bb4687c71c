// The interface of a custom bounding box parser, written from the API reference of DeepStream 7.0 to 9.1.
#pragma once

#include <vector>

#include "NvInfer.h"
#include "nvdsinfer.h"

typedef struct {
  unsigned int numClassesConfigured;
  std::vector<float> perClassPreclusterThreshold;
  std::vector<float> perClassPostclusterThreshold;
} NvDsInferParseDetectionParams;

typedef bool (*NvDsInferParseCustomFunc)(const std::vector<NvDsInferLayerInfo>& outputLayersInfo,
                                         const NvDsInferNetworkInfo& networkInfo,
                                         const NvDsInferParseDetectionParams& detectionParams,
                                         std::vector<NvDsInferObjectDetectionInfo>& objectList);

// The original declares a function that is never called; this one has the same effect, a check of the type.
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(function) static_assert(NvDsInferParseCustomFunc{function} != nullptr)
