// The scheduler of the emulation: blocks of fibers.
#include <cuda_runtime.h>
#include <stdio.h>
#include <sys/mman.h>

#include <mutex>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// --- switching stacks -----------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
using Context = void*;  // the stack pointer; everything else is on the stack

extern "C" void cuda_on_cpu_switch(Context* from, Context* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

static void start_at(Context* context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // the ABI requires 16 n + 8 at a function's entry
  *top = reinterpret_cast<void*>(entry);
  memset(top - 6, 0, 6 * sizeof(void*));
  *context = top - 6;
}
#else
#include <ucontext.h>
using Context = ucontext_t;

static void cuda_on_cpu_switch(Context* from, Context* to) { swapcontext(from, to); }

static void start_at(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kFenceBytes = 64;  // after every shared variable; must not be written

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  bool finished, waits;
  Operation operation;  // what it waits for
  unsigned mask, lane, width;
  uint64_t value;  // its operand, then its result
};

struct Variable {
  const void* key;
  size_t begin, end;
};

uint64_t random_state = 1;
std::vector<Fiber> fibers;  // one per thread of the block
std::vector<unsigned> ready;
unsigned threads, current;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void (*kernel_body)(void*);
void* kernel_argument;
alignas(128) unsigned char shared_memory[kSharedBytes + 128 * kFenceBytes];
std::vector<Variable> variables;
unsigned char garbage;
std::string failure;      // of the running launch
std::mutex launch_mutex;  // all the state above belongs to the running launch
thread_local std::string message = "no error";

uint32_t draw(uint32_t below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return uint32_t(((random_state * 0x2545f4914f6cdd1dull) >> 32) * below >> 32);
}

void fail(const std::string& what) {
  if (failure.empty()) {
    failure = what;
  }
}

void switch_to(Context* from, Context* to, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, bytes);
  cuda_on_cpu_switch(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)stack, (void)bytes;
  cuda_on_cpu_switch(from, to);
#endif
}

void back_to_scheduler() { switch_to(&fibers[current].context, &scheduler, scheduler_stack, scheduler_stack_bytes); }

__attribute__((noinline)) void run_kernel() { kernel_body(kernel_argument); }

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  run_kernel();
  fibers[current].finished = true;
  back_to_scheduler();
}

void wake(Fiber& fiber) {
  fiber.waits = false;
  ready.push_back(unsigned(&fiber - fibers.data()));
}

bool is_barrier(Operation operation) { return operation <= Operation::barrier_or; }

// Resumes the block if all its threads wait at one barrier.
bool open_barrier() {
  uint64_t sum = 0;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.finished || fiber.operation != fibers[0].operation || !is_barrier(fiber.operation)) {
      return false;
    }
    sum += fiber.value;
  }
  const Operation operation = fibers[0].operation;
  if (operation == Operation::barrier_and) {
    sum = sum == threads;
  }
  if (operation == Operation::barrier_or) {
    sum = sum != 0;
  }
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].value = sum;
    wake(fibers[t]);
  }
  return true;
}

unsigned source_lane(const Fiber& fiber, unsigned lane) {
  const unsigned first = lane & ~(fiber.width - 1), last = first + fiber.width - 1;
  switch (fiber.operation) {
    case Operation::index:
      return first + (fiber.lane & (fiber.width - 1));
    case Operation::up:
      return lane < first + fiber.lane ? lane : lane - fiber.lane;
    case Operation::down:
      return lane + fiber.lane > last ? lane : lane + fiber.lane;
    case Operation::exclusive:
      return (lane ^ fiber.lane) > last ? lane : lane ^ fiber.lane;
    default:
      return lane;
  }
}

// Completes the warp operation of the current fiber if all unfinished lanes of its mask have arrived.
void complete_warp() {
  const Fiber& mine = fibers[current];
  const unsigned first = current & ~31u;
  const unsigned mask = mine.mask & (threads - first < 32 ? (1u << (threads - first)) - 1 : ~0u);
  unsigned here = 0, ballot = 0;
  uint64_t operands[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1) || fibers[first + lane].finished) {
      continue;
    }
    const Fiber& fiber = fibers[first + lane];
    if (!fiber.waits || fiber.operation != mine.operation || fiber.mask != mine.mask) {
      return;
    }
    here |= 1u << lane;
    ballot |= unsigned(fiber.value != 0) << lane;
    operands[lane] = fiber.value;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(here >> lane & 1)) {
      continue;
    }
    Fiber& fiber = fibers[first + lane];
    const unsigned source = source_lane(fiber, lane);
    if (!(here >> source & 1)) {
      fail("a shuffle reads lane " + std::to_string(source) + ", which does not participate");
    }
    fiber.value = fiber.operation == Operation::ballot ? ballot : operands[here >> source & 1 ? source : lane];
    wake(fiber);
  }
}

