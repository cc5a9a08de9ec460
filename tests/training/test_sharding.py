"""Models sharded over processes: two of them on a CPU give what one has without sharding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compat.releases import NEWEST, OLDEST, release_directory
from letters import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from test_healing import CURVE, KILLED, SETTINGS, in_a_process, make_student, port, weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from mea_compress.compression import compress
from mea_compress.errors import RequestError
from mea_compress.fit.refinement import _within_groups
from mea_compress.healing import heal
from mea_compress.loading import load_model
from mea_compress.training import sharding, trainer
from mea_compress.training.distillation import distil, measure
from mea_compress.training.settings import DistillationSettings
from mea_compress.training.stages import Stages

IDS = torch.randint(3, 29, (28, 16), generator=torch.Generator().manual_seed(1))
CASES = {
    "small micro-batches": (
        "student",
        ("attention",),
        {"temperature": 2.0, "match_hidden": 0.5, "match_attention": 0.5},
    ),
    "checkpointing": ("student", ("attention",), {"gradient_checkpointing": True, "match_attention": 1.0}),
    "tied, all weights": ("tied", ("attention", "all"), {"cross_entropy": 0.3, "top_logits": 8}),
    "bfloat16": ("student", ("attention",), {"products": torch.bfloat16}),
    "groups of heads": ("groups", ("compositions", "attention"), {}),
}


@pytest.fixture
def teacher(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def students(directory: Path) -> None:
    """Write a student for each case, and its teacher."""
    tiny_llama().save_pretrained(directory / "student-teacher")
    make_student(directory / "student")
    tied = tiny_llama(tie_word_embeddings=True, num_hidden_layers=3)
    tied.save_pretrained(directory / "tied-teacher")
    with torch.no_grad():
        for layer in tied.model.layers:
            layer.self_attn.v_proj.weight += 0.3
    tied.save_pretrained(directory / "tied")
    source = directory / "groups-teacher"
    tiny_llama(num_key_value_heads=4).save_pretrained(source)
    character_tokenizer().save_pretrained(source)
    settings = {"kv_groups": 2, "fit": "weights", "key_composition": "head", "value_composition": "head"}
    compress(source, directory / "groups", kv_ratio=0.5, progress=False, **settings)


def healed(name: str, directory: Path, sharded: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """Distil the student of a case; return its curves, and all of its weights afterwards."""
    which, stages, options = CASES[name]
    teacher, model = (load_model(directory / path, None, "cpu") for path in (f"{which}-teacher", which))
    teacher.requires_grad_(False)
    if sharded:
        for one in (teacher, model):
            sharding.shard(one, sharding.all_processes(torch.device("cpu")), options.get("products"))
    products = options.get("products", torch.float32)
    curves, training = {"before": measure(model, teacher, IDS[20:], products).kl}, Stages(model)
    for stage in stages:
        model.float()
        training.begin(stage)
        settings = DistillationSettings(4, 8, rates=(0.05,), **options)
        result = distil(model, teacher, IDS[:16], IDS[20:], settings)
        curves[stage] = [result.rate, result.curve, result.losses]
    if sharded:
        for one in (teacher, model):
            parts = sum(weight.to_local().numel() for weight in one.parameters())
            assert parts == pytest.approx(sum(weight.numel() for weight in one.parameters()) / 2, rel=0.1)
    found = sharding.gathered(model.state_dict())
    return json.loads(json.dumps(curves)), found


def work(directory: Path, names: list[str]) -> None:
    """Do what a process of two does, and check that it has half of each model, gradient and moment."""
    torch.distributed.init_process_group("gloo")

    def check_parts(optimiser, *_):
        for group in optimiser.param_groups:
            for weight in group["params"]:
                for tensor in (weight, weight.grad, optimiser.state[weight]["exp_avg_sq"]):
                    assert abs(2 * tensor.to_local().numel() - tensor.numel()) <= tensor[:1].numel()

    register_optimizer_step_post_hook(check_parts)
    for name in names:
        trainer.HEALING_MICRO_TOKENS = 32 if name == "small micro-batches" else 1024
        curves, found = healed(name, directory, True)
        if os.environ["RANK"] == "0":
            save_file({key: value.clone() for key, value in found.items()}, directory / f"{name}.safetensors")
            (directory / f"{name}.json").write_text(json.dumps(curves))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.process
def test_a_sharded_student_learns_what_a_whole_one_does(tmp_path, monkeypatch):
    students(tmp_path)
    command = f"import pathlib, test_sharding; test_sharding.work(pathlib.Path({str(tmp_path)!r}), {list(CASES)})"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared = os.environ | meeting | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", command], env=shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in both] == [0, 0]
    for name, (which, stages, _) in CASES.items():
        monkeypatch.setattr(trainer, "HEALING_MICRO_TOKENS", 32 if name == "small micro-batches" else 1024)
        curves, expected = healed(name, tmp_path, False)
        near = 0.05 if name == "bfloat16" else 1e-3
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["before"] == pytest.approx(curves["before"], rel=0.1 * near)
        for stage in stages:
            (rate, curve, losses), (same, points, others) = found[stage], curves[stage]
            assert rate == same and losses == pytest.approx(others, rel=near) and len(losses) == 4
            assert [value for _, value in curve] == pytest.approx([value for _, value in points], rel=near)
        assert min(losses) < 0.98 * losses[0]
        tensors = load_file(tmp_path / f"{name}.safetensors")
        start = load_model(tmp_path / which, None, "cpu").state_dict()
        for key, tensor in expected.items() if near == 1e-3 else ():
            torch.testing.assert_close(tensors[key], tensor, rtol=near, atol=0.1 * near)
        changed = {key for key, tensor in tensors.items() if not torch.equal(tensor, start[key])}
        assert changed and (stages[-1] == "all") == ("model.embed_tokens.weight" in changed)
    model = load_model(tmp_path / "groups", None, "cpu")
    for key, composition in model.named_modules():
        if key.endswith("_composition"):
            within = _within_groups(composition, 2)
            assert not within.all() and f"{key}.weight" in changed
            assert not tensors[f"{key}.weight"][~within].any()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("version", dict.fromkeys((OLDEST, NEWEST)))
def test_sharded_processes_that_were_killed_go_on_to_what_one_alone_has(version, tmp_path, teacher, monkeypatch):
    student, text = make_student(tmp_path / "student"), tmp_path / "text.txt"
    text.write_text("\n".join(f"a story of {letter} and the little fox" * 3 for letter in "abcdefghijklmnop" * 4))
    alone = heal(student, teacher=teacher, out=tmp_path / "alone", text=text, **SETTINGS | CURVE)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    if (release := release_directory(version)) is not None:  # in front of what the processes import
        monkeypatch.syspath_prepend(release)
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port")
    what = (KILLED, student, teacher, tmp_path / "both")
    stopped = in_a_process(*launch, port(), *what, alone.stages[0].all_steps - 20 + 14, "--text", text)
    assert stopped.returncode and not (tmp_path / "both").exists()
    assert list((tmp_path / "both.partial").rglob("checkpoint-*/parts/.metadata")), stopped.stderr[-2000:]
    resumed = in_a_process(*launch, port(), *what, 1000, "--text", text, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    record = json.loads((tmp_path / "both" / "healing.json").read_text())
    assert record["versions"]["transformers"] == version
    assert record["losses"] == pytest.approx(list(alone.losses), rel=1e-3) and len(record["losses"]) == 20
    assert [value for _, value in record["curve"]] == pytest.approx([value for _, value in alone.curve], rel=1e-3)
    assert record["kl_after"] == pytest.approx(alone.kl_after, rel=1e-3) and record["kept"] == "healed"
    expected = weights(tmp_path / "alone")
    for name, tensor in weights(tmp_path / "both").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["alone", "both", "student", "teacher"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "second version of FSDP alone: add --fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params is not done here"),
        ({"FSDP_VERSION": "2"}, "there is one: add --num_processes 2"),
    ],
)
def test_what_a_launcher_may_not_ask_for_is_a_sentence(environment, said, tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=said):
        heal(student, teacher=teacher, **SETTINGS)


@pytest.mark.parametrize(
    ("options", "said"), [({}, "samples no text: give `text`"), ({"train": "lora"}, "adapters are not sharded")]
)
def test_what_sharded_models_cannot_do_is_a_sentence(options, said, tmp_path, teacher, monkeypatch):
    student = make_student(tmp_path / "student")
    (tmp_path / "text.txt").write_text("once upon a time " * 50)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    text = {"text": tmp_path / "text.txt"} if options else {}
    with pytest.raises(RequestError, match=said):
        heal(student, teacher=teacher, **SETTINGS | options | text)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"  # for whatever comes behind it


def test_layers_that_share_weights_are_not_sharded():
    model = tiny_llama()
    assert len(sharding._decoder_layers(model)) == 2
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(RequestError, match="LlamaForCausalLM cannot be sharded one by one"):
        sharding._decoder_layers(model)
    model = tiny_llama()
    model.model.norm = model.model.layers[0].input_layernorm
    with pytest.raises(RequestError, match="cannot be sharded"):
        sharding._decoder_layers(model)
