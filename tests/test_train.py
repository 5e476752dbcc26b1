"""The training step: what connections learn, accumulation, skipped updates, scalars as arguments.

Text is SyntheticCode in bytes: 128 tokens, the arguments after `return` want attention.
"""

import functools
import re
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import nnx

from mhcjax import data, diagnostics, gpt, head, optim, sharding, train
from mhcjax.config import Config, ConnectionConfig, DataConfig, ModelConfig, OptimConfig
from mhcjax.corpora import SyntheticCode

TEXT = np.frombuffer(SyntheticCode(statements=1000).text().encode(), np.uint8)
SMALL = ModelConfig(layers=2, width=32, heads=4, hidden=64, vocab=128, context=32)
# A step of 1 at once, so that few steps show what moves.
AT_ONCE = {"warmup_steps": 0, "schedule": "constant"}


def config_of(init="near_identity", *, model=None, batch=8, length=32, micro_batches=1, **options):
    connection = ConnectionConfig(preset="mhc_n2", init=init)
    return Config(
        model=replace(SMALL, **{"connection": connection} | (model or {})),
        data=DataConfig(batch=batch, length=length, micro_batches=micro_batches),
        optim=OptimConfig(**options),
    )


@functools.cache
def program(config):
    """One per config in this file: most tests share its compiled step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the symmetric init warns
        return train.program(config, sharding.make_mesh(1, 1))


def batch_of(config, step):
    d = config.data
    return data.batch(
        TEXT, seed=0, step=step, batch=d.batch, length=d.length, micro_batches=d.micro_batches
    )


def train_for(config, steps, state=None):
    """-> (state, losses) after the batches 0 to steps - 1."""
    p = program(config)
    state = p.init(jax.random.key(0)) if state is None else state
    scalars, losses = optim.hyper(config.optim, config.total_steps), []
    for step in range(steps):
        state, metrics = p.train_step(state, batch_of(config, step), scalars)
        losses.append(float(metrics["loss"]))
    return state, losses


def host(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(lambda a: np.array(a), tree)


def named(tree):
    """{dotted name: NumPy leaf}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.array(a) for p, a in leaves}


def mixing_leaves(params, config):
    """{(sublayer, leaf): array}"""
    return {(l, leaf): np.asarray(a) for l, _, leaf, a in gpt.sublayer_leaves(params, config.model)}


def live_and_dead(config):
    """The (sublayer, leaf) pairs, by structure."""
    p = program(config)
    pairs = set(mixing_leaves(p.init(jax.random.key(0)).params, config))
    dead = diagnostics.dead_leaves(gpt.connection_of(config.model), 2 * config.model.layers)
    assert dead < pairs
    return pairs - dead, set(dead)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


# --------------------------------------------------------------------------------------------------
# Dead and live connections


@functools.cache
def life(init, loss="chunked"):
    """(leaves before, probe of update 1, leaves after 100 updates, probe then), default optimizer,
    three blocks."""
    config = config_of(init, model={"layers": 3, "loss": loss})
    p = program(config)
    state = p.init(jax.random.key(0))
    before, probe = mixing_leaves(state.params, config), host(p.probe(state.params, probe_batch()))
    state, losses = train_for(config, 100, state)
    assert losses[-1] < losses[0] - 1  # it does learn: the rest would say nothing otherwise
    return (
        before,
        probe,
        mixing_leaves(state.params, config),
        host(p.probe(state.params, probe_batch())),
    )


def probe_batch():
    return batch_of(config_of(), 0)[0]


@pytest.mark.filterwarnings("ignore:the symmetric init:UserWarning")
@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_symmetric_init_is_dead(loss):
    """Exactly: equal streams make res act as the identity, whatever the weights are."""
    before, probe, after, trained = life("symmetric", loss)
    for found in (probe, trained):
        alphas = {k: g for k, g in found["gradients"].items() if k.endswith("alpha_logit")}
        assert len(alphas) == 6 and all(g == 0 for g in alphas.values()), alphas
        # Not because there is no gradient at all.
        assert all(g > 1e-7 for k, g in found["gradients"].items() if k.endswith("post_logits"))
        # Rounding of a quotient: equal streams are parallel.
        assert np.abs(found["cosine_operand"] - 1).max() < 1e-6
    for key, a in after.items():
        assert (a == before[key]).all() == (key[1] == "alpha_logit" or key == (0, "pre_logits"))


