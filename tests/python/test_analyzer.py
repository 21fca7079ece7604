# SPDX-License-Identifier: Apache-2.0
"""RoutingAnalyzer: its figures against the functions they come from, its log, and bad input."""

import copy
import json
import math
import sys

import pytest
import torch
from test_distributed import run_ranks

import equipoise.functional as F
from equipoise import RoutingAnalyzer, metrics
from equipoise.analyzer import _metric_class, torchmetrics_metric

GOLDEN = torch.tensor([1, 2, 261, 266, 6, 253, 229, 6])
EXPERTS, LAYERS, TOP_K = 6, 3, 2
LOSSES = {
    "switch_loss": F.switch_loss,
    "z_loss": F.z_loss,
    "uniform_kl_loss": F.uniform_kl_loss,
    "entropy_loss": F.entropy_loss,
    "variance_loss": F.variance_loss,
    "mutual_information_loss": F.mutual_information_loss,
    "token_entropy": F.token_entropy_loss,
}


def route(tokens=40, top_k=TOP_K, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, dtype=torch.float64, generator=generator)
    return F.topk_gating(logits, top_k, **options)


def routings(seed=0, **options):
    return [route(seed=10 * seed + layer, **options) for layer in range(LAYERS)]


def two_steps(**options):
    """An analyzer with everything that it can hold, and what it was given."""
    analyzer = RoutingAnalyzer(EXPERTS, LAYERS, **options)
    given = [routings(seed) for seed in range(2)]
    for step in given:
        permuted = [
            F.moe_permute(torch.zeros(40, 2), r.topk_indices, EXPERTS, capacity=10) for r in step
        ]
        analyzer.analyze_routing_step(step, permuted)
    return analyzer, given


def assert_same(a, b):
    """Two analyzers with the same steps and sums, to the bit."""
    assert a.steps == b.steps and a.num_updates == b.num_updates
    for x, y in ((a.metric_history(), b.metric_history()), (a.compute(), b.compute())):
        assert x.keys() == y.keys()
        for name, value in x.items():
            assert torch.equal(value.nan_to_num(-1), y[name].nan_to_num(-1)), name


def test_every_figure_is_that_of_its_function():
    analyzer, given = two_steps()
    history = analyzer.metric_history()
    for step, layers in enumerate(given):
        for layer, r in enumerate(layers):
            want = metrics.load_metrics(r.tokens_per_expert)
            want |= {name: loss(r) for name, loss in LOSSES.items()}
            want["expert_specialization_strength"] = 1 - want["token_entropy"] / math.log(EXPERTS)
            want["num_nan_rows"] = r.num_nan_rows
            want["router_confidence"] = r.topk_weights[:, 0].mean()
            dropped = (r.tokens_per_expert - 10).clamp_min(0).sum()
            want["drop_rate"] = dropped / r.tokens_per_expert.sum()
            assert history.keys() == want.keys()
            for name, value in want.items():
                got = history[name][step, layer]
                torch.testing.assert_close(got, value.detach().double(), rtol=1e-6, atol=1e-12)
    assert (history["drop_rate"] > 0).any()


def test_compute_is_of_all_tokens_together():
    analyzer, given = two_steps()
    got = analyzer.compute()
    for layer in range(LAYERS):
        both = F.concatenate_routings([step[layer] for step in given])
        cv = metrics.load_metrics(both.tokens_per_expert)["cv"]
        torch.testing.assert_close(got["cv"][layer], cv)
        for name, loss in LOSSES.items():
            torch.testing.assert_close(got[name][layer], loss(both), rtol=1e-6, atol=1e-9)
        confidence = both.topk_weights[:, 0].mean()
        torch.testing.assert_close(got["router_confidence"][layer], confidence)


def test_golden_case_aggregated():
    analyzer = RoutingAnalyzer(8)
    for scale in (1, 0, 2):
        analyzer.analyze_routing_step(torch.where(GOLDEN > 0, scale * (GOLDEN - 128) + 512, 0))
    of_steps = analyzer.metric_history()["cv"][:, 0]
    assert of_steps[1] == 0 and of_steps[2] == 2 * of_steps[0] > 0.4
    got = analyzer.get_aggregated_metrics()["cv"]
    assert got == {
        "mean": pytest.approx(of_steps.mean().item()),
        "std": pytest.approx(of_steps.std(correction=0).item()),
        "min": 0,
        "max": of_steps[2].item(),
        "last": of_steps[2].item(),
    }
    analyzer.reset()
    analyzer.update(GOLDEN)
    summary = analyzer.get_paper_metrics_summary()
    assert round(summary["cv"], 3) == 0.974 and round(summary["perplexity"], 3) == 4.298
    assert round(summary["max_vio_global"], 3) == round(summary["max_vio_batch"], 3) == 1.078
    assert summary["num_slots"] == 1024 and "switch_loss" not in summary


