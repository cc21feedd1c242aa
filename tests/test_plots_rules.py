"""What every picture must keep: one table of pictures, for 1, 3, 8 and 21 head configurations, and rules for all of them."""

import functools
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text

from gqa_jax import costs, plots
from gqa_jax.laws import LLAMA3, Heads, fit_by_heads, fit_query_heads
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.search.invariance import context_invariance
from gqa_jax.shapes import head_configurations
from tests import plot_helpers, test_plots_context, test_plots_heads

ALL = [Heads(*heads) for heads in head_configurations()]
SOME = {1: [Heads(8, 1)], 3: [Heads(4, 4), Heads(4, 1), Heads(1, 1)], 8: [*ALL[-7:], LLAMA3], 21: ALL}
CONTEXTS = [8192, 32_768, 131_072]
SMALLEST = 7.0  # points, of a text


@functools.cache
def runs(count):
    """Losses of models of 12 to 24 layers, d / L about 64, that fall with N, n_h and n_kv."""
    draw = np.random.default_rng(count)
    rows = []
    for heads, layers in itertools.product(SOME[count], (12, 16, 20, 24)):
        d_model = 64 * layers
        shape = costs.Shape(layers, d_model, heads.query_heads(d_model, 64), heads.n_kv_heads)
        n = int(costs.count_params(shape, "exact").non_embedding)
        above = 0.9 + 0.3 / (heads.n_heads or 16) + 0.1 / heads.n_kv_heads
        rows.append(
            {"cell": f"{heads}-{layers}", "size": str(layers), "n_layers": layers, "d_model": d_model, "n_heads": heads.n_heads,
             "n_kv_heads": heads.n_kv_heads, "context": 8192, "params_non_embedding": n, "d_ff": None, "loss_sem": 0.002,
             "loss": 1.8 + above * (1e8 / n) ** 0.2 + draw.normal(0, 0.002)}
        )  # fmt: skip
    return plot_helpers.table(rows)


@functools.cache
def laws(count):
    return fit_by_heads(runs(count))


@functools.cache
def answer(count):
    return optimum.search(laws(count), 2.7, 65_536)


@functools.cache
def answers(count):
    return optimum.optimum_map(laws(count), [2.9, 2.75, 2.6], CONTEXTS)


def aligned(count):
    n = np.geomspace(1e8, 1e9, 20)
    frames = []
    for heads in SOME[count]:
        loss = 1.8 + (0.9 + 0.3 / (heads.n_heads or 16) + 0.1 / heads.n_kv_heads) * (1e8 / n) ** 0.2
        frame = pd.DataFrame({"n_params": n, "loss": loss, "loss_low": loss - 0.01, "loss_high": loss + 0.01})
        frames.append(frame.assign(**heads._asdict(), m_infer=n * (1 + heads.n_kv_heads), c_infer=n**2, cost=n**0.5))
    return pd.concat(frames).astype({"n_heads": "Int64"})


@functools.cache
def uneven():
    """Runs whose d / L goes up and down with the size, as the paper's do: 64, 85, 64, 64, 53."""
    table = runs(3)
    rows = []
    for heads, (layers, d_model) in itertools.product(SOME[3], ((4, 256), (6, 512), (12, 768), (16, 1024), (24, 1280))):
        shape = costs.Shape(layers, d_model, heads.n_heads, heads.n_kv_heads)
        n = int(costs.count_params(shape, "exact").non_embedding)
        sized = {"n_layers": layers, "d_model": d_model, "n_heads": heads.n_heads, "n_kv_heads": heads.n_kv_heads}
        noise = 0.001 * (-1) ** layers
        loss = 1.8 + (0.9 + 0.3 / heads.n_heads + 0.1 / heads.n_kv_heads) * (1e8 / n) ** 0.2 + noise
        rows.append(table.iloc[0].to_dict() | sized | {"size": f"{layers}", "cell": f"{heads}{layers}", "loss": loss})
        rows[-1] |= {"params_non_embedding": n, "params_total": pd.NA}
    return plot_helpers.table(rows)


def of_each(count):
    """Pictures of laws and costs, by name."""
    return {
        "params": lambda: plots.loss_vs_params(laws(count), title="Loss against size"),
        "until": lambda: plots.loss_vs_params(laws(count), until=5e9),
        "cost": lambda: plots.loss_vs_cost(runs(count), laws(count), 131_072, title="Loss against cost"),
        "costs": lambda: plots.loss_vs_costs(runs(count), laws(count), 131_072),
        "context": lambda: plots.cost_by_context(laws(count), 2.7, CONTEXTS, SOME[count]),
        "aligned": lambda: plots.aligned_cost(aligned(count)),
        "map": lambda: plots.optimum_map(answers(count)),
        "share": lambda: plots.share_of_draws(answer(count).candidates, title="Served at 64K"),
        "intervals": lambda: plots.cost_intervals(answer(count).candidates, laws=laws(count), label="cost $Z$ (no unit)"),
        "residuals": lambda: plots.residuals(laws(count)),
    }


