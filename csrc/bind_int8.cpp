// LLM.int8().

#include "bind.h"
#include "cpu/features.h"

using namespace pk_bind;

namespace {

template <typename T>
T* take(Address& at, int64_t count) {
    T* p = reinterpret_cast<T*>(at);
    at += static_cast<Address>((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64);
    return p;
}

// Lays the scratch memory out from `at` on; returns where it ends.
Address lay_out(pk::Int8Product& p, Address at) {
    int64_t depth = (p.k + pk::kIntAlign - 1) / pk::kIntAlign * pk::kIntAlign;
    p.codes_of_x = take<int8_t>(at, p.m * depth);
    p.row_absmax = take<float>(at, p.m);
    p.row_sum = take<int32_t>(at, p.m);
    p.outlier = take<uint8_t>(at, p.k);
    p.columns = take<int32_t>(at, p.k);
    p.outlier_x = p.threshold > 0.0f ? take<float>(at, p.m * p.k) : nullptr;
    return at;
}

// Bytes of scratch memory for a call; most of it is touched only as far as there are outliers.
int64_t int8_work(int64_t m, int64_t k, float threshold) {
    pk::Int8Product p = {};
    p.m = m;
    p.k = k;
    p.threshold = threshold;
    return static_cast<int64_t>(lay_out(p, 64)); // 64: the start may have to move up to a line
}

// Returns the number of outlier columns.
int64_t int8_product(Address x, int dtype, int64_t m, int64_t k, int64_t n, Address codes,
                     Address scb, Address bias, float threshold, Address out, Address work,
                     int threads) {
    pk::Int8Product p = {};
    p.x = reinterpret_cast<const void*>(x);
    p.dtype = dtype;
    p.m = m;
    p.k = k;
    p.n = n;
    p.codes = reinterpret_cast<const int8_t*>(codes);
    p.scb = reinterpret_cast<const float*>(scb);
    p.bias = reinterpret_cast<const void*>(bias);
    p.bias_dtype = dtype;
    p.threshold = threshold;
    p.out = reinterpret_cast<void*>(out);
    p.threads = threads;
    lay_out(p, (work + 63) / 64 * 64);
    {
        py::gil_scoped_release release;
        check(kernels().int8_product(p), "llm_int8");
    }
    return p.outliers;
}

} // namespace

void pk_bind::bind_int8(py::module_& m) {
    m.def("int8_work", &int8_work);
    m.def("int8_product", &int8_product);
    m.def("set_vnni", &pk::set_vnni);
}
