"""Implementations from outside: found by name, import path and entry point, refused with reasons, held to the same table."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import attention
from gqa_jax.attention import Limits, conformance, decoding, dispatch, reference, xla
from gqa_jax.attention.conformance import PROBLEMS, Problem

OPTIONS = xla.Options(block=64, chunk=64)
EVERYTHING = Limits(offsets=True, segments=True, lse=True)


def forward(q, k, v, mask, scale):
    return xla.forward(q, k, v, mask, scale, OPTIONS)


def backward(q, k, v, lse, delta, d_out, mask, scale):
    return xla.backward(q, k, v, lse, delta, d_out, mask, scale, OPTIONS)


def decode(q, k, v, length, scale):
    case = attention.Case("cpu", "cpu", 1, 1, k.shape[1], 1, 1, 1, q.dtype)
    return decoding.written_out(q, attention.cache_of(k, v), length, scale, case)


def causal(q, k, v, mask, scale):
    return reference.attend(q, k, v, mask, scale)[0], None


plain = attention.implementation(causal)
whole = attention.implementation(forward, backward, decode, limits=EVERYTHING)
PLAIN, WHOLE = f"{__name__}:plain", f"{__name__}:whole"
ARRAYS = [jnp.asarray(np.random.default_rng(n).normal(size=(1, 20, 2, 8)), jnp.float32) for n in range(3)]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Names that a test registers are its own."""
    monkeypatch.setattr(dispatch, "_ALL", dict(dispatch._ALL))


@pytest.mark.parametrize("title", ["groups", "queries that see no key, traced", "documents and an offset"])
def test_passes_and_decode_are_right(title):
    found = conformance.check(WHOLE, PROBLEMS[title])
    assert found == ("right", "", found.errors)
    assert len(found.errors) == 5
    assert conformance.check(WHOLE, PROBLEMS["decode, groups"]).status == "right"


def test_a_forward_pass_alone_is_differentiated_by_jax_and_gets_plain_causal_attention():
    found = conformance.check(PLAIN, PROBLEMS["a batch"])
    assert (found.status, set(found.errors)) == ("right", {"out", "dq", "dk", "dv"})
    said = {title: conformance.check(PLAIN, PROBLEMS[title]).said for title in ("offset", "documents")}
    assert said == {
        "offset": f"{PLAIN} attends from a sequence to itself: no offsets, as many keys as queries",
        "documents": f"{PLAIN} has no segments",
    }
    with pytest.raises(ValueError, match=r"gives no log-sum-exp that has a gradient\. These can: reference, xla"):
        attention.attention(*ARRAYS, implementation=PLAIN, return_lse=True)
    with pytest.raises(ValueError, match="does not decode"):
        attention.decode(ARRAYS[0][:, 0], attention.cache_of(*ARRAYS[1:]), 3, implementation=PLAIN)
    case = attention.planned_case(
        batch=1, length=20, n_heads=2, n_kv_heads=2, head_dim=8, dtype=jnp.float32, size=2, method="ring", segments=False
    )
    assert "has none to call" in attention.unsupported_reason(PLAIN, case)
    assert attention.unsupported_reason(WHOLE, case) is None


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (lambda q, k, v, mask, scale: (causal(q, k, v, mask, scale)[0] * 1.02, None), "out is off by"),
        (lambda q, k, v, mask, scale: (causal(q, k, v, mask, 1.1 * scale)[0], None), "dk is off by"),
        (lambda q, k, v, mask, scale: (causal(q, k, v, mask, scale)[0].astype(jnp.float32), None), "ValueError: forward of"),
        (lambda q, k, v, mask, scale: causal(q, k, v, mask, scale)[0], "ValueError: forward of"),
        (lambda q, k, v, mask, scale: (q / jnp.zeros_like(q), None), "out is not finite"),
    ],
)
def test_the_table_finds_what_is_wrong(broken, wrong, capsys):
    attention.register("broken", broken)
    found = conformance.check("broken", Problem((4, 2), 16, 40))
    assert found.status in ("wrong", "failed")
    assert wrong in found.said


def test_one_that_reads_beyond_the_end_of_a_cache_is_found():
    attention.register(
        "greedy", decode=lambda q, k, v, length, scale: decode(q, k, v, jnp.full_like(length, k.shape[1]), scale)
    )
    assert "out is not finite" in conformance.check("greedy", PROBLEMS["decode, short"]).said


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(conformance, "PROBLEMS", {title: PROBLEMS[title] for title in ("one head", "documents")})
    assert conformance.main([PLAIN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-1] == "right"
    assert lines[1].endswith(f"can't run: {PLAIN} has no segments")
    assert lines[2] == "1 right, 1 can't run"
    attention.register("broken", lambda q, k, v, mask, scale: (0 * q, None))
    assert conformance.main(["broken"]) == 1
    assert conformance.main(["cudnn"]) == 1  # nothing ran
    with pytest.raises(SystemExit) as stopped:
        conformance.main(["xlaa"])
    assert stopped.value.code == 2
    assert "did you mean 'xla'" in capsys.readouterr().err


def test_an_entry_point_is_a_name(monkeypatch):
    point = importlib.metadata.EntryPoint("theirs", WHOLE, "gqa_jax.attention")
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **how: points.select(**how))
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        attention.attention(*ARRAYS, implementation="their")
    expected = attention.attention(*ARRAYS, implementation="xla")
    np.testing.assert_allclose(attention.attention(*ARRAYS, implementation="theirs"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_package.at_all:x", "can't be imported: No module named 'no_such_package'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (":plain", "can't be imported"),
        (f"{__name__}:causal", "leads to <function causal .*and must to what gqa_jax.attention.implementation returns"),
        ("flash", "'flash' is unknown: allowed: reference, xla"),
    ],
)
def test_names_that_lead_nowhere(name, said):
    with pytest.raises(ValueError, match=said):
        attention.attention(*ARRAYS, implementation=name)


def test_what_can_not_be_registered():
    with pytest.raises(ValueError, match="needs forward or decode"):
        attention.register("nothing")
    with pytest.raises(ValueError, match="limits with lse=True"):
        attention.register("half", forward, backward)
    with pytest.raises(ValueError, match="is an attention implementation 'xla' already"):
        attention.register("xla", causal)
    with pytest.raises(ValueError, match="names with a colon are import paths"):
        attention.register("a:b", causal)


def test_what_is_traced_is_noted():
    attention.clear_traced()
    assert attention.traced() == {}
    attention.register("ours", causal)
    jax.eval_shape(lambda *x: attention.attention(*x, implementation="ours"), *ARRAYS)
    assert attention.traced() == {"attention": "ours"}
    attention.attention(*ARRAYS)
    attention.decode(ARRAYS[0][:, 0], attention.cache_of(*ARRAYS[1:]), 3)
    assert attention.traced() == {"attention": "ours, xla", "decode": "xla"}
