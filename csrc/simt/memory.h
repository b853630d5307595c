// Memory as the executor checks it. Each byte of shared memory, and of each buffer that the test
// registered, has a shadow cell that remembers who touched it last and whether a barrier has passed
// since. An access is stopped when it
//   - lies outside shared memory, the registered buffers, the thread's own stack and constants,
//   - is not aligned to its size,
//   - reads shared bytes that nobody wrote (they are also poisoned), or that cp.async still owes,
//   - meets an access of another thread, one of the two a write, with no barrier between them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace simt {

constexpr size_t kSharedBytes = 227 * 1024; // what a block may have on an H100

// Who is running: everything that orders two accesses.
struct Stamp {
    int thread = -1;         // in the block
    int block = -1;          // in the grid
    uint32_t barriers = 0;   // block barriers passed
    uint32_t warp_syncs = 0; // __syncwarp passed by the thread's warp
};

enum class Access { kRead, kWrite, kAtomic };

struct PendingCopy {
    void* shared;
    const void* global;
    int bytes;
    int source_bytes; // the rest is filled with zeros
};

void begin_launch(const void* parameters, size_t parameter_bytes);
void begin_block(size_t dynamic_bytes);
void end_launch();

// Every access of a kernel comes through here, from compiler hooks or from device.h.
void check_access(const void* p, size_t bytes, Access access, bool must_be_aligned);
void raw_copy(void* to, const void* from, size_t bytes); // after check_access, unseen by the hooks
void issue_copy(const PendingCopy& copy);
void finish_copy(const PendingCopy& copy);

void* allocate_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared_memory();

// Provided by executor.cpp.
bool in_kernel();
Stamp current_stamp();
bool on_current_stack(const void* p, size_t bytes);
void maybe_preempt();

} // namespace simt
