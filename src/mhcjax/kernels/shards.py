"""Arrays with any leading axes as flat tokens, on a mesh those of each device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from mhcjax.kernels.blocks import blocks_for

__all__ = [
    "LAST",
    "SUMS",
    "TOKENS",
    "WHOLE",
    "few",
    "flatten",
    "kind",
    "on_shards",
    "rows_of",
    "shared",
]

# What a mesh may split, by position of the leading axis: batch, then positions.
TOKEN_AXES = ("data", "sequence")

# What an array is of: tokens (leading axes first), or last; whole; sums over a device's tokens,
# [1, ...], to be added up over the first axis.
TOKENS, WHOLE, LAST, SUMS = "tokens", "whole", "last", "sums"


def _axes(lead: Sequence[int]) -> tuple[Any, ...]:
    """The mesh axis of every leading axis, None where it is whole."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    }
    named = [*TOKEN_AXES, *[None] * len(lead)][: len(lead)]
    return tuple(
        n if n in auto and size % auto[n] == 0 else None
        for n, size in zip(named, lead, strict=True)
    )


def few(x: jax.Array) -> bool:
    """Whether a device's own tokens are so few that launches are what takes the time."""
    lead, mesh = x.shape[:-2], jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[name] for name in _axes(lead) if name)
    return math.prod(lead) <= blocks_for(x).few * ways


def on_shards(
    f: Callable, lead: Sequence[int], inputs: Sequence[str], outputs: Sequence[str]
) -> Callable:
    """`f` on each device's own tokens, its arrays being of what `inputs` and `outputs` say."""
    axes = _axes(lead)
    if not any(axes):
        return f
    split = tuple(a for a in axes if a)
    specs = {
        TOKENS: PartitionSpec(*axes),
        WHOLE: PartitionSpec(),
        LAST: PartitionSpec(None, *axes),
        SUMS: PartitionSpec(split),
    }
    return jax.shard_map(
        f,
        in_specs=tuple(specs[kind] for kind in inputs),
        out_specs=tuple(specs[kind] for kind in outputs),
        axis_names=set(split),
        check_vma=False,  # a kernel says nothing of how its results vary
    )


def flatten(a: jax.Array, keep: int) -> jax.Array:
    """[..., *kept] -> [T, *kept]; coefficients that all tokens share become [1, *kept]."""
    return a.reshape(-1, *a.shape[a.ndim - keep :])


def rows_of(res: jax.Array) -> jax.Array:
    """[..., M, N] -> [T, M*N]"""
    return res.reshape(-1, math.prod(res.shape[-2:]))


def kind(c: jax.Array, keep: int) -> str:
    """What coefficients c[..., *kept] are of, of as many kept axes: TOKENS or WHOLE."""
    return TOKENS if c.ndim > keep else WHOLE


def shared(d: jax.Array, like: jax.Array) -> jax.Array:
    """The cotangent of coefficients: a token's own, or the sum where all share them."""
    return d if d.ndim == like.ndim else jnp.sum(d, axis=tuple(range(d.ndim - like.ndim)))
