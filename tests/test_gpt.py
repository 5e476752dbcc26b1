"""The model: one computation in training, prefill and decoding, and the architecture it claims.

The whole model once more in NumPy float64 (`numpy_logits`, on top of tests/oracle.py) holds the
architecture; parity holds that sampling runs the same computation; the walk through the jaxprs
holds that each connection in it is the jitted functions of connections.py and nothing else.
"""

import inspect
import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.interpreters.partial_eval import dce_jaxpr

import mhcjax as mhc
from mhcjax import connections, gpt, head, layers, optim, presets, sample, train
from mhcjax.config import Config, DataConfig, ModelConfig, OptimConfig
from mhcjax.sharding import make_mesh
from mhcjax.spec import Connection

# Storage is padded from 120 to 128 tokens.
SMALL = ModelConfig(layers=2, width=32, heads=4, vocab=120, context=64)
RULES = ("add_first", "mix_first")


@pytest.fixture
def build(monkeypatch):
    """build(config, spec) -> (graphdef, params): a model on any connection, preset or not."""

    def make(config, spec=None, seed=0):
        if spec is not None:
            monkeypatch.setattr(gpt, "connection_of", lambda _: spec)
        return gpt.build(config, key=jax.random.key(seed))

    return make


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens_BT):
    """The training forward."""
    return nnx.merge(graphdef, params)(tokens_BT)


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1)
def loss_and_gradients(graphdef, params, tokens_BT):
    return train.losses(nnx.merge(graphdef, params), tokens_BT)[0]


def redraw(params, seed=1):
    """The same tree with every mixing logit drawn with std 1."""
    rng = np.random.default_rng(seed)
    blocks = dict(params["blocks"])
    for name in ("attention_connection", "mlp_connection"):
        if name in blocks:  # the plain residual has none
            blocks[name] = {
                leaf: jnp.asarray(rng.normal(size=a.shape), a.dtype)
                for leaf, a in blocks[name].items()
            }
    return {**params, "blocks": blocks}


def unit_logits(graphdef, params, tokens_BT, config):
    """Scale what makes the logits until their std is 1. Tied, it changes the input too: iterate."""
    name = "embedding" if config.tied else "head"
    for _ in range(6):
        std = float(jnp.std(forward(graphdef, params, tokens_BT)))
        params = {**params, name: params[name] / std}
    assert abs(float(jnp.std(forward(graphdef, params, tokens_BT))) - 1) < 1e-2
    return params


def random_tokens(batch, length, vocab, seed=2):
    return np.random.default_rng(seed).integers(vocab, size=(batch, length)).astype(np.int32)


