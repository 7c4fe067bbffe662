// Backward in two passes without atomics: one over key tiles for dK and dV, one over query tiles for
// dQ. Scores are made again from lse; what a row sums up, `delta`, comes first. dS keeps twice the
// bits of a half, so that gradients err by little more than their own rounding.
//
//   P = exp2(scale_log2 * q k - log2e * lse)    dP = dO V^T    dS = P * (dP - delta)
//   dV = P^T dO    dK = scale * dS^T Q    dQ = scale * dS K
//
// The pass over keys works on the transposed matrices, so that P^T and dS^T leave the accumulators as
// the row operands of the next product. Volta's accumulators of dK and dV together exceed its registers
// for wide heads: the pass is then run once for each (WANT_DK, WANT_DV).

#define BLOCK_ROWS (WARPS * ROWS)
#define NOTHING ((u32(*)[AREGS])0)

INLINE void zero(float (*s)[CREGS], const int tiles) {
#pragma unroll
  for (int j = 0; j < tiles; j++)
#pragma unroll
    for (int i = 0; i < CREGS; i++) s[j][i] = 0.0f;
}

// lse in log2 units; +inf where a row sees nothing or does not exist, so that its P is 0.
INLINE float exponent_of(const float* lse, int row, int end) {
  const float x = row < end ? lse[row] : -infinity();
  return x == -infinity() ? infinity() : x * LOG2E;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_kernel(const Call call) {
  const int lane = thread_number() & 31, warp = thread_number() >> 5;
  const int row = block_number() * WARPS + warp;  // of (b, h, n)
  const int i = row % call.n, head = row / call.n % call.heads, b = row / call.n / call.heads;
  const i64 at_o = b * call.out.batch + head * call.out.head + i * call.out.row;
  const i64 at_d = b * call.dout.batch + head * call.dout.head + i * call.dout.row;
  const i64 at_l = b * call.low.batch + head * call.low.head + i * call.low.row;
  if (b >= call.slots) return;
  float sum = 0.0f;
  if (lane < CHUNKS) {
    u32 o[4], d[4];
    read_global(o, call.out.data + at_o + lane * 8);
    u32 l[4] = {0, 0, 0, 0};
    if (call.low.data) read_global(l, call.low.data + at_l + lane * 8);
    read_global(d, call.dout.data + at_d + lane * 8);
#pragma unroll
    for (int x = 0; x < 4; x++) {
      float left[2], right[2], rest[2];
      unpack(left, o[x]);
      unpack(rest, l[x]);
      unpack(right, d[x]);
      sum += (left[0] + rest[0]) * right[0] + (left[1] + rest[1]) * right[1];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += exchange_float(sum, step);
  if (lane == 0) call.delta[row] = sum;
}

INLINE void keys_step(
    float (*dk)[CREGS], float (*dv)[CREGS], u32 k_rows, u32 v_rows, u32 q_tile, u32 dout_tile,
    u32 statistics, int place, int column, int row, const Call& call, const Place& at, int lane,
    const bool masked) {
  float p[4][CREGS];
  zero(p, 4);
  scores(p, NOTHING, k_rows, q_tile, place, lane);
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int i = 0; i < CREGS; i++) {
      const int query = 8 * j + column_of(lane, i);
      float x = p[j][i] * call.scale_log2 - read_shared_float(statistics + 4 * (place + query));
      if (masked && !sees(call, at, row + query, column + row_of(lane, HALF_OF(i))))
        x = -infinity();
      p[j][i] = exp2_of(x);
    }
  }
#if WANT_DV
  u32 weights[4][AREGS];
#pragma unroll
  for (int j = 0; j < 4; j++) operand_of(weights[j], p[j], lane);
  accumulate(dv, weights, dout_tile, place, lane);
#endif
#if WANT_DK
  float ds[4][CREGS];
  zero(ds, 4);
  scores(ds, NOTHING, v_rows, dout_tile, place, lane);
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int i = 0; i < CREGS; i++) {
      const int query = place + 8 * j + column_of(lane, i);
      ds[j][i] = p[j][i] * (ds[j][i] - read_shared_float(statistics + 4 * (STAGE + query)));
    }
  }
  accumulate_exactly(dk, ds, q_tile, place, lane);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) keys_kernel(const Call call) {
  const int lane = thread_number() & 31, warp = thread_number() >> 5;
  const int key_heads = call.heads / call.group;
  Place at;
  if (!locate(at, call, (call.m + BLOCK_ROWS - 1) / BLOCK_ROWS, key_heads, false)) return;
  const int block_column = at.tile * BLOCK_ROWS, column = block_column + warp * ROWS;
  const u32 k_tile = shared_start();
  const u32 v_tile = k_tile + BLOCK_ROWS * STRIDE;
  const u32 q_tile = v_tile + BLOCK_ROWS * STRIDE;
  const u32 dout_tile = q_tile + STAGE * STRIDE;
  const u32 statistics = dout_tile + STAGE * STRIDE;
  {
    Rows<BLOCK_ROWS> rows;
    const u16* k = first_row(call.k, at, at.head, at.k_start);
    const u16* v = first_row(call.v, at, at.head, at.k_start);
    rows.fetch(k, call.k.row, block_column, at.length);
    rows.store(k_tile);
    rows.fetch(v, call.v.row, block_column, at.length);
    rows.store(v_tile);
  }
  const u32 k_rows = k_tile + warp * ROWS * STRIDE, v_rows = v_tile + warp * ROWS * STRIDE;
  const int last = min(column + ROWS, at.length) - 1;
  int some[2], all[2], of_block[2], unused[2];
  query_bounds(some, all, call, at, column, last);
  query_bounds(of_block, unused, call, at, block_column,
               min(block_column + BLOCK_ROWS, at.length) - 1);
  if (block_column >= at.length) of_block[1] = 0;
  float dk[CHUNKS][CREGS], dv[CHUNKS][CREGS];
  zero(dk, CHUNKS);
  zero(dv, CHUNKS);
  Rows<STAGE> next_q, next_dout;
#pragma unroll 1
  for (int member = 0; member < call.group; member++) {
    const int head = at.head * call.group + member;
    const u16* q = first_row(call.q, at, head, at.q_start);
    const u16* dout = first_row(call.dout, at, head, at.q_start);
    const float* lse = call.lse + first_statistic(call, at, head);
    const float* delta = call.delta + first_statistic(call, at, head);
    int stage = of_block[0] / STAGE * STAGE;
    if (PREFETCH && stage < of_block[1]) {
      next_q.fetch(q, call.q.row, stage, at.n);
      next_dout.fetch(dout, call.dout.row, stage, at.n);
    }
#pragma unroll 1
    for (; stage < of_block[1]; stage += STAGE) {
      block_barrier();
      if (!PREFETCH) {
        next_q.fetch(q, call.q.row, stage, at.n);
        next_dout.fetch(dout, call.dout.row, stage, at.n);
      }
      next_q.store(q_tile);
      next_dout.store(dout_tile);
      for (int i = thread_number(); i < STAGE; i += THREADS) {
        write_shared_float(statistics + 4 * i, exponent_of(lse, stage + i, at.n));
        write_shared_float(statistics + 4 * (STAGE + i),
                           stage + i < at.n ? delta[stage + i] : 0.0f);
      }
      block_barrier();
      if (PREFETCH && stage + STAGE < of_block[1]) {
        next_q.fetch(q, call.q.row, stage + STAGE, at.n);
        next_dout.fetch(dout, call.dout.row, stage + STAGE, at.n);
      }
      if (column > last) continue;
#pragma unroll 1
      for (int row = stage; row < stage + STAGE; row += 32) {
        if (row >= some[1] || row + 32 <= some[0]) continue;
        if (row >= all[0] && row + 32 <= all[1])
          keys_step(dk, dv, k_rows, v_rows, q_tile, dout_tile, statistics, row - stage, column,
                    row, call, at, lane, false);
        else
          keys_step(dk, dv, k_rows, v_rows, q_tile, dout_tile, statistics, row - stage, column,
                    row, call, at, lane, true);
      }
    }
  }
  // Keys past a sequence's length have no gradient; padded ones are there to be written.
  const int end = PACKED ? at.length : call.m;
  float by[2], one[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bool real = column + row_of(lane, half) < at.length;
    by[half] = real ? call.scale : 0.0f;
    one[half] = real ? 1.0f : 0.0f;
  }
#if WANT_DK
  write_rows(first_row(call.dk, at, at.head, at.k_start), call.dk.row, column, end, dk, by, lane);
#endif
#if WANT_DV
  write_rows(first_row(call.dv, at, at.head, at.k_start), call.dv.row, column, end, dv, one, lane);
#endif
}

