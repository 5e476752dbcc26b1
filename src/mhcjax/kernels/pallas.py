"""The kernels with their VJPs, for arrays with any leading axes, on a mesh or off it.

Few tokens whose gradient nobody takes, as in decoding, run on fewer kernels. Where it is taken they
run as many tokens do, which gives the same values up to rounding.

Between forward and backward stay the streams, the branch's output and, a token, the C products of
the projection and one mean square; everything else is made again.

Axis key: N source stream, M destination stream, D width, E = N*D flattened, C coefficient column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from mhcjax.kernels import few_tokens, mosaic, projection, triton, xla
from mhcjax.kernels.blocks import blocks_for
from mhcjax.kernels.lanes import Unsupported, on_lanes
from mhcjax.kernels.triton import added

__all__ = ["mix", "mix_and_read", "read", "unfit", "unfit_token", "write", "write_and_read"]

# What a mesh may split, by position of the leading axis: batch, then positions.
TOKEN_AXES = ("data", "sequence")
MIX = "mix"  # the name of what is kept of a mix where streams are made again
MOST_COLUMNS = 96  # of a token's coefficients: Sinkhorn of 8 streams has 80


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


def unfit_token(f: Callable, columns: int) -> str | None:
    """Why what a token does with its products, `f`, has no kernel, or None."""
    if columns > MOST_COLUMNS:
        return f"a token has {columns} coefficients, more than {MOST_COLUMNS}"
    try:
        on_lanes(f, [(columns,), (), (columns,)])
    except Unsupported as problem:
        return f"its manifold needs {problem}"
    return None


# --------------------------------------------------------------------------------------------------
# Flat tokens, shard by shard


def _axes(lead: Sequence[int]) -> tuple[Any, ...]:
    """The mesh axis of every leading axis, None where it is whole."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    }
    named = [*TOKEN_AXES, *[None] * len(lead)][: len(lead)]
    return tuple(
        n if n in auto and size % auto[n] == 0 else None
        for n, size in zip(named, lead, strict=True)
    )


def _few(x: jax.Array) -> bool:
    """Whether a device's own tokens are so few that launches are what takes the time."""
    lead, mesh = x.shape[:-2], jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[name] for name in _axes(lead) if name)
    return math.prod(lead) <= blocks_for(x).few * ways


TOKENS, WHOLE, LAST, SUMS = "tokens", "whole", "last", "sums"


def _on_shards(
    f: Callable, lead: Sequence[int], inputs: Sequence[str], outputs: Sequence[str]
) -> Callable:
    """`f` on each device's own tokens. An array is of TOKENS (leading axes first) or LAST (last),
    WHOLE, or SUMS over a device's tokens, [1, ...], to be added up over the first axis."""
    axes = _axes(lead)
    if not any(axes):
        return f
    split = tuple(a for a in axes if a)
    specs = {
        TOKENS: PartitionSpec(*axes),
        WHOLE: PartitionSpec(),
        LAST: PartitionSpec(None, *axes),
        SUMS: PartitionSpec(split),
    }
    return jax.shard_map(
        f,
        in_specs=tuple(specs[kind] for kind in inputs),
        out_specs=tuple(specs[kind] for kind in outputs),
        axis_names=set(split),
        check_vma=False,  # a kernel says nothing of how its results vary
    )


def _flat(a: jax.Array, keep: int) -> jax.Array:
    """[..., *kept] -> [T, *kept]; coefficients that all tokens share become [1, *kept]."""
    return a.reshape(-1, *a.shape[a.ndim - keep :])


def _of(res: jax.Array) -> jax.Array:
    """[..., M, N] -> [T, M*N]"""
    return res.reshape(-1, math.prod(res.shape[-2:]))


def _kind(c: jax.Array, keep: int) -> str:
    return TOKENS if c.ndim > keep else WHOLE


def _shared(d: jax.Array, like: jax.Array) -> jax.Array:
    """The cotangent of coefficients: a token's own, or the sum where all share them."""
    return d if d.ndim == like.ndim else jnp.sum(d, axis=tuple(range(d.ndim - like.ndim)))


# --------------------------------------------------------------------------------------------------
# Read


