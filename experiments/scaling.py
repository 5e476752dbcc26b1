"""How training scales over devices: on paper (docs/scaling.md) and on those that are there.

python -m experiments.scaling page --out docs/scaling.md     # the page, made again
python -m experiments.bench scale --shapes gpt2_124m         # every device of this machine

The page is the closed forms of `mhcjax.costs` and `mhcjax.plan` over shapes and counts of GPUs; no
device is needed. The benchmark runs each row in a process of its own that sees only its devices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mhcjax import costs, gpt, plan, runlog, train
from mhcjax.config import Config, override

# --------------------------------------------------------------------------------------------------
# On paper

DEVICE = "NVIDIA H200"
GPUS = (1, 8, 64, 512, 4096)
DYNAMIC = "deepseek_v4"  # N=4, its mix of every token's own streams
# Shape: tokens of one update, as models of that size are trained with.
TOKENS = {"gpt2_124m": 1 << 19, "gpt_1b3": 1 << 20, "gpt_7b": 1 << 22, "gpt_27b": 1 << 22}
RESULTS = Path(__file__).parent / "results"
RECORDED = ("model_h200.json", "model_kernels_h200.json")  # steps of one GPU
LONG = ("gpt_7b", 1 << 17, 64, (1, 2, 4, 8))  # a long context: length, GPUs, pieces of a row
SCALED = "scale_h200x2.json"  # of several
SPARE = 0.9  # of the memory that a plan may fill: NCCL, fragments and the estimate's own error


class Choice(NamedTuple):
    """The fastest plan that fits, for one shape on so many GPUs."""

    config: Config
    memory: costs.Memory
    seconds: plan.Seconds

    @property
    def tokens_per_second(self) -> float:
        data = self.config.data
        return data.batch * data.micro_batches * data.length / self.seconds.total

    @property
    def mfu(self) -> float:
        flops = train.flops_per_token(self.config.model, self.config.data.length)
        gpus = costs.mesh_of(self.config).size
        return self.tokens_per_second * flops / gpus / train.DEVICES[DEVICE].peak_flops


def candidates(config: Config, gpus: int, tokens: int) -> Iterator[Config]:
    """Every mesh, placement and micro-batch. A GPU of `data` has at least one row: where GPUs
    outnumber rows, or the config says so, `sequence` splits them."""
    whole = tokens // config.data.length
    for model in (1, 2, 4, 8):
        sequence = max(config.mesh.sequence, gpus // model // whole)
        data = gpus // model // sequence
        if data * sequence * model != gpus or config.model.heads % model or data > whole:
            continue
        rows = whole // data
        shardable = data > 1 and config.model.width % data == 0
        for micro in (1 << k for k in range(rows.bit_length())):
            for shard in (False, True) if shardable else (False,):
                for again in ({}, {"model.remat": True}, {"model.remat_streams": True}):
                    yield override(
                        config,
                        {
                            "mesh.data": data,
                            "mesh.sequence": sequence,
                            "mesh.model": model,
                            "mesh.shard_params": shard,
                            **again,
                            "data.batch": data * rows // micro,
                            "data.micro_batches": micro,
                        },
                    )


def best(config: Config, gpus: int, tokens: int) -> Choice | None:
    """The fastest candidate that fits; None where none does."""
    room = SPARE * train.DEVICES[DEVICE].memory
    found = [
        Choice(c, held, plan.seconds(c, DEVICE))
        for c in candidates(config, gpus, tokens)
        if (held := costs.memory(c)).peak <= room
    ]
    return max(found, key=lambda c: c.tokens_per_second, default=None)


def limit(choice: Choice) -> str:
    """What takes most of a step besides its products."""
    took = choice.seconds
    named = {
        "sums over model": took.model,
        "keys and values over sequence": took.sequence,
        "gradients over data": took.data,
        "passes over the streams": took.streams,
        "other passes": took.passes,
        "recomputing": took.matmul / 4 if choice.config.model.remat else 0.0,
        "gaps between kernels": took.gaps,
        "attention": took.attention,
    }
    return max(named, key=lambda name: named[name])


def _mesh(config: Config) -> str:
    mesh = config.mesh
    words = [f"{mesh.data} x {mesh.sequence} x {mesh.model}"]
    words += ["sharded"] if config.mesh.shard_params else []
    words += ["remat"] if config.model.remat else []
    words += ["streams again"] if config.model.remat_streams else []
    return ", ".join(words)


def _row(name: str, gpus: int, mixed: Choice | None, plain: Choice | None) -> str:
    if mixed is None:
        return f"| {name} | {gpus:,} | none fits | | | | | | the memory |"
    data = mixed.config.data
    cost = f"{1 - mixed.tokens_per_second / plain.tokens_per_second:.0%}" if plain else "-"
    room = f"{plain.memory.peak / 1e9:.0f}" if plain else "-"
    return (
        f"| {name} | {gpus:,} | {_mesh(mixed.config)}, {data.micro_batches} micro "
        f"| {mixed.memory.peak / 1e9:.0f} ({room}) | {mixed.seconds.communication:.0%} "
        f"| {mixed.tokens_per_second:,.0f} | {mixed.mfu:.0%} | {cost} | {limit(mixed)} |"
    )


HEADER = (
    "| shape | GPUs | mesh: data x sequence x model | GB a GPU (residual) | exchanging "
    "| tokens/s | MFU | slower than residual | first to stop it |"
)


def page() -> str:
    """docs/scaling.md."""
    from experiments.bench import config_of

    rows, sizes = [], []
    for shape, tokens in TOKENS.items():
        mixed, plain = (config_of(shape, name, {}) for name in (DYNAMIC, "residual"))
        m = mixed.model
        total = gpt.count(gpt.abstract_params(m))
        sizes.append(
            f"- `{shape}`: {total / 1e9:.3g} billion parameters, {m.layers} blocks, width "
            f"{m.width}, {m.heads} heads, sequences of {mixed.data.length:,}, "
            f"{tokens:,} tokens an update"
        )
        rows += [
            _row(shape, gpus, best(mixed, gpus, tokens), best(plain, gpus, tokens)) for gpus in GPUS
        ]
    kind = train.DEVICES[DEVICE]
    return PAGE.format(
        device=DEVICE,
        sizes="\n".join(sizes),
        header=HEADER,
        rule="|" + "---|" * HEADER.count(" | ") + "---|",
        rows="\n".join(rows),
        long_shape=LONG[0],
        long_length=LONG[1],
        long_rows="\n".join(_long()),
        measured=_measured(),
        measured_of_several=_measured_of_several(),
        scaled=f"`experiments/results/{SCALED}`",
        recorded=" and ".join(f"`experiments/results/{name}`" for name in RECORDED),
        connection=DYNAMIC,
        spare=SPARE,
        peak=kind.peak_flops / 1e12,
        memory=kind.memory / 1e9,
        bandwidth=(kind.bandwidth or 0) / 1e12,
        link=(kind.link or 0) / 1e9,
        network=(kind.network or 0) / 1e9,
        host=kind.host,
        matmul=plan.MATMUL,
        attention=plan.ATTENTION,
        passes=plan.BANDWIDTH,
        kernels=plan.KERNELS,
        coefficients=1e12 * sum(plan.COEFFICIENTS),
        projection=plan.PROJECTION,
        inputs=costs.NORM_INPUTS,
        reached=plan.LINK,
    )


def _long() -> Iterator[str]:
    """The fastest plan of a long context for each way to split its rows."""
    from experiments.bench import config_of

    shape, length, gpus, splits = LONG
    sizes = {"model.context": length, "data.length": length}
    for sequence in splits:
        changes = {**sizes, "mesh.sequence": sequence}
        mixed, plain = (
            best(config_of(shape, name, changes), gpus, TOKENS[shape])
            for name in (DYNAMIC, "residual")
        )
        yield _row(f"{shape}, rows in {sequence}", gpus, mixed, plain)


def recorded() -> Iterator[tuple[dict[str, Any], Config]]:
    """The steps of one GPU that are on record, each with the config that was run."""
    from experiments.bench import changes_of, config_of

    for row in (r for name in RECORDED for r in json.loads((RESULTS / name).read_text())):
        variant = filter(None, (row.get("variant") or "").split(","))
        changes = {"mesh.data": 1, "optim.name": row["optimizer"], **changes_of([*variant])}
        yield row, config_of(row["shape"], row["connection"], changes)


def scaled() -> Iterator[tuple[dict[str, Any], Config]]:
    """The timed rows of several GPUs that are on record, with those of one beside them."""
    for row in json.loads((RESULTS / SCALED).read_text()):
        if "tokens_per_second" in row:
            yield row, config_for(Request(*(row[name] for name in Request._fields)), {})


def _measured() -> str:
    """What one GPU showed, beside what the plan says of it."""
    lines = [
        "| shape | connection | variant | optimizer | settled s | step ms | predicted | off "
        "| peak GB | beside the state | predicted | off |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, config in recorded():
        took, held = 1e3 * plan.seconds(config, DEVICE).total, costs.memory(config)
        state = (held.parameters + held.optimizer) / 1e9
        beside, stated = row["peak_gb"] - state, held.peak / 1e9 - state
        lines.append(
            f"| {row['shape']} | {row['connection']} | {row.get('variant') or ''} "
            f"| {row['optimizer']} | {row.get('settle_s') or 0:g} | {row['step_ms']:.1f} "
            f"| {took:.1f} | {took / row['step_ms'] - 1:+.1%} | {row['peak_gb']:.1f} "
            f"| {beside:.1f} | {stated:.1f} | {stated / beside - 1:+.1%} |"
        )
    return "\n".join(lines)


def _measured_of_several() -> str:
    """What several GPUs showed. "of n times one": tokens/s over n times those of one GPU with the
    same kind, shape and connection."""
    lines = [
        "| kind | GPUs | shape | connection | tokens/s | of n times one | predicted | step ms "
        "| predicted | MFU | predicted |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = list(scaled())
    for row, config in rows:
        one, alone = next((r, c) for r, c in rows if _alone(r) == _alone(row) and r["devices"] == 1)
        n, took = row["devices"], plan.seconds(config, DEVICE).total
        ratio = row["tokens_per_second"] / one["tokens_per_second"] / n
        batches = config.data.batch / alone.data.batch
        stated = batches * plan.seconds(alone, DEVICE).total / took / n
        mfu = f"{row['mfu']:.1%} | {row['mfu'] * row['step_ms'] / 1e3 / took:.1%}"
        ratios = f"{ratio:.3f} | {stated:.3f}" if n > 1 else "|"
        lines.append(
            f"| {row['kind']} | {n} | {row['shape']} | {row['connection']} "
            f"| {row['tokens_per_second']:,.0f} | {ratios} | {row['step_ms']:.1f} "
            f"| {1e3 * took:.1f} | {mfu} |"
        )
    return "\n".join(lines)


PAGE = """\
# Scaling on paper

