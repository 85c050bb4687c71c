// A CUDA runtime without a GPU, for tests of what calls it: device memory is host memory.
//
// Queued work is executed only when a thread waits for it, so that a missing synchronisation is visible as old contents
// of memory. The waiting thread executes it, stream by stream. A kernel is a host function of the test
// (fake_cuda_host_call), which is queued and captured like a copy. Like the real runtime, this one refuses copies
// outside an allocation, invalid handles, and the synchronisation of a stream during a capture. Environment variables:
//   FAKE_CUDA_DEVICES  number of GPUs (1)          FAKE_CUDA_MEMORY   bytes of each (1 GiB)
//   FAKE_CUDA_DRIVER   version, 0 for none (12040) FAKE_CUDA_RUNTIME  version (12040)
//   FAKE_CUDA_LOG      file for the name of every call
//   FAKE_CUDA_FAIL     function:status, every call of this function fails with this status
//   FAKE_CUDA_HOST     1: the GPU is integrated and reads host memory through the page tables of the CPU
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INSUFFICIENT_DRIVER = 35, NO_DEVICE = 100, INVALID_DEVICE = 101 };
enum { INVALID_HANDLE = 400, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900 };
enum { DEVICE = 1, HOST, STREAM, EVENT, GRAPH, EXECUTABLE, DESTROYED };

typedef struct Object {
  struct Object* next;
  int kind;
  size_t bytes;           // of memory
  char* memory;           // of memory
  int device;             // of memory
  struct Object* graph;   // of a stream during a capture
  struct Step* steps;     // of a graph, and the queued work of a stream
  pthread_mutex_t order;  // of a stream: only one thread queues or executes its work
  int status;             // of a stream: the first failure since the last synchronisation
  struct Object* stream;  // of an event
  int passed;             // of an event
  double time;            // of an event
} Object;

typedef struct Step {
  struct Step* next;
  enum { COPY, FILL, CALL, RECORD, WAIT } kind;
  void* to;
  const void* from;
  int value;
  size_t bytes;
  int (*call)(void*);  // returns a status
  Object* event;
} Step;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Object* objects;
static __thread int device, last_error;
static long long copied[4];  // bytes of the executed copies by kind: 1 to the device, 2 to the host, 3 on the device
static __thread uintptr_t context;
enum { PRIMARY = 0x1000, FOREIGN = 0x2000 };

static long env_number(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text ? atol(text) : otherwise;
}

static int failed(int status) {
  if (status) {
    last_error = status;
  }
  return status;
}

// First part of every call: a line in the log, then a requested failure, then that of a missing driver.
static int enter(const char* name, int needs_driver) {
  const char *log = getenv("FAKE_CUDA_LOG"), *fail = getenv("FAKE_CUDA_FAIL");
  if (log) {
    FILE* file = fopen(log, "a");
    fprintf(file, "%s\n", name);
    fclose(file);
  }
  const size_t length = strlen(name);
  if (fail && !strncmp(fail, name, length) && fail[length] == ':') {
    return failed(atoi(fail + length + 1));
  }
  const long driver = env_number("FAKE_CUDA_DRIVER", 12040), runtime = env_number("FAKE_CUDA_RUNTIME", 12040);
  if (!needs_driver) {
    return SUCCESS;
  }
  if (driver / 1000 < runtime / 1000) {
    return failed(INSUFFICIENT_DRIVER);
  }
  return env_number("FAKE_CUDA_DEVICES", 1) ? SUCCESS : failed(NO_DEVICE);
}
#define ENTER(needs_driver)                            \
  do {                                                 \
    const int status_ = enter(__func__, needs_driver); \
    if (status_)                                       \
      return status_;                                  \
  } while (0)

static Object* add(int kind) {
  Object* object = calloc(1, sizeof(Object));
  object->kind = kind;
  object->device = device;
  if (kind == STREAM) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);  // a call may queue more
    pthread_mutex_init(&object->order, &attributes);
  }
  pthread_mutex_lock(&mutex);
  object->next = objects;
  objects = object;
  pthread_mutex_unlock(&mutex);
  return object;
}

static Object* find(const void* handle, int kind) {
  pthread_mutex_lock(&mutex);
  Object* object = objects;
  while (object && !(object->kind == kind && (object == handle || (object->memory && object->memory == handle)))) {
    object = object->next;
  }
  pthread_mutex_unlock(&mutex);
  return object;
}

