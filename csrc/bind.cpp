// The Python module peftkern._C; further families are bound in bind_*.cpp. Pointers cross as
// integers: peftkern/ops/*/cpu.py has checked dtype, size, device and contiguity before.

#include <link.h>
#include <string.h>

#include <atomic>

#include "bind.h"
#include "cpu/features.h"

using namespace pk_bind;

namespace {

std::atomic<const pk::Kernels*> chosen{nullptr};

} // namespace

const pk::Kernels& pk_bind::kernels() {
    const pk::Kernels* k = chosen.load(std::memory_order_acquire);
    if (k == nullptr) {
        k = pk::best_isa();
        chosen.store(k, std::memory_order_release);
    }
    return *k;
}

namespace {

// y [m, N] = x [m, K] W^T + bias, or with `transpose` dx [m, K] = dy [m, N] W.
void linear(Address x, int dtype, int64_t m, const py::tuple& weight, bool transpose, Address bias,
            Address out, int threads) {
    Base base = make_base(weight);
    bool along_columns = base.swapped != transpose;
    int64_t depth = along_columns ? base.w.rows : base.w.cols;
    pk::Product p;
    p.m = m;
    p.n = along_columns ? base.w.cols : base.w.rows;
    p.threads = threads;
    add_segment(p, matrix(x, dtype, depth), base.w, depth, along_columns);
    p.bias = reinterpret_cast<const void*>(bias);
    p.bias_dtype = dtype;
    set_out(p, out, dtype, p.n);
    py::gil_scoped_release release;
    check(kernels().product(p), transpose ? "linear_dx" : "linear");
}

// s [m, r] = dropout(x) A^T (fp32); y = x W^T + bias + scaling s B^T. Without a weight (None) the
// low-rank term is added to what y holds.
void lora_forward(Address x, int dtype, int64_t m, int64_t in, int64_t out_features,
                  const py::object& weight, Address bias, Address a, Address b, int adapter_dtype,
                  int64_t rank, float scaling, const py::object& dropout, Address s, Address y,
                  int threads) {
    pk::Product shrink;
    shrink.m = m;
    shrink.n = rank;
    shrink.threads = threads;
    pk::Operand dropped = matrix(x, dtype, in);
    dropped.dropout = make_dropout(dropout);
    add_segment(shrink, dropped, dense(a, adapter_dtype, rank, in), in, false);
    set_out(shrink, s, pk::kF32, rank);

    pk::Product p;
    p.m = m;
    p.n = out_features;
    p.threads = threads;
    if (weight.is_none()) {
        add_to_out(p, y, dtype);
    } else {
        Base base = make_base(weight.cast<py::tuple>());
        add_segment(p, matrix(x, dtype, in), base.w, in, base.swapped);
    }
    pk::Operand low = matrix(s, pk::kF32, rank);
    low.scale = scaling;
    add_segment(p, low, dense(b, adapter_dtype, out_features, rank), rank, false);
    p.bias = reinterpret_cast<const void*>(bias);
    p.bias_dtype = dtype;
    set_out(p, y, dtype, out_features);
    py::gil_scoped_release release;
    check(kernels().product(shrink), "lora_linear");
    check(kernels().product(p), "lora_linear");
}

// ds [m, r] = scaling dy B (fp32, caller's scratch); dx = dy W + mask(ds A), dA = ds^T dropout(x),
// dB = scaling dy^T s; a null address leaves a result out. Without a weight (None) the low-rank
// term is added to what dx holds.
void lora_backward(Address dy, Address x, Address s, int dtype, int64_t m, int64_t in,
                   int64_t out_features, const py::object& weight, Address a, Address b,
                   int adapter_dtype, int64_t rank, float scaling, const py::object& dropout,
                   Address ds, Address dx, Address da, Address db, int threads) {
    pk::Dropout drop = make_dropout(dropout);
    Base base;
    bool has_weight = !weight.is_none();
    if (has_weight)
        base = make_base(weight.cast<py::tuple>());
    py::gil_scoped_release release;
    const pk::Kernels& k = kernels();

    pk::Product p;
    p.m = m;
    p.n = rank;
    p.threads = threads;
    pk::Operand scaled = matrix(dy, dtype, out_features);
    scaled.scale = scaling;
    add_segment(p, scaled, dense(b, adapter_dtype, out_features, rank), out_features, true);
    set_out(p, ds, pk::kF32, rank);
    check(k.product(p), "lora_linear_backward");

    if (dx != 0) {
        p = pk::Product();
        p.m = m;
        p.n = in;
        p.threads = threads;
        add_segment(p, matrix(ds, pk::kF32, rank), dense(a, adapter_dtype, rank, in), rank, true);
        p.segment[0].mask = drop;
        if (has_weight)
            add_segment(p, matrix(dy, dtype, out_features), base.w, out_features, !base.swapped);
        else
            add_to_out(p, dx, dtype);
        set_out(p, dx, dtype, in);
        check(k.product(p), "lora_linear_backward");
    }
    if (da != 0) {
        p = pk::Product();
        p.m = rank;
        p.n = in;
        p.threads = threads;
        pk::Weight rows = dense(x, dtype, m, in);
        rows.dropout = drop;
        add_segment(p, transposed(ds, pk::kF32, rank), rows, m, true);
        set_out(p, da, adapter_dtype, in);
        check(k.product(p), "lora_linear_backward");
    }
    if (db != 0) {
        p = pk::Product();
        p.m = rank;
        p.n = out_features;
        p.threads = threads;
        pk::Operand low = transposed(s, pk::kF32, rank);
        low.scale = scaling;
        add_segment(p, low, dense(dy, dtype, m, out_features), m, true);
        set_out(p, db, adapter_dtype, 1, rank);
        check(k.product(p), "lora_linear_backward");
    }
}

int64_t quantize_4bit(Address x, int dtype, int64_t numel, int quant_type, int block_shift,
                      Address packed, Address absmax, int threads) {
    pk::Quantize4 q = {reinterpret_cast<const void*>(x),
                       dtype,
                       numel,
                       quant_type,
                       block_shift,
                       reinterpret_cast<uint8_t*>(packed),
                       reinterpret_cast<float*>(absmax),
                       threads,
                       -1};
    py::gil_scoped_release release;
    check(kernels().quantize_4bit(q), "quantize_4bit");
    return q.first_bad;
}

int64_t quantize_8bit(Address x, int dtype, int64_t rows, int64_t cols, Address codes, Address scb,
                      int threads) {
    pk::Quantize8 q = {
        reinterpret_cast<const void*>(x), dtype,   rows, cols, reinterpret_cast<int8_t*>(codes),
        reinterpret_cast<float*>(scb),    threads, -1};
    py::gil_scoped_release release;
    check(kernels().quantize_8bit(q), "quantize_8bit");
    return q.first_bad;
}

void quantize_absmax(Address x, int64_t numel, Address codes, Address nested_absmax, int threads) {
    pk::QuantizeAbsmax q = {reinterpret_cast<const float*>(x), numel,
                            reinterpret_cast<uint8_t*>(codes),
                            reinterpret_cast<float*>(nested_absmax), threads};
    py::gil_scoped_release release;
    check(kernels().quantize_absmax(q), "quantize_absmax");
}

void dequantize_absmax(Address codes, int64_t numel, Address nested_absmax, float offset,
                       Address out) {
    const uint8_t* c = reinterpret_cast<const uint8_t*>(codes);
    const float* scale = reinterpret_cast<const float*>(nested_absmax);
    float* o = reinterpret_cast<float*>(out);
    py::gil_scoped_release release;
    for (int64_t i = 0; i < numel; ++i)
        o[i] = pk::nested_value(c[i], scale[i / pk::kNestedBlock], offset);
}

void dequantize(const py::tuple& weight, Address out, int threads) {
    pk::Dequantize d = {make_base(weight).w, reinterpret_cast<void*>(out), threads};
    py::gil_scoped_release release;
    check(kernels().dequantize(d), "dequantize");
}

void dropout(Address x, int dtype, int64_t numel, const py::object& parameters, Address out,
             int threads) {
    pk::ApplyDropout a = {reinterpret_cast<const void*>(x), dtype,  numel, make_dropout(parameters),
                          reinterpret_cast<void*>(out),     threads};
    py::gil_scoped_release release;
    check(kernels().dropout(a), "philox_dropout");
}

// `table` is int64 [count, 10], the fields of OptimizerTensor in their order.
void optimizer_step(Address table, int64_t count, int rule, Address hyper, Address rounding,
                    Address skipped, int threads) {
    pk::OptimizerStep s = {reinterpret_cast<pk::OptimizerTensor*>(table),
                           count,
                           rule,
                           reinterpret_cast<const pk::Update*>(hyper),
                           reinterpret_cast<const int64_t*>(rounding),
                           reinterpret_cast<int64_t*>(skipped),
                           nullptr,
                           threads};
    py::gil_scoped_release release;
    check(kernels().optimizer_step(s), "optimizer_step");
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa)
        if (isa->present())
            names.push_back(isa->kernels->name);
    return names;
}

