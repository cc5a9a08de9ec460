"""Run under one release of transformers: the ids that the tokenizers of checkpoints make of a text, as JSON on stdout.

    python tokenize_text.py package|remote TEXT CHECKPOINT...

`package` loads with this package imported, `remote` with the code that the checkpoint carries.
"""

import json
import sys

MODE, TEXT, *CHECKPOINTS = sys.argv[1:]
if MODE == "package":
    import mea_compress  # noqa: F401
else:
    sys.modules["mea_compress"] = None
from transformers import AutoTokenizer  # noqa: E402

options = {"trust_remote_code": MODE == "remote"}
print(json.dumps({path: AutoTokenizer.from_pretrained(path, **options)(TEXT)["input_ids"] for path in CHECKPOINTS}))
