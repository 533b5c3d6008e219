#!/usr/bin/env bash
# WikiText-103, word level: get the text and binarise it.
#
#   prepare.sh [--raw DIR] [--out DIR] [--workers N] [--smoke]
#
#   --raw DIR    take wikitext-103-v1.zip, or wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens
#                (plain or .gz), from this folder, and download nothing
#   --out DIR    where everything goes (default: runs/wikitext103)
#   --workers N  processes (default: all cores)
#   --smoke      the beginning of each file, to try the recipe (DIR-smoke)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

prepare_options "$@"
need python gzip fairseq-preprocess
[ -n "$SMOKE" ] || need_space 3
wikitext wikitext-103 242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590 \
    b7497e2dfe77e72cfef5e3dbc61b7b53712ac211 c326ac59dc587676d58c422eb8a03e119582f92b \
    8a5befc548865cec54ed4273cf87dbbad60d1e47
step "$OUT/data" "fairseq-preprocess" binarise_text
say "Ready: $OUT/data. Next:  $FOLDER/train.sh self_kd$(quoted "${OWN[@]}")"
