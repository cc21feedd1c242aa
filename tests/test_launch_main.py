"""`python -m launch` from its command line: finished cells are written by hand, so that no test trains but the last."""

import csv
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time

import pytest

import gqa_jax
from gqa_jax import gcs, hardware, storage
from gqa_jax.errors import ConfigError
from gqa_jax.training.metrics import write_json
from launch import __main__ as launch
from launch import commands, grid, grid_cells, plan, reach, screen
from launch import run as run_passes
from launch.cells import Layout
from launch.executors import bundle, local, sky
from launch.executors.base import Job, Look, SubmitError
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(grid_fakes.GRID_FILE)
    return str(path), Layout(tmp_path / "root"), grid.cells(grid_fakes.small_grid())


def run(command, small, *rest):
    path, layout, _ = small
    return launch.main([command, path, *rest, "--root", str(layout.root)])


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_plan_as_csv_has_the_promised_columns_and_a_row_per_cell(small, capsys):
    assert run("plan", small, "--format", "csv", "--flops_per_second", "1e9") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    promised = (
        "cell,size,n_layers,d_model,n_heads,n_kv_heads,head_dim,context,params_non_embedding,params_total,tokens,train_flops"
    )
    assert set(promised.split(",")) <= set(rows[0])
    assert len(rows) == 6
    assert float(rows[0]["seconds"]) == pytest.approx(float(rows[0]["train_flops"]) / 1e9)
    assert rows[0]["tokens"] == "1024"
    assert not small[1].root.exists()  # nothing is written


def test_plan_on_screen_and_filtered(small, capsys):
    assert run("plan", small, "--where", "n_heads=2") == 0
    out = capsys.readouterr().out
    assert "3 cells" in out
    assert "not known before a cell has finished" in out


def test_a_large_grid_is_shown_by_size(small, capsys, monkeypatch):
    """By plan and status alike; rows are there on demand, and in what is read by machines."""
    _, layout, cells = small
    for module in (plan, screen):
        monkeypatch.setattr(module, "ROWS", 5)
    for cell in cells[:3]:
        grid_fakes.finish(cell, layout)
    grid_fakes.finish(cells[3], layout, "diverged")
    assert run("status", small) == launch.EXIT_FAILED
    said = capsys.readouterr().out
    assert re.search(r"^ *size +cells +planned +diverged +done +trained +ETA *$", said, re.MULTILINE)
    rows = [line.split() for line in said.splitlines() if re.match(r" *\d\dd ", line)]
    assert rows == [["16d", "32", "2", "2", "100%"], ["32d", "32", "2", "1", "1", "100%"], ["64d", "32", "2", "2"]]
    assert cells[0].name not in said
    assert run("status", small, "--rows") == launch.EXIT_FAILED
    assert all(cell.name in capsys.readouterr().out for cell in cells[:1])
    assert run("status", small, "--where", "d_model=16") == launch.EXIT_DONE  # few enough
    assert cells[0].name in capsys.readouterr().out
    assert run("plan", small, "--flops_per_second", "1e9") == launch.EXIT_DONE
    said = capsys.readouterr().out
    assert "a row per cell: --rows" in said
    assert cells[0].name not in said
    lines = {line.split()[0]: line.split() for line in said.splitlines() if re.match(r"\d\dd ", line)}
    assert list(lines) == ["16d", "32d", "64d"]
    assert [line[1:6] for line in lines.values()] == [["2", "x", d, "32", "2"] for d in ("16", "32", "64")]
    assert [line[-1] for line in lines.values()][:2] == ["2", "2"]  # done
    frame = commands.plan(small[0], flops_per_second=1e9).frame
    assert len(frame) == len(cells)
    assert run("plan", small, "--rows") == launch.EXIT_DONE
    assert cells[0].name in capsys.readouterr().out


def test_status_exit_codes_and_json(small, capsys):
    _, layout, cells = small
    assert run("status", small) == launch.EXIT_UNFINISHED
    for cell in cells:
        grid_fakes.finish(cell, layout)
    assert run("status", small) == launch.EXIT_DONE
    capsys.readouterr()
    (layout.cell(cells[0].name) / "result.json").write_text("{")
    assert run("status", small, "--json") == launch.EXIT_FAILED
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["failed"] + ["done"] * 5


