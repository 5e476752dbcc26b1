"""Placement on a mesh changes nothing but rounding: one device equals eight, and each leaf lies
where its axis letters say.

Eight forced host devices stand for eight accelerators. Float64 keeps apart what float32 cannot: a
real difference between two meshes and another order of the same sum.
"""

import functools
import itertools
import re
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mhcjax import gpt, layers, optim, sharding, train
from mhcjax.config import (
    Config,
    ConnectionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)

STEPS = 5
# (data, model, shard_params, and sequence where it splits); all sizes below divide by eight, the
# storage of the vocabulary too.
ONE = (1, 1, False)
MESHES = [(8, 1, False), (8, 1, True), (4, 2, False), (4, 2, True)]
SEQUENCES = [(2, 2, False, 2), (1, 1, False, 8), (2, 1, True, 4)]
# Rates at which five steps move the parameters far beyond the tolerances.
RATES = {"sgd": 0.5, "adamw": 0.01, "lion": 0.003, "muon": 0.02}


def config_of(optimizer, dtype, mesh=ONE, layers=2, preset="mhc_n2", micro_batches=2):
    data, model, shard_params, *sequence = mesh
    return Config(
        model=ModelConfig(
            layers=layers,
            width=16,
            heads=4,
            kv_heads=2,
            hidden=32,
            vocab=120,
            context=8,
            dtype=dtype,
            connection=ConnectionConfig(
                preset, init="near_identity" if preset == "mhc_n2" else None
            ),
        ),
        data=DataConfig(batch=8, length=8, micro_batches=micro_batches),
        # No clipping: it would hide a gradient that is wrong by a factor.
        optim=OptimConfig(
            name=optimizer,
            learning_rate=RATES[optimizer],
            weight_decay=0.1,
            clip=0.0,
            schedule="constant",
            warmup_steps=0,
        ),
        mesh=MeshConfig(data, *(sequence or [1]), model, shard_params),
    )


def batches(config):
    """The batches of a run: every row and every step another one."""
    shape = (STEPS, config.data.micro_batches, config.data.batch, config.data.length + 1)
    return np.random.default_rng(1).integers(120, size=shape).astype(np.int32)


def run(config, given=None):
    """Train on the mesh of the config -> losses, and all leaves before and after by name."""
    double = config.model.dtype == "float64"
    with jax.enable_x64(True) if double else nullcontext():
        p = train.program(config)
        scalars = optim.hyper(config.optim, 100)
        state, losses = p.init(jax.random.key(0)), []
        before = named(state.params)
        for batch in batches(config) if given is None else given:
            state, metrics = p.train_step(state, batch, scalars)
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        assert int(state.updates) == STEPS
        dtype = np.dtype(config.model.dtype)
        assert {a.dtype for a in jax.tree.leaves(state.params)} == {dtype}
        return SimpleNamespace(
            losses=np.array(losses),
            before=before,
            after=named(state.params),
            opt_state=named(state.opt_state),
        )


@functools.cache
def alone(optimizer, dtype, **model):
    """The run on one device, and that it moved every leaf that may move."""
    found = run(config_of(optimizer, dtype, **model))
    moved = {n for n, a in found.after.items() if (a != found.before[n]).any()}
    assert moved == set(found.before)
    return found


