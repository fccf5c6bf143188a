// y = up (down x) for 1 to 64 tokens in one cooperative launch, with a fixed order of additions.
//
// First a cluster owns ranks: its blocks share the columns of those rows of `down`, add up z through distributed shared
// memory and store it. Then all blocks wait for one another, and a cluster owns columns of `up`, whose ranks its blocks
// share; they add up y through distributed shared memory and store it. While they wait, the ring that all weights
// stream through already takes in their part of `up`, as much as fits, so the memory system does not idle.
// Bound by memory for few tokens; x and z are read once a cluster, which matters for many.
#include "finish.cuh"

namespace gfwsvd {

namespace {

constexpr int COL_TILES = HALF_COLS / (WARPS * 16);  // tensor-core tiles of 16 columns of up that a warp computes
constexpr int Z_PITCH = WINDOW + 8;                  // elements; rows of z start 16 bytes apart modulo all banks
constexpr int UP_ROWS = 2 * ROWS;                    // ranks of a stage
constexpr int Y_PITCH = HALF_COLS + 4;  // floats; 4 tokens and 8 columns of a warp lie in different banks

// What a cluster and its block have of a projection in the second phase: columns of up, cut into tiles of
// `group.window_tile`, and of its ranks those of the block.
DEVICE Range columns_of(const Group& group, int i, int cluster) {
    const Range units = {group.cuts[cluster], group.cuts[cluster + 1]};
    int before = 0;
    for (int j = 0; j < i; ++j) before += column_units(group, j);
    const Projection& p = group.projections[i];
    const Range mine = intersect(units, before, column_units(group, i));
    return {min(mine.begin * UNIT, p.pitch), min(mine.end * UNIT, p.pitch)};
}

DEVICE Range ranks_of(const Projection& p) { return share(p.rank, 16, cluster_rank(), cluster_size()); }

DEVICE void fill_up(const Group& group, Ring& ring, int cluster) {
    for (int i = 0; i < group.num_projections; ++i) {
        const Range cols = columns_of(group, i, cluster);
        for (int col = cols.begin; col < cols.end; col += group.window_tile) {
            for (int pair = i; pair < (is_paired(group) ? 2 : i + 1); ++pair) {
                const Projection& p = group.projections[pair];
                const Range ranks = ranks_of(p);
                for (int row = ranks.begin; row < ranks.end; row += UP_ROWS) {
                    const uint16_t* from = group.up + p.up_start + static_cast<long long>(row) * p.pitch + col;
                    ring.fill(from, p.pitch, min(UP_ROWS, ranks.end - row), min(group.window_tile, cols.end - col));
                }
            }
        }
    }
}

// z of ranks [first, end) of a projection, up to WINDOW of them and zeros behind, from memory to shared memory.
DEVICE void load_window(const Group& group, const Projection& p, int first, int end, uint16_t* window) {
    const int count = min(WINDOW, (end - first + UP_ROWS - 1) / UP_ROWS * UP_ROWS) / 2;
    together();  // nobody reads the last window any more
    for (int j = thread_index(); j < count * group.num_tokens; j += CONSUMERS) {
        const int token = j / count, rank = first + j % count * 2;
        const uint16_t* from = group.z + static_cast<long long>(token) * group.z_width + p.z_column;
        const int bytes = min(max(end - rank, 0), 2) * 2;  // an odd rank ends in half a pair
        copy_pair(window + token * Z_PITCH + j % count * 2, from + (bytes ? rank : 0), bytes);
    }
    copies_wait();
    together();
}

// Partial y of a tile of columns over the ranks of the block, [token][column] in shared memory.
template <class Type, int TOKEN_TILES>
DEVICE void multiply_up(const Group& group, Ring& ring, const Projection& p, int num_cols, float* partial) {
    const int lane = lane_index(), warp = warp_index(), pitch = stage_pitch(num_cols);
    const Range ranks = ranks_of(p);
    uint16_t* window = shared_at<uint16_t>(group.z_at);
    float y[COL_TILES][TOKEN_TILES][4] = {};
    for (int rank = ranks.begin; rank < ranks.end; rank += UP_ROWS) {
        const int within = (rank - ranks.begin) % WINDOW;
        if (within == 0) load_window(group, p, rank, ranks.end, window);
        const uint16_t* stage = ring.wait();
#pragma unroll
        for (int step = 0; step < UP_ROWS / 16; ++step) {
            const int row = step * 16 + lane / 16 * 8 + lane % 8;
            const bool inside = rank + row < ranks.end;
            uint32_t a[COL_TILES][4];
#pragma unroll
            for (int i = 0; i < COL_TILES; ++i) {
                const int col = (warp * COL_TILES + i) * 16 + lane / 8 % 2 * 8;
                load_transposed(a[i], inside && col < num_cols ? stage + row * pitch + col : shared().zeros);
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {  // tokens past the last spoil only themselves
                const uint16_t* b = window + (n * 8 + lane / 4) * Z_PITCH + within + step * 16 + lane % 4 * 2;
                const uint32_t b0 = load_pair(b), b1 = load_pair(b + 8);
#pragma unroll
                for (int i = 0; i < COL_TILES; ++i) Type::multiply(y[i][n], a[i], b0, b1);
            }
        }
        ring.release();
    }
#pragma unroll
    for (int i = 0; i < COL_TILES; ++i) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int col = (warp * COL_TILES + i) * 16 + j / 2 * 8 + lane / 4;
                const int token = n * 8 + lane % 4 * 2 + j % 2;
                if (col < num_cols) partial[token * Y_PITCH + col] = y[i][n][j];
            }
        }
    }
}

