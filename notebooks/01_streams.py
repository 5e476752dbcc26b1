# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One token, N streams
#
# A transformer adds to one residual vector per token. A *hyper-connection* keeps N of them, the
# streams. Every sublayer (attention or MLP) reads one vector out of the streams and writes its
# answer back into all of them, and a small matrix mixes the streams on the way. This notebook does
# one read and one write by hand, shows what the mixing parameter alpha does, and when it can do
# nothing at all.

# %%
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mhcjax as mhc

np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## Read and write, by hand
#
# The token has N = 2 streams of width D = 2. A static connection has five numbers: `pre_logits`,
# `post_logits` (one per stream) and `alpha_logit`. `mhc.mix` turns them into coefficients:
#
#     pre  = sigmoid(pre_logits)         what the sublayer reads of each stream
#     post = 2 sigmoid(post_logits)      how much of its output each stream receives
#     res  = [[a, 1-a], [1-a, a]]        a = sigmoid(alpha_logit): keep, or exchange

# %%
spec = mhc.Connection(streams=2)
params = {
    "pre_logits": jnp.array([1.0, -1.0]),
    "post_logits": jnp.array([0.5, -2.0]),
    "alpha_logit": jnp.array(1.5),
}
x = jnp.array([[2.0, 1.0], [-1.0, 1.5]])  # x[N, D]

mix = mhc.mix(spec, params, x)
print(spec.rule)
print(mix)

# %% [markdown]
# The sublayer may be any function of one vector; here it is `tanh`. Three lines of NumPy are the
# whole connection:
#
#     u  = sum_n pre[n] x[n]             read
#     y  = f(u)                          the sublayer
#     x' = res @ (x + post * y)          write, rule "add_first"

# %%
pre = 1 / (1 + np.exp(-np.array([1.0, -1.0])))
post = 2 / (1 + np.exp(-np.array([0.5, -2.0])))
alpha = 1 / (1 + np.exp(-1.5))
res = np.array([[alpha, 1 - alpha], [1 - alpha, alpha]])

u = pre[0] * np.asarray(x[0]) + pre[1] * np.asarray(x[1])
y = np.tanh(u)
after = res @ (np.asarray(x) + post[:, None] * y)

# The library computes in float32, NumPy here in float64: they agree to rounding.
np.testing.assert_allclose(mhc.read(x, mix), u, atol=1e-6)
np.testing.assert_allclose(mhc.write(x, jnp.tanh(u), mix, rule=spec.rule), after, atol=1e-6)
np.testing.assert_allclose(mhc.connect(spec, params, jnp.tanh, x), after, atol=1e-6)
print("read  u  =", u)
print("write x' =", after.tolist())

# %% [markdown]
# The papers write `x' = res @ x + post * y` ("mix_first"). It is the same family: `add_first` with
# `post` is `mix_first` with `res @ post`.

# %%
other = mhc.convert_rule(mix, to="mix_first")
print("post under add_first", np.asarray(mix.post), "  under mix_first", np.asarray(other.post))
print("x' =", mhc.write(x, jnp.tanh(u), other, rule="mix_first").tolist())

# %% [markdown]
# ## What alpha does
#
# What `res` mixes is the *operand* `z = x + post * y`. Alpha slides the two streams along the line
# between them: at 1 each keeps its own, at 0 they change places, at 0.5 both become the mean.
# Whatever alpha is, the mean of the streams stays where it was, because the columns of `res` sum to
# one.

# %%
z = mhc.operand(x, jnp.tanh(u), mix, rule="add_first")
alphas = np.linspace(0, 1, 5)
written = np.array([[[a, 1 - a], [1 - a, a]] @ np.asarray(z) for a in alphas])
print("alpha   stream 0          stream 1          mean")
for a, (s0, s1) in zip(alphas, written, strict=True):
    print(f"{a:5.2f}  {s0!s:17} {s1!s:17} {(s0 + s1) / 2}")

figure, ax = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
looks = (("#1f5fa8", 11, (5, 9)), ("#c7741b", 6, (5, -16)))
for n, (colour, size, offset) in enumerate(looks):
    ax.plot(*written[:, n].T, "o", color=colour, ms=size, label=f"stream {n}, at each alpha")
    for a, point in zip(alphas, written[:, n], strict=True):
        ax.annotate(f"{a:g}", point, offset, textcoords="offset points", color=colour)
ax.set(
    xlabel="first coordinate",
    ylabel="second coordinate",
    title="where a write with alpha from 0 to 1 leaves the streams",
)
ax.margins(0.12, 0.25)
ax.legend(frameon=False)
plt.show()
# %% [markdown]
# ## When it can do nothing: equal streams
#
# At the entry every stream is a copy of the embedding. If every stream also reads and writes alike
# (the "symmetric" init), the streams stay equal for ever. `res` then mixes equal vectors: it acts
# as the identity, whatever alpha is, and the gradient of alpha is exactly zero. The model trains,
# its loss falls, and it is a plain residual net.
#
# A toy stack of four sublayers, each `tanh(norm(u) A) B`, shows it. The last `res` is dead in every
# model that ends in the mean of the streams, whatever the init, since it does not move the mean:
# its column is zero or rounding noise.

# %%
width, layers = 16, 4
keys = jax.random.split(jax.random.key(0), 2 * layers + 2)
weights = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[: 2 * layers]]
tokens, target = (jax.random.normal(k, (64, width)) for k in keys[-2:])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    specs = {i: mhc.presets.mhc_n2(i) for i in ("symmetric", "balanced", "near_identity")}
print("the library says:", caught[0].message)

