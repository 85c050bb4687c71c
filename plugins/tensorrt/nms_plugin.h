// Common code of the plugin classes for all TensorRT versions: attributes, formats, shapes, and the call of the
// kernels.
#ifndef Y7_NMS_PLUGIN_H
#define Y7_NMS_PLUGIN_H

#include <vector>

#include "params.h"
#include "tensorrt.h"

namespace y7 {

// Return values of plugin methods.
constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;

constexpr int32_t kThresholds = 4;  // inputs after the head maps, see kThresholdNames
constexpr int32_t kOutputs = 5;     // num_dets, det_boxes, det_scores, det_classes, overflow

// The attributes as a PluginFieldCollection, which points into the NodeParams it was made from.
class FieldList {
 public:
  explicit FieldList(NodeParams& params);
  FieldList(const FieldList&) = delete;
  FieldList& operator=(const FieldList&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Returns the validated parameters of a collection of fields; missing fields have their defaults. Throws PluginError,
// which names the field.
NodeParams parse_fields(const nvinfer1::PluginFieldCollection* fields);

// Returns whether the plugin supports `desc` at position `pos` of inputs and outputs; `first` is the tensor at position
// 0. Head maps are float32 or float16, all of one type, each NCHW or NHWC: TensorRT times which is faster.
bool supports_format(const NodeParams& params, int32_t pos, const nvinfer1::PluginTensorDesc& desc,
                     const nvinfer1::PluginTensorDesc& first, int32_t inputs, int32_t outputs);

nvinfer1::DataType output_type(int32_t index);

// Returns the shape of an output. Throws PluginError if the inputs do not match the attributes.
nvinfer1::DimsExprs output_shape(const NodeParams& params, int32_t index, const nvinfer1::DimsExprs* inputs,
                                 int32_t count, nvinfer1::IExprBuilder& builder);

// Throws PluginError if the maximum shapes of a profile do not match the attributes or the limits of the kernels.
void check_profile(const NodeParams& params, const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count);

// Returns the workspace size in bytes for a batch; -1 is an unknown batch.
size_t workspace_bytes(const NodeParams& params, int64_t batch, nvinfer1::DataType type);

// Enqueues the kernels. Throws PluginError with the status that they return.
void enqueue(const NodeParams& params, const nvinfer1::PluginTensorDesc* desc, const void* const* inputs,
             void* const* outputs, void* workspace, cudaStream_t stream);

}  // namespace y7

#endif  // Y7_NMS_PLUGIN_H
