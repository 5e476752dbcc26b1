"""The training step: pure, jitted once, sharded, donated.

`program(config, mesh)` compiles nothing: it holds the jitted `init`, `train_step`, `eval_step` and
`probe` of one config on one mesh. A batch is tokens[A, B, T + 1]: A micro-batches are accumulated
inside the step, on each device its own rows, or its own positions of them; the gradients are then
summed over `data` and `sequence` once.

Axis key: A micro-batch, B batch, T position, V vocabulary, L sublayer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mhcjax import diagnostics, gpt, head, optim, sharding
from mhcjax.config import Config, ModelConfig, check_ranges

__all__ = [
    "DEVICES",
    "Device",
    "Program",
    "State",
    "abstract_state",
    "check_mesh",
    "device_of",
    "flops_per_token",
    "losses",
    "program",
]


class Device(NamedTuple):
    """What the maker states: dense bf16 peak in FLOP/s, memory in bytes; in bytes/s the memory's
    bandwidth, and of each device one way the link within a host and the network between hosts of
    `host` devices. None: not stated here."""

    peak_flops: float
    memory: float
    bandwidth: float | None = None
    link: float | None = None
    network: float | None = None
    host: int = 8


# From the makers' data sheets; the kind as JAX names it. Links: NVLink of the SXM boards, the
# bridge of the PCIe card (half of the two-way figure); network: of the DGX system of that device,
# one InfiniBand port a GPU (A100 200 Gb/s, H100 and H200 400 Gb/s).
DEVICES = {
    "NVIDIA H200": Device(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "NVIDIA H100 80GB HBM3": Device(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "NVIDIA H100 PCIe": Device(756e12, 80e9, 2.0e12, 300e9, 50e9, host=2),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 40e9, 1.555e12, 300e9, 25e9),
    "TPU v4": Device(275e12, 32e9),
    "TPU v5 lite": Device(197e12, 16e9),
    "TPU v5p": Device(459e12, 95e9),
    "TPU v6 lite": Device(918e12, 32e9),
}


# XLA may drop a rounding to bfloat16 between two float32 operations, and then keeps the streams
# between sublayers in float32: twice the bytes, and other numbers than the dtype says.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("updates", "batches", "skipped", "skipped_in_row", "params", "opt_state"),
    meta_fields=(),
)
@dataclass(frozen=True)
class State:
    """All that training carries. `batches` counts the batches consumed and is the data position;
    `updates` counts optimizer updates. They differ by the skipped, non-finite ones."""

    updates: jax.Array
    batches: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    params: Any
    opt_state: Any


@dataclass(frozen=True)
class Program:
    """The jitted functions of one config on one mesh, and where their arguments live; `step` is
    the training step before it is jitted."""

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract_state: State
    batch_sharding: NamedSharding
    init: Callable[[jax.Array], State]
    step: Callable[[State, jax.Array, optim.Hyper], tuple[State, dict]]
    train_step: Any
    eval_step: Any
    probe: Any

    def compile(self, hyper: optim.Hyper) -> Any:
        """The training step, compiled ahead and with COMPILER_OPTIONS, which `jax.jit` would not
        let pass through an outer jit or vmap."""
        lowered = self.train_step.lower(self.abstract_state, self.abstract_batch, hyper)
        return lowered.compile(compiler_options=COMPILER_OPTIONS)

    @property
    def abstract_batch(self) -> jax.ShapeDtypeStruct:
        """Shape and sharding of one batch."""
        data = self.config.data
        shape = (data.micro_batches, data.batch, data.length + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)


def losses(
    model: gpt.GPT, tokens_BT: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """-> (what is minimised, mean cross-entropy); position t predicts token t + 1.

    `mean nll + z_loss * mean logsumexp^2` (z-loss: PaLM, arXiv 2204.02311, section 5).

    >>> config = ModelConfig(layers=1, width=8, vocab=16)
    >>> graphdef, params = gpt.build(config, key=jax.random.key(0))
    >>> total, ce = losses(nnx.merge(graphdef, params), jnp.zeros((1, 5), int))
    >>> bool(total == ce)
    True
    """
    h, _ = model.features(tokens_BT[:, :-1])
    weight, targets = model.head_weight(), tokens_BT[:, 1:]
    if model.config.loss == "chunked":
        total, ce = head.loss(h, weight, targets, model.head_spec, z_loss)
        return total, jax.lax.stop_gradient(ce)
    nll, logsumexp = head.cross_entropy(h, weight, targets, model.head_spec)
    return jnp.mean(nll) + z_loss * jnp.mean(logsumexp**2), jnp.mean(nll)


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """One sentence where the config does not divide over the mesh.

    >>> check_mesh(Config(), sharding.make_mesh(1, 1))
    """
    m = config.model
    if tuple(mesh.axis_names) != sharding.AXES:
        raise ValueError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}: make one with "
            f"{', '.join(sharding.AXES)}, as sharding.make_mesh does"
        )
    params = gpt.abstract_params(m)
    over_model = {
        "model.heads": m.heads,
        "model.kv_heads": m.kv_heads or m.heads,
        "model.hidden": params["blocks"]["mlp"]["up"].shape[-1],
        f"the storage of model.vocab {m.vocab}": params["embedding"].shape[0],
    }
    over_data = {"data.batch": config.data.batch}
    if config.mesh.shard_params:
        over_data["model.width"] = m.width
    over_sequence = {"data.length": config.data.length}
    split = {"model": over_model, "sequence": over_sequence, "data": over_data}
    for axis, sizes in split.items():
        parts = mesh.shape[axis]
        for name, size in sizes.items():
            if size % parts:
                fits = sharding.divisors(*sizes.values(), most=mesh.size)
                raise ValueError(
                    f"{name}, {size}, does not divide by mesh.{axis} {parts}: "
                    f"give mesh.{axis} one of {fits}, or change the size"
                )
    if config.data.length > m.context:
        raise ValueError(
            f"data.length {config.data.length} is beyond model.context {m.context}: raise it"
        )


def abstract_state(config: Config, mesh: Mesh | AbstractMesh) -> State:
    """Shape, dtype and sharding of every array of the state; none is allocated, no device needed.

    >>> state = abstract_state(Config(), AbstractMesh((64, 1, 8), sharding.AXES))
    >>> head = state.params["head"]
    >>> head.shape, head.sharding.shard_shape(head.shape)
    ((128, 4096), (128, 512))
    """

    def zeros() -> State:
        params = gpt.build(config.model, key=jax.random.key(0))[1]
        zero = jnp.zeros((), jnp.int32)
        return State(zero, zero, zero, zero, params, optim.optimizer(config.optim).init(params))

    shapes = jax.eval_shape(zeros)
    places = sharding.tree_shardings(shapes, gpt.AXES, mesh, shard_params=config.mesh.shard_params)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places
    )


def program(config: Config, mesh: Mesh | None = None) -> Program:
    """The jitted functions of this config; nothing is compiled or allocated yet.

    >>> from mhcjax.config import preset
    >>> program(preset("nano")).abstract_batch.shape
    (1, 16, 129)

    Raises ValueError for a config that cannot be a model or does not fit the mesh.
    """
    check_ranges(config)
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("model.dtype is float64 but JAX runs in 32 bit: set JAX_ENABLE_X64=1")
    if mesh is None:
        m = config.mesh
        mesh = sharding.make_mesh(m.data, m.model, sequence=m.sequence)
    graphdef = gpt.graph(config.model)
    check_mesh(config, mesh)
    spec = gpt.connection_of(config.model)
    if mesh.size > 1:
        everywhere = partial(jax.lax.with_sharding_constraint, shardings=sharding.replicated(mesh))
        tx = optim.optimizer(config.optim, whole=everywhere)
    else:
        tx = optim.optimizer(config.optim)

    def init(key: jax.Array) -> State:
        params = gpt.build(config.model, key=key)[1]
        zero = jnp.zeros((), jnp.int32)
        return State(zero, zero, zero, zero, params, tx.init(params))

    abstract = abstract_state(config, mesh)
    states = jax.tree.map(lambda a: a.sharding, abstract)
    specs = jax.tree.map(lambda s: s.spec, states.params)
    whole = sharding.replicated(mesh)
    batches = NamedSharding(mesh, PartitionSpec(None, "data", None))
    rows = NamedSharding(mesh, PartitionSpec("data", None))

    def by_hand(f: Callable, tokens: PartitionSpec, out_specs: Any) -> Callable:
        """`f(params, tokens)` on each device's own part of both."""
        options = {"mesh": mesh, "in_specs": (specs, tokens), "out_specs": out_specs}
        return jax.shard_map(f, **options, check_vma=False)

    def loss(params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses(nnx.merge(graphdef, params), tokens_BT, z_loss=config.optim.z_loss)

    def micro_batches(params: Any, batch_ABT: jax.Array) -> tuple[Any, Any]:
        """-> ((loss, cross-entropy), gradients), means over the batch."""
        params, batch_ABT = sharding.gather(params, specs), sharding.piece(batch_ABT)
        micro = jax.value_and_grad(loss, has_aux=True)
        if batch_ABT.shape[0] == 1:
            found = micro(params, batch_ABT[0])
        else:

            def accumulate(carry: Any, tokens_BT: jax.Array) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, micro(params, tokens_BT)), None

            shapes = jax.eval_shape(micro, params, batch_ABT[0])
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            found, _ = jax.lax.scan(accumulate, zeros, batch_ABT)
        parts = batch_ABT.shape[0] * sharding.ways("data") * sharding.ways("sequence")
        sums = sharding.reduce(found, ((PartitionSpec(), PartitionSpec()), specs))
        return jax.tree.map(lambda a: a / parts, sums) if parts > 1 else sums

    if mesh.size > 1:
        sums = ((PartitionSpec(), PartitionSpec()), specs)
        micro_batches = by_hand(micro_batches, batches.spec, sums)

    def train_step(state: State, batch_ABT: jax.Array, scalars: optim.Hyper) -> tuple[State, dict]:
        (total, ce), gradients = micro_batches(state.params, batch_ABT)
        gradients = optim.freeze_dead(gradients, spec, config.model)
        gradients = optim.limit_scales(gradients, config.optim)
        norm = optax.tree.norm(gradients)
        # Tested before anything is touched: a non-finite update leaves weights and moments alone.
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        scale = jnp.minimum(1.0, scalars.clip / jnp.maximum(norm, 1e-30))
        clipped = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        updates, opt_state = tx.update(clipped, state.opt_state, state.params)
        share = optim.learning_rate(config.optim, state.updates, scalars.schedule_steps)
        params = optim.apply(state.params, updates, scalars, share)
        keep = partial(jax.tree.map, partial(jnp.where, good))
        after = State(
            updates=state.updates + good,
            batches=state.batches + 1,
            skipped=state.skipped + ~good,
            skipped_in_row=jnp.where(good, 0, state.skipped_in_row + 1),
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        return after, {
            "loss": total,
            "ce": ce,
            "learning_rate": share * scalars.rates["matrix"],
            "grad_norm": norm,
            "skipped": after.skipped,
            "skipped_in_row": after.skipped_in_row,
        }

    def predict(params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, tokens_BT = sharding.gather(params, specs), sharding.piece(tokens_BT)
        model = nnx.merge(graphdef, params)
        h, _ = model.features(tokens_BT[:, :-1])
        return head.predict(h, model.head_weight(), tokens_BT[:, 1:], model.head_spec)

    def eval_step(params: Any, tokens_BT: jax.Array, bytes_V: jax.Array) -> dict:
        """Sums over the batch: nll in nats, tokens, bytes of text, copies, differing, repeats."""
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        nll, predicted = predict(params, tokens_BT)
        copy = diagnostics.copy_rate(predicted, inputs, targets)
        return {
            "nll": jnp.sum(nll),
            "tokens": jnp.asarray(targets.size, jnp.int32),
            "bytes": jnp.sum(bytes_V[targets]),
            "copy_rate": copy.rate,
            "repeat_rate": copy.repeats,
        }

    def probe(params: Any, tokens_BT: jax.Array) -> dict:
        """Per sublayer: cosines, effective streams, entropy, largest |gradient| of each leaf."""
        params, tokens_BT = sharding.gather(params, specs), sharding.piece(tokens_BT)
        records, last = nnx.merge(graphdef, params).trace(tokens_BT[:, :-1])
        gradients = jax.grad(lambda p: loss(p, tokens_BT)[0])(params)
        means = {
            "cosine_operand": jnp.stack([diagnostics.stream_cosine(r.operand) for r in records]),
            "cosine_streams": jnp.stack(
                [diagnostics.stream_cosine(r.x) for r in records[1:]]
                + [diagnostics.stream_cosine(last)]
            ),
            "effective_streams": jnp.stack(
                [diagnostics.effective_streams(r.operand) for r in records]
            ),
            "entropy": jnp.stack([diagnostics.entropy(r.mix.res) for r in records]),
            "gradients": {
                f"{layer}.{leaf}": g
                for layer, _, leaf, g in gpt.sublayer_leaves(gradients, config.model)
            },
        }
        means = sharding.mean(means)
        largest = {name: jnp.max(jnp.abs(g)) for name, g in means["gradients"].items()}
        return means | {"gradients": largest}

    # The partitioner would gather the streams for a kernel, and not split a row of a long context.
    if mesh.size > 1:
        predict = by_hand(predict, rows.spec, PartitionSpec("data", "sequence"))
        probe = by_hand(probe, rows.spec, PartitionSpec())

    return Program(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract,
        batch_sharding=batches,
        init=jax.jit(init, out_shardings=states),
        step=train_step,
        train_step=jax.jit(
            train_step,
            in_shardings=(states, batches, whole),
            out_shardings=(states, whole),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            eval_step, in_shardings=(states.params, rows, whole), out_shardings=whole
        ),
        probe=jax.jit(probe, in_shardings=(states.params, rows), out_shardings=whole),
    )


def flops_per_token(config: ModelConfig, length: int) -> float:
    """`6 P + 6 L T D` of one training token: P without the embedding lookup, attention causal.

    >>> flops_per_token(ModelConfig(), 128) > 6e6
    True
    """
    params = gpt.abstract_params(config)
    lookup = 0 if config.tied else params["embedding"].size
    return 6.0 * (gpt.count(params) - lookup) + 6.0 * config.layers * length * config.width


def device_of(kind: str) -> Device | None:
    """The stated figures of a device kind, by JAX's name or a part of it; None for a CPU.

    >>> device_of("h200").memory
    141000000000.0
    >>> device_of("cpu") is None
    True

    Raises ValueError for a name that fits none or several, with the known ones.
    """
    if kind in DEVICES:
        return DEVICES[kind]
    if kind.lower() == "cpu":
        return None
    found = [name for name in DEVICES if kind.lower() in name.lower()]
    if len(found) != 1:
        raise ValueError(
            f"device kind {kind!r} fits {len(found)} known kinds: name one of cpu, "
            + ", ".join(DEVICES)
        )
    return DEVICES[found[0]]
