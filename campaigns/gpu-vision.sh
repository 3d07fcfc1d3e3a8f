#!/usr/bin/env bash
# On one GPU, in a quarter of an hour: the backbone is trained again, measured, and used for Split CIFAR-100 at 112 pixels.
#
#   campaigns/gpu-vision.sh DATA OUT [MINUTES]
#
# DATA holds cifar100/ and tiny-imagenet/; OUT gets weights and results, each as soon as it is there. The same call goes
# on where it was stopped. MINUTES (13) is the time for all of it. TINY=1 tries everything in a few minutes on a CPU.
set -euo pipefail
DATA=$(realpath "$1"); mkdir -p "$2"; OUT=$(realpath "$2"); END=$((SECONDS + 60 * ${3:-13}))
HERE=$(realpath "$(dirname "$0")/..")
EPOCHS=20 PIXELS=112
CAMPAIGN="$OUT/gpu-vision.toml"
cp "$HERE/campaigns/gpu-vision.toml" "$CAMPAIGN"
if [ -n "${TINY:-}" ]; then
    EPOCHS=1 PIXELS=28
    sed -i -e 's/pixels=112,train_per_class=160/pixels=28,train_per_class=4,test_per_class=2/' -e 's/^epochs = 20/epochs = 1/' "$CAMPAIGN"
fi
mkdir -p "$OUT/results/pretrain"
cd "$OUT"
[ -f vit-small-14.safetensors ] || treelora pretrain --model vit-small-14 --root "$DATA" --out vit-small-14.safetensors \
    --epochs $EPOCHS --pixels $PIXELS --mixup 0.2 --smallest 32 --average 0.5
hours() { awk -v s=$((END - SECONDS)) 'BEGIN { print (s > 36 ? s : 36) / 3600 }'; }
treelora campaign "$CAMPAIGN" --root "$DATA" --results "$OUT/results" --hours "$(hours)"
[ -f results/pretrain/vit-small-14.json ] || treelora pretrain --model vit-small-14 --root "$DATA" \
    --weights vit-small-14.safetensors --pixels $PIXELS --probe --out results/pretrain/vit-small-14.json
