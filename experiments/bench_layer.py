"""One layer alone: coefficients, read, a branch that is the identity, write; forward and backward.

The branch stands behind a barrier, so that nothing is fused across it, and all gradients are taken:
streams, branch, every parameter. The floor of a row are the bytes of ideal kernels for read and
write, which take and give cotangents of all streams, at the speed of a copy measured in the same
run. The same for every form: kernels that hand on what is not a cotangent of x can be below it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

import mhcjax as mhc
from mhcjax import presets, runlog


class Layer(NamedTuple):
    """Streams of a benchmark: tokens, width, their dtype."""

    tokens: int
    width: int
    dtype: str


# Shared with the tests of the kernels: what they are checked at on a GPU is what is timed.
LAYERS = {
    "cpu_tiny": Layer(64, 128, "float32"),
    "d768": Layer(65536, 768, "bfloat16"),
    "d2048": Layer(8192, 2048, "bfloat16"),
    "d4096": Layer(8192, 4096, "bfloat16"),
}
CONNECTIONS = ("mhc", "mhc_lite", "mhc_n2", "mhc_n4", "deepseek_v4", "single_pass")
COLUMNS = {
    "shape": "shape",
    "connection": "connection",
    "implementation": "implementation",
    "forward_ms": "forward ms",
    "forward_floor": "x floor",
    "both_ms": "both ms",
    "both_floor": "x floor",
    "bandwidth": "TB/s",
    "peak_gb": "peak GB",
}


def units(streams: int) -> tuple[int, int]:
    """Floors (forward, forward and backward) in arrays of one width a token, whether the pre is
    the layer's own or carried: forward read N + 1, write 2N + 1; backward 3N + 1 and 3N + 2."""
    forward = 3 * streams + 2
    return forward, forward + 6 * streams + 3


def layer(
    spec: mhc.Connection, implementation: str, params: dict, x: jax.Array, u: jax.Array
) -> Any:
    """The layer; where pre is carried u is what it reads, and (x, next u) is returned."""
    f = jax.lax.optimization_barrier
    if spec.carried:
        return mhc.connect_single_pass(spec, params, f, x, u, implementation=implementation)
    return mhc.connect(spec, params, f, x, implementation=implementation)


