# SPDX-License-Identifier: Apache-2.0
"""The losses that are functions of their own inputs, against their formulas in loops."""

import math
from typing import NamedTuple

import pytest
import torch
from helpers import FLOATS, tolerance
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import equipoise.functional as F
from equipoise import ops

pytestmark = pytest.mark.usefixtures("backend")
no_launch = pytest.mark.no_launch  # all but communication_loss are made of torch's own calls


def load_by_hand(clean, noisy, stddev, top_k=2, weights=None):
    """CV^2 of the expected loads, token by token and expert by expert (Shazeer 2017)."""
    experts = clean.size(-1)
    clean, noisy, stddev = (x.reshape(-1, experts) for x in (clean, noisy, stddev))
    weights = torch.ones(len(clean)) if weights is None else weights.reshape(-1)
    loads = []
    for e in range(experts):
        load = clean.new_zeros(())
        for t, weight in enumerate(weights.tolist()):
            present = (clean[t].isfinite() & noisy[t].isfinite()).tolist()
            others = [noisy[t, i] for i in range(experts) if i != e and present[i]]
            if not present[e]:
                continue
            if len(others) < top_k:  # nobody to pass
                load = load + weight
                continue
            threshold = torch.stack(others).sort(descending=True).values[top_k - 1]
            distance = (clean[t, e] - threshold) / stddev[t, e]
            load = load + weight * (1 + torch.erf(distance / math.sqrt(2))) / 2
        loads.append(load)
    loads = torch.stack(loads)
    return ((loads - loads.mean()) ** 2).mean() / loads.mean() ** 2


def communication_by_hand(logits, top_k=2, num_devices=3, max_devices=2, weights=None):
    """sum_i f''_i P'_i (DeepSeek-V2, equations 28 to 30)."""
    experts = logits.size(-1)
    logits = logits.reshape(-1, experts)
    weights = (torch.ones(len(logits)) if weights is None else weights.reshape(-1)).double()
    chosen = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    prob = (logits.softmax(-1) * weights[:, None]).sum(0) / weights.sum()
    total = 0
    for group in torch.arange(experts).chunk(num_devices):
        sent = sum(
            w
            for w, row in zip(weights, chosen, strict=True)
            if set(row.tolist()) & set(group.tolist())
        )
        total = total + num_devices / (max_devices * weights.sum()) * sent * prob[group].sum()
    return total


def router_l2_by_hand(logits, weights=None):
    rows = logits.reshape(-1, logits.size(-1))
    weights = torch.ones(len(rows)) if weights is None else weights.reshape(-1)
    total = sum(w * (x * x).sum() for w, x in zip(weights.tolist(), rows, strict=True))
    return total / (weights.sum().item() * rows.size(1))


def similarity_by_hand(inputs, gates):
    """mean_ij cos(x_i, x_j) cos(g_i, g_j), pair by pair; rows of zeros are similar to none."""

    def cosine(a, b):
        return a @ b / (a.norm() * b.norm()) if a.any() and b.any() else 0

    pairs = [(i, j) for i in range(len(inputs)) for j in range(len(inputs))]
    similar = [cosine(inputs[i], inputs[j]) * cosine(gates[i], gates[j]) for i, j in pairs]
    return sum(similar) / len(pairs)


def mixture_by_hand(gate_logits, log_probs):
    return -(gate_logits.softmax(-1) * log_probs.exp()).sum(-1).log().mean()


def infonce_by_hand(scores):
    shares = [scores[i, i].exp() / scores[i].exp().mean() for i in range(len(scores))]
    return torch.stack(shares).log().mean()


def mine_by_hand(joint, marginal):
    return joint.mean() - marginal.exp().mean().log()


class Case(NamedTuple):
    """A loss as a function of the tensors that it has gradients of."""

    loss: object
    by_hand: object
    shapes: list  # of random inputs
    positive: int | None = None  # which input must be > 0


