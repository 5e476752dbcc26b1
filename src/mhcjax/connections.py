"""Connections: what a sublayer reads from N residual streams and how its output is written back.

    u  = sum_n pre[n] x[n]                        read
    y  = f(norm(u))                               the sublayer, any function
    x' = res @ (x + post * y)                     write, rule "add_first"
    x' = res @ x + post * y                       write, rule "mix_first"

`mix`, `read`, `write`, `expand` and `collapse` are jitted here, once; a notebook, the model, the
training step and the sampler call these same function objects, so that they cannot disagree.

Axis key: N source stream, M destination stream, D width, J mixing logits. Leading axes are free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mhcjax import kernels
from mhcjax.manifolds import Manifold, manifold_of

__all__ = [
    "Connection",
    "Fixed",
    "Init",
    "Mix",
    "Params",
    "Static",
    "collapse",
    "connect",
    "convert_params",
    "convert_rule",
    "expand",
    "init",
    "init_ends",
    "mix",
    "mix_and_read",
    "operand",
    "read",
    "write",
]

Params = dict[str, jax.Array]
Rule = Literal["add_first", "mix_first"]

RULES = ("add_first", "mix_first")
ENTRIES = ("repeat",)
EXITS = ("mean", "sum")
IMPLEMENTATIONS = (None, "xla", "reference")


# --------------------------------------------------------------------------------------------------
# The specification: frozen, hashable, readable when printed


@dataclass(frozen=True)
class Init:
    """Initial logits, each a pair (favoured, rest).

    `res`: the logits that favour the identity, and the others. `pre`, `post`: the logit of the
    favourite stream, and of the others. `favourite`: which stream that is in sublayer `layer`;
    "rotate" is `(layer // 2 + layer) % N`, so that attention and MLP each visit every stream;
    "layer" is `layer % N`.

    >>> Init(res=(2.0, 0.0)).favourite_stream(layer=3, streams=2)
    0
    """

    res: tuple[float, float] = (0.0, 0.0)
    pre: tuple[float, float] = (1.0, -1.0)
    post: tuple[float, float] = (1.0, -1.0)
    favourite: Literal["rotate", "layer"] = "rotate"

    def favourite_stream(self, layer: int, streams: int) -> int:
        """The favourite stream of sublayer `layer`."""
        return (layer // 2 + layer if self.favourite == "rotate" else layer) % streams


@dataclass(frozen=True)
class Static:
    """Coefficients are parameters, the same for every token.

    `pre = sigmoid(pre_logits)`, `post = post_scale * sigmoid(post_logits)`,
    `res = manifold.matrix(res_logits)`.
    """

    init: Init = Init()


@dataclass(frozen=True)
class Fixed:
    """No parameters: `pre = post = 1` and `res = I`. With one stream it is the plain residual."""


@dataclass(frozen=True)
class Connection:
    """A point of the family: streams, manifold, coefficients, write rule and ends.

    >>> Connection(streams=4).num_logits
    24

    Raises ValueError for any field that names nothing known, with the choices.
    """

    streams: int = 2
    manifold: str | Manifold = "permutations"
    coefficients: Static | Fixed = Static()
    rule: Rule = "add_first"
    post_scale: float = 2.0
    entry: str = "repeat"
    exit: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.streams, int) or self.streams < 1:
            raise ValueError(f"streams is {self.streams!r}: give a whole number of at least 1")
        _choice("rule", self.rule, RULES)
        _choice("entry", self.entry, ENTRIES)
        _choice("exit", self.exit, EXITS)
        if not self.post_scale > 0:
            raise ValueError(f"post_scale is {self.post_scale!r}: give a positive number")
        if not isinstance(self.coefficients, Static | Fixed):
            raise ValueError(f"coefficients is {self.coefficients!r}: give Static() or Fixed()")
        logits = manifold_of(self.manifold).num_logits(self.streams)
        if isinstance(self.coefficients, Fixed) and logits:
            raise ValueError(
                f"fixed coefficients leave no logits for manifold {self.manifold!r}: "
                'use manifold="identity", or Static()'
            )

    @property
    def num_logits(self) -> int:
        """J, the logits of one `res`."""
        return manifold_of(self.manifold).num_logits(self.streams)


def _choice(what: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{what} is {value!r}: choose one of {', '.join(map(repr, choices))}")


@partial(jax.tree_util.register_dataclass, data_fields=("pre", "post", "res"), meta_fields=())
@dataclass(frozen=True, repr=False)
class Mix:
    """The coefficients of one sublayer: `pre[..., N]`, `post[..., N]`, `res[..., M, N]`.

    `res[m, n]` is what stream m receives from stream n. A pytree; leading axes are those of the
    tokens where the coefficients depend on them, or of a stack of sublayers.
    """

    pre: jax.Array
    post: jax.Array
    res: jax.Array

    def __repr__(self) -> str:
        def show(a: Any) -> str:
            if isinstance(a, jax.core.Tracer) or getattr(a, "size", 0) > 64:
                return f"{getattr(a, 'dtype', '?')}{list(getattr(a, 'shape', ()))}"
            if not hasattr(a, "shape"):
                return repr(a)
            return np.array2string(np.asarray(a, np.float64), precision=4, separator=", ")

        rows = [f"  {name} = {show(getattr(self, name))}" for name in ("pre", "post", "res")]
        return "Mix(\n" + ",\n".join(r.replace("\n", "\n        ") for r in rows) + "\n)"


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
    `res_logits`; Fixed has no parameters. Attention of block b is layer 2b, its MLP 2b + 1.

    >>> sorted(init(Connection(), width=8, layer=0, layers=2))
    ['alpha_logit', 'post_logits', 'pre_logits']
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer is {layer} of {layers}: layers count from 0")
    if isinstance(spec.coefficients, Fixed):
        return {}
    start, streams = spec.coefficients.init, spec.streams
    favoured = np.arange(streams) == start.favourite_stream(layer, streams)
    params = {
        "pre_logits": jnp.asarray(np.where(favoured, *start.pre), dtype),
        "post_logits": jnp.asarray(np.where(favoured, *start.post), dtype),
    }
    if _has_alpha(spec):
        params["alpha_logit"] = jnp.asarray(start.res[0] - start.res[1], dtype)
    elif spec.num_logits:
        identity = manifold_of(spec.manifold).identity_logits(streams)
        params["res_logits"] = jnp.asarray(np.where(identity, *start.res), dtype)
    return params


def _has_alpha(spec: Connection) -> bool:
    """N=2 with permutations: one scalar stands for the two logits, of which one is a gauge."""
    return spec.streams == 2 and manifold_of(spec.manifold) == manifold_of("permutations")


def init_ends(spec: Connection, *, width: int, key: jax.Array | None = None) -> dict[str, Params]:
    """Parameters of the entry and the exit; both empty where they have none.

    >>> init_ends(Connection(), width=8)
    {'entry': {}, 'exit': {}}
    """
    return {"entry": {}, "exit": {}}


# --------------------------------------------------------------------------------------------------
# Coefficients


@partial(jax.jit, static_argnames=("spec", "implementation"))
def mix(
    spec: Connection, params: Params, x: jax.Array, *, implementation: str | None = None
) -> Mix:
    """The coefficients of one sublayer for streams `x[..., N, D]`.

    `pre = sigmoid(pre_logits)`, `post = post_scale * sigmoid(post_logits)`, `res` from the manifold
    (mHC, arXiv 2512.24880, eq. 8, without its dynamic part). At least float32; float64 where
    streams or parameters are.

    >>> spec = Connection()
    >>> mix(spec, init(spec, width=8), jnp.ones((2, 8))).res.tolist()
    [[0.5, 0.5], [0.5, 0.5]]

    Raises ValueError where `x` or a parameter has not the shape that `spec` asks for.
    """
    _choice("implementation", implementation, IMPLEMENTATIONS)
    if x.ndim < 2 or x.shape[-2] != spec.streams:
        raise ValueError(
            f"the streams have shape {x.shape}: the connection wants [..., {spec.streams}, width]"
        )
    dtype = jnp.promote_types(
        jnp.float32, jnp.result_type(x.dtype, *(p.dtype for p in params.values()))
    )
    if isinstance(spec.coefficients, Fixed):
        # Wider ones at N=1 would let XLA leave a bfloat16 y unrounded: not the residual to the bit.
        ones = jnp.ones(spec.streams, x.dtype if spec.streams == 1 else dtype)
        return Mix(ones, ones, jnp.eye(spec.streams, dtype=ones.dtype))
    wanted = {name: p.shape for name, p in init(spec, width=x.shape[-1]).items()}
    found = {name: p.shape for name, p in params.items()}
    if wanted != found:
        raise ValueError(f"the parameters have shapes {found}: the connection wants {wanted}")
    params = {name: p.astype(dtype) for name, p in params.items()}
    if _has_alpha(spec):
        alpha_logit = params["alpha_logit"]
        res_logits = jnp.stack([alpha_logit, jnp.zeros_like(alpha_logit)])
    else:
        res_logits = params.get("res_logits", jnp.zeros(0, dtype))
    return Mix(
        pre=jax.nn.sigmoid(params["pre_logits"]),
        post=spec.post_scale * jax.nn.sigmoid(params["post_logits"]),
        res=manifold_of(spec.manifold).matrix(res_logits, spec.streams),
    )


# --------------------------------------------------------------------------------------------------
# Read and write


@partial(jax.jit, static_argnames=("implementation",))
def read(x: jax.Array, mix: Mix, *, implementation: str | None = None) -> jax.Array:
    """What the sublayer sees: `u = sum_n pre[n] x[n]`; x[..., N, D] -> u[..., D].

    >>> m = Mix(pre=jnp.array([1.0, 2.0]), post=jnp.ones(2), res=jnp.eye(2))
    >>> read(jnp.array([[1.0], [10.0]]), m).tolist()
    [21.0]

    Computed in the dtype of the coefficients, returned in that of `x`.
    """
    _choice("implementation", implementation, IMPLEMENTATIONS)
    _check_streams(x, mix)
    if implementation != "reference":
        return kernels.read(x, mix.pre)
    wide = x.astype(mix.pre.dtype)
    return jnp.einsum("...n,...nd->...d", mix.pre, wide, precision="highest").astype(x.dtype)


@partial(jax.jit, static_argnames=("rule", "implementation"))
def write(
    x: jax.Array, y: jax.Array, mix: Mix, *, rule: Rule, implementation: str | None = None
) -> jax.Array:
    """The new streams from the sublayer's output y[..., D]; x[..., N, D] -> [..., M, D].

    "add_first": `res @ (x + post * y)` (nanochat-rs). "mix_first": `res @ x + post * y` (HC, mHC).
    They are one form: add_first with `post` is mix_first with `res @ post`, and so it is computed.

    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> m = Mix(pre=jnp.ones(2), post=jnp.array([1.0, 0.0]), res=swap)
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([10.0])
    >>> write(x, y, m, rule="add_first").tolist(), write(x, y, m, rule="mix_first").tolist()
    ([[2.0], [11.0]], [[12.0], [1.0]])

    Computed in the dtype of the coefficients, returned in that of `x`.
    """
    _choice("implementation", implementation, IMPLEMENTATIONS)
    _choice("rule", rule, RULES)
    _check_streams(x, mix)
    if y.shape != (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"the sublayer returned shape {y.shape} for streams {x.shape}: "
            f"it must be {(*x.shape[:-2], x.shape[-1])}"
        )
    if implementation != "reference":
        return kernels.write(x, y, mix.res, _fold(mix) if rule == "add_first" else mix.post)
    wide, y_wide = x.astype(mix.res.dtype), y.astype(mix.res.dtype)
    mixed = operand(wide, y_wide, mix, rule=rule)
    out = jnp.einsum("...mn,...nd->...md", mix.res, mixed, precision="highest")
    if rule == "mix_first":
        out = out + mix.post[..., None] * y_wide[..., None, :]
    return out.astype(x.dtype)


def _fold(mix: Mix) -> jax.Array:
    """`res @ post`: the post of the same write under mix_first."""
    return jnp.sum(mix.res * mix.post[..., None, :], axis=-1)


def operand(x: jax.Array, y: jax.Array, mix: Mix, *, rule: Rule) -> jax.Array:
    """What `res` mixes: `x + post * y` under add_first, `x` under mix_first.

    Where its streams are equal, res acts as the identity and cannot learn.

    >>> m = Mix(pre=jnp.ones(2), post=jnp.array([1.0, 0.0]), res=jnp.eye(2))
    >>> operand(jnp.zeros((2, 1)), jnp.ones(1), m, rule="add_first").tolist()
    [[1.0], [0.0]]
    """
    _choice("rule", rule, RULES)
    return x if rule == "mix_first" else x + mix.post[..., None] * y[..., None, :]


def _check_streams(x: jax.Array, mix: Mix) -> None:
    if x.ndim < 2 or x.shape[-2] != mix.pre.shape[-1]:
        raise ValueError(
            f"the streams have shape {x.shape}: the mix wants [..., {mix.pre.shape[-1]}, width]"
        )


def mix_and_read(
    spec: Connection, params: Params, x: jax.Array, *, implementation: str | None = None
) -> tuple[Mix, jax.Array]:
    """`mix` and `read` as one call, which a kernel may fuse; -> (mix, u[..., D]).

    >>> spec = Connection()
    >>> m, u = mix_and_read(spec, init(spec, width=8), jnp.ones((2, 8)))
    >>> u.shape
    (8,)
    """
    m = mix(spec, params, x, implementation=implementation)
    return m, read(x, m, implementation=implementation)


def connect(
    spec: Connection,
    params: Params,
    f: Callable[[jax.Array], Any],
    x: jax.Array,
    *,
    has_aux: bool = False,
    implementation: str | None = None,
) -> Any:
    """One sublayer: read, `f`, write; x[..., N, D] -> x[..., N, D].

    `f` maps u[..., D] to y[..., D] and does its own normalisation. With `has_aux` it returns
    (y, aux) (a KV cache, a loss) and `connect` returns (x, aux), as `jax.grad` does.

    >>> spec = Connection()
    >>> connect(spec, init(spec, width=8), jnp.tanh, jnp.ones((5, 2, 8))).shape
    (5, 2, 8)
    """
    m, u = mix_and_read(spec, params, x, implementation=implementation)
    out = f(u)
    y, aux = out if has_aux else (out, None)
    x = write(x, y, m, rule=spec.rule, implementation=implementation)
    return (x, aux) if has_aux else x


# --------------------------------------------------------------------------------------------------
# Entry and exit


@partial(jax.jit, static_argnames=("streams", "how"))
def expand(
    u: jax.Array, streams: int, how: str = "repeat", params: Params | None = None
) -> jax.Array:
    """Entry: u[..., D] -> x[..., N, D]. "repeat" copies u into every stream.

    >>> expand(jnp.array([1.0, 2.0]), 2).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    _choice("entry", how, ENTRIES)
    return jnp.broadcast_to(u[..., None, :], (*u.shape[:-1], streams, u.shape[-1]))


