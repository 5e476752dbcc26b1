"""Where the logits of a mix come from: nowhere, from parameters, or from the token's own streams.

Axis key: N source stream, D width, E = N*D flattened, C coefficient column [pre | post | res],
J mixing logits. Leading axes are free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mhcjax.kernels import MIX
from mhcjax.manifolds import Brief

__all__ = ["Dynamic", "Fixed", "Init", "Norm", "Params", "Sizes", "Static", "draw", "logits"]

Params = dict[str, jax.Array]


def check_choice(what: str, value: object, choices: tuple) -> None:
    """ValueError that names the value and the choices."""
    if value not in choices:
        raise ValueError(f"{what} is {value!r}: choose one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, repr=False)
class Init(Brief):
    """Initial logits, each a pair (favoured, rest), and what a dynamic part starts from.

    - `res`: the logits that favour the identity, and the others. `keep` replaces it by the depth:
      after all `layers` sublayers at least that share of the difference between streams is left, so
      that each mixing keeps k = `keep ** (1 / layers)` of what it shrinks most. For manifolds that
      know their gap: Sinkhorn, `b = log((1 + (N - 1) k) / (1 - k))` on the diagonal; permutations,
      b on the identity with `k = p - (1 - p) / (N! - 1)`, `p = e^b / (e^b + N! - 1)`; kronecker,
      factor by factor.
    - `pre`, `post`: the logit of the favourite stream, and of the others. `favourite`: which
      stream that is in sublayer `layer`; "rotate" is `(layer // 2 + layer) % N`, so that attention
      and MLP each visit every stream; "layer" is `layer % N`.
    - `projection`: its standard deviation; by "fan_in" divided by the root of the inputs; by
      "xavier" the gain of a uniform draw. `scale`: of every group.

    >>> Init(res=(2.0, 0.0)).favourite_stream(layer=3, streams=2)
    0
    """

    res: tuple[float, float] = (0.0, 0.0)
    pre: tuple[float, float] = (1.0, -1.0)
    post: tuple[float, float] = (1.0, -1.0)
    favourite: Literal["rotate", "layer"] = "rotate"
    keep: float | None = None
    projection: float = 0.0
    projection_by: Literal["std", "fan_in", "xavier"] = "std"
    scale: float = 0.01

    def __post_init__(self) -> None:
        check_choice("favourite", self.favourite, ("rotate", "layer"))
        check_choice("projection_by", self.projection_by, ("std", "fan_in", "xavier"))
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep is {self.keep}: give a share between 0 and 1, e.g. 0.5")

    def favourite_stream(self, layer: int, streams: int) -> int:
        """The favourite stream of sublayer `layer`."""
        return (layer // 2 + layer if self.favourite == "rotate" else layer) % streams


@dataclass(frozen=True, repr=False)
class Norm(Brief):
    """The norm before (or after) the projection, over n inputs x.

    `form="inside"`: `x / sqrt(mean(x^2) + eps)`; "outside": `x / (sqrt(mean(x^2)) + eps)`
    (Megatron-LM); "clamp": `sqrt(n) x / max(|x|, eps)` (lucidrains, mhc-lite). `kind="layer"`
    subtracts the mean first. `gain` multiplies each input by a parameter. `after`: the projection
    takes the raw streams and its outputs are divided (DeepSeek-V4's order of rounding).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    form: Literal["inside", "outside", "clamp"] = "inside"
    gain: bool = False
    after: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("rms", "layer"))
        check_choice("form", self.form, ("inside", "outside", "clamp"))
        if self.after and (self.gain or self.kind == "layer"):
            raise ValueError(
                "after=True divides what the projection returns: a gain or a mean belongs before "
                "it; use after=False, or fold the gain into the projection"
            )

    def factor(self, x: jax.Array) -> jax.Array:
        """What x[..., n] is multiplied by, [..., 1]."""
        return self.of(jnp.mean(jnp.square(x), axis=-1, keepdims=True), x.shape[-1])

    def of(self, mean_square: jax.Array, inputs: int) -> jax.Array:
        """The factor of that many inputs, from the mean of their squares."""
        if self.form == "clamp":
            # The norm of zeros has no gradient; below eps it has no effect either.
            return jax.lax.rsqrt(jnp.maximum(mean_square, self.eps**2 / inputs))
        if self.form == "inside":
            # An eps of 1e-20 is all that a token of zeros has in the paper: it stays finite.
            return jax.lax.rsqrt(mean_square + self.eps)
        positive = jnp.maximum(mean_square, jnp.finfo(mean_square.dtype).tiny)
        return 1 / (jnp.sqrt(positive) + self.eps)


@dataclass(frozen=True, repr=False)
class Static(Brief):
    """Coefficients are parameters, the same for every token: `pre_logits[N]`, `post_logits[N]`,
    `res_logits[J]`, or `alpha_logit[]` at N=2 with permutations."""

    init: Init = Init()


