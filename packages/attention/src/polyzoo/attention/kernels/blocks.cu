// What the forward and backward kernels share: the call, where a block works, tiles in shared memory.

#define THREADS (32 * WARPS)

struct Tensor {
  u16* data;
  i64 batch, head, row;  // strides in elements; channels are neighbours
};

struct Call {
  Tensor q, k, v, out, low, dout, dq, dk, dv;  // low: what rounding took from out, or null
  float* lse;         // (b, h, n), or (h, total) when packed
  float* delta;       // the same
  const int* lengths; // valid keys of each batch item
  const int* q_ends;  // packed: where sequences start, and the end
  const int* k_ends;
  const int* schedule;  // packed: sequence and tile of each slot
  int heads, group, n, m, slots, left, right;
  float scale, scale_log2;
};

struct Place {
  int sequence, head, tile, q_start, k_start, n, length;
};

// Neighbouring blocks work on one head; under a causal rule the longest tiles come first.
INLINE bool locate(Place& at, const Call& call, int tiles, int heads, bool reversed) {
  const int block = block_number();
#if PACKED
  const int slot = block % call.slots;
  at.head = block / call.slots;
  at.sequence = call.schedule[2 * slot];
  at.tile = call.schedule[2 * slot + 1];
  if (at.sequence < 0) return false;
  at.q_start = call.q_ends[at.sequence];
  at.k_start = call.k_ends[at.sequence];
  at.n = call.q_ends[at.sequence + 1] - at.q_start;
  at.length = call.k_ends[at.sequence + 1] - at.k_start;
#else
  at.tile = block % tiles;
  if (reversed) at.tile = tiles - 1 - at.tile;
  at.head = block / tiles % heads;
  at.sequence = block / tiles / heads;
  at.q_start = at.k_start = 0;
  at.n = call.n;
  at.length = call.m;
#if KVLENS
  at.length = min(max(call.lengths[at.sequence], 0), call.m);
#endif
#endif
  return true;
}

INLINE u16* first_row(const Tensor& t, const Place& at, int head, int start) {
  return t.data + (PACKED ? 0 : at.sequence * t.batch) + head * t.head + start * t.row;
}

INLINE i64 first_statistic(const Call& call, const Place& at, int head) {
  const i64 outer = PACKED ? 0 : at.sequence;
  return (outer * call.heads + head) * call.n + at.q_start;
}

// Keys that some, and that all, of the query rows `row .. last` see.
INLINE void key_bounds(int* some, int* all, const Call& call, const Place& at, int row, int last) {
  const int delta = at.length - at.n;
  some[0] = all[0] = 0;
  some[1] = all[1] = at.length;
#if HAS_RIGHT
  some[1] = min(at.length, last + delta + call.right + 1);
  all[1] = min(at.length, row + delta + call.right + 1);
#endif
#if HAS_LEFT
  some[0] = max(0, row + delta - call.left);
  all[0] = max(0, last + delta - call.left);
#endif
}

// Query rows that see some, and that see all, of the keys `column .. last`.
INLINE void query_bounds(
    int* some, int* all, const Call& call, const Place& at, int column, int last) {
  const int delta = at.length - at.n;
  some[0] = all[0] = 0;
  some[1] = all[1] = at.n;
#if HAS_RIGHT
  some[0] = max(0, column - delta - call.right);
  all[0] = max(0, last - delta - call.right);
#endif
#if HAS_LEFT
  some[1] = min(at.n, last - delta + call.left + 1);
  all[1] = min(at.n, column - delta + call.left + 1);
#endif
}

INLINE bool sees(const Call& call, const Place& at, int row, int column) {
  const int delta = at.length - at.n;
  bool seen = column < at.length;
#if HAS_RIGHT
  seen = seen && column <= row + delta + call.right;
#endif
#if HAS_LEFT
  seen = seen && column >= row + delta - call.left;
#endif
  return seen;
}

// Some rows on their way to shared memory: fetched while the previous ones are used.
template <int COUNT>
struct Rows {
  static const int PARTS = (COUNT * CHUNKS + THREADS - 1) / THREADS;
  u32 parts[PARTS][4];

  // Rows `row .. row + COUNT` below `end`; the others are zero.
  INLINE void fetch(const u16* from, i64 stride, int row, int end) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int chunk = i * THREADS + thread_number();
      const int r = row + chunk / CHUNKS;
#pragma unroll
      for (int x = 0; x < 4; x++) parts[i][x] = 0;
      if (r < end && chunk < COUNT * CHUNKS)
        read_global(parts[i], from + r * stride + chunk % CHUNKS * 8);
    }
  }

  INLINE void store(u32 tile) const {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int chunk = i * THREADS + thread_number();
      if (chunk < COUNT * CHUNKS)
        write_shared(tile + chunk / CHUNKS * STRIDE + chunk % CHUNKS * 16, parts[i]);
    }
  }
};

// Products of the warp's rows with 32 columns, which are rows `row ..` of a tile.
INLINE void scores(float (*s)[CREGS], u32 (*a)[AREGS], u32 rows, u32 tile, int row, int lane) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    u32 b[4][BREGS], mine[AREGS];
    load_columns(b, tile, row, chunk, lane);
    if (a == 0) load_rows(mine, rows, 0, chunk, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) multiply(s[j], a == 0 ? mine : a[chunk], b[j]);
  }
}

// Adds the product of 32 columns of weights with rows `row ..` of a tile.
INLINE void accumulate(float (*sum)[CREGS], u32 (*weights)[AREGS], u32 tile, int row, int lane) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    u32 b[4][BREGS];
    load_across(b, tile, row, chunk, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) multiply_across(sum[chunk], weights[j], b[j]);
  }
}

// The same for weights at twice the bits of a half: first what a half holds of them, then the rest.
INLINE void accumulate_exactly(
    float (*sum)[CREGS], float (*weights)[CREGS], u32 tile, int row, int lane) {
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    u32 part[4][AREGS];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      operand_of(part[j], weights[j], lane);
#pragma unroll
      for (int i = 0; i < CREGS; i++) weights[j][i] -= rounded(weights[j][i]);
    }
    accumulate(sum, part, tile, row, lane);
  }
}

// Writes the warp's rows below `end` in halves, times a factor for each of a lane's two rows; a
// factor of 0 writes zeros whatever was summed. With `rest` it writes what that rounding takes away.
INLINE void write_rows(
    u16* to, i64 stride, int row, int end, float (*sum)[CREGS], const float* factor, int lane,
    const bool rest = false) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + row_of(lane, half);
    if (r >= end) continue;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
      for (int i = 0; i < CREGS; i += 2)
        if (HALF_OF(i) == half) {
          float x = factor[half] == 0.0f ? 0.0f : sum[chunk][i] * factor[half];
          float y = factor[half] == 0.0f ? 0.0f : sum[chunk][i + 1] * factor[half];
          if (rest) x -= rounded(x), y -= rounded(y);
          *(u32*)(to + r * stride + chunk * 8 + column_of(lane, i)) = pack(x, y);
        }
  }
}
