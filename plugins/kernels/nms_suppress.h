// The second kernel of nms.cu: from the list of an image to its detections.
#ifndef Y7_NMS_SUPPRESS_H
#define Y7_NMS_SUPPRESS_H

#include "nms_tiles.h"

namespace y7 {
namespace {

struct Candidate {
  float4 box;  // xyxy in input pixels
  float area;
  uint32_t class_id;
};

__device__ __forceinline__ float area_of(float4 box) { return __fmul_rn(box.z - box.x, box.w - box.y); }

template <class T>
__device__ Candidate decoded(const Plan& plan, uint32_t image, Key key) {
  const uint32_t anchor = pair_of(key) / plan.classes;
  const Row<T> row = row_of<T>(plan, image, anchor);
  const float tx = row[0], ty = row[1], tw = row[2], th = row[3];
  const Level& level = plan.level[level_of(plan, anchor)];
  const uint32_t number = (anchor - level.first) / level.cells, cell = (anchor - level.first) % level.cells;
  const float x = __fmul_rn(sigmoid(tx) * 2 - 0.5f + float(cell % level.width), level.stride);
  const float y = __fmul_rn(sigmoid(ty) * 2 - 0.5f + float(cell / level.width), level.stride);
  const float w = sigmoid(tw) * 2, h = sigmoid(th) * 2;
  const float half_w = w * w * level.anchors[number][0] * 0.5f, half_h = h * h * level.anchors[number][1] * 0.5f;
  Candidate candidate;
  candidate.box = make_float4(x - half_w, y - half_h, x + half_w, y + half_h);
  candidate.area = area_of(candidate.box);
  candidate.class_id = pair_of(key) - anchor * plan.classes;
  return candidate;
}

// Without a division, so two empty boxes are no special case; NaN overlaps nothing.
__device__ __forceinline__ bool overlap(float4 a, float area_a, const Candidate& b, float iou) {
  const float width = fminf(a.z, b.box.z) - fmaxf(a.x, b.box.x);
  const float height = fminf(a.w, b.box.w) - fmaxf(a.y, b.box.y);
  const float shared = __fmul_rn(fmaxf(width, 0.0f), fmaxf(height, 0.0f));
  return shared > iou * (area_a + b.area - shared);
}

// Warp 0: the greedy answer for a group, from its matrix. The n best candidates of a word are final after n rounds;
// usually two or three rounds settle all 32.
__device__ void settle(SuppressScratch& s, uint32_t size) {
  uint32_t kept[WORDS];
#pragma unroll
  for (uint32_t word = 0; word < WORDS; ++word) {
    const uint32_t j = 32 * word + lane();
    bool is_beaten = j >= size;
#pragma unroll
    for (uint32_t better = 0; better < word; ++better) is_beaten = is_beaten || (s.beaten[better][j] & kept[better]);
    const uint32_t rivals = s.beaten[word][j];
    uint32_t before, now = __ballot_sync(ALL, !is_beaten);
    do {
      before = now;
      now = __ballot_sync(ALL, !is_beaten && !(rivals & before));
    } while (now != before);
    kept[word] = now;
    if (lane() == 0) s.kept[word] = now;
  }
}

// Candidate `rank` of a group of `size` is the thread's own if it is a member. Fills s.kept.
__device__ void settle_group(const Plan& plan, SuppressScratch& s, const Candidate& mine, bool is_member, uint32_t rank,
                             uint32_t size, float iou) {
  if (is_member) {
    s.box[rank] = mine.box;
    s.area[rank] = mine.area;
    s.class_id[rank] = mine.class_id;
  }
  __syncthreads();
  const uint32_t j = threadIdx.x % GROUP, first = threadIdx.x / GROUP * ROWS;
  if (j < size && first < j) {
    const Candidate worse = {s.box[j], s.area[j], s.class_id[j]};
    uint32_t bits = 0;
#pragma unroll 4
    for (uint32_t i = first; i < min(first + ROWS, j); ++i) {
      const bool rival = plan.class_agnostic || s.class_id[i] == worse.class_id;
      if (rival && overlap(s.box[i], s.area[i], worse, iou)) bits |= 1u << i % 32;
    }
    if (bits) atomicOr(&s.beaten[first / 32][j], bits);
  }
  __syncthreads();
  if (warp() == 0) settle(s, size);
  __syncthreads();
}

// Appends the survivors of a sorted tile to the outputs; `kept` are there already. Returns how many are there then.
//
// The best GROUP of the living settle among themselves, then their survivors meet everyone behind, until nobody lives:
// every candidate meets each better survivor once, and only those in between settle.
__device__ uint32_t survivors_of_tile(const Plan& plan, SuppressScratch& s, uint32_t image, const Candidate& mine,
                                      float score, bool lives, uint32_t kept, float iou) {
  const size_t row = size_t(image) * plan.max_det;
  float4* boxes = reinterpret_cast<float4*>(plan.outputs.boxes) + row;
  for (uint32_t i = 0; lives && i < kept; ++i) {
    if (!plan.class_agnostic && uint32_t(plan.outputs.classes[row + i]) != mine.class_id) continue;
    const float4 box = boxes[i];
    lives = !overlap(box, area_of(box), mine, iou);
  }
  while (kept < plan.max_det) {
    const uint32_t lanes = __ballot_sync(ALL, lives);
    if (lane() == 0) s.warp_total[warp()] = __popc(lanes);
    for (uint32_t i = threadIdx.x; i < WORDS * GROUP; i += THREADS) s.beaten[i / GROUP][i % GROUP] = 0;
    __syncthreads();
    uint32_t rank = rank_in(lanes), living = 0;
    for (uint32_t i = 0; i < THREADS / 32; ++i) {
      if (i == warp()) rank += living;
      living += s.warp_total[i];
    }
    if (!living) break;
    const bool is_member = lives && rank < GROUP;
    settle_group(plan, s, mine, is_member, rank, min(living, GROUP), iou);
    lives = lives && !is_member;
    uint32_t place = kept;  // of the thread's own candidate, if it survived
    for (uint32_t word = 0; word < WORDS; ++word) {
      const uint32_t survivors = s.kept[word];
      if (is_member && rank / 32 == word && survivors >> rank % 32 & 1) {
        place = kept + __popc(survivors & ((1u << rank % 32) - 1));
        if (place < plan.max_det) {
          boxes[place] = mine.box;
          plan.outputs.scores[row + place] = score;
          plan.outputs.classes[row + place] = int32_t(mine.class_id);
        }
      }
      for (uint32_t bits = survivors; lives && bits; bits &= bits - 1) {
        const uint32_t i = 32 * word + __ffs(int(bits)) - 1;
        const bool rival = plan.class_agnostic || s.class_id[i] == mine.class_id;
        lives = !(rival && overlap(s.box[i], s.area[i], mine, iou));
      }
      kept += __popc(survivors);
    }
  }
  return min(kept, plan.max_det);
}

// Grid B, block THREADS, 24 KiB of shared memory. With n candidates and k survivors: O(n log^2 n) for the sort and
// O(n (k + GROUP)) for the NMS, over THREADS; more than THREADS candidates cost two or three scans of the list
// a tile.
template <class T>
__global__ void __launch_bounds__(THREADS) suppress(const Y7_GRID_CONSTANT Plan plan) {
  Y7_SHARED(SuppressScratch, s);
  const uint32_t image = blockIdx.x;
  const uint32_t passed = plan.passed[image], limit = min(passed, plan.max_candidates);
  const float conf = __ldg(plan.conf), iou = __ldg(plan.iou);
  const Key base = conf > 0 ? Key(__float_as_uint(conf)) << 32 : 0;  // no key lies below
  const bool is_complete = passed <= CAPACITY;
  Window window = {is_complete ? base : ABOVE_ONE, ABOVE_ONE, is_complete ? passed : 0, is_complete ? passed : 0};
  uint32_t kept = 0, taken = 0;
  while (kept < plan.max_det && taken < limit) {
    if (!window.left) refill<T>(plan, s, image, conf, base, window);
    Key key;
    const uint32_t count = take_tile(plan, s, image, base, window, key);
    if (!count) break;
    key = sorted(s, key, count);
    const bool lives = threadIdx.x < min(count, limit - taken);
    Candidate mine = {};
    if (lives) mine = decoded<T>(plan, image, key);
    kept = survivors_of_tile(plan, s, image, mine, score_of(key), lives, kept, iou);
    taken += count;
  }
  const size_t row = size_t(image) * plan.max_det;
  for (uint32_t i = kept + threadIdx.x; i < plan.max_det; i += THREADS) {
    reinterpret_cast<float4*>(plan.outputs.boxes)[row + i] = make_float4(0, 0, 0, 0);
    plan.outputs.scores[row + i] = 0;
    plan.outputs.classes[row + i] = 0;
  }
  if (threadIdx.x == 0) {
    plan.outputs.num_dets[image] = int32_t(kept);
    if (plan.outputs.overflow) plan.outputs.overflow[image] = passed >= plan.max_candidates;
  }
}

}  // namespace
}  // namespace y7

#endif  // Y7_NMS_SUPPRESS_H
