// Masks on the CPU, bit-identical to cjepa_fast/reference/masks.py; mask_spec.h specifies the masks.
//
// A plain C interface without Python or torch, so that one build serves every version of both. A set of patches is a
// string of N bits. A block at another corner is the same string shifted, the union of the targets is OR, and the
// context is window & ~union. A table of all bytes lists the patches of a set, eight at a time.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "clones.h"
#include "mask_spec.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "flags are read eight at a time, the first as lowest byte");

namespace {

using namespace cjepa;

constexpr int kLanes = 16;  // counters per call of the vectorised Philox
constexpr int kSlack = 16;  // lists are written eight slots at a time
constexpr uint64_t kOnes = 0x0101010101010101;

using Eight = int16_t __attribute__((vector_size(16)));

struct Table {
    int16_t positions[256][8];
    uint8_t count[256];
};

constexpr Table make_table() {
    Table table{};
    for (int byte = 0; byte < 256; ++byte)
        for (int bit = 0; bit < 8; ++bit)
            if (byte >> bit & 1) table.positions[byte][table.count[byte]++] = static_cast<int16_t>(bit);
    return table;
}

constexpr Table kTable = make_table();

struct Set {
    uint64_t words[kMaxPatches / 64 + 1];  // one more: Block::add writes a carry, always 0, behind the last
};

struct Block {
    Set set{};
    int words = 0;

    Block(int h, int w, int width) {
        for (int r = 0; r < h; ++r)
            for (int c = 0, patch = r * width; c < w; ++c, ++patch) set.words[patch / 64] |= uint64_t{1} << patch % 64;
        words = ((h - 1) * width + w + 63) / 64;
    }

    // Adds the block, with its first patch at `first`, to `to`.
    void add(int first, Set& to) const {
        uint64_t* const word = to.words + first / 64;
        const int bit = first % 64;
        uint64_t carry = 0;
        for (int i = 0; i < words; ++i) {
            word[i] |= set.words[i] << bit | carry;
            carry = set.words[i] >> 1 >> (63 - bit);
        }
        word[words] |= carry;
    }
};

struct Lanes {
    uint32_t words[4][kLanes];
};

// Philox at kLanes counters. The loop over lanes is the outer one: compilers vectorise it.
template <typename Counter>
inline Lanes philox_lanes(uint64_t key, Counter counter) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) {
        const Words c = counter(i), u = philox(c.w[0], c.w[1], c.w[2], c.w[3], key);
        for (int k = 0; k < 4; ++k) out.words[k][i] = u.w[k];
    }
    return out;
}

// to[0..n) = from[0..n) + base, rounded up to whole eights.
inline void add_eights(const int16_t* from, int base, int n, int16_t* to) {
    for (int k = 0; k < n; k += 8) {
        Eight eight;
        std::memcpy(&eight, from + k, sizeof eight);
        eight += static_cast<int16_t>(base);
        std::memcpy(to + k, &eight, sizeof eight);
    }
}

// Lists the patches of `byte`, whose lowest bit is patch `base`. Returns the place of the next patch.
inline int16_t* list_byte(unsigned byte, int base, int16_t* to) {
    add_eights(kTable.positions[byte], base, 8, to);
    return to + kTable.count[byte];
}

inline void list(const Set& set, int patches, int16_t* to) {
    for (int base = 0; base < patches; base += 8) to = list_byte(set.words[base / 64] >> base % 64 & 255, base, to);
}

// Lists a set that has a byte 0 or 1 for every patch, after XOR with `flip`. Flags beyond `n` are 0.
inline void list_flags(const uint8_t* flags, int n, uint64_t flip, int16_t* to) {
    for (int base = 0; base < n; base += 8) {
        uint64_t eight;
        std::memcpy(&eight, flags + base, sizeof eight);
        const uint64_t side_by_side = (eight ^ flip) * 0x0102040810204080 >> 56;
        to = list_byte(static_cast<unsigned>(side_by_side), base, to);
    }
}