INLINE void queries_step(
    float (*dq)[CREGS], u32 (*q)[AREGS], u32 (*dout)[AREGS], u32 q_rows, u32 dout_rows,
    u32 k_tile, u32 v_tile, const float* exponent, const float* delta, int place, int row,
    int column, const Call& call, const Place& at, int lane, const bool masked) {
  float p[4][CREGS], ds[4][CREGS];
  zero(p, 4);
  zero(ds, 4);
  scores(p, q, q_rows, k_tile, place, lane);
  scores(ds, dout, dout_rows, v_tile, place, lane);
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int i = 0; i < CREGS; i++) {
      float x = p[j][i] * call.scale_log2 - exponent[HALF_OF(i)];
      if (masked && !sees(call, at, row + row_of(lane, HALF_OF(i)),
                          column + 8 * j + column_of(lane, i)))
        x = -infinity();
      ds[j][i] = exp2_of(x) * (ds[j][i] - delta[HALF_OF(i)]);
    }
  }
  accumulate_exactly(dq, ds, k_tile, place, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) queries_kernel(const Call call) {
  const int lane = thread_number() & 31, warp = thread_number() >> 5;
  Place at;
  if (!locate(at, call, (call.n + BLOCK_ROWS - 1) / BLOCK_ROWS, call.heads, HAS_RIGHT)) return;
  const int key_head = at.head / call.group;
  const u16* k = first_row(call.k, at, key_head, at.k_start);
  const u16* v = first_row(call.v, at, key_head, at.k_start);
  const int block_row = at.tile * BLOCK_ROWS, row = block_row + warp * ROWS;
  const int last = min(row + ROWS, at.n) - 1;
  const u32 q_tile = shared_start();
  const u32 dout_tile = q_tile + (KEEP_ROWS ? BLOCK_ROWS * STRIDE : 0);
  const u32 k_tile = KEEP_ROWS ? dout_tile + BLOCK_ROWS * STRIDE : q_tile;
  const u32 v_tile = k_tile + STAGE * STRIDE;
  const u32 q_rows = q_tile + warp * ROWS * STRIDE, dout_rows = dout_tile + warp * ROWS * STRIDE;
  Rows<BLOCK_ROWS> rows;
  rows.fetch(first_row(call.q, at, at.head, at.q_start), call.q.row, block_row, at.n);
  rows.store(q_tile);
#if KEEP_ROWS
#define MY_Q NOTHING
#define MY_DOUT NOTHING
#else
  u32 my_q[CHUNKS][AREGS], my_dout[CHUNKS][AREGS];
#define MY_Q my_q
#define MY_DOUT my_dout
  block_barrier();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) load_rows(my_q[chunk], q_rows, 0, chunk, lane);
  block_barrier();
