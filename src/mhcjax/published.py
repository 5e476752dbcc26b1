"""The published connections, each exactly as its source has it; `presets` names them.

"At init" in a docstring: the mean cosine between the streams that res mixes, and the mixing leaves
whose gradient is exactly zero besides the structurally dead ones (`dead_leaves`), in the four-layer
model of tests/test_family.py. Published inits are kept, also those that start dead: at a cosine of
1.0000 the streams are equal, and the gradients of pre and of a doubly stochastic res are no more
than rounding or what an eps leaves.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from mhcjax.coefficients import Dynamic, Init, Norm, Static
from mhcjax.manifolds import (
    Circulant,
    Identity,
    Kronecker,
    Manifold,
    Orthogonal,
    Orthostochastic,
    Permutations,
    Quaternion,
    Sinkhorn,
    SpectralSphere,
    Transportation,
    Transposed,
    Unconstrained,
)
from mhcjax.spec import Connection, LearnedHead

__all__ = [
    "KEEP",
    "cmhc",
    "deepseek_v4",
    "go_mhc",
    "hc",
    "hc_static",
    "ihc",
    "jpmhc",
    "kromhc",
    "liger",
    "lucidrains_mhc",
    "maxtext",
    "megatron",
    "mhc",
    "mhc_lite",
    "ohc",
    "shc",
    "single_pass",
    "tbp",
]

PublishedInit = Literal["published", "depth"]

KEEP = 0.5  # of the difference between streams, after all sublayers, in every "depth" init
# sqrt(n) x / max(|x|, 1e-12) times a gain: torch's normalize, in mhc-lite and its descendants.
CLAMPED = Norm(form="clamp", eps=1e-12, gain=True)
# softmax + eps, / (column sum + eps), then 19 pairs: the order of DeepSeek-V4's comb, source first.
DEEPSEEK = Sinkhorn(start="softmax", eps=1e-6, last="columns", domain="linear")


# --------------------------------------------------------------------------------------------------
# Hyper-connections


def hc(*, streams: int = 4) -> Connection:
    """Dynamic hyper-connections: `x' = A_r^T x + B y`, nothing constrained (arXiv 2409.19606).

    Each stream makes its own pre (A_m), post (B) and row of A_r from its own layer-normed D inputs:
    `s * tanh(norm(x) W) + static`; one s for A_m and A_r, one for B. W = 0, s = 0.01, A_m one-hot
    at `layer % N`, B = 1, A_r = I: the plain residual. Sum exit; output projections start sqrt(N)
    wider. The norm has no parameters (OLMo's count of them); its eps, 1e-5, is not stated.

    At init: cosine 1.0000; without gradient: scale.

    >>> hc().shapes(width=8)["projection"]
    (8, 6)
    """
    start = Init(res=(1.0, 0.0), pre=(1.0, 0.0), post=(1.0, 1.0), favourite="layer")
    dynamic = Dynamic(
        norm=Norm(kind="layer", eps=1e-5),
        per_stream=True,
        tanh=True,
        scales=("pre+res", "post"),
        init=start,
    )
    return replace(hc_static(streams=streams), coefficients=dynamic)


def hc_static(*, streams: int = 4) -> Connection:
    """Static hyper-connections: `hc` without its dynamic part (arXiv 2409.19606).

    At init: cosine 1.0000; without gradient: none.

    >>> hc_static().post
    'linear'
    """
    start = Init(res=(1.0, 0.0), pre=(1.0, 0.0), post=(1.0, 1.0), favourite="layer")
    return Connection(
        streams=streams,
        manifold=Transposed(Unconstrained()),
        coefficients=Static(start),
        rule="mix_first",
        post_scale=1.0,
        exit="sum",
        pre="linear",
        post="linear",
        output_gain=math.sqrt(streams),
    )


def ihc(*, streams: int = 4) -> Connection:
    """Identity hyper-connections: `res = I`, dynamic pre and post (mHC's ablation; Chimera, arXiv
    2607.28611: pre starts at 1/N, post at 1).

    The norm is taken from mHC, the projection starts at zero; neither is stated.

    At init: cosine 1.0000; without gradient: scale.

    >>> ihc().shapes(width=8)["projection"]
    (32, 8)
    """
    even = -math.log(max(streams - 1, 1))
    start = Init(pre=(even, even), post=(0.0, 0.0))
    return Connection(
        streams=streams,
        manifold=Identity(),
        coefficients=Dynamic(norm=Norm(eps=1e-20), scales=("pre", "post"), init=start),
        rule="mix_first",
        exit="sum",
    )


# --------------------------------------------------------------------------------------------------
# mHC and how it is shipped


def mhc(init: PublishedInit = "published", *, streams: int = 4) -> Connection:
    """Manifold-constrained hyper-connections, as in the paper (arXiv 2512.24880).

    `H = alpha * (rms(vec x) phi) + b`, eps 1e-20; `pre = sigmoid`, `post = 2 sigmoid`, `res` by 20
    Sinkhorn iterations of exp, columns first, rows last. alpha = 0.01. The paper states neither phi
    nor b nor the ends: phi = 0, b and the sum exit are those of mhc-lite's baseline, +1 or -1 at
    pre and post, 0 on the diagonal of res and -8 off it (diagonal 0.999). `init="depth"`: a
    diagonal such that half of the streams' difference outlives all sublayers.

    At init: cosine 0.8477; without gradient: scale.

    >>> mhc().shapes(width=8)["projection"]
    (32, 24)
    """
    return _dynamic(Sinkhorn(), Norm(eps=1e-20), init, streams)


def _dynamic(
    manifold: Manifold,
    norm: Norm,
    init: str,
    streams: int,
    res: tuple[float, float] = (0.0, -8.0),
    projection: float = 0.0,
    **options: Any,
) -> Connection:
    """mHC with the inits of mhc-lite's code: one-hot pre and post, phi = 0, alpha = 0.01; `options`
    are those of `Dynamic`."""
    if init not in ("published", "depth"):
        raise ValueError(f"unknown init {init!r}: choose one of published, depth")
    keep = KEEP if init == "depth" else None
    start = Init(res=res, favourite="layer", keep=keep, projection=projection)
    return Connection(
        streams=streams,
        manifold=manifold,
        coefficients=Dynamic(norm=norm, init=start, **options),
        rule="mix_first",
        exit="sum",
    )


def deepseek_v4(*, streams: int = 4) -> Connection:
    """mHC as shipped in DeepSeek-V4 (arXiv 2606.19348; huggingface/transformers deepseek_v4).

    `scale * ((vec x) fn) / rms + base`, eps 1e-6 inside the root, divided after the projection;
    `pre = sigmoid + 1e-6`, `post = 2 sigmoid`, `comb` by softmax + eps and 20 Sinkhorn iterations,
    applied as `sum_j comb[j, k] x_j`: `res = comb^T`, rows exact. Columns [pre | post | comb].
    Learned head exit. Inits of the Hugging Face code: fn normal 0.02, base 0, scale 1.

    At init: cosine 0.9986; without gradient: none.

    >>> deepseek_v4().exit
    LearnedHead()
    """
    start = Init(pre=(0.0, 0.0), post=(0.0, 0.0), projection=0.02, scale=1.0)
    return Connection(
        streams=streams,
        manifold=Transposed(DEEPSEEK),
        coefficients=Dynamic(norm=Norm(after=True), init=start),
        rule="mix_first",
        exit=LearnedHead(),
        pre_eps=1e-6,
    )


def single_pass(*, streams: int = 4) -> Connection:
    """Single-pass mHC of DeepSeek-V4.1 (arXiv 2609.19969, section 2.4.1): `deepseek_v4` whose
    sublayers read with the pre of the one before, the first one with stream 0; the exit reads with
    the last pre. Use `connect_carried`.

    At init: cosine 0.9986; without gradient: none.

    >>> single_pass().carried
    True
    """
    return replace(deepseek_v4(streams=streams), carried=True, exit="last_pre")


def megatron(*, streams: int = 4) -> Connection:
    """mHC in NVIDIA/Megatron-LM (hyper_connection.py, 023f5cf): as `deepseek_v4`, but
    `x / (rms(x) + 1e-6)`, phi uniform (Xavier, over the fused matrix), scale 0.01, biases 0: res
    starts uniform and equates the streams. Its learned head: Xavier, scale 1, both eps 1e-5.

    The original rounds coefficients to the activations' dtype; here they stay float32.

    At init: cosine 1.0000; without gradient: none.

    >>> megatron().coefficients.norm
    Norm(form='outside')
    """
    start = Init(
        pre=(0.0, 0.0), post=(0.0, 0.0), projection=1.0, projection_by="xavier", scale=0.01
    )
    head = LearnedHead(norm_eps=1e-5, eps=1e-5, projection=1.0, projection_by="xavier")
    return replace(
        deepseek_v4(streams=streams),
        coefficients=Dynamic(norm=Norm(form="outside"), init=start),
        exit=head,
    )


def maxtext(*, streams: int = 4) -> Connection:
    """mHC in AI-Hypercomputer/maxtext (layers/mhc.py): as `deepseek_v4`, but RMSNorm with a gain
    and eps 1e-5, phi normal by fan-in, scale 0.01, biases 0, sum exit.

    The original rounds the normed streams and res to the activations' dtype; here they stay
    float32.

    At init: cosine 1.0000; without gradient: none.

    >>> maxtext().coefficients.norm
    Norm(eps=1e-05, gain=True)
    """
    start = Init(pre=(0.0, 0.0), post=(0.0, 0.0), projection=1.0, projection_by="fan_in")
    return replace(
        deepseek_v4(streams=streams),
        coefficients=Dynamic(norm=Norm(eps=1e-5, gain=True), init=start),
        exit="sum",
    )


def liger(*, streams: int = 4) -> Connection:
    """mHC in linkedin/Liger-Kernel (LigerMHC): as `deepseek_v4`, but `res` is not transposed, so
    that its columns are the exact ones; no eps on pre. phi normal 0.02, scale 1. The exit is the
    user's: sum here.

    The original keeps phi in float16 by default; here it is float32.

    At init: cosine 0.9986; without gradient: none.

    >>> liger().pre_eps
    0.0
    """
    return replace(deepseek_v4(streams=streams), manifold=DEEPSEEK, pre_eps=0.0, exit="sum")


def lucidrains_mhc(*, streams: int = 4) -> Connection:
    """mHC in lucidrains/hyper-connections (mHCv2.py): each stream from its own D inputs, `sqrt(D)
    x / max(|x|, 1e-12)` times a gain; exp and 20 pairs, divided by max(sum, 1e-12); applied as
    `A^T x`: columns of res exact. phi = 0, scales 0.01; static parts one-hot at `layer % N` (pre
    0.73 and 0.5), 1 (post 1.46) and I as logits (diagonal of res 0.475). Sum exit.

    At init: cosine 1.0000; without gradient: gain, scale.

    >>> lucidrains_mhc().shapes(width=8)["gain"]
    (8,)
    """
    start = Init(res=(1.0, 0.0), pre=(1.0, 0.0), post=(1.0, 1.0), favourite="layer")
    return Connection(
        streams=streams,
        manifold=Transposed(Sinkhorn(eps=1e-12, clamp=True, domain="linear")),
        coefficients=Dynamic(norm=CLAMPED, per_stream=True, init=start),
        rule="mix_first",
        exit="sum",
    )


# --------------------------------------------------------------------------------------------------
# Other manifolds


def mhc_lite(init: PublishedInit = "published", *, streams: int = 4) -> Connection:
    """mHC-lite: dynamic mixture of all N! permutations, applied as `A^T x` (arXiv 2601.05732;
    FFTYYY/mhc-lite).

    phi = 0, scales 0.01; pre and post logits +1 at `layer % N`, -1 elsewhere; identity logit 0, the
    rest -8 (diagonal 0.994). Sum exit. In its training script the favourite stream is random.

    At init: cosine 0.8505; without gradient: gain, scale.

    >>> mhc_lite().shapes(width=8)["projection"]
    (32, 32)
    """
    return _dynamic(Transposed(Permutations()), CLAMPED, init, streams)


def kromhc(init: PublishedInit = "published", *, streams: int = 4) -> Connection:
    """KromHC: `res` a Kronecker product of 2 x 2 mixtures (arXiv 2601.21579; wz1119/KromHC).

    As `mhc_lite`; each factor's logits start at 0 and -8 (diagonal 0.9993), one scale for all.

    At init: cosine 0.8475; without gradient: gain, scale.

    >>> kromhc().num_logits
    4
    """
    return _dynamic(Kronecker(), CLAMPED, init, streams)


def go_mhc(*, streams: int = 4, s: int = 2) -> Connection:
    """go-mHC: generalised orthostochastic `res` from a Cayley transform (arXiv 2604.02309).

    Norm, scales and the inits of pre and post are those of `mhc_lite`, since the code of the
    language model is not public. Zero logits give the identity and no gradient, so phi is normal
    0.02 here.

    At init: cosine 0.8471; without gradient: none.

    >>> go_mhc().num_logits
    28
    """
    return _dynamic(
        Orthostochastic(s), CLAMPED, "published", streams, res=(0.0, 0.0), projection=0.02
    )


def ohc() -> Connection:
    """oHC: `res` in SO(4) from two quaternions, four streams (arXiv 2609.02672).

    As `mhc`, with the first 8 of its 16 columns of res; zero logits give the identity. The scale of
    res keeps its initial 0.01: trained, it dominates the gradient norm.

    At init: cosine 0.8471; without gradient: scale.

    >>> ohc().coefficients.frozen
    ('res',)
    """
    norm = Norm(eps=1e-20)
    return _dynamic(Quaternion(), norm, "published", 4, res=(0.0, 0.0), frozen=("res",))


def jpmhc(*, streams: int = 4) -> Connection:
    """JPmHC: `res` nearly orthogonal by Cayley's fixed point; pre the mean of a row softmax, post
    the sum of a column softmax, N x N logits each (arXiv 2602.18308).

    One projection of the layer-normed vec x. Unpublished, so ours: eps 1e-5, no scales, phi normal
    0.02, biases 0. Sum exit.

    At init: cosine 0.9929; without gradient: none.

    >>> jpmhc().shapes(width=8)["projection"]
    (32, 48)
    """
    start = Init(pre=(0.0, 0.0), post=(0.0, 0.0), projection=0.02)
    return Connection(
        streams=streams,
        manifold=Orthogonal(),
        coefficients=Dynamic(norm=Norm(kind="layer", eps=1e-5), scales=(), init=start),
        rule="mix_first",
        post_scale=1.0,
        exit="sum",
        pre="row_softmax",
        post="column_softmax",
    )


def shc(*, streams: int = 4) -> Connection:
    """sHC: `res` on the spectral sphere, signed, applied as `H^T x` (arXiv 2603.20896;
    6zHAOyi/s2HC).

    As `mhc_lite`; scales 0.01 of pre, post, U, V and s; U and V start at I, s at 4 (diagonal
    0.9995). The code trains two gammas that start at 1; here they are 1.

    At init: cosine 0.8474; without gradient: gain, scale.

    >>> shc().shapes(width=8)["scale"]
    (5,)
    """
    return _dynamic(
        Transposed(SpectralSphere()),
        CLAMPED,
        "published",
        streams,
        res=(4.0, 0.0),
        scales=("pre", "post", "res_parts"),
    )


def tbp(*, streams: int = 4) -> Connection:
    """TBP-mHC: `res` by filling the transportation polytope, applied as `X^T x` (arXiv 2605.21724;
    alyubinin/tbp-mHC).

    As `mhc_lite`; zero logits: res[0] is 0.5, 0.25, 0.125, 0.125. The share of the uniform matrix
    is sigmoid(-8), where the code starts it and then trains it.

    At init: cosine 0.9618; without gradient: gain, scale.

    >>> tbp().num_logits
    9
    """
    manifold = Transposed(Transportation(delta=1 / (1 + math.exp(8))))
    return _dynamic(manifold, CLAMPED, "published", streams, res=(0.0, 0.0))


def cmhc(*, streams: int = 4, layers: int = 24, beta: float = 4.0) -> Connection:
    """C-mHC: `res` circulant and near the identity, `gamma = beta / (2 layers)` for that many
    sublayers (contactsebi/circulant-hyper-connections).

    `x / (rms(x) + 1e-8)`, phi normal 0.02 / sqrt(N D), one scale 0.01 for everything; pre starts at
    1/N, post at 1. Mean exit.

    At init: cosine 1.0000; without gradient: none.

    >>> round(cmhc(layers=12).manifold.gamma, 4)
    0.1667
    """
    even = -math.log(max(streams - 1, 1))
    start = Init(pre=(even, even), post=(0.0, 0.0), projection=0.02, projection_by="fan_in")
    return Connection(
        streams=streams,
        manifold=Circulant(gamma=beta / (2 * layers)),
        coefficients=Dynamic(
            norm=Norm(form="outside", eps=1e-8), scales=("pre+post+res",), init=start
        ),
        rule="mix_first",
        exit="mean",
    )
