#!/usr/bin/env bash
# The scale model's history, from random weights to the shipped checkpoints, then a deeper teacher.
# Every stage resumes where it stopped; delete $WORK to start over.
set -euo pipefail
WORK=${WORK:-runs/scale_training}
export TOKENIZERS_PARALLELISM=false
STAGE=internvideo3.training.scale

python -m $STAGE.tokenizer
[ -f "$WORK/vision/vision.safetensors" ] ||
  python -m $STAGE.vision_stage --out "$WORK/vision" --seconds-of-video 220000 --threads 2
[ -d "$WORK/early/checkpoint" ] ||
  python -m $STAGE.language_stage --vision "$WORK/vision/vision.safetensors" \
    --out "$WORK/early" --steps 7000 --learning-rate 1.5e-3 --threads 2
[ -d "$WORK/base/checkpoint" ] ||
  python -m $STAGE.language_stage --init "$WORK/early/checkpoint" --curriculum late \
    --out "$WORK/base" --steps 5000 --learning-rate 1e-3 --warmup 100 --seed 2 --threads 2
[ -d "$WORK/converted" ] ||
  python -m $STAGE.convert_stage --source "$WORK/base/checkpoint" --out "$WORK/converted" --videos 48
# Equal extra training of the conversion and of the base model it is compared with.
recover() { # recover NAME START
  [ -d "$WORK/$1/checkpoint" ] ||
    python -m $STAGE.language_stage --init "$2" --teacher "$WORK/base/checkpoint" \
      --curriculum final --out "$WORK/$1" --steps 1500 --learning-rate 5e-4 --warmup 30 --seed 1
}
recover m2la "$WORK/converted" & M2LA=$!
recover control "$WORK/base/checkpoint"
wait $M2LA
python -m $STAGE.publish --work "$WORK"
# The teacher starts as the shipped control, so after publication.
[ -f "$WORK/grown/model.safetensors" ] ||
  python -m $STAGE.grow --source scale:control --out "$WORK/grown"
[ -d "$WORK/teacher/checkpoint" ] ||
  python -m $STAGE.language_stage --init "$WORK/grown" --curriculum teacher --out "$WORK/teacher" \
    --steps 8000 --learning-rate 1e-3 --warmup 200 --seed 5 --bfloat16
python -m $STAGE.publish_teacher --run "$WORK/teacher"
