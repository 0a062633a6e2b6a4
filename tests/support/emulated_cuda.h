// Stand-ins for the CUDA that TileLang generates from kernels of plain integer and warp instructions, so that a C++
// compiler can run them on a CPU: every thread of a block is a fibre, which yields where it would wait for others.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
using std::max;
using std::min;
static constexpr float CUDART_INF_F = INFINITY;
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct dim3_ {
  uint x = 0, y = 0, z = 0;
};
static dim3_ threadIdx, blockIdx;
alignas(1024) static uchar buf_dyn_shmem[227 * 1024];

namespace emulated {
static constexpr int STACK = 64 * 1024;
struct Meeting {  // of `members` threads; a value travels in one of two buffers, as the next meeting may begin at once
  int members = 0, arrived = 0, turn = 0;
  uint values[2][32];
};
static ucontext_t scheduler;
static std::vector<ucontext_t> fibres;
static std::vector<char> finished, stacks;
static std::vector<Meeting> warps;
static Meeting block;
static void (*body)();

static void meet(Meeting& meeting) {
  const int turn = meeting.turn;
  const uint thread = threadIdx.x;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    meeting.turn++;
    return;
  }
  while (meeting.turn == turn) swapcontext(&fibres[thread], &scheduler);
}

static uint exchange(uint value, int source) {
  Meeting& warp = warps[threadIdx.x / 32];
  uint* values = warp.values[warp.turn & 1];
  values[threadIdx.x % 32] = value;
  meet(warp);
  return values[source & 31];
}

static void fibre() {
  body();
  finished[threadIdx.x] = 1;
  swapcontext(&fibres[threadIdx.x], &scheduler);
}

// Runs every block in turn, `columns` of them side by side; its threads in an order that changes with the block. False:
// threads wait for each other.
static bool launch(int blocks, int columns, int threads, void (*kernel)()) {
  body = kernel;
  fibres.resize(threads);
  stacks.resize(size_t(threads) * STACK);
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = b % columns;
    blockIdx.y = b / columns;
    memset(buf_dyn_shmem, 0xa5, sizeof buf_dyn_shmem);
    finished.assign(threads, 0);
    warps.assign(threads / 32, Meeting{32});
    block = Meeting{threads};
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibres[t]);
      fibres[t].uc_stack.ss_sp = &stacks[size_t(t) * STACK];
      fibres[t].uc_stack.ss_size = STACK;
      fibres[t].uc_link = nullptr;
      makecontext(&fibres[t], fibre, 0);
    }
    for (int left = threads, idle = 0; left;) {
      left = 0;
      if (++idle > 100000) return false;
      for (int i = 0; i < threads; ++i) {
        const int t = b % 2 ? threads - 1 - i : i;
        if (finished[t]) continue;
        left++;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibres[t]);
      }
    }
  }
  return true;
}
}  // namespace emulated

static void __syncthreads() { emulated::meet(emulated::block); }
static void __syncwarp() { emulated::meet(emulated::warps[threadIdx.x / 32]); }
static int __popc(uint value) { return __builtin_popcount(value); }
template <class T> static T __shfl_sync(uint, T value, int source, int) { return T(emulated::exchange(value, source)); }
template <class T> static T __shfl_up_sync(uint, T value, int distance, int) {
  const int lane = threadIdx.x % 32;
  return T(emulated::exchange(value, lane < distance ? lane : lane - distance));
}
template <class T> static T __shfl_down_sync(uint, T value, int distance, int) {
  const int lane = threadIdx.x % 32;
  return T(emulated::exchange(value, lane + distance > 31 ? lane : lane + distance));
}
template <class T> static T __shfl_xor_sync(uint, T value, int other, int) {
  return T(emulated::exchange(value, (threadIdx.x % 32) ^ other));
}
template <class T, class V> static void AtomicAdd(T* address, V value, int = 0) { *address += T(value); }
namespace tl {
template <class T> static T warp_reduce_max(T value) {
  for (int d = 16; d; d /= 2) value = std::max(value, __shfl_xor_sync(0, value, d, 32));
  return value;
}
template <class T> static T warp_reduce_sum(T value) {
  for (int d = 16; d; d /= 2) value += __shfl_xor_sync(0, value, d, 32);
  return value;
}
}  // namespace tl
