"""The launch scripts, as far as they go without a cluster.

Stand-ins for srun and gcloud run what they are given, with harmless stand-ins for what that starts.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ssrl_jax import processes
from tests.commands import LIMIT, ROOT

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
    path.write_text(f'#!/usr/bin/env bash\nhere={folder}\necho "{name} $*" >>$here/calls\n{text}\n')
    path.chmod(0o755)
  return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "train"}


# As many tasks as Slurm would start: the job's, where it is not told otherwise. One that is
# preempted gets SIGTERM, and so does the script that waits for it.
SRUN = """
tasks=$SLURM_NTASKS highest=0
while [[ $1 == --* ]]; do
  [[ $1 != --ntasks=* ]] || tasks=${1#*=}
  shift
done
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i "$@"
  status=$?
  ((status <= highest)) || highest=$status
done
((highest != 143)) || kill -TERM $PPID
exit $highest
"""
SCONTROL = "[[ $1 != show ]] || { echo JobState=%s; seq 100000; } # long: a job of many nodes"


@pytest.mark.parametrize("broken", ["no pip", "no python", "nothing"])
def test_environment_that_was_cut_short_or_lost_its_python_is_mended(tmp_path, broken):
  venv = tmp_path / "venv"
  if broken != "nothing":
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
  if broken == "no python":
    for link in (venv / "bin").glob("python3.*"):
      link.unlink()
      link.symlink_to("/gone/python3")
  script = 'source launch/environment.sh; make_venv "$0"; make_venv "$0"; "$0/bin/python" -m pip -V'
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script, venv], cwd=ROOT, capture_output=True, text=True,
    env=os.environ | {"PYTHON": sys.executable}, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("making ") == 1  # the second time nothing is to be done
  assert str(venv) in done.stdout.splitlines()[-1]


def slurm(folder, status, *, own=(), restarts=0, state="RUNNING", **environment):
  """Runs the script in a job of 2 nodes with 2 tasks on each; `own`: statuses of the first ones."""
  own = "".join(f"[[ $SLURM_PROCID != {i} ]] || exit {s}\n" for i, s in enumerate(own))
  train = f'echo "$SRUN_CPUS_PER_TASK cpus" >>$here/calls\n{own}exit {status}'
  env = stand_ins(folder, srun=SRUN, scontrol=SCONTROL % state, train=train, copy="exit $1")
  env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
  env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "16"}
  done = subprocess.run(
    ["bash", "launch/slurm.sh", "--config=a b"], cwd=ROOT, env=env | environment,
    capture_output=True, text=True, check=False, timeout=LIMIT,
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
    (processes.LOST, {"own": (0, processes.STOPPED)}, True),
    (1, {"own": (processes.LOST, 137)}, False),  # an error, and those that it left alone
  ],
)
def test_slurm_job_is_queued_again_where_that_helps(status, options, again, tmp_path):
  code, calls = slurm(tmp_path, status, **options)
  assert calls[0].startswith("srun --label --kill-on-bad-exit=0 bash -c trap")
  assert calls[0].endswith(" task train -u -m ssrl_jax.main --config=a b")
  assert calls[1:9] == ["train -u -m ssrl_jax.main --config=a b", "16 cpus"] * 4
  assert ("scontrol requeue 7" in calls) == again
  assert code == (0 if again else status)


def test_slurm_prepares_each_node_once_before_the_run(tmp_path):
  _, calls = slurm(tmp_path, 0, PREPARE="copy 0 && copy 0 data")
  assert calls[1:5] == ["copy 0", "copy 0 data"] * 2
  assert calls[5].endswith("train -u -m ssrl_jax.main --config=a b")


def test_slurm_starts_no_run_where_preparing_failed(tmp_path):
  code, calls = slurm(tmp_path, 0, PREPARE="copy 3")
  assert code == 1
  assert calls[1:] == ["copy 3"] * 2


# Each host is a folder, its user's HOME. ssh does there what sshd does: starts a shell, whose own
# command line has all of the command.
GCLOUD = """
at_hosts() {
  local host highest=0
  for host in $here/hosts/*; do
    if [[ -e $here/deaf-${host##*/} ]]; then
      highest=255
    else
      (cd $host && HOME=$host bash -c "$1" </dev/null) || highest=$?
    fi
  done
  return $highest
}
last=${!#}
case $4 in
  ssh) at_hosts "${last#--command=}" ;;
  scp) rm -f $here/deaf-*; ! rm $here/flaky 2>/dev/null || exit 255; at_hosts "cp $5 ${6#*:}" ;;
  describe) cat $here/state 2>/dev/null ;;
  create) (cd $here/ends && mkdir -p $(printf "$here/hosts/%s " *)); echo ACTIVE >$here/state ;;
  delete) rm -r $here/hosts $here/state ;;
