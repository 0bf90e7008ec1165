// What is counted: sectors and shared-memory wavefronts, the cycles of a simple in-order processor, and what DRAM sees.
#pragma once
#include "machine.h"

// Wavefronts of an access of n bytes a lane: lanes are served in groups whose bytes fill 128.
static void count_wavefronts(const u32* at, u32 mask, int bytes, Stats& stats) {
  int group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int l0 = 0; l0 < 32; l0 += group) {
    u32 words[32][32]; int in_bank[32] = {0}, most = 0, total = 0;
    for (int l = l0; l < l0 + group; l++) if (mask >> l & 1) for (int q = 0; q < std::max(1, bytes / 4); q++) {
      u32 word = at[l] / 4 + q, bank = word % 32; bool again = false;
      for (int i = 0; i < in_bank[bank]; i++) again |= words[bank][i] == word;
      if (!again) { words[bank][in_bank[bank]++] = word; most = std::max(most, in_bank[bank]); total++; }
    }
    stats.wavefronts += most; stats.ideal += (total + 31) / 32;
  }
}

// DRAM behind an L2 that keeps the sectors last used; stores wait in it until they are displaced.
static void dram_unlink(Dram& d, i32 n) {
  auto& node = d.nodes[n];
  (node.before >= 0 ? d.nodes[node.before].after : d.newest) = node.after;
  (node.after >= 0 ? d.nodes[node.after].before : d.oldest) = node.before;
}
static void dram_touch(Dram& d, int b, u32 sector, bool reads, bool writes) {
  auto& at = d.at[b];
  if (at.empty()) at.assign(S->B[b].size / SECTOR + 2, -1);
  i32 n = at[sector];
  if (n >= 0) dram_unlink(d, n);
  else {
    if (reads) S->traffic[b].dram_read++;
    if (d.nodes.size() < d.capacity) { n = (i32)d.nodes.size(); d.nodes.push_back({}); }
    else {
      n = d.oldest; auto& old = d.nodes[n];
      dram_unlink(d, n);
      d.at[old.buffer][old.sector] = -1;
      if (old.dirty) S->traffic[old.buffer].dram_written++;
    }
    d.nodes[n].buffer = b; d.nodes[n].sector = sector; d.nodes[n].dirty = false;
    at[sector] = n;
  }
  auto& node = d.nodes[n];
  node.dirty |= writes; node.before = -1; node.after = d.newest;
  if (d.newest >= 0) d.nodes[d.newest].before = n;
  d.newest = n;
  if (d.oldest < 0) d.oldest = n;
}
static void dram_end(Dram& d) {
  for (i32 n = d.newest; n >= 0; n = d.nodes[n].after) if (d.nodes[n].dirty) S->traffic[d.nodes[n].buffer].dram_written++;
}

// The sectors of a warp's access; whether its program loads one of them for the first time.
static bool count_sectors(CTA& c, const u64* at, u32 mask, u64 Traffic::*count, Stats& stats) {
  u64 sectors[32]; int n = 0; bool miss = false;
  bool reads = count == &Traffic::read || count == &Traffic::copied, writes = count == &Traffic::written;
  for (int l = 0; l < 32; l++) if (mask >> l & 1) {
    bool again = false;
    for (int i = n - 1; i >= 0 && !again; i--) again = sectors[i] == at[l] / SECTOR;
    if (!again) sectors[n++] = at[l] / SECTOR;
  }
  stats.sectors += n;
  for (int i = 0; i < n; i++) {
    u64 b = (sectors[i] * SECTOR >> 36) - 1;
    if (b >= S->B.size()) continue;
    u64 sector = sectors[i] - S->B[b].base / SECTOR;
    if (sector * SECTOR > S->B[b].size) continue;
    S->traffic[b].*count += 1;
    if (S->C.dram_sectors) dram_touch(S->dram, (int)b, (u32)sector, !writes, !reads);
    if (!S->C.timing || !reads) continue;
    auto& seen = c.seen[b];
    if (seen.empty()) seen.resize(S->B[b].size / SECTOR + 2, false);
    miss |= !seen[sector];
    seen[sector] = true;
  }
  return miss;
}

