"""mea-compress: key/value heads of a trained transformer, rebuilt from fewer (arXiv 2601.19611).

Importing the package registers the MEA model types, so ``AutoModelForCausalLM.from_pretrained`` loads compressed
checkpoints without ``trust_remote_code``.
"""

from mea_compress.modeling import register

__version__ = "0.1.0"

__all__ = ["__version__", "register"]
