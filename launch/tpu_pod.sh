#!/usr/bin/env bash
# A run on a Cloud TPU slice, through preemptions: requests the slice (or takes the one that is
# there), installs, runs on all its hosts, follows, and starts again what can go on.
# Not run on a real TPU: a test's stand-in for gcloud runs in a folder what is sent to each host.
#
#   NAME=ssrl ZONE=us-east5-b TYPE=v6e-32 VERSION=v2-alpha-tpuv6e DATA=bucket-of-data RUNS=bucket-of-runs \
#     bash launch/tpu_pod.sh --config=configs/imagenet.py --config.batch_size=2048 --config.data.source=folder:data/imagenet --workdir=runs/a
#
# Run it in the repository, on a machine with an authenticated gcloud and a project set; it may be
# stopped (Ctrl-C) and started again: it finds the slice and the run. The arguments are those of
# ssrl_jax.main. JAX finds the hosts of the slice by itself. Whether a batch fits into the chips' memory
# (32 GB each of a v6e): ssrl_jax.main --dry_run --devices=32 with the same arguments says it first.
#
#   NAME      of the queued resource and of the slice
#   ZONE      where; TYPE the accelerator, VERSION its software: cloud.google.com/tpu/docs/runtimes
#   TIER      --spot (default), or --reserved, or an empty string for on demand
#   DATA      bucket with the pictures, mounted read-only as data/ on every host by gcsfuse
#   RUNS      bucket of the runs, mounted as runs/ on every host; needs a hierarchical namespace,
#             in which a folder is renamed at once, as checkpoints are
#   MAX_RESTARTS   default 50; POLL seconds between two looks, default 60
#
# Logs: runs/logs/HOST.log on each host, of all attempts; their ends are shown after an error. In the
# bucket is what was written up to the end of the last attempt: gcsfuse uploads a file as it is closed.
# Delete the slice when all is done: gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${VERSION:?}" "${DATA:?}" "${RUNS:?}"
tier=${TIER---spot} poll=${POLL:-60} left=${MAX_RESTARTS:-50}

on_all() { # COMMAND: on every host of the slice
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --quiet --command="$1"
}

state() { # of the queued resource; empty: there is none
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null || true
}

ensure_slice() { # until it is ACTIVE; one that was preempted cannot come back, and is replaced
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "$NAME: ${now:-not there}"
    case $now in
      '')
        # shellcheck disable=SC2086  # an empty tier must vanish
        gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
          --accelerator-type="$TYPE" --runtime-version="$VERSION" $tier
        ;;
      SUSPENDED | FAILED)
        gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
        ;;
    esac
    sleep "$poll"
  done
}

install() { # the working tree as it is committed, Python 3.12 (the images have an older one), the mounts
  tree=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$tree"' EXIT
  git archive --format=tar.gz --output="$tree" HEAD
  gcloud compute tpus tpu-vm scp "$tree" "$NAME:ssrl_jax.tar.gz" --zone="$ZONE" --worker=all --quiet
  on_all "set -e
    mkdir -p ssrl_jax
    cd ssrl_jax
    flock -w 2 lock true || exit 0 # it runs: see start_run
    tar -xzf ../ssrl_jax.tar.gz
    mkdir -p data runs
    command -v gcsfuse >/dev/null || {
      echo \"deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
      sudo apt-get update -q && sudo apt-get install -qy -o DPkg::Lock::Timeout=300 gcsfuse
    }
    mountpoint -q data || gcsfuse --implicit-dirs -o ro '$DATA' data
    mountpoint -q runs || gcsfuse --implicit-dirs '$RUNS' runs
    mkdir -p runs/logs
    [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
    [ -x .venv/bin/python ] || ~/.local/bin/uv venv --python 3.12 .venv
    ~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
}

start_run() { # on every host, unless it runs there: a lost connection must not end it
  # What is started inherits the lock, so it is free when nothing of a run is left, killed and a host
  # that started anew included. No name is looked for: this command's own line has all of them. The
  # wait is for a run that has written its status and is about to end.
  local arguments
  arguments=$(printf '%q ' "$@")
  on_all "set -e
    cd ssrl_jax
    exec 9>>lock
    flock -w 2 9 || exit 0
    rm -f status
    setsid nohup bash -c '.venv/bin/python -u -m ssrl_jax.main \"\$@\" >>runs/logs/\$(hostname).log 2>&1
      echo \$? >status' run $arguments </dev/null >/dev/null 2>&1 &"
}

statuses() { # a line for each host: its exit status, 'running', or 'lost' (nothing runs, no status)
  on_all "cd ssrl_jax && {
    grep -s . status || { flock -n lock true; [ \$? = 1 ] && echo running; } || grep -s . status || echo lost
  }" 2>/dev/null || echo "no answer"
}

failures=0
while true; do
  ensure_slice
  set +e
  (
    set -e
    install
    start_run "$@"
  )
  failed=$?
  set -e
  if ((failed)); then # a connection, or a slice that was preempted just then
    if ((++failures == 5)); then
      echo "error: copying, installing or starting failed 5 times" >&2
      exit 1
    fi
    echo "copying, installing or starting failed: trying again"
    sleep "$poll"
    continue
  fi
  failures=0
  echo "running; logs are in runs/logs on the hosts, and in gs://$RUNS/logs when they end"
  while found=$(statuses) && grep -q running <<<"$found" && [[ $(state) == ACTIVE ]]; do
    sleep "$poll"
  done
  # 0 finished everywhere; 1 is for a user to put right; all others (75 hung or left alone, 134 ended
  # by JAX, 137 killed, 143 saved and stopped by a notice, lost, no answer) go on.
  if ! grep -qvx 0 <<<"$found"; then
    echo "finished"
    exit 0
  fi
  if grep -qx 1 <<<"$found"; then
    on_all "tail -n 5 ssrl_jax/runs/logs/\$(hostname).log" || true
    exit 1
  fi
  if ((left-- == 0)); then
    echo "error: restarted ${MAX_RESTARTS:-50} times; see the logs in gs://$RUNS/logs" >&2
    exit 1
  fi
  echo "ended with $(tr '\n' ' ' <<<"$found"): starting again"
done
