"""Walk a jaxpr: which jitted functions a computation calls, and what else touches a stream axis.

Holds on JAX 0.10 to 0.12: the primitive of a jitted call is "pjit" or "jit", and inner jaxprs are
found by what they are (they have equations), not by class or by parameter name, so that scan, cond,
remat, custom_jvp, custom_vjp and shard_map need no cases of their own.
"""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

CALLS = ("jit", "pjit")


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters (closed ones opened), also those in tuples."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def walk(jaxpr: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names of the enclosing jitted functions, equation) of all equations, outer before inner."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield path, eqn
        inside = (*path, eqn.params["name"]) if is_call(eqn) else path
        for inner in inner_jaxprs(eqn):
            yield from walk(inner, inside)


def is_call(eqn: Any) -> bool:
    """A call of a jitted function."""
    return eqn.primitive.name in CALLS


def origin(eqn: Any) -> tuple[str, str]:
    """(function, file) that a jitted call was traced from: ("mix", "connections.py")."""
    info = next(inner_jaxprs(eqn)).debug_info.func_src_info
    found = re.match(r"(\S+) at (.+):\d+$", info)
    if not found:
        raise ValueError(f"no source in debug info {info!r}")
    return found[1], PurePath(found[2]).name


def calls(jaxpr: Any) -> list[tuple[tuple[str, ...], Any]]:
    """`walk`, the jitted calls only."""
    return [(path, eqn) for path, eqn in walk(jaxpr) if is_call(eqn)]


def consumes_axis(eqn: Any, size: int) -> bool:
    """Whether an equation without inner jaxprs contracts, reduces or slices away an axis of `size`.

    Give a stream count that no other axis of the computation has. Slicing counts, because the
    default path unrolls its sums over streams into slices.
    """
    if any(True for _ in inner_jaxprs(eqn)):
        return False
    shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
    if eqn.primitive.name == "dot_general":
        (left, right), _ = eqn.params["dimension_numbers"]
        contracted = [shapes[0][a] for a in left] + [shapes[1][a] for a in right]
        return size in contracted
    results = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
    return any(size in s for s in shapes) and not any(size in s for s in results)
