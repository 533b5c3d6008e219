#!/usr/bin/env bash
# Multi30k English-German: average the last 5 checkpoints, translate the three test sets, score.
#
#   evaluate.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; OPTIONS go to fairseq-generate.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
need fairseq-generate sacremoses sacrebleu
average 5 'checkpoint[0-9]+\.pt'
subset=test
for name in test2016 test2017 coco; do
    translate "$subset" "$name" en de --beam 5
    # The model writes lower case, so case does not count.
    score "$name" "$name, en-de" "$OUT/text/$name.de" "$OUT/tokens/$name.de" -lc --chrf-lowercase
    case $subset in test) subset=test1 ;; *) subset=test2 ;; esac
done
