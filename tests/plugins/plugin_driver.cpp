// Calls the plugin as TensorRT does, with fake kernels that record their arguments. Compiled and run by
// test_plugin_interfaces.py, with the headers of either plugin interface. Prints one JSON object.
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "logging.h"
#include "nms_plugin.h"
#if Y7_PLUGIN_V3
#include "nms_plugin_v3.h"
#else
#include "nms_plugin_v2.h"
#endif

using namespace nvinfer1;

namespace {

std::string last_call;  // of y7_nms, as JSON
std::vector<std::string> messages;

// Dimensions as the parser represents them: -1 is dynamic.
class Expression final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : value_(value) { mImpl = this; }
#if Y7_PLUGIN_V3
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }
#else
  bool isConstant() const override { return value_ >= 0; }
  int32_t getConstantValue() const override { return static_cast<int32_t>(value_); }
#endif
 private:
  int64_t value_;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
#if Y7_PLUGIN_V3
  const IDimensionExpr* constant(int64_t value) override { return new Expression(value); }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
#else
  const IDimensionExpr* constant(int32_t value) override { return new Expression(value); }
#endif
};

// The logger of the headers before TensorRT 11; the actual registry of TensorRT-RTX has the versioned one.
class Logger final : public ILogger {
 public:
  void log(Severity, const char* message) noexcept override { messages.emplace_back(message); }
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger_; }

 private:
  Logger logger_;
};

Dims dims(std::vector<int> sides) {
  Dims made{};
  made.nbDims = static_cast<int32_t>(sides.size());
  for (size_t i = 0; i < sides.size(); ++i) {
    made.d[i] = sides[i];
  }
  return made;
}

std::vector<PluginTensorDesc> described(int batch, int channels, DataType type, std::vector<TensorFormat> formats) {
  std::vector<PluginTensorDesc> made;
  int side = 8;  // 8x12, 4x6 and 2x3 cells
  for (TensorFormat format : formats) {
    PluginTensorDesc desc{};
    desc.dims = dims({batch, channels, side, side * 3 / 2});
    desc.type = type;
    desc.format = format;
    made.push_back(desc);
    side /= 2;
  }
  for (int i = 0; i < y7::kThresholds; ++i) {
    PluginTensorDesc desc{};
    desc.dims = dims({1});
    made.push_back(desc);
  }
  return made;
}

// Counts the format combinations that the plugin supports as TensorRT does, position by position.
void count_formats(const y7::NodeParams& params, std::vector<PluginTensorDesc>& so_far, int inputs, int& found) {
  const int pos = static_cast<int>(so_far.size());
  if (pos == inputs + y7::kOutputs) {
    ++found;
    return;
  }
  for (int type = 0; type < 10; ++type) {
    for (int format = 0; format < 13; ++format) {
      PluginTensorDesc desc{};
      desc.type = static_cast<DataType>(type);
      desc.format = static_cast<TensorFormat>(format);
      so_far.push_back(desc);
      if (y7::supports_format(params, pos, desc, so_far[0], inputs, y7::kOutputs)) {
        count_formats(params, so_far, inputs, found);
      }
      so_far.pop_back();
    }
  }
}

std::string combinations(int levels) {
  y7::NodeParams params;
  params.strides.resize(levels, 8);
  std::vector<PluginTensorDesc> none;
  int found = 0;
  count_formats(params, none, levels + y7::kThresholds, found);
  return std::to_string(found);
}

std::string shapes(const y7::NodeParams& params, const std::vector<std::vector<int>>& inputs) {
  Builder builder;
  std::vector<DimsExprs> given;
  for (const auto& sides : inputs) {
    DimsExprs shape{};
    shape.nbDims = static_cast<int32_t>(sides.size());
    for (size_t i = 0; i < sides.size(); ++i) {
      shape.d[i] = new Expression(sides[i]);
    }
    given.push_back(shape);
  }
  std::ostringstream out;
  for (int i = 0; i < y7::kOutputs; ++i) {
    const DimsExprs shape = y7::output_shape(params, i, given.data(), static_cast<int32_t>(given.size()), builder);
    out << (i ? ", [" : "[[");
    for (int d = 0; d < shape.nbDims; ++d) {
      out << (d ? ", " : "") << static_cast<const Expression*>(shape.d[d])->getConstantValue();
    }
    out << "]";
  }
  return out.str() + "]";
}

