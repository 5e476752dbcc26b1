"""Read and write as XLA fuses them: plain array operations, each with a VJP of its own.

Sums over streams are unrolled: XLA fuses them into one pass, where an einsum becomes a batched
matmul. Autodiff of the slices would make pads and separate sums of them, hence the VJPs; nothing is
saved but the arguments.

Axis key: N source stream, M destination stream, D width. Leading axes are free and broadcast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["read", "write"]


def _weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """sum_n weights[..., n] x[..., n, :]"""
    terms = [weights[..., n, None] * x[..., n, :] for n in range(x.shape[-2])]
    return sum(terms[1:], terms[0])


def _mixed(weights: jax.Array, x: jax.Array) -> jax.Array:
    """sum_n weights[..., m, n] x[..., n, :]: broadcast over m, as one loop over the output."""
    terms = [weights[..., n, None] * x[..., n : n + 1, :] for n in range(x.shape[-2])]
    return sum(terms[1:], terms[0])


def _fit(cotangent: jax.Array, shape: tuple[int, ...], *more: int) -> jax.Array:
    """Summed over the axes that an argument of `shape` lacks or has as 1, and over axes `more`."""
    kept = cotangent.ndim - len(more)
    lead = kept - len(shape)
    thin = [lead + i for i, n in enumerate(shape) if n == 1 != cotangent.shape[lead + i]]
    axes = (*range(lead), *thin, *more)
    return jnp.sum(cotangent, axis=axes).reshape(shape) if axes else cotangent


def _dot(a: jax.Array, b: jax.Array, like: tuple[int, ...]) -> jax.Array:
    """sum_d a b, for a coefficient with the leading axes `like`: one reduction."""
    return _fit(a * b, like, -1)


@jax.custom_vjp
def read(x: jax.Array, pre: jax.Array) -> jax.Array:
    """`sum_n pre[..., n] x[..., n, :]`, in the dtype of `pre`, returned in that of `x`.

    >>> read(jnp.array([[1.0], [10.0]]), jnp.array([1.0, 2.0])).tolist()
    [21.0]
    """
    return _weighted(pre, x.astype(pre.dtype)).astype(x.dtype)


def _read_forward(x: jax.Array, pre: jax.Array) -> tuple[jax.Array, tuple]:
    return read(x, pre), (x, pre)


def _read_backward(saved: tuple, du: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, pre = saved
    wide, du = x.astype(pre.dtype), du.astype(pre.dtype)
    dpre = [_dot(du, wide[..., n, :], pre.shape[:-1]) for n in range(pre.shape[-1])]
    dx = pre[..., None] * du[..., None, :]
    return _fit(dx, x.shape).astype(x.dtype), jnp.stack(dpre, axis=-1)


read.defvjp(_read_forward, _read_backward)


@jax.custom_vjp
def write(x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array) -> jax.Array:
    """`sum_n res[..., m, n] x[..., n, :] + post[..., m] y`, in the dtype of `res`, returned in that
    of `x`.

    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> write(jnp.array([[1.0], [2.0]]), jnp.array([10.0]), swap, jnp.array([0.0, 1.0])).tolist()
    [[2.0], [11.0]]
    """
    wide, y = x.astype(res.dtype), y.astype(res.dtype)
    return (_mixed(res, wide) + post[..., None] * y[..., None, :]).astype(x.dtype)


def _write_forward(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array
) -> tuple[jax.Array, tuple]:
    return write(x, y, res, post), (x, y, res, post)


def _write_backward(saved: tuple, dout: jax.Array) -> tuple[jax.Array, ...]:
    x, y, res, post = saved
    wide, y_wide, dout = (a.astype(res.dtype) for a in (x, y, dout))
    M, N = res.shape[-2:]
    dres = [
        [_dot(dout[..., m, :], wide[..., n, :], res.shape[:-2]) for n in range(N)] for m in range(M)
    ]
    dpost = [_dot(dout[..., m, :], y_wide, post.shape[:-1]) for m in range(M)]
    return (
        _fit(_mixed(jnp.swapaxes(res, -1, -2), dout), x.shape).astype(x.dtype),
        _fit(_weighted(post, dout), y.shape).astype(y.dtype),
        jnp.stack([jnp.stack(row, axis=-1) for row in dres], axis=-2),
        jnp.stack(dpost, axis=-1),
    )


write.defvjp(_write_forward, _write_backward)
