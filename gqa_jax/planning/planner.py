"""Which mesh, rematerialisation and accumulation a run gets on the devices there are, what it needs and how long it takes.

Arithmetic on shapes, a fraction of a millisecond a case. Memory is calibrated against programs compiled ahead of time
(`gqa_jax.planning.compile_check`). Time is told twice. The bound is what no step beats: in each phase the slowest of compute,
memory and network at their peaks, all the others hidden behind it. The expectation is what compiled programs have, whose
kernels run one after another: products, attention and passes over memory add up, each at the share of its peak that kernels
reach (`hardware.Calibration`), with the bytes that the compiler's kernels move (`planning.traffic`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator

from gqa_jax import costs, hardware
from gqa_jax.config import CONTEXT_ATTENTION, Execution, TrainConfig
from gqa_jax.errors import ConfigError
from gqa_jax.hardware import CHIPS, Chip
from gqa_jax.mesh import PARAMETERS, MeshShape, divisors
from gqa_jax.planning import traffic
from gqa_jax.planning.share import Share

CHUNK_LOGITS = 2**26  # gqa_jax.training.loss.CHUNK_LOGITS
# The compiled program may need so many times the estimate: of more than 50 compiled for TPUs one needed more than 1.09 times
# (85M at 32K on a v6e-4, "full": 1.16), of more than 100 for GPUs, attention by pallas_triton, none more than 1.17 times;
# tests/test_planner.py compares them.
MARGIN, MARGIN_GPU = 1.1, 1.2
SUM_BYTES = 4  # of a value of gradients, summed over micro-batches and devices in float32 (gqa_jax.training.program)
# Of what GPUs receive, the share that the compiled schedules wait for, by what it is: gathered weights and summed gradients of
# them, sums over the tensor axis, keys and values over the context axis, sums of gradients over the data axis.
EXPOSED = {"weights": 0.2, "tensor": 0.55, "context": 0.55, "data": 0.85}
# Passes over logits and parameters on a TPU, by the cycles that its compiler estimates, over those of a GPU's kernels.
TILED_PASSES = {"loss": 0.54, "optimizer": 1.3}
ALIKE = 0.02  # times that differ by less are taken as equal: the simpler execution is chosen
PARTS = ("matmul", "attention", "memory", "network", "host")
SEARCHED_REMAT = ("none", "dots", "attention_only", "full", "offload")  # from the most memory to the least


# Bytes/s between a device and its host's memory, one way: TPU hosts, jax-ml.github.io/scaling-book/tpus; GPUs, PCIe 5.0 x 16.
_HOST_BANDWIDTH = {"tpu": 16e9, "gpu": 64e9}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Seconds of one phase of a step, by what takes them: matmul, attention, memory, network, host.

    `at_peak` is each alone at its peak, `expected` what each adds to the step.
    """

    name: str  # forward, backward, loss, accumulation, optimizer
    at_peak: dict[str, float]
    expected: dict[str, float]

    @property
    def bound(self) -> float:
        """The longest: products and attention share the matrix units, passes over memory and copies to the host the memory."""
        peak = self.at_peak
        return max(peak["matmul"] + peak["attention"], peak["memory"] + peak["host"], peak["network"])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an execution needs of every device, and its time. Bytes are of one device, FLOPs of all."""

    execution: Execution
    bytes_arguments: float  # parameters, moments and the batch
    bytes_temporary: float  # gradients, activations, what is gathered
    bytes_limit: float  # that a program may use
    fits: bool  # with a margin for the error of the estimate: never where the compiler says no
    flops: float  # of a step: forward and twice that, causal attention
    collective_bytes: dict[str, float]  # received per device and step, by mesh axes
    seconds: dict[str, float]  # of a step at least, by what limits it: compute, attention, memory, network
    collectives: int  # of a step, at least
    phases: tuple[Phase, ...]

    @property
    def seconds_step(self) -> float:
        """The least that a step takes."""
        return sum(self.seconds.values())

    @property
    def expected(self) -> dict[str, float]:
        """Seconds that a step is expected to take, by what takes them: matmul, attention, memory, network, host."""
        return {part: sum(phase.expected[part] for phase in self.phases) for part in PARTS}

    @property
    def seconds_expected(self) -> float:
        """What a step is expected to take, within the error of the chip's calibration."""
        return sum(self.expected.values())

    @property
    def limited_by(self) -> str:
        """What limits most of a step at its bound."""
        return max(self.seconds, key=self.seconds.__getitem__)