std::string enqueued(const y7::NodeParams& params, DataType type, std::vector<TensorFormat> formats) {
  const auto inputs = described(2, params.channels(), type, formats);
  std::vector<const void*> pointers;
  std::vector<void*> outputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    pointers.push_back(reinterpret_cast<void*>(0x1000 * (i + 1)));
  }
  for (int i = 0; i < y7::kOutputs; ++i) {
    outputs.push_back(reinterpret_cast<void*>(0x100000L * (i + 1)));
  }
  last_call = "null";
  y7::enqueue(params, inputs.data(), pointers.data(), outputs.data(), reinterpret_cast<void*>(0x77), nullptr);
  return last_call;
}

std::string profile(int batch, int last_side) {
  const y7::NodeParams params;
  const auto inputs = described(batch, 255, DataType::kFLOAT, {3, TensorFormat::kLINEAR});
  std::vector<DynamicPluginTensorDesc> ranges(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    ranges[i].desc = inputs[i];
    ranges[i].min = ranges[i].max = inputs[i].dims;
  }
  const int sides[] = {8, 4, last_side};
  for (int i = 0; i < 3; ++i) {
    ranges[i].max.d[2] = ranges[i].max.d[3] = sides[i];
  }
  const bool fits = y7::guarded("profile", false, [&] {
    y7::check_profile(params, ranges.data(), static_cast<int32_t>(ranges.size()));
    return true;
  });
  return fits ? "true" : "false";
}

// Returns whether the parameters survive serialization to an engine and back.
std::string round_trip() {
  y7::NodeParams params;
  params.classes = 3;
  params.strides = {8, 16};
  params.anchors.resize(12);
  params.anchors[0] = 1.25F;
  const std::string before = params.to_string();
#if Y7_PLUGIN_V3
  y7::NmsPlugin first(params);
  y7::NmsCreator creator;
  auto* copy = creator.createPlugin("again", first.getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  auto* clone = static_cast<y7::NmsPlugin*>(copy->clone());
  const bool same = clone->getMetadataString() == before && clone->getTimingCacheID() == before;
  delete copy;
  delete clone;
  return same ? "true" : "false";
#else
  y7::NmsPlugin first(params, "");
  std::vector<uint8_t> bytes(first.getSerializationSize());
  first.serialize(bytes.data());
  return y7::NodeParams::deserialize(bytes.data(), bytes.size()).to_string() == before ? "true" : "false";
#endif
}

}  // namespace

extern "C" size_t y7_nms_workspace(const Y7NmsParams* params) {
  return static_cast<size_t>(params->batch) * (params->type == Y7_FLOAT16 ? 100 : 1000);
}

extern "C" int32_t y7_nms(const Y7NmsParams* params, const Y7HeadMap* heads, const Y7NmsThresholds* thresholds,
                          const Y7NmsOutputs* outputs, void* workspace, size_t bytes, void*) {
  std::ostringstream out;
  out << "{\"batch\": " << params->batch << ", \"type\": " << params->type << ", \"heads\": [";
  for (int i = 0; i < params->levels; ++i) {
    const Y7HeadMap& head = heads[i];
    out << (i ? ", " : "") << "[" << head.batch_stride << ", " << head.channel_stride << ", " << head.cell_stride
        << ", " << head.height << ", " << head.width << ", " << head.stride << ", " << head.anchors[2][1] << ", "
        << reinterpret_cast<size_t>(head.data) << "]";
  }
  out << "], \"pointers\": [" << reinterpret_cast<size_t>(thresholds->conf) << ", "
      << reinterpret_cast<size_t>(thresholds->iou) << ", " << reinterpret_cast<size_t>(thresholds->multi_label) << ", "
      << reinterpret_cast<size_t>(thresholds->class_agnostic) << ", " << reinterpret_cast<size_t>(outputs->num_dets)
      << ", " << reinterpret_cast<size_t>(outputs->boxes) << ", " << reinterpret_cast<size_t>(outputs->scores) << ", "
      << reinterpret_cast<size_t>(outputs->classes) << ", " << reinterpret_cast<size_t>(outputs->overflow) << ", "
      << reinterpret_cast<size_t>(workspace) << "], \"bytes\": " << bytes << "}";
  last_call = out.str();
  return params->classes == 7 ? Y7_CUDA_ERROR : Y7_OK;
}

