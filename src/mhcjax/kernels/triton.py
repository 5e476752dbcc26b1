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


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """a b + c, in one instruction and rounded once: Triton, as XLA runs it, takes two.

    Of single numbers as it is: inline assembly gives Triton an array."""
    shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
    if jax.default_backend() == "cpu" or not shape:
        return a * b + c
    (out,) = plt.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(v, shape) for v in (a, b, c)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[array(WIDE, *shape)],
    )
    return out


def wide(v: jax.Array) -> jax.Array:
    """v in float32: two instructions for two bfloat16s of a register, where Triton takes four."""
    if v.dtype != jnp.bfloat16 or jax.default_backend() == "cpu":
        return v.astype(WIDE)
    (out,) = plt.elementwise_inline_asm(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        args=[v],
        constraints="=r,=r,r",
        pack=2,
        result_shape_dtypes=[array(WIDE, *v.shape)],
    )
    return out


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
    total = weights[0] * vectors[0]
    for w, v in zip(weights[1:], vectors[1:], strict=True):
        total = fma(w, v, total)
    return total


def put(ref: Any, t: Any, numbers: list) -> None:
    """Numbers to a token's row, many at once."""
    for start, size in in_powers(len(numbers)):
        at, own = jnp.arange(size), enumerate(numbers[start : start + size])
        ref[t, pl.ds(start, size)] = added([jnp.where(at == k, v, 0).astype(WIDE) for k, v in own])


def apart(tile: jax.Array, axis: int) -> list[jax.Array]:
    """The rows or columns of a tile."""
    return [part.reshape(-1) for part in jnp.split(tile, tile.shape[axis], axis=axis)]


def together(columns: list, like: jax.Array) -> jax.Array:
    """[lanes, columns], a power of two of them, joined in pairs: what Triton can."""
    if len(columns) == 1:
        return jnp.broadcast_to(columns[0], like.shape)[:, None]
    pair = [together(columns[k::2], like)[..., None] for k in (0, 1)]
    return jnp.concatenate(pair, axis=-1).reshape(-1, len(columns))


def _own(v: jax.Array, per_lane: int) -> list[jax.Array]:
    """Each lane's own elements of a vector, in float32: [lanes], so many times."""
    return apart(wide(v).reshape(-1, per_lane), 1)


def _whole(elements: list[jax.Array]) -> jax.Array:
    """The vector that `_own` took apart."""
    return together(elements, elements[0]).reshape(-1)


def _dot(total: jax.Array, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """total[lanes] + each lane's own part of a . b; the lanes are added once, at the end."""
    for p, q in zip(a, b, strict=True):
        total = fma(p, q, total)
    return total


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
            x = [wide(x_ref[t, n, d]) for n in range(N)]
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
            du = _own(du_ref[t, d], per_lane)
            found = []
            for n in range(N):
                before = _own(before_ref[t, n, d], per_lane)
                out = [fma(pre[n], g, b) for g, b in zip(du, before, strict=True)]
                dx_ref[t, n, d] = _whole(out).astype(dx_ref.dtype)
                found.append(_dot(sums[n], du, _own(x_ref[t, n, d], per_lane)))
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
            du = _own(du_ref[t, d], per_lane)
            return tuple(_dot(sums[n], du, _own(x_ref[t, n, d], per_lane)) for n in range(N))

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
        # With a read from the last token on: there the projection left x in the cache, and the next
        # one begins where this ends.
        t = pl.program_id(0) if pre is None else T - 1 - pl.program_id(0)
        res, post = _row(res_ref, t), _row(post_ref, t)
        own = _row(refs[0], t) if pre is not None else []
        out_ref = refs[1] if pre is not None else refs[0]

        def body(d: Any, _: None) -> None:
            y = wide(y_ref[t, d])
            x = [wide(x_ref[t, n, d]) for n in range(N)]
            stored = []
            for m in range(M):
                out = _weighted([*res[m * N : m * N + N], post[m]], [*x, y]).astype(out_ref.dtype)
                out_ref[t, m, d] = out
                stored.append(wide(out))
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
    count = M * N + M  # of the sums, without those of the next read

    def kernel(*refs: Any) -> None:
        x_ref, y_ref, res_ref, post_ref, dout_ref = refs[:5]
        dx_ref: Any = refs[5 + len(read)] if streams else None
        dy_ref, dres_ref, dpost_ref = refs[5 + len(read) + streams :][:3]
        # From the last token on, as in `write`.
        t = T - 1 - pl.program_id(0) if fused else pl.program_id(0)
        res, post = _row(res_ref, t), _row(post_ref, t)
        own = _row(refs[5], t) if fused else []

        def load(d: Any) -> tuple:
            dout = [dout_ref[t, m, d] for m in range(M)]
            x = [x_ref[t, n, d] for n in range(N)]
            return dout, x, y_ref[t, d], refs[6][t, d] if fused else None

        def body(d: Any, loaded: tuple, sums: tuple) -> tuple:
            dout, x, y, du = jax.tree.map(lambda v: _own(v, per_lane), loaded)
            # First what wants all that was loaded: ptxas then has all loads in flight at once.
            vectors = (*x, y) if fused else ()
            dots = [_dot(s, du, v) for s, v in zip(sums[count:], vectors, strict=True)]
            if fused:
                dout = [
                    [fma(p, a, b) for a, b in zip(du, g, strict=True)]
                    for g, p in zip(dout, own, strict=True)
                ]

            def mixed(weights: list) -> jax.Array:
                return _whole([_weighted(weights, list(g)) for g in zip(*dout, strict=True)])

            for n in range(N) if streams else ():
                dx = mixed([res[m * N + n] for m in range(M)])
                dx_ref[t, n, d] = dx.astype(dx_ref.dtype)
            dy_ref[t, d] = mixed(post).astype(dy_ref.dtype)
            pairs = [(g, v) for g in dout for v in x] + [(g, y) for g in dout]
            found = [_dot(s, *pair) for s, pair in zip(sums[:count], pairs, strict=True)]
            return (*found, *dots)

        zeros = (jnp.zeros(chunk // per_lane, WIDE),) * (count + (N + 1) * fused)
        if fused:  # more sums: what is loaded ahead would take the registers of other programs
            sums = _over_width(D, chunk, lambda d, sums: body(d, load(d), sums), zeros)
        else:
            sums = _loaded_ahead(D, chunk, load, body, zeros)
        sums = [jnp.sum(s) for s in sums]
        put(dres_ref, t, sums[: M * N])
        put(dpost_ref, t, sums[M * N : count])
        if fused:
            # du . x'[m], x' being the weighted sum that was read: its rounding is left out.
            dots = sums[count:]
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