@pytest.mark.filterwarnings("ignore:the symmetric init:UserWarning")
def test_symmetric_output_does_not_depend_on_alpha():
    """Float32: res of equal streams is a weighted mean of equal numbers, up to rounding."""

    def outputs(init):
        config = config_of(init, model={"layers": 3}).model
        graphdef, params = gpt.build(config, key=jax.random.key(0))
        params["head"] = 50 * params["head"]  # logits of the size that training makes them
        forward = jax.jit(lambda params: nnx.merge(graphdef, params)(probe_batch()[:, :-1]))
        found = []
        for alpha_logit in (0.0, 5.0):
            blocks = {
                name: {
                    k: jnp.full_like(a, alpha_logit) if k == "alpha_logit" else a
                    for k, a in leaves.items()
                }
                for name, leaves in params["blocks"].items()
            }
            found.append(np.asarray(forward({**params, "blocks": blocks})))
        return found, max(1, np.abs(found[0]).max())

    (zero, five), scale = outputs("symmetric")
    assert scale > 2
    assert np.abs(zero - five).max() <= 1e-5 * scale
    for init in ("balanced", "near_identity"):  # negative control
        (zero, five), scale = outputs(init)
        assert np.abs(zero - five).max() > 1e-2 * scale


def test_balanced_init_is_alive(record_property):
    """alpha learns although every write equates the streams at first: what res mixes differs."""
    config = config_of("balanced", model={"layers": 3})
    before, probe, after, trained = life("balanced")
    last, moved = 2 * config.model.layers - 1, []
    for layer in range(last + 1):
        key, gradient = (layer, "alpha_logit"), probe["gradients"][f"{layer}.alpha_logit"]
        moved.append(sigmoid(after[key]) - sigmoid(before[key]))
        # The mean exit cancels the last res.
        assert gradient > 1e-7 if layer < last else after[key] == before[key], layer
    print("alpha moved by", np.round(moved, 4))
    # Each goes its own way, and one may be back near 1/2 by then: the furthest says it.
    assert np.abs(moved).max() > 0.01
    assert np.abs(moved[:last]).min() > 0
    assert np.median(probe["cosine_operand"][2:]) < 0.999
    for name, found in (("update 1", probe), ("update 100", trained)):
        record_property(f"cosine of the streams, {name}", found["cosine_streams"].tolist())
        print(name, "cosine of the streams", np.round(found["cosine_streams"], 5))
    # What the docstring of the preset says: both rows of res are equal.
    np.testing.assert_allclose(probe["cosine_streams"], 1, atol=1e-6)


def test_near_identity_init_is_alive():
    config = config_of("near_identity", model={"layers": 3})
    live, dead = live_and_dead(config)
    before, probe, after, trained = life("near_identity")
    for layer, leaf in live:
        assert probe["gradients"][f"{layer}.{leaf}"] > 1e-7, (layer, leaf)
        # A hundred roundings of a logit of size 1; one may pass its start again on its way.
        assert np.abs(after[layer, leaf] - before[layer, leaf]).max() > 1e-5, (layer, leaf)
    assert all((after[pair] == before[pair]).all() for pair in dead)
    for found in (probe, trained):
        print("cosine of the streams", np.round(found["cosine_streams"], 5))
        assert found["cosine_streams"].mean() < 0.999


