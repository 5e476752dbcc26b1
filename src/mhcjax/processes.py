"""One run in several processes: what they agree on, when they stop, the arrays that they share.

Process 0 leads: it alone decides and writes what there is one of. JAX's collectives carry its word.
With one process everything here is a plain call.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

__all__ = [
    "Stop",
    "agreed",
    "first",
    "gather",
    "leads",
    "place",
    "several",
    "signals",
    "whole",
]


def several() -> bool:
    """Is this one of several processes?

    >>> several()
    False
    """
    return jax.process_count() > 1


def leads() -> bool:
    """Is this the process that decides and writes?

    >>> leads()
    True
    """
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that is JSON. All must call it.

    >>> gather({"a": 1})
    [{'a': 1}]
    """
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    # Powers of two: few programs to compile.
    padded = np.zeros(1 << max(10, int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(decide: Callable[[], Any]) -> Any:
    """What process 0 decides, on every process; its ValueError too. The others do not call it.

    >>> agreed(lambda: 7)
    7
    """
    if not several():
        return decide()
    value, problem = None, None
    if leads():
        try:
            value = decide()
        except ValueError as error:
            problem = str(error)
    value, problem = gather([value, problem])[0]
    if problem is not None:
        raise ValueError(problem)
    return value


def first(make: Callable[[], Any]) -> Any:
    """What `make` gives, made by process 0 before the others: they find what it left on disk.

    >>> first(lambda: 7)
    7
    """
    made: list[Any] = []
    agreed(lambda: made.append(make()))
    return made[0] if made else make()


@dataclass
class Stop:
    """The signal that this process was sent; a second one ends it at once."""

    signal: int = 0

    def __call__(self, number: int, frame: Any) -> None:
        """The handler."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def now(self) -> bool:
        """Stop before the next step? Several processes have to make the same steps, and stop where
        they ask `anywhere`."""
        return bool(self.signal) and not several()

    def anywhere(self) -> int:
        """The signal that any process was sent, 0 without one. All must call it."""
        return max(gather(self.signal))


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C as a `Stop`, to be read between steps.

    >>> with signals() as stop:
    ...     stop.anywhere()
    0
    """
    stop, before = Stop(), {}
    # Only the main thread may set handlers; a notebook's worker thread goes without.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Arrays that several processes hold


def place(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[slice], np.ndarray]
) -> jax.Array:
    """The array of which `read(rows)` gives some rows of the second last axis; a process reads only
    those that its own devices hold.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> spec = jax.sharding.PartitionSpec("data", None)
    >>> x = np.arange(8).reshape(4, 2)
    >>> place(x.shape, NamedSharding(mesh, spec), lambda rows: x[rows])[3].tolist()
    [6, 7]
    """
    parts: dict[int, np.ndarray] = {}  # devices along other axes hold the same rows

    def part(index: Any) -> np.ndarray:
        rows = index[-2]
        start = rows.start or 0
        if start not in parts:
            parts[start] = read(rows)
        return parts[start]

    return jax.make_array_from_callback(shape, sharding, part)


def whole(array: Any) -> np.ndarray:
    """The whole array on the host, wherever its parts lie. All processes must call it.

    >>> whole(jax.numpy.arange(3)).tolist()
    [0, 1, 2]
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
