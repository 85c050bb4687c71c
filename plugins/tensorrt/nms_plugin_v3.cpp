#include "nms_plugin_v3.h"

#include <utility>

#include "logging.h"

namespace y7 {
using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

NmsPlugin::NmsPlugin(NodeParams params)
    : params_(std::move(params)), description_(params_.to_string()), fields_(params_) {}

nvinfer1::IPluginCapability* NmsPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* NmsPlugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [&] { return new NmsPlugin(params_); });
}

const char* NmsPlugin::getPluginName() const noexcept { return kPluginName; }
const char* NmsPlugin::getPluginVersion() const noexcept { return kPluginVersion; }
const char* NmsPlugin::getPluginNamespace() const noexcept { return kPluginNamespace; }

int32_t NmsPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                   int32_t) noexcept {
  return guarded("configurePlugin", kFailure, [&] {
    check_profile(params_, in, inputs);
    return kSuccess;
  });
}

int32_t NmsPlugin::getOutputDataTypes(DataType* types, int32_t outputs, const DataType*, int32_t) const noexcept {
  if (outputs != kOutputs) {
    return kFailure;
  }
  for (int32_t i = 0; i < kOutputs; ++i) {
    types[i] = output_type(i);
  }
  return kSuccess;
}

int32_t NmsPlugin::getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                                   int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("getOutputShapes", kFailure, [&] {
    for (int32_t i = 0; i < outputs; ++i) {
      out[i] = output_shape(params_, i, in, inputs, builder);
    }
    return kSuccess;
  });
}

bool NmsPlugin::supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t inputs,
                                          int32_t outputs) noexcept {
  return supports_format(params_, pos, in_out[pos].desc, in_out[0].desc, inputs, outputs);
}

int32_t NmsPlugin::getNbOutputs() const noexcept { return kOutputs; }

size_t NmsPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                                   int32_t) const noexcept {
  return guarded<size_t>("getWorkspaceSize", 0,
                         [&] { return workspace_bytes(params_, in[0].max.d[0], in[0].desc.type); });
}

const char* NmsPlugin::getTimingCacheID() noexcept { return description_.c_str(); }
const char* NmsPlugin::getMetadataString() noexcept { return description_.c_str(); }

int32_t NmsPlugin::onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept {
  return kSuccess;
}

int32_t NmsPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                           void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded("enqueue", kFailure, [&] {
    y7::enqueue(params_, in, inputs, outputs, workspace, stream);
    return kSuccess;
  });
}

nvinfer1::IPluginV3* NmsPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

const nvinfer1::PluginFieldCollection* NmsPlugin::getFieldsToSerialize() noexcept { return fields_.collection(); }

nvinfer1::IPluginV3* NmsCreator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                              nvinfer1::TensorRTPhase) noexcept {
  return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&] { return new NmsPlugin(parse_fields(fields)); });
}

const nvinfer1::PluginFieldCollection* NmsCreator::getFieldNames() noexcept { return fields_.collection(); }
const char* NmsCreator::getPluginName() const noexcept { return kPluginName; }
const char* NmsCreator::getPluginVersion() const noexcept { return kPluginVersion; }
const char* NmsCreator::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace y7