def test_dead_leaves_have_no_gradient_but_rounding():
    """Why they are frozen by name: what is 0 on paper is a number that a sign would amplify."""
    config = config_of("near_identity", model={"layers": 3})
    live, dead = live_and_dead(config)
    gradients = life("near_identity")[1]["gradients"]
    least = min(gradients[f"{l}.{leaf}"] for l, leaf in live)
    # Sums of 256 products of about 1e-3 in float32; the norm's epsilon bends `pre` a little.
    assert all(gradients[f"{l}.{leaf}"] < 0.05 * least for l, leaf in dead)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sgd"])
def test_frozen_leaves_do_not_move(optimizer):
    """Bit by bit, with decay on; every live one does move."""
    config = config_of(name=optimizer, weight_decay=0.1, **AT_ONCE)
    live, dead = live_and_dead(config)
    before = mixing_leaves(program(config).init(jax.random.key(0)).params, config)
    after = mixing_leaves(train_for(config, 5)[0].params, config)
    assert {pair for pair in before if (after[pair] != before[pair]).any()} == live
    assert dead == {(0, "pre_logits"), (3, "alpha_logit")}


def test_unfrozen_they_drift_under_a_sign_optimizer(monkeypatch):
    """Negative control."""
    monkeypatch.setattr(optim, "freeze_dead", lambda gradients, *_: gradients)
    # A decay of its own, so that no other test shares this program.
    config = config_of(name="lion", weight_decay=0.11, **AT_ONCE)
    _, dead = live_and_dead(config)
    before = mixing_leaves(program(config).init(jax.random.key(0)).params, config)
    after = mixing_leaves(train_for(config, 5)[0].params, config)
    assert any(np.abs(after[pair] - before[pair]).max() > 1e-3 for pair in dead)


# --------------------------------------------------------------------------------------------------
# Accumulation, and the two forms of the loss


def relative(found, wanted):
    """Largest ||difference|| / ||leaf||."""
    found, wanted = named(found), named(wanted)
    assert found.keys() == wanted.keys()
    return max(np.linalg.norm(found[n] - a) / np.linalg.norm(a) for n, a in wanted.items())


def test_micro_batches_equal_one_batch():
    """Four of 2 rows are one of 8. Float64; AdamW divides by the gradient: 1e-10."""
    with jax.enable_x64(True):
        ends = []
        for micro_batches, batch in ((1, 8), (4, 2)):
            config = config_of(
                model={"dtype": "float64", "layers": 1}, micro_batches=micro_batches, batch=batch,
                name="adamw", learning_rate=0.01, rest_rate=None, z_loss=1e-3, **AT_ONCE,
            )  # fmt: skip
            assert (batch_of(config, 1).reshape(8, -1) == batch_of(config_of(), 1)[0]).all()
            ends.append(train_for(config, 3))
        (one, losses), (four, accumulated) = ends
        assert int(one.updates) == int(four.updates) == int(four.batches) == 3
        np.testing.assert_allclose(accumulated, losses, rtol=0, atol=1e-10)
        assert relative(four.params, one.params) <= 1e-10

        # Negative control: the first micro-batch four times.
        p, state = program(config), program(config).init(jax.random.key(0))
        scalars = optim.hyper(config.optim, config.total_steps)
        for step in range(3):
            repeated = np.repeat(batch_of(config, step)[:1], 4, axis=0)
            state, metrics = p.train_step(state, repeated, scalars)
        assert relative(state.params, one.params) > 1e-4
        assert abs(float(metrics["loss"]) - losses[-1]) > 1e-4


def test_chunked_and_plain_loss_train_alike():
    """SGD, float32, three updates: two orders of the same sums, 1e-6; with the z-loss."""
    ends = [
        train_for(
            config_of(
                model={"layers": 1, "loss": loss, "soft_cap": 5.0}, name="sgd", learning_rate=0.5,
                rest_rate=None, z_loss=z_loss, **AT_ONCE,
            ),
            3,
        )
        for loss, z_loss in (("chunked", 0.1), ("plain", 0.1), ("plain", 0.0))
    ]  # fmt: skip
    (chunked, losses), (plain, others), (without, _) = ends
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    assert relative(chunked.params, plain.params) <= 1e-6
    assert relative(without.params, plain.params) > 1e-4


