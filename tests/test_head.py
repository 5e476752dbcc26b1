"""The loss with gradients made in the forward pass, against autodiff of the plain form.

Shapes are fixed, so that each combination of options is one compiled program: 2 sequences of 6
positions, width 5, 16 stored tokens.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mhcjax import head, sharding
from mhcjax.head import Head

B, T, D, V = 2, 6, 5, 16
CHUNKS = (None, 1, 2, 3, 6)
# (tokens, soft cap, weight of the z-loss): 13 tokens leave 3 columns of padding.
OPTIONS = list(itertools.product((V, 13), (None, 3.0), (0.0, 0.1)))


def draw(seed, vocab, dtype, scale=1.0, shape=(B, T, D)):
    """(h, w, targets) as NumPy arrays; the padding of w is as large as the rest."""
    rng = np.random.default_rng(seed)
    h = scale * rng.normal(size=shape)
    w = rng.normal(size=(shape[-1], V))
    return h.astype(dtype), w.astype(dtype), rng.integers(vocab, size=shape[:2]).astype(np.int32)


def plain(h, w, targets, spec, z_loss):
    """The same two numbers by the plain form."""
    nll, logsumexp = head.cross_entropy(h, w, targets, spec)
    return jnp.mean(nll) + z_loss * jnp.mean(logsumexp**2), jnp.mean(nll)


@functools.cache
def programs(vocab, soft_cap, z_loss):
    """One jitted function -> ([(outputs, (dh, dw)) of each of CHUNKS], that of the plain form)."""
    spec = Head(vocab, soft_cap)

    @jax.jit
    def run(h, w, targets, g, g_second):
        def pulled(f, second):
            out, pull = jax.vjp(f, h, w)
            return out, pull((g, second))

        def ours(chunks):
            return pulled(lambda h, w: head.loss(h, w, targets, spec, z_loss, chunks), g_second)

        # Gradients flow from the first output alone, whatever the cotangent of the second.
        wanted = pulled(lambda h, w: plain(h, w, targets, spec, z_loss), jnp.zeros_like(g))
        return [ours(chunks) for chunks in CHUNKS], wanted

    return run


def error(found, wanted):
    """max |difference| over max(1, max |wanted|), the largest over the leaves: a saturated softmax
    has gradients near 0, of which a relative error says nothing."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    errors = []
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.isfinite(a).all()
        errors.append(np.abs(a - b).max() / max(1, np.abs(b).max()))
    return max(errors)


def numpy_loss(h, w, targets, vocab, soft_cap, z_loss):
    """Both outputs over the tokens alone: the padding is cut off before anything else."""
    z = h.astype(np.float64) @ w[:, :vocab].astype(np.float64)
    if soft_cap is not None:
        z = soft_cap * np.tanh(z / soft_cap)
    top = z.max(axis=-1)
    logsumexp = top + np.log(np.exp(z - top[..., None]).sum(axis=-1))
    nll = logsumexp - np.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    return nll, logsumexp, nll.mean() + z_loss * (logsumexp**2).mean()


# --------------------------------------------------------------------------------------------------
# loss = the plain form


@pytest.mark.parametrize(("vocab", "soft_cap", "z_loss"), OPTIONS)
@given(
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    cotangents=st.tuples(*[st.sampled_from([1.0, -2.5, 1e-3, 0.0])] * 2),
)
@settings(max_examples=15)
def test_loss_equals_autodiff_in_float64(vocab, soft_cap, z_loss, seed, scale, cotangents):
    """The same sums in another order, about 100 operations of 1e-16 each: 1e-12."""
    h, w, targets = draw(seed, vocab, np.float64, scale)
    with jax.enable_x64(True):
        g = [jnp.asarray(c, jnp.float64) for c in cotangents]
        found, wanted = programs(vocab, soft_cap, z_loss)(h, w, targets, *g)
        assert all(a.dtype == np.float64 for a in jax.tree.leaves((found, wanted)))
    for chunks, results in zip(CHUNKS, found, strict=True):
        assert error(results, wanted) <= 1e-12, chunks
    nll, _, total = numpy_loss(h, w, targets, vocab, soft_cap, z_loss)
    assert error(wanted[0], (total, nll.mean())) <= 1e-12
    if vocab < V:
        assert all((np.asarray(dw)[:, vocab:] == 0).all() for _, (_, dw) in found)


