"""A checkpoint to compress: its headers, its family and its configuration, checked against each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_compress.architectures.families import MEA_PREFIX, Family, find_family
from mea_compress.checkpoint import CheckpointReader
from mea_compress.errors import RequestError

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found whole.

    Attributes:
        reader: Its tensors, headers only.
        family: What it calls its parts.
        config: Configuration object of the MEA form of the family; ``config.mea`` says what each layer caches
            (compositions ``none`` where the checkpoint is not an MEA model).
        native: Whether the checkpoint is an MEA model already.
        raw_config: config.json as it stands.
    """

    reader: CheckpointReader
    family: Family
    config: Any
    native: bool
    raw_config: dict[str, Any]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return int(self.head_dim * (self.config.rope_parameters or {}).get("partial_rotary_factor", 1.0))

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of the attention weights."""
        name = "k_proj" if self.family.fused is None or self.native else self.family.fused
        return self.reader.info(f"{self.family.attention(0)}{name}.weight").dtype


def open_source(directory: Path) -> Source:
    """Opens a checkpoint and checks, from headers alone, that every attention tensor is there with the right shape.

    Raises:
        RequestError: Something is missing or does not fit; the message names the file or tensor.
    """
    reader = CheckpointReader(directory)
    raw = reader.config()
    where = str(directory / "config.json")
    family = find_family(raw, where)
    native = str(raw["model_type"]).startswith(MEA_PREFIX)
    source = Source(reader, family, _configuration(raw, family, native, where), native, raw)
    _check_tensors(source)
    return source


def _configuration(raw: dict[str, Any], family: Family, native: bool, where: str) -> Any:
    """The configuration object of the MEA form; a stock source gets a section that says ``none`` for every layer."""
    # Imported here: headers of a wrong directory are refused before transformers is loaded.
    from mea_compress.modeling import configuration_mea

    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    for key in (*sizes, "num_key_value_heads", "head_dim"):
        value = raw.get(key)
        if value is None and key not in sizes:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
            raise RequestError(f"{where}: {key} must be a positive whole number, not {value!r}")
    query_heads = raw["num_attention_heads"]
    heads = raw.get("num_key_value_heads") or query_heads
    if query_heads % heads:
        raise RequestError(f"{where}: {query_heads} query heads cannot share {heads} key/value heads evenly")
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "architectures")}
    if not native:
        whole = {"key_composition": "none", "key_components": heads, "value_composition": "none"}
        layers = [{**whole, "value_components": heads} for _ in range(raw["num_hidden_layers"])]
        fields["mea"] = {"layers": layers, "qk_norm": family.qk_norm}
    try:
        return getattr(configuration_mea, f"Mea{family.prefix}Config").from_dict(fields)
    except Exception as error:  # transformers' strict configurations raise classes of their own
        reason = " ".join(str(error).split())
        raise RequestError(f"{where} is not a usable configuration: {reason}") from error


def _check_tensors(source: Source) -> None:
    config, family = source.config, source.family
    hidden, width = config.hidden_size, config.num_attention_heads * source.head_dim
    heads, head_dim = config.num_key_value_heads, source.head_dim
    bias = config.mea["bias"]
    for layer, spec in enumerate(config.mea["layers"]):
        prefix = family.attention(layer)
        key_width, value_width = spec["key_components"] * head_dim, spec["value_components"] * head_dim
        expected: dict[str, tuple[int, ...]] = {f"{prefix}o_proj.weight": (hidden, width)}
        rows = {"q_proj": (width, "query"), "k_proj": (key_width, "key"), "v_proj": (value_width, "value")}
        if family.fused and not source.native:
            expected[f"{prefix}{family.fused}.weight"] = (width + key_width + value_width, hidden)
        else:
            for name, (count, side) in rows.items():
                expected[f"{prefix}{name}.weight"] = (count, hidden)
                if bias[side]:
                    expected[f"{prefix}{name}.bias"] = (count,)
        if bias["output"]:
            expected[f"{prefix}o_proj.bias"] = (hidden,)
        if config.mea["qk_norm"]:
            expected[f"{prefix}q_norm.weight"] = expected[f"{prefix}k_norm.weight"] = (head_dim,)
        if config.mea["head_norm"]:
            expected[f"{prefix}head_norm.weight"] = (head_dim,)
        for side in ("key", "value"):
            shape = composition_shape(spec[f"{side}_composition"], spec[f"{side}_components"], heads, head_dim)
            if shape is not None:
                expected[f"{prefix}{side}_composition.weight"] = shape
        for name, shape in expected.items():
            if not source.reader.has(name):
                raise RequestError(f"{source.reader.directory}: tensor {name} is missing; complete the download")
            info = source.reader.info(name)
            if info.shape != shape:
                raise RequestError(
                    f"{info.file}: tensor {name} has shape {list(info.shape)} where config.json asks for {list(shape)}"
                )
            if info.dtype not in _FLOATS:
                raise RequestError(
                    f"{info.file}: tensor {name} is {info.dtype}; attention weights must be one of {', '.join(_FLOATS)}"
                )


def composition_shape(kind: str, components: int, heads: int, head_dim: int) -> tuple[int, ...] | None:
    """Shape of ``key_composition.weight`` or ``value_composition.weight``; None where there is no such tensor."""
    if kind in ("head", "prune", "share"):
        return (components, heads)
    if kind == "frequency":
        return (2, components * head_dim // 2, heads)
    if kind == "latent":
        return (heads * head_dim, components * head_dim)
    return None
