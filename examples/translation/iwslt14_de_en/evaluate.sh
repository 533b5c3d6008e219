#!/usr/bin/env bash
# IWSLT14 German-English: translate the test set with the best checkpoint, beam 5, and score.
#
#   evaluate.sh CRITERION [--joined-dictionary] [--out DIR] [--seed N] [--name NAME] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; OPTIONS go to fairseq-generate.
set -euo pipefail
OFFERED="--joined-dictionary"
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
need fairseq-generate sacremoses sacrebleu
average 0
translate test test de en --beam 5
# The model writes lower case, so case does not count.
score test "IWSLT14 test, de-en" "$OUT/text/test.en" "$OUT/tokens/test.en" -lc --chrf-lowercase