void set_isa(const std::string& name) {
    const pk::Kernels* k = pk::find_isa(name.c_str());
    if (k == nullptr) {
        std::string known;
        for (const std::string& isa : isas())
            known += (known.empty() ? "" : ", ") + isa;
        throw std::invalid_argument("isa: got '" + name +
                                    "', expected one that this build has and "
                                    "this CPU runs: " +
                                    known);
    }
    chosen.store(k, std::memory_order_release);
}

py::dict build_info() {
    py::dict d;
    d["version"] = PK_VERSION;
    d["compiler"] = PK_COMPILER;
    d["flags"] = PK_FLAGS;
    d["cuda"] = PK_CUDA;
    py::list built;
    for (const pk::Isa* isa = pk::kIsas; isa->kernels != nullptr; ++isa)
        built.append(isa->kernels->name);
    d["isas"] = built;
    return d;
}

int note_runtime(dl_phdr_info* info, size_t, void* list) {
    const char* name = strrchr(info->dlpi_name, '/');
    name = name == nullptr ? info->dlpi_name : name + 1;
    for (const char* prefix : {"libgomp", "libomp", "libiomp5"})
        if (strncmp(name, prefix, strlen(prefix)) == 0) {
            static_cast<std::vector<std::string>*>(list)->push_back(info->dlpi_name);
            break;
        }
    return 0;
}

