"""Held-out loss with its standard error: of all targets, by source, and by how much of the text came before.

A standard error is clustered by document, as losses within one depend on each other, and an interval is Student's t with
documents - 1 degrees of freedom. Both are of the choice of documents: what another draw of held-out text would change. All runs
evaluated on the same targets share it, so it says nothing of the difference between two of them: `difference` does.

With few documents, or a few long ones among many, the interval is too narrow still: Cameron and Miller (2015), Section VI, who
count as few what is below 20 to 50 clusters. Below 10 take it as a lower bound of what is not known.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gqa_jax import errors

if TYPE_CHECKING:
    from gqa_jax.data.reader import EvalBatches

NATS, BITS = "nats/token", "bits/byte"
TASK = "held-out"
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A ratio of sums over documents; what needs two documents is None where there is one."""

    value: float
    standard_error: float | None
    low: float | None  # ends of the 95% interval
    high: float | None
    n_documents: int


class Row(NamedTuple):
    """A row of the long table of evaluations, of the targets of one source or of one range of positions, or of all."""

    source: str  # "": all
    position: str  # how many targets came before in the window, as "0", "1", "2-3", "4-7"; "": any
    metric: str  # loss or bits_per_byte
    value: float
    standard_error: float | None
    n: int  # targets
    n_documents: int
    unit: str


class Documents(NamedTuple):
    """What an evaluation found of each document, D of them."""

    document: np.ndarray  # uint64 (D,): hash of its ids
    source: np.ndarray  # int32 (D,): index in `sources`; -1 where the store keeps none
    sources: np.ndarray  # str: names
    tokens: np.ndarray  # int64 (D,): targets
    targets: np.ndarray  # uint64 (D,): hash of where in the document these are
    text_bytes: np.ndarray  # int64 (D,): bytes of text that these stand for
    loss: np.ndarray  # float64 (D,): nats, summed over them


class Evaluation(NamedTuple):
    """Result of an evaluation; None: needs two documents, or text."""

    loss: float  # mean -log p, nats per token
    loss_sem: float | None  # standard error of `loss`, clustered by document
    loss_low: float | None  # ends of its 95% interval
    loss_high: float | None
    bits_per_byte: float | None  # of the text that the ids of the targets decode to
    tokens: int
    documents: int
    parts: tuple[Row, ...]
    by_document: Documents


