# shellcheck shell=bash
# What all recipes share. Their scripts read this file with `source`; it runs nothing by itself.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=$(cd "$(dirname "$0")" && pwd)
RECIPE=$(basename "$FOLDER")
SCRIPT=$(basename "$0")
export PYTHONUTF8=1
CRITERIA="self_kd label_smoothed_cross_entropy cross_entropy label_smoothed_cross_entropy_with_rdrop"

# The environment that `make` has set up, unless fairseq is there already.
if ! command -v fairseq-train > /dev/null && [ -x "$ROOT/.venv/bin/fairseq-train" ]; then
    PATH="$ROOT/.venv/bin:$PATH"
fi

# ---- What goes wrong, and what is said -----------------------------------------------------------

stop() {
    TOLD=yes
    printf '\n%s of %s has stopped: %s\n' "$SCRIPT" "$RECIPE" "$*" >&2
    exit 1
}

farewell() {
    local status=$?
    if [ "$status" -ne 0 ] && [ -z "${TOLD:-}" ]; then
        printf '\n%s of %s has stopped (status %s).' "$SCRIPT" "$RECIPE" "$status" >&2
        printf ' The same command goes on after the last step that was completed.\n' >&2
    fi
}
trap farewell EXIT

say() { printf '\n%s\n' "$*"; }

quoted() { [ $# -eq 0 ] || printf ' %q' "$@"; }  # as they can be pasted, each after a space

exec 3>&1

run() {  # prints the command, also where its output goes elsewhere
    printf '  $%s\n' "$(quoted "$@")" >&3
    "$@"
}

need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" > /dev/null && continue
        case $tool in
            fairseq-* | sacrebleu | sacremoses | subword-nmt | python)
                stop "there is no command '$tool'. In $ROOT:  pip install -c constraints.txt torch" \
                    "&& pip install -c constraints.txt '.[recipes]'" ;;
            *) stop "there is no command '$tool'; the system's package manager has it" ;;
        esac
    done
}

need_space() {  # GIB, in $OUT, of which it may hold a part already
    local free held
    free=$(df -Pk "$OUT" | awk 'NR == 2 { print int($4 / 1048576) }')
    held=$(du -sk "$OUT" | awk '{ print int($1 / 1048576) }')
    [ $((free + held)) -ge "$1" ] ||
        stop "$OUT has $free GiB free and this needs about $1; --out DIR chooses another folder"
}

help() {  # the comment at the top of the script
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
}

offered() {  # OPTION: fails if the recipe, which lists its own options in OFFERED, does not have it
    case " ${OFFERED:-} " in
        *" $1 "*) ;;
        *) stop "$RECIPE has no option $1; see $SCRIPT --help" ;;
    esac
}

value() {  # OPTION VALUE...: sets VALUE
    [ $# -ge 2 ] || stop "$1 needs a value; see $SCRIPT --help"
    VALUE=$2
}

# ---- Data ----------------------------------------------------------------------------------------

prepare_options() {  # sets OUT, RAW, LOCAL, SMOKE, WORKERS and, where offered, JOINED, MERGES, PAIRS, WORDS
    LOCAL="" SMOKE="" OUT="" JOINED="" MERGES="" PAIRS="" WORDS="" WORKERS=$(nproc) OWN=()
    while [ $# -gt 0 ]; do
        case $1 in
            --raw) value "$@" && LOCAL=$VALUE && shift 2 ;;
            --out) value "$@" && OUT=$VALUE OWN+=("$1" "$2") && shift 2 ;;
            --workers) value "$@" && WORKERS=$VALUE && shift 2 ;;
            --smoke) SMOKE=yes OWN+=("$1") && shift ;;
            --joined-dictionary) offered "$1" && JOINED=-joined OWN+=("$1") && shift ;;
            --merges) offered "$1" && value "$@" && MERGES=$VALUE && shift 2 ;;
            --pairs) offered "$1" && value "$@" && PAIRS=$VALUE && shift 2 ;;
            --words) offered "$1" && value "$@" && WORDS=$VALUE && shift 2 ;;
            -h | --help) help ;;
            *) stop "there is no option $1; see $SCRIPT --help" ;;
        esac
    done
    if [ -n "$LOCAL" ]; then
        [ -d "$LOCAL" ] || stop "--raw is $LOCAL, which is no folder"
        LOCAL=$(cd "$LOCAL" && pwd)
    fi
    set_out
    RAW=${LOCAL:-$OUT/raw}
    mkdir -p "$OUT"
}

