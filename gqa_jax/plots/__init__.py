"""Pictures of laws, costs and answers, in one style; readable in black and white.

Every function draws on the axes it is given, or makes its own figure, and returns the axes; `save` writes files.
"""

from gqa_jax.plots.certainty import cost_intervals, profile, residuals, share_of_draws
from gqa_jax.plots.comparisons import aligned_cost, cost_by_context, savings, savings_by_context
from gqa_jax.plots.context import continued_training, loss_vs_context
from gqa_jax.plots.losses import loss_vs_cost, loss_vs_costs, loss_vs_params, loss_vs_query_heads
from gqa_jax.plots.maps import optimum_map
from gqa_jax.plots.shares import flops_shares, memory_shares
from gqa_jax.plots.style import head_look, head_text, save

__all__ = [
    "aligned_cost", "continued_training", "cost_by_context", "cost_intervals", "flops_shares", "head_look", "head_text",
    "loss_vs_context", "loss_vs_cost", "loss_vs_costs", "loss_vs_params", "loss_vs_query_heads", "memory_shares",
    "optimum_map", "profile", "residuals", "save", "savings", "savings_by_context", "share_of_draws",
]  # fmt: skip
