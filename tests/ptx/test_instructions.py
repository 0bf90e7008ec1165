"""Instructions from registers to registers, each against numpy's idea of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from bench.ptx.front import UnknownInstruction, parse
from bench.ptx.library import plain
from bench.ptx.program import assemble
from tests.ptx.kernels import run

LANES = 32
TYPES = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "f16": np.float16, "p": np.bool_,
}  # fmt: skip
REGISTER = {16: "%rs", 32: "%r", 64: "%rd"}


@triton.jit
def _operands(a_ptr, b_ptr, c_ptr, d_ptr):
    """Its PTX is replaced, its signature stays."""
    tl.store(d_ptr, tl.load(a_ptr) + tl.load(b_ptr) + tl.load(c_ptr))


def executed(
    opcode: str,
    result: str,
    operands: tuple[str, ...],
    values: list[np.ndarray],
    immediates: str = "",
    before: str = "",
    after: str = "",
) -> np.ndarray:
    """What one instruction makes of 32 values of every operand, by a kernel of one warp.

    `before` stands before the instruction, `after` behind the kernel's return.
    """
    lines, names = [], []
    for index, kind in enumerate(operands):
        bits = np.dtype(TYPES[kind]).itemsize * 8
        if kind == "p":
            lines += [
                f"ld.global.b32 %r{90 + index}, [%rd{20 + index}];",
                f"setp.ne.b32 %p{5 + index}, %r{90 + index}, 0;",
            ]
            names.append(f"%p{5 + index}")
        else:
            lines.append(f"ld.global.b{bits} {REGISTER[bits]}{10 + index}, [%rd{20 + index}];")
            names.append(f"{REGISTER[bits]}{10 + index}")
    if result == "p":
        lines += [
            f"{opcode} %p1, {', '.join(names)}{immediates};",
            "selp.b32 %r50, 1, 0, %p1;",
            "st.global.b32 [%rd30], %r50;",
        ]
        bits = 32
    else:
        bits = np.dtype(TYPES[result]).itemsize * 8
        lines += [
            before,
            f"{opcode} {REGISTER[bits]}50, {', '.join(names)}{immediates};",
            f"st.global.b{bits} [%rd30], {REGISTER[bits]}50;",
        ]
    head = ["mov.u32 %r1, %tid.x;"]
    for at, (parameter, width) in enumerate([*((i, _width(kind)) for i, kind in enumerate(operands)), (3, bits // 8)]):
        register = 30 if parameter == 3 else 20 + at
        head += [
            f"ld.param.b64 %rd{register + 40}, [k_{parameter}];",
            f"mul.wide.u32 %rd{register + 20}, %r1, {width};",
        ]
        head += [f"add.s64 %rd{register}, %rd{register + 40}, %rd{register + 20};"]
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 k_{i}" for i in range(4))
    text = (
        f".visible .entry _operands(\n{parameters}\n)\n.reqntid 32\n{{\n"
        + "\n".join([*head, *lines, "ret;", after])
        + "\n}\n"
    )
    tensors = {}
    for name, value in zip(
        ("a_ptr", "b_ptr", "c_ptr"), [*values, *[np.zeros(LANES, np.int32)] * (3 - len(values))], strict=True
    ):
        value = value.astype(np.int32) if value.dtype == np.bool_ else value
        tensors[name] = torch.from_numpy(value.view(np.uint8).copy()).view(
            {2: torch.float16, 4: torch.int32, 8: torch.int64}[value.itemsize]
        )
    out = torch.zeros(LANES * bits // 8, dtype=torch.uint8).view(
        {2: torch.float16, 4: torch.int32, 8: torch.int64}[bits // 8]
    )
    executor = run(_operands, (1,), tensors | {"d_ptr": out}, warps=1, checks=False, change=lambda ptx: text)
    assert not executor.errors
    answer = out.view(torch.uint8).numpy()
    return answer.view(np.int32) != 0 if result == "p" else answer.view(TYPES[result])


def _width(kind: str) -> int:
    return 4 if kind == "p" else np.dtype(TYPES[kind]).itemsize


def drawn(kind: str, seed: int) -> np.ndarray:
    """32 values of a type, its limits among them."""
    random = np.random.default_rng(seed)
    kind_of = np.dtype(TYPES[kind])
    if kind == "p":
        return random.random(LANES) < 0.5
    if kind_of.kind == "f":
        return np.concatenate([random.standard_normal(26) * 3, [0.0, -0.0, 0.5, 1.5, -2.5, 100.0]]).astype(kind_of)
    info = np.iinfo(kind_of)
    values = random.integers(info.min, info.max, LANES, dtype=kind_of, endpoint=True)
    values[:4] = 0, 1, info.min, info.max
    return values


def wide(a: np.ndarray) -> np.ndarray:
    """As Python's integers."""
    return a.astype(object)


