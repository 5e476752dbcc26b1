"""fit(config, folder): the only host loop. Text in, a run folder out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mhcjax import (
    audit,
    checkpoint,
    data,
    gpt,
    optim,
    plots,
    processes,
    runs,
    sample,
    sharding,
    tokens,
    train,
)
from mhcjax.config import Config, to_json
from mhcjax.runlog import (
    Progress,
    RunLog,
    drop_rows_after,
    duration,
    read_rows,
    unfinished,
    versions,
    write_atomic,
)

__all__ = ["Outcome", "fit", "read_batch"]

PROMPTS = ("def __init__(self", "import", "class")  # of the samples written during training
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status`: done, dry (nothing was trained), stopped (a signal), diverged."""

    status: str
    folder: Path
    updates: int
    validation: dict[str, float]
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0 when done, 1 when diverged, 128 + signal when stopped, as shells count."""
        return {"done": 0, "dry": 0, "diverged": 1, "stopped": 128 + self.signal}[self.status]


def fit(
    config: Config,
    folder: str | Path,
    *,
    resume: str = "never",
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    command: str = "mhcjax",
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train until exactly `config.total_steps` optimizer updates, afresh or from a checkpoint.

    Writes config.json, run.json, metrics.jsonl, train.log, samples.txt, checkpoints/, pictures and
    summary.json into `folder`. SIGTERM and Ctrl-C save and return at the next boundary of updates.
    Nothing is written before the config, the text and the first loss have passed their checks.
    `resume` as in `runs.resume_point`. Where there are several processes all call this alike, and
    process 0 alone speaks and writes, but for its share of a checkpoint.

    Raises ValueError, one sentence, for anything that the user can mend.
    """
    folder = Path(folder)
    if not processes.leads():
        say = _silent
    found = processes.agreed(lambda: str(runs.resume_point(folder, resume) or ""))
    source = Path(found) if found else None
    config = runs.settled(config, source)
    if source is not None:
        say(f"going on from {source}")
    with processes.signals() as stop:
        return _Run(config, folder, source, say, command, clock, stop).run(dry_run)


def read_batch(tokens: np.ndarray, program: train.Program, index: int) -> jax.Array:
    """Batch `index` of a run on the program's mesh; a process reads only the rows that its own
    devices hold."""
    abstract, config = program.abstract_batch, program.config

    def read(rows: slice) -> np.ndarray:
        return data.batch(
            tokens,
            seed=config.seed,
            step=index,
            batch=config.data.batch,
            length=config.data.length,
            micro_batches=config.data.micro_batches,
            rows=rows,
        )

    return processes.place(abstract.shape, abstract.sharding, read)


