"""Hundreds of odd files: each gives its documents, or an InputError that names it; no traceback, no hang, no silent loss.

And odd records of runs and grids: what they don't say is not known, and the other runs are as they were.
"""

import bz2
import contextlib
import csv
import errno
import fcntl
import gzip
import io
import json
import lzma
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from etils import epath

from benchmarks import fuzz_records
from gqa_jax import results, storage
from gqa_jax.config import TrainConfig
from gqa_jax.data import sources
from gqa_jax.data.documents import Format, InputError, Reading, find_sources, read_documents
from gqa_jax.differences import load_differences
from gqa_jax.errors import ConfigError
from gqa_jax.training import metrics, records, run_folder
from launch import export, findings, grid_cells, state, studies
from launch.__main__ import main
from launch.cells import Layout
from launch.executors.base import RUNNING, Job
from launch.training_cells import TrainingCell
from tests import grid_fakes

PACKINGS = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}
SUFFIXES = ["", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".jsonl.gz", ".txt.zst", ".xz", ".bz2", ".md"]
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1251", "utf-16-le", "utf-32-be"]
NAMES = [
    "plain",
    "two\nlines",
    "tab\t spaces ",
    "ünïcödé",
    "日本語",
    "-rf",
    "'\"",
    "*?[x]",
    "a.b.c",
    os.fsdecode(b"\xff\xfe"),
]
N_ROWS = 40
SECONDS = 2.0  # for one file; most take a thousandth


def odd_files():
    """Suffix, bytes, and what is checked: "text" (all is kept), "lines" (all are read or counted), "rows" (N_ROWS), or None."""
    generator = random.Random(7)
    rows = [{"id": i, "text": odd_text(generator, generator.randrange(80)), "s": "ab"[i % 2]} for i in range(N_ROWS)]
    lines = "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()
    whole = {
        ".jsonl": lines,
        ".json": json.dumps(rows, indent=1).encode(),
        ".csv": table(rows),
        ".parquet": parquet(rows),
        ".txt": "\n".join(row["text"] for row in rows).encode(),
        **{f".jsonl.{suffix}": pack(lines) for suffix, pack in PACKINGS.items()},
    }
    for _ in range(50):
        yield generator.choice(SUFFIXES), generator.randbytes(generator.choice([1, 2, 9, 100, 3000])), None
    for suffix, data in whole.items():
        for _ in range(7):
            yield suffix, data[: generator.randrange(len(data))], None
            yield suffix, mutated(generator, data), None
        yield generator.choice(SUFFIXES), data, None  # under another name
        if suffix not in (".csv", ".txt"):  # what these are, no first bytes tell
            yield generator.choice(["", ".txt", ".md", ".log"]), data, "rows"
    for _ in range(40):
        yield ".jsonl", mutated(generator, lines), "lines"
        text, encoding = odd_text(generator, generator.randrange(1, 2000)), generator.choice(ENCODINGS)
        yield generator.choice([".txt", "", ".md"]), text.encode(encoding, "ignore"), "text" if "utf-8" in encoding else None
    yield ".txt", b"x" * 3_000_000, "text"
    yield ".jsonl", b'{"text": "' + b"y" * 3_000_000 + b'"}', "lines"
    yield ".csv", b"text\n" + b"z" * 3_000_000, None
    for opening in (b"[", b'{"text": ', b'[{"a": ', b'{"a":['):
        for n in (10, 900, 50_000):
            yield generator.choice([".json", ".jsonl", ".txt"]), opening * n, None
            yield ".jsonl", b'{"text": "before"}\n' + opening * n + b'1\n{"text": "after"}\n', "lines"
    marks = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\0", b"PAR1", b"PAR1PAR1", b"PK")
    for data in (b"", b"\n", b" \n\t\n", b"\0", b"\0" * 4096, *marks):
        for suffix in (".txt", ".jsonl", ".csv", ".parquet"):
            yield suffix, data, None
    yield ".txt", gzip.compress(zstandard.compress(bytes(8 << 20))), None
    yield ".jsonl.gz", gzip.compress(gzip.compress(lines)), None
    for ending in (b"\r\n", b"\r"):
        yield ".jsonl", lines.replace(b"\n", ending), "lines"
    yield ".json", b"NaN", "lines"
    yield ".json", b'{"text": "a", "text": "b"}', "lines"
    yield ".jsonl", b'{"text": "\\ud800"}\n{"text": "\\udfff\\ud83d"}\n', "lines"
    for path in sorted(Path("tests/data/inputs").iterdir()):
        yield path.suffix, path.read_bytes(), "lines" if path.suffix == ".jsonl" else None


