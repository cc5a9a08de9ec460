"""The command line: every command parses, calls one function and prints.

Results go to stdout, progress and logs to stderr. Exit status: 0 done, 2 the request was wrong, 130 interrupted,
1 anything else. Whatever loads PyTorch is imported inside the commands. Functions speak of their parameters, in
backquotes; a command shows those that it has a flag for as this flag.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from click.exceptions import NoArgsIsHelpError
from pydantic import BaseModel

from mea_compress.checkpoint.files import refusals, to_json, write_json, write_text
from mea_compress.errors import RequestError
from mea_compress.processes import is_first_process
from mea_compress.recipe import (
    FORMER_NAMES,
    EvaluateRecipe,
    HealRecipe,
    Recipe,
    builtin_recipes,
    from_flags,
    given_settings,
    load_recipe,
    parse_counts,
    parse_names,
    read_changes,
    value_type,
)
from mea_compress.report.showing import Shown
from mea_compress.report.tables import format_seconds, table

NAME = "mea-compress"
Function = TypeVar("Function", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)
# Settings that say what a profile measures.
_PROFILED = (
    "layers",
    "key_composition",
    "value_composition",
    "rotary_allocation",
    "prune_by",
    "fit",
    "text",
    "bos",
    "sequence_length",
    "sequences",
    "statistics",
    "seed",
    "device",
)


class _Option(click.Option):
    """An option that stands under a heading of its own in the help."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def _flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def _debug_option() -> click.Option:
    return click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


class _Command(click.Command):
    """A command with grouped options that also takes the global --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments, flags under the names that they had in earlier versions among them."""
        former = {_flag(before): _flag(after) for before, after in FORMER_NAMES.items()}
        flags = [(arg.partition("=")[0], arg) for arg in args]
        return super().parse_args(ctx, [arg.replace(flag, former.get(flag, flag), 1) for flag, arg in flags])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its own flags stand for parameters in what a wrong request is answered."""
        try:
            return super().invoke(ctx)
        except RequestError as error:
            error.args = (_with_flags(str(error), self.params),)
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, in the order in which the groups first appear, the common ones last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        common = sections.pop("Options", [])
        for title, records in [*sections.items(), ("Options", common)]:
            with formatter.section(title):
                formatter.write_dl(records)


class _Group(click.Group):
    """A group of such commands, listed in the order of work and not of the alphabet."""

    command_class = _Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands as they were declared."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of every command's help, whole, where Click would cut it off."""
        rows = [(name, command.get_short_help_str(limit=sys.maxsize)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class _Program(_Group):
    """The whole command line; turns every way to fail into one sentence on stderr and an exit status."""

    group_class = _Group

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command line and leave with its exit status."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        extra["prog_name"] = NAME
        try:
            status = super().main(arguments, **extra)
        except Exception as error:
            if "--debug" in arguments:
                traceback.print_exc()
            status, message = _explain(error)
            click.echo(message, err=True)
        sys.exit(status if isinstance(status, int) else 0)


def _with_flags(message: str, parameters: Sequence[click.Parameter]) -> str:
    """Replace parameters of functions, `sequence_length` in backquotes, by flags of a command: --sequence-length."""
    flags = {option.name: option.opts[0] for option in parameters if isinstance(option, click.Option)}
    flags |= {"set": flags["changes"]} if "changes" in flags else {}
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), message)


def _explain(error: Exception) -> tuple[int, str]:
    """Return the exit status and the sentence of a failure."""
    if isinstance(error, click.Abort):
        # Whoever was interrupted may have said what to do next.
        advice = str(error.__cause__ or "")
        return 130, f"{NAME}: {advice or 'interrupted, and nothing unfinished was put in place'}"
    if isinstance(error, NoArgsIsHelpError):
        return 2, error.format_message()
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else NAME
        return 2, f"{command}: {_clause(error.format_message())}; {command} --help shows what it takes"
    if isinstance(error, click.ClickException):
        return 2, f"{NAME}: {_clause(error.format_message())}"
    if isinstance(error, RequestError):
        return 2, f"{NAME}: {error}"
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return 1, f"{NAME}: failed with {reason} (--debug shows where)"


