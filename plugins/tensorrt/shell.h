// What the shells of all TensorRT versions share: attributes, formats, shapes, and the call of the kernels.
#ifndef Y7_SHELL_H
#define Y7_SHELL_H

#include <vector>

#include "params.h"
#include "tensorrt.h"

namespace y7 {

constexpr int32_t kThresholds = 2;  // inputs behind the heads: conf_threshold, iou_threshold
constexpr int32_t kOutputs = 5;     // num_dets, det_boxes, det_scores, det_classes, overflow

// The attributes as TensorRT passes them around; points into the parameters it was made of.
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

// The checked parameters that a collection of fields asks for; fields left out have their defaults.
// Throws PluginError, naming the field.
NodeParams params_of(const nvinfer1::PluginFieldCollection* fields);

// Whether the plugin takes `asked` at position `pos` of inputs and outputs; `first` is the tensor at position 0.
// Heads are float32 or float16, all of one type, each linear or channels-last: TensorRT times what is cheaper.
bool supports(const NodeParams& params, int32_t pos, const nvinfer1::PluginTensorDesc& asked,
              const nvinfer1::PluginTensorDesc& first, int32_t inputs, int32_t outputs);

nvinfer1::DataType output_type(int32_t index);

// Shape of an output. Throws PluginError where the inputs do not fit the attributes.
nvinfer1::DimsExprs output_shape(const NodeParams& params, int32_t index, const nvinfer1::DimsExprs* inputs,
                                 int32_t count, nvinfer1::IExprBuilder& builder);

// Throws PluginError unless the largest inputs of a profile fit the attributes and the kernels.
void check_profile(const NodeParams& params, const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count);

// Bytes of scratch memory for a batch.
size_t workspace_bytes(const NodeParams& params, int64_t batch, nvinfer1::DataType type);

// Queues the kernels. Throws PluginError with what they answered.
void enqueue(const NodeParams& params, const nvinfer1::PluginTensorDesc* described, const void* const* inputs,
             void* const* outputs, void* workspace, cudaStream_t stream);

}  // namespace y7

#endif  // Y7_SHELL_H
