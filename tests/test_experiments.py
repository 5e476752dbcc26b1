"""Experiments: what a cell is, that a killed sweep goes on where it was, and what the report says.

The sweep runs as its users start it, `python -m experiments.run`, in a temporary folder that holds
a copy of experiments/ and one tiny experiment more.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench, cells, e03_sinkhorn, report
from mhcjax import gpt, presets, runlog
from mhcjax.config import differences, override, preset, to_json
from mhcjax.published import KEEP
from tests import oracle_manifolds

ROOT = Path(__file__).resolve().parent.parent

# Cells that differ in what changes no program, so that each is compiled once.
STUB = '''
"""e99: three cells, a second each."""
from experiments.cells import Cell, Experiment
from mhcjax.config import override, preset

EXPERIMENT = Experiment(
    name="e99",
    title="Which is it?",
    base=override(preset("nano"), {"data.corpus": "synthetic", "data.tokenizer": "byte"}),
    cells=(
        Cell("first"),
        Cell("second", {"model.connection.alpha_logit": 1.0}),
        Cell("third", {"model.embedding_std": 0.03}),
    ),
    local={
        "model.layers": 1, "model.width": 16, "model.heads": 2, "model.vocab": 257,
        "model.context": 16, "data.batch": 4, "data.length": 16, "total_steps": 400,
        "log_every": 40, "eval_every": 200, "eval_batches": 1, "sample_every": 0,
        "save_every": 40, "optim.warmup_steps": 5,
    },
)
'''


# --------------------------------------------------------------------------------------------------
# Cells


def small():
    """An experiment whose local changes collide with those of a cell."""
    return cells.Experiment(
        name="e98",
        title="?",
        base=override(preset("nano"), {"total_steps": 70}),
        cells=(
            cells.Cell("plain"),
            cells.Cell("wide", {"model.width": "64", "model.tied": "true", "total_steps": 9}),
        ),
        local={"total_steps": 3, "model.width": 32},
    )


def test_config_of_a_cell():
    experiment = small()
    plain, wide = experiment.cells
    named = {"name": ("nano", "e98")}
    assert differences(preset("nano"), experiment.config(plain, 0, local=False)) == (
        named | {"total_steps": (300, 70)}
    )
    # Text is parsed to the field's type, and the cell comes after what makes it small.
    assert differences(preset("nano"), experiment.config(wide, 4, local=True)) == named | {
        "seed": (0, 4),
        "total_steps": (300, 9),
        "model.width": (128, 64),
        "model.tied": (False, True),
    }
    assert experiment.config(plain, 0, local=True).model.width == 32
    assert experiment.config(wide, 4, local=False).total_steps == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.widht": 64}, "unknown field 'model.widht': did you mean model.width?"),
        ({"model.width": "wide"}, "model.width is 'wide': give an int"),
        ({"model.tied": 2}, "model.tied is 2: give true or false"),
    ],
)
def test_a_cell_that_can_not_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small().config(cells.Cell("bad", changes), 0, local=True)


def test_folders_of_cells_are_apart():
    experiment = small()
    folders = {
        experiment.folder(cell, seed, local=local)
        for cell in experiment.cells
        for seed in (0, 1)
        for local in (True, False)
    }
    assert len(folders) == 8
    assert Path("runs/e98-local/wide-1") in folders and Path("runs/e98/plain-0") in folders


def test_finished(tmp_path):
    config = override(preset("nano"), {"seed": 3})

    def write(status, stored):
        (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
        (tmp_path / "config.json").write_text(to_json(stored))

    assert not cells.finished(tmp_path, config)
    (tmp_path / "config.json").write_text(to_json(config))
    assert not cells.finished(tmp_path, config)  # killed: no summary
    for status in ("stopped", "diverged"):
        write(status, config)
        assert not cells.finished(tmp_path, config)
    write("done", config)
    assert cells.finished(tmp_path, config)
    # The length of the schedule is settled by the run, the rest is the experiment's.
    write("done", override(config, {"schedule_steps": 300}))
    assert cells.finished(tmp_path, config)
    write("done", override(config, {"optim.clip": 2.0}))
    with pytest.raises(ValueError, match=r"a run of other settings \(optim.clip\): move it away"):
        cells.finished(tmp_path, config)


def test_find_names_the_experiments():
    assert cells.find("e01").name == "e01"
    with pytest.raises(ValueError, match=r"no experiment 'e77': choose one of .*e01"):
        cells.find("e77")


def test_chosen_cells():
    experiment = replace(small(), local_cells=("wide",))

    def names(*given, local):
        return [cell.name for cell in experiment.chosen(given, local=local)]

    assert names(local=False) == ["plain", "wide"] and names(local=True) == ["wide"]
    assert names("plain", local=True) == ["plain"]  # what is asked for by name comes first
    assert [cell.name for cell in small().chosen(local=True)] == ["plain", "wide"]
    with pytest.raises(ValueError, match="--cells plane: the cells are plain, wide"):
        names("wide", "plane", local=False)


# --------------------------------------------------------------------------------------------------
# e01


@pytest.mark.filterwarnings("ignore:the symmetric init")
def test_e01_has_the_eight_cells():
    experiment = cells.find("e01")
    base = {
        "init": "balanced",
        "alpha_logit": 0.0,
        "tied": False,
        "std": 0.02,
    }
    wanted = {
        "base": base,
        "near_identity": {**base, "init": "near_identity", "alpha_logit": 2.0},
        "alpha_5": {**base, "alpha_logit": 5.0},
        "symmetric": {**base, "init": "symmetric"},
        "tied": {**base, "tied": True},
        "std_1": {**base, "std": 1.0},
        "old_run": {"init": "symmetric", "alpha_logit": 5.0, "tied": True, "std": 1.0},
        "fix": {"init": "symmetric", "alpha_logit": 0.0, "tied": True, "std": 1.0},
    }
    for local in (False, True):
        found = {}
        for cell in experiment.cells:
            config = experiment.config(cell, 0, local=local)
            start = gpt.connection_of(config.model).coefficients.init
            # What the model starts from, not only what the config says.
            pre_differs = start.pre[0] != start.pre[1]
            assert pre_differs == (config.model.connection.init != "symmetric")
            found[cell.name] = {
                "init": config.model.connection.init,
                "alpha_logit": start.res[0] - start.res[1],
                "tied": config.model.tied,
                "std": config.model.embedding_std,
            }
        assert found == wanted
        # And in nothing else, but for the leave to start far from ln V.
        reference = experiment.config(experiment.cells[0], 0, local=local)
        for cell in experiment.cells:
            changed = differences(reference, experiment.config(cell, 0, local=local))
            assert set(changed) <= {
                "model.connection.init",
                "model.connection.alpha_logit",
                "model.tied",
                "model.embedding_std",
                "allow_loss0",
            }


def test_e01_has_the_size_of_the_report_unless_local():
    """20,000 steps of 256 tokens, 6 layers of width 256; samples at 50 and 75 %."""
    experiment = cells.find("e01")
    config = experiment.config(experiment.cells[0], 0, local=False)
    per_update = config.data.batch * config.data.length * config.data.micro_batches
    assert config.total_steps * per_update == 20_000 * 256
    assert (config.model.layers, config.model.width) == (6, 256)
    assert config.data.corpus == "packages"
    sampled = {round(k * config.sample_every / config.total_steps, 2) for k in range(5)}
    assert {0.5, 0.75} <= sampled
    changed = differences(preset("d20"), config)
    assert not {"data.batch", "data.length", "optim.name", "model.mlp"} & set(changed)


# --------------------------------------------------------------------------------------------------
# e03


@pytest.mark.parametrize("start", list(e03_sinkhorn.STARTS))
@pytest.mark.parametrize("last", e03_sinkhorn.LASTS)
def test_e03_measures_the_marginal_that_is_not_last(start, last):
    """Against the oracle's Sinkhorn, matrix by matrix."""
    case = e03_sinkhorn.Case(4, start, last, 5, 2.0)
    with jax.enable_x64(True):
        found, exact = e03_sinkhorn.measure(case, 50)
        logits = np.asarray(e03_sinkhorn.draw(50, 4, 2.0))
    assert abs(logits.std() - 2) < 0.2
    options = {"iterations": 5, "last": last, **e03_sinkhorn.STARTS[start]}
    res = oracle_manifolds.sinkhorn(logits, 4, **options)
    sums = {"rows": res.sum(axis=2), "columns": res.sum(axis=1)}
    other = "columns" if last == "rows" else "rows"
    np.testing.assert_allclose(found, np.sort(abs(sums[other] - 1).max(axis=1)), atol=1e-14)
    assert found[0] > 0 and exact == pytest.approx(abs(sums[last] - 1).max(), abs=1e-14)


