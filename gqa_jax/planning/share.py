"""What one device has of a run: its part of the model and of a micro-batch, counted."""

from __future__ import annotations

import dataclasses
import functools
import math

from gqa_jax import costs
from gqa_jax.config import Execution, TrainConfig


@dataclasses.dataclass(frozen=True)
class Share:
    """One device's share of a micro-batch and of the model, as `training.program` cuts them; lower-case counts are local."""

    config: TrainConfig
    execution: Execution
    tiled: bool  # whether arrays lie in tiles: on TPUs

    def __post_init__(self):
        config, mesh, model = self.config, self.execution.mesh, self.config.model
        micro_batch = config.batch_size // self.execution.accumulation_steps
        kv_cut = model.n_kv_heads % mesh.tensor == 0
        values = {
            "layers": model.n_layers,
            "d": model.d_model,
            "h": model.head_dim,
            "sequences": micro_batch // mesh.sequences,
            "tokens": micro_batch // mesh.sequences * (config.context_length // mesh.context),
            "n": model.n_heads // mesh.tensor,  # query heads
            "k": model.n_kv_heads // mesh.tensor if kv_cut else 1,  # key/value heads that they read
            "k_held": model.n_kv_heads // mesh.tensor if kv_cut else model.n_kv_heads,  # whose weights are here
            "f": model.d_ff // mesh.tensor,
            "activation": costs.dtype_bytes(model.dtype),
            "parameter": costs.dtype_bytes(model.param_dtype),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def layer_weights(self) -> float:
        """Matrices of one layer that this device gathers, in values."""
        return self.d * (2 * self.h * (self.n + self.k_held) + 3 * self.f)

    @property
    def embedding(self) -> float:
        """Values of the embedding; a head of its own has as many."""
        return self.config.model.vocab_size * self.d

    @property
    def vocabulary_matrices(self) -> int:
        """How many there are: the embedding, and the head of an untied model."""
        return 2 if self.config.model.untied else 1

    @property
    def embedding_held(self) -> int:
        """Values of the embedding that lie on this device."""
        return math.prod(self.shapes[0])

    @functools.cached_property
    def kept(self) -> float:
        """Bytes that the layers keep for the backward pass of a micro-batch (gqa_jax.model), by policy."""
        a, heads, keys = self.activation, self.n * self.h, self.k * self.h
        # the output and its log-sum-exp; a GPU's programs of sharded weights may hold the output twice where n_h = n_kv
        twice = not self.tiled and self.execution.mesh.parameters > 1 and self.n == self.k
        attention = a * heads * (2 if twice else 1) + 4 * self.n
        of_a_token = {
            "full": a * self.d,
            "attention_only": a * self.d + attention,
            "offload": attention,
            "dots": a * (2 * self.d + 2 * self.f + heads + 2 * keys),
            "none": (2 * a + 24) * self.d + 6 * a * self.f + a * (3 * heads + 2 * keys) + 4 * self.n + 16,  # norms: float32
        }[self.execution.remat]
        # "none" keeps the gathered weights of all layers too
        gathered = a * self.layer_weights if self.execution.remat == "none" and self.execution.mesh.parameters > 1 else 0
        return self.layers * (self.tokens * of_a_token + gathered)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the parameters that lie on this device (gqa_jax.training.sharding.RULES)."""
        layers, parts, tensor = self.layers, self.execution.mesh.parameters, self.execution.mesh.tensor
        d, own, n, k, h, f = self.d, self.d // parts, self.n, self.k_held, self.h, self.f
        norms = (d,), (layers, d), (layers, d)
        attention = (layers, own, n, h), (layers, own, k, h), (layers, own, k, h), (layers, n, h, own)
        ffn = (layers, own, f), (layers, own, f), (layers, f, own)
        vocabulary = [(self.config.model.vocab_size, own // tensor)] * self.vocabulary_matrices
        return *vocabulary, *norms, *attention, *ffn

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters that lie on this device."""
        return sum(map(math.prod, self.shapes))
