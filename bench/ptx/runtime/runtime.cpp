// The PTX of one launch, executed warp by warp: 32 lanes under a mask, in an order that a seed decides.
#include "counting.h"
#include "tensor.h"

static void barrier_done(CTA& c) {
  if (S->C.timing) advance_to_barrier(c);
  for (auto& w : c.warps) if (w.state == AT_BARRIER) w.state = READY;
  c.arrived = 0; c.epoch++; S->barriers++;
  if (!c.acquiring) return;
  for (int i = 0; i < S->programs; i++) c.clock[i] = std::max(c.clock[i], c.acquired[i]);
  c.acquiring = false;
}
// The sides of a branch run one after the other, each until the instruction where all paths from the branch meet (-1: none).
static void diverge(Warp& w, u32 taken, i32 target, i32 meeting) {
  if (meeting >= 0) w.diverged.push_back({meeting, w.mask, w.until});
  w.diverged.push_back({w.pc, w.mask & ~taken, meeting});
  w.pc = target; w.mask = taken; w.until = meeting;
}
static void converge(Warp& w) {
  while (!w.diverged.empty() && (!w.mask || w.pc == w.until)) {
    Side& next = w.diverged.back();
    w.pc = next.pc; w.mask = next.mask; w.until = next.until;
    w.diverged.pop_back();
  }
}
enum Shuffle { IDX, UP, DOWN, BFLY };
INL int shuffled(int how, u32 lane, u32 b, u32 c, bool& inside) {
  u32 segment = c >> 8 & 31, clamp = c & 31, last = (lane & segment) | (clamp & ~segment), from;
  b &= 31;
  if (how == UP) { inside = (int)(lane - b) >= (int)last; from = lane - b; }
  else {
    from = how == DOWN ? lane + b : how == BFLY ? lane ^ b : (lane & segment) | (b & ~segment);
    inside = from <= last;
  }
  return inside ? from & 31 : lane;
}
template <class T> INL void addresses(const Warp& w, i32 operand, i32 offset, T* at) {
  const T* base = (const T*)value(w, operand);
  for (int l = 0; l < 32; l++) at[l] = base[l] + (i64)offset;
}
// Elements of `bytes` bytes between memory and registers of `wide` bytes, which are filled up with zeros.
INL void to_registers(Warp& w, const i32* o, int lane, const u8* data, int bytes, int count, int wide) {
  for (int e = 0; e < count; e++) {
    u64 v = 0;
    memcpy(&v, data + e * bytes, bytes);
    memcpy(reg(w, o[e]) + wide * lane, &v, wide);
  }
}
INL void from_registers(Warp& w, const i32* o, int lane, u8* data, int bytes, int count, int wide) {
  for (int e = 0; e < count; e++) memcpy(data + e * bytes, value(w, o[e]) + wide * lane, bytes);
}

