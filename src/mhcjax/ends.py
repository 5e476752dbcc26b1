"""Entry and exit of the streams: `expand` D -> N streams, `collapse` N streams -> D.

Axis key: N stream, D width, E = N*D flattened. Leading axes are free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

from mhcjax import kernels
from mhcjax.coefficients import Norm, Params, check_choice, draw, project
from mhcjax.spec import ENTRIES, EXITS, Connection, LearnedHead

__all__ = ["collapse", "expand", "init_ends"]


def init_ends(
    spec: Connection, *, width: int, key: jax.Array | None = None, dtype: Any = jnp.float32
) -> dict[str, Params]:
    """Parameters of the entry and the exit; empty where they have none.

    Entry: "stream_embedding" `embedding[N, D]`, zeros (lucidrains); "scaled_noise" `scale[N, D]`,
    0.6 + Xavier noise (LSS, arXiv 2606.03483). Exit: "attention_pool" `projection[D, D]`, the
    identity (lucidrains); `LearnedHead` `projection[E, N]`, `scale[]`, `bias[N]`.

    >>> init_ends(Connection(), width=8)
    {'entry': {}, 'exit': {}}
    """
    streams = spec.streams
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    entry: Params = {}
    exit: Params = {}
    if spec.entry == "stream_embedding":
        entry["embedding"] = jnp.zeros((streams, width), dtype)
    elif spec.entry == "scaled_noise":
        if keys[0] is None:
            raise ValueError("scaled_noise is drawn at random: give key=jax.random.key(seed)")
        bound = math.sqrt(6 / (streams + width))
        noise = jax.random.uniform(keys[0], (streams, width), dtype, -bound, bound)
        entry["scale"] = 0.6 + noise
    if spec.exit == "attention_pool":
        exit["projection"] = jnp.eye(width, dtype=dtype)
    elif isinstance(spec.exit, LearnedHead):
        exit["projection"] = draw(spec.exit, (streams * width, streams), keys[1], dtype)
        exit["scale"] = jnp.asarray(spec.exit.scale, dtype)
        exit["bias"] = jnp.zeros(streams, dtype)
    return {"entry": entry, "exit": exit}


@partial(jax.jit, static_argnames=("streams", "how"))
def expand(
    u: jax.Array, streams: int, how: str = "repeat", params: Params | None = None
) -> jax.Array:
    """Entry: u[..., D] -> x[..., N, D].

    "repeat" copies u into every stream; "stream_embedding" adds `embedding[N, D]` to the copies;
    "scaled_noise" multiplies them by `scale[N, D]`, which sets the streams apart (LSS).

    >>> expand(jnp.array([1.0, 2.0]), 2).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    check_choice("entry", how, ENTRIES)
    x = jnp.broadcast_to(u[..., None, :], (*u.shape[:-1], streams, u.shape[-1]))
    if how == "repeat":
        return x
    name = "embedding" if how == "stream_embedding" else "scale"
    weight = _given(how, params, name)
    wide = x.astype(jnp.promote_types(weight.dtype, u.dtype))
    return (wide + weight if name == "embedding" else wide * weight).astype(u.dtype)


@dataclass(frozen=True)
class _HeadOfProducts:
    """The weights of one token at the learned head, of the products that a kernel makes."""

    head: LearnedHead
    inputs: int

    def __call__(
        self, z: jax.Array, mean_square: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, ...]:
        factor = Norm(eps=self.head.norm_eps).of(mean_square, self.inputs)
        return (_weights_of(z * factor + bias, self.head),)


def _weights_of(logits: jax.Array, head: LearnedHead) -> jax.Array:
    return jax.nn.sigmoid(logits) + head.eps


@partial(jax.jit, static_argnames=("how", "implementation"))
def collapse(
    x: jax.Array,
    how: str | LearnedHead = "mean",
    params: Params | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Exit: x[..., N, D] -> u[..., D].

    "mean" (nanochat-rs) or "sum" (HC, mHC) over the streams; "attention_pool":
    `sum_n softmax_n(x W)_n x_n` channel by channel (lucidrains); "last_pre": `sum_n pre_n x_n` with
    `params={"pre": pre}`, the one that the last sublayer made (DeepSeek-V4.1); `LearnedHead`:
    `w = sigmoid(scale * norm(x) @ projection + bias) + eps`, `sum_n w_n x_n` (DeepSeek-V4), which
    `implementation` runs as it does in `connect`.

    >>> x = jnp.array([[1.0], [3.0]])
    >>> collapse(x).tolist(), collapse(x, "sum").tolist()
    ([2.0], [4.0])
    """
    wide = jnp.promote_types(jnp.float32, x.dtype)
    if isinstance(how, LearnedHead):
        names = ("projection", "scale", "bias")
        given = {name: _given("learned_head", params, name) for name in names}
        wide = jnp.result_type(wide, *(p.dtype for p in given.values()))
        own = {name: p.astype(wide) for name, p in given.items()}
        reason = kernels.unfit(x, own["bias"])
        if kernels.choose(implementation, reason, preferred=True) == "pallas":
            f = _HeadOfProducts(how, x.shape[-2] * x.shape[-1])
            scale = jnp.broadcast_to(own["scale"], own["bias"].shape)
            _, u, _ = kernels.mix(f, x, own["projection"], scale, own["bias"], reads=True)
            return cast(jax.Array, u)
        flat = x.astype(wide).reshape(*x.shape[:-2], -1)
        z = project(Norm(eps=how.norm_eps, after=True), flat, own, how.precision)
        return kernels.read(x, _weights_of(own["scale"] * z + own["bias"], how))
    check_choice("exit", how, EXITS)
    if how == "last_pre":
        return kernels.read(x, _given(how, params, "pre"))
    if how == "attention_pool":
        weight = _given(how, params, "projection")
        streams = x.astype(jnp.promote_types(wide, weight.dtype))
        attention = jax.nn.softmax(jnp.matmul(streams, weight, precision="highest"), axis=-2)
        return jnp.sum(attention * streams, axis=-2).astype(x.dtype)
    return kernels.read(x, jnp.full(x.shape[-2], 1 / x.shape[-2] if how == "mean" else 1.0, wide))


def _given(how: str, params: Params | None, name: str) -> jax.Array:
    if not params or name not in params:
        raise ValueError(f"{how} needs params[{name!r}]: see init_ends")
    return params[name]
