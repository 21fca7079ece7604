# SPDX-License-Identifier: Apache-2.0
"""Balancing without a loss: a bias per expert that steers the selection and nothing else.

Once per optimizer step, with C_e the tokens that expert e got during the step,

    loss-free   b_e <- b_e + u sign(mean(C) - C_e)                   (Wang 2024, arXiv:2408.15664)
    EMA         b_e <- beta b_e - (1 - beta) strength (E f_e - 1),     f_e = C_e / sum(C)

An expert that got too little is chosen a little more often from then on; the weights of the chosen
experts come from the scores without the bias, so no gradient is bent. The steps are so small (1e-3)
that bfloat16 would lose them: the bias stays float32 whatever the model is cast to.

`DynamicExperts` goes further and takes experts out that nobody chooses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .distributed import all_reduce_sum


def _recomputing() -> bool:
    """Whether this is the second forward of `torch.utils.checkpoint(..., use_reentrant=False)`.

    That forward runs inside a backward pass and catches its saved tensors with hooks. The reentrant
    kind has none, and needs none: its first forward runs without gradients and is not counted.
    """
    if torch.compiler.is_compiling():
        return False
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Balancer(nn.Module):
    """What all of this file share: the counts of a step that is under way, and when to count.

    A router calls `record` in every forward pass; whoever calls the optimizer calls `update` after
    it. The buffers are the state and are in the `state_dict`; the counts are neither, and the
    buffers keep their type under `.to(torch.bfloat16)`.

    Args:
        num_experts: E.

    Attributes:
        tokens_per_expert: [E] int64, counted since the last update.
        needs_scores: whether `record` wants the scores as well.

    Raises:
        ValueError: `num_experts` below 1.
    """

    needs_scores = False

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._require(num_experts >= 1, f"num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts
        # Sums since the last update: over records here, over ranks in _collect. No buffers:
        # DistributedDataParallel would overwrite them with those of rank 0. Behind the counts
        # stands the number of records.
        self._sums = {"counts": torch.zeros(num_experts + 1, dtype=torch.int64, device=device)}
        self._recorded = False  # ever; known on the host, so that asking does not wait

    @property
    def tokens_per_expert(self) -> Tensor:
        return self._sums["counts"][:-1]

    def reset_parameters(self) -> None:
        """Forgets what was recorded."""
        self._clear()
        self._recorded = False

    def record(self, tokens_per_expert: Tensor, scores: Tensor | None = None) -> None:
        """Adds the counts of one forward pass; several may come before an update.

        Nothing is recorded in `eval()` mode, under `no_grad`, or when activation checkpointing runs
        a forward pass for the second time: only tokens that are learnt from count, and each once.

        Args:
            tokens_per_expert: [E] int64, or [S, E] of segments, as in `RoutingResult`.
            scores: [..., E] floating, read by `LossFreeBalancer(mode="quantile")` only: the scores
                of the selection before `expert_bias` is added, -inf (or NaN) for absent experts and
                in the rows of masked tokens.

        Raises:
            ValueError: another shape; no `scores` where they are needed.
        """
        self._check_experts(tokens_per_expert, "tokens_per_expert")
        if not self.training or not torch.is_grad_enabled() or _recomputing():
            return
        with torch.no_grad():
            counts = tokens_per_expert.reshape(-1, self.num_experts).sum(0)
            if self.needs_scores:
                self._record_scores(counts, scores)
            sums = self._sums["counts"]
            sums[:-1].add_(counts)
            sums[-1:].add_(1)
        self._recorded = True

    def _collect(self, group: "torch.distributed.ProcessGroup | None") -> Tensor:
        """[E] int64: the counts since the last update, summed over the ranks of `group`.

        A rank that has never recorded must not raise before the others have its sums: they would
        wait for it. Behind the all-reduce it waits for the device once, to see whether anybody has
        recorded, so that either all ranks raise or none does.
        """
        if group is not None:
            for sums in self._sums.values():
                all_reduce_sum(sums, group)
        if not self._recorded:
            if group is None or self._sums["counts"][-1] == 0:
                raise RuntimeError(
                    f"{type(self).__name__}: update() before any recorded forward pass: run the "
                    "router in training mode with gradients first, and call update() once after "
                    "each optimizer step"
                )
            self._recorded = True
        return self._sums["counts"][:-1]

    def _clear(self) -> None:
        for sums in self._sums.values():
            sums.zero_()

    def _apply(self, fn, recurse: bool = True):  # .to(), .bfloat16(), .cuda(), ...
        def keep_dtype(after: Tensor, before: Tensor) -> Tensor:
            return after if after.dtype == before.dtype else before.to(device=after.device)

        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in buffers.items():  # the values of before the rounding
            self._buffers[name] = keep_dtype(self._buffers[name], before)
        self._sums = {name: keep_dtype(fn(sums), sums) for name, sums in self._sums.items()}
        return self

    def _check_experts(self, tensor: Tensor, name: str) -> None:
        if tensor.dim() < 1 or tensor.shape[-1] != self.num_experts:
            raise ValueError(
                f"{type(self).__name__}: {name} must have shape [..., E] = "
                f"[..., {self.num_experts}], got {list(tensor.shape)}"
            )

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def _num_active(self, active_experts: Tensor | None) -> int | Tensor:
        if active_experts is None:
            return self.num_experts
        self._require(
            active_experts.dtype == torch.bool and active_experts.shape == (self.num_experts,),
            f"active_experts must be bool of shape [{self.num_experts}], "
            f"got {active_experts.dtype} of shape {list(active_experts.shape)}",
        )
        return active_experts.sum()


class LossFreeBalancer(Balancer):
    """Loss-free balancing: hand it to a router, call `update()` after each optimizer step.

    The router adds `expert_bias` to the scores for the selection and records its counts by itself.
    The bias is in the `state_dict`; the counts of a step that is under way are not. With
    `F_e = share_e sum(C)` the load that expert e should have (`mean(C)` by default), one update is

    - `"sign"`: `b_e += u sign(F_e - C_e)` (Wang 2024, arXiv:2408.15664)
    - `"proportional"`: `b_e += u (F_e - C_e) / F_e`
    - `"quantile"`: `-b_e` becomes the value of which `F_e` of the `s_te - a_t` are larger, half-way
      between its neighbours. `s_te` are the scores, `a_t` is the (K+1)-th largest `s_te + b_e` of
      token t, what an expert must beat to be chosen (one round of the dual ascent of Kimi K3's
      report, section 2.3.3). A few updates are enough, and u is not used. For several records, or
      ranks, the values are averaged by their number of tokens, which needs 2 E numbers of state
      where the exact value would need all scores. Each training forward sorts its scores twice.
      Groups of experts are not considered.

    How large may u be? With `"sign"`, each update moves the bias of every expert by u, however
    close it is: in the end the loads swing about their targets by as much as u moves them. A u that
    is not small against the differences between scores makes experts full and empty by turns, and
    no further update helps. The paper's 1e-3 is for scores within [0, 1], as those of softmax and
    sigmoid are. `"proportional"` comes to rest if u is small enough, and oscillates otherwise.

    Args:
        num_experts: E.
        bias_update_rate: u >= 0. The loads oscillate if it is too large, see above.
        mode: `"sign"`, `"proportional"` or `"quantile"`.
        center: take the mean off the bias after each update. Selection does not change; the bias
            cannot drift.
        target_shares: [E] numbers > 0, divided by their sum: the share of the tokens that each
            expert should get, for experts on unequal hardware. Default: all equal.

    Attributes:
        expert_bias: [E] float32 buffer, added to the scores for the selection.
        tokens_per_expert: [E] int64, counted since the last update.
        target_shares: [E] float64, sums to 1.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> balancer = LossFreeBalancer(4, bias_update_rate=0.25)
        >>> balancer.record(torch.tensor([9, 5, 5, 1]))
        >>> balancer.update()
        >>> balancer.expert_bias
        tensor([-0.2500,  0.0000,  0.0000,  0.2500])
    """

    expert_bias: Tensor
    target_shares: Tensor

    def __init__(
        self,
        num_experts: int,
        bias_update_rate: float = 1e-3,
        mode: str = "sign",
        center: bool = False,
        target_shares: Tensor | Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_experts, device)
        self._require(
            bias_update_rate >= 0, f"bias_update_rate must not be negative, got {bias_update_rate}"
        )
        modes = ("sign", "proportional", "quantile")
        self._require(mode in modes, f"mode must be one of {', '.join(modes)}, got {mode!r}")
        self.bias_update_rate = bias_update_rate
        self.mode = mode
        self.center = center
        shares = torch.ones(num_experts, dtype=torch.float64)
        if target_shares is not None:
            shares = torch.as_tensor(target_shares, dtype=torch.float64, device="cpu").detach()
            good = shares.shape == (num_experts,) and bool((shares.isfinite() & (shares > 0)).all())
            self._require(
                good,
                f"target_shares must be {num_experts} finite numbers > 0, got {shares.tolist()}",
            )
        self._equal_shares = bool((shares == shares[0]).all())
        self._shares = (shares / shares.sum()).tolist()  # for reset_parameters after to_empty()
        shares = torch.tensor(self._shares, dtype=torch.float64, device=device)
        self.register_buffer("target_shares", shares, persistent=False)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)
        self.needs_scores = mode == "quantile"
        if self.needs_scores:  # tokens times value, and tokens
            sums = torch.zeros(2, num_experts, dtype=torch.float64, device=device)
            self._sums["quantiles"] = sums

    def reset_parameters(self) -> None:
        """Zeroes the bias and the counts."""
        super().reset_parameters()
        self.expert_bias.zero_()
        self.target_shares.copy_(torch.tensor(self._shares, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        group: "torch.distributed.ProcessGroup | None" = None,
        active_experts: Tensor | None = None,
    ) -> None:
        """One step of the bias, in place; the counts start again from zero.

        Nothing changes where nothing was recorded since the last update.

        Args:
            group: a process group over which the counts are summed first, so that every rank makes
                the same step.
            active_experts: [E] bool of `DynamicExperts`: the tokens are shared out among these, and
                the bias of the others stays. (`"quantile"` sees it in the scores.)

        Raises:
            RuntimeError: before any forward pass was recorded. In a group, when none of the ranks
                has recorded one; then all of them raise.
            ValueError: `active_experts` is not bool or not [E].
        """
        num_active = self._num_active(active_experts)
        counts = self._collect(group)
        if self.mode == "quantile":
            value, tokens = self._sums["quantiles"]
            bias = torch.where(tokens > 0, -value / tokens, self.expert_bias)
            self.expert_bias.copy_(bias)
        else:
            step = self._shortfall(counts, active_experts, num_active)
            self.expert_bias.add_(step, alpha=self.bias_update_rate)
        if self.center:
            self.expert_bias.sub_(self.expert_bias.mean())
        self._clear()

    def _shortfall(
        self, counts: Tensor, active_experts: Tensor | None, num_active: int | Tensor
    ) -> Tensor:
        total = counts.sum()
        if self.mode == "sign" and self._equal_shares:
            # Integers compare exactly: sign(sum - E C_e) is sign(mean - C_e) without rounding.
            step = torch.sign(total - num_active * counts)
        else:
            fair = total * self._shares_among(active_experts)
            step = fair - counts
            step = step.sign() if self.mode == "sign" else step / fair
        step = step.where(total > 0, 0)
        return step if active_experts is None else step.where(active_experts, 0)

    def _shares_among(self, present: Tensor | None) -> Tensor:
        if present is None:
            return self.target_shares
        shares = self.target_shares * present
        return shares / shares.sum()

    def _record_scores(self, counts: Tensor, scores: Tensor | None) -> None:
        if scores is None:
            raise ValueError(
                "LossFreeBalancer: mode='quantile' needs the scores: record(counts, scores=...)"
            )
        self._check_experts(scores, "scores")
        scores = scores.reshape(-1, self.num_experts)
        if scores.shape[0] == 0:
            return
        absent = ~scores.isfinite()
        scores = scores.to(torch.float32).masked_fill(absent, float("-inf"))
        num_tokens = (~absent).any(1).sum()
        total = counts.sum()
        # The router knows K as a number, but then it would have to be told here as well.
        top_k = (total / num_tokens.clamp_min(1)).round().long().clamp_max(self.num_experts - 1)
        ranked = (scores + self.expert_bias).sort(1, descending=True).values
        threshold = ranked.index_select(1, top_k.reshape(1))
        margin = (scores - threshold).masked_fill(absent, float("-inf"))
        margin = margin.t().contiguous().sort(1, descending=True).values.double()

        # Position n - 1/2, counted from 0, is half-way between the n-th and the next.
        tokens = (~absent).sum(0)
        fair = (total * self._shares_among(tokens > 0)).nan_to_num()  # no expert at all
        last = (tokens - 1).clamp_min(0)
        position = (fair - 0.5).clamp_min(0).minimum(last)
        below = position.floor().long()
        pair = margin.gather(1, torch.stack([below, (below + 1).minimum(last)], 1))
        value = torch.lerp(pair[:, 0], pair[:, 1], position - below)

        # Not finite: nobody saw this expert, or the tokens at this place had no choice.
        weight = torch.where(value.isfinite(), num_tokens, 0)
        value = torch.where(value.isfinite(), value, 0)
        self._sums["quantiles"].add_(torch.stack([weight * value, weight.double()]))

    def extra_repr(self) -> str:
        shares = "" if self._equal_shares else f", target_shares={self._shares}"
        return (
            f"num_experts={self.num_experts}, bias_update_rate={self.bias_update_rate}, "
            f"mode={self.mode!r}, center={self.center}{shares}"
        )


class EMABalancer(Balancer):
    """Balancing by a moving average of the loads: hand it to a router, call `update()` each step.

    With `f_e` the share of the tokens that expert e got since the last update,

        m_e <- beta m_e + (1 - beta) f_e,      expert_bias_e = -balancing_strength (E m_e - 1)

    from `m_e = 1 / E`. The bias is a fixed function of the loads: it comes to rest, at a load that
    is still uneven by the bias it takes over `balancing_strength`, where `LossFreeBalancer` goes on
    until the loads are even. A larger strength leaves less, but more than about
    `(1 + beta) / ((1 - beta) E df/db)` makes the loads oscillate; raise `beta` with it.

    Args:
        num_experts: E.
        balancing_strength: the bias of an expert without any tokens, >= 0.
        beta: share of the past in the average, 0 <= beta < 1.

    Attributes:
        expert_bias: [E] float32 buffer, added to the scores for the selection.
        tokens_per_expert: [E] int64, counted since the last update.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> balancer = EMABalancer(4, balancing_strength=0.5, beta=0.5)
        >>> balancer.record(torch.tensor([9, 5, 5, 1]))
        >>> balancer.update()
        >>> balancer.expert_bias
        tensor([-0.2000,  0.0000,  0.0000,  0.2000])
    """

    expert_bias: Tensor

    def __init__(
        self,
        num_experts: int,
        balancing_strength: float = 0.05,
        beta: float = 0.9,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_experts, device)
        self._require(
            balancing_strength >= 0,
            f"balancing_strength must not be negative, got {balancing_strength}",
        )
        self._require(0 <= beta < 1, f"beta must be at least 0 and below 1, got {beta}")
        self.balancing_strength = balancing_strength
        self.beta = beta
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)

    def reset_parameters(self) -> None:
        """Zeroes the bias and the counts."""
        super().reset_parameters()
        self.expert_bias.zero_()

    @torch.no_grad()
    def update(
        self,
        group: "torch.distributed.ProcessGroup | None" = None,
        active_experts: Tensor | None = None,
    ) -> None:
        """One step of the average, in place; the counts start again from zero.

        Nothing changes where nothing was recorded since the last update.

        Args:
            group: a process group over which the counts are summed first, so that every rank makes
                the same step.
            active_experts: [E] bool of `DynamicExperts`: the tokens are shared out among these, and
                the bias of the others stays.

        Raises:
            RuntimeError: before any forward pass was recorded. In a group, when none of the ranks
                has recorded one; then all of them raise.
            ValueError: `active_experts` is not bool or not [E].
        """
        num_active = self._num_active(active_experts)
        counts = self._collect(group)
        total = counts.sum()
        # The bias is affine in the average, so its own average is the same and m is not kept.
        target = -self.balancing_strength * (num_active * counts.double() / total - 1)
        changes = total > 0 if active_experts is None else (total > 0) & active_experts
        bias = torch.lerp(self.expert_bias, target.to(torch.float32), 1 - self.beta)
        self.expert_bias.copy_(torch.where(changes, bias, self.expert_bias))
        self._clear()

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, balancing_strength={self.balancing_strength}, "
            f"beta={self.beta}"
        )


class DynamicExperts(Balancer):
    """Takes experts out that hardly anybody chooses, and brings them back when others overflow.

    The load of an expert is measured in fair shares: `C_e / (sum(C) / active experts)`. One update

    - takes out the experts whose load was below `prune_below` in `patience` updates running, those
      with the fewest tokens first, as long as `min_experts` remain;
    - brings one back, the one that was out the longest, when the largest load was above
      `grow_above` in `patience` updates running.

    An expert that has come or gone starts counting anew, and so do the crowded updates.

    A router sets the logits of the experts that are not active to -inf, which the losses and the
    selection know as absent. Everything happens on the device of the buffers; nothing waits for it.

    Args:
        num_experts: E.
        prune_below: in fair shares, 0 <= prune_below < 1; 0 takes nothing out.
        grow_above: in fair shares, > 1. An expert cannot have more than `active / top_k` of them:
            with a larger value none comes back.
        patience: updates, at least 1.
        min_experts: from 1 to E; at least the router's `top_k`.

    Attributes:
        active_experts: [E] bool buffer, all True at first.
        updates_waited: [E] int64 buffer: for how many updates an active expert has had too little,
            or since when an inactive one is out.
        updates_crowded: [] int64 buffer: for how many updates an active expert has had too much.
        tokens_per_expert: [E] int64, counted since the last update.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> dynamic = DynamicExperts(4, patience=2, min_experts=2)
        >>> for _ in range(2):
        ...     dynamic.record(torch.tensor([50, 30, 20, 0]))
        ...     dynamic.update()
        >>> dynamic.active_experts
        tensor([ True,  True,  True, False])
    """

    active_experts: Tensor
    updates_waited: Tensor
    updates_crowded: Tensor

    def __init__(
        self,
        num_experts: int,
        prune_below: float = 0.1,
        grow_above: float = 2.0,
        patience: int = 10,
        *,
        min_experts: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_experts, device)
        self._require(
            0 <= prune_below < 1, f"prune_below must be at least 0 and below 1, got {prune_below}"
        )
        self._require(grow_above > 1, f"grow_above must be above 1, got {grow_above}")
        self._require(patience >= 1, f"patience must be at least 1, got {patience}")
        self._require(
            1 <= min_experts <= num_experts,
            f"min_experts must be between 1 and num_experts = {num_experts}, got {min_experts}",
        )
        self.prune_below = prune_below
        self.grow_above = grow_above
        self.patience = patience
        self.min_experts = min_experts
        active = torch.ones(num_experts, dtype=torch.bool, device=device)
        self.register_buffer("active_experts", active)
        waited = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("updates_waited", waited)
        crowded = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("updates_crowded", crowded)

    def reset_parameters(self) -> None:
        """Makes all experts active and zeroes the counts."""
        super().reset_parameters()
        self.active_experts.fill_(True)
        self.updates_waited.zero_()
        self.updates_crowded.zero_()

    @torch.no_grad()
    def update(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Applies the two rules once, in place; the counts start again from zero.

        Nothing changes where nothing was recorded since the last update.

        Args:
            group: a process group over which the counts are summed first, so that every rank keeps
                the same experts.

        Raises:
            RuntimeError: before any forward pass was recorded. In a group, when none of the ranks
                has recorded one; then all of them raise.
        """
        counts = self._collect(group)
        active, total = self.active_experts, counts.sum()
        num_active = active.sum()
        load = num_active * counts.double() / total
        waited = torch.where(active & (load >= self.prune_below), 0, self.updates_waited + 1)
        crowded = torch.where((load > self.grow_above).any(), self.updates_crowded + 1, 0)

        prunable = active & (waited >= self.patience)
        order = torch.where(prunable, counts, torch.iinfo(torch.int64).max).argsort(stable=True)
        place = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        prune = prunable & (place < num_active - self.min_experts)

        longest = torch.where(active, -1, waited).argmax()
        grow = torch.zeros_like(active).scatter_(0, longest.reshape(1), True)
        grow &= ~active & (crowded >= self.patience)

        waited = torch.where(prune | grow, 0, waited)
        crowded = torch.where((prune | grow).any(), 0, crowded)
        known = total > 0
        self.updates_waited.copy_(torch.where(known, waited, self.updates_waited))
        self.updates_crowded.copy_(torch.where(known, crowded, self.updates_crowded))
        self.active_experts.copy_(torch.where(known, (active & ~prune) | grow, active))
        self._clear()

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, prune_below={self.prune_below}, "
            f"grow_above={self.grow_above}, patience={self.patience}, "
            f"min_experts={self.min_experts}"
        )