def resolve(config: TrainConfig, device_kind: str, n_devices: int, n_processes: int = 1) -> TrainConfig:
    """`config` with its mesh, remat, accumulation_steps and context_attention filled in; what was given is kept.

    `device_kind` is JAX's name. On a CPU, or on a device that no table knows: unless a mesh is given one device, or fsdp over
    those of several processes; nothing computed again, no accumulation. Elsewhere the best of `choose`, in the memory that this
    process' environment lets JAX take (`hardware.memory_fraction`). Raises ConfigError for a mesh that is not of `n_devices`,
    and where none suits.
    """
    chip = hardware.chip_of(device_kind)
    if chip is not None:
        best = choose(config, hardware.on_this_machine(chip, os.environ), n_devices)[0]
        return dataclasses.replace(config, execution=best.execution)
    given = config.execution
    if given.mesh is not None and given.mesh.n_devices not in (1, n_devices):
        raise ConfigError(_mesh_of_another_size(config, n_devices))
    default = MeshShape() if n_processes == 1 else MeshShape(fsdp=n_devices)
    execution = dataclasses.replace(
        given,
        mesh=given.mesh or default,
        remat=given.remat or "none",
        accumulation_steps=given.accumulation_steps or 1,
        context_attention=given.context_attention or CONTEXT_ATTENTION[0],
    )
    return dataclasses.replace(config, execution=execution)


def what_fits(config: TrainConfig, device_kind: str, n_devices: int) -> str:
    """How the run would be carried out in less memory, by the planner's estimate."""
    chip = hardware.chip_of(device_kind)
    if chip is None:
        return "raise execution.accumulation_steps, set execution.remat to full, or use a mesh of more devices"
    anyhow = dataclasses.replace(config, execution=Execution(attention=config.execution.attention))
    for found in choose(anyhow, hardware.on_this_machine(chip, os.environ), n_devices):
        if found.fits and (other := found.execution) != config.execution:
            return (
                f"execution.mesh={other.mesh}, execution.remat={other.remat}, execution.accumulation_steps="
                f"{other.accumulation_steps}, execution.context_attention={other.context_attention} should fit"
            )
    return f"nothing else fits on {n_devices} of them: use more"


def choose(config: TrainConfig, chip: Chip, n_devices: int) -> list[Estimate]:
    """Estimates of what is open, best first: by the time expected; of those alike, fewest collectives.

    Of each mesh, policy and way of attention, only the fewest micro-batches that fit. Where nothing fits the list has what
    needs the least memory first. Raises ConfigError when no mesh of `n_devices` suits the run.
    """
    chosen: dict[tuple, Execution] = {}
    settled = set()
    for execution in candidates(config, chip, n_devices):
        group = execution.mesh, execution.remat, execution.context_attention
        if group not in settled:
            chosen[group] = execution
            if _fits(_memory(Share(config, execution, chip.tpu is not None)), chip):
                settled.add(group)
    best = [estimate(config, execution, chip) for execution in chosen.values()]
    if not best:
        raise ConfigError(_no_mesh(config, n_devices))
    fitting = [e for e in best if e.fits]
    if not fitting:
        return sorted(best, key=lambda e: e.bytes_arguments + e.bytes_temporary)
    seconds = {id(e): e.seconds_expected for e in fitting}
    alike = (1 + ALIKE) * min(seconds.values())

    def order(e: Estimate) -> tuple[bool, int, float]:
        near = seconds[id(e)] <= alike
        return not near, e.collectives if near else 0, seconds[id(e)]

    return sorted(fitting, key=order)


