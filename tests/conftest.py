import gc
import os

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

os.environ["MEA_COMPRESS_CACHE"] = ""  # sampled text is made anew, and nothing is left behind

# Fixtures that take seconds to minutes and serve several tests of a module, and parameters that each is made for.
_COSTLY = {
    "test_every_family": {"outs"},
    "test_multimodal": {"outs"},
    "test_reports_at_the_cache": {"made"},
    "test_families": {"halves"},
    "test_releases": {"checkpoints", "expected", "tokenized"},
    "test_sweep": {"whole"},
    "test_demo": {"done"},
}
_MADE_FOR = {"name", "case", "made"}


def pytest_collection_modifyitems(items):
    """Have the tests that share a costly fixture run in one worker, which makes it once."""
    for item in items:
        if _COSTLY.get(item.path.stem, set()) & set(getattr(item, "fixturenames", ())):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            of = [str(parameters[name]) for name in sorted(_MADE_FOR & parameters.keys())]
            item.add_marker(pytest.mark.xdist_group("-".join([item.path.stem, *of])))


def pytest_collection_finish():
    """Have no collection of garbage look at the libraries again: accelerate asks for one behind every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def exact_norms(monkeypatch):
    """Transformers' norms compute in float32; for comparisons in float64 they stay in float64."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Qwen3MoeRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
