// NVML and the few calls of CUDA's driver that find a GPU, without either, for tests of what calls them.
//
// The environment says what the GPUs are and what they answer; what it does not name is NOT_SUPPORTED, as on a GPU
// without that sensor:
//   FAKE_GPUS   PCI address and name, with ";" between GPUs: "0000:3b:00.0 Tesla V100-SXM2-16GB;0000:af:00.0 NVIDIA T4"
//   FAKE_NVML   answers with spaces between: name=answer,answer,... in turn, the last one for good. An answer is a
//               number, !status for a failure, or number@watts for a counter that grows by so many mJ a millisecond,
//               in steps of 20 ms. Names are the strings below; clocks and sensors have their kind behind: clock.1
//   FAKE_NVML_LOG  file that takes the PCI address of every GPU that is opened
// With -DOLD_DRIVER the functions that came later are not there.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, GPU_IS_LOST = 15 };
enum { COUNTERS = 64, NAME = 128, SCRIPT = 4096, STEP_MS = 20 };

typedef struct {
  unsigned long long total, free, used;
} nvmlMemory_t;

static struct {
  char name[NAME];
  int calls;
} counters[COUNTERS];
static int initialized;
static double started;

// How often a function was asked before.
static int turn(const char* name) {
  int slot = 0;
  while (slot < COUNTERS - 1 && counters[slot].name[0] && strcmp(counters[slot].name, name)) slot++;
  snprintf(counters[slot].name, NAME, "%s", name);
  return counters[slot].calls++;
}

static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

// What FAKE_NVML says; with each new text every turn and every counter begins anew.
static const char* script(void) {
  static char seen[SCRIPT];
  const char* all = getenv("FAKE_NVML");
  if (!all || strncmp(seen, all, SCRIPT - 1)) {
    snprintf(seen, SCRIPT, "%s", all ? all : "");
    memset(counters, 0, sizeof(counters));
    started = milliseconds();
  }
  return all;
}

static int answer(const char* name, unsigned long long* value) {
  const char* all = script();
  const size_t length = strlen(name);
  while (all && !(!strncmp(all, name, length) && all[length] == '=')) {
    all = strchr(all, ' ');
    all += all ? 1 : 0;
  }
  if (!all) return NOT_SUPPORTED;
  const char* one = all + length + 1;
  const char* end = one + strcspn(one, " ");
  for (int left = turn(name); left > 0; left--) {
    const char* next = memchr(one, ',', (size_t)(end - one));
    if (!next) break;
    one = next + 1;
  }
  if (*one == '!') return atoi(one + 1);
  char* rest;
  *value = strtoull(one, &rest, 10);
  if (*rest == '@') {
    const long steps = (long)((milliseconds() - started) / STEP_MS);
    *value += (unsigned long long)(atof(rest + 1) * STEP_MS * (double)steps);
  }
  return SUCCESS;
}

static int number(const char* name, void* device, unsigned* value) {
  unsigned long long wide = 0;
  if (!device || !value) return INVALID_ARGUMENT;
  if (!initialized) return UNINITIALIZED;
  const int status = answer(name, &wide);
  if (!status) *value = (unsigned)wide;
  return status;
}

static int wide(const char* name, void* device, unsigned long long* value) {
  if (!device || !value) return INVALID_ARGUMENT;
  return initialized ? answer(name, value) : UNINITIALIZED;
}

static int of_kind(const char* function, void* device, unsigned kind, unsigned* value) {
  char name[NAME];
  snprintf(name, NAME, "%s.%u", function, kind);
  return number(name, device, value);
}

// The start of the GPU's entry in FAKE_GPUS, or null.
static const char* entry(int index) {
  const char* gpu = getenv("FAKE_GPUS");
  while (gpu && *gpu && index-- > 0) {
    gpu = strchr(gpu, ';');
    gpu += gpu ? 1 : 0;
  }
  return gpu && *gpu ? gpu : NULL;
}

