# SPDX-License-Identifier: Apache-2.0
"""watch, audit and patch on equipoise's own routers; test_models_huggingface.py has the others."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from equipoise import functional as F
from equipoise.models import audit, patch, watch
from equipoise.nn import (
    AdvancedLoadBalancingLoss,
    BalanceLoss,
    DenseRouter,
    EMABalancer,
    ExpertChoiceRouter,
    LossFreeBalancer,
    MoELayer,
    MoETransformerLM,
    SwitchBalanceLoss,
    TopKRouter,
)

E, K = 8, 2


def make(**options):
    model = MoETransformerLM(
        32, d_model=16, num_layers=3, num_heads=2, d_hidden=8, num_experts=E, top_k=K,
        max_seq_len=16, **options,
    )  # fmt: skip
    for block in model.blocks:
        nn.init.normal_(block.moe.router.weight)
    return model


def make_batch():
    tokens = torch.randint(32, (4, 6))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    return {"tokens": tokens, "token_mask": mask}


def test_counts_and_losses_are_those_of_the_routings():
    model, batch = make(), make_batch()
    with watch(model) as w:
        _, routings = model(**batch)
    assert w.layers == [f"blocks.{i}.moe.router" for i in range(3)]
    assert w.tokens_per_expert.dtype == torch.int64
    assert torch.equal(w.tokens_per_expert, torch.stack([r.tokens_per_expert for r in routings]))
    losses = w.losses({"switch": {}, "z": {}, "importance": {"of": "probs"}})
    for layer, r in enumerate(routings):
        for name, value in [
            ("switch", F.switch_loss(r)),
            ("z", F.z_loss(r)),
            ("importance", F.importance_loss(r, of="probs")),
        ]:
            torch.testing.assert_close(losses[name][layer].float(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(w.routings[layer].topk_weights, r.topk_weights)
        assert not w.routings[layer].topk_weights.requires_grad


def test_several_passes_are_one_batch():
    model = make()
    batches = [make_batch() for _ in range(3)]
    with watch(model) as w:
        for batch in batches:
            model(**batch)
    together = F.concatenate_routings([model(**batch)[1][1] for batch in batches])
    assert torch.equal(w.tokens_per_expert[1], together.tokens_per_expert)
    torch.testing.assert_close(
        w.losses()["switch"][1].float(), F.switch_loss(together), rtol=1e-5, atol=0
    )
    w.reset()
    with pytest.raises(RuntimeError, match="no forward pass has been seen"):
        _ = w.tokens_per_expert


def test_layers_that_cancel():
    """Two layers, each collapsed on another expert: balanced together, each as bad as can be."""
    layers = nn.Sequential(*(TopKRouter(2, 2, 1) for _ in range(2)))
    for i, router in enumerate(layers):
        nn.init.zeros_(router.weight).data[i] = 9.0
    x = torch.ones(5, 2)
    with watch(layers) as w:
        for router in layers:
            router(x)
    torch.testing.assert_close(w.losses(["switch"])["switch"].float(), torch.full((2,), 2.0))
    torch.testing.assert_close(w.concatenated_loss().float(), torch.tensor(1.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    layer = MoELayer(16, 8, E, K)
    x = torch.randn(10, 16, requires_grad=True)
    passes = []
    layer.router.register_forward_pre_hook(lambda *_: passes.append(None))
    with watch(layer) as w:
        y, _ = checkpoint(layer, x, use_reentrant=reentrant)
        y.sum().backward()
    assert len(passes) == 2
    assert w.tokens_per_expert.sum() == 10 * K


def test_segments_inference_mode_and_a_layer_that_does_not_run():
    routers = nn.ModuleList(TopKRouter(16, E, K) for _ in range(2))
    x = torch.randn(10, 16)
    with watch(routers) as w:
        with torch.inference_mode():
            routers[0](x)
        r = routers[0](x, segment_ids=torch.arange(10) % 3, num_segments=3)
    assert r.tokens_per_expert.shape == (3, E)
    assert torch.equal(w.tokens_per_expert[0], 2 * r.tokens_per_expert.sum(0))
    assert w.tokens_per_expert[1].tolist() == [0] * E
    switch = w.losses()["switch"]
    torch.testing.assert_close(switch[0].float(), F.switch_loss(routers[0](x)).detach())
    assert switch.isnan().tolist() == [False, True]
    with pytest.raises(RuntimeError, match="none came from 1"):
        _ = w.routings


def test_expert_choice_has_counts_and_no_losses():
    router = ExpertChoiceRouter(16, E, K)
    with watch(router) as w:
        router(torch.randn(12, 16))
    assert w.tokens_per_expert.tolist() == [[3] * E]
    with pytest.raises(ValueError, match="tokens choose experts, got the ExpertChoiceRouter"):
        w.losses()


def test_hooks_are_gone_afterwards_even_after_an_error():
    model, batch = make(), make_batch()
    with pytest.raises(RuntimeError, match="max_seq_len|size"), watch(model):
        model(torch.zeros(1, 99, dtype=torch.int64))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    w = watch(model)
    with w:
        with pytest.raises(RuntimeError, match="in use already"), w:
            pass
        model(**batch)
    assert w.tokens_per_expert.sum() == 3 * K * 21


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"watch: model must contain a router, got a Linear"):
        watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="watch: model must be a torch.nn.Module, got str"):
        watch("model")
    with pytest.raises(ValueError, match="watch: token_mask must be None for routers of equipoise"):
        watch(make(), token_mask=torch.ones(4, 6))
    with pytest.raises(RuntimeError, match="no forward pass has been seen"):
        _ = watch(make()).tokens_per_expert
    with pytest.raises(RuntimeError, match="no forward pass has been seen"):
        watch(make()).losses()
    with watch(TopKRouter(16, E, K)) as w:
        w._model(torch.randn(3, 16))
    with pytest.raises(ValueError, match="losses can take importance only"):
        w.losses(["importance"])
    with pytest.raises(RuntimeError, match="swich"):
        w.losses(["swich"])
    both = nn.ModuleList([TopKRouter(4, 2, 1), TopKRouter(4, 3, 1)])
    with watch(both) as w:
        for router in both:
            router(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"different numbers of experts, \[2, 3\]"):
        _ = w.tokens_per_expert
    assert w.losses()["switch"].shape == (2,)


class StrangeTopKRouter(nn.Module):
    top_k = 1

    def forward(self, x):
        return x


class MoEGate(nn.Module):
    """Of the kind that keeps its logits to itself: DeepSeek's own code, and transformers 4."""

    top_k = K

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, 16))
        self.e_score_correction_bias = nn.Parameter(torch.randn(E))

    def forward(self, hidden_states):
        scores = (hidden_states.flatten(0, -2) @ self.weight.T).sigmoid()
        indices = (scores + self.e_score_correction_bias).topk(K, sorted=False).indices
        return indices, scores.gather(1, indices), torch.zeros(())


