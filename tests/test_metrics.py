import contextlib
import json
import logging
import math
import re
import sys
import time
import types

import pytest

from gqa_jax import gcs, storage
from gqa_jax.config import TrainConfig, default_config
from gqa_jax.errors import ConfigError
from gqa_jax.training import metrics, remote_rows, services


def config(**logging_fields):
    values = default_config()
    values.steps = 10
    values.logging.update(progress=False, **logging_fields)
    return TrainConfig.from_dict(values.to_dict())


def test_rows_of_a_later_attempt_count_and_a_torn_line_is_skipped(tmp_path):
    for attempt, steps in ((0, [1, 2, 3]), (1, [3, 4])):
        writer = metrics.Metrics(tmp_path, attempt, config())
        for step in steps:
            writer.write("train", step, {"loss": 10.0 * attempt + step})
        writer.close()
    with open(tmp_path / "metrics" / "attempt-001.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert [row["loss"] for row in metrics.read_metrics(tmp_path)] == [1.0, 2.0, 13.0, 14.0]


def test_non_finite_numbers_are_legal_json(tmp_path):
    writer = metrics.Metrics(tmp_path, 0, config())
    writer.write("train", 1, {"loss": math.nan, "grad_norm": math.inf, "mfu": None})
    writer.close()
    row = json.loads((tmp_path / "metrics" / "attempt-000.jsonl").read_text())
    assert (row["loss"], row["grad_norm"], row["mfu"]) == ("nan", "inf", None)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    metrics.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        metrics.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("attempt", [0, 1])
def test_tensorboard_events_are_written(tmp_path, attempt):
    writer = metrics.Metrics(tmp_path, attempt, config(tensorboard=True))
    writer.write("train", 1, {"loss": 2.0, "mfu": None})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_an_outage_of_a_writer_is_said_once_and_stops_nothing(tmp_path, caplog):
    class Down:
        def write(self, *_):
            raise ConnectionError("no route")

        def close(self):
            raise ConnectionError("no route")

    writer = metrics.Metrics(tmp_path, 0, config())
    writer._services["W&B"] = Down()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            writer.write("train", step, {"loss": 1.0})
    writer.close()
    assert caplog.text.count("W&B failed") == 1
    assert len(metrics.read_metrics(tmp_path)) == 2


def test_wandb_that_is_not_installed_is_an_error_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics.Metrics(tmp_path, 0, config(wandb_project="p"))


@pytest.fixture
def wandb(monkeypatch):
    """A W&B that keeps what runs are begun with."""
    module = types.ModuleType("wandb")
    module.begun = []

    def init(**options):
        module.begun.append(options)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def start(folder, attempt, **fields):
    """An attempt of the run in `folder`, with its first row."""
    folder.mkdir(parents=True, exist_ok=True)
    with metrics.Metrics(folder, attempt, config(**fields)) as writer:
        writer.write("train", 1, {"loss": 1.0})


def test_runs_in_folders_of_one_name_are_two_runs_of_wandb_each_resumed_as_itself(tmp_path, wandb):
    for folder in ("a/run", "b/run"):
        start(tmp_path / folder, 0, wandb_project="p")
    start(tmp_path / "a/run", 1, wandb_project="p")
    first, second, resumed = wandb.begun
    assert first["id"] == resumed["id"] != second["id"]
    assert all(re.fullmatch("[0-9a-f]{16}", options["id"]) for options in wandb.begun)
    assert {options["name"] for options in wandb.begun} == {"run"}
    assert {options["resume"] for options in wandb.begun} == {"allow"}


def test_a_run_that_comes_to_wandb_later_is_itself_too(tmp_path, wandb):
    """Its folder was begun without W&B: it is not one of the first version."""
    for folder in ("a/run", "b/run"):
        start(tmp_path / folder, 0)
        start(tmp_path / folder, 1, wandb_project="p")
    assert len({options["id"] for options in wandb.begun} - {"run"}) == 2


def test_a_run_of_the_first_version_keeps_its_id(tmp_path, wandb):
    """The folder's name, even where it is then moved."""
    start(tmp_path / "run", 0)
    (tmp_path / "run" / "id.json").unlink()
    start(tmp_path / "run", 1, wandb_project="p")
    (tmp_path / "run").rename(tmp_path / "moved")
    start(tmp_path / "moved", 2, wandb_project="p")
    assert [options["id"] for options in wandb.begun] == ["run", "run"]


@pytest.mark.parametrize(("content", "message"), [("{}", "id.json has no id: move it away"), ("[", "id.json can't be read")])
def test_an_id_that_can_not_be_read_is_an_error_with_the_fix(tmp_path, wandb, content, message):
    start(tmp_path, 0)
    (tmp_path / "id.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, 1, wandb_project="p")
    assert wandb.begun == []


def test_heartbeat_is_replaced_and_throttled(tmp_path):
    writer = metrics.Metrics(tmp_path, 3, config())
    writer.heartbeat("train", 1, 100.0, None, 5.0, force=True)
    writer.heartbeat("train", 2)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["steps"], beat["attempt"], beat["tokens_per_second"]) == (1, 10, 3, 100.0)
    writer.heartbeat("evaluate", 10, force=True)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "evaluate"
    writer.close()


def test_processes_beside_the_primary_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = metrics.NoMetrics()
    writer.write("train", 1, {"loss": 1.0})
    writer.heartbeat("train", 1, force=True)
    writer.close()
    assert not list(tmp_path.iterdir())


def parts(folder):
    return {name: storage.read_bytes(f"{folder}/metrics/{name}").count(b"\n") for name in storage.names(f"{folder}/metrics")}


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Outage:
    """Of gs://, for objects whose name holds `what`."""

    def __init__(self, monkeypatch, what):
        self.over, self.tried = False, 0
        real = gcs.system().pipe_file

        def pipe_file(path, content):
            if what in path and not self.over:
                self.tried += 1
                raise TimeoutError
            real(path, content)

        monkeypatch.setattr(gcs.system(), "pipe_file", pipe_file)


def test_rows_on_a_bucket_are_parts(gcs_root, monkeypatch):
    monkeypatch.setattr(remote_rows, "PART_SECONDS", 0.0)
    for attempt, steps in ((0, [1, 2, 3]), (1, [3, 4])):
        with metrics.Metrics(gcs_root, attempt, config()) as writer:
            for step in steps:
                writer.write("train", step, {"loss": 10.0 * attempt + step})
            if attempt == 0:
                writer.flush()
                writer.flush()
                writer.write("train", 5, {"loss": 5.0})
                eventually(lambda: len(parts(gcs_root)) == 2)  # by itself
    assert parts(gcs_root) == {"attempt-000-00000.jsonl": 3, "attempt-000-00001.jsonl": 1, "attempt-001-00000.jsonl": 2}
    assert [row["loss"] for row in metrics.read_metrics(gcs_root)] == [1.0, 2.0, 13.0, 14.0, 5.0]


def test_rows_of_more_attempts_and_parts_than_digits(tmp_path):
    (tmp_path / "metrics").mkdir()
    names = ("attempt-999.jsonl", "attempt-1000-00000.jsonl", "attempt-1000-99999.jsonl", "attempt-1000-100000.jsonl")
    for i, name in enumerate(names):
        (tmp_path / "metrics" / name).write_text(json.dumps({"kind": "train", "step": 1, "loss": i}) + "\n")
    (tmp_path / "metrics" / ".attempt-2000.jsonl.tmp").write_text("x\n")
    assert [row["loss"] for row in metrics.read_metrics(tmp_path)] == [3]


def test_no_row_is_lost_in_an_outage(gcs_root, monkeypatch, caplog):
    monkeypatch.setattr(remote_rows, "PART_SECONDS", 0.0)
    with metrics.Metrics(gcs_root, 0, config()) as writer:
        outage = Outage(monkeypatch, "metrics/")
        writer.write("train", 1, {"loss": 1.0})
        eventually(lambda: outage.tried >= 2)
        writer.write("train", 2, {"loss": 2.0})
        with pytest.raises(OSError, match=r"metrics/attempt-000-00000\.jsonl: Google Cloud Storage is not reached"):
            writer.flush()
        outage.over = True
        writer.flush()
        writer.write("train", 3, {"loss": 3.0})
    assert [row["loss"] for row in metrics.read_metrics(gcs_root)] == [1.0, 2.0, 3.0]
    assert caplog.text.count("metrics can't be written for now") == 1


def test_an_outage_at_the_end_is_an_error_unless_there_is_another(gcs_root, monkeypatch, caplog):
    Outage(monkeypatch, "metrics/")
    with pytest.raises(OSError, match="not reached"), metrics.Metrics(gcs_root, 0, config()) as writer:
        writer.write("train", 1, {"loss": 1.0})

    def fail():
        with metrics.Metrics(gcs_root, 0, config()) as writer:
            writer.write("train", 1, {"loss": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "the last metric rows can't be written" in caplog.text


def test_heartbeat_on_a_bucket_is_rare_and_its_outage_stops_nothing(gcs_root, monkeypatch, caplog):
    def beat():
        return storage.read_json(f"{gcs_root}/heartbeat.json")

    monkeypatch.setattr(metrics, "HEARTBEAT_SECONDS", 0.0)
    outage = Outage(monkeypatch, "heartbeat")
    with metrics.Metrics(gcs_root, 0, config()) as writer:
        writer.heartbeat("train", 1, force=True)
        eventually(lambda: outage.tried >= 2)
        outage.over = True
        eventually(lambda: beat() is not None)
        writer.heartbeat("train", 2)
        time.sleep(1.5)
        assert beat()["step"] == 1  # not within ten seconds
        writer.heartbeat("evaluate", 3, force=True)
        eventually(lambda: beat()["step"] == 3)
        writer.heartbeat("train", 4)
    assert beat()["step"] == 4
    assert caplog.text.count("heartbeat.json can't be written for now") == 1


def test_tensorboard_on_a_bucket_is_copied_and_its_outage_stops_nothing(gcs_root, monkeypatch, caplog):
    monkeypatch.setattr(services, "EVENTS_SECONDS", 0.0)
    with metrics.Metrics(gcs_root, 0, config(tensorboard=True)) as writer:
        writer.write("train", 1, {"loss": 1.0})
        eventually(lambda: storage.names(f"{gcs_root}/tensorboard"))
        monkeypatch.setattr(gcs.system(), "put_file", lambda *_: 1 / 0)
        writer.write("train", 2, {"loss": 1.0})
        eventually(lambda: "TensorBoard's files can't be copied" in caplog.text)
    assert "closing a metrics writer failed" in caplog.text
    assert len(metrics.read_metrics(gcs_root)) == 2


class Clock:
    """Of a machine: `step` sets it, and the seconds that have passed stay what they are."""

    def __init__(self, monkeypatch):
        self.wall, self.passed = 1.8e9, 50.0
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "monotonic", lambda: self.passed)

    def wait(self, seconds):
        self.wall += seconds
        self.passed += seconds

    def step(self, seconds):
        self.wall += seconds


@pytest.mark.parametrize("by", [-3600, 3600])
def test_a_clock_that_is_set_changes_no_heartbeat_and_no_bill(tmp_path, monkeypatch, by):
    clock = Clock(monkeypatch)
    with metrics.Metrics(tmp_path, 1, config(), metrics.run_folder.DeviceTime("H200", 8, time.monotonic(), 100.0)) as writer:
        for step in range(1, 6):
            clock.wait(metrics.HEARTBEAT_SECONDS)
            writer.heartbeat("train", step)
            beat = json.loads((tmp_path / "heartbeat.json").read_text())
            assert (beat["step"], beat["time"]) == (step, clock.wall)
            assert beat["device_seconds"] == pytest.approx(100 + 8 * step * metrics.HEARTBEAT_SECONDS)
            clock.step(by if step == 2 else 0)
            writer.heartbeat("train", 99)  # too soon
        assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 5


def test_heartbeat_says_what_the_run_has_spent(tmp_path):
    time_of_devices = metrics.run_folder.DeviceTime("TPU v5e", 16, time.monotonic() - 10, 100.0)
    with metrics.Metrics(tmp_path, 1, config(), time_of_devices) as writer:
        writer.heartbeat("train", 1, force=True)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["device"], beat["n_devices"], beat["job"]) == ("TPU v5e", 16, None)
    assert 260 <= beat["device_seconds"] < 300
    assert beat["host"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_heartbeat_that_comes_while_a_forced_one_is_written(tmp_path, monkeypatch, fails):
    """It is no haste of its own; where the write fails it takes the place, and the haste, of the one before."""
    files = remote_rows.RemoteFiles(tmp_path, 0)
    files._over.set()  # nothing in the background

    def write(path, values):
        files.heartbeat({"step": 2}, False)
        if fails:
            raise OSError("an outage")

    monkeypatch.setattr(remote_rows.storage, "write_json", write)
    files.heartbeat({"step": 1}, True)
    with pytest.raises(OSError, match="an outage") if fails else contextlib.nullcontext():
        files._write_beat()
    assert files._beat == ({"step": 2}, fails)
