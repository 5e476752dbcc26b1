"""The kernels of read and write: Pallas, lowered through Triton, one program a token.

Axis key: T token (leading axes flattened), N source stream, M destination stream, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mhcjax.kernels.blocks import Blocks

WIDE = jnp.float32


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    outputs: Any,
    *,
    warps: int,
    stages: int = 2,
    name: str,
    aliases: dict[int, int] | None = None,
) -> Callable:
    """`pl.pallas_call` through Triton, interpreted on a CPU."""
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid=grid,
        # By name: without parameters JAX 0.10 lowers to Mosaic, JAX 0.11 to Triton.
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        input_output_aliases=aliases or {},
        interpret=jax.default_backend() == "cpu",
        name=name,
    )


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)


def power_of_two(width: int, most: int) -> int:
    """The largest power of two that divides the width, at most `most`."""
    return min(most, width & -width)


def largest_divisor(number: int, most: int) -> int:
    """Of the number, at most `most`."""
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)


def in_powers(count: int) -> list[tuple[int, int]]:
    """(start, size) of so many columns in powers of two, as Triton wants them; a mask would make
    loads wait for each other."""
    sizes = [1 << k for k in reversed(range(count.bit_length())) if count >> k & 1]
    return [(sum(sizes[:k]), size) for k, size in enumerate(sizes)]


def _warps(chunk: int, elements: int) -> int:
    """Warps that leave each lane that many elements of a chunk."""
    return max(1, chunk // (32 * elements))


def _over_width(width: int, chunk: int, body: Callable, carry: Any) -> Any:
    """body(slice of the width, carry), chunk by chunk."""
    if width == chunk:
        return body(pl.ds(0, chunk), carry)
    return jax.lax.fori_loop(
        0, width // chunk, lambda i, c: body(pl.ds(i * chunk, chunk), c), carry
    )


def _loaded_ahead(width: int, chunk: int, load: Callable, body: Callable, carry: Any) -> Any:
    """The same with body(slice, load(slice), carry): a chunk comes while the one before is worked
    on."""
    last = width // chunk - 1

    def step(i: Any, both: tuple) -> tuple:
        now, carry = both
        return load(pl.ds((i + 1) * chunk, chunk)), body(pl.ds(i * chunk, chunk), now, carry)

    now, carry = jax.lax.fori_loop(0, last, step, (load(pl.ds(0, chunk)), carry))
    return body(pl.ds(last * chunk, chunk), now, carry)


def _special(instruction: str, x: jax.Array) -> jax.Array:
    """One instruction of the special function unit: a reciprocal within one place, a logarithm to
    base 2 within 2^-22, of numbers near 1 absolutely; denormals count as zero (PTX ISA)."""
    (out,) = plt.elementwise_inline_asm(
        f"{instruction} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


@jax.custom_jvp
def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x. Triton's own division takes several times as many instructions."""
    return 1 / x if jax.default_backend() == "cpu" else _special("rcp.approx.ftz.f32", x)


@reciprocal.defjvp
def _reciprocal_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    r = reciprocal(*primals)
    return r, -(r * r) * tangents[0]


@jax.custom_jvp
def log(x: jax.Array) -> jax.Array:
    """The natural logarithm; Triton's own is a function of the library, with branches."""
    if jax.default_backend() == "cpu":
        return jnp.log(x)
    return _special("lg2.approx.ftz.f32", x) * math.log(2)


@log.defjvp
def _log_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return log(*primals), reciprocal(*primals) * tangents[0]


SPECIAL = {"reciprocal": reciprocal, "log": log}


def index(index: int) -> jax.Array:
    """An index that a masked load or store takes, interpreted too."""
    return jnp.int32(index)


def _row(ref: Any, t: Any) -> list:
    """Token t's coefficients as scalars: its own, or those that all share."""
    at = t if ref.shape[0] > 1 else 0
    return [ref[at, c] for c in range(ref.shape[1])]


def added(terms: list) -> jax.Array:
    """The terms, added from the left."""
    return sum(terms[1:], terms[0])


def _weighted(weights: list, vectors: list) -> jax.Array:
    return added([w * v for w, v in zip(weights, vectors, strict=True)])


def put(ref: Any, t: Any, numbers: list) -> None:
    """Numbers to a token's row, many at once."""
    for start, size in in_powers(len(numbers)):
        at, own = jnp.arange(size), enumerate(numbers[start : start + size])
        ref[t, pl.ds(start, size)] = added([jnp.where(at == k, v, 0).astype(WIDE) for k, v in own])


