// The observer of memory accesses: finds races, and counts the bytes of global memory that a launch reads and writes.
//
// The kernels are compiled with -fsanitize=thread, which calls a function at every access. They are defined here
// instead of in the library of that sanitizer, because threads of a block are not threads of the process.
//
// Two accesses of different threads to one byte are a race if one of them writes, not both are atomic, and nothing
// orders them. A barrier orders the accesses of a block, __syncwarp those of the lanes that take part. Shuffles and
// votes order nothing (CUDA C++ Programming Guide, "Warp Shuffle Functions"), and nothing orders two blocks of a
// launch. So a race is found in every order of threads that executes both accesses.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "block.h"

namespace cuda_on_cpu {
namespace {

constexpr uintptr_t kSectorBytes = 32;

struct Access {
  uint64_t block;
  uint32_t thread;
  uint32_t barriers;  // of the block before it
  uint32_t clock;     // of the thread
  bool writes, atomic;
};

// A thread's own clock counts its warp barriers. The clock that it knows of another lane is that of the last access of
// the lane that is ordered before all accesses from now on.
struct Clocks {
  uint32_t of_lane[32];
};

// The accesses to a byte that may race with a later one.
struct Byte {
  std::vector<Access> writes, reads;
};

uint64_t block;  // number of the running block in all launches
uint32_t barriers;
std::vector<Clocks> clocks;  // of each thread
std::vector<Byte> shared_memory_bytes;
std::unordered_map<uintptr_t, Byte> global_memory_bytes;
std::unordered_set<uintptr_t> read_sectors, written_sectors;

bool is_ordered_before(const Access& old, const Access& now) {
  if (old.block != now.block) {
    return false;
  }
  const bool same_warp = old.thread / 32 == now.thread / 32;
  return old.thread == now.thread || old.barriers < now.barriers ||
         (same_warp && old.clock <= clocks[now.thread].of_lane[old.thread % 32]);
}

bool is_race(const Access& old, const Access& now) {
  return (old.writes || now.writes) && !(old.atomic && now.atomic) && !is_ordered_before(old, now);
}

std::string name_of(const Access& access) {
  return "thread " + std::to_string(access.thread) + (access.block == block ? "" : " of another block") +
         (access.atomic   ? " changes atomically"
          : access.writes ? " writes"
                          : " reads");
}

// Position in the library, for addr2line.
std::string position_of(const void* code) {
  Dl_info found = {};
  dladdr(code, &found);
  char text[32];
  snprintf(text, sizeof(text), "+%#zx", size_t(static_cast<const char*>(code) - static_cast<char*>(found.dli_fbase)));
  return text;
}

void check(const std::vector<Access>& before, const Access& now, uintptr_t byte, const void* code) {
  for (const Access& old : before) {
    if (is_race(old, now)) {
      stop("a race: " + name_of(now) + " and " + name_of(old) + ", not ordered by a barrier: " +
           place_of(reinterpret_cast<const void*>(byte)) + " (code " + position_of(code) + ")");
    }
  }
}

// A later access that races with an access before this one also races with this one, if this one is ordered after the
// other, writes if the other does, and is not atomic unless the other is.
void remember(std::vector<Access>& list, const Access& now) {
  list.erase(
      std::remove_if(list.begin(), list.end(),
                     [&](const Access& old) { return (old.atomic || !now.atomic) && is_ordered_before(old, now); }),
      list.end());
  list.push_back(now);
}

// With few searches, because all threads of a block may read the same bytes.
void remember_read(std::vector<Access>& reads, const Access& now) {
  if (reads.empty() || !is_ordered_before(reads.back(), now)) {
    reads.push_back(now);
  } else if (reads.back().thread == now.thread) {
    reads.back() = now;
  } else {
    remember(reads, now);  // the first read after a barrier
  }
}

Byte& find_byte(uintptr_t address, Memory kind) {
  if (kind == Memory::global) {
    return global_memory_bytes[address];
  }
  const size_t offset = shared_offset(reinterpret_cast<const void*>(address));
  if (offset >= shared_memory_bytes.size()) {
    shared_memory_bytes.resize(offset + 1);
  }
  return shared_memory_bytes[offset];
}

void check_byte(uintptr_t address, Memory kind, const Access& now, const void* code) {
  Byte& byte = find_byte(address, kind);
  check(byte.writes, now, address, code);
  if (!now.writes) {
    return remember_read(byte.reads, now);
  }
  check(byte.reads, now, address, code);
  if (!now.atomic) {
    byte.reads.clear();  // those not ordered before it were races
  }
  remember(byte.writes, now);
}

void observe(const void* address, size_t size, bool writes, bool atomic, const void* code) {
  if (!in_kernel()) {
    return;
  }
  const Memory kind = kind_of(address);
  if (kind == Memory::own) {
    return;
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  if (kind == Memory::global) {
    for (uintptr_t sector = first / kSectorBytes; sector <= (first + size - 1) / kSectorBytes; ++sector) {
      if (!writes || atomic) {
        current_work().bytes_read += kSectorBytes * read_sectors.insert(sector).second;
      }
      if (writes) {
        current_work().bytes_written += kSectorBytes * written_sectors.insert(sector).second;
      }
    }
    current_work().atomics += atomic;
  }
  const unsigned thread = current_thread();
  const Access now = {block, thread, barriers, clocks[thread].of_lane[thread % 32], writes, atomic};
  for (uintptr_t byte = first; byte < first + size; ++byte) {
    check_byte(byte, kind, now, code);
  }
}

}  // namespace

void observe_atomic(const void* address, size_t bytes) {
  observe(address, bytes, true, true, __builtin_return_address(0));
}

void observe_launch() {
  global_memory_bytes.clear();
  read_sectors.clear();
  written_sectors.clear();
}

void observe_block(unsigned threads) {
  ++block;
  barriers = 0;
  clocks.assign(threads, {});
  for (unsigned thread = 0; thread < threads; ++thread) {
    clocks[thread].of_lane[thread % 32] = 1;
  }
  shared_memory_bytes.clear();
}

void observe_barrier() { ++barriers; }

void observe_warp_barrier(unsigned first_thread, unsigned lanes) {
  Clocks joined = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned of = 0; of < 32 && (lanes >> lane & 1); ++of) {
      joined.of_lane[of] = max(joined.of_lane[of], clocks[first_thread + lane].of_lane[of]);
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) {
      clocks[first_thread + lane] = joined;
      ++clocks[first_thread + lane].of_lane[lane];
    }
  }
}

}  // namespace cuda_on_cpu

// --- the functions that the compiler calls ---------------------------------------------------------------------------

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CUDA_ON_CPU_ACCESS(name, bytes, writes) \
  void name(void* address) { cuda_on_cpu::observe(address, bytes, writes, false, __builtin_return_address(0)); }
#define CUDA_ON_CPU_ACCESSES(bytes)                              \
  CUDA_ON_CPU_ACCESS(__tsan_read##bytes, bytes, false)           \
  CUDA_ON_CPU_ACCESS(__tsan_write##bytes, bytes, true)           \
  CUDA_ON_CPU_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  CUDA_ON_CPU_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
CUDA_ON_CPU_ACCESSES(1)
CUDA_ON_CPU_ACCESSES(2)
CUDA_ON_CPU_ACCESSES(4)
CUDA_ON_CPU_ACCESSES(8)
CUDA_ON_CPU_ACCESSES(16)

void __tsan_read_range(void* address, size_t bytes) {
  cuda_on_cpu::observe(address, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  cuda_on_cpu::observe(address, bytes, true, false, __builtin_return_address(0));
}
}