class MixtralSparseMoeBlock(nn.Module):
    """As in transformers 4: the routing is inside."""

    top_k = K
    num_experts = E

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, E, bias=False)

    def forward(self, hidden_states):
        return hidden_states, self.gate(hidden_states.flatten(0, -2))


def test_routers_without_logits_and_blocks():
    gate, block, x = MoEGate(), MixtralSparseMoeBlock(), torch.randn(2, 5, 16)
    mask = torch.rand(2, 5) < 0.5
    with watch(gate, mask) as w:
        indices, weights, _ = gate(hidden_states=x)
    logits = x.flatten(0, 1) @ gate.weight.T
    exact = F.topk_gating(logits, K, "sigmoid", forced_indices=indices, token_mask=mask.flatten())
    assert torch.equal(w.tokens_per_expert[0], exact.tokens_per_expert)
    torch.testing.assert_close(w.losses()["switch"][0].float(), F.switch_loss(exact))
    real = mask.flatten()
    assert torch.equal(w.routings[0].topk_indices[real], indices[real])
    torch.testing.assert_close(w.routings[0].topk_weights[real], weights[real].detach())

    with watch(block, mask) as w:
        _, logits = block(x)
    exact = F.topk_gating(logits, K, norm_topk_prob=True, token_mask=real)
    assert torch.equal(w.tokens_per_expert[0], exact.tokens_per_expert)
    torch.testing.assert_close(w.losses()["switch"][0].float(), F.switch_loss(exact))
    torch.testing.assert_close(w.routings[0].topk_weights, exact.topk_weights.detach())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = MixtralSparseMoeBlock()

    def forward(self, x, attention_mask=None):
        return self.block(x)


def test_the_attention_mask_by_place_and_by_name():
    model, x, mask = Masked(), torch.randn(2, 5, 16), torch.ones(2, 5)
    mask[0, 1:] = 0
    with watch(model) as w:
        model(x, mask)
        assert w.tokens_per_expert.sum() == 6 * K
        model(x, attention_mask=mask)
        assert w.tokens_per_expert.sum() == 12 * K
        model.block(x)  # by itself, after a pass with a mask: of that nothing is left
        model(x)
        assert w.tokens_per_expert.sum() == 32 * K


