"""Files on local disk and on gs://, and whole runs there; gs:// is an emulator in this process (tests/gcs.py)."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import gcsfs
import google.auth.exceptions
import pytest
from etils import epath
from gcsfs.retry import HttpError

from gqa_jax import gcs, storage, train
from gqa_jax.config import ConfigError
from gqa_jax.training import metrics, run_folder
from tests.test_distributed import Pair, run_commands
from tests.test_train import LONGER, REPOSITORY, interrupt_after, losses, tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    """A folder, local or on gs://."""
    return storage.path(tmp_path if request.param == "local" else request.getfixturevalue("gcs_root"))


def test_paths(monkeypatch, gcs_root):
    assert storage.path("runs/../a") == epath.Path("runs/../a")
    assert storage.path("~/a") == epath.Path(Path.home() / "a")
    assert os.fspath(storage.path(f"{gcs_root}/a") / "b") == f"{gcs_root}/a/b"
    assert storage.is_remote(storage.path(gcs_root))
    assert not storage.is_remote(storage.path("gs"))
    with pytest.raises(ConfigError, match="s3://b/a: s3:// is not supported: use a local folder or gs://"):
        storage.path("s3://b/a")
    with pytest.raises(ConfigError, match="the bucket is missing"):
        storage.path("gs://")
    gcs.system.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(gcs.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"gs:// needs gcsfs: pip install 'gqa-jax\[gcs\]'"):
            storage.path(gcs_root)


def test_folders_beside_others(gcs_root, tmp_path):
    def join(folder, relative):
        return os.fspath(storage.join(folder, relative))

    assert join(f"{gcs_root}/cells/b", "../a") == f"{gcs_root}/cells/a"
    assert join(f"{gcs_root}/cells/b", "gs://other/a") == "gs://other/a"
    assert join(f"{gcs_root}/cells/b", "/runs/a") == "/runs/a"
    assert join(tmp_path / "b", "../a") == f"{tmp_path}/b/../a"  # `b` may be a link
    assert join("runs/b", "gs://other/a") == "gs://other/a"
    with pytest.raises(ConfigError, match="leads out of the bucket"):
        storage.join("gs://bucket/a", "../../b")


def test_small_files(root):
    assert storage.names(root / "none") == []
    assert storage.read_json(root / "a.json") is None
    storage.write_json(root / "a.json", {"loss": float("nan"), "inner": {"x": float("-inf")}, "ü": None})
    assert storage.read_json(root / "a.json") == {"loss": "nan", "inner": {"x": "-inf"}, "ü": None}
    storage.write_json(root / "a.json", {"b": 1})
    assert storage.read_json(root / "a.json") == {"b": 1}
    with pytest.raises(TypeError):
        storage.write_json(root / "a.json", {"b": object()})
    assert storage.names(root) == ["a.json"]
    assert storage.read_json(root / "a.json" / "none.json") is None
    for content in (b"{", b"[]", b"\xff"):
        storage.write_bytes(root / "b.json", content)
        with pytest.raises(ValueError, match=r"b\.json (can't be read|holds no JSON object).*move it away"):
            storage.read_json(root / "b.json")
    storage.remove(root / "b.json")
    storage.remove(root / "b.json")
    assert storage.names(root) == ["a.json"]


