"""What engines are known to make of an export: which run it, which refuse it, which would get it wrong."""

from dataclasses import dataclass

from mea_compress.errors import RequestError
from mea_compress.exporting.form import StockForm

COMMON_HEAD_DIMS = (64, 128, 256, 512)
"""Head sizes that the kernels of all common engines take: what vLLM 0.32.0 says of its CPU, FlashInfer and AMD kernels,
of FlashAttention up to 256 and of its fourth version at 512; others run in some of them."""
_VLLM_CPU_HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_POOLED = "compress with --key-composition pool --value-composition pool, whose RoPE stays the source's"


@dataclass(frozen=True)
class Engine:
    """An engine, as far as exports are concerned.

    Attributes:
        format: Of `export` for wide heads.
        written_frequencies: Why frequencies that are written down (longrope) do not work, or None where they do.
        fixed_head_dim: ``model_type`` whose head size it takes from the hidden size.
        head_dims: The only head sizes that its kernels take; any where empty.
        known_by: Whether that was run, read in its source, or reported by users.
    """

    format: str = "stock"
    written_frequencies: str | None = None
    fixed_head_dim: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    known_by: str = "run"


ENGINES = {
    "transformers": Engine(),
    "vllm": Engine(fixed_head_dim=("qwen2",)),
    "vllm-cpu": Engine(fixed_head_dim=("qwen2",), head_dims=_VLLM_CPU_HEAD_DIMS),
    "sglang": Engine(known_by="read"),
    "llama.cpp": Engine(
        format="gguf", written_frequencies="its converter leaves them out and rotates keys wrongly without a word"
    ),
    "openvino": Engine(),
    "onnxruntime-genai": Engine(
        written_frequencies="its builder leaves them out without a word and answers wrongly from the first token",
        known_by="reported",
    ),
    "mlx": Engine(format="llama", fixed_head_dim=("qwen2",), known_by="read"),
    "tgi": Engine(written_frequencies="it asks config.json for what only Phi-3 has", known_by="read"),
    "ctranslate2": Engine(written_frequencies="its converter refuses them", known_by="reported"),
    "mistral.rs": Engine(written_frequencies="it refuses them", known_by="reported"),
    "mlc-llm": Engine(written_frequencies="it refuses them", known_by="read"),
}
"""Every engine that `export --for` knows."""


def check_engine(name: str, form: StockForm, model_type: str, format: str) -> None:
    """Raise if an engine would not run an export, or would get it wrong.

    Args:
        name: One of `ENGINES`.
        form: Of the export.
        model_type: Of the export.
        format: ``stock``, ``llama`` or ``gguf``.

    Raises:
        RequestError: It would; the message says what to do.
    """
    if name not in ENGINES:
        raise RequestError(f"there is no engine {name!r} that `engine` knows; choose one of {', '.join(ENGINES)}")
    engine, wide = ENGINES[name], not form.keeps_rope
    if format == "gguf":
        if engine.format != "gguf":
            raise RequestError(f"{name} reads no GGUF of this program; export with --format {engine.format}")
        return
    if wide and engine.written_frequencies:
        remedy = f"export with --format {engine.format}" if engine.format == "gguf" else _POOLED
        raise RequestError(
            f"{name} does not serve rotary frequencies that are written down: {engine.written_frequencies}; {remedy}"
        )
    if wide and model_type in engine.fixed_head_dim:
        raise RequestError(
            f"{name} takes the head size of {model_type} from the hidden size; export with --format llama"
        )
    if engine.head_dims and form.head_dim not in engine.head_dims:
        raise RequestError(
            f"{name} has no kernel for heads of {form.head_dim} channels, and the first request would end it; "
            f"{_nearest(form, engine.head_dims)}"
        )


def engine_warning(form: StockForm, format: str = "stock") -> str | None:
    """Return what to mind about engines before an export is served, or None.

    Args:
        form: Of the export.
        format: ``stock``, ``llama`` or ``gguf``.
    """
    notes = []
    if form.head_dim not in COMMON_HEAD_DIMS:
        nearest = " and ".join(map(str, _around(form.head_dim, COMMON_HEAD_DIMS)))
        notes.append(
            f"Heads of {form.head_dim} channels are not among those that every engine has kernels for; the nearest "
            f"that are: {nearest} (another kv_ratio, or kv_groups other than {form.groups})."
        )
    if not form.keeps_rope and format != "gguf":
        notes.append(
            "Its rotary frequencies are written down (longrope): onnxruntime-genai and llama.cpp's own converter "
            "leave them out without a word; `mea-compress export --for ENGINE` checks an engine."
        )
    return " ".join(notes) or None


def _around(head_dim: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the next smaller and the next larger size, where there are such."""
    smaller, larger = [size for size in sizes if size < head_dim], [size for size in sizes if size > head_dim]
    return [*smaller[-1:], *larger[:1]]


def _nearest(form: StockForm, sizes: tuple[int, ...]) -> str:
    nearest = " or ".join(map(str, _around(form.head_dim, sizes)))
    return f"compress again so that heads have {nearest} (another --kv-ratio or --kv-groups)"
