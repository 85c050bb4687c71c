// Reads the outputs of NMS for Gst-nvinfer: a custom bounding box parser for DeepStream 7.1 to 9.x.
//
// num_dets    int32 [1]     number of detections
// det_boxes   float [K, 4]  x0, y0, x1, y1 in pixels of the network input
// det_scores  float [K]
// det_classes int32 [K]
//
// Nothing outside the sizes that nvinfer states is read, whatever the tensors contain.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "nvdsinfer_custom_impl.h"

namespace {

// nvinfer opens this library before the engine, so this is where a plugin that the engine needs is loaded.
[[maybe_unused]] const bool kHasPlugin = [] {
  const char* path = std::getenv("Y7_PLUGIN");
  return path != nullptr && getPluginRegistry()->loadLibrary(path) != nullptr;
}();

// Returns the output of a name and type, or null. Its buffer has at least one element.
const NvDsInferLayerInfo* find(const std::vector<NvDsInferLayerInfo>& layers, const char* name,
                               NvDsInferDataType type) {
  for (const NvDsInferLayerInfo& layer : layers) {
    if (layer.layerName != nullptr && std::strcmp(layer.layerName, name) == 0) {
      const bool usable = layer.dataType == type && layer.buffer != nullptr && layer.inferDims.numElements > 0;
      return usable ? &layer : nullptr;
    }
  }
  return nullptr;
}

}  // namespace

extern "C" bool NvDsInferParseYolov7(const std::vector<NvDsInferLayerInfo>& layers, const NvDsInferNetworkInfo& network,
                                     const NvDsInferParseDetectionParams& params,
                                     std::vector<NvDsInferObjectDetectionInfo>& objects) {
  const NvDsInferLayerInfo* number = find(layers, "num_dets", INT32);
  const NvDsInferLayerInfo* boxes = find(layers, "det_boxes", FLOAT);
  const NvDsInferLayerInfo* scores = find(layers, "det_scores", FLOAT);
  const NvDsInferLayerInfo* classes = find(layers, "det_classes", INT32);
  if (number == nullptr || boxes == nullptr || scores == nullptr || classes == nullptr) {
    static std::atomic<bool> is_reported{false};  // once, and not for every frame
    if (!is_reported.exchange(true)) {
      std::fprintf(stderr,
                   "yolov7_parser: num_dets, det_boxes, det_scores or det_classes is missing or of another type\n");
    }
    return false;
  }
  const unsigned capacity =
      std::min({boxes->inferDims.numElements / 4, scores->inferDims.numElements, classes->inferDims.numElements});
  const int32_t found = *static_cast<const int32_t*>(number->buffer);
  const unsigned count = found < 0 ? 0 : std::min(static_cast<unsigned>(found), capacity);
  const size_t known = std::min<size_t>(params.numClassesConfigured, params.perClassPreclusterThreshold.size());
  const auto width = static_cast<float>(network.width), height = static_cast<float>(network.height);
  for (unsigned i = 0; i < count; ++i) {
    const int32_t id = static_cast<const int32_t*>(classes->buffer)[i];
    const float score = static_cast<const float*>(scores->buffer)[i];
    // A comparison with NaN is false, so such scores and boxes are left out.
    if (id < 0 || static_cast<size_t>(id) >= known || !(score >= params.perClassPreclusterThreshold[id])) {
      continue;
    }
    const float* box = static_cast<const float*>(boxes->buffer) + 4 * static_cast<size_t>(i);
    const float x0 = std::clamp(box[0], 0.0F, width), y0 = std::clamp(box[1], 0.0F, height);
    const float x1 = std::clamp(box[2], 0.0F, width), y1 = std::clamp(box[3], 0.0F, height);
    if (!(x1 > x0 && y1 > y0)) {
      continue;
    }
    NvDsInferObjectDetectionInfo object{};  // since 9.0 it has one more field, which stays 0
    object.classId = static_cast<unsigned>(id);
    object.left = x0;
    object.top = y0;
    object.width = x1 - x0;
    object.height = y1 - y0;
    object.detectionConfidence = std::min(score, 1.0F);
    objects.push_back(object);
  }
  return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseYolov7);