def test_compiled_models_are_not_seen_and_that_is_said():
    router = TopKRouter(16, E, K)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    with watch(compiled) as w:
        compiled(torch.randn(3, 16))
    with pytest.raises(RuntimeError, match="not compiled"):
        _ = w.tokens_per_expert


def test_a_router_that_cannot_be_read_is_named():
    model = nn.Sequential(StrangeTopKRouter())
    with (
        watch(model),
        pytest.raises(ValueError, match=r"StrangeTopKRouter '0' must return .*got Tensor"),
    ):
        model(torch.zeros(2, 2))


def rules(result):
    return [finding.rule for finding in result.findings]


def test_audit_of_a_healthy_model():
    def make_router():
        return TopKRouter(16, E, K, balancer=LossFreeBalancer(E, bias_update_rate=0.002))

    model = make(make_router=make_router).bfloat16().float()
    model.balance = BalanceLoss({"switch": 0.01, "z": 0.0})
    model.other = SwitchBalanceLoss(0.5)
    model.gates = AdvancedLoadBalancingLoss(4, lambda_mi=0.0)
    result = audit(model, make_batch())
    assert result.findings == []
    assert result.model == "MoETransformerLM"
    assert result.routers == [f"3 x TopKRouter: {E} experts, top_k {K}, softmax"]
    assert [(t.name, t.coefficient, t.in_force) for t in result.terms] == [
        ("switch", 0.01, True),
        ("z", 0.0, False),
        ("switch", 0.5, True),
        ("uniform", 0.01, True),
        ("entropy", 0.01, True),
        ("mi", 0.0, False),
        ("variance", 0.01, True),
        ("expert_bias", 0.002, True),
    ]
    text = str(result)
    assert "in force  switch 0.01  (BalanceLoss 'balance')" in text
    assert "in force  expert_bias 0.002  (LossFreeBalancer in 3 layers)" in text
    assert text.endswith("findings\n    none")
    assert "losses added outside of it are not seen" in str(audit(make()))


@pytest.mark.parametrize("balancer", [LossFreeBalancer, EMABalancer])
def test_audit_expert_bias(balancer):
    router = TopKRouter(16, E, K, balancer=balancer(E))
    for _ in range(1000):
        router.balancer.record(torch.ones(E, dtype=torch.int64))
    result = audit(router)
    assert rules(result) == ["expert-bias-not-updated"]
    assert result.findings[0].evidence["records"] == [1000]
    router.balancer.update()
    assert rules(audit(router)) == []
    router.balancer.expert_bias = router.balancer.expert_bias.bfloat16()  # by force: it resists
    assert rules(audit(router)) == ["bias-not-float32"]


def test_audit_dense_routing():
    model = nn.ModuleList([DenseRouter(16, E), BalanceLoss({"switch": 0.01, "z": 0.01})])
    result = audit(model)
    assert rules(result) == ["dense-routing"]
    assert result.findings[0].evidence["losses"] == ["switch"]
    assert [t.in_force for t in result.terms] == [False, True]
    model = nn.ModuleList([DenseRouter(16, E), BalanceLoss({"token_entropy": 0.01, "z": 0.01})])
    assert rules(audit(model)) == []
    model = nn.ModuleList([TopKRouter(16, E, K), BalanceLoss({"switch": 0.01})])
    assert rules(audit(model)) == []


class Forgets(nn.Module):
    """A model that does not tell its router of the mask."""

    def __init__(self):
        super().__init__()
        self.router = TopKRouter(16, E, K)

    def forward(self, x, attention_mask):
        return self.router(x)


def test_audit_padding():
    mask = torch.ones(2, 5)
    mask[0, 2:] = 0
    batch = {"x": torch.randn(2, 5, 16), "attention_mask": mask}
    result = audit(Forgets(), batch)
    assert rules(result) == ["padding-counted"]
    assert "count 10 tokens, of which the mask of the batch leaves 7" in result.findings[0].message
    assert rules(audit(Forgets(), batch | {"attention_mask": torch.ones(2, 5)})) == []
    assert rules(audit(make(), make_batch())) == []


def test_audit_needs_routers():
    with pytest.raises(ValueError, match="audit: model must contain a router, got a Linear"):
        audit(nn.Linear(2, 2))


def test_patch_is_for_hugging_faces_models():
    with pytest.raises(ValueError, match="patch: model must have modules of .*got a MoETrans"):
        patch(make())
