// Checksums of optimizer state on disk.

#include "bind.h"
#include "cpu/crc32c.h"

namespace pk_bind {

namespace {

// `chosen`: the instruction where the CPU has it, else and otherwise tables.
uint32_t crc32c(const py::buffer& data, uint32_t crc, bool chosen) {
    py::buffer_info info = data.request();
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1)
        throw std::invalid_argument("data: expected contiguous bytes");
    size_t size = static_cast<size_t>(info.size);
    py::gil_scoped_release release;
    return chosen ? pk::crc32c(crc, info.ptr, size) : pk::crc32c_tables(crc, info.ptr, size);
}

} // namespace

void bind_checksum(py::module_& m) {
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0, py::arg("chosen") = true);
}

} // namespace pk_bind