def test_loss_and_cross_entropy_are_what_they_say():
    """Of the metrics: ce is the mean nll of the next token, loss has the z-loss on top."""
    config = config_of(model={"layers": 1, "soft_cap": 5.0}, name="sgd", z_loss=0.1)
    p = program(config)
    state = p.init(jax.random.key(0))
    tokens = batch_of(config, 0)[0]
    forward = jax.jit(lambda params: nnx.merge(p.graphdef, params)(tokens[:, :-1]))
    logits = np.float64(forward(state.params))
    logsumexp = np.log(np.exp(logits).sum(axis=-1))
    nll = logsumexp - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = p.eval_step(state.params, tokens, np.arange(128, dtype=np.int32))
    _, metrics = p.train_step(state, tokens[None], optim.hyper(config.optim, 300))
    # Float32 means of 256 numbers near ln 128.
    np.testing.assert_allclose(metrics["ce"], nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], nll.mean() + 0.1 * (logsumexp**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(counted["nll"], nll.sum(), rtol=1e-6)
    assert counted["tokens"] == 8 * 32 and counted["bytes"] == tokens[:, 1:].sum()
    copies = (logits.argmax(axis=-1) == tokens[:, :-1]).mean()
    np.testing.assert_allclose(counted["copy_rate"], copies, atol=1e-6)
    assert counted["repeat_rate"] == 0  # the text has no two equal bytes in a row


# --------------------------------------------------------------------------------------------------
# One compilation, scalars as arguments, donation


def test_one_compilation_per_run(monkeypatch):
    """Traces are counted where Python runs: in the loss."""
    traces, first, honest = [], 0, train.losses

    def counted(*args, **options):
        traces.append(1)
        return honest(*args, **options)

    monkeypatch.setattr(train, "losses", counted)
    # A decay of its own: nothing is compiled yet for this config.
    config = config_of(model={"layers": 1}, name="sgd", weight_decay=0.01)
    p = program(config)
    state = p.init(jax.random.key(0))
    assert not traces
    for step in range(12):
        changed = replace(
            config.optim,
            learning_rate=0.1 / (step + 1),
            rest_rate=None if step % 2 else 0.01,
            mixing_rate=None if step % 3 else 0.02,
            weight_decay=step % 2,
            clip=float(step),
        )
        state, _ = p.train_step(state, batch_of(config, step), optim.hyper(changed, 100 + step))
        if step == 0:
            first = len(traces)
    assert first >= 1 and len(traces) == first
    assert p.train_step._cache_size() == 1

    # Negative control: weakly typed scalars are another program, and so is another shape.
    weak = jax.tree.map(float, optim.hyper(config.optim, 100))
    state, _ = p.train_step(state, batch_of(config, 0), weak)
    assert p.train_step._cache_size() == 2 and len(traces) == 2 * first
    p.train_step(state, batch_of(config, 0)[..., :-1], weak)
    assert p.train_step._cache_size() == 3 and len(traces) == 3 * first


SGD = config_of(name="sgd", learning_rate=0.5, rest_rate=None, weight_decay=0.1, **AT_ONCE)


@pytest.mark.parametrize("group", optim.GROUPS)
def test_rates_are_arguments_by_group(group):
    """With one rate only, that group moves and no other."""
    p = program(SGD)
    state = p.init(jax.random.key(0))
    before = named(state.params)
    scalars = optim.hyper(SGD.optim, 300)
    rates = {name: np.float32(name == group) for name in scalars.rates}
    state, _ = p.train_step(state, batch_of(SGD, 0), scalars._replace(rates=rates))
    after, groups = named(state.params), named_labels(state.params)
    assert {n for n in before if (after[n] != before[n]).any()} == {
        n for n in before if groups[n] == group
    }


def named_labels(params):
    leaves = jax.tree_util.tree_leaves_with_path(optim.labels(params))
    return {jax.tree_util.keystr(p, simple=True, separator="."): label for p, label in leaves}


def test_clip_is_an_argument():
    """One compiled step, plain SGD at rate 1: as long as the clipped gradient, and along it."""
    p = program(SGD)
    scalars = optim.hyper(replace(SGD.optim, learning_rate=1.0, weight_decay=0.0), 300)
    moves, norms = [], []
    for clip in (np.inf, 1e6, 0.5, 0.05):
        state = p.init(jax.random.key(0))
        before = named(state.params)
        state, metrics = p.train_step(
            state, batch_of(SGD, 0), scalars._replace(clip=np.float32(clip))
        )
        after = named(state.params)
        moves.append(np.concatenate([(after[n] - a).ravel() for n, a in before.items()]))
        norms.append(float(metrics["grad_norm"]))
    norm = norms[0]
    assert norm > 0.5 and norms == [norm] * 4  # the norm that is logged is that before clipping
    whole = moves[0]
    assert (moves[1] == whole).all()
    for move, clip in ((whole, norm), (moves[2], 0.5), (moves[3], 0.05)):
        # Parameters of up to 4 in float32 round each entry of a step by 2e-7.
        np.testing.assert_allclose(np.linalg.norm(move), clip, rtol=1e-3)
        np.testing.assert_allclose(move, whole * clip / norm, atol=5e-7)
    assert p.train_step._cache_size() == 1


def test_the_schedule_follows_the_updates():
    """Warm-up of 4, then the share of the peak that the schedule says; logged as it was used."""
    config = config_of(
        model={"layers": 1}, name="sgd", warmup_steps=4, decay_fraction=0.5, learning_rate=0.5
    )
    p = program(config)
    state, scalars, rates = p.init(jax.random.key(0)), optim.hyper(config.optim, 8), []
    for step in range(10):
        state, metrics = p.train_step(state, batch_of(config, step), scalars)
        rates.append(float(metrics["learning_rate"]))
    decay = [0.05 + 0.95 * left for left in (1, 0.75, 0.5, 0.25, 0, 0)]
    np.testing.assert_allclose(rates, 0.5 * np.array([0.25, 0.5, 0.75, 1, *decay]), rtol=1e-6)


def test_the_state_is_donated():
    p = program(SGD)
    state = p.init(jax.random.key(0))
    after, _ = p.train_step(state, batch_of(SGD, 0), optim.hyper(SGD.optim, 300))
    assert all(a.is_deleted() for a in jax.tree.leaves(state))
    assert not any(a.is_deleted() for a in jax.tree.leaves(after))


# --------------------------------------------------------------------------------------------------
# Updates that are not finite


def counts(state):
    return tuple(int(getattr(state, n)) for n in ("updates", "batches", "skipped"))


def with_weight(state, value):
    """The state with one weight of the head set."""
    params = {**state.params, "head": state.params["head"].at[0, 5].set(value)}
    return replace(state, params=jax.device_put(params, jax.tree.map(lambda a: a.sharding, params)))


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion", "sgd"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_non_finite_update_changes_nothing(optimizer, value):
    config = config_of(name=optimizer, weight_decay=0.1, **AT_ONCE)
    p, scalars = program(config), optim.hyper(config.optim, config.total_steps)
    state, _ = train_for(config, 1)
    good = float(state.params["head"][0, 5])
    state = with_weight(state, value)
    before = named((state.params, state.opt_state))
    for in_row in (1, 2):
        state, metrics = p.train_step(state, batch_of(config, in_row), scalars)
        assert counts(state) == (1, 1 + in_row, in_row)
        assert int(state.skipped_in_row) == int(metrics["skipped_in_row"]) == in_row
        assert int(metrics["skipped"]) == in_row
        assert not np.isfinite(float(metrics["grad_norm"]))
        for name, a in named((state.params, state.opt_state)).items():
            assert a.tobytes() == before[name].tobytes(), name
    state = with_weight(state, good)
    state, metrics = p.train_step(state, batch_of(config, 3), scalars)
    assert counts(state) == (2, 4, 2) and int(state.skipped_in_row) == 0
    assert int(metrics["skipped_in_row"]) == 0 and int(metrics["skipped"]) == 2
    # As if the skipped batches had never been: schedule and moments count updates.
    never, _ = train_for(config, 1)
    never, _ = p.train_step(never, batch_of(config, 3), scalars)
    wanted = named((never.params, never.opt_state))
    for name, a in named((state.params, state.opt_state)).items():
        assert a.tobytes() == wanted[name].tobytes(), name
        # And the good update is no copy of the state before it.
        if name.startswith("0.blocks.mlp."):
            assert (a != before[name]).any(), name


def test_a_nan_in_the_gradient_alone_is_skipped(monkeypatch):
    """The loss is finite; one entry of one gradient is not."""
    honest = optim.freeze_dead

    def poison(gradients, *rest):
        gradients = honest(gradients, *rest)
        return {**gradients, "embedding": gradients["embedding"].at[3, 3].set(jnp.nan)}

    monkeypatch.setattr(optim, "freeze_dead", poison)
    # A decay of its own, so that no other test shares this program.
    config = config_of(model={"layers": 1}, name="adamw", weight_decay=0.12)
    p = program(config)
    state = p.init(jax.random.key(0))
    before = named((state.params, state.opt_state))
    state, metrics = p.train_step(state, batch_of(config, 0), optim.hyper(config.optim, 300))
    assert np.isfinite(float(metrics["loss"])) and counts(state) == (0, 1, 1)
    for name, a in named((state.params, state.opt_state)).items():
        assert a.tobytes() == before[name].tobytes(), name


# --------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_by_hand(tied):
    """Width 32, 4 heads of 8, 2 kv heads, hidden 64, 128 stored tokens, 2 blocks, length 20."""
    config = replace(SMALL, kv_heads=2, vocab=100, tied=tied)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    mlp = 2 * 32 * 64
    mixing = 2 * (2 + 2 + 1)
    # The head is a matmul, tied or not; the embedding is a lookup.
    params = 2 * (attention + mlp + mixing) + 32 * 128
    # 2 matmuls x 2 FLOPs x 3 passes x half of the positions, on average, of each token.
    scores = 2 * 2 * 3 * 0.5 * 20 * 32 * 2
    assert train.flops_per_token(config, 20) == 6 * params + scores


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("h200", "NVIDIA H200"),
        ("a100-sxm4-40", "NVIDIA A100-SXM4-40GB"),
        ("v5p", "TPU v5p"),
    ],
)
def test_device_of(name, found):
    assert train.device_of(name) is train.DEVICES[found]
    assert 1e14 < train.DEVICES[found].peak_flops < 1e16
    assert 1e10 < train.DEVICES[found].memory < 1e12


