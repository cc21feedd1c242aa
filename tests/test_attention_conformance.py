"""All implementations by the problems of `gqa_jax.attention.conformance`; Pallas interprets its kernels."""

import pytest

from gqa_jax.attention import conformance, decoding, tpu, triton
from gqa_jax.attention.conformance import DECODE_PROBLEMS, PROBLEMS
from gqa_jax.attention.tpu import decode as tpu_decode
from gqa_jax.attention.triton import decode as triton_decode
from gqa_jax.hardware import Tiles

ATTENDING = ("reference", "xla", "pallas_tpu", "pallas_triton", "pallas_gpu")
DECODING = ("reference", "xla", "pallas_tpu", "pallas_triton")
HOPPER_QUICK = ("one query", "heads of 128", "offset, traced")  # the interpreter of Mosaic GPU takes seconds for each
CANT_RUN = {
    "pallas_tpu": {"float16": "takes bfloat16 and float32, not float16"},
    "pallas_gpu": {
        "float32": "takes bfloat16, not float32", "float16": "takes bfloat16, not float16",
        "heads of 16": "heads of 64 and 128", "heads of 80": "heads of 64 and 128",
    },
}  # fmt: skip


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
    monkeypatch.setattr(triton_decode, "choose", lambda case: triton_decode.Options(3, 32, 4, 2, case.interpreted))
    blocks = {True: 64 * 32, False: 128}  # rows of positions and heads, 32 of them at most, or positions
    monkeypatch.setattr(
        tpu_decode, "choose", lambda case: tpu_decode.Options(2, blocks[case.head_dim == 128], case.interpreted)
    )


def cases(names, problems):
    slow = {("pallas_gpu", title) for title in problems if title not in HOPPER_QUICK}
    return [
        pytest.param(name, title, marks=pytest.mark.slow if (name, title) in slow else ())
        for name in names for title in problems
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "title"), cases(ATTENDING, PROBLEMS))
def test_attention(name, title):
    found = conformance.check(name, PROBLEMS[title], interpret=True)
    if (reason := CANT_RUN.get(name, {}).get(title)) is not None:
        assert found.status == "can't run"
        assert reason in found.said
    else:
        assert found == ("right", "", found.errors)
        assert len(found.errors) == 5


@pytest.mark.parametrize(("name", "title"), cases(DECODING, DECODE_PROBLEMS))
def test_decode(name, title):
    found = conformance.check_decode(name, DECODE_PROBLEMS[title], interpret=True)
    assert found == ("right", "", found.errors)
    assert len(found.errors) == 2