static int drop(void* handle, int kind) {
  Object* object = find(handle, kind);
  if (!object) {
    return failed(kind <= HOST ? INVALID_VALUE : INVALID_HANDLE);
  }
  pthread_mutex_lock(&mutex);
  Object** link = &objects;
  while (*link != object) {
    link = &(*link)->next;
  }
  *link = object->next;
  pthread_mutex_unlock(&mutex);
  free(object->memory);
  free(object);  // steps stay: an executable graph shares them
  return SUCCESS;
}

static int lies_in(const void* address, size_t bytes, int kind) {
  pthread_mutex_lock(&mutex);
  int found = 0;
  for (Object* object = objects; object && !found; object = object->next) {
    const char* byte = address;
    found = object->kind == kind && byte >= object->memory && byte + bytes <= object->memory + object->bytes;
  }
  pthread_mutex_unlock(&mutex);
  return found;
}

// Number of objects that are not freed yet, for the tests.
int fake_cuda_live(void) {
  int count = 0;
  pthread_mutex_lock(&mutex);
  for (Object* object = objects; object; object = object->next) {
    count += object->kind != DESTROYED;
  }
  pthread_mutex_unlock(&mutex);
  return count;
}

// Bytes of the copies of a kind that were executed so far, for the tests.
long long fake_cuda_copied(int kind) { return copied[kind]; }

// ---- devices

int cudaDriverGetVersion(int* version) {
  *version = (int)env_number("FAKE_CUDA_DRIVER", 12040);
  return SUCCESS;
}
int cudaRuntimeGetVersion(int* version) {
  *version = (int)env_number("FAKE_CUDA_RUNTIME", 12040);
  return SUCCESS;
}
int cudaGetDeviceCount(int* count) {
  *count = 0;
  ENTER(1);
  *count = (int)env_number("FAKE_CUDA_DEVICES", 1);
  return SUCCESS;
}
int cudaGetDevice(int* number) {
  ENTER(1);
  *number = device;
  return SUCCESS;
}
int cudaSetDevice(int number) {
  ENTER(1);
  if (number < 0 || number >= env_number("FAKE_CUDA_DEVICES", 1)) {
    return failed(INVALID_DEVICE);
  }
  device = number;
  context = PRIMARY + number;
  return SUCCESS;
}
int cudaDeviceGetAttribute(int* value, int attribute, int number) {
  ENTER(1);
  if (number < 0 || number >= env_number("FAKE_CUDA_DEVICES", 1)) {
    return failed(INVALID_DEVICE);
  }
  if (attribute == 18 || attribute == 100) {
    *value = (int)env_number("FAKE_CUDA_HOST", 0);
    return SUCCESS;
  }
  if (attribute != 75 && attribute != 76) {
    return failed(INVALID_VALUE);
  }
  *value = attribute == 75 ? 9 : number;
  return SUCCESS;
}
int cudaGetDeviceProperties(char* properties, int number) {
  ENTER(1);
  sprintf(properties, "Imaginary GPU %d", number);
  return SUCCESS;
}
int cudaMemGetInfo(size_t* available, size_t* total) {
  ENTER(1);
  *total = *available = (size_t)env_number("FAKE_CUDA_MEMORY", 1 << 30);
  pthread_mutex_lock(&mutex);
  for (Object* object = objects; object; object = object->next) {
    if (object->kind == DEVICE) {
      *available -= object->bytes;
    }
  }
  pthread_mutex_unlock(&mutex);
  return SUCCESS;
}
// The driver's contexts are numbers: PRIMARY + device for the one of the runtime, FOREIGN + device for one that another
// library created. The current device of the runtime is that of the current context.
int cuCtxGetCurrent(void** current) {
  *current = (void*)context;
  return SUCCESS;
}
int cuCtxSetCurrent(void* current) {
  context = (uintptr_t)current;
  device = context ? (int)(context % PRIMARY) : device;
  return SUCCESS;
}

// ---- errors

int cudaGetLastError(void) {
  const int status = last_error;
  last_error = SUCCESS;
  return status;
}
const char* cudaGetErrorName(int status) {
  return status == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorFake";
}
const char* cudaGetErrorString(int status) {
  return status == OUT_OF_MEMORY ? "out of memory" : "something of the fake";
}

// ---- memory

static int allocate(void** pointer, size_t bytes, int kind) {
  Object* object = add(kind);
  object->bytes = bytes;
  object->memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(object->memory, 0xCD, bytes);
  *pointer = object->memory;
  return SUCCESS;
}
int cudaMalloc(void** pointer, size_t bytes) {
  ENTER(1);
  size_t available, total;
  if (cudaMemGetInfo(&available, &total) || bytes > available) {
    return failed(OUT_OF_MEMORY);
  }
  return allocate(pointer, bytes, DEVICE);
}
int cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  ENTER(1);
  return flags ? failed(INVALID_VALUE) : allocate(pointer, bytes, HOST);
}
static void do_step(Object* stream, Step step);

