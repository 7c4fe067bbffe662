// Matrix products of one warp on Turing (m16n8k8) and Volta (m8n8k4), as inline PTX: no headers.
//
// A warp's tile has ROWS rows. Everything is in steps of 8 columns or channels:
//   row operand     AREGS registers a lane: ROWS rows x 8 channels
//   column operand  BREGS registers a lane: 8 columns x 8 channels
//   accumulators    CREGS floats a lane:    ROWS rows x 8 columns; a lane owns parts of two rows
//
// Turing: one m16n8k8; accumulators packed to halves are the next product's row operand.
// Volta: two m8n8k4. Its four quad pairs (lanes 4p..4p+3 and 16+4p..) each do an 8x8x4 product; here
// they are stacked on the rows, with row `lane` of the tile in the row operand of each lane, so that
// 16-byte reads of a warp fall on different banks.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#if VOLTA
#define ROWS 32
#define AREGS 4
#define BREGS 4
#define CREGS 8
#else
#define ROWS 16
#define AREGS 2
#define BREGS 1
#define CREGS 4
#endif

#ifndef EMULATED
#define INLINE __device__ __forceinline__

INLINE int thread_number() { return threadIdx.x; }
INLINE int block_number() { return blockIdx.x; }
INLINE void block_barrier() { __syncthreads(); }

INLINE u32 shared_start() {
  extern __shared__ u16 shared_memory[];
  return (u32)__cvta_generic_to_shared(shared_memory);
}

INLINE void read_global(u32* out, const void* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "l"(from));
}

INLINE void write_shared(u32 at, const u32* in) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "r"(at), "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3]) : "memory");
}

INLINE void read_shared(u32* out, u32 at) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
}

INLINE void read_shared_half(u32* out, u32 at) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1]) : "r"(at) : "memory");
}

INLINE void write_shared_float(u32 at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory");
}

INLINE float read_shared_float(u32 at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}

INLINE u32 exchange(u32 x, int mask) {
  u32 out;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=r"(out) : "r"(x), "r"(mask));
  return out;
}

INLINE float exchange_float(float x, int mask) {
  float out;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(out) : "f"(x), "r"(mask));
  return out;
}

INLINE float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

INLINE float log2_of(float x) {
  float out;
  asm("lg2.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

INLINE u32 pack(float low, float high) {
  u32 out;
  asm("{.reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
      : "=r"(out) : "f"(low), "f"(high));
  return out;
}

INLINE void unpack(float* out, u32 pair) {
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(out[0]), "=f"(out[1]) : "r"(pair));
}

INLINE float rounded(float x) {
  float out;
  asm("{.reg .f16 a; cvt.rn.f16.f32 a, %1; cvt.f32.f16 %0, a;}" : "=f"(out) : "f"(x));
  return out;
}

INLINE float infinity() { return __int_as_float(0x7f800000); }

#if VOLTA
#define QUAD_PRODUCT(LAYOUT)                                                                   \
  asm volatile("mma.sync.aligned.m8n8k4.row." LAYOUT ".f32.f16.f16.f32 "                       \
               "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "                      \
               "{%0, %1, %2, %3, %4, %5, %6, %7};"                                             \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),       \
                 "+f"(c[6]), "+f"(c[7])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]))
INLINE void quad_product_columns(float* c, const u32* a, const u32* b) { QUAD_PRODUCT("col"); }
INLINE void quad_product_rows(float* c, const u32* a, const u32* b) { QUAD_PRODUCT("row"); }
#else
INLINE void product_16_8_8(float* c, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

INLINE void load_matrices(u32* out, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
}

INLINE void load_matrices_across(u32* out, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
}

INLINE void load_two_matrices(u32* out, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1]) : "r"(at) : "memory");
}
#endif
#endif  // EMULATED

#define CHUNKS (D / 8)
// Rows of an odd number of 16-byte chunks: eight of them start on different banks.
#define STRIDE ((CHUNKS | 1) * 16)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