set_out() {  # a smoke test never shares a folder with a real run
    OUT=${OUT:-$ROOT/runs/$RECIPE}${SMOKE:+-smoke}
    case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
}

# fetch FILE BYTES CHECKSUM ADDRESS...: have the whole FILE in $RAW. BYTES and CHECKSUM (md5, sha1 or
# sha256, told by its length) may be -, where the source states none.
fetch() {
    local file=$1 bytes=$2 checksum=$3 partial address flaw
    shift 3
    if [ -n "$LOCAL" ]; then
        [ -f "$RAW/$file" ] || stop "--raw $LOCAL has no file $file; its source is $1"
        # The slice of a smoke test has the format of the source, but not its size.
        [ -z "$SMOKE" ] || bytes=- checksum=-
        flaw=$(flaw_of "$RAW/$file" "$file" "$bytes" "$checksum")
        [ -z "$flaw" ] || stop "$RAW/$file has $flaw: it is cut off, or another edition than $1"
        return
    fi
    if [ -f "$RAW/$file" ]; then
        return
    fi
    need curl
    mkdir -p "$RAW"
    partial=$RAW/$file.partial
    for address in "$@"; do
        # Whole already, if the last run ended just after the download.
        if [ ! -f "$partial" ] || [ -n "$(flaw_of "$partial" "$file" "$bytes" "$checksum")" ]; then
            echo "  downloading $file from $address"
            curl --fail --location --continue-at - --retry 3 --connect-timeout 30 --progress-bar \
                --output "$partial" "$address" || continue
        fi
        flaw=$(flaw_of "$partial" "$file" "$bytes" "$checksum")
        if [ -z "$flaw" ]; then
            mv "$partial" "$RAW/$file"
            return
        fi
        echo "  what came has $flaw, so it is not used" >&2
        rm "$partial"
    done
    stop "$file could not be downloaded from $*. Where it can be had otherwise, put it into a" \
        "folder DIR and pass --raw DIR"
}

flaw_of() {  # PATH NAME BYTES CHECKSUM: prints what is wrong, and nothing if the file is intact
    local found
    found=$(wc -c < "$1")
    if [ "$3" != - ] && [ "$found" -ne "$3" ]; then
        echo "$found bytes instead of $3"
        return
    fi
    case ${#4} in
        1) found=- ;;
        32) found=$(md5sum < "$1") ;;
        40) found=$(sha1sum < "$1") ;;
        *) found=$(sha256sum < "$1") ;;
    esac
    if [ "${found%% *}" != "$4" ]; then
        echo "not the checksum $4"
        return
    fi
    case $2 in
        *.gz | *.tgz) gzip -t < "$1" 2> /dev/null || echo "no complete gzip archive in it" ;;
        *.zip) python -m zipfile -t "$1" > /dev/null 2>&1 || echo "no complete zip archive in it" ;;
    esac
}

unpack() {  # ARCHIVE FOLDER [MEMBER...]
    local archive=$1 folder=$2
    shift 2
    mkdir -p "$folder"
    echo "  unpacking $(basename "$archive")"
    case $archive in
        *.zip) python -m zipfile -e "$archive" "$folder" > /dev/null ;;
        *) tar -xzf "$archive" -C "$folder" "$@" ;;
    esac || stop "$archive cannot be unpacked: it is cut off, or lacks what this recipe reads from it"
}

