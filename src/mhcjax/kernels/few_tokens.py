"""The kernels of few tokens, as in decoding: coefficients and read in two launches, through Triton.

A chain of kernels would cost more in launches than in work. Here the products of a token are shared
by many multiprocessors, one alone would take most of the time to fetch the weight; then one program
makes the rest of a token. Nothing is packed either: float32 products of float32 weights.

Axis key: T token (leading axes flattened), N source stream, D width, E = N*D flattened,
C coefficient column, S share of E.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mhcjax.kernels.blocks import Blocks
from mhcjax.kernels.lanes import on_lanes
from mhcjax.kernels.triton import (
    SPECIAL,
    WIDE,
    added,
    array,
    in_powers,
    largest_divisor,
    launch,
    power_of_two,
    put,
)


def joined(w_EC: jax.Array, scale_C: jax.Array, bias_C: jax.Array) -> jax.Array:
    """[E + 2, C]: the parameters as one array.

    As a sum, which XLA makes for all layers of a stack in one launch; a concatenation, or arrays of
    their own, would be launches of every layer."""
    E = w_EC.shape[0]
    parts = [(w_EC, 0), (scale_C[None], E), (bias_C[None], E + 1)]
    padded = [jnp.pad(a, ((e, E + 2 - e - a.shape[0]), (0, 0))) for a, e in parts]
    return added(padded).astype(WIDE)


def project(x: jax.Array, own: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """(x @ w, sum of squares of x) of x[T, E] and what `joined` returned, in shares of E:
    [T, S, C], [T, S]."""
    (T, E), C = x.shape, own.shape[1]
    rows = power_of_two(E, max(1, blocks.few_tile >> (C - 1).bit_length()))
    shares = power_of_two(E // rows, blocks.few_shares)
    tiles = E // rows // shares
    several = largest_divisor(tiles, blocks.few_loads)

    def kernel(x_ref: Any, own_ref: Any, z_ref: Any, square_ref: Any) -> None:
        s, t = pl.program_id(0), pl.program_id(1)

        def body(step: Any, carry: tuple) -> tuple:
            sums, square = carry
            starts = [(s * tiles + step * several + k) * rows for k in range(several)]
            here = [pl.ds(e, rows) for e in starts]
            x = [x_ref[t, e].astype(WIDE) for e in here]
            weights = [[own_ref[e, pl.ds(c, size)] for c, size in in_powers(C)] for e in here]
            for v, w in zip(x, weights, strict=True):
                sums = tuple(z + a * v[:, None] for z, a in zip(sums, w, strict=True))
                square = square + v * v
            return sums, square

        start = tuple(jnp.zeros((rows, size), WIDE) for _, size in in_powers(C))
        carry = start, jnp.zeros(rows, WIDE)
        sums, square = jax.lax.fori_loop(0, tiles // several, body, carry)
        for (c, size), z in zip(in_powers(C), sums, strict=True):
            z_ref[t, s, pl.ds(c, size)] = jnp.sum(z, axis=0)
        square_ref[t, s] = jnp.sum(square)

    outputs = array(WIDE, T, shares, C), array(WIDE, T, shares)
    name = "mhc_project_few_tokens"
    call = launch(kernel, (shares, T), outputs, warps=blocks.few_warps, name=name)
    return call(x, own)


def mix(
    f: Callable, sizes: tuple[int, ...], x: jax.Array, own: jax.Array, reads: bool, blocks: Blocks
) -> tuple[jax.Array, ...]:
    """(u[T, D] if it `reads`, then the outputs of f[T, size] each) of x[T, N, D] and what `joined`
    returned; `f(z[C], mean square[], bias[C])` is what one token does with `z = x @ w * scale`."""
    T, N, D = x.shape
    E, C = N * D, own.shape[1]
    chunk = power_of_two(D, blocks.few_tile)
    run = on_lanes(f, [(C,), (), (C,)], differentiable=False, special=SPECIAL)
    flat = x.reshape(T, E)
    z, square = project(flat, own, blocks)
    shares = z.shape[1]

    def kernel(x_ref: Any, own_ref: Any, z_ref: Any, square_ref: Any, *refs: Any) -> None:
        t, all_shares = pl.program_id(0), pl.ds(0, shares)
        # Numbers as arrays of one lane: a token's products are apart once, then stay in registers.
        products = []
        for c, size in in_powers(C):
            z = jnp.sum(z_ref[t, all_shares, pl.ds(c, size)], axis=0) * own_ref[E, pl.ds(c, size)]
            each = [jnp.where(jnp.arange(size) == k, z, 0) for k in range(size)]
            products += [jnp.full(1, jnp.sum(one)) for one in each]
        mean = jnp.full(1, jnp.sum(square_ref[t, all_shares]) / E)
        found = run(products, [mean], [jnp.full(1, own_ref[E + 1, c]) for c in range(C)])
        for ref, numbers in zip(refs[reads:], found, strict=True):
            put(ref, t, [jnp.sum(number) for number in numbers])
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
    call = launch(kernel, (T,), outputs, warps=blocks.few_warps_token, name="mhc_mix_few_tokens")
    return tuple(call(flat, own, z, square))
