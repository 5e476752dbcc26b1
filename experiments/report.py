"""The table and the picture of an experiment, from the runs that are there.

python -m experiments.report e01 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import cells
from mhcjax import gpt, plots, runlog, runs

COLUMNS = {
    "first_ce": "first ce",
    "val_bpb": "val bits/byte",
    "copy_start": "copy rate at start",
    "copy_rate": "copy rate",
    "repeat_rate": "data repeats",
    "alpha_moved": "alpha_logit moved",
    "cosine_operand": "cosine mixed",
    "cosine_streams": "cosine streams",
    "tokens_per_second": "tokens/s",
}


def measure(folder: Path) -> dict[str, float]:
    """What a finished run says, as plain numbers."""
    rows = runlog.read_rows(folder, "eval")
    first, last = rows[0], rows[-1]
    loaded = runs.load(folder)
    config = loaded.config
    _, start = gpt.build(config.model, key=jax.random.key(config.seed))
    before = {(l, n): a for l, _, n, a in gpt.sublayer_leaves(start, config.model)}
    moved = [
        float(np.max(np.abs(np.asarray(after) - np.asarray(before[l, leaf]))))
        for l, _, leaf, after in gpt.sublayer_leaves(loaded.params, config.model)
        if leaf in ("alpha_logit", "res_logits")
    ]
    speed = [r["tokens_per_second"] for r in runlog.read_rows(folder, "train")]
    return {
        "first_ce": first["val_ce"],
        "val_bpb": last["val_bpb"],
        "copy_start": first["copy_rate"],
        "copy_rate": last["copy_rate"],
        "repeat_rate": last["repeat_rate"],
        "alpha_moved": max(moved, default=0.0),
        "cosine_operand": float(np.mean(last["cosine_operand"])),
        "cosine_streams": float(np.mean(last["cosine_streams"])),
        "tokens_per_second": float(np.median(speed)),
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: mean, and standard error where there are several seeds."""

    def show(values: Sequence[float]) -> str:
        mean = float(np.mean(values))
        text = f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.4f}"
        if len(values) > 1:
            error = float(np.std(values, ddof=1)) / len(values) ** 0.5
            text += f" ± {error:,.0f}" if abs(mean) >= 1000 else f" ± {error:.4f}"
        return text

    lines = ["| cell | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rows in results.items():
        figures = [show([row[column] for row in rows]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def write(experiment: cells.Experiment, seeds: Sequence[int], *, local: bool) -> None:
    """Measure, print the table, write JSON, Markdown and a picture under results/."""
    results: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for cell in experiment.cells:
        for seed in seeds:
            folder = experiment.folder(cell, seed, local=local)
            if cells.finished(folder, experiment.config(cell, seed, local=local)):
                results.setdefault(cell.name, []).append(measure(folder))
                curves.setdefault(cell.name, runlog.read_rows(folder))
            else:
                missing.append(folder.name)
    if not results:
        raise ValueError(f"{experiment.name} has no finished run: start experiments.run first")
    name = f"{experiment.name}-local" if local else experiment.name
    text = table(results)
    if missing:
        text += f"\nNot finished, so not in the table: {', '.join(missing)}.\n"
    print(f"\n{experiment.title} ({len(seeds)} seed{'s' * (len(seeds) > 1)})\n\n{text}")
    target = Path("runs") / name if local else cells.RESULTS
    target.mkdir(parents=True, exist_ok=True)
    payload = {
        "title": experiment.title,
        "seeds": list(seeds),
        "versions": runlog.versions(),
        "cells": results,
    }
    runlog.write_atomic(target / f"{name}.json", json.dumps(payload, indent=2) + "\n")
    runlog.write_atomic(target / f"{name}.md", f"# {experiment.title}\n\n{text}")
    plots.loss_figure(curves).savefig(target / f"{name}.png", dpi=120)
    print(f"written: {target}/{name}.json, .md, .png")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    try:
        write(cells.find(args.name), args.seeds, local=args.local)
    except ValueError as error:
        print(f"experiments.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