@pytest.mark.parametrize("iterations", [5, 20])
def test_e03_two_streams_have_an_error_in_closed_form(iterations):
    """[[1, x], [0, 1]]: 1/d grows by 2 a pair, so after t pairs the columns are off by x/(1 + 2tx),
    and no two streams by more than 1/(2t): a stated 3e-2 for t=20 is another figure."""
    for x in (1e-3, 1.0, 1e6):
        logits = np.array([[[0, np.log(x)], [-500, 0]]])
        for last, sides in (("rows", logits), ("columns", logits.swapaxes(1, 2))):
            case = e03_sinkhorn.Case(2, "exp", last, iterations, 1)
            with jax.enable_x64(True):
                res = e03_sinkhorn.matrices_of(case.manifold, 2, jnp.asarray(sides.reshape(1, 4)))
            other = "columns" if last == "rows" else "rows"
            error = e03_sinkhorn.marginal_errors(np.asarray(res), other)
            np.testing.assert_allclose(error, x / (1 + 2 * iterations * x), rtol=1e-9)
    with jax.enable_x64(True):
        drawn, _ = e03_sinkhorn.measure(e03_sinkhorn.Case(2, "exp", "rows", iterations, 10), 400)
    assert 0.95 / (2 * iterations) < drawn[-1] <= 1 / (2 * iterations)


