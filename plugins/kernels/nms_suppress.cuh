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
  const AnchorRow<T> row = anchor_row<T>(plan, image, anchor);
  const float tx = row[0], ty = row[1], tw = row[2], th = row[3];
  const Level& level = plan.level[level_of(plan, anchor)];
  const uint32_t anchor_in_cell = (anchor - level.first) / level.cells, cell = (anchor - level.first) % level.cells;
  const float x = __fmul_rn(sigmoid(tx) * 2 - 0.5f + float(cell % level.width), level.stride);
  const float y = __fmul_rn(sigmoid(ty) * 2 - 0.5f + float(cell / level.width), level.stride);
  const float w = sigmoid(tw) * 2, h = sigmoid(th) * 2;
  const float half_w = w * w * level.anchors[anchor_in_cell][0] * 0.5f,
              half_h = h * h * level.anchors[anchor_in_cell][1] * 0.5f;
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

// Greedy NMS within a group, from its overlap matrix, by warp 0. After n iterations the first n candidates of a word
// are final; usually two or three iterations resolve all 32.
__device__ void resolve(SuppressScratch& s, uint32_t size) {
  uint32_t kept[kGroupWords];
#pragma unroll
  for (uint32_t word = 0; word < kGroupWords; ++word) {
    const uint32_t j = 32 * word + lane();
    bool is_suppressed = j >= size;
#pragma unroll
    for (uint32_t better = 0; better < word; ++better) {
      is_suppressed = is_suppressed || (s.suppressed[better][j] & kept[better]);
    }
    const uint32_t suppressors = s.suppressed[word][j];
    uint32_t before, now = __ballot_sync(kFullWarp, !is_suppressed);
    do {
      before = now;
      now = __ballot_sync(kFullWarp, !is_suppressed && !(suppressors & before));
    } while (now != before);
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
    s.area[rank] = mine.area;
    s.class_id[rank] = mine.class_id;
  }
  __syncthreads();
  const uint32_t j = threadIdx.x % kGroupSize, first = threadIdx.x / kGroupSize * kRowsPerThread;
  if (j < size && first < j) {
    const Candidate worse = {s.box[j], s.area[j], s.class_id[j]};
    uint32_t bits = 0;
#pragma unroll 4
    for (uint32_t i = first; i < min(first + kRowsPerThread, j); ++i) {
      const bool competes = thresholds.class_agnostic || s.class_id[i] == worse.class_id;
      if (competes && overlap(s.box[i], s.area[i], worse, thresholds.iou)) {
        bits |= 1u << i % 32;
      }
    }
    if (bits) {
      atomicOr(&s.suppressed[first / 32][j], bits);
    }
  }
  __syncthreads();
  if (warp() == 0) {
    resolve(s, size);
  }
  __syncthreads();
}

// Appends the survivors of a sorted tile to the outputs, which already contain `kept` rows. Returns the new number.
//
// The first kGroupSize candidates that are still alive are resolved among themselves; their survivors then suppress the
// candidates after them, until none is left. So every candidate is compared with each better survivor once.
__device__ uint32_t append_survivors(const Plan& plan, SuppressScratch& s, uint32_t image, const Candidate& mine,
                                     float score, bool alive, uint32_t kept, const Thresholds& thresholds) {
  const float iou = thresholds.iou;
  const size_t row = size_t(image) * plan.max_det;
  float4* boxes = reinterpret_cast<float4*>(plan.outputs.boxes) + row;
  for (uint32_t i = 0; alive && i < kept; ++i) {
    if (!thresholds.class_agnostic && uint32_t(plan.outputs.classes[row + i]) != mine.class_id) {
      continue;
    }
    const float4 box = boxes[i];
    alive = !overlap(box, area_of(box), mine, iou);
  }
  while (kept < plan.max_det) {
    const uint32_t lanes = __ballot_sync(kFullWarp, alive);
    if (lane() == 0) {
      s.warp_total[warp()] = __popc(lanes);
    }
    for (uint32_t i = threadIdx.x; i < kGroupWords * kGroupSize; i += kThreads) {
      s.suppressed[i / kGroupSize][i % kGroupSize] = 0;
    }
    __syncthreads();
    uint32_t rank = rank_in(lanes), alive_count = 0;
    for (uint32_t i = 0; i < kThreads / 32; ++i) {
      if (i == warp()) {
        rank += alive_count;
      }
      alive_count += s.warp_total[i];
    }
    if (!alive_count) {
      break;
    }
    const bool is_member = alive && rank < kGroupSize;
    resolve_group(s, mine, is_member, rank, min(alive_count, kGroupSize), thresholds);
    alive = alive && !is_member;
    uint32_t row_index = kept;  // output row of the thread's own candidate, if it survived
    for (uint32_t word = 0; word < kGroupWords; ++word) {
      const uint32_t survivors = s.kept[word];
      if (is_member && rank / 32 == word && survivors >> rank % 32 & 1) {
        row_index = kept + __popc(survivors & ((1u << rank % 32) - 1));
        if (row_index < plan.max_det) {
          boxes[row_index] = mine.box;
          plan.outputs.scores[row + row_index] = score;
          plan.outputs.classes[row + row_index] = int32_t(mine.class_id);
        }
      }
      for (uint32_t bits = survivors; alive && bits; bits &= bits - 1) {
        const uint32_t i = 32 * word + __ffs(int(bits)) - 1;
        const bool competes = thresholds.class_agnostic || s.class_id[i] == mine.class_id;
        alive = !(competes && overlap(s.box[i], s.area[i], mine, iou));
      }
      kept += __popc(survivors);
    }
  }
  return min(kept, plan.max_det);
}

// Grid B, block kThreads, 24 KiB of shared memory. For n candidates and k survivors: O(n log^2 n) for the sort and
// O(n (k + kGroupSize)) for NMS, divided by kThreads. With more than kThreads candidates, every tile also needs two or
// three scans of the list.
template <class T>
__global__ void __launch_bounds__(kThreads) suppress(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SuppressScratch, s);
  const uint32_t image = blockIdx.x;
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
    const uint32_t count = select_tile(plan, s, image, min_key, window, key);
    if (!count) {
      break;
    }
    key = sort_tile(s, key, count);
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
