#!/usr/bin/env bash
# WikiText-2: train a small Transformer language model.
#
#   train.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--precision P] [--smoke] [OPTIONS]
#
#   CRITERION      self_kd, cross_entropy, label_smoothed_cross_entropy or
#                  label_smoothed_cross_entropy_with_rdrop
#   --out DIR      the folder that was given to prepare.sh (default: runs/wikitext2)
#   --seed N       default: 1
#   --name NAME    folder of the run in DIR (default: CRITERION-seedN)
#   --precision P  auto (fp16 where the GPU has it), fp32 or fp16
#   --smoke        a tiny model and a few updates, to try the recipe
#   OPTIONS        anything else goes to fairseq-train and counts more than what the recipe says
#
# Label smoothing raises the perplexity, so self-KD and R-Drop are trained without it here. The same
# command goes on where it was interrupted.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
devices 1
# Begun at the end of the warm-up self-KD has a lower perplexity than begun later: docs/results.md
criterion_options 0.0 1 --self-kd-candidates neighbors \
    --self-kd-start-update 500 --self-kd-ramp-updates 500 --self-kd-refresh-interval 500
# Without the second and third width the table of words stays 512 wide.
MODEL=(
    --arch transformer_lm --share-decoder-input-output-embed --decoder-layers 2
    --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --dropout 0.1
)
OPTIMISATION=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01 --clip-norm 1.0
    --lr 0.002 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-07 --warmup-updates 500
    --tokens-per-sample 128 --sample-break-mode none --max-tokens 1024 --max-update 6000
)
CHECKPOINTS=(--no-epoch-checkpoints --save-interval-updates 1000 --keep-interval-updates 1)
if [ -n "$SMOKE" ]; then
    MODEL+=(--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 32)
    MODEL+=(--decoder-input-dim 32 --decoder-output-dim 32)
    OPTIMISATION+=(--max-update 4)
fi
train --task language_modeling "${MODEL[@]}" "${OPTIMISATION[@]}" "${CHECKPOINTS[@]}"
