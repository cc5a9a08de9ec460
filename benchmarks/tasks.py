"""Tasks of lm-evaluation-harness over local JSON lines: writes a YAML file for each set that a directory holds.

    python benchmarks/tasks.py JSON_LINES WORK
    mea-compress evaluate CKPT --reference SRC --tasks local_arc_easy,local_piqa --task-dir WORK

Each set is a file NAME.jsonl of its own fields, an example a line; its task is `local_NAME`, with the prompt and the
scores of the harness's task of that name, so that figures can be compared.
"""

from pathlib import Path
from typing import Any

import click
import yaml

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
QUESTION = CHOICE | {"doc_to_text": "{{query.strip()}}\nAnswer:"}
SETS: dict[str, dict[str, Any]] = {
    "arc_easy": QUESTION,
    "arc_challenge": QUESTION,
    "piqa": QUESTION,
    "openbook_qa": CHOICE | {"doc_to_text": "query"},
    # Which beginning makes the one continuation likelier: then the harness takes contexts from the choices.
    "winogrande": CHOICE
    | {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
    | {"metric_list": CHOICE["metric_list"][:1]},
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            CHOICE["metric_list"][0],
        ],
    },
}


def write_tasks(json_lines: Path, directory: Path) -> list[str]:
    """Write the task files of all sets that are there.

    Args:
        json_lines: Directory with NAME.jsonl for any of `SETS`.
        directory: Where NAME.yaml goes; it need not exist.

    Returns:
        Names of the tasks, in the order of `SETS`.

    Raises:
        click.ClickException: None of the sets is there.
    """
    there = [name for name in SETS if (json_lines / f"{name}.jsonl").is_file()]
    if not there:
        raise click.ClickException(f"{json_lines} has no NAME.jsonl of {', '.join(SETS)}: name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for name in there:
        data = {"dataset_path": "json", "test_split": "test"}
        files = {"data_files": {"test": str((json_lines / f"{name}.jsonl").resolve())}}
        task = {"task": f"local_{name}", **data, "dataset_kwargs": files, **SETS[name], "metadata": {"version": 1.0}}
        text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return [f"local_{name}" for name in there]


@click.command(help=__doc__)
@click.argument("json_lines", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def main(json_lines, directory):
    click.echo(",".join(write_tasks(json_lines, directory)))


if __name__ == "__main__":
    main()