@pytest.mark.parametrize(("vocab", "soft_cap", "z_loss"), OPTIONS)
def test_loss_equals_autodiff_in_float32(vocab, soft_cap, z_loss):
    """Against float64: logits of up to 10 are known to 10 * 2^-24, and so are their softmax and its
    sums: 1e-5 of the largest entry."""
    h, w, targets = draw(0, vocab, np.float32)
    g = (np.float32(-2.5), np.float32(7.0))
    found, plain32 = programs(vocab, soft_cap, z_loss)(h, w, targets, *g)
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(found))
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (h, w)]
        _, wanted = programs(vocab, soft_cap, z_loss)(*wide, targets, *map(np.float64, g))
    for chunks, results in zip(CHUNKS, found, strict=True):
        assert error(results, wanted) <= 1e-5, chunks
        assert error(results, plain32) <= 1e-5, chunks


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_mistakes_are_far_beyond_the_tolerances(soft_cap):
    """Negative control: the same comparison with one thing wrong in the reference."""
    vocab, z_loss = 13, 0.1
    h, w, targets = draw(0, vocab, np.float32)
    one = np.float32(1)
    results = programs(vocab, soft_cap, z_loss)(h, w, targets, one, one)[0][CHUNKS.index(3)]

    def reference(options, targets=targets, order=slice(None)):
        return programs(*options)(h, w, targets[:, order], one, one)[1]

    assert error(results, reference((vocab, soft_cap, z_loss))) <= 1e-5
    wrong = {
        "targets shifted": reference((vocab, soft_cap, z_loss), np.roll(targets, 1, axis=1)),
        "positions of the chunks mixed": reference(
            (vocab, soft_cap, z_loss), order=[0, 3, 1, 4, 2, 5]
        ),
        "padding not masked": reference((V, soft_cap, z_loss)),
        "no z-loss": reference((vocab, soft_cap, 0.0)),
        "soft cap": reference((vocab, None if soft_cap else 3.0, z_loss)),
    }
    for name, other in wrong.items():
        assert error(results[1], other[1]) > 1e-2, name  # the gradients
        assert error(results[0], other[0]) > 1e-2, name  # the values


def test_the_second_output_carries_no_gradient():
    """As documented; the plain form, which has no such rule, does carry one."""
    h, w, targets = draw(0, V, np.float32)

    def second(f):
        return jax.grad(lambda h, w: f(h, w, targets, Head(V), 0.1)[1], argnums=(0, 1))(h, w)

    assert all((g == 0).all() for g in second(head.loss))
    assert all((g != 0).any() for g in second(plain))


def test_values_without_gradients_are_those_with():
    """Two programs of one formula: a unit in the last place."""
    h, w, targets = draw(0, 13, np.float32)
    for z_loss, chunks in itertools.product((0.0, 0.1), (1, 3)):
        f = functools.partial(head.loss, head=Head(13, 3.0), z_loss=z_loss, chunks=chunks)
        alone = f(h, w, targets)
        with_gradients = jax.vjp(lambda h, w, f=f: f(h, w, targets), h, w)[0]
        np.testing.assert_allclose(alone, with_gradients, rtol=2e-7)
        assert (alone[0] == alone[1]) == (z_loss == 0)


# --------------------------------------------------------------------------------------------------
# bfloat16


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_bfloat16(soft_cap, weight_dtype):
    """bfloat16 keeps 8 bits: a logit z is off by |z| 2^-8 at most, the sum over the width
    included; nll is the difference of two functions of slope 1 in the logits."""
    h, w, targets = draw(0, 13, np.float32, shape=(B, T, 32))
    h = jnp.asarray(h / 32**0.5, jnp.bfloat16)
    w = jnp.asarray(w, weight_dtype)
    spec = Head(13, soft_cap)

    def both(f, h, w):
        out, pull = jax.vjp(lambda h, w: f(h, w, targets, spec, 0.1), h, w)
        return out, pull((jnp.ones((), out[0].dtype), jnp.zeros((), out[1].dtype)))

    outputs, (dh, dw) = both(functools.partial(head.loss, chunks=3), h, w)
    assert {out.dtype for out in outputs} == {jnp.dtype("float32")}
    assert dh.dtype == jnp.bfloat16 and dw.dtype == jnp.dtype(weight_dtype)
    with jax.enable_x64(True):
        # The loss rounds the weight to the dtype of h: so does what it is compared with.
        h64, w64 = (np.asarray(jnp.asarray(a, jnp.bfloat16)).astype(np.float64) for a in (h, w))
        wanted, (dh64, dw64) = jax.tree.map(np.asarray, both(plain, h64, w64))
        largest = np.abs(h64 @ w64).max()
        bound = 2 * 2**-8 * largest
        gap = abs(float(outputs[1]) - float(wanted[1]))
        assert 1e-6 < gap <= bound  # and it did run in bfloat16
        # dz is off by its own rounding and by that of the logits; sums over V and over B T.
        for found, exact in ((dh, dh64), (dw, dw64)):
            off = np.abs(np.asarray(found, np.float64) - exact).max()
            assert 0 < off <= (2**-8 + bound) * np.abs(exact).max()
    shifted = jax.grad(
        lambda w: head.loss(h, w, np.roll(targets, 1, axis=1), spec, 0.1)[0]
    )(w)  # fmt: skip
    off = np.abs(np.asarray(shifted, np.float64) - dw64).max()
    assert off > 4 * (2**-8 + bound) * np.abs(dw64).max()


def computation(f, dtype, z_loss=0.1):
    """The jaxpr of a loss with both of its gradients."""
    h, w, targets = draw(0, 13, np.float32)
    return jax.make_jaxpr(
        jax.value_and_grad(lambda h, w: f(h, w, targets, Head(13, 3.0), z_loss)[0], argnums=(0, 1))
    )(jnp.asarray(h, dtype), w)


