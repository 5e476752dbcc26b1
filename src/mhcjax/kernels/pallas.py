"""Read and write with their VJPs, for arrays with any leading axes, on a mesh or off it.

Between forward and backward stay the streams and the branch's output.

Axis key: N source stream, M destination stream, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mhcjax.kernels import shards, triton, xla
from mhcjax.kernels.blocks import blocks_for
from mhcjax.kernels.shards import TOKENS, flatten, kind, on_shards, rows_of, shared

__all__ = ["Passed", "read", "unfit", "write", "write_and_read", "write_passed"]


def unfit(x: jax.Array, *coefficients: jax.Array) -> str | None:
    """Why the kernels do not take these arrays, or None.

    >>> unfit(jnp.zeros((2, 8)))
    'the width 8 is no multiple of 64'
    """
    *lead, N, D = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the streams are {x.dtype}, not bfloat16 or float32"
    if D % 64:
        return f"the width {D} is no multiple of 64"
    if N > 8:
        return f"there are {N} streams, more than 8"
    if x.size >= 2**31 or x.size == 0:
        return f"the streams have {x.size} elements, not 1 to 2^31 - 1"
    for c in coefficients:
        own = c.shape[: c.ndim - (2 if c.ndim > 1 and c.shape[-2:] == (N, N) else 1)]
        if c.dtype != jnp.float32 or (own and list(own) != lead):
            return f"the coefficients are {c.dtype}{list(c.shape)}, not one set or one a token"
    return None


# --------------------------------------------------------------------------------------------------
# Read


@jax.custom_vjp
def read(x: jax.Array, pre: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, `sum_n pre[..., n] x[..., n, :]`). Who goes on with this x has its cotangent added to in
    place, not beside it."""
    return x, _read(x, pre)


@jax.jit
def _read(x: jax.Array, pre: jax.Array) -> jax.Array:
    def local(x: jax.Array, pre: jax.Array) -> tuple[jax.Array]:
        u = triton.read(flatten(x, 2), flatten(pre, 1), blocks_for(x))
        return (u.reshape(*x.shape[:-2], -1),)

    (u,) = on_shards(local, x.shape[:-2], (TOKENS, kind(pre, 1)), (TOKENS,))(x, pre)
    return u


def _read_forward(x: jax.Array, pre: jax.Array) -> tuple[tuple, tuple]:
    return (x, _read(x, pre)), (x, pre)


@jax.jit
def _read_backward(saved: tuple, cotangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, pre), (dx, du) = saved, cotangents

    def local(x: jax.Array, pre: jax.Array, du: jax.Array, dx: jax.Array) -> tuple:
        flat = flatten(x, 2), flatten(pre, 1), flatten(du, 1), flatten(dx, 2)
        dx, dpre = triton.read_backward(*flat, blocks_for(x))
        return dx.reshape(x.shape), dpre.reshape(*x.shape[:-2], -1)

    kinds = (TOKENS, kind(pre, 1), TOKENS, TOKENS)
    dx, dpre = on_shards(local, x.shape[:-2], kinds, (TOKENS, TOKENS))(x, pre, du, dx)
    return dx, shared(dpre, pre)


read.defvjp(_read_forward, _read_backward)


# --------------------------------------------------------------------------------------------------
# Write, alone or with the next read


@partial(jax.tree_util.register_dataclass, data_fields=("x", "res", "pre", "u"), meta_fields=())
@dataclass(frozen=True)
class Passed:
    """Streams between a mix and its write, with the res that writes them: `write_passed` gives the
    mix's backward pass the cotangent of what it wrote, which applies res^T itself, so that the
    write's cotangent of x is never stored. For one write, and x for nothing else: its cotangent
    here is not that of x.

    Where the write reads for the next sublayer: with the pre for that, and zeros u[..., D] whose
    cotangent is that of what was read."""

    x: jax.Array
    res: jax.Array
    pre: jax.Array | None
    u: jax.Array | None


@jax.custom_vjp
def write(x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array) -> jax.Array:
    """`sum_n res[..., m, n] x[..., n, :] + post[..., m] y`."""
    if shards.few(x):
        # One launch too, and XLA takes what made y and post into it. Without the barrier the next
        # write would make these streams again.
        return jax.lax.optimization_barrier(xla.write(x, y, res, post))
    return _written(x, y, res, post, None)[0]


