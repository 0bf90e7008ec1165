// Who may access what after whom: checks of one granule of shared or global memory.
//
// Inside a program: by warp and barrier epoch, so that what is found hangs on the accesses and not on the schedule.
// Between lanes of a warp: bar.sync and bar.warp.sync order them, nothing else does. Between programs: by vector clocks
// along release and acquire.
#pragma once
#include "machine.h"

// Whether program c has acquired what `other` released after `epoch`; warp w may have, and the rest wait for a barrier.
INL bool ordered(const CTA& c, int w, u32 other, u32 epoch) {
  return c.clock[other] > epoch || (c.acquiring && c.acquirer == w && c.acquired[other] > epoch);
}
INL bool race_with_write(const Cell& s, const CTA& c, const Warp& w, int lane, What& what) {
  if (!s.write_epoch) return false;
  if (s.write_program != (u32)c.id) return what = RACE_PROGRAMS, !ordered(c, w.id, s.write_program, s.write_epoch);
  if (s.write_epoch != c.epoch) return false;
  if (s.write_warp != w.id) return what = RACE_WARPS, true;
  return what = RACE_LANES, s.write_sync == w.sync && s.write_lane != lane;
}
INL bool race_with_reads(const Cell& s, const CTA& c, const Warp& w, int lane, What& what) {
  if (!s.read_epoch) return false;
  if (s.read_program != (u32)c.id) return what = RACE_PROGRAMS, !ordered(c, w.id, s.read_program, s.read_epoch);
  if (s.read_epoch != c.epoch) return false;
  if (s.readers & ~(1u << w.id)) return what = RACE_WARPS, true;
  if (s.read_warp != w.id || s.read_sync != w.sync) return false;
  return what = RACE_LANES, lane == ALL_LANES ? s.lanes != FULL : (s.lanes & ~(1u << lane)) != 0;
}
INL void note_read(Cell& s, const CTA& c, const Warp& w, int lane, int pc) {
  u32 lanes = lane == ALL_LANES ? FULL : 1u << lane;
  if (s.read_program != (u32)c.id || s.read_epoch != c.epoch) {
    s.read_program = c.id; s.read_epoch = c.epoch; s.readers = 0; s.lanes = 0; s.read_pc = pc;
  }
  s.readers |= 1u << w.id;
  s.lanes = s.read_warp == w.id && s.read_sync == w.sync ? s.lanes | lanes : lanes;
  s.read_warp = w.id; s.read_sync = w.sync;
}
INL void note_write(Cell& s, const CTA& c, const Warp& w, int lane, int pc, bool atomic) {
  s.write_program = c.id; s.write_epoch = c.epoch; s.write_warp = w.id; s.write_lane = lane; s.write_sync = w.sync;
  s.write_pc = pc; s.write_seq = c.seq; s.atomic = atomic;
  s.read_epoch = 0; s.lanes = 0; s.readers = 0;
}
