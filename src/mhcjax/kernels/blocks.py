"""Tuned sizes of the kernels' blocks, by device kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

__all__ = ["BLOCKS", "Blocks", "blocks_for"]


@dataclass(frozen=True)
class Blocks:
    """How the kernels cut their work: powers of two, but for stages and programs."""

    chunk: int = 2048  # of the width, in read and write
    elements: int = 8  # of a chunk, for one lane
    chunk_backward: int = 256
    elements_backward: int = 8
    rows: int = 128  # tokens of a tile of the projection
    step: int = 64  # of its inputs, at a time
    split: int = 4  # programs that share the sum over its inputs
    warps: int = 4
    stages: int = 3
    rows_backward: int = 64
    step_backward: int = 64
    split_backward: int = 8
    warps_backward: int = 4
    stages_backward: int = 3
    lanes: int = 32  # tokens of a program for the coefficients
    few: int = 128  # tokens, up to which the kernels of few tokens run
    few_tile: int = 2048  # weights of a load, there
    few_loads: int = 4  # in flight
    few_shares: int = 16  # programs that share a token's products, at most
    few_warps: int = 2
    few_warps_token: int = 1  # of the program that does the rest: all would do the same
    split_mosaic: int = 4
    programs_mosaic: int = 132  # that run at once: one a multiprocessor
    stages_backward_mosaic: int = 2


# By device kind, by the largest width: measured with 8192 tokens of widths 2048 and 4096 and 65,536
# of width 768, N = 4, bfloat16.
BLOCKS = {
    "NVIDIA H200": (
        (1024, Blocks(elements=4, split=1, split_mosaic=1)),
        (1 << 30, Blocks()),
    )
}


def blocks_for(x: jax.Array) -> Blocks:
    """The blocks for streams x[..., N, D] on this machine's device, an unknown one has the H200's.

    >>> import jax.numpy as jnp
    >>> blocks_for(jnp.zeros((2, 64))).rows
    16
    """
    table = BLOCKS.get(jax.devices()[0].device_kind, BLOCKS["NVIDIA H200"])
    found = next(blocks for width, blocks in table if x.shape[-1] <= width)
    tokens = x.size // (x.shape[-2] * x.shape[-1])
    few = max(16, 1 << (max(tokens, 1) - 1).bit_length())
    if few < found.rows:
        # A tile of few tokens, and more programs for its sums.
        return replace(found, rows=few, rows_backward=min(few, found.rows_backward), split=16)
    return found