// One instruction on the scoreboard: it issues when its operands are ready, one a scheduler and cycle, of four schedulers.
enum Latency { ALU, SPECIAL, FROM_SHARED, TENSOR, FROM_GLOBAL, FROM_ATOMIC };
static void advance(CTA& c, Warp& w, bool reordered, const Ins& I, const i32* o, bool executed, bool miss) {
  Timeline& T = w.line[reordered];
  const int issue = std::max(1, S->P.warps / 4);
  auto ready = [&](i32 operand) { return operand >= 0 ? T.ready[operand / 64] : Moment{}; };
  Moment at = reordered ? T.block : T.now;
  for (int i = I.results; i < I.operands; i++) at = later(at, ready(o[i]));
  if (I.guard >= 0) at = later(at, ready(I.guard));
  if (I.kind == COPY_WAIT) for (; (int)T.copies.size() > I.k[0]; T.copies.pop_front()) at = later(at, T.copies.front());
  if (I.kind == WGMMA_WAIT) at = later(at, T.product);
  bool releases = I.kind == ATOMIC && I.k[3] & 2, stores = I.kind == STORE || I.kind == ATOMIC;
  bool stores_shared = I.kind == STORE_SHARED || I.kind == STMATRIX;
  bool ends_block = I.kind == BARRIER || I.kind == BRANCH || I.kind == RETURN || I.kind == COPY_WAIT || I.kind == WGMMA_WAIT;
  bool in_order = stores || stores_shared || ends_block || (I.kind >= COPY && I.kind <= COPY_WAIT) || (I.kind >= WGMMA && I.kind <= PROXY_FENCE);
  if (releases) at.cycle += 300, at.trips += 1;  // it waits for the writes before it
  if (reordered) {
    if (I.kind == LOAD || I.kind == COPY) at = later(at, T.stored);
    if (I.kind == LOAD_SHARED || I.kind == LDMATRIX) at.cycle = std::max(at.cycle, T.stored_shared.cycle);
    if (in_order) at = later(at, T.now);
  }
  static const int cycles[] = {5, 20, 30, 33, 280, 300};
  Moment done = {at.cycle + (I.latency == FROM_GLOBAL && !miss ? 35 : cycles[I.latency]), at.trips + (I.latency == FROM_ATOMIC || (I.latency == FROM_GLOBAL && miss))};
  for (int i = 0; i < I.results; i++) T.ready[o[i] / 64] = done;
  if (I.kind == COPY && executed) T.copy = later(T.copy, {at.cycle + 300, at.trips + miss});
  if (I.kind == COPY_COMMIT) { T.copies.push_back(T.copy); T.copy = {}; }
  if (I.kind == WGMMA) T.product = {std::max(T.product.cycle, at.cycle) + 16 + I.k[0] / 8, at.trips};
  Moment before = T.now;
  if (!reordered) T.now = {at.cycle + issue, at.trips};
  else {
    T.in_block++;
    if (in_order) T.now = later(T.now, at);
    if (stores) T.stored = at;
    if (stores_shared) T.stored_shared = at;
    if (ends_block) { T.now.cycle = std::max(T.now.cycle, T.block.cycle + T.in_block * issue); T.block = T.now; T.in_block = 0; }
  }
  i64* of_phase = c.phases + I.phase * PHASE_FIELDS;
  of_phase[1 + reordered] += T.now.cycle - before.cycle;
  if (w.id == 0) of_phase[3 + reordered] += T.now.trips - before.trips;
  if (!reordered) { of_phase[0]++; S->stats[&I - S->P.code].stalled += at.cycle - before.cycle; }
}
// Everybody waits for the last, and 20 cycles more.
static void advance_to_barrier(CTA& c) {
  for (int reordered = 0; reordered < 2; reordered++) {
    Moment last;
    for (auto& w : c.warps) if (w.state != DONE) last = later(last, w.line[reordered].now);
    last.cycle += 20;
    for (auto& w : c.warps) if (w.state != DONE) {
      Timeline& T = w.line[reordered]; i64* of_phase = c.phases + S->P.code[w.pc - 1].phase * PHASE_FIELDS;
      of_phase[1 + reordered] += last.cycle - T.now.cycle;
      if (w.id == 0) of_phase[3 + reordered] += last.trips - T.now.trips;
      T.now = T.block = last;
    }
  }
}
