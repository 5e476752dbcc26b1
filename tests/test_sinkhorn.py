"""Sinkhorn: gradients that agree, an exact limit, memory and compile time that do not grow."""

import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle_manifolds
import pytest

import mhcjax as mhc
from mhcjax.config import override, preset
from mhcjax.manifolds.newton import solve_laplacian, stiffness
from mhcjax.manifolds.sinkhorn import CONVERGED, distance

GRADIENTS = ("implicit", "unrolled", "autodiff")
VARIANTS = {
    "mhc": {},
    "deepseek_v4": {"start": "softmax", "eps": 1e-6, "last": "columns", "domain": "linear"},
    "lucidrains": {"eps": 1e-12, "clamp": True, "domain": "linear"},
}


def _draws(std, count, streams, dtype=np.float32):
    rng = np.random.default_rng(round(10 * std) + streams)
    return (std * rng.standard_normal((count, streams * streams))).astype(dtype)


def _pull(manifold, logits, streams):
    cotangent = np.random.default_rng(1).standard_normal((len(logits), streams, streams))
    pull = jax.jit(lambda l, ct: jax.vjp(lambda l: manifold.matrix(l, streams), l)[1](ct)[0])
    return np.asarray(pull(jnp.asarray(logits), jnp.asarray(cotangent, logits.dtype)))


def _error(res):
    off = [np.abs(np.asarray(res, np.float64).sum(axis) - 1).max(-1) for axis in (-1, -2)]
    return np.maximum(*off)


# --------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("name", VARIANTS)
def test_implicit_and_unrolled_agree_where_the_forward_has_converged(name, capsys):
    """... and differ where it has not, by how much is printed. float64, so that what differs is the
    method and not rounding."""
    options, streams = VARIANTS[name], 4
    with jax.enable_x64(True):
        for std in (0.5, 1.0, 2.0, 4.0):
            logits = _draws(std, 2000, streams, np.float64)
            res = mhc.Sinkhorn(**options).matrix(jnp.asarray(logits), streams)
            implicit, unrolled, plain = (
                _pull(mhc.Sinkhorn(**options, gradient=g), logits, streams) for g in GRADIENTS
            )
            auto = _pull(mhc.Sinkhorn(**options), logits, streams)
            scale = np.abs(unrolled).max(-1, keepdims=True)
            converged = np.asarray(distance(mhc.Sinkhorn(**options), res)) <= CONVERGED
            difference = (np.abs(implicit - unrolled) / scale).max(-1)
            assert converged.sum() > 20
            assert difference[converged].max() <= 1e-4
            # The same function, differentiated by the same rules, in chunks.
            np.testing.assert_allclose(unrolled, plain, rtol=0, atol=1e-12 * scale.max())
            # What "auto" promises in float64: the unrolled gradient but for rounding.
            np.testing.assert_allclose(auto, unrolled, rtol=0, atol=1e-9 * scale.max())
            if not converged.all():
                with capsys.disabled():
                    print(
                        f"\n{name}, std {std}: {(~converged).mean():.0%} not converged; implicit "
                        f"differs by {np.median(difference[~converged]):.1e} (median), "
                        f"{difference[~converged].max():.1e} (largest)",
                        end="",
                    )
                if std == 4.0:
                    assert difference[~converged].max() > 1e-3  # there the choice matters


def test_auto_is_implicit_where_all_have_converged_and_unrolled_elsewhere():
    """In float32, bit for bit."""
    streams = 4
    fine, coarse = _draws(0.5, 8, streams), _draws(6.0, 8, streams)
    assert np.all(
        distance(mhc.Sinkhorn(), mhc.Sinkhorn().matrix(jnp.asarray(fine), streams)) <= CONVERGED
    )
    assert np.all(
        distance(mhc.Sinkhorn(), mhc.Sinkhorn().matrix(jnp.asarray(coarse), streams)) > CONVERGED
    )
    for logits, taken in ((fine, 1), (coarse, 2), (np.concatenate([fine, coarse]), 2)):
        pulled = [
            _pull(mhc.Sinkhorn(gradient=g), logits, streams)
            for g in ("auto", "implicit", "unrolled")
        ]
        np.testing.assert_array_equal(pulled[0], pulled[taken])
    assert np.abs(pulled[1] - pulled[2]).max() > 1e-4  # where the choice matters


