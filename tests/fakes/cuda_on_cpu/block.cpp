// The scheduler of the emulation: blocks of fibers.
#include "block.h"

#include <cuda_runtime.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
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
constexpr size_t kFenceBytes = 64;            // after every shared variable; must not be written
constexpr size_t kHostStackBytes = 64 << 10;  // around the frame of the launch, with the parameters of the kernel

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

// Which ready thread runs next: any, or those of one warp until all of them wait, which lets warps get far ahead.
enum class Order { threads, warps };

uint64_t random_state = 1;
std::vector<Fiber> fibers;        // one per thread of the block
std::vector<unsigned> ready[32];  // by warp
uint32_t ready_warps;             // bit i: ready[i] is not empty
Order order;
unsigned warp_order[32];
unsigned threads, current;
int64_t barriers;  // of the block so far
bool fiber_runs;
const char* launch_frame;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void (*kernel_body)(void*);
void* kernel_argument;
alignas(128) unsigned char shared_memory[kSharedBytes + 128 * kFenceBytes];
std::vector<Variable> variables;
unsigned char garbage;
std::string failure;      // of the running launch
std::vector<Work> work;   // since cuda_on_cpu_work was called
std::mutex launch_mutex;  // all the state above belongs to the running launch
thread_local std::string message = "no error";

void fail(const std::string& what) {
  if (failure.empty()) {
    failure = what;
  }
}

uint32_t draw(uint32_t below) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return uint32_t(((random_state * 0x2545f4914f6cdd1dull) >> 32) * below >> 32);
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

void make_ready(unsigned thread) {
  ready[thread / 32].push_back(thread);
  ready_warps |= 1u << thread / 32;
}

void wake(Fiber& fiber) {
  fiber.waits = false;
  make_ready(unsigned(&fiber - fibers.data()));
}

void choose_order() {
  order = draw(2) ? Order::threads : Order::warps;
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned other = draw(i + 1);
    warp_order[i] = warp_order[other];
    warp_order[other] = i;
  }
}

// Removes and returns the thread that runs next.
unsigned next_thread() {
  unsigned skipped = order == Order::warps ? 0 : draw(unsigned(__builtin_popcount(ready_warps))), warp = 0;
  for (const unsigned candidate : warp_order) {
    warp = candidate;
    if ((ready_warps >> warp & 1) && skipped-- == 0) {
      break;
    }
  }
  std::vector<unsigned>& candidates = ready[warp];
  const unsigned index = draw(unsigned(candidates.size())), thread = candidates[index];
  candidates[index] = candidates.back();
  candidates.pop_back();
  if (candidates.empty()) {
    ready_warps &= ~(1u << warp);
  }
  return thread;
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
  ++barriers;
  observe_barrier();
  choose_order();
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
  if (mine.operation == Operation::warp_sync) {
    observe_warp_barrier(first, here);
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
  for (std::vector<unsigned>& threads_of_warp : ready) {
    threads_of_warp.clear();
  }
  ready_warps = 0;
  barriers = 0;
  choose_order();
  observe_block(threads);
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
    make_ready(t);
  }
  unsigned finished = 0;
  while (failure.empty() && finished < threads) {
    if (!ready_warps && !open_barrier()) {
      return fail(deadlock_message());
    }
    current = next_thread();
    threadIdx = fibers[current].index;
    fiber_runs = true;
    switch_to(&scheduler, &fibers[current].context, fibers[current].stack, kStackBytes);
    fiber_runs = false;
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

bool is_in(const void* address, const void* begin, size_t bytes) {
  return uintptr_t(address) - uintptr_t(begin) < bytes;
}

}  // namespace

void stop(const std::string& what) {
  fail(what);
  back_to_scheduler();
}

bool in_kernel() { return fiber_runs; }
unsigned current_thread() { return current; }
Work& current_work() { return work.back(); }

Memory kind_of(const void* address) {
  if (is_in(address, shared_memory, sizeof(shared_memory))) {
    return Memory::shared;
  }
  const bool is_built_in = is_in(address, &threadIdx, sizeof(threadIdx)) ||
                           is_in(address, &blockIdx, sizeof(blockIdx)) || is_in(address, &blockDim, sizeof(blockDim)) ||
                           is_in(address, &gridDim, sizeof(gridDim));
  const bool is_on_stack = is_in(address, fibers[current].stack, kStackBytes) ||
                           is_in(address, launch_frame - kHostStackBytes, 2 * kHostStackBytes);
  return is_built_in || is_on_stack ? Memory::own : Memory::global;
}

size_t shared_offset(const void* address) { return uintptr_t(address) - uintptr_t(shared_memory); }

std::string place_of(const void* address) {
  for (size_t i = 0; i < variables.size(); ++i) {
    const size_t bytes = variables[i].end - variables[i].begin;
    if (is_in(address, shared_memory + variables[i].begin, bytes)) {
      const size_t byte = uintptr_t(address) - uintptr_t(shared_memory + variables[i].begin);
      return "byte " + std::to_string(byte) + " of shared variable " + std::to_string(i);
    }
  }
  char text[64];
  snprintf(text, sizeof(text), "the byte at %p", address);
  return text;
}

void count_memset() {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  work.push_back({});
}

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
  make_ready(current);
  back_to_scheduler();
}

cudaError_t launch_grid(dim3 grid, dim3 block, void (*body)(void*), void* argument) {
  const uint64_t count = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (!count || count > 1024 || !blocks || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard<std::mutex> lock(launch_mutex);
  failure.clear();
  launch_frame = static_cast<const char*>(__builtin_frame_address(0));
  work.push_back({});
  work.back().blocks = int64_t(blocks);
  work.back().threads = int64_t(count);
  observe_launch();
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
    work.back().barriers = std::max(work.back().barriers, barriers);
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

// Copies what was queued since the last call, at most `capacity` entries; returns their number.
extern "C" int cuda_on_cpu_work(cuda_on_cpu::Work* out, int capacity) {
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::launch_mutex);
  const int count = std::min(capacity, int(cuda_on_cpu::work.size()));
  std::copy_n(cuda_on_cpu::work.begin(), count, out);
  cuda_on_cpu::work.clear();
  return count;
}