def _clause(message: str) -> str:
    """Return what Click says in the style of this program's messages: one sentence, lower case, no full stop."""
    message = message.replace(". (Did", " (did").replace(". Did", ", did")
    return message[:1].lower() + message[1:].rstrip(".")


def _none_for_nothing(_: click.Context, __: click.Parameter, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the values of a flag that may be given several times, None where it was not given."""
    return values or None


def _writable(_: click.Context, __: click.Parameter, file: Path | None) -> Path | None:
    """Return a file for a result, before the hours that the result takes."""
    if file is not None and str(file) != "-" and not os.access(file.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{file.parent} is no directory that this user may write to")
    if file is not None and file.exists() and not file.is_file():
        raise click.BadParameter(f"{file} is no file; name one, or - for standard output")
    return file


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names of a list such as frequency+latent,joint."""
    return None if value is None else parse_names(value)


def _shares(_: click.Context, __: click.Parameter, value: str) -> tuple[float, ...]:
    """Return the numbers of a list such as 0.25,0.5."""
    try:
        return tuple(float(share) for share in value.split(","))
    except ValueError:
        raise click.BadParameter(f"should be shares such as 0.25,0.5, not {value!r}") from None


def _counts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return the whole numbers of a list such as 1024,4096."""
    try:
        return None if value is None else parse_counts(value)
    except ValueError:
        raise click.BadParameter(f"should be whole numbers such as 1024,4096, not {value!r}") from None


def _options(settings: type[BaseModel], names: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Return a decorator that adds options for fields; unset flags are None: the recipe's apply.

    Args:
        settings: Whose fields; those without a group have no flag.
        names: The fields; all without it.
    """

    def decorate(function: Function) -> Function:
        for name, field in reversed(settings.model_fields.items()):
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or "group" not in extra or (names and name not in names):
                continue
            kind = value_type(field.annotation)
            help_text = field.description or ""
            if not field.is_required() and field.default is not None:
                help_text += f" [default: {field.default}]"
            several = get_origin(kind) is tuple
            if several:
                kind = get_args(kind)[0]
            elif get_origin(kind) is Literal:
                kind = click.Choice(get_args(kind))
            shape = {"is_flag": True, "default": None} if kind is bool else {"type": _PATH if kind is Path else kind}
            function = click.option(
                _flag(name),
                name,
                cls=_Option,
                group=extra["group"],
                **shape,
                metavar=extra.get("metavar"),
                required=field.is_required(),
                multiple=several,
                callback=_none_for_nothing if several else None,
                help=help_text,
            )(function)
        return function

    return decorate


def _recipe_option(function: Function) -> Function:
    return click.option(
        "--recipe", metavar="NAME|FILE", help="Start from a built-in or YAML recipe; flags given here win over it."
    )(function)


def _set_option(function: Function) -> Function:
    return click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="KEY=VALUE",
        help="A value that wins over the recipe's, such as kv_ratio=0.25 or heal.steps=100; may be given again.",
    )(function)


def _json_option(function: Function) -> Function:
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
        metavar="FILE",
        callback=_writable,
        help="Write the result as JSON; - prints it instead of the table.",
    )(function)


def _batch_option(function: Function) -> Function:
    return click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=1,
        metavar="N",
        show_default=True,
        help="Sequences to count where whole caches are shown.",
    )(function)


def _show(result: Shown, json_file: Path | None = None) -> None:
    """Print what a verb of the package returned; see `_print`. Of processes that a launcher has started, one does."""
    if not is_first_process():
        return
    _print(result.report(), result.to_json(), json_file)


def _print(text: str, data: object, json_file: Path | None) -> None:
    """Print a result as text, or with `-` as JSON, or as text with the JSON in a file."""
    if json_file is not None and str(json_file) == "-":
        click.echo(to_json(data), nl=False)
        return
    click.echo(text)
    if json_file is not None:
        write_json(json_file, data)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mea-compress", prog_name=NAME)
