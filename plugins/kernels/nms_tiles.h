// From the list of an image to sorted tiles of its best candidates, for the second kernel of nms.cu.
#ifndef Y7_NMS_TILES_H
#define Y7_NMS_TILES_H

#include "nms_plan.h"

namespace y7 {
namespace {

struct SuppressScratch {
  // A tile in the making.
  Key key[2][THREADS];
  uint32_t bin[THREADS];
  uint32_t warp_total[THREADS / 32];
  uint32_t filled, fitted;
  // A group that settles among itself.
  float4 box[GROUP];
  float area[GROUP];
  uint32_t class_id[GROUP];
  uint32_t beaten[WORDS][GROUP];  // bit i of column j: candidate i is better than j and overlaps it
  uint32_t kept[WORDS];
};

static_assert(sizeof(SuppressScratch) <= 48 << 10, "more than every GPU gives without being asked");

// Where the list stands: it holds all keys of [low, high) that are not yet taken, and no others of that range.
struct Window {
  Key low, high;
  uint32_t stored, left;  // keys in the list, and those of them not yet taken
};

// The sum of the values of this thread and those before it.
__device__ uint32_t inclusive_sum(SuppressScratch& s, uint32_t value) {
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(ALL, value, step);
    if (lane() >= step) value += before;
  }
  if (lane() == 31) s.warp_total[warp()] = value;
  __syncthreads();
  for (uint32_t i = 0; i < warp(); ++i) value += s.warp_total[i];
  return value;
}

// visit(key) for every pair of the image that passes; the threads share the anchors.
template <class T, class Visit>
__device__ void visit_maps(const Plan& plan, uint32_t image, float conf, Visit visit) {
  for (uint32_t anchor = threadIdx.x; anchor < plan.anchors; anchor += THREADS) {
    const Row<T> row = row_of<T>(plan, image, anchor);
    const float objectness = sigmoid(row[4]);
    if (!(objectness > conf)) continue;
    const uint32_t classes = plan.classes > 1 ? plan.classes : 0;
    Key best = classes ? 0 : key_of(objectness, anchor);
    for (uint32_t begin = 0; begin < classes; begin += CLASSES_AT_ONCE) {
      float logit[CLASSES_AT_ONCE];
#pragma unroll
      for (uint32_t i = 0; i < CLASSES_AT_ONCE; ++i) logit[i] = begin + i < classes ? row[5 + begin + i] : 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < CLASSES_AT_ONCE; ++i) {
        if (begin + i >= classes) break;
        const Key key = key_of(objectness * sigmoid(logit[i]), anchor * classes + begin + i);
        if (!plan.multi_label) best = max(best, key);
        if (plan.multi_label && score_of(key) > conf) visit(key);
      }
    }
    if (!(classes && plan.multi_label) && score_of(best) > conf) visit(best);
  }
}

// A key such that at most `limit` keys of [it, high) exist, and at least half as many if there are enough.
//
// Radix selection over key - base: a histogram of the highest DIGIT bits, then, if the bins that fit hold too few keys,
// of the next bits within the first one that does not fit. 62 bits, so 7 scans at most; 1 or 2 where the scores differ.
template <class Scan>
__device__ Key cut(SuppressScratch& s, Key base, Key high, uint32_t limit, Scan scan) {
  uint32_t shift = 64 - __clzll(high - 1 - base), room = limit;
  Key prefix = 0;
  while (true) {
    const uint32_t width = min(DIGIT, shift), bins = 1u << width;
    shift -= width;
    s.bin[threadIdx.x] = 0;
    __syncthreads();
    scan([&](Key key) {
      const Key x = (key - base) >> shift;
      if (key < high && x >> width == prefix) atomicAdd(&s.bin[bins - 1 - (uint32_t(x) & (bins - 1))], 1u);
    });
    __syncthreads();
    const uint32_t sum = inclusive_sum(s, s.bin[threadIdx.x]);  // of this bin and all better ones
    if (threadIdx.x == 0) s.fitted = 0;
    const uint32_t fitting = min(uint32_t(__syncthreads_count(sum <= room)), bins);
    if (fitting == threadIdx.x + 1) s.fitted = sum;
    __syncthreads();
    room -= s.fitted;
    prefix = (prefix << width) + bins - fitting;  // the last bin that fits
    if (fitting == bins || room <= limit / 2 || shift == 0) return base + (prefix << shift);
    --prefix;
  }
}

// Fills the list with the best keys below window.high that it can hold.
template <class T>
__device__ void refill(const Plan& plan, SuppressScratch& s, uint32_t image, float conf, Key base, Window& window) {
  Key* keys = plan.keys + size_t(image) * CAPACITY;
  const Key high = window.high;
  const Key low = cut(s, base, high, CAPACITY, [&](auto visit) { visit_maps<T>(plan, image, conf, visit); });
  if (threadIdx.x == 0) s.filled = 0;
  __syncthreads();
  visit_maps<T>(plan, image, conf, [&](Key key) {
    if (key < low || key >= high) return;
    const uint32_t slot = atomicAdd(&s.filled, 1u);
    if (slot < CAPACITY) keys[slot] = key;
  });
  __syncthreads();
  window.low = low;
  window.stored = window.left = min(s.filled, CAPACITY);
  __syncthreads();  // the scratch memory is free again
}

// Takes the best THREADS keys or fewer out of the window: each thread gets one, or 0. Returns how many.
__device__ uint32_t take_tile(const Plan& plan, SuppressScratch& s, uint32_t image, Key base, Window& window,
                              Key& key) {
  const Key* keys = plan.keys + size_t(image) * CAPACITY;
  if (window.left == window.stored && window.left <= THREADS) {  // nearly always
    key = threadIdx.x < window.stored ? keys[threadIdx.x] : 0;
    window.high = window.low;
    window.left = 0;
    return window.stored;
  }
  const auto scan = [&](auto visit) {
    for (uint32_t i = threadIdx.x; i < window.stored; i += THREADS) visit(keys[i]);
  };
  const Key high = window.high;
  const Key low = window.left <= THREADS ? window.low : cut(s, base, high, THREADS, scan);
  if (threadIdx.x == 0) s.filled = 0;
  __syncthreads();
  scan([&](Key candidate) {
    if (candidate < low || candidate >= high) return;
    const uint32_t slot = atomicAdd(&s.filled, 1u);
    if (slot < THREADS) s.key[0][slot] = candidate;
  });
  __syncthreads();
  const uint32_t count = min(s.filled, THREADS);
  key = threadIdx.x < count ? s.key[0][threadIdx.x] : 0;
  window.high = low;
  window.left -= count;
  __syncthreads();  // the scratch memory is free again
  return count;
}

// Bitonic sort of the tile, one key a thread, best first. Only the power of two around `count` takes part; steps
// within a warp are shuffles, the others go through two buffers in turn so that each costs one barrier.
__device__ Key sorted(SuppressScratch& s, Key key, uint32_t count) {
  uint32_t size = 32, buffer = 0;
  while (size < count) size *= 2;
  const bool takes_part = threadIdx.x < size;
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step; step /= 2) {
      Key other = 0;
      if (step >= 32) {
        if (takes_part) s.key[buffer][threadIdx.x] = key;
        __syncthreads();
        if (takes_part) other = s.key[buffer][threadIdx.x ^ step];
        buffer ^= 1;
      } else if (takes_part) {
        other = __shfl_xor_sync(ALL, key, int(step));
      }
      const bool takes_larger = !(threadIdx.x & run) == !(threadIdx.x & step);
      key = takes_larger ? max(key, other) : min(key, other);
    }
  }
  return key;
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_TILES_H
