"""Diagnostics: is a connection alive, stable, and does the model copy? Pure functions of arrays.

Axis key: L sublayer, N source stream, M destination stream, D width, B batch, T position,
V vocabulary. Leading axes are free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mhcjax.manifolds import Marginals, exact, manifold_of
from mhcjax.spec import Connection

__all__ = [
    "CopyRate",
    "Gain",
    "composite_gain",
    "copy_rate",
    "dead_leaves",
    "effective_streams",
    "entropy",
    "identity_distance",
    "marginal_error",
    "stream_cosine",
    "zero_leaves",
]


class Gain(NamedTuple):
    """Of a product of `res`: largest |row sum| (forward) and |column sum| (backward), and the
    largest |log| of both, which also shows attenuation."""

    forward: jax.Array
    backward: jax.Array
    log_rows: jax.Array
    log_columns: jax.Array


class CopyRate(NamedTuple):
    """`rate`: argmax equals the input token, counted where the target differs from the input.
    `repeats`: how often the data itself repeats the token."""

    rate: jax.Array
    repeats: jax.Array


def marginal_error(res: jax.Array) -> Marginals:
    """Largest |row sum - 1| and |column sum - 1| over all matrices of res[..., M, N].

    >>> float(marginal_error(jnp.array([[1.0, 0.5], [0.0, 0.5]])).rows)
    0.5
    """
    wide = res.astype(jnp.promote_types(jnp.float32, res.dtype))
    return Marginals(
        jnp.max(jnp.abs(jnp.sum(wide, axis=-1) - 1)), jnp.max(jnp.abs(jnp.sum(wide, axis=-2) - 1))
    )


def composite_gain(res: jax.Array) -> Gain:
    """Gain of `res[L-1] @ ... @ res[0]`, maximum over the other leading axes (mHC, section 3.1).

    Forward `max_m |sum_n P[m, n]|`, backward `max_n |sum_m P[m, n]|`; res[L, ..., M, N].

    >>> float(composite_gain(jnp.stack([2 * jnp.eye(2)] * 3)).forward)
    8.0
    """
    if res.ndim < 3 or res.shape[-1] != res.shape[-2]:
        raise ValueError(
            f"res has shape {res.shape}: give a stack [L, ..., M, M] of square matrices"
        )

    def step(product: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        return jnp.matmul(layer, product, precision="highest"), None

    wide = res.astype(jnp.promote_types(jnp.float32, res.dtype))
    eye = jnp.broadcast_to(jnp.eye(res.shape[-1], dtype=wide.dtype), wide.shape[1:])
    product, _ = jax.lax.scan(step, eye, wide)
    rows, columns = jnp.abs(jnp.sum(product, axis=-1)), jnp.abs(jnp.sum(product, axis=-2))
    return Gain(
        jnp.max(rows),
        jnp.max(columns),
        jnp.max(jnp.abs(jnp.log(rows))),
        jnp.max(jnp.abs(jnp.log(columns))),
    )


def entropy(res: jax.Array) -> jax.Array:
    """Mean entropy of the rows in nats, of |res| scaled to sum 1: 0 permutes, ln N mixes fully.

    >>> float(entropy(jnp.eye(2)))
    0.0
    """
    weights = jnp.abs(res.astype(jnp.promote_types(jnp.float32, res.dtype)))
    # A row of zeros, which an unconstrained res may have, counts as entropy 0.
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), _tiny(weights))
    return jnp.mean(jnp.sum(jax.scipy.special.entr(weights), axis=-1))


def identity_distance(res: jax.Array) -> jax.Array:
    """Mean Frobenius distance of res[..., M, N] from the identity.

    >>> float(identity_distance(jnp.eye(3)))
    0.0
    """
    wide = res.astype(jnp.promote_types(jnp.float32, res.dtype))
    return jnp.mean(jnp.linalg.norm(wide - jnp.eye(res.shape[-1], dtype=wide.dtype), axis=(-2, -1)))


def _tiny(x: jax.Array) -> float:
    """Smallest normal number: a divisor where a sum is zero."""
    return float(jnp.finfo(x.dtype).tiny)


def _gram(x: jax.Array, scale_over: tuple[int, ...]) -> jax.Array:
    """x x^T over the width, the largest entry over those axes scaled to 1, so that neither the
    squares of large streams overflow nor those of small ones vanish."""
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    largest = jnp.max(jnp.abs(wide), axis=scale_over, keepdims=True)
    wide = wide / jnp.maximum(largest, _tiny(wide))
    return jnp.einsum("...nd,...md->...nm", wide, wide, precision="highest")


def stream_cosine(x: jax.Array) -> jax.Array:
    """Mean cosine between the streams of x[..., N, D], over pairs and leading axes; 1 at N=1.

    Of what `res` mixes (`operand`), 1 means that res acts as the identity and cannot learn.

    >>> float(stream_cosine(jnp.array([[1.0, 0.0], [0.0, 1.0]])))
    0.0
    """
    streams = x.shape[-2]
    if streams == 1:
        return jnp.ones((), jnp.promote_types(jnp.float32, x.dtype))
    gram = _gram(x, (-1,))
    norms = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    cosine = gram / jnp.maximum(norms[..., :, None] * norms[..., None, :], _tiny(gram))
    off = jnp.sum(cosine, axis=(-2, -1)) - jnp.trace(cosine, axis1=-2, axis2=-1)
    return jnp.mean(off) / (streams * (streams - 1))


def effective_streams(x: jax.Array) -> jax.Array:
    """Mean participation ratio of the streams x[..., N, D]: `(sum s)^2 / sum s^2` of the squared
    singular values s; 1 when all are parallel, N when orthogonal and equally long.

    >>> float(effective_streams(jnp.eye(2)))
    2.0
    """
    gram = _gram(x, (-2, -1))
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    return jnp.mean(trace**2 / jnp.maximum(jnp.sum(gram**2, axis=(-2, -1)), _tiny(gram)))


def copy_rate(predicted: jax.Array, inputs: jax.Array, targets: jax.Array) -> CopyRate:
    """How often the predicted token (the argmax) is the input token, where the target is not.

    >>> rate, repeats = copy_rate(jnp.array([3, 1, 1]), jnp.array([3, 1, 2]), jnp.array([1, 1, 0]))
    >>> float(rate)
    0.5
    """
    differs = targets != inputs
    copied = (predicted == inputs) & differs
    return CopyRate(
        jnp.sum(copied) / jnp.maximum(jnp.sum(differs), 1),
        1 - jnp.mean(differs.astype(jnp.float32)),
    )


def dead_leaves(spec: Connection, layers: int) -> frozenset[tuple[int, str]]:
    """(sublayer, leaf) pairs whose gradient is zero whatever the weights, in a pre-norm stack.

    - the last res, where the exit is mean or sum and its columns sum to 1: the exit cancels it;
    - the first res, where the entry repeats, the rule is mix_first and its rows sum to 1;
    - the first pre, where the entry repeats: the norm after read cancels its scale;
    - the last post, where it sums to the same whatever its logits (softmax) and the exit sees only
      that sum;
    - the last pre, where it is carried and the exit does not read with it;
    - at N=1 every pre (the norm), every res whose rows sum to 1 (it is 1), and under add_first any
      last res (the final norm cancels its scale).

    A dynamic mix has more leaves: what a token adds to such logits has no gradient either, but
    projection and scale hold columns of all three coefficients and are alive as leaves. "Sum to 1"
    means whatever the logits: a truncated Sinkhorn's marginal that is not normalised last does not.

    They are frozen by the optimizer and exempt from every check of life.

    >>> sorted(dead_leaves(Connection(), layers=4))
    [(0, 'pre_logits'), (3, 'alpha_logit')]
    """
    names = set(spec.shapes(1))
    res = names & {"alpha_logit", "res_logits"}
    rows, columns = exact(manifold_of(spec.manifold), spec.streams)
    dead: set[tuple[int, str]] = set()
    if "pre_logits" in names and spec.entry == "repeat" and not spec.carried:
        dead.add((0, "pre_logits"))
    if "pre_logits" in names and spec.carried and spec.exit != "last_pre":
        dead.add((layers - 1, "pre_logits"))
    constant = spec.post in ("softmax", "column_softmax")
    if spec.exit in ("mean", "sum") and constant and (spec.rule == "mix_first" or columns):
        dead.add((layers - 1, "post_logits"))
    if spec.exit in ("mean", "sum") and columns:
        dead |= {(layers - 1, name) for name in res}
    if spec.entry == "repeat" and spec.rule == "mix_first" and rows:
        dead |= {(0, name) for name in res}
    if spec.streams == 1:
        dead |= {(l, "pre_logits") for l in range(layers) if "pre_logits" in names}
        if rows:
            dead |= {(l, name) for l in range(layers) for name in res}
        if spec.rule == "add_first":
            dead |= {(layers - 1, name) for name in res}
    return frozenset(dead)


def zero_leaves(gradients: Any) -> tuple[str, ...]:
    """Paths of the leaves of a gradient tree that are exactly zero: actually dead.

    >>> zero_leaves({"a": jnp.zeros(2), "b": jnp.ones(2)})
    ('a',)
    """
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if not bool(jnp.any(leaf != 0))
    )
