"""Loss against size and cost: what is drawn is where the data and the laws are."""

import dataclasses

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

from gqa_jax import costs, laws, plots
from gqa_jax.costs import solve_shape
from gqa_jax.laws import LLAMA3, Heads
from gqa_jax.plots import cost_axes, style
from gqa_jax.search import objectives, optimum, presets
from gqa_jax.shapes import Aspect
from launch import grid
from launch.cells import Layout
from tests import grid_fakes, plot_helpers


@pytest.fixture(scope="module")
def paper():
    return presets.load("paper")


@pytest.fixture(scope="module")
def table():
    return presets.paper_losses()


def test_points_and_curves_are_where_the_data_are(paper):
    backend = matplotlib.get_backend()
    ax = plots.loss_vs_params(paper, title="t")
    points = list(plot_helpers.points(ax).values())
    assert len(points) == len(plot_helpers.curves(ax)) == len(paper) == 8
    for (heads, law), line, curve in zip(paper.items(), points, plot_helpers.curves(ax), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), law.params)
        np.testing.assert_array_equal(line.get_ydata(), law.loss)
        assert line.get_marker() == plots.head_look(heads).marker
        np.testing.assert_allclose(curve.get_ydata(), law.predict(curve.get_xdata()))
        assert curve.get_xdata()[0] < law.params.min() < law.params.max() < curve.get_xdata()[-1]
    assert {plots.head_text(heads) for heads in paper} == {text.get_text() for text in ax.get_legend().get_texts()}
    assert matplotlib.get_backend() == backend


def test_bands_are_those_of_the_laws(paper):
    ax = plots.loss_vs_params(paper)
    bands = [each for each in ax.collections if len(each.get_paths()) == 1 and len(each.get_paths()[0]) > 100]
    assert len(bands) == len(paper)
    edge_Px2, curve = bands[3].get_paths()[0].vertices, plot_helpers.curves(ax)[3]
    low, high = paper.band(list(paper)[3], curve.get_xdata())
    n = len(low)
    np.testing.assert_allclose(edge_Px2[1 : n + 1, 1], low)
    np.testing.assert_allclose(edge_Px2[n + 2 : 2 * n + 2, 1][::-1], high)


def test_the_error_of_a_common_text_is_a_sentence_and_no_bar(table):
    few = table[table["n_kv_heads"] == 1].assign(loss_sem=0.03)
    for heldout, drawn in ((None, True), ("a/spread/1024", False)):
        rows = few.assign(heldout=pd.array([heldout] * len(few), dtype="string"))
        fitted = laws.fit_by_heads(rows)
        for ax in (plots.loss_vs_params(fitted), plots.loss_vs_cost(rows, fitted, 8192)):
            bars = [each for each in ax.collections if isinstance(each, LineCollection)]
            assert any(np.isfinite(each.get_segments()).any() for each in bars) == drawn
            assert any("held-out text: ± 0.059 for all alike" in text for text in plot_helpers.texts(ax)) != drawn
    unknown = plots.loss_vs_params(laws.fit_by_heads(rows.assign(loss_sem=np.nan)))
    assert plot_helpers.texts(unknown)[-1] == "bands: 95% with shared noise and bends"
    few_documents = plots.loss_vs_params(laws.fit_by_heads(rows.assign(eval_documents=5)))  # Student's t
    assert any("held-out text: ± 0.083 for all alike" in text for text in plot_helpers.texts(few_documents))
    assert style.sure(None, None, bars=True, bands=True) == "bars and bands: 95%"
    assert style.sure(None, None, bars=False, bands=True) == "bands: 95%"
    assert style.sure(None, None, bars=False, bands=False) == ""
    assert style.sure(fitted, fitted.shared, bars=False, bands=False) == "held-out text: ± 0.059 for all alike (95%)"
    rows["loss_sem"] = 0.001  # each of its own
    for ax in (plots.loss_vs_params(fitted := laws.fit_by_heads(few)), plots.loss_vs_cost(few, fitted, 8192)):
        assert plot_helpers.texts(ax)[-1].endswith("bars and bands: 95% with shared noise and bends")
    fitted.method = "independent"
    assert plot_helpers.texts(plots.loss_vs_params(fitted))[-1] == "bars and bands: 95% with independent noise"


def test_a_plain_dict_of_laws_has_no_bands(paper):
    ax = plots.loss_vs_params(dict(paper))
    assert not ax.collections
    assert not plot_helpers.texts(ax)  # nothing to say of bands
    assert len(plot_helpers.curves(ax)) == 8


def test_curves_can_be_continued_beyond_the_runs(paper):
    ax = plots.loss_vs_params(paper, until=1e10)
    inside, beyond = plot_helpers.curves(ax)[:2]
    assert beyond.get_xdata()[0] == inside.get_xdata()[-1]
    assert beyond.get_xdata()[-1] == pytest.approx(1e10)
    assert beyond.get_linewidth() < inside.get_linewidth()


