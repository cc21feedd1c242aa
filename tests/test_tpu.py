"""The Cloud TPU engine on a fake of the API (tests/tpu_fake.py) that really runs the startup script."""

import dataclasses
import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import grpc
import pytest
from etils import epath

from gqa_jax import storage
from gqa_jax.config import ConfigError
from gqa_jax.hardware import allocation
from gqa_jax.training import run_folder
from launch import grid, run, state, watch
from launch.cells import REPOSITORY, Layout
from launch.executors import base, bundle, job_names, tpu
from launch.executors.base import DEAD, QUEUED, RUNNING, SubmitError
from launch.training_cells import TrainingCell
from tests import executor_contract, grid_fakes, tpu_fake
from tests.executor_contract import Contract, behave

OPTIONS = {
    "engine": "tpu",
    "topology": "v5e:2x4",
    "project": tpu_fake.PROJECT,
    "zones": [tpu_fake.ZONES[0]],
    "python": sys.executable,
    "shared_root": True,
    "environment": {"PYTHONPATH": os.fspath(REPOSITORY)},
}


class Engine(executor_contract.Engine):
    ranks = 2

    def __init__(self, cloud, the_executor, cells):
        super().__init__(the_executor, cells)
        self.cloud = cloud

    def job(self, cell):
        return job_names.of(self.layout, cell)

    def preempt(self, cell):
        self.cloud.suspend(self.job(cell))

    def lose(self, cell):
        self.cloud.suspend(self.job(cell), announce=False)

    def processes(self, cell):
        wanted = ["-m", "tests.fake_trainer", os.fspath(self.layout.cell(cell)), "--distributed=on"]
        found = []
        for host, _ in list(self.cloud._hosts.values()):
            for pid in host.pids():
                try:
                    with open(f"/proc/{pid}/cmdline") as file:
                        if file.read().split("\0")[1:-1] == wanted:
                            found.append(pid)
                except OSError:
                    pass
        return found

    def another_launcher(self):
        return f"base.make({self.executor_options!r}, layout)"


@pytest.fixture
def cloud(tmp_path):
    with tpu_fake.Cloud(tmp_path / "cloud") as cloud:
        yield cloud


@pytest.fixture
def make(cloud, tmp_path, monkeypatch):
    """Makes an engine with other options than OPTIONS."""
    monkeypatch.setattr(TrainingCell, "command", executor_contract.fake_command)
    layout = Layout(epath.Path(tmp_path / "grid"))

    def make(behaviour=("finish",), count=2, **changes):
        values = OPTIONS | {"api_endpoint": f"http://127.0.0.1:{cloud.port}"} | changes
        one = base.make(values, layout)
        one.sleep = lambda seconds: None
        made = Engine(cloud, one, executor_contract.prepared(layout, count, behaviour))
        made.executor_options = values
        return made

    return make


@pytest.fixture
def engine(make):
    engine = make()
    with engine.executor:
        yield engine


class TestContract(Contract):
    pass


BOTH = list(tpu_fake.ZONES)
QUOTA = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded.")
DOWN = (grpc.StatusCode.UNAVAILABLE, "The service is currently unavailable.")


def states(cloud):
    """(zone, state) of every request that Google has."""
    with cloud.lock:
        return sorted((name.split("/")[3], r.state.name) for name, r in cloud.requests.items())


