// The primitives of csrc/common.cuh for a CPU: the kernels of csrc/ compile against these and run as fibers.
//
// Everything is pessimistic where the GPU promises nothing: copies of the copy engine land late and in any order,
// shared memory begins as NaN, and no exchange within a warp orders memory, only barriers and acquire-release do.
// GFWSVD_EMULATED is the architecture, 80 or 90.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "fibers.hpp"
#include "group.h"
#include "settings.hpp"

#define KERNEL void
#define DEVICE inline
#define GRID_CONSTANT
#define HAS_CLUSTERS (GFWSVD_EMULATED >= 90)

namespace gfwsvd {

using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Exchange {  // of the threads of a warp
    uint32_t given[WARP][8], taken[WARP][8];
    int count = 0, turn = 0;
};
struct Meeting {  // of a barrier
    int count = 0, turn = 0;
};
struct Block {
    unsigned char* memory;
    Exchange exchanges[WARPS + 1];
    Meeting warps[WARPS + 1], named[16];
    int gone = 0;
};
struct Copy {
    void* to;
    const void* from;
    int bytes;
    uint64_t* barrier;
};
struct Machine {
    Launch launch;
    std::vector<Block> blocks;
    std::vector<Meeting> clusters;
    std::vector<Copy> copies;
    static inline Machine* instance = nullptr;
};
inline emulator::Scheduler& scheduler() { return *emulator::Scheduler::instance; }
inline int thread_index() { return scheduler().self().thread; }
inline int block_index() { return scheduler().self().block; }
inline int grid_size() { return Machine::instance->launch.grid; }
inline int cluster_size() { return Machine::instance->launch.cluster; }
inline int cluster_rank() { return block_index() % cluster_size(); }
inline Block& this_block() { return Machine::instance->blocks[block_index()]; }
inline unsigned char* shared_memory() { return this_block().memory; }

// Arrive and, unless told otherwise, wait until `threads` have: orders memory.
inline void meet(Meeting& meeting, int threads, bool wait = true) {
    emulator::released(&meeting);
    int turn;
    {
        emulator::Untracked untracked;
        turn = meeting.turn;
        if (++meeting.count == threads) {
            meeting.count = 0;
            ++meeting.turn;
            scheduler().notify(&meeting);
        }
    }
    if (!wait) return;
    scheduler().wait(&meeting, [&] { return meeting.turn != turn; });
    emulator::acquired(&meeting);
}
inline void named_sync(int id, int threads) { meet(this_block().named[id], threads); }
inline void named_arrive(int id, int threads) { meet(this_block().named[id], threads, false); }
inline void sync_warp() { meet(this_block().warps[thread_index() / WARP], WARP); }

// One barrier whose threads arrive and wait at different times: nobody arrives again before having waited, so counting
// whole rounds is enough.
inline Meeting& cluster_meeting() { return Machine::instance->clusters[block_index() / cluster_size()]; }
inline std::unordered_map<const emulator::Fiber*, int> cluster_turns;
inline void cluster_arrive() {
#if HAS_CLUSTERS
    {
        emulator::Untracked untracked;
        cluster_turns[&scheduler().self()] = cluster_meeting().turn;
    }
    meet(cluster_meeting(), cluster_size() * THREADS, false);
#endif
}
inline void cluster_wait() {
#if HAS_CLUSTERS
    Meeting& meeting = cluster_meeting();
    scheduler().wait(&meeting, [&] { return meeting.turn != cluster_turns[&scheduler().self()]; });
    emulator::acquired(&meeting);
#endif
}

// All lanes give 8 words; `compute(given, taken)` runs once for the warp.
template <class Compute> void exchange(uint32_t (&words)[8], Compute&& compute) {
    emulator::Untracked untracked;
    Exchange& all = this_block().exchanges[thread_index() / WARP];
    const int lane = thread_index() % WARP, turn = all.turn;
    for (int i = 0; i < 8; ++i) all.given[lane][i] = words[i];
    if (++all.count == WARP) {
        compute(all.given, all.taken);
        all.count = 0;
        ++all.turn;
        scheduler().notify(&all);
    } else {
        scheduler().wait(&all, [&] { return all.turn != turn; });
    }
    for (int i = 0; i < 8; ++i) words[i] = all.taken[lane][i];
}

inline uint32_t ballot(bool value) {
    uint32_t words[8] = {value};
    exchange(words, [](auto& given, auto& taken) {
        uint32_t mask = 0;
        for (int lane = 0; lane < WARP; ++lane) mask |= given[lane][0] << lane;
        for (int lane = 0; lane < WARP; ++lane) taken[lane][0] = mask;
    });
    return words[0];
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float shuffle_xor(float value, int mask) {
    uint32_t words[8] = {bits_of(value), static_cast<uint32_t>(mask)};
    exchange(words, [](auto& given, auto& taken) {
        for (int lane = 0; lane < WARP; ++lane) taken[lane][0] = given[lane ^ given[lane][1]][0];
    });
    return float_of(words[0]);
}

// Lane l gave row l % 8 of matrix l / 8, as four words of two elements.
inline void spread_matrices(uint32_t (&a)[4], const uint16_t* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row at no multiple of 16 bytes");
    uint32_t words[8] = {};
    for (int i = 0; i < 4; ++i) words[i] = row[2 * i] | static_cast<uint32_t>(row[2 * i + 1]) << 16;
    words[4] = transposed;
    exchange(words, [](auto& given, auto& taken) {
        const auto element = [&](int matrix, int r, int c) {
            return given[matrix * 8 + r][c / 2] >> c % 2 * 16 & 0xffff;
        };
        for (int lane = 0; lane < WARP; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int r = lane / 4, c = lane % 4 * 2;
                taken[lane][matrix] = given[0][4] ? element(matrix, c, r) | element(matrix, c + 1, r) << 16
                                                  : element(matrix, r, c) | element(matrix, r, c + 1) << 16;
            }
        }
    });
    for (int i = 0; i < 4; ++i) a[i] = words[i];
}
inline void load_matrices(uint32_t (&a)[4], const uint16_t* row) { spread_matrices(a, row, false); }
inline void load_transposed(uint32_t (&a)[4], const uint16_t* row) { spread_matrices(a, row, true); }

// c (16, 8) += a (16, 16) b (16, 8), each spread over the lanes as PTX says of m16n8k16.
template <class Type> void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t words[8] = {a[0], a[1], a[2], a[3], b0, b1};
    exchange(words, [](auto& given, auto& taken) {
        const auto half = [](uint32_t word, int i) { return Type::widen(word >> i % 2 * 16 & 0xffff); };
        for (int lane = 0; lane < WARP; ++lane) {
            for (int j = 0; j < 4; ++j) {
                const int row = lane / 4 + j / 2 * 8, col = lane % 4 * 2 + j % 2;
                float sum = 0;
                for (int k = 0; k < 16; ++k) {
                    const auto& left = given[row % 8 * 4 + k % 8 / 2];
                    const auto& right = given[col * 4 + k % 8 / 2];
                    sum += half(left[row / 8 + k / 8 * 2], k) * half(right[4 + k / 8], k);
                }
                taken[lane][j] = bits_of(sum);
            }
        }
    });
    for (int j = 0; j < 4; ++j) c[j] += float_of(words[j]);
}