// Execute the queued work of a stream, all of it or until an event has completed. Return 0 if another thread executes
// it and `patient` is not set.
static int drain(Object* stream, const Object* until, int patient) {
  if (patient) {
    pthread_mutex_lock(&stream->order);
  } else if (pthread_mutex_trylock(&stream->order)) {
    return 0;
  }
  while (stream->steps && !(until && until->passed)) {
    Step* step = stream->steps;
    stream->steps = step->next;
    do_step(stream, *step);
    free(step);
  }
  pthread_mutex_unlock(&stream->order);
  return 1;
}
static void do_step(Object* stream, Step step) {
  struct timespec now;
  int status = SUCCESS;
  switch (step.kind) {
    case COPY:
      memmove(step.to, step.from, step.bytes);
      __atomic_fetch_add(&copied[step.value], (long long)step.bytes, __ATOMIC_RELAXED);
      break;
    case FILL:
      memset(step.to, step.value, step.bytes);
      break;
    case CALL:
      status = step.call(step.to);
      break;
    case RECORD:
      clock_gettime(CLOCK_MONOTONIC, &now);
      step.event->time = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
      step.event->passed = 1;
      break;
    case WAIT:
      if (step.event->stream && step.event->stream != stream) {
        drain(step.event->stream, step.event, 1);
      }
      break;
  }
  if (!stream->status) {
    stream->status = status;
  }
}
static void drain_all(void) {
  Object* streams[256];
  int count = 0;
  pthread_mutex_lock(&mutex);
  for (Object* object = objects; object && count < 256; object = object->next) {
    if (object->kind == STREAM) {
      streams[count++] = object;
    }
  }
  pthread_mutex_unlock(&mutex);
  for (int i = 0; i < count; ++i) {
    drain(streams[i], NULL, 0);
  }
}
static int queue(Object* stream, Step step) {
  if (!stream) {
    return failed(INVALID_HANDLE);
  }
  Step* copy = malloc(sizeof(Step));
  *copy = step;
  copy->next = NULL;
  pthread_mutex_lock(&stream->order);
  Step** end = stream->graph ? &stream->graph->steps : &stream->steps;
  while (*end) {
    end = &(*end)->next;
  }
  *end = copy;
  pthread_mutex_unlock(&stream->order);
  return SUCCESS;
}
int cudaFree(void* pointer) {
  ENTER(1);
  drain_all();  // the real one waits too
  return pointer ? drop(pointer, DEVICE) : SUCCESS;
}
int cudaFreeHost(void* pointer) {
  ENTER(1);
  drain_all();
  return drop(pointer, HOST);
}
int cudaPointerGetAttributes(int* attributes, const void* pointer) {
  ENTER(1);
  attributes[0] = lies_in(pointer, 1, DEVICE) ? 2 : lies_in(pointer, 1, HOST) ? 1 : 0;
  attributes[1] = -1;
  pthread_mutex_lock(&mutex);
  for (const Object* object = objects; object && attributes[0]; object = object->next) {
    const char* byte = pointer;
    if (object->kind <= HOST && byte >= object->memory && byte < object->memory + object->bytes) {
      attributes[1] = object->device;
    }
  }
  pthread_mutex_unlock(&mutex);
  return SUCCESS;
}
// For the tests: queue a host function on a stream, and query whether the stream is capturing.
int fake_cuda_host_call(void* stream, int (*call)(void*), void* argument) {
  return queue(find(stream, STREAM), (Step){.kind = CALL, .call = call, .to = argument});
}
int fake_cuda_capturing(void* stream) {
  const Object* object = find(stream, STREAM);
  return object && object->graph;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  ENTER(1);
  if (kind < 1 || kind > 3) {
    return failed(INVALID_VALUE);
  }
  if (kind != 2 && !lies_in(to, bytes, DEVICE)) {
    return failed(INVALID_VALUE);
  }
  if (kind != 1 && !lies_in(from, bytes, DEVICE)) {
    return failed(INVALID_VALUE);
  }
  return queue(find(stream, STREAM), (Step){.kind = COPY, .to = to, .from = from, .bytes = bytes, .value = kind});
}
int cudaMemsetAsync(void* to, int value, size_t bytes, void* stream) {
  ENTER(1);
  if (!lies_in(to, bytes, DEVICE)) {
    return failed(INVALID_VALUE);
  }
  return queue(find(stream, STREAM), (Step){.kind = FILL, .to = to, .value = value, .bytes = bytes});
}

// ---- streams and events

