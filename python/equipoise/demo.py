# SPDX-License-Identifier: Apache-2.0
"""`python -m equipoise.demo`: the same small language model with and without balanced experts.

Trains a byte-level MoE transformer on Python's own standard library source (every tenth file is
held out) three times from the same start and on the same batches: without balancing, with the
Switch loss, and with the loss-free bias. Ends with a table and a report folder with plots.

The matrices are small: one thread is nearly as fast as two, and never waits for the other.
"""

import argparse
import hashlib
import importlib.util
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import demo_report, metrics, nn
from .demo_report import METHODS, WINDOW, Corpus, Run

HELD_OUT_TOKENS = 65536


def load_corpus() -> Corpus:
    """Python's standard library source, without its tests.

    Raises:
        FileNotFoundError: this Python has no library source of at least a megabyte.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
    texts = [path.read_bytes() for path in files]
    held_out = b"".join(texts[::10])
    train = b"".join(text for i, text in enumerate(texts) if i % 10)
    if len(train) < 10**6:
        raise FileNotFoundError(f"no standard library source of at least 1 MB in {root}")
    return Corpus(
        train=torch.frombuffer(bytearray(train), dtype=torch.uint8),
        held_out=torch.frombuffer(bytearray(held_out), dtype=torch.uint8),
        num_files=len(files),
        sha256=hashlib.sha256(train + held_out).hexdigest(),
    )


def build_model(method: str, args: argparse.Namespace) -> nn.MoETransformerLM:
    def make_router() -> nn.TopKRouter:
        balancer = None
        if method == "loss_free":
            balancer = nn.LossFreeBalancer(args.experts, args.bias_update_rate)
        return nn.TopKRouter(
            args.d_model, args.experts, args.top_k, norm_topk_prob=True, balancer=balancer
        )

    return nn.MoETransformerLM(
        vocab_size=256,
        d_model=args.d_model,
        num_layers=args.layers,
        num_heads=args.heads,
        d_hidden=args.d_hidden,
        num_experts=args.experts,
        top_k=args.top_k,
        max_seq_len=args.seq_len,
        make_router=make_router,
    ).to(args.device)


def cosine(progress: float) -> float:
    """From 1 at the start to a tenth at the end."""
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def windows(text: Tensor, starts: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and next bytes [B, seq_len] of the windows of `text` that begin at `starts` [B]."""
    index = starts[:, None] + torch.arange(args.seq_len + 1)
    tokens = text[index].to(args.device, torch.int64)
    return tokens[:, :-1], tokens[:, 1:]


