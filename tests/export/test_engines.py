"""What is refused for an engine, and what is said of head sizes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from exporting import HEAD, compressed
from tiny import stock_checkpoint

from mea_compress.cli import cli
from mea_compress.errors import RequestError
from mea_compress.exporting.engines import ENGINES, check_engine, engine_warning
from mea_compress.exporting.form import StockForm
from mea_compress.exporting.stock import export

ROOT = Path(__file__).parents[2]
WIDE = StockForm(groups=1, head_dim=128, source_pairs=tuple(range(32)) * 2, keeps_rope=False)
PLAIN = StockForm(groups=2, head_dim=64, source_pairs=tuple(range(32)), keeps_rope=True)
# Engines that drop or refuse rotary frequencies that are written down, or are not known to read them.
WITHOUT_LONGROPE = ("llama.cpp", "onnxruntime-genai", "tgi", "ctranslate2", "mistral.rs", "mlc-llm")


@pytest.mark.parametrize("engine", ENGINES)
def test_heads_that_keep_their_rope_are_served_everywhere_and_wide_ones_where_longrope_is_known(engine):
    check_engine(engine, PLAIN, "llama", "stock")
    if engine in WITHOUT_LONGROPE:
        with pytest.raises(RequestError, match="--format gguf" if engine == "llama.cpp" else "pool"):
            check_engine(engine, WIDE, "llama", "stock")
    else:
        check_engine(engine, WIDE, "llama", "stock")


def test_a_file_for_llama_cpp_is_for_no_other_engine():
    check_engine("llama.cpp", WIDE, "llama", "gguf")
    with pytest.raises(RequestError, match=r"vllm reads no GGUF.*--format stock"):
        check_engine("vllm", WIDE, "llama", "gguf")


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "mlx"])
def test_qwen2_with_wide_heads_goes_by_llama_s_format(engine):
    with pytest.raises(RequestError, match=r"qwen2.*--format llama"):
        check_engine(engine, WIDE, "qwen2", "stock")
    check_engine(engine, WIDE, "llama", "llama")


def test_a_head_size_without_a_kernel_is_refused_with_the_nearest_that_have_one():
    check_engine("vllm", StockForm(1, 320, WIDE.source_pairs, False), "llama", "stock")
    with pytest.raises(RequestError, match=r"320 channels.*256 or 512"):
        check_engine("vllm-cpu", StockForm(1, 320, WIDE.source_pairs, False), "llama", "stock")
    with pytest.raises(RequestError, match=r"16 channels.*have 32 "):
        check_engine("vllm-cpu", StockForm(1, 16, WIDE.source_pairs, False), "llama", "stock")


@pytest.mark.parametrize(
    ("head_dim", "nearest"),
    [
        (8, "are: 64 ("),
        (96, "are: 64 and 128 ("),
        (200, "are: 128 and 256 ("),
        (320, "256 and 512"),
        (640, "are: 512 ("),
    ],
)
def test_a_size_that_some_kernels_do_not_take_is_said_with_the_nearest_that_all_do(head_dim, nearest):
    warning = engine_warning(StockForm(1, head_dim, WIDE.source_pairs, True))
    assert f"Heads of {head_dim} channels" in warning and nearest in warning


def test_nothing_is_said_of_what_every_engine_takes():
    assert engine_warning(PLAIN) is None
    assert "longrope" in engine_warning(WIDE) and "Heads of" not in engine_warning(WIDE)
    assert engine_warning(WIDE, "gguf") is None


def test_a_plan_warns_of_head_sizes_as_the_export_does(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    out = compressed(tmp_path)
    settings = ["--kv-ratio", "0.5", "--recipe", "serve-anywhere"]
    said = CliRunner().invoke(cli, ["plan", str(source), *settings]).output
    assert "Heads of 8 channels" in said and "onnxruntime-genai" in said
    planned = CliRunner().invoke(cli, ["plan", str(source), *settings, "--json", "-"]).output
    exported = export(out, tmp_path / "export", progress=False)
    assert json.loads(planned)["stock_export"]["warning"] == exported.to_json()["warning"]
    assert json.loads(planned)["stock_export"]["head_dim"] == exported.form.head_dim


def test_the_documentation_says_of_every_engine_what_is_known_and_from_what():
    rows = [line for line in (ROOT / "docs" / "serving.md").read_text().splitlines() if line.startswith("| `")]
    for name, engine in ENGINES.items():
        (row,) = [line for line in rows if f"`{name}`" in line.split("|")[1]]
        assert row.split("|")[3].strip().startswith(engine.known_by), name
        if engine.written_frequencies and name != "llama.cpp":
            assert "refused" in row.split("|")[2], name


def test_an_unknown_engine_is_answered_with_those_that_are_known():
    with pytest.raises(RequestError, match=r"no engine 'vlm'.*vllm, vllm-cpu"):
        check_engine("vlm", PLAIN, "llama", "stock")


def test_the_command_refuses_before_it_writes_and_the_card_says_what_to_mind(tmp_path):
    out = compressed(tmp_path)
    refused = CliRunner().invoke(cli, ["export", str(out), str(tmp_path / "export"), "--for", "onnxruntime-genai"])
    assert isinstance(refused.exception, (RequestError, SystemExit)) and not (tmp_path / "export").exists()
    result = export(out, tmp_path / "export", engine="transformers", progress=False)
    card = (tmp_path / "export" / "README.md").read_text()
    for text in (card, result.report()):
        assert "onnxruntime-genai" in text and "Heads of 8 channels" in text
    assert json.loads((tmp_path / "export" / "export.json").read_text())["format"] == "stock"


def test_weights_are_chosen_for_gguf_alone(tmp_path):
    stock_checkpoint(tmp_path / "source")
    out = compressed(tmp_path, way="pool", **HEAD)
    with pytest.raises(RequestError, match="`weights` are chosen for GGUF alone"):
        export(out, tmp_path / "export", weights="f16", progress=False)
    with pytest.raises(RequestError, match="no `weights` 'q2'"):
        export(out, tmp_path / "export", format="gguf", weights="q2", progress=False)
