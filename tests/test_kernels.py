"""The raw read and write: values and gradients against autodiff of the plain sums, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhcjax import kernels

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