// The images [begin, end), sampled by one thread, kLanes at a time. Each part has its own lists of packed contexts and
// unions: their places in the output are known only when all threads are done.
class Part {
  public:
    Part(const MaskSpec& spec, const MaskOutputs& out, int64_t begin, int64_t end)
        : begin_(begin),
          end_(end),
          spec_(spec),
          out_(out),
          patches_(spec.height * spec.width),
          words_((patches_ + 63) / 64),
          stride_(64 * words_ + 64),  // no multiple of 4096: loads would wait for stores to other lanes
          target_size_(spec.target_h * spec.target_w),
          window_(spec.context_h, spec.context_w, spec.width),
          block_(spec.target_h, spec.target_w, spec.width),
          iota_(new int16_t[stride_]),
          block_list_(new int16_t[stride_]),
          ranks_(new int16_t[stride_]),
          listed_(new int16_t[kLanes * stride_]),
          picked_(new uint8_t[kLanes * stride_]),
          target_(new int16_t[spec.num_targets * target_size_ + kSlack]),
          slot_(new int16_t[spec.num_targets * target_size_ + kSlack]) {
        std::iota(iota_.get(), iota_.get() + stride_, int16_t{0});
        list(block_.set, patches_, block_list_.get());
        const int64_t images = end - begin, window = spec.context_h * spec.context_w;
        const int64_t covered = std::min(patches_, spec.num_targets * target_size_);
        if (spec.mode == kPacked && out.context) contexts_.reset(last_context_ = new int16_t[images * window]);
        if (out.union_patches) unions_.reset(last_union_ = new int16_t[images * covered + kSlack]);
    }

    Status status() const { return status_; }

    void append_contexts(int16_t*& to, const int16_t* stop) const { append(contexts_.get(), last_context_, to, stop); }

    void append_unions(int16_t*& to, const int16_t* stop) const { append(unions_.get(), last_union_, to, stop); }

    void sample(const int64_t* ids) {
        for (int64_t image = begin_; image < end_ && status_ == kOk; image += kLanes)
            status_ = sample_group(image, ids + image, static_cast<int>(std::min<int64_t>(end_ - image, kLanes)));
    }

  private:
    static void append(const int16_t* first, const int16_t* last, int16_t*& to, const int16_t* stop) {
        to = std::copy_n(first, std::min(last - first, stop - to), to);
    }

    Status sample_group(int64_t image, const int64_t* ids, int size) {
        for (int i = 0; i < kLanes; ++i) {  // lanes without an image repeat the last one
            const int64_t id = ids[std::min(i, size - 1)];
            id_low_[i] = static_cast<uint32_t>(id);
            id_high_[i] = static_cast<uint32_t>(id >> 32);
        }
        draw_corners();
        for (int i = 0; i < kLanes; ++i) {
            length_[i] = i < size ? place(i, ids[i]) : length_[size - 1];
            if (length_[i] < 0) return kNoContext;
        }
        const bool listed = out_.context || out_.inverse;
        const bool subset = spec_.mode == kRandom || (spec_.mode == kFixed && listed);
        if (subset) pick_subsets();
        for (int i = 0; i < size; ++i) {
            out_.counts[image + i] = spec_.mode == kRandom ? spec_.keep : length_[i];
            if (subset) keep_picked(i);
            if (listed) write_context(image + i, i);
            if (out_.target || out_.union_patches) write_targets(image + i, i);
            if (out_.union_patches) write_union(image + i, i);
        }
        return kOk;
    }

    Lanes words(Stream stream, uint32_t address) const {
        const uint32_t last = uint32_t{stream} << 28 | address;
        return philox_lanes(spec_.seed, [&](int i) { return Words{{id_low_[i], id_high_[i], spec_.step, last}}; });
    }

    int first_patch(uint32_t row, uint32_t col, int h, int w) const {
        const Corner at = corner(spec_, row, col, h, w);
        return at.top * spec_.width + at.left;
    }