def test_paper_summary_tells_batch_from_global():
    analyzer = RoutingAnalyzer(2)
    analyzer.update(torch.tensor([10, 0]))
    analyzer.update(torch.tensor([0, 10]))
    summary = analyzer.get_paper_metrics_summary()
    assert summary["max_vio_batch"] == 1 and summary["max_vio_global"] == 0


def test_layers_and_percentiles():
    analyzer = RoutingAnalyzer(2, num_layers=4)
    counts = torch.tensor([[8, 0], [6, 2], [5, 3], [4, 4]])
    analyzer.update(counts)
    flat = analyzer.to_dict()
    assert all(type(value) is float for value in flat.values())
    max_vio = [flat[f"moe/max_vio_layer_{layer}"] for layer in range(4)]
    assert max_vio == [1, 0.5, 0.25, 0]
    assert flat["moe/max_vio"] == 0.4375 and flat["moe/max_vio_p50"] == 0.375
    assert flat["moe/max_vio_p95"] == pytest.approx(0.925)  # between the first two, 0.85 of the way
    aggregated = analyzer.get_aggregated_metrics()
    assert {f"moe/{name}" for name in aggregated} == set(flat)
    assert aggregated["max_vio_p95"]["max"] == flat["moe/max_vio_p95"]
    few = analyzer.to_dict(prefix="", per_layer=False)
    assert len(few) == 3 * 13 and few["max_vio"] == 0.4375
    assert set(analyzer.get_aggregated_metrics(per_layer=False)) == set(few)


def test_to_dict_of_the_last_steps():
    analyzer = RoutingAnalyzer(2)
    for counts in ([9, 1], [8, 0], [0, 8]):
        analyzer.update(torch.tensor(counts))
    assert analyzer.to_dict(last=1)["moe/max_vio"] == 1
    assert analyzer.to_dict(last=2)["moe/max_vio"] == 0
    assert analyzer.to_dict()["moe/max_vio"] == pytest.approx(17 / 13 - 1)


def test_no_tokens_are_left_out_of_the_means():
    analyzer = RoutingAnalyzer(2)
    analyzer.update(torch.tensor([3, 1]))
    analyzer.update(torch.tensor([0, 0]))
    cv = analyzer.get_aggregated_metrics()["cv"]
    assert math.isnan(cv.pop("last"))
    assert cv == {"mean": 0.5, "std": 0, "min": 0.5, "max": 0.5}


def test_steps_without_statistics_are_left_out_too():
    analyzer = RoutingAnalyzer(EXPERTS)
    r = route()
    analyzer.update(r)
    analyzer.update(route(seed=1, stats=False))
    analyzer.update(torch.arange(EXPERTS))
    history = analyzer.metric_history()
    assert history["switch_loss"][1:].isnan().all() and history["router_confidence"][2].isnan()
    assert not history["router_confidence"][:2].isnan().any()
    got = analyzer.get_aggregated_metrics()["switch_loss_layer_0"]["mean"]
    assert got == pytest.approx(F.switch_loss(r).item(), rel=1e-6)
    assert "drop_rate" not in history


def test_segments_are_added_up():
    ids = torch.arange(40) // 10
    apart, together = RoutingAnalyzer(EXPERTS), RoutingAnalyzer(EXPERTS)
    apart.update(route(segment_ids=ids, num_segments=4))
    together.update(route())
    assert torch.equal(apart.tokens_per_expert, together.tokens_per_expert)
    for name, value in together.compute().items():
        torch.testing.assert_close(apart.compute()[name], value)


