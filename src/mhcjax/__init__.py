"""mhcjax: hyper-connections for JAX. The pure core is re-exported here.

    manifolds      logits -> res matrix                 kernels      fused read, write, coefficients
    coefficients   where logits come from               spec         Connection, init
    connections    mix, read, write, connect
    ends, rules    expand, collapse; the other rule     presets      named points of the family
    converters     others' weights, in and out          diagnostics  marginals, gains, cosines
    testing        conformance suite for manifolds
    config         dataclasses, overrides, JSON         sharding     the mesh, axes -> specs
    layers, head   norm, rotary, attention; the loss    gpt          the NNX model
    sample         prefill, decode, generate
    corpora        documents and their split            tokenizer    byte and BPE, text <-> ids
    tokens, data   text -> shards -> batches            optim        optimizer, schedule, groups
    train, loop    the step; fit(config, folder)        checkpoint   save, restore, strict
    runlog, runs   a run's folder: write it, open it    plots        the pictures of a run
    costs, plan    a mesh on paper                      audit        diagnose, inspect, info
    processes      one run in several processes         cluster      who they are, who is gone

Axis key: B batch, T position, S cached position, D width, N source stream, M destination stream,
E = N * D flattened, J mixing logits, H head, K head size, F hidden, V vocabulary, L layer,
P permutation. Arrays wear the letters of their axes (`x_BTND`, `res_MN`).
"""

from mhcjax import presets
from mhcjax.coefficients import Dynamic, Fixed, Init, Norm, Static
from mhcjax.connections import (
    Mix,
    connect,
    connect_carried,
    connect_single_pass,
    first_pre,
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
from mhcjax.ends import collapse, expand, init_ends
from mhcjax.manifolds import (
    MANIFOLDS,
    Circulant,
    Identity,
    Kronecker,
    Manifold,
    Marginals,
    NewtonSchulz,
    NewtonSinkhorn,
    Orthogonal,
    Orthostochastic,
    Permutations,
    Quaternion,
    Sinkhorn,
    SpectralSphere,
    Transportation,
    Transposed,
    Unconstrained,
)
from mhcjax.rules import convert_params, convert_rule
from mhcjax.spec import Connection, LearnedHead, init

__version__ = "0.1.0"

__all__ = [
    "MANIFOLDS",
    "Circulant",
    "Connection",
    "CopyRate",
    "Dynamic",
    "Fixed",
    "Gain",
    "Identity",
    "Init",
    "Kronecker",
    "LearnedHead",
    "Manifold",
    "Marginals",
    "Mix",
    "NewtonSchulz",
    "NewtonSinkhorn",
    "Norm",
    "Orthogonal",
    "Orthostochastic",
    "Permutations",
    "Quaternion",
    "Sinkhorn",
    "SpectralSphere",
    "Static",
    "Transportation",
    "Transposed",
    "Unconstrained",
    "collapse",
    "composite_gain",
    "connect",
    "connect_carried",
    "connect_single_pass",
    "convert_params",
    "convert_rule",
    "copy_rate",
    "dead_leaves",
    "effective_streams",
    "entropy",
    "expand",
    "first_pre",
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
