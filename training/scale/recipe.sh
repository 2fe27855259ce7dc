#!/usr/bin/env bash
# The scale model's history, from random weights to the three shipped checkpoints.
# Every stage resumes where it stopped; delete $WORK to start over. One thread a process.
set -euo pipefail
WORK=${WORK:-runs/scale_training}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
STAGE=internvideo3.training.scale

python -m $STAGE.tokenizer
[ -f "$WORK/vision/vision.safetensors" ] ||
  python -m $STAGE.vision_stage --out "$WORK/vision" --seconds-of-video 100000
