"""`python -m launch plan --topology` and `run --topology`; nothing is compiled here (tests/test_compile_check.py)."""

import csv
import dataclasses
import io
import json

import pandas as pd
import pytest

from gqa_jax import hardware
from gqa_jax.planning.compile_check import CompileCheck
from launch import __main__ as launch
from launch import fit, grid
from launch.cells import Layout
from launch.executors import local
from tests import grid_fakes

PAPER = "configs/grids/paper.py"
ONE = "size=1.2B,context=8192,n_heads=8,n_kv_heads=1"
ADDED = (
    "topology,fits,mesh,remat,batch_per_device,bytes_arguments,bytes_temporary,bytes_limit,hours_at_least,hours,limited_by,chip_hours,"
    "price_usd,accumulation_steps,context_attention,collective_bytes,flops,check,choice"
)


def table(capsys, *arguments):
    assert launch.main(["plan", PAPER, *arguments, "--format", "csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(grid_fakes.GRID_FILE)
    return str(path), Layout(tmp_path / "root"), grid.cells(grid_fakes.small_grid())


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that knows how large programs are: the list says what was asked of it."""
    asked = []

    class Compilers:
        too_large = staticmethod(lambda config, topology: False)

        def __init__(self, workers):
            import concurrent.futures

            self.future = concurrent.futures.Future

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, config, topology, exact=False):
            asked.append((config, topology, exact))
            limit = hardware.find(topology).chip.memory_bytes
            answer = self.future()
            if self.too_large(config, topology):
                answer.set_result(CompileCheck(topology, False, limit, bytes_needed=2 * limit, error="RESOURCE_EXHAUSTED"))
            else:
                answer.set_result(CompileCheck(topology, True, limit, 10, 10, 10, 20))
            return answer

    monkeypatch.setattr(fit, "Compilers", Compilers)
    monkeypatch.setattr(hardware.Slice, "require_compiler", lambda self: None)
    return Compilers, asked


def test_what_is_compiled_must_fit_the_part_of_a_chip_that_a_cell_has():
    """A GPU that several cells share, or of which JAX takes less here: compilers know the whole chip alone."""
    whole = hardware.find("h100:1")
    cell = grid.cells(grid.load(PAPER))[0]
    check = CompileCheck("h100:1", True, whole.chip.memory_bytes, 10, 10, 10, int(0.5 * whole.chip.memory_bytes))
    for share, fits in ((1, True), (2, False)):
        part = dataclasses.replace(whole.chip, memory_bytes=whole.chip.memory_bytes / share)
        one = fit.estimate(cell, dataclasses.replace(whole, chip=part))
        one.check = check
        assert one.fits == fits


def test_a_row_per_cell_and_slice_with_the_promised_columns(capsys):
    rows = table(capsys, "--topology", "v5e:4x4,h200:8", "--estimate", "--where", ONE)
    assert {*ADDED.split(","), "cell", "size", "n_heads", "train_flops"} <= set(rows[0])
    assert [row["topology"] for row in rows] == ["v5e:4x4", "h200:8"]
    v5e, h200 = rows
    assert v5e["fits"] == "True"
    assert v5e["check"] == "estimate"
    assert float(v5e["bytes_arguments"]) + float(v5e["bytes_temporary"]) < float(v5e["bytes_limit"]) == 15.75 * 2**30
    for row, chips in ((v5e, 16), (h200, 8)):
        hours = float(row["hours"])
        assert float(row["chip_hours"]) == pytest.approx(chips * hours)
        price = hardware.find(row["topology"]).chip.price.usd_per_hour
        assert float(row["price_usd"]) == pytest.approx(chips * hours * price)
        assert hours >= float(row["hours_at_least"])
        assert (
            float(row["hours_at_least"]) * 3600 * chips
            >= float(row["train_flops"]) / hardware.find(row["topology"]).chip.peak_flops
        )
    assert {v5e["choice"], h200["choice"]} == {"cheapest", "fastest"}


def test_efficiency_divides_and_prices_are_taken_from_a_file(capsys, tmp_path):
    (tmp_path / "prices.json").write_text('{"v5e": 10}')
    (plain,) = table(capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE)
    (half,) = table(
        capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE, "--efficiency", "0.5",
        "--prices", str(tmp_path / "prices.json"),
    )  # fmt: skip
    assert half["hours_at_least"] == plain["hours_at_least"]
    assert float(half["hours"]) == pytest.approx(2 * float(plain["hours_at_least"]))
    assert float(half["price_usd"]) == pytest.approx(10 * float(half["chip_hours"]))
    assert half["choice"] == "cheapest fastest"


def test_hours_are_over_what_was_measured_on_the_chip_unless_given(capsys, monkeypatch):
    (bound,) = table(capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE)
    measured = hardware.Measured(0.4, "1.2B, T = 8K, fsdp=16", "2026-12-01", "python -m launch status")
    where = hardware.find("v5e:4x4")
    chip = dataclasses.replace(where.chip, measured=measured)
    monkeypatch.setitem(hardware.SLICES, where.name, dataclasses.replace(where, chip=chip))
    (reached,) = table(capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE)
    assert float(reached["hours"]) == pytest.approx(float(bound["hours_at_least"]) / 0.4)
    (given,) = table(capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE, "--efficiency", "1")
    assert given["hours"] == given["hours_at_least"] == bound["hours_at_least"]
    asked = ["plan", PAPER, "--topology", "v5e:4x4,h100:8", "--estimate", "--where", ONE]
    assert launch.main(asked) == 0
    out = capsys.readouterr().out
    assert (
        "hours at least: every phase at its roofline; expected: v5e at 40% of it, as measured (1.2B, T = 8K, fsdp=16, " in out
    )
    known = hardware.calibration(hardware.CHIPS["h100"])
    assert f"; h100 as kernels add up, within {known.error:.0%} of {known.programs} compiled programs' static cost\n" in out
    assert "GiB: h100: 0.75 of the board" in out
    assert launch.main([*asked, "--efficiency", "0.5"]) == 0
    assert "hours at least: every phase at its roofline; expected: at 0.5 of it (--efficiency)\n" in capsys.readouterr().out


def test_explain_says_where_a_step_goes_and_adds_up_to_the_hours(capsys, tmp_path):
    asked = ["plan", PAPER, "--topology", "h100:8,v5e:4x4", "--where", ONE, "--explain", "s1p2b"]
    assert launch.main([*asked, "--format", "csv", "--out", str(tmp_path / "where.csv")]) == 0
    rows = pd.read_csv(io.StringIO(capsys.readouterr().out))
    pd.testing.assert_frame_equal(rows, pd.read_csv(tmp_path / "where.csv"))
    assert list(rows["topology"].unique()) == ["h100:8", "v5e:4x4"]
    assert set(rows["part"]) == {"matmul", "attention", "memory", "network", "host"}
    assert set(rows["phase"]) == {"forward", "backward", "loss", "accumulation", "optimizer"}
    planned = table(capsys, "--topology", "h100:8,v5e:4x4", "--estimate", "--where", ONE)
    for row in planned:
        own = rows[rows["topology"] == row["topology"]]
        steps = float(row["train_flops"]) / float(row["flops"])
        assert steps * own["seconds_expected"].sum() / 3600 == pytest.approx(float(row["hours"]), rel=1e-3)
        bound = own.groupby("phase")["at_least"].first().sum()
        assert steps * bound / 3600 == pytest.approx(float(row["hours_at_least"]), rel=1e-3)
    assert launch.main(asked) == 0
    out = capsys.readouterr().out
    for words in ("on h100:8: mesh ", "sequences; ms a step", "backward", "at least", "expected", "100%"):
        assert words in out


def test_whose_prices_they_are_is_said(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text("b200 = 3")
    given = ["--estimate", "--where", ONE, "--prices", str(tmp_path / "mine.toml")]
    assert launch.main(["plan", PAPER, "--topology", "v5e:4x4,v5e:2x2,b200:8", *given]) == 0
    assert f"USD: v5e: Google Cloud, us-central1, 2026-11; b200: {tmp_path}/mine.toml\n" in capsys.readouterr().out


def test_a_chip_without_a_price_has_an_empty_cell(capsys, monkeypatch):
    monkeypatch.setitem(hardware.CHIPS, "v5e", dataclasses.replace(hardware.CHIPS["v5e"], prices=()))
    (row,) = table(capsys, "--topology", "v5e:4x4", "--estimate", "--where", ONE)
    assert row["price_usd"] == ""
    assert row["choice"] == "fastest"
    assert launch.main(["plan", PAPER, "--topology", "v5e:4x4", "--estimate", "--where", ONE]) == 0
    out = capsys.readouterr().out
    assert "1 of 1" in out
    assert "USD: v5e: no price" in out


def test_what_does_not_fit_says_what_would(capsys):
    where = "size=1.2B,context=131072,n_heads=32"
    (row,) = table(capsys, "--topology", "v5e:1x1", "--estimate", "--where", where)
    assert row["fits"] == "False"
    assert row["hours"] == row["price_usd"] == row["limited_by"] == row["choice"] == ""
    larger = row["would_fit"].split(" with ")[0]
    assert hardware.find(larger).chip.name == "v5e"
    (fits,) = table(capsys, "--topology", larger, "--estimate", "--where", where)
    assert fits["fits"] == "True"
    assert launch.main(["plan", PAPER, "--topology", "v5e:1x1", "--estimate", "--where", where]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "0 of 1" in out


def test_the_table_goes_to_a_file(capsys, tmp_path):
    for name in ("plan.parquet", "plan.csv"):
        path = tmp_path / name
        assert launch.main(["plan", PAPER, "--topology", "v5e:4x4", "--estimate", "--where", ONE, "--out", str(path)]) == 0
        frame = pd.read_parquet(path) if name.endswith("parquet") else pd.read_csv(path)
        assert len(frame) == 1
        assert frame["fits"].all()
    assert launch.main(["plan", PAPER, "--topology", "v5e:4x4", "--estimate", "--where", ONE, "--out", "plan.xls"]) == 2


def test_compiled_rows_say_so_and_have_the_compilers_bytes(capsys, compiler):
    rows = table(capsys, "--topology", "v5e:4x4,v6e:2x4", "--where", ONE)
    _, asked = compiler
    assert [topology for _, topology, _ in asked] == ["v5e:4x4", "v6e:2x4"]
    assert not any(exact for *_, exact in asked)
    for row in rows:
        assert (row["check"], row["bytes_arguments"], row["bytes_temporary"]) == ("compiled", "10.0", "20.0")
        assert row["fits"] == "True"


def test_the_next_execution_is_tried_where_the_compiler_says_no(capsys, compiler):
    compilers, asked = compiler
    compilers.too_large = staticmethod(lambda config, topology: config.execution.accumulation_steps == 1)
    (row,) = table(capsys, "--topology", "v5e:4x4", "--where", "size=3M,context=8192,n_heads=8,n_kv_heads=1")
    assert row["fits"] == "False"  # the estimate has one micro-batch for all of them
    assert len(asked) == fit.ATTEMPTS
    assert len({config for config, *_ in asked}) == fit.ATTEMPTS
    compilers.too_large = staticmethod(lambda config, topology: len(asked) == fit.ATTEMPTS + 1)
    (row,) = table(capsys, "--topology", "v5e:4x4", "--where", "size=3M,context=8192,n_heads=8,n_kv_heads=1")
    assert row["fits"] == "True"
    assert row["mesh"] == str(asked[-1][0].execution.mesh)


def test_totals_are_by_slice_and_by_choice(capsys):
    assert launch.main(["plan", PAPER, "--topology", "v5e:4x4,h200:8", "--estimate", "--where", "context=8192,n_heads=8"]) == 0
    out = capsys.readouterr().out
    for name in ("v5e:4x4", "h200:8", "cheapest", "fastest"):
        assert name in out
    assert "32 of 32" in out
    assert "at least" in out


def test_bad_input_is_a_sentence_and_exit_2(capsys, tmp_path):
    cases = [
        (["--topology", "v5e:4x5"], "unknown topology 'v5e:4x5': of v5e there are v5e:1x1"),
        (["--topology", "v5:4x4"], "did you mean 'v5e:4x4'"),
        (["--estimate"], "--estimate needs --topology"),
        (["--explain", "s1p2b"], "--explain needs --topology"),
        (["--topology", "v5e:4x4", "--explain", "s9"], "'s9' is no cell of the grid"),
        (["--topology", "v5e:4x4", "--estimate", "--efficiency", "1.5"], "must be above 0 and at most 1"),
        (["--topology", "v5e:4x4", "--estimate", "--prices", str(tmp_path / "gone.json")], "No such file"),
        (["--topology", "v5e:4x4", "--workers", "0"], "--workers 0: must be at least 1"),
    ]
    for arguments, message in cases:
        assert launch.main(["plan", PAPER, "--where", ONE, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_help_lists_the_topologies(capsys):
    with pytest.raises(SystemExit):
        launch.main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "v5e:1x1, 2x2" in out
    assert "h200:1, 2, 4, 8" in out


def test_a_mesh_that_is_given_for_another_slice_is_a_row_that_does_not_fit(capsys, tmp_path):
    path = tmp_path / "meshed.py"
    path.write_text(
        "from launch.grid import Grid\nfrom tests.grid_fakes import config\n"
        "def get_grid(): return Grid('meshed', [config(execution={'mesh': 'fsdp=4'})], [1024])\n"
    )
    assert launch.main(["plan", str(path), "--topology", "v5e:2x4,v5e:2x2", "--estimate", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["fits"] for row in rows] == [False, True]
    assert rows[0]["mesh"] is None


def test_run_refuses_what_the_compiler_refuses_before_anything_starts(small, capsys, compiler, monkeypatch):
    path, layout, _ = small
    compilers, asked = compiler
    compilers.too_large = staticmethod(lambda config, topology: config.model.d_model == 64)
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a cell was started"))
    assert launch.main(["run", path, "--root", str(layout.root), "--topology", "v5e:2x2"]) == launch.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert "2 of 6 cells don't fit, nothing was started" in err
    assert "does not fit v5e:2x2: the compiler needs 31.50 GiB, 15.75 GiB are there; would fit: " in err
    assert all(exact for *_, exact in asked)


def test_run_on_cpus_refuses_what_the_machine_cannot_hold(small, capsys, monkeypatch):
    path, layout, _ = small
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a cell was started"))
    monkeypatch.setattr(fit, "memory_bytes", lambda: 1e6)
    assert launch.main(["run", path, "--root", str(layout.root), "--slots", "1"]) == launch.EXIT_BAD_INPUT
    assert "16 bytes a parameter are" in capsys.readouterr().err


def test_a_smaller_share_of_memory_is_a_smaller_limit():
    cell = grid.cells(grid_fakes.small_grid())[0]
    where = hardware.find("a100:1")
    assert fit.estimate(cell, where).fits
    tight = dataclasses.replace(where, chip=dataclasses.replace(where.chip, memory_bytes=1e5))
    assert not fit.estimate(cell, tight).fits
