// How Python calls a launcher: all its arguments in one block of 8-byte slots, in their order.
// Converting twenty arguments one by one costs more than the launch.
#pragma once

#include <stddef.h>
#include <string.h>

#include <utility>

namespace pk {

// A pointer, an integer or a float from the start of its slot (little-endian).
template <class T>
T slot(const void* slots, size_t i) {
    static_assert(sizeof(T) <= 8, "a slot has 8 bytes");
    T value;
    memcpy(&value, (const char*)slots + 8 * i, sizeof(T));
    return value;
}

template <class... A, size_t... I>
int call(int (*launcher)(A...), const void* slots, std::index_sequence<I...>) {
    return launcher(slot<A>(slots, I)...);
}

template <class... A>
int call(int (*launcher)(A...), const void* slots) {
    return call(launcher, slots, std::index_sequence_for<A...>());
}

} // namespace pk

// pk_cuda_<name>_slots, which calls pk_cuda_<name>; stands behind its definition.
#define PK_LAUNCHER(name)                                                                          \
    extern "C" int pk_cuda_##name##_slots(const void* slots) {                                     \
        return pk::call(pk_cuda_##name, slots);                                                    \
    }
