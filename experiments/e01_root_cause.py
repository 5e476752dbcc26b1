"""e01: was alpha_logit = 5 the root cause of the Rust project's lost runs?

Question  Its status report names "alpha_logit initialized to 5.0" as the root cause of a model that
          predicted its own input, and alpha_logit = 0 as the fix. What did each ingredient of the
          old run do: alpha_logit 5, equal streams, a tied embedding, an embedding of std 1?
Expect    alpha has no part in it: with equal streams it has no gradient and no effect, so "old run"
          and "fix" agree. The start at loss 255 and the copying come from the tied embedding of
          std 1 alone.
          Both at the report's size: 6 layers, width 256, 20,000 steps of 256 tokens (as 1,250 of
          16 x 256), the vocabulary of the trained tokenizer, installed packages' sources.
Cost      8 cells a seed; --local under 90 s on 2 cores; 24 runs in 4.5 minutes on one H200.
Run       python -m experiments.run e01 --local
          python -m experiments.run e01 --seeds 0 1 2
"""

from __future__ import annotations

from experiments.cells import Cell, Experiment
from mhcjax.config import override, preset

SYMMETRIC = {"model.connection.init": "symmetric"}
BALANCED = {"model.connection.init": "balanced"}
# |loss0 - ln V| > 1 is the finding; the run must be let start.
STD_1 = {"model.embedding_std": 1.0, "allow_loss0": True}
TIED = {"model.tied": True}

EXPERIMENT = Experiment(
    name="e01",
    title="Was alpha_logit = 5 the root cause?",
    base=override(
        preset("d20"),
        {
            "data.corpus": "packages",
            "model.vocab": 8192,
            "model.tied": False,
            "model.dtype": "bfloat16",
            # Samples at 50 and 75 % of the run.
            "eval_every": 312,
            "sample_every": 312,
            "save_every": 1250,
            **BALANCED,
        },
    ),
    cells=(
        Cell("base", BALANCED),
        Cell("near_identity", {"model.connection.init": "near_identity"}),
        Cell("alpha_5", {**BALANCED, "model.connection.alpha_logit": 5.0}),
        Cell("symmetric", SYMMETRIC),
        Cell("tied", {**BALANCED, **TIED}),
        Cell("std_1", {**BALANCED, **STD_1}),
        Cell("old_run", {**SYMMETRIC, "model.connection.alpha_logit": 5.0, **TIED, **STD_1}),
        Cell("fix", {**SYMMETRIC, "model.connection.alpha_logit": 0.0, **TIED, **STD_1}),
    ),
    local={
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 2,
        "model.hidden": 96,
        "model.dtype": "float32",
        "data.corpus": "stdlib",
        "model.vocab": 512,
        "model.context": 64,
        "data.batch": 4,
        "data.length": 64,
        "total_steps": 20,
        "log_every": 10,
        "eval_every": 5,
        "eval_batches": 2,
        "sample_every": 5,
        "save_every": 20,
        "optim.warmup_steps": 5,
    },
)
