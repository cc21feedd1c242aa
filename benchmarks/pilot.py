"""What noise is, by a grid of seeds x head configurations at some sizes and lengths of training (`configs/grids/pilot.py`).

    python -m benchmarks.pilot runs/pilot --out results/pilot [--machine "2 CPU cores"]

writes, under --out: loss.csv, a row per run; documents.csv, a row per run and held-out document; noise.csv, a row per size and
length, and one of all sizes together ("all"); README.md with what was run and what it says. The label of a size ends in "-long"
where the training is the longer one. Nothing is trained, and noise.csv follows from the other two as they are written.

Losses y of S seeds and H heads of a size are y_sh = mean_h + shared_s + own_sh, both Normal. With the mean squares B of seeds
(S - 1 degrees of freedom) and W of what is left ((S - 1)(H - 1)), own variance is W, shared variance (B - W) / H, F = B / W,
and the share of what heads have in common, rho = shared / (shared + own), is (F - 1) / (F - 1 + H): Shrout and Fleiss (1979),
ICC(3,1). Ends of its interval have F / F_.975 and F / F_.025 in the place of F. Estimates are not cut at 0: where nothing is
shared, about half of them are below. All sizes together: sums of squares and degrees of freedom are added.

The same analysis with documents in the place of heads says how much of a difference between two seeds is common to all text.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from gqa_jax import errors, results, storage
from gqa_jax.laws import Heads, evidence
from gqa_jax.training import evaluation, run_folder

LONG = "-long"  # ends the label of a size that is trained for longer
ALL = "all"  # in the column `size`: all sizes together
LEVEL = 0.95
DIGITS = 6  # decimals of losses


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A two-way analysis of variance, seeds x columns; variances in squares of the unit of what is analysed."""

    n_columns: int
    between: float  # mean square of seeds
    within: float  # of what is left
    dof_between: int
    dof_within: int

    @property
    def own(self) -> float:
        return self.within

    @property
    def shared(self) -> float:
        """Unbiased, so it may be below 0."""
        return (self.between - self.within) / self.n_columns

    @property
    def f(self) -> float:
        return self.between / self.within

    @property
    def p(self) -> float:
        """Probability of such an F, or a larger one, where nothing is shared."""
        return float(stats.f.sf(self.f, self.dof_between, self.dof_within))

    @property
    def share(self) -> float:
        return self._share(self.f)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share, 95%."""
        low, high = stats.f.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], self.dof_between, self.dof_within)
        return self._share(self.f / low), self._share(self.f / high)

    @property
    def probability(self) -> float:
        """That something is shared: what F makes of the laws' prior, evidence.SIZE_EFFECT, by the densities of F.

        With a share rho, F / (1 + H rho / (1 - rho)) has the distribution that F has where nothing is shared.
        """
        shares = np.linspace(*evidence.SHARE, 2001)
        scale = 1 + self.n_columns * shares / (1 - shares)
        density = stats.f.pdf(self.f / scale, self.dof_between, self.dof_within) / scale
        there = evidence.SIZE_EFFECT * np.trapezoid(density, shares) / (evidence.SHARE[1] - evidence.SHARE[0])
        none = (1 - evidence.SIZE_EFFECT) * stats.f.pdf(self.f, self.dof_between, self.dof_within)
        return float(there / (there + none))

    def _share(self, f: float) -> float:
        return float((f - 1) / (f - 1 + self.n_columns))


def analyse(tables: Sequence[np.ndarray]) -> Analysis:
    """Of one or more tables (S, H) of losses, S seeds and H columns (heads, or documents), that have the same variances.

    Raises ValueError where a table has fewer than two seeds or columns, where columns differ in number, or nothing is left.
    """
    shapes = {table.shape for table in tables}
    n_columns = {shape[1] for shape in shapes}
    if len(n_columns) != 1 or min(min(shape) for shape in shapes) < 2:
        raise ValueError(f"tables of {sorted(shapes)} seeds x columns: needs two or more of each, and as many columns in all")
    between = within = dof_between = dof_within = 0
    for table in tables:
        rest = table - table.mean(0)
        seeds = rest.mean(1, keepdims=True)
        between += table.shape[1] * float(np.sum(seeds**2))
        within += float(np.sum((rest - seeds) ** 2))
        dof_between += table.shape[0] - 1
        dof_within += (table.shape[0] - 1) * (table.shape[1] - 1)
    if not within > 0:
        raise ValueError("differences between seeds are exactly the same in all columns: are these copies of one run?")
    return Analysis(*n_columns, between / dof_between, within / dof_within, dof_between, dof_within)


def deviation(samples: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Standard deviation of samples that may differ in mean, and its 95% interval (chi-square)."""
    squares = sum(float(np.sum((sample - sample.mean()) ** 2)) for sample in samples)
    dof = sum(len(sample) - 1 for sample in samples)
    ends = stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], dof)
    return float(np.sqrt(squares / dof)), *(float(np.sqrt(squares / end)) for end in ends)


