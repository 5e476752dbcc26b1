"""Connections: what a sublayer reads from N residual streams and how its output is written back.

    u  = sum_n pre[n] x[n]                        read
    y  = f(norm(u))                               the sublayer, any function
    x' = res @ (x + post * y)                     write, rule "add_first"
    x' = res @ x + post * y                       write, rule "mix_first"

`mix`, `read` and `write` are jitted here, once; a notebook, the model, the training step and the
sampler call these same function objects, so that they cannot disagree. Where `connect` runs on
kernels for coefficients of the token, `kernels.mix` and `kernels.write_passed` take their place.

Axis key: N source stream, M destination stream, D width, J mixing logits. Leading axes are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mhcjax import coefficients, kernels
from mhcjax.coefficients import Dynamic, Fixed, Params, Static, check_choice
from mhcjax.manifolds import manifold_of, reference
from mhcjax.spec import RULES, VECTOR_MAPS, Connection, Rule

__all__ = [
    "Mix",
    "connect",
    "connect_carried",
    "connect_single_pass",
    "first_pre",
    "implementation_of",
    "mix",
    "mix_and_read",
    "operand",
    "read",
    "write",
]

IMPLEMENTATIONS = (None, "pallas", "xla", "reference")


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
# Coefficients


@partial(jax.jit, static_argnames=("spec", "implementation"))
def mix(
    spec: Connection, params: Params, x: jax.Array, *, implementation: str | None = None
) -> Mix:
    """The coefficients of one sublayer for streams `x[..., N, D]`.

    `pre = sigmoid(pre logits) + pre_eps`, `post = post_scale * sigmoid(post logits)`, `res` from
    the manifold (mHC, arXiv 2512.24880, eq. 8), or the maps that `spec.pre` and `spec.post` name.
    The logits are parameters (Static) or the streams' own (Dynamic, one set a token). At least
    float32; float64 where streams or parameters are.

    >>> from mhcjax.spec import init
    >>> spec = Connection()
    >>> mix(spec, init(spec, width=8), jnp.ones((2, 8))).res.tolist()
    [[0.5, 0.5], [0.5, 0.5]]

    Raises ValueError where `x` or a parameter has not the shape that `spec` asks for.
    """
    ready = _ready(spec, params, x)
    if ready is None:
        # Wider ones at N=1 would let XLA leave a bfloat16 y unrounded: not the residual to the bit.
        wide = jnp.promote_types(jnp.float32, x.dtype)
        ones = jnp.ones(spec.streams, x.dtype if spec.streams == 1 else wide)
        return Mix(ones, ones, jnp.eye(spec.streams, dtype=ones.dtype))
    how = _implementation(implementation, spec, ready, x)
    if how == "pallas" and isinstance(spec.coefficients, Dynamic):
        return Mix(*kernels.mix(*_on_kernels(spec, ready, x))[2])
    own = cast(Dynamic | Static, spec.coefficients)
    logits = coefficients.logits(own, spec.sizes, ready, x)
    return Mix(*_maps(spec, logits, how))


def _ready(spec: Connection, params: Params, x: jax.Array) -> Params | None:
    """The parameters, checked, in the dtype that coefficients are made in; None: there are none."""
    if x.ndim < 2 or x.shape[-2] != spec.streams:
        raise ValueError(
            f"the streams have shape {x.shape}: the connection wants [..., {spec.streams}, width]"
        )
    if isinstance(spec.coefficients, Fixed):
        return None
    wanted, found = spec.shapes(x.shape[-1]), {name: p.shape for name, p in params.items()}
    if wanted != found:
        raise ValueError(f"the parameters have shapes {found}: the connection wants {wanted}")
    dtype = jnp.promote_types(
        jnp.float32, jnp.result_type(x.dtype, *(p.dtype for p in params.values()))
    )
    ready = {name: p.astype(dtype) for name, p in params.items()}
    if spec.has_alpha:
        alpha_logit = ready["alpha_logit"]
        ready["res_logits"] = jnp.stack([alpha_logit, jnp.zeros_like(alpha_logit)])
    return ready


def _maps(
    spec: Connection, logits: Sequence[jax.Array], how: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(pre, post, res) of their logits."""
    manifold = manifold_of(spec.manifold)
    if how == "reference":
        manifold = reference(manifold)
    pre, post, res = logits
    return (
        _coefficient(spec.pre, pre, spec.streams) + spec.pre_eps,
        spec.post_scale * _coefficient(spec.post, post, spec.streams),
        manifold.matrix(res, spec.streams),
    )