#if VOLTA
INLINE int row_of(int lane, int half) { return (lane & ~2) + 2 * half; }
INLINE int column_of(int lane, int i) { return (i & 4) + (lane & 2) + (i & 1); }
INLINE float sum_of_row(float x) { return x + exchange_float(x, 2); }
INLINE float max_of_row(float x) { return fmaxf(x, exchange_float(x, 2)); }

INLINE void multiply(float* c, const u32* a, const u32* b) {
  quad_product_columns(c, a, b);
  quad_product_columns(c, a + 2, b + 2);
}

INLINE void multiply_across(float* c, const u32* a, const u32* b) {
  quad_product_rows(c, a, b);
  quad_product_rows(c, a + 2, b + 2);
}

// Each lane owns half of a row of the row operand; its partner two lanes on has the other half.
INLINE void operand_of(u32* a, const float* c, int lane) {
  const bool upper = lane & 2;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const u32 first = pack(c[4 * k], c[4 * k + 1]);
    const u32 second = pack(c[4 * k + 2], c[4 * k + 3]);
    const u32 other = exchange(upper ? first : second, 2);
    a[2 * k] = upper ? other : first;
    a[2 * k + 1] = upper ? second : other;
  }
}

INLINE void load_rows(u32* a, u32 tile, int row, int chunk, int lane) {
  read_shared(a, tile + (row + lane) * STRIDE + chunk * 16);
}

// Column operands of 32 columns, which are rows in memory, over 8 channels.
INLINE void load_columns(u32 (*b)[BREGS], u32 tile, int row, int chunk, int lane) {
  const int at = row + (lane & 3) + ((lane >> 4) << 2);
#pragma unroll
  for (int j = 0; j < 4; j++) read_shared(b[j], tile + (at + 8 * j) * STRIDE + chunk * 16);
}

// Column operands of 8 columns, which are channels in memory, over 32 rows.
INLINE void load_across(u32 (*b)[BREGS], u32 tile, int row, int chunk, int lane) {
  const u32 at = tile + (row + (lane & 3)) * STRIDE + chunk * 16 + ((lane >> 4) << 3);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    read_shared_half(b[j], at + 8 * j * STRIDE);
    read_shared_half(b[j] + 2, at + (8 * j + 4) * STRIDE);
  }
}
#define HALF_OF(i) (((i) >> 1) & 1)
#else
INLINE int row_of(int lane, int half) { return (lane >> 2) + 8 * half; }
INLINE int column_of(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

INLINE float sum_of_row(float x) {
  x += exchange_float(x, 1);
  return x + exchange_float(x, 2);
}

INLINE float max_of_row(float x) {
  x = fmaxf(x, exchange_float(x, 1));
  return fmaxf(x, exchange_float(x, 2));
}

INLINE void multiply(float* c, const u32* a, const u32* b) { product_16_8_8(c, a, b); }
INLINE void multiply_across(float* c, const u32* a, const u32* b) { product_16_8_8(c, a, b); }

INLINE void operand_of(u32* a, const float* c, int) {
  a[0] = pack(c[0], c[1]);
  a[1] = pack(c[2], c[3]);
}

INLINE void load_rows(u32* a, u32 tile, int row, int chunk, int lane) {
  load_two_matrices(a, tile + (row + (lane & 15)) * STRIDE + chunk * 16);
}

INLINE void load_columns(u32 (*b)[BREGS], u32 tile, int row, int chunk, int lane) {
  load_matrices(&b[0][0], tile + (row + lane) * STRIDE + chunk * 16);
}

INLINE void load_across(u32 (*b)[BREGS], u32 tile, int row, int chunk, int lane) {
  load_matrices_across(&b[0][0], tile + (row + lane) * STRIDE + chunk * 16);
}
#define HALF_OF(i) ((i) >> 1)
#endif