    // Draws the first patch of every block for the first attempt.
    void draw_corners() {
        const int h = spec_.target_h, w = spec_.target_w;
        if (spec_.mode == kRandom) return;
        const Lanes u = words(kContext, 0);
        if (spec_.mode == kRasterized) {
            for (int i = 0; i < kLanes; ++i) {
                const int chosen = below(u.words[0][i], 4);
                for (int q = 0, m = 0; q < 4; ++q) {
                    const int patch = q / 2 * h * spec_.width + q % 2 * w;
                    (q == chosen ? window_at_[i] : block_at_[m++][i]) = patch;
                }
            }
            return;
        }
        for (int i = 0; i < kLanes; ++i)
            window_at_[i] = first_patch(u.words[0][i], u.words[1][i], spec_.context_h, spec_.context_w);
        for (int m = 0; m < spec_.num_targets; m += 2) {
            const Lanes v = words(kTargets, static_cast<uint32_t>(m / 2));
            for (int i = 0; i < kLanes; ++i) block_at_[m][i] = first_patch(v.words[0][i], v.words[1][i], h, w);
            for (int i = 0; i < kLanes; ++i) block_at_[m + 1][i] = first_patch(v.words[2][i], v.words[3][i], h, w);
        }
    }

    // Redraws the blocks of a lane until its context is long enough, and lists the context; pick_subsets may keep a
    // part of the list. Returns the length, or -1 if no attempt succeeds.
    int place(int lane, int64_t id) {
        const int blocks = spec_.num_targets;
        const bool faithful = spec_.mode == kFaithful;
        const int least = faithful ? spec_.min_keep + 1 : spec_.mode == kPacked ? spec_.min_keep : spec_.keep;
        const int limit = faithful ? kTriesPerRegion * blocks + 1 : kMaxAttempts;
        int length = subtract(lane, spec_.mode == kRandom ? 0 : blocks);
        for (int attempt = 1; length < least; ++attempt) {
            if (attempt == limit) return -1;
            const uint32_t address = static_cast<uint32_t>(attempt) << 8;
            for (int m = 0; m < blocks && !faithful; m += 2) {
                const Words u = words_at(spec_, id, kTargets, address | static_cast<uint32_t>(m / 2));
                block_at_[m][lane] = first_patch(u.w[0], u.w[1], spec_.target_h, spec_.target_w);
                block_at_[m + 1][lane] = first_patch(u.w[2], u.w[3], spec_.target_h, spec_.target_w);
            }
            const Words u = words_at(spec_, id, kContext, address);
            window_at_[lane] = first_patch(u.w[0], u.w[1], spec_.context_h, spec_.context_w);
            length = subtract(lane, faithful ? blocks - attempt / kTriesPerRegion : blocks);
        }
        list(free_, patches_, listed_.get() + lane * stride_);
        return length;
    }

    // covered_ = the first `respected` targets; free_ = the rest of the window. Returns the number of patches in free_.
    int subtract(int lane, int respected) {
        cover(lane, respected);
        std::fill_n(free_.words, words_, 0);
        window_.add(window_at_[lane], free_);
        for (int i = 0; i < words_; ++i) free_.words[i] &= ~covered_.words[i];
        int length = 0;
        for (int i = 0; i < words_; ++i) length += __builtin_popcountll(free_.words[i]);
        return length;
    }

    void cover(int lane, int respected) {
        std::fill_n(covered_.words, words_, 0);
        for (int m = 0; m < respected; ++m) block_.add(block_at_[m][lane], covered_);
    }

    // Flags a uniformly random `keep` of the places in each lane's list, by Floyd's algorithm.
    void pick_subsets() {
        const int keep = spec_.keep;
        std::memset(picked_.get(), 0, kLanes * stride_);
        for (int j = 0; 4 * j < keep; ++j) {
            const Lanes u = words(kSubset, static_cast<uint32_t>(j));
            for (int k = 0; k < 4 && 4 * j + k < keep; ++k) {
                int last[kLanes], draw[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    last[i] = length_[i] - keep + 4 * j + k;
                    draw[i] = below(u.words[k][i], last[i] + 1);
                }
                // A taken draw picks the last candidate instead. No branch, which the CPU would mispredict; and no
                // address depends on a load, so later loads need not wait.
                uint8_t* picked = picked_.get();
                for (int i = 0; i < kLanes; ++i, picked += stride_) {
                    picked[last[i]] = picked[draw[i]];
                    picked[draw[i]] = 1;
                }
            }
        }
    }

