// What a Y7NMS node says: its attributes, checked, and their serialised form. Knows nothing of TensorRT.
#ifndef Y7_PARAMS_H
#define Y7_PARAMS_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace y7 {

constexpr const char* kPluginName = "Y7NMS";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";  // static registration (TensorRT 8.5) knows no other
constexpr int32_t kMaxBatch = 1024;           // as kernels.h says
constexpr int32_t kMaxClasses = 1 << 16;

// Refuses with a sentence for the user: what came, and what was expected.
class PluginError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// One attribute as TensorRT passes it: int32 or float32 values.
struct Field {
  const char* name;
  bool is_float;
  void* data;
  int32_t count;
};

struct NodeParams {
  // The defaults are those of the official YOLOv7 and of `y7 export`.
  std::vector<float> anchors = {12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401};
  std::vector<int32_t> strides = {8, 16, 32};  // one a level, in pixels
  int32_t classes = 80;
  int32_t max_det = 100;
  int32_t max_candidates = 3840;
  int32_t multi_label = 1;
  int32_t class_agnostic = 0;

  int32_t levels() const { return static_cast<int32_t>(strides.size()); }
  int32_t channels() const { return Y7_ANCHORS * (5 + classes); }  // of every head map

  // Every attribute by name, pointing into this object: valid until the next change of it.
  std::array<Field, 7> fields();

  // Sets one attribute from `given.count` values of the named kind. Throws PluginError for an unknown name or a wrong
  // kind or count; values are checked by `check`.
  void set(const Field& given);

  // Throws PluginError, naming the attribute, for values that mean nothing or that the kernels refuse.
  void check() const;

  // The parameters for the kernels. `type` is Y7_FLOAT32 or Y7_FLOAT16, of the head maps.
  Y7NmsParams kernel_params(int32_t batch, int32_t type) const;

  // One line with every attribute, for logs and as a key of TensorRT's timing cache.
  std::string text() const;

  // Little-endian bytes with a magic number, a version, the length and a checksum.
  std::vector<uint8_t> serialize() const;

  // Throws PluginError unless these are exactly the bytes that `serialize` wrote.
  static NodeParams deserialize(const void* data, size_t length);
};

}  // namespace y7

#endif  // Y7_PARAMS_H
