// Memory as the executor checks it. Each byte of shared memory, and of each buffer that the test
// registered, has a shadow cell that remembers who touched it last, and when. An access is stopped
// when it
//   - lies outside shared memory, the registered buffers, the thread's own stack and constants,
//   - is not aligned to its size,
//   - reads shared bytes that nobody wrote (they are also poisoned), or that cp.async still owes,
//   - meets an access of another thread, one of the two a write, that no barrier has made known to
//     this thread,
//   - writes what a product of a warpgroup still reads.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace simt {

constexpr size_t kSharedBytes = 227 * 1024; // what a block may have on an H100

// Who and when: what orders two accesses.
struct Stamp {
    int thread = -1;   // in the block; kCopyEngine
    int block = -1;    // in the grid
    uint32_t time = 0; // of that thread: grows whenever it passes its knowledge on
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

// Bytes that the copy engine will write: closed to everybody until land_bytes.
void promise_bytes(const void* shared, size_t bytes);
void land_bytes(void* shared, const void* bytes, size_t count, const Stamp& when); // null: zeros
// Bytes that a product reads from now until it is waited for, by the asynchronous path: stores to
// them must have been fenced (fence_times: by thread, its latest fence).
void hold_bytes(const void* shared, size_t bytes, const std::vector<uint32_t>& fence_times);
void release_bytes(const void* shared, size_t bytes);
const char* shared_base();

void* allocate_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared_memory();

// Provided by executor.cpp.
bool in_kernel();
Stamp current_stamp();
bool seen(const Stamp& before); // whether the running thread surely sees what was done then
bool on_current_stack(const void* p, size_t bytes);
void maybe_preempt();

} // namespace simt
