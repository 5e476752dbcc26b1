"""The mesh, axis letters -> PartitionSpec, and the exchanges of a step that is split by hand.

Axis key: B batch, T position, D width, E flattened streams, H head, F hidden, V vocabulary. Batch
is split over `data`, the positions of its rows over `sequence` in contiguous pieces; heads, hidden
and vocabulary over `model`; width and flattened streams over `data` too where parameters are
sharded.

Inside `jax.shard_map` a function sees its own part of every array. The compiler's partitioner would
choose other exchanges: a reduction in each micro-batch, three for what queries, keys and values
send back, halves of the logits on the move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "AXES",
    "all_positions",
    "divisors",
    "fan_out",
    "first_of",
    "gather",
    "make_mesh",
    "mean",
    "partition",
    "piece",
    "reduce",
    "replicated",
    "total",
    "tree_shardings",
    "ways",
]

AXES = ("data", "sequence", "model")  # of a mesh; neighbours along the last are the nearest
AXIS_OF_LETTER = {"B": "data", "H": "model", "F": "model", "V": "model"}


def make_mesh(
    data: int | None = None, model: int = 1, *, sequence: int = 1, devices: list | None = None
) -> Mesh:
    """A mesh with the axes of AXES over the devices, or the first of them where it has fewer.

    `data=None` takes all that `sequence` and `model` leave over.

    >>> dict(make_mesh(1, 1).shape)
    {'data': 1, 'sequence': 1, 'model': 1}

    Raises ValueError where the devices do not suffice or do not divide.
    """
    devices = jax.devices() if devices is None else devices
    if min(sequence, model) < 1 or (data is not None and data < 1):
        sizes = _named(data, sequence, model, ", ")
        raise ValueError(f"mesh {sizes}: give at least 1 for each")
    count, others = len(devices), sequence * model
    if data is None:
        if count % others:
            split = {"mesh.sequence": sequence, "mesh.model": model}
            given = [f"{axis} {n}" for axis, n in split.items() if n > 1]
            raise ValueError(
                f"{' x '.join(given)} does not divide the {count} devices: use "
                f"{'a product that is ' * (len(given) > 1)}one of {divisors(count)}"
            )
        data = count // others
    size, sizes = data * others, _named(data, sequence, model, " x ")
    if size > count:
        if others <= count:
            fits = f"mesh.data at most {count // others}"
        elif sequence > model:
            fits = f"mesh.sequence at most {max(1, count // (data * model))}"
        else:
            fits = f"mesh.model at most {max(1, count // (data * sequence))}"
        raise ValueError(f"mesh {sizes} wants {size} devices, {count} are here: give {fits}")
    idle = {d.process_index for d in devices[size:]} - {d.process_index for d in devices[:size]}
    if idle:
        raise ValueError(
            f"mesh {sizes} takes {size} of {count} devices and none of process "
            f"{min(idle)}: give mesh.model one of {divisors(count // math.gcd(count, sequence))} "
            "and leave mesh.data out"
        )
    # Auto axes: Explicit, the default of make_mesh, breaks embedding lookups.
    return jax.make_mesh(
        (data, sequence, model), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size]
    )


def _named(data: int | None, sequence: int, model: int, between: str) -> str:
    """The sizes that are given, in words; `sequence` only where it splits anything."""
    sizes = zip(AXES, (data, sequence, model), strict=True)
    return between.join(f"{a}={n}" for a, n in sizes if n is not None and (a, n) != ("sequence", 1))


def divisors(*sizes: int, most: int | None = None) -> list[int]:
    """What divides all of the sizes, up to `most`.

    >>> divisors(12, 8)
    [1, 2, 4]
    """
    common = math.gcd(*sizes)
    return [n for n in range(1, min(common, most or common) + 1) if common % n == 0]


def partition(letters: str, *, shard_params: bool = False) -> PartitionSpec:
    """The PartitionSpec of an array with those axes; `shard_params` puts D and E over `data`.

    >>> tuple(partition("LDHK"))
    (None, None, 'model', None)
    >>> tuple(partition("LDHK", shard_params=True))
    (None, 'data', 'model', None)
    """
    extra = {"D": "data", "E": "data"} if shard_params else {}
    return PartitionSpec(*((AXIS_OF_LETTER | extra).get(letter) for letter in letters))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array.

    >>> replicated(make_mesh(1, 1)).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(
    tree: Any,
    axes: Mapping[str, str],
    mesh: Mesh | AbstractMesh,
    *,
    shard_params: bool = False,
) -> Any:
    """A sharding for every leaf: by `axes[name]` of the last key in its path, else replicated.

    Optimizer states mirror the parameters' names, so one table places both. A leaf whose rank is
    not that of its letters (an optimizer's scalar) is replicated.

    >>> tree = {"up": jax.ShapeDtypeStruct((2, 4), "float32")}
    >>> tuple(tree_shardings(tree, {"up": "DF"}, make_mesh(1, 1))["up"].spec)
    (None, 'model')
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        letters = next((axes[name] for name in reversed(names) if name in axes), "")
        if len(letters) != len(leaf.shape):
            return replicated(mesh)
        spec = partition(letters, shard_params=shard_params)
        # A dimension that the mesh does not divide stays whole on every device.
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(place, tree)


# --------------------------------------------------------------------------------------------------
# Inside jax.shard_map; anywhere else all of these do nothing


def ways(axis: str) -> int:
    """Into how many parts `axis` splits the code that is traced here; 1 outside `jax.shard_map`.

    >>> ways("model")
    1
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def first_of(size: int, axis: str = "model") -> Any:
    """The index, in the whole, of the first of the `size` entries that this part of `axis` holds.

    >>> first_of(16)
    0
    """
    return jax.lax.axis_index(axis) * size if ways(axis) > 1 else 0


def piece(tokens: jax.Array) -> jax.Array:
    """Of rows of T + 1 tokens, the T / parts of this part of `sequence` and the one that follows:
    a piece's inputs and targets, as the whole row has them.

    >>> piece(jax.numpy.arange(5)).tolist()
    [0, 1, 2, 3, 4]
    """
    if ways("sequence") == 1:
        return tokens
    size = (tokens.shape[-1] - 1) // ways("sequence")
    return jax.lax.dynamic_slice_in_dim(tokens, first_of(size, "sequence"), size + 1, axis=-1)


def all_positions(x: jax.Array) -> jax.Array:
    """`x[B, T, ...]` of all parts of `sequence`, in order; its cotangents are summed and scattered.

    >>> all_positions(jax.numpy.ones((1, 2))).shape
    (1, 2)
    """
    if ways("sequence") == 1:
        return x
    return jax.lax.all_gather(x, "sequence", axis=1, tiled=True)


def fan_out(x: jax.Array) -> jax.Array:
    """`x`, whose cotangent is summed over `model`: what the parts of a split matrix all read.

    >>> fan_out(jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
    """
    return _fan_out(x) if ways("model") > 1 else x


def total(y: jax.Array) -> jax.Array:
    """The sum of `y` over `model`, whose cotangent is taken as it is: what they give together.

    >>> total(jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
    """
    return _total(y) if ways("model") > 1 else y


@jax.custom_vjp
def _fan_out(x: jax.Array) -> jax.Array:
    return x


_fan_out.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.psum(dx, "model"),))


@jax.custom_vjp
def _total(y: jax.Array) -> jax.Array:
    return jax.lax.psum(y, "model")


_total.defvjp(lambda y: (jax.lax.psum(y, "model"), None), lambda _, dy: (dy,))


def mean(tree: Any) -> Any:
    """The mean over `data` and `sequence` of every leaf: of means over parts of one size.

    >>> mean({"a": 1.0})
    {'a': 1.0}
    """
    axes = _token_axes()
    return jax.lax.pmean(tree, axes) if axes else tree


def _token_axes() -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "sequence") if ways(axis) > 1)


def gather(tree: Any, specs: Any) -> Any:
    """Every leaf that its spec splits over `data`, whole along that dimension.

    >>> gather({"a": jax.numpy.ones(2)}, {"a": PartitionSpec("data")})["a"].tolist()
    [1.0, 1.0]
    """

    def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "data" not in spec:
            return leaf
        return jax.lax.all_gather(leaf, "data", axis=spec.index("data"), tiled=True)

    return tree if ways("data") == 1 else jax.tree.map(one, tree, specs)


def reduce(tree: Any, specs: Any) -> Any:
    """The sum of every leaf over `data` and `sequence`; of one that its spec splits over `data`,
    only this part's share.

    >>> reduce({"a": jax.numpy.ones(2)}, {"a": PartitionSpec()})["a"].tolist()
    [1.0, 1.0]
    """
    axes = _token_axes()

    def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "data" not in spec or "data" not in axes:
            return jax.lax.psum(leaf, axes)
        at = spec.index("data")
        share = jax.lax.psum_scatter(leaf, "data", scatter_dimension=at, tiled=True)
        return jax.lax.psum(share, "sequence") if "sequence" in axes else share

    return jax.tree.map(one, tree, specs) if axes else tree