def odd_text(generator, length):
    ranges = [(32, 127), (9, 14), (0xC0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


def table(rows):
    with io.StringIO(newline="") as file:
        csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
        return file.getvalue().encode()


def parquet(rows):
    with io.BytesIO() as file:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
        return file.getvalue()


def mutated(generator, data):
    data = bytearray(data)
    for _ in range(generator.randrange(1, 6)):
        place = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[place] = generator.randrange(256)
            case 1:
                data[place] ^= 1 << generator.randrange(8)
            case 2:
                del data[place : place + generator.randrange(1, 9)]
            case 3:
                data[place:place] = generator.randbytes(generator.randrange(1, 9))
    return bytes(data)


FILES = [(f"{i:03} {NAMES[i % len(NAMES)]}{suffix}", data, check) for i, (suffix, data, check) in enumerate(odd_files())]
SKIP = {"bad_lines": "skip"}


@pytest.mark.parametrize("options", [{}, SKIP, {**SKIP, "encoding_errors": "replace"}, {**SKIP, "source_key": "s"}], ids=str)
def test_every_file_gives_documents_or_a_sentence(tmp_path, options):
    assert len(FILES) > 300
    n_documents = n_errors = 0
    for name, data, check in FILES:
        path, reading, error = tmp_path / name, Reading(), None
        path.write_bytes(data)
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings(action="error"):
                documents = list(read_documents(find_sources([path]).sources[0], Format(**options), reading))
        except InputError as raised:
            error = str(raised)
        assert time.perf_counter() - begin < SECONDS, name
        if error is None:
            n_documents += 1
            check_nothing_is_lost(data, check, documents, reading)
            assert options or not reading.bad_lines, name
        else:
            n_errors += 1
            assert error.startswith(sources.shown(path)), (name, error)
            assert error.isprintable(), (name, error)
            assert len(error) < 2000, (name, error)
            is_right = {"text": "source_key" in options, "lines": "bad_lines" not in options, "rows": False, None: True}
            assert is_right[check], (name, error)
        path.unlink()
    assert min(n_documents, n_errors) > 60, (n_documents, n_errors)


def check_nothing_is_lost(data, check, documents, reading):
    texts = [document.text for document in documents]
    bad = sum(lines.count for lines in reading.bad_lines.values())
    if check == "lines":
        assert len(texts) + bad == sum(bool(line.strip()) for line in data.split(b"\n"))
    if check == "rows":
        assert len(texts) == N_ROWS
        assert not bad
    if check == "text":
        assert "".join(texts) == data.decode("utf-8-sig")
    assert sum(kind.documents for kind in reading.kinds.values()) == len(texts)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    assert sum(kind.text_bytes for kind in reading.kinds.values()) == size


def test_a_folder_of_texts_with_odd_names_is_read_in_order(tmp_path):
    texts = {name: data for name, data, check in FILES if check == "text"}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    found = find_sources([tmp_path]).sources
    assert [source.name for source in found] == sorted(texts)
    read = [document.text for source in found for document in read_documents(source, Format(), Reading())]
    assert read == [texts[name].decode("utf-8-sig") for name in sorted(texts)]


# Records of runs and grids: one that is odd says nothing of the others (gqa_jax.training.records)


def written(content):
    """What puts this content, or what it is called, at a path where nothing is."""
    return (lambda path: path.write_bytes(content)) if isinstance(content, bytes) else content


ODD = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "torn": b'{"status": "done"',
    "binary": b"\xff\x00\x80{}",
    "fields that are null": b'{"time": null, "device_seconds": null, "class": null, "status": null, "step": null}',
    "fields of other types": b'{"time": "x", "device_seconds": [], "class": 5, "status": {}, "step": true, "host": 1}',
    "no numbers": b'{"time": NaN, "device_seconds": -1, "class": "", "status": "odd", "step": -1, "eta_seconds": Infinity}',
    "digits": b'{"time": 1' + b"0" * 400 + b', "step": 1e400}',
    "nested": b'{"time":' * 100_000,
    "nested fields": b'{"more": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    "huge": lambda path: (path.write_bytes(b"{"), os.truncate(path, 1 << 36)),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path.name),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
}
each_odd = pytest.mark.parametrize("odd", [written(content) for content in ODD.values()], ids=ODD)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return fuzz_records.made(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original, tmp_path):
    """A small grid, finished in part, with records of every kind."""
    shutil.copytree(original.file.parent, tmp_path / "grid")
    root = tmp_path / "grid" / original.layout.root.relative_to(original.file.parent)
    return original._replace(file=tmp_path / "grid" / original.file.name, layout=Layout(epath.Path(root)))


def put(grid, number, record, odd):
    """Puts something odd in the place of a record of a run; returns the run's name and folder."""
    folder = grid.layout.cell(grid.names[number])
    (folder / record).unlink(missing_ok=True)
    odd(Path(folder / record))
    return grid.names[number], folder


def shown(grid, command="status", *options):
    """What a command says of the grid, and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([command, str(grid.file), *options, "--root", str(grid.layout.root)])
    assert code in (0, 1, 3), err.getvalue()
    return out.getvalue(), err.getvalue()


@each_odd
def test_an_odd_sign_of_life_is_as_if_it_were_absent(made, odd):
    _, folder = put(made, 4, "heartbeat.json", odd)
    now = state.of(TrainingCell, folder, time.time())
    assert (now.state, now.heartbeat_age, now.step, now.device_seconds) == ("preempted", None, None, None)
    assert (now.cause, now.attempts) == ("asked to end", 1)
    running = state.of(TrainingCell, folder, time.time(), Job("c", "1", RUNNING, since=time.time()))
    assert running.state == "running"
    assert run_folder.device_seconds(folder) == 0.0


@each_odd
def test_an_odd_end_is_one_without_a_word(made, odd):
    _, folder = put(made, 4, "exit.json", odd)
    assert state.of(TrainingCell, folder, time.time()).state == "lost"
    for record in (
        "host-failure.json",
        "cancelled.json",
        next((folder / "submissions").iterdir()),
        folder / "attempts/000.json",
    ):
        put(made, 4, record, odd)
    now = state.of(TrainingCell, folder, time.time())
    assert (now.state, now.cancelled, now.not_before, now.runnable) == ("lost", None, 0.0, True)
    put(made, 5, "host-failure.json", odd)
    json.loads(shown(made, "status", "--json")[0])


@each_odd
def test_an_odd_result_is_left_out_said_and_mended_by_retry(made, odd, caplog):
    name, folder = put(made, 0, "result.json", odd)
    put(made, 0, "heartbeat.json", odd)
    now = state.of(TrainingCell, folder, time.time())
    assert (now.state, now.failure, now.runnable) == ("failed", "broken_result", False)
    assert "result.json" in now.cause
    for load in (results.load_results, results.load_evaluations, load_differences):
        assert set(load(made.layout.root)["cell"]) <= {*made.names[1:4]}
    (said,) = caplog.messages
    assert said.startswith(f"1 run of {made.layout.root} is left out")
    assert f"{name}: {folder}/result.json" in said
    assert "`python -m launch retry GRID` moves it aside" in said
    assert "broken_result" in shown(made)[0]
    shown(made, "retry", name)
    (aside,) = folder.glob("before-retry-*")
    assert {"result.json", "heartbeat.json", "attempts"} <= {*os.listdir(aside)}
    assert not {"result.json", "heartbeat.json"} & {*os.listdir(folder)}
    assert state.of(TrainingCell, folder, time.time()).runnable


@each_odd
def test_an_odd_configuration_is_left_out_and_written_again(made, odd, caplog):
    name, folder = put(made, 0, "config.json", odd)
    assert json.loads(shown(made, "status", "--json")[0])[0]["failure"] == "broken_config"
    assert name not in set(results.load_results(made.layout.root)["cell"])
    assert name not in set(results.load_costs(made.layout.root)["cell"])
    assert f"{folder}/config.json can't be used" in caplog.text
    shown(made, "retry")
    grid_cells.open_cells(str(made.file), str(made.layout.root)).write_plan()  # as `run` does
    assert json.loads(shown(made, "status", "--json")[0])[0]["state"] == "done"
    assert name in set(results.load_results(made.layout.root)["cell"])


@each_odd
def test_an_odd_record_of_the_grid_is_a_sentence_with_its_fix(made, odd, capsys):
    for record, look in (("grid.json", lambda: results.load_results(made.layout.root)), ("cluster.json", lambda: shown(made))):
        path = Path(made.layout.root / record)
        path.unlink()
        odd(path)
        if record == "grid.json":
            with pytest.raises(ConfigError, match=r"grid\.json .*`export` of the grid writes it again"):
                look()
            grid_cells.open_cells(str(made.file), str(made.layout.root)).write_plan()  # as both do
            assert len(look()) == 4
        else:
            assert main(["status", str(made.file), "--root", str(made.layout.root)]) == 2
            assert "move it away and name its engine by --on" in capsys.readouterr().err
            assert main(["status", str(made.file), "--root", str(made.layout.root), "--on", "local"]) == 1


@each_odd
def test_a_run_goes_on_in_a_folder_with_odd_records(tmp_path, odd, caplog):
    """What an attempt reads and writes of its folder, in the order of `gqa_jax.training.loop`."""
    folder = epath.Path(tmp_path)
    for name in ("heartbeat.json", "exit.json", "environment.json"):
        odd(tmp_path / name)
    for name in ("attempts", "metrics"):
        (tmp_path / name).write_bytes(b"odd")
    attempt, before = run_folder.next_attempt(folder), run_folder.device_seconds(folder)
    assert (attempt, before) == (0, 0.0)
    config = TrainConfig.from_dict({"context_length": 32, "batch_tokens": 256, "steps": 4})
    storage.remove(folder / "exit.json")
    with metrics.Metrics(folder, attempt, config, run_folder.DeviceTime("cpu", 2, time.monotonic(), before)) as writer:
        storage.write_json(folder / "environment.json", {"host": "h"})
        run_folder.record_attempt(folder, attempt, 0, run_folder.DeviceTime("cpu", 2, time.monotonic(), before), 1)
        writer.write("train", 1, {"loss": 2.0})
        writer.heartbeat("train", 1, force=True)
    run_folder.record_exit(folder, 75, "preempted", "asked to end", attempt)
    assert state.of(TrainingCell, folder, time.time()).state == "preempted"
    assert metrics.read_metrics(folder)[0]["loss"] == 2.0
    assert "attempts was in the way" in caplog.text


def test_answers_come_from_the_other_runs(tmp_path, capsys, caplog):
    _, layout, cells = grid_fakes.finished_grid(tmp_path)
    layout.cell(cells[1].name).joinpath("result.json").write_text('{"status": "done"')
    for argv in (["fit"], ["optimum", "--context", "8192", "--loss", "2.2", "--draws", "50"]):
        assert main([argv[0], str(layout.root), *argv[1:]]) == 0, capsys.readouterr().err
    loss, _ = export.write_tables(layout, layout)
    assert set(loss["cell"]) == {cell.name for cell in cells} - {cells[1].name}
    assert {message.partition(":")[0] for message in caplog.messages} == {f"1 run of {layout.root} is left out"}
    (row,) = findings._unfinished(studies.of_grid(str(layout.root))).to_dict("records")  # of the report
    assert (row["cell"], row["state"]) == (cells[1].name, "failed")


def test_odd_rows_of_metrics_are_left_out(made, caplog):
    path = made.layout.cell(made.names[0]) / "metrics" / "attempt-000.jsonl"
    content = path.read_bytes()
    more = [b"[]", b"\xff", b'{"step": null, "kind": "train"}', b"[" * 100_000, b'{"step": 9, "kind": "eval", "tokens": 0.5}']
    path.write_bytes(b"\n".join([*more, content]))
    rows = metrics.read_metrics(path.parent.parent)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("train", 2), ("train", 3), ("eval", 9)]
    assert "tokens" not in rows[-1]
    assert "4 of 8 lines can't be read" in caplog.text
    path.unlink()
    path.mkdir()
    assert metrics.read_metrics(path.parent.parent) == []
    assert set(results.load_metrics(made.layout.root)["cell"]) == {*made.names[1:]}


def test_fields_of_a_result_that_no_column_takes_are_empty(made):
    folder = made.layout.cell(made.names[0])
    values = storage.read_json(folder / "result.json")
    odd = {"loss_sem": 1e12, "tokens": 0.5, "mfu": [1], "device": 5, "versions": [], "start": {"differs": [None]}}
    odd |= {"attempts": 1e30, "params_total": None, "params_non_embedding": "many"}
    storage.write_json(folder / "result.json", values | odd | {"step": 4.0})
    row = results.load_results(made.layout.root).set_index("cell").loc[made.names[0]]
    assert row[["loss_sem", "mfu", "device", "jax", "attempts"]].isna().all()
    assert (row["steps"], row["loss"]) == (4, values["loss"])
    assert (row["tokens"], row["params_total"]) == (1024, values["params_total"])  # as the configuration says


def test_configurations_that_wait_for_one_another_end(made):
    for number, other in ((4, 5), (5, 4)):
        path = made.layout.cell(made.names[number]) / "config.json"
        storage.write_json(path, storage.read_json(path) | {"continue_from": f"../{made.names[other]}"})
    for number in (4, 5):
        assert state.of(TrainingCell, made.layout.cell(made.names[number]), time.time()).state in ("preempted", "failed")
    assert [row["failure"] for row in json.loads(shown(made, "status", "--json")[0])][4:] == ["edited", "edited"]


def test_retry_of_all_leaves_what_somebody_edited(made):
    path = made.layout.cell(made.names[4]) / "config.json"
    storage.write_json(path, storage.read_json(path) | {"seed": 5})
    out, err = shown(made, "retry")
    assert f"{made.names[4]} is left as it is: {path} was changed: seed: 0 here, 5 there" in err
    assert "2 cells can run again" in out


def test_what_a_process_said_when_it_took_a_cell_may_be_odd(made):
    claim = Path(made.layout.cell(made.names[4]) / ".job")
    for content in (b"[]", b"\xff", b'{"pids": 5, "time": null}', b"[" * 100_000, b'{"pids": [], "id": 7}'):
        claim.write_bytes(content)
        with open(claim) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert json.loads(shown(made, "status", "--json")[0])[4]["state"] == "running"


def test_what_is_in_the_way_is_moved_aside_and_kept(tmp_path, caplog):
    for content in ("one", "two"):
        (tmp_path / "a.json").mkdir()
        (tmp_path / "a.json" / content).touch()
        storage.write_json(tmp_path / "a.json", {"of": content})
        storage.remove(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    storage.remove(tmp_path / "a.json")
    (tmp_path / "b").write_text("three")
    storage.make_folder(tmp_path / "b")
    assert storage.names(tmp_path) == ["a.json.aside-1", "a.json.aside-2", "a.json.aside-3", "b", "b.aside-1"]
    assert [storage.names(tmp_path / f"a.json.aside-{n}") for n in (1, 2)] == [["one"], ["two"]]
    assert (tmp_path / "b.aside-1").read_text() == "three"
    assert "a.json was in the way, or could not be used: it is a.json.aside-3 now" in caplog.text


def test_storage_that_is_not_reached_is_an_error_still(tmp_path, monkeypatch):
    def unreachable(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", unreachable)
    with pytest.raises(OSError, match="Input/output"):
        records.read(tmp_path / "heartbeat.json")


def test_a_record_that_was_just_replaced_is_read_again(tmp_path, monkeypatch):
    """NFS says ESTALE where the file of a handle is gone."""
    storage.write_json(tmp_path / "heartbeat.json", {"time": 5.0})
    real, errors = os.open, [OSError(errno.ESTALE, "Stale file handle")]

    def once(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(os, "open", once)
    assert records.read(tmp_path / "heartbeat.json") == {"time": 5.0}


def test_a_record_that_may_not_be_read_is_odd(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    assert records.read(tmp_path / "heartbeat.json") == {}
    with pytest.raises(ConfigError, match=r"result\.json can't be read \(Permission denied\): move it away"):
        run_folder.find_result(tmp_path / "result.json")


def test_odd_records_drawn_at_random_leave_all_other_runs_as_they_were(tmp_path):
    assert fuzz_records.records(60, 0, tmp_path) == []
