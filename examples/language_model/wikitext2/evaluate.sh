#!/usr/bin/env bash
# WikiText-2: the perplexity of the best checkpoint, in blocks of 128 words of which the first 96 are
# context and the other 32 are counted.
#
#   evaluate.sh CRITERION [--out DIR] [--seed N] [--name NAME] [--valid] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; --valid leaves the test text alone; OPTIONS
# go to fairseq-eval-lm.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

OFFERED="--valid"
train_options "$@"
need fairseq-eval-lm
average 0
perplexity 128 96 --batch-size 8
