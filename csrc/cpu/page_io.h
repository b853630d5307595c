// Pages of optimizer state to and from a file, summed on the way.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pk {

// Both move all `size` bytes and give their CRC-32C. They return 0, or the errno of what failed;
// -1 says that the file took or gave no more bytes. `done` is what was moved until then.
int write_page(int fd, const void* data, size_t size, int64_t offset, uint32_t* crc, size_t* done);
int read_page(int fd, void* into, size_t size, int64_t offset, uint32_t* crc, size_t* done);

} // namespace pk
