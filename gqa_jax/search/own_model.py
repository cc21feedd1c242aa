"""A model that somebody has: its shape from a Hugging Face config.json of the Llama class, or from a table of public models.

The laws are of one kind of model: pre-norm, gated feed-forward network of three matrices, grouped queries, rotary positions, no
biases, every layer alike. What is not of that kind is refused by the field that says so, before anything is computed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from gqa_jax import costs
from gqa_jax.costs import Shape
from gqa_jax.errors import ConfigError, close, first_line

CONFIG = "config.json"
SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")  # fields of a model's `Shape`
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

#: What makes another kind of model, and the fields that say so unless they are missing, null, false, 0 or empty.
_OTHER_KINDS = {
    "attention to a window: its cache does not grow with the context": "sliding_window",
    "biases, which the laws' models have not": "attention_bias mlp_bias qkv_bias use_bias",
    "a mixture of experts": "num_local_experts num_experts n_routed_experts num_experts_per_tok moe_intermediate_size",
    "latent attention (MLA): its cache holds no heads": "kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim",
    "attention to something that is no text": "cross_attention_layers",
    "further layers that predict several tokens": "num_nextn_predict_layers",
    "layers that differ": "block_configs",
}


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
    """The model of a config.json, of a folder that holds one, or of that name (`PUBLIC`).

    Raises ConfigError: no such file or name, no JSON, or a field that is missing, wrong or of another kind of model.
    """
    path = Path(text)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{text}: the folder holds no {CONFIG}")
        path = path / CONFIG
    if path.is_file():
        return from_config(_read(path), _name_of(path), str(path))
    if str(text).endswith(".json"):
        raise ConfigError(f"{text}: there is no such file")
    return _public(str(text))


def from_config(config: Any, name: str, source: str) -> OwnModel:
    """The model that the fields of a config.json describe. Raises ConfigError naming the field, its value and what is wrong."""
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source}: it holds no fields of a model, but a {type(config).__name__}")

    def wrong(field: str, why: str) -> ConfigError:
        said = f"{field} = {_short(config[field])}" if field in config else f"{field} is missing"
        return ConfigError(f"{source}: {said}: {why}")

    kind = config.get("model_type")
    if kind not in CLASSES:
        raise wrong("model_type", f"only models of the Llama class can be compared: {', '.join(CLASSES)}")
    if (named := config.get("architectures")) is not None and named != [CLASSES[kind]]:
        raise wrong("architectures", f"a model_type of {kind} must be a [{CLASSES[kind]!r}]")
    for what, field in ((what, field) for what, fields in _OTHER_KINDS.items() for field in fields.split()):
        if config.get(field) not in (None, False, 0, "", [], {}):
            raise wrong(field, f"{what}; only models of the Llama class can be compared")
    if kind == "mistral" and "sliding_window" not in config:
        raise wrong("sliding_window", "a Mistral without that field has a window of 4,096; write null if yours has none")
    layers = config.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(one != "full_attention" for one in layers)):
        raise wrong("layer_types", "layers that differ; only models whose layers all see the whole context can be compared")
    if config.get("hidden_act", "silu") != "silu":
        raise wrong("hidden_act", "the laws' models have silu")

    def number(field: str, default: int | None = None) -> int:
        value = config.get(field)
        if value is None and default is not None:
            return default
        if field not in config:
            raise wrong(field, "a model can't be counted without it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise wrong(field, "it must be a whole number above 0")
        return value

    d_model, n_heads = number("hidden_size"), number("num_attention_heads")
    n_kv_heads = number("num_key_value_heads", n_heads if kind == "llama" else None)  # a Mistral's default is 8, not n_h
    if n_heads % n_kv_heads:
        raise wrong("num_key_value_heads", f"it must divide num_attention_heads = {n_heads}")
    if config.get("head_dim") is None and n_heads > d_model:
        raise wrong("num_attention_heads", f"more than hidden_size = {d_model}, and no head_dim")
    shape = Shape(
        n_layers=number("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=number("head_dim", d_model // n_heads),
        d_ff=number("intermediate_size"),
        vocab_size=number("vocab_size"),
    )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise wrong("tie_word_embeddings", "it must be true or false")
    return OwnModel(name, shape, not tied, source)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: it is no JSON file of a model: {first_line(error)}") from error


def _name_of(path: Path) -> str:
    """A config.json is called like its folder; one from the hub's cache like its model."""
    hub = re.search(r"models--([^/\\]+)[/\\]snapshots", str(path.absolute()))
    if hub:
        return hub[1].split("--")[-1]
    return path.absolute().parent.name if path.name == CONFIG else path.stem


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


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
