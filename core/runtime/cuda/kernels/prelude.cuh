// What all kernels share: the activation type and its conversions, reductions in a fixed order, wide loads, cp.async,
// and the tensor-core step. Knows nothing of any one kernel.
//
// PH_ACT_BF16 chooses bfloat16 activations, else they are float16. Arithmetic is float32 throughout.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef PH_ACT_BF16
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "bfloat16 activations need compute capability 8.0; use activation_dtype: f16"
#endif
typedef __nv_bfloat16 act_t;
typedef __nv_bfloat162 act2_t;
#else
typedef __half act_t;
typedef __half2 act2_t;
#endif

#define PH_FULL_MASK 0xffffffffu
#define PH_INFINITY __int_as_float(0x7f800000)

template <typename T>
__host__ __device__ constexpr T ph_div_up(T a, T b) { return (a + b - 1) / b; }

// ---- conversions; rounding is to nearest even

__device__ __forceinline__ float ph_to_float(float x) { return x; }
__device__ __forceinline__ float ph_to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float ph_to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float2 ph_to_float2(float2 x) { return x; }
__device__ __forceinline__ float2 ph_to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 ph_to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }

// ph_from_float<T>(x), T one of float, __half, __nv_bfloat16
template <typename T> __device__ __forceinline__ T ph_from_float(float x);
template <> __device__ __forceinline__ float ph_from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half ph_from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 ph_from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ act_t ph_to_act(float x) { return ph_from_float<act_t>(x); }
__device__ __forceinline__ act2_t ph_to_act2(float x, float y) {
#ifdef PH_ACT_BF16
  return __floats2bfloat162_rn(x, y);
#else
  return __floats2half2_rn(x, y);
#endif
}

// The bits of two activations in one register, the first in the low half; and back.
__device__ __forceinline__ u32 ph_act2_bits(act2_t x) { return *reinterpret_cast<u32*>(&x); }
__device__ __forceinline__ act2_t ph_bits_act2(u32 x) { return *reinterpret_cast<act2_t*>(&x); }

// ---- reductions in a fixed order: the same values give the same bits, whatever else the GPU does

// Butterflies: every lane gets the result, and x + y == y + x makes it the same bits in all of them. WIDTH lanes (a
// power of two) form a group.
template <int WIDTH = 32> __device__ __forceinline__ float ph_warp_sum(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step; step /= 2) x += __shfl_xor_sync(PH_FULL_MASK, x, step);
  return x;
}

template <int WIDTH = 32> __device__ __forceinline__ float ph_warp_max(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(PH_FULL_MASK, x, step));
  return x;
}

// Over a block whose size is a multiple of 32: `scratch` is 32 floats of shared memory, usable again at once. All
// threads must call, and all get the result.
__device__ __forceinline__ float ph_block_sum(float x, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = ph_warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return ph_warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

__device__ __forceinline__ float ph_block_max(float x, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = ph_warp_max(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return ph_warp_max(lane < warps ? scratch[lane] : -PH_INFINITY);
}

// ---- barriers

// Waits for `threads` of the block's threads, whole warps, that call it with the same id, 1 to 15.
__device__ __forceinline__ void ph_sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wide loads; addresses must be aligned to the width

// Read-only, kept in L1: for data that is read again soon.
__device__ __forceinline__ uint4 ph_ldg128(const void* p) { return __ldg(reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ uint2 ph_ldg64(const void* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }
__device__ __forceinline__ u32 ph_ldg32(const void* p) { return __ldg(reinterpret_cast<const u32*>(p)); }

// What another kernel of the step has written: ordinary loads, kept in L1. After ph_wait_for_inputs() they are promised to
// see it; those above are not, where two kernels before this one are still known to L1.
__device__ __forceinline__ uint4 ph_load128(const void* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ uint2 ph_load64(const void* p) { return *reinterpret_cast<const uint2*>(p); }

// Read-only and read once: passes L1 by, so that weights do not push out what is shared.
__device__ __forceinline__ uint4 ph_ldg128_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 ph_ldg64_once(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 ph_ldg32_once(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// Into v[0..3] where `there`, else nothing is read and v stays. No branch, so that the compiler does not put off the load.
__device__ __forceinline__ void ph_ldg128_once_if(u32* v, const u8* p, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.u32 there, %5, 0; @there ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
      : "l"(p), "r"((u32)there));
}

// Values of which the compiler may not put off the load; not from L1, so another block may have written them.
__device__ __forceinline__ float4 ph_load_now(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ float ph_load_now(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ act_t ph_load_now(const act_t* p) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return *reinterpret_cast<act_t*>(&v);
}

// ---- copies from global to shared memory that do not pass through registers (a plain copy before 8.0)

__device__ __forceinline__ u32 ph_shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, both addresses aligned to 16; zeros instead where not `valid` (then `global` is not read).
__device__ __forceinline__ void ph_cp_async16(void* shared, const void* global, bool valid = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ph_shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *reinterpret_cast<uint4*>(shared) = valid ? *reinterpret_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// 4 bytes, both addresses aligned to 4.
__device__ __forceinline__ void ph_cp_async4(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(ph_shared_address(shared)), "l"(global) : "memory");
#else
  *reinterpret_cast<u32*>(shared) = *reinterpret_cast<const u32*>(global);
#endif
}

__device__ __forceinline__ void ph_cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of the thread's groups are under way. Others' copies need a __syncthreads() as well.
template <int PENDING> __device__ __forceinline__ void ph_cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- programmatic dependent launch (9.0 and newer; before that both are nothing)

// A kernel launched with `early` may begin while the one before it still runs. Until it has called this it may read only
// what no kernel of the step writes: weights. Every thread that reads or writes anything else must call it. After it,
// everything that the kernels before have written is there. Harmless in a kernel launched otherwise.
__device__ __forceinline__ void ph_wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel, if it was launched with `early`, begin as soon as every block has called this or is done. Call it
// after the wait: then at most two kernels share the GPU, and the second finds the multiprocessors evenly taken. Were a
// third let in, its blocks would crowd where the first is through, and the slowest multiprocessor would have two. (norm.cu
// does so all the same where it has few blocks, as measured.)
__device__ __forceinline__ void ph_let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- tensor cores

// d += a b with a 16x16 (row-major), b 16x8 (column-major), d 16x8 in float32. Lane 4*g + t holds, each register being
// two neighbouring k with the lower in the low half:
//   a[0]: row g, k 2t..2t+1     a[1]: row g+8, k 2t..2t+1     a[2]: row g, k 2t+8..2t+9     a[3]: row g+8, k 2t+8..2t+9
//   b[0]: column g, k 2t..2t+1  b[1]: column g, k 2t+8..2t+9
//   d[0]: (g, 2t)  d[1]: (g, 2t+1)  d[2]: (g+8, 2t)  d[3]: (g+8, 2t+1)
// a and b are act_t.
__device__ __forceinline__ void ph_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(PH_ACT_BF16)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)  // 7.5 has the step of 8 k only.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// Four 8x8 tiles of 16-bit elements from shared memory: lane i gives the address (aligned to 16) of row i % 8 of tile
// i / 8; register j receives of tile j row lane/4, columns 2*(lane%4)..+1. Transposed: the tile's transpose.
__device__ __forceinline__ void ph_ldmatrix4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ph_shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ph_ldmatrix4_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ph_shared_address(row))
               : "memory");
}
