"""Public measurements of training against a bound, and against what is expected of their parts at fitted efficiencies.

    python -m benchmarks.public_training            the tables of docs/training-measured.md
    python -m benchmarks.public_training --rows     every row: tokens a second measured, expected, bound

benchmarks/public/training_measured.csv holds what was published, word for word, and after it how a row is read here:

    model_key, chip, devices, context
    computes                   dtype of the products in layers; unembedding and attention stay in 16 bits
    tensor, pipeline, virtual, context_parallel      devices that share a layer, layers, stages of one device, a sequence
    sharded, gathers           devices that parameters are sharded over; how often a micro-batch gathers them
    micro_batch, micro_batches sequences of a micro-batch, of the devices that share them; of a step
    recomputed                 products of a layer that the backward pass computes again, and `attention`
    recomputed_layers          of so many layers; empty: of all
    counts                     scores in the source's TFLOP/s: full, half (causal)
    kernel                     of attention: flash-1, flash-2, or chip: as `Chip.attention_shares`
    use, reading               fit, or bound: compared with the bound alone; why it is read so

Bound: 3 x forward FLOPs at the peak of the narrowest operands, or parameters read forward and backward. Expected: the sum of

    matmul       products with parameters, recomputed ones too, at a share of the peak of their operands
    attention    its forward FLOPs, 2.5 times as many backward, recomputed ones too, at the share of its kernel
    traffic      activations, logits, parameters and moments read and written once, at a share of the bytes/s
    exchange     parameters, gradients and activations between devices: least seconds over the links, times a number

times what a pipeline's bubble adds. Efficiencies are fitted on half of the rows: of each group, chip and width of operands
every other one, in the order of the file. By least squares of logarithms with a robust loss.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.public import comparison
from benchmarks.public.comparison import Errors, every_other, markdown
from benchmarks.public.training_models import DEVICES, JOINED, KERNELS, MODELS, Model
from gqa_jax.hardware import Chip

MEASURED = Path(__file__).parent / "public" / "training_measured.csv"
PARTS = ("matmul", "matmul_8", "attention", "traffic", "exchange")
ELEMENT = 2  # bytes of an activation, of a gathered parameter, of a gradient that is exchanged
#: Read and written a step for a parameter that a device keeps: it and two moments both ways, its gradient read; float32.
OPTIMIZER_BYTES = 28
LOGIT_PASSES = 5  # logits written, read by the loss, their gradient written and read by two products
#: Backward over forward FLOPs of an attention kernel, which computes its scores again; of the model's FLOPs it is 2.
ATTENTION_BACKWARD = 2.5
#: Rows of longer sequences aren't in the default utilisation: `MFU_CONTEXT` tokens at most.
MFU_CONTEXT = 8192


class Case(NamedTuple):
    """A row of the file; seconds are of a micro-batch on one device."""

    row: int
    group: str
    device_class: str  # gpu or tpu
    chip: str
    context: int
    bits: int  # of the operands of products in layers
    fitted: bool
    tokens: float  # of a device
    seconds: float  # measured
    parts: np.ndarray  # [part] at the peaks
    bubble: float  # seconds with the pipeline's bubble over those without
    bound: float
    mfu: float  # 3 x forward FLOPs over the bfloat16 peak's, causal attention counted by half


def read() -> pd.DataFrame:
    """The rows of `training_measured.csv`."""
    frame = pd.read_csv(MEASURED, keep_default_na=False, na_values=[""])
    return frame.assign(recomputed=frame["recomputed"].fillna(""), counts=frame["counts"].fillna(""))


def forward_flops(model: Model, context: float) -> tuple[float, float, float]:
    """FLOPs of a token: products in layers, unembedding, attention to the keys that it sees, of all tokens the mean."""
    scores = sum(4 * group.count * group.n_heads * group.head_dim * group.keys(context) for group in model.layers)
    return 2 * model.layer_params, 2 * model.head_params, scores


def source_flops(model: Model, context: int, counts: str, group: str) -> float:
    """FLOPs of a trained token as its source counts them: all scores or half of them; llm-foundry counts every parameter."""
    layers, head, scores = forward_flops(model, context)
    products = 6 * model.params(context) if group == "llm-foundry" else 3 * (layers + head)
    return products + 3 * scores * (2 if counts == "full" else 1)


def tokens_per_second(row) -> float:
    """Measured, of a device; from TFLOP/s where that is all there is."""
    if not math.isnan(row.tokens_per_s_per_device):
        return row.tokens_per_s_per_device
    return row.tflops_per_device * 1e12 / source_flops(MODELS[row.model_key], row.context, row.counts, row.group)


@functools.cache
def cases() -> tuple[Case, ...]:
    """All rows, in the order of the file."""
    return tuple(_case(row) for row in read().itertuples())


def _case(row) -> Case:
    model, chip = MODELS[row.model_key], DEVICES[row.chip]
    micro = 1.0 if math.isnan(row.micro_batch) else row.micro_batch
    sharing = row.tensor * row.pipeline  # devices that share the products of a token
    tokens = micro * row.context / row.context_parallel / sharing
    flops = 3 * sum(forward_flops(model, row.context))
    held = ELEMENT * model.params(row.context) / sharing  # bytes of parameters that a device multiplies by
    bound = max(
        tokens * flops / chip.peak(row.computes),
        2 * held / max(row.sharded, 1) / row.micro_batches / chip.memory_bandwidth,
    )
    rate = tokens_per_second(row)
    return Case(
        row.row, row.group, "tpu" if chip.tpu is not None else "gpu", row.chip, row.context,
        16 if row.computes == "bfloat16" else 8, row.use == "fit", tokens, tokens / rate,
        _parts(row, model, chip, tokens, held), 1 + (row.pipeline - 1) / (row.virtual * row.micro_batches),
        bound, rate * flops / chip.peak_flops,
    )  # fmt: skip


def _parts(row, model: Model, chip: Chip, tokens: float, held: float) -> np.ndarray:
    """[part] seconds at the peaks of a device and micro-batch."""
    layers, head, scores = forward_flops(model, row.context)
    recomputed = set(row.recomputed.split())
    again = 1.0 if math.isnan(row.recomputed_layers) else row.recomputed_layers / model.n_layers  # of the layers
    if "down" in recomputed:
        recomputed |= {"extra"}
    products = 3 * layers + again * 2 * sum(
        group.count * size for group in model.layers for name, size in group.params(model.d_model).items() if name in recomputed
    )
    forward, backward = _attention_shares(row.kernel, model, chip)
    passes = (1 + again * ("attention" in recomputed)) / forward + ATTENTION_BACKWARD / backward
    values = LOGIT_PASSES * model.vocab_size
    for group in model.layers:
        for name, number in group.values(model.d_model).items():
            of = {"qkv": {"q", "k", "v"}, "gate_up": {"gate", "up"}}.get(name, {name})
            values += group.count * number * (3 + again * bool(of & recomputed))  # backward: twice as many as forward
    moved = ELEMENT * values * tokens + (3 + again * bool(recomputed)) * held
    moved += OPTIMIZER_BYTES * model.params(row.context) / row.devices / row.micro_batches
    narrow = row.computes != "bfloat16"
    seconds = {
        "matmul": tokens * (3 * head + (0.0 if narrow else products)) / chip.peak_flops,
        "matmul_8": tokens * products / chip.peak(row.computes) if narrow else 0.0,
        "attention": tokens * scores * passes / chip.peak_flops,
        "traffic": moved / chip.memory_bandwidth,
        "exchange": _exchange(row, model, chip, tokens, held),
    }
    return np.array([seconds[name] for name in PARTS])


def _attention_shares(kernel: str, model: Model, chip: Chip) -> tuple[float, float]:
    """Share of the peak that the kernel reaches, forward and backward."""
    if kernel in KERNELS:
        return KERNELS[kernel][chip.gpu.compute_capability[0]]
    shares = [chip.attention_shares(group.head_dim) for group in model.layers]
    counts = [group.count for group in model.layers]
    return tuple(np.average(each, weights=counts) for each in zip(*shares, strict=True))


def _exchange(row, model: Model, chip: Chip, tokens: float, held: float) -> float:
    """Least seconds of exchanges of a device and micro-batch, `held` bytes of parameters."""
    joined = JOINED.get(row.chip, 8)

    def gather(size: float, members: float, apart: float) -> float:
        """An all-gather, or a reduce-scatter, of `size` bytes over devices so far apart, in one fabric or several."""
        inside = max(1.0, min(members, joined / apart))
        seconds = size * (1 - 1 / members) / chip.interconnect
        if members > inside and chip.network is not None:
            seconds = max(seconds, size * (1 - inside / members) / inside / chip.network)
        return seconds

    sharing = row.tensor * row.context_parallel
    seconds = (row.gathers + 1) * gather(held, row.sharded, sharing)  # the last: gradients
    replicas = row.devices / row.pipeline / (row.tensor if row.sharded == 1 else sharing) / row.sharded
    seconds += 2 * gather(held / row.sharded, replicas, row.tensor * row.sharded) / row.micro_batches
    # A layer's two sums over tensor-parallel devices, forward and backward; tokens of the devices that share a layer.
    sums = 4 * 2 * ELEMENT * model.d_model * tokens * row.tensor * row.pipeline * model.n_layers / row.pipeline
    return seconds + sums * (1 - 1 / row.tensor) / chip.interconnect


# The expectation.

#: What is fitted, where from, and between what.
FREE = {
    "matmul": (0.7, 0.05, 1.0),
    "matmul_8": (0.6, 0.05, 1.0),
    "attention": (0.8, 0.05, 1.5),
    "traffic": (0.6, 0.05, 1.0),
    "exchange": (1.0, 0.01, 5.0),
}
OF_CLASS = {"gpu": ("matmul", "matmul_8", "traffic", "exchange"), "tpu": ("matmul", "attention", "traffic")}


class Fitted(NamedTuple):
    """Efficiencies of a class of devices."""

    matmul: float  # of the 16-bit peak
    matmul_8: float = 1.0  # of the 8-bit peak
    attention: float = 1.0  # of the share of its kernel
    traffic: float = math.inf  # of the bytes/s; infinity: no time
    exchange: float = 0.0  # seconds over the least ones; 0: all hidden

    def rounded(self) -> Fitted:
        """To two digits."""
        return Fitted(*(float(f"{value:.2g}") for value in self))


def ratios(given: list[Case], fitted: Fitted) -> np.ndarray:
    """Expected over measured seconds."""
    times = np.array([1 / fitted.matmul, 1 / fitted.matmul_8, 1 / fitted.attention, 1 / fitted.traffic, fitted.exchange])
    return np.array([case.parts @ times * case.bubble / case.seconds for case in given])


def halves(device_class: str) -> tuple[list[Case], list[Case]]:
    """Rows of a class that are fitted: every other one of each group, chip and width."""
    of_class = (case for case in cases() if case.fitted and case.device_class == device_class)
    return every_other(of_class, lambda case: (case.group, case.chip, case.bits))


def fit(given: list[Case], names: tuple[str, ...]) -> Fitted:
    """Efficiencies `names` that come closest (`comparison.fit`)."""
    return Fitted(**comparison.fit(names, FREE, lambda numbers: ratios(given, Fitted(**numbers))))


@functools.cache
def fitted(device_class: str) -> Fitted:
    """On the first half, two digits."""
    return fit(halves(device_class)[0], OF_CLASS[device_class]).rounded()


def utilisation(device_class: str, bits: int = 16, **where) -> np.ndarray:
    """Model FLOPs utilisation of rows of `MFU_CONTEXT` tokens at most, of the peak of their operands."""
    return np.array(
        [
            case.mfu * (1 if bits == 16 else 0.5)
            for case in cases()
            if (case.device_class, case.bits) == (device_class, bits) and case.context <= MFU_CONTEXT
            and all(getattr(case, name) == value for name, value in where.items())
        ]
    )  # fmt: skip


# Tables.

MISSED = 1.25  # rows that are off by more are explained
#: Rows that are long for their attention, nobody says why.
SLOW_ATTENTION = (88, 89)
#: Rows that are short for their exchanges.
HIDDEN = (103, 104)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="every row")
    print(rows_table() if parser.parse_args().rows else "\n\n".join(tables().values()))


def tables() -> dict[str, str]:
    """The tables of docs/training-measured.md, by what they are of."""
    return {
        "bound": bound_table(),
        "utilisation": utilisation_table(),
        "efficiencies": efficiencies_table(),
        "errors": errors_table(),
        "variants": variants_table(),
        "groups": groups_table(),
        "misses": misses_table(),
    }


def bound_table() -> str:
    lines = []
    for label, bits, device_class in (("GPU, 16 bits", 16, "gpu"), ("GPU, 8 bits", 8, "gpu"), ("TPU, 16 bits", 16, "tpu")):
        given = [case for case in cases() if (case.bits, case.device_class) == (bits, device_class)]
        reached = [case.bound / case.seconds for case in given]
        nearest = sorted(given, key=lambda case: -case.bound / case.seconds)[:3]
        lines.append(
            (
                label, len(given), sum(share > 1 for share in reached), f"{np.median(reached):.2f}",
                ", ".join(f"{case.bound / case.seconds:.2f} (row {case.row}, {case.chip})" for case in nearest),
            )
        )  # fmt: skip
    return markdown("class | rows | faster than the bound | bound / measured, median | nearest", lines)


def utilisation_table() -> str:
    lines = []

    def add(label: str, found: np.ndarray) -> None:
        lower, median, upper = np.quantile(found, (0.25, 0.5, 0.75))
        lines.append((label, len(found), f"{median:.2f}", f"{lower:.2f} to {upper:.2f}"))

    for device_class in OF_CLASS:
        add(f"**{device_class.upper()}, 16 bits**", utilisation(device_class))
        for chip in dict.fromkeys(case.chip for case in cases() if (case.device_class, case.bits) == (device_class, 16)):
            add(chip, utilisation(device_class, chip=chip))
        if device_class == "gpu":
            add("GPU, 8 bits", utilisation(device_class, bits=8))
            for group in ("torchtitan", "megatron-bridge"):
                add(f"{group}, 8 bits", utilisation(device_class, bits=8, group=group))
    return markdown("rows of | rows | share of the peak, median | quartiles", lines)


LABELS = {
    "matmul": "peak FLOP/s, products of 16 bits",
    "matmul_8": "8-bit peak, the same",
    "attention": "the share that is published of its kernel, attention",
    "traffic": "bytes/s, everything read and written once",
    "exchange": "(seconds of exchanges over the least)",
}


def efficiencies_table() -> str:
    lines = []
    for name, label in LABELS.items():
        values = [f"{getattr(fitted(kind), name):.2g}{' (not fitted)' * (name not in OF_CLASS[kind])}" for kind in OF_CLASS]
        if name == "matmul_8":
            values[1] = "none measured"
        lines.append((label, *values))
    return markdown("share of | GPU | TPU", lines)


def errors_table() -> str:
    lines = []
    for device_class, names in OF_CLASS.items():
        first, second = halves(device_class)
        found, back = fitted(device_class), fit(second, names).rounded()
        both = np.concatenate([ratios(second, found), ratios(first, back)])
        each = (ratios(first, found), ratios(second, found), ratios(first, back), both)
        lines.append((device_class.upper(), *map(Errors.of, each)))
    return markdown(
        "class | first half, fitted | **second half** | first half, fitted on the second | all, each by the other half", lines
    )


#: Other ways to expect, for comparison: what is fitted.
VARIANTS = {
    "as above": OF_CLASS,
    "products and attention alone": {"gpu": ("matmul", "matmul_8"), "tpu": ("matmul",)},
    "and what is read and written": {"gpu": ("matmul", "matmul_8", "traffic"), "tpu": ("matmul", "traffic")},
    "as above, and attention on GPUs, exchanges on TPUs": {
        "gpu": ("matmul", "matmul_8", "attention", "traffic", "exchange"),
        "tpu": ("matmul", "attention", "traffic", "exchange"),
    },
}


def variants_table() -> str:
    lines = []
    for label, names in VARIANTS.items():
        found = [Errors.of(ratios(halves(kind)[1], fit(halves(kind)[0], names[kind]).rounded())) for kind in OF_CLASS]
        lines.append((label, *found))
    return markdown("second half | GPU | TPU", lines)


def groups_table() -> str:
    lines = []
    for group in dict.fromkeys(case.group for case in cases()):
        for bits in (16, 8):
            given = [case for case in cases() if case.group == group and case.bits == bits and case.fitted]
            if given:
                found = np.array([ratio for case in given for ratio in ratios([case], fitted(case.device_class))])
                label = f"{np.median(found):.2f} | {found.min():.2f} to {found.max():.2f}"
                lines.append((group, ", ".join(dict.fromkeys(case.chip for case in given)), bits, len(given), label))
    return markdown("group | chips | bits | rows | expected / measured, median | from, to", lines)


def _what(row) -> str:
    return f"{row.model_key}, {row.devices} x {row.chip}, {row.context}"


def misses_table() -> str:
    frame = read().set_index("row")
    lines = []
    for case in cases():
        ratio = float(ratios([case], fitted(case.device_class))[0])
        if not case.fitted:
            why = frame.loc[case.row].reading
        elif max(ratio, 1 / ratio) > MISSED:
            why = _why(case, frame.loc[case.row])
        else:
            continue
        lines.append((case.row, case.group, _what(frame.loc[case.row]), case.bits, f"{ratio:.2f}", why))
    return markdown("row | group | what | bits | expected / measured | why", lines)


def _why(case: Case, row) -> str:
    """What would explain a miss, and what would then be expected."""
    found, parts = fitted(case.device_class), dict(zip(PARTS, case.parts, strict=True))
    if case.row in SLOW_ATTENTION:
        others = ratios([case._replace(parts=case.parts * (np.array(PARTS) != "attention"))], found)[0]
        share = KERNELS[row.kernel][9][0] * parts["attention"] * case.bubble / case.seconds / (1 - others)
        return f"attention over {row.context_parallel} devices: it would have to reach {share:.2f} of the peak; why isn't known"
    if case.row in HIDDEN:
        changed = case._replace(parts=case.parts * (np.array(PARTS) != "exchange"))
        return f"with exchanges all hidden behind products: {ratios([changed], found)[0]:.2f}"
    return "not known"


def rows_table() -> str:
    frame = read().set_index("row")
    lines = []
    for case in cases():
        ratio = float(ratios([case], fitted(case.device_class))[0])
        rate = case.tokens / case.seconds
        lines.append(
            (
                case.row, case.group, _what(frame.loc[case.row]), case.bits, f"{rate:.0f}", f"{rate / ratio:.0f}",
                f"{case.tokens / case.bound:.0f}", f"{ratio:.2f}", f"{case.mfu:.3f}",
            )
        )  # fmt: skip
    header = "row | group | what | bits | tokens/s of a device | expected | bound | expected / measured, seconds | MFU"
    return markdown(header, lines)


if __name__ == "__main__":
    main()
