"""Pages of the site that are no files in `docs`, and links that lead out of it; MkDocs calls the functions as hooks.

README, CONTRIBUTING and CHANGELOG become pages. The option reference is read off the command line, the API reference
off the package: what the front door exports, and a page for each module or subpackage.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import posixpath
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mea_compress"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
IMAGES = {".png", ".svg", ".jpg"}

_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_OUTSIDE = re.compile(r"^([a-z]+:|/)", re.IGNORECASE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files in `docs`, and the pictures that pages show from elsewhere."""
    sys.path.insert(0, str(ROOT))  # what is described is what lies here, whatever is installed
    from tools.option_reference import option_reference

    made = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    made |= {"reference/options.md": option_reference(), **_api_pages()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for picture in sorted({path for path in _linked(files) if path.suffix in IMAGES and path.is_file()}):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to pages of the site, and those to other files of the repository there."""
    here = page.file.src_uri

    def place(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if _OUTSIDE.match(target):
            return link[0]
        path = _in_repository(here, target)
        name = path.relative_to(ROOT).as_posix()
        inside = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(inside):
            return posixpath.relpath(inside, posixpath.dirname(here) or ".") + anchor
        if not path.exists():
            return link[0]  # MkDocs says that it leads nowhere
        return f"{str(config.repo_url).rstrip('/')}/{'tree' if path.is_dir() else 'blob'}/main/{name}{anchor}"

    return _LINK.sub(place, markdown)


def _in_repository(page: str, target: str) -> Path:
    """Return the file that a link of a page means."""
    sources = {made: name for name, made in PAGES.items()}
    source = ROOT / sources.get(page, f"docs/{page}")
    path = Path(posixpath.normpath((source.parent / target).as_posix()))
    return path if path.is_relative_to(ROOT) else ROOT / "nowhere"


def _linked(files: Files) -> list[Path]:
    """Return every file of the repository that a page links to."""
    return [
        _in_repository(file.src_uri, link["target"])
        for file in files.documentation_pages()
        for link in _LINK.finditer(file.content_string)
        if not _OUTSIDE.match(link["target"])
    ]


def _api_pages() -> dict[str, str]:
    """Return the API reference: the front door, and a page for each public module or subpackage."""
    package = importlib.import_module(PACKAGE)
    values = [getattr(package, name) for name in package.__all__]
    exported = [value for value in values if inspect.isclass(value) or inspect.isroutine(value)]
    entries = [f"::: {value.__module__}.{value.__qualname__}" for value in exported]
    pages = {"reference/python/index.md": "\n\n".join([f"# {PACKAGE}", (package.__doc__ or "").strip(), *entries, ""])}
    for found in pkgutil.iter_modules(package.__path__, f"{PACKAGE}."):
        names = [found.name]
        if found.ispkg:
            inside = importlib.import_module(found.name)
            names += [module.name for module in pkgutil.walk_packages(inside.__path__, f"{found.name}.")]
        public = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
        bodies = [_module_entry(name, exported, alone=len(public) == 1) for name in public]
        if bodies:
            page = f"reference/python/{found.name.partition('.')[2]}.md"
            pages[page] = "\n\n".join([f"# {found.name}", *bodies, ""])
    return pages


def _module_entry(module: str, exported: Sequence[Any], alone: bool) -> str:
    """Return the entry of a module without what the front door exports, for nothing may stand in two places."""
    elsewhere = [f"!^{value.__qualname__}$" for value in exported if value.__module__ == module]
    lines = [f"::: {module}", "    options:", f"      show_root_heading: {str(not alone).lower()}"]
    lines += [f"      filters: {json.dumps(['!^_', *elsewhere])}"]
    return "\n".join(lines)
