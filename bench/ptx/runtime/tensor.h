// Products of tiles: mma, and wgmma, whose operands and results are in use until the wait.
#pragma once
#include "shared.h"

enum Element { BF16, FP16, TF32 };
INL float element(const u8* p, int type) {
  if (type == TF32) { u32 x; memcpy(&x, p, 4); return tf32(x); }
  u16 h; memcpy(&h, p, 2);
  return type == BF16 ? (float)from_bits<Bf16>(h) : (float)from_bits<Fp16>(h);
}
// A fragment of a register for each lane: element `e` of lane l of register r of A is at (row, column).
template <class F> INL void elements_of_a(const u8* const* a, int registers, int type, F f) {
  int each = type == TF32 ? 1 : 2;
  for (int r = 0; r < registers; r++) for (int l = 0; l < 32; l++) for (int e = 0; e < each; e++)
    f((l >> 2) + (r & 1) * 8, (l & 3) * each + e + (r >> 1) * 4 * each, element(a[r] + 4 * l + 4 / each * e, type));
}
// C and D: row and column of register r of lane l.
INL int row_of(int r, int l) { return (l >> 2) + (r >> 1 & 1) * 8; }
INL int column_of(int r, int l) { return (r >> 2) * 8 + (l & 3) * 2 + (r & 1); }

// mma.m16n8kK. operands: D[4] A[..] B[..] C[4]; k0: K, k1: type.
static void mma(Warp& w, const i32* o, u32 mask, int K, int type) {
  int of_a = K * (type == TF32 ? 4 : 2) / 8, of_b = of_a / 2, each = type == TF32 ? 1 : 2;
  float A[16][16], B[16][8], C[16][8]; const u8* a[4];
  for (int r = 0; r < of_a; r++) a[r] = value(w, o[4 + r]);
  elements_of_a(a, of_a, type, [&](int row, int column, float v) { A[row][column] = v; });
  for (int r = 0; r < of_b; r++) {
    const u8* b = value(w, o[4 + of_a + r]);
    for (int l = 0; l < 32; l++) for (int e = 0; e < each; e++)
      B[(l & 3) * each + e + r * 4 * each][l >> 2] = element(b + 4 * l + 4 / each * e, type);
  }
  for (int r = 0; r < 4; r++) {
    const float* c = (const float*)value(w, o[4 + of_a + of_b + r]);
    for (int l = 0; l < 32; l++) C[row_of(r, l)][column_of(r, l)] = c[l];
  }
  for (int i = 0; i < 16; i++) for (int k = 0; k < K; k++) for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
  for (int r = 0; r < 4; r++) {
    float d[32];
    for (int l = 0; l < 32; l++) d[l] = C[row_of(r, l)][column_of(r, l)];
    put(reg(w, o[r]), d, mask);
  }
}

