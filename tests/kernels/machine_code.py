# SPDX-License-Identifier: Apache-2.0
"""What nvcc and ptxas make of cuda/*.cu: each kernel's resources and its machine code."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURES = (75, 80, 90, 100, 120)
# Whose PTX their machine code is made from, as a driver makes that of architectures after 9.0: it
# is in the libraries equipoise_ptx_80 and equipoise_ptx_90. Others are compiled from the source.
PTX_LIBRARY = {80: 80, 90: 90, 100: 90}
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Kernel:
    """One instance of a kernel on one architecture; `load` and `store` are bits of the widest."""

    name: str
    arguments: str
    architecture: int
    registers: int = 0
    shared: int = 0  # bytes, static
    local: int = 0  # bytes of the stack frame
    spilled: int = 0  # bytes, stored and loaded
    load: int = 0
    store: int = 0
    tickets: int = 0
    faults: tuple[str, ...] = ()  # of memory barriers and of local memory

    @property
    def instance(self) -> str:
        return self.name + (f"<{self.arguments}>" if self.arguments else "")


def read_commands(build: Path) -> dict[Path, list[str]]:
    """How the CMake tree `build` compiles each CUDA file of the library."""
    commands = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        file = Path(entry["file"])
        if file.suffix == ".cu" and "/equipoise.dir/" in entry["command"]:
            commands[file] = shlex.split(entry["command"])
    if not commands:
        raise SystemExit(f"{build} compiles no CUDA")
    return commands


def compiler(build: Path) -> str:
    """Such as "nvcc 13.0.88"."""
    nvcc = next(iter(read_commands(build).values()))[0]
    return "nvcc " + re.search(r"\bV([\d.]+)", _run([nvcc, "--version"], build))[1]


def read(build: Path, jobs: int) -> list[Kernel]:
    """All kernels on all architectures, compiled with the flags of the CMake tree `build`."""
    commands = read_commands(build)
    # The longest first, so that the jobs end together.
    units = [(file, a) for file in commands for a in ARCHITECTURES]
    units.sort(key=lambda unit: (unit[1] not in PTX_LIBRARY, unit[0].stat().st_size), reverse=True)
    out = build.resolve() / "kernels"
    out.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda unit: _read_unit(commands[unit[0]], *unit, out), units)
        return sorted((k for part in parts for k in part), key=lambda k: (k.name, k.arguments))


def _read_unit(command: list[str], file: Path, architecture: int, out: Path) -> list[Kernel]:
    """The kernels of one file."""
    cubin = out / f"{file.stem}.sm_{architecture}.cubin"
    words = [w for w in command if not w.startswith(("--generate-code", "-arch"))]
    words = words[: words.index("-x")]  # what follows are the language and the names of the files
    if library := PTX_LIBRARY.get(architecture):
        made = out.parent / f"CMakeFiles/equipoise_ptx_{library}.dir/cuda/{file.name}.o"
        (text,) = re.findall(rb"\.version [^\0]*", made.read_bytes())
        file = cubin.with_suffix(".ptx")
        file.write_bytes(text)
    words += [f"-arch=sm_{architecture}", "--resource-usage", "-cubin", str(file)]
    resources = _read_resources(_run([*words, "-o", str(cubin)], out.parent))
    code = _run([_find_nvdisasm(), "-c", str(cubin)], out)
    print(cubin.stem, flush=True)
    kernels = []
    for mangled, body in _sections(code):
        name, arguments = readable(mangled)
        kernel = Kernel(name, arguments, architecture, **resources[mangled])
        kernel.load, kernel.store = _widest(body, "LDG?"), _widest(body, "STG?")
        kernel.tickets, faults = _check_fences(body)
        if any(re.match(r"(LDL|STL)\b", i.text) for i in body):
            faults.append("uses local memory")
        kernel.faults = tuple(faults)
        kernels.append(kernel)
    return kernels


def _run(words: list[str], directory: Path) -> str:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(words, cwd=directory, **pipes)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout}")
    return done.stdout


def _find_nvdisasm() -> str:
    """The toolkit's, else the one that pip has installed."""
    found = shutil.which("nvdisasm")
    for path in sys.path:
        found = found or next(map(str, Path(path).glob("nvidia/*/bin/nvdisasm")), None)
    if found is None:
        raise SystemExit("nvdisasm is needed: pip install nvidia-cuda-nvdisasm")
    return found