esac
"""
# The run on a host: ends as the next line of ends/HOST says.
RUN = """
host=$(hostname) last=${!#}
echo "$host ran ${last}"
end=$(head -n 1 $here/ends/$host)
sed -i 1d $here/ends/$host
case $end in
  killed) kill -9 $PPID ;; # with the shell that would have written a status
  preempted) kill -9 $PPID; echo SUSPENDED >$here/state ;;
  deaf) touch $here/deaf-$host; sleep 1; exit 0 ;; # no answer, who just asks included, until scp
  waits | orphan)
    [[ $end == waits ]] || kill -9 $PPID
    for ((i = 0; i < 6000; i++)); do [[ ! -e $here/go ]] || exit 0; sleep 0.1; done ;;
  *) exit $end ;;
esac
"""
# Not there before it is installed, except that a real one must never be found.
GCSFUSE = "gcsfuse" if shutil.which("gcsfuse") else "package"
HOST = {
  "hostname": "echo ${HOME##*/}",
  "lsb_release": "echo jammy",
  "sudo": "case $2 in install) cp $here/package $here/gcsfuse ;; /*) cat >/dev/null ;; esac",
  "curl": 'case "$*" in *uv*) echo "mkdir -p ~/.local/bin && cp $here/uv ~/.local/bin" ;; esac',
  "uv": "if [[ $1 == venv ]]; then mkdir -p .venv/bin && cp $here/run .venv/bin/python; fi",
  "mountpoint": "[[ -e $2/mounted ]]",
  GCSFUSE: 'touch ${!#}/mounted; echo "mounts $*" >>$here/calls',
  "run": RUN,
}
INSTALLS = "uv pip install --quiet --python .venv/bin/python -e .[tpu]"
GIT = 'tar -czf "${3#--output=}" launch'


def started(calls, line="run -u -m ssrl_jax.main --config=a b"):
  """How often a host started the run, or the command of this line."""
  return calls.splitlines().count(line)


def slice_of_hosts(folder, attempts, state=None, git=GIT):
  """What runs the script: each line of `attempts` has how the run ends on each host."""
  (folder / "ends").mkdir()
  for host, ends in zip("ab", zip(*(line.split(",") for line in attempts))):
    (folder / "ends" / host).write_text("".join(f"{end}\n" for end in ends))
    (folder / "hosts" / host).mkdir(parents=True)
  if state:
    (folder / "state").write_text(f"{state}\n")
  repository = folder / "repository"
  shutil.copytree(ROOT / "launch", repository / "launch")
  env = stand_ins(folder, gcloud=GCLOUD, git=git, **HOST)
  env |= {"NAME": "a", "ZONE": "b", "TYPE": "c", "VERSION": "d", "DATA": "e", "RUNS": "f"}
  return {
    "args": ["bash", "launch/tpu_pod.sh", "--config=a b"],
    "cwd": repository,
    "env": env | {"POLL": "0.1", "MAX_RESTARTS": "2"},
  }


def tpu_pod(folder, attempts, **options):
  script = slice_of_hosts(folder, attempts, **options)
  done = subprocess.run(**script, capture_output=True, text=True, check=False, timeout=LIMIT)
  return done, (folder / "calls").read_text()


def test_tpu_slice_is_made_once_and_a_stopped_run_goes_on(tmp_path):
  done, calls = tpu_pod(tmp_path, ["143,143", "75,134", "0,0"])
  assert done.returncode == 0, done.stderr
  assert calls.count("queued-resources create a") == 1
  assert "--accelerator-type=c --runtime-version=d --spot" in calls
  assert started(calls) == 6
  assert "ended with 75 134 : starting again" in done.stdout
  assert done.stdout.splitlines()[-1] == "finished"


def test_tpu_hosts_have_the_tree_and_the_mounts(tmp_path):
  done, calls = tpu_pod(tmp_path, ["143,143", "0,0"])
  assert done.returncode == 0, done.stderr
  for line in ("-o ro e data", "f runs"):
    assert started(calls, f"mounts --implicit-dirs {line}") == 2  # on each host, once
  assert started(calls, "uv venv --python 3.12 .venv") == 2
  assert started(calls, INSTALLS) == 4
  for host in (tmp_path / "hosts").iterdir():
    assert (host / "ssrl_jax" / "launch" / "tpu_pod.sh").exists()
    log = host / "ssrl_jax" / "runs" / "logs" / f"{host.name}.log"
    assert log.read_text() == f"{host.name} ran --config=a b\n" * 2


def test_tpu_run_is_not_started_where_the_tree_is_broken(tmp_path):
  done, calls = tpu_pod(tmp_path, ["0,0"], git='touch "${3#--output=}"')
  assert done.returncode != 0
  assert not started(calls)


@pytest.mark.parametrize("state", [None, "SUSPENDED"])
def test_tpu_slice_that_was_preempted_is_replaced(state, tmp_path):
  done, calls = tpu_pod(tmp_path, ["preempted", "0"], state=state)
  assert done.returncode == 0, done.stderr
  assert calls.count("queued-resources create a") == 2
  assert calls.count("queued-resources delete a") == (2 if state else 1)
  assert started(calls) == 2


@pytest.mark.parametrize(
  ("attempts", "times"), [(["75,1"], 1), (["1,1"], 1), (["75,75", "75,75", "75,75"], 3)]
)
def test_tpu_run_ends_at_an_error_and_after_too_many_restarts(attempts, times, tmp_path):
  done, calls = tpu_pod(tmp_path, attempts, state="ACTIVE")
  assert done.returncode == 1
  assert started(calls) == 2 * times
  assert ("b ran --config=a b" in done.stdout) == (times == 1)  # the end of its log
  assert "create" not in calls


@pytest.mark.parametrize(
  ("end", "found"),
  [("killed,75", "lost 75"), ("killed,killed", "lost lost"), ("0,deaf", "0 no answer")],
)
def test_tpu_run_without_a_status_is_neither_running_nor_finished(end, found, tmp_path):
  done, calls = tpu_pod(tmp_path, [end, "0,0"], state="ACTIVE")
  assert done.returncode == 0, done.stderr
  assert f"ended with {found} : starting again" in done.stdout
  assert started(calls) == 4


def test_tpu_connection_that_fails_once_is_tried_again(tmp_path):
  (tmp_path / "flaky").touch()
  done, calls = tpu_pod(tmp_path, ["0,0"], state="ACTIVE")
  assert done.returncode == 0, done.stderr
  assert "copying, installing or starting failed: trying again" in done.stdout
  assert calls.count("scp") == 2
  assert started(calls) == 2


def until(holds, script):
  deadline = time.monotonic() + LIMIT
  while not holds():
    if script.poll() is not None or time.monotonic() > deadline:
      script.kill()
      pytest.fail("what the script was to do did not come")
    time.sleep(0.02)


@pytest.mark.parametrize("attempts", [["waits,waits"], ["orphan,orphan", "0,0"]])
def test_tpu_run_that_goes_on_is_followed_when_the_script_starts_again(attempts, tmp_path):
  script, calls = slice_of_hosts(tmp_path, attempts), tmp_path / "calls"
  with subprocess.Popen(**script, stdout=subprocess.DEVNULL, start_new_session=True) as first:
    until(lambda: calls.exists() and started(calls.read_text()) == 2, first)
    os.killpg(first.pid, signal.SIGTERM)

  out = tmp_path / "out"
  with out.open("w") as file, subprocess.Popen(**script, stdout=file) as second:
    until(lambda: "running" in out.read_text(), second)
    (tmp_path / "go").touch()
    assert second.wait(LIMIT) == 0
  assert out.read_text().count("ended with lost lost : starting again") == len(attempts) - 1
  assert started(calls.read_text()) == 2 * len(attempts)
  assert started(calls.read_text(), INSTALLS) == 2 * len(attempts)  # not under a run


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
