// The only file that knows Python. It finds a launcher by name and hands it the params Python packed; it knows no op.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/native.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.attr("abi") = 5;
#ifdef NITROKERNELS_WITH_CUDA
    m.attr("has_cuda") = true;
#else
    m.attr("has_cuda") = false;
#endif
    // context: thread count for a CPU launcher, stream for a CUDA one.
    m.def("launch", [](const std::string &name, py::bytes params, intptr_t context) {
        const nitro::Entry *entry = nitro::find_entry(name.c_str());
        if (!entry) throw std::runtime_error(name + ": launcher must be in the native library, got none of this name");
        const std::string packed = params;
        if (packed.size() != entry->params_bytes)
            throw std::runtime_error(name + ": params must be " + std::to_string(entry->params_bytes) + " bytes, got " +
                                     std::to_string(packed.size()));
        int status;
        {
            py::gil_scoped_release release;
            status = entry->run(packed.data(), reinterpret_cast<void *>(context));
        }
        if (status != 0) throw std::runtime_error(name + ": launch must return 0, got " + std::to_string(status));
    });
    m.def("has", [](const std::string &name) { return nitro::find_entry(name.c_str()) != nullptr; });
}
