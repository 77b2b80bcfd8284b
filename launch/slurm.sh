#!/usr/bin/env bash
# A run on the nodes of a Slurm job, queued again when it is preempted or reaches its time limit.
# Not run on a real cluster: a stand-in for srun in a test runs what it is given.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=configs/imagenet.py --workdir=/shared/runs/a
#
# Submit from the repository, on a file system that all nodes share, and so must be the --workdir.
# The arguments are those of ssrl_jax.main; sbatch's own options stand before the script.
# One task on each node takes all its GPUs; with --ntasks-per-node=8 each task takes one of them.
#
#   PYTHON         the interpreter; default .venv/bin/python (python3 -m venv .venv && .venv/bin/pip install -e '.[gpu]')
#   PREPARE        a command run on each node first, such as copying data from object storage to a
#                  local disk: PREPARE='gcloud storage rsync -r gs://BUCKET/imagenet /local/imagenet'
#   MAX_RESTARTS   how often the job may be queued again; default 20
#
# Logs: ssrl_jax-JOB.out has every process's lines with its number in front, of all attempts.
# Stacks of processes that hung: WORKDIR/stacks-PROCESS.txt.

#SBATCH --job-name=ssrl_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# SIGTERM to the tasks, not to this script, three minutes before the time limit: time for the step
# that runs and a checkpoint. A preempted job has Slurm's GraceTime for it, and gets SIGTERM too.
#SBATCH --signal=TERM@180

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
python=${PYTHON:-.venv/bin/python}
trap : TERM # to be there when the tasks have ended; they get their own
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take sbatch's

if [[ -n ${PREPARE:-} ]]; then
  # Without --ntasks it would be the job's, and --ntasks-per-node be ignored.
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --label bash -c "$PREPARE" || exit 1
fi

# A process that ends must not take the others with it: they save, or write their stacks.
# srun's status is the highest of its tasks: an error of one, 1, would be hidden by the 75 of those
# that it leaves alone, so it is 200 here.
# shellcheck disable=SC2016  # for the shell of the task
task='trap : TERM; "$@"; status=$?; exit $((status == 1 ? 200 : status))'
srun --label --kill-on-bad-exit=0 bash -c "$task" task "$python" -u -m ssrl_jax.main "$@"
status=$?
((status != 200)) || status=1

# 75: others are gone, or nothing moved. 134: ended by JAX, as others are gone. 137: killed, mostly
# for memory. 143: saved and stopped by SIGTERM. Anything else a restart would not put right.
case $status in
  75 | 134 | 137 | 143) ;;
  *) exit "$status" ;;
esac
if [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=CANCELLED* ]]; then
  echo "cancelled: not queued again"
elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-20})); then
  echo "ended with $status after ${SLURM_RESTART_COUNT:-0} restarts: not queued again" >&2
else
  echo "ended with $status: queued again, to go on from the last checkpoint"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