def test_large_files_are_copied_in_ranges(gcs_root, tmp_path, monkeypatch):
    monkeypatch.setattr(gcs, "RANGE_BYTES", 1000)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    content = bytes(i % 251 for i in range(4321))
    for name in ("a", "deep/b"):
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder" / "empty").touch()
    storage.upload(tmp_path / "folder", gcs_root)
    for name, expected in (("a", content), ("deep/b", content), ("empty", b"")):
        assert storage.download(f"{gcs_root}/{name}", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == expected
    assert not storage.download(f"{gcs_root}/c", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_folders_are_moved(root):
    if not storage.is_remote(root):
        (root / "a" / "deep").mkdir(parents=True)
    for name in ("a/1", "a/deep/2"):
        storage.write_bytes(root / name, name.encode())
    storage.move(root / "a", root / "aside" / "b")
    assert storage.names(root / "a") == []
    assert storage.names(root) == ["aside"]
    assert storage.read_bytes(root / "aside" / "b" / "deep" / "2") == b"a/deep/2"
    assert storage.read_bytes(root / "aside" / "b" / "1") == b"a/1"


def test_what_another_machine_writes_is_seen_at_once(gcs_root):
    folder = storage.path(gcs_root)
    forgetful = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)  # with its default cache
    storage.write_json(folder / "a.json", {})
    assert storage.names(folder) == ["a.json"]
    assert not (folder / "b.json").exists()
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    assert len(forgetful.ls(gcs_root)) == 1
    code = f"from gqa_jax import storage; storage.write_json('{gcs_root}/b.json', {{}})"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    assert len(forgetful.ls(gcs_root)) == 1, "gcsfs has no cache any more: storage needs not care"
    assert storage.names(folder) == ["a.json", "b.json"]
    assert (folder / "b.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    storage.remove(folder / "b.json")
    assert not (folder / "b.json").exists()


def test_a_folder_that_can_be_written(root):
    storage.check_writable(root / "new" / "run")
    assert storage.names(root / "new" / "run") == []


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "gs://none/run",
            r"gs://none/run can't be written: there is no bucket 'none'.*gcloud storage buckets create gs://none$",
        ),
        ("/proc/run", "/proc/run can't be written: No such file or directory: use another folder"),
        ("file/run", r"file/run can't be written: .*file/run is in the way: use another folder"),
    ],
)
def test_a_folder_that_cannot_be_written(folder, message, tmp_path, monkeypatch, gcs_root):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=message):
        storage.check_writable(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("Forbidden: https://storage.googleapis.com/b\nme@x.org does not have storage.objects.create access"),
            "permission denied .*me@x.org does not have storage.objects.create access.*Storage Object User",
        ),
        (
            HttpError({"code": 401, "message": "Anonymous caller does not have storage.objects.create access"}),
            "no Google credentials were found.* gcloud auth application-default login",
        ),
        (google.auth.exceptions.RefreshError("Reauthentication is needed"), "credentials can't be used .*Reauth.*gcloud auth"),
        (aiohttp.ClientConnectionError("Cannot connect to host"), r"is not reached \(Cannot connect to host\)"),
        (
            ValueError("PERMISSION_DENIED: no\n[http_response_code='403'] [source locations='x.cc:1']"),
            "permission denied .*PERMISSION_DENIED: no.*Storage Legacy Bucket Reader",
        ),
        (ValueError("ABORTED: All 32 retry attempts failed [curl_code='7']"), "is not reached .ABORTED: All 32"),
        (OSError("Project was not passed and could not be determined"), "set GOOGLE_CLOUD_PROJECT"),
        (TimeoutError(), r"is not reached \(TimeoutError\)"),
        (HttpError({"code": 503, "message": "<html>Try\nagain</html>"}), "Google Cloud Storage answers Try again , 503"),
    ],
)
def test_what_google_refuses_is_one_sentence(error, message, gcs_root, monkeypatch):
    def fail(*_, **__):
        raise error

    folder = storage.path(gcs_root)
    monkeypatch.setattr(gcs.system(), "pipe_file", fail)
    with pytest.raises(ConfigError, match=message) as raised:
        storage.check_writable(folder)
    assert "\n" not in str(raised.value)
    with pytest.raises(OSError, match=message) as raised:
        storage.write_bytes(folder / "a", b"")
    kind, sentence = run_folder.classify(raised.value)
    assert kind == "infrastructure"
    assert sentence.endswith("then run the same command again: it goes on from the last checkpoint")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: free space, or use another folder"),
        (errno.EROFS, "the file system is read-only: use another folder"),
        (errno.EACCES, "permission denied: change the permissions"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(number, message, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "write_bytes", fail)
    with pytest.raises(ConfigError, match=message):
        storage.check_writable(tmp_path)


def test_errors_of_others_are_not_explained():
    for error in (ValueError("x"), RuntimeError("gs://"), TimeoutError()):
        assert storage.explain(error) is None


# Whole runs.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A local run that was never interrupted, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train.train_and_evaluate(tiny(), folder)


@pytest.fixture(scope="module")
def finished_remote(gcs_server):
    """The same on gs://."""
    folder = "gs://bucket/finished"
    return folder, train.train_and_evaluate(tiny(logging={"tensorboard": True}), folder, profile=True)


def same(result, other):
    return all(result[key] == other[key] for key in ("params_sha256", "loss", "step", "tokens", "identity", "status"))


def test_a_run_on_a_bucket_is_the_same_run(finished, finished_remote):
    (local, expected), (folder, result) = finished, finished_remote
    assert same(result, expected)
    assert losses(folder) == losses(local)
    assert len(metrics.read_metrics(folder)) == 13
    assert storage.read_json(f"{folder}/result.json") == result
    for name in ("evaluations.json", "documents.npz"):
        assert storage.read_bytes(f"{folder}/{name}") == (local / name).read_bytes()
    assert set(storage.names(folder)) == {*storage.names(local), "tensorboard", "profile"} - {".lock"}
    assert storage.names(f"{folder}/checkpoints") == storage.names(f"{local}/checkpoints")
    assert storage.names(f"{folder}/metrics") == [f"attempt-000-{part:05d}.jsonl" for part in range(4)]
    beat = storage.read_json(f"{folder}/heartbeat.json")
    assert (beat["phase"], beat["step"], beat["device"], beat["n_devices"]) == ("done", 12, "cpu", 1)
    (events,) = storage.names(f"{folder}/tensorboard")
    assert b"train/loss" in storage.read_bytes(f"{folder}/tensorboard/{events}")
    (trace,) = storage.names(f"{folder}/profile/plugins/profile")
    assert any(name.endswith(".xplane.pb") for name in storage.names(f"{folder}/profile/plugins/profile/{trace}"))


def test_a_run_that_is_over_on_a_bucket_is_not_trained_again(finished_remote):
    folder, result = finished_remote
    before = storage.names(f"{folder}/metrics")
    assert train.train_and_evaluate(tiny(), folder) == result
    assert storage.names(f"{folder}/metrics") == before


def test_sigterm_then_resume_on_a_bucket(gcs_root, tmp_path, monkeypatch):
    """A process that is preempted, and one that goes on, against one that was never interrupted."""
    config = tiny(steps=300, checkpoint={"every_steps": 150}, logging={"every_steps": 10})
    fields = {"context_length": 32, "batch_tokens": 256, "steps": 300, "label": config.label}
    fields |= {f"model.{k}": getattr(config.model, k) for k in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim")}
    fields |= {"model.vocab_size": 320, "model.dtype": "float32", "data.store": "sotu-bytes", "data.block_tokens": 64}
    fields |= {"evaluation.tokens": 1024, "checkpoint.every_steps": 150, "logging.every_steps": 10}
    (tmp_path / "config.py").write_text("from gqa_jax.config import default_config as get_config\n")
    command = [sys.executable, "-m", "gqa_jax.train", f"--config={tmp_path / 'config.py'}", f"--workdir={gcs_root}/run"]
    command += [f"--config.{name}={value}" for name, value in fields.items() if value is not None]
    environment = os.environ | {"GQA_JAX_JOB": "engine-7"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 600
        while storage.read_json(f"{gcs_root}/run/heartbeat.json") is None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=600)[1]
    assert process.returncode == 75, error
    assert "Traceback" not in error
    end = storage.read_json(f"{gcs_root}/run/exit.json")
    assert (end["code"], end["class"], end["attempt"], end["job"]) == (75, "preempted", 0, "engine-7")
    (saved,) = (int(name) for name in storage.names(f"{gcs_root}/run/checkpoints"))
    assert 1 <= saved < 300
    spent = storage.read_json(f"{gcs_root}/run/heartbeat.json")["device_seconds"]
    assert spent > 0.1

    result = train.train_and_evaluate(config, f"{gcs_root}/run")
    expected = train.train_and_evaluate(config, tmp_path / "run")
    assert same(result, expected)
    assert losses(f"{gcs_root}/run") == losses(tmp_path / "run")
    assert [row["step"] for row in metrics.read_metrics(f"{gcs_root}/run") if row["kind"] == "train"] == list(range(1, 301))
    assert "exit.json" not in storage.names(f"{gcs_root}/run")
    records = [storage.read_json(f"{gcs_root}/run/attempts/00{i}.json") for i in range(2)]
    assert [(r["attempt"], r["first_step"], r["job"]) for r in records] == [(0, 0, "engine-7"), (1, saved, None)]
    assert result["attempts"] == 2
    assert spent < result["device_seconds"] <= spent + result["seconds_total"] + 0.1


def interrupted(folder, monkeypatch, after, **changes):
    with monkeypatch.context() as patch:
        interrupt_after(patch, after)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(**changes), folder)


def test_rows_are_there_before_a_checkpoint_is(finished, gcs_root, monkeypatch):
    """A run that is killed, when its rows of the steps since the last checkpoint are nowhere."""
    whole, expected = finished
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "close", lambda self: self._files._over.set())
        interrupted(gcs_root, monkeypatch, 7)
    assert losses(gcs_root) == losses(whole)[:4]
    assert same(train.train_and_evaluate(tiny(), gcs_root), expected)
    assert losses(gcs_root) == losses(whole)