def readable(mangled: str) -> tuple[str, str]:
    """Name and template arguments of a kernel, without namespaces."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|\b(equipoise|gating|c10)::", "", text.strip())
    text = re.sub(r"\((int|bool)\)", "", text).removeprefix("void ").replace("> >", ">>")
    name, rest = re.fullmatch(r"(\w+)(.*)", text).groups()
    arguments = re.match(r"<(.*?)>\(", rest)
    return name, arguments[1] if arguments else ""


def _read_resources(log: str) -> dict[str, dict[str, int]]:
    """From the words of ptxas; the functions that a kernel calls count as its own."""
    resources = {}
    for part in log.split("Compiling entry function '")[1:]:

        def total(pattern, part=part):
            return sum(map(int, re.findall(pattern, part)))

        resources[part[: part.index("'")]] = dict(
            registers=total(r"Used (\d+) registers"),
            shared=total(r"(\d+) bytes smem"),
            local=total(r"(\d+) bytes stack frame"),
            spilled=total(r"(\d+) bytes spill"),
        )
    return resources


# ---- machine code --------------------------------------------------------------------------------


@dataclasses.dataclass
class Instruction:
    """`text` is without its predicate; `labels` are those that stand before it."""

    address: str
    text: str
    predicated: bool
    labels: tuple[str, ...]


def _sections(code: str):
    """The mangled name and the instructions of each kernel."""
    for part in re.split(r"^\t\.section\t\.text\.", code, flags=re.M)[1:]:
        body, labels = [], []
        for line in part.splitlines():
            if match := re.match(r"(\S+):$", line):
                labels.append(match[1])
            elif match := re.match(r"\s+/\*(\w+)\*/\s+(@\S+\s+)?([^;/]*)", line):
                address, predicate, text = match.groups()
                body.append(Instruction(address, text.strip(), bool(predicate), tuple(labels)))
                labels = []
        yield part[: part.index(",")], body


def _widest(body: list[Instruction], operation: str) -> int:
    """Bits of the widest access to global memory."""
    widths = [0]
    for instruction in body:
        if match := re.match(rf"{operation}\.(\S+)", instruction.text):
            sizes = [w for w in match[1].split(".") if re.fullmatch(r"[US]?(8|16|64|128|256)", w)]
            widths.append(int(sizes[0].lstrip("US")) if sizes else 32)
    return max(widths)


def _check_fences(body: list[Instruction]) -> tuple[int, list[str]]:
    """How many arrival tickets are taken, and what is wrong with the memory barriers.

    On every path, a barrier of the device must stand between each store and the next ticket (and
    between the start and a ticket), and between a ticket and the next load. Only a ticket uses what
    an atomic in global memory returns. A state is (a store waits, a ticket waits) for a barrier.
    """
    place = {label: i for i, instruction in enumerate(body) for label in instruction.labels}
    scopes = {}  # where the threads of a convergence barrier go on
    for instruction in body:
        if match := re.match(r"BSSY\S* (B\d+), `\((\S+)\)", instruction.text):
            scopes.setdefault(match[1], set()).add(place[match[2]])
    is_ticket = [bool(re.match(r"ATOMG?\.\S+ P\w+, R\d", i.text)) for i in body]
    faults, seen, todo = [], set(), [(0, True, False)]
    if not any(is_ticket):
        return 0, faults
    while todo:
        state = todo.pop()
        if state in seen or state[0] >= len(body):
            continue
        seen.add(state)
        at, store_waits, ticket_waits = state
        instruction = body[at]
        text = instruction.text
        if is_ticket[at]:
            if store_waits:
                faults.append(f"no memory barrier before the ticket at {instruction.address}")
            ticket_waits = True
        elif re.match(r"(STG?|REDG?|ATOMG?)\.", text):
            store_waits = True
        elif re.match(r"LDG?\.", text) and ticket_waits:
            faults.append(f"no memory barrier between a ticket and {instruction.address}")
        elif re.match(r"MEMBAR\.(SC|ALL)\.(GPU|SYS)", text):
            store_waits = ticket_waits = False
        elif re.match(r"(BRX|JMX|JMP)\b", text) and "BRANCH_TARGETS" not in text:
            faults.append(f"cannot follow the jump at {instruction.address}")

        follows = []
        if instruction.predicated or not re.match(r"EXIT|RET|BRX|BRA(\.U)? `", text):
            follows.append(at + 1)
        if match := re.match(r"BSYNC\S* (B\d+)", text):
            if at + 1 not in scopes[match[1]]:  # else this one ends its scope
                follows += scopes[match[1]]
        elif match := re.search(r"BRANCH_TARGETS ([^\"]+)", text):
            follows += [place[label] for label in match[1].split(",")]
        elif (match := re.search(r"`\((\S+)\)", text)) and not text.startswith("BSSY"):
            follows.append(place[match[1]])
        todo += [(next_one, store_waits, ticket_waits) for next_one in follows]
    return sum(is_ticket), sorted(set(faults))


if __name__ == "__main__":
    for k in read(Path(sys.argv[1]), int(os.environ.get("JOBS", "2"))):
        print(k.architecture, k.instance, *list(dataclasses.asdict(k).values())[3:])
