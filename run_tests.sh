#!/usr/bin/env bash
# Everything that must hold: set-up, generated files, every notebook, every test. Stops at the first stage that fails.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
. .ci/setup.sh
set_up dev

export HF_HUB_OFFLINE=1
SLOWEST=60 # seconds a notebook may take
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

echo '== 1/4 exporting and cleaning the notebooks changes nothing'
mkdir "$tmp/copy"
cp -R index.ipynb nbs paligemma_nb settings.ini "$tmp/copy"
(cd "$tmp/copy" && nbdev_export && nbdev_clean)
for part in index.ipynb nbs paligemma_nb; do
  diff -r -u -x __pycache__ -x .ipynb_checkpoints "$part" "$tmp/copy/$part" || true
done >"$tmp/diff"
if [ -s "$tmp/diff" ]; then
  head -n 60 "$tmp/diff"
  fail 'Notebooks and modules differ: run nbdev_export and nbdev_clean (a module is changed in its notebook).'
fi

echo '== 2/4 README.md is index.ipynb'
python .ci/readme.py --check

echo "== 3/4 every notebook runs, in at most $SLOWEST s"
# Each in a process of its own, as a reader runs it; two at a time, with one thread each.
# The limit is on processor time, which does not depend on what else the machine is doing.
run_notebook() {
  TIMEFORMAT="$1: %0R s, processor %0U s"
  time nbdev_test --path "$1" >/dev/null
}
export -f run_notebook
printf '%s\0' index.ipynb nbs/*.ipynb |
  OMP_NUM_THREADS=1 xargs -0 -P 2 -I{} bash -c 'run_notebook "$1"' _ {} 2>&1 | tee "$tmp/times" ||
  fail 'A notebook fails; its traceback stands above.'
slow=$(awk -v most="$SLOWEST" '/ s, processor [0-9]+ s$/ && $(NF-1) > most' "$tmp/times")
[ -z "$slow" ] || fail "Too slow: $slow"

echo '== 4/4 pytest'
python -m pytest -q tests
