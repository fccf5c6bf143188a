// What the emulated module has beyond the real one.
#pragma once

#include <pybind11/pybind11.h>

#include "settings.hpp"

inline void define_emulator(pybind11::module_& m) {
    m.def(
        "emulate",
        [](int num_sms, unsigned long long seed, int shared_bytes) {
            gfwsvd::settings = {num_sms, shared_bytes, seed};
        },
        "The device to emulate, and the schedule of its threads.", pybind11::arg("num_sms") = 4,
        pybind11::arg("seed") = 0, pybind11::arg("shared_bytes") = 227 * 1024);
}
