#!/usr/bin/env bash
# WMT14 English-German: average the last checkpoints (base 5, big 10; 1,000 updates apart), translate
# newstest2014 with beam 4 and length penalty 0.6, and score.
#
#   evaluate.sh CRITERION [--big] [--out DIR] [--seed N] [--name NAME] [--smoke] [OPTIONS]
#
# The first options are those of train.sh and name the run; OPTIONS go to fairseq-generate.
set -euo pipefail
OFFERED="--big"
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

train_options "$@"
need fairseq-generate sacremoses sacrebleu
average "$([ -n "$BIG" ] && echo 10 || echo 5)" 'checkpoint_[0-9]+_[0-9]+\.pt'
translate test newstest2014 en de --beam 4 --lenpen 0.6
# The tokeniser has split compounds at their hyphens, as papers on this task do before they count.
score newstest2014 "newstest2014 (3,003 sentences), en-de" "$OUT/text/test.de" "$OUT/tokens/test.de"
