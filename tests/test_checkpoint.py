"""Checkpoints: bit-equal round trips, and a one-line refusal of everything else."""

import asyncio
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhcjax.checkpoint import (
    Checkpoints,
    describe,
    find,
    fingerprint,
    restore,
    restore_params,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["updates", "params", "optimizer", "skipped", "empty", "seen"],
    meta_fields=[],
)
@dataclasses.dataclass
class State:
    updates: jax.Array
    params: dict
    optimizer: tuple
    skipped: int
    empty: jax.Array
    seen: np.ndarray


def make_state(seed: int = 0) -> State:
    """All kinds of leaf; `embed` is large enough for a data file of its own."""
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (64, 96)),
        "blocks": {
            "w": jax.random.normal(key, (2, 8, 16), jnp.bfloat16),
            "alpha_logit": jnp.float32(0.25),
        },
        "heads": [jnp.arange(4, dtype=jnp.int8), jnp.array([True, False])],
    }
    return State(
        updates=jnp.int32(7),
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        skipped=3,
        empty=jnp.zeros((0, 4), jnp.bfloat16),
        seen=np.linspace(0, 1, 5),  # float64, although JAX has none here
    )


META = {"config": {"name": "nano", "seed": 1}, "position": [3, 4], "val_loss": 2.5}


