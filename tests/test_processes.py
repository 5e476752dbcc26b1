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
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mhcjax import checkpoint, cluster, runlog
from tests import process_worker
from tests.conftest import HOST_DEVICES
from tests.process_worker import TOKENS, config_of

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(process_worker.__file__)
STEPS = 20


# --------------------------------------------------------------------------------------------------
# Starting processes


def devices(count, **more):
    """The environment of a process that sees so many CPU devices."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if not f.startswith(HOST_DEVICES)]
    flags.append(f"{HOST_DEVICES}={count}")
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": path, **more}


def free_address():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def free_port(port):
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) != 0


def finish(started, timeout=240):
    """-> [(exit code, stdout, stderr)]"""
    try:
        return [(p.wait(timeout), p.out.read_text(), p.err.read_text()) for p in started]
    finally:
        for p in started:
            p.kill()


def start(command, environment, folder, at=None):
    """A process with its output in files `out` and `err`, so that nobody waits for a reader."""
    number = len(list(folder.iterdir()))
    out, err = folder / f"{number}.out", folder / f"{number}.err"
    with open(out, "w") as to_out, open(err, "w") as to_err:
        process = subprocess.Popen(
            command, env=environment, cwd=at or folder, stdout=to_out, stderr=to_err
        )
    process.out, process.err = out, err
    return process


def work_in_two(folder, jobs):
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
def alone(optimizer, dtype, mesh, micro_batches):
    """The same job in this process, which has eight devices."""
    with tempfile.TemporaryDirectory() as folder:
        process_worker.work(
            Path(folder),
            "alone",
            optimizer=optimizer,
            dtype=dtype,
            mesh=mesh,
            micro_batches=micro_batches,
            steps=STEPS,
        )
        return loaded(Path(folder) / "alone.npz")


def gap(found, wanted):
    """-> (largest relative difference of the losses, largest ||difference|| / ||leaf||)"""
    leaves = [n for n in wanted if n.startswith(("after/params", "after/opt_state"))]
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
# (optimizer, dtype, tolerance of losses and leaves, relative). Updates of SGD are linear in the
# gradient: sums in another order. Optimizers that divide by the gradient magnify rounding, so they
# are compared in float64.
KINDS = [("sgd", "float32", 1e-6), ("adamw", "float64", 1e-10), ("muon", "float64", 1e-10)]
MATRIX = list(itertools.product(KINDS, MESHES, (1, 4)))
QUICK = (KINDS[1], (4, 2, True), 4)
# With `sequence` as the last: across both processes, and within each.
PIECES = [(KINDS[1], (1, 1, False, 8), 4), (KINDS[1], (2, 1, True, 4), 1)]


def job(kind, mesh, micro_batches, **more):
    optimizer, dtype, _ = kind
    name = f"{optimizer}-{'x'.join(map(str, mesh))}-{micro_batches}"
    settings = {"optimizer": optimizer, "dtype": dtype, "mesh": mesh, "steps": STEPS}
    return {"name": name, **settings, "micro_batches": micro_batches, **more}


WRONG = {**job(*QUICK), "name": "wrong", "wrong_rows_of": 1}
SAVED = {"optimizer": "adamw", "mesh": (4, 2, True)}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of all jobs that are not slow, done by one pair of processes."""
    folder = tmp_path_factory.mktemp("short")
    process_worker.work(folder, "one", **SAVED, steps=2, save=folder / "of_one")
    two = {"name": "two", **SAVED, "steps": 2, "save": str(folder / "of_two")}
    back = {"name": "back", **SAVED, "steps": 0, "restore": str(folder / "of_one")}
    back["mesh"] = (2, 4, False)
    work_in_two(folder, [job(*QUICK), WRONG, two, back])
    return folder


