// Shared by both kernels of nms.cu: sizes, the parameters of a call, sort keys, and access to the head maps.
#ifndef Y7_NMS_PLAN_CUH
#define Y7_NMS_PLAN_CUH

#include "launch.cuh"

// Tests define smaller values to reach the rare paths with small inputs.
#ifndef Y7_NMS_THREADS
#define Y7_NMS_THREADS 512
#endif
#ifndef Y7_NMS_SELECT_THREADS
#define Y7_NMS_SELECT_THREADS 512
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

constexpr uint32_t kThreads = Y7_NMS_THREADS;  // of `suppress`: one candidate of a tile, one histogram bin each
constexpr uint32_t kSelectThreads = Y7_NMS_SELECT_THREADS;  // of `select`
constexpr uint32_t kSelectAnchors = kSelectThreads / 2;     // that a block of `select` reads
constexpr uint32_t kCapacity = Y7_NMS_CAPACITY;             // keys per image
constexpr uint32_t kStagedKeys = Y7_NMS_STAGED;             // keys that a block of `select` collects in shared memory
// Candidates that are resolved at once.
constexpr uint32_t kGroupSize = kThreads < 256 ? 32 : kThreads < 512 ? kThreads / 4 : 128;
// Detections in shared memory that candidates are compared with; at least kGroupSize.
constexpr uint32_t kWinners = kThreads < 512 ? kThreads : 512;
constexpr uint32_t kGroupWords = kGroupSize / 32;
// Rows of one column of a group's overlap matrix that a thread computes.
constexpr uint32_t kRowsPerThread = kGroupSize * kGroupSize / kThreads;
constexpr uint32_t kClassesAtOnce = 5, kKeysAtOnce = 4;  // loads in flight per thread
constexpr uint32_t kWarps = kThreads / 32;
constexpr size_t kSharedBytes = 48 << 10;  // of a block, without an attribute of the launch
constexpr uint32_t kFullWarp = ~0u;
constexpr Key kKeyAboveOne = Key(0x3f800001) << 32;  // above every key: no score exceeds 1

static_assert(kThreads >= 64 && kThreads <= 1024 && (kThreads & (kThreads - 1)) == 0,
              "Y7_NMS_THREADS is a power of two from 64 to 1024");
static_assert(kSelectThreads % 64 == 0 && kCapacity >= 1 && kStagedKeys >= 1, "");
static_assert(kRowsPerThread == 8 || kRowsPerThread == 16 || kRowsPerThread == 32, "");

constexpr uint32_t log2_of(uint32_t x) { return x < 2 ? 0 : 1 + log2_of(x / 2); }
constexpr uint32_t kDigitBits = log2_of(kThreads);

struct Level {
  const void* data;
  int64_t batch_stride, channel_stride, cell_stride;
  uint32_t first, cells, width;  // first anchor, cells of this level, cells per row
  float stride;
  float anchors[Y7_ANCHORS][2];
};

struct Plan {
  Level level[Y7_MAX_LEVELS];
  uint32_t levels, anchors, classes, max_det, max_candidates;
  Y7NmsThresholds thresholds;
  Y7NmsOutputs outputs;
  uint32_t* passed;  // [B], number of pairs above the threshold, which may exceed kCapacity
  Key* keys;         // [B, kCapacity], the candidate list of each image
};

// The values behind the pointers of Y7NmsThresholds.
struct Thresholds {
  float conf, iou;
  bool multi_label, class_agnostic;
};

__device__ __forceinline__ Thresholds load_thresholds(const Plan& plan) {
  const Y7NmsThresholds& t = plan.thresholds;
  return {__ldg(t.conf), __ldg(t.iou), __ldg(t.multi_label) > 0.5f, __ldg(t.class_agnostic) > 0.5f};
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The same for several values, whose exponentials and divisions overlap in time.
template <uint32_t N>
__device__ __forceinline__ void sigmoids(float (&x)[N]) {
#pragma unroll
  for (uint32_t i = 0; i < N; ++i) {
    x[i] = expf(-x[i]);
  }
#pragma unroll
  for (uint32_t i = 0; i < N; ++i) {
    x[i] = 1.0f / (1.0f + x[i]);
  }
}

// NaN becomes a key above all others: it wins a maximum, and then fails the comparison with the threshold.
__device__ __forceinline__ Key key_of(float score, uint32_t pair) { return Key(__float_as_uint(score)) << 32 | ~pair; }
__device__ __forceinline__ float score_of(Key key) { return __uint_as_float(uint32_t(key >> 32)); }
__device__ __forceinline__ uint32_t pair_of(Key key) { return ~uint32_t(key); }

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
__device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }
// Number of lanes in the mask before the thread's own lane.
__device__ __forceinline__ uint32_t rank_in(uint32_t lanes) { return __popc(lanes & ((1u << lane()) - 1)); }

// The 5 + C logits of one anchor: tx, ty, tw, th, objectness, classes.
template <class T>
struct AnchorRow {
  const T* first;
  int64_t channel_stride;
  __device__ T operator[](uint32_t column) const { return __ldg(first + column * channel_stride); }
};

__device__ __forceinline__ uint32_t level_of(const Plan& plan, uint32_t anchor) {
  uint32_t level = 0;
  while (level + 1 < plan.levels && anchor >= plan.level[level + 1].first) {
    ++level;
  }
  return level;
}

struct AnchorIndex {
  uint32_t level, anchor_in_cell, cell;
};

// With comparisons instead of a division, which takes longer than a load from the cache.
__device__ __forceinline__ AnchorIndex locate(const Plan& plan, uint32_t anchor) {
  const uint32_t level = level_of(plan, anchor), cells = plan.level[level].cells;
  const uint32_t index = anchor - plan.level[level].first;
  const uint32_t anchor_in_cell = uint32_t(index >= cells) + uint32_t(index >= 2 * cells);
  return {level, anchor_in_cell, index - anchor_in_cell * cells};
}

template <class T>
__device__ __forceinline__ AnchorRow<T> anchor_row(const Plan& plan, uint32_t image, AnchorIndex index) {
  const Level& level = plan.level[index.level];
  const int64_t offset = image * level.batch_stride + index.cell * level.cell_stride +
                         int64_t(index.anchor_in_cell) * (5 + plan.classes) * level.channel_stride;
  return {static_cast<const T*>(level.data) + offset, level.channel_stride};
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_PLAN_CUH
