"""PTX text to instructions. One that is not known raises: nothing is ever skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bench.ptx.library import plain

SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z")  # a warp's own, in this order in its registers
WIDTHS = {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}
ALU, SPECIAL_UNIT, FROM_SHARED, TENSOR, FROM_GLOBAL, FROM_ATOMIC = range(6)

_REGISTER = re.compile(r"%(p|rs|rd|r|fd|f)\d+$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_LOC = re.compile(r"\s*\.loc\s.*?//\s*(.*)$")
_IGNORED = re.compile(r"\s*(?:\.loc\b|\.reg\b|\.pragma\b|//|$)")
_LABEL = re.compile(r"([$\w]+):\s*$")
_GUARDED = re.compile(r"@(!?)(%p\d+)\s+(.*)$", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.([a-z])(\d+)(?:\s+\.ptr.*?)?\s+(\w+)\s*$")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3")
_ELEMENT = {"bf16": 0, "f16": 1, "tf32": 2}
_OPERATION = {name: i for i, name in enumerate(("add", "min", "max", "and", "or", "xor", "exch", "cas"))}
_TYPE = {"u": 0, "b": 0, "s": 1, "f": 2, "bf16": 3, "f16x2": 4, "bf16x2": 5, "f16": 6}
_SEMANTICS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
_SHUFFLES = ("idx", "up", "down", "bfly")
_VOTES = ("ballot", "any", "all")
_ALONE = {
    "wgmma.fence.sync.aligned": "WGMMA_FENCE",
    "wgmma.commit_group.sync.aligned": "WGMMA_COMMIT",
    "fence.proxy.async.shared::cta": "PROXY_FENCE",
    "fence.proxy.async": "PROXY_FENCE",
    "cp.async.commit_group": "COPY_COMMIT",
    "ret": "RETURN",
    "exit": "RETURN",
    "trap": "TRAP",
}
_SLOW = ("div", "rem", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
_POLICY = re.compile(r"L1::\w+|L2::(?!cache_hint)\w+|wb|cs|wt|ca|nc")


class UnknownInstruction(Exception):
    """The executor does not know an instruction."""


@dataclass(frozen=True)
class Constant:
    """An immediate operand, the same in every lane; or a parameter, whose value the launch brings."""

    bits: int
    value: int = 0
    parameter: int | None = None


Operand = str | Constant  # a register by its name


@dataclass
class Instruction:
    """One instruction, its results and sources in the executor's order; k: its numbers, see runtime.cpp."""

    kind: str
    results: list[str] = field(default_factory=list)
    sources: list[Operand] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    plain: int = 0
    latency: int = ALU
    target: str = ""
    guard: str = ""
    negated: bool = False
    text: str = ""
    line: int = 0
    loc: str = ""


@dataclass
class Code:
    """A kernel's instructions, labels, parameters `(type, bits)` and threads."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[tuple[str, int]]
    threads: int


def width(register: str) -> int:
    """Bits of a register; of %tid.x and its like too."""
    match = _REGISTER.match(register)
    return WIDTHS[match.group(1)] if match else 32


def parse(ptx: str) -> Code:
    """The code of a module with one kernel. Raises UnknownInstruction."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise UnknownInstruction("there is no kernel in this PTX")
    name, parameters, attributes, body = entry.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    if threads is None:
        raise UnknownInstruction(f"{name} has no .reqntid")
    reader = _Reader(int(threads.group(1)), parameters)
    line = ptx[: entry.start(4)].count("\n")
    loc = pending = ""
    for raw in body.split("\n"):
        line += 1
        if found := _LOC.match(raw):
            loc = found.group(1).strip()
            continue
        if _IGNORED.match(raw):
            continue
        text = raw.split("//")[0].strip()
        if found := _LABEL.match(text):
            reader.labels[found.group(1)] = len(reader.instructions)
            continue
        *statements, pending = f"{pending} {text}".split(";")
        for statement in statements:
            reader.read(" ".join(statement.split()), line, loc, name)
    if pending.strip():
        raise UnknownInstruction(f"{name}: {pending.strip()!r} does not end")
    _drop_results_nobody_reads(reader.instructions)
    return Code(name, reader.instructions, reader.labels, reader.parameters, reader.threads)


