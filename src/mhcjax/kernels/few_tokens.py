"""The kernel of few tokens, as in decoding: coefficients and read at once, through Triton.

A chain of kernels would cost more in launches than in work. Here one program makes everything of
one token. Nothing is packed either: float32 products of float32 weights.

Axis key: T token (leading axes flattened), N source stream, D width, E = N*D flattened,
C coefficient column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.lanes import on_lanes
from mhcjax.kernels.triton import WIDE, added, array, index, launch, power_of_two


def joined(w_EC: jax.Array, scale_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    """[E + 2, C]: the parameters as one array, which XLA gathers in one launch wherever they lie,
    out of the stacks of all layers too."""
    return jnp.concatenate([w_EC, scale_C[None], bias_C[None]]).astype(WIDE)


def mix(
    f: Callable, sizes: tuple[int, ...], x: jax.Array, own: jax.Array, reads: bool, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """(u[T, D] if it `reads`, then the outputs of f[T, size] each) of x[T, N, D] and what `joined`
    returned; `f(z[C], mean square[], bias[C])` is what one token does with `z = x @ w * scale`."""
    T, N, D = x.shape
    E, C = N * D, own.shape[1]
    columns = 1 << (C - 1).bit_length()
    rows = power_of_two(E, max(1, blocks.few_tile // columns))
    tiles = next(n for n in range(blocks.few_loads, 0, -1) if E // rows % n == 0)
    chunk = power_of_two(D, blocks.few_tile)
    run = on_lanes(f, [(C,), (), (C,)], differentiable=False)

    def kernel(x_ref: Any, own_ref: Any, *refs: Any) -> None:
        t = pl.program_id(0)
        column = jnp.arange(columns)

        def load(row: Any, count: int) -> jax.Array:
            here = own_ref.at[pl.ds(row, count), pl.ds(index(0), columns)]
            return plt.load(here, mask=(column < C)[None], other=0.0)

        def body(i: Any, carry: tuple) -> tuple:
            # All loads of a step before the first product: their latency is what takes the time.
            starts = [(i * tiles + k) * rows for k in range(tiles)]
            weights = [load(e, rows) for e in starts]
            inputs = [x_ref[t, pl.ds(e, rows)].astype(WIDE) for e in starts]
            z, square = carry
            for w, v in zip(weights, inputs, strict=True):
                z, square = z + w * v[:, None], square + v * v
            return z, square

        zeros = (jnp.zeros((rows, columns), WIDE), jnp.zeros(rows, WIDE))
        z, square = jax.lax.fori_loop(0, E // rows // tiles, body, zeros)
        # Numbers as arrays of one lane: a token's products are apart once, then stay in registers.
        z = jnp.sum(z, axis=0) * jnp.sum(load(E, 1), axis=0)
        products = [jnp.full(1, jnp.sum(jnp.where(column == c, z, 0))) for c in range(C)]
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