struct BFloat16 {
    static float widen(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
    static uint16_t round(float value) {
        const uint32_t bits = bits_of(value);
        if (std::isnan(value)) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply_tiles<BFloat16>(c, a, b0, b1);
    }
};
struct Float16 {
    static float widen(uint16_t bits) {
        _Float16 value;
        std::memcpy(&value, &bits, 2);
        return value;
    }
    static uint16_t round(float value) {
        const _Float16 rounded = value;
        uint16_t bits;
        std::memcpy(&bits, &rounded, 2);
        return bits;
    }
    static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply_tiles<Float16>(c, a, b0, b1);
    }
};

// mbarriers, in their own 8 bytes.
struct Barrier {
    uint8_t count, pending;
    uint16_t phase;
    int32_t bytes;
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& state_of(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
inline void advance(uint64_t* barrier, int arrivals, int bytes) {
    emulator::released(barrier);
    emulator::Untracked untracked;
    Barrier& state = state_of(barrier);
    if (arrivals > state.pending) throw std::runtime_error("mbarrier: more threads arrived than it waits for");
    state.pending -= arrivals;
    state.bytes += bytes;
    if (state.pending == 0 && state.bytes == 0) {
        state.pending = state.count;
        ++state.phase;
        scheduler().notify(barrier);
    }
}
inline void mbarrier_init(uint64_t* barrier, int count) {
    const Barrier fresh = {static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0, 0};
    std::memcpy(static_cast<void*>(barrier), &fresh, sizeof fresh);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { advance(barrier, 1, 0); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    scheduler().wait(barrier, [&] { return (state_of(barrier).phase & 1) != parity; });
    emulator::acquired(barrier);
}

#if HAS_CLUSTERS
inline void mbarrier_expect(uint64_t* barrier, int bytes) { advance(barrier, 1, bytes); }
template <class T> T* of_peer(T* pointer, int rank) {
    const ptrdiff_t offset = reinterpret_cast<const unsigned char*>(pointer) - shared_memory();
    const int block = block_index() / cluster_size() * cluster_size() + rank;
    return reinterpret_cast<T*>(Machine::instance->blocks[block].memory + offset);
}
inline void mbarrier_arrive_peer(uint64_t* barrier, int rank) { advance(of_peer(barrier, rank), 1, 0); }
inline void mbarrier_wait_peers(uint64_t* barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
template <class T> T peer_load(const T* pointer, int rank) { return *of_peer(pointer, rank); }

inline void copy_now(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    advance(copy.barrier, 0, -copy.bytes);
}
inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (!aligned(to) || !aligned(from) || bytes % 16) throw std::runtime_error("bulk copy: not in units of 16 bytes");
#ifdef __SANITIZE_THREAD__
    copy_now({to, from, bytes, barrier});  // by the thread that asked: ordered by what that one waited for
#else
    Machine::instance->copies.push_back({to, from, bytes, barrier});
#endif
}
inline bool land_a_copy() {
    Machine& machine = *Machine::instance;
    if (machine.copies.empty()) return false;
    const size_t i = scheduler().random() % machine.copies.size();
    const Copy copy = machine.copies[i];
    machine.copies[i] = machine.copies.back();
    machine.copies.pop_back();
    copy_now(copy);
    return true;
}
#else
inline bool land_a_copy() { return false; }
template <class T> T peer_load(const T* pointer, int) { return *pointer; }
inline void copy16(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void copies_arrive(uint64_t* barrier) { advance(barrier, 1, 0); }
#endif

inline void copy_pair(uint16_t* to, const uint16_t* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 4) throw std::runtime_error("copy: not from a multiple of 4 bytes");
    for (int i = 0; i < 2; ++i) to[i] = 2 * i < bytes ? from[i] : 0;
}
inline void copies_wait() {}

// Global memory. Relaxed atomics order nothing.
template <class T> T load_l2(const T* pointer) { return *pointer; }
inline void add_float4(float* to, float4 value) {
    const float values[4] = {value.x, value.y, value.z, value.w};
    for (int i = 0; i < 4; ++i) {
        uint32_t* word = reinterpret_cast<uint32_t*>(to + i);
        uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(word, &old, bits_of(float_of(old) + values[i]), true, __ATOMIC_RELAXED,
                                            __ATOMIC_RELAXED)) {
        }
    }
}
inline int add_acquire_release(int* to, int value) {
    scheduler().yield();
    return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL);
}
inline int load_acquire(const int* from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void pause() { scheduler().yield(); }

// Host side.
inline Device read_limits(int) { return {GFWSVD_EMULATED, settings.num_sms, settings.shared_bytes}; }
template <class Kernel> int count_resident(Kernel, const Launch& launch, int num_sms) {
    return num_sms / launch.cluster;
}

// Shared memory is lost when the last thread of a block ends: a peer that still reads it gets NaN, and is caught.
inline void end_thread() {
    Block& block = this_block();
    emulator::released(&block);
    bool last;
    {
        emulator::Untracked untracked;
        last = ++block.gone == THREADS;
    }
    if (!last) return;
    emulator::acquired(&block);
    std::memset(block.memory, 0xff, Machine::instance->launch.shared_bytes);
}

template <class Kernel>
void launch_kernel(Kernel kernel, const Launch& launch, const Group& group, void*, bool) {
    Machine machine;
    machine.launch = launch;
    machine.blocks.resize(launch.grid);
    machine.clusters.resize(launch.grid / launch.cluster);
    std::vector<std::unique_ptr<void, decltype(&std::free)>> memories;
    emulator::Scheduler fibers(settings.seed);
    for (int block = 0; block < launch.grid; ++block) {
        memories.emplace_back(std::aligned_alloc(128, (launch.shared_bytes + 127) / 128 * 128), &std::free);
        std::memset(memories.back().get(), 0xff, launch.shared_bytes);
        machine.blocks[block].memory = static_cast<unsigned char*>(memories.back().get());
        for (int thread = 0; thread < launch.threads; ++thread) {
            fibers.add(block, thread, [kernel, &group] {
                kernel(group);
                end_thread();
            });
        }
    }
    Machine::instance = &machine;
    cluster_turns.clear();
    fibers.run(land_a_copy);
    if (!machine.copies.empty()) throw std::runtime_error("a copy landed after the kernel had ended");
}

}  // namespace gfwsvd
