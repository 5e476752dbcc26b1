"""Batches of tokens: a batch is a function of the shard, (seed, step) and its shape, nothing else.

A micro-batch, B batch, T position. A batch holds T+1 tokens per row: inputs [:-1], targets [1:].
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["batch", "open_tokens", "validation_batches"]


def open_tokens(path: str | os.PathLike[str], dtype: np.typing.DTypeLike) -> np.ndarray:
    """The ids of a shard, [tokens], as a read-only memory map.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.arange(5, dtype="<u2").tofile(f"{folder}/t.bin")
    ...     open_tokens(f"{folder}/t.bin", "<u2").tolist()
    [0, 1, 2, 3, 4]

    ValueError: no such file, an empty one, or one that is not a whole number of tokens.
    """
    dtype, path = np.dtype(dtype), Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: build the corpus again")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"{path} holds {size} bytes, not one or more tokens of {dtype.itemsize} bytes: "
            f"delete its folder, it is rebuilt"
        )
    return np.memmap(path, dtype, "r")


def batch(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch: int,
    length: int,
    micro_batches: int = 1,
    rows: slice | None = None,
) -> np.ndarray:
    """The training batch of one step, int32[A, B, T+1]: random windows of the shard.

        start[a, b] = Philox(key=(seed, step)) raw draw number a * B + b, modulo len(tokens) - T

    Each window starts anywhere in the shard, independently of the others (with replacement, across
    documents). The draws are counted, not consumed: reading ahead, resuming and the number of
    devices change nothing, and A micro-batches of B rows hold the rows of one batch of A * B.
    `rows` reads only those rows of B, what one of several processes needs.

    >>> ids = np.arange(100)
    >>> x = batch(ids, seed=0, step=7, batch=4, length=8)
    >>> x.shape, bool((np.diff(x) == 1).all())
    ((1, 4, 9), True)
    >>> half = batch(ids, seed=0, step=7, batch=4, length=8, rows=slice(2, 4))
    >>> bool((half == x[:, 2:4]).all())
    True

    ValueError: fewer than T+1 tokens, a negative seed or step, a size below 1, or rows outside B.
    """
    _at_least(1, batch=batch, micro_batches=micro_batches)
    _at_least(0, seed=seed, step=step)
    windows = np.uint64(_windows(tokens, length))
    # The raw stream of a bit generator is fixed for ever; those of the distributions may change
    # between NumPy versions. The remainder is uniform to len(tokens) parts in 2**64.
    raw = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(micro_batches * batch)
    starts = (raw % windows).astype(np.int64).reshape(micro_batches, batch)
    if rows is not None:
        starts = starts[:, _inside(rows, batch)]
    return _gather(tokens, starts, length)


def validation_batches(
    tokens: np.ndarray, *, batch: int, length: int, count: int
) -> Iterator[np.ndarray]:
    """Fixed batches int32[B, T+1], the same at each evaluation: windows spread over the shard.

    `count` batches, or as many as fit without overlap: window i of n starts at
    i * (len(tokens) - T - 1) // (n - 1), from the first token to the last. Where not even one batch
    fits, there is one, of windows that overlap evenly.

    >>> [x[:, 0].tolist() for x in validation_batches(np.arange(100), batch=2, length=9, count=3)]
    [[0, 18], [36, 54], [72, 90]]
    >>> [x[:, 0].tolist() for x in validation_batches(np.arange(16), batch=4, length=9, count=3)]
    [[0, 2, 4, 6]]

    ValueError: fewer than T+1 tokens, or a size below 1.
    """
    last = _windows(tokens, length) - 1
    _at_least(1, batch=batch, count=count)
    count = max(1, min(count, len(tokens) // (length + 1) // batch))
    n = count * batch
    starts = (np.arange(n) * last // max(1, n - 1)).reshape(count, batch)
    return (_gather(tokens, row, length) for row in starts)


def _windows(tokens: np.ndarray, length: int) -> int:
    """How many windows of T+1 tokens the shard has."""
    _at_least(1, length=length)
    if len(tokens) < length + 1:
        raise ValueError(
            f"the shard has {len(tokens)} tokens and a row needs {length + 1}: "
            f"give a longer corpus or a smaller --data.length"
        )
    return len(tokens) - length


def _gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return tokens[starts[..., None] + np.arange(length + 1)].astype(np.int32)


def _inside(rows: slice, batch: int) -> slice:
    start, stop, step = rows.indices(batch)
    if step < 1 or start >= stop or (rows.stop is not None and rows.stop > batch):
        raise ValueError(f"rows is {rows}: give a non-empty forward slice of the {batch} rows")
    return rows


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not least <= operator.index(value) < 2**64:
            raise ValueError(f"{name} is {value}: give an integer from {least} to 2**64 - 1")
