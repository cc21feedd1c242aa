"""Cloud TPU without Google: the v2 API for the official client (gRPC), and the little HTTP that hosts need.

A request that becomes ACTIVE runs its startup script as local processes, one per host, with metadata of their own. What may
go wrong is a method or a field of `Cloud`. Not Google's: any credentials will do, and machines are there at once.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import grpc
from google.cloud import tpu_v2 as tpu
from google.cloud.location import locations_pb2
from google.cloud.tpu_v2.types import cloud_tpu
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2

STATE = cloud_tpu.QueuedResourceState.State
PROJECT, ZONES = "test-project", ("us-test1-a", "us-test1-b")
TYPES = {"v5litepod-4": [("V5LITE_POD", "2x2")], "v5litepod-8": [("V5LITE_POD", "2x4")], "v5p-16": [("V5P", "2x2x2")]}
IMAGES = ("v2-alpha-tpuv5-lite", "v2-alpha-tpuv5", "tpu-ubuntu2204-base")

# In the place of Google's tool: gs:// is a folder of this machine. Where there is none, it must not be called.
GCLOUD = """#!/bin/bash
[[ "$1 $2 $3" == "--quiet storage cp" && -n "${FAKE_GCS:-}" ]] || { echo "gcloud $*: not here" >&2; exit 1; }
from="${4/#gs:\\/\\//$FAKE_GCS/}" to="${5/#gs:\\/\\//$FAKE_GCS/}"
mkdir -p "$(dirname "$to")" && cp "$from" "$to"
"""


@dataclasses.dataclass
class Host:
    """A machine of a slice, as a session of processes."""

    folder: Path
    environment: dict[str, str]
    key: str  # in the address of its metadata
    number: int
    process: subprocess.Popen | None = None

    def boot(self):
        with open(self.folder / "console.txt", "ab") as console:
            self.process = subprocess.Popen(
                ["bash", self.folder / "startup.sh"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def pids(self):
        """Its living processes."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] != "Z" and int(fields[3]) == self.process.pid:
                        found.append(int(entry.name))
        return found

    def signal(self, what):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def down(self, grace):
        """Ends it as a shutdown does: SIGTERM to all, SIGKILL to what is left."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self.pids() and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.02)
        while self.pids():
            self.signal(signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()


class Request:
    """A queued resource and its machines."""

    def __init__(self, resource):
        self.resource = resource
        self.hosts = []
        self.preempted = threading.Event()
        self.node_time = None

    @property
    def state(self):
        return self.resource.state.state

    def set(self, state, **data):
        self.resource.state = cloud_tpu.QueuedResourceState(state=state, **data)


class Cloud:
    """Google's side. A context manager: what it started has ended after it."""

    def __init__(self, folder, hosts=2, environment=None):
        self.folder, self.n_hosts, self.environment = Path(folder), hosts, dict(environment or {})
        self.lock = threading.RLock()
        self.requests = {}  # name -> Request
        self.calls = []  # methods, as they came
        self.hold = set()  # zones that have no machines now: requests wait
        self.errors = []  # of the next calls: (method, zone or None, status code, message)
        self.slow_deletions = False  # while it is true none gets done
        self.deny_delete = 0  # deletions by hosts that are refused, from now
        self.grace = 20.0  # seconds that hosts have between SIGTERM and SIGKILL
        self.page = 2  # requests on a page of a listing
        self.rest = []  # status codes of deletions by hosts
        self._numbers = itertools.count()
        self._threads = []
        self._over = threading.Event()
        self._hosts = {}  # key -> (Host, Request)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "gcloud").write_text(GCLOUD)
        (self.folder / "bin" / "gcloud").chmod(0o755)
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._start(self._http.serve_forever, 0.05)
        self.http_port = self._http.server_address[1]
        self._grpc = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
        self._grpc.add_generic_rpc_handlers((_Service(self),))
        self.port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._grpc.stop(0).wait()
        self._http.shutdown()
        for thread in self._threads:
            thread.join()
        self._http.server_close()
        for host, _ in self._hosts.values():
            while host.pids():
                host.signal(signal.SIGKILL)
                time.sleep(0.01)
            host.process.wait()

    def _start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    # What happens

    def the(self, job):
        """The one request of that id."""
        with self.lock:
            (request,) = (r for name, r in self.requests.items() if name.endswith(f"/{job}"))
            return request

    def provision(self, request):
        """Its machines are there, and boot."""
        with self.lock:
            if request.state in (STATE.DELETING, STATE.FAILED):
                return
            (spec,) = request.resource.tpu.node_spec
            script = spec.node.metadata["startup-script"]
            number, port = next(self._numbers), _free_port()
            for i in range(self.n_hosts):
                key = f"{number}-{i}"
                folder = self.folder / "hosts" / key
                folder.mkdir(parents=True)
                (folder / "startup.sh").write_text(script)
                environment = {
                    "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
                    "HOME": os.fspath(folder),
                    "HOST_FOLDER": os.fspath(folder / "gqa_jax"),
                    "TPU_API": f"http://127.0.0.1:{self.http_port}",
                    "GCE_METADATA_HOST": f"127.0.0.1:{self.http_port}/{key}",
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(self.n_hosts),
                    "JAX_PROCESS_ID": str(i),
                    "RESTART_SECONDS": "0.2",
                    "LEAVE_SECONDS": "0.2",
                    "PRIMARY_SECONDS": "0.5",
                    "KILL_SECONDS": "20",
                    "LOG_SECONDS": "0.1",
                    "RETRY_SECONDS": "0",
                }
                host = Host(folder, environment | self.environment, key, i)
                request.hosts.append(host)
                self._hosts[key] = host, request
            request.node_time = time.time()
            request.set(STATE.ACTIVE)
            for host in request.hosts:
                host.boot()

    def suspend(self, job, announce=True):
        """Preemption. `announce`: the machines are told before."""
        request = self.the(job)
        with self.lock:
            by = cloud_tpu.QueuedResourceState.StateInitiator.SERVICE
            request.set(STATE.SUSPENDING, state_initiator=by)
        for host in request.hosts:
            host.signal(signal.SIGTERM if announce else signal.SIGKILL)
        for host in request.hosts:
            host.down(self.grace if announce else 0.0)
        with self.lock:
            if request.state == STATE.SUSPENDING:
                request.set(STATE.SUSPENDED, state_initiator=by)

    def fail(self, job, message):
        """No machines before it was too late."""
        with self.lock:
            data = cloud_tpu.QueuedResourceState.FailedData(error=status_pb2.Status(code=8, message=message))
            self.the(job).set(STATE.FAILED, failed_data=data)

    def reboot(self, job):
        for host in self.the(job).hosts:
            host.down(self.grace)
        for host in self.the(job).hosts:
            host.boot()

    def delete(self, request):
        with self.lock:
            request.set(STATE.DELETING)
        self._start(self._remove, request)

    def _remove(self, request):
        for host in request.hosts:
            host.signal(signal.SIGTERM)
        for host in request.hosts:
            host.down(self.grace)
        while self.slow_deletions and not self._over.is_set():
            time.sleep(0.02)
        with self.lock:
            self.requests = {name: r for name, r in self.requests.items() if r is not request}

    # What hosts ask over HTTP

    def metadata(self, key, path):
        host, request = self._hosts[key]
        match path:
            case "attributes/agent-worker-number":
                return str(host.number)
            case "service-accounts/default/token":
                return json.dumps({"access_token": f"token-{key}", "expires_in": 3599, "token_type": "Bearer"})
            case "preempted?wait_for_change=true":
                for _ in range(50):  # the real one waits for ever
                    if request.preempted.wait(0.1) or self._over.is_set():
                        break
                return "TRUE" if request.preempted.is_set() else "FALSE"
        return None

    def delete_by_host(self, name, force, token):
        """HTTP status of a host's DELETE."""
        with self.lock:
            request = self.requests.get(name)
            if not token.startswith("Bearer token-"):
                code = 401
            elif self.deny_delete > 0:
                self.deny_delete -= 1
                code = 403
            elif request is None:
                code = 404
            elif not force:
                code = 400
            else:
                if request.state != STATE.DELETING:
                    self.delete(request)
                code = 200
            self.rest.append(code)
            return code


