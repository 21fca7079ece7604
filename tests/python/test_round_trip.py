# SPDX-License-Identifier: Apache-2.0
"""Properties of gating, permuting and coming back, for random sizes, masks and capacities."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import equipoise.functional as F

pytestmark = pytest.mark.usefixtures("backend")

# The backend stays the same for all examples of a test; no time limit, on a machine that may be
# busy; the same examples in each run.
examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def routings(draw):
    """(x with whole numbers, routing, num_experts)."""
    tokens, experts = draw(st.integers(1, 24)), draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    masked = draw(st.sampled_from([0.0, 0.3, 1.0]))
    skewed = torch.linspace(0, draw(st.sampled_from([0.0, 4.0])), experts)
    routing = F.topk_gating(
        torch.randn(tokens, experts) + skewed, top_k, token_mask=torch.rand(tokens) >= masked
    )
    return torch.randint(-9, 10, (tokens, draw(st.integers(1, 5)))).float(), routing, experts


@st.composite
def capacities(draw):
    """Options of moe_permute that drop."""
    policy = draw(st.sampled_from(["position", "probs", "random"]))
    return dict(
        capacity=draw(st.integers(0, 12)), drop_policy=policy, seed=draw(st.integers(0, 99))
    ) | draw(st.sampled_from([dict(), dict(align=3), dict(pad_to_capacity=True)]))


@examples
@given(routings(), st.sampled_from([1, 2, 16]))
def test_dropless_round_trip(sample, align):
    x, routing, experts = sample
    p = F.moe_permute(
        x, routing.topk_indices, experts, tokens_per_expert=routing.tokens_per_expert, align=align
    )
    slots = (routing.topk_indices >= 0).sum(-1, keepdim=True)
    assert torch.equal(F.moe_unpermute(p.permuted, p.row_id_map), slots * x)
    assert torch.equal(p.tokens_per_expert, routing.tokens_per_expert)
    assert not p.dropped_per_expert.any()


@examples
@given(routings(), capacities())
def test_every_kept_slot_has_one_row_of_its_expert(sample, options):
    x, routing, experts = sample
    weights, slots = routing.topk_weights, routing.topk_indices
    p = F.moe_permute(x, slots, experts, weights, **options)
    capacity, offsets = options["capacity"], p.expert_offsets
    assert torch.equal(p.tokens_per_expert, routing.tokens_per_expert)
    assert torch.equal(p.kept_per_expert, p.tokens_per_expert.clamp(max=capacity))

    rooms = offsets.diff()
    if options.get("pad_to_capacity"):
        assert (rooms == capacity).all()
    else:
        align = options.get("align", 1)
        assert torch.equal(rooms, (p.kept_per_expert + align - 1) // align * align)
    assert offsets[0] == 0 and offsets[-1] <= len(p.permuted)

    kept = p.row_id_map >= 0
    rows, tokens = p.row_id_map[kept], kept.nonzero()[:, 0]
    assert len(rows.unique()) == len(rows) == p.kept_per_expert.sum()
    expert = torch.bucketize(rows, offsets[1:], right=True)
    assert torch.equal(expert, slots[kept])  # so in the right room, and the slot was no -1
    assert (rows - offsets[expert] < p.kept_per_expert[expert]).all()
    for e in range(experts):  # in token order
        assert (rows[expert == e].diff() > 0).all()
    assert torch.equal(p.permuted[rows], x[tokens])
    assert torch.equal(p.permuted_weights[rows], weights[kept])
    empty = torch.ones(len(p.permuted), dtype=torch.bool)
    empty[rows] = False
    assert not p.permuted[empty].any() and not p.permuted_weights[empty].any()
    assert torch.equal(F.moe_unpermute(p.permuted, p.row_id_map), kept.sum(-1, keepdim=True) * x)

    dropped = ~kept & (slots >= 0)
    for e in range(experts):
        of_expert = slots == e
        stay, go = of_expert & kept, of_expert & dropped
        if not go.any() or not stay.any():
            continue
        if options["drop_policy"] == "position":
            assert stay.nonzero()[:, 0].max() < go.nonzero()[:, 0].min()
        elif options["drop_policy"] == "probs":
            assert weights[stay].min() >= weights[go].max()
