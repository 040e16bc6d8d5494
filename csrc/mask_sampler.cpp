// Multi-block masks, bit-identical to cjepa_fast/reference_masks.py, which documents the counter layout.
//
// Plain C interface without Python or torch, so that one build serves every version of both. A grid row is one
// 64-bit mask: the union of the targets is OR, the context is window & ~union, and ctz lists its patches.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kMaxSide = 64;
constexpr int kMaxTargets = 64;
constexpr int kTriesPerRegion = 20;
constexpr int kMaxAttempts = 64;

enum Stream : uint32_t { kTargets = 1, kContext = 2, kSubset = 3 };  // 0 is read in Python: block sizes
enum Status : int { kOk = 0, kBadSpec = 1, kNoContext = 2 };

}  // namespace

// Field order and widths are those of _Spec in cjepa_fast/native.py.
struct MaskSpec {
    uint64_t seed;
    uint32_t step;
    int32_t faithful, height, width, num_targets, target_h, target_w, context_h, context_w, min_keep, keep;
};

namespace {

struct Words {
    uint32_t w[4];
};

struct Corner {
    int top, left;
};

// Philox4x32-10 (Salmon et al., SC 2011).
inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

inline Words words_at(const MaskSpec& spec, int64_t id, Stream stream, uint32_t address) {
    return philox(static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), spec.step,
                  uint32_t{stream} << 28 | address, spec.seed);
}

inline int below(uint32_t word, int n) { return static_cast<int>(uint64_t{word} * static_cast<uint32_t>(n) >> 32); }

inline uint64_t bits(int n) { return n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

inline Corner corner(const MaskSpec& spec, uint32_t row, uint32_t col, int h, int w) {
    const int room = spec.faithful ? 0 : 1;
    return {below(row, spec.height - h + room), below(col, spec.width - w + room)};
}

class Sampler {
  public:
    explicit Sampler(const MaskSpec& spec) : spec_(spec) {
        for (int r = 0, k = 0; r < spec.target_h; ++r)
            for (int c = 0; c < spec.target_w; ++c) block_[k++] = static_cast<int16_t>(r * spec.width + c);
    }

    // Context row of `stride` slots, target rows [M, Kt], and the length of the context before any cut.
    Status sample(int64_t id, int16_t* context, int stride, int16_t* target, int32_t* count) {
        const int length = place(id);
        if (length < 0) return kNoContext;
        *count = length;
        const int block = spec_.target_h * spec_.target_w;
        for (int m = 0; m < spec_.num_targets; ++m) {
            const int16_t first = static_cast<int16_t>(targets_[m].top * spec_.width + targets_[m].left);
            for (int k = 0; k < block; ++k) target[m * block + k] = static_cast<int16_t>(first + block_[k]);
        }
        if (!spec_.faithful) {
            if (spec_.keep == 0) return kOk;
            pick_subset(id, length);
        }
        list_context(spec_.faithful);
        std::memcpy(context, listed_, sizeof(int16_t) * (spec_.faithful ? length : stride));
        return kOk;
    }

  private:
    // Draws blocks until the context is long enough; fills targets_, top_ and free_. Returns the length or -1.
    int place(int64_t id) {
        const int blocks = spec_.num_targets;
        const int limit = spec_.faithful ? kTriesPerRegion * blocks + 1 : kMaxAttempts;
        for (int attempt = 0; attempt < limit; ++attempt) {
            const uint32_t address = static_cast<uint32_t>(attempt) << 8;
            if (attempt == 0 || !spec_.faithful) {
                for (int m = 0; m < blocks; m += 2) {
                    const Words u = words_at(spec_, id, kTargets, address | m / 2);
                    targets_[m] = corner(spec_, u.w[0], u.w[1], spec_.target_h, spec_.target_w);
                    targets_[m + 1] = corner(spec_, u.w[2], u.w[3], spec_.target_h, spec_.target_w);
                }
            }
            const Words u = words_at(spec_, id, kContext, address);
            const Corner window = corner(spec_, u.w[0], u.w[1], spec_.context_h, spec_.context_w);
            const int respected = spec_.faithful ? blocks - attempt / kTriesPerRegion : blocks;
            const int length = subtract(window, respected);
            if (spec_.faithful ? length > spec_.min_keep : length >= spec_.keep) return length;
        }
        return -1;
    }

    int subtract(Corner window, int respected) {
        top_ = window.top;
        const uint64_t window_bits = bits(spec_.context_w) << window.left;
        uint64_t covered[kMaxSide] = {};
        for (int m = 0; m < respected; ++m) {
            const uint64_t block = bits(spec_.target_w) << targets_[m].left;
            for (int r = 0; r < spec_.target_h; ++r) covered[targets_[m].top + r] |= block;
        }
        int length = 0;
        for (int r = 0; r < spec_.context_h; ++r) {
            free_[r] = window_bits & ~covered[top_ + r];
            length += __builtin_popcountll(free_[r]);
        }
        return length;
    }

    // Floyd's algorithm: a uniformly random subset of `keep` of the `length` free patches, as flags in picked_.
    void pick_subset(int64_t id, int length) {
        std::memset(picked_, 0, length);
        for (int i = 0; i < spec_.keep; i += 4) {  // all words first: the calls overlap, the picks below cannot
            const Words u = words_at(spec_, id, kSubset, i / 4);
            std::memcpy(words_ + i, u.w, sizeof u.w);
        }
        for (int i = 0; i < spec_.keep; ++i) {
            const int last = length - spec_.keep + i;
            const int draw = below(words_[i], last + 1);
            // No branch: it would be mispredicted every other time.
            picked_[draw + picked_[draw] * (last - draw)] = 1;
        }
    }

    // Every free patch is written; the next one overwrites it unless it is chosen.
    void list_context(bool all) {
        int listed = 0, rank = 0;
        for (int r = 0; r < spec_.context_h; ++r) {
            const int first = (top_ + r) * spec_.width;
            for (uint64_t row = free_[r]; row; row &= row - 1, ++rank) {
                listed_[listed] = static_cast<int16_t>(first + __builtin_ctzll(row));
                listed += all ? 1 : picked_[rank];
            }
        }
    }

    const MaskSpec spec_;
    int top_ = 0;
    Corner targets_[kMaxTargets + 1];
    uint64_t free_[kMaxSide];
    uint8_t picked_[kMaxSide * kMaxSide];
    uint32_t words_[kMaxSide * kMaxSide + 3];
    int16_t block_[kMaxSide * kMaxSide];
    int16_t listed_[kMaxSide * kMaxSide + 1];
};

bool fits(int h, int w, const MaskSpec& spec) {
    const int room = spec.faithful ? 1 : 0;
    return h >= 1 && w >= 1 && h + room <= spec.height && w + room <= spec.width;
}

bool valid(const MaskSpec& s) {
    const int context_area = s.context_h * s.context_w;
    return s.height >= 1 && s.height <= kMaxSide && s.width >= 1 && s.width <= kMaxSide && s.num_targets >= 1 &&
           s.num_targets <= kMaxTargets && fits(s.target_h, s.target_w, s) && fits(s.context_h, s.context_w, s) &&
           (s.faithful ? context_area > s.min_keep : s.keep >= 0 && s.keep <= context_area);
}

}  // namespace