def close(found, wanted, tolerance):
    """max |difference| <= tolerance * max(1, max |wanted|); -> the left side over the right one."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape and np.isfinite(found).all()
    error = np.abs(found - wanted).max() / max(1, np.abs(wanted).max())
    assert error <= tolerance, f"{error:.3g} > {tolerance:.3g}"
    return error


# --------------------------------------------------------------------------------------------------
# Parity: training forward = prefill = token by token

CONNECTIONS = {
    "residual": presets.residual(),
    "1": Connection(streams=1),
    "2": Connection(streams=2),
    "4": Connection(streams=4),
}
CASES = list(itertools.product(CONNECTIONS, RULES, (False, True), (4, 2), (1, 3)))
# Every pair of values of every two axes occurs in these; --slow runs the full product.
QUICK = {
    ("residual", "add_first", False, 4, 1),
    ("residual", "mix_first", True, 2, 3),
    ("1", "add_first", True, 4, 3),
    ("1", "mix_first", False, 2, 1),
    ("2", "add_first", False, 2, 3),
    ("2", "mix_first", True, 4, 1),
    ("4", "add_first", True, 2, 1),
    ("4", "mix_first", False, 4, 3),
}


def test_quick_cases_cover_all_pairs():
    assert set(CASES) >= QUICK
    for a, b in itertools.combinations(range(5), 2):
        assert {(c[a], c[b]) for c in QUICK} == {(c[a], c[b]) for c in CASES}, (a, b)


@pytest.mark.parametrize(
    ("streams", "rule", "tied", "kv_heads", "batch"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_parity(build, streams, rule, tied, kv_heads, batch):
    """Float32 in another order of summation, about 1e-7 an operation, some 30 in a row: 1e-5."""
    config = replace(SMALL, tied=tied, kv_heads=kv_heads)
    spec = replace(CONNECTIONS[streams], rule=rule)
    graphdef, params = build(config, spec)
    sequences = random_tokens(-(-256 // (64 * batch)) * batch, 64, config.vocab)
    assert sequences.size >= 256
    params = unit_logits(graphdef, redraw(params), sequences[:batch], config)

    errors, agree = [], True
    for tokens in np.split(sequences, len(sequences) // batch):
        full = np.asarray(forward(graphdef, params, tokens))

        # Token by token from an empty cache.
        cache, steps = gpt.empty_cache(config, batch), []
        for t in range(64):
            at = np.full(batch, t, np.int32)
            logits, cache = sample.decode_step(graphdef, params, tokens[:, t], at, cache)
            steps.append(logits)
        decoded = np.stack(steps, axis=1)

        # Prefill of every length, each row its own: the padding after it must not matter.
        prefilled = np.empty_like(full)
        for t in range(64):
            lengths = (t + 17 * np.arange(batch)) % 64 + 1
            padded = np.where(np.arange(64) < lengths[:, None], tokens, 7)
            logits, cache = sample.prefill(
                graphdef, params, padded, lengths.astype(np.int32), gpt.empty_cache(config, batch)
            )
            prefilled[np.arange(batch), lengths - 1] = logits
            if t in (0, 20, 45):  # and on from there, the rows at different positions
                for _ in range(5):
                    rows = np.flatnonzero(lengths < 64)
                    at = np.minimum(lengths, 63).astype(np.int32)
                    token = tokens[np.arange(batch), at]
                    logits, cache = sample.decode_step(graphdef, params, token, at, cache)
                    errors.append(close(logits[rows], full[rows, lengths[rows]], 1e-5))
                    lengths = np.minimum(lengths + 1, 64)

        for other in (decoded, prefilled):
            errors.append(close(other, full, 1e-5))
            agree &= (other.argmax(-1) == full.argmax(-1)).all()
    assert agree
    print(f"largest error {max(errors):.2g}")

    if streams in ("2", "4"):  # negative control
        other_rule = replace(spec, rule=RULES[1 - RULES.index(rule)])
        other, _ = build(config, other_rule)
        difference = np.abs(np.asarray(forward(other, params, tokens)) - full).max()
        print(f"the other rule differs by {difference:.2g}")
        assert difference > 1e-2


# --------------------------------------------------------------------------------------------------
# The jaxprs: each sublayer is the jitted calls of connections.py, nothing else touches the streams

# No axis but that of the streams has size 5: 120 logits, 25 entries of res.
STREAMS, WIDTH = 5, 32
FIVE = ModelConfig(layers=2, width=WIDTH, heads=4, kv_heads=2, vocab=100, context=16)
JITTED = ("expand", "mix", "read", "write", "collapse")


def computations(build, config=FIVE, **optimizer):
    """{name: jaxpr} of the training forward, the sharded step and the decode step."""
    graphdef, params = build(config, Connection(streams=STREAMS))
    run = Config(
        model=config,
        data=DataConfig(batch=4, length=8, micro_batches=2),
        optim=OptimConfig(**optimizer),
    )
    program = train.program(run, make_mesh(2, 2))
    token = jnp.zeros(2, jnp.int32)
    step = optim.hyper(run.optim, 100)
    return {
        "forward": jax.make_jaxpr(partial(forward, graphdef))(params, jnp.zeros((2, 7), jnp.int32)),
        "train_step": jax.make_jaxpr(program.train_step)(
            program.abstract_state, program.abstract_batch, step
        ),
        "decode_step": jax.make_jaxpr(partial(sample.decode_step, graphdef))(
            params, token, token, gpt.empty_cache(config, 2)
        ),
    }


def source(function):
    """What the jaxpr of a jitted function states as its origin."""
    code = inspect.unwrap(function).__code__
    return f"{code.co_name} at {code.co_filename}:{code.co_firstlineno}"


def connection_calls(jaxpr):
    """The origins of all jitted calls with a name of connections.py, in order."""
    return [
        next(jaxprs.inner_jaxprs(eqn)).debug_info.func_src_info
        for _, eqn in jaxprs.calls(jaxpr)
        if eqn.params["name"] in JITTED
    ]


def offences(jaxpr):
    """Equations outside the jitted calls of connections.py that do more than pass streams on.

    On arrays with axes of both streams and width only the sum of cotangents is allowed. Whatever
    else contracts an axis of the streams is an offence, except the sum of a whole array to a
    scalar, which is how the norm of the gradient sees a mixing leaf.
    """
    ours = {source(getattr(mhc, name)) for name in JITTED}
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            inner = list(jaxprs.inner_jaxprs(eqn))
            if jaxprs.is_call(eqn) and inner[0].debug_info.func_src_info in ours:
                continue
            for each in inner:
                visit(each)
            if inner:
                continue
            shapes = [getattr(v.aval, "shape", ()) for v in (*eqn.invars, *eqn.outvars)]
            streams = any(STREAMS in shape and WIDTH in shape for shape in shapes)
            total = all(v.aval.shape == () for v in eqn.outvars)
            if (streams and eqn.primitive.name != "add_any") or (
                jaxprs.consumes_axis(eqn, STREAMS) and not total
            ):
                found.append(eqn)

    visit(jaxpr.jaxpr)
    return found


def test_every_sublayer_is_the_jitted_calls_of_connections(build):
    ours = {name: source(getattr(mhc, name)) for name in JITTED}
    assert all(
        info.endswith(tuple("0123456789")) and ("connections.py" in info or "ends.py" in info)
        for info in ours.values()
    )
    each = [ours["mix"], ours["read"], ours["write"]]
    once = [ours["expand"], *each * (2 * FIVE.layers), ours["collapse"]]
    found = computations(build)
    assert connection_calls(found["forward"]) == once
    assert connection_calls(found["decode_step"]) == once
    # The step: all of them forward, and the transposed calls of the same functions backward.
    calls = connection_calls(found["train_step"])
    assert calls[: len(once)] == once
    assert sorted(calls[len(once) :]) == sorted(once)
    for name, jaxpr in found.items():
        assert not offences(jaxpr), (name, offences(jaxpr))


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sgd"])
@pytest.mark.parametrize(("walk", "remat"), [("loop", True), ("scan", False), ("scan", True)])
def test_nothing_else_touches_the_streams(build, walk, remat, optimizer):
    """However the blocks are walked, and in every optimizer."""
    found = computations(build, replace(FIVE, walk=walk, remat=remat), name=optimizer)
    for name, jaxpr in found.items():
        assert {*connection_calls(jaxpr)} == {source(getattr(mhc, n)) for n in JITTED}
        assert not offences(jaxpr), (name, offences(jaxpr))


def einsum_write(x, y, mix, *, rule, implementation=None):
    """A second copy of the formula, as a model must not have it."""
    return jnp.einsum("mn,btnd->btmd", mix.res, x + mix.post[:, None] * y[..., None, :])


def write(x, y, mix, *, rule, implementation=None):
    """A second copy under the right name."""
    return einsum_write(x, y, mix, rule=rule)


# A context of its own each: a jitted function remembers the jaxpr that it traced for a model.
@pytest.mark.parametrize(
    ("copy", "context"),
    [(einsum_write, 17), (jax.jit(write, static_argnames=("rule", "implementation")), 18)],
    ids=["inline", "jitted"],
)
def test_a_second_mixing_function_is_caught(build, monkeypatch, copy, context):
    honest = source(connections.write)
    monkeypatch.setattr(connections, "write", copy)
    found = computations(build, replace(FIVE, context=context))
    monkeypatch.undo()
    for name, jaxpr in found.items():
        assert honest not in connection_calls(jaxpr), name
        primitives = {eqn.primitive.name for eqn in offences(jaxpr)}
        assert "dot_general" in primitives, name


# --------------------------------------------------------------------------------------------------
# The architecture, against NumPy float64


def numpy_norm(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def numpy_rope(x_TK, base):
    """(a, b) -> (a cos - b sin, b cos + a sin), pair i is (x[i], x[i + K/2])."""
    half = x_TK.shape[-1] // 2
    out = np.empty_like(x_TK)
    for t in range(len(x_TK)):
        for i in range(half):
            angle = t * base ** (-i / half)
            a, b = x_TK[t, i], x_TK[t, i + half]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


def numpy_attention(p, config, u_TD):
    heads, group = config.heads, config.heads // (config.kv_heads or config.heads)
    size, T = config.width // heads, len(u_TD)
    out = np.zeros_like(u_TD)
    for h in range(heads):
        q = u_TD @ p["query"][:, h]
        k = u_TD @ p["key"][:, h // group]
        v = u_TD @ p["value"][:, h // group]
        if config.qk_norm:
            q, k = numpy_norm(q), numpy_norm(k)
        q, k = numpy_rope(q, config.rope_base), numpy_rope(k, config.rope_base)
        for t in range(T):
            weights = oracle.softmax(q[t] @ k[: t + 1].T / np.sqrt(size))
            out[t] += (weights @ v[: t + 1]) @ p["out"][h]
    return out


def numpy_mlp(p, config, u_TD):
    up = u_TD @ p["up"]
    if config.mlp == "swiglu":
        gate = u_TD @ p["gate"]
        hidden = gate * oracle.sigmoid(gate) * up
    else:
        hidden = np.maximum(up, 0) ** 2
    return hidden @ p["down"]


def numpy_logits(params, config, spec, tokens_T):
    """The whole model for one sequence."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = oracle.expand(params["embedding"][tokens_T], spec.streams)
    for layer in range(config.layers):
        block = jax.tree.map(lambda a, l=layer: a[l], params["blocks"])
        for name, f in (("attention", numpy_attention), ("mlp", numpy_mlp)):
            if spec == presets.residual():
                pre, post, res = np.ones(1), np.ones(1), np.eye(1)
            else:
                connection = block[f"{name}_connection"]
                pre, post, res = oracle.mix(
                    connection, streams=spec.streams, post_scale=spec.post_scale
                )
            y = f(block[name], config, numpy_norm(oracle.read(x, pre)))
            x = oracle.write(x, y, post, res, spec.rule)
    h = numpy_norm(oracle.collapse(x, spec.exit))
    logits = h @ (params["embedding"].T if config.tied else params["head"])
    if config.soft_cap is not None:
        logits = config.soft_cap * np.tanh(logits / config.soft_cap)
    return logits[:, : config.vocab]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (presets.residual(), {}),
        (Connection(streams=2), {"kv_heads": 2}),
        (Connection(streams=2, rule="mix_first", exit="sum"), {"tied": True, "qk_norm": False}),
        (Connection(streams=3, post_scale=1.5), {"kv_heads": 1, "soft_cap": 3.0}),
        (Connection(streams=4), {"mlp": "swiglu", "hidden": 40, "rope_base": 100.0}),
    ],
    ids=["residual", "gqa", "mix_first-sum-tied-no_qk_norm", "mqa-soft_cap", "swiglu-rope_base"],
)
def test_model_equals_numpy(build, spec, options):
    """Float32 against float64 through two blocks: 1e-5 of the largest logit."""
    config = replace(SMALL, context=24, **options)
    graphdef, params = build(config, spec)
    tokens = random_tokens(2, 24, config.vocab)
    params = unit_logits(graphdef, redraw(params), tokens, config)
    wanted = np.stack([numpy_logits(params, config, spec, row) for row in tokens])
    error = close(forward(graphdef, params, tokens), wanted, 1e-5)
    print(f"largest error {error:.2g}")

    # Negative control: the NumPy model with one thing wrong is far off.
    if config.kv_heads == 2:
        order = np.array([1, 0])  # kv head = 1 - head // group
        wrong = {
            k: a[:, :, order] if k in ("key", "value") else a
            for k, a in params["blocks"]["attention"].items()
        }
        wrong = {**params, "blocks": {**params["blocks"], "attention": wrong}}
        assert np.abs(numpy_logits(wrong, config, spec, tokens[0]) - wanted[0]).max() > 1e-2
        transposed = replace(spec, rule="mix_first")
        assert np.abs(numpy_logits(params, config, transposed, tokens[0]) - wanted[0]).max() > 1e-2


