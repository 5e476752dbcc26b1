"""The kernels behind coefficients of a token's own streams, through Triton: the projection on tiles
of tokens, for the tensor cores, then everything that is a token's own with tokens on lanes.

Axis key: T token (leading axes flattened), N source stream, D width, E = N*D flattened,
C coefficient column, padded, S split of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.lanes import on_lanes
from mhcjax.kernels.triton import (
    SPECIAL,
    WIDE,
    added,
    apart,
    array,
    in_powers,
    index,
    largest_divisor,
    launch,
    power_of_two,
    together,
)


def weights(w_EC: jax.Array, dtype: Any) -> jax.Array:
    """The weight as the kernels take it, its columns padded by zeros: float32 as it is; for
    bfloat16 streams [high | high | high | low], two pairs for the two products, where high + low
    is the weight to 2^-17, five hundred times finer than the streams themselves."""
    count = w_EC.shape[1]
    columns = max(32, 1 << (count - 1).bit_length())  # what a product on tensor cores takes
    padded = jnp.pad(w_EC.astype(WIDE), ((0, 0), (0, columns - count)))
    if dtype != jnp.bfloat16:
        return padded
    # Not a cast there and back, which XLA may drop.
    high = jax.lax.reduce_precision(padded, exponent_bits=8, mantissa_bits=7)
    # Chosen, not concatenated, which XLA does in twice the time.
    low = jnp.arange(4)[:, None] == 3
    packed = jnp.where(low, (padded - high)[:, None], high[:, None])
    return packed.reshape(w_EC.shape[0], -1).astype(dtype)


def columns_of(w: jax.Array) -> int:
    """C, padded, of what `weights` returned."""
    return w.shape[1] // (4 if w.dtype == jnp.bfloat16 else 1)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == WIDE else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=WIDE)


def _dots(pairs: list[tuple[jax.Array, jax.Array]], over: tuple[int, int]) -> jax.Array:
    """The sum of products, small ones first, for a loop to add to what it carries.

    Not carried from product to product. Triton lets a product on Hopper's tensor cores that a loop
    carries run on while it loads the tiles of two steps ahead, and where a tile is wanted as
    numbers too, as x is, over the tile that the product still reads: of 128 columns a product was
    off by 8 %, another in every run, of fewer it was right by luck (Triton of JAX 0.11.2). Of
    float32 there is one product, carried: at full precision it is no tensor core's."""
    return added([_dot(a, b, over) for a, b in pairs])


def _two(a: jax.Array, dtype: Any) -> list[jax.Array]:
    """a as a sum of arrays of the dtype: of two bfloat16s, or itself."""
    if dtype == WIDE:
        return [a]
    high = a.astype(dtype)
    return [high, (a - high.astype(WIDE)).astype(dtype)]


