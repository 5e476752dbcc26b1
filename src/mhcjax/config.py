"""Configuration: frozen dataclasses, dotted typed overrides, JSON both ways; stdlib only."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "PRESETS",
    "Config",
    "ConnectionConfig",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "check_ranges",
    "differences",
    "fields",
    "from_json",
    "override",
    "preset",
    "to_json",
]


def _option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class ConnectionConfig:
    """Which connection, by the name of a preset; None keeps the preset's own choice."""

    preset: str = _option("mhc_n2", "a name in mhcjax.presets.PRESETS")
    init: str | None = _option(
        None, "named init of the preset, e.g. near_identity, depth, published"
    )
    alpha_logit: float | None = _option(None, "N=2: overrides the init's alpha_logit")
    rule: Literal["add_first", "mix_first"] | None = _option(None, "the write rule")
    streams: int | None = _option(None, "N", least=1)
    entry: str | None = _option(
        None, "how the streams begin: repeat, stream_embedding, scaled_noise"
    )
    exit: str | None = _option(
        None, "how they are collapsed: mean, sum, learned_head, attention_pool, last_pre"
    )
    implementation: Literal["pallas", "xla", "reference"] | None = _option(
        None, "of mix, read and write (None: the fastest for the backend)"
    )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer whose sublayers go through `connect`."""

    layers: int = _option(4, "blocks; each has two sublayers, attention and MLP", least=1)
    width: int = _option(128, "D", least=1)
    heads: int = _option(4, "query heads", least=1)
    kv_heads: int | None = _option(None, "key and value heads (None: as many as heads)", least=1)
    hidden: int | None = _option(
        None, "F (None: 4 D for relu2, 8/3 D rounded up to 64 for swiglu)", least=1
    )
    mlp: Literal["relu2", "swiglu"] = _option("relu2", "squared ReLU or SwiGLU")
    vocab: int = _option(
        4096, "tokens of the tokenizer; storage is padded to a multiple of 128", least=1
    )
    context: int = _option(128, "longest sequence, in tokens; the size of the KV cache", least=1)
    tied: bool = _option(False, "the head is the embedding, transposed")
    qk_norm: bool = _option(True, "RMSNorm of queries and keys")
    soft_cap: float | None = _option(None, "logits become c * tanh(logits / c)")
    rope_base: float = _option(10000.0, "base of the rotary frequencies", least=1)
    embedding_std: float = _option(0.02, "std of the token embedding at init", least=0)
    dtype: Literal["float32", "bfloat16", "float64"] = _option(
        "float32", "dtype of the activations"
    )
    walk: Literal["loop", "scan"] = _option("loop", "how the stacked blocks are walked")
    remat: bool = _option(False, "recompute each block in the backward pass")
    remat_streams: bool = _option(
        False, "recompute the streams alone, in groups of blocks; keep what the branches made"
    )
    loss: Literal["chunked", "plain"] = _option(
        "chunked", "gradients of the head in the forward pass, or autodiff"
    )
    connection: ConnectionConfig = _option(ConnectionConfig(), "the residual connection")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into batches."""

    corpus: str = _option(
        "stdlib", "stdlib, packages, synthetic, or a path to a folder or file of text"
    )
    tokenizer: Literal["bpe", "byte"] = _option(
        "bpe", "byte-level BPE of model.vocab tokens, or bytes"
    )
    batch: int = _option(16, "sequences per micro-batch", least=1)
    length: int = _option(128, "tokens per sequence", least=2)
    micro_batches: int = _option(1, "micro-batches accumulated in one update", least=1)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning rates and their schedule."""

    name: Literal["muon", "adamw", "lion", "sgd"] = _option(
        "muon", "muon: matrices of the blocks only, AdamW for the rest"
    )
    learning_rate: float = _option(0.02, "peak rate of the matrices of the blocks", least=0)
    rest_rate: float | None = _option(
        0.003, "peak rate of all other leaves (None: learning_rate)", least=0
    )
    mixing_rate: float | None = _option(
        None, "peak rate of the mixing leaves (None: as the rest)", least=0
    )
    weight_decay: float = _option(
        0.0,
        "decoupled decay of matrices, embedding and head; never of static mixing leaves",
        least=0,
    )
    freeze_scales: bool = _option(False, "scales of dynamic mixes keep their initial values")
    scale_clip: float = _option(
        0.0, "largest gradient norm of the scales by themselves; 0 turns it off", least=0
    )
    z_loss: float = _option(0.0, "weight of mean(logsumexp(logits)^2) in the loss", least=0)
    clip: float = _option(1.0, "largest global gradient norm; 0 turns clipping off", least=0)
    beta1: float = _option(0.9, "first moment (AdamW), interpolation (Lion)", least=0, most=1)
    beta2: float = _option(0.95, "second moment (AdamW), momentum (Lion)", least=0, most=1)
    momentum: float = _option(0.95, "momentum of Muon; SGD has none", least=0, most=1)
    muon_dtype: Literal["float32", "bfloat16"] | None = _option(
        None, "dtype of Muon's Newton-Schulz iterations (None: that of the parameters)"
    )
    schedule: Literal["wsd", "cosine", "constant"] = _option(
        "wsd", "warm-up, stable, decay; or cosine"
    )
    warmup_steps: int = _option(
        20, "linear warm-up; the first update runs at 1 / warmup_steps", least=0
    )
    decay_fraction: float = _option(0.5, "wsd: share of the schedule that decays", least=0, most=1)
    final_fraction: float = _option(
        0.05, "learning rate at the end, as a share of the peak", least=0, most=1
    )


@dataclass(frozen=True)
class MeshConfig:
    """Devices: batch over `data`, the positions of its rows over `sequence`; heads, hidden and
    vocabulary over `model`."""

    data: int | None = _option(None, "devices along data (None: all that the others leave over)")
    sequence: int = _option(1, "devices along sequence: each has a part of every row")
    model: int = _option(1, "devices along model")
    shard_params: bool = _option(False, "shard parameters and optimizer state over data")


@dataclass(frozen=True)
class Config:
    """A whole run. `preset(name)` gives the named ones; `override` replaces by dotted name."""

    name: str = _option("nano", "name of the preset that this config started from")
    seed: int = _option(0, "seed of init, batches and samples", least=0)
    total_steps: int = _option(
        300, "optimizer updates; the run stops after exactly this many", least=0
    )
    schedule_steps: int | None = _option(
        None, "length of the schedule (None: total_steps of the first start)", least=1
    )
    log_every: int = _option(10, "updates per log line", least=1)
    eval_every: int = _option(100, "updates per evaluation", least=1)
    eval_batches: int = _option(8, "validation micro-batches per evaluation", least=1)
    sample_every: int = _option(100, "updates per sample text; 0 turns it off", least=0)
    save_every: int = _option(
        100, "updates per checkpoint; the last update is always saved", least=1
    )
    keep: int = _option(2, "checkpoints kept, besides the best", least=1)
    max_skipped: int = _option(10, "non-finite updates in a row after which the run stops", least=1)
    allow_loss0: bool = _option(False, "start although |loss0 - ln V| > 1")
    model: ModelConfig = _option(ModelConfig(), "the model")
    data: DataConfig = _option(DataConfig(), "the text")
    optim: OptimConfig = _option(OptimConfig(), "the optimizer")
    mesh: MeshConfig = _option(MeshConfig(), "the devices")


_NEAR = ConnectionConfig(preset="mhc_n2", init="near_identity")

PRESETS: Mapping[str, Config] = types.MappingProxyType(
    {
        "nano": Config(model=ModelConfig(connection=_NEAR)),
        "d20": Config(
            name="d20",
            total_steps=1250,
            eval_every=250,
            sample_every=625,
            save_every=625,
            model=ModelConfig(
                layers=6,
                width=256,
                heads=4,
                mlp="swiglu",
                hidden=768,
                vocab=50257,
                context=256,
                tied=True,
                connection=_NEAR,
            ),
            data=DataConfig(batch=16, length=256),
        ),
        "gpt2_124m": Config(
            name="gpt2_124m",
            total_steps=2000,
            eval_every=250,
            sample_every=500,
            save_every=500,
            model=ModelConfig(
                layers=12,
                width=768,
                heads=6,
                vocab=50257,
                context=1024,
                dtype="bfloat16",
                connection=_NEAR,
            ),
            data=DataConfig(batch=64, length=1024),
            optim=OptimConfig(
                name="adamw",
                learning_rate=6e-4,
                rest_rate=None,
                weight_decay=0.1,
                muon_dtype="bfloat16",
            ),
        ),
    }
)


def preset(name: str) -> Config:
    """The named config.

    >>> preset("nano").model.width
    128
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, value, help) of every leaf field, in order of declaration.

    >>> [name for name, *_ in fields(MeshConfig())]
    ['data', 'sequence', 'model', 'shard_params']
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], value, f.metadata.get("help", "")