// Runs a warp until it stops or `quantum` instructions are done.
static void run_warp(CTA& c, Warp& w, i64 quantum) {
  Sim& s = *S;
  const bool timing = s.C.timing, counting = timing || s.C.dram_sectors;
  while (quantum-- > 0) {
    const i32 pc = w.pc++;
    const Ins& I = s.P.code[pc]; const i32* o = s.P.operands + I.first; const i32 *k = I.k, *sources = o + I.results;
    u32 mask = w.mask;
    if (I.guard >= 0) mask &= *(const u32*)reg(w, I.guard) ^ (I.negated ? FULL : 0);
    Stats& stats = s.stats[pc];
    s.steps++; stats.executed++;
    bool miss = false, stopped = false;
    if (!mask && I.kind != BRANCH && I.kind != BARRIER) goto next;
    if (!w.accumulators.empty() && (I.kind < WGMMA || I.kind > WGMMA_WAIT)) check_in_flight(c, w, I, o, pc);
    if (I.kind == PLAIN) { s.run[pc](w.registers, s.P.constants, o, mask); goto next; }
    if (I.kind >= LDMATRIX && I.kind <= WGMMA_WAIT && mask != FULL) s.report(PARTIAL_WARP, pc, 0, &c, w.id, 0, 0);
    switch (I.kind) {
      case LOAD: {  // address; k: offset, bytes, elements, access and semantics, bytes of a register
        u64 at[32]; u8 data[16]; int n = k[1] * k[2];
        addresses(w, sources[0], k[0], at);
        if (counting) miss = count_sectors(c, at, mask, &Traffic::read, stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) {
          load(c, w, l, at[l], n, data, pc, (Access)(k[3] & 3));
          if (k[3] & 4) acquire(c, w, at[l]);
          to_registers(w, o, l, data, k[1], k[2], k[4]);
        }
        break; }
      case STORE: {  // address, values
        u64 at[32]; u8 data[16]; int n = k[1] * k[2];
        addresses(w, sources[0], k[0], at);
        if (counting) count_sectors(c, at, mask, &Traffic::written, stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) {
          from_registers(w, sources + 1, l, data, k[1], k[2], k[4]);
          if (k[3] & 4) release(c, w, at[l]);
          store(c, w, l, at[l], n, data, pc, (Access)(k[3] & 3));
        }
        c.seq++;
        if (s.C.adversarial && rnd(64) == 0) publish_some(c);
        break; }
      case ATOMIC: {  // address, values, and what CAS stores; k: offset, bytes, elements, semantics and 4 if it is read, operation
        u64 at[32]; int n = k[2], values = I.operands - I.results - 1;
        addresses(w, sources[0], k[0], at);
        if (counting) count_sectors(c, at, mask, &Traffic::reduced, stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) {
          u64 v[4] = {0}, old[4] = {0};
          for (int e = 0; e < values; e++) memcpy(&v[e], value(w, sources[1 + e]) + k[1] * l, k[1]);
          atomic(c, w, l, at[l], k[4], k[1], n, v, v[1], old, k[3] & 4, k[3] & 3, pc);
          if (I.results) for (int e = 0; e < n; e++) memcpy(reg(w, o[e]) + k[1] * l, &old[e], k[1]);
        }
        stopped = k[3] & 4;  // others come in between
        break; }
      case LOAD_SHARED: {
        u32 at[32]; u8 data[16];
        addresses(w, sources[0], k[0], at);
        if (timing) count_wavefronts(at, mask, k[1] * k[2], stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) {
          load_shared(c, w, l, at[l], k[1] * k[2], data, pc);
          to_registers(w, o, l, data, k[1], k[2], k[4]);
        }
        break; }
      case STORE_SHARED: {
        u32 at[32]; u8 data[16];
        addresses(w, sources[0], k[0], at);
        if (timing) count_wavefronts(at, mask, k[1] * k[2], stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) {
          from_registers(w, sources + 1, l, data, k[1], k[2], k[4]);
          store_shared(c, w, l, at[l], k[1] * k[2], data, pc);
        }
        c.seq++;
        break; }
      case COPY: {  // to, from, bytes of the source; k: offset of to, bytes, offset of from, has bytes of the source, bypasses L1
        u32 to[32], reads = 0; u64 from[32];
        addresses(w, o[0], k[0], to); addresses(w, o[1], k[2], from);
        const u32* given = k[3] ? (const u32*)value(w, o[2]) : nullptr;
        for (int l = 0; l < 32; l++) if ((mask >> l & 1) && (!given || given[l])) reads |= 1u << l;
        if (counting) miss = count_sectors(c, from, reads, &Traffic::copied, stats);
        if (timing) count_wavefronts(to, mask, k[1], stats);
        for (int l = 0; l < 32; l++) if (mask >> l & 1)
          copy_issue(c, w, {to[l], (u32)k[1], given ? std::min<u32>(given[l], k[1]) : k[1], (u32)pc, from[l], l, false, k[4] != 0, {}});
        c.seq++;
        break; }
      case COPY_COMMIT: w.groups.push_back(std::move(w.copies)); w.copies.clear(); break;
      case COPY_WAIT: copy_wait(c, w, k[0]); break;
      case LDMATRIX: {  // address; k: offset, matrices, transposed
        u32 at[32];
        addresses(w, sources[0], k[0], at);
        for (int q = 0; q < k[1]; q++) {
          u16 M[8][8]; u32* d = (u32*)reg(w, o[q]);
          for (int i = 0; i < 8; i++) load_shared(c, w, ALL_LANES, at[8 * q + i], 16, (u8*)M[i], pc);
          if (timing) count_wavefronts(at + 8 * q, 0xff, 16, stats);
          for (int l = 0; l < 32; l++) {
            int i = l >> 2, j = 2 * (l & 3);
            d[l] = k[2] ? M[j][i] | (u32)M[j + 1][i] << 16 : M[i][j] | (u32)M[i][j + 1] << 16;
          }
        }
        break; }
      case STMATRIX: {  // address, values
        u32 at[32];
        addresses(w, sources[0], k[0], at);
        for (int q = 0; q < k[1]; q++) {
          u16 M[8][8]; const u32* v = (const u32*)value(w, sources[1 + q]);
          for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) (k[2] ? M[2 * (l & 3) + h][l >> 2] : M[l >> 2][2 * (l & 3) + h]) = v[l] >> 16 * h;
          for (int i = 0; i < 8; i++) store_shared(c, w, ALL_LANES, at[8 * q + i], 16, (const u8*)M[i], pc);
          if (timing) count_wavefronts(at + 8 * q, 0xff, 16, stats);
        }
        c.seq++;
        break; }
      case MMA: mma(w, o, mask, k[0], k[1]); break;
      case WGMMA: wgmma(c, w, I, o, pc); break;
      case WGMMA_FENCE: w.wgmma_fenced = true; break;
      case WGMMA_COMMIT: w.wgmma_group++; w.wgmma_fenced = false; break;
      case WGMMA_WAIT: wgmma_wait(c, w, k[0]); break;
      case PROXY_FENCE: w.fenced = c.seq++; break;
      case WARP_SYNC: w.sync++; break;
      case SHUFFLE: {  // a, b, c; k: how, whether the second result is a predicate
        const u32 *a = (const u32*)value(w, sources[0]), *b = (const u32*)value(w, sources[1]), *d = (const u32*)value(w, sources[2]);
        u32 t[32], inside = 0;
        for (int l = 0; l < 32; l++) {
          bool in; int from = shuffled(k[0], l, b[l], d[l], in);
          inside |= (u32)in << l; t[l] = a[from];
          if ((mask >> l & 1) && !(mask >> from & 1)) s.report(PARTIAL_WARP, pc, 0, &c, w.id, l, 0);
        }
        put(reg(w, o[0]), t, mask);
        if (I.results > 1) put(reg(w, o[1]), inside, mask);
        break; }
      case VOTE: {  // a predicate; k: 0 ballot, 1 any, 2 all
        u32 yes = *(const u32*)value(w, sources[0]) & mask, t[32];
        std::fill(t, t + 32, yes);
        if (k[0] == 0) put(reg(w, o[0]), t, mask);
        else put(reg(w, o[0]), (k[0] == 1 ? yes != 0 : yes == mask) ? FULL : 0, mask);
        break; }
      case BARRIER:
        if (!w.diverged.empty() || mask != FULL || c.done) s.report(DIVERGED, pc, 0, &c, w.id, 0, 0);
        w.state = AT_BARRIER; w.sync++; c.seq++; stopped = true;
        break;
      case BRANCH:
        if (mask == w.mask) w.pc = k[0];
        else if (mask) diverge(w, mask, k[0], k[1]);
        break;
      case RETURN: {
        w.mask &= ~mask;
        u32 left = w.mask;
        for (auto& side : w.diverged) left |= side.mask &= ~mask;
        if (left) break;
        if (!w.copies.empty()) s.report(COPY_FORGOTTEN, pc, 0, &c, w.id, 0, 0);
        for (auto& group : w.groups) if (!group.empty()) s.report(COPY_FORGOTTEN, pc, 0, &c, w.id, 0, 0);
        w.state = DONE; c.done++; stopped = true;
        if (c.arrived) s.report(DIVERGED, pc, 0, &c, w.id, 0, 0);
        break; }
      default: s.report(TRAPPED, pc, 0, &c, w.id, 0, 0); w.state = DONE; c.done++; stopped = true;
    }
  next:
    if (timing) for (int reordered = 0; reordered < 2; reordered++) advance(c, w, reordered, I, o, mask != 0, miss);
    if (w.state == AT_BARRIER) c.arrived++;
    if (w.state != READY && c.arrived && c.arrived == (int)c.warps.size() - c.done) barrier_done(c);
    if (!w.diverged.empty() && w.state != DONE) converge(w);
    if (stopped) return;
  }
}

