"""Models and tokenizers in: checkpoint directories loaded with transformers, on the device and in the dtype asked for.

Only safetensors are read, and no code of the directory runs unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mea_compress.checkpoint.hub import local_directory
from mea_compress.checkpoint.vocabulary import has_vocabulary
from mea_compress.errors import RequestError, first_line
from mea_compress.modeling import multimodal_classes, register
from mea_compress.processes import process_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_DEFAULT_SEQUENCE = 1024


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the torch device of a name; ``auto`` is the GPU where there is one.

    Raises:
        RequestError: The name is no device, or this machine has no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"`device` {device} is not a device: use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"`device` {device} was asked for, but this machine has no such GPU: use cpu")
    return resolved


def training_device(device: str | torch.device = "auto") -> torch.device:
    """Return `resolve_device` of a name for a model that is to be trained, which transformers' Trainer puts on a GPU.

    Raises:
        RequestError: It is another GPU than the first that is visible, which the Trainer takes in a single process.
    """
    resolved = resolve_device(device)
    if resolved.index and process_count() == 1:
        raise RequestError(
            f"`device` {device} cannot be trained on, for training takes the first GPU: set CUDA_VISIBLE_DEVICES to "
            f"{resolved.index} and give cuda"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of a name; None stays None (the checkpoint's own).

    Raises:
        RequestError: The name is not a floating-point dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise RequestError(f"`dtype` {dtype} is not a floating-point type: use float32, bfloat16, float16 or float64")
    return resolved


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint directory.

    Raises:
        RequestError: No such directory, or it holds no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    path = _checkpoint_directory(path)
    register()
    try:
        # Transformers would make one of no words for a family whose tokenizer has a class of its own.
        if not has_vocabulary(path):
            raise FileNotFoundError("it has no vocabulary")
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise RequestError(
            f"the tokenizer of {path} cannot be loaded ({first_line(error)}): copy the tokenizer's files there"
        ) from error


def load_model(
    path: Path | str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the causal language model of a checkpoint directory, in evaluation mode, from safetensors only.

    One that has images or sound as well is loaded with all that it has.

    Args:
        path: Directory of the checkpoint, or its hub id.
        dtype: Dtype of the weights; None keeps the checkpoint's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.
        trust_remote_code: Run modelling code of the directory. Never needed for the models of this package.

    Raises:
        RequestError: No such directory, no safetensors in it, transformers cannot make a model of it, or a tensor of
            the model is not there.
    """
    path = _checkpoint_directory(path)
    register()
    if not any(path.glob("*.safetensors")):
        raise RequestError(
            f"{path} has no *.safetensors file: convert its weights to safetensors first (pickles are not read)"
        )
    target, weights_dtype = resolve_device(device), resolve_dtype(dtype) or "auto"
    try:
        loaded: Any = _auto_class(path, trust_remote_code).from_pretrained(
            path,
            dtype=weights_dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        raise RequestError(
            f"the model of {path} cannot be loaded ({first_line(error)}): give a checkpoint that transformers loads"
        ) from error
    model, info = loaded
    missing = info["missing_keys"]
    if missing:  # transformers has filled them with random numbers
        raise RequestError(
            f"{path}: tensor {min(missing)} is missing; complete the download or give the config.json that belongs to "
            "these weights"
        )
    return model.to(target).eval()


def _auto_class(path: Path, trust_remote_code: bool) -> Any:
    """Return the one of transformers' auto classes that loads all of a checkpoint with a language model in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    return (*multimodal_classes(type(config)), AutoModelForCausalLM)[0]


def load(
    checkpoint: Path | str, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a compressed checkpoint, or any that transformers loads, with its tokenizer.

    Args:
        checkpoint: Directory of the checkpoint, or its hub id.
        dtype: Dtype of the weights; None keeps the checkpoint's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``.

    Returns:
        The model, in evaluation mode, and its tokenizer, None where the directory has none.

    Raises:
        RequestError: No such directory, no safetensors in it, or transformers cannot make a model of it.

    Example:
        >>> model, tokenizer = load("HALF", device="cpu")
        >>> model.config.model_type
        'mea_llama'
    """
    checkpoint = local_directory(checkpoint)
    model = load_model(checkpoint, dtype, device)
    return model, load_tokenizer(checkpoint) if has_vocabulary(checkpoint) else None


def _checkpoint_directory(path: Path | str) -> Path:
    path = local_directory(path)
    if not path.is_dir():
        raise RequestError(
            f"{path} is not a directory: give the directory of a checkpoint (config.json and *.safetensors)"
        )
    if not (path / "config.json").is_file():
        raise RequestError(f"{path} has no config.json: give the directory of a Hugging Face checkpoint")
    return path


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model predicts."""
    return int(model.config.get_text_config().vocab_size)


def placeholder_tokens(config: Any) -> tuple[int, ...]:
    """Return the ids of tokens that stand where images or sound are, none of which is text, in ascending order.

    Args:
        config: Configuration of a model.
    """
    if config.get_text_config() is config:
        return ()
    of_text = {f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "decoder_start")}
    named = {name: value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    return tuple(sorted({value for name, value in named.items() if name not in of_text and isinstance(value, int)}))


def check_ids(ids: torch.Tensor, vocabulary: int, checkpoint: Path | str) -> None:
    """Check that a checkpoint's tokenizer made no id beyond its model.

    Raises:
        RequestError: It did.
    """
    largest = int(ids.max())
    if largest >= vocabulary:
        raise RequestError(
            f"the tokenizer of {checkpoint} makes id {largest}, and the model has {vocabulary}: "
            "put the tokenizer that belongs to it into the directory"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """Return the positions that a model was made for, from its config; None where it does not say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def shared_context(models: Iterable[PreTrainedModel]) -> int | None:
    """Return the positions that all of some models were made for; None where none of them says."""
    return min(filter(None, map(context_length, models)), default=None)


def check_sequence_length(sequence_length: int) -> None:
    """Check that a sequence has a token to predict.

    Raises:
        RequestError: It is shorter than two tokens.
    """
    if sequence_length < 2:
        raise RequestError(f"`sequence_length` {sequence_length} leaves nothing to predict: give 2 or more")


def check_context(context: int | None, sequence_length: int) -> None:
    """Check that sequences fit into the context of a model, None where it does not say.

    Raises:
        RequestError: They are longer.
    """
    if context is not None and sequence_length > context:
        raise RequestError(
            f"`sequence_length` {sequence_length} is longer than the model's context of {context} tokens: give no more"
        )


def choose_sequence_length(model: PreTrainedModel, sequence_length: int | None = None) -> int:
    """Return the tokens of a sequence: the number asked for, else the model's context, at most 1024.

    Raises:
        RequestError: It is shorter than two tokens, or longer than the model's context.
    """
    if sequence_length is None:
        return min(context_length(model) or MAX_DEFAULT_SEQUENCE, MAX_DEFAULT_SEQUENCE)
    check_sequence_length(sequence_length)
    check_context(context_length(model), sequence_length)
    return sequence_length


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the ids that end a text, from the model's config and generation config, in ascending order."""
    ends: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ends))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random generator of a device inside the block, and put its state back behind it."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