@pytest.mark.parametrize(
    "change", [{"qk_norm": False}, {"soft_cap": 2.0}, {"rope_base": 100.0}, {"mlp": "swiglu"}]
)
def test_options_change_the_logits(build, change):
    config = replace(SMALL, hidden=64)
    tokens = random_tokens(2, 24, config.vocab)
    graphdef, params = build(config, Connection())
    params = unit_logits(graphdef, params, tokens, config)
    other, own = build(replace(config, **change), Connection())
    if "mlp" in change:
        mlp = {**params["blocks"]["mlp"], "gate": own["blocks"]["mlp"]["gate"]}
        changed = {**params, "blocks": {**params["blocks"], "mlp": mlp}}
    else:
        changed = params
    before, after = forward(graphdef, params, tokens), forward(other, changed, tokens)
    assert np.abs(before - after).max() > 1e-2
    if "soft_cap" in change:
        assert np.abs(after).max() < 2


def test_scan_equals_loop_and_remat_changes_nothing(build):
    """The same operations in other programs, fused in another way: rounding only, 1e-6."""
    tokens = random_tokens(2, 24, SMALL.vocab)
    reference = None
    kinds = ({}, {"remat": True}, {"remat_streams": True})
    for walk, remat in itertools.product(("loop", "scan"), kinds):
        graphdef, params = build(replace(SMALL, walk=walk, **remat), Connection())
        params = redraw(params)
        loss, gradients = loss_and_gradients(graphdef, params, tokens)
        found = (forward(graphdef, params, tokens), loss, *jax.tree.leaves(gradients))
        reference = reference or found
        for a, b in zip(found, reference, strict=True):
            close(a, b, 1e-6)