def cli() -> None:
    """Compress the KV cache of a trained checkpoint with Multi-head Explicit Attention.

    A checkpoint that is read is a directory, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub.
    """


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@_batch_option
@_json_option
def inspect(source: Path, batch: int, json_file: Path | None) -> None:
    """Say what a checkpoint is: family, heads, cache bytes per token, parameters. Reads headers only."""
    from mea_compress.planning.plans import inspect_checkpoint

    inspection = inspect_checkpoint(source)
    _print(inspection.report(batch), inspection.to_json(batch), json_file)
    if inspection.code and inspection.code.fault:
        click.echo(
            f"{NAME}: {source} carries the code of {NAME} {inspection.code.version}: {inspection.code.fault}; "
            f"replace it by {NAME} refresh {source}",
            err=True,
        )


@cli.command()
@click.argument("checkpoint", metavar="CKPT", type=_PATH)
@click.option("--check", is_flag=True, help="Only report which code the checkpoint carries.")
@_json_option
def refresh(checkpoint: Path, check: bool, json_file: Path | None) -> None:
    """Replace the code that a compressed checkpoint carries by this version's; weights stay untouched."""
    from mea_compress.emit.code import refresh as refresh_checkpoint

    _show(refresh_checkpoint(checkpoint, check=check), json_file)


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@_recipe_option
@_options(Recipe)
@click.option("--time", is_flag=True, help="Also run one layer, and say how long the fit takes on this machine.")
@_batch_option
@_json_option
def plan(source: Path, recipe: str | None, time: bool, batch: int, json_file: Path | None, **flags: Any) -> None:
    """Say what compress would do to every layer, in heads and bytes. Reads headers only, writes nothing."""
    from mea_compress.planning.plans import make_plan

    planned = make_plan(source, load_recipe(recipe, flags))
    text, data = planned.report(batch), planned.to_json(batch)
    if time:
        from mea_compress.fit.progress import estimate_seconds

        data["seconds"] = estimate_seconds(planned)
        text += f"\n\nTime of the fit on this machine: about {format_seconds(data['seconds'])}"
    _print(text, data, json_file)


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@_recipe_option
@_options(Recipe, _PROFILED)
@click.option("--plot", metavar="FILE", type=_PATH, help="Draw the costs as a heat map: .png, .svg or .pdf.")
@_json_option
def profile(source: Path, recipe: str | None, plot: Path | None, json_file: Path | None, **flags: Any) -> None:
    """Measure what each width of each layer costs, on held-out text; --budget of compress takes the --json FILE.

    One side of one layer at a time is compressed. What is measured is kept beside FILE as it comes, and a run that was
    interrupted goes on there.
    """
    from mea_compress.fit.profile import profile as profile_checkpoint
    from mea_compress.report.plots import check_file, draw_profile

    if plot is not None:
        check_file(plot)
    file = None if json_file is None or str(json_file) == "-" else json_file
    found = profile_checkpoint(source, out=file, recipe=recipe, **flags)
    _print(found.report(), found.to_json(), json_file)
    if plot is not None:  # last, so that a picture that cannot be written takes no figures with it
        with refusals(plot):
            draw_profile(found.to_json(), plot)


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.argument("out", metavar="OUT", type=_PATH)
@_recipe_option
@_options(Recipe)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same request stopped.")
def compress(source: Path, out: Path, recipe: str | None, resume: bool, **flags: Any) -> None:
    """Write to OUT a checkpoint whose KV cache is a share of SRC's.

    SRC is only read; OUT appears complete or not at all. The paper's own initialisation is

    \b
      --kv-ratio 0.5 --fit weights --key-composition head --value-composition head
    """  # noqa: D301 - \b is Click's mark of lines that stay as they are
    from mea_compress.compression import compress as compress_checkpoint

    result = compress_checkpoint(source, out, recipe=load_recipe(recipe, flags), resume=resume)
    _show(result)


@cli.command()
@click.argument("checkpoint", metavar="OUT", type=_PATH)
@click.option("--teacher", metavar="SRC", type=_PATH, required=True, help="The original checkpoint to learn from.")
@click.option("--out", metavar="DIR", type=_PATH, help="Write the healed checkpoint here; without it OUT is replaced.")
@_options(HealRecipe)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same request stopped.")
def heal(checkpoint: Path, teacher: Path, out: Path | None, resume: bool, **flags: Any) -> None:
    """Distil a compressed checkpoint from its original; without text it learns from text the original makes."""
    from mea_compress.healing import heal as heal_checkpoint

    settings = given_settings(from_flags(HealRecipe, flags))
    result = heal_checkpoint(checkpoint, teacher=teacher, out=out, resume=resume, **settings)
    _show(result)


