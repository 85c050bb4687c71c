// The attributes of a Y7NMS node: validation and serialization. Does not depend on TensorRT.
#ifndef Y7_PARAMS_H
#define Y7_PARAMS_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace y7 {

constexpr const char* kPluginName = "Y7NMS";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";  // the only one with static registration (TensorRT 8.5)
constexpr int32_t kMaxClasses = 1 << 16;

// The message is for the user: the actual value, and what is expected.
class PluginError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void throw_plugin_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw PluginError(text.str());
}

// One attribute as TensorRT passes it: int32 or float32 values.
struct Field {
  const char* name;
  bool is_float;
  void* data;
  int32_t count;
};

struct NodeParams {
  // Defaults of the official YOLOv7 and of `y7 export`.
  std::vector<float> anchors = {12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401};
  std::vector<int32_t> strides = {8, 16, 32};  // one per level, in pixels
  int32_t classes = 80;
  int32_t max_det = 300;
  int32_t max_candidates = 3840;

  int32_t levels() const { return static_cast<int32_t>(strides.size()); }
  int32_t channels() const { return Y7_ANCHORS * (5 + classes); }  // of every head map

  // Returns every attribute by name. The pointers point into this object and are valid until it is modified.
  std::array<Field, 5> fields();

  // Sets one attribute. Throws PluginError for an unknown name, a wrong type or a wrong count; `check` validates
  // values.
  void set(const Field& field);

  // Throws PluginError, which names the attribute, for values that are invalid or that the kernels reject.
  void check() const;

  // Returns the parameters for the kernels. `type` is the data type of the head maps, Y7_FLOAT32 or Y7_FLOAT16.
  Y7NmsParams kernel_params(int32_t batch, int32_t type) const;

  // Returns one line with every attribute, for logs and as a key of TensorRT's timing cache.
  std::string to_string() const;

  // Returns little-endian bytes with a magic number, a format version, the length and a checksum.
  std::vector<uint8_t> serialize() const;

  // Throws PluginError unless the bytes are exactly what `serialize` returned.
  static NodeParams deserialize(const void* data, size_t length);
};

}  // namespace y7

#endif  // Y7_PARAMS_H
