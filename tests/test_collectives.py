"""What the compiled training step exchanges: kind, axis, shape and count of every collective, as
`mhcjax.costs` states them: one reduction of the gradients an update, never a stream or logits.

The programs are compiled for forced host devices. A backend may join several arrays in one
instruction; arrays are what is counted here.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import collectives
import jax
import jax.numpy as jnp
import pytest

from mhcjax import costs, diagnostics, ends, gpt, head, optim, sharding, train
from mhcjax.config import Config, override

# Sizes that no two kinds of array share: 3 rows of 12 positions on each device, width 32.
SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 4,
    "model.hidden": 40,
    "model.vocab": 1000,
    "model.context": 12,
    "model.connection.preset": "mhc_n4",
    "data.length": 12,
    "optim.name": "adamw",
}


def config_of(data, model, sequence=1, **changes):
    sizes = {"mesh.data": data, "mesh.sequence": sequence, "mesh.model": model}
    return override(Config(), {**SMALL, **sizes, "data.batch": 3 * data, **changes})


def compiled(config):
    program = train.program(config)
    return program.compile(optim.hyper(config.optim, config.total_steps))


def exchanged(config, step=None):
    """Counter of the compiled step's collectives."""
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    return collectives.of((step or compiled(config)).as_text(), sizes)


def stated(config):
    """Counter of the same, in closed form."""
    short = {"float32": "f32", "float64": "f64", "bfloat16": "bf16"}
    found = Counter()
    for c in costs.collectives(config):
        found[collectives.Collective(c.kind, c.axis, short[c.dtype], c.shape)] += c.count
    return found


def check(config):
    """The compiled step against the closed form, and against what must hold of any step."""
    step = compiled(config)
    found = exchanged(config, step)
    assert found == stated(config), difference(found, stated(config))
    # The state is given away and taken back in place: what XLA aliases is all of it.
    held = costs.memory(config)
    assert step.memory_analysis().alias_size_in_bytes == held.parameters + held.optimizer
    for axis in ("data", "sequence"):
        assert reduced_bytes(found, config, axis) == once(config, axis)
    assert not carrying(found, config)
    return found


def difference(found, wanted):
    return f"compiled only {dict(found - wanted)}, stated only {dict(wanted - found)}"


def reduced_bytes(found, config, axis="data"):
    """Bytes of gradients that are summed over the axis in one update; the losses are two scalars.
    Over `sequence` alone keys and values are scattered; with `data`, what is summed is a share of
    what was scattered there, and counts as the whole."""
    total = 0
    for c, n in found.items():
        kinds = ("all-reduce",) if c.axes == "sequence" else ("all-reduce", "reduce-scatter")
        if c.shape and axis in c.axes.split("+") and c.kind in kinds:
            total += n * c.bytes * (config.mesh.data if c.axes == "sequence" else 1)
    return total


def once(config, axis="data"):
    """Bytes of every gradient but scalars, by hand: a part of the split ones, the rest whole. In a
    model of one block the first pre and the last res are frozen altogether: never summed."""
    if getattr(config.mesh, axis) == 1:
        return 0
    params = gpt.abstract_params(config.model)
    dead = diagnostics.dead_leaves(gpt.connection_of(config.model), 2 * config.model.layers)
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        frozen = config.model.layers == 1 and any(
            name == f"blocks.{('attention', 'mlp')[l % 2]}_connection.{leaf}" for l, leaf in dead
        )
        split = set("HFV") & set(gpt.AXES.get(path[-1].key, ""))
        size = leaf.size * leaf.dtype.itemsize // (config.mesh.model if split else 1)
        total += 0 if frozen or not leaf.shape else size
    return total


