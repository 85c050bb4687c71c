// First kernel of nms.cu: from the head maps to the list of pairs above the threshold.
#ifndef Y7_NMS_SELECT_CUH
#define Y7_NMS_SELECT_CUH

#include "nms_plan.cuh"

namespace y7 {
namespace {

struct SelectScratch {
  Key key[kStagedKeys];
  Key best[kSelectAnchors];  // of each anchor that passed, without multi_label
  // The anchors that passed.
  uint32_t anchor[kSelectAnchors];
  float objectness[kSelectAnchors];
  const void* row[kSelectAnchors];
  int64_t stride[kSelectAnchors];
  uint32_t survivors, staged, start;
};

static_assert(sizeof(SelectScratch) <= kSharedBytes,
              "Y7_NMS_STAGED or Y7_NMS_SELECT_THREADS: more than the shared memory of a block");

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

// One warp scores kClassesAtOnce classes of 32 anchors that passed; the work of the block is such units. The loads of a
// lane are independent, and neighboring lanes are neighboring cells, so in linear layout they share memory sectors.
// Every score is computed in full: the load costs more than the exponential, and a comparison of the logit alone would
// be inexact at both ends of the float32 range.
template <class T>
__device__ void select_classes(const Plan& plan, SelectScratch& s, uint32_t image, uint32_t unit,
                               const Thresholds& thresholds) {
  const uint32_t units_per_anchor = (plan.classes - 1) / kClassesAtOnce + 1, group = unit / units_per_anchor;
  const uint32_t survivor = group * 32 + lane(), begin = (unit - group * units_per_anchor) * kClassesAtOnce;
  const bool exists = survivor < s.survivors;
  const uint32_t slot = min(survivor, s.survivors - 1), anchor = s.anchor[slot];
  const float objectness = s.objectness[slot];
  const AnchorRow<T> row = {static_cast<const T*>(s.row[slot]), s.stride[slot]};
  T logit[kClassesAtOnce];  // loads without conditions, so that all are in flight at once
#pragma unroll
  for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
    logit[i] = row[5 + min(begin + i, plan.classes - 1)];
  }
  float value[kClassesAtOnce];
#pragma unroll
  for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
    value[i] = to_float(logit[i]);
  }
  sigmoids(value);
  Key best = 0;
#pragma unroll
  for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
    const bool is_class = exists && begin + i < plan.classes;
    const float score = objectness * value[i];
    const Key key = key_of(score, anchor * plan.classes + begin + i);
    if (thresholds.multi_label) {
      stage_keys(plan, s, image, is_class && score > thresholds.conf, key);
    } else if (is_class) {
      best = max(best, key);
    }
  }
  if (exists && !thresholds.multi_label) {
    atomicMax(&s.best[survivor], best);
  }
}

// Grid (anchors / kSelectAnchors, B), block kSelectThreads, 12 KiB of shared memory. Reads A objectness values and
// 32 bytes per class of each anchor that passes (adjacent anchors share them). Writes 8 bytes per passing pair, with
// one global atomic per block for up to kStagedKeys pairs. Half of the threads only score classes.
template <class T>
__global__ void __launch_bounds__(kSelectThreads, 2) select(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SelectScratch, s);
  allow_next_kernel();  // its few blocks wait beside these, all of which have started then
  const uint32_t image = blockIdx.y, anchor = blockIdx.x * kSelectAnchors + threadIdx.x;
  const Thresholds thresholds = load_thresholds(plan);
  if (threadIdx.x == 0) {
    s.survivors = s.staged = 0;
  }
  const bool has_anchor = threadIdx.x < kSelectAnchors && anchor < plan.anchors;
  if (threadIdx.x < kSelectAnchors) {
    s.best[threadIdx.x] = 0;
  }
  AnchorRow<T> row = {};
  float objectness = 0;
  if (has_anchor) {
    row = anchor_row<T>(plan, image, locate(plan, anchor));
    objectness = sigmoid(to_float(row[4]));
  }
  const bool passes = has_anchor && objectness > thresholds.conf;
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
      s.row[slot] = row.first;
      s.stride[slot] = row.channel_stride;
    }
    __syncthreads();
    const uint32_t units = (s.survivors + 31) / 32 * ((plan.classes - 1) / kClassesAtOnce + 1);
    for (uint32_t unit = warp(); unit < units; unit += kSelectThreads / 32) {
      select_classes<T>(plan, s, image, unit, thresholds);
    }
    if (!thresholds.multi_label) {
      __syncthreads();
      const Key best = threadIdx.x < s.survivors ? s.best[threadIdx.x] : 0;
      stage_keys(plan, s, image, threadIdx.x < s.survivors && score_of(best) > thresholds.conf, best);
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
