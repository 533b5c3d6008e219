#!/usr/bin/env bash
# Sequence-level distillation: a recipe's training text as its finished runs translate it.
#
#   translate.sh RECIPE RUN[:RUN...] [--out DIR] [--into DIR] [--joined-dictionary] [--smoke] [OPTIONS]
#
#   RECIPE      multi30k, iwslt14_de_en or wmt14_en_de
#   RUN         folders of finished runs in DIR, which translate together. Of each the average is taken
#               where evaluate.sh has made one, else the best checkpoint
#   --into DIR  folder of the new text (default: that of --out and -translated), which train.sh and
#               evaluate.sh take as --out; dictionaries, validation and test text stay the same
#   OPTIONS     anything else goes to fairseq-generate, whose beam is 5
#
# After Kim and Rush, Sequence-Level Knowledge Distillation (2016). The same command goes on
# where it was interrupted: after the last whole tenth of the text.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
BATCH=128  # sentences; a part without any makes fairseq-generate divide by zero

begun_alike() {  # one folder never holds what different models or options have given
    local settings=("$DATA" "$PATHS" "${EXTRA[@]}")
    if [ -d "$INTO/data$JOINED" ] && [ ! -f "$INTO/settings" ]; then
        stop "$INTO holds another text; --into DIR makes a folder of its own"
    fi
    if [ -n "$(find "$INTO" -name 'generated-?')" ] && ! printf '%s\n' "${settings[@]}" | cmp -s - "$INTO/settings"; then
        stop "$INTO was translated by other runs, or with other options; --into DIR makes another folder"
    fi
    printf '%s\n' "${settings[@]}" > "$INTO/settings"
}

parts() {  # what fairseq-generate prints, a file a part; it ignores its own --num-shards
    local part file
    for ((part = 0; part < PARTS; part++)); do
        file=$INTO/generated-$part
        [ ! -f "$file" ] || continue
        echo "  part $((part + 1)) of $PARTS"
        run fairseq-generate "$DATA" --user-dir "$ROOT/fairseq_skd" --path "$PATHS" --gen-subset train \
            --distributed-world-size "$PARTS" --distributed-rank "$part" --batch-size $BATCH \
            --required-batch-size-multiple 1 --beam 5 "${EXTRA[@]}" > "$file.partial" 2> "$INTO/generate.log" ||
            stop "fairseq-generate failed: $(tail -n 5 "$INTO/generate.log")"
        mv "$file.partial" "$file"
    done
}

pieces() {  # MARK: of all parts the lines that begin with it, S or H, in the order of the text
    sed -n "s/^$1-//p" "$INTO"/generated-* | sort -n | awk -F '\t' '{ print $NF }'
}

new_data() {  # FOLDER
    pieces S > "$INTO/train.$SOURCE"
    pieces H > "$INTO/train.$TARGET"
    same_lines "$OUT/bpe/train.$SOURCE" "$INTO/train.$SOURCE"
    same_lines "$INTO/train.$SOURCE" "$INTO/train.$TARGET"
    run fairseq-preprocess --source-lang "$SOURCE" --target-lang "$TARGET" --trainpref "$INTO/train" \
        --srcdict "$DATA/dict.$SOURCE.txt" --tgtdict "$DATA/dict.$TARGET.txt" --destdir "$1" \
        --workers "$(nproc)" > "$INTO/preprocess.log" 2>&1 ||
        stop "fairseq-preprocess failed: $(tail -n 5 "$INTO/preprocess.log")"
    cp "$DATA"/valid.* "$DATA"/test* "$1"
    wc -l < "$INTO/train.$TARGET" | sed 's/^/  translated sentences to train on: /'
}

[ $# -ge 2 ] || help
recipe_of "$1"
RUNS=$2 INTO="" GIVEN=()
shift 2
while [ $# -gt 0 ]; do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        --into) value "$@" && INTO=$VALUE && shift 2 ;;
        --seed | --name | --precision) stop "$SCRIPT has no option $1; see $SCRIPT --help" ;;
        *) GIVEN+=("$1") && shift ;;
    esac
done
OFFERED="--joined-dictionary"
train_options self_kd "${GIVEN[@]}"
need fairseq-generate fairseq-preprocess
one_process "translates"
checkpoints "$RUNS"
OUT=${OUT%/}
NEXT=${INTO:-${OUT%"${SMOKE:+-smoke}"}-translated}
NEXT=${NEXT%/}
case $NEXT in /*) ;; *) NEXT=$PWD/$NEXT ;; esac
INTO=$NEXT${SMOKE:+-smoke}
pair=$(find "$DATA/" -name 'train.*-*.*.idx' | sed -n '1s/.*train\.\([^.]*\)\..*/\1/p')
[ -n "$pair" ] || stop "$DATA holds no training text of two languages"
SOURCE=${pair%-*} TARGET=${pair#*-}
batches=$((($(wc -l < "$OUT/bpe/train.$SOURCE") + BATCH - 1) / BATCH))
PARTS=$((batches < 10 ? batches : 10))
mkdir -p "$INTO"
begun_alike
say "Translating the training text with $RUNS"
parts
step "$INTO/data$JOINED" "fairseq-preprocess" new_data
for folder in text tokens; do
    ln -sfn "$OUT/$folder" "$INTO/$folder"
done
say "Ready: $INTO/data$JOINED. Next:  $FOLDER/train.sh label_smoothed_cross_entropy$(quoted --out "$NEXT" \
    ${SMOKE:+--smoke} ${JOINED:+--joined-dictionary})"
