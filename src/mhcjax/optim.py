"""Optimizer, schedule and parameter groups. Rates are arguments of the step, not of the optimizer.

Axis key: L block, D width, H head, K head size, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from mhcjax.config import ModelConfig, OptimConfig
from mhcjax.diagnostics import dead_leaves
from mhcjax.gpt import SUBLAYERS
from mhcjax.spec import Connection

__all__ = [
    "GROUPS",
    "Hyper",
    "apply",
    "freeze_dead",
    "hyper",
    "labels",
    "learning_rate",
    "limit_scales",
    "optimizer",
]

# group: (decayed, what it holds)
GROUPS = {
    "matrix": (True, "matrices of the blocks"),
    "embedding": (True, "token embedding"),
    "head": (True, "untied head"),
    "static": (False, "mixing logits and biases: decay would pull res to the uniform matrix"),
    "projection": (True, "projections of dynamic mixes and of a learned exit"),
    "scale": (False, "scales of dynamic mixes and of a learned exit"),
}

Dims = optax.contrib.MuonDimensionNumbers
# Which axes of a stacked leaf are a matrix's input and output; the leading L is a batch.
MATRIX_AXES = {
    "query": Dims(1, (2, 3)),
    "key": Dims(1, (2, 3)),
    "value": Dims(1, (2, 3)),
    "out": Dims((1, 2), 3),
    "gate": Dims(1, 2),
    "up": Dims(1, 2),
    "down": Dims(1, 2),
}


class Hyper(NamedTuple):
    """Scalars of one update: a sweep over them compiles once and can be vmapped."""

    rates: dict[str, Any]
    weight_decay: Any
    clip: Any
    schedule_steps: Any


def _names(path: tuple) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def labels(params: Any) -> Any:
    """The group of every leaf, by its role in the tree and never by its shape.

    >>> labels({"embedding": jnp.zeros((2, 2)), "blocks": {"mlp": {"up": jnp.zeros((1, 2, 2))}}})
    {'blocks': {'mlp': {'up': 'matrix'}}, 'embedding': 'embedding'}
    """

    def label(path: tuple, _: Any) -> str:
        names = _names(path)
        if names[0] in ("embedding", "head"):
            return names[0]
        if names[0] == "blocks" and names[1] in SUBLAYERS:
            return "matrix"
        if names[0] in ("entry", "exit") or names[1].endswith("_connection"):
            # The scale of a noisy entry is its static part, [N, D].
            own = names[-1] if names[0] != "entry" else "static"
            return own if own in ("projection", "scale") else "static"
        raise ValueError(f"parameter {'.'.join(names)} belongs to no group: add it to optim.labels")

    return jax.tree_util.tree_map_with_path(label, params)


def optimizer(
    config: OptimConfig, whole: Callable[[jax.Array], jax.Array] = lambda u: u
) -> optax.GradientTransformation:
    """The update at rate 1 and without decay, from Optax: muon, adamw, lion or sgd.

    Muon takes the matrices of the blocks, AdamW all the rest. `apply` scales and decays. `whole`
    places what Newton-Schulz begins and ends with: split, each iteration would exchange it anew.

    >>> optimizer(OptimConfig(name="sgd")).update({"a": jnp.ones(1)}, optax.EmptyState())[0]
    {'a': Array([-1.], dtype=float32)}
    """
    adam = optax.chain(optax.scale_by_adam(config.beta1, config.beta2), optax.scale(-1.0))
    if config.name == "adamw":
        return adam
    if config.name == "lion":
        return optax.chain(optax.scale_by_lion(config.beta1, config.beta2), optax.scale(-1.0))
    if config.name == "sgd":
        return optax.scale(-1.0)

    def dims(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, _: MATRIX_AXES[_names(p)[-1]], params)

    # Momentum as in Jordan's Muon, in the dtype of the parameters; then Optax's Newton-Schulz and
    # scaling by shape, without a momentum of its own, all of it in `muon_dtype`.
    dtype = jnp.dtype(config.muon_dtype) if config.muon_dtype else None
    newton_schulz = optax.contrib.muon(
        1.0, beta=0.0, nesterov=False, muon_weight_dimension_numbers=dims
    )

    def orthogonalize(updates: Any, params: Any) -> Any:
        narrow = jax.tree.map(lambda u: whole(u.astype(dtype or u.dtype)), updates)
        # Without momentum its state says nothing: none is kept.
        made = newton_schulz.update(narrow, newton_schulz.init(narrow), params)[0]
        return jax.tree.map(whole, made)

    muon = optax.chain(optax.trace(config.momentum, nesterov=True), optax.stateless(orthogonalize))
    return optax.partition(
        {"matrix": muon, "rest": adam},
        lambda params: jax.tree.map(lambda g: g if g == "matrix" else "rest", labels(params)),
    )


def learning_rate(config: OptimConfig, update: Any, schedule_steps: Any) -> jax.Array:
    """The share of the peak rate at `update`, counted from 0; past the schedule the last one.

    Warm-up `(update + 1) / warmup_steps`; then "wsd" is 1 until the last `decay_fraction`, linear
    to `final_fraction`; "cosine" is half a cosine to `final_fraction`; "constant" stays 1.

    >>> [round(float(learning_rate(OptimConfig(warmup_steps=4), u, 100)), 3) for u in (0, 3, 99)]
    [0.25, 1.0, 0.069]
    """
    update, steps = jnp.float32(update), jnp.float32(schedule_steps)
    warm = jnp.minimum(1.0, (update + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return warm
    if config.schedule == "wsd":
        left = (steps - update) / jnp.maximum(config.decay_fraction * steps, 1e-6)
        level = jnp.clip(left, 0, 1)
    else:
        span = jnp.maximum(steps - config.warmup_steps, 1)
        done = jnp.clip((update - config.warmup_steps) / span, 0, 1)
        level = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return warm * (config.final_fraction + (1 - config.final_fraction) * level)


def hyper(config: OptimConfig, schedule_steps: int) -> Hyper:
    """The scalars of a run: peak rates by group, decay, clip norm, length of the schedule.

    >>> float(hyper(OptimConfig(rest_rate=0.25), 300).rates["static"])
    0.25
    """
    rest = config.learning_rate if config.rest_rate is None else config.rest_rate
    peaks = {
        "matrix": config.learning_rate,
        "embedding": rest,
        "head": rest,
        **dict.fromkeys(
            ("static", "projection", "scale"),
            rest if config.mixing_rate is None else config.mixing_rate,
        ),
    }
    # NumPy scalars of one dtype: Python floats would be weakly typed and compile anew.
    return Hyper(
        {group: np.float32(peak) for group, peak in peaks.items()},
        np.float32(config.weight_decay),
        np.float32(config.clip if config.clip > 0 else np.inf),
        np.float32(schedule_steps),
    )


def apply(params: Any, updates: Any, scalars: Hyper, share: Any = 1.0) -> Any:
    """`p + share * rate * (update - weight_decay * p)`: each group's rate, decay as in GROUPS.

    >>> h = Hyper({"embedding": 0.5}, 0.1, 1.0, 100)
    >>> apply({"embedding": jnp.ones(1)}, {"embedding": -jnp.ones(1)}, h)["embedding"].tolist()
    [0.44999998807907104]
    """

    def one(group: str, p: jax.Array, update: jax.Array) -> jax.Array:
        decay = scalars.weight_decay * p if GROUPS[group][0] else 0.0
        return (p + share * scalars.rates[group] * (update - decay)).astype(p.dtype)

    return jax.tree.map(one, labels(params), params, updates)


def limit_scales(gradients: Any, config: OptimConfig) -> Any:
    """The gradients with those of the group "scale" at zero (`freeze_scales`), or no longer than
    `scale_clip`: in orthogonal variants they dominate the norm that everything is clipped by.

    >>> g = {"exit": {"scale": jnp.array([3.0, 4.0])}}
    >>> limited = limit_scales(g, OptimConfig(scale_clip=1.0))["exit"]["scale"]
    >>> [round(float(value), 4) for value in limited]
    [0.6, 0.8]
    """
    if not config.freeze_scales and not config.scale_clip:
        return gradients
    groups = labels(gradients)
    square = jax.tree.map(
        lambda group, g: jnp.sum(jnp.square(g)) if group == "scale" else 0.0, groups, gradients
    )
    norm = jnp.sqrt(sum(jax.tree.leaves(square), jnp.zeros(())))
    factor = jnp.minimum(1.0, config.scale_clip / jnp.maximum(norm, 1e-30))
    factor = jnp.zeros(()) if config.freeze_scales else factor
    return jax.tree.map(
        lambda group, g: g * factor.astype(g.dtype) if group == "scale" else g, groups, gradients
    )


def freeze_dead(gradients: Any, spec: Connection, config: ModelConfig) -> Any:
    """The gradients with structurally dead leaves at exactly zero: sign optimisers would drift
    them on rounding noise.

    >>> g = {"blocks": {"mlp_connection": {"alpha_logit": jnp.ones(2)}, "attention_connection": {}}}
    >>> out = freeze_dead(g, Connection(), ModelConfig(layers=2))
    >>> out["blocks"]["mlp_connection"]["alpha_logit"].tolist()
    [1.0, 0.0]
    """
    dead = dead_leaves(spec, 2 * config.layers)
    blocks = dict(gradients["blocks"])
    for offset, name in enumerate(SUBLAYERS):
        if f"{name}_connection" not in blocks:  # a connection without parameters
            continue
        group = dict(blocks[f"{name}_connection"])
        for leaf, stacked in group.items():
            alive = [(2 * b + offset, leaf) not in dead for b in range(config.layers)]
            mask = jnp.asarray(alive).reshape(-1, *(1,) * (stacked.ndim - 1))
            group[leaf] = jnp.where(mask, stacked, 0)
        blocks[f"{name}_connection"] = group
    return {**gradients, "blocks": blocks}
