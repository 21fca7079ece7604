# SPDX-License-Identifier: Apache-2.0
"""watch, audit and patch on the real classes of transformers, with small random weights.

For transformers 5 and 4. Nothing is downloaded: the models are made from their configurations.
"""

import copy

import pytest
import torch
from torch import nn

from equipoise import functional as F
from equipoise.models import audit, measure_patch, patch, unpatch, watch

transformers = pytest.importorskip("transformers")

E, K = 8, 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "Mixtral": {"num_local_experts": E},
    "Qwen2Moe": {
        "num_experts": E,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3Moe": {
        "num_experts": E,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "Olmoe": {"num_experts": E},
    "DeepseekV3": {
        "n_routed_experts": E,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
WITH_AUX_LOSS = [name for name in CONFIGS if name != "DeepseekV3"]


def make(name, head="ForCausalLM", **options):
    """A model whose routers are decided and lean to some experts: by default p is near 1/E."""
    config = getattr(transformers, f"{name}Config")(**SIZES | CONFIGS[name] | options)
    model = getattr(transformers, f"{name}{head}")(config)
    with torch.no_grad():
        for place, tensor in (*model.named_parameters(), *model.named_buffers()):
            if place.endswith(("gate.weight", "gate.e_score_correction_bias")):
                tensor.normal_()
        model.get_input_embeddings().weight += 0.02  # what all tokens have in common
    return model


def make_batch():
    ids = torch.randint(2, 64, (3, 10))
    mask = torch.ones_like(ids)
    ids[0, 6:], mask[0, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def spy_on_experts(model):
    """[T, K] indices of each layer that reach the experts, in order, and the handles.

    Of transformers 5, where the experts are one module that gets them.
    """
    seen = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_the_experts(name):
    model, batch = make(name), make_batch()
    seen = spy_on_experts(model)
    with watch(model) as w:
        model(**batch)
    assert w.tokens_per_expert.dtype == torch.int64
    assert w.tokens_per_expert.shape == (len(w.layers), E) == (2, E)
    assert w.tokens_per_expert.sum(1).tolist() == [26 * K] * 2  # of 30 tokens
    if int(transformers.__version__.split(".")[0]) >= 5:
        real = batch["attention_mask"].flatten().bool()
        for counts, indices in zip(w.tokens_per_expert, seen, strict=True):
            assert counts.tolist() == torch.bincount(indices[real].flatten(), minlength=E).tolist()


@pytest.mark.parametrize("name", WITH_AUX_LOSS)
def test_losses_are_those_of_the_logits_and_together_hugging_faces(name):
    model, batch = make(name), make_batch()
    with watch(model) as w:
        out = model(**batch, output_router_logits=True)
    mask = batch["attention_mask"].flatten().bool()
    losses = w.losses(["switch", "z", "entropy"], normalize="hf")
    for layer, logits in enumerate(out.router_logits):
        report = F.balance_loss_from_logits(
            logits, K, {"switch": 1.0, "z": 1.0, "entropy": 1.0}, mask, normalize="hf"
        )
        for loss, value in report.unscaled.items():
            torch.testing.assert_close(losses[loss][layer].float(), value, rtol=1e-4, atol=1e-6)
    assert losses["switch"][0] > K * 1.05  # decided routers, or the comparison says little
    torch.testing.assert_close(w.concatenated_loss().float(), out.aux_loss, rtol=1e-4, atol=0)


def test_deepseek_v3_is_of_sigmoid_scores_and_its_bias_steers():
    model, batch = make("DeepseekV3"), make_batch()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.zero_()[5] = 10.0
    inputs = []
    gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with watch(model) as w:
        model(**batch)
    mask = batch["attention_mask"].flatten().bool()
    assert w.tokens_per_expert[0, 5] == mask.sum()
    scores = torch.sigmoid(inputs[0].flatten(0, -2).float() @ gate.weight.float().T)[mask]
    p = (scores / scores.sum(1, keepdim=True)).mean(0)
    f = w.tokens_per_expert[0] / w.tokens_per_expert[0].sum()
    value = w.losses(["switch"])["switch"][0]
    torch.testing.assert_close(value.float(), E * (f * p).sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_watching_changes_nothing(name):
    model, batch = make(name), make_batch()
    hooks = {
        place: (len(m._forward_hooks), len(m._forward_pre_hooks))
        for place, m in model.named_modules()
    }
    before = model(**batch, labels=batch["input_ids"])
    before.loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with watch(model) as w:
        after = model(**batch, labels=batch["input_ids"])
        after.loss.backward()
    assert torch.equal(before.logits, after.logits)
    for old, parameter in zip(gradients, model.parameters(), strict=True):
        assert (old is None) == (parameter.grad is None)
        assert old is None or torch.equal(old, parameter.grad)
    assert hooks == {
        place: (len(m._forward_hooks), len(m._forward_pre_hooks))
        for place, m in model.named_modules()
    }
    counts = w.tokens_per_expert
    model(**batch)  # nobody looks
    assert torch.equal(w.tokens_per_expert, counts)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(name, reentrant):
    model, batch = make(name).train(), make_batch()
    with watch(model) as plain:
        model(**batch)
    passes = []
    # Before, not after: recomputing ends as soon as all that was saved is there.
    router = dict(model.named_modules())[plain.layers[0]]
    router.register_forward_pre_hook(lambda *_: passes.append(None))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with watch(model) as w:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert len(passes) == 2  # or nothing was computed again, and this test says nothing
    assert torch.equal(w.tokens_per_expert, plain.tokens_per_expert)


def test_generation_with_a_cache_takes_the_end_of_the_mask():
    model = make("Qwen3Moe").eval()
    ids = torch.randint(2, 64, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with watch(model) as w:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    # 7 real tokens of the prompt, then one each for the new ones but the last
    assert w.tokens_per_expert.sum(1).tolist() == [(7 + 2 * 3) * K] * 2


def test_token_mask_and_masks_that_do_not_fit():
    model, batch = make("Mixtral"), make_batch()
    mask = batch.pop("attention_mask").bool()
    with watch(model, token_mask=mask) as w:
        model(**batch)
        assert w.tokens_per_expert.sum(1).tolist() == [26 * K] * 2
        w.token_mask = mask.flatten()
        w.reset()
        model(**batch)
        assert w.tokens_per_expert.sum(1).tolist() == [26 * K] * 2
        w.token_mask = mask[:, 1:]
        with pytest.raises(ValueError, match=r"watch: token_mask must .* 30 tokens.*\[3, 9\]"):
            model(**batch)
    with watch(model) as w, pytest.raises(ValueError, match=r"attention_mask must .*\[B, S\]"):
        model(**batch, attention_mask=torch.zeros(3, 1, 10, 10))


def test_probabilities_given_out_as_logits_are_read_as_such():
    model, batch = make("Mixtral"), make_batch()
    with watch(model) as true:
        model(**batch)
    give_out_probabilities(model)
    with watch(model) as w:
        out = model(**batch, output_router_logits=True)
    assert torch.equal(w.tokens_per_expert, true.tokens_per_expert)
    torch.testing.assert_close(w.losses(["switch"]), true.losses(["switch"]), rtol=1e-4, atol=0)
    with pytest.warns(UserWarning, match="look like probabilities"):  # the second softmax
        twice = F.balance_loss_from_logits(out.router_logits[0], K, {"switch": 1.0}).total
    assert (twice - 1) * 2 < w.losses(["switch"])["switch"][0] - 1


def give_out_probabilities(model):
    """As the first transformers 5 did, and any version with a hook like this."""

    def hook(module, args, output):
        if isinstance(module, nn.Linear):  # transformers 4
            return output
        parts = list(output)
        place = 0 if len(parts) == 3 else 1
        parts[place] = parts[place].float().softmax(-1)
        return tuple(parts)

    for _, module in list(model.named_modules()):
        if type(module).__name__ in ("MixtralTopKRouter", "MixtralSparseMoeBlock"):
            if type(module).__name__ == "MixtralSparseMoeBlock" and not isinstance(
                module.gate, nn.Linear
            ):
                continue
            forward = module.forward

            def wrapped(hidden, forward=forward, module=module):
                return hook(module, (hidden,), forward(hidden))

            module.forward = wrapped


def test_a_part_of_the_model_and_a_copy():
    model, batch = make("Mixtral"), make_batch()
    with watch(copy.deepcopy(model).model) as w:
        w._model(**batch)
    mask = batch["attention_mask"]  # a layer gets it in another form
    with watch(model.model.layers[1], token_mask=mask > 0) as part, watch(model) as whole:
        model(**batch)
    assert torch.equal(w.tokens_per_expert, whole.tokens_per_expert)
    assert torch.equal(part.tokens_per_expert[0], whole.tokens_per_expert[1])


def test_a_dense_model_is_refused():
    config = transformers.MistralConfig(**SIZES)
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(ValueError, match="watch: .*MistralForCausalLM without one.*TopKRouter"):
        watch(model)


def healthy(name, **options):
    """Nothing silently off: the losses are added per layer, outside of the model."""
    options = options if name == "DeepseekV3" else {"router_aux_loss_coef": 0.0} | options
    return make(name, **options)


def with_aux_loss(name, **options):
    return make(name, output_router_logits=True, router_aux_loss_coef=0.02, **options)


def rules(result):
    return [finding.rule for finding in result.findings]


def finding(result, rule):
    (found,) = [f for f in result.findings if f.rule == rule]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_audit_finds_nothing_in_a_healthy_model(name):
    model, batch = healthy(name), make_batch()
    assert audit(model).findings == audit(model, batch).findings == []
    assert "none" in str(audit(model))


@pytest.mark.parametrize("name", WITH_AUX_LOSS)
def test_audit_aux_loss_off(name):
    model = make(name, router_aux_loss_coef=0.02)
    result = audit(model)
    assert rules(result) == ["aux-loss-off"]
    assert finding(result, "aux-loss-off").severity == "critical"
    assert "0.02" in finding(result, "aux-loss-off").message
    (term,) = result.terms
    assert (term.name, term.coefficient, term.in_force) == ("switch", 0.02, False)
    assert "off       switch 0.02" in str(result)
    # It is off indeed, and on where the audit says so.
    batch = make_batch() | {"labels": make_batch()["input_ids"]}
    assert model(**batch).aux_loss is None
    told = audit(model, batch | {"output_router_logits": True})
    assert "aux-loss-off" not in rules(told) and told.terms[0].in_force
    model.config.output_router_logits = True
    result = audit(model)
    assert "aux-loss-off" not in rules(result) and result.terms[0].in_force
    loss_without = model(**batch, output_router_logits=False).loss
    out = model(**batch)
    torch.testing.assert_close(out.loss, loss_without + 0.02 * out.aux_loss)


def test_audit_coefficients_that_do_nothing():
    result = audit(make("Mixtral", "Model", router_aux_loss_coef=0.02))
    assert rules(result) == ["coefficient-ignored"] and not result.terms[0].in_force
    result = audit(make("DeepseekV3", aux_loss_alpha=0.001))
    assert rules(result) == ["coefficient-ignored"]
    assert "config.aux_loss_alpha is 0.001" in result.findings[0].message

    model = with_aux_loss("Mixtral")
    assert "coefficient-stale" not in rules(audit(model))
    model.config.router_aux_loss_coef = 0.5
    found = finding(audit(model), "coefficient-stale")
    assert found.evidence["coefficient"] == 0.02 and found.evidence["configured"] == 0.5
    batch = make_batch() | {"labels": make_batch()["input_ids"]}
    out = model(**batch)
    alone = model(**batch, output_router_logits=False).loss
    torch.testing.assert_close(out.loss - alone, 0.02 * out.aux_loss, rtol=1e-3, atol=1e-5)


def lean_apart(model):
    """Each layer sends all tokens to two experts of its own, which hides in the sum of layers."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.ones(64, 32))
        for layer, block in enumerate(model.model.layers):
            gate = block.mlp.gate if hasattr(block, "mlp") else block.block_sparse_moe.gate
            gate.weight.zero_()[2 * layer : 2 * layer + 2] = 1.0


def test_audit_concatenated_layers_and_normalisation():
    model = with_aux_loss("Mixtral", num_hidden_layers=4)
    assert finding(audit(model), "concatenated-layers").evidence == {"layers": 4}
    lean_apart(model)
    batch = make_batch()
    found = finding(audit(model, batch), "concatenated-layers")
    assert found.severity == "warning"
    # Two of eight experts: 4 K in each layer, and as good as balanced together.
    assert found.evidence["mean_of_layers"] > 3.9 * K > 1.1 * K > found.evidence["concatenated"]
    aux_loss = model(**batch).aux_loss.item()
    assert found.evidence["concatenated"] == pytest.approx(aux_loss, rel=1e-4)
    assert f"{aux_loss:.3f} together" in found.message
    assert finding(audit(model), "hf-normalisation").evidence == {"at_balance": K}

    one_layer = with_aux_loss("Mixtral", num_hidden_layers=1, num_experts_per_tok=1)
    assert rules(audit(one_layer, batch)) == []


def test_audit_double_softmax():
    model = healthy("Mixtral")
    give_out_probabilities(model)
    found = finding(audit(model), "probabilities-as-logits")
    assert found.severity == "critical" and len(found.evidence["layers"]) == 2
    assert rules(audit(model)) == ["probabilities-as-logits"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_audit_router_in_a_half_type(dtype):
    found = finding(audit(healthy("Qwen3Moe").to(dtype)), "router-half-precision")
    assert found.evidence["dtype"] == str(dtype)
    assert dtype == torch.float16 or found.evidence["flipped"] > 0
    assert len(found.evidence["layers"]) == 2
    assert rules(audit(healthy("Qwen3Moe").double())) == []
    model = healthy("DeepseekV3").to(dtype)  # the router runs in float32 all the same
    result = audit(model)
    assert rules(result) == ["bias-not-float32"] and result.findings[0].severity == "critical"


def test_audit_router_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert rules(audit(healthy("Mixtral"))) == ["router-half-precision"]


def test_audit_expert_bias():
    model = healthy("DeepseekV3")
    (term,) = audit(model).terms
    assert (term.name, term.in_force) == ("expert_bias", True)
    gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    for gate in gates:
        gate.e_score_correction_bias.zero_()
    result = audit(model)
    assert rules(result) == ["expert-bias-not-updated"] and not result.terms[0].in_force
    for gate in gates:
        gate.e_score_correction_bias = torch.randn(E).bfloat16()
    found = finding(audit(model), "bias-not-float32")
    assert found.severity == "critical" and found.evidence["step_at_one"] == 2**-7
    assert torch.tensor(1.0).bfloat16() + 0.001 == 1.0  # what it warns of


def test_audit_dense_routing():
    dense = with_aux_loss("Mixtral", num_experts_per_tok=E)
    result = audit(dense, {"input_ids": make_batch()["input_ids"]})
    assert rules(result) == ["dense-routing", "hf-normalisation"]
    assert finding(result, "dense-routing").evidence["losses"] == ["switch"]
    assert "dense-routing" not in rules(audit(with_aux_loss("Mixtral")))
    assert rules(audit(healthy("Mixtral", num_experts_per_tok=E))) == []


def test_audit_padding():
    model, batch = healthy("Mixtral"), make_batch()
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = finding(audit(model, {"input_ids": batch["input_ids"]}), "padding-counted")
    assert found.evidence["share"] == pytest.approx(4 / 30)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    with watch(model.eval()) as masked, watch(model, batch["attention_mask"] > 0) as real:
        model(input_ids=batch["input_ids"])
    for w, key in ((masked, "switch"), (real, "switch_without_padding")):
        value = w.losses(["switch"])["switch"].mean().item()
        assert found.evidence[key] == pytest.approx(value, rel=1e-6)
    assert found.evidence["switch"] != found.evidence["switch_without_padding"]
    # The padding token is a token like any other in the middle of a sequence, and once at its end.
    ids = torch.randint(2, 64, (3, 10))
    ids[:, 4] = ids[:, 9] = 0
    assert rules(audit(model, {"input_ids": ids})) == []


VERSION_4 = transformers.__version__.startswith("4.")


def step(model, batch):
    """Output and gradients of a training step."""
    model.zero_grad()
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}], ids=["", "plain"])
@pytest.mark.parametrize("name", CONFIGS)
def test_patched_equals_original(name, options, training):
    if name in WITH_AUX_LOSS:
        options = options | {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    if name == "Mixtral":
        options = options | {"router_jitter_noise": 0.1}
    model, batch = make(name, **options).train(training), make_batch()
    torch.manual_seed(1)
    out, gradients = step(model, batch)
    assert patch(model) is model
    torch.manual_seed(1)
    patched_out, patched_gradients = step(model, batch)
    torch.testing.assert_close(patched_out.logits, out.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patched_out.loss, out.loss, rtol=1e-5, atol=0)
    assert sum(g is not None for g in gradients.values()) > 10
    for place, gradient in gradients.items():
        patched = patched_gradients[place]
        assert (gradient is None) == (patched is None), place
        if gradient is not None:
            torch.testing.assert_close(patched, gradient, rtol=1e-4, atol=1e-5, msg=place)
    if name in WITH_AUX_LOSS:
        for logits, patched in zip(out.router_logits, patched_out.router_logits, strict=True):
            torch.testing.assert_close(patched, logits, rtol=1e-5, atol=1e-5)


def patched_names(model):
    return sorted({type(m).__name__ for m in model.modules() if "_equipoise_patch" in vars(m)})


@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_the_routing_is_patched(name, monkeypatch):
    """And by the ops: counted, so that a patch that does nothing fails."""
    model, batch = make(name), make_batch()
    calls = []
    for op in ("topk_gating", "moe_permute", "moe_unpermute"):
        function = getattr(F, op)
        monkeypatch.setattr(
            F, op, lambda *a, op=op, function=function, **k: calls.append(op) or function(*a, **k)
        )
    model(**batch)
    assert not calls
    patch(model)(**batch)
    assert calls == ["topk_gating", "moe_permute", "moe_unpermute"] * 2
    assert len(patched_names(model)) == (1 if VERSION_4 and name != "DeepseekV3" else 2)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_unpatch_and_copies(name):
    model, batch = make(name).eval(), make_batch()
    out = model(**batch).logits
    state = model.state_dict()
    vars_before = [set(vars(m)) for m in model.modules()]
    patch(patch(model))
    assert model.state_dict().keys() == state.keys()
    twin = copy.deepcopy(model)
    with torch.no_grad():  # a twin with routers of its own
        for place, parameter in twin.named_parameters():
            if place.endswith("gate.weight"):
                parameter.neg_()
    assert not torch.allclose(twin(**batch).logits, out, atol=1e-3)
    torch.testing.assert_close(model(**batch).logits, out, rtol=1e-5, atol=1e-5)
    assert unpatch(model) is model
    assert [set(vars(m)) for m in model.modules()] == vars_before
    assert torch.equal(model(**batch).logits, out)
    assert patched_names(twin)
    assert not patched_names(unpatch(twin))
    with pytest.raises(ValueError, match=f"unpatch: model must have been patched, got a {name}"):
        unpatch(model)


def test_patch_is_put_over_what_the_instance_had():
    """transformers 4 leaves its own `forward` at the instance when it has given out logits."""
    model, batch = make("Mixtral").eval(), make_batch()
    out = model(**batch, output_router_logits=True)
    patch(model)
    patched_out = model(**batch, output_router_logits=True)
    torch.testing.assert_close(patched_out.aux_loss, out.aux_loss)
    unpatch(model)
    again = model(**batch, output_router_logits=True)
    assert torch.equal(again.logits, out.logits)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_a_patched_model_is_watched_and_audited_as_before(name):
    model, batch = healthy(name), make_batch()
    with watch(model) as before:
        model(**batch)
    patch(model)
    with watch(model) as after:
        model(**batch)
    assert torch.equal(after.tokens_per_expert, before.tokens_per_expert)
    torch.testing.assert_close(after.losses(), before.losses(), rtol=1e-5, atol=1e-6)
    assert audit(model, batch).findings == []


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_patch_in_bfloat16(name):
    model, batch = make(name).eval().bfloat16(), make_batch()
    with torch.no_grad():
        out = model(**batch).logits
        patched_out = patch(model)(**batch).logits
    assert patched_out.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(patched_out, out, rtol=0.1, atol=0.02)


def test_patch_of_deepseek_v3_with_groups_and_bias():
    model, batch = make("DeepseekV3", topk_group=1, num_experts_per_tok=2).eval(), make_batch()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.uniform_(0, 3)
        with watch(model) as before:
            out = model(**batch).logits
        with watch(patch(model)) as after:
            patched_out = model(**batch).logits
    torch.testing.assert_close(patched_out, out, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.tokens_per_expert, before.tokens_per_expert)


def test_patch_refuses():
    with pytest.raises(ValueError, match="patch: model must have modules of Mixtral, .*Mistral"):
        patch(transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)))
    model = make("Mixtral")
    for module in model.modules():
        module._hf_hook = object()
    with pytest.raises(ValueError, match="patch: '.*' must not have hooks of accelerate"):
        patch(model)
    assert not patched_names(model)


def test_measure_patch():
    model, batch = make("Mixtral").eval(), make_batch()
    timing = measure_patch(model, batch, repeats=2)
    assert not patched_names(model)
    assert timing.speedup == timing.original_ms / timing.patched_ms > 0
    assert "times as fast (medians of 2 forward passes)" in str(timing)
    assert all(p.grad is None for p in model.parameters())

    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    batch["labels"] = batch["input_ids"]
    timing = measure_patch(patch(model), batch, repeats=1, backward=True)
    assert patched_names(model)
    assert bool((model.lm_head.weight.grad == 1).all())
    assert "forward and backward" in str(timing)

    del batch["labels"]
    with pytest.raises(ValueError, match="measure_patch: backward needs labels"):
        measure_patch(unpatch(model), batch, backward=True)
    assert not patched_names(model)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_patch(model, batch, repeats=0)
