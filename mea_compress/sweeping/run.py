"""The sweep: compress a checkpoint in every way that is asked for, measure each against it, and write what came of it.

Each checkpoint lies in a directory inside OUT.partial until it is measured. What is measured is kept there point by
point, so that an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_compress.architectures import open_checkpoint
from mea_compress.checkpoint.files import finite, refusals, write_json, write_text
from mea_compress.checkpoint.hub import local_directory
from mea_compress.checkpoint.workspace import Workspace, already_published, check_free, open_workspace, partial_path
from mea_compress.compression import compress
from mea_compress.emit.directory import fingerprint, versions
from mea_compress.errors import DiskFullError, RequestError
from mea_compress.planning.plans import plan_source
from mea_compress.recipe import Recipe, budget_file, given_settings, make_recipe, to_yaml
from mea_compress.report.page import sweep_page
from mea_compress.report.plots import check_matplotlib, draw_sweep
from mea_compress.report.sweeps import sweep_csv
from mea_compress.sweeping.grid import DEFAULT, SHARES, GridPoint, commands, grid
from mea_compress.sweeping.results import Sweep, SweepPoint, mark_front
from mea_compress.text.reading import STDIN, TextChoice, text_names, text_state

if TYPE_CHECKING:
    from mea_compress.architectures import Checkpoint
    from mea_compress.measure.results import Evaluation

# Checkpoints that are measured together, and with them the original once, while their weights are no more than this.
_AT_ONCE, _RESIDENT_BYTES = 4, 8 << 30
# Tokens on which heads are looked at.
_LOOKED_AT = 1 << 13
_JSON, _PROFILES = "sweep.json", "profiles"
# Settings of a recipe that its points are measured by too, where its section `evaluate` says nothing else.
_SHARED = ("bos", "device", "seed")
# What `evaluate` measures and the page of a sweep does not show.
_NOT_SWEPT = ("contexts", "batches", "tasks", "task_dir", "few_shot", "chat_template", "agreement")


def sweep(
    source: Path | str,
    out: Path | str,
    *,
    text: TextChoice,
    methods: Sequence[str] = (DEFAULT,),
    shares: Sequence[float] = SHARES,
    budgets: Sequence[str | None] = (None,),
    retrieval: Sequence[int] | None = None,
    calibration: TextChoice | None = None,
    recipe: Recipe | Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Sweep:
    """Compress a checkpoint in many ways, measure each, and write figures and a page of what they cost and keep.

    OUT gets ``sweep.json``, ``sweep.csv``, ``sweep.png`` and ``index.html``, a page that needs no network, and the
    profiles that budgets were measured by, one a method. The checkpoints are not kept: the page has the commands that
    make each again.

    Args:
        source: Checkpoint directory or hub id.
        out: New directory.
        text: Held-out text to measure on, as `evaluate` takes it.
        methods: ``KEY+VALUE``, one name for both sides, or ``default``.
        shares: Of the cache to keep.
        budgets: How layers share what is kept, as a recipe's `budget`; None is what the recipe says.
        retrieval: Lengths in tokens at which hidden numbers are to be found.
        calibration: Text for the fits; without it text is sampled from the model.
        recipe: What all have in common: a `Recipe`, a built-in recipe's name or a YAML file. Its section `evaluate`
            says how they are measured.
        resume: Take up an interrupted sweep.
        progress: Show what is done on stderr.
        **settings: Fields of `Recipe` that win over it, one of a section as ``**{"evaluate.limit": 64}``.

    Raises:
        RequestError: The request or the source does not allow it, or no point of the sweep can be made.

    Example:
        >>> found = sweep("SRC", "SWEEP", text="held-out.txt", shares=[0.5], fit="weights", progress=False)
        >>> found.points[0].name, found.points[0].kv_bytes_per_token, (found.out / "index.html").is_file()
        ('default-0.5', 256.0, True)
    """
    out = Path(out).absolute()
    common = _common_recipe(recipe, settings, shares, text, calibration, retrieval)
    points = grid(common, methods, shares, budgets)
    assert common.evaluate is not None
    evaluation = _evaluation(common)
    command = _command(source, out, common, methods, shares, budgets)
    directory = local_directory(source)
    checkpoint = open_checkpoint(directory)
    reasons, profiled = _look_ahead(checkpoint, points)
    # A method is profiled once, and the commands of its points take the file that OUT gets.
    files = {point.name: out / _PROFILES / _profile_name(point) for point in points if point.name in profiled}
    shown = {point.name: commands(_with_budget(point, files), source, evaluation) for point in points}
    check_matplotlib("`sweep` draws a picture")
    if resume and (already_published(out) or (out / _JSON).is_file()):
        return _load_finished_sweep(out, command)
    check_free(out, directory)
    texts = {"the text": text, **({} if common.text is None else {"the calibration text": common.text})}
    read = sorted({str(file) for point in points if (file := budget_file(point.recipe))})
    texts |= {"a budget": read} if read else {}
    made_from = {
        "the source": fingerprint(checkpoint.reader, checkpoint.raw_config),
        "the sweep": {"recipe": to_yaml(common), "points": ", ".join(point.name for point in points)},
        **{name: text_state(choice) for name, choice in texts.items()},
        "a library version": versions(),
    }
    with open_workspace(out, made_from, resume) as workspace:
        run = _Run(checkpoint, common, workspace, progress)
        run.look_at_heads()
        run.check_measuring()
        rows = run.rows([_with_budget(point, run.profile_files(files)) for point in points], shown, reasons)
        result = Sweep(
            out=out,
            source=checkpoint.name,
            command=command,
            text=common.evaluate.text or (),
            tokens=workspace.result_of("reference", "tokens"),
            reference=workspace.result_of("reference", "figures"),
            points=mark_front(rows),
            profiles=tuple(workspace.manifest.get("profiles", {}).values()),
            heads=tuple(workspace.result_of("heads", "layers")),
            versions=versions(),
        )
        _write(result, workspace.path)
        for file in sorted(set(run.profile_files(files).values())):
            if file.is_file():
                (workspace.path / _PROFILES).mkdir(exist_ok=True)
                shutil.copyfile(file, workspace.path / _PROFILES / file.name)
        workspace.publish(out)
    return result


def _common_recipe(
    recipe: Recipe | Path | str | None,
    settings: dict[str, Any],
    shares: Sequence[float],
    text: TextChoice,
    calibration: TextChoice | None,
    retrieval: Sequence[int] | None,
) -> Recipe:
    """Return what all points have in common, with the section `evaluate` that they are measured by.

    Raises:
        RequestError: It says what the sweep itself varies, or what has no part in one.
    """
    if "kv_ratio" in settings:
        raise RequestError("`kv_ratio` is what a sweep varies: give `shares`")
    asked: dict[str, Any] = {"kv_ratio": next(iter(shares), 0.5), "text": calibration, "evaluate.text": text}
    if retrieval:
        asked["evaluate.retrieval"] = list(retrieval)
    common = make_recipe(recipe, settings | asked)
    if common.healing_settings is not None:
        raise RequestError("a sweep does not heal what was written: leave the recipe's section heal out, or give steps")
    for side in ("key_composition", "value_composition"):
        if isinstance(getattr(common, side), dict):
            raise RequestError(f"`{side}` with options of its own has no place in a sweep: give its name alone")
    assert common.evaluate is not None
    for name in _NOT_SWEPT:
        if getattr(common.evaluate, name) is not None:
            raise RequestError(
                f"`evaluate.{name}` has no place in a sweep: leave it out, and give it to mea-compress evaluate with "
                "the checkpoint that is chosen"
            )
    for name in (*text_names(common.evaluate.text or ()), *text_names(common.text or ())):
        if name == STDIN or Path(name).is_fifo():
            once = "standard input (-)" if name == STDIN else name
            raise RequestError(f"a sweep reads its texts more than once, and {once} can be read once: name a file")
    return common


def _evaluation(common: Recipe) -> dict[str, Any]:
    """Return the fields of `EvaluateRecipe` that say how points are measured, those of the recipe among them."""
    assert common.evaluate is not None
    shared = common.model_dump(mode="json", include=set(_SHARED), exclude_defaults=True)
    return shared | common.evaluate.model_dump(mode="json", exclude_none=True)


def _command(
    source: Path | str,
    out: Path,
    common: Recipe,
    methods: Sequence[str],
    shares: Sequence[float],
    budgets: Sequence[str | None],
) -> str:
    """Return the sweep as a command."""
    assert common.evaluate is not None
    words = ["mea-compress", "sweep", str(source), "--out", str(out)]
    for name in common.evaluate.text or ():
        words += ["--text", name]
    words += ["--methods", ",".join(methods), "--shares", ",".join(f"{share:g}" for share in shares)]
    if any(budgets):
        words += ["--budgets", ",".join(budget for budget in budgets if budget)]
    if common.evaluate.retrieval:
        words += ["--retrieval", common.evaluate.retrieval]
    for name in common.text or ():
        words += ["--calibration", name]
    values = common.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    measuring = values.pop("evaluate")
    changed = {name: value for name, value in values.items() if name not in ("kv_ratio", "text", "description")}
    changed |= {f"evaluate.{name}": value for name, value in measuring.items() if name not in ("text", "retrieval")}
    for name, value in changed.items():
        words += ["--set", f"{name}={json.dumps(value) if isinstance(value, bool) else value}"]
    return shlex.join(words)


def _look_ahead(checkpoint: Checkpoint, points: Sequence[GridPoint]) -> tuple[dict[str, str], set[str]]:
    """Return why points cannot be made, by name, and the names of those whose widths a profile chooses.

    From headers alone.

    Raises:
        RequestError: None of them can be made.
    """
    reasons, profiled = {}, set()
    for point in points:
        try:
            if plan_source(checkpoint, point.recipe).decisions.measures_budget:
                profiled.add(point.name)
        except RequestError as error:
            reasons[point.name] = str(error)
    if len(reasons) == len(points):
        raise RequestError(f"nothing of the sweep can be made: {reasons[points[0].name]}")
    return reasons, profiled


def _profile_name(point: GridPoint) -> str:
    return re.sub(r"[^\w.+-]", "_", point.method) + ".json"


def _with_budget(point: GridPoint, files: Mapping[str, Path]) -> GridPoint:
    """Return a point that takes its widths from a profile's file, where there is one for it."""
    if point.name not in files:
        return point
    return replace(point, recipe=point.recipe.model_copy(update={"budget": str(files[point.name])}))


