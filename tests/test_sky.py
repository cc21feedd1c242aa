import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from etils import epath

from gqa_jax import hardware
from gqa_jax.config import ConfigError, TrainConfig
from gqa_jax.training.start import Start
from launch import grid
from launch.cells import REPOSITORY, Layout
from launch.executors import base, bundle, job_names, sky
from launch.executors.base import DEAD, QUEUED, RUNNING, Job, SubmitError
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes, needs, sky_fake

FAKE = Path(sky_fake.__file__)
SHA256 = "0123456789abcdef" * 4


class Engine(executor_contract.Engine):
    lock = "run.only_launcher(layout, 60.0)"

    def __init__(self, the_executor, cells, folder, values):
        super().__init__(the_executor, cells)
        self.folder, self.values = folder, values
        self.ranks = the_executor.options.num_nodes

    def preempt(self, cell):
        self.tell(cell, "preempt")

    def lose(self, cell):
        self.tell(cell, "lose")

    def tell(self, cell, what):
        (self.folder / "jobs" / f"{self.executor.jobs()[cell].id}.{what}").touch()

    def processes(self, cell):
        wanted = ["-m", "tests.fake_trainer", os.fspath(self.layout.cell(cell))]
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cmdline").read_text().split("\0")[1:4] == wanted:
                    found.append(int(entry.name))
            except OSError:
                pass
        return found

    def another_launcher(self):
        return f"base.make({self.values!r}, layout)"

    def records(self):
        return sky_fake.records(self.folder)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Folder of a fake SkyPilot, whose program is `sky` in it."""
    folder = tmp_path / "skypilot"
    folder.mkdir()
    program = folder / "sky"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {folder} "$@"\n')
    program.chmod(0o755)
    a_cell()  # its token store is made once, for all tests
    stores = Path(os.environ.get("GQA_JAX_CACHE") or Path.home() / ".cache" / "gqa_jax") / "stores"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "stores").symlink_to(stores)
    monkeypatch.setenv("GQA_JAX_CACHE", os.fspath(tmp_path / "cache"))  # where the lock of submitters is
    yield folder
    sky_fake.stop(folder)


def make_engine(fake, root, monkeypatch, **options):
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)
    layout = Layout(epath.Path(root))
    cells = executor_contract.prepared(layout)
    values = {"engine": "sky", "sky": os.fspath(fake / "sky"), "shared_root": True, "python": sys.executable} | options
    values["environment"] = {"PYTHONPATH": os.fspath(REPOSITORY)}  # tests are in no bundle
    return Engine(base.make(values, layout), cells, fake, values)


@pytest.fixture
def engine(fake, tmp_path, monkeypatch):
    return make_engine(fake, tmp_path / "root", monkeypatch)


@pytest.fixture
def two_nodes(fake, tmp_path, monkeypatch):
    return make_engine(fake, tmp_path / "root", monkeypatch, num_nodes=2)


def offline(root="gs://bucket/study", **options):
    """An executor that is asked what it would submit."""
    return base.make({"engine": "sky", "bundle": f"gs://bucket/{SHA256}.tar.gz"} | options, Layout(epath.Path(root)))


def a_cell():
    return grid.cells(grid_fakes.small_grid())[0]


class TestContract(executor_contract.Contract):
    """One machine for a cell."""


class TestSeveralMachines:
    contract = executor_contract.Contract()

    def test_a_cell_runs_to_its_end(self, two_nodes):
        self.contract.test_a_cell_runs_to_its_end(two_nodes)

    def test_a_preempted_cell_goes_on(self, two_nodes):
        self.contract.test_a_preempted_cell_goes_on(two_nodes)

    def test_a_failing_rank_ends_the_job(self, two_nodes):
        self.contract.test_a_failing_cell_ends_and_is_not_started_again(two_nodes)


class TestRun:
    """What becomes of a task's processes."""

    contract = executor_contract.Contract()

    def test_exit_code_75_is_recovered_by_the_engine(self, engine):
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang", "finish")
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.contract.until_running(engine, cell)
        (pid,) = engine.processes(cell.name)
        os.kill(pid, 15)  # the machine stays
        self.contract.until_gone(engine, cell)
        (record,) = engine.records()
        assert (record["status"], record["recovery_count"]) == ("SUCCEEDED", 1)

    def test_what_is_printed_at_the_end_is_kept(self, engine, monkeypatch):
        """Bash and the log are told to end together with training, and must not."""
        cell = engine.cells[0]
        source = f"""
import pathlib, signal, sys, time
again = pathlib.Path({os.fspath(engine.folder / "again")!r})
if again.exists():
    sys.exit(0)
def save(*_):
    time.sleep(0.5)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
again.touch()
while True:
    time.sleep(0.05)
"""
        monkeypatch.setattr(TrainingCell, "command", lambda *_, **__: [sys.executable, "-c", source])
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.contract.wait(engine, (engine.folder / "again").exists, "it does not run")
        engine.preempt(cell.name)
        self.contract.until_gone(engine, cell)
        assert engine.records()[0]["status"] == "SUCCEEDED"
        assert "saved\n" in [log.read_text() for log in engine.executor.logs(cell.name)]

    def test_the_processes_know_job_and_commit(self, engine, monkeypatch):
        cell = engine.cells[0]
        source = "import os; print(*(os.environ[n] for n in ('GQA_JAX_JOB', 'GQA_JAX_COMMIT', 'PYTHONPATH')), os.getcwd())"
        monkeypatch.setattr(TrainingCell, "command", lambda *_, **__: [sys.executable, "-c", source])
        engine.executor.prepare()
        job = engine.executor.submit(cell)
        self.contract.until_gone(engine, cell)
        (log,) = engine.executor.logs(cell.name)
        said, commit, path, folder = log.read_text().split()
        assert said == job.id
        assert commit == (Path(folder) / "COMMIT").read_text().strip() != ""
        assert path == f"{folder}:{REPOSITORY}"
        assert (Path(folder) / "configs" / "cell.py").exists()

    def test_a_grid_on_gs(self, fake, gcs_root, monkeypatch):
        monkeypatch.setattr(executor_contract, "behave", behave_on_gs)
        engine = make_engine(fake, gcs_root, monkeypatch, shared_root=False)
        cell = engine.cells[0]
        engine.executor.check()
        engine.executor.prepare()
        engine.executor.submit(cell)
        self.contract.until_gone(engine, cell)
        assert self.contract.state_of(engine, cell).state == "done"
        (log,) = engine.executor.logs(cell.name)
        assert f"rank 0 of {cell.name}" in log.read_text()

    def test_a_log_that_cannot_be_copied_stops_nothing(self, tmp_path):
        copy = [sys.executable, "-c", sky.COPY, os.fspath(tmp_path / "absent" / "log.txt")]
        done = subprocess.run(copy, input="a\nb\n", capture_output=True, text=True, cwd=REPOSITORY, check=True)
        assert done.stdout.startswith("a\nb\nthe log is not copied: ")


