// The units of a Hopper multiprocessor that work beside its threads, as the executor runs them.
//
// A copy lands when a thread waits for it at the latest, and in some schedules at once; until then
// its bytes are closed. A product reads its operands when it is waited for, and until then they
// must not be written. Stores of threads reach a product only behind a fence.
#pragma once

#include "../common/convert.h"
#include "executor.h"

namespace simt {

// A matrix in global memory and the box that one copy takes from it.
struct TensorBox {
    const char* base;
    int element_bytes;
    int64_t rows, cols, pitch; // pitch in bytes
    int box_rows, box_bytes;
};

struct Operand {
    size_t start; // byte in shared memory, before chunks are exchanged
    int next;     // across the depth: from 64 columns to the next
};

void tx_init(uint64_t* barrier, int count);
void tx_arrive(uint64_t* barrier, int bytes);
void tx_wait(uint64_t* barrier, uint32_t parity, Site site);
void tensor_copy(void* shared, const TensorBox* map, int64_t row, int64_t col, uint64_t* barrier);
void async_fence();
void product_issue(float* d, const Operand& a, const Operand& b, bool add, bool half, bool across);
void product_close_group();
void product_await(int groups_left);

} // namespace simt
