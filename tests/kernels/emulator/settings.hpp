// The device that is emulated, and the seed of the schedule.
#pragma once

#include <cstdint>

namespace gfwsvd {

struct Settings {
    int num_sms = 4, shared_bytes = 227 * 1024;
    uint64_t seed = 0;
};
inline Settings settings;

}  // namespace gfwsvd
