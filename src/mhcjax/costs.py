"""What a config costs each device of a mesh, in closed form: collectives and memory.

Nothing is compiled, no parameter is allocated and no device is needed, so that a mesh of thousands
is answered at once. State and collectives are exact, and held against compiled programs; what the
forward pass saves is counted, what the compiler makes of it is estimated.

Axis key: B batch, T position, D width, N stream, H head, K head size, F hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from mhcjax import coefficients, connections, gpt, head, optim, sharding, train
from mhcjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from mhcjax.diagnostics import dead_leaves

__all__ = [
    "Collective",
    "Memory",
    "Sizes",
    "collectives",
    "gathered_shape",
    "local_bytes",
    "memory",
    "mesh_of",
    "parse_mesh",
]

# Of a block's two norms, those whose input XLA keeps beside the output that autodiff saves, where
# nothing is made again: the second in the 124M shape, one to two in 1.3B. Fitted to the steps
# compiled for an H200 (model_kernels_h200.json, `compiled`).
NORM_INPUTS = 1

SUBLAYER = {f"{name}_connection": offset for offset, name in enumerate(gpt.SUBLAYERS)}


# --------------------------------------------------------------------------------------------------
# The mesh


def parse_mesh(text: str) -> dict[str, Any]:
    """`data=64,model=8` -> the config's changes; an axis that is not named has one device.

    >>> parse_mesh("data=64,model=8")
    {'mesh.data': 64, 'mesh.sequence': 1, 'mesh.model': 8}

    Raises ValueError for anything else, with the form.
    """
    found: dict[str, Any] = {f"mesh.{axis}": 1 for axis in sharding.AXES}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if f"mesh.{name}" not in found or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text}: write it as data=64,model=8")
        found[f"mesh.{name}"] = int(size)
    return found


def mesh_of(config: Config) -> AbstractMesh:
    """The mesh that the config names, without devices; `mesh.data` None counts as 1.

    >>> from mhcjax.config import override
    >>> dict(mesh_of(override(Config(), parse_mesh("data=64,model=8"))).shape)
    {'data': 64, 'sequence': 1, 'model': 8}
    """
    sizes = (config.mesh.data or 1, config.mesh.sequence, config.mesh.model)
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@functools.lru_cache(maxsize=64)  # a search over batches asks for the same one again and again
def _state(model: ModelConfig, optim: OptimConfig, mesh: MeshConfig) -> train.State:
    config = Config(model=model, optim=optim, mesh=mesh)
    return train.abstract_state(config, mesh_of(config))


@functools.lru_cache(maxsize=64)
def _fused(model: ModelConfig) -> bool:
    """Do the kernels mix the streams on a GPU? Where coefficients are a token's own, and fit."""
    spec, how = gpt.connection_of(model), model.connection.implementation or "pallas"
    if not isinstance(spec.coefficients, coefficients.Dynamic):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that XLA runs in their place is the answer here
        return connections.implementation_of(spec, model.width, model.dtype, how) == "pallas"


