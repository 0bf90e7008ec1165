// Global memory, as unkind as a GPU may be.
//
// A program's stores stay in pages of its own until it releases them, or until some moment. Its loads go through an L1
// whose sectors stay as they were until it acquires. Atomics whose result nobody reads are added later, in any order.
#pragma once
#include "plain.h"
#include "races.h"

enum Semantics { RELAXED, ACQUIRE, RELEASE, ACQ_REL };
enum Access { CACHED, BYPASS, STRONG };  // STRONG: volatile or relaxed, which does not race with atomics

INL int buffer_of(u64 address, u64 bytes, u64& offset) {  // -1: none
  offset = 0;
  u64 b = (address >> 36) - 1;
  if (b >= S->B.size() || address < S->B[b].base) return -1;
  offset = address - S->B[b].base;
  return offset + bytes <= S->B[b].size ? (int)b : -1;
}
static Page* page(CTA& c, int b, u64 offset, bool make) {
  auto& of_buffer = c.pages[b];
  if (of_buffer.empty()) { if (!make) return nullptr; of_buffer.resize((S->B[b].size >> 12) + 1, nullptr); }
  Page*& p = of_buffer[offset >> 12];
  if (!p && make) { c.owned.push_back(std::make_unique<Page>()); p = c.owned.back().get(); memset(p, 0, sizeof(Page)); }
  return p;
}
static void publish(Page* p, u64 sector) {  // what the program has stored in the sector at this address
  u64 offset; int b = buffer_of(sector, 1, offset);
  int s = (offset & 4095) / SECTOR; u8* data = p->data + s * SECTOR;
  for (int i = 0; i < SECTOR; i++) if (p->dirty[s] >> i & 1) {
    S->B[b].host[offset + i] = data[i];
    if (p->cached[s]) p->copy[s * SECTOR + i] = data[i];
  }
  p->dirty[s] = 0;
}

// Atomics. An element is of 2, 4 or 8 bytes; the types are those of PTX.
enum Operation { ADD, MIN, MAX, AND, OR, XOR, EXCH, CAS };
enum Type { UNSIGNED, SIGNED, FLOAT, BFLOAT, TWO_HALVES, TWO_BFLOATS, HALF };
template <class T> u64 bits_of(T v) { u64 x = 0; memcpy(&x, &v, sizeof v); return x; }
template <class T> T from_bits(u64 x) { T v; memcpy(&v, &x, sizeof v); return v; }
template <class T> u64 in_type(int operation, u64 old, u64 v) {
  T a = from_bits<T>(old), b = from_bits<T>(v);
  return bits_of<T>(operation == ADD ? T(a + b) : operation == MIN ? (a < b ? a : b) : (a > b ? a : b));
}
static u64 combined(u32 op, u32 bytes, u64 old, u64 v, u64 other) {
  int operation = op >> 4, type = op & 15;
  switch (operation) {
    case AND: return old & v;
    case OR: return old | v;
    case XOR: return old ^ v;
    case EXCH: return v;
    case CAS: return old == v ? other : old;
  }
  switch (type) {
    case FLOAT: return bytes == 4 ? in_type<float>(operation, old, v) : in_type<double>(operation, old, v);
    case SIGNED: return bytes == 4 ? in_type<i32>(operation, old, v) : in_type<i64>(operation, old, v);
    case HALF: return in_type<Fp16>(operation, old, v);
    case BFLOAT: return in_type<Bf16>(operation, old, v);
    case TWO_HALVES: return in_type<Fp16>(operation, old & 0xffff, v & 0xffff) | in_type<Fp16>(operation, old >> 16, v >> 16) << 16;
    case TWO_BFLOATS: return in_type<Bf16>(operation, old & 0xffff, v & 0xffff) | in_type<Bf16>(operation, old >> 16, v >> 16) << 16;
  }
  return bytes == 4 ? in_type<u32>(operation, old, v) : in_type<u64>(operation, old, v);
}
static void add_up(const Sum& s) {
  u64 offset; int b = buffer_of(s.address, s.bytes * s.count, offset);
  for (u32 i = 0; i < s.count; i++) {
    u64 old = 0; u8* at = S->B[b].host + offset + i * s.bytes;
    memcpy(&old, at, s.bytes); old = combined(s.op, s.bytes, old, s.value[i], 0); memcpy(at, &old, s.bytes);
  }
  s.page->sums--;
}
template <class F> void add_up_where(CTA& c, F which) {
  for (size_t i = c.sums.size(); i > 1; i--) std::swap(c.sums[i - 1], c.sums[rnd((u32)i)]);
  size_t left = 0;
  for (auto& s : c.sums) if (which(s)) add_up(s); else c.sums[left++] = s;
  c.sums.resize(left);
}

