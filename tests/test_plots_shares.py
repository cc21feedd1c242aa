"""Shares of FLOPs and memory by component (Figures 7 and 8)."""

import numpy as np
import pytest

from gqa_jax import costs, plots, shapes
from tests import plot_helpers

SHAPE = costs.Shape(24, 1536, 24, 8)
CONTEXTS = [1024 * 2**i for i in range(8)]


def edges(ax):
    """Upper edge of every area at the first and the last x, by its label."""
    found = {}
    for area in ax.collections:
        points_Px2 = area.get_paths()[0].vertices
        ends = [points_Px2[np.isclose(points_Px2[:, 0], x), 1].max() for x in (points_Px2[:, 0].min(), points_Px2[:, 0].max())]
        found[area.get_label()] = ends
    return found


@pytest.mark.parametrize("picture", [plots.flops_shares, plots.memory_shares])
@pytest.mark.parametrize("convention", ["paper", "figures", "exact"])
def test_areas_fill_the_axes_and_look_different(picture, convention):
    ax = picture(SHAPE, CONTEXTS, convention=convention)
    tops = edges(ax)
    assert list(tops.values())[-1] == pytest.approx([100, 100])
    assert ax.get_ylim() == (0, 100)
    assert len({(str(area.get_facecolor()), area.get_hatch()) for area in ax.collections}) == len(tops)
    shades = [(round(plot_helpers.luma(area.get_facecolor()[0][:3]), 1), area.get_hatch()) for area in ax.collections]
    assert len(set(shades)) == len(shades)  # in black and white too


def test_what_a_convention_does_not_count_is_not_there():
    assert "output embedding" in edges(plots.flops_shares(SHAPE, CONTEXTS, convention="exact"))
    assert "output embedding" not in edges(plots.flops_shares(SHAPE, CONTEXTS, convention="figures"))


def test_shares_are_those_of_costs():
    tops = edges(plots.memory_shares(SHAPE, CONTEXTS, convention="figures"))
    shares = [costs.memory_shares(SHAPE, context, "figures") for context in (CONTEXTS[0], CONTEXTS[-1])]
    assert tops["feed-forward"] == pytest.approx([100 * share.ffn for share in shares])
    assert tops["attention weights"] == pytest.approx([100 * (share.ffn + share.attention) for share in shares])


def test_against_the_size():
    sizes = [costs.Shape(s.n_layers, s.d_model, s.d_model // 64, 1) for s in reversed(shapes.SIZES.values())]
    ax = plots.flops_shares(sizes, 131_072, convention="figures")
    least = costs.flops_shares(sizes[-1], 131_072, "figures")
    assert edges(ax)["feed-forward"][0] == pytest.approx(100 * least.ffn)
    assert ax.get_xlim() == pytest.approx([costs.count_params(sizes[i], "figures").non_embedding for i in (-1, 0)])
    assert ax.get_xlabel() == "parameters without embeddings, $N$, at 128K"


def test_areas_are_named_from_the_top_down():
    legend = plots.memory_shares(SHAPE, CONTEXTS, convention="exact").get_legend()
    names = [text.get_text() for text in legend.get_texts()]  # without the norms, which are too thin to be seen
    assert names == ["key/value cache", "embedding", "attention weights", "feed-forward"]
    assert len({(str(patch.get_facecolor()), patch.get_hatch()) for patch in legend.get_patches()}) == 4


def test_one_of_the_two_has_several_values():
    for shape, context in ((SHAPE, 8192), ([SHAPE, SHAPE], CONTEXTS)):
        with pytest.raises(ValueError, match="give one shape and several contexts, or several shapes and one"):
            plots.flops_shares(shape, context)
    with pytest.raises(ValueError, match="convention 'x' is unknown"):
        plots.flops_shares(SHAPE, CONTEXTS, convention="x")
