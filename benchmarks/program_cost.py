"""What a compiled program takes, from its optimized HLO: kernels, their bytes and FLOPs, seconds of a step without the device.

`static_cost` adds them up to seconds, without the device. Kernels run one after another. On a GPU each takes the longer of its
bytes over BANDWIDTH of the memory's peak and its FLOPs over PRODUCTS of the chip's; attention takes its FLOPs at the rate that
was published for the chip (`hardware.Chip.attention_shares`), whichever kernel stands in the program; a collective runs beside
the kernels between its start and its end, and costs what is not hidden there. On a TPU the compiler notes the cycles that it
estimates for a fusion, and those are taken; copies between the chip's memories that it starts ahead cost nothing, nor do
collectives inside fusions. Kernels whose operands are in a cache, launches and what devices wait for each other are not in it:
trust ratios more than seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from gqa_jax.hardware import Chip
from gqa_jax.planning.planner import attention_shares, host_bandwidth

# Shares of the peak that kernels reach. Products: the best bfloat16 product that was measured on an H100 reaches 794.5 of 989
# TFLOP/s, 8192 x 8192 and larger (github.com/stas00/ml-engineering compute/accelerator, commit 744d01e); those of a layer are
# smaller. Memory: a GB200 copies at 92% of its peak (Azure, 2025). Network: 368 of 450 GB/s by NCCL's rings on 8 H200 (the
# same repository, network), 82%; an all-gather on a v5e was measured at 82% as well (github.com/jax-ml/scaling-book, 0819a7d).
PRODUCTS, BANDWIDTH, NETWORK = 0.75, 0.9, 0.82
#: Cycles a second of TPUs (sources: `hardware`).
_CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

#: What kernels are for. `stacking`: what a scan over layers writes and copies to keep values for the backward pass.
PARTS = (
    "products", "attention", "elementwise", "stacking", "loss products", "loss", "optimizer", "collectives", "host",
)  # fmt: skip

#: Operations that move nothing.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
#: Custom calls likewise; an asynchronous collective of a TPU goes on inside the fusions beside it.
_FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding",
    "SPMDFullToShardShape", "SPMDShardToFullShape",
}  # fmt: skip
_HOST_SPACE = "S(5)"  # memory space of a layout: the host's


_ITEM = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str  # of the result: "bf16[8,1024]{1,0}", or a tuple of such
    operation: str
    operands: tuple[str, ...]  # names
    text: str  # all after the operation's name

    @functools.cached_property
    def path(self) -> str:
        """Where the source has it: JAX's op_name, "jit(train_step)/jvp()/while/body/ffn/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str | None:
        """First group of a regular expression in what follows the operands."""
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or asynchronous start wraps."""
        return self.attribute(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are scheduled; the last is the root."""

    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(reversed(self.instructions.values()))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Of each name the instructions that read it, and as which operand, bitcasts seen through."""
        direct: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
        for one in self.instructions.values():
            for i, name in enumerate(one.operands):
                direct[name].append((one, i))

        def through(name: str) -> list[tuple[Instruction, int]]:
            found = []
            for user, i in direct[name]:
                found += through(user.name) if user.operation == "bitcast" else [(user, i)]
            return found

        return {name: through(name) for name in self.instructions}

    def type_of(self, name: str) -> str:
        return self.instructions[name].type if name in self.instructions else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and where it begins."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The program of `jax.stages.Compiled.as_text()`. Raises ValueError where there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, instructions = None, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            instructions = {}
            computations[name] = Computation(instructions)
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            instructions = None
        elif instructions is not None and (found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)):
            instructions[found[1]] = _instruction(found[1], line[found.end() :])
    if entry is None:
        raise ValueError("no HLO: a line that begins with ENTRY is missing")
    return Module(computations, entry)


def _instruction(name: str, body: str) -> Instruction:
    """From "TYPE operation(operands), attributes"."""
    end = _closing(body, 0) + 1 if body.startswith("(") else body.index(" ")
    shape, rest = body[:end], body[end:].lstrip()
    operation, _, text = rest.partition("(")
    inside = _closing("(" + text, 0) - 1
    return Instruction(name, shape, operation, tuple(re.findall(r"%([\w.\-]+)", text[:inside])), text)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and dimensions of each array of a type."""
    return [(item, tuple(int(n) for n in sizes.split(",") if n)) for item, sizes in _ARRAY.findall(shape)]


