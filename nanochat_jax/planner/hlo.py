"""What a compiled program does, counted in its text: collectives, matrix products, memory traffic, cuDNN calls.

Reads the scheduled HLO of one device (`compiled.as_text()`). A loop's body counts as often as the loop turns, which XLA
notes beside it; a fusion is one kernel that reads its operands and writes its result once. Where a kernel only touches
a slice of an operand, the slice counts. Not seen: what the L2 cache spares and what kernels reread.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute", "collective-broadcast")
# no kernel of their own: names for what is already in memory, or the ends of what was counted at its start
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "async-start", "async-update", "async-done", "opt-barrier",
}  # fmt: skip
# what writes into its first operand, and which operand it writes
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, as written
    root: bool


@dataclass(frozen=True)
class Collective:
    """A collective of the program. `bytes` is its payload on one device (the whole array of a gather or a scatter),
    `tensors` how many arrays it moves at once, `times` how often it runs, `group` how many devices take part."""

    kind: str
    bytes: int
    tensors: int
    group: int
    times: int
    in_loop: bool
    source: str  # the traced operation that it comes from

    @property
    def link_bytes(self) -> float:
        """What one device must send in one run, by the ring algorithm, which is optimal in bytes."""
        share = (self.group - 1) / self.group
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * self.bytes


# What kernels reach in practice, as a share of the card's peak: products and attention of its FLOP/s, all of its memory
# bandwidth. Assumed, from what is published of H100s; to be replaced by what is measured.
REACHED = {"product": 0.63, "attention forward": 0.5, "attention backward": 0.4, "other": 1.0, "memory": 0.84}
PEAK = dict.fromkeys(REACHED, 1.0)


@dataclass(frozen=True)
class Kernel:
    kind: str  # "product", "attention forward", "attention backward", "other"
    flops: float
    bytes: int
    times: int


@dataclass
class Counts:
    """Everything counted, on one device, for one run of the program."""

    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    attention_forward: int = 0  # cuDNN calls in the text, not times their loops
    attention_backward: int = 0
    unknown_loops: int = 0  # loops of unknown length, counted as one turn

    @property
    def flops(self) -> float:
        return sum(k.flops * k.times for k in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(k.bytes * k.times for k in self.kernels)

    @property
    def link_bytes(self) -> float:
        return sum(c.link_bytes * c.times for c in self.collectives)

    @property
    def other_bytes(self) -> int:
        """Of kernels that are neither products nor attention: what fusing them better would save."""
        return sum(k.bytes * k.times for k in self.kernels if k.kind == "other")

    def kernel_seconds(
        self, flops_per_second: float, bytes_per_second: float, reached: Mapping[str, float] = PEAK
    ) -> float:
        """Kernels one after the other, each as fast as the slower of the two rates lets it, or the share of these that
        kernels of its kind reach."""

        def seconds(k: Kernel) -> float:
            by_flops = k.flops / (flops_per_second * reached[k.kind])
            return k.times * max(by_flops, k.bytes / (bytes_per_second * reached["memory"]))

        return sum(seconds(k) for k in self.kernels)


def count(text: str) -> Counts:
    """Counts the program of `compiled.as_text()`. Raises ValueError if the text holds no entry computation."""
    program = _Program(text)
    counts = Counts()
    program.walk(program.entry, 1, False, counts)
    return counts


def shape_bytes(type_text: str) -> int:
    """Bytes of an HLO type, tuples added up: "(f32[2,3]{1,0}, bf16[4])" is 32."""
    return sum(math.prod(dims) * size for size, dims in _arrays(type_text))


def _arrays(type_text: str) -> list[tuple[int, list[int]]]:
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", type_text)
    return [(BYTES[t], [int(d.strip("<=")) for d in dims.split(",") if d]) for t, dims in found if t in BYTES]


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.partitions = int(partitions[1]) if partitions else 1
        for line in text.splitlines():
            if line[:1] not in (" ", "") and (header := _HEADER.match(line)):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif parsed := _INSTRUCTION.match(line):
                if instruction := _parse(parsed[2], parsed[3], bool(parsed[1])):
                    current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text is no HLO module: it has no ENTRY computation")

    def walk(self, name: str, times: int, in_loop: bool, counts: Counts) -> None:
        body = self.computations[name]
        for i in body.values():
            kind = i.opcode.removesuffix("-start")
            if i.opcode == "while":
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.rest)
                counts.unknown_loops += turns is None
                self.walk(_called(i.rest, "body"), times * (int(turns[1]) if turns else 1), True, counts)
            elif i.opcode == "conditional":
                for branch in _branches(i.rest):
                    self.walk(branch, times, in_loop, counts)
            elif i.opcode == "call":
                self.walk(_called(i.rest, "to_apply"), times, in_loop, counts)
            elif i.opcode == "async-start":
                self.walk(_called(i.rest, "calls"), times, in_loop, counts)
            elif kind in COLLECTIVES:
                counts.collectives.append(self._collective(i, kind, body, times, in_loop))
            elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
                flops = self._flops(i, body)
                kind = "product" if flops else "other"
                if '"__cudnn$fmhaSoftmax"' in i.rest:
                    kind, counts.attention_forward = "attention forward", counts.attention_forward + 1
                elif '"__cudnn$fmhaSoftmaxBackward"' in i.rest:
                    kind, counts.attention_backward = "attention backward", counts.attention_backward + 1
                counts.kernels.append(Kernel(kind, flops, self._bytes(i, body), times))

    def _collective(self, i: Instruction, kind: str, body, times: int, in_loop: bool) -> Collective:
        group = _group_size(i.rest, self.partitions)
        size = sum(shape_bytes(body[o].type) for o in i.operands if o in body)
        source = re.search(r'op_name="([^"]*)"', i.rest)
        payload = size * group if kind == "all-gather" else size
        return Collective(kind, payload, len(i.operands), group, times, in_loop, source[1] if source else "")

    def _flops(self, i: Instruction, body: dict[str, Instruction]) -> float:
        if i.opcode == "fusion":
            inner = self.computations[_called(i.rest, "calls")]
            return sum(self._flops(j, inner) for j in inner.values())
        if i.opcode == "dot":
            return _dot_flops(i, body, r"lhs_contracting_dims=\{([\d,]*)\}")
        if "__cublas$" in i.rest:
            return _dot_flops(i, body, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        if "__cudnn$fmha" in i.rest:
            square = re.search(r'"intermediate_tensor_shape": ?\{[^}]*"dimensions": ?\[([^\]]*)\]', i.rest)
            if square is None:
                return 0.0
            scores = math.prod(int(d) for d in re.findall(r"\d+", square[1]))
            products = 5 if "Backward" in i.rest else 2
            causal = 0.5 if "CAUSAL" in i.rest else 1.0
            return products * 2 * causal * scores * _head_width(i, body)
        return 0.0

    def _bytes(self, i: Instruction, body: dict[str, Instruction]) -> int:
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * shape_bytes(i.type)
        if i.opcode == "dynamic-update-slice":
            return 2 * shape_bytes(body[i.operands[1]].type)
        if i.opcode != "fusion":
            written = re.sub(r"\b[su]8\[[\d,]*\]", "", i.type) if "__cu" in i.rest else i.type  # not a workspace
            return shape_bytes(written) + sum(shape_bytes(body[o].type) for o in i.operands if o in body)
        inner = self.computations[_called(i.rest, "calls")]
        return sum(_read(p, inner) for p in inner.values() if p.opcode == "parameter") + _written(inner)


def _parse(name: str, text: str, root: bool) -> Instruction | None:
    """An instruction from "TYPE opcode(operands), attributes"."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    found = re.match(r"\s*([a-z][a-z0-9\-]*)\(", text[end:])
    if not found:
        return None
    opened = end + found.end() - 1
    closed = _closing(text, opened)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[opened:closed]))
    opcode = found[1].replace("fusion-start", "fusion")  # as newer releases have those that run beside others
    return Instruction(name, text[:end], opcode, operands, text[closed:], root)