def test_device_of_a_cpu_is_unknown():
    assert train.device_of("cpu") is train.device_of("CPU") is None


@pytest.mark.parametrize(("name", "fits"), [("h100", 2), ("A100", 2), ("abacus", 0), ("", 9)])
def test_device_of_refuses_in_one_line(name, fits):
    message = f"device kind {name!r} fits {fits} known kinds: name one of cpu, NVIDIA H200, "
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train.device_of(name)
    assert "\n" not in str(error.value)
    assert all(kind in str(error.value) for kind in train.DEVICES)


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("mesh", "model", "options", "message"),
    [
        (
            (1, 8),
            {},
            {},
            "model.heads, 4, does not divide by mesh.model 8: give mesh.model one of [1, 2, 4]",
        ),
        (
            (1, 4),
            {"kv_heads": 2},
            {},
            "model.kv_heads, 2, does not divide by mesh.model 4: give mesh.model one of [1, 2],",
        ),
        (
            (1, 4),
            {"hidden": 66},
            {},
            "model.hidden, 66, does not divide by mesh.model 4: give mesh.model one of [1, 2],",
        ),
        (
            (8, 1),
            {},
            {"batch": 12},
            "data.batch, 12, does not divide by mesh.data 8: give mesh.data one of [1, 2, 3, 4, 6]",
        ),
        (
            (1, 3),
            {"heads": 6, "width": 48, "hidden": 66},
            {},
            "the storage of model.vocab 128, 128, does not divide by mesh.model 3: "
            "give mesh.model one of [1, 2],",
        ),
        (
            (1, 1, 8),
            {},
            {"length": 12},
            "data.length, 12, does not divide by mesh.sequence 8: "
            "give mesh.sequence one of [1, 2, 3, 4, 6], or change the size",
        ),
        ((1, 1), {}, {"length": 33}, "data.length 33 is beyond model.context 32: raise it"),
    ],
)
def test_configs_that_do_not_fit_the_mesh(mesh, model, options, message):
    config = config_of(model=model, **options)
    mesh = sharding.make_mesh(*mesh[:2], sequence=(*mesh, 1)[2])
    for refuse in (train.check_mesh, train.program):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            refuse(config, mesh)
        assert "\n" not in str(error.value)


