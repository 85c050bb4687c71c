// IPluginV2DynamicExt, for TensorRT 8.5, 8.6 and 9.
#ifndef Y7_NMS_PLUGIN_V2_H
#define Y7_NMS_PLUGIN_V2_H

#include <string>

#include "nms_plugin.h"

namespace y7 {

class NmsPlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  NmsPlugin(NodeParams params, std::string name_space);

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override;
  nvinfer1::DimsExprs getOutputDimensions(int32_t index, const nvinfer1::DimsExprs* in, int32_t inputs,
                                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, const nvinfer1::PluginTensorDesc* in_out, int32_t inputs,
                                 int32_t outputs) noexcept override;
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                       const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                          int32_t outputs) const noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

  nvinfer1::DataType getOutputDataType(int32_t index, const nvinfer1::DataType* in,
                                       int32_t inputs) const noexcept override;

  const char* getPluginType() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  int32_t getNbOutputs() const noexcept override;
  int32_t initialize() noexcept override;
  void terminate() noexcept override;
  size_t getSerializationSize() const noexcept override;
  void serialize(void* buffer) const noexcept override;
  void destroy() noexcept override;
  void setPluginNamespace(const char* name_space) noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  NodeParams params_;
  std::vector<uint8_t> serialized_;
  std::string namespace_;
};

// The return types are narrower than TensorRT's, because its headers mark the name IPluginV2 as deprecated.
class NmsCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  nvinfer1::IPluginV2DynamicExt* createPlugin(const char* name,
                                              const nvinfer1::PluginFieldCollection* fields) noexcept override;
  nvinfer1::IPluginV2DynamicExt* deserializePlugin(const char* name, const void* data, size_t length) noexcept override;
  void setPluginNamespace(const char* name_space) noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  NodeParams defaults_;
  FieldList fields_{defaults_};
  std::string namespace_ = kPluginNamespace;
};

}  // namespace y7

#endif  // Y7_NMS_PLUGIN_V2_H
