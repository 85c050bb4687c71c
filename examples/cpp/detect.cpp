// Detects objects with ONNX Runtime in C++, without other libraries: a PPM image in, one line for each object out.
//
//   y7 export --weights yolov7.pt && python -c "import cv2; cv2.imwrite('street.ppm', cv2.imread('street.jpg'))"
//   ORT=$PWD/onnxruntime-linux-x64-1.23.2     # unpacked from https://github.com/microsoft/onnxruntime/releases
//   g++ -std=c++17 -O2 detect.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -Wl,-rpath,$ORT/lib -o detect
//   ./detect yolov7.onnx street.ppm 0.4
//
// Output: class id, score, x1, y1, x2, y2 in image pixels. The file has a float32 input of fixed size and NMS inside.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int width = 0, height = 0;
  std::vector<unsigned char> rgb;
};

Image read_ppm(const std::string& path) {
  Image image;
  std::string magic;
  int maximum = 0;
  std::ifstream file(path, std::ios::binary);
  file >> magic >> image.width >> image.height >> maximum;
  file.get();  // one separator
  if (!file || magic != "P6" || maximum != 255 || image.width < 1 || image.height < 1 || image.width > 65535 ||
      image.height > 65535) {
    throw std::runtime_error(path + " is not a binary PPM image of 8 bits (P6)");
  }
  image.rgb.resize(size_t(3) * image.width * image.height);
  if (!file.read(reinterpret_cast<char*>(image.rgb.data()), image.rgb.size())) {
    throw std::runtime_error(path + " is truncated");
  }
  return image;
}

// The value of a channel between pixels: bilinear and rounded half up, as in cv2.resize.
float pixel(const Image& image, float y, float x, int channel) {
  y = std::clamp(y, 0.f, float(image.height - 1)), x = std::clamp(x, 0.f, float(image.width - 1));
  const int top = int(y), left = int(x);
  const int bottom = std::min(top + 1, image.height - 1), right = std::min(left + 1, image.width - 1);
  auto at = [&](int row, int column) { return float(image.rgb[3 * (size_t(row) * image.width + column) + channel]); };
  const float upper = at(top, left) + (x - left) * (at(top, right) - at(top, left));
  const float lower = at(bottom, left) + (x - left) * (at(bottom, right) - at(bottom, left));
  return std::floor(upper + (y - top) * (lower - upper) + 0.5f);
}

int main(int argc, char** argv) try {
  if (argc < 3) {
    throw std::runtime_error("usage: detect MODEL.onnx IMAGE.ppm [CONF]");
  }
  char* end = nullptr;
  float conf = argc > 3 ? std::strtof(argv[3], &end) : 0.25f;
  if ((end && *end) || !(conf >= 0 && conf <= 1)) {
    throw std::runtime_error("CONF is a number from 0 to 1");
  }
  const Image image = read_ppm(argv[2]);
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING);
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  const auto input = session.GetInputTypeInfo(0);
  auto shape = input.GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4 || shape[1] != 3 || shape[2] < 1 || shape[3] < 1 || session.GetOutputCount() != 4) {
    throw std::runtime_error("the model needs an input [1, 3, height, width] and NMS inside: y7 export --weights W.pt");
  }
  shape[0] = 1;

  // Letterbox: scale to fit, centre, pad with grey; then float32 0..1, one plane for each of red, green and blue.
  const int height = int(shape[2]), width = int(shape[3]);
  const double scale = std::min(double(height) / image.height, double(width) / image.width);
  const int rows = std::max(1, int(std::nearbyint(image.height * scale)));
  const int columns = std::max(1, int(std::nearbyint(image.width * scale)));
  const int top = (height - rows) / 2, left = (width - columns) / 2;
  std::vector<float> tensor(size_t(3) * height * width, 114 / 255.f);
  for (int channel = 0; channel < 3; channel++) {
    for (int y = 0; y < rows; y++) {
      for (int x = 0; x < columns; x++) {
        tensor[(size_t(channel) * height + top + y) * width + left + x] =
            pixel(image, (y + 0.5f) * image.height / rows - 0.5f, (x + 0.5f) * image.width / columns - 0.5f, channel) /
            255;
      }
    }
  }

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t one = 1;
  std::array<Ort::Value, 2> inputs = {
      Ort::Value::CreateTensor<float>(memory, tensor.data(), tensor.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor<float>(memory, &conf, 1, &one, 1)};
  const std::array<const char*, 2> input_names = {"images", "conf_threshold"};
  const std::array<const char*, 4> output_names = {"num_dets", "det_boxes", "det_scores", "det_classes"};
  const auto outputs = session.Run({}, input_names.data(), inputs.data(), 2, output_names.data(), 4);

  const float *boxes = outputs[1].GetTensorData<float>(), *scores = outputs[2].GetTensorData<float>();
  const double offset[2] = {(width - columns) / 2.0, (height - rows) / 2.0};
  const int limit[2] = {image.width, image.height};
  for (int i = 0; i < outputs[0].GetTensorData<int32_t>()[0]; i++) {
    std::printf("%d %.5f", outputs[3].GetTensorData<int32_t>()[i], scores[i]);
    for (int side = 0; side < 4; side++) {
      std::printf(" %.2f", std::clamp((boxes[4 * i + side] - offset[side % 2]) / scale, 0.0, double(limit[side % 2])));
    }
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
