"""The collectives of a compiled program, read from its text: kind, mesh axes, shape, how often.

`of(compiled.as_text(), {"data": 4, "model": 2})` counts an instruction in a loop as often as the
loop runs. The payload of a gather or a scatter is the whole array, whichever side holds it.
"""

import math
import re
from collections import Counter
from itertools import combinations
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
SIZES |= {"f64": 8, "s64": 8, "u64": 8}

INSTRUCTION = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\("
)
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=(%[\w.-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One array that one instruction exchanges; `axes` joins the mesh axes by "+"."""

    kind: str
    axes: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self):
        return SIZES[self.dtype] * math.prod(self.shape)


def of(text, mesh):
    """Counter of the Collectives of a compiled program, by how often one run of it exchanges them.

    Raises ValueError for one in a loop of unknown length, between devices that no axes of the mesh
    join, or in a form that this file does not read.
    """
    computations, entry = split(text)
    found = Counter()

    def walk(name, times):
        for line in computations[name]:
            made = INSTRUCTION.search(line)
            if made:
                if made["start"] or times is None:
                    raise ValueError(f"not to be counted: {line.strip()[:200]}")
                for one in payloads(made, line, mesh):
                    found[one] += times
            # What reduces elements within a collective is no call that could exchange anything.
            for callee in () if made else called(line):
                trips = TRIPS.search(line)
                looped = " while(" in line
                known = times is not None and (trips or not looped)
                walk(callee, times * (int(trips[1]) if looped else 1) if known else None)

    walk(entry, 1)
    return found


def split(text):
    """-> ({computation: its lines}, the name of the entry)"""
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?(%[\w.-]+) .*\{$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def called(line):
    names = CALLED.findall(line)
    for group in BRANCHES.findall(line):
        names += [name.strip() for name in group.split(",")]
    return names


def payloads(made, line, mesh):
    """The arrays of one instruction, whole."""
    axes, size = axes_of(line, mesh)
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", made["type"]):
        shape = [int(n) for n in dims.split(",") if n]
        if made["kind"] == "reduce-scatter":
            shape[int(re.search(r"dimensions=\{(\d+)\}", line)[1])] *= size
        yield Collective(made["kind"], axes, dtype, tuple(shape))


def axes_of(line, mesh):
    """-> (the axes along which the devices of a group differ, devices in a group)"""
    wanted = {frozenset(map(int, group)) for group in groups_of(line, math.prod(mesh.values()))}
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    pairs = "source_target_pairs" in line
    for count in range(1, len(mesh) + 1):
        for some in combinations(range(len(mesh)), count):
            size = math.prod(ids.shape[axis] for axis in some)
            rows = np.moveaxis(ids, some, range(len(mesh) - count, len(mesh))).reshape(-1, size)
            groups = {frozenset(map(int, row)) for row in rows}
            # A permutation names pairs: each must lie within one group.
            fits = all(any(g <= group for group in groups) for g in wanted) if pairs else None
            if fits or groups == wanted:
                return "+".join(list(mesh)[axis] for axis in some), size
    raise ValueError(f"between no axes of {mesh}: {line.strip()[:200]}")


def groups_of(line, devices):
    """The groups of devices, in each of the forms that XLA writes."""
    if made := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [part.split(",") for part in re.findall(r"\{([\d,]+)\}", made[1])]
    if made := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return iota(made[2], made[3]).reshape(numbers(made[1]))
    if made := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}",
        line,
    ):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", made[1]))
        grouped = re.findall(r"'(\w+)'(:?)", made[4])
        if any(colon for _, colon in grouped):
            raise ValueError(f"a part of an axis: {line.strip()[:200]}")
        names, some = list(sizes), [name for name, _ in grouped]
        ids = iota(made[2] or str(devices), made[3]).reshape([int(n) for n in sizes.values()])
        last = range(ids.ndim - len(some), ids.ndim)
        ids = np.moveaxis(ids, [names.index(name) for name in some], last)
        return ids.reshape(-1, math.prod(int(sizes[name]) for name in some))
    raise ValueError(f"groups in an unknown form: {line.strip()[:200]}")


def numbers(text):
    return [int(n) for n in text.split(",")]


def iota(dims, transposed):
    ids = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(transposed)).ravel() if transposed else ids.ravel()
