"""The kernels: Pallas, lowered through Triton. One program is one token wherever a token's sums are
over the width; the projection alone works on tiles of tokens, for the tensor cores.

Axis key: T token (leading axes flattened), N source stream, M destination stream, D width,
E = N*D flattened, C coefficient column, P part of a weight split into bfloat16s, S split of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.lanes import on_lanes

WIDE = jnp.float32


def _call(
    kernel: Callable,
    grid: tuple[int, ...],
    outputs: Any,
    *,
    warps: int,
    stages: int = 2,
    name: str,
    aliases: dict[int, int] | None = None,
) -> Callable:
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


def _shape(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _chunk(width: int, most: int) -> int:
    """The largest power of two that divides the width, at most `most`."""
    return min(most, width & -width)


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


def _i(index: int) -> jax.Array:
    """An index that a masked load or store takes, interpreted too."""
    return jnp.int32(index)


def _row(ref: Any, t: Any) -> list:
    """Token t's coefficients as scalars: its own, or those that all share."""
    at = t if ref.shape[0] > 1 else 0
    return [ref[at, c] for c in range(ref.shape[1])]


def _sum(terms: list) -> jax.Array:
    return sum(terms[1:], terms[0])


def _weighted(weights: list, vectors: list) -> jax.Array:
    return _sum([w * v for w, v in zip(weights, vectors, strict=True)])


def _lane_sums(v: jax.Array, per_lane: int) -> jax.Array:
    """Each lane's own elements added up; the lanes are added once, at the end."""
    return jnp.sum(v.reshape(-1, per_lane), axis=1)


# --------------------------------------------------------------------------------------------------
# Read and write: one program a token


def read(x: jax.Array, pre: jax.Array, blocks: Blocks) -> jax.Array:
    """u[T, D] of x[T, N, D] and pre[T or 1, N]."""
    T, N, D = x.shape
    chunk = _chunk(D, blocks.chunk)

    def kernel(x_ref: Any, pre_ref: Any, u_ref: Any) -> None:
        t = T - 1 - pl.program_id(0)
        pre = _row(pre_ref, t)

        def body(d: Any, _: None) -> None:
            x = [x_ref[t, n, d].astype(WIDE) for n in range(N)]
            u_ref[t, d] = _weighted(pre, x).astype(u_ref.dtype)

        _over_width(D, chunk, body, None)

    out = _shape(x.dtype, T, D)
    return _call(kernel, (T,), out, warps=_warps(chunk, blocks.elements), name="mhc_read")(x, pre)


