"""Several processes: what the environment says, the meeting, and whole runs of two processes on this machine."""

import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax.parallel import cluster, multihost, sharding
from nanochat_jax.parallel.cluster import Cluster, DistributedError, find_cluster, first_host
from nanochat_jax.runs import checkpoint, metrics
from tests import toy_runs

SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}
VARIABLES = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "node0:1234"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- what the environment says ----------------------------------------------------------------------------------------


def test_nothing_means_alone():
    assert find_cluster("auto", {}) is None
    assert find_cluster("off", {**SLURM, **VARIABLES}) is None
    in_an_allocation = {k: SLURM[k] for k in ("SLURM_JOB_ID", "SLURM_PROCID")}  # sbatch script, no srun
    assert find_cluster("auto", in_an_allocation) is None
    assert find_cluster("auto", {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_each_launcher():
    assert find_cluster("auto", SLURM) == Cluster("slurm", 4, 3, "gpu07:24711", 2)
    found = find_cluster("auto", OPEN_MPI)
    assert found is not None and (found.processes, found.index) == (4, 2) and found.one_host
    mpich = {"PMI_SIZE": "2", "PMI_RANK": "1", "JAX_COORDINATOR_ADDRESS": "a:9"}
    assert find_cluster("mpi", mpich) == Cluster("mpi", 2, 1, "a:9", None)
    assert find_cluster("auto", VARIABLES) == Cluster("env", 2, 1, "node0:1234")
    assert find_cluster("auto", {**SLURM, **VARIABLES}) == Cluster("env", 2, 1, "node0:1234"), "what is explicit wins"
    moved = find_cluster("slurm", {**SLURM, "JAX_COORDINATOR_ADDRESS": "other:5"})
    assert moved is not None and moved.address == "other:5"


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu[07-08]", "gpu07"),
        ("a,b", "a"),
        ("n3", "n3"),
        ("r[1,3]-x,b", "r1-x"),
        ("x-a[001-004,9],b[2]", "x-a001"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "mode, variables, named",
    [
        ("auto", {**SLURM, **OPEN_MPI}, "slurm: process 3 of 4.*mpi: process 2 of 4"),
        ("auto", {k: v for k, v in VARIABLES.items() if k != "JAX_PROCESS_ID"}, "JAX_PROCESS_ID"),
        ("auto", {**VARIABLES, "JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID='two'"),
        ("auto", {**VARIABLES, "JAX_PROCESS_ID": "2"}, "process 2 .* 2"),
        ("auto", {**VARIABLES, "JAX_COORDINATOR_ADDRESS": "node0"}, "host:port.*'node0'"),
        ("mpi", SLURM, "--distributed=mpi"),
        ("auto", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "JAX_COORDINATOR_ADDRESS=host:port"),
        ("mpirun", {}, "auto, off, slurm, mpi, env"),
    ],
)
def test_what_is_incomplete_or_contradictory_is_refused(mode, variables, named):
    with pytest.raises(DistributedError, match=named):
        find_cluster(mode, variables)


def test_a_loopback_coordinator_of_several_hosts_is_refused(monkeypatch):
    several = Cluster("slurm", 4, 3, "127.0.1.1:4000", 2)
    with pytest.raises(DistributedError, match=r"127.0.1.1:4000 .*JAX_COORDINATOR_ADDRESS=HOST:4000"):
        cluster.refuse_loopback(several)
    cluster.refuse_loopback(Cluster("mpi", 2, 1, "127.0.0.1:4000", 2))  # all on one host
    cluster.refuse_loopback(Cluster("env", 2, 1, "127.0.0.1:4000"))  # said on purpose
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 4000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)  # as /etc/hosts of many systems has it
    with pytest.raises(DistributedError, match="node0:4000 .*127.0.1.1"):
        cluster.refuse_loopback(Cluster("env", 2, 1, "node0:4000"))


@pytest.mark.parametrize("host,expected", [("127.0.0.1", 60), ("localhost", 60), ("192.0.2.1", 600)])
def test_processes_that_must_be_on_one_host_are_not_waited_for_long(monkeypatch, host, expected):
    """Two hosts told to meet at a loopback address: each finds nobody, and says why."""
    limits = []

    def nobody(job, limit):
        limits.append(limit)
        raise DistributedError("nobody came")

    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 4000))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)
    monkeypatch.setattr(cluster, "call_roll", nobody)
    for name, value in {**VARIABLES, "JAX_COORDINATOR_ADDRESS": f"{host}:4000"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="nobody came"):
        cluster.start("env")
    assert limits == [expected]


# --- the meeting ------------------------------------------------------------------------------------------------------


def meet(count: int, come: list[int], limit: float) -> dict[int, list[str] | str]:
    port, results = free_port(), {}

    def one(index):
        try:
            results[index] = cluster.call_roll(Cluster("env", count, index, f"127.0.0.1:{port}"), limit)
        except DistributedError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in come]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    return results


def test_all_come_in_any_order():
    results = meet(3, [2, 0, 1], 30)
    assert all(hosts == [socket.gethostname()] * 3 for hosts in results.values()) and len(results) == 3


def test_those_who_do_not_come_are_named_by_everybody():
    results = meet(4, [0, 2], 1.0)
    for told in results.values():
        assert "processes 1, 3 of 4" in told and "127.0.0.1:" in told and f"0 on {socket.gethostname()}, 2 on" in told


def test_without_process_0_the_others_say_where_they_looked(monkeypatch):
    clock = time.monotonic
    monkeypatch.setattr(cluster.time, "monotonic", lambda: clock() * 20)  # the ten seconds more are over soon
    told = meet(2, [1], 1.0)[1]
    assert "process 0 at 127.0.0.1:" in told and "loopback" in told