What a training run needs on 1 to 4,096 GPUs, from the closed forms of `mhcjax.costs` and
`mhcjax.plan`, before a machine is asked for. Made by `python -m experiments.scaling page --out
docs/scaling.md`; a test holds this page equal to what the command says. The same for any config
and mesh:

```sh
mhcjax info --preset gpt2_124m --mesh data=64,model=2 --device h200
```

## The table

Connection `{connection}` (N=4, dynamic), AdamW, bfloat16 activations, float32 parameters,
{device}. Of all meshes, placements and micro-batches, the fastest that fits. In brackets and in
the last column but one: the plain residual, with its own fastest mesh.

{sizes}

{header}
{rule}
{rows}

"sharded": parameters and optimizer over `data`. "remat": each block is made again in the
backward pass; "streams again": `model.remat_streams`. "exchanging": the share of the step that is
communication.

## What stops it

- **One sum of the gradients an update.** Its time depends on the parameters alone: 2 (n - 1) / n
  of their bytes, whatever the batch. More GPUs leave fewer tokens to hide it behind; nothing
  else ends the scaling of a model that fits. It is not overlapped with the backward pass here.
- **The batch.** A GPU of `data` has at least one row. More GPUs than rows split each row over
  `sequence`: the batch stays what it is, and every attention waits for keys and values.
