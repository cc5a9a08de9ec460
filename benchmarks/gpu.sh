#!/usr/bin/env bash
# All that needs a GPU, in eight minutes at most: the tests of the compiled kernel, decoding, the fit of one layer, the
# speed of healing.
#
#     bash benchmarks/gpu.sh [DIRECTORY]      from the repository root; DIRECTORY: benchmarks/results
#
# The package need not be installed. Wheels of what is missing may lie in .whl/. Each part has its own time limit, writes
# its JSON as it goes, and stops no other. GPU_SH_TINY=1 runs the same parts on the CPU with tiny shapes, to try the script.
# PYTHON names the interpreter (python3), GPU_SH_SITE where wheels are unpacked (/tmp/site).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
mkdir -p "${1:-$root/benchmarks/results}" || exit 1
out=$(cd "${1:-$root/benchmarks/results}" && pwd) || exit 1
cd "$root" || exit 1
python=${PYTHON:-python3}
site=${GPU_SH_SITE:-/tmp/site}
tiny=${GPU_SH_TINY:-}
log=$out/gpu.log
summary=()
: >"$log"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# What a compiled kernel leaves behind serves every part and nothing after them.
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"

if compgen -G '.whl/*.whl' >/dev/null; then
    if "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" .whl/*.whl >>"$log" 2>&1; then
        export PYTHONPATH="$PYTHONPATH:$site"
    else
        summary+=("wheels: FAILED (see gpu.log); going on without them")
    fi
fi
# A checkpoint's documents name the package's version, which only an installed package has.
if ! "$python" -c 'import importlib.metadata as m; m.version("mea-compress")' 2>/dev/null; then
    release=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
    installed=$scratch/site/mea_compress-$release.dist-info
    mkdir -p "$installed"
    printf 'Metadata-Version: 2.1\nName: mea-compress\nVersion: %s\n' "$release" >"$installed/METADATA"
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

# part NAME SECONDS COMMAND...: one line of the summary. Its output goes to the log, and the end of it to the terminal: a
# pipe would stay open as long as a compiler's helper that outlives its part.
part() {
    local name=$1 limit=$2 began=$SECONDS status lines
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
    lines=$(wc -l <"$log")
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    tail -n "+$((lines + 1))" "$log" | tail -n 12 | cut -c 1-1200
    case $status in
        0) summary+=("$name: ran, $((SECONDS - began)) s") ;;
        124 | 137) summary+=("$name: STOPPED after $limit s; what it had written is there") ;;
        *) summary+=("$name: FAILED with status $status after $((SECONDS - began)) s") ;;
    esac
}

tests=("$python" -m pytest -q -p no:cacheprovider tests/modeling/test_decode_mea.py
    -k "the_compiled_kernel_does_what_plain or decoded_on_a_gpu")
if [[ -n $tiny ]]; then
    export OMP_NUM_THREADS=1
    device=cpu
    decode=(--contexts 64 128 --batches 1 2 --rounds 2 --prefill-up-to 128)
    fit=(--shape tiny --sequences 8 --sequence-length 64 --steps 0 --steps 2)
    healing=(--layers 2 --hidden 256 --vocabulary 512 --sequence-length 32 --batch-size 2 --steps 2 --rounds 1)
else
    device=cuda
    # Each process compiles a few forms: in a single one they would wait for one another.
    tests=(env TORCHINDUCTOR_COMPILE_THREADS=1 "${tests[@]}" -n 16)
    decode=(--contexts 8192 32768 --batches 1 8 --rounds 7 --prefill-up-to 32768)
    fit=(--shape llama-3.2-1b --sequences 128 --sequence-length 1024 --steps 0 --steps 100)
    healing=(--layers 12 --hidden 768 --sequence-length 1024 --batch-size 8 --steps 8 --rounds 2)
fi

part machine 45 "$python" -c "
import sys; sys.path.insert(0, 'benchmarks')
from common import machine, versions
import mea_compress.recipe
print(machine('$device'), versions())"
part decode 150 "$python" benchmarks/decode.py --device "$device" --dtype bfloat16 --shapes llama-3.2-1b \
    --peaks-up-to 0 "${decode[@]}" --out "$out/decode-$device-bfloat16.json"
part fit 90 "$python" benchmarks/fit_layer.py --device "$device" "${fit[@]}" --out "$out/fit-layer-$device.json"
part healing 75 "$python" benchmarks/healing_speed.py --device "$device" "${healing[@]}" \
    --out "$out/healing-speed-$device.json"
part tests 105 "${tests[@]}"

printf '\n== summary\n' | tee -a "$log"
printf '%s\n' "${summary[@]}" "$SECONDS s in all, in $out:" | tee -a "$log"
ls -l "$out"/*-"$device"*.json "$log"
# Whoever starts this from another script learns from the status whether every part ran.
[[ ! "${summary[*]}" =~ FAILED|STOPPED ]]
