"""Head configurations H: numbers of heads, and rules by which they grow with the width."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class Heads(NamedTuple):
    """A head configuration H = (n_h, n_kv), the same at every size; or a rule, whose heads grow with the hidden size.

    n_heads None is a rule: as many query heads as fill the width, d / d_h. Then n_kv_heads is a number of key/value heads, or,
    below 0, a group: -g stands for n_h / g, one key/value head for every g query heads, and -1 for multi-head attention.
    """

    n_heads: int | None
    n_kv_heads: int

    @classmethod
    def of(cls, n_heads: Any, n_kv_heads: Any) -> Heads:
        """The heads of two cells of a table: an empty n_heads is a rule."""
        return cls(None if pd.isna(n_heads) else int(n_heads), int(n_kv_heads))

    def __str__(self) -> str:
        kv = self.n_kv_heads if self.group is None else "d/d_h" if self.group == 1 else f"n_h/{self.group}"
        return f"({'d/d_h' if self.n_heads is None else self.n_heads},{kv})"

    @property
    def group(self) -> int | None:
        """Query heads per key/value head of a rule that fixes them; None where n_kv is a number."""
        return -self.n_kv_heads if self.n_kv_heads < 0 else None

    def query_heads(self, d_model: Any, head_dim: Any) -> Any:
        """n_h of a model of that width; real-valued where the width is, broadcasts over arrays."""
        return np.asarray(d_model, np.float64)[()] / head_dim if self.n_heads is None else self.n_heads

    def kv_heads(self, d_model: Any, head_dim: Any) -> Any:
        """n_kv of a model of that width, as `query_heads`."""
        return self.n_kv_heads if self.group is None else self.query_heads(d_model, head_dim) / self.group


#: The rule of Llama 3: n_h d_h = d, and 8 key/value heads at every size.
LLAMA3 = Heads(None, 8)
#: Multi-head attention: n_h d_h = d, and a key/value head for each.
MHA = Heads(None, -1)


def rule(text: str) -> Heads:
    """The rule that is called mha, group:G (n_kv = n_h / G) or kv:K (n_kv = K), query heads as many as fill the width.

    Raises ValueError for another text.
    """
    if text == "mha":
        return MHA
    if (found := re.fullmatch(r"(group|kv):([1-9]\d*)", text)) is None:
        raise ValueError(f"heads rule {text!r}: use mha, group:G like group:4, or kv:K like kv:8")
    return Heads(None, int(found[2]) * (-1 if found[1] == "group" else 1))