def test_a_matrix_at_its_limit_may_have_a_derivative_that_is_not():
    """A symmetric matrix is doubly stochastic after one pair; what a change of its logits does is
    still shrinking after twenty, by 0.68 a pair here: the default has to be the unrolled one."""
    logits = np.array([[0.0, 2.3526473, 2.3526473, 0.0]], np.float32)
    assert _error(mhc.Sinkhorn().matrix(jnp.asarray(logits), 2)) < 1e-6
    auto, implicit, unrolled = (
        _pull(mhc.Sinkhorn(gradient=g), logits, 2) for g in ("auto", "implicit", "unrolled")
    )
    np.testing.assert_array_equal(auto, unrolled)
    assert np.abs(implicit - unrolled).max() > 1e-5 * np.abs(unrolled).max()


def test_a_row_that_underflowed_is_not_converged():
    """The rest of the matrix is uniform, where every pair would settle at once."""
    logits = jnp.zeros((3, 3)).at[0].set(-200.0)
    manifold = mhc.Sinkhorn(domain="linear")
    res = manifold.matrix(logits.reshape(-1), 3)
    assert not res[0].any()  # the limit is uniform
    assert distance(manifold, res) > 0.1


def test_every_gradient_has_the_same_forward():
    logits = jnp.asarray(_draws(3.0, 50, 4))
    first, *rest = (
        np.asarray(mhc.Sinkhorn(gradient=g).matrix(logits, 4)) for g in ("auto", *GRADIENTS)
    )
    for other in rest:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("manifold", [mhc.Sinkhorn(), mhc.NewtonSinkhorn()], ids=["20", "limit"])
def test_reference_is_differentiable_every_way(manifold):
    """Forward mode and second order, which a custom VJP refuses."""
    spec = replace(mhc.presets.mhc(), manifold=manifold)
    params = mhc.init(spec, width=8, layer=1, layers=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 8)), jnp.float32)

    def res(params, implementation):
        return mhc.mix(spec, params, x, implementation=implementation).res

    tangent = jax.tree.map(jnp.ones_like, params)
    _, moved = jax.jvp(lambda p: res(p, "reference"), (params,), (tangent,))
    assert np.isfinite(moved).all()
    hessian = jax.hessian(lambda s: res({**params, "scale": s}, "reference")[..., 0, 1].sum())
    assert np.isfinite(hessian(params["scale"])).all()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: res(p, None), (params,), (tangent,))


def test_both_gradients_of_the_limit_are_those_of_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(_draws(2.0, 1, 4, np.float64)[0])
        weight = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)))

        def value(l, gradient="autodiff"):
            return jnp.sum(weight * mhc.NewtonSinkhorn(gradient=gradient).matrix(l, 4))

        def differences(function):
            moved = 1e-4 * np.eye(16)
            return np.array([(function(logits + e) - function(logits - e)) / 2e-4 for e in moved])

        wanted = differences(value)
        for gradient in ("implicit", "autodiff"):
            found = jax.grad(value)(logits, gradient)
            # Second-order differences at a step of 1e-4: 1e-8 times a third derivative.
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        np.testing.assert_allclose(jax.jacfwd(value)(logits), wanted, atol=1e-6)
        hessian = jax.hessian(value)(logits)
        np.testing.assert_allclose(hessian, differences(jax.grad(value)), atol=1e-6)


