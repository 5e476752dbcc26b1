"""A function of one token's few numbers, run with tokens on the lanes of a GPU.

A kernel cannot hold arrays like `[..., 4, 4]`: Triton wants powers of two, and lays them over lanes
that would then have to talk. Here each number of a token is an array of its own, `[tokens]`, and
the function's jaxpr is walked number by number, so that the mathematics stays where it is written
and everything happens in registers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, use_abstract_mesh

__all__ = ["Unsupported", "on_lanes"]

SEGMENT = 5  # steps of a loop between two carries that its backward pass keeps in registers

# Words, not 40 quoted strings.
ELEMENTWISE = frozenset(
    """
    abs add and convert_element_type copy copy_p cos div eq exp exp2 ge gt integer_pow is_finite le
    log log1p logistic lt max min mul ne neg not or pow rsqrt select_n sign sin sqrt square
    stop_gradient sub tanh
    """.split()  # noqa: SIM905
)
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")

Numbers = np.ndarray  # of dtype object: each entry an array [tokens], or a plain number


class _How(NamedTuple):
    """How a loop runs, and the device's own functions by name."""

    repeat: Callable
    special: Mapping[str, Callable]


class Unsupported(Exception):
    """A primitive that has no form here; the caller takes another implementation."""


def on_lanes(
    f: Callable,
    shapes: Sequence[tuple[int, ...]],
    *,
    differentiable: bool = True,
    special: Mapping[str, Callable] | None = None,
) -> Callable[..., list[list]]:
    """`f` of arrays of those shapes, as a function of lists of `[tokens]` arrays.

    The lists, of arguments and of results, are the arrays' entries in row-major order.

    >>> double = on_lanes(lambda a: 2 * a.sum(), [(2,)])
    >>> double([jnp.ones(3), jnp.zeros(3)])[0][0].tolist()
    [2.0, 2.0, 2.0]

    `special` holds the device's own `reciprocal` and `log` of an array, where it has faster ones;
    what needs the logarithm of numbers near 1 to their own precision writes `log1p`.

    Raises Unsupported where `f` needs a primitive that is not elementwise, structural, a sum or
    a maximum, a product of matrices, or a loop without inputs.
    """
    with jax.enable_x64(False):
        closed = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    _check(_open(closed)[0])
    # A kernel that is not differentiated knows no custom VJP.
    how = _How(_repeat if differentiable else _plain_repeat, special or {})

    def run(*lists: list) -> list[list]:
        arguments = [_array(list(l), s) for l, s in zip(lists, shapes, strict=True)]
        found = _walk(*_open(closed), arguments, how)
        return [list(a.reshape(-1)) for a in found]

    return run


def _array(entries: list, shape: tuple[int, ...]) -> Numbers:
    out = np.empty(len(entries), object)
    for i, entry in enumerate(entries):  # assigned at once, NumPy would look inside
        out[i] = entry
    return out.reshape(shape)


def _constant(value: Any) -> Numbers:
    """Plain numbers: they are folded where they are 0 or 1."""
    value = np.asarray(value)
    return _array([v.item() for v in value.reshape(-1)], value.shape)


def _open(inner: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts); from JAX 0.12 on the two are one object."""
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _inner(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts) of an equation that only calls."""
    return _open(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))


def _check(jaxpr: Any) -> None:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in CALLS:
            _check(_inner(eqn)[0])
        elif name == "scan":
            inner = _open(eqn.params["jaxpr"])[0]
            # What JAX calls the parts of a scan differs by version; the shapes tell them apart.
            outside, inside = (
                [v.aval.shape for v in (*j.invars, *j.outvars)] for j in (eqn, inner)
            )
            if outside != inside or len(eqn.invars) != len(eqn.outvars):
                raise Unsupported("a loop with inputs, outputs or constants")
            _check(inner)
        elif name not in ELEMENTWISE and name not in STRUCTURAL:
            raise Unsupported(name)