// The partial y of all blocks of the cluster, added up, each block some of them: to y, or where outputs come in another
// order to the sums in memory, which `finish_block` gathers.
template <class Type>
DEVICE void store_tile(const Group& group, const Projection& p, Range cols, const float* partial, int other_at) {
    const int quads = cols.size() / 4, step = cluster_size() * CONSUMERS;
#pragma unroll 1
    for (int i = cluster_rank() * CONSUMERS + thread_index(); i < quads * group.num_tokens; i += step) {
        const int token = i / quads, col = i % quads * 4;
        const float* part = partial + token * Y_PITCH + col;
        const float4 sum = sum_of_peers(reinterpret_cast<const float4*>(part));
        if (group.pivoted) {
            const long long at = static_cast<long long>(token) * group.acc_width + p.acc_start + cols.begin + col;
            *reinterpret_cast<float4*>(group.sums + at) = sum;
            continue;
        }
        float4 other = make_float4(0, 0, 0, 0);
        if (group.silu_mul) other = sum_of_peers(reinterpret_cast<const float4*>(part + other_at));
        const float y[4] = {sum.x, sum.y, sum.z, sum.w}, y1[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int out = cols.begin + col + j;
            if (out >= p.d_out) break;
            float value = y[j] + (group.bias ? Type::widen(group.bias[p.out_start + out]) : 0.0f);
            if (group.silu_mul) {
                value = silu(value) * (y1[j] + (group.bias ? Type::widen(group.bias[p.d_out + out]) : 0.0f));
            }
            group.y[static_cast<long long>(token) * group.out_width + p.out_start + out] = Type::round(value);
        }
    }
}

// All blocks of the launch wait for one another. The two counters are zero before and after.
DEVICE void grid_barrier(const Group& group, Peers& peers) {
    peers.meet();  // one arrival, below, releases what all blocks of the cluster wrote
    if (thread_index() == 0) {
        if (cluster_rank() == 0) add_acquire_release(group.barrier, 1);
        while (load_acquire(group.barrier) < group.num_clusters) pause();
        if (add_acquire_release(group.barrier + 1, 1) == grid_size() - 1) {  // everybody has seen the first counter
            group.barrier[0] = 0;
            group.barrier[1] = 0;
        }
    }
    together();
}

