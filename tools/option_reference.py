"""Write the option reference: every command of the program with its arguments and options, as a Markdown page.

The page is read off the command line itself, whose options come from the settings, so that nothing is said twice.

    python tools/option_reference.py docs/reference/options.md
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mea_compress.cli import main

INTRODUCTION = """\
# Options

Every command and every option. `--debug` shows the traceback of an error, `--help` what a command takes.

The options of `compress`, `heal` and `evaluate` that stand under a heading of their own are also keys of a recipe, with
`_` for `-`: `--kv-ratio 0.5` is `kv_ratio: 0.5`. Those of `heal` and `evaluate` stand in its sections of these names.
*Other options* belong to the command line alone.
"""
COMMON = {"--debug", "--help"}


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield every command below a group that does something by itself, in the order of its help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        below = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from commands(command, below)
        else:
            yield command, below


def cell(text: str) -> str:
    """Escape text for a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def paragraphs(text: str) -> str:
    """Turn a command's help into Markdown: a block behind a backspace is an example, the rest is prose."""
    parts = []
    for block in text.split("\n\n"):
        lines = block.strip("\n").splitlines()
        if lines and lines[0].strip() in ("\b", "\\b"):
            lines = [line.strip() for line in lines[1:]]
            parts.append("\n".join(["```", *lines, "```"]))
        elif any(line.strip() for line in lines):
            parts.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(part for part in parts if part != "```\n```")


def section(command: click.Command, context: click.Context) -> str:
    """Write one command: how it is called, what it does, and a table of options for each heading of its help."""
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    tables: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or not isinstance(parameter, click.Option) or COMMON & set(parameter.opts):
            continue
        option, description = record
        row = f"| <code>{cell(option)}</code> | {cell(description)} |"
        tables.setdefault(getattr(parameter, "group", "Options"), []).append(row)
    common = tables.pop("Options", [])
    parts = [f"## {context.command_path.partition(' ')[2]}", f"```text\n{usage}\n```", paragraphs(command.help or "")]
    for title, rows in [*tables.items(), ("Other options" if tables else "Options", common)]:
        if rows:
            parts.append("\n".join([f"**{title}**\n", "| option | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def option_reference(program: click.Command = main) -> str:
    """Return the page."""
    assert isinstance(program, click.Group)
    # With the program's own settings: Click remembers what a command's first context calls its help.
    context = click.Context(program, info_name="mea-compress", **program.context_settings)
    return "\n\n".join([INTRODUCTION.rstrip(), *(section(*found) for found in commands(program, context))]) + "\n"


if __name__ == "__main__":
    page = option_reference()
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
