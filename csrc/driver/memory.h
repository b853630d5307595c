// Heap buffers of exactly the size that is needed, so that a sanitizer sees the byte behind the
// last; and the numbers that a seed decides.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "../common/convert.h"

namespace driver {

struct Dice {
    uint64_t state;
    explicit Dice(uint64_t seed) : state(seed) {}
    uint64_t next() { // splitmix64
        uint64_t z = (state += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
    bool coin() { return (next() & 1) != 0; }
    float uniform() { return (float)(next() >> 40) * (1.0f / (1 << 24)); } // [0, 1)
    float value() { return 2.0f * uniform() - 1.0f; }
    // Small sizes, and those around the edges of vectors, tiles and blocks.
    int64_t size(int64_t most) {
        static const int64_t edges[] = {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129};
        int64_t n = coin() ? edges[below(15)] : 1 + below(most);
        return n < most ? n : most;
    }
};

class Buffer {
  public:
    explicit Buffer(size_t bytes) : bytes_(bytes), start_(malloc(bytes != 0 ? bytes : 1)) {
        if (start_ == nullptr)
            abort();
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(start_); }
    size_t bytes() const { return bytes_; }
    template <class T>
    T* as() const {
        return static_cast<T*>(start_);
    }
    void* p() const { return start_; }

  private:
    size_t bytes_;
    void* start_;
};

using Memory = std::shared_ptr<Buffer>;

inline Memory bytes(int64_t n) { return std::make_shared<Buffer>((size_t)n); }

inline Memory zeros(int64_t n) {
    Memory m = bytes(n);
    memset(m->p(), 0, m->bytes());
    return m;
}

// Values in (-scale, scale) of a dtype.
inline Memory values(Dice& d, int64_t n, int dtype, float scale = 1.0f) {
    Memory m = bytes(n * pk::dtype_size(dtype));
    for (int64_t i = 0; i < n; ++i)
        pk::store_from_float(m->p(), dtype, i, scale * d.value());
    return m;
}

inline Memory random_bytes(Dice& d, int64_t n) {
    Memory m = bytes(n);
    for (int64_t i = 0; i < n; ++i)
        m->as<uint8_t>()[i] = (uint8_t)d.next();
    return m;
}

} // namespace driver