CASES = {
    "load_loss": Case(
        lambda *x: F.load_loss(*x, 2), load_by_hand, [(2, 5, 6), (2, 5, 6), (2, 5, 6)], 2
    ),
    "communication_loss": Case(
        lambda x: F.communication_loss(F.topk_gating(x, 2), 3, 2), communication_by_hand, [(4, 6)]
    ),
    "router_l2_loss": Case(F.router_l2_loss, router_l2_by_hand, [(2, 3, 4)]),
    "similarity_correlation": Case(
        F.similarity_correlation, similarity_by_hand, [(6, 5), (6, 3)], 1
    ),
    "mixture_nll": Case(F.mixture_nll, mixture_by_hand, [(2, 3, 4), (2, 3, 4)]),
    "infonce": Case(F.infonce, infonce_by_hand, [(5, 5)]),
    "mine": Case(F.mine, mine_by_hand, [(5,), (7,)]),
}
every_loss = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name == "communication_loss" else [no_launch])
        for name, case in CASES.items()
    ],
)


def inputs_of(case, dtype=torch.float64):
    """Random values of `dtype` that require a gradient."""
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in case.shapes]
    if case.positive is not None:
        tensors[case.positive] = tensors[case.positive].abs() + 0.5
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@every_loss
@pytest.mark.parametrize("dtype", FLOATS)
def test_value_and_gradient_against_the_formula(case, dtype):
    inputs = inputs_of(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = case.loss(*inputs), case.by_hand(*exact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.shape == () and got.dtype == wide
    close = dict(rtol=1e-12, atol=0) if wide == torch.float64 else tolerance(wide)
    torch.testing.assert_close(got.double(), want, **close)
    for x, grad, of_exact in zip(
        inputs, gradients(got, inputs), gradients(want, exact), strict=True
    ):
        assert grad.dtype == x.dtype
        torch.testing.assert_close(grad.double(), of_exact, **tolerance(dtype))


@every_loss
def test_gradcheck_and_gradgradcheck(case):
    inputs = inputs_of(case)
    assert gradcheck(case.loss, inputs)
    assert gradgradcheck(case.loss, inputs)


@every_loss
def test_layouts(case):
    inputs = inputs_of(case)
    want = case.loss(*inputs)
    for stretch in (
        lambda x: x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach(),
        lambda x: torch.stack([x.detach(), x.detach() + 1], -1)[..., 0],
    ):
        views = [stretch(x) for x in inputs]
        torch.testing.assert_close(case.loss(*views), want.detach(), rtol=1e-12, atol=0)
    one_row = [x.detach()[:1].expand_as(x) for x in inputs]
    copies = [x.contiguous() for x in one_row]
    torch.testing.assert_close(case.loss(*one_row), case.loss(*copies), rtol=1e-12, atol=1e-14)


@every_loss
def test_compile(case, compiled):
    fast = compiled(case.loss)
    for repeat in (1, 2, 3):
        inputs = [x.detach().repeat(repeat, *[1] * (x.dim() - 1)) for x in inputs_of(case)]
        if case is CASES["infonce"]:
            inputs = [torch.randn(4 + repeat, 4 + repeat)]
        inputs = [x.requires_grad_() for x in inputs]
        got, want = fast(*inputs), case.loss(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs))


@every_loss
def test_export(case):
    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            return case.loss(*inputs)

    rows = torch.export.Dim("rows", min=2)
    inputs = [x.detach() for x in inputs_of(case)]
    shapes = tuple({0: rows} for _ in inputs)
    if case is CASES["infonce"]:
        shapes = ({0: rows, 1: rows},)
    elif case is CASES["mine"]:
        shapes = ({0: rows}, {0: torch.export.Dim("others", min=2)})
    exported = torch.export.export(Loss(), tuple(inputs), dynamic_shapes=(shapes,)).module()
    torch.testing.assert_close(exported(*inputs), case.loss(*inputs))
    more = [torch.rand(9, 9)] if case is CASES["infonce"] else [torch.cat([x, x]) for x in inputs]
    more = [x.double() for x in more]
    torch.testing.assert_close(exported(*more), case.loss(*more))


@every_loss
def test_autocast_changes_nothing(case, compiled):
    inputs = inputs_of(case, torch.float32)
    want = case.loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, fast = case.loss(*inputs), compiled(case.loss)(*inputs)
    for value in (got, fast):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        gradients(got, inputs), gradients(want, inputs), rtol=1e-5, atol=1e-7
    )


