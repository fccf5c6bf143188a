// The Python module `_C`: pointers, sizes and the stream come as integers, and every one is checked before a launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <mutex>
#include <tuple>

#include "plan.h"
#ifdef GFWSVD_EMULATED
#include "emulator_bindings.hpp"
#endif

namespace py = pybind11;
using namespace gfwsvd;

#ifndef GFWSVD_MODULE
#define GFWSVD_MODULE _C
#endif
#ifndef GFWSVD_ARCHS
#define GFWSVD_ARCHS ""
#endif

namespace {

using Address = unsigned long long;

struct Arguments {
    Address x, down, up, bias, table, workspace, y;
    int num_tokens, d_in;
    long long stride_xt;
    std::string dtype;
    std::vector<long long> sizes;
    bool silu_mul;
    long long table_numel, workspace_numel;
};

template <class T> T* pointer(const char* name, Address address, bool optional = false) {
    require(address || optional, name, " must be an address, got 0");
    require(address % 16 == 0, name, " must be at a multiple of 16 bytes, got ", address, ", which is ", address % 16,
            " past one");
    return reinterpret_cast<T*>(address);
}

Half half_of(const std::string& dtype) {
    require(dtype == "bfloat16" || dtype == "float16", "dtype must be bfloat16 or float16, got ", dtype);
    return dtype == "bfloat16" ? Half::BF16 : Half::FP16;
}

// The sizes alone, without pointers: enough for a plan.
Group sized(int num_tokens, int d_in, const std::vector<long long>& sizes, bool silu_mul, Needs& needs) {
    Group group = {};
    require(d_in >= ALIGN && d_in % ALIGN == 0 && d_in < MOST, "d_in must be a multiple of ", ALIGN,
            " below 2^23, got ", d_in);
    group.num_tokens = num_tokens;
    group.d_in = d_in;
    needs = lay_out(group, sizes, silu_mul);
    return group;
}

Group checked(const Arguments& a) {
    Needs needs;
    Group group = sized(a.num_tokens, a.d_in, a.sizes, a.silu_mul, needs);
    require(a.stride_xt >= 0 && a.stride_xt % ALIGN == 0 && (a.num_tokens == 1 || a.stride_xt >= a.d_in),
            "the rows of x must begin a multiple of ", ALIGN, " elements apart, and d_in = ", a.d_in,
            " at least, got a stride of ", a.stride_xt);
    require(a.table_numel == needs.table, "the table of these sizes has ", needs.table, " elements, got ",
            a.table_numel);
    require(a.workspace_numel >= needs.workspace, "the workspace of these sizes has ", needs.workspace,
            " elements, got ", a.workspace_numel);
    group.x = pointer<const uint16_t>("x", a.x);
    group.down = pointer<const uint16_t>("down", a.down);
    group.up = pointer<const uint16_t>("up", a.up, group.acc_width == 0);
    group.bias = pointer<const uint16_t>("bias", a.bias, true);
    group.table = pointer<const int>("table", a.table);
    int* workspace = pointer<int>("workspace", a.workspace);
    group.y = pointer<uint16_t>("y", a.y);
    group.stride_xt = a.stride_xt;
    group.sums = reinterpret_cast<float*>(workspace);
    group.counters = workspace + needs.sync_start;
    group.barrier = group.counters + group.num_blocks;
    group.z = reinterpret_cast<uint16_t*>(workspace + needs.z_start);
    return group;
}

// What a device says never changes, and asking takes longer than a launch.
template <class Key, class Value, class Ask> Value remembered(const Key& key, Ask&& ask) {
    static std::mutex mutex;
    static std::map<Key, Value> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    return known[key] = ask();
}

#ifdef GFWSVD_EMULATED
Device limits_of(int device) { return device_limits(device); }
#else
Device limits_of(int device) {
    return remembered<int, Device>(device, [&] { return device_limits(device); });
}
#endif

template <class Ask>
int resident(bool persistent, Half half, int tokens, const Launch& launch, int device, int num_sms, Ask&& ask) {
    const auto key = std::make_tuple(persistent, half, tokens, launch.cluster, launch.shared_bytes, device, num_sms);
    return remembered<decltype(key), int>(key, ask);
}

Launch plan(Group& group, Half half, bool persistent, int device, int cluster, int stages) {
    const Device limits = limits_of(device);
    if (persistent) {
        return plan_persistent(group, limits, cluster, stages, [&](const Launch& launch) {
            return resident(true, half, group.num_tokens, launch, device, limits.num_sms,
                            [&] { return resident_persistent(half, group.num_tokens, launch, limits.num_sms); });
        });
    }
    return plan_decode(group, limits, cluster, stages, [&](const Launch& launch) {
        return resident(false, half, 0, launch, device, limits.num_sms,
                        [&] { return resident_decode(half, launch, limits.num_sms); });
    });
}

void run(bool persistent, const Arguments& arguments, int device, Address stream, int cluster, int stages) {
    check_tokens(persistent ? "persistent" : "decode", persistent ? SOME_TOKENS : FEW_TOKENS, arguments.num_tokens);
    Group group = checked(arguments);
    const Half half = half_of(arguments.dtype);
    const Launch launch = plan(group, half, persistent, device, cluster, stages);
    (persistent ? launch_persistent : launch_decode)(group, half, launch, reinterpret_cast<void*>(stream));
}

// The launch as it would be on a device of these limits, every multiprocessor holding one block.
py::dict plan_for(bool persistent, int num_tokens, int d_in, const std::vector<long long>& sizes, bool silu_mul,
                  const Device& limits, int cluster, int stages) {
    Needs needs;
    Group group = sized(num_tokens, d_in, sizes, silu_mul, needs);
    const auto all = [&](const Launch& launch) { return limits.num_sms / launch.cluster; };
    const Launch launch = persistent ? plan_persistent(group, limits, cluster, stages, all)
                                     : plan_decode(group, limits, cluster, stages, all);
    py::dict found;
    found["grid"] = launch.grid;
    found["cluster"] = launch.cluster;
    found["threads"] = launch.threads;
    found["shared_bytes"] = launch.shared_bytes;
    found["stages"] = launch.stages;
    found["stage_bytes"] = STAGE_BYTES;
    return found;
}

template <bool PERSISTENT> void define(py::module_& m, const char* name, const char* doc) {
    const auto launch = [](Address x, Address down, Address up, Address bias, Address table, Address workspace,
                           Address y, int num_tokens, int d_in, long long stride_xt, const std::string& dtype,
                           const std::vector<long long>& sizes, bool silu_mul, long long table_numel,
                           long long workspace_numel, int device, Address stream, int cluster, int stages) {
        run(PERSISTENT, {x, down, up, bias, table, workspace, y, num_tokens, d_in, stride_xt, dtype, sizes, silu_mul,
                         table_numel, workspace_numel}, device, stream, cluster, stages);
    };
    m.def(name, launch, doc, py::kw_only(), py::arg("x"), py::arg("down"), py::arg("up"), py::arg("bias"),
          py::arg("table"), py::arg("workspace"), py::arg("y"), py::arg("num_tokens"), py::arg("d_in"),
          py::arg("stride_xt"), py::arg("dtype"), py::arg("sizes"), py::arg("silu_mul"), py::arg("table_numel"),
          py::arg("workspace_numel"), py::arg("device"), py::arg("stream"), py::arg("cluster") = 0,
          py::arg("stages") = 0);
    const auto plan = [](int num_tokens, int d_in, const std::vector<long long>& sizes, bool silu_mul, int arch,
                         int num_sms, int shared_bytes, int cluster, int stages) {
        return plan_for(PERSISTENT, num_tokens, d_in, sizes, silu_mul, {arch, num_sms, shared_bytes}, cluster, stages);
    };
    m.def((std::string(name) + "_plan").c_str(), plan,
          "The launch on a device of these limits, each multiprocessor holding one block; needs no device.",
          py::kw_only(), py::arg("num_tokens"), py::arg("d_in"), py::arg("sizes"), py::arg("silu_mul"),
          py::arg("arch") = 90, py::arg("num_sms") = 132, py::arg("shared_bytes") = 227 * 1024,
          py::arg("cluster") = 0, py::arg("stages") = 0);
}

}  // namespace

