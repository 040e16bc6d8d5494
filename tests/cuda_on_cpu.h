// Runs a CUDA kernel on a CPU, deterministically: include it first (g++ -x c++ -include) and compile the .cu as C++.
//
// Every CUDA thread is a fiber; it runs until it meets others (a warp or block primitive, an atomic, __nanosleep). The
// next one is chosen at random from a seed, among the threads of a few resident blocks, which start in a chosen order:
// what depends on an order that CUDA does not promise shows. Also found: lanes that meet at different primitives,
// deadlock, shared memory that is read before it is written (it starts as garbage), and a missing barrier, as threads
// between two of them run one after another. Not modelled: weak memory order, as all threads see one memory; masks
// other than all lanes; anything of CUDA that the kernels here do not use.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __launch_bounds__(threads)
// One section holds what is shared: swapped when another block runs.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" __attribute__((visibility("hidden"))) char __start_cuda_shared[], __stop_cuda_shared[];

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr long kPatience = 1 << 18;  // turns in which nobody gets further before it is called a deadlock

enum Op { kSync, kShuffle, kShuffleUp, kBallot, kMatch, kReduceAdd };

struct Warp {
    Op op;
    int line, waiting = 0;
    uint64_t values[kLanes], results[kLanes];
    int sources[kLanes];
};

struct Block;

struct Thread {
    Block* block;
    int index;
    ucontext_t start;
    jmp_buf place;
    bool started = false, finished = false;
    void* stack;
};

struct Block {
    unsigned index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<int> ready;
    int at_barrier = 0, barrier_line = 0, finished = 0;
    std::vector<char> shared;
};

struct Machine {
    uint64_t random = 1;
    int resident = 4, order = 0;  // blocks that run at a time; 0 ascending, 1 descending, 2 shuffled
    std::string error;
    jmp_buf scheduler;
    ucontext_t return_to;
    Thread* current = nullptr;
    const std::function<void()>* kernel = nullptr;
    bool end_of_turn = false;
    long idle = 0;
    std::vector<void*> stacks;
};

inline Machine machine;

inline unsigned below(unsigned n) {
    uint64_t& x = machine.random;  // xorshift64*, Vigna 2016
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    return static_cast<unsigned>((x * 0x2545F4914F6CDD1D >> 32) * n >> 32);
}

inline void leave() {
    if (_setjmp(machine.current->place) == 0) _longjmp(machine.scheduler, 1);
}

[[noreturn]] inline void fail(const char* what, int line) {
    machine.error = what;
    machine.error += " at line " + std::to_string(line) + ", block " + std::to_string(machine.current->block->index) +
                     ", thread " + std::to_string(machine.current->index);
    _longjmp(machine.scheduler, 1);
}

inline void entry() {
    (*machine.kernel)();
    machine.current->finished = true;
    _longjmp(machine.scheduler, 1);
}

