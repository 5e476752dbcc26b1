"""Few tokens whose gradient nobody takes, as in decoding: two kernels make the coefficients and the
read. Their values against the float64 oracle, and what the programs around it launch."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

import mhcjax as mhc
from mhcjax import config, connections, gpt, sample
from mhcjax.kernels import blocks, dynamic, few_tokens, shards, triton
from tests import jaxprs, layers, oracle_layer
from tests.test_kernel_programs import H200, TRITON, as_on_a_gpu, gradient
from tests.test_kernels import on_the_device, patched, poisoned

__all__ = ["as_on_a_gpu", "on_the_device", "patched"]  # fixtures


def mixed(spec, params, x):
    """[pre, post, res, u] of the kernels."""
    mix, u = mhc.mix_and_read(spec, params, x, implementation="pallas")
    return [mix.pre, mix.post, mix.res, u]


def check(name, N, D, lead, dtype):
    """Forward alone: the mix, what is read and a whole layer, against the oracle."""
    spec, params, x, y, d = layers.draw(name, N, D, lead, dtype)
    found = layers.compiled(partial(mixed, spec))(params, x)
    layer = layers.compiled(partial(layers.sublayer, spec))(params, x, y)
    x, y, *d = layers.flat(lead, x, y, *d)
    wanted, _ = oracle_layer.dynamic_mix(name, params, x)
    u, _ = oracle_layer.read(x, wanted[0])
    given = d if spec.carried else d[0]
    outputs, *_ = oracle_layer.layer(name, params, x, y, given, spec.rule)
    names = ("pre", "post", "res", "u", "streams", "next u")
    both = [
        dict(zip(names, arrays, strict=False))
        for arrays in ((*found, *layer), (*wanted, u, *outputs))
    ]
    # The weights are not rounded: the coefficients of bfloat16 streams are as exact as any.
    return layers.compare(*both, {}, lambda a: layers.LIMITS[str(a.dtype)])


SHAPES = list(product(("deepseek_v4", "mhc", "mhc_lite"), (2, 4, 8), (1, 3, 64), layers.LIMITS))
SHAPES = [s for s in SHAPES if s[:2] != ("mhc_lite", 8)]  # 8! logits have no kernel


def quick(name, N, T, dtype):
    return (N, T, dtype) in ((4, 3, "bfloat16"), (4, 1, "float32"), (2, 64, "float32"))


@pytest.mark.parametrize(
    ("name", "N", "T", "dtype"),
    [s if quick(*s) else pytest.param(*s, marks=pytest.mark.slow) for s in SHAPES],
)
def test_values(name, N, T, dtype, on_the_device):
    check(name, N, 64 * (1 + T % 3), (T,), dtype)


@pytest.mark.parametrize(
    ("name", "N", "D", "lead", "dtype"),
    [
        ("megatron", 2, 64, (), "float32"),
        ("maxtext", 3, 64, (2, 1, 2), "float32"),
        ("kromhc", 6, 64, (5,), "bfloat16"),
        ("single_pass", 2, 320, (5, 1), "bfloat16"),
    ],
)
def test_values_of_other_presets_and_leading_axes(name, N, D, lead, dtype, on_the_device):
    check(name, N, D, lead, dtype)


def test_values_of_loads_in_several_steps(patched):
    """One share of four tiles, two at a time."""
    whole = blocks.blocks_for
    patched.setattr(dynamic, "blocks_for", lambda x: replace(whole(x), few_shares=1, few_loads=2))
    small()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 128])
@pytest.mark.parametrize(("N", "D"), [(4, 768), (4, 2048), (8, 4096)])
def test_large_values(N, D, T):
    check("deepseek_v4", N, D, (T,), "bfloat16")


@pytest.mark.parametrize("dtype", layers.LIMITS)
def test_many_tokens_have_the_same_values(dtype, patched):
    """Up to the order of sums, and to the 2^-17 that a weight of bfloat16 streams is off there."""
    spec, params, x, *_ = layers.draw("deepseek_v4", 4, 64, (7,), dtype)
    few = layers.compiled(partial(mixed, spec))(params, x)
    patched.setattr(shards, "few", lambda x: False)
    jax.clear_caches()
    many = layers.compiled(partial(mixed, spec))(params, x)
    limit = layers.LIMITS["float32"] if dtype == "float32" else layers.FINE
    for a, b in zip(few[:3], many[:3], strict=True):
        assert layers.error(a, b) < limit
    assert layers.error(few[3], many[3]) < layers.LIMITS[dtype]
    differ = [np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(few, many, strict=True)]
    assert any(differ)  # the control: another program ran


# --------------------------------------------------------------------------------------------------
# Every element is written, and faults are caught


def small():
    return check("kromhc", 4, 128, (5,), "float32")  # four shares


FEW = ["mhc_project_few_tokens", "mhc_mix_few_tokens"]


@pytest.mark.parametrize("short", [None, *FEW])
def test_every_element_of_the_outputs_is_written(short, patched):
    """The outputs start as NaN; the kernel named runs for one token or share less."""
    patched.setattr(few_tokens, "launch", poisoned(triton.launch, short))
    if short is None:
        small()
    else:
        with pytest.raises(AssertionError, match="is off by nan"):
            small()


def no_scale(joined):
    return lambda w, scale, bias: joined(w, jnp.ones_like(scale), bias)


def weights_in_bfloat16(joined):
    def wrong(w, scale, bias):
        return joined(w.astype(jnp.bfloat16).astype(w.dtype), scale, bias)

    return wrong


def the_first_token(mix):
    def wrong(f, sizes, x, *rest):
        return mix(f, sizes, jnp.broadcast_to(x[:1], x.shape), *rest)

    return wrong


def streams_in_reverse(mix):
    def wrong(f, sizes, x, own, reads, blocks):
        u = mix(f, sizes, x[:, ::-1], own, reads, blocks)[:reads]
        return (*u, *mix(f, sizes, x, own, reads, blocks)[reads:])

    return wrong


def a_share_twice(project):
    def wrong(x, own, blocks):
        z, square = project(x, own, blocks)
        return z.at[:, 0].set(z[:, 1]), square

    return wrong


def one_share_of_the_square(project):
    def wrong(x, own, blocks):
        z, square = project(x, own, blocks)
        return z, square.at[:, 1:].set(0)

    return wrong


FAULTS = [
    ("project", a_share_twice, "pre"),
    ("project", one_share_of_the_square, "pre"),
    ("joined", no_scale, "pre"),
    ("joined", weights_in_bfloat16, "pre"),
    ("mix", the_first_token, "pre"),
    ("mix", streams_in_reverse, "u"),
]


@pytest.mark.parametrize(
    ("function", "fault", "what"), FAULTS, ids=[fault.__name__ for _, fault, _ in FAULTS]
)
def test_the_check_catches(function, fault, what, patched):
    patched.setattr(few_tokens, function, fault(getattr(few_tokens, function)))
    with pytest.raises(AssertionError, match=f"^{what} is off by"):
        small()


# --------------------------------------------------------------------------------------------------
# When it runs


def launched(f, *arguments):
    """The kernels that a function calls, in order."""
    found = jaxprs.walk(jax.make_jaxpr(f)(*arguments))
    calls = [eqn.params for _, eqn in found if eqn.primitive.name == "pallas_call"]
    # What holds the name differs by version.
    return [str(p.get("name_and_src_info", p.get("name"))).split(" ")[0] for p in calls]


LIMIT = blocks.Blocks().few


@pytest.mark.parametrize(("lead", "few"), [((LIMIT,), True), ((2, LIMIT // 2 + 1), False)])
def test_the_limit_of_tokens(lead, few):
    spec, params, x, y, _ = layers.draw("megatron", 2, 64, lead, "float32")
    found = launched(partial(layers.sublayer, spec), params, x, y)
    assert found == FEW if few else not {*FEW} & {*found} and found[-1] == "mhc_write"


@pytest.mark.parametrize("name", ["megatron", "single_pass"])
def test_the_gradient_of_few_tokens_is_that_of_many(name, patched):
    """The same kernels, the same bits."""
    spec, *arguments = layers.draw(name, 2, 64, (5,), "float32")
    few = launched(gradient(spec), *arguments)
    first = layers.compiled(gradient(spec))(*arguments)
    patched.setattr(shards, "few", lambda x: False)
    jax.clear_caches()
    assert launched(gradient(spec), *arguments) == few and not {*FEW} & {*few}
    second = layers.compiled(gradient(spec))(*arguments)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("ways", [1, 2])
def test_the_limit_is_of_the_tokens_of_a_device(ways):
    spec, params, x, *_ = layers.draw("megatron", 2, 64, (2 * LIMIT,), "float32")
    with use_abstract_mesh(AbstractMesh((ways,), ("data",), axis_types=(AxisType.Auto,))):
        assert (launched(partial(mixed, spec), params, x) == FEW) == (ways == 2)


def test_a_mesh():
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    spec, params, x, y, _ = layers.draw("deepseek_v4", 2, 64, (4, 1), "float32")
    run = partial(layers.sublayer, spec)
    wanted = layers.compiled(run)(params, x, y)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("data"))
        program = layers.compiled(run)
        arguments = (params, *jax.device_put((x, y), split))
        text = program.lower(*arguments).compile().as_text()
        (found,) = program(*arguments)
    assert layers.error(found, wanted[0]) < 1e-6  # sums in another order
    assert "all-gather" not in text and "all-reduce" not in text
    assert found.sharding.shard_shape(found.shape)[0] == 2


@pytest.mark.parametrize("walk", ["loop", "scan"])
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_a_decode_step_launches_two_kernels_a_sublayer(walk, implementation):
    """And two for the learned head; XLA writes."""
    changes = {"layers": 3, "width": 64, "heads": 2, "vocab": 128, "context": 16, "walk": walk}
    changes |= {"connection.preset": "deepseek_v4", "connection.implementation": implementation}
    model = config.override(config.preset("nano"), {f"model.{k}": v for k, v in changes.items()})
    model = model.model
    step = partial(sample.decode_step, gpt.graph(model))
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    cache = jax.eval_shape(lambda: gpt.empty_cache(model, 2))
    found = launched(step, gpt.abstract_params(model), token, token, cache)
    walked = model.layers if walk == "loop" else 1
    assert found == (FEW * (2 * walked + 1) if implementation == "pallas" else [])


def test_a_decode_step_on_the_kernels_is_that_on_xla():
    """Logits of a model of random weights, after a prompt: sums in another order."""
    changes = {"model.layers": 2, "model.width": 64, "model.heads": 2, "model.vocab": 128}
    changes |= {"model.context": 16, "model.connection.preset": "deepseek_v4"}
    found = []
    for how in ("pallas", "xla"):
        model = config.override(
            config.preset("nano"), {**changes, "model.connection.implementation": how}
        ).model
        graphdef, params = gpt.build(model, key=jax.random.key(0))
        params = jax.tree.map(
            lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), params
        )
        tokens = jnp.arange(6).reshape(2, 3)
        logits, cache = sample.prefill(
            graphdef, params, tokens, jnp.array([3, 2]), gpt.empty_cache(model, 2)
        )
        more, _ = sample.decode_step(graphdef, params, tokens[:, 0], jnp.array([3, 2]), cache)
        found.append((logits, more))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(np.abs(b).max()))
    assert not np.array_equal(*(f[0] for f in found))


@pytest.mark.parametrize(
    ("name", "N", "D", "T", "dtype"),
    [
        ("deepseek_v4", 4, 768, 1, "bfloat16"),
        ("mhc", 8, 64, 64, "float32"),
        ("mhc_lite", 3, 192, 3, "bfloat16"),
        ("single_pass", 2, 64, 128, "bfloat16"),
    ],
)
def test_it_lowers_for_cuda(name, N, D, T, dtype, as_on_a_gpu):
    spec, params, x, *_ = layers.draw(name, N, D, (T,), dtype)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        run = jax.jit(partial(connections._passed_mix, spec, implementation=None))
        text = run.trace(params, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{TRITON}(") == 2 and all(f'"{name}"' in text for name in FEW)