// z of a cluster's ranks, in passes of as many as shared memory has room for.
template <class Type, int TOKEN_TILES>
DEVICE void compute_z(const Group& group, Ring& ring, Peers& peers, Range ranks, Range inputs) {
    for (int first = ranks.begin; first < ranks.end; first += PASS_ROWS) {
        const Range rows = {first, min(first + PASS_ROWS, ranks.end)};
        if (first > ranks.begin) peers.meet();  // the peers have read the sums of the last pass
        multiply_down<Type, TOKEN_TILES>(group, ring, rows, inputs);
        peers.meet();
        const int num_pairs = (rows.size() + ROWS - 1) / ROWS * TOKEN_TILES * PAIRS;
#pragma unroll 1
        for (int pair = cluster_rank() * CONSUMERS + thread_index(); pair < num_pairs;
             pair += cluster_size() * CONSUMERS) {
            const Place at = place<TOKEN_TILES>(pair);
            const int rank = first + at.row;
            if (rank >= rows.end) continue;
            int i = 0;
            while (i + 1 < group.num_projections && rank >= group.projections[i + 1].z_start) ++i;
            const float2 sum = sum_of_peers(shared_at<float2>(group.sums_at) + pair);
            const int column = group.projections[i].z_column + rank - group.projections[i].z_start;
            uint16_t* z = group.z + static_cast<long long>(at.token) * group.z_width + column;
            if (at.token < group.num_tokens) z[0] = Type::round(sum.x);
            if (at.token + 1 < group.num_tokens) z[group.z_width] = Type::round(sum.y);
        }
    }
}

template <class Type, int TOKEN_TILES>
DEVICE void compute_y(const Group& group, Ring& ring, Peers& peers, int cluster) {
    float* partial = shared_at<float>(group.partial_at);
    // Where y of the second of a pair lies: beside the first if the tile leaves room, else behind.
    const int other_at = group.window_tile < HALF_COLS ? group.window_tile : TOKEN_TILES * 8 * Y_PITCH;
    bool again = false;
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& p = group.projections[i];
        const Range mine = columns_of(group, i, cluster);
        for (int col = mine.begin; col < mine.end; col += group.window_tile) {
            const Range cols = {col, min(col + group.window_tile, mine.end)};
            if (again) peers.meet();  // the peers have read the last tile
            again = true;
#pragma unroll 1
            for (int second = 0; second < (is_paired(group) ? 2 : 1); ++second) {
                const Projection& one = group.projections[i + second];
                multiply_up<Type, TOKEN_TILES>(group, ring, one, cols.size(), partial + second * other_at);
            }
            peers.meet();
            store_tile<Type>(group, p, cols, partial, other_at);
            if (group.pivoted) announce<Type>(group, p, cols, false);
        }
    }
}

template <class Type, int TOKEN_TILES> KERNEL persistent_kernel(const GRID_CONSTANT Group group) {
    const int cluster = block_index() / cluster_size();
    const Range ranks = share(group.rank, 1, cluster, group.num_clusters);
    const Range inputs = share(group.d_in, 16, cluster_rank(), cluster_size());
    Ring ring(group);
    if (warp_index() == WARPS) {
        start_ring(group);
        for (int first = ranks.begin; first < ranks.end; first += PASS_ROWS) {
            fill_down(group, ring, {first, min(first + PASS_ROWS, ranks.end)}, inputs);
        }
        fill_up(group, ring, cluster);
        cluster_wait();
    } else {
        await_ring();
        cluster_wait();  // all blocks of the cluster run, and their barriers exist
        Peers peers;
        compute_z<Type, TOKEN_TILES>(group, ring, peers, ranks, inputs);
        grid_barrier(group, peers);
        if (block_index() == 0) {
            for (int i = 0; i < group.num_projections; ++i) {
                if (group.projections[i].pivoted) announce<Type>(group, group.projections[i], {0, 0}, true);
            }
        }
        compute_y<Type, TOKEN_TILES>(group, ring, peers, cluster);
    }
    cluster_arrive();  // a block stays until its peers have read its partial y
    cluster_wait();
}

template <class Type, class F> auto with_tokens(int num_tokens, F&& use) {
    if (num_tokens <= 16) return use(persistent_kernel<Type, 2>);
    return num_tokens <= 32 ? use(persistent_kernel<Type, 4>) : use(persistent_kernel<Type, 8>);
}

template <class F> auto with_kernel(Half half, int num_tokens, F&& use) {
    return half == Half::BF16 ? with_tokens<BFloat16>(num_tokens, use) : with_tokens<Float16>(num_tokens, use);
}

}  // namespace

int resident_persistent(Half half, int num_tokens, const Launch& launch, int num_sms) {
    return with_kernel(half, num_tokens, [&](auto kernel) { return count_resident(kernel, launch, num_sms); });
}

void launch_persistent(const Group& group, Half half, const Launch& launch, void* stream) {
    with_kernel(half, group.num_tokens, [&](auto kernel) {
        launch_kernel(kernel, launch, group, stream, true);
        return 0;
    });
}

}  // namespace gfwsvd
