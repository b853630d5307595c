// Bindings of attention with a trainable prefix.

#include "bind.h"

using namespace pk_bind;

namespace {

// (address, batch stride, head stride, row stride)
pk::AttentionView view(const py::tuple& t) {
    pk::AttentionView v;
    v.p = reinterpret_cast<const void*>(t[0].cast<Address>());
    v.batch = t[1].cast<int64_t>();
    v.head = t[2].cast<int64_t>();
    v.row = t[3].cast<int64_t>();
    return v;
}

// None, or (kind, dtype, address, batch stride, head stride, row stride, column stride).
pk::AttentionMask mask(const py::object& o) {
    pk::AttentionMask m;
    if (o.is_none())
        return m;
    py::tuple t = o.cast<py::tuple>();
    m.kind = t[0].cast<int>();
    m.dtype = t[1].cast<int>();
    m.p = reinterpret_cast<const void*>(t[2].cast<Address>());
    m.batch = t[3].cast<int64_t>();
    m.head = t[4].cast<int64_t>();
    m.row = t[5].cast<int64_t>();
    m.col = t[6].cast<int64_t>();
    return m;
}

// `views` are q, k, v, prefix_k, prefix_v; `sizes` are (batch, heads, kv heads, queries, keys,
// prefix, depth); `dtypes` those of q and of the prefix.
pk::PrefixAttention problem(const py::tuple& views, const py::tuple& dtypes, const py::tuple& sizes,
                            const py::object& attn_mask, bool causal, float scale,
                            const py::object& dropout, Address lse, int threads) {
    if (views.size() != 5 || dtypes.size() != 2 || sizes.size() != 7)
        throw std::invalid_argument("prefix_attention: expected 5 views, 2 dtypes and 7 sizes");
    pk::PrefixAttention a;
    a.q = view(views[0].cast<py::tuple>());
    a.k = view(views[1].cast<py::tuple>());
    a.v = view(views[2].cast<py::tuple>());
    a.prefix_k = view(views[3].cast<py::tuple>());
    a.prefix_v = view(views[4].cast<py::tuple>());
    a.dtype = dtypes[0].cast<int>();
    a.prefix_dtype = dtypes[1].cast<int>();
    a.batch = sizes[0].cast<int64_t>();
    a.heads = sizes[1].cast<int64_t>();
    a.kv_heads = sizes[2].cast<int64_t>();
    a.group = a.heads / a.kv_heads;
    a.queries = sizes[3].cast<int64_t>();
    a.keys = sizes[4].cast<int64_t>();
    a.prefix = sizes[5].cast<int64_t>();
    a.depth = sizes[6].cast<int64_t>();
    a.mask = mask(attn_mask);
    a.causal = causal;
    a.scale = scale;
    a.dropout = make_dropout(dropout);
    a.lse = reinterpret_cast<float*>(lse);
    a.threads = threads;
    return a;
}

void prefix_attention(const py::tuple& views, const py::tuple& dtypes, const py::tuple& sizes,
                      const py::object& attn_mask, bool causal, float scale,
                      const py::object& dropout, Address out, Address lse, int threads) {
    pk::PrefixAttention a =
        problem(views, dtypes, sizes, attn_mask, causal, scale, dropout, lse, threads);
    a.out = reinterpret_cast<void*>(out);
    py::gil_scoped_release release;
    check(kernels().prefix_forward(a), "prefix_attention");
}

// `needs` tells whether the gradients of q, k and v, and those of the prefix, are wanted.
void prefix_attention_backward(const py::tuple& dout, const py::tuple& saved,
                               const py::tuple& views, const py::tuple& dtypes,
                               const py::tuple& sizes, const py::object& attn_mask, bool causal,
                               float scale, const py::object& dropout, Address lse,
                               const py::tuple& needs, Address dq, Address dk, Address dv,
                               Address partial_k, Address partial_v, int threads) {
    pk::PrefixAttention a =
        problem(views, dtypes, sizes, attn_mask, causal, scale, dropout, lse, threads);
    a.dout = view(dout);
    a.saved = view(saved);
    a.need_own = needs[0].cast<bool>();
    a.need_prefix = needs[1].cast<bool>();
    a.dq = reinterpret_cast<void*>(dq);
    a.dk = reinterpret_cast<void*>(dk);
    a.dv = reinterpret_cast<void*>(dv);
    a.partial_k = reinterpret_cast<float*>(partial_k);
    a.partial_v = reinterpret_cast<float*>(partial_v);
    py::gil_scoped_release release;
    check(kernels().prefix_backward(a), "prefix_attention_backward");
}

} // namespace

void pk_bind::bind_prefix(py::module_& m) {
    m.def("prefix_attention", &prefix_attention);
    m.def("prefix_attention_backward", &prefix_attention_backward);
}
