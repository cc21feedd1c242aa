"""Where a run's parameters come from: drawn from its seed, those of a run that is over, or imported ones.

`continue_from` of a configuration names the folder of either. Imported parameters are a folder, local or on gs://, that
`gqa_jax.training.parameters.write_import` has made:

import.json     format, version, model (`ModelConfig.identity`), params_sha256; content: a hash of these; provenance: a text;
                context: tokens that the model is for, or null; stop: ids that end an answer
checkpoints/0   the parameters, as a run saves them, with their checksums (checkpoint.py)
tokenizer/      as in the folder of a run (gqa_jax.data.vocabulary)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gqa_jax import storage
from gqa_jax.config import ROPE_SCALINGS, ModelConfig, TrainConfig, differing_fields, from_mapping, hash_identity
from gqa_jax.data import vocabulary
from gqa_jax.errors import ConfigError
from gqa_jax.training import run_folder

SCRATCH, RUN, IMPORT = "scratch", "run", "import"
FILE = "import.json"
FORMAT, VERSION = "gqa_jax import", 1
_CONTENT = ("format", "version", "model", "params_sha256")
# Fields of the model that change what it computes and none of its arrays: a run may change them, and says so.
_FUNCTION_FIELDS = ("rope_theta", "rope_scaling", *ROPE_SCALINGS["llama3"], "norm_eps", "dtype")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run's parameters come from."""

    kind: str = SCRATCH  # or RUN, IMPORT
    folder: str | None = None  # absolute, or on gs://
    identity: str | None = None  # for the parameters, in the identity of a run that starts here: a run's hash, a content hash
    step: int = 0  # of the checkpoint that holds them
    model: ModelConfig | None = None
    config: TrainConfig | None = None  # of a run
    data_fingerprint: str | None = None  # of the tokens that they were trained on; None: not known
    tokenizer: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)  # name, sha256, eos_id; None: not known
    context: int | None = None  # tokens that the parameters are for: as trained; None: not known
    stop: tuple[int, ...] = ()  # ids that end an answer, of an import; none: the tokenizer's end of a document
    differs: tuple[str, ...] = ()  # what is not as there in the run that starts here: `differences`

    def differences(
        self, config: TrainConfig, data_fingerprint: str | None = None, tokenizer: Mapping[str, Any] | None = None
    ) -> list[str]:
        """What may differ in a run that starts here, and does, a line each: data; RoPE, epsilon and dtype of the model.

        Args:
          data_fingerprint: of the tokens that the run reads; None: they are not there yet.
          tokenizer: name, sha256 and eos_id of their tokenizer; None: not known.
        Raises:
          ConfigError: the parameters have other shapes, or another vocabulary: its ids stand for other text.
        """
        if self.model is None:
            return []
        config.check_source(self.model)
        if self.tokenizer and tokenizer and any(self.tokenizer[key] != tokenizer[key] for key in ("sha256", "eos_id")):
            here, there = (f"{one['name']} ({one['sha256'][:12]})" for one in (tokenizer, self.tokenizer))
            raise ConfigError(
                f"continue_from = {config.continue_from!r} has another vocabulary: tokenizer {here} here, {there} there. "
                "Prepare the text of data.store with that one"
            )
        ours, theirs = ({name: getattr(model, name) for name in _FUNCTION_FIELDS} for model in (config.model, self.model))
        lines = differing_fields(ours, theirs, "model.")
        if config.convert_heads:
            here, there = (f"({model.n_heads},{model.n_kv_heads})" for model in (config.model, self.model))
            lines.append(f"heads: {here} here, by {config.convert_heads}, {there} there")
        known = None not in (data_fingerprint, self.data_fingerprint)
        if known and data_fingerprint != self.data_fingerprint:
            lines.append(f"data.fingerprint: {data_fingerprint[:12]} here, {self.data_fingerprint[:12]} there")
        if tokenizer and not self.tokenizer and not (known and data_fingerprint == self.data_fingerprint):
            lines.append(f"tokenizer: {tokenizer['name']} here, not known there")
        return lines

    def facts(self) -> dict[str, Any]:
        """What result.json has of it."""
        about = {"kind": self.kind, "folder": self.folder, "identity": self.identity, "differs": list(self.differs)}
        return {"kind": self.kind} if self.kind == SCRATCH else about


FROM_SCRATCH = Start()


def of_folder(folder: os.PathLike | str, name: str | None = None) -> Start:
    """The start from the folder of a run that is done, or of imported parameters; local or on gs://.

    Args:
      name: what errors begin with, where it isn't the folder that is to be corrected.
    Raises:
      ConfigError: it is neither, that run is not done, or a file can't be used.
    """
    name, folder = name or os.fspath(folder), storage.path(folder)
    if not storage.is_remote(folder):
        folder = storage.path(os.path.realpath(folder))
    try:
        imported, tokenizer = storage.read_json(folder / FILE), vocabulary.recorded(folder)
        if imported is not None:
            return _of_import(folder, imported, tokenizer)
        result, values = run_folder.find_result(folder / "result.json"), storage.read_json(folder / "config.json")
        config = values and TrainConfig.from_stored(values)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
    if result is None:
        raise ConfigError(f"{name}: {folder} has no result.json: let that run end first, or name another")
    if config is None:
        raise ConfigError(f"{name}: {folder} has no config.json: it is no run that can be continued")
    if result["status"] != "done":
        raise ConfigError(f"{name}: that run {result['status']} at step {result['step']}")
    known = result["identity"], result["step"], config.model, config, result.get("data_fingerprint")
    return Start(RUN, os.fspath(folder), *known, tokenizer, config.context_length)


def content_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of what imported parameters are, 64 hexadecimal digits: of import.json without what it says of their origin."""
    return hash_identity({key: values[key] for key in _CONTENT}, 64)


def _of_import(folder: os.PathLike, values: Mapping[str, Any], tokenizer: Mapping[str, Any] | None) -> Start:
    path = folder / FILE
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise ValueError(f"{path} is not of imported parameters, or of another version than {VERSION}: import them again")
    missing = [key for key in (*_CONTENT, "content") if key not in values]
    if missing or values["content"] != content_hash(values):
        what = f"lacks {', '.join(missing)}" if missing else "was changed: its content hash is another"
        raise ValueError(f"{path} {what}: import the parameters again")
    shape, context, stop = from_mapping(ModelConfig, values["model"]), values.get("context"), values.get("stop")
    stop = tuple(one for one in stop if type(one) is int) if isinstance(stop, list) else ()
    context = context if type(context) is int else None
    return Start(IMPORT, os.fspath(folder), values["content"], 0, shape, tokenizer=tokenizer, context=context, stop=stop)
