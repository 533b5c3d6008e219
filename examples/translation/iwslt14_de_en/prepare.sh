#!/usr/bin/env bash
# IWSLT14 German-English: get the text, tokenise, cut into subwords, binarise. The steps are those of
# fairseq's own example: tokenised, lower-cased, a joint BPE of 10,000 merges, every 23rd pair held out
# for validation, five sets together as the test set.
#
#   prepare.sh [--joined-dictionary] [--raw DIR] [--out DIR] [--workers N] [--smoke]
#
#   --joined-dictionary  one dictionary for both languages, as in R-Drop's experiments
#   --raw DIR    take de-en.tgz from this folder, and download nothing
#   --out DIR    where everything goes (default: runs/iwslt14_de_en)
#   --workers N  processes (default: all cores)
#   --smoke      the beginning of each file, to try the recipe (DIR-smoke)
set -euo pipefail
OFFERED="--joined-dictionary"
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

TESTS="TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012"

text() {  # FOLDER: one sentence a line, as it was written; train and test
    local folder=$1 language file name
    unpack "$RAW/de-en.tgz" "$folder/unpacked"
    for language in de en; do
        file=$folder/unpacked/de-en/train.tags.de-en.$language
        [ -f "$file" ] || stop "$RAW/de-en.tgz holds no de-en/train.tags.de-en.$language"
        # Lines about a talk are left out, but for its title and description, which are translated.
        plain_lines < "$file" | sed -e '/^<\(url\|talkid\|keywords\|speaker\|reviewer\|translator\)/d' \
            -e '/^<\/\{0,1\}doc/d' -e 's/<\/\{0,1\}\(title\|description\)>//g' |
            slice 400 > "$folder/train.$language"
        for name in $TESTS; do
            file=$folder/unpacked/de-en/IWSLT14.$name.de-en.$language.xml
            [ -f "$file" ] || stop "$RAW/de-en.tgz holds no de-en/$(basename "$file")"
            plain_lines < "$file" | sed -n 's/^.*<seg id="[0-9]*"> *\(.*[^ ]\) *<\/seg>.*$/\1/p' |
                sed "s/’/'/g" | slice 10
        done > "$folder/test.$language"
    done
    rm -r "$folder/unpacked"
    same_lines "$folder/train.de" "$folder/train.en"
    same_lines "$folder/test.de" "$folder/test.en"
}

tokens() {  # FOLDER: train, valid and test
    local folder=$1 language
    for language in de en; do
        moses $language tokenize < "$OUT/text/train.$language" | lowercase > "$folder/train.raw.$language"
        moses $language tokenize < "$OUT/text/test.$language" | lowercase > "$folder/test.$language"
        same_lines "$OUT/text/test.$language" "$folder/test.$language"
    done
    clean "$folder/train" de en 175 1.5
    for language in de en; do
        awk -v valid="$folder/valid.$language" 'NR % 23 == 0 { print > valid; next } { print }' \
            "$folder/train.$language" > "$folder/kept"
        mv "$folder/kept" "$folder/train.$language"
    done
}

prepare_options "$@"
need python gzip tar sacremoses subword-nmt fairseq-preprocess
need_space 1
MERGES=10000
[ -z "$SMOKE" ] || MERGES=200
# The second address is the campaign's own, and gone by now; the first is fairseq's copy. Neither
# states a size or a checksum.
fetch de-en.tgz - - https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz \
    https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz
step "$OUT/text" "Text" text
step "$OUT/tokens" "Tokenising, lower-casing, and leaving out pairs of unequal length" tokens
step "$OUT/bpe" "Subwords" subwords "$OUT/tokens" "$MERGES" de en
step "$OUT/data$JOINED" "fairseq-preprocess" binarise "$OUT/bpe" de en "$OUT/bpe/test" \
    ${JOINED:+--joined-dictionary}
say "Ready: $OUT/data$JOINED. Next:  $FOLDER/train.sh self_kd$(quoted "${OWN[@]}")"
