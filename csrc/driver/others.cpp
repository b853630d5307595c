// Everything that is no plain product.
#include "../common/optimizer.h"
#include "cases.h"

namespace driver {

Case draw(uint64_t seed) {
    static Case (*const families[])(Dice&) = {
        draw_linear,  draw_linear,    draw_low_rank,  draw_low_rank,   draw_codes,      draw_int8,
        draw_dropout, draw_optimizer, draw_optimizer, draw_bottleneck, draw_bottleneck, draw_sparse,
        draw_prefix,  draw_prefix,    draw_dora,      draw_gated,      draw_llm_int8};
    Dice d(seed);
    d.next();
    return families[seed % 17](d);
}

Case draw_dropout(Dice& d) {
    int dtype = (int)d.below(3);
    int64_t numel = 1 + d.below(20000);
    Memory x = values(d, numel, dtype);
    pk::Dropout mask = draw_mask(d, numel);
    mask.on = true;
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        out = {{bytes(numel * pk::dtype_size(dtype)), kExactBytes}};
        return k.dropout({x->p(), dtype, numel, mask, out[0].memory->p(), threads});
    };
    return {"dropout of " + std::to_string(numel), true, run};
}

Case draw_bottleneck(Dice& d) {
    int dtype = (int)d.below(3);
    int adapter_dtype = d.coin() ? pk::kF32 : dtype;
    int64_t m = d.size(90), k = d.size(200), n = d.coin() ? k : d.size(200), rank = d.size(70);
    int64_t scales = d.below(3) == 0 ? n : 1, block_rows = d.coin() ? 64 : 4096;
    int activation = (int)d.below(8);
    bool scaled = d.coin(), biased = d.coin(), add_dy = n == k && d.coin();
    Memory x = values(d, m * k, dtype), dy = values(d, m * n, dtype);
    Memory down_w = values(d, rank * k, adapter_dtype), down_b = values(d, rank, adapter_dtype);
    Memory up_w = values(d, n * rank, adapter_dtype), up_b = values(d, n, adapter_dtype);
    Memory scale = values(d, scales, adapter_dtype), residual = values(d, m * n, dtype);
    pk::Dropout mask = draw_mask(d, n);
    auto run = [=](const pk::Kernels& kernels, int threads, Results& out) {
        int64_t size = pk::dtype_size(dtype), adapter = pk::dtype_size(adapter_dtype);
        out = {{bytes(m * n * size), dtype},
               {bytes(m * k * size), dtype},
               {bytes(rank * k * 4), pk::kF32},
               {zeros(rank * 4), pk::kF32},
               {bytes(rank * n * 4), pk::kF32},
               {zeros(n * 4), pk::kF32},
               {bytes(n * rank * adapter), adapter_dtype},
               {zeros(n * adapter), adapter_dtype},
               {zeros(scales * adapter), adapter_dtype}};
        pk::Bottleneck b = {};
        b.x = x->p();
        b.dtype = dtype;
        b.m = m;
        b.k = k;
        b.n = n;
        b.rank = rank;
        b.down_w = down_w->p();
        b.down_b = biased ? down_b->p() : nullptr;
        b.up_w = up_w->p();
        b.up_b = biased ? up_b->p() : nullptr;
        b.scale = scaled ? scale->p() : nullptr;
        b.scales = scaled ? scales : 0;
        b.adapter_dtype = adapter_dtype;
        b.residual = residual->p();
        b.activation = activation;
        b.dropout = mask;
        b.y = out[0].memory->p();
        Memory work = bytes(m <= 8 ? m * (rank + n) * 4 : 0);
        b.work = work->as<float>();
        b.threads = threads;
        if (int status = kernels.bottleneck_forward(b))
            return status;
        Memory sums = bytes((m < block_rows ? m : block_rows) * 4 * rank * 4);
        Memory scaled_up = bytes(n * rank * 4);
        b.residual = nullptr;
        b.work = sums->as<float>();
        auto floats = [&](int i) { return out[(size_t)i].memory->as<float>(); };
        pk::BottleneckGradients g = {dy->p(),
                                     add_dy,
                                     out[1].memory->p(),
                                     floats(2),
                                     floats(3),
                                     floats(4),
                                     floats(5),
                                     scaled_up->as<float>(),
                                     out[6].memory->p(),
                                     biased ? out[7].memory->p() : nullptr,
                                     scaled ? out[8].memory->p() : nullptr,
                                     block_rows};
        return kernels.bottleneck_backward(b, g);
    };
    return {"bottleneck m=" + std::to_string(m) + " k=" + std::to_string(k) +
                " n=" + std::to_string(n) + " rank=" + std::to_string(rank),
            false, run};
}

