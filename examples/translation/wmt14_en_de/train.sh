#!/usr/bin/env bash
# WMT14 English-German: train the base or the big Transformer.
#
#   train.sh CRITERION [--big] [--out DIR] [--seed N] [--name NAME] [--precision P] [--smoke] [OPTIONS]
#
#   CRITERION      self_kd, label_smoothed_cross_entropy, cross_entropy or
#                  label_smoothed_cross_entropy_with_rdrop
#   --big          the big model (default: base)
#   --out DIR      the folder that was given to prepare.sh (default: runs/wmt14_en_de)
#   --seed N       default: 1
#   --name NAME    folder of the run in DIR (default: CRITERION-seedN, CRITERION-big-seedN)
#   --precision P  auto (fp16 where the GPU has it), fp32 or fp16
#   --smoke        a tiny model and a few updates, to try the recipe
#   OPTIONS        anything else goes to fairseq-train and counts more than what the recipe says
#
# An update is made of 8 (base) or 128 (big) batches, shared by the GPUs that there are. The same
# command goes on where it was interrupted. Several machines: examples/README.md.
set -euo pipefail
OFFERED="--big"
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
devices "$([ -n "$BIG" ] && echo 128 || echo 8)"
criterion_options 0.1 5
if [ -n "$BIG" ]; then
    MODEL=(--arch transformer_vaswani_wmt_en_de_big --dropout 0.3)
    OPTIMISATION=(--lr 0.001 --max-tokens 3584 --max-update 40000)
else
    MODEL=(--arch transformer_wmt_en_de --dropout 0.1)
    OPTIMISATION=(--lr 0.0007 --max-tokens 4096 --max-update 100000)
fi
MODEL+=(--share-all-embeddings)
OPTIMISATION+=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0
    --lr-scheduler inverse_sqrt --warmup-init-lr 1e-07 --warmup-updates 4000
)
CHECKPOINTS=(--save-interval-updates 1000 --keep-interval-updates 10 --no-epoch-checkpoints)
if [ -n "$SMOKE" ]; then
    MODEL+=(
        --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32
        --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32
        --encoder-attention-heads 4 --decoder-attention-heads 4
    )
    OPTIMISATION+=(--max-tokens 1000 --max-update 4)
    CHECKPOINTS+=(--save-interval-updates 2)
fi
train --task translation --source-lang en --target-lang de \
    "${MODEL[@]}" "${OPTIMISATION[@]}" "${CHECKPOINTS[@]}"
