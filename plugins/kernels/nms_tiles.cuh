// From the candidate list of an image to sorted tiles, for the second kernel of nms.cu.
#ifndef Y7_NMS_TILES_CUH
#define Y7_NMS_TILES_CUH

#include "nms_plan.cuh"

namespace y7 {
namespace {

struct SuppressScratch {
  // Selection and sorting of a tile.
  Key key[2][kThreads];
  uint32_t bin[kThreads];
  uint32_t warp_total[kThreads / 32];
  uint32_t filled, fitted;
  // NMS within a group of candidates.
  float4 box[kGroupSize];
  float area[kGroupSize];
  uint32_t class_id[kGroupSize];
  uint32_t suppressed[kGroupWords][kGroupSize];  // bit i of column j: candidate i is better than j and overlaps it
  uint32_t kept[kGroupWords];
};

static_assert(sizeof(SuppressScratch) <= 48 << 10, "exceeds the static shared memory of every GPU");

// The range of the list: it holds all keys of [low, high) that are not selected yet, and no other keys of that range.
struct Window {
  Key low, high;
  uint32_t stored, left;  // keys in the list, and how many of them are not selected yet
};

// Returns the sum of the values of this thread and of all threads before it.
__device__ uint32_t inclusive_sum(SuppressScratch& s, uint32_t value) {
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, step);
    if (lane() >= step) {
      value += before;
    }
  }
  if (lane() == 31) {
    s.warp_total[warp()] = value;
  }
  __syncthreads();
  for (uint32_t i = 0; i < warp(); ++i) {
    value += s.warp_total[i];
  }
  return value;
}

// Calls visit(key) for every pair of the image above the threshold; the anchors are distributed over the threads.
template <class T, class Visit>
__device__ void visit_passing_pairs(const Plan& plan, uint32_t image, const Thresholds& thresholds, Visit visit) {
  const float conf = thresholds.conf;
  for (uint32_t anchor = threadIdx.x; anchor < plan.anchors; anchor += kThreads) {
    const AnchorRow<T> row = anchor_row<T>(plan, image, anchor);
    const float objectness = sigmoid(row[4]);
    if (!(objectness > conf)) {
      continue;
    }
    const uint32_t classes = plan.classes > 1 ? plan.classes : 0;
    Key best = classes ? 0 : key_of(objectness, anchor);
    for (uint32_t begin = 0; begin < classes; begin += kClassesAtOnce) {
      float logit[kClassesAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
        logit[i] = begin + i < classes ? row[5 + begin + i] : 0.0f;
      }
#pragma unroll
      for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
        if (begin + i >= classes) {
          break;
        }
        const Key key = key_of(objectness * sigmoid(logit[i]), anchor * classes + begin + i);
        if (!thresholds.multi_label) {
          best = max(best, key);
        }
        if (thresholds.multi_label && score_of(key) > conf) {
          visit(key);
        }
      }
    }
    if (!(classes && thresholds.multi_label) && score_of(best) > conf) {
      visit(best);
    }
  }
}

// Returns a key such that [key, high) contains at most `limit` keys, and at least half as many if that many exist.
//
// Radix selection over key - min_key: a histogram of the highest kDigitBits bits; if the bins that fit contain too few
// keys, a histogram of the next bits within the first bin that does not fit. 62 bits need at most 7 scans; 1 or 2 if
// the scores differ.
template <class Scan>
__device__ Key lower_bound_key(SuppressScratch& s, Key min_key, Key high, uint32_t limit, Scan scan) {
  uint32_t shift = 64 - __clzll(high - 1 - min_key), room = limit;
  Key prefix = 0;
  while (true) {
    const uint32_t width = min(kDigitBits, shift), bins = 1u << width;
    shift -= width;
    s.bin[threadIdx.x] = 0;
    __syncthreads();
    scan([&](Key key) {
      const Key x = (key - min_key) >> shift;
      if (key < high && x >> width == prefix) {
        atomicAdd(&s.bin[bins - 1 - (uint32_t(x) & (bins - 1))], 1u);
      }
    });
    __syncthreads();
    const uint32_t sum = inclusive_sum(s, s.bin[threadIdx.x]);  // of this bin and all bins with higher scores
    if (threadIdx.x == 0) {
      s.fitted = 0;
    }
    const uint32_t fitting = min(uint32_t(__syncthreads_count(sum <= room)), bins);
    if (fitting == threadIdx.x + 1) {
      s.fitted = sum;
    }
    __syncthreads();
    room -= s.fitted;
    prefix = (prefix << width) + bins - fitting;  // the last bin that fits
    if (fitting == bins || room <= limit / 2 || shift == 0) {
      return min_key + (prefix << shift);
    }
    --prefix;
  }
}