py::dict openmp_info() {
    const pk::OpenMPInfo& info = pk::bind_openmp();
    std::vector<std::string> loaded;
    dl_iterate_phdr(note_runtime, &loaded);
    py::dict d;
    d["bound"] = info.bound;
    d["library"] = std::string(info.library);
    d["reason"] = std::string(info.reason);
    d["loaded"] = loaded;
    return d;
}

py::dict tables() {
    auto list = [](const float* p, int n) { return std::vector<float>(p, p + n); };
    py::dict d;
    d["nf4"] = list(pk::kNF4Values, 16);
    d["fp4"] = list(pk::kFP4Values, 16);
    d["nf4_thresholds"] = list(pk::kNF4Thresholds, 15);
    d["fp4_thresholds"] = list(pk::kFP4Thresholds, 7);
    d["fp4_order"] = std::vector<int>(pk::kFP4Order, pk::kFP4Order + 8);
    d["dynamic"] = list(pk::kDynamicValues, 256);
    d["dynamic_thresholds"] = list(pk::kDynamicThresholds, 255);
    d["unsigned"] = list(pk::kUnsignedValues, 256);
    d["unsigned_thresholds"] = list(pk::kUnsignedThresholds, 255);
    return d;
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of peftkern. Takes raw addresses: use peftkern.functional instead.";
    pk::bind_openmp();
    bind_optimizer(m);
    bind_pages(m);
    bind_dora(m);
    bind_gated(m);
    bind_int8(m);
    bind_lora_group(m);
    bind_multi_lora(m);
    bind_sparse(m);
    m.def("linear", &linear);
    m.def("lora_forward", &lora_forward);
    m.def("lora_backward", &lora_backward);
    m.def("quantize_4bit", &quantize_4bit);
    m.def("quantize_8bit", &quantize_8bit);
    m.def("quantize_absmax", &quantize_absmax);
    m.def("dequantize_absmax", &dequantize_absmax);
    m.def("dequantize", &dequantize);
    m.def("dropout", &dropout);
    m.def("optimizer_step", &optimizer_step);
    bind_prefix(m);
    m.def("isas", &isas);
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("set_isa", &set_isa);
    m.def("fast_pair_products", &pk::fast_pair_products);
    m.def("set_pair_products", &pk::set_pair_products);
    m.def("build_info", &build_info);
    m.def("openmp_info", &openmp_info);
    m.def("tables", &tables);
    bind_bottleneck(m);
}
