#include "nms_plugin.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <string>

namespace y7 {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr const char* kThresholdNames[kThresholds] = {"conf_threshold", "iou_threshold", "multi_label",
                                                      "class_agnostic"};
constexpr int32_t kHwc8Channels = 8;  // kHWC8 pads the channels to a multiple of this
// Head maps after these have the format of the first: TensorRT tries at most 100 combinations, and 2^4 * 2 are enough.
constexpr int32_t kFreeFormatLevels = 4;

bool is_parser_attribute(const char* name) {
  // Attributes of the node that identify the plugin; some callers pass them to it.
  return std::strcmp(name, "plugin_version") == 0 || std::strcmp(name, "plugin_namespace") == 0;
}

void check_input_count(const NodeParams& params, int32_t count) {
  if (count != params.levels() + kThresholds) {
    throw_plugin_error(
        "the node has ", count, " inputs; attribute strides has ", params.levels(),
        " levels, so it must have as many head maps, then conf_threshold, iou_threshold, multi_label and "
        "class_agnostic: ",
        params.levels() + kThresholds, ".");
  }
}

// Dimensions of -1 are unknown.
void check_head_map(const NodeParams& params, int32_t level, const int64_t* dims, int32_t rank) {
  if (rank != 4) {
    throw_plugin_error("head map ", level, " has ", rank,
                       " dimensions; it must have 4: batch, channels, height, width.");
  }
  if (dims[1] >= 0 && dims[1] != params.channels()) {
    throw_plugin_error("head map ", level, " has ", dims[1], " channels; attribute classes is ", params.classes,
                       ", which requires ", params.channels(), " (", Y7_ANCHORS, " * (5 + classes)).");
  }
}

void check_threshold(int32_t index, const int64_t* dims, int32_t rank) {
  int64_t volume = 1;
  for (int32_t i = 0; i < rank; ++i) {
    volume *= dims[i];
  }
  if (rank < 0 || (volume >= 0 && volume != 1)) {
    throw_plugin_error(kThresholdNames[index], " has ", volume, " values; it must have one.");
  }
}

std::array<int64_t, nvinfer1::Dims::MAX_DIMS> known_dims(const nvinfer1::DimsExprs& shape) {
  std::array<int64_t, nvinfer1::Dims::MAX_DIMS> dims{};
  for (int32_t i = 0; i < shape.nbDims; ++i) {
    dims[i] = shape.d[i]->isConstant() ? static_cast<int64_t>(shape.d[i]->getConstantValue()) : -1;
  }
  return dims;
}

std::array<int64_t, nvinfer1::Dims::MAX_DIMS> known_dims(const nvinfer1::Dims& shape) {
  std::array<int64_t, nvinfer1::Dims::MAX_DIMS> dims{};
  std::copy(shape.d, shape.d + std::max(0, static_cast<int>(shape.nbDims)), dims.begin());
  return dims;
}

template <typename Shape>
void check_input(const NodeParams& params, int32_t index, const Shape& shape) {
  const auto dims = known_dims(shape);
  if (index < params.levels()) {
    check_head_map(params, index, dims.data(), shape.nbDims);
  } else {
    check_threshold(index - params.levels(), dims.data(), shape.nbDims);
  }
}

// All head maps must cover the same pixels as the first.
void check_cells(const NodeParams& params, int32_t level, const nvinfer1::Dims& first, const nvinfer1::Dims& dims) {
  const int64_t height = static_cast<int64_t>(first.d[2]) * params.strides[0];
  const int64_t width = static_cast<int64_t>(first.d[3]) * params.strides[0];
  const int64_t stride = params.strides[level];
  if (dims.d[2] * stride != height || dims.d[3] * stride != width) {
    throw_plugin_error("head map ", level, " has ", dims.d[2], "x", dims.d[3], " cells; attribute strides says ",
                       stride, " pixels a cell, but head map 0 covers ", height, "x", width, " pixels.");
  }
}

bool supports_head_format(const PluginTensorDesc& head) {
  switch (head.format) {
    case TensorFormat::kLINEAR:
      return head.type == DataType::kFLOAT || head.type == DataType::kHALF;
    case TensorFormat::kHWC:
      return head.type == DataType::kFLOAT;
    case TensorFormat::kHWC8:
      return head.type == DataType::kHALF;
    default:
      return false;
  }
}

int32_t kernel_type(DataType type) { return type == DataType::kHALF ? Y7_FLOAT16 : Y7_FLOAT32; }

Y7HeadMap head_map(const NodeParams& params, int32_t level, const PluginTensorDesc& desc, const void* data) {
  const auto& d = desc.dims.d;
  const int64_t channels = d[1];
  const int64_t cells = static_cast<int64_t>(d[2]) * d[3];
  Y7HeadMap map{};
  map.data = data;
  map.height = static_cast<int32_t>(d[2]);
  map.width = static_cast<int32_t>(d[3]);
  map.stride = static_cast<float>(params.strides[level]);
  std::memcpy(map.anchors, &params.anchors[static_cast<size_t>(level) * Y7_ANCHORS * 2], sizeof map.anchors);
  if (desc.format == TensorFormat::kLINEAR) {
    map.batch_stride = channels * cells;
    map.channel_stride = cells;
    map.cell_stride = 1;
  } else {
    const int64_t padded =
        desc.format == TensorFormat::kHWC8 ? (channels + kHwc8Channels - 1) / kHwc8Channels * kHwc8Channels : channels;
    map.batch_stride = cells * padded;
    map.channel_stride = 1;
    map.cell_stride = padded;
  }
  return map;
}

}  // namespace

