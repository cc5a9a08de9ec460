"""Fits layer after layer: statistics, closed form, refinement, and on to the next with what was stored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from mea_compress.architectures import Source
from mea_compress.checkpoint import CheckpointReader, NewTensor, dtype_name, write_checkpoint
from mea_compress.checkpoint.system import release
from mea_compress.checkpoint.workspace import Workspace
from mea_compress.emit.weights import layer_directory
from mea_compress.fit.closed_form import compose
from mea_compress.heads.composed import Array
from mea_compress.layers.store import StoredLayer, store_layer
from mea_compress.plan.planning import Plan, needs_text, stored_dtype
from mea_compress.recipe import Recipe


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leaves a processor to a thread that copies: where one of NumPy's does not run, all others wait for it."""
    pools = ThreadpoolController().select(user_api="blas")
    threads = max((pool.num_threads for pool in pools.lib_controllers), default=1)
    with pools.limit(limits=max(1, threads - 1)):
        yield


def fit_layers(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    workspace: Workspace,
    progress: bool,
    stored: Callable[[int], object] = lambda layer: None,
) -> None:
    """Fits every chosen layer and stores its tensors in a directory of its own.

    Args:
        source: The checkpoint.
        plan: What to do to every layer.
        recipe: How.
        workspace: Where to, and what is finished.
        progress: Show bars on stderr.
        stored: Called with the number of each layer whose tensors have been stored.

    Raises:
        RequestError: As `compose`, `store_layer`, `calibration_tokens` and `Fitter`.
    """
    dtype = stored_dtype(source, recipe)
    fitter: Any = None
    unfinished = [
        layer.layer
        for layer in plan.layers
        if layer.compressed and workspace.finished("layers", str(layer.layer)) is None
    ]
    if unfinished and needs_text(source, recipe):
        from mea_compress.fit.fitter import Fitter  # PyTorch, which weights alone do not need

        fitter = Fitter(source, recipe, _tokens(source, recipe, workspace, progress), progress)
    for layer in tqdm(plan.layers, desc="fitting layers", unit="layer", disable=not progress):
        if layer.layer > max(unfinished, default=-1):
            continue
        made, directory = None, layer_directory(workspace, layer.layer)
        if layer.layer in unfinished:
            composed, fidelity = fitter.fit(layer) if fitter else compose(source, layer, None, recipe)
            made = store_layer(composed, source.config.mea["bias"], dtype)
            write_checkpoint(directory, [_entry(name, array) for name, array in made.tensors.items()], durable=False)
            workspace.note(str(layer.layer), directory, fidelity=fidelity, layers=made.section)
            stored(layer.layer)
            del composed
            if fitter:
                release()
        elif fitter and layer.compressed:
            reader = CheckpointReader(directory)
            section = workspace.finished("layers", str(layer.layer))
            made = StoredLayer(section, {name: reader.read_array(name) for name in reader.tensors})
        if fitter and layer.layer < unfinished[-1]:
            fitter.advance(layer.layer, made)


def _tokens(source: Source, recipe: Recipe, workspace: Workspace, progress: bool) -> Any:
    """Calibration sequences, a tensor (N, T), kept in the workspace so that a resumed run has the same."""
    from mea_compress.fit.fitter import calibration_tokens

    directory = workspace.work / "calibration"
    if not workspace.finished("calibration", "tokens"):
        tokens = calibration_tokens(source, recipe, progress)
        write_checkpoint(directory, [_entry("tokens", tokens.numpy())])
        workspace.record("calibration", "tokens", list(tokens.shape))
    return CheckpointReader(directory).read("tokens")


def _entry(name: str, array: Array) -> NewTensor:
    return NewTensor(name, dtype_name(array.dtype), array.shape, lambda: array)
