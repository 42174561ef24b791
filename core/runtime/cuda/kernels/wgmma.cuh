// Hopper's asynchronous machinery: barriers in shared memory that count bytes, bulk copies, and the tensor core's wgmma
// with A in registers. Only compute capability 9.0 has all of it (PH_WGMMA is defined there); elsewhere nothing is.

#pragma once

#include "prelude.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define PH_WGMMA

// ---- barriers: `arrivals` threads, and as many bytes as they expect, complete a phase; phases alternate 0 and 1

__device__ __forceinline__ void ph_barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ph_shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that initialised them, before a __syncthreads().
__device__ __forceinline__ void ph_barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void ph_expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ph_shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void ph_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ph_shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void ph_barrier_wait(u64* barrier, u32 phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra through;\n"
      "bra again;\n"
      "through:\n"
      "}\n" ::"r"(ph_shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// ---- copies: `bytes`, a multiple of 16, between addresses aligned to 16

__device__ __forceinline__ void ph_bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   ph_shared_address(shared)),
               "l"(global), "r"(bytes), "r"(ph_shared_address(barrier))
               : "memory");
}

// What this thread has written to shared memory is seen by the tensor core and the copies that begin after a barrier.
__device__ __forceinline__ void ph_fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers: all warps of a warpgroup hand back all but COUNT of each thread's, or take up to COUNT

template <int COUNT> __device__ __forceinline__ void ph_give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void ph_take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- wgmma: d += a b, a 64x16 from the registers of a warpgroup (each warp 16 rows, as ph_mma has them), b 16xN from
// shared memory, column-major; d is as N / 8 results of ph_mma side by side

// Core matrices, 8 columns of b by 8 k in 128 bytes, without swizzling: bytes between two halves of the 16 k, and between
// 8 columns and the next 8.
__device__ __forceinline__ u64 ph_wgmma_descriptor(const void* shared, u32 next_k, u32 next_n) {
  return (u64)((ph_shared_address(shared) & 0x3ffff) >> 4) | (u64)(next_k >> 4) << 16 | (u64)(next_n >> 4) << 32;
}

__device__ __forceinline__ void ph_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void ph_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void ph_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Registers that a product under way has read until here.
template <int STEPS> __device__ __forceinline__ void ph_keep(u32 (&a)[STEPS][4]) {
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
    asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3])::"memory");
}

#define PH_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PH_D16(n) PH_D4(n), PH_D4(n + 1), PH_D4(n + 2), PH_D4(n + 3)

template <int N> __device__ __forceinline__ void ph_wgmma(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "wgmma is spelt out for these columns only");
  if constexpr (N == 64) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        : PH_D16(0), PH_D16(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (N == 96) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
        : PH_D16(0), PH_D16(4), PH_D16(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (N == 128) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        : PH_D16(0), PH_D16(4), PH_D16(8), PH_D16(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (N == 192) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
        "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
        "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "{%96, %97, %98, %99}, %100, 1, 1, 1, 0;"
        : PH_D16(0), PH_D16(4), PH_D16(8), PH_D16(12), PH_D16(16), PH_D16(20)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (N == 256) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
        "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
        "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
        "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "
        "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "
        "%122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
        : PH_D16(0), PH_D16(4), PH_D16(8), PH_D16(12), PH_D16(16), PH_D16(20), PH_D16(24), PH_D16(28)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#endif