def behave_on_gs(layout, cell, *behaviour):
    folder = layout.cell(cell.name)
    (folder / "config.json").write_text(json.dumps(cell.config.to_dict()))
    (folder / "behaviour.json").write_text(json.dumps(behaviour))


class TestClaim:
    def test_who_comes_second_gives_way(self, engine):
        """Two launchers on two machines, neither of which saw a job before."""
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang")
        engine.executor.prepare()
        (engine.folder / "rival").touch()
        assert engine.executor.submit(cell).id == "1"
        statuses = {record["job_id"]: record["status"] for record in engine.records()}
        assert statuses[2] in ("CANCELLING", "CANCELLED")
        assert statuses[1] not in sky_fake.ENDED

    def test_reconcile_cancels_second_jobs(self, engine):
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang")
        engine.executor.prepare()
        engine.executor.submit(cell)
        file = engine.folder / "task.yaml"
        file.write_text(engine.executor.submission(cell).files["sky.yaml"])
        name = job_names.of(engine.layout, cell.name)
        subprocess.run([engine.folder / "sky", "jobs", "launch", "-n", name, "-y", "-d", file], check=True, capture_output=True)
        assert engine.executor.jobs()[cell.name].id == "1"
        assert engine.executor.reconcile(engine.executor.jobs()) == [f"{cell.name} had 2 jobs: cancelled all but 1"]
        assert [path.name for path in (engine.folder / "jobs").glob("*.cancel")] == ["2.cancel"]
        assert engine.executor.reconcile(engine.executor.jobs()) == []

    def test_a_job_that_is_over_at_once_is_the_answer(self, engine):
        cell = engine.cells[0]
        engine.executor.prepare()
        (engine.folder / "at-once").write_text("FAILED_PRECHECKS")
        job = engine.executor.submit(cell)
        assert (job.id, job.detail) == ("1", "ended: SkyPilot's job 1 is FAILED_PRECHECKS: see `sky jobs logs 1`")
        assert engine.executor.jobs()[cell.name].state == DEAD

    def test_a_job_that_is_not_listed(self, engine):
        engine.executor.prepare()
        (engine.folder / "queue.txt").write_text("[]")
        with pytest.raises(SubmitError, match="does not list it: see"):
            engine.executor.submit(engine.cells[0])

    def test_a_cell_that_is_being_cancelled_is_not_submitted(self, engine):
        cell = engine.cells[0]
        lists(engine.folder, engine.executor, cell, job_id=7, status="CANCELLING")
        with pytest.raises(SubmitError, match=f"job 7 of {cell.name} is still cancelling"):
            engine.executor.submit(cell)
        assert engine.executor.jobs()[cell.name].state == RUNNING

    def test_jobs_of_other_grids_are_left_alone(self, engine):
        cell = engine.cells[0]
        other = base.make(engine.values, Layout(engine.layout.root.parent / "other"))
        lists(engine.folder, other, cell, job_id=7, status="RUNNING")
        assert other.jobs()[cell.name].id == "7"
        assert engine.executor.jobs() == {}
        engine.executor.cancel([cell.name])
        assert " cancel " not in (engine.folder / "calls.txt").read_text()


