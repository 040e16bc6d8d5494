// Multi-block masks on the GPU, bit-identical to cjepa_fast/reference/masks.py: one launch for the whole batch.
//
// A plain C interface without Python or torch. The kernel reads no host memory and the host reads nothing back, so a
// captured graph may be replayed with another step and other ids.
//
// One warp per image. To place blocks, a lane holds a grid row as a 64-bit mask (two rows in grids of more than 32):
// the union of the targets is OR, the context is window & ~union, a popcount and a warp sum give its length. To list
// patches, a lane holds a patch: a ballot gives its slot, and neighbouring lanes write neighbouring slots.
//
// In packed contexts and unions an image needs the total length before it. Blocks publish their sums and read those of
// their predecessors (Merrill & Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back", NVIDIA 2016).
// Blocks take their numbers from a counter, so a block waits only for blocks that have started.

#include "mask_spec.h"

namespace cjepa {
namespace {

#ifndef CJEPA_WARPS
#define CJEPA_WARPS 8  // 2,048 images: two blocks on each of 128 multiprocessors
#endif

constexpr int kLanes = 32;
constexpr int kWarps = CJEPA_WARPS;  // images of a block
constexpr int kThreads = kWarps * kLanes;
constexpr uint32_t kAll = 0xFFFFFFFF;

enum Sum { kContexts, kUnions, kSums };

// Zero before the first launch. Every launch leaves the workspace ready for the next launch, of any size that fits. The
// published sums follow it, [blocks][kSums]: launch number, 31 bits; includes all predecessors, 1 bit; sum, 32 bits.
struct Workspace {
    unsigned long long tickets;  // low half: next block number; high half: launches so far, a tag on the sums that
                                 // spares clearing them
    uint32_t placed;             // faithful: blocks that have added to the shortfall
    uint32_t shortfall;          // faithful: the largest kMaxPatches - count so far
    int64_t shortest;            // faithful: the batch minimum, once every block has finished
};

struct Arguments {
    MaskSpec spec;
    MaskOutputs out;
    const uint32_t* step;
    const int64_t* ids;
    int64_t n;
    int32_t* shortest;
    int32_t* status;
    Workspace* workspace;
    volatile uint64_t* published;
};

CJEPA_HD inline bool wants_unions(const MaskOutputs& out) {
    return out.union_patches != nullptr || out.union_offsets != nullptr || out.target_slot != nullptr;
}

// Returns whether the masks of an image depend on the other images of the call.
CJEPA_HD inline bool linked(const MaskSpec& spec, const MaskOutputs& out) {
    return spec.mode == kFaithful || spec.mode == kPacked || wants_unions(out);
}

// Data that the lanes of a warp share.
struct Scratch {
    uint64_t context[kMaxSide], covered[kMaxSide];  // grid rows
    uint16_t covered_before[kMaxSide];              // covered patches in earlier rows
    uint32_t picked[kMaxPatches / 32 + 2];          // 2 more: row_of reads three words from any place
};

// Grid rows `lane` and `lane + 32`.
struct Rows {
    uint64_t low, high;
};

struct Placement {
    uint32_t targets;  // lane p: top, left of target 2 p and of target 2 p + 1, a byte each
    Rows context;
    int length;  // patches in `context`, before any cut
    bool found;
};

// Every 32nd element of a row-major array `width` wide, beginning with element `lane`.
struct Walk {
    int width, row, col, rows, cols;

    __device__ Walk(int lane, int width)
        : width(width), row(lane / width), col(lane % width), rows(kLanes / width), cols(kLanes % width) {}

