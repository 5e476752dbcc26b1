"""A run folder, opened: its model, the point to go on from, the config that it settled on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from mhcjax import checkpoint, gpt
from mhcjax.config import Config, differences, from_json, override, preset
from mhcjax.tokenizer import Tokenizer, load_tokenizer

__all__ = ["MUTABLE", "Loaded", "load", "resolve", "resume_point", "settled"]

# What may change when a run goes on: none of it alters what the stored state means.
MUTABLE = (
    "total_steps",
    "log_every",
    "eval_every",
    "eval_batches",
    "sample_every",
    "save_every",
    "keep",
    "max_skipped",
    "allow_loss0",
    "mesh.data",
    "mesh.sequence",
    "mesh.model",
    "mesh.shard_params",
    "model.walk",
    "model.remat",
    "model.remat_streams",
    "model.loss",
    "model.connection.implementation",
)


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint: `nnx.merge(graphdef, params)` is the module."""

    config: Config
    graphdef: nnx.GraphDef
    params: Any
    meta: dict[str, Any]
    path: Path

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, from the file beside its checkpoints."""
        file = self.path.parent.parent / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} is missing: copy it from the run of this checkpoint")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != self.meta["tokenizer"]:
            raise ValueError(f"{file} is not the tokenizer of {self.path}: copy it from that run")
        return load_tokenizer(file)


def load(path: str | Path) -> Loaded:
    """The model of a run, a checkpoints folder or one step; strict, see `checkpoint`.

    Raises ValueError, one sentence, for anything that is not exactly what was saved.
    """
    step = checkpoint.find(path)
    meta = checkpoint.describe(step)
    config = from_json(json.dumps(meta.get("config", {})))
    params, meta = checkpoint.restore_params(step, gpt.abstract_params(config.model))
    return Loaded(config, gpt.graph(config.model), params, meta, step)


def resume_point(folder: str | Path, resume: str) -> Path | None:
    """The checkpoint that a run in `folder` goes on from; None is a fresh start.

    `resume`: "auto" goes on where `folder` has a checkpoint, "never" wants an unused folder, a path
    starts in a new folder from that checkpoint. Raises ValueError where the folder is in the way.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder with --run")
    used = (folder / "config.json").exists() or (folder / "checkpoints").exists()
    if resume == "never":
        if used:
            raise ValueError(f"{folder} holds a run: give another --run, or --resume auto")
        return None
    if resume == "auto":
        has = (folder / "checkpoints").is_dir() and any(
            p.name.isdigit() for p in (folder / "checkpoints").iterdir()
        )
        return checkpoint.find(folder) if has else None
    source = checkpoint.find(resume)
    own = folder.resolve() in source.resolve().parents
    if used and not own:
        raise ValueError(f"{folder} holds another run: give another --run to go on from {source}")
    if own and (newest := checkpoint.find(folder)).name != source.name:
        raise ValueError(
            f"{folder} has gone on to step {newest.name}: give another --run to go on from "
            f"{source}, or delete the later steps"
        )
    return source


def resolve(
    folder: str | Path, overrides: Mapping[str, Any], *, preset_name: str | None, resume: str
) -> Config:
    """The config of a run: overrides over the preset, or over the stored config on resuming."""
    source = resume_point(folder, resume)
    if source is None:
        return override(preset(preset_name or "nano"), overrides)
    stored = _stored_config(source)
    base = stored
    if preset_name is not None:
        base = dataclasses.replace(
            preset(preset_name),
            schedule_steps=stored.schedule_steps,
            total_steps=stored.total_steps,
        )
    return override(base, overrides)


def _stored_config(source: Path) -> Config:
    return from_json(json.dumps(checkpoint.describe(source).get("config", {})))


def settled(config: Config, source: Path | None) -> Config:
    """The schedule's length is settled at the first start. On going on, a change that would alter
    what the stored state means is refused with the fields that differ."""
    if source is None:
        steps = config.total_steps if config.schedule_steps is None else config.schedule_steps
        return dataclasses.replace(config, schedule_steps=steps)
    stored = _stored_config(source)
    if config.schedule_steps is None:
        config = dataclasses.replace(config, schedule_steps=stored.schedule_steps)
    changed = {k: v for k, v in differences(stored, config).items() if k not in MUTABLE}
    if changed:
        listed = ", ".join(f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items())
        raise ValueError(
            f"{source} was trained with other settings ({listed}): drop these overrides, "
            "or start a new run with --resume never and another --run"
        )
    return config
