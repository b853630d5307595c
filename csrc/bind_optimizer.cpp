// What a step of an optimizer asks of Python objects, parameter by parameter, without the
// interpreter in between.

#include "bind.h"

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

enum Found : int { kSame = 0, kMoved = 1, kChanged = 2 };

// What became of what a plan was made for. `parameters`: tensors; `states`: their dicts; `kept`:
// for each a tuple of key, object, key, object ... that its dict must hold; `facts`: int64 [n, 3]
// with the address of the parameter, the bytes of its gradient, and the gradient's address, which
// is brought up to date. Each question costs what torch takes to answer (some 50 ns), so there is
// none whose answer follows from others: a gradient has the layout of its parameter.
int scan_parameters(const py::list& parameters, const py::list& states, const py::list& kept,
                    Address facts) {
    static PyObject* grad_name = PyUnicode_InternFromString("grad");
    static PyObject* nbytes = PyUnicode_InternFromString("nbytes");
    static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    int64_t* fact = reinterpret_cast<int64_t*>(facts);
    bool moved = false;
    Py_ssize_t count = PyList_GET_SIZE(parameters.ptr());
    if (PyList_GET_SIZE(states.ptr()) != count || PyList_GET_SIZE(kept.ptr()) != count)
        throw std::invalid_argument("states, kept: expected one entry a parameter");
    for (Py_ssize_t i = 0; i < count; ++i, fact += 3) {
        PyObject* p = PyList_GET_ITEM(parameters.ptr(), i);
        py::object grad = got(PyObject_GetAttr(p, grad_name));
        PyObject* g = grad.ptr();
        if (g == Py_None || number(got(PyObject_CallMethodNoArgs(p, data_ptr))) != fact[0] ||
            number(got(PyObject_GetAttr(g, nbytes))) != fact[1] ||
            got(PyObject_CallMethodNoArgs(g, is_contiguous)).ptr() != Py_True)
            return kChanged;
        PyObject* state = PyList_GET_ITEM(states.ptr(), i);
        PyObject* values = PyList_GET_ITEM(kept.ptr(), i);
        if (!PyDict_Check(state) || !PyTuple_Check(values))
            throw std::invalid_argument("states: expected dicts; kept: expected tuples");
        Py_ssize_t at = 0, n = 0, expected = PyTuple_GET_SIZE(values);
        PyObject* value = nullptr;
        while (PyDict_Next(state, &at, nullptr, &value)) {
            if (n == expected || value != PyTuple_GET_ITEM(values, n))
                return kChanged;
            ++n;
        }
        if (n != expected)
            return kChanged;
        int64_t address = number(got(PyObject_CallMethodNoArgs(g, data_ptr)));
        moved |= address != fact[2];
        fact[2] = address;
    }
    return moved ? kMoved : kSame;
}

} // namespace

void bind_optimizer(py::module_& m) { m.def("scan_parameters", &scan_parameters); }

} // namespace pk_bind