def evaluate(token_losses: Callable[[dict[str, np.ndarray]], np.ndarray], batches: EvalBatches) -> Evaluation:
    """Averages `token_losses(batch)` -> (B, T) nats over held-out batches; `token_losses` is the model, with its parameters."""
    losses = np.concatenate([np.asarray(token_losses(batch), np.float64)[batch["mask"]] for batch in batches])
    held_out, index = batches.documents, batches.document_index
    n_documents = len(held_out.numbers)
    sums = np.bincount(index, weights=losses, minlength=n_documents)
    parts = [*_parts("", "", sums, held_out.tokens, held_out.text_bytes)]
    for i, name in enumerate(held_out.source_names):
        own = held_out.sources == i
        parts += _parts(name, "", sums[own], held_out.tokens[own], held_out.text_bytes[own])
    # Exponents of frexp are bit lengths: 0, 1, 2, 2, 3, 3, 3, 3, 4 ... of positions 0, 1, 2 ...
    bucket = np.frexp(np.arange(batches.context_length))[1].astype(np.int64)
    n_buckets = int(bucket[-1]) + 1
    places = np.tile(bucket, batches.tokens // batches.context_length) * n_documents + index
    shape = (n_buckets, n_documents)
    bucket_sums = np.bincount(places, weights=losses, minlength=n_buckets * n_documents).reshape(shape)
    bucket_tokens = np.bincount(places, minlength=n_buckets * n_documents).reshape(shape)
    for i, name in enumerate(position_buckets(batches.context_length)):
        there = bucket_tokens[i] > 0
        parts += _parts("", name, bucket_sums[i][there], bucket_tokens[i][there], None)
    whole = estimate(sums, held_out.tokens)
    bits = [part.value for part in parts if (part.source, part.metric) == ("", "bits_per_byte")]
    return Evaluation(
        loss=whole.value,
        loss_sem=whole.standard_error,
        loss_low=whole.low,
        loss_high=whole.high,
        bits_per_byte=bits[0] if bits else None,
        tokens=losses.size,
        documents=n_documents,
        parts=tuple(parts),
        by_document=Documents(
            held_out.hashes,
            held_out.sources,
            np.array(held_out.source_names, dtype=np.str_),
            held_out.tokens,
            held_out.targets,
            held_out.text_bytes,
            sums,
        ),
    )


def position_buckets(context_length: int) -> list[str]:
    """Names of the ranges of positions 0 ... context_length - 1, each twice as long as the one before: "0", "1", "2-3" ..."""
    names = ["0"]
    for power in range((context_length - 1).bit_length()):
        first, last = 1 << power, min((2 << power) - 1, context_length - 1)
        names.append(str(first) if first == last else f"{first}-{last}")
    return names


def estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """The ratio sum(sums) / sum(counts) of independent clusters, one element each.

    Linearised variance of a ratio estimator with G/(G-1) small-sample factor (Cameron and Miller 2015, "A practitioner's
    guide to cluster-robust inference", Eq. 11 and Section VI.A): Var = G/(G-1) * sum_g (sums_g - ratio counts_g)^2 / n^2, where
    n = sum(counts). Interval: Student's t with G - 1 degrees of freedom.
    """
    if sums.shape != counts.shape:
        raise ValueError(f"one count per sum: {sums.shape} sums, {counts.shape} counts")
    total, n_clusters = counts.sum(), len(sums)
    value = float(sums.sum() / total)
    if n_clusters < 2:
        return Estimate(value, None, None, None, n_clusters)
    with np.errstate(invalid="ignore"):  # a loss that is no longer finite is an answer too
        variance = n_clusters / (n_clusters - 1) * np.sum(np.square(sums - value * counts)) / float(total) ** 2
        error = float(np.sqrt(variance))
    return Estimate(value, error, *interval(value, error, n_clusters), n_clusters)


def interval(value: float, standard_error: float, n_clusters: int) -> tuple[float, float]:
    """Ends of the 95% interval of an estimate from at least two clusters (Student's t)."""
    from scipy import special  # takes a moment to import, which what only reads tables need not wait for

    half = float(special.stdtrit(n_clusters - 1, (1 + CONFIDENCE) / 2)) * standard_error
    return value - half, value + half


class Difference(NamedTuple):
    """Loss of one run minus that of another, of the documents that both were evaluated on."""

    estimate: Estimate  # nats per token
    tokens: int
    left_out: int  # documents of either that the other doesn't have, or not with the same targets


def difference(ours: Documents, theirs: Documents) -> Difference | None:
    """The difference in loss with its standard error, paired by documents: what they share cancels. None without a document.

    Documents are the same where their ids are, and the same targets of them were counted: losses of one part of a document say
    little of another part.
    """
    keys = [(one.document, one.tokens, one.targets) for one in (ours, theirs)]
    if all(map(np.array_equal, *keys)):
        a = b = np.arange(len(ours.document))
    else:
        mine, others = (_numbered(*key) for key in keys)
        common = [key for key in mine if key in others]
        a, b = (np.array([numbers[key] for key in common], np.int64) for numbers in (mine, others))
    if not len(a):
        return None
    found = estimate(ours.loss[a] - theirs.loss[b], ours.tokens[a])
    return Difference(found, int(ours.tokens[a].sum()), len(ours.document) + len(theirs.document) - 2 * len(a))


def _numbered(*columns: np.ndarray) -> dict[tuple[int, ...], int]:
    """Index of each document by what it has in the columns, and how many before it have the same, as equal texts do."""
    seen, result = Counter(), {}
    for i, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        result[*key, seen[key]] = i
        seen[key] += 1
    return result


def rows(result: Evaluation, *, step: int, context: int, rules: str) -> list[dict[str, Any]]:
    """The long table of an evaluation (`gqa_jax.results.EVALUATION_COLUMNS`, without the cell)."""
    about = {"step": step, "task": TASK, "context": context, "rules": rules}
    return [about | part._asdict() for part in result.parts]


def to_bytes(documents: Documents) -> bytes:
    """Content of documents.npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **documents._asdict())
    return buffer.getvalue()


def from_bytes(content: bytes) -> Documents:
    """What `to_bytes` was given. Raises ValueError when that can't be read."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            missing = [name for name in Documents._fields if name not in arrays]
            found = None if missing else Documents(*(arrays[name] for name in Documents._fields))
    except Exception as error:  # zipfile and numpy raise many kinds
        raise ValueError(errors.named(error)) from error
    if found is None:
        raise ValueError(f"it has no {', '.join(missing)}")
    sizes = {len(getattr(found, name)) for name in Documents._fields if name != "sources"}
    if len(sizes) != 1 or not np.isfinite(found.loss).all():
        raise ValueError("its columns don't fit together")
    return found


def plus_minus(standard_error: float | None) -> str:
    """What follows a loss on a screen: " ± 0.0310", nothing where the error is not known."""
    return "" if standard_error is None else f" ± {standard_error:.4f}"


def _parts(source: str, position: str, sums: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray | None) -> Iterator[Row]:
    """Rows of some documents, or of parts of them: sums in nats, targets and bytes of each."""
    if not len(sums):
        return
    measures = [("loss", sums, tokens, NATS)]
    if text_bytes is not None and text_bytes.sum() > 0:
        measures.append(("bits_per_byte", sums / math.log(2), text_bytes, BITS))
    for metric, numerators, counts, unit in measures:
        found = estimate(numerators, counts)
        yield Row(source, position, metric, found.value, found.standard_error, int(tokens.sum()), found.n_documents, unit)