def wrapped(values: np.ndarray, kind: str) -> np.ndarray:
    """Python's integers, cut to a type."""
    bits = np.dtype(TYPES[kind]).itemsize * 8
    return np.array([int(v) & (1 << bits) - 1 for v in values], dtype=object).astype(f"u{bits // 8}").view(TYPES[kind])


def quotient(a: int, b: int) -> int:
    """Rounded to zero."""
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(kind):
    a, b, c = (drawn(kind, seed) for seed in range(3))
    bits = np.dtype(TYPES[kind]).itemsize * 8
    for name, function in INTEGERS.items():
        assert (
            executed(f"{name}.{kind}", kind, (kind, kind), [a, b]) == wrapped(function(wide(a), wide(b)), kind)
        ).all(), name
    for name, function in COMPARISONS.items():
        assert (
            executed(f"setp.{name}.{kind}", "p", (kind, kind), [a, np.roll(a, 1)]) == function(a, np.roll(a, 1))
        ).all(), name
    assert (
        executed(f"mad.lo.{kind}", kind, (kind,) * 3, [a, b, c]) == wrapped(wide(a) * wide(b) + wide(c), kind)
    ).all()
    assert (executed(f"mul.hi.{kind}", kind, (kind, kind), [a, b]) == wrapped(wide(a) * wide(b) >> bits, kind)).all()
    b = np.where(b == 0, np.array(3, b.dtype), b)
    quotients = [quotient(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert (executed(f"div.{kind}", kind, (kind, kind), [a, b]) == wrapped(quotients, kind)).all()
    rests = [int(x) - q * int(y) for x, y, q in zip(a, b, quotients, strict=True)]
    assert (executed(f"rem.{kind}", kind, (kind, kind), [a, b]) == wrapped(rests, kind)).all()
    shift = (drawn("u32", 5) % (bits + 8)).astype(np.uint32)
    expected = wrapped([int(x) >> min(int(s), 2 * bits) for x, s in zip(a, shift, strict=True)], kind)
    assert (executed(f"shr.{kind}", kind, (kind, "u32"), [a, shift]) == expected).all()
    if bits < 64:
        double = kind[0] + str(2 * bits)
        assert (executed(f"mul.wide.{kind}", double, (kind, kind), [a, b]) == wrapped(wide(a) * wide(b), double)).all()
        c = drawn(double, 7)
        expected = wrapped(wide(a) * wide(b) + wide(c), double)
        assert (executed(f"mad.wide.{kind}", double, (kind, kind, double), [a, b, c]) == expected).all()


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_bits(kind):
    a, b, p = drawn(kind, 0), drawn(kind, 1), drawn("p", 2)
    bits = np.dtype(TYPES[kind]).itemsize * 8
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert (executed(f"{name}.{kind}", kind, (kind, kind), [a, b]) == function(a, b)).all()
    assert (executed(f"not.{kind}", kind, (kind,), [a]) == ~a).all()
    shift = (drawn("u32", 5) % (bits + 8)).astype(np.uint32)
    assert (
        executed(f"shl.{kind}", kind, (kind, "u32"), [a, shift])
        == wrapped([int(x) << int(s) for x, s in zip(a, shift, strict=True)], kind)
    ).all()
    assert (executed(f"selp.{kind}", kind, (kind, kind, "p"), [a, b, p]) == np.where(p, a, b)).all()
    assert (executed(f"mov.{kind}", kind, (kind,), [a]) == a).all()


def test_fields_of_bits():
    a, b = drawn("u32", 0), drawn("u32", 1)
    assert (executed("bfe.u32", "u32", ("u32",), [a], ", 5, 7") == (a >> 5 & 127)).all()
    c = drawn("u64", 2)
    assert (executed("bfe.u64", "u64", ("u64",), [c], ", 41, 9") == (c >> np.uint64(41) & np.uint64(511))).all()
    assert (executed("bfe.s32", "s32", ("u32",), [a], ", 5, 7") == (a.view(np.int32) << 20 >> 25)).all()
    assert (executed("bfe.s32", "s32", ("u32",), [a], ", 28, 8") == (a.view(np.int32) >> 28)).all()
    assert (
        executed("bfi.b32", "u32", ("u32", "u32"), [a, b], ", 4, 8") == (b & ~np.uint32(0xFF0) | (a & 0xFF) << 4)
    ).all()
    assert (executed("prmt.b32", "u32", ("u32", "u32"), [a, b], ", 0x5410") == (a & 0xFFFF | b << 16)).all()
    assert (executed("lop3.b32", "u32", ("u32",) * 3, [a, b, ~a], ", 0xE8") == (a & b | a & ~a | b & ~a)).all()
    assert (executed("shf.l.wrap.b32", "u32", ("u32", "u32"), [a, b], ", 8") == (b << 8 | a >> 24)).all()
    assert (executed("shf.r.wrap.b32", "u32", ("u32", "u32"), [a, b], ", 8") == (a >> 8 | b << 24)).all()
    assert (executed("popc.b32", "u32", ("u32",), [a]) == [bin(x).count("1") for x in a.tolist()]).all()
    assert (executed("clz.b32", "u32", ("u32",), [a]) == [32 - x.bit_length() for x in a.tolist()]).all()


FLOATS = {
    "add.f32": np.add, "sub.rn.f32": np.subtract, "mul.f32": np.multiply, "div.full.f32": np.divide,
    "max.f32": np.maximum, "min.f32": np.minimum,
}  # fmt: skip
FUNCTIONS = {
    "neg.f32": np.negative, "abs.ftz.f32": np.abs, "ex2.approx.ftz.f32": np.exp2,
    "sin.approx.f32": np.sin, "cos.approx.f32": np.cos, "tanh.approx.f32": np.tanh,
    "cvt.rni.f32.f32": np.rint, "cvt.rmi.f32.f32": np.floor, "cvt.rpi.f32.f32": np.ceil,
    "cvt.rzi.f32.f32": np.trunc,
}  # fmt: skip
OF_POSITIVE = {
    "sqrt.rn.f32": np.sqrt, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "lg2.approx.f32": np.log2,
    "rcp.approx.f32": lambda x: 1 / x,
}  # fmt: skip


def test_floats():
    a, b, c = (drawn("f32", seed) for seed in range(3))
    b[b == 0] = 1.0
    for opcode, function in FLOATS.items():
        np.testing.assert_allclose(
            executed(opcode, "f32", ("f32", "f32"), [a, b]), function(a, b), rtol=1e-6, err_msg=opcode
        )
    for opcode, function in FUNCTIONS.items():
        np.testing.assert_allclose(executed(opcode, "f32", ("f32",), [a]), function(a), rtol=1e-6, err_msg=opcode)
    positive = np.abs(a) + np.float32(0.1)
    for opcode, function in OF_POSITIVE.items():
        np.testing.assert_allclose(
            executed(opcode, "f32", ("f32",), [positive]), function(positive), rtol=2e-6, err_msg=opcode
        )
    fused = a.astype(np.float64) * b + c
    assert (executed("fma.rn.f32", "f32", ("f32",) * 3, [a, b, c]) == fused.astype(np.float32)).all()
    for name, function in COMPARISONS.items():
        assert (
            executed(f"setp.{name}.f32", "p", ("f32", "f32"), [a, np.roll(a, 1)]) == function(a, np.roll(a, 1))
        ).all(), name


def test_not_a_number():
    a = np.where(np.arange(LANES) % 2, np.float32(np.nan), np.arange(LANES, dtype=np.float32))
    b = np.full(LANES, 3, np.float32)
    nan = np.isnan(a)
    assert not executed("setp.ne.f32", "p", ("f32", "f32"), [a, b])[nan].any()
    assert executed("setp.neu.f32", "p", ("f32", "f32"), [a, b])[nan].all()
    assert executed("setp.ltu.f32", "p", ("f32", "f32"), [a, b])[nan].all()
    assert (executed("setp.nan.f32", "p", ("f32", "f32"), [a, b]) == nan).all()
    assert (executed("setp.num.f32", "p", ("f32", "f32"), [a, b]) != nan).all()
    assert (executed("max.f32", "f32", ("f32", "f32"), [a, b]) == np.fmax(a, b)).all()
    np.testing.assert_array_equal(executed("max.NaN.f32", "f32", ("f32", "f32"), [a, b]), np.maximum(a, b))


def test_subnormals_are_flushed_where_asked():
    a = np.full(LANES, 1e-40, np.float32)
    one = np.ones(LANES, np.float32)
    assert (executed("mul.f32", "f32", ("f32", "f32"), [a, one]) == a).all()
    assert (executed("mul.ftz.f32", "f32", ("f32", "f32"), [a, one]) == 0).all()
    assert (executed("fma.rn.ftz.f32", "f32", ("f32",) * 3, [one, one, a]) == 1).all()


def test_conversions():
    a, b = drawn("f32", 0), drawn("f32", 1)
    tensor_a, tensor_b = torch.from_numpy(a), torch.from_numpy(b)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        low, high = tensor_b.to(dtype).view(torch.int16), tensor_a.to(dtype).view(torch.int16)
        assert (executed(f"cvt.rn.{kind}.f32", "b16", ("f32",), [a]) == high.numpy().view(np.uint16)).all()
        both = executed(f"cvt.rn.{kind}x2.f32", "b32", ("f32", "f32"), [a, b]).view(np.uint16).reshape(-1, 2)
        assert (both[:, 0] == low.numpy().view(np.uint16)).all()
        assert (both[:, 1] == high.numpy().view(np.uint16)).all()
        assert (
            executed(f"cvt.f32.{kind}", "f32", ("b16",), [high.numpy().view(np.uint16)])
            == tensor_a.to(dtype).float().numpy()
        ).all()
    for kind in ("s32", "u32", "s64"):
        expected = np.clip(np.trunc(a), np.iinfo(TYPES[kind]).min, None).astype(TYPES[kind])
        assert (executed(f"cvt.rzi.{kind}.f32", kind, ("f32",), [a]) == expected).all()
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        integers = drawn(kind, 3)
        assert (executed(f"cvt.rn.f32.{kind}", "f32", (kind,), [integers]) == integers.astype(np.float32)).all()
        for to in ("u16", "s32", "u64", "s64"):
            assert (executed(f"cvt.{to}.{kind}", to, (kind,), [integers]) == integers.astype(TYPES[to])).all()
    wider = drawn("u32", 4)  # of a register that is wider than what is converted, the low half
    for kind in ("u16", "s16"):
        assert (executed(f"cvt.s32.{kind}", "s32", ("u32",), [wider]) == wider.astype(TYPES[kind])).all()
    bits = executed("cvt.rna.tf32.f32", "b32", ("f32",), [a])
    assert not (bits & 0x1FFF).any()
    np.testing.assert_allclose(bits.view(np.float32), a, rtol=2**-11)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_two_halves_at_once(kind):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    torch.manual_seed(0)
    a, b, c = (torch.randn(2 * LANES).to(dtype) for _ in range(3))
    packed = [tensor.view(torch.int32).numpy().view(np.uint32) for tensor in (a, b, c)]

    def two(opcode: str, count: int) -> torch.Tensor:
        return torch.from_numpy(executed(opcode, "b32", ("b32",) * count, packed[:count]).view(np.int32)).view(dtype)

    assert torch.equal(two(f"add.rn.{kind}x2", 2), a + b)
    assert torch.equal(two(f"mul.{kind}x2", 2), a * b)
    assert torch.equal(two(f"max.{kind}x2", 2), torch.maximum(a, b))
    assert torch.equal(two(f"fma.rn.{kind}x2", 3), (a.double() * b.double() + c.double()).float().to(dtype))
    assert torch.equal(two(f"neg.{kind}x2", 1), -a)


def test_an_instruction_that_is_not_known_is_no_instruction():
    text = ".visible .entry k(\n)\n.reqntid 32\n{\nvshr.u32.u32.u32.clamp %r1, %r2, %r3;\n}\n"
    with pytest.raises(UnknownInstruction, match=r"k, line 5: vshr"):
        parse(text)


def test_registers_that_live_together_have_places_of_their_own():
    moves = "\n".join(f"mov.u32 %r{i}, {i};" for i in range(40))
    adds = "\n".join(f"add.s32 %r{100 + i}, %r{i}, %r{i + 1};" for i in range(39))
    body = f"{moves}\n{adds}\nmov.u32 %r200, %r138;\nret;"
    program = assemble(parse(f".visible .entry k(\n)\n.reqntid 32\n{{\n{body}\n}}\n"))
    assert 40 * 128 <= program.special <= 45 * 128


def test_every_opcode_has_one_meaning():
    for opcode, meanings in plain().items():
        widths = [found for _, found in meanings]
        assert len(set(widths)) == len(widths), opcode


def test_lanes_that_parted_meet_where_all_paths_lead_though_it_lies_before_them():
    """As compilers lay out a loop's exit; the barrier there would be found in divergent code."""
    a = drawn("u32", 0)
    before = """
        setp.lt.u32 %p9, %r1, 11;
        @%p9 bra $L__far;
        bra.uni $L__near;
        $L__exit:
        bar.sync 0;
    """
    after = """
        $L__near: mov.u32 %r60, 1; bra.uni $L__exit;
        $L__far: mov.u32 %r60, 2; bra.uni $L__exit;
    """.replace(": ", ":\n").replace("; ", ";\n")
    found = executed("add.u32", "u32", ("u32",), [a], ", %r60", before, after)
    assert (found == a + np.where(np.arange(LANES) < 11, 2, 1).astype(np.uint32)).all()
