// The host SIMT executor: runs a CUDA grid on the CPU, one fiber per thread, and stops at the first
// thing that hardware would leave undefined. A test tool; nothing of it is in the product.
//
// How it sees every memory access of an unchanged .cu file: the file is compiled by the host
// compiler with -fsanitize=thread, which puts a call in front of each access, and linked against
// memory.cpp instead of the sanitizer's runtime. See memory.h for what is checked there.
//
//   executor.cpp   fibers, scheduling, barriers, warp collectives, launches
//   memory.cpp     shared and global memory: bounds, initialisation, races, cp.async in flight
//   hopper.cpp     transaction barriers, bulk tensor copies, products of a warpgroup
//   device.h       what a .cu file sees instead of the CUDA headers
//   hopper.h       the same for csrc/cuda/hopper.cuh
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kFault = 900; // status of a launch that was stopped; simt_report() says why

// Orders in which runnable threads are picked.
enum Schedule : int {
    kAscending = 0,  // round robin
    kDescending = 1, // round robin, backwards
    kRandom = 2,     // any, and threads are preempted in the middle of memory accesses
    kStarving = 3,   // some threads run as far ahead as the barriers allow
};

struct Site {
    const char* file;
    int line;
};

// --- for device.h: called by kernels -----------------------------------------------------------
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

void barrier(Site site);
void warp_barrier(uint32_t mask, Site site);

// A warp-wide operation: waits until every lane of `mask` has come, then one of them runs
// `apply(payloads)`; payloads[i] is what lane i passed (null outside the mask).
using Apply = void (*)(void* payloads[kWarp]);
void collective(const char* what, Apply apply, void* payload, uint32_t mask, Site site);

void* shared_array(const void* key, size_t bytes, size_t align); // one per declaration and block
void* dynamic_shared();

// cp.async: the bytes arrive when the issuing thread waits for the group, not before.
void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site);
void commit_async();
void wait_async(int groups_left, Site site);

// What a thread knows of the others: for each thread (and the copy engine) the latest moment whose
// effects it surely sees. Barriers, warp barriers and transaction barriers pass this knowledge on.
using Clock = std::vector<uint32_t>;
constexpr int kCopyEngine = kMaxThreads; // its place in a Clock

void publish(Clock& clock); // what the running thread knows is added; its later accesses are not
void learn(const Clock& clock);
uint32_t now();

// Blocks the running thread until `ready()`, which others make true.
void block_until(bool (*ready)(void*), void* condition, const char* what, Site site);
int running_thread();
int block_threads();
int choose(int n); // a random number below n

// Provided by hopper.cpp: outstanding copies of the block.
void begin_copies();
bool deliver_copy(); // false: there is none
bool eager_copies(); // the schedule wants copies to land at once

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- for launch() in device.h ------------------------------------------------------------------
int run_grid(const char* name, void (*entry)(void*), void* parameters, size_t parameter_bytes,
             dim3 grid, dim3 block, size_t shared_bytes);

} // namespace simt

// --- for the tests (ctypes) ----------------------------------------------------------------------
extern "C" {
void simt_configure(int schedule, uint64_t seed);
void simt_add_buffer(const char* name, void* p, int64_t bytes);
void simt_clear_buffers();
const char* simt_report();  // why the last launch was stopped; empty if it was not
int64_t simt_launches();    // grids run to their end so far
const char* simt_kernels(); // their names, one a line
}
