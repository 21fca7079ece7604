# SPDX-License-Identifier: Apache-2.0
"""watch, audit and patch on the real classes of transformers, with small random weights.

For transformers 5 and 4. Nothing is downloaded: the models are made from their configurations.
"""

import copy

import pytest
import torch
from torch import nn

from equipoise import functional as F
from equipoise.models import watch

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
    for place, parameter in model.named_parameters():
        if place.endswith(("gate.weight", "gate.e_score_correction_bias")):
            nn.init.normal_(parameter)
    with torch.no_grad():
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