extern "C" const char* y7_status_text(int32_t status) { return status == Y7_CUDA_ERROR ? "a kernel failed" : ""; }

int main() {
  Finder finder;
  y7::set_logger_finder(static_cast<ILoggerFinder*>(&finder));
  y7::NodeParams params;
  const TensorFormat linear = TensorFormat::kLINEAR, hwc = TensorFormat::kHWC, hwc8 = TensorFormat::kHWC8;
  std::ostringstream out;
  out << "{\"v3\": " << Y7_PLUGIN_V3 << ", \"combinations\": {\"1\": " << combinations(1)
      << ", \"3\": " << combinations(3) << ", \"4\": " << combinations(4) << ", \"8\": " << combinations(8) << "}";
  out << ", \"open\": " << shapes(params, {{-1, 255, -1, -1}, {-1, 255, 4, 4}, {-1, 255, 2, 2}, {1}, {1}, {1}, {1}});
  out << ", \"fixed\": " << shapes(params, {{3, 255, 8, 8}, {3, 255, 4, 4}, {3, 255, 2, 2}, {1}, {1}, {1}, {1}});
  out << ", \"linear\": " << enqueued(params, DataType::kFLOAT, {linear, linear, linear});
  out << ", \"mixed32\": " << enqueued(params, DataType::kFLOAT, {hwc, linear, hwc});
  out << ", \"mixed16\": " << enqueued(params, DataType::kHALF, {hwc8, linear, hwc8});
  out << ", \"profiles\": [" << profile(1024, 2) << ", " << profile(1025, 2) << ", " << profile(1, 3) << "]";
  out << ", \"workspace\": [" << y7::workspace_bytes(params, 3, DataType::kHALF) << ", "
      << y7::workspace_bytes(params, -1, DataType::kFLOAT) << "]";
  out << ", \"round_trip\": " << round_trip();
  params.classes = 7;
  y7::guarded("enqueue", 1, [&] { return enqueued(params, DataType::kFLOAT, {3, linear}).empty() ? 1 : 0; });
  params.strides[2] = 64;
  y7::guarded("enqueue", 1, [&] { return enqueued(params, DataType::kFLOAT, {3, linear}).empty() ? 1 : 0; });
  params.strides[2] = 32;
  y7::guarded("shapes", 1, [&] { return shapes(params, {{1, 255, 8, 8}, {1}, {1}, {1}, {1}}).empty() ? 1 : 0; });
  y7::guarded("shapes", 1, [&] {
    return shapes(params, {{1, 255, 8, 8}, {1, 255, 4, 4}, {1, 255, 2, 2}, {1}, {1}, {1}, {1}}).empty() ? 1 : 0;
  });
  params.classes = 80;
  y7::guarded("shapes", 1, [&] {
    return shapes(params, {{1, 255, 8, 8}, {1, 255, 4, 4}, {1, 255, 2, 2}, {1}, {2}, {1}, {1}}).empty() ? 1 : 0;
  });
  out << ", \"messages\": [";
  for (size_t i = 0; i < messages.size(); ++i) {
    out << (i ? ", " : "") << "\"" << messages[i] << "\"";
  }
  out << "]}";
  std::cout << out.str() << std::endl;
  return 0;
}