def named(tree):
    """{dotted name: NumPy leaf}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(a) for p, a in leaves}


def distance(found, wanted):
    """Largest ||difference|| / ||leaf||, over the leaves: a bound of the ratio of the whole trees
    that a small mixing leaf cannot hide in."""
    assert found.keys() == wanted.keys()
    ratios = [
        np.linalg.norm(np.float64(found[n] - a)) / max(np.linalg.norm(np.float64(a)), 1e-30)
        for n, a in wanted.items()
    ]
    return max(ratios)


def gap(found, wanted):
    """-> (largest difference of the losses, distance of the parameters)."""
    return (
        np.abs(found.losses[:, 0] - wanted.losses[:, 0]).max(),
        distance(found.after, wanted.after),
    )


def identity(mesh):
    pieces = "".join(f"-sequence{n}" for n in mesh[3:])
    return f"data{mesh[0]}{pieces}-model{mesh[1]}-{'sharded' if mesh[2] else 'whole'}"


# --------------------------------------------------------------------------------------------------
# One device = eight devices


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=() if mesh in (MESHES[0], MESHES[-1]) else pytest.mark.slow)
        for mesh in MESHES
    ],
    ids=identity,
)
def test_eight_devices_equal_one_in_float32(mesh):
    """SGD, whose update is linear in the gradient: sums in another order, 1e-6."""
    wanted, found = alone("sgd", "float32"), run(config_of("sgd", "float32", mesh))
    # The same keys; a partitioned program may evaluate the normal's inverse in another way, and
    # under JAX 0.12 does: one rounding.
    assert distance(found.before, wanted.before) <= 2.0**-24
    assert distance(wanted.after, wanted.before) > 1e-2
    losses, parameters = gap(found, wanted)
    print(f"losses {losses:.2g}, parameters {parameters:.2g}")
    assert losses <= 1e-5 and parameters <= 1e-6


# Each optimizer once, on meshes and placements that differ; --slow runs the full product.
QUICK = {("adamw", (4, 2, True)), ("muon", (4, 2, False)), ("lion", (8, 1, True))}


@pytest.mark.parametrize(
    ("optimizer", "mesh"),
    [
        pytest.param(
            optimizer,
            mesh,
            marks=() if (optimizer, mesh) in QUICK else pytest.mark.slow,
            id=f"{optimizer}-{identity(mesh)}",
        )
        for optimizer in ("adamw", "muon", "lion")
        for mesh in MESHES
    ],
)
def test_eight_devices_equal_one_in_float64(optimizer, mesh):
    """Optimizers that divide by the gradient or take its sign magnify rounding: 1e-16 to 1e-10."""
    wanted, found = alone(optimizer, "float64"), run(config_of(optimizer, "float64", mesh))
    assert distance(found.before, wanted.before) == 0
    assert distance(wanted.after, wanted.before) > 1e-2
    losses, parameters = gap(found, wanted)
    print(f"losses {losses:.2g}, parameters {parameters:.2g}")
    assert losses <= 1e-10 and parameters <= 1e-10
    np.testing.assert_allclose(found.losses[:, 1], wanted.losses[:, 1], rtol=1e-10)
    # Moments too: they decide the steps that are not taken here. Muon's are sums of gradients.
    assert distance(found.opt_state, wanted.opt_state) <= 1e-10


# A part of every row on each device: the smallest first. --slow runs the full product.
QUICK_PIECES = {
    ("residual", SEQUENCES[1], 1),
    ("mhc_n2", SEQUENCES[0], 2),
    ("mhc", SEQUENCES[2], 2),
}


@pytest.mark.parametrize(
    ("preset", "mesh", "micro_batches"),
    [
        pytest.param(
            *case,
            marks=() if case in QUICK_PIECES else pytest.mark.slow,
            id=f"{case[0]}-{identity(case[1])}-{case[2]}",
        )
        for case in itertools.product(("residual", "mhc_n2", "mhc"), SEQUENCES, (1, 2))
    ],
)
def test_pieces_of_rows_equal_whole_rows(preset, mesh, micro_batches):
    """Down to one position on each device: attention over the whole row is the only exchange."""
    model = {"preset": preset, "micro_batches": micro_batches}
    wanted = alone("adamw", "float64", **model)
    found = run(config_of("adamw", "float64", mesh, **model))
    assert distance(found.before, wanted.before) == 0
    assert distance(wanted.after, wanted.before) > 1e-2
    losses, parameters = gap(found, wanted)
    print(f"losses {losses:.2g}, parameters {parameters:.2g}")
    assert losses <= 1e-10 and parameters <= 1e-10
    assert distance(found.opt_state, wanted.opt_state) <= 1e-10


# --------------------------------------------------------------------------------------------------
# Negative controls: the same comparison, one thing wrong

MESH = (8, 1, False)


def test_a_wrong_order_of_batches_is_caught():
    """The losses stay near ln V all along: only 20 times the tolerance; the parameters tell."""
    config = config_of("sgd", "float32", MESH)
    order = [1, 0, 2, 3, 4]
    losses, parameters = gap(run(config, batches(config)[order]), alone("sgd", "float32"))
    print(f"losses {losses:.2g}, parameters {parameters:.2g}")
    assert losses > 1e-4 and parameters > 1e-3


def test_the_loss_of_one_shard_is_caught(monkeypatch):
    """What a forgotten sum over the devices would train on: each device's own rows."""
    wanted = alone("sgd", "float32")  # before anything is patched
    monkeypatch.setattr(
        sharding,
        "reduce",
        lambda tree, specs: jax.tree.map(lambda a: a * sharding.ways("data"), tree),
    )
    losses, parameters = gap(run(config_of("sgd", "float32", MESH)), wanted)
    assert losses > 1e-3 and parameters > 1e-3


def from_zero(positions_BT):
    """What a piece would count that does not know where it begins."""
    return positions_BT - positions_BT[:, :1]


