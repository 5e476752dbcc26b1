"""The processes of a cluster: find each other, keep watch, part.

JAX does the work: `jax.distributed` reads the launcher's environment, joins the processes and hears
their heartbeats. What is added is a line that names whoever is missing, and an end in its place.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from mhcjax.processes import gather, leads, several

__all__ = ["announced", "join", "leave", "verdict"]

PATIENCE = 50.0  # seconds to find each other: a minute with what comes before
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
LOST = 3  # exit code of a process that ends because another one is gone

_left = threading.Event()  # the run is over: whoever goes now is not lost
_threads: list[threading.Thread] = []
_witness: list[subprocess.Popen] = []


def announced(environment: Mapping[str, str]) -> str | None:
    """The variable by which a launcher says that it started several processes, None without one.

    >>> announced({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"})
    'SLURM_NTASKS=2'
    >>> announced({"SLURM_NTASKS": "2"})  # a batch script, before srun

    An indexed Job of Kubernetes does not say how many, so that its index is enough.
    """
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}"
    counts = ["OMPI_COMM_WORLD_SIZE"]
    if "SLURM_STEP_NODELIST" in environment:
        counts.insert(0, "SLURM_NTASKS")
    for name in counts:
        if environment.get(name, "1") != "1":
            return f"{name}={environment[name]}"
    return None


def _one_per_node(environment: Mapping[str, str]) -> bool:
    """Does the launcher say that each node has one process? It then takes every device there is;
    otherwise JAX gives each process the one whose number is the process's own on its node."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return bool(re.fullmatch(r"1(\(x\d+\))?", tasks)) or (
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
    patience: float = PATIENCE,
) -> None:
    """Join the other processes of the run, before anything else touches a device.

    `coordinator` is HOST:PORT of process 0. Without it, or where `processes` and `process` are
    missing, JAX reads what is missing from the environment (Slurm, Open MPI, Kubernetes, TPU);
    "auto" tells it to, and without a launcher's word (`announced`) one process runs alone. A
    process that is silent for `heartbeat` seconds counts as dead: the others then end with one line
    and exit code 3.

    >>> join()  # alone

    Raises ValueError, one sentence, for an address or a number that cannot be. Where the others do
    not come within `patience` seconds: one line, exit code 2.
    """
    word = announced(os.environ)
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("--processes and --process want --coordinator HOST:PORT of process 0")
        if word is None:
            return
        coordinator = "auto"
    if heartbeat < 5:
        raise ValueError(f"--heartbeat is {heartbeat}: give at least 5 seconds")
    explicit = coordinator != "auto"
    if explicit:
        _check(coordinator, processes, process)
    # Heartbeats that are missed reach `_watch`, not JAX's own end by abort.
    jax.config.update("jax_enable_recoverability", True)
    # Its handler of SIGTERM stands in the way of the loop's own.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(
        patience, _late, [coordinator if explicit else None, process, word, patience]
    )
    late.daemon = True
    late.start()
    _last_words(
        f"process {'?' if process is None else process} was refused by the others: compare the "
        "--coordinator, --processes and --process of all"
    )
    try:
        jax.distributed.initialize(
            coordinator if explicit else None,
            processes,
            process,
            # An empty list: all that are here.
            local_device_ids=[]
            if None not in (processes, process) or _one_per_node(os.environ)
            else None,
            initialization_timeout=2 * math.ceil(patience),
            heartbeat_timeout_seconds=heartbeat,
        )
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        late.cancel()
        _dismiss()
        found = f" ({word})" if word else ""
        raise ValueError(
            f"JAX cannot join the processes from the environment{found}: "
            f"{' '.join(str(error).split())[:200]}: give --coordinator HOST:PORT, --processes and "
            "--process"
        ) from error
    try:
        # A port that answers as long as this process lives; nobody ever speaks on it.
        sign = socket.create_server(("", 0))
        hosts = gather([socket.gethostname(), sign.getsockname()[1]])
    except RuntimeError:
        me = f"process {jax.process_index()} of {jax.process_count()}"
        _end(LOST, f"{me} ends: another one is gone before all had joined; {_REMEDY}")
    late.cancel()
    if several():
        leader = coordinator.rsplit(":", 1)[0] if explicit else hosts[0][0]
        _keep_watch([name for name, _ in hosts], leader, [port for _, port in hosts], sign)
    else:
        _dismiss()


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator is {coordinator!r}: give HOST:PORT, or auto")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}: give at least 1")
    if process is not None and not 0 <= process < (processes or math.inf):
        fits = f"0 to {processes - 1}" if processes else "0 or more"
        raise ValueError(f"--process is {process}: give {fits}")
    if process == 0:
        # Two servers of gRPC can share a port: the processes of two runs would join each other.
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"port {port} of --coordinator {coordinator} is taken ({error.strerror}): give "
                "another"
            ) from None


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _late(
    coordinator: str | None, process: int | None, word: str | None, patience: float
) -> NoReturn:
    where = coordinator or f"the address that JAX reads from the environment ({word})"
    host, _, port = (coordinator or ":0").rpartition(":")
    if process == 0 or (coordinator and _answers(host, int(port))):
        what = f"not all processes came to {where} within {patience:.0f} s: start the others too"
    else:
        what = f"no coordinator at {where} within {patience:.0f} s: start process 0 there"
    _end(2, f"process {'?' if process is None else process}: {what}, or correct --coordinator")