def project(x: jax.Array, w: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """(x @ w, sum of squares of x) of x[T, E], in S sums over parts of E: [S, T, C], [S, T]."""
    T, E = x.shape
    C = columns_of(w)
    parts = [0] if w.shape[1] == C else [3 * C, 2 * C]  # small ones first
    rows, step = blocks.rows, power_of_two(E, blocks.step)
    split = largest_divisor(E // step, blocks.split)

    def kernel(x_ref: Any, w_ref: Any, z_ref: Any, square_ref: Any) -> None:
        s, t = pl.program_id(0), pl.program_id(1) * rows
        inside = t + jnp.arange(rows) < T

        def body(i: Any, carry: tuple) -> tuple:
            z, square = carry
            e = (s * (E // step // split) + i) * step
            x = plt.load(x_ref.at[pl.ds(t, rows), pl.ds(e, step)], mask=inside[:, None], other=0.0)
            z = z + _dots([(x, w_ref[pl.ds(e, step), pl.ds(p, C)]) for p in parts], (1, 0))
            return z, square + jnp.sum(jnp.square(x.astype(WIDE)), axis=1)

        zeros = (jnp.zeros((rows, C), WIDE), jnp.zeros(rows, WIDE))
        z, square = jax.lax.fori_loop(0, E // step // split, body, zeros)
        plt.store(z_ref.at[s, pl.ds(t, rows), :], z, mask=inside[:, None])
        plt.store(square_ref.at[s, pl.ds(t, rows)], square, mask=inside)

    outputs = (array(WIDE, split, T, C), array(WIDE, split, T))
    call = launch(
        kernel,
        (split, pl.cdiv(T, rows)),
        outputs,
        warps=blocks.warps,
        stages=blocks.stages,
        name="mhc_project",
    )
    return call(x, w)


# Few loads and stores of many numbers each: Triton's compiler looks at the whole kernel for every
# one, and one for each number would take it minutes in the backward pass of 8 streams.


def _columns(ref: Any, here: Any, inside: jax.Array, other: float) -> list[jax.Array]:
    """The columns [lanes] of the rows ref[here], of ref[T, columns]."""
    tiles = [
        plt.load(ref.at[here, pl.ds(c, size)], mask=inside[:, None], other=other)
        for c, size in in_powers(ref.shape[1])
    ]
    return [column for tile in tiles for column in apart(tile, 1)]


def _rows(ref: Any, here: Any, inside: jax.Array, other: float) -> list[jax.Array]:
    """The same of ref[columns, T]."""
    tiles = [
        plt.load(ref.at[pl.ds(c, size), here], mask=inside[None], other=other)
        for c, size in in_powers(ref.shape[0])
    ]
    return [row for tile in tiles for row in apart(tile, 0)]


def _put_columns(ref: Any, here: Any, columns: list, inside: jax.Array) -> None:
    """Columns [lanes] to ref[here], of ref[T, columns]."""
    for c, size in in_powers(len(columns)):
        tile = together(columns[c : c + size], inside).astype(ref.dtype)
        plt.store(ref.at[here, pl.ds(c, size)], tile, mask=inside[:, None])


def _put_rows(ref: Any, start: int, here: Any, rows: list, inside: jax.Array) -> None:
    """Rows [lanes] to ref[start:, here], of ref[rows, T]."""
    for c, size in in_powers(len(rows)):
        tile = together(rows[c : c + size], inside).astype(ref.dtype).T
        plt.store(ref.at[pl.ds(start + c, size), here], tile, mask=inside[None])


def _full(bias_ref: Any, lanes: int) -> list[jax.Array]:
    """Every number of the bias on all lanes."""
    return [jnp.full(lanes, bias_ref[c], WIDE) for c in range(bias_ref.shape[0])]


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
    S, T, _ = z.shape
    C, lanes = bias.shape[0], blocks.lanes
    run = on_lanes(f, [(C,), (), (C,)], differentiable=False, special=SPECIAL)

    def kernel(z_ref: Any, square_ref: Any, bias_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0) * lanes
        inside = t + jnp.arange(lanes) < T
        # A token past the end is one of ones, so that nothing divides by zero.
        here = pl.ds(t, lanes)
        tiles = [
            plt.load(z_ref.at[index(s), here, :], mask=inside[:, None], other=1.0) for s in range(S)
        ]
        total = apart(added(tiles), 1)[:C]
        squares = [
            plt.load(square_ref.at[index(s), here], mask=inside, other=1.0) for s in range(S)
        ]
        mean = added(squares) / inputs
        _put_rows(refs[0], 0, here, total, inside)
        plt.store(refs[1].at[here], mean, mask=inside)
        for ref, columns in zip(refs[2:], run(total, [mean], _full(bias_ref, lanes)), strict=True):
            _put_columns(ref, here, columns, inside)

    outputs = (array(WIDE, C, T), array(WIDE, T), *(array(WIDE, T, k) for k in sizes))
    call = launch(
        kernel, (pl.cdiv(T, lanes),), outputs, warps=max(lanes // 32, 1), name="mhc_coefficients"
    )
    return tuple(call(z, square, bias))


def coefficients_backward(
    f: Callable,
    rows: Callable,
    z_CT: jax.Array,
    mean_T: jax.Array,
    bias: jax.Array,
    cotangents: Sequence[Sequence[jax.Array]],
    columns: int,
    dtype: Any,
    inputs: int,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dz, scalars[rows, T], dbias summed by program[C, programs]).

    dz is [columns, T] in float32, or its [high | low] parts in bfloat16: tokens last, as on the
    lanes. The scalars are what x is multiplied by, then `rows(outputs of f)`, numbers too.
    `cotangents` holds, for each output of f, the arrays [T, size] that add up to its cotangent."""
    C, T = z_CT.shape
    lanes = blocks.lanes
    programs = pl.cdiv(T, lanes)
    run = on_lanes(f, [(C,), (), (C,)], special=SPECIAL)
    counts = [len(group) for group in cotangents]
    found = rows([[0.0] * group[0].shape[1] for group in cotangents])

    def kernel(z_ref: Any, mean_ref: Any, bias_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0) * lanes
        inside = t + jnp.arange(lanes) < T
        here = pl.ds(t, lanes)
        arguments = (
            _rows(z_ref, here, inside, 1.0),
            [plt.load(mean_ref.at[here], mask=inside, other=1.0)],
            _full(bias_ref, lanes),
        )
        outs, pull = jax.vjp(lambda *a: run(*a), *arguments)
        given, groups = iter(refs[: sum(counts)]), []
        for count in counts:
            own = [_columns(next(given), here, inside, 0.0) for _ in range(count)]
            groups.append([added(list(k)) for k in zip(*own, strict=True)])
        dz, (dmean,), dbias = pull(groups)
        dz_ref, scalars_ref, dbias_ref = refs[-3:]
        padded = [*dz, *[jnp.zeros(lanes, WIDE)] * (columns - C)]
        for p, part in enumerate(zip(*(_two(column, dtype) for column in padded), strict=True)):
            _put_rows(dz_ref, p * columns, here, list(part), inside)
        _put_rows(scalars_ref, 0, here, [dmean * (2 / inputs), *rows(outs)], inside)
        for c in range(C):
            dbias_ref[c, pl.program_id(0)] = jnp.sum(dbias[c])

    outputs = (
        array(dtype, columns * (1 if dtype == WIDE else 2), T),
        array(WIDE, 1 + len(found), T),
        array(WIDE, C, programs),
    )
    call = launch(
        kernel, (programs,), outputs, warps=max(lanes // 32, 1), name="mhc_coefficients_backward"
    )
    flat = [array for group in cotangents for array in group]
    return call(z_CT, mean_T, bias, *flat)


def project_backward(
    x: jax.Array,
    w: jax.Array,
    dz: jax.Array,
    scalars: jax.Array,
    du: jax.Array | None,
    dout: jax.Array | None,
    blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
    """(dx[T, N, D], dw summed by split[S, E, C]): `scale x + dz w^T`, with du[T, D] also
    `a[n] du`, with the cotangent dout[T, N, D] of what was written, which comes with du, also
    `sum_m res[m, n] dout[m]`; and `x^T dz`.

    scalars[rows, T] has a row of scale, then N of a and N * N of res, as far as they are wanted."""
    T, N, D = x.shape
    C = columns_of(w)
    rows, step = blocks.rows_backward, power_of_two(D, blocks.step_backward)
    tiles = pl.cdiv(T, rows)
    split = min(blocks.split_backward, tiles)
    each = pl.cdiv(tiles, split)

    def kernel(x_ref: Any, w_ref: Any, dz_ref: Any, scalars_ref: Any, *refs: Any) -> None:
        # Programs of one slice of the width follow each other: what they share comes out of the
        # cache.
        j, s = pl.program_id(0), pl.program_id(1)
        n, d = j % N, j // N * step
        here = pl.ds(n * D + d, step)
        *given, dx_ref, dw_ref = refs
        w = w_ref[here, pl.ds(0, C)]

        def body(i: Any, dw: jax.Array) -> jax.Array:
            # All programs walk over the tokens side by side, so that they share the cache.
            t = (i * split + s) * rows
            inside = t + jnp.arange(rows) < T
            here_t = pl.ds(t, rows)

            def load(ref: Any, columns: Any) -> jax.Array:
                return plt.load(ref.at[here_t, columns], mask=inside[:, None], other=0.0)

            def times(row: Any, tile: jax.Array) -> jax.Array:
                numbers = plt.load(scalars_ref.at[row, here_t], mask=inside, other=0.0)
                return numbers[:, None] * tile.astype(WIDE)

            x = load(x_ref, here)
            parts = range(0, dz_ref.shape[0], C)
            dz = [
                plt.load(dz_ref.at[pl.ds(p, C), here_t], mask=inside[None], other=0.0)
                for p in parts
            ]
            # Both rounded to the dtype of the streams, as dx itself will be.
            out = times(index(0), x) + _dot(dz[0], w, (0, 1))
            if du is not None:
                out = out + times(1 + n, load(given[-1], pl.ds(d, step)))
            if dout is not None:
                for m in range(N):
                    out = out + times(1 + N + m * N + n, load(given[0], pl.ds(m * D + d, step)))
            plt.store(dx_ref.at[here_t, here], out.astype(dx_ref.dtype), mask=inside[:, None])
            return dw + _dots([(x, part) for part in reversed(dz)], (0, 1))

        dw_ref[s, here, :] = jax.lax.fori_loop(0, each, body, jnp.zeros((step, C), WIDE))

    call = launch(
        kernel,
        (N * D // step, split),
        (array(x.dtype, T, N * D), array(WIDE, split, N * D, C)),
        warps=blocks.warps_backward,
        stages=blocks.stages_backward,
        name="mhc_project_backward",
    )
    given = [a.reshape(T, -1) for a in (dout, du) if a is not None]
    dx, dw = call(x.reshape(T, -1), w, dz, scalars, *given)
    return dx.reshape(x.shape), dw