def abstract(tree):
    """Shapes in place of the jax arrays; numbers and NumPy stay what they are."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree
    )


def write(folder: Path, *steps: int, state=None, keep: int = 9) -> Path:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state() if state is None else state, META, metric=step)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("run") / "checkpoints", 1, 2)


def refused(call, *words: str) -> str:
    """`call` is a ValueError whose text is one line with all the words."""
    with pytest.raises(ValueError) as info:
        call()
    text = str(info.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def same_bits(one, other) -> bool:
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    return structure == other_structure and all(
        np.shape(a) == np.shape(b)
        and np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(leaves, others, strict=True)
    )


# -- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [abstract, lambda state: state], ids=["abstract", "concrete"])
def test_round_trip_is_bit_equal(saved, target):
    state = make_state()
    again, meta = restore(saved / "2", target(state))
    assert same_bits(state, again)
    assert not same_bits(make_state(seed=1), again)  # the comparison can fail
    chex.assert_trees_all_equal_shapes_and_dtypes(again.params, state.params)
    assert type(again.skipped) is int and type(again.seen) is np.ndarray
    assert isinstance(again.updates, jax.Array) and isinstance(again.empty, jax.Array)
    assert {k: meta[k] for k in META} == META
    assert meta["step"] == 2 and meta["metric"] == 2.0
    assert meta["state_fingerprint"] == fingerprint(state) == fingerprint(again)
    assert meta["fingerprint"] == fingerprint(state.params) == fingerprint(again.params)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float16", "uint8", "uint32", "complex64", "int4"]
)
def test_round_trip_of_other_dtypes(tmp_path, dtype):
    state = {"params": {"w": jnp.arange(6).reshape(2, 3).astype(dtype)}}
    assert same_bits(restore(write(tmp_path, 1, state=state), state)[0], state)


def test_nan_and_negative_zero_keep_their_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC00000, 0x80000000, 1], np.uint32)
    state = {"params": {"w": jnp.asarray(bits.view(np.float32))}}
    again, _ = restore(write(tmp_path, 1, state=state), abstract(state))
    np.testing.assert_array_equal(np.asarray(again["params"]["w"]).view(np.uint32), bits)


def test_params_alone_need_no_optimizer(saved, tmp_path):
    state = make_state()
    params, meta = restore_params(saved / "2", abstract(state.params))
    assert same_bits(params, state.params)
    assert fingerprint(params) == meta["fingerprint"]
    # They are read from their own item: the rest may even be gone.
    shutil.copytree(saved / "2", tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "rest")
    assert same_bits(restore_params(tmp_path / "2", abstract(state.params))[0], state.params)
    refused(lambda: restore(tmp_path / "2", abstract(state)), str(tmp_path / "2"), "train again")


def test_state_may_be_donated_while_it_is_written(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (2048, 1024))}}
    expected, target = fingerprint(state), abstract(state)
    jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, state)))  # compile first
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
    again, _ = restore(tmp_path, target)
    assert fingerprint(again) == expected
    jax.block_until_ready(overwrite(again))  # and what comes back may be donated


def test_under_a_running_event_loop_as_in_a_notebook(tmp_path):
    async def cell():
        return restore(write(tmp_path, 1), abstract(make_state()))[0]

    assert same_bits(asyncio.run(cell()), make_state())


def python(code: str, *args: object, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout.strip()


def test_float64(tmp_path):
    code = """
    import sys, jax, jax.numpy as jnp
    from mhcjax.checkpoint import Checkpoints, fingerprint, restore
    state = {"params": {"w": jnp.linspace(0, 1, 7)}, "count": jnp.int64(2) ** 40}
    assert state["params"]["w"].dtype == "float64"
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, state, {})
    again, _ = restore(sys.argv[1], jax.eval_shape(lambda: state))
    assert again["params"]["w"].dtype == "float64" and again["count"].dtype == "int64"
    print(fingerprint(state) == fingerprint(again))
    """
    assert python(code, tmp_path, JAX_ENABLE_X64="1") == "True"
    # Without x64 JAX would cut to float32 and say nothing; NumPy reads it as it is.
    w, count = np.linspace(0, 1, 7), np.int64(2) ** 40
    exact = {"params": {"w": w}, "count": count}
    assert restore(tmp_path, exact)[0]["count"] == 2**40
    cut = {"params": {"w": jax.ShapeDtypeStruct((7,), np.float64)}, "count": count}
    refused(lambda: restore(tmp_path, cut), "params/w", "float64", "JAX_ENABLE_X64=1")
    single = {"params": {"w": jax.ShapeDtypeStruct((7,), np.float32)}, "count": count}
    refused(lambda: restore(tmp_path, single), "params/w", "float64[7], expected float32[7]")


def test_another_mesh(tmp_path):
    code = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from mhcjax.checkpoint import Checkpoints, fingerprint, restore, restore_params

    def mesh(shape, names):
        axes = (AxisType.Auto,) * len(shape)
        devices = jax.devices()[: int(np.prod(shape))]
        return jax.make_mesh(shape, names, axis_types=axes, devices=devices)

    def placed(mesh, spec):
        return {
            "params": {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())},
            "m": NamedSharding(mesh, P(None, *spec)),
        }

    def abstract(shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )

    key = jax.random.key(0)
    state = {
        "params": {"w": jax.random.normal(key, (16, 8)), "b": jnp.ones(3, jnp.bfloat16)},
        "m": jax.random.normal(key, (2, 16, 8)),
    }
    plain = fingerprint(state)
    eight = mesh((8,), ("data",))
    state = jax.device_put(state, placed(eight, P("data")))
    assert len(state["params"]["w"].addressable_shards) == 8
    assert fingerprint(state) == plain
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, state, {})
    for target in (
        placed(eight, P("data")),
        placed(mesh((4,), ("data",)), P("data")),
        placed(mesh((1,), ("data",)), P("data")),
        placed(mesh((4, 2), ("data", "model")), P("model", "data")),
    ):
        again, meta = restore(sys.argv[1], abstract(target))
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, again, target))
        assert jax.tree.all(jax.tree.map(lambda x, y: (np.asarray(x) == y).all(), again, state))
        assert fingerprint(again) == meta["state_fingerprint"] == plain
        params, _ = restore_params(sys.argv[1], abstract(target)["params"])
        assert fingerprint(params) == meta["fingerprint"] == fingerprint(state["params"])
    try:
        restore(sys.argv[1], abstract(placed(mesh((3,), ("data",)), P("data"))))
    except ValueError as error:
        assert "leaf m does not fit" in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit("16 rows over 3 devices")
    print(plain)
    """
    flags = "--xla_force_host_platform_device_count=8"
    expected = python(code, tmp_path, XLA_FLAGS=flags)
    target = {
        "params": {
            "w": jax.ShapeDtypeStruct((16, 8), jnp.float32),
            "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        },
        "m": jax.ShapeDtypeStruct((2, 16, 8), jnp.float32),
    }
    again, _ = restore(tmp_path, target)  # here, on one device
    assert fingerprint(again) == expected


# -- trees that do not fit -------------------------------------------------------------------


def _missing(params):
    del params["blocks"]["w"]


def _extra(params):
    params["blocks"]["v"] = jnp.zeros(3)


def _renamed(params):
    params["blocks"]["weight"] = params["blocks"].pop("w")


def _shape(params):
    params["blocks"]["w"] = jnp.zeros((2, 16, 8), jnp.bfloat16)


def _rank(params):
    params["blocks"]["alpha_logit"] = jnp.zeros((1,))


def _dtype(params):
    params["blocks"]["w"] = params["blocks"]["w"].astype(jnp.float32)


def _same_size_dtype(params):
    params["blocks"]["w"] = params["blocks"]["w"].astype(jnp.float16)


@pytest.mark.parametrize(
    "change, words",
    [
        (_missing, ["params/blocks/w,", "bfloat16[2, 8, 16]", "is in it but not expected"]),
        (_extra, ["params/blocks/v is not in it", "expected float32[3]"]),
        (_renamed, ["params/blocks/weight is not in it", "params/blocks/w,", "bfloat16[2, 8, 16]"]),
        (_shape, ["params/blocks/w is bfloat16[2, 8, 16], expected bfloat16[2, 16, 8]"]),
        (_rank, ["params/blocks/alpha_logit is float32[], expected float32[1]"]),
        (_dtype, ["params/blocks/w is bfloat16[2, 8, 16], expected float32[2, 8, 16]"]),
        (_same_size_dtype, ["params/blocks/w is bfloat16[2, 8, 16], expected float16[2, 8, 16]"]),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["state", "params"])
def test_a_tree_that_differs_is_refused(saved, change, words, alone):
    state = make_state()
    change(state.params)
    path = saved / "2"
    if alone:
        refused(lambda: restore_params(path, abstract(state.params)), str(path), *words)
    else:
        refused(lambda: restore(path, abstract(state)), str(path), *words, "config")


def test_the_rest_of_the_state_is_as_strict(saved):
    state = make_state()
    lion = dataclasses.replace(state, optimizer=optax.lion(1e-3).init(state.params))
    refused(lambda: restore(saved / "2", abstract(lion)), "optimizer/0/nu", "not expected", "more)")
    counter = dataclasses.replace(state, updates=jnp.uint32(7))
    refused(lambda: restore(saved / "2", counter), "updates is int32[], expected uint32[]")
    number = dataclasses.replace(state, skipped=3.0)
    refused(lambda: restore(saved / "2", number), "skipped is int64[], expected float64[]")
    # What a state would be loaded as if names did not count.
    refused(lambda: restore(saved / "2", {"params": state.params}), "not expected")
    refused(lambda: restore_params(saved / "2", state), "params/empty is not in it")


@pytest.mark.parametrize(
    "leaf, word",
    [("text", "leaf params/w is a str"), (jax.random.key(0), "key_data"), (object(), "object")],
)
def test_leaves_that_cannot_be_stored_are_named(tmp_path, leaf, word):
    with Checkpoints(tmp_path) as checkpoints:
        refused(lambda: checkpoints.save(1, {"params": {"w": leaf}}, {}), "params/w", word)
    assert list(tmp_path.iterdir()) == []


def test_states_and_metas_that_cannot_be_stored(tmp_path):
    ok = {"params": {"w": jnp.zeros(2)}}
    twice = {"params": {"a/b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}}
    with Checkpoints(tmp_path) as checkpoints:
        refused(lambda: checkpoints.save(1, {"weights": jnp.zeros(2)}, {}), "params")
        refused(lambda: checkpoints.save(1, twice, {}), "params/a/b")
        refused(lambda: checkpoints.save(1, ok, {"loss": jnp.float32(1)}), "meta", "JSON")
    refused(lambda: Checkpoints(tmp_path, keep=0), "keep is 0")
    assert list(tmp_path.iterdir()) == []


# -- damage ----------------------------------------------------------------------------------


def files(step: Path) -> list[Path]:
    return sorted(f for f in step.rglob("*") if f.is_file())


def vital(step: Path) -> list[Path]:
    """One file of each kind without which a checkpoint cannot be read."""
    params = [f for f in files(step / "params") if f.parent.name == "d"]
    rest = [
        f for f in files(step / "rest") if f.parent.name == "d" and f.parent.parent.name == "rest"
    ]
    return [
        step / "meta" / "metadata",
        step / "params" / "manifest.ocdbt",
        step / "rest" / "manifest.ocdbt",
        max(params, key=lambda f: f.stat().st_size),
        *[f for f in params if f.parent.parent.name == "params"],
        *rest,
    ]


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "2"


def test_the_large_array_has_a_data_file_of_its_own(saved):
    assert vital(saved / "2")[3].stat().st_size > 64 * 96 * 3  # normals hardly compress
    assert len(vital(saved / "2")) >= 6


def test_flipped_bytes_in_every_vital_file(copy):
    target = abstract(make_state())
    restore(copy, target)
    for file in vital(copy):
        good = file.read_bytes()
        # The large file ends in the index of one process, which the merged one replaces.
        end = len(good) - 1 if len(good) < 4096 else int(0.9 * len(good))
        for position in np.linspace(0, end, 12).astype(int):
            bad = bytearray(good)
            bad[position] ^= 0x04
            file.write_bytes(bytes(bad))
            refused(lambda: restore(copy, target), str(copy), "use another step", "step 1")
            if file.is_relative_to(copy / "params"):
                refused(lambda: restore_params(copy, target.params), str(copy), "step 1")
        file.write_bytes(good)
    assert same_bits(restore(copy, target)[0], make_state())


@pytest.mark.parametrize("how", ["truncated", "emptied", "deleted"])
def test_truncated_and_deleted_vital_files(copy, how):
    target = abstract(make_state())
    for file in vital(copy):
        good = file.read_bytes()
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes(good[: len(good) // 2 if how == "truncated" else 0])
        refused(lambda: restore(copy, target), str(copy), "use another step", "step 1")
        file.write_bytes(good)
    assert same_bits(restore(copy, target)[0], make_state())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flip_anywhere_is_refused_or_harmless(saved, data):
    state, step = make_state(), saved / "2"
    meta = describe(step)
    file = data.draw(st.sampled_from(files(step)), label="file")
    good = file.read_bytes()
    position = data.draw(st.integers(0, len(good) - 1), label="position")
    bad = bytearray(good)
    bad[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    file.write_bytes(bytes(bad))
    try:
        again, found = restore(step, abstract(state))
    except ValueError as error:
        assert str(step) in str(error) and "\n" not in str(error)
    else:
        assert same_bits(again, state) and found == meta
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("item", ["params", "rest"])
def test_swapped_items_are_refused(copy, tmp_path, item):
    """Files that are whole, but not those of this checkpoint: only the fingerprint sees it."""
    state = dataclasses.replace(make_state(seed=1), skipped=4)
    other = write(tmp_path / "other", 2, state=state) / "2"
    target = abstract(make_state())
    shutil.rmtree(copy / item)
    shutil.copytree(other / item, copy / item)
    refused(lambda: restore(copy, target), str(copy), "fingerprint", "step 1")
    if item == "params":
        refused(lambda: restore_params(copy, target.params), str(copy), "fingerprint", "step 1")
    else:
        assert same_bits(restore_params(copy, target.params)[0], make_state().params)


def test_a_changed_meta_is_refused(copy):
    file = copy / "meta" / "metadata"
    text = file.read_text()
    assert text.count("2.5") == 1
    file.write_text(text.replace("2.5", "1.5"))
    refused(lambda: describe(copy), str(copy), "checksum", "use another step", "step 1")
    refused(lambda: restore(copy, abstract(make_state())), str(copy), "checksum")
    file.write_text('{"other": 1}')
    refused(lambda: describe(copy), str(copy), "meta")
    shutil.rmtree(copy / "meta")
    refused(lambda: describe(copy), str(copy), "meta")


def test_a_refusal_prints_nothing(copy, caplog, capfd):
    """One line is all a user sees; Orbax and asyncio add no tracebacks, then or later."""
    for file in vital(copy)[1:]:
        file.write_bytes(file.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        refused(lambda: restore(copy, abstract(make_state())), str(copy))
        time.sleep(0.1)
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_damage_of_old_steps_does_not_stop_a_run(copy):
    """A kill while old steps are deleted leaves such half folders."""
    (copy.parent / "1" / "meta" / "metadata").write_text("{")
    (copy.parent / "1" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(copy.parent, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.best() == 2
        checkpoints.save(3, make_state(), META)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


# -- kills -----------------------------------------------------------------------------------

SAVE_AND_DIE = """
import os, signal, sys, threading
from pathlib import Path
import jax.numpy as jnp, numpy as np
from mhcjax.checkpoint import Checkpoints

folder, moment = Path(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
state = {"params": {f"w{i}": rng.random((1024, 1024)) for i in range(8)}, "step": 2}

def watch():
    while not list(folder.glob(moment)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(folder)
threading.Thread(target=watch, daemon=True).start()
checkpoints.save(2, state, {})
checkpoints.close()
"""


@pytest.mark.parametrize("moment", ["2.*", "2.*/**/d/*"], ids=["folder", "data"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path, moment):
    write(tmp_path, 1)
    result = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(tmp_path), moment], timeout=60)
    assert result.returncode == -signal.SIGKILL
    (unfinished,) = tmp_path.glob("2*")
    assert unfinished.name.startswith("2.orbax-checkpoint-tmp")
    assert find(tmp_path) == tmp_path / "1"
    refused(lambda: find(unfinished), str(unfinished), "step 1")
    refused(lambda: restore(unfinished, make_state()), str(unfinished), "step 1")
    refused(lambda: restore(tmp_path / "2", make_state()), str(tmp_path / "2"), "step 1")
    assert same_bits(restore(tmp_path, abstract(make_state()))[0], make_state())
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.latest() == 1
        checkpoints.save(3, make_state(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
    assert same_bits(restore(tmp_path, abstract(make_state()))[0], make_state())
    assert describe(tmp_path)["step"] == 3


def test_an_unfinished_step_may_be_saved_again(tmp_path):
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(write(tmp_path, 1) / "1", unfinished)  # nothing but the rename was left to do
    refused(lambda: find(unfinished), str(unfinished), "step 1")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1] and find(tmp_path) == tmp_path / "1"
        checkpoints.save(2, make_state(), META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert describe(tmp_path)["step"] == 2


# -- which steps there are -------------------------------------------------------------------


def test_newest_and_best_are_kept(tmp_path):
    state = {"params": {"w": jnp.zeros(2)}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
        for step, metric in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))]:
            checkpoints.save(step, state, {}, metric=metric)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([2, 4, 5], 5, 2)
    assert describe(tmp_path / "5")["metric"] is None
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # the best is known after a restart
        checkpoints.save(6, state, {}, metric=jnp.float32(1.5))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        checkpoints.save(7, state, {}, metric=1.0)  # of equals the newest
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best()) == ([6, 7], 7)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(10, state, {}, metric=9.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "7"]


def test_a_step_is_written_once(tmp_path):
    write(tmp_path, 5, 8)
    written = (tmp_path / "8" / "meta" / "metadata").stat().st_mtime_ns
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, make_state(), META)  # resumed at its last step: nothing to do
        other = make_state(seed=1)
        for step in (8, 6, 5):
            refused(
                lambda step=step: checkpoints.save(step, other, META),
                f"step {step} cannot be saved",
                str(tmp_path),
                "step 8",
                "another folder",
            )
        refused(lambda: checkpoints.save(5, make_state(), META), "step 5 cannot be saved")
        assert checkpoints.steps() == [5, 8]
        checkpoints.save(9, other, META)
    assert (tmp_path / "8" / "meta" / "metadata").stat().st_mtime_ns == written
    assert same_bits(restore(tmp_path / "8", abstract(make_state()))[0], make_state())
    assert same_bits(restore(tmp_path, abstract(other))[0], other)


def test_find(saved, tmp_path):
    for path in (saved.parent, saved, saved / "2", str(saved)):
        assert find(path) == saved / "2"
    assert find(saved / "1") == saved / "1"
    shutil.copytree(saved / "2", tmp_path / "copied")
    assert find(tmp_path / "copied") == tmp_path / "copied"
    assert same_bits(restore(tmp_path / "copied", make_state())[0], make_state())
    refused(lambda: find(saved / "3"), str(saved / "3"), "steps 1, 2")
    refused(lambda: find(tmp_path / "nothing"), str(tmp_path / "nothing"), "give the folder")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(lambda: find(tmp_path / "run"), str(tmp_path / "run"), "give the folder")
    for step in (9, 10):  # by number, not by text
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir()
    assert find(tmp_path / "run").name == "10"


def test_describe_loads_no_array(saved, tmp_path):
    (tmp_path / "2").mkdir()
    shutil.copytree(saved / "2" / "meta", tmp_path / "2" / "meta")
    meta = describe(tmp_path / "2")
    assert meta["tree"]["params/blocks/w"] == [[2, 8, 16], "bfloat16"]
    assert meta["tree"]["optimizer/0/count"] == [[], "int32"]
    assert meta["tree"]["empty"] == [[0, 4], "bfloat16"]
    assert len(meta["tree"]) == len(jax.tree.leaves(make_state()))
    assert meta["config"] == META["config"]


# -- fingerprints ----------------------------------------------------------------------------


def test_fingerprint_sees_path_shape_dtype_and_bits():
    w = jnp.arange(6, dtype=jnp.float32)
    prints = [
        fingerprint(tree)
        for tree in (
            {"w": w},
            {"v": w},
            {"w": w.reshape(2, 3)},
            {"w": w.reshape(3, 2)},
            {"w": jax.lax.bitcast_convert_type(w, jnp.int32)},
            {"w": w.at[5].set(np.nextafter(np.float32(5), np.float32(6)))},
            {"w": w.at[0].set(-0.0)},
            {"w": w, "v": w},
            {"w": {"w": w}},
            {},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": w, "b": w + 1}) != fingerprint({"a": w + 1, "b": w})


def test_fingerprint_does_not_see_containers_or_memory_order():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    assert fingerprint({"x": x}) == fingerprint({"x": jnp.asarray(x)})
    assert fingerprint({"x": x}) == fingerprint({"x": np.asfortranarray(x)})
    assert fingerprint([x, 1]) == fingerprint({"0": x, "1": np.int64(1)})
    adam = optax.adam(1e-3).init({"w": jnp.ones(2)})
    assert fingerprint(adam) == fingerprint({"0": adam[0]._asdict()})
    scalar, vector = jnp.float32(1), jnp.ones(1)
    assert fingerprint(scalar) != fingerprint(vector)
