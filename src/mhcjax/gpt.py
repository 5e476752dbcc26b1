"""The model: a decoder-only transformer whose every sublayer goes through `connect`.

NNX modules are the shell: `build` splits them once into a graph definition and a plain dict of
parameters; train state, optimizer and checkpoints hold that dict, and a jitted function calls
`nnx.merge(graphdef, params)`. Blocks are stored stacked, `[L, ...]`; scan or loop only decides how
they are walked. No mixing mathematics in this file.

Axis key: B batch, T position, S cached position, D width, N stream, E = N*D or D, projected to C
columns by a dynamic mix, H head, K head size, F hidden, V vocabulary, L block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mhcjax import connections, ends, head, kernels, layers, presets, sharding
from mhcjax.config import ModelConfig, check_ranges
from mhcjax.layers import rms_norm
from mhcjax.spec import Connection, init

__all__ = [
    "AXES",
    "GPT",
    "Cache",
    "Sublayer",
    "abstract_params",
    "build",
    "connection_of",
    "count",
    "empty_cache",
    "graph",
    "group_size",
    "sublayer_leaves",
]

# Axis letters of every parameter that a mesh may split, by its name.
AXES = {
    "embedding": "VD",
    "head": "DV",
    "query": "LDHK",
    "key": "LDHK",
    "value": "LDHK",
    "out": "LHKD",
    "gate": "LDF",
    "up": "LDF",
    "down": "LFD",
    "projection": "LEC",
}


_NAMED = jax.checkpoint_policies.save_only_these_names(layers.BRANCH, kernels.MIX)


def _keeps_branches(primitive: Any, *avals: Any, **params: Any) -> bool:
    """What stays where streams alone are made again: what branches name, the mixes, and what cuDNN
    made in JAX's dot_product_attention_fwd. Other attention is made again, and the writes."""
    return _NAMED(primitive, *avals, **params) or "attention_fwd" in primitive.name


VOCAB_MULTIPLE = 128  # storage of the vocabulary is padded to this
SUBLAYERS = ("attention", "mlp")  # of one block, in order: sublayer 2b and 2b + 1


class Cache(NamedTuple):
    """Keys and values of all blocks, `[L, B, S, H, K]`; empty positions are never attended to."""

    key: jax.Array
    value: jax.Array


class Sublayer(NamedTuple):
    """What `GPT.trace` records: the streams before it, what res mixes, the mix, f's output."""

    x: jax.Array
    operand: jax.Array
    mix: connections.Mix
    y: jax.Array


def connection_of(config: ModelConfig) -> Connection:
    """The connection that the config names.

    >>> connection_of(ModelConfig()).streams
    2
    """
    c = config.connection
    names = ("init", "alpha_logit", "streams", "rule", "entry", "exit")
    options = {name: getattr(c, name) for name in names if getattr(c, name) is not None}
    if "layers" in presets.takes(c.preset):  # of sublayers: those of this model
        options["layers"] = 2 * config.layers
    return presets.named(c.preset, **options)


def _normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: Any) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(key, shape, dtype))


