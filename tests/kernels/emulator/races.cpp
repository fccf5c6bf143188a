// Both kernels on groups of every kind, several schedules each, against sums in double precision. Built with a
// sanitizer it proves the absence of races, or of accesses out of bounds, in these runs.
#include <cstdio>
#include <random>

#include "emulator.hpp"
#include "plan.h"

using namespace gfwsvd;

namespace {

struct Case {
    const char* name;
    int d_in;
    std::vector<long long> sizes;
    bool silu_mul;
};

double worst(const Case& test, bool persistent, int tokens, int cluster, uint64_t seed) {
    std::mt19937 random(7);
    const auto fill = [&](size_t count) {  // exactly that many, so that the end is where AddressSanitizer looks
        std::vector<uint16_t> values(count);
        for (auto& value : values) value = BFloat16::round(std::normal_distribution<float>(0, 0.3f)(random));
        return values;
    };
    Group group = {};
    group.num_tokens = tokens, group.d_in = group.stride_xt = test.d_in;
    const Needs needs = lay_out(group, test.sizes, test.silu_mul);
    size_t up_size = 0, outputs = 0;
    std::vector<int> table(needs.table);
    for (int i = 0; i < group.num_projections; ++i) {
        const Projection& p = group.projections[i];
        up_size += size_t(p.rank) * p.pitch, outputs += p.d_out;
        for (int block = 0, col = 0, k = 0; block < p.num_blocks; ++block) {
            table[p.bounds + block] = col;
            for (int out = block * OUT_BLOCK; out < min((block + 1) * OUT_BLOCK, p.d_out); ++out) {
                const bool pivot = p.pivoted && out % 3 == 1 && k < p.rank;
                const int source = pivot ? -1 - k++ : col++;
                if (group.pivoted) table[p.source + out] = source;
            }
            col = table[p.bounds + block + 1] = rounded_up(col, ALIGN);
        }
    }
    const auto x = fill(size_t(tokens) * test.d_in), down = fill(size_t(group.rank) * test.d_in), up = fill(up_size);
    const auto bias = fill(outputs);
    std::vector<uint16_t> y(size_t(tokens) * group.out_width, 0x7fff);
    std::vector<float4> workspace(needs.workspace / 4 + 1);
    int* words = reinterpret_cast<int*>(workspace.data());
    group.x = x.data(), group.down = down.data(), group.up = up.data(), group.bias = bias.data();
    group.table = table.data(), group.y = y.data(), group.sums = reinterpret_cast<float*>(words);
    group.counters = words + needs.sync_start, group.barrier = group.counters + group.num_blocks;
    group.z = reinterpret_cast<uint16_t*>(words + needs.z_start);
    settings.seed = seed;
    const Device device = read_limits(0);
    const auto resident = [&](const Launch& launch) { return device.num_sms / launch.cluster; };
    const Launch launch = persistent ? plan_persistent(group, device, cluster, 3, resident)
                                     : plan_decode(group, device, cluster, 3, resident);
    (persistent ? launch_persistent : launch_decode)(group, Half::BF16, launch, nullptr);
    for (int i = 0; i < needs.z_start; ++i) {
        if (words[i]) throw std::runtime_error("the workspace is not zero");
    }
    double error = 0;
    for (int token = 0; token < tokens; ++token) {
        std::vector<double> parts;
        for (int i = 0; i < group.num_projections; ++i) {
            const Projection& p = group.projections[i];
            std::vector<double> z(p.rank);
            for (int r = 0; r < p.rank; ++r) {
                for (int c = 0; c < test.d_in; ++c) {
                    z[r] += double(BFloat16::widen(x[token * test.d_in + c])) *
                            BFloat16::widen(down[size_t(p.z_start + r) * test.d_in + c]);
                }
            }
            for (int out = 0; out < p.d_out; ++out) {
                const int source = group.pivoted ? table[p.source + out] : out;
                double sum = source < 0 ? z[-1 - source] : 0;
                for (int r = 0; source >= 0 && r < p.rank; ++r) {
                    sum += z[r] * BFloat16::widen(up[p.up_start + size_t(r) * p.pitch + source]);
                }
                parts.push_back(sum + BFloat16::widen(bias[p.out_start + out]));
            }
        }
        for (int out = 0; out < group.out_width; ++out) {
            const double exact = test.silu_mul ? parts[out] / (1 + std::exp(-parts[out])) * parts[group.out_width + out]
                                               : parts[out];
            const double got = BFloat16::widen(y[size_t(token) * group.out_width + out]);
            error = std::fmax(error, std::isnan(got) ? 1e30 : std::fabs(got - exact) / (1 + std::fabs(exact)));
        }
    }
    return error;
}

}  // namespace

int main() {
    settings.num_sms = 4;
    // rank, d_out, pitch, pivoted, chunk
    const Case cases[] = {
        {"several", 72, {37, 600, 600, 0, 8, 7, 33, 40, 0, 7}, false},
        {"silu_mul", 40, {19, 300, 304, 0, 8, 30, 300, 304, 0, 8}, true},
        {"pivoted", 48, {30, 700, 680, 1, 8, 5, 20, 24, 0, 5}, false},
        {"pivoted silu_mul", 40, {19, 300, 288, 1, 8, 30, 300, 272, 1, 8}, true},
    };
    for (const Case& test : cases) {
        for (bool persistent : {false, true}) {
            for (int cluster : {1, HAS_CLUSTERS ? 2 : 1}) {
                const int tokens = persistent ? 18 : 3;
                for (uint64_t seed = 0; seed < 2; ++seed) {
                    const double error = worst(test, persistent, tokens, cluster, seed);
                    std::printf("%s, %s, cluster %d, seed %d: error %.4f\n", test.name,
                                persistent ? "persistent" : "decode", cluster, int(seed), error);
                    if (!(error < 0.02)) return 1;
                }
            }
        }
    }
    return 0;
}
