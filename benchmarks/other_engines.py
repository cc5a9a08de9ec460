"""Exports in OpenVINO and onnxruntime-genai on a CPU, beside transformers: greedy tokens and what precedes them.

    python3.11 -m venv OV && OV/bin/pip install optimum-intel==2.2.0 openvino==2026.4.1
    OV/bin/python benchmarks/other_engines.py openvino EXPORT ... --json benchmarks/results/openvino.json

    python3.11 -m venv ORT && ORT/bin/pip install onnxruntime-genai==0.18.0 onnx-ir transformers torch
    ORT/bin/python benchmarks/other_engines.py onnxruntime-genai EXPORT ... --json benchmarks/results/onnxruntime.json

Both in float32, the cache too. Greedy tokens are held against one pass of transformers over prompt and tokens: as many
are the same as follow the most likely token there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PROMPT = [1, 5, 9, 20, 31, 40]
PACKAGES = {
    "openvino": ("optimum-intel", "openvino", "transformers", "torch"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime", "transformers", "torch"),
}


def openvino(checkpoint, tokens):
    """Greedy tokens of OpenVINO, and the logits (V,) of the first."""
    from optimum.intel import OVModelForCausalLM

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, load_in_8bit=False, ov_config=settings)
    ids = torch.tensor([PROMPT])
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=-1)[0, len(PROMPT) :]
    return written.tolist(), model(ids).logits[0, -1].float()


def onnxruntime_genai(checkpoint, tokens):
    """Greedy tokens of onnxruntime-genai, and the logits (V,) of the first."""
    import onnxruntime_genai as engine

    with tempfile.TemporaryDirectory() as built:
        builder = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(checkpoint),
            "-i",
            str(checkpoint),
        ]
        subprocess.run([*builder, "-o", built, "-p", "fp32", "-e", "cpu"], check=True)
        model = engine.Model(built)
        settings = engine.GeneratorParams(model)
        settings.set_search_options(max_length=len(PROMPT) + tokens, do_sample=False)
        generator = engine.Generator(model, settings)
        generator.append_tokens(np.array([PROMPT], dtype=np.int32))
        first, written = torch.from_numpy(np.array(generator.get_logits()).reshape(-1)), []
        while len(written) < tokens and not generator.is_done():
            generator.generate_next_token()
            written.append(int(generator.get_next_tokens()[0]))
    return written, first


def compared(checkpoint, written, first):
    """What transformers says of the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + written])).logits[0, len(PROMPT) - 1 : -1]
    agree = logits.argmax(-1) == torch.tensor(written)
    return {
        "same_greedy_tokens": len(written) if agree.all() else int(agree.int().argmin()),
        "tokens": len(written),
        "first_logits_difference": float((first - logits[0]).abs().max()),
        "largest_first_logit": float(logits[0].abs().max()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=PACKAGES)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in PACKAGES[arguments.engine]},
        "rows": {},
    }
    run = {"openvino": openvino, "onnxruntime-genai": onnxruntime_genai}[arguments.engine]
    for checkpoint in arguments.checkpoints:
        row = compared(checkpoint, *run(checkpoint, arguments.tokens))
        result["rows"][checkpoint.name] = row
        print(checkpoint.name, json.dumps(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
