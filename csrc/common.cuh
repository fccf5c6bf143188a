// The primitives that the kernels are written in, each one instruction or a few, and the launch of a kernel. Compiled
// with GFWSVD_EMULATED they are those of a header for the CPU instead, on which the tests run the same kernels.
#pragma once

#include "group.h"

#ifdef GFWSVD_EMULATED
#include "emulator.hpp"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define KERNEL __global__ void __launch_bounds__(THREADS, 1)
#define DEVICE __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define HAS_CLUSTERS 0
#else
#define HAS_CLUSTERS 1
#endif

namespace gfwsvd {

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_size() { return gridDim.x; }

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic[];
    return dynamic;
}

DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers within a block. `named_arrive` does not wait.
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The cluster, and its barrier of all threads, which orders no memory on this side: it says that a block has begun, or
// that it has read what it wanted. (A release would wait until all its additions have reached memory.) Before Hopper a
// block is alone.
DEVICE int cluster_size() {
    uint32_t size = 1;
#if HAS_CLUSTERS
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}
DEVICE int cluster_rank() {
    uint32_t rank = 0;
#if HAS_CLUSTERS
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}
DEVICE void cluster_arrive() {
#if HAS_CLUSTERS
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if HAS_CLUSTERS
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// mbarriers: objects of 8 bytes in shared memory, whose phases end when `count` threads arrived and all bytes came.
DEVICE void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void mbarrier_init_fence() {  // shows the initialised barriers to the copy engine and to the cluster
#if HAS_CLUSTERS
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    do {
#if HAS_CLUSTERS
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
        asm volatile("{ .reg .pred p; .reg .b64 state; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
    } while (!done);
}

#if HAS_CLUSTERS
DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {  // arrives, and adds bytes that must come
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE uint32_t peer_address(const void* pointer, int rank) {  // of the same place in another block of the cluster
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
    return address;
}
DEVICE void mbarrier_arrive_peer(uint64_t* barrier, int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(peer_address(barrier, rank))
                 : "memory");
}
DEVICE void mbarrier_wait_peers(uint64_t* barrier, uint32_t parity) {  // sees what the peers wrote before they arrived
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done);
}
DEVICE float2 peer_load(const float2* pointer, int rank) {
    float2 value;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y)
                 : "r"(peer_address(pointer, rank)) : "memory");
    return value;
}
DEVICE float4 peer_load(const float4* pointer, int rank) {
    float4 value;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(peer_address(pointer, rank)) : "memory");
    return value;
}
// The copy engine: `bytes` and both addresses are multiples of 16; the barrier counts the bytes as they land.
DEVICE void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
                 "r"(shared_address(barrier)) : "memory");
}
#else
template <class T> DEVICE T peer_load(const T* pointer, int) { return *pointer; }
DEVICE void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)) : "memory");
}
DEVICE void copies_arrive(uint64_t* barrier) {  // once the copies that this thread began have landed
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#endif

// Two elements from memory to shared memory, all under way until `copies_wait`; of `bytes` fewer than 4 the rest is 0.
DEVICE void copy_pair(uint16_t* to, const uint16_t* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Tensor cores. Lane l gives the address of 8 elements of row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32_t (&a)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_transposed(uint32_t (&a)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(shared_address(row)) : "memory");
}

struct BFloat16 {
    static DEVICE float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    static DEVICE uint16_t round(float value) {
        uint16_t bits;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
                     " {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct Float16 {
    static DEVICE float widen(uint16_t bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static DEVICE uint16_t round(float value) {
        uint16_t bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
    static DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
                     " {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// Global memory. What other blocks wrote in the same launch is loaded past the L1 cache.
template <class T> DEVICE T load_l2(const T* pointer) { return __ldcg(pointer); }
DEVICE void add_float4(float* to, float4 value) {  // no order is implied
#if HAS_CLUSTERS
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
#else
    atomicAdd(to, value.x);
    atomicAdd(to + 1, value.y);
    atomicAdd(to + 2, value.z);
    atomicAdd(to + 3, value.w);
#endif
}
DEVICE int add_acquire_release(int* to, int value) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old)
                 : "l"(__cvta_generic_to_global(to)), "r"(value) : "memory");
    return old;
}
DEVICE int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)) : "memory");
    return value;
}
DEVICE void pause() { __nanosleep(20); }

// Host side.
inline void check(cudaError_t error, const char* call) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // the error is reported here, not by the next call that looks
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
    }
}
#define CHECK(call) check(call, #call)

inline Device read_limits(int device) {
    int major, minor, num_sms, shared_bytes;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return {major * 10 + minor, num_sms, shared_bytes};
}

template <class Kernel>
cudaLaunchConfig_t configuration(Kernel kernel, const Launch& launch, cudaLaunchAttribute* attributes, void* stream,
                                 bool cooperative) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.grid);
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (launch.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
        ++config.numAttrs;
    }
    if (cooperative) {
        attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
        attributes[config.numAttrs].val.cooperative = 1;
        ++config.numAttrs;
    }
    return config;
}

template <class Kernel>
void launch_kernel(Kernel kernel, const Launch& launch, const Group& group, void* stream, bool cooperative) {
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = configuration(kernel, launch, attributes, stream, cooperative);
    CHECK(cudaLaunchKernelEx(&config, kernel, group));
}

// Clusters that the device holds at once.
template <class Kernel>
int count_resident(Kernel kernel, Launch launch, int num_sms) {
    launch.grid = launch.cluster;  // any valid one
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = configuration(kernel, launch, attributes, nullptr, false);
    int count = 0;
    if (launch.cluster > 1) {
        CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
    } else {
        CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, launch.threads, launch.shared_bytes));
        count *= num_sms;
    }
    return count;
}

}  // namespace gfwsvd
#endif
