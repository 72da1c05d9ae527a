"""Several processes, on one host or many, as one training job.

Who takes part comes from the environment:

    slurm   srun sets SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST
    mpi     Open MPI sets OMPI_COMM_WORLD_SIZE, _RANK, _LOCAL_SIZE; MPICH and Intel MPI set PMI_SIZE, PMI_RANK,
            MPI_LOCALNRANKS
    env     JAX_NUM_PROCESSES, JAX_PROCESS_ID, JAX_COORDINATOR_ADDRESS (host:port of process 0)

JAX_COORDINATOR_ADDRESS also overrides what SLURM and MPI say about the address. The base directory must be one that all
hosts see. Process 0 is the main one: it writes metrics, reports and what describes a checkpoint, and alone prints.

`jax.distributed.initialize` detects SLURM and Open MPI as well, but not MPICH, Intel MPI or Open MPI 5, gives a process
that is alone on its host one GPU of eight, and ends the process in C++ with a stack trace when another is missing, so
all that it needs is found here first.
"""

import ipaddress
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_jax.utils.errors import UserError

MODES = ("auto", "off", "slurm", "mpi", "env")
TIME_LIMIT_S = 600.0  # for all processes to come
ONE_HOST_LIMIT_S = 60.0  # the same where they must all be on this host: nothing has to be allotted or copied first
SAY_EVERY_S = 30.0


class DistributedError(UserError, RuntimeError):
    """Processes cannot be brought together; the message names the variable, the address or the missing process."""


@dataclass(frozen=True)
class Cluster:
    """A job of `processes` processes of which this is number `index`; the address is process 0's, host:port.

    local_processes: how many of them are on this host, where that is known.
    """

    found_by: str
    processes: int
    index: int
    address: str
    local_processes: int | None = None

    @property
    def one_host(self) -> bool:
        return self.local_processes == self.processes


# ---------------------------------------------------------------------------------------------------------------------
# who takes part