class Sizes:
    """The sizes that the closed forms share, of one device and one micro-batch."""

    def __init__(self, config: Config) -> None:
        m, mesh = config.model, mesh_of(config)
        self.config, self.mesh = config, mesh
        self.data, self.sequence, self.model = (mesh.shape[axis] for axis in sharding.AXES)
        # Recomputing changes nothing of the state.
        plain = replace(m, remat=False, remat_streams=False)
        self.state = _state(plain, config.optim, config.mesh)
        self.spec = gpt.connection_of(m)
        self.fixed = isinstance(self.spec.coefficients, coefficients.Fixed)
        self.bytes = jnp.dtype(m.dtype).itemsize
        self.micro = config.data.micro_batches
        self.rows, self.length = config.data.batch // self.data, config.data.length
        self.positions = self.length // self.sequence  # of a row
        self.tokens = self.rows * self.positions
        K = m.width // m.heads
        self.queries = m.heads * K // self.model
        self.keys = (m.kv_heads or m.heads) * K // self.model
        self.hidden = self.state.params["blocks"]["mlp"]["up"].shape[-1] // self.model
        self.vocab = self.state.params["embedding"].shape[0] // self.model
        self.chunks = 1
        if m.loss == "chunked":
            h = jax.ShapeDtypeStruct((self.rows, self.positions, m.width), m.dtype)
            self.chunks = head.chunks_of(h, jax.ShapeDtypeStruct((m.width, self.vocab), m.dtype))
        names = ("attention", "mlp")
        leaves = {n: jax.tree.leaves(self.state.params["blocks"][n]) for n in names}
        self.matrices = sum(math.prod(a.shape) for n in names for a in leaves[n]) // self.model
        # Of a dynamic mix, for one token: logits, and products of its projection.
        inputs, columns = self.spec.shapes(m.width).get("projection", (0, 0))
        times = self.spec.streams if getattr(self.spec.coefficients, "per_stream", False) else 1
        self.logits, self.projection = times * columns, times * inputs * columns
        self.fused = _fused(plain)
        # What the backward pass makes again ("": nothing), and of how many blocks at once, from
        # the streams at the start of each group.
        self.recomputed = _recomputed(m)
        in_groups = self.recomputed == "streams"
        self.every = gpt.group_size(m) if in_groups else 1
        self.groups = -(-m.layers // self.every)


def _recomputed(m: ModelConfig) -> str:
    if m.remat not in (True, False, "none", "full"):
        raise ValueError(f"model.remat {m.remat!r} has no plan yet: use none or full")
    blocks = m.remat in (True, "full")
    if blocks and m.remat_streams:
        raise ValueError("model.remat and model.remat_streams have no plan together: use one")
    return "blocks" if blocks else "streams" if m.remat_streams else ""


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of placed arrays on each device."""
    shapes = [(a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * size for shape, size in shapes)


# --------------------------------------------------------------------------------------------------
# Collectives


@dataclass(frozen=True)
class Collective:
    """`count` exchanges, in one update, of an array of that shape: whole, where it is gathered or
    scattered, and between the devices along `axis`."""

    what: str
    kind: str
    axis: str
    dtype: str
    shape: tuple[int, ...]
    count: int

    @property
    def bytes(self) -> int:
        """Of all `count` arrays."""
        return self.count * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def collectives(config: Config) -> list[Collective]:
    """Every collective of one update of the training step.

    Over `model`, in each micro-batch: the embedding's rows and, for each sublayer, one sum forward
    and one backward, of [B, T, D] whatever N is: streams are mixed where they lie. The head adds
    a maximum, a sum and the target's logit of each position, and one [B, T, D]. Over `sequence`,
    for each attention: keys and values of the whole row are gathered, their cotangents scattered.
    Over `data`, and `sequence` with it, once an update: each gradient is summed; where parameters
    are sharded they are gathered and their gradients scattered over `data`, then summed over
    `sequence`.

    >>> from mhcjax.config import override
    >>> config = override(Config(), parse_mesh("data=4,model=2"))
    >>> [c.count for c in collectives(config) if c.what == "sublayers"], config.model.layers
    ([16], 4)
    """
    z = Sizes(config)
    found: list[Collective] = []
    if z.model > 1:
        found += _over_model(z)
    if z.sequence > 1:
        found += _over_sequence(z)
    if z.data * z.sequence > 1:
        found += _over_data(z)
    return found + list(_of_update(z))


def _over_model(z: Sizes) -> list[Collective]:
    m = z.config.model
    stream = (z.rows, z.positions, m.width)
    # A residual's output is made again only for the read after it, in the same block.
    again = (1 if z.fixed else 2) * m.layers if z.recomputed == "blocks" else 0
    part = (z.rows, z.positions // z.chunks)
    wide = str(jnp.promote_types(jnp.float32, m.dtype))

    def one(what: str, dtype: str, shape: tuple[int, ...], count: int) -> Collective:
        return Collective(what, "all-reduce", "model", dtype, shape, z.micro * count)

    return [
        one("embedding", m.dtype, stream, 1),
        one("sublayers", m.dtype, stream, 4 * m.layers + again),
        one("head", wide, part, 3 * z.chunks),
        one("head", m.dtype, (*part, m.width), z.chunks),
    ]


def _over_sequence(z: Sizes) -> list[Collective]:
    """Keys and values, of each block and micro-batch; gathered again where the block is made so."""
    m = z.config.model
    K, pair = m.width // m.heads, 2 * m.layers * z.micro
    gathers = 2 if z.recomputed == "blocks" else 1
    shape = (z.rows, z.length, z.keys // K, K)
    return [
        Collective("keys and values", kind, "sequence", m.dtype, shape, count)
        for kind, count in (("all-gather", gathers * pair), ("reduce-scatter", pair))
    ]


def _over_data(z: Sizes) -> list[Collective]:
    axes = "+".join(axis for axis in ("data", "sequence") if z.mesh.shape[axis] > 1)
    found = [Collective("loss", "all-reduce", axes, _wide(z), (), 2)]
    dead = dead_leaves(z.spec, 2 * z.config.model.layers)
    for path, leaf in jax.tree_util.tree_leaves_with_path(z.state.params):
        names = [key.key for key in path]
        offset = SUBLAYER.get(names[1]) if len(names) == 3 else None
        blocks = range(z.config.model.layers)
        if offset is not None and all((2 * b + offset, names[-1]) in dead for b in blocks):
            continue  # frozen in every block, as in a model of one: nobody asks for the sum
        whole, share = gathered_shape(z, leaf), leaf.sharding.shard_shape(leaf.shape)
        exchanges = [("gradients", "all-reduce", axes, whole)]
        if "data" in leaf.sharding.spec and z.data > 1:
            exchanges = [
                ("parameters", "all-gather", "data", whole),
                ("gradients", "reduce-scatter", "data", whole),
            ]
            if z.sequence > 1:
                exchanges.append(("gradients", "all-reduce", "sequence", share))
        for what, kind, axis, shape in exchanges:
            found.append(Collective(what, kind, axis, str(leaf.dtype), shape, 1))
    return found


def _of_update(z: Sizes) -> Iterator[Collective]:
    """The gradient norm's share of each split leaf; what Newton-Schulz wants whole."""
    groups = optim.labels(z.state.params)
    config = z.config.optim
    for group, leaf in zip(jax.tree.leaves(groups), jax.tree.leaves(z.state.params), strict=True):
        spec = _spec(leaf)
        axes = [axis for axis in spec if axis and z.mesh.shape[axis] > 1]
        for axis in axes:
            yield Collective("norm", "all-reduce", axis, str(leaf.dtype), (), 1)
        if group != "matrix" or config.name != "muon":
            continue
        shape = list(leaf.sharding.shard_shape(leaf.shape))
        for d in reversed(range(len(shape))):
            if spec[d] in axes:
                shape[d] *= z.mesh.shape[spec[d]]
                dtype = config.muon_dtype or str(leaf.dtype)
                yield Collective("matrices", "all-gather", spec[d], dtype, tuple(shape), 1)


def _spec(leaf: Any) -> tuple:
    """The mesh axis of each dimension, or None."""
    return (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))


