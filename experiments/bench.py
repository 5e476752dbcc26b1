"""Benchmarks of the product's own train step: speed, its spread, compile time, peak memory.

python -m experiments.bench model                            # this machine's default table
python -m experiments.bench model --shapes gpt2_124m --connections residual mhc_n2 --profile
python -m experiments.bench model --set optim.name=muon --out muon.json
python -m experiments.bench layer --shapes d2048 d4096        # one layer against its floor
python -m experiments.bench decode --shape gpt2_124m --profile  # one token a row
python -m experiments.bench paths --shape d20                # fast path against reference path
python -m experiments.bench scale --shapes gpt2_124m         # over 1, 2, 4, ... devices

Every row runs in a process of its own, so that the peak of memory is that row's and one that runs
out of memory does not end the table. Figures are written as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import scaling
from mhcjax import runlog
from mhcjax.config import Config, override, preset


def _grown(layers: int, width: int, heads: int, context: int) -> dict[str, Any]:
    """Changes that make a larger model of a preset, and a batch that one device holds."""
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
    return {f"model.{k}": v for k, v in sizes.items()} | {"data.length": context, "data.batch": 8}


# The table of shapes: a preset and what a benchmark changes in it. `cpu` ones take seconds.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu_tiny": ("nano", {"model.layers": 2, "model.width": 64, "data.batch": 8}),
    "nano": ("nano", {"optim.name": "adamw"}),
    "d20": ("d20", {"model.dtype": "bfloat16", "data.batch": 256, "optim.name": "adamw"}),
    "gpt2_124m": ("gpt2_124m", {}),
    "gpt_1b3": ("gpt2_124m", _grown(24, 2048, 16, 2048)),
    "gpt_7b": ("gpt2_124m", _grown(32, 4096, 32, 4096)),
    "gpt_27b": ("gpt2_124m", _grown(60, 6144, 48, 4096)),
}
COLUMNS = {
    "shape": "shape",
    "connection": "connection",
    "optimizer": "optimizer",
    "parameters": "parameters",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "step_ms": "step ms",
    "spread": "spread",
    "overhead": "over residual",
    "compile_s": "compile s",
    "peak_gb": "peak GB",
    "predicted_gb": "info GB",
}


def config_of(shape: str, connection: str, changes: dict[str, Any]) -> Config:
    """The config of one row."""
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    name, own = SHAPES[shape]
    start = "near_identity" if connection in ("mhc_n2", "mhc_n4") else None
    named = {"model.connection.preset": connection, "model.connection.init": start}
    return override(preset(name), {**own, **named, **changes, "name": shape})


def zipf_tokens(vocab: int) -> Any:
    """As frequent as words are (Zipf, Mandelbrot): equal rows of the embedding's gradient wait for
    each other, which uniform tokens would hide."""
    import numpy as np

    weights = 1 / (np.arange(vocab) + 2.7)
    return np.random.default_rng(0).choice(vocab, size=1 << 20, p=weights / weights.sum())


def changes_of(items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise ValueError(f"--set {item}: write FIELD=VALUE, e.g. optim.name=muon")
    return dict(item.split("=", 1) for item in items)


def measure(config: Config, *, windows: int, steps: int, trace: Path | None) -> dict[str, Any]:
    """Time `windows` windows of `steps` steps; only a window's end waits for the device."""
    import jax
    import numpy as np

    from mhcjax import audit, data, gpt, optim, train

    program = train.program(config)
    hyper = optim.hyper(config.optim, config.total_steps)
    began = time.perf_counter()
    step = program.compile(hyper)
    compiled = time.perf_counter() - began
    state = program.init(jax.random.key(config.seed))
    tokens, made = zipf_tokens(config.model.vocab), 0

    def batch() -> jax.Array:
        nonlocal made
        made += 1
        shape = config.data
        rows = data.batch(
            tokens,
            seed=0,
            step=made,
            batch=shape.batch,
            length=shape.length,
            micro_batches=shape.micro_batches,
        )
        return jax.device_put(rows, program.batch_sharding)

    def run(count: int, state: Any) -> Any:
        ahead = batch()
        for _ in range(count):
            state, metrics = step(state, ahead, hyper)
            ahead = batch()
        jax.block_until_ready(metrics)
        return state

    state = run(3, state)
    seconds = []
    for _ in range(windows):
        began = time.perf_counter()
        state = run(steps, state)
        seconds.append((time.perf_counter() - began) / steps)
    stats = jax.devices()[0].memory_stats() or {}
    if trace is not None:
        with jax.profiler.trace(trace):
            state = run(3, state)
    median = float(np.median(seconds))
    per_step = config.data.batch * config.data.length * config.data.micro_batches
    flops = train.flops_per_token(config.model, config.data.length)
    peak = train.device_of(jax.devices()[0].device_kind)
    peak_bytes = stats.get("peak_bytes_in_use")
    return {
        "model": audit.model_name(config),
        "parameters": gpt.count(state.params),
        "optimizer": config.optim.name,
        "tokens_per_step": per_step,
        "tokens_per_second": per_step / median,
        "mfu": per_step / median * flops / peak.peak_flops if peak else None,
        "step_ms": 1e3 * median,
        "spread": (max(seconds) - min(seconds)) / median,
        "compile_s": compiled,
        "peak_gb": peak_bytes / 1e9 if peak_bytes else None,
        "predicted_gb": audit.compiled_bytes(step) / 1e9,
        "config": dataclasses.asdict(config),
        "versions": runlog.versions(),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def losses_of(config: Config, steps: int) -> list[float]:
    """The training losses of a run's first steps, on its own text."""
    import jax

    from mhcjax import data, optim, tokens, train

    corpus = tokens.build(config.data.corpus, config.data.tokenizer, config.model.vocab)
    shard = data.open_tokens(corpus.train, corpus.dtype)
    program = train.program(config)
    hyper = optim.hyper(config.optim, config.total_steps)
    state, found = program.init(jax.random.key(config.seed)), []
    step_once = program.compile(hyper)
    shape = {name: getattr(config.data, name) for name in ("batch", "length", "micro_batches")}
    for step in range(steps):
        batch = data.batch(shard, seed=config.seed, step=step, **shape)
        state, metrics = step_once(state, jax.device_put(batch, program.batch_sharding), hyper)
        found.append(metrics["loss"])
    return [float(loss) for loss in jax.device_get(found)]


def paths(args: argparse.Namespace) -> int:
    """Fast against reference: connections by einsum, the head's loss by autodiff."""
    import jax
    import numpy as np

    changes = changes_of(args.set)
    slow = {"model.loss": "plain", "model.connection.implementation": "reference"}
    rows = []
    for dtype, steps in (("float32", 20), ("bfloat16", args.steps)):
        config = config_of(args.shape, args.connection, {**changes, "model.dtype": dtype})
        # The default of a GPU for float32 is TF32, whose rounding is not what is compared here.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            fast = np.array(losses_of(config, steps))
            reference = np.array(losses_of(override(config, slow), steps))
            other = np.array(losses_of(override(config, {"seed": config.seed + 1}), steps))
        rows.append(
            {
                "shape": args.shape,
                "connection": args.connection,
                "dtype": dtype,
                "steps": steps,
                "largest difference of the paths": float(np.abs(fast - reference).max()),
                "mean difference of the paths": float(np.abs(fast - reference).mean()),
                "mean difference of two seeds": float(np.abs(fast - other).mean()),
                "last loss": float(fast[-1]),
                "curves": {"fast": fast.tolist(), "reference": reference.tolist()},
                "versions": runlog.versions(),
            }
        )
        print({k: v for k, v in rows[-1].items() if k not in ("curves", "versions")}, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runlog.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    print(f"written: {args.out}")
    return 0


def kernels(trace: Path, steps: int = 3) -> tuple[list[tuple[str, float, int]], float]:
    """(kernel, milliseconds a step, launches a step) of a GPU trace, longest first; milliseconds
    a step in which no kernel ran."""
    import jax

    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    spans: list[tuple[float, float]] = []
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    found[event.name][0] += event.duration_ns / 1e6 / steps
                    found[event.name][1] += 1 / steps
                    spans.append((event.start_ns, event.start_ns + event.duration_ns))
    rows = [(name, total, round(count)) for name, (total, count) in found.items()]
    idle, reached = 0.0, None
    for start, end in sorted(spans):
        # Longer pauses are those between the steps of the trace's start and end.
        if reached is not None and 0 < start - reached < 2e6:
            idle += (start - reached) / 1e6 / steps
        reached = end if reached is None else max(reached, end)
    return sorted(rows, key=lambda r: -r[1]), idle


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of the rows; overhead is over the residual row of that shape and optimizer."""
    base = {
        (r["shape"], r["optimizer"]): r["step_ms"]
        for r in rows
        if r.get("connection") == "residual" and "step_ms" in r
    }
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['shape']} | {row['connection']} | {row['error']} |")
            continue
        ground = base.get((row["shape"], row["optimizer"]))
        shown = {**row, "overhead": row["step_ms"] / ground - 1 if ground else None}
        lines.append("| " + " | ".join(_show(k, shown.get(k)) for k in COLUMNS) + " |")
    return "\n".join(lines)


def _show(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if column in ("mfu", "spread", "overhead"):
        return f"{value:.1%}"
    if column in ("parameters", "tokens_per_second"):
        return f"{value:,.0f}"
    return f"{value:.2f}"


def row_process(request: dict[str, Any]) -> dict[str, Any]:
    """One row in a process of its own; what it says goes to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        done = subprocess.run(
            [sys.executable, "-m", "experiments.bench", "row", json.dumps(request), str(answer)],
            stdout=sys.stderr,
            check=False,
        )
        named = {"shape": request["shape"], "connection": request["connection"]}
        if not answer.exists():
            return {**named, "error": f"the row's process ended with {done.returncode}"}
        return {**named, **json.loads(answer.read_text())}


def model(args: argparse.Namespace) -> int:
    """The table over shapes and connections."""
    changes = changes_of(args.set)
    requests = [
        {
            "shape": shape,
            "connection": connection,
            "changes": changes,
            "windows": args.windows,
            "steps": args.steps,
            "profile": args.profile,
        }
        for shape in args.shapes
        for connection in args.connections
    ]
    for r in requests:  # a wrong name is said before the first row runs
        config_of(r["shape"], r["connection"], changes)
    rows: list[dict[str, Any]] = []
    for request in requests:
        rows.append(row_process(request))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        runlog.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    print(f"\nwritten: {args.out}")
    return 1 if any("error" in r for r in rows) else 0


def row(request: dict[str, Any], answer: Path) -> None:
    """The child: measure one row and write it."""
    config = config_of(request["shape"], request["connection"], request["changes"])
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) if request["profile"] else None
        found = measure(config, windows=request["windows"], steps=request["steps"], trace=trace)
        if trace is not None:
            found["kernels"], found["idle_ms"] = kernels(trace)
            print(f"{found['idle_ms']:9.3f} ms idle", file=sys.stderr)
            for name, ms, count in _head(found["kernels"], 45):
                print(f"{ms:9.3f} ms {count:5d} x {name}", file=sys.stderr)
    runlog.write_atomic(answer, json.dumps(found))


def _head(items: Iterable[Any], count: int) -> list[Any]:
    return [item for item, _ in zip(items, range(count), strict=False)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    m = verbs.add_parser("model", help="the train step over shapes and connections")
    m.add_argument("--shapes", nargs="+", default=["cpu_tiny"], help=f"of {', '.join(SHAPES)}")
    m.add_argument("--connections", nargs="+", default=["residual", "mhc_n2", "mhc_n4"])
    m.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config overrides")
    m.add_argument("--windows", type=int, default=5, help="timed windows [5]")
    m.add_argument("--steps", type=int, default=10, help="steps in a window [10]")
    m.add_argument("--profile", action="store_true", help="kernel times of three steps (GPU)")
    m.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON of all rows")
    l = verbs.add_parser("layer", help="one layer, forward and backward, against its floor")
    l.add_argument("--shapes", nargs="+", default=["cpu_tiny"])
    l.add_argument("--connections", nargs="+", default=["mhc", "mhc_n2"])
    l.add_argument("--implementations", nargs="+", default=["pallas", "xla"])
    l.add_argument("--out", type=Path, default=Path("runs/layer.json"), help="JSON of all rows")
    d = verbs.add_parser("decode", help="one step of decoding, over the residual's")
    d.add_argument("--shape", default="gpt2_124m", help=f"of {', '.join(SHAPES)}")
    d.add_argument("--connections", nargs="+", default=["residual", "deepseek_v4"])
    d.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    d.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config overrides")
    d.add_argument("--windows", type=int, default=7, help="timed windows [7]")
    d.add_argument("--seconds", type=float, default=0.5, help="of a window, at least [0.5]")
    d.add_argument("--profile", action="store_true", help="kernels of a step (GPU)")
    d.add_argument("--out", type=Path, default=Path("runs/decode.json"), help="JSON of all rows")
    p = verbs.add_parser("paths", help="loss curves of the fast and of the reference path")
    p.add_argument("--shape", default="cpu_tiny", help=f"of {', '.join(SHAPES)}")
    p.add_argument("--connection", default="mhc_n2")
    p.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config overrides")
    p.add_argument("--steps", type=int, default=200, help="steps in bfloat16 [200]")
    p.add_argument("--out", type=Path, default=Path("runs/paths.json"), help="JSON of all curves")
    s = verbs.add_parser("scale", help="weak and strong scaling over the devices that are there")
    scaling.add_arguments(s)
    one = verbs.add_parser("row", help="one row, for the process that `model` starts")
    one.add_argument("request")
    one.add_argument("answer", type=Path)
    args = parser.parse_args()
    try:
        if args.verb == "model":
            return model(args)
        if args.verb == "scale":
            return scaling.scale(args)
        if args.verb == "layer":
            from experiments import bench_layer

            return bench_layer.main(args)
        if args.verb == "decode":
            from experiments import bench_decode

            return bench_decode.main(args)
        if args.verb == "paths":
            return paths(args)
        row(json.loads(args.request), args.answer)
    except ValueError as error:
        print(f"experiments.bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
