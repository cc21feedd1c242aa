import ast
import csv
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import attention as benchmark
from benchmarks import attention_measure, attention_report, attention_tune, timing
from benchmarks.attention_contenders import Contender
from gqa_jax.attention import Case, attention, xla


@pytest.fixture(scope="module")
def ceilings():
    return attention_measure.Ceilings(timing.matmul_ceiling(128, jnp.float32, 1), timing.copy_ceiling(2**16, 1))


@pytest.fixture
def limits():
    return attention_measure.Limits(turns=2, sample_s=1e-4, longest_s=10, deadline=time.perf_counter() + 60)


def case(**changes) -> Case:
    shape = {"batch": 1, "length": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "dtype": jnp.float32}
    return Case.planned(**shape | changes)


def contender(name, attend, obstacle=lambda case: None) -> Contender:
    return Contender(name, obstacle, lambda case: attend)


def right(q, k, v):
    return attention(q, k, v, implementation="reference")


def sees_the_future(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=False)


def has_no_memory(q, k, v):
    raise MemoryError("needs 512 GiB")


def test_a_run_writes_its_rows_and_a_picture(tmp_path, capsys):
    command = "--lengths 128 --heads 4/2 --head_dims 16 --passes backward,decode --repeats 2 --baseline xla"
    command += " --only xla,jax_nn_xla,splash"
    benchmark.main([*command.split(), "--out", str(tmp_path)])
    with (tmp_path / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == attention_report.FIELDS
    found = {(row["pass"], row["implementation"]): row for row in rows if row["status"] == "ok"}
    assert set(found) >= {("forward+backward", "xla"), ("forward+backward", "jax_nn_xla"), ("decode", "jax_nn_xla")}
    for row in rows:
        assert row["command"] == f"python -m benchmarks.attention {command} --out {tmp_path}"
        assert "jax " in row["versions"]
        assert row["device"]
        assert row["date"].startswith("20")
        if row["status"] == "ok":
            assert row["turns"] == "2"
            assert float(row["temp_bytes"]) >= 0
            assert float(row["q25_s"]) <= float(row["median_s"]) <= float(row["q75_s"])
            measured, empty = ("gb_s", "tflops") if row["pass"] == "decode" else ("tflops", "gb_s")
            assert float(row[measured]) > 0
            assert row[empty] == ""
        if row["implementation"] == "splash":
            assert (row["status"], row["reason"], row["median_s"]) == ("refused", "runs on TPUs only", "")
    with pytest.raises(SystemExit, match="2"):  # results are not replaced
        benchmark.main([*command.split(), "--out", str(tmp_path)])
    assert float(found["decode", "jax_nn_xla"]["copy_gb_s"]) > 0
    assert float(found["forward+backward", "xla"]["ratio"]) == 1
    out = capsys.readouterr().out
    assert "not run: splash: runs on TPUs only" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert (tmp_path / "attention.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heads 3/2", "--heads: '3/2': 3 query heads are not a multiple of 2 key/value heads"),
        ("--heads 8", "--heads: '8' is not query heads/key-value heads, such as 8/1"),
        ("--lengths 4Q", "--lengths: '4Q' is no number of tokens: write it like 131072 or 128K"),
        ("--head_dims 0", "--head_dims: '0' is not a positive whole number"),
        ("--only jax_nn_xl", "--only: 'jax_nn_xl' is unknown: did you mean 'jax_nn_xla'?"),
        ("--baseline nobody --only xla", "--baseline: 'nobody' is unknown: allowed: "),
        ("--passes sideways", "--passes: 'sideways' is unknown: there are forward, backward, decode"),
        ("--repeats 0", "'0' is not a positive whole number"),
        ("--tune --only jax_nn_xla", "--only: 'jax_nn_xla' is unknown: "),
        ("--tune --passes decode", "--tune: --passes must have forward or backward"),
        ("--torch_python /nowhere/python", "--torch_python: "),
        ("--lengths ,", "need a value each"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_defaults_of_each_platform(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {platform}: --lengths" in out for platform in ("cpu", "gpu", "tpu"))


def test_flops_are_of_causal_attention():
    shape = case(batch=2, length=1024, n_heads=8, n_kv_heads=1, head_dim=64)
    visible = 1024 * 1024 / 2
    assert attention_measure.flops(shape, "forward") == 2 * 8 * visible * (2 * 64 + 2 * 64)
    # seven products of T x T x H against the forward pass's two
    assert attention_measure.flops(shape, "backward") == attention_measure.flops(shape, "forward") * 7 / 2
    assert attention_measure.decode_bytes(shape) == 4 * (2 * (2 * 1024 * 1 * 64) + 2 * (2 * 8 * 64))


def test_figures_of_a_row_agree(ceilings, limits):
    work = attention_measure.make_work(case(), "backward", ceilings, limits)
    row, other = attention_measure.measure([contender("a", right), contender("b", right)], work, ceilings, limits, baseline="b")
    amount = attention_measure.flops(case(), "backward")
    assert row["tflops"] == pytest.approx(amount / row["median_s"] / 1e12)
    assert row["percent_of_ceiling"] == pytest.approx(100 * row["tflops"] / row["matmul_tflops"])
    assert row["relative_error"] < 1e-5
    assert row["ratio"] > 0
    assert other["ratio"] == 1
    assert row["baseline"] == "b"


def test_the_backward_pass_by_difference():
    shape = {"batch": 1, "length": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "dtype": "float32"}
    rows = [
        shape | {"pass": name, "implementation": one, "median_s": seconds}
        for name, one, seconds in [("forward", "a", 2.0), ("forward+backward", "a", 5.0), ("forward+backward", "b", 6.0)]
    ]
    attention_measure.add_backward_by_difference(rows)
    assert [row.get("backward_by_difference_s") for row in rows] == [None, 3.0, None]


def test_a_contender_that_fails_or_is_wrong_is_a_row_and_stops_nobody(ceilings, limits):
    work = attention_measure.make_work(case(), "backward", ceilings, limits)
    rows = attention_measure.measure(
        [
            contender("fails", has_no_memory),
            contender("wrong", sees_the_future),
            contender("nan", lambda q, k, v: right(q, k, v) / 0),
            contender("refuses", right, lambda case: "not on a Tuesday"),
            contender("right", right),
        ],
        work, ceilings, limits, baseline="fails",
    )  # fmt: skip
    found = {row["implementation"]: (row["status"], row["reason"]) for row in rows}
    assert found["fails"] == ("failed", "MemoryError: needs 512 GiB")
    assert found["wrong"][0] == found["nan"][0] == "wrong"
    assert "off by" in found["wrong"][1]
    assert found["refuses"] == ("refused", "not on a Tuesday")
    assert found["right"] == ("ok", "")
    assert all(row.get("median_s") is None for row in rows[:4])
    assert rows[4]["ratio"] is None  # its baseline has no time


def test_only_wrong_gradients_are_wrong_too(ceilings, limits):
    @jax.custom_vjp
    def attend(q, k, v):
        return right(q, k, v)

    def backward(kept, d_out):
        dq, dk, dv = jax.vjp(right, *kept)[1](d_out)
        return dq, dk.at[:, -16:].set(0), dv  # a small tile of keys that few queries see

    attend.defvjp(lambda q, k, v: (right(q, k, v), (q, k, v)), backward)
    work = attention_measure.make_work(case(length=256), "backward", ceilings, limits)
    (row,) = attention_measure.measure([contender("a", attend)], work, ceilings, limits, None)
    assert (row["status"], row["reason"][:9]) == ("wrong", "dk is off")


def test_one_that_fails_while_it_is_timed_keeps_the_others():
    calls = []

    def fails():
        calls.append(1)
        raise RuntimeError("gone")

    deadline = time.perf_counter() + 60
    seconds, failures = timing.interleaved({"a": lambda: 1.0, "b": fails}, 3, longest_s=10, deadline=deadline)
    assert seconds == {"a": [1.0, 1.0, 1.0], "b": []}
    assert str(failures["b"]) == "gone"
    assert len(calls) == 1


def test_slow_ones_sit_out_and_the_deadline_ends_the_turns():
    order = []
    runs = {"fast": lambda: order.append("fast") or 0.0, "slow": lambda: (order.append("slow"), time.sleep(0.01))[1] or 0.0}
    seconds, _ = timing.interleaved(runs, 6, longest_s=0.005, deadline=time.perf_counter() + 60)
    assert (len(seconds["fast"]), len(seconds["slow"])) == (6, 3)
    assert order[:6] == ["fast", "slow"] * 3
    seconds, _ = timing.interleaved(runs, 6, longest_s=1, deadline=time.perf_counter())
    assert (len(seconds["fast"]), len(seconds["slow"])) == (1, 1)


def test_nothing_is_moved_out_of_the_loop():
    def step(q, k, v):
        return (q + jnp.tanh(k @ k.T)[0, 0],)  # needs k alone

    arrays = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 3
    text = jax.jit(timing.repeated(step, 5)).lower(*arrays).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert "tanh" in text
    assert "while(" in entry
    assert not any(word in entry.partition("while(")[0] for word in ("dot(", "tanh", "fusion("))


def test_a_budget_that_is_spent_leaves_rows_that_say_so(ceilings, limits, tmp_path):
    cases = [("forward", case()), ("forward", case(length=256))]
    limits = limits._replace(deadline=time.perf_counter())
    console = Console(width=80, record=True)
    rows = benchmark.run(cases, {"forward": [contender("a", right)]}, ceilings, limits, {"forward": "a"}, {}, tmp_path, console)
    assert [(row["status"], row["reason"], row["length"]) for row in rows] == [
        ("left out", "no time left", 128),
        ("left out", "no time left", 256),
    ]
    attention_report.print_left_out(rows, console)
    assert "left out for want of time: forward, 4/2 heads of 16: 128, 256" in console.export_text()
    assert attention_report.picture(rows, "nothing") is None


def test_a_picture_tells_lines_apart_without_colour():
    row = {"status": "ok", "pass": "forward", "n_heads": 8, "n_kv_heads": 1, "head_dim": 64, "matmul_tflops": 2.0}
    rows = [row | {"implementation": f"i{i}", "length": t, "tflops": i + 1.0} for i in range(12) for t in (1024, 4096)]
    (ax,) = attention_report.picture(rows, "title").axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1K", "4K"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in ax.lines}) == 13
    assert list(ax.lines[2].get_ydata()) == [3.0, 3.0]


def test_tuning_prints_lines_of_python(capsys, monkeypatch):
    few = attention_tune.tunables()["xla"]._replace(candidates=lambda case, part: [xla.Options(64, None)])
    monkeypatch.setattr(attention_tune, "tunables", lambda: {"xla": few})
    arguments = "--tune --lengths 128 --heads 4/2 --head_dims 16 --repeats 2 --passes forward"
    benchmark.main(arguments.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("# ")
    table = ast.parse("{\n" + "\n".join(lines) + "\n}", mode="eval").body
    assert [ast.literal_eval(key) for key in table.keys] == [("cpu", 16, 2, 128)]
    (call,) = table.values
    assert call.func.id == "Options"
    assert [keyword.arg for keyword in call.keywords] == ["block", "chunk"]
    assert "4/2 T=128: " in lines[-1]


def test_panels_of_a_row_share_a_scale_that_holds_all_lines():
    row = {"status": "ok", "pass": "forward", "head_dim": 64, "implementation": "a", "matmul_tflops": 5.0}
    rows = [row | {"n_heads": n, "n_kv_heads": 1, "length": t, "tflops": float(n)} for n in (2, 8) for t in (1024, 4096)]
    for ax in attention_report.picture(rows, "title").axes:
        low, high = ax.get_ylim()
        assert low == 0
        assert high > 8


def test_every_tunable_chooses_and_proposes():
    for name, tunable in attention_tune.tunables().items():
        chip = {"pallas_tpu": ("tpu", "TPU v6 lite"), "pallas_gpu": ("gpu", "NVIDIA H200")}.get(name, ("gpu", "NVIDIA A100"))
        shape = case(length=2048, head_dim=64, dtype=jnp.bfloat16)._replace(platform=chip[0], chip=chip[1])
        present = tunable.choose(shape)
        for part in attention_tune._parts(present):
            values = tunable.candidates(shape, part)
            assert len(set(values)) == len(values) > 4
            assert {type(value) for value in values} == {type(attention_tune._get(present, part))}


class Tile(NamedTuple):
    rows: int


class Options(NamedTuple):
    forward: Tile
    dq: Tile


def test_tuning_goes_tile_by_tile_and_drops_what_is_wrong(ceilings, limits):
    tried = []

    def forward(q, k, v, mask, scale, options):
        tried.append(options)
        if options.forward.rows == 3:
            return q, jnp.zeros((1, 2, 2, 128))
        if options.forward.rows == 5:
            raise ValueError("tiles of 5 rows")
        return xla.forward(q, k, v, mask, scale, xla.Options(128, None))

    def backward(*arguments):
        return xla.backward(*arguments[:-1], xla.Options(128, None))

    def candidates(case, part):
        return [Tile(n) for n in ((2, 3, 5) if part == "forward" else (7,))]

    tunable = attention_tune.Tunable(lambda case: Options(Tile(1), Tile(1)), candidates, forward, backward)
    first, second = attention_tune.tune("xla", tunable, [case()], ("forward", "backward"), ceilings, limits)
    assert (first.key, first.direction, first.tried) == (("cpu", 16, "forward"), "forward", 2)
    assert (second.key, second.direction, second.tried) == (("cpu", 16, "dq"), "backward", 2)
    assert first.value in (Tile(1), Tile(2))
    assert {options.forward for options in tried if options.dq == Tile(7)} == {first.value}  # the best so far
    wrong, failed = first.problems
    assert "Tile(rows=3)" in wrong
    assert ": wrong: " in wrong
    assert failed.endswith(": failed: ValueError: tiles of 5 rows")
    assert all(ratio > 0 for row in (first, second) for _, _, ratio in row.gains)


def test_cases_of_one_row_decide_it_together():
    def trial(**seconds):
        work = attention_measure.Work(case(), "forward", (), 1)
        prepared = {name: attention_measure.Prepared(lambda s=s: s, (), 0) for name, s in seconds.items()}
        entries = [attention_measure.Entry(name, "ok", "", p) for name, p in prepared.items()]
        return attention_tune.Trial(work, dict.fromkeys(seconds), entries)

    class Ceiling:
        def seconds(self):
            return 1.0

        def rate(self, seconds):
            return 1.0

    ceilings = attention_measure.Ceilings(Ceiling(), Ceiling())
    limits = attention_measure.Limits(2, 1.0, 10.0, time.perf_counter() + 60)
    trials = [trial(present=4.0, a=1.0, b=2.0), trial(present=4.0, a=16.0, b=2.0)]
    seconds, ratios = attention_tune._time(trials, None, ceilings, limits)
    assert seconds["a"] == [1.0, 16.0]
    assert {name: attention_tune._mean(values) for name, values in ratios.items()} == pytest.approx(
        {"present": 1.0, "a": 1.0, "b": 2.0}
    )


def test_tuning_says_why_nothing_could_be_tried(ceilings, limits):
    def never(*_):
        raise ValueError("no such tile")

    tunable = attention_tune.Tunable(lambda case: Options(Tile(1), Tile(1)), lambda case, part: [], never, never)
    (found,) = attention_tune.tune("xla", tunable, [case()], ("forward",), ceilings, limits)
    assert "none of 1 ran in all cases" in found
    assert "no such tile" in found
