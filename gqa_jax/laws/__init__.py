"""Scaling laws with their uncertainty, in float64.

    laws = gqa_jax.laws.fit_by_heads(gqa_jax.load_results("runs/paper"))     # L(N; H) = (a / N)^b + E, one E for all H
    laws[Heads(8, 1)].solve(2.615), laws.size_interval(Heads(8, 1), 2.615), laws.intervals(), laws.draws()

`by_heads` is what the search rests on. Beside it: `joint` (one law in N, n_h and n_kv), `query_heads` (L against n_h),
`loss_nd` (L against N and D, with and without heads), `power` (trends), `validation` (held-out runs, baselines, lack of fit),
`planning` (what one more size would tell).
"""

from gqa_jax.laws.by_heads import LawsByHeads, fit_by_heads
from gqa_jax.laws.heads import LLAMA3, MHA, Heads
from gqa_jax.laws.joint import JointLaw, fit_joint
from gqa_jax.laws.law import PowerLaw
from gqa_jax.laws.loss_nd import LossND, LossNDByHeads, fit_loss_nd, fit_loss_nd_by_heads
from gqa_jax.laws.posterior import Draws
from gqa_jax.laws.power import PowerTrend, fit_power
from gqa_jax.laws.query_heads import LawsByQueryHeads, QueryHeadsLaw, fit_query_heads

__all__ = [
    "LLAMA3",
    "MHA",
    "Draws",
    "Heads",
    "JointLaw",
    "LawsByHeads",
    "LawsByQueryHeads",
    "LossND",
    "LossNDByHeads",
    "PowerLaw",
    "PowerTrend",
    "QueryHeadsLaw",
    "fit_by_heads",
    "fit_joint",
    "fit_loss_nd",
    "fit_loss_nd_by_heads",
    "fit_power",
    "fit_query_heads",
]
