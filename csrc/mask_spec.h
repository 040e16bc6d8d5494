// The spec, the outputs and the random numbers of masks, for mask_sampler.cpp and mask_sampler.cu.
//
// Integers only, so that host, device and cjepa_fast/reference/masks.py agree bit for bit. The Python file documents
// the counter layout. H x W grid, N = H W patches numbered row by row, n images, M targets of Kt = target_h target_w
// patches.

#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define CJEPA_HD __host__ __device__
#else
#define CJEPA_HD
#endif

namespace cjepa {

constexpr int kMaxSide = 64;
constexpr int kMaxPatches = kMaxSide * kMaxSide;
constexpr int kMaxTargets = 64;
constexpr int kTriesPerRegion = 20;  // faithful: failed attempts before one more target may overlap the context
constexpr int kMaxAttempts = 64;     // fixed, packed

enum Stream : uint32_t { kTargets = 1, kContext = 2, kSubset = 3 };  // stream 0, block sizes, is read in Python
enum Status : int { kOk = 0, kBadSpec = 1, kNoContext = 2 };

// The rules for an image's M targets and its context. corner() places a block from a row word and a column word.
//   fixed       Targets and window by corner(), redrawn while fewer than `keep` patches of the window are outside the
//               targets. The context is a random `keep` of these (Floyd's algorithm). keep = 0 measures: no context.
//   faithful    The same blocks, never in the last row or column. Only the window is redrawn, while at most `min_keep`
//               patches are left; after every kTriesPerRegion failures one more target may overlap the window. The
//               contexts are cut to the shortest of the call and keep their first patches.
//   packed      fixed with `min_keep` for `keep`; all patches left are kept. Contexts follow each other in one list.
//   rasterized  Four quadrants, row by row. below(word 0 of kContext, 4) is the context, the others are the targets in
//               ascending order. Even H and W, M = 3; both blocks are H/2 x W/2.
//   block       One target, placed like target 0 of fixed; the context is its complement. M = 1; H x W window.
//   random      The context is a random `keep` of all patches, drawn as in fixed; the target is its complement.
//               M = 1, target_h = 1, target_w = Kt; H x W window.
// In rasterized, block and random every context has `keep` = N - M Kt patches, and nothing is redrawn.
enum Mode : int32_t { kFixed, kFaithful, kPacked, kRasterized, kBlock, kRandom };

// `Spec` of cjepa_fast/native/host.py has the same field order and widths.
struct MaskSpec {
    uint64_t seed;
    uint32_t step;
    int32_t mode, height, width, num_targets, target_h, target_w, context_h, context_w, min_keep, keep;
    int32_t cap;        // packed: room for the contexts of the call
    int32_t union_cap;  // room for the unions of the call
};

// A null pointer is an output that is not wanted. Lists of patches and slots ascend.
struct MaskOutputs {
    int16_t* context;  // [n, keep]; faithful: [n, min(counts)], room n context_h context_w; packed: [cap], then -1
    int16_t* target;   // [n, M, Kt]
    int32_t* counts;   // [n], never null: length of each context before any cut
    int32_t* offsets;  // packed: [n + 1], where each context begins, at most cap: entries from cap on are left out
    int32_t* image_of;       // packed: [cap], the image of each token, -1 after the last
    int16_t* inverse;        // [n, N]: slot of each patch in its image's context (after every cut), else -1
    int16_t* union_patches;  // [union_cap]: patches of any target, image after image, then -1
    int32_t* union_offsets;  // [n + 1], clipped to union_cap like offsets
    int16_t* target_slot;    // [n, M, Kt]: slot in the image's union, lowered if necessary until
                             // union_offsets[i] + slot < union_cap: a read through the slot is always in bounds
};

struct Words {
    uint32_t w[4];
};

struct Corner {
    int top, left;
};

// Philox4x32-10 (Salmon et al., SC 2011).
CJEPA_HD inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
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

// address: attempt << 8 | block for kTargets (block m / 2) and kContext (block 0); i / 4 for the i-th draw of kSubset.
CJEPA_HD inline Words words_at(const MaskSpec& spec, int64_t id, Stream stream, uint32_t address) {
    return philox(static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32), spec.step,
                  uint32_t{stream} << 28 | address, spec.seed);
}

// Returns a word as an integer in [0, n).
CJEPA_HD inline int below(uint32_t word, int n) {
    return static_cast<int>(uint64_t{word} * static_cast<uint32_t>(n) >> 32);
}

// Returns the lowest n of 64 bits.
CJEPA_HD inline uint64_t bits(int n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Returns the top-left corner of an h x w block. The published code passes H - h to an exclusive randint.
CJEPA_HD inline Corner corner(const MaskSpec& spec, uint32_t row, uint32_t col, int h, int w) {
    const int room = spec.mode == kFaithful ? 0 : 1;
    return {below(row, spec.height - h + room), below(col, spec.width - w + room)};
}

CJEPA_HD inline bool fits(const MaskSpec& spec, int h, int w) {
    const int room = spec.mode == kFaithful ? 1 : 0;
    return h >= 1 && w >= 1 && h + room <= spec.height && w + room <= spec.width;
}

// Returns whether the samplers can take the spec: the rules of `check` in cjepa_fast/reference/masks.py.
CJEPA_HD inline bool valid(const MaskSpec& s) {
    if (s.height < 1 || s.height > kMaxSide || s.width < 1 || s.width > kMaxSide) return false;
    if (s.num_targets < 1 || s.num_targets > kMaxTargets || s.cap < 0 || s.union_cap < 0) return false;
    if (!fits(s, s.context_h, s.context_w) || s.min_keep < 0 || s.keep < 0) return false;
    if (s.mode != kRandom && !fits(s, s.target_h, s.target_w)) return false;
    const int patches = s.height * s.width, window = s.context_h * s.context_w;
    switch (s.mode) {
        case kFixed:
            return s.keep <= window;
        case kFaithful:
        case kPacked:
            return s.min_keep < window;
        case kRasterized:
            return s.num_targets == 3 && 2 * s.target_h == s.height && 2 * s.target_w == s.width &&
                   s.context_h == s.target_h && s.context_w == s.target_w && s.keep == window;
        case kBlock:
            return s.num_targets == 1 && window == patches && s.keep == patches - s.target_h * s.target_w;
        case kRandom:
            return s.num_targets == 1 && s.target_h == 1 && s.target_w >= 1 && s.target_w <= patches &&
                   window == patches && s.keep == patches - s.target_w;
    }
    return false;
}

}  // namespace cjepa