@pytest.mark.parametrize("damage", ["truncated", "unfinished"])
def test_a_damaged_checkpoint_on_a_bucket(finished, gcs_root, monkeypatch, caplog, damage):
    whole, expected = finished
    interrupted(gcs_root, monkeypatch, 11)
    newest = f"{gcs_root}/checkpoints/8"
    if damage == "truncated":
        for path in gcs.system().glob(f"{newest}/state/**/d/*"):
            storage.write_bytes(f"gs://{path}", storage.read_bytes(f"gs://{path}")[:-9])
    else:  # killed during the save
        storage.remove(f"{newest}/commit_success.txt")
    assert same(train.train_and_evaluate(tiny(), gcs_root), expected)
    assert losses(gcs_root) == losses(whole)
    assert storage.read_json(f"{gcs_root}/attempts/001.json")["first_step"] == 4
    aside = storage.names(f"{gcs_root}/damaged-checkpoints")
    assert [name.split("-")[0] for name in aside] == (["8"] if damage == "truncated" else [])
    assert ("checkpoint of step 8 is damaged" in caplog.text) == (damage == "truncated")


def test_a_second_phase_on_a_bucket(finished, finished_remote, tmp_path):
    folder, _ = finished_remote
    (tmp_path / "finished").symlink_to(finished[0])
    config = tiny(**LONGER, continue_from="../finished")
    result = train.train_and_evaluate(config, f"{os.path.dirname(folder)}/second")
    assert same(result, train.train_and_evaluate(config, tmp_path / "second"))
    with pytest.raises(ConfigError, match=r"continue_from = '\.\./none': gs://bucket/none has no result\.json"):
        train.train_and_evaluate(tiny(**LONGER, continue_from="../none"), "gs://bucket/third")