inline void resume(Thread& thread) {
    machine.current = &thread;
    threadIdx = dim3(thread.index, 0, 0);
    if (_setjmp(machine.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, entry, 0);
    setcontext(&thread.start);
}

inline void complete(Warp& warp) {
    uint64_t sum = 0, ballot = 0;
    for (int i = 0; i < kLanes; ++i) {
        sum += warp.values[i];
        ballot |= uint64_t{warp.values[i] != 0} << i;
    }
    for (int i = 0; i < kLanes; ++i) {
        uint64_t& result = warp.results[i];
        switch (warp.op) {
            case kSync: break;
            case kShuffle: result = warp.values[warp.sources[i] % kLanes]; break;
            case kShuffleUp: result = warp.values[i >= warp.sources[i] ? i - warp.sources[i] : i]; break;
            case kBallot: result = ballot; break;
            case kReduceAdd: result = static_cast<uint32_t>(sum); break;
            case kMatch:
                result = 0;
                for (int j = 0; j < kLanes; ++j) result |= uint64_t{warp.values[j] == warp.values[i]} << j;
        }
    }
}

inline uint64_t meet(Op op, unsigned mask, uint64_t value, int source, int line) {
    Thread& thread = *machine.current;
    const int lane = thread.index % kLanes, first = thread.index - lane;
    Warp& warp = thread.block->warps[thread.index / kLanes];
    if (mask != 0xFFFFFFFF) fail("a primitive without all lanes", line);
    if (warp.waiting == 0) {
        warp.op = op, warp.line = line;
    } else if (warp.op != op || warp.line != line) {
        fail(("lanes of a warp are also at line " + std::to_string(warp.line)).c_str(), line);
    }
    warp.values[lane] = value, warp.sources[lane] = source;
    if (++warp.waiting == kLanes) {
        complete(warp);
        warp.waiting = 0;
        for (int i = 0; i < kLanes; ++i) thread.block->ready.push_back(first + i);
        machine.idle = 0;
    }
    leave();
    return thread.block->warps[thread.index / kLanes].results[lane];
}

inline void barrier(int line) {
    Block& block = *machine.current->block;
    if (block.at_barrier == 0) block.barrier_line = line;
    if (block.barrier_line != line) fail("threads of a block are at different barriers", line);
    if (++block.at_barrier == static_cast<int>(block.threads.size())) {
        block.at_barrier = 0;
        for (const Thread& thread : block.threads) block.ready.push_back(thread.index);
        machine.idle = 0;
    }
    leave();
}

// Lets others run: always after a pause, now and then at an atomic.
inline void pause(bool certain) {
    if (!certain && below(2) == 0) return;
    machine.end_of_turn = certain || below(2) == 0;
    machine.current->block->ready.push_back(machine.current->index);
    leave();
}

inline void start(Block& block, unsigned index, int threads) {
    block.index = index;
    block.threads.resize(threads);
    block.warps.resize(threads / kLanes);
    block.shared.resize(__stop_cuda_shared - __start_cuda_shared);
    for (char& byte : block.shared) byte = static_cast<char>(below(256));
    for (int i = 0; i < threads; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block, thread.index = i;
        if (machine.stacks.empty())
            machine.stacks.push_back(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        thread.stack = machine.stacks.back();
        machine.stacks.pop_back();
        block.ready.push_back(i);
    }
}

inline void stop(Block& block) {
    for (Thread& thread : block.threads) machine.stacks.push_back(thread.stack);
}

// A number of threads of one block, until one of them pauses.
inline void turn(Block& block) {
    std::copy(block.shared.begin(), block.shared.end(), __start_cuda_shared);
    blockIdx = dim3(block.index, 0, 0);
    machine.end_of_turn = false;
    for (unsigned steps = 1 + below(512); steps > 0 && !block.ready.empty() && !machine.end_of_turn; --steps) {
        std::swap(block.ready[below(static_cast<unsigned>(block.ready.size()))], block.ready.back());
        Thread& thread = block.threads[block.ready.back()];
        block.ready.pop_back();
        resume(thread);
        if (!machine.error.empty()) return;
        if (thread.finished) ++block.finished, machine.idle = 0;
    }
    std::copy(__start_cuda_shared, __stop_cuda_shared, block.shared.begin());
}

inline cudaError_t run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
    machine.kernel = &kernel;
    gridDim = grid, blockDim = threads;
    machine.error.clear();
    machine.idle = 0;
    std::vector<unsigned> waiting(grid.x);  // the next one to start is the last
    for (unsigned i = 0; i < grid.x; ++i) waiting[i] = machine.order == 1 ? i : grid.x - 1 - i;
    if (machine.order == 2)
        for (unsigned i = grid.x; i > 1; --i) std::swap(waiting[i - 1], waiting[below(i)]);
    std::vector<std::unique_ptr<Block>> resident;
    while (machine.error.empty() && (!waiting.empty() || !resident.empty())) {
        while (!waiting.empty() && static_cast<int>(resident.size()) < machine.resident) {
            resident.push_back(std::make_unique<Block>());
            start(*resident.back(), waiting.back(), static_cast<int>(threads.x));
            waiting.pop_back();
        }
        const unsigned chosen = below(static_cast<unsigned>(resident.size()));
        turn(*resident[chosen]);
        if (++machine.idle > kPatience && machine.error.empty()) machine.error = "deadlock";
        if (resident[chosen]->finished == static_cast<int>(threads.x)) {
            stop(*resident[chosen]);
            resident.erase(resident.begin() + chosen);
        }
    }
    for (auto& block : resident) stop(*block);
    return machine.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

#define __syncwarp() ((void)cuda_on_cpu::meet(cuda_on_cpu::kSync, ~0u, 0, 0, __LINE__))
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)
#define __shfl_sync(mask, value, source) \
    static_cast<uint32_t>(cuda_on_cpu::meet(cuda_on_cpu::kShuffle, mask, value, source, __LINE__))
#define __shfl_up_sync(mask, value, by) \
    static_cast<uint32_t>(cuda_on_cpu::meet(cuda_on_cpu::kShuffleUp, mask, value, by, __LINE__))
#define __ballot_sync(mask, value) \
    static_cast<uint32_t>(cuda_on_cpu::meet(cuda_on_cpu::kBallot, mask, value, 0, __LINE__))
#define __match_any_sync(mask, value) \
    static_cast<uint32_t>(cuda_on_cpu::meet(cuda_on_cpu::kMatch, mask, value, 0, __LINE__))
#define __reduce_add_sync(mask, value) \
    static_cast<uint32_t>(cuda_on_cpu::meet(cuda_on_cpu::kReduceAdd, mask, value, 0, __LINE__))
#define __nanosleep(nanoseconds) cuda_on_cpu::pause(true)
#define __threadfence() ((void)0)

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }

template <typename T, typename F>
T cuda_on_cpu_atomic(T* where, F change) {
    cuda_on_cpu::pause(false);
    const T old = *where;
    *where = change(old);
    return old;
}

template <typename T>
T atomicAdd(T* where, T value) {
    return cuda_on_cpu_atomic(where, [=](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* where, T value) {
    return cuda_on_cpu_atomic(where, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicOr(T* where, T value) {
    return cuda_on_cpu_atomic(where, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* where, T value) {
    return cuda_on_cpu_atomic(where, [=](T) { return value; });
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    return cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}

struct cudaFuncAttributes {};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? cuda_on_cpu::machine.error.c_str() : "invalid argument";
}

extern "C" inline __attribute__((used)) void cuda_on_cpu_schedule(uint64_t seed, int resident, int order) {
    cuda_on_cpu::machine.random = seed * 2 + 1;
    cuda_on_cpu::machine.resident = resident;
    cuda_on_cpu::machine.order = order;
}