std::string deadlock_message() {
  unsigned finished = 0, barrier = 0;
  for (unsigned t = 0; t < threads; ++t) {
    finished += fibers[t].finished;
    barrier += fibers[t].waits && is_barrier(fibers[t].operation);
  }
  const unsigned warp = threads - finished - barrier;
  return "of " + std::to_string(threads) + " threads " + std::to_string(barrier) + " wait at a barrier, " +
         std::to_string(warp) + " wait for other lanes of their warp and " + std::to_string(finished) + " are finished";
}

void run_block() {
  variables.clear();
  garbage = uint8_t(0x80 | draw(128));  // negative both as a float and as an integer
  ready.clear();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    fiber.finished = fiber.waits = false;
    if (!fiber.stack) {
      fiber.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    // Stack tops a power of two apart would all map to the same few cache lines.
    start_at(&fiber.context, fiber.stack, kStackBytes - t % 64 * 320, fiber_main);
    ready.push_back(t);
  }
  unsigned finished = 0;
  while (failure.empty() && finished < threads) {
    if (ready.empty() && !open_barrier()) {
      return fail(deadlock_message());
    }
    const unsigned index = draw(uint32_t(ready.size()));
    current = ready[index];
    ready[index] = ready.back();
    ready.pop_back();
    threadIdx = fibers[current].index;
    switch_to(&scheduler, &fibers[current].context, fibers[current].stack, kStackBytes);
    finished += fibers[current].finished;
  }
  for (const Variable& variable : variables) {
    for (size_t i = variable.end; i < variable.end + kFenceBytes; ++i) {
      if (shared_memory[i] != garbage) {
        return fail("a shared variable was written beyond its end");
      }
    }
  }
}

}  // namespace

void* shared_bytes(const void* key, size_t bytes, size_t alignment) {
  for (const Variable& variable : variables) {
    if (variable.key == key) {
      return shared_memory + variable.begin;
    }
  }
  size_t begin = variables.empty() ? 0 : variables.back().end + kFenceBytes;
  begin = (begin + alignment - 1) / alignment * alignment;
  if (begin + bytes > kSharedBytes + variables.size() * kFenceBytes) {
    fprintf(stderr, "cuda_on_cpu: more than 48 KiB of shared memory\n");
    abort();
  }
  memset(shared_memory + begin, garbage, bytes + kFenceBytes);
  variables.push_back({key, begin, begin + bytes});
  return shared_memory + begin;
}

uint64_t synchronize(Operation operation, unsigned mask, uint64_t value, unsigned lane, unsigned width) {
  Fiber& fiber = fibers[current];
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.value = value;
  fiber.lane = lane;
  fiber.width = width;
  fiber.waits = true;
  if (!is_barrier(operation)) {
    if (!(mask >> (current & 31) & 1)) {
      fail("a warp operation's mask leaves out its own lane");
    }
    complete_warp();
  }
  back_to_scheduler();
  return fiber.value;
}

void maybe_yield() {
  if (draw(4)) {
    return;
  }
  ready.push_back(current);
  back_to_scheduler();
}

cudaError_t launch_grid(dim3 grid, dim3 block, void (*body)(void*), void* argument) {
  const uint64_t count = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!count || count > 1024 || !blocks || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard<std::mutex> lock(launch_mutex);
  failure.clear();
  threads = unsigned(count);
  if (fibers.size() < threads) {
    fibers.resize(threads);
  }
  kernel_body = body;
  kernel_argument = argument;
  gridDim = grid;
  blockDim = block;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t other = draw(uint32_t(i + 1));
    order[i] = order[other];
    order[other] = i;
  }
  for (const uint64_t number : order) {
    blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    run_block();
    if (failure.empty()) {
      continue;
    }
    message = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "): " + failure;
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return cuda_on_cpu::message.c_str();
  }
}

// Sets the seed of the order of threads and blocks, and of the garbage.
extern "C" void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::random_state = (2 * seed + 1) * 0x9e3779b97f4a7c15ull; }
