// What both kernels of nms.cu know: sizes, the plan of a call, keys, and how a head map is read.
#ifndef Y7_NMS_PLAN_H
#define Y7_NMS_PLAN_H

#include "launch.h"

#ifndef Y7_NMS_THREADS  // tests lower these to reach the rare paths with small inputs
#define Y7_NMS_THREADS 1024
#endif
#ifndef Y7_NMS_SELECT_THREADS
#define Y7_NMS_SELECT_THREADS 256
#endif
#ifndef Y7_NMS_CAPACITY
#define Y7_NMS_CAPACITY 32768
#endif
#ifndef Y7_NMS_STAGED
#define Y7_NMS_STAGED 512
#endif

namespace y7 {
namespace {

using Key = unsigned long long;

constexpr uint32_t THREADS = Y7_NMS_THREADS;  // of `suppress`: one candidate of a tile each, one bin of a histogram
constexpr uint32_t SELECT_THREADS = Y7_NMS_SELECT_THREADS;  // one anchor each
constexpr uint32_t CAPACITY = Y7_NMS_CAPACITY;              // keys an image
constexpr uint32_t STAGED = Y7_NMS_STAGED;                  // keys a block of `select` collects before it lists them
constexpr uint32_t GROUP = THREADS < 256 ? 32 : THREADS / 8;  // candidates that settle among themselves at once
constexpr uint32_t WORDS = GROUP / 32;
constexpr uint32_t ROWS = GROUP * GROUP / THREADS;  // of the matrix of a group, a thread's share of one column
constexpr uint32_t CLASSES_AT_ONCE = 4;             // loads in flight for each lane
constexpr uint32_t ALL = ~0u;
constexpr Key ABOVE_ONE = Key(0x3f800001) << 32;  // beyond every key: no score exceeds 1
constexpr int32_t MAX_BATCH = 1024;

static_assert(THREADS >= 64 && THREADS <= 1024 && (THREADS & (THREADS - 1)) == 0, "");
static_assert(SELECT_THREADS % 32 == 0 && 32 % ROWS == 0 && CAPACITY >= 1 && STAGED >= 1, "");

constexpr uint32_t log2_of(uint32_t x) { return x < 2 ? 0 : 1 + log2_of(x / 2); }
constexpr uint32_t DIGIT = log2_of(THREADS);

struct Level {
  const void* data;
  int64_t batch_stride, channel_stride, cell_stride;
  uint32_t first, cells, width;  // anchors of the levels before, cells of this one
  float stride;
  float anchors[Y7_ANCHORS][2];
};

struct Plan {
  Level level[Y7_MAX_LEVELS];
  uint32_t levels, anchors, classes, max_det, max_candidates;
  bool multi_label, class_agnostic;
  const float* conf;
  const float* iou;
  Y7NmsOutputs outputs;
  uint32_t* passed;  // [B], how many pairs passed, also beyond CAPACITY
  Key* keys;         // [B, CAPACITY]
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// NaN becomes a key above all others, so it wins a maximum; and then it does not pass.
__device__ __forceinline__ Key key_of(float score, uint32_t pair) { return Key(__float_as_uint(score)) << 32 | ~pair; }
__device__ __forceinline__ float score_of(Key key) { return __uint_as_float(uint32_t(key >> 32)); }
__device__ __forceinline__ uint32_t pair_of(Key key) { return ~uint32_t(key); }

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }
// How many of these lanes come before the thread's own.
__device__ __forceinline__ uint32_t rank_in(uint32_t lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

// The 5 + C values of one anchor: tx, ty, tw, th, objectness, classes.
template <class T>
struct Row {
  const T* first;
  int64_t channel_stride;
  __device__ float operator[](uint32_t column) const { return to_float(__ldg(first + column * channel_stride)); }
};

__device__ __forceinline__ uint32_t level_of(const Plan& plan, uint32_t anchor) {
  uint32_t level = 0;
  while (level + 1 < plan.levels && anchor >= plan.level[level + 1].first) ++level;
  return level;
}

template <class T>
__device__ __forceinline__ Row<T> row_of(const Plan& plan, uint32_t image, uint32_t anchor) {
  const Level& level = plan.level[level_of(plan, anchor)];
  const uint32_t number = (anchor - level.first) / level.cells, cell = (anchor - level.first) % level.cells;
  const int64_t offset = image * level.batch_stride + cell * level.cell_stride +
                         int64_t(number) * (5 + plan.classes) * level.channel_stride;
  return {static_cast<const T*>(level.data) + offset, level.channel_stride};
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_PLAN_H
