"""What the compiler says that a training step needs, on devices that are not here: `python -m gqa_jax.planning.compile_check`.

A job is a resolved configuration and the name of a slice (`gqa_jax.hardware`). `Compilers` compiles jobs in processes of their
own, so that importing this module imports no jax, and a compiler that dies takes nothing along. Answers are kept by content
under $GQA_JAX_CACHE/plans: the same program is compiled once, whatever the cell is called.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from gqa_jax import hardware, storage
from gqa_jax.config import TrainConfig

PACKAGE = Path(__file__).resolve().parent.parent
#: Files of the package that a compiled step may be made from; the rest changes no program.
SOURCES = ("*.py", "attention/**/*.py", "hardware/*.py", "planning/*.py", "training/*.py")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
#: Top-level fields of a configuration that no program depends on: constants and what happens beside the step.
BESIDE = (
    "checkpoint", "continue_from", "evaluation", "label", "logging", "optimizer", "seed", "steps", "tokens", "tokens_per_param",
)  # fmt: skip

QUICK_MARGIN = 1.04  # on the temporaries of a program compiled at O1
DOUBT = 0.1  # of the memory: nearer than that to the limit, the program that runs is compiled


@dataclasses.dataclass(frozen=True)
class CompileCheck:
    """The compiler's answer for one device of a slice. Bytes are None where it gave up before it knew."""

    topology: str
    fits: bool
    bytes_limit: float
    bytes_arguments: int | None = None
    bytes_output: int | None = None
    bytes_alias: int | None = None  # of the output, in the place of arguments
    bytes_temporary: int | None = None
    bytes_host: int | None = None  # offloaded
    bytes_needed: float | None = None  # in all, of a program that is too large, as the compiler says it
    seconds_compile: float | None = None
    attention: str | None = None  # the implementation that was compiled
    optimization: str | None = None  # level of the compiler: O2 makes the program that runs
    error: str | None = None

    @property
    def bytes_used(self) -> int | None:
        """Arguments, temporaries and what of the output has a place of its own; None where the compiler gave up."""
        if self.bytes_arguments is None:
            return None
        return self.bytes_arguments + self.bytes_output - self.bytes_alias + self.bytes_temporary

    @property
    def is_final(self) -> bool:
        """Whether compiling again would say the same: too large is final, a compiler that died is not."""
        return self.error is None or self.bytes_needed is not None