def _silent(line: str) -> None:
    pass


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        source: Path | None,
        say: Callable[[str], None],
        command: str,
        clock: Callable[[], float],
        stop: processes.Stop,
    ) -> None:
        self.config, self.folder, self.source = config, folder, source
        self.say, self.command, self.clock, self.stop = say, command, clock, stop
        self.program = train.program(config)
        d = config.data
        self.corpus = processes.first(
            lambda: tokens.build(d.corpus, d.tokenizer, config.model.vocab, say=say)
        )
        if self.corpus.sha256 != (wanted := processes.gather(self.corpus.sha256)[0]):
            raise ValueError(
                f"{d.corpus!r} is {self.corpus.sha256[:12]} here and {wanted[:12]} for process 0: "
                "give all processes the same text and the same Python"
            )
        self.tokenizer_json = (self.corpus.folder / "tokenizer.json").read_text(encoding="utf-8")
        self.train_tokens = data.open_tokens(self.corpus.train, self.corpus.dtype)
        held_out = data.open_tokens(self.corpus.validation, self.corpus.dtype)
        batches = list(
            data.validation_batches(
                held_out, batch=d.batch, length=d.length, count=config.eval_batches
            )
        )
        self.rows = NamedSharding(self.program.mesh, sharding.partition("BT"))
        self.validation = [self._rows(batch) for batch in batches]
        self.probe_rows = self._rows(batches[0][: audit.probe_rows(config, self.program.mesh)])
        self.traced_BT = batches[0][:1, :-1]
        self.bytes_V = self.corpus.tokenizer.token_bytes.astype(np.int32)
        self.hyper = optim.hyper(config.optim, config.schedule_steps or config.total_steps)
        self.per_update = math.prod(self.program.abstract_batch.shape[:2]) * config.data.length

    # ---- before the first step

    def run(self, dry_run: bool) -> Outcome:
        """Plan, check, train."""
        began = self.clock()
        self.say(
            f"compiling {audit.model_name(self.config)} for {jax.devices()[0].device_kind} ..."
        )
        program = self.program
        self.step = program.compile(self.hyper)
        state, meta = self._start()
        # The other programs now too, so that what follows is timed without compiling.
        self.probe = program.probe.lower(state.params, self.probe_rows).compile()
        sums = program.eval_step.lower(state.params, self.validation[0], self.bytes_V)
        self.sums = sums.compile()
        if self.config.sample_every and not dry_run:
            self._generate(state, tokens=2)
        self.say(f"compiled in {duration(self.clock() - began)}")
        updates = int(state.updates)
        self._plan(state, check=self.source is None and updates == 0)
        if dry_run:
            return Outcome("dry", self.folder, updates, {})
        total, validation = self.config.total_steps, {}
        if updates >= total:
            self.say(f"the checkpoint has {updates} updates of {total}: 0 more to make")
            validation = meta.get("validation", {})
            if not processes.agreed(lambda: unfinished(self.folder, updates)):
                return Outcome("done", self.folder, updates, validation)
        return self._train(state, updates, validation)

    def _start(self) -> tuple[train.State, dict]:
        if self.source is None:
            return self.program.init(jax.random.key(self.config.seed)), {}
        state, meta = checkpoint.restore(self.source, self.program.abstract_state)
        if meta["corpus"] != self.corpus.sha256:
            raise ValueError(
                f"{self.source} was trained on corpus {meta['corpus'][:12]}, "
                f"{self.config.data.corpus!r} is now {self.corpus.sha256[:12]}: "
                "restore the text, or start a new run"
            )
        if meta["connection"] != str(gpt.connection_of(self.config.model)):
            raise ValueError(
                f"{self.source} was trained with {meta['connection']}, which preset "
                f"{self.config.model.connection.preset!r} no longer is: use that version"
            )
        return state, meta

    def _batch(self, index: int) -> jax.Array:
        return read_batch(self.train_tokens, self.program, index)

    def _rows(self, batch: np.ndarray) -> jax.Array:
        return processes.place(batch.shape, self.rows, lambda rows: batch[rows])

    def _plan(self, state: train.State, *, check: bool) -> None:
        """Print what is about to happen, all of it derived; refuse a loss far from ln V."""
        rows = audit.info(self.config, compiled=self.step)
        first = jax.jit(lambda batch: batch[0], out_shardings=self.rows)(self._batch(0))
        sums = jax.device_get(self.sums(state.params, first, self.bytes_V))
        began = self.clock()
        jax.block_until_ready(self.sums(state.params, first, self.bytes_V))
        # A backward pass costs two forward passes.
        seconds = 3 * (self.clock() - began) * self.config.data.micro_batches
        left = max(self.config.total_steps - int(state.updates), 0)
        groups = ", ".join(f"{name} {n:,}" for name, n in rows["parameters by group"].items())
        corpus = self.corpus
        loss0, uniform = float(sums["nll"] / sums["tokens"]), math.log(self.config.model.vocab)
        for line in (
            f"model       {rows['model']}: {rows['parameters']:,} parameters ({groups})",
            f"connection  {rows['connection']}",
            f"text        {self.config.data.corpus}, sha256 {corpus.sha256[:12]}: "
            f"{corpus.train_tokens:,} tokens to train on, {corpus.validation_tokens:,} held out",
            f"memory      {rows['step memory bytes'] / 1e9:.2f} GB per device for the training "
            "step, by XLA's analysis",
            f"work        {rows['tokens per update']:,} tokens per update, {left:,} of "
            f"{self.config.total_steps:,} updates to make, {left * self.per_update:,} tokens, "
            f"{rows['FLOPs per token'] / 1e6:.1f} MFLOP per token",
            f"time        about {duration(left * seconds)} on "
            f"{self.program.mesh.size} x {jax.devices()[0].device_kind}",
            f"{'first loss' if check else 'loss now':<12}{loss0:.3f}; uniform guessing is "
            f"ln V = {uniform:.3f}",
        ):
            self.say(line)
        if check and not self.config.allow_loss0 and not abs(loss0 - uniform) <= 1:
            raise ValueError(
                f"the first loss is {loss0:.2f}, ln V is {uniform:.2f}: look at "
                f"model.embedding_std ({self.config.model.embedding_std:g}, usually 0.02), "
                "or pass --allow-loss0 true"
            )

    # ---- training

    def _record(self, updates: int) -> None:
        """Make the folder: what this run is, before its first update."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "config.json", to_json(config))
        write_atomic(self.folder / "tokenizer.json", self.tokenizer_json)
        write_atomic(
            self.folder / "run.json",
            json.dumps(
                {
                    "versions": versions(),
                    "corpus": {
                        "name": config.data.corpus,
                        "sha256": self.corpus.sha256,
                        "python": self.corpus.python,
                    },
                    "connection": str(gpt.connection_of(config.model)),
                    "info": audit.info(config, compiled=self.step),
                    "resumed from": str(self.source) if self.source else None,
                },
                indent=2,
            )
            + "\n",
        )
        # A run that ended before its first save starts again: none of its rows stand.
        drop_rows_after(self.folder, updates if self.source else -1)

    def _train(self, state: train.State, updates: int, validation: dict) -> Outcome:
        config, total = self.config, self.config.total_steps
        processes.agreed(lambda: self._record(updates))
        if not (self.folder / "config.json").exists():
            raise ValueError(
                f"process {jax.process_index()} does not see {self.folder}, which process 0 has "
                "made: give a --run on a file system that all of them share"
            )
        events = {
            "eval": config.eval_every,
            "sample": config.sample_every,
            "save": config.save_every,
        }
        evaluated, signalled = -1, 0
        with (
            RunLog(self.folder, self.say, writes=processes.leads()) as log,
            checkpoint.Checkpoints(self.folder / "checkpoints", keep=config.keep) as saved,
        ):
            self.log = log
            progress = Progress(total, updates, events, self.clock)
            if updates == 0:
                validation = self._evaluate(state, updates)
                progress.event("eval")
                if config.sample_every:
                    self._sample(state, updates)
                    progress.event("sample")
            batches, status = int(state.batches), "done"
            batch = self._batch(batches)
            peak = train.DEVICES.get(jax.devices()[0].device_kind)
            while updates < total:
                boundary = min(
                    total, *(_next(updates, k) for k in (config.log_every, *events.values()) if k)
                )
                # A skipped, non-finite update leaves a step short of the boundary: the outer loop
                # goes round again. Only the boundary waits for the device.
                for _ in range(boundary - updates):
                    state, metrics = self.step(state, batch, self.hyper)
                    batches += 1
                    batch = self._batch(batches)
                    if self.stop.now():
                        break
                metrics = {name: float(v) for name, v in jax.device_get(metrics).items()}
                made, updates = int(state.updates) - updates, int(state.updates)
                self._report(progress, metrics, updates, made, peak)
                if metrics["skipped_in_row"] >= config.max_skipped:
                    status = "diverged"
                signalled = self.stop.anywhere()
                if signalled and updates < total:
                    status = "stopped"
                last = updates >= total or status != "done"
                if status == "done" and made and (last or updates % config.eval_every == 0):
                    validation, evaluated = self._evaluate(state, updates), updates
                    progress.event("eval")
                sampling = config.sample_every and (last or updates % config.sample_every == 0)
                if status == "done" and made and sampling:
                    self._sample(state, updates)
                    progress.event("sample")
                if last or (made and updates % config.save_every == 0):
                    # The best checkpoint is chosen by figures of its own weights or not at all.
                    self._save(saved, state, updates, validation if evaluated == updates else {})
                    progress.event("save")
                if status != "done":
                    break
            saved.wait()
            if status == "done" and not validation:
                validation = self._evaluate(state, updates)
            self._finish(state, status, updates, progress, validation)
        return Outcome(status, self.folder, updates, validation, signalled)

    def _report(
        self, progress: Progress, metrics: dict, updates: int, made: int, peak: train.Device | None
    ) -> None:
        seconds = progress.updates(made)
        rate = made * self.per_update / seconds if seconds > 0 else math.nan
        flops = train.flops_per_token(self.config.model, self.config.data.length)
        mfu = rate * flops / (peak.peak_flops * self.program.mesh.size) if peak else None
        eta = progress.eta()
        skipped = f"  skipped {metrics['skipped']:.0f}" if metrics["skipped"] else ""
        self.log.line(
            f"step {updates:>5}/{self.config.total_steps}  loss {metrics['loss']:.4f}  "
            f"ce {metrics['ce']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"gnorm {metrics['grad_norm']:.3f}  tok/s {rate:,.0f}  "
            f"MFU {'-' if mfu is None else f'{mfu:.1%}'}  "
            f"elapsed {duration(progress.elapsed())}  ETA {duration(eta)}{skipped}"
        )
        self.log.row(
            "train",
            {
                "step": updates,
                **metrics,
                "tokens_per_second": rate,
                "mfu": mfu,
                "elapsed": progress.elapsed(),
                "eta": eta,
            },
        )

    def _evaluate(self, state: train.State, updates: int) -> dict[str, float]:
        """Validation cross-entropy, bits per byte, copy rate; cosines and dead leaves."""
        sums = [
            jax.device_get(self.sums(state.params, batch, self.bytes_V))
            for batch in self.validation
        ]
        total = {name: np.sum([s[name] for s in sums], dtype=np.float64) for name in sums[0]}
        probe = jax.device_get(self.probe(state.params, self.probe_rows))
        check = audit.liveness(probe, self.config)
        figures = {
            "val_ce": float(total["nll"] / total["tokens"]),
            "val_bpb": float(total["nll"] / total["bytes"] / math.log(2)),
            "copy_rate": float(total["copy_rate"] / len(sums)),
            "repeat_rate": float(total["repeat_rate"] / len(sums)),
            "dead_leaves": sum(float(g) == 0 for g in probe["gradients"].values()),
        }
        means = {name: float(np.mean(probe[name])) for name in ("cosine_operand", "cosine_streams")}
        self.log.line(
            f"eval {updates:>5}  val ce {figures['val_ce']:.4f}  "
            f"{figures['val_bpb']:.4f} bits/byte  copy rate {figures['copy_rate']:.1%} "
            f"(data repeats {figures['repeat_rate']:.1%})  cosine mixed "
            f"{means['cosine_operand']:.3f} streams {means['cosine_streams']:.3f}  "
            f"leaves without gradient {figures['dead_leaves']}"
        )
        if check.status != "pass":
            self.log.line(f"warning: {check.text}")
        self.log.row("eval", {"step": updates, **figures, **probe, "streams": check.status})
        return figures

    def _generate(self, state: train.State, tokens: int) -> list[sample.Generation]:
        """Continue the fixed prompts, on a key of their own: training draws nothing from it."""
        return sample.generate(
            self.program.graphdef,
            state.params,
            self.config.model,
            self.corpus.tokenizer,
            PROMPTS,
            tokens=tokens,
            seed=self.config.seed,
        )

    def _sample(self, state: train.State, updates: int) -> None:
        made = self._generate(state, SAMPLE_TOKENS)
        for g in made:
            self.log.sample(f"--- update {updates}, prompt {g.prompt!r}\n{g.prompt}{g.text}\n")
        lines = (made[0].prompt + made[0].text).splitlines() or [""]
        self.log.line(f"sample {updates:>3}  {' / '.join(line.rstrip() for line in lines[:4])}")

    def _save(
        self, saved: checkpoint.Checkpoints, state: train.State, updates: int, validation: dict
    ) -> None:
        saved.wait()
        if (
            processes.agreed(saved.latest) == updates
        ):  # all updates since were skipped: that state is this one
            return
        meta = {
            "config": dataclasses.asdict(self.config),
            "connection": str(gpt.connection_of(self.config.model)),
            "corpus": self.corpus.sha256,
            "tokenizer": hashlib.sha256(self.tokenizer_json.encode()).hexdigest(),
            "data": {"seed": self.config.seed, "next_batch": int(state.batches)},
            "rng": {"seed": self.config.seed, "rule": "batches and init from the seed alone"},
            "versions": versions(),
            "validation": validation,
        }
        saved.save(updates, state, meta, metric=validation.get("val_ce"))

    def _finish(
        self,
        state: train.State,
        status: str,
        updates: int,
        progress: Progress,
        validation: dict,
    ) -> None:
        records = []
        if status == "done":
            trace = jax.jit(
                lambda p, t: nnx.merge(self.program.graphdef, p).trace(t)[0],
                out_shardings=sharding.replicated(self.program.mesh),
            )
            records = trace(state.params, self.traced_BT)
        if not processes.leads():
            return
        rows = read_rows(self.folder)
        summary = {
            "status": status,
            "updates": updates,
            "skipped": int(state.skipped),
            **validation,
            "elapsed": progress.elapsed() or max(r.get("elapsed", 0) for r in rows),
            "model": audit.model_name(self.config),
        }
        if status == "done":
            evals = [r for r in rows if r["kind"] == "eval"]
            mixes, cosines = [r.mix for r in records], evals[-1]["cosine_operand"]
            loss = plots.loss_figure({audit.model_name(self.config): rows})
            mixing = plots.mixing_figure(mixes, cosines, evals)
            loss.savefig(self.folder / "loss.png", dpi=120)
            mixing.savefig(self.folder / "mixing.png", dpi=120)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if status == "diverged":
            self.log.line(
                f"stopped: {self.config.max_skipped} non-finite updates in a row; the last good "
                "state is saved; lower the learning rate"
            )
        elif status == "stopped":
            self.log.line(f"stopped by a signal after {updates} updates; the state is saved")
        more = self.config.total_steps if updates < self.config.total_steps else 2 * updates
        folder = shlex.quote(str(self.folder))
        self.log.line(f"sample:  {self.command} sample {folder}")
        self.log.line(f"inspect: {self.command} inspect {folder}")
        self.log.line(
            f"resume:  {self.command} train --run {folder} --resume auto --total-steps {more}"
        )


def _next(updates: int, every: int) -> int:
    """The next multiple of `every` after `updates`."""
    return (updates // every + 1) * every