static int initialize(void) {
  unsigned long long ignored;
  const int status = answer("init", &ignored);
  initialized |= status == SUCCESS || status == NOT_SUPPORTED;
  return status == NOT_SUPPORTED ? SUCCESS : status;
}

static int open_gpu(const char* pci, void** device) {
  const char* log = getenv("FAKE_NVML_LOG");
  if (log) {
    FILE* file = fopen(log, "a");
    fprintf(file, "%s\n", pci);
    fclose(file);
  }
  if (!initialized) return UNINITIALIZED;
  unsigned long long ignored;
  const int status = answer("handle", &ignored);
  if (status != NOT_SUPPORTED && status != SUCCESS) return status;
  for (int index = 0; entry(index); index++) {
    if (!strncmp(entry(index), pci, strlen(pci))) {
      *device = &counters[index];
      return SUCCESS;
    }
  }
  return NOT_FOUND;
}

#ifdef OLD_DRIVER
int nvmlInit(void) { return initialize(); }
int nvmlDeviceGetHandleByPciBusId(const char* pci, void** device) { return open_gpu(pci, device); }
int nvmlDeviceGetCurrentClocksThrottleReasons(void* device, unsigned long long* value) {
  return wide("reasons", device, value);
}
#else
int nvmlInit_v2(void) { return initialize(); }
int nvmlDeviceGetHandleByPciBusId_v2(const char* pci, void** device) { return open_gpu(pci, device); }
int nvmlDeviceGetCurrentClocksEventReasons(void* device, unsigned long long* value) {
  return wide("reasons", device, value);
}
int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* value) {
  return wide("energy", device, value);
}
#endif
int nvmlDeviceGetPowerUsage(void* device, unsigned* value) { return number("power", device, value); }
int nvmlDeviceGetEnforcedPowerLimit(void* device, unsigned* value) { return number("limit", device, value); }
int nvmlDeviceGetPersistenceMode(void* device, unsigned* value) { return number("persistence", device, value); }
int nvmlDeviceGetTemperature(void* device, unsigned kind, unsigned* value) {
  return of_kind("temperature", device, kind, value);
}
int nvmlDeviceGetClockInfo(void* device, unsigned kind, unsigned* value) {
  return of_kind("clock", device, kind, value);
}
int nvmlDeviceGetMaxClockInfo(void* device, unsigned kind, unsigned* value) {
  return of_kind("highest", device, kind, value);
}
int nvmlDeviceGetApplicationsClock(void* device, unsigned kind, unsigned* value) {
  return of_kind("application", device, kind, value);
}
int nvmlDeviceGetMemoryInfo(void* device, nvmlMemory_t* memory) {
  const int status = wide("used", device, &memory->used);
  memory->total = 1ULL << 34;
  memory->free = memory->total - memory->used;
  return status;
}
const char* nvmlErrorString(int status) {
  switch (status) {
    case NO_PERMISSION:
      return "Insufficient Permissions";
    case NOT_FOUND:
      return "Not Found";
    case GPU_IS_LOST:
      return "GPU is lost";
    default:
      return "Unknown Error";
  }
}

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGetCount(int* count) {
  for (*count = 0; entry(*count); (*count)++) continue;
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return entry(index) ? 0 : 101;
}
int cuDeviceGetPCIBusId(char* pci, int bytes, int device) {
  const char* gpu = entry(device);
  if (!gpu) return 101;
  snprintf(pci, (size_t)bytes, "%.*s", (int)strcspn(gpu, " ;"), gpu);
  return 0;
}
int cuDeviceGetName(char* name, int bytes, int device) {
  const char* gpu = entry(device);
  if (!gpu) return 101;
  gpu += strcspn(gpu, " ");
  gpu += strspn(gpu, " ");
  snprintf(name, (size_t)bytes, "%.*s", (int)strcspn(gpu, ";"), gpu);
  return 0;
}
