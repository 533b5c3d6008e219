#!/usr/bin/env bash
# WMT14 English-German: get the text (1.7 GB), tokenise, cut into subwords, binarise. Training text:
# Europarl 7, Common Crawl, News Commentary 9; validation: newstest2013; test: newstest2014 (3,003).
#
#   prepare.sh [--raw DIR] [--out DIR] [--workers N] [--smoke]
#
#   --raw DIR    take the five archives from this folder, and download nothing
#   --out DIR    where everything goes (default: runs/wmt14_en_de)
#   --workers N  processes (default: all cores)
#   --smoke      the beginning of each file, to try the recipe (DIR-smoke)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

get() {
    local www=https://www.statmt.org
    fetch training-parallel-europarl-v7.tgz 657632379 \
        0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7 \
        $www/wmt13/training-parallel-europarl-v7.tgz
    fetch training-parallel-commoncrawl.tgz 918311367 \
        c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5 \
        $www/wmt13/training-parallel-commoncrawl.tgz
    fetch training-parallel-nc-v9.tgz 80418416 \
        cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485 \
        $www/wmt14/training-parallel-nc-v9.tgz
    # Sizes are not stated for these two; the checksums are those that sacrebleu tests.
    fetch test.tgz - 48eca5d02f637af44e85186847141f67 $www/wmt13/test.tgz
    fetch test-full.tgz - a8cd784e006feb32ac6f3d9ec7eb389a $www/wmt14/test-full.tgz
}

segments() { plain_lines < "$1" | sed -n 's/^.*<seg[^>]*>\(.*\)<\/seg>.*$/\1/p'; }

text() {  # FOLDER: one sentence a line, as it was written; train, valid and test
    local folder=$1 unpacked=$1/unpacked language side
    unpack "$RAW/training-parallel-europarl-v7.tgz" "$unpacked" training/europarl-v7.de-en.{en,de}
    unpack "$RAW/training-parallel-nc-v9.tgz" "$unpacked" training/news-commentary-v9.de-en.{en,de}
    unpack "$RAW/training-parallel-commoncrawl.tgz" "$unpacked" commoncrawl.de-en.{en,de}
    unpack "$RAW/test.tgz" "$unpacked" test/newstest2013-src.{en,de}.sgm
    unpack "$RAW/test-full.tgz" "$unpacked" test-full/newstest2014-deen-{src.en,ref.de}.sgm
    for language in en de; do
        for part in training/europarl-v7 training/news-commentary-v9 commoncrawl; do
            same_lines "$unpacked/$part.de-en.en" "$unpacked/$part.de-en.de"
            plain_lines < "$unpacked/$part.de-en.$language" | slice 100
        done > "$folder/train.$language"
        [ $language = en ] && side=src || side=ref
        segments "$unpacked/test/newstest2013-src.$language.sgm" | slice 40 > "$folder/valid.$language"
        segments "$unpacked/test-full/newstest2014-deen-$side.$language.sgm" |
            slice 40 > "$folder/test.$language"
    done
    rm -r "$unpacked"
    same_lines "$folder/valid.en" "$folder/valid.de"
    same_lines "$folder/test.en" "$folder/test.de"
    wc -l < "$folder/train.en" | sed 's/^/  pairs: /'
}

tokens() {  # FOLDER
    local language part name
    for language in en de; do
        for part in train valid test; do
            echo "  tokenising $part.$language"
            name=$part
            [ $part != train ] || name=train.raw
            moses $language normalize -c tokenize -a < "$OUT/text/$part.$language" > "$1/$name.$language"
            same_lines "$OUT/text/$part.$language" "$1/$name.$language"
        done
    done
    clean "$1/train" en de 250 1.5
}

prepare_options "$@"
need python gzip tar sacremoses subword-nmt fairseq-preprocess
[ -n "$SMOKE" ] || need_space 20
MERGES=32000
[ -z "$SMOKE" ] || MERGES=200
get
step "$OUT/text" "Text" text
step "$OUT/tokens" "Tokenising, and leaving out pairs of unequal length" tokens
step "$OUT/bpe" "Subwords" subwords "$OUT/tokens" "$MERGES" en de
step "$OUT/data" "fairseq-preprocess" binarise "$OUT/bpe" en de "$OUT/bpe/test" \
    --joined-dictionary --nwordssrc 32768 --nwordstgt 32768
say "Ready: $OUT/data. Next:  $FOLDER/train.sh self_kd$(quoted "${OWN[@]}")"