extern "C" {

// Hash of the sources this library was built from: a stale build is recognised by it.
const char* cjepa_source_hash() { return CJEPA_SOURCE_HASH; }

void cjepa_philox4x32(const uint32_t* counter, uint64_t key, uint32_t* out) {
    const Words u = philox(counter[0], counter[1], counter[2], counter[3], key);
    std::copy(u.w, u.w + 4, out);
}

// ids [n]; context [n, stride], stride = keep (fixed) or context_h * context_w (faithful, where only the first
// counts[i] slots of row i are written); target [n, M, target_h * target_w]; counts [n].
// Returns 0, 1 for an impossible spec, or 2 if some image found no context.
int cjepa_sample_masks(const MaskSpec* spec, const int64_t* ids, int64_t n, int threads, int16_t* context,
                       int16_t* target, int32_t* counts) {
    if (!valid(*spec) || n < 0) return kBadSpec;
    const int stride = spec->faithful ? spec->context_h * spec->context_w : spec->keep;
    const int64_t width = int64_t{spec->num_targets} * spec->target_h * spec->target_w;
    const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1));
    std::vector<int> status(parts, kOk);
    const auto work = [&](int64_t part) {
        Sampler sampler(*spec);
        for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
            const Status s = sampler.sample(ids[i], context + i * stride, stride, target + i * width, counts + i);
            if (s != kOk) status[part] = s;
        }
    };
    std::vector<std::thread> pool;
    for (int64_t part = 1; part < parts; ++part) {
        try {
            pool.emplace_back(work, part);
        } catch (const std::system_error&) {  // no thread to be had: the caller does its share
            work(part);
        }
    }
    work(0);
    for (auto& thread : pool) thread.join();
    return *std::max_element(status.begin(), status.end());
}

}  // extern "C"