def test_forms_of_counts():
    counts = torch.randint(0, 9, (LAYERS, EXPERTS), dtype=torch.int32)
    a, b = RoutingAnalyzer(EXPERTS, LAYERS), RoutingAnalyzer(EXPERTS, LAYERS)
    a.update(counts)
    b.update(list(counts.long()))
    assert_same(a, b)
    assert a.tokens_per_expert.dtype == torch.int64 and torch.equal(a.tokens_per_expert[0], counts)
    counts.zero_()  # what was given may change
    assert_same(a, b)


def test_large_counts_are_exact():
    analyzer = RoutingAnalyzer(2)
    for _ in range(3):
        analyzer.update(torch.tensor([2**50 + 1, 3]))
    assert analyzer.tokens_per_expert[0].tolist() == [[2**50 + 1, 3]]
    assert analyzer.get_paper_metrics_summary()["num_slots"] == 3 * (2**50 + 4)


def test_bounded_memory():
    analyzer = RoutingAnalyzer(2, history=4)
    for n in range(10):
        analyzer.update(torch.tensor([n, 1]))
    assert analyzer.steps == [6, 7, 8, 9] and analyzer.num_updates == 10
    assert analyzer.tokens_per_expert[:, 0, 0].tolist() == [6, 7, 8, 9]
    all_tokens = analyzer.to_dict()["moe/top1_share"]  # the sums are of all steps
    assert all_tokens == 45 / 55


def test_asking_before_a_step_raises(tmp_path):
    analyzer = RoutingAnalyzer(4)
    for ask in (
        analyzer.compute,
        analyzer.to_dict,
        analyzer.metric_history,
        analyzer.get_aggregated_metrics,
        analyzer.get_paper_metrics_summary,
        lambda: analyzer.to_dict(last=1),
        lambda: analyzer.tokens_per_expert,
        lambda: analyzer.save(tmp_path / "log.jsonl"),
    ):
        with pytest.raises(RuntimeError, match="there is no step yet"):
            ask()
    assert not (tmp_path / "log.jsonl").exists()
    analyzer.update(torch.tensor([1, 2, 3, 4]))
    analyzer.compute()
    analyzer.reset()
    with pytest.raises(RuntimeError, match="there is no step yet"):
        analyzer.compute()


def test_merge_adds_equal_steps_and_sorts_the_others():
    a, b = RoutingAnalyzer(2, history=3), RoutingAnalyzer(2)
    a.update(torch.tensor([1, 0]), step=4)
    a.update(torch.tensor([2, 0]), step=5)
    b.update(torch.tensor([0, 10]), step=3)
    b.update(torch.tensor([0, 20]), step=5)
    b.update(torch.tensor([0, 30]), step=6)
    a.merge_state(b)
    assert a.steps == [4, 5, 6] and a.num_updates == 5
    assert a.tokens_per_expert[:, 0].tolist() == [[1, 0], [2, 20], [0, 30]]
    assert a.compute()["top1_share"].item() == 60 / 63
    with pytest.raises(ValueError, match=r"must have \(num_layers, num_experts\) = \(1, 2\)"):
        a.merge_state(RoutingAnalyzer(3))


def test_no_gradient_and_no_graph_is_kept():
    logits = torch.randn(8, EXPERTS, requires_grad=True)
    analyzer = RoutingAnalyzer(EXPERTS)
    analyzer.update(F.topk_gating(logits, 2))
    assert not any(value.requires_grad for value in analyzer.compute().values())


def test_update_neither_computes_nor_waits(monkeypatch):
    """What would wait for a GPU would have to read a value; on meta tensors that raises."""
    monkeypatch.setattr(
        sys.modules[RoutingAnalyzer.__module__], "_figures", lambda row: pytest.fail("computed")
    )
    step = routings()
    for r in step:  # RoutingResult is a tuple of tensors
        assert all(isinstance(tensor, torch.Tensor) for tensor in r)
    analyzer = RoutingAnalyzer(EXPERTS, LAYERS)
    analyzer.update([F.RoutingResult(*(tensor.to("meta") for tensor in r)) for r in step])
    analyzer.update([F.RoutingResult(*(tensor.to("meta") for tensor in r)) for r in step])
    assert analyzer.num_updates == 2


