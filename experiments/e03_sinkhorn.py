"""e03: how far from doubly stochastic is a truncated Sinkhorn, and what does an init leave of the
streams' difference?

Question  Which error do 5 to 100 iterations leave on the marginal that is not normalised last, for
          logits of which size? After 48 sublayers of the initial res alone, which share of the
          difference between streams is left, for every preset?
Expect    The errors and shares that the survey of the field and of its implementations states;
          20 iterations do where the logits have a standard deviation of 1, and not from 2 on.
          `init="depth"` leaves 0.5 whatever the manifold; an init at the uniform matrix nothing.
Cost      Under a minute on 2 cores, CPU.
Run       python -m experiments.e03_sinkhorn
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cells
from mhcjax import presets, runlog
from mhcjax.connections import mix
from mhcjax.manifolds import Manifold, NewtonSinkhorn, Sinkhorn, manifold_of
from mhcjax.published import KEEP
from mhcjax.spec import Connection, init

STDS = (1, 2, 4, 5, 6, 10)
ITERATIONS = (5, 10, 20, 50, 100)
LASTS = ("rows", "columns")
# As in the paper; and as in DeepSeek's code, whose softmax is the first normalisation.
STARTS: dict[str, dict[str, Any]] = {
    "exp": {},
    "softmax": {"start": "softmax", "eps": 1e-6, "domain": "linear"},
}
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
LAYERS = 48
SIGMAS = 3.0  # of sampling noise, beyond which a stated figure is called another one
ENOUGH = 10  # of our draws beyond a quantile, for it to be held against anything

# The project's notes: on the literature, which quote mHC-proj, and on other implementations.
SURVEY, PEERS, PROJ = "survey, section 2", "peers, section 3", "mHC-proj, arXiv 2606.07574"


class Case(NamedTuple):
    """One setting of Sinkhorn and of the logits."""

    streams: int
    start: str
    last: str
    iterations: int
    std: float

    @property
    def manifold(self) -> Sinkhorn:
        return Sinkhorn(iterations=self.iterations, last=self.last, **STARTS[self.start])

    def __str__(self) -> str:
        return (
            f"N={self.streams}, {self.start}, {self.last} last, {self.iterations} iterations, "
            f"logits {self.std:g}"
        )


class Stated(NamedTuple):
    """A figure of the literature: of which sample, which quantile, how many draws it is of (0: not
    said, so that it can't be held against ours)."""

    source: str
    sample: Case | str
    quantile: str
    text: str
    count: int


EQUAL, MANY_EXACT, MANY_OTHER = (
    "60 equal res, exp, rows last, logits 6: largest column sum of the product",
    "128 res, softmax, columns last, logits 10: smallest column sum of the product",
    "128 res, softmax, columns last, logits 10: {} row sum of the product",
)


def _survey(std: float, iterations: int = 20, **figures: str) -> list[Stated]:
    case = Case(4, "exp", "rows", iterations, std)
    return [Stated(SURVEY, case, name, text, 200_000) for name, text in figures.items()]


def _peers(streams: int, std: float, median: str | None, most: str | None) -> list[Stated]:
    case = Case(streams, "softmax", "columns", 20, std)
    figures = {"p50": median, "p99.9": most}
    return [Stated(PEERS, case, name, text, 4000) for name, text in figures.items() if text]


STATED: list[Stated] = [
    *_survey(1, p50="3e-13", p99="2e-6"),
    *_survey(2, p50="8e-7", p99="1.3e-2"),
    *_survey(4, p50="3.0e-3", p99="4.4e-2"),
    *_survey(6, p50="1.6e-2", p99="6.3e-2"),
    *_survey(10, p50="2.8e-2", p99=".10"),
    *_survey(4, iterations=10, p50="2.2e-2"),
    *_survey(4, iterations=50, p50="9e-6"),
    *_survey(4, iterations=100, p50="5e-10"),
    *_peers(4, 1, "1e-6", "3e-5"),
    *_peers(4, 2, "2e-6", "2e-2"),
    *_peers(4, 5, "9e-3", "6e-2"),
    *_peers(4, 10, "2e-2", "8e-2"),
    *_peers(2, 1, "1e-6", "2e-3"),
    *_peers(2, 2, "1e-6", "2e-2"),
    *_peers(2, 5, "1e-3", "3e-2"),
    *_peers(8, 5, "1e-2", "8e-2"),
    Stated(SURVEY, EQUAL, "p99", "2.5", 300),
    Stated(PEERS, MANY_EXACT, "p50", ".99987", 1),
    Stated(PEERS, MANY_OTHER.format("smallest"), "p50", ".96", 1),
    Stated(PEERS, MANY_OTHER.format("largest"), "p50", "1.04", 1),
    Stated(PROJ, Case(4, "exp", "rows", 20, 1), "mean", "8e-6", 0),
    Stated(PROJ, Case(4, "exp", "rows", 20, 1), "max", "1.38e-3", 0),
    Stated(PROJ, Case(4, "exp", "rows", 20, 10), "mean", ".05", 0),
    Stated(PROJ, Case(4, "exp", "rows", 20, 10), "max", ".83", 0),
]

# Sinkhorn(b I) at N=4, survey, section 1.19: b, diagonal, what 48 sublayers leave.
STATED_DIAGONAL: list[tuple[float, str, str]] = [
    (1, ".475", "9e-26"),
    (2, ".711", "7e-11"),
    (4, ".948", ".032"),
    (8, ".999", ".938"),
    (10, ".9999", ".991"),
]


# --------------------------------------------------------------------------------------------------
# Marginal errors


@partial(jax.jit, static_argnames=("manifold", "streams"))
def matrices_of(manifold: Manifold, streams: int, logits: jax.Array) -> jax.Array:
    """logits[T, J] -> res[T, M, N]."""
    return manifold.matrix(logits, streams)


def marginal_errors(res: np.ndarray, of: str) -> np.ndarray:
    """Largest |sum - 1| of each matrix's rows or columns, [T]."""
    return np.abs(res.sum(axis=-1 if of == "rows" else -2) - 1).max(axis=-1)


def draw(count: int, streams: int, std: float) -> jax.Array:
    """Normal logits[T, N * N]; the same ones but for their size at every std."""
    rng = np.random.default_rng(streams)
    return jnp.asarray(std * rng.standard_normal((count, streams * streams)))


def cases() -> list[Case]:
    """Every setting that is measured."""
    sizes = [(4, iterations) for iterations in ITERATIONS] + [(2, 20), (8, 20)]
    return [
        Case(streams, start, last, iterations, std)
        for streams, iterations in sizes
        for start in STARTS
        for last in LASTS
        for std in STDS
    ]


def measure(case: Case, count: int) -> tuple[np.ndarray, float]:
    """(sorted errors of the marginal not normalised last, largest error of the other one)."""
    logits = draw(count, case.streams, case.std)
    res = np.asarray(matrices_of(case.manifold, case.streams, logits))
    other = LASTS[1 - LASTS.index(case.last)]
    return np.sort(marginal_errors(res, other)), float(marginal_errors(res, case.last).max())


def products(count: int) -> dict[str, np.ndarray]:
    """Sums of products of many truncated Sinkhorns, sorted."""
    one = Case(4, "exp", "rows", 20, 6)
    equal = np.asarray(matrices_of(one.manifold, 4, draw(count, 4, one.std)))
    columns = np.linalg.matrix_power(equal, 60).sum(axis=-2)
    draws, case = max(count // 100, 2), Case(4, "softmax", "columns", 20, 10)
    res = np.asarray(matrices_of(case.manifold, 4, draw(128 * draws, 4, case.std)))
    product = np.broadcast_to(np.eye(4), (draws, 4, 4))
    for layer in res.reshape(draws, 128, 4, 4).swapaxes(0, 1):
        product = layer @ product
    rows = product.sum(axis=-1)
    found = {
        EQUAL: columns.max(axis=-1),
        MANY_EXACT: product.sum(axis=-2).min(axis=-1),
        MANY_OTHER.format("smallest"): rows.min(axis=-1),
        MANY_OTHER.format("largest"): rows.max(axis=-1),
    }
    return {name: np.sort(values) for name, values in found.items()}


def newton(count: int, dtype: Any) -> list[dict[str, float]]:
    """Column errors and steps of NewtonSinkhorn at N=4, one row a size of the logits."""
    spec, rows = NewtonSinkhorn(), []
    steps_of = jax.jit(lambda logits: spec.steps(logits, 4))
    for std in STDS:
        logits = draw(count, 4, std).astype(dtype)
        res = np.asarray(matrices_of(spec, 4, logits), np.float64)
        steps = np.sort(np.asarray(steps_of(logits)))
        errors = np.sort(marginal_errors(res, "columns"))
        row = {"std": std, "steps": float(steps.mean()), "most steps": int(steps[-1])}
        rows.append({**row, **{name: quantile(errors, q) for name, q in QUANTILES.items()}})
    return rows


def quantile(ordered: np.ndarray, q: float) -> float:
    """The order statistic at that share of a sorted sample."""
    return float(ordered[min(int(q * len(ordered)), len(ordered) - 1)])


def noise(ordered: np.ndarray, q: float, others: int) -> tuple[float, float]:
    """Where that quantile of another sample of `others` draws lies: SIGMAS of its rank and ours."""
    spread = SIGMAS * (q * (1 - q) * (1 / len(ordered) + 1 / others)) ** 0.5
    return quantile(ordered, max(q - spread, 0)), quantile(ordered, min(q + spread, 1))


def rounding(text: str) -> tuple[float, float]:
    """The numbers that are written so: half a unit of the last digit to either side.

    >>> rounding("2e-6")
    (1.5e-06, 2.5e-06)
    """
    value = Decimal(text)
    half = Decimal(5).scaleb(int(value.as_tuple().exponent) - 1)
    return float(value - half), float(value + half)


def compare(stated: Stated, ordered: np.ndarray) -> dict[str, Any]:
    """A stated figure beside the measured one, and whether they agree."""
    name = stated.quantile
    measured = float(ordered.mean()) if name == "mean" else quantile(ordered, QUANTILES[name])
    verdict = "not comparable"
    # Our own largest few bound nothing.
    if stated.count and len(ordered) * (1 - QUANTILES[name]) >= ENOUGH:
        low, high = noise(ordered, QUANTILES[name], stated.count)
        least, most = rounding(stated.text)
        verdict = "agrees" if least <= high and low <= most else "differs"
    return {
        "source": stated.source,
        "sample": str(stated.sample),
        "figure": name,
        "stated": stated.text,
        "measured": measured,
        "verdict": verdict,
    }


# --------------------------------------------------------------------------------------------------
# What is left of the difference between streams


def left(res_LMN: np.ndarray) -> tuple[float, float]:
    """(largest, smallest) singular value of `(I - J) res[L-1] ... res[0] (I - J)`, J = 1/N, on the
    space that is orthogonal to (1, ..., 1).

    Multiplied in that space, where 1e-26 is no rounding of 1: the same number where every res has
    equal row sums or every one equal column sums, and a ValueError where none has.
    """
    spread = [float(np.ptp(res_LMN.sum(axis=axis), axis=-1).max()) for axis in (-1, -2)]
    if min(spread) > 1e-9:
        raise ValueError(f"sums of rows differ by {spread[0]}, of columns by {spread[1]}")
    streams = res_LMN.shape[-1]
    basis = np.linalg.qr(np.column_stack([np.ones(streams), np.eye(streams)[:, 1:]]))[0][:, 1:]
    product = np.eye(streams - 1)
    for res in res_LMN:
        product = (basis.T @ res @ basis) @ product
    values = np.linalg.svd(product, compute_uv=False)
    return float(values[0]), float(values[-1])


def initial_res(spec: Connection, layers: int) -> np.ndarray:
    """res[L, M, N] of every sublayer at init, of its biases alone: projections at zero."""
    width = 8
    own = [
        init(
            spec,
            width=width,
            layer=layer,
            layers=layers,
            key=jax.random.key(layer),
            dtype=jnp.float64,
        )
        for layer in range(layers)
    ]
    stacked = {name: jnp.stack([p[name] for p in own]) for name in own[0]}
    if "projection" in stacked:
        stacked["projection"] = jnp.zeros_like(stacked["projection"])
    x = jnp.zeros((spec.streams, width), jnp.float64)
    res = jax.vmap(lambda p: mix(spec, p, x).res, axis_size=layers)(stacked)
    return np.asarray(res, np.float64)


def inits() -> list[dict[str, Any]]:
    """One row for every preset and init: its res, and what LAYERS sublayers leave."""
    rows = []
    for name in presets.PRESETS:
        taken = presets.takes(name)
        options = {"layers": LAYERS} if "layers" in taken else {}
        named: list[str | None] = [None]
        if "init" in taken:
            own = ("balanced", "near_identity") if name.startswith("mhc_n") else ("published",)
            named = [*own, "depth"]
        for start in named:
            spec = presets.named(name, **options, **({"init": start} if start else {}))
            res = initial_res(spec, LAYERS)
            diagonal = float(np.diagonal(res, axis1=-2, axis2=-1).mean())
            most, least = left(res) if spec.streams > 1 else (None, None)
            rows.append(
                {
                    "preset": name,
                    "init": start or "own",
                    "streams": spec.streams,
                    "diagonal": diagonal,
                    "left": most,
                    "least": least,
                }
            )
    return rows


def diagonals() -> list[dict[str, Any]]:
    """Sinkhorn(b I) beside the figures of the survey."""
    rows = []
    for b, diagonal, share in STATED_DIAGONAL:
        res = np.asarray(manifold_of("sinkhorn").matrix(b * jnp.eye(4).reshape(-1), 4))
        found = {
            "diagonal": (diagonal, float(res[0, 0])),
            "left": (share, left(np.stack([res] * LAYERS))[0]),
        }
        for figure, (text, measured) in found.items():
            least, most = rounding(text)
            agrees = least <= measured <= most
            rows.append(
                {
                    "b": b,
                    "figure": figure,
                    "stated": text,
                    "measured": measured,
                    "verdict": "agrees" if agrees else "differs",
                }
            )
    return rows


# --------------------------------------------------------------------------------------------------
# Tables and picture


def run(count: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All of it, in float64, with `count` matrices a case."""
    with jax.enable_x64(True):
        samples: dict[Case | str, np.ndarray] = {}
        exact = dict.fromkeys(STARTS, 0.0)
        for case in cases():
            samples[case], last = measure(case, count)
            exact[case.start] = max(exact[case.start], last)
        say(f"measured {len(samples)} cases of {count:,} matrices")
        errors = [
            {
                **case._asdict(),
                **{name: quantile(ordered, q) for name, q in QUANTILES.items()},
                "mean": float(ordered.mean()),
            }
            for case, ordered in samples.items()
        ]
        samples |= products(count)
        return {
            "matrices": count,
            "layers": LAYERS,
            "errors": errors,
            "largest error of the marginal normalised last": exact,
            "stated": [compare(one, samples[one.sample]) for one in STATED],
            "newton": {
                dtype.__name__: newton(count, dtype) for dtype in (jnp.float64, jnp.float32)
            },
            "inits": inits(),
            "diagonals": diagonals(),
            "versions": runlog.versions(),
        }


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    def show(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return "0" if abs(value) < 1e-99 else format(value, form)
        return str(value)

    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(show(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def text_of(found: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    count, figures = f"{found['matrices']:,}", list(QUANTILES)
    parts = [
        "# How far is a truncated Sinkhorn from doubly stochastic, and what does an init leave?\n",
        f"float64, normal logits, {count} matrices a row. Error: the largest |sum - 1| of a "
        "matrix's columns where the rows are normalised last, and the other way round.\n",
    ]
    sides = [f"{name}, {last} last" for last in LASTS for name in figures]
    for start, options in STARTS.items():
        chosen: dict[tuple, dict[str, dict]] = {}
        for row in found["errors"]:
            if row["start"] == start:
                key = (row["streams"], row["iterations"], row["std"])
                chosen.setdefault(key, {})[row["last"]] = row
        last = found["largest error of the marginal normalised last"][start]
        parts += [
            f"## Start {start}, eps {options.get('eps', 0):g}\n",
            f"The marginal normalised last is off by at most {last:.1e}.\n",
            _markdown(
                ["N", "iterations", "logit std", *sides],
                [[*key, *(r[l][f] for l in LASTS for f in figures)] for key, r in chosen.items()],
                ".1e",
            ),
        ]
    parts += [
        "## Beside the figures that were stated\n",
        f"'differs' is beyond the rounding of the stated figure and {SIGMAS:g} sigma of both "
        "samples' noise. Survey and peers: this project's notes on the literature and on other "
        "implementations, whose figures were measured in NumPy. mHC-proj states neither the "
        f"streams nor the count of its matrices; with fewer than {ENOUGH} of ours beyond a figure "
        "it is not compared either.\n",
        _markdown(
            ["source", "sample", "figure", "stated", "measured", ""],
            [list(row.values()) for row in found["stated"]],
            ".5g",
        ),
    ]
    for dtype, rows in found["newton"].items():
        lines = [[*row.values()] for row in rows]
        header = ["logit std", "mean steps", "most steps", *figures]
        parts += [f"## NewtonSinkhorn, N=4, {dtype}\n", _markdown(header, lines, ".2g")]
    parts += [
        f"## What {found['layers']} sublayers leave of the difference between streams, at init\n",
        "Biases alone. Left: largest and smallest singular value of the product on what is "
        f"orthogonal to (1, ..., 1); `depth` is made to leave {KEEP}.\n",
        _markdown(
            ["preset", "init", "N", "diagonal of res", "left, most", "left, least"],
            [list(row.values()) for row in found["inits"]],
            ".4g",
        ),
        "## Sinkhorn(b I), N=4\n",
        _markdown(
            ["b", "figure", "stated", "measured", ""],
            [list(row.values()) for row in found["diagonals"]],
            ".4g",
        ),
    ]
    return "\n".join(parts)


def figure_of(found: dict[str, Any]) -> Any:
    """Error against the size of the logits, a line for each count of iterations."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shown = {"p50": "median", "p99.9": "99.9th percentile"}
    for ax, (name, title) in zip(axes, shown.items(), strict=True):
        for shade, iterations in zip((0.9, 0.7, 0.5, 0.3, 0.05), ITERATIONS, strict=True):
            color = colormaps["viridis"](shade)
            for start, style in (("exp", ".-"), ("softmax", ":")):
                key = (4, start, "rows", iterations)
                line = [r for r in found["errors"] if tuple(r[k] for k in Case._fields[:4]) == key]
                label = f"{iterations} iterations" if start == "exp" else None
                values = [max(r[name], 1e-16) for r in line]
                ax.plot(STDS, values, style, color=color, lw=1.6, label=label)
        # The marginals change places with the axis that is last: both are one distribution.
        points = [
            (s.sample.std, float(Decimal(s.text)))
            for s in STATED
            if isinstance(s.sample, Case) and s.sample.streams == 4 and s.quantile == name
        ]
        ax.plot(*zip(*points, strict=True), "rx", ms=7, label="stated (survey, peers)")
        ax.set(yscale="log", xlabel="standard deviation of the logits", title=title, xticks=STDS)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("largest |column sum - 1| of a matrix")
    axes[1].plot([], [], "k.-", label="start exp, eps 0")
    axes[1].plot([], [], "k:", label="start softmax, eps 1e-6")
    axes[1].legend(frameon=False, loc="lower right")
    figure.suptitle("Sinkhorn at N=4, rows normalised last")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.e03_sinkhorn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--matrices", type=int, default=20_000, help="a case [20000]")
    parser.add_argument("--out", type=Path, default=cells.RESULTS, help="a folder")
    args = parser.parse_args(argv)
    if args.matrices < 1:
        print(f"e03_sinkhorn: --matrices {args.matrices}: give at least 1", file=sys.stderr)
        return 2
    try:  # before half a minute of work
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"e03_sinkhorn: --out {args.out}: {error.strerror}; name another", file=sys.stderr)
        return 2
    found = run(args.matrices)
    text = text_of(found)
    print(f"\n{text}")
    runlog.write_atomic(args.out / "e03.json", json.dumps(found, indent=1) + "\n")
    runlog.write_atomic(args.out / "e03.md", text)
    figure_of(found).savefig(args.out / "e03.png", dpi=120)
    print(f"written: {args.out}/e03.json, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
