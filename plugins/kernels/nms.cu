// Decoding and greedy NMS of raw YOLOv7 head maps in two kernels.
//
//   select    reads every objectness, reads the classes only where it passes, and lists the pairs above the threshold.
//   suppress  one block per image: reads the list in sorted tiles, best first, decodes only those boxes and runs NMS.
//
// A listed pair (anchor, class) is one 64-bit key: the float bits of the score in the upper half, the inverted index of
// the pair (anchor * C + class) in the lower half. Scores are never negative, so descending keys are descending scores,
// and equal scores keep the order of anchors and classes. Keys are unique, so the result does not depend on the order
// in which atomics fill the list. The list holds kCapacity keys. If more pairs pass, `suppress` reads the head maps
// again and refills the list with the best remaining pairs as often as necessary: that path is slow and exact.
//
// The arithmetic is that of float32 NumPy, operation by operation: compile with -fmad=false. Where a product that may
// be inexact is followed by a sum, __fmul_rn forbids the fusion too. Only expf may differ, by one or two ulp.
//
// Memory: 256 KiB of workspace per image. At batch 1, 640 x 640, 80 classes the kernels read 3 * 8400 objectness values
// (98 KiB of float32) and a 32-byte sector per class of each anchor that passes. The rest is latency: dependent loads
// (threshold, objectness, classes, list, boxes), about ten barriers to sort a tile and four per kGroupSize survivors.
//
// One memset and two launches; where the GPU can do that, `suppress` starts while `select` ends (launch_overlapping).
// Merging the kernels with a last-block ticket would save one launch, but every block of `select` would need the large
// scratch memory. Without the memset, every block would need a list of its own: for its worst case 160 KiB with 80
// classes, 16 MiB per image; or smaller, and images with many pairs in few blocks would take the slow path. A counter
// that `suppress` resets for the next call would not do: the workspace has other contents then.
//
// Warps of `suppress` without a candidate stay until the end: each one owns bins of the histograms and rows of the
// overlap matrix, whose numbers are those of the threads. Blocks of `select` without a passing anchor end after one
// barrier.
//
// CUB is not used: there is no device code that the CPU emulation of the tests need not run. The sort and the block
// sums are 15 lines each. cub::BlockRadixSort would sort 64-bit keys in 16 passes of 4 bits with barriers in each; the
// counting sort here needs about ten barriers, because keys with different scores differ in few bits.
#include <limits.h>

#include "nms_select.cuh"
#include "nms_suppress.cuh"

namespace y7 {
namespace {

bool is_valid(const Y7NmsParams* p) {
  return p && p->batch >= 1 && p->batch <= Y7_MAX_BATCH && p->levels >= 1 && p->levels <= Y7_MAX_LEVELS &&
         p->classes >= 1 && p->max_det >= 1 && p->max_candidates >= 1 &&
         (p->type == Y7_FLOAT32 || p->type == Y7_FLOAT16);
}

bool is_aligned(const void* pointer, size_t bytes) {
  return pointer && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

size_t counter_bytes(const Y7NmsParams& p) { return (size_t(p.batch) * sizeof(uint32_t) + 255) / 256 * 256; }

// Returns false for invalid head maps and for 2^32 or more pairs.
bool read_heads(const Y7NmsParams& p, const Y7HeadMap* heads, Plan* plan) {
  uint64_t anchors = 0;
  for (int32_t i = 0; i < p.levels; ++i) {
    const Y7HeadMap& head = heads[i];
    if (!is_aligned(head.data, p.type == Y7_FLOAT16 ? 2 : 4) || head.height < 1 || head.width < 1) {
      return false;
    }
    const uint64_t cells = uint64_t(head.height) * uint64_t(head.width);
    if (anchors + Y7_ANCHORS * cells > UINT_MAX / uint64_t(p.classes)) {
      return false;
    }
    Level& level = plan->level[i];
    level = {head.data,
             head.batch_stride,
             head.channel_stride,
             head.cell_stride,
             uint32_t(anchors),
             uint32_t(cells),
             uint32_t(head.width),
             head.stride,
             {}};
    for (int k = 0; k < Y7_ANCHORS; ++k) {
      level.anchors[k][0] = head.anchors[k][0];
      level.anchors[k][1] = head.anchors[k][1];
    }
    anchors += Y7_ANCHORS * cells;
  }
  plan->anchors = uint32_t(anchors);
  return true;
}

template <class T>
int32_t run(const Plan& plan, uint32_t batch, void* stream) {
  const dim3 blocks((plan.anchors - 1) / kSelectAnchors + 1, batch);
  int32_t status =
      status_of(cudaMemsetAsync(plan.passed, 0, batch * sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  if (status == Y7_OK) {
    status = launch(select<T>, blocks, dim3(kSelectThreads), stream, plan);
  }
  if (status == Y7_OK) {
    status = launch_overlapping(suppress<T>, dim3(batch), dim3(kThreads), stream, plan);
  }
  return status;
}

}  // namespace
}  // namespace y7

extern "C" size_t y7_nms_workspace(const Y7NmsParams* params) {
  if (!y7::is_valid(params)) {
    return 0;
  }
  return y7::counter_bytes(*params) + size_t(params->batch) * y7::kCapacity * sizeof(y7::Key);
}

extern "C" int32_t y7_nms(const Y7NmsParams* params, const Y7HeadMap* heads, const Y7NmsThresholds* thresholds,
                          const Y7NmsOutputs* outputs, void* workspace, size_t workspace_bytes, void* stream) {
  using y7::is_aligned;
  if (!y7::is_valid(params) || !heads || !thresholds || !outputs) {
    return Y7_BAD_ARGUMENT;
  }
  if (!is_aligned(thresholds->conf, 4) || !is_aligned(thresholds->iou, 4) || !is_aligned(thresholds->multi_label, 4) ||
      !is_aligned(thresholds->class_agnostic, 4)) {
    return Y7_BAD_ARGUMENT;
  }
  if (!is_aligned(outputs->num_dets, 4) || !is_aligned(outputs->boxes, 16) || !is_aligned(outputs->scores, 4) ||
      !is_aligned(outputs->classes, 4) || reinterpret_cast<uintptr_t>(outputs->overflow) % 4 ||
      !is_aligned(workspace, 8)) {
    return Y7_BAD_ARGUMENT;
  }
  y7::Plan plan = {};
  if (!y7::read_heads(*params, heads, &plan)) {
    return Y7_BAD_ARGUMENT;
  }
  if (workspace_bytes < y7_nms_workspace(params)) {
    return Y7_WORKSPACE_TOO_SMALL;
  }
  plan.levels = uint32_t(params->levels);
  plan.classes = uint32_t(params->classes);
  plan.max_det = uint32_t(params->max_det);
  plan.max_candidates = uint32_t(params->max_candidates);
  plan.thresholds = *thresholds;
  plan.outputs = *outputs;
  plan.passed = static_cast<uint32_t*>(workspace);
  plan.keys = reinterpret_cast<y7::Key*>(static_cast<char*>(workspace) + y7::counter_bytes(*params));
  const uint32_t batch = uint32_t(params->batch);
  return params->type == Y7_FLOAT16 ? y7::run<__half>(plan, batch, stream) : y7::run<float>(plan, batch, stream);
}
