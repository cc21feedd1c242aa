"""Differences in held-out loss between runs, paired by the documents of both: columns `DIFFERENCE_COLUMNS`.

What makes one text harder than another is the same for both runs and cancels, so the standard error is far below that of the
losses. Documents are the same where their tokens are, whatever store they come from, and the same targets of them were read:
runs with other evaluation.tokens, data.block_tokens or windows share few or none. Where the losses by document of a run are
missing or damaged its differences are empty, and `note` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from gqa_jax import errors, storage
from gqa_jax.results import AGAIN, cell_names, columns_of, each, exported, load_results, typed
from gqa_jax.training import evaluation, run_folder

DIFFERENCE_COLUMNS = columns_of("differences")


def load_differences(
    path: os.PathLike | str, pairs: Iterable[tuple[str, str]] | None = None, *, other: str | None = None
) -> pd.DataFrame:
    """Differences in held-out loss between runs of a grid folder, local or gs://, paired by documents: `DIFFERENCE_COLUMNS`.

    Exported tables hold some pairs only: of others `note` says so.

    Args:
      pairs: (cell, other) by name, in any number. None: every run that is done, with `other`; without one, with the run of
        the lowest loss among those of its training context, size and rules (not with itself).
    Raises:
      FileNotFoundError: neither run folders nor exported tables are there.
      ValueError: an unknown name, both arguments; a grid.json that can't be used.
    """
    if pairs is not None and other is not None:
        raise ValueError("give pairs, or the one other that all are compared with")
    root = storage.path(path)
    names = cell_names(root)
    if names is None:
        return typed(_exported_differences(root, pairs, other), DIFFERENCE_COLUMNS)
    if pairs is None:
        pairs = _pairs(load_results(root), other)
    pairs = list(pairs)
    for name in dict.fromkeys(name for pair in pairs for name in pair) if other is None else [other]:
        if name not in names:
            raise ValueError(f"{root} has no cell {name!r}: {errors.closest(name, names)}")
    of = _documents_of(root, (name for pair in pairs for name in pair))
    rows = [{"cell": a, "other": b} | _difference(of[a], of[b]) for a, b in pairs]
    return typed(pd.DataFrame(rows), DIFFERENCE_COLUMNS)


def load_differences_between(
    path: os.PathLike | str, other_path: os.PathLike | str, pairs: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> pd.DataFrame:
    """Differences in held-out loss between runs of two grid folders, as `load_differences` has them within one.

    Args:
      pairs: runs of `path` and runs of `other_path`, by name, in any number of pairs: each side is the mean of its runs, like
        seeds of one configuration.

    Returns:
      `DIFFERENCE_COLUMNS` but for the names, one row a pair; empty, with a note, where the losses by document are missing, or
      no document is in both.
    """
    pairs = [(list(ours), list(theirs)) for ours, theirs in pairs]
    ours_of, theirs_of = (
        _documents_of(storage.path(root), (name for pair in pairs for name in pair[side]))
        for side, root in enumerate((path, other_path))
    )
    means = [(_mean([ours_of[name] for name in ours]), _mean([theirs_of[name] for name in theirs])) for ours, theirs in pairs]
    rows = [_difference(*both) for both in means]
    return typed(pd.DataFrame(rows), [column for column in DIFFERENCE_COLUMNS if column.name not in ("cell", "other")])


def _exported_differences(root: epath.Path, pairs: Iterable[tuple[str, str]] | None, other: str | None) -> pd.DataFrame:
    """Those of exported tables, which are of some pairs: of others a note says so."""
    if pairs is None and other is None:
        return exported(root, "differences")
    if pairs is None:
        pairs = _pairs(load_results(root), other)
    try:
        rows = typed(exported(root, "differences"), DIFFERENCE_COLUMNS).to_dict("records")
    except FileNotFoundError:  # exported by the first version
        rows = []
    found = {(row["cell"], row["other"]): row for row in rows}
    result = []
    for cell, against in pairs:
        row = {"cell": cell, "other": against, "note": "not among the exported differences: needs the folders of the runs"}
        if (cell, against) in found:
            row = found[cell, against]
        elif (there := found.get((against, cell))) is not None:
            of = {"difference": "difference", "low": "high", "high": "low"}
            negative = {name: None if pd.isna(there[source]) else -there[source] for name, source in of.items()}
            row = there | negative | {"cell": cell, "other": against}
        result.append(row)
    return pd.DataFrame(result)


def _pairs(table: pd.DataFrame, other: str | None) -> list[tuple[str, str]]:
    """Every run that is done with `other`, or with the best of its kind."""
    done = table[(table["status"] == "done") & table["loss"].notna()]
    if other is not None:
        return [(cell, other) for cell in done["cell"] if cell != other]
    size = done["size"].where(done["size"].fillna("") != "", done["n_layers"].astype(str) + "x" + done["d_model"].astype(str))
    best = done["cell"].loc[done.groupby([done["context"], size, done["rules"]])["loss"].transform("idxmin")]
    return [(cell, against) for cell, against in zip(done["cell"], best, strict=True) if cell != against]


def _documents_of(root: epath.Path, names: Iterable[str]) -> dict[str, evaluation.Documents | str]:
    """Of runs by name, each read once."""
    names = list(dict.fromkeys(names))
    return dict(zip(names, each(_documents, root, names), strict=True))


def _documents(folder: epath.Path) -> evaluation.Documents | str:
    """The losses by document of a run, or why there are none."""
    path = folder / run_folder.DOCUMENTS
    try:
        content = storage.read_file(path)
        if content is None:
            over = "result.json" in storage.names(folder)
            return f"{folder.name} has no {path.name}; {AGAIN}" if over else f"{folder.name} has no result yet"
        return evaluation.from_bytes(content)
    except ValueError as error:
        return f"{path.name} of {folder.name} can't be read ({error}); {AGAIN}"


def _mean(runs: Sequence[evaluation.Documents | str]) -> evaluation.Documents | str:
    """Of runs that were evaluated on the same documents, or why there is none."""
    first = runs[0]
    for one in runs:
        if isinstance(one, str):
            return one
        if not all(np.array_equal(getattr(first, name), getattr(one, name)) for name in ("document", "tokens", "targets")):
            return "runs of one configuration were evaluated on other documents each"
    return first._replace(loss=np.mean([one.loss for one in runs], axis=0))


def _difference(ours: evaluation.Documents | str, theirs: evaluation.Documents | str) -> dict[str, Any]:
    if missing := [why for why in (ours, theirs) if isinstance(why, str)]:
        return {"note": "; ".join(missing)}
    found = evaluation.difference(ours, theirs)
    if found is None:
        return {"n_documents": 0, "tokens": 0, "note": "not one document was evaluated alike in both"}
    value, error, low, high, n_documents = found.estimate
    note = f"left out: {found.left_out} documents that are not alike in both" if found.left_out else ""
    if error is None:
        note = "; ".join(filter(None, ("one document: no standard error", note)))
    return {
        "difference": value, "standard_error": error, "low": low, "high": high, "tokens": found.tokens,
        "n_documents": n_documents, "note": note,
    }  # fmt: skip
