#!/usr/bin/env bash
# Multi30k English-German: average the last 5 checkpoints, translate the three test sets, score.
#
#   evaluate.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--valid] [--best] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; --valid translates the validation set
# instead, to choose settings by; --best takes the checkpoint with the best validation loss instead
# of an average; OPTIONS go to fairseq-generate.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

OFFERED="--valid --best"
train_options "$@"
need fairseq-generate sacremoses sacrebleu
if [ -n "$BEST" ]; then average 0; else average 5 'checkpoint[0-9]+\.pt'; fi
TEXTS=(test2016:test test2017:test1 coco:test2)
[ -z "$VALID" ] || TEXTS=(valid:valid)
for text in "${TEXTS[@]}"; do
    name=${text%:*}
    translate "${text#*:}" "$name" en de --beam 5
    # The model writes lower case, so case does not count.
    score "$name" "$name, en-de" "$OUT/text/$name.de" "$OUT/tokens/$name.de" -lc --chrf-lowercase
done
