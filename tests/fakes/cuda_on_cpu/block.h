// What the scheduler (block.cpp) and the observer of memory accesses (accesses.cpp) know of each other.
#ifndef CUDA_ON_CPU_BLOCK_H
#define CUDA_ON_CPU_BLOCK_H

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace cuda_on_cpu {

// A launch or a memset since the last call of cuda_on_cpu_work.
struct Work {
  int64_t blocks;         // 0 for a memset
  int64_t threads;        // of a block
  int64_t barriers;       // of the block with the most
  int64_t bytes_read;     // of global memory, in sectors of 32 bytes that are counted once; 0 without the observer
  int64_t bytes_written;  // the same
  int64_t atomics;        // on global memory; 0 without the observer
};

// --- the scheduler -------------------------------------------------------------------------------------------------

// Ends the running launch with this message at once. Called by a thread of the block, it does not return.
void stop(const std::string& what);
// Whether a thread of a block is running, and its number in the block.
bool in_kernel();
unsigned current_thread();
enum class Memory { own, shared, global };  // own: of one thread or of the emulation itself, such as parameters
Memory kind_of(const void* address);
size_t shared_offset(const void* address);  // in the shared memory of the block
// Returns text such as "byte 8 of shared variable 1".
std::string place_of(const void* address);
Work& current_work();

// --- the observer --------------------------------------------------------------------------------------------------

#ifdef CUDA_ON_CPU_OBSERVED
void observe_launch();
void observe_block(unsigned threads);
void observe_barrier();
void observe_warp_barrier(unsigned first_thread, unsigned lanes);
#else
inline void observe_launch() {}
inline void observe_block(unsigned) {}
inline void observe_barrier() {}
inline void observe_warp_barrier(unsigned, unsigned) {}
#endif

}  // namespace cuda_on_cpu

#endif  // CUDA_ON_CPU_BLOCK_H