def wait(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def until_gone(engine, cell):
    wait(lambda: cell.name not in engine.executor.jobs() and not engine.processes(cell.name))


def started(engine, *behaviour):
    """The first cell, training on both hosts."""
    cell = engine.cells[0]
    behave(engine.layout, cell, *behaviour)
    engine.executor.prepare()
    engine.executor.submit(cell)
    wait(lambda: (engine.layout.cell(cell.name) / "heartbeat.json").exists())
    wait(lambda: len(engine.processes(cell.name)) == 2)
    return cell


def submitted(engine, cell):
    """A submission with its record in the cell's folder."""
    (done,) = run.submit([cell], engine.executor.jobs(), engine.layout, engine.executor)
    return done.result


def now(engine, cell):
    return state.of(cell, engine.layout.cell(cell.name), time.time(), engine.executor.jobs().get(cell.name))


def logs(engine, cell):
    return "".join(path.read_text() for path in engine.executor.logs(cell.name))


def attempts(engine, cell):
    return len(list((engine.layout.cell(cell.name) / "attempts").glob("*.json")))


class TestRequest:
    def request(self, make, **changes):
        engine = make(count=1, **changes)
        cell = engine.cells[0]
        files = engine.executor.submission(cell).files
        request = json.loads(files["queued-resource.json"])
        (spec,) = request["queued_resource"]["tpu"]["node_spec"]
        assert spec["node"]["metadata"].pop("startup-script") == files["startup.sh"]
        return engine.job(cell.name), cell.name, request

    def test_golden(self, make):
        job, cell, request = self.request(make)
        parent = "projects/test-project/locations/us-test1-a"
        assert request == {
            "parent": parent,
            "queued_resource_id": job,
            "queued_resource": {
                "tpu": {
                    "node_spec": [
                        {
                            "parent": parent,
                            "node_id": job,
                            "node": {
                                "accelerator_type": "v5litepod-8",
                                "runtime_version": "v2-alpha-tpuv5-lite",
                                "network_config": {"enable_external_ips": True},
                                "service_account": {"scope": ["https://www.googleapis.com/auth/cloud-platform"]},
                                "labels": {"gqa-jax-grid": "grid", "gqa-jax-cell": cell},
                                "metadata": {},
                            },
                        }
                    ]
                },
                "queueing_policy": {"valid_until_duration": {"seconds": 86400}},
                "spot": {},
            },
        }

    def test_every_option(self, make):
        job, cell, request = self.request(
            make,
            topology="v5p:2x2x2",
            slices=2,
            provisioning="reserved",
            reservation="ours",
            runtime_version="image",
            network="net",
            subnetwork="sub",
            external_ips=False,
            service_account="me@test-project.iam.gserviceaccount.com",
            labels={"team": "scaling"},
            tags=["inside"],
            valid_until_hours=0.5,
        )
        resource = request["queued_resource"]
        assert resource["reservation_name"] == "projects/test-project/locations/us-test1-a/reservations/ours"
        assert (resource["guaranteed"], "spot" in resource) == ({}, False)
        assert resource["queueing_policy"]["valid_until_duration"] == {"seconds": 1800}
        (spec,) = resource["tpu"]["node_spec"]
        assert (spec["multislice_params"], "node_id" in spec) == ({"node_count": 2, "node_id_prefix": job}, False)
        node = spec["node"]
        assert node["accelerator_config"] == {"type_": "V5P", "topology": "2x2x2"}
        assert "accelerator_type" not in node
        assert node["network_config"] == {"enable_external_ips": False, "network": "net", "subnetwork": "sub"}
        assert node["service_account"]["email"] == "me@test-project.iam.gserviceaccount.com"
        assert (node["labels"]["team"], node["labels"]["gqa-jax-cell"], node["tags"]) == ("scaling", cell, ["inside"])
        assert (node["scheduling_config"], node["runtime_version"]) == ({"reserved": True}, "image")

    def test_the_client_sends_all_of_it(self, make, cloud):
        """A field that Google's messages don't have, or a tier that got lost, would be seen here."""
        cloud.hold.add(tpu_fake.ZONES[0])
        engine = make()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        sent = cloud.the(engine.job(cell.name)).resource
        assert "spot" in sent
        assert "guaranteed" not in sent
        assert sent.queueing_policy.valid_until_duration.total_seconds() == 86400
        (spec,) = sent.tpu.node_spec
        assert spec.node.accelerator_type == "v5litepod-8"
        assert spec.node.metadata["startup-script"] == engine.executor.submission(cell).files["startup.sh"]
        assert spec.node.labels["gqa-jax-cell"] == cell.name

    @pytest.mark.parametrize(
        ("topology", "expected"),
        [
            ("v5e:4x4", ("v5litepod-16", None)),
            ("v5e:1x1", ("v5litepod-1", None)),
            ("v6e:2x4", ("v6e-8", None)),
            ("v5p:2x2x4", ("v5p-32", "V5P")),
            ("v4:2x2x1", ("v4-8", "V4")),
        ],
    )
    def test_names_of_slices(self, topology, expected):
        assert tpu.accelerator(tpu.Options(topology=topology, project="pppppp", zones=["us-x1-a"]).slice) == expected

    def test_what_a_person_would_type(self, make):
        engine = make(zones=BOTH)
        command = engine.executor.submission(engine.cells[0]).command
        assert command.startswith("gcloud compute tpus queued-resources create g")
        for part in ("--zone=us-test1-a", "--accelerator-type=v5litepod-8", "--spot", "--valid-until-duration=86400s"):
            assert f" {part} " in command
        assert " --scopes=https://www.googleapis.com/auth/cloud-platform --metadata-from-file=" in command
        account = "me@test-project.iam.gserviceaccount.com"
        assert f" --service-account={account} " in make(service_account=account).executor.submission(engine.cells[0]).command

    def test_the_script_is_bash_whatever_the_options_hold(self, make):
        quotes = 'it\'s "$(false)" `x`\nb'
        engine = make(environment={"QUOTES": quotes}, setup=["echo 'a b' \"c\"", "true"])
        script = engine.executor.submission(engine.cells[0]).files["startup.sh"]
        assert len(script) < 256 * 1024  # limit of a value of the metadata
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        head = script.partition(': "${HOST_FOLDER')[0] + '\nenv "${VARIABLES[@]}" printenv -0 QUOTES GQA_JAX_DEVICES'
        said = subprocess.run(["bash"], input=head, text=True, check=True, capture_output=True).stdout
        assert said == f"{quotes}\0tpu,chip=v5e,devices=8\0"

    def test_a_store_of_this_machine_is_refused(self, make, tmp_path, monkeypatch):
        engine = make(shared_root=False)
        cell = engine.cells[0]
        config = dataclasses.replace(cell.config, data=dataclasses.replace(cell.config.data, store="/stores/web"))
        with pytest.raises(ConfigError, match="copy it to gs://"):
            engine.executor.submission(dataclasses.replace(cell, config=config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topology": None}, "name the TPU slice"),
        ({"topology": "h200:8"}, "name the TPU slice"),
        ({"topology": "v5e:4x5"}, "v5e:4x4"),
        ({"project": ""}, "project = ''"),
        ({"zones": []}, "order of preference"),
        ({"zones": ["us-west4-a", "us-west4-a"]}, "each once"),
        ({"zones": ["West"]}, "must be like"),
        ({"provisioning": "spott"}, "did you mean 'spot'"),
        ({"provisioning": "reserved"}, "reservation = None"),
        ({"reservation": "ours"}, "reservation = 'ours'"),
        ({"slices": 0}, "at least 1"),
        ({"max_run_hours": 0.0}, "above 0"),
        ({"labels": {"Team": "x"}}, "labels.Team"),
        ({"tags": ["A"]}, "tags"),
        ({"setup": [1]}, "setup"),
        ({"service_account": "me"}, "service_account = 'me': must be an e-mail, NAME@PROJECT.iam.gserviceaccount.com"),
        ({"service_account": "me@example.com"}, "must be an e-mail, NAME@PROJECT.iam.gserviceaccount.com"),
        ({"service_account": "serviceAccount:me@p p.iam.gserviceaccount.com"}, "must be an e-mail"),
        ({"service_account": ""}, "must be an e-mail"),
        ({"bundle": "code.tar.gz"}, "<sha256>.tar.gz"),
        ({"zone": "us-west4-a"}, "did you mean 'zones'"),
        ({"environment": {"A B": "x"}}, "environment.A B"),
    ],
)
def test_options_that_cannot_be_used(changes, words, tmp_path):
    values = {name: value for name, value in (OPTIONS | changes).items() if value is not None}
    with pytest.raises(ValueError) as error:  # noqa: PT011 (ConfigError, or that of hardware.find)
        base.make(values, Layout(tmp_path))
    assert words in str(error.value)


def test_the_example_names_every_option(tmp_path):
    text = (base.CLUSTERS / "tpu.toml").read_text()
    with base.load("tpu", Layout(tmp_path)) as one:
        assert one.options.project == tpu.EXAMPLE_PROJECT
        for field in dataclasses.fields(one.options):
            assert f"\n{field.name} = " in text or f"\n# {field.name} = " in text
        with pytest.raises(ConfigError, match="is the example: write the id of yours"):
            one.check()  # before anybody is asked
    cluster = tmp_path / "account.toml"
    cluster.write_text(text.replace('project = "my-project"', 'project = "my-own-project"'))
    with (
        base.load(str(cluster), Layout(tmp_path)) as one,
        pytest.raises(ConfigError, match="is the example: write the e-mail of yours"),
    ):
        one.check()
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    cluster = tmp_path / "all.toml"
    cluster.write_text(uncommented.replace('"spot" ', '"reserved" ').replace("<sha256>", "0" * 64))
    with base.load(str(cluster), Layout(tmp_path)) as one:  # each with its type
        assert [field.name for field in dataclasses.fields(one.options) if getattr(one.options, field.name) is None] == []


class TestCheck:
    def refuses(self, engine, *words):
        with pytest.raises(ConfigError) as error:
            engine.executor.check()
        for word in words:
            assert word in str(error.value)

    def test_writes_nothing_and_submits_nothing(self, engine, cloud):
        before = sorted(Path(engine.layout.root).rglob("*"))
        engine.executor.check()
        assert sorted(Path(engine.layout.root).rglob("*")) == before
        assert set(cloud.calls) == {"ListLocations", "ListAcceleratorTypes", "ListRuntimeVersions"}

    def test_root(self, make):
        self.refuses(make(shared_root=False), "hosts of a slice don't see it", "gs://BUCKET/FOLDER")

    def test_project(self, make):
        self.refuses(make(project="other-project"), "Permission denied on resource project", "gcloud services enable")

    def test_zone(self, make):
        self.refuses(make(zones=["us-test1-c"]), "us-test1-c", "did you mean 'us-test1-")

    def test_slice_of_another_zone(self, make):
        self.refuses(make(topology="v5p:2x2x2", zones=[tpu_fake.ZONES[1]]), "v5p-16", "there are some in us-test1-a")

    def test_slice_of_no_zone(self, make):
        self.refuses(make(topology="v5e:4x4"), "v5litepod-16", "did you mean 'v5litepod-")

    def test_image(self, make):
        self.refuses(make(runtime_version="v2-alpha-tpuv5-light"), "did you mean 'v2-alpha-tpuv5-lite'")

    def test_bundle(self, make, tmp_path):
        self.refuses(make(bundle=str(tmp_path / f"{'0' * 64}.tar.gz")), "is not there")

    def test_without_the_package(self, engine, monkeypatch):
        monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)
        monkeypatch.delattr("google.cloud.tpu_v2", raising=False)
        self.refuses(engine, "pip install 'gqa-jax[cluster]'")

    def test_without_credentials(self, make, monkeypatch):
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError

        def none(scopes):
            raise DefaultCredentialsError("Your default credentials were not found.")

        monkeypatch.setattr(google.auth, "default", none)
        self.refuses(make(api_endpoint=None), "credentials were not found", "gcloud auth application-default login")

    def test_an_endpoint_is_spoken_to_with_tls(self, make, cloud, monkeypatch):
        import google.auth
        from google.auth.credentials import AnonymousCredentials

        monkeypatch.setattr(google.auth, "default", lambda scopes: (AnonymousCredentials(), None))
        monkeypatch.setattr(tpu, "PAUSES", ())
        monkeypatch.setattr(tpu, "CALL_SECONDS", 2.0)
        engine = make(api_endpoint=f"127.0.0.1:{cloud.port}")
        with engine.executor, pytest.raises(SubmitError):
            engine.executor.check()
        assert cloud.calls == []