def test_e03_sinkhorn_of_the_identity(monkeypatch):
    """b on its diagonal: e^b / (e^b + 3) there, and (e^b - 1) / (e^b + 3) is left a sublayer."""
    with jax.enable_x64(True):
        rows = e03_sinkhorn.diagonals()
        monkeypatch.setattr(e03_sinkhorn, "STATED_DIAGONAL", [(1, ".476", "9e-25")])
        wrong = e03_sinkhorn.diagonals()
    found = {(row["b"], row["figure"]): row for row in rows}
    for b in (1, 2, 4, 8, 10):
        diagonal, left = found[b, "diagonal"], found[b, "left"]
        assert diagonal["measured"] == pytest.approx(np.exp(b) / (np.exp(b) + 3), rel=1e-12)
        share = (np.exp(b) - 1) / (np.exp(b) + 3)
        assert left["measured"] == pytest.approx(share**48, rel=1e-10)
        assert diagonal["verdict"] == left["verdict"] == "agrees"
    assert [round(found[b, "diagonal"]["measured"], 3) for b in (1, 2, 4)] == [0.475, 0.711, 0.948]
    assert [row["verdict"] for row in wrong] == ["differs", "differs"]


def test_e03_left_is_the_projected_product():
    """Multiplied out in full, where that keeps its digits; and refused where it is not the same."""
    rng = np.random.default_rng(0)
    off = np.eye(4) - 1 / 4
    columns = rng.uniform(0.5, 1.5, (5, 4, 4))
    columns /= columns.sum(axis=1, keepdims=True)  # rows do not sum to one number
    for res in (columns, columns.swapaxes(1, 2)):
        product = off @ res[4] @ res[3] @ res[2] @ res[1] @ res[0] @ off
        values = np.linalg.svd(product, compute_uv=False)
        np.testing.assert_allclose(e03_sinkhorn.left(res), (values[0], values[2]), rtol=1e-9)
    with pytest.raises(ValueError, match="sums of rows differ by"):
        e03_sinkhorn.left(rng.uniform(0.5, 1.5, (5, 4, 4)))


def test_e03_what_an_init_leaves(monkeypatch):
    """Four sublayers in place of 48: `depth` leaves KEEP, the others what their formula says."""
    monkeypatch.setattr(e03_sinkhorn, "LAYERS", 4)
    with jax.enable_x64(True):
        found = {(row["preset"], row["init"]): row for row in e03_sinkhorn.inits()}
    assert {name for name, _ in found} == set(presets.PRESETS)
    depth = {name for name, init in found if init == "depth"}
    assert depth == {n for n in presets.PRESETS if "init" in presets.takes(n)} and len(depth) > 2
    for name in depth:
        row = found[name, "depth"]
        assert row["least"] == pytest.approx(KEEP, rel=1e-6)
        # A Kronecker product keeps more of what passes through one factor alone.
        most = KEEP**0.5 if name == "kromhc" else KEEP
        assert row["left"] == pytest.approx(most, rel=1e-6)
    e8 = np.exp(-8)
    gap, kept = (1 - e8) / (1 + 3 * e8), (1 - e8) / (1 + 23 * e8)
    shares = {
        ("mhc", "published"): gap,
        ("mhc_lite", "published"): kept,
        ("mhc_n2", "near_identity"): np.tanh(1),
        ("mhc_n4", "near_identity"): kept,
        ("shc", "own"): np.tanh(4),
        ("lucidrains_mhc", "own"): (np.e - 1) / (np.e + 3),
        ("cmhc", "own"): 1 - 4 / (2 * 4),
        ("hc", "own"): 1.0,
        ("go_mhc", "own"): 1.0,
    }
    for key, share in shares.items():
        assert found[key]["left"] == pytest.approx(share**4, rel=1e-6), key
    for name in ("deepseek_v4", "single_pass", "megatron", "maxtext", "liger"):
        assert found[name, "own"]["left"] < 1e-60
    assert found["residual", "own"]["left"] is None


def test_e03_says_where_a_stated_figure_differs():
    assert e03_sinkhorn.rounding(".10") == pytest.approx((0.095, 0.105))
    assert e03_sinkhorn.rounding("3.0e-3") == pytest.approx((2.95e-3, 3.05e-3))
    sample = np.sort(np.random.default_rng(0).uniform(size=10_000))

    def verdict(text, figure="p99", count=4000):
        stated = e03_sinkhorn.Stated("here", "uniform", figure, text, count)
        return e03_sinkhorn.compare(stated, sample)["verdict"]

    assert verdict(".99") == "agrees" and verdict(".95") == "differs"
    assert verdict(".50", "p50") == "agrees" and verdict(".60", "p50") == "differs"
    # Of few draws, little is said; of none that are known, nothing.
    assert verdict(".95", count=20) == "agrees" and verdict(".95", count=0) == "not comparable"
    sample = sample[::20]  # five of them beyond the 99th percentile
    assert verdict(".95") == "not comparable" and verdict(".60", "p50") == "differs"
    stated = e03_sinkhorn.Stated("here", "uniform", "mean", ".5", 0)
    assert e03_sinkhorn.compare(stated, sample)["measured"] == pytest.approx(0.5, abs=0.02)


