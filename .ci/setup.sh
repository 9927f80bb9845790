# Sourced by launch_inference.sh and run_tests.sh, which set `root` to the repository's folder.
# set_up inference|dev : put a Python with that set of requirements first on PATH.
# Works in the active virtual environment, else in .venv, which it makes. Quick when nothing has changed.

fail() { printf '%s\n' "$*" >&2; exit 1; }

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    if is_supported "$name"; then command -v "$name"; return; fi
  done
  fail "Python 3.10 or newer is needed, and none was found on PATH." \
       "python3 is: $(python3 --version 2>&1 || true)"
}

make_venv() { # $1: its folder
  local python
  python=$(find_python)
  echo "Making a virtual environment in $1 with $("$python" --version) …" >&2
  "$python" -m venv --clear "$1" ||
    fail "The virtual environment could not be made. On Debian and Ubuntu, install the package python3-venv first."
}

install() { # $1: inference or dev, $2: the virtual environment
  local package=.
  if [ "$1" = dev ]; then package='.[dev]'; fi
  echo "Installing the $1 requirements in $2 (once; it takes some minutes) …" >&2
  (
    cd "$root"
    pip=("$2/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
    # torch alone and first: asked for among the rest, pip may look at builds that bring CUDA along.
    "${pip[@]}" "$(grep '^torch==' constraints.txt)"
    "${pip[@]}" --editable "$package"
  )
}

set_up() { # $1: inference or dev
  local venv=${VIRTUAL_ENV:-$root/.venv} stamp want have=''
  # The stamp says what was installed, and from where. The development set contains the inference set.
  stamp=$venv/paligemma-nb.stamp
  want=$(cd "$root" && pwd -P && cat settings.ini setup.py constraints.txt | cksum)
  if [ -x "$venv/bin/python" ] && [ -f "$stamp" ]; then have=$(cat "$stamp"); fi

  if [ "$have" != "$1 $want" ] && [ "$have" != "dev $want" ]; then
    if [ -z "${VIRTUAL_ENV:-}" ]; then
      "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$venv"
    fi
    is_supported "$venv/bin/python" || fail "Python 3.10 or newer is needed; $venv has" \
      "$("$venv/bin/python" --version 2>/dev/null || echo none). Deactivate that environment, or make it anew."
    rm -f "$stamp"
    install "$1" "$venv"
    printf '%s\n' "$1 $want" >"$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}