@dataclass(frozen=True)
class _OfProducts:
    """(pre, post, res) of one token, of the products that a kernel makes of its streams."""

    spec: Connection
    inputs: int

    def __call__(
        self, z: jax.Array, mean_square: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, ...]:
        c = cast(Dynamic, self.spec.coefficients)
        logits = coefficients.of_products(c, self.spec.sizes, self.inputs, z, mean_square, bias)
        return _maps(self.spec, logits, "reference")


def _on_kernels(spec: Connection, ready: Params, x: jax.Array) -> tuple[Any, ...]:
    """The arguments of `kernels.mix`."""
    c = cast(Dynamic, spec.coefficients)
    linear = coefficients.linear(c, spec.sizes, spec.streams, ready)
    return _OfProducts(spec, spec.streams * x.shape[-1]), x, *linear


def _implementation(implementation: str | None, spec: Connection, ready: Any, x: Any) -> str:
    """What runs: "pallas" on a GPU where coefficients depend on the token and the kernels take the
    arrays. With shared ones XLA fuses read and write into their neighbours, which is faster."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("xla", "reference"):
        return implementation
    c, reason = spec.coefficients, kernels.unfit(x, ready["pre_logits"])
    if reason is None and isinstance(c, Dynamic):
        if c.per_stream or c.tanh or c.norm.kind != "rms":
            reason = "the coefficients are not linear in the normed streams"
        else:
            of = _OfProducts(spec, spec.streams * x.shape[-1])
            reason = kernels.unfit_token(of, sum(spec.sizes[:3]))
    return kernels.choose(implementation, reason, preferred=isinstance(c, Dynamic))


def _coefficient(how: str, logits: jax.Array, streams: int) -> jax.Array:
    """pre[..., N] or post[..., N] of its logits."""
    if how in VECTOR_MAPS:
        return VECTOR_MAPS[how](logits)
    square = logits.reshape(*logits.shape[:-1], streams, streams)
    if how == "row_softmax":
        return jnp.mean(jax.nn.softmax(square, axis=-1), axis=-2)
    return jnp.sum(jax.nn.softmax(square, axis=-2), axis=-1)


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
    how = _mixed_by(implementation, x, mix)
    if how != "reference":
        return kernels.read(x, mix.pre, how)
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
    check_choice("rule", rule, RULES)
    how = _mixed_by(implementation, x, mix)
    _checked(y, x)
    if how != "reference":
        return kernels.write(x, y, mix.res, _folded(mix, rule), how)
    wide, y_wide = x.astype(mix.res.dtype), y.astype(mix.res.dtype)
    mixed = operand(wide, y_wide, mix, rule=rule)
    out = jnp.einsum("...mn,...nd->...md", mix.res, mixed, precision="highest")
    if rule == "mix_first":
        out = out + mix.post[..., None] * y_wide[..., None, :]
    return out.astype(x.dtype)


def _checked(y: jax.Array, x: jax.Array) -> jax.Array:
    if y.shape != (*x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"the sublayer returned shape {y.shape} for streams {x.shape}: "
            f"it must be {(*x.shape[:-2], x.shape[-1])}"
        )
    return y


def _folded(mix: Mix, rule: Rule) -> jax.Array:
    return fold_post(mix) if rule == "add_first" else mix.post


def fold_post(mix: Mix) -> jax.Array:
    """`res @ post`: the post of the same write under mix_first."""
    return jnp.sum(mix.res * mix.post[..., None, :], axis=-1)


def operand(x: jax.Array, y: jax.Array, mix: Mix, *, rule: Rule) -> jax.Array:
    """What `res` mixes: `x + post * y` under add_first, `x` under mix_first.

    Where its streams are equal, res acts as the identity and cannot learn.

    >>> m = Mix(pre=jnp.ones(2), post=jnp.array([1.0, 0.0]), res=jnp.eye(2))
    >>> operand(jnp.zeros((2, 1)), jnp.ones(1), m, rule="add_first").tolist()
    [[1.0], [0.0]]
    """
    check_choice("rule", rule, RULES)
    return x if rule == "mix_first" else x + mix.post[..., None] * y[..., None, :]


def _mixed_by(implementation: str | None, x: jax.Array, mix: Mix) -> str:
    """What reads and writes with this mix; see `_implementation`."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if x.ndim < 2 or x.shape[-2] != mix.pre.shape[-1]:
        raise ValueError(
            f"the streams have shape {x.shape}: the mix wants [..., {mix.pre.shape[-1]}, width]"
        )
    if implementation in ("xla", "reference"):
        return implementation
    reason = kernels.unfit(x, mix.pre, mix.post, mix.res)
    return kernels.choose(implementation, reason, preferred=mix.pre.ndim > 1)