class Attention(nnx.Module):
    """Causal grouped-query attention; key and value head = query head // group."""

    def __init__(self, config: ModelConfig, gain: float, *, key: jax.Array) -> None:
        D, H, kv = config.width, config.heads, config.kv_heads or config.heads
        K, L, dtype = D // H, config.layers, _param_dtype(config)
        keys = jax.random.split(key, 4)
        self.config = config
        self.query = _normal(keys[0], (L, D, H, K), D**-0.5, dtype)
        self.key = _normal(keys[1], (L, D, kv, K), D**-0.5, dtype)
        self.value = _normal(keys[2], (L, D, kv, K), D**-0.5, dtype)
        self.out = _normal(keys[3], (L, H, K, D), gain * (H * K) ** -0.5 / (2 * L) ** 0.5, dtype)

    def __call__(
        self, u_BTD: jax.Array, positions_BT: jax.Array, cache: Cache | None, layer: Any
    ) -> tuple[jax.Array, Cache | None]:
        u_BTD = sharding.fan_out(u_BTD)
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", u_BTD, w[...].astype(u_BTD.dtype))
            for w in (self.query, self.key, self.value)
        )
        v = layers.kept(v)
        base, norm = self.config.rope_base, self.config.qk_norm
        q, k = layers.rope(q, positions_BT, base, norm), layers.rope(k, positions_BT, base, norm)
        if cache is None:
            how: dict[str, Any] = {"is_causal": True}
            if sharding.ways("sequence") > 1:
                k, v = (layers.kept(sharding.all_positions(a)) for a in (k, v))
                how = {"mask": jnp.arange(k.shape[1]) <= positions_BT[:, None, :, None]}
            y = layers.kept(layers.attend(q, k, v, **how))
        else:
            rows = jnp.arange(q.shape[0])[:, None]
            cache = Cache(
                cache.key.at[layer, rows, positions_BT].set(k.astype(cache.key.dtype)),
                cache.value.at[layer, rows, positions_BT].set(v.astype(cache.value.dtype)),
            )
            seen = jnp.arange(cache.key.shape[2]) <= positions_BT[:, None, :, None]
            # A query is one token: cuDNN has nothing to gain.
            y = layers.attend(q, cache.key[layer], cache.value[layer], mask=seen, fused=False)
        y = jnp.einsum("bthk,hkd->btd", y, self.out[...].astype(u_BTD.dtype))
        return layers.kept(sharding.total(y)), cache


class MLP(nnx.Module):
    """`down(relu(up(u))^2)` (arXiv 2109.08668), or SwiGLU `down(silu(gate(u)) * up(u))`."""

    def __init__(self, config: ModelConfig, gain: float, *, key: jax.Array) -> None:
        D, F, L, dtype = config.width, _hidden(config), config.layers, _param_dtype(config)
        keys = jax.random.split(key, 3)
        if config.mlp == "swiglu":
            self.gate = _normal(keys[0], (L, D, F), D**-0.5, dtype)
        self.gated = config.mlp == "swiglu"
        self.up = _normal(keys[1], (L, D, F), D**-0.5, dtype)
        self.down = _normal(keys[2], (L, F, D), gain * F**-0.5 / (2 * L) ** 0.5, dtype)

    def __call__(self, u_BTD: jax.Array) -> jax.Array:
        u_BTD = sharding.fan_out(u_BTD)
        up = layers.kept(u_BTD @ self.up[...].astype(u_BTD.dtype))
        if self.gated:
            gate = layers.kept(u_BTD @ self.gate[...].astype(u_BTD.dtype))
            hidden = jax.nn.silu(gate) * up
        else:
            hidden = jnp.square(jax.nn.relu(up))
        hidden = layers.kept(hidden)
        return layers.kept(sharding.total(hidden @ self.down[...].astype(u_BTD.dtype)))


