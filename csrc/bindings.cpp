// The only file that knows Python. Functions take integers and floats; pointers are integers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "renoise.h"

namespace py = pybind11;

namespace {

template <typename T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

void check(const char *op, int status) {
    if (status != 0) throw std::runtime_error(std::string(op) + ": launch must return 0, got " + std::to_string(status));
}

RenoiseParams renoise_params(uintptr_t x_t, uintptr_t eps, uintptr_t noise, uintptr_t coefficients, uintptr_t x0,
                             uintptr_t x_next, int64_t batch, int64_t size, int dtype) {
    return {pointer<void>(x_t), pointer<void>(eps), pointer<void>(noise), pointer<float>(coefficients),
            pointer<float>(x0), pointer<void>(x_next), batch, size, dtype};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("abi") = 1;
    m.def("renoise_cpu", [](uintptr_t x_t, uintptr_t eps, uintptr_t noise, uintptr_t coefficients, uintptr_t x0,
                            uintptr_t x_next, int64_t batch, int64_t size, int dtype, int threads) {
        const auto p = renoise_params(x_t, eps, noise, coefficients, x0, x_next, batch, size, dtype);
        py::gil_scoped_release release;
        const int status = renoise_cpu(p, threads);
        py::gil_scoped_acquire acquire;
        check("renoise", status);
    });
#ifdef NITROKERNELS_WITH_CUDA
    m.attr("has_cuda") = true;
    m.def("renoise_cuda", [](uintptr_t x_t, uintptr_t eps, uintptr_t noise, uintptr_t coefficients, uintptr_t x0,
                             uintptr_t x_next, int64_t batch, int64_t size, int dtype, uintptr_t stream) {
        const auto p = renoise_params(x_t, eps, noise, coefficients, x0, x_next, batch, size, dtype);
        check("renoise", renoise_cuda(p, pointer<void>(stream)));
    });
#else
    m.attr("has_cuda") = false;
#endif
}
