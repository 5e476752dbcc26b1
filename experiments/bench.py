"""Benchmarks of the product's own train step: speed, its spread, compile time, peak memory.

python -m experiments.bench model                            # this machine's default table
python -m experiments.bench model --shapes gpt2_124m --connections residual mhc_n2 --profile
python -m experiments.bench model --set optim.name=muon --out muon.json
python -m experiments.bench model --variants "" model.remat=true model.remat_streams=true --jobs 2
python -m experiments.bench mesh --shape gpt2_124m           # a 1x1 mesh against no mesh
python -m experiments.bench layer --shapes d2048 d4096        # one layer against its floor
python -m experiments.bench decode --shape gpt2_124m --profile  # one token a row
python -m experiments.bench paths --shape d20                # fast path against reference path
python -m experiments.bench scale --shapes gpt2_124m         # over 1, 2, 4, ... devices

Every row runs in a process of its own, so that the peak of memory is that row's and one that runs
out of memory does not end the table. `--jobs 2` runs two at a time, each on a GPU of its own.
Figures are written as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from experiments import scaling
from mhcjax import runlog
from mhcjax.config import Config, check_ranges, override, preset


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
    "variant": "variant",
    "optimizer": "optimizer",
    "parameters": "parameters",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "step_ms": "step ms",
    "spread": "spread",
    "overhead": "over residual",
    "compile_s": "compile s",
    "peak_gb": "peak GB",
    "predicted_gb": "compiled GB",
    "plan_ms": "plan ms",
    "plan_ms_off": "off",
    "working_gb": "beside the state GB",
    "plan_working_gb": "plan GB",
    "plan_working_off": "off",
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


def stepper(config: Config, step: Any, state: Any, place: Any) -> Callable[[int], dict[str, float]]:
    """`run(count)` -> seconds of each of `count` more steps, and the last one's loss; only its end
    waits for the device. `place`: where a batch goes."""
    import jax

    from mhcjax import data, optim

    hyper = optim.hyper(config.optim, config.total_steps)
    tokens, made, shape = zipf_tokens(config.model.vocab), 0, config.data

    def batch() -> jax.Array:
        nonlocal made
        made += 1
        rows = data.batch(
            tokens,
            seed=0,
            step=made,
            batch=shape.batch,
            length=shape.length,
            micro_batches=shape.micro_batches,
        )
        return jax.device_put(rows, place)

    def run(count: int) -> dict[str, float]:
        nonlocal state
        ahead, began = batch(), time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, ahead, hyper)
            ahead = batch()
        jax.block_until_ready(metrics)
        return {
            "seconds": (time.perf_counter() - began) / count,
            "loss": float(metrics["loss"]),
        }

    return run


def on_paper(config: Config, device: str) -> dict[str, Any]:
    """What the plan says of a step: bytes by kind, and seconds by what takes them where the speeds
    of that device are known."""
    from mhcjax import costs, plan, train

    known = device in train.DEVICES and train.DEVICES[device].bandwidth is not None
    took = plan.seconds(config, device) if known else None
    return {
        "memory": dataclasses.asdict(costs.memory(config)),
        "seconds": {**dataclasses.asdict(took), "total": took.total} if took else None,
    }


def measure(
    config: Config, *, windows: int, steps: int, trace: Path | None, settle: float = 0.0
) -> dict[str, Any]:
    """Time `windows` windows of `steps` steps, after `settle` seconds of them: a GPU that comes
    from idle is cooler and faster than it stays. Put beside them what the plan says."""
    import jax
    import numpy as np

    from mhcjax import audit, gpt, optim, train

    program = train.program(config)
    began = time.perf_counter()
    step = program.compile(optim.hyper(config.optim, config.total_steps))
    compiled = time.perf_counter() - began
    state = program.init(jax.random.key(config.seed))
    parameters = gpt.count(state.params)
    run = stepper(config, step, state, program.batch_sharding)
    del state  # its buffers are the first step's to give away
    run(3)
    began, first = time.perf_counter(), None
    while time.perf_counter() < began + settle:
        found = run(steps)["seconds"]
        first = first or found
    seconds = [run(steps)["seconds"] for _ in range(windows)]
    stats = jax.devices()[0].memory_stats() or {}
    if trace is not None:
        with jax.profiler.trace(trace):
            run(3)
    median = float(np.median(seconds))
    per_step = config.data.batch * config.data.length * config.data.micro_batches
    flops = train.flops_per_token(config.model, config.data.length)
    kind = jax.devices()[0].device_kind
    peak = train.device_of(kind)
    sizes = {f"mesh.{axis}": count for axis, count in program.mesh.shape.items()}
    planned = on_paper(override(config, sizes), kind)
    held = planned["memory"]
    stated = held["parameters"] + held["optimizer"]
    peak_bytes = stats.get("peak_bytes_in_use")
    total = planned["seconds"] and planned["seconds"]["total"]
    m = step.memory_analysis()
    return {
        "model": audit.model_name(config),
        "parameters": parameters,
        "optimizer": config.optim.name,
        "tokens_per_step": per_step,
        "tokens_per_second": per_step / median,
        "mfu": per_step / median * flops / peak.peak_flops if peak else None,
        "step_ms": 1e3 * median,
        "spread": (max(seconds) - min(seconds)) / median,
        "windows_ms": [1e3 * s for s in seconds],
        "settle_s": settle,
        "first_ms": first and 1e3 * first,
        "compile_s": compiled,
        "peak_gb": peak_bytes / 1e9 if peak_bytes else None,
        "predicted_gb": audit.compiled_bytes(step) / 1e9,
        # Of the whole step beside the state: activations, temporaries, gradients; as the allocator
        # saw it, else as the compiler states it.
        "working_gb": ((peak_bytes or audit.compiled_bytes(step)) - stated) / 1e9,
        "plan_ms": 1e3 * total if total else None,
        "plan_working_gb": (held["peak"] - stated) / 1e9,
        "plan": planned,
        "compiled": {
            "arguments": m.argument_size_in_bytes,
            "outputs": m.output_size_in_bytes,
            "aliased": m.alias_size_in_bytes,
            "temporary": m.temp_size_in_bytes,
        },
        "config": dataclasses.asdict(config),
        "versions": runlog.versions(),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def mesh(args: argparse.Namespace) -> int:
    """The step on a mesh of one device against the same function jitted without any sharding, by
    turns in this process, each with a state of its own that it gives away."""
    import jax
    import numpy as np

    from mhcjax import optim, sharding, train

    changes = {**changes_of(args.set), **{f"mesh.{axis}": 1 for axis in sharding.AXES}}
    config = config_of(args.shape, args.connection, changes)
    program = train.program(config)
    hyper = optim.hyper(config.optim, config.total_steps)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        (program.abstract_state, program.abstract_batch),
    )
    lowered = jax.jit(program.step, donate_argnums=0).lower(*shapes, hyper)
    plain = lowered.compile(compiler_options=train.COMPILER_OPTIONS)
    one, key = jax.devices()[0], jax.random.key(config.seed)
    runs = {
        "1x1 mesh": stepper(
            config, program.compile(hyper), program.init(key), program.batch_sharding
        ),
        "no mesh": stepper(config, plain, jax.device_put(program.init(key), one), one),
    }
    for run in runs.values():
        run(3)
    found: dict[str, list[float]] = {name: [] for name in runs}
    last: dict[str, float] = {}
    for _ in range(args.windows):
        for name, run in runs.items():
            window = run(args.steps)
            found[name].append(window["seconds"])
            last[name] = window["loss"]
    medians = {name: float(np.median(seconds)) for name, seconds in found.items()}
    pairs = [b / a for a, b in zip(*found.values(), strict=True)]
    tokens = config.data.batch * config.data.length * config.data.micro_batches
    row = {
        "shape": args.shape,
        "connection": args.connection,
        # Throughput on the mesh over throughput without, and of each pair of windows.
        "ratio": medians["no mesh"] / medians["1x1 mesh"],
        "pairs": pairs,
        "quartiles": [float(q) for q in np.quantile(pairs, (0.25, 0.75))],
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "seconds": found,
        "last_loss": last,
        "steps": args.steps,
        "config": dataclasses.asdict(config),
        "versions": runlog.versions(),
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runlog.write_atomic(args.out, json.dumps(row, indent=1) + "\n")
    rates = ", ".join(f"{name} {r:,.0f}" for name, r in row["tokens_per_second"].items())
    low, high = row["quartiles"]
    print(f"{args.shape} {args.connection}, tokens/s: {rates}; last losses {last}")
    print(
        f"throughput of the 1x1 mesh {row['ratio']:.4f} of the step without; quartiles of "
        f"{len(pairs)} pairs {low:.4f} to {high:.4f}"
    )
    print(f"written: {args.out}")
    # A CPU shares its cores with whatever else runs: its time is shown, not judged.
    return 1 if one.platform != "cpu" and row["ratio"] < 0.99 else 0


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
    """Markdown of the rows; overhead is over the residual row of that shape, variant and
    optimizer."""
    base = {_like(r): r["step_ms"] for r in rows if r["connection"] == "residual" and _made(r)}
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        if not _made(row):
            named = [row["shape"], row["connection"], row.get("variant"), row["error"]]
            lines.append("| " + " | ".join(filter(None, named)) + " |")
            continue
        shown = {
            **row,
            "overhead": _off(row["step_ms"], base.get(_like(row))),
            "plan_ms_off": _off(row.get("plan_ms"), row["step_ms"]),
            "plan_working_off": _off(row.get("plan_working_gb"), row.get("working_gb")),
        }
        lines.append("| " + " | ".join(_show(k, shown.get(k)) for k in COLUMNS) + " |")
    return "\n".join(lines)


def _made(row: dict[str, Any]) -> bool:
    return "error" not in row


def _like(row: dict[str, Any]) -> tuple:
    return row["shape"], row.get("variant"), row.get("optimizer")


def _off(value: float | None, ground: float | None) -> float | None:
    return value / ground - 1 if value and ground else None


def _show(column: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if column.endswith("_off"):
        return f"{value:+.1%}"
    if column in ("mfu", "spread", "overhead"):
        return f"{value:.1%}"
    if column in ("parameters", "tokens_per_second"):
        return f"{value:,.0f}"
    return f"{value:.2f}"


def row_process(request: dict[str, Any], environment: dict[str, str] | None) -> dict[str, Any]:
    """One row in a process of its own; what it says goes to standard error."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        done = subprocess.run(
            [sys.executable, "-m", "experiments.bench", "row", json.dumps(request), str(answer)],
            stdout=sys.stderr,
            env=environment,
            check=False,
        )
        named = {name: request[name] for name in ("shape", "connection", "variant")}
        named["wall_s"] = time.perf_counter() - began
        if not answer.exists():
            return {**named, "error": f"the row's process ended with {done.returncode}"}
        return {**named, **json.loads(answer.read_text())}