def test_laplacian_is_solved_to_the_last_digit_of_small_weights():
    """Weights over 30 orders of magnitude: a path whose links are tiny beside one strong link."""
    with jax.enable_x64(True):
        weights = np.zeros((3, 3))
        weights[0, 1] = weights[1, 0] = 1e-30
        weights[1, 2] = weights[2, 1] = 1.0
        right = np.array([[-2e-30], [0.0], [2e-30]])
        b = solve_laplacian(jnp.asarray(weights), jnp.asarray(right))
        np.testing.assert_allclose(b[:, 0], [0.0, 2.0, 2.0], rtol=1e-14)


def test_distance_bounds_the_distance_from_the_limit():
    """Against the exact projection; and stiffness against a pseudo-inverse."""
    with jax.enable_x64(True):
        for std in (0.5, 2.0, 4.0):
            logits = jnp.asarray(_draws(std, 400, 4, np.float64))
            res = mhc.Sinkhorn().matrix(logits, 4)
            exact = mhc.NewtonSinkhorn().matrix(logits, 4)
            off = np.abs(res - exact).max((-1, -2))
            assert (off <= np.asarray(distance(mhc.Sinkhorn(), res)) + 1e-12).all()
            laplacian = np.eye(4) - np.swapaxes(exact, -1, -2) @ np.asarray(exact)
            traces = np.trace(np.linalg.pinv(laplacian, rcond=1e-13), axis1=-2, axis2=-1)
            np.testing.assert_allclose(stiffness(exact), traces, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# The exact projection


@pytest.mark.parametrize("streams", [2, 3, 4, 8, 16])
def test_projection_in_float32_is_the_fixed_point_in_float64(streams, capsys):
    """Logits of standard deviation 10: both marginals to 2e-6, and 1e-5 from the limit, which the
    oracle finds by other means."""
    manifold, count = mhc.NewtonSinkhorn(), 20000 if streams == 4 else 2000
    logits = _draws(10.0, count, streams)
    res = np.asarray(jax.jit(lambda l: manifold.matrix(l, streams))(jnp.asarray(logits)))
    steps = np.asarray(jax.jit(lambda l: manifold.steps(l, streams))(jnp.asarray(logits)))
    wide = res.astype(np.float64)
    assert np.abs(wide.sum(-1) - 1).max() <= 2e-6
    assert np.abs(wide.sum(-2) - 1).max() <= 2e-6
    with jax.enable_x64(True):
        exact = np.asarray(manifold.matrix(jnp.asarray(logits, jnp.float64), streams))
    assert _error(exact).max() <= 1e-12
    assert np.abs(wide - exact).max() <= 1e-5
    some = oracle_manifolds.sinkhorn_limit(logits[:20].astype(np.float64), streams)
    np.testing.assert_allclose(exact[:20], some, rtol=0, atol=1e-11)
    with capsys.disabled():
        print(f"\nN={streams}: {steps.mean():.1f} steps on average, at most {steps.max()}", end="")
    assert steps.max() < manifold.max_steps


def test_projection_of_blocks_that_hang_together_by_tiny_entries():
    """What has to pass between the blocks is below float32's rounding of the marginals, which over
    a weight of 1e-9 would be a step of hundreds: this matrix once ended at 1.8e-5."""
    logits = np.array(
        [
            *(-4.8315215, 2.5887737, 3.7726932, -9.62241),
            *(-2.3088174, 4.8206687, -24.81051, 18.83269),
            *(-1.5269214, 18.24141, -1.8272616, -14.678647),
            *(22.460505, -12.835141, -21.372475, -16.57128),
        ],
        np.float32,
    )
    res = np.asarray(mhc.NewtonSinkhorn().matrix(jnp.asarray(logits), 4), np.float64)
    assert np.abs(res.sum(-2) - 1).max() <= 2e-6
    exact = oracle_manifolds.sinkhorn_limit(np.asarray(logits, np.float64), 4)
    assert np.abs(res - exact).max() <= 1e-5


def test_plain_newton_fails_where_the_damped_one_does_not():
    """Negative control: undamped steps from zero diverge on some of these matrices."""
    logits = _draws(10.0, 2000, 4, np.float64).reshape(-1, 4, 4)
    b = np.zeros((len(logits), 4))
    with np.errstate(all="ignore"):
        for _ in range(60):
            shifted = logits + b[:, None, :]
            res = np.exp(shifted - shifted.max(-1, keepdims=True))
            res /= res.sum(-1, keepdims=True)
            columns = res.sum(-2)
            hessian = np.einsum("ti,ij->tij", columns, np.eye(4)) - np.swapaxes(res, 1, 2) @ res
            gradient = (1 - columns)[:, 1:]
            # A singular one stays where it is.
            good = np.isfinite(hessian).all((1, 2)) & (np.linalg.det(hessian[:, 1:, 1:]) != 0)
            step = np.linalg.solve(hessian[good, 1:, 1:], gradient[good, :, None])
            b[good, 1:] += step[..., 0]
    assert (~(_error(res) <= 1e-6)).mean() > 0.001


# --------------------------------------------------------------------------------------------------
# Memory and compile time


def _temporary_bytes(manifold, tokens=8192, streams=4):
    shape = jax.ShapeDtypeStruct((tokens, streams * streams), jnp.float32)
    pull = jax.jit(jax.grad(lambda l: jnp.sum(jnp.sin(manifold.matrix(l, streams)))))
    return pull.lower(shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_default_gradient_does_not_grow_with_the_iterations():
    few, many = (_temporary_bytes(mhc.Sinkhorn(iterations=n)) for n in (10, 40))
    assert few > 8192 * 16 * 4  # it holds the matrices at least
    assert many <= 1.1 * few
    plain = [_temporary_bytes(mhc.Sinkhorn(iterations=n, gradient="autodiff")) for n in (10, 40)]
    assert plain[1] > 2 * plain[0]  # negative control: what it would be


def test_nothing_but_the_logits_is_saved():
    manifold = mhc.Sinkhorn()
    logits = jnp.asarray(_draws(1.0, 32, 4))
    _, pull = jax.vjp(lambda l: manifold.matrix(l, 4), logits)
    saved = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= logits.size]
    assert [leaf.size for leaf in saved] == [logits.size]
    _, plain = jax.vjp(lambda l: mhc.Sinkhorn(gradient="autodiff").matrix(l, 4), logits)
    assert sum(leaf.size for leaf in jax.tree.leaves(plain)) > 10 * logits.size


@pytest.mark.slow
def test_compile_time_of_sinkhorn_in_a_model():
    """Twelve layers, 20 iterations: at most 1.3 times that of permutations, median of three."""
    from mhcjax import optim, train

    def seconds(connection):
        base = {
            "model.layers": 12,
            "model.width": 64,
            "model.vocab": 256,
            "model.connection.preset": connection,
            "model.connection.init": None,
            "data.batch": 8,  # over the forced devices of the tests
            "data.length": 64,
        }
        config = override(preset("nano"), base)
        taken = []
        for _ in range(3):
            jax.clear_caches()
            program = train.program(config)
            hyper = optim.hyper(config.optim, config.total_steps)
            lowered = program.train_step.lower(
                program.abstract_state, program.abstract_batch, hyper
            )
            began = time.perf_counter()
            lowered.compile()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        sinkhorn, permutations = seconds("mhc"), seconds("mhc_lite")
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    print(f"sinkhorn {sinkhorn:.1f} s, permutations {permutations:.1f} s")
    assert sinkhorn <= 1.3 * permutations


def test_chunks_are_larger_on_a_gpu(monkeypatch):
    """8192 matrices: many loops one after another on a CPU, whose cache they fit; there every
    operation of a loop would be a launch."""

    def outer_loops():
        f = jax.grad(lambda l: mhc.manifolds.Sinkhorn(gradient="unrolled").matrix(l, 4).sum())
        closed = jax.make_jaxpr(f)(jnp.zeros((8192, 16)))
        return [e.params["length"] for e in closed.jaxpr.eqns if e.primitive.name == "scan"]

    assert max(outer_loops()) > 20
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert max(outer_loops()) == 20
