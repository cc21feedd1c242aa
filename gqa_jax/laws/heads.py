"""Head configurations H."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Heads(NamedTuple):
    """A head configuration H = (n_h, n_kv). n_heads None: as many query heads as fill the width, d / d_h."""

    n_heads: int | None
    n_kv_heads: int

    def __str__(self) -> str:
        return f"({'d/d_h' if self.n_heads is None else self.n_heads},{self.n_kv_heads})"

    def query_heads(self, d_model: Any, head_dim: Any) -> Any:
        """n_h of a model of that width; real-valued where the width is, broadcasts over arrays."""
        return np.asarray(d_model, np.float64)[()] / head_dim if self.n_heads is None else self.n_heads


#: The rule of Llama 3: n_h d_h = d, and 8 key/value heads at every size.
LLAMA3 = Heads(None, 8)
