// Runs the CUDA kernels of plugins/kernels on synthetic images, compares every result bit by bit with a CPU reference,
// and prints one line of JSON. Exit code 1 if a result differs.
//
//   kernel_driver [--case NAME] [--seeds N] [--calls N]
//
// --calls is the number of timed calls per case, 0 for none. `kernel_driver.py` compiles and runs this file. It needs
// nothing but the CUDA runtime, so it also runs under a simulator of a GPU.
//
// The reference uses the sigmoid of the kernels: two correct exponentials may differ by an ulp, which changes the order
// of scores. All logits are multiples of 1 / 64, so a table of 1281 values suffices. The table is read from detections
// of one-class maps whose boxes do not overlap, and compared with the exact sigmoid. All other arithmetic is identical.
// Compile with -ffp-contract=off (host) and -fmad=false (device).
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

constexpr int kClasses = 80, kLevels = 3, kMaxDet = 300, kMaxCandidates = 30000;
constexpr int kSides[kLevels] = {80, 40, 20};  // YOLOv7 at 640 x 640
constexpr float kStrides[kLevels] = {8, 16, 32};
constexpr float kAnchors[kLevels][Y7_ANCHORS][2] = {
    {{12, 16}, {19, 36}, {40, 28}}, {{36, 75}, {76, 55}, {72, 146}}, {{142, 110}, {192, 243}, {459, 401}}};
constexpr int kStepsPerUnit = 64, kLargestLogit = 10;
constexpr int kSteps = 2 * kLargestLogit * kStepsPerUnit + 1;
constexpr int kRow = 128;                // sigmoids per image of the table
constexpr int16_t kNothing = INT16_MIN;  // the logit minus infinity

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "kernel_driver: %s\n", what.c_str());
  exit(2);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    fail(cudaGetErrorString(error));
  }
}

void check_status(int32_t status) {
  if (status != Y7_OK) {
    fail(y7_status_text(status));
  }
}

