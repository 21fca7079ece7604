# SPDX-License-Identifier: Apache-2.0
"""balance_loss against formulas in plain PyTorch: from the sums, and end to end from logits."""

import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import equipoise.functional as F
from equipoise import ops, reference

pytestmark = pytest.mark.usefixtures("backend")


def choose(logits, top_k):
    """[T, E], 1 where a token chose an expert; ties go to the lowest index."""
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(logits).scatter(1, best, 1)


def by_hand(name, logits, top_k, options=None):
    """The losses from the papers, on the logits [T, E] of real tokens; differentiable."""
    options = options or {}
    experts = logits.size(-1)
    p = logits.softmax(-1)
    mean = p.mean(0)
    chosen = choose(logits.detach(), top_k)
    share = chosen.mean(0) / top_k  # f, which adds up to 1
    token_entropy = -(p * logits.log_softmax(-1)).sum(1).mean()
    entropy = -(mean * mean.log()).sum()
    if name == "switch":  # Fedus 2021, equations 4 to 6, over the K choices of a token
        weights = options.get("expert_weights", 1)
        if "target_shares" in options:
            weights = 1 / (experts * options["target_shares"])
        return experts * (weights * share * mean).sum()
    if name == "device":  # DeepSeek-V2, equations 22 to 24
        devices = options.get("num_devices", 1)
        total = 0
        for group in torch.arange(experts).chunk(devices):
            total = total + (experts * share[group]).mean() * mean[group].sum()
        return total
    if name == "importance":  # Shazeer 2017, equations 6 and 7
        of = p * chosen if options.get("of", "gates") == "gates" else p
        importance = of.sum(0)
        variance = (importance - importance.mean()).square().sum()
        return variance / (experts - options.get("unbiased", False)) / importance.mean().square()
    if name == "z":  # ST-MoE, equation 5
        return logits.exp().sum(-1).log().square().mean()
    if name == "uniform_kl":
        return (1 / experts * ((1 / experts) / mean).log()).sum()
    if name == "entropy":
        return math.log(experts) - entropy
    if name == "variance":
        return (mean - mean.mean()).square().sum() / (experts - 1)
    if name == "mutual_information":  # of token and expert, from the joint distribution
        joint = p / len(p)
        return -(joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    assert name == "token_entropy"
    return token_entropy


EVERY_LOSS = [
    ("switch", {}),
    ("switch", {"target_shares": torch.tensor([0.1, 0.2, 0.3, 0.1, 0.1, 0.2])}),
    ("switch", {"expert_weights": torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])}),
    ("device", {"num_devices": 3}),
    ("device", {"num_devices": 1}),
    ("importance", {}),
    ("importance", {"unbiased": True}),
    ("importance", {"of": "probs"}),
    ("importance", {"of": "probs", "unbiased": True}),
    ("z", {}),
    ("uniform_kl", {}),
    ("entropy", {}),
    ("variance", {}),
    ("mutual_information", {}),
    ("token_entropy", {}),
]
every_loss = pytest.mark.parametrize(
    "name,options", EVERY_LOSS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)


def value_of(routing, name, options, **more):
    return F.balance_loss(routing, {name: {"coeff": 1.0, **options, **more}}).unscaled[name]


@every_loss
def test_value_and_gradient_against_the_paper(name, options):
    logits = torch.randn(13, 6, dtype=torch.float64)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = value_of(F.topk_gating(ours, 2), name, options)
    want = by_hand(name, theirs, 2, options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    (grad,), (exact,) = torch.autograd.grad(got, ours), torch.autograd.grad(want, theirs)
    torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-14)


@every_loss
def test_every_loss_leaves_masked_tokens_out(name, options):
    logits, mask = torch.randn(10, 6), torch.arange(10) % 3 > 0
    masked = value_of(F.topk_gating(logits, 2, token_mask=mask), name, options)
    torch.testing.assert_close(masked, value_of(F.topk_gating(logits[mask], 2), name, options))