def rank_figures(rank, world):
    """On 2 ranks: what `compute` gives before a step, with one on rank 1, with one on both."""
    analyzer = RoutingAnalyzer(EXPERTS, LAYERS)
    calls = []
    all_reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kw: (calls.append(1), all_reduce(*args, **kw))
    group = torch.distributed.group.WORLD
    try:
        analyzer.compute(group)
        raised = ""
    except RuntimeError as error:
        raised = str(error)
    if rank == 1:  # rank 0 has no step, and must not let the other wait
        analyzer.update(routings(1))
    of_one = {name: value.tolist() for name, value in analyzer.compute(group).items()}
    if rank == 0:
        analyzer.update(routings(0))
    return raised, of_one, analyzer.to_dict(group=group), len(calls)


def test_ranks_are_joined_by_one_all_reduce():
    whole = RoutingAnalyzer(EXPERTS, LAYERS)
    whole.update(routings(1))
    want_of_one = {name: value.tolist() for name, value in whole.compute().items()}
    whole.update(routings(0))
    for raised, of_one, of_both, calls in run_ranks(rank_figures, 2).values():
        assert "there is no step yet" in raised and calls == 3
        assert of_one == want_of_one
        assert of_both == pytest.approx(whole.to_dict(), rel=1e-12, abs=1e-14)


def test_log_round_trip(tmp_path):
    analyzer, _ = two_steps()
    analyzer.update(torch.ones(LAYERS, EXPERTS, dtype=torch.int64), step=7)
    path = tmp_path / "log.jsonl"
    analyzer.save(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"equipoise_routing_log": 1, "num_layers": LAYERS, "num_experts": EXPERTS}
    assert [line["step"] for line in lines[1:]] == [0, 1, 7]
    assert lines[1]["tokens_per_expert"] == analyzer.tokens_per_expert[0].tolist()
    assert set(lines[3]) == {"step", "tokens_per_expert"}  # what was not given is not there
    assert_same(RoutingAnalyzer.load(path), analyzer)
    assert RoutingAnalyzer.load(path, history=1).steps == [7]


def test_append_as_you_go(tmp_path):
    path = tmp_path / "log.jsonl"
    analyzer, whole = RoutingAnalyzer(EXPERTS, LAYERS), RoutingAnalyzer(EXPERTS, LAYERS)
    analyzer.append(path)
    assert len(path.read_text().splitlines()) == 1  # the header, for who waits for it
    for seed in range(5):
        analyzer.update(routings(seed))
        whole.update(routings(seed))
        if seed != 2:
            analyzer.append(path)
    analyzer.append(path)  # nothing new
    assert_same(RoutingAnalyzer.load(path), whole)
    resumed = RoutingAnalyzer.load(path)
    resumed.update(routings(5))
    whole.update(routings(5))
    resumed.append(path)
    assert_same(RoutingAnalyzer.load(path), whole)


def test_append_names_a_log_of_other_sizes_and_touches_no_other_file(tmp_path):
    path = tmp_path / "log.jsonl"
    RoutingAnalyzer(4).append(path)
    with pytest.raises(ValueError, match=r"must be a log of .* = \(1, 5\), got \(1, 4\)"):
        RoutingAnalyzer(5).append(path)
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear reader,\nno line end here")
    with pytest.raises(ValueError, match="is no routing log"):
        RoutingAnalyzer(4).append(letter)
    assert letter.read_text() == "Dear reader,\nno line end here"


def test_append_drops_from_the_log_what_is_dropped_from_memory(tmp_path):
    analyzer = RoutingAnalyzer(2, history=2)
    for _ in range(5):
        analyzer.update(torch.tensor([1, 1]))
    analyzer.append(tmp_path / "log.jsonl")
    assert RoutingAnalyzer.load(tmp_path / "log.jsonl").steps == [3, 4]


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_log_cut_in_a_line(tmp_path, cut, recwarn):
    analyzer, _ = two_steps()
    path = tmp_path / "log.jsonl"
    analyzer.save(path)
    text = path.read_text()
    path.write_text(text[:-cut])
    loaded = RoutingAnalyzer.load(path)
    if cut == 1:  # only the line end is gone
        assert loaded.steps == [0, 1] and not recwarn
    else:
        assert loaded.steps == [0]
        (warning,) = recwarn
        assert "cut off in the middle of line 3; the 1 steps before" in str(warning.message)
    # A run that goes on cuts the half line off.
    more = RoutingAnalyzer(EXPERTS, LAYERS)
    more.update(routings(3), step=9)
    more.append(path)
    assert RoutingAnalyzer.load(path).steps == [0, 9]
    assert path.read_text().startswith(text[: text.index("\n", text.index("\n") + 1)])