Case draw_optimizer(Dice& d) {
    int rule = (int)d.below(3), count = 1 + (int)d.below(3);
    bool eight = d.coin(), random = d.coin();
    struct Parameter {
        int64_t numel;
        int dtype, grad_dtype;
        Memory p, grad, state1, state2, absmax1, absmax2;
    };
    std::vector<Parameter> parameters;
    for (int i = 0; i < count; ++i) {
        Parameter q;
        q.numel = 1 + d.below(d.below(3) == 0 ? 60000 : 1500);
        q.dtype = (int)d.below(3);
        q.grad_dtype = d.coin() ? q.dtype : pk::kF32;
        int64_t blocks = pk::ceil_div(q.numel, pk::kStateBlock);
        q.p = values(d, q.numel, q.dtype);
        q.grad = values(d, q.numel, q.grad_dtype);
        if (d.below(6) == 0)
            pk::store_from_float(q.grad->p(), q.grad_dtype, d.below(q.numel),
                                 pk::bits_float(0x7f800000u));
        q.state1 = eight ? random_bytes(d, q.numel) : values(d, q.numel, pk::kF32, 1e-2f);
        q.state2 = eight ? random_bytes(d, q.numel) : zeros(q.numel * 4);
        q.absmax1 = zeros(blocks * 4);
        q.absmax2 = zeros(blocks * 4);
        for (int64_t j = 0; j < blocks; ++j)
            q.absmax1->as<float>()[j] = q.absmax2->as<float>()[j] = d.uniform();
        parameters.push_back(q);
    }
    pk::Settings settings = {1e-3, 0.9, 0.95, 1e-8, 0.01, 1.0};
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        out.clear();
        std::vector<pk::OptimizerTensor> tensors;
        std::vector<pk::Update> hyper;
        std::vector<int64_t> rounding;
        int64_t chunks = 0;
        auto copy = [&](const Memory& m) {
            Memory c = bytes((int64_t)m->bytes());
            memcpy(c->p(), m->p(), m->bytes());
            out.push_back({c, kExactBytes});
            return c->p();
        };
        for (const Parameter& q : parameters) {
            pk::OptimizerTensor t = {};
            t.param = copy(q.p);
            t.grad = q.grad->p();
            t.state1 = copy(q.state1);
            t.state2 = rule == pk::kAdamW ? copy(q.state2) : nullptr;
            t.absmax1 = eight ? (float*)copy(q.absmax1) : nullptr;
            t.absmax2 = eight && rule == pk::kAdamW ? (float*)copy(q.absmax2) : nullptr;
            t.numel = q.numel;
            t.param_dtype = q.dtype;
            t.grad_dtype = q.grad_dtype;
            tensors.push_back(t);
            hyper.push_back(pk::make_update(rule, settings, 3, 1.0));
            for (int64_t word : {int64_t(5), int64_t(3), (int64_t)tensors.size(), int64_t(0)})
                rounding.push_back(word);
            chunks += pk::ceil_div(q.numel, pk::kOptimizerChunk * pk::kStateBlock);
        }
        out.push_back({zeros((int64_t)tensors.size() * 8), kExactBytes});
        int64_t* skipped = out.back().memory->as<int64_t>();
        out.push_back({zeros(chunks * 8), kExactBytes});
        double* sums = out.back().memory->as<double>();
        pk::OptimizerStep s = {tensors.data(),
                               (int64_t)tensors.size(),
                               rule,
                               hyper.data(),
                               random ? rounding.data() : nullptr,
                               skipped,
                               sums,
                               threads};
        if (int status = k.square_sums(s))
            return status;
        return k.optimizer_step(s);
    };
    return {"optimizer rule=" + std::to_string(rule) + " eight=" + std::to_string(eight), true,
            run};
}