def candidates(config: TrainConfig, chip: Chip, n_devices: int) -> Iterator[Execution]:
    """Every execution on `n_devices` that the configuration leaves open and the mesh allows; fewest micro-batches first."""
    given = config.execution
    policies = (given.remat,) if given.remat else SEARCHED_REMAT
    if given.remat is None and chip.host_memory_bytes is None:
        policies = tuple(policy for policy in policies if policy != "offload")
    accumulations = [given.accumulation_steps] if given.accumulation_steps else divisors(config.batch_size)
    for shape in meshes(config, n_devices):
        open_methods = CONTEXT_ATTENTION[: 2 if shape.context > 1 else 1]
        methods = (given.context_attention,) if given.context_attention else open_methods
        for steps in accumulations:
            if shape.unsupported_reason(config.model, config.context_length, config.batch_size // steps) is None:
                for remat, method in itertools.product(policies, methods):
                    yield Execution(shape, remat, steps, method, given.attention)


def meshes(config: TrainConfig, n_devices: int) -> Iterator[MeshShape]:
    """The meshes of `n_devices` that the whole batch divides into, or the one given. Raises ConfigError for its size."""
    if (given := config.execution.mesh) is not None:
        if given.n_devices != n_devices:
            raise ConfigError(_mesh_of_another_size(config, n_devices))
        yield given
        return
    for tensor in divisors(n_devices):
        for context in divisors(n_devices // tensor):
            for data in divisors(n_devices // tensor // context):
                shape = MeshShape(data, n_devices // tensor // context // data, tensor, context)
                if shape.unsupported_reason(config.model, config.context_length, config.micro_batch) is None:
                    yield shape


def _mesh_of_another_size(config: TrainConfig, n_devices: int) -> str:
    mesh = config.execution.mesh
    open_config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, mesh=None))
    return f"mesh {str(mesh)!r} is of {mesh.n_devices} devices and there are {n_devices}: leave it out, or use " + (
        " or ".join(map(str, itertools.islice(meshes(open_config, n_devices), 4))) or "another number of devices"
    )


def _no_mesh(config: TrainConfig, n_devices: int) -> str:
    plain = MeshShape(fsdp=n_devices)
    return (
        f"no mesh of {n_devices} devices suits batches of {config.batch_size} sequences of {config.context_length} tokens; "
        f"{str(plain)!r}, for one: {plain.unsupported_reason(config.model, config.context_length, config.micro_batch)}"
    )


def estimate(config: TrainConfig, execution: Execution, chip: Chip) -> Estimate:
    """What `execution` of `config` needs on every chip, and its time."""
    share = Share(config, execution, chip.tpu is not None)
    arguments, temporary = _memory(share)
    flops = costs.train_flops(config.model, config.context_length, config.batch_tokens, "exact")
    phases, collectives = _phases(share, chip)
    seconds: dict[str, float] = dict.fromkeys(("compute", "attention", "memory", "network"), 0.0)
    for phase in phases:
        peak, longest = phase.at_peak, phase.bound
        if longest == peak["matmul"] + peak["attention"]:
            seconds["compute"] += peak["matmul"]
            seconds["attention"] += peak["attention"]
        else:
            seconds["network" if longest == peak["network"] else "memory"] += longest
    return Estimate(
        execution=execution,
        bytes_arguments=arguments,
        bytes_temporary=temporary,
        bytes_limit=chip.memory_bytes,
        fits=_fits((arguments, temporary), chip),
        flops=float(flops),
        collective_bytes=collectives,
        seconds=seconds,
        collectives=_count_collectives(share),
        phases=tuple(phases),
    )


def _fits(used: tuple[float, float], chip: Chip) -> bool:
    """Whether a program of these bytes fits, with a margin for the error of the estimate."""
    return sum(used) * (MARGIN if chip.tpu is not None else MARGIN_GPU) <= chip.memory_bytes


def attention_shares(chip: Chip, head_dim: int) -> tuple[float, float]:
    """Shares of the peak that attention reaches, forward and backward; of a GPU without figures those of an H100."""
    known = chip if chip.attention_share or chip.gpu is None else CHIPS["h100"]
    return known.attention_shares(head_dim)


def host_bandwidth(chip: Chip) -> float:
    """Bytes/s between a device and its host's memory, one way."""
    return _HOST_BANDWIDTH["gpu" if chip.tpu is None else "tpu"]


def _phases(share: Share, chip: Chip) -> tuple[list[Phase], dict[str, float]]:
    """The phases of a step, and bytes received by mesh axes; of one device."""
    s, execution, mesh = share, share.execution, share.execution.mesh
    steps, parts = execution.accumulation_steps, mesh.parameters
    forward_share, backward_share = chip.attention_shares(s.h)
    projections = steps * s.tokens * s.layers * 4 * s.d * s.h * (s.n + s.k)
    ffn = steps * s.tokens * s.layers * 6 * s.d * s.f
    scores = steps * s.tokens * s.layers * 4 * (s.config.context_length / 2) * s.n * s.h  # causal
    logits = steps * s.tokens / mesh.tensor * s.config.model.vocab_size

    # computed again: all but what nothing needs, the FFN's last product; attention too unless its results are kept, as those of
    # all kernels that are chosen by default are (gqa_jax.attention.results_saveable)
    again_products, again_scores = {
        "none": (0, 0),
        "dots": (0, scores),
        "full": (projections + ffn * 2 / 3, scores),
    }.get(execution.remat, (projections + ffn * 2 / 3, 0))

    def lacking(parts: int) -> float:  # of what is gathered from `parts` devices, the share that a device has not
        return (parts - 1) / parts

    collectives: dict[str, float] = defaultdict(float)
    weights = steps * s.layers * s.layer_weights * lacking(parts)
    weights_axes, embedding_axes = (
        ",".join(axis for axis in axes if mesh.sizes[axis] > 1) for axes in (PARAMETERS, (*PARAMETERS, "tensor"))
    )
    embedding = steps * s.embedding * lacking(parts * mesh.tensor)
    stream = steps * s.tokens * s.d * s.activation * 2 * lacking(mesh.tensor)  # one sum over tensor
    keys = steps * s.layers * s.tokens * mesh.context * 2 * s.k * s.h * lacking(mesh.context)
    gathers_again = execution.remat != "none"
    ring = execution.context_attention == "ring"

    network = {  # what for, axes and bytes
        "forward": [
            ("weights", weights_axes, weights * s.activation),
            ("tensor", "tensor", 2 * s.layers * stream),
            ("context", "context", keys * s.activation),
        ],
        "backward": [
            ("weights", weights_axes, weights * (s.activation + 4)),
            ("tensor", "tensor", (3 if gathers_again else 2) * s.layers * stream),
            ("context", "context", keys * ((s.activation if gathers_again or ring else 0) + 4)),
        ],
        "loss": [
            ("weights", embedding_axes, embedding * (s.vocabulary_matrices * s.activation + 8)),
            ("tensor", "tensor", 2 * stream),
        ],
        "optimizer": [("data", "data", 2 * s.parameters * SUM_BYTES * lacking(mesh.data))],
    }
    for _, axes, value in itertools.chain.from_iterable(network.values()):
        if value:
            collectives[axes] += value

    # operands and results of the products, once each; what is gathered or kept is written and read
    values = 6 * s.d + 4 * s.n * s.h + 4 * s.k * s.h + 5 * s.f
    layer_bytes = steps * (s.layers * (s.tokens * values + 2 * s.layer_weights) * s.activation + s.kept)
    offloaded = 2 * steps * s.layers * s.tokens * s.d * s.activation if execution.remat == "offload" else 0

    backward_scores = 2.5 * scores / backward_share + again_scores / forward_share  # five products for the forward pass' two
    likely = attention_shares(chip, s.h)
    attention_seconds = {
        "forward": scores / likely[0] / chip.peak_flops,
        "backward": (2.5 * scores / likely[1] + again_scores / likely[0]) / chip.peak_flops,
    }
    work = {  # FLOPs of products, of attention over its share of the peak, bytes of memory, of the host's memory
        "forward": (projections + ffn, scores / forward_share, layer_bytes, offloaded / 2),
        "backward": (2 * (projections + ffn) + again_products, backward_scores, 2 * layer_bytes, offloaded / 2),
        "loss": (6 * s.d * logits, 0.0, 14 * logits, 0.0),  # written and read in float32, their gradients in bfloat16
        "accumulation": (0.0, 0.0, 0.0, 0.0),
        # parameters and moments read and written; gradients read for their norm and again
        "optimizer": (0.0, 0.0, s.parameters * (6 * s.parameter + 2 * SUM_BYTES), 0.0),
    }
    reached, moved, phases = hardware.calibration(chip), traffic.moved(s), []
    memory_reached = reached.bandwidth * chip.memory_bandwidth
    products = _matmul(s, reached.products * chip.peak_flops, memory_reached)
    for name, (flops, attention, memory, host) in work.items():
        received = network.get(name, ())
        peak = {
            "matmul": flops / chip.peak_flops,
            "attention": attention / chip.peak_flops,
            "memory": memory / chip.memory_bandwidth,
            "network": sum(value for *_, value in received) / chip.interconnect,
            "host": host / host_bandwidth(chip),
        }
        scored = attention_seconds.get(name, 0.0)
        passes = moved[name] * (TILED_PASSES.get(name, reached.passes) if s.tiled else 1.0) / memory_reached
        # what comes back from the host is waited for; what goes there is written beside the rest of the layer
        beside = products["forward"] + scored + passes if name == "forward" else 0.0
        expected = {  # kernels one after another, copies to the host beside them as far as they go
            "matmul": products.get(name, 0.0),
            "attention": scored,
            "memory": passes,
            "network": sum(EXPOSED[what] * value for what, _, value in received) / (reached.network * chip.interconnect),
            "host": max(0.0, peak["host"] - beside),
        }
        phases.append(Phase(name, peak, expected))
    return phases, dict(collectives)


def _matmul(s: Share, flops: float, memory: float) -> dict[str, float]:
    """Seconds of the products of a step by phase, each by the longer of its FLOPs and of the bytes of its three matrices.

    `flops` and `memory` are what a device reaches in a second.
    """
    steps, a = s.execution.accumulation_steps, s.activation

    def product(rows: float, inner: float, columns: float, result: float = a) -> float:
        size = a * (rows * inner + inner * columns) + result * rows * columns
        return max(2 * rows * inner * columns / flops, size / memory)

    heads, keys = s.n * s.h, s.k_held * s.h
    attention = ((s.d, heads), (s.d, keys), (s.d, keys), (heads, s.d))
    inward, outward = ((s.d, s.f), (s.d, s.f)), ((s.f, s.d),)

    def forward(shapes) -> float:
        return sum(product(s.tokens, inner, columns) for inner, columns in shapes)

    def backward(shapes) -> float:  # of the operand, and of the matrix
        return sum(product(s.tokens, columns, inner) + product(inner, s.tokens, columns) for inner, columns in shapes)

    again = 0.0 if s.execution.remat in ("none", "dots") else forward((*attention, *inward))
    everything = (*attention, *inward, *outward)
    vocabulary, tokens = s.config.model.vocab_size, s.tokens / s.execution.mesh.tensor
    chunk = min(tokens, 2 ** int(math.log2(CHUNK_LOGITS / vocabulary)))
    loss = product(chunk, s.d, vocabulary, 4) + product(chunk, vocabulary, s.d, 8) + product(vocabulary, chunk, s.d, 8)
    return {
        "forward": steps * s.layers * forward(everything),
        "backward": steps * s.layers * (backward(everything) + again),
        "loss": steps * math.ceil(tokens / chunk) * loss,
    }


def _count_collectives(share: Share) -> int:
    """Collectives of a step, those of a layer's weights in one direction counted as one."""
    mesh, steps = share.execution.mesh, share.execution.accumulation_steps
    weights = 3 * share.layers + 2 + share.vocabulary_matrices if mesh.parameters > 1 else 0
    tensor = 5 * share.layers + 3 if mesh.tensor > 1 else 0
    hops = mesh.context if share.execution.context_attention == "ring" else 1
    context = 3 * hops * share.layers if mesh.context > 1 else 0
    return steps * (weights + tensor + context) + (1 if mesh.data > 1 else 0)


@functools.lru_cache(maxsize=4096)
def _parameter_bytes(shapes: tuple[tuple[int, ...], ...], item: float, tiled: bool) -> float:
    """Bytes of arrays of these shapes. TPUs hold tiles of 8 x 128 over the two axes, of all, that are padded the least."""
    if not tiled:
        return sum(map(math.prod, shapes)) * item

    def tiles(shape: tuple[int, ...]) -> int:
        if len(shape) == 1:
            return _up(shape[0], min(1024, max(128, 1 << (shape[0] - 1).bit_length())))
        size = math.prod(shape)
        return min(
            size // (a * b) * _up(a, min(8, 1 << (a - 1).bit_length())) * _up(b, 128)
            for a, b in itertools.permutations(shape, 2)
        )

    return sum(map(tiles, shapes)) * item


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _memory(share: Share) -> tuple[float, float]:
    """Bytes of arguments and of temporaries of the compiled step on one device.

    Arguments are exact. Temporaries are what the layers keep for the backward pass, by policy exact, and the larger of what
    the loss and the backward pass of a layer need beside it: arrays that the compiled programs hold at once.
    """
    s, execution, mesh = share, share.execution, share.execution.mesh
    parameters = _parameter_bytes(s.shapes, s.parameter, s.tiled)
    inputs = 3 if s.config.data.document_mask else 2
    arguments = 3 * parameters + inputs * 4 * s.tokens * execution.accumulation_steps

    a, heads, keys = s.activation, s.n * s.h, s.k * s.h
    # while a layer is differentiated, arrays in use at once: of its feed-forward network; or of its attention, and what is left
    if s.tiled:
        at_once = {"none": (3, 1, 6), "dots": (3, 1, 6), "full": (4, 3, 3.5), "offload": (4, 3, 6)}
    else:
        at_once = {"none": (3, 1, 6), "dots": (3.5, 1, 6), **dict.fromkeys(("full", "attention_only", "offload"), (6.5, 3, 6))}
    ffn, left, attention = at_once.get(execution.remat, (5, 3, 6))
    working = s.tokens * a * (1.5 * s.d + max(ffn * s.f, left * s.f + attention * (heads + keys)))
    if mesh.context > 1:
        if execution.context_attention == "gather":
            working += 3 * s.tokens * mesh.context * 2 * keys * a
        else:
            working += s.tokens * 4 * (heads + 2 * keys)
    of_layers = _parameter_bytes(s.shapes[1:], s.parameter, s.tiled)  # and of the head of an untied model
    # A copy of all weights in the dtype of the computation, unless they have it; on GPUs only where it is kept.
    narrow = s.config.model.param_dtype == s.config.model.dtype
    cast = 0 if narrow or not (s.tiled or execution.remat == "none") else a
    weights = s.layers * s.layer_weights / mesh.parameters * cast + s.layer_weights * (a + 4)
    if not s.tiled:
        working += 5 * s.tokens * a * s.d if mesh.tensor > 1 else 0  # the stream, before and after sums over tensor
        # beside copies to the host the compiler may gather the weights of all layers at once
        weights += s.layers * s.layer_weights * a if execution.remat == "offload" and mesh.parameters > 1 else 0
    embedding = s.embedding * (s.vocabulary_matrices * a + 4)
    chunk = min(s.tokens / mesh.tensor, 2 ** int(math.log2(CHUNK_LOGITS / s.config.model.vocab_size)))
    loss = chunk * s.config.model.vocab_size * 4 + s.tokens * s.d * a
    # of the micro-batches before: float32, whatever the parameters are
    sums = _parameter_bytes(s.shapes, SUM_BYTES, s.tiled) if execution.accumulation_steps > 1 else 0
    return arguments, s.kept + embedding + sums + max(working + of_layers + weights, loss)
