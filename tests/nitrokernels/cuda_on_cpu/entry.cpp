// What Python calls through ctypes: a launcher by name.
#include <string.h>

#include "common/native.h"

extern "C" __attribute__((visibility("default"))) int run_launcher(const char *name, const void *params, size_t bytes) {
    const nitro::Entry *entry = nitro::find_entry(name);
    if (!entry || entry->params_bytes != bytes) return -1;
    return entry->run(params, nullptr);
}
