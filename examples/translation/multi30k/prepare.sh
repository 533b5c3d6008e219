#!/usr/bin/env bash
# Multi30k English-German, task 1: get the text, tokenise, cut into subwords, binarise.
#
#   prepare.sh [--raw DIR] [--out DIR] [--workers N] [--merges N] [--pairs N] [--smoke]
#
#   --raw DIR    take train.en.gz, train.de.gz, ... from this folder, and download nothing
#   --out DIR    where everything goes (default: runs/multi30k)
#   --workers N  processes (default: all cores)
#   --merges N   size of the joint BPE (default: 10000), which goes with its own --out
#   --pairs N    only the first N pairs to train on (default: all 29000); with its own --out too
#   --smoke      the beginning of each file, to try the recipe (DIR-smoke)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

# The commit of github.com/multi30k/dataset whose files have these sizes and checksums.
SOURCE=https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw
FILES="
train.en            568929 d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f
train.de            637044 726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6
val.en               21650 14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28
val.de               24681 f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a
test_2016_flickr.en  21077 611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9
test_2016_flickr.de  22890 9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8
test_2017_flickr.en  19138 76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074
test_2017_flickr.de  21471 a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee
test_2017_mscoco.en   8844 aab300bfb4427697987e02cd0aacd44bfe8aa50456231b6474c08038bbed2b58
test_2017_mscoco.de  10230 799e4854c25d601cb6cb6be29eabe5667734c61ace2f495e03e429031a0bc338
"

get() {
    local file bytes checksum
    while read -r file bytes checksum; do
        [ -z "$file" ] || fetch "$file.gz" "$bytes" "$checksum" "$SOURCE/$file.gz"
    done <<< "$FILES"
}

text() {  # FOLDER: one sentence a line, as it was written
    local language part file lines
    for language in en de; do
        for part in train valid test2016 test2017 coco; do
            case $part in
                valid) file="val" ;;
                test*) file=test_${part#test}_flickr ;;
                coco) file=test_2017_mscoco ;;
                *) file=$part ;;
            esac
            # Few to translate: a model of a smoke test never ends a sentence by itself.
            [ $part = train ] && lines=200 last=${PAIRS:-$} || lines=20 last=$
            gzip -dc "$RAW/$file.$language.gz" | plain_lines | sed -n "1,${last}p" | slice $lines \
                > "$1/$part.$language" ||
                stop "$RAW/$file.$language.gz cannot be unpacked: it is cut off, or no gzip file"
        done
    done
    for file in "$1"/*.en; do
        same_lines "$file" "${file%.en}.de"
    done
    wc -l < "$1/train.en" | sed 's/^/  pairs to train on: /'
}

tokens() {  # FOLDER: tokenised and lower-cased, as in the work that this recipe compares with
    local file
    for file in "$OUT"/text/*; do
        # shellcheck disable=SC2094  # another folder
        moses "${file##*.}" normalize -c tokenize < "$file" | lowercase > "$1/$(basename "$file")"
        same_lines "$file" "$1/$(basename "$file")"
    done
}

OFFERED="--merges --pairs"
prepare_options "$@"
[[ ${PAIRS:-1} =~ ^[1-9][0-9]*$ ]] || stop "--pairs is $PAIRS; allowed: 1 or more"
need python gzip sacremoses subword-nmt fairseq-preprocess
need_space 1
[ -n "$MERGES" ] || { [ -n "$SMOKE" ] && MERGES=200 || MERGES=10000; }
get
step "$OUT/text" "Text" text
step "$OUT/tokens" "Tokenising and lower-casing" tokens
step "$OUT/bpe" "Subwords" subwords "$OUT/tokens" "$MERGES" en de
step "$OUT/data" "fairseq-preprocess" binarise "$OUT/bpe" en de \
    "$OUT/bpe/test2016,$OUT/bpe/test2017,$OUT/bpe/coco" --joined-dictionary
say "Ready: $OUT/data. Next:  $FOLDER/train.sh self_kd$(quoted "${OWN[@]}")"
