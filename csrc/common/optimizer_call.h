// A bound step of an optimizer: the table of what it goes over, how a call is laid out in host
// memory, and what is worked out for each parameter, on the CPU and on devices alike.
#pragma once

#include "optimizer.h"

namespace pk {

// A run of elements of one parameter; a row of int64 in the table.
struct StateSegment {
    char* param;  // of the whole parameter; the gradient's address is in StepCall::grads
    char* state1; // relative to StepArgs::state
    char* state2;
    char* absmax1; // null: fp32 state
    char* absmax2;
    int64_t start; // first element, in the parameter
    int64_t numel; // of the run
    int64_t chunk; // the first of this run
    int64_t row;   // of the parameter in grads, hyper, rounding and skipped
    int32_t param_dtype;
    int32_t grad_dtype;
};

struct StepGroup {
    Settings settings;
    int64_t seed; // of random rounding
};

struct StepParameter {
    int64_t group;
    int64_t number; // among the optimizer's parameters
    int64_t blocks;
    int64_t slot; // where its step is counted
};

// Everything of a call, as peftkern/ops/optimizer/table.py lays it out.
struct StepCall {
    const int64_t* new_grads;  // in host memory, or null: `grads` is up to date
    const int64_t* new_groups; // in host memory, or null
    int64_t group_words;
    int64_t rows;
    int64_t slots;
    int64_t* grads; // [rows], where the parameters are, as all that follows
    StepGroup* groups;
    const StepParameter* parameters;
    int64_t* steps; // [slots], done so far
    Update* hyper;
    int64_t* rounding;
    int64_t* skipped;
    int64_t* last;
    int64_t* totals;
    int64_t* flag;
    const StateSegment* segments;
    const int32_t* owners;
    int64_t chunks;
    int64_t state;
    double* sums; // [chunks], of the norm; on devices
    float* norm;
    double limit;
    int32_t rule;
    int32_t coded;
    int32_t blocks; // of threads, at most; on devices
    int32_t clip;   // whether the step looks at the norm
};

// The factor on all gradients. NaN makes every block one that is skipped: a norm that is not finite
// leaves the whole step out.
PK_HD double clip_factor(const float* norm, double limit) {
    if (norm == nullptr)
        return 1.0;
    if (!is_finite(*norm))
        return (double)bits_float(0x7fc00000u);
    double factor = limit / ((double)*norm + 1e-6);
    return factor < 1.0 ? factor : 1.0;
}

// What the update of a row's parameter needs, and no skips yet.
PK_HD void prepare_row(const StepCall& c, int64_t row) {
    const StepParameter& p = c.parameters[row];
    const StepGroup& group = c.groups[p.group];
    int64_t step = c.steps[p.slot] + 1;
    double clip = clip_factor(c.clip != 0 ? c.norm : nullptr, c.limit);
    c.hyper[row] = make_update(c.rule, group.settings, step, clip);
    c.skipped[row] = 0;
    if (c.rounding != nullptr) {
        c.rounding[4 * row] = group.seed;
        c.rounding[4 * row + 1] = step;
        c.rounding[4 * row + 2] = p.number;
        c.rounding[4 * row + 3] = 0;
    }
}

// A parameter has made a step unless all of it was skipped; one without elements, unless the whole
// step was left out.
PK_HD void finish_row(const StepCall& c, int64_t row) {
    const StepParameter& p = c.parameters[row];
    bool whole = c.clip != 0 && !is_finite(*c.norm);
    if (c.skipped[row] < p.blocks || (p.blocks == 0 && !whole))
        c.steps[p.slot] += 1;
}

} // namespace pk