@partial(jax.jit, static_argnames=("how",))
def collapse(x: jax.Array, how: str = "mean", params: Params | None = None) -> jax.Array:
    """Exit: x[..., N, D] -> u[..., D]. "mean" (nanochat-rs) or "sum" (HC, mHC) over the streams.

    >>> x = jnp.array([[1.0], [3.0]])
    >>> collapse(x).tolist(), collapse(x, "sum").tolist()
    ([2.0], [4.0])
    """
    _choice("exit", how, EXITS)
    weight = 1 / x.shape[-2] if how == "mean" else 1.0
    wide = jnp.promote_types(jnp.float32, x.dtype)
    return kernels.read(x, jnp.full(x.shape[-2], weight, wide))


# --------------------------------------------------------------------------------------------------
# The other rule


def convert_rule(mix: Mix, *, to: Rule) -> Mix:
    """The same write under the other rule: only `post` changes.

    to "mix_first": `post' = res @ post`, always. to "add_first": `post' = res^-1 @ post`, where res
    is invertible; concrete arrays only, so that a singular one is a ValueError that names it.

    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> m = Mix(pre=jnp.ones(2), post=jnp.array([1.0, 0.0]), res=swap)
    >>> convert_rule(m, to="mix_first").post.tolist()
    [0.0, 1.0]
    """
    _choice("to", to, RULES)
    if to == "mix_first":
        return Mix(mix.pre, _fold(mix), mix.res)
    res = np.asarray(mix.res, np.float64)
    post = np.broadcast_to(np.asarray(mix.post, np.float64), res.shape[:-1])
    limit = res.shape[-1] * np.finfo(np.asarray(mix.res).dtype).eps
    singular = np.linalg.svd(res, compute_uv=False)
    bad = np.argwhere(singular[..., -1] <= limit * singular[..., 0])
    if len(bad):
        raise ValueError(
            f"{_sublayer(bad[0])}res is singular, so no post under add_first gives this write: "
            "keep mix_first"
        )
    solved = np.linalg.solve(res, post[..., None])[..., 0]
    return Mix(mix.pre, jnp.asarray(solved, mix.post.dtype), mix.res)