HEADER = '{"equipoise_routing_log": 1, "num_layers": 1, "num_experts": 2}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no routing log"),
        ("tokens\n", "is no routing log: its first line must be"),
        ("[1]\n", "is no routing log"),
        (HEADER.replace(": 1,", ": 2,", 1), "is a routing log of version 2; .* reads version 1"),
        (HEADER.replace('experts": 2', 'experts": 0'), r"at least 1, got \(1, 0\)"),
        (HEADER + "{\n{}\n", "line 2 must be JSON"),
        (HEADER + "[]\n", "line 2: a step must be an object"),
        (HEADER + '{"step": 0}\n', "line 2: tokens_per_expert is missing"),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, 2]]}\n'
            '{"step": 1, "tokens_per_expert": [[-1, 2]]}\n',
            "line 3: tokens_per_expert must not be negative, got -1",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1.0, 2]]}\n',
            "line 2: tokens_per_expert must hold whole numbers, got 1.0",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, true]]}\n',
            "line 2: tokens_per_expert must hold whole numbers, got True",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, 2, 3]]}\n',
            r"line 2: tokens_per_expert must be 1 lists \(layers\) of 2 numbers each",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, 2], [1, 2]]}\n',
            r"line 2: tokens_per_expert must be 1 lists \(layers\) of 2 numbers each",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, 2]], "dropped_of": 3}\n',
            "line 2: dropped_of must be 1 ",
        ),
        (
            HEADER + '{"step": 0, "tokens_per_expert": [[1, 2]], "first_choice": [["a", 2]]}\n',
            "line 2: first_choice must hold numbers, got 'a'",
        ),
    ],
)
def test_bad_logs(tmp_path, text, message):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RoutingAnalyzer.load(path)


def test_a_log_without_a_step_is_an_analyzer_without_one(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(HEADER)
    with pytest.raises(RuntimeError, match="there is no step yet"):
        RoutingAnalyzer.load(path).compute()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RoutingAnalyzer(0), "num_experts must be at least 1, got 0"),
        (lambda: RoutingAnalyzer(4, 0), "num_layers must be at least 1, got 0"),
        (lambda: RoutingAnalyzer(4, history=0), "history must be at least 1, got 0"),
        (
            lambda: RoutingAnalyzer(4).update(torch.ones(4)),
            "must hold integers .*, got torch.float32",
        ),
        (
            lambda: RoutingAnalyzer(4).update(torch.ones(4).bool()),
            "must hold integers .*, got torch.bool",
        ),
        (lambda: RoutingAnalyzer(2).update(torch.tensor([3, -1])), "must not be negative, got -1"),
        (lambda: RoutingAnalyzer(4).update(torch.ones(5).int()), r"\[E\] = \[4\] .* got \[5\]"),
        (lambda: RoutingAnalyzer(4, 2).update(torch.ones(3, 4).int()), "each of 2 layers, got 3"),
        (lambda: RoutingAnalyzer(4, 2).update([torch.ones(4).int()]), "each of 2 layers, got 1"),
        (lambda: RoutingAnalyzer(EXPERTS, 2).update(route()), "each of 2 layers, got 1"),
        (lambda: RoutingAnalyzer(4).update(route()), r"\[E\] = \[4\] .* got \[6\]"),
        (lambda: RoutingAnalyzer(4).update(["many"]), "must be a RoutingResult or .* got str"),
        (
            lambda: RoutingAnalyzer(EXPERTS).update(
                route(), [F.moe_permute(torch.zeros(1, 1), torch.tensor([[0]]), 2)]
            ),
            "permuted must have one result of 6 experts for each of 1 layers",
        ),
        (lambda: two_steps()[0].to_dict(last=0), "last must be at least 1, got 0"),
        (lambda: two_steps()[0].to_dict(last=1, group=1), "takes last or group, not both"),
        (lambda: metrics.router_metrics(torch.ones(8)), r"shape \[..., 2 E \+ 5\] .* got \[8\]"),
        (lambda: metrics.router_metrics(torch.ones(5)), r"with E >= 1, got \[5\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bad_update_changes_nothing():
    analyzer = RoutingAnalyzer(2)
    analyzer.update(torch.tensor([1, 2]))
    before = copy.deepcopy(analyzer)
    with pytest.raises(ValueError, match="must not be negative"):
        analyzer.update(torch.tensor([1, -2]))
    assert_same(analyzer, before)


def test_torchmetrics_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    _metric_class.cache_clear()
    with pytest.raises(ImportError, match="needs the package torchmetrics"):
        torchmetrics_metric(4)


def test_torchmetrics_protocol():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics_metric(EXPERTS, LAYERS)
    assert isinstance(metric, torchmetrics.Metric)
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match="no step"):
        metric.compute()
    analyzer = RoutingAnalyzer(EXPERTS, LAYERS)
    for seed in range(2):
        of_step = metric(routings(seed))  # forward: the figures of the step alone
        analyzer.update(routings(seed))
        for name, values in analyzer.metric_history().items():
            torch.testing.assert_close(of_step[name], values[-1])
    assert metric.compute().keys() == analyzer.compute().keys()
    for name, values in analyzer.compute().items():
        torch.testing.assert_close(metric.compute()[name], values)
    other = torchmetrics_metric(EXPERTS, LAYERS)
    other.update(routings(2))
    other.merge_state(metric)
    analyzer.update(routings(2))
    torch.testing.assert_close(other.compute()["cv"], analyzer.compute()["cv"])
    metric.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match="no step"):
        metric.compute()