class TestSubmit:
    def test_a_zone_without_quota(self, make, cloud):
        engine = make(zones=BOTH)
        engine.executor.prepare()
        cloud.errors += [("CreateQueuedResource", BOTH[0], *QUOTA)]
        assert engine.executor.submit(engine.cells[0]).where == BOTH[1]
        until_gone(engine, engine.cells[0])
        assert now(engine, engine.cells[0]).state == "done"

    def test_no_zone_has_quota(self, make, cloud):
        engine = make(zones=BOTH)
        cloud.errors += [("CreateQueuedResource", zone, *QUOTA) for zone in BOTH]
        with pytest.raises(SubmitError, match=r"us-test1-a: RESOURCE_EXHAUSTED: Quota limit .*us-test1-b: RESOURCE_EXHAUSTED"):
            engine.executor.submit(engine.cells[0])
        assert engine.executor.jobs() == {}

    def test_what_passes_by_itself_is_tried_again(self, make, cloud):
        engine = make()
        engine.executor.prepare()
        slept = []
        engine.executor.sleep, engine.executor.random = slept.append, random.Random(0)
        rate = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded for quota metric 'Requests', limit 'Requests per minute'")
        cloud.errors += [("CreateQueuedResource", None, *DOWN), ("CreateQueuedResource", None, *rate)]
        cloud.errors += [("GetQueuedResource", None, grpc.StatusCode.DEADLINE_EXCEEDED, "too late")]
        engine.executor.submit(engine.cells[0])
        assert cloud.calls.count("CreateQueuedResource") == 3
        assert len(slept) == 3
        assert 0.5 <= slept[0] <= 1.5
        assert 1.0 <= slept[1] <= 3.0
        assert slept[2] != slept[0]  # jitter

    def test_google_is_down(self, make, cloud):
        engine = make()
        cloud.errors += [(None, None, *DOWN)] * 20
        with pytest.raises(SubmitError, match="UNAVAILABLE: The service is currently unavailable"):
            engine.executor.jobs()
        with pytest.raises(SubmitError, match="UNAVAILABLE"):
            engine.executor.submit(engine.cells[0])
        assert len(cloud.calls) == 2 * (1 + len(tpu.PAUSES))

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (
                grpc.StatusCode.PERMISSION_DENIED,
                "TPU Admin on project test-project and Service Account User on service_account",
            ),
            (grpc.StatusCode.UNAUTHENTICATED, "gcloud auth application-default login"),
            (grpc.StatusCode.INVALID_ARGUMENT, "correct the option"),
            (grpc.StatusCode.NOT_FOUND, "correct project, zones"),
        ],
    )
    def test_what_would_never_work(self, make, cloud, code, words):
        engine = make(zones=BOTH)
        cloud.errors += [("CreateQueuedResource", None, code, "Google's words.")]
        with pytest.raises(ConfigError, match=f"{code.name}: Google's words.*{words}"):
            engine.executor.submit(engine.cells[0])
        assert cloud.calls.count("CreateQueuedResource") == 1

    def test_a_watch_goes_on_through_every_error(self, make, cloud, monkeypatch):
        """Every status that gRPC has, for each call that a pass makes; in each pass both cells must be asked for."""
        cloud.hold |= set(BOTH)
        engine = make(zones=BOTH)
        engine.executor.prepare()
        monkeypatch.setattr(state, "UNSTARTED", 10**6)
        monkeypatch.setattr(state, "BACKOFF_SECONDS", 0.0)
        monkeypatch.setattr(watch, "FIRST_PAUSE_SECONDS", 0.0)
        engine.executor.wait = lambda seconds: None
        methods = ("ListQueuedResources", "CreateQueuedResource", "GetQueuedResource", "DeleteQueuedResource")
        codes = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
        due = [(method, code) for code in codes for method in methods]
        passes, said = [], set()

        def seen(found):
            passes.append(found)
            said.update((*found.notes, *found.refused.values()))
            with cloud.lock:
                first = list(cloud.requests.values())[:1]
                cloud.requests.clear()
                if not due:
                    raise KeyboardInterrupt
                method, code = due.pop()
                if method == "DeleteQueuedResource" and first:  # something to delete
                    first[0].set(tpu_fake.STATE.FAILED)
                    cloud.requests[first[0].resource.name] = first[0]
                cloud.errors = [(method, None, code, "Google's words")] * 5  # all tries of a call that passes
                cloud.calls.clear()

        with pytest.raises(KeyboardInterrupt):
            watch.repeat(engine.cells, engine.layout, engine.executor, True, seen)
        assert len(passes) == 1 + 4 * len(codes)
        for code in codes:
            assert any(f"{code.name}: Google's words" in text for text in said), code

    def test_a_request_in_another_zone_is_the_claim(self, make, cloud):
        cloud.hold |= set(BOTH)
        make(zones=BOTH[1:]).executor.submit(make().cells[0])
        assert make(zones=BOTH).executor.submit(make().cells[0]).where == BOTH[1]
        assert states(cloud) == [(BOTH[1], "WAITING_FOR_RESOURCES")]

    def test_two_launchers_that_saw_nothing_leave_one_request(self, make, cloud, monkeypatch):
        """Each has looked before the other has asked, in another zone."""
        cloud.hold |= set(BOTH)
        engine = make(zones=BOTH)
        cell = engine.cells[0]
        make(zones=BOTH[1:]).executor.submit(cell)
        look, blind = engine.executor._one, [True]

        def once(name):
            return None if blind and blind.pop() else look(name)

        monkeypatch.setattr(engine.executor, "_one", once)
        assert engine.executor.submit(cell).where == BOTH[0]
        wait(lambda: states(cloud) == [(BOTH[0], "WAITING_FOR_RESOURCES")])

    @pytest.mark.parametrize(("kind", "first"), [("infrastructure", 1), ("preempted", 0), ("error", 0)])
    def test_after_a_fault_of_machines_another_zone_is_asked_first(self, kind, first, make):
        engine = make(zones=BOTH)
        folder = engine.layout.cell(engine.cells[0].name)
        at = time.time()
        for name, values in (("submissions", {"where": BOTH[0], "time": at - 9}), ("attempts", {"time": at - 5})):
            (folder / name).mkdir(parents=True)
            storage.write_json(folder / name / "000.json", values)
        assert engine.executor._zones_for(engine.cells[0].name)[0] == BOTH[0]
        run_folder.record_exit(folder, 1, kind, "the TPU is taken", 0)
        assert engine.executor._zones_for(engine.cells[0].name)[0] == BOTH[first]

    def test_a_request_that_expired_is_followed_by_one_in_the_next_zone(self, make, cloud):
        cloud.hold |= set(BOTH)
        engine = make(zones=BOTH)
        cell = engine.cells[0]
        wheres = []
        for _ in range(3):
            job = submitted(engine, cell)
            wheres.append(job.where)
            cloud.fail(job.id, "There is no more capacity in the zone")
            failed = engine.executor.jobs()[cell.name]
            assert (failed.state, "no more capacity" in failed.detail) == (DEAD, True)
            assert now(engine, cell).runnable
            with pytest.raises(SubmitError, match="FAILED"):
                engine.executor.submit(cell)
            (note,) = engine.executor.reconcile(engine.executor.jobs())
            assert "no more capacity" in note
            wait(lambda: states(cloud) == [])
        assert wheres == [BOTH[0], BOTH[1], BOTH[0]]

    def test_a_preempted_cell_stays_in_its_zone(self, make, cloud):
        engine = make(behaviour=("hang", "finish"), zones=BOTH)
        cell = engine.cells[0]
        engine.executor.prepare()
        cloud.errors += [("CreateQueuedResource", BOTH[0], *QUOTA)]
        job = submitted(engine, cell)
        wait(lambda: (engine.layout.cell(cell.name) / "heartbeat.json").exists())
        cloud.suspend(job.id)
        engine.executor.reconcile(engine.executor.jobs())
        wait(lambda: states(cloud) == [])
        assert submitted(engine, cell).where == BOTH[1] == job.where