def bytes_of(shape: str) -> float:
    """Bytes of a type as HLO writes it, "bf16[1,1536,4096]{2,1,0:T(8,128)}" or a tuple of such."""
    return sum(_ITEM.get(item, 0) * math.prod(sizes) for item, sizes in arrays(shape))


def trips(module: Module, loop: Instruction) -> int:
    """Of a while loop: as the compiler notes them, or the bound that its condition compares with; 1 where neither is there."""
    if known := loop.attribute(r'known_trip_count\D*?"n":"(\d+)"'):
        return int(known)
    condition = module.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "")
    bounds = [
        int(found[1])
        for one in (condition.instructions.values() if condition else ())
        if one.operation == "constant" and one.type.startswith("s32[]") and (found := re.match(r"(\d+)\)", one.text))
    ]
    return max(bounds, default=1)


_CALLED = re.compile(r"(body|condition|calls|called_computations|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Collectives of a compiled program by kind: how many run, and bytes of their results, loops counted by their trips.

    The TPU compiler writes an all-gather that it overlaps with compute several times, with one channel: it is counted once.
    """
    tpu, module = "T(8,128)" in text, parse(text)

    @functools.cache
    def of(computation: str) -> dict[str, tuple[str, float, float]]:
        """Its collectives, and those of what it calls: a name for each -> kind, times, bytes."""
        found: dict[str, tuple[str, float, float]] = {}
        here = module.computations.get(computation)
        for one in here.instructions.values() if here else ():
            start = one.operation.endswith("-start")
            if (kind := one.operation.removesuffix("-start")) in COLLECTIVES:
                size = bytes_of(one.type)
                if start and one.type.startswith("("):
                    size /= 2 if kind == "all-reduce" else 1  # operands and results
                channel = one.attribute(r"channel_id=(\d+)")
                once = tpu and channel and kind == "all-gather"
                found.setdefault(channel if once else one.name, (kind, 1, size))
            for what, names in _CALLED.findall(one.text):
                times = trips(module, one) if what == "body" else 1
                for callee in names.split(", "):
                    for name, (kind, count, size) in of(callee.removeprefix("%")).items():
                        found.setdefault(name, (kind, count * times, size))
        return found

    total: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for kind, times, size in of(module.entry).values():
        total[kind]["count"] += times
        total[kind]["bytes"] += times * size
    return dict(total)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Something that a device runs, and what it moves and computes in one run."""

    name: str
    part: str  # of PARTS
    bytes: float  # read and written in the device's memory
    flops: float  # of products
    path: str
    attention: str | None = None  # "forward" or "backward"
    head_dim: int = 0  # of attention
    exchanged: float = 0  # bytes received from other devices
    hosted: float = 0  # bytes to and from the host's memory
    cycles: float | None = None  # as the TPU's compiler scheduled it
    started: bool = False  # asynchronous: it runs beside others until it is waited for

    @property
    def phase(self) -> str:
        """Of a training step: forward, backward, loss, optimizer, or accumulation of micro-batches."""
        if "loss" in self.part or self.part == "optimizer":
            return self.part.split()[0]
        if "transpose(" in self.path:
            return "backward"
        adds = re.search(r"(^|/)(eval_jaxpr/)?add$", self.path) and "jvp" not in self.path
        return "accumulation" if adds and self.part == "elementwise" else "forward"

    @property
    def scope(self) -> str:
        """Of a layer: ffn or attention; else ""."""
        found = re.search(r"/(ffn|attention)(/|$)", self.path)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step of one device, by PARTS."""

    seconds: dict[str, float]
    bytes: dict[str, float]
    flops: dict[str, float]
    kernels: int

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


def products(module: Module, computation: str) -> float:
    """FLOPs of the products in a computation and in what it calls: two for each multiplication."""
    here, total = module.computations[computation], 0.0
    for one in here.instructions.values():
        total += _product(here, one)
        if one.operation in ("fusion", "call") and one.called in module.computations:
            total += products(module, one.called)
    return total


def _product(here: Computation, one: Instruction) -> float:
    """FLOPs of a dot, a convolution or a cuBLAS call; 0 of anything else."""
    if one.operation == "dot" or _is_gemm(one):
        pattern = r"lhs_contracting_dims=\{([\d,]*)\}|lhs_contracting_dimensions\":\[([\d\",]*)\]"
        found = re.search(pattern, one.text)
        sizes = arrays(here.type_of(one.operands[0]))
        if found is None or not sizes:
            return 0.0
        contracted = [int(n) for n in re.findall(r"\d+", found[1] or found[2] or "")]
        return 2.0 * math.prod(arrays(one.type)[0][1]) * math.prod(sizes[0][1][i] for i in contracted)
    if one.operation == "convolution":  # how TPUs write products: every size is of two of the three arrays, batches of all
        left, right = (arrays(here.type_of(name))[0][1] for name in one.operands[:2])
        return 2.0 * math.sqrt(math.prod(left) * math.prod(right) * math.prod(arrays(one.type)[0][1]))
    return 0.0


def _is_gemm(one: Instruction) -> bool:
    target = one.attribute(r'custom_call_target="([^"]*)"') if one.operation == "custom-call" else None
    return target is not None and ("cublas" in target or "gemm" in target.lower())


def moved(module: Module, here: Computation, one: Instruction) -> float:
    """Bytes that a kernel reads and writes: of what is sliced the slice, of what is updated in place the update."""
    if one.operation in ("fusion", "fusion-start", "async-start") and one.called in module.computations:
        body = module.computations[one.called]
        read = sum(_reads(module, body, p) for p in body.instructions.values() if p.operation == "parameter")
        return read + _writes(module, body, body.root)
    operands = [here.type_of(name) for name in one.operands]
    match one.operation:
        case "dynamic-slice" | "slice" | "gather":
            return 2 * bytes_of(one.type)
        case "copy-start" | "slice-start":  # its type holds operand, result and context
            return bytes_of(one.type)
        case "dynamic-slice-start":
            sizes = one.attribute(r"dynamic_slice_sizes=\{([\d,]+)\}")
            (item, _), *_ = arrays(operands[0])
            return 2 * _ITEM.get(item, 0) * math.prod(map(int, sizes.split(",")))
        case "dynamic-update-slice" | "dynamic-update-slice-start":
            return 2 * bytes_of(operands[1])
        case "scatter":
            return 3 * bytes_of(operands[2])
    return bytes_of(one.type) + sum(map(bytes_of, operands))


def _reads(module: Module, body: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that the fusion reads."""
    whole, total = bytes_of(parameter.type), 0.0
    for user, i in body.users[parameter.name]:
        if user.operation in ("dynamic-slice", "slice", "gather") and i == 0:
            total += bytes_of(user.type)
        elif user.operation in ("dynamic-update-slice", "scatter") and i == 0:
            continue
        elif user.operation == "fusion" and user.called in module.computations:
            inner = module.computations[user.called]
            total += _reads(module, inner, _parameter(inner, i))
        else:
            return whole
    return min(whole, total)


def _parameter(body: Computation, number: int) -> Instruction:
    return next(p for p in body.instructions.values() if p.operation == "parameter" and p.text.startswith(f"{number})"))


def _writes(module: Module, body: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes for `one`, its root or a part of it."""
    match one.operation:
        case "tuple":
            return sum(_writes(module, body, body.instructions[name]) for name in one.operands)
        case "bitcast" if one.operands:
            return _writes(module, body, body.instructions[one.operands[0]])
        case "dynamic-update-slice":
            return bytes_of(body.type_of(one.operands[1]))
        case "scatter":  # read, added to, written
            return 2 * bytes_of(body.type_of(one.operands[2]))
        case "parameter":
            return 0.0
        case "fusion" if one.called in module.computations:
            inner = module.computations[one.called]
            return _writes(module, inner, inner.root)
    return bytes_of(one.type)


def kernel(module: Module, here: Computation, one: Instruction) -> Kernel | None:
    """What an instruction outside fusions runs; None of those that move nothing, and of the ends of asynchronous ones."""
    target = one.attribute(r'custom_call_target="([^"]*)"') if one.operation == "custom-call" else None
    if one.operation in _FREE or one.operation.endswith("-done") or target in _FREE_CALLS:
        return None
    if kind := next((kind for kind in COLLECTIVES if one.operation in (kind, f"{kind}-start")), None):
        return Kernel(one.name, "collectives", 0, 0, one.path, exchanged=_exchanged(here, one, kind))
    if (direction := _attention(one)) is not None:
        flops, head_dim = _attention_flops(here, one)
        share = {"forward": 2, "dq": 2, "dkv": 3, "backward": 5}[direction]  # of products of the size of the scores
        operands = sum(bytes_of(here.type_of(name)) for name in one.operands)
        way = "forward" if direction == "forward" else "backward"
        return Kernel(one.name, "attention", bytes_of(one.type) + operands, share * flops, one.path, way, head_dim)
    flops = _product(here, one)
    if one.operation in ("fusion", "fusion-start", "async-start") and one.called in module.computations:
        inner = module.computations[one.called].instructions.values()
        if any('custom_call_target="AsyncCollective' in other.text for other in inner):
            return None
        flops = products(module, one.called)
    size, hosted = moved(module, here, one), 0.0
    if _HOST_SPACE in one.type or any(_HOST_SPACE in here.type_of(name) for name in one.operands):
        hosted = size / 2
    cycles = one.attribute(r'"estimated_cycles":"(\d+)"')
    return Kernel(
        one.name,
        "host" if hosted else _part(one, flops),
        size - hosted,
        flops,
        one.path,
        hosted=hosted,
        started=one.operation.endswith("-start"),
        cycles=None if cycles is None else float(cycles),
    )


def _part(one: Instruction, flops: float) -> str:
    """What a kernel is for, by the scope of the source that it comes from."""
    path = one.path
    if "(loss)" in path or "/loss/" in path:
        return "loss products" if flops else "loss"
    if flops:
        return "products"
    if "optimizer" in path or "clip" in path:
        return "optimizer"
    if one.operation in ("copy", "broadcast") or not one.operands or re.search(r"dynamic_(update_)?index_in_dim", path):
        return "stacking"
    return "elementwise"


def _attention(one: Instruction) -> str | None:
    """Which pass of attention a custom call is: our kernels', cuDNN's; None of anything else."""
    if one.operation != "custom-call":
        return None
    target = one.attribute(r'custom_call_target="([^"]*)"') or ""
    if "fmha" in target:
        return "backward" if "Backward" in target else "forward"
    found = re.search(r"gqa_(?:\w+?_)?(forward|dq|dkv|backward)", one.path + " " + one.name)
    return found[1] if found else None


def _attention_flops(here: Computation, one: Instruction) -> tuple[float, int]:
    """FLOPs of one product of the size of the scores, causal, and the head size; zeros where the operands don't say.

    On GPUs queries are (B, T, K, G, H) or (B, T, N, H) and keys (B, S, K, H); on TPUs (B K, G, H, T) and (B K, S, H).
    """
    sizes = [array[1] for name in one.operands for array in arrays(here.type_of(name))[:1] if array[0] != "f32"]
    queries = next((size for size in sizes if len(size) >= 4), None)
    if queries is None:
        return 0.0, 0
    if "tpu_custom_call" in one.text:
        head_dim = queries[2]
        keys = next((size for size in sizes if len(size) == 3 and head_dim in size[1:]), None)
        length = 0 if keys is None else math.prod(keys[1:]) // head_dim
    else:
        head_dim = queries[-1]
        keys = [size for size in sizes if len(size) >= 4][1:2]
        length = keys[0][1] if keys else 0
    return 2.0 * math.prod(queries) * length / 2, head_dim


def _exchanged(here: Computation, one: Instruction, kind: str) -> float:
    """Bytes that a device receives: an all-gather all but its own part, an all-reduce twice that, as rings do."""
    size = _group(one)
    lacking = (size - 1) / size if size else 1.0
    operands = sum(bytes_of(here.type_of(name)) for name in one.operands)
    match kind:
        case "all-gather":
            return operands * (size - 1 if size else 1)
        case "all-reduce":
            return 2 * operands * lacking
        case "reduce-scatter" | "all-to-all":
            return operands * lacking
    return operands


def _group(one: Instruction) -> int:
    """Devices that take part together; 0 where it is not said."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", one.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", one.text):
        return int(tiled[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", one.text):
        return len(listed[1].split(","))
    return 0


def kernels(module: Module) -> Iterator[tuple[Kernel, int]]:
    """Every kernel of a step and how often it runs, in the order of the schedule."""

    def of(name: str, times: int) -> Iterator[tuple[Kernel, int]]:
        here = module.computations[name]
        for one in here.instructions.values():
            if one.operation == "while":
                yield from of(one.attribute(r"body=%?([\w.\-]+)"), times * trips(module, one))
            elif one.operation == "call":
                yield from of(one.called, times)
            elif (found := kernel(module, here, one)) is not None:
                yield found, times

    yield from of(module.entry, 1)


def seconds_of(one: Kernel, chip: Chip) -> float:
    """Of a kernel alone; of a collective or a copy to the host if nothing hid it."""
    if one.cycles is not None and chip.name in _CLOCK:
        return one.cycles / _CLOCK[chip.name]
    if one.started and chip.tpu is not None and not one.hosted:
        return 0.0  # copies between the chip's memories, under way while others compute
    if one.exchanged:
        return one.exchanged / (NETWORK * chip.interconnect)
    if one.attention is not None:
        forward, backward = attention_shares(chip, one.head_dim)
        rate = (forward if one.attention == "forward" else backward) * chip.peak_flops
        return max(one.flops / rate if one.flops else 0.0, one.bytes / (BANDWIDTH * chip.memory_bandwidth))
    if one.hosted:
        return one.hosted / host_bandwidth(chip)
    return max(one.bytes / (BANDWIDTH * chip.memory_bandwidth), one.flops / (PRODUCTS * chip.peak_flops))


def static_cost(text: str, chip: Chip, context: tuple[str, int] = ("gather", 1)) -> Cost:
    """Of one device's program, from its optimized HLO.

    `context`: the way of attention over a context axis, and its size: calls have offsets or no mask there (`context_scale`).
    """
    module, scale = parse(text), context_scale(*context)
    moved_bytes, flops, count = defaultdict(float), defaultdict(float), 0
    for one, times in kernels(module):
        moved_bytes[one.part] += times * (one.bytes + one.exchanged + one.hosted)
        flops[one.part] += times * one.flops * (scale if one.attention else 1.0)
        count += times
    return Cost(dict(_schedule(module, module.entry, chip, scale)), dict(moved_bytes), dict(flops), count)


def context_scale(method: str, size: int) -> float:
    """Scores that calls of attention on one of `size` devices compute, over half of queries x keys, which is counted.

    By "gather" a block of the front sees half of the front's keys in the mean, one of the back three quarters of all; by "ring"
    all but the first of `size` visits are of queries that see all of their keys.
    """
    if size == 1:
        return 1.0
    return 4 / 3 if method == "gather" else 2 * size / (size + 1)


def static_seconds(text: str, chip: Chip, context: tuple[str, int] = ("gather", 1)) -> float:
    """`static_cost(...).total`."""
    return static_cost(text, chip, context).total


def _schedule(module: Module, name: str, chip: Chip, scale: float) -> dict[str, float]:
    """Seconds of a computation by part: kernels one after another, what is asynchronous beside them until it is waited for."""
    here = module.computations[name]
    seconds: dict[str, float] = defaultdict(float)
    now = 0.0
    free = {"collectives": 0.0, "host": 0.0}  # when the links are
    ends: dict[str, tuple[str, float]] = {}

    def add(part: str, value: float) -> None:
        nonlocal now
        seconds[part] += value
        now += value

    for one in here.instructions.values():
        if one.operation == "while":
            times = trips(module, one)
            for part, value in _schedule(module, one.attribute(r"body=%?([\w.\-]+)"), chip, scale).items():
                add(part, times * value)
        elif one.operation == "call":
            for part, value in _schedule(module, one.called, chip, scale).items():
                add(part, value)
        elif one.operation.endswith("-done") and one.operands and one.operands[0] in ends:
            part, end = ends[one.operands[0]]
            add(part, max(0.0, end - now))
        elif (found := kernel(module, here, one)) is not None:
            if found.attention:
                found = dataclasses.replace(found, flops=scale * found.flops)
            if found.part in free and one.operation.endswith("-start"):
                free[found.part] = max(now, free[found.part]) + seconds_of(found, chip)
                ends[one.name] = found.part, free[found.part]
            else:
                add(found.part, seconds_of(found, chip))
    return seconds
