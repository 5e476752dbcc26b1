"""The pictures: every line is the data it claims to show, and nothing global is touched."""

import ast
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import TWO_LAYERS

from mhcjax import gpt, loop, plots, runlog
from mhcjax.config import override, preset
from mhcjax.connections import Mix

CONFIG = override(
    preset("nano"),
    {
        **TWO_LAYERS,
        "total_steps": 12,
        "log_every": 3,
        "eval_every": 4,
        "eval_batches": 2,
        "sample_every": 0,
        "save_every": 12,
        "optim.warmup_steps": 2,
    },
)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run of CONFIG, evaluated at updates 0, 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("plots") / "run"
    loop.fit(CONFIG, folder, say=lambda line: None)
    return folder


def lines(ax):
    """The lines that carry data: more than a rule across the axes."""
    return [line for line in ax.get_lines() if len(set(line.get_xdata())) > 2]


def labels(ax):
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


# --------------------------------------------------------------------------------------------------
# loss_figure


def test_loss_figure_of_a_run(run):
    rows = runlog.read_rows(run)
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "eval"]
    assert {3, 6, 9, 12} <= {r["step"] for r in train} and [r["step"] for r in val] == [0, 4, 8, 12]
    left, right = plots.loss_figure({"a": rows}).axes
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        "cross-entropy",
        "update",
        "nats per token",
    )
    assert (right.get_title(), right.get_xlabel(), right.get_ylabel()) == (
        "validation, with the last value",
        "update",
        "bits per byte",
    )
    trained, validated = lines(left)
    assert labels(left) == ["training batches", "validation"]
    np.testing.assert_array_equal(trained.get_xydata(), [(r["step"], r["ce"]) for r in train])
    np.testing.assert_array_equal(validated.get_xydata(), [(r["step"], r["val_ce"]) for r in val])
    (bits,) = lines(right)
    np.testing.assert_array_equal(bits.get_xydata(), [(r["step"], r["val_bpb"]) for r in val])
    # The number that people quote stands in the picture.
    assert labels(right) == [f"a  {val[-1]['val_bpb']:.3f}"]
    assert left.get_yscale() == right.get_yscale() == "linear"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_loss_figure_of_several_runs(run, count):
    rows = runlog.read_rows(run)
    runs = {
        f"cell {i}": [
            {**r, **({"ce": r["ce"] + i} if r["kind"] == "train" else {"val_bpb": i + 1.0})}
            for r in rows
        ]
        for i in range(count)
    }
    left, right = plots.loss_figure(runs).axes
    # Validation is drawn once, to the right, and the name of a run tells both of its lines.
    assert len(lines(left)) == len(lines(right)) == count
    assert labels(left) == list(runs)
    for i, (a, b) in enumerate(zip(lines(left), lines(right), strict=True)):
        assert a.get_color() == b.get_color()
        np.testing.assert_array_equal(b.get_ydata(), i + 1.0)
    assert len({line.get_color() for line in lines(left)}) == count
    assert labels(right) == [f"cell {i}  {i + 1:.3f}" for i in range(count)]


def test_loss_figure_of_runs_far_apart_is_logarithmic(run):
    rows = runlog.read_rows(run)
    far = [{**r, "val_bpb": 500.0} if r["kind"] == "eval" else r for r in rows]
    left, right = plots.loss_figure({"near": rows, "far": far}).axes
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")


def test_loss_figure_leaves_out_what_is_not_finite():
    """NaN is stored as null; a diverged run still has its picture."""
    rows = [{"kind": "train", "step": step, "ce": ce} for step, ce in enumerate([3.0, None, 1.0])]
    rows += [{"kind": "train", "step": 3, "ce": 0.5}]
    rows += [{"kind": "eval", "step": 4, "val_ce": None, "val_bpb": None}]
    left, right = plots.loss_figure({"a": rows}).axes
    np.testing.assert_array_equal(lines(left)[0].get_xydata(), [(0, 3), (2, 1), (3, 0.5)])
    assert lines(right) == [] and labels(right) == ["a"]


def test_a_picture_changes_with_its_data(run):
    rows = runlog.read_rows(run)
    changed = [dict(row) for row in rows]
    changed[-1]["val_bpb"] = changed[-1]["val_bpb"] + 1
    before, same, after = (pixels(plots.loss_figure({"a": r})) for r in (rows, rows, changed))
    np.testing.assert_array_equal(before, same)
    assert (before != after).any()


# --------------------------------------------------------------------------------------------------
# mixing_figure


def mixes(streams, layers, seed=0):
    """Mixes with different, asymmetric numbers everywhere."""
    rng = np.random.default_rng(seed)
    return [
        Mix(
            rng.uniform(0.1, 1, streams),
            rng.uniform(0.1, 2, streams),
            rng.uniform(0, 1, (streams, streams)),
        )
        for _ in range(layers)
    ]