    __device__ void next() {
        row += rows;
        col += cols;
        if (col >= width) {
            col -= width;
            ++row;
        }
    }
};

__device__ int lane_index() { return static_cast<int>(threadIdx.x % kLanes); }

__device__ uint32_t pack(Corner corner) {
    return static_cast<uint32_t>(corner.top) | static_cast<uint32_t>(corner.left) << 8;
}

__device__ Corner corner_of(uint32_t targets, int m) {
    const uint32_t packed = __shfl_sync(kAll, targets, m / 2) >> (m % 2 * 16);
    return {static_cast<int>(packed & 0xFF), static_cast<int>(packed >> 8 & 0xFF)};
}

__device__ uint64_t block_row(Corner corner, int h, int w, int row) {
    return row >= corner.top && row < corner.top + h ? bits(w) << corner.left : 0;
}

__device__ Rows cover(const MaskSpec& spec, uint32_t targets, int count) {
    const int lane = lane_index();
    Rows covered{0, 0};
    for (int m = 0; m < count; ++m) {
        const Corner corner = corner_of(targets, m);
        covered.low |= block_row(corner, spec.target_h, spec.target_w, lane);
        covered.high |= block_row(corner, spec.target_h, spec.target_w, lane + kLanes);
    }
    return covered;
}

__device__ uint32_t draw_targets(const MaskSpec& spec, int64_t id, uint32_t attempt) {
    const Words u = words_at(spec, id, kTargets, attempt << 8 | lane_index());
    return pack(corner(spec, u.w[0], u.w[1], spec.target_h, spec.target_w)) |
           pack(corner(spec, u.w[2], u.w[3], spec.target_h, spec.target_w)) << 16;
}

__device__ Corner quadrant(const MaskSpec& spec, int q) { return {q / 2 * spec.target_h, q % 2 * spec.target_w}; }

// Draws blocks until the context is long enough.
__device__ Placement place(const MaskSpec& spec, int64_t id) {
    const bool faithful = spec.mode == kFaithful;
    const int lane = lane_index(), blocks = spec.num_targets;
    const int limit = faithful ? kTriesPerRegion * blocks + 1 : kMaxAttempts;
    const int enough = faithful ? spec.min_keep + 1 : spec.mode == kPacked ? spec.min_keep : spec.keep;
    Placement placed{};
    for (int attempt = 0; attempt < limit && !placed.found; ++attempt) {
        const Words u = words_at(spec, id, kContext, static_cast<uint32_t>(attempt) << 8);
        Corner window = corner(spec, u.w[0], u.w[1], spec.context_h, spec.context_w);
        if (spec.mode == kRasterized) {
            const int context = below(u.w[0], 4), even = 2 * (lane % 2), odd = even + 1;
            window = quadrant(spec, context);
            placed.targets = pack(quadrant(spec, even + (even >= context))) |
                             pack(quadrant(spec, odd + (odd >= context))) << 16;
        } else if (attempt == 0 || !faithful) {
            placed.targets = draw_targets(spec, id, attempt);
        }
        const Rows taken = cover(spec, placed.targets, faithful ? blocks - attempt / kTriesPerRegion : blocks);
        placed.context.low = block_row(window, spec.context_h, spec.context_w, lane) & ~taken.low;
        placed.context.high = block_row(window, spec.context_h, spec.context_w, lane + kLanes) & ~taken.high;
        placed.length = __reduce_add_sync(kAll, __popcll(placed.context.low) + __popcll(placed.context.high));
        placed.found = placed.length >= enough;
    }
    if (!placed.found) placed.context = {0, 0}, placed.length = 0;
    return placed;
}

// Floyd's algorithm, 32 draws at a time: sets the bits in `picked` of a random `spec.keep` of `length` ranks.
//
// Draw i is a rank from 0 to last(i) = length - keep + i; if the rank is taken, draw i takes last(i) instead. One by
// one these are `keep` dependent steps. But draw j leaves its rank taken in either case. So the rank of draw i is
// taken if and only if an earlier draw was equal, or the rank is last(j) of an earlier draw j whose rank was taken.
// Such chains are short. `picked` holds the draws of earlier rounds.
__device__ void pick_subset(const MaskSpec& spec, int64_t id, int length, uint32_t* picked) {
    const int lane = lane_index(), first = length - spec.keep;
    const uint32_t lower = (uint32_t{1} << lane) - 1;
    for (int k = lane; k * 32 < length; k += kLanes) picked[k] = 0;
    __syncwarp();
    for (int done = 0; done < spec.keep; done += kLanes) {
        const int i = done + lane, last = first + i;
        const bool draws = i < spec.keep;
        const Words u = words_at(spec, id, kSubset, i / 4);
        const uint32_t even = i % 4 < 2 ? u.w[0] : u.w[2], odd = i % 4 < 2 ? u.w[1] : u.w[3];
        const int rank = draws ? below(i % 2 == 0 ? even : odd, last + 1) : ~lane;  // idle lanes equal no other
        const int owner = rank - first - done;                   // the lane whose last(j) this is
        bool taken = (__match_any_sync(kAll, rank) & lower) != 0;
        if (draws) taken = taken || (picked[rank / 32] >> rank % 32 & 1) != 0;
        for (uint32_t known = 0, now = __ballot_sync(kAll, taken); known != now;) {
            known = now;
            taken = taken || (owner >= 0 && owner < lane && (known >> owner & 1) != 0);
            now = __ballot_sync(kAll, taken);
        }
        const int mine = taken ? last : rank;
        __syncwarp();
        if (draws) atomicOr(&picked[mine / 32], uint32_t{1} << mine % 32);
        __syncwarp();
    }
}

// Returns grid row `row` of N consecutive flags.
__device__ uint64_t row_of(const MaskSpec& spec, const uint32_t* flags, int row) {
    if (row >= spec.height) return 0;
    const int word = row * spec.width / 32, shift = row * spec.width % 32;
    const uint64_t low = flags[word] | uint64_t{flags[word + 1]} << 32;
    return (shift == 0 ? low : low >> shift | uint64_t{flags[word + 2]} << (64 - shift)) & bits(spec.width);
}

__device__ Placement place_random(const MaskSpec& spec, int64_t id, uint32_t* picked) {
    pick_subset(spec, id, spec.height * spec.width, picked);
    const int lane = lane_index();
    return {0, {row_of(spec, picked, lane), row_of(spec, picked, lane + kLanes)}, spec.keep, true};
}

// Calls visit(patch, slot) once for every patch, in some lane. The slot counts the patches set in `rows`; if `picked`
// is given, only those whose rank among them is set in `picked`. The slot of any other patch is -1.
template <typename Visit>
__device__ void list_patches(const MaskSpec& spec, const uint64_t* rows, const uint32_t* picked, Visit visit) {
    const int lane = lane_index(), patches = spec.height * spec.width;
    const uint32_t lower = (uint32_t{1} << lane) - 1;
    Walk at(lane, spec.width);
    for (int patch = lane, ranks = 0, slots = 0; patch - lane < patches; patch += kLanes, at.next()) {
        bool listed = patch < patches && (rows[at.row] >> at.col & 1) != 0;
        uint32_t all = __ballot_sync(kAll, listed);
        if (picked != nullptr) {
            const int rank = ranks + __popc(all & lower);
            ranks += __popc(all);
            listed = listed && (picked[rank / 32] >> rank % 32 & 1) != 0;
            all = __ballot_sync(kAll, listed);
        }
        if (patch < patches) visit(patch, listed ? slots + __popc(all & lower) : -1);
        slots += __popc(all);
    }
}

// Calls visit(k, row, col) for each patch k of the M Kt patches of the targets.
template <typename Visit>
__device__ void list_targets(const MaskSpec& spec, uint32_t targets, Visit visit) {
    const int lane = lane_index(), area = spec.target_h * spec.target_w;
    for (int m = 0; m < spec.num_targets; ++m) {
        const Corner corner = corner_of(targets, m);
        Walk at(lane, spec.target_w);
        for (int k = lane; k < area; k += kLanes, at.next())
            visit(m * area + k, corner.top + at.row, corner.left + at.col);
    }
}

// Stores the covered rows, and the number of patches before each, in `scratch`. Returns the number of covered patches.
__device__ int store_covered(const Rows& covered, Scratch& scratch) {
    const int lane = lane_index();
    const uint32_t own = __popcll(covered.low) | __popcll(covered.high) << 16;  // at most 2,048 in either half
    uint32_t up_to = own;
    for (int step = 1; step < kLanes; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAll, up_to, step);
        if (lane >= step) up_to += other;
    }
    const uint32_t total = __shfl_sync(kAll, up_to, kLanes - 1), before = up_to - own;
    scratch.covered[lane] = covered.low;
    scratch.covered[lane + kLanes] = covered.high;
    scratch.covered_before[lane] = before & 0xFFFF;
    scratch.covered_before[lane + kLanes] = (total & 0xFFFF) + (before >> 16);
    __syncwarp();
    return (total & 0xFFFF) + (total >> 16);
}

// Sums are clipped to the room `cap`, so they fit 32 bits and need no later clipping as offsets.
__device__ uint32_t add_up_to(uint32_t cap, uint32_t a, uint32_t b) {
    const uint64_t sum = uint64_t{a} + b;
    return sum < cap ? static_cast<uint32_t>(sum) : cap;
}

__device__ void publish(volatile uint64_t* where, uint32_t launch, bool inclusive, uint32_t sum) {
    *where = uint64_t{launch << 1 | (inclusive ? 1u : 0u)} << 32 | sum;
}

// Returns the sum of all blocks before `block`, in every thread: thread t reads the t-th block before. A value carries
// its own tag, so no order with other memory is needed.
__device__ uint32_t look_back(const volatile uint64_t* published, uint32_t launch, int64_t block, uint32_t cap) {
    __shared__ uint32_t sums[kWarps];
    __shared__ bool complete[kWarps];
    const int lane = lane_index(), warp = threadIdx.x / kLanes;
    uint32_t before = 0;
    for (int64_t end = block;; end -= kThreads) {
        const int64_t other = end - 1 - threadIdx.x;
        uint64_t word = uint64_t{1} << 32;
        if (other >= 0) {
            while ((word = published[other * kSums]) >> 33 != launch) __nanosleep(20);
        }
        // Add up to the nearest sum that includes its predecessors: the lowest bit set, and the bits below.
        const uint32_t inclusive = __ballot_sync(kAll, (word >> 32 & 1) != 0);
        const bool counts = ((inclusive ^ (inclusive - 1)) >> lane & 1) != 0;
        const uint32_t sum = __reduce_add_sync(kAll, counts ? static_cast<uint32_t>(word) : 0);
        if (lane == 0) {
            sums[warp] = sum;
            complete[warp] = inclusive != 0;
        }
        __syncthreads();
        bool done = false;
        for (int k = 0; k < kWarps && !done; ++k) {
            before = add_up_to(cap, before, sums[k]);
            done = complete[k];
        }
        __syncthreads();
        if (done) return before;
    }
}

// The begin and end of the patches of this warp's image in the list of the call, and the end of the block's patches.
struct Span {
    uint32_t begin, end, block_end;
};

__device__ Span locate(const Arguments& a, uint32_t launch, int64_t block, Sum which, const uint32_t* counts,
                       uint32_t cap) {
    const int warp = threadIdx.x / kLanes;
    volatile uint64_t* published = a.published + which;
    uint32_t sum = look_back(published, launch, block, cap);
    Span span{};
    for (int k = 0; k < kWarps; ++k) {
        if (k == warp) span.begin = sum;
        sum = add_up_to(cap, sum, counts[k]);
        if (k == warp) span.end = sum;
    }
    span.block_end = sum;
    if (threadIdx.x == 0) publish(published + block * kSums, launch, true, sum);
    return span;
}

// Faithful: adds the block's shortest context; the last block to do so stores the shortest of the call.
__device__ void add_shortest(const Arguments& a, int64_t block, const uint32_t* lengths) {
    Workspace& shared = *a.workspace;
    uint32_t shortfall = 0;
    for (int k = 0; k < kWarps && block * kWarps + k < a.n; ++k)
        shortfall = max(shortfall, kMaxPatches - lengths[k]);
    atomicMax(&shared.shortfall, shortfall);
    __threadfence();
    if (atomicAdd(&shared.placed, 1u) != gridDim.x - 1) return;
    __threadfence();
    shared.shortest = kMaxPatches - static_cast<int>(atomicExch(&shared.shortfall, 0u));
    shared.placed = 0;
    if (a.shortest != nullptr) *a.shortest = static_cast<int32_t>(shared.shortest);
}

// Lists the context of one image from out.context[begin] on: the first `room` of its `length` patches. If `room` is
// larger, -1 follows (faithful, and an image without a context).
__device__ void list_context(const MaskOutputs& out, const MaskSpec& spec, int64_t image, const uint64_t* rows,
                             const uint32_t* picked, int length, int64_t begin, int room) {
    const int patches = spec.height * spec.width;
    list_patches(spec, rows, picked, [&](int patch, int slot) {
        const bool kept = slot >= 0 && slot < room;
        if (kept && out.context != nullptr) out.context[begin + slot] = static_cast<int16_t>(patch);
        if (kept && out.image_of != nullptr) out.image_of[begin + slot] = static_cast<int32_t>(image);
        if (out.inverse != nullptr) out.inverse[image * patches + patch] = static_cast<int16_t>(kept ? slot : -1);
    });
    for (int k = length + lane_index(); k < room && out.context != nullptr; k += kLanes) out.context[begin + k] = -1;
}

__device__ void list_union(const MaskOutputs& out, const MaskSpec& spec, int64_t image, const Scratch& scratch,
                           uint32_t targets, const Span& span) {
    const int room = span.end - span.begin, highest = spec.union_cap - 1 - static_cast<int>(span.begin);
    const int width = spec.num_targets * spec.target_h * spec.target_w;
    if (int16_t* list = out.union_patches; list != nullptr) {
        list += span.begin;
        list_patches(spec, scratch.covered, nullptr, [&](int patch, int slot) {
            if (slot >= 0 && slot < room) list[slot] = static_cast<int16_t>(patch);
        });
    }
    if (int16_t* slots = out.target_slot; slots != nullptr) {
        slots += image * width;
        if (spec.mode == kRandom) {
            for (int k = lane_index(); k < width; k += kLanes) slots[k] = static_cast<int16_t>(min(k, highest));
        } else {
            list_targets(spec, targets, [&](int k, int row, int col) {
                const int slot = scratch.covered_before[row] + __popcll(scratch.covered[row] & bits(col));
                slots[k] = static_cast<int16_t>(min(slot, highest));
            });
        }
    }
}

__device__ void store_offset(int32_t* offsets, int64_t n, int64_t image, const Span& span) {
    if (offsets == nullptr) return;
    offsets[image] = span.begin;
    if (image == n - 1) offsets[n] = span.end;
}

__global__ void __launch_bounds__(kThreads) sample_masks(const Arguments a) {
    __shared__ Scratch scratches[kWarps];
    __shared__ uint32_t counts[kSums][kWarps];
    __shared__ uint32_t ticket, launch;
    const int lane = lane_index(), warp = threadIdx.x / kLanes;
    const MaskOutputs& out = a.out;  // image_of is null unless packed
    MaskSpec spec = a.spec;
    if (a.step != nullptr) spec.step = *a.step;
    const bool packed = spec.mode == kPacked, random = spec.mode == kRandom;
    const bool unions = wants_unions(out), is_linked = linked(spec, out);

    int64_t block = blockIdx.x;
    if (is_linked) {
        if (threadIdx.x == 0) {
            const unsigned long long drawn = atomicAdd(&a.workspace->tickets, 1ull);
            ticket = static_cast<uint32_t>(drawn);
            launch = static_cast<uint32_t>(drawn >> 32) % 0x7FFFFFFF + 1;  // 31 bits, not the 0 of fresh memory
            // The last block to draw in this launch prepares the next launch.
            if (ticket == gridDim.x - 1) atomicAdd(&a.workspace->tickets, (1ull << 32) - gridDim.x);
        }
        __syncthreads();
        block = ticket;
    }
    const int64_t image = block * kWarps + warp;
    const bool idle = image >= a.n, last_block = block == gridDim.x - 1;
    Scratch& scratch = scratches[warp];

    Placement placed{};
    int covered = 0;
    const uint32_t* picked = nullptr;  // all
    if (!idle) {
        const int64_t id = a.ids[image];
        placed = random ? place_random(spec, id, scratch.picked) : place(spec, id);
        scratch.context[lane] = placed.context.low;
        scratch.context[lane + kLanes] = placed.context.high;
        if (random) {
            const uint64_t row = bits(spec.width);
            covered = store_covered({lane < spec.height ? row & ~placed.context.low : 0,
                                     lane + kLanes < spec.height ? row & ~placed.context.high : 0},
                                    scratch);
        } else if (unions) {
            covered = store_covered(cover(spec, placed.targets, spec.num_targets), scratch);
        }
        __syncwarp();
        if (lane == 0 && out.counts != nullptr) out.counts[image] = placed.length;
        if (lane == 0 && a.status != nullptr && !placed.found) atomicMax(a.status, static_cast<int>(kNoContext));
    }
    if (is_linked) {
        if (lane == 0) {
            counts[kContexts][warp] = placed.length;
            counts[kUnions][warp] = covered;
        }
        __syncthreads();
        if (threadIdx.x < kSums) {
            uint32_t sum = 0;
            for (int k = 0; k < kWarps; ++k) sum += counts[threadIdx.x][k];
            publish(a.published + block * kSums + threadIdx.x, launch, false, sum);
        }
        if (spec.mode == kFaithful && threadIdx.x == kLanes - 1) add_shortest(a, block, counts[kContexts]);
    }

    if (!idle) {  // needs no other image: the other blocks publish meanwhile
        if (spec.mode == kFixed && placed.length > spec.keep) {
            pick_subset(spec, a.ids[image], placed.length, scratch.picked);
            picked = scratch.picked;
        }
        if (int16_t* target = out.target; target != nullptr) {
            target += image * spec.num_targets * spec.target_h * spec.target_w;
            if (random) {
                list_patches(spec, scratch.covered, nullptr, [&](int patch, int slot) {
                    if (slot >= 0) target[slot] = static_cast<int16_t>(patch);
                });
            } else {
                list_targets(spec, placed.targets, [&](int k, int row, int col) {
                    target[k] = static_cast<int16_t>(row * spec.width + col);
                });
            }
        }
    }

    if (packed) {
        const uint32_t cap = spec.cap;
        const Span span = locate(a, launch, block, kContexts, counts[kContexts], cap);
        if (!idle) {
            list_context(out, spec, image, scratch.context, nullptr, placed.length, span.begin, span.end - span.begin);
            if (lane == 0) store_offset(out.offsets, a.n, image, span);
        }
        // One block pads: `cap` should leave only a few percent.
        for (int64_t k = span.block_end + threadIdx.x; last_block && k < cap; k += kThreads) {
            if (out.context != nullptr) out.context[k] = -1;
            if (out.image_of != nullptr) out.image_of[k] = -1;
        }
    } else if (!idle) {
        const int room = spec.mode == kFaithful ? spec.context_h * spec.context_w : spec.keep;
        const int length = picked != nullptr ? spec.keep : placed.length;
        list_context(out, spec, image, scratch.context, picked, length, image * room, room);
    }
    if (unions) {
        const uint32_t cap = spec.union_cap;
        const Span span = locate(a, launch, block, kUnions, counts[kUnions], cap);
        if (!idle) {
            list_union(out, spec, image, scratch, placed.targets, span);
            if (lane == 0) store_offset(out.union_offsets, a.n, image, span);
        }
        for (int64_t k = span.block_end + threadIdx.x; last_block && k < cap; k += kThreads)
            if (out.union_patches != nullptr) out.union_patches[k] = -1;
    }
}

// Faithful: cuts to the batch minimum, which is known when every block of the first kernel has finished.
__global__ void __launch_bounds__(kThreads) cut_inverse(const Arguments a) {
    const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (k < a.n * a.spec.height * a.spec.width && a.out.inverse[k] >= a.workspace->shortest) a.out.inverse[k] = -1;
}

cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, const Arguments& arguments, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

int64_t blocks_for(int64_t n) { return (n + kWarps - 1) / kWarps; }

}  // namespace
}  // namespace cjepa

