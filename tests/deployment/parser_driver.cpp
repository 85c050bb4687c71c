// Tests the DeepStream parser: cases with known results, then random tensors, sizes, types and thresholds.
//   parser_driver ITERATIONS SEED
// Buffers have exactly the size that nvinfer would state, so the address sanitizer finds every read outside of them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseYolov7(const std::vector<NvDsInferLayerInfo>&, const NvDsInferNetworkInfo&,
                                     const NvDsInferParseDetectionParams&, std::vector<NvDsInferObjectDetectionInfo>&);

namespace {

// Remembers the library that the parser asks for before `main`.
class Registry : public nvinfer1::IPluginRegistry {
 public:
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    loaded_path() = path;
    return this;
  }
  static std::string& loaded_path() {
    static std::string path;
    return path;
  }
};

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

// Output tensors, each in memory of its own.
class Layers {
 public:
  template <typename T>
  Layers& add(const char* name, NvDsInferDataType type, const std::vector<T>& values) {
    NvDsInferLayerInfo layer{};
    layer.dataType = type;
    layer.layerName = name;
    layer.inferDims.numDims = 1;
    layer.inferDims.d[0] = layer.inferDims.numElements = static_cast<unsigned>(values.size());
    buffers_.push_back(std::make_unique<unsigned char[]>(values.size() * sizeof(T)));
    if (!values.empty()) {
      std::memcpy(buffers_.back().get(), values.data(), values.size() * sizeof(T));
    }
    layer.buffer = buffers_.back().get();
    layers.push_back(layer);
    return *this;
  }
  std::vector<NvDsInferLayerInfo> layers;

 private:
  std::vector<std::unique_ptr<unsigned char[]>> buffers_;
};

using Objects = std::vector<NvDsInferObjectDetectionInfo>;
const NvDsInferNetworkInfo kNetwork{64, 32, 3};
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

Layers outputs(int number, const std::vector<float>& boxes, const std::vector<float>& scores,
               const std::vector<int>& classes) {
  Layers layers;
  layers.add<int>("overflow", INT32, {0}).add<float>("det_scores", FLOAT, scores);
  layers.add<int>("num_dets", INT32, {number}).add<float>("det_boxes", FLOAT, boxes);
  layers.add<int>("det_classes", INT32, classes);
  return layers;
}

Objects parse(const Layers& layers, unsigned classes = 3, float threshold = 0.25F) {
  const NvDsInferParseDetectionParams params{classes, std::vector<float>(classes, threshold), {}};
  Objects objects;
  REQUIRE(NvDsInferParseYolov7(layers.layers, kNetwork, params, objects));
  return objects;
}

bool fails(const Layers& layers) {
  const NvDsInferParseDetectionParams params{3, {0, 0, 0}, {}};
  Objects objects;
  return !NvDsInferParseYolov7(layers.layers, kNetwork, params, objects) && objects.empty();
}

void test_known_results() {
  const auto objects = parse(outputs(2, {1, 2, 11, 22, -5, 30, 70, 40, 9, 9, 9, 9}, {0.9F, 0.5F, 0.8F}, {2, 0, 1}));
  REQUIRE(objects.size() == 2);  // the third row is after the last detection
  REQUIRE(objects[0].classId == 2 && objects[0].left == 1 && objects[0].top == 2);
  REQUIRE(objects[0].width == 10 && objects[0].height == 20 && objects[0].detectionConfidence == 0.9F);
  REQUIRE(objects[1].left == 0 && objects[1].top == 30 && objects[1].width == 64 && objects[1].height == 2);
#if DEEPSTREAM >= 90
  REQUIRE(objects[0].rotation_angle == 0);
#endif
}

void test_what_is_left_out() {
  const std::vector<float> box{1, 1, 9, 9};
  REQUIRE(parse(outputs(-1, box, {0.9F}, {0})).empty());
  REQUIRE(parse(outputs(1, box, {0.2F}, {0})).empty());
  REQUIRE(parse(outputs(1, box, {0.25F}, {0})).size() == 1);  // a threshold is inclusive in DeepStream
  REQUIRE(parse(outputs(1, box, {kNan}, {0})).empty());
  REQUIRE(parse(outputs(1, box, {kInfinity}, {0}))[0].detectionConfidence == 1);
  REQUIRE(parse(outputs(1, box, {0.9F}, {-1})).empty());
  REQUIRE(parse(outputs(1, box, {0.9F}, {3})).empty());
  REQUIRE(parse(outputs(1, {9, 1, 1, 9}, {0.9F}, {0})).empty());
  REQUIRE(parse(outputs(1, {1, 1, kNan, 9}, {0.9F}, {0})).empty());
  REQUIRE(parse(outputs(1, {65, 1, 70, 9}, {0.9F}, {0})).empty());  // outside of the canvas
  const auto huge = parse(outputs(1, {-kInfinity, -kInfinity, kInfinity, kInfinity}, {0.9F}, {0}));
  REQUIRE(huge.size() == 1 && huge[0].width == 64 && huge[0].height == 32);
}