def implementation_of(
    spec: Connection, width: int, dtype: Any, implementation: str | None = None
) -> str:
    """What `connect` runs on this backend for streams of that width and dtype, one token or more:
    "pallas", "xla" or "reference".

    >>> implementation_of(Connection(), 64, jnp.float32, "reference")
    'reference'
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if isinstance(spec.coefficients, Fixed):
        return implementation if implementation == "reference" else "xla"
    x = jax.ShapeDtypeStruct((1, spec.streams, width), dtype)
    shapes = spec.shapes(width)
    wide = jnp.promote_types(jnp.float32, dtype)
    ready = {name: jax.ShapeDtypeStruct(shape, wide) for name, shape in shapes.items()}
    return _implementation(implementation, spec, ready, x)


def mix_and_read(
    spec: Connection, params: Params, x: jax.Array, *, implementation: str | None = None
) -> tuple[Mix, jax.Array]:
    """`mix` and `read` as one call, which a kernel may fuse; -> (mix, u[..., D]).

    >>> from mhcjax.spec import init
    >>> spec = Connection()
    >>> m, u = mix_and_read(spec, init(spec, width=8), jnp.ones((2, 8)))
    >>> u.shape
    (8,)
    """
    return _mixed_and_read(spec, params, x, implementation, passes=False)[1:]


def _mixed_and_read(
    spec: Connection, params: Params, x: jax.Array, implementation: str | None, *, passes: bool
) -> tuple[Any, Mix, jax.Array]:
    """(what `_write_passed` writes to, mix, u)."""
    ready = _ready(spec, params, x)
    fused = ready is not None and _implementation(implementation, spec, ready, x) == "pallas"
    if fused and isinstance(spec.coefficients, Dynamic):
        own = _on_kernels(spec, cast(Params, ready), x)
        passed, u, found = kernels.mix(*own, reads=True, passes=passes)
        return passed, Mix(*found), cast(jax.Array, u)
    m = _named(mix(spec, params, x, implementation=implementation))
    if fused:
        # Who writes to this x has the read's cotangent added to the write's, in place.
        x, u = kernels.read_on(x, m.pre)
        return x, m, u
    return x, m, read(x, m, implementation=implementation)


def _write_passed(
    passed: Any, y: jax.Array, mix: Mix, *, rule: Rule, implementation: str | None
) -> jax.Array:
    """`write` to what `_mixed_and_read` passed."""
    if isinstance(passed, kernels.Passed):
        return kernels.write_passed(passed, _checked(y, passed.x), _folded(mix, rule))
    return write(passed, y, mix, rule=rule, implementation=implementation)


def _named(mix: Mix) -> Mix:
    """The same, by its name kept where `jax.checkpoint` makes streams again: mixes are small."""
    return jax.tree.map(lambda a: checkpoint_name(a, kernels.MIX), mix)


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

    >>> from mhcjax.spec import init
    >>> spec = Connection()
    >>> connect(spec, init(spec, width=8), jnp.tanh, jnp.ones((5, 2, 8))).shape
    (5, 2, 8)
    """
    if spec.carried:
        raise ValueError("this connection carries pre between sublayers: use connect_carried")
    passed, m, u = _mixed_and_read(spec, params, x, implementation, passes=True)
    out = f(u)
    y, aux = out if has_aux else (out, None)
    x = _write_passed(passed, y, m, rule=spec.rule, implementation=implementation)
    return (x, aux) if has_aux else x


