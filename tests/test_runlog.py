"""A run's folder: whole files, whole rows, and an ETA that can be believed."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mhcjax.runlog import (
    Progress,
    RunLog,
    drop_rows_after,
    duration,
    newest_run,
    read_rows,
    versions,
    write_atomic,
)

# -- time left -------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def simulate(total, done, events, step, costs, log_every, first=1.0):
    """A run of the loop's shape under a fake clock; -> [(updates, ETA, truth)] at each log line.

    `first` multiplies the first event of each kind, which compiles.
    """
    clock = Clock()
    progress = Progress(total, done, events, clock)
    seen, at = dict.fromkeys(events, 0), []

    def happen(name):
        clock.now += costs[name] * (1 if seen[name] else first)
        seen[name] += 1
        progress.event(name)

    if done == 0:
        for name in events:
            if name != "save" and events[name]:
                happen(name)
    while done < total:
        boundary = min(total, *((done // k + 1) * k for k in (log_every, *events.values()) if k))
        made, done = boundary - done, boundary
        clock.now += made * step
        progress.updates(made)
        at.append((done, progress.eta(), clock.now))
        for name, every in events.items():
            if every and (done == total or done % every == 0):
                happen(name)
    assert progress.elapsed() == clock.now - 1000.0
    return [(updates, eta, clock.now - now) for updates, eta, now in at], seen


@given(
    total=st.integers(50, 2000),
    done=st.integers(0, 40),
    every=st.fixed_dictionaries(
        {
            "eval": st.integers(3, 700),
            "sample": st.just(0) | st.integers(3, 700),
            "save": st.integers(3, 700),
        }
    ),
    costs=st.fixed_dictionaries({n: st.floats(0, 30) for n in ("eval", "sample", "save")}),
    step=st.floats(0.001, 2),
    log_every=st.integers(3, 50),
)
@example(
    total=300,
    done=0,
    every={"eval": 100, "sample": 100, "save": 100},
    costs={"eval": 3.0, "sample": 2.0, "save": 1.0},
    step=0.25,
    log_every=10,
)
def test_the_eta_is_the_truth_once_every_kind_of_event_has_been_seen(
    total, done, every, costs, step, log_every
):
    lines, seen = simulate(total, done, every, step, costs, log_every)
    assert all(seen[name] for name, k in every.items() if k)
    # A kind that has not happened yet costs nothing known: the run's first save, and on going on
    # also the first evaluation and sample.
    due = [k for name, k in every.items() if k and (done or name == "save")]
    known = max((k * (done // k + 1) for k in due), default=0)
    for updates, eta, truth in lines:
        if updates > known:
            # 1 %, with room for the rounding of a sum of thousands of floats
            assert eta == pytest.approx(truth, rel=0.01, abs=1e-6), updates


def test_the_eta_within_a_percent_before_anything_was_saved():
    """What a run of the default preset looks like: a save costs little, so that its being unknown
    before the first one does not spoil the ETA."""
    events = {"eval": 100, "sample": 100, "save": 100}
    costs = {"eval": 2.0, "sample": 1.0, "save": 0.1}
    lines, _ = simulate(300, 0, events, 0.25, costs, log_every=10)
    assert len(lines) == 30
    for _, eta, truth in lines[:-1]:
        assert eta == pytest.approx(truth, rel=0.01)


def test_a_first_event_that_compiles_is_not_what_the_others_cost():
    events = {"eval": 50, "sample": 0, "save": 50}
    costs = {"eval": 2.0, "sample": 0.0, "save": 1.0}
    lines, _ = simulate(500, 0, events, 0.1, costs, log_every=10, first=20.0)
    for updates, eta, truth in lines:
        if updates > 100:  # the second evaluation and save are over
            assert eta == pytest.approx(truth, rel=0.01), updates
    early = dict((u, (eta, truth)) for u, eta, truth in lines)[10]
    assert early[0] > 1.5 * early[1]  # all that is known then is the slow one


def test_an_event_at_the_boundary_is_still_to_come():
    """A log line is written before the evaluation of the same update."""
    lines, _ = simulate(
        100, 0, {"eval": 50, "save": 100}, 0.01, {"eval": 40.0, "save": 0.0}, log_every=50
    )
    assert [(u, round(eta, 6), round(truth, 6)) for u, eta, truth in lines] == [
        (50, 80.5, 80.5),
        (100, 40.0, 40.0),
    ]


def test_updates_that_were_skipped_cost_time_and_make_no_progress():
    clock = Clock()
    progress = Progress(10, 0, {}, clock)
    assert progress.eta() is None
    clock.now += 5
    assert progress.updates(0) == 5 and progress.eta() is None
    clock.now += 5
    progress.updates(5)
    assert progress.eta() == 10.0 and progress.elapsed() == 10.0


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3660, "1h01m"),
        (86_400 * 3, "72h00m"),
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# -- files -----------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, "new text that is longer")
    assert path.read_text() == "old"
    write_atomic(path, "naïve ☃")
    assert path.read_text(encoding="utf-8") == "naïve ☃"


def test_a_write_is_on_disk_before_it_is_under_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "a", "x")
    assert order == ["sync", "rename"] and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_lines_go_to_both_and_rows_are_plain(tmp_path):
    said: list[str] = []
    with RunLog(tmp_path / "run", said.append) as log:
        log.line("first")
        log.row(
            "train",
            {
                "step": jnp.int32(1),
                "loss": np.float32(0.5),
                "bad": [math.nan, jnp.array([1.0, jnp.inf])],
                "by leaf": {0: (1, np.bool_(True), None)},
            },
        )
        # Another process reads while the run goes on.
        assert read_rows(tmp_path / "run") == [
            {
                "kind": "train",
                "step": 1,
                "loss": 0.5,
                "bad": [None, [1.0, None]],
                "by leaf": {"0": [1, True, None]},
            }
        ]
        log.sample("a text")
    assert said == ["first"]
    with RunLog(tmp_path / "run", said.append) as log:  # going on appends
        log.line("second")
        log.row("eval", {"step": 2})
        log.sample("another")
    assert (tmp_path / "run" / "train.log").read_text() == "first\nsecond\n"
    assert (tmp_path / "run" / "samples.txt").read_text() == "a text\nanother\n"
    assert [r["kind"] for r in read_rows(tmp_path / "run")] == ["train", "eval"]
    assert read_rows(tmp_path / "run", "eval") == [{"kind": "eval", "step": 2}]


def table(folder, steps):
    with RunLog(folder, lambda line: None) as log:
        for step in steps:
            log.row("train", {"step": step, "loss": 1 / step})
    return folder


@pytest.mark.parametrize("kept", [1, 10, -1], ids=["one byte", "half", "all but the end"])
def test_a_row_that_a_kill_cut_is_skipped(tmp_path, kept):
    path = table(tmp_path, [1, 2, 3]) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2].rstrip("\n")[:kept])
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2]
    # Going on cleans it up, so that the next row does not stick to the rest of the cut one.
    drop_rows_after(tmp_path, 2)
    assert [r["step"] for r in read_rows(table(tmp_path, [3]))] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_rows_past_a_checkpoint_are_forgotten(tmp_path):
    path = table(tmp_path, [1, 2, 3, 4]) / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    drop_rows_after(tmp_path, 9)
    assert path.read_text() == "".join(whole)
    drop_rows_after(tmp_path, 2)
    assert path.read_text() == "".join(whole[:2])
    drop_rows_after(tmp_path, -1)
    assert path.read_text() == ""
    drop_rows_after(tmp_path / "nothing", 1)
    assert not (tmp_path / "nothing").exists()


def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist: give the folder"):
        read_rows(tmp_path)


def test_the_newest_run_is_that_of_the_newest_config(tmp_path):
    with pytest.raises(ValueError, match=r"no run under .*: train one first"):
        newest_run(tmp_path)
    for name, age in [("b", 30), ("c", 10), ("a", 20)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "no run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "c"
    os.utime(tmp_path / "a" / "config.json")
    assert newest_run(str(tmp_path)) == tmp_path / "a"


def test_versions_are_json_and_name_what_a_result_depends_on():
    found = json.loads(json.dumps(versions()))
    assert {"python", "mhcjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(found)
    assert found["devices"] == jax.device_count()