Case draw_sparse(Dice& d) {
    int dtype = (int)d.below(3), value_dtype = d.coin() ? pk::kF32 : dtype;
    int64_t m = d.size(150), rows = d.size(90), cols = d.size(90);
    int64_t padded = pk::ceil_div(m, 64) * 64;
    std::vector<int64_t> at, start;
    uint64_t one_in = 1 + (uint64_t)d.below(12);
    for (int64_t r = 0; r < rows; ++r) {
        start.push_back((int64_t)at.size());
        for (int64_t c = 0; c < cols; ++c)
            if (d.next() % one_in == 0)
                at.push_back(r * cols + c);
    }
    start.push_back((int64_t)at.size());
    Memory index = bytes((int64_t)at.size() * 8), starts = bytes((rows + 1) * 8);
    if (!at.empty())
        memcpy(index->p(), at.data(), index->bytes());
    memcpy(starts->p(), start.data(), starts->bytes());
    Memory value = values(d, (int64_t)at.size(), value_dtype);
    Memory x = values(d, m * cols, dtype), dy = values(d, m * rows, dtype);
    int64_t way = d.below(3); // one result a call, as the bindings ask
    bool gradient = way == 0, forward = way == 1, backward = way == 2;
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        int64_t size = pk::dtype_size(dtype);
        out = {{zeros((int64_t)index->bytes() / 2), pk::kF32},
               {zeros(m * rows * size), dtype},
               {zeros(m * cols * size), dtype}};
        Memory x_tiles = bytes(padded * cols * size), dy_tiles = bytes(padded * rows * size);
        pk::SparseProduct p = {};
        p.x = gradient || forward ? x->p() : nullptr;
        p.dy = gradient || backward ? dy->p() : nullptr;
        p.dtype = dtype;
        p.m = m;
        p.rows = rows;
        p.cols = cols;
        p.entries.index = index->as<int64_t>();
        p.entries.start = starts->as<int64_t>();
        p.entries.value = value->p();
        p.entries.dtype = value_dtype;
        p.x_tiles = backward ? nullptr : x_tiles->p();
        p.dy_tiles = forward ? nullptr : dy_tiles->p();
        p.gradient = gradient ? out[0].memory->as<float>() : nullptr;
        p.y = forward ? out[1].memory->p() : nullptr;
        p.dx = backward ? out[2].memory->p() : nullptr;
        p.threads = threads;
        return k.sparse_product(p);
    };
    return {"sparse m=" + std::to_string(m) + " entries=" + std::to_string(at.size()), false, run};
}