def lists(folder, the_executor, cell, **record):
    """Makes SkyPilot list this job of a cell, and no other."""
    name = job_names.of(the_executor.layout, cell.name)
    (folder / "queue.txt").write_text(json.dumps([{"job_name": name} | record, {"job_name": None, "job_id": 1}], indent=2))


class TestJobs:
    @pytest.mark.parametrize(
        ("status", "state"),
        [("PENDING", QUEUED), ("STARTING", QUEUED), ("RECOVERING", QUEUED), ("RUNNING", RUNNING), ("WINDING_DOWN", RUNNING)],
    )
    def test_states(self, engine, status, state):
        cell = engine.cells[0]
        lists(
            engine.folder,
            engine.executor,
            cell,
            job_id=7,
            status=status,
            start_at=5.0,
            infra="GCP (us-central1)",
            recovery_count=2,
        )
        detail = f"{status.lower()}, recovered 2 times"
        since = 5.0 if state == RUNNING else None
        assert engine.executor.jobs() == {cell.name: Job(cell.name, "7", state, detail, since, "GCP (us-central1)")}

    @pytest.mark.parametrize("status", ["SUCCEEDED", "CANCELLED"])
    def test_what_has_ended_is_no_job(self, engine, status):
        lists(engine.folder, engine.executor, engine.cells[0], job_id=7, status=status, end_at=5.0)
        assert engine.executor.jobs() == {}

    @pytest.mark.parametrize("status", sky.FAILED)
    def test_a_failure_without_a_trace_is_recorded_once(self, engine, status):
        cell = engine.cells[0]
        facts = {"job_id": 7, "status": status, "end_at": time.time(), "failure_reason": "No TPU\nin us-central1"}
        lists(engine.folder, engine.executor, cell, **facts)
        jobs = engine.executor.jobs()
        reason = f"SkyPilot's job 7 is {status}: No TPU in us-central1"
        assert jobs == {cell.name: Job(cell.name, "7", DEAD, reason)}
        assert engine.executor.reconcile(jobs) == [f"{cell.name}: {reason}"]
        assert engine.executor.jobs() == {}
        now = executor_contract.Contract().state_of(engine, cell)
        assert (now.state, now.failure, now.cause, now.runnable) == ("failed", "infrastructure", reason, True)

    def test_a_setup_that_fails(self, fake, tmp_path, monkeypatch):
        engine = make_engine(fake, tmp_path / "root", monkeypatch, setup=["echo no pip; exit 3"])
        engine.executor.prepare()
        engine.executor.submit(engine.cells[0])
        executor_contract.Contract().until_gone(engine, engine.cells[0])
        job = engine.executor.jobs()[engine.cells[0].name]
        assert (job.state, job.detail) == (DEAD, "SkyPilot's job 1 is FAILED_SETUP: Job exited with exit code 3")

    def test_a_failure_that_the_cell_has_recorded_is_its_own(self, engine):
        cell = engine.cells[0]
        folder = engine.layout.cell(cell.name)
        lists(engine.folder, engine.executor, cell, job_id=7, status="FAILED", end_at=20.0)
        for record, known in [
            ({"job": "7", "class": "out_of_memory", "time": 19.0}, True),
            ({"job": "6", "class": "out_of_memory", "time": 19.0}, False),  # of a job before
            ({"job": "7", "class": "preempted", "time": 19.0}, False),  # and then no machine was found
            ({"job": "8", "class": "error", "time": 21.0}, True),  # of a later one, elsewhere
        ]:
            (folder / "exit.json").write_text(json.dumps(record))
            assert (engine.executor.jobs() == {}) == known, record
        (folder / "result.json").write_text("{}")
        assert engine.executor.jobs() == {}

    def test_no_controller_is_no_job(self, engine):
        (engine.folder / "queue.error").write_text("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.")
        assert engine.executor.jobs() == {}

    def test_more_jobs_than_sky_shows(self, engine):
        (engine.folder / "jobs").mkdir()
        for number in range(60):
            name = job_names.of(engine.layout, f"s{number}")
            sky_fake.write(engine.folder, number, {"job_id": number, "job_name": name, "status": "PENDING"})
        assert len(engine.executor.jobs()) == 60

    def test_a_call_that_fails(self, engine):
        (engine.folder / "queue.error").write_text("\x1b[31mpermission denied for project x\x1b[0m")
        for act in (engine.executor.jobs, lambda: engine.executor.submit(engine.cells[0])):
            with pytest.raises(SubmitError, match=r"sky jobs queue` failed \(1\): permission denied for project x$"):
                act()

    def test_a_launch_that_is_refused(self, engine):
        (engine.folder / "launch.error").write_text("quota exceeded")
        engine.executor.prepare()
        with pytest.raises(SubmitError, match=r"sky jobs launch` failed \(1\): quota exceeded"):
            engine.executor.submit(engine.cells[0])

    @pytest.mark.parametrize("said", ["", "ID  NAME", '[\n"a"\n]', '[\n{"job_name": "a"', '{"a": 1}'])
    def test_an_answer_that_is_no_list(self, engine, said):
        (engine.folder / "queue.txt").write_text(said)
        with pytest.raises(SubmitError, match="gives no list of jobs"):
            engine.executor.jobs()

    def test_an_unknown_state(self, engine):
        lists(engine.folder, engine.executor, engine.cells[0], job_id=7, status="DREAMING")
        with pytest.raises(SubmitError, match="states that are not known here: DREAMING"):
            engine.executor.jobs()

    def test_a_call_that_hangs(self, engine, monkeypatch):
        monkeypatch.setattr(sky, "CALL_SECONDS", 0.1)
        (engine.folder / "sky").write_text("#!/bin/sh\nexec sleep 60\n")
        with pytest.raises(SubmitError, match="has not ended after 0 s"):
            engine.executor.jobs()