class TestJobs:
    def test_a_waiting_request(self, make, cloud):
        cloud.hold.add(BOTH[0])
        engine = make()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        job = engine.executor.jobs()[cell.name]
        assert (job.state, job.detail, job.since, job.where) == (QUEUED, "waits for machines in us-test1-a", None, BOTH[0])
        engine.executor.cancel([cell.name])
        wait(lambda: engine.executor.jobs() == {})

    def test_since_when_it_is_active(self, make, cloud):
        before = time.time()
        engine = make()
        cell = started(engine, "hang")
        job = engine.executor.jobs()[cell.name]
        assert job.state == RUNNING
        assert before <= job.since <= time.time()

    def test_many_pages_and_only_this_grid(self, make, cloud, tmp_path):
        cloud.hold.add(BOTH[0])
        engine = make(count=5)
        for cell in engine.cells:
            engine.executor.submit(cell)
        other = base.make(engine.executor_options, Layout(epath.Path(tmp_path / "another")))
        other.submit(engine.cells[0])
        cloud.calls.clear()
        assert set(engine.executor.jobs()) == {cell.name for cell in engine.cells}
        assert cloud.calls == ["ListQueuedResources"] * 3  # of two each; no machines are asked for where none run
        assert list(other.jobs()) == [engine.cells[0].name]

    def test_a_slow_deletion(self, make, cloud):
        """The name is taken until it is over: nothing is submitted twice, and nothing waits."""
        engine = make()
        cell = started(engine, "hang", "finish")
        cloud.slow_deletions = True
        engine.executor.cancel([cell.name])
        job = engine.executor.jobs()[cell.name]
        assert (job.state, job.detail) == (QUEUED, "being deleted in us-test1-a")
        assert not now(engine, cell).runnable
        with pytest.raises(SubmitError, match="DELETING"):
            engine.executor.submit(cell)
        engine.executor.cancel([cell.name])  # again: no error
        assert engine.executor.reconcile(engine.executor.jobs()) == []
        cloud.slow_deletions = False
        until_gone(engine, cell)
        assert now(engine, cell).runnable
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert now(engine, cell).state == "done"

    def test_a_slice_that_is_being_taken_away_may_still_save(self, make, cloud):
        engine = make()
        cell = started(engine, "hang")
        request = cloud.the(engine.job(cell.name))
        request.set(tpu_fake.STATE.SUSPENDING)
        assert engine.executor.jobs()[cell.name].state == QUEUED
        assert engine.executor.reconcile(engine.executor.jobs()) == []
        with pytest.raises(SubmitError, match="SUSPENDING"):
            engine.executor.submit(cell)