def key(config: TrainConfig, topology: str, exact: bool) -> str:
    """Hash of everything that the answer depends on."""
    values = config.to_dict()
    for name in BESIDE:
        del values[name]
    values["data"] = {"document_mask": config.data.document_mask}
    content = {"config": values, "topology": topology, "exact": exact, "versions": _versions(), "sources": _sources()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def cached(config: TrainConfig, topology: str, exact: bool = False) -> CompileCheck | None:
    """The answer from an earlier compilation of the same program, if there is one; an exact one serves for both."""
    for kept in (True,) if exact else (True, False):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            return CompileCheck(**json.loads(_path(config, topology, kept).read_text()))
    return None


class Compilers:
    """Processes that compile, at most `workers` at a time; each is started when it is first needed."""

    def __init__(self, workers: int):
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_) -> None:
        """Ends the processes, also in the middle of a compilation; what was compiled is kept."""
        self._stopped = True
        for process in self._processes:
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def submit(self, config: TrainConfig, topology: str, exact: bool = False) -> concurrent.futures.Future[CompileCheck]:
        """Compiles the step of `config`, resolved, for `topology`, unless it is known (`check`).

        Raises ValueError without a compiler.
        """
        hardware.find(topology).require_compiler()
        return self._pool.submit(self._checked, config, topology, exact)

    def _checked(self, config: TrainConfig, topology: str, exact: bool) -> CompileCheck:
        if (known := cached(config, topology, exact)) is not None:
            return known
        process = self._process()
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"config": config.to_dict(), "topology": topology, "exact": exact}) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        if reply:
            return CompileCheck(**json.loads(reply))
        code = process.wait()
        self._own.process = None
        error = "stopped" if self._stopped else f"the compiler ended with exit code {code}"
        return CompileCheck(topology, False, hardware.find(topology).chip.memory_bytes, error=error)

    def _process(self) -> subprocess.Popen:
        process = getattr(self._own, "process", None)
        if process is None:
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
            environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), environment.get("PYTHONPATH", "")])
            process = subprocess.Popen(
                [sys.executable, "-m", "gqa_jax.planning.compile_check"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the launcher, which ends its compilers
            )
            self._own.process = process
            self._processes.append(process)
        return process


def _path(config: TrainConfig, topology: str, exact: bool) -> Path:
    return storage.cache("plans") / f"{key(config, topology, exact)}.json"


def _versions() -> dict[str, str | None]:
    found = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in PACKAGE.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# From here on in a process of its own, where jax is loaded.


def main() -> None:
    """Reads jobs, one JSON object a line, {"config": ..., "topology": ..., "exact": ...}, and writes a CompileCheck each."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print what they like
    for line in sys.stdin:
        job = json.loads(line)
        config, topology, exact = TrainConfig.from_dict(job["config"]), job["topology"], job["exact"]
        answer = cached(config, topology, exact)
        if answer is None:
            answer = check(config, topology, exact)
            if answer.is_final:
                _keep(answer, _path(config, topology, exact))
        output.write(json.dumps(dataclasses.asdict(answer)) + "\n")
        output.flush()


def _keep(answer: CompileCheck, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, dataclasses.asdict(answer))


def check(config: TrainConfig, topology: str, exact: bool = False) -> CompileCheck:
    """Compiles the training step of `config`, resolved, in this process.

    For TPUs at O1, in a third of the time; its temporaries, with QUICK_MARGIN, are those of the program that runs within a few
    percent. That program itself (O2) is compiled where `exact` asks for it, and where the answer would be in doubt.
    """
    import jax

    where = hardware.find(topology)
    if exact or not where.is_tpu:
        return _compiled(config, topology, "O2")
    with _level(jax, "O1"):
        quick = _compiled(config, topology, "O1")
    if quick.bytes_used is not None:
        more = round(QUICK_MARGIN * quick.bytes_temporary)
        quick = dataclasses.replace(quick, bytes_temporary=more)
        quick = dataclasses.replace(quick, fits=quick.bytes_used <= quick.bytes_limit)
    used = quick.bytes_needed if quick.bytes_used is None else quick.bytes_used
    clear = used and abs(used - quick.bytes_limit) > DOUBT * quick.bytes_limit
    return quick if clear else _compiled(config, topology, "O2")


@contextlib.contextmanager
def _level(jax, level: str):
    """Compiles at `level` within."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", level)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def _compiled(config: TrainConfig, topology: str, optimization: str) -> CompileCheck:
    """What the compiler says at its present level.

    Where cuDNN is not installed its attention can't be compiled for GPUs that are not here; `pallas_triton` stands in for it,
    and `attention` says so: what both need is linear in the length.
    """
    import jax

    from gqa_jax.planning import topologies
    from gqa_jax.training import program

    limit = hardware.find(topology).chip.memory_bytes
    answer = CompileCheck(topology, fits=False, bytes_limit=limit, optimization=optimization)
    started = time.monotonic()
    try:
        mesh = topologies.mesh(topology, config.execution.mesh)
        with jax.set_mesh(mesh):
            attention = program.attention_of(config)
        try:
            compiled = program.compile_step(config, mesh)
        except Exception as error:
            if attention != "cudnn" or "cudnn" not in str(error).lower():
                raise
            attention = "pallas_triton for cudnn"
            execution = dataclasses.replace(config.execution, attention="pallas_triton")
            compiled = program.compile_step(dataclasses.replace(config, execution=execution), mesh)
    except Exception as error:
        return dataclasses.replace(
            answer,
            bytes_needed=bytes_needed(str(error)),
            seconds_compile=round(time.monotonic() - started, 1),
            error=f"{type(error).__name__}: {error}"[:2000],
        )
    memory = compiled.memory_analysis()
    answer = dataclasses.replace(
        answer,
        bytes_arguments=memory.argument_size_in_bytes,
        bytes_output=memory.output_size_in_bytes,
        bytes_alias=memory.alias_size_in_bytes,
        bytes_temporary=memory.temp_size_in_bytes,
        bytes_host=memory.host_temp_size_in_bytes,
        seconds_compile=round(time.monotonic() - started, 1),
        attention=attention,
    )
    return dataclasses.replace(answer, fits=answer.bytes_used <= limit)


def bytes_needed(message: str) -> float | None:
    """Bytes in all that a program would have needed, from what the compiler says when it runs out of memory; else None."""
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|\(([\d.]+)([KMGT]?)\) exceeds available", message)
    if found is None:
        return 0.0
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** " KMGT".index(unit or " ")


if __name__ == "__main__":
    main()
