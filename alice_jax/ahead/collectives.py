"""What a compiled program does, read from its text (`jax.jit(f).lower(…).compile().as_text()`)."""

import math
import re
from collections import Counter

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<operands>.*)")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")


def size(text: str) -> int:
    """Bytes of all arrays of an HLO type.

    >>> size("(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[])")
    2052
    """
    total = 0
    for kind, shape in _ARRAY.findall(text):
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        total += math.prod(int(n) for n in shape.split(",") if n) * bits // 8
    return total


def found(hlo_text: str) -> list[tuple[str, int, int]]:
    """(kind, bytes, count) of what the devices of a program send each other; sorted, equal ones counted together.

    Bytes are those of the whole array on one device: after a gather, before a scatter; several arrays that travel
    together are one. A collective inside a loop counts once. A TPU's compiler shows one that computation hides several
    times, with the same channel, and a reduce-scatter as an all-reduce in a computation named after it.

    >>> found('''
    ... ENTRY %main (x: f32[4]) -> f32[16] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %all = f32[16]{0} all-gather(%x), channel_id=1, dimensions={0}
    ... }''')
    [('all-gather', 64, 1)]
    """
    computation, sizes, found = "", dict[str, int](), dict[str, tuple[str, int]]()
    for line in hlo_text.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        name, opcode = instruction["name"], instruction["opcode"]
        result = sizes[name] = size(instruction["type"])
        kind = opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        given = sum(sizes[operand] for operand in re.findall(r"%([\w.-]+)", instruction["operands"].split(")")[0]))
        if kind != opcode and result > given:  # the start of one also returns what it was given
            result -= given
        channel = re.search(r"channel_id=(\d+)", line)
        if computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        found.setdefault(channel[1] if channel else name, (kind, max(given, result)))
    return sorted((*what, count) for what, count in Counter(found.values()).items())