def seconds(f: Callable, *arguments: Any, windows: int = 5, least: float = 0.05) -> float:
    """Median seconds of a call, from windows of as many calls as fill `least` seconds."""
    jax.block_until_ready(f(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    count = max(3, int(least / (time.perf_counter() - began)))
    found = []
    for _ in range(windows):
        began = time.perf_counter()
        for _ in range(count):
            out = f(*arguments)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / count)
    return sorted(found)[windows // 2]


def copy_speed(elements: int) -> float:
    """Bytes a second of a copy, read and written."""
    a = jax.random.normal(jax.random.key(0), (elements,))
    return 8 * elements / seconds(jax.jit(lambda a: a + 1), a)


def compiled(name: str, connection: str, implementation: str) -> dict[str, Any]:
    """One row's programs and arguments: forward, and forward and backward."""
    shape = LAYERS[name]
    spec = presets.named(connection)
    N, D = spec.streams, shape.width
    keys = jax.random.split(jax.random.key(0), 5)
    params = mhc.init(spec, width=D, layer=1, layers=4, key=keys[0])
    x = jax.ShapeDtypeStruct((shape.tokens, N, D), shape.dtype)
    u = jax.ShapeDtypeStruct((shape.tokens, D), shape.dtype)
    cotangents: Any = (x, u) if spec.carried else x
    run = partial(layer, spec, implementation)

    def both(params: dict, x: jax.Array, u: jax.Array, cotangents: Any) -> Any:
        # Where pre is the layer's own it takes no u, whose gradient would be an array of zeros.
        given = (params, x, u) if spec.carried else (params, x)
        out, pull = jax.vjp(lambda *a: run(*a, *(() if spec.carried else (u,))), *given)
        return out, pull(cotangents)

    return {
        "params": params,
        "streams": N,
        "carried": spec.carried,
        "forward": jax.jit(run).lower(params, x, u).compile(),
        "both": jax.jit(both).lower(params, x, u, cotangents).compile(),
    }


def measure(name: str, made: dict[str, Any], speed: float) -> dict[str, Any]:
    """One row's figures."""
    shape, N, params = LAYERS[name], made["streams"], made["params"]
    keys = jax.random.split(jax.random.key(1), 4)
    draw = partial(jax.random.normal, dtype=shape.dtype)
    x, u = draw(keys[0], (shape.tokens, N, shape.width)), draw(keys[1], (shape.tokens, shape.width))
    cotangents: Any = draw(keys[2], x.shape)
    if made["carried"]:
        cotangents = (cotangents, draw(keys[3], u.shape))
    forward = seconds(made["forward"], params, x, u)
    both = seconds(made["both"], params, x, u, cotangents)
    unit = shape.tokens * shape.width * x.dtype.itemsize
    floors = [count * unit / speed for count in units(N)]
    memory = made["both"].memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0) if memory else 0
    return {
        "forward_ms": 1e3 * forward,
        "forward_floor": forward / floors[0],
        "both_ms": 1e3 * both,
        "both_floor": both / floors[1],
        "bandwidth": units(N)[1] * unit / both / 1e12,
        "floor_ms": [1e3 * f for f in floors],
        "peak_gb": peak / 1e9,
        "streams": N,
        **shape._asdict(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['shape']} | {row['connection']} | {row['error']} |")
            continue
        shown = [row[k] if isinstance(row[k], str) else f"{row[k]:.3f}" for k in COLUMNS]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes that must move over the time they took, the copy's speed as the roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "error" not in r][::-1]
    height = 1 + 0.28 * len(rows)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    colors = {"pallas": "tab:blue", "xla": "tab:orange", "reference": "tab:gray"}
    for at, row in enumerate(rows):
        axes.barh(at, row["bandwidth"], color=colors[row["implementation"]])
        label = f" {row['both_ms']:.3f} ms, {row['both_floor']:.2f} x floor"
        inside = row["bandwidth"] > 1
        place, color = (0, "white") if inside else (row["bandwidth"], "black")
        axes.text(place, at, label, va="center", fontsize=8, color=color)
    labels = [f"{r['connection']} {r['shape']} {r['implementation']}" for r in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    speed = rows[0]["bandwidth"] * rows[0]["both_floor"]
    axes.axvline(speed, color="black", linestyle="--", linewidth=1)
    axes.text(speed, len(rows) - 0.4, f" copy {speed:.2f}", fontsize=8)
    axes.set(xlabel="bytes that must move / time, TB/s", xlim=(0, 1.15 * speed))
    axes.set_title("One layer, forward and backward", pad=14)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    """The table over shapes, connections and implementations, written row by row."""
    for name in args.shapes:
        if name not in LAYERS:
            raise ValueError(f"unknown shape {name!r}: choose one of {', '.join(LAYERS)}")
    for connection in args.connections:
        presets.named(connection)
    speed = copy_speed(1 << (28 if jax.default_backend() == "gpu" else 24))
    device = jax.devices()[0].device_kind
    print(f"{device}: a copy moves {speed / 1e12:.3f} TB/s", flush=True)
    asked = [
        (name, connection, how)
        for name in args.shapes
        for connection in args.connections
        for how in args.implementations
    ]
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Compiling takes longer than measuring, and does not disturb it: all of it comes first.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda row: compiled(*row), asked))
    for row, made in zip(asked, programs, strict=True):
        named = dict(zip(("shape", "connection", "implementation"), row, strict=True))
        try:
            rows.append({**named, **measure(row[0], made, speed)})
        except jax.errors.JaxRuntimeError as error:  # out of memory, say
            rows.append({**named, "error": str(error).splitlines()[0][:200]})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        found = {"device": device, "copy": speed, "versions": runlog.versions()}
        runlog.write_atomic(args.out, json.dumps({**found, "rows": rows}, indent=1) + "\n")
    print("\n" + table(rows))
    picture(rows, args.out.with_suffix(".png"))
    print(f"\nwritten: {args.out}, {args.out.with_suffix('.png')}")
    return 1 if any("error" in r for r in rows) else 0