def test_failures_alike_are_one_paragraph_with_file_and_command(small, capsys):
    _, layout, cells = small
    from gqa_jax.training import run_folder

    for cell in cells:
        layout.cell(cell.name).mkdir(parents=True)
        run_folder.record_exit(layout.cell(cell.name), 1, "out_of_memory", "out of memory (x): raise accumulation_steps", 0)
    assert run("status", small) == launch.EXIT_FAILED
    out = capsys.readouterr().out
    assert out.count("raise accumulation_steps") == 1
    assert "and 5 more" in out
    assert f"{layout.cell(cells[0].name)}/log.txt" in out
    assert "-m gqa_jax.train" in out


def test_retry_keeps_what_was_there_and_makes_cells_runnable(small, capsys):
    _, layout, cells = small
    for cell in cells[1:]:
        grid_fakes.finish(cell, layout)
    grid_fakes.finish(cells[0], layout, "diverged")
    assert run("retry", small) == 0
    assert "1 cell can run again" in capsys.readouterr().out
    folder = layout.cell(cells[0].name)
    assert not (folder / "result.json").exists()
    assert len(list(folder.glob("before-retry-*/result.json"))) == 1
    assert run("retry", small, cells[1].name) == launch.EXIT_BAD_INPUT
    assert "is done" in capsys.readouterr().err


def test_export_writes_tables_fits_optimum_and_pictures(small, capsys):
    _, layout, cells = small
    assert run("export", small) == launch.EXIT_BAD_INPUT
    for cell in cells:
        grid_fakes.finish(cell, layout)
    assert run("export", small) == 0
    out = capsys.readouterr().out
    assert "Cheapest heads" in out
    assert "R²" in out
    for name in ("loss.csv", "loss.parquet", "cost.csv", "cost.parquet", "fits.csv", "optimum.csv"):
        assert (layout.tables / name).stat().st_size > 0
    pictures = {path.name for path in layout.figures.iterdir()}
    assert {"loss-params-t32.png", "loss-params-t32.svg", "loss-cost-t32-served8192.png"} <= pictures
    fits = rows_of(layout.tables / "fits.csv")
    assert [float(row["b"]) for row in fits] == pytest.approx([0.3, 0.3], rel=0.01)
    before = {path.name: path.read_bytes() for path in layout.figures.iterdir()}
    assert run("export", small) == 0
    assert before == {path.name: path.read_bytes() for path in layout.figures.iterdir()}


def test_run_trains_nothing_that_is_done_and_a_second_launcher_is_refused(small, capsys, monkeypatch):
    _, layout, cells = small
    for cell in cells:
        grid_fakes.finish(cell, layout)
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a finished cell was started"))
    assert run("run", small) == launch.EXIT_DONE
    with run_passes.only_launcher(layout):
        assert run("run", small) == launch.EXIT_BAD_INPUT
    assert "another launcher runs in" in capsys.readouterr().err


def test_a_dry_run_shows_the_commands_and_writes_nothing(small, capsys):
    _, layout, cells = small
    grid_fakes.finish(cells[0], layout)
    assert run("run", small, "--dry_run") == launch.EXIT_DONE
    out = capsys.readouterr().out
    assert "5 of 6 cells would be submitted to local" in out
    assert out.count("-m gqa_jax.train") == 5
    assert run("run", small, "--dry_run", "--json") == launch.EXIT_DONE
    shown = json.loads(capsys.readouterr().out)
    assert [one["cell"] for one in shown] == [cell.name for cell in cells[1:]]
    assert sorted(path.name for path in layout.root.iterdir()) == ["cells"]
    assert run("run", small, "--json") == launch.EXIT_BAD_INPUT


