"""Configuration of one training run: frozen dataclasses, checked where they are made.

A file of `configs/` makes an `ml_collections.ConfigDict` from `default_config()`; the command line overrides it; then
`TrainConfig.from_dict` turns it into the dataclass that the rest of the program reads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pickle
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections
from ml_collections import config_dict

from gqa_jax import shapes
from gqa_jax.errors import ConfigError, close, closest
from gqa_jax.mesh import MeshShape, divisors

DTYPES = ("float32", "bfloat16")
SCHEDULES = ("wsd", "cosine", "constant")
REMAT_POLICIES = ("none", "full", "attention_only", "dots", "offload")
CONTEXT_ATTENTION = ("gather", "ring")
WINDOWS = ("spread", "first")
WARMUP_FROM = ("one", "zero")
# Kinds of `ModelConfig.rope_scaling`, and the fields that each takes (gqa_jax.model.rope_frequencies).
ROPE_SCALINGS: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context"),
}
# How one key/value head is made of several, of a parent's (gqa_jax.conversion.heads).
HEAD_METHODS, HEAD_METHOD = ("mean", "scaled_mean", "first"), "scaled_mean"  # and the default: docs/fewer-heads.md has why
LARGEST_SEED = 2**63 - 1
BUDGETS = ("tokens", "tokens_per_param", "steps")  # a run is given exactly one of them


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a `gqa_jax.model.Transformer`; names and defaults are the paper's (Section 5.1)."""

    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4  # query heads n_h; n_heads * head_dim need not equal d_model
    n_kv_heads: int = 4  # key/value heads n_kv; divides n_heads
    head_dim: int = shapes.HEAD_DIM
    d_ff: int | None = None  # None: the multiple of 32 closest to 8 d_model / 3
    vocab_size: int = shapes.VOCAB_SIZE
    untied: bool = False  # whether the unembedding is a matrix of its own
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02  # of every matrix; those that write to the residual stream are divided by sqrt(2 n_layers)
    dtype: str = "bfloat16"  # of the computation
    param_dtype: str = "float32"  # of parameters, gradients and optimizer moments
    rope_scaling: str | None = None  # of frequencies, for contexts longer than those trained on: ROPE_SCALINGS
    rope_factor: float = 1.0  # what frequencies are divided by; of "llama3" the low ones
    rope_low_freq_factor: float = 1.0  # low: with fewer turns than this in rope_original_context tokens
    rope_high_freq_factor: float = 4.0  # those with more turns stay as they are
    rope_original_context: int = 8192  # tokens

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, name)
            allowed = isinstance(value, int) and 1 <= value < 2**31
            _require(allowed, f"model.{name} = {value!r}: must be an integer of at least 1, and below 2^31")
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", shapes.ffn_width(self.d_model))
        allowed = 1 <= self.d_ff < 2**31
        _require(allowed, f"model.d_ff = {self.d_ff}: must be at least 1 and below 2^31, or None for 8 d_model / 3")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"model.n_heads = {self.n_heads} is not a multiple of model.n_kv_heads = {self.n_kv_heads}: every key/value "
                f"head serves the same number of query heads; use n_kv_heads from {divisors(self.n_heads)}"
            )
        largest = self.d_model * max(self.vocab_size, self.n_layers * max(self.n_heads * self.head_dim, self.d_ff))
        _require(
            largest < 2**50,
            f"model: {self.n_layers} layers of d_model = {self.d_model}, {self.n_heads} heads of {self.head_dim}, d_ff = "
            f"{self.d_ff}, vocab_size = {self.vocab_size}: one array would have {largest:.3g} values; use a smaller model",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim = {self.head_dim}: must be even, RoPE rotates pairs")
        _require(self.init_std > 0, f"model.init_std = {self.init_std}: must be above 0")
        for name in ("dtype", "param_dtype"):
            _check_choice(f"model.{name}", getattr(self, name), DTYPES)
        self._check_rope_scaling()

    def _check_rope_scaling(self) -> None:
        _check_choice("model.rope_scaling", self.rope_scaling, tuple(ROPE_SCALINGS))
        for name in (name for name in ROPE_SCALINGS["llama3"] if name not in ROPE_SCALINGS[self.rope_scaling]):
            value, default = getattr(self, name), getattr(type(self), name)
            kinds = " or ".join(repr(kind) for kind, names in ROPE_SCALINGS.items() if name in names)
            fix = f"leave it {default}, or set rope_scaling to {kinds}"
            _require(value == default, f"model.{name} = {value}: rope_scaling = {self.rope_scaling!r} does not take it; {fix}")
        for name in ("rope_factor", "rope_original_context"):
            value = getattr(self, name)
            _require(1 <= value < math.inf, f"model.{name} = {value}: must be a finite number of at least 1")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        _require(0 < low < math.inf, f"model.rope_low_freq_factor = {low}: must be a finite number above 0")
        _require(low < high < math.inf, f"model.rope_high_freq_factor = {high}: must be above rope_low_freq_factor = {low}")

    def identity(self) -> dict[str, Any]:
        """Fields by name; of those that were added since the first version the ones that are used, so that names stay."""
        unused = {*ROPE_SCALINGS["llama3"]} - {*ROPE_SCALINGS[self.rope_scaling]}
        unused |= {name for name in ("rope_scaling", "untied") if not getattr(self, name)}
        return {name: value for name, value in vars(self).items() if name not in unused}


@dataclass(frozen=True)
class Execution:
    """How a run is carried out, which changes its result by rounding alone; None: chosen for the devices that are there."""

    mesh: MeshShape | None = None  # devices and what they share; a file and a command line write it "fsdp=4,context=2"
    remat: str | None = None  # what the backward pass computes again: REMAT_POLICIES; None: the fastest that fits
    accumulation_steps: int | None = None  # micro-batches per step; None: as few as fit
    context_attention: str | None = None  # over a context axis: CONTEXT_ATTENTION; None: the one that moves less
    attention: str | None = None  # implementation by name (gqa_jax.attention); None: the best here

    def __post_init__(self):
        steps = self.accumulation_steps
        _require(steps is None or steps >= 1, f"execution.accumulation_steps = {steps}: must be an integer of at least 1")
        _check_choice("execution.remat", self.remat, (*REMAT_POLICIES, None))
        _check_choice("execution.context_attention", self.context_attention, (*CONTEXT_ATTENTION, None))


# Rules of the first version, by group and field: what a stored configuration without the field was made with. They are not in
# an identity, so that what was trained with them keeps its name.
OLD_RULES: Mapping[str, Mapping[str, str]] = {"evaluation": {"windows": "first"}, "optimizer": {"warmup_from": "zero"}}

# Where the fields of `Execution` were before they were a group: at the top, and in the group "model".
_OLD_EXECUTION = {"": ("mesh", "accumulation_steps", "context_attention"), "model": ("remat", "attention")}

# Built-in token stores of that version, and what they are called today: documents were held out by their position.
OLD_STORES: Mapping[str, str] = {name: f"{name}@position" for name in ("sotu-bytes", "sotu-gpt2")}

# What the arrays of a model depend on. Not here: rope_theta and scalings, which a phase at a longer context may change.
_PARAMETER_FIELDS = (
    "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "untied", "param_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Which tokens are trained on, and how they are cut."""

    store: str = "sotu-bytes"  # folder made by `python -m gqa_jax.data.prepare`, or a built-in name
    block_tokens: int = 131_072  # unit of the shuffle; every context length divides it, so all see the same order
    epochs: int = 1  # how often the store may be read; more tokens than that is an error before training
    skip_tokens: int = 0  # of the shuffled order, passed over: what a phase before this one has read
    document_mask: bool = False  # attention within documents only; the paper has none

    def __post_init__(self):
        _require(self.skip_tokens >= 0, f"data.skip_tokens = {self.skip_tokens}: must be at least 0")
        _require(self.block_tokens >= 2, f"data.block_tokens = {self.block_tokens}: must be at least 2")
        _require(self.epochs >= 1, f"data.epochs = {self.epochs}: must be at least 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; defaults are the paper's (Appendix D)."""

    learning_rate: float = 1e-3  # maximum
    schedule: str = "wsd"  # warm-up, constant, cosine decay over the last part; or "cosine", "constant"
    warmup_fraction: float = 0.1  # of the steps, linear
    warmup_from: str = "one"  # the first step has 1/n of the maximum, as the paper's scheduler; "zero": 0, which trains nothing
    decay_fraction: float = 0.2  # of the steps, at the end (wsd)
    final_lr_fraction: float = 0.1  # of learning_rate, reached at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # of the global gradient

    def __post_init__(self):
        _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        _check_choice("optimizer.warmup_from", self.warmup_from, WARMUP_FROM)
        for name in ("learning_rate", "clip_norm", "eps"):
            _require(getattr(self, name) > 0, f"optimizer.{name} = {getattr(self, name)}: must be above 0")
        for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optimizer.{name} = {value}: must be a fraction, 0 to 1")
        if self.schedule == "wsd":
            total = self.warmup_fraction + self.decay_fraction
            _require(total <= 1, f"optimizer: warmup_fraction + decay_fraction = {total}: must be at most 1")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} = {getattr(self, name)}: must be in [0, 1)")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay = {self.weight_decay}: must be at least 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss: always after the last step, on the same tokens whatever the context length is."""

    tokens: int = 1_048_576  # targets; the held-out split must have them
    windows: str = "spread"  # evenly over the whole held-out split, in units of data.block_tokens; "first": its first tokens
    every_steps: int = 0  # also during training; 0: only at the end

    def __post_init__(self):
        _check_choice("evaluation.windows", self.windows, WINDOWS)
        _require(self.tokens >= 1, f"evaluation.tokens = {self.tokens}: must be at least 1")
        _require(self.every_steps >= 0, f"evaluation.every_steps = {self.every_steps}: must be at least 0 (0: at the end)")


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved. Changes nothing in the result."""

    every_steps: int = 1000
    keep: int = 2  # newest checkpoints kept; a damaged newest one needs the one before it

    def __post_init__(self):
        _require(self.every_steps >= 1, f"checkpoint.every_steps = {self.every_steps}: must be at least 1")
        _require(self.keep >= 2, f"checkpoint.keep = {self.keep}: must be at least 2, so that a damaged one loses little")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written beside metrics.jsonl. Changes nothing in the result."""

    every_steps: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None  # needs `pip install wandb`; an outage never stops a step
    progress: bool = True  # bar on a terminal

    def __post_init__(self):
        _require(self.every_steps >= 1, f"logging.every_steps = {self.every_steps}: must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """One run: one cell of a grid."""

    context_length: int = 8192  # T, tokens
    batch_tokens: int = 524_288  # tokens per optimizer step, whatever T is
    tokens: int | None = None  # training budget: exactly one of tokens, tokens_per_param, steps
    tokens_per_param: float | None = None  # of parameters without embeddings
    steps: int | None = None
    seed: int = 0
    continue_from: str | None = None  # folder that the parameters come from: of a run that is done, or imported; "../NAME"
    convert_heads: str | None = None  # HEAD_METHODS: how the heads there become those of `model`; None: they are the same
    label: str = ""  # name of the size, for tables
    model: ModelConfig = field(default_factory=ModelConfig)
    execution: Execution = field(default_factory=Execution)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self):
        for name in ("context_length", "batch_tokens"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, f"{name} = {value!r}: must be an integer of at least 1")
        budget = {name: getattr(self, name) for name in BUDGETS}
        given = {name: value for name, value in budget.items() if value is not None}
        _require(len(given) == 1, f"give exactly one of tokens, tokens_per_param and steps; here: {given or 'none of them'}")
        (name, value), *_ = given.items()
        _require(0 < value < 2**63, f"{name} = {value}: must be above 0, and below 2^63")
        _require(0 <= self.seed <= LARGEST_SEED, f"seed = {self.seed}: must be 0 to {LARGEST_SEED} (2^63 - 1)")
        _require(self.continue_from != "", "continue_from = '': must be a run folder, or None to start from scratch")
        _check_choice("convert_heads", self.convert_heads, (*HEAD_METHODS, None))
        scratch = self.convert_heads and self.continue_from is None
        _require(not scratch, f"convert_heads = {self.convert_heads!r}: set continue_from to the folder whose heads they are")
        multiples = {"batch_tokens": self.batch_tokens, "evaluation.tokens": self.evaluation.tokens}
        for name, value in (multiples | {"data.skip_tokens": self.data.skip_tokens}).items():
            if value % self.context_length:
                raise ConfigError(
                    f"{name} = {value} is not a multiple of context_length = {self.context_length}: "
                    f"use {_nearest_multiple(value, self.context_length)}"
                )
        steps, mesh = self.execution.accumulation_steps, self.execution.mesh
        if self.batch_size % (steps or 1):
            raise ConfigError(
                f"execution.accumulation_steps = {steps} does not divide the {self.batch_size} sequences of a batch "
                f"(batch_tokens / context_length): use one of {divisors(self.batch_size)}"
            )
        if self.data.block_tokens % self.context_length:
            raise ConfigError(
                f"context_length = {self.context_length} does not divide data.block_tokens = {self.data.block_tokens}, the "
                f"unit of the shuffle that every context length is cut from: use a block of "
                f"{_nearest_multiple(self.data.block_tokens, self.context_length)}, the same in all runs that are compared"
            )
        if mesh is not None:
            reason = mesh.unsupported_reason(self.model, self.context_length, self.micro_batch)
            _require(reason is None, f"execution.mesh {str(mesh)!r}: {reason}")

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch, over all devices; of the whole batch while accumulation is not chosen."""
        return self.batch_size // (self.execution.accumulation_steps or 1)

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.context_length

    @property
    def n_steps(self) -> int:
        """Optimizer steps: the budget in tokens, rounded up to whole batches."""
        if self.steps is not None:
            return self.steps
        from gqa_jax import costs

        tokens = self.tokens
        if tokens is None:
            tokens = self.tokens_per_param * costs.count_params(self.model, convention="exact").non_embedding
        return max(1, -(-round(tokens) // self.batch_tokens))

    @property
    def train_tokens(self) -> int:
        """Tokens that the run trains on, D."""
        return self.n_steps * self.batch_tokens

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict of every field, JSON-serialisable; `from_dict` inverts it."""
        mesh = self.execution.mesh
        # dataclasses.asdict would copy each value, which are numbers and texts.
        values = {name: dict(vars(value)) if name in _GROUPS else value for name, value in vars(self).items()}
        values["execution"]["mesh"] = None if mesh is None else str(mesh)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The checked configuration. Raises ConfigError on an unknown key (naming the closest) or a bad value."""
        return from_mapping(cls, values)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration that `to_dict` gave, now or in an earlier version: what a config.json holds.

        A field that is not there did not exist when it was written, and has the value of the rule that was then in force
        (`OLD_RULES`), not today's default; built-in token stores are those of that time; fields of `Execution` may be where
        they were. Raises ConfigError as `from_dict`.
        """
        values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        if "execution" not in values:
            groups = {"": values, "model": values.get("model")}
            values["execution"] = {
                name: groups[group].pop(name)
                for group, names in _OLD_EXECUTION.items()
                if isinstance(groups[group], dict)
                for name in names
                if name in groups[group]
            }
        data, evaluation = values.get("data"), values.get("evaluation", {})
        if isinstance(data, Mapping) and isinstance(evaluation, Mapping) and "windows" not in evaluation:
            values["data"] = {k: OLD_STORES.get(v, v) if k == "store" and isinstance(v, str) else v for k, v in data.items()}
        for group, fields in OLD_RULES.items():
            if isinstance(values.get(group, {}), Mapping):
                values[group] = fields | dict(values.get(group, {}))
        return cls.from_dict(values)

    def under_old_rules(self) -> TrainConfig:
        """This run as the first version had it: its rules (`OLD_RULES`), and built-in token stores of its time."""
        groups = {group: dataclasses.replace(getattr(self, group), **fields) for group, fields in OLD_RULES.items()}
        data = dataclasses.replace(self.data, store=OLD_STORES.get(self.data.store, self.data.store))
        return dataclasses.replace(self, **groups, data=data)

    def rules(self, holdout: str) -> str:
        """The rules behind the loss of this run, like "hash/spread/one": `holdout` of its token store, windows, warm-up.

        Losses under different rules are not comparable: the text that they are of differs, or the training.
        """
        return "/".join((holdout, self.evaluation.windows, self.optimizer.warmup_from))

    def heldout(self, data_fingerprint: str) -> str:
        """Stands for the targets of the evaluation, like "1f2e3d4c5b6a/spread/8x131072": runs with the same have the same.

        Args:
          data_fingerprint: of the token store that the run reads.
        """
        tokens = self.evaluation.tokens
        unit = tokens if self.evaluation.windows == "first" else math.gcd(tokens, self.data.block_tokens)
        cut = str(tokens) if unit == tokens else f"{tokens // unit}x{unit}"
        return f"{data_fingerprint[:12]}/{self.evaluation.windows}/{cut}"

    def check_source(self, source: ModelConfig) -> None:
        """Raises ConfigError unless this run can start from parameters of `source`, naming the fields that differ."""
        same = [name for name in _PARAMETER_FIELDS if not (self.convert_heads and name in ("n_heads", "n_kv_heads"))]
        ours, theirs = ({name: getattr(model, name) for name in same} for model in (self.model, source))
        if lines := differing_fields(ours, theirs, "model."):
            raise ConfigError(
                f"continue_from = {self.continue_from!r} has other parameters: {'; '.join(lines)}. Use the same model"
            )
        if self.convert_heads:
            check_heads(source, self.model.n_heads, self.model.n_kv_heads)

    def identity(self, data_fingerprint: str, continues: str | None = None) -> dict[str, Any]:
        """The fields that change the mathematics of the result, budget resolved: what names a cell and guards a resume.

        Not in it: where tokens lie (their fingerprint is), devices and how they share, kernels, rematerialisation,
        accumulation, logging, checkpoints. What was added to the configuration since the first version is in it only where it
        is used, so that results keep their names.

        Args:
          continues: what stands in it for the path of `continue_from` (`gqa_jax.training.start.Start.identity`).
        Raises:
          ConfigError: this run continues another, and `continues` is not given, or the other way round.
        """
        values = self.to_dict()
        if self.continue_from is None:
            _require(continues is None, f"this run starts from scratch, not from {continues}: set continue_from to its folder")
            del values["continue_from"]
        else:
            _require(continues is not None, f"continue_from = {self.continue_from!r}: the identity of that run is not known")
            values["continue_from"] = continues
        for name in ("execution", "checkpoint", "logging", "label", "tokens", "tokens_per_param"):
            del values[name]
        values["steps"], values["model"] = self.n_steps, self.model.identity()
        for name in ("store", "epochs"):
            del values["data"][name]
        if self.convert_heads is None:
            del values["convert_heads"]
        for name in ("skip_tokens", "document_mask"):
            if not values["data"][name]:
                del values["data"][name]
        del values["evaluation"]["every_steps"]
        for group, fields in OLD_RULES.items():
            for name, old in fields.items():
                if values[group][name] == old:
                    del values[group][name]
        values["data"]["fingerprint"] = data_fingerprint
        return values


def check_heads(model: ModelConfig, n_heads: int, n_kv_heads: int) -> None:
    """Raises ConfigError unless the heads of a model can be made these (`gqa_jax.conversion.heads`)."""
    allowed = [k for k in divisors(model.n_heads) if model.n_kv_heads % k == 0 or k % model.n_kv_heads == 0]
    if n_kv_heads not in allowed:
        raise ConfigError(
            f"n_kv_heads = {n_kv_heads} can't be made of {model.n_kv_heads} key/value heads of {model.n_heads} query heads: "
            f"they are pooled in groups of one size, or repeated; use one of {allowed}"
        )
    if not 1 <= n_heads <= model.n_heads or n_heads % n_kv_heads:
        allowed = [*range(n_kv_heads, model.n_heads + 1, n_kv_heads)]
        raise ConfigError(
            f"n_heads = {n_heads} can't be made of {model.n_heads} query heads over {n_kv_heads} key/value heads: each of "
            f"these keeps the same number; use one of {allowed}"
        )


_GROUPS = frozenset(spec.name for spec in dataclasses.fields(TrainConfig) if spec.default_factory is not dataclasses.MISSING)


def default_config() -> ml_collections.ConfigDict:
    """Every field with its default as a locked ConfigDict; fields that may be None are typed placeholders."""
    return pickle.loads(_pickled_default())


_pickled_default = functools.cache(lambda: pickle.dumps(_config_dict_of(TrainConfig)))  # read in half of the time of making it


def hash_identity(identity: Mapping[str, Any], length: int = 10) -> str:
    """First `length` hexadecimal digits of SHA-256 over the identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: ours, theirs` for every leaf in which two nested dicts differ."""
    lines = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} here, {b!r} there")
    return lines


_hints = functools.cache(typing.get_type_hints)  # a grid makes hundreds of configurations


def _config_dict_of(cls: type) -> ml_collections.ConfigDict:
    hints = _hints(cls)
    result = ml_collections.ConfigDict()
    for spec in dataclasses.fields(cls):
        hint = hints[spec.name]
        if dataclasses.is_dataclass(hint):
            result[spec.name] = _config_dict_of(hint)
        elif isinstance(hint, types.UnionType):  # X | None
            result[spec.name] = config_dict.placeholder(field_types(cls)[spec.name][0])
        else:
            result[spec.name] = spec.default
    return result.lock()


def from_mapping(cls: type, values: Mapping[str, Any], prefix: str = "", whole: type | None = None) -> Any:
    """A dataclass from nested mappings; of a group of fields of the dataclass `whole`, whose names begin with `prefix`.

    Raises ConfigError: a key it lacks, naming the closest of any group; a value of another type; a number that is not finite.
    """
    whole, arguments = whole or cls, {}
    known = _fields_of(cls, prefix, whole)
    for name, value in values.items():
        if (spec := known.get(name)) is None:
            raise ConfigError(unknown_key(f"{prefix}{name}", whole))
        path, allowed, is_group, is_mesh = spec
        kind = type(value)
        if is_group:
            _require(isinstance(value, Mapping), f"{path} = {value!r}: must be a group of fields")
            value = from_mapping(allowed[0], value, f"{path}.", whole)
        elif kind is int and abs(value) >= 10**24:
            raise ConfigError(f"{path} = {value!r:.40}: must be below 10^24")
        elif kind is int and float in allowed:
            value = float(value)
        elif kind not in allowed:
            raise ConfigError(wrong_type(path, value, whole))
        elif kind is float and not math.isfinite(value):
            raise ConfigError(f"{path} = {value}: must be a finite number")
        elif kind is str and is_mesh:
            try:
                value = MeshShape.parse(value)
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from None
        arguments[name] = value
    return cls(**arguments)


@functools.cache
def _fields_of(cls: type, prefix: str, whole: type) -> Mapping[str, tuple[str, tuple[type, ...], bool, bool]]:
    """Of the fields of `cls`, by name: path in `whole`, types there, whether it is a group, whether it is a mesh."""
    found = {}
    for name in (spec.name for spec in dataclasses.fields(cls)):
        kinds, hint = field_types(whole)[f"{prefix}{name}"], _hints(cls)[name]
        found[name] = f"{prefix}{name}", kinds, dataclasses.is_dataclass(kinds[0]), MeshShape in typing.get_args(hint)
    return found


@functools.cache
def field_types(cls: type, prefix: str = "") -> Mapping[str, tuple[type, ...]]:
    """What each field is written as, by its path: "model.d_ff" -> (int, NoneType); "model" -> its dataclass; a mesh is text."""
    found = {}
    for spec in dataclasses.fields(cls):
        hint, path = _hints(cls)[spec.name], f"{prefix}{spec.name}"
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[path] = tuple(str if kind is MeshShape else kind for kind in kinds)
        if dataclasses.is_dataclass(hint):
            found |= field_types(hint, f"{path}.")
    return types.MappingProxyType(found)


def unknown_key(path: str, cls: type) -> str:
    """The sentence about a key that `cls` and its groups don't have: names the same key of another group, or the closest."""
    group, _, name = path.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for known in field_types(cls):
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
    own = [known for known in field_types(cls) if known.rpartition(".")[0] == group]
    names = [known.rpartition(".")[2] for known in own]
    if name in by_name:
        found = by_name[name]
    elif group and not own:
        return unknown_key(group, cls) if group not in field_types(cls) else f"{path!r}: {group!r} is no group of fields"
    elif (meant := close(name, names)) is not None:
        found = [own[names.index(meant)]]
    else:
        found = by_name.get(close(name, by_name) or "", [])
    meaning = f"did you mean {' or '.join(map(repr, found))}?" if found else f"allowed: {', '.join(names)}"
    return f"unknown configuration key {path!r}: {meaning}"


def unknown_key_of(error: BaseException) -> str | None:
    """`unknown_key` of the error that a ConfigDict of `default_config` raises about a key; None of any other error."""
    found = re.match(r"""["']?Key "(.*?)" does not exist""", str(error))
    return unknown_key(found[1], TrainConfig) if found else None


def wrong_type(path: str, value: Any, cls: type) -> str:
    """The sentence about a value that the field of `cls` at `path` can't have, naming what it can be."""
    allowed = ("None" if kind is types.NoneType else kind.__name__ for kind in field_types(cls)[path])
    return f"{path} = {value!r}: must be {' or '.join(allowed)}"


def _check_choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r}: {closest(str(value), map(str, allowed))}")


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
