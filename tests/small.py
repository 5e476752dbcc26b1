"""Configs of the small runs that several test files make: one shape, one compilation."""

# A model that learns the synthetic language in seconds. One device of the eight forced ones.
TWO_LAYERS = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.vocab": 257,
    "model.context": 48,
    "data.corpus": "synthetic",
    "data.tokenizer": "byte",
    "data.batch": 16,
    "data.length": 48,
    "mesh.data": 1,
}
# The least that is a run.
ONE_LAYER = {
    "eval_batches": 2,
    "sample_every": 0,
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.vocab": 257,
    "model.context": 32,
    "data.corpus": "synthetic",
    "data.tokenizer": "byte",
    "data.batch": 4,
    "data.length": 32,
    "mesh.data": 1,
    "optim.warmup_steps": 2,
}
