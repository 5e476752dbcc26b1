"""Raw array operations behind `connections`: arrays in, arrays out, no specification."""

from __future__ import annotations

import warnings

import jax

from mhcjax.kernels import pallas, xla
from mhcjax.kernels.dynamic import MIX, mix, unfit_token
from mhcjax.kernels.pallas import Passed, unfit, write_and_read, write_passed
from mhcjax.kernels.pallas import read as read_on

__all__ = [
    "MIX",
    "Passed",
    "choose",
    "mix",
    "read",
    "read_on",
    "unfit",
    "unfit_token",
    "write",
    "write_and_read",
    "write_passed",
]


def choose(implementation: str | None, reason: str | None, *, preferred: bool) -> str:
    """ "pallas" or "xla": what was asked for; for None what suits the backend and is `preferred`.

    `reason` says why the kernels do not take the arrays: asked for by name, it is warned of.

    >>> choose("xla", None, preferred=True)
    'xla'
    """
    if implementation is None:
        gpu = jax.default_backend() == "gpu"
        return "pallas" if gpu and preferred and reason is None else "xla"
    if implementation == "pallas" and reason is not None:
        warnings.warn(f"implementation 'xla' in place of 'pallas': {reason}", stacklevel=2)
        return "xla"
    return implementation


def read(x: jax.Array, pre: jax.Array, how: str = "xla") -> jax.Array:
    """`sum_n pre[..., n] x[..., n, :]`, in the dtype of `pre`, returned in that of `x`.

    >>> import jax.numpy as jnp
    >>> read(jnp.array([[1.0], [10.0]]), jnp.array([1.0, 2.0])).tolist()
    [21.0]
    """
    return read_on(x, pre)[1] if how == "pallas" else xla.read(x, pre)


def write(
    x: jax.Array, y: jax.Array, res: jax.Array, post: jax.Array, how: str = "xla"
) -> jax.Array:
    """`sum_n res[..., m, n] x[..., n, :] + post[..., m] y`, in the dtype of `res`, returned in that
    of `x`.

    >>> import jax.numpy as jnp
    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> write(jnp.array([[1.0], [2.0]]), jnp.array([10.0]), swap, jnp.array([0.0, 1.0])).tolist()
    [[2.0], [11.0]]
    """
    return (pallas if how == "pallas" else xla).write(x, y, res, post)