@jax.custom_vjp
def read(x: jax.Array, pre: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x, `sum_n pre[..., n] x[..., n, :]`). Who goes on with this x has its cotangent added to in
    place, not beside it."""
    return _read_forward(x, pre)[0]


def _read_forward(x: jax.Array, pre: jax.Array) -> tuple[tuple, tuple]:
    lead, D = x.shape[:-2], x.shape[-1]

    def local(x: jax.Array, pre: jax.Array) -> tuple[jax.Array]:
        u = triton.read(_flat(x, 2), _flat(pre, 1), blocks_for(x))
        return (u.reshape(*x.shape[:-2], D),)

    (u,) = _on_shards(local, lead, (TOKENS, _kind(pre, 1)), (TOKENS,))(x, pre)
    return (x, u), (x, pre)


@jax.jit
def _read_backward(saved: tuple, cotangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, pre), (dx, du) = saved, cotangents

    def local(x: jax.Array, pre: jax.Array, du: jax.Array, dx: jax.Array) -> tuple:
        flat = _flat(x, 2), _flat(pre, 1), _flat(du, 1), _flat(dx, 2)
        dx, dpre = triton.read_backward(*flat, blocks_for(x))
        return dx.reshape(x.shape), dpre.reshape(*x.shape[:-2], -1)

    kinds = (TOKENS, _kind(pre, 1), TOKENS, TOKENS)
    dx, dpre = _on_shards(local, x.shape[:-2], kinds, (TOKENS, TOKENS))(x, pre, du, dx)
    return dx, _shared(dpre, pre)


read.defvjp(_read_forward, _read_backward)


# --------------------------------------------------------------------------------------------------
# Write, alone or with the next read


@jax.custom_vjp
def write(x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array) -> jax.Array:
    """`sum_n res[..., m, n] x[..., n, :] + post[..., m] y`."""
    if _few(x):
        # One launch too, and XLA takes what made y and post into it. Without the barrier the next
        # write would make these streams again.
        return jax.lax.optimization_barrier(xla.write(x, y, res, post))
    return _write_forward(x, y, res, post)[0]


def _write_forward(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array
) -> tuple[jax.Array, tuple]:
    def local(x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array) -> tuple[jax.Array]:
        flat = _flat(x, 2), _flat(y, 1), _of(res), _flat(post, 1)
        (out,) = triton.write(*flat, None, blocks_for(x))
        return (out.reshape(*x.shape[:-2], *out.shape[1:]),)

    kinds = (TOKENS, TOKENS, _kind(res, 2), _kind(post, 1))
    (out,) = _on_shards(local, x.shape[:-2], kinds, (TOKENS,))(x, y, res, post)
    return out, (x, y, res, post)


def _write_backward(saved: tuple, dout: jax.Array) -> tuple[jax.Array, ...]:
    x, y, res, post = saved
    return _write_cotangents(x, y, res, post, None, dout, None)


@jax.jit
def _write_cotangents(
    x: jax.Array,
    y: jax.Array,
    res: jax.Array,
    post: jax.Array,
    pre: jax.Array | None,
    dout: jax.Array,
    du: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(dx, dy, dres, dpost), and dpre where there is a next read."""
    more = () if pre is None or du is None else (pre, du)

    def local(
        x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, dout: jax.Array, *more: Any
    ) -> tuple:
        lead = x.shape[:-2]
        flat = _flat(x, 2), _flat(y, 1), _of(res), _flat(post, 1)
        own = [_flat(a, 1) for a in more]
        found = triton.write_backward(*flat, _flat(dout, 2), own, blocks_for(x))
        dx, dy, dres, *vectors = found
        return (
            dx.reshape(x.shape),
            dy.reshape(y.shape),
            dres.reshape(*lead, *res.shape[-2:]),
            *(v.reshape(*lead, -1) for v in vectors),
        )

    kinds = [TOKENS, TOKENS, _kind(res, 2), _kind(post, 1), TOKENS]
    kinds += [_kind(a, 1) for a in more[:1]] + [TOKENS] * len(more[1:])
    outputs = [TOKENS] * (5 if more else 4)
    found = _on_shards(local, x.shape[:-2], kinds, outputs)(x, y, res, post, dout, *more)
    shared = zip(found[2:], (res, post, *more[:1]), strict=True)
    return (*found[:2], *(_shared(d, like) for d, like in shared))


write.defvjp(_write_forward, _write_backward)


