// AdamW of one flat group in one pass over memory: reads weights, moments and gradients once, writes
// weights, moments and the 16-bit copy of the weights once. Plain C++ threads: no OpenMP pool to
// survive a fork, no torch headers to compile against.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Hyper {
    float lr, beta1, beta2, eps, decay, correction1, correction2_root, scale;
};

inline float widen(float value) { return value; }

inline float widen(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float value, float* out) { *out = value; }

// To the nearest bfloat16, ties to even, as torch rounds. Weights are finite here.
inline void narrow(float value, uint16_t* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *out = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

template <typename Gradient, typename Copy>
void update(float* __restrict weights, float* __restrict mean, float* __restrict square,
            const Gradient* gradients, Copy* copy, size_t begin, size_t end, const Hyper& h) {
    const float keep = 1.0f - h.lr * h.decay;
    const float step = h.lr / h.correction1;
    const float root = 1.0f / h.correction2_root;
#pragma GCC ivdep
    for (size_t i = begin; i < end; ++i) {
        const float gradient = widen(gradients[i]) * h.scale;
        const float m = h.beta1 * mean[i] + (1.0f - h.beta1) * gradient;
        const float v = h.beta2 * square[i] + (1.0f - h.beta2) * gradient * gradient;
        const float weight = weights[i] * keep - step * m / (std::sqrt(v) * root + h.eps);
        mean[i] = m;
        square[i] = v;
        weights[i] = weight;
        if (copy) narrow(weight, copy + i);
    }
}

template <typename Gradient, typename Copy>
void run(float* weights, float* mean, float* square, const void* gradients, void* copy, size_t n,
         const Hyper& h, int threads) {
    const size_t grain = 4096;  // a page and more: threads share no cache line
    const size_t pieces = (n + grain - 1) / grain;
    threads = int(std::max<size_t>(1, std::min<size_t>(threads, pieces)));
    const size_t each = (pieces + threads - 1) / threads * grain;
    auto part = [&](int t) {
        const size_t begin = std::min(n, t * each), end = std::min(n, begin + each);
        update<Gradient, Copy>(weights, mean, square, static_cast<const Gradient*>(gradients),
                               static_cast<Copy*>(copy), begin, end, h);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(part, t);
    part(0);
    for (auto& other : others) other.join();
}

}  // namespace

// Kinds: 0 fp32, 1 bf16. `copy` may be null, and may be `gradients` if both have the same kind.
extern "C" void polyzoo_adamw(float* weights, float* mean, float* square, const void* gradients,
                              int gradient_kind, void* copy, int copy_kind, size_t n, float lr,
                              float beta1, float beta2, float eps, float decay, float correction1,
                              float correction2, float scale, int threads) {
    const Hyper h{lr, beta1, beta2, eps, decay, correction1, std::sqrt(correction2), scale};
    if (gradient_kind == 0 && copy_kind == 0)
        run<float, float>(weights, mean, square, gradients, copy, n, h, threads);
    else if (gradient_kind == 0)
        run<float, uint16_t>(weights, mean, square, gradients, copy, n, h, threads);
    else if (copy_kind == 0)
        run<uint16_t, float>(weights, mean, square, gradients, copy, n, h, threads);
    else
        run<uint16_t, uint16_t>(weights, mean, square, gradients, copy, n, h, threads);
}