def convert_params(spec: Connection, params: Params, *, to: Rule) -> tuple[Connection, Params]:
    """(spec, params) with the same outputs under the other rule; static mixes, stacked or not.

    `post_logits' = logit(post' / post_scale)`, with post' from `convert_rule`. Raises ValueError,
    naming the sublayer, where post' is not inside (0, post_scale) or res is singular.

    >>> spec = Connection()
    >>> convert_params(spec, init(spec, width=8), to="mix_first")[0].rule
    'mix_first'
    """
    _choice("to", to, RULES)
    if spec.rule == to or isinstance(spec.coefficients, Fixed):
        return replace(spec, rule=to), params
    stacked = params["pre_logits"].ndim > 1
    x = jnp.zeros((spec.streams, 1), jnp.float32)
    mixes = partial(mix, spec)
    m = (jax.vmap(mixes, in_axes=(0, None)) if stacked else mixes)(params, x)
    share = np.asarray(convert_rule(m, to=to).post, np.float64) / spec.post_scale
    bad = np.argwhere((share <= 0) | (share >= 1))
    if len(bad):
        raise ValueError(
            f"{_sublayer(bad[0][:-1])}post of stream {bad[0][-1]} would be "
            f"{share[tuple(bad[0])] * spec.post_scale:.4g}, outside (0, {spec.post_scale:g}): "
            f"no post logit under {to} gives this write"
        )
    logits = jnp.asarray(np.log(share) - np.log1p(-share), params["post_logits"].dtype)
    return replace(spec, rule=to), {**params, "post_logits": logits}


def _sublayer(index: np.ndarray) -> str:
    return f"sublayer {', '.join(map(str, index))}: " if len(index) else ""