SHAPE = costs.Shape(24, 1536, 24, 8)
OTHERS = {
    "cost-uneven": lambda: plots.loss_vs_cost(uneven(), None, 8192, cost="flops"),
    "savings": lambda: plots.savings(laws(8), 2.7, 131_072, heads=Heads(32, 1), title="Saved"),
    "savings-paper": lambda: plots.savings(presets.load("paper"), 2.615, 131_072),
    "saved": lambda: plots.savings_by_context(answers(8)),
    "map-table4": lambda: plots.optimum_map(
        optimum.optimum_map(presets.load("paper-table4"), [2.8, 2.6, 2.4], CONTEXTS, draws=200)
    ),
    "map-cell": lambda: plots.optimum_map(answers(3).query("loss == 2.75 and context_served == 8192")),
    "profile": lambda: plots.profile(*laws(8).blocks[0].entropy_profile(), dof=laws(8).blocks[0].dof, title="E"),
    "query-heads": lambda: plots.loss_vs_query_heads(fit_query_heads(test_plots_heads.by_size(0.003), constant="per_curve")),
    "training-context": lambda: plots.loss_vs_context(
        context_invariance(test_plots_context.runs(size="470M", params_non_embedding=4e8), Heads(8, 8)), title="Differences"
    ),
    "continued": lambda: plots.continued_training(plot_helpers.table(test_plots_context.continued()), title="Continued"),
    "flops": lambda: plots.flops_shares(SHAPE, [2**k for k in range(10, 21)], title="What computes"),
    "memory": lambda: plots.memory_shares(SHAPE, [2**k for k in range(10, 21)]),
    "price": lambda: plots.cost_by_context(
        presets.load("paper"), 2.7, CONTEXTS, [Heads(8, 1), LLAMA3], cost=objectives.make("price", device="h200")
    ),
}
PICTURES = {f"{name}-{count}": draw for count in SOME for name, draw in of_each(count).items()} | OTHERS
OF_COSTS = [
    name for name in PICTURES if name.split("-")[0] in ("cost", "costs", "context", "aligned", "intervals", "price", "savings")
]
WITH_ANSWER = [name for name in PICTURES if name in OF_COSTS or name.startswith(("share-", "map-"))]
WITH_ANSWER.remove("savings")  # of heads that were chosen


@functools.cache
def picture(name):
    """(axes, figure) of a picture, laid out."""
    drawn = PICTURES[name]()
    axes = list(np.atleast_1d(drawn))
    axes[0].figure.draw_without_rendering()
    return axes, axes[0].figure


def written(figure):
    """Every text that is seen: matplotlib has labels of ticks beyond the ends of an axis too."""
    unseen = {
        id(tick.label1)
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and id(text) not in unseen]


def legends(axes, figure):
    return [*figure.legends, *(ax.get_legend() for ax in axes if ax.get_legend())]