static std::unique_ptr<CTA> new_program(int id) {
  auto c = std::make_unique<CTA>();
  const Program& P = S->P;
  c->phases = S->phases + (i64)id * P.phases * PHASE_FIELDS;
  c->id = id; c->x = id % S->gx; c->y = id / S->gx % S->gy; c->z = id / S->gx / S->gy;
  c->shared.assign(P.shared, 0xff);
  if (S->C.checks) { c->cells.assign(P.shared / 2 + 9, Cell{}); c->clock.assign(S->programs, 0); }
  c->pages.resize(S->B.size()); c->seen.resize(S->B.size());
  c->registers.assign((size_t)P.registers * P.warps + 64, 0xff);  // what nothing was written to is NaN
  u8* first = (u8*)(((uintptr_t)c->registers.data() + 63) & ~(uintptr_t)63);
  c->warps.resize(P.warps);
  for (int i = 0; i < P.warps; i++) {
    Warp& w = c->warps[i];
    w.id = i; w.registers = first + (size_t)i * P.registers;
    for (int l = 0; l < 32; l++) {
      u32 special[] = {(u32)(i * 32 + l), (u32)c->x, (u32)c->y, (u32)c->z};
      for (int q = 0; q < 4; q++) memcpy(w.registers + P.special + 128 * q + 4 * l, &special[q], 4);
    }
    if (S->C.timing) for (auto& line : w.line) line.ready.resize(P.registers / 64);
  }
  return c;
}
static void run_grid() {
  Sim& s = *S; const Config& C = s.C;
  std::vector<int> order(s.programs);
  for (int i = 0; i < s.programs; i++) order[i] = i;
  if (C.adversarial && rnd(2)) for (int i = s.programs; i > 1; i--) std::swap(order[i - 1], order[rnd(i)]);
  size_t most = C.in_flight ? C.in_flight : 1 + rnd(6), next = 0, turn = 0;
  std::vector<std::unique_ptr<CTA>> flying, ended;  // of those that ended, some have stores that nobody has seen yet
  while (next < order.size() || !flying.empty()) {
    while (flying.size() < most && next < order.size()) flying.push_back(new_program(order[next++]));
    size_t at = C.in_flight ? turn++ % flying.size() : rnd((u32)flying.size());
    CTA& c = *flying[at];
    std::vector<Warp*> ready;
    for (auto& w : c.warps) if (w.state == READY) ready.push_back(&w);
    if (ready.empty()) {
      if (c.done < (int)c.warps.size()) { s.report(DEADLOCK, 0, 0, &c, 0, 0, 0); return; }
      if (C.adversarial && ended.size() < 48 && rnd(2)) {
        c.warps = {}; c.registers = {}; c.shared = {}; c.cells = {};
        ended.push_back(std::move(flying[at]));
      } else publish_all(c);
      flying.erase(flying.begin() + at);
      continue;
    }
    if (C.in_flight) for (Warp* w : ready) run_warp(c, *w, 32);  // side by side, as on a GPU
    else { u32 z = rnd(16); run_warp(c, *ready[rnd((u32)ready.size())], z < 3 ? 1 + rnd(6) : z == 15 ? 3000 : 1 + rnd(300)); }
    if (s.steps > C.limit) { s.report(ENDLESS, ready[0]->pc, 0, &c, ready[0]->id, 0, 0); return; }
    if (C.adversarial && rnd(8) == 0) for (auto& f : flying) if (rnd(2)) publish_some(*f);
  }
  for (size_t i = ended.size(); i > 1; i--) std::swap(ended[i - 1], ended[rnd((u32)i)]);
  for (auto& c : ended) publish_all(*c);
}

