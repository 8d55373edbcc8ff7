// Stands in for CUDA when engine/latentrt/cuda/advance.cu is compiled as C++: blocks run one after another, the threads of a
// block as fibers that take turns at __syncthreads. So barriers, shared memory and the order of blocks are real.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // one block runs at a time

struct dim3 {
    unsigned x, y;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isfinite;

static inline void __threadfence() {}

static inline unsigned atomicInc(unsigned* address, unsigned most) {
    const unsigned old = *address;
    *address = old >= most ? 0 : old + 1;
    return old;
}

static inline int atomicCAS(int* address, int expected, int value) {
    const int old = *address;
    if (old == expected) *address = value;
    return old;
}

// As engine/latentrt/sampling/noise.py has them: rounded from float64, the same on every CPU.
static inline float rounded_log(float x) { return (float)std::log((double)x); }
static inline void rounded_sincos(float x, float* sine, float* cosine) {
    *sine = (float)std::sin((double)x);
    *cosine = (float)std::cos((double)x);
}
#define logf rounded_log
#define __sincosf rounded_sincos

// IEEE half precision in software: older compilers have none in C++.
struct half {
    std::uint16_t bits;
};

static inline float get(half h) {
    const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp((float)fraction, -24)
                                            : std::ldexp((float)(fraction + 1024), exponent - 25);
    return h.bits & 0x8000 ? -magnitude : magnitude;
}

static inline void put(half& target, float value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) {
        target.bits = 0x7fff;
    } else if (magnitude >= 65520.0f) {
        target.bits = sign | 0x7c00;
    } else {
        int exponent = -14;  // of the spacing's binade; numbers below 2**-14 are spaced like those above
        if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
        const int steps = (int)std::nearbyint(std::ldexp(magnitude, 10 - exponent));
        target.bits = sign | (((exponent + 14) << 10) + steps);  // 1024 steps or 2048 carry into the exponent
    }
}

namespace host {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static Fiber* current;
static const std::function<void()>* kernel_body;

static void run_current() {
    (*kernel_body)();
    current->done = true;
}

static void start(Fiber& fiber) {
    fiber.stack.resize(64 * 1024);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_current, 0);
}

// Each thread up to its next barrier, until all are done. False where some wait at a barrier that others never reach.
static bool run_block() {
    for (Fiber& fiber : fibers) start(fiber);
    for (;;) {
        std::size_t done = 0;
        for (std::size_t i = 0; i < fibers.size(); ++i) {
            current = &fibers[i];
            threadIdx.x = (unsigned)i;
            swapcontext(&scheduler, &current->context);
            done += current->done;
        }
        if (done) return done == fibers.size();
    }
}

// A launch whose arguments have been copied, as a GPU copies them into its queue.
struct Launch {
    dim3 grid;
    unsigned threads;
    std::function<void()> body;

    bool run() const {
        gridDim = grid;
        blockDim = {threads, 1};
        fibers.resize(threads);
        kernel_body = &body;
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
                if (!run_block()) return false;
        return true;
    }
};

// parameters: the addresses of the arguments, as cuLaunchKernel takes them.
template <typename... Arguments>
Launch* bind(void (*kernel)(Arguments...), void** parameters, unsigned x, unsigned y, unsigned threads) {
    const auto copy = [&]<std::size_t... I>(std::index_sequence<I...>) {
        return std::tuple<Arguments...>(*static_cast<Arguments*>(parameters[I])...);
    }(std::index_sequence_for<Arguments...>{});
    return new Launch{{x, y}, threads, [kernel, copy] { std::apply(kernel, copy); }};
}

}  // namespace host

static inline void __syncthreads() { swapcontext(&host::current->context, &host::scheduler); }

extern "C" bool run_launch(const host::Launch* launch) { return launch->run(); }
extern "C" void free_launch(host::Launch* launch) { delete launch; }