def test_a_bucket_that_is_not_there_is_one_sentence(gcs_root, tmp_path):
    command = [sys.executable, "-m", "gqa_jax.train", "--config=configs/train/tiny.py", "--workdir=gs://none/run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gs://none/run can't be written: there is no bucket 'none'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_two_processes_on_a_bucket(gcs_root, tmp_path):
    """Preempted, and ended by one process."""
    commands = [[*command, f"--workdir={gcs_root}/run"] for command in run_commands(tmp_path, "data=2,fsdp=2,context=2")]
    with Pair(tmp_path, commands) as pair:
        pair.wait_for(lambda _: "000.json" in storage.names(f"{gcs_root}/run/attempts"))
        pair.processes[1].terminate()
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [75, 75], errors
    with Pair(tmp_path, commands) as pair:
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [0, 0], errors
    with Pair(tmp_path, run_commands(tmp_path, "data=2,fsdp=2,context=2")) as pair:
        errors = pair.errors()
        assert [process.returncode for process in pair.processes] == [0, 0], errors
    results = [storage.read_json(f"{folder}/run/result.json") for folder in (gcs_root, tmp_path)]
    assert same(*results)
    assert [result["n_processes"] for result in results] == [2, 2]
    assert [result["attempts"] for result in results] == [2, 1]
    assert losses(f"{gcs_root}/run") == losses(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "attempts" / "000.json").read_text())["n_processes"] == 2
