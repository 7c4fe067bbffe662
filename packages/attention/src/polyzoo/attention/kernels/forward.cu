// Forward: a block takes WARPS * ROWS queries of one head, a warp ROWS of them.
//
// Two levels of tiling: STAGE keys and values at a time come to shared memory (one pair of barriers;
// with PREFETCH the next stage is fetched into registers meanwhile), and are used in steps of STEP.

#define BLOCK_ROWS (WARPS * ROWS)
#define TILES (STEP / 8)

INLINE void forward_step(
    float (*sum)[CREGS], float* total, float* peak, u32 (*q)[AREGS], u32 q_tile, u32 k_tile,
    u32 v_tile, int row_in_stage, int row, int column, const Call& call, const Place& at, int lane,
    const bool masked) {
  float s[TILES][CREGS] = {};
#pragma unroll
  for (int j = 0; j < TILES; j += 4) scores(s + j, q, q_tile, k_tile, row_in_stage + 8 * j, lane);
  float highest[2] = {peak[0], peak[1]};
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < CREGS; i++) {
      s[j][i] *= call.scale_log2;
      if (masked && !sees(call, at, row + row_of(lane, HALF_OF(i)),
                          column + 8 * j + column_of(lane, i)))
        s[j][i] = -infinity();
      highest[HALF_OF(i)] = fmaxf(highest[HALF_OF(i)], s[j][i]);
    }
  float decay[2], pivot[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    highest[half] = max_of_row(highest[half]);
    pivot[half] = highest[half] == -infinity() ? 0.0f : highest[half];
    decay[half] = exp2_of(peak[half] - pivot[half]);
    peak[half] = highest[half];
    total[half] *= decay[half];
  }
  u32 weights[TILES][AREGS];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
#pragma unroll
    for (int i = 0; i < CREGS; i++) {
      s[j][i] = exp2_of(s[j][i] - pivot[HALF_OF(i)]);
      total[HALF_OF(i)] += s[j][i];
    }
    operand_of(weights[j], s[j], lane);
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
    for (int i = 0; i < CREGS; i++) sum[chunk][i] *= decay[HALF_OF(i)];
#pragma unroll
  for (int j = 0; j < TILES; j += 4)
    accumulate(sum, weights + j, v_tile, row_in_stage + 8 * j, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_kernel(const Call call) {
  const int lane = thread_number() & 31, warp = thread_number() >> 5;
  Place at;
  if (!locate(at, call, (call.n + BLOCK_ROWS - 1) / BLOCK_ROWS, call.heads, HAS_RIGHT)) return;
  const int key_head = at.head / call.group;
  const u16* q = first_row(call.q, at, at.head, at.q_start);
  const u16* k = first_row(call.k, at, key_head, at.k_start);
  const u16* v = first_row(call.v, at, key_head, at.k_start);
  const int block_row = at.tile * BLOCK_ROWS, row = block_row + warp * ROWS;
  const int last = min(row + ROWS, at.n) - 1;
  const u32 start = shared_start();
  const u32 k_tile = start + (KEEP_ROWS ? BLOCK_ROWS * STRIDE : 0);
  const u32 v_tile = k_tile + STAGE * STRIDE;
  {
    Rows<BLOCK_ROWS> rows;
    rows.fetch(q, call.q.row, block_row, at.n);
    rows.store(start);
  }
  block_barrier();
  const u32 q_tile = start + warp * ROWS * STRIDE;
#if !KEEP_ROWS
  u32 mine[CHUNKS][AREGS];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) load_rows(mine[chunk], q_tile, 0, chunk, lane);
#define MINE mine
#else
#define MINE ((u32(*)[AREGS])0)
#endif
  int some[2], all[2], of_block[2], unused[2];
  key_bounds(some, all, call, at, row, last);
  key_bounds(of_block, unused, call, at, block_row, min(block_row + BLOCK_ROWS, at.n) - 1);
  float sum[CHUNKS][CREGS] = {}, total[2] = {0.0f, 0.0f}, peak[2] = {-infinity(), -infinity()};
  Rows<STAGE> next_k, next_v;
  int stage = of_block[0] / STAGE * STAGE;
  if (PREFETCH && stage < of_block[1]) {
    next_k.fetch(k, call.k.row, stage, at.length);
    next_v.fetch(v, call.v.row, stage, at.length);
  }
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
    if (row > last) continue;  // a warp below the last query only fetches
#pragma unroll 1
    for (int column = stage; column < stage + STAGE; column += STEP) {
      if (column >= some[1] || column + STEP <= some[0]) continue;
      const int place = column - stage;
      if (column >= all[0] && column + STEP <= all[1])
        forward_step(sum, total, peak, MINE, q_tile, k_tile, v_tile, place, row, column, call, at,
                     lane, false);
      else
        forward_step(sum, total, peak, MINE, q_tile, k_tile, v_tile, place, row, column, call, at,
                     lane, true);
    }
  }
  if (row > last) return;
  float* lse = call.lse + first_statistic(call, at, at.head);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float whole = sum_of_row(total[half]);
    const bool dead = whole == 0.0f;
    factor[half] = dead ? 0.0f : 1.0f / whole;
    const int r = row + row_of(lane, half);
    if (r < at.n && column_of(lane, 0) == 0)
      lse[r] = dead ? -infinity() : (peak[half] + log2_of(whole)) * LN2;
  }
  write_rows(first_row(call.out, at, at.head, at.q_start), call.out.row, row, at.n, sum, factor,
             lane);
  if (call.low.data)
    write_rows(first_row(call.low, at, at.head, at.q_start), call.low.row, row, at.n, sum, factor,
               lane, true);
}
