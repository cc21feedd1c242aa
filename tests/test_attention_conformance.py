"""All implementations by the problems of `gqa_jax.attention.conformance`; Pallas interprets its kernels.

`pallas_gpu`'s are in test_attention_hopper, which also looks for races.
"""

import pytest

from gqa_jax.attention import cache, conformance, decoding, tpu, triton
from gqa_jax.attention.conformance import PROBLEMS
from gqa_jax.attention.tpu import decode as tpu_decode
from gqa_jax.attention.triton import decode as triton_decode
from gqa_jax.hardware import Tiles

# A kernel that is interpreted takes seconds a problem: of these the fast lane has what differs most.
QUICK = {
    "one query", "heads of 80", "a group, heads of 128", "groups", "float32", "float16", "queries that see no key, traced",
    "no query sees a key", "documents and an offset", "long, documents and offsets", "decode, an empty cache",
    "decode, groups, heads of 128", "decode, float32",
}  # fmt: skip
CASES = [
    pytest.param(name, title, marks=[pytest.mark.thorough] if name.startswith("pallas") and title not in QUICK else [])
    for name in ("reference", "xla", "pallas_tpu", "pallas_triton")
    for title in PROBLEMS
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that sequences of hundreds have several, and caches several parts."""
    small = Tiles(rows=256, keys=128, strip=128, chunk=128, ahead=1, together=1)
    packed = Tiles(rows=512, keys=256, strip=256, chunk=128, ahead=3, together=2)
    monkeypatch.setattr(tpu, "choose", lambda case: tpu.Options(small, packed, interpret=case.interpreted))
    tiles = (triton.Tile(rows, keys, 4, 2) for rows, keys in ((64, 32), (32, 16), (32, 64)))
    options = triton.Options(*tiles, interpret=True)
    monkeypatch.setattr(triton, "choose", lambda *_, **__: options)
    monkeypatch.setattr(decoding, "XLA_CHUNK", 64)
    monkeypatch.setattr(cache, "BLOCK", 64)
    monkeypatch.setattr(triton_decode, "choose", lambda case: triton_decode.Options(3, 32, 4, 2, case.interpreted))
    blocks = {True: 64 * 32, False: 128}  # rows of positions and heads, 32 of them at most, or positions
    monkeypatch.setattr(
        tpu_decode, "choose", lambda case: tpu_decode.Options(2, blocks[case.head_dim == 128], case.interpreted)
    )


@pytest.mark.parametrize(("name", "title"), CASES)
def test_every_implementation_is_right(name, title):
    found = conformance.check(name, PROBLEMS[title], interpret=True, jit=True)
    if (name, title) == ("pallas_tpu", "float16"):
        reason = "pallas_tpu takes bfloat16 and float32, not float16 ('reference' and 'xla' take any floating type)"
        assert found == ("can't run", reason, {})
    else:
        assert found == ("right", "", found.errors)
        assert len(found.errors) == (2 if title.startswith("decode") else 5)