def test_co_activation():
    indices = torch.tensor([[[0, 1, 2], [3, 1, -1]], [[2, 0, 3], [-1, -1, -1]]])
    chosen = torch.zeros(4, 4, dtype=torch.int64)
    for token, row in enumerate(indices.reshape(4, 3).tolist()):
        for expert in row:
            if expert >= 0:
                chosen[token, expert] = 1
    got = metrics.co_activation(indices, 4)
    assert got.dtype == torch.int64 and torch.equal(got, chosen.T @ chosen)
    r = route(top_k=3)
    assert torch.equal(metrics.co_activation(r.topk_indices, EXPERTS).diag(), r.tokens_per_expert)
    assert metrics.co_activation(torch.empty(0, 2, dtype=torch.int64), 3).sum() == 0


def test_expert_similarity():
    x, r = torch.randn(40, 5), route()
    inputs = torch.stack(
        [x[(r.topk_indices == expert).any(1)].double().mean(0) for expert in range(EXPERTS)]
    )
    want = torch.nn.functional.cosine_similarity(inputs[:, None], inputs[None], dim=-1)
    got = metrics.expert_similarity(x, r.topk_indices, EXPERTS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.expert_similarity(inputs.reshape(EXPERTS, 5, 1)), want)
    pairs = want[~torch.eye(EXPERTS, dtype=torch.bool)].mean()
    mean = metrics.expert_similarity_mean(inputs)
    torch.testing.assert_close(mean, pairs)
    assert metrics.expert_diversity_score(inputs) == 1 - mean
    same = metrics.expert_similarity_mean(x, r.topk_indices.clamp_max(0), EXPERTS)
    assert same.isnan()  # one expert has a token: there is no pair
    with_dead = torch.cat([inputs, torch.zeros(1, 5)])
    torch.testing.assert_close(metrics.expert_similarity_mean(with_dead), pairs)
    assert metrics.expert_similarity(with_dead)[-1].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.co_activation(torch.tensor([[0, 4]]), 4), r"in \[-1, 4\), got 4"),
        (lambda: metrics.co_activation(torch.tensor([[0, -2]]), 4), r"in \[-1, 4\), got -2"),
        (lambda: metrics.co_activation(torch.ones(2, 2), 4), "must be int64 .*, got torch.float32"),
        (lambda: metrics.co_activation(torch.tensor([[0]]), 0), "num_experts must be at least 1"),
        (lambda: metrics.expert_similarity(torch.ones(4)), r"shape \[E, ...\] .* got \[4\]"),
        (lambda: metrics.expert_similarity(torch.ones(4, 2), torch.zeros(4, 1).long()), "together"),
        (
            lambda: metrics.expert_similarity(torch.ones(3, 2), torch.zeros(4, 1).long(), 2),
            r"leading dimensions of topk_indices, \[4\], got \[3, 2\]",
        ),
    ],
)
def test_bad_arguments_of_pairs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
