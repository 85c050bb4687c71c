#include "params.h"

#include <cmath>
#include <cstring>
#include <sstream>

namespace y7 {
namespace {

constexpr uint32_t kMagic = 0x534D4E59;  // "YNMS" in a hex dump
constexpr uint32_t kFormat = 2;          // version of the serialized bytes
constexpr size_t kWordBytes = 4;
constexpr size_t kFixedWords = 7;     // magic, format, length, levels, three integers
constexpr size_t kChecksumWords = 1;  // at the end
constexpr size_t kLevelFloats = Y7_ANCHORS * 2;

void check_range(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    throw_plugin_error("attribute ", name, " is ", value, "; it must be from ", low, " to ", high, ".");
  }
}

size_t serialized_size(size_t levels) {
  return kWordBytes * (kFixedWords + levels * (1 + kLevelFloats) + kChecksumWords);
}

// FNV-1a, 32 bits. A damaged engine file must not run with other anchors or limits.
uint32_t checksum(const uint8_t* bytes, size_t length) {
  uint32_t hash = 2166136261U;
  for (size_t i = 0; i < length; ++i) {
    hash = (hash ^ bytes[i]) * 16777619U;
  }
  return hash;
}

void append(std::vector<uint8_t>& bytes, uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8) {
    bytes.push_back(static_cast<uint8_t>(value >> shift));
  }
}

void append(std::vector<uint8_t>& bytes, int32_t value) { append(bytes, static_cast<uint32_t>(value)); }

void append(std::vector<uint8_t>& bytes, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  append(bytes, bits);
}

// Reads 32-bit values in order; the caller has checked the length.
class Reader {
 public:
  explicit Reader(const uint8_t* bytes) : position_(bytes) {}

  uint32_t read_uint32() {
    uint32_t value = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      value |= static_cast<uint32_t>(*position_++) << shift;
    }
    return value;
  }

  int32_t read_int32() { return static_cast<int32_t>(read_uint32()); }

  float read_float() {
    const uint32_t bits = read_uint32();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  const uint8_t* position_;
};

}  // namespace

std::array<Field, 5> NodeParams::fields() {
  return {{
      {"anchors", true, anchors.data(), static_cast<int32_t>(anchors.size())},
      {"strides", false, strides.data(), static_cast<int32_t>(strides.size())},
      {"classes", false, &classes, 1},
      {"max_det", false, &max_det, 1},
      {"max_candidates", false, &max_candidates, 1},
  }};
}

void NodeParams::set(const Field& field) {
  for (const Field& attribute : fields()) {
    if (std::strcmp(attribute.name, field.name) != 0) {
      continue;
    }
    const char* type = attribute.is_float ? "float32" : "int32";
    if (attribute.is_float != field.is_float) {
      throw_plugin_error("attribute ", field.name, " must have ", type, " values.");
    }
    const bool is_list = attribute.data == anchors.data() || attribute.data == strides.data();
    const int32_t max_count = Y7_MAX_LEVELS * (attribute.is_float ? static_cast<int32_t>(kLevelFloats) : 1);
    if (field.data == nullptr || field.count < 1 || field.count > (is_list ? max_count : 1)) {
      throw_plugin_error("attribute ", field.name, " has ", field.data == nullptr ? 0 : field.count,
                         " values; it must have ", is_list ? "from 1 to " : "", is_list ? max_count : 1, ".");
    }
    if (attribute.is_float) {
      const auto* values = static_cast<const float*>(field.data);
      anchors.assign(values, values + field.count);
    } else if (is_list) {
      const auto* values = static_cast<const int32_t*>(field.data);
      strides.assign(values, values + field.count);
    } else {
      std::memcpy(attribute.data, field.data, sizeof(int32_t));
    }
    return;
  }
  std::string names;
  for (const Field& attribute : fields()) {
    names += (names.empty() ? "" : ", ") + std::string(attribute.name);
  }
  throw_plugin_error("attribute ", field.name, " is not an attribute of this plugin, which has ", names, ".");
}

