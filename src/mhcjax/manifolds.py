"""Manifolds: functions from logits to the mixing matrix `res[M, N]`, one entry each, one table.

Axis key: N source stream, M destination stream, P permutation, J mixing logits.

A manifold is any frozen, hashable object with the members of `Manifold`; those of a user's own work
everywhere a name does, and `mhcjax.testing.check_manifold` runs the conformance suite on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "MANIFOLDS",
    "Identity",
    "Manifold",
    "Marginals",
    "Permutations",
    "Unconstrained",
    "manifold_of",
]


class Marginals(NamedTuple):
    """Largest |row sum - 1| and |column sum - 1|; None where a manifold promises nothing."""

    rows: jax.Array | float | None
    columns: jax.Array | float | None


@runtime_checkable
class Manifold(Protocol):
    """What a manifold declares: its logits, its matrix, and what holds for every matrix."""

    @property
    def non_negative(self) -> bool: ...

    def num_logits(self, streams: int) -> int:
        """J, the count of logits of one matrix."""
        ...

    def matrix(self, logits: jax.Array, streams: int) -> jax.Array:
        """logits[..., J] -> res[..., M, N]."""
        ...

    def identity_logits(self, streams: int) -> np.ndarray:
        """bool[J]: the logits that favour the identity. A large gap between them and the rest
        gives a matrix near I; all False where zero logits already do."""
        ...

    def marginal_bound(self, logits: jax.Array, streams: int) -> Marginals:
        """Bounds on the marginal errors of `matrix(logits)` in float32; None: no promise."""
        ...


@dataclass(frozen=True)
class Permutations:
    """Convex combinations of all N! permutation matrices: doubly stochastic for any logits.

    `res = sum_k softmax(logits)_k P_k` with `P_k[m, perm_k[m]] = 1`, in the order of
    `itertools.permutations(range(N))` (mHC-lite, arXiv 2601.05732; Birkhoff and von Neumann). At
    N=2 it is `alpha = sigmoid(l_0 - l_1)`, `[[alpha, 1 - alpha], [1 - alpha, alpha]]`.
    Limit: N! logits, so at most 6 streams.

    >>> Permutations().matrix(jnp.zeros(2), streams=2).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """

    non_negative = True

    def num_logits(self, streams: int) -> int:
        if not 1 <= streams <= 6:
            raise ValueError(
                f"{streams} streams have {streams}! permutations, too many: use 1 to 6 streams"
            )
        return math.factorial(streams)

    def matrix(self, logits: jax.Array, streams: int) -> jax.Array:
        if streams == 2:
            # 1 - alpha, not sigmoid of the negated logit: the two gradients then cancel to exactly
            # zero where the streams are equal, which is how a dead connection is recognised.
            alpha = jax.nn.sigmoid(logits[..., 0] - logits[..., 1])
            rows = jnp.stack([alpha, 1 - alpha, 1 - alpha, alpha], axis=-1)
        else:
            table_PE = jnp.asarray(_permutation_matrices(streams), logits.dtype)
            shift = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
            # Full precision by name: the default of a GPU is TF32.
            rows = jnp.matmul(
                jnp.exp(logits - shift), table_PE, precision=jax.lax.Precision.HIGHEST
            )
            # Divided after the sums over (N-1)! terms: rounding of a sum of all N! is one-sided,
            # and would leave marginals beyond 1e-6.
            rows = rows * (streams / jnp.sum(rows, axis=-1, keepdims=True))
        return rows.reshape(*logits.shape[:-1], streams, streams)

    def identity_logits(self, streams: int) -> np.ndarray:
        return np.arange(self.num_logits(streams)) == 0

    def marginal_bound(self, logits: jax.Array, streams: int) -> Marginals:
        # The rounding of a float32 sum of J terms; above 1e-6 from 5 streams on.
        bound = max(1e-6, self.num_logits(streams) * 2.0**-24)
        return Marginals(bound, bound)


def _permutation_matrices(streams: int) -> np.ndarray:
    """[P, M * N]: the permutation matrices in the order of itertools.permutations."""
    order = np.array(list(itertools.permutations(range(streams))))
    return np.eye(streams)[order].reshape(len(order), streams * streams)


@dataclass(frozen=True)
class Identity:
    """`res = I`: no logits, the streams are read and written but never mixed (iHC).

    >>> Identity().matrix(jnp.zeros(0), streams=2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    non_negative = True

    def num_logits(self, streams: int) -> int:
        return 0

    def matrix(self, logits: jax.Array, streams: int) -> jax.Array:
        eye_MN = jnp.eye(streams, dtype=logits.dtype)
        return jnp.broadcast_to(eye_MN, (*logits.shape[:-1], streams, streams))

    def identity_logits(self, streams: int) -> np.ndarray:
        return np.zeros(0, bool)

    def marginal_bound(self, logits: jax.Array, streams: int) -> Marginals:
        return Marginals(0.0, 0.0)


@dataclass(frozen=True)
class Unconstrained:
    """`res = logits`, row-major in `res[M, N]`: any matrix (HC, arXiv 2409.19606). No bound holds.

    >>> Unconstrained().matrix(jnp.arange(4.0), streams=2).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """

    non_negative = False

    def num_logits(self, streams: int) -> int:
        return streams * streams

    def matrix(self, logits: jax.Array, streams: int) -> jax.Array:
        return logits.reshape(*logits.shape[:-1], streams, streams)

    def identity_logits(self, streams: int) -> np.ndarray:
        return np.eye(streams, dtype=bool).reshape(-1)

    def marginal_bound(self, logits: jax.Array, streams: int) -> Marginals:
        return Marginals(None, None)


MANIFOLDS: Mapping[str, Manifold] = MappingProxyType(
    {
        "permutations": Permutations(),
        "identity": Identity(),
        "unconstrained": Unconstrained(),
    }
)


def manifold_of(manifold: str | Manifold) -> Manifold:
    """The manifold of that name, or the given object itself.

    >>> manifold_of("permutations").num_logits(4)
    24

    Raises ValueError for an unknown name and for an object that lacks a member of `Manifold`.
    """
    if isinstance(manifold, str):
        if manifold not in MANIFOLDS:
            raise ValueError(
                f"unknown manifold {manifold!r}: choose one of {', '.join(MANIFOLDS)}, "
                "or give an object with the members of mhcjax.Manifold"
            )
        return MANIFOLDS[manifold]
    if not isinstance(manifold, Manifold):
        raise ValueError(
            f"{manifold!r} is no manifold: give one of {', '.join(MANIFOLDS)}, "
            "or an object with the members of mhcjax.Manifold"
        )
    return manifold