- **Sharded parameters are gathered whole**, once an update, and the gradients are whole before
  they are scattered: 6 bytes a parameter (12 with several micro-batches) on every GPU, divided
  by `model` only. It costs two exchanges an update and none a layer; it is also why a large
  model needs `model` before memory is full of its own state.
- **`model` within a host.** Four sums of [batch, length, width] a block and micro-batch, each
  waited for; beyond one host the network would carry them.

## Long contexts

Over `sequence` each GPU has a contiguous piece of every row. Streams, mixing, MLP, norms, head and
loss know one position at a time and stay there. Attention gathers the keys and values of the whole
row, [batch, length, heads, size] of each, and scatters their gradients; where blocks are made again
they are gathered again. `{long_shape}` at {long_length:,} tokens a row:

{header}
{rule}
{long_rows}

- What a GPU keeps of its positions falls with their number; the gathered keys and values do not.
  They are kept from forward to backward: fewer KV heads make them smaller, remat drops them.
- The causal work is uneven: the last piece sees the whole row, the first only itself. A piece
  masks by position and skips nothing, so that attention takes twice that of whole rows, for any
  number of pieces. On a GPU the mask is a bias of [length / sequence, length] numbers,
  beside its gradient: not measured.

## Where mHC changes the answer

- **Memory.** Each sublayer saves its N streams and its output: (N + 1) D numbers a token where
  the residual saves none. Recomputing blocks saves N D a block in place of D. Recomputing
  streams alone saves N D a group of blocks and all that is no stream: only writes are made
  again.
