// C ABI of the CUDA kernels of yolov7-deploy. Depends on neither TensorRT nor torch, allocates nothing and does not
// synchronize.
//
// Every function enqueues work on a stream and returns immediately. Pointers are device pointers unless a comment says
// otherwise. The parameter structs are plain data with fixed-width fields, so ctypes can fill them.
#ifndef Y7_KERNELS_H
#define Y7_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define Y7_KERNELS_ABI 3  // incremented with every change of a struct or a signature
#define Y7_MAX_BATCH 1024
#define Y7_MAX_LEVELS 8
#define Y7_ANCHORS 3  // per cell

enum { Y7_OK = 0, Y7_BAD_ARGUMENT = 1, Y7_WORKSPACE_TOO_SMALL = 2, Y7_CUDA_ERROR = 3 };
enum { Y7_FLOAT32 = 0, Y7_FLOAT16 = 1, Y7_UINT8 = 2 };

// One level of raw head maps [B, 3 * (5 + C), H, W]. Strides are in elements, so one kernel reads every layout: the
// strides of NCHW are (3 * (5 + C) * H * W, H * W, 1), those of NHWC padded to P channels are (H * W * P, 1, P).
typedef struct Y7HeadMap {
  const void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t cell_stride;
  int32_t height;
  int32_t width;
  float stride;                  // pixels per cell
  float anchors[Y7_ANCHORS][2];  // width and height in pixels
  int32_t reserved;
} Y7HeadMap;

typedef struct Y7NmsParams {
  int32_t batch;           // 1 to Y7_MAX_BATCH
  int32_t levels;          // 1 to Y7_MAX_LEVELS
  int32_t classes;         // C, at least 1
  int32_t max_det;         // maximum detections, K below
  int32_t max_candidates;  // highest-scoring (anchor, class) pairs that enter NMS
  int32_t type;            // data type of the head maps: Y7_FLOAT32 or Y7_FLOAT16
} Y7NmsParams;

// Device pointers to one float each, so a captured CUDA graph uses their current values.
typedef struct Y7NmsThresholds {
  const float* conf;
  const float* iou;
  const float* multi_label;     // above 0.5: every class of an anchor above conf; otherwise only its best class
  const float* class_agnostic;  // above 0.5: boxes also suppress boxes of other classes
} Y7NmsThresholds;

typedef struct Y7NmsOutputs {
  int32_t* num_dets;  // [B, 1]
  float* boxes;       // [B, K, 4] xyxy in input pixels, aligned to 16 bytes
  float* scores;      // [B, K]
  int32_t* classes;   // [B, K]
  int32_t* overflow;  // [B, 1], 1 where max_candidates or more pairs passed the threshold; may be null
} Y7NmsOutputs;

// Returns the workspace size of y7_nms in bytes, for the whole batch; 0 for invalid parameters.
size_t y7_nms_workspace(const Y7NmsParams* params);

// Decodes the head maps and runs NMS. params, heads, thresholds and outputs are host pointers and are read before the
// call returns. The workspace is aligned to 8 bytes; its content does not matter. All levels together have fewer than
// 2^32 (anchor, class) pairs. Output rows after num_dets are set to zero. Deterministic: the same input gives the same
// bytes.
int32_t y7_nms(const Y7NmsParams* params, const Y7HeadMap* heads, const Y7NmsThresholds* thresholds,
               const Y7NmsOutputs* outputs, void* workspace, size_t workspace_bytes, void* stream);

// One frame of a batch: uint8 BGR rows of `pitch` bytes, and its position on the canvas.
//
// With `rows`, `pixels` may contain only some rows of the frame, one after the other: rows[2 * y] and rows[2 * y + 1]
// are the positions in `pixels` of the upper and the lower source row of row y of the resized frame. A row whose weight
// rounds to zero may have any valid position. The caller guarantees that every position is a row of `pixels` and that
// the table has resized_height entries: the kernel does not check.
typedef struct Y7Frame {
  const uint8_t* pixels;
  int64_t pitch;
  int32_t height;
  int32_t width;
  int32_t resized_height;
  int32_t resized_width;
  int32_t top;
  int32_t left;
  const int32_t* rows;  // [resized_height][2] on the device, aligned to 4 bytes; null if `pixels` is the whole frame
} Y7Frame;

typedef struct Y7LetterboxParams {
  int32_t batch;
  int32_t height;  // of the canvas
  int32_t width;
  int32_t type;  // Y7_FLOAT32 or Y7_FLOAT16: NCHW RGB 0..1; Y7_UINT8: NHWC BGR 0..255
  int32_t pad;   // gray value around the frame; the official YOLOv7 uses 114
} Y7LetterboxParams;

// Letterboxes a batch in one pass. params is a host pointer; frames points to params->batch structs on the device, so
// a captured CUDA graph can process frames of any size.
int32_t y7_letterbox(const Y7LetterboxParams* params, const Y7Frame* frames, void* canvas, void* stream);

// Returns a description of a status, never null. For Y7_CUDA_ERROR it is that of the calling thread's last CUDA error.
const char* y7_status_text(int32_t status);

int32_t y7_kernels_abi(void);

#ifdef __cplusplus
}
#endif

#endif  // Y7_KERNELS_H
