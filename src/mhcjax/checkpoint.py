"""Checkpoints: atomic, strict, complete. The only file that knows Orbax.

One step folder holds three items: `params` (the weights), `rest` (all other leaves of the state)
and `meta` (JSON: the caller's dict, a table of all leaves, fingerprints, a checksum of itself). The
leaves are stored flat under their path, so what is on disk does not depend on how the state is
nested, and the weights can be read without knowing the optimizer.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mhcjax import processes

__all__ = [
    "Checkpoints",
    "describe",
    "find",
    "fingerprint",
    "restore",
    "restore_params",
]

Spec = list  # [shape as a list, name of the dtype], as JSON has it

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax writes into a folder called so and renames it


def fingerprint(tree: Any) -> str:
    """sha256 over path, shape, dtype and bytes of every leaf, in the order of the paths.

    The path is the text that names the leaf in a checkpoint (`blocks/w`), so two trees with the
    same names and bits have the same fingerprint, whatever their containers, devices or shardings.

    >>> tree = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}
    >>> fingerprint(tree) == fingerprint({"b": np.zeros(3, jnp.bfloat16), "w": tree["w"]})
    True
    >>> fingerprint(tree) == fingerprint({"w": tree["w"], "b": jnp.zeros(3, jnp.float16)})
    False

    Raises ValueError on a leaf that is not an array or a number.
    """
    return _combine(_digests(_flatten(tree)))


def _flatten(tree: Any) -> dict[str, Any]:
    """{path as text: leaf}; a ValueError names a leaf that cannot be stored."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise ValueError(f"two leaves are called {name}: rename a key that contains '/'")
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biufcV":
            raise ValueError(
                f"leaf {name} is a {type(leaf).__name__} of dtype {dtype}: store arrays and"
                " numbers (a typed key as jax.random.key_data, text in meta)"
            )
        flat[name] = leaf
    return flat


def _spec(leaf: Any) -> Spec:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return [list(leaf.shape), str(leaf.dtype)]


def _digest(leaf: Any) -> str:
    digest = hashlib.sha256(json.dumps(_spec(leaf)).encode())
    # Through uint8, because bfloat16 has no buffer protocol.
    digest.update(np.ascontiguousarray(processes.whole(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digests(flat: Mapping[str, Any]) -> dict[str, str]:
    for leaf in flat.values():  # start all the copies before waiting for the first
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    return {name: _digest(leaf) for name, leaf in flat.items()}


def _combine(digests: Mapping[str, str]) -> str:
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _item(name: str) -> str:
    """The item of the checkpoint in which the leaf called `name` is stored."""
    return "params" if name.split("/")[0] == "params" else "rest"


def _params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `params`, under their full path."""
    return {name: value for name, value in flat.items() if _item(name) == "params"}


def _weights_fingerprint(digests: Mapping[str, str]) -> str:
    """What `fingerprint(state.params)` is: the paths start below `params`."""
    return _combine({name[len("params/") :]: digest for name, digest in _params(digests).items()})


class Checkpoints:
    """The checkpoints of one run, for its only writer; readers use `find`, `describe`, `restore`.

    The newest `keep` steps and the one with the lowest metric are kept. Saving goes on in the
    background; a step folder takes its name only when it is complete, so a kill leaves the earlier
    ones as they were, and what it left unfinished is removed by the next `Checkpoints`.

    >>> import tempfile
    >>> state = {"params": {"w": jnp.arange(3.0)}, "step": jnp.int32(7)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder) as checkpoints:
    ...         checkpoints.save(7, state, {"seed": 0}, metric=2.5)
    ...     again, meta = restore(folder, jax.eval_shape(lambda: state))
    >>> again["params"]["w"].tolist(), meta["seed"], meta["metric"]
    ([0.0, 1.0, 2.0], 0, 2.5)

    An error of a background save is raised by the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least one checkpoint")
        self.folder = Path(folder).absolute()
        self._policy = _NewestAndBest(keep, {})
        for step in self.steps():
            # An unreadable step has no metric; whoever asks for it gets the reason.
            with contextlib.suppress(ValueError):
                self._policy.metrics[step] = describe(self.folder / str(step))["metric"]
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # reads no file of the steps: one may be damaged
            ),
        )

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Starts writing `state` and `meta`; `state` may be donated as soon as this returns.

        `state` is any pytree with a `params` field or key. To `meta` are added `step`, `metric`,
        `fingerprint` (of the weights), `state_fingerprint` and `tree` ({path: [shape, dtype]}). A
        metric that is not finite counts as none. A step is written once: saving the newest one
        again with the same bits does nothing, and any other step that is not newer than all that
        are there is a ValueError.
        """
        step = int(step)
        flat = _flatten(state)
        if not _params(flat):
            raise ValueError(f"the state of step {step} has no leaf in params: name the field so")
        digests = _digests(flat)
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        try:
            # Through JSON and back, because the checksum is over what a reader will see.
            full = json.loads(json.dumps(dict(meta)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"meta of step {step} is not JSON ({error}): give numbers, text, lists and dicts"
            ) from None
        full |= {
            "step": step,
            "metric": metric,
            "fingerprint": _weights_fingerprint(digests),
            "state_fingerprint": _combine(digests),
            "tree": {name: _spec(leaf) for name, leaf in sorted(flat.items())},
        }
        self.wait()
        newest = processes.agreed(self.latest)
        if newest is not None and step <= newest:
            with contextlib.suppress(ValueError):  # an unreadable step is not the same
                stored = describe(self.folder / str(step))
                if step == newest and stored["state_fingerprint"] == full["state_fingerprint"]:
                    return
            raise ValueError(
                f"step {step} cannot be saved into {self.folder}, which has step {newest} already:"
                f" give the run another folder, or delete the steps from {step} on"
            )
        self._policy.metrics[step] = metric
        items: dict[str, dict[str, Any]] = {}
        for name, leaf in flat.items():
            array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
            if array.size:  # Orbax takes no empty array, and the table says all there is of one
                items.setdefault(_item(name), {})[name] = array
        self._manager.save(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave({"meta": full, "sha256": _checksum(full)}),
                **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            ),
            force=True,  # when to save is the caller's choice
        )

    def steps(self) -> list[int]:
        """The complete steps, oldest first; one that is still being written is not among them."""
        return _steps(self.folder)

    def latest(self) -> int | None:
        """The newest complete step, None when there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The complete step with the lowest metric (the newest of equals), None without metrics."""
        return self._policy.best(self.steps())

    def wait(self) -> None:
        """Waits until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NewestAndBest:
    """Orbax's preservation policy. BestN would keep the metric in a file without a checksum."""

    def __init__(self, keep: int, metrics: dict[int, float | None]):
        self.keep = keep
        self.metrics = metrics

    def best(self, steps: Sequence[int]) -> int | None:
        scored = [(self.metrics[s], -s) for s in steps if self.metrics.get(s) is not None]
        return -min(scored)[1] if scored else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best(steps)}
        return [step in kept for step in steps]


