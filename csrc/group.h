// What a launch is told of a group of projections. The layout in memory is that of gfwsvd_kernels/layout.py, whose
// numbers are computed again here from the sizes of the projections, so that a kernel starts without loading any.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace gfwsvd {

// Those of layout.py; a test compares them.
constexpr int OUT_BLOCK = 512, ALIGN = 8, FEW_TOKENS = 8, SOME_TOKENS = 64, FIELDS = 12, BARRIERS = 4;

#ifndef GFWSVD_WARPS
#define GFWSVD_WARPS 8
#endif
constexpr int WARP = 32;
constexpr int WARPS = GFWSVD_WARPS;         // that compute; one more fills the ring
constexpr int CONSUMERS = WARPS * WARP;     // threads that compute
constexpr int THREADS = CONSUMERS + WARP;
constexpr int ROWS = 16;                    // rows of a stage of the ring: the height of a tensor-core tile
constexpr int WARP_COLS = 64;               // columns of such a stage that one warp multiplies
constexpr int TILE = WARPS * WARP_COLS;     // columns of such a stage
constexpr int HALF_COLS = TILE / 2;         // columns of a stage of twice the rows
constexpr int STAGE_BYTES = 2 * ROWS * 2 * HALF_COLS + 2 * ROWS * 16;  // either, each row with 16 bytes more
constexpr int MAX_STAGES = 16, MAX_PROJECTIONS = 8, MAX_CLUSTERS = 256, MAX_CLUSTER = 8;
constexpr int AFTER_HEADER = 16 * MAX_STAGES + 64;  // bytes of shared memory in front, for the struct Shared
constexpr int PASS_ROWS = 128;  // ranks of a cluster whose z is summed at a time in the persistent launch
constexpr int WINDOW = 256;     // ranks whose z is in shared memory at a time there
constexpr int UNIT = 32;        // columns of up that one cluster takes there, or a multiple

struct Range {
    int begin, end;
    HOST_DEVICE int size() const { return end - begin; }
};

struct Projection {
    int rank, d_out, pitch, pivoted;
    int z_start;                // first of its rows of down
    int z_column;               // first of its columns in the kernels' z: even, so that pairs can be loaded
    int acc_start, out_start;   // first column in the sums; first output among those of all
    int first_block, num_blocks;
    int bounds, source;         // where these begin in the table
    int arrivals, z_arrivals;   // how often each column of a block is announced, and how often z
    long long up_start;
};

struct Group {
    const uint16_t *x, *down, *up, *bias;  // bias may be null
    const int* table;
    float* sums;
    int* counters;
    int* barrier;
    uint16_t *z, *y;
    long long stride_xt;
    int num_tokens, d_in, rank, acc_width, out_width, z_width, num_blocks, num_projections;
    int silu_mul, pivoted;
    int num_clusters, stages, window_tile;
    int parts_at, sums_at, z_at, partial_at, stages_at;  // offsets in shared memory
    Projection projections[MAX_PROJECTIONS];
    int cuts[MAX_CLUSTERS + 1];  // cluster c has units cuts[c] to cuts[c + 1] of all projections in a row
};

// Where silu(y_0) y_1 is computed without the sums in memory, a cluster has the same columns of both projections.
HOST_DEVICE inline bool is_paired(const Group& group) { return group.silu_mul && !group.pivoted; }

// The units that are dealt out to clusters: ranks in `decode`, in `persistent` UNITs of columns of up.
HOST_DEVICE inline int column_units(const Group& group, int i) {
    return is_paired(group) && i ? 0 : (group.projections[i].pitch + UNIT - 1) / UNIT;
}

HOST_DEVICE inline Range intersect(Range range, int first, int size) {
    const int begin = range.begin > first ? range.begin - first : 0;
    const int end = range.end - first < size ? range.end - first : size;
    return {begin, end > begin ? end : begin};
}

// Part `i` of `parts` of `size` things, in multiples of `unit`.
HOST_DEVICE inline Range share(int size, int unit, int i, int parts) {
    const unsigned units = (size + unit - 1) / unit;  // below 2^23, and parts at most MAX_CLUSTERS: no overflow
    const int begin = units * i / parts * unit, end = units * (i + 1) / parts * unit;
    return {begin < size ? begin : size, end < size ? end : size};
}

// The launches, in decode.cu and persistent.cu. Errors are exceptions.
struct Device {
    int arch, num_sms, shared_bytes;  // arch as 10 major + minor; shared memory that a block may ask for
};
struct Launch {
    int grid, cluster, threads, shared_bytes, stages;
};
enum class Half { BF16, FP16 };
Device device_limits(int device);
// Clusters of `launch` that fit a device at once; its grid is not looked at.
int resident_decode(Half half, const Launch& launch, int num_sms);
int resident_persistent(Half half, int num_tokens, const Launch& launch, int num_sms);
void launch_decode(const Group& group, Half half, const Launch& launch, void* stream);
void launch_persistent(const Group& group, Half half, const Launch& launch, void* stream);

}  // namespace gfwsvd
