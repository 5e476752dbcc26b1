"""The bench of decoding: its rows, its overhead, its refusals."""

import json
import sys

import pytest

from experiments import bench, bench_decode

TINY = ["model.vocab=128", "model.context=16", "model.layers=1"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", "decode", *map(str, arguments)])
    return bench.main()


def test_rows_of_a_tiny_shape(tmp_path, monkeypatch, capsys):
    out = tmp_path / "decode.json"
    given = ["--shape", "cpu_tiny", "--batches", 1, 3, "--connections", "residual", "deepseek_v4"]
    given += ["--windows", 3, "--seconds", 0.01, "--set", *TINY, "--profile", "--out", out]
    assert run(monkeypatch, *given) == 0
    found = json.loads(out.read_text())
    assert {"device", "versions"} < set(found) and "commit" in found["versions"]
    rows = found["rows"]
    assert [(r["connection"], r["batch"], r["context"]) for r in rows] == [
        ("residual", 1, 16),
        ("residual", 3, 16),
        ("deepseek_v4", 1, 16),
        ("deepseek_v4", 3, 16),
    ]
    for r, base in zip(rows, rows[:2] * 2, strict=True):
        assert r["step_ms"] > 0 and r["spread"] >= 0
        assert r["tokens_per_second"] == pytest.approx(1e3 * r["batch"] / r["step_ms"])
        assert r["overhead"] == pytest.approx(r["step_ms"] / base["step_ms"] - 1)
    said = capsys.readouterr().out
    assert bench_decode.table(rows) in said and said.index("ready in") < said.index("| residual")


def test_the_overhead_is_over_the_residual_of_the_same_batch():
    def row(connection, batch, ms):
        return {"connection": connection, "batch": batch, "step_ms": ms}

    rows = [row("a", 1, 3.0), row("residual", 1, 2.0), row("residual", 64, 3.0), row("a", 8, 1.0)]
    found = bench_decode.compared(rows)
    assert [r.get("overhead") for r in found] == [0.5, 0.0, 0.0, None]
    column = list(bench_decode.COLUMNS).index("overhead")
    lines = bench_decode.table(found).split("\n")[2:]
    assert [line.split(" | ")[column] for line in lines] == ["50.0%", "0.0%", "0.0%", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "unknown shape 'huge': choose one of cpu_tiny"),
        (["--batches", "0"], "a batch of 0: give at least 1"),
        (["--windows", "0"], "--windows 0: give at least 1"),
        (["--connections", "residual", "mhcc"], "unknown connection 'mhcc': choose one of"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    out = tmp_path / "decode.json"
    assert run(monkeypatch, "--shape", "cpu_tiny", "--out", out, *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"experiments.bench: {message}")
    assert not said.out and not out.exists()  # before anything compiles