ENGINES = {
    "local": 'engine = "local"\n',
    "slurm": 'engine = "slurm"\ntopology = "h100:8"\n',
    "sky": 'engine = "sky"\ntopology = "h100:8"\n',
    "tpu": 'engine = "tpu"\ntopology = "v5e:4x4"\nproject = "some-project"\nzones = ["us-west4-a", "us-east1-c"]\n',
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dry_run_needs_no_network_no_engine_and_no_token_store(engine, tmp_path, capsys, monkeypatch):
    def down(*_, **__):
        raise OSError("no network")

    remote = engine in ("tpu", "sky")
    root, store = ("gs://bucket/root", "gs://bucket/store") if remote else (str(tmp_path / "root"), "stores/not-yet")
    monkeypatch.setattr(socket.socket, "connect", down)
    monkeypatch.setattr(gcs, "system", down)
    monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)  # is not installed
    (tmp_path / "git").symlink_to(shutil.which("git"))  # by which a bundle knows its files
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bundle, "pack", lambda: b"code")
    file, cluster = tmp_path / "two.py", tmp_path / "cluster.toml"
    cluster.write_text(ENGINES[engine])
    cells = f"[config(data={{'store': {store!r}}}), config(data={{'store': {store!r}}}, seed=1)]"
    file.write_text(
        "from launch.grid import Grid\nfrom tests.grid_fakes import config\n"
        f"def get_grid(): return Grid('two', {cells}, [1024])\n"
    )
    asked = [str(file), "--root", root]
    assert launch.main(["run", *asked, "--on", str(cluster), "--dry-run", "--json"]) == launch.EXIT_DONE
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert [one["command"].count(one["cell"]) > 0 for one in shown] == [True, True]
    assert f"token store {store} is not prepared yet: the names of its cells will change" in said.err
    assert (f"not checked: what is in {root} and {store}, as if it were empty: no network" in said.err) == remote
    assert ("not checked: what runs: `squeue" in said.err) == (engine == "slurm")
    assert (f"not checked: what `run` asks {engine} first" in said.err) == (engine != "local")
    assert launch.main(["plan", *asked]) == launch.EXIT_DONE
    assert "is not prepared yet" in capsys.readouterr().err
    assert launch.main(["run", *asked, "--on", str(cluster)]) != launch.EXIT_DONE  # what needs them still says so
    assert ("no network" if remote else "make it with `python -m gqa_jax.data.prepare") in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.toml", "git", "two.py"]


def test_what_does_not_answer_is_not_waited_for():
    asked = threading.Event()
    with pytest.raises(reach.Unanswered, match="no answer within 0 s"):
        reach.within(0.01, lambda: asked.wait(10))
    asked.set()
    assert reach.within(10, lambda: 3) == 3
    with pytest.raises(ConfigError, match="gs://: the bucket is missing"):  # is no place, and not one out of reach
        grid_cells.open_cells("configs/grids/quickstart.py", "gs://", offline=True)


def test_status_says_what_was_spent_where_a_price_is_known(small, capsys):
    _, layout, cells = small
    for cell in cells[:2]:
        grid_fakes.finish(cell, layout)
        path = layout.cell(cell.name) / "result.json"
        write_json(path, json.loads(path.read_text()) | {"device": "TPU v5 lite", "device_seconds": 7200.0})
    assert run("status", small, "--json") == launch.EXIT_UNFINISHED
    rows = json.loads(capsys.readouterr().out)
    assert [row["usd"] for row in rows] == [pytest.approx(2 * hardware.CHIPS["v5e"].price.usd_per_hour)] * 2 + [None] * 4
    (layout.root / "prices.json").write_text('{"v5e": 10}')
    assert run("status", small, "--prices", str(layout.root / "prices.json")) == launch.EXIT_UNFINISHED
    assert "$40.00 so far; on TPU v5 lite" in capsys.readouterr().out


def test_status_says_on_what_cells_trained(small, capsys, tmp_path):
    """And where that was a CPU though the engine gives them GPUs, as older cells whose GPU was missing."""
    _, layout, cells = small
    for cell, device in zip(cells, ("cpu", "cpu", "NVIDIA H100 80GB HBM3"), strict=False):
        grid_fakes.finish(cell, layout)
        path = layout.cell(cell.name) / "result.json"
        write_json(path, json.loads(path.read_text()) | {"device": device})
    line = f"2 cells trained on cpu, like {cells[0].name}, where local gives a cell 8 GPUs (h100): the losses hold; if the GPUs"
    assert run("status", small) == launch.EXIT_UNFINISHED
    said = capsys.readouterr().out
    assert line not in said
    assert re.search(r"^ *cell +state +step .*loss +device *$", said, re.MULTILINE)
    assert re.search(rf"^ *{cells[2].name} .* NVIDIA H100 80GB HBM3 *$", said, re.MULTILINE)
    (tmp_path / "paid.toml").write_text('engine = "local"\ntopology = "h100:8"\n')
    assert run("status", small, "--on", str(tmp_path / "paid.toml")) == launch.EXIT_UNFINISHED
    assert line in capsys.readouterr().out