FieldList::FieldList(NodeParams& params) {
  for (const Field& field : params.fields()) {
    const auto type = field.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
    fields_.emplace_back(field.name, field.data, type, field.count);
  }
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

NodeParams parse_fields(const nvinfer1::PluginFieldCollection* fields) {
  NodeParams params;
  std::set<std::string> seen;
  const int32_t count = fields == nullptr ? 0 : fields->nbFields;
  for (int32_t i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.name == nullptr) {
      throw_plugin_error("attribute number ", i, " has no name.");
    }
    if (is_parser_attribute(field.name)) {
      continue;
    }
    if (!seen.insert(field.name).second) {
      throw_plugin_error("attribute ", field.name, " is given twice.");
    }
    const bool is_float = field.type == PluginFieldType::kFLOAT32;
    if (!is_float && field.type != PluginFieldType::kINT32) {
      throw_plugin_error("attribute ", field.name, " is of TensorRT's field type ", static_cast<int>(field.type),
                         "; this plugin only has int32 and float32 attributes.");
    }
    params.set({field.name, is_float, const_cast<void*>(field.data), field.length});
  }
  params.check();
  return params;
}

bool supports_format(const NodeParams& params, int32_t pos, const PluginTensorDesc& desc, const PluginTensorDesc& first,
                     int32_t inputs, int32_t outputs) {
  const int32_t levels = params.levels();
  if (inputs != levels + kThresholds || outputs != kOutputs || pos < 0 || pos >= inputs + outputs) {
    return false;
  }
  if (pos < levels) {
    return supports_head_format(desc) && desc.type == first.type &&
           (pos < kFreeFormatLevels || desc.format == first.format);
  }
  const DataType wanted = pos < inputs ? DataType::kFLOAT : output_type(pos - inputs);
  return desc.format == TensorFormat::kLINEAR && desc.type == wanted;
}

DataType output_type(int32_t index) {
  const bool is_float = index == 1 || index == 2;  // det_boxes, det_scores
  return is_float ? DataType::kFLOAT : DataType::kINT32;
}

nvinfer1::DimsExprs output_shape(const NodeParams& params, int32_t index, const nvinfer1::DimsExprs* inputs,
                                 int32_t count, nvinfer1::IExprBuilder& builder) {
  check_input_count(params, count);
  for (int32_t i = 0; i < count; ++i) {
    check_input(params, i, inputs[i]);
  }
  const bool is_flag = index == 0 || index == kOutputs - 1;  // num_dets, overflow
  nvinfer1::DimsExprs shape;
  shape.nbDims = index == 1 ? 3 : 2;
  shape.d[0] = inputs[0].d[0];
  shape.d[1] = builder.constant(is_flag ? 1 : params.max_det);
  if (index == 1) {
    shape.d[2] = builder.constant(4);
  }
  return shape;
}

void check_profile(const NodeParams& params, const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count) {
  check_input_count(params, count);
  for (int32_t i = 0; i < count; ++i) {
    check_input(params, i, inputs[i].max);
  }
  const auto& largest = inputs[0].max;
  if (largest.d[0] > Y7_MAX_BATCH) {
    throw_plugin_error("the batch is up to ", largest.d[0], " images; the kernels support at most ", Y7_MAX_BATCH, ".");
  }
  for (int32_t i = 1; i < params.levels(); ++i) {
    check_cells(params, i, largest, inputs[i].max);
  }
}

size_t workspace_bytes(const NodeParams& params, int64_t batch, DataType type) {
  // A dynamic batch before any profile is known: use the maximum.
  const int64_t images = batch < 1 ? Y7_MAX_BATCH : batch;
  if (images > Y7_MAX_BATCH) {
    throw_plugin_error("the batch has ", images, " images; the kernels support at most ", Y7_MAX_BATCH, ".");
  }
  const Y7NmsParams desc = params.kernel_params(static_cast<int32_t>(images), kernel_type(type));
  const size_t bytes = y7_nms_workspace(&desc);
  if (bytes == 0) {
    throw_plugin_error("the kernels reject a batch of ", images, " with ", params.to_string(), ".");
  }
  return bytes;
}

void enqueue(const NodeParams& params, const PluginTensorDesc* desc, const void* const* inputs, void* const* outputs,
             void* workspace, cudaStream_t stream) {
  const int32_t levels = params.levels();
  std::array<Y7HeadMap, Y7_MAX_LEVELS> heads{};
  for (int32_t level = 0; level < levels; ++level) {
    check_cells(params, level, desc[0].dims, desc[level].dims);
    heads[level] = head_map(params, level, desc[level], inputs[level]);
  }
  const int64_t batch = desc[0].dims.d[0];
  const Y7NmsParams kernel = params.kernel_params(static_cast<int32_t>(batch), kernel_type(desc[0].type));
  const Y7NmsOutputs results{static_cast<int32_t*>(outputs[0]), static_cast<float*>(outputs[1]),
                             static_cast<float*>(outputs[2]), static_cast<int32_t*>(outputs[3]),
                             static_cast<int32_t*>(outputs[4])};
  const auto threshold = [&](int32_t index) { return static_cast<const float*>(inputs[levels + index]); };
  const Y7NmsThresholds thresholds{threshold(0), threshold(1), threshold(2), threshold(3)};
  const int32_t status = y7_nms(&kernel, heads.data(), &thresholds, &results, workspace,
                                workspace_bytes(params, batch, desc[0].type), stream);
  if (status != Y7_OK) {
    throw_plugin_error(y7_status_text(status), " (batch ", batch, ", ", params.to_string(), ")");
  }
}

}  // namespace y7