def _wide(z: Sizes) -> str:
    return str(jnp.promote_types(jnp.float32, z.config.model.dtype))


# --------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes on each device. Parameters and optimizer are exact, the rest is estimated.

    `gathered`: the parameters whole along `data`, while a step of sharded ones runs. `gradients`:
    of one micro-batch, and their sum where there are several. `weights`: those of each block that
    wait for its backward pass, in the dtype of the activations, or as they are stored where the
    block is made again from them. `activations`: what the forward pass saves. `temporary`: the
    largest of what lives and dies: a chunk of logits, or what is made again at once. `peak`: at the
    worst moment.
    """

    parameters: int
    optimizer: int
    gathered: int
    gradients: int
    weights: int
    activations: int
    temporary: int
    peak: int


def memory(config: Config) -> Memory:
    """What each device holds.

    Saved per token and block, in numbers of the activations' dtype: both norms 2 D; queries, keys,
    values and output; the hidden ones 2 F (SwiGLU 3 F); for each sublayer whose mix has a gradient
    its streams and output, (N + 1) D, and a dynamic mix's coefficients in float32; for an exit that
    learns N D at the end. Where `sequence` splits positions: keys and values of the whole row.
    Recomputed blocks keep N D each, recomputed streams N D a group of blocks and all that is no
    stream. Beside that live, at the head, two arrays of a chunk's logits and the blocks' weights;
    at the first block, all gradients.

    >>> memory(Config()).optimizer > memory(Config()).parameters
    True
    """
    z = Sizes(config)
    block = _saved_by_block(z)
    kept, again = _kept_and_made_again(z, block)
    activations = z.tokens * (kept + _at_the_exit(z)) + _mask_bytes(z)
    parameters, size = local_bytes(z.state.params), jnp.dtype(_param_dtype(z)).itemsize
    whole = sum(math.prod(gathered_shape(z, leaf)) for leaf in jax.tree.leaves(z.state.params))
    gathered = whole * size if z.config.mesh.shard_params and z.data > 1 else 0
    gradients = whole * size * (2 if z.micro > 1 else 1)
    weights = _waiting_weights(z)
    logits = _head_bytes(z)
    again *= z.tokens
    optimizer = local_bytes(z.state) - parameters
    sums = whole * size if z.micro > 1 else 0  # held all along
    # What the first block is made of, or the first group made again, beside all gradients.
    first = activations // z.groups + again if z.recomputed == "streams" else z.tokens * block
    # Once a block has its own weights nobody asks for what they were cut from, but other steps of
    # a loop.
    cut = z.matrices * size if z.config.model.walk == "loop" and z.micro == 1 else 0
    entering, leaving = gathered, gathered - min(gathered, cut)
    moment = max(
        entering + weights,
        leaving + weights + activations + max(logits, again),
        leaving + gradients - sums + first,
    )
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        gathered=gathered,
        gradients=gradients,
        weights=weights,
        activations=activations,
        temporary=max(logits, again),
        peak=parameters + optimizer + sums + moment,
    )


def _param_dtype(z: Sizes) -> Any:
    return z.state.params["embedding"].dtype


def gathered_shape(z: Sizes, leaf: Any) -> tuple[int, ...]:
    """The shape of a parameter as a step uses it: one part of `model`, whole along `data`."""
    part = leaf.sharding.shard_shape(leaf.shape)
    return tuple(
        n * z.data if axis == "data" else n for axis, n in zip(_spec(leaf), part, strict=True)
    )


def _saved_by_block(z: Sizes) -> int:
    """Bytes per token."""
    m = z.config.model
    numbers = 2 * m.width + 2 * z.queries + 2 * z.keys + _gathered_numbers(z)
    numbers += (3 if m.mlp == "swiglu" else 2) * z.hidden
    heads = (z.queries + z.keys) // (m.width // m.heads)
    floats = 2 + heads  # factors of the norms
    if not z.fixed:
        numbers += 2 * (z.spec.streams + 1) * m.width
        floats += 2 * (z.logits + z.spec.streams * (z.spec.streams + 2)) if z.logits else 0
    return numbers * z.bytes + 4 * floats + _of_attention(z)


def _gathered_numbers(z: Sizes) -> int:
    """Per token and block: keys and values of the other pieces; a normed key's own one besides."""
    own = z.keys if z.config.model.qk_norm else 0
    return 2 * z.keys * (z.sequence - 1) + own if z.sequence > 1 else 0


