import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from gqa_jax.config import ConfigError
from gqa_jax.training import run_folder
from launch import grid
from launch.cells import REPOSITORY, Layout
from launch.executors import base, job_names, slurm, slurm_words
from launch.executors.base import DEAD, QUEUED, RUNNING, SubmitError
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes, slurm_cluster

USER = os.getuid()


class Engine(executor_contract.Engine):
    def __init__(self, the_executor, cells, cluster, values):
        super().__init__(the_executor, cells)
        self.cluster, self.values = cluster, values
        self.ranks = the_executor.options.nodes

    def step(self):
        self.cluster.start_requeued()

    def preempt(self, cell):
        self.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 0.5")

    def lose(self, cell):
        self.until_all_listen(cell)  # one that starts later would be missed here, and end RANK_SECONDS after the others
        for pid in self.processes(cell):
            os.kill(pid, signal.SIGKILL)

    def another_launcher(self):
        return f"base.make({self.values!r}, layout)"

    def record(self, cell):
        """The newest job of a cell as Slurm knows it, also when it has ended."""
        name = job_names.of(self.layout, cell)
        return max((r for r in self.cluster.records().values() if r["name"] == name), key=lambda r: r["job_id"])

    def log(self, cell):
        return (self.layout.cell(cell) / "log.txt").read_text()

    def until_all_listen(self, cell):
        """Until every process has come so far that it heeds SIGTERM."""
        deadline = time.monotonic() + executor_contract.SECONDS
        while not all(f"rank {rank} of {cell}" in self.log(cell) for rank in range(self.ranks)):
            assert time.monotonic() < deadline, self.log(cell)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def running_cluster():
    with slurm_cluster.running() as one:
        yield one


@pytest.fixture
def cluster(running_cluster, monkeypatch):
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield running_cluster
    running_cluster.clear()


def make_engine(cluster, root, monkeypatch, **options):
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)
    layout = Layout(epath.Path(root))
    cells = executor_contract.prepared(layout)
    values = {"engine": "slurm"} | options
    return Engine(base.make(values, layout), cells, cluster, values)


@pytest.fixture
def engine(cluster, tmp_path, monkeypatch):
    return make_engine(cluster, tmp_path / "root", monkeypatch, nodes=2)


def offline(root="/shared/study", **options):
    """An executor that is asked what it would submit."""
    return base.make({"engine": "slurm"} | options, Layout(epath.Path(root)))


def a_cell():
    return grid.cells(grid_fakes.small_grid())[0]


@pytest.mark.needs("slurm")
class TestContract(executor_contract.Contract):
    """Two nodes for a cell."""