class TestReconcile:
    def test_second_requests(self, make, cloud):
        cloud.hold |= set(BOTH)
        engine = make(zones=BOTH)
        cell = engine.cells[0]
        for zone in BOTH:
            make(zones=[zone]).executor.submit(cell)
        job = engine.executor.jobs()[cell.name]
        assert job.where == BOTH[0]
        (note,) = engine.executor.reconcile(engine.executor.jobs())
        assert "us-test1-b" in note
        wait(lambda: states(cloud) == [(BOTH[0], "WAITING_FOR_RESOURCES")])

    def test_a_slice_that_did_not_delete_itself(self, make, cloud):
        cloud.deny_delete = 10**6
        cloud.grace = 0.5  # a host that deletes its slice does not stop for SIGTERM
        cloud.environment["RETRY_SECONDS"] = "1"
        engine = make()
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        wait(lambda: cloud.rest)
        assert engine.executor.reconcile(engine.executor.jobs()) == []  # it may take a moment
        heartbeat = engine.layout.cell(cell.name) / "heartbeat.json"
        values = json.loads(heartbeat.read_text())
        heartbeat.write_text(json.dumps(values | {"time": time.time() - 601}))
        (note,) = engine.executor.reconcile(engine.executor.jobs())
        assert "had not deleted itself" in note
        until_gone(engine, cell)
        assert "needs the permission tpu.nodes.delete on project test-project" in logs(engine, cell)

    def test_a_slice_that_is_there_too_long(self, make, cloud):
        engine = make(max_run_hours=2.0)
        cell = started(engine, "hang")
        request = cloud.the(engine.job(cell.name))
        request.node_time -= 3600 * 2.9
        assert engine.executor.reconcile(engine.executor.jobs()) == []
        request.node_time -= 3600 * 0.2
        (note,) = engine.executor.reconcile(engine.executor.jobs())
        assert "active for 3.1 h, more than max_run_hours and one more" in note
        until_gone(engine, cell)

    def test_google_refuses_a_deletion(self, make, cloud):
        cloud.hold.add(BOTH[0])
        engine = make()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        cloud.fail(engine.job(cell.name), "late")
        cloud.errors += [("DeleteQueuedResource", None, grpc.StatusCode.FAILED_PRECONDITION, "not now")] * 2
        (note,) = engine.executor.reconcile(engine.executor.jobs())
        assert "not now" in note
        with pytest.raises(SubmitError, match="not now"):
            engine.executor.cancel([cell.name])


