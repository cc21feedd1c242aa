import fcntl
import json
import os
import re
import socket
import time

import pytest

from gqa_jax import storage
from gqa_jax.config import ConfigError, TrainConfig
from gqa_jax.training import run_folder
from gqa_jax.training.run_folder import DeviceTime


def test_the_lock_says_who_holds_it(tmp_path):
    with run_folder.claim(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / ".lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert time.time() - holder["time"] < 60
        with open(tmp_path / "run" / ".lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        message = rf"another process trains in this folder \(process {os.getpid()} on {socket.gethostname()}\); wait for it"
        with pytest.raises(ConfigError, match=message), run_folder.claim(tmp_path / "run"):
            pass
        assert json.loads((tmp_path / "run" / ".lock").read_text()) == holder
    with open(tmp_path / "run" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_the_next_holder_replaces_what_a_longer_record_said(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "h" * 500}))
    with run_folder.claim(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", "/proc/run"):
        with (
            pytest.raises(ConfigError, match=rf"--workdir={folder} can't be written: .*: use another folder"),
            run_folder.claim(folder),
        ):
            pass


def test_nothing_is_claimed_on_a_bucket(gcs_root):
    with run_folder.claim(gcs_root), run_folder.claim(gcs_root):
        assert storage.names(gcs_root) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], 0),
        (["metrics/attempt-000.jsonl"], 1),
        (["metrics/attempt-000.jsonl", "attempts/000.json"], 1),
        (["metrics/attempt-000-00000.jsonl", "metrics/attempt-000-00001.jsonl"], 1),
        (["metrics/attempt-001.jsonl"], 2),  # that of attempt 0 was removed by hand
        (["metrics/attempt-000.jsonl", "attempts/003.json"], 4),
        (["attempts/1000.json", "metrics/attempt-999.jsonl"], 1001),
        (["metrics/.attempt-007.jsonl.1.tmp", "attempts/.008.json.1.tmp", "attempts/notes.json"], 0),
    ],
)
def test_numbers_of_attempts(files, expected, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert run_folder.next_attempt(storage.path(tmp_path)) == expected


def test_device_time():
    assert DeviceTime(before=7.0).seconds() == 7.0
    assert 42.0 <= DeviceTime("cpu", 4, time.monotonic() - 10, 2.0).seconds() < 44.0
    assert 12.0 <= DeviceTime("H200", 4, time.monotonic() - 10, 2.0, shared_by=4).seconds() < 13.0


def test_device_seconds_of_a_run(tmp_path):
    folder = storage.path(tmp_path)
    assert run_folder.device_seconds(folder) == 0.0
    storage.write_json(folder / "heartbeat.json", {"phase": "train"})
    assert run_folder.device_seconds(folder) == 0.0
    storage.write_json(folder / "heartbeat.json", {"device_seconds": 12.5})
    assert run_folder.device_seconds(folder) == 12.5


def test_records_name_the_job(tmp_path, monkeypatch):
    run_folder.record_exit(tmp_path, 1, "error", "why", None)
    assert json.loads((tmp_path / "exit.json").read_text())["job"] is None
    monkeypatch.setenv("GQA_JAX_JOB", "12_3")
    run_folder.record_exit(tmp_path, 1, "error", "why", 4)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["job"], end["host"], end["attempt"], end["reason"]) == ("12_3", socket.gethostname(), 4, "why")
    run_folder.record_attempt(storage.path(tmp_path), 4, 100, DeviceTime("TPU v5e", 16), 4)
    record = json.loads((tmp_path / "attempts" / "004.json").read_text())
    assert time.time() - record.pop("time") < 60
    assert record == {
        "attempt": 4, "first_step": 100, "host": socket.gethostname(), "job": "12_3",
        "device": "TPU v5e", "n_devices": 16, "n_processes": 4,
    }  # fmt: skip


def test_an_exit_that_cannot_be_recorded_is_said(tmp_path, caplog):
    run_folder.record_exit(tmp_path / "none", 1, "error", "why", None)
    assert "exit.json can't be written" in caplog.text


def config(**changes):
    """A configuration with today's rules, on a built-in store."""
    values = {"context_length": 32, "batch_tokens": 256, "steps": 4, "evaluation": {"tokens": 1024}}
    return TrainConfig.from_dict(values | changes)


OLD = {"evaluation": {"tokens": 1024, "windows": "first"}, "optimizer": {"warmup_from": "zero"}}


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (
            OLD,
            {},
            "optimizer.warmup_from: 'one' here, 'zero' there. That run was begun under the rules of the first version: to "
            "resume it add --config.evaluation.windows=first --config.optimizer.warmup_from=zero "
            "--config.data.store=sotu-bytes@position, or start this one in another --workdir",
        ),
        (
            OLD,
            {"data": {"store": "my/store"}, "seed": 1},
            "to resume it add --config.evaluation.windows=first --config.optimizer.warmup_from=zero and the same values of the "
            "other fields, or",
        ),
        (OLD, OLD | {"seed": 1}, "seed: 1 here, 0 there. Resume it with the same fields, or start"),
        (
            {},
            OLD,
            "That run was begun under other rules: to resume it add --config.evaluation.windows=spread "
            "--config.optimizer.warmup_from=one, or",
        ),
        ({"optimizer": {"warmup_from": "zero"}}, {}, "other rules: to resume it add --config.optimizer.warmup_from=zero, or"),
    ],
)
def test_a_run_under_other_rules_says_how_to_go_on(theirs, ours, words, tmp_path):
    """config.json of the first version has no word of its rules."""
    folder, written = storage.path(tmp_path), config(**theirs).to_dict()
    if theirs is OLD:
        del written["evaluation"]["windows"], written["optimizer"]["warmup_from"]
    storage.write_json(folder / "config.json", written)
    with pytest.raises(ConfigError, match=re.escape(words)):
        run_folder.record_config(folder, config(**ours))
    run_folder.record_config(folder, config(**theirs))


def test_a_checkpoint_of_other_data_names_the_store_of_the_first_version(tmp_path):
    ours, theirs = config(**OLD), config(**OLD)
    for name, fix in (
        (
            "sotu-bytes",
            "was begun under the rules of the first version: to resume it add --config.data.store=sotu-bytes@position, or",
        ),
        ("sotu-bytes@position", "Resume it with the same fields, or"),
    ):
        ours = config(**OLD, data={"store": name})
        with pytest.raises(ConfigError, match=rf"data\.fingerprint: 'new' here, 'old' there\. .*{re.escape(fix)}"):
            run_folder.refuse_other_identity(tmp_path, ours.identity("new"), theirs.identity("old"), ours)
    run_folder.refuse_other_identity(tmp_path, ours.identity("old"), theirs.identity("old"), ours)
