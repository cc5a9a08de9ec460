"""What stands in two files of the repository says the same in both, and the option reference leaves nothing out."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from mea_compress.recipe import EvaluateRecipe, HealRecipe, Recipe

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "tools").is_dir():
    pytest.skip("not in a checkout of the repository", allow_module_level=True)
sys.path.append(str(ROOT))

from tools.first_use import commands as commands_below  # noqa: E402
from tools.option_reference import option_reference  # noqa: E402


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_option_reference_has_every_setting():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", option_reference(), re.MULTILINE | re.DOTALL))
    for command, settings in {
        "compress": Recipe,
        "plan": Recipe,
        "heal": HealRecipe,
        "evaluate": EvaluateRecipe,
    }.items():
        for name, field in settings.model_fields.items():
            if "group" in (field.json_schema_extra or {}):
                assert re.search(f"<code>--{name.replace('_', '-')}[ <]", sections[command]), name
    assert "--resume" in sections["compress"] and "SRC OUT" in sections["compress"]
    assert "\\b" not in option_reference() and "\b" not in option_reference()


def test_the_commands_that_the_workflow_runs_are_in_readme():
    (heading,) = re.findall(r'first_use\.py "(.*)" >', read(".github/workflows/test.yml"))
    assert "mea-compress compress" in commands_below(heading, read("README.md"))
    with pytest.raises(SystemExit, match="nowhere"):
        commands_below("nowhere", read("README.md"))


def test_the_linter_is_the_same_everywhere():
    repositories = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (version,) = (entry["rev"] for entry in repositories if entry["repo"].endswith("ruff-pre-commit"))
    assert f"\nruff=={version.removeprefix('v')}\n" in read("constraints.txt")


def test_the_coming_version_is_the_one_to_cite():
    version = yaml.safe_load(read("CITATION.cff"))["version"]
    assert version in re.findall(r"^## .*$", read("CHANGELOG.md"), re.MULTILINE)[0]
