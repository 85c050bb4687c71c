// From the candidate list of an image to sorted tiles, for the second kernel of nms.cu.
#ifndef Y7_NMS_TILES_CUH
#define Y7_NMS_TILES_CUH

#include "nms_plan.cuh"

namespace y7 {
namespace {

// An entry of the overlap matrix that one thread writes: kRowsPerThread bits.
template <uint32_t bits>
struct Unsigned {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint8_t;
};
template <>
struct Unsigned<16> {
  using type = uint16_t;
};
using MatrixEntry = Unsigned<kRowsPerThread>::type;
union MatrixWord {
  uint32_t word;
  MatrixEntry part[32 / kRowsPerThread];
};

struct SuppressScratch {
  // Selection and sorting of a tile.
  Key key[2][kThreads];
  uint32_t bin[kThreads];
  uint32_t bin_end[kThreads];
  uint32_t warp_total[kWarps];
  uint32_t filled, fitted;
  // Detections that suppress other candidates: those of earlier tiles, then the survivors of each group.
  float4 winner_box[kWinners];
  uint32_t winner_class[kWinners];
  // NMS within a group of candidates.
  float4 box[kGroupSize];
  uint32_t class_id[kGroupSize];
  MatrixWord suppressed[kGroupWords][kGroupSize];  // bit i of column j: candidate i is better than j and overlaps it
  uint32_t kept[kGroupWords];
};

static_assert(sizeof(SuppressScratch) <= kSharedBytes, "more than the shared memory of a block");

// The range of the list: it holds all keys of [low, high) that are not selected yet, and no other keys of that range.
struct Window {
  Key low, high;
  uint32_t stored, left;  // keys in the list, and how many of them are not selected yet
};

// Returns the sum of the values of this lane and of all lanes before it.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value) {
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, step);
    if (lane() >= step) {
      value += before;
    }
  }
  return value;
}

struct BlockSum {
  uint32_t before, all;
};

// Returns the sum over all warps before this one, and over all warps. `total` is that of the warp, in its last lane.
__device__ BlockSum sum_over_warps(SuppressScratch& s, uint32_t total) {
  if (lane() == 31) {
    s.warp_total[warp()] = total;
  }
  __syncthreads();
  const uint32_t sum = warp_inclusive_sum(lane() < kWarps ? s.warp_total[lane()] : 0);
  const uint32_t before = __shfl_sync(kFullWarp, sum, int(warp() + 31) % 32);
  return {warp() ? before : 0, __shfl_sync(kFullWarp, sum, 31)};
}

// Returns the sum of the values of this thread and of all threads before it.
__device__ uint32_t inclusive_sum(SuppressScratch& s, uint32_t value) {
  value = warp_inclusive_sum(value);
  return value + sum_over_warps(s, value).before;
}

// Calls visit(key) for every pair of the image above the threshold; the anchors are distributed over the threads.
template <class T, class Visit>
__device__ void visit_passing_pairs(const Plan& plan, uint32_t image, const Thresholds& thresholds, Visit visit) {
  const float conf = thresholds.conf;
  for (uint32_t anchor = threadIdx.x; anchor < plan.anchors; anchor += kThreads) {
    const AnchorRow<T> row = anchor_row<T>(plan, image, locate(plan, anchor));
    const float objectness = sigmoid(to_float(row[4]));
    if (!(objectness > conf)) {
      continue;
    }
    const uint32_t classes = plan.classes > 1 ? plan.classes : 0;
    Key best = classes ? 0 : key_of(objectness, anchor);
    for (uint32_t begin = 0; begin < classes; begin += kClassesAtOnce) {
      float logit[kClassesAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kClassesAtOnce; ++i) {
        logit[i] = begin + i < classes ? to_float(row[5 + begin + i]) : 0.0f;
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
}

// Removes the best keys from the window, at most kThreads: each thread gets one key, or 0. Returns their number. Before
// the scratch memory that it uses is written again, sort_tile has passed a barrier.
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
    for (uint32_t begin = threadIdx.x; begin < window.stored; begin += kThreads * kKeysAtOnce) {
      Key loaded[kKeysAtOnce];
#pragma unroll
      for (uint32_t i = 0; i < kKeysAtOnce; ++i) {
        loaded[i] = keys[min(begin + i * kThreads, window.stored - 1)];
      }
#pragma unroll
      for (uint32_t i = 0; i < kKeysAtOnce; ++i) {
        if (begin + i * kThreads < window.stored) {
          visit(loaded[i]);
        }
      }
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
  return count;
}

// Sorts the keys of a tile, one per thread and all in [low, high), in descending order. Threads without a key have 0.
//
// A counting sort by the highest bits of key - low; then a key counts the larger ones of its bin. The bins hold few
// keys, except where scores are equal: the cost grows with the largest bin.
__device__ Key sort_tile(SuppressScratch& s, Key key, Key low, Key high) {
  const uint32_t bits = 64 - __clzll((long long)(high - 1 - low)), shift = bits < kDigitBits ? 0 : bits - kDigitBits;
  s.bin[threadIdx.x] = 0;
  __syncthreads();
  const uint32_t bin = kThreads - 1 - uint32_t((key - low) >> shift);  // of a key; the highest scores come first
  const uint32_t arrival = key ? atomicAdd(&s.bin[bin], 1u) : 0;
  __syncthreads();
  const uint32_t end = inclusive_sum(s, s.bin[threadIdx.x]);
  s.bin_end[threadIdx.x] = end;
  __syncthreads();
  const uint32_t first = key ? s.bin_end[bin] - s.bin[bin] : 0, last = key ? s.bin_end[bin] : 0;
  if (key) {
    s.key[0][first + arrival] = key;
  }
  s.key[1][threadIdx.x] = 0;
  __syncthreads();
  uint32_t rank = first;
#pragma unroll 4
  for (uint32_t i = first; i < last; ++i) {
    rank += s.key[0][i] > key;
  }
  if (key) {
    s.key[1][rank] = key;
  }
  __syncthreads();
  return s.key[1][threadIdx.x];
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_TILES_CUH
