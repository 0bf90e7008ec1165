// What a launch consists of: the code, buffers, programs (CTAs), warps, and what was found.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
#define INL static inline __attribute__((always_inline))
constexpr u32 FULL = 0xffffffffu;
constexpr int SECTOR = 32;

// The front end asks for these names. PLAIN: what `plain.h` lists, registers in and registers out.
#define KINDS(X)                                                                                                       \
  X(PLAIN) X(LOAD) X(STORE) X(ATOMIC) X(LOAD_SHARED) X(STORE_SHARED) X(COPY) X(COPY_COMMIT) X(COPY_WAIT) X(LDMATRIX)   \
  X(STMATRIX) X(MMA) X(WGMMA) X(WGMMA_FENCE) X(WGMMA_COMMIT) X(WGMMA_WAIT) X(PROXY_FENCE) X(BARRIER) X(WARP_SYNC)      \
  X(SHUFFLE) X(VOTE) X(BRANCH) X(RETURN) X(TRAP)
#define X(name) name,
enum Kind : i32 { KINDS(X) };
#undef X

#define FOUND(X)                                                                                                       \
  X(OUT_OF_BOUNDS, "out of bounds")                                                                                    \
  X(MISALIGNED, "misaligned")                                                                                          \
  X(UNWRITTEN, "read of what nobody wrote")                                                                            \
  X(RACE_WARPS, "race between warps")                                                                                  \
  X(RACE_LANES, "race between lanes of a warp")                                                                        \
  X(RACE_PROGRAMS, "race between programs")                                                                            \
  X(COPY_IN_FLIGHT, "access while cp.async is in flight")                                                              \
  X(WGMMA_READS, "write while wgmma reads")                                                                            \
  X(NO_PROXY_FENCE, "no proxy fence between a write and wgmma")                                                        \
  X(NO_WGMMA_FENCE, "no wgmma.fence before wgmma")                                                                     \
  X(WGMMA_REGISTERS, "register of a wgmma in flight")                                                                  \
  X(DIVERGED, "barrier in divergent code")                                                                             \
  X(PARTIAL_WARP, "instruction of the whole warp in divergent code")                                                   \
  X(DEADLOCK, "deadlock")                                                                                              \
  X(ENDLESS, "does not end")                                                                                           \
  X(TRAPPED, "trap")                                                                                                   \
  X(SAME_VALUE, "two warps write the same value")                                                                      \
  X(COPY_FORGOTTEN, "cp.async that nothing waits for")
#define X(name, text) name,
enum What : i32 { FOUND(X) };
#undef X

// operands: byte offsets into a warp's registers, or, below 0, into the constants; results come first.
struct Ins { i32 kind, plain, guard, negated, first, results, operands, k[5], phase, latency; };
struct Program {
  const Ins* code; i32 length; const i32* operands; const u8* constants;
  i32 registers, special, warps, shared, phases, pad;  // special: where %tid.x, %ctaid.x, .y and .z begin, 128 bytes each
};
struct Buffer { u64 base; u8* host; u64 size; i32 element, floating, written, pad; };
struct Config { u64 seed, limit; i32 adversarial, checks, timing, in_flight, dram_sectors, pad; };
struct Finding { i32 what, pc, other, program, warp, lane; u64 address, count; };
struct Stats { u64 executed, sectors, wavefronts, ideal, stalled; };
struct Traffic { u64 read, written, reduced, copied, dram_read, dram_written; };  // sectors
constexpr int PHASE_FIELDS = 6;  // of a program: instructions; cycles, reordered, of all warps; trips, reordered, of warp 0; warps

typedef void (*Run)(u8* registers, const u8* constants, const i32* operands, u32 mask);

// The last accesses to one granule of shared or global memory.
struct Cell {
  u32 write_epoch, write_pc, write_sync, read_epoch, read_pc, read_sync, readers, lanes;  // lanes: of the warp that read last
  u32 write_program, read_program, write_seq;
  u8 write_warp, write_lane, read_warp, atomic;
  u16 landing, reading;  // cp.async and wgmma in flight
};
constexpr u8 ALL_LANES = 32;  // an access of the whole warp: ldmatrix, stmatrix, wgmma

