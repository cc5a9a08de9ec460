"""The program loads no library that its work does not need, and knows its own models where it loads one."""

import subprocess
import sys

import pytest
from tiny import stock_checkpoint

from mea_compress.compression import compress
from mea_compress.recipe import Recipe

pytestmark = pytest.mark.process

HALF = {"kv_ratio": 0.5, "fit": "weights", "key_composition": "head", "value_composition": "head"}
FLAGS = [word for name, value in HALF.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def as_the_program(script, *arguments):
    """Runs a script in a process that was started as the program is; the last line that it says."""
    start = 'import sys\nsys.argv[0] = "mea-compress"\n'
    command = [sys.executable, "-c", start + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[-1] if done.stdout else done.stderr


MAIN = """
from mea_compress.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "transformers") if name in sys.modules])
"""


@pytest.fixture(scope="module", params=["llama-rope-bias-wide-tied", "qwen3_moe", "phi3-partial"])
def source(request, tmp_path_factory):
    return stock_checkpoint(tmp_path_factory.mktemp("start") / "source", request.param)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--unheard-of"], ["compress"], ["recipes"]])
def test_the_command_line_alone_loads_neither_library(arguments):
    assert as_the_program(MAIN, *arguments) == "[]"


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_commands_that_read_headers_load_neither_library(command, source):
    assert as_the_program(MAIN, command, source, *(FLAGS if command == "plan" else [])) == "[]"


def test_the_program_knows_its_own_models(tmp_path):
    compress(stock_checkpoint(tmp_path / "source"), tmp_path / "out", recipe=Recipe(**HALF), progress=False)
    script = "from mea_compress.loading import load_model\nprint(type(load_model(sys.argv[1])).__name__)"
    assert as_the_program(script, tmp_path / "out") == "MeaLlamaForCausalLM"