def test_e03_products_leak_only_where_they_must():
    """eps takes 1e-6 of the exact marginal a sublayer; the other one wanders by percents."""
    with jax.enable_x64(True):
        found = e03_sinkhorn.products(300)
    kept = found[e03_sinkhorn.MANY_EXACT]
    np.testing.assert_allclose(kept, (1 + 1e-6) ** -128, rtol=1e-6)
    assert found[e03_sinkhorn.MANY_OTHER.format("smallest")].max() < 0.999
    assert found[e03_sinkhorn.MANY_OTHER.format("largest")].min() > 1.001
    assert found[e03_sinkhorn.EQUAL].min() >= 1 - 1e-9


@pytest.mark.parametrize(
    "arguments, said",
    [(["--matrices", "0"], "at least 1"), (["--out", "{}/file/x"], "name another")],
)
def test_e03_refuses_before_it_works(tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_text("")
    assert e03_sinkhorn.main([a.format(tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


@pytest.mark.slow
def test_e03_on_few_matrices(tmp_path, capsys):
    assert e03_sinkhorn.main(["--matrices", "300", "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "e03.json").read_text())
    assert len(stored["errors"]) == 6 * 2 * 2 * (5 + 2) and "commit" in stored["versions"]
    for row in stored["errors"]:
        assert 0 <= row["p50"] <= row["p99"] <= row["p99.9"] <= row["max"]
        if row["streams"] == 2:
            assert row["max"] <= 1 / 40
    verdicts = [row["verdict"] for row in stored["stated"]]
    assert len(verdicts) == len(e03_sinkhorn.STATED) and verdicts.count("differs") <= 2
    assert all(row["verdict"] == "agrees" for row in stored["diagonals"])
    for row in stored["newton"]["float64"]:
        assert row["max"] < 1e-12 and row["steps"] < 8
    # From 2 on 20 iterations leave a percent; more iterations leave less, of the same matrices.
    chosen = {
        (r["iterations"], r["std"]): r
        for r in stored["errors"]
        if (r["streams"], r["start"], r["last"]) == (4, "exp", "rows")
    }
    assert chosen[20, 1]["p99"] < 1e-4 and chosen[20, 2]["p99"] > 3e-3
    for std in e03_sinkhorn.STDS:
        medians = [chosen[t, std]["p50"] for t in e03_sinkhorn.ITERATIONS]
        assert sorted(medians, reverse=True) == medians
    text = (tmp_path / "e03.md").read_text()
    assert text in capsys.readouterr().out and text.count("\n## ") == 7
    assert (tmp_path / "e03.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------
# e04


def test_e04_has_a_cell_for_every_preset():
    experiment = cells.find("e04")
    assert [cell.name for cell in experiment.cells] == list(presets.PRESETS)
    for local in (False, True):
        reference = experiment.config(experiment.cells[0], 0, local=local)
        for cell in experiment.cells:
            config = experiment.config(cell, 0, local=local)
            changed = set(differences(reference, config))
            assert changed <= {"model.connection.preset", "model.connection.init"}
            options = {"layers": 2 * config.model.layers} if cell.name == "cmhc" else {}
            if cell.name in ("mhc_n2", "mhc_n4"):
                options = {"init": "near_identity"}
            assert gpt.connection_of(config.model) == presets.named(cell.name, **options)
    config = experiment.config(experiment.cells[0], 0, local=False)
    assert (config.model.layers, config.model.width, config.total_steps) == (6, 64, 200)
    assert {*report.COLUMNS, *report.FURTHER} > set(experiment.columns)
    assert len(experiment.chosen(local=True)) == 3


@pytest.mark.slow
def test_e04_local(tmp_path, one_device_env):
    """The table has what was asked for; e01's columns are in no way needed for it."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "e04", "--local"],
        cwd=tmp_path,
        env=one_device_env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "e04-local"
    found = {
        n: r[0] for n, r in json.loads((folder / "e04-local.json").read_text())["cells"].items()
    }
    assert list(found) == ["residual", "hc", "mhc"] and "Not finished" not in done.stdout
    for name, row in found.items():
        assert row["skipped"] == 0 and row["step_ms"] > 0
        stored = json.loads((folder / f"{name}-0" / "run.json").read_text())
        assert row["parameters"] == stored["info"]["parameters"]
        assert row["val_ce"] < row["first_ce"]
    assert found["residual"]["gain_forward"] == found["residual"]["gain_backward"] == 1
    # Rows of a truncated Sinkhorn are exact; nothing holds HC.
    assert found["mhc"]["gain_forward"] == pytest.approx(1, abs=1e-5)
    assert abs(found["hc"]["gain_forward"] - 1) > 1e-4
    assert found["residual"]["cosine_operand"] == 1 > found["mhc"]["cosine_operand"]
    header = (folder / "e04-local.md").read_text().split("\n")[2]
    labels = {**report.COLUMNS, **report.FURTHER}
    assert header.count("|") == 10 and labels["gain_backward"] in header


# --------------------------------------------------------------------------------------------------
# The sweep: killed, started again, reported


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder with experiments/ and e99 in it; -> (folder, start), start() runs the command."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    shutil.rmtree(folder / "experiments" / "results", ignore_errors=True)
    (folder / "experiments" / "e99_stub.py").write_text(STUB)
    # One device, as a user has; the conftest forces eight.
    flags = os.environ.get("XLA_FLAGS", "").split()
    env = {**os.environ, "XLA_FLAGS": " ".join(f for f in flags if "force_host" not in f)}

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *arguments],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return folder, start


def finish(process):
    """-> (exit code, output)"""
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def files(folder):
    """{name: (time of the last change, content)} of every file under `folder`."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def killed(sweep):
    """The sweep, killed in the middle of its second cell and started again.

    -> (folder of the runs, files of the first cell when killed, output of the second start)
    """
    folder, start = sweep
    runs = folder / "runs" / "e99-local"
    process = start("e99", "--local")
    saved, deadline = runs / "second-0" / "checkpoints", time.monotonic() + 180
    try:
        while not any(path.name.isdigit() for path in saved.glob("*")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "the second cell has saved nothing"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        finish(process)
    # It did die in the middle: nothing of this is worth a test otherwise.
    assert process.returncode == -signal.SIGKILL
    assert (runs / "first-0" / "summary.json").exists()
    assert not (runs / "second-0" / "summary.json").exists()
    assert not (runs / "third-0").exists()
    before = files(runs / "first-0")
    code, output = finish(start("e99", "--local"))
    assert code == 0, output
    return runs, before, output


def test_a_killed_sweep_goes_on(killed):
    runs, before, output = killed
    # What was finished is left alone, to the byte and to the time of its last change.
    assert len(before) > 5 and files(runs / "first-0") == before
    assert "runs/e99-local/first-0: finished, skipped" in output
    assert output.count("finished, skipped") == 1
    # What was begun goes on from its checkpoint, what was not starts.
    went_on = re.search(r"going on from .*second-0/checkpoints/(\d+)", output)
    assert went_on and 0 < int(went_on[1]) < 400
    assert output.count("going on from") == 1
    for name in ("first", "second", "third"):
        summary = json.loads((runs / f"{name}-0" / "summary.json").read_text())
        assert (summary["status"], summary["updates"]) == ("done", 400)
        # No update is lost and none is counted twice.
        steps = [row["step"] for row in runlog.read_rows(runs / f"{name}-0", "train")]
        assert steps == list(range(40, 401, 40))


def test_a_finished_sweep_repeats_nothing(killed, sweep):
    runs, _, _ = killed
    before = {name: files(runs / f"{name}-0") for name in ("first", "second", "third")}
    code, output = finish(sweep[1]("e99", "--local"))
    assert code == 0 and output.count("finished, skipped") == 3 and "===" not in output
    assert {name: files(runs / f"{name}-0") for name in before} == before


def test_report_of_the_sweep(killed):
    """What it writes is what the runs' own files say."""
    runs, _, output = killed
    stored = json.loads((runs / "e99-local.json").read_text())
    assert list(stored["cells"]) == ["first", "second", "third"] and stored["seeds"] == [0]
    for name, (row,) in stored["cells"].items():
        evals = runlog.read_rows(runs / f"{name}-0", "eval")
        trained = runlog.read_rows(runs / f"{name}-0", "train")
        assert row["first_ce"] == evals[0]["val_ce"] and row["val_bpb"] == evals[-1]["val_bpb"]
        assert row["copy_start"] == evals[0]["copy_rate"]
        assert row["copy_rate"] == evals[-1]["copy_rate"]
        assert row["repeat_rate"] == evals[-1]["repeat_rate"]
        assert row["cosine_operand"] == np.mean(evals[-1]["cosine_operand"])
        assert row["cosine_streams"] == np.mean(evals[-1]["cosine_streams"])
        assert row["tokens_per_second"] == np.median([r["tokens_per_second"] for r in trained])
        # The first res of two sublayers learns; it starts at another value in `second`.
        assert 0 < row["alpha_moved"] < 5
    assert stored["cells"]["first"][0]["val_bpb"] != stored["cells"]["second"][0]["val_bpb"]
    text = (runs / "e99-local.md").read_text()
    assert text.startswith("# Which is it?\n") and text.split("\n\n", 1)[1].strip() in output
    assert (runs / "e99-local.png").read_bytes().startswith(b"\x89PNG")


def test_report_names_what_is_missing(killed, tmp_path, monkeypatch, capsys):
    """A mean over fewer seeds than were asked for says so."""
    shutil.copytree(killed[0], tmp_path / "runs" / "e99-local")
    monkeypatch.chdir(tmp_path)
    stub: dict = {}
    exec(STUB, stub)
    shutil.rmtree(tmp_path / "runs" / "e99-local" / "third-0")
    report.write(stub["EXPERIMENT"], [0, 1], local=True)
    text = (tmp_path / "runs" / "e99-local" / "e99-local.md").read_text()
    wanted = "Not finished, so not in the table: first-1, second-1, third-0, third-1."
    assert wanted in text and wanted in capsys.readouterr().out
    assert "| first |" in text and "| third |" not in text
    assert "Not finished" not in (killed[0] / "e99-local.md").read_text()


def test_alpha_moved_is_the_distance_from_the_init(killed, monkeypatch):
    """A run that is handed its own start has moved nowhere; one logit by 0.25, by 0.25."""
    folder = killed[0] / "first-0"
    loaded = report.runs.load(folder)
    _, params = gpt.build(loaded.config.model, key=jax.random.key(loaded.config.seed))

    def measured(params):
        monkeypatch.setattr(report.runs, "load", lambda _: replace(loaded, params=params))
        return report.measure(folder)["alpha_moved"]

    assert measured(params) == 0
    nudged = jax.tree.map(lambda a: a, params)
    connection = nudged["blocks"]["attention_connection"]
    connection["alpha_logit"] = connection["alpha_logit"].at[0].add(-0.25)
    assert measured(nudged) == 0.25
    # pre and post are no part of it.
    connection["alpha_logit"] = connection["alpha_logit"].at[0].add(0.25)
    connection["pre_logits"] = connection["pre_logits"] + 1
    assert measured(nudged) == 0


def test_further_columns(killed, monkeypatch):
    """Counts from the weights, the time of a step from the rows, gains from a product by hand."""
    folder = killed[0] / "second-0"
    loaded, found = report.runs.load(folder), report.measure_further(folder)
    assert found["parameters"] == sum(a.size for a in jax.tree.leaves(loaded.params))
    speed = [row["tokens_per_second"] for row in runlog.read_rows(folder, "train")]
    assert found["step_ms"] == pytest.approx(1e3 * 4 * 16 / np.median(speed))
    assert found["val_ce"] == runlog.read_rows(folder, "eval")[-1]["val_ce"]
    assert found["skipped"] == 0
    assert found["gain_forward"] == pytest.approx(1, abs=1e-6)

    # With a manifold that nothing holds, of two sublayers.
    changes = {"preset": "hc_static", "init": None, "alpha_logit": None}
    named = {f"model.connection.{name}": value for name, value in changes.items()}
    config = override(loaded.config, named)
    graphdef, params = gpt.build(config.model, key=jax.random.key(0))
    res = np.array([[[1.0, 0.5], [0.0, 2.0]], [[0.25, 0.0], [3.0, 1.0]]])
    res = np.array([np.kron(np.eye(2), one) for one in res])
    for place, name in enumerate(("attention_connection", "mlp_connection")):
        # HC states A_r, which is applied transposed.
        own = res[place].T.reshape(1, 16).astype(np.float32)
        params["blocks"][name]["res_logits"] = jnp.asarray(own)
    other = replace(loaded, config=config, graphdef=graphdef, params=params)
    product = res[1] @ res[0]
    gain = report.composite_gain(other)
    assert float(gain.forward) == pytest.approx(abs(product.sum(axis=1)).max())
    assert float(gain.backward) == pytest.approx(abs(product.sum(axis=0)).max())
    assert float(gain.forward) != pytest.approx(float(gain.backward))

    # Not over a text that the run was not trained on.
    other = replace(loaded, meta={**loaded.meta, "corpus": "0" * 64})
    with pytest.raises(ValueError, match="was trained on another 'synthetic': run it again"):
        report.composite_gain(other)
    monkeypatch.setattr(report, "composite_gain", lambda _: gain)
    found = report.measure_further(folder)
    assert (found["gain_forward"], found["gain_backward"]) == (gain.forward, gain.backward)


def test_report_with_columns_of_its_own(killed, tmp_path, monkeypatch, capsys):
    """Named columns alone are in the table; a run that diverged is said to have; no cell is missed
    that a local run leaves out."""
    shutil.copytree(killed[0], tmp_path / "runs" / "e99-local")
    monkeypatch.chdir(tmp_path)
    stub: dict = {}
    exec(STUB, stub)
    columns = ("val_bpb", "gain_forward", "parameters")
    experiment = replace(stub["EXPERIMENT"], columns=columns, local_cells=("first", "second"))
    folder = tmp_path / "runs" / "e99-local"
    summary = folder / "second-0" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "status": "diverged"}))
    shutil.rmtree(folder / "third-0")
    report.write(experiment, [0], local=True)
    text = (folder / "e99-local.md").read_text()
    assert "| cell | val bits/byte | gain forward | parameters |" in text
    (line,) = [line for line in text.split("\n") if line.startswith("| first")]
    stored = json.loads((folder / "e99-local.json").read_text())["cells"]["first"][0]
    assert line == (f"| first | {stored['val_bpb']:.4f} | 1.0000 | {stored['parameters']:,} |")
    assert "Not finished, so not in the table: second-0 (diverged)." in text
    assert set(report.measure(folder / "first-0")) == set(report.COLUMNS)


def test_dots_where_curves_would_be_too_many():
    """A dot for every run, in the order of the table from above."""
    rng = np.random.default_rng(0)
    results = {
        f"cell {k}": [{"val_bpb": rng.uniform(), "cosine_operand": 1.0} for _ in range(2)]
        for k in range(12)
    }
    figure = report.dots_figure(results)
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("val bits/byte", "cosine mixed")
    assert [label.get_text() for label in left.get_yticklabels()] == list(results)
    assert left.yaxis_inverted()
    for place, (line, rows) in enumerate(zip(left.get_lines(), results.values(), strict=True)):
        assert list(line.get_ydata()) == [place, place]
        assert list(line.get_xdata()) == [row["val_bpb"] for row in rows]


def test_bad_arguments(sweep):
    for arguments, message in (
        (("e77",), "experiments.run: no experiment 'e77': choose one of e01, e02, e03, e04, e99"),
        (("e03",), "experiments.run: e03 has no cells: run python -m experiments.e03_sinkhorn"),
        (("e99", "--cells", "frist"), "--cells frist: the cells are first, second, third"),
    ):
        code, output = finish(sweep[1](*arguments))
        assert code == 2 and message in output and "Traceback" not in output


# --------------------------------------------------------------------------------------------------
# The table


def test_table_against_the_formulas():
    """Mean and standard error, by hand; four decimals are shown, none where there are thousands."""
    rng = np.random.default_rng(0)
    results = {
        name: [
            {
                c: rng.uniform(0, 2) * (1e4 if c == "tokens_per_second" else 1)
                for c in report.COLUMNS
            }
            for _ in range(seeds)
        ]
        for name, seeds in (("a", 3), ("b", 2), ("one", 1))
    }
    header, rule, *body = report.table(results).strip().split("\n")
    assert header == "| cell | " + " | ".join(report.COLUMNS.values()) + " |"
    assert rule.count("---") == len(report.COLUMNS) + 1
    assert len(body) == 3
    for line, (name, rows) in zip(body, results.items(), strict=True):
        found_name, *figures = [part.strip() for part in line.strip("|").split("|")]
        assert found_name == name and len(figures) == len(report.COLUMNS)
        for figure, column in zip(figures, report.COLUMNS, strict=True):
            values = [row[column] for row in rows]
            mean = sum(values) / len(values)
            numbers = [float(part.replace(",", "")) for part in figure.split("±")]
            digit = 0.5 if mean >= 1000 else 0.5e-4
            assert abs(numbers[0] - mean) <= 1.01 * digit
            if len(values) == 1:
                assert len(numbers) == 1  # one seed has no error, and none is made up
                continue
            squares = sum((value - mean) ** 2 for value in values)
            error = (squares / (len(values) - 1)) ** 0.5 / len(values) ** 0.5
            assert error > 10 * digit and abs(numbers[1] - error) <= 1.01 * digit


def test_report_without_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="e98 has no finished run: start experiments"):
        report.write(small(), [0], local=True)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# The experiment itself


@pytest.mark.slow
def test_e01_local(tmp_path, one_device_env):
    """Under 90 s on two idle cores with nothing cached, and its findings hold even at this size."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    env = {k: v for k, v in one_device_env.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["MHCJAX_CACHE"] = str(tmp_path / "cache")
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user and system time
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "e01", "--local"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    elapsed = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "runs" / "e01-local" / "e01-local.json").read_text())
    found = {name: rows[0] for name, rows in stored["cells"].items()}
    assert list(found) == [cell.name for cell in cells.find("e01").cells]
    uniform = np.log(512)

    # alpha has no part in the old run: with equal streams "fix" is the same run. That alpha and
    # 1 - alpha sum to one is rounded in another way, which 20 updates amplify a little.
    for column in set(report.COLUMNS) - {"tokens_per_second"}:
        assert found["old_run"][column] == pytest.approx(found["fix"][column], rel=1e-4, abs=1e-2)
        if column.startswith(("first", "val")):
            assert found["old_run"][column] == pytest.approx(found["fix"][column], rel=1e-4)
    for name in ("symmetric", "old_run", "fix"):
        assert found[name]["alpha_moved"] == 0
        assert found[name]["cosine_operand"] > 1 - 1e-6
    for name in ("base", "near_identity", "alpha_5", "tied", "std_1"):
        assert found[name]["alpha_moved"] > 1e-3
        assert found[name]["cosine_operand"] < 1 - 1e-3
    # The start far above guessing comes with std 1, the copying only where it is tied too.
    for name, row in found.items():
        assert (abs(row["first_ce"] - uniform) < 1) == (name not in ("std_1", "old_run", "fix"))
        assert (row["copy_start"] > 0.5) == (name in ("old_run", "fix"))
    # The cores may not be idle: what was computed counts then, not what was waited for.
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    print(f"{elapsed:.0f} s, {used:.0f} s of CPU")
    assert min(elapsed, used) < 90


# --------------------------------------------------------------------------------------------------
# The bench


def test_every_shape_of_the_bench_is_a_config():
    for shape in bench.SHAPES:
        for connection in ("residual", "mhc_n2"):
            config = bench.config_of(shape, connection, {"optim.name": "sgd"})
            assert (config.name, config.optim.name) == (shape, "sgd")
            assert config.model.connection.preset == connection


def test_the_overhead_is_over_the_residual_of_the_same_shape_and_optimizer():
    def row(connection, optimizer, ms):
        return {"shape": "s", "connection": connection, "optimizer": optimizer, "step_ms": ms}

    rows = [
        row("residual", "adamw", 10.0),
        row("mhc_n2", "adamw", 12.5),
        row("mhc_n2", "lion", 9.0),
    ]
    column = list(bench.COLUMNS).index("overhead")
    shown = [line.split(" | ")[column] for line in bench.table(rows).split("\n")[2:]]
    assert shown == ["0.0%", "25.0%", "-"]
    failed = bench.table([{"shape": "s", "connection": "c", "error": "it ended with -9"}])
    assert "| s | c | it ended with -9 |" in failed


def test_a_row_of_the_bench(tmp_path):
    """Measured in this process, at a size of nothing: counts and memory by hand."""
    changes = {"model.vocab": "128", "model.context": "16", "data.length": "16", "mesh.data": "1"}
    config = bench.config_of("cpu_tiny", "mhc_n2", changes)
    found = bench.measure(config, windows=2, steps=1, trace=None)
    assert found["tokens_per_step"] == 8 * 16
    assert found["tokens_per_second"] == pytest.approx(8 * 16 / (found["step_ms"] / 1e3))
    assert found["parameters"] == gpt.count(gpt.abstract_params(config.model))
    assert found["predicted_gb"] * 1e9 > 4 * 2 * found["parameters"]  # weights and a momentum
    assert found["mfu"] is None and found["config"]["model"]["vocab"] == 128
    held = found["plan"]["memory"]
    assert found["compiled"]["aliased"] == held["parameters"] + held["optimizer"]
    assert found["plan"]["seconds"] is None  # of a CPU
    # Both beside the state, which is more than what either leaves.
    assert 0 < found["plan_working_gb"] < found["working_gb"] < 3 * found["plan_working_gb"]


def asked(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", "model", *map(str, arguments)])
    return bench.main()


def test_variants_and_rows_side_by_side(monkeypatch, tmp_path, capsys):
    """Each row once, two at a time and never two on one device; written in the order asked."""
    running, most, seen = set(), [], []

    def made(request, environment):
        device = environment["CUDA_VISIBLE_DEVICES"]
        assert device not in running
        running.add(device)
        most.append(len(running))
        time.sleep(0.3 if request["connection"] == "residual" else 0.05)
        running.remove(device)
        seen.append((request["connection"], request["variant"]))
        remat = float(request["changes"].get("model.remat") == "true")
        named = {name: request[name] for name in ("shape", "connection", "variant")}
        working = {"working_gb": 2.0, "plan_working_gb": 1.9}
        return {**named, **working, "optimizer": "muon", "step_ms": 10 + remat, "plan_ms": 12.0}

    places = [{"CUDA_VISIBLE_DEVICES": str(k)} for k in range(2)]
    monkeypatch.setattr(bench.scaling, "places", lambda count: places[:count])
    monkeypatch.setattr(bench, "row_process", made)
    out = tmp_path / "rows.json"
    variants = ["", "model.remat=true", "model.layers=0", "model.remat=true,model.layers=3"]
    connections = ["--connections", "residual", "mhc_n2"]
    assert asked(monkeypatch, *connections, "--variants", *variants, "--jobs", 2, "--out", out) == 0
    wanted = [(c, v) for c in connections[1:] for v in variants if v != "model.layers=0"]
    assert sorted(seen) == sorted(wanted) and seen != wanted and max(most) == 2
    assert [(r["connection"], r["variant"]) for r in json.loads(out.read_text())] == wanted
    printed = capsys.readouterr().out
    assert printed.count("left out: cpu_tiny") == 2 and "model.layers is 0" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| cpu_tiny | mhc_n2 | m")]
    assert "| +9.1% | 2.00 | 1.90 | -5.0% |" in rows[0] and "| 0.0% |" in rows[-1]


def test_a_mesh_of_one_beside_none(monkeypatch, tmp_path):
    """The same function from the same weights on the same batches: on a CPU the same losses, to the
    bit."""
    out, tiny = tmp_path / "mesh.json", ["model.vocab=128", "data.length=16"]
    call = ["mesh", "--set", *tiny, "--windows", "3", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", *call])
    assert bench.main() == 0
    row = json.loads(out.read_text())
    assert set(row["seconds"]) == {"1x1 mesh", "no mesh"}
    assert all(len(windows) == 3 for windows in row["seconds"].values())
    first, second = (np.median(row["seconds"][name]) for name in ("1x1 mesh", "no mesh"))
    assert row["ratio"] == pytest.approx(second / first)
    losses = list(row["last_loss"].values())
    assert losses[0] == losses[1] < np.log(128) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "unknown shape 'huge': choose one of cpu_tiny"),
        (["--set", "optim.nmae=sgd"], "unknown field 'optim.nmae': did you mean optim.name?"),
        (["--set", "optim.name"], "--set optim.name: write FIELD=VALUE"),
        (["--variants", "", "model.remt=true"], "unknown field 'model.remt': did you mean model"),
        (["--jobs", "0"], "--jobs 0: 1 devices are here; give 1 to 1"),
        (["--windows", "0"], "--windows 0: give at least 1"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--settle", "nan"], "--settle nan: give at least 0"),
    ],
)
def test_bad_arguments_of_the_bench(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench", "model", *arguments])
    assert bench.main() == 2
    assert capsys.readouterr().err.startswith(f"experiments.bench: {message}")
