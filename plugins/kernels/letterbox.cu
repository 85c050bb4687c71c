// Letterbox: resizes frames of any size onto a canvas, pads them and converts them to the network input, in one pass.
//
// Bilinear interpolation in the integer arithmetic of OpenCV's 8-bit resize, so the result is bit-equal to the CPU's:
// pixel centers at one half, 11-bit weights, sums that drop 4 bits between the two axes and 18 bits at the end.
#include "launch.cuh"

namespace y7 {
namespace {

constexpr int kTile = 32;                      // canvas columns and rows that a block computes
constexpr int kRowsPerPass = 8;                // rows that it computes at once
constexpr float kWeightOne = 2048.0f;          // the weight 1.0 in fixed point
constexpr int64_t kExactFloatLimit = 1 << 24;  // float represents all integers up to this one
constexpr int kMaxCanvasSide = kTile * 65535;

// The two source positions of each canvas position of a tile, and their weights.
struct Taps {
  int32_t first[kTile];
  int32_t second[kTile];
  int32_t first_weight[kTile];
  int32_t second_weight[kTile];
};

struct Tables {
  Taps x, y;
};

// Returns (position + 0.5) * source / resized - 0.5, rounded to float once. OpenCV computes in double, with the same
// result: the distance of these quotients from the midpoint between two floats is larger than the error of double. A
// float division is enough where both operands are exact; double is slow on all but the largest GPUs.
__device__ float source_position(int position, int source, int resized) {
  const int64_t numerator = (2 * int64_t(position) + 1) * source - resized;
  const int64_t denominator = 2 * int64_t(resized);
  if (numerator < kExactFloatLimit && denominator < kExactFloatLimit) {
    return __fdiv_rn(float(numerator), float(denominator));
  }
  return float(double(numerator) / double(denominator));
}

__device__ int clamp(int value, int last) { return min(max(value, 0), last); }

// Outside the outermost pixel centers, a column repeats with full weight. A row repeats too, but keeps both weights,
// because their products are truncated one by one.
__device__ void set_taps(Taps& taps, int index, int position, int source, int resized, bool is_column) {
  const float exact = source_position(clamp(position, resized - 1), source, resized);
  const int before = __float2int_rd(exact);
  const bool outside = before < 0 || before >= source - 1;
  const float fraction = is_column && outside ? 0.0f : __fsub_rn(exact, float(before));
  taps.first[index] = clamp(before, source - 1);
  taps.second[index] = clamp(before + 1, source - 1);
  taps.first_weight[index] = __float2int_rn(__fmul_rn(__fsub_rn(1.0f, fraction), kWeightOne));
  taps.second_weight[index] = __float2int_rn(__fmul_rn(fraction, kWeightOne));
}

// Replaces the row positions by those of the frame's row table.
__device__ void set_row_positions(Taps& taps, int index, int position, const Y7Frame& frame) {
  const int32_t* entry = frame.rows + 2 * int64_t(clamp(position, frame.resized_height - 1));
  taps.first[index] = entry[0];
  taps.second[index] = entry[1];
}

// A frame that violates one of these conditions is not read; the canvas is padding only.
__device__ bool is_usable(const Y7Frame& frame, const Y7LetterboxParams& params) {
  return frame.pixels && frame.height > 0 && frame.width > 0 && frame.width <= INT32_MAX / 3 &&
         frame.pitch >= 3 * int64_t(frame.width) && frame.resized_height > 0 && frame.resized_width > 0 &&
         frame.top >= 0 && frame.left >= 0 && frame.top <= params.height - frame.resized_height &&
         frame.left <= params.width - frame.resized_width &&
         reinterpret_cast<uintptr_t>(frame.rows) % alignof(int32_t) == 0;
}

__device__ int sample(const uint8_t* upper, const uint8_t* lower, int left, int right, const Tables& tables, int column,
                      int row) {
  const int left_weight = tables.x.first_weight[column], right_weight = tables.x.second_weight[column];
  const int above = (upper[left] * left_weight + upper[right] * right_weight) >> 4;
  const int below = (lower[left] * left_weight + lower[right] * right_weight) >> 4;
  const int sum = ((above * tables.y.first_weight[row]) >> 16) + ((below * tables.y.second_weight[row]) >> 16);
  return min((sum + 2) >> 2, 255);
}

// Stores one pixel: NHWC BGR unchanged, or NCHW RGB 0..1. `pixel` is the index in the image, `plane` the number of
// pixels of an image.
__device__ void store(uint8_t* image, int64_t pixel, int64_t, const int* bgr) {
  for (int channel = 0; channel < 3; ++channel) {
    image[3 * pixel + channel] = uint8_t(bgr[channel]);
  }
}
__device__ void store(float* image, int64_t pixel, int64_t plane, const int* bgr) {
  for (int channel = 0; channel < 3; ++channel) {
    image[(2 - channel) * plane + pixel] = __fdiv_rn(float(bgr[channel]), 255.0f);
  }
}
__device__ void store(__half* image, int64_t pixel, int64_t plane, const int* bgr) {
  for (int channel = 0; channel < 3; ++channel) {
    image[(2 - channel) * plane + pixel] = __float2half_rn(__fdiv_rn(float(bgr[channel]), 255.0f));
  }
}

// Grid: tiles across, tiles down, batch. Block: 32 x 8 threads, one warp per row and four rows per thread, so loads of
// neighboring threads share cache lines and every store of a warp is one line. Several pixels per thread would spread a
// warp's loads over four times as many lines to save a few stores. Shared memory: 1 KiB of taps, which costs 64
// divisions per block instead of 1.25 per pixel. Cost: 12 byte loads and 3 stores per pixel, for any frame size.
template <class T>
__global__ void __launch_bounds__(kTile* kRowsPerPass)
    letterbox(const Y7LetterboxParams params, const Y7Frame* __restrict__ frames, T* __restrict__ canvas) {
  Y7_SHARED(Tables, tables);
  const Y7Frame frame = frames[blockIdx.z];
  const bool usable = is_usable(frame, params);
  const int column = int(threadIdx.x), x = int(blockIdx.x) * kTile + column;
  if (usable && threadIdx.y == 0) {
    set_taps(tables.x, column, x - frame.left, frame.width, frame.resized_width, true);
  }
  if (usable && threadIdx.y == 1) {
    const int y = int(blockIdx.y) * kTile + column;
    set_taps(tables.y, column, y - frame.top, frame.height, frame.resized_height, false);
    if (frame.rows) {
      set_row_positions(tables.y, column, y - frame.top, frame);
    }
  }
  __syncthreads();
  if (x >= params.width) {
    return;
  }
  const bool in_columns = usable && x >= frame.left && x < frame.left + frame.resized_width;
  const int64_t plane = int64_t(params.height) * params.width;
  T* const image = canvas + 3 * plane * blockIdx.z;
#pragma unroll
  for (int row = int(threadIdx.y); row < kTile; row += kRowsPerPass) {
    const int y = int(blockIdx.y) * kTile + row;
    if (y >= params.height) {
      continue;
    }
    int bgr[3] = {params.pad, params.pad, params.pad};
    if (in_columns && y >= frame.top && y < frame.top + frame.resized_height) {
      const uint8_t* upper = frame.pixels + frame.pitch * tables.y.first[row];
      const uint8_t* lower = frame.pixels + frame.pitch * tables.y.second[row];
      const int left = 3 * tables.x.first[column], right = 3 * tables.x.second[column];
#pragma unroll
      for (int channel = 0; channel < 3; ++channel) {
        bgr[channel] = sample(upper + channel, lower + channel, left, right, tables, column, row);
      }
    }
    store(image, int64_t(y) * params.width + x, plane, bgr);
  }
}

template <class T>
int32_t run(const Y7LetterboxParams& params, const Y7Frame* frames, void* canvas, void* stream) {
  if (reinterpret_cast<uintptr_t>(canvas) % sizeof(T)) {
    return Y7_BAD_ARGUMENT;
  }
  const dim3 grid(unsigned(params.width - 1) / kTile + 1, unsigned(params.height - 1) / kTile + 1,
                  unsigned(params.batch));
  return launch(letterbox<T>, grid, dim3(kTile, kRowsPerPass), stream, params, frames, static_cast<T*>(canvas));
}

bool is_valid(const Y7LetterboxParams& params) {
  return params.batch > 0 && params.batch <= 65535 && params.height > 0 && params.height <= kMaxCanvasSide &&
         params.width > 0 && params.width <= kMaxCanvasSide && params.pad >= 0 && params.pad <= 255;
}

}  // namespace
}  // namespace y7

extern "C" int32_t y7_letterbox(const Y7LetterboxParams* params, const Y7Frame* frames, void* canvas, void* stream) {
  if (!params || !frames || !canvas || !y7::is_valid(*params)) {
    return Y7_BAD_ARGUMENT;
  }
  if (reinterpret_cast<uintptr_t>(frames) % alignof(Y7Frame)) {
    return Y7_BAD_ARGUMENT;
  }
  switch (params->type) {
    case Y7_FLOAT32:
      return y7::run<float>(*params, frames, canvas, stream);
    case Y7_FLOAT16:
      return y7::run<__half>(*params, frames, canvas, stream);
    case Y7_UINT8:
      return y7::run<uint8_t>(*params, frames, canvas, stream);
    default:
      return Y7_BAD_ARGUMENT;
  }
}
