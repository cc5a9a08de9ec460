"""The page of a sweep: one file of HTML with its style, its script and its data, which asks no network for anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any


def sweep_page(sweep: Mapping[str, Any]) -> str:
    """Return the page of a sweep (its JSON, without numbers that are not finite).

    The style, the script and the data stand in the page, and its policy allows nothing from elsewhere.
    """
    place = files("mea_compress.report")
    parts = {name: (place / f"sweep.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    title = f"{sweep['source']}: loss against cache"
    # A page ends a script at the first </script>, wherever it stands.
    data = json.dumps(sweep, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = parts["html"]
    for mark, text in (("TITLE", escape(title)), ("STYLE", parts["css"]), ("SCRIPT", parts["js"]), ("DATA", data)):
        before, _, after = page.partition(f"%{mark}%")
        page = f"{before}{text.strip()}{after}"
    return page


__all__ = ["sweep_page"]