@dataclass(frozen=True, repr=False)
class Fixed(Brief):
    """No parameters: `pre = post = 1` and `res = I`. With one stream it is the plain residual."""


@dataclass(frozen=True, repr=False)
class Dynamic(Brief):
    """Logits of the token's own streams: `scale * act(norm(x) @ projection) + bias`.

    All N*D inputs at once give the columns [pre | post | res] of `projection[E, C]` (mHC, arXiv
    2512.24880); with `per_stream` each stream gives its own pre, post and row of res from its
    own D inputs, `projection[D, 2 + N]` (HC, arXiv 2409.19606). The biases are `pre_logits`,
    `post_logits` and `res_logits`, and are added last.

    - `scales`: which columns share a learned factor: "pre", "post", "res", joined by "+"; empty:
      none. "res_parts": one factor for each part of res that the manifold names.
    - `frozen`: those of `scales` that keep their initial value (oHC: `("res",)`).
    - `tanh`: the act is tanh. `precision`: of the projection on XLA, as in `jax.lax.Precision`; its
      inputs are in at least float32. The kernels have one: float32 streams in full, bfloat16
      streams with weights to 2^-17.

    Never from other positions: what pools over the sequence leaks the future.
    """

    norm: Norm = Norm()
    per_stream: bool = False
    tanh: bool = False
    scales: tuple[str, ...] = ("pre", "post", "res")
    frozen: tuple[str, ...] = ()
    precision: Literal["highest", "high", "default"] = "highest"
    init: Init = Init()

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("highest", "high", "default"))
        if "res_parts" in "+".join(self.scales) and "res_parts" not in self.scales:
            raise ValueError(f"scales {self.scales}: res_parts are several, join them with nothing")
        named = [group for one in self.scales for group in one.split("+")]
        known = ("pre", "post", "res", "res_parts")
        for group in named:
            check_choice("a group of scales", group, known)
        if len(set(named)) != len(named):
            raise ValueError(f"scales {self.scales} name a group twice: name each once")
        for one in self.frozen:
            check_choice("frozen", one, self.scales)


class Sizes(NamedTuple):
    """Counts of logits: of pre, of post, of res, and of the parts of res."""

    pre: int
    post: int
    res: int
    parts: tuple[int, ...]


def _columns(c: Dynamic, sizes: Sizes, streams: int) -> tuple[np.ndarray, int, np.ndarray]:
    """(index of each column's scale, or the count for none; count of scales; which are frozen)."""
    res = streams if c.per_stream else sizes.res
    widths = (1, 1, res) if c.per_stream else (sizes.pre, sizes.post, res)
    columns = np.split(np.arange(sum(widths)), np.cumsum(widths)[:2])
    spans = dict(zip(("pre", "post", "res"), columns, strict=True))
    owner, frozen = np.full(sum(widths), -1), list[bool]()
    for one in c.scales:
        for group in one.split("+"):
            if group == "res_parts":
                for k, part in enumerate(np.split(spans["res"], np.cumsum(sizes.parts)[:-1])):
                    owner[part] = len(frozen) + k
            else:
                owner[spans[group]] = len(frozen)
        frozen += [one in c.frozen] * (len(sizes.parts) if one == "res_parts" else 1)
    owner[owner < 0] = len(frozen)
    return owner, len(frozen), np.array(frozen, bool)


def shapes(c: Dynamic | Static | Fixed, sizes: Sizes, streams: int, width: int) -> dict[str, tuple]:
    """The shape of every parameter of one sublayer."""
    if isinstance(c, Fixed):
        return {}
    found: dict[str, tuple] = {"pre_logits": (sizes.pre,), "post_logits": (sizes.post,)}
    if sizes.res:
        found["res_logits"] = (sizes.res,)
    if isinstance(c, Dynamic):
        owner, count, _ = _columns(c, sizes, streams)
        inputs = width if c.per_stream else streams * width
        found["projection"] = (inputs, len(owner))
        if count:
            found["scale"] = (count,)
        if c.norm.gain:
            found["gain"] = (inputs,)
    return found


def draw(init: Any, shape: tuple[int, int], key: jax.Array | None, dtype: Any) -> jax.Array:
    """A projection of that shape, as `init.projection` and `init.projection_by` say.

    >>> draw(Init(), (2, 1), None, jnp.float32).tolist()
    [[0.0], [0.0]]
    """
    if init.projection == 0:
        return jnp.zeros(shape, dtype)
    if key is None:
        raise ValueError("this projection is drawn at random: give key=jax.random.key(seed)")
    if init.projection_by == "xavier":
        bound = init.projection * math.sqrt(6 / sum(shape))
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    std = init.projection / (math.sqrt(shape[0]) if init.projection_by == "fan_in" else 1)
    return std * jax.random.normal(key, shape, dtype)