def check_equal(folder, cases):
    """The jobs of two processes in `folder` against one process with eight devices and with one."""
    for kind, mesh, micro_batches in cases:
        optimizer, dtype, tolerance = kind
        config = config_of(optimizer, dtype, mesh, micro_batches)
        name = job(kind, mesh, micro_batches)["name"]
        found = loaded(folder / f"{name}.npz")
        batches, read = batches_of(folder, name, config)
        np.testing.assert_array_equal(batches, wanted_batches(config))
        assert read == ([set(range(8))] * 2 if mesh[0] == 1 else [{0, 1, 2, 3}, {4, 5, 6, 7}])
        for one in (mesh, (1, 1, False)):
            wanted = alone(optimizer, dtype, one, micro_batches)
            losses, leaves = gap(found, wanted)
            print(f"{name} and {one}: losses {losses:.1e}, leaves {leaves:.1e}")
            assert losses <= tolerance and leaves <= tolerance

    # The control: process 1 reads the rows of process 0, and every one of these notices.
    (optimizer, dtype, _), mesh, micro_batches = QUICK
    config = config_of(optimizer, dtype, mesh, micro_batches)
    batches, read = batches_of(folder, "wrong", config)
    assert (batches != wanted_batches(config)).any() and read == [{0, 1, 2, 3}] * 2
    losses, leaves = gap(loaded(folder / "wrong.npz"), alone(optimizer, dtype, mesh, micro_batches))
    print(f"wrong rows: losses {losses:.1e}, leaves {leaves:.1e}")
    assert losses > 1e-4 and leaves > 1e-3


def test_two_processes_equal_one_and_one_device(short):
    check_equal(short, [QUICK])


@pytest.mark.slow
def test_two_processes_equal_one_on_every_mesh(tmp_path):
    work_in_two(tmp_path, [*(job(*case) for case in MATRIX), WRONG])
    check_equal(tmp_path, MATRIX)


@pytest.mark.slow
def test_two_processes_equal_one_with_pieces_of_rows(tmp_path):
    """Two that share the rows each read them whole, once."""
    work_in_two(tmp_path, [*(job(*case) for case in PIECES), WRONG])
    check_equal(tmp_path, PIECES)


def test_rows_that_every_device_holds_are_read_once_in_each_process(tmp_path):
    """A model axis over both processes."""
    code = (
        "import sys, numpy as np, jax\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "from mhcjax import cluster, processes, sharding\n"
        "cluster.join(sys.argv[1], 2, int(sys.argv[2]))\n"
        "read, x = [], np.arange(16).reshape(8, 2)\n"
        "def rows(r):\n    read.append(r)\n    return x[r]\n"
        "spec = NamedSharding(sharding.make_mesh(1, 8), P('data', None))\n"
        "y = processes.place(x.shape, spec, rows)\n"
        "assert (processes.whole(y) == x).all() and len(read) == 1\n"
        "cluster.leave()\n"
    )
    at = free_address()
    started = [
        start([sys.executable, "-c", code, at, str(i)], devices(4), tmp_path) for i in range(2)
    ]
    for status, _, err in finish(started):
        assert status == 0, err


# --------------------------------------------------------------------------------------------------
# Checkpoints


def same(state, wanted):
    """Two states, {path: leaf}, to the last bit."""
    assert state.keys() == wanted.keys() and len(state) > 20
    for name, leaf in state.items():
        assert leaf.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def states(file):
    """The states before and after a job, as {path: leaf}."""
    found = loaded(file)
    return (
        {n.removeprefix(when): leaf for n, leaf in found.items() if n.startswith(when)}
        for when in ("before/", "after/")
    )