    void keep_picked(int lane) {
        int16_t* const listed = listed_.get() + lane * stride_;
        list_flags(picked_.get() + lane * stride_, length_[lane], 0, ranks_.get());
        for (int i = 0; i < spec_.keep; ++i) listed[i] = listed[ranks_[i]];
        length_[lane] = spec_.keep;
    }

    void write_context(int64_t image, int lane) {
        const int16_t* const listed = listed_.get() + lane * stride_;
        const int length = length_[lane];
        if (contexts_) {
            last_context_ = std::copy_n(listed, length, last_context_);
        } else if (out_.context) {
            const int64_t stride = spec_.mode == kFaithful ? spec_.context_h * spec_.context_w : spec_.keep;
            std::copy_n(listed, length, out_.context + image * stride);
        }
        if (out_.inverse) {
            int16_t* const slot = out_.inverse + image * patches_;
            std::fill_n(slot, patches_, int16_t{-1});
            for (int i = 0; i < length; ++i) slot[listed[i]] = static_cast<int16_t>(i);
        }
    }

    void write_targets(int64_t image, int lane) {
        const int64_t size = spec_.num_targets * target_size_;
        if (spec_.mode == kRandom) {
            list_flags(picked_.get() + lane * stride_, patches_, kOnes, target_.get());
        } else {
            for (int m = 0; m < spec_.num_targets; ++m)
                add_eights(block_list_.get(), block_at_[m][lane], target_size_, target_.get() + m * target_size_);
        }
        if (out_.target) std::copy_n(target_.get(), size, out_.target + image * size);
    }

    void write_union(int64_t image, int lane) {
        if (spec_.mode == kRandom) {
            std::fill_n(covered_.words, words_, 0);
            for (int k = 0; k < target_size_; ++k) covered_.words[target_[k] / 64] |= uint64_t{1} << target_[k] % 64;
        } else {
            cover(lane, spec_.num_targets);
        }
        int before[kMaxPatches / 64], length = 0;
        for (int i = 0; i < words_; ++i) {
            before[i] = length;
            length += __builtin_popcountll(covered_.words[i]);
        }
        list(covered_, patches_, last_union_);
        last_union_ += length;
        out_.union_offsets[image + 1] = length;
        // The patches of one row of a target are neighbours in the grid, and therefore in the union.
        const int rows = spec_.num_targets * spec_.target_h, width = spec_.target_w;
        for (int r = 0; r < rows; ++r) {
            const int patch = target_[r * width];
            const uint64_t lower = covered_.words[patch / 64] & bits(patch % 64);
            add_eights(iota_.get(), before[patch / 64] + __builtin_popcountll(lower), width, slot_.get() + r * width);
        }
        std::copy_n(slot_.get(), rows * width, out_.target_slot + image * rows * width);
    }

    const int64_t begin_, end_;
    const MaskSpec spec_;
    const MaskOutputs out_;
    const int patches_, words_, stride_, target_size_;
    const Block window_, block_;
    const std::unique_ptr<int16_t[]> iota_, block_list_, ranks_;
    const std::unique_ptr<int16_t[]> listed_;  // `stride_` entries for each lane
    const std::unique_ptr<uint8_t[]> picked_;  // likewise
    const std::unique_ptr<int16_t[]> target_, slot_;
    Status status_ = kOk;
    std::unique_ptr<int16_t[]> contexts_, unions_;
    int16_t *last_context_ = nullptr, *last_union_ = nullptr;

    uint32_t id_low_[kLanes], id_high_[kLanes];
    int window_at_[kLanes] = {}, block_at_[kMaxTargets + 1][kLanes];  // first patches
    int length_[kLanes];
    Set free_{}, covered_{};
};

CJEPA_CLONES void sample_part(Part& part, const int64_t* ids) { part.sample(ids); }

