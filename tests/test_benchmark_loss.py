import csv

import jax.numpy as jnp
import pytest

from benchmarks import loss as benchmark


def run(tmp_path, *rest):
    arguments = ["--sizes", "64/96/16", "--memory_sizes", "4K/1024/16", "--repeats", "2", *rest]
    benchmark.main([*arguments, "--out", str(tmp_path)])
    with (tmp_path / "loss.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_rows(tmp_path, capsys):
    rows = run(tmp_path)
    assert tuple(rows[0]) == benchmark.FIELDS
    timed = [row for row in rows if row["median_s"]]
    assert len(timed) == 2 * 2 * 2  # dtypes, passes, forms
    for row in timed:
        assert row["turns"] == "2"
        assert float(row["q25_s"]) <= float(row["median_s"]) <= float(row["q75_s"])
        assert float(row["ratio"]) == 1 or row["implementation"] == "chunked"
        assert row["command"].startswith("python -m benchmarks.loss --sizes 64/96/16")
    compiled = {(row["dtype"], row["pass"], row["implementation"]): row for row in rows if not row["median_s"]}
    for dtype in benchmark.DTYPES:
        assert int(compiled[dtype, "forward+backward", "plain"]["temp_bytes"]) >= 4096 * 1024 * 4
    assert not any(row["reason"] for row in rows)
    out = capsys.readouterr().out
    assert "forward+backward" in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("wrote"))
    with pytest.raises(SystemExit, match="2"):  # results are not replaced
        run(tmp_path)


def test_what_is_wrong_or_fails_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong(hidden, embedding, targets):
        return 1.1 * benchmark.plain(hidden, embedding, targets)

    monkeypatch.setitem(benchmark.CONTENDERS, "chunked", wrong)
    rows = run(tmp_path / "wrong", "--dtypes", "float32", "--passes", "forward")
    assert [bool(row["median_s"]) for row in rows[:2]] == [True, False]
    assert "differs from plain by 1.0e-01" in rows[1]["reason"]

    def fails(hidden, embedding, targets):
        return jnp.zeros((2, 3)) @ hidden

    monkeypatch.setitem(benchmark.CONTENDERS, "chunked", fails)
    rows = run(tmp_path / "fails", "--dtypes", "float32", "--passes", "backward")
    assert "TypeError" in rows[1]["reason"]
    assert rows[0]["median_s"]
    assert "TypeError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 2K/50304", "'2K/50304' is not tokens/vocabulary/hidden size such as 2K/50304/1536"),
        ("--dtypes float31", "'float31' is unknown: there are float32, bfloat16"),
        ("--passes decode", "'decode' is unknown: there are forward, backward"),
        ("--repeats 0", "'0' is not a positive whole number"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments.split())
    assert message in capsys.readouterr().err