def read(folder: os.PathLike | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of loss.csv and documents.csv of a finished grid folder, losses rounded.

    Raises:
      FileNotFoundError: no grid folder.
      ValueError: a run that is missing or not done, seeds x heads that are not complete, runs without losses by document, or
        of other documents than the first.
    """
    root = storage.path(folder)
    cells = results.grid_facts(root)["cells"]
    table = results.load_results(root)
    table = table[table["cell"].isin(cells)]
    done = set(table["cell"][table["status"] == "done"])
    if missing := [name for name in cells if name not in done]:
        diverged = [name for name in missing if name in set(table["cell"])]
        fix = f"{diverged[0]} diverged: without it seeds can't be compared" if diverged else "`python -m launch run` goes on"
        names = ", ".join(missing[:2]) + " ..." * (len(missing) > 2)
        raise ValueError(f"{root}: {len(missing)} of {len(cells)} runs are not done ({names}): {fix}")
    label = table["size"].astype(str)
    losses = pd.DataFrame(
        {
            "size": label.str.removesuffix(LONG),
            "length": label.str.endswith(LONG).map({True: "long", False: "short"}),
            "heads": [str(Heads(h, k)) for h, k in zip(table["n_heads"], table["n_kv_heads"], strict=True)],
            "seed": table["seed"],
            "params_non_embedding": table["params_non_embedding"],
            "tokens": table["tokens"],
            "steps": table["steps"],
            "loss": table["loss"].round(DIGITS),
            "loss_sem": table["loss_sem"].round(DIGITS),
            "documents": table["eval_documents"],
            "learning_rate": table["learning_rate"],
            "seconds_total": table["seconds_total"].round(1),
            **{name: table[name] for name in ("cell", "jax", "flax", "commit")},
        }
    ).reset_index(drop=True)
    _refuse_incomplete(losses)
    return losses, _documents(root, losses)


def _refuse_incomplete(losses: pd.DataFrame) -> None:
    """Raises ValueError unless every size and length has all of its heads with all of its seeds, once each, two or more."""
    if losses.empty:
        raise ValueError("the grid has no runs: see configs/grids/pilot.py for one that has")
    for (size, length), group in losses.groupby(["size", "length"], sort=False):
        seeds, heads = group["seed"].nunique(), group["heads"].nunique()
        for name, count in (("seeds", seeds), ("head configurations", heads)):
            if count < 2:
                raise ValueError(
                    f"size {size!r}, {length}: {count} of {name}: noise is what differs between two or more; train others, as "
                    "configs/grids/pilot.py does"
                )
        if len(group) != seeds * heads or group.duplicated(["heads", "seed"]).any():
            of = f"{len(group)} runs of {seeds} seeds and {heads} head configurations"
            raise ValueError(f"size {size!r}, {length}: {of}: needs each pair once")


def _documents(root: Path, losses: pd.DataFrame) -> pd.DataFrame:
    rows, first = [], None
    for run in losses.itertuples():
        path = root / "cells" / run.cell / run_folder.DOCUMENTS
        content = storage.read_bytes(path)
        if content is None:
            raise ValueError(f"{path} is not there; {results.AGAIN}")
        try:
            found = evaluation.from_bytes(content)
        except ValueError as error:
            raise ValueError(f"{path} can't be read ({error}); {results.AGAIN}") from error
        key = found.document, found.tokens, found.targets
        first = first or key
        if not all(map(np.array_equal, key, first)):
            raise ValueError(f"{path} is of other held-out text than {losses['cell'][0]}: all runs need the same evaluation")
        about = {name: getattr(run, name) for name in ("cell", "size", "length", "heads", "seed")}
        rows += [
            about | {"document": f"{document:016x}", "targets": tokens, "loss": round(loss / tokens, DIGITS)}
            for document, tokens, loss in zip(found.document.tolist(), found.tokens.tolist(), found.loss.tolist(), strict=True)
        ]
    return pd.DataFrame(rows)


def noise(losses: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """Rows of noise.csv, from those of loss.csv and documents.csv: nats per token, their squares, percent of the loss."""
    rows = []
    for length, of_length in losses.groupby("length", sort=False):
        texts = documents[documents["length"] == length]
        sizes = list(dict.fromkeys(of_length["size"]))
        rows += [_row(size, of_length[of_length["size"] == size], texts[texts["size"] == size]) for size in sizes]
        same = len({frozenset(of["heads"]) for _, of in of_length.groupby("size")}) == 1
        rows += [_row(ALL, of_length, texts)] if len(sizes) > 1 and same else []
    return pd.DataFrame(rows)


def _row(size: str, losses: pd.DataFrame, documents: pd.DataFrame) -> dict[str, Any]:
    """A row of noise.csv: of one size, or of all."""
    tables = [of.pivot_table(index="seed", columns="heads", values="loss") for _, of in losses.groupby("size", sort=False)]
    row = {
        "size": size,
        "length": losses["length"].iloc[0],
        "least_steps": losses["steps"].min(),
        "most_steps": losses["steps"].max(),
        "runs": len(losses),
        "mean_loss": losses["loss"].mean(),
    }
    for heads in dict.fromkeys(losses["heads"]):
        name = "sd_" + heads.strip("()").replace(",", "_")
        columns = [table[heads].to_numpy(np.float64) for table in tables]
        for unit, samples in (("", columns), ("_percent", [100 * column / column.mean() for column in columns])):
            row |= dict(zip((f"{name}{unit}{end}" for end in ("", "_low", "_high")), deviation(samples), strict=True))
    found = analyse([table.to_numpy(np.float64) for table in tables])
    row |= {
        "shared_variance": found.shared,
        "own_variance": found.own,
        "share": found.share,
        "share_low": found.interval[0],
        "share_high": found.interval[1],
        "f": found.f,
        "p": found.p,
        "shared_probability": found.probability,
        "dof_seeds": found.dof_between,
        "dof_own": found.dof_within,
    }
    by_run = documents.groupby(["size", "heads"], sort=False)
    text = analyse([of.pivot_table(index="seed", columns="document", values="loss").to_numpy(np.float64) for _, of in by_run])
    return row | {
        "documents": text.n_columns,
        # Of two seeds a document's difference is common + own, of twice the variances; its mean has between / D for a seed.
        "document_difference": np.sqrt(2 * text.between / text.n_columns),
        "document_sd": np.sqrt(2 * text.within),
        "document_share": text.share,
    }


def table(found: pd.DataFrame) -> str:
    """noise.csv for people, as Markdown."""
    heads = [name.removeprefix("sd_").removesuffix("_percent") for name in found if name.endswith("_percent")]
    lines = [
        "| size | steps | mean loss | " + " | ".join(f"sd ({h.replace('_', ',')}), %" for h in heads)
        + " | own sd, nats | share in common | F (p) | P(shared) |",
        "|---" * (7 + len(heads)) + "|",
    ]  # fmt: skip
    for row in found.to_dict("records"):
        sds = [row[f"sd_{h}_percent{end}"] for h in heads for end in ("", "_low", "_high")]
        cells = [
            row["size"],
            _steps(row),
            f"{row['mean_loss']:.3f}",
            *(f"{sd:.2f} ({low:.2f} to {high:.1f})" for sd, low, high in zip(*[iter(sds)] * 3, strict=True)),
            f"{np.sqrt(row['own_variance']):.4f}",
            f"{row['share']:.2f} ({row['share_low']:.2f} to {row['share_high']:.2f})",
            f"{row['f']:.2f} ({row['p']:.2f})",
            f"{row['shared_probability']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(row: dict[str, Any]) -> str:
    least, most = row["least_steps"], row["most_steps"]
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def says(losses: pd.DataFrame, found: pd.DataFrame) -> str:
    """What the numbers say, in sentences that follow from them."""
    lines = []
    for length, rows in found[found["size"] != ALL].groupby("length", sort=False):
        of = rows[[name for name in rows if name.startswith("sd_") and name.endswith("_percent")]].to_numpy()
        steps = _steps({"least_steps": rows["least_steps"].min(), "most_steps": rows["most_steps"].max()})
        of_text = [
            f"{row['document_share']:.0%} (size {row['size']}: the mean over documents differs by "
            f"{row['document_difference']:.4f} nats, root mean square, single documents scatter by {row['document_sd']:.4f})"
            for row in rows.to_dict("records")
        ]
        lines.append(
            f"- {steps} steps: seeds of one recipe differ by {of.min():.2f} to {of.max():.2f}% of the loss (standard "
            f"deviations, median {np.median(of):.2f}%). Of the variance of a document's difference between two seeds, all "
            f"documents have {' and '.join(of_text)} in common."
        )
        of_length = losses[losses["length"] == length]
        others = of_length.groupby(["size", "heads"])["loss"].transform("sum") - of_length["loss"]
        others = others / (of_length.groupby(["size", "heads"])["loss"].transform("size") - 1)
        away = 100 * (of_length["loss"] / others - 1)
        run = of_length.loc[away.abs().idxmax()]
        lines.append(
            f"  Farthest from the other seeds of its recipe is seed {run['seed']} of {run['heads']} at size {run['size']}: "
            f"{away.abs().max():.1f}% {'above' if away[run.name] > 0 else 'below'} their mean."
        )
    one = found[found["size"] != ALL]
    sure = int((one["p"] < 1 - LEVEL).sum())
    lines.append(
        f"- A part that all heads of a seed have in common is found at p < {1 - LEVEL:.2f} in {sure} of {len(one)} sizes and "
        "lengths."
    )
    for row in found[found["size"] == ALL].to_dict("records"):
        low, high = max(row["share_low"], 0.0), row["share_high"]
        lines.append(
            f"- All sizes together, {_steps(row)} steps: the share is estimated at {row['share']:.2f}; anything from {low:.2f} "
            f"to {high:.2f} is compatible with the losses (95%), p of nothing shared is {row['p']:.2f}, and a probability of "
            f"{evidence.SIZE_EFFECT} that something is shared becomes {row['shared_probability']:.2f}."
        )
    return "\n".join(lines)


def readme(folder: os.PathLike | str, losses: pd.DataFrame, found: pd.DataFrame, command: str, machine: str) -> str:
    """Text of README.md; what was run is read from the run folders."""
    root = storage.path(folder)
    environments = [_json(root / "cells" / cell / "environment.json") for cell in losses["cell"]]
    times = [_json(root / "cells" / cell / "heartbeat.json")["time"] for cell in losses["cell"]]
    days = sorted({f"{datetime.datetime.fromtimestamp(time, datetime.UTC):%Y-%m-%d}" for time in times})
    versions = sorted({", ".join(f"{k} {v}" for k, v in environment["versions"].items()) for environment in environments})
    devices = sorted({f"{environment['n_devices']} x {environment['device']}" for environment in environments})
    minutes = losses.groupby("length", sort=False)["seconds_total"].sum() / 60
    commits = ", ".join(f"`{commit[:10]}{'+' * commit.endswith('+')}`" for commit in dict.fromkeys(losses["commit"]))
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(losses["learning_rate"])))
    return f"""# Noise of real runs

Written by `{command}`. The runs are those of `configs/grids/pilot.py`, whose docstring says what is trained.

- {len(losses)} runs: {losses["seed"].nunique()} seeds x {", ".join(dict.fromkeys(losses["heads"]))} x sizes \
{", ".join(dict.fromkeys(losses["size"]))} x {found["length"].nunique()} lengths of training, learning rate {rates}; \
they ended on {", ".join(days)} (UTC).
- Hardware: {", ".join(filter(None, (machine, "JAX on " + ", ".join(devices))))}. Minutes of wall time, summed over runs: \
{" + ".join(f"{value:.0f} ({length})" for length, value in minutes.items())}.
- Versions: {"; ".join(versions)}.
- Commits: {commits}. + : files differed from the commit.

{table(found)}

Standard deviations are between seeds of one recipe, with 95% chi-square intervals. Own sd and share in common (what heads of a
seed share of the variance) are of the two-way analysis of variance, the share with its F-based 95% interval; below 0 is what
chance gives where little is shared. P(shared) is the probability that anything is, {evidence.SIZE_EFFECT:g} before the losses,
with an even prior of the share. "all" adds the sums of squares of all sizes. Nats, degrees of freedom and documents are in
`noise.csv`. Runs of two lengths begin alike, so their rows are not independent of each other.

{says(losses, found)}
"""


def _json(path: Path) -> dict[str, Any]:
    values = storage.read_json(path)
    if values is None:
        raise ValueError(f"{path} is not there: it says what was run, and a run that ends leaves it")
    return values


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="folder of a finished grid")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; those of an earlier call are replaced")
    parser.add_argument("--machine", default="", help="words for what it was trained on, which run folders don't say")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is a file; give a folder")
    try:
        losses, documents = read(options.grid)
        found = noise(losses, documents)
        command = shlex.join(["python", "-m", "benchmarks.pilot", *arguments])
        text = readme(options.grid, losses, found, command, options.machine)
    except (ValueError, FileNotFoundError) as error:
        parser.error(errors.first_line(error))
    options.out.mkdir(parents=True, exist_ok=True)
    losses.to_csv(options.out / "loss.csv", index=False)
    documents.to_csv(options.out / "documents.csv", index=False)
    found.to_csv(options.out / "noise.csv", index=False, float_format="%.6g")
    (options.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
