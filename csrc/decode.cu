// y = up (down x) for 1 to 8 tokens in one launch: the rank is split over clusters of blocks, without a grid barrier.
//
// A cluster owns ranks [r0, r1). Its blocks share the columns of those rows of `down` (so x is read once a cluster),
// meet, and each adds up all partial z through distributed shared memory: (r1 - r0) x 8 numbers, where partial y would
// be D_OUT x 8. Then the blocks share the columns of those rows of `up` and add their y to the sums in memory. All
// weights stream through one ring in shared memory, which is filled with `up` while z is still being computed.
// Whoever adds the last piece of a block of outputs completes it. Bound by memory: every weight is read once.
#include "finish.cuh"

namespace gfwsvd {

namespace {

constexpr int COL_TILES = WARP_COLS / 16;  // tensor-core tiles of 16 columns of up that a warp computes

// The part of a projection that this block computes in the second phase.
struct Part {
    Range ranks;  // of the projection, those of the cluster
    Range cols;   // of up, those of the block
    int tiles;    // that the columns are cut into
    int first;    // tile to begin with: blocks of outputs are completed all over the GPU, not all at the end by one
    int local;    // of the first rank among those of the cluster
};

DEVICE Part part_of(const Group& group, const Projection& p, Range ranks, int cluster) {
    Part part;
    part.ranks = intersect(ranks, p.z_start, p.rank);
    part.cols = share(p.pitch, 32, cluster_rank(), cluster_size());
    part.tiles = part.ranks.size() ? (part.cols.size() + TILE - 1) / TILE : 0;
    part.first = part.tiles ? cluster % part.tiles : 0;
    part.local = p.z_start + part.ranks.begin - ranks.begin;
    return part;
}

DEVICE Range tile_columns(const Part& part, int i) {
    const int tile = (part.first + i) % part.tiles, begin = part.cols.begin + tile * TILE;
    return {begin, min(begin + TILE, part.cols.end)};
}

DEVICE void fill_up(const Group& group, Ring& ring, Range ranks, int cluster) {
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& p = group.projections[i];
        const Part part = part_of(group, p, ranks, cluster);
        for (int j = 0; j < part.tiles; ++j) {
            const Range cols = tile_columns(part, j);
            for (int row = part.ranks.begin; row < part.ranks.end; row += ROWS) {
                const uint16_t* from = group.up + p.up_start + static_cast<long long>(row) * p.pitch + cols.begin;
                ring.fill(from, p.pitch, min(ROWS, part.ranks.end - row), cols.size());
            }
        }
    }
}

// Lane l holds tokens 2 (l % 4) and the next of columns l / 4 and l / 4 + 8 of each tile. Four lanes exchange theirs,
// so that each has four columns in a row, which one vector instruction adds to memory.
DEVICE void add_to_sums(const Group& group, float* sums, const float (&y)[COL_TILES][4], int num_cols) {
    const int lane = lane_index(), quarter = lane / 4 % 4;
#pragma unroll
    for (int i = 0; i < COL_TILES; i += 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float v[4] = {y[i][j], y[i][2 + j], y[i + 1][j], y[i + 1][2 + j]};  // 8-column groups 0 to 3 of 32 columns
#pragma unroll
            for (int bit = 1; bit <= 2; bit *= 2) {  // transpose the 4 x 4 numbers, by 1 x 1 and by 2 x 2 blocks
                const bool upper = quarter & bit;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if (k & bit) continue;
                    const float other = shuffle_xor(upper ? v[k] : v[k | bit], 4 * bit);
                    if (upper) v[k] = other; else v[k | bit] = other;
                }
            }
            const int col = warp_index() * WARP_COLS + i * 16 + quarter * 8 + lane / 16 * 4, token = lane % 4 * 2 + j;
            if (col < num_cols && token < group.num_tokens) {
                add_float4(sums + static_cast<long long>(token) * group.acc_width + col,
                           make_float4(v[0], v[1], v[2], v[3]));
            }
        }
    }
}