def _walk(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Numbers], how: _How
) -> list[Numbers]:
    known: dict[Any, Numbers] = {}

    def read(v: Any) -> Numbers:
        return _constant(v.val) if isinstance(v, Literal) else known[v]

    known.update(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        values, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name in CALLS:
            found = _walk(*_inner(eqn), values, how)
        elif name == "scan":
            found = _loop(eqn.params["jaxpr"], values, eqn.params["length"], how)
        elif name in STRUCTURAL:
            answer = STRUCTURAL[name](eqn, *values)
            found = answer if isinstance(answer, list) else [answer]
        else:
            found = [_each(eqn, how, *values)]
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


# --------------------------------------------------------------------------------------------------
# Number by number


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _each(eqn: Any, how: _How, *values: Numbers) -> Numbers:
    """An elementwise primitive on every entry; plain numbers are folded."""
    shape = np.broadcast_shapes(*(v.shape for v in values))
    columns = [np.broadcast_to(v, shape).reshape(-1) for v in values]
    dtypes = [v.aval.dtype for v in eqn.invars]
    return _array([_one(eqn, how, dtypes, entry) for entry in zip(*columns, strict=True)], shape)


def _one(eqn: Any, how: _How, dtypes: list, entry: tuple) -> Any:
    name = eqn.primitive.name
    if name in ("copy", "copy_p"):
        return entry[0]
    if all(map(_plain, entry)):
        # On no mesh: among the shards of one, JAX takes a plain number for a shard.
        with jax.ensure_compile_time_eval(), use_abstract_mesh(AbstractMesh((), ())):
            typed = [jnp.asarray(e, d) for e, d in zip(entry, dtypes, strict=True)]
            return np.asarray(eqn.primitive.bind(*typed, **eqn.params)).item()
    if name == "mul":
        return _product(*entry)
    if name == "add":
        return _sum(*entry)
    special = how.special if dtypes[0] == jnp.float32 else {}
    if name == "div" and "reciprocal" in special and not _plain(entry[1]):
        return _product(entry[0], special["reciprocal"](entry[1]))
    if name == "log" and "log" in special:
        return special["log"](entry[0])
    if name == "convert_element_type":
        return entry[0].astype(eqn.params["new_dtype"])
    like = next(e for e in entry if not _plain(e))
    full = [
        jnp.full(like.shape, e, d) if _plain(e) else e for e, d in zip(entry, dtypes, strict=True)
    ]
    return eqn.primitive.bind(*full, **eqn.params)


def _product(a: Any, b: Any) -> Any:
    if _plain(a):
        a, b = b, a
    if _plain(b):
        return 0.0 if b == 0 else a if b == 1 else a * b
    return a * b


def _sum(a: Any, b: Any) -> Any:
    if _plain(a):
        a, b = b, a
    return a if _plain(b) and b == 0 else a + b


def _reduced(combine: Callable, eqn: Any, a: Numbers) -> Numbers:
    axes = eqn.params["axes"]
    kept = [i for i in range(a.ndim) if i not in axes]
    rows = a.transpose(*kept, *axes).reshape(*(a.shape[i] for i in kept), -1)
    flat = rows.reshape(-1, rows.shape[-1])
    return _array([_tree(combine, list(r)) for r in flat], rows.shape[:-1])


def _tree(combine: Callable, entries: list) -> Any:
    """Combined in pairs: a chain of additions is a chain of latencies."""
    while len(entries) > 1:
        pairs = [combine(*entries[i : i + 2]) for i in range(0, len(entries) - 1, 2)]
        entries = pairs + entries[len(entries) - len(entries) % 2 :]
    return entries[0]


def _maximum(a: Any, b: Any) -> Any:
    return max(a, b) if _plain(a) and _plain(b) else jnp.maximum(a, b)


def _dot(eqn: Any, a: Numbers, b: Numbers) -> Numbers:
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    fa = [i for i in range(a.ndim) if i not in (*ca, *ba)]
    fb = [i for i in range(b.ndim) if i not in (*cb, *bb)]
    batch, free_a, free_b = (
        tuple(x.shape[i] for i in dims) for x, dims in ((a, ba), (a, fa), (b, fb))
    )
    size = math.prod(a.shape[i] for i in ca)
    left = a.transpose(*ba, *fa, *ca).reshape(math.prod(batch), math.prod(free_a), size)
    right = b.transpose(*bb, *fb, *cb).reshape(math.prod(batch), math.prod(free_b), size)
    out = []
    for k, i, j in itertools.product(*map(range, (*left.shape[:2], right.shape[1]))):
        out.append(
            _tree(_sum, [_product(p, q) for p, q in zip(left[k, i], right[k, j], strict=True)])
        )
    return _array(out, (*batch, *free_a, *free_b))


def _broadcast(eqn: Any, a: Numbers) -> Numbers:
    shape = eqn.params["shape"]
    spread = [1] * len(shape)
    for i, axis in enumerate(eqn.params["broadcast_dimensions"]):
        spread[axis] = a.shape[i]
    return np.broadcast_to(a.reshape(spread), shape)


def _slice(eqn: Any, a: Numbers) -> Numbers:
    p = eqn.params
    strides = p["strides"] or (1,) * a.ndim
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return a[tuple(slice(*cut) for cut in cuts)]


def _split(eqn: Any, a: Numbers) -> list[Numbers]:
    return np.split(a, np.cumsum(eqn.params["sizes"])[:-1], axis=eqn.params["axis"])


def _stack(eqn: Any, *a: Numbers) -> Numbers:
    return np.stack(a, axis=eqn.params["axis"])


STRUCTURAL: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda eqn, *a: np.concatenate(a, axis=eqn.params["dimension"]),
    "dot_general": _dot,
    "expand_dims": lambda eqn, a: np.expand_dims(a, eqn.params["dimensions"]),
    "reduce_max": partial(_reduced, _maximum),
    "reduce_sum": partial(_reduced, _sum),
    "reshape": lambda eqn, a: a.reshape(eqn.params["new_sizes"]),
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "squeeze": lambda eqn, a: np.squeeze(a, eqn.params["dimensions"]),
    "transpose": lambda eqn, a: a.transpose(eqn.params["permutation"]),
}


