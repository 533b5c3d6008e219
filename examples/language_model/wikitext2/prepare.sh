#!/usr/bin/env bash
# WikiText-2, word level: get the text and binarise it.
#
#   prepare.sh [--raw DIR] [--out DIR] [--workers N] [--words N] [--smoke]
#
#   --raw DIR    take wikitext-2-v1.zip, or wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens
#                (plain or .gz), from this folder, and download nothing
#   --out DIR    where everything goes (default: runs/wikitext2)
#   --workers N  processes (default: all cores)
#   --words N    keep the N most frequent words, the others are unknown; goes with its own --out
#   --smoke      the beginning of each file, to try the recipe (DIR-smoke)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

OFFERED="--words"
prepare_options "$@"
need python gzip fairseq-preprocess
[ -n "$SMOKE" ] || need_space 1
wikitext wikitext-2 92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c \
    863f29c46ef9d167fff4940ec821195882fe29d1 0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422 \
    c7b8ce0aa086fb34dab808c5c49224211eb2b172
step "$OUT/data" "fairseq-preprocess" binarise_text
say "Ready: $OUT/data. Next:  $FOLDER/train.sh self_kd$(quoted "${OWN[@]}")"