@pytest.mark.parametrize(("streams", "layers"), [(2, 4), (4, 6)])
def test_mixing_figure_shows_the_mixes(streams, layers):
    given = mixes(streams, layers)
    cosines = list(np.linspace(0.2, 0.9, layers))
    pre, post, res, cosine = plots.mixing_figure(given, cosines).axes
    assert [ax.get_title() for ax in (pre, post, res, cosine)] == [
        "pre: what each sublayer reads",
        "post: where it writes",
        "diagonal of res: how much each stream keeps",
        "cosine between the streams that res mixes (1 is dead)",
    ]
    assert {ax.get_xlabel() for ax in (res, cosine)} == {"sublayer (even: attention, odd: MLP)"}
    assert len(lines(pre)) == len(lines(post)) == len(lines(res)) == streams
    assert labels(pre) == [f"stream {n}" for n in range(streams)]
    for n in range(streams):
        for ax, wanted in (
            (pre, [m.pre[n] for m in given]),
            (post, [m.post[n] for m in given]),
            (res, [m.res[n, n] for m in given]),
        ):
            np.testing.assert_array_equal(lines(ax)[n].get_xdata(), range(layers))
            np.testing.assert_array_equal(lines(ax)[n].get_ydata(), wanted)
    (now,) = lines(cosine)
    np.testing.assert_array_equal(now.get_ydata(), cosines)
    # The rules to compare with: full mixing and death.
    (full,) = [line for line in res.get_lines() if line not in lines(res)]
    (death,) = [line for line in cosine.get_lines() if line not in lines(cosine)]
    assert set(full.get_ydata()) == {1 / streams} and set(death.get_ydata()) == {1.0}


def test_mixing_figure_takes_the_mean_over_tokens():
    """A mix that depends on the token: leading axes are averaged, those of one matrix are not."""
    rng = np.random.default_rng(1)
    dynamic = [
        Mix(
            rng.uniform(size=(3, 5, 2)), rng.uniform(size=(3, 5, 2)), rng.uniform(size=(3, 5, 2, 2))
        )
        for _ in range(4)
    ]
    pre, post, res, _ = plots.mixing_figure(dynamic, [0.5] * 4).axes
    for n in range(2):
        # Sums of 15 numbers in another order, float64.
        for ax, wanted in (
            (pre, [m.pre[..., n].mean() for m in dynamic]),
            (post, [m.post[..., n].mean() for m in dynamic]),
            (res, [m.res[..., n, n].mean() for m in dynamic]),
        ):
            np.testing.assert_allclose(lines(ax)[n].get_ydata(), wanted, rtol=1e-14)


def test_mixing_figure_shows_negative_diagonals():
    given = [Mix(np.ones(2), np.ones(2), -0.5 * np.eye(2))] * 3
    res = plots.mixing_figure(given, [0.5] * 3).axes[2]
    assert res.get_ylim()[0] <= -0.5


def test_mixing_figure_of_a_run(run):
    """History and now: one line an evaluation; the first and the last before now are named."""
    graphdef, params = gpt.build(CONFIG.model, key=jax.random.key(0))
    trace = jax.jit(lambda p, t: nnx.merge(graphdef, p).trace(t))
    records, _ = trace(params, jnp.zeros((1, 4), int))
    given = [record.mix for record in records]
    history = runlog.read_rows(run, "eval")
    cosines = history[-1]["cosine_operand"]
    assert len(cosines) == len(given) == 4
    cosine = plots.mixing_figure(given, cosines, history).axes[3]
    for line, row in zip(lines(cosine), history, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), row["cosine_operand"])
    assert labels(cosine) == ["update 0", "update 8", "update 12"]
    # Without a history only the present is there.
    alone = plots.mixing_figure(given, cosines).axes[3]
    assert labels(alone) == ["now"] and len(lines(alone)) == 1


def test_the_mixing_picture_changes_with_its_data():
    given = mixes(2, 4)
    before, same = (pixels(plots.mixing_figure(given, [0.5] * 4)) for _ in range(2))
    np.testing.assert_array_equal(before, same)
    for other in (
        plots.mixing_figure(mixes(2, 4, seed=1), [0.5] * 4),
        plots.mixing_figure(given, [0.5, 0.5, 0.5, 0.6]),
        plots.mixing_figure(given, [0.5] * 4, [{"step": 0, "cosine_operand": [0.1] * 4}] * 2),
    ):
        assert (pixels(other) != before).any()


def test_fit_writes_both_pictures(run):
    for name in ("loss.png", "mixing.png"):
        # The signature of the format, and more than an empty canvas.
        content = (run / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


# --------------------------------------------------------------------------------------------------
# No global state


def test_matplotlib_is_imported_inside_functions_only():
    tree = ast.parse(inspect.getsource(plots))
    named = [
        [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert named and not any("matplotlib" in name for names in named for name in names)
    assert "pyplot" not in inspect.getsource(plots)


def test_no_pyplot_and_no_window(one_device_env):
    """In a process of its own: pictures are made without pyplot, so no figure stays open."""
    program = """
import sys
import numpy as np
from mhcjax import plots
from mhcjax.connections import Mix
assert "matplotlib" not in sys.modules
one = Mix(np.ones(2), np.ones(2), np.eye(2))
figure = plots.mixing_figure([one] * 4, [0.5] * 4)
figure.canvas.draw()
plots.loss_figure({"a": [{"kind": "train", "step": 1, "ce": 1.0}]}).canvas.draw()
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
import matplotlib
from matplotlib import pyplot
assert pyplot.get_fignums() == [] and matplotlib.rcParams == matplotlib.rcParamsDefault
"""
    # A backend that needs a window would fail here.
    env = {k: v for k, v in one_device_env.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