def test_what_fused_attention_made_is_kept(monkeypatch):
    """Where streams are made again, cuDNN's attention is not, the sums of its softmax included; by
    the names that branches give alone it would be."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(layers, "_implementation", lambda q: "cudnn")
    config = replace(SMALL, dtype="bfloat16", remat_streams=True, walk="loop")
    graphdef, params = gpt.graph(config), gpt.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((2, 25), "int32")

    def attentions():
        def loss(params, tokens):
            return train.losses(nnx.merge(graphdef, params), tokens)[0]

        closed = jax.make_jaxpr(jax.grad(loss))(params, tokens)
        used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]
        return str(used).count("dot_product_attention_fwd_wrapper[")

    assert attentions() == config.layers
    monkeypatch.setattr(gpt, "_keeps_branches", gpt._NAMED)
    assert attentions() == 2 * config.layers


# --------------------------------------------------------------------------------------------------
# Positions


@given(
    seed=st.integers(0, 2**31 - 1),
    a=st.integers(0, 4096),
    b=st.integers(0, 4096),
    shift=st.integers(0, 4096),
)
@settings(max_examples=30)
def test_rope_sees_relative_positions_only(seed, a, b, shift):
    """<R_a q, R_b k> depends on a - b; float64, angles of up to 8192 radians: 1e-10."""
    q, k = np.random.default_rng(seed).normal(size=(2, 8))

    def product(a, b):
        with jax.enable_x64(True):
            pair = jnp.asarray(np.stack([q, k]))[None, :, None]
            turned = layers.rope(pair, jnp.array([[a, b]]), 1e4, False)
        assert turned.dtype == np.float64
        turned = np.asarray(turned)
        np.testing.assert_allclose(
            np.linalg.norm(turned[0, :, 0], axis=-1), np.linalg.norm([q, k], axis=-1), rtol=1e-12
        )
        return float(turned[0, 0, 0] @ turned[0, 1, 0])

    assert abs(product(a, b) - product(a + shift, b + shift)) < 1e-10


def test_logits_depend_on_relative_positions_only(build):
    """Float32 angles of up to 100 radians are off by 100 * 2^-24 = 6e-6 each: 1e-4."""
    graphdef, params = build(SMALL, Connection())
    tokens = random_tokens(2, 24, SMALL.vocab)
    params = unit_logits(graphdef, params, tokens, SMALL)

    @jax.jit
    def at(positions):
        model = nnx.merge(graphdef, params)
        return model.logits(model.features(tokens, positions_BT=positions)[0])

    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    close(at(positions), forward(graphdef, params, tokens), 1e-6)
    close(at(positions + 77), at(positions), 1e-4)
    assert np.abs(at(3 * positions) - at(positions)).max() > 1e-2


# --------------------------------------------------------------------------------------------------
# What a logit may depend on


@pytest.mark.parametrize("streams", ["residual", "2", "4"])
def test_causal_exactly_and_context_dependent(build, streams):
    graphdef, params = build(SMALL, CONNECTIONS[streams])
    tokens = random_tokens(2, 24, SMALL.vocab)
    params = unit_logits(graphdef, redraw(params), tokens, SMALL)
    before = np.asarray(forward(graphdef, params, tokens))
    for t in (0, 1, 11, 23):
        changed = tokens.copy()
        changed[:, t] = (tokens[:, t] + 1) % SMALL.vocab
        after = np.asarray(forward(graphdef, params, changed))
        assert (after[:, :t] == before[:, :t]).all()
        # And every later position sees it, each row by itself.
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=-1) > 1e-5).all()
    changed = tokens.copy()
    changed[0] = (tokens[0] + 1) % SMALL.vocab
    assert (np.asarray(forward(graphdef, params, changed))[1] == before[1]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_padded_vocabulary_has_no_mass(build, tied):
    config = replace(SMALL, layers=1, tied=tied)
    graphdef, params = build(config, Connection())
    # Large where nothing may look.
    params["embedding"] = params["embedding"].at[120:].set(50.0)
    if not tied:
        params["head"] = params["head"].at[:, 120:].set(50.0)
    assert params["embedding"].shape == (128, 32)
    tokens = random_tokens(2, 24, config.vocab)

    @jax.jit
    def padded_logits(params):
        model = nnx.merge(graphdef, params)
        return head.logits(model.features(tokens)[0], model.head_weight(), model.head_spec)

    padded = padded_logits(params)
    assert padded.shape == (2, 24, 128) and (padded[..., 120:] == -1e9).all()
    assert (jax.nn.softmax(padded)[..., 120:] == 0).all()
    assert forward(graphdef, params, tokens).shape == (2, 24, 120)
    gradients = loss_and_gradients(graphdef, params, tokens)[1]
    assert (gradients["embedding"][120:] == 0).all() and (gradients["embedding"] != 0).any()
    if not tied:
        assert (gradients["head"][:, 120:] == 0).all() and (gradients["head"] != 0).any()


def test_initial_loss_is_ln_v(build):
    """Embedding std 0.02: nearly uniform predictions, also through 120 of 128 stored tokens."""
    for tied in (False, True):
        graphdef, params = build(replace(SMALL, tied=tied), Connection())
        tokens = random_tokens(8, 65, SMALL.vocab)
        logits = np.asarray(forward(graphdef, params, tokens[:, :-1]), np.float64)
        chosen = np.take_along_axis(oracle.softmax(logits), tokens[:, 1:, None], axis=-1)
        assert abs(-np.log(chosen).mean() - np.log(120)) < 0.05


def test_the_embedding_gradient_is_added_up_in_the_dtype_of_the_parameters(build):
    """Frequent tokens add thousands of rows; bfloat16 would stop at 256 of equal size."""
    graphdef, params = build(replace(SMALL, dtype="bfloat16"), Connection())
    jaxpr = jax.make_jaxpr(loss_and_gradients, static_argnums=0)(
        graphdef, params, random_tokens(2, 9, SMALL.vocab)
    )
    added = [
        eqn.invars[0].aval
        for _, eqn in jaxprs.walk(jaxpr)
        if eqn.primitive.name == "scatter-add" and eqn.invars[0].aval.shape == (128, SMALL.width)
    ]
    assert [a.dtype for a in added] == [jnp.float32]


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_the_implementation_of_the_config_runs(build, implementation):
    """In the forward and in the trace: the reference is plain, the default has VJPs of its own."""
    chosen = replace(SMALL.connection, implementation=implementation)
    graphdef, params = build(replace(SMALL, connection=chosen), Connection())
    tokens = random_tokens(1, 8, SMALL.vocab)
    for run in (forward, jax.jit(lambda g, p, t: nnx.merge(g, p).trace(t), static_argnums=0)):
        jaxpr = jax.make_jaxpr(run, static_argnums=0)(graphdef, params, tokens)
        own = {path[-1] for path, eqn in jaxprs.walk(jaxpr) if "custom_vjp" in eqn.primitive.name}
        # The exit is a read by name of no implementation.
        assert ({"read", "write"} <= own) == (implementation != "reference"), own
        assert ("write" in own) == (implementation != "reference"), own


def test_bfloat16_runs_and_stays_finite(build):
    """8 bits of mantissa, about 30 roundings in a row: a tenth of the largest logit."""
    tokens = random_tokens(2, 24, SMALL.vocab)
    graphdef, params = build(SMALL, Connection())
    params = unit_logits(graphdef, redraw(params), tokens, SMALL)
    exact = np.asarray(forward(graphdef, params, tokens))
    config = replace(SMALL, dtype="bfloat16")
    low, own = build(config, Connection())
    assert {a.dtype for a in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    logits = forward(low, params, tokens)
    assert logits.dtype == jnp.float32
    close(logits, exact, 0.1)
    assert np.abs(logits - exact).max() > 1e-4  # it did run in bfloat16
    for leaf in jax.tree.leaves(loss_and_gradients(low, params, tokens)):
        assert np.isfinite(leaf).all()
    cache = gpt.empty_cache(config, 2)
    assert cache.key.dtype == jnp.bfloat16
    step, _ = sample.decode_step(low, params, tokens[:, 0], np.zeros(2, np.int32), cache)
    close(step, exact[:, 0], 0.1)


def test_output_projections_start_as_wide_as_the_connection_asks():
    """HC's are sqrt(N) wider; the draw is the same."""
    wide, plain = (
        gpt.build(
            replace(SMALL, connection=replace(SMALL.connection, preset=name, init=None)),
            key=jax.random.key(0),
        )[1]["blocks"]
        for name in ("hc_static", "mhc_lite")
    )
    for part, leaf, gain in (("attention", "out", 2), ("mlp", "down", 2), ("mlp", "up", 1)):
        np.testing.assert_allclose(wide[part][leaf], gain * plain[part][leaf], rtol=1e-6)


