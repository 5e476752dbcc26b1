"""The plan of a run on paper: the step time of any mesh, and the rows that `mhcjax info` prints.

Estimates from the closed forms of `mhcjax.costs` and the makers' figures of `train.DEVICES`; their
constants stand below, with what they were fitted to.

Axis key: D width, N stream, T position, F hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import jax

from mhcjax import optim, sharding, train
from mhcjax.config import Config, override
from mhcjax.costs import (
    Collective,
    Sizes,
    collectives,
    gathered_shape,
    local_bytes,
    memory,
    mesh_of,
    parse_mesh,
)

__all__ = ["Seconds", "info", "seconds"]

# Fitted to one H200, the 124M shape at 64 x 1024 tokens in bfloat16 (model_h200_history.json):
# 64.8 ms of matmuls, 13.8 ms of attention, 28.2 ms of all else, 1.2 ms without a kernel.
MATMUL = 0.75  # of the bf16 peak
ATTENTION = 0.32  # of the bf16 peak, at heads of 128; in proportion below
BANDWIDTH = 0.68  # of the memory's, in kernels that only pass over arrays
GAP = 1e-4  # seconds without a kernel, for each block
# Fitted to the kernels of the same step with deepseek_v4 (model_kernels_h200.json, its 24 sublayers
# without the learned head's 0.6 ms): 46 arrays of the width a token and sublayer in 27.3 ms; 24
# logits of 65,536 tokens in 11 us a sublayer, their cotangents in 43 us.
KERNELS = 0.85  # of the memory's bandwidth, in the kernels of a dynamic mix
COEFFICIENTS = (7e-12, 2.7e-11)  # seconds a token and logit, forward and backward
# Without kernels the projection of a dynamic mix is made in float32 whatever the activations are.
PROJECTION = 0.12  # of the bf16 peak; not measured
# NCCL reaches 370 of NVLink's 450 GB/s: 20 % of the protocol (NVIDIA/nccl-tests, issue 212).
LINK = 0.82
LATENCY = 2e-5  # seconds of one collective within a host; each doubling of hosts adds as much

# Passes over float32 arrays of the parameters' size in one update, the gradient norm's with them.
UPDATE_PASSES = {"adamw": 8, "muon": 6, "lion": 6, "sgd": 4}
NEWTON_SCHULZ = 5  # iterations


# --------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Seconds:
    """Predicted seconds of one update on each device, by what takes them.

    `streams`: reading and writing the N streams, and a dynamic mix's coefficients; `passes`: other
    kernels that read and write arrays and compute little; `update`: the optimizer; `model`,
    `sequence` and `data`: exchanges along those axes, along both of the latter under `data`. They
    are added: nothing is taken to overlap.
    """

    matmul: float
    attention: float
    streams: float
    passes: float
    update: float
    gaps: float
    model: float
    sequence: float
    data: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def communication(self) -> float:
        """The share of the exchanges."""
        return (self.model + self.sequence + self.data) / self.total


def seconds(config: Config, device: str) -> Seconds:
    """The predicted step on devices of that kind, with the constants above.

    Exchanges go round a ring: 2 (n - 1) / n of the bytes for a sum, half for a gather or a scatter,
    at the link's speed within a host, at the network's share of the group's devices beyond.

    >>> config = override(Config(), {"model.dtype": "bfloat16"})
    >>> 0 < seconds(config, "h200").matmul < seconds(config, "h200").total < 0.1
    True

    Raises ValueError for a device whose speeds are not in `train.DEVICES`.
    """
    kind = train.device_of(device)
    if kind is None or kind.bandwidth is None or kind.link is None or kind.network is None:
        known = [name for name, d in train.DEVICES.items() if d.bandwidth is not None]
        raise ValueError(f"no speeds are known for device {device!r}: name one of {known}")
    z = Sizes(config)
    m = config.model
    tokens, blocks = z.tokens * z.micro, m.layers * z.micro
    # 2 FLOPs of a product: forward, twice backward.
    products = tokens * (6 * (z.matrices + m.width * z.vocab) + 2 * _matrices_again(z))
    # Causal: half of T; backward has five products to the forward's two, made again where
    # they are not fused and so not kept.
    again = z.recomputed == "blocks" or (z.recomputed and z.bytes != 2)
    scores = (9 if again else 7) * tokens * m.layers * _attended(z) * z.queries
    newton = _newton_schulz(z) if config.optim.name == "muon" else 0
    attention = ATTENTION * min(1.0, m.width / m.heads / 128)
    speed = BANDWIDTH * kind.bandwidth
    exchanged = {
        axis: sum(_exchange(c, z, kind) for c in collectives(config) if _axes(c)[0] == axis)
        for axis in sharding.AXES
    }
    return Seconds(
        matmul=products / (MATMUL * kind.peak_flops),
        attention=scores / (attention * kind.peak_flops),
        streams=z.micro * _on_streams(z, kind),
        passes=(z.micro * _passed_bytes(z)) / speed,
        update=UPDATE_PASSES[config.optim.name] * local_bytes(z.state.params) / speed
        + newton / (MATMUL * kind.peak_flops),
        gaps=GAP * blocks,
        **exchanged,
    )


def _attended(z: Sizes) -> int:
    """Twice the mean number of keys that a query is multiplied with: in a piece of a row all of
    them, since a kernel skips nothing of a mask."""
    return 2 * z.length if z.sequence > 1 else z.length


def _passed_bytes(z: Sizes) -> int:
    """Of one micro-batch, by the kernels that are no products and touch no streams."""
    m, D = z.config.model, z.config.model.width
    # Forward and backward: norms 5 D each, the sums of what queries, keys, values (and a gate)
    # send back, rotations of queries and keys, the activation function.
    gated = m.mlp == "swiglu"
    numbers = 10 * D + 4 * D + 5 * (z.queries + z.keys)
    numbers += 3 * D + 8 * z.hidden if gated else 5 * z.hidden
    if z.recomputed == "blocks":
        numbers += 4 * D + 2 * (z.queries + z.keys) + (3 if gated else 2) * z.hidden
    block = numbers * z.bytes
    logits = 3 * z.vocab * z.bytes  # read for the sum; read and written for the cotangent
    ends = (4 + 8) * D  # the embedding's rows in float32, scattered in float32
    whole = sum(math.prod(gathered_shape(z, leaf)) for leaf in jax.tree.leaves(z.state.params))
    weights = 6 * z.matrices + (12 * whole if z.micro > 1 else 0)  # narrowed; added to the sum
    return z.tokens * (m.layers * block + logits + ends) + weights


def _matrices_again(z: Sizes) -> int:
    """Products of one token that the backward pass makes again: of all matrices, but for the MLP's
    last where no coefficient wants its output; none where their outputs are kept."""
    if z.recomputed != "blocks":
        return 0
    m = z.config.model
    return z.matrices - (m.layers * z.hidden * m.width if z.fixed else 0)


def _on_streams(z: Sizes, kind: train.Device) -> float:
    """Seconds of one micro-batch: the streams' passes, counted in arrays of the width."""
    N, spec, sublayers = z.spec.streams, z.spec, 2 * z.config.model.layers
    project, read, write = (N if z.fused else 0), N + 1, 2 * N + 1
    backward = 6 * N + 3
    if z.fixed:
        read, write, backward = 1, 2, 3  # one addition, its sum read by the norm
    elif z.fused and spec.carried:
        read, write, backward = 0, 2 * N + 2, 5 * N + 4  # the next read is part of the write
    elif z.fused:
        backward = 6 * N + 4  # the cotangent of pre by a pass of its own, none of the write's dx
    forward = project + read + write
    passes = sublayers * (forward + backward)
    # The last streams of a group are there, or nobody wants them; the residual's never.
    if z.recomputed == "blocks":
        passes += sublayers * forward - z.groups * write
    elif z.recomputed and not z.fixed:
        passes += (sublayers - z.groups) * write
    seconds = z.tokens * passes * z.config.model.width * z.bytes
    seconds /= (KERNELS if z.fused else BANDWIDTH) * (kind.bandwidth or 0)
    times = 1 + (z.recomputed == "blocks"), 1  # forward, backward
    if z.fused:
        of_logit = sum(n * each for n, each in zip(times, COEFFICIENTS, strict=True))
        seconds += sublayers * z.tokens * z.logits * of_logit
    elif z.logits:
        products = z.projection * (8 if z.recomputed == "blocks" else 6)
        seconds += sublayers * z.tokens * products / (PROJECTION * kind.peak_flops)
        floats = 5 * 4 * spec.streams * (spec.streams + 2)
        seconds += sublayers * z.tokens * floats / (BANDWIDTH * (kind.bandwidth or 0))
    return seconds