# step FOLDER TITLE COMMAND...: run a command that fills the folder which it is told as its last
# argument. The folder gets its name when the command has succeeded, so what is there is complete.
step() {
    local folder=$1 title=$2
    shift 2
    if [ -d "$folder" ]; then
        say "$title: done already, in $folder"
        return
    fi
    say "$title"
    rm -rf "$folder.partial"
    mkdir -p "$folder.partial"
    "$@" "$folder.partial"
    mv "$folder.partial" "$folder"
}

slice() {  # LINES: the beginning in a smoke test, otherwise everything
    if [ -n "$SMOKE" ]; then sed -n "1,$1p"; else cat; fi
}

# One line stays one line in every tool: Python's splitlines() also splits at these.
plain_lines() {
    LC_ALL=C sed -e 's/\r//g' -e 's/[\x01-\x08\x0b-\x1f]/ /g' -e 's/\xc2\x85/ /g' \
        -e 's/\xe2\x80[\xa8\xa9]/ /g'
}

utf8() {  # FILE
    iconv -f UTF-8 -t UTF-8 "$1" > /dev/null 2>&1 ||
        stop "$1 is no UTF-8 text; of a latin-1 file  iconv -f latin1 -t utf-8  makes one"
}

same_lines() {  # FILE FILE
    local one two
    utf8 "$1"
    utf8 "$2"
    one=$(wc -l < "$1") two=$(wc -l < "$2")
    [ "$one" -gt 0 ] || stop "$1 is empty"
    [ "$one" -eq "$two" ] ||
        stop "$1 has $one lines and $2 has $two; they must be translations line by line"
}

moses() {  # LANGUAGE, then a command of sacremoses and its options
    sacremoses -q -l "$1" -j "$WORKERS" "${@:2}"
}

lowercase() {
    python -c 'import sys
for line in sys.stdin:
    sys.stdout.write(line.lower())'
}

# clean PREFIX A B LONGEST RATIO: of the pairs in PREFIX.raw.A and PREFIX.raw.B keep those with 1 to
# LONGEST tokens whose lengths differ by a factor of RATIO at most, as Moses' clean-corpus-n does.
clean() {
    same_lines "$1.raw.$2" "$1.raw.$3"
    paste -d '\t' "$1.raw.$2" "$1.raw.$3" |
        awk -F '\t' -v a="$1.$2" -v b="$1.$3" -v longest="$4" -v ratio="$5" '{
            m = split($1, left, " "); n = split($2, right, " ")
            if (m >= 1 && n >= 1 && m <= longest && n <= longest && m <= ratio * n && n <= ratio * m) {
                print $1 > a; print $2 > b; kept++
            }
        } END { printf "  %d of %d pairs kept\n", kept, NR; if (!kept) exit 1 }' ||
        stop "no pair of sentences is left after cleaning"
    rm "$1.raw.$2" "$1.raw.$3"
}

