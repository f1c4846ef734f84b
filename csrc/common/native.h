// What every native op shares: storage types, the registry Python calls through, CPU threads.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>

// As the Python side numbers them (nitrokernels/_native.py: DTYPES).
enum NitroDtype { NITRO_F32 = 0, NITRO_F16 = 1, NITRO_BF16 = 2 };

namespace nitro {

// A launcher takes its params struct and either a thread count (CPU) or a cudaStream_t (CUDA); 0 is success. It never
// allocates what it returns. Params structs hold 8-byte fields only (pointers, int64_t, double), so that Python can pack
// them and the registry can check their size.
struct Entry {
    const char *name;
    size_t params_bytes;
    int (*run)(const void *params, void *context);
};

void add_entry(const Entry &entry);
const Entry *find_entry(const char *name);

// Runs task(0) .. task(count - 1), each once, on at most `threads` threads, the caller among them. One region at a time:
// a nested or concurrent call runs on its caller alone, so it can neither deadlock nor oversubscribe. The threads are
// PyTorch's where it uses OpenMP, a pool's otherwise.
void parallel(int64_t count, int threads, const std::function<void(int64_t)> &task);

// The best instruction set of this machine, or a lesser one that NITROKERNELS_ISA names (base, avx2), for tests.
enum InstructionSet { kBase = 0, kAvx2 = 1, kAvx512 = 2 };
InstructionSet instruction_set();

// Asks for huge pages under memory that is about to be written whole: a fresh gradient of 20 MB is 5,000 page faults.
void prefer_huge_pages(void *data, size_t bytes);

}  // namespace nitro

// At file scope of an op's source: NITRO_CPU_OP(renoise_cpu, RenoiseParams) makes `int renoise_cpu(const RenoiseParams &,
// int threads)` callable from Python; NITRO_CUDA_OP likewise with `void *stream`.
#define NITRO_CPU_OP(function, Params)                                                                        \
    static_assert(sizeof(Params) % 8 == 0, "params hold 8-byte fields only");                                 \
    static const bool function##_added = (nitro::add_entry({#function, sizeof(Params),                        \
        [](const void *p, void *threads) {                                                                    \
            return function(*static_cast<const Params *>(p), static_cast<int>(reinterpret_cast<intptr_t>(threads))); \
        }}), true)
#define NITRO_CUDA_OP(function, Params)                                                                       \
    static_assert(sizeof(Params) % 8 == 0, "params hold 8-byte fields only");                                 \
    static const bool function##_added = (nitro::add_entry({#function, sizeof(Params),                        \
        [](const void *p, void *stream) { return function(*static_cast<const Params *>(p), stream); }}), true)
