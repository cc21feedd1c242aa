"""Cloud TPU: a queued resource per cell, by Google's own client.

Google's queue finds the machines; `tpu_startup.sh` runs on each of them, trains, and deletes the slice, whatever happens. The
id of a request is unique in its zone, so a request that is there is the claim on a cell. Of two zones that both have one, the
zone that comes first in `zones` keeps it.

Not tried with a Google Cloud account, only against a fake of the API: what quotas and reservations answer in words, how long
before a preemption the machines are told, how the images behave at boot, and several slices. README says more.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gqa_jax import errors, storage
from gqa_jax.errors import ConfigError
from gqa_jax.hardware.allocation import VARIABLE, Allocation
from gqa_jax.training import records, run_folder
from launch.cells import Cell
from launch.executors import base, bundle, job_names
from launch.executors.base import DEAD, LINGER_SECONDS, QUEUED, RUNNING, Job, Look, Rents, Submission, SubmitError

PROVISIONING = ("spot", "guaranteed", "reserved")
EXAMPLE_PROJECT = "my-project"  # of configs/clusters/tpu.toml
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
LOGIN = "log in: gcloud auth application-default login"
SCRIPT = Path(__file__).with_name("tpu_startup.sh")

CALL_SECONDS = 60.0  # that one call may take
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a call that failed for a moment is tried again, each times 0.5 to 1.5
AT_ONCE = 16  # calls side by side, where there is one per cell
OVERTIME_SECONDS = 3600.0  # beyond max_run_hours

# Google's states of a request. ACTIVE is RUNNING, since its first machine was made; these are QUEUED.
_QUEUED = {
    "CREATING": "being checked",
    "ACCEPTED": "accepted",
    "WAITING_FOR_RESOURCES": "waits for machines",
    "PROVISIONING": "its machines are being made",
    "SUSPENDING": "its machines are being taken away",
    "DELETING": "being deleted",
    "STATE_UNSPECIFIED": "of no known state",
}
_DEAD = ("SUSPENDED", "FAILED")  # `reconcile` deletes it, as it keeps name and quota until then
# QUEUED too: the machines may still save, and the name is taken, so the cell must not be started elsewhere and can't be here.
# It passes by itself, within minutes; `submit` meanwhile raises SubmitError.
_ENDING = ("SUSPENDING", "DELETING")


@dataclasses.dataclass(frozen=True)
class Options(bundle.Options):
    """Of configs/clusters/tpu.toml. `topology` is that of one slice."""

    least: ClassVar = {"slices": 1}
    forms: ClassVar = bundle.Options.forms | {
        "project": (r"[a-z][a-z0-9:.-]{3,60}[a-z0-9]", f'the id of a Google Cloud project, like "{EXAMPLE_PROJECT}"'),
        "zones": (r"[a-z]+-[a-z]+\d+-[a-z]\w*", 'like "us-west4-a"'),
        "tags": (r"[a-z][a-z0-9-]{0,62}", 'like "allow-internal"'),
        "service_account": (r"[^@\s]+@[\w.-]+\.gserviceaccount\.com", "an e-mail, NAME@PROJECT.iam.gserviceaccount.com"),
    }
    claims = ("project", "zones")

    project: str = ""  # id of the Google Cloud project that pays; its quota counts
    zones: list = dataclasses.field(default_factory=list)  # names, in order of preference
    slices: int = 1  # of a cell, of that topology each; more than one: joined by the data-centre network (multislice)
    provisioning: str = "spot"  # PROVISIONING: may be preempted; on demand; of a reservation
    reservation: str | None = None  # its name, with provisioning = "reserved"
    runtime_version: str | None = None  # image of the machines; None: that of the chip
    network: str | None = None  # VPC network; None: the project's default
    subnetwork: str | None = None
    external_ips: bool = True  # without them the network needs Cloud NAT for Python packages
    service_account: str | None = None  # e-mail; writes the bucket, deletes its slice; None: the project's default one
    labels: dict = dataclasses.field(default_factory=dict)  # of the machines, for the bill: name -> text
    tags: list = dataclasses.field(default_factory=list)  # network tags, for firewall rules
    valid_until_hours: float = 24.0  # that a request may wait; then it fails, and the next one goes to the next zone
    max_run_hours: float = 48.0  # of a slice, from its first training on; then training saves and the slice goes
    api_endpoint: str | None = None  # HOST of the API; None: tpu.googleapis.com; http://HOST:PORT: an emulator, without TLS

    def __post_init__(self):
        super().__post_init__()
        if self.slice is None or not self.slice.is_tpu:
            raise ConfigError(f'topology = {self.topology!r}: name the TPU slice of a cell, like "v5e:4x4"')
        if not self.zones or len(set(self.zones)) != len(self.zones):
            raise ConfigError(f'zones = {self.zones!r}: must be zones in order of preference, each once, like ["us-west4-a"]')
        for name, value in self.labels.items():
            fits = isinstance(value, str) and re.fullmatch(r"[a-z0-9_-]{0,63}", value)
            if not fits or not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name):
                raise ConfigError(f"labels.{name} = {value!r}: names and values have at most 63 of a-z, 0-9, _ and -")
        if self.provisioning not in PROVISIONING:
            raise ConfigError(f"provisioning = {self.provisioning!r}: {errors.closest(self.provisioning, PROVISIONING)}")
        if (self.provisioning == "reserved") != (self.reservation is not None):
            raise ConfigError(
                f'reservation = {self.reservation!r}: its name goes with provisioning = "reserved", and only with it'
            )
        for name in ("valid_until_hours", "max_run_hours"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")

    @property
    def allocation(self) -> Allocation:
        return Allocation.of_slices(self.slice, self.slices)

    @property
    def image(self) -> str:
        """Runtime version of the machines."""
        return self.runtime_version or self.slice.chip.tpu.image


def accelerator(topology: base.Slice) -> tuple[str, str | None]:
    """How the API names a slice: its accelerator type, and the type of the chip where the shape goes beside it.

    The count in the type says the shape of a flat slice (v5e, v6e). Of three dimensions (v4, v5p) it takes the default shape of
    the count; so these are asked for by chip and shape.
    """
    tpu = topology.chip.tpu
    has_three_dimensions = topology.shape.count("x") == 2
    return f"{tpu.accelerator}-{tpu.counted * topology.n_chips}", topology.chip.name.upper() if has_three_dimensions else None


@dataclasses.dataclass(frozen=True)
class _Request(Job):
    """A queued resource, as a listing shows it; `where` is its zone."""

    google: str = ""  # Google's state

    @property
    def lives(self) -> bool:
        return self.state != DEAD and self.google not in _ENDING


class Executor(bundle.Executor):
    """Cells as queued resources."""

    Options = Options
    machines = "the hosts of a slice"
    sleep = staticmethod(time.sleep)
    random = random.Random()

    @property
    def rents(self) -> Rents:
        """Of the first zone."""
        chips, region = self.options.slices * self.options.slice.n_chips, self.options.zones[0].rpartition("-")[0]
        return Rents(self.options.slice.chip.name, chips, self.options.provisioning == "spot", region)

    def __exit__(self, *_: object) -> None:
        if "_client" in self.__dict__:
            self._client.transport.close()

    # What is asked for

    def submission(self, cell: Cell) -> Submission:
        """The request for the zone that is asked first. Raises ConfigError."""
        options, job = self.options, job_names.of(self.layout, cell.name)
        zone = self._zones_for(cell.name)[0]
        request, folder = self._request(cell, zone), self.layout.cell(cell.name)
        kind, chip = accelerator(options.slice)
        shape = options.slice.shape
        argv = ["gcloud", "compute", "tpus", "queued-resources", "create", job]
        argv += [f"--project={options.project}", f"--zone={zone}"]
        argv += [f"--accelerator-type={kind}"] if chip is None else [f"--type={options.slice.chip.name}", f"--topology={shape}"]
        argv += [f"--runtime-version={options.image}"]
        argv += [f"--node-id={job}"] if options.slices == 1 else [f"--node-count={options.slices}", f"--node-prefix={job}"]
        tiers = {"spot": ["--spot"], "guaranteed": [], "reserved": ["--reserved", f"--reservation={options.reservation}"]}
        argv += tiers[options.provisioning]
        argv += [f"--valid-until-duration={_seconds(options.valid_until_hours)}s", f"--scopes={SCOPE}"]
        argv += [] if options.service_account is None else [f"--service-account={options.service_account}"]
        argv += [f"--metadata-from-file=startup-script={folder / 'startup.sh'}"]
        script = request["queued_resource"]["tpu"]["node_spec"][0]["node"]["metadata"]["startup-script"]
        text = json.dumps(request, indent=1) + "\n"
        return Submission(cell.name, shlex.join(argv), {"queued-resource.json": text, "startup.sh": script})

    def _request(self, cell: Cell, zone: str) -> dict[str, Any]:
        """Arguments of `create_queued_resource`, as JSON."""
        options, job, parent = self.options, job_names.of(self.layout, cell.name), self._parent(zone)
        kind, chip = accelerator(options.slice)
        node: dict[str, Any] = {"runtime_version": options.image}
        if chip is None:
            node["accelerator_type"] = kind
        else:
            node["accelerator_config"] = {"type_": chip, "topology": options.slice.shape}
        node["network_config"] = {"enable_external_ips": options.external_ips}
        node["network_config"] |= {name: value for name in ("network", "subnetwork") if (value := getattr(options, name))}
        node["service_account"] = {"scope": [SCOPE]}
        if options.service_account is not None:
            node["service_account"]["email"] = options.service_account
        grid = re.sub(r"[^a-z0-9_-]+", "-", os.fspath(self.layout.root).rstrip("/").rpartition("/")[2].lower())[:63]
        node["labels"] = options.labels | {"gqa-jax-grid": grid, "gqa-jax-cell": cell.name}
        if options.tags:
            node["tags"] = list(options.tags)
        node["metadata"] = {"startup-script": self._script(cell, zone)}
        spec: dict[str, Any] = {"parent": parent, "node": node}
        if options.slices == 1:
            spec["node_id"] = job
        else:
            spec["multislice_params"] = {"node_count": options.slices, "node_id_prefix": job}
        resource: dict[str, Any] = {"tpu": {"node_spec": [spec]}}
        resource["queueing_policy"] = {"valid_until_duration": {"seconds": _seconds(options.valid_until_hours)}}
        resource["spot" if options.provisioning == "spot" else "guaranteed"] = {}
        if options.provisioning == "reserved":
            resource["reservation_name"] = f"{parent}/reservations/{options.reservation}"
            node["scheduling_config"] = {"reserved": True}
        return {"parent": parent, "queued_resource_id": job, "queued_resource": resource}

    def _script(self, cell: Cell, zone: str) -> str:
        """tpu_startup.sh with the settings of a cell."""
        options, code = self.options, self.bundle
        self.check_inputs(cell)
        python = options.python or "../env/bin/python"  # seen from the folder of the code
        command = [*cell.command(self.layout.cell(cell.name), python, "."), "--distributed=on"]
        endpoint = (options.api_endpoint or "tpu.googleapis.com").removeprefix("http://")
        values = {
            "JOB": job_names.of(self.layout, cell.name),
            "PROJECT": options.project,
            "ZONE": zone,
            "ENDPOINT": endpoint,
            "SLICES": str(options.slices),
            "FOLDER": os.fspath(self.layout.cell(cell.name)),
            "BUNDLE": os.fspath(code.path),
            "SHA256": code.sha256,
            "OWN_PYTHON": options.python or "",
            "SETUP": "\n".join(options.setup),
            "MAX_RUN_SECONDS": str(_seconds(options.max_run_hours)),
            "UV": bundle.UV,
        }
        lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
        lines += [f"INSTALL_UV=({shlex.join(bundle.INSTALL_UV)})", f"COMMAND=({shlex.join(command)})"]
        variables = {VARIABLE: str(options.allocation)} | options.environment
        lines += [f"VARIABLES=({shlex.join(f'{name}={value}' for name, value in variables.items())})"]
        before, mark, after = SCRIPT.read_text().partition("# @settings@\n")
        assert mark
        return before + "\n".join(lines) + "\n" + after

    # Before anything is submitted

    def check(self) -> None:
        """Raises ConfigError: no client or credentials; a project, zone, slice or image that Google does not know; root; code.

        What is not asked: quota, whether the service account exists and may delete the slice and write to the bucket.
        """
        options = self.options
        if options.project == EXAMPLE_PROJECT and options.api_endpoint is None:
            raise ConfigError(f'project = "{EXAMPLE_PROJECT}" is the example: write the id of yours (gcloud projects list)')
        if f"@{EXAMPLE_PROJECT}." in (options.service_account or ""):
            raise ConfigError(
                f'service_account = "{options.service_account}" is the example: write the e-mail of yours (gcloud iam '
                "service-accounts list; README says which roles it needs)"
            )
        self.check_root()
        self.check_bundle()
        request = {"name": f"projects/{options.project}", "page_size": 500}
        ask = lambda: self._client.list_locations(request=request, timeout=CALL_SECONDS)  # noqa: E731
        listed = self._ask(f"Google was asked for the zones of {options.project}", ask)
        known = {location.location_id for location in listed.locations}
        kind, chip = accelerator(options.slice)
        shape = options.slice.shape
        for zone in options.zones:
            if zone not in known:
                close = errors.closest(zone, sorted(known))
                raise ConfigError(f"zone {zone} of zones has no Cloud TPU for project {options.project}: {close}")
        has = {zone: self._accelerators(zone) for zone in options.zones}
        for zone in options.zones:
            if not {kind, (chip, shape)} & has[zone]:
                others = sorted(zone for zone in known - has.keys() if {kind, (chip, shape)} & self._accelerators(zone))
                others = [zone for zone in options.zones if {kind, (chip, shape)} & has[zone]] + others
                names = sorted(name for name in has[zone] if isinstance(name, str))
                where = f"there are some in {', '.join(others)}" if others else errors.closest(kind, names)
                raise ConfigError(f"topology = {options.topology!r} is {kind}, which zone {zone} does not have: {where}")
            images = {version.version for version in self._list("runtime_versions", zone)}
            if options.image not in images:
                close = errors.closest(options.image, sorted(images))
                raise ConfigError(f"runtime_version = {options.image!r} is not in zone {zone}: {close}")

    def _accelerators(self, zone: str) -> set[str | tuple[str, str]]:
        """Accelerator types of a zone, and the (chip, shape) that may be asked for."""
        found: set[str | tuple[str, str]] = set()
        for kind in self._list("accelerator_types", zone):
            found |= {kind.type_} | {(shape.type_.name, shape.topology) for shape in kind.accelerator_configs}
        return found

    # Jobs

    def submit(self, cell: Cell) -> Job:
        """Asks the zones in turn. Raises SubmitError when none takes it now, or while an ended request still has the name."""
        from google.api_core import exceptions

        job, refusals = job_names.of(self.layout, cell.name), []
        if len(self.options.zones) > 1 and (there := self._one(cell.name)) is not None:
            return there
        for zone in self._zones_for(cell.name):
            create = functools.partial(self._create, self._request(cell, zone))
            try:
                self._ask(f"zone {zone} was asked for {job}", create, exceptions.AlreadyExists, exceptions.ResourceExhausted)
            except exceptions.AlreadyExists:
                pass
            except exceptions.ResourceExhausted as error:
                refusals.append(f"{zone}: {_words(error)}")
                continue
            if (mine := self._one(cell.name)) is None:
                raise SubmitError(f"{cell.name} ended, or was deleted, as soon as it was submitted: look at its logs")
            return mine
        raise SubmitError(f"no zone has room for {cell.name}: {'; '.join(refusals)}")

    def _create(self, request: Mapping[str, Any]) -> None:
        from google.api_core import exceptions

        operation = self._client.create_queued_resource(request=request, timeout=CALL_SECONDS).operation
        if operation.HasField("error"):  # refused before it was queued
            raise exceptions.from_grpc_status(operation.error.code, operation.error.message)

    def _zones_for(self, cell: str) -> list[str]:
        """The zones, the one to ask first at their front: the next one where the last request led to no training, or to a
        fault of its machines.
        """
        zones, folder = list(self.options.zones), self.layout.cell(cell)
        if len(zones) == 1 or self.layout.unseen:
            return zones
        submissions, attempts = storage.names(folder / "submissions"), storage.names(folder / "attempts")
        if not submissions:
            return zones
        last = records.read(folder / "submissions" / submissions[-1])
        began = records.read(folder / "attempts" / attempts[-1]).get("time", 0.0) if attempts else 0.0
        if last.get("where") not in zones:
            return zones
        failed = max(run_folder.failures(folder), default=0.0)
        first = zones.index(last["where"]) + (began < last.get("time", 0.0) or failed > last.get("time", 0.0))
        return zones[first:] + zones[:first]

    def _one(self, cell: str) -> Job | None:
        """The request of a cell that lives, in the earliest of the zones; those in later ones are deleted.

        Raises SubmitError while there is one that has ended, or is ending: its machines may still save.
        """
        from google.api_core import exceptions

        found = []
        for zone in self.options.zones:
            get = functools.partial(self._client.get_queued_resource, name=self._name(cell, zone))
            with contextlib.suppress(exceptions.NotFound):
                request = self._ask(f"zone {zone} was asked for the request of {cell}", get, exceptions.NotFound)
                found.append(self._read(request, {}))
        living = [request for request in found if request.lives]
        for request in living[1:]:
            self._delete(request.cell, request.where)
        if living:
            return living[0]
        if found:
            old = found[0]
            raise SubmitError(f"the request of {cell} before this one is {old.google} in {old.where}: a later pass starts it")
        return None

    def jobs(self) -> Look:
        found: dict[str, Job] = {}
        requests = self._requests()
        for request in sorted(requests, key=lambda r: (not r.lives, r.state == DEAD)):  # stable: by zone within these
            found.setdefault(request.cell, request)
        return Look(found, requests)

    def cancel(self, cells: Sequence[str]) -> None:
        """Asks for the deletion of the requests of these cells, in all zones, and does not wait for it. Raises SubmitError."""
        wanted = [request for request in self._requests(cells) if request.google != "DELETING"]
        errors = []
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            for deletion in [pool.submit(self._delete, request.cell, request.where) for request in wanted]:
                if (error := deletion.exception()) is not None:
                    errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else SubmitError("; ".join(map(str, errors)))

    def reconcile(self, jobs: Look) -> list[str]:
        """Deletes requests that ended, second ones of a cell, and slices that should have deleted themselves."""
        now, kept, why = time.time(), set(), []
        requests: list[_Request] = jobs.listed
        active = [request for request in requests if request.state == RUNNING]
        done = storage.each(lambda r: self._is_long_done(r.cell, now), active, remote=storage.is_remote(self.layout.root))
        idle = {(r.cell, r.where) for r, over in zip(active, done, strict=True) if over}
        most = self.options.max_run_hours * 3600 + OVERTIME_SECONDS
        for request in requests:
            if request.state == DEAD:
                why.append((request, request.detail))
            elif request.google in _ENDING:
                continue
            elif request.cell in kept:
                why.append((request, "an earlier zone has it too"))
            else:
                kept.add(request.cell)
                if (request.cell, request.where) in idle:
                    why.append((request, "its cell is done, and it had not deleted itself"))
                elif request.since is not None and now - request.since > most:
                    why.append(
                        (request, f"active for {(now - request.since) / 3600:.1f} h, more than max_run_hours and one more")
                    )
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda each: self._removed(*each), why))

    def _removed(self, request: _Request, why: str) -> str:
        try:
            self._delete(request.cell, request.where)
        except SubmitError as error:
            return f"{request.cell} in {request.where} is to be deleted ({why}), but {error}"
        return f"deleted the request of {request.cell} in {request.where}: {why}"

    def _is_long_done(self, cell: str, now: float) -> bool:
        folder = self.layout.cell(cell)
        if "result.json" not in storage.names(folder):
            return False
        last = records.read(folder / "heartbeat.json").get("time", 0.0)
        return abs(now - last) > LINGER_SECONDS  # in the future: by a clock that was ahead

    # The API

    @functools.cached_property
    def _client(self) -> Any:
        tpu = _package()
        endpoint = self.options.api_endpoint
        if endpoint is not None and endpoint.startswith("http://"):
            import grpc
            from google.cloud.tpu_v2.services.tpu.transports.grpc import TpuGrpcTransport

            return tpu.TpuClient(transport=TpuGrpcTransport(channel=grpc.insecure_channel(endpoint.removeprefix("http://"))))
        import google.auth
        from google.auth import exceptions

        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        except exceptions.GoogleAuthError as error:
            raise ConfigError(f"no Google credentials can be used ({_line(str(error))}); {LOGIN}") from error
        return tpu.TpuClient(credentials=credentials, client_options={"api_endpoint": endpoint} if endpoint else None)

    def _parent(self, zone: str) -> str:
        return f"projects/{self.options.project}/locations/{zone}"

    def _name(self, cell: str, zone: str) -> str:
        return f"{self._parent(zone)}/queuedResources/{job_names.of(self.layout, cell)}"

    def _list(self, what: str, zone: str) -> list[Any]:
        """All pages of a listing. Raises SubmitError, ConfigError."""
        listing = getattr(self._client, f"list_{what}")
        ask = lambda: list(listing(parent=self._parent(zone), timeout=CALL_SECONDS))  # noqa: E731
        return self._ask(f"Google was asked for the {what.replace('_', ' ')} of {zone}", ask)

    def _requests(self, cells: Iterable[str] | None = None) -> list[_Request]:
        """Requests of this grid in all zones, in their order; of these cells alone. Raises SubmitError, ConfigError."""
        prefix, wanted = job_names.prefix(self.layout), None if cells is None else set(cells)

        def of(zone: str) -> list[_Request]:
            listed = self._list("queued_resources", zone)
            ours = [request for request in listed if request.name.rpartition("/")[2].startswith(prefix)]
            made = {}
            if any(request.state.state.name == "ACTIVE" for request in ours):  # a request does not say since when
                for node in self._list("nodes", zone):
                    at = node.create_time.timestamp() if node.create_time else None
                    made[node.queued_resource.rpartition("/")[2]] = at
            found = [self._read(request, made) for request in ours]
            return [request for request in found if wanted is None or request.cell in wanted]

        self._client  # noqa: B018 (one for all threads)
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            return [request for several in pool.map(of, self.options.zones) for request in several]

    def _read(self, request: Any, made: Mapping[str, float | None]) -> _Request:
        parts, state = request.name.split("/"), request.state.state.name
        zone, job = parts[3], parts[5]
        detail = f"{_QUEUED.get(state, '')} in {zone}"
        if state == "FAILED":
            error = request.state.failed_data.error.message
            detail = f"Google could not fulfil it in {zone}: {_line(error) or 'no machines before valid_until_hours were over'}"
        elif state == "SUSPENDED":
            by = "by a user" if request.state.state_initiator.name == "USER" else "by Google (preemption)"
            detail = f"its machines in {zone} were taken away {by}"
        elif state == "ACTIVE":
            detail = ""
        since = made.get(job) if state == "ACTIVE" else None
        here = DEAD if state in _DEAD else RUNNING if state == "ACTIVE" else QUEUED
        return _Request(job.removeprefix(job_names.prefix(self.layout)), job, here, detail, since, zone, state)

    def _delete(self, cell: str, zone: str) -> None:
        """Asks for a deletion, machines and all. Raises SubmitError, ConfigError; one that is gone is no error."""
        from google.api_core import exceptions

        request = {"name": self._name(cell, zone), "force": True}
        delete = functools.partial(self._client.delete_queued_resource, request=request, timeout=CALL_SECONDS)
        not_now = exceptions.FailedPrecondition, exceptions.Aborted  # not in this state, or it is being deleted
        try:
            self._ask(f"{cell} in {zone} was to be deleted", delete, exceptions.NotFound, *not_now)
        except exceptions.NotFound:
            return
        except not_now as error:
            raise SubmitError(f"{cell} in {zone} can't be deleted now: {_words(error)}; try again in a few minutes") from error

    def _ask[T](self, what: str, function: Callable[[], T], *expected: type[Exception]) -> T:
        """`function()`, tried again after what passes by itself.

        Raises what is `expected` as it is, all else that Google answers as SubmitError or ConfigError, in words after `what`.
        """
        from google.api_core import exceptions
        from google.auth import exceptions as auth

        self._client  # noqa: B018 (its ConfigError is nothing to repeat)
        project, pauses = self.options.project, iter(PAUSES)
        fixes = {
            exceptions.Unauthenticated: LOGIN,
            exceptions.PermissionDenied: f"you need the roles TPU Admin on project {project} and Service Account User on "
            "service_account, and the project the Cloud TPU API: "
            f"gcloud services enable tpu.googleapis.com --project={project}",
            exceptions.NotFound: "correct project, zones or reservation",
            exceptions.InvalidArgument: "correct the option that it names",
        }
        while True:
            try:
                return function()
            except expected as error:
                if not _is_rate_limit(error) or (pause := next(pauses, None)) is None:
                    raise
            except (exceptions.ServiceUnavailable, exceptions.DeadlineExceeded, exceptions.ResourceExhausted) as error:
                is_brief = not isinstance(error, exceptions.ResourceExhausted) or _is_rate_limit(error)
                if not is_brief or (pause := next(pauses, None)) is None:
                    raise SubmitError(f"{what}, and it answered: {_words(error)}") from error
            except (auth.RefreshError, auth.DefaultCredentialsError) as error:
                raise ConfigError(f"{what}, but the Google credentials can't be used ({_line(str(error))}); {LOGIN}") from error
            except auth.TransportError as error:
                raise SubmitError(f"{what}, but it is not reached: {_line(str(error))}") from error
            except exceptions.GoogleAPIError as error:
                if (fix := next((fix for kind, fix in fixes.items() if isinstance(error, kind)), None)) is not None:
                    raise ConfigError(f"{what}, and it answered: {_words(error)}; {fix}") from error
                raise SubmitError(f"{what}, and it answered: {_words(error)}") from error
            self.sleep(pause * self.random.uniform(0.5, 1.5))


def _package() -> Any:
    """Google's client. Raises ConfigError without it."""
    try:
        from google.cloud import tpu_v2
    except ImportError as error:
        raise ConfigError("Cloud TPU needs google-cloud-tpu: pip install 'gqa-jax[cluster]'") from error
    return tpu_v2


def _is_rate_limit(error: Exception) -> bool:
    """Whether too much was asked in a minute, and not too many machines."""
    return getattr(error, "reason", None) == "RATE_LIMIT_EXCEEDED" or bool(re.search(r"(?i)per minute|rate limit", str(error)))


def _words(error: Exception) -> str:
    """Google's words: "RESOURCE_EXHAUSTED: ..."."""
    code = getattr(error, "grpc_status_code", None)
    return f"{code.name if code else type(error).__name__}: {_line(getattr(error, 'message', None) or str(error))}"


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


def _seconds(hours: float) -> int:
    return max(1, round(hours * 3600))