class TestCheck:
    def test_all_is_well(self, engine):
        engine.executor.check()
        assert not (engine.folder / "calls.txt").exists()
        assert not (engine.layout.root / "code").exists()

    def test_no_program(self, fake, tmp_path, monkeypatch):
        engine = make_engine(fake, tmp_path / "root", monkeypatch, sky="/nowhere/sky")
        with pytest.raises(
            ConfigError, match="sky = '/nowhere/sky' is not there: install SkyPilot in an environment of its own"
        ):
            engine.executor.check()
        with pytest.raises(SubmitError, match="can't be started: No such file"):
            engine.executor.jobs()

    @pytest.mark.parametrize(
        ("version", "allowed"),
        [
            ("skypilot, version 0.12.3", False),
            ("skypilot, version 0.13.0", True),
            ("skypilot, version 1.0.0.dev20261101", True),
            ("what?", False),
        ],
    )
    def test_version(self, engine, version, allowed):
        (engine.folder / "version").write_text(version)
        if allowed:
            engine.executor.check()
            return
        with pytest.raises(ConfigError, match=r"must be 0\.13 or newer"):
            engine.executor.check()

    @pytest.mark.parametrize(
        ("root", "options"), [("/data/study", {}), ("runs/study", {"shared_root": True}), ("runs/study", {})]
    )
    def test_a_root_that_machines_do_not_see(self, root, options):
        one = offline(root, **options)
        for act in (one.check, lambda: one.submission(a_cell())):
            with pytest.raises(ConfigError, match="use gs://BUCKET/FOLDER, or"):
                act()

    def test_a_bundle_that_was_made_before(self, fake, tmp_path, monkeypatch):
        made = bundle.make(tmp_path / "made")
        engine = make_engine(fake, tmp_path / "root", monkeypatch, bundle=os.fspath(made.path))
        engine.executor.check()
        engine.executor.prepare()
        assert (engine.layout.root / "code" / made.path.name).read_bytes() == made.path.read_bytes()
        assert made.sha256[:16] in engine.executor.submission(engine.cells[0]).files["sky.yaml"]
        made.path.write_bytes(b"x")
        with pytest.raises(ConfigError, match="is damaged"):
            engine.executor.check()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_nodes": 0}, "num_nodes = 0: must be at least 1"),
            ({"disk_gb": 1}, "disk_gb = 1: must be at least 10"),
            ({"max_restarts_on_errors": -1}, "max_restarts_on_errors = -1: must be at least 0"),
            ({"accelerators": "8x H100"}, "accelerators = '8x H100': must be NAME or NAME:COUNT"),
            ({"setup": [1]}, "setup = 1: must be lines of bash"),
            ({"infra": ""}, "infra = '': must be a text of one line"),
            ({"environment": {"GQA_JAX_JOB": "1"}}, "environment.GQA_JAX_JOB = '1': must be a name"),
            ({"environment": {"1A": "1"}}, "environment.1A = '1': must be a name"),
            ({"topology": "v5e:4x4", "num_nodes": 2}, "num_nodes = 2 with v5e:4x4: a cell has one TPU slice"),
            ({"topology": "v5e:3x3"}, "unknown topology 'v5e:3x3'"),
            ({"use_spott": True}, "did you mean 'use_spot'"),
            ({"use_spot": "yes"}, "use_spot = 'yes': must be bool"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            offline(**options)

    def test_the_example_can_be_used(self):
        one = base.load("sky", Layout(epath.Path("gs://bucket/study")))
        assert isinstance(one, sky.Executor)
        text = (base.CLUSTERS / "sky.toml").read_text()
        for name in (field.name for field in dataclasses.fields(sky.Options)):
            assert f"{name} = " in text or f"[{name}]" in text, f"{name} is not in the example"


TPU = """\
name: g1fa5d48-CELL
resources:
  accelerators: tpu-v5litepod-16
  accelerator_args:
    runtime_version: v2-alpha-tpuv5-lite
  infra: gcp/us-central1
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes:
    - 75
num_nodes: 1
envs:
  GQA_JAX_DEVICES: tpu,chip=v5e,devices=16
file_mounts:
  ~/gqa_jax/0123456789abcdef.tar.gz: gs://bucket/study/code/SHA256.tar.gz
setup: |
  set -eo pipefail
  mkdir -p ~/gqa_jax/0123456789abcdef
  tar -xzf ~/gqa_jax/0123456789abcdef.tar.gz -C ~/gqa_jax/0123456789abcdef
  cd ~/gqa_jax/0123456789abcdef
  export PATH="$HOME/.local/bin:$PATH:$HOME/gqa_jax/uv/bin"
  command -v uv > /dev/null || INSTALL --target="$HOME/gqa_jax/uv" <<< 'UV'
  [ -x .venv/bin/python ] || uv venv --python 3.12 .venv
  uv pip install --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs]'
run: |
  set -o pipefail
  cd ~/gqa_jax/0123456789abcdef
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  export GQA_JAX_JOB="$SKYPILOT_MANAGED_JOB_ID"
  export GQA_JAX_COMMIT="$(cat COMMIT)"
  log=gs://bucket/study/cells/CELL/logs/"$(date -u +%Y%m%dT%H%M%SZ)-job$GQA_JAX_JOB-rank$SKYPILOT_NODE_RANK.txt"
  trap : TERM
  TRAIN --distributed=on 2>&1 | (trap '' TERM; exec .venv/bin/python -c COPY "$log")
"""

GPU = """\
name: PREFIXCELL
resources:
  accelerators: H100:8
  use_spot: false
  disk_size: 500
  image_id: docker:me/image
  job_recovery:
    max_restarts_on_errors: 2
    recover_on_exit_codes:
    - 75
num_nodes: 2
envs:
  GQA_JAX_DEVICES: gpu,chip=h100,devices=16,per_process=8
  WANDB_MODE: offline
setup: |
  set -eo pipefail
  sudo mount /data
  mkdir -p ~/gqa_jax/0123456789abcdef
  tar -xzf '/data/my study/code/SHA256.tar.gz' -C ~/gqa_jax/0123456789abcdef
run: |
  set -o pipefail
  cd ~/gqa_jax/0123456789abcdef
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  export GQA_JAX_JOB="$SKYPILOT_MANAGED_JOB_ID"
  export GQA_JAX_COMMIT="$(cat COMMIT)"
  log='/data/my study/cells/CELL/logs'/"$(date -u +%Y%m%dT%H%M%SZ)-job$GQA_JAX_JOB-rank$SKYPILOT_NODE_RANK.txt"
  mkdir -p '/data/my study/cells/CELL/logs'
  trap : TERM
  TRAIN ADDRESS 2>&1 | (trap '' TERM; exec tee -a "$log")
"""
ADDRESS = (
    '--coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n1):8476" --processes="$SKYPILOT_NUM_NODES" '
    '--process="$SKYPILOT_NODE_RANK"'
)


def tpu():
    return offline(topology="v5e:4x4", infra="gcp/us-central1")


def gpu():
    return offline(
        "/data/my study",
        shared_root=True,
        topology="h100:8",
        num_nodes=2,
        use_spot=False,
        disk_gb=500,
        image="docker:me/image",
        max_restarts_on_errors=2,
        python="/opt/venv/bin/python",
        setup=["sudo mount /data"],
        environment={"WANDB_MODE": "offline"},
    )


class TestSubmission:
    def expected(self, text, one, python):
        cell = a_cell()
        train = shlex.join(cell.command(one.layout.cell(cell.name), python, "."))
        copy = textwrap.indent("'" + sky.COPY.replace("'", "'\"'\"'") + "'", "  ").lstrip()
        names = {"SHA256": SHA256, "TRAIN": train, "COPY": copy, "ADDRESS": ADDRESS}
        names |= {"INSTALL": shlex.join(bundle.INSTALL_UV), "UV": bundle.UV}
        for name, value in (names | {"PREFIX": job_names.prefix(one.layout), "CELL": cell.name}).items():
            text = text.replace(name, value)
        return text

    def test_a_tpu_cell(self):
        one, cell = tpu(), a_cell()
        given = one.submission(cell)
        assert given.files["sky.yaml"] == self.expected(TPU, one, ".venv/bin/python")
        name = job_names.of(one.layout, cell.name)
        assert given.command == f"sky jobs launch -n {name} -y -d gs://bucket/study/cells/{cell.name}/sky.yaml"
        assert "--config=configs/cell.py:gs://bucket/study/cells/" in given.files["sky.yaml"]

    def test_a_gpu_cell_of_two_machines(self):
        one = gpu()
        assert one.submission(a_cell()).files["sky.yaml"] == self.expected(GPU, one, "/opt/venv/bin/python")
        assert one.options.slice is None

    @pytest.mark.parametrize(
        ("options", "accelerators", "extras"),
        [
            ({"topology": "v5e:1x1"}, "tpu-v5litepod-1", "tpu,gcs"),
            ({"topology": "v5p:2x2x2"}, "tpu-v5p-16", "tpu,gcs"),
            ({"topology": "v4:2x2x2"}, "tpu-v4-16", "tpu,gcs"),
            ({"topology": "v6e:2x4"}, "tpu-v6e-8", "tpu,gcs"),
            ({"topology": "a100:4"}, "A100-80GB:4", "cuda,gcs"),
            ({"topology": "l4:1"}, "L4:1", "cuda,gcs"),
            ({"accelerators": "A10G:4"}, "A10G:4", "cuda,gcs"),
            ({"accelerators": "tpu-v6e-16"}, "tpu-v6e-16", "tpu,gcs"),
            ({"topology": "a100:8", "accelerators": "A100:8"}, "A100:8", "cuda,gcs"),
            ({}, None, "gcs"),
        ],
    )
    def test_accelerators(self, options, accelerators, extras):
        task = yaml.safe_load(offline(**options).submission(a_cell()).files["sky.yaml"])
        assert task["resources"].get("accelerators") == accelerators
        assert f"-e '.[{extras}]'" in task["setup"]

    def test_every_topology_has_a_name(self):
        for where in hardware.SLICES.values():
            found = offline(topology=where.name)._accelerators()
            assert re.fullmatch(r"tpu-\w+-\d+" if where.is_tpu else rf"[\w-]+:{where.n_chips}", found["accelerators"])
            assert ("accelerator_args" in found) == where.is_tpu

    def test_a_token_store_or_parameters_that_machines_do_not_see(self):
        values = grid_fakes.config()
        values.data.store = "stores/web"
        cell = TrainingCell(TrainConfig.from_dict(values.to_dict()), "x")
        with pytest.raises(ConfigError, match=f"data.store = 'stores/web' of {cell.name} is on this machine"):
            offline().submission(cell)
        offline("/data/study", shared_root=True).submission(cell)
        values.update(data={"store": "sotu-bytes"}, continue_from="/imports/llama")
        started = TrainingCell(TrainConfig.from_dict(values.to_dict()), "x", start=Start("import", identity="0" * 64))
        with pytest.raises(ConfigError, match=r"continue_from = '/imports/llama' of .*: copy it to gs://$"):
            offline().submission(started)

    def test_hosts_of_a_slice_find_each_other(self):
        runs = {
            name: yaml.safe_load(offline(topology=name).submission(a_cell()).files["sky.yaml"])["run"]
            for name in ("v5e:2x2", "v5e:4x4", "h100:8")
        }
        assert {name: "--distributed=on" in run for name, run in runs.items()} == {
            "v5e:2x2": False,
            "v5e:4x4": True,
            "h100:8": False,
        }


@pytest.mark.thorough
@pytest.mark.needs("skypilot")
class TestRealSkyPilot:
    """What the fake has from SkyPilot, held against it (another Python: $GQA_JAX_SKY_PYTHON). Needs no cloud."""

    def ask(self, source, folder, *arguments):
        done = subprocess.run(
            [needs.SKY_PYTHON, "-c", source, *map(os.fspath, arguments)],
            env=os.environ | {"HOME": os.fspath(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def test_it_reads_the_task(self, tmp_path):
        files = []
        for name, one in {"tpu": tpu(), "gpu": gpu(), "cpu": offline()}.items():
            files.append(tmp_path / f"{name}.yaml")
            files[-1].write_text(one.submission(a_cell()).files["sky.yaml"])
        source = """
import json, sys, sky, yaml
tasks = [sky.Task.from_yaml_config(yaml.safe_load(open(path))) for path in sys.argv[1:]]
for task in tasks:
    task.validate_name(), task.validate_run()
print(json.dumps([[task.num_nodes, *(r.to_yaml_config() for r in task.resources)] for task in tasks]))
"""
        (_, on_tpu), (nodes, on_gpu), (_, on_cpu) = self.ask(source, tmp_path, *files)
        recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75], "strategy": None}
        assert (on_tpu["accelerators"], on_tpu["infra"]) == ({"tpu-v5litepod-16": 1}, "gcp/us-central1")
        assert on_tpu["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
        assert on_tpu["job_recovery"] == on_cpu["job_recovery"] == recovery
        assert (nodes, on_gpu["accelerators"], on_gpu["disk_size"]) == (2, {"H100": 8}, 500)
        assert on_gpu["job_recovery"] == recovery | {"max_restarts_on_errors": 2}
        assert "accelerators" not in on_cpu

    def test_its_jobs_are_understood(self, engine, tmp_path):
        source = """
import json, sys
from sky.jobs.state import ManagedJobStatus
from sky.schemas.api.responses import ManagedJobRecord
from sky.skylet.constants import MANAGED_JOB_ID_ENV_VAR
facts = dict(job_name=sys.argv[1], start_at=5.0, infra="GCP (us-central1)", recovery_count=0)
records = [ManagedJobRecord(job_id=i, status=s, **facts).model_dump(mode="json") for i, s in enumerate(ManagedJobStatus)]
print(json.dumps([records, MANAGED_JOB_ID_ENV_VAR]))
"""
        cell = engine.cells[0]
        records, variable = self.ask(source, tmp_path, job_names.of(engine.layout, cell.name))
        assert {record["status"] for record in records} <= {*sky.ACTIVE, *sky.FAILED, *sky.ENDED}
        (running,) = [record for record in records if record["status"] == "RUNNING"]
        (engine.folder / "queue.txt").write_text(json.dumps([running], indent=2))
        job = Job(cell.name, str(running["job_id"]), RUNNING, "running", 5.0, "GCP (us-central1)")
        assert engine.executor.jobs() == {cell.name: job}
        assert variable in engine.executor.submission(cell).files["sky.yaml"]

    def test_its_program_takes_these_arguments(self, tmp_path):
        source = """
import json
from sky.client.cli.command import cli
jobs = cli.commands["jobs"].commands
print(json.dumps({name: [flag for option in command.params for flag in option.opts] for name, command in jobs.items()}))
"""
        known = self.ask(source, tmp_path)
        for name, flags in {
            "launch": {"-n", "-y", "-d", "entrypoint"},
            "queue": {"--all", "--all-users", "--verbose", "--output"},
            "cancel": {"-y", "job_ids"},
        }.items():
            assert flags <= set(known[name]), name