// wgmma.m64nNkK. operands: D[N/2], then those D again, A[4] or its descriptor, the descriptor of B, scale-d.
// k0: N, k1: type, k2: flags.
enum { A_IN_REGISTERS = 1, A_BY_COLUMNS = 2, B_BY_ROWS = 4, NEGATED = 8 };
// The addresses of the 16-byte units of `count` rows (of A, or columns of B) of 32 bytes; rows lie along k, or across.
static void add_units(std::vector<u32>& units, u64 d, int first, int count, int bytes, bool across) {
  u32 start = (u32)(d & 0x3fff) << 4, leading = (u32)(d >> 16 & 0x3fff) << 4, stride = (u32)(d >> 32 & 0x3fff) << 4;
  int swizzle = (int)(d >> 62), bits = swizzle ? 4 - swizzle : 0, width = 1 << bits, per = 16 / bytes, K = 32 / bytes;
  auto add = [&](u32 a) { units.push_back(a ^ ((a >> 7 & (width - 1)) << 4)); };
  if (!across) for (int i = first; i < first + count; i++) for (int u = 0; u < 2; u++)
    add(start + i % 8 * width * 16 + i / 8 * stride + u * (swizzle ? 16 : leading));
  else for (int i = first / per; i < (first + count) / per; i++) for (int k = 0; k < K; k++)
    add(swizzle ? start + i % width * 16 + i / width * leading + k % 8 * width * 16 + k / 8 * stride
                : start + i * stride + k % 8 * 16 + k / 8 * leading);
}
template <class F> static void elements_of_units(CTA& c, const u32* units, int count, int type, bool across, F f) {
  int bytes = type == TF32 ? 4 : 2, per = 16 / bytes, K = 32 / bytes, n = across ? count / per * K : count * 2;
  for (int u = 0; u < n; u++) for (int e = 0; e < per; e++) {
    float v = units[u] + 16 <= c.shared.size() ? element(&c.shared[units[u] + e * bytes], type) : NAN;
    if (across) f(u / K * per + e, u % K, v); else f(u / 2, u % 2 * per + e, v);
  }
}
static int units_of_a(const Product& q) {  // 16 rows
  int bytes = q.ins->k[1] == TF32 ? 4 : 2;
  return q.a_in_registers ? 0 : q.ins->k[2] & A_BY_COLUMNS ? 16 / (16 / bytes) * (32 / bytes) : 32;
}
static void multiply(CTA& c, const Product& q, Accumulator& d) {
  int N = q.ins->k[0], type = q.ins->k[1], flags = q.ins->k[2], K = type == TF32 ? 8 : 16;
  static float A[16][16], B[16][256], C[16][256];
  if (q.a_in_registers) {
    const u8* a[4];
    for (int r = 0; r < 4; r++) a[r] = (const u8*)q.a_registers[r];
    elements_of_a(a, 4, type, [&](int row, int column, float v) { A[row][column] = v; });
  } else elements_of_units(c, q.units.data(), 16, type, flags & A_BY_COLUMNS, [&](int row, int k, float v) { A[row][k] = v; });
  elements_of_units(c, q.units.data() + units_of_a(q), N, type, flags & B_BY_ROWS, [&](int n, int k, float v) { B[k][n] = v; });
  float sign = flags & NEGATED ? -1.f : 1.f;
  for (int r = 0; r < N / 2; r++) for (int l = 0; l < 32; l++) C[row_of(r, l)][column_of(r, l)] = q.add ? d.value[r * 32 + l] : 0;
  for (int i = 0; i < 16; i++) for (int k = 0; k < K; k++) {
    float a = sign * A[i][k];
    for (int n = 0; n < N; n++) C[i][n] += a * B[k][n];
  }
  for (int r = 0; r < N / 2; r++) for (int l = 0; l < 32; l++) d.value[r * 32 + l] = C[row_of(r, l)][column_of(r, l)];
}
static void wgmma(CTA& c, Warp& w, const Ins& I, const i32* o, int pc) {
  int registers = I.k[0] / 2, type = I.k[1], bytes = type == TF32 ? 4 : 2; const i32* x = o + 2 * registers;
  if (!w.wgmma_fenced) S->report(NO_WGMMA_FENCE, pc, 0, &c, w.id, 0, 0);
  Product q{&I, pc, (I.k[2] & A_IN_REGISTERS) != 0, false, 0, 0, {}, {}, w.wgmma_group};
  if (q.a_in_registers) for (int r = 0; r < 4; r++) memcpy(q.a_registers[r], value(w, *x++), 128);
  else memcpy(&q.a, value(w, *x++), 8);
  memcpy(&q.b, value(w, *x++), 8);
  q.add = *(const u32*)value(w, *x) & 1;
  if (!q.a_in_registers) add_units(q.units, q.a, w.id % 4 * 16, 16, bytes, I.k[2] & A_BY_COLUMNS);
  add_units(q.units, q.b, 0, I.k[0], bytes, I.k[2] & B_BY_ROWS);
  for (u32 a : q.units) {
    if ((u64)a + 16 > c.shared.size()) S->report(OUT_OF_BOUNDS, pc, 0, &c, w.id, 0, a);
    else if (S->C.checks) {
      check_shared_read(c, w, ALL_LANES, a, 16, pc, true);
      for (u32 g = a / 2; g < a / 2 + 8; g++) c.cells[g].reading++;
    }
  }
  if (w.products.empty() && w.accumulators.empty()) w.wgmma_late = S->C.adversarial && rnd(2);
  auto [it, first] = w.accumulators.try_emplace(o[0]);
  Accumulator& d = it->second;
  if (first) {
    d.at.assign(o, o + registers); d.value.resize(registers * 32);
    for (int r = 0; r < registers; r++) {
      memcpy(&d.value[r * 32], reg(w, o[r]), 128);
      if (S->C.adversarial) memset(reg(w, o[r]), 0xff, 128);
    }
  } else if ((int)d.at.size() != registers || memcmp(d.at.data(), o, 4 * registers))
    S->report(WGMMA_REGISTERS, pc, d.pc, &c, w.id, 0, 0);
  d.group = w.wgmma_group; d.pc = pc;
  if (!w.wgmma_late) multiply(c, q, d);
  w.products.push_back(std::move(q));
}
static void wgmma_wait(CTA& c, Warp& w, int left) {
  int until = w.wgmma_group - left; size_t done = 0;
  for (; done < w.products.size() && w.products[done].group < until; done++) {
    Product& q = w.products[done];
    const i32* o = S->P.operands + q.ins->first; int registers = q.ins->k[0] / 2;
    if (w.wgmma_late) multiply(c, q, w.accumulators[o[0]]);
    if (S->C.checks) for (u32 a : q.units) if ((u64)a + 16 <= c.shared.size()) for (u32 g = a / 2; g < a / 2 + 8; g++) {
      c.cells[g].reading--; note_read(c.cells[g], c, w, ALL_LANES, q.pc);  // it may have read up to now
    }
    for (int r = 0; q.a_in_registers && r < 4; r++) if (memcmp(q.a_registers[r], value(w, o[2 * registers + r]), 128)) {
      S->report(WGMMA_REGISTERS, q.pc, 0, &c, w.id, 0, 0);
      break;
    }
  }
  w.products.erase(w.products.begin(), w.products.begin() + done);
  for (auto it = w.accumulators.begin(); it != w.accumulators.end();) {
    if (it->second.group >= until) { ++it; continue; }
    for (size_t r = 0; r < it->second.at.size(); r++) memcpy(reg(w, it->second.at[r]), &it->second.value[r * 32], 128);
    it = w.accumulators.erase(it);
  }
}
// A register of a wgmma in flight is neither read nor written.
static void check_in_flight(CTA& c, Warp& w, const Ins& I, const i32* o, int pc) {
  for (auto& [at, d] : w.accumulators) for (i32 a : d.at) for (int i = 0; i < I.operands; i++)
    if (o[i] == a) { S->report(WGMMA_REGISTERS, pc, d.pc, &c, w.id, 0, 0); return; }
}
