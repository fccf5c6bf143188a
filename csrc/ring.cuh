// What both kernels share: the ring through which all weights stream, the product with `down`, the meeting of a
// cluster, and the completion of a block of outputs by whoever comes last.
#pragma once

#include "common.cuh"

namespace gfwsvd {

enum NamedBarrier { READY = 1, TOGETHER = 2 };  // 0 is __syncthreads, which is not used

// Where things lie in shared memory, ahead of the parts whose offsets the host chose.
struct Shared {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES], peers;
    uint32_t finished;  // blocks of outputs that this block of threads completes
    alignas(16) uint16_t zeros[8];
};
static_assert(sizeof(Shared) <= AFTER_HEADER);

DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }
template <class T> DEVICE T* shared_at(int offset) { return reinterpret_cast<T*>(shared_memory() + offset); }
DEVICE int lane_index() { return thread_index() % WARP; }
DEVICE int warp_index() { return thread_index() / WARP; }
DEVICE void together() { named_sync(TOGETHER, CONSUMERS); }

// Rows of a stage start at odd multiples of 16 bytes, so that the 8 rows of a matrix lie in different banks.
DEVICE int stage_pitch(int cols) { return (cols / 8 | 1) * 8; }

// A ring of stages: one warp fills them, the others use and release them. It runs ahead of its users by as many stages
// as there are, across all boundaries of what they compute.
struct Ring {
    unsigned char* stages;
    int depth, slot = 0;
    uint32_t phase = 0;

    DEVICE explicit Ring(const Group& group) : stages(shared_memory() + group.stages_at), depth(group.stages) {}

    // By one whole warp: `rows` rows of `cols` elements (multiples of 8).
    DEVICE void fill(const uint16_t* from, long long stride, int rows, int cols) {
        uint64_t* full = shared().full + slot;
        mbarrier_wait(shared().empty + slot, phase ^ 1);  // free at first, and whenever all warps released it
        unsigned char* to = stages + slot * STAGE_BYTES;
        const int pitch = stage_pitch(cols) * 2;
#if HAS_CLUSTERS
        if (lane_index() == 0) mbarrier_expect(full, rows * cols * 2);
        sync_warp();
        for (int row = lane_index(); row < rows; row += WARP) {
            bulk_copy(to + row * pitch, from + row * stride, cols * 2, full);
        }
#else
        for (int row = 0; row < rows; ++row) {
#pragma unroll 1
            for (int col = lane_index() * 8; col < cols; col += WARP * 8) {
                copy16(to + row * pitch + col * 2, from + row * stride + col);
            }
        }
        copies_arrive(full);
#endif
        sync_warp();
        advance();
    }

    DEVICE const uint16_t* wait() {
        mbarrier_wait(shared().full + slot, phase);
        return reinterpret_cast<const uint16_t*>(stages + slot * STAGE_BYTES);
    }

    DEVICE void release() {
        sync_warp();  // all lanes have read
        if (lane_index() == 0) mbarrier_arrive(shared().empty + slot);
        advance();
    }

