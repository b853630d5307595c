// What the program puts in the place of libraries: an OpenMP runtime of std::thread, which a thread
// sanitizer understands where it does not understand libgomp, and mappings that can be made to
// fail.
#pragma once

#include <stdint.h>

namespace driver {

int64_t regions();                 // of several threads, entered so far
int64_t mappings();                // made so far by this program's own code
int64_t bytes_mapped();            // and not yet given back
void fail_mapping(int64_t number); // the one that gets this number fails; 0: none

} // namespace driver
