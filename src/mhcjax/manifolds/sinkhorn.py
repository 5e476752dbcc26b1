"""Sinkhorn's alternating normalisation, truncated as published, and its gradients.

Axis key: M destination stream, N source stream, T matrix, J mixing logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mhcjax.manifolds.newton import pull_back, stiffness
from mhcjax.manifolds.protocol import Brief, Marginals

__all__ = ["Sinkhorn"]

AXES = {"rows": -1, "columns": -2}  # the axis that a marginal sums over
# Entries of iterates alive in one chunk of the backward pass: 4 MiB in float32. Smaller chunks
# make more loops, larger ones let memory grow with the iterations.
CHUNK_ELEMENTS = 1 << 20
CONVERGED = 1e-6  # distance from the fixed point up to which the gradient may be implicit
SURE = 1e-12  # eps from which (eps / N)^2 is far above the smallest float32
GRADIENTS = ("auto", "unrolled", "implicit", "autodiff")


@dataclass(frozen=True, repr=False)
class Sinkhorn(Brief):
    """Rows and columns of exp(l / temperature), N*N logits row-major, scaled in turn to sum 1.

    `iterations` pairs of normalisations (20 in mHC, arXiv 2512.24880). `last` names the
    marginal that is normalised last: it is exact, the other one is not (99.9th percentile at N=4
    and 20 iterations: 6e-5, 0.03, 0.2 at logits of standard deviation 1, 2, 10; experiment e03).

    - `start="exp"`: K = exp(l), then all pairs. `start="softmax"` (DeepSeek-V4): the first
      normalisation of the first pair is a softmax, after which `eps` is added to every entry.
    - `eps`: divisors are `sum + eps`, or `max(sum, eps)` with `clamp`.
    - `domain="log"`: by logsumexp, without `eps`; finite for any logits. In the linear domain
      exp underflows where logits of a row and a column differ by more than about 87.
    - `gradient`: "implicit" solves one system at the fixed point, which costs the same for any
      number of iterations and is exact where they have converged; "unrolled" differentiates what
      the forward did, its iterates made again in chunks; "auto" is implicit for the chunks whose
      matrices have all converged to 1e-6 and unrolled for the others, so always exact; "autodiff"
      has no VJP of its own. All but the last keep nothing but the logits between forward and
      backward.

    >>> Sinkhorn().matrix(jnp.zeros(4), streams=2).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """

    iterations: int = 20
    eps: float = 0.0
    start: Literal["exp", "softmax"] = "exp"
    last: Literal["rows", "columns"] = "rows"
    temperature: float = 1.0
    domain: Literal["linear", "log"] = "log"
    clamp: bool = False
    gradient: Literal["auto", "unrolled", "implicit", "autodiff"] = "auto"

    non_negative = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("start", ("exp", "softmax")),
            ("last", tuple(AXES)),
            ("domain", ("linear", "log")),
            ("gradient", GRADIENTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}: give at least 1")
        if self.eps < 0 or self.temperature <= 0:
            raise ValueError(
                f"eps is {self.eps}, temperature {self.temperature}: give eps >= 0, temperature > 0"
            )
        if self.domain == "log" and self.eps:
            raise ValueError(f"eps {self.eps} has no place in the log domain: use domain='linear'")

    @property
    def exact(self) -> tuple[bool, bool]:
        closed = self.eps == 0 or self.clamp
        return closed and self.last == "rows", closed and self.last == "columns"

    @property
    def reference(self) -> Sinkhorn:
        return replace(self, gradient="autodiff")

    def num_logits(self, streams: int) -> int:
        return streams * streams

    def matrix(self, logits: jax.Array, streams: int) -> jax.Array:
        logits = logits.reshape(*logits.shape[:-1], streams, streams)
        return (_forward if self.gradient == "autodiff" else _scaled)(self, logits)

    def identity_logits(self, streams: int) -> np.ndarray:
        return np.eye(streams, dtype=bool).reshape(-1)

    def identity_gap(self, streams: int, keep: float) -> float:
        # With b on the diagonal res is (e^b - 1) / (e^b + N - 1) I plus a uniform rest.
        return float(self.temperature * np.log((1 + (streams - 1) * keep) / (1 - keep)))

    def marginal_bound(self, logits: jax.Array, streams: int) -> Marginals:
        """Of the marginal normalised last: rounding and eps. Of the other: every pair shrinks
        Hilbert's distance from 1 by `tanh(D / 4)^2`, where D is the largest log cross ratio of
        the start (Birkhoff), and it is at most D after the first pair.

        Vacuous (N - 1) for logits that spread far, as it must be: there Sinkhorn has not converged.
        """
        start = logits.reshape(*logits.shape[:-1], streams, streams) / self.temperature
        if self.start == "softmax":
            start = jax.nn.log_softmax(start, axis=_order(self)[0])
            start = jnp.logaddexp(start, np.log(self.eps)) if self.eps else start
        wide = jnp.max(start[..., :, :, None] - start[..., :, None, :], axis=-3)
        ratio = jnp.max(wide + jnp.swapaxes(wide, -1, -2), initial=0.0)
        noise = 2 * self.iterations * (streams + 2) * (self.eps + 2.0**-23)
        shrunk = jnp.tanh(ratio / 4) ** (2 * (self.iterations - 1)) * (
            ratio + np.log1p(1 / streams)
        )
        other = jnp.minimum(jnp.expm1(shrunk + noise) + 1e-6, float(streams))
        # A sum of s is divided by s + eps; after the first pair no sum is below 1 / (N + 1).
        last: Any = 1e-6 + (streams + 2) * self.eps
        if self.iterations == 1 or self.domain == "linear":
            # Underflow can leave a row or a column of zeros, which nothing scales to 1.
            last = jnp.where(ratio > 60, 1.0, last) if self.start == "exp" else last
            last = 1.0 if self.iterations == 1 and self.eps else last
        return Marginals(last, other) if self.last == "rows" else Marginals(other, last)


def _order(spec: Sinkhorn) -> tuple[int, int]:
    """(axis summed first, axis summed last)."""
    last = AXES[spec.last]
    return -3 - last, last


def _start(spec: Sinkhorn, logits: jax.Array) -> jax.Array:
    """K[..., M, N], positive: what is scaled."""
    first, _ = _order(spec)
    scaled = logits / spec.temperature
    if spec.start == "softmax":
        return jax.nn.softmax(scaled, axis=first) + spec.eps
    return jnp.exp(scaled - jnp.max(scaled, axis=first, keepdims=True))


def _divided(spec: Sinkhorn, k: jax.Array, axis: int) -> jax.Array:
    """k over its sums. An entry that underflowed to zero stays zero: no cotangent may reach it,
    since 1 / eps to the power of the iterations would turn it into 0 * inf. After a softmax with
    eps none can: cross ratios stay at eps^2 or more, so entries at (eps / N)^2."""
    if spec.start == "exp" or spec.eps < SURE:
        k = jnp.where(k > 0, k, 0)
    sums = jnp.sum(k, axis=axis, keepdims=True)
    if spec.eps and not spec.clamp:
        return k * (1 / (sums + spec.eps))  # N divisions, not N^2
    return k * (1 / jnp.maximum(sums, max(spec.eps, float(jnp.finfo(k.dtype).tiny))))


def _forward(spec: Sinkhorn, logits: jax.Array) -> jax.Array:
    """Plain, by a loop of `iterations`: one body compiles, whatever their number."""
    first, last = _order(spec)
    pairs = spec.iterations
    if spec.domain == "log":

        def log_pair(k: jax.Array, _: None) -> tuple[jax.Array, None]:
            k = k - jax.nn.logsumexp(k, axis=first, keepdims=True)
            return k - jax.nn.logsumexp(k, axis=last, keepdims=True), None

        # A softmax start is the first normalisation itself, so both starts are one.
        return jnp.exp(jax.lax.scan(log_pair, logits / spec.temperature, None, length=pairs)[0])

    def pair(k: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _divided(spec, _divided(spec, k, first), last), None

    k = _start(spec, logits)
    if spec.start == "softmax":
        k, pairs = _divided(spec, k, last), pairs - 1
    return jax.lax.scan(pair, k, None, length=pairs)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(spec: Sinkhorn, logits: jax.Array) -> jax.Array:
    return _forward(spec, logits)


def _scaled_forward(spec: Sinkhorn, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _forward(spec, logits), logits


def _scaled_backward(spec: Sinkhorn, logits: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    streams = logits.shape[-1]
    flat = [a.reshape(-1, streams, streams) for a in (logits, cotangent)]
    count = flat[0].shape[0]
    # Each pair of normalisations keeps about eight arrays of the size of its matrices.
    fitting = CHUNK_ELEMENTS // (8 * spec.iterations * streams**2)
    chunk = count if spec.gradient == "implicit" else min(count, max(fitting, 1))
    if chunk >= count:
        return (_pull(spec, *flat).reshape(logits.shape),)
    chunks = -(-count // chunk)
    padding = ((0, chunks * chunk - count), (0, 0), (0, 0))
    split = [jnp.pad(a, padding).reshape(chunks, chunk, streams, streams) for a in flat]
    pulled = jax.lax.map(lambda pair: _pull(spec, *pair), tuple(split))
    return (pulled.reshape(-1, streams, streams)[:count].reshape(logits.shape),)


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _pull(spec: Sinkhorn, logits_TMN: jax.Array, cotangent_TMN: jax.Array) -> jax.Array:
    """The cotangent of the logits, by the gradient that `spec` names."""

    def unrolled() -> jax.Array:
        return jax.vjp(partial(_forward, spec), logits_TMN)[1](cotangent_TMN)[0]

    if spec.gradient == "unrolled":
        return unrolled()
    res = _forward(spec, logits_TMN)

    def implicit() -> jax.Array:
        return _implicit(spec, logits_TMN, res, cotangent_TMN)

    if spec.gradient == "implicit":
        return implicit()
    # Not matrix by matrix: the unrolled gradient is exact for all, and both cost more than one.
    return jax.lax.cond(jnp.all(distance(spec, res) <= limit(spec, res.dtype)), implicit, unrolled)


def distance(spec: Sinkhorn, res: jax.Array) -> jax.Array:
    """An estimate from above of how far res[..., M, N], and its derivative, are from the limit.

    The matrix: error of its marginals times `stiffness`; where that is below 1e-6, the implicit
    gradient was within 1e-4 of the unrolled one (12,000 matrices, N=4), while an error of 4e-7
    alone came with 4e-4. The derivative: every pair of normalisations shrinks what is left of it by
    `1 - 1 / (stiffness - N + 2)` at least (the largest eigenvalue of res^T res but 1), also where
    the matrix itself started at its limit, as a symmetric one does.
    """
    sums = [jnp.sum(res, axis=axis) for axis in (-1, -2)]
    # Off their mean: eps takes the same from all of them.
    off = [jnp.abs(s - jnp.mean(s, axis=-1, keepdims=True)).max(axis=-1) for s in sums]
    stiff = stiffness(res)
    rate = 1 - 1 / jnp.maximum(stiff - (res.shape[-1] - 2), 1)
    return jnp.maximum(jnp.maximum(*off) * stiff, rate**spec.iterations)


def limit(spec: Sinkhorn, dtype: jnp.dtype) -> float:
    """The distance up to which "auto" is implicit. float64 is asked for exactness: there rounding
    alone may tell the two gradients apart, and eps would too: no distance is small enough."""
    if dtype == jnp.float32:
        return CONVERGED
    return 1e-12 if any(spec.exact) else -1.0


def _implicit(spec: Sinkhorn, logits: jax.Array, res: jax.Array, cotangent: jax.Array) -> jax.Array:
    pulled = pull_back(res, cotangent)
    if spec.start == "exp" or not spec.eps:
        return pulled / spec.temperature
    # eps was added after the softmax: K is not exp of the logits.
    k, back = jax.vjp(partial(_start, spec), logits)
    return back(pulled / k)[0]