def requests_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows asked for. A wrong name is said before the first of them runs; a variant that a
    model cannot have is left out."""
    found = []
    for shape, connection, variant in itertools.product(
        args.shapes, args.connections, args.variants
    ):
        changes = changes_of([*args.set, *filter(None, variant.split(","))])
        config = config_of(shape, connection, changes)
        try:
            check_ranges(config)
        except ValueError as error:
            if not variant:
                raise
            print(f"left out: {shape} {connection} {variant}: {error}", flush=True)
            continue
        found.append(
            {
                "shape": shape,
                "connection": connection,
                "variant": variant,
                "changes": changes,
                "windows": args.windows,
                "steps": args.steps,
                "settle": args.settle,
                "profile": args.profile,
            }
        )
    return found


def model(args: argparse.Namespace) -> int:
    """The table over shapes, connections and variants."""
    requests = requests_of(args)
    places: SimpleQueue[dict[str, str] | None] = SimpleQueue()
    if args.jobs == 1:
        places.put(None)
    else:
        for place in scaling.places(args.jobs):
            places.put(place)

    def made(at: int) -> tuple[int, dict[str, Any]]:
        place = places.get()
        try:
            return at, row_process(requests[at], place)
        finally:
            places.put(place)

    rows: dict[int, dict[str, Any]] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(made, at) for at in range(len(requests))]):
            at, row = done.result()
            rows[at] = row
            ordered = [rows[k] for k in sorted(rows)]
            runlog.write_atomic(args.out, json.dumps(ordered, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    print("\n" + table(ordered))
    print(f"\nwritten: {args.out}")
    return 0 if all(map(_made, ordered)) else 1


def row(request: dict[str, Any], answer: Path) -> None:
    """The child: measure one row and write it."""
    config = config_of(request["shape"], request["connection"], request["changes"])
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) if request["profile"] else None
        timing = {name: request[name] for name in ("windows", "steps", "settle")}
        found = measure(config, **timing, trace=trace)
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
    m.add_argument(
        "--variants", nargs="+", default=[""], help="a row each: FIELD=VALUE[,FIELD=VALUE]"
    )
    m.add_argument("--jobs", type=int, default=1, help="rows at a time, each on its own GPU [1]")
    m.add_argument("--windows", type=int, default=5, help="timed windows [5]")
    m.add_argument("--steps", type=int, default=10, help="steps in a window [10]")
    m.add_argument("--settle", type=float, default=0.0, help="seconds of steps before them [0]")
    m.add_argument("--profile", action="store_true", help="kernel times of three steps (GPU)")
    m.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON of all rows")
    o = verbs.add_parser("mesh", help="a mesh of one device against none, by turns")
    o.add_argument("--shape", default="cpu_tiny", help=f"of {', '.join(SHAPES)}")
    o.add_argument("--connection", default="mhc_n2")
    o.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config overrides")
    o.add_argument("--windows", type=int, default=12, help="timed windows of each [12]")
    o.add_argument("--steps", type=int, default=10, help="steps in a window [10]")
    o.add_argument("--out", type=Path, default=Path("runs/mesh.json"), help="JSON of all windows")
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
        for name, least in (("windows", 1), ("steps", 1), ("settle", 0)):
            if not (given := getattr(args, name, least)) >= least:
                raise ValueError(f"--{name} {given}: give at least {least}")
        if args.verb == "model":
            return model(args)
        if args.verb == "mesh":
            return mesh(args)
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
