// First kernel of nms.cu: from the head maps to the list of pairs above the threshold.
#ifndef Y7_NMS_SELECT_CUH
#define Y7_NMS_SELECT_CUH

#include "nms_plan.cuh"

namespace y7 {
namespace {

struct SelectScratch {
  Key key[kStagedKeys];
  uint32_t anchor[kSelectThreads];
  float objectness[kSelectThreads];
  uint32_t survivors, staged, start;
};

// Reserves one slot for each lane of the mask with a single atomic per warp; returns the thread's own slot.
__device__ __forceinline__ uint32_t reserve_slots(uint32_t* counter, uint32_t lanes) {
  uint32_t start = 0;
  if (lane() == 0) {
    start = atomicAdd(counter, uint32_t(__popc(lanes)));
  }
  return __shfl_sync(kFullWarp, start, 0) + rank_in(lanes);
}

// Collects the passing keys of a warp in shared memory; keys that exceed it are written to the image's list directly.
__device__ __forceinline__ void stage_keys(const Plan& plan, SelectScratch& s, uint32_t image, bool passes, Key key) {
  uint32_t lanes = __ballot_sync(kFullWarp, passes);
  if (!lanes) {
    return;
  }
  uint32_t slot = reserve_slots(&s.staged, lanes);
  if (passes && slot < kStagedKeys) {
    s.key[slot] = key;
  }
  const bool exceeds_block = passes && slot >= kStagedKeys;
  lanes = __ballot_sync(kFullWarp, exceeds_block);
  if (!lanes) {
    return;
  }
  slot = reserve_slots(&plan.passed[image], lanes);
  if (exceeds_block && slot < kCapacity) {
    plan.keys[size_t(image) * kCapacity + slot] = key;
  }
}

// One warp scores the classes of one anchor. Every score is computed in full: the load costs more than the exponential,
// and a comparison of the logit alone would be inexact at both ends of the float32 range.
template <class T>
__device__ void select_classes(const Plan& plan, SelectScratch& s, uint32_t image, uint32_t survivor,
                               const Thresholds& thresholds) {
  const uint32_t anchor = s.anchor[survivor];
  const float objectness = s.objectness[survivor];
  const AnchorRow<T> row = anchor_row<T>(plan, image, anchor);
  Key best = 0;
  for (uint32_t begin = 0; begin < plan.classes; begin += 32 * kClassesAtOnce) {
    float logit[kClassesAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
      const uint32_t class_id = begin + 32 * i + lane();
      logit[i] = class_id < plan.classes ? row[5 + class_id] : 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
      if (begin + 32 * i >= plan.classes) {
        break;
      }
      const uint32_t class_id = begin + 32 * i + lane();
      const float score = objectness * sigmoid(logit[i]);
      const Key key = key_of(score, anchor * plan.classes + class_id);
      if (thresholds.multi_label) {
        stage_keys(plan, s, image, class_id < plan.classes && score > thresholds.conf, key);
      } else if (class_id < plan.classes) {
        best = max(best, key);
      }
    }
  }
  if (thresholds.multi_label) {
    return;
  }
  for (int step = 16; step; step /= 2) {
    best = max(best, __shfl_xor_sync(kFullWarp, best, step));
  }
  stage_keys(plan, s, image, lane() == 0 && score_of(best) > thresholds.conf, best);
}

// Grid (anchors / kSelectThreads, B), block kSelectThreads, 6 KiB of shared memory. Reads A objectness values and
// 32 bytes per class of each anchor that passes (adjacent anchors share them). Writes 8 bytes per passing pair, with
// one global atomic per block for up to kStagedKeys pairs. Without the minimum of 4 blocks, ptxas spills registers.
template <class T>
__global__ void __launch_bounds__(kSelectThreads, 4) select(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SelectScratch, s);
  const uint32_t image = blockIdx.y, anchor = blockIdx.x * kSelectThreads + threadIdx.x;
  const Thresholds thresholds = load_thresholds(plan);
  if (threadIdx.x == 0) {
    s.survivors = s.staged = 0;
  }
  const float objectness = anchor < plan.anchors ? sigmoid(anchor_row<T>(plan, image, anchor)[4]) : 0.0f;
  const bool passes = anchor < plan.anchors && objectness > thresholds.conf;
  if (!__syncthreads_or(passes)) {
    return;
  }
  if (plan.classes == 1) {  // the logit of a single class is not trained: the score is the objectness
    stage_keys(plan, s, image, passes, key_of(objectness, anchor));
  } else {
    const uint32_t slot = reserve_slots(&s.survivors, __ballot_sync(kFullWarp, passes));
    if (passes) {
      s.anchor[slot] = anchor;
      s.objectness[slot] = objectness;
    }
    __syncthreads();
    for (uint32_t i = warp(); i < s.survivors; i += kSelectThreads / 32) {
      select_classes<T>(plan, s, image, i, thresholds);
    }
  }
  __syncthreads();
  const uint32_t staged = min(s.staged, kStagedKeys);
  if (threadIdx.x == 0) {
    s.start = staged ? atomicAdd(&plan.passed[image], staged) : 0;
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < staged; i += kSelectThreads) {
    if (s.start + i < kCapacity) {
      plan.keys[size_t(image) * kCapacity + s.start + i] = s.key[i];
    }
  }
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_SELECT_CUH
