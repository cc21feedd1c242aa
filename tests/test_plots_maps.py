"""The map of cost-optimal heads (Table 4)."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from gqa_jax import plots
from gqa_jax.laws import Heads
from gqa_jax.search import optimum, presets
from tests import plot_helpers

TABLE_4 = {
    3.0: "32,1 16,1 8,1 4,1 4,1",
    2.9: "32,1 16,1 16,1 8,1 4,1",
    2.8: "32,2 16,1 16,1 8,1 8,1",
    2.7: "32,4 16,2 16,1 16,1 8,1",
    2.6: "32,8 16,4 16,2 16,2 8,1",
    2.5: "32,16 16,8 16,4 16,2 16,2",
    2.4: "32,32 32,32 32,8 32,8 32,4",
    2.35: "32,32 32,32 32,32 32,16 32,8",
}
CONTEXTS = [8192, 16_384, 32_768, 65_536, 131_072]


def frame(**columns):
    rows = []
    for loss, text in TABLE_4.items():
        for context, heads in zip(CONTEXTS, text.split(), strict=True):
            n_heads, n_kv = map(int, heads.split(","))
            rows.append({"loss": loss, "context_served": context, "n_heads": n_heads, "n_kv_heads": n_kv, "rank": 1})
    found = pd.DataFrame(rows).assign(**columns)
    losers = found.assign(rank=2, n_heads=1, n_kv_heads=1, probability=0.01)
    return pd.concat([losers, found], ignore_index=True)


def cells(ax):
    """Texts by (row, column)."""
    found = {}
    for text in ax.texts:
        x, y = text.get_position()
        if text.get_transform().contains_branch(ax.transData):
            found.setdefault((round(y), round(x)), []).append(text.get_text())
    return found


def test_the_papers_table():
    ax = plots.optimum_map(frame())
    found = cells(ax)
    for i, text in enumerate(TABLE_4.values()):
        assert [found[i, j] for j in range(5)] == [[f"({heads})"] for heads in text.split()]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8K", "16K", "32K", "64K", "128K"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "3.00",
        "2.90",
        "2.80",
        "2.70",
        "2.60",
        "2.50",
        "2.40",
        "2.35",
    ]
    assert plot_helpers.texts(ax)[-1] == "(query, key/value) heads of least cost"  # no probability, no regret


def test_borders_part_different_heads():
    rows = frame()
    rows = rows[rows["loss"] >= 2.9]  # 2 x 5 cells; 10 sides above and below, 2 + 2 at the ends
    between_rows = sum(a != b for a, b in zip(TABLE_4[3.0].split(), TABLE_4[2.9].split(), strict=True))
    between_columns = sum(
        a != b for loss in (3.0, 2.9) for a, b in zip(TABLE_4[loss].split(), TABLE_4[loss].split()[1:], strict=False)
    )
    assert len(plots.optimum_map(rows).lines) == 14 + between_rows + between_columns


def test_probability_is_shade_number_and_hatch():
    rows = frame(probability=np.linspace(0.02, 1.0, 40), n_params=1.2e9, note=[None] * 39 + ["extrapolated"])
    ax = plots.optimum_map(rows)
    found = cells(ax)
    assert found[0, 0] == ["(32,1)", "1.2B · 2%"]
    assert found[7, 4] == ["(32,8)*", "1.2B · >99%"]  # 1,000 draws can't tell
    hatched = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in ax.patches if p.get_hatch()}
    assert hatched == {divmod(i, 5) for i, p in enumerate(np.linspace(0.02, 1.0, 40)) if p < 0.5}
    shades = [p.get_facecolor() for p in ax.patches if not p.get_hatch()]
    luma = [np.dot(shade[:3], [0.299, 0.587, 0.114]) for shade in shades]
    assert luma == sorted(luma, reverse=True)  # whatever the hue
    assert min(luma) > 0.65  # dark text is read on it
    note = plot_helpers.texts(ax)[-1].replace("\n", " ")
    assert note == (
        "(query, key/value) heads of least expected regret, $N$ and probability of being the cheapest (tint; hatched below "
        "50%); * outside the sizes trained"
    )


def test_cells_have_the_colours_of_their_heads():
    ax = plots.optimum_map(frame(probability=0.9))
    tints = {}
    for patch in ax.patches:
        row, column = round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)
        tints.setdefault(list(TABLE_4.values())[row].split()[column], set()).add(to_hex(patch.get_facecolor()))
    assert all(len(own) == 1 for own in tints.values())
    assert len(set.union(*tints.values())) == len(tints)


def test_cells_without_an_answer_are_dashes():
    rows = frame()
    gone = (rows["loss"] == 2.35) & (rows["context_served"] == 8192) & (rows["rank"] == 1)
    rows = rows.astype({"rank": "Int64"})
    rows.loc[gone, "rank"] = pd.NA
    assert cells(plots.optimum_map(rows))[7, 0] == ["\u2013"]


def test_llama3s_rule_can_win():
    rows = frame().astype({"n_heads": "Int64"})
    rows.loc[rows["rank"] == 1, ["n_heads", "n_kv_heads"]] = (pd.NA, 8)
    assert cells(plots.optimum_map(rows))[0, 0] == [plots.head_text(Heads(None, 8))]


def test_a_map_of_the_search():
    laws = presets.load("paper")
    rows = optimum.optimum_map(laws, [2.8, 2.615], CONTEXTS)
    found = cells(plots.optimum_map(rows))
    best = rows[(rows["rank"] == 1) & (rows["loss"] == 2.615) & (rows["context_served"] == 131_072)].iloc[0]
    assert found[1, 4][0].startswith(f"({best['n_heads']},{best['n_kv_heads']})")
    assert len(found) == 10


def test_what_can_not_be_drawn():
    with pytest.raises(ValueError, match="the map needs columns rank"):
        plots.optimum_map(frame().drop(columns="rank"))
    with pytest.raises(ValueError, match="the map has no row"):
        plots.optimum_map(frame().iloc[:0])
    with pytest.raises(ValueError, match="loss 3 at 8192 has two rows of rank 1"):
        plots.optimum_map(pd.concat([frame(), frame()]))
