"""Tokenizers laid out as families publish them: a class in tokenizer_config.json that is not the one that is loaded."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

TEXT = "Once upon a time there was a dog. It's a good dog and don't it know 12345 times? She'll be there, once. "
PROBE = "Once upon a time.</s>Once upon  a time 123.<|im_end|>once it's\n\nthere"
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
TALK = [{"role": "user", "content": "once"}, {"role": "assistant", "content": " a time"}]
CHAT = "{% for m in messages %}<|im_end|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"


def _metaspace() -> Tokenizer:
    """As Llama 2 and Mistral: a space becomes ▁, and one is put in front of the text, once."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator([TEXT] * 4, BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL)))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _byte_level() -> Tokenizer:
    """As DeepSeek's distillations of Qwen: bytes, but words split in another way than Qwen's class does."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(r"\d{1,3}|\s?\p{L}+|[^\s\p{L}\d]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


LAYOUTS = {
    ("mistral-full", "LlamaTokenizer"): _metaspace,  # Mistral-7B-Instruct-v0.2
    ("mistral-full", None): _metaspace,
    ("llama", "LlamaTokenizer"): _metaspace,  # Llama-2
    ("llama", "LlamaTokenizerFast"): _byte_level,  # DeepSeek-R1-Distill-Llama
    ("llama", "PreTrainedTokenizerFast"): _byte_level,  # Llama-3
    ("phi3", "LlamaTokenizer"): _metaspace,  # Phi-3-mini
    ("phi3", "GPT2Tokenizer"): _byte_level,  # Phi-4
    ("qwen2", "Qwen2Tokenizer"): _byte_level,
    ("qwen2", "LlamaTokenizerFast"): _byte_level,  # DeepSeek-R1-Distill-Qwen
    ("qwen2", "PreTrainedTokenizerFast"): _byte_level,
    ("qwen2", None): _byte_level,
    ("qwen3", "Qwen2Tokenizer"): _byte_level,
    ("qwen3", "PreTrainedTokenizerFast"): _byte_level,
    ("qwen3", None): _byte_level,
    ("qwen3_moe", None): _byte_level,
}
"""What makes tokenizer.json, by a case of `tiny.CASES` and the class that tokenizer_config.json names."""

AT_CACHE = {
    ("gemma3_text", "GemmaTokenizer"): _metaspace,
    ("gemma3_text", None): _metaspace,
    ("gpt2", "GPT2Tokenizer"): _byte_level,
    ("gpt2", None): _byte_level,
    ("glm", "PreTrainedTokenizerFast"): _byte_level,
    ("cohere2", "CohereTokenizerFast"): _byte_level,
    ("starcoder2", "GPT2Tokenizer"): _byte_level,
    ("llama4_text", "PreTrainedTokenizer"): _byte_level,
}
"""The same of families that are composed at their cache."""


def publish(directory: Path, case: str, name: str | None) -> Path:
    """Puts the tokenizer of a layout into a checkpoint directory."""
    tokenizer = (LAYOUTS | AT_CACHE)[case, name]()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT}
    if name is not None:
        settings["tokenizer_class"] = name
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def told(directory: Path, **options: object) -> tuple:
    """What a directory's tokenizer makes of a text with special tokens and of a chat, ids and text again."""
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    ids = tokenizer(PROBE)["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.apply_chat_template(TALK)["input_ids"], tokenizer.eos_token_id
