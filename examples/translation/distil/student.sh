#!/usr/bin/env bash
# Teach a student of any translation recipe with the recipe's finished runs.
#
#   student.sh RECIPE RUN[:RUN...] [--out DIR] [--name NAME] [--seed N] [--precision P]
#              [--joined-dictionary] [--big] [--smoke] [OPTIONS]
#
#   RECIPE    multi30k, iwslt14_de_en or wmt14_en_de
#   RUN       folders of finished runs in DIR; their mean is the teacher. Of each the average is taken
#             where evaluate.sh has made one, else the best checkpoint
#   --name    folder of the student in DIR (default: taught-seedN)
#   OPTIONS   anything else goes to fairseq-train, the student's size for example; the other options are
#             those of the recipe's train.sh
#
# What was interrupted goes on with the same command. The student is scored by the recipe's
# evaluate.sh: the command is printed at the end.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"

[ $# -ge 2 ] || help
recipe_of "$1"
RUNS=$2
shift 2
OFFERED="--joined-dictionary --big"
train_options self_kd "$@"
need fairseq-skd
one_process "teaches" "; then  train.sh self_kd --self-kd-candidates stored --self-kd-teacher FILE  in all"
[ -n "$NAME" ] || RUN=$OUT/taught-seed$SEED
if [ -f "$RUN/settings" ]; then
    TEACHER=$(grep -x -A1 -e --self-kd-teacher "$RUN/settings" | sed -n 2p) ||
        stop "$RUN is a training without a teacher; --name NAME takes another folder"
    say "Taught already, from $TEACHER: the student goes on"
else
    checkpoints "$RUNS"
    TEACHER=$OUT/teacher-$NAMED.skd
    say "Teaching: what $RUNS give(s) to every word of the training text"
    run fairseq-skd teach "$DATA" --path "$PATHS" --output "$TEACHER"
fi
name=()
[ -n "$NAME" ] || name=(--name "taught-seed$SEED")
"$FOLDER/train.sh" self_kd "$@" "${name[@]}" --self-kd-candidates stored --self-kd-teacher "$TEACHER"
