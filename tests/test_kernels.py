"""The kernels' values and gradients.

XLA's read and write against autodiff of the plain sums, in float64; the fused ones, interpreted on
a CPU and compiled on a GPU (`--gpu`), against the float64 oracle, with faults that must be caught.
"""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mhcjax as mhc
from mhcjax import kernels
from mhcjax.kernels import dynamic, projection, triton
from tests import layers, oracle, oracle_layer, oracle_presets

# Leading axes of (streams, coefficients): static, per token, fewer, broadcast either way.
LEADING = [
    ((3, 4), ()),
    ((3, 4), (3, 4)),
    ((3, 4), (4,)),
    ((3, 4), (1, 4)),
    ((3, 4), (3, 1)),
    ((), (5,)),
    ((1, 4), (3, 1)),
]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def agree(f, plain, arguments):
    """Values and all gradients, 1e-12: sums of at most a hundred terms in another order."""
    found, pull = jax.vjp(f, *arguments)
    wanted, plain_pull = jax.vjp(plain, *arguments)
    dout = draw(9, *wanted.shape)
    for a, b in zip((found, *pull(dout)), (wanted, *plain_pull(dout)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


def plain_read(x, pre):
    return jnp.einsum("...nd,...n->...d", x, pre)


def plain_write(x, y, res, post):
    return jnp.einsum("...mn,...nd->...md", res, x) + post[..., None] * y[..., None, :]


@pytest.mark.parametrize(("tokens", "leading"), LEADING)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_read(tokens, leading, N):
    with jax.enable_x64(True):
        agree(kernels.read, plain_read, (draw(0, *tokens, N, 6), draw(1, *leading, N)))


@pytest.mark.parametrize(("tokens", "leading"), LEADING)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (2, 2), (3, 2)])
def test_write(tokens, leading, M, N):
    """M need not be N; a transposed res, here of another shape, could not pass."""
    with jax.enable_x64(True):
        x, y = draw(0, *tokens, N, 6), draw(1, *tokens, 6)
        agree(kernels.write, plain_write, (x, y, draw(2, *leading, M, N), draw(3, *leading, M)))


def test_a_transposed_gradient_is_caught(monkeypatch):
    with jax.enable_x64(True):
        x, y, res, post = draw(0, 4, 2, 6), draw(1, 4, 6), draw(2, 2, 2), draw(3, 2)

        def transposed(x, y, res, post):
            return plain_write(x, y, res.T, post)

        with pytest.raises(AssertionError):
            agree(kernels.write, transposed, (x, y, res, post))