void NodeParams::check() const {
  check_range("strides (its number of values)", levels(), 1, Y7_MAX_LEVELS);
  for (const int32_t stride : strides) {
    check_range("strides", stride, 1, 1 << 16);
  }
  if (anchors.size() != strides.size() * kLevelFloats) {
    throw_plugin_error("attribute anchors has ", anchors.size(), " values; ", levels(), " strides need ",
                       strides.size() * kLevelFloats, " (", Y7_ANCHORS, " anchors per level, width and height each).");
  }
  for (const float side : anchors) {
    if (!std::isfinite(side) || side <= 0) {
      throw_plugin_error("attribute anchors has the value ", side, "; anchors are in pixels and above 0.");
    }
  }
  check_range("classes", classes, 1, kMaxClasses);
  check_range("max_det", max_det, 1, INT32_MAX);
  check_range("max_candidates", max_candidates, 1, INT32_MAX);
  const Y7NmsParams one = kernel_params(1, Y7_FLOAT32);
  if (y7_nms_workspace(&one) == 0) {
    throw_plugin_error("the kernels reject these attributes: ", to_string(), ".");
  }
}

Y7NmsParams NodeParams::kernel_params(int32_t batch, int32_t type) const {
  Y7NmsParams params{};
  params.batch = batch;
  params.levels = levels();
  params.classes = classes;
  params.max_det = max_det;
  params.max_candidates = max_candidates;
  params.type = type;
  return params;
}

std::string NodeParams::to_string() const {
  std::ostringstream out;
  out << "classes=" << classes << " max_det=" << max_det << " max_candidates=" << max_candidates << " strides=";
  const char* comma = "";
  for (const int32_t stride : strides) {
    out << comma << stride;
    comma = ",";
  }
  out << " anchors=";
  comma = "";
  for (const float side : anchors) {
    out << comma << side;
    comma = ",";
  }
  return out.str();
}

std::vector<uint8_t> NodeParams::serialize() const {
  const size_t size = serialized_size(strides.size());
  std::vector<uint8_t> bytes;
  bytes.reserve(size);
  append(bytes, kMagic);
  append(bytes, kFormat);
  append(bytes, static_cast<uint32_t>(size));
  append(bytes, levels());
  append(bytes, classes);
  append(bytes, max_det);
  append(bytes, max_candidates);
  for (const int32_t stride : strides) {
    append(bytes, stride);
  }
  for (const float side : anchors) {
    append(bytes, side);
  }
  append(bytes, checksum(bytes.data(), bytes.size()));
  return bytes;
}

NodeParams NodeParams::deserialize(const void* data, size_t length) {
  if (data == nullptr || length < serialized_size(1) || length > serialized_size(Y7_MAX_LEVELS)) {
    throw_plugin_error("the engine contains ", data == nullptr ? 0 : length, " bytes for this plugin; it writes ",
                       serialized_size(1), " to ", serialized_size(Y7_MAX_LEVELS), ".");
  }
  const auto* bytes = static_cast<const uint8_t*>(data);
  Reader reader(bytes);
  if (reader.read_uint32() != kMagic) {
    throw_plugin_error(
        "the engine's data for this plugin does not begin with its magic number: it belongs to another plugin.");
  }
  const uint32_t format = reader.read_uint32();
  if (format != kFormat) {
    throw_plugin_error("the engine contains version ", format, " of this plugin's data; this library reads ", kFormat,
                       ". Build the engine again.");
  }
  const uint32_t size = reader.read_uint32();
  const uint32_t levels = reader.read_uint32();
  if (size != length || levels > Y7_MAX_LEVELS || size != serialized_size(levels)) {
    throw_plugin_error("the engine contains ", length, " bytes for this plugin, but their header says ", size,
                       " bytes and ", levels, " levels: the file is damaged.");
  }
  const size_t body = length - kWordBytes * kChecksumWords;
  if (Reader(bytes + body).read_uint32() != checksum(bytes, body)) {
    throw_plugin_error("the checksum of the engine's data for this plugin does not match: the file is damaged.");
  }
  NodeParams params;
  params.classes = reader.read_int32();
  params.max_det = reader.read_int32();
  params.max_candidates = reader.read_int32();
  params.strides.clear();
  params.anchors.clear();
  for (uint32_t i = 0; i < levels; ++i) {
    params.strides.push_back(reader.read_int32());
  }
  for (size_t i = 0; i < levels * kLevelFloats; ++i) {
    params.anchors.push_back(reader.read_float());
  }
  params.check();
  return params;
}

}  // namespace y7
