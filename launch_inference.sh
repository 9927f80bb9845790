#!/usr/bin/env bash
# Ask PaliGemma about a picture. The first run sets up what inference needs; later runs start at once.
# Change the values below, or set them for one run:
#   PROMPT="detect red circle" ./launch_inference.sh
# An empty value means the command's own default; more flags can follow: ./launch_inference.sh --help
set -euo pipefail

MODEL_PATH="${MODEL_PATH:-}"                               # folder of a checkpoint; default: the shipped model
PROMPT="${PROMPT:-}"                                       # "caption en", "answer en how many circles are there?", …
IMAGE_FILE_PATH="${IMAGE_FILE_PATH:-}"                     # default: a sample scene
MAX_TOKENS_TO_GENERATE="${MAX_TOKENS_TO_GENERATE:-}"
TEMPERATURE="${TEMPERATURE:-}"                             # used when sampling
TOP_P="${TOP_P:-}"                                         # used when sampling
DO_SAMPLE="${DO_SAMPLE:-}"                                 # True or False
ONLY_CPU="${ONLY_CPU:-}"                                   # True or False

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/.ci/setup.sh"
set_up inference

flags=()
for name in MODEL_PATH PROMPT IMAGE_FILE_PATH MAX_TOKENS_TO_GENERATE TEMPERATURE TOP_P DO_SAMPLE ONLY_CPU; do
  if [ -n "${!name}" ]; then flags+=("--$(echo "$name" | tr '[:upper:]' '[:lower:]')=${!name}"); fi
done
exec python -m paligemma_nb.inference ${flags[@]+"${flags[@]}"} "$@"