def _closing(text: str, at: int) -> int:
    """Where the bracket opened at `at` closes."""
    depth = 0
    for position in range(at, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return len(text) - 1


def _called(rest: str, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", rest)
    if found is None:
        raise ValueError(f"an instruction names no {attribute}: {rest[:200]}")
    return found[1]


def _branches(rest: str) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return re.findall(r"%?([\w.\-]+)", found[1])
    return [_called(rest, "true_computation"), _called(rest, "false_computation")]


def _group_size(rest: str, partitions: int) -> int:
    """Devices of a replica group, in the three ways of writing them."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", found[2]))
    return partitions


def _dot_flops(i: Instruction, body: dict[str, Instruction], pattern: str) -> float:
    contracted = re.search(pattern, i.rest)
    if contracted is None or not i.operands or i.operands[0] not in body:
        return 0.0
    left = _arrays(body[i.operands[0]].type)[0][1]
    depth = math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(_arrays(i.type)[0][1]) * depth


def _head_width(i: Instruction, body: dict[str, Instruction]) -> int:
    """The last axis of the first operand of an attention call, which is the queries."""
    arrays = _arrays(body[i.operands[0]].type) if i.operands and i.operands[0] in body else []
    return arrays[0][1][-1] if arrays and arrays[0][1] else 0


def _read(parameter: Instruction, inner: dict[str, Instruction]) -> int:
    """What a fusion reads of one operand: all of it, or the slices that it takes."""
    names, users = {parameter.name}, []
    for j in inner.values():  # in order of definition: a bitcast of the operand is the operand, so is its conversion
        if names.intersection(j.operands):
            if j.opcode in ("bitcast", "convert"):
                names.add(j.name)
            else:
                users.append(j)
    sliced = 0
    for j in users:
        if j.opcode in ("dynamic-slice", "slice", "gather") and j.operands[0] in names:
            sliced += shape_bytes(j.type)
        elif j.opcode in _UPDATES and j.operands[0] in names:
            pass  # written in place
        else:
            return shape_bytes(parameter.type)
    return min(sliced, shape_bytes(parameter.type))


def _written(inner: dict[str, Instruction]) -> int:
    """What a fusion writes: its result, or the slices it updates in place."""
    root = next(j for j in inner.values() if j.root)
    results = [inner[o] for o in root.operands if o in inner] if root.opcode == "tuple" else [root]
    total = 0
    for result in results:
        while result.opcode == "bitcast" and result.operands[0] in inner:
            result = inner[result.operands[0]]
        written = _UPDATES.get(result.opcode)
        total += shape_bytes(result.type if written is None else inner[result.operands[written]].type)
    return total
