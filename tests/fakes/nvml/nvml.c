// A fake NVML and the few functions of CUDA's driver library that list GPUs, for tests of their callers.
//
// Environment variables set the GPUs and their answers. A sensor that is not named returns NOT_SUPPORTED, as on a GPU
// without it:
//   FAKE_GPUS   PCI address and name, separated by ";": "0000:3b:00.0 Tesla V100-SXM2-16GB;0000:af:00.0 NVIDIA T4",
//               in the order of PCI addresses, which is that of NVML
//   FAKE_FASTEST  number of the GPU that CUDA lists first (0), unless CUDA_DEVICE_ORDER is PCI_BUS_ID. As in the real
//               driver, only the GPUs in CUDA_VISIBLE_DEVICES (numbers in that order) exist for CUDA.
//   FAKE_NVML   answers separated by spaces: name=answer,answer,... one for each call, the last one repeated. An answer
//               is a number, !status for a failure, or number@watts for a counter that grows by so many mJ per
//               millisecond, in steps of 20 ms. Names are the strings below; clocks and sensors end with their kind:
//               clock.1; used.1 is that of the second GPU
//   FAKE_DRIVER    version of the driver; FAKE_CUDA_VERSION: the CUDA version that it supports (12080)
//   FAKE_NVML_LOG  file to which the PCI address of every opened GPU is appended
// With -DOLD_DRIVER the library has the functions of a driver before 535 and no energy counter.
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

// How often a function was called before.
static int call_number(const char* name) {
  int index = 0;
  while (index < COUNTERS - 1 && counters[index].name[0] && strcmp(counters[index].name, name)) {
    index++;
  }
  snprintf(counters[index].name, NAME, "%s", name);
  return counters[index].calls++;
}

static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

// The text of FAKE_NVML; a new text resets call numbers and counters.
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
  if (!all) {
    return NOT_SUPPORTED;
  }
  const char* one = all + length + 1;
  const char* end = one + strcspn(one, " ");
  for (int left = call_number(name); left > 0; left--) {
    const char* next = memchr(one, ',', (size_t)(end - one));
    if (!next) {
      break;
    }
    one = next + 1;
  }
  if (*one == '!') {
    return atoi(one + 1);
  }
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
  if (!device || !value) {
    return INVALID_ARGUMENT;
  }
  if (!initialized) {
    return UNINITIALIZED;
  }
  const int status = answer(name, &wide);
  if (!status) {
    *value = (unsigned)wide;
  }
  return status;
}

static int wide(const char* name, void* device, unsigned long long* value) {
  if (!device || !value) {
    return INVALID_ARGUMENT;
  }
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

// The entry of a GPU with its number in CUDA.
static const char* cuda_entry(int index) {
  const char *order = getenv("CUDA_DEVICE_ORDER"), *visible = getenv("CUDA_VISIBLE_DEVICES");
  const char* fastest = getenv("FAKE_FASTEST");
  const int first = !fastest || (order && !strcmp(order, "PCI_BUS_ID")) ? 0 : atoi(fastest);
  if (visible) {
    while (visible && index-- > 0) {
      visible = strchr(visible, ',');
      visible += visible ? 1 : 0;
    }
    if (!visible || !*visible) {
      return NULL;
    }
    index = atoi(visible);
  }
  return entry(index == 0 ? first : index <= first ? index - 1 : index);
}

static int copy_name(char* name, int bytes, const char* gpu) {
  if (!gpu) {
    return 101;
  }
  gpu += strcspn(gpu, " ");
  gpu += strspn(gpu, " ");
  snprintf(name, (size_t)bytes, "%.*s", (int)strcspn(gpu, ";"), gpu);
  return 0;
}
static int number_of(const void* device) {
  return (int)(((const char*)device - (const char*)counters) / (long)sizeof(counters[0]));
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
  if (!initialized) {
    return UNINITIALIZED;
  }
  unsigned long long ignored;
  const int status = answer("handle", &ignored);
  if (status != NOT_SUPPORTED && status != SUCCESS) {
    return status;
  }
  for (int index = 0; entry(index); index++) {
    if (!strncmp(entry(index), pci, strlen(pci))) {
      *device = &counters[index];
      return SUCCESS;
    }
  }
  return NOT_FOUND;
}

int nvmlInitWithFlags(unsigned flags) { return flags ? INVALID_ARGUMENT : initialize(); }
int nvmlDeviceGetHandleByPciBusId_v2(const char* pci, void** device) { return open_gpu(pci, device); }
int nvmlDeviceGetCount_v2(unsigned* count) {
  for (*count = 0; entry((int)*count); (*count)++) {
    continue;
  }
  return initialized ? SUCCESS : UNINITIALIZED;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (!initialized) {
    return UNINITIALIZED;
  }
  if (!entry((int)index)) {
    return NOT_FOUND;
  }
  *device = &counters[index];
  return SUCCESS;
}
int nvmlDeviceGetName(void* device, char* name, unsigned bytes) {
  return copy_name(name, (int)bytes, entry(number_of(device)));
}
int nvmlSystemGetDriverVersion(char* version, unsigned bytes) {
  const char* set = getenv("FAKE_DRIVER");
  if (!set) {
    return NOT_SUPPORTED;
  }
  snprintf(version, bytes, "%s", set);
  return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  unsigned number_major = 0, number_minor = 0;
  const int status = number("major", device, &number_major);
  *major = (int)number_major;
  *minor = !status && !number("minor", device, &number_minor) ? (int)number_minor : 0;
  return status;
}
#ifdef OLD_DRIVER
int nvmlDeviceGetCurrentClocksThrottleReasons(void* device, unsigned long long* value) {
  return wide("reasons", device, value);
}
#else
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
  char name[NAME];
  snprintf(name, NAME, "used.%d", number_of(device));
  int status = wide(name, device, &memory->used);
  if (status == NOT_SUPPORTED) {
    status = wide("used", device, &memory->used);
  }
  unsigned long long total = 1ULL << 34;
  answer("total", &total);
  memory->total = total;
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
  for (*count = 0; cuda_entry(*count); (*count)++) {
    continue;
  }
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return cuda_entry(index) ? 0 : 101;
}
int cuDeviceGetPCIBusId(char* pci, int bytes, int device) {
  const char* gpu = cuda_entry(device);
  if (!gpu) {
    return 101;
  }
  snprintf(pci, (size_t)bytes, "%.*s", (int)strcspn(gpu, " ;"), gpu);
  return 0;
}
int cuDeviceGetName(char* name, int bytes, int device) { return copy_name(name, bytes, cuda_entry(device)); }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  unsigned long long number = 0;
  const int status = answer(attribute == 75 ? "major" : "minor", &number);
  *value = (int)number;
  return cuda_entry(device) ? status : 101;
}
int cuDriverGetVersion(int* version) {
  const char* set = getenv("FAKE_CUDA_VERSION");
  *version = set ? atoi(set) : 12080;
  return 0;
}