def test_bfloat16_streams_keep_their_dtype():
    x, pre = jnp.ones((4, 2, 8), jnp.bfloat16), jnp.ones(2)
    u, pull = jax.vjp(kernels.read, x, pre)
    dx, dpre = pull(u)
    assert (u.dtype, dx.dtype, dpre.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


# --------------------------------------------------------------------------------------------------
# The oracle of layers is that of connections, and its gradients are those of its own forward pass


def by_the_other_oracle(name, params, x, y, rule):
    """The outputs of `oracle_layer.layer`, by the loops of the oracle that has no gradients."""
    if name == "static":
        pre, post, res = oracle.mix(params, streams=x.shape[-2])
    else:
        pre, post, res = oracle_presets.mix(name, params, x)
    u = x[:, 0] if name == "single_pass" else oracle.read(x, pre)
    out = oracle.write(x, u + y, post, res, rule)
    return (out, oracle.read(out, pre)) if name == "single_pass" else (out,)


@pytest.mark.parametrize("rule", ["add_first", "mix_first"])
@pytest.mark.parametrize("name", [*oracle_layer.DYNAMIC, "mhc_n2", "mhc_n4"])
def test_the_oracle_of_layers(name, rule):
    """Rounding 1e-16 a term: 1e-12. Differences resolve 1e-11 of a loss: 1e-8 leaves room for its
    size, and is far below what a wrong formula gives."""
    N = layers.STATIC.get(name, (4,))[0]
    _, params, x, y, d = layers.draw(name, N, 3, (5,), "float32")
    args = {"x": x, "y": y, **params}
    args = {key: np.asarray(a, np.float64) for key, a in args.items()}
    d = [np.asarray(a, np.float64) for a in d]
    known = "static" if name in layers.STATIC else name

    def loss(args):
        own = {key: a for key, a in args.items() if key not in ("x", "y")}
        outputs = by_the_other_oracle(known, own, args["x"], args["y"], rule)
        return outputs, sum((g * out).sum() for g, out in zip(d, outputs, strict=True))

    given = d if known == "single_pass" else d[0]
    found, gradients, terms = oracle_layer.layer(known, params, x, y, given, rule)
    for out, wanted in zip(found, loss(args)[0], strict=True):
        assert layers.error(out, wanted) < 1e-12
    assert set(gradients) == set(args)
    rng = np.random.default_rng(0)
    for key, a in args.items():
        # Along random directions, in which every entry takes part.
        for v in rng.standard_normal((3, *a.shape)):
            along = oracle.numerical_gradient(
                lambda s, key=key, a=a, v=v: loss({**args, key: a + s * v})[1], np.array(0.0)
            )
            assert abs((gradients[key] * v).sum() - along) < 1e-8 * max(1, abs(along)), key
    for key, a in terms.items():
        assert (a >= abs(gradients[key]) - 1e-12).all()  # sums of absolute terms


# --------------------------------------------------------------------------------------------------
# The fused kernels against it


@pytest.fixture
def on_the_device():
    """conftest keeps a test off the GPU that is not marked: the kernels run on what there is."""
    device = jax.devices()[0]
    with jax.default_device(device):
        yield device


def drawn(*what, most=200):
    """A count of tokens from 1 to `most`, as one leading axis or two."""
    T = int(layers.rng_of("tokens", *what).integers(1, most + 1))
    return (2, T // 2) if T % 2 == 0 else (T,)


# (preset, streams, width, dtype); the counts of tokens are drawn.
QUICK = [
    ("mhc", 4, 64, "float32"),
    ("single_pass", 2, 64, "bfloat16"),
    ("mhc_lite", 3, 192, "float32"),
    ("megatron", 2, 320, "float32"),
    ("maxtext", 2, 64, "float32"),
    ("mhc_n2", 2, 320, "bfloat16"),
    ("mhc_n4", 4, 64, "float32"),
]
MORE = {"kromhc": (2, 6, 8), "deepseek_v4": (1, 2, 3, 4, 5, 8)}  # streams
FUSED = [name for name in oracle_layer.DYNAMIC if name != "ihc"]  # whose identity has no kernel
SLOW = [
    (name, N, D, dtype)
    for name, D, dtype in product([*FUSED, *layers.STATIC], (64, 192, 320), layers.LIMITS)
    for N in {**layers.STATIC, **MORE}.get(name, (1, 2, 3, 4))
    if (name, N, D, dtype) not in QUICK
]
EVERY = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "N", "D", "dtype"), EVERY)
def test_layers(name, N, D, dtype, on_the_device):
    layers.check_layer(name, N, D, drawn(name, N, D, dtype), dtype)


@pytest.mark.parametrize(
    ("name", "lead"), [("kromhc", ()), ("kromhc", (2, 1, 3)), ("mhc_n2", ()), ("mhc_n2", (1,))]
)
def test_a_single_token_and_any_leading_axes(name, lead, on_the_device):
    layers.check_layer(name, 2, 64, lead, "float32")


@pytest.mark.parametrize("name", ["kromhc", "mhc_n2"])
def test_layers_with_the_other_rule(name, on_the_device):
    own = layers.spec_of(name, 2).rule
    other = {"add_first": "mix_first", "mix_first": "add_first"}[own]
    layers.check_layer(name, 2, 64, (7,), "float32", rule=other)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("dtype", layers.LIMITS)
def test_mix_and_read(dtype, reads, on_the_device):
    layers.check_mix("kromhc", 2, 192, drawn("mix", dtype, reads), dtype, reads)


def _quick(N, shared):
    return pytest.param(N, shared, marks=() if N < 5 and shared == N % 2 else pytest.mark.slow)


