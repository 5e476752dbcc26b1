"""The head and its loss: logits over a padded vocabulary, cross-entropy without keeping them.

Where `jax.shard_map` splits the vocabulary over `model`, each part makes the logits of its own
columns; their maximum, their sum and the logit of the target are all that is exchanged.

Axis key: B batch, T position, D width, V vocabulary as stored, C chunk of positions.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mhcjax.sharding import fan_out, first_of, total, ways

__all__ = ["Head", "chunks_of", "cross_entropy", "logits", "loss", "predict"]

# Logits of one chunk, as elements: large enough for the matmuls, small enough to live and die.
CHUNK_ELEMENTS = 1 << 30


class Head(NamedTuple):
    """What the head is besides its weight: tokens of the vocabulary, soft cap (None: off)."""

    vocab: int
    soft_cap: float | None = None


def logits(h: jax.Array, w_DV: jax.Array, head: Head) -> jax.Array:
    """`cap * tanh(h @ w / cap)` in at least float32, [..., V]; storage padding at -1e9.

    >>> logits(jnp.ones((1, 2)), jnp.ones((2, 4)), Head(vocab=3)).tolist()
    [[2.0, 2.0, 2.0, -1000000000.0]]
    """
    wide = jnp.promote_types(jnp.float32, h.dtype)
    return _finish(jnp.matmul(h, w_DV.astype(h.dtype), preferred_element_type=wide), head)


def _finish(raw: jax.Array, head: Head) -> jax.Array:
    z = _capped(raw, head)
    if z.shape[-1] == head.vocab:
        return z
    return jnp.where(_columns(z) < head.vocab, z, -1e9)


def _columns(z: jax.Array) -> jax.Array:
    """Which tokens the last axis stands for: those of this part where `model` splits it."""
    columns = jnp.arange(z.shape[-1])
    return columns if ways("model") == 1 else columns + first_of(z.shape[-1])


def _capped(raw: jax.Array, head: Head) -> jax.Array:
    return raw if head.soft_cap is None else head.soft_cap * jnp.tanh(raw / head.soft_cap)


def _logsumexp(z: jax.Array, vocab: int) -> jax.Array:
    """Over the first `vocab` tokens, which the last axis holds; the rest is storage."""
    if ways("model") == 1:
        top, added = _top_and_sum(z, vocab)
        return top + jnp.log(added)
    real = jnp.where(_columns(z) < vocab, z, jnp.finfo(z.dtype).min)
    own, added = _top_and_sum(real, z.shape[-1])
    top = jax.lax.pmax(own, "model")
    return top + jnp.log(jax.lax.psum(added * jnp.exp(own - top), "model"))


def _top_and_sum(z: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """-> (maximum, sum of exponentials relative to it) over the first `vocab`, in one pass.

    The axis is cut into eight slabs that are reduced elementwise, so that the pairs (maximum, sum
    of exponentials relative to it) that are merged in the end are an eighth of the elements.
    """
    width = z.shape[-1] // 8 if z.shape[-1] % 8 == 0 else z.shape[-1]
    slabs = []
    for start in range(0, vocab, width):
        slab = z[..., start : start + width]
        if start + width > vocab:
            slab = jnp.where(jnp.arange(width) < vocab - start, slab, jnp.finfo(z.dtype).min)
        slabs.append(slab)
    tops = reduce(jnp.maximum, slabs)
    sums = sum(jnp.exp(slab - tops) for slab in slabs)

    def merge(a: tuple, b: tuple) -> tuple:
        (top_a, sum_a), (top_b, sum_b) = a, b
        small = jnp.exp(-jnp.abs(top_a - top_b))
        larger = top_a > top_b
        added = jnp.where(larger, sum_a + sum_b * small, sum_a * small + sum_b)
        return jnp.maximum(top_a, top_b), added

    least = jnp.asarray(jnp.finfo(z.dtype).min, z.dtype)  # -inf would make inf - inf
    nothing = (least, jnp.zeros((), z.dtype))
    return jax.lax.reduce((tops, sums), nothing, merge, (z.ndim - 1,))


def cross_entropy(
    h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array]:
    """-> (negative log-likelihood, logsumexp), [B, T]: the plain form, differentiable every way.

    >>> h, w = jnp.zeros((1, 3, 2)), jnp.ones((2, 4))
    >>> nll, _ = cross_entropy(h, w, jnp.zeros((1, 3), int), Head(4))
    >>> bool(jnp.allclose(nll, jnp.log(4)))
    True
    """
    return _cross_entropy(logits(fan_out(h_BTD), w_DV, head), targets_BT)


def _cross_entropy(z: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    if ways("model") == 1:
        logsumexp = jax.nn.logsumexp(z, axis=-1)
    else:
        top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(z, axis=-1)), "model")
        logsumexp = top + jnp.log(total(jnp.sum(jnp.exp(z - top[..., None]), axis=-1)))
    return logsumexp - _at(z, targets_BT), logsumexp


def _argmax(z: jax.Array) -> jax.Array:
    """The token of the largest logit, the first of equal ones."""
    own = jnp.argmax(z, axis=-1)
    if ways("model") == 1:
        return own
    top = jnp.max(z, axis=-1)
    token = own + first_of(z.shape[-1])
    last = jnp.iinfo(token.dtype).max
    return jax.lax.pmin(jnp.where(top == jax.lax.pmax(top, "model"), token, last), "model")


def _at(z: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """z[..., target], from the part that holds it."""
    if ways("model") == 1:
        return jnp.take_along_axis(z, targets_BT[..., None], axis=-1)[..., 0]
    return total(jnp.sum(jnp.where(_columns(z) == targets_BT[..., None], z, 0), axis=-1))


def chunks_of(h_BTD: Any, w_DV: Any) -> int:
    """Into how many chunks of positions the loss is cut: the fewest that keep one's logits small.
    Shapes are enough.

    >>> chunks_of(jnp.zeros((2, 8, 4)), jnp.zeros((4, 16)))
    1
    """
    B, T, _ = h_BTD.shape
    wanted = -(-B * T * w_DV.shape[1] // CHUNK_ELEMENTS)
    return next(c for c in range(max(1, min(wanted, T)), T + 1) if T % c == 0)


def _split(a: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...]: the batch stays where its mesh has put it."""
    B, T, *rest = a.shape
    if T % chunks:
        raise ValueError(f"{chunks} chunks do not divide {T} positions: give a divisor, or None")
    return jnp.moveaxis(a.reshape(B, chunks, T // chunks, *rest), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def loss(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    head: Head,
    z_loss: float = 0.0,
    chunks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-> (mean nll + z_loss * mean logsumexp^2, mean nll); gradients flow from the first alone.

    Both gradients of the head are made in the forward pass, chunk by chunk over positions: no
    logits are kept, every matmul runs in the dtype of `h`, dW is accumulated in float32. Plain
    autodiff would hold float32 cotangents of the logits and run the backward matmuls with them.

    >>> h, w = jnp.zeros((1, 3, 2)), jnp.ones((2, 4))
    >>> float(loss(h, w, jnp.zeros((1, 3), int), Head(4))[1]) == float(jnp.log(4.0))
    True
    """
    chunks, w = chunks or chunks_of(h_BTD, w_DV), _stored_as_zero(w_DV, head, h_BTD.dtype)

    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple]:
        nll, logsumexp = _scores(*part, w, head)[1:]
        return None, (jnp.mean(nll), jnp.mean(logsumexp**2))

    _, (nll, square) = jax.lax.scan(one, None, (_split(h_BTD, chunks), _split(targets_BT, chunks)))
    return jnp.mean(nll) + z_loss * jnp.mean(square), jnp.mean(nll)


def _stored_as_zero(w_DV: jax.Array, head: Head, dtype: Any) -> jax.Array:
    """The weight in `dtype`, its storage padding zero. Then only logsumexp must leave the padding
    out: its logits are 0 and reach no gradient of h. A mask would cost every pass over logits."""
    return jnp.where(_columns(w_DV) < head.vocab, w_DV, 0).astype(dtype)


def _scores(
    h: jax.Array, targets: jax.Array, w: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> (logits, negative log-likelihood, logsumexp) of one chunk. The product is made in the
    dtype of `h` and then widened: bf16 logits halve what the passes move."""
    z = _capped(jnp.matmul(h, w).astype(jnp.promote_types(jnp.float32, h.dtype)), head)
    logsumexp = _logsumexp(z, head.vocab)
    return z, logsumexp - _at(z, targets), logsumexp


def _loss_forward(
    h_BTD: jax.Array,
    w_DV: jax.Array,
    targets_BT: jax.Array,
    head: Head,
    z_loss: float,
    chunks: int | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    chunks = chunks or chunks_of(h_BTD, w_DV)
    w = _stored_as_zero(w_DV, head, h_BTD.dtype)
    wide = jnp.promote_types(jnp.float32, h_BTD.dtype)

    def one(dw: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        h, targets = part
        z, nll, logsumexp = _scores(h, targets, w, head)
        dz = jnp.exp(z - logsumexp[..., None])
        if z_loss:
            dz = dz * (1 + 2 * z_loss * logsumexp)[..., None]
        dz = dz - (_columns(z) == targets[..., None])
        if head.soft_cap is not None:
            dz = dz * (1 - (z / head.soft_cap) ** 2)
        dz = dz.astype(h.dtype)
        dh = total(jnp.einsum("bcv,dv->bcd", dz, w))
        dw = dw + jnp.einsum("bcd,bcv->dv", h, dz, preferred_element_type=wide)
        return dw, (jnp.mean(nll), jnp.mean(logsumexp**2), dh)

    zero = jnp.zeros(w_DV.shape, wide)
    dw, (nll, square, dh) = jax.lax.scan(
        one, zero, (_split(h_BTD, chunks), _split(targets_BT, chunks))
    )
    dh = jnp.moveaxis(dh, 0, 1).reshape(h_BTD.shape)
    ce = jnp.mean(nll)
    # A typed scalar, for its dtype: dw goes back in the dtype of the stored weight.
    return (ce + z_loss * jnp.mean(square), ce), (dh, dw, jnp.zeros((), w_DV.dtype))


def _loss_backward(
    head: Head, z_loss: float, chunks: int | None, saved: tuple, cotangents: tuple
) -> tuple[jax.Array, jax.Array, None]:
    dh, dw, like = saved
    g = cotangents[0] / (dh.shape[0] * dh.shape[1])
    dw = jnp.where(_columns(dw) < head.vocab, dw * g, 0)
    return (dh * g).astype(dh.dtype), dw.astype(like.dtype), None


loss.defvjp(_loss_forward, _loss_backward)


def predict(
    h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array]:
    """-> (negative log-likelihood, argmax), [B, T], chunk by chunk: no logits are kept.

    >>> h, w = jnp.ones((1, 3, 2)), jnp.eye(2)
    >>> predict(h, w, jnp.zeros((1, 3), int), Head(2))[1].tolist()
    [[0, 0, 0]]
    """
    chunks = chunks_of(h_BTD, w_DV)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z = logits(part[0], w_DV, head)
        return _cross_entropy(z, part[1])[0], _argmax(z)

    nll, top = jax.lax.map(one, (_split(h_BTD, chunks), _split(targets_BT, chunks)))
    whole = [jnp.moveaxis(a, 0, 1).reshape(targets_BT.shape) for a in (nll, top)]
    return whole[0], whole[1]
