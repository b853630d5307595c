// Pages of optimizer state on disk, and their checksum.

#include <string.h>

#include "bind.h"
#include "cpu/crc32c.h"
#include "cpu/page_io.h"

namespace pk_bind {

namespace {

py::buffer_info bytes_of(const py::buffer& data, bool writable) {
    py::buffer_info info = data.request(writable);
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1)
        throw std::invalid_argument("data: expected contiguous bytes");
    return info;
}

// `chosen`: the instruction where the CPU has it; else tables, which tests compare it with.
uint32_t crc32c(const py::buffer& data, uint32_t crc, bool chosen) {
    py::buffer_info info = bytes_of(data, false);
    size_t size = static_cast<size_t>(info.size);
    py::gil_scoped_release release;
    return chosen ? pk::crc32c(crc, info.ptr, size) : pk::crc32c_tables(crc, info.ptr, size);
}

[[noreturn]] void raise(int status, const char* what, size_t done, size_t size, int64_t offset) {
    std::string where = std::to_string(done) + " of " + std::to_string(size) + " bytes at offset " +
                        std::to_string(offset);
    py::object error =
        status < 0 ? py::module_::import("builtins")
                         .attr("OSError")("short " + std::string(what) + ": " + where)
                   : py::module_::import("builtins").attr("OSError")(status, strerror(status));
    PyErr_SetObject(PyExc_OSError, error.ptr());
    throw py::error_already_set();
}

uint32_t write_page(int fd, const py::buffer& data, int64_t offset) {
    py::buffer_info info = bytes_of(data, false);
    size_t size = static_cast<size_t>(info.size), done = 0;
    uint32_t crc = 0;
    int status = 0;
    {
        py::gil_scoped_release release;
        status = pk::write_page(fd, info.ptr, size, offset, &crc, &done);
    }
    if (status != 0)
        raise(status, "write", done, size, offset);
    return crc;
}

uint32_t read_page(int fd, const py::buffer& into, int64_t offset) {
    py::buffer_info info = bytes_of(into, true);
    size_t size = static_cast<size_t>(info.size), done = 0;
    uint32_t crc = 0;
    int status = 0;
    {
        py::gil_scoped_release release;
        status = pk::read_page(fd, info.ptr, size, offset, &crc, &done);
    }
    if (status != 0)
        raise(status, "read", done, size, offset);
    return crc;
}

} // namespace

void bind_pages(py::module_& m) {
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0, py::arg("chosen") = true);
    m.def("write_page", &write_page);
    m.def("read_page", &read_page);
}

} // namespace pk_bind