findings = {}
for name, s in specs.items():

    def loss(params, s=s):
        x, mixed, kept = mhc.expand(tokens, s.streams), [], []
        for p, a, b in zip(params, weights[::2], weights[1::2], strict=True):
            m, u = mhc.mix_and_read(s, p, x)
            y = jnp.tanh(u / jnp.sqrt(jnp.mean(u**2, -1, keepdims=True)) @ a) @ b
            mixed.append(mhc.stream_cosine(mhc.operand(x, y, m, rule=s.rule)))
            x = mhc.write(x, y, m, rule=s.rule)
            kept.append(mhc.stream_cosine(x))
        return jnp.mean((mhc.collapse(x) - target) ** 2), (jnp.array(mixed), jnp.array(kept))

    own = [mhc.init(s, width=width, layer=l, layers=layers) for l in range(layers)]
    gradients, cosines = jax.jit(jax.grad(loss, has_aux=True))(own)
    findings[name] = cosines
    print(f"{name:14} gradient of alpha_logit", [f"{g['alpha_logit']:.1e}" for g in gradients])
print("dead whatever the init:", sorted(mhc.dead_leaves(specs["balanced"], layers)))

# %% [markdown]
# `symmetric` has no gradient anywhere; it is not small, it is zero.
#
# `balanced` starts at alpha 0.5, where both rows of `res` are equal: *every write* makes the
# streams equal again. Yet alpha learns, because the operand `x + post * y` differs between the
# streams: each receives another share of `y`. What tells a live connection from a dead one is
# therefore the cosine of what `res` mixes, not that of the streams. `near_identity` (alpha about
# 0.88) keeps the streams apart as well, which also lets `pre` learn; start with it.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained", sharey=True)
titles = ("what res mixes (1 is dead)", "the streams after the write")
# Wide to narrow, so that equal lines stay visible.
styles = {"symmetric": ("#b3261e", 6), "balanced": ("#c7741b", 3), "near_identity": ("#1f5fa8", 2)}
for ax, title, which in zip(axes, titles, (0, 1), strict=True):
    for name, (colour, line) in styles.items():
        ax.plot(range(layers), findings[name][which], "o-", color=colour, lw=line, label=name)
    ax.set(title=title, xlabel="sublayer", xticks=range(layers))
axes[0].set_ylabel("cosine between the streams")
axes[1].legend(frameon=False, loc="lower left")
plt.show()
# %% [markdown]
# ## Why res is doubly stochastic
#
# What an early sublayer wrote passes through every later `res`. The *composite gain* is how much
# the product of all of them can enlarge a signal. With rows and columns that sum to one the product
# keeps that property at any depth; with free matrices near the identity it does not.

# %%
depth = 64
logits = jax.random.normal(jax.random.key(1), (depth,))
constrained = jnp.stack(
    [mhc.MANIFOLDS["permutations"].matrix(jnp.array([l, 0.0]), 2) for l in logits]
)
free = jnp.eye(2) + 0.1 * jax.random.uniform(jax.random.key(2), (depth, 2, 2))
for name, stack in (("doubly stochastic", constrained), ("free", free)):
    gain = mhc.composite_gain(stack)
    print(
        f"{name:18} forward {gain.forward:.4g}  backward {gain.backward:.4g}  ({depth} sublayers)"
    )

# %% [markdown]
# ## Four streams
#
# For N = 4 `res` is a weighted mean of the 24 permutations of the streams,
# `res = sum_k softmax(res_logits)_k P_k`. Every doubly stochastic matrix is such a mean (Birkhoff),
# so nothing is lost, and rows and columns sum to one by construction. N = 2 is the same with the
# logits `[alpha_logit, 0]`.

# %%
four = mhc.presets.mhc_n4()
one_swap = jnp.zeros(four.num_logits).at[1].set(4.0)  # itertools order: 1 exchanges the last two
res4 = mhc.MANIFOLDS["permutations"].matrix(one_swap, 4)
print(four.num_logits, "logits\n", np.asarray(res4))
print("rows", np.asarray(res4.sum(1)), " columns", np.asarray(res4.sum(0)))
print("N = 2:", mhc.MANIFOLDS["permutations"].matrix(jnp.array([1.5, 0.0]), 2).tolist())

# %% [markdown]
# ## In your own model, in ten lines
#
# `connect` is `x + f(x)` with streams: give it the sublayer, pre-norm included. `init` makes one
# dict of parameters per sublayer; put them into your own tree and train them with the rest (without
# weight decay: it would pull `res` to full mixing). Here nothing but the mixing is trained.

# %%
spec = mhc.presets.mhc_n2("near_identity")
mixing = [mhc.init(spec, width=width, layer=l, layers=layers) for l in range(layers)]


@jax.jit
@jax.value_and_grad
def loss(mixing):
    x = mhc.expand(tokens, spec.streams, spec.entry)
    for p, w in zip(mixing, weights, strict=False):
        x = mhc.connect(spec, p, lambda u, w=w: jnp.tanh(u @ w), x)
    return jnp.mean((mhc.collapse(x, spec.exit) - target) ** 2)


for step in range(201):
    value, gradients = loss(mixing)
    if step % 100 == 0:
        alphas = [round(float(jax.nn.sigmoid(p["alpha_logit"])), 3) for p in mixing]
        print(f"step {step:3}  loss {value:.4f}  alpha {alphas}")
    mixing = jax.tree.map(lambda p, g: p - 2.0 * g, mixing, gradients)