@jax.custom_vjp
def write_and_read(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, pre: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x', `sum_m pre[..., m] x'[..., m, :]`): a write and the read after it, in one pass."""
    return _write_and_read_forward(x, y, res, post, pre)[0]


def _write_and_read_forward(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, pre: jax.Array
) -> tuple[tuple, tuple]:
    def local(
        x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, pre: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        flat = _flat(x, 2), _flat(y, 1), _of(res), _flat(post, 1), _flat(pre, 1)
        out, u = triton.write(*flat, blocks_for(x))
        return out.reshape(*x.shape[:-2], *out.shape[1:]), u.reshape(y.shape)

    kinds = (TOKENS, TOKENS, _kind(res, 2), _kind(post, 1), _kind(pre, 1))
    found = _on_shards(local, x.shape[:-2], kinds, (TOKENS, TOKENS))(x, y, res, post, pre)
    return found, (x, y, res, post, pre)


def _write_and_read_backward(saved: tuple, cotangents: tuple) -> tuple[jax.Array, ...]:
    (x, y, res, post, pre), (dout, du) = saved, cotangents
    return _write_cotangents(x, y, res, post, pre, dout, du)


write_and_read.defvjp(_write_and_read_forward, _write_and_read_backward)


# --------------------------------------------------------------------------------------------------
# Coefficients of the token's own streams


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_and_read(
    f: Callable, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    """(x, u, *coefficients) of x[..., N, D], w[E, C], scale[C] and bias[C].

    The coefficients, pre[..., N] first, are what `f(x @ w * scale, mean(x^2), bias)` gives of one
    token; `u = sum_n pre[n] x[n]`. x is passed on as `read` does."""
    return _mixed_undifferentiated(f, True, x, w, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix(
    f: Callable, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    """(x, *coefficients): `mix_and_read` without the read."""
    return _mixed_undifferentiated(f, False, x, w, scale, bias)


def _mixed_undifferentiated(
    f: Callable, reads: bool, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    if _few(x):
        return _mixed_few(f, reads, x, w, scale, bias)
    return _mixed(f, reads, x, w * scale, bias)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _mixed_few(
    f: Callable, reads: bool, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, ...]:
    shapes = [o.shape for o in _outputs(f, bias)]
    sizes = tuple(map(math.prod, shapes))

    def local(x: jax.Array, own: jax.Array) -> tuple:
        lead = x.shape[:-2]
        found = few_tokens.mix(f, sizes, _flat(x, 2), own, reads, blocks_for(x))
        wanted = [*[x.shape[-1:]] * reads, *shapes]
        return tuple(a.reshape(*lead, *s) for a, s in zip(found, wanted, strict=True))

    outputs = [TOKENS] * (len(shapes) + reads)
    own = few_tokens.joined(w, scale, bias)
    return x, *_on_shards(local, x.shape[:-2], (TOKENS, WHOLE), outputs)(x, own)


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
        u = (triton.read(_flat(x, 2), own[0], blocks).reshape(*lead, D),) if reads else ()
        coefficients = [a.reshape(*lead, *shape) for a, shape in zip(own, shapes, strict=True)]
        return (*u, *coefficients, z.reshape(-1, *lead), mean.reshape(lead))

    packed = projection.weights(w, x.dtype)
    outputs = [TOKENS] * (len(shapes) + reads) + [LAST, TOKENS]
    inputs = (TOKENS, WHOLE, WHOLE)
    found = _on_shards(local, x.shape[:-2], inputs, outputs)(x, packed, bias)
    *results, z, mean = found
    return (x, *results), (x, packed, bias, checkpoint_name(z, MIX), checkpoint_name(mean, MIX))


def _outputs(f: Callable, bias: jax.Array) -> Any:
    number = jax.ShapeDtypeStruct((), jnp.float32)
    column = jax.ShapeDtypeStruct(bias.shape, jnp.float32)
    return jax.eval_shape(f, column, number, column)


@partial(jax.jit, static_argnums=(0,))
def _mixed_cotangents(
    f: Callable, saved: tuple, dx: jax.Array, du: jax.Array | None, dmix: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, packed, bias, z, mean = saved
    N, D = x.shape[-2:]
    C, columns = bias.shape[0], projection.columns_of(packed)

    def local(
        x: jax.Array,
        w: jax.Array,
        bias: jax.Array,
        z: jax.Array,
        mean: jax.Array,
        dx: jax.Array,
        *more: jax.Array,
    ) -> tuple:
        blocks, flat = blocks_for(x), x.reshape(-1, N * D)
        given = [[a.reshape(flat.shape[0], -1)] for a in more[: len(dmix)]]
        du = _flat(more[-1], 1) if reads else None
        if du is not None:
            given[0].append(triton.read_dots(_flat(x, 2), du, blocks))
        dz, scalars, dbias = projection.coefficients_backward(
            f, z.reshape(C, -1), mean.reshape(-1), bias, given, columns, x.dtype, N * D, blocks
        )
        how = mosaic if mosaic.fits(flat, columns) else projection
        before = dx.reshape(flat.shape)
        found, dw = how.project_backward(flat, w, dz, scalars, du, before, blocks)
        # One by one: a reduction over few rows is a slow kernel of XLA's.
        parts = added([dw[s] for s in range(dw.shape[0])])
        return found.reshape(x.shape), parts[None, :, :C], jnp.sum(dbias, axis=1)[None]

    reads = () if du is None else (du,)
    inputs = (TOKENS, WHOLE, WHOLE, LAST, *[TOKENS] * (2 + len(dmix) + len(reads)))
    dx, dw, dbias = _on_shards(local, x.shape[:-2], inputs, (TOKENS, SUMS, SUMS))(
        x, packed, bias, z, mean, dx, *dmix, *reads
    )
    return dx, jnp.sum(dw, axis=0), jnp.sum(dbias, axis=0)


def _mix_forward(
    reads: bool, f: Callable, x: jax.Array, w: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[tuple, tuple]:
    found, saved = _mixed(f, reads, x, w * scale, bias)
    return found, (saved, w, scale)


def _mix_backward(reads: bool, f: Callable, kept: tuple, cotangents: tuple) -> tuple:
    saved, w, scale = kept
    dx, *dmix = cotangents
    du = dmix.pop(0) if reads else None
    dx, dw, dbias = _mixed_cotangents(f, saved, dx, du, dmix)
    return dx, dw * scale, jnp.sum(dw * w, axis=0), dbias


mix_and_read.defvjp(partial(_mix_forward, True), partial(_mix_backward, True))
mix.defvjp(partial(_mix_forward, False), partial(_mix_backward, False))