def _mask_bytes(z: Sizes) -> int:
    """What a piece attends to, which all blocks share: for cuDNN a bias, beside its gradient."""
    return 2 * z.positions * z.length * z.bytes if z.sequence > 1 and z.bytes == 2 else 0


def _kept_and_made_again(z: Sizes, block: int) -> tuple[int, int]:
    """Bytes per token: what the forward pass keeps of all blocks, and what is made again at
    once, of a block or of a group of them."""
    m, blocks = z.config.model, z.config.model.layers * block
    streams = m.width * z.spec.streams * z.bytes
    if z.recomputed == "blocks":  # with what the next sublayer reads, where that is carried
        return z.groups * (streams + z.spec.carried * m.width * z.bytes), block
    if not z.recomputed:
        inputs = NORM_INPUTS * m.layers if m.walk == "loop" else 0
        return blocks + inputs * m.width * z.bytes, 0
    if z.bytes != 2:  # no fused attention, whose own would be kept
        blocks -= m.layers * _of_attention(z)
    if z.fixed:  # the residual's streams are kept for nothing
        return blocks, 0
    if z.fused:  # a mean square, but no pre that no later read wants
        blocks += 4 * 2 * m.layers * (1 if z.spec.carried else 1 - z.spec.streams)
    return blocks - (2 * m.layers - z.groups) * streams, (2 * z.every - 1) * streams


def _at_the_exit(z: Sizes) -> int:
    """Bytes per token: the last streams, where the exit's weights have gradients."""
    learns = bool(z.state.params.get("exit"))
    return z.spec.streams * z.config.model.width * z.bytes if learns else 0


def _waiting_weights(z: Sizes) -> int:
    """Bytes of the blocks' matrices that are held beside the stacked parameters."""
    stored = jnp.dtype(_param_dtype(z)).itemsize
    if z.recomputed:  # a scan cuts the stack as it goes, a loop before it begins
        return z.matrices * stored if z.config.model.walk == "loop" else 0
    return z.matrices * z.bytes if z.bytes < stored else 0


def _of_attention(z: Sizes) -> int:
    """Bytes per token and block: logsumexp; without fused attention the probabilities too."""
    heads = z.config.model.heads // z.model
    return 4 * heads + (2 * heads * z.length * z.bytes if z.bytes != 2 else 0)


def _head_bytes(z: Sizes) -> int:
    """Logits and their cotangent, the weight and its gradient, what goes in and comes out."""
    m, tokens = z.config.model, z.tokens
    weight = m.width * z.vocab
    if m.loss == "plain":
        return 3 * tokens * z.vocab * 4 + weight * (4 + z.bytes)
    logits = 2 * tokens // z.chunks * z.vocab * z.bytes
    return logits + weight * (4 * min(z.chunks, 2) + z.bytes) + 4 * tokens * m.width * z.bytes
