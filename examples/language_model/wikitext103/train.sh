#!/usr/bin/env bash
# WikiText-103: train transformer_lm on all 267,744 words of the dictionary.
#
#   train.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--precision P] [--smoke] [OPTIONS]
#
#   CRITERION      self_kd, cross_entropy, label_smoothed_cross_entropy or
#                  label_smoothed_cross_entropy_with_rdrop
#   --out DIR      the folder that was given to prepare.sh (default: runs/wikitext103)
#   --seed N       default: 1
#   --name NAME    folder of the run in DIR (default: CRITERION-seedN)
#   --precision P  auto (fp16 where the GPU has it), fp32 or fp16
#   --smoke        a tiny model and a few updates, to try the recipe
#   OPTIONS        anything else goes to fairseq-train and counts more than what the recipe says
#
# An update is made of 16 batches, shared by the GPUs that there are. Label smoothing raises the
# perplexity, so self-KD and R-Drop are trained without it here. The same command goes on where it
# was interrupted. Several machines: examples/README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
devices 16
criterion_options 0.0 1 --self-kd-candidates neighbors \
    --self-kd-start-update 4000 --self-kd-ramp-updates 4000
MODEL=(--arch transformer_lm --share-decoder-input-output-embed --dropout 0.1)
OPTIMISATION=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01 --clip-norm 0.0
    --lr 0.0005 --lr-scheduler inverse_sqrt --warmup-init-lr 1e-07 --warmup-updates 4000
    --tokens-per-sample 512 --sample-break-mode none --max-tokens 2048 --max-update 50000
)
CHECKPOINTS=(--no-epoch-checkpoints --save-interval-updates 1000 --keep-interval-updates 1)
if [ -n "$SMOKE" ]; then
    MODEL+=(
        --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 32
        --decoder-input-dim 32 --decoder-output-dim 32 --decoder-attention-heads 4
    )
    OPTIMISATION+=(--max-update 2)
fi
train --task language_modeling "${MODEL[@]}" "${OPTIMISATION[@]}" "${CHECKPOINTS[@]}"