#endif
  rows.fetch(first_row(call.dout, at, at.head, at.q_start), call.dout.row, block_row, at.n);
  rows.store(dout_tile);
#if !KEEP_ROWS
  block_barrier();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) load_rows(my_dout[chunk], dout_rows, 0, chunk, lane);
#endif
  float exponent[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = row + row_of(lane, half);
    const i64 first = first_statistic(call, at, at.head);
    exponent[half] = exponent_of(call.lse + first, r, at.n);
    delta[half] = r < at.n ? call.delta[first + r] : 0.0f;
  }
  int some[2], all[2], of_block[2], unused[2];
  key_bounds(some, all, call, at, row, last);
  key_bounds(of_block, unused, call, at, block_row, min(block_row + BLOCK_ROWS, at.n) - 1);
  float dq[CHUNKS][CREGS];
  zero(dq, CHUNKS);
  Rows<STAGE> next_k, next_v;
  int stage = of_block[0] / STAGE * STAGE;
  if (PREFETCH && stage < of_block[1]) {
    next_k.fetch(k, call.k.row, stage, at.length);
    next_v.fetch(v, call.v.row, stage, at.length);
  }
#pragma unroll 1
  for (; stage < of_block[1]; stage += STAGE) {
    block_barrier();
    if (!PREFETCH) {
      next_k.fetch(k, call.k.row, stage, at.length);
      next_v.fetch(v, call.v.row, stage, at.length);
    }
    next_k.store(k_tile);
    next_v.store(v_tile);
    block_barrier();
    if (PREFETCH && stage + STAGE < of_block[1]) {
      next_k.fetch(k, call.k.row, stage + STAGE, at.length);
      next_v.fetch(v, call.v.row, stage + STAGE, at.length);
    }
    if (row > last) continue;
#pragma unroll 1
    for (int column = stage; column < stage + STAGE; column += 32) {
      if (column >= some[1] || column + 32 <= some[0]) continue;
      const int place = column - stage;
      if (column >= all[0] && column + 32 <= all[1])
        queries_step(dq, MY_Q, MY_DOUT, q_rows, dout_rows, k_tile, v_tile, exponent, delta, place,
                     row, column, call, at, lane, false);
      else
        queries_step(dq, MY_Q, MY_DOUT, q_rows, dout_rows, k_tile, v_tile, exponent, delta, place,
                     row, column, call, at, lane, true);
    }
  }
  if (row > last) return;
  const float by[2] = {call.scale, call.scale};
  write_rows(first_row(call.dq, at, at.head, at.q_start), call.dq.row, row, at.n, dq, by, lane);
}