@pytest.mark.parametrize("entry", ["stream_embedding", "scaled_noise"])
@pytest.mark.parametrize("exit", ["learned_head", "attention_pool"])
def test_entries_and_exits_with_parameters_are_part_of_the_model(entry, exit):
    """Each of their leaves changes the logits, and decoding is the training forward."""
    named = replace(SMALL.connection, preset="mhc_n2", init="near_identity", entry=entry, exit=exit)
    config = replace(SMALL, connection=named)
    graphdef, params = gpt.build(config, key=jax.random.key(0))
    params = redraw(params)
    tokens = random_tokens(2, 12, config.vocab)
    logits = forward(graphdef, params, tokens)
    for end in ("entry", "exit"):
        assert params[end]
        for leaf, array in params[end].items():
            # Not all alike: the final norm cancels a common factor.
            bump = 0.5 * np.random.default_rng(0).standard_normal(array.shape) + 0.1
            moved = {**params, end: {**params[end], leaf: array + bump.astype(array.dtype)}}
            assert jnp.abs(forward(graphdef, moved, tokens) - logits).max() > 1e-4, (end, leaf)
    cache = gpt.empty_cache(config, 2)
    lengths = jnp.full(2, 11, jnp.int32)
    _, cache = sample.prefill(graphdef, params, tokens[:, :11], lengths, cache)
    last, _ = sample.decode_step(graphdef, params, tokens[:, 11], lengths, cache)
    close(last, logits[:, 11], 1e-5)


