#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes: the tests below tests/gpu, then the benchmark.
#
#   gpu.sh [--out DIR] [--wheels DIR] [--trial]
#
#   --out DIR     where the log, the CSV and the plot go (default: runs/gpu)
#   --wheels DIR  wheels of what this Python lacks (fairseq, sacrebleu, pytest, ...; liger-kernel and
#                 cut-cross-entropy to be compared with): installed beside it, without network
#   --trial       where there is no GPU: the same steps, with tests that are skipped and one tiny shape
#
# PYTHON chooses the Python (default: that of .venv, else python3). It needs torch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$root/runs/gpu wheels="" trial=""
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --trial) trial=yes; shift ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) echo "gpu.sh: there is no option $1; see gpu.sh --help" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}") || {
    echo "gpu.sh: there is no ${PYTHON:-python3}" >&2
    exit 2
}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
    echo "Installing the wheels in $wheels into $out/environment"
    # An environment of its own, which sees this Python's packages beneath and has fairseq's commands.
    "$python" -m venv --without-pip "$out/environment"
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    beneath=$("$python" -c "$site")
    "$python" -m pip --python "$out/environment/bin/python" install --quiet --no-index --no-deps \
        "$wheels"/*.whl
    python=$out/environment/bin/python
    echo "$beneath" > "$("$python" -c "$site")/beneath.pth"
fi
cd "$root"
"$python" - "$trial" << 'END'
import sys

try:
    import torch
except ImportError:
    sys.exit("gpu.sh: this Python has no torch")
if torch.cuda.is_available():
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
elif not sys.argv[1]:
    sys.exit(f"gpu.sh: torch {torch.__version__} finds no GPU; --trial tries the script without one")
END
echo "Tests, log: $out/tests.log"
"$python" -m pytest -q -p no:cacheprovider tests/gpu 2>&1 | tee "$out/tests.log" | tail -n 15
echo "Benchmark, at most 5 minutes: $out/gpu.csv, $out/gpu.svg"
arguments=(--rounds 5 --dtype float32 bfloat16 float16 --out "$out/gpu.csv")
[ -z "$trial" ] || arguments=(--rounds 2 --only loss --shape 'LM, 1 layer' --out "$out/gpu.csv")
status=0
timeout 300 "$python" -m benchmarks "${arguments[@]}" 2>&1 | tee "$out/benchmark.log" || status=$?
if [ "$status" -ne 0 ]; then
    # What was measured until then is there.
    [ ! -f "$out/gpu.csv.partial" ] || mv "$out/gpu.csv.partial" "$out/gpu.csv"
    echo "gpu.sh: the benchmark ended early (status $status; 124 is after 5 minutes)" >&2
fi
ls -l "$out"
exit "$status"