# --------------------------------------------------------------------------------------------------
# Loops


def _loop(closed: Any, carry: list[Numbers], length: int, how: _How) -> list[Numbers]:
    shapes = [c.shape for c in carry]

    def split(flat: Sequence) -> list[Numbers]:
        ends = np.cumsum([math.prod(s) for s in shapes])
        pieces = np.split(_array(list(flat), (len(flat),)), ends[:-1])
        return [piece.reshape(s) for piece, s in zip(pieces, shapes, strict=True)]

    def step(flat: tuple) -> tuple:
        found = _walk(*_open(closed), split(flat), how)
        return tuple(entry for a in found for entry in a.reshape(-1))

    flat = [entry for c in carry for entry in c.reshape(-1)]
    like = next(e for e in flat if not _plain(e))
    start = tuple(jnp.full(like.shape, e, like.dtype) if _plain(e) else e for e in flat)
    return split(how.repeat(step, length, start))


def _plain_repeat(step: Callable, length: int, carry: tuple) -> tuple:
    return jax.lax.fori_loop(0, length, lambda _, c: step(c), carry)


_repeat = jax.custom_vjp(_plain_repeat, nondiff_argnums=(0, 1))


def _repeat_forward(step: Callable, length: int, carry: tuple) -> tuple[tuple, tuple]:
    return _plain_repeat(step, length, carry), carry


def _repeat_backward(step: Callable, length: int, carry: tuple, cotangent: tuple) -> tuple[tuple]:
    """The loop backwards: carries are kept every SEGMENT steps, in registers, and those between
    them are made again from there, one at a time."""
    starts, at = [carry], 0
    while at + SEGMENT < length:
        starts.append(jax.lax.fori_loop(0, SEGMENT, lambda _, c: step(c), starts[-1]))
        at += SEGMENT
    for start in reversed(starts):
        steps = length - at

        def back(i: Any, ct: tuple, start: tuple = start, steps: int = steps) -> tuple:
            before = jax.lax.fori_loop(0, steps - 1 - i, lambda _, c: step(c), start)
            return jax.vjp(step, before)[1](ct)[0]

        cotangent = jax.lax.fori_loop(0, steps, back, cotangent)
        length, at = at, at - SEGMENT
    return (cotangent,)


_repeat.defvjp(_repeat_forward, _repeat_backward)
