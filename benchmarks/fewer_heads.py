"""What fewer key/value heads of a trained model cost in loss: tables of two grids that have run.

    python -m launch run configs/grids/head_methods.py && python -m benchmarks.fewer_heads methods runs/head-methods
    python -m launch run configs/grids/fewer_heads.py && python -m benchmarks.fewer_heads study runs/fewer-heads

`methods`: loss by method, a row for each size, number of heads and share of the parent's tokens: the mean of its seeds, and in
how many of these each method is the best. `study`: of one model every number of heads and share, beside the same trained anew.
There a share of 0 is the model at once, before it is trained on. --out writes the table as .csv.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

import gqa_jax
from gqa_jax.config import HEAD_METHOD, HEAD_METHODS
from gqa_jax.conversion import converting


def runs(root: Path) -> pd.DataFrame:
    """The runs of a grid with what they began with: `method` and `share` of the parent's tokens, none of those from scratch."""
    found = gqa_jax.load_results(root)
    parents = found.set_index("cell")
    found["method"] = found["start_differs"].str.extract(r"here, by (\w+),", expand=False)
    parent = found["continue_from"].map(parents["tokens"].to_dict())
    found["share"] = found["tokens"].astype(float) / parent.astype(float)
    return found


def at_once(root: Path, parent: str, n_kv_heads: int, method: str) -> float:
    """Loss of a run with other heads before it is trained on."""
    with tempfile.TemporaryDirectory() as folder:
        return converting.convert_heads(
            Path(root) / "cells" / parent, Path(folder) / "new", n_kv_heads=n_kv_heads, method=method
        ).after.loss


def methods(root: Path) -> pd.DataFrame:
    found = runs(root)
    made = found[found["method"].notna()]
    rows = made.rename(columns={"continue_from": "parent"})[["size", "parent", "n_kv_heads", "method", "share", "loss"]]
    rows = rows.assign(share=rows["share"].round(2))
    keys = ["size", "n_kv_heads", "share"]
    each = rows.pivot_table(index=[*keys, "parent"], columns="method", values="loss")[list(HEAD_METHODS)]
    table = each.groupby(keys).mean().round(4)
    best = each.idxmin(axis=1)
    for method in HEAD_METHODS:
        table[f"best_{method}"] = (best == method).groupby(keys).sum()
    table["seeds"] = each.groupby(keys).size()
    return table.reset_index()


def study(root: Path) -> pd.DataFrame:
    found = runs(root)
    scratch = found[found["continue_from"].isna()].set_index("n_kv_heads")
    (parent,) = found["continue_from"].dropna().unique()
    rows = []
    for one in found[found["continue_from"].notna()].sort_values(["n_kv_heads", "tokens"]).itertuples():
        anew = scratch.loc[one.n_kv_heads]
        rows.append(
            {
                "n_heads": one.n_heads, "n_kv_heads": one.n_kv_heads, "share": round(one.share, 2), "tokens": one.tokens,
                "loss": one.loss, "loss_anew": anew["loss"], "train_flops": one.train_flops,
                "train_flops_anew": anew["train_flops"], "params_non_embedding": one.params_non_embedding,
            }
        )  # fmt: skip
    for n_kv_heads in sorted({row["n_kv_heads"] for row in rows} - {scratch.loc[scratch.index.max()].name}):
        like = next(row for row in rows if row["n_kv_heads"] == n_kv_heads)
        loss = at_once(root, parent, int(n_kv_heads), HEAD_METHOD)
        rows.append(like | {"share": 0.0, "tokens": 0, "train_flops": 0.0, "loss": loss})
    table = pd.DataFrame(rows).sort_values(["n_kv_heads", "share"], ascending=[False, True]).reset_index(drop=True)
    table["loss_parent"] = found.set_index("cell").loc[parent, "loss"]
    return table.round({"loss": 4, "loss_anew": 4, "loss_parent": 4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("methods", "study"))
    parser.add_argument("root", type=Path, help="folder of the grid")
    parser.add_argument("--out", metavar="FILE.csv")
    asked = parser.parse_args()
    table = {"methods": methods, "study": study}[asked.table](asked.root)
    print(table.to_string(index=False))
    if asked.out:
        table.to_csv(asked.out, index=False)


if __name__ == "__main__":
    main()
