// What the launches must know of a device.
#include "common.cuh"

namespace gfwsvd {

Device device_limits(int device) { return read_limits(device); }

}  // namespace gfwsvd