- **Time.** A static mix passes over 9 N + 5 arrays of the width a sublayer and token, forward
  and backward, the kernels of a dynamic one over 10 N + 6, the residual over 6. These passes are
  bound by the memory's bandwidth, and every part of `model` makes all of them: streams are whole
  there. So mHC is dearest on meshes with a large `model`, and cheapest where communication takes
  the time anyway.
- **Communication: nothing.** Streams are mixed where their token lies. A sublayer exchanges
  [batch, length, width] for any N; gradients of the mixing parameters are the only bytes that
  are added.
- **Pipelines** would send N D numbers a token between stages, N times those of the residual.
  There are none here.

## Assumptions

- {device}: {peak:.0f} TFLOP/s dense bfloat16, {memory:.0f} GB, {bandwidth:.1f} TB/s; {link:.0f}
  GB/s a GPU and direction within a host of {host}, {network:.0f} GB/s a GPU between hosts (data
  sheets; the network of the DGX system). Of both, NCCL reaches {reached:.0%}: 370 of 450 GB/s on
  NVLink (a maintainer in NVIDIA/nccl-tests, issue 212). Rings; no in-network sums.
- Products run at {matmul:.0%} of the peak, attention at {attention:.0%} (heads of 128), kernels
  that only pass over arrays at {passes:.0%} of the bandwidth: fitted to one step of the 124M
  shape. The kernels of a dynamic mix (docs/kernels.md) reach {kernels:.0%} of it, and its
  coefficients take {coefficients:.0f} ps a token and logit: fitted to their times in one step of
  that shape with `{connection}`.
  Without kernels its projection, in float32, runs at {projection:.0%} of the bfloat16 peak: not
  measured.
- A dynamic mix keeps its streams in bfloat16 and its coefficients, as the kernels do. Plain
  array operations may keep a float32 copy of the streams besides.
- What lives at once: at the head all that is saved, two arrays of a chunk's logits, the head's
  gradient and the weights that wait for a block's backward pass, narrowed or, where the block is
  made again, as they are stored; at the first block all gradients. XLA keeps the input of
  {inputs} of a block's two norms besides: fitted to steps compiled for that device.
- At most {spare:.0%} of the memory is planned for. Nothing overlaps: exchanges are added to the
  rest.
- No failures, no checkpoints, no slow neighbour: at thousands of GPUs each takes its share.

