"""A run's folder: config.json, run.json, metrics.jsonl, train.log, samples.txt, summary.json."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax

__all__ = ["Progress", "RunLog", "duration", "newest_run", "read_rows", "versions", "write_atomic"]


def write_atomic(path: Path, text: str) -> None:
    """The whole text or nothing: written beside the file, then renamed over it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder) / "a.txt", "text")
    ...     (Path(folder) / "a.txt").read_text()
    'text'
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def versions() -> dict[str, Any]:
    """Python, packages, device and, where the package lies in a git checkout, its commit.

    >>> sorted(versions())[:3]
    ['backend', 'commit', 'device']
    """
    names = ("mhcjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "python": platform.python_version(),
        **found,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "commit": commit,
    }


def duration(seconds: float | None) -> str:
    """Seconds as people read them.

    >>> duration(75), duration(3725), duration(None)
    ('1m15s', '1h02m', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Time spent and time left. Updates and events (evaluation, sample, save) are timed apart, so
    that events still to come are counted at what they cost so far.

    >>> progress = Progress(total=100, done=0, events={"eval": 50}, clock=iter(range(9)).__next__)
    >>> progress.updates(10)
    1
    >>> progress.eta()
    9.0
    """

    def __init__(
        self,
        total: int,
        done: int,
        events: dict[str, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.every, self.clock = total, done, events, clock
        self.start = self.last = clock()
        self.stepping = 0.0
        self.stepped = 0
        self.costs: dict[str, list[float]] = {name: [] for name in events}
        self.seen = dict.fromkeys(events, done)  # updates made when each was last done

    def updates(self, count: int) -> float:
        """`count` updates were made since the last call; -> the seconds they took."""
        now = self.clock()
        seconds, self.last = now - self.last, now
        self.stepping += seconds
        self.stepped += count
        self.done += count
        return seconds

    def event(self, name: str) -> float:
        """The time since the last call went to the event `name`; -> its seconds."""
        now = self.clock()
        seconds, self.last = now - self.last, now
        self.costs.setdefault(name, []).append(seconds)
        self.seen[name] = self.done
        return seconds

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.last - self.start

    def eta(self) -> float | None:
        """Seconds to go: updates at their mean so far, events at the least they have cost."""
        if not self.stepped:
            return None
        left = (self.total - self.done) * self.stepping / self.stepped
        for name, every in self.every.items():
            # The first of a kind compiles; the least is what the next ones cost.
            if every and self.costs[name]:
                times = _times(self.seen[name], self.total, every)
                left += times * min(self.costs[name])
        return left


def _times(done: int, total: int, every: int) -> int:
    """Multiples of `every` in (done, total], and the end where it is none."""
    return total // every - done // every + (1 if total % every and total > done else 0)


class RunLog:
    """Writes a run's folder: lines to the terminal and train.log, rows to metrics.jsonl. Not
    `writes`: everything goes nowhere, for processes of which another one writes."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, writes: bool = True) -> None:
        self.folder, self.say, self.writes = folder, say, writes
        self._log = self._open("train.log")
        self._rows = self._open("metrics.jsonl")

    def _open(self, name: str) -> TextIO:
        if not self.writes:
            return open(os.devnull, "a", encoding="utf-8")
        self.folder.mkdir(parents=True, exist_ok=True)
        return open(self.folder / name, "a", encoding="utf-8")

    def line(self, text: str) -> None:
        """A line for people."""
        self.say(text)
        self._log.write(text + "\n")
        self._log.flush()

    def row(self, kind: str, figures: dict[str, Any]) -> None:
        """A row for programs; one append, so that a kill leaves whole rows. NaN becomes null."""
        self._rows.write(json.dumps({"kind": kind, **_plain(figures)}) + "\n")
        self._rows.flush()

    def sample(self, text: str) -> None:
        """Text that the model wrote."""
        with self._open("samples.txt") as file:
            file.write(text + "\n")

    def close(self) -> None:
        """Closes both files."""
        self._log.close()
        self._rows.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, of one kind or all; a last line cut by a kill is skipped.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RunLog(Path(folder), say=lambda line: None) as log:
    ...         log.row("train", {"step": 1, "loss": float("nan")})
    ...     read_rows(folder)
    [{'kind': 'train', 'step': 1, 'loss': None}]
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a run")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is None or row.get("kind") == kind:
            rows.append(row)
    return rows


def drop_rows_after(folder: Path, step: int) -> None:
    """Forgets the rows past a checkpoint that a run goes on from: they will be made again."""
    if (folder / "metrics.jsonl").exists():
        kept = [row for row in read_rows(folder) if row["step"] <= step]
        write_atomic(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))


def unfinished(folder: str | Path, updates: int) -> bool:
    """Whether there is a run whose summary does not say that it is done after so many updates: it
    was killed between its last checkpoint and its summary.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(unfinished(folder, 7))
    ...     write_atomic(Path(folder) / "config.json", "{}")
    ...     print(unfinished(folder, 7))
    ...     write_atomic(Path(folder) / "summary.json", '{"status": "done", "updates": 7}')
    ...     print(unfinished(folder, 7), unfinished(folder, 8))
    False
    True
    False True
    """
    path = Path(folder) / "summary.json"
    if not path.with_name("config.json").exists():
        return False
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return (summary.get("status"), summary.get("updates")) != ("done", updates)


def newest_run(root: str | Path = "runs") -> Path:
    """The run under `root` whose config.json is newest; a ValueError where there is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     (Path(root) / "a").mkdir()
    ...     write_atomic(Path(root) / "a" / "config.json", "{}")
    ...     newest_run(root).name
    'a'
    """
    runs = [p.parent for p in Path(root).glob("*/config.json")]
    if not runs:
        raise ValueError(f"no run under {root}/: train one first, or name its folder")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime)
