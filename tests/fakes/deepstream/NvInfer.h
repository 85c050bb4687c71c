// The plugin registry of TensorRT, as far as the parser uses it; the test program implements it.
#pragma once

namespace nvinfer1 {

class IPluginRegistry {
 public:
  using PluginLibraryHandle = void*;
  virtual PluginLibraryHandle loadLibrary(const char* path) noexcept = 0;

 protected:
  virtual ~IPluginRegistry() = default;
};

}  // namespace nvinfer1

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept;