# subwords TOKENS MERGES A B FOLDER: learn one joint BPE from the training text of both languages and
# cut every file of the folder TOKENS with it.
subwords() {
    local tokens=$1 merges=$2 a=$3 b=$4 folder=$5 file
    cat "$tokens/train.$a" "$tokens/train.$b" |
        subword-nmt learn-bpe -s "$merges" > "$folder/codes" 2> "$OUT/bpe.log" ||
        stop "subword-nmt learn-bpe failed: $(tail -n 5 "$OUT/bpe.log")"
    for file in "$tokens"/*."$a" "$tokens"/*."$b"; do
        # shellcheck disable=SC2094  # another folder
        subword-nmt apply-bpe -c "$folder/codes" < "$file" > "$folder/$(basename "$file")"
        same_lines "$file" "$folder/$(basename "$file")"
    done
}

# binarise PREFIX A B TESTS OPTIONS... FOLDER: fairseq-preprocess; its output in a log beside the data.
binarise() {
    local pieces=$1 a=$2 b=$3 tests=$4 folder=${*: -1} options=("${@:5:$#-5}")
    run fairseq-preprocess --source-lang "$a" --target-lang "$b" --trainpref "$pieces/train" \
        --validpref "$pieces/valid" --testpref "$tests" --destdir "$folder" --workers "$WORKERS" \
        "${options[@]}" > "$OUT/preprocess.log" 2>&1 ||
        stop "fairseq-preprocess failed: $(tail -n 5 "$OUT/preprocess.log")"
    wc -l < "$folder/dict.$b.txt" | sed "s/^/  words in the dictionary of $b: /"
}

# wikitext NAME SHA256 TRAIN VALID TEST: get NAME-v1.zip, or the texts in --raw, into $OUT/text. The
# last three are the sha1 of wiki.train.tokens and so on.
wikitext() {
    local name=$1
    if [ -z "$LOCAL" ] || { [ ! -f "$RAW/wiki.train.tokens" ] && [ ! -f "$RAW/wiki.train.tokens.gz" ]; }; then
        # The second address is the first publication's, and closed by now; the first is its author's.
        fetch "$name-v1.zip" - "$2" "https://wikitext.smerity.com/$name-v1.zip" \
            "https://s3.amazonaws.com/research.metamind.io/wikitext/$name-v1.zip"
    fi
    step "$OUT/text" "Text" wikitext_text "$name" "${@:3}"
}

wikitext_text() {  # NAME TRAIN VALID TEST FOLDER
    local folder=$5 from=$RAW part sum flaw
    if [ -f "$RAW/$1-v1.zip" ]; then
        unpack "$RAW/$1-v1.zip" "$folder/unpacked"
        from=$folder/unpacked/$1
    fi
    for part in train valid test; do
        if [ -f "$from/wiki.$part.tokens.gz" ]; then
            gzip -dc "$from/wiki.$part.tokens.gz" > "$folder/whole" ||
                stop "$from/wiki.$part.tokens.gz cannot be unpacked: it is cut off, or no gzip file"
        elif [ -f "$from/wiki.$part.tokens" ]; then
            cp "$from/wiki.$part.tokens" "$folder/whole"
        else
            stop "there is no wiki.$part.tokens in $from"
        fi
        sum=$2
        [ -z "$SMOKE" ] || sum=-
        shift
        flaw=$(flaw_of "$folder/whole" "wiki.$part.tokens" - "$sum")
        [ -z "$flaw" ] || stop "wiki.$part.tokens from $from has $flaw: it is cut off, or another edition"
        slice 300 < "$folder/whole" > "$folder/$part"
        [ -s "$folder/$part" ] || stop "wiki.$part.tokens from $from is empty"
        utf8 "$folder/$part"
        rm "$folder/whole"
    done
    rm -rf "$folder/unpacked"
    wc -w < "$folder/train" | sed 's/^/  words to train on: /'
}

binarise_text() {  # FOLDER: fairseq-preprocess of one language; every word that occurs, or the first $WORDS
    # fairseq counts its four special symbols.
    run fairseq-preprocess --only-source --nwordssrc $((${WORDS:--5} + 4)) --trainpref "$OUT/text/train" \
        --validpref "$OUT/text/valid" --testpref "$OUT/text/test" --destdir "$1" \
        --workers "$WORKERS" > "$OUT/preprocess.log" 2>&1 ||
        stop "fairseq-preprocess failed: $(tail -n 5 "$OUT/preprocess.log")"
    wc -l < "$1/dict.txt" | sed 's/^/  words in the dictionary: /'
}

# ---- Training ------------------------------------------------------------------------------------

# train_options CRITERION [OPTIONS]: sets CRITERION, OUT, SMOKE, SEED, RUN, PRECISION, JOINED, BIG,
# VALID, BEST; the rest, for fairseq, is in EXTRA. evaluate.sh takes the same, so that it finds the run.
train_options() {
    SMOKE="" OUT="" SEED=1 NAME="" PRECISION=auto JOINED="" BIG="" VALID="" BEST="" EXTRA=() OWN=("${@:1:1}")
    [ $# -gt 0 ] || help
    case " $* " in *" -h "* | *" --help "*) help ;; esac
    CRITERION=$1
    shift
    case " $CRITERIA " in
        *" $CRITERION "*) ;;
        *) stop "the criterion is $CRITERION; allowed: ${CRITERIA// /, }" ;;
    esac
    while [ $# -gt 0 ]; do
        case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
        case $1 in
            --out) value "$@" && OUT=$VALUE OWN+=("$1" "$2") && shift 2 ;;
            --seed) value "$@" && SEED=$VALUE OWN+=("$1" "$2") && shift 2 ;;
            --name) value "$@" && NAME=$VALUE OWN+=("$1" "$2") && shift 2 ;;
            --precision) value "$@" && PRECISION=$VALUE && shift 2 ;;
            --smoke) SMOKE=yes OWN+=("$1") && shift ;;
            --joined-dictionary) offered "$1" && JOINED=-joined OWN+=("$1") && shift ;;
            --big) offered "$1" && BIG=-big OWN+=("$1") && shift ;;
            --best) offered "$1" && BEST=yes && shift ;;
            --valid) offered "$1" && VALID=yes && shift ;;
            --save-dir) stop "$1 is set by the recipe; --out DIR and --name NAME choose the folder" ;;
            --distributed-world-size)
                stop "$1 is set by the recipe; CUDA_VISIBLE_DEVICES and torchrun choose the GPUs" ;;
            *) EXTRA+=("$1") && shift ;;
        esac
    done
    set_out
    DATA=$OUT/data$JOINED
    [ -d "$DATA" ] ||
        stop "there is no data in $DATA; first:  $FOLDER/prepare.sh with the same --out, --smoke and" \
            "--joined-dictionary, where they are given"
    RUN=$OUT/${NAME:-$CRITERION$BIG$JOINED-seed$SEED}
}

# devices PARTS: sets GPUS (of this machine), PROCESSES (in all), RANK, and in DEVICE_OPTIONS what tells
# fairseq so; and as many batches per process that PARTS of them make an update. One process per GPU
# under `torchrun --no-python` and `srun`; otherwise fairseq itself starts one on each GPU.
devices() {
    local parts=$1 allowed
    [ -z "$SMOKE" ] || parts=1
    need python fairseq-train
    read -r GPUS allowed < <(python - << 'END'
import torch
gpus = torch.cuda.device_count()
print(gpus, "fp16" if gpus and torch.cuda.get_device_capability()[0] >= 7 else "fp32")
END
    )
    [ -n "${GPUS:-}" ] || stop "python cannot import torch; see examples/README.md"
    DEVICE_OPTIONS=()
    if [ -z "${WORLD_SIZE:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
        [ -n "${SLURM_STEP_NODELIST:-}" ] || stop "in a Slurm job with several tasks, start it with srun"
        need scontrol
        export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
        export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)
    fi
    RANK=${RANK:-0}
    if [ -n "${WORLD_SIZE:-}" ]; then
        PROCESSES=$WORLD_SIZE
        DEVICE_OPTIONS+=(--distributed-world-size "$WORLD_SIZE" --distributed-rank "$RANK")
        DEVICE_OPTIONS+=(--distributed-init-method env:// --distributed-no-spawn)
        if [ "$GPUS" -gt 0 ]; then
            # A task that Slurm shows one GPU only has number 0 for it, whatever its own number.
            DEVICE_OPTIONS+=(--device-id $((${LOCAL_RANK:-0} % GPUS)))
        else
            # fairseq's default wrapper waits for CUDA.
            DEVICE_OPTIONS+=(--distributed-backend gloo --ddp-backend legacy_ddp)
        fi
        [ "$PROCESSES" -le "$parts" ] || [ "$RANK" -ne 0 ] ||
            say "Note: $PROCESSES processes make an update of $PROCESSES batches; the recipe's has $parts"
    else
        # No more GPUs than an update has batches, or it would be another training.
        PROCESSES=$((GPUS > parts ? parts : GPUS > 0 ? GPUS : 1))
        [ "$GPUS" -eq 0 ] || DEVICE_OPTIONS+=(--distributed-world-size "$PROCESSES")
    fi
    [ "$GPUS" -gt 0 ] || DEVICE_OPTIONS+=(--cpu)
    DEVICE_OPTIONS+=(--update-freq $(((parts + PROCESSES - 1) / PROCESSES)))
    case $PRECISION in
        auto)
            case " ${EXTRA[*]} " in *" --fp16 "* | *" --amp "* | *" --memory-efficient-fp16 "*) allowed="" ;; esac
            [ "$allowed" != fp16 ] || DEVICE_OPTIONS+=(--fp16) ;;
        fp32) ;;
        fp16) DEVICE_OPTIONS+=(--fp16) ;;
        *) stop "--precision is $PRECISION; allowed: auto, fp32, fp16" ;;
    esac
}

# criterion_options SMOOTHING RDROP_ALPHA SELF_KD_OPTIONS...: sets CRITERION_OPTIONS. SMOOTHING is
# what self-KD and R-Drop are trained on top of.
criterion_options() {
    local smoothing=$1 alpha=$2
    shift 2
    CRITERION_OPTIONS=(--criterion "$CRITERION")
    case $CRITERION in
        cross_entropy) ;;
        label_smoothed_cross_entropy) CRITERION_OPTIONS+=(--label-smoothing 0.1) ;;
        self_kd) CRITERION_OPTIONS+=(--label-smoothing "$smoothing" "$@") ;;
        *) CRITERION_OPTIONS+=(--label-smoothing "$smoothing" --rdrop-alpha "$alpha") ;;
    esac
    if [ -n "$SMOKE" ] && [ "$CRITERION" = self_kd ]; then
        CRITERION_OPTIONS+=(--self-kd-start-update 0 --self-kd-ramp-updates 0)
    fi
}

# soft_targets SETTINGS...: what self-KD is trained on, in words. The last one of an option counts.
soft_targets() {
    local candidates=auto teacher=""
    while [ $# -gt 0 ]; do
        case $1 in
            --self-kd-candidates) candidates=${2:-} ;;
            --self-kd-teacher) teacher=${2:-} ;;
        esac
        shift
    done
    case $candidates in
        auto | neighbors) echo "neighbors: words near the target in the output projection" ;;
        prediction) echo "prediction: the word that the model predicts (nearest to the paper)" ;;
        both) echo "both: near words and the predicted one" ;;
        past) echo "past: what the model gave when it last saw the sentence" ;;
        stored) echo "stored: what finished models give, from $teacher" ;;
        *) echo "$candidates" ;;
    esac
}

# train OPTIONS...: fairseq-train into $RUN, from its last checkpoint if there is one.
train() {
    local command settings status
    # ve-fairseq 0.12.3 leaves out sentences when it fills batches up to a multiple of 8.
    settings=("$DATA" --user-dir "$ROOT/fairseq_skd" --save-dir "$RUN" "$@" "${CRITERION_OPTIONS[@]}"
        --seed "$SEED" --required-batch-size-multiple 1 --log-format simple)
    command=(fairseq-train "${settings[@]}" "${DEVICE_OPTIONS[@]}" "${EXTRA[@]}")
    settings+=("${EXTRA[@]}")
    # Every process looks, so that none waits for one that has stopped; the first one writes.
    if [ -f "$RUN/settings" ] && ! printf '%s\n' "${settings[@]}" | cmp -s - "$RUN/settings"; then
        stop "$RUN was begun with other settings:" \
            "$(printf '%s\n' "${settings[@]}" | diff "$RUN/settings" - | grep '^[<>]' | tr '\n' ' ')" \
            "(< then, > now). --name NAME trains another run; to go on with this one nevertheless," \
            "remove $RUN/settings"
    fi
    if [ -f "$RUN/done" ]; then
        say "Trained already, in $RUN. --name NAME trains another one"
        return
    fi
    if [ "$RANK" -ne 0 ]; then
        "${command[@]}" > /dev/null
        return
    fi
    mkdir -p "$RUN"
    if [ ! -f "$RUN/settings" ]; then  # whole or not at all: other processes compare it
        printf '%s\n' "${settings[@]}" > "$RUN/settings.partial"
        mv "$RUN/settings.partial" "$RUN/settings"
    fi
    say "Training with $CRITERION, $PROCESSES $([ "$GPUS" -gt 0 ] && echo GPU || echo CPU)" \
        "process(es); log: $RUN/train.log"
    [ "$CRITERION" != self_kd ] || echo "  soft targets: $(soft_targets "${settings[@]}")"
    [ ! -f "$RUN/checkpoint_last.pt" ] || echo "  going on from $RUN/checkpoint_last.pt"
    run "${command[@]}" 2>&1 | tee -a "$RUN/train.log" || {
        status=$?
        # An option that fairseq-train does not know: the corrected command is another run.
        [ -f "$RUN/checkpoint_last.pt" ] || rm -f "$RUN/settings"
        exit "$status"
    }
    if [ ! -f "$RUN/checkpoint_last.pt" ] || tail -n 20 "$RUN/train.log" | grep -q 'stop_time_hours:'; then
        say "fairseq-train has ended before the end of the training"
        return
    fi
    touch "$RUN/done"
    say "Trained. Next:  $FOLDER/evaluate.sh$(quoted "${OWN[@]}")"
}

# ---- Distillation --------------------------------------------------------------------------------

recipe_of() {  # NAME: sets RECIPE and FOLDER to those of the translation recipe whose runs teach
    RECIPE=$1 FOLDER=$(dirname "$FOLDER")/$1
    [ -f "$FOLDER/train.sh" ] || stop "the recipe is $1; allowed: multi30k, iwslt14_de_en, wmt14_en_de"
}

one_process() {  # DOES [THEN]: stops under torchrun and srun
    [ -z "${WORLD_SIZE:-}" ] && [ "${SLURM_NTASKS:-1}" -eq 1 ] ||
        stop "$SCRIPT $1 in one process, and several were started: start it alone${2:-}"
}

# checkpoints RUN[:RUN...]: sets PATHS, for fairseq, to what teaches or translates of these runs, and
# NAMED to what they are called together.
checkpoints() {
    local names name checkpoint
    PATHS="" NAMED=""
    IFS=: read -r -a names <<< "$1"
    for name in "${names[@]}"; do
        [ -f "$OUT/$name/done" ] || stop "$OUT/$name is no finished run; train.sh of $RECIPE makes one"
        checkpoint=$OUT/$name/average.pt
        NAMED=${NAMED:+$NAMED+}$name-average
        [ -f "$checkpoint" ] || checkpoint=$OUT/$name/checkpoint_best.pt NAMED=${NAMED%-average}
        PATHS=${PATHS:+$PATHS:}$checkpoint
    done
}

# ---- Evaluation ----------------------------------------------------------------------------------

# average COUNT [PATTERN]: sets CHECKPOINT to the mean of the last COUNT checkpoints of the run whose
# names match the pattern, or to the best one if COUNT is 0.
average() {
    local files
    [ -f "$RUN/done" ] || say "Note: the training in $RUN has not come to its end"
    if [ "$1" -eq 0 ]; then
        CHECKPOINT=$RUN/checkpoint_best.pt
        [ -f "$CHECKPOINT" ] || stop "there is no $CHECKPOINT; first train.sh with the same options"
        return
    fi
    mapfile -t files < <(find "$RUN" -maxdepth 1 -regex ".*/$2" | sort -V | tail -n "$1")
    [ "${#files[@]}" -gt 0 ] || stop "$RUN holds no checkpoints; first train.sh with the same options"
    [ "${#files[@]}" -eq "$1" ] || [ -n "$SMOKE" ] ||
        echo "  only ${#files[@]} checkpoints are there; the recipe averages $1"
    CHECKPOINT=$RUN/average.pt
    need fairseq-skd
    run fairseq-skd average "${files[@]}" --output "$CHECKPOINT"
}