def test_opcheck():
    r = F.topk_gating(torch.randn(4, 6), 2, segment_ids=torch.arange(4) // 2, num_segments=2)
    sums = r.sums.detach()
    for requires_grad in (False, True):
        for weights in (None, torch.rand(4)):
            torch.library.opcheck(
                ops.communication_loss,
                (sums.clone().requires_grad_(requires_grad), r.topk_indices, 3, 2, weights),
            )
        for name, case in CASES.items():
            if name == "communication_loss":
                continue
            inputs = [x.detach().requires_grad_(requires_grad) for x in inputs_of(case)]
            options = {"load_loss": (2, torch.rand(2, 5)), "router_l2_loss": (torch.rand(2, 3),)}
            torch.library.opcheck(getattr(ops, name), (*inputs, *options.get(name, ())))


# ---- load_loss -----------------------------------------------------------------------------------


def load_inputs(tokens, experts, dtype=torch.float64):
    clean = torch.randn(tokens, experts, dtype=dtype)
    noisy = clean + torch.randn(tokens, experts, dtype=dtype)
    return [
        x.requires_grad_() for x in (clean, noisy, 0.5 + torch.rand(tokens, experts, dtype=dtype))
    ]


@no_launch
@pytest.mark.parametrize("tokens,experts,top_k", [(9, 7, 1), (9, 7, 3), (1, 2, 1), (5, 4, 3)])
def test_load_loss_of_each_top_k(tokens, experts, top_k):
    inputs = load_inputs(tokens, experts)
    got, want = F.load_loss(*inputs, top_k), load_by_hand(*inputs, top_k)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = gradients(got, inputs)
    torch.testing.assert_close(grads, gradients(want, inputs), rtol=1e-10, atol=1e-14)
    # To each expert's own clean logit, and to the two noisy ones that somebody has to pass.
    assert grads[0].all()
    assert torch.equal((grads[1] != 0).sum(1), torch.full((tokens,), 2))


@no_launch
@pytest.mark.parametrize("floating", [False, True])
def test_load_loss_token_mask(floating):
    inputs = load_inputs(8, 5)
    mask = torch.tensor([1.0, 0, 2, 0.5, 0, 1, 1, 3]) if floating else torch.arange(8) % 3 > 0
    clean = inputs[0].detach().clone()
    clean[1] = torch.nan  # masked when floating: may hold anything
    mask[1] = 0
    got = F.load_loss(clean, *inputs[1:], 2, mask)
    want = load_by_hand(*inputs, 2, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for grad in gradients(got, inputs[1:]):
        assert grad.isfinite().all() and not grad[mask == 0].any() and grad[mask > 0].any()
    assert F.load_loss(*inputs, 2, torch.zeros(8)) == 0


@no_launch
def test_load_loss_absent_experts():
    inputs = load_inputs(7, 6)
    with torch.no_grad():
        clean, noisy, _ = inputs
        clean[0, 2] = noisy[0, 2] = -torch.inf
        noisy[1, 0] = torch.nan
        clean[2, 5] = torch.nan
        noisy[3, :3] = -torch.inf  # three are left, for two places and the third to pass
        noisy[4, :4] = -torch.inf  # two are left: both certain
        noisy[5, :5] = -torch.inf
        noisy[6] = -torch.inf
    got, want = F.load_loss(*inputs, 2), load_by_hand(*inputs, 2)
    assert want.isfinite()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for grad, exact in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-14)


@no_launch
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("tokens,experts,top_k", [(0, 4, 2), (0, 4, 4), (3, 1, 1), (5, 4, 4)])
def test_load_loss_with_nothing_to_balance(tokens, experts, top_k, absent):
    """No tokens, one expert, and K = E: 0, with zero gradient."""
    inputs = load_inputs(tokens, experts)
    if absent:
        with torch.no_grad():
            inputs[0][:1, 0] = inputs[1][:1, 0] = -torch.inf
            inputs[1][1:2, 0] = torch.nan
    loss = F.load_loss(*inputs, top_k)
    assert loss.item() == 0
    for grad in gradients(loss, inputs):
        assert (grad == 0).all()


@no_launch
def test_load_loss_without_noise_counts():
    """A standard deviation of almost 0: the loads are the counts of the choices."""
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 1, 2, 0], [0, 3, 2, 1]])
    counts = torch.tensor([2.0, 2, 2, 0])
    want = counts.var(unbiased=False) / counts.mean() ** 2
    for stddev in (1e-3, 0.0):
        got = F.load_loss(logits, logits, torch.full_like(logits, stddev), 2)
        torch.testing.assert_close(got, want)