## Predicted beside measured

One {device}, {recorded};
"beside the state", in GB: the peak without parameters and optimizer; "settled s": seconds of steps
before the timed ones. The rows are of several machines, which differ by a few per cent.

{measured}

Several on one host, {scaled}; "weak": the shape's batch on every GPU,
"sharded": weak, with parameters and optimizer split over `data`. "of n times one": tokens/s over n
times those of one GPU.

{measured_of_several}
"""


# --------------------------------------------------------------------------------------------------
# On the devices that are there


class Request(NamedTuple):
    """One row, made in a process of its own (or one for each device).

    `kind`: "same", the losses of 20 steps in float32; "resume", a small run saved on these devices
    and gone on with on them, on one of them and on a CPU; "weak", the shape's batch on every
    device; "strong", its batch divided; "sharded", weak with the state split over `data`.
    """

    kind: str
    shape: str
    connection: str
    devices: int
    processes: int = 1


KINDS = ("same", "resume", "weak", "strong", "sharded")
HOST_DEVICES = "--xla_force_host_platform_device_count"
STEPS_ALIKE = 20
ALIKE = 1e-4  # of a loss near ln V: sums in another order, in float32
# Rows of the comparison on one device: float32 attention keeps every probability.
ROWS_ALIKE = 16


def config_for(request: Request, changes: dict[str, Any]) -> Config:
    """The config of one row."""
    from experiments.bench import config_of

    config = config_of(request.shape, request.connection, changes)
    batch = config.data.batch * (request.devices if request.kind in ("weak", "sharded") else 1)
    others = config.mesh.sequence * config.mesh.model
    own: dict[str, Any] = {"mesh.data": request.devices // others, "data.batch": batch}
    if request.kind == "same":
        own |= {"model.dtype": "float32", "data.batch": min(batch, ROWS_ALIKE)}
    if request.kind == "sharded":
        own["mesh.shard_params"] = True
    return override(config, own)


def requests_of(args: argparse.Namespace, counts: list[int]) -> list[Request]:
    """The rows of a call, in the order in which they are wanted most."""
    found = []
    shape = args.shapes[0]
    if "same" in args.kinds:
        found += [Request("same", shape, "mhc_n2", n) for n in counts]
        found += [Request("same", shape, "mhc_n2", n, n) for n in counts if n > 1]
    if "resume" in args.kinds:
        found.append(Request("resume", "cpu_tiny", "mhc_n2", max(counts)))
    for kind in ("weak", "sharded", "strong"):
        if kind in args.kinds:
            shapes = [args.sharded_shape] if kind == "sharded" else args.shapes
            names = args.connections[-1:] if kind == "sharded" else args.connections
            found += [Request(kind, s, c, n) for s in shapes for c in names for n in counts]
    return found


def losses(config: Config, steps: int) -> list[float]:
    """The training losses of some steps on drawn tokens; any number of processes."""
    import jax

    from experiments.bench import zipf_tokens
    from mhcjax import data, optim

    with jax.default_matmul_precision("highest"):
        program = train.program(config)
        hyper = optim.hyper(config.optim, config.total_steps)
        state, found = program.init(jax.random.key(config.seed)), []
        step_once, tokens = program.compile(hyper), zipf_tokens(config.model.vocab)
        shape = {name: getattr(config.data, name) for name in ("batch", "length", "micro_batches")}
        for step in range(steps):
            rows = data.batch(tokens, seed=0, step=step, **shape)
            # Each process places its own part of the same rows.
            placed = jax.make_array_from_callback(
                rows.shape, program.batch_sharding, rows.__getitem__
            )
            state, metrics = step_once(state, placed, hyper)
            found.append(float(metrics["loss"]))
    return found


def measured(request: Request, changes: dict[str, Any], *, windows: int, steps: int) -> dict:
    """The figures of one row, in this process."""
    import jax

    from experiments import bench

    config = config_for(request, changes)
    if request.kind == "same":
        return {"losses": losses(config, STEPS_ALIKE), "device": jax.devices()[0].device_kind}
    state = train.program(config).init(jax.random.key(config.seed))
    first = jax.local_devices()[0]
    held = sum(
        s.data.nbytes
        for leaf in jax.tree.leaves(state)
        for s in leaf.addressable_shards
        if s.device == first
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    del state
    found = bench.measure(config, windows=windows, steps=steps, trace=None)
    kind = first.device_kind
    device = train.device_of(kind) if kind in train.DEVICES else None
    predicted = plan.seconds(config, kind).total if device and device.bandwidth else None
    stated = costs.memory(config)
    flops = train.flops_per_token(config.model, config.data.length)
    rate = found["tokens_per_second"]
    return {
        **{name: found[name] for name in ("tokens_per_second", "step_ms", "spread", "peak_gb")},
        "device": kind,
        "mfu": rate * flops / (device.peak_flops * request.devices) if device else None,
        "predicted_ms": 1e3 * predicted if predicted else None,
        "predicted_gb": stated.peak / 1e9,
        "state_bytes": held,
        "stated_state_bytes": stated.parameters + stated.optimizer,
        "share_of_state": held / whole,
        "config": found["config"],
        "versions": found["versions"],
    }


def row(text: str, answer: Path) -> None:
    """The child: one row, or one process's part of it; process 0 writes."""
    import jax

    asked = json.loads(text)
    if asked["process"] is not None:
        jax.distributed.initialize(
            f"localhost:{asked['port']}", asked["request"]["processes"], asked["process"]
        )
    found = measured(
        Request(**asked["request"]),
        asked["changes"],
        windows=asked["windows"],
        steps=asked["steps"],
    )
    if not asked["process"]:
        runlog.write_atomic(answer, json.dumps(found))