def _checksum(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    # The rename is atomic: a folder whose name is a bare number is complete.
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def find(path: str | Path) -> Path:
    """The step folder that `path` means: itself, or the newest step of a run or its checkpoints.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     for step in (90, 100):
    ...         (Path(run) / "checkpoints" / str(step)).mkdir(parents=True)
    ...     find(run).relative_to(run).as_posix()
    'checkpoints/100'

    Raises ValueError when there is no complete step.
    """
    path = Path(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if steps := _steps(folder):
        return folder / str(steps[-1])
    named = path.name.isdigit() or (path / "meta").is_dir()  # a copied step may have any name
    if path.is_dir() and named and _UNFINISHED not in path.name:
        return path
    others = _steps(path.parent)
    fix = f"{path.parent} has {_list(others)}" if others else "give the folder of a run with one"
    raise ValueError(f"no complete checkpoint in {path}: {fix}")


def _unreadable(path: Path, what: str) -> ValueError:
    others = [step for step in _steps(path.parent) if str(step) != path.name]
    if others:
        fix = f"use another step, {path.parent} has {_list(others)}"
    else:
        fix = f"there is no other step in {path.parent}, train again"
    return ValueError(f"checkpoint {path}: {what}: {fix}")


def _list(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def describe(path: str | Path) -> dict[str, Any]:
    """The meta of a checkpoint (`path` as in `find`), without loading any array.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder) as checkpoints:
    ...         checkpoints.save(1, {"params": {"w": jnp.zeros((2, 3))}}, {})
    ...     describe(folder)["tree"]
    {'params/w': [[2, 3], 'float32']}

    Raises ValueError when there is no checkpoint, or its meta is missing or damaged.
    """
    path = find(path)
    file = path / "meta" / "metadata"  # where Orbax puts a JSON item
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        meta, checksum = content["meta"], content["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(path, f"its meta cannot be read ({_one_line(error)})") from None
    if _checksum(meta) != checksum:
        raise _unreadable(path, "its meta does not have the checksum it was written with")
    return meta


def restore(path: str | Path, target: Any) -> tuple[Any, dict[str, Any]]:
    """(state, meta) of a checkpoint (`path` as in `find`), with exactly the leaves of `target`.

    `target` is the state or its shapes (`jax.ShapeDtypeStruct`). A leaf comes back as what stands
    in its place: with a sharding, a jax.Array placed so (any mesh, any number of devices); without
    one, a jax.Array on the default device; NumPy for NumPy, a number for a number.

    >>> import tempfile
    >>> state = {"params": {"w": jnp.ones(3)}, "step": 7}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder) as checkpoints:
    ...         checkpoints.save(7, state, {})
    ...     restore(folder, state)[0]["step"]
    7

    Raises ValueError, in one line, when a leaf is missing, left over, or of another shape or dtype,
    and when the bits are not those that were saved.
    """
    path = find(path)
    meta = describe(path)
    wanted = _flatten(target)
    values, digests = _read(path, wanted, meta["tree"])
    if _combine(digests) != meta["state_fingerprint"]:
        raise _unreadable(path, "the state does not have the fingerprint it was saved with")
    return _placed(values, wanted, target), meta


def restore_params(path: str | Path, target: Any) -> tuple[Any, dict[str, Any]]:
    """(params, meta) of a checkpoint; `target` is the params alone, everything else as `restore`.

    >>> import tempfile
    >>> params = {"w": jnp.ones(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder) as checkpoints:
    ...         checkpoints.save(7, {"params": params, "moments": jnp.zeros(3)}, {})
    ...     again, meta = restore_params(folder, params)
    >>> fingerprint(again) == meta["fingerprint"]
    True
    """
    path = find(path)
    meta = describe(path)
    wanted = _flatten({"params": target})
    values, digests = _read(path, wanted, _params(meta["tree"]))
    if _weights_fingerprint(digests) != meta["fingerprint"]:
        raise _unreadable(path, "the weights do not have the fingerprint they were saved with")
    return _placed(values, wanted, target), meta


def _read(
    path: Path, wanted: Mapping[str, Any], stored: Mapping[str, Spec]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The leaves on the host and their digests, when `wanted` are exactly the stored ones."""
    if problem := _difference(stored, {name: _spec(leaf) for name, leaf in wanted.items()}):
        raise ValueError(
            f"checkpoint {path} does not fit, {problem}: build the target from the config that"
            " the checkpoint was saved with"
        )
    for name, leaf in wanted.items():
        _check_placement(name, leaf)
    handler = ocp.PyTreeCheckpointHandler()

    def read(name: str) -> tuple[np.ndarray, str]:
        dtype = np.dtype(stored[name][1])
        value = np.zeros(stored[name][0], dtype)
        if value.size:
            part = ocp.args.PyTreeRestore(
                item={name: value},
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)},
                partial_restore=True,
            )
            try:
                value = handler.restore(path.absolute() / _item(name), args=part)[name]
            except Exception as error:  # tensorstore, zstd, zarr and JSON each have their own
                raise _unreadable(path, f"cannot read leaf {name}, {_one_line(error)}") from error
        return value, _digest(value)

    # Through the host, so that the bits are checked before they are placed, and whatever the mesh
    # they were saved from. One call per leaf, each in a thread: when one of many reads in a call
    # fails, Orbax abandons the others, and they print tracebacks later on.
    with ThreadPoolExecutor() as pool:
        results = dict(zip(wanted, pool.map(read, wanted), strict=True))
    return {n: value for n, (value, _) in results.items()}, {n: d for n, (_, d) in results.items()}


def _check_placement(name: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(f"leaf {name} is {leaf.dtype}, which JAX would cut: set JAX_ENABLE_X64=1")
    try:
        if leaf.sharding is not None:
            leaf.sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise ValueError(f"leaf {name} does not fit its sharding, {_one_line(error)}") from None


def _placed(values: dict[str, np.ndarray], wanted: Mapping[str, Any], target: Any) -> Any:
    leaves = [_place(values.pop(name), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _place(value: np.ndarray, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return value
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return type(leaf)(value[()])
    if leaf.sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])


def _difference(stored: Mapping[str, Spec], expected: Mapping[str, Spec]) -> str | None:
    """The first difference of two tables, as text that names the leaf."""
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    if missing:
        text = f"leaf {missing[0]} is not in it, expected {_show(expected[missing[0]])}"
        if extra:
            near = difflib.get_close_matches(missing[0], extra, n=1, cutoff=0)[0]
            text += f", and leaf {near}, {_show(stored[near])}, is in it but not expected"
        return text + _more(len(missing) + len(extra) - 1 - bool(extra))
    if extra:
        text = f"leaf {extra[0]}, {_show(stored[extra[0]])}, is in it but not expected"
        return text + _more(len(extra) - 1)
    other = [name for name in sorted(stored) if stored[name] != expected[name]]
    if other:
        text = f"leaf {other[0]} is {_show(stored[other[0]])}, expected {_show(expected[other[0]])}"
        return text + _more(len(other) - 1)
    return None


def _show(spec: Spec) -> str:
    shape, dtype = spec
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""
