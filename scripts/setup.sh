#!/usr/bin/env bash
# Create the virtual environment and the embedded model; run through `make setup`.
#
#   VENV=dir       where the environment goes (default: .venv in the repository)
#   PYTHON=python  the interpreter to build it from (default: the first suitable one found)
#   SGLANG=release the SGLang to install (default: 0.5.17; see patches/releases.py for the others)
#
# Run again after an interruption: the stamp that marks a finished installation is written last.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
sglang=${SGLANG:-0.5.17}
oldest=11 # Python 3.11: what SGLang 0.5.23 asks for
[[ $sglang != 0.5.17 ]] || oldest=10
[[ $venv == /* ]] || venv=$PWD/$venv
owner=$venv/.sglang-lsa-owner # this script made the environment, at the path written in it
stamp=$venv/.sglang-lsa-stamp # the installation is finished
needed_gb=12 # torch, CUDA libraries and SGLang take about 9 GB, the rest is for downloads and the embedded model

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# What a finished installation depends on. The path is part of it because an environment cannot be moved.
fingerprint() {
  "$venv/bin/python" - "$PWD" "$venv" "$sglang" pyproject.toml scripts/setup.sh 2>/dev/null <<'PY'
import hashlib, pathlib, sys
repository, venv, release, *files = sys.argv[1:]
digest = hashlib.sha256(f"{repository}\n{venv}\n{release}\n{sys.version}\n".encode())
for name in files:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

# Print the version of interpreter $1 and succeed if it can make the environment; otherwise print why not.
probe() {
  "$1" - "$oldest" 2>/dev/null <<'PY' || { [[ $? == 3 ]] || echo "does not run"; return 1; }
import sys
version = sys.version.split()[0]
oldest = int(sys.argv[1])
if not (3, oldest) <= sys.version_info[:2] <= (3, 12):
    print(f"is {version}, outside 3.{oldest}-3.12")
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError as error:
    print(f"is {version} without the module {error.name} (Debian and Ubuntu: apt install python3-venv)")
    sys.exit(3)
print(version)
PY
}

find_python() {
  local name path result seen=""
  for name in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    path=$(command -v "$name") || { seen+=$'\n'"  $name: not found"; continue; }
    if [[ $path == "$venv"/* ]]; then continue; fi # never rebuild an environment from itself
    if result=$(probe "$path"); then
      echo "$path"
      return
    fi
    seen+=$'\n'"  $name: $path $result"
  done
  die "no suitable Python: 3.$oldest to 3.12 is needed for SGLang $sglang, and this was found:$seen
Install one of them, or name it: make setup PYTHON=/path/to/python3.11"
}

check_disk() { # the environment counts for itself, so that an interrupted set-up can go on
  local free_kb used_kb=0 parent=$venv
  while [[ ! -d $parent ]]; do parent=$(dirname "$parent"); done
  free_kb=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')
  if [[ -d $venv ]]; then used_kb=$(du -sk "$venv" | cut -f1); fi
  if ((free_kb + used_kb < needed_gb * 1000 * 1000)); then
    die "too little disk space: $((free_kb / 1000 / 1000)) GB free in $parent, about $needed_gb GB needed." \
      "Free some space, or put the environment on another disk: make setup VENV=/path/to/dir"
  fi
}

# Leave a working environment in $venv. One that this script made is rebuilt when it was interrupted, moved or no longer
# runs (what was downloaded is still cached); somebody else's is used as it is and never deleted.
prepare_venv() {
  local python
  if [[ -f $owner ]]; then
    if [[ -f $stamp && $(cat "$owner") == "$venv" ]] && probe "$venv/bin/python" >/dev/null; then return; fi
  elif [[ -e $venv/pyvenv.cfg ]]; then
    probe "$venv/bin/python" >/dev/null || die "$venv/bin/python $(probe "$venv/bin/python"): choose another VENV"
    return
  elif [[ -e $venv && -n $(ls -A "$venv") ]]; then
    die "$venv exists and is not a Python environment: delete it, or choose another folder with make setup VENV=dir"
  fi
  python=$(find_python)
  say "Creating $venv with $python ($(probe "$python"))"
  rm -rf "$venv"
  mkdir -p "$venv"
  echo "$venv" >"$owner"
  "$python" -m venv "$venv"
}

# Another release than the one that is there is asked for by name, or not at all.
same_release() {
  local there
  [[ -f $stamp && -z ${SGLANG:-} ]] || return 0
  there=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("sglang"))' 2>/dev/null) || return 0
  [[ $there == "$sglang" ]] ||
    die "$venv has SGLang $there: say SGLANG=$there to go on with it, or SGLANG=$sglang to change it"
}

install() {
  grep -q "^    \"$sglang\": Release(" patches/releases.py ||
    die "SGLANG=$sglang is none of the releases that sglang-lsa was written for: see patches/releases.py"
  check_disk
  prepare_venv
  rm -f "$stamp"
  say "Installing SGLang $sglang, PyTorch and sglang-lsa into $venv (about 9 GB; some minutes, the last one or two of them silent)"
  if ! install_with_uv; then
    say "uv could not do it; installing with pip, which takes longer"
    "$venv/bin/python" -m pip install --disable-pip-version-check -e '.[dev,train,router]' "sglang==$sglang"
  fi
  fingerprint >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

install_with_uv() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv || return 1
  # The wheels of PyTorch and CUDA are large: allow a slow line more than uv's 30 s of silence.
  # Compiled once here: otherwise every process of every server might compile thousands of files as it starts.
  UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} "$venv/bin/uv" pip install --compile-bytecode \
    --python "$venv/bin/python" -e '.[dev,train,router]' "sglang==$sglang"
}

trap 'exit 130' INT
# Another set-up of the same environment would take it for one that was interrupted.
if command -v flock >/dev/null && [[ -w $(dirname "$venv") ]]; then
  exec 9>"$venv.lock"
  if ! flock -n 9; then
    say "Waiting for another set-up of $venv"
    flock 9
  fi
fi
same_release
if [[ ! -f $stamp || $(fingerprint) != "$(cat "$stamp")" ]]; then
  install
fi
"$venv/bin/python" -m sglang_lsa.embedded_model >/dev/null