Case draw_prefix(Dice& d) {
    int dtype = (int)d.below(3), prefix_dtype = d.coin() ? pk::kF32 : dtype;
    int64_t batch = 1 + d.below(3), kv = 1 + d.below(3), group = 1 + d.below(3);
    int64_t heads = kv * group, keys = d.size(70), prefix = d.size(40), depth = d.size(80);
    bool causal = d.coin();
    int64_t queries = causal ? keys : d.size(70);
    Memory q = values(d, batch * heads * queries * depth, dtype);
    Memory k = values(d, batch * kv * keys * depth, dtype);
    Memory v = values(d, batch * kv * keys * depth, dtype);
    Memory dout = values(d, batch * heads * queries * depth, dtype);
    Memory pre_k = values(d, kv * prefix * depth, prefix_dtype);
    Memory pre_v = values(d, kv * prefix * depth, prefix_dtype);
    int kind = (int)d.below(3);
    Memory mask = values(d, batch * queries * keys, pk::kF32);
    if (kind == pk::kBoolMask)
        for (int64_t i = 0; i < batch * queries * keys; ++i)
            mask->as<bool>()[i] = d.coin();
    pk::Dropout dropout = draw_mask(d, prefix + keys);
    auto run = [=](const pk::Kernels& kernels, int threads, Results& out) {
        int64_t size = pk::dtype_size(dtype), own = batch * heads * queries * depth;
        int64_t theirs = batch * kv * keys * depth, sums = batch * kv * prefix * depth;
        out = {{bytes(own * size), dtype},    {bytes(batch * heads * queries * 4), pk::kF32},
               {bytes(own * size), dtype},    {bytes(theirs * size), dtype},
               {bytes(theirs * size), dtype}, {bytes(sums * 4), pk::kF32},
               {bytes(sums * 4), pk::kF32}};
        auto view = [&](const void* p, int64_t count, int64_t length) {
            pk::AttentionView a;
            a.p = p;
            a.batch = count * length * depth;
            a.head = length * depth;
            a.row = depth;
            return a;
        };
        pk::PrefixAttention a;
        a.q = view(q->p(), heads, queries);
        a.k = view(k->p(), kv, keys);
        a.v = view(v->p(), kv, keys);
        a.prefix_k = view(pre_k->p(), kv, prefix);
        a.prefix_v = view(pre_v->p(), kv, prefix);
        a.prefix_k.batch = a.prefix_v.batch = 0;
        a.dtype = dtype;
        a.prefix_dtype = prefix_dtype;
        a.mask.kind = kind;
        a.mask.p = mask->p();
        a.mask.batch = queries * keys;
        a.mask.row = keys;
        a.mask.col = 1;
        a.batch = batch;
        a.heads = heads;
        a.kv_heads = kv;
        a.group = group;
        a.queries = queries;
        a.keys = keys;
        a.prefix = prefix;
        a.depth = depth;
        a.causal = causal;
        a.scale = 0.3f;
        a.dropout = dropout;
        a.out = out[0].memory->p();
        a.lse = out[1].memory->as<float>();
        a.threads = threads;
        if (int status = kernels.prefix_forward(a))
            return status;
        a.dout = view(dout->p(), heads, queries);
        a.saved.p = a.out;
        a.saved.batch = queries * heads * depth;
        a.saved.head = depth;
        a.saved.row = heads * depth;
        a.need_own = a.need_prefix = true;
        a.dq = out[2].memory->p();
        a.dk = out[3].memory->p();
        a.dv = out[4].memory->p();
        a.partial_k = out[5].memory->as<float>();
        a.partial_v = out[6].memory->as<float>();
        return kernels.prefix_backward(a);
    };
    return {"prefix b=" + std::to_string(batch) + " heads=" + std::to_string(heads) +
                " queries=" + std::to_string(queries) + " keys=" + std::to_string(keys) +
                " prefix=" + std::to_string(prefix) + " depth=" + std::to_string(depth),
            false, run};
}