def project(
    norm: Norm, x: jax.Array, params: Params, precision: str, *, tanh: bool = False
) -> jax.Array:
    """`act(norm(x) @ projection)`; x[..., n] -> [..., C]."""
    if norm.kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    factor = norm.factor(x)
    if not norm.after:
        x = x * factor
        x = x * params["gain"] if norm.gain else x
    z = checkpoint_name(jnp.matmul(x, params["projection"], precision=precision), MIX)
    z = z * factor if norm.after else z
    return jnp.tanh(z) if tanh else z


def logits(
    c: Dynamic | Static, sizes: Sizes, params: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of pre, post and res for streams x[..., N, D], in the dtype of the parameters.

    >>> params = {"pre_logits": jnp.ones(1), "post_logits": jnp.zeros(1)}
    >>> logits(Static(), Sizes(1, 1, 0, ()), params, jnp.ones((1, 8)))[0].tolist()
    [1.0]
    """
    dtype = params["pre_logits"].dtype
    pre, post = params["pre_logits"], params["post_logits"]
    res = params.get("res_logits", jnp.zeros(0, dtype))
    if isinstance(c, Static):
        return pre, post, res
    wide = x.astype(dtype)
    streams = x.shape[-2]
    inputs = wide if c.per_stream else wide.reshape(*wide.shape[:-2], streams * wide.shape[-1])
    z = project(c.norm, inputs, params, c.precision, tanh=c.tanh)
    scales = _scales(c, sizes, streams, params)
    z = z if scales is None else z * scales
    if c.per_stream:
        parts = [z[..., 0], z[..., 1], z[..., 2:].reshape(*z.shape[:-2], -1)]
    else:
        parts = _split(z, sizes)
    if not sizes.res:
        parts[2] = parts[2][..., :0]
    return parts[0] + pre, parts[1] + post, parts[2] + res


def _scales(c: Dynamic, sizes: Sizes, streams: int, params: Params) -> jax.Array | None:
    """The learned factor of every column of the projection; None where there is none."""
    owner, count, frozen = _columns(c, sizes, streams)
    if not count:
        return None
    scale = params["scale"]
    if frozen.any():
        scale = jnp.where(frozen, jax.lax.stop_gradient(scale), scale)
    # Not scale[owner], whose gradient scatters: 16 us a sublayer on an H200.
    own = owner[:, None] == np.arange(count)
    return jnp.sum(jnp.where(own, scale, 0), axis=-1) + (owner == count)


def _split(z: jax.Array, sizes: Sizes) -> list[jax.Array]:
    return jnp.split(z, np.cumsum([sizes.pre, sizes.post]), axis=-1)


def linear(
    c: Dynamic, sizes: Sizes, streams: int, params: Params
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(w[E, C], scale[C], bias[C]), the norm's gain inside w, for what is linear in the streams:
    the logits are `x @ w * scale * norm.of(mean(x^2), E) + bias`, which `of_products` makes.

    >>> params = {"pre_logits": jnp.ones(1), "post_logits": jnp.ones(1), "scale": jnp.full(2, 3.0)}
    >>> c = Dynamic(scales=("pre", "post"))
    >>> linear(c, Sizes(1, 1, 0, ()), 1, params | {"projection": jnp.ones((8, 2))})[1].tolist()
    [3.0, 3.0]
    """
    w = params["projection"]
    w = params["gain"][:, None] * w if c.norm.gain else w
    scales = _scales(c, sizes, streams, params)
    names = ("pre_logits", "post_logits", *(("res_logits",) if sizes.res else ()))
    # Joined as a sum: XLA makes those of all layers in one launch, and concatenations in one each.
    ends = np.cumsum([params[name].size for name in names])
    parts = [
        jnp.pad(params[name], (end - params[name].size, ends[-1] - end))
        for name, end in zip(names, ends, strict=True)
    ]
    bias = sum(parts[1:], parts[0])
    return w, jnp.ones(w.shape[1], w.dtype) if scales is None else scales, bias


def of_products(
    c: Dynamic, sizes: Sizes, inputs: int, z: jax.Array, mean_square: jax.Array, bias: jax.Array
) -> list[jax.Array]:
    """Logits of pre, post and res of one token, of `z[C] = x @ w * scale` and `mean(x^2)`.

    >>> sizes = Sizes(1, 1, 0, ())
    >>> z, mean_square = jnp.ones(2), jnp.asarray(0.25)
    >>> of_products(Dynamic(), sizes, 4, z, mean_square, jnp.zeros(2))[0].round(3).tolist()
    [2.0]
    """
    return _split(z * c.norm.of(mean_square, inputs) + bias, sizes)