def carrying(found, config):
    """Arrays over positions that are neither [B, T] nor [B, T, D], nor keys and values of whole
    rows over `sequence`: a stream, or logits."""
    m, mesh = config.model, config.mesh
    rows, heads = config.data.batch // mesh.data, (m.kv_heads or m.heads) // mesh.model
    fine = {"sequence": [(heads, m.width // m.heads)]}
    return [
        c
        for c in found
        if len(c.shape) > 1
        and c.shape[0] == rows
        and config.data.length % c.shape[1] == 0
        and c.shape[2:] not in fine.get(c.axes, [(), (m.width,)])
    ]


def identity(case):
    return "-".join(map(str, case))


MESHES = [(8, 1), (4, 2), (2, 4)]
GRID = [(*mesh, shard, micro) for mesh in MESHES for shard in (False, True) for micro in (1, 4)]
QUICK = {(8, 1, False, 4), (8, 1, True, 4), (4, 2, False, 1), (4, 2, True, 4), (2, 4, True, 1)}
# With `sequence` as the last: each position on one device, and together with the other axes.
SEQUENCES = [(1, 1, False, 1, 6), (2, 1, True, 4, 4), (2, 2, True, 1, 2), (2, 2, False, 4, 2)]
QUICK |= {SEQUENCES[1], SEQUENCES[3]}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow, id=identity(case))
        for case in [*GRID, *SEQUENCES]
    ],
)
def test_every_mesh(case):
    """Each gradient crosses `data` and `sequence` once, whatever the accumulation; `model` sees
    [B, T, D] only, `sequence` keys and values only."""
    data, model, shard, micro, sequence = (*case, 1)[:5]
    changes = {"mesh.shard_params": shard, "data.micro_batches": micro}
    found = check(config_of(data, model, sequence, **changes))
    over_model = [c for c in found if c.axes == "model" and c.shape]
    assert bool(over_model) == (model > 1)
    if model > 1:  # embedding, two sums a sublayer, the head's one, of [3, 12, 32]
        stream = collectives.Collective("all-reduce", "model", "f32", (3, 12 // sequence, 32))
        assert found[stream] == micro * (1 + 4 + 1)
    for kind in ("all-gather", "reduce-scatter"):  # of keys and values
        both = collectives.Collective(kind, "sequence", "f32", (3, 12, 4 // model, 8))
        assert found[both] == (2 * micro if sequence > 1 else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.connection.preset": "residual", "model.remat": True},
        {"model.remat": True},
        {"model.remat_streams": True},
        pytest.param(
            {
                "model.connection.preset": "deepseek_v4",
                "model.remat_streams": True,
                "model.walk": "scan",
                "model.layers": 2,
            },
            marks=pytest.mark.slow,
        ),
        {"model.connection.preset": "deepseek_v4", "mesh.shard_params": True},
        pytest.param({"model.connection.preset": "hc", "model.layers": 2}, marks=pytest.mark.slow),
        pytest.param({"model.connection.preset": "single_pass"}, marks=pytest.mark.slow),
        pytest.param(
            {"model.connection.preset": "mhc", "model.remat": True}, marks=pytest.mark.slow
        ),
        pytest.param({"model.mlp": "swiglu", "model.tied": True}, marks=pytest.mark.slow),
        pytest.param({"model.kv_heads": 2, "model.walk": "scan"}, marks=pytest.mark.slow),
        pytest.param({"model.loss": "plain", "model.soft_cap": 3.0}, marks=pytest.mark.slow),
        {"optim.name": "muon", "mesh.shard_params": True},
        pytest.param({"optim.name": "muon"}, marks=pytest.mark.slow),
        pytest.param({"optim.name": "lion", "optim.z_loss": 1e-4}, marks=pytest.mark.slow),
        pytest.param({"model.vocab": 1030, "mesh.shard_params": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(f"{k.split('.')[-1]}={v}" for k, v in changes.items()),
)
def test_every_kind_of_model(changes):
    check(config_of(4, 2, **{"model.layers": 1, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model.remat": True, "model.kv_heads": 2, "model.layers": 2},
        {"model.remat_streams": True, "model.layers": 2},
        pytest.param({"model.walk": "scan", "model.layers": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"model.connection.preset": "mhc", "optim.name": "muon", "mesh.shard_params": True},
            marks=pytest.mark.slow,
        ),
        pytest.param({"model.connection.preset": "single_pass"}, marks=pytest.mark.slow),
        pytest.param({"model.loss": "plain", "model.tied": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(f"{k.split('.')[-1]}={v}" for k, v in changes.items()),
)
def test_every_kind_of_model_in_pieces(changes):
    check(config_of(2, 2, 2, **changes))


def test_evaluation_and_probe_of_pieces():
    """Of whole rows they too hold nothing but tokens, keys and values."""
    config = config_of(2, 2, 2)
    program = train.program(config)
    params = program.abstract_state.params
    tokens = jax.ShapeDtypeStruct((6, 13), "int32")
    bytes_V = jax.ShapeDtypeStruct((1000,), "int32")
    for step in (
        program.eval_step.lower(params, tokens, bytes_V),
        program.probe.lower(params, tokens),
    ):
        text = step.compile().as_text()
        held = set(re.findall(r"f32\[3,12,([\d,]+)\]", text))
        assert held and held == {"2,8"}
        assert "f32[3,6,4,32]" in text


@pytest.mark.parametrize("step", ["eval_step", pytest.param("probe", marks=pytest.mark.slow)])
def test_evaluation_and_probe_on_kernels(step):
    """Each device mixes its own rows: a kernel that is not told of them would be given all."""
    kernels = {"model.width": 64, "model.connection.implementation": "pallas"}
    config = config_of(8, 1, **{"model.connection.preset": "kromhc", "model.layers": 1, **kernels})
    program = train.program(config)
    given = [program.abstract_state.params, jax.ShapeDtypeStruct((16, 13), "int32")]
    given += [jax.ShapeDtypeStruct((1000,), "int32")] * (step == "eval_step")
    text = getattr(program, step).lower(*given).compile().as_text()
    assert "f32[2,12,4,64]" in text and "f32[16,12,4,64]" not in text
    assert "all-gather" not in text


def test_a_head_in_chunks(monkeypatch):
    """Four chunks of three positions: as many maxima and sums, of a quarter each."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * 3 * 512)
    found = check(config_of(4, 2))
    assert found[collectives.Collective("all-reduce", "model", "f32", (3, 3))] == 3 * 4


@pytest.mark.parametrize("preset", ["residual", "mhc_n4"])
def test_streams_made_again_in_groups(monkeypatch, preset):
    """Three blocks and one: no sum is made again, what it gave is kept."""
    monkeypatch.setattr(gpt, "group_size", lambda config: 3)
    config = config_of(
        4, 2, **{"model.connection.preset": preset, "model.remat_streams": True, "model.layers": 4}
    )
    found = check(config)
    stream = collectives.Collective("all-reduce", "model", "f32", (3, 12, 32))
    assert found[stream] == 1 + 4 * 4 + 1


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        check(config_of(4, 2, **{"model.dtype": "float64", "mesh.shard_params": True}))


@pytest.mark.parametrize("data", [1, 8])
def test_one_axis_alone(data):
    """No exchange along an axis of one device."""
    found = check(config_of(data, 8 // data, **{"model.heads": 8}))
    assert {c.axes for c in found} == {"data" if data == 8 else "model"}


SIXTY_FOUR = [(64, 1, True, 1), (16, 4, False, 2), (8, 8, True, 2)]


@pytest.mark.slow
def test_sixty_four_devices():
    """In a process of its own, which is given that many."""
    code = f"""
import jax, test_collectives as t
assert jax.device_count() == 64
for data, model, shard, micro in {SIXTY_FOUR}:
    changes = {{"mesh.shard_params": shard, "data.micro_batches": micro}}
    t.check(t.config_of(data, model, **{{"model.heads": 8, "model.width": 64, **changes}}))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=64"}
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=here, env=os.environ | flags, check=True)


def test_one_device_is_not_split():
    """A mesh of one costs nothing: no part of its program is split by hand, nothing exchanged."""
    for devices, manual in ((1, False), (8, True)):
        program = train.program(config_of(devices, 1))
        hyper = optim.hyper(program.config.optim, 100)
        text = program.train_step.lower(program.abstract_state, program.abstract_batch, hyper)
        assert ("manual_computation" in text.as_text()) == manual
    assert not exchanged(config_of(1, 1)) and not stated(config_of(1, 1))


# --------------------------------------------------------------------------------------------------
# Negative controls: the same comparison, one thing wrong


def test_a_reduction_in_each_micro_batch_is_caught(monkeypatch):
    honest = jax.value_and_grad

    def each(f, **options):
        made = honest(f, **options)
        return lambda *args: jax.tree.map(lambda a: jax.lax.psum(a, "data"), made(*args))

    monkeypatch.setattr(jax, "value_and_grad", each)
    config = config_of(8, 1, **{"data.micro_batches": 4})
    found = exchanged(config)
    assert found != stated(config)
    # The last time by the step itself; no leaf is left out of a sum inside the loop.
    assert reduced_bytes(found, config) >= 5 * once(config)


@pytest.mark.parametrize(("axis", "mesh"), [("model", (4, 2)), ("sequence", (2, 2, 2))])
def test_a_gathered_stream_is_caught(monkeypatch, axis, mesh):
    honest = ends.expand

    def gathered(*args, **options):
        return jax.lax.pmean(honest(*args, **options), axis)

    monkeypatch.setattr(ends, "expand", gathered)
    config = config_of(*mesh)
    found = exchanged(config)
    assert found != stated(config)
    shape = (3, 12 // config.mesh.sequence, 4, 32)
    assert {c.shape for c in carrying(found, config)} == {shape}


def test_gathered_logits_are_caught(monkeypatch):
    def gathered(z, vocab):
        whole = jax.lax.all_gather(z, "model", axis=z.ndim - 1, tiled=True)
        return jax.nn.logsumexp(whole[..., :vocab], axis=-1)

    monkeypatch.setattr(head, "_logsumexp", gathered)
    config = config_of(4, 2)
    found = exchanged(config)
    assert found != stated(config)
    assert {c.shape for c in carrying(found, config)} == {(3, 12, 1024)}


def test_a_wrong_closed_form_is_caught():
    """The comparison sees the count, the shape and the axis."""
    config = config_of(4, 2)
    for other in (
        {"model.layers": 2},
        {"data.micro_batches": 2},
        {"mesh.shard_params": True},
        {"model.remat": True},
        {"mesh.data": 2, "mesh.model": 4, "data.batch": 6},
        {"mesh.data": 2, "mesh.sequence": 2, "data.batch": 6},
    ):
        assert stated(config) != stated(override(config, other)), other


# --------------------------------------------------------------------------------------------------
# The reading of compiled programs


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "model", 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data", 4),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", "data+model", 8),
        ("replica_groups=[4,2]<=[8]", "model", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "model", 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", "data", 4),
        ("source_target_pairs={{0,1},{2,3},{5,4}}", "model", 2),
        ("source_target_pairs={{0,2},{6,4}}", "data", 4),
    ],
)
def test_groups_of_devices(groups, axes, size):
    assert collectives.axes_of(groups, {"data": 4, "model": 2}) == (axes, size)


@pytest.mark.parametrize("groups", ["replica_groups={{0,3},{1,2}}", "no groups"])
def test_groups_that_are_no_axis_are_refused(groups):
    with pytest.raises(ValueError):
        collectives.axes_of(groups, {"data": 2, "model": 2})


def test_loops_count_as_often_as_they_run():
    """A sum over eight devices in a scan of five, a gather and a scatter outside, whole shapes."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def f(x):
        total, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(jnp.sin(c), "data"), None), x, length=5)
        whole = jax.lax.all_gather(total, "data", tiled=True)
        return jax.lax.psum_scatter(whole * whole, "data", tiled=True)

    step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = step.lower(jnp.zeros(24)).compile().as_text()
    assert collectives.of(text, {"data": 8}) == {
        collectives.Collective("all-reduce", "data", "f32", (3,)): 5,
        collectives.Collective("all-gather", "data", "f32", (24,)): 1,
        collectives.Collective("reduce-scatter", "data", "f32", (24,)): 1,
    }
    endless = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert endless != text
    with pytest.raises(ValueError, match="not to be counted"):
        collectives.of(endless, {"data": 8})
