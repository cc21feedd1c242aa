"""Held-out loss with its standard error, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np


class Evaluation(NamedTuple):
    """Result of an evaluation; `loss_sem` is None when the tokens come from fewer than two documents."""

    loss: float  # mean -log p, nats per token
    loss_sem: float | None  # standard error of `loss`, clustered by document
    bits_per_byte: float
    tokens: int
    documents: int


def evaluate(
    token_losses: Callable[[dict[str, np.ndarray]], np.ndarray],
    batches: Iterable[dict[str, np.ndarray]],
    document_ids: np.ndarray,
    n_bytes: float,
) -> Evaluation:
    """Averages `token_losses(batch)` -> (B, T) nats over `batches`.

    Args:
      token_losses: the model, with its parameters.
      batches: dicts of `tokens`, `targets` (B, T) and a boolean `mask` (B, T) of the targets that count, in store order.
      document_ids: document of each counted target, in the same order.
      n_bytes: bytes of text that the counted targets stand for.
    """
    losses = np.concatenate([np.asarray(token_losses(b), np.float64)[b["mask"]] for b in batches])
    mean, sem, documents = clustered_mean(losses, document_ids)
    return Evaluation(mean, sem, float(losses.sum() / math.log(2) / n_bytes), losses.size, documents)


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None, int]:
    """Mean of `values`, its standard error when values of one cluster are dependent, and the number of clusters.

    Linearised variance of a ratio estimator with G/(G-1) small-sample factor (Cameron and Miller 2015, "A practitioner's
    guide to cluster-robust inference", Eq. 11 and Section VI.A): Var = G/(G-1) * sum_g (sum_i in g (v_i - mean))^2 / n^2.
    """
    if values.shape != clusters.shape:
        raise ValueError(f"one cluster per value: {values.shape} values, {clusters.shape} clusters")
    mean = float(values.mean())
    _, index = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(index, weights=values - mean)
    n_clusters = len(residuals)
    if n_clusters < 2:
        return mean, None, n_clusters
    variance = n_clusters / (n_clusters - 1) * np.sum(np.square(residuals)) / values.size**2
    return mean, float(np.sqrt(variance)), n_clusters