def test_a_command_that_is_told_to_end_says_so(small, capsys, monkeypatch):
    monkeypatch.setattr(launch.commands, "status", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
    before = signal.getsignal(signal.SIGHUP)
    assert run("status", small) == launch.EXIT_TOLD == 75
    assert capsys.readouterr().err == "launch: told to end (SIGHUP); the same command resumes\n"
    assert signal.getsignal(signal.SIGHUP) == before


def test_cancel_and_logs_of_a_running_cell(small, capsys, monkeypatch):
    _, layout, cells = small
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)
    executor_contract.behave(layout, cells[0], "hang")
    with local.Executor(local.Options(), layout) as engine:
        engine.submit(cells[0])
        while not (layout.cell(cells[0].name) / "heartbeat.json").exists():
            engine.wait(0.1)
        assert run("status", small) == launch.EXIT_UNFINISHED
        assert "1 running" in capsys.readouterr().out
        assert run("cancel", small) == launch.EXIT_DONE
        assert "1 cell cancelled on local" in capsys.readouterr().out
        assert run("logs", small, cells[0].name, "--follow") == launch.EXIT_DONE  # it has ended: nothing to wait for
        assert f"rank 0 of {cells[0].name}" in capsys.readouterr().out
    assert run("logs", small, cells[1].name) == launch.EXIT_BAD_INPUT
    assert "has printed nothing yet: it is planned" in capsys.readouterr().err


def test_a_grid_that_another_engine_has_is_not_run_here(small, capsys, monkeypatch):
    _, layout, cells = small
    layout.root.mkdir()
    write_json(layout.root / "cluster.json", {"engine": "sky", "shared_root": True, "accelerators": "H100:8"})
    monkeypatch.setattr(sky.Executor, "jobs", lambda self: Look({cells[0].name: Job(cells[0].name, "7", "running")}, []))
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a cell was started"))
    assert run("run", small, "--on", "local") == launch.EXIT_BAD_INPUT
    assert f"1 cells of the grid are on sky, like {cells[0].name}" in capsys.readouterr().err
    assert run("status", small) == launch.EXIT_UNFINISHED  # asks the engine that the grid is on
    assert "1 running" in capsys.readouterr().out

    def down(self):
        raise SubmitError("no network")

    monkeypatch.setattr(sky.Executor, "jobs", down)
    assert run("run", small, "--on", "local") == launch.EXIT_BAD_INPUT
    assert "does not answer (no network)" in capsys.readouterr().err
    grid_fakes.beat(layout.cell(cells[1].name), age=5.0)  # its heartbeat is all that is known
    (layout.cell(cells[1].name) / "attempts").mkdir()
    write_json(layout.cell(cells[1].name) / "attempts" / "00000.json", {"time": time.time(), "first_step": 0})
    assert run("status", small) == launch.EXIT_FAILED
    said = capsys.readouterr()
    assert "not checked: what runs: no network; states are by what cells have written alone" in said.err
    assert "1 running" in said.out
    assert run("plan", small) == launch.EXIT_DONE  # needs no engine
    assert "no network" in capsys.readouterr().err
    assert run("cancel", small, cells[1].name) == launch.EXIT_FAILED
    assert "no network. Launchers that are at work won't start 1 cell again, but jobs" in capsys.readouterr().err
    assert storage.read_json(layout.cell(cells[1].name) / "cancelled.json")["time"] <= time.time()


