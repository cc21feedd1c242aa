"""Train at a short context and go on at a long one, or train at the long one from scratch, on equal tokens: as in Figure 15.

The counterpart of arXiv 2503.09579v2, Figure 15 and Appendix J, for a laptop: quickstart's 90k at T = 128 for 60 to 95% of its
400,000 tokens, then at T = 512 for the rest, with fresh moments and a tenth of the learning rate; beside them T = 512 from
scratch on 400,000. Two head configurations. About eight minutes of two CPU cores; docs/start.md has what came out.

    python -m launch run configs/grids/two_phases.py
    python -c "import gqa_jax; gqa_jax.plots.save(gqa_jax.plots.continued_training('runs/two-phases').figure, 'two-phases')"
"""

from configs.grids.quickstart import TOKENS, cell
from launch.grid import Grid, continued, product

SIZE, SHORT, LONG = "90k", 128, 512
HEADS, SHARES = [(4, 4), (4, 1)], (0.05, 0.1, 0.2, 0.4)  # of the tokens, at the long context


def phases(heads, share):
    first = cell(SIZE, SHORT, heads)
    long = round(share * TOKENS / first.batch_tokens) * first.batch_tokens
    first.tokens = -(-TOKENS // first.batch_tokens) * first.batch_tokens - long
    rate = first.optimizer.learning_rate / 10
    return first, continued(first, context_length=LONG, learning_rate=rate, tokens=long)


def get_grid():
    both = [one for pair in product(phases, heads=HEADS, share=SHARES) for one in pair]
    scratch = [cell(SIZE, LONG, heads) for heads in HEADS]
    return Grid(name="two-phases", configs=[*scratch, *both], contexts_served=[8192, 131_072])