@cli.command()
@click.argument("checkpoints", metavar="CKPT...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--reference", metavar="SRC", type=_PATH, help="Compare with this checkpoint: KL, agreement, its own figures."
)
@_options(EvaluateRecipe)
@click.option("--plot", metavar="FILE", type=_PATH, help="Draw what --retrieval finds by length and depth (.png).")
@_json_option
def evaluate(
    checkpoints: tuple[Path, ...], reference: Path | None, plot: Path | None, json_file: Path | None, **flags: Any
) -> None:
    """Measure checkpoints: loss, KL, agreement, the bytes a cache really holds, speed, tasks, retrieval."""
    settings = given_settings(from_flags(EvaluateRecipe, flags))
    if plot is not None:
        from mea_compress.report.plots import check_plot

        check_plot(plot, settings.get("retrieval"))
    from mea_compress.measure.evaluation import evaluate as evaluate_checkpoints

    measured: Any = checkpoints[0] if len(checkpoints) == 1 else checkpoints
    result = evaluate_checkpoints(measured, reference=reference, **settings)
    _show(result, json_file)
    if plot is not None:  # last, so that a picture that cannot be written takes no figures with it
        result.draw_retrieval(plot)


@cli.command()
@click.argument("checkpoint", metavar="CKPT", type=_PATH)
@click.argument("out", metavar="OUT", type=_PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["stock", "llama", "gguf"]),
    default="stock",
    show_default=True,
    help="The base family's own format, Llama's, which more engines take with wide heads, or a file for llama.cpp.",
)
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    help="What is to serve it: refuse what that engine would get wrong.",
)
@click.option(
    "--weights",
    type=click.Choice(["stored", "f32", "f16", "bf16", "q8_0"]),
    default="stored",
    show_default=True,
    help="Type of matrices in the file for llama.cpp.",
)
@click.option(
    "--balance",
    is_flag=True,
    help="Cache keys and values in a basis in which few bits lose less (q8_0, q4_0); exact in full precision.",
)
@click.option(
    "--text",
    metavar="FILE",
    multiple=True,
    help="Text that --balance looks at; without it text is sampled from CKPT.",
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same request stopped.")
@_json_option
def export(
    checkpoint: Path,
    out: Path,
    form: str,
    engine: str | None,
    weights: str,
    balance: bool,
    text: tuple[str, ...],
    resume: bool,
    json_file: Path | None,
) -> None:
    """Write a compressed checkpoint as a plain one of its family, which engines serve without code of this package."""
    from mea_compress.exporting.stock import export as export_checkpoint

    result = export_checkpoint(
        checkpoint,
        out,
        format=form,
        engine=engine,
        weights=weights,
        balance=balance,
        text=text or None,
        resume=resume,
    )
    _show(result, json_file)


@cli.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--source", metavar="SRC", type=_PATH, help="The checkpoint to compress, instead of the recipe's.")
@click.option(
    "--out",
    metavar="OUT",
    type=_PATH,
    help="Where the result goes, instead of the recipe's; beside SRC, called SRC-RECIPE, where neither says so.",
)
@_set_option
@click.option("--resume", is_flag=True, help="Go on where an interrupted run of the same request stopped.")
@_json_option
def run(
    recipe: str, source: Path | None, out: Path | None, changes: tuple[str, ...], resume: bool, json_file: Path | None
) -> None:
    """Do all that a recipe asks for: compress, then heal and evaluate where it has such sections."""
    from mea_compress.pipeline import run as run_recipe

    settings = read_changes(changes, {"source": source, "out": out})
    _show(run_recipe(recipe, resume=resume, **settings), json_file)


@cli.command()
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--source", metavar="SRC", type=_PATH, help="The checkpoint to compress, instead of the recipe's.")
@_set_option
@_json_option
def validate(recipes: tuple[str, ...], source: Path | None, changes: tuple[str, ...], json_file: Path | None) -> None:
    """Say of recipes, in a sentence each, whether run would refuse them; the exit status is 2 where it would."""
    from mea_compress.pipeline import validate as validate_recipes

    result = validate_recipes(recipes, **read_changes(changes, {"source": source}))
    _show(result, json_file)
    if result.faults:
        raise RequestError(f"{len(result.faults)} of {len(result.recipes)} cannot be carried out: see above")


@cli.command()
@click.argument("source", metavar="SRC", type=_PATH)
@click.option("--text", metavar="FILE", multiple=True, required=True, help="Held-out text to measure on.")
@click.option("--out", metavar="DIR", type=_PATH, required=True, help="Where figures and page go.")
@click.option(
    "--methods",
    metavar="NAME,NAME",
    default="default",
    show_default=True,
    callback=_names,
    help="Methods: KEY+VALUE, or one name for both sides, such as frequency+latent,joint.",
)
@click.option(
    "--shares",
    metavar="X,X",
    default="0.25,0.5,0.75",
    show_default=True,
    callback=_shares,
    help="Shares of the cache to keep.",
)
@click.option("--budgets", metavar="NAME,NAME", callback=_names, help="How layers share what is kept.")
@click.option(
    "--retrieval", metavar="N,N", callback=_counts, help="Also hide numbers in the text at these lengths in tokens."
)
@click.option("--calibration", metavar="FILE", multiple=True, help="Text for the fits; sampled from SRC without it.")
@_recipe_option
@_set_option
@click.option("--resume", is_flag=True, help="Go on where an interrupted sweep stopped.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    callback=_writable,
    help="Write the result as JSON here too; - prints it instead of the table.",
)
def sweep(
    source: Path,
    text: tuple[str, ...],
    out: Path,
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    budgets: tuple[str, ...] | None,
    retrieval: tuple[int, ...] | None,
    calibration: tuple[str, ...],
    recipe: str | None,
    changes: tuple[str, ...],
    resume: bool,
    json_file: Path | None,
) -> None:
    """Compress a checkpoint in many ways, measure each, and write figures and a page of what they cost and keep.

    DIR gets index.html, which needs no network, sweep.json, sweep.csv and sweep.png. The checkpoints are not kept: the
    page has the commands that make each again.
    """
    from mea_compress.sweeping.run import sweep as sweep_checkpoint

    found = sweep_checkpoint(
        source,
        out,
        text=text,
        methods=methods,
        shares=shares,
        budgets=budgets or (None,),
        retrieval=retrieval,
        calibration=calibration or None,
        recipe=recipe,
        resume=resume,
        **read_changes(changes),
    )
    _show(found, json_file)


@cli.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List, show and copy the built-in recipes."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list")
def list_recipes() -> None:
    """List the built-in recipes."""
    rows = []
    for name in builtin_recipes():
        rows.append([name, load_recipe(name).description])
    click.echo(table(rows, ["recipe", "what for"]))