def test_a_grid_folder_will_do(tmp_path):
    layout = Layout(tmp_path)
    for cell in grid.cells(grid_fakes.small_grid()):
        grid_fakes.finish(cell, layout)
    assert set(plot_helpers.points(plots.loss_vs_params(tmp_path))) == {"(1,1)", "(2,1)"}
    assert set(plot_helpers.points(plots.loss_vs_cost(tmp_path, None, 8192))) == {"(1,1)", "(2,1)"}


def test_markers_of_the_papers_third_panel(paper, table):
    """Z of Figure 2 at T = 128K, read off its markers: within 0.4% with the convention of the figures."""
    points = plot_helpers.points(plots.loss_vs_cost(table, paper, 131_072))
    assert points["(8,8)"].get_xdata()[-1] == pytest.approx(75_568, rel=4e-3)
    assert points["(8,8)"].get_xdata()[0] == pytest.approx(42_997, rel=4e-3)
    assert points["(8,4)"].get_xdata()[0] == pytest.approx(32_668, rel=4e-3)


def test_llama3s_heads_grow_with_the_width(paper, table):
    """Memory in Figure 1 of the 32 x 2048 model, heads (32, 8): 5.704e9 values; and the curve passes where its law says."""
    ax = plots.loss_vs_cost(table, paper, 131_072, cost="memory")
    assert plot_helpers.points(ax)[plots.head_text(LLAMA3)].get_xdata()[-1] == 5_704_253_440
    curve, law = plot_helpers.curves(ax)[-1], paper[LLAMA3]
    shape = solve_shape(law.params.min() / 1.15, LLAMA3, Aspect.constant(64), 64, 50_304, paper.size_convention)
    assert curve.get_xdata()[0] == pytest.approx(costs.infer_memory(shape, 131_072, "figures"))
    assert curve.get_ydata()[0] == pytest.approx(law.predict(law.params.min() / 1.15))


def test_curves_meet_their_runs_whatever_their_aspect_ratios():
    """Between runs the aspect ratio is interpolated for each H by itself: at the size of a run the curve has its cost."""
    noise = np.random.default_rng(0)
    shapes = {4: 256, 6: 512, 12: 768, 16: 1024}
    rows = []
    for n, k in ((8, 1), (8, 8)):
        for layers, d in shapes.items():
            params = round(costs.count_params(costs.Shape(layers, d, n, k), "figures").non_embedding)
            rows.append(
                {"cell": f"{n}-{k}-{d}", "n_layers": layers, "d_model": d, "n_heads": n, "n_kv_heads": k, "context": 8192}
                | {"params_non_embedding": params, "loss": 2 + (1e8 / params) ** 0.2 + noise.normal(0, 1e-4), "d_ff": None}
            )
    table = plot_helpers.table(rows).drop(columns="params_total")  # N without norms
    fitted = laws.fit_by_heads(table)
    ax = plots.loss_vs_cost(table, fitted, 131_072, cost="flops")
    for curve, line in zip(plot_helpers.curves(ax), plot_helpers.points(ax).values(), strict=True):
        order = np.argsort(curve.get_ydata())
        at = np.exp(np.interp(line.get_ydata(), curve.get_ydata()[order], np.log(curve.get_xdata()[order])))
        np.testing.assert_allclose(at, line.get_xdata(), rtol=5e-3)


def test_longer_contexts_move_points_by_their_cost_and_keep_the_loss(paper, table):
    near, far = (plot_helpers.points(plots.loss_vs_cost(table, paper, context))["(8,1)"] for context in (1024, 131_072))
    assert list(near.get_ydata()) == list(far.get_ydata())
    assert (near.get_xdata() < far.get_xdata()).all()


def test_an_objective_is_an_axis(paper, table):
    objective = objectives.make("latency", device="h200")
    ax = plots.loss_vs_cost(table, paper, 8192, cost=objective)
    assert ax.get_xlabel() == f"\u2190 cheaper      {objective.label} at 8K ({objective.unit})"
    row = table[(table["n_heads"] == 8) & (table["n_kv_heads"] == 1)].iloc[0]
    shape = costs.Shape(row["n_layers"], row["d_model"], 8, 1)
    assert plot_helpers.points(ax)["(8,1)"].get_xdata()[0] == pytest.approx(objective(shape, 8192))


def test_the_three_panels_of_figure_2(paper, table):
    panels = plots.loss_vs_costs(table, paper, 131_072, title="t")
    assert [ax.get_xlabel().removeprefix("\u2190 cheaper      ") for ax in panels] == [
        "inference memory\nat 128K (values)", "forward FLOPs of T/2 tokens\nat 128K", "hardware-aware cost Z\nat 128K (no unit)"
    ]  # fmt: skip
    assert len({tuple(plot_helpers.points(ax)["(8,1)"].get_ydata()) for ax in panels}) == 1
    assert len(panels[0].figure.legends) == 1