def train(
    method: str,
    args: argparse.Namespace,
    corpus: Corpus,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Run:
    """One run. `on_step(step, loss, recent tokens_per_expert [L, E])` is called now and then."""
    torch.manual_seed(args.seed)
    model = build_model(method, args)
    balancers = [m for m in model.modules() if isinstance(m, nn.LossFreeBalancer)]
    balance_loss = nn.SwitchBalanceLoss(args.aux_loss_coeff)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    warmup = max(1, min(20, args.steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * cosine(step / args.steps)
    )
    batches = torch.Generator().manual_seed(args.seed)
    losses, counts = [], []
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        starts = torch.randint(
            corpus.train.numel() - args.seq_len, (args.batch_size,), generator=batches
        )
        inputs, targets = windows(corpus.train, starts, args)
        logits, routings = model(inputs)
        loss = cross_entropy(logits, targets)
        total = loss
        if method == "switch":
            total = loss + sum(balance_loss(routing) for routing in routings)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for balancer in balancers:
            balancer.update()
        losses.append(loss.detach() / math.log(2))
        counts.append(torch.stack([routing.tokens_per_expert for routing in routings]))
        if on_step is not None and (step % 5 == 0 or step == args.steps):
            on_step(step, losses[-1].item(), sum(counts[-WINDOW:]))
    seconds = time.perf_counter() - began
    held_out_loss, held_out_counts = evaluate(model, args, corpus)
    return Run(
        method=method,
        loss=torch.stack(losses).cpu(),
        tokens_per_expert=torch.stack(counts).cpu(),
        seconds=seconds,
        held_out_loss=held_out_loss,
        held_out_tokens_per_expert=held_out_counts.cpu(),
    )


@torch.no_grad()
def evaluate(
    model: nn.MoETransformerLM, args: argparse.Namespace, corpus: Corpus
) -> tuple[float, Tensor]:
    """Bits per byte and tokens per expert [L, E] on windows spread over the held-out files."""
    model.eval()
    last_start = corpus.held_out.numel() - args.seq_len - 1
    num_windows = max(1, HELD_OUT_TOKENS // args.seq_len)
    starts = torch.arange(num_windows) * last_start // num_windows
    total, counts = 0.0, 0
    for some in starts.split(max(1, 4096 // args.seq_len)):
        inputs, targets = windows(corpus.held_out, some, args)
        logits, routings = model(inputs)
        total += cross_entropy(logits, targets).item() / math.log(2) * len(some)
        counts += torch.stack([routing.tokens_per_expert for routing in routings])
    return total / num_windows, counts


class LiveProgress:
    """A bar per run on a terminal; a line now and then elsewhere."""

    def __init__(self, console, args: argparse.Namespace) -> None:
        from rich import progress

        self.args = args
        self.console = console
        self.bars = progress.Progress(
            progress.TextColumn("{task.description:<14}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def start(self, method: str) -> None:
        self.label = METHODS[method]
        self.task = self.bars.add_task(self.label, total=self.args.steps, figures="")
        self.began = time.perf_counter()

    def on_step(self, step: int, loss: float, recent: Tensor) -> None:
        speed = step * self.args.batch_size * self.args.seq_len / (time.perf_counter() - self.began)
        max_vio = metrics.load_metrics(recent)["max_vio"].mean().item()
        figures = f"loss {loss:.3f}  {speed:,.0f} tokens/s  MaxVio {max_vio:.2f}"
        self.bars.update(self.task, completed=step, figures=figures)
        every = max(5, self.args.steps // 50 * 5)
        if not self.console.is_terminal and (step % every == 0 or step == self.args.steps):
            print(f"{self.label:<14} step {step:>4}/{self.args.steps}  {figures}", flush=True)


def fail(message: str) -> int:
    print(f"python -m equipoise.demo: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m equipoise.demo",
        description="Trains a small byte-level MoE transformer on Python's standard library "
        "source three times (no balancing, Switch loss, loss-free bias), prints a table and "
        "writes plots.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    sizes = {
        "steps": (400, "optimizer steps of each run"),
        "batch-size": (64, "windows in a batch"),
        "seq-len": (32, "bytes in a window"),
        "layers": (2, "transformer blocks"),
        "d-model": (64, "width of a token"),
        "heads": (4, "attention heads"),
        "d-hidden": (32, "width inside an expert"),
        "experts": (32, "experts in a block"),
        "top-k": (2, "experts that a token uses"),
        "threads": (1, "CPU threads"),
    }
    for name, (default, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=meaning)
    rates = {
        "lr": (5e-3, "peak learning rate"),
        "aux-loss-coeff": (1e-2, "coefficient of the Switch loss"),
        "bias-update-rate": (1e-3, "step of the loss-free bias"),
    }
    for name, (default, meaning) in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=meaning)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="start and batches")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report")
    args = parser.parse_args(argv)

    for name in sizes:
        value = getattr(args, name.replace("-", "_"))
        if value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    for name in rates:
        value = getattr(args, name.replace("-", "_"))
        if not 0 <= value < math.inf:
            parser.error(f"argument --{name}: must be a number >= 0, got {value}")
    if args.seq_len > 2**16:
        parser.error(f"argument --seq-len: must be at most {2**16}, got {args.seq_len}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: must be between 0 and 2^63 - 1, got {args.seed}")
    if args.d_model % args.heads:
        parser.error(f"argument --heads: must divide --d-model {args.d_model}, got {args.heads}")
    if args.top_k >= args.experts:
        parser.error(
            f"argument --top-k: must be less than --experts {args.experts}, got {args.top_k} "
            "(with all experts in use there is nothing to balance)"
        )
    try:
        torch.empty(1, device=args.device)
        if torch.device(args.device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: cannot use {args.device!r}: {reason}")
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install 'equipoise[demo]'")
    if not args.out.parent.is_dir():
        parser.error(f"argument --out: the folder {args.out.parent} does not exist")
    try:
        args.out.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # found out now rather than after training
    except OSError as error:
        parser.error(f"argument --out: cannot write to {args.out}: {error.strerror}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(args.threads)
    try:
        corpus = load_corpus()
    except OSError as error:
        return fail(str(error))
    size = sum(parameter.numel() for parameter in build_model("none", args).parameters())
    print(
        f"Python's standard library: {corpus.num_files} files, {corpus.train.numel() / 1e6:.1f} MB "
        f"to learn from, {corpus.held_out.numel() / 1e6:.1f} MB held out.\n"
        f"Model: {size:,} parameters, {args.layers} MoE layers of {args.experts} experts, "
        f"{args.top_k} per token. Loss in bits per byte.",
        flush=True,
    )
    console = Console()
    progress = LiveProgress(console, args)
    runs = []
    with progress.bars:
        for method in METHODS:
            progress.start(method)
            runs.append(train(method, args, corpus, progress.on_step))
            if not math.isfinite(runs[-1].held_out_loss):
                break
    if not math.isfinite(runs[-1].held_out_loss):
        return fail(f"the loss of '{runs[-1].label}' is not finite: try a smaller --lr")

    title = "On the held-out files, means over the layers"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for i, heading in enumerate(demo_report.COLUMNS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i == 0)
    for row in demo_report.rows(runs):
        table.add_row(*row)
    console.print(table)
    page = demo_report.write(args.out, runs, corpus, args)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
