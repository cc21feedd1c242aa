"""README.md of a folder for Hugging Face's readers: what the model is, and what is known of its training."""

from __future__ import annotations

from typing import Any

import jinja2

from gqa_jax import costs, storage
from gqa_jax.data.vocabulary import Tokenizer
from gqa_jax.formatting import context as tokens_of
from gqa_jax.formatting import short
from gqa_jax.training import run_folder, start
from gqa_jax.training.start import RUN, Start

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- gqa_jax
- grouped-query-attention
---
# {{ name }}

A decoder of the Llama class ({{ fields.architectures[0] }}) with {{ model.n_heads }} query heads and {{ heads }} of
{{ model.head_dim }}: {{ model.n_layers }} layers of width {{ model.d_model }}, {{ params }} parameters, {{ body }} of them \
without embeddings. Written by gqa_jax.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

| | |
|---|---|
{% for what, value in rows -%}
| {{ what }} | {{ value }} |
{% endfor %}
{{ after }}
"""


def text(source: Start, fields: dict[str, Any], tokenizer: Tokenizer | None) -> str:
    """The card of a model. Raises ConfigError where the folder's result can't be read.

    Args:
      fields: of the config.json that is written beside it.
    """
    model, count = source.model, costs.count_params(source.model, "exact")
    kv = "1 key/value head" if model.n_kv_heads == 1 else f"{model.n_kv_heads} key/value heads"
    own = {
        "heads (query, key/value)": f"({model.n_heads}, {model.n_kv_heads})",
        "context": "not known" if source.context is None else f"{tokens_of(source.context)} tokens",
        "RoPE": _rope(fields),
        "tokenizer": "none is known: give ids" if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} entries",
        "vocabulary": f"{model.vocab_size:,} rows",
        "embeddings": "untied" if model.untied else "tied",
        "arrays": fields["dtype"],
    }
    trained, after = _of_run(source) if source.kind == RUN else _of_import(source)
    rows = [(what, str(value).replace("|", "\\|")) for what, value in (own | trained).items()]
    name = storage.path(source.folder).name
    found = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True).from_string(
        _TEMPLATE
    )
    return found.render(
        name=name, fields=fields, model=model, heads=kv, params=short(count.total), body=short(count.non_embedding), rows=rows,
        after=after,
    )  # fmt: skip


def _rope(fields: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in fields["rope_parameters"].items() if name != "rope_type")
    return f"{fields['rope_parameters']['rope_type']}: {said}"


def _of_run(source: Start) -> tuple[dict[str, Any], str]:
    result = run_folder.find_result(storage.path(source.folder) / "result.json") or {}
    config = source.config
    loss = f"{result['loss']:.4f} nats per token"
    if (bits := result.get("bits_per_byte")) is not None:
        loss += f", {bits:.4f} bits per byte"
    found = {
        "held-out loss": loss,
        "targets of that loss": f"{result.get('eval_tokens') or config.evaluation.tokens:,}, {result.get('heldout') or ''}",
        "trained on": f"{config.train_tokens:,} tokens, {config.n_steps:,} steps of {config.batch_tokens:,}",
        "data": f"{config.data.store}, fingerprint {(source.data_fingerprint or 'not known')[:12]}",
        "rules": result.get("rules"),
        "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "seed": config.seed,
        "starts from": (result.get("start") or {}).get("kind"),
        "run": f"{source.identity}, commit {result.get('commit') or 'not known'}",
    }
    said = (
        "Losses under other rules are of other text or other training: they are not comparable with this one. It was trained "
        "for a study of scaling laws, on nothing but text, and follows no instructions."
    )
    return {what: value for what, value in found.items() if value is not None}, said


def _of_import(source: Start) -> tuple[dict[str, Any], str]:
    about = storage.read_json(storage.path(source.folder) / start.FILE) or {}
    return {"parameters": about.get("provenance") or "not known", "content": source.identity}, (
        "The licence and the limits of the model that the parameters are of are those of its publisher."
    )
