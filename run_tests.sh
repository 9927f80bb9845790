#!/usr/bin/env bash
# Everything that must hold: set-up, generated files, every notebook, every test. Stops at the
# first stage that fails. Nothing fails by the clock, but for a notebook that hangs.
#   ./run_tests.sh        what every change must pass
#   ./run_tests.sh --all  with the long proofs: tests marked `long`, which leave their records
#                         under bench/results
#
# The budget on two quiet cores: notebooks 7 minutes, pytest 10, the rest 5. Whoever adds
# something keeps to it by making something else shorter, or marks a test `long`.
set -euo pipefail

if [ $# -gt 1 ] || [ "${1---all}" != --all ]; then
  echo "run_tests.sh takes --all or nothing, but was given: $*" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
. .ci/setup.sh
set_up dev

export HF_HUB_OFFLINE=1
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
  fail 'Notebooks and modules differ: run nbdev_export and nbdev_clean' \
       '(a module is changed in its notebook).'
fi

echo '== 2/4 README.md is index.ipynb'
python .ci/readme.py --check

echo '== 3/4 every notebook runs, and every check in it knows right from wrong'
python .ci/notebooks.py index.ipynb nbs/*.ipynb

echo '== 4/4 pytest, in two processes of one thread each'
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile tests "$@"