def _lane_sums(v: jax.Array, per_lane: int) -> jax.Array:
    """Each lane's own elements added up; the lanes are added once, at the end."""
    return jnp.sum(v.reshape(-1, per_lane), axis=1)


# --------------------------------------------------------------------------------------------------
# Read and write: one program a token


def read(x: jax.Array, pre: jax.Array, blocks: Blocks) -> jax.Array:
    """u[T, D] of x[T, N, D] and pre[T or 1, N]."""
    T, N, D = x.shape
    chunk = power_of_two(D, blocks.chunk)

    def kernel(x_ref: Any, pre_ref: Any, u_ref: Any) -> None:
        t = T - 1 - pl.program_id(0)
        pre = _row(pre_ref, t)

        def body(d: Any, _: None) -> None:
            x = [x_ref[t, n, d].astype(WIDE) for n in range(N)]
            u_ref[t, d] = _weighted(pre, x).astype(u_ref.dtype)

        _over_width(D, chunk, body, None)

    out = array(x.dtype, T, D)
    return launch(kernel, (T,), out, warps=_warps(chunk, blocks.elements), name="mhc_read")(x, pre)


def read_backward(
    x: jax.Array, pre: jax.Array, du: jax.Array, dx: jax.Array, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """(dx[T, N, D], dpre[T, N]); the cotangent dx that x already has is added to, in place."""
    T, N, D = x.shape
    chunk = power_of_two(D, blocks.chunk)
    per_lane = chunk // 32 // _warps(chunk, blocks.elements)

    def kernel(
        x_ref: Any, pre_ref: Any, du_ref: Any, before_ref: Any, dx_ref: Any, dpre_ref: Any
    ) -> None:
        t = pl.program_id(0)
        pre = _row(pre_ref, t)

        def body(d: Any, sums: tuple) -> tuple:
            du = du_ref[t, d].astype(WIDE)
            found = []
            for n in range(N):
                out = pre[n] * du + before_ref[t, n, d].astype(WIDE)
                dx_ref[t, n, d] = out.astype(dx_ref.dtype)
                found.append(sums[n] + _lane_sums(du * x_ref[t, n, d].astype(WIDE), per_lane))
            return tuple(found)

        sums = _over_width(D, chunk, body, (jnp.zeros(chunk // per_lane, WIDE),) * N)
        for n in range(N):
            dpre_ref[t, n] = jnp.sum(sums[n])

    outputs = (array(x.dtype, T, N, D), array(WIDE, T, N))
    call = launch(
        kernel,
        (T,),
        outputs,
        warps=_warps(chunk, blocks.elements),
        name="mhc_read_backward",
        aliases={3: 0},
    )
    return call(x, pre, du, dx)


def read_dots(x: jax.Array, du: jax.Array, blocks: Blocks) -> jax.Array:
    """dpre[T, N] = du . x[n], alone: what the logits' cotangents need before dx can be made."""
    T, N, D = x.shape
    chunk = power_of_two(D, blocks.chunk)
    per_lane = chunk // 32 // _warps(chunk, blocks.elements)

    def kernel(x_ref: Any, du_ref: Any, dpre_ref: Any) -> None:
        t = T - 1 - pl.program_id(0)

        def body(d: Any, sums: tuple) -> tuple:
            du = du_ref[t, d].astype(WIDE)
            return tuple(
                sums[n] + _lane_sums(du * x_ref[t, n, d].astype(WIDE), per_lane) for n in range(N)
            )

        sums = _over_width(D, chunk, body, (jnp.zeros(chunk // per_lane, WIDE),) * N)
        for n in range(N):
            dpre_ref[t, n] = jnp.sum(sums[n])

    return launch(
        kernel, (T,), array(WIDE, T, N), warps=_warps(chunk, blocks.elements), name="mhc_read_dots"
    )(x, du)


def write(
    x: jax.Array,
    y: jax.Array,
    res: jax.Array,
    post: jax.Array,
    pre: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, ...]:
    """(x'[T, M, D],) of x[T, N, D], y[T, D], res[T or 1, M*N] and post[T or 1, M]; with the pre of
    the next read also u'[T, D], from the streams as they are stored."""
    T, N, D = x.shape
    M = post.shape[1]
    chunk = power_of_two(D, blocks.chunk)

    def kernel(x_ref: Any, y_ref: Any, res_ref: Any, post_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0)
        res, post = _row(res_ref, t), _row(post_ref, t)
        own = _row(refs[0], t) if pre is not None else []
        out_ref = refs[1] if pre is not None else refs[0]

        def body(d: Any, _: None) -> None:
            y = y_ref[t, d].astype(WIDE)
            x = [x_ref[t, n, d].astype(WIDE) for n in range(N)]
            stored = []
            for m in range(M):
                out = _weighted([*res[m * N : m * N + N], post[m]], [*x, y]).astype(out_ref.dtype)
                out_ref[t, m, d] = out
                stored.append(out.astype(WIDE))
            if own:
                refs[2][t, d] = _weighted(own, stored).astype(refs[2].dtype)

        _over_width(D, chunk, body, None)

    outputs = [array(x.dtype, T, M, D)] + [array(x.dtype, T, D)] * (pre is not None)
    name = "mhc_write" if pre is None else "mhc_write_and_read"
    call = launch(kernel, (T,), tuple(outputs), warps=_warps(chunk, blocks.elements), name=name)
    return tuple(call(x, y, res, post, *(() if pre is None else (pre,))))


def write_backward(
    x: jax.Array,
    y: jax.Array,
    res: jax.Array,
    post: jax.Array,
    dout: jax.Array,
    read: Sequence[jax.Array],
    blocks: Blocks,
    *,
    streams: bool,
) -> tuple[jax.Array, ...]:
    """(dy, dres[T, M*N], dpost[T, M]), and dpre[T, M] where there is a next read: its pre and du
    are `read`, which is empty where there is none. With `streams` dx before them."""
    T, N, D = x.shape
    M = post.shape[1]
    fused = bool(read)
    chunk = power_of_two(D, blocks.chunk_backward)
    warps = _warps(chunk, blocks.elements_backward)
    per_lane = chunk // 32 // warps

    def kernel(*refs: Any) -> None:
        x_ref, y_ref, res_ref, post_ref, dout_ref = refs[:5]
        dx_ref: Any = refs[5 + len(read)] if streams else None
        dy_ref, dres_ref, dpost_ref = refs[5 + len(read) + streams :][:3]
        t = pl.program_id(0)
        res, post = _row(res_ref, t), _row(post_ref, t)
        own = _row(refs[5], t) if fused else []

        def load(d: Any) -> tuple:
            dout = [dout_ref[t, m, d] for m in range(M)]
            x = [x_ref[t, n, d] for n in range(N)]
            return dout, x, y_ref[t, d], refs[6][t, d] if fused else None

        def body(d: Any, loaded: tuple, sums: tuple) -> tuple:
            dout, x, y, du = jax.tree.map(lambda a: a.astype(WIDE), loaded)
            # First what wants all that was loaded: ptxas then has all loads in flight at once.
            dots = [du * v for v in (*x, y)] if fused else []
            if fused:
                dout = [g + p * du for g, p in zip(dout, own, strict=True)]
            for n in range(N) if streams else ():
                dx = _weighted([res[m * N + n] for m in range(M)], dout)
                dx_ref[t, n, d] = dx.astype(dx_ref.dtype)
            dy_ref[t, d] = _weighted(post, dout).astype(dy_ref.dtype)
            products = [g * v for g in dout for v in x] + [g * y for g in dout] + dots
            return tuple(s + _lane_sums(p, per_lane) for s, p in zip(sums, products, strict=True))

        count = M * N + M + (N + 1) * fused
        zeros = (jnp.zeros(chunk // per_lane, WIDE),) * count
        sums = [jnp.sum(s) for s in _loaded_ahead(D, chunk, load, body, zeros)]
        put(dres_ref, t, sums[: M * N])
        put(dpost_ref, t, sums[M * N : M * N + M])
        if fused:
            # du . x'[m], x' being the weighted sum that was read: its rounding is left out.
            dots = sums[M * N + M :]
            rows = [[*res[m * N : m * N + N], post[m]] for m in range(M)]
            put(refs[-1], t, [_weighted(row, dots) for row in rows])

    outputs = [
        *[array(x.dtype, T, N, D)] * streams,
        array(y.dtype, T, D),
        array(WIDE, T, M * N),
        array(WIDE, T, M),
        *[array(WIDE, T, M)] * fused,
    ]
    name = "mhc_write_and_read_backward" if fused else "mhc_write_backward"
    call = launch(kernel, (T,), tuple(outputs), warps=warps, name=name)
    return tuple(call(x, y, res, post, dout, *read))