def _load_finished_sweep(out: Path, command: str) -> Sweep:
    """Return what an earlier run has finished, for a run that is resumed after it."""
    try:
        data = json.loads((out / _JSON).read_text(encoding="utf-8"))
        data["points"] = [SweepPoint(**point | {"commands": tuple(point["commands"])}) for point in data["points"]]
        lists = ("text", "points", "profiles", "heads")
        fields: dict[str, Any] = {key: tuple(data[key]) if key in lists else data[key] for key in data}
        result = Sweep(out=out, **fields)
        if result.command == command:
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(f"{out} is finished and was asked for otherwise; choose another output directory")


class _Run:
    """One sweep at work in its directory.

    Args:
        checkpoint: The original.
        common: What all points have in common.
        workspace: Where everything goes.
        progress: Show what is done on stderr.
    """

    def __init__(self, checkpoint: Checkpoint, common: Recipe, workspace: Workspace, progress: bool) -> None:
        assert common.evaluate is not None
        self.checkpoint, self.common = checkpoint, common
        self.workspace, self.progress = workspace, progress
        self.directory = checkpoint.reader.directory
        shared: dict[str, Any] = {name: getattr(common, name) for name in _SHARED} | {"progress": progress}
        self.options = shared | given_settings(common.evaluate)
        self.at_once = max(1, min(_AT_ONCE, _RESIDENT_BYTES // max(1, checkpoint.weight_bytes)))

    def look_at_heads(self) -> None:
        """Describe the heads of every layer, once."""
        if self.workspace.result_of("heads", "layers") is not None:
            return
        from mea_compress.loading import check_ids, load_tokenizer, resolve_device
        from mea_compress.sweeping.heads import survey_heads
        from mea_compress.text.reading import read_documents
        from mea_compress.text.sequences import token_sequences

        context = getattr(self.checkpoint.config, "max_position_embeddings", None) or 1024
        length = self.options.get("sequence_length") or min(context, 1024)
        tokens = token_sequences(
            read_documents(self.options["text"]),
            load_tokenizer(self.directory),
            length,
            limit=max(1, _LOOKED_AT // length),
            seed=self.common.seed,
            bos=self.options["bos"],
        )
        check_ids(tokens, self.checkpoint.config.vocab_size, self.directory)
        device = resolve_device(self.common.device)
        self.workspace.commit("heads", "layers", list(survey_heads(self.checkpoint, tokens, device, self.progress)))

    def check_measuring(self) -> None:
        """Measure a little of the original, so that what cannot be measured is refused before hours of work.

        Raises:
            RequestError: As `evaluate`.
        """
        if self.workspace.result_of("reference", "figures") is None:
            from mea_compress.measure.evaluation import evaluate

            evaluate(self.directory, **self.options | {"limit": 1, "progress": False})

    def profile_files(self, files: Mapping[str, Path]) -> dict[str, Path]:
        """Return where the profiles of points lie while the sweep is at work."""
        return {name: self.workspace.work / _PROFILES / file.name for name, file in files.items()}

    def _profile(self, point: GridPoint) -> None:
        """Measure the profile that a point takes its widths from, unless that was done.

        Raises:
            RequestError: As `profile`.
        """
        file = budget_file(point.recipe)
        if file is None or file.parent != self.workspace.work / _PROFILES or file.is_file():
            return
        from mea_compress.fit.profile import profile

        file.parent.mkdir(exist_ok=True)
        profile(self.directory, out=file, recipe=point.recipe, progress=self.progress)

    def rows(
        self, points: Sequence[GridPoint], shown: dict[str, list[str]], reasons: dict[str, str]
    ) -> list[SweepPoint]:
        """Make and measure every point that is not measured yet, and return all.

        Raises:
            RequestError: None can be made.
        """
        waiting: list[GridPoint] = []
        for number, point in enumerate(points, start=1):
            if self.workspace.result_of("rows", point.name) is not None:
                continue
            if self.progress:
                print(f"[{number}/{len(points)}] {point.name}", file=sys.stderr, flush=True)
            reason = reasons.get(point.name) or self._make(point)
            if reason is not None:
                self._keep(self._described(point, shown, reason))
                continue
            waiting.append(point)
            if len(waiting) == self.at_once:
                self._measure(waiting, shown)
                waiting = []
        if waiting:
            self._measure(waiting, shown)
        rows = [self.workspace.result_of("rows", point.name) for point in points]
        if all(row["reason"] for row in rows):
            raise RequestError(f"nothing of the sweep can be made: {rows[0]['reason']}")
        return [SweepPoint(**row | {"commands": tuple(row["commands"])}) for row in rows]

    def _place(self, point: GridPoint) -> Path:
        return self.workspace.work / "points" / point.name

    def _make(self, point: GridPoint) -> str | None:
        """Compress, and keep what is known of the result; return why that cannot be done, or None."""
        if self.workspace.result_of("made", point.name) is not None:
            return None
        target = self._place(point)
        begun = target.exists() or partial_path(target).exists()
        try:
            self._profile(point)
            start = time.monotonic()
            result = compress(self.directory, target, recipe=point.recipe, resume=True, progress=self.progress)
        except DiskFullError:
            raise
        except RequestError as error:
            return str(error)
        layers = result.plan.layers
        if result.plan.profile is not None:
            self.workspace.commit("profiles", point.method, result.plan.profile.to_json())
        self.workspace.commit(
            "made",
            point.name,
            {
                # What an earlier run has done of it is not in the time.
                "seconds": None if begun else round(time.monotonic() - start, 1),
                "key_composition": next((one.spec.key.composition for one in layers if one.compressed), None),
                "value_composition": next((one.spec.value.composition for one in layers if one.compressed), None),
                "predicted_kl": result.plan.predicted_kl,
                "parameters": result.plan.costs.parameters_after,
                "widths": [[one.spec.key.components, one.spec.value.components] for one in layers],
            },
        )
        return None

    def _measure(self, points: Sequence[GridPoint], shown: dict[str, list[str]]) -> None:
        """Measure checkpoints together, keep each row, and remove them."""
        from mea_compress.measure.evaluation import evaluate

        places = {point.name: self._place(point) for point in points}
        found = evaluate(list(places.values()), reference=self.directory, **self.options)
        first: Evaluation = next(iter(found.checkpoints.values()))
        reference = first.to_json()["reference"]
        self.workspace.commit("reference", "tokens", first.tokens)
        self.workspace.commit("reference", "figures", reference)
        for point in points:
            measured = found.checkpoints[str(places[point.name])].to_json()
            self._keep(self._described(point, shown, None, measured))
            shutil.rmtree(places[point.name])

    def _described(
        self,
        point: GridPoint,
        shown: dict[str, list[str]],
        reason: str | None,
        measured: dict[str, Any] | None = None,
    ) -> SweepPoint:
        made = self.workspace.result_of("made", point.name) or {}
        figures = {name: value for name, value in (measured or {}).items() if name in SweepPoint.__dataclass_fields__}
        chosen = {"key_composition": point.recipe.key_composition, "value_composition": point.recipe.value_composition}
        return SweepPoint(
            name=point.name,
            method=point.method,
            share=point.share,
            budget=point.budget,
            commands=tuple(shown[point.name]),
            reason=reason,
            **chosen | made | figures,
        )

    def _keep(self, row: SweepPoint) -> None:
        self.workspace.commit("rows", row.name, asdict(row))


def _write(result: Sweep, directory: Path) -> None:
    """Write the figures, the picture and the page."""
    data: Any = finite(result.to_json())
    write_json(directory / _JSON, data)
    write_text(directory / "sweep.csv", sweep_csv(data))
    with refusals(directory / "sweep.png"):
        draw_sweep(data, directory / "sweep.png")
    write_text(directory / "index.html", sweep_page(data))


__all__ = ["sweep"]
