"""One of several processes that work through a list of jobs: `python process_worker.py FOLDER N I`.

FOLDER/jobs.json holds the jobs, as keyword arguments of `work`; each leaves NAME.npz (what all of
them agree on) and NAME-I.npz (what process I read). A pair of processes serves many jobs, so that
the price of starting is paid once. A test calls `work` itself for the run to compare with.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from mhcjax import checkpoint, cluster, data, loop, optim, processes, train
from mhcjax.config import Config, ConnectionConfig, DataConfig, MeshConfig, ModelConfig, OptimConfig

VOCAB = 120
TOKENS = np.random.default_rng(5).integers(VOCAB, size=4000).astype(np.uint16)
# Rates at which twenty steps move the parameters far beyond the tolerances.
RATES = {"sgd": 0.5, "adamw": 0.01, "muon": 0.02}


def config_of(optimizer, dtype, mesh, micro_batches):
    """All sizes divide by every mesh of eight devices."""
    across, model, shard_params, *sequence = mesh
    return Config(
        seed=3,
        model=ModelConfig(
            layers=1,
            width=16,
            heads=4,
            hidden=32,
            vocab=VOCAB,
            context=8,
            dtype=dtype,
            connection=ConnectionConfig(preset="mhc_n2", init="near_identity"),
        ),
        data=DataConfig(batch=8, length=8, micro_batches=micro_batches),
        # No clipping: it would hide a gradient that is wrong by a factor.
        optim=OptimConfig(
            name=optimizer,
            learning_rate=RATES[optimizer],
            weight_decay=0.1,
            clip=0.0,
            schedule="constant",
            warmup_steps=0,
        ),
        mesh=MeshConfig(across, *(sequence or [1]), model, shard_params),
    )


def work(
    folder,
    name,
    *,
    optimizer="sgd",
    dtype="float32",
    mesh=(8, 1, False),
    micro_batches=1,
    steps=20,
    restore=None,
    save=None,
    wrong_rows=False,
):
    """Train a little, or go on from the checkpoint `restore`; `save` writes one. `wrong_rows`: this
    process reads the rows of another."""
    honest, read = data.batch, []

    def spy(*args, rows, **named):
        start, stop, _ = rows.indices(named["batch"])
        if wrong_rows:
            start, stop = (at - named["batch"] // 2 for at in (start, stop))
        read.append((start, stop))
        return honest(*args, rows=slice(start, stop), **named)

    with jax.enable_x64(True) if dtype == "float64" else nullcontext():
        program = train.program(config_of(optimizer, dtype, mesh, micro_batches))
        state = (
            program.init(jax.random.key(0))
            if restore is None
            else checkpoint.restore(restore, program.abstract_state)[0]
        )
        before = leaves_of(state)
        scalars, losses, shards = optim.hyper(program.config.optim, 100), [], {}
        data.batch = spy
        try:
            for step in range(steps):
                batch = loop.read_batch(TOKENS, program, int(state.batches))
                for shard in batch.addressable_shards:
                    at = shard.index[1].indices(batch.shape[1])[0]
                    shards[f"{step}/{at}"] = np.asarray(shard.data)
                state, metrics = program.train_step(state, batch, scalars)
                losses.append(float(metrics["loss"]))
        finally:
            data.batch = honest
        after = leaves_of(state)
        if save is not None:
            with checkpoint.Checkpoints(save) as checkpoints:
                checkpoints.save(steps, state, {})
    np.savez(folder / f"{name}-{jax.process_index()}.npz", read=np.array(read), **shards)
    if processes.leads():
        states = {f"before/{path}": leaf for path, leaf in before.items()}
        states |= {f"after/{path}": leaf for path, leaf in after.items()}
        np.savez(folder / f"{name}.npz", losses=np.array(losses), **states)


def leaves_of(state):
    """{path: the whole leaf}"""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): processes.whole(leaf)
        for path, leaf in found
    }


if __name__ == "__main__":
    folder, count, index = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cluster.join((folder / "coordinator").read_text(), count, index, heartbeat=10)
    for job in json.loads((folder / "jobs.json").read_text()):
        wrong = job.pop("wrong_rows_of", None)
        work(folder, wrong_rows=wrong == index, **job)
    cluster.leave()
