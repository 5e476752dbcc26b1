"""Several processes are one: the same batches, losses and checkpoints as one process, and an end
that says why when one of them dies.

Two processes with four forced devices each stand for two hosts; gloo carries what NCCL would.
"""

import functools
import itertools
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mhcjax import checkpoint, runlog
from tests import process_worker
from tests.process_worker import TOKENS, config_of

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(process_worker.__file__)
STEPS = 20


# --------------------------------------------------------------------------------------------------
# Starting processes


@pytest.fixture
def devices(one_device_env):
    """devices(n): the environment of a process that sees n CPU devices."""

    def environment(count, **more):
        flags = f"{one_device_env['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
        return {**one_device_env, "XLA_FLAGS": flags, "PYTHONPATH": path, **more}

    return environment


def free_address():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def finish(started, timeout=240):
    """-> [(exit code, stdout, stderr)]"""
    try:
        return [(p.wait(timeout), p.out.read_text(), p.err.read_text()) for p in started]
    finally:
        for p in started:
            p.kill()


def start(command, environment, folder):
    """A process with its output in files `out` and `err`, so that nobody waits for a reader."""
    number = len(list(folder.iterdir()))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    with open(out, "w") as to_out, open(err, "w") as to_err:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=to_out, stderr=to_err
        )
    process.out, process.err = out, err
    return process


def work_in_two(folder, devices, jobs):
    """Two processes of four devices each do the jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "coordinator").write_text(free_address())
    environment = devices(4)
    log = folder / "output"
    log.mkdir()
    command = [sys.executable, str(WORKER), str(folder), "2"]
    started = [start([*command, str(i)], environment, log) for i in range(2)]
    for code, _, err in finish(started, 60 + 60 * len(jobs)):
        assert code == 0, err


def loaded(file):
    with np.load(file) as found:
        return dict(found)


@functools.cache
def alone(optimizer, dtype, mesh, micro_batches, layers):
    """The same job in this process, which has eight devices."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        process_worker.work(
            Path(folder),
            "alone",
            optimizer=optimizer,
            dtype=dtype,
            mesh=mesh,
            micro_batches=micro_batches,
            layers=layers,
            steps=STEPS,
        )
        return loaded(Path(folder) / "alone.npz")


def gap(found, wanted):
    """-> (largest relative difference of the losses, largest ||difference|| / ||leaf||)"""
    leaves = [n for n in wanted if n.startswith(("params", "opt_state")) and wanted[n].size]
    assert len(leaves) > 10 and found.keys() == wanted.keys()
    ratios = [
        np.linalg.norm(np.float64(found[n]) - wanted[n])
        / max(np.linalg.norm(np.float64(wanted[n])), 1e-30)
        for n in leaves
    ]
    return np.max(np.abs(found["losses"] / wanted["losses"] - 1)), max(ratios)


def batches_of(folder, name, config):
    """The batches as the devices of both processes hold them, and the rows that each read."""
    b, length, a = config.data.batch, config.data.length, config.data.micro_batches
    whole, read = np.full((STEPS, a, b, length + 1), -1, np.int32), []
    for process in range(2):
        found = loaded(folder / f"{name}-{process}.npz")
        read.append({row for start, stop in found.pop("read") for row in range(start, stop)})
        for key, shard in found.items():
            step, at = map(int, key.split("/"))
            whole[step, :, at : at + shard.shape[1]] = shard
    return whole, read


def wanted_batches(config):
    d = config.data
    shape = {"batch": d.batch, "length": d.length, "micro_batches": d.micro_batches}
    return np.stack(
        [
            process_worker.data.batch(TOKENS, seed=config.seed, step=step, **shape)
            for step in range(STEPS)
        ]
    )


# --------------------------------------------------------------------------------------------------
# Two processes = one