@pytest.mark.needs("slurm")
class TestEnds:
    """What becomes of a job, on a real Slurm."""

    contract = executor_contract.Contract()

    def run(self, engine, *behaviour):
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, *behaviour)
        engine.executor.submit(cell)
        job = self.contract.until_running(engine, cell)
        engine.until_all_listen(cell.name)
        return cell, job

    def until(self, engine, cell, condition, what):
        return self.contract.wait(
            engine, lambda: (job := engine.executor.jobs().get(cell.name)) and condition(job) and job, what
        )

    def test_exit_code_75_is_requeued(self, engine, monkeypatch):
        """The time limit sends SIGTERM to the processes, as here; the job is the same one before and after."""
        cell, job = self.run(engine, "hang", "finish")
        assert (job.where, job.detail) == (",".join(slurm_cluster.NODES), "")
        assert abs(job.since - time.time()) < 60
        monkeypatch.setattr(engine, "step", lambda: None)
        engine.cluster.run("scancel", "--signal=TERM", job.id)
        waiting = self.until(engine, cell, lambda job: job.state == QUEUED and job.detail, "not requeued")
        assert (waiting.id, waiting.detail, waiting.since) == (
            job.id,
            "waits for its begin time, two minutes after a requeue",
            None,
        )
        assert self.contract.state_of(engine, cell).state == "queued"
        monkeypatch.undo()
        monkeypatch.setenv("SLURM_CONF", engine.cluster.environment["SLURM_CONF"])
        self.contract.wait(
            engine, lambda: self.contract.state_of(engine, cell).state == "done", "a requeued job is not started again"
        )
        attempts = sorted((engine.layout.cell(cell.name) / "attempts").glob("*.json"))
        assert [json.loads(path.read_text())["job"] for path in attempts] == [job.id] * 2

    def test_a_cancelled_job_saves_and_is_not_requeued(self, engine):
        cell, _ = self.run(engine, "hang", "finish")
        engine.executor.cancel([cell.name])
        self.contract.until_gone(engine, cell)
        assert self.contract.state_of(engine, cell).state == "preempted"  # it had the time to save
        assert engine.record(cell.name)["job_state"] == "CANCELLED"
        assert "restarts: 1" not in engine.log(cell.name)

    def test_a_requeued_job_that_waits_can_be_cancelled(self, engine, monkeypatch):
        cell, job = self.run(engine, "hang", "finish")
        monkeypatch.setattr(engine, "step", lambda: None)
        engine.cluster.run("scancel", "--signal=TERM", job.id)
        self.until(engine, cell, lambda job: job.state == QUEUED, "not requeued")
        engine.executor.cancel([cell.name])
        assert engine.executor.jobs() == {}

    def test_a_killed_rank_fails_the_job_and_ends_the_other(self, engine, monkeypatch):
        monkeypatch.setattr(slurm, "RANK_SECONDS", 1)
        cell, _ = self.run(engine, "hang")
        os.kill(engine.processes(cell.name)[0], signal.SIGKILL)
        self.contract.until_gone(engine, cell)
        record = engine.record(cell.name)
        assert (record["job_state"], record["restart_cnt"]) == ("FAILED", 0)
        assert not (engine.layout.cell(cell.name) / "host-failure.json").exists()  # training had begun

    def test_a_process_may_save_longer_than_another(self, engine):
        """With `--kill-on-bad-exit` Slurm would kill it KillWait (here 3) seconds after the first has ended."""
        cell, _ = self.run(engine, "hang", "finish")
        ranks = engine.processes(cell.name)
        first = next(pid for pid in ranks if b"SLURM_PROCID=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(first, signal.SIGTERM)
        time.sleep(4.5)
        assert [pid for pid in engine.processes(cell.name) if pid in ranks] == [pid for pid in ranks if pid != first]
        os.kill(next(pid for pid in ranks if pid != first), signal.SIGTERM)
        self.contract.wait(engine, lambda: self.contract.state_of(engine, cell).state == "done", "not requeued")

    def test_a_node_that_is_gone_is_replaced_by_slurm(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(cluster, tmp_path / "root", monkeypatch)
        cell, job = self.run(engine, "hang", "finish")
        try:
            cluster.stop_node(job.where)
            self.contract.wait(engine, lambda: self.contract.state_of(engine, cell).state == "done", "not started again")
            last = engine.record(cell.name)
            assert (str(last["job_id"]), last["restart_cnt"]) == (job.id, 1)
            assert last["nodes"] == next(node for node in slurm_cluster.NODES if node != job.where)
        finally:
            cluster.start_node(job.where)

    def test_what_stops_before_training_is_explained(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(cluster, tmp_path / "a folder of 100%j", monkeypatch, setup=["echo loading", "false"])
        cell = engine.cells[0]
        engine.executor.submit(cell)
        self.contract.until_gone(engine, cell)
        now = self.contract.state_of(engine, cell)
        assert (now.state, now.failure, now.cause) == ("failed", "infrastructure", "a line of setup failed: see log.txt")
        assert "loading" in engine.log(cell.name)
        monkeypatch.setattr(TrainingCell, "command", lambda *_, **__: ["/not/there"])
        engine.executor = base.make({"engine": "slurm"}, engine.layout)
        engine.executor.submit(cell)
        self.contract.until_gone(engine, cell)
        assert self.contract.state_of(engine, cell).cause == "srun ended with code 2 before training began: see log.txt"

    def test_setup_and_environment_reach_the_processes(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(
            cluster,
            tmp_path,
            monkeypatch,
            setup=["export FROM_SETUP=1"],
            environment={"GREETING": "it's $HOME"},
            cpus_per_task=2,
        )
        monkeypatch.setenv("JAX_PLATFORMS", "tpu")  # of the login node
        monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
        monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")  # of a job that the launcher runs in
        monkeypatch.setenv("OF_THE_USER", "kept")
        cell, job = self.run(engine, "hang")
        (pid,) = engine.processes(cell.name)
        lines = [line.partition("=") for line in Path(f"/proc/{pid}/environ").read_text().split("\0")]
        environ = {name: value for name, _, value in lines}
        assert [environ[name] for name in ("FROM_SETUP", "GREETING", "OF_THE_USER")] == ["1", "it's $HOME", "kept"]
        assert [environ[name] for name in ("JAX_PLATFORMS", "GQA_JAX_JOB", "SLURM_CPUS_PER_TASK")] == ["cpu", job.id, "2"]
        assert "SLURM_MEM_PER_CPU" not in environ
        assert environ["PYTHONPATH"].split(":")[0] == os.fspath(REPOSITORY)
        assert os.readlink(f"/proc/{pid}/cwd") == os.getcwd()

    def test_gpus_are_asked_for(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(cluster, tmp_path, monkeypatch, topology="h100:8")
        cell, _ = self.run(engine, "hang")
        assert engine.record(cell.name)["tres_per_node"] == "gres:gpu:8"
        (pid,) = engine.processes(cell.name)
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {b"JAX_PLATFORMS=cuda,cpu", b"SLURM_GPUS_ON_NODE=8"} <= set(environ)


@pytest.mark.needs("slurm")
class TestQueue:
    """Jobs that wait, on a real Slurm."""

    contract = executor_contract.Contract()

    def test_second_jobs_of_a_cell_wait_and_are_removed(self, engine):
        """As when two launchers on two hosts submit at once."""
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang", "finish")
        first = engine.executor.submit(cell)
        self.contract.until_running(engine, cell)
        script = os.fspath(engine.layout.cell(cell.name) / "job.sbatch")
        second = engine.cluster.run("sbatch", "--parsable", script).stdout.strip()
        records = engine.cluster.records()
        assert [records[int(job)]["job_state"] for job in (first.id, second)] == ["RUNNING", "PENDING"]
        assert engine.executor.submit(cell).id == engine.executor.jobs()[cell.name].id == first.id
        notes = engine.executor.reconcile(engine.executor.jobs())
        assert notes == [f"{cell.name} had 2 jobs: cancelled all but {first.id}"]
        assert engine.cluster.records()[int(second)]["job_state"] == "CANCELLED"
        assert len(engine.processes(cell.name)) == 2
        assert engine.executor.reconcile(engine.executor.jobs()) == []

    def test_the_lowest_of_two_that_submit_at_once_is_kept(self, engine, monkeypatch):
        """Another launcher submits after this one has looked."""
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang")
        launch, others = engine.executor.launch, []

        def overtaken(mine):
            file = engine.layout.cell(cell.name) / "theirs"
            file.write_text(engine.executor.submission(cell).files["job.sbatch"])
            others.append(engine.cluster.run("sbatch", "--parsable", os.fspath(file)).stdout.strip())
            return launch(mine)

        monkeypatch.setattr(engine.executor, "launch", overtaken)
        assert engine.executor.submit(cell).id == others[0]
        mine = engine.cluster.records()[int(others[0]) + 1]
        assert (mine["name"], mine["job_state"]) == (job_names.of(engine.layout, cell.name), "CANCELLED")

    def test_a_cell_whose_job_ends_is_not_submitted_yet(self, engine):
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang")
        job = engine.executor.submit(cell)
        self.contract.until_running(engine, cell)
        for pid in engine.processes(cell.name):
            os.kill(pid, signal.SIGSTOP)  # it takes a while to save
        engine.executor.cancel([cell.name])
        try:
            found = engine.executor.jobs()[cell.name]
            assert (found.id, found.state, found.detail) == (job.id, RUNNING, "ending")
            with pytest.raises(SubmitError, match=f"job {job.id} of {cell.name} is still ending"):
                engine.executor.submit(cell)
        finally:
            for pid in engine.processes(cell.name):
                os.kill(pid, signal.SIGCONT)
        self.contract.until_gone(engine, cell)

    def test_a_job_that_can_never_start_is_dead_and_removed(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(cluster, tmp_path, monkeypatch, partition="short", time="1:00:00")
        cell = engine.cells[0]
        job = engine.executor.submit(cell)
        dead = self.contract.wait(
            engine, lambda: (job := engine.executor.jobs()[cell.name]).state == DEAD and job, "not seen to be dead"
        )
        assert dead.id == job.id
        with pytest.raises(SubmitError, match=f"job {job.id} of .* must be cancelled first: Slurm will not start it"):
            engine.executor.submit(cell)
        (note,) = engine.executor.reconcile(engine.executor.jobs())
        why = note.removeprefix(f"{cell.name}: ").removesuffix("; cancelled")
        never = r"Slurm will not start it: Partition(TimeLimit|Config)"  # the reason is another one at first
        assert re.fullmatch(rf"job {job.id}: {never}; change the options or the grid, then `retry`", why)
        assert engine.executor.jobs() == {}
        now = self.contract.state_of(engine, cell)
        assert (now.state, now.failure, now.cause, now.runnable) == ("failed", "error", why, False)

    def test_jobs_of_other_grids_are_not_seen(self, engine, tmp_path, monkeypatch):
        cell = engine.cells[0]
        executor_contract.behave(engine.layout, cell, "hang")
        other = make_engine(engine.cluster, tmp_path / "other", monkeypatch)
        other.executor.submit(cell)
        assert list(other.executor.jobs()) == [cell.name]
        assert engine.executor.jobs() == {}
        engine.executor.cancel([cell.name])
        assert list(other.executor.jobs()) == [cell.name]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"partition": "nope"}, "invalid partition specified: nope"),
            ({"constraint": "nope"}, "Invalid feature specification"),
            ({"nodes": 3}, "Requested node configuration is not available"),
            ({"memory": "100T"}, "Requested node configuration is not available"),
            ({"gpus_per_node": "b200:8"}, "Requested node configuration is not available"),
            ({"extra": ["--frobnicate=1"]}, "unrecognized option '--frobnicate=1'"),
        ],
    )
    def test_options_that_slurm_refuses(self, cluster, tmp_path, monkeypatch, options, words):
        engine = make_engine(cluster, tmp_path, monkeypatch, **options)
        with pytest.raises(ConfigError, match=f"sbatch refuses these options: .*{re.escape(words)}"):
            engine.executor.check()

    def test_a_cell_that_slurm_refuses(self, cluster, tmp_path, monkeypatch):
        engine = make_engine(cluster, tmp_path, monkeypatch, partition="nope")
        words = f"sbatch refuses {engine.cells[0].name}: sbatch: error: invalid partition specified: nope"
        with pytest.raises(ConfigError, match=words):
            engine.executor.submit(engine.cells[0])
        assert engine.executor.jobs() == {}


SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --output="/shared/my study/cells/{cell}/log.txt"
#SBATCH --open-mode=append
#SBATCH --chdir={here}
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=200G
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=long
#SBATCH --constraint=ib&h100
#SBATCH --time=7-0
#SBATCH --signal=TERM@300
#SBATCH --reservation=spring

# Slurm sends SIGTERM before it ends a job: training saves, and this script waits for that.
trap : TERM

# What `python -m launch status` shows where no training process was there to say more.
failed() {{
    printf '{{"class": "infrastructure", "reason": "%s: see log.txt", "time": %s, "job": "%s"}}\\n' \\
        "$1" "$(date +%s)" "$SLURM_JOB_ID" >'/shared/my study/cells/{cell}'/host-failure.json
}}
echo "--- $(date '+%Y-%m-%d %H:%M:%S') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${{SLURM_RESTART_COUNT:-0}}"

export GQA_JAX_JOB="$SLURM_JOB_ID"
export GQA_JAX_COMMIT=abc+
export PYTHONPATH=/shared/code"${{PYTHONPATH:+:$PYTHONPATH}}"
export JAX_PLATFORMS=cuda,cpu
export GQA_JAX_DEVICES=gpu,chip=h100,devices=16,per_process=8
export WANDB_MODE='a b'

trap 'failed "a line of setup failed"' ERR
set -e
module load cuda
ulimit -n 4096
set +e
trap - ERR

# A process that ends does not end the others at once: they may be saving.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=32 \\
    /shared/python -m gqa_jax.train \
'--config=/shared/code/configs/cell.py:/shared/my study/cells/{cell}/config.json' \
'--workdir=/shared/my study/cells/{cell}'
code=$?

# A job that Slurm itself ends is not RUNNING any more: it was cancelled, or comes back without this.
if [ "$code" != 0 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    if [ "$code" = 75 ]; then # asked to end, and saved
        scontrol requeue "$SLURM_JOB_ID"
    elif ! grep -qsF "\\"job\\": \\"$SLURM_JOB_ID\\"" '/shared/my study/cells/{cell}'/exit.json \
'/shared/my study/cells/{cell}'/attempts/*.json; then
        failed "srun ended with code $code before training began"
    fi
fi
exit "$code"
"""


class TestScript:
    """What is submitted, without Slurm."""

    def test_every_option_is_in_it(self, monkeypatch):
        cell = a_cell()
        monkeypatch.setattr(slurm.Executor, "_commit", "abc+")
        one = offline(
            "/shared/my study", topology="h100:8", nodes=2, cpus_per_task=32, memory="200G", partition="gpu", account="lab",
            qos="long", constraint="ib&h100", time="7-0", signal_seconds=300, python="/shared/python", code="/shared/code",
            setup=["module load cuda", "ulimit -n 4096"], extra=["--reservation=spring"], environment={"WANDB_MODE": "a b"},
        )  # fmt: skip
        made = one.submission(cell)
        name = job_names.of(one.layout, cell.name)
        assert made.files == {"job.sbatch": SCRIPT.format(name=name, cell=cell.name, here=os.getcwd())}
        assert made.command == f"sbatch --parsable '/shared/my study/cells/{cell.name}/job.sbatch'"

    def test_what_is_not_given_is_not_in_it(self):
        text = offline(time="30").submission(a_cell()).files["job.sbatch"]
        asked = [line.split("=")[0].removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
        always = ["job-name", "output", "open-mode", "chdir", "requeue", "dependency"]
        assert asked == [*always, "nodes", "ntasks-per-node", "time", "signal"]
        assert "set -e" not in text
        assert "JAX_PLATFORMS=cpu\n" in text
        assert "--wait=60 \\\n" in text
        assert f"{sys.executable} -m gqa_jax.train" in text

    @pytest.mark.parametrize("number", [3, "h200:3"])
    def test_gpus_without_a_topology(self, number):
        text = offline(gpus_per_node=number).submission(a_cell()).files["job.sbatch"]
        assert f"#SBATCH --gpus-per-node={number}\n" in text
        assert "JAX_PLATFORMS=cuda,cpu\n" in text

    @pytest.mark.parametrize(
        ("options", "hosts", "excluded"),
        [
            ({}, [], None),
            ({}, ["n3"], "n3"),
            ({}, ["n3", "n5", "n5", None, "elsewhere"], "n3,n5"),
            ({}, ["n1", "n2", "n2", "n3", "n4", "n5", "n5"], "n1,n2,n3,n5"),  # four, of those that failed most often first
            ({"partition": "small"}, ["n3"], None),  # is of another partition
            ({"partition": "small"}, ["s1", "s2", "s3"], "s1"),  # half of what is left beside the cell's own node
            ({"partition": "small", "nodes": 3}, ["s1"], None),
            ({"extra": ["--nodelist=n3"]}, ["n3"], None),
            ({"extra": ["--exclude=n9"]}, ["n3"], "n9,n3"),
        ],
    )
    def test_nodes_whose_machine_failed_are_left_out(self, options, hosts, excluded, tmp_path, monkeypatch):
        listed = [f"n{i} gpu*" for i in range(1, 13)] + [f"s{i} small" for i in range(1, 5)]
        answer = subprocess.CompletedProcess([], 0, "\n".join(listed), "")
        monkeypatch.setattr(slurm, "_call", lambda program, *_: answer if program == "sinfo" else pytest.fail(program))
        one, now = offline(tmp_path, **options), time.time()
        monkeypatch.setattr(run_folder.time, "time", lambda: next(times))
        times = iter([now - 25 * 3600, *(now - 9 + i for i in range(len(hosts))), *[now] * 9])
        for name, host in [("old", "n8"), *((f"cell{i % 3}", host) for i, host in enumerate(hosts))]:
            one.layout.cell(name).mkdir(parents=True, exist_ok=True)
            run_folder.record_exit(one.layout.cell(name), 1, "infrastructure", "no GPU", 0, host)
        text = one.submission(a_cell()).files["job.sbatch"]
        assert (re.findall("^#SBATCH --exclude=(.*)$", text, re.MULTILINE) or [None])[-1] == excluded
        monkeypatch.setattr(slurm, "_call", lambda *_: pytest.fail("it was asked again"))
        assert one.submission(a_cell()).files["job.sbatch"] == text

    def test_without_slurm_no_node_is_left_out(self, tmp_path, monkeypatch):
        one = offline(tmp_path)
        one.layout.cell("cell").mkdir(parents=True)
        run_folder.record_exit(one.layout.cell("cell"), 1, "infrastructure", "no GPU", 0, "n1")
        monkeypatch.setenv("PATH", os.fspath(tmp_path))
        assert "--exclude" not in one.submission(a_cell()).files["job.sbatch"]

    def test_bash_reads_it(self, tmp_path):
        file = tmp_path / "job.sbatch"
        file.write_text(offline("/a 'strange' \"one\" $HOME", setup=["true"]).submission(a_cell()).files["job.sbatch"])
        subprocess.run(["bash", "-n", file], check=True)
        assert '--output="/a \'strange\' \\"one\\" $HOME/cells/' in file.read_text()

    def test_the_commit_of_other_code(self, tmp_path):
        (tmp_path / "COMMIT").write_text("0123abc\n")
        assert "export GQA_JAX_COMMIT=0123abc\n" in offline(code=str(tmp_path)).submission(a_cell()).files["job.sbatch"]
        (tmp_path / "COMMIT").unlink()
        assert "GQA_JAX_COMMIT" not in offline(code=str(tmp_path)).submission(a_cell()).files["job.sbatch"]

    def test_the_example_is_complete(self):
        """configs/clusters/slurm.toml has every option, with the values that hold without it where it sets them."""
        path = base.CLUSTERS / "slurm.toml"
        one = base.load("slurm", Layout(epath.Path("/shared/study")))
        assert one.options == slurm.Options(topology="h100:8")
        named = set(re.findall(r"^(?:# )?\[?(\w+)(?: = |\]$)", path.read_text(), re.MULTILINE))
        assert named >= {field.name for field in dataclasses.fields(slurm.Options)}

    def test_slices_are_proved_for_one_node(self):
        assert slurm.Options(topology="h200:4").slice.n_chips == 4
        assert slurm.Options(topology="h200:4", nodes=2).slice is None
        assert slurm.Options().slice is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes = 0: must be at least 1"),
        ({"nodes": "2"}, "nodes = '2': must be int"),
        ({"signal_seconds": 0}, "signal_seconds = 0: must be at least 1"),
        ({"cpus_per_task": 0}, "cpus_per_task = 0: must be at least 1"),
        ({"partition": ""}, "partition = '': must be a text of one line"),
        ({"account": "a\n#SBATCH --qos=b"}, "account = 'a.n#SBATCH --qos=b': must be a text of one line"),
        ({"memory": "64GB"}, "memory = '64GB': must be a number with K, M, G or T"),
        ({"gpus_per_node": 0}, "gpus_per_node = 0: must be a number from 1 on, or TYPE:NUMBER"),
        ({"gpus_per_node": "h100"}, "gpus_per_node = 'h100': must be a number from 1 on, or TYPE:NUMBER"),
        ({"gpus_per_node": 4, "topology": "h100:8"}, "gpus_per_node = 4 with topology = 'h100:8'.*: make them agree"),
        ({"topology": "v5e:4x4"}, 'topology = .v5e:4x4.: must be GPUs of a node, .* engine = "tpu"'),
        ({"topology": "h100:3"}, "unknown topology 'h100:3'"),
        ({"time": "1 day"}, "time = '1 day': must be HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        ({"time": "3:00"}, "time = '3:00' is 180 s: must be more than signal_seconds . 60 = 180"),
        ({"environment": {"SLURM_X": "1"}}, "environment.SLURM_X = '1': must be a name"),
        ({"environment": {"GQA_JAX_JOB": "1"}}, "environment.GQA_JAX_JOB = '1': must be a name"),
        ({"setup": [1]}, "setup = 1: must be lines of bash"),
        ({"extra": ["reservation=x"]}, "extra = 'reservation=x': must be options of sbatch"),
        ({"extra": ["--no-requeue"]}, "extra has '--no-requeue': --no-requeue is set by the launcher"),
        ({"extra": ["--mem=1G"]}, "extra has '--mem=1G': --mem is set by the launcher, or by an option"),
        ({"partitions": "x"}, "did you mean 'partition'"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        offline(**options)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:10", 3610), ("2-1", 176400), ("2-1:30", 178200), ("0-0:5:1", 301)],
)
def test_times_as_slurm_reads_them(text, seconds):
    slurm.Options(time=text, signal_seconds=seconds - 61)
    with pytest.raises(ConfigError, match=f"is {seconds} s"):
        slurm.Options(time=text, signal_seconds=seconds - 60)


class TestErrors:
    """Programs of Slurm that fail, in its words."""

    @pytest.fixture
    def programs(self, tmp_path, monkeypatch):
        """Sets what a program says and its exit code; programs that are not set say nothing, and `squeue` has no jobs."""
        folder = tmp_path / "bin"
        folder.mkdir()

        def program(name, code=0, stderr="", stdout="", seconds=0):
            file = folder / name
            file.write_text(
                f"#!/bin/sh\necho $0 $* >>{tmp_path}/calls\nsleep {seconds}\n"
                f"printf '%s\\n' '{stderr}' >&2\nprintf '%s\\n' '{stdout}'\nexit {code}\n"
            )
            file.chmod(0o755)
            return tmp_path / "calls"

        for name in ("sbatch", "scancel", "srun"):
            program(name)
        program("squeue", stdout='{"jobs": []}')
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return program

    @pytest.mark.parametrize(
        "words",
        [
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
            "accounting/QOS policy (job submit limit, user size and/or time limits)",
            "sbatch: error: AssocMaxSubmitJobLimit",
            "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)",
            "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
        ],
    )
    def test_refused_now(self, programs, tmp_path, words):
        programs("sbatch", 1, words)
        one, cell = offline(tmp_path), a_cell()
        with pytest.raises(SubmitError, match=re.escape("sbatch failed: " + words.replace("\n", " "))):
            one.submit(cell)
        one.check()  # what may pass is no reason not to begin

    @pytest.mark.parametrize(
        "words",
        [
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
            "accounting/QOS policy (job submit limit, user size and/or time limits)",
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            "",
        ],
    )
    def test_refused_always(self, programs, tmp_path, words):
        programs("sbatch", 1, words)
        said = re.escape(words.replace("\n", " ") or "it says nothing")
        one = offline(tmp_path)
        with pytest.raises(ConfigError, match=f"sbatch refuses s16d-.*: {said}"):
            one.submit(a_cell())
        with pytest.raises(ConfigError, match=f"sbatch refuses these options: {said}"):
            one.check()

    def test_squeue_fails(self, programs, tmp_path):
        programs("squeue", 1, "slurm_load_jobs error: Unable to contact slurm controller")
        one = offline(tmp_path)
        for call in (one.jobs, lambda: one.submit(a_cell()), lambda: one.cancel(["x"]), one.check):
            with pytest.raises(SubmitError, match="squeue failed: slurm_load_jobs error: Unable to contact"):
                call()
        one.cancel([])  # asks nothing

    def test_squeue_is_slow(self, programs, tmp_path, monkeypatch):
        monkeypatch.setattr(slurm, "CALL_SECONDS", 0.2)
        programs("squeue", seconds=5)
        with pytest.raises(
            SubmitError, match=r"`squeue --json .*` has not ended after 0 s: see .* whether slurmctld is overloaded"
        ):
            offline(tmp_path).jobs()

    @pytest.mark.parametrize("text", ["", "[]", '{"jobs": [{"name": 1}]}', '{"jobs": [{"name": "x"}]}'])
    def test_squeue_says_something_else(self, programs, tmp_path, text):
        programs("squeue", stdout=text)
        with pytest.raises(SubmitError, match="`squeue --json` gives no list of jobs"):
            offline(tmp_path).jobs()

    def test_a_job_that_is_over_and_forgotten_was_submitted(self, programs, tmp_path):
        programs("sbatch", stdout="71;cluster")
        cell = a_cell()
        assert offline(tmp_path).submit(cell) == base.Job(cell.name, "71", QUEUED)

    def test_jobs_that_have_ended_are_no_error_of_cancel(self, programs, tmp_path):
        one = offline(tmp_path)
        jobs = [job | {"name": f"{job_names.prefix(one.layout)}{job['name']}"} for job in OLD]
        calls = programs("squeue", stdout=json.dumps({"jobs": jobs}))
        programs("scancel", 1, "scancel: error: Kill job error on job id 12: Job/step already completing or completed")
        one.cancel(["waits", "runs", "over", "unknown"])
        assert calls.read_text().splitlines()[-1].endswith("/scancel 11 12")
        programs("scancel", 1, "scancel: error: Kill job error on job id 12: Access/permission denied")
        with pytest.raises(SubmitError, match=r"scancel failed: .*permission denied"):
            one.cancel(["runs"])

    def test_programs_that_are_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", os.fspath(tmp_path))
        one = offline(tmp_path)
        with pytest.raises(ConfigError, match="sbatch, squeue, scancel, srun not on the PATH: run this on a login node"):
            one.check()
        with pytest.raises(
            SubmitError, match=r"`squeue .*` can't be started: No such file or directory: see that this is a login node"
        ):
            one.jobs()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"python": "/not/there/python"}, "python = '/not/there/python': /not/there/python is not there"),
            ({"code": "/not/there"}, "code = '/not/there': /not/there/configs/cell.py is not there"),
        ],
    )
    def test_files_that_are_missing(self, programs, tmp_path, options, words):
        with pytest.raises(ConfigError, match=words):
            offline(tmp_path, **options).check()
        offline(tmp_path, python="python3").check()  # which setup may find

    def test_a_root_on_gs(self):
        one = offline("gs://bucket/study")
        for call in (one.check, lambda: one.submission(a_cell())):
            with pytest.raises(ConfigError, match=r"--root gs://bucket/study: .*: give one on their file system"):
                call()


def old(number, name, state, reason="None", description="", **others):
    """A job as `squeue --json` of Slurm 22.05 has it (v0.0.38), without most of its fields."""
    job = {"job_id": number, "name": name, "job_state": state, "state_reason": reason, "state_description": description}
    return job | {"user_id": USER, "user_name": "me", "start_time": 0, "nodes": "", "restart_cnt": 0} | others


def new(number, name, states, reason="None", description="", start=None, **others):
    """The same of Slurm 24.05 (v0.0.41)."""
    at = {"set": start is not None, "infinite": False, "number": start or 0}
    job = {"job_id": number, "name": name, "job_state": states, "state_reason": reason, "state_description": description}
    return job | {"user_id": USER, "user_name": "me", "start_time": at, "nodes": "", "restart_cnt": 0} | others


OLD = [
    old(11, "waits", "PENDING", "Resources"),
    old(12, "runs", "RUNNING", start_time=1795272475, nodes="n[1-2]"),
    old(13, "ends", "COMPLETING", start_time=1795272475, nodes="n1"),
    old(14, "over", "CANCELLED", start_time=1795272475),
    old(15, "again", "PENDING", "BeginTime", start_time=1795279999),
    old(16, "boots", "CONFIGURING", start_time=1795272475, nodes="n3"),
    old(17, "never", "PENDING", "BadConstraints"),
    old(18, "broken", "PENDING", "JobHeldAdmin", "launch failed requeued held"),
    old(19, "held", "PENDING", "JobHeldAdmin"),
    old(20, "mine", "PENDING", "JobHeldUser"),
    old(21, "theirs", "RUNNING", user_id=USER + 1),
]
NEW = [
    new(11, "waits", ["PENDING"], "Resources"),
    new(12, "runs", ["RUNNING"], start=1795272475, nodes="n[1-2]"),
    new(13, "ends", ["CANCELLED", "COMPLETING"], start=1795272475, nodes="n1"),
    new(14, "over", ["CANCELLED"], start=1795272475),
    new(15, "again", ["PENDING", "REQUEUED"], "BeginTime", start=1795279999),
    new(16, "boots", ["RUNNING", "CONFIGURING"], start=1795272475, nodes="n3"),
    new(17, "never", ["PENDING"], "BadConstraints"),
    new(18, "broken", ["PENDING", "REQUEUE_HOLD"], "JobHoldMaxRequeue"),
    new(19, "held", ["PENDING"], "JobHeldAdmin"),
    new(20, "mine", ["PENDING"], "JobHeldUser"),
    new(21, "theirs", ["RUNNING"], user_id={"set": True, "infinite": False, "number": USER + 1}),
]
FOUND = {
    "waits": ("11", QUEUED, "waits for nodes", None, ""),
    "runs": ("12", RUNNING, "", 1795272475, "n[1-2]"),
    "ends": ("13", RUNNING, "ending", 1795272475, "n1"),
    "again": ("15", QUEUED, "waits for its begin time, two minutes after a requeue", None, ""),
    "boots": ("16", QUEUED, "configuring", None, "n3"),
    "never": ("17", DEAD, "Slurm will not start it: BadConstraints", None, ""),
    "broken": ("18", DEAD, "held by Slurm, which could not start it (launch failed requeued held)", None, ""),
    "held": ("19", QUEUED, "held by an administrator", None, ""),
    "mine": ("20", QUEUED, "held: scontrol release 20", None, ""),
}


# What sbatch may say, after Slurm's src/common/slurm_errno.c and job_state_reason.c; the first are for another time.
NOW_NOT = """\
Unexpected message received
Communication connection failure
Message send failure
Protocol authentication error
Unable to contact slurm controller (connect failure)
Unable to contact slurm controller (receive failure)
Rate limit exceeded, please retry momentarily
Process is shutting down and closing all communications
Connection timed out establishing
Socket timed out on send/recv operation
Zero Bytes were transmitted or received
MaxJobCount limit reached
I/O error writing script/environment to file
Error generating job credential
Slurm backup controller in standby mode
Controller is in standby mode, try a different controller
Requested partition configuration not available now
Requested nodes are busy
Licenses currently unavailable
Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
Requested reservation is in use
Requested reservation not usable now
Job can not start due to maintenance reservation.
Required node not available (down, drained or reserved)
Required partition not available (inactive or drain)
Partition in DOWN state
Requested account has breached requested QOS usage threshold
Slurm internal error, contact system administrator
System submissions disabled
Requested operation is presently disabled
Max powered up nodes reached
Unable to connect to database
Authentication credential expired
Resource temporarily unavailable
QOSGrpGRES / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
QOSMaxGRESPerUser / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
AssocGrpCpuLimit / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
QOSMaxSubmitJobPerUserLimit / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
AssocMaxSubmitJobLimit""".splitlines()
NEVER_SO = """\
Invalid partition name specified
No partition specified or system default partition
Access/permission denied
User's group not permitted to use this partition
More processors requested than permitted
Node count specification invalid
Requested node configuration is not available
Invalid feature specification
Invalid account or account/partition combination specified
Invalid qos specification
Requested time limit is invalid (missing or exceeds some limit)
Access denied to requested reservation
Requested reservation is invalid
Invalid generic resource (gres) specification
Memory required by task is not available
Incompatible versions of client and server code
QOSMaxGRESPerJob / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
QOSMaxGRESPerNode / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
QOSMaxWallDurationPerJobLimit / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
AssocMaxNodePerJobLimit / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
QOSMinGRES / Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)
PartitionTimeLimit
""".splitlines()


@pytest.mark.parametrize(("words", "passes"), [*((text, True) for text in NOW_NOT), *((text, False) for text in NEVER_SO)])
def test_which_refusals_may_pass(words, passes):
    lines = words.split(" / ")
    said = [f"sbatch: error: {line}" for line in lines[:-1]] + [f"sbatch: error: Batch job submission failed: {lines[-1]}"]
    assert slurm_words.may_pass("\n".join(said)) == passes


class TestParse:
    """Jobs in the JSON of several versions."""

    @pytest.mark.parametrize("jobs", [OLD, NEW], ids=["22.05", "24.05"])
    def test_jobs(self, jobs, monkeypatch):
        prefix = job_names.prefix(offline().layout)
        named = [job | {"name": f"{prefix}{job['name']}"} for job in jobs]
        text = json.dumps({"meta": {}, "jobs": [*named, old(1, "other", "RUNNING"), old(2, None, "RUNNING")]})
        monkeypatch.setattr(slurm, "_call", lambda *argv: subprocess.CompletedProcess(argv, 0, text, ""))
        wanted = dict(FOUND)
        if jobs is NEW:
            wanted["again"] = (*FOUND["again"][:2], f"requeued, {FOUND['again'][2]}", *FOUND["again"][3:])
            wanted["broken"] = (*FOUND["broken"][:2], "held by Slurm, which could not start it (JobHoldMaxRequeue)", None, "")
        found = offline().jobs()
        assert {cell: (j.id, j.state, j.detail, j.since, j.where) for cell, j in found.items()} == wanted
        assert all(job.cell == cell for cell, job in found.items())

    def test_a_state_of_the_future(self):
        with pytest.raises(SubmitError, match="job 3 of a is in a state that is not known here: TELEPORTING"):
            slurm.parse(json.dumps({"jobs": [new(3, "p-a", ["TELEPORTING"])]}), "p-", USER)

    def test_jobs_that_did_not_start_are_tried_again(self, tmp_path, monkeypatch):
        """What is written says so; a cell that has a result, or no folder any more, is left alone."""
        one = offline(tmp_path)
        prefix = job_names.prefix(one.layout)
        jobs = [old(i, f"{prefix}{cell}", "PENDING", "JobHoldMaxRequeue") for i, cell in enumerate(("a", "done", "gone"))]
        called = []

        def call(program, *arguments):
            called.append((program, *arguments))
            return subprocess.CompletedProcess(arguments, 0, json.dumps({"jobs": jobs}), "")

        monkeypatch.setattr(slurm, "_call", call)
        for cell in ("a", "done"):
            (tmp_path / "cells" / cell).mkdir(parents=True)
            (tmp_path / "cells" / cell / "config.json").touch()
        (tmp_path / "cells" / "done" / "result.json").touch()
        notes = one.reconcile(one.jobs())
        assert notes[0] == "a: job 0: held by Slurm, which could not start it (JobHoldMaxRequeue); cancelled"
        assert called[-1] == ("scancel", "0", "1", "2")
        failure = json.loads((tmp_path / "cells" / "a" / "host-failure.json").read_text())
        assert (failure["class"], failure["job"]) == ("infrastructure", "0")
        assert sorted(path.name for path in (tmp_path / "cells").glob("*/*.json")) == [
            "config.json", "config.json", "host-failure.json", "result.json"
        ]  # fmt: skip


@pytest.mark.needs("slurm")
@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "steps"), [(1, 3000), (2, 800)])  # which last: a step on two nodes takes ten times as long
def test_training(cluster, tmp_path, nodes, steps):
    """The real trainer finds the other process by what Slurm says, saves when its nodes are taken away, and goes on."""
    layout = Layout(epath.Path(tmp_path))
    values = grid_fakes.config(steps=steps, checkpoint={"every_steps": 1000})
    (cell,) = grid.cells(grid.Grid("one", [values], contexts_served=[1024]))
    folder = layout.cell(cell.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cell.config.to_dict()))
    options = {"engine": "slurm", "nodes": nodes, "environment": {"XLA_FLAGS": ""}}
    engine = Engine(base.make(options, layout), [cell], cluster, options)
    job = engine.executor.submit(cell)

    def until(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, engine.log(cell.name)
            engine.step()
            time.sleep(0.1)

    until(lambda: (beat := read(folder / "heartbeat.json")).get("phase") == "train" and beat["step"] > 0)
    engine.preempt(cell.name)
    until(lambda: engine.record(cell.name)["job_state"] not in ("PENDING", "RUNNING", "COMPLETING"))
    assert engine.record(cell.name)["job_state"] == "COMPLETED", engine.log(cell.name)
    result = read(folder / "result.json")
    assert (result["status"], result["n_devices"]) == ("done", nodes)
    attempts = [read(path) for path in sorted((folder / "attempts").glob("*.json"))]
    assert [(a["job"], a["n_processes"]) for a in attempts] == [(job.id, nodes)] * 2
    first_steps = [a["first_step"] for a in attempts]
    assert first_steps[0] == 0
    assert first_steps[1] % 1000, f"it went on from step {first_steps[1]}, and did not save when asked: {engine.log(cell.name)}"


def read(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
