"""The kernel of few tokens, as in decoding: coefficients and read at once, through Triton.

A chain of kernels would cost more in launches than in work. Here one program makes everything of
one token. Nothing is packed either: float32 products of float32 weights.

Axis key: T token (leading axes flattened), N source stream, D width, E = N*D flattened,
C coefficient column.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.lanes import on_lanes
from mhcjax.kernels.triton import SPECIAL, WIDE, added, array, launch, power_of_two


def joined(w_EC: jax.Array, scale_C: jax.Array, bias: Sequence[jax.Array]) -> jax.Array:
    """[E + 2, C]: the parameters as one array, the parts of the bias beside each other.

    As a sum, which XLA makes for all layers of a stack in one launch; a concatenation, or arrays of
    their own, would be launches of every layer."""
    E, C = w_EC.shape
    starts = itertools.accumulate(map(len, bias[:-1]), initial=0)
    parts = [(w_EC, 0, 0), (scale_C[None], E, 0)]
    parts += [(b[None], E + 1, c) for b, c in zip(bias, starts, strict=True)]
    padded = [
        jnp.pad(a, ((e, E + 2 - e - a.shape[0]), (c, C - c - a.shape[1]))) for a, e, c in parts
    ]
    return added(padded).astype(WIDE)


def _in_flight(loads: int, blocks: Blocks) -> int:
    """How many of so many loads are in flight at once."""
    return next(n for n in range(blocks.few_loads, 0, -1) if loads % n == 0)


def mix(
    f: Callable, sizes: tuple[int, ...], x: jax.Array, own: jax.Array, reads: bool, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """(u[T, D] if it `reads`, then the outputs of f[T, size] each) of x[T, N, D] and what `joined`
    returned; `f(z[C], mean square[], bias[C])` is what one token does with `z = x @ w * scale`."""
    T, N, D = x.shape
    E, C = N * D, own.shape[1]
    # Columns in powers of two: loads that are masked would wait for each other.
    parts = [(C >> k + 1 << k + 1, 1 << k) for k in reversed(range(C.bit_length())) if C >> k & 1]
    rows = power_of_two(E, max(1, blocks.few_tile >> (C - 1).bit_length()))
    tiles = _in_flight(E // rows, blocks)
    wide, chunk = power_of_two(E, blocks.few_tile), power_of_two(D, blocks.few_tile)
    several = _in_flight(E // wide, blocks)
    run = on_lanes(f, [(C,), (), (C,)], differentiable=False, special=SPECIAL)

    def kernel(x_ref: Any, own_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0)

        def load(row: Any, count: int) -> list:
            return [own_ref[pl.ds(row, count), pl.ds(c, size)] for c, size in parts]

        def loaded(step: Any) -> list:
            return [load((step * tiles + k) * rows, rows) for k in range(tiles)]

        def added_up(step: Any, weights: list, sums: tuple) -> tuple:
            for k, own in enumerate(weights):
                x = x_ref[t, pl.ds((step * tiles + k) * rows, rows)].astype(WIDE)
                sums = tuple(z + w * x[:, None] for z, w in zip(sums, own, strict=True))
            return sums

        def body(step: Any, carry: tuple) -> tuple:
            weights, sums = carry
            return loaded(step + 1), added_up(step, weights, sums)

        def squares(step: Any, total: jax.Array) -> jax.Array:
            starts = [(step * several + k) * wide for k in range(several)]
            inputs = [x_ref[t, pl.ds(e, wide)].astype(WIDE) for e in starts]
            return total + added([x * x for x in inputs])

        # A step's weights come while those before them are multiplied, not one by one when they are
        # wanted, as the compiler would have it. x is in the cache then: here it is read first.
        last = E // rows // tiles - 1
        start = (loaded(0), tuple(jnp.zeros((rows, size), WIDE) for _, size in parts))
        square = jax.lax.fori_loop(0, E // wide // several, squares, jnp.zeros(wide, WIDE))
        weights, sums = jax.lax.fori_loop(0, last, body, start)
        sums = added_up(last, weights, sums)
        # Numbers as arrays of one lane: a token's products are apart once, then stay in registers.
        products = []
        for (_, size), z, scale in zip(parts, sums, load(E, 1), strict=True):
            z = jnp.sum(z, axis=0) * jnp.sum(scale, axis=0)
            each = [jnp.where(jnp.arange(size) == c, z, 0) for c in range(size)]
            products += [jnp.full(1, jnp.sum(one)) for one in each]
        mean = jnp.full(1, jnp.sum(square) / E)
        found = run(products, [mean], [own_ref[E + 1, pl.ds(c, 1)] for c in range(C)])
        for ref, numbers in zip(refs[reads:], found, strict=True):
            for k, number in enumerate(numbers):
                ref[t, pl.ds(k, 1)] = jnp.broadcast_to(jnp.asarray(number, WIDE), (1,))
        if not reads:
            return

        def read(i: Any, _: None) -> None:
            d = i * chunk
            terms = [
                pre * x_ref[t, pl.ds(n * D + d, chunk)].astype(WIDE)
                for n, pre in enumerate(found[0])
            ]
            refs[0][t, pl.ds(d, chunk)] = added(terms).astype(x.dtype)

        jax.lax.fori_loop(0, D // chunk, read, None)

    outputs = (*[array(x.dtype, T, D)] * reads, *(array(WIDE, T, k) for k in sizes))
    call = launch(kernel, (T,), outputs, warps=blocks.few_warps, name="mhc_mix_few_tokens")
    return tuple(call(x.reshape(T, E), own))