def _handler(cloud):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self):
            key, _, path = self.path.lstrip("/").partition("/computeMetadata/v1/instance/")
            known = self.headers.get("Metadata-Flavor") == "Google"
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._answer(200 if known and (text := cloud.metadata(key, path)) is not None else 404, text if known else None)

        def do_DELETE(self):
            name, _, query = self.path.removeprefix("/v2/").partition("?")
            code = cloud.delete_by_host(name, query == "force=true", self.headers.get("Authorization") or "")
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._answer(code, json.dumps({"error": {"message": "denied"}} if code == 403 else {}))

        def _answer(self, code, text):
            self.send_response(code)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_):
            pass

    return Handler


class _Service(grpc.GenericRpcHandler):
    """The methods that the launcher calls."""

    def __init__(self, cloud):
        self.cloud = cloud

    def service(self, details):
        name = details.method.rpartition("/")[2]
        method = getattr(self, name, None)
        if method is None:
            return None
        kind = getattr(cloud_tpu, f"{name}Request", None)
        plain = {"ListLocations": locations_pb2.ListLocationsRequest, "GetOperation": operations_pb2.GetOperationRequest}
        read = kind.deserialize if kind else plain[name].FromString

        def answer(request, context):
            zone = getattr(request, "parent", getattr(request, "name", "")).split("/")[3:4]
            with self.cloud.lock:
                self.cloud.calls.append(name)
                for error in self.cloud.errors:
                    if error[0] in (name, None) and error[1] in (None, *zone):
                        self.cloud.errors.remove(error)
                        context.abort(*error[2:])
                if zone and zone[0] not in ZONES:
                    context.abort(grpc.StatusCode.NOT_FOUND, f"location {zone[0]} not found")
                return method(request, context)

        def write(message):
            return message.SerializeToString() if hasattr(message, "SerializeToString") else type(message).serialize(message)

        return grpc.unary_unary_rpc_method_handler(answer, request_deserializer=read, response_serializer=write)

    def CreateQueuedResource(self, call, context):
        name = f"{call.parent}/queuedResources/{call.queued_resource_id}"
        if name in self.cloud.requests:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} already exists")
        resource = call.queued_resource
        resource.name = name
        resource.create_time = {"seconds": int(time.time())}
        request = Request(resource)
        request.set(STATE.WAITING_FOR_RESOURCES)
        self.cloud.requests[name] = request
        if name.split("/")[3] not in self.cloud.hold:
            self.cloud._start(self.cloud.provision, request)
        return operations_pb2.Operation(name=f"{call.parent}/operations/create-{call.queued_resource_id}")

    def GetQueuedResource(self, call, context):
        if call.name not in self.cloud.requests:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{call.name} not found")
        return self.cloud.requests[call.name].resource

    def ListQueuedResources(self, call, context):
        found = [r.resource for name, r in sorted(self.cloud.requests.items()) if name.startswith(f"{call.parent}/")]
        start = int(call.page_token or 0)
        end = start + self.cloud.page
        more = str(end) if end < len(found) else ""
        return tpu.ListQueuedResourcesResponse(queued_resources=found[start:end], next_page_token=more)

    def ListNodes(self, call, context):
        nodes = [
            tpu.Node(
                name=f"{call.parent}/nodes/{r.resource.tpu.node_spec[0].node_id}",
                queued_resource=name,
                create_time={"seconds": int(r.node_time), "nanos": int(r.node_time % 1 * 1e9)},
            )
            for name, r in self.cloud.requests.items()
            if name.startswith(f"{call.parent}/") and r.node_time is not None
        ]
        return tpu.ListNodesResponse(nodes=nodes)

    def DeleteQueuedResource(self, call, context):
        request = self.cloud.requests.get(call.name)
        if request is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{call.name} not found")
        if request.state == STATE.DELETING:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{call.name} is being deleted")
        if request.state == STATE.ACTIVE and not call.force:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{call.name} has nodes")
        self.cloud.delete(request)
        return operations_pb2.Operation(name=f"{call.name}/operations/delete")

    def GetOperation(self, call, context):
        answer = any_pb2.Any()
        answer.Pack(empty_pb2.Empty())
        return operations_pb2.Operation(name=call.name, done=True, response=answer)

    def ListLocations(self, call, context):
        if call.name != f"projects/{PROJECT}":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"Permission denied on resource project {call.name}.")
        found = [locations_pb2.Location(name=f"{call.name}/locations/{zone}", location_id=zone) for zone in ZONES]
        return locations_pb2.ListLocationsResponse(locations=found)

    def ListAcceleratorTypes(self, call, context):
        zone = call.parent.rpartition("/")[2]
        types = TYPES if zone == ZONES[0] else {name: TYPES[name] for name in ("v5litepod-4", "v5litepod-8")}
        found = [
            tpu.AcceleratorType(
                name=f"{call.parent}/acceleratorTypes/{name}",
                type_=name,
                accelerator_configs=[tpu.AcceleratorConfig(type_=chip, topology=shape) for chip, shape in shapes],
            )
            for name, shapes in types.items()
        ]
        return tpu.ListAcceleratorTypesResponse(accelerator_types=found)

    def ListRuntimeVersions(self, call, context):
        found = [tpu.RuntimeVersion(name=f"{call.parent}/runtimeVersions/{image}", version=image) for image in IMAGES]
        return tpu.ListRuntimeVersionsResponse(runtime_versions=found)


def _free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