Case draw_dora(Dice& d) {
    int dtype = (int)d.below(3);
    int64_t n = d.size(300), k = d.size(600), rank = d.size(30), rows = d.size(200);
    bool swapped = d.coin();
    std::vector<Memory> keep;
    pk::Weight w = swapped ? draw_weight(d, k, n, dtype, keep) : draw_weight(d, n, k, dtype, keep);
    Memory a = values(d, rank * k, pk::kF32), b = values(d, n * rank, pk::kF32);
    Memory cross = values(d, rank * n, pk::kF32);
    Memory x = values(d, rows * n, dtype), y = values(d, rows * n, dtype);
    auto run = [=](const pk::Kernels& kernels, int threads, Results& out) {
        out = {{bytes(n * 8), kExactBytes}, {bytes(n * 4), pk::kF32}, {bytes(n * 4), pk::kF32}};
        if (int status = kernels.row_squares({w, swapped, out[0].memory->as<double>(), threads}))
            return status;
        Memory gram = bytes(rank * rank * 8);
        pk::DoraNorm norm = {n,
                             k,
                             rank,
                             a->as<float>(),
                             b->as<float>(),
                             cross->as<float>(),
                             out[0].memory->as<double>(),
                             0.5,
                             gram->as<double>(),
                             out[1].memory->as<float>(),
                             threads};
        if (int status = kernels.dora_norm(norm))
            return status;
        pk::ColumnDots dots = {x->p(), y->p(), dtype, rows, n, out[2].memory->as<float>(), threads};
        return (void)keep.size(), kernels.column_dots(dots);
    };
    return {"dora n=" + std::to_string(n) + " k=" + std::to_string(k), false, run};
}

Case draw_gated(Dice& d) {
    int dtype = (int)d.below(3), activation = (int)d.below(8);
    int64_t numel = 1 + d.below(d.coin() ? 300 : 20000);
    bool backward = d.coin();
    Memory gate = values(d, numel, dtype, 8.0f), up = values(d, numel, dtype);
    Memory dh = values(d, numel, dtype);
    auto run = [=](const pk::Kernels& k, int threads, Results& out) {
        int64_t size = numel * pk::dtype_size(dtype);
        out = {{bytes(size), dtype}, {zeros(size), dtype}, {zeros(size), dtype}};
        return k.gated({backward ? dh->p() : nullptr, gate->p(), up->p(), dtype, numel, activation,
                        out[0].memory->p(), out[1].memory->p(), out[2].memory->p(), threads});
    };
    return {"gated of " + std::to_string(numel), false, run};
}

Case draw_llm_int8(Dice& d) {
    int dtype = (int)d.below(3);
    int64_t m = d.size(140), k = d.size(d.coin() ? 300 : 4300), n = d.size(150);
    float threshold = d.coin() ? 0.0f : 0.99f; // about one value in a hundred
    Memory x = values(d, m * k, dtype), codes = random_bytes(d, n * k);
    Memory scb = values(d, n, pk::kF32), bias = values(d, n, dtype);
    bool biased = d.coin();
    auto run = [=](const pk::Kernels& kernels, int threads, Results& out) {
        out = {{bytes(m * n * pk::dtype_size(dtype)), dtype}};
        int64_t depth = (k + pk::kIntAlign - 1) / pk::kIntAlign * pk::kIntAlign;
        Memory rounded = bytes(m * depth), absmax = bytes(4 * m), sums = bytes(4 * m);
        Memory outlier = bytes(k), columns = bytes(4 * k), kept = bytes(4 * m * k);
        pk::Int8Product p = {};
        p.x = x->p();
        p.dtype = dtype;
        p.m = m;
        p.k = k;
        p.n = n;
        p.codes = codes->as<int8_t>();
        p.scb = scb->as<float>();
        p.bias = biased ? bias->p() : nullptr;
        p.bias_dtype = dtype;
        p.threshold = threshold;
        p.out = out[0].memory->p();
        p.codes_of_x = rounded->as<int8_t>();
        p.row_absmax = absmax->as<float>();
        p.row_sum = sums->as<int32_t>();
        p.outlier = outlier->as<uint8_t>();
        p.columns = columns->as<int32_t>();
        p.outlier_x = kept->as<float>();
        p.threads = threads;
        return kernels.int8_product(p);
    };
    return {"llm_int8 m=" + std::to_string(m) + " n=" + std::to_string(n) +
                " k=" + std::to_string(k),
            false, run};
}

} // namespace driver
