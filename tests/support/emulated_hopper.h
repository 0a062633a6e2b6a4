// Stand-ins for what TileLang generates from kernels with barriers in shared memory, TMA and fp8 products: each is done
// at once where it is issued, and a shared tile is plain rows of 128 bytes. So they tell whether indices, layouts and
// barriers are right, not whether a kernel waits for what is under way.
#pragma once

#define __shared__ static
#define __grid_constant__
typedef uchar fp8_e4_t;
typedef const uchar* CUtensorMap;  // the tensor, of rows of 128 bytes
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static float __saturatef(float value) { return value > 0 ? std::min(value, 1.0f) : 0.0f; }  // NaN: 0

namespace emulated {
static void yield() {
  const uint thread = threadIdx.x;
  swapcontext(&fibres[thread], &scheduler);
}
struct Named {
  uint block = 0, arrived = 0, turn = 0;
};
static Named named[16];
static Named& named_of(int id) {
  if (named[id].block != blockIdx.x + 1) named[id] = {blockIdx.x + 1, 0, 0};
  return named[id];
}
static void arrive_named(int id, int threads) {
  Named& barrier = named_of(id);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.turn++;
  }
}
static float value_of(fp8_e4_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  if ((bits & 127) == 127) size = NAN;
  return bits & 128 ? -size : size;
}
}  // namespace emulated

static uint __ballot_sync(uint, bool value) {
  emulated::Meeting& warp = emulated::warps[threadIdx.x / 32];
  uint* values = warp.values[warp.turn & 1];
  values[threadIdx.x % 32] = value;
  emulated::meet(warp);
  uint bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= values[lane] << lane;
  return bits;
}

struct Barrier {  // in 8 bytes, as on the chip
  ushort members, arrived, phase, bytes;
  void init(int count) { members = count, arrived = 0, phase = 0, bytes = 0; }
  void arrive() {
    if (++arrived == members) arrived = 0, phase++;
  }
  void expect_transaction(int count) { bytes = count; }
  void arrive_and_expect_tx(int count) {
    bytes = count;
    arrive();
  }
  void wait(int parity) {
    while ((phase & 1) == parity) emulated::yield();
  }
};

namespace tl {
template <int N> static void warpgroup_reg_alloc() {}
template <int N> static void warpgroup_reg_dealloc() {}
template <int N> static bool tl_shuffle_elect() { return threadIdx.x % (N ? N : 1024) == 0; }
static void fence_barrier_init() {}
static void prefetch_tma_descriptor(CUtensorMap) {}
static void tma_load(CUtensorMap tensor, Barrier& barrier, void* to, int byte, int row) {
  memcpy(to, tensor + int64_t(row) * 128 + byte, barrier.bytes);
}
static void __named_barrier_arrive(int id, int threads) { emulated::arrive_named(id, threads); }
static void __sync_thread_partial(int id, int threads) {
  const uint turn = emulated::named_of(id).turn;
  emulated::arrive_named(id, threads);
  while (emulated::named_of(id).turn == turn) emulated::yield();
}
struct GmmaDescriptor {
  uint64_t units;  // of 16 bytes
  operator uint64_t() const { return units; }
};
template <int, int, int> static void initialize_wgmma_descriptor(GmmaDescriptor& tile, void* from) {
  tile.units = ((uchar*)from - buf_dyn_shmem) / 16;
}
template <class T> static void increase_descriptor_offset(GmmaDescriptor& tile, T bytes) { tile.units += bytes / 16; }
static void warpgroup_fence_operand(float*, int) {}
static void warpgroup_arrive() {}
static void warpgroup_commit_batch() {}
template <int N> static void wait_wgmma() {}
enum class DataType { kFloat8_e4m3, kBFloat16, kFloat32 };
// The thread's part of [M, N] += A [M, K] B [N, K], as a warpgroup's threads hold it.
template <DataType A, DataType, DataType, int M, int N, int K, bool, bool, int, int>
  requires(A == DataType::kFloat8_e4m3)
static void wgmma_ss(uint64_t a, uint64_t b, uint32_t* accumulators, int adds) {
  static float table[256];
  if (!table[1])
    for (int bits = 0; bits < 256; ++bits) table[bits] = emulated::value_of(bits);
  const uint lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  float* product = (float*)accumulators;
  for (int i = 0; i < N / 2; ++i) {
    const uchar* row = buf_dyn_shmem + a * 16 + (warp * 16 + i / 2 % 2 * 8 + lane / 4) * 128;
    const uchar* column = buf_dyn_shmem + b * 16 + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 128;
    float sum = adds ? product[i] : 0;
    for (int k = 0; k < K; ++k) sum += table[row[k]] * table[column[k]];
    product[i] = sum;
  }
}
}  // namespace tl
