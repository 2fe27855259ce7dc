#!/usr/bin/env bash
# The scale model's history, from random weights to the three shipped checkpoints.
# Every stage resumes where it stopped; delete $WORK to start over. One thread a process.
set -euo pipefail
WORK=${WORK:-runs/scale_training}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
STAGE=internvideo3.training.scale

python -m $STAGE.tokenizer
[ -f "$WORK/vision/vision.safetensors" ] ||
  python -m $STAGE.vision_stage --out "$WORK/vision" --seconds-of-video 110000
# At step 4818 the end was put off after a look at validation: the learning rate had begun to fall.
base() {
  python -m $STAGE.language_stage --vision "$WORK/vision/vision.safetensors" \
    --out "$WORK/base" --learning-rate 1.5e-3 --batch-tokens 3000 "$@"
}
[ -d "$WORK/base/checkpoint" ] || base --steps 5600 --stop-at 4818
[ -f "$WORK/base/done" ] || { base --steps 6250 && touch "$WORK/base/done"; }
[ -d "$WORK/converted" ] ||
  python -m $STAGE.convert_stage --source "$WORK/base/checkpoint" --out "$WORK/converted" --videos 48
for NAME in m2la control; do
  INIT=$WORK/converted
  [ $NAME = m2la ] || INIT=$WORK/base/checkpoint
  [ -d "$WORK/$NAME/checkpoint" ] ||
    python -m $STAGE.language_stage --init "$INIT" --teacher "$WORK/base/checkpoint" \
      --out "$WORK/$NAME" --steps 360 --learning-rate 5e-4 --warmup 30 --seed 1
done
python -m $STAGE.publish --work "$WORK"