extern "C" {
const char* kind_name(int i) {
#define X(name) #name,
  static const char* names[] = {KINDS(X) nullptr};
#undef X
  return names[i];
}
const char* finding_name(int i) {
#define X(name, text) text,
  static const char* names[] = {FOUND(X) nullptr};
#undef X
  return names[i];
}
int plain_count() { define_plain(); return (int)plain_table().size(); }
const char* plain_name(int i) { return plain_table()[i].name.c_str(); }
const char* plain_widths(int i) { return plain_table()[i].widths.c_str(); }
void sizes(int* out) { int s[] = {sizeof(Ins), sizeof(Program), sizeof(Buffer), sizeof(Config), sizeof(Finding)}; memcpy(out, s, sizeof s); }
// stats: of every instruction; traffic: of every buffer; phases: of every program and phase; returns how many findings.
int launch(const Program* P, const Config* C, const Buffer* buffers, int count, int gx, int gy, int gz, Stats* stats, Traffic* traffic,
           i64* phases, u64* totals, Finding* found) {
  define_plain();
  Sim sim; S = &sim;
  sim.P = *P; sim.C = *C; sim.B.assign(buffers, buffers + count);
  sim.gx = gx; sim.gy = gy; sim.gz = gz; sim.programs = gx * gy * gz; sim.phases = phases;
  sim.stats.assign(P->length, {}); sim.traffic.assign(count, {}); sim.cells.resize(count); sim.run.resize(P->length);
  sim.dram.capacity = C->dram_sectors; sim.dram.at.resize(count);
  for (int i = 0; i < P->length; i++) if (P->code[i].kind == PLAIN) sim.run[i] = plain_table()[P->code[i].plain].run;
  for (int b = 0; b < count; b++) if (C->checks && buffers[b].written) sim.cells[b].assign(buffers[b].size / buffers[b].element + 9, Cell{});
  random_state = C->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (int i = 0; i < 8; i++) rnd(2);
  run_grid();
  dram_end(sim.dram);
  memcpy(stats, sim.stats.data(), sizeof(Stats) * P->length);
  memcpy(traffic, sim.traffic.data(), sizeof(Traffic) * count);
  memcpy(found, sim.found.data(), sizeof(Finding) * sim.found.size());
  totals[0] = sim.steps; totals[1] = sim.barriers;
  S = nullptr;
  return (int)sim.found.size();
}
}
