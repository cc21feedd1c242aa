import json
import logging
import math

import pytest

from gqa_jax import metrics
from gqa_jax.config import TrainConfig, default_config


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


def test_tensorboard_events_are_written(tmp_path):
    writer = metrics.Metrics(tmp_path, 0, config(tensorboard=True))
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
    writer._side_writers["W&B"] = Down()
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
