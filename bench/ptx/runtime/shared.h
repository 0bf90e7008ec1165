// Shared memory, and the copies into it that run on their own. A granule of the checks is two bytes.
#pragma once
#include "global.h"

INL bool in_bounds(CTA& c, const Warp& w, int lane, u32 at, u32 bytes, int pc) {
  if ((u64)at + bytes > c.shared.size()) { S->report(OUT_OF_BOUNDS, pc, 0, &c, w.id, lane, at); return false; }
  if (at % bytes) S->report(MISALIGNED, pc, 0, &c, w.id, lane, at);
  return true;
}
// by_proxy: by wgmma, which sees what was written before a fence of the writer or of its own.
static void check_shared_read(CTA& c, const Warp& w, int lane, u32 at, u32 bytes, int pc, bool by_proxy = false) {
  What what; bool unwritten = false;
  for (u32 g = at / 2; g <= (at + bytes - 1) / 2; g++) {
    Cell& s = c.cells[g];
    if (s.landing) S->report(COPY_IN_FLIGHT, pc, s.write_pc, &c, w.id, lane, at);
    else if (race_with_write(s, c, w, lane, what)) S->report(what, pc, s.write_pc, &c, w.id, lane, at);
    if (by_proxy && s.write_seq > w.fenced && s.write_seq > c.warps[s.write_warp].fenced)
      S->report(NO_PROXY_FENCE, pc, s.write_pc, &c, w.id, lane, at);
    note_read(s, c, w, lane, pc);
    unwritten |= !s.write_epoch;
  }
  if (unwritten) S->report(UNWRITTEN, pc, 0, &c, w.id, lane, at);
}
static void check_shared_write(CTA& c, const Warp& w, int lane, u32 at, u32 bytes, const u8* data, int pc) {
  What what;
  for (u32 g = at / 2; g <= (at + bytes - 1) / 2; g++) {
    Cell& s = c.cells[g];
    if (s.landing) S->report(COPY_IN_FLIGHT, pc, s.write_pc, &c, w.id, lane, at);
    if (s.reading) S->report(WGMMA_READS, pc, s.read_pc, &c, w.id, lane, at);
    if (race_with_write(s, c, w, lane, what)) {
      u32 first = std::max(g * 2, at), last = std::min(g * 2 + 2, at + bytes);
      bool same = data && !memcmp(data + (first - at), &c.shared[first], last - first);
      if (!same) S->report(what, pc, s.write_pc, &c, w.id, lane, at);
      else if (what == RACE_WARPS || s.write_pc != (u32)pc) S->report(SAME_VALUE, pc, s.write_pc, &c, w.id, lane, at);
    }
    if (race_with_reads(s, c, w, lane, what)) S->report(what, pc, s.read_pc, &c, w.id, lane, at);
    note_write(s, c, w, lane, pc, false);
  }
}
INL void load_shared(CTA& c, const Warp& w, int lane, u32 at, u32 bytes, u8* out, int pc) {
  if (!in_bounds(c, w, lane, at, bytes, pc)) { memset(out, 0xff, bytes); return; }
  if (S->C.checks) check_shared_read(c, w, lane, at, bytes, pc);
  memcpy(out, &c.shared[at], bytes);
}
INL void store_shared(CTA& c, const Warp& w, int lane, u32 at, u32 bytes, const u8* data, int pc) {
  if (!in_bounds(c, w, lane, at, bytes, pc)) return;
  if (S->C.checks) check_shared_write(c, w, lane, at, bytes, data, pc);
  memcpy(&c.shared[at], data, bytes);
}

// cp.async: its source is read now or at the wait; until the wait, its destination is not to be touched.
static void copy_issue(CTA& c, Warp& w, Copy q) {
  if (!in_bounds(c, w, q.lane, q.to, q.bytes, q.pc)) return;
  q.early = !S->C.adversarial || rnd(2);
  memset(q.data, 0, sizeof q.data);
  if (q.early && q.from_bytes) load(c, w, q.lane, q.from, q.from_bytes, q.data, q.pc, q.bypass ? BYPASS : CACHED);
  if (S->C.checks) {
    u64 offset; int b = q.from_bytes ? buffer_of(q.from, q.from_bytes, offset) : -1;
    if (!q.early && b >= 0 && S->B[b].written) check_read(c, w, q.lane, b, offset, q.from_bytes, q.pc, false);
    check_shared_write(c, w, q.lane, q.to, q.bytes, nullptr, q.pc);
    for (u32 g = q.to / 2; g <= (q.to + q.bytes - 1) / 2; g++) c.cells[g].landing++;
  }
  if (S->C.adversarial) memset(&c.shared[q.to], 0xff, q.bytes);
  w.copies.push_back(q);
}
static void copy_wait(CTA& c, Warp& w, size_t left) {
  for (; w.groups.size() > left; w.groups.pop_front()) for (auto& q : w.groups.front()) {
    if (!q.early && q.from_bytes) load(c, w, q.lane, q.from, q.from_bytes, q.data, q.pc, q.bypass ? BYPASS : CACHED);
    if (S->C.checks) for (u32 g = q.to / 2; g <= (q.to + q.bytes - 1) / 2; g++) {
      note_write(c.cells[g], c, w, q.lane, q.pc, false);
      c.cells[g].landing--;
    }
    memcpy(&c.shared[q.to], q.data, q.bytes);
  }
  c.seq++;
}