// Turns lengths in offsets[1..n] into the ends of lists that follow each other in `room` slots.
void accumulate(int32_t* offsets, int64_t n, int32_t room) {
    offsets[0] = 0;
    int64_t total = 0;
    for (int64_t i = 1; i <= n; ++i) {
        total += offsets[i];
        offsets[i] = static_cast<int32_t>(std::min<int64_t>(total, room));
    }
}

}  // namespace

extern "C" {

// Hash of the sources that the library was built from, which reveals a stale build.
const char* cjepa_source_hash() { return CJEPA_SOURCE_HASH; }

void cjepa_philox4x32(const uint32_t* counter, uint64_t key, uint32_t* out) {
    const Words u = philox(counter[0], counter[1], counter[2], counter[3], key);
    std::copy(u.w, u.w + 4, out);
}

// Samples the masks of ids [n]; the number of threads changes no bit. `context`, `offsets` and `image_of` of packed
// mode are wanted together or not at all, and likewise the three outputs of a union. Returns a Status; unless kOk, the
// outputs are incomplete.
int cjepa_sample_masks(const MaskSpec* spec, const int64_t* ids, int64_t n, int threads, const MaskOutputs* outputs) {
    if (!valid(*spec) || n < 1) return kBadSpec;
    const MaskOutputs& out = *outputs;
    const int64_t count = std::clamp<int64_t>(threads, 1, n);
    std::vector<std::unique_ptr<Part>> parts;
    for (int64_t p = 0; p < count; ++p)
        parts.push_back(std::make_unique<Part>(*spec, out, n * p / count, n * (p + 1) / count));
    std::vector<std::thread> pool;
    for (int64_t p = 1; p < count; ++p) {
        try {
            pool.emplace_back(sample_part, std::ref(*parts[p]), ids);
        } catch (const std::system_error&) {  // no thread available: the caller does its share
            sample_part(*parts[p], ids);
        }
    }
    sample_part(*parts[0], ids);
    for (auto& thread : pool) thread.join();
    for (const auto& part : parts)
        if (part->status() != kOk) return part->status();

    const int64_t patches = spec->height * spec->width;
    const auto shorten = [&](int64_t image, int length) {
        int16_t* const slot = out.inverse + image * patches;
        for (int64_t p = 0; p < patches; ++p) slot[p] = slot[p] < length ? slot[p] : int16_t{-1};
    };
    if (spec->mode == kFaithful) {
        const int shortest = *std::min_element(out.counts, out.counts + n);
        const int64_t stride = spec->context_h * spec->context_w;
        for (int64_t i = 0; i < n; ++i) {
            if (out.context) std::copy_n(out.context + i * stride, shortest, out.context + i * shortest);
            if (out.inverse) shorten(i, shortest);
        }
    }
    if (spec->mode == kPacked && out.context) {
        std::copy_n(out.counts, n, out.offsets + 1);
        accumulate(out.offsets, n, spec->cap);
        int16_t *last = out.context, *const stop = last + spec->cap;
        for (const auto& part : parts) part->append_contexts(last, stop);
        std::fill(last, stop, int16_t{-1});
        std::fill(out.image_of, out.image_of + spec->cap, -1);
        for (int64_t i = 0; i < n; ++i) {
            std::fill(out.image_of + out.offsets[i], out.image_of + out.offsets[i + 1], static_cast<int32_t>(i));
            const int length = out.offsets[i + 1] - out.offsets[i];
            if (out.inverse && length < out.counts[i]) shorten(i, length);
        }
    }
    if (out.union_patches) {
        accumulate(out.union_offsets, n, spec->union_cap);
        int16_t *last = out.union_patches, *const stop = last + spec->union_cap;
        for (const auto& part : parts) part->append_unions(last, stop);
        std::fill(last, stop, int16_t{-1});
        const int64_t size = int64_t{spec->num_targets} * spec->target_h * spec->target_w;
        for (int64_t i = 0; i < n; ++i) {
            const int highest = spec->union_cap - 1 - out.union_offsets[i];
            if (highest >= patches - 1) continue;
            for (int64_t k = i * size; k < (i + 1) * size; ++k)
                out.target_slot[k] = static_cast<int16_t>(std::min<int>(out.target_slot[k], highest));
        }
    }
    return kOk;
}

}  // extern "C"
