import numpy as np
import pandas as pd

from gqa_jax.laws import runs as run_table
from gqa_jax.search import presets
from tests import law_tables


def test_a_size_is_the_same_for_all_heads_whatever_says_so():
    table = law_tables.synthetic()
    shapes = [*zip(table["n_layers"], table["d_model"], strict=True)]
    labels = run_table.size_labels(table)
    assert labels.dtype == np.int64
    assert labels.tolist() == [law_tables.SIZES[1:7].index(shape) for shape in shapes]  # N differs by heads, the label does not
    assert table.groupby(labels)["params_non_embedding"].nunique().min() > 1
    names = [f"{layers} layers of {d}" for layers, d in shapes]
    named = table.assign(size=names).drop(columns=["n_layers", "d_model"])
    assert run_table.size_labels(named).tolist() == labels.tolist()
    gap = table.assign(size=names, n_layers=table["n_layers"].astype("Int64").mask(table.index == 3))
    assert run_table.size_labels(gap).tolist() == labels.tolist()  # one row without layers: the names say it
    shuffled = table.sample(frac=1, random_state=0)
    assert run_table.size_labels(shuffled).tolist() == [labels[i] for i in shuffled.index]


def test_without_a_name_a_size_is_a_count_within_a_hundredth():
    counts = np.array([1e9, 2.002e6, 1.009e9, 2e6, 1.011e9])
    assert run_table.labels_by_count(counts).tolist() == [1, 0, 1, 0, 2]
    assert run_table.size_labels(pd.DataFrame({"params_non_embedding": counts})).tolist() == [1, 0, 1, 0, 2]
    assert run_table.labels_by_count(np.array([])).tolist() == []


def test_runs_of_every_head_configuration_have_the_labels_of_all():
    rows, _ = run_table.usable(presets.paper_losses())
    groups = run_table.by_heads(rows)
    sizes = dict(zip(run_table.size_labels(rows), rows["size"], strict=True))
    for heads, runs in groups.items():
        assert len(runs.size) == len(runs.loss)
        widths = [int(sizes[label].split("x")[1]) for label in runs.size]
        assert widths == runs.d_model.tolist(), heads
    few = rows[~((rows["n_kv_heads"] == 1) & (rows["d_model"] == 768))]  # one H lacks the smallest size
    lacking = run_table.by_heads(run_table.usable(few)[0])
    assert min(runs.size.min() for runs in lacking.values()) == 0
    assert {int(runs.size.min()) for heads, runs in lacking.items() if heads.n_kv_heads == 1} == {1}
