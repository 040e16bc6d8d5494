// Resizes RGB images to squares on the CPU: bilinear with antialias, with the arithmetic of Pillow.
//
// Columns first, then rows, each rounded to eight bits. A pixel of the result is a weighted mean of the source pixels
// under a triangle around its centre. The triangle reaches to the next pixel of the source, or of the result if the
// image shrinks.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "clones.h"

namespace {

constexpr int kBits = 22;  // of a weight's fraction; with 8 for the pixel and 2 spare bits 32
constexpr int32_t kHalf = 1 << (kBits - 1);

using Four = int32_t __attribute__((vector_size(16)));

// The weights of one axis: pixel i of the result is made from `count[i]` pixels, beginning with `first[i]`.
struct Axis {
    int taps;
    std::vector<int> first, count;
    std::vector<double> exact;
    std::vector<int32_t> weights;  // [size, taps]

    // Not cloned: fused multiply-adds would make a weight's last bit, and so a pixel, depend on the machine.
    __attribute__((noinline)) void set(int from, int size) {
        const double scale = double(from) / size, reach = std::max(scale, 1.0), slope = 1 / reach;
        taps = 2 * int(std::ceil(reach)) + 1;
        first.resize(size), count.resize(size), exact.resize(taps), weights.resize(size_t(size) * taps);
        for (int i = 0; i < size; ++i) {
            const double centre = (i + 0.5) * scale;
            first[i] = std::max(0, int(centre - reach + 0.5));
            count[i] = std::min(from, int(centre + reach + 0.5)) - first[i];
            double sum = 0;
            for (int k = 0; k < count[i]; ++k) {
                exact[k] = std::max(0.0, 1 - std::abs((k + first[i] - centre + 0.5) * slope));
                sum += exact[k];
            }
            for (int k = 0; k < count[i]; ++k) {
                weights[size_t(i) * taps + k] = int32_t(0.5 + exact[k] / sum * (1 << kBits));
            }
        }
    }
};

struct Batch {
    const uint8_t* const* images;
    const int32_t* sizes;
    int64_t n;
    int32_t size;
    uint8_t* out;
};

// Buffers that all images of a thread reuse.
struct Work {
    Axis across, down;
    std::vector<int32_t> row, line;  // of the source and of the result, three channels a pixel
};

void resize(Work& work, const uint8_t* image, int height, int width, int size, uint8_t* out) {
    const int stride = 3 * width;
    work.across.set(width, size), work.down.set(height, size);
    work.row.resize(stride + 1), work.line.resize(3 * size + 1);  // + 1: three channels are read and written as four
    int32_t *row = work.row.data(), *line = work.line.data();
    for (int y = 0; y < size; ++y, out += 3 * size) {
        std::fill(row, row + stride, kHalf);
        for (int k = 0; k < work.down.count[y]; ++k) {
            const int32_t weight = work.down.weights[size_t(y) * work.down.taps + k];
            const uint8_t* from = image + size_t(work.down.first[y] + k) * stride;
            for (int x = 0; x < stride; ++x) row[x] += weight * from[x];
        }
        for (int x = 0; x < stride; ++x) row[x] >>= kBits;  // the weights add up to 1, so no clipping
        for (int x = 0; x < size; ++x) {
            const int32_t* weight = &work.across.weights[size_t(x) * work.across.taps];
            const int32_t* pixel = row + 3 * work.across.first[x];
            Four sum = {kHalf, kHalf, kHalf, kHalf};
            for (int k = 0; k < work.across.count[x]; ++k, pixel += 3) {
                Four four;
                std::memcpy(&four, pixel, sizeof four);
                sum += weight[k] * four;
            }
            std::memcpy(line + 3 * x, &sum, sizeof sum);
        }
        for (int x = 0; x < 3 * size; ++x) out[x] = uint8_t(line[x] >> kBits);
    }
}

CJEPA_CLONES void resize_all(const Batch& batch, std::atomic<int64_t>& next) {
    Work work;
    for (int64_t i; (i = next++) < batch.n;) {
        const int32_t *shape = batch.sizes + 2 * i, size = batch.size;
        resize(work, batch.images[i], shape[0], shape[1], size, batch.out + i * 3 * size * size);
    }
}

}  // namespace

extern "C" {

// Resizes images [n], uint8 [height, width, 3] of `sizes` [n, 2], to out [n, size, size, 3]. The number of threads
// changes no bit.
void cjepa_resize(const uint8_t* const* images, const int32_t* sizes, int64_t n, int32_t size, int threads,
                  uint8_t* out) {
    const Batch batch = {images, sizes, n, size, out};
    std::atomic<int64_t> next{0};
    std::vector<std::thread> others;
    try {
        while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back([&] { resize_all(batch, next); });
    } catch (const std::system_error&) {  // no more threads available: fewer do the work
    }
    resize_all(batch, next);
    for (auto& thread : others) thread.join();
}

}  // extern "C"
