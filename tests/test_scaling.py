"""The page of predictions is what its command says; the benchmark's rows and verdicts."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from experiments import bench, scaling
from mhcjax import costs, train

ROOT = Path(__file__).parent.parent
ROOM = scaling.SPARE * train.DEVICES[scaling.DEVICE].memory


# --------------------------------------------------------------------------------------------------
# On paper


def test_the_page_is_what_its_command_says():
    page = (ROOT / "docs/scaling.md").read_text()
    assert page == scaling.page(), (
        "docs/scaling.md is out of date: python -m experiments.scaling page --out docs/scaling.md"
    )
    rows = [row for row, _ in scaling.recorded()]
    measured = sum(r["shape"] in scaling.TOKENS for r in rows)
    planned = len(scaling.TOKENS) * len(scaling.GPUS) + len(scaling.LONG[3])
    assert page.count("\n| gpt") == planned + measured
    for variant in ("model.remat=true", "model.remat_streams=true"):
        assert page.count(f"| {variant} |") == sum(r.get("variant") == variant for r in rows) > 1
    assert page.count("\n| weak") + page.count("\n| sharded") == len(list(scaling.scaled())) > 7


def test_a_recorded_row_has_the_config_that_was_run():
    """The variant is part of it; what the rows say of themselves is what is made of their names."""
    found = list(scaling.recorded())
    flags = {(r.get("variant") or "", c.model.remat, c.model.remat_streams) for r, c in found}
    wanted = {("model.remat=true", True, False), ("model.remat_streams=true", False, True)}
    assert flags == wanted | {("", False, False)}
    said = 0
    for row, config in (*found, *scaling.scaled()):
        if "config" in row:
            said += 1
            own = row["config"]["mesh"]  # rows are older than the axis sequence
            row["config"]["mesh"] = {**own, "data": own["data"] or 1, "sequence": 1}
            assert row["config"] == json.loads(json.dumps(dataclasses.asdict(config))), row
    assert said > 14


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_best_is_the_fastest_that_fits(gpus):
    config = bench.config_of("gpt_1b3", "deepseek_v4", {})
    tokens = scaling.TOKENS["gpt_1b3"]
    chosen = scaling.best(config, gpus, tokens)
    assert chosen.memory.peak <= ROOM and costs.mesh_of(chosen.config).size == gpus
    faster = 0
    for other in scaling.candidates(config, gpus, tokens):
        train.check_mesh(other, costs.mesh_of(other))
        data = other.data
        assert data.batch * data.micro_batches * data.length == tokens
        took, held = scaling.plan.seconds(other, "h200").total, costs.memory(other).peak
        faster += took < chosen.seconds.total
        assert took >= chosen.seconds.total or held > ROOM
    assert faster or gpus > 1  # on one GPU memory is what decides


def test_nothing_fits():
    config = bench.config_of("gpt_27b", "deepseek_v4", {})
    assert scaling.best(config, 1, 1 << 22) is None
    assert "none fits" in scaling._row("gpt_27b", 1, None, None)


def test_rows_are_split_where_devices_outnumber_them():
    """512 rows on 4,096 devices: eight for each row, along `sequence` or `model`."""
    config = bench.config_of("gpt2_124m", "residual", {})
    meshes = set()
    for made in scaling.candidates(config, 4096, 1 << 19):
        train.check_mesh(made, costs.mesh_of(made))
        data, mesh = made.data, made.mesh
        assert data.batch * data.micro_batches * data.length == 1 << 19
        meshes.add((mesh.data, mesh.sequence, mesh.model))
    assert meshes == {(512, 8, 1), (512, 4, 2)}  # its six heads are no multiple of four
    chosen = scaling.best(config, 4096, 1 << 19)
    assert "| 512 x 8 x 1" in scaling._row("gpt2_124m", 4096, chosen, chosen)
    asked = {"mesh.sequence": 4}
    config = bench.config_of("gpt2_124m", "residual", asked)
    assert {c.mesh.sequence for c in scaling.candidates(config, 64, 1 << 19)} == {4}


# --------------------------------------------------------------------------------------------------
# On the devices that are there


def asked(*arguments):
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    return parser.parse_args(arguments)


def test_requests_and_their_configs():
    args = asked("--kinds", *scaling.KINDS, "--sharded-shape", "cpu_tiny")
    found = scaling.requests_of(args, [1, 2])
    assert len(found) == len(set(found)) == (2 + 1) + 1 + 3 * 2 + 2 + 3 * 2
    R, one = scaling.Request, bench.config_of("cpu_tiny", "mhc_n2", {}).data.batch
    made = {
        kind: scaling.config_for(R(kind, "cpu_tiny", "mhc_n2", 2), {}) for kind in scaling.KINDS
    }
    assert all(c.mesh.data == 2 for c in made.values())
    assert {kind: c.data.batch // one for kind, c in made.items() if kind != "resume"} == {
        "same": 1,
        "weak": 2,
        "strong": 1,
        "sharded": 2,
    }
    assert [k for k, c in made.items() if c.mesh.shard_params] == ["sharded"]
    assert made["same"].model.dtype == "float32"
    split = scaling.config_for(R("weak", "cpu_tiny", "mhc_n2", 4), {"mesh.model": 2})
    assert (split.mesh.data, split.mesh.model) == (2, 2)


def test_a_process_sees_its_own_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8")
    cpu = scaling._environment(2, 1, "cpu")
    assert cpu["JAX_PLATFORMS"] == "cpu"
    assert cpu["XLA_FLAGS"] == "--a=1 --xla_force_host_platform_device_count=1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert scaling._environment(2, 2, "gpu")["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert scaling._environment(1, 2, "gpu")["CUDA_VISIBLE_DEVICES"] == "5,6"


def timed(kind, devices, rate, **more):
    figures = {
        "tokens_per_second": rate,
        "step_ms": 100.0,
        "predicted_ms": 110.0,
        "mfu": 0.45,
        "device": "NVIDIA H200",
        "state_bytes": 10,
        "stated_state_bytes": 10,
        "share_of_state": 1 / devices,
    }
    return scaling.Request(kind, "s", "c", devices)._asdict() | figures | more


def alike(devices, losses, processes=1):
    request = scaling.Request("same", "s", "c", devices, processes)
    return request._asdict() | {"losses": losses, "device": "NVIDIA H200"}


@pytest.mark.parametrize(
    ("rows", "misses"),
    [
        ([timed("weak", 1, 100), timed("weak", 2, 191), timed("weak", 8, 737)], []),
        ([timed("weak", 1, 100), timed("weak", 2, 189)], ["0.945 of n times one, 0.95 wanted"]),
        ([timed("weak", 1, 100), timed("weak", 8, 735)], ["0.919 of n times one, 0.92 wanted"]),
        ([timed("weak", 1, 9, device="cpu"), timed("weak", 2, 9, device="cpu")], []),
        ([timed("strong", 1, 100), timed("strong", 2, 120)], []),
        ([timed("weak", 1, 100, predicted_ms=120.0)], ["predicted step +20.0% off"]),
        ([timed("weak", 1, 100, state_bytes=11)], ["11 bytes of state as stated"]),
        ([timed("sharded", 4, 100, share_of_state=0.27)], ["state +8.0% off 1/n of the whole"]),
        ([timed("sharded", 4, 100, mfu=0.39)], ["MFU 39.0%, 40 % wanted"]),
        ([alike(1, [1.0, 2.0]), alike(2, [1.0, 2.00009]), alike(2, [1.0, 2.0], 2)], []),
        ([alike(1, [1.0, 2.0]), alike(2, [1.0, 2.0002], 2)], ["losses differ by 2.0e-04"]),
        ([{**alike(2, []), "error": "ended with [-9]"}], ["ended with [-9]"]),
    ],
)
def test_verdicts(rows, misses):
    lines = scaling.judge(rows)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == len(misses)
    assert all(miss in line for miss, line in zip(misses, failed, strict=True))
    assert lines or len(rows) < 2


def test_verdict_of_a_resumed_run():
    row = scaling.Request("resume", "s", "c", 2)._asdict()
    good = row | {"last_losses": {"2 devices": 1.0, "1 device": 1.00001}}
    bad = row | {"last_losses": {"2 devices": 1.0, "1 device": 1.001}}
    assert [line[:4] for line in scaling.judge([good, bad])] == ["pass", "FAIL"]


def scale(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", "scale", *map(str, arguments)])
    return bench.main()


def test_time_that_is_up_and_a_call_that_goes_on(monkeypatch, tmp_path, capsys):
    """A row that would end too late is left; the next call makes it, and none of the others."""
    made, clock = [], [0.0]

    def run(request, args, platform):
        clock[0] += 50
        made.append(request)
        figures = timed(request.kind, request.devices, 100 * request.devices)
        return figures | request._asdict()

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(scaling.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(scaling, "_there", lambda forced: ("cpu", forced))
    out = tmp_path / "new" / "scale.json"
    call = ["--kinds", "weak", "--connections", "mhc_n2", "--devices", 1, 2, 4, "--out", out]
    assert scale(monkeypatch, *call, "--minutes", 2) == 1
    assert [r.devices for r in made] == [1, 2] and len(json.loads(out.read_text())) == 2
    assert "1 rows are left after 2 minutes" in capsys.readouterr().out
    assert scale(monkeypatch, *call, "--minutes", 2) == 0
    assert [r.devices for r in made] == [1, 2, 4] and len(json.loads(out.read_text())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", 4, "--host-devices", 2], "--devices 4: 2 are here"),
        (["--devices", 3, "--kinds", "strong"], "data.batch, 8, does not divide by mesh.data 3"),
        (["--shapes", "huge"], "unknown shape 'huge'"),
    ],
)
def test_what_cannot_be_scaled(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(scaling, "_there", lambda forced: ("cpu", forced))
    out = tmp_path / "scale.json"
    assert scale(monkeypatch, *arguments, "--out", out) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not out.exists()


@pytest.mark.slow
def test_rows_on_forced_devices(monkeypatch, tmp_path):
    """One and two devices, two processes, a resumed run: every verdict but speed is real."""
    monkeypatch.setitem(os.environ, "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    out = tmp_path / "scale.json"
    kinds = ["--kinds", "same", "resume", "weak", "sharded", "--sharded-shape", "cpu_tiny"]
    speed = ["--connections", "deepseek_v4", "--steps", 2, "--windows", 2, "--minutes", 20]
    assert scale(monkeypatch, *kinds, *speed, "--devices", 1, 2, "--out", out) == 0
    rows = json.loads(out.read_text())
    assert [r["kind"] for r in rows] == ["same"] * 3 + ["resume"] + ["weak"] * 2 + ["sharded"] * 2
    losses = [r["losses"] for r in rows[:3]]
    assert losses[0] != losses[1] and len(losses[0]) == 20 and losses[0][0] != losses[0][-1]
    assert rows[-1]["share_of_state"] < 0.51 < rows[-2]["share_of_state"]


def test_a_page_that_cannot_be_written_is_refused(monkeypatch, tmp_path, capsys):
    """One sentence that names the path, code 2, nothing written."""
    monkeypatch.setattr(scaling, "page", lambda: "text")
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "x.md"):
        monkeypatch.setattr("sys.argv", ["scaling", "page", "--out", str(path)])
        assert scaling.main() == 2
        told = capsys.readouterr().err
        assert told.startswith(f"experiments.scaling: --out {path} cannot be written (")
        assert told.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"