def test_no_logits_are_kept():
    """With chunks no array is larger than the logits of one, or the weight."""

    def largest(jaxpr):
        outs = (v for _, eqn in jaxprs.walk(jaxpr) for v in eqn.outvars)
        return max(v.aval.size for v in outs)

    chunked = functools.partial(head.loss, chunks=3)
    assert largest(computation(chunked, "float32")) == max(B * T // 3 * V, D * V)
    assert largest(computation(plain, "float32")) == B * T * V


def test_every_matmul_runs_in_the_dtype_of_h():
    """The reason for the rule of its own: autodiff runs both backward matmuls in float32."""

    def operands(jaxpr):
        dots = [e for _, e in jaxprs.walk(jaxpr) if e.primitive.name == "dot_general"]
        assert len(dots) == 3
        return [{v.aval.dtype.name for v in eqn.invars} for eqn in dots]

    chunked = functools.partial(head.loss, chunks=3)
    assert operands(computation(chunked, "bfloat16")) == [{"bfloat16"}] * 3
    assert any("float32" in dtypes for dtypes in operands(computation(plain, "bfloat16")))


# --------------------------------------------------------------------------------------------------
# Without gradients


@pytest.mark.parametrize("chunk_elements", [head.CHUNK_ELEMENTS, B * 2 * V, 1])
@pytest.mark.parametrize(("vocab", "soft_cap"), [(V, None), (13, None), (13, 3.0)])
def test_predict_is_the_plain_nll_and_argmax(monkeypatch, vocab, soft_cap, chunk_elements):
    """Also cut into 1, 3 and 6 chunks; the same logits summed in another order: 1e-6."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk_elements)
    h, w, targets = draw(0, vocab, np.float32)
    # Where nothing may look.
    w[:, vocab:] *= 50
    assert head.chunks_of(h, w) == {B * 2 * V: 3, 1: 6}.get(chunk_elements, 1)
    nll, top = head.predict(h, w, targets, Head(vocab, soft_cap))
    wanted, _, _ = numpy_loss(h, w, targets, vocab, soft_cap, 0.0)
    assert error(nll, wanted) <= 1e-6
    assert error(nll, head.cross_entropy(h, w, targets, Head(vocab, soft_cap))[0]) <= 1e-6
    assert (np.asarray(top) == (h @ w[:, :vocab]).argmax(axis=-1)).all()
    if vocab < V:  # negative control: unmasked, the padding wins
        wrong, padding = head.predict(h, w, targets, Head(V, soft_cap))
        assert error(wrong, wanted) > 1e-2 and (np.asarray(padding) >= vocab).any()


def test_predict_of_a_split_vocabulary():
    """Four columns of the sixteen on each of four devices, of thirteen tokens; equal logits too, of
    which the first counts."""
    h, w, targets = draw(0, 13, np.float32)
    h[0, :2] = 0
    w[:, 5] = w[:, 9] = 3 * w[:, 9]
    split = jax.shard_map(
        lambda *arrays: head.predict(*arrays, Head(13)),
        mesh=sharding.make_mesh(1, 4),
        in_specs=(PartitionSpec(), PartitionSpec(None, "model"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    (nll, top), (wanted, whole) = split(h, w, targets), head.predict(h, w, targets, Head(13))
    assert error(nll, wanted) <= 1e-6
    np.testing.assert_array_equal(top, whole)
    assert (top[0, :2] == 0).all() and (np.asarray(top) == 5).any()
    assert len(np.unique(np.asarray(top) // 4)) > 1


@given(
    batch=st.integers(1, 512),
    length=st.integers(1, 4096),
    stored=st.integers(1, 2048).map(lambda n: 128 * n),
)
@settings(max_examples=200)
def test_chunks_of_is_the_fewest_that_divide_and_fit(batch, length, stored):
    h = SimpleNamespace(shape=(batch, length, 8))
    w = SimpleNamespace(shape=(8, stored))
    chunks = head.chunks_of(h, w)
    assert 1 <= chunks <= length and length % chunks == 0

    def fits(c):
        return batch * (length // c) * stored <= head.CHUNK_ELEMENTS

    assert fits(chunks) or chunks == length
    fewer = [c for c in range(1, chunks) if length % c == 0]
    assert not any(fits(c) for c in fewer)


def test_chunks_of_known_shapes():
    """By hand: 64 x 1024 x 50304 = 3.1 * 2^30, the next divisor of 1024 is 4; a prime length has
    no divisor but itself."""

    def chunks(batch, length, stored):
        return head.chunks_of(
            SimpleNamespace(shape=(batch, length, 8)), SimpleNamespace(shape=(8, stored))
        )

    assert chunks(16, 128, 4096) == 1
    assert chunks(64, 1024, 50304) == 4
    assert chunks(64, 1021, 50304) == 1021


def test_chunks_that_do_not_divide_are_refused():
    h, w, targets = jnp.zeros((1, 6, 2)), jnp.zeros((2, 8)), jnp.zeros((1, 6), int)
    with pytest.raises(ValueError, match=r"^4 chunks do not divide 6 positions: give a divisor"):
        head.loss(h, w, targets, head.Head(8), 0.0, 4)
