"""The launch scripts, as far as they go without a cluster: stand-ins for srun, scontrol, gcloud."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

from ssrl_jax import processes
from tests.commands import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
JOBSET = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_what_shellcheck_accepts(name):
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  command = [shellcheck if shellcheck.exists() else "shellcheck", "-x", f"launch/{name}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def stand_ins(folder, **programs):
  """Programs by these names that write what they were given to FOLDER/calls, and then do `text`."""
  for name, text in programs.items():
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{folder}/calls\n{text}\n')
    path.chmod(0o755)
  return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "train"}


def slurm(folder, status, *, restarts=0, state="RUNNING", **environment):
  env = stand_ins(folder, srun=f"exit {status}", scontrol=f"echo JobState={state}")
  env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
  done = subprocess.run(
    ["bash", "launch/slurm.sh", "--config=a b"], cwd=ROOT, env=env | environment,
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
  ("status", "options", "again"),
  [
    (0, {}, False),
    (1, {}, False),
    (processes.LOST, {}, True),
    (processes.STOPPED, {}, True),
    (134, {"restarts": 19}, True),
    (137, {"restarts": 20}, False),
    (processes.STOPPED, {"state": "CANCELLED"}, False),
  ],
)
def test_slurm_job_is_queued_again_where_that_helps(status, options, again, tmp_path):
  code, calls = slurm(tmp_path, status, **options)
  assert calls[0] == "srun --label --kill-on-bad-exit=0 train -u -m ssrl_jax.main --config=a b"
  assert ("scontrol requeue 7" in calls) == again
  assert code == (0 if again else status)


def test_slurm_prepares_each_node_once_before_the_run(tmp_path):
  _, calls = slurm(tmp_path, 0, PREPARE="copy data")
  assert calls[0] == "srun --ntasks-per-node=1 --label bash -c copy data"
  assert len(calls) == 2


GCLOUD = """
here={here}
case "$*" in
  *describe*) cat $here/state 2>/dev/null ;;
  *create*) echo ACTIVE >$here/state ;;
  *delete*) rm $here/state ;;
  *"cat ssrl_jax/status"*) head -n 1 $here/statuses | tr , '\\n'; sed -i 1d $here/statuses ;;
esac
"""


def tpu_pod(folder, statuses, state=None):
  """Runs the script where the hosts' exit statuses are, attempt by attempt, `statuses`."""
  (folder / "statuses").write_text("".join(f"{line}\n" for line in statuses))
  if state:
    (folder / "state").write_text(f"{state}\n")
  repository = folder / "repository"
  shutil.copytree(ROOT / "launch", repository / "launch")
  env = stand_ins(folder, gcloud=GCLOUD.format(here=folder), git='touch "${3#--output=}"')
  env |= {"NAME": "a", "ZONE": "b", "TYPE": "c", "VERSION": "d", "DATA": "e", "RUNS": "f"}
  done = subprocess.run(
    ["bash", "launch/tpu_pod.sh", "--config=a b"], cwd=repository, capture_output=True, text=True,
    env=env | {"POLL": "0", "MAX_RESTARTS": "2"}, check=False,
  )  # fmt: skip
  return done, (folder / "calls").read_text()


def test_tpu_slice_is_made_once_and_a_stopped_run_goes_on(tmp_path):
  done, calls = tpu_pod(tmp_path, ["running,running", "143,143", "running,75", "75,134", "0,0"])
  assert done.returncode == 0, done.stderr
  assert calls.count("queued-resources create a") == 1
  assert "--accelerator-type=c --runtime-version=d --spot" in calls
  assert calls.count(r"--config=a\ b") == 3
  assert done.stdout.splitlines()[-1] == "finished"


def test_tpu_slice_that_was_preempted_is_replaced(tmp_path):
  done, calls = tpu_pod(tmp_path, ["0,0"], state="SUSPENDED")
  assert done.returncode == 0, done.stderr
  assert calls.index("queued-resources delete a") < calls.index("queued-resources create a")


@pytest.mark.parametrize(
  ("statuses", "attempts"), [(["75,1"], 1), (["75,75", "75,75", "75,75"], 3)]
)
def test_tpu_run_ends_at_an_error_and_after_too_many_restarts(statuses, attempts, tmp_path):
  done, calls = tpu_pod(tmp_path, statuses, state="ACTIVE")
  assert done.returncode == 1
  assert calls.count("setsid nohup") == attempts
  assert "create" not in calls


def test_jobset_restarts_all_but_errors():
  spec = JOBSET["spec"]
  (slices,) = spec["replicatedJobs"]
  job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert spec["coordinator"]["replicatedJob"] == slices["name"]
  # What Kubernetes asks for where a job has a podFailurePolicy, and JobSet of its failure policy.
  assert pod["restartPolicy"] == "Never"
  assert job["completionMode"] == "Indexed"
  assert job["parallelism"] == job["completions"]
  assert job["backoffLimit"] == 0
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule == {
    "action": "FailJob",
    "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1]},
  }
  (policy,) = spec["failurePolicy"]["rules"]
  assert policy["action"] == "FailJobSet"
  assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_jobset_mounts_what_it_names_and_runs_the_command():
  pod = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  (container,) = pod["spec"]["containers"]
  assert container["command"] == ["python", "-u", "-m", "ssrl_jax.main"]
  assert {m["name"] for m in container["volumeMounts"]} == {
    v["name"] for v in pod["spec"]["volumes"]
  }
  assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
  assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * processes.GRACE