def read_backward(
    x: jax.Array, pre: jax.Array, du: jax.Array, dx: jax.Array | None, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """(dx[T, N, D], dpre[T, N]); a cotangent dx that x already has is added to, in place."""
    T, N, D = x.shape
    chunk = _chunk(D, blocks.chunk)
    per_lane = chunk // 32 // _warps(chunk, blocks.elements)

    def kernel(x_ref: Any, pre_ref: Any, du_ref: Any, *refs: Any) -> None:
        before_ref = refs[0] if dx is not None else None
        dx_ref, dpre_ref = refs[-2:]
        t = pl.program_id(0)
        pre = _row(pre_ref, t)

        def body(d: Any, sums: tuple) -> tuple:
            du = du_ref[t, d].astype(WIDE)
            found = []
            for n in range(N):
                out = pre[n] * du
                if before_ref is not None:
                    out = out + before_ref[t, n, d].astype(WIDE)
                dx_ref[t, n, d] = out.astype(dx_ref.dtype)
                found.append(sums[n] + _lane_sums(du * x_ref[t, n, d].astype(WIDE), per_lane))
            return tuple(found)

        sums = _over_width(D, chunk, body, (jnp.zeros(chunk // per_lane, WIDE),) * N)
        for n in range(N):
            dpre_ref[t, n] = jnp.sum(sums[n])

    outputs = (_shape(x.dtype, T, N, D), _shape(WIDE, T, N))
    call = _call(
        kernel,
        (T,),
        outputs,
        warps=_warps(chunk, blocks.elements),
        name="mhc_read_backward",
        aliases={3: 0} if dx is not None else None,
    )
    return call(x, pre, du, *(() if dx is None else (dx,)))


def read_dots(x: jax.Array, du: jax.Array, blocks: Blocks) -> jax.Array:
    """dpre[T, N] = du . x[n], alone: what the logits' cotangents need before dx can be made."""
    T, N, D = x.shape
    chunk = _chunk(D, blocks.chunk)
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

    return _call(
        kernel, (T,), _shape(WIDE, T, N), warps=_warps(chunk, blocks.elements), name="mhc_read_dots"
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
    chunk = _chunk(D, blocks.chunk)

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

    outputs = [_shape(x.dtype, T, M, D)] + [_shape(x.dtype, T, D)] * (pre is not None)
    name = "mhc_write" if pre is None else "mhc_write_and_read"
    call = _call(kernel, (T,), tuple(outputs), warps=_warps(chunk, blocks.elements), name=name)
    return tuple(call(x, y, res, post, *(() if pre is None else (pre,))))


def write_backward(
    x: jax.Array,
    y: jax.Array,
    res: jax.Array,
    post: jax.Array,
    dout: jax.Array,
    read: Sequence[jax.Array],
    blocks: Blocks,
) -> tuple[jax.Array, ...]:
    """(dx, dy, dres[T, M*N], dpost[T, M]), and dpre[T, M] where there is a next read: its pre and
    du are `read`, which is empty where there is none."""
    T, N, D = x.shape
    M = post.shape[1]
    chunk = _chunk(D, blocks.chunk_backward)
    per_lane = chunk // 32 // _warps(chunk, blocks.elements_backward)
    fused = bool(read)

    def kernel(*refs: Any) -> None:
        x_ref, y_ref, res_ref, post_ref, dout_ref = refs[:5]
        dx_ref, dy_ref, dres_ref, dpost_ref = refs[7:11] if fused else refs[5:9]
        t = pl.program_id(0)
        res, post = _row(res_ref, t), _row(post_ref, t)
        own = _row(refs[5], t) if fused else []

        def body(d: Any, sums: tuple) -> tuple:
            dout = [dout_ref[t, m, d].astype(WIDE) for m in range(M)]
            x = [x_ref[t, n, d].astype(WIDE) for n in range(N)]
            y, found = y_ref[t, d].astype(WIDE), []
            if fused:
                du = refs[6][t, d].astype(WIDE)
                for m in range(M):
                    out = _weighted([*res[m * N : m * N + N], post[m]], [*x, y])
                    found.append(du * out.astype(x_ref.dtype).astype(WIDE))
                dout = [g + p * du for g, p in zip(dout, own, strict=True)]
            for n in range(N):
                dx = _weighted([res[m * N + n] for m in range(M)], dout)
                dx_ref[t, n, d] = dx.astype(dx_ref.dtype)
            dy_ref[t, d] = _weighted(post, dout).astype(dy_ref.dtype)
            products = [g * v for g in dout for v in x] + [g * y for g in dout] + found
            return tuple(s + _lane_sums(p, per_lane) for s, p in zip(sums, products, strict=True))

        count = M * N + M + M * fused
        sums = _over_width(D, chunk, body, (jnp.zeros(chunk // per_lane, WIDE),) * count)
        sums = [jnp.sum(s) for s in sums]
        for i in range(M * N):
            dres_ref[t, i] = sums[i]
        for m in range(M):
            dpost_ref[t, m] = sums[M * N + m]
            if fused:
                refs[-1][t, m] = sums[M * N + M + m]

    outputs = [
        _shape(x.dtype, T, N, D),
        _shape(y.dtype, T, D),
        _shape(WIDE, T, M * N),
        _shape(WIDE, T, M),
        *[_shape(WIDE, T, M)] * fused,
    ]
    name = "mhc_write_and_read_backward" if fused else "mhc_write_backward"
    call = _call(
        kernel, (T,), tuple(outputs), warps=_warps(chunk, blocks.elements_backward), name=name
    )
    return tuple(call(x, y, res, post, dout, *read))


# --------------------------------------------------------------------------------------------------
# Coefficients: the projection on tiles of tokens, then everything per token on lanes


def parts(w_EC: jax.Array, dtype: Any, count: int, columns: int) -> jax.Array:
    """[P, E, columns]: the weight in the streams' dtype, padded by zeros; for bfloat16 as a sum of
    `count` of them, of which three are exact."""
    rest = jnp.pad(w_EC.astype(WIDE), ((0, 0), (0, columns - w_EC.shape[1])))
    if dtype != jnp.bfloat16:
        return rest[None]
    found = []
    for _ in range(count):
        # Not a cast there and back, which XLA may drop.
        high = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(high.astype(dtype))
        rest = rest - high
    return jnp.stack(found)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == WIDE else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=WIDE)


def _two(a: jax.Array, dtype: Any) -> list[jax.Array]:
    """a as a sum of arrays of the dtype: of two bfloat16s, or itself."""
    if dtype == WIDE:
        return [a]
    high = a.astype(dtype)
    return [high, (a - high.astype(WIDE)).astype(dtype)]


def project(x: jax.Array, w_PEC: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """(x @ w, sum of squares of x) of x[T, E], in S sums over parts of E: [S, C, T], [S, T]."""
    T, E = x.shape
    P, _, C = w_PEC.shape
    rows, step = blocks.rows, _chunk(E, blocks.step)
    split = next(s for s in range(min(blocks.split, E // step), 0, -1) if E // step % s == 0)

    def kernel(x_ref: Any, w_ref: Any, z_ref: Any, square_ref: Any) -> None:
        s, t = pl.program_id(0), pl.program_id(1) * rows
        inside = t + jnp.arange(rows) < T

        def body(i: Any, carry: tuple) -> tuple:
            z, square = carry
            e = (s * (E // step // split) + i) * step
            x = plt.load(x_ref.at[pl.ds(t, rows), pl.ds(e, step)], mask=inside[:, None], other=0.0)
            for p in reversed(range(P)):
                z = z + _dot(x, w_ref[p, pl.ds(e, step), :], (1, 0))
            return z, square + jnp.sum(jnp.square(x.astype(WIDE)), axis=1)

        zeros = (jnp.zeros((rows, C), WIDE), jnp.zeros(rows, WIDE))
        z, square = jax.lax.fori_loop(0, E // step // split, body, zeros)
        plt.store(z_ref.at[s, :, pl.ds(t, rows)], z.T, mask=inside[None, :])
        plt.store(square_ref.at[s, pl.ds(t, rows)], square, mask=inside)

    outputs = (_shape(WIDE, split, C, T), _shape(WIDE, split, T))
    call = _call(
        kernel,
        (split, pl.cdiv(T, rows)),
        outputs,
        warps=blocks.warps,
        stages=blocks.stages,
        name="mhc_project",
    )
    return call(x, w_PEC)


def coefficients(
    f: Callable,
    sizes: tuple[int, ...],
    z: jax.Array,
    square: jax.Array,
    bias: jax.Array,
    inputs: int,
    blocks: Blocks,
) -> tuple[jax.Array, ...]:
    """(z[C, T], mean square[T], then the outputs of f[T, size] each) of the sums that `project`
    made; `f(z[C], mean square[], bias[C])` is what one token does with them."""
    S, _, T = z.shape
    C, lanes = bias.shape[0], blocks.lanes
    run = on_lanes(f, [(C,), (), (C,)], differentiable=False)

    def kernel(z_ref: Any, square_ref: Any, bias_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0) * lanes
        inside = t + jnp.arange(lanes) < T
        # A token past the end is one of ones, so that nothing divides by zero.
        load = partial(plt.load, mask=inside, other=1.0)
        put = partial(plt.store, mask=inside)
        here = pl.ds(t, lanes)
        total = [_sum([load(z_ref.at[_i(s), _i(c), here]) for s in range(S)]) for c in range(C)]
        mean = _sum([load(square_ref.at[_i(s), here]) for s in range(S)]) / inputs
        for c in range(C):
            put(refs[0].at[_i(c), here], total[c])
        put(refs[1].at[here], mean)
        bias = [jnp.full(lanes, bias_ref[c], WIDE) for c in range(C)]
        for ref, columns in zip(refs[2:], run(total, [mean], bias), strict=True):
            for k, column in enumerate(columns):
                put(ref.at[here, _i(k)], jnp.broadcast_to(jnp.asarray(column, WIDE), (lanes,)))

    outputs = (_shape(WIDE, C, T), _shape(WIDE, T), *(_shape(WIDE, T, k) for k in sizes))
    call = _call(
        kernel, (pl.cdiv(T, lanes),), outputs, warps=max(lanes // 32, 1), name="mhc_coefficients"
    )
    return tuple(call(z, square, bias))


def coefficients_backward(
    f: Callable,
    z_CT: jax.Array,
    mean_T: jax.Array,
    bias: jax.Array,
    cotangents: Sequence[Sequence[jax.Array]],
    columns: int,
    inputs: int,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dz[columns, T], what x is multiplied by[T], dbias summed by program[programs, C]).

    `cotangents` holds, for each output of f, the arrays [T, size] that add up to its cotangent."""
    C, T = z_CT.shape
    lanes = blocks.lanes
    programs = pl.cdiv(T, lanes)
    run = on_lanes(f, [(C,), (), (C,)])
    counts = [len(group) for group in cotangents]

    def kernel(z_ref: Any, mean_ref: Any, bias_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0) * lanes
        inside = t + jnp.arange(lanes) < T
        load, put, here = partial(plt.load, mask=inside), plt.store, pl.ds(t, lanes)
        arguments = (
            [load(z_ref.at[_i(c), here], other=1.0) for c in range(C)],
            [load(mean_ref.at[here], other=1.0)],
            [jnp.full(lanes, bias_ref[c], WIDE) for c in range(C)],
        )
        outs, pull = jax.vjp(lambda *a: run(*a), *arguments)
        given, groups = iter(refs[: sum(counts)]), []
        for count, out in zip(counts, outs, strict=True):
            own = [next(given) for _ in range(count)]
            groups.append(
                [_sum([load(r.at[here, _i(k)], other=0.0) for r in own]) for k in range(len(out))]
            )
        dz, (dmean,), dbias = pull(groups)
        dz_ref, scale_ref, dbias_ref = refs[-3:]
        for c in range(columns):
            column = dz[c] if c < C else jnp.zeros(lanes, WIDE)
            put(dz_ref.at[_i(c), here], column, mask=inside)
        put(scale_ref.at[here], dmean * (2 / inputs), mask=inside)
        for c in range(C):
            dbias_ref[pl.program_id(0), c] = jnp.sum(dbias[c])

    outputs = (_shape(WIDE, columns, T), _shape(WIDE, T), _shape(WIDE, programs, C))
    call = _call(
        kernel, (programs,), outputs, warps=max(lanes // 32, 1), name="mhc_coefficients_backward"
    )
    flat = [array for group in cotangents for array in group]
    return call(z_CT, mean_T, bias, *flat)


def project_backward(
    x: jax.Array,
    w_PEC: jax.Array,
    dz: jax.Array,
    scale: jax.Array,
    pre: jax.Array | None,
    du: jax.Array | None,
    dx: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """(dx[T, E], dw summed by split[S, E, C]): `dx + pre du + scale x + dz w^T`, and `x^T dz`.

    Without pre and du the read is left out; a cotangent dx that x already has is added to, in
    place."""
    T, E = x.shape
    C = w_PEC.shape[2]
    N = pre.shape[1] if pre is not None else 1
    D = E // N
    rows, step = blocks.rows_backward, _chunk(D, blocks.step_backward)
    tiles = pl.cdiv(T, rows)
    split = min(blocks.split_backward, tiles)
    each = pl.cdiv(tiles, split)

    def kernel(x_ref: Any, w_ref: Any, dz_ref: Any, scale_ref: Any, *refs: Any) -> None:
        # Programs of one slice of the width follow each other: their du comes out of the cache.
        j, s = pl.program_id(0), pl.program_id(1)
        n, d = j % N, j // N * step
        at = n * D + d
        here = pl.ds(at, step)
        own = list(refs)
        pre_ref, du_ref = (own.pop(0), own.pop(0)) if pre is not None else (None, None)
        before_ref = own.pop(0) if dx is not None else None
        dx_ref, dw_ref = own
        w = w_ref[0, here, :]

        def body(i: Any, dw: jax.Array) -> jax.Array:
            # All programs walk over the tokens side by side, so that they share the cache.
            t = (i * split + s) * rows
            inside = t + jnp.arange(rows) < T
            load = partial(plt.load, mask=inside[:, None], other=0.0)
            x = load(x_ref.at[pl.ds(t, rows), here])
            dz_CT = plt.load(dz_ref.at[:, pl.ds(t, rows)], mask=inside[None, :], other=0.0)
            dz = _two(dz_CT.T, x.dtype)
            scale = plt.load(scale_ref.at[pl.ds(t, rows)], mask=inside, other=0.0)
            # Both rounded to the dtype of the streams, as dx itself will be.
            out = scale[:, None] * x.astype(WIDE) + _dot(dz[0], w, (1, 1))
            if pre_ref is not None and du_ref is not None:
                pre = plt.load(pre_ref.at[pl.ds(t, rows), n], mask=inside, other=0.0)
                du = load(du_ref.at[pl.ds(t, rows), pl.ds(d, step)])
                out = out + pre[:, None] * du.astype(WIDE)
            if before_ref is not None:
                out = out + load(before_ref.at[pl.ds(t, rows), here]).astype(WIDE)
            plt.store(
                dx_ref.at[pl.ds(t, rows), here], out.astype(dx_ref.dtype), mask=inside[:, None]
            )
            for g in dz:
                dw = dw + _dot(x, g, (0, 0))
            return dw

        dw_ref[s, here, :] = jax.lax.fori_loop(0, each, body, jnp.zeros((step, C), WIDE))

    inputs = [x, w_PEC, dz, scale] + [a for a in (pre, du, dx) if a is not None]
    call = _call(
        kernel,
        (E // step, split),
        (_shape(x.dtype, T, E), _shape(WIDE, split, E, C)),
        warps=blocks.warps_backward,
        stages=blocks.stages_backward,
        name="mhc_project_backward",
        aliases={len(inputs) - 1: 0} if dx is not None else None,
    )
    return call(*inputs)
