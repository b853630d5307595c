// The instruction sets built into this module, and the one in use.
#pragma once

#include "kernels.h"

namespace pk {

struct Isa {
    const Kernels* kernels;
    bool (*present)();
};

extern const Isa kIsas[]; // slowest first, ends with {nullptr, nullptr}

const Kernels* find_isa(const char* name); // nullptr: not built in, or this CPU cannot run it
const Kernels* best_isa();

} // namespace pk
