"""Run under one release of transformers: sequences of texts and conversations, and sampled ones, as JSON on stdout.

python text_here.py DIRECTORY
"""

import json
import sys
from pathlib import Path

import transformers
from letters import character_tokenizer, tiny_llama
from transformers import AutoTokenizer

from mea_compress.text.reading import read_documents
from mea_compress.text.sampling import sample_sequences
from mea_compress.text.sequences import padded_sequences, sequence_prefix, token_sequences

DIRECTORY = Path(sys.argv[1])
CHATML = "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}{{ tools }}"
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]

tokenizer = character_tokenizer()
tokenizer.chat_template = CHATML
tokenizer.save_pretrained(DIRECTORY / "tokenizer")
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY / "tokenizer")
chats = DIRECTORY / "chats.jsonl"
chats.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": TALK, "tools": [{"a": 1}]}))
found = {
    "transformers": transformers.__version__,
    "prefix": sequence_prefix(tokenizer),
    "text": token_sequences(["the quick brown fox jumps over the lazy dog"], tokenizer, 8).tolist(),
    "chats": padded_sequences(read_documents(chats), tokenizer, 64)[0].tolist(),
    "sampled": sample_sequences(tiny_llama(), tokenizer, 24, 32, progress=False).tolist(),
}
print(json.dumps(found))