def connect_carried(
    spec: Connection,
    params: Params,
    f: Callable[[jax.Array], Any],
    x: jax.Array,
    pre: jax.Array | None = None,
    *,
    has_aux: bool = False,
    implementation: str | None = None,
) -> Any:
    """One sublayer that reads with the `pre[..., N]` of the one before it; -> (x, its own pre).

    `u = sum_n pre[n] x[n]`, then write with the post and res of this sublayer's own streams
    (DeepSeek-V4.1, arXiv 2609.19969, section 2.4.1). Without `pre` the first stream is read. With
    `has_aux` -> (x, pre, aux).

    >>> from mhcjax.spec import init
    >>> spec = Connection(carried=True)
    >>> x, pre = connect_carried(spec, init(spec, width=8), jnp.tanh, jnp.ones((5, 2, 8)))
    >>> x.shape, pre.shape
    ((5, 2, 8), (5, 2))
    """
    if not spec.carried:
        raise ValueError("this connection reads with its own pre: use connect")
    m = mix(spec, params, x, implementation=implementation)
    if pre is None:
        pre = first_pre(x).astype(m.pre.dtype)
    u = read(x, replace(m, pre=pre), implementation=implementation)
    out = f(u)
    y, aux = out if has_aux else (out, None)
    x = write(x, y, m, rule=spec.rule, implementation=implementation)
    own = jnp.broadcast_to(m.pre, (*x.shape[:-2], spec.streams))
    return (x, own, aux) if has_aux else (x, own)


def connect_single_pass(
    spec: Connection,
    params: Params,
    f: Callable[[jax.Array], Any],
    x: jax.Array,
    u: jax.Array | None = None,
    *,
    has_aux: bool = False,
    implementation: str | None = None,
) -> Any:
    """`connect_carried` with what the next sublayer reads in place of its pre; -> (x, next u).

    The next `u = sum_n pre[n] x[n]` is made of the streams that this sublayer writes, so one pass
    writes them and reads them. Without `u[..., D]` the first stream is read. With `has_aux` ->
    (x, u, aux). After the last sublayer u is what the exit "last_pre" returns.

    >>> from mhcjax.spec import init
    >>> spec = Connection(carried=True)
    >>> x, u = connect_single_pass(spec, init(spec, width=8), jnp.tanh, jnp.ones((5, 2, 8)))
    >>> x.shape, u.shape
    ((5, 2, 8), (5, 8))
    """
    if not spec.carried:
        raise ValueError("this connection reads with its own pre: use connect")
    passed, m = _passed_mix(spec, params, x, implementation=implementation)
    out = f(x[..., 0, :] if u is None else u)
    y, aux = out if has_aux else (out, None)
    x, u = _write_and_read(passed, y, m, rule=spec.rule, implementation=implementation)
    return (x, u, aux) if has_aux else (x, u)


def _passed_mix(
    spec: Connection, params: Params, x: jax.Array, *, implementation: str | None
) -> tuple[Any, Mix]:
    """(what `_write_and_read` writes to, mix)."""
    ready = _ready(spec, params, x)
    dynamic = ready is not None and isinstance(spec.coefficients, Dynamic)
    if dynamic and _implementation(implementation, spec, ready, x) == "pallas":
        own = _on_kernels(spec, cast(Params, ready), x)
        passed, _, m = kernels.mix(*own, passes=True)
        return passed, Mix(*m)
    return x, _named(mix(spec, params, x, implementation=implementation))


def _write_and_read(
    passed: Any, y: jax.Array, mix: Mix, *, rule: Rule, implementation: str | None
) -> tuple[jax.Array, jax.Array]:
    """`write` to what `_passed_mix` passed, and `read` of what it wrote with the same mix's pre."""
    if isinstance(passed, kernels.Passed):
        return kernels.write_passed(passed, _checked(y, passed.x), _folded(mix, rule))
    if _mixed_by(implementation, passed, mix) == "pallas":
        return kernels.write_and_read(passed, y, mix.res, _folded(mix, rule), mix.pre)
    x = write(passed, y, mix, rule=rule, implementation=implementation)
    return x, read(x, mix, implementation=implementation)


def first_pre(x: jax.Array) -> jax.Array:
    """The pre that the first sublayer reads with where pre is carried: the first stream's.

    >>> first_pre(jnp.ones((2, 3, 8))).tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    shape = (*x.shape[:-2], x.shape[-2])
    return jnp.zeros(shape, jnp.promote_types(jnp.float32, x.dtype)).at[..., 0].set(1)
