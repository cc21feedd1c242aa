"""A model that somebody has: its shape from a config.json of Hugging Face, a run, an import or a table of public models."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

from gqa_jax import costs, storage
from gqa_jax.conversion import hf_config
from gqa_jax.costs import Shape
from gqa_jax.errors import ConfigError, close
from gqa_jax.training import start

CONFIG = hf_config.CONFIG
SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")  # fields of a model's `Shape`


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """The shape of a model: its real depth, widths, heads and vocabulary."""

    name: str
    shape: Shape  # tied, as those that it is compared with; serving is told of `untied` for all of them
    untied: bool  # whether the unembedding is a matrix of its own
    source: str  # of these numbers

    def n_params(self, convention: str | costs.Convention = "exact") -> float:
        """N without embeddings, as the convention counts it."""
        return float(costs.count_params(self.shape, convention).non_embedding)

    @property
    def total_params(self) -> int:
        """Every parameter, an unembedding of its own too: what its publisher counts."""
        return int(costs.count_params(dataclasses.replace(self.shape, untied=self.untied), "exact").total)

    @property
    def ratio(self) -> float:
        """d / L."""
        return self.shape.d_model / self.shape.n_layers

    def heads_of(self, head_dim: float) -> tuple[float, float]:
        """(n_h, n_kv) of heads of another size with the same widths of queries and of keys: n_h d_h / head_dim, and n_kv's."""
        factor = self.shape.head_dim / head_dim
        return self.shape.n_heads * factor, self.shape.n_kv_heads * factor

    @property
    def fills_width(self) -> bool:
        """Whether the query heads fill the width, n_h d_h = d."""
        return self.shape.n_heads * self.shape.head_dim == self.shape.d_model


def load(text: str | Path) -> OwnModel:
    """The model of a config.json, of a folder that holds one, of a run or an import, or of that name (`PUBLIC`).

    Raises ConfigError: no such file or name, no JSON, or a field that is missing, wrong or of another kind of model; a run that
    is not done.
    """
    if is_trained(text):
        model = start.of_folder(text).model
        shape = Shape(**{name: getattr(model, name) for name in SHAPE})
        return OwnModel(PurePath(text).name, shape, model.untied, os.fspath(text))
    path = Path(text)
    if path.is_dir():
        return from_config(hf_config.read(path), _name_of(path / CONFIG), str(path / CONFIG))
    if path.is_file():
        return from_config(hf_config.read_file(path), _name_of(path), str(path))
    if str(text).endswith(".json"):
        raise ConfigError(f"{text}: there is no such file")
    return _public(str(text))


def is_trained(text: str | os.PathLike) -> bool:
    """Whether it is the folder of a run, or of imported parameters, local or on gs://."""
    return storage.is_remote(text) or any((Path(text) / name).is_file() for name in (start.FILE, "result.json", "id.json"))


def from_config(config: Any, name: str, source: str) -> OwnModel:
    """The model that the fields of a config.json describe. Raises ConfigError naming the field, its value and what is wrong."""
    shape = hf_config.shape_of(config, source)
    return OwnModel(name, dataclasses.replace(shape, untied=False), shape.untied, source)


def _name_of(path: Path) -> str:
    """A config.json is called like its folder; one from the hub's cache like its model."""
    hub = re.search(r"models--([^/\\]+)[/\\]snapshots", str(path.absolute()))
    if hub:
        return hub[1].split("--")[-1]
    return path.absolute().parent.name if path.name == CONFIG else path.stem


def _public(text: str) -> OwnModel:
    name = re.sub(r"[\s_]+", "-", text.strip().lower().rpartition("/")[2]).removeprefix("meta-")
    name = name.removesuffix("-hf").removesuffix("-instruct").removesuffix("-base")
    if name in PUBLIC:
        return PUBLIC[name]
    near = close(name, PUBLIC)
    hint = "" if near is None else f"; did you mean {near}?"
    raise ConfigError(
        f"{text}: neither a {CONFIG}, nor a folder that holds one, nor a model of the table{hint} (there are "
        f"{', '.join(PUBLIC)})"
    )


def _published() -> Iterator[OwnModel]:
    with (resources.files("gqa_jax") / "data/presets/public_models.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shape = Shape(**{name: int(row[name]) for name in SHAPE})
            yield OwnModel(row["name"], shape, row["untied"] == "1", row["source"])


#: Public models of the Llama class, by name. A test compares `total_params` with the count in each one's published weights.
PUBLIC = {model.name: model for model in _published()}
