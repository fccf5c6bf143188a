// From the sizes of a group to what its launches are told: checks, the numbers of layout.py, grid, shared memory.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "group.h"

namespace gfwsvd {

struct ValueError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts> void require(bool good, const Parts&... parts) {
    if (good) return;
    std::string text;
    ((text += [](const auto& part) {
        if constexpr (std::is_convertible_v<decltype(part), std::string>) return std::string(part);
        else return std::to_string(part);
    }(parts)), ...);
    throw ValueError(text);
}

constexpr long long MOST = 1 << 23;  // see `share`
constexpr int SIZES = 5;  // of each projection: rank, d_out, pitch, pivoted, chunk
inline int ceil_div(long long a, int b) { return static_cast<int>((a + b - 1) / b); }
inline int rounded_up(long long a, int b) { return ceil_div(a, b) * b; }

// Where things lie in table and workspace, and how much of each there has to be.
struct Needs {
    int sync_start = 0, z_start = 0, table = 0, workspace = 0;
};

inline Needs lay_out(Group& group, const std::vector<long long>& sizes, bool silu_mul) {
    const int count = static_cast<int>(sizes.size()) / SIZES;
    require(!sizes.empty() && sizes.size() % SIZES == 0, "sizes must be ", SIZES,
            " numbers (rank, d_out, pitch, pivoted, chunk) for each projection, got ", sizes.size());
    require(count <= MAX_PROJECTIONS, "a group must have at most ", MAX_PROJECTIONS, " projections, got ", count);
    require(!silu_mul || count == 2, "silu_mul takes two projections, got ", count);
    group.num_projections = count;
    group.silu_mul = silu_mul;
    Needs needs;
    long long z = 0, z_column = 0, acc = 0, out = 0, up = 0, table = FIELDS * count;
    int block = 0;
    for (int i = 0; i < count; ++i) {
        const long long *s = sizes.data() + i * SIZES, rank = s[0], d_out = s[1], pitch = s[2], chunk = s[4];
        const std::string of = " of projection " + std::to_string(i);
        require(rank >= 1 && rank < MOST, "the rank", of, " must be from 1 to 2^23 - 1, got ", rank);
        require(d_out >= 1 && d_out < MOST, "d_out", of, " must be from 1 to 2^23 - 1, got ", d_out);
        require(s[3] == 0 || s[3] == 1, "pivoted", of, " must be 0 or 1, got ", s[3]);
        require(!s[3] || rank <= d_out, "a pivoted projection has at most as many ranks as outputs, got ", rank,
                " and ", d_out, of);
        const long long rest = s[3] ? d_out - rank : d_out, blocks = ceil_div(d_out, OUT_BLOCK);
        const long long most = s[3] ? rest + blocks * (ALIGN - 1) : rounded_up(rest, ALIGN);
        require(pitch % ALIGN == 0 && pitch >= rest && pitch <= most, "the pitch", of, " must be a multiple of ",
                ALIGN, " from ", rest, " to ", most, ", got ", pitch);
        require(chunk >= 1 && chunk <= rank, "the chunk", of, " must be from 1 to its rank ", rank, ", got ", chunk);
        Projection& p = group.projections[i];
        p = {};
        p.rank = rank, p.d_out = d_out, p.pitch = pitch, p.pivoted = s[3];
        p.z_start = z, p.z_column = z_column, p.acc_start = acc, p.out_start = out, p.up_start = up;
        p.first_block = silu_mul ? 0 : block, p.num_blocks = blocks, p.bounds = table;
        z += rank, z_column += rank + rank % 2, acc += pitch, out += d_out, up += rank * pitch;
        block += blocks, table += blocks + 1;
        group.pivoted |= p.pivoted;
    }
    require(up < 1LL << 31 && std::max({z, acc, out}) < MOST,
            "a group must have fewer than 2^31 elements of up, 2^23 ranks and 2^23 outputs: split it");
    require(!silu_mul || group.projections[0].d_out == group.projections[1].d_out,
            "silu_mul takes projections of one d_out, got ", group.projections[0].d_out, " and ",
            group.projections[1].d_out);
    for (int i = 0; i < count && group.pivoted; ++i) {
        group.projections[i].source = table;
        table += group.projections[i].d_out;
    }
    group.rank = z, group.z_width = z_column, group.acc_width = acc;
    group.out_width = silu_mul ? group.projections[0].d_out : out;
    group.num_blocks = silu_mul ? group.projections[0].num_blocks : block;
    needs.table = table;
    const long long sums = (group.pivoted ? SOME_TOKENS : FEW_TOKENS) * acc;
    const long long z_start = (sums + group.num_blocks + BARRIERS + 3) / 4 * 4, workspace = z_start + SOME_TOKENS * z;
    require(workspace < 1LL << 31, "a workspace must have fewer than 2^31 elements, got ", workspace,
            ": split the group");
    needs.sync_start = sums, needs.z_start = z_start, needs.workspace = workspace;
    return needs;
}

constexpr int MAX_RANKS = 512;  // of a cluster in `decode`, so that z leaves room for the ring

// Offsets in shared memory; the stages of the ring take what is left.
inline void place_stages(Group& group, Launch& launch, int fixed, int limit, int wanted) {
    group.stages_at = rounded_up(fixed, 128);
    const int fit = (limit - group.stages_at) / STAGE_BYTES;
    require(fit >= 2, "the launch needs ", group.stages_at + 2 * STAGE_BYTES,
            " bytes of shared memory, the device has ", limit, " for a block");
    group.stages = launch.stages = std::max(2, std::min({fit, MAX_STAGES, wanted}));
    launch.shared_bytes = group.stages_at + group.stages * STAGE_BYTES;
}

inline int choose_cluster(const Device& device, int cluster) {
    require(device.arch >= 80, "compute capability 8.0 or later is needed, got ", device.arch / 10, ".",
            device.arch % 10);
    require(cluster == 0 || cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8,
            "cluster must be 1, 2, 4 or 8, or 0 for the default, got ", cluster);
    require(cluster <= 1 || device.arch >= 90, "clusters need compute capability 9.0 or later, got ", device.arch / 10,
            ".", device.arch % 10);
    return cluster ? cluster : device.arch >= 90 ? 4 : 1;
}

inline void check_tokens(const char* kernel, int most, int num_tokens) {
    require(num_tokens >= 1 && num_tokens <= most, kernel, " takes 1 to ", most, " tokens, got ", num_tokens);
}

// Deal out units to clusters by cost: projection i has `units[i]` of `costs[i]` each.
inline void deal(Group& group, int clusters, const long long* units, const long long* costs) {
    require(clusters <= MAX_CLUSTERS, "a launch has at most ", MAX_CLUSTERS, " clusters, got ", clusters,
            ": take larger ones, or split the group");
    long long total = 0, before = 0, passed = 0;
    for (int i = 0; i < group.num_projections; ++i) total += units[i] * costs[i];
    group.num_clusters = clusters;
    for (int cluster = 0, i = 0; cluster <= clusters; ++cluster) {
        const long long target = total * cluster / clusters;
        while (i < group.num_projections && target >= passed + units[i] * costs[i]) {
            passed += units[i] * costs[i];
            before += units[i++];
        }
        group.cuts[cluster] = static_cast<int>(before + (i < group.num_projections ? (target - passed) / costs[i] : 0));
    }
}

// `resident(launch)` says how many clusters fit the device at once.
template <class Resident>
Launch plan_decode(Group& group, const Device& device, int cluster, int stages, Resident&& resident) {
    Launch launch = {0, choose_cluster(device, cluster), THREADS, 0, 0};
    check_tokens("decode", FEW_TOKENS, group.num_tokens);
    long long units[MAX_PROJECTIONS], costs[MAX_PROJECTIONS];
    for (int i = 0; i < group.num_projections; ++i) {
        units[i] = group.projections[i].rank;
        costs[i] = group.d_in + group.projections[i].pitch;
    }
    const auto place = [&](int clusters) {
        deal(group, clusters, units, costs);
        int most = 0;
        for (int i = 0; i < clusters; ++i) most = std::max(most, group.cuts[i + 1] - group.cuts[i]);
        const int groups = ceil_div(most, ROWS);
        group.parts_at = AFTER_HEADER;
        group.sums_at = group.parts_at + 2 * WARPS * 2 * WARP * 8;
        group.z_at = group.sums_at + groups * 2 * WARP * 8;
        place_stages(group, launch, group.z_at + FEW_TOKENS * (groups * ROWS + 8) * 2, device.shared_bytes,
                     stages ? stages : MAX_STAGES);
    };
    // More clusters than the device holds at once are no harm, but waste: only where z would not leave room.
    int clusters = std::min(group.rank, std::max(1, device.num_sms / launch.cluster));
    while (ceil_div(group.rank, clusters) > MAX_RANKS) clusters *= 2;
    place(clusters);
    const int fit = resident(launch);
    require(fit >= 1, "the device cannot run a cluster of ", launch.cluster, " blocks of ", launch.shared_bytes,
            " bytes of shared memory");
    if (fit < clusters && ceil_div(group.rank, fit) <= MAX_RANKS) place(clusters = fit);
    launch.grid = clusters * launch.cluster;
    for (int i = 0; i < group.num_projections; ++i) {
        Projection& p = group.projections[i];
        p.arrivals = 0;
        for (int j = 0; j < clusters; ++j) {
            p.arrivals += intersect({group.cuts[j], group.cuts[j + 1]}, p.z_start, p.rank).size() > 0;
        }
        p.z_arrivals = p.pivoted ? p.arrivals : 0;
    }
    return launch;
}

template <class Resident>
Launch plan_persistent(Group& group, const Device& device, int cluster, int stages, Resident&& resident) {
    Launch launch = {0, choose_cluster(device, cluster), THREADS, 0, 0};
    check_tokens("persistent", SOME_TOKENS, group.num_tokens);
    const int tiles = group.num_tokens <= 16 ? 2 : group.num_tokens <= 32 ? 4 : 8, padded = tiles * 8;
    const bool paired = is_paired(group);
    group.window_tile = paired && tiles == 8 ? HALF_COLS / 2 : HALF_COLS;
    group.parts_at = group.z_at = AFTER_HEADER;  // the two phases use the same room
    group.sums_at = group.parts_at + 2 * WARPS * tiles * 2 * WARP * 8;
    group.partial_at = group.z_at + padded * (WINDOW + 8) * 2;
    const int first = group.sums_at + PASS_ROWS / ROWS * tiles * 2 * WARP * 8;
    const bool behind = paired && group.window_tile == HALF_COLS;  // y of the second projection: else beside the first
    const int second = group.partial_at + (behind ? 2 : 1) * padded * (HALF_COLS + 4) * 4;
    place_stages(group, launch, std::max(first, second), device.shared_bytes, stages ? stages : MAX_STAGES);
    const int fit = resident(launch);
    require(fit >= 1, "the device cannot run a cluster of ", launch.cluster, " blocks of ", launch.shared_bytes,
            " bytes of shared memory");
    long long units[MAX_PROJECTIONS], costs[MAX_PROJECTIONS];
    for (int i = 0; i < group.num_projections; ++i) {
        units[i] = column_units(group, i);
        costs[i] = paired ? group.rank : group.projections[i].rank;
    }
    deal(group, std::min(fit, std::max(1, device.num_sms / launch.cluster)), units, costs);
    launch.grid = group.num_clusters * launch.cluster;
    for (int i = 0; i < group.num_projections; ++i) {
        Projection& p = group.projections[i];
        p.arrivals = launch.cluster;
        p.z_arrivals = p.pivoted;
    }
    return launch;
}

}  // namespace gfwsvd
