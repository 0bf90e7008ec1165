// Instructions from registers to registers, under their names in PTX.
#pragma once
#include "machine.h"

// bf16, fp16, and two of either in one register.
struct Bf16 {
  u16 bits;
  Bf16() = default;
  Bf16(float f) {
    u32 x; memcpy(&x, &f, 4);
    bits = (x & 0x7fffffff) > 0x7f800000 ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  operator float() const { u32 x = (u32)bits << 16; float f; memcpy(&f, &x, 4); return f; }
};
struct Fp16 {
  u16 bits;
  Fp16() = default;
  Fp16(float f) { _Float16 h = (_Float16)f; memcpy(&bits, &h, 2); }
  operator float() const { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
};
template <class T> struct Two { T low, high; };
INL float tf32(u32 x) { x &= 0xffffe000u; float f; memcpy(&f, &x, 4); return f; }  // the tensor core drops the rest
INL float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }

template <class T> INL T get(const u8* p, int lane) {
  if constexpr (std::is_same_v<T, bool>) return *(const u32*)p >> lane & 1;
  else return ((const T*)p)[lane];
}
template <int BYTES> __attribute__((noinline)) void put_some(u8* p, const u8* t, u32 mask) {
  for (int l = 0; l < 32; l++) if (mask >> l & 1) memcpy(p + l * BYTES, t + l * BYTES, BYTES);
}
template <class T> INL void put(u8* p, const T* t, u32 mask) {
  if (mask == FULL) memcpy(p, t, 32 * sizeof(T)); else put_some<sizeof(T)>(p, (const u8*)t, mask);
}
INL void put(u8* p, u32 lanes, u32 mask) { *(u32*)p = (*(u32*)p & ~mask) | (lanes & mask); }

template <class D, class... A, class F, size_t... I>
INL void each(u8* r, const u8* constants, const i32* o, u32 mask, F f, std::index_sequence<I...>) {
  const u8* a[] = {o[1 + I] >= 0 ? r + o[1 + I] : constants - o[1 + I]...};
  if constexpr (std::is_same_v<D, bool>) {
    alignas(32) u8 t[32];
    for (int l = 0; l < 32; l++) t[l] = f(get<A>(a[I], l)...) ? 0xff : 0;
    put(r + o[0], (u32)_mm256_movemask_epi8(_mm256_load_si256((const __m256i*)t)), mask);
  } else {
    alignas(32) D t[32];
    for (int l = 0; l < 32; l++) t[l] = f(get<A>(a[I], l)...);
    put(r + o[0], t, mask);
  }
}

struct Plain { std::string name, widths; Run run; };
static std::vector<Plain>& plain_table() { static std::vector<Plain> table; return table; }
template <class T> constexpr int width = std::is_same_v<T, bool> ? 1 : 8 * sizeof(T);
// Under each of several names, with blanks between them.
__attribute__((noinline)) static void add_plain(const std::string& names, std::initializer_list<int> widths, Run run) {
  std::string text;
  for (int w : widths) text += (text.empty() ? "" : " ") + std::to_string(w);
  for (size_t at = 0; at < names.size();) {
    size_t end = std::min(names.find(' ', at), names.size());
    plain_table().push_back({names.substr(at, end - at), text, run});
    at = end + 1;
  }
}

// op<D(A, B)>("name another", f): d = f(a, b) for every lane.
template <class Signature> struct Define;
template <class D, class... A> struct Define<D(A...)> {
  template <class F> static void as(const std::string& names, F) {
    add_plain(names, {width<D>, width<A>...}, [](u8* r, const u8* c, const i32* o, u32 m) {
      each<D, A...>(r, c, o, m, F{}, std::index_sequence_for<A...>{}); });
  }
};
template <class Signature, class F> void op(const std::string& names, F f) { Define<Signature>::as(names, f); }

template <class T> void compare(const std::string& type) {
  op<bool(T, T)>("setp.eq." + type, [](T a, T b) { return a == b; });
  op<bool(T, T)>("setp.ne." + type, [](T a, T b) { return a != b; });
  op<bool(T, T)>("setp.lt." + type + " setp.lo." + type, [](T a, T b) { return a < b; });
  op<bool(T, T)>("setp.le." + type + " setp.ls." + type, [](T a, T b) { return a <= b; });
  op<bool(T, T)>("setp.gt." + type + " setp.hi." + type, [](T a, T b) { return a > b; });
  op<bool(T, T)>("setp.ge." + type + " setp.hs." + type, [](T a, T b) { return a >= b; });
}
template <class T> void integers(const std::string& type) {
  using Wide = std::conditional_t<std::is_unsigned_v<T>, unsigned __int128, __int128>;
  compare<T>(type);
  op<T(T, T)>("min." + type, [](T a, T b) { return std::min(a, b); });
  op<T(T, T)>("max." + type, [](T a, T b) { return std::max(a, b); });
  op<T(T, T)>("div." + type, [](T a, T b) -> T { return b == 0 ? ~(T)0 : (Wide)a / b; });
  op<T(T, T)>("rem." + type, [](T a, T b) -> T { return b == 0 ? a : (Wide)a % b; });
  op<T(T, T)>("mul.hi." + type, [](T a, T b) -> T { return (Wide)a * b >> 8 * sizeof(T); });
  op<T(T, u32)>("shr." + type, [](T a, u32 b) -> T { return a >> std::min<u32>(b, 8 * sizeof(T) - 1) >> (std::is_unsigned_v<T> && b >= 8 * sizeof(T)); });
}
template <class U> void any_sign(const std::string& bits) {  // where the sign changes nothing
  auto both = [&](const std::string& name) { return name + ".s" + bits + " " + name + ".u" + bits + " " + name + ".b" + bits; };
  op<U(U, U)>(both("add"), [](U a, U b) -> U { return a + b; });
  op<U(U, U)>(both("sub"), [](U a, U b) -> U { return a - b; });
  op<U(U, U)>(both("mul.lo"), [](U a, U b) -> U { return (u64)a * b; });
  op<U(U, U, U)>(both("mad.lo"), [](U a, U b, U c) -> U { return (u64)a * b + c; });
  op<U(U)>("neg.s" + bits, [](U a) -> U { return -a; });
  op<U(U)>("abs.s" + bits, [](U a) -> U { return a >> (8 * sizeof(U) - 1) ? -a : a; });
  op<U(U, U)>("and.b" + bits, [](U a, U b) -> U { return a & b; });
  op<U(U, U)>("or.b" + bits, [](U a, U b) -> U { return a | b; });
  op<U(U, U)>("xor.b" + bits, [](U a, U b) -> U { return a ^ b; });
  op<U(U)>("not.b" + bits, [](U a) -> U { return ~a; });
  op<U(U, u32)>("shl.b" + bits, [](U a, u32 b) -> U { return b < 8 * sizeof(U) ? a << b : 0; });
  op<U(U, u32)>("shr.b" + bits, [](U a, u32 b) -> U { return b < 8 * sizeof(U) ? a >> b : 0; });
  op<U(U)>(both("mov") + " mov.f" + bits, [](U a) { return a; });
  op<U(U, U, bool)>(both("selp") + " selp.f" + bits, [](U a, U b, bool p) { return p ? a : b; });
  op<bool(U, U)>("setp.eq.b" + bits, [](U a, U b) { return a == b; });
  op<bool(U, U)>("setp.ne.b" + bits, [](U a, U b) { return a != b; });
}
template <class N, class W> void wide(const std::string& type) {
  op<W(N, N)>("mul.wide." + type, [](N a, N b) -> W { return (W)a * b; });
  op<W(N, N, W)>("mad.wide." + type, [](N a, N b, W c) -> W { return (std::make_unsigned_t<W>)((W)a * b) + c; });
}

template <class T> void compare_floats(const std::string& type) {
  compare<T>(type);
  for (auto& entry : plain_table()) if (entry.name == "setp.ne." + type) entry.name = "setp.neu." + type;
  op<bool(T, T)>("setp.ne." + type, [](T a, T b) { return (float)a < (float)b || (float)a > (float)b; });
  op<bool(T, T)>("setp.equ." + type, [](T a, T b) { return !((float)a < (float)b || (float)a > (float)b); });
  op<bool(T, T)>("setp.ltu." + type, [](T a, T b) { return !((float)a >= (float)b); });
  op<bool(T, T)>("setp.leu." + type, [](T a, T b) { return !((float)a > (float)b); });
  op<bool(T, T)>("setp.gtu." + type, [](T a, T b) { return !((float)a <= (float)b); });
  op<bool(T, T)>("setp.geu." + type, [](T a, T b) { return !((float)a < (float)b); });
  op<bool(T, T)>("setp.num." + type, [](T a, T b) { return (float)a == (float)a && (float)b == (float)b; });
  op<bool(T, T)>("setp.nan." + type, [](T a, T b) { return (float)a != (float)a || (float)b != (float)b; });
}
INL float larger(float a, float b) { return a > b || b != b ? a : b; }
INL float smaller(float a, float b) { return a < b || b != b ? a : b; }
// Under its names with and without rounding to nearest, and with subnormal operands and results flushed.
template <class F> void unary(const std::string& name, F) {
  op<float(float)>(name + ".f32 " + name + ".rn.f32", [](float a) { return F{}(a); });
  op<float(float)>(name + ".ftz.f32 " + name + ".rn.ftz.f32", [](float a) { return flushed(F{}(flushed(a))); });
}
template <class F> void binary(const std::string& name, F) {
  op<float(float, float)>(name + ".f32 " + name + ".rn.f32", [](float a, float b) { return F{}(a, b); });
  op<float(float, float)>(name + ".ftz.f32 " + name + ".rn.ftz.f32", [](float a, float b) { return flushed(F{}(flushed(a), flushed(b))); });
}
template <class T> void halves(const std::string& type) {
  auto twice = [&](const std::string& name, auto f) {
    using F = decltype(f);
    op<T(T, T)>(name + "." + type + " " + name + ".rn." + type, [](T a, T b) { return T(F{}(a, b)); });
    op<Two<T>(Two<T>, Two<T>)>(name + "." + type + "x2 " + name + ".rn." + type + "x2", [](Two<T> a, Two<T> b) { return Two<T>{F{}(a.low, b.low), F{}(a.high, b.high)}; });
  };
  twice("add", [](float a, float b) { return a + b; });
  twice("sub", [](float a, float b) { return a - b; });
  twice("mul", [](float a, float b) { return a * b; });
  twice("max", [](float a, float b) { return larger(a, b); });
  twice("min", [](float a, float b) { return smaller(a, b); });
  twice("max.NaN", [](float a, float b) { return a != a || b != b ? NAN : larger(a, b); });
  twice("min.NaN", [](float a, float b) { return a != a || b != b ? NAN : smaller(a, b); });
  op<T(T, T, T)>("fma.rn." + type, [](T a, T b, T c) { return T(std::fma((float)a, (float)b, (float)c)); });
  op<Two<T>(Two<T>, Two<T>, Two<T>)>("fma.rn." + type + "x2", [](Two<T> a, Two<T> b, Two<T> c) {
    return Two<T>{T(std::fma((float)a.low, (float)b.low, (float)c.low)), T(std::fma((float)a.high, (float)b.high, (float)c.high))}; });
  op<u16(u16)>("neg." + type, [](u16 a) -> u16 { return a ^ 0x8000; });
  op<u32(u32)>("neg." + type + "x2", [](u32 a) { return a ^ 0x80008000u; });
  op<u16(u16)>("abs." + type, [](u16 a) -> u16 { return a & 0x7fff; });
  op<u32(u32)>("abs." + type + "x2", [](u32 a) { return a & 0x7fff7fffu; });
  op<T(float)>("cvt.rn." + type + ".f32", [](float a) { return T(a); });
  op<Two<T>(float, float)>("cvt.rn." + type + "x2.f32", [](float high, float low) { return Two<T>{T(low), T(high)}; });
  op<float(T)>("cvt.f32." + type, [](T a) { return (float)a; });
  compare_floats<T>(type);
}

template <class D, class A> void convert(const std::string& to, const std::string& from) {
  op<D(A)>("cvt." + to + "." + from, [](A a) {
    if constexpr (std::is_integral_v<D>) return (D)a; else return D((float)a); });
}
template <class D> void convert_to(const std::string& to) {
  convert<D, u16>(to, "u16"); convert<D, i16>(to, "s16"); convert<D, u32>(to, "u32"); convert<D, i32>(to, "s32");
  convert<D, u64>(to, "u64"); convert<D, i64>(to, "s64");
  op<D(u32)>("cvt." + to + ".u16", [](u32 a) { return (D)(u16)a; });  // of the low half of a wider register
  op<D(u32)>("cvt." + to + ".s16", [](u32 a) { return (D)(i16)a; });
  op<D(u16)>("cvt." + to + ".u8", [](u16 a) { return (D)(u8)a; });  // of the low byte of either register
  op<D(u32)>("cvt." + to + ".u8", [](u32 a) { return (D)(u8)a; });
  op<D(u16)>("cvt." + to + ".s8", [](u16 a) { return (D)(i8)a; });
  op<D(u32)>("cvt." + to + ".s8", [](u32 a) { return (D)(i8)a; });
}
template <class D, class F> void convert_from_float(const std::string& rounding, const std::string& to, F) {
  op<D(float)>("cvt." + rounding + "." + to + ".f32 cvt." + rounding + ".ftz." + to + ".f32", [](float a) -> D {
    if constexpr (std::is_same_v<D, float>) return F{}(a);
    double v = F{}(a), most = (double)std::numeric_limits<D>::max(), least = (double)std::numeric_limits<D>::min();
    return v != v ? 0 : v >= most ? std::numeric_limits<D>::max() : v <= least ? std::numeric_limits<D>::min() : (D)v; });
}
template <class F> void rounded(const std::string& rounding, F f) {
  convert_from_float<i32>(rounding, "s32", f); convert_from_float<u32>(rounding, "u32", f);
  convert_from_float<i64>(rounding, "s64", f); convert_from_float<u64>(rounding, "u64", f);
  convert_from_float<float>(rounding, "f32", f);
}

static void define_plain() {
  if (!plain_table().empty()) return;
  integers<u16>("u16"); integers<i16>("s16"); integers<u32>("u32"); integers<i32>("s32"); integers<u64>("u64"); integers<i64>("s64");
  any_sign<u16>("16"); any_sign<u32>("32"); any_sign<u64>("64");
  wide<u16, u32>("u16"); wide<i16, i32>("s16"); wide<u32, u64>("u32"); wide<i32, i64>("s32");
  op<bool(bool)>("mov.pred", [](bool a) { return a; });
  op<bool(bool)>("not.pred", [](bool a) { return !a; });
  op<bool(bool, bool)>("and.pred", [](bool a, bool b) { return a && b; });
  op<bool(bool, bool)>("or.pred", [](bool a, bool b) { return a || b; });
  op<bool(bool, bool)>("xor.pred", [](bool a, bool b) { return a != b; });
  op<u32(u16, u16)>("pack.b32", [](u16 a, u16 b) { return (u32)a | (u32)b << 16; });
  op<u64(u32, u32)>("pack.b64", [](u32 a, u32 b) { return (u64)a | (u64)b << 32; });
  op<u16(u32)>("low.b32", [](u32 a) { return (u16)a; });
  op<u16(u32)>("high.b32", [](u32 a) { return (u16)(a >> 16); });
  op<u32(u64)>("low.b64", [](u64 a) { return (u32)a; });
  op<u32(u64)>("high.b64", [](u64 a) { return (u32)(a >> 32); });
  op<u32(u32)>("popc.b32", [](u32 a) { return (u32)__builtin_popcount(a); });
  op<u32(u32)>("clz.b32", [](u32 a) { return a ? (u32)__builtin_clz(a) : 32; });
  op<u32(u32)>("brev.b32", [](u32 a) { u32 x = 0; for (int i = 0; i < 32; i++) x |= (a >> i & 1) << (31 - i); return x; });
  op<u32(u32, u32, u32)>("bfe.u32", [](u32 a, u32 b, u32 c) -> u32 {
    b &= 255; c &= 255; u32 x = b > 31 ? 0 : a >> b; return c > 31 ? x : x & ((1u << c) - 1); });
  op<u64(u64, u32, u32)>("bfe.u64", [](u64 a, u32 b, u32 c) -> u64 {
    b &= 255; c &= 255; u64 x = b > 63 ? 0 : a >> b; return c > 63 ? x : x & ((1ull << c) - 1); });
  op<u32(u32, u32, u32)>("bfe.s32", [](u32 a, u32 b, u32 c) -> u32 {
    b &= 255; c &= 255; if (!c) return 0;
    u32 sign = a >> std::min(b + c - 1, 31u) & 1, x = b > 31 ? 0 : a >> b, have = b > 31 ? 0 : std::min(c, 32 - b);
    return have > 31 ? x : (x & ((1u << have) - 1)) | (sign ? ~0u << have : 0); });
  op<u32(u32, u32, u32, u32)>("bfi.b32", [](u32 a, u32 b, u32 c, u32 d) -> u32 {
    c &= 255; d &= 255; u32 mask = c > 31 ? 0 : (u32)((d > 31 ? 0xffffffffull : (1ull << d) - 1) << c);
    return (b & ~mask) | ((c > 31 ? 0 : a << c) & mask); });
  op<u32(u32, u32, u32)>("prmt.b32", [](u32 a, u32 b, u32 c) {
    u64 v = (u64)b << 32 | a; u32 x = 0;
    for (int i = 0; i < 4; i++) {
      u32 select = c >> (4 * i) & 15, byte = v >> (8 * (select & 7)) & 255;
      x |= (select & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
    }
    return x; });
  op<u32(u32, u32, u32, u32)>("lop3.b32", [](u32 a, u32 b, u32 c, u32 table) {
    u32 x = 0;
    for (int i = 0; i < 8; i++) if (table >> i & 1) x |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return x; });
  op<u32(u32, u32, u32)>("shf.l.wrap.b32", [](u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) << (c & 31) >> 32); });
  op<u32(u32, u32, u32)>("shf.r.wrap.b32", [](u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) >> (c & 31)); });
  op<u32(u32, u32, u32)>("shf.l.clamp.b32", [](u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) << std::min(c, 32u) >> 32); });
  op<u32(u32, u32, u32)>("shf.r.clamp.b32", [](u32 a, u32 b, u32 c) { return (u32)(((u64)b << 32 | a) >> std::min(c, 32u)); });

  binary("add", [](float a, float b) { return a + b; });
  binary("sub", [](float a, float b) { return a - b; });
  binary("mul", [](float a, float b) { return a * b; });
  for (auto* name : {"div", "div.full", "div.approx"}) binary(name, [](float a, float b) { return a / b; });
  binary("max", [](float a, float b) { return larger(a, b); });
  binary("min", [](float a, float b) { return smaller(a, b); });
  op<float(float, float)>("max.NaN.f32", [](float a, float b) { return a != a || b != b ? NAN : larger(a, b); });
  op<float(float, float)>("min.NaN.f32", [](float a, float b) { return a != a || b != b ? NAN : smaller(a, b); });
  op<float(float, float, float)>("fma.rn.f32", [](float a, float b, float c) { return __builtin_fmaf(a, b, c); });
  op<float(float, float, float)>("fma.rn.ftz.f32", [](float a, float b, float c) { return flushed(__builtin_fmaf(flushed(a), flushed(b), flushed(c))); });
  unary("neg", [](float a) { return -a; });
  unary("abs", [](float a) { return std::fabs(a); });
  for (auto* name : {"sqrt", "sqrt.approx"}) unary(name, [](float a) { return sqrtf(a); });
  for (auto* name : {"rcp", "rcp.approx"}) unary(name, [](float a) { return 1 / a; });
  unary("rsqrt.approx", [](float a) { return 1 / sqrtf(a); });
  unary("ex2.approx", [](float a) { return exp2f(a); });
  unary("lg2.approx", [](float a) { return log2f(a); });
  unary("sin.approx", [](float a) { return sinf(a); });
  unary("cos.approx", [](float a) { return cosf(a); });
  unary("tanh.approx", [](float a) { return tanhf(a); });
  compare_floats<float>("f32");
  compare_floats<float>("ftz.f32");
  halves<Bf16>("bf16");
  halves<Fp16>("f16");

  convert_to<u16>("u16"); convert_to<i16>("s16"); convert_to<u32>("u32"); convert_to<i32>("s32"); convert_to<u64>("u64");
  convert_to<i64>("s64"); convert_to<float>("rn.f32"); convert_to<Fp16>("rn.f16"); convert_to<Bf16>("rn.bf16");
  rounded("rni", [](float a) { return std::nearbyintf(a); });
  rounded("rzi", [](float a) { return truncf(a); });
  rounded("rmi", [](float a) { return floorf(a); });
  rounded("rpi", [](float a) { return ceilf(a); });
  op<u32(u32)>("cvt.rna.tf32.f32", [](u32 a) { return (a & 0x7f800000u) == 0x7f800000u ? a : (a + 0x1000u) & 0xffffe000u; });
}