def find_cluster(mode: str = "auto", environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The job this process is part of; None if it works alone. Raises DistributedError where the environment is
    incomplete or says two things."""
    if mode not in MODES:
        raise DistributedError(f"--distributed must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "off":
        return None
    finders = {"env": _from_variables, "slurm": _from_slurm, "mpi": _from_mpi}
    if mode != "auto":
        cluster = finders[mode](environment)
        if cluster is None:
            raise DistributedError(
                f"--distributed={mode}, but the environment has none of its variables (they are listed in "
                "nanochat_jax/parallel/cluster.py); start the job with srun or mpirun, or set the JAX_ variables"
            )
        return cluster
    if explicit := _from_variables(environment):
        return explicit
    found = [c for c in (_from_slurm(environment), _from_mpi(environment)) if c is not None and c.processes > 1]
    if len({(c.processes, c.index) for c in found}) > 1:
        said = ", ".join(f"{c.found_by}: process {c.index} of {c.processes}" for c in found)
        raise DistributedError(f"the environment says two things ({said}); choose with --distributed=slurm or =mpi")
    return found[0] if found else None


def _from_variables(env: Mapping[str, str]) -> Cluster | None:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    given = [name for name in names if env.get(name)]
    if not env.get(names[0]) and not env.get(names[1]):
        return None  # an address alone belongs to SLURM or MPI
    if missing := [name for name in names if name not in given]:
        raise DistributedError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three")
    processes, index = (_number(env, name) for name in names[:2])
    return _checked(Cluster("env", processes, index, env[names[2]]))


def _from_slurm(env: Mapping[str, str]) -> Cluster | None:
    if not env.get("SLURM_STEP_NUM_TASKS") or not env.get("SLURM_PROCID"):
        return None  # in an allocation, but not started by srun
    processes, index = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    nodes = _number(env, "SLURM_STEP_NUM_NODES") if env.get("SLURM_STEP_NUM_NODES") else None
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        host = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
        address = f"{host}:{20000 + _number(env, 'SLURM_JOB_ID') % 20000}"  # jobs that share a node do not collide
    each = processes if nodes == 1 else processes // nodes if nodes and processes % nodes == 0 else None
    return _checked(Cluster("slurm", processes, index, address, each))


def _from_mpi(env: Mapping[str, str]) -> Cluster | None:
    families = (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    )
    for size, rank, local_size in families:
        if not env.get(size) or not env.get(rank):
            continue
        processes, index = _number(env, size), _number(env, rank)
        each = _number(env, local_size) if env.get(local_size) else None
        address = env.get("JAX_COORDINATOR_ADDRESS", "")
        if not address and each == processes:
            address = f"127.0.0.1:{20000 + os.getppid() % 20000}"  # one mpirun is the parent of all
        if not address and processes > 1:
            raise DistributedError(
                f"{size}={processes} on several hosts, but MPI does not say where process 0 is: set "
                "JAX_COORDINATOR_ADDRESS=host:port to its host and a free port (mpirun -x JAX_COORDINATOR_ADDRESS=...)"
            )
        return _checked(Cluster("mpi", processes, index, address, each))
    return None


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "gpu[03-05,9],x1" -> "gpu03"."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        raise DistributedError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set JAX_COORDINATOR_ADDRESS=host:port")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise DistributedError(f"{name}={env.get(name, '')!r} must be a number") from None


def _checked(cluster: Cluster) -> Cluster:
    if not 0 <= cluster.index < cluster.processes:
        raise DistributedError(
            f"process {cluster.index} is not among {cluster.processes} processes ({cluster.found_by})"
        )
    if cluster.processes > 1:
        split_address(cluster.address)
    return cluster


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port"."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise DistributedError(
            f"the coordinator's address must be host:port, got {address!r} (JAX_COORDINATOR_ADDRESS)"
        )
    return host.strip("[]"), int(port)


def refuse_loopback(cluster: Cluster) -> None:
    """Raises DistributedError if the address means another machine on every host: other hosts would wait for ever.

    Where the launcher does not say that all processes are on one host, an address that is written as a loopback one
    ("127.0.0.1", "localhost") is taken as such a statement (`start` then waits a minute, not ten); a host's name that
    leads there is refused.
    """
    if cluster.one_host:
        return
    host, port = split_address(cluster.address)
    if cluster.local_processes is None and _is_loopback(host):
        return
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise DistributedError(
            f"the coordinator's host {host!r} is not known here ({error}); set JAX_COORDINATOR_ADDRESS=host:port to an "
            "address of process 0's host that all hosts can reach"
        ) from None
    if addresses and all(_is_loopback(a) for a in addresses):
        raise DistributedError(
            f"the coordinator's address {cluster.address} is a loopback one ({', '.join(addresses)}), but the job runs "
            f"on several hosts, on each of which that is the host itself. Set JAX_COORDINATOR_ADDRESS=HOST:{port} "
            "to an address of process 0's host that all can reach, or fix /etc/hosts"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# coming together


def start(mode: str = "auto", time_limit_s: float = TIME_LIMIT_S) -> Cluster | None:
    """Joins this process to its job, before JAX touches a device; only the main process still prints.

    Waits until all processes have come, saying who is missing; raises DistributedError naming them after the limit.
    """
    cluster = find_cluster(mode)
    if cluster is None or cluster.processes == 1:
        return None
    refuse_loopback(cluster)
    if _is_loopback(split_address(cluster.address)[0]):
        time_limit_s = min(time_limit_s, ONE_HOST_LIMIT_S)
    hosts = call_roll(cluster, time_limit_s)
    if cluster.index == 0:
        print(f"{cluster.processes} processes ({cluster.found_by}) on {', '.join(dict.fromkeys(hosts))}")
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end of the process
    import jax

    jax.distributed.initialize(
        cluster.address,
        cluster.processes,
        cluster.index,
        local_device_ids=_own_gpus(cluster, hosts),
        initialization_timeout=int(time_limit_s),
    )
    return cluster


def _own_gpus(cluster: Cluster, hosts: list[str]) -> list[int] | None:
    """Which GPUs of the host this process takes: all of them if it is alone there or sees but one."""
    from nanochat_jax.hardware.devices import nvidia_gpus

    here = [i for i, host in enumerate(hosts) if host == hosts[cluster.index]]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = len([x for x in listed.split(",") if x.strip()]) if listed is not None else len(nvidia_gpus())
    if len(here) == 1 or visible <= 1:
        return None
    if visible % len(here):
        raise DistributedError(
            f"{visible} GPUs cannot be divided among {len(here)} processes on {hosts[cluster.index]}"
        )
    each, place = visible // len(here), here.index(cluster.index)
    return list(range(place * each, (place + 1) * each))


def call_roll(cluster: Cluster, time_limit_s: float) -> list[str]:
    """Meets all processes at the coordinator's address; returns the host name of each.

    Process 0 listens, the others report; when all are there, or the time is over, it tells everybody. Done before
    JAX's own meeting, which ends the process without saying who is missing.
    """
    return (_listen if cluster.index == 0 else _report)(cluster, time.monotonic() + time_limit_s, time_limit_s)


def _listen(cluster: Cluster, deadline: float, limit: float) -> list[str]:
    host, port = split_address(cluster.address)
    present: dict[int, tuple[str, socket.socket]] = {}
    names = {0: socket.gethostname()}
    said = time.monotonic()
    try:
        server = socket.create_server(("", port), backlog=cluster.processes)
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on port {port} ({error}); choose another in JAX_COORDINATOR_ADDRESS={host}:PORT"
        ) from None
    with server:
        server.settimeout(0.2)
        while len(names) < cluster.processes and time.monotonic() < deadline:
            try:
                connection, _ = server.accept()
                connection.settimeout(5.0)
                hello = json.loads(connection.makefile("r").readline())
                if hello["processes"] != cluster.processes or not 0 < hello["index"] < cluster.processes:
                    raise DistributedError(
                        f"a process came from {hello['host']} as number {hello['index']} of {hello['processes']}, but "
                        f"this job has {cluster.processes}: is another job at {cluster.address}?"
                    )
                present[hello["index"]] = (hello["host"], connection)
                names[hello["index"]] = hello["host"]
            except TimeoutError:
                pass
            except (OSError, ValueError, KeyError):
                continue  # not one of ours
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                print(f"waiting at {cluster.address} for {_missing(cluster, names)}", flush=True)
    error = ""
    if len(names) < cluster.processes:
        error = (
            f"{_missing(cluster, names)} of {cluster.processes} did not come to {cluster.address} within {limit:.0f} "
            f"s; present: {', '.join(f'{i} on {names[i]}' for i in sorted(names))}. Look at the output of the missing "
            "ones, and whether that address can be reached from their hosts"
        )
    answer = json.dumps({"error": error, "hosts": [names.get(i) for i in range(cluster.processes)]}) + "\n"
    for _, connection in present.values():
        try:
            connection.sendall(answer.encode())
            connection.close()
        except OSError:
            pass  # it has gone: JAX's meeting will notice
    if error:
        raise DistributedError(error)
    return [names[i] for i in range(cluster.processes)]


def _report(cluster: Cluster, deadline: float, limit: float) -> list[str]:
    host, port = split_address(cluster.address)
    hello = {"index": cluster.index, "processes": cluster.processes, "host": socket.gethostname()}
    problem: Any = "no answer"
    while time.monotonic() < deadline + 10:  # process 0 may have begun a little later, and names the missing
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall((json.dumps(hello) + "\n").encode())
                connection.settimeout(max(1.0, deadline + 10 - time.monotonic()))
                answer = json.loads(connection.makefile("r").readline())
            if answer["error"]:
                raise DistributedError(answer["error"])
            return answer["hosts"]
        except (OSError, ValueError) as error:
            problem = error
            time.sleep(0.2)
    local = " That is a loopback address: only processes of the same host can meet there." if _is_loopback(host) else ""
    raise DistributedError(
        f"process {cluster.index} on {hello['host']} did not reach process 0 at {cluster.address} within {limit:.0f} s "
        f"({problem}).{local} Is process 0 running, and can its address be reached from here?"
    )


def _missing(cluster: Cluster, names: Mapping[int, str]) -> str:
    missing = [i for i in range(cluster.processes) if i not in names]
    return f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
