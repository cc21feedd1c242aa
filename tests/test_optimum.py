import numpy as np
import pandas as pd
import pytest

from gqa_jax import costs, optimum
from gqa_jax.laws import Heads, PowerLaw

# The paper's own curves of Figure 2, traced: L = 1.95 + A (N / 1e9)^-b.
CURVES = {(8, 8): (0.7257, 0.1803), (8, 1): (0.7517, 0.1748), (4, 1): (0.7677, 0.1721), (1, 1): (0.8346, 0.1641)}


def laws():
    sizes = np.array([75e6, 1.2e9])
    return {Heads(*h): PowerLaw(1e9 * a ** (1 / b), b, 1.95, 1.0, sizes, np.zeros(2)) for h, (a, b) in CURVES.items()}


def test_shape_has_the_size_and_the_aspect_that_were_asked_for():
    aspect = optimum.paper_aspect()
    for n in (1e6, 3e8, 2e9, 1e11):
        shape = optimum.shape_for(n, Heads(8, 1), aspect=aspect, head_dim=64, vocab_size=50_304, convention="figures")
        assert costs.count_params(shape, "figures").non_embedding == pytest.approx(n, rel=1e-9)
        assert shape.d_model / shape.n_layers == pytest.approx(aspect(n))


def test_table_4_at_128k():
    """Of Table 4's column at 128K, the cells of L* = 3.0 and 2.9 are (4,1) and of 2.8 is (8,1), from the paper's own curves."""
    table = optimum.best_heads(laws(), [3.0, 2.9, 2.7], [131_072])
    best = table[table["rank"] == 1].set_index("loss")
    assert tuple(best.loc[3.0, ["n_heads", "n_kv_heads"]]) == (4, 1)
    assert tuple(best.loc[2.9, ["n_heads", "n_kv_heads"]]) == (4, 1)
    assert tuple(best.loc[2.7, ["n_heads", "n_kv_heads"]]) == (8, 1)


def test_longer_contexts_never_want_more_kv_cache():
    table = optimum.best_heads(laws(), [2.8], [1024, 8192, 131_072], cost="memory")
    best = table[table["rank"] == 1].sort_values("context_served")
    assert best["n_kv_heads"].is_monotonic_decreasing


def test_an_unreachable_loss_and_an_extrapolated_size_are_said():
    table = optimum.best_heads(laws(), [1.9, 2.3], [8192])
    unreachable, far = table[table["loss"] == 1.9], table[table["loss"] == 2.3]
    assert unreachable["z"].isna().all()
    assert unreachable["rank"].isna().all()
    assert unreachable["note"].str.contains("E = 1.9500").all()
    assert far["note"].str.contains("above the trained sizes").all()


def test_aspect_is_linear_between_known_sizes_and_constant_outside():
    aspect = optimum.aspect_of_sizes([(100.0, 2, 32), (200.0, 2, 64)])
    assert [aspect(n) for n in (1, 100, 150, 200, 1e9)] == [16, 16, 24, 32, 32]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="cost 'Z' is unknown: use z, flops, memory"):
        optimum.best_heads(laws(), [2.8], [8192], cost="Z")
    with pytest.raises(ValueError, match="convention"):
        optimum.best_heads(laws(), [2.8], [8192], convention="figure")


def test_rows_are_complete_and_ranked():
    table = optimum.best_heads(laws(), [2.8, 2.7], [8192, 131_072])
    assert len(table) == 2 * 2 * len(CURVES)
    for _, rows in table.groupby(["loss", "context_served"]):
        assert list(rows["rank"]) == [1, 2, 3, 4]
        assert rows["z"].is_monotonic_increasing
    assert isinstance(table, pd.DataFrame)
