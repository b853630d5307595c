// CRC-32C (Castagnoli, RFC 3720), the checksum of optimizer state on disk.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pk {

// The checksum of `size` bytes that follow those which gave `crc` (0 at the start).
uint32_t crc32c(uint32_t crc, const void* data, size_t size);

// The same by tables alone: every machine, and the truth that tests compare with.
uint32_t crc32c_tables(uint32_t crc, const void* data, size_t size);

} // namespace pk
