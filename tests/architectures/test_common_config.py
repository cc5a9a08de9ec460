"""What is read of a config.json without transformers is what transformers' own class finds in it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CASES, LLAMA3_ROPE, SIZES
from transformers.activations import ACT2FN

from mea_compress.architectures import common_config
from mea_compress.architectures.checkpoint import _fields, model_configuration
from mea_compress.architectures.common_config import ModelShape, read_common_config
from mea_compress.architectures.families import FAMILIES
from mea_compress.errors import RequestError

BY_TYPE = {family.model_type: family for family in FAMILIES}


def saved(case, tmp_path):
    """The config.json that transformers writes for a case."""
    kind, traits = CASES[case]
    kind(**{**SIZES, **traits}).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def both(raw):
    """What the fast path finds, and a function that asks the class."""
    family = BY_TYPE[raw["model_type"].removeprefix("mea_")]
    native = raw["model_type"].startswith("mea_")
    before = json.dumps(raw)
    found = read_common_config(_fields(raw, family, native), family)
    assert json.dumps(raw) == before
    return found, lambda: model_configuration(raw, family, native, "config.json")


def assert_same(found, config):
    for name in ModelShape.__dataclass_fields__:
        assert getattr(found, name) == getattr(config, name, getattr(ModelShape, name, None)), name


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_plain_and_read_alike(case, tmp_path):
    found, ask = both(saved(case, tmp_path))
    assert found is not None
    assert_same(found, ask())


PUBLISHED = {
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_plain_and_read_alike(name):
    found, ask = both(PUBLISHED[name])
    assert found is not None
    assert_same(found, ask())


# Settings that a checkpoint may well have, by name; those that a family does not know make it unusual.
USUAL = {
    "head_dim": [2, 4, 6, 8],
    "num_key_value_heads": [1, 2, 8],
    "rms_norm_eps": [1e-5],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "sliding_window": [None, 3],
    "use_sliding_window": [True, False],
    "max_window_layers": [1, 2, 5],
    "layer_types": [None, ["full_attention", "sliding_attention"]],
    "mlp_only_layers": [[], [0]],
    "decoder_sparse_step": [1, 2],
    "hidden_act": ["gelu", "relu"],
    "eos_token_id": [[1, 2], None],
    "torch_dtype": ["float16"],
}
UNUSUAL = st.sampled_from(
    [
        *[None, True, False, 0, 1, 2, 3, 7, 64, -1, 0.0, 0.5, 1.0, 8.0, 1e-6, 1e300, float("nan"), float("inf")],
        *["silu", "gelu_new", "loud", "bfloat16", "float8", [], [1], [0, 1], {}],
        *[["full_attention"], ["sliding_attention"] * 2],
    ]
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", "imaginary"]),
        **{
            name: st.sampled_from([None, 1, 4.0, 1e4, "2", 32, 0.5, -1.0])
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        },
        "rope_theta": st.sampled_from([1e4, 10_000, 5e5, 0, None]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0, 0.3, 2, None]),
    },
)
ANY_ROPE = st.none() | ROPE | st.just(LLAMA3_ROPE)
LAYER = st.fixed_dictionaries(
    {
        "key_composition": st.sampled_from(["none", "head", "latent", "pool", "frequency"]),
        "key_components": st.sampled_from([1, 2, 4, 1.5, 0, None]),
        "value_composition": st.sampled_from(["none", "head", "latent", "pool"]),
        "value_components": st.sampled_from([1, 2, 4, 5]),
    }
)
SECTION = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.lists(LAYER, min_size=2, max_size=2),
        "qk_norm": st.booleans(),
        "head_norm": st.booleans(),
        "bias": st.dictionaries(st.sampled_from(["query", "key"]), st.booleans()),
        "format": st.sampled_from([1, 2]),
    },
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_accepted_is_read_alike(data, tmp_path_factory):
    case = data.draw(st.sampled_from(list(CASES)))
    raw = saved(case, tmp_path_factory.mktemp("config"))
    names = sorted({*raw, *common_config._OPTIONAL, "num_experts", "layer_types", "attention_bias", "something_else"})
    names = [name for name in names if name not in ("model_type", "transformers_version", "architectures")]
    for name in data.draw(st.lists(st.sampled_from([name for name in USUAL if name in raw]), max_size=3)):
        raw[name] = data.draw(st.sampled_from(USUAL[name]))
    if data.draw(st.sampled_from([False, False, True])):
        raw[data.draw(st.sampled_from(names))] = data.draw(UNUSUAL)
    if data.draw(st.sampled_from([False, False, True])):
        del raw[data.draw(st.sampled_from(sorted(raw.keys() - {"model_type"})))]
    if data.draw(st.sampled_from([False, False, True])):
        raw[data.draw(st.sampled_from(["rope_parameters", "rope_scaling"]))] = data.draw(ANY_ROPE)
    if data.draw(st.booleans()):
        raw["model_type"], raw["mea"] = "mea_" + raw["model_type"], data.draw(SECTION)
    try:
        _fields(raw, BY_TYPE[raw["model_type"].removeprefix("mea_")], raw["model_type"].startswith("mea_"))
    except (KeyError, TypeError):  # sizes that are refused before either is asked
        return
    found, ask = both(raw)
    if found is not None:
        assert_same(found, ask())


def test_activations_are_transformers_own():
    assert set(common_config._ACTIVATIONS) <= set(ACT2FN)


@pytest.mark.parametrize("change", [{"rope_theta": 0}, {"mea": {"format": 7}}, {"hidden_act": "loud"}, {"new": 1}])
def test_what_is_not_plain_is_left_to_the_class(change, tmp_path):
    raw = saved("llama", tmp_path) | {"model_type": "mea_llama", "mea": {}}
    assert both(raw)[0] is not None
    found, ask = both({key: value for key, value in (raw | change).items() if key != "rope_parameters"})
    assert found is None
    if "rope_theta" not in change and "new" not in change:
        with pytest.raises(RequestError):
            ask()
