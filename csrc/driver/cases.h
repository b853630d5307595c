// Calls of the kernels with drawn arguments.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "memory.h"

namespace driver {

// What a call wrote, with the dtype of its floats; kExactBytes for anything else.
constexpr int kExactBytes = -1;
struct Result {
    Memory memory;
    int dtype;
};
using Results = std::vector<Result>;

struct Case {
    std::string name;
    bool exact; // every instruction set gives the same bits
    // Allocates the results, and returns the kernel's status. Inputs are read only, so that any
    // number of threads may run it at once.
    std::function<int(const pk::Kernels&, int threads, Results&)> run;
};

Case draw(uint64_t seed);

// One for each family; draw() picks.
Case draw_linear(Dice& d);
Case draw_low_rank(Dice& d);
Case draw_codes(Dice& d);
Case draw_int8(Dice& d);
Case draw_dropout(Dice& d);
Case draw_bottleneck(Dice& d);
Case draw_optimizer(Dice& d);
Case draw_sparse(Dice& d);
Case draw_prefix(Dice& d);
Case draw_dora(Dice& d);
Case draw_gated(Dice& d);
Case draw_llm_int8(Dice& d);

// What families share.
pk::Dropout draw_mask(Dice& d, int64_t cols);
// A weight in a drawn format; `keep` owns its memory. Decoded values have dtype `dtype`.
pk::Weight draw_weight(Dice& d, int64_t rows, int64_t cols, int dtype, std::vector<Memory>& keep);

} // namespace driver