def _environment(first: int, count: int, platform: str) -> dict[str, str]:
    """That of a process which is to see those devices alone."""
    if platform == "cpu":
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if HOST_DEVICES not in f]
        flags.append(f"{HOST_DEVICES}={count}")
        return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range(first + count)]
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + count])}


RESUMED = {"data.corpus": "synthetic", "data.tokenizer": "byte", "data.length": 48, "seed": 3}
RESUMED |= {"model.vocab": 257, "model.layers": 2, "model.width": 64, "sample_every": 0}
RESUMED |= {"log_every": 1}
SAVED, MORE = 4, 4  # updates before and after


def resume(request: Request, platform: str) -> dict[str, Any]:
    """Through the command line: the last losses of a run that goes on as it was saved, on as many
    devices, on one, and on a CPU."""
    n = request.devices
    flags = [w for name, v in RESUMED.items() for w in ("--" + name.replace("_", "-"), str(v))]
    places = {
        f"{n} devices": (_environment(0, n, platform), n),
        "1 device": (_environment(0, 1, platform), 1),
        "a CPU": (_environment(0, 1, "cpu"), 1),
    }
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:

        def train_on(place: str, name: str, total: int) -> None:
            environment, data = places[place]
            environment = environment | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
            own = ["--total-steps", str(total), "--schedule-steps", str(SAVED + MORE)]
            command = [sys.executable, "-m", "mhcjax", "train", "--run", f"{folder}/{name}"]
            subprocess.run(
                [*command, *flags, *own, "--mesh.data", str(data), "--data.batch", "16"],
                env=environment,
                stdout=sys.stderr,
                check=True,
            )

        try:
            train_on(f"{n} devices", "saved", SAVED)
            for place in places:
                name = place.replace(" ", "-")
                shutil.copytree(f"{folder}/saved", f"{folder}/{name}")
                train_on(place, name, SAVED + MORE)
                lines = Path(folder, name, "metrics.jsonl").read_text().splitlines()
                steps = {m["step"]: m["loss"] for m in map(json.loads, lines) if "loss" in m}
                found[place] = steps[SAVED + MORE]
        except subprocess.CalledProcessError as error:
            return {"error": f"training ended with {error.returncode} after {list(found)}"}
    return {"last_losses": found}