class Block(nnx.Module):
    """Attention and MLP, each behind its own connection."""

    def __init__(self, config: ModelConfig, spec: Connection, *, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.spec, self.implementation = spec, config.connection.implementation
        self.attention = Attention(config, spec.output_gain, key=keys[0])
        self.mlp = MLP(config, spec.output_gain, key=keys[1])
        self.attention_connection = _connection_params(config, spec, 0, key=keys[2])
        self.mlp_connection = _connection_params(config, spec, 1, key=keys[3])

    def sublayers(
        self, positions_BT: jax.Array, cache: Cache | None, layer: Any
    ) -> Iterator[tuple[str, connections.Params, Callable]]:
        """(name, parameters of the connection, f with its pre-norm; f returns (y, cache))."""

        def attention(u: jax.Array) -> tuple[jax.Array, Cache | None]:
            return self.attention(rms_norm(u), positions_BT, cache, layer)

        def mlp(u: jax.Array) -> tuple[jax.Array, None]:
            return self.mlp(rms_norm(u)), None

        for name, f in zip(SUBLAYERS, (attention, mlp), strict=True):
            params = getattr(self, f"{name}_connection")
            yield name, {leaf: param[...] for leaf, param in params.items()}, f

    def connect(
        self, params: connections.Params, f: Callable, x: jax.Array, u: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """(streams, what the next sublayer reads where pre is carried, what f returns beside)."""
        how: dict[str, Any] = {"has_aux": True, "implementation": self.implementation}
        if self.spec.carried:
            return connections.connect_single_pass(self.spec, params, f, x, u, **how)
        x, aux = connections.connect(self.spec, params, f, x, **how)
        return x, None, aux

    def __call__(
        self,
        x: jax.Array,
        u: jax.Array | None,
        positions_BT: jax.Array,
        cache: Cache | None,
        layer: Any,
    ) -> tuple[jax.Array, jax.Array | None, Cache | None]:
        for name, params, f in self.sublayers(positions_BT, cache, layer):
            with jax.named_scope(name):
                x, u, aux = self.connect(params, f, x, u)
            cache = aux if name == "attention" else cache
        return x, u, cache


def _connection_params(
    config: ModelConfig, spec: Connection, offset: int, *, key: jax.Array
) -> nnx.Dict:
    """The connection of sublayer `offset` of every block, stacked."""
    layers = [
        init(
            spec,
            width=config.width,
            layer=2 * block + offset,
            layers=2 * config.layers,
            key=jax.random.fold_in(key, block),
            dtype=_param_dtype(config),
        )
        for block in range(config.layers)
    ]
    return nnx.Dict({name: nnx.Param(jnp.stack([p[name] for p in layers])) for name in layers[0]})


class GPT(nnx.Module):
    """Embedding, stacked blocks on N streams, final norm, head."""

    def __init__(self, config: ModelConfig, *, key: jax.Array) -> None:
        _check(config)
        keys = jax.random.split(key, 4)
        V, D, dtype = _padded(config.vocab), config.width, _param_dtype(config)
        self.config = config
        self.spec = connection_of(config)
        self.embedding = _normal(keys[0], (V, D), config.embedding_std, dtype)
        self.blocks = Block(config, self.spec, key=keys[1])
        if not config.tied:
            self.head = _normal(keys[2], (D, V), config.embedding_std, dtype)
        own = ends.init_ends(self.spec, width=D, key=keys[3], dtype=dtype)
        self.entry = nnx.Dict({name: nnx.Param(a) for name, a in own["entry"].items()})
        self.exit = nnx.Dict({name: nnx.Param(a) for name, a in own["exit"].items()})

    def _enter(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Tokens -> (streams x[B, T, N, D], what the first sublayer reads where pre is carried)."""
        dtype = jnp.dtype(self.config.dtype)
        u_BTD = _look_up(self.embedding[...], tokens_BT, dtype)
        params = {name: p[...] for name, p in self.entry.items()}
        x = ends.expand(u_BTD, self.spec.streams, self.spec.entry, params)
        return x, x[..., 0, :] if self.spec.carried else None

    def features(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Tokens -> (what the head reads, h[B, T, D], cache).

        With a cache, keys and values are written at `positions_BT` and every position up to a
        query's own is attended to: prefill and single-token decode are this one call.
        """
        positions = _positions(tokens_BT) if positions_BT is None else positions_BT
        graphdef, stacked = nnx.split(self.blocks, nnx.Param)

        def run(params: Any, layer: Any, x: jax.Array, u: Any, cache: Cache | None) -> tuple:
            return nnx.merge(graphdef, params)(x, u, positions, cache, layer)

        if self.config.remat:
            run = jax.checkpoint(run)
        elif self.config.remat_streams and self.config.walk == "scan":
            run = jax.checkpoint(run, policy=_keeps_branches)
        x, u = self._enter(tokens_BT)
        if self.config.walk == "loop":
            blocks = list(enumerate(_unstack(stacked, self.config.layers)))
            size = group_size(self.config) if self.config.remat_streams else len(blocks)
            for first in range(0, len(blocks), size):
                group = blocks[first : first + size]

                def several(
                    params: list, x: jax.Array, u: Any, cache: Cache | None, first: int = first
                ) -> tuple:
                    for layer, own in enumerate(params, first):
                        x, u, cache = run(own, layer, x, u, cache)
                    return x, u, cache

                if self.config.remat_streams:
                    several = jax.checkpoint(several, policy=_keeps_branches)
                x, u, cache = several([own for _, own in group], x, u, cache)
        else:

            def step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
                return run(*inputs, *carry), None

            layers = jnp.arange(self.config.layers)
            (x, u, cache), _ = jax.lax.scan(step, (x, u, cache), (stacked, layers))
        return self._leave(x, u), cache

    def _leave(self, x: jax.Array, u: jax.Array | None) -> jax.Array:
        if u is not None and self.spec.exit == "last_pre":
            return rms_norm(u)
        params = {name: p[...] for name, p in self.exit.items()}
        how = self.config.connection.implementation
        return rms_norm(ends.collapse(x, self.spec.exit, params, implementation=how))

    @property
    def head_spec(self) -> head.Head:
        """What the head is besides its weight."""
        return head.Head(self.config.vocab, self.config.soft_cap)

    def head_weight(self) -> jax.Array:
        """[D, V]; the embedding, transposed, where it is tied."""
        return self.embedding[...].T if self.config.tied else self.head[...]

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """Logits over the vocabulary, [B, T, V], in at least float32."""
        return head.logits(h_BTD, self.head_weight(), self.head_spec)[..., : self.config.vocab]

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Training forward: tokens[B, T] -> logits[B, T, V]."""
        return self.logits(self.features(tokens_BT)[0])

    def trace(self, tokens_BT: jax.Array) -> tuple[list[Sublayer], jax.Array]:
        """Every sublayer's streams, operand of res, mix and output, and the streams at the exit."""
        positions = _positions(tokens_BT)
        graphdef, stacked = nnx.split(self.blocks, nnx.Param)
        x, u = self._enter(tokens_BT)
        records = []
        for layer, own in enumerate(_unstack(stacked, self.config.layers)):
            block = nnx.merge(graphdef, own)
            for _, params, f in block.sublayers(positions, None, layer):
                m = connections.mix(self.spec, params, x, implementation=block.implementation)
                after, u, y = block.connect(params, partial(_twice, f), x, u)
                mixed = connections.operand(x, y, m, rule=self.spec.rule)
                records.append(Sublayer(x, mixed, m, y))
                x = after
        return records, x


def group_size(config: ModelConfig) -> int:
    """Blocks between two streams that are kept where streams alone are made again, 1 in a scan:
    sqrt(N L / (N + 2)) of L sublayers (mHC, arXiv 2512.24880).

    >>> group_size(ModelConfig(layers=24)), group_size(ModelConfig(layers=24, walk="scan"))
    (2, 1)
    """
    N = connection_of(config).streams
    return 1 if config.walk == "scan" else max(1, round(math.sqrt(N * config.layers / (2 * N + 4))))


def _unstack(stacked: Any, layers: int) -> list[Any]:
    """The parameters of each block. The transpose of unstack is one stack; that of indexing would
    be a padded array per block, summed."""
    leaves, treedef = jax.tree.flatten(stacked)
    parts = [jnp.unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [part[l] for part in parts]) for l in range(layers)]


def _look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the embedding, [B, T, D]; where `model` splits it, from the part that holds each."""
    # Looked up before it is narrowed: the gradient is then added up in the dtype of the
    # parameters, and frequent tokens do not queue for bfloat16 atomics.
    if sharding.ways("model") == 1:
        return table_VD[tokens_BT].astype(dtype)
    rows = tokens_BT - sharding.first_of(table_VD.shape[0])
    own = (rows >= 0) & (rows < table_VD.shape[0])
    found = table_VD[jnp.where(own, rows, 0)].astype(dtype)
    return sharding.total(jnp.where(own[..., None], found, 0))


def _twice(f: Callable, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f's output, also as the auxiliary value."""
    y, _ = f(u)
    return y, y


def _positions(tokens_BT: jax.Array) -> jax.Array:
    """[1, T]: the same for every row, in the whole row where `sequence` splits it."""
    positions = jnp.arange(tokens_BT.shape[1])[None]
    if sharding.ways("sequence") == 1:
        return positions
    return positions + sharding.first_of(tokens_BT.shape[1], "sequence")


def _param_dtype(config: ModelConfig) -> Any:
    """Parameters are float32 whatever the activations are, float64 in float64 runs."""
    return jnp.float64 if config.dtype == "float64" else jnp.float32


def _padded(vocab: int) -> int:
    return -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _hidden(config: ModelConfig) -> int:
    if config.hidden is not None:
        return config.hidden
    return 4 * config.width if config.mlp == "relu2" else -(-8 * config.width // 3 // 64) * 64


def _check(config: ModelConfig) -> None:
    """One sentence for every config that cannot be a model."""
    kv = config.kv_heads or config.heads
    check_ranges(config, "model.")
    if config.width % config.heads or (config.width // config.heads) % 2:
        raise ValueError(
            f"model.width {config.width} over {config.heads} heads is no even head size: "
            "make width a multiple of 2 * heads"
        )
    if config.heads % kv:
        raise ValueError(
            f"model.kv_heads {kv} does not divide the {config.heads} heads: use one of "
            f"{[k for k in range(1, config.heads + 1) if config.heads % k == 0]}"
        )


# --------------------------------------------------------------------------------------------------
# Models as (graph definition, plain dict of parameters)


def build(config: ModelConfig, *, key: jax.Array) -> tuple[nnx.GraphDef, dict]:
    """A model's graph definition and its freshly drawn parameters as a plain dict.

    `nnx.merge(graphdef, params)` is the model again, inside a jitted function or outside.

    >>> graphdef, params = build(ModelConfig(layers=1, width=8, vocab=16), key=jax.random.key(0))
    >>> nnx.merge(graphdef, params)(jnp.zeros((1, 3), int)).shape
    (1, 3, 16)

    Raises ValueError for a config that cannot be a model.
    """
    graphdef, state = nnx.split(GPT(config, key=key), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def graph(config: ModelConfig) -> nnx.GraphDef:
    """The graph definition alone; no parameter is allocated.

    >>> isinstance(graph(ModelConfig()), nnx.GraphDef)
    True
    """
    model = nnx.eval_shape(lambda: GPT(config, key=jax.random.key(0)))
    return nnx.split(model, nnx.Param)[0]


def abstract_params(config: ModelConfig) -> dict:
    """Shapes and dtypes of the parameters; none is allocated.

    >>> abstract_params(ModelConfig())["blocks"]["mlp"]["up"].shape
    (4, 128, 512)
    """
    return jax.eval_shape(lambda: build(config, key=jax.random.key(0))[1])


def count(params: Any) -> int:
    """Sum of the sizes of the leaves.

    >>> count({"a": jnp.zeros((2, 3)), "b": jnp.zeros(())})
    7
    """
    return sum(math.prod(a.shape) for a in jax.tree.leaves(params))


def empty_cache(config: ModelConfig, batch: int) -> Cache:
    """A KV cache for `batch` sequences of up to `config.context` tokens.

    >>> empty_cache(ModelConfig(), 2).key.shape
    (4, 2, 128, 4, 32)
    """
    kv = config.kv_heads or config.heads
    shape = (config.layers, batch, config.context, kv, config.width // config.heads)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def sublayer_leaves(tree: Any, config: ModelConfig) -> Iterator[tuple[int, str, str, jax.Array]]:
    """(sublayer, its name, leaf name, leaf) of every mixing leaf of a tree shaped like the params.

    >>> params = build(ModelConfig(layers=1, width=8, vocab=16), key=jax.random.key(0))[1]
    >>> [(l, name, leaf) for l, name, leaf, _ in sublayer_leaves(params, ModelConfig(layers=1))][0]
    (0, 'attention', 'alpha_logit')
    """
    for block in range(config.layers):
        for offset, name in enumerate(SUBLAYERS):
            # A connection without parameters has no place in the tree.
            for leaf, stacked in sorted(tree["blocks"].get(f"{name}_connection", {}).items()):
                yield 2 * block + offset, name, leaf, stacked[block]
