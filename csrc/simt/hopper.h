// What csrc/cuda/hopper.cuh offers, for kernels built by the host compiler.
#pragma once

#include "device.h"
#include "hopper_units.h"
#include "memory.h"

namespace pk {

using TensorMap = simt::TensorBox;

inline int make_tensor_map(TensorMap* map, const void* base, int element_bytes, int64_t rows,
                           int64_t cols, int64_t pitch, int box_rows, int box_bytes) {
    bool fits = (uintptr_t)base % 16 == 0 && pitch % 16 == 0 && box_rows >= 1 && box_rows <= 256 &&
                (box_bytes == 32 || box_bytes == 64 || box_bytes == 128) && rows > 0 && cols > 0;
    *map = {(const char*)base, element_bytes, rows, cols, pitch, box_rows, box_bytes};
    return fits ? kOk : kBadArgument;
}

inline void barrier_init(uint64_t* barrier, int count) { simt::tx_init(barrier, count); }
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier) { simt::tx_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) { simt::tx_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
    simt::tx_wait(barrier, parity, {file, line});
}

inline void copy_box(void* shared, const TensorMap* map, int64_t row, int64_t col,
                     uint64_t* barrier) {
    simt::tensor_copy(shared, map, row, col, barrier);
}
inline void prefetch_map(const TensorMap*) {}
inline void fence_async() { simt::async_fence(); }

template <bool kAcross>
simt::Operand operand_at(const void* tile, int next) {
    return {(size_t)((const char*)tile - simt::shared_base()), next};
}
inline void product_begin() {}
inline void product_commit() { simt::product_close_group(); }
template <int kGroupsLeft>
void product_wait() {
    simt::product_await(kGroupsLeft);
}
inline void product_touch(float (&)[64]) {}
template <int kDtype, bool kAcross>
void product(float (&d)[64], const simt::Operand& a, const simt::Operand& b, bool add) {
    simt::product_issue(d, a, b, add, kDtype == kF16, kAcross);
}
template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

} // namespace pk