extern "C" {

// Hash of the sources that the library was built from, which reveals a stale build.
const char* cjepa_source_hash() { return CJEPA_SOURCE_HASH; }

const char* cjepa_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Returns 0 if the library holds code for the device and the driver can load the code, else a cudaError.
int cjepa_cuda_check(int device) {
    cudaFuncAttributes attributes;  // the query also loads the kernels, which a stream capture might not allow
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, cjepa::sample_masks);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, cjepa::cut_inverse);
    return error;
}

// Returns the bytes of device memory that calls with up to n images share. The caller zeroes the memory once. Calls
// that may overlap in time need a workspace each.
int64_t cjepa_mask_workspace_bytes(int64_t n) {
    return sizeof(cjepa::Workspace) + cjepa::blocks_for(n) * cjepa::kSums * sizeof(uint64_t);
}

// Samples the masks of ids [n]. spec and outputs are in host memory, the rest is on the device.
//   step      read in place of spec->step unless null
//   shortest  faithful: the batch minimum of counts, or null. Contexts are then [n, context_h context_w], with -1 after
//             the counts[i] patches of image i
//   status    raised to kNoContext if an image found no context (its list is empty), else left alone; or null
// Returns a cudaError: cudaErrorInvalidValue for an impossible spec.
int cjepa_sample_masks_cuda(const cjepa::MaskSpec* spec, const uint32_t* step, const int64_t* ids, int64_t n,
                            const cjepa::MaskOutputs* outputs, int32_t* shortest, int32_t* status, void* workspace,
                            int device, void* stream) {
    using namespace cjepa;
    if (!valid(*spec) || n < 1 || n > INT32_MAX || (workspace == nullptr && linked(*spec, *outputs)))
        return cudaErrorInvalidValue;
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return error;
    Workspace* header = static_cast<Workspace*>(workspace);
    MaskOutputs wanted = *outputs;
    if (spec->mode != kPacked) wanted.offsets = wanted.image_of = nullptr;
    const Arguments arguments{*spec, wanted, step, ids, n, shortest, status, header,
                              reinterpret_cast<volatile uint64_t*>(header + 1)};
    const auto queue = static_cast<cudaStream_t>(stream);
    cudaError_t error = launch(sample_masks, blocks_for(n), arguments, queue);
    if (error == cudaSuccess && spec->mode == kFaithful && outputs->inverse != nullptr) {
        const int64_t patches = n * spec->height * spec->width;
        error = launch(cut_inverse, (patches + kThreads - 1) / kThreads, arguments, queue);
    }
    return error;
}

}  // extern "C"
