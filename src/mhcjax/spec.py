"""What a connection is, as one frozen value, and the parameters of a sublayer.

Axis key: N source stream, M destination stream, D width, J mixing logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mhcjax import coefficients
from mhcjax.coefficients import Dynamic, Fixed, Params, Sizes, Static, check_choice
from mhcjax.manifolds import Brief, Manifold, manifold_of

__all__ = ["Connection", "LearnedHead", "init"]

Rule = Literal["add_first", "mix_first"]

RULES = ("add_first", "mix_first")
ENTRIES = ("repeat", "stream_embedding", "scaled_noise")
EXITS = ("mean", "sum", "attention_pool", "last_pre")

# Logits -> pre or post, with the count of logits. The last two are JPmHC's: N x N matrices whose
# reads are averaged and whose writes are added up.
VECTOR_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda l: l,
    "softmax": partial(jax.nn.softmax, axis=-1),
}
READS = (*VECTOR_MAPS, "row_softmax")
WRITES = (*VECTOR_MAPS, "column_softmax")


@dataclass(frozen=True, repr=False)
class LearnedHead(Brief):
    """Exit `sum_n w_n x_n`, `w = sigmoid(scale * norm(x) @ projection + bias) + eps` (DeepSeek-V4).

    `norm_eps` is inside the root; `projection`, `projection_by` and `scale` as in `Init`.
    """

    norm_eps: float = 1e-6
    eps: float = 1e-6
    projection: float = 0.02
    projection_by: Literal["std", "fan_in", "xavier"] = "std"
    scale: float = 1.0
    precision: Literal["highest", "high", "default"] = "highest"


@dataclass(frozen=True, repr=False)
class Connection(Brief):
    """A point of the family: streams, manifold, coefficients, write rule and ends.

    `pre` and `post` name the maps from logits: "sigmoid", "linear", "softmax" over the streams, or
    JPmHC's "row_softmax" and "column_softmax"; `pre_eps` is added to pre, `post_scale` multiplies
    post. `carried`: a sublayer reads with the pre that the one before it made (`connect_carried`).
    `output_gain` multiplies the initial standard deviation of the sublayers' output projections.

    >>> Connection(streams=4).num_logits
    24

    Raises ValueError for any field that names nothing known, with the choices.
    """

    always = ("streams", "manifold", "coefficients", "rule")

    streams: int = 2
    manifold: str | Manifold = "permutations"
    coefficients: Static | Fixed | Dynamic = Static()
    rule: Rule = "add_first"
    post_scale: float = 2.0
    entry: str = "repeat"
    exit: str | LearnedHead = "mean"
    pre: str = "sigmoid"
    post: str = "sigmoid"
    pre_eps: float = 0.0
    carried: bool = False
    output_gain: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.streams, int) or self.streams < 1:
            raise ValueError(f"streams is {self.streams!r}: give a whole number of at least 1")
        check_choice("rule", self.rule, RULES)
        check_choice("entry", self.entry, ENTRIES)
        check_choice("pre", self.pre, READS)
        check_choice("post", self.post, WRITES)
        if self.exit == "learned_head":
            object.__setattr__(self, "exit", LearnedHead())
        if not isinstance(self.exit, LearnedHead):
            check_choice("exit", self.exit, (*EXITS, "learned_head"))
        for name in ("post_scale", "output_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a positive number")
        if self.pre_eps < 0:
            raise ValueError(f"pre_eps is {self.pre_eps!r}: give a number of at least 0")
        if self.exit == "last_pre" and not self.carried:
            raise ValueError(
                'exit "last_pre" needs a carried pre: set carried=True, or name single_pass'
            )
        if not isinstance(self.coefficients, Static | Fixed | Dynamic):
            raise ValueError(
                f"coefficients is {self.coefficients!r}: give Static(), Dynamic() or Fixed()"
            )
        logits = manifold_of(self.manifold).num_logits(self.streams)
        if isinstance(self.coefficients, Fixed) and logits:
            raise ValueError(
                f"fixed coefficients leave no logits for manifold {self.manifold!r}: "
                'use manifold="identity", or Static()'
            )
        own = (self.streams, self.streams, self.streams**2)
        if getattr(self.coefficients, "per_stream", False) and self.sizes[:3] != own:
            raise ValueError(
                f"per_stream gives each stream one pre, one post and {self.streams} logits of "
                f"res, but this connection has {self.sizes[:3]}: use per_stream=False"
            )

    @property
    def num_logits(self) -> int:
        """J, the logits of one `res`."""
        return manifold_of(self.manifold).num_logits(self.streams)

    @property
    def sizes(self) -> Sizes:
        """The counts of logits of pre, post and res, and of the parts of res."""
        square = self.streams**2
        manifold = manifold_of(self.manifold)
        parts = getattr(manifold, "parts", lambda streams: (self.num_logits,))
        return Sizes(
            square if self.pre == "row_softmax" else self.streams,
            square if self.post == "column_softmax" else self.streams,
            self.num_logits,
            parts(self.streams),
        )

    def shapes(self, width: int) -> dict[str, tuple]:
        """The shape of every parameter of one sublayer."""
        found = coefficients.shapes(self.coefficients, self.sizes, self.streams, width)
        if self.has_alpha:
            del found["res_logits"]
            found["alpha_logit"] = ()
        return found

    @property
    def has_alpha(self) -> bool:
        """N=2, static, permutations: one scalar stands for the two logits, of which one is a
        gauge."""
        is_static = isinstance(self.coefficients, Static) and self.streams == 2
        return is_static and manifold_of(self.manifold) == manifold_of("permutations")


# --------------------------------------------------------------------------------------------------
# Parameters


def init(
    spec: Connection,
    *,
    width: int,
    layer: int = 0,
    layers: int = 1,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters of sublayer `layer` of `layers`, a dict of arrays.

    Static: `pre_logits[N]`, `post_logits[N]`, `res_logits[J]`. At N=2 with permutations the scalar
    `alpha_logit[]` stands for `res_logits = [alpha_logit, 0]`. A manifold without logits has no
    `res_logits`; Fixed has no parameters. Dynamic adds `projection`, `scale` and `gain`, see there.
    Attention of block b is layer 2b, its MLP 2b + 1.

    >>> sorted(init(Connection(), width=8, layer=0, layers=2))
    ['alpha_logit', 'post_logits', 'pre_logits']

    Raises ValueError where a projection is drawn at random and no key is given.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer is {layer} of {layers}: layers count from 0")
    if isinstance(spec.coefficients, Fixed):
        return {}
    start, streams = spec.coefficients.init, spec.streams
    manifold = manifold_of(spec.manifold)
    res = start.res
    if start.keep is not None:
        if not hasattr(manifold, "identity_gap"):
            raise ValueError(
                f"manifold {spec.manifold!r} knows no gap that keeps {start.keep} of the streams' "
                "difference: give Init(res=...) in place of keep"
            )
        res = (manifold.identity_gap(streams, start.keep ** (1 / layers)), 0.0)
    params = {}
    for name, shape in spec.shapes(width).items():
        if name in ("pre_logits", "post_logits"):
            # The matrices of JPmHC, one row of logits a stream, favour a column.
            favoured = np.arange(shape[0]) % streams == start.favourite_stream(layer, streams)
            pair = start.pre if name == "pre_logits" else start.post
            params[name] = jnp.asarray(np.where(favoured, *pair), dtype)
        elif name == "alpha_logit":
            params[name] = jnp.asarray(res[0] - res[1], dtype)
        elif name == "res_logits":
            identity = manifold.identity_logits(streams)
            params[name] = jnp.asarray(np.where(identity, *res), dtype)
        elif name == "projection":
            params[name] = coefficients.draw(start, shape, key, dtype)
        else:
            params[name] = jnp.full(shape, start.scale if name == "scale" else 1.0, dtype)
    return params