static void publish_all(CTA& c) {
  for (auto& [p, sector] : c.stores) publish(p, sector);
  c.stores.clear();
  add_up_where(c, [](const Sum&) { return true; });
}
static void publish_some(CTA& c) {
  if (!c.stores.empty()) {
    auto& some = c.stores[rnd((u32)c.stores.size())];
    publish(some.first, some.second);
    some = c.stores.back(); c.stores.pop_back();
  }
  if (!c.sums.empty()) {
    auto& some = c.sums[rnd((u32)c.sums.size())];
    add_up(some);
    some = c.sums.back(); c.sums.pop_back();
  }
}
static void release(CTA& c, const Warp& w, u64 address) {  // its own accesses, and those of all before the last barrier
  if (S->C.adversarial) {
    size_t left = 0;
    for (auto& store : c.stores) {
      u64 offset; buffer_of(store.second, 1, offset);
      int s = (offset & 4095) / SECTOR; Page* p = store.first;
      if (p->dirty[s] && p->warp[s] != w.id && p->epoch[s] >= c.epoch) c.stores[left++] = store;
      else publish(p, store.second);
    }
    c.stores.resize(left);
    add_up_where(c, [&](const Sum& s) { return s.warp == (u32)w.id || s.epoch < c.epoch; });
  }
  if (!S->C.checks) return;
  auto& clock = S->released[address];
  if (clock.empty()) clock.assign(S->programs, 0);
  for (int i = 0; i < S->programs; i++) clock[i] = std::max(clock[i], c.clock[i]);
  clock[c.id] = std::max(clock[c.id], c.epoch);
}
static void acquire(CTA& c, const Warp& w, u64 address) {
  auto it = S->released.find(address);
  if (it != S->released.end()) {
    if (c.acquired.empty()) c.acquired.assign(S->programs, 0);
    for (int i = 0; i < S->programs; i++) c.acquired[i] = std::max(c.acquired[i], it->second[i]);
    c.acquiring = true; c.acquirer = w.id;
  }
  if (S->C.adversarial) for (auto& p : c.owned) memset(p->cached, 0, sizeof p->cached);
}

// The checks of an access of one lane; the buffer, or -1 where there is none.
static int checked(CTA& c, const Warp& w, int lane, u64 address, u32 bytes, int pc, u64& offset) {
  int b = buffer_of(address, bytes, offset);
  if (b < 0) S->report(OUT_OF_BOUNDS, pc, 0, &c, w.id, lane, address);
  else if (address % bytes) S->report(MISALIGNED, pc, 0, &c, w.id, lane, address);
  return b;
}
INL void check_unwritten(CTA& c, const Warp& w, int lane, int b, u64 address, const u8* data, u32 bytes, int pc) {
  u32 e = S->B[b].element;  // memory that nobody wrote has all its bits set, which no computed number has
  if (!S->B[b].floating || bytes < e) return;
  for (u32 i = 0; i < bytes; i += e) {
    bool all = true;
    for (u32 j = 0; j < e; j++) all &= data[i + j] == 0xff;
    if (all) { S->report(UNWRITTEN, pc, 0, &c, w.id, lane, address + i); return; }
  }
}
static void check_read(CTA& c, const Warp& w, int lane, int b, u64 offset, u32 bytes, int pc, bool strong) {
  u32 e = S->B[b].element; What what;
  for (u64 g = offset / e; g <= (offset + bytes - 1) / e; g++) {
    Cell& s = S->cells[b][g];
    if (!(strong && s.atomic) && race_with_write(s, c, w, lane, what))
      S->report(what, pc, s.write_pc, &c, w.id, lane, S->B[b].base + offset);
    if (!strong) note_read(s, c, w, lane, pc);
  }
}
static bool same_value(CTA& c, int b, u64 offset, const u8* data, u32 bytes) {  // as what the program last left there
  Page* p = S->C.adversarial ? page(c, b, offset, false) : nullptr;
  for (u32 i = 0; i < bytes; i++) {
    u64 o = offset + i; bool own = p && p->dirty[(o & 4095) / SECTOR] >> (o % SECTOR) & 1;
    if ((own ? p->data[o & 4095] : S->B[b].host[o]) != data[i]) return false;
  }
  return true;
}
static void check_write(CTA& c, const Warp& w, int lane, int b, u64 offset, u32 bytes, const u8* data, int pc, bool atomic) {
  u32 e = S->B[b].element; What what; u64 address = S->B[b].base + offset;
  for (u64 g = offset / e; g <= (offset + bytes - 1) / e; g++) {
    Cell& s = S->cells[b][g];
    if (!(atomic && s.atomic) && race_with_write(s, c, w, lane, what) &&
        !(what == RACE_LANES && data && s.write_pc == (u32)pc && same_value(c, b, offset, data, bytes)))
      S->report(what, pc, s.write_pc, &c, w.id, lane, address);
    if (race_with_reads(s, c, w, lane, what)) S->report(what, pc, s.read_pc, &c, w.id, lane, address);
    note_write(s, c, w, lane, pc, atomic);
  }
}

