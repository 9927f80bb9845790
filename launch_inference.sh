#!/usr/bin/env bash
# Ask PaliGemma about a picture. The first run sets up what inference needs; later runs start at once.
# Change the values below, or set them for one run:
#   PROMPT="segment red circle" ./launch_inference.sh
# An empty value means the command's own default; more flags can follow: ./launch_inference.sh --help
set -euo pipefail

MODEL_PATH="${MODEL_PATH:-}"                               # folder of a checkpoint or a hub name; default: shipped
REVISION="${REVISION:-}"                                   # branch, tag or commit of a hub name
PROCESSOR_PATH="${PROCESSOR_PATH:-}"                       # folder or hub name of a tokenizer
ADAPTER="${ADAPTER:-}"                                     # folder of a low-rank change to the model
PROMPT="${PROMPT:-}"                                       # "caption en", "detect red circle", "segment red circle", …
IMAGE_FILE_PATH="${IMAGE_FILE_PATH:-}"                     # a picture, a folder or "*.png"; default: a sample scene
OUTPUT_IMAGE="${OUTPUT_IMAGE:-}"                           # the picture with boxes and masks; default: see below
OUTPUT_FORMAT="${OUTPUT_FORMAT:-}"                         # text or json
BATCH_SIZE="${BATCH_SIZE:-}"                               # how many answers are written at a time
MAX_TOKENS_TO_GENERATE="${MAX_TOKENS_TO_GENERATE:-}"
TEMPERATURE="${TEMPERATURE:-}"                             # used when sampling
TOP_P="${TOP_P:-}"                                         # used when sampling
DO_SAMPLE="${DO_SAMPLE:-}"                                 # True or False
ONLY_CPU="${ONLY_CPU:-}"                                   # True or False
DEVICE="${DEVICE:-}"                                       # cpu, cuda, cuda:0 or mps
DTYPE="${DTYPE:-}"                                         # float32, bfloat16 or float16; default: as stored
QUANTIZE="${QUANTIZE:-}"                                   # int8 or int4: round the weights; default: no
MASK_VAE="${MASK_VAE:-}"                                   # file with the decoder of masks, like vae-oid.npz

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/.ci/setup.sh"
set_up inference

# Boxes and masks are drawn into answer.png; those of several pictures into the folder answers.
points='^[[:space:]]*(detect|segment)[[:space:]]'
if [[ -z "$OUTPUT_IMAGE" && "$PROMPT" =~ $points && "$*" != *image?file?path* ]]; then
  if [[ -z "$IMAGE_FILE_PATH" || -f "$IMAGE_FILE_PATH" ]]; then OUTPUT_IMAGE=answer.png; else OUTPUT_IMAGE=answers; fi
fi

flags=()
for name in MODEL_PATH REVISION PROCESSOR_PATH ADAPTER PROMPT IMAGE_FILE_PATH \
            OUTPUT_IMAGE OUTPUT_FORMAT BATCH_SIZE MAX_TOKENS_TO_GENERATE TEMPERATURE TOP_P DO_SAMPLE \
            ONLY_CPU DEVICE DTYPE QUANTIZE MASK_VAE; do
  if [ -n "${!name}" ]; then flags+=("--$(echo "$name" | tr '[:upper:]' '[:lower:]')=${!name}"); fi
done
exec python -m paligemma_nb.inference ${flags[@]+"${flags[@]}"} "$@"
