#include "params.h"

#include <cmath>
#include <cstring>
#include <sstream>

namespace y7 {
namespace {

constexpr uint32_t kMagic = 0x534D4E59;  // "YNMS" in a hex dump
constexpr uint32_t kFormat = 1;          // of the serialised bytes
constexpr size_t kWord = 4;
constexpr size_t kFixedWords = 9;     // magic, format, length, levels, five integers
constexpr size_t kChecksumWords = 1;  // behind everything else
constexpr size_t kLevelFloats = Y7_ANCHORS * 2;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw PluginError(text.str());
}

void check_range(const char* name, int32_t value, int32_t low, int32_t high) {
  if (value < low || value > high) {
    refuse("attribute ", name, " is ", value, "; it must be from ", low, " to ", high, ".");
  }
}

size_t serialized_size(size_t levels) { return kWord * (kFixedWords + levels * (1 + kLevelFloats) + kChecksumWords); }

// FNV-1a, 32 bits: an engine file that lost or changed a byte of these must not run with other thresholds or anchors.
uint32_t checksum(const uint8_t* bytes, size_t length) {
  uint32_t hash = 2166136261U;
  for (size_t i = 0; i < length; ++i) {
    hash = (hash ^ bytes[i]) * 16777619U;
  }
  return hash;
}

void put(std::vector<uint8_t>& bytes, uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8) {
    bytes.push_back(static_cast<uint8_t>(value >> shift));
  }
}

void put(std::vector<uint8_t>& bytes, int32_t value) { put(bytes, static_cast<uint32_t>(value)); }

void put(std::vector<uint8_t>& bytes, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  put(bytes, bits);
}

// Reads words in order; the caller has checked the length.
class Reader {
 public:
  explicit Reader(const uint8_t* bytes) : at_(bytes) {}

  uint32_t word() {
    uint32_t value = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      value |= static_cast<uint32_t>(*at_++) << shift;
    }
    return value;
  }

  int32_t integer() { return static_cast<int32_t>(word()); }

  float real() {
    const uint32_t bits = word();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  const uint8_t* at_;
};

}  // namespace

std::array<Field, 7> NodeParams::fields() {
  return {{
      {"anchors", true, anchors.data(), static_cast<int32_t>(anchors.size())},
      {"strides", false, strides.data(), static_cast<int32_t>(strides.size())},
      {"classes", false, &classes, 1},
      {"max_det", false, &max_det, 1},
      {"max_candidates", false, &max_candidates, 1},
      {"multi_label", false, &multi_label, 1},
      {"class_agnostic", false, &class_agnostic, 1},
  }};
}

void NodeParams::set(const Field& given) {
  for (const Field& mine : fields()) {
    if (std::strcmp(mine.name, given.name) != 0) {
      continue;
    }
    const char* kind = mine.is_float ? "float32" : "int32";
    if (mine.is_float != given.is_float) {
      refuse("attribute ", given.name, " must hold ", kind, " values.");
    }
    const bool is_list = mine.data == anchors.data() || mine.data == strides.data();
    const int32_t most = Y7_MAX_LEVELS * (mine.is_float ? static_cast<int32_t>(kLevelFloats) : 1);
    if (given.data == nullptr || given.count < 1 || given.count > (is_list ? most : 1)) {
      refuse("attribute ", given.name, " has ", given.data == nullptr ? 0 : given.count, " values; it must have ",
             is_list ? "from 1 to " : "", is_list ? most : 1, ".");
    }
    if (mine.is_float) {
      const auto* values = static_cast<const float*>(given.data);
      anchors.assign(values, values + given.count);
    } else if (is_list) {
      const auto* values = static_cast<const int32_t*>(given.data);
      strides.assign(values, values + given.count);
    } else {
      std::memcpy(mine.data, given.data, sizeof(int32_t));
    }
    return;
  }
  std::string known;
  for (const Field& mine : fields()) {
    known += (known.empty() ? "" : ", ") + std::string(mine.name);
  }
  refuse("attribute ", given.name, " is not one of this plugin's: ", known, ".");
}

