"""The parts of a transformer without parameters: norm, rotary embedding, attention.

Axis key: B batch, T position, S cached position, H head, K head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

__all__ = ["BRANCH", "attend", "kept", "rms_norm", "rope"]

BRANCH = "branch"


def kept(a: jax.Array) -> jax.Array:
    """`a`, named BRANCH for `jax.checkpoint`: what a branch keeps where streams are made again.

    >>> kept(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    return checkpoint_name(a, BRANCH)


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """`x / sqrt(mean(x^2) + 1e-6)` over the last axis, in at least float32, without a gain.

    A gain would be absorbed by the projection that follows (Zhang and Sennrich, arXiv 1910.07467).

    >>> rms_norm(jnp.array([3.0, -3.0])).round(3).tolist()
    [1.0, -1.0]
    """
    return _rms_norm(x)[0]


def _inverse_rms(wide: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)


def _pull_norm(n: jax.Array, scale: jax.Array, dn: jax.Array) -> jax.Array:
    """The cotangent of x from the output n alone, which what follows keeps anyway: x itself, for
    mHC a weighted sum of N streams, is not read again."""
    n = n.astype(scale.dtype)
    return (dn - n * jnp.mean(dn * n, axis=-1, keepdims=True)) * scale


def _rms_norm(x: jax.Array) -> tuple[jax.Array, tuple]:
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    scale = kept(_inverse_rms(wide))
    n = kept((wide * scale).astype(x.dtype))
    return n, (n, scale)


def _rms_norm_backward(saved: tuple, dn: jax.Array) -> tuple[jax.Array]:
    n, scale = saved
    return (_pull_norm(n, scale, dn.astype(scale.dtype)).astype(n.dtype),)


rms_norm.defvjp(_rms_norm, _rms_norm_backward)


def _angles(positions_BT: jax.Array, half: int, base: float, dtype: Any) -> tuple:
    """cos and sin of the rotary angles, [B, T, 1, half]."""
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions_BT[..., None, None].astype(dtype) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rope(x_BTHK: jax.Array, positions_BT: jax.Array, base: float, norm: bool) -> jax.Array:
    """Rotary embedding, half-split: (a, b) -> (a cos - b sin, b cos + a sin) (arXiv 2104.09864),
    of `rms_norm(x)` where `norm`. `positions_BT` may be [1, T].

    >>> rope(jnp.ones((1, 1, 1, 2)), jnp.array([[0]]), 10000.0, False).tolist()
    [[[[1.0, 1.0]]]]
    """
    return _rope_forward(x_BTHK, positions_BT, base, norm)[0]


def _rope_forward(
    x_BTHK: jax.Array, positions_BT: jax.Array, base: float, norm: bool
) -> tuple[jax.Array, tuple]:
    wide = x_BTHK.astype(jnp.promote_types(jnp.float32, x_BTHK.dtype))
    scale = None
    if norm:
        scale = kept(_inverse_rms(wide))
        wide = wide * scale
    angles = _angles(positions_BT, x_BTHK.shape[-1] // 2, base, wide.dtype)
    out = kept(_rotate(wide, *angles).astype(x_BTHK.dtype))
    return out, (out if norm else None, scale, positions_BT)


def _rope_backward(base: float, norm: bool, saved: tuple, dout: jax.Array) -> tuple:
    # A rotation keeps inner products: the norm is pulled back in rotated coordinates, from the
    # output that attention keeps, and only the result is rotated back.
    out, scale, positions_BT = saved
    g = dout.astype(jnp.promote_types(jnp.float32, dout.dtype))
    if norm:
        g = _pull_norm(out, scale, g)
    cos, sin = _angles(positions_BT, dout.shape[-1] // 2, base, g.dtype)
    return _rotate(g, cos, -sin).astype(dout.dtype), None


rope.defvjp(_rope_forward, _rope_backward)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, fused: bool = True, **options: Any
) -> jax.Array:
    """`jax.nn.dot_product_attention`, by cuDNN where it can and `fused`; its softmax is float32
    whatever it is given, so that float64 goes by hand.

    >>> q = jnp.ones((1, 2, 1, 4))
    >>> attend(q, q, q, is_causal=True).shape
    (1, 2, 1, 4)
    """
    if q.dtype != jnp.float64:
        fast = _implementation(q) if fused else None
        if options.get("mask") is not None and (q.shape[1] % 2 or k.shape[1] % 2):
            fast = None  # cuDNN takes a mask as a bias, whose gradient wants even lengths
        return jax.nn.dot_product_attention(q, k, v, implementation=fast, **options)
    (B, T, H, K), (S, kv) = q.shape, k.shape[1:3]
    mask = options.get("mask")  # [B, 1, T, S]
    seen = jnp.tril(jnp.ones((T, S), bool)) if mask is None else mask[:, :, None]
    z = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, kv, H // kv, K), k) * K**-0.5
    weights = jax.nn.softmax(jnp.where(seen, z, -1e300), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def _implementation(q: jax.Array) -> Literal["cudnn"] | None:
    """cuDNN by name on a GPU: None always means XLA, and cuDNN takes 16-bit types only."""
    gpu = jax.default_backend() == "gpu"
    return "cudnn" if gpu and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 else None
