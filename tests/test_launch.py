"""dev/launch: files for machines that are not here. What can be checked without them: they parse, and every command and
flag in them exists."""

import re
import shlex
from pathlib import Path

import yaml

from nanochat_jax.parallel.cluster import find_cluster
from nanochat_jax.stages import base
from nanochat_jax.utils import flags
from tests import children

LAUNCH = Path(__file__).parents[1] / "dev" / "launch"


def pod():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text("utf-8"))
    (job,) = jobset["spec"]["replicatedJobs"]
    return jobset["metadata"]["name"], job, job["template"]["spec"]["template"]["spec"]


def check_base_flags(arguments):
    assert arguments[:2] == ["-m", "scripts.train"] and arguments[2] == "--stage=base"
    flags.parse(base.DEFAULTS, arguments[3:], "", stage="base", echo=False)  # exits where one is unknown


def test_the_pods_of_the_jobset_become_one_job():
    name, job, spec = pod()
    (container,) = spec["containers"]
    check_base_flags(container["command"][1:])
    environment = {one["name"]: one.get("value", "1") for one in container["env"]}  # the index comes from the pod
    cluster = find_cluster("auto", environment)
    pods = job["template"]["spec"]["parallelism"]
    assert cluster and cluster.processes == pods and cluster.index == 1
    host, _, port = cluster.address.partition(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and int(port) == container["ports"][0]["containerPort"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    assert environment["NANOCHAT_BASE_DIR"] in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_sbatch_file_is_a_script_that_trains():
    path = LAUNCH / "two_nodes.sbatch"
    children.run(["bash", "-n", str(path)], check=True)
    command = next(line for line in path.read_text("utf-8").splitlines() if line.startswith("srun"))
    command = re.sub(r"\$\{RUN_NAME:-([\w-]+)\}", r"\1", command).replace(' "$@"', "")
    words = shlex.split(command)
    check_base_flags(words[words.index("-m") :])


def test_the_sky_file_keeps_its_runs_in_the_bucket():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text("utf-8"))
    assert task["envs"]["NANOCHAT_BASE_DIR"] in task["file_mounts"]
    children.run(["bash", "-n", "-c", task["run"]], check=True)
    assert "speedrun_jax.sh" in task["run"]


def test_the_image_is_made_as_the_speedrun_sets_up():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    assert "setup_environment" in text and "NANOCHAT_BASE_DIR=/data" in text and "VOLUME /data" in text
