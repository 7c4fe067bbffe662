// Runs the CUDA kernels of polyzoo.attention on a CPU: a fiber per thread, products of a warp written
// out from the fragment tables of the PTX manual. Blocks run one after the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EMULATED 1
#define INLINE inline
#define __global__
#define __launch_bounds__(threads, blocks)
using std::max;
using std::min;

namespace {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  bool done = true;
};
constexpr int kMost = 256;
Fiber fibers[kMost];
ucontext_t scheduler;
int current, block, threads, running;
alignas(16) unsigned char shared_memory[1 << 17];
unsigned allowed, poison;
const char* fault;
int worst_ways;  // most passes that one read needs because of banks, beyond what its size takes

// One meeting of `size` threads: the last one to come does the work.
struct Meeting {
  int come = 0;
  long round = 0;
};
Meeting of_block, of_warp[kMost / 32];

void pause() { swapcontext(&fibers[current].context, &scheduler); }

template <class Work>
void meet(Meeting& meeting, int size, Work work) {
  const long round = meeting.round;
  if (++meeting.come == size) {
    work();
    meeting.come = 0;
    meeting.round++;
  } else {
    while (meeting.round == round) pause();
  }
}

template <class Work>
void in_warp(Work work) {
  meet(of_warp[current / 32], 32, work);
}

struct Lane {
  const unsigned* a;
  const unsigned* b;
  float* c;
  unsigned* out;
  unsigned value;
};
Lane lanes[kMost];
Lane* warp_lanes() { return lanes + current / 32 * 32; }

float half_at(const unsigned* words, int index) {
  _Float16 x;
  std::memcpy(&x, reinterpret_cast<const char*>(words) + 2 * index, 2);
  return static_cast<float>(x);
}

// Reads of `bytes` a lane are served 128 bytes at a time: so many lanes share a pass, unless two want
// different words of one bank.
void count_ways(const unsigned* at, int lane_count, int bytes) {
  const int group = 128 / bytes;
  for (int first = 0; first < lane_count; first += group) {
    std::vector<unsigned> words[32];
    for (int lane = first; lane < first + group; lane++)
      for (int i = 0; i < bytes / 4; i++) {
        const unsigned word = at[lane] / 4 + i;
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    for (auto& bank : words) worst_ways = max(worst_ways, static_cast<int>(bank.size()));
  }
}

void check(unsigned at, unsigned bytes, unsigned align) {
  if (at % align) fault = "shared memory access is not aligned";
  if (at + bytes > allowed) fault = "access past the end of shared memory";
}
}  // namespace

typedef unsigned int u32;
INLINE int thread_number() { return current; }
INLINE int block_number() { return block; }
INLINE void block_barrier() { meet(of_block, threads, [] {}); }
INLINE u32 shared_start() { return 0; }
INLINE void read_global(u32* out, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fault = "global read is not aligned";
  std::memcpy(out, from, 16);
}
INLINE void write_shared(u32 at, const u32* in) {
  check(at, 16, 16);
  std::memcpy(shared_memory + at, in, 16);
}
template <int BYTES>
INLINE void read_vector(u32* out, u32 at) {
  check(at, BYTES, BYTES);
  std::memcpy(out, shared_memory + at, BYTES);
  lanes[current].value = at;
  in_warp([] {
    unsigned at[32];
    for (int i = 0; i < 32; i++) at[i] = warp_lanes()[i].value;
    count_ways(at, 32, BYTES);
  });
}
INLINE void read_shared(u32* out, u32 at) { read_vector<16>(out, at); }
INLINE void read_shared_half(u32* out, u32 at) { read_vector<8>(out, at); }
INLINE void write_shared_float(u32 at, float x) {
  check(at, 4, 4);
  std::memcpy(shared_memory + at, &x, 4);
}
INLINE float read_shared_float(u32 at) {
  float x;
  check(at, 4, 4);
  std::memcpy(&x, shared_memory + at, 4);
  return x;
}
INLINE u32 exchange(u32 x, int mask) {
  lanes[current].value = x;
  u32 out = 0;
  lanes[current].out = &out;
  in_warp([=] {
    Lane* warp = warp_lanes();
    for (int i = 0; i < 32; i++) *warp[i].out = warp[i ^ mask].value;
  });
  return out;
}
INLINE float exchange_float(float x, int mask) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  bits = exchange(bits, mask);
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE float exp2_of(float x) { return std::exp2(x); }
INLINE float log2_of(float x) { return std::log2(x); }
INLINE float infinity() { return INFINITY; }
INLINE u32 pack(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  u32 out;
  std::memcpy(&out, pair, 4);
  return out;
}
INLINE float rounded(float x) { return static_cast<float>(static_cast<_Float16>(x)); }
INLINE void unpack(float* out, u32 pair) {
  out[0] = half_at(&pair, 0);
  out[1] = half_at(&pair, 1);
}

