#!/usr/bin/env bash
# IWSLT14 German-English: train transformer_iwslt_de_en.
#
#   train.sh CRITERION [--joined-dictionary] [--out DIR] [--seed N] [--name NAME] [--precision P]
#            [--smoke] [OPTIONS]
#
#   CRITERION      self_kd, label_smoothed_cross_entropy, cross_entropy or
#                  label_smoothed_cross_entropy_with_rdrop
#   --joined-dictionary  one table of words for both languages; prepare.sh takes the same option
#   --out DIR      the folder that was given to prepare.sh (default: runs/iwslt14_de_en)
#   --seed N       default: 1
#   --name NAME    folder of the run in DIR (default: CRITERION-seedN)
#   --precision P  auto (fp16 where the GPU has it), fp32 or fp16
#   --smoke        a tiny model and a few updates, to try the recipe
#   OPTIONS        anything else goes to fairseq-train and counts more than what the recipe says
#
# The same command goes on where it was interrupted. Several machines: examples/README.md.
set -euo pipefail
OFFERED="--joined-dictionary"
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
devices 1
criterion_options 0.1 5
MODEL=(--arch transformer_iwslt_de_en --dropout 0.3)
if [ -n "$JOINED" ]; then
    MODEL+=(--share-all-embeddings)
else
    MODEL+=(--share-decoder-input-output-embed)
fi
OPTIMISATION=(
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 --weight-decay 0.0001
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --max-tokens 4096
    --max-update 60000
)
CHECKPOINTS=(--keep-last-epochs 10)
if [ "$CRITERION" != label_smoothed_cross_entropy_with_rdrop ]; then
    # With fairseq's R-Drop --eval-bleu fails (it doubles the batch that is then translated); there
    # the best checkpoint is that of the lowest validation loss.
    CHECKPOINTS+=(
        --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}'
        --eval-bleu-detok moses --eval-bleu-remove-bpe
        --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
    )
fi
if [ -n "$SMOKE" ]; then
    MODEL+=(
        --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32
        --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32
    )
    OPTIMISATION+=(--max-tokens 2000 --max-epoch 1)
fi
train --task translation --source-lang de --target-lang en \
    "${MODEL[@]}" "${OPTIMISATION[@]}" "${CHECKPOINTS[@]}"