@pytest.mark.parametrize(
    "wrong", ["rotations", "mask", pytest.param("tokens", marks=pytest.mark.slow)]
)
def test_a_piece_that_counts_from_zero_is_caught(monkeypatch, wrong):
    wanted, rope, attend = alone("sgd", "float32"), layers.rope, layers.attend
    if wrong == "rotations":
        monkeypatch.setattr(layers, "rope", lambda x, at, *rest: rope(x, from_zero(at), *rest))
    elif wrong == "mask":
        own = jnp.tril(jnp.ones((8 // SEQUENCES[0][3], 8), bool))[None, None]
        monkeypatch.setattr(layers, "attend", lambda q, k, v, mask: attend(q, k, v, mask=own))
    else:
        size = 8 // SEQUENCES[0][3] + 1
        monkeypatch.setattr(sharding, "piece", lambda tokens: tokens[..., :size])
    losses, parameters = gap(run(config_of("sgd", "float32", SEQUENCES[0])), wanted)
    print(f"losses {losses:.2g}, parameters {parameters:.2g}")
    assert losses > 1e-4 and parameters > 1e-3


@pytest.mark.slow
def test_a_sum_in_place_of_a_mean_is_caught(monkeypatch):
    """A gradient eight times too large: what no clipping is allowed to hide here."""
    honest, wanted = optim.freeze_dead, alone("sgd", "float32")
    monkeypatch.setattr(
        optim, "freeze_dead", lambda g, *rest: jax.tree.map(lambda a: 8 * a, honest(g, *rest))
    )
    losses, parameters = gap(run(config_of("sgd", "float32", MESH)), wanted)
    assert losses > 1e-3 and parameters > 1e-3


# --------------------------------------------------------------------------------------------------
# Where everything lies


def split_of(name, mesh):
    """By hand: into how many parts each axis of a parameter is cut."""
    data, model, shard_params = mesh
    d = data if shard_params else 1
    return {
        "embedding": (model, d),
        "head": (d, model),
        "query": (1, d, model, 1),
        "key": (1, d, model, 1),
        "value": (1, d, model, 1),
        "out": (1, model, 1, d),
        "up": (1, d, model),
        "down": (1, model, d),
    }.get(name.split(".")[-1])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("mesh", MESHES, ids=identity)
def test_every_leaf_lies_where_its_axes_say(mesh, optimizer):
    """Parameters and moments, as declared: the compiled functions take and give just this."""
    p = train.program(config_of(optimizer, "float32", mesh))
    split = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(p.abstract_state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = split_of(name, mesh)
        if parts is None or leaf.ndim != len(parts):
            assert leaf.sharding.is_fully_replicated, name
            parts = (1,) * leaf.ndim
        wanted = tuple(size // n for size, n in zip(leaf.shape, parts, strict=True))
        assert leaf.sharding.shard_shape(leaf.shape) == wanted, name
        if wanted != leaf.shape:
            split.append(name)
    # Eight matrices and their moments: Adam's two of each; under Muon one of the six of the blocks.
    moments = {"adamw": 2 * 8, "muon": 6 + 2 * 2}[optimizer]
    assert len(split) == (0 if mesh == (8, 1, False) else 8 + moments)


def held(state):
    """Bytes on the first device, and of the whole."""
    leaves = jax.tree.leaves(state)
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return first, sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize(
    ("mesh", "share"),
    [
        ((8, 1, True), 8),
        ((4, 2, True), 8),
        pytest.param((4, 2, False), 2, marks=pytest.mark.slow),
        pytest.param(MESH, 1, marks=pytest.mark.slow),
    ],
)
def test_arrays_lie_as_declared_before_and_after_a_step(mesh, share):
    """A sharded state takes that share of the memory, but for the few mixing leaves and counters;
    the old state is given away, so that memory holds one."""
    config = config_of("adamw", "float32", mesh, layers=1)
    p = train.program(config)
    before = p.init(jax.random.key(0))
    batch = jax.device_put(batches(config)[0], p.batch_sharding)
    assert p.abstract_batch.shape == batch.shape
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 8 // mesh[0], 9)}

    def check(state):
        for declared, leaf in zip(
            jax.tree.leaves(p.abstract_state), jax.tree.leaves(state), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(declared.sharding, leaf.ndim)
            part = declared.sharding.shard_shape(declared.shape)
            assert [s.data.shape for s in leaf.addressable_shards] == [part] * 8
        first, whole = held(state)
        assert whole / share <= first <= 1.05 * whole / share

    check(before)
    after, metrics = p.train_step(before, batch, optim.hyper(config.optim, 100))
    check(after)
    assert all(m.sharding.is_fully_replicated for m in metrics.values())
    assert all(a.is_deleted() for a in jax.tree.leaves(before))


@pytest.mark.parametrize(
    "mesh",
    [(4, 2, True), SEQUENCES[0], pytest.param(SEQUENCES[2], marks=pytest.mark.slow)],
    ids=identity,
)
def test_evaluation_and_probe_on_eight_devices(mesh):
    """Float64: sums over the batch in another order, 1e-12."""
    found = {}
    with jax.enable_x64(True):
        for shape in (ONE, mesh):
            config = config_of("adamw", "float64", shape)
            p = train.program(config)
            params, tokens = p.init(jax.random.key(0)).params, batches(config)[0, 0]
            bytes_V = jnp.asarray(np.arange(120) % 5, jnp.int32)
            found[shape] = named((p.eval_step(params, tokens, bytes_V), p.probe(params, tokens)))
    one, eight = found.values()
    assert one.keys() == eight.keys() and len(one) > 9
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-12, atol=1e-12, err_msg=name)


# --------------------------------------------------------------------------------------------------
# The mesh, the letters


@pytest.mark.parametrize(
    ("data", "sequence", "model", "shape"),
    [
        (None, 1, 1, (8, 1, 1)),
        (None, 1, 4, (2, 1, 4)),
        (2, 1, 2, (2, 1, 2)),
        (None, 2, 2, (2, 2, 2)),
        (1, 4, 1, (1, 4, 1)),
    ],
)
def test_make_mesh(data, sequence, model, shape):
    mesh = sharding.make_mesh(data, model, sequence=sequence)
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.AXES, shape, strict=True))
    assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]


@pytest.mark.parametrize(
    ("data", "model", "sequence", "message"),
    [
        (0, 1, 1, "mesh data=0, model=1: give at least 1 for each"),
        (1, -2, 1, "mesh data=1, model=-2: give at least 1 for each"),
        (1, 1, 0, "mesh data=1, sequence=0, model=1: give at least 1 for each"),
        (None, 1, 0, "mesh sequence=0, model=1: give at least 1 for each"),
        (None, 1, 3, "mesh.sequence 3 does not divide the 8 devices: use one of [1, 2, 4, 8]"),
        (None, 3, 1, "mesh.model 3 does not divide the 8 devices: use one of [1, 2, 4, 8]"),
        (
            None,
            2,
            3,
            "mesh.sequence 3 x mesh.model 2 does not divide the 8 devices: use a product that is "
            "one of [1, 2, 4, 8]",
        ),
        (8, 2, 1, "mesh data=8 x model=2 wants 16 devices, 8 are here: give mesh.data at most 4"),
        (2, 16, 1, "data=2 x model=16 wants 32 devices, 8 are here: give mesh.model at most 4"),
        (
            2,
            1,
            16,
            "mesh data=2 x sequence=16 x model=1 wants 32 devices, 8 are here: "
            "give mesh.sequence at most 4",
        ),
    ],
)
def test_meshes_that_cannot_be(data, model, sequence, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sharding.make_mesh(data, model, sequence=sequence)
    assert "\n" not in str(error.value)


def test_a_mesh_that_leaves_a_process_without_devices():
    """It could not take part, and the others would wait for it."""
    eight = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    message = (
        "mesh data=2 x model=2 takes 4 of 8 devices and none of process 1: "
        "give mesh.model one of [1, 2, 4, 8] and leave mesh.data out"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.make_mesh(2, 2, devices=eight)


def test_every_parameter_has_its_letters():
    """A leaf without letters would be replicated in silence: only mixing leaves may be."""
    for mlp in ("relu2", "swiglu"):
        params = gpt.abstract_params(ModelConfig(layers=2, width=16, vocab=120, mlp=mlp))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            letters = gpt.AXES.get(name.split(".")[-1])
            assert (letters is None) == ("_connection" in name), name
            assert letters is None or len(letters) == len(leaf.shape), name


def test_what_does_not_fit_stays_whole():
    """A dimension that does not divide, a scalar under a known name, a name that nobody knows."""
    mesh = sharding.make_mesh(4, 2)
    tree = {
        "up": jax.ShapeDtypeStruct((2, 16, 32), "float32"),
        "down": jax.ShapeDtypeStruct((2, 33, 18), "float32"),
        "count": {"up": jax.ShapeDtypeStruct((), "int32")},
        "other": jax.ShapeDtypeStruct((16, 32), "float32"),
    }
    placed = sharding.tree_shardings(tree, gpt.AXES, mesh, shard_params=True)
    assert placed["up"].spec == PartitionSpec(None, "data", "model")
    for whole in (placed["down"], placed["count"]["up"], placed["other"]):
        assert whole.is_fully_replicated