def test_a_stranger_does_not_disturb_the_meeting():
    port = free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    results = {}
    job = [Cluster("env", 2, i, f"127.0.0.1:{port}") for i in (0, 1)]
    first = threading.Thread(target=lambda: results.update({0: cluster.call_roll(job[0], 30)}))
    first.start()
    stranger()
    results[1] = cluster.call_roll(job[1], 30)
    first.join(30)
    assert results[0] == results[1]


# --- rows and arrays, alone -------------------------------------------------------------------------------------------


def test_alone_everything_is_as_it_was():
    mesh, batch = sharding.make_mesh(), (np.zeros((1, 8, 4)),) * 3
    assert multihost.is_main() and not multihost.several()
    assert multihost.place_batch(mesh, batch) is batch and multihost.local_mesh(mesh) is mesh
    assert multihost.own_rows(mesh, 16) == range(16)
    params = {"w": np.zeros(2)}
    assert multihost.local(params, mesh) is params and multihost.to_host(params) is params
    assert multihost.agree(True) is True


# --- two processes ----------------------------------------------------------------------------------------------------

# 8 rows: a whole number of batches of 2 and of 4, since held-out rows beyond the last whole batch are not measured
COMMON = dict(eval_tokens=8 * 192, save_every=2, sample_every=0)
STAGES = {
    "base": dict(depth=1, max_seq_len=192, total_batch_size=1536, num_iterations=4, run_name="base"),
    "sft": dict(total_batch_size=1536, num_iterations=2, metrics_max_problems=4, source="base", run_name="sft"),
    "rl": dict(num_iterations=2, examples_per_step=2, num_samples=4, max_new_tokens=16, slots=8, eval_examples=4)
    | dict(eval_samples=2, source="sft", run_name="rl"),
}


PATIENCE = 1200  # seconds until a process counts as hung, also on a machine that has other work


def launch(home: Path, stage: str, processes: int, **changes) -> list[subprocess.Popen]:
    flags = {**COMMON, **STAGES[stage], "device_batch_size": 4 // processes, **changes}
    env = {"JAX_NUM_PROCESSES": str(processes), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
    several = [env | {"JAX_PROCESS_ID": str(index)} for index in range(processes)] if processes > 1 else [{}]
    return [toy_runs.launch(stage, home, f"log{index}.txt", env, **flags) for index, env in enumerate(several)]


def finish(home: Path, stage: str, processes: int, **changes) -> None:
    for index, process in enumerate(launch(home, stage, processes, **changes)):
        assert process.wait(PATIENCE) == 0, (home / f"log{index}.txt").read_text()[-2000:]


def losses(home: Path, run: str) -> list[float]:
    return [r["loss"] for r in metrics.read(home / "runs" / run / "metrics.jsonl") if r["kind"] == "train"]


def scores(home: Path, run: str) -> list[dict]:
    records = [r for r in metrics.read(home / "runs" / run / "metrics.jsonl") if r["kind"] == "eval"]
    return [{k: v for k, v in r.items() if k not in ("kind", "seconds")} for r in records]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Base directories where the same stages are run by one process, and by two."""
    parent = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        (parent / name).mkdir()
        toy_runs.toy_tokenizer().save(parent / name / "tokenizer")
    return parent / "one", parent / "two"


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_in_every_stage(homes):
    one, two = homes
    for stage in STAGES:
        if stage == "rl":  # from one model to the bit: parameters that differ by rounding may draw other tokens
            shutil.rmtree(two / "runs" / "sft")
            shutil.copytree(one / "runs" / "sft", two / "runs" / "sft")
        finish(one, stage, 1)
        finish(two, stage, 2)
        np.testing.assert_allclose(losses(two, stage), losses(one, stage), atol=1e-5, rtol=0)
        assert len(losses(two, stage)) == STAGES[stage]["num_iterations"]
        for got, wanted in zip(scores(two, stage), scores(one, stage), strict=True):
            assert got == pytest.approx(wanted, abs=1e-4)
    assert checkpoint.steps(two / "runs" / "base") == [2, 4]
    assert "2 processes" in (two / "log0.txt").read_text()
    shown = (two / "log1.txt").read_text()
    assert "step 4" not in shown and "held-out" not in shown, "only the main process reports"


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step_and_one_process_goes_on(homes):
    _, two = homes
    # far more steps than are done before the signal has reached all
    changes = dict(run_name="cut", num_iterations=2000, save_every=0)

    def wait_for_losses(n: int, process) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(losses(two, "cut")) < n:
            assert time.monotonic() < deadline and process.poll() is None, (two / "log0.txt").read_text()[-2000:]
            time.sleep(0.05)

    started = launch(two, "base", 2, **changes)
    wait_for_losses(3, started[0])
    started[1].send_signal(signal.SIGTERM)
    assert [p.wait(PATIENCE) for p in started] == [0, 0], (two / "log1.txt").read_text()[-2000:]
    run = two / "runs" / "cut"
    (step,) = checkpoint.steps(run)
    assert step < 2000 and f"SIGTERM at step {step}" in (two / "log0.txt").read_text()
    checkpoint.verify(run, step, checkpoint.load_meta(run))
    again = launch(two, "base", 1, **changes)[0]
    wait_for_losses(step + 2, again)
    again.send_signal(signal.SIGTERM)
    assert again.wait(PATIENCE) == 0
    records = [r["step"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"]
    assert records == list(range(len(records)))
