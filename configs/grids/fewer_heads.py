"""Fewer key/value heads of a trained model, or a model trained anew with fewer: (8,8) and every divisor, after 5, 10 and 20%.

A cell of the quickstart's largest size with 8 query heads at T = 512: trained with 8 key/value heads, made (8,4), (8,2) and
(8,1) by the default method and trained on for 5, 10 and 20% of its tokens, with its recipe; beside them the same heads trained
from scratch, and (8,8) trained on for as long. About ten minutes of two CPU cores; results/fewer-heads has what came out.

    python -m launch run configs/grids/fewer_heads.py
    python -m benchmarks.fewer_heads study runs/fewer-heads
"""

from configs.grids.quickstart import cell
from launch.grid import Grid, continued, converted

SIZE, CONTEXT, N_HEADS = "190k", 512, 8
FEWER, SHARES = (4, 2, 1), (0.05, 0.1, 0.2)


def anew(n_kv_heads):
    return cell(SIZE, CONTEXT, (N_HEADS, n_kv_heads))


def get_grid():
    first = anew(N_HEADS)
    fewer = [converted(first, n_kv_heads, share) for n_kv_heads in FEWER for share in SHARES]
    recipe = {"learning_rate": first.optimizer.learning_rate, "schedule": first.optimizer.schedule}
    same = [continued(first, context_length=CONTEXT, tokens=one.tokens, **recipe) for one in fewer[: len(SHARES)]]
    return Grid(
        name="fewer-heads",
        configs=[first, *map(anew, FEWER), *fewer, *same],
        contexts_served=[8192, 131_072],
    )
