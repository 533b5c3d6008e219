#!/usr/bin/env bash
# WikiText-103: the perplexity of the best checkpoint, in blocks of 512 words of which the first 400
# are context and the other 112 are counted.
#
#   evaluate.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; OPTIONS go to fairseq-eval-lm.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
need fairseq-eval-lm
average 0
perplexity 512 400 --batch-size 2
