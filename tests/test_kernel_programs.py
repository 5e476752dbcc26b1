"""The programs that the kernels make: what runs where, how they lower for CUDA, what they keep for
the backward pass, and what crosses a mesh."""

import dataclasses
import re
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

import mhcjax as mhc
from mhcjax.kernels import blocks, mosaic, projection, triton
from tests import jaxprs, layers

DYNAMIC, STATIC = "megatron", "mhc_n2"


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def gradient(spec, implementation="pallas"):
    """(outputs, gradients) as a function of (params, x, y, d)."""

    def run(params, x, y, d):
        apply = partial(layers.sublayer, spec, implementation=implementation)
        outputs, pull = jax.vjp(apply, params, x, y)
        return outputs, pull(d)

    return run


def kernels_in(f, *arguments):
    """How many kernels a function calls."""
    found = jaxprs.walk(jax.make_jaxpr(f)(*arguments))
    return sum(eqn.primitive.name == "pallas_call" for _, eqn in found)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is traced here is for a GPU; nothing of it is run."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    jax.clear_caches()


# --------------------------------------------------------------------------------------------------
# Which implementation runs


@pytest.mark.parametrize("name", [DYNAMIC, STATIC])
def test_a_cpu_takes_xla_and_says_nothing(name):
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    spec, *arguments = layers.draw(name, 2, 64, (3,), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_in(gradient(spec, None), *arguments) == 0
        assert kernels_in(gradient(spec, "pallas"), *arguments) > 0


@pytest.mark.parametrize(("name", "taken"), [(DYNAMIC, True), (STATIC, False), ("ohc", False)])
def test_a_gpu_takes_kernels_where_coefficients_are_the_tokens_own(name, taken, as_on_a_gpu):
    """And where there are any: of oHC's mix there is none, which is not asked for by name."""
    N = 4 if name == "ohc" else 2
    spec, params, x, *_ = layers.draw(name, N, 64, (3,), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bool(kernels_in(partial(mhc.mix, spec), params, x)) == taken


def refused(f, *arguments, match):
    """f("pallas") warns and is f("xla") to the bit."""
    jax.clear_caches()
    with pytest.warns(UserWarning, match=match):
        found = f("pallas")(*arguments)
    wanted = f("xla")(*arguments)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize(("name", "D"), [(DYNAMIC, 96), (STATIC, 8), (STATIC, 63), (STATIC, 1000)])
def test_widths_that_do_not_fit(name, D):
    spec, *arguments = layers.draw(name, 2, D, (3,), "float32")
    refused(partial(gradient, spec), *arguments, match=f"width {D} is no multiple of 64")


@pytest.mark.parametrize("name", [DYNAMIC, STATIC])
def test_float64(name):
    with jax.enable_x64(True):
        spec, *arguments = layers.draw(name, 2, 64, (3,), "float64")
        refused(partial(gradient, spec), *arguments, match="are float64, not bfloat16 or float32")


def test_float64_coefficients():
    with jax.enable_x64(True):
        spec, params, *rest = layers.draw(STATIC, 2, 64, (3,), "float32")
        params = {leaf: a.astype(jnp.float64) for leaf, a in params.items()}
        refused(partial(gradient, spec), params, *rest, match=r"coefficients are float64\[2\]")


def test_nine_streams():
    spec, *arguments = layers.draw("hc_static", 9, 64, (3,), "float32")
    refused(partial(gradient, spec), *arguments, match="9 streams, more than 8")


@pytest.mark.parametrize("name", [STATIC, DYNAMIC])
def test_no_tokens(name):
    spec, *arguments = layers.draw(name, 2, 64, (0,), "float32")
    refused(partial(gradient, spec), *arguments, match="have 0 elements")


@pytest.mark.parametrize("lead", [(5,), (1, 5), (2, 1)])
def test_coefficients_that_broadcast_otherwise(lead):
    rng = np.random.default_rng(0)
    x, y, *m = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((2, 5, 2, 64), (2, 5, 64), (*lead, 2), (*lead, 2), (*lead, 2, 2))
    )

    def both(implementation):
        def run(x, y, *m):
            u = mhc.read(x, mhc.Mix(*m), implementation=implementation)
            return u, mhc.write(x, y, mhc.Mix(*m), rule="add_first", implementation=implementation)

        return run

    shape = re.escape(str([*lead, 2]))
    refused(both, x, y, *m, match=rf"coefficients are float32{shape}, not one set or one a token")


def test_an_unknown_implementation_is_refused():
    spec, params, x, *_ = layers.draw(STATIC, 2, 64, (3,), "float32")
    with pytest.raises(ValueError, match=r"'mosaic'.*'pallas', 'xla', 'reference'"):
        mhc.connect(spec, params, jnp.tanh, x, implementation="mosaic")


# --------------------------------------------------------------------------------------------------
# Lowering for CUDA, on a CPU

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"


def lowered(name, N, D, T, dtype):
    """(custom calls, Triton's kernels by name) of a layer and its gradients, lowered for CUDA."""
    spec, *arguments = layers.draw(name, N, D, (T,), dtype)
    # JAX 0.11 and later ask for the device that is to be lowered for.
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        traced = jax.jit(gradient(spec)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = Counter(re.findall(r"custom_call @([\w$.]+)\(", text))
    return calls, Counter(re.findall(r'name = "(mhc_\w+)"', text))


LOWERED = [
    ("mhc", 4, 4096, 128, "bfloat16"),
    slow("mhc", 4, 64, 1, "float32"),
    slow("mhc", 8, 192, 77, "bfloat16"),
    ("single_pass", 2, 192, 77, "bfloat16"),
    ("mhc_lite", 4, 768, 77, "float32"),
    ("kromhc", 8, 320, 77, "bfloat16"),
    ("mhc_n2", 2, 2048, 129, "bfloat16"),
    ("mhc_n4", 4, 64, 77, "float32"),
]


@pytest.mark.parametrize(("name", "N", "D", "T", "dtype"), LOWERED)
def test_layers_lower_for_cuda(name, N, D, T, dtype, as_on_a_gpu):
    """Through Triton alone where the device is no Hopper, and every call is a kernel of ours."""
    calls, kernels = lowered(name, N, D, T, dtype)
    assert set(calls) == {TRITON}
    assert sum(kernels.values()) == calls[TRITON] >= 4


@pytest.fixture
def as_on_hopper(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(mosaic, "HOPPER", (jax.devices()[0].device_kind,))


@pytest.mark.parametrize(
    ("name", "N", "D"),
    [("mhc", 4, 2048), ("single_pass", 4, 768), ("mhc_lite", 3, 320), slow("mhc_lite", 4, 1280)]
    + [slow("kromhc", 8, 64), slow("mhc", 6, 768)],
)
def test_projections_lower_through_mosaic_for_hopper(name, N, D, as_on_hopper):
    """The backward pass up to four streams, which one program holds."""
    calls, kernels = lowered(name, N, D, 1024, "bfloat16")
    assert set(calls) == {TRITON, MOSAIC} and calls[MOSAIC] == (2 if N <= 4 else 1)
    assert sum(kernels.values()) == calls[TRITON] >= 4


def test_what_mosaic_does_not_take_lowers_through_triton(as_on_hopper):
    """A token more than whole tiles; float32, which has no such product."""
    for T, dtype in ((1025, "bfloat16"), (1024, "float32")):
        assert set(lowered(DYNAMIC, 2, 64, T, dtype)[0]) == {TRITON}


def test_every_kernel_lowers_for_cuda(as_on_a_gpu):
    files = (triton.__file__, projection.__file__)
    names = {n for file in files for n in re.findall(r'"(mhc_\w+)"', Path(file).read_text())}
    found = set()
    for name in (DYNAMIC, "single_pass", STATIC):
        found |= set(lowered(name, 2, 128, 77, "bfloat16")[1])
    assert len(names) == 11 and found == names  # that of few tokens: test_few_tokens


def carried_products(T=1024, N=2, D=128, columns=24):
    """Sums in loops of Triton's kernels of a product and what the loop carries."""
    x = jnp.zeros((T, N, D), jnp.bfloat16)
    w = projection.weights(jnp.zeros((N * D, columns)), x.dtype)
    C, sizes = projection.columns_of(w), blocks.Blocks()
    given = x, w, jnp.zeros((2 * C, T), x.dtype), jnp.zeros((1, T))

    def both(x, w, dz, scalars):
        back = projection.project_backward(x, w, dz, scalars, None, None, sizes)
        return projection.project(x.reshape(T, -1), w, sizes), back

    found = loops = 0
    for _, eqn in jaxprs.walk(jax.make_jaxpr(both)(*given)):
        if eqn.primitive.name in ("scan", "while"):
            *_, body = jaxprs.inner_jaxprs(eqn)
            made = {v: e.primitive.name for e in body.eqns for v in e.outvars}
            loops += "dot_general" in made.values()
            for e in body.eqns:
                names = [made.get(v, "carried") for v in e.invars if not hasattr(v, "val")]
                found += e.primitive.name == "add" and set(names) == {"carried", "dot_general"}
    assert loops == 2
    return found


def test_no_loop_carries_a_product(monkeypatch):
    """Of bfloat16: Triton would let it run on while its tiles are overwritten (`_dots`)."""
    assert carried_products() == 0
    monkeypatch.setattr(projection, "_dots", lambda pairs, over: projection._dot(*pairs[0], over))
    assert carried_products() == 2


def split_multiply_adds(T=64, N=2, D=512):
    """Sums, in the kernels of read and write, of what was a product just before."""
    draw = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    row = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, y, pre, res = draw((T, N, D)), draw((T, D)), row((T, N)), row((T, N * N))
    sizes = blocks.Blocks()

    def every(x, y, pre, res):
        backward = partial(triton.write_backward, x, y, res, pre, x, blocks=sizes)
        return (
            triton.read(x, pre, sizes),
            triton.read_backward(x, pre, y, x, sizes),
            triton.read_dots(x, y, sizes),
            triton.write(x, y, res, pre, None, sizes),
            triton.write(x, y, res, pre, pre, sizes),
            backward(read=[], streams=True),
            backward(read=[pre, y], streams=False),
        )

    found = kernels = 0
    for _, call in jaxprs.walk(jax.make_jaxpr(every)(x, y, pre, res)):
        if call.primitive.name != "pallas_call":
            continue
        kernels += 1
        made = {}
        for _, eqn in jaxprs.walk(call.params["jaxpr"]):
            operands = [made.get(v) for v in eqn.invars if not hasattr(v, "val")]
            # Of a few numbers, as at the end of a token, there is nothing to save.
            long = eqn.primitive.name == "add" and eqn.outvars[0].aval.size >= 32
            found += long and "mul" in operands
            made |= dict.fromkeys(eqn.outvars, eqn.primitive.name)
    assert kernels == 7
    return found


def test_a_product_is_added_in_one_instruction(as_on_a_gpu, monkeypatch):
    """Triton, as XLA runs it, joins none: its kernels were bound by instructions, not by memory."""
    assert split_multiply_adds() == 0
    monkeypatch.setattr(triton, "fma", lambda a, b, c: a * b + c)
    jax.clear_caches()
    assert split_multiply_adds() > 100


@pytest.mark.parametrize(
    ("name", "T"), [("deepseek_v4", 5), ("deepseek_v4", 200), ("single_pass", 200), (STATIC, 200)]
)
def test_a_second_call_by_hand_compiles_nothing(name, T, caplog):
    """As in a notebook: no `jax.jit` around it."""
    spec, params, x, y, d = layers.draw(name, 2, 64, (T,), "float32")

    def loss(params, x, y):
        outputs = layers.sublayer(spec, params, x, y)
        return sum(jnp.vdot(a, b) for a, b in zip(d, outputs, strict=True))

    def both():
        layers.sublayer(spec, params, x, y)
        jax.grad(loss, argnums=(0, 1, 2))(params, x, y)

    both()  # JAX 0.12 imports with the first kernel what all later traces are told apart by
    jax.clear_caches()
    counts = []
    with jax.log_compiles():
        for _ in range(2):
            both()
            counts.append(caplog.text.count("Compiling"))
            caplog.clear()
    assert counts[0] > 0 and counts[1] == 0, counts


# --------------------------------------------------------------------------------------------------
# What is kept for the backward pass


def kept(f, *arguments):
    """[shape and dtype] of what vjp keeps of `f`, each array once, however often it is named."""
    closed = jax.make_jaxpr(lambda *a: jax.tree.leaves(jax.vjp(f, *a)[1]))(*arguments)
    same = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if jaxprs.is_call(eqn):
                inner = next(jaxprs.inner_jaxprs(eqn))
                same.update(zip(inner.invars, eqn.invars, strict=True))
                walk(inner)
                same.update(zip(eqn.outvars, inner.outvars, strict=True))

    def root(v):
        while not hasattr(v, "val") and v in same:
            v = same[v]
        return v

    walk(closed.jaxpr)
    found = [v for v in map(root, closed.jaxpr.outvars) if not hasattr(v, "val")]  # no numbers
    return list({v: v.aval for v in found}.values())


def check_kept(f, spec, params, x, y):
    """(N + 1) D elements of the streams' dtype a token, the coefficients, the parameters."""
    T, N, D = x.shape
    found = kept(f, params, x, y)
    own, rest = [a for a in found if T in a.shape], [a for a in found if T not in a.shape]
    wide = [a for a in own if D in a.shape]
    narrow = [a for a in own if D not in a.shape]
    columns = params["projection"].shape[1] if "projection" in params else 0
    coefficients = (columns + 1 + 2 * N + N * N) * T
    assert {a.dtype for a in wide} == {x.dtype}, wide
    assert sum(a.size for a in wide) <= (N + 1) * D * T, wide
    assert sum(a.size for a in narrow) <= coefficients, narrow
    # The projection in float32, with gain and scales inside too, and as the kernels take it; the
    # little things, of N! logits at most: masks, biases.
    weights = 16 * N * D * padded(columns) + 4000
    assert sum(a.size * a.dtype.itemsize for a in rest) <= weights, rest


def padded(columns):
    """Columns of the projection as the kernels take it."""
    return max(32, 1 << max(columns - 1, 0).bit_length())


TOKENS = 13  # no other axis has this size


@pytest.mark.parametrize(
    ("name", "N"),
    [("mhc", 4), (DYNAMIC, 2), ("single_pass", 2), ("kromhc", 4), (STATIC, 2), ("mhc_n4", 4)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_more_is_kept_than_streams_branch_and_coefficients(name, N, dtype):
    spec, params, x, y, _ = layers.draw(name, N, 192, (TOKENS,), dtype)
    check_kept(partial(layers.sublayer, spec), spec, params, x, y)


@pytest.mark.parametrize("name", [DYNAMIC, STATIC])
def test_plain_autodiff_keeps_more(name):
    """The control: float32 copies of the streams."""
    spec, params, x, y, _ = layers.draw(name, 2, 192, (TOKENS,), "bfloat16")
    with pytest.raises(AssertionError):
        check_kept(partial(layers.sublayer, spec, implementation="reference"), spec, params, x, y)


# --------------------------------------------------------------------------------------------------
# A mesh

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def on_a_mesh(name, N, lead, axes, names, ambient):
    """(gradients on one device, on the mesh, [(kind, elements) of each array of a collective])."""
    if len(jax.devices()) < int(np.prod(axes)):
        pytest.skip(f"{len(jax.devices())} devices, not {int(np.prod(axes))}")
    spec, *arguments = layers.draw(name, N, 64, lead, "float32")
    wanted = jax.device_get(layers.compiled(gradient(spec))(*arguments))
    devices = jax.devices()[: int(np.prod(axes))]
    mesh = jax.make_mesh(axes, names, axis_types=(AxisType.Auto,) * len(axes), devices=devices)
    tokens = PartitionSpec(*[n for n in names if n != "model"])
    params = jax.device_put(arguments[0], NamedSharding(mesh, PartitionSpec()))
    rest = jax.device_put(arguments[1:], NamedSharding(mesh, tokens))
    around = {
        "mesh": lambda: jax.set_mesh(mesh),
        "abstract mesh": lambda: use_abstract_mesh(mesh.abstract_mesh),
        "nothing": nullcontext,
    }
    # A mesh is set outside jit, an abstract one inside, too.
    outside, inside = (ambient, "nothing") if ambient == "mesh" else ("nothing", ambient)

    def run(*arguments):
        with around[inside]():
            return gradient(spec)(*arguments)

    with around[outside]():
        program = layers.compiled(run).lower(params, *rest).compile()
    found = []
    for arrays, kind in COLLECTIVE.findall(program.as_text()):
        for shape in re.findall(r"f32\[([\d,]*)\]", arrays):
            found.append((kind, int(np.prod([int(n) for n in shape.split(",") if n] or [1]))))
    return wanted, program(params, *rest), found


def shared_sizes(name, N):
    """Sizes of the gradients that devices must add up: coefficients of all tokens, or what the
    kernels are given of the parameters."""
    if name in layers.STATIC:
        return {N, N * N}
    columns = layers.spec_of(name, N).shapes(64)["projection"][1]
    return {N * 64 * columns, columns}


def same_values(found, wanted):
    """Sums over the tokens in another order: 1e-6 of the norm."""
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert layers.error(a, b) < 1e-6


MESHES = [
    (STATIC, (8, 3), (4, 2), ("data", "model"), "mesh"),
    (STATIC, (8, 3), (4, 2), ("data", "model"), "abstract mesh"),
    (STATIC, (4, 6), (2, 2), ("data", "sequence"), "mesh"),
    slow("kromhc", (8, 3), (4, 2), ("data", "model"), "abstract mesh"),
    (DYNAMIC, (8, 3), (2, 1), ("data", "model"), "mesh"),
    pytest.param(
        "single_pass", (4, 6), (2, 2), ("data", "sequence"), "mesh", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("name", "lead", "axes", "names", "ambient"), MESHES)
def test_a_mesh_gathers_nothing(name, lead, axes, names, ambient):
    wanted, found, collectives = on_a_mesh(name, 2, lead, axes, names, ambient)
    same_values(found, wanted)
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    assert {size for _, size in collectives} == shared_sizes(name, 2), collectives
    outputs, (_, dx, dy) = found
    for a in (*outputs, dx, dy):  # each device holds its own tokens
        assert a.sharding.shard_shape(a.shape)[0] == a.shape[0] // axes[0]


def test_without_the_ambient_mesh_the_streams_are_gathered():
    """The control: nobody tells the kernels what is split."""
    name, lead, axes, names, _ = MESHES[0]
    wanted, found, collectives = on_a_mesh(name, 2, lead, axes, names, "nothing")
    same_values(found, wanted)
    assert "all-gather" in {kind for kind, _ in collectives}


def test_a_batch_that_the_mesh_does_not_divide_stays_whole():
    spec, *arguments = layers.draw(STATIC, 2, 64, (3, 2), "float32")
    wanted = jax.device_get(layers.compiled(gradient(spec))(*arguments))
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        same_values(layers.compiled(gradient(spec))(*arguments), wanted)


def test_blocks_are_powers_of_two():
    """What Triton's arrays and Mosaic's tiles want; a 768 once broke all widths but one."""
    tables = [table for kind in blocks.BLOCKS.values() for _, table in kind]
    for table in (blocks.Blocks(), *tables):
        free = ("stages", "programs")
        sizes = {k: v for k, v in dataclasses.asdict(table).items() if not k.startswith(free)}
        assert len(sizes) > 15
        assert all(v > 0 and v & (v - 1) == 0 for v in sizes.values()), sizes