def test_continued_runs_are_not_drawn_among_others():
    rows = []
    for n, d in ((10**7, 256), (10**8, 512), (10**9, 1024)):
        shape = {"size": str(n), "n_layers": d // 64, "d_model": d, "n_heads": 8, "n_kv_heads": 1, "params_non_embedding": n}
        run = shape | {"cell": f"{n}", "context": 8192, "loss": 2 + (1e8 / n) ** 0.2}
        rows += [run, run | {"cell": f"{n}-continued", "continue_from": "x", "loss": run["loss"] - 0.1}]
    points = plot_helpers.points(plots.loss_vs_cost(plot_helpers.table(rows), None, 8192))["(8,1)"]
    np.testing.assert_allclose(points.get_ydata(), 2 + np.array([10, 1, 0.1]) ** 0.2)


@pytest.mark.parametrize(
    ("cost", "convention", "label", "typical", "tick"),
    [
        ("memory", "figures", "inference memory at 8K (values)", 2e9, "2B"),
        ("memory", "exact", "inference memory at 8K (bytes)", 2e9, "2G"),
        ("flops", "paper", "forward FLOPs of a token at 8K", 3e10, "30G"),
        ("flops", "figures", "forward FLOPs of T/2 tokens at 8K", 2e15, "2P"),
        ("z", "figures", "hardware-aware cost Z at 8K (no unit)", 4e4, "40k"),
    ],
)
def test_units(cost, convention, label, typical, tick):
    chosen = cost_axes.objective(cost, convention)
    assert cost_axes.label(chosen, 8192) == label
    ax = style.new_axes()
    ax.set_xlim(typical / 3, typical * 3)
    cost_axes.scale(ax.xaxis, chosen)
    assert tick in plot_helpers.texts_of_ticks(ax.xaxis)


def test_a_convention_of_ones_own():
    rule = dataclasses.replace(costs.named_convention("figures"), flops="per_token")
    assert cost_axes.label(cost_axes.objective("flops", rule)) == "forward FLOPs of a token"
    assert cost_axes.counted(rule, "flops") == ""


def test_ratios_between_sizes_are_those_of_the_runs_and_have_no_kinks():
    table = Aspect((1e6, 1e7, 1e8, 1e9), (64.0, 85.0, 43.0, 57.0))
    smooth = cost_axes.smooth(table)
    np.testing.assert_allclose(smooth(np.array(table.params)), table.ratio)
    np.testing.assert_allclose(smooth(np.array([1e5, 1e11])), [64, 57])  # as the table has it outside
    ratio = smooth(np.geomspace(1e6, 1e9, 601))
    assert ratio.min() >= 43 * 0.99
    assert ratio.max() <= 85 * 1.01
    kinked = table(np.geomspace(1e6, 1e9, 601))
    assert np.abs(np.diff(ratio, 2)).max() < 0.2 * np.abs(np.diff(kinked, 2)).max()
    assert cost_axes.smooth(Aspect.constant(64))(5.0) == 64


def test_between_sizes_of_as_many_layers_a_model_has_as_many():
    """3 layers of 28 and of 48, 4 of 64: a cost that counts layers, as of a long cache, must not swing between them."""
    sizes = np.array([3 * 28.0**2, 3 * 48.0**2, 4 * 64.0**2]) * 8
    smooth = cost_axes.smooth(Aspect(tuple(sizes), (28 / 3, 16.0, 16.0)))
    n = np.geomspace(sizes[0], sizes[1], 50)
    layers = (n / 8 / smooth(n) ** 2) ** (1 / 3)
    np.testing.assert_allclose(layers, 3, rtol=1e-9)


def test_the_answer_of_each_loss_is_that_of_the_search(paper):
    """With one ratio for all sizes, whatever the shapes of runs: so the search can be asked for the same."""
    flat = Aspect.constant(64)
    found = cost_axes.answers_by_loss(paper, objectives.Z(), 131_072, dict.fromkeys(paper, flat), 2.6, 3.1)
    assert found[0][0] == pytest.approx(2.6)
    assert found[-1][1] == pytest.approx(3.1)
    for start, end, heads in found[::6]:
        assert optimum.search(paper, (start + end) / 2, 131_072, aspect=64).heads == heads
    without = cost_axes.answers_by_loss(dict(paper), objectives.Z(), 131_072, dict.fromkeys(paper, flat), 1.0, 3.1)
    assert without[0][0] > 2.0  # losses below every E are left out


def test_what_can_not_be_drawn(paper, table):
    with pytest.raises(ValueError, match="cost 'x' is unknown: use z, flops, memory, or an objective"):
        plots.loss_vs_cost(table, paper, 8192, cost="x")
    with pytest.raises(ValueError, match=r"heads \(8,1\): a law, but no run in the table"):
        plots.loss_vs_cost(table[table["n_kv_heads"] != 1], {Heads(8, 1): paper[Heads(8, 1)]}, 8192)
    with pytest.raises(ValueError, match="one training context at a time"):
        plots.loss_vs_cost(table.assign(context=range(len(table))), paper, 8192)
    with pytest.raises(ValueError, match=r"none of \d+ runs is done"):
        plots.loss_vs_params(table.assign(status="diverged"))


def test_pictures_are_the_same_bytes_every_time(paper, tmp_path):
    two = {heads: paper[heads] for heads in list(paper)[:2]}
    pairs = [plots.save(plots.loss_vs_params(two).figure, tmp_path / name) for name in ("a", "b")]
    assert [path.read_bytes() for path in pairs[0]] == [path.read_bytes() for path in pairs[1]]