def test_trace_is_the_forward(build):
    """`trace` shows the streams that the forward has: its exit gives the same logits."""
    for name in ("residual", "2", "4"):
        graphdef, params = build(SMALL, CONNECTIONS[name])
        params = redraw(params)
        tokens = random_tokens(2, 24, SMALL.vocab)

        @jax.jit
        def trace(params, graphdef=graphdef, tokens=tokens):
            model = nnx.merge(graphdef, params)
            records, last = model.trace(tokens)
            return records, last, model.logits(model._leave(last, None))

        records, last, logits = trace(params)
        assert len(records) == 2 * SMALL.layers
        rule = CONNECTIONS[name].rule
        for record, after in zip(records, [*(r.x for r in records[1:]), last], strict=True):
            close(connections.write(record.x, record.y, record.mix, rule=rule), after, 1e-6)
            mixed = connections.operand(record.x, record.y, record.mix, rule=rule)
            close(record.operand, mixed, 1e-6)
        close(logits, forward(graphdef, params, tokens), 1e-6)


# --------------------------------------------------------------------------------------------------
# Shapes, counts, refusals


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
@pytest.mark.parametrize("name", ["residual", "mhc_n2", "mhc_n4"])
def test_count(name, mlp, tied):
    """By hand: width 32, 4 heads of 8, 2 kv heads, 2 blocks, 128 stored tokens."""
    config = replace(SMALL, kv_heads=2, mlp=mlp, tied=tied)
    config = replace(config, connection=replace(config.connection, preset=name))
    hidden = 128  # relu2: 4 * 32; swiglu: 8/3 * 32 = 85.3, up to a multiple of 64
    mixing = {"residual": 0, "mhc_n2": 2 + 2 + 1, "mhc_n4": 4 + 4 + 24}[name]
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    mlp_size = (3 if mlp == "swiglu" else 2) * 32 * hidden
    wanted = 128 * 32 * (1 if tied else 2) + 2 * (attention + mlp_size + 2 * mixing)
    params = gpt.build(config, key=jax.random.key(0))[1]
    assert gpt.count(params) == gpt.count(gpt.abstract_params(config)) == wanted
    leaves = list(gpt.sublayer_leaves(params, config))
    assert sum(leaf.size for *_, leaf in leaves) == 4 * mixing
    assert {l for l, *_ in leaves} == (set(range(4)) if mixing else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "model.layers is 0: give at least 1"),
        ({"vocab": 0}, "model.vocab is 0: give at least 1"),
        ({"width": 30}, "model.width 30 over 4 heads is no even head size"),
        ({"width": 36}, "model.width 36 over 4 heads is no even head size"),
        ({"kv_heads": 3}, "model.kv_heads 3 does not divide the 4 heads: use one of [1, 2, 4]"),
    ],
)
def test_configs_that_can_not_be(change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        gpt.build(replace(SMALL, **change), key=jax.random.key(0))
    assert "\n" not in str(error.value)


def test_graph_is_that_of_build():
    """Equal and equally hashed, so that both are one compiled program."""
    graphdef, _ = gpt.build(SMALL, key=jax.random.key(0))
    assert gpt.graph(SMALL) == graphdef and hash(gpt.graph(SMALL)) == hash(graphdef)
    assert gpt.graph(replace(SMALL, soft_cap=5.0)) != graphdef
