"""Norm, rotary embedding and attention: their own VJPs and float64 branch against plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhcjax import layers


def plain_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def plain_rope(x, positions, base, norm):
    """As complex numbers: (a + ib) e^(i angle)."""
    if norm:
        x = plain_norm(x)
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * base ** (-jnp.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def draw(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(found, wanted, tolerance):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])  # 1e-3: the epsilon is as large as the square
def test_norm_and_its_gradient_equal_the_plain_form(scale):
    with jax.enable_x64(True):
        x, dn = scale * draw(3, 5, 8), draw(3, 5, 8, seed=1)
        found, pull = jax.vjp(layers.rms_norm, x)
        wanted, plain_pull = jax.vjp(plain_norm, x)
        close(found, wanted, 1e-14)
        close(pull(dn)[0] * scale, plain_pull(dn)[0] * scale, 1e-12)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_rope_and_its_gradient_equal_the_plain_form(norm, rows):
    """Positions for all rows at once, and for each row its own."""
    with jax.enable_x64(True):
        x, dout = draw(3, 7, 2, 8), draw(3, 7, 2, 8, seed=1)
        positions = jnp.arange(7 * rows).reshape(rows, 7) * 3
        found, pull = jax.vjp(lambda x: layers.rope(x, positions, 100.0, norm), x)
        wanted, plain_pull = jax.vjp(lambda x: plain_rope(x, positions, 100.0, norm), x)
        close(found, wanted, 1e-13)
        close(pull(dout)[0], plain_pull(dout)[0], 1e-12)
        other = plain_pull(dout[:, ::-1])[0]  # the comparison can fail
        assert np.abs(np.asarray(pull(dout)[0] - other)).max() > 0.1


def test_gradients_in_bfloat16_stay_near_those_in_float32():
    """The output that the backward pass reads is rounded to 8 bits: 2^-7 of the largest."""
    x, dout = draw(2, 16, 2, 8, dtype=np.float32), draw(2, 16, 2, 8, seed=1, dtype=np.float32)
    positions = jnp.arange(16)[None]

    def pull(x, dout):
        return jax.vjp(lambda x: layers.rope(x, positions, 100.0, True), x)[1](dout)[0]

    low = pull(x.astype(jnp.bfloat16), dout.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    close(low, pull(x, dout), 2**-6)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_in_float64_is_that_in_float32(kv):
    """The branch by hand against JAX's own: causal, and with the mask of a cache."""
    with jax.enable_x64(True):
        q, k, v = draw(2, 5, 4, 8), draw(2, 5, kv, 8, seed=1), draw(2, 5, kv, 8, seed=2)
        low = [a.astype(np.float32) for a in (q, k, v)]
        found = layers.attend(q, k, v, is_causal=True)
        assert found.dtype == np.float64
        close(found, layers.attend(*low, is_causal=True), 1e-6)
        seen = (jnp.arange(5) <= jnp.array([[1], [3]]))[:, None, None]
        masked = layers.attend(q[:, :1], k, v, mask=seen)
        close(masked, layers.attend(low[0][:, :1], *low[1:], mask=seen), 1e-6)
        blind = layers.attend(q[:, :1], k, v.at[0, 2:].set(9.0).at[1, 4:].set(9.0), mask=seen)
        close(blind, masked, 1e-14)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), pytest.param("bfloat16", 2**-6, marks=pytest.mark.gpu)],
)
def test_queries_in_pieces(dtype, tolerance):
    """Each of four pieces of the queries sees all keys up to its own: the causal whole, and the
    gradients: sums in another order, 1e-5. On a GPU cuDNN makes both in bfloat16: rounding of what
    it is given and gives, 2^-8 each."""
    size = 32
    q, dout = (draw(2, 4 * size, 4, 64, seed=seed, dtype=np.float32) for seed in (0, 1))
    k, v = (draw(2, 4 * size, 2, 64, seed=seed, dtype=np.float32) for seed in (2, 3))

    def pieces(q, k, v, late=0):
        seen = jnp.arange(4 * size) <= jnp.arange(4 * size)[:, None] + late
        made = [
            layers.attend(q[:, at : at + size], k, v, mask=seen[None, None, at : at + size])
            for at in range(0, 4 * size, size)
        ]
        return jnp.concatenate(made, axis=1)

    def pulled(f, *arrays):
        y, pull = jax.vjp(f, *arrays[:3])
        return y, *pull(arrays[3])

    low = [a.astype(dtype) for a in (q, k, v, dout)]
    if dtype == "bfloat16":
        assert layers._implementation(low[0]) == "cudnn"
    wanted = pulled(lambda *a: layers.attend(*a, is_causal=True), q, k, v, dout)
    for found, exact in zip(pulled(pieces, *low), wanted, strict=True):
        assert found.dtype == dtype
        close(found, exact, tolerance)
    with pytest.raises(AssertionError):  # one position too many
        close(pieces(*low[:3], late=1), wanted[0], tolerance)
