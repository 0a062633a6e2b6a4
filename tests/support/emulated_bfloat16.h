// Stand-ins for what TileLang generates from kernels that bring bfloat16 tiles to their products by asynchronous
// copies. Such tiles are swizzled by the kernel's own indices, so products read them through the swizzle. As in
// `emulated_hopper.h` everything is done at once where it is issued.
#pragma once

struct bfloat16_t {
  ushort bits;
};
typedef ushort __nv_fp8x2_storage_t;
struct __nv_bfloat162 {
  bfloat16_t x, y;
};
struct alignas(8) fp8_e4_8_t {
  fp8_e4_t values[8];
};

namespace emulated {
static bfloat16_t to_bfloat16(float value) {  // of an fp8 value: exact
  uint bits;
  memcpy(&bits, &value, 4);
  return {ushort(bits >> 16)};
}
static float value_of(bfloat16_t value) {
  const uint bits = uint(value.bits) << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
}  // namespace emulated

// CUDA's maximum of floats: the other one where one is NaN.
static float max(float a, float b) { return fmaxf(a, b); }
static __nv_bfloat162 __tl_cvt_e4m3x2_to_bfloat162(__nv_fp8x2_storage_t pair) {
  return {emulated::to_bfloat16(emulated::value_of(fp8_e4_t(pair & 255))),
          emulated::to_bfloat16(emulated::value_of(fp8_e4_t(pair >> 8)))};
}

namespace tl {
template <int N> static void cp_async_gs(void* to, const void* from) { memcpy(to, from, N); }
template <int N> static void cp_async_gs_conditional(void* to, const void* from, bool copies) {
  if (copies) memcpy(to, from, N);
  else memset(to, 0, N);
}
static void cp_async_commit() {}
template <int N> static void cp_async_wait() {}
template <int N> static void warpgroup_wait() {}
static void fence_proxy_async() {}
template <int N> struct NamedBarrier {};
struct MaxOp {
  static float of(float a, float b) { return max(a, b); }
};
struct SumOp {
  static float of(float a, float b) { return a + b; }
};
template <class Op, int THREADS, int SCALE, int OFFSET, class Barrier> struct AllReduce {
  static float run(float value) {
    static_assert(THREADS <= 32);
    for (int d = THREADS / 2; d >= SCALE; d /= 2) {
      uint bits;
      memcpy(&bits, &value, 4);
      bits = __shfl_xor_sync(~0u, bits, d, 32);
      float other;
      memcpy(&other, &bits, 4);
      value = Op::of(value, other);
    }
    return value;
  }
};
static bfloat16_t swizzled(uint64_t byte) {
  bfloat16_t value;
  memcpy(&value, buf_dyn_shmem + (byte ^ (byte >> 7 & 7) << 4), 2);
  return value;
}
template <DataType A, DataType, DataType, int M, int N, int K, bool, bool, int, int>
  requires(A == DataType::kBFloat16)
static void wgmma_ss(uint64_t a, uint64_t b, uint32_t* accumulators, int adds) {
  const uint lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  float* product = (float*)accumulators;
  for (int i = 0; i < N / 2; ++i) {
    const uint64_t row = a * 16 + (warp * 16 + i / 2 % 2 * 8 + lane / 4) * 128;
    const uint64_t column = b * 16 + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 128;
    float sum = adds ? product[i] : 0;
    for (int k = 0; k < K; ++k)
      sum += emulated::value_of(swizzled(row + 2 * k)) * emulated::value_of(swizzled(column + 2 * k));
    product[i] = sum;
  }
}
}  // namespace tl
