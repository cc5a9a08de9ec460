"""Model cards: the README.md of a compressed and of an exported checkpoint. Plain data in, Markdown out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mea_compress.report.tables import head_counts, key_value_table, one_line, plan_report, share, stock_outlook

_MADE, _HEALED = "## How it was made", "## How it was healed"
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(
    source: str,
    plan: Mapping[str, Any],
    fidelity: Mapping[str, Any],
    recipe_yaml: str,
    versions: Mapping[str, str],
    source_card: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """Write the README.md of a compressed checkpoint.

    Args:
        source: Name of the original: a hub id, or its directory's name; a path is shortened to its last part.
        plan: The JSON of `plan`.
        fidelity: What was measured when the checkpoint was verified, by name.
        recipe_yaml: The resolved recipe.
        versions: Package name to version.
        source_card: The original's README.md; its licence and language are carried over.
        auto_class: Name of the one of transformers' auto classes that loads it.

    Returns:
        Markdown with the hub's YAML front matter, ending in a newline.
    """
    name = _published_name(source)
    before = "AutoTokenizer" if auto_class == "AutoModelForCausalLM" else "AutoProcessor"
    body = [
        f"# {name}, with {share(plan['kv_bytes_per_token'])} of its KV cache",
        f"Made from `{name}` with mea-compress: keys and values are composed from fewer component heads "
        "(Multi-head Explicit Attention, [arXiv 2601.19611](https://arxiv.org/abs/2601.19611)), and only the "
        "components are cached.",
        plan_report(plan),
        "## Load it",
        "Where mea-compress is not installed:",
        "```python\n"
        f"from transformers import {auto_class}, {before}\n\n"
        f'model = {auto_class}.from_pretrained("PATH", trust_remote_code=True)\n'
        f'{before.removeprefix("Auto").lower()} = {before}.from_pretrained("PATH")\n'
        "```",
        "`trust_remote_code=True` runs the files `*_mea.py` of this directory. Where mea-compress is installed, "
        "`import mea_compress` first and leave the flag out.",
    ]
    if fidelity:
        body += ["## How close it is", key_value_table(fidelity)]
    body += [_MADE, "```yaml\n" + recipe_yaml.rstrip("\n") + "\n```"]
    return _card(name, ["mea", "kv-cache", "compression"], body, versions, source_card)


def export_card(
    source: str,
    exported: Mapping[str, Any],
    versions: Mapping[str, str],
    source_card: str | None = None,
) -> str:
    """Write the README.md of a stock checkpoint, or of a file for llama.cpp, that was exported.

    Args:
        source: Name of the model before compression; a path is shortened to its last part.
        exported: The JSON of `export`.
        versions: Package name to version.
        source_card: The compressed checkpoint's README.md; its licence and language are carried over.

    Returns:
        Markdown with the hub's YAML front matter, ending in a newline.
    """
    name = _published_name(source)
    in_a_file = exported.get("format") == "gguf"
    kind = "a file for llama.cpp" if in_a_file else f"a plain {exported['model_type']} checkpoint"
    body = [
        f"# {name} with a smaller KV cache, as {kind}",
        f"`{name}` was compressed with mea-compress, and the compositions of its key and value heads were folded into "
        "the query and output projections: what is left is grouped-query attention with "
        f"{head_counts(exported['key_value_heads'])} key/value head(s) of {exported['head_dim']} channels, whose "
        "rotary frequencies "
        + ("are written in the file." if in_a_file else "are written in config.json. It loads without remote code."),
        key_value_table({name: value for name, value in exported.items() if name != "warning"}),
        stock_outlook(exported),
    ]
    return _card(name, ["kv-cache", "compression"], body, versions, source_card)


def healed_card(card: str, healing: Mapping[str, Any]) -> str:
    """Return a card that says how its checkpoint was healed, in the place of what it said of an earlier healing.

    Args:
        card: The README.md of the checkpoint.
        healing: The JSON of `heal`.
    """
    before, _, behind = card.partition(f"{_HEALED}\n")
    if behind:
        following = behind.find("\n## ")
        card = before + (behind[following + 1 :] if following >= 0 else "")
    names = ("kept", "kl", "cross_entropy", "tokens", "steps", "train", "text", "answers_only", "held_out_tokens")
    shown = {
        name: value
        for name, value in healing.items()
        if name.startswith(names) and value is not None and value is not False
    }
    about = "Distilled from the original; losses in nats per token on text held out from training."
    section = f"{_HEALED}\n\n{about}\n\n{key_value_table(shown)}\n"
    place = card.find(f"\n{_MADE}\n")
    if place < 0:
        return f"{card.rstrip()}\n\n{section}"
    return f"{card[:place].rstrip()}\n\n{section}{card[place:]}"


def _card(
    name: str, tags: Sequence[str], body: Sequence[str], versions: Mapping[str, str], source_card: str | None
) -> str:
    """Join front matter, body and versions."""
    # PyYAML writes what huggingface_hub.ModelCard would, without the half second that its import takes.
    front_matter = {
        "base_model": name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **_carried_metadata(source_card),
        "tags": list(tags),
    }
    parts = [
        "---\n" + yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True) + "---",
        *body,
        "With " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _published_name(source: str) -> str:
    """Return a hub id as it is and the last part of a path: other directories of a machine are not published."""
    return one_line(Path(source).name if os.path.isabs(source) or source.startswith(".") else source)


def _carried_metadata(card: str | None) -> dict[str, Any]:
    """Return what of a card's front matter stays true of a compressed model."""
    if not card or not card.startswith("---\n"):
        return {}
    block, end, _ = card[4:].partition("\n---")
    try:
        metadata = yaml.safe_load(block) if end else None
    except yaml.YAMLError:
        return {}
    return {key: metadata[key] for key in _CARRIED if key in metadata} if isinstance(metadata, dict) else {}


__all__ = ["export_card", "healed_card", "model_card"]
