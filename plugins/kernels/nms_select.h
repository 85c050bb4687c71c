// The first kernel of nms.cu: from head maps to the list of what passes the threshold.
#ifndef Y7_NMS_SELECT_H
#define Y7_NMS_SELECT_H

#include "nms_plan.h"

namespace y7 {
namespace {

struct SelectScratch {
  Key key[STAGED];
  uint32_t anchor[SELECT_THREADS];
  float objectness[SELECT_THREADS];
  uint32_t survivors, staged, start;
};

// One atomic for all lanes that have something; the lanes' slots are where its old value points.
__device__ __forceinline__ uint32_t slots_of(uint32_t* counter, uint32_t lanes) {
  uint32_t start = 0;
  if (lane() == 0) start = atomicAdd(counter, uint32_t(__popc(lanes)));
  return __shfl_sync(ALL, start, 0) + rank_in(lanes);
}

// Collects the warp's passing keys in the block; what finds no room goes to the image's list at once.
__device__ __forceinline__ void stage(const Plan& plan, SelectScratch& s, uint32_t image, bool passes, Key key) {
  uint32_t lanes = __ballot_sync(ALL, passes);
  if (!lanes) return;
  uint32_t slot = slots_of(&s.staged, lanes);
  if (passes && slot < STAGED) s.key[slot] = key;
  const bool is_late = passes && slot >= STAGED;
  lanes = __ballot_sync(ALL, is_late);
  if (!lanes) return;
  slot = slots_of(&plan.passed[image], lanes);
  if (is_late && slot < CAPACITY) plan.keys[size_t(image) * CAPACITY + slot] = key;
}

// A warp looks at the classes of one anchor. Every score is computed in full: the load costs more than the exponential,
// and a test on the logit alone would need care at both ends of float32.
template <class T>
__device__ void select_classes(const Plan& plan, SelectScratch& s, uint32_t image, uint32_t survivor, float conf) {
  const uint32_t anchor = s.anchor[survivor];
  const float objectness = s.objectness[survivor];
  const Row<T> row = row_of<T>(plan, image, anchor);
  Key best = 0;
  for (uint32_t begin = 0; begin < plan.classes; begin += 32 * CLASSES_AT_ONCE) {
    float logit[CLASSES_AT_ONCE];
#pragma unroll
    for (uint32_t i = 0; i < CLASSES_AT_ONCE; ++i) {
      const uint32_t number = begin + 32 * i + lane();
      logit[i] = number < plan.classes ? row[5 + number] : 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < CLASSES_AT_ONCE; ++i) {
      if (begin + 32 * i >= plan.classes) break;
      const uint32_t number = begin + 32 * i + lane();
      const float score = objectness * sigmoid(logit[i]);
      const Key key = key_of(score, anchor * plan.classes + number);
      if (plan.multi_label) {
        stage(plan, s, image, number < plan.classes && score > conf, key);
      } else if (number < plan.classes) {
        best = max(best, key);
      }
    }
  }
  if (plan.multi_label) return;
  for (int step = 16; step; step /= 2) best = max(best, __shfl_xor_sync(ALL, best, step));
  stage(plan, s, image, lane() == 0 && score_of(best) > conf, best);
}

// Grid (anchors / SELECT_THREADS, B), block SELECT_THREADS, 6 KiB of shared memory. Reads A objectness values and
// 32 bytes a class of each anchor that passes (adjacent ones share them); writes 8 bytes a passing pair, with one
// global atomic a block as long as these are STAGED at most. Without the 4, ptxas saves registers by spilling.
template <class T>
__global__ void __launch_bounds__(SELECT_THREADS, 4) select(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SelectScratch, s);
  const uint32_t image = blockIdx.y, anchor = blockIdx.x * SELECT_THREADS + threadIdx.x;
  const float conf = __ldg(plan.conf);
  if (threadIdx.x == 0) s.survivors = s.staged = 0;
  const float objectness = anchor < plan.anchors ? sigmoid(row_of<T>(plan, image, anchor)[4]) : 0.0f;
  const bool passes = anchor < plan.anchors && objectness > conf;
  if (!__syncthreads_or(passes)) return;
  if (plan.classes == 1) {  // the logit of a single class is never trained: the score is the objectness
    stage(plan, s, image, passes, key_of(objectness, anchor));
  } else {
    const uint32_t slot = slots_of(&s.survivors, __ballot_sync(ALL, passes));
    if (passes) {
      s.anchor[slot] = anchor;
      s.objectness[slot] = objectness;
    }
    __syncthreads();
    for (uint32_t i = warp(); i < s.survivors; i += SELECT_THREADS / 32) select_classes<T>(plan, s, image, i, conf);
  }
  __syncthreads();
  const uint32_t staged = min(s.staged, STAGED);
  if (threadIdx.x == 0) s.start = staged ? atomicAdd(&plan.passed[image], staged) : 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < staged; i += SELECT_THREADS) {
    if (s.start + i < CAPACITY) plan.keys[size_t(image) * CAPACITY + s.start + i] = s.key[i];
  }
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_SELECT_H