def test_configs_that_just_fit_the_mesh():
    """The other side of each refusal; padding makes the vocabulary fit."""
    config = config_of(model={"kv_heads": 2, "vocab": 101}, batch=12, length=32)
    for shape in ((4, 2), (1, 2), (1, 1)):
        train.check_mesh(config, sharding.make_mesh(*shape))
    # The default hidden of swiglu is no multiple of the width: it is what counts.
    swiglu = replace(SMALL, hidden=None, mlp="swiglu")
    assert gpt.abstract_params(swiglu)["blocks"]["mlp"]["up"].shape[-1] == 128
    train.check_mesh(replace(config, model=swiglu), sharding.make_mesh(1, 4))


def test_float64_wants_64_bit():
    config = config_of(model={"dtype": "float64"})
    message = "model.dtype is float64 but JAX runs in 32 bit: set JAX_ENABLE_X64=1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train.program(config, sharding.make_mesh(1, 1))
    with jax.enable_x64(True):
        p = train.program(config, sharding.make_mesh(1, 1))
        dtypes = {a.dtype for a in jax.tree.leaves(p.abstract_state.params)}
    assert dtypes == {np.dtype("float64")}


@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_float64_is_float64_throughout(loss):
    """Of the loss and its gradients: no array on the way is rounded to less."""

    def float_dtypes(dtype):
        graphdef, params = gpt.build(
            replace(SMALL, layers=1, dtype=dtype, loss=loss), key=jax.random.key(0)
        )
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda params: train.losses(nnx.merge(graphdef, params), probe_batch())[0])
        )(params)
        avals = [v.aval for _, eqn in jaxprs.walk(jaxpr) for v in eqn.outvars]
        return {a.dtype.name for a in avals if a.ndim and jnp.issubdtype(a.dtype, jnp.floating)}

    assert float_dtypes("bfloat16") == {"bfloat16", "float32"}
    with jax.enable_x64(True):
        assert float_dtypes("float64") == {"float64"}


def test_the_head_of_the_step_is_that_of_the_config():
    """vocab and soft cap reach the loss: its padding is masked, its logits are capped."""
    config = replace(SMALL, vocab=100, soft_cap=2.0)
    graphdef, params = gpt.build(config, key=jax.random.key(0))
    model = nnx.merge(graphdef, params)
    assert model.head_spec == head.Head(100, 2.0)
    tokens = batch_of(config_of(), 0)[0] % 100
    _, ce = train.losses(model, tokens)
    nll, _ = head.cross_entropy(
        model.features(tokens[:, :-1])[0], model.head_weight(), tokens[:, 1:], head.Head(100, 2.0)
    )
    np.testing.assert_allclose(ce, nll.mean(), rtol=1e-6)
    assert abs(float(ce) - np.log(100)) < 0.05 < abs(float(ce) - np.log(128))