def check_ranges(config: Any, prefix: str = "") -> None:
    """One sentence for the first number outside the range that its field states.

    >>> check_ranges(override(OptimConfig(), {"decay_fraction": 0.3}))

    Raises ValueError with the dotted name, the value and the bound.
    """
    for f in dataclasses.fields(config):
        name, value = f"{prefix}{f.name}", getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        least, most = f.metadata.get("least"), f.metadata.get("most")
        # Written so that nan is outside.
        if value is not None and least is not None and not value >= least:
            raise ValueError(f"{name} is {value}: give at least {least}")
        if value is not None and most is not None and not value <= most:
            raise ValueError(f"{name} is {value}: give at most {most}")


def _parse(name: str, kind: Any, value: Any) -> Any:
    """`value`, text or typed, as the declared type; a ValueError names field, value and choices."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _parse(name, next(a for a in args if a is not type(None)), value)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(str, args))}")
        return value
    if kind is bool:
        table = {"true": True, "false": False, "1": True, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in table:
            return table[value.lower()]
        raise ValueError(f"{name} is {value!r}: give true or false")
    if kind is str and isinstance(value, str):
        return value
    if kind is int and not isinstance(value, bool) and isinstance(value, str | int):
        try:
            return int(value)
        except ValueError:
            pass
    if kind is float and not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name} is {value!r}: give {'an' if kind is int else 'a'} {kind.__name__}")


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with fields replaced by dotted name; text is parsed to the declared type.

    >>> override(preset("nano"), {"model.layers": "6", "optim.weight_decay": 0.1}).model.layers
    6

    Another `connection.preset` leaves behind the init, the ends and the rule that were chosen for
    the one before: only what `changes` names beside it is kept.

    >>> override(preset("nano"), {"model.connection.preset": "mhc"}).model.connection.init

    Raises ValueError on an unknown name (with the nearest one) or a value of the wrong type.
    """
    known = {name: kind for name, kind, _, _ in fields(config)}
    at = "model.connection.preset"
    if at in changes and at in known and changes[at] != config.model.connection.preset:
        kept = config.model.connection.implementation
        config = _replace(config, at.split(".")[:-1], ConnectionConfig(implementation=kept))
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else f": the fields are {', '.join(known)}"
            raise ValueError(f"unknown field {name!r}{hint}")
        config = _replace(config, name.split("."), _parse(name, known[name], value))
    return config


def _replace(config: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    if rest:
        value = _replace(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


def to_json(config: Any) -> str:
    """The config as JSON text with every field written out.

    >>> from_json(to_json(preset("d20"))) == preset("d20")
    True
    """
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config of `to_json`; a missing or unknown field is a ValueError that names it."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the config is not JSON ({error}): restore the run's config.json"
        ) from None

    def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    if not isinstance(tree, dict):
        raise ValueError(f"the config is a JSON {type(tree).__name__}: give an object")
    given = dict(flatten(tree))
    missing = [name for name, *_ in fields(Config()) if name not in given]
    if missing:
        own = {name: value for name, _, value, _ in fields(Config())}
        raise ValueError(
            f"the config lacks {', '.join(missing)}: it was written by another version; to go on "
            f"as this one does, add {', '.join(f'{name} = {own[name]!r}' for name in missing)}"
        )
    return override(Config(), given)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (old, new)} of every field that differs.

    >>> differences(preset("nano"), override(preset("nano"), {"seed": 1}))
    {'seed': (0, 1)}
    """
    before = {name: value for name, _, value, _ in fields(old)}
    after = {name: value for name, _, value, _ in fields(new)}
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
