// Second kernel of nms.cu: from the list of an image to its detections.
#ifndef Y7_NMS_SUPPRESS_CUH
#define Y7_NMS_SUPPRESS_CUH

#include "nms_tiles.cuh"

namespace y7 {
namespace {

struct Candidate {
  float4 box;  // xyxy in input pixels
  float area;
  uint32_t class_id;
};

__device__ __forceinline__ float area_of(float4 box) { return __fmul_rn(box.z - box.x, box.w - box.y); }

template <class T>
__device__ Candidate decode(const Plan& plan, uint32_t image, Key key) {
  const uint32_t anchor = pair_of(key) / plan.classes;
  const AnchorIndex index = locate(plan, anchor);
  const AnchorRow<T> row = anchor_row<T>(plan, image, index);
  const T logit[4] = {row[0], row[1], row[2], row[3]};
  float t[4] = {to_float(logit[0]), to_float(logit[1]), to_float(logit[2]), to_float(logit[3])};
  sigmoids(t);
  const Level& level = plan.level[index.level];
  const uint32_t cell_y = index.cell / level.width, cell_x = index.cell - cell_y * level.width;
  const float x = __fmul_rn(t[0] * 2 - 0.5f + float(cell_x), level.stride);
  const float y = __fmul_rn(t[1] * 2 - 0.5f + float(cell_y), level.stride);
  const float w = t[2] * 2, h = t[3] * 2;
  const float half_w = w * w * level.anchors[index.anchor_in_cell][0] * 0.5f,
              half_h = h * h * level.anchors[index.anchor_in_cell][1] * 0.5f;
  Candidate candidate;
  candidate.box = make_float4(x - half_w, y - half_h, x + half_w, y + half_h);
  candidate.area = area_of(candidate.box);
  candidate.class_id = pair_of(key) - anchor * plan.classes;
  return candidate;
}

// Returns whether IoU > iou. Without a division, so two empty boxes need no special case; NaN overlaps nothing.
__device__ __forceinline__ bool overlap(float4 a, float area_a, const Candidate& b, float iou) {
  const float width = fminf(a.z, b.box.z) - fmaxf(a.x, b.box.x);
  const float height = fminf(a.w, b.box.w) - fmaxf(a.y, b.box.y);
  const float shared = __fmul_rn(fmaxf(width, 0.0f), fmaxf(height, 0.0f));
  return shared > iou * (area_a + b.area - shared);
}

// Returns the bits of the entries i < N of class_ids whose candidates compete with this class. Most do not, and a
// comparison of classes costs a tenth of one of boxes.
template <uint32_t N>
__device__ __forceinline__ uint32_t competitors(const uint32_t* class_ids, uint32_t class_id,
                                                const Thresholds& thresholds) {
  uint32_t loaded[N], bits = 0;
#pragma unroll
  for (uint32_t i = 0; i < N; ++i) {
    loaded[i] = class_ids[i];
  }
#pragma unroll
  for (uint32_t i = 0; i < N; ++i) {
    bits |= uint32_t(loaded[i] == class_id) << i;
  }
  return thresholds.class_agnostic ? ~0u : bits;
}

// Returns the entries of `left` whose boxes overlap the candidate, which is worse.
__device__ __forceinline__ uint32_t overlapping(const float4* boxes, uint32_t left, const Candidate& mine, float iou) {
  uint32_t found = 0;
  for (; left; left &= left - 1) {
    const uint32_t i = __ffs(int(left)) - 1;
    found |= uint32_t(overlap(boxes[i], area_of(boxes[i]), mine, iou)) << i;
  }
  return found;
}

__device__ __forceinline__ uint32_t low_bits(uint32_t count) { return count < 32 ? (1u << count) - 1 : ~0u; }

// Greedy NMS within a group, from its overlap matrix, by warp 0. After n iterations the first n candidates of a word
// are final; usually two or three iterations resolve all 32.
__device__ void resolve(SuppressScratch& s, uint32_t size) {
  uint32_t kept[kGroupWords];
#pragma unroll
  for (uint32_t word = 0; word < kGroupWords; ++word) {
    uint32_t now = 0;
    if (32 * word < size) {
      const uint32_t j = 32 * word + lane(), suppressors = s.suppressed[word][j].word;
      bool is_suppressed = j >= size;
#pragma unroll
      for (uint32_t better = 0; better < word; ++better) {
        is_suppressed = is_suppressed || (s.suppressed[better][j].word & kept[better]);
      }
      uint32_t before;
      now = __ballot_sync(kFullWarp, !is_suppressed);
      do {
        before = now;
        now = __ballot_sync(kFullWarp, !is_suppressed && !(suppressors & before));
      } while (now != before);
    }
    kept[word] = now;
    if (lane() == 0) {
      s.kept[word] = now;
    }
  }
}

// Computes the overlap matrix of a group of `size` candidates and fills s.kept. If `is_member`, the thread's own
// candidate is number `rank` of the group.
__device__ void resolve_group(SuppressScratch& s, const Candidate& mine, bool is_member, uint32_t rank, uint32_t size,
                              const Thresholds& thresholds) {
  if (is_member) {
    s.box[rank] = mine.box;
    s.class_id[rank] = mine.class_id;
  }
  __syncthreads();
  const uint32_t j = threadIdx.x % kGroupSize, first = threadIdx.x / kGroupSize * kRowsPerThread;
  uint32_t bits = 0;
  if (j < size && first < j) {
    const Candidate worse = {s.box[j], area_of(s.box[j]), s.class_id[j]};
    const uint32_t better = competitors<kRowsPerThread>(&s.class_id[first], worse.class_id, thresholds);
    bits = overlapping(&s.box[first], better & low_bits(min(j - first, kRowsPerThread)), worse, thresholds.iou);
  }
  s.suppressed[first / 32][j].part[first % 32 / kRowsPerThread] = MatrixEntry(bits);
  __syncthreads();
  if (warp() == 0) {
    resolve(s, size);
  }
  __syncthreads();
}

// Returns whether the candidate survives the first `size` detections of s.winner_box.
__device__ bool survives(const SuppressScratch& s, const Candidate& mine, uint32_t size, const Thresholds& thresholds) {
  for (uint32_t begin = 0; begin < size; begin += 32) {
    const uint32_t better = competitors<32>(&s.winner_class[begin], mine.class_id, thresholds);
    if (overlapping(&s.winner_box[begin], better & low_bits(size - begin), mine, thresholds.iou)) {
      return false;
    }
  }
  return true;
}

// Returns whether the candidate survives the detections of earlier tiles, which are the rows 0 to kept - 1 of the
// outputs.
__device__ bool survives_earlier_tiles(const Plan& plan, SuppressScratch& s, uint32_t image, const Candidate& mine,
                                       bool alive, uint32_t kept, const Thresholds& thresholds) {
  const size_t row = size_t(image) * plan.max_det;
  for (uint32_t begin = 0; begin < kept; begin += kWinners) {
    const uint32_t size = min(kept - begin, kWinners), i = begin + threadIdx.x;
    __syncthreads();
    if (threadIdx.x < size) {
      s.winner_box[threadIdx.x] = reinterpret_cast<const float4*>(plan.outputs.boxes)[row + i];
      s.winner_class[threadIdx.x] = uint32_t(plan.outputs.classes[row + i]);
    }
    __syncthreads();
    alive = alive && survives(s, mine, size, thresholds);
  }
  return alive;
}

// Appends the survivors of a sorted tile to the outputs, which already contain `kept` rows. Returns the new number.
//
// The first kGroupSize candidates that are still alive are resolved among themselves; their survivors then suppress the
// candidates after them, until none is left. So every candidate is compared with each better survivor once.
__device__ uint32_t append_survivors(const Plan& plan, SuppressScratch& s, uint32_t image, const Candidate& mine,
                                     float score, bool alive, uint32_t kept, const Thresholds& thresholds) {
  const size_t row = size_t(image) * plan.max_det;
  alive = survives_earlier_tiles(plan, s, image, mine, alive, kept, thresholds);
  while (kept < plan.max_det) {
    const uint32_t lanes = __ballot_sync(kFullWarp, alive);
    const BlockSum count = sum_over_warps(s, uint32_t(__popc(lanes)));
    if (!count.all) {
      break;
    }
    const uint32_t rank = count.before + rank_in(lanes);
    const bool is_member = alive && rank < kGroupSize;
    resolve_group(s, mine, is_member, rank, min(count.all, kGroupSize), thresholds);
    uint32_t winners = 0;
    for (uint32_t word = 0; word < kGroupWords; ++word) {
      const uint32_t survivors = s.kept[word];
      if (is_member && rank / 32 == word && survivors >> rank % 32 & 1) {
        const uint32_t winner = winners + __popc(survivors & ((1u << rank % 32) - 1));
        s.winner_box[winner] = mine.box;
        s.winner_class[winner] = mine.class_id;
        if (kept + winner < plan.max_det) {
          reinterpret_cast<float4*>(plan.outputs.boxes)[row + kept + winner] = mine.box;
          plan.outputs.scores[row + kept + winner] = score;
          plan.outputs.classes[row + kept + winner] = int32_t(mine.class_id);
        }
      }
      winners += __popc(survivors);
    }
    kept += winners;
    if (count.all <= kGroupSize) {
      break;  // no candidate is left
    }
    __syncthreads();
    alive = alive && !is_member && survives(s, mine, winners, thresholds);
  }
  return min(kept, plan.max_det);
}

// Grid B, block kThreads, 27 KiB of shared memory. For n candidates and k survivors: O(n) for the sort if the scores
// differ, and O(n (k + kGroupSize)) comparisons of classes, divided by kThreads; boxes are compared within a class.
// With more than kThreads candidates, every tile also needs two or three scans of the list.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) suppress(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SuppressScratch, s);
  const uint32_t image = blockIdx.x;
  wait_for_previous_kernel();
  const uint32_t passed = plan.passed[image], limit = min(passed, plan.max_candidates);
  const Thresholds thresholds = load_thresholds(plan);
  const float conf = thresholds.conf;
  const Key min_key = conf > 0 ? Key(__float_as_uint(conf)) << 32 : 0;  // lower bound of all keys
  const bool is_complete = passed <= kCapacity;
  Window window = {is_complete ? min_key : kKeyAboveOne, kKeyAboveOne, is_complete ? passed : 0,
                   is_complete ? passed : 0};
  uint32_t kept = 0, selected = 0;
  while (kept < plan.max_det && selected < limit) {
    if (!window.left) {
      refill<T>(plan, s, image, thresholds, min_key, window);
    }
    Key key;
    const Key high = window.high;
    const uint32_t count = select_tile(plan, s, image, min_key, window, key);
    if (!count) {
      break;
    }
    key = sort_tile(s, key, window.high, high);
    const bool alive = threadIdx.x < min(count, limit - selected);
    Candidate mine = {};
    if (alive) {
      mine = decode<T>(plan, image, key);
    }
    kept = append_survivors(plan, s, image, mine, score_of(key), alive, kept, thresholds);
    selected += count;
  }
  const size_t row = size_t(image) * plan.max_det;
  for (uint32_t i = kept + threadIdx.x; i < plan.max_det; i += kThreads) {
    reinterpret_cast<float4*>(plan.outputs.boxes)[row + i] = make_float4(0, 0, 0, 0);
    plan.outputs.scores[row + i] = 0;
    plan.outputs.classes[row + i] = 0;
  }
  if (threadIdx.x == 0) {
    plan.outputs.num_dets[image] = int32_t(kept);
    if (plan.outputs.overflow) {
      plan.outputs.overflow[image] = passed >= plan.max_candidates;
    }
  }
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_SUPPRESS_CUH