@pytest.mark.parametrize("name", PICTURES)
def test_no_texts_overlap_and_none_is_cut_off_or_too_small(name):
    _, figure = picture(name)
    texts = written(figure)
    boxes = [text.get_window_extent().padded(-1.0) for text in texts]
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not a.overlaps(b), (one.get_text(), other.get_text())
    for text, box in zip(texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text.get_text()
        assert text.get_fontsize() >= SMALLEST, text.get_text()


@pytest.mark.parametrize("name", PICTURES)
def test_95_percent_is_said_wherever_a_band_or_bar_is_drawn(name):
    axes, figure = picture(name)
    bands = [each for ax in axes for each in ax.collections if isinstance(each, PolyCollection) and (each.get_alpha() or 1) < 1]
    bars = [
        each
        for ax in axes
        for each in ax.collections
        if isinstance(each, LineCollection) and np.isfinite(each.get_segments()).any()
    ]
    ranges = [
        line for ax in axes for line in ax.lines if line.get_label().startswith("_child") and name.startswith("intervals")
    ]
    said = " ".join(text.get_text() for text in written(figure))
    assert not (bands or bars or ranges) or "95%" in said
    if name.split("-")[0] in ("params", "cost", "costs", "context", "aligned", "intervals", "savings", "saved", "profile"):
        assert "95%" in said


@pytest.mark.parametrize("name", OF_COSTS)
def test_cheaper_has_a_direction(name):
    axes, _ = picture(name)
    for ax in axes:
        turned = ax.get_ylabel().startswith("\u2190 cheaper")  # of a label that is turned the arrow points down
        assert turned != ax.get_xlabel().startswith("\u2190 cheaper")
        axis = ax.yaxis if turned else ax.xaxis
        low, high = axis.get_view_interval()
        assert low < high  # less is at the beginning
        if turned:
            assert axis.label.get_rotation() == 90


def test_savings_say_against_what_and_which_way_is_cheaper():
    (ax,), _ = picture("saved")
    assert ax.get_ylabel() == "cost saved against\nLlama 3's heads (%)      cheaper \u2192"
    assert "against Llama 3's heads at the same loss" in plot_helpers.texts(ax)[0]
    (ax,), _ = picture("savings-paper")
    assert "Llama 3's heads = 100%" in plot_helpers.texts(ax)[-1]
    theirs, ours = (text.get_text() for text in ax.get_legend().get_texts())
    assert theirs == "($d/d_h$,8), measured: $N$ = 1.41B, 32 x 2048"
    assert ours.startswith("(8,1), least expected regret under $Z$: $N$ = ")


@pytest.mark.parametrize("name", WITH_ANSWER)
def test_the_answer_is_marked_and_what_marks_it_is_said(name):
    axes, figure = picture(name)
    said = " ".join(text.get_text() for text in written(figure)).replace("\n", " ")
    if name in ("context-1", "cost-1", "costs-1", "aligned-1"):  # nothing to be compared with
        assert not any(line.get_label() == "_answer" for ax in axes for line in ax.lines)
        return
    assert "least expected regret" in said or "least cost" in said or ("yellow: the answer" in said and "regret" in said)
    if name.startswith(("map-", "savings")):
        return  # each cell, and the second bar, is the answer's
    for ax in axes:
        assert any(each.get_label() == "_answer" for each in (*ax.lines, *ax.patches))


@pytest.mark.parametrize("count", [3, 8, 21])
def test_yellow_along_losses_is_where_the_search_says(count):
    """At the middle of each marked stretch the search, with the shapes of the runs, has the heads whose curve it is."""
    (ax,), _ = picture(f"cost-{count}")
    curves = dict(zip(laws(count), plot_helpers.curves(ax), strict=True))
    marks = [line for line in ax.lines if line.get_label() == "_answer"]
    for mark in marks[:: max(len(marks) // 4, 1)]:
        x, y = mark.get_xdata(), mark.get_ydata()
        loss = float(np.mean(y))
        best = optimum.search(laws(count), loss, 131_072, aspect="trained").candidates.iloc[:2]
        near = [Heads(None if pd.isna(row.n_heads) else int(row.n_heads), int(row.n_kv_heads)) for row in best.itertuples()]
        assert any(np.isin(x, curves[heads].get_xdata()).all() for heads in near)


@pytest.mark.parametrize("name", [name for name in PICTURES if name.split("-")[-1] in ("3", "8", "21")])
def test_no_two_series_share_a_colour(name):
    axes, figure = picture(name)
    for legend in legends(axes, figure):
        series = [line for line in legend.get_lines() if isinstance(line, Line2D)]
        assert len({to_hex(line.get_color()) for line in series}) == len(series)
    if name in ("params-21", "cost-21", "context-21", "residuals-21"):
        assert len(legends(axes, figure)[0].get_texts()) >= 21


@pytest.mark.parametrize("name", PICTURES)
def test_axes_have_units(name):
    axes, _ = picture(name)
    plain = ("parameters without embeddings", "query heads", "forward FLOPs", "rise of the sum of squares")
    for label in (text for ax in axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text):
        known = "(" in label or label.removeprefix("\u2190 cheaper      ").startswith(plain) or "tokens" in label
        assert known, label


@pytest.mark.parametrize("name", [name for name in PICTURES if name.startswith(("cost-", "costs-", "context-"))])
def test_curves_have_no_kinks(name):
    """The slope in logarithms does not jump: it changes from a point to the next by less than 15% of its range."""
    axes, _ = picture(name)
    for ax in axes:
        for line in plot_helpers.curves(ax):
            x, y = np.log(line.get_xdata()), np.log(line.get_ydata())
            slope = np.diff(y) / np.diff(x)
            assert np.abs(np.diff(slope)).max() < 0.15 * max(np.abs(slope).max(), 0.2), name


def test_curves_of_costs_say_which_shapes_they_have():
    said = {name: plot_helpers.texts(picture(name)[0][0])[-1] for name in ("cost-8", "context-8", "savings-paper")}
    assert "shapes: $d/L$ as between the runs of each curve" in said["cost-8"]
    assert "shapes: $d/L$ of least cost" in said["context-8"]
    assert "shapes: $d/L$ of least $Z$" in said["savings-paper"]
    fixed = plots.cost_by_context(laws(3), 2.7, CONTEXTS, SOME[3], aspect=64)
    assert "shapes: $d/L$ = 64" in plot_helpers.texts(fixed)[-1]
