#include "nms_plugin_v2.h"

#include <algorithm>
#include <utility>

#include "logging.h"

namespace y7 {
namespace {

// An invalid shape: this interface has no other way to report an error.
nvinfer1::DimsExprs no_shape() {
  nvinfer1::DimsExprs shape{};
  shape.nbDims = -1;
  return shape;
}

}  // namespace

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

NmsPlugin::NmsPlugin(NodeParams params, std::string name_space)
    : params_(std::move(params)), serialized_(params_.serialize()), namespace_(std::move(name_space)) {}

nvinfer1::IPluginV2DynamicExt* NmsPlugin::clone() const noexcept {
  return guarded<nvinfer1::IPluginV2DynamicExt*>("clone", nullptr, [&] { return new NmsPlugin(params_, namespace_); });
}

DimsExprs NmsPlugin::getOutputDimensions(int32_t index, const DimsExprs* in, int32_t inputs,
                                         nvinfer1::IExprBuilder& builder) noexcept {
  return guarded("getOutputDimensions", no_shape(), [&] { return output_shape(params_, index, in, inputs, builder); });
}

bool NmsPlugin::supportsFormatCombination(int32_t pos, const PluginTensorDesc* in_out, int32_t inputs,
                                          int32_t outputs) noexcept {
  return supports_format(params_, pos, in_out[pos], in_out[0], inputs, outputs);
}

void NmsPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                                int32_t) noexcept {
  // This method cannot return an error: it logs the problem, and `enqueue` checks the shapes again.
  guarded("configurePlugin", kFailure, [&] {
    check_profile(params_, in, inputs);
    return kSuccess;
  });
}

size_t NmsPlugin::getWorkspaceSize(const PluginTensorDesc* in, int32_t, const PluginTensorDesc*,
                                   int32_t) const noexcept {
  return guarded<size_t>("getWorkspaceSize", 0, [&] { return workspace_bytes(params_, in[0].dims.d[0], in[0].type); });
}

int32_t NmsPlugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                           void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded("enqueue", kFailure, [&] {
    y7::enqueue(params_, in, inputs, outputs, workspace, stream);
    return kSuccess;
  });
}

DataType NmsPlugin::getOutputDataType(int32_t index, const DataType*, int32_t) const noexcept {
  return output_type(index);
}

const char* NmsPlugin::getPluginType() const noexcept { return kPluginName; }
const char* NmsPlugin::getPluginVersion() const noexcept { return kPluginVersion; }
int32_t NmsPlugin::getNbOutputs() const noexcept { return kOutputs; }
int32_t NmsPlugin::initialize() noexcept { return kSuccess; }
void NmsPlugin::terminate() noexcept {}
size_t NmsPlugin::getSerializationSize() const noexcept { return serialized_.size(); }

void NmsPlugin::serialize(void* buffer) const noexcept {
  std::copy(serialized_.begin(), serialized_.end(), static_cast<uint8_t*>(buffer));
}

void NmsPlugin::destroy() noexcept { delete this; }

void NmsPlugin::setPluginNamespace(const char* name_space) noexcept {
  guarded("setPluginNamespace", kFailure, [&] {
    namespace_ = name_space == nullptr ? "" : name_space;
    return kSuccess;
  });
}

const char* NmsPlugin::getPluginNamespace() const noexcept { return namespace_.c_str(); }

const char* NmsCreator::getPluginName() const noexcept { return kPluginName; }
const char* NmsCreator::getPluginVersion() const noexcept { return kPluginVersion; }
const nvinfer1::PluginFieldCollection* NmsCreator::getFieldNames() noexcept { return fields_.collection(); }

nvinfer1::IPluginV2DynamicExt* NmsCreator::createPlugin(const char*,
                                                        const nvinfer1::PluginFieldCollection* fields) noexcept {
  return guarded<nvinfer1::IPluginV2DynamicExt*>("createPlugin", nullptr,
                                                 [&] { return new NmsPlugin(parse_fields(fields), namespace_); });
}

nvinfer1::IPluginV2DynamicExt* NmsCreator::deserializePlugin(const char*, const void* data, size_t length) noexcept {
  return guarded<nvinfer1::IPluginV2DynamicExt*>(
      "deserializePlugin", nullptr, [&] { return new NmsPlugin(NodeParams::deserialize(data, length), namespace_); });
}

void NmsCreator::setPluginNamespace(const char* name_space) noexcept {
  guarded("setPluginNamespace", kFailure, [&] {
    namespace_ = name_space == nullptr ? "" : name_space;
    return kSuccess;
  });
}

const char* NmsCreator::getPluginNamespace() const noexcept { return namespace_.c_str(); }

}  // namespace y7
