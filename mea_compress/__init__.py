"""mea-compress: key/value heads of a trained transformer, rebuilt from fewer (arXiv 2601.19611).

Importing the package registers the MEA model types, so ``AutoModelForCausalLM.from_pretrained`` loads compressed
checkpoints without ``trust_remote_code``. Only the program ``mea-compress`` itself registers later, where it needs to.
"""

import sys
from pathlib import Path

from mea_compress.modeling import register

__version__ = "0.2.0"

# The command line loads models seldom, and registers where it does: importing transformers takes seconds.
if Path(next(iter(sys.argv), "")).stem != "mea-compress":
    register()

__all__ = ["__version__", "register"]
