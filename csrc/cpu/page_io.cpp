#include "page_io.h"

#include <errno.h>
#include <unistd.h>

#include "crc32c.h"

namespace pk {
namespace {

constexpr size_t kPiece = size_t(128) << 10; // summed while it is in the cache

} // namespace

int write_page(int fd, const void* data, size_t size, int64_t offset, uint32_t* crc, size_t* done) {
    const char* p = static_cast<const char*>(data);
    *crc = 0;
    *done = 0;
    while (*done < size) {
        size_t piece = size - *done < kPiece ? size - *done : kPiece;
        *crc = crc32c(*crc, p + *done, piece);
        for (size_t end = *done + piece; *done < end;) {
            ssize_t n = pwrite(fd, p + *done, end - *done, offset + (int64_t)*done);
            if (n < 0 && errno == EINTR)
                continue;
            if (n <= 0)
                return n < 0 ? errno : -1;
            *done += (size_t)n;
        }
    }
    return 0;
}

int read_page(int fd, void* into, size_t size, int64_t offset, uint32_t* crc, size_t* done) {
    char* p = static_cast<char*>(into);
    *crc = 0;
    *done = 0;
    while (*done < size) {
        size_t piece = size - *done < kPiece ? size - *done : kPiece;
        ssize_t n = pread(fd, p + *done, piece, offset + (int64_t)*done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : -1;
        *crc = crc32c(*crc, p + *done, (size_t)n);
        *done += (size_t)n;
    }
    return 0;
}

} // namespace pk