MESHES = [(8, 1, False), (8, 1, True), (4, 2, False), (4, 2, True), (2, 4, False), (2, 4, True)]
# Updates of SGD are linear in the gradient: sums in another order, 1e-6. Optimizers that divide by
# the gradient magnify rounding, so they are compared in float64.
KINDS = [("sgd", "float32", 1e-6), ("adamw", "float64", 1e-10), ("muon", "float64", 1e-10)]
MATRIX = list(itertools.product(KINDS, MESHES, (1, 4)))
QUICK = [(KINDS[0], (8, 1, False), 1), (KINDS[2], (4, 2, True), 4)]


def job(kind, mesh, micro_batches, **more):
    optimizer, dtype, _ = kind
    name = f"{optimizer}-{'x'.join(map(str, mesh[:2]))}-{mesh[2]}-{micro_batches}"
    settings = {"optimizer": optimizer, "dtype": dtype, "mesh": mesh, "steps": STEPS}
    return {"name": name, **settings, "micro_batches": micro_batches, **more}


@pytest.mark.parametrize(
    ("cases", "layers"),
    [(QUICK, 1), pytest.param(MATRIX, 2, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_two_processes_equal_one_and_one_device(tmp_path, devices, cases, layers):
    jobs = [job(*case, layers=layers) for case in cases]
    wrong = {**job(KINDS[0], MESHES[0], 1, layers=layers), "name": "wrong", "wrong_rows_of": 1}
    work_in_two(tmp_path, devices, [*jobs, wrong])
    for (kind, mesh, micro_batches), made in zip(cases, jobs, strict=True):
        optimizer, dtype, tolerance = kind
        config = config_of(optimizer, dtype, mesh, micro_batches, layers)
        found = loaded(tmp_path / f"{made['name']}.npz")
        batches, read = batches_of(tmp_path, made["name"], config)
        np.testing.assert_array_equal(batches, wanted_batches(config))
        assert read == [{0, 1, 2, 3}, {4, 5, 6, 7}]
        for one in (mesh, (1, 1, False)):
            wanted = alone(optimizer, dtype, one, micro_batches, layers)
            losses, leaves = gap(found, wanted)
            print(f"{made['name']} and {one}: losses {losses:.1e}, leaves {leaves:.1e}")
            assert losses <= tolerance and leaves <= tolerance

    # The control: process 1 reads the rows of process 0, and every one of these notices.
    config = config_of("sgd", "float32", MESHES[0], 1, layers)
    batches, read = batches_of(tmp_path, "wrong", config)
    assert (batches != wanted_batches(config)).any() and read == [{0, 1, 2, 3}] * 2
    wanted = alone("sgd", "float32", MESHES[0], 1, layers)
    losses, leaves = gap(loaded(tmp_path / "wrong.npz"), wanted)
    print(f"wrong rows: losses {losses:.1e}, leaves {leaves:.1e}")
    assert losses > 1e-4 and leaves > 1e-3


def test_rows_that_every_device_holds_are_read_once_in_each_process(tmp_path, devices):
    """A model axis over both processes."""
    code = (
        "import sys, numpy as np, jax\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "from mhcjax import processes, sharding\n"
        "processes.join(sys.argv[1], 2, int(sys.argv[2]))\n"
        "read, x = [], np.arange(16).reshape(8, 2)\n"
        "def rows(r):\n    read.append(r)\n    return x[r]\n"
        "spec = NamedSharding(sharding.make_mesh(1, 8), P('data', None))\n"
        "y = processes.place(x.shape, spec, rows)\n"
        "assert (processes.whole(y) == x).all() and len(read) == 1\n"
        "processes.leave()\n"
    )
    at = free_address()
    started = [
        start([sys.executable, "-c", code, at, str(i)], devices(4), tmp_path) for i in range(2)
    ]
    for status, _, err in finish(started):
        assert status == 0, err


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_of_two_processes_and_of_one_are_the_same_files(tmp_path, devices):
    """Written by one process and by two, sharded and not; restored to the last bit by the other,
    on one, four and eight devices."""
    settings = {"optimizer": "adamw", "layers": 1, "micro_batches": 1}
    process_worker.work(
        tmp_path, "one", **settings, mesh=(4, 2, True), steps=2, save=tmp_path / "of_one"
    )
    again = [(8, 1, False), (2, 4, True)]
    work_in_two(
        tmp_path,
        devices,
        [
            {"name": "two", **settings, "mesh": (4, 2, True), "steps": 2}
            | {"save": str(tmp_path / "of_two")},
            {"name": "whole", **settings, "mesh": (8, 1, False), "steps": 2}
            | {"save": str(tmp_path / "of_two_whole")},
            *(
                {"name": f"again{i}", **settings, "mesh": mesh, "steps": 0}
                | {"restore": str(tmp_path / "of_one")}
                for i, mesh in enumerate(again)
            ),
        ],
    )

    def same(state, wanted):
        assert state.keys() == {n for n in wanted if not n.startswith(("losses", "restored"))}
        assert len(state) > 20
        for name, leaf in state.items():
            assert leaf.dtype == wanted[name].dtype, name
            np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)

    one = loaded(tmp_path / "one.npz")
    for i in range(len(again)):
        back = loaded(tmp_path / f"again{i}.npz")
        same({k[len("restored/") :]: v for k, v in back.items() if k.startswith("restored/")}, one)
    for name, folder in (("two", "of_two"), ("whole", "of_two_whole")):
        wanted = loaded(tmp_path / f"{name}.npz")
        for mesh in ((1, 1, False), (4, 1, True), (2, 2, False), (4, 2, True), (8, 1, False)):
            program = process_worker.train.program(config_of("adamw", "float32", mesh, 1, 1))
            state, _ = checkpoint.restore(tmp_path / folder, program.abstract_state)
            assert jax.tree.leaves(state)[-1].sharding.mesh.size == mesh[0] * mesh[1]
            same(process_worker.leaves_of(state), wanted)


# --------------------------------------------------------------------------------------------------
# The command

SMALL = shlex.split(
    "--model.layers 1 --model.width 32 --model.heads 2 --model.vocab 257 --model.context 32 "
    "--data.corpus synthetic --data.tokenizer byte --data.batch 8 --data.length 32 "
    "--optim.warmup-steps 2 --eval-batches 2 --eval-every 1000 --sample-every 0 --save-every 5 "
    "--log-every 1"
)


class Pair:
    """`mhcjax train` in two processes, in a folder of their own for what they print."""

    def __init__(self, folder, environment, *more, heartbeat=10, count=2):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mhcjax", "train", *SMALL, *more]
        command += ["--coordinator", free_address(), "--processes", str(count)]
        command += ["--heartbeat", str(heartbeat)]
        self.started = [
            start([*command, "--process", str(i)], environment, folder) for i in range(count)
        ]

    def finish(self):
        return finish(self.started)

    def succeed(self):
        for code, _, err in self.finish():
            assert code == 0, err


def losses_of(run):
    return {row["step"]: row["loss"] for row in runlog.read_rows(run, "train")}


def fingerprint(run):
    return checkpoint.describe(run)["state_fingerprint"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(devices) -> (run, seconds that it took from the start of the processes)"""
    made = {}

    def make(devices, total):
        if total not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            began = time.monotonic()
            more = ["--run", str(folder / "run"), "--total-steps", str(total)]
            Pair(folder / "output", devices(4), *more).succeed()
            made[total] = folder / "run", time.monotonic() - began
        return made[total]

    return make


def one_line(err):
    """The line by which a process says why it ends, among what the runtime prints."""
    (line,) = (line for line in err.splitlines() if line.startswith("mhcjax: "))
    return line


def killed(folder, devices, victim, *, total, after, heartbeat=10):
    """Kill one of two processes when `after` says so; -> seconds until the other had ended."""
    run = folder / "run"
    more = ["--run", str(run), "--total-steps", str(total)]
    pair = Pair(folder / "killed", devices(4), *more, heartbeat=heartbeat)
    after(run)
    alive = pair.started[1 - victim].poll() is None
    pair.started[victim].kill()
    began = time.monotonic()
    code = pair.started[1 - victim].wait(90)
    seconds = time.monotonic() - began
    results = pair.finish()
    if alive and results[victim][0] == -signal.SIGKILL:
        assert code in (3, 2, -signal.SIGABRT), results[1 - victim]
        line = one_line(results[1 - victim][2])
        # Before they had joined, the other one knows an address only.
        assert (f"process {victim} (" in line and "is gone" in line) or code == 2, line
    assert seconds < 60
    Pair(folder / "resumed", devices(4), *more).succeed()
    return seconds


def updates(least):
    """Wait until the run has logged that many."""

    def wait(run):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if len(runlog.read_rows(run, "train")) >= least:
                    return
            except ValueError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"{run} did not come to {least} updates")

    return wait


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(
    tmp_path, devices, uninterrupted, victim
):
    total = 40
    wanted, _ = uninterrupted(devices, total)
    seconds = killed(tmp_path, devices, victim, total=total, after=updates(13 + victim))
    print(f"process {victim} killed: the other ended {seconds:.1f} s later")
    assert fingerprint(tmp_path / "run") == fingerprint(wanted)
    assert losses_of(tmp_path / "run") == losses_of(wanted)
    # One writer: each update has one row, also where it was made twice.
    rows = [row["step"] for row in runlog.read_rows(tmp_path / "run", "train")]
    assert rows == list(range(1, total + 1))


@pytest.mark.slow
def test_twenty_random_moments(tmp_path, devices, uninterrupted):
    """From before they have joined to the last save. The moments are drawn afresh each time; a
    failure prints the seed."""
    total, seed = 60, random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    wanted, took = uninterrupted(devices, total)
    for trial in range(20):
        victim, moment = trial % 2, draw.uniform(0, took)
        folder = tmp_path / str(trial)
        # A few with the heartbeat that users get.
        heartbeat = 30 if trial % 7 == 1 else 10
        seconds = killed(
            folder,
            devices,
            victim,
            total=total,
            after=lambda run, moment=moment: time.sleep(moment),
            heartbeat=heartbeat,
        )
        print(
            f"trial {trial}: process {victim} killed after {moment:.2f} s of {took:.1f}, "
            f"heartbeat {heartbeat}: the other ended after {seconds:.1f} s",
            flush=True,
        )
        assert fingerprint(folder / "run") == fingerprint(wanted)


def test_resume_auto_goes_on_with_other_processes_and_devices(tmp_path, devices, uninterrupted):
    """Ten updates by two processes, ten by one with four devices on another mesh, the rest by two
    with two devices each and everything sharded: the losses of the uninterrupted run, in float32
    but for sums in another order (1e-5 after 40 updates of Muon, which magnifies them)."""
    total = 40
    wanted, _ = uninterrupted(devices, total)
    run = ["--run", str(tmp_path / "run"), "--optim.schedule", "wsd", "--schedule-steps", "40"]
    Pair(tmp_path / "a", devices(4), *run, "--total-steps", "10").succeed()
    first = losses_of(tmp_path / "run")
    assert first == {n: loss for n, loss in losses_of(wanted).items() if n <= 10}
    mesh = ["--mesh.data", "2", "--mesh.model", "2"]
    Pair(tmp_path / "b", devices(4), *run, "--total-steps", "20", *mesh, count=1).succeed()
    mesh = ["--mesh.data", "4", "--mesh.model", "1", "--mesh.shard-params", "true"]
    Pair(tmp_path / "c", devices(2), *run, "--total-steps", "40", *mesh).succeed()
    found, wanted_losses = losses_of(tmp_path / "run"), losses_of(wanted)
    assert found.keys() == wanted_losses.keys()
    worst = max(abs(found[n] / wanted_losses[n] - 1) for n in found)
    print(f"largest relative difference {worst:.1e}")
    assert worst <= 1e-5