void test_sizes_and_missing_outputs() {
  REQUIRE(parse(outputs(1000000, {1, 1, 9, 9}, {0.9F, 0.9F}, {0, 0, 0})).size() == 1);
  REQUIRE(parse(outputs(5, {1, 1, 9}, {0.9F}, {0})).empty());  // less than one box
  REQUIRE(fails(Layers{}));
  REQUIRE(fails(outputs(1, {}, {0.9F}, {0})));
  Layers wrong;
  wrong.add<float>("num_dets", FLOAT, {1}).add<float>("det_boxes", FLOAT, {1, 1, 9, 9});
  wrong.add<float>("det_scores", FLOAT, {0.9F}).add<int>("det_classes", INT32, {0});
  REQUIRE(fails(wrong));
  auto null = outputs(1, {1, 1, 9, 9}, {0.9F}, {0});
  for (auto& layer : null.layers) {
    const auto kept = layer;
    layer.buffer = nullptr;
    REQUIRE(std::strcmp(layer.layerName, "overflow") == 0 || fails(null));
    layer = kept;
    layer.layerName = nullptr;
    REQUIRE(std::strcmp(kept.layerName, "overflow") == 0 || fails(null));
    layer = kept;
  }
}

template <typename T>
std::vector<T> random_bits(std::mt19937& random, size_t size) {
  std::vector<T> values(size);
  for (auto& value : values) {
    const auto bits = static_cast<uint32_t>(random());
    std::memcpy(&value, &bits, sizeof(value));
  }
  return values;
}

template <typename T>
std::vector<T> random_values(std::mt19937& random, size_t size, T low, T high) {
  std::vector<T> values(size);
  for (auto& value : values) {
    value = low + static_cast<T>(static_cast<double>(random() % 1000) / 1000 * (high - low));
  }
  return values;
}

void fuzz(std::mt19937& random) {
  const auto size = [&] { return random() % 4 == 0 ? random() % 3 : random() % 40; };
  const bool wild = random() % 2 == 0;
  const auto boxes = wild ? random_bits<float>(random, 4 * size()) : random_values<float>(random, 4 * size(), -8, 80);
  const auto scores = wild ? random_bits<float>(random, size()) : random_values<float>(random, size(), 0, 1);
  const auto classes = wild ? random_bits<int>(random, size()) : random_values<int>(random, size(), -1, 5);
  const int number = random() % 3 == 0 ? static_cast<int>(random()) : static_cast<int>(random() % 50);
  auto layers = outputs(number, boxes, scores, classes);
  if (random() % 8 == 0) {
    layers.layers[random() % layers.layers.size()].dataType = static_cast<NvDsInferDataType>(random() % 4);
  }
  if (random() % 8 == 0) {
    layers.layers.erase(layers.layers.begin() + static_cast<long>(random() % layers.layers.size()));
  }
  NvDsInferParseDetectionParams params{static_cast<unsigned>(random() % 6), {}, {}};
  params.perClassPreclusterThreshold = random_values<float>(random, random() % 6, 0, 1);
  Objects objects;
  const bool parsed = NvDsInferParseYolov7(layers.layers, kNetwork, params, objects);
  REQUIRE(parsed || objects.empty());
  REQUIRE(objects.size() <= boxes.size() / 4 && objects.size() <= scores.size() && objects.size() <= classes.size());
  for (const auto& object : objects) {
    REQUIRE(object.classId < params.numClassesConfigured);
    REQUIRE(object.classId < params.perClassPreclusterThreshold.size());
    REQUIRE(object.detectionConfidence >= params.perClassPreclusterThreshold[object.classId]);
    REQUIRE(object.detectionConfidence <= 1 && object.width > 0 && object.height > 0);
    REQUIRE(object.left >= 0 && object.left + object.width <= 64 && object.top >= 0 &&
            object.top + object.height <= 32);
  }
}

}  // namespace

extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}

int main(int count, char** arguments) {
  if (count != 3) {
    return 2;
  }
  const char* plugin = std::getenv("Y7_PLUGIN");
  REQUIRE(Registry::loaded_path() == (plugin == nullptr ? "" : plugin));
  test_known_results();
  test_what_is_left_out();
  test_sizes_and_missing_outputs();
  std::mt19937 random(static_cast<unsigned>(std::atoi(arguments[2])));
  for (int i = 0; i < std::atoi(arguments[1]); ++i) {
    fuzz(random);
  }
  std::puts("passed");
  return 0;
}
