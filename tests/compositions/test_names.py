"""Which form a side has is asked of the form: the names of format 1's compositions are compared nowhere else."""

import ast
import re
from pathlib import Path

import pytest

import mea_compress
from mea_compress.heads.composed import EXPANSIONS
from mea_compress.modeling.attention_mea import MODULES
from mea_compress.modeling.section_mea import FORM_OF, FORMS

PACKAGE = Path(mea_compress.__file__).parent
# The methods' own files, the table of forms, and texts: what lists names for help or puts one into words.
EXEMPT = ("compositions/", "modeling/section_mea.py", "recipe/", "report/")


def is_name(node):
    return isinstance(node, ast.Constant) and node.value in FORM_OF


def offends(node):
    """Whether it compares with a composition's name, chooses by one, or is a list of nothing but them."""
    match node:
        case ast.Compare():
            sides = [node.left, *node.comparators]
            return any(is_name(item) for side in sides for item in (side, *getattr(side, "elts", ())))
        case ast.Dict():
            return any(map(is_name, node.keys))
        case ast.Tuple() | ast.List() | ast.Set():
            return bool(node.elts) and all(map(is_name, node.elts))
        case ast.MatchValue():
            return is_name(node.value)
    return False


def offences(tree):
    return [getattr(node, "lineno", 0) for node in ast.walk(tree) if offends(node)]


def test_nothing_compares_the_names_of_compositions():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(EXEMPT)
        for line in offences(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_the_search_finds_what_it_looks_for():
    for line in ('kind == "pool"', 'kind in ("latent", "joint")', '{"latent": 2}[kind]', 'PLAIN = ("none", "pool")'):
        assert offences(ast.parse(line)), line
    assert not offences(ast.parse('label = ["before", "share"]'))


CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


@pytest.mark.skipif(not CONTRIBUTING.is_file(), reason="not in a checkout of the repository")
@pytest.mark.parametrize(("title", "count"), [("method", 1), ("form", 3), ("family", 2)])
def test_contributing_says_which_files_each_addition_touches(title, count):
    text = CONTRIBUTING.read_text(encoding="utf-8")
    section = re.search(rf"^## Add a {title}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    files = re.findall(r"^- `(mea_compress/[\w/]+\.py)`", section, re.MULTILINE)
    assert len(files) == count
    assert all((PACKAGE.parent / file).is_file() for file in files if "NAME" not in file)


def test_the_files_of_a_form_are_those_that_list_every_form():
    """The table, the modules and the references have the same forms, so that none can be forgotten."""
    assert set(FORMS) == set(EXPANSIONS)
    assert {name for name, form in FORMS.items() if not form.plain} == set(MODULES)