// Refills the list with the best keys below window.high, as many as it can hold.
template <class T>
__device__ void refill(const Plan& plan, SuppressScratch& s, uint32_t image, const Thresholds& thresholds, Key min_key,
                       Window& window) {
  Key* keys = plan.keys + size_t(image) * kCapacity;
  const Key high = window.high;
  const Key low = lower_bound_key(s, min_key, high, kCapacity,
                                  [&](auto visit) { visit_passing_pairs<T>(plan, image, thresholds, visit); });
  if (threadIdx.x == 0) {
    s.filled = 0;
  }
  __syncthreads();
  visit_passing_pairs<T>(plan, image, thresholds, [&](Key key) {
    if (key < low || key >= high) {
      return;
    }
    const uint32_t slot = atomicAdd(&s.filled, 1u);
    if (slot < kCapacity) {
      keys[slot] = key;
    }
  });
  __syncthreads();
  window.low = low;
  window.stored = window.left = min(s.filled, kCapacity);
  __syncthreads();  // before the scratch memory is reused
}

// Removes the best keys from the window, at most kThreads: each thread gets one key, or 0. Returns their number.
__device__ uint32_t select_tile(const Plan& plan, SuppressScratch& s, uint32_t image, Key min_key, Window& window,
                                Key& key) {
  const Key* keys = plan.keys + size_t(image) * kCapacity;
  if (window.left == window.stored && window.left <= kThreads) {  // the usual case
    key = threadIdx.x < window.stored ? keys[threadIdx.x] : 0;
    window.high = window.low;
    window.left = 0;
    return window.stored;
  }
  const auto scan = [&](auto visit) {
    for (uint32_t i = threadIdx.x; i < window.stored; i += kThreads) {
      visit(keys[i]);
    }
  };
  const Key high = window.high;
  const Key low = window.left <= kThreads ? window.low : lower_bound_key(s, min_key, high, kThreads, scan);
  if (threadIdx.x == 0) {
    s.filled = 0;
  }
  __syncthreads();
  scan([&](Key candidate) {
    if (candidate < low || candidate >= high) {
      return;
    }
    const uint32_t slot = atomicAdd(&s.filled, 1u);
    if (slot < kThreads) {
      s.key[0][slot] = candidate;
    }
  });
  __syncthreads();
  const uint32_t count = min(s.filled, kThreads);
  key = threadIdx.x < count ? s.key[0][threadIdx.x] : 0;
  window.high = low;
  window.left -= count;
  __syncthreads();  // before the scratch memory is reused
  return count;
}

// Bitonic sort of the tile, one key per thread, in descending order. Only the next power of two above `count` threads
// participate. Steps within a warp are shuffles; the others alternate between two buffers, so each needs one barrier.
__device__ Key sort_tile(SuppressScratch& s, Key key, uint32_t count) {
  uint32_t size = 32, buffer = 0;
  while (size < count) {
    size *= 2;
  }
  const bool participates = threadIdx.x < size;
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t step = run / 2; step; step /= 2) {
      Key other = 0;
      if (step >= 32) {
        if (participates) {
          s.key[buffer][threadIdx.x] = key;
        }
        __syncthreads();
        if (participates) {
          other = s.key[buffer][threadIdx.x ^ step];
        }
        buffer ^= 1;
      } else if (participates) {
        other = __shfl_xor_sync(kFullWarp, key, int(step));
      }
      const bool keeps_larger = !(threadIdx.x & run) == !(threadIdx.x & step);
      key = keeps_larger ? max(key, other) : min(key, other);
    }
  }
  return key;
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_TILES_CUH
