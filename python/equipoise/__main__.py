# SPDX-License-Identifier: Apache-2.0
"""The command `equipoise`, or `python -m equipoise`: what a routing log says, and what is built.

A routing log is what `RoutingAnalyzer.save` and `append` write.
"""

import argparse
import importlib.metadata
import sys
import time
import warnings
from pathlib import Path

import torch

from . import _build
from .analyzer import RoutingAnalyzer
from .diagnosis import diagnose

# What some parts need beside torch: package -> the part.
_OPTIONAL = {
    "matplotlib": "figures, reports",
    "rich": "the live view, the demo",
    "torchmetrics": "RoutingAnalyzer as a torchmetrics metric",
    "transformers": "watch, audit and patch of Hugging Face models",
    "tensorboard": "the TensorBoard callback",
    "lightning": "the Lightning callback",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if `diagnose` found something critical, or 2 for bad input."""
    args = _parse(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return args.run(args)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"equipoise {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="equipoise", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, meaning: str, reads_log: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        one.set_defaults(run=run)
        if reads_log:
            one.add_argument("log", type=Path, metavar="LOG.jsonl", help="a routing log")
        return one

    one = command("report", _report, "one HTML file with figures and findings")
    one.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    one = command("diagnose", _diagnose, "what is wrong, ranked, with remedies")
    one.add_argument("--json", action="store_true", help="as JSON")
    one = command("watch", _watch, "a live view of a log that is being written")
    one.add_argument(
        "--steps", type=int, default=50, help="how many last steps, default %(default)s"
    )
    one.add_argument("--every", type=float, default=1.0, help="seconds between two looks")
    one.add_argument("--once", action="store_true", help="print it once and end")
    command("info", _info, "what is built and what is missing", reads_log=False)
    args = parser.parse_args(argv)
    if args.command == "watch" and (args.steps < 1 or not args.every > 0):
        parser.error(f"--steps and --every must be positive, got {args.steps} and {args.every}")
    return args


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    write_report(RoutingAnalyzer.load(args.log), args.out, title=args.log.stem)
    print(args.out)
    return 0


def _diagnose(args: argparse.Namespace) -> int:
    found = diagnose(analyzer=RoutingAnalyzer.load(args.log))
    print(found.to_json() if args.json else found)
    return int(any(finding.severity == "critical" for finding in found.findings))


def _watch(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from .live import view

    console = Console()

    def look():
        analyzer = RoutingAnalyzer.load(args.log, history=args.steps)
        # Beside the heat map stand the numbers and the sparklines of a row.
        width = max(8, console.width - 60)
        return view(analyzer.tokens_per_expert, analyzer.steps[-1], width)

    if args.once:
        console.print(look())
        return 0
    seen = None
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                if (state := args.log.stat()).st_mtime_ns != seen:
                    seen = state.st_mtime_ns
                    live.update(look(), refresh=True)
                time.sleep(args.every)
        except KeyboardInterrupt:
            return 0


def _info(_: argparse.Namespace) -> int:
    cuda = f"compiled for {_build.cuda_architectures}" if _build.cuda else "not compiled"
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    print(
        f"equipoise {_build.version}, built against torch {_build.torch}; torch {torch.__version__}"
    )
    print(
        f"CPU kernels: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    print(f"CUDA kernels: {cuda}; GPUs: {gpus or 'none'}")
    for package, part in _OPTIONAL.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        print(f"{package + ':':<14}{version:<12}{part}")
    return 0


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"equipoise: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