# translate SUBSET NAME SOURCE TARGET OPTIONS...: translate with $CHECKPOINT; NAME.out, the
# tokenised NAME.tok and the detokenised NAME.txt are left in $RUN.
translate() {
    local subset=$1 result=$RUN/$2 source=$3 target=$4
    shift 4
    say "Translating $(basename "$result")"
    run fairseq-generate "$DATA" --user-dir "$ROOT/fairseq_skd" --path "$CHECKPOINT" \
        --gen-subset "$subset" --source-lang "$source" --target-lang "$target" \
        --post-process subword_nmt --required-batch-size-multiple 1 "$@" "${EXTRA[@]}" \
        > "$result.out" 2> "$result.log" ||
        stop "fairseq-generate failed: $(tail -n 5 "$result.log")"
    grep '^H-' "$result.out" | cut -c 3- | sort -n | cut -f 3 > "$result.tok" ||
        stop "there are no translations in $result.out"
    WORKERS=1 moses "$target" detokenize < "$result.tok" > "$result.txt"
}

# score NAME TITLE REFERENCE TOKENISED_REFERENCE SACREBLEU_OPTIONS...: print both figures of $RUN/NAME,
# and leave the reference beside the translations.
score() {
    local result=$RUN/$1 title=$2 reference=$3 tokens=$4
    shift 4
    same_lines "$reference" "$result.txt"
    cp "$reference" "$result.ref"
    say "$title, detokenised text (the figure to quote, with its signature):"
    sacrebleu "$reference" -i "$result.txt" -m bleu chrf -f text --width 2 "$@"
    echo "$title, tokenised text (as papers of this task quote it; not comparable with the above):"
    sacrebleu "$tokens" -i "$result.tok" -m bleu --tokenize none --force -f text --width 2
}