@every_loss
def test_every_loss_of_segments(name, options):
    """Batch: as one. Sequence: the mean of the segments', but means over tokens and gates."""
    logits = torch.randn(14, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0] * 5 + [1] * 2 + [3] * 7)  # 2 and 4 are empty
    routing = F.topk_gating(logits, 2, segment_ids=ids, num_segments=5)
    whole = by_hand(name, logits, 2, options)
    torch.testing.assert_close(value_of(routing, name, options), whole)
    parts = sum(by_hand(name, logits[ids == s], 2, options) for s in (0, 1, 3)) / 3
    of_tokens = name in ("z", "token_entropy")
    of_gates = name == "importance" and "of" not in options
    got = value_of(routing, name, options, scope="sequence")
    want = whole if of_tokens or of_gates else parts
    torch.testing.assert_close(got, want)
    (grad,), (exact,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    torch.testing.assert_close(grad, exact)


@every_loss
@pytest.mark.parametrize("tokens,experts", [(0, 6), (3, 1), (3, 6)])
def test_every_loss_with_nothing_to_balance(name, options, tokens, experts):
    """No tokens, one expert, and all tokens masked: 0, with zero gradient."""
    options = {k: v for k, v in options.items() if k not in ("num_devices",)}
    options = {k: v[:experts] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logits = torch.randn(tokens, experts, requires_grad=True)
    mask = torch.zeros(tokens, dtype=torch.bool) if experts > 1 else None
    value = value_of(F.topk_gating(logits, 1, token_mask=mask), name, options)
    (grad,) = torch.autograd.grad(value, logits)
    if name == "z" and experts == 1:
        torch.testing.assert_close(value, logits.square().mean())
    else:
        assert value.item() == 0 and (grad == 0).all()


@every_loss
def test_every_loss_gradcheck_and_gradgradcheck(name, options):
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ids = torch.tensor([0, 0, 1, 1, 1])

    def value(logits):
        routing = F.topk_gating(logits, 2, segment_ids=ids, num_segments=2)
        report = F.balance_loss(routing, {name: {"coeff": 0.5, "scope": "sequence", **options}})
        return report.total, report.unscaled[name]

    assert gradcheck(value, (logits,))
    assert gradgradcheck(value, (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_losses_together_from_narrow_logits(dtype):
    logits = torch.randn(200, 6).to(dtype)
    losses = {name: {"coeff": 0.1, **options} for name, options in EVERY_LOSS[::-1]}
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    report = F.balance_loss(F.topk_gating(ours, 2), losses)
    assert report.total.dtype == torch.float32
    total = 0
    for name, settings in losses.items():
        options = {k: v for k, v in settings.items() if k != "coeff"}
        want = by_hand(name, exact, 2, options)
        total = total + 0.1 * want
        torch.testing.assert_close(
            report.unscaled[name].double(), want, rtol=2e-6, atol=1e-7, msg=name
        )
        torch.testing.assert_close(report.scaled[name], report.unscaled[name] * 0.1)
        torch.testing.assert_close(report.coefficients[name], torch.tensor(0.1))
    torch.testing.assert_close(report.total.double(), total, rtol=2e-6, atol=0)
    (got,) = torch.autograd.grad(report.total, ours)
    (want,) = torch.autograd.grad(total, exact)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6)


def test_the_functions_of_one_loss():
    r = F.topk_gating(torch.randn(9, 6), 2)
    for got, name, options in [
        (F.switch_loss(r), "switch", {}),
        (F.switch_loss(r, target_shares=torch.full((6,), 1 / 6)), "switch", {}),
        (F.device_loss(r, 2), "device", {"num_devices": 2}),
        (F.importance_loss(r), "importance", {}),
        (F.importance_loss(r, "probs", True), "importance", {"of": "probs", "unbiased": True}),
        (F.z_loss(r), "z", {}),
        (F.uniform_kl_loss(r), "uniform_kl", {}),
        (F.entropy_loss(r), "entropy", {}),
        (F.variance_loss(r), "variance", {}),
        (F.mutual_information_loss(r), "mutual_information", {}),
        (F.token_entropy_loss(r), "token_entropy", {}),
    ]:
        torch.testing.assert_close(got, value_of(r, name, options), msg=name)


# Eight components, as rows of one kind: the values of the losses on P are those of the row itself.
GATES = {
    "uniform": torch.zeros(8, dtype=torch.float64),
    "biased": torch.tensor([3, 2, 1, 1, 0.5, 0.5, 0.2, 0.2], dtype=torch.float64),
    "collapsed": torch.tensor([10, 1, *[0.1] * 6], dtype=torch.float64),
}


@pytest.mark.parametrize(
    "gates,uniform_kl,entropy,variance,importance,token_entropy",
    [  # worked out in float64 from p = softmax(row)
        ("uniform", 0.0, 0.0, 0.0, 0.0, 2.0794415416798357),
        (
            "biased",
            0.5251415777579934,
            0.5621305229826776,
            0.028160017850244336,
            1.5769609996136829,
            1.5173110186971581,
        ),
        (
            "collapsed",
            6.470982826159818,
            2.074927845237082,
            0.12487880781488282,
            6.993213237633438,
            0.004513696442753767,
        ),
    ],
)
def test_worked_numbers(gates, uniform_kl, entropy, variance, importance, token_entropy):
    r = F.topk_gating(GATES[gates].repeat(16, 1), 2)
    numbers = {
        "uniform_kl": uniform_kl,
        "entropy": entropy,
        "variance": variance,
        "token_entropy": token_entropy,
    }
    for name, number in numbers.items():
        torch.testing.assert_close(
            value_of(r, name, {}).item(), number, rtol=1e-12, atol=1e-14, msg=name
        )
    got = F.importance_loss(r, of="probs").item()
    torch.testing.assert_close(got, importance, rtol=1e-12, atol=1e-14)
    # All tokens alike: knowing the token says nothing of the expert.
    torch.testing.assert_close(F.mutual_information_loss(r).item(), 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4, 7])
def test_switch_is_one_at_perfect_balance(top_k):
    """Every token chooses the next K of 8 experts, with probabilities that even out."""
    logits = torch.zeros(8, 8)
    for token in range(8):
        logits[token, [(token + k) % 8 for k in range(top_k)]] = 1.0
    value = F.switch_loss(F.topk_gating(logits, top_k)).item()
    assert abs(value - 1) <= 2 * torch.finfo(torch.float32).eps
    r = F.topk_gating(logits, top_k)
    of_hugging_face = F.balance_loss(r, {"switch": 1.0}, normalize="hf").total.item()
    assert abs(of_hugging_face - top_k) <= 2 * top_k * torch.finfo(torch.float32).eps


def test_the_scaled_switch_loss_of_a_uniform_router_is_its_coefficient():
    logits = torch.zeros(128, 128)
    report = F.balance_loss(F.topk_gating(logits, 8), {"switch": 0.01})
    torch.testing.assert_close(report.total, torch.tensor(0.01))


def hugging_face(logits, top_k, mask=None):
    """The number of transformers' load_balancing_loss_func for one layer, in its own terms."""
    p = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(p.topk(top_k, dim=-1).indices, logits.size(-1)).double()
    weights = torch.ones(len(p)) if mask is None else mask.double()
    tokens_per_expert = (chosen * weights[:, None, None]).sum(0) / weights.sum()  # [K, E]
    router_prob = (p * weights[:, None]).sum(0) / weights.sum()
    return (tokens_per_expert * router_prob).sum() * logits.size(-1)


@pytest.mark.parametrize("masked", [False, True])
def test_from_logits_with_hugging_faces_number(masked):
    logits = torch.randn(2, 8, 6, dtype=torch.float64)
    mask = torch.rand(2, 8) > 0.3 if masked else None
    report = F.balance_loss_from_logits(logits, 2, {"switch": 1.0}, mask, normalize="hf")
    want = hugging_face(logits.view(-1, 6), 2, None if mask is None else mask.view(-1))
    torch.testing.assert_close(report.total, want)


@every_loss
def test_from_logits_is_the_loss_of_the_routing(name, options):
    """Also of those losses for which the choices are not computed."""
    logits = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    losses = {name: {"coeff": 1.0, **options}}
    totals = [
        F.balance_loss_from_logits(logits, 4, losses).total,
        F.balance_loss(F.topk_gating(logits, 4), losses).total,
    ]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*[torch.autograd.grad(t, logits)[0] for t in totals])
    dense = F.balance_loss_from_logits(logits, 6, losses).total
    assert (dense.item() == 0) == (name not in ("z", "token_entropy"))
    with pytest.raises(RuntimeError, match="top_k must be"):
        F.balance_loss_from_logits(logits, 7, losses)


def test_from_probabilities():
    logits = torch.randn(9, 6, requires_grad=True)
    losses = {name: {"coeff": 1.0, **options} for name, options in EVERY_LOSS if name != "z"}
    report = F.balance_loss_from_logits(logits, 2, losses)
    same = F.balance_loss_from_logits(logits.softmax(-1), 2, losses, from_probabilities=True)
    torch.testing.assert_close(same.total, report.total)
    grads = [torch.autograd.grad(r.total, logits)[0] for r in (report, same)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    hard = torch.eye(6).requires_grad_()  # zeros have no logarithm
    F.balance_loss_from_logits(hard, 2, losses, from_probabilities=True).total.backward()
    assert hard.grad.isfinite().all()


def test_probabilities_in_place_of_logits_are_noticed():
    probabilities = torch.randn(9, 6).softmax(-1)
    with pytest.warns(UserWarning, match="logits look like probabilities"):
        F.balance_loss_from_logits(probabilities, 2, {"switch": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.balance_loss_from_logits(probabilities.log(), 2, {"switch": 1.0})
        F.balance_loss_from_logits(torch.zeros(0, 6), 2, {"switch": 1.0})


def test_an_expert_without_probability_still_has_a_gradient():
    """uniform_kl is there to revive it: its slope must not be clamped away."""
    sums = torch.tensor([3.0, 1e-30, 3.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    value = ops.balance_loss(sums, torch.ones(1), ["uniform_kl"], 1)[0]
    value.backward()
    assert sums.grad[1] < -1e29 and sums.grad.isfinite().all()


def test_training_loss_keeps_its_terms_apart():
    r = F.topk_gating(torch.randn(9, 6, requires_grad=True), 2)
    report = F.balance_loss(r, {"switch": 0.1, "token_entropy": -0.01})
    loss = F.training_loss(torch.tensor(2.5), report)
    torch.testing.assert_close(loss.balance, report.scaled["switch"])
    torch.testing.assert_close(loss.entropy, report.scaled["token_entropy"])
    torch.testing.assert_close(loss.total, 2.5 + report.total)
    assert loss.nll.item() == 2.5 and loss.total.requires_grad


def test_losses_of_several_scopes_in_one_call():
    logits = torch.randn(8, 6)
    r = F.topk_gating(logits, 2, segment_ids=torch.arange(8) // 4, num_segments=2)
    report = F.balance_loss(r, {"switch": {"coeff": 0.1, "scope": "sequence"}, "z": 0.01})
    torch.testing.assert_close(
        report.total, 0.1 * F.switch_loss(r, scope="sequence") + 0.01 * F.z_loss(r)
    )
    assert set(report.unscaled) == {"switch", "z"}


def test_micro_batches_together():
    """Sums, gates and counts of accumulated micro-batches as of one batch, gradients too."""
    logits = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    losses = {"switch": 0.3, "importance": 0.2, "z": 0.1, "entropy": 0.5}
    parts = [F.topk_gating(part, 2) for part in logits.split(5)]
    together = F.concatenate_routings(parts)
    whole = F.topk_gating(logits, 2)
    assert torch.equal(together.topk_indices, whole.topk_indices)
    assert torch.equal(together.tokens_per_expert, whole.tokens_per_expert)
    totals = [F.balance_loss(r, losses).total for r in (together, whole)]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*[torch.autograd.grad(t, logits)[0] for t in totals])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens,experts,top_k", [(7, 4, 1), (33, 16, 4), (300, 64, 6)])
def test_values_and_gradients_from_logits(tokens, experts, top_k, dtype):
    logits = torch.randn(tokens, experts, dtype=torch.float64).to(dtype)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    report = F.balance_loss(F.topk_gating(ours, top_k), {"switch": 0.3, "z": 0.07})
    switch, z = by_hand("switch", exact, top_k), by_hand("z", exact, top_k)
    total = 0.3 * switch + 0.07 * z
    tight = dict(rtol=1e-12, atol=0) if dtype == torch.float64 else dict(rtol=2e-6, atol=0)
    coefficient = dict(rtol=1e-6, atol=0)  # coefficients are float32
    torch.testing.assert_close(report.unscaled["switch"].double(), switch, **tight)
    torch.testing.assert_close(report.unscaled["z"].double(), z, **tight)
    torch.testing.assert_close(
        report.total.double(), total, **(coefficient if dtype == torch.float64 else tight)
    )
    torch.testing.assert_close(report.scaled["z"].double(), 0.07 * z, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(report.total, ours)
    (want,) = torch.autograd.grad(total, exact)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7
    )


def test_value_at_balance_and_at_collapse():
    balanced = F.topk_gating(torch.eye(4).repeat(3, 1), 1)
    torch.testing.assert_close(F.switch_loss(balanced), torch.tensor(1.0))
    collapsed = F.topk_gating(torch.tensor([[100.0, 0, 0, 0]]).repeat(5, 1), 1)
    torch.testing.assert_close(F.switch_loss(collapsed), torch.tensor(4.0))


def test_masked_tokens_are_left_out():
    logits, mask = torch.randn(10, 6), torch.arange(10) < 7
    losses = {"switch": 1.0, "z": 1.0}
    masked = F.balance_loss(F.topk_gating(logits, 2, token_mask=mask), losses)
    kept = F.balance_loss(F.topk_gating(logits[:7], 2), losses)
    torch.testing.assert_close(masked.total, kept.total)


def test_segments_are_added_up():
    x = torch.randn(12, 6).requires_grad_()
    whole = F.topk_gating(x, 2)
    cut = F.topk_gating(x, 2, segment_ids=torch.randint(0, 3, (12,)), num_segments=4)
    losses = {"switch": 0.1, "z": 0.01}
    torch.testing.assert_close(F.balance_loss(cut, losses), F.balance_loss(whole, losses))
    grads = [torch.autograd.grad(F.balance_loss(r, losses).total, x)[0] for r in (cut, whole)]
    torch.testing.assert_close(*grads)


def test_token_weights_count_as_repetitions():
    logits = torch.randn(4, 5)
    weighted = F.topk_gating(logits, 2, token_mask=torch.tensor([2.0, 0.0, 1.0, 3.0]))
    repeated = F.topk_gating(logits[[0, 0, 2, 3, 3, 3]], 2)
    torch.testing.assert_close(weighted.sums, repeated.sums)
    torch.testing.assert_close(F.switch_loss(weighted), F.switch_loss(repeated))


@pytest.mark.parametrize("tokens,experts", [(0, 4), (3, 1)])
def test_nothing_to_balance_is_zero(tokens, experts):
    logits = torch.randn(tokens, experts, requires_grad=True)
    r = F.topk_gating(logits, 1)
    loss = F.switch_loss(r)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_all_masked_is_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    r = F.topk_gating(logits, 2, token_mask=torch.zeros(3, dtype=torch.bool))
    total = F.balance_loss(r, {"switch": 1.0, "z": 1.0}).total
    total.backward()
    assert total.item() == 0 and (logits.grad == 0).all()


def test_dense_routing_leaves_switch_out():
    r = F.topk_gating(torch.randn(5, 3), 3)
    report = F.balance_loss(r, {"switch": 1.0, "z": 1.0})
    assert report.unscaled["switch"].item() == 0
    torch.testing.assert_close(report.total, F.z_loss(r))
    assert F.switch_loss(r).item() > 0.9  # the single function always computes


def test_gradcheck_and_gradgradcheck():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    for losses in ({"switch": 0.5}, {"z": 0.5}, {"z": 0.25, "switch": 2.0}):

        def total(logits, losses=losses):
            report = F.balance_loss(F.topk_gating(logits, 2), losses)
            return report.total, *report.unscaled.values()

        assert gradcheck(total, (logits,))
        assert gradgradcheck(total, (logits,))


def sums_of(dtype=torch.float32):
    return F.topk_gating(torch.randn(9, 5, dtype=dtype), 2).sums


NAMES = ["switch", "z", "device", "importance", "importance_of_probs", "uniform_kl", "entropy"]
NAMES += ["variance", "mutual_information", "token_entropy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("segments", [None, 1, 3, 40])
def test_op_matches_the_reference(dtype, segments):
    logits = torch.randn(50, 300, dtype=dtype)
    ids = None if segments is None else torch.randint(0, segments, (50,))
    r = F.topk_gating(logits, 2, segment_ids=ids, num_segments=segments)
    gates = F.expert_bincount(r.topk_indices, 300, r.topk_weights)
    options = (gates, torch.rand(300, dtype=dtype), 5, True)
    for names in (["switch"], ["z", "z"], NAMES, NAMES[::-1]):
        coefficients = torch.rand(len(names))
        results = []
        for function in (ops.balance_loss, reference.balance_loss):
            inputs = r.sums.clone().requires_grad_(), gates.clone().requires_grad_()
            total, values = function(inputs[0], coefficients, names, 2, inputs[1], *options[1:])
            grads = torch.autograd.grad(total + values.sum(), inputs, allow_unused=True)
            results.append((total, values, *[0 if g is None else g + 0 for g in grads]))
        got, want = results
        # The prob_sum part: load and W are constants by definition.
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b + torch.zeros_like(a))


def test_gradient_notices_changed_sums():
    """As after adding them up over processes, in place, when the loss was already taken."""
    routing = F.topk_gating(torch.randn(5, 4).requires_grad_(), 2)
    loss = F.balance_loss(routing, {"switch": 1.0}).total
    with torch.no_grad():
        routing.sums.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    coefficients = torch.tensor([0.1, 0.2])
    for requires_grad in (False, True):
        sums = sums_of().detach().requires_grad_(requires_grad)
        gates = torch.rand(5, requires_grad=requires_grad)
        names = ["switch", "importance"]
        torch.library.opcheck(ops.balance_loss, (sums, coefficients, names, 2, gates))
        gradients = (
            torch.tensor(1.0, requires_grad=requires_grad),
            torch.ones(2, requires_grad=requires_grad),
        )
        arguments = (sums.detach(), coefficients, None, None, [0, 1], 2, 1, False)
        torch.library.opcheck(ops.balance_loss_backward, (*gradients, *arguments))


def test_a_scheduled_coefficient_does_not_recompile():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    def loss(logits, coefficient):
        return F.balance_loss(F.topk_gating(logits, 2), {"switch": coefficient, "z": 1e-3}).total

    torch._dynamo.reset()
    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    logits = torch.randn(8, 4)
    for value in (0.1, 0.2, 0.3):
        torch.testing.assert_close(fast(logits, torch.tensor(value)), loss(logits, value))
    assert len(compilations) == 1


def test_compile_and_export(compiled):
    def loss(logits):
        return F.balance_loss(F.topk_gating(logits, 2), {"switch": 0.1, "z": 0.01}).total

    fast = compiled(loss)
    for tokens in (4, 7):
        x = torch.randn(tokens, 5, requires_grad=True)
        (got,), (want,) = torch.autograd.grad(fast(x), x), torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(got, want)

    class Loss(torch.nn.Module):
        def forward(self, logits):
            return loss(logits)

    exported = torch.export.export(Loss(), (torch.randn(5, 4),))
    logits = torch.randn(5, 4)
    torch.testing.assert_close(exported.module()(logits), loss(logits))


@pytest.mark.cpu_only("the generated code only calls the op")
def test_inductor_and_aot_inductor(tmp_path):
    class Loss(torch.nn.Module):
        def forward(self, logits):
            return F.balance_loss(F.topk_gating(logits, 2), {"switch": 0.1, "z": 0.01}).total

    logits = torch.randn(5, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Loss(), fullgraph=True)(logits), Loss()(logits))
    exported = torch.export.export(Loss(), (logits,))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "loss.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(logits), Loss()(logits))


@pytest.mark.cpu_only("the checks are shared; values are checked on the CPU alone")
def test_bad_input():
    r = F.topk_gating(torch.randn(4, 3), 1)
    with pytest.raises(RuntimeError, match="losses must be among switch, device, .*; got 'swich'"):
        F.balance_loss(r, {"swich": 1.0})
    with pytest.raises(ValueError, match="the coefficient of 'z' must be >= 0, got -1.0"):
        F.balance_loss(r, {"z": -1.0})
    with pytest.raises(
        RuntimeError, match="coefficients must be >= 0, except that of token_entropy, got -1"
    ):
        F.balance_loss(r, {"z": torch.tensor(-1.0)})
    with pytest.raises(RuntimeError, match="RoutingResult has no statistics"):
        F.balance_loss(F.topk_gating(torch.randn(4, 3), 1, stats=False), {"z": 1.0})
    with pytest.raises(RuntimeError, match="coefficients must have shape"):
        ops.balance_loss(r.sums, torch.ones(2), ["z"], 1)
    with pytest.raises(RuntimeError, match="top_k must be from 1 to num_experts = 3, got 4"):
        ops.balance_loss(r.sums, torch.ones(1), ["z"], 4)
    with pytest.raises(RuntimeError, match="coefficients must not require a gradient"):
        ops.balance_loss(r.sums, torch.ones(1, requires_grad=True), ["z"], 1)
    with pytest.raises(RuntimeError, match="grad_total must be on the device of sums"):
        ops.balance_loss_backward(
            torch.ones((), device="meta"), None, r.sums, torch.ones(1), None, None, [0], 1, 1, False
        )
    for losses, message in [
        ({"load": 1.0}, "'load' is not a function of the sums, call load_loss for it"),
        ({"device": {"coeff": 1.0, "num_devices": 2}}, "num_devices must divide num_experts = 3"),
        (
            {"switch": {"coeff": 1.0, "target_shares": torch.tensor([0.5, 0.5, 0.0])}},
            "target_shares in .0, inf.., got inf for expert 2",
        ),
        (
            {"switch": {"coeff": 1.0, "expert_weights": torch.ones(4)}},
            "expert_weights must have shape .E. = .3., got .4.",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            F.balance_loss(r, losses)
    for losses, message in [
        ({"switch": {"scope": "batch"}}, "'switch' needs a 'coeff'"),
        ({"switch": {"coeff": 1.0, "scope": "layer"}}, "scope must be among .*, got 'layer'"),
        ({"z": {"coeff": 1.0, "num_devices": 2}}, "'z' takes coeff, .*; got 'num_devices'"),
        ({"importance": {"coeff": 1.0, "of": "all"}}, "of must be 'gates' or 'probs', got 'all'"),
        ({}, "must name at least one loss"),
    ]:
        with pytest.raises(ValueError, match=message):
            F.balance_loss(r, losses)
    with pytest.raises(RuntimeError, match="normalize must be 'none' or 'hf', got 'topk'"):
        F.balance_loss(r, {"switch": 1.0}, normalize="topk")
    with pytest.raises(RuntimeError, match="'importance' needs gate_sums"):
        ops.balance_loss(r.sums, torch.ones(1), ["importance"], 1)
    assert F.balance_loss(r, {"token_entropy": -1.0}).total < 0  # a bonus
