"""A step of decoding, `sample.decode_step` itself: one token a row, a cache full to the context.

Parameters are held in float32 and cast by the step, as the sampler does. Every step takes the cache
that the one before it gave back, so that many are in flight and only a window's end waits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench
from mhcjax import connections, gpt, runlog, sample
from mhcjax.config import ModelConfig

COLUMNS = {
    "connection": "connection",
    "implementation": "implementation",
    "batch": "batch",
    "step_ms": "step ms",
    "spread": "spread",
    "overhead": "over residual",
    "launches": "kernels a step",
    "kernel_ms": "in kernels ms",
}
TRACED = 3  # steps


def steps_of(model: ModelConfig, params: dict, batch: int) -> Callable[[int], None]:
    """A function that takes so many steps and waits for the last; the program is compiled."""
    graphdef = gpt.graph(model)
    empty = jax.eval_shape(lambda: gpt.empty_cache(model, batch))
    keys = jax.random.split(jax.random.key(1), 2)
    # The time does not depend on what the cache holds, but denormals and NaN are no keys.
    filled = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, empty, strict=True)]
    cache = gpt.Cache(*filled)
    token = jnp.arange(batch, dtype=jnp.int32) % model.vocab
    position = jnp.full(batch, model.context - 1, jnp.int32)

    def run(count: int) -> None:
        nonlocal cache
        for _ in range(count):
            logits, cache = sample.decode_step(graphdef, params, token, position, cache)
        jax.block_until_ready(logits)

    run(1)
    return run


def timer(run: Callable[[int], None], least: float) -> Callable[[], float]:
    """A function that times one window, in seconds a step; it has as many steps as fill `least`."""
    run(3)
    began = time.perf_counter()
    run(10)
    count = max(10, int(least / (time.perf_counter() - began) * 10))

    def window() -> float:
        began = time.perf_counter()
        run(count)
        return (time.perf_counter() - began) / count

    return window


def profiled(run: Callable[[int], None]) -> dict[str, Any]:
    """Kernels that a step launches and the time in them, by name, of a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(TRACED)
        kernels, _ = bench.kernels(Path(folder), TRACED)
    if not kernels:
        return {}
    return {
        "launches": sum(count for *_, count in kernels),
        "kernel_ms": sum(ms for _, ms, _ in kernels),
        "kernels": kernels,
    }


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their overhead over the residual row of the same batch, where there is one."""
    base = {r["batch"]: r["step_ms"] for r in rows if r["connection"] == "residual"}
    return [
        {**r, "overhead": r["step_ms"] / base[r["batch"]] - 1} if r["batch"] in base else r
        for r in rows
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_show(k, row.get(k)) for k in COLUMNS) + " |")
    return "\n".join(lines)


def _show(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}" if column in ("spread", "overhead") else f"{value:.4f}"
    return str(value)


def main(args: argparse.Namespace) -> int:
    """The table over batches and connections; their windows are taken by turns, so that what the
    machine does besides meets all of them."""
    changes = bench.changes_of(args.set)
    for batch in args.batches:
        if batch < 1:
            raise ValueError(f"a batch of {batch}: give at least 1")
    models = {c: bench.config_of(args.shape, c, changes).model for c in args.connections}
    specs = {c: gpt.connection_of(model) for c, model in models.items()}
    ready = []
    for connection, model in models.items():
        params = jax.jit(lambda key, model=model: gpt.build(model, key=key)[1])(jax.random.key(0))
        for batch in args.batches:
            began = time.perf_counter()
            run = steps_of(model, params, batch)
            print(f"{connection}, batch {batch}: ready in {time.perf_counter() - began:.1f} s")
            ready.append((connection, batch, run))
    timers = [timer(run, args.seconds) for *_, run in ready]
    windows = [[window() for window in timers] for _ in range(args.windows)]
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for (connection, batch, run), found in zip(ready, zip(*windows, strict=True), strict=True):
        model, spec = models[connection], specs[connection]
        how, median = model.connection.implementation, float(np.median(found))
        rows.append(
            {
                "shape": args.shape,
                "connection": connection,
                "implementation": connections.implementation_of(
                    spec, model.width, model.dtype, how
                ),
                "batch": batch,
                "context": model.context,
                "step_ms": 1e3 * median,
                "spread": (max(found) - min(found)) / median,
                "windows_ms": [1e3 * seconds for seconds in found],
                "tokens_per_second": batch / median,
            }
        )
        if args.profile:
            rows[-1] |= profiled(run)
        rows = compared(rows)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        device = {"device": jax.devices()[0].device_kind, "versions": runlog.versions()}
        runlog.write_atomic(args.out, json.dumps({**device, "rows": rows}, indent=1) + "\n")
    print("\n" + table(rows))
    print(f"\nwritten: {args.out}")
    return 0