// An array on the device; its memory is freed when the process ends.
template <class T>
T* allocate(size_t count) {
  void* data = nullptr;
  check(cudaMalloc(&data, count * sizeof(T)));
  return static_cast<T*>(data);
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* data = allocate<T>(values.size());
  check(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

template <class T>
std::vector<T> download(const T* data, size_t count) {
  std::vector<T> values(count);
  check(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

uint16_t half_bits(float value) {
  const __half half = __float2half_rn(value);
  uint16_t bits;
  memcpy(&bits, &half, sizeof(bits));
  return bits;
}

// Returns the mean time of a call in microseconds, or -1 without calls.
template <class Call>
double time_us(int calls, Call call) {
  if (!calls) {
    return -1;
  }
  for (int i = 0; i < calls / 10 + 1; ++i) {
    call();
  }
  check(cudaDeviceSynchronize());
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) {
    call();
  }
  check(cudaDeviceSynchronize());
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls;
}

// --- head maps ------------------------------------------------------------------------------------------------------

struct Map {
  int batch, classes, height, width;
  float stride;
  float anchors[Y7_ANCHORS][2];
  std::vector<int16_t> steps;  // logits in units of 1 / 64, [B, 3, 5 + C, H, W]

  size_t index(int image, int anchor, int column, int y, int x) const {
    return (((size_t(image) * 3 + anchor) * (5 + classes) + column) * height + y) * width + x;
  }
};

struct Options {
  float conf, iou, multi_label, class_agnostic;
};

struct Detection {
  float box[4], score;
  int32_t class_id;
};

struct Image {  // the result of one image
  std::vector<Detection> detections;
  int32_t overflow;
  size_t pairs;  // above the threshold; only in the reference
};

Map make_map(int batch, int classes, int height, int width, float stride, const float (*anchors)[2]) {
  Map map = {batch, classes, height, width, stride, {}, {}};
  memcpy(map.anchors, anchors, sizeof(map.anchors));
  map.steps.assign(size_t(batch) * 3 * (5 + classes) * height * width, kNothing);
  return map;
}

// All arguments of y7_nms, on the device.
struct NmsCall {
  Y7NmsParams params;
  std::vector<Y7HeadMap> heads;
  Y7NmsThresholds thresholds;
  Y7NmsOutputs outputs;
  size_t bytes;
  void* workspace;

  NmsCall(const std::vector<Map>& maps, const Options& options, int max_det, int max_candidates,
          bool channels_last = false) {
    params = {maps[0].batch, int32_t(maps.size()), maps[0].classes, max_det, max_candidates, Y7_FLOAT16};
    for (const Map& map : maps) {
      const int64_t cells = int64_t(map.height) * map.width, channels = Y7_ANCHORS * (5 + map.classes);
      const int64_t stored = channels_last ? (channels + 7) / 8 * 8 : channels;  // TensorRT pads to 16 bytes
      const int64_t channel_stride = channels_last ? 1 : cells, cell_stride = channels_last ? stored : 1;
      std::vector<uint16_t> values(size_t(map.batch * stored * cells), half_bits(NAN));
      for (int64_t i = 0; i < int64_t(map.steps.size()); ++i) {
        const int64_t cell = i % cells, channel = i / cells % channels, image = i / cells / channels;
        const int16_t step = map.steps[size_t(i)];
        values[size_t(image * stored * cells + channel * channel_stride + cell * cell_stride)] =
            half_bits(step == kNothing ? -INFINITY : float(step) / kStepsPerUnit);
      }
      Y7HeadMap head = {
          upload(values), stored * cells, channel_stride, cell_stride, map.height, map.width, map.stride, {}, 0};
      memcpy(head.anchors, map.anchors, sizeof(head.anchors));
      heads.push_back(head);
    }
    const float* values =
        upload(std::vector<float>{options.conf, options.iou, options.multi_label, options.class_agnostic});
    thresholds = {values, values + 1, values + 2, values + 3};
    const size_t images = size_t(params.batch), rows = images * size_t(max_det);
    outputs = {allocate<int32_t>(images), allocate<float>(4 * rows), allocate<float>(rows), allocate<int32_t>(rows),
               allocate<int32_t>(images)};
    bytes = y7_nms_workspace(&params);
    workspace = upload(std::vector<uint8_t>(bytes, 0xab));
  }

  void operator()() const {
    check_status(y7_nms(&params, heads.data(), &thresholds, &outputs, workspace, bytes, nullptr));
  }

  std::vector<Image> results() const {
    check(cudaDeviceSynchronize());
    const size_t images = size_t(params.batch), rows = images * size_t(params.max_det);
    const auto counts = download(outputs.num_dets, images), overflows = download(outputs.overflow, images);
    const auto boxes = download(outputs.boxes, 4 * rows), scores = download(outputs.scores, rows);
    const auto classes = download(outputs.classes, rows);
    std::vector<Image> found(images);
    for (size_t i = 0; i < images; ++i) {
      found[i].overflow = overflows[i];
      for (size_t k = 0; k < size_t(params.max_det); ++k) {
        const size_t row = i * size_t(params.max_det) + k;
        const Detection detection = {
            {boxes[4 * row], boxes[4 * row + 1], boxes[4 * row + 2], boxes[4 * row + 3]}, scores[row], classes[row]};
        const Detection zero = {};
        if (k < size_t(counts[i])) {
          found[i].detections.push_back(detection);
        } else if (memcmp(&detection, &zero, sizeof(zero))) {
          fail("an output row after the last detection is not zero");
        }
      }
    }
    return found;
  }
};

// Returns the sigmoid of every logit as the kernels compute it.
std::vector<float> sigmoid_table() {
  const int rows = (kSteps - 1) / kRow + 1;
  const float anchors[Y7_ANCHORS][2] = {{1, 1}, {1, 1}, {1, 1}};
  Map map = make_map(rows, 1, 1, kRow, 1, anchors);
  for (int step = 0; step < kSteps; ++step) {
    for (int column = 0; column < 4; ++column) {
      map.steps[map.index(step / kRow, 0, column, 0, step % kRow)] = 0;
    }
    map.steps[map.index(step / kRow, 0, 4, 0, step % kRow)] = int16_t(step - kLargestLogit * kStepsPerUnit);
  }
  const NmsCall call({map}, {1e-6f, 1, 1, 0}, kRow, kMaxCandidates);
  call();
  const std::vector<Image> images = call.results();
  std::vector<float> table(kSteps, -1);
  for (int row = 0; row < rows; ++row) {
    for (const Detection& detection : images[size_t(row)].detections) {  // the left edge is the number of the cell
      const int step = row * kRow + int(detection.box[0]);
      table[size_t(step)] = detection.score;
    }
  }
  for (int step = 0; step < kSteps; ++step) {
    const double exact = 1 / (1 + std::exp(-double(step - kLargestLogit * kStepsPerUnit) / kStepsPerUnit));
    if (!(std::abs(table[size_t(step)] - exact) < 4e-7 * exact)) {
      fail("the kernels' sigmoid of step " + std::to_string(step) + " is " + std::to_string(table[size_t(step)]));
    }
  }
  return table;
}

// --- reference of NMS -----------------------------------------------------------------------------------------------

struct Pair {
  float score;
  uint32_t index;  // anchor * C + class
  int level, anchor, y, x;
};

struct Reference {
  const std::vector<Map>& maps;
  const std::vector<float>& table;
  Options options;

  float sigmoid(const Map& map, size_t index) const {
    return table[size_t(map.steps[index] + kLargestLogit * kStepsPerUnit)];
  }

  void add_pairs(std::vector<Pair>& pairs, Pair pair, int image, uint32_t anchor) const {
    const Map& map = maps[size_t(pair.level)];
    const float objectness = sigmoid(map, map.index(image, pair.anchor, 4, pair.y, pair.x));
    if (!(objectness > options.conf)) {
      return;
    }
    Pair best = pair;
    best.score = -1;
    for (int c = 0; c < map.classes; ++c) {
      pair.score = objectness * sigmoid(map, map.index(image, pair.anchor, 5 + c, pair.y, pair.x));
      pair.index = anchor * uint32_t(map.classes) + uint32_t(c);
      if (options.multi_label > 0.5f && pair.score > options.conf) {
        pairs.push_back(pair);
      }
      best = pair.score > best.score ? pair : best;
    }
    if (options.multi_label <= 0.5f && best.score > options.conf) {
      pairs.push_back(best);
    }
  }

  std::vector<Pair> sorted_pairs(int image) const {
    std::vector<Pair> pairs;
    uint32_t number = 0;
    for (int level = 0; level < int(maps.size()); ++level) {
      const Map& map = maps[size_t(level)];
      for (int anchor = 0; anchor < Y7_ANCHORS; ++anchor) {
        for (int cell = 0; cell < map.height * map.width; ++cell) {
          add_pairs(pairs, {0, 0, level, anchor, cell / map.width, cell % map.width}, image, number++);
        }
      }
    }
    std::sort(pairs.begin(), pairs.end(),
              [](const Pair& a, const Pair& b) { return a.score != b.score ? a.score > b.score : a.index < b.index; });
    return pairs;
  }

  Detection decode(const Pair& pair, int image) const {
    const Map& map = maps[size_t(pair.level)];
    float value[4];
    for (int column = 0; column < 4; ++column) {
      value[column] = sigmoid(map, map.index(image, pair.anchor, column, pair.y, pair.x)) * 2;
    }
    const float x = (value[0] - 0.5f + float(pair.x)) * map.stride, y = (value[1] - 0.5f + float(pair.y)) * map.stride;
    const float half_width = value[2] * value[2] * map.anchors[pair.anchor][0] * 0.5f,
                half_height = value[3] * value[3] * map.anchors[pair.anchor][1] * 0.5f;
    return {{x - half_width, y - half_height, x + half_width, y + half_height},
            pair.score,
            int32_t(pair.index % uint32_t(map.classes))};
  }

  bool overlap(const Detection& a, const Detection& b) const {
    if (options.class_agnostic <= 0.5f && a.class_id != b.class_id) {
      return false;
    }
    const float width = std::min(a.box[2], b.box[2]) - std::max(a.box[0], b.box[0]);
    const float height = std::min(a.box[3], b.box[3]) - std::max(a.box[1], b.box[1]);
    const float shared = std::max(width, 0.0f) * std::max(height, 0.0f);
    const float area_a = (a.box[2] - a.box[0]) * (a.box[3] - a.box[1]);
    const float area_b = (b.box[2] - b.box[0]) * (b.box[3] - b.box[1]);
    return shared > options.iou * (area_a + area_b - shared);
  }

  Image operator()(int image) const {
    const std::vector<Pair> pairs = sorted_pairs(image);
    Image result = {{}, pairs.size() >= kMaxCandidates, pairs.size()};
    for (size_t i = 0; i < std::min<size_t>(pairs.size(), kMaxCandidates); ++i) {
      const Detection candidate = decode(pairs[i], image);
      const auto suppresses = [&](const Detection& kept) { return overlap(kept, candidate); };
      if (std::none_of(result.detections.begin(), result.detections.end(), suppresses)) {
        result.detections.push_back(candidate);
      }
      if (result.detections.size() == kMaxDet) {
        break;
      }
    }
    return result;
  }
};

bool is_equal(const Image& a, const Image& b) {
  return a.overflow == b.overflow && a.detections.size() == b.detections.size() &&
         !memcmp(a.detections.data(), b.detections.data(), a.detections.size() * sizeof(Detection));
}

// --- cases ----------------------------------------------------------------------------------------------------------

struct NmsCase {
  const char* name;
  int batch, clusters;
  Options options;
  int background_steps;  // mean logit of objectness and classes outside the clusters, in units of 1 / 64
  bool channels_last;    // NHWC with padded channels instead of NCHW
};

constexpr Options kDetect = {0.25f, 0.45f, 0, 0}, kEvaluate = {0.001f, 0.65f, 1, 0};
constexpr NmsCase kNmsCases[] = {
    {"clusters", 1, 32, kDetect, -512, false},        {"clusters_nhwc", 1, 32, kDetect, -512, true},
    {"low_conf", 1, 40, kEvaluate, -538, false},      {"low_conf_nhwc", 1, 40, kEvaluate, -538, true},
    {"clusters_batch8", 8, 32, kDetect, -512, false}, {"refill", 1, 40, kEvaluate, -368, false},
    {"refill_nhwc", 1, 40, kEvaluate, -368, true},
};

int16_t logit_step(float probability) {
  const float bounded = std::min(std::max(probability, 1e-3f), 1 - 1e-3f);
  return int16_t(std::lround(std::log(bounded / (1 - bounded)) * kStepsPerUnit));
}

// Lets all anchors near one random box predict it, as a trained network does: about 15 candidates for one object.
void add_cluster(std::mt19937& random, Map& map, int image) {
  const auto uniform = [&](float low, float high) { return std::uniform_real_distribution<float>(low, high)(random); };
  const float width = uniform(0.7f, 2.5f) * map.anchors[1][0], height = uniform(0.7f, 2.5f) * map.anchors[1][1];
  const float column = uniform(1, float(map.width - 1)), row = uniform(1, float(map.height - 1));  // of the center
  const int class_id = int(random() % uint32_t(map.classes));
  for (int anchor = 0; anchor < Y7_ANCHORS; ++anchor) {
    for (int y = int(row - 1); y <= int(row + 1) && y < map.height; ++y) {
      for (int x = int(column - 1); x <= int(column + 1) && x < map.width; ++x) {
        const float target[4] = {(column - float(x) + 0.5f) / 2, (row - float(y) + 0.5f) / 2,
                                 std::sqrt(width / map.anchors[anchor][0]) / 2,
                                 std::sqrt(height / map.anchors[anchor][1]) / 2};
        if (*std::min_element(target, target + 4) < 0.02f || *std::max_element(target, target + 4) > 0.98f) {
          continue;  // this anchor cannot predict the box
        }
        for (int k = 0; k < 4; ++k) {
          map.steps[map.index(image, anchor, k, y, x)] = int16_t(logit_step(target[k]) + int(random() % 9) - 4);
        }
        map.steps[map.index(image, anchor, 4, y, x)] = int16_t(64 + random() % 200);
        map.steps[map.index(image, anchor, 5 + class_id, y, x)] = int16_t(64 + random() % 200);
      }
    }
  }
}

std::vector<Map> make_maps(const NmsCase& nms_case, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> noise(0, 1);
  const auto bounded = [](float steps) {
    return int16_t(std::min(std::max(steps, -float(kLargestLogit * kStepsPerUnit)), 0.0f));
  };
  std::vector<Map> maps;
  for (int level = 0; level < kLevels; ++level) {
    maps.push_back(make_map(nms_case.batch, kClasses, kSides[level], kSides[level], kStrides[level], kAnchors[level]));
    Map& map = maps.back();
    const size_t cells = size_t(map.height) * size_t(map.width);
    for (size_t i = 0; i < map.steps.size(); ++i) {
      const size_t column = i / cells % (5 + kClasses);
      map.steps[i] =
          column < 4 ? int16_t(noise(random) * 48) : bounded(float(nms_case.background_steps) + noise(random) * 96);
    }
    for (int image = 0; image < nms_case.batch; ++image) {
      for (int k = level; k < nms_case.clusters; k += kLevels) {
        add_cluster(random, map, image);
      }
    }
  }
  return maps;
}

// --- letterbox ------------------------------------------------------------------------------------------------------

struct LetterboxCase {
  const char* name;
  int height, width, resized_height, resized_width;
};

constexpr int kCanvas = 640, kPad = 114;
constexpr LetterboxCase kLetterboxCases[] = {
    {"letterbox_1080p", 1080, 1920, 360, 640},  // exactly 3:1
    {"letterbox_odd", 733, 1001, 469, 640},
};

struct Tap {
  int first, second, first_weight, second_weight;
};

// Returns the source pixels of a position of the resized frame and their 11-bit weights, as OpenCV does.
Tap tap_of(int position, int source, int resized, bool is_column) {
  const float exact = float((position + 0.5) * (double(source) / resized) - 0.5);
  const int before = int(std::floor(exact));
  float fraction = exact - float(before);
  if (is_column && (before < 0 || before >= source - 1)) {
    fraction = 0;
  }
  const auto clamp = [&](int index) { return std::min(std::max(index, 0), source - 1); };
  return {clamp(before), clamp(before + 1), int(std::lrint((1 - fraction) * 2048)), int(std::lrint(fraction * 2048))};
}

std::vector<uint16_t> letterbox_reference(const LetterboxCase& frame, const std::vector<uint8_t>& pixels) {
  std::vector<uint16_t> canvas(size_t(3) * kCanvas * kCanvas, half_bits(float(kPad) / 255.0f));
  const int top = (kCanvas - frame.resized_height) / 2, left = (kCanvas - frame.resized_width) / 2;
  for (int y = 0; y < frame.resized_height; ++y) {
    const Tap row = tap_of(y, frame.height, frame.resized_height, false);
    for (int x = 0; x < frame.resized_width; ++x) {
      const Tap column = tap_of(x, frame.width, frame.resized_width, true);
      for (int channel = 0; channel < 3; ++channel) {
        const auto blend = [&](int line) {
          const uint8_t* data = &pixels[size_t(line) * size_t(frame.width) * 3];
          return (data[3 * column.first + channel] * column.first_weight +
                  data[3 * column.second + channel] * column.second_weight) >>
                 4;
        };
        const int sum = ((blend(row.first) * row.first_weight) >> 16) + ((blend(row.second) * row.second_weight) >> 16);
        canvas[(size_t(2 - channel) * kCanvas + size_t(top + y)) * kCanvas + size_t(left + x)] =
            half_bits(float(std::min((sum + 2) >> 2, 255)) / 255.0f);
      }
    }
  }
  return canvas;
}

// --- output ---------------------------------------------------------------------------------------------------------

struct Row {
  std::string name;
  int batch;
  std::vector<size_t> pairs, kept;  // per seed, of the first image; empty for the letterbox
  bool equal;
  double us;
};

std::string list(const std::vector<size_t>& values) {
  std::string text;
  for (const size_t value : values) {
    text += (text.empty() ? "" : ", ") + std::to_string(value);
  }
  return "[" + text + "]";
}

std::string json(const Row& row) {
  std::string text = "{\"case\": \"" + row.name + "\", \"batch\": " + std::to_string(row.batch);
  if (!row.pairs.empty()) {
    text += ", \"pairs\": " + list(row.pairs) + ", \"kept\": " + list(row.kept);
  }
  return text + ", \"equal\": " + (row.equal ? "true" : "false") +
         ", \"us\": " + (row.us < 0 ? "null" : std::to_string(row.us)) + "}";
}

Row run_nms(const NmsCase& nms_case, const std::vector<float>& table, int seeds, int calls) {
  Row row = {nms_case.name, nms_case.batch, {}, {}, true, -1};
  for (int seed = 0; seed < seeds; ++seed) {
    const std::vector<Map> maps = make_maps(nms_case, uint32_t(seed));
    const NmsCall call(maps, nms_case.options, kMaxDet, kMaxCandidates, nms_case.channels_last);
    call();
    const std::vector<Image> found = call.results();
    const Reference reference = {maps, table, nms_case.options};
    for (int image = 0; image < nms_case.batch; ++image) {
      const Image expected = reference(image);
      row.equal = row.equal && is_equal(found[size_t(image)], expected);
      if (image == 0) {
        row.pairs.push_back(expected.pairs);
        row.kept.push_back(expected.detections.size());
      }
    }
    row.us = std::max(row.us, time_us(calls, call));
  }
  return row;
}

Row run_letterbox(const LetterboxCase& letterbox_case, int calls) {
  std::mt19937 random(1);
  std::vector<uint8_t> pixels(size_t(letterbox_case.height) * size_t(letterbox_case.width) * 3);
  std::generate(pixels.begin(), pixels.end(), [&] { return uint8_t(random()); });
  const Y7Frame frame = {upload(pixels),
                         3 * int64_t(letterbox_case.width),
                         letterbox_case.height,
                         letterbox_case.width,
                         letterbox_case.resized_height,
                         letterbox_case.resized_width,
                         (kCanvas - letterbox_case.resized_height) / 2,
                         (kCanvas - letterbox_case.resized_width) / 2,
                         nullptr};
  const Y7Frame* frames = upload(std::vector<Y7Frame>{frame});
  uint16_t* canvas = allocate<uint16_t>(size_t(3) * kCanvas * kCanvas);
  const Y7LetterboxParams params = {1, kCanvas, kCanvas, Y7_FLOAT16, kPad};
  const auto call = [&] { check_status(y7_letterbox(&params, frames, canvas, nullptr)); };
  call();
  check(cudaDeviceSynchronize());
  const bool equal = download(canvas, size_t(3) * kCanvas * kCanvas) == letterbox_reference(letterbox_case, pixels);
  return {letterbox_case.name, 1, {}, {}, equal, time_us(calls, call)};
}

}  // namespace

int main(int count, char** arguments) {
  std::string only;
  int seeds = 3, calls = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--case") {
      only = arguments[i + 1];
    } else if (name == "--seeds") {
      seeds = atoi(arguments[i + 1]);
    } else if (name == "--calls") {
      calls = atoi(arguments[i + 1]);
    } else {
      fail("unknown option " + name);
    }
  }
  std::vector<Row> rows;
  std::vector<float> table;
  for (const NmsCase& nms_case : kNmsCases) {
    if (only.empty() || only == nms_case.name) {
      table = table.empty() ? sigmoid_table() : table;
      rows.push_back(run_nms(nms_case, table, seeds, calls));
    }
  }
  for (const LetterboxCase& letterbox_case : kLetterboxCases) {
    if (only.empty() || only == letterbox_case.name) {
      rows.push_back(run_letterbox(letterbox_case, calls));
    }
  }
  if (rows.empty()) {
    fail("there is no case " + only);
  }
  bool equal = true;
  std::string text;
  for (const Row& row : rows) {
    equal = equal && row.equal;
    text += (text.empty() ? "" : ", ") + json(row);
  }
  printf("{\"rows\": [%s]}\n", text.c_str());
  return equal ? 0 : 1;
}
