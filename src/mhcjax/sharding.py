"""The mesh, and axis letters -> PartitionSpec.

Axis key: B batch, D width, H head, F hidden, V vocabulary. Batch is split over `data`; heads,
hidden and vocabulary over `model`; width over `data` too where parameters are sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["divisors", "make_mesh", "partition", "replicated", "tree_shardings"]

AXIS_OF_LETTER = {"B": "data", "H": "model", "F": "model", "V": "model"}


def make_mesh(data: int | None = None, model: int = 1, *, devices: list | None = None) -> Mesh:
    """A mesh with axes `data` and `model` over the devices, or the first data * model of them.

    `data=None` takes all that `model` leaves over.

    >>> dict(make_mesh(1, 1).shape)
    {'data': 1, 'model': 1}

    Raises ValueError where the devices do not suffice or do not divide.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or (data is not None and data < 1):
        raise ValueError(f"mesh data={data}, model={model}: give at least 1 for each")
    count = len(devices)
    if data is None:
        if count % model:
            raise ValueError(
                f"mesh.model {model} does not divide the {count} devices: "
                f"use one of {divisors(count)}"
            )
        data = count // model
    size = data * model
    if size > count:
        if model <= count:
            fits = f"mesh.data at most {count // model}"
        else:
            fits = f"mesh.model at most {max(1, count // data)}"
        raise ValueError(
            f"mesh data={data} x model={model} wants {size} devices, {count} are here: give {fits}"
        )
    idle = {d.process_index for d in devices[size:]} - {d.process_index for d in devices[:size]}
    if idle:
        raise ValueError(
            f"mesh data={data} x model={model} takes {size} of {count} devices and none of process "
            f"{min(idle)}: give mesh.model one of {divisors(count)} and leave mesh.data out"
        )
    # Auto axes: Explicit, the default of make_mesh, breaks embedding lookups.
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: data * model],
    )


def divisors(*sizes: int, most: int | None = None) -> list[int]:
    """What divides all of the sizes, up to `most`.

    >>> divisors(12, 8)
    [1, 2, 4]
    """
    common = math.gcd(*sizes)
    return [n for n in range(1, min(common, most or common) + 1) if common % n == 0]


def partition(letters: str, *, shard_params: bool = False) -> PartitionSpec:
    """The PartitionSpec of an array with those axes; `shard_params` puts D over `data`.

    >>> tuple(partition("LDHK"))
    (None, None, 'model', None)
    >>> tuple(partition("LDHK", shard_params=True))
    (None, 'data', 'model', None)
    """
    extra = {"D": "data"} if shard_params else {}
    return PartitionSpec(*((AXIS_OF_LETTER | extra).get(letter) for letter in letters))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array.

    >>> replicated(make_mesh(1, 1)).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(
    tree: Any, axes: Mapping[str, str], mesh: Mesh, *, shard_params: bool = False
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