PYBIND11_MODULE(GFWSVD_MODULE, m) {
    m.doc() = "The launches of csrc/. Importing this touches no device.";
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const ValueError& wrong) {
            PyErr_SetString(PyExc_ValueError, wrong.what());
        }
    });
    m.attr("OUT_BLOCK") = OUT_BLOCK;
    m.attr("ALIGN") = ALIGN;
    m.attr("FEW_TOKENS") = FEW_TOKENS;
    m.attr("SOME_TOKENS") = SOME_TOKENS;
    m.attr("FIELDS") = FIELDS;
    m.attr("BARRIERS") = BARRIERS;
    m.attr("MAX_PROJECTIONS") = MAX_PROJECTIONS;
    m.attr("ARCHS") = GFWSVD_ARCHS;
    define<false>(m, "decode", "1 to 8 tokens; the rank is split over clusters of blocks.");
    define<true>(m, "persistent", "1 to 64 tokens; a fixed order of additions, one grid barrier.");
    m.def("limits", [](int device) {
        const Device limits = limits_of(device);
        py::dict found;
        found["arch"] = limits.arch;
        found["num_sms"] = limits.num_sms;
        found["shared_bytes"] = limits.shared_bytes;
        return found;
    }, "What a device has, as the plans take it.", py::arg("device"));
    m.def("sizes_of", [](int num_tokens, int d_in, const std::vector<long long>& sizes, bool silu_mul) {
        Needs needs;
        sized(num_tokens, d_in, sizes, silu_mul, needs);
        return std::make_tuple(needs.sync_start, needs.z_start, needs.table, needs.workspace);
    }, "Where the counters and z begin in the workspace, and the elements of table and workspace.", py::kw_only(),
       py::arg("num_tokens"), py::arg("d_in"), py::arg("sizes"), py::arg("silu_mul"));
#ifdef GFWSVD_EMULATED
    define_emulator(m);
#endif
}
