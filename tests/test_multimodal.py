"""Models of more than text: the language model inside is composed, and images and sound reach it as before."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from letters import character_tokenizer
from remote import remote_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save, scatter
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.cache_utils import DynamicCache

import mea_compress as mc
from mea_compress.architectures import open_checkpoint
from mea_compress.errors import RequestError
from mea_compress.fit import layers as fit_layers
from mea_compress.loading import placeholder_tokens
from mea_compress.text.sampling import sample_sequences

IMAGE = 60
TEXT = tiny.SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
# As deep and as wide as the language model, so that one can be taken for the other.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SOUND = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 8,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
QWEN_VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FOUR_PATCHES = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))}
# Four by four patches of two frames, which become four tokens.
QWEN_PATCHES = {
    "pixel_values": torch.randn(16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(5)),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
# What the configuration of each has beside that of a language model, and one image of four tokens as it takes it.
MODELS = {
    "aya_vision": ({"text_config": TEXT | {"model_type": "cohere2"} | SLIDING, "image_token_index": IMAGE}, None),
    "gemma3": (
        {"text_config": TEXT | SLIDING, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
        FOUR_PATCHES | {"token_type_ids": None},
    ),
    "glm4v": (
        {"text_config": TEXT | MROPE | {"partial_rotary_factor": 1.0}} | QWEN_TOKENS | {"image_start_token_id": 58},
        None,
    ),
    "idefics3": ({"text_config": TEXT | {"model_type": "llama"}, "image_token_id": IMAGE, "scale_factor": 1}, None),
    "internvl": ({"text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE}, None),
    "internvl+moe": (  # experts are stored one by one, under names of the language model's own
        {
            "text_config": TEXT
            | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "image_token_id": IMAGE,
        },
        None,
    ),
    "llava": (
        {
            "text_config": TEXT | {"model_type": "llama"},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "image_seq_length": 4,
        },
        FOUR_PATCHES,
    ),
    "mistral3": (
        {"text_config": TEXT | {"model_type": "mistral"}, "image_token_index": IMAGE, "spatial_merge_size": 1},
        None,
    ),
    "mllama": (  # the layer that attends to images is passed over where there is none
        {
            "text_config": TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [1],
                "vision_output_dim": 64,
            },
            "image_token_index": IMAGE,
        },
        None,
    ),
    "qwen2_5_vl": (
        {"text_config": TEXT | MROPE, "vision_config": QWEN_VISION | {"out_hidden_size": 32, "window_size": 32}}
        | QWEN_TOKENS,
        QWEN_PATCHES,
    ),
    "qwen3_5": (
        {"text_config": TEXT | HYBRID, "vision_config": QWEN_VISION | {"out_hidden_size": 32}} | QWEN_TOKENS,
        None,
    ),
    "qwen3_vl": (
        {
            "text_config": TEXT | MROPE,
            "vision_config": QWEN_VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        }
        | QWEN_TOKENS,
        None,
    ),
    "smolvlm": ({"text_config": TEXT | {"model_type": "llama"}, "image_token_id": IMAGE, "scale_factor": 1}, None),
    "voxtral": (
        {"text_config": TEXT | {"model_type": "llama"}, "audio_config": SOUND, "audio_token_id": IMAGE},
        None,
    ),
}
WITH_IMAGE = [name for name, (_, image) in MODELS.items() if image]


def tokens(batch, length, seed=0):
    return torch.randint(3, 58, (batch, length), generator=torch.Generator().manual_seed(seed))


def stock_checkpoint(name, directory):
    """A checkpoint of transformers' own class."""
    torch.manual_seed(0)
    settings = dict(MODELS[name][0])
    if "audio_config" not in settings:
        settings.setdefault("vision_config", dict(VISION))
    config = CONFIG_MAPPING[name.partition("+")[0]](**settings)
    character_tokenizer().save_pretrained(directory)
    return save(scatter(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config)), directory)


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """Each model's stock checkpoint, and it at whole and half width, made when first asked for."""

    @cache
    def make(name):
        directory = tmp_path_factory.mktemp(name)
        source, whole, half = (directory / part for part in ("source", "whole", "half"))
        stock_checkpoint(name, source)
        common = {"split": "even", "sequences": 6, "sequence_length": 48, "refine": 2, "progress": False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit_layers, "calibration_tokens", lambda *_: tokens(6, 48, 1))
            mc.compress(source, whole, kv_ratio=1.0, heal=0, **common)
            result = mc.compress(source, half, kv_ratio=0.5, heal=2, **common)
        return SimpleNamespace(source=source, whole=whole, half=half, result=result)

    return make


