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

inline size_t operand_at(const void* tile) {
    return (size_t)((const char*)tile - simt::shared_base());
}
inline void product_begin() {}
inline void product_commit() { simt::product_close_group(); }
template <int kGroupsLeft>
void product_wait() {
    simt::product_await(kGroupsLeft);
}
template <int kCount>
void product_touch(float (&)[kCount]) {}
template <int kDtype, bool kAcross, int kCount>
void product(float (&d)[kCount], size_t a, size_t b, bool add) {
    simt::product_issue(d, 2 * kCount, a, b, add, kDtype == kF16, kAcross);
}

// Lane l holds elements 2 (l % 4) and the next of row l / 4; afterwards, of column l / 4.
struct Transpose {
    uint32_t own, result;
};
inline void apply_transpose(void* payloads[simt::kWarp]) {
    for (int lane = 0; lane < simt::kWarp; ++lane) {
        uint32_t r = 0;
        for (int i = 0; i < 2; ++i) {
            int row = 2 * (lane % 4) + i, column = lane / 4;
            uint32_t pair = ((Transpose*)payloads[4 * row + column / 2])->own;
            r |= (pair >> 16 * (column % 2) & 0xffffu) << 16 * i;
        }
        ((Transpose*)payloads[lane])->result = r;
    }
}
inline uint32_t transpose_8x8(uint32_t pair, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    Transpose t = {pair, 0};
    simt::collective("movmatrix", apply_transpose, &t, 0xffffffffu, {file, line});
    return t.result;
}

template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

} // namespace pk
