# shellcheck shell=bash
# Sourced by the other scripts. install_into VENV REQUIREMENT: makes the environment once, and
# installs into it when setup.cfg or the requirement has changed since the last time.

# On a CPU XLA makes its buffers anew each step: in large pages (glibc 2.35 and later, elsewhere
# ignored) a step takes about a sixth less, as there is no fault every 4 KiB.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [[ -n $candidate ]] && "$candidate" -c \
      'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 with venv found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

# Makes a virtual environment, or mends one that was interrupted or whose Python has gone.
make_venv() {
  local venv=$1 python
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    if [[ -d $venv/bin ]]; then
      find "$venv/bin" -xtype l -delete # links to what is no more, at which venv stops
    fi
    "$python" -m venv "$venv"
  fi
}

install_into() {
  local venv=$1 requirement=$2 stamp wanted
  stamp=$venv/.installed
  make_venv "$venv"
  wanted="$requirement $("$venv/bin/python" --version) $(cksum <setup.cfg)"
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing $requirement (about half a minute on a fast line)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$requirement"
    echo "$wanted" >>"$stamp"
  fi
}
