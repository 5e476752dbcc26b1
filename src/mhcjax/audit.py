"""Audit: checks and tables over a model or a config; the command line loads and prints.

Axis key: B batch, T position, N stream, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mhcjax import connections, diagnostics, ends, gpt, optim, sample, sharding, train
from mhcjax.coefficients import Dynamic, Fixed
from mhcjax.config import Config, override
from mhcjax.diagnostics import dead_leaves
from mhcjax.manifolds import manifold_of
from mhcjax.spec import Connection

__all__ = [
    "Check",
    "compiled_bytes",
    "connection_info",
    "diagnose",
    "info",
    "inspect",
    "liveness",
    "model_name",
    "probe_rows",
]

EQUAL = 1 - 1e-6  # cosine in float32 from which streams count as equal
# Nats by which the next token must be the best predicted. A fresh init guesses, and its shifts
# differ by chance: by 0.02 on 500 tokens at width 128, where it does not copy.
SHIFT_MARGIN = 0.1
# A res gradient below this share of the largest mixing gradient is float32 rounding: equal streams
# leave about 1e-7 at N=4, where the sum over the permutations need not cancel exactly; the
# smallest live one measured was 3e-3.
ROUNDING = 1e-6


# --------------------------------------------------------------------------------------------------
# info: a config, counted


def model_name(config: Config) -> str:
    """Preset, counted parameters and connection, e.g. for a run's folder.

    >>> model_name(Config())
    'nano-1.8M-mhc_n2'
    """
    total = gpt.count(gpt.abstract_params(config.model))
    size = f"{total / 1e6:.1f}M" if total >= 1e5 else f"{total / 1e3:.1f}k"
    return f"{config.name}-{size}-{config.model.connection.preset}"


def compiled_bytes(compiled: Any) -> int:
    """What a compiled step holds at its peak by XLA's own analysis, per device, in bytes:
    arguments + outputs - aliased + temporaries.

    >>> step = jax.jit(lambda x: x + 1).lower(jnp.zeros(256)).compile()
    >>> compiled_bytes(step) >= 2048
    True
    """
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )


def info(config: Config, *, compiled: Any = None, device: str | None = None) -> dict[str, Any]:
    """A config, counted: parameters by group, state, memory of the compiled step, FLOPs, tokens.

    Sizes in bytes. `compiled` is the compiled training step (None: no memory figure); `device` a
    device kind whose stated memory and peak are put beside it.

    >>> rows = info(Config())
    >>> rows["parameters"] == sum(rows["parameters by group"].values())
    True
    """
    spec, params = gpt.connection_of(config.model), gpt.abstract_params(config.model)
    groups = optim.labels(params)
    by_group = dict.fromkeys(optim.GROUPS, 0)
    for group, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(params), strict=True):
        by_group[group] += math.prod(leaf.shape)
    state = jax.eval_shape(optim.optimizer(config.optim).init, params)
    data = config.data
    per_update = data.batch * data.length * data.micro_batches
    flops = train.flops_per_token(config.model, data.length)
    stored = params["embedding"].shape[0]
    rows: dict[str, Any] = {
        "model": model_name(config),
        "connection": str(spec),
        "mixing runs on": connections.implementation_of(
            spec, config.model.width, config.model.dtype, config.model.connection.implementation
        ),
        "parameters": gpt.count(params),
        "parameters by group": {name: n for name, n in by_group.items() if n},
        "vocabulary": config.model.vocab,
        "vocabulary as stored": stored,
        "parameter bytes": _bytes(params),
        "optimizer bytes": _bytes(state),
        "FLOPs per token": flops,
        "tokens per update": per_update,
        "updates": config.total_steps,
        "tokens planned": per_update * config.total_steps,
    }
    if compiled is not None:
        rows["step memory bytes"] = compiled_bytes(compiled)
        rows["step memory measured for"] = jax.devices()[0].device_kind
    if device is not None:
        kind = train.device_of(device)
        rows["device"] = device
        if kind is not None:
            rows["device memory bytes"] = int(kind.memory)
            rows["seconds per update at 40 % of peak"] = (
                per_update * flops / (0.4 * kind.peak_flops)
            )
            if compiled is not None:
                rows["fits"] = rows["step memory bytes"] <= kind.memory
    return rows


def _bytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def connection_info(spec: Connection, *, width: int, layers: int) -> dict[str, Any]:
    """A connection, explained: formula, parameters of a sublayer, bytes per token, init.

    Bytes are those that ideal fused kernels move for bfloat16 streams of that width and float32
    coefficients, without the projection's weights: 3 N + 2 streams forward (2 N + 2 where pre is
    carried, since write and the next read are then one pass), 6 N + 3 more backward.

    >>> connection_info(Connection(), width=8, layers=4)["parameters per sublayer"]
    5
    """
    shapes = spec.shapes(width)
    n, unit = spec.streams, 2 * width
    forward, backward = (2 * n + 2 if spec.carried else 3 * n + 2), 6 * n + 3
    per_token = isinstance(spec.coefficients, Dynamic)
    coefficients = 4 * (n * n + 2 * n) if per_token else 0
    if isinstance(spec.coefficients, Fixed):  # x and y in, x out, either way
        forward, backward = 3, 3
    return {
        "connection": repr(spec),
        "formula": _formula(spec),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "parameters per sublayer": sum(math.prod(shape) for shape in shapes.values()),
        "parameters of entry and exit": _count_ends(spec, width),
        "bytes per token and sublayer, forward": forward * unit + 2 * coefficients,
        "bytes per token and sublayer, forward and backward": (forward + backward) * unit
        + 5 * coefficients,
        "init": repr(getattr(spec.coefficients, "init", None)),
        "dead by structure": [f"{l} {leaf}" for l, leaf in sorted(dead_leaves(spec, layers))],
    }


def _count_ends(spec: Connection, width: int) -> int:
    return gpt.count(
        jax.eval_shape(lambda: ends.init_ends(spec, width=width, key=jax.random.key(0)))
    )


def _formula(spec: Connection) -> list[str]:
    """The mix of one sublayer, line by line."""
    c = spec.coefficients
    if isinstance(c, Fixed):
        lines = ["pre = post = 1, res = I"]
    else:
        logits = "parameters, the same for every token"
        if isinstance(c, Dynamic):
            inputs = "each stream's own x_n" if c.per_stream else "vec x"
            act = "tanh(norm({}) @ projection)" if c.tanh else "norm({}) @ projection"
            scale = f"scale[{', '.join(c.scales)}] * " if c.scales else ""
            logits = f"{scale}{act.format(inputs)} + bias, {c.norm!r}"
        eps = f" + {spec.pre_eps:g}" if spec.pre_eps else ""
        times = f"{spec.post_scale:g} * " if spec.post_scale != 1 else ""
        lines = [
            f"logits = {logits}",
            f"pre = {spec.pre}(logits){eps}, post = {times}{spec.post}(logits)",
            f"res = {manifold_of(spec.manifold)!r}.matrix(logits)",
        ]
    previous = " of the sublayer before" if spec.carried else ""
    write = "res @ (x + post * y)" if spec.rule == "add_first" else "res @ x + post * y"
    return [
        *lines,
        f"u = sum_n pre[n] x[n]{', with the pre' + previous if previous else ''}",
        f"x' = {write}, y = f(norm(u))",
        f"entry {spec.entry}, exit {spec.exit}",
    ]


# --------------------------------------------------------------------------------------------------
# inspect: what each sublayer's connection does


def inspect(
    graphdef: nnx.GraphDef, params: Any, config: Config, tokens_BT: jax.Array
) -> list[dict]:
    """One row a sublayer: raw parameters, mix (mean over tokens), entropy, cosines, marginals.

    >>> config = override(Config(), {"model.layers": 1, "model.width": 16, "model.vocab": 64})
    >>> graphdef, params = gpt.build(config.model, key=jax.random.key(0))
    >>> rows = inspect(graphdef, params, config, jnp.zeros((1, 8), int))
    >>> rows[0]["sublayer"], rows[0]["alpha"]
    ('0 attention', 0.5)
    """
    records, last = jax.jit(lambda p, t: nnx.merge(graphdef, p).trace(t))(params, tokens_BT)
    dead = diagnostics.dead_leaves(gpt.connection_of(config.model), 2 * config.model.layers)
    leaves: dict[int, dict[str, Any]] = {}
    names: dict[int, str] = {}
    for layer, name, leaf, array in gpt.sublayer_leaves(params, config.model):
        leaves.setdefault(layer, {})[leaf] = np.asarray(array)
        names[layer] = name
    rows = []
    for layer, record in enumerate(records):
        after = records[layer + 1].x if layer + 1 < len(records) else last
        own = leaves.get(layer, {})
        row: dict[str, Any] = {"sublayer": f"{layer} {gpt.SUBLAYERS[layer % 2]}"}
        if "alpha_logit" in own:
            row["alpha"] = round(float(jax.nn.sigmoid(own["alpha_logit"])), 4)
        for name in ("pre", "post", "res"):
            value = np.asarray(getattr(record.mix, name), np.float64)
            rank = 2 if name == "res" else 1
            value = value.reshape(-1, *value.shape[value.ndim - rank :]).mean(0)
            row[name] = np.round(value, 4).tolist()
        rows.append(
            row
            | {
                "entropy": round(float(diagnostics.entropy(record.mix.res)), 4),
                "cosine of what res mixes": round(
                    float(diagnostics.stream_cosine(record.operand)), 4
                ),
                "cosine of the streams after": round(float(diagnostics.stream_cosine(after)), 4),
                "marginal error": float(
                    jnp.max(jnp.array(diagnostics.marginal_error(record.mix.res)))
                ),
                "parameters": {
                    # A projection is no table to read: its size and its typical entry are.
                    leaf: np.round(a, 4).tolist()
                    if a.size <= 64
                    else f"{list(a.shape)}, root mean square {np.sqrt(np.mean(a**2)):.4g}"
                    for leaf, a in own.items()
                },
                "dead by structure": sorted(leaf for l, leaf in dead if l == layer),
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------
# diagnose: is this a language model, is its connection alive


@dataclass(frozen=True)
class Check:
    """One check: pass, warn or fail, with the figure and what it means."""

    name: str
    status: str
    text: str


def _check(name: str, good: bool, text: str, otherwise: str) -> Check:
    return Check(name, "pass" if good else "fail", text if good else f"{text}: {otherwise}")


def probe_rows(config: Config, mesh: Any) -> int:
    """Rows of a batch that `Program.probe` looks at: few, since it keeps every stream."""
    data = mesh.shape["data"]
    return max(data, min(config.data.batch, 4) // data * data)


def liveness(probe: dict, config: Config) -> Check:
    """Are the streams equal, and is res dead? From `Program.probe`.

    Dead takes both: what res mixes, or what it leaves behind, is equal in every sublayer, and the
    gradient of every res leaf that is not dead by structure is zero but for rounding. Equal streams
    with a gradient are a warning.

    >>> probe = {"cosine_operand": jnp.ones(8), "cosine_streams": jnp.ones(8),
    ...          "gradients": {"1.alpha_logit": 0.0}}
    >>> liveness(probe, Config()).status
    'fail'
    """
    spec = gpt.connection_of(config.model)
    dead = {f"{l}.{leaf}" for l, leaf in diagnostics.dead_leaves(spec, 2 * config.model.layers)}
    res = {
        name: float(g)
        for name, g in probe["gradients"].items()
        if name.endswith(("alpha_logit", "res_logits")) and name not in dead
    }
    if spec.streams == 1 or not res:
        return Check("streams", "pass", "no res to learn")
    operand = float(np.min(probe["cosine_operand"]))
    streams = float(np.min(probe["cosine_streams"]))
    figures = (
        f"cosine of what res mixes {operand:.4f}, of the streams {streams:.4f} (lowest sublayer), "
        f"largest res gradient {max(res.values()):.1e}"
    )
    alive = max(res.values()) > ROUNDING * max(map(float, probe["gradients"].values()))
    if math.isnan(operand + streams):
        return Check("streams", "fail", f"not finite: {figures}; the weights are broken")
    if max(operand, streams) > EQUAL and not alive:
        return Check(
            "streams",
            "fail",
            f"equal streams, dead mixing parameter: {figures}; the model is a plain residual, "
            "use an init that tells the streams apart, such as near_identity",
        )
    if max(operand, streams) > EQUAL:
        return Check(
            "streams", "warn", f"equal streams: balanced init, res still learns: {figures}"
        )
    return Check("streams", "pass", figures)


def diagnose(
    graphdef: nnx.GraphDef,
    params: Any,
    config: Config,
    tokens_BT: jax.Array,
    *,
    fingerprints: Sequence[str] | None = None,
) -> list[Check]:
    """The checks that would have caught the Rust project's failures, on tokens[B, T + 1] of text.

    Target shift, scale, causality, context, parity of training, prefill and decode logits, copy
    rate, equal streams, dead leaves, fingerprint. `fingerprints` are (stored with the checkpoint,
    of these weights, of a fresh init).

    >>> config = override(Config(), {"model.layers": 1, "model.width": 16, "model.vocab": 64})
    >>> graphdef, params = gpt.build(config.model, key=jax.random.key(0))
    >>> checks = diagnose(graphdef, params, config, jnp.arange(18).reshape(2, 9))
    >>> [c.name for c in checks if c.status == "fail"]
    ['target shift']
    """
    tokens_BT = jnp.asarray(tokens_BT)
    inputs, vocab = tokens_BT[:, :-1], config.model.vocab
    forward = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))
    logits = forward(params, inputs)
    scale = max(1.0, float(jnp.max(jnp.abs(logits))))
    exact = jnp.dtype(config.model.dtype).itemsize >= 4
    checks = []

    nll = -jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    shifts = {
        shift: float(jnp.mean(jnp.take_along_axis(nll, _shifted(tokens_BT, shift), axis=-1)))
        for shift in (0, 1, 2)
    }
    checks.append(
        _check(
            "target shift",
            shifts[1] + SHIFT_MARGIN < min(shifts[0], shifts[2]),
            "cross-entropy of the current, next and next but one token: "
            + ", ".join(f"{value:.3f}" for value in shifts.values()),
            "the next token is not the one predicted best; the targets are shifted wrongly, "
            "or the model is untrained",
        )
    )
    ce, uniform = shifts[1], math.log(vocab)
    checks.append(
        _check(
            "scale",
            ce <= uniform + 1,
            f"cross-entropy {ce:.3f}, uniform guessing {uniform:.3f}",
            "worse than guessing; look at model.embedding_std (0.02), "
            "an embedding of std 1 starts far above",
        )
    )

    half = inputs.shape[1] // 2
    later = jnp.where(jnp.arange(inputs.shape[1]) >= half, (inputs + 1) % vocab, inputs)
    moved = float(jnp.max(jnp.abs(forward(params, later) - logits)[:, :half]))
    checks.append(
        _check(
            "causality",
            moved == 0.0,
            f"other tokens from position {half} on move earlier logits by {moved:.1e}",
            "the model sees the future; it cannot generate",
        )
    )
    earlier = jnp.where(jnp.arange(inputs.shape[1]) < half, (inputs + 1) % vocab, inputs)
    changed = float(jnp.max(jnp.abs(forward(params, earlier) - logits)[:, -1]))
    checks.append(
        _check(
            "context",
            changed > 1e-4 * scale,
            f"another prefix moves the last logits by {changed:.1e}",
            "the model does not read its context; look at the attention",
        )
    )

    gap = _decoding_gap(graphdef, params, config, inputs, logits)
    bound = 1e-5 if exact else 5e-2  # bf16 has 8 bits; the paths round in another order
    checks.append(
        _check(
            "parity",
            gap <= bound * scale,
            f"training, prefill and decode logits differ by {gap / scale:.1e} of their size",
            f"more than {bound:g}; training and sampling do not compute the same function",
        )
    )

    rate, repeats = map(
        float, diagnostics.copy_rate(jnp.argmax(logits, axis=-1), inputs, tokens_BT[:, 1:])
    )
    checks.append(
        _check(
            "copy rate",
            rate <= repeats + 0.02,
            f"the prediction is the input token {rate:.1%} of the time, the target {repeats:.1%}",
            "the model copies its input",
        )
    )

    one = {"mesh.data": 1, "mesh.sequence": 1, "mesh.model": 1}
    flat = override(config, {**one, "data.batch": tokens_BT.shape[0]})
    probe = train.program(flat, sharding.make_mesh(1, 1)).probe(params, tokens_BT)
    checks.append(liveness(probe, config))
    spec = gpt.connection_of(config.model)
    by_structure = {
        f"{l}.{leaf}" for l, leaf in diagnostics.dead_leaves(spec, 2 * config.model.layers)
    }
    zero = sorted(
        name
        for name, g in probe["gradients"].items()
        if float(g) == 0.0 and name not in by_structure
    )
    checks.append(
        _check(
            "dead leaves",
            not zero,
            f"{len(probe['gradients'])} mixing leaves, {len(by_structure)} dead by structure, "
            f"{len(zero)} other without gradient",
            ", ".join(zero[:6]) + (" ..." if len(zero) > 6 else ""),
        )
    )
    if fingerprints is not None:
        stored, found, fresh = fingerprints
        text = f"weights {found[:12]}, stored {stored[:12]}"
        if found == fresh:
            checks.append(
                Check("fingerprint", "fail", f"{text}: these are the weights of a fresh init")
            )
        else:
            checks.append(
                _check("fingerprint", stored == found, text, "not the weights of this checkpoint")
            )
    return checks


def _shifted(tokens_BT: jax.Array, shift: int) -> jax.Array:
    """Tokens `shift` ahead of each position that has a next but one token; [B, T - 1, 1]."""
    length = tokens_BT.shape[1] - 2
    return tokens_BT[:, shift : shift + length, None]


def _decoding_gap(
    graphdef: nnx.GraphDef, params: Any, config: Config, inputs_BT: jax.Array, logits: jax.Array
) -> float:
    """Largest difference of prefill and of token-by-token logits from the training logits."""
    rows = inputs_BT.shape[0]
    half = max(1, inputs_BT.shape[1] // 2)
    lengths = np.full(rows, half, np.int32)
    last, cache = sample.prefill(
        graphdef, params, inputs_BT[:, :half], lengths, gpt.empty_cache(config.model, rows)
    )
    gap = float(jnp.max(jnp.abs(last - logits[:, half - 1])))
    for t in range(half, min(inputs_BT.shape[1], half + 16)):
        position = np.full(rows, t, np.int32)
        last, cache = sample.decode_step(graphdef, params, inputs_BT[:, t], position, cache)
        gap = max(gap, float(jnp.max(jnp.abs(last - logits[:, t]))))
    return gap
