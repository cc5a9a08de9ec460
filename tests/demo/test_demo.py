import json
import shlex
import sysconfig
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from mea_compress.cli import cli
from mea_compress.demo import run as demo
from mea_compress.errors import RequestError

TINY = demo.Size(
    steps=4,
    healing_share=0.5,
    refining_steps=3,
    calibration_sequences=40,
    text_bytes=120_000,
    held_out_share=0.1,
    vocabulary=300,
    layers=2,
    heads=4,
    head_dim=4,
    intermediate=24,
    context=32,
    batch_size=2,
    measured_sequences=4,
)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "out"
    printed = demo.run_demo(directory, device="cpu", size=TINY, progress=False)
    return directory, printed


@pytest.mark.slow
def test_table_compares_the_three(done):
    directory, printed = done
    figures = json.loads((directory / "demo.json").read_text())["figures"]
    assert list(figures) == ["original", "paper-start", "compressed", "healed"]
    for name, found in figures.items():
        (row,) = [line for line in printed.splitlines() if line.startswith(f"| {name} ")]
        assert f"{found['cross_entropy']:.4f}" in row and f"{found['kl']:.4f}" in row
        assert found["cross_entropy"] > 0
    assert figures["original"]["kl"] == 0 and figures["original"]["top1_agreement"] == 1
    # Two layers of 4 heads of 4 channels, keys and values, in float32; then half of it.
    assert figures["original"]["kv_bytes_per_token"] == 2 * 2 * 4 * 4 * 4
    for name in ("compressed", "healed"):
        assert figures[name]["kv_bytes_per_token"] == 2 * 2 * 2 * 4 * 4
        model = AutoModelForCausalLM.from_pretrained(directory / name)
        assert figures[name]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_original_is_a_native_model_with_head_norm(done):
    model = AutoModelForCausalLM.from_pretrained(done[0] / "original")
    assert model.config.model_type == "mea_llama" and model.config.mea["head_norm"]
    assert all(layer["key_components"] == 4 for layer in model.config.mea["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original", "compressed", "healed"])
def test_checkpoints_carry_the_code_that_loads_them(done, name):
    directory = done[0] / name
    auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for target in auto_map.values():
        module, name = target.split(".")
        assert f"class {name}(" in (directory / f"{module}.py").read_text()


def test_the_default_model_has_one_to_three_million_parameters():
    class Tokens:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def __len__(self) -> int:
            return demo.Size().vocabulary

    with torch.device("meta"):
        model = demo.build_model(Tokens(), demo.Size())
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 3e6
    assert model.config.num_key_value_heads == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original", "compressed", "healed"])
def test_checkpoints_load_and_generate(done, name):
    model = AutoModelForCausalLM.from_pretrained(done[0] / name)
    tokenizer = AutoTokenizer.from_pretrained(done[0] / name)
    prompt = tokenizer("def é\t", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt["input_ids"][0], skip_special_tokens=True) == "def é\t"
    ids = model.generate(prompt["input_ids"], max_new_tokens=5, do_sample=False)
    assert ids.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
def test_what_it_says_to_type_next_works(done):
    commands = [line.strip() for line in done[1].splitlines() if "mea-compress " in line]
    assert len(commands) == 3
    for command in commands:
        _, *arguments = shlex.split(command)
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_original_is_used_again_while_settings_stay(done):
    directory, printed = done
    trained = (directory / "original" / "model.safetensors").stat().st_mtime_ns
    again = demo.run_demo(directory, device="cpu", size=TINY, progress=False)
    assert (directory / "original" / "model.safetensors").stat().st_mtime_ns == trained
    assert again == printed


@pytest.mark.slow
def test_same_seed_same_bytes_and_other_settings_train_anew(done, tmp_path):
    demo.run_demo(tmp_path / "out", device="cpu", size=TINY, progress=False)
    for name in ("original", "compressed", "healed"):
        assert weights(tmp_path / "out" / name) == weights(done[0] / name)
    before = weights(tmp_path / "out" / "original")
    demo.run_demo(tmp_path / "out", steps=5, device="cpu", size=TINY, progress=False)
    assert weights(tmp_path / "out" / "original") != before


@pytest.mark.slow
def test_interrupted_training_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path / "out", device="cpu", size=TINY, progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.json", "text"}
    demo.run_demo(tmp_path / "out", device="cpu", size=TINY, progress=False)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match="--out"):
        demo.run_demo(tmp_path, device="cpu", size=TINY)
    with pytest.raises(RequestError, match="--out"):
        demo.run_demo(tmp_path / "thesis.tex", device="cpu", size=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_documents_are_held_out_whole():
    documents = demo.library_documents(2_000_000)
    assert documents == demo.library_documents(2_000_000)
    assert len(set(documents)) == len(documents)
    train, held_out = demo.split_documents(documents, 0.04)
    assert train and held_out and sorted(train + held_out) == sorted(documents)
    assert sum(map(len, held_out)) >= 0.04 * sum(map(len, documents))
    assert sum(len(text.encode()) for text in documents) <= 2_000_000


def test_topics_are_among_the_documents():
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "pydoc_data" / "topics.py").is_file():
        pytest.skip("this Python has no language topics")
    everything = demo.library_documents(100_000_000)
    assert any("Assignment statements" in text and "topics = {" not in text for text in everything)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(RequestError, match=r"\.py files"):
        demo.library_documents(1000)


def test_batches_show_every_row_before_any_again():
    rows = demo._batches(10, 4, seed=3)
    seen = torch.cat([next(rows) for _ in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [demo._rate(step, 200) for step in range(201)]
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == 1 and rates[200] == pytest.approx(0.1)