#if VOLTA
// m8n8k4: quad pair p is lanes 4p + t and 16 + 4p + t. A .row: row t + 4hi, k = v. B .col: column
// t + 4hi, k = v; B .row: k = t, column v + 4hi. C: row (t & 1) + (i & 2) + 4hi, column
// (i & 4) + (t & 2) + (i & 1).
template <bool ACROSS>
INLINE void quad_product(float* c, const u32* a, const u32* b) {
  lanes[current] = {a, b, c, nullptr, 0};
  in_warp([] {
    Lane* warp = warp_lanes();
    for (int p = 0; p < 4; p++) {
      const auto lane_of = [p](int row) { return (row & 3) + 4 * p + (row >> 2) * 16; };
      for (int row = 0; row < 8; row++)
        for (int column = 0; column < 8; column++) {
          float sum = 0;
          for (int k = 0; k < 4; k++) {
            const float left = half_at(warp[lane_of(row)].a, k);
            const float right = ACROSS ? half_at(warp[lane_of(k + (column & 4))].b, column & 3)
                                       : half_at(warp[lane_of(column)].b, k);
            sum += left * right;
          }
          const int lane = (row & 1) + (column & 2) + 4 * p + (row >> 2) * 16;
          warp[lane].c[(row & 2) + (column & 4) + (column & 1)] += sum;
        }
    }
  });
}
INLINE void quad_product_columns(float* c, const u32* a, const u32* b) { quad_product<false>(c, a, b); }
INLINE void quad_product_rows(float* c, const u32* a, const u32* b) { quad_product<true>(c, a, b); }
#else
// m16n8k8: A: row g (and g + 8), k 2t and 2t + 1; B: k 2t, 2t + 1, column g; C: row g (and g + 8),
// columns 2t, 2t + 1; with g = lane / 4, t = lane % 4.
INLINE void product_16_8_8(float* c, const u32* a, const u32* b) {
  lanes[current] = {a, b, c, nullptr, 0};
  in_warp([] {
    Lane* warp = warp_lanes();
    for (int row = 0; row < 16; row++)
      for (int column = 0; column < 8; column++) {
        float sum = 0;
        for (int k = 0; k < 8; k++)
          sum += half_at(warp[(row & 7) * 4 + k / 2].a + (row >> 3), k & 1) *
                 half_at(warp[column * 4 + k / 2].b, k & 1);
        warp[(row & 7) * 4 + column / 2].c[(row >> 3) * 2 + (column & 1)] += sum;
      }
  });
}
template <int COUNT, bool ACROSS>
INLINE void matrices(u32* out, u32 at) {
  check(at, 16, 16);
  lanes[current] = {nullptr, nullptr, nullptr, out, at};
  in_warp([] {
    Lane* warp = warp_lanes();
    unsigned addresses[8 * COUNT];
    for (int i = 0; i < 8 * COUNT; i++) addresses[i] = warp[i].value;
    count_ways(addresses, 8 * COUNT, 16);
    for (int matrix = 0; matrix < COUNT; matrix++)
      for (int lane = 0; lane < 32; lane++)
        for (int x = 0; x < 2; x++) {
          const int major = lane / 4, minor = lane % 4 * 2 + x;
          const int row = ACROSS ? minor : major, column = ACROSS ? major : minor;
          std::memcpy(reinterpret_cast<char*>(warp[lane].out + matrix) + 2 * x,
                      shared_memory + warp[matrix * 8 + row].value + 2 * column, 2);
        }
  });
}
INLINE void load_matrices(u32* out, u32 at) { matrices<4, false>(out, at); }
INLINE void load_matrices_across(u32* out, u32 at) { matrices<4, true>(out, at); }
INLINE void load_two_matrices(u32* out, u32 at) { matrices<2, false>(out, at); }
#endif

#include SOURCE

namespace {
void (*kernel)(Call);
Call arguments;

void body() {
  kernel(arguments);
  fibers[current].done = true;
  running--;
  swapcontext(&fibers[current].context, &scheduler);
}
}  // namespace

extern "C" int bank_ways() { return worst_ways; }

// Runs `blocks` blocks; returns null, or what went wrong.
extern "C" const char* run_kernel(
    int which, int blocks, int block_threads, int shared_bytes, const Call* call) {
#if BACKWARD
  void (*const kernels[])(Call) = {delta_kernel, keys_kernel, queries_kernel};
#else
  void (*const kernels[])(Call) = {forward_kernel};
#endif
  kernel = kernels[which];
  arguments = *call;
  threads = block_threads;
  allowed = shared_bytes;
  fault = nullptr;
  for (block = 0; block < blocks; block++) {
    std::memset(shared_memory, 0x7f, sizeof shared_memory);  // halves of NaN: unwritten data shows
    of_block = Meeting();
    for (Meeting& meeting : of_warp) meeting = Meeting();
    running = threads;
    for (int i = 0; i < threads; i++) {
      Fiber& fiber = fibers[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, body, 0);
      fiber.done = false;
    }
    for (long idle = 0; running > 0;) {
      const long before = of_block.round + running;
      long met = 0;
      for (Meeting& meeting : of_warp) met += meeting.round;
      for (current = 0; current < threads; current++)
        if (!fibers[current].done) swapcontext(&scheduler, &fibers[current].context);
      long after = 0;
      for (Meeting& meeting : of_warp) after += meeting.round;
      idle = before == of_block.round + running && met == after ? idle + 1 : 0;
      if (idle > 2) return "threads wait for each other: a barrier or a warp's operation diverged";
      if (fault) return fault;
    }
  }
  return nullptr;
}