int cudaStreamCreateWithFlags(void** stream, unsigned flags) {
  ENTER(1);
  if (flags > 1) {
    return failed(INVALID_VALUE);
  }
  *stream = add(STREAM);
  return SUCCESS;
}
int cudaStreamDestroy(void* stream) {
  ENTER(1);
  Object* object = find(stream, STREAM);
  if (object) {
    drain(object, NULL, 1);
  }
  return drop(stream, STREAM);
}
int cudaStreamSynchronize(void* stream) {
  ENTER(1);
  if (!stream) {
    return SUCCESS;  // the legacy default stream
  }
  Object* object = find(stream, STREAM);
  if (!object) {
    return failed(INVALID_HANDLE);
  }
  if (object->graph) {
    return failed(CAPTURE_UNSUPPORTED);
  }
  drain(object, NULL, 1);
  const int status = object->status;
  object->status = SUCCESS;
  return failed(status);
}
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) {
  ENTER(1);
  Object* object = find(event, EVENT);
  if (!object || flags) {
    return failed(INVALID_HANDLE);
  }
  return queue(find(stream, STREAM), (Step){.kind = WAIT, .event = object});
}
int cudaEventCreateWithFlags(void** event, unsigned flags) {
  ENTER(1);
  if (flags & ~2u) {
    return failed(INVALID_VALUE);
  }
  *event = add(EVENT);
  return SUCCESS;
}
int cudaEventDestroy(void* event) {
  ENTER(1);
  Object* object = find(event, EVENT);
  if (!object) {
    return failed(INVALID_HANDLE);
  }
  pthread_mutex_lock(&mutex);
  object->kind = DESTROYED;  // streams may still wait for it
  pthread_mutex_unlock(&mutex);
  return SUCCESS;
}
int cudaEventRecord(void* event, void* stream) {
  ENTER(1);
  Object *object = find(event, EVENT), *onto = find(stream, STREAM);
  if (!object) {
    return failed(INVALID_HANDLE);
  }
  if ((uintptr_t)stream <= 2) {
    return SUCCESS;  // the default streams have nothing to do
  }
  object->stream = onto;
  object->passed = 0;
  return queue(onto, (Step){.kind = RECORD, .event = object});
}
int cudaEventSynchronize(void* event) {
  ENTER(1);
  Object* object = find(event, EVENT);
  if (!object) {
    return failed(INVALID_HANDLE);
  }
  if (object->stream) {
    drain(object->stream, object, 1);
  }
  return SUCCESS;
}
int cudaEventElapsedTime(float* milliseconds, void* start, void* end) {
  ENTER(1);
  const Object *from = find(start, EVENT), *to = find(end, EVENT);
  if (!from || !to) {
    return failed(INVALID_HANDLE);
  }
  if (!from->passed || !to->passed) {
    return failed(NOT_READY);
  }
  *milliseconds = (float)(to->time - from->time);
  return SUCCESS;
}

// ---- graphs

int cudaStreamBeginCapture(void* stream, int mode) {
  ENTER(1);
  Object* object = find(stream, STREAM);
  if (!object || object->graph || mode < 0 || mode > 2) {
    return failed(INVALID_VALUE);
  }
  object->graph = add(GRAPH);
  return SUCCESS;
}
int cudaStreamEndCapture(void* stream, void** graph) {
  *graph = NULL;
  Object* object = find(stream, STREAM);
  const int status = enter(__func__, 1);
  if (status) {
    if (object) {
      drop(object->graph, GRAPH);
      object->graph = NULL;  // a failed capture ends too
    }
    return status;
  }
  if (!object || !object->graph) {
    return failed(INVALID_VALUE);
  }
  *graph = object->graph;
  object->graph = NULL;
  return SUCCESS;
}
int cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  ENTER(1);
  const Object* object = find(graph, GRAPH);
  if (!object || flags) {
    return failed(INVALID_VALUE);
  }
  Object* made = add(EXECUTABLE);
  made->steps = object->steps;
  *executable = made;
  return SUCCESS;
}
int cudaGraphLaunch(void* executable, void* stream) {
  ENTER(1);
  Object *graph = find(executable, EXECUTABLE), *onto = find(stream, STREAM);
  if (!graph || !onto) {
    return failed(INVALID_HANDLE);
  }
  for (Step* step = graph->steps; step; step = step->next) {
    Step copy = *step;
    copy.next = NULL;
    queue(onto, copy);
  }
  return SUCCESS;
}
int cudaGraphExecDestroy(void* executable) {
  ENTER(1);
  return drop(executable, EXECUTABLE);
}
int cudaGraphDestroy(void* graph) {
  ENTER(1);
  return drop(graph, GRAPH);
}