@pytest.mark.parametrize(
    "mesh",
    [(1, 1, False), (4, 1, True), (4, 2, False)]
    + [
        pytest.param(m, marks=pytest.mark.slow) for m in ((2, 2, False), (8, 1, True), (2, 4, True))
    ],
)
def test_a_checkpoint_of_two_processes_in_one(short, mesh):
    """Written sharded over 4 x 2 by two processes; read by one, on one, four and eight devices."""
    program = process_worker.train.program(config_of("adamw", "float32", mesh, 1))
    state, _ = checkpoint.restore(short / "of_two", program.abstract_state)
    assert jax.tree.leaves(state)[-1].sharding.mesh.size == mesh[0] * mesh[1]
    began, wanted = states(short / "two.npz")
    assert (began["params.embedding"] != wanted["params.embedding"]).any()
    same(process_worker.leaves_of(state), wanted)


def test_a_checkpoint_of_one_process_in_two(short):
    found, _ = states(short / "back.npz")
    _, wanted = states(short / "one.npz")
    same(found, wanted)


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
    """uninterrupted(total) -> (run, seconds that it took from the start of the processes)"""

    @functools.cache
    def make(total):
        folder = tmp_path_factory.mktemp("uninterrupted")
        began = time.monotonic()
        more = ["--run", str(folder / "run"), "--total-steps", str(total)]
        Pair(folder / "output", devices(4), *more).succeed()
        return folder / "run", time.monotonic() - began

    return make


def one_line(err):
    """The line by which a process says why it ends, among what the runtime prints."""
    (line,) = (line for line in err.splitlines() if line.startswith("mhcjax: "))
    return line


def killed(folder, victim, *, total, after, heartbeat=10):
    """Kill one of two processes when `after` says so; -> seconds until the other had ended."""
    run = folder / "run"
    more = ["--run", str(run), "--total-steps", str(total)]
    pair = Pair(folder / "killed", devices(4), *more, heartbeat=heartbeat)
    after(run)
    pair.started[victim].kill()
    began = time.monotonic()
    other = pair.started[1 - victim]
    code = other.wait(90)
    # Aborted by JAX or gloo it cannot speak; its witness does, who hears of it a moment later.
    while code == -signal.SIGABRT and time.monotonic() < began + 60:
        if "mhcjax: " in other.err.read_text():
            break
        time.sleep(0.05)
    seconds = time.monotonic() - began
    results = pair.finish()
    if code == 0:  # the victim was on its way out: both had come to the end of the run
        each_update_once(run)
    else:
        assert results[victim][0] == -signal.SIGKILL
        assert code in (3, 2, -signal.SIGABRT), results[1 - victim]
        line = one_line(results[1 - victim][2])
        # Before they had joined, the other one knows an address only.
        early = code == 2 or "another one is gone before all had joined" in line
        assert early or (f"process {victim} (" in line and "is gone" in line), line
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


TOTAL = 30  # updates of the runs that are killed and go on


def went_on(run, uninterrupted):
    """The killed run came to the same end, bit for bit."""
    wanted, _ = uninterrupted(TOTAL)
    assert fingerprint(run) == fingerprint(wanted)
    assert losses_of(run) == losses_of(wanted)
    each_update_once(run)


def each_update_once(run):
    """One writer: each update has one row, also if it was made twice."""
    rows = [row["step"] for row in runlog.read_rows(run, "train")]
    assert rows == list(range(1, TOTAL + 1))
    assert json.loads((run / "summary.json").read_text())["status"] == "done"