def load(directory, kind=AutoModelForMultimodalLM, dtype=torch.float32):
    model = kind.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits


def with_image(name):
    """Tokens of a text with an image in it, and what the model takes beside them."""
    ids = tokens(1, 12)
    ids[:, 2:7] = torch.tensor([QWEN_TOKENS["vision_start_token_id"], *[IMAGE] * 4])
    options = dict(MODELS[name][1])
    if "token_type_ids" in options:
        options["token_type_ids"] = (ids == IMAGE).long()
    if "image_grid_thw" in options:
        options["mm_token_type_ids"] = (ids == IMAGE).int()
    return ids, options


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_composed_and_all_else_stays(name, outs):
    made, ids = outs(name), tokens(2, 12)
    original, whole, half = load(made.source), load(made.whole), load(made.half)
    expected = logits(original, ids, use_cache=False)
    size = expected.abs().max()
    assert (logits(whole, ids, use_cache=False) - expected).abs().max() < 2e-5 * size
    uncached = logits(half, ids, use_cache=False)
    assert (uncached - expected).abs().max() > 1e-3 * size
    assert made.result.plan.bytes_after == made.result.plan.bytes_before / 2

    cache = DynamicCache(config=half.config)
    steps = [logits(half, ids[:, :4], past_key_values=cache)]
    specs = half.config.mea["layers"]
    held = sum(
        side.untyped_storage().nbytes()
        for layer, spec in zip(cache.layers, specs, strict=True)
        if spec is not None
        for side in (layer.keys, layer.values)
    )
    assert held == made.result.plan.bytes_after * 8
    steps += [logits(half, ids[:, t : t + 1], past_key_values=cache) for t in range(4, 12)]
    assert (torch.cat(steps, 1) - uncached).abs().max() < 1e-5 * size

    # Composed are the blocks of the language model and no others, and nothing else has changed.
    language = half.get_decoder()
    composed = {module for module in half.modules() if hasattr(module, "key_composition")}
    assert len(composed) == sum(spec is not None for spec in specs) and composed <= set(language.modules())
    before, after = original.state_dict(), half.state_dict()
    blocks = tuple(spec["block"] for spec in specs if spec)
    assert before.keys() == {key for key in after if "_composition." not in key}
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith(blocks))

    # Every map of a block that keys and values are not made by was healed, under the name that it is stored by.
    healed = made.result.fidelity["healing"]
    assert healed["kl_after"] <= healed["kl_before"]
    source = open_checkpoint(made.source)
    with safe_open(made.half / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    for layer in range(source.config.num_hidden_layers):
        if source.geometry(layer) is not None:
            assert source.attention_tensor(layer, "key_composition.weight") in stored
            assert source.reader.has(source.attention_tensor(layer, "o_proj.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_IMAGE)
def test_images_reach_it_as_before(name, outs):
    ids, image = with_image(name)
    original, whole, half = (load(getattr(outs(name), which)) for which in ("source", "whole", "half"))
    expected = logits(original, ids, **image, use_cache=False)
    size = expected.abs().max()
    assert (logits(original, ids, use_cache=False) - expected).abs().max() > 1e-3 * size  # they are looked at
    assert (logits(whole, ids, **image, use_cache=False) - expected).abs().max() < 2e-5 * size

    greedy = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, **image}
    assert torch.equal(whole.generate(ids, **greedy), original.generate(ids, **greedy))
    uncached = half.generate(ids, use_cache=False, **greedy)
    assert torch.equal(half.generate(ids, **greedy), uncached)


@pytest.mark.slow
def test_it_is_read_and_saved_like_any_other(outs, tmp_path):
    made = outs("gemma3")
    assert mc.open(made.source).to_json()["family"] == "gemma3"
    assert mc.open(made.half).bytes_per_token * 2 == mc.open(made.source).bytes_per_token
    told = json.loads((made.half / "config.json").read_text())
    assert told["model_type"] == "mea_gemma3" and "mea" not in told["text_config"]
    assert "AutoModelForImageTextToText.from_pretrained" in (made.half / "README.md").read_text()

    model, _ = mc.load(made.half, device="cpu")
    assert type(model).__name__ == "MeaGemma3ForConditionalGeneration"
    again = save(model, tmp_path / "again")
    assert "mea" not in json.loads((again / "config.json").read_text())["text_config"]
    ids = tokens(2, 9)
    expected = logits(load(made.half), ids)
    torch.testing.assert_close(logits(load(again), ids), expected)
    torch.testing.assert_close(logits(load(again, AutoModelForCausalLM), ids), expected)
    assert open_checkpoint(again).geometry(1) == open_checkpoint(made.half).geometry(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_it_is_measured_and_healed_by_text_alone(name, outs, tmp_path):
    made, text = outs(name), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    measured = mc.evaluate(
        made.half, reference=made.source, text=text, sequence_length=32, device="cpu", progress=False
    )
    assert measured.kl > 0 and 2 * measured.kv_bytes_per_token == measured.reference.kv_bytes_per_token
    options = {"text": text, "steps": 4, "batch_size": 4, "sequence_length": 32, "device": "cpu", "progress": False}
    healed = mc.heal(made.half, teacher=made.source, out=tmp_path / "healed", **options)
    assert healed.kl_after < healed.kl_before
    before, after = load(made.half).state_dict(), load(tmp_path / "healed").state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    blocks = tuple(spec["block"] for spec in load(made.half).config.mea["layers"])
    assert changed and all(key.startswith(blocks) for key in changed)


@pytest.mark.slow
def test_a_published_configuration_without_parts_is_healed_too(tmp_path):
    """Those of Qwen2-VL and Qwen2.5-VL say of the whole what later ones say of the language model."""
    source, text = stock_checkpoint("qwen2_5_vl", tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    config = json.loads((source / "config.json").read_text())
    language = {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
    (source / "config.json").write_text(json.dumps(language | config))
    common = {"text": text, "sequence_length": 32, "progress": False}
    out = mc.compress(source, tmp_path / "half", kv_ratio=0.5, refine=0, heal=0, split="even", **common).out
    before, expected = logits(load(out), tokens(2, 12)), logits(load(source), tokens(2, 12))
    mc.heal(out, teacher=source, steps=20, batch_size=4, device="cpu", **common)
    after = logits(load(out), tokens(2, 12))
    assert (after - expected).norm() != (before - expected).norm()


@pytest.mark.slow
def test_a_tensor_that_is_missing_is_not_drawn_at_random(tmp_path):
    source = stock_checkpoint("llava", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = {"kv_ratio": 0.5, "sequences": 6, "sequence_length": 32, "progress": False}
    with pytest.raises(RequestError, match=r"layers\.1\.mlp\.down_proj\.weight"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_layers, "calibration_tokens", lambda *_: tokens(6, 32, 1))
        mc.compress(source, tmp_path / "half", **options)
    assert not (tmp_path / "half").exists()


def test_a_prompt_that_attends_in_both_directions_is_refused(tmp_path):
    config = CONFIG_MAPPING["paligemma"](
        text_config=TEXT | {"model_type": "gemma"}, vision_config=dict(VISION), image_token_index=IMAGE
    )
    source = save(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config), tmp_path / "source")
    with pytest.raises(RequestError, match=r"this paligemma checkpoint cannot be compressed, its prompts attend in bo"):
        open_checkpoint(source)


def test_no_placeholder_is_sampled(tmp_path):
    model = load(stock_checkpoint("gemma3", tmp_path / "source"))
    assert IMAGE in placeholder_tokens(model.config)
    ids = sample_sequences(model, None, 40, 32, progress=False)
    assert ids.max() > IMAGE - 5 and not torch.isin(ids, torch.tensor(placeholder_tokens(model.config))).any()


@pytest.mark.slow
@pytest.mark.process
def test_they_load_as_remote_code_where_the_package_is_absent(outs, tmp_path):
    made = [outs(name).half for name in ("gemma3", "llava", "qwen3_5")]
    ids = tokens(2, 9)
    for out, found in remote_logits(made, ids, tmp_path).items():
        torch.testing.assert_close(found, logits(load(out), ids), rtol=0, atol=1e-5)
