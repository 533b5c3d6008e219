#!/usr/bin/env bash
# Multi30k English-German: train a Transformer-Tiny.
#
#   train.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--precision P] [--smoke] [OPTIONS]
#
#   CRITERION      self_kd, label_smoothed_cross_entropy, cross_entropy or
#                  label_smoothed_cross_entropy_with_rdrop
#   --out DIR      the folder that was given to prepare.sh (default: runs/multi30k)
#   --seed N       default: 1
#   --name NAME    folder of the run in DIR (default: CRITERION-seedN)
#   --precision P  auto (fp16 where the GPU has it), fp32 or fp16
#   --smoke        a tiny model and a few updates, to try the recipe
#   OPTIONS        anything else goes to fairseq-train and counts more than what the recipe says
#
# The same command goes on where it was interrupted.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
devices 1
criterion_options 0.1 5
MODEL=(
    --arch transformer --share-all-embeddings --encoder-layers 4 --decoder-layers 4
    --encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 256
    --decoder-ffn-embed-dim 256 --encoder-attention-heads 4 --decoder-attention-heads 4
    --dropout 0.2
)
OPTIMISATION=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 0.004 --lr-scheduler inverse_sqrt
    --warmup-init-lr 1e-07 --warmup-updates 1000 --max-tokens 2048 --max-update 4000
)
CHECKPOINTS=(--keep-last-epochs 5)
if [ -n "$SMOKE" ]; then
    MODEL+=(--encoder-layers 1 --decoder-layers 1)
    OPTIMISATION+=(--max-tokens 2000 --max-epoch 2)
fi
train --task translation --source-lang en --target-lang de \
    "${MODEL[@]}" "${OPTIMISATION[@]}" "${CHECKPOINTS[@]}"