def _newton_schulz(z: Sizes) -> int:
    """FLOPs; each device makes all of it."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(z.state.params["blocks"]):
        dims = optim.MATRIX_AXES.get(str(path[-1].key))
        if dims is not None:
            axes = dims.reduction_axis
            inputs = math.prod(
                leaf.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,))
            )
            outputs = math.prod(leaf.shape[1:]) // inputs
            small, large = sorted((inputs, outputs))
            found += leaf.shape[0] * (4 * small**2 * large + 2 * small**3)
    return NEWTON_SCHULZ * found


def _axes(c: Collective) -> list[str]:
    return c.axis.split("+")


def _exchange(c: Collective, z: Sizes, kind: train.Device) -> float:
    n = math.prod(z.mesh.shape[axis] for axis in _axes(c))
    inner = sharding.AXES[sharding.AXES.index(_axes(c)[-1]) + 1 :]
    stride = math.prod(z.mesh.shape[axis] for axis in inner)
    near = max(1, kind.host // stride)  # devices of the group within one host
    link, network = LINK * (kind.link or 0), LINK * (kind.network or 0)
    speed = link if n <= near else min(link, near * network)
    wire = (2 if c.kind == "all-reduce" else 1) * (n - 1) / n * c.bytes
    # Those of an update are exchanged together, those within the model wait for each other.
    together = c.what in ("loss", "parameters", "gradients", "norm", "matrices")
    hops = 1 + math.log2(max(1, n / near))
    return wire / speed + (0 if together else c.count * LATENCY * hops)


# --------------------------------------------------------------------------------------------------
# As `mhcjax info` prints it


def info(config: Config, *, device: str | None = None) -> dict[str, Any]:
    """The plan as rows; with a device kind also the predicted time, and whether it fits.

    `efficiency`: of as many devices as one device's rate would ask for, the batch being the same.

    >>> rows = info(override(Config(), parse_mesh("data=4,model=2")), device="h200")
    >>> rows["devices"], rows["fits"]
    (8, True)

    Raises ValueError for a config that does not divide over its mesh.
    """
    train.check_mesh(config, mesh_of(config))
    z, held = Sizes(config), memory(config)
    exchanged: dict[str, int] = {}
    for c in collectives(config):
        name = f"{c.kind} over {c.axis}: {c.what}"
        exchanged[name] = exchanged.get(name, 0) + c.bytes
    sharded = ", parameters and optimizer sharded over data" if config.mesh.shard_params else ""
    split = f" x sequence {z.sequence}" if z.sequence > 1 else ""
    rows: dict[str, Any] = {
        "mesh": f"data {z.data}{split} x model {z.model}{sharded}",
        "devices": z.mesh.size,
        "bytes on each device": {f.name: getattr(held, f.name) for f in fields(held)},
        "bytes exchanged by each device, by collective": exchanged,
    }
    if device is not None and (kind := train.device_of(device)) is not None:
        rows["fits"] = held.peak <= kind.memory
        if kind.bandwidth is not None:
            took = seconds(config, device)
            one = seconds(override(config, parse_mesh("data=1")), device)
            tokens = config.data.batch * config.data.length * z.micro
            flops = tokens * train.flops_per_token(config.model, config.data.length)
            rows["predicted seconds of one update"] = {
                **{f.name: getattr(took, f.name) for f in fields(took)},
                "total": took.total,
            }
            rows["predicted tokens per second"] = tokens / took.total
            rows["predicted MFU"] = flops / took.total / z.mesh.size / kind.peak_flops
            rows["predicted share of communication"] = took.communication
            rows["predicted efficiency"] = one.total / took.total / z.mesh.size
    return rows