def _drop_results_nobody_reads(instructions: list[Instruction]) -> None:
    """An atomic whose result is read is another instruction than one whose result is not."""
    read = {source for each in instructions for source in each.sources}
    for each in instructions:
        if each.kind == "ATOMIC":
            if any(result in read for result in each.results):
                each.k[3] |= 4
            else:
                each.results = []


class _Reader:
    """What is read so far."""

    def __init__(self, threads: int, parameters: str) -> None:
        self.threads = threads
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.parameters: list[tuple[str, int]] = []
        self.by_name: dict[str, int] = {}
        for text in parameters.split(","):
            if found := _PARAMETER.search(text.strip()):
                self.by_name[found.group(3)] = len(self.parameters)
                self.parameters.append((found.group(1), int(found.group(2))))

    def read(self, text: str, line: int, loc: str, name: str) -> None:
        """Add the instructions of one statement."""
        guard, negated, rest = "", False, text
        if found := _GUARDED.match(text):
            negated, guard, rest = found.group(1) == "!", found.group(2), found.group(3)
        opcode, _, operands = rest.partition(" ")
        try:
            made = self._made(opcode, _OPERAND.findall(operands))
        except (UnknownInstruction, ValueError, KeyError, IndexError) as error:
            raise UnknownInstruction(f"{name}, line {line}: {text}: {error}") from None
        for each in made:
            each.guard, each.negated, each.text, each.line, each.loc = guard, negated, text, line, loc
            self.instructions.append(each)

    def _made(self, opcode: str, operands: list[str]) -> list[Instruction]:
        """The instructions of an opcode: almost always one."""
        head, *parts = opcode.split(".")
        if opcode in _ALONE:
            return [Instruction(_ALONE[opcode])]
        if head == "mov" and (operands[0][0] == "{" or operands[1][0] == "{"):
            return self._mov_of_vectors(parts[-1], operands)
        if head == "ld" and parts[0] == "param":
            return [self._parameter(parts[-1], *operands)]
        if head in ("ld", "st"):
            return [self._memory(head, parts, operands)]
        if head in ("atom", "red"):
            return [self._atomic(head, parts, operands)]
        if head == "bra":
            return [Instruction("BRANCH", target=operands[0])]
        if head == "bar" and parts == ["warp", "sync"]:
            return [Instruction("WARP_SYNC")]
        if head in ("bar", "barrier") and parts[-1] in ("sync", "aligned") and operands == ["0"]:
            return [Instruction("BARRIER")]
        if head == "shfl":
            return [self._shuffle(parts, operands)]
        if opcode in ("vote.sync.ballot.b32", "vote.sync.any.pred", "vote.sync.all.pred"):
            return [Instruction("VOTE", [operands[0]], [self._source(operands[1], 1)], [_VOTES.index(parts[1])])]
        if opcode.startswith("cp.async"):
            return [self._copy(parts, operands)]
        if head == "createpolicy":  # caches have no policy here
            return [self._plain("mov.b64", [operands[0], "0"])]
        if opcode.startswith("wgmma.wait_group"):
            return [Instruction("WGMMA_WAIT", k=[int(operands[0])])]
        for pattern, make in ((_MATRIX, self._matrix), (_MMA, self._mma), (_WGMMA, self._wgmma)):
            if found := pattern.fullmatch(opcode):
                return [make(found, operands)]
        return [self._plain(opcode, operands)]

    def _plain(self, opcode: str, operands: list[str]) -> Instruction:
        """An instruction from registers to registers."""
        for index, widths in plain().get(opcode, ()):
            if len(widths) == len(operands) and all(
                text[0] != "%" or width(text) == bits for text, bits in zip(operands, widths, strict=True)
            ):
                sources = [self._source(text, bits) for text, bits in zip(operands[1:], widths[1:], strict=True)]
                latency = SPECIAL_UNIT if opcode.split(".")[0] in _SLOW else ALU
                return Instruction("PLAIN", [operands[0]], sources, plain=index, latency=latency)
        raise UnknownInstruction(f"no {opcode} of such operands")

    def _source(self, text: str, bits: int) -> Operand:
        """A register, or an immediate of so many bits."""
        if text in SPECIAL or _REGISTER.match(text):
            if width(text) != bits:
                raise UnknownInstruction(f"{text} has not {bits} bits")
            return text
        if text == "%ntid.x":
            return Constant(bits, self.threads)
        if text in ("%nctaid.x", "%nctaid.y", "%nctaid.z"):
            return Constant(bits, parameter=-1 - "xyz".index(text[-1]))
        if text == "global_smem":
            return Constant(bits)
        if bits == 1:
            return Constant(32, 0xFFFFFFFF if int(text) else 0)
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Constant(bits, int(text[2:], 16))
        return Constant(bits, int(text.rstrip("U"), 0) & ((1 << bits) - 1))

    def _vector(self, text: str, bits: int) -> list[Operand]:
        """The registers in braces, or the one without."""
        return [self._source(each, bits) for each in text.strip("{} ").replace(",", " ").split()]

    def _address(self, text: str, bits: int) -> tuple[Operand, int]:
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise UnknownInstruction(f"address {text}")
        return self._source(found.group(1), bits), int(found.group(2) or "0", 0)

    def _mov_of_vectors(self, kind: str, operands: list[str]) -> list[Instruction]:
        """Two registers of half the bits to one, or the other way."""
        if operands[1][0] == "{":
            low, high = operands[1].strip("{} ").replace(",", " ").split()
            return [self._plain(f"pack.{kind}", [operands[0], low, high])]
        halves = operands[0].strip("{} ").replace(",", " ").split()
        return [
            self._plain(f"{part}.{kind}", [half, operands[1]])
            for part, half in zip(("low", "high"), halves, strict=True)
            if half != "_"
        ]

    def _parameter(self, kind: str, result: str, name: str) -> Instruction:
        index = self.by_name[name.strip("[] ")]
        bits = self.parameters[index][1]
        if int(kind[1:]) != bits:
            raise UnknownInstruction(f"a parameter of {bits} bits")
        wide = (
            f"cvt.{self.parameters[index][0]}64.{self.parameters[index][0]}32"
            if width(result) > bits
            else f"mov.b{bits}"
        )
        made = self._plain(wide.replace(".b", ".u") if wide.startswith("cvt") else wide, [result, "0"])
        made.sources = [Constant(bits, parameter=index)]
        return made

    def _memory(self, head: str, parts: list[str], operands: list[str]) -> Instruction:
        """A load or store of global or shared memory."""
        space = next(part for part in parts if part.split("::")[0] in ("global", "shared"))
        elements = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
        strong = "volatile" in parts or any(part in _SEMANTICS for part in parts)
        ordered = any(part in ("acquire", "release") for part in parts)
        access = 2 if strong else 1 if "cg" in parts or "cv" in parts else 0
        for part in parts[:-1]:
            known = part in (space, f"v{elements}", "volatile", "gpu", "cg", "cv", "L2::cache_hint", *_SEMANTICS)
            if not known and not _POLICY.fullmatch(part):
                raise UnknownInstruction(f"modifier {part}")
        bits = int(parts[-1][1:])
        address, values = operands[:2] if head == "st" else operands[1::-1]
        words = values.strip("{} ").replace(",", " ").split()
        wide = max((width(word) for word in words if word[0] == "%"), default=bits)
        if len(words) != elements or bits * elements > 128 or (parts[-1][0] == "s" and wide != bits):
            raise UnknownInstruction("vector size")
        base, offset = self._address(address, 64 if space == "global" else 32)
        k = [offset, bits // 8, elements, access | 4 * ordered, wide // 8]
        kind = ("LOAD" if head == "ld" else "STORE") + ("" if space == "global" else "_SHARED")
        if head == "ld":
            return Instruction(kind, words, [base], k, latency=FROM_GLOBAL if space == "global" else FROM_SHARED)
        return Instruction(kind, [], [base, *(self._source(word, wide) for word in words)], k)

    def _atomic(self, head: str, parts: list[str], operands: list[str]) -> Instruction:
        """An atomic of global memory, for the whole GPU."""
        kind = parts[-1]
        elements = next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
        operation = next(part for part in parts if part in _OPERATION)
        semantics = next((part for part in parts if part in _SEMANTICS), "relaxed")
        rest = set(parts) - {"global", "gpu", semantics, operation, f"v{elements}", kind, "noftz"}
        if "global" not in parts or "gpu" not in parts or rest:
            raise UnknownInstruction(f"atomic {' '.join(sorted(rest))}")
        bits = 32 if kind.endswith("x2") else int(re.sub(r"\D", "", kind))
        results = operands.pop(0).strip("{} ").replace(",", " ").split() if head == "atom" else []
        base, offset = self._address(operands[0], 64)
        values = [each for text in operands[1:] for each in self._vector(text, bits)]
        code = _OPERATION[operation] << 4 | _TYPE.get(kind, _TYPE.get(kind[0], 0))
        k = [offset, bits // 8, elements, _SEMANTICS[semantics], code]
        return Instruction("ATOMIC", ["" if r == "_" else r for r in results], [base, *values], k, latency=FROM_ATOMIC)

    def _copy(self, parts: list[str], operands: list[str]) -> Instruction:
        """cp.async and its waits."""
        if parts[1] in ("wait_group", "wait_all"):
            return Instruction("COPY_WAIT", k=[int(operands[0]) if operands else 0])
        if parts[1] not in ("ca", "cg") or parts[2:4] != ["shared", "global"] or len(parts) > 4:
            raise UnknownInstruction("cp.async")
        (to, to_offset), (from_, from_offset) = self._address(operands[0], 32), self._address(operands[1], 64)
        given = [self._source(text, 32) for text in operands[3:]]
        k = [to_offset, int(operands[2], 0), from_offset, len(given), int(parts[1] == "cg")]
        return Instruction("COPY", [], [to, from_, *given], k)

    def _shuffle(self, parts: list[str], operands: list[str]) -> Instruction:
        results = operands[0].split("|")
        if operands[4] not in ("-1", "0xffffffff", "0xFFFFFFFF") or parts[0] != "sync" or parts[2] != "b32":
            raise UnknownInstruction("shuffle")
        sources = [self._source(text, 32) for text in operands[1:4]]
        return Instruction("SHUFFLE", results, sources, [_SHUFFLES.index(parts[1])], latency=FROM_SHARED)

    def _matrix(self, found: re.Match[str], operands: list[str]) -> Instruction:
        """ldmatrix and stmatrix."""
        loads = found.group(1) == "ld"
        base, offset = self._address(operands[1 if loads else 0], 32)
        registers = self._vector(operands[0 if loads else 1], 32)
        k = [offset, int(found.group(2)), int(bool(found.group(3)))]
        if loads:
            return Instruction("LDMATRIX", [str(each) for each in registers], [base], k, latency=FROM_SHARED)
        return Instruction("STMATRIX", [], [base, *registers], k)

    def _mma(self, found: re.Match[str], operands: list[str]) -> Instruction:
        results, *sources = (self._vector(text, 32) for text in operands)
        K, kind = int(found.group(1)), _ELEMENT[found.group(2)]
        if K not in ((4, 8) if kind == 2 else (8, 16)):
            raise UnknownInstruction("k")
        flat = [each for source in sources for each in source]
        return Instruction("MMA", [str(each) for each in results], flat, [K, kind], latency=TENSOR)

    def _wgmma(self, found: re.Match[str], operands: list[str]) -> Instruction:
        N, K, kind = int(found.group(1)), int(found.group(2)), _ELEMENT[found.group(3)]
        results = [str(each) for each in self._vector(operands[0], 32)]
        in_registers = operands[1][0] == "{"
        a = self._vector(operands[1], 32 if in_registers else 64)
        negate_a, negate_b, *transposed = map(int, operands[4:])
        size = 8 if kind == 2 else 16
        if size != K or len(results) != N // 2:
            raise UnknownInstruction("sizes")
        by_columns, by_rows = ([0] * in_registers + transposed) if transposed else (0, 0)
        flags = in_registers | by_columns << 1 | by_rows << 2 | (negate_a != negate_b) << 3
        sources = [*results, *a, self._source(operands[2], 64), self._source(operands[3], 1)]
        return Instruction("WGMMA", results, sources, [N, kind, flags], latency=ALU)
