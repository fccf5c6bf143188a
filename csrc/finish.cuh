// The completion of a block of outputs: whoever adds the last piece of its sums gathers them, applies bias and
// silu(y_0) y_1, rounds once, stores y, and leaves sums and counter zero for the next call.
#pragma once

#include "ring.cuh"

namespace gfwsvd {

// The columns of up that block `block` of a projection has.
DEVICE Range block_columns(const Group& group, const Projection& p, int block) {
    if (!group.pivoted) return {min(block * OUT_BLOCK, p.pitch), min((block + 1) * OUT_BLOCK, p.pitch)};
    return {group.table[p.bounds + block], group.table[p.bounds + block + 1]};
}

// What the counter of a block has reached when all columns, and all z where it is pivoted, are announced.
DEVICE int announced(const Group& group, const Projection& p, int block) {
    return p.arrivals * block_columns(group, p, block).size() + p.z_arrivals;
}

// An output of one projection: its sum, or an entry of z, plus bias. What other blocks wrote is read past the L1 cache.
template <class Type>
DEVICE float output(const Group& group, const Projection& p, int out, int token) {
    const int source = group.pivoted ? group.table[p.source + out] : out;
    const float* sums = group.sums + static_cast<long long>(token) * group.acc_width + p.acc_start;
    const uint16_t* z = group.z + static_cast<long long>(token) * group.z_width + p.z_column;
    const float value = source >= 0 ? load_l2(sums + source) : Type::widen(load_l2(z - 1 - source));
    return group.bias ? value + Type::widen(group.bias[p.out_start + out]) : value;
}

DEVICE float silu(float value) { return value / (1.0f + expf(-value)); }

template <class Type>
DEVICE void finish_block(const Group& group, const Projection& p, int block) {
    const int end = min((block + 1) * OUT_BLOCK, p.d_out);
    const Projection* both = group.projections;
#pragma unroll 1
    for (int out = block * OUT_BLOCK + thread_index(); out < end; out += CONSUMERS) {
#pragma unroll 1
        for (int first = 0; first < group.num_tokens; first += FEW_TOKENS) {
            float y[FEW_TOKENS];
#pragma unroll
            for (int i = 0; i < FEW_TOKENS; ++i) {  // several loads under way at once
                const int token = min(first + i, group.num_tokens - 1);
                y[i] = group.silu_mul ? silu(output<Type>(group, both[0], out, token)) *
                                            output<Type>(group, both[1], out, token)
                                      : output<Type>(group, p, out, token);
            }
#pragma unroll
            for (int i = 0; i < FEW_TOKENS; ++i) {
                const long long at = static_cast<long long>(first + i) * group.out_width + out;
                if (first + i < group.num_tokens) group.y[at + (group.silu_mul ? 0 : p.out_start)] = Type::round(y[i]);
            }
        }
    }
    together();  // nobody reads these sums any more
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& other = group.projections[i];
        if (!group.silu_mul && &other != &p) continue;
        const Range cols = block_columns(group, other, block);
        for (int j = thread_index(); j < cols.size() / 4 * group.num_tokens; j += CONSUMERS) {
            const int token = j / (cols.size() / 4), col = cols.begin + j % (cols.size() / 4) * 4;
            float* sum = group.sums + static_cast<long long>(token) * group.acc_width + other.acc_start + col;
            *reinterpret_cast<float4*>(sum) = make_float4(0, 0, 0, 0);
        }
    }
    if (thread_index() == 0) group.counters[p.first_block + block] = 0;
}

// By all consumers: announce that this block of threads has written its part of columns [begin, end) of the sums of a
// projection, or with `whole` all of z, and finish the blocks of outputs that were waiting for just this.
template <class Type>
DEVICE void announce(const Group& group, const Projection& p, Range cols, bool whole) {
    for (int first = 0; first < p.num_blocks; first += WARP) {
        together();  // all threads have written; those that arrive below do so, cumulatively, for all
        if (warp_index() == 0) {
            const int block = first + lane_index();
            bool last = false;
            if (block < p.num_blocks) {
                const Range mine = block_columns(group, p, block);
                const int amount = whole ? 1 : min(mine.end, cols.end) - max(mine.begin, cols.begin);
                if (amount > 0) {
                    int expected = announced(group, p, block);
                    if (group.silu_mul) {
                        expected = announced(group, group.projections[0], block) +
                                   announced(group, group.projections[1], block);
                    }
                    // Releases what this block wrote, and acquires what all that arrived before have written.
                    last = add_acquire_release(group.counters + p.first_block + block, amount) + amount == expected;
                }
            }
            const uint32_t finished = ballot(last);
            if (lane_index() == 0) shared().finished = finished;
        }
        together();  // hands on what the first warp acquired
        const uint32_t finished = shared().finished;
#pragma unroll 1
        for (int i = 0; i < WARP; ++i) {
            if (finished >> i & 1) finish_block<Type>(group, p, first + i);
        }
    }
}

}  // namespace gfwsvd
