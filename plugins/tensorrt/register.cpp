// Entry points through which TensorRT finds the plugin in this library.

#include "logging.h"
#include "tensorrt.h"

#if Y7_PLUGIN_V3
#include "nms_plugin_v3.h"
#else
#include "nms_plugin_v2.h"
#endif

#define Y7_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

y7::NmsCreator& creator() {
  static y7::NmsCreator instance;
  return instance;
}

}  // namespace

#if Y7_PLUGIN_V3

Y7_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { y7::set_logger_finder(finder); }

Y7_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator()};
  count = 1;
  return creators;
}

#else

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
Y7_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { y7::set_logger_finder(finder); }
#endif

Y7_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  static nvinfer1::IPluginCreator* const creators[] = {&creator()};
  count = 1;
  return creators;
}

#endif

#ifdef Y7_STATIC_REGISTRATION
// TensorRT 8.5 cannot load a plugin library: the library registers the plugin when the process opens it.
namespace {

struct Registration {
  Registration() noexcept {
    if (!::getPluginRegistry()->registerCreator(creator(), y7::kPluginNamespace)) {
      y7::log_error("registration", "TensorRT rejected it: a plugin with this name and version is already registered.");
    }
  }
};

const Registration registration;

}  // namespace
#endif
