"""The host loop: exact counts, resuming bit for bit, refusals, signals and what a run says."""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from small import ONE_LAYER

from mhcjax import (
    __main__,
    checkpoint,
    corpora,
    data,
    loop,
    optim,
    plots,
    runlog,
    runs,
    tokens,
    train,
)
from mhcjax.config import Config, fields, override, preset, to_json

SMALL = {
    **ONE_LAYER,
    "total_steps": 7,
    "schedule_steps": 20,
    "log_every": 1,
    "eval_every": 50,
    "save_every": 50,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
REAL_FIGURES = plots.loss_figure, plots.mixing_figure


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHCJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Drawing is a third of the time of such a run; `seven` draws.
        patch.setattr(plots, "loss_figure", lambda *_: SimpleNamespace(savefig=lambda *_, **__: 0))
        patch.setattr(plots, "mixing_figure", plots.loss_figure)
        yield


def small(**changes) -> Config:
    """Preset nano, but SMALL, with changes; `__` stands for the dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return override(preset("nano"), SMALL | changes)


def fit(config, folder, **options):
    """(outcome, lines said)"""
    lines: list[str] = []
    return loop.fit(config, folder, **{"say": lines.append, **options}), lines


def rows(folder, kind="train"):
    return runlog.read_rows(folder, kind)


# What training made, without the figures that depend on the clock.
FIGURES = ("step", "loss", "ce", "learning_rate", "grad_norm", "skipped", "skipped_in_row")


def figures(folder, after=0):
    return [[r[name] for name in FIGURES] for r in rows(folder) if r["step"] > after]


def state_print(path) -> str:
    """Of every bit of params, optimizer and counters; a restore compares it with the arrays."""
    return checkpoint.describe(path)["state_fingerprint"]


def state(folder, config) -> train.State:
    return checkpoint.restore(folder, train.program(config).abstract_state)[0]


def contents(folder: Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def read_batches(monkeypatch):
    """{index: tokens} of every batch that is read."""
    seen, real = {}, data.batch

    def batch(tokens, *, step, **rest):
        seen[step] = real(tokens, step=step, **rest)
        return seen[step]

    monkeypatch.setattr(loop.data, "batch", batch)
    return seen


@pytest.fixture
def poison(monkeypatch):
    """Batches with an index in this set hold ids outside the vocabulary: their loss is NaN."""
    bad, real = set(), data.batch

    def batch(tokens, *, step, **rest):
        found = real(tokens, step=step, **rest)
        return np.full_like(found, 10**8) if step in bad else found

    monkeypatch.setattr(loop.data, "batch", batch)
    return bad


@pytest.fixture
def signals(monkeypatch):
    """{index of a batch: signal}: sent when it is read, which is while the one before is used."""
    planned, real = {}, data.batch

    def batch(tokens, *, step, **rest):
        if step in planned:
            os.kill(os.getpid(), planned[step])
        return real(tokens, step=step, **rest)

    monkeypatch.setattr(loop.data, "batch", batch)
    return planned


def twenty(tmp_path_factory, micro_batches):
    """(config, folder) of 20 updates without a break, every fourth saved."""
    config = small(total_steps=20, save_every=4, keep=9, data__micro_batches=micro_batches)
    folder = tmp_path_factory.mktemp("straight") / "run"
    fit(config, folder)
    return config, folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return twenty(tmp_path_factory, micro_batches=1)


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    return twenty(tmp_path_factory, micro_batches=4)


@pytest.fixture(params=["straight", "accumulated"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """(config, folder, outcome, lines) of a whole small run, with samples."""
    config = small(log_every=2, eval_every=3, sample_every=3, save_every=3)
    folder = tmp_path_factory.mktemp("seven") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, figure in zip(("loss_figure", "mixing_figure"), REAL_FIGURES, strict=True):
            patch.setattr(plots, name, figure)
        return (config, folder, *fit(config, folder))


# -- exact counts, and going on --------------------------------------------------------------


def test_ten_and_ten_are_twenty_bit_for_bit(either, tmp_path, read_batches):
    config, folder = either
    half = dataclasses.replace(config, total_steps=10)
    fit(half, tmp_path / "run")
    assert sorted(read_batches) == list(range(11))  # one is read ahead
    first = state_print(tmp_path / "run")
    read_batches.clear()
    outcome, lines = fit(config, tmp_path / "run", resume="auto")
    # Batch 0 is for the loss in the plan; those of the first half are not read again.
    assert sorted(read_batches) == [0, *range(10, 21)]
    assert outcome.updates == 20 and lines[0].startswith("going on from")
    assert state_print(tmp_path / "run") == state_print(folder) != first
    assert figures(tmp_path / "run") == figures(folder)
    assert [r["step"] for r in rows(folder)] == list(range(1, 21))
    one, other = state(folder, config), state(tmp_path / "run", config)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(one.updates) == int(one.batches) == 20
    tokens = read_batches[19]
    assert tokens.shape == (config.data.micro_batches, 4, 33)


def test_another_seed_ends_elsewhere(straight, tmp_path):
    config, folder = straight
    fit(dataclasses.replace(config, seed=1), tmp_path / "run")
    assert state_print(tmp_path / "run") != state_print(folder)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_exactly_seven_updates_whatever_is_resumed(tmp_path, micro_batches):
    config, folder = small(data__micro_batches=micro_batches, log_every=2), tmp_path / "run"
    outcome, _ = fit(config, folder)
    assert (outcome.status, outcome.updates, outcome.exit_code) == ("done", 7, 0)
    at_end = state(folder, config)
    assert int(at_end.updates) == int(at_end.batches) == 7  # updates, not micro-batches
    assert checkpoint.describe(folder)["data"]["next_batch"] == 7
    assert [r["step"] for r in rows(folder)] == [2, 4, 6, 7]

    before = contents(folder)
    outcome, lines = fit(config, folder, resume="auto")
    assert (outcome.status, outcome.updates) == ("done", 7)
    assert outcome.validation == checkpoint.describe(folder)["validation"] != {}
    assert "7 updates of 7: 0 more" in lines[-1]
    assert contents(folder) == before

    assert fit(dataclasses.replace(config, total_steps=8), folder, resume="auto")[0].updates == 8
    assert [r["step"] for r in rows(folder)] == [2, 4, 6, 7, 8]
    before = contents(folder)
    outcome, lines = fit(config, folder, resume="auto")
    assert (outcome.status, outcome.updates) == ("done", 8)
    assert "8 updates of 7: 0 more" in lines[-1]
    assert contents(folder) == before


@pytest.mark.parametrize("summary", [None, "stopped"])
def test_a_run_killed_between_its_last_save_and_its_summary(tmp_path, summary):
    """Resumed, it makes no update and ends as it would have ended."""
    config, folder = small(log_every=2), tmp_path / "run"
    fit(config, folder)
    at_end, before = state_print(folder), rows(folder)
    wanted = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    if summary:
        (folder / "summary.json").write_text(json.dumps({"status": summary, "updates": 5}))

    outcome, lines = fit(config, folder, resume="auto")
    found = json.loads((folder / "summary.json").read_text())
    assert {**found, "elapsed": 0} == {**wanted, "elapsed": 0}
    assert found["elapsed"] == before[-1]["elapsed"] > 0  # of its last row
    assert outcome.status == "done"
    assert outcome.validation == checkpoint.describe(folder)["validation"]
    assert lines[-1].startswith("resume:")
    assert (state_print(folder), rows(folder)) == (at_end, before)


def test_a_run_that_was_stopped_where_it_is_now_to_end(tmp_path, monkeypatch):
    """Its last save has no evaluation; the summary has one."""
    config, folder = small(log_every=2), tmp_path / "run"
    save = loop._Run._save
    monkeypatch.setattr(loop._Run, "_save", lambda self, *given: save(self, *given[:-1], {}))
    fit(config, folder)
    assert checkpoint.describe(folder)["validation"] == {}
    wanted = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({"status": "stopped", "updates": 7}))
    outcome, _ = fit(config, folder, resume="auto")
    found = json.loads((folder / "summary.json").read_text())
    assert found["val_ce"] == wanted["val_ce"] == outcome.validation["val_ce"]
    evaluated = [row["step"] for row in rows(folder, "eval")]
    assert evaluated == [*range(0, 7, config.eval_every), 7, 7]


def test_nothing_left_to_make_from_another_folder(tmp_path):
    """There is no run to end: nothing is written."""
    config, folder = small(log_every=2), tmp_path / "run"
    fit(config, folder)
    outcome, lines = fit(config, tmp_path / "new", resume=str(folder))
    assert (outcome.status, outcome.updates) == ("done", 7) and "0 more" in lines[-1]
    assert not (tmp_path / "new").exists()


def test_a_corpus_shorter_than_the_run(tmp_path, read_batches):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("".join(f"x{i} = {i}\n" for i in range(80)))
    config = small(data__corpus=str(tmp_path / "text"))
    outcome, _ = fit(config, tmp_path / "run")
    corpus = json.loads((tmp_path / "run" / "run.json").read_text())["corpus"]
    assert corpus["name"] == str(tmp_path / "text")
    held = (tmp_path / "text" / "a.py").stat().st_size
    assert held < 7 * 4 * 32  # bytes, one token each, against what the run reads
    assert outcome.updates == 7 == int(state(tmp_path / "run", config).updates)
    assert sorted(read_batches) == list(range(8))


def test_two_more_updates_at_the_end_of_a_long_run(straight, tmp_path, read_batches):
    config, folder = straight
    old, meta = checkpoint.restore(folder, train.program(config).abstract_state)
    count = jax.numpy.int32(19_998)
    late = dataclasses.replace(old, updates=count, batches=count)
    long = dataclasses.replace(config, total_steps=20_000, schedule_steps=20_000)
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as saved:
        saved.save(19_998, late, meta | {"config": dataclasses.asdict(long)})
    outcome, _ = fit(long, tmp_path / "run", resume="auto")
    assert (outcome.status, outcome.updates) == ("done", 20_000)
    assert [r["step"] for r in rows(tmp_path / "run")] == [19_999, 20_000]
    assert sorted(read_batches) == [0, 19_998, 19_999, 20_000]
    assert int(state(tmp_path / "run", long).updates) == 20_000
    # The schedule goes by the counter in the state: this is its very end.
    share = optim.learning_rate(long.optim, np.int32(19_999), np.float32(20_000))
    rate = rows(tmp_path / "run")[-1]["learning_rate"]
    assert rate == pytest.approx(float(share) * long.optim.learning_rate, rel=1e-6)  # float32
    assert rate < 0.06 * long.optim.learning_rate


def test_the_schedule_does_not_jump_on_resuming(tmp_path):
    """The length of the first start stays: with more steps the rate stays at its floor."""
    config = small(total_steps=10, schedule_steps=None)
    fit(config, tmp_path / "run")
    stored = checkpoint.describe(tmp_path / "run")["config"]
    assert (stored["total_steps"], stored["schedule_steps"]) == (10, 10)
    fit(dataclasses.replace(config, total_steps=13), tmp_path / "run", resume="auto")
    stored = checkpoint.describe(tmp_path / "run")["config"]
    assert (stored["total_steps"], stored["schedule_steps"]) == (13, 10)
    rates = [r["learning_rate"] for r in rows(tmp_path / "run")]
    expected = optim.learning_rate(config.optim, np.arange(13), np.float32(10))
    peak = config.optim.learning_rate
    np.testing.assert_allclose(rates, np.asarray(expected) * peak, rtol=1e-6)  # float32
    assert len(rates) == 13 and max(rates) == pytest.approx(peak, rel=1e-6)
    assert rates[10:] == [pytest.approx(0.05 * peak, rel=1e-6)] * 3
    assert rates[9] < 0.3 * peak


def test_logging_evaluating_sampling_and_saving_change_nothing(straight, tmp_path):
    config, folder = straight
    busy = dataclasses.replace(
        config, log_every=7, eval_every=4, sample_every=3, save_every=6, keep=1, total_steps=20
    )
    fit(busy, tmp_path / "run")
    assert (tmp_path / "run" / "samples.txt").read_text().count("--- update") == 3 * 8
    assert state_print(tmp_path / "run") == state_print(folder)


def test_a_run_that_ended_before_its_first_save_starts_again(tmp_path, monkeypatch):
    folder, lines = tmp_path / "run", []

    def die(line):
        lines.append(line)
        if line.startswith("step     2"):
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        fit(small(), folder, say=die)
    assert [r["step"] for r in rows(folder)] == [1] and len(rows(folder, "eval")) == 1
    fit(small(), folder, resume="auto")
    assert [r["step"] for r in rows(folder)] == list(range(1, 8))
    assert [r["step"] for r in rows(folder, "eval")] == [0, 7]


def test_a_checkpoint_carries_the_figures_of_its_own_weights(tmp_path):
    config = small(eval_every=2, save_every=3, keep=9, total_steps=6)
    fit(config, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints"
    evaluated = {r["step"]: r["val_ce"] for r in rows(tmp_path / "run", "eval")}
    assert sorted(evaluated) == [0, 2, 4, 6]
    assert checkpoint.describe(saved / "3")["metric"] is None
    assert checkpoint.describe(saved / "6")["metric"] == evaluated[6]


# -- what it refuses -------------------------------------------------------------------------


def test_a_first_loss_far_from_uniform_is_refused(tmp_path, capsys):
    wide = {"model__tied": True, "model__embedding_std": 1.0, "total_steps": 1}
    with pytest.raises(ValueError, match=r"first loss is \d+\.\d\d, ln V is 5\.55") as info:
        fit(small(**wide), tmp_path / "run")
    assert "model.embedding_std" in str(info.value) and "--allow-loss0" in str(info.value)
    assert list(tmp_path.iterdir()) == []

    flags = ["--model.tied=true", "--model.embedding-std=1", f"--run={tmp_path / 'run'}"]
    assert __main__.main(["train", *FLAGS, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mhcjax train: {info.value}"
    assert list(tmp_path.iterdir()) == []

    outcome, lines = fit(small(**wide, allow_loss0=True), tmp_path / "run")
    assert outcome.status == "done"
    (said,) = [line for line in lines if line.startswith("first loss")]
    loss, uniform = map(float, re.findall(r"\d+\.\d+", said))
    assert loss > uniform + 1 and uniform == round(math.log(257), 3)
    # What makes the difference is the scale alone.
    wide["model__embedding_std"] = 0.02
    assert fit(small(**wide), tmp_path / "other")[0].status == "done"


def other_value(name, kind, value):
    """Some other value of a field, by its type: new fields are covered without a word here."""
    if type(None) in typing.get_args(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if kind is bool:
        return not value
    if kind is str:
        return f"{value or ''}x"
    return kind(1 + (value or 0))


@pytest.mark.parametrize("name", [name for name, *_ in fields(Config())])
def test_only_what_leaves_the_state_its_meaning_may_change(seven, name):
    config, folder, *_ = seven
    ((kind, old),) = [(k, v) for n, k, v, _ in fields(config) if n == name]
    new = other_value(name, kind, old)
    changed = override(config, {name: new})
    source = checkpoint.find(folder)
    assert runs.settled(config, source) == config
    if name in runs.MUTABLE:
        assert runs.settled(changed, source) == changed
        return
    with pytest.raises(ValueError) as info:
        runs.settled(changed, source)
    said = f"{name} {old!r} -> {new!r}"
    if name == "model.connection.preset":  # which leaves the init of the one before behind
        said += ", model.connection.init 'near_identity' -> None"
    assert f"({said})" in str(info.value) and "\n" not in str(info.value)


def test_a_refused_change_names_all_fields_and_touches_nothing(seven):
    config, folder, *_ = seven
    before = contents(folder)
    changes = {"optim.learning_rate": 0.5, "data.batch": 2, "total_steps": 9, "log_every": 3}
    with pytest.raises(ValueError) as info:
        fit(override(config, changes), folder, resume="auto")
    text = str(info.value)
    assert "optim.learning_rate 0.02 -> 0.5" in text and "data.batch 4 -> 2" in text
    assert "total_steps" not in text and "log_every" not in text
    assert "drop these overrides" in text and "--run" in text
    assert contents(folder) == before


def test_another_text_under_the_same_name_is_refused(tmp_path):
    text = tmp_path / "a.py"
    text.write_text("".join(f"x{i} = {i}\n" for i in range(80)))
    config = small(data__corpus=str(text), total_steps=1)
    fit(config, tmp_path / "run")
    text.write_text(text.read_text() + "more\n")
    with pytest.raises(ValueError, match=r"was trained on corpus .*restore the text"):
        fit(dataclasses.replace(config, total_steps=2), tmp_path / "run", resume="auto")


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_steps", -1),
        ("log_every", 0),
        ("eval_every", 0),
        ("eval_batches", 0),
        ("sample_every", -1),
        ("save_every", 0),
        ("keep", 0),
        ("max_skipped", 0),
        ("data.micro_batches", 0),
        ("data.batch", 0),
        ("data.length", 0),
        ("mesh.data", 3),
        ("mesh.model", 3),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError) as info:
        fit(override(small(), {name: value}), tmp_path / "run")
    assert name.split(".")[-1] in str(info.value) and str(value) in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_where_a_run_may_go_on(seven, tmp_path):
    config, folder, *_ = seven
    newest, older = folder / "checkpoints" / "7", folder / "checkpoints" / "6"
    assert newest.is_dir() and older.is_dir()
    assert runs.resume_point(tmp_path / "new", "auto") is None
    assert runs.resume_point(tmp_path / "new", "never") is None
    assert runs.resume_point(folder, "auto") == newest
    assert runs.resume_point(folder, str(newest)) == newest
    assert runs.resume_point(tmp_path / "new", str(older)) == older
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text(to_json(config))
    for where, resume, words in [
        (folder, "never", "holds a run: give another --run, or --resume auto"),
        (tmp_path / "used", "never", "holds a run"),
        (tmp_path / "used", str(newest), "holds another run: give another --run"),
        # The steps after it are in the way, and would be found when the first is saved.
        (folder, str(older), "has gone on to step 7: give another --run"),
        (tmp_path / "new", str(tmp_path / "nothing"), "no complete checkpoint"),
        (tmp_path / "file", "auto", "is a file: name a folder with --run"),
    ]:
        with pytest.raises(ValueError, match=words):
            runs.resume_point(where, resume)


def test_a_branch_in_a_new_folder_goes_on_from_an_older_step(seven, tmp_path):
    config, folder, *_ = seven
    source = folder / "checkpoints" / "6"
    before = contents(folder)
    outcome, _ = fit(config, tmp_path / "branch", resume=str(source))
    assert outcome.updates == 7
    assert state_print(tmp_path / "branch") == state_print(folder)
    assert contents(folder) == before


def test_the_config_of_a_resumed_run_is_the_stored_one(seven):
    config, folder, *_ = seven
    assert runs.resolve(folder, {}, preset_name=None, resume="auto") == config
    longer = runs.resolve(folder, {"total_steps": "9"}, preset_name=None, resume="auto")
    assert longer == dataclasses.replace(config, total_steps=9)
    # A preset that is named is meant: what differs from the run is then refused by name.
    named = runs.resolve(folder, {}, preset_name="nano", resume="auto")
    with pytest.raises(ValueError, match=r"model\.layers 1 -> 4"):
        runs.settled(named, checkpoint.find(folder))
    fresh = runs.resolve(folder.parent / "new", {"seed": "3"}, preset_name="d20", resume="auto")
    assert (fresh.name, fresh.seed, fresh.model.layers) == ("d20", 3, 6)


def test_a_run_is_loaded_with_its_tokenizer_or_not_at_all(seven, tmp_path):
    config, folder, *_ = seven
    loaded = runs.load(folder)
    assert loaded.config == config and loaded.path == folder / "checkpoints" / "7"
    assert checkpoint.fingerprint(loaded.params) == loaded.meta["fingerprint"]
    assert loaded.tokenizer().decode(loaded.tokenizer().encode("naïve")) == "naïve"
    moved = dataclasses.replace(loaded, path=tmp_path / "checkpoints" / "7")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        moved.tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        moved.tokenizer()


# -- updates that are not finite -------------------------------------------------------------


def test_skipped_updates_are_made_up_for(tmp_path, poison):
    poison |= {3, 4}
    config = small()
    outcome, lines = fit(config, tmp_path / "run")
    assert (outcome.status, outcome.updates) == ("done", 7)
    final = state(tmp_path / "run", config)
    assert [int(final.updates), int(final.batches), int(final.skipped)] == [7, 9, 2]
    assert int(final.skipped_in_row) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final))
    # A step that made no update reports the same count again, with null for NaN.
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3, 3, 3, 4, 5, 6, 7]
    assert [r["step"] for r in rows(tmp_path / "run") if r["loss"] is None] == [3, 3]
    assert next(x for x in lines if x.startswith("step     7")).endswith("  skipped 2")


@pytest.mark.parametrize("save_every", [50, 4], ids=["unsaved", "saved at that update"])
def test_a_diverging_run_stops_and_keeps_the_last_good_state(
    straight, tmp_path, poison, save_every
):
    good, folder = straight
    poison |= set(range(4, 99))
    config = small(total_steps=9, max_skipped=3, save_every=save_every)
    outcome, lines = fit(config, tmp_path / "run")
    assert (outcome.status, outcome.updates, outcome.exit_code) == ("diverged", 4, 1)
    assert any("3 non-finite updates in a row" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["skipped"]) == ("diverged", 4, 3)
    one, other = state(folder / "checkpoints" / "4", good), state(tmp_path / "run", config)
    for a, b in zip(
        jax.tree.leaves((one.params, one.opt_state)),
        jax.tree.leaves((other.params, other.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(other.params["head"], state(folder, good).params["head"])
    if save_every == 4:  # with better data it goes on from there
        poison.clear()
        outcome, _ = fit(config, tmp_path / "run", resume="auto")
        assert (outcome.status, outcome.updates) == ("done", 9)


def test_a_learning_rate_that_overflows_exits_with_1(tmp_path, capsys):
    flags = ["--optim.learning-rate=1e38", "--optim.rest-rate=1e38", f"--run={tmp_path / 'run'}"]
    assert __main__.main(["train", *FLAGS, *flags]) == 1
    captured = capsys.readouterr()
    assert "stopped: 10 non-finite updates in a row" in captured.out and captured.err == ""


# -- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    straight, tmp_path, signals, number, code
):
    config, folder = straight
    coarse = dataclasses.replace(config, log_every=20, save_every=20)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals[6] = number
    outcome, lines = fit(coarse, tmp_path / "run")
    signals.clear()
    # The boundary is that of an update, not that of a log line.
    assert (outcome.status, outcome.updates, outcome.signal) == ("stopped", 6, number)
    assert outcome.exit_code == code
    assert any("stopped by a signal after 6 updates; the state is saved" in x for x in lines)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]
    assert fit(config, tmp_path / "run", resume="auto")[0].updates == 20
    assert state_print(tmp_path / "run") == state_print(folder)
    assert figures(tmp_path / "run", after=6) == figures(folder, after=6)


def test_a_signal_in_the_last_update_is_too_late(tmp_path, signals):
    signals[7] = signal.SIGTERM
    outcome, _ = fit(small(), tmp_path / "run")
    assert (outcome.status, outcome.updates, outcome.exit_code) == ("done", 7, 0)
    assert rows(tmp_path / "run", "eval")[-1]["step"] == 7


SIGNALLED = """
import os, signal, sys
from mhcjax import loop
from mhcjax.config import from_json

def say(line):
    print(line, flush=True)
    if line.startswith("step     2"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):  # Python runs handlers between bytecodes
                pass

sys.exit(loop.fit(from_json(sys.stdin.read()), sys.argv[1], say=say).exit_code)
"""


def test_a_second_signal_exits_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, tmp_path / "run"],
        input=to_json(small()),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 143 and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("step     2")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_the_command_is_stopped_from_outside(tmp_path, number, code):
    flags = [*FLAGS, "--total-steps=1000000", f"--run={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "mhcjax", "train", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            for line in it.stdout:
                if line.startswith("step     3"):
                    it.send_signal(number)
                    break
            rest, errors = it.communicate(timeout=60)
        finally:
            it.kill()
    assert it.returncode == code and errors == ""
    assert "the state is saved" in rest
    updates = checkpoint.describe(tmp_path / "run")["step"]
    assert updates >= 3

    whole = small(total_steps=updates + 3)
    fit(whole, tmp_path / "whole")
    fit(whole, tmp_path / "run", resume="auto")
    assert state_print(tmp_path / "run") == state_print(tmp_path / "whole")


# -- what a run says and writes --------------------------------------------------------------


@pytest.mark.parametrize("init", ["symmetric", "balanced", "near_identity"])
@pytest.mark.filterwarnings("ignore:.*plain residual.*")
def test_dead_mixing_is_warned_of_where_it_is_dead(tmp_path, init):
    config = small(total_steps=1, model__connection__init=init)
    fit(config, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert ("equal streams, dead mixing parameter" in log) == (init == "symmetric")
    assert log.count("warning:") == {"symmetric": 2, "balanced": 2, "near_identity": 0}[init]
    found = {r["streams"] for r in rows(tmp_path / "run", "eval")}
    assert found == {{"symmetric": "fail", "balanced": "warn", "near_identity": "pass"}[init]}


def test_the_log_and_the_rows_say_the_same(seven):
    _, folder, _, said = seven
    log = (folder / "train.log").read_text().splitlines()
    assert [line for line in said if line in log] == log  # the terminal shows all of it
    steps = [line for line in log if line.startswith("step")]
    assert [r["step"] for r in rows(folder)] == [2, 3, 4, 6, 7]
    for line, r in zip(steps, rows(folder), strict=True):
        assert line.startswith(f"step     {r['step']}/7  ")
        for name, text in [
            ("loss", f"{r['loss']:.4f}"),
            ("ce", f"{r['ce']:.4f}"),
            ("lr", f"{r['learning_rate']:.2e}"),
            ("gnorm", f"{r['grad_norm']:.3f}"),
            ("tok/s", f"{r['tokens_per_second']:,.0f}"),
            ("MFU", "-"),  # a CPU has no stated peak
            ("elapsed", runlog.duration(r["elapsed"])),
            ("ETA", runlog.duration(r["eta"])),
        ]:
            assert re.search(rf"  {name} {re.escape(text)}(  |$)", line), (name, line)
        assert r["mfu"] is None
    evals = [line for line in log if line.startswith("eval")]
    assert [r["step"] for r in rows(folder, "eval")] == [0, 3, 6, 7]
    for line, r in zip(evals, rows(folder, "eval"), strict=True):
        mixed, streams = np.mean(r["cosine_operand"]), np.mean(r["cosine_streams"])
        assert line == (
            f"eval     {r['step']}  val ce {r['val_ce']:.4f}  {r['val_bpb']:.4f} bits/byte  "
            f"copy rate {r['copy_rate']:.1%} (data repeats {r['repeat_rate']:.1%})  "
            f"cosine mixed {mixed:.3f} streams {streams:.3f}  "
            f"leaves without gradient {r['dead_leaves']}"
        )
        # One byte is one token here, so both figures are the same entropy, but for end tokens.
        assert r["val_bpb"] == pytest.approx(r["val_ce"] / math.log(2), rel=0.02)
    texts = (folder / "samples.txt").read_text()
    assert re.findall(r"--- update (\d+)", texts)[::3] == ["0", "3", "6", "7"]


def test_the_evaluation_is_that_of_the_stored_weights(seven):
    """val_ce by a full forward pass and NumPy."""
    config, folder, outcome, _ = seven
    loaded = runs.load(folder)
    corpus = tokens.build("synthetic", "byte", 257)
    held = data.open_tokens(corpus.validation, corpus.dtype)
    batches = list(data.validation_batches(held, batch=4, length=32, count=config.eval_batches))
    nll, size = [], 0
    for batch in batches:
        logits = nnx.merge(loaded.graphdef, loaded.params)(batch[:, :-1])
        logits = np.asarray(logits, np.float64)[..., :257]
        shifted = logits - logits.max(-1, keepdims=True)
        logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        nll.append(-np.take_along_axis(logp, batch[:, 1:, None], -1))
        size += corpus.tokenizer.token_bytes[batch[:, 1:]].sum()
    # float32 against float64 over 256 tokens
    assert outcome.validation["val_ce"] == pytest.approx(np.mean(nll), rel=1e-5)
    bits = np.sum(nll) / size / np.log(2)
    assert outcome.validation["val_bpb"] == pytest.approx(bits, rel=1e-5)


def test_it_says_that_it_compiles_before_the_first_step_and_then_does_not(tmp_path):
    compiled: list[int] = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(lines))

    lines: list[str] = []
    config = small(eval_every=3, sample_every=3, save_every=3)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loop.fit(config, tmp_path / "run", say=lines.append)
    finally:
        from jax._src import monitoring

        monitoring.unregister_event_duration_listener(listen)
    starts = [line.split()[0] for line in lines]
    announced, evaluated = starts.index("compiling"), starts.index("eval")
    first = starts.index("step")
    last = len(starts) - 1 - starts[::-1].index("step")
    assert announced < starts.index("compiled") < evaluated < first < last
    assert compiled and all(n > announced for n in compiled)
    assert not [n for n in compiled if evaluated < n <= last], (compiled, lines)


def test_the_plan_is_counted_and_a_dry_run_writes_nothing(tmp_path, seven):
    config = small(data__micro_batches=4)
    outcome, lines = fit(config, tmp_path / "run", dry_run=True)
    assert (outcome.status, outcome.updates, outcome.exit_code) == ("dry", 0, 0)
    assert list(tmp_path.iterdir()) == []
    plan = {line.split()[0]: line for line in lines}
    leaves = jax.tree.leaves(train.program(config).abstract_state.params)
    assert f" {sum(leaf.size for leaf in leaves):,} parameters" in plan["model"]
    assert "512 tokens per update, 7 of 7 updates to make, 3,584 tokens" in plan["work"]
    assert not any(line.startswith(("step", "eval")) for line in lines)

    config, folder, *_ = seven
    before = contents(folder)
    outcome, lines = fit(
        dataclasses.replace(config, total_steps=9), folder, resume="auto", dry_run=True
    )
    assert (outcome.status, outcome.updates) == ("dry", 7)
    assert any("2 of 9 updates to make" in line for line in lines)
    assert contents(folder) == before


def test_what_a_run_leaves(seven):
    config, folder, outcome, lines = seven
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "train.log",
        "samples.txt",
        "summary.json",
        "tokenizer.json",
        "checkpoints",
        "loss.png",
        "mixing.png",
    }
    assert (folder / "config.json").read_text() == to_json(config)
    run = json.loads((folder / "run.json").read_text())
    assert run["resumed from"] is None and run["info"]["parameters"] == 36_874
    assert set(run["versions"]) >= {"jax", "flax", "python", "device", "commit"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.items() >= {"status": "done", "updates": 7, **outcome.validation}.items()
    assert len(summary["model"]) and summary["model"] in "\n".join(lines)
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"6", "7"}


def test_printed_commands_survive_a_strange_folder(tmp_path):
    folder = tmp_path / "it's a run"
    _, lines = fit(small(total_steps=1), folder, command="mhcjax")
    assert [shlex.split(line)[1:] for line in lines[-3:]] == [
        ["mhcjax", "sample", str(folder)],
        ["mhcjax", "inspect", str(folder)],
        ["mhcjax", "train", "--run", str(folder), "--resume", "auto", "--total-steps", "2"],
    ]


@pytest.mark.slow
def test_the_eta_of_a_real_run(tmp_path):
    """At 20 % within 10 % of the truth. Enough updates that one hiccup does not decide."""
    began, said = time.monotonic(), {}

    def say(line):
        said[line.split("/")[0]] = time.monotonic()

    config = small(
        total_steps=5000,
        log_every=100,
        eval_every=500,
        sample_every=1000,
        save_every=1000,
        model__width=64,
    )
    fit(config, tmp_path / "run", say=say)
    (row,) = [r for r in rows(tmp_path / "run") if r["step"] == 1000]
    truth = said["step  5000"] - said["step  1000"]
    assert time.monotonic() - began > truth > 5
    assert row["eta"] == pytest.approx(truth, rel=0.1)


@pytest.mark.slow
def test_a_model_comes_near_the_stated_entropy(tmp_path):
    """Two layers, 500 updates: within 0.1 nat a byte above the floor, and never below it."""
    config = override(
        preset("nano"),
        {
            "data.corpus": "synthetic",
            "data.tokenizer": "byte",
            "model.vocab": 257,
            "model.layers": 2,
            "model.width": 64,
            "total_steps": 500,
            "sample_every": 0,
            "mesh.data": 1,
        },
    )
    outcome, _ = fit(config, tmp_path / "run")
    floor = corpora.SyntheticCode().floor
    # Below by less than the spread of the held-out text around its entropy.
    assert floor - 0.02 < outcome.validation["val_ce"] < floor + 0.1