@recipes.command("show")
@click.argument("name")
def show_recipe(name: str) -> None:
    """Print a built-in recipe."""
    click.echo(_builtin(name).read_text(encoding="utf-8").rstrip("\n"))


@recipes.command("copy")
@click.argument("name")
@click.argument("file", required=False, type=_PATH)
def copy_recipe(name: str, file: Path | None) -> None:
    """Copy a built-in recipe to FILE (NAME.yaml without it), to be changed there."""
    origin = _builtin(name)
    target = file or Path(origin.name)
    if target.is_dir():
        target /= origin.name
    if target.exists():
        raise RequestError(f"{target} exists already: name another file.")
    write_text(target, origin.read_text(encoding="utf-8"))
    click.echo(f"Copied to {target}")


def _builtin(name: str) -> Path:
    builtins = builtin_recipes()
    if name not in builtins:
        near = get_close_matches(name, builtins, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(builtins)}"
        raise RequestError(f"there is no built-in recipe {name!r}: {hint}")
    return builtins[name]


@cli.command()
@click.option("--out", metavar="DIR", type=_PATH, default=Path("demo"), show_default=True, help="Where it works.")
@click.option(
    "--steps", metavar="N", type=click.IntRange(min=1), help="Training steps of the original; more is better."
)
@click.option("--device", metavar="D", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything."
)
def demo(out: Path, steps: int | None, device: str, seed: int) -> None:
    """Train a small model on text every machine has, compress it in two ways, heal both, and compare."""
    from mea_compress.demo.run import run_demo

    click.echo(run_demo(out, steps=steps, device=device, seed=seed))


main = cli