    DEVICE void advance() {
        if (++slot == depth) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// By the warp that fills the ring, before anything else: from here on the barriers exist.
DEVICE void start_ring(const Group& group) {
    const int i = lane_index();
    if (i < group.stages) {
        mbarrier_init(shared().full + i, HAS_CLUSTERS ? 1 : WARP);
        mbarrier_init(shared().empty + i, WARPS);
    }
    if (i == 0) mbarrier_init(&shared().peers, cluster_size());
    mbarrier_init_fence();
    sync_warp();
    named_arrive(READY, THREADS);
    cluster_arrive();
}

// By the others.
DEVICE void await_ring() {
    if (thread_index() < 8) shared().zeros[thread_index()] = 0;
    named_sync(READY, THREADS);
    cluster_arrive();
}

// The consumers of all blocks of a cluster wait for one another and see what the others wrote to shared memory. Not the
// barrier of the cluster: that one would wait for the warps that fill the rings, too.
struct Peers {
    uint32_t phase = 0;

    DEVICE void meet() {
        together();  // the thread that arrives below does so for what all threads of its block wrote
#if HAS_CLUSTERS
        if (cluster_size() == 1) return;
        if (thread_index() < cluster_size()) mbarrier_arrive_peer(&shared().peers, thread_index());
        mbarrier_wait_peers(&shared().peers, phase);
        phase ^= 1;
#endif
    }
};

DEVICE uint32_t load_pair(const uint16_t* from) { return *reinterpret_cast<const uint32_t*>(from); }

// z = x downᵀ for some rows of down (ranks) and columns (inputs): fill_down streams, multiply_down multiplies.
DEVICE void fill_down(const Group& group, Ring& ring, Range rows, Range cols) {
    for (int col = cols.begin; col < cols.end; col += TILE) {
        for (int row = rows.begin; row < rows.end; row += ROWS) {
            const uint16_t* from = group.down + static_cast<long long>(row) * group.d_in + col;
            ring.fill(from, group.d_in, min(ROWS, rows.end - row), min(TILE, cols.end - col));
        }
    }
}

// The sums are left in shared memory as tensor cores give them: for each 16 rows, 8 tokens and half of the 8 rows one
// pair (tokens 2 (l % 4) and the next, row l / 4) for each lane l. `place` undoes that.
constexpr int PAIRS = 2 * WARP;  // of 16 rows and 8 tokens

struct Place {
    int row, token;
};
template <int TOKEN_TILES> DEVICE Place place(int pair) {
    const int lane = pair % WARP, half = pair / WARP % 2, tile = pair / PAIRS;
    return {tile / TOKEN_TILES * ROWS + half * 8 + lane / 4, tile % TOKEN_TILES * 8 + lane % 4 * 2};
}

template <class Type, int TOKEN_TILES>
DEVICE void multiply_down(const Group& group, Ring& ring, Range rows, Range cols) {
    constexpr int STEPS = WARP_COLS / 16, STAGE_PAIRS = TOKEN_TILES * PAIRS;
    const int lane = lane_index(), warp = warp_index(), thread = thread_index();
    float2* sums = shared_at<float2>(group.sums_at);
    const int num_groups = (rows.size() + ROWS - 1) / ROWS;
    if (cols.size() == 0) {
        for (int i = thread; i < num_groups * STAGE_PAIRS; i += CONSUMERS) sums[i] = make_float2(0, 0);
    }
    int parity = 0;
    for (int tile = cols.begin; tile < cols.end; tile += TILE) {
        const int num_cols = min(TILE, cols.end - tile), pitch = stage_pitch(num_cols);
        uint32_t x[STEPS][TOKEN_TILES][2];  // this warp's columns, for all rows
        const int first = warp * WARP_COLS + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            const int token = n * 8 + lane / 4;
            const uint16_t* from = group.x + token * group.stride_xt + tile + first;
#pragma unroll
            for (int i = 0; i < STEPS * 2; ++i) {
                const bool inside = token < group.num_tokens && first + i * 8 < num_cols;
                x[i / 2][n][i % 2] = inside ? load_pair(from + i * 8) : 0;
            }
        }
        for (int i = 0; i < num_groups; ++i) {
            const uint16_t* stage = ring.wait();
            float z[TOKEN_TILES][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int col = warp * WARP_COLS + step * 16;
                if (col < num_cols) {  // rows that were not filled spoil only themselves, columns would spoil all
                    const int mine = col + lane / 16 * 8;
                    uint32_t a[4];
                    load_matrices(a, mine < num_cols ? stage + lane % 16 * pitch + mine : shared().zeros);
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) Type::multiply(z[n], a, x[step][n][0], x[step][n][1]);
                }
            }
            ring.release();
            // Two buffers take turns, so one barrier a stage is enough: who writes a buffer again has passed the
            // barrier of the stage between, and so has everybody who read it.
            float2* parts = shared_at<float2>(group.parts_at) + parity * WARPS * STAGE_PAIRS;
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                parts[(warp * TOKEN_TILES + n) * PAIRS + lane] = make_float2(z[n][0], z[n][1]);
                parts[(warp * TOKEN_TILES + n) * PAIRS + WARP + lane] = make_float2(z[n][2], z[n][3]);
            }
            together();
#pragma unroll 1
            for (int pair = thread; pair < STAGE_PAIRS; pair += CONSUMERS) {
                float2* sum = sums + i * STAGE_PAIRS + pair;
                float2 value = tile == cols.begin ? make_float2(0, 0) : *sum;
                for (int w = 0; w < WARPS; ++w) {
                    const float2 part = parts[w * STAGE_PAIRS + pair];
                    value.x += part.x;
                    value.y += part.y;
                }
                *sum = value;
            }
            parity ^= 1;
        }
    }
}

// Sums over all blocks of the cluster, always in the same order.
DEVICE float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

template <class T> DEVICE T sum_of_peers(const T* from) {
    T parts[MAX_CLUSTER];  // all loads are under way before the first is used
#pragma unroll
    for (int rank = 0; rank < MAX_CLUSTER; ++rank) {
        if (rank < cluster_size()) parts[rank] = peer_load(from, rank);
    }
    T sum = parts[0];
#pragma unroll
    for (int rank = 1; rank < MAX_CLUSTER; ++rank) {
        if (rank < cluster_size()) sum = add(sum, parts[rank]);
    }
    return sum;
}

}  // namespace gfwsvd