// One lane's load of at most 16 bytes.
static void load(CTA& c, const Warp& w, int lane, u64 address, u32 bytes, u8* out, int pc, Access access) {
  u64 offset; int b = checked(c, w, lane, address, bytes, pc, offset);
  if (b < 0) { memset(out, 0xff, bytes); return; }
  const Buffer& B = S->B[b];
  if (!B.written || !S->C.adversarial) memcpy(out, B.host + offset, bytes);
  if (B.written && S->C.checks) check_read(c, w, lane, b, offset, bytes, pc, access == STRONG);
  if (B.written && S->C.adversarial) {
    Page* p = page(c, b, offset, true); int s = (offset & 4095) / SECTOR;
    if (p->sums) add_up_where(c, [&](const Sum& r) { return r.address < address + bytes && address < r.address + r.bytes * r.count; });
    if (access == CACHED) {
      u64 from = offset & ~31ull, to = from + SECTOR;
      if (!p->cached[s] && rnd(2)) from = offset & ~127ull, to = from + 128;  // the rest of the line too
      for (; from < to && from < B.size; from += SECTOR) if (!p->cached[(from & 4095) / SECTOR]) {
        memcpy(p->copy + (from & 4095), B.host + from, std::min<u64>(SECTOR, B.size - from));
        p->cached[(from & 4095) / SECTOR] = 1;
      }
      memcpy(out, p->copy + (offset & 4095), bytes);
    } else memcpy(out, B.host + offset, bytes);
    if (p->dirty[s]) for (u32 i = 0; i < bytes; i++)
      if (p->dirty[s] >> (offset + i) % SECTOR & 1) out[i] = p->data[(offset + i) & 4095];
  }
  if (S->C.checks) check_unwritten(c, w, lane, b, address, out, bytes, pc);
}
static void store(CTA& c, const Warp& w, int lane, u64 address, u32 bytes, const u8* data, int pc, Access access) {
  u64 offset; int b = checked(c, w, lane, address, bytes, pc, offset);
  if (b < 0) return;
  if (S->C.checks) check_write(c, w, lane, b, offset, bytes, data, pc, access == STRONG);
  if (!S->C.adversarial || access == STRONG) { memcpy(S->B[b].host + offset, data, bytes); if (!S->C.adversarial) return; }
  Page* p = page(c, b, offset, true); int s = (offset & 4095) / SECTOR; u64 sector = S->B[b].base + (offset & ~31ull);
  if (p->dirty[s] && p->epoch[s] < c.epoch) publish(p, sector);
  if (!p->dirty[s]) { p->warp[s] = w.id; c.stores.push_back({p, sector}); }
  else if (p->warp[s] != w.id) p->warp[s] = 255;  // of several warps
  p->epoch[s] = c.epoch;
  memcpy(p->data + (offset & 4095), data, bytes);
  p->dirty[s] |= (u32)(((1ull << bytes) - 1) << offset % SECTOR);
  if (p->cached[s]) memcpy(p->copy + (offset & 4095), data, bytes);
  if (access == STRONG) publish(p, sector);
}
// One lane's atomic on `count` elements; `other`: what CAS stores.
static void atomic(CTA& c, const Warp& w, int lane, u64 address, u32 op, u32 bytes, u32 count, const u64* v, u64 other, u64* old,
                   bool used, int semantics, int pc) {
  u64 offset; int b = checked(c, w, lane, address, bytes * count, pc, offset);
  if (b < 0) return;
  const Buffer& B = S->B[b];
  if (S->C.checks) {
    check_write(c, w, lane, b, offset, bytes * count, nullptr, pc, true);
    check_unwritten(c, w, lane, b, address, B.host + offset, bytes * count, pc);
  }
  Page* p = S->C.adversarial ? page(c, b, offset, true) : nullptr;
  if (p) {
    int s = (offset & 4095) / SECTOR;
    publish(p, B.base + (offset & ~31ull));
    p->cached[s] = 0;
  }
  if (semantics & ACQUIRE) acquire(c, w, address);
  if (semantics & RELEASE) release(c, w, address);
  if (p && !used && semantics == RELAXED && op >> 4 == ADD) {
    Sum s{address, p, op, bytes, count, c.epoch, (u32)w.id, {}};
    memcpy(s.value, v, sizeof(u64) * count);
    c.sums.push_back(s); p->sums++;
    if (c.sums.size() > 4096 || rnd(4) == 0) publish_some(c);
    return;
  }
  for (u32 i = 0; i < count; i++) {
    u8* at = B.host + offset + i * bytes; old[i] = 0;
    memcpy(&old[i], at, bytes);
    u64 now = combined(op, bytes, old[i], v[i], other);
    memcpy(at, &now, bytes);
  }
}