def run(request: Request, args: argparse.Namespace, platform: str) -> dict[str, Any]:
    """One row: its processes, and what they found or how they ended."""
    if request.kind == "resume":
        return resume(request, platform)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer, each = Path(folder) / "row.json", request.devices // request.processes
        running = []
        for process in range(request.processes):
            asked = {
                "request": request._asdict(),
                "changes": args.changes,
                "windows": args.windows,
                "steps": args.steps,
                "process": process if request.processes > 1 else None,
                "port": port,
            }
            command = [sys.executable, "-m", "experiments.scaling", "row"]
            running.append(
                subprocess.Popen(
                    [*command, json.dumps(asked), str(answer)],
                    stdout=sys.stderr,
                    env=_environment(process * each, each, platform),
                )
            )
        ends = [process.wait() for process in running]
        if any(ends) or not answer.exists():
            return {"error": f"the row's processes ended with {ends}"}
        return json.loads(answer.read_text())


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows show against what is asked of them, one line each; "FAIL" begins a miss."""
    good = [r for r in rows if "error" not in r]
    lines = [f"FAIL {_name(r)}: {r['error']}" for r in rows if "error" in r]
    for r in good:
        if r["kind"] == "resume":
            last = r["last_losses"].values()
            gap = max(last) - min(last)
            text = f"last losses differ by {gap:.1e}, {ALIKE:g} allowed"
            lines.append(_verdict(gap <= ALIKE, r, text))
            continue
        one = next((o for o in good if _alone(o) == _alone(r) and o["devices"] == 1), None)
        if one is None or r is one:
            continue
        if r["kind"] == "same":
            gap = max(abs(a - b) for a, b in zip(r["losses"], one["losses"], strict=True))
            lines.append(
                _verdict(gap <= ALIKE, r, f"losses differ by {gap:.1e}, {ALIKE:g} allowed")
            )
            continue
        ratio = r["tokens_per_second"] / one["tokens_per_second"] / r["devices"]
        # Only weak scaling on real devices is judged: 0.95 at 2, 0.92 at 8, a line between them.
        judged = r["kind"] == "weak" and r["device"] != "cpu"
        least = 0.95 - 0.03 * (r["devices"] - 2) / 6 if judged else 0.0
        wanted = f", {least:.2f} wanted" if least else ""
        lines.append(_verdict(ratio >= least, r, f"{ratio:.3f} of n times one{wanted}"))
    for r in good:
        if r["kind"] == "sharded":
            off = r["share_of_state"] * r["devices"] - 1
            lines.append(_verdict(abs(off) <= 0.05, r, f"state {off:+.1%} off 1/n of the whole"))
            if r["mfu"]:
                lines.append(_verdict(r["mfu"] >= 0.4, r, f"MFU {r['mfu']:.1%}, 40 % wanted"))
        if r.get("predicted_ms"):
            off = r["predicted_ms"] / r["step_ms"] - 1
            lines.append(_verdict(abs(off) <= 0.15, r, f"predicted step {off:+.1%} off"))
        if "state_bytes" in r:
            exact = r["state_bytes"] == r["stated_state_bytes"]
            lines.append(_verdict(exact, r, f"{r['state_bytes']:,} bytes of state as stated"))
    return lines


def _alone(r: dict[str, Any]) -> tuple:
    return r["kind"], r["shape"], r["connection"]


def _name(r: dict[str, Any]) -> str:
    apart = f", {r['processes']} processes" if r["processes"] > 1 else ""
    return f"{r['kind']} {r['shape']} {r['connection']} on {r['devices']}{apart}"


def _verdict(good: bool, r: dict[str, Any], text: str) -> str:
    return f"{'pass' if good else 'FAIL'} {_name(r)}: {text}"


def _shown(r: dict[str, Any]) -> str:
    if "tokens_per_second" not in r:
        if "losses" in r:
            return f"{_name(r)}: last loss {r['losses'][-1]:.6f}"
        return f"{_name(r)}: {r.get('error') or r['last_losses']}"
    predicted = f", predicted {r['predicted_ms']:.1f}" if r["predicted_ms"] else ""
    mfu = f", MFU {r['mfu']:.1%}" if r["mfu"] else ""
    return (
        f"{_name(r)}: {r['tokens_per_second']:,.0f} tokens/s, step {r['step_ms']:.1f} ms{predicted}"
        f"{mfu}, state {r['state_bytes'] / 1e9:.3f} GB a device"
    )


def scale(args: argparse.Namespace) -> int:
    """Rows until the time is up; those that `--out` holds are kept, so that another call goes on.

    -> 0 when every row is there and passes.
    """
    from experiments.bench import changes_of

    args.changes = changes_of(args.set)
    platform, there = _there(args.host_devices)
    counts = args.devices or [n for n in (1 << k for k in range(there.bit_length())) if n <= there]
    if max(counts) > there:
        raise ValueError(f"--devices {max(counts)}: {there} are here; give at most that")
    wanted = requests_of(args, counts)
    for request in wanted:  # a wrong name or size is said before the first row runs
        if request.kind == "resume":
            continue
        config = config_for(request, args.changes)
        train.check_mesh(config, costs.mesh_of(config))
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {tuple(r[name] for name in Request._fields): r for r in rows if "error" not in r}
    rows, began, longest, left = list(done.values()), time.monotonic(), 0.0, 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for request in wanted:
        if tuple(request) in done:
            continue
        spent = time.monotonic() - began
        if spent + longest > 60 * args.minutes:
            left += 1
            continue
        rows.append(request._asdict() | run(request, args, platform))
        longest = max(longest, time.monotonic() - began - spent)
        runlog.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
        print(_shown(rows[-1]), flush=True)
    verdicts = judge(rows)
    print("\n".join(["", *verdicts]))
    if left:
        print(f"{left} rows are left after {args.minutes:g} minutes: call again, they go on")
    print(f"written: {args.out}")
    return 1 if left or any(line.startswith("FAIL") for line in verdicts) else 0


def places(count: int) -> list[dict[str, str]]:
    """The environments of so many processes, each with one device of this machine to itself."""
    platform, there = _there(max(1, count))
    if not 1 <= count <= there:
        raise ValueError(f"--jobs {count}: {there} devices are here; give 1 to {there}")
    return [_environment(index, 1, platform) for index in range(count)]


def _there(host_devices: int) -> tuple[str, int]:
    """Platform and count, asked of another process: this one is not to hold the devices."""
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    platform, count = out.stdout.split()
    return platform, host_devices if platform == "cpu" else int(count)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m experiments.bench scale`."""
    add = parser.add_argument
    add("--shapes", nargs="+", default=["cpu_tiny"], help="of SHAPES; the first is compared too")
    add("--sharded-shape", default="gpt_1b3", help="of kind sharded [gpt_1b3]")
    add("--connections", nargs="+", default=["residual", "mhc_n2", DYNAMIC])
    add("--kinds", nargs="+", default=["same", "resume", "weak", "strong"], choices=KINDS)
    add("--devices", nargs="+", type=int, help="counts [1, 2, 4, ... all that are there]")
    add("--host-devices", type=int, default=8, help="on a CPU: how many to force [8]")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config overrides")
    add("--windows", type=int, default=3, help="timed windows [3]")
    add("--steps", type=int, default=10, help="steps in a window [10]")
    add("--minutes", type=float, default=8, help="no row begins that would end later [8]")
    add(
        "--out", type=Path, default=Path("runs/scale.json"), help="JSON of all rows; kept rows stay"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("page", help="docs/scaling.md")
    p.add_argument("--out", type=Path, help="write it there [print it]")
    one = verbs.add_parser("row", help="one row, for the process that `scale` starts")
    one.add_argument("request")
    one.add_argument("answer", type=Path)
    args = parser.parse_args()
    if args.verb == "row":
        row(args.request, args.answer)
    elif args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            if args.out.is_dir():
                raise IsADirectoryError(0, "Is a directory")
            runlog.write_atomic(args.out, page())
        except OSError as error:
            told = f"--out {args.out} cannot be written ({error.strerror}): name another file"
            print(f"experiments.scaling: {told}", file=sys.stderr)
            return 2
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
