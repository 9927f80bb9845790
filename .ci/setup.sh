# Sourced by launch_inference.sh and run_tests.sh, which set `root` to the repository's folder.
# set_up inference|dev : put a Python with that set of requirements first on PATH.
# Works in the active virtual environment, else in .venv, which it makes. Quick when nothing
# has changed. What it makes gets the tested versions; an environment that others made keeps
# what it has, where that meets the requirements.

PYTORCH=https://download.pytorch.org/whl/cpu # PyTorch's own index of builds without CUDA

fail() { printf '%s\n' "$*" >&2; exit 1; }

oldest=10 # Python 3.10 runs the package; dev needs 3.11, as transformers 5.23 does

is_supported() {
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $oldest))" >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
    if is_supported "$name"; then command -v "$name"; return; fi
  done
  fail "Python 3.$oldest or newer is needed, and none was found on PATH." \
       "python3 is: $(python3 --version 2>&1 || true)"
}

make_venv() { # $1: its folder
  local python
  python=$(find_python)
  echo "Making a virtual environment in $1 with $("$python" --version) …" >&2
  "$python" -m venv --clear "$1" ||
    fail "The virtual environment could not be made. On Debian and Ubuntu, install the" \
         "package python3-venv first."
  touch "$1/paligemma-nb.made"
}

has_nvidia() { # a driver: on Linux, by its tool, in Windows' Linux
  [ -e /proc/driver/nvidia ] || command -v nvidia-smi >/dev/null ||
    [ -e /usr/lib/wsl/lib/nvidia-smi ]
}

has() { # $1: the virtual environment, $2: a requirement. pip is asked with nothing to install.
  PIP_CONFIG_FILE=/dev/null "$1/bin/python" -m pip --isolated install --quiet --no-index \
    --no-deps "$2" >/dev/null 2>&1
}

pins() { # $1: the virtual environment. Prints the tested versions, less what others put there.
  if [ -e "$1/paligemma-nb.made" ]; then cat constraints.txt; return; fi
  "$1/bin/python" -m pip list --format=freeze --disable-pip-version-check |
    sed -n 's/==.*//p' | tr '[:upper:]' '[:lower:]' |
    sed 's/[_.]/-/g; s/.*/^&==/' >"$1/paligemma-nb.kept"
  grep -v -f "$1/paligemma-nb.kept" constraints.txt || true # all may be there
}

install_torch() { # $1: the virtual environment, $2: the version, then the installing command
  local venv=$1 torch=$2
  shift 2
  if has "$venv" "$torch"; then return; fi
  # Linux's usual build brings CUDA along: 4.7 GB in all, instead of 1.1.
  if [ "$(uname -s)" = Linux ] && ! has_nvidia &&
    "$venv/bin/python" .ci/answers.py "$PYTORCH/torch/"; then
    echo "No NVIDIA driver was found: PyTorch comes without CUDA, from $PYTORCH" >&2
    "$@" --index-url "$PYTORCH" --timeout 15 --retries 1 --no-deps "$torch" ||
      echo "That failed. Going on with the usual index." >&2
  fi
  "$@" "$torch" # alone: asked for among the rest, pip may look at builds that bring CUDA along
}

install() { # $1: inference or dev, $2: the virtual environment
  local package=.
  if [ "$1" = dev ]; then package='.[dev]'; fi
  echo "Installing the $1 requirements in $2 (once; it takes some minutes) …" >&2
  (
    cd "$root"
    pins "$2" >"$2/paligemma-nb.pins"
    pip=("$2/bin/python" -m pip install --quiet --disable-pip-version-check
         --constraint "$2/paligemma-nb.pins")
    required=$(grep '^requirements' settings.ini | tr ' ' '\n' | grep '^torch')
    if [ -e "$2/paligemma-nb.made" ] || ! has "$2" "$required"; then
      install_torch "$2" "$(grep '^torch==' constraints.txt)" "${pip[@]}"
    fi
    "${pip[@]}" --editable "$package"
  )
}

set_up() { # $1: inference or dev
  local venv=${VIRTUAL_ENV:-$root/.venv} stamp want have=''
  # The stamp says what was installed, and from where. dev contains inference.
  stamp=$venv/paligemma-nb.stamp
  want=$(cd "$root" && pwd -P && cat settings.ini setup.py constraints.txt | cksum)
  if [ -x "$venv/bin/python" ] && [ -f "$stamp" ]; then have=$(cat "$stamp"); fi

  if [ "$1" = dev ]; then oldest=11; fi
  if [ "$have" != "$1 $want" ] && [ "$have" != "dev $want" ]; then
    if [ -z "${VIRTUAL_ENV:-}" ]; then
      "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$venv"
    fi
    is_supported "$venv/bin/python" || fail "Python 3.$oldest or newer is needed; $venv has" \
      "$("$venv/bin/python" --version 2>/dev/null || echo none)." \
      "Deactivate that environment, or make it anew."
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || fail "There is no pip in $venv." \
      "Run \`python -m ensurepip\` there, or deactivate that environment."
    rm -f "$stamp"
    install "$1" "$venv"
    printf '%s\n' "$1 $want" >"$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}
