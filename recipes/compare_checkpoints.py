"""Compress several checkpoints to several shares of their cache, measure each, and write one report.

    python recipes/compare_checkpoints.py SRC... --text held-out.txt --out DIR [--share 0.5]... [--set KEY=VALUE]...

DIR gets the compressed checkpoints, `report.md` and `report.json`. What is there is not made again, so that a run that
was interrupted goes on where it stopped. `--set` gives a setting of the recipe, as `run --set` does.
"""

import json
from pathlib import Path

import click
import yaml

import mea_compress as mc


def compare(sources: tuple[Path, ...], out: Path, text: str, shares: tuple[float, ...], settings: dict) -> list[dict]:
    """Compress and measure; return a row for each checkpoint and share."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "report.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    done = {(row["checkpoint"], row["share"]) for row in rows}
    for source in sources:
        for share in shares:
            if (source.name, share) in done:
                continue
            made = out / f"{source.name}-{share:g}"
            result = mc.compress(source, made, kv_ratio=share, resume=True, **settings)
            found = mc.evaluate(made, reference=source, text=text).to_json()
            rows.append(
                {
                    "checkpoint": source.name,
                    "share": share,
                    "bytes_before": result.plan.bytes_before,
                    "bytes_after": result.plan.bytes_after,
                    "kl": found["kl"],
                    "perplexity": found["perplexity"],
                    "original_perplexity": found["reference"]["perplexity"],
                }
            )
            file.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return rows


def report(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| checkpoint | share | bytes per token | KL | perplexity | original's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['checkpoint']} | {100 * row['share']:g} % | {row['bytes_before']} → {row['bytes_after']} | "
            f"{row['kl']:.4g} | {row['perplexity']:.4g} | {row['original_perplexity']:.4g} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, help="Held-out text to measure on.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--share", "shares", multiple=True, type=float, default=(0.5,), show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE")
def main(sources, text, out, shares, settings):
    """Run the comparison and write the report."""
    pairs = (setting.partition("=") for setting in settings)
    rows = compare(sources, out, text, shares, {key: yaml.safe_load(value) for key, _, value in pairs})
    (out / "report.md").write_text(report(rows), encoding="utf-8")
    click.echo(report(rows))


if __name__ == "__main__":
    main()