void NodeParams::check() const {
  check_range("strides (its number of values)", levels(), 1, Y7_MAX_LEVELS);
  for (const int32_t stride : strides) {
    check_range("strides", stride, 1, 1 << 16);
  }
  if (anchors.size() != strides.size() * kLevelFloats) {
    refuse("attribute anchors has ", anchors.size(), " values; ", levels(), " strides need ",
           strides.size() * kLevelFloats, " (", Y7_ANCHORS, " anchors a level, width and height each).");
  }
  for (const float side : anchors) {
    if (!std::isfinite(side) || side <= 0) {
      refuse("attribute anchors has the value ", side, "; sides are in pixels and above 0.");
    }
  }
  check_range("classes", classes, 1, kMaxClasses);
  check_range("max_det", max_det, 1, INT32_MAX);
  check_range("max_candidates", max_candidates, 1, INT32_MAX);
  check_range("multi_label", multi_label, 0, 1);
  check_range("class_agnostic", class_agnostic, 0, 1);
  const Y7NmsParams one = kernel_params(1, Y7_FLOAT32);
  if (y7_nms_workspace(&one) == 0) {
    refuse("the kernels refuse these attributes: ", text(), ".");
  }
}

Y7NmsParams NodeParams::kernel_params(int32_t batch, int32_t type) const {
  Y7NmsParams params{};
  params.batch = batch;
  params.levels = levels();
  params.classes = classes;
  params.max_det = max_det;
  params.max_candidates = max_candidates;
  params.multi_label = multi_label;
  params.class_agnostic = class_agnostic;
  params.type = type;
  return params;
}

std::string NodeParams::text() const {
  std::ostringstream out;
  out << "classes=" << classes << " max_det=" << max_det << " max_candidates=" << max_candidates
      << " multi_label=" << multi_label << " class_agnostic=" << class_agnostic << " strides=";
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
  put(bytes, kMagic);
  put(bytes, kFormat);
  put(bytes, static_cast<uint32_t>(size));
  put(bytes, levels());
  put(bytes, classes);
  put(bytes, max_det);
  put(bytes, max_candidates);
  put(bytes, multi_label);
  put(bytes, class_agnostic);
  for (const int32_t stride : strides) {
    put(bytes, stride);
  }
  for (const float side : anchors) {
    put(bytes, side);
  }
  put(bytes, checksum(bytes.data(), bytes.size()));
  return bytes;
}

NodeParams NodeParams::deserialize(const void* data, size_t length) {
  if (data == nullptr || length < serialized_size(1) || length > serialized_size(Y7_MAX_LEVELS)) {
    refuse("the engine holds ", data == nullptr ? 0 : length, " bytes for this plugin; it writes ", serialized_size(1),
           " to ", serialized_size(Y7_MAX_LEVELS), ".");
  }
  const auto* bytes = static_cast<const uint8_t*>(data);
  Reader reader(bytes);
  if (reader.word() != kMagic) {
    refuse("the engine's bytes for this plugin are of another one: they do not begin with its mark.");
  }
  const uint32_t format = reader.word();
  if (format != kFormat) {
    refuse("the engine holds version ", format, " of this plugin's data; this library reads ", kFormat,
           ". Build the engine again.");
  }
  const uint32_t size = reader.word();
  const uint32_t levels = reader.word();
  if (size != length || levels > Y7_MAX_LEVELS || size != serialized_size(levels)) {
    refuse("the engine holds ", length, " bytes for this plugin, but they announce ", size, " bytes and ", levels,
           " levels: the file is damaged.");
  }
  const size_t body = length - kWord * kChecksumWords;
  if (Reader(bytes + body).word() != checksum(bytes, body)) {
    refuse("the engine's bytes for this plugin do not fit their checksum: the file is damaged.");
  }
  NodeParams params;
  params.classes = reader.integer();
  params.max_det = reader.integer();
  params.max_candidates = reader.integer();
  params.multi_label = reader.integer();
  params.class_agnostic = reader.integer();
  params.strides.clear();
  params.anchors.clear();
  for (uint32_t i = 0; i < levels; ++i) {
    params.strides.push_back(reader.integer());
  }
  for (size_t i = 0; i < levels * kLevelFloats; ++i) {
    params.anchors.push_back(reader.real());
  }
  params.check();
  return params;
}

}  // namespace y7