# ---- communication_loss --------------------------------------------------------------------------


def test_communication_loss_is_one_at_balance():
    """Each token reaches two of three devices, all of them alike."""
    logits = torch.zeros(3, 6)
    for token in range(3):
        logits[token, [2 * token, (2 * token + 2) % 6]] = 1.0
    logits = torch.cat([logits, logits[:, [1, 0, 3, 2, 5, 4]]])
    loss = F.communication_loss(F.topk_gating(logits, 2), 3, 2)
    torch.testing.assert_close(loss, torch.tensor(1.0))


@pytest.mark.parametrize(
    "experts,top_k,devices,most", [(6, 2, 1, 1), (6, 6, 2, 2), (1, 1, 1, 1), (8, 3, 8, 3)]
)
@pytest.mark.parametrize("masked", [None, "mask", "weights"])
def test_communication_loss_of_masks_and_segments(experts, top_k, devices, most, masked):
    logits = torch.randn(2, 5, experts, dtype=torch.float64, requires_grad=True)
    mask = {
        "mask": torch.arange(10).view(2, 5) % 3 > 0,
        "weights": torch.rand(2, 5).round(decimals=1),
    }
    mask = mask.get(masked)
    weights = mask if masked == "weights" else None
    want = communication_by_hand(logits, top_k, devices, most, mask)
    exact = gradients(want, logits)
    ids = torch.tensor([[0, 0, 1, 3, 3], [1, 1, 3, 0, 3]])
    for segments in ({}, {"segment_ids": ids, "num_segments": 4}):
        r = F.topk_gating(logits, top_k, token_mask=mask, **segments)
        assert r.sums.dim() == 1 + len(segments) // 2
        got = F.communication_loss(r, devices, most, weights)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients(got, logits), exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_communication_loss_absent_experts(dtype):
    logits = torch.randn(5, 4, dtype=torch.float64).to(dtype)
    logits[0, 1], logits[1, 2] = -torch.inf, torch.nan
    logits[2, 1:] = -torch.inf
    logits.requires_grad_()
    r = F.topk_gating(logits, 2)
    loss = F.communication_loss(r, 2, 2)
    p = logits.detach().double().masked_fill(logits.isnan(), -torch.inf).softmax(-1).mean(0)
    reached = [
        [len({e // 2 for e in row if e >= 0} & {d}) for d in (0, 1)]
        for row in r.topk_indices.tolist()
    ]
    sent = torch.tensor(reached, dtype=torch.float64).sum(0)
    want = (sent / 5 * p.view(2, 2).sum(1)).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    (grad,) = gradients(loss, logits)
    assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("tokens", [0, 3])
@no_launch
def test_communication_loss_without_tokens(tokens):
    logits = torch.randn(tokens, 4, requires_grad=True)
    r = F.topk_gating(logits, 2, token_mask=torch.zeros(tokens, dtype=torch.bool))
    loss = F.communication_loss(r, 2, 2)
    (grad,) = gradients(loss, logits)
    assert loss.item() == 0 and (grad == 0).all()


# ---- router_l2_loss ------------------------------------------------------------------------------


@no_launch
def test_router_l2_loss_masks_and_absent_experts():
    logits = torch.randn(2, 4, 3, dtype=torch.float64)
    for mask in (
        torch.arange(8).view(2, 4) % 3 > 0,
        torch.tensor([[1.0, 0, 2, 0.5], [0, 0, 1, 3]]),
    ):
        got = F.router_l2_loss(logits, mask)
        torch.testing.assert_close(got, router_l2_by_hand(logits, mask), rtol=1e-12, atol=0)
    absent = logits.clone()
    absent[0, 0, 1], absent[1, 2, 0] = -torch.inf, torch.nan
    absent.requires_grad_()
    zeroed = absent.detach().nan_to_num(neginf=0.0)
    got = F.router_l2_loss(absent)
    torch.testing.assert_close(got, router_l2_by_hand(zeroed), rtol=1e-12, atol=0)
    (grad,) = gradients(got, absent)
    torch.testing.assert_close(grad, zeroed * 2 / logits.numel(), rtol=1e-12, atol=0)
    mask = torch.ones(2, 4)
    mask[1, 2] = 0
    got = F.router_l2_loss(absent, mask)
    torch.testing.assert_close(got, router_l2_by_hand(zeroed, mask), rtol=1e-12, atol=0)


@no_launch
@pytest.mark.parametrize("shape,masked", [((0, 4), False), ((2, 0, 4), True), ((3, 4), True)])
def test_router_l2_loss_without_tokens(shape, masked):
    logits = torch.randn(shape, requires_grad=True)
    loss = F.router_l2_loss(logits, torch.zeros(shape[:-1]) if masked else None)
    (grad,) = gradients(loss, logits)
    assert loss.item() == 0 and (grad == 0).all()


# ---- similarity_correlation ----------------------------------------------------------------------


@no_launch
def test_similarity_correlation_from_unrelated_to_the_same():
    x, g = torch.randn(1, 5), torch.rand(1, 3)
    torch.testing.assert_close(F.similarity_correlation(x.repeat(4, 1), g.repeat(4, 1)).item(), 1.0)
    assert F.similarity_correlation(torch.eye(4), torch.eye(4)).item() == 0.25
    x, g = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 3)  # of two dtypes
    got = F.similarity_correlation(x, g)
    torch.testing.assert_close(got, similarity_by_hand(x, g.double()), rtol=1e-6, atol=0)
    assert got.dtype == F.similarity_correlation(g, x).dtype == torch.float64


@no_launch
def test_similarity_correlation_rows_of_zeros():
    """Similar to none, with zero gradient, also of the second order."""
    inputs = inputs_of(CASES["similarity_correlation"])
    with torch.no_grad():
        inputs[0][2], inputs[1][4] = 0, 0
    got, want = F.similarity_correlation(*inputs), similarity_by_hand(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    first = torch.autograd.grad(got, inputs, create_graph=True)
    exact = torch.autograd.grad(want, inputs)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
    for grads in (first, second):
        assert all(x.isfinite().all() and x.any() for x in grads)
        assert not grads[0][2].any() and not grads[1][4].any()
    torch.testing.assert_close(first, exact, rtol=1e-10, atol=1e-14)
    assert F.similarity_correlation(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


@no_launch
def test_similarity_correlation_without_rows():
    inputs = [torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 3, requires_grad=True)]
    loss = F.similarity_correlation(*inputs)
    assert loss.item() == 0 and [x.shape for x in gradients(loss, inputs)] == [(0, 5), (0, 3)]


class LargestTensor(TorchDispatchMode):
    """Watches what is made while it is entered, in the backward too."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@no_launch
def test_similarity_correlation_makes_no_pairs():
    rows = 8192
    inputs = [torch.randn(rows, 16, requires_grad=True), torch.rand(rows, 8, requires_grad=True)]
    with LargestTensor() as made:
        F.similarity_correlation(*inputs).backward()
    assert rows * 8 <= made.numel <= rows * 16
    assert all(x.grad.isfinite().all() for x in inputs)


# ---- mixture_nll, infonce, mine ------------------------------------------------------------------


@no_launch
def test_mixture_nll_of_components_that_are_out():
    """A gate of 0 or a likelihood of 0: left out of the mixture."""
    inputs = inputs_of(CASES["mixture_nll"])
    with torch.no_grad():
        inputs[0][0, 1, 2] = inputs[1][1, 0, 3] = -torch.inf
        inputs[1][0, 0] -= 2000  # likelihoods that underflow
    got = F.mixture_nll(*inputs)
    far = inputs[1].detach().clone()
    far[0, 0] += 2000
    want = mixture_by_hand(inputs[0].detach(), far) + 2000 / 6
    torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=0)
    for grad in gradients(got, inputs):
        assert grad.isfinite().all() and grad.any()


@no_launch
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_mixture_nll_without_tokens(shape):
    inputs = [torch.zeros(shape, requires_grad=True) for _ in range(2)]
    loss = F.mixture_nll(*inputs)
    assert loss.item() == 0 and all(x.shape == shape for x in gradients(loss, inputs))


@no_launch
def test_bounds_on_information():
    """Of a pair that says all: log B. Of one that says nothing: 0, and so of one pair alone."""
    torch.testing.assert_close(F.infonce(1000 * torch.eye(8)).item(), math.log(8))
    assert F.infonce(torch.full((8, 8), 3.0)).item() == pytest.approx(0, abs=1e-6)
    assert F.infonce(torch.tensor([[5.0]])).item() == 0
    far = torch.tensor([1000.0, 1002.0]), torch.tensor([1000.0, 1000.0, 1000.0])  # exp overflows
    torch.testing.assert_close(F.mine(*far).item(), 1.0)
    torch.testing.assert_close(
        F.mine(torch.ones(1), torch.tensor([0.0, -torch.inf])).item(), 1 + math.log(2)
    )


# ---- bad input -----------------------------------------------------------------------------------

x35 = torch.zeros(3, 5)
LOAD = dict(clean_logits=x35, noisy_logits=x35, noise_stddev=x35 + 1, top_k=2)
META = torch.zeros(3, 5, device="meta")
PER_TOKEN = r"must have shape of \w+ without its last = \[3\], got \[4\]"


@no_launch
@pytest.mark.parametrize(
    "name,arguments,message",
    [
        ("load_loss", LOAD | dict(clean_logits=x35.long()), "clean_logits must be float32, .*Long"),
        (
            "load_loss",
            LOAD | dict(clean_logits=torch.tensor(1.0)),
            r"clean_logits must have shape \[..., E\] with E >= 1, got \[\]",
        ),
        ("load_loss", LOAD | dict(clean_logits=torch.zeros(3, 0)), r"E >= 1, got \[3, 0\]"),
        ("load_loss", LOAD | dict(noisy_logits=x35.double()), "noisy_logits must be Float, .*Dou"),
        ("load_loss", LOAD | dict(noise_stddev=x35.half()), "noise_stddev must be Float, got Half"),
        (
            "load_loss",
            LOAD | dict(noisy_logits=META),
            "noisy_logits must be on the device of clean",
        ),
        (
            "load_loss",
            LOAD | dict(noise_stddev=torch.zeros(3, 4)),
            r"noise_stddev must have shape of clean_logits = \[3, 5\], got \[3, 4\]",
        ),
        ("load_loss", LOAD | dict(top_k=0), "top_k must be from 1 to num_experts = 5, got 0"),
        ("load_loss", LOAD | dict(top_k=6), "top_k must be from 1 to num_experts = 5, got 6"),
        ("load_loss", LOAD | dict(token_mask=torch.ones(4)), f"token_mask {PER_TOKEN}"),
        (
            "load_loss",
            LOAD | dict(token_mask=torch.ones(3).long()),
            "token_mask must be bool or floating weights, got Long",
        ),
        (
            "load_loss",
            LOAD | dict(token_mask=torch.ones(3, device="meta")),
            "token_mask must be on the device of",
        ),
        ("router_l2_loss", dict(logits=x35.int()), "logits must be float32, .* got Int"),
        (
            "router_l2_loss",
            dict(logits=torch.tensor(1.0)),
            r"logits must have shape \[..., E\] .*\[\]",
        ),
        ("router_l2_loss", dict(logits=torch.zeros(3, 0)), r"E >= 1, got \[3, 0\]"),
        ("router_l2_loss", dict(logits=x35, token_mask=torch.ones(4)), f"token_mask {PER_TOKEN}"),
        (
            "router_l2_loss",
            dict(logits=x35, token_mask=torch.ones(3).int()),
            "token_mask must be bool or floating weights, got Int",
        ),
        (
            "similarity_correlation",
            dict(inputs=torch.ones(2, 3), gates=torch.ones(3, 3)),
            r"inputs must have shape \[B, D\] and gates \[B, N\], got \[2, 3\] and \[3, 3\]",
        ),
        (
            "similarity_correlation",
            dict(inputs=torch.ones(2), gates=torch.ones(2, 3)),
            r"inputs must have shape \[B, D\] and gates \[B, N\], got \[2\] and",
        ),
        ("similarity_correlation", dict(inputs=x35.long(), gates=x35), "inputs must be float32"),
        ("similarity_correlation", dict(inputs=x35, gates=x35.long()), "gates must be float32"),
        (
            "similarity_correlation",
            dict(inputs=x35, gates=META),
            "gates must be on the device of i",
        ),
        ("mixture_nll", dict(gate_logits=x35.long(), log_probs=x35), "gate_logits must be float32"),
        ("mixture_nll", dict(gate_logits=x35, log_probs=x35.long()), "log_probs must be float32"),
        (
            "mixture_nll",
            dict(gate_logits=x35, log_probs=META),
            "log_probs must be on the device of",
        ),
        (
            "mixture_nll",
            dict(gate_logits=torch.tensor(1.0), log_probs=torch.tensor(1.0)),
            r"gate_logits must have shape \[..., K\] with K >= 1, got \[\]",
        ),
        (
            "mixture_nll",
            dict(gate_logits=torch.zeros(3, 0), log_probs=torch.zeros(3, 0)),
            r"gate_logits must have shape \[..., K\] with K >= 1, got \[3, 0\]",
        ),
        (
            "mixture_nll",
            dict(gate_logits=x35, log_probs=torch.zeros(5)),
            r"log_probs must have shape of gate_logits = \[3, 5\], got \[5\]",
        ),
        ("infonce", dict(scores=x35[:, :3].long()), "scores must be float32, .* got Long"),
        ("infonce", dict(scores=x35), r"scores must have shape \[B, B\] .* got \[3, 5\]"),
        ("infonce", dict(scores=torch.zeros(0, 0)), r"\[B, B\] with B >= 1, got \[0, 0\]"),
        (
            "mine",
            dict(joint_scores=x35[0].int(), marginal_scores=x35[0]),
            "joint_scores must be flo",
        ),
        (
            "mine",
            dict(joint_scores=x35[0], marginal_scores=x35[0].int()),
            "marginal_scores must be",
        ),
        (
            "mine",
            dict(joint_scores=x35[0], marginal_scores=META[0]),
            "marginal_scores must be on th",
        ),
        ("mine", dict(joint_scores=x35, marginal_scores=x35[0]), r"joint_scores .* got \[3, 5\]"),
        ("mine", dict(joint_scores=x35[0, :0], marginal_scores=x35[0]), r"with B >= 1, got \[0\]"),
        ("mine", dict(joint_scores=x35[0], marginal_scores=x35[0, :0]), r"with M >= 1, got \[0\]"),
        (
            "mine",
            dict(joint_scores=x35[0], marginal_scores=x35),
            r"marginal_scores .* got \[3, 5\]",
        ),
    ],
)
def test_bad_input(name, arguments, message):
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(F, name)(**arguments)


def test_communication_loss_bad_input():
    r = F.topk_gating(torch.randn(3, 6), 2)
    for arguments, message in [
        ((4, 1), "num_devices must divide num_experts = 6, got 4"),
        ((0, 1), "num_devices must divide num_experts = 6, got 0"),
        ((3, 0), "max_devices must be from 1 to num_devices = 3, got 0"),
        ((3, 4), "max_devices must be from 1 to num_devices = 3, got 4"),
        ((3, 2, torch.ones(4)), rf"token_weights {PER_TOKEN}"),
        ((3, 2, torch.ones(3, device="meta")), "token_weights must be on the device of topk_ind"),
    ]:
        with pytest.raises(RuntimeError, match=f"communication_loss: {message}"):
            F.communication_loss(r, *arguments)
    for sums in (r.sums[:-1], r.sums[:5], r.sums.view(1, 1, -1), r.sums[0]):
        with pytest.raises(RuntimeError, match=r"sums must have shape \[2 E \+ 5\] or \[S, 2 E"):
            ops.communication_loss(sums, r.topk_indices, 3, 2)
    with pytest.raises(RuntimeError, match="topk_indices must be on the device of sums"):
        ops.communication_loss(r.sums, r.topk_indices.to("meta"), 3, 2)
    with pytest.raises(RuntimeError, match="topk_indices must be Long, got Int"):
        ops.communication_loss(r.sums, r.topk_indices.int(), 3, 2)
    with pytest.raises(RuntimeError, match="RoutingResult has no statistics"):
        F.communication_loss(F.topk_gating(torch.randn(3, 6), 2, stats=False), 3, 2)


def hierarchical_by_hand(logits, top_k, groups):
    """Between the groups by their totals, then each group as a router of its own."""
    experts = logits.size(-1)
    p = logits.softmax(-1).mean(0)
    best = logits.detach().topk(top_k).indices
    f = torch.bincount(best.flatten(), minlength=experts).double() / best.numel()
    between, within = 0, []
    for group in torch.arange(experts).chunk(groups):
        between = between + groups * f[group].sum() * p[group].sum()
        if f[group].sum() > 0:
            share, mean = f[group] / f[group].sum(), p[group] / p[group].sum()
            within.append(len(group) * (share * mean).sum())
    return (between + sum(within) / len(within)) / 2


@pytest.mark.no_launch
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_hierarchical_loss(groups, compiled):
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 1, 1])

    def loss(logits):
        routing = F.topk_gating(logits, 1, segment_ids=ids, num_segments=2)
        return F.hierarchical_loss(routing, groups)

    want = hierarchical_by_hand(logits, 1, groups)
    torch.testing.assert_close(loss(logits), want, rtol=1e-12, atol=0)
    (got,), (exact,) = (torch.autograd.grad(v, logits) for v in (loss(logits), want))
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-14)
    assert gradcheck(loss, (logits,)) and gradgradcheck(loss, (logits,))
    torch.testing.assert_close(compiled(loss)(logits), want)
    torch.testing.assert_close(
        F.hierarchical_loss(F.topk_gating(torch.eye(6), 1), groups), torch.tensor(1.0)
    )
    with pytest.raises(RuntimeError, match="num_groups must divide num_experts = 6, got 4"):
        F.hierarchical_loss(F.topk_gating(torch.eye(6), 1), 4)