# What Slurm would do: two tasks on two nodes, which are this machine; the highest exit code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun.flags; shift; done
export SLURM_STEP_NODELIST='localhost' SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" 2> err.$i & pids[$i]=$!; done
code=0
for pid in ${pids[@]}; do wait $pid; c=$?; [ $c -gt $code ] && code=$c; done
exit $code
"""
MHCJAX = f"""#!/bin/bash
echo $$ > pid.$SLURM_PROCID
exec {shlex.quote(sys.executable)} -m mhcjax "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" > scontrol.called
"""


def printed_script():
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    return text.partition("```bash\n")[2].partition("```")[0]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_printed_slurm_script(tmp_path, victim):
    """As printed, started twice: a process of the first start is killed, the script queues itself
    again, the second start goes on from the last checkpoint, to the end."""
    (tmp_path / "train.sbatch").write_text(printed_script())
    for name, text in (("srun", SRUN), ("mhcjax", MHCJAX), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    # JAX takes port 61440 + number of the job modulo 4096.
    job = next(n for n in range(os.getpid(), os.getpid() + 99) if free_port(61440 + n % 4096))
    environment = devices(4, SLURM_JOB_ID=str(job))
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    script = ["bash", "train.sbatch", *SMALL, "--run", "runs/long", "--total-steps", str(TOTAL)]
    script += ["--heartbeat", "6"]
    output = tmp_path / "output"
    output.mkdir()

    first = start(script, environment, output, at=tmp_path)
    run = tmp_path / "runs" / "long"
    updates(13)(run)
    os.kill(int((tmp_path / f"pid.{victim}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    code = first.wait(90)
    seconds = time.monotonic() - began
    print(f"process {victim} killed: the script ended {seconds:.1f} s later with {code}")
    assert code == 128 + signal.SIGKILL and seconds < 60
    assert f"process {victim} (" in one_line((tmp_path / f"err.{1 - victim}").read_text())
    assert (tmp_path / "scontrol.called").read_text() == f"requeue {job}\n"
    assert json.loads((run / "run.json").read_text())["versions"]["devices"] == 8

    (tmp_path / "scontrol.called").unlink()
    ((code, out, _),) = finish([start(script, environment, output, at=tmp_path)])
    assert code == 0 and f"going on from {run.relative_to(tmp_path)}/checkpoints/" in out
    assert not (tmp_path / "scontrol.called").exists()
    each_update_once(run)


JOINED = """
import socket, sys, time
from mhcjax import cluster
socket.gethostname = lambda: sys.argv[4]
cluster.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), heartbeat=5)
print("joined", flush=True)
time.sleep(60)
"""
NOWHERE = "nowhere.invalid"


@pytest.mark.parametrize(
    ("names", "killed", "aborted", "named"),
    [
        (["localhost"] * 2, 0, [1], {1: 0}),
        (["localhost"] * 2, 1, [0], {0: 1}),
        (["localhost"] * 3, 0, [1, 2], {1: 0, 2: 0}),
        # Nobody is gone, or nobody of that name was ever reached: nobody is named.
        (["localhost"] * 2, None, [1], {1: None}),
        (["localhost", NOWHERE], 1, [0], {0: None}),
        (["localhost", "localhost", NOWHERE], 1, [0], {0: 1}),
    ],
)
def test_a_process_that_the_runtime_aborts_says_why(tmp_path, names, killed, aborted, named):
    """JAX aborts those whose process 0 is dead, gloo one, process 0 too, to which a dead one owes a
    message. The line is the witness's."""
    command = [sys.executable, "-c", JOINED, free_address(), str(len(names))]
    started = [
        start([*command, str(p), name], devices(1), tmp_path) for p, name in enumerate(names)
    ]
    end = time.monotonic() + 60
    while not all("joined" in p.out.read_text() for p in started):
        assert time.monotonic() < end, [p.err.read_text() for p in started]
        time.sleep(0.1)
    time.sleep(1)  # the witness has knocked for the first time
    if killed is not None:
        started[killed].kill()
        started[killed].wait()
    for process in aborted:
        started[process].send_signal(signal.SIGABRT)
    for process in aborted:
        while "mhcjax: " not in started[process].err.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
    for process in started:
        process.kill()
    for process, gone in named.items():
        assert started[process].wait(60) == -signal.SIGABRT
        line = one_line(started[process].err.read_text())
        me = f"mhcjax: process {process} of {len(names)} ({names[process]})"
        if gone is None:
            assert line.startswith(f"{me} was killed, or aborted")
        else:
            assert line.startswith(f"{me} ends: process {gone} ({names[gone]}) is gone;"), line


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path, uninterrupted, victim):
    """By the flags, with the heartbeat that users get."""
    seconds = killed(tmp_path, victim, total=TOTAL, after=updates(13 + victim), heartbeat=30)
    print(f"process {victim} killed: the other ended {seconds:.1f} s later")
    went_on(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_twenty_random_moments(tmp_path, uninterrupted):
    """From before they have joined to the last save. The moments are drawn afresh each time; a
    failure prints the seed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    _, took = uninterrupted(TOTAL)
    for trial in range(20):
        victim, moment = trial % 2, draw.uniform(0, took)
        folder = tmp_path / str(trial)
        # A few with the heartbeat that users get.
        heartbeat = 30 if trial % 7 == 1 else 10
        seconds = killed(
            folder,
            victim,
            total=TOTAL,
            after=lambda run, moment=moment: time.sleep(moment),
            heartbeat=heartbeat,
        )
        print(
            f"trial {trial}: process {victim} killed after {moment:.2f} s of {took:.1f}, "
            f"heartbeat {heartbeat}: the other ended after {seconds:.1f} s",
            flush=True,
        )
        went_on(folder / "run", uninterrupted)


@pytest.mark.slow
def test_resume_auto_goes_on_with_other_processes_and_devices(tmp_path, uninterrupted):
    """Ten updates by two processes, ten by one with four devices on another mesh, ten by two with
    two devices each and everything sharded: the losses of the uninterrupted run, in float32
    but for sums in another order (1e-5 after 30 updates of Muon, which magnifies them)."""
    wanted, _ = uninterrupted(TOTAL)
    run = ["--run", str(tmp_path / "run"), "--schedule-steps", str(TOTAL)]
    Pair(tmp_path / "a", devices(4), *run, "--total-steps", "10").succeed()
    first = losses_of(tmp_path / "run")
    assert first == {n: loss for n, loss in losses_of(wanted).items() if n <= 10}
    mesh = ["--mesh.data", "2", "--mesh.model", "2"]
    Pair(tmp_path / "b", devices(4), *run, "--total-steps", "20", *mesh, count=1).succeed()
    mesh = ["--mesh.data", "4", "--mesh.model", "1", "--mesh.shard-params", "true"]
    Pair(tmp_path / "c", devices(2), *run, "--total-steps", str(TOTAL), *mesh).succeed()
    found, wanted_losses = losses_of(tmp_path / "run"), losses_of(wanted)
    assert found.keys() == wanted_losses.keys()
    worst = max(abs(found[n] / wanted_losses[n] - 1) for n in found)
    print(f"largest relative difference {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.slow
def test_ctrl_c_of_one_process_stops_both_with_a_checkpoint(tmp_path):
    pair = Pair(tmp_path / "output", devices(4), "--run", str(tmp_path / "run"))
    updates(7)(tmp_path / "run")
    pair.started[1].send_signal(signal.SIGINT)
    (first, out, err), (second, quiet, _) = pair.finish()
    assert (first, second) == (130, 130), err
    made = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert made["status"] == "stopped" and f"after {made['updates']} updates" in out
    assert checkpoint.find(tmp_path / "run").name == str(made["updates"])
    assert "step" not in quiet


# --------------------------------------------------------------------------------------------------
# Finding each other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "--processes and --process want --coordinator HOST:PORT of process 0"),
        (("host", 2, 1), "--coordinator is 'host': give HOST:PORT, or auto"),
        (("host:0", 2, 1), "--coordinator is 'host:0': give HOST:PORT, or auto"),
        (("host:80a", 2, 1), "--coordinator is 'host:80a': give HOST:PORT, or auto"),
        (("host:80", 0, 0), "--processes is 0: give at least 1"),
        (("auto", None, None, 1), "--heartbeat is 1: give at least 5 seconds"),
        (("host:80", 2, 2), "--process is 2: give 0 to 1"),
        (("host:80", 2, -1), "--process is -1: give 0 to 1"),
        (("host:80", None, -1), "--process is -1: give 0 or more"),
    ],
)
def test_flags_that_cannot_be(given, message):
    with pytest.raises(ValueError) as error:
        cluster.join(*given[:3], heartbeat=given[3] if given[3:] else 30)
    assert str(error.value) == message


def test_a_port_that_is_taken():
    """By whatever listens there: two runs must not join each other."""
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{address} is taken .*: give another"):
            cluster.join(address, 2, 0)


LONELY = (
    "import sys\nfrom mhcjax import cluster\n"
    "cluster.join(sys.argv[1], 2, int(sys.argv[2]), patience=2)\n"
)


@pytest.mark.parametrize(
    ("index", "what"),
    [(0, "not all processes came to {}"), (1, "no coordinator at {}")],
    ids=["no other process", "no coordinator"],
)
def test_who_finds_nobody_says_so(tmp_path, index, what):
    at = free_address()
    began = time.monotonic()
    started = start([sys.executable, "-c", LONELY, at, str(index)], devices(1), tmp_path)
    ((code, _, err),) = finish([started])
    assert code == 2 and time.monotonic() - began < 20
    assert one_line(err).startswith(f"mhcjax: process {index}: {what.format(at)} within 2 s: start")


@pytest.mark.slow
def test_the_command_says_so_within_a_minute(tmp_path):
    began = time.monotonic()
    pair = Pair(tmp_path / "output", devices(4), "--run", str(tmp_path / "run"))
    pair.started[0].kill()
    pair.started[0].wait()
    (_, (code, _, err)) = pair.finish()
    seconds = time.monotonic() - began
    print(f"exit code {code} after {seconds:.1f} s: {one_line(err)}")
    assert code == 2 and "no coordinator at localhost:" in one_line(err) and seconds < 60
    assert not (tmp_path / "run").exists()


def test_a_launcher_whose_coordinator_jax_does_not_find(tmp_path):
    """Open MPI 5 sets no variable that JAX reads: two runs of one process must not start."""
    command = [sys.executable, "-m", "mhcjax", "train", "--run", "run"]
    environment = devices(1, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
    ((code, _, err),) = finish([start(command, environment, tmp_path)])
    (line,) = err.splitlines()
    assert code == 2 and not (tmp_path / "run").exists()
    assert "OMPI_COMM_WORLD_SIZE=2" in line and "give --coordinator HOST:PORT, --processes" in line


@pytest.mark.slow
def test_the_environment_of_open_mpi_4_is_enough(tmp_path):
    """As mpirun sets it: JAX takes host and port from the address of the launcher."""
    job = next(n for n in range(os.getpid(), os.getpid() + 99) if free_port(61440 + n % 4096))
    code = (
        "from mhcjax import cluster, processes\n"
        "cluster.join()\nprint(*processes.gather(processes.leads()))\ncluster.leave()\n"
    )
    started = [
        start(
            [sys.executable, "-c", code],
            devices(
                4,
                OMPI_MCA_orte_hnp_uri=f"{job * 4096}.0;tcp://127.0.0.1:34911",
                OMPI_COMM_WORLD_SIZE="2",
                OMPI_COMM_WORLD_LOCAL_SIZE="2",
                OMPI_COMM_WORLD_RANK=str(i),
                OMPI_COMM_WORLD_LOCAL_RANK=str(i),
            ),
            tmp_path,
        )
        for i in range(2)
    ]
    for status, out, err in finish(started):
        assert status == 0, err
        assert "True False" in out


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script, before srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]"}, "SLURM_NTASKS=8"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETION_INDEX=0",
        ),
    ],
)
def test_what_a_launcher_announces(environment, word):
    assert cluster.announced(environment) == word


@pytest.mark.parametrize(
    ("environment", "one"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),8"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        ({}, False),
    ],
)
def test_who_has_a_node_to_itself_takes_all_its_devices(environment, one):
    assert cluster._one_per_node(environment) == one
