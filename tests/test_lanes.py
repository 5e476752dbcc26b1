"""What a token does with its few numbers, on lanes: the manifold's own matrix and its gradient."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mhcjax as mhc
from mhcjax import presets
from mhcjax.kernels.lanes import SEGMENT, Unsupported, on_lanes
from mhcjax.manifolds import MANIFOLDS, reference
from tests import layers

TOKENS = 5
# Of the largest entry: some tens of float32 operations of 6e-8 each. Newton-Schulz multiplies its
# errors by up to 3.4 a step, five times, forward and backward.
TOLERANCE = {"newton_schulz": 1e-4}
SUPPORTED = {
    "permutations": (1, 2, 3, 4),
    "unconstrained": (1, 4),
    "sinkhorn": (1, 2, 3, 4),
    "kronecker": (4, 6, 8),
    "newton_schulz": (2,),  # XLA for CPUs takes minutes over the three streams, written out
}
CASES = [(MANIFOLDS[name], name, N) for name, counts in SUPPORTED.items() for N in counts]
CASES += [(presets.deepseek_v4().manifold, "deepseek", 3)]
CASES += [(presets.mhc_lite().manifold, "mhc_lite", 3)]
CASES += [(mhc.Sinkhorn(iterations=7), "seven", 2)]
CASES += [(mhc.Sinkhorn(domain="linear", clamp=True, eps=1e-12), "clamped", 2)]


def plainly(f):
    """`on_lanes(f)` as a function of arrays: [T, J] -> [T, entries of f's result]."""

    def run(l_TJ):
        (entries,) = f([l_TJ[:, j] for j in range(l_TJ.shape[1])])
        full = [jnp.broadcast_to(jnp.asarray(e, l_TJ.dtype), l_TJ.shape[:1]) for e in entries]
        return jnp.stack(full, axis=-1)

    return run


def agree(found, wanted, tolerance, what):
    scale = max(1, np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale, err_msg=what)


def compare(f, plain, logits, tolerance=2e-6):
    """Values and gradients of the two functions of logits[T, J]."""
    found, pull = jax.vjp(layers.compiled(f), logits)
    wanted, plain_pull = jax.vjp(layers.compiled(plain), logits)
    d = jnp.asarray(np.random.default_rng(1).standard_normal(wanted.shape), jnp.float32)
    agree(found, wanted, tolerance, "values")
    agree(pull(d)[0], plain_pull(d)[0], tolerance, "gradients")


def draw(J):
    return jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, J)), jnp.float32)


@pytest.mark.parametrize(("manifold", "name", "N"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_a_manifold_on_lanes_is_itself(manifold, name, N):
    J, matrix = manifold.num_logits(N), partial(reference(manifold).matrix, streams=N)
    run = plainly(on_lanes(matrix, [(J,)]))
    tolerance = TOLERANCE.get(name, 2e-6)
    compare(run, lambda l: matrix(l).reshape(TOKENS, -1), draw(J), tolerance)
    once = layers.compiled(plainly(on_lanes(matrix, [(J,)], differentiable=False)))
    agree(once(draw(J)), matrix(draw(J)).reshape(TOKENS, -1), tolerance, "values, no gradient")


def test_a_transposed_matrix_is_caught():
    matrix = partial(MANIFOLDS["sinkhorn"].matrix, streams=3)
    run = plainly(on_lanes(lambda l: matrix(l).T, [(9,)]))
    with pytest.raises(AssertionError, match="values"):
        compare(run, lambda l: matrix(l).reshape(TOKENS, -1), draw(9))


# --------------------------------------------------------------------------------------------------
# Loops: carries are kept every SEGMENT steps, the others made again


def turned(steps):
    """A loop whose steps do not commute, over two carries of different shapes."""

    def f(l):
        def step(_, carry):
            a, b = carry
            return jnp.sin(
                a + b[..., None] * jnp.concatenate([a[..., 1:], a[..., :1]], -1) / 2
            ), b * 0.9 + a.sum(-1) / 4

        return jax.lax.fori_loop(0, steps, step, (l, l.sum(-1)))[0]

    return f


@pytest.mark.parametrize("steps", [1, 4, 5, 6, 10, 11, 20])
def test_loops(steps):
    assert SEGMENT == 5, "choose steps on both sides of the new segments' ends"
    compare(plainly(on_lanes(turned(steps), [(3,)])), turned(steps), draw(3))


def test_a_loop_with_a_step_too_few_is_caught():
    with pytest.raises(AssertionError, match="values"):
        compare(plainly(on_lanes(turned(5), [(3,)])), turned(6), draw(3))


# --------------------------------------------------------------------------------------------------
# What has no form on lanes


@pytest.mark.parametrize(
    "f",
    [
        lambda l: jnp.sort(l),
        lambda l: jnp.cumsum(l),
        lambda l: jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a + 1, l),
        lambda l: jax.lax.scan(lambda c, a: (c + a, c), 0.0, l)[0],
    ],
)
def test_a_primitive_without_a_form_is_named(f):
    with pytest.raises(Unsupported, match=r"sort|cumsum|while|a loop with inputs"):
        on_lanes(f, [(3,)])


NOT_LINEAR, MANIFOLD = "not linear", "its manifold needs"
WITHOUT = {
    "hc": NOT_LINEAR,
    "lucidrains_mhc": NOT_LINEAR,
    "jpmhc": NOT_LINEAR,
    "go_mhc": MANIFOLD,
    "ihc": MANIFOLD,
    "ohc": MANIFOLD,
    "shc": MANIFOLD,
    "tbp": MANIFOLD,
    "cmhc": MANIFOLD,
}


def test_every_other_preset_has_kernels():
    """Here by hand, so that a preset that loses its kernels is seen."""
    with_kernels = {"mhc", "deepseek_v4", "single_pass", "megatron", "maxtext", "liger"}
    with_kernels |= {"mhc_lite", "kromhc", "hc_static", "mhc_n2", "mhc_n4"}
    assert with_kernels | set(WITHOUT) | {"residual"} == set(presets.PRESETS)
    for name in sorted(with_kernels):
        N = {"mhc_n4": 4}.get(name, 2)
        spec, params, x, *_ = layers.draw(name, N, 64, (2,), "float32")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = partial(mhc.mix, spec, implementation="pallas")
            jax.eval_shape(run, params, x)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_connection_without_kernels_says_so_once_and_takes_xla(name):
    """Read and write still have kernels: another order of the same sums, 2e-6."""
    spec, params, x, y, _ = layers.draw(name, 4, 64, (3,), "float32")
    jax.clear_caches()  # of what is traced already, nothing is said
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        (found,) = layers.sublayer(spec, params, x, y)
    texts = [str(w.message) for w in said if "implementation" in str(w.message)]
    assert len(texts) == 1 and WITHOUT[name] in texts[0] and "'xla'" in texts[0], texts
    agree(found, layers.sublayer(spec, params, x, y, "xla")[0], 2e-6, name)