def _end(code: int, line: str) -> NoReturn:
    _dismiss()
    sys.stdout.flush()
    print(f"mhcjax: {line}", file=sys.stderr, flush=True)
    os._exit(code)  # the main thread may be inside a collective that never ends


# --------------------------------------------------------------------------------------------------
# Keep watch

# The runtime may abort a process in C++: JAX at once when process 0, and with it the coordination
# service, is gone, or when the processes do not fit together, gloo when a message of a dead process
# is missing. So a small child of each holds the other end of a pipe, and when that ends it says the
# last words it was given, or which of the others answer no more. Only those prove something that it
# had reached before; and the death of process 0 ends all, so that it is named alone.
_WITNESS = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def answers(other):
    try:
        socket.create_connection(other[1:], 5).close()
        return True
    except OSError:
        return False
def sorted_out(others, wanted):
    with ThreadPoolExecutor(64) as pool:
        found = pool.map(answers, others)
        return [other for other, here in zip(others, found) if here == wanted]
said = None
for line in sys.stdin:
    said = json.loads(line)
    reached = sorted_out(said["others"], True) if said else []
if said:
    gone = [name for name, *_ in sorted_out(reached, False)]
    if gone and gone[0].startswith("0 "):
        gone = gone[:1]
    line = said["ends"][len(gone) > 1].replace("GONE", ", ".join(gone)) if gone else said["words"]
    print("mhcjax:", line, file=sys.stderr, flush=True)
"""
_KNOWN = 32  # others that a witness knows, besides process 0: all of thousands would be too many


def _last_words(words: str, me: str = "", others: Sequence[tuple[str, str, int]] = ()) -> None:
    """What the witness says if this process ends without a word: `words`, or which of the others
    (name, host, port) no longer answer."""
    if not _witness:
        # A session of its own: Ctrl-C is not for it.
        command = [sys.executable, "-ISc", _WITNESS]
        _witness.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        )
        atexit.register(leave, together=False)  # an exit in order needs no last words
    pipe = _witness[0].stdin
    with contextlib.suppress(OSError):
        if pipe is not None:
            ends = [_gone(me, "GONE", several) for several in (False, True)]
            pipe.write(json.dumps({"words": words, "ends": ends, "others": others}) + "\n")
            pipe.flush()


def _gone(me: str, names: str, several: bool) -> str:
    process, verb = ("processes", "are") if several else ("process", "is")
    return f"{me} ends: {process} {names} {verb} gone; {_REMEDY}"


def _dismiss() -> None:
    """This process says itself what there is to say."""
    while _witness:
        _witness.pop().communicate("null\n")


def _keep_watch(names: list[str], leader: str, ports: list[int], sign: socket.socket) -> None:
    threading.Thread(target=_answer, args=[sign], daemon=True).start()
    own, count = jax.process_index(), len(names)
    me = f"process {own} of {count} ({names[own]})"
    near = {0} | {(own + k) % count for k in range(-_KNOWN // 2, _KNOWN // 2 + 1)}
    hosts = [leader, *names[1:]]
    _last_words(
        f"{me} was killed, or aborted, as JAX does when another one is gone; {_REMEDY}",
        me,
        [(f"{p} ({names[p]})", hosts[p], ports[p]) for p in sorted(near - {own})],
    )
    watch = threading.Thread(target=_watch, args=[me, names], daemon=True)
    watch.start()
    _threads.append(watch)


def _answer(sign: socket.socket) -> None:
    """Whoever knocks finds that this process lives."""
    while True:
        try:
            sign.accept()[0].close()
        except OSError:
            time.sleep(1)


_REMEDY = "start all processes again with --resume auto"


def _watch(me: str, names: list[str]) -> None:
    """Meets the watchers of the others every second; JAX lets those who are silent go."""
    devices = jax.devices()
    gone: set[int] = set()
    while not gone:
        try:
            with multihost_utils.live_devices(devices) as alive:
                gone = {d.process_index for d in devices} - {d.process_index for d in alive}
                _left.wait(1)
        except multihost_utils.ProcessFailureError as error:
            gone = {d.process_index for d in error.failed_devices}
        except Exception:  # the service itself: JAX is about to abort this process
            gone = {0}
        # Process 0 goes last: the service that the others take leave of is in it.
        if _left.is_set() and (gone or not leads()):
            return
    if _left.wait(1):  # they went because the run is over
        return
    if leads():
        time.sleep(3)  # the others hear it from the service in this process
    lost = ", ".join(f"{p} ({names[p]})" for p in sorted(gone))
    _end(LOST, _gone(me, lost, len(gone) > 1))


def leave(*, together: bool = True) -> None:
    """Part from the other processes: at the end of a run, when all have come to it, or, not
    `together`, after an error of this process (the others then end too).

    >>> leave()
    """
    if not jax.distributed.is_initialized():
        _dismiss()
        return
    if together:
        gather(None)
    _left.set()
    _dismiss()
    for watch in _threads:
        watch.join(10 if together else 5)
    jax.distributed.shutdown()
    for watch in _threads:
        watch.join(5)  # the interpreter must not end while it is inside JAX


def verdict(seconds: float = HEARTBEAT + 10) -> None:
    """After an error inside a collective: wait until it is known whether another process is gone.
    Then this one ends with the line that says so; otherwise the error is its own.

    >>> verdict()  # alone
    """
    for thread in _threads:
        thread.join(seconds)