template <class Type>
DEVICE void multiply_up(const Group& group, Ring& ring, Range ranks, int cluster, const uint16_t* z, int z_pitch) {
    const int lane = lane_index(), warp = warp_index();
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& p = group.projections[i];
        const Part part = part_of(group, p, ranks, cluster);
        for (int j = 0; j < part.tiles; ++j) {
            const Range cols = tile_columns(part, j);
            const int num_cols = cols.size(), pitch = stage_pitch(num_cols);
            float y[COL_TILES][4] = {};
            for (int rank = 0; rank < part.ranks.size(); rank += ROWS) {
                const uint16_t* stage = ring.wait();
                uint32_t b[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int k = rank + half * 8 + lane % 4 * 2, count = part.ranks.size();
                    const uint16_t* from = z + lane / 4 * z_pitch + part.local + k;
                    b[half] = (k < count ? from[0] : 0) | (k + 1 < count ? static_cast<uint32_t>(from[1]) << 16 : 0);
                }
                const int row = lane / 16 * 8 + lane % 8;
                const bool inside = rank + row < part.ranks.size();
#pragma unroll
                for (int tile = 0; tile < COL_TILES; ++tile) {
                    const int col = warp * WARP_COLS + tile * 16, mine = col + lane / 8 % 2 * 8;
                    if (col < num_cols) {  // ranks that were not filled would spoil all; columns only themselves
                        uint32_t a[4];
                        load_transposed(a, inside && mine < num_cols ? stage + row * pitch + mine : shared().zeros);
                        Type::multiply(y[tile], a, b[0], b[1]);
                    }
                }
                ring.release();
            }
            add_to_sums(group, group.sums + p.acc_start + cols.begin, y, num_cols);
            announce<Type>(group, p, cols, false);
        }
    }
}

// The partial z of all blocks of the cluster, added up, rounded, [token][rank] in shared memory of each block.
template <class Type>
DEVICE void gather_z(const Group& group, Range ranks, uint16_t* z, int z_pitch) {
    const int num_pairs = (ranks.size() + ROWS - 1) / ROWS * PAIRS;
    for (int pair = thread_index(); pair < num_pairs; pair += CONSUMERS) {
        const Place at = place<1>(pair);
        const float2 sum = sum_of_peers(shared_at<float2>(group.sums_at) + pair);
        z[at.token * z_pitch + at.row] = Type::round(sum.x);
        z[(at.token + 1) * z_pitch + at.row] = Type::round(sum.y);
    }
    together();
}

// In the pivoted form some outputs are z itself: one block of the cluster stores it, and says so for all outputs.
template <class Type>
DEVICE void store_z(const Group& group, Range ranks, const uint16_t* z, int z_pitch) {
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& p = group.projections[i];
        const Range mine = intersect(ranks, p.z_start, p.rank);
        if (!p.pivoted || mine.size() == 0) continue;
        for (int j = thread_index(); j < mine.size() * group.num_tokens; j += CONSUMERS) {
            const int token = j / mine.size(), rank = mine.begin + j % mine.size();
            group.z[static_cast<long long>(token) * group.z_width + p.z_column + rank] =
                z[token * z_pitch + p.z_start + rank - ranks.begin];
        }
        announce<Type>(group, p, {0, 0}, true);
    }
}

template <class Type> KERNEL decode_kernel(const GRID_CONSTANT Group group) {
    const int cluster = block_index() / cluster_size();
    const Range ranks = {group.cuts[cluster], group.cuts[cluster + 1]};
    const Range inputs = share(group.d_in, 16, cluster_rank(), cluster_size());
    Ring ring(group);
    if (warp_index() == WARPS) {
        start_ring(group);
        fill_down(group, ring, ranks, inputs);
        fill_up(group, ring, ranks, cluster);
        cluster_wait();
    } else {
        await_ring();
        multiply_down<Type, 1>(group, ring, ranks, inputs);
        cluster_wait();  // all blocks of the cluster run, and their barriers exist
        Peers peers;
        peers.meet();
        uint16_t* z = shared_at<uint16_t>(group.z_at);
        const int z_pitch = (ranks.size() + ROWS - 1) / ROWS * ROWS + 8;
        gather_z<Type>(group, ranks, z, z_pitch);
        if (cluster_rank() == 0) store_z<Type>(group, ranks, z, z_pitch);
        multiply_up<Type>(group, ring, ranks, cluster, z, z_pitch);
    }
    cluster_arrive();  // a block stays until its peers have read its partial z
    cluster_wait();
}

template <class F> auto with_kernel(Half half, F&& use) {
    return half == Half::BF16 ? use(decode_kernel<BFloat16>) : use(decode_kernel<Float16>);
}

}  // namespace

int resident_decode(Half half, const Launch& launch, int num_sms) {
    return with_kernel(half, [&](auto kernel) { return count_resident(kernel, launch, num_sms); });
}

void launch_decode(const Group& group, Half half, const Launch& launch, void* stream) {
    with_kernel(half, [&](auto kernel) {
        launch_kernel(kernel, launch, group, stream, false);
        return 0;
    });
}

}  // namespace gfwsvd