class TestStartup:
    def test_the_slice_deletes_itself_though_at_first_it_may_not(self, make, cloud):
        cloud.deny_delete = 2
        engine = make()
        engine.executor.prepare()
        engine.executor.submit(engine.cells[0])
        until_gone(engine, engine.cells[0])
        assert cloud.rest == [403, 403, 200]
        assert "DeleteQueuedResource" not in cloud.calls
        assert now(engine, engine.cells[0]).state == "done"

    def test_what_training_is_told(self, make, cloud):
        engine = make()
        cell = started(engine, "hang")
        record = json.loads((engine.layout.cell(cell.name) / "attempts" / "000.json").read_text())
        assert record["job"] == engine.executor.jobs()[cell.name].id
        environment = Path(f"/proc/{engine.processes(cell.name)[0]}/environ").read_text().split("\0")
        assert f"GQA_JAX_COMMIT={packed_commit(Path(engine.layout.root))}" in environment

    def test_setup_that_fails(self, make, cloud):
        """Though the line after it would not, and the condition is asked for."""
        engine = make(setup=["echo 'all \"is\" lost'", "false", "true"])
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert 200 in cloud.rest
        found = now(engine, cell)
        assert (found.state, found.failure, found.attempts) == ("failed", "infrastructure", 0)
        assert "the lines of the option 'setup' ended with code 1: all \"is\" lost" in found.cause
        assert found.runnable
        assert 'all "is" lost' in logs(engine, cell)

    def test_a_damaged_bundle(self, make, cloud):
        engine = make()
        engine.executor.prepare()
        cell = engine.cells[0]
        (path,) = (Path(engine.layout.root) / "code").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert "is damaged" in now(engine, cell).cause
        assert attempts(engine, cell) == 0

    def test_no_bundle(self, make, cloud):
        engine = make()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert "could not be copied" in now(engine, cell).cause

    def test_a_disk_that_cannot_be_written(self, make, cloud):
        """Nothing can be left behind then, but the slice goes."""
        cloud.environment["HOST_FOLDER"] = "/proc/gqa_jax"
        engine = make()
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert 200 in cloud.rest

    def test_no_python(self, make, cloud, monkeypatch):
        engine = make()
        monkeypatch.setattr(TrainingCell, "command", lambda *_, **__: ["/nowhere/python"])
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert "training could not be started (code 127)" in now(engine, cell).cause

    def test_a_module_that_is_missing(self, make, cloud, tmp_path):
        """Nothing of training can say so: one import on the host does."""
        with tarfile.open(fileobj=io.BytesIO(bundle.pack()), mode="r:gz") as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        contents["gqa_jax/train.py"] = b"import nowhere"
        engine = make(behaviour=("silent",), bundle=os.fspath(bundle.make(tmp_path / "made", bundle._tar(contents)).path))
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        cause = "training can't be imported: ModuleNotFoundError: No module named 'nowhere'"
        assert cause in now(engine, cell).cause
        assert 200 in cloud.rest

    def test_the_environment_is_made_once(self, make, cloud):
        """At another boot too; of the bundle's own files, by uv as it is pinned."""
        uv, pip = cloud.folder / "uv", cloud.folder / "bin" / "python3"
        uv.write_text(
            f'#!/bin/bash\nset -e\necho "$@" >>{cloud.folder}/uv.txt\n'
            f'[ "$1" = venv ] && mkdir -p "${{@: -1}}/bin" && ln -s {sys.executable} "${{@: -1}}/bin/python"\ntrue\n'
        )
        pip.write_text(
            f'#!/bin/bash\n(echo python3 "${{@:1:$#-1}}"; cat) >>{cloud.folder}/pip.txt\n'
            f'folder="${{@: -1}}" && folder="${{folder#--target=}}/bin" && mkdir -p "$folder" && cp {uv} "$folder"\n'
        )
        uv.chmod(0o755)
        pip.chmod(0o755)
        cloud.n_hosts = 1
        engine = make(python=None)
        cell = engine.cells[0]
        behave(engine.layout, cell, "hang")
        engine.executor.prepare()
        engine.executor.submit(cell)
        wait(lambda: (engine.layout.cell(cell.name) / "heartbeat.json").exists())
        calls = (cloud.folder / "uv.txt").read_text().splitlines()
        assert len(calls) == 2
        assert calls[0].startswith("venv --quiet --python 3.12 ")
        assert calls[1].endswith("/code[tpu,gcs]")
        assert "/code/constraints.txt" in calls[1]
        cloud.reboot(engine.job(cell.name))
        wait(lambda: attempts(engine, cell) == 2)
        assert (cloud.folder / "uv.txt").read_text().splitlines() == calls
        assert (cloud.folder / "pip.txt").read_text() == f"{shlex.join(bundle.INSTALL_UV)}\n{bundle.UV}\n"

    def test_the_environment_cannot_be_made(self, make, cloud):
        uv = cloud.folder / "bin" / "uv"
        uv.write_text("#!/bin/bash\necho no network >&2\nexit 2\n")
        uv.chmod(0o755)
        engine = make(python=None)
        engine.executor.prepare()
        cell = engine.cells[0]
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert "the Python environment could not be made: no network" in now(engine, cell).cause

    def test_a_reboot_goes_on(self, make, cloud):
        engine = make()
        cell = started(engine, "hang", "finish")
        cloud.reboot(engine.job(cell.name))
        until_gone(engine, cell)
        assert now(engine, cell).state == "done"
        assert attempts(engine, cell) == 2
        assert cloud.calls.count("CreateQueuedResource") == 1

    def test_a_reboot_after_the_end_trains_nothing(self, make, cloud):
        engine = make()
        cell = engine.cells[0]
        engine.executor.prepare()
        engine.executor.submit(cell)
        hosts = cloud.the(engine.job(cell.name)).hosts
        until_gone(engine, cell)
        for host in hosts:
            host.boot()
            assert host.process.wait(20) == 0
        assert attempts(engine, cell) == 1
        assert cloud.rest[-1] == 404  # asked for the deletion again
        assert "has ended before this boot" in logs(engine, cell)

    def test_one_at_a_time(self, make, cloud):
        engine = make()
        cell = started(engine, "hang")
        host = cloud.the(engine.job(cell.name)).hosts[0]
        second = subprocess.run(
            ["bash", host.folder / "startup.sh"], env=host.environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert "another startup script runs" in second.stdout
        assert len(engine.processes(cell.name)) == 2
        assert cloud.rest == []

    def test_max_run(self, make, cloud):
        engine = make(behaviour=("hang",), max_run_hours=3 / 3600)
        cell = engine.cells[0]
        engine.executor.prepare()
        engine.executor.submit(cell)
        until_gone(engine, cell)
        assert now(engine, cell).runnable
        assert "max_run_hours are over" in logs(engine, cell)
        assert 200 in cloud.rest

    def test_training_that_ends_with_75_is_started_again_on_the_spot(self, make, cloud):
        engine = make()
        cell = started(engine, "hang", "finish")
        for pid in engine.processes(cell.name):
            os.kill(pid, signal.SIGTERM)
        until_gone(engine, cell)
        assert now(engine, cell).state == "done"
        assert attempts(engine, cell) == 2
        assert cloud.calls.count("CreateQueuedResource") == 1

    def test_the_metadata_announce_a_preemption(self, make, cloud):
        engine = make()
        cell = started(engine, "hang", "finish")
        cloud.the(engine.job(cell.name)).preempted.set()
        wait(lambda: not engine.processes(cell.name))
        assert now(engine, cell).state == "running"  # Google has not taken it yet
        assert json.loads((engine.layout.cell(cell.name) / "exit.json").read_text())["code"] == 75
        assert "is being preempted" in logs(engine, cell)
        assert (attempts(engine, cell), cloud.rest) == (1, [])

    def test_training_that_is_killed_on_one_host(self, make, cloud):
        engine = make()
        cell = started(engine, "hang", "finish")
        request = cloud.the(engine.job(cell.name))
        for pid in set(engine.processes(cell.name)) & set(request.hosts[1].pids()):
            os.kill(pid, signal.SIGKILL)
        until_gone(engine, cell)
        assert 200 in cloud.rest
        failure = json.loads((engine.layout.cell(cell.name) / "host-failure.json").read_text())
        assert (failure["class"], failure["job"]) == ("infrastructure", engine.job(cell.name))
        assert failure["reason"] == "host 1: training was ended by signal KILL, perhaps out of memory"

    def test_on_gs(self, cloud, tmp_path, gcs_root):
        """Logs, bundle and the reason of a failure go by Google's tool."""
        store = tmp_path / "gcs"
        cloud.environment["FAKE_GCS"] = os.fspath(store)
        layout, root = Layout(epath.Path(gcs_root)), store / gcs_root.removeprefix("gs://")
        values = OPTIONS | {"api_endpoint": f"http://127.0.0.1:{cloud.port}", "setup": ["sleep 0.5", "echo bad", "false"]}
        (cell, *_) = grid.cells(grid_fakes.small_grid())
        with base.make(values, layout) as one:
            one.sleep = lambda seconds: None
            one.prepare()
            (root / "code").mkdir(parents=True)
            (root / "code" / one.bundle.path.name).write_bytes(storage.read_bytes(one.bundle.path))
            one.submit(cell)
        wait(lambda: states(cloud) == [] and cloud.rest)
        folder = root / "cells" / cell.name
        assert "ended with code 1: bad" in json.loads((folder / "host-failure.json").read_text())["reason"]
        names = sorted(path.name for path in (folder / "logs").iterdir())
        assert [name.rpartition("-host-")[2] for name in names] == ["0.txt", "1.txt"]
        assert "ends with code 1" in (folder / "logs" / names[0]).read_text()


def packed_commit(root):
    """What COMMIT of the bundle says."""
    (path,) = (root / "code").iterdir()
    return subprocess.run(["tar", "-xzOf", path, "COMMIT"], capture_output=True, text=True, check=True).stdout.strip()


STEPS = 600  # more than a busy machine trains between a look at its heartbeat and the end of its slice


@pytest.mark.slow
def test_training_is_suspended_and_goes_on_in_another_slice(cloud, tmp_path):
    """End to end: `run` submits, two hosts train a small cell on CPUs, Google takes them away, `run` submits again."""
    cloud.grace = 60.0  # a loaded machine saves slowly
    cloud.environment["KILL_SECONDS"] = "60"
    image = tmp_path / "python"  # of an image: JAX would find a Cloud TPU's hosts by itself
    meet = '--coordinator="$JAX_COORDINATOR_ADDRESS" --processes="$JAX_NUM_PROCESSES" --process="$JAX_PROCESS_ID"'
    image.write_text(f'#!/bin/bash\nexec {sys.executable} "$@" {meet}\n')
    image.chmod(0o755)
    cache = os.environ.get("GQA_JAX_CACHE", str(Path.home() / ".cache" / "gqa_jax"))
    environment = {"JAX_PLATFORMS": "cpu", "GQA_JAX_CACHE": cache, allocation.VARIABLE: ""}  # a person's own word
    values = OPTIONS | {"python": str(image), "environment": environment, "api_endpoint": f"http://127.0.0.1:{cloud.port}"}
    configs = [grid_fakes.config(steps=STEPS)]
    (cell,) = cells = grid.cells(grid.Grid(name="one", configs=configs, contexts_served=[1024]))
    layout = Layout(epath.Path(tmp_path / "grid"))
    folder = layout.cell(cell.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cell.config.to_dict()))
    with base.make(values, layout) as one:
        one.sleep = lambda seconds: None
        one.check()
        one.prepare()

        def step():
            return (storage.read_json(folder / "heartbeat.json") or {}).get("step") or 0

        assert [job.cell for job in run.advance(cells, layout, one).submitted] == [cell.name]
        wait(lambda: step() > 3, 120.0)
        cloud.suspend(job_names.of(layout, cell.name))
        wait(lambda: run.advance(cells, layout, one).submitted)
        wait(lambda: run.look(cells, layout, one).states[0].state == "done", 120.0)
        wait(lambda: not one.jobs())
        text = "".join(path.read_text() for path in one.logs(cell.name))
    records = [storage.read_json(path) for path in sorted((folder / "attempts").glob("*.json"))]
    assert [record["first_step"] > 0 for record in records] == [False, True]
    assert [record["n_processes"] for record in records] == [2, 2]
    result, facts = storage.read_json(folder / "result.json"), storage.read_json(folder / "environment.json")
    assert (result["status"], result["step"]) == ("done", STEPS)
    assert facts["commit"] == packed_commit(Path(layout.root))
    assert len(one.logs(cell.name)) == 4  # of two hosts, twice
    assert f"resuming after step {records[1]['first_step']} of {STEPS}" in text