@jax.jit
def _written(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, pre: jax.Array | None
) -> tuple[jax.Array, ...]:
    """(x',), and with the pre of the next read (x', u')."""
    more = () if pre is None else (pre,)

    def local(
        x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, *more: jax.Array
    ) -> tuple:
        flat = flatten(x, 2), flatten(y, 1), rows_of(res), flatten(post, 1)
        own = flatten(more[0], 1) if more else None
        found = triton.write(*flat, own, blocks_for(x))
        return tuple(a.reshape(*x.shape[:-2], *a.shape[1:]) for a in found)

    kinds = (TOKENS, TOKENS, kind(res, 2), kind(post, 1), *[kind(a, 1) for a in more])
    outputs = (TOKENS, *[TOKENS] * len(more))
    return on_shards(local, x.shape[:-2], kinds, outputs)(x, y, res, post, *more)


def _write_forward(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array
) -> tuple[jax.Array, tuple]:
    return _written(x, y, res, post, None)[0], (x, y, res, post)


def _write_backward(saved: tuple, dout: jax.Array) -> tuple[jax.Array, ...]:
    x, y, res, post = saved
    return _write_cotangents(True, x, y, res, post, None, dout, None)


@partial(jax.jit, static_argnums=0)
def _write_cotangents(
    streams: bool,
    x: jax.Array,
    y: jax.Array,
    res: jax.Array,
    post: jax.Array,
    pre: jax.Array | None,
    dout: jax.Array,
    du: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(dy, dres, dpost), and dpre where there is a next read; with `streams` dx before them."""
    more = () if pre is None or du is None else (pre, du)

    def local(
        x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, dout: jax.Array, *more: Any
    ) -> tuple:
        lead = x.shape[:-2]
        flat = flatten(x, 2), flatten(y, 1), rows_of(res), flatten(post, 1)
        own = [flatten(a, 1) for a in more]
        found = triton.write_backward(*flat, flatten(dout, 2), own, blocks_for(x), streams=streams)
        shapes = [*[x.shape] * streams, y.shape, (*lead, *res.shape[-2:])]
        shapes += [(*lead, a.shape[-1]) for a in found[len(shapes) :]]
        return tuple(a.reshape(shape) for a, shape in zip(found, shapes, strict=True))

    kinds = [TOKENS, TOKENS, kind(res, 2), kind(post, 1), TOKENS]
    kinds += [kind(a, 1) for a in more[:1]] + [TOKENS] * len(more[1:])
    outputs = [TOKENS] * (streams + 3 + bool(more))
    found = on_shards(local, x.shape[:-2], kinds, outputs)(x, y, res, post, dout, *more)
    own = zip(found[streams + 1 :], (res, post, *more[:1]), strict=True)
    return (*found[: streams + 1], *(shared(d, like) for d, like in own))


write.defvjp(_write_forward, _write_backward)


@jax.custom_vjp
def write_and_read(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, pre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x', `sum_m pre[..., m] x'[..., m, :]`): a write and the read after it, in one pass."""
    x, u = _written(x, y, res, post, pre)
    return x, u


def _write_and_read_forward(*given: jax.Array) -> tuple[tuple, tuple]:
    return _written(*given), given


def _write_and_read_backward(saved: tuple, cotangents: tuple) -> tuple[jax.Array, ...]:
    (x, y, res, post, pre), (dout, du) = saved, cotangents
    return _write_cotangents(True, x, y, res, post, pre, dout, du)


write_and_read.defvjp(_write_and_read_forward, _write_and_read_backward)


@jax.custom_vjp
def write_passed(passed: Passed, y: jax.Array, post: jax.Array) -> Any:
    """What `write` gives, or `write_and_read` where pre is passed, too."""
    if passed.pre is None:
        return write(passed.x, y, passed.res, post)
    return write_and_read(passed.x, y, passed.res, post, passed.pre)


def _write_passed_forward(passed: Passed, y: jax.Array, post: jax.Array) -> tuple[Any, tuple]:
    given = passed.x, y, passed.res, post, passed.pre
    found = _written(*given)
    return found[0] if passed.pre is None else found, given


def _write_passed_backward(saved: tuple, cotangents: Any) -> tuple:
    dout, du = (cotangents, None) if saved[-1] is None else cotangents
    dy, dres, dpost, *dpre = _write_cotangents(False, *saved, dout, du)
    return Passed(dout, dres, dpre[0] if dpre else None, du), dy, dpost


write_passed.defvjp(_write_passed_forward, _write_passed_backward)
