"""Trains small models of other kinds on the demonstration's text, for `quality.py` to measure on.

    python benchmarks/small_models.py OUT --kind llama --kind qwen3

Each lands in OUT/KIND, with OUT/train.txt and OUT/held-out.txt beside them: `llama` has grouped queries (16 query heads
and 8 key/value heads), `qwen3` has QK-norm as well, `mea` is the demonstration's native model with head norm.
"""

from pathlib import Path

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mea_compress.demo.documents import library_documents, split_documents
from mea_compress.demo.training import Size, build_model, model_settings, train, train_tokenizer, training_sequences

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def build(kind: str, tokenizer, size: Size):
    if kind == "mea":
        return build_model(tokenizer, size)
    config_class, model_class = KINDS[kind]
    return model_class(config_class(**model_settings(tokenizer, size), num_attention_heads=2 * size.heads))


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS, "mea"]), default=tuple(KINDS))
@click.option("--steps", type=int, default=Size.steps, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out, kinds, steps, seed):
    size = Size(steps=steps)
    train_documents, held_out = split_documents(library_documents(size.text_bytes), size.held_out_share)
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train.txt", train_documents), ("held-out.txt", held_out)):
        (out / name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(train_documents, size.vocabulary, size.context)
    ids = training_sequences(train_documents, tokenizer, size.context)
    for kind in kinds:
        torch.manual_seed(seed)
        model = build(kind, tokenizer, size)
        click.echo(f"{kind}: {sum(p.numel() for p in model.parameters()):,} parameters", err=True)
        train(model, ids, size, seed, progress=True)
        model.config._attn_implementation = None
        model.save_pretrained(out / kind)
        tokenizer.save_pretrained(out / kind)


if __name__ == "__main__":
    main()
