"""Coefficients of the token's own streams, with their VJP, for arrays with any leading axes.

Few tokens whose gradient nobody takes, as in decoding, run on fewer kernels. Where it is taken they
run as many tokens do, which gives the same values up to rounding.

Between forward and backward stay the streams and, a token, the C products of the projection and one
mean square; everything else is made again.

Axis key: N source stream, M destination stream, D width, E = N*D flattened, C coefficient column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mhcjax.kernels import few_tokens, mosaic, projection, shards, triton
from mhcjax.kernels.blocks import blocks_for
from mhcjax.kernels.lanes import Unsupported, on_lanes
from mhcjax.kernels.pallas import Passed
from mhcjax.kernels.shards import LAST, SUMS, TOKENS, WHOLE, flatten, on_shards
from mhcjax.kernels.triton import added

__all__ = ["MIX", "mix", "unfit_token"]

MIX = "mix"  # the name of what is kept of a mix where streams are made again
MOST_COLUMNS = 96  # of a token's coefficients: Sinkhorn of 8 streams has 80


def unfit_token(f: Callable, columns: int) -> str | None:
    """Why what a token does with its products, `f`, has no kernel, or None."""
    if columns > MOST_COLUMNS:
        return f"a token has {columns} coefficients, more than {MOST_COLUMNS}"
    try:
        on_lanes(f, [(columns,), (), (columns,)])
    except Unsupported as problem:
        return f"its manifold needs {problem}"
    return None


def mix(
    f: Callable,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    reads: bool = False,
    passes: bool = False,
) -> tuple[Passed | None, jax.Array | None, tuple[jax.Array, ...]]:
    """(passed, u, coefficients) of x[..., N, D], w[E, C], scale[C] and bias[C].

    The coefficients, pre[..., N] first, are what `f(x @ w * scale, mean(x^2), bias)` gives of one
    token. With `reads` also `u = sum_n pre[n] x[n]`. With `passes`, f giving (pre, post, res), also
    the streams for `write_passed`; without `reads` that makes the next u, with this pre."""
    passed, u, rest = _mix(f, reads, passes, x, w, scale, bias)
    name = partial(checkpoint_name, name=MIX)
    if passed is None:
        return None, u, tuple(map(name, rest))
    *pre, post = map(name, rest)
    passed = replace(passed, res=name(passed.res), pre=None if reads else name(passed.pre))
    return passed, u, (pre[0] if reads else passed.pre, post, passed.res)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mix(
    f: Callable,
    reads: bool,
    passes: bool,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple:
    """(passed or None, u or None, the coefficients that are not passed)."""
    found = _mixed_few(f, reads, x, w, scale, bias) if shards.few(x) else None
    return _parcel(reads, passes, x, found or _mixed(f, reads, x, w * scale, bias)[0])


def _parcel(reads: bool, passes: bool, x: jax.Array, found: Sequence[jax.Array]) -> tuple:
    """(u, if it is read, and coefficients), as `_mix` returns them."""
    u, own = (found[0], found[1:]) if reads else (None, found)
    if not passes:
        return None, u, tuple(own)
    pre, post, res = own
    if reads:
        return Passed(x, res, None, None), u, (pre, post)
    return Passed(x, res, pre, jnp.zeros_like(x[..., 0, :])), u, (post,)


def _rows(reads: bool, passes: bool, coefficients: list) -> list:
    """What dx is made of besides the products: the numbers by which du and dout come in."""
    if not passes:
        return coefficients[0] if reads else []
    pre, _, res = coefficients
    N = len(pre)
    if not reads:  # u was made of what res wrote
        pre = [added([res[m * N + n] * pre[m] for m in range(N)]) for n in range(N)]
    return [*pre, *res]


@partial(jax.jit, static_argnums=(0, 1))
def _mixed_few(
    f: Callable, reads: bool, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    shapes = [o.shape for o in _outputs(f, bias)]
    sizes = tuple(map(math.prod, shapes))

    def local(x: jax.Array, own: jax.Array) -> tuple:
        lead = x.shape[:-2]
        found = few_tokens.mix(f, sizes, flatten(x, 2), own, reads, blocks_for(x))
        wanted = [*[x.shape[-1:]] * reads, *shapes]
        return tuple(a.reshape(*lead, *s) for a, s in zip(found, wanted, strict=True))

    outputs = [TOKENS] * (len(shapes) + reads)
    own = few_tokens.joined(w, scale, bias)
    return on_shards(local, x.shape[:-2], (TOKENS, WHOLE), outputs)(x, own)


@partial(jax.jit, static_argnums=(0, 1))
def _mixed(
    f: Callable, reads: bool, x: jax.Array, w: jax.Array, bias: jax.Array
) -> tuple[tuple, tuple]:
    N, D = x.shape[-2:]
    shapes = [o.shape for o in _outputs(f, bias)]
    sizes = tuple(map(math.prod, shapes))

    def local(x: jax.Array, w: jax.Array, bias: jax.Array) -> tuple:
        lead, blocks, flat = x.shape[:-2], blocks_for(x), x.reshape(-1, N * D)
        how = mosaic if mosaic.fits(flat, projection.columns_of(w)) else projection
        z, square = how.project(flat, w, blocks)
        found = projection.coefficients(f, sizes, z, square, bias, N * D, blocks)
        z, mean, *own = found
        u = (triton.read(flatten(x, 2), own[0], blocks).reshape(*lead, D),) if reads else ()
        coefficients = [a.reshape(*lead, *shape) for a, shape in zip(own, shapes, strict=True)]
        return (*u, *coefficients, z.reshape(-1, *lead), mean.reshape(lead))

    packed = projection.weights(w, x.dtype)
    outputs = [TOKENS] * (len(shapes) + reads) + [LAST, TOKENS]
    inputs = (TOKENS, WHOLE, WHOLE)
    found = on_shards(local, x.shape[:-2], inputs, outputs)(x, packed, bias)
    *results, z, mean = found
    return tuple(results), (x, packed, bias, checkpoint_name(z, MIX), checkpoint_name(mean, MIX))


def _outputs(f: Callable, bias: jax.Array) -> Any:
    number = jax.ShapeDtypeStruct((), jnp.float32)
    column = jax.ShapeDtypeStruct(bias.shape, jnp.float32)
    return jax.eval_shape(f, column, number, column)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _mixed_cotangents(
    f: Callable,
    reads: bool,
    passes: bool,
    saved: tuple,
    dmix: Sequence[jax.Array],
    du: jax.Array | None,
    dout: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, packed, bias, z, mean = saved
    N, D = x.shape[-2:]
    C, columns = bias.shape[0], projection.columns_of(packed)
    streams = [a for a in (dout, du) if a is not None]

    def local(
        x: jax.Array,
        w: jax.Array,
        bias: jax.Array,
        z: jax.Array,
        mean: jax.Array,
        *more: jax.Array,
    ) -> tuple:
        blocks, flat = blocks_for(x), flatten(x, 2)
        T = flat.shape[0]
        given = [[a.reshape(T, -1)] for a in more[: len(dmix)]]
        own_du = flatten(more[-1], 1) if du is not None else None
        own_dout = flatten(more[len(dmix)], 2) if dout is not None else None
        if reads and own_du is not None:
            given[0].append(triton.read_dots(flat, own_du, blocks))
        dz, scalars, dbias = projection.coefficients_backward(
            f,
            partial(_rows, reads, passes),
            z.reshape(C, -1),
            mean.reshape(-1),
            bias,
            given,
            columns,
            x.dtype,
            N * D,
            blocks,
        )
        how = mosaic if mosaic.fits_backward(flat, columns) else projection
        dx, dw = how.project_backward(flat, w, dz, scalars, own_du, own_dout, blocks)
        # One by one: a reduction over few rows is a slow kernel of XLA's.
        parts = added([dw[s] for s in range(dw.shape[0])])
        return dx.reshape(x.shape), parts[None, :, :C], jnp.sum(dbias, axis=1)[None]

    inputs = (TOKENS, WHOLE, WHOLE, LAST, *[TOKENS] * (1 + len(dmix) + len(streams)))
    dx, dw, dbias = on_shards(local, x.shape[:-2], inputs, (TOKENS, SUMS, SUMS))(
        x, packed, bias, z, mean, *dmix, *streams
    )
    return dx, jnp.sum(dw, axis=0), jnp.sum(dbias, axis=0)


def _mix_forward(
    f: Callable,
    reads: bool,
    passes: bool,
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
) -> tuple[tuple, tuple]:
    found, saved = _mixed(f, reads, x, w * scale, bias)
    return _parcel(reads, passes, x, found), (saved, w, scale)


def _mix_backward(f: Callable, reads: bool, passes: bool, kept: tuple, cotangents: tuple) -> tuple:
    saved, w, scale = kept
    passed, du, dmix = cotangents
    dout = None
    if passed is not None:
        dout = passed.x
        dmix = (*dmix, passed.res) if reads else (passed.pre, *dmix, passed.res)
        du = du if reads else passed.u
    dx, dw, dbias = _mixed_cotangents(f, reads, passes, saved, dmix, du, dout)
    return dx, dw * scale, jnp.sum(dw * w, axis=0), dbias


_mix.defvjp(_mix_forward, _mix_backward)