def test_a_root_that_cannot_be_written_is_said_before_anything_starts(small, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert launch.main(["run", small[0], "--root", str(tmp_path / "file" / "root")]) in (
        launch.EXIT_BAD_INPUT,
        launch.EXIT_FAILED,
    )
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert launch.main(["status", small[0], "--root", "s3://bucket/root"]) == launch.EXIT_BAD_INPUT
    assert "s3:// is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("remote", [False, True])
def test_a_clock_that_is_off_is_said_before_anything_starts(small, capsys, monkeypatch, gcs_root, remote, tmp_path):
    root = gcs_root if remote else str(tmp_path / "root")
    (tmp_path / "root").mkdir()
    now = time.time
    monkeypatch.setattr(run_passes.time, "time", lambda: now() - 3600)
    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a cell was started"))
    assert launch.main(["run", small[0], "--root", root]) == launch.EXIT_BAD_INPUT
    assert "the clock of this machine is -3600 s from" in capsys.readouterr().err


def test_a_grid_on_gs(tmp_path, capsys, gcs_root, monkeypatch):
    """From run to tables, as on local disk; a second run trains nothing; retry; a second machine sees it all."""
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "two.py"
    path.write_text(
        "from launch.grid import Grid\nfrom tests.grid_fakes import config\n"
        "def get_grid(): return Grid('two', [config(size=16), config(execution={'attention': 'flash'}, seed=1)], [1024])\n"
    )
    assert launch.main(["run", str(path), "--root", gcs_root]) == launch.EXIT_FAILED
    assert "attention implementation 'flash' is unknown" in capsys.readouterr().out
    table = gqa_jax.load_results(gcs_root)
    assert len(table) == 1
    assert table["loss"].notna().all()
    assert {"loss.csv", "loss.parquet", "cost.csv", "cost.parquet"} <= set(storage.names(f"{gcs_root}/tables"))
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path / "another machine"))
    assert launch.main(["status", str(path), "--root", gcs_root, "--json"]) == launch.EXIT_FAILED
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["state"] for row in rows) == ["done", "failed"]
    assert launch.main(["retry", str(path), "--root", gcs_root]) == launch.EXIT_DONE
    assert launch.main(["status", str(path), "--root", gcs_root, "--json"]) == launch.EXIT_UNFINISHED
    assert sorted(row["state"] for row in json.loads(capsys.readouterr().out.split("\n", 2)[2])) == ["done", "planned"]
    (failed,) = [row["cell"] for row in rows if row["state"] == "failed"]
    aside = [name for name in storage.names(f"{gcs_root}/cells/{failed}") if name.startswith("before-retry")]
    assert "exit.json" in storage.names(f"{gcs_root}/cells/{failed}/{aside[0]}")


def test_bad_input_is_a_sentence_and_exit_2(small, capsys):
    assert launch.main(["plan", "configs/grids/quickstrat.py"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert run("plan", small, "--where", "heads=2") == 2
    assert run("logs", small, "s99") == 2
    assert "no cell of the grid" in capsys.readouterr().err
    assert run("run", small, "--slots", "999") == 2


def test_a_grid_of_real_cells_from_run_to_tables(tmp_path, capsys):
    """Two cells, one of which can't start: the other is trained, and the failure is explained."""
    path = tmp_path / "two.py"
    path.write_text(
        "from launch.grid import Grid\nfrom tests.grid_fakes import config\n"
        "def get_grid(): return Grid('two', [config(), config(execution={'attention': 'flash'})], [1024])\n"
    )
    layout = Layout(tmp_path / "root")
    assert launch.main(["run", str(path), "--root", str(layout.root)]) == 2  # same run, another kernel: one cell
    path.write_text(path.read_text().replace("'flash'}", "'flash'}, seed=1"))
    assert launch.main(["run", str(path), "--root", str(layout.root)]) == launch.EXIT_FAILED
    out = capsys.readouterr().out
    assert "attention implementation 'flash' is unknown" in out
    assert len(rows_of(layout.tables / "loss.csv")) == 1


def test_without_a_compiler_a_dry_run_is_still_json(small, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setattr("launch.executors.slurm.Executor.jobs", lambda _: {})
    assert run("run", small, "--on", "slurm", "--dry_run", "--json") == launch.EXIT_DONE
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == len(small[2])
    assert "whether cells fit h100:8 is estimated: compiling for h100:8 takes the package" in said.err
    assert "pip install 'gqa-jax[aot]'" in said.err
