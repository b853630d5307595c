// Threads on the OpenMP runtime that torch has loaded, and reused scratch memory per thread.
//
// The module links no OpenMP runtime: bind_openmp() looks up GOMP_parallel where torch itself
// would find it. So there is never a second runtime, whatever its file is called.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pk {

// Chunk numbers 0..count-1, handed out in order to whichever thread asks next.
struct Queue;
int64_t next_chunk(Queue* queue); // -1 when none is left

// Runs body(context, queue) once on each thread; body takes chunks until there are none.
using Body = void (*)(void* context, Queue* queue);
void run_parallel(int threads, int64_t chunks, Body body, void* context);

// Threads worth using for `microseconds` of single-threaded work: one for less than 50, in nested
// regions, in forked children (libgomp does not survive a fork) and where no runtime is bound.
int worthwhile_threads(int requested, double microseconds);

// At least `bytes` of 64-byte aligned memory owned by this thread, kept for its next call; nullptr
// when there is none. Contents are undefined.
void* scratch(size_t bytes);

struct OpenMPInfo {
    bool bound;
    char library[512]; // file of the runtime that is used
    char reason[256];  // why none is
};
const OpenMPInfo& bind_openmp();

} // namespace pk