struct Page {  // what one program sees of 4096 bytes of global memory
  u8 copy[4096], data[4096];  // sectors in its L1, and what it has stored and others do not see
  u8 cached[128], warp[128];
  u32 dirty[128], epoch[128], sums;
};
struct Sum { u64 address; Page* page; u32 op, bytes, count, epoch, warp; u64 value[4]; };
struct Copy { u32 to, bytes, from_bytes, pc; u64 from; int lane; bool early, bypass; u8 data[16]; };
struct Product {
  const Ins* ins; i32 pc; bool a_in_registers, add; u64 a, b; u32 a_registers[4][32]; std::vector<u32> units; int group;
};
struct Accumulator { std::vector<i32> at; std::vector<float> value; int group; i32 pc; };
struct Side { i32 pc; u32 mask; i32 until; };  // of a branch: lanes that wait, and where they stop again

struct Moment { i64 cycle = 0; i32 trips = 0; };
INL Moment later(Moment a, Moment b) { return {std::max(a.cycle, b.cycle), std::max(a.trips, b.trips)}; }
struct Timeline {
  std::vector<Moment> ready;
  Moment now, block, stored, stored_shared, copy, product;
  std::deque<Moment> copies;
  int in_block = 0;
};

enum State { READY, AT_BARRIER, DONE };
struct Warp {
  int id; State state = READY; i32 pc = 0, until = -1; u32 mask = FULL; std::vector<Side> diverged;
  u8* registers;
  u32 sync = 1, fenced = 0;  // fenced: the sequence number of its last proxy fence
  std::vector<Copy> copies; std::deque<std::vector<Copy>> groups;
  bool wgmma_fenced = false, wgmma_late = false; int wgmma_group = 0;
  std::vector<Product> products; std::map<i32, Accumulator> accumulators;
  Timeline line[2];  // in PTX's order, and with every basic block in the best order
};
struct CTA {
  i32 id, x, y, z; std::vector<Warp> warps; std::vector<u8> registers, shared; std::vector<Cell> cells;
  u32 epoch = 1, seq = 1; int arrived = 0, done = 0;
  std::vector<std::vector<Page*>> pages; std::vector<std::unique_ptr<Page>> owned;
  std::vector<std::pair<Page*, u64>> stores; std::vector<Sum> sums;  // of sectors, by address
  std::vector<u32> clock, acquired; int acquirer = -1; bool acquiring = false;
  std::vector<std::vector<bool>> seen;  // sectors, by timing
  i64* phases;  // its counters
};

struct Dram {  // sectors that L2 keeps, by last use
  struct Node { u32 buffer, sector; i32 before, after; bool dirty; };
  std::vector<Node> nodes; std::vector<std::vector<i32>> at; i32 newest = -1, oldest = -1; size_t capacity = 0;
};

struct Sim {
  Program P; Config C; std::vector<Run> run; std::vector<Buffer> B; std::vector<std::vector<Cell>> cells;
  std::vector<Stats> stats; std::vector<Traffic> traffic; std::vector<Finding> found; std::map<u64, int> index;
  std::unordered_map<u64, std::vector<u32>> released; Dram dram;
  i32 gx, gy, gz, programs; u64 steps = 0, barriers = 0; i64* phases; bool stop = false;

  void report(What what, int pc, int other, const CTA* c, int warp, int lane, u64 address) {
    u64 key = (u64)what << 56 ^ (u64)(u32)pc << 28 ^ (u32)other;
    auto it = index.find(key);
    if (it != index.end()) { found[it->second].count++; return; }
    if (found.size() >= 200) return;
    index[key] = (int)found.size();
    found.push_back({what, pc, other, c ? c->id : -1, warp, lane, address, 1});
  }
};
static Sim* S;

static u64 random_state;
INL u32 rnd(u32 n) {
  random_state ^= random_state << 13; random_state ^= random_state >> 7; random_state ^= random_state << 17;
  return (u32)((random_state >> 20) % n);
}
INL u8* reg(const Warp& w, i32 o) { return w.registers + o; }
INL const u8* value(const Warp& w, i32 o) { return o >= 0 ? w.registers + o : S->P.constants - o; }
