// The kernels of yolov7-deploy behind a C ABI: no TensorRT, no torch, no allocation, no synchronisation.
//
// Every function queues work on a stream and returns at once. Pointers are device pointers unless their comment says
// otherwise. The parameter structs are plain data of fixed-width fields, so ctypes can fill them.
#ifndef Y7_KERNELS_H
#define Y7_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define Y7_KERNELS_ABI 2  // grows with every change of a struct or a signature
#define Y7_MAX_LEVELS 8
#define Y7_ANCHORS 3  // per cell

enum { Y7_OK = 0, Y7_BAD_ARGUMENT = 1, Y7_WORKSPACE_TOO_SMALL = 2, Y7_CUDA_ERROR = 3 };
enum { Y7_FLOAT32 = 0, Y7_FLOAT16 = 1, Y7_UINT8 = 2 };

// One level of raw head maps [B, 3 * (5 + C), H, W]. Strides count elements, so one kernel reads every layout: linear
// is (3 * (5 + C) * H * W, H * W, 1), channels-last padded to P channels is (H * W * P, 1, P).
typedef struct Y7HeadMap {
  const void* data;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t cell_stride;
  int32_t height;
  int32_t width;
  float stride;                    // pixels per cell
  float anchors[Y7_ANCHORS][2];    // width and height in pixels
  int32_t reserved;
} Y7HeadMap;

typedef struct Y7NmsParams {
  int32_t batch;           // 1 to 1024
  int32_t levels;          // 1 to Y7_MAX_LEVELS
  int32_t classes;         // C, at least 1
  int32_t max_det;         // rows of the outputs
  int32_t max_candidates;  // best (anchor, class) pairs that enter NMS
  int32_t multi_label;     // every class of an anchor, or its best only
  int32_t class_agnostic;  // boxes suppress those of other classes too
  int32_t type;            // Y7_FLOAT32 or Y7_FLOAT16, of the head maps
} Y7NmsParams;

typedef struct Y7NmsOutputs {
  int32_t* num_dets;  // [B, 1]
  float* boxes;       // [B, max_det, 4] xyxy in input pixels, aligned to 16 bytes
  float* scores;      // [B, max_det]
  int32_t* classes;   // [B, max_det]
  int32_t* overflow;  // [B, 1], 1 where max_candidates pairs or more passed the threshold; may be null
} Y7NmsOutputs;

// Bytes of scratch memory that y7_nms needs for a whole batch; 0 for parameters it would refuse.
size_t y7_nms_workspace(const Y7NmsParams* params);

// Decodes and suppresses. params, heads and outputs are host pointers read before the call returns; conf and iou point
// to one float each on the device, so a captured graph follows their values. The workspace is aligned to 8 bytes and
// needs no particular content. Levels hold fewer than 2^32 (anchor, class) pairs together. Rows of the outputs behind
// num_dets become zero. Same input, same bytes.
int32_t y7_nms(const Y7NmsParams* params, const Y7HeadMap* heads, const float* conf, const float* iou,
               const Y7NmsOutputs* outputs, void* workspace, size_t workspace_bytes, void* stream);

// One frame of a batch: uint8 BGR rows of `pitch` bytes, and where it lands on the canvas.
//
// With `rows` not every row of the frame needs to be there: `pixels` then holds some, one behind the other, and
// rows[2 * y] and rows[2 * y + 1] tell where among them row y of the resized frame finds its upper and its lower row.
// A row whose weight rounds to zero may be any. The caller vouches that all positions are among the rows that are
// there, and that the table covers resized_height rows: the kernel follows it unseen.
typedef struct Y7Frame {
  const uint8_t* pixels;
  int64_t pitch;
  int32_t height;
  int32_t width;
  int32_t resized_height;
  int32_t resized_width;
  int32_t top;
  int32_t left;
  const int32_t* rows;  // [resized_height][2] on the device, aligned to 4 bytes; null where the whole frame is there
} Y7Frame;

typedef struct Y7LetterboxParams {
  int32_t batch;
  int32_t height;  // of the canvas
  int32_t width;
  int32_t type;    // Y7_FLOAT32 or Y7_FLOAT16: NCHW RGB 0..1; Y7_UINT8: NHWC BGR 0..255
  int32_t pad;     // grey value around the frame, 114 as the official one
} Y7LetterboxParams;

// Letterboxes a batch in one pass. params is a host pointer; frames points to params->batch structs on the device, so
// a captured graph follows frames of any size.
int32_t y7_letterbox(const Y7LetterboxParams* params, const Y7Frame* frames, void* canvas, void* stream);

// A sentence for a status; never null. For Y7_CUDA_ERROR it names the CUDA error of the calling thread's last failure.
const char* y7_status_text(int32_t status);

int32_t y7_kernels_abi(void);

#ifdef __cplusplus
}
#endif

#endif  // Y7_KERNELS_H