# perplexity TOKENS_PER_SAMPLE CONTEXT_WINDOW OPTIONS...: of validation and, but for --valid, test text
# under $CHECKPOINT.
perplexity() {
    local tokens=$1 context=$2 parts=(valid test) part found i
    shift 2
    [ -z "$VALID" ] || parts=(valid)
    for i in "${!EXTRA[@]}"; do
        [ "${EXTRA[i]}" != --context-window ] || context=${EXTRA[i + 1]}
    done
    for part in "${parts[@]}"; do
        say "Perplexity of the $part text"
        run fairseq-eval-lm "$DATA" --user-dir "$ROOT/fairseq_skd" --path "$CHECKPOINT" \
            --gen-subset "$part" --tokens-per-sample "$tokens" --context-window "$context" \
            "$@" "${EXTRA[@]}" > "$RUN/$part.log" 2>&1 ||
            stop "fairseq-eval-lm failed: $(tail -n 5 "$RUN/$part.log")"
        found=$(sed -n 's/.*Loss (base 2): \(.*\), Perplexity: \(.*\)/\2 a word (\1 bits)/p' "$RUN/$part.log")
        [ -n "$found" ] || stop "there is no perplexity in $RUN/$part.log"
        echo "$part: perplexity $found, each word with at least $context words before it (those at" \
            "the beginning with what there is)"
    done
}
