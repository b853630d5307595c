// Bound steps of optimizers on the CPU, and what a step asks of Python objects, parameter by
// parameter, without the interpreter in between.

#include <math.h>
#include <string.h>

#include "bind.h"
#include "common/optimizer_call.h"

namespace pk_bind {

namespace {

// A new reference, or an error that is thrown.
py::object got(PyObject* o) {
    if (o == nullptr)
        throw py::error_already_set();
    return py::reinterpret_steal<py::object>(o);
}

int64_t number(const py::object& o) {
    int64_t n = PyLong_AsLongLong(o.ptr());
    if (n == -1 && PyErr_Occurred() != nullptr)
        throw py::error_already_set();
    return n;
}

// --- bound steps: csrc/cuda/optimizer_control.cu has the same for devices ---

struct Pass {
    std::vector<pk::OptimizerTensor> tensors;
    std::vector<pk::Update> hyper;
    std::vector<int64_t> rounding;
    std::vector<int64_t> rows;
};

Pass make_pass(const pk::StepCall& c, bool whole) {
    Pass pass;
    int64_t count = c.chunks > 0 ? c.owners[c.chunks - 1] + 1 : 0; // what lies behind is empty
    for (int64_t i = 0; i < count; ++i) {
        const pk::StateSegment& s = c.segments[i];
        bool coded = s.absmax1 != nullptr;
        pk::OptimizerTensor t = {};
        t.param = s.param + s.start * pk::dtype_size(s.param_dtype);
        t.grad =
            reinterpret_cast<const char*>(c.grads[s.row]) + s.start * pk::dtype_size(s.grad_dtype);
        t.state1 = s.state1 + c.state;
        t.state2 = s.state2 + c.state;
        t.absmax1 = coded ? reinterpret_cast<float*>(s.absmax1 + c.state) : nullptr;
        t.absmax2 = coded ? reinterpret_cast<float*>(s.absmax2 + c.state) : nullptr;
        t.numel = s.numel;
        t.param_dtype = s.param_dtype;
        t.grad_dtype = s.grad_dtype;
        pass.tensors.push_back(t);
        if (!whole)
            continue;
        pass.hyper.push_back(c.hyper[s.row]);
        pass.rows.push_back(s.row);
        if (c.rounding != nullptr) {
            const int64_t* r = c.rounding + 4 * s.row;
            pass.rounding.insert(pass.rounding.end(), {r[0], r[1], r[2], r[3] + s.start});
        }
    }
    return pass;
}

void step_call(const pk::StepCall& c, int threads) {
    Pass pass = make_pass(c, true);
    std::vector<int64_t> skipped(pass.tensors.size());
    pk::OptimizerStep s = {pass.tensors.data(),
                           static_cast<int64_t>(pass.tensors.size()),
                           c.rule,
                           pass.hyper.data(),
                           c.rounding != nullptr ? pass.rounding.data() : nullptr,
                           skipped.data(),
                           nullptr,
                           threads};
    check(kernels().optimizer_step(s), "optimizer_step");
    for (size_t i = 0; i < skipped.size(); ++i)
        c.skipped[pass.rows[i]] += skipped[i];
}

// The root of the sum of the chunks' sums, which are added in their order and without loss.
double norm_of(std::vector<pk::OptimizerTensor>& tensors, int threads) {
    constexpr int64_t kChunk = pk::kOptimizerChunk * pk::kStateBlock;
    int64_t chunks = 0;
    for (const pk::OptimizerTensor& t : tensors)
        chunks += pk::ceil_div(t.numel, kChunk);
    std::vector<double> sums(static_cast<size_t>(chunks));
    pk::OptimizerStep s = {tensors.data(), static_cast<int64_t>(tensors.size()),
                           pk::kAdamW,     nullptr,
                           nullptr,        nullptr,
                           sums.data(),    threads};
    check(kernels().square_sums(s), "optimizer_grad_norm");
    double total = 0.0, rest = 0.0;
    for (double x : sums) {
        double next = total + x;
        if (isfinite(next))
            rest += fabs(total) >= fabs(x) ? (total - next) + x : (x - next) + total;
        total = next;
    }
    return sqrt(total + rest);
}

void finish_call(const pk::StepCall& c) {
    int64_t sum = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
        sum += c.skipped[row];
        pk::finish_row(c, row);
    }
    if (sum == 0)
        return;
    memset(c.last, 0, static_cast<size_t>(c.slots) * sizeof(int64_t));
    for (int64_t row = 0; row < c.rows; ++row)
        c.last[c.parameters[row].slot] = c.skipped[row];
    c.totals[0] += 1;
    c.totals[1] += sum;
    *c.flag = c.totals[1];
}

// `name`: upload, norm, prepare, step, finish, or run for all of them.
void optimizer_call(const std::string& name, Address address, int threads) {
    const pk::StepCall& c = *reinterpret_cast<const pk::StepCall*>(address);
    py::gil_scoped_release release;
    bool all = name == "run";
    if (all || name == "upload") {
        if (c.new_grads != nullptr)
            memcpy(c.grads, c.new_grads, static_cast<size_t>(c.rows) * sizeof(int64_t));
        if (c.new_groups != nullptr)
            memcpy(c.groups, c.new_groups, static_cast<size_t>(c.group_words) * sizeof(int64_t));
    }
    if (name == "norm" || (all && c.clip == 2)) {
        Pass pass = make_pass(c, false);
        *c.norm = static_cast<float>(norm_of(pass.tensors, threads));
    }
    if (all || name == "prepare")
        for (int64_t row = 0; row < c.rows; ++row)
            pk::prepare_row(c, row);
    if (all || name == "step")
        step_call(c, threads);
    if (all || name == "finish")
        finish_call(c);
}

// Only grad, numel and grad_dtype of the table, int64 [count, 10], are read.
double gradient_norm(Address table, int64_t count, int threads) {
    const auto* first = reinterpret_cast<const pk::OptimizerTensor*>(table);
    std::vector<pk::OptimizerTensor> tensors(first, first + count);
    py::gil_scoped_release release;
    return norm_of(tensors, threads);
}

enum Found : int { kSame = 0, kMoved = 1, kChanged = 2 };

// The object that a weak reference leads to, null if it is gone; any other object itself.
PyObject* behind(PyObject* o) {
    if (!PyWeakref_Check(o))
        return o;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (PyWeakref_GetRef(o, &found) < 0)
        throw py::error_already_set();
    Py_XDECREF(found); // compared only; whoever holds it goes on doing so
    return found;
#else
    return PyWeakref_GetObject(o);
#endif
}

// What became of what a plan was made for. `parameters`: tensors; `states`: their dicts; `kept`:
// for each the tuple of objects that its dict must hold, tensors by weak reference; `facts`: int64
// [n, 4] with the addresses of the parameter and of its state (0: not in the dict), the bytes of
// its gradient, and the gradient's address, which is brought up to date. Each question costs what
// torch takes to answer (some 50 ns), so there is none whose answer follows from others: a gradient
// has the layout of its parameter, and states move together.
int scan_parameters(const py::list& parameters, const py::list& states, const py::list& kept,
                    Address facts) {
    static PyObject* grad_name = PyUnicode_InternFromString("grad");
    static PyObject* nbytes = PyUnicode_InternFromString("nbytes");
    static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    static PyObject* state1 = PyUnicode_InternFromString("state1");
    int64_t* fact = reinterpret_cast<int64_t*>(facts);
    bool moved = false;
    Py_ssize_t count = PyList_GET_SIZE(parameters.ptr());
    if (PyList_GET_SIZE(states.ptr()) != count || PyList_GET_SIZE(kept.ptr()) != count)
        throw std::invalid_argument("states, kept: expected one entry a parameter");
    for (Py_ssize_t i = 0; i < count; ++i, fact += 4) {
        PyObject* p = PyList_GET_ITEM(parameters.ptr(), i);
        py::object grad = got(PyObject_GetAttr(p, grad_name));
        PyObject* g = grad.ptr();
        if (g == Py_None || number(got(PyObject_CallMethodNoArgs(p, data_ptr))) != fact[0] ||
            number(got(PyObject_GetAttr(g, nbytes))) != fact[2] ||
            got(PyObject_CallMethodNoArgs(g, is_contiguous)).ptr() != Py_True)
            return kChanged;
        PyObject* state = PyList_GET_ITEM(states.ptr(), i);
        PyObject* values = PyList_GET_ITEM(kept.ptr(), i);
        if (!PyDict_Check(state) || !PyTuple_Check(values))
            throw std::invalid_argument("states: expected dicts; kept: expected tuples");
        Py_ssize_t at = 0, n = 0, expected = PyTuple_GET_SIZE(values);
        PyObject* value = nullptr;
        while (PyDict_Next(state, &at, nullptr, &value)) {
            if (n == expected || value != behind(PyTuple_GET_ITEM(values, n)))
                return kChanged;
            ++n;
        }
        if (n != expected)
            return kChanged;
        if (fact[1] != 0) {
            PyObject* first = PyDict_GetItemWithError(state, state1);
            if (first == nullptr)
                throw py::key_error("state1");
            if (number(got(PyObject_CallMethodNoArgs(first, data_ptr))) != fact[1])
                return kChanged;
        }
        int64_t address = number(got(PyObject_CallMethodNoArgs(g, data_ptr)));
        moved |= address != fact[3];
        fact[3] = address;
    }
    return moved ? kMoved : kSame;
}

} // namespace

void bind_optimizer(py::module_& m) {
    m.def("optimizer_call", &optimizer_call);
    m.def("gradient_norm", &gradient_norm);
    m.def("scan_parameters", &scan_parameters);
}

} // namespace pk_bind
