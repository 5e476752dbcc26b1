"""mhcjax: hyper-connections for JAX. The pure core is re-exported here.

    manifolds      logits -> res matrix                 kernels      fused array operations
    connections    Connection, mix, read, write         presets      named points of the family
    diagnostics    marginals, gains, cosines            testing      conformance suite for manifolds
    config         dataclasses, overrides, JSON         sharding     the mesh, axes -> specs
    layers, head   norm, rotary, attention; the loss    kernels      raw read and write
    gpt            the NNX model                        sample       prefill, decode, generate
    corpora        documents and their split            tokenizer    byte and BPE, text <-> ids
    tokens, data   text -> shards -> batches            optim        optimizer, schedule, groups
    train, loop    the step; fit(config, folder)        checkpoint   save, restore, strict
    runlog, runs   a run's folder: write it, open it    plots        the pictures of a run
    audit          diagnose, inspect, info

Axis key: B batch, T position, S cached position, D width, N source stream, M destination stream,
E = N * D flattened, J mixing logits, H head, K head size, F hidden, V vocabulary, L layer,
P permutation. Arrays wear the letters of their axes (`x_BTND`, `res_MN`).
"""

from mhcjax import presets
from mhcjax.connections import (
    Connection,
    Fixed,
    Init,
    Mix,
    Static,
    collapse,
    connect,
    convert_params,
    convert_rule,
    expand,
    init,
    init_ends,
    mix,
    mix_and_read,
    operand,
    read,
    write,
)
from mhcjax.diagnostics import (
    CopyRate,
    Gain,
    composite_gain,
    copy_rate,
    dead_leaves,
    effective_streams,
    entropy,
    identity_distance,
    marginal_error,
    stream_cosine,
    zero_leaves,
)
from mhcjax.manifolds import (
    MANIFOLDS,
    Identity,
    Manifold,
    Marginals,
    Permutations,
    Unconstrained,
)

__version__ = "0.1.0"

__all__ = [
    "MANIFOLDS",
    "Connection",
    "CopyRate",
    "Fixed",
    "Gain",
    "Identity",
    "Init",
    "Manifold",
    "Marginals",
    "Mix",
    "Permutations",
    "Static",
    "Unconstrained",
    "collapse",
    "composite_gain",
    "connect",
    "convert_params",
    "convert_rule",
    "copy_rate",
    "dead_leaves",
    "effective_streams",
    "entropy",
    "expand",
    "identity_distance",
    "init",
    "init_ends",
    "marginal_error",
    "mix",
    "mix_and_read",
    "operand",
    "presets",
    "read",
    "stream_cosine",
    "write",
    "zero_leaves",
]