@pytest.mark.parametrize(
    ("N", "shared"), [_quick(N, shared) for N, shared in product(range(1, 9), (False, True))]
)
def test_read_and_write(N, shared, on_the_device):
    """Both rules and both dtypes in turn."""
    rule = ("add_first", "mix_first")[N % 2]
    dtype = ("float32", "bfloat16")[(N // 2 + shared) % 2]
    layers.check_read_and_write(N, 64 * N, drawn(N, shared), dtype, rule, shared)


LARGE = [
    ("mhc", 4, 2048, (8193,), "bfloat16"),
    ("mhc", 4, 4096, (1023,), "bfloat16"),
    ("mhc", 4, 768, (2, 1025), "float32"),
    ("mhc", 4, 768, (2, 1024), "bfloat16"),
    ("single_pass", 4, 768, (4096,), "bfloat16"),
    ("mhc_lite", 4, 2048, (512,), "bfloat16"),
    ("mhc", 8, 512, (640,), "bfloat16"),
    ("mhc", 6, 768, (2, 1024), "bfloat16"),
    ("mhc_lite", 3, 320, (384,), "bfloat16"),
    ("deepseek_v4", 1, 64, (256,), "bfloat16"),
    ("mhc", 2, 2048, None, "bfloat16"),
    ("deepseek_v4", 4, 2048, None, "float32"),
    ("single_pass", 4, 2048, None, "bfloat16"),
    ("single_pass", 4, 1280, None, "float32"),
    ("mhc_lite", 4, 2048, None, "bfloat16"),
    ("kromhc", 8, 768, None, "bfloat16"),
    ("megatron", 3, 704, None, "bfloat16"),
    ("maxtext", 4, 1024, None, "float32"),
    ("mhc_n2", 2, 2048, (8193,), "bfloat16"),
    ("mhc_n4", 4, 2048, None, "bfloat16"),
    ("mhc_n4", 4, 320, None, "float32"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "N", "D", "lead", "dtype"), LARGE)
def test_large_layers(name, N, D, lead, dtype):
    lead = drawn(name, N, D, dtype, most=8193) if lead is None else lead
    layers.check_layer(name, N, D, lead, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("reads", [False, True])
def test_large_mixes(reads):
    layers.check_mix("mhc_lite", 4, 768, (1024,), "bfloat16", reads)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", layers.LIMITS)
@pytest.mark.parametrize("N", [1, 4, 8])
def test_large_reads_and_writes(N, dtype, shared):
    lead = drawn(N, shared, dtype, most=8193)
    layers.check_read_and_write(N, 1024, lead, dtype, "add_first", shared)


# --------------------------------------------------------------------------------------------------
# Every element is written, nothing that is given is, and twice the same


def poisoned(call, short=None):
    """`triton.launch` whose outputs start as NaN, on a GPU too; the kernel named `short` runs for
    one token less."""

    def make(kernel, grid, outputs, *, name, aliases=None, **how):
        flat, aliases = jax.tree.leaves(outputs), dict(aliases or {})
        free = [i for i in range(len(flat)) if i not in aliases.values()]
        poison = [jnp.full(flat[i].shape, jnp.nan, flat[i].dtype) for i in free]

        def run(*inputs):
            given = len(inputs)

            def without_poison(*refs):
                kernel(*refs[:given], *refs[given + len(free) :])

            own = aliases | {given + k: i for k, i in enumerate(free)}
            fewer = (grid[0] - (name == short), *grid[1:])
            made = call(without_poison, fewer, outputs, name=name, aliases=own, **how)
            return made(*inputs, *poison)

        return run

    return make


def poison(patched, **options):
    launch = poisoned(triton.launch, **options)
    for module in (triton, projection):
        patched.setattr(module, "launch", launch)


@pytest.fixture
def patched(monkeypatch, on_the_device):
    """monkeypatch for the kernels; what is jitted keeps what it has traced, so it is forgotten."""
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


CHECKS = {
    "dynamic": lambda: layers.check_layer("kromhc", 2, 64, (5,), "float32"),
    "single pass": lambda: layers.check_layer("single_pass", 2, 64, (5,), "float32"),
    # Of two streams, and by Kronecker factors, res is its own transpose.
    "three streams": lambda: layers.check_layer("mhc_lite", 3, 64, (5,), "float32"),
    "static": lambda: layers.check_layer("mhc_n2", 2, 64, (5,), "float32"),
    "mix and read": lambda: layers.check_mix("kromhc", 2, 64, (5,), "float32", True),
    "mix in bfloat16": lambda: layers.check_mix("kromhc", 2, 64, (5,), "bfloat16", False),
    "read and write": lambda: layers.check_read_and_write(2, 64, (5,), "float32", "add_first", 0),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_element_of_the_outputs_is_written(check, patched):
    poison(patched)
    CHECKS[check]()


@pytest.mark.parametrize("kernel", ["mhc_read", "mhc_write", "mhc_write_backward"])
def test_an_element_that_is_not_written_is_caught(kernel, patched):
    poison(patched, short=kernel)
    with pytest.raises(AssertionError, match="is off by nan"):
        CHECKS["read and write"]()


def two_gradients(name, N, D, lead, dtype):
    """The outputs and gradients of one compiled program, twice, as bytes; its arguments intact."""
    spec, params, x, y, d = layers.draw(name, N, D, lead, dtype)

    def run(params, x, y, d):
        out, pull = jax.vjp(partial(layers.sublayer, spec), params, x, y)
        return out, pull(d)

    run, given = layers.compiled(run), (params, x, y, d)
    before = [np.asarray(a).tobytes() for a in jax.tree.leaves(given)]
    found = [[np.asarray(a).tobytes() for a in jax.tree.leaves(run(*given))] for _ in range(2)]
    assert before == [np.asarray(a).tobytes() for a in jax.tree.leaves(given)]
    return found


@pytest.mark.parametrize("name", ["kromhc", "mhc_n2"])
def test_two_runs_give_the_same_bits(name, on_the_device):
    first, second = two_gradients(name, 2, 64, (40,), "float32")
    assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "N", "D", "lead", "dtype"), [c for c in LARGE if c[3]])
def test_two_large_runs_give_the_same_bits(name, N, D, lead, dtype):
    first, second = two_gradients(name, N, D, lead, dtype)
    assert first == second


def test_a_cotangent_that_is_added_to_in_place_stays_what_it_was(on_the_device):
    """The read's kernel writes dx where the cotangent of the x that it passes on lies: of one that
    the caller still holds, a copy."""
    _, params, x, _, (d,) = layers.draw("mhc_n2", 2, 64, (5,), "float32")
    u = kernels.read_on(x, params["pre_logits"])[1]
    pull = jax.vjp(kernels.read_on, x, params["pre_logits"])[1]
    cotangents = (d, jnp.ones_like(u))
    before = np.array(d)
    first, second = pull(cotangents), pull(cotangents)
    np.testing.assert_array_equal(d, before)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# --------------------------------------------------------------------------------------------------
# Negative controls: the same checks, of kernels that are subtly wrong


def transposed_res(write):
    def wrong(x, y, res, *rest):
        N = x.shape[1]
        return write(x, y, res.reshape(-1, N, N).swapaxes(1, 2).reshape(res.shape), *rest)

    return wrong


def no_gradient_of_pre(read_dots):
    return lambda *given: jnp.zeros_like(read_dots(*given))


def no_cotangent_of_the_next_read(write_backward):
    def wrong(x, y, res, post, dout, read, blocks, **how):
        return write_backward(x, y, res, post, dout, [read[0], 0 * read[1]], blocks, **how)

    return wrong


def dx_of_the_read_alone(read_backward):
    def wrong(x, pre, du, dx, blocks):
        return read_backward(x, pre, du, jnp.zeros_like(dx), blocks)

    return wrong


def dx_of_the_mix_alone(project_backward):
    def wrong(x, w, dz, scalars, du, dout, blocks):
        return project_backward(x, w, dz, scalars, du, jnp.zeros_like(dout), blocks)

    return wrong


def res_as_it_is(rows):
    """Not transposed."""

    def wrong(reads, passes, coefficients):
        *front, res = coefficients
        N = len(front[0])
        turned = [res[n * N + m] for m in range(N) for n in range(N)]
        return rows(reads, passes, [*front, turned if passes else res])

    return wrong


def pre_of_what_was_read_before(rows):
    """Where the write reads: du as if x had been read, not what res made of it."""

    def wrong(reads, passes, coefficients):
        found = rows(reads, passes, coefficients)
        N = len(coefficients[0])
        return [*coefficients[0], *found[N:]]

    return wrong


def half_of_the_tokens(project_backward):
    """In the gradient of the projection; dx is that of all."""

    def wrong(x, w, dz, *rest):
        half = dz.at[:, dz.shape[1] // 2 :].set(0)
        return project_backward(x, w, dz, *rest)[0], project_backward(x, w, half, *rest)[1]

    return wrong


def no_gradient_of_the_mean_square(coefficients_backward):
    def wrong(*given):
        dz, rows, dbias = coefficients_backward(*given)
        return dz, rows.at[0].set(0), dbias

    return wrong


def one_bfloat16_a_weight(weights):
    def wrong(w, dtype):
        found = weights(w, dtype)
        return found.at[:, 3 * projection.columns_of(found) :].set(0)

    return wrong


FAULTS = [
    (triton, "write", transposed_res, "read and write", "streams"),
    (triton, "read_dots", no_gradient_of_pre, "mix and read", "d x"),
    (triton, "write_backward", no_cotangent_of_the_next_read, "single pass", "d x"),
    (triton, "read_backward", dx_of_the_read_alone, "static", "d x"),
    (projection, "project_backward", dx_of_the_mix_alone, "dynamic", "d x"),
    (dynamic, "_rows", res_as_it_is, "three streams", "d x"),
    (dynamic, "_rows", pre_of_what_was_read_before, "single pass", "d x"),
    (projection, "project_backward", half_of_the_tokens, "mix and read", "d (gain|projection)"),
    (projection, "coefficients_backward", no_gradient_of_the_mean_square, "mix and read", "d x"),
    (projection, "weights", one_bfloat16_a_weight, "mix in bfloat16", "pre"),
]


@pytest.mark.parametrize(
    ("module", "function", "fault", "check", "what"), FAULTS, ids=[f[2].__name__ for f in FAULTS]
)
def test_the_checks_catch(module, function, fault, check, what, patched):
    patched.setattr(module, function, fault(getattr(module, function)))
    with pytest.raises(AssertionError, match=f"^{what} is off by"):
        CHECKS[check]()


@pytest.mark.parametrize("T", [37, pytest.param(1024, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learned_head(dtype, T):
    """The exit through the kernels against float64, where collapse takes XLA: values, gradients."""
    N, D = 4, 128
    rng = np.random.default_rng(0)
    drawn = {
        "x": rng.normal(size=(T, N, D)),
        "projection": rng.normal(size=(N * D, N)) / 20,
        "scale": np.asarray(1.3),
        "bias": rng.normal(size=N),
    }
    x = jnp.asarray(drawn["x"], dtype)
    du = jnp.asarray(rng.normal(size=(T, D)), dtype)

    def both(x, du, wide, implementation):
        params = {name: jnp.asarray(drawn[name], wide) for name in ("projection", "scale", "bias")}
        collapse = partial(mhc.collapse, implementation=implementation)
        u, pull = jax.vjp(lambda x, p: collapse(x, mhc.LearnedHead(), p), x, params)
        dx, own = pull(du)
        return {"u": u, "x": dx, **own}

    found = both(x, du, jnp.float32, "pallas")
    with jax.enable_x64(True):
        exact = both(x.astype(jnp.float64), du.astype(jnp.float64), jnp.float64, None)
    wanted = jax.device_get(exact)
    # The scale's gradient is a sum of terms some hundred times itself.
    terms = np.abs(drawn["projection"] * wanted["projection"]).sum() / drawn["scale"]
    layers.compare(found, wanted, {"scale": terms}, layers.LIMITS[dtype])
