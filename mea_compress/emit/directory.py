"""What stands in a checkpoint directory besides weights and code, for everything that writes one."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mea_compress.architectures.checkpoint import ADAPTER_CONFIG
from mea_compress.architectures.families import Family
from mea_compress.checkpoint import CheckpointReader
from mea_compress.checkpoint.files import write_text
from mea_compress.emit.code import CODE_FILES, write_code

_LIBRARIES = ("mea-compress", "torch", "transformers", "safetensors", "numpy", "ml-dtypes")


def versions() -> dict[str, str]:
    """Return the versions of what computed a result, by package."""
    return {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}


def other_bytes(reader: CheckpointReader) -> int:
    """Return the bytes of all files of a checkpoint but config.json and weights of any format.

    Raises:
        RequestError: As `CheckpointReader.other_files`.
    """
    return sum(file.stat().st_size for file in _other_files(reader))


def copy_other_files(
    reader: CheckpointReader, target: Path, skip: Collection[str] = (), renamed: Mapping[str, str] | None = None
) -> None:
    """Copy tokenizer, chat template, generation config, licence and whatever else is neither weights nor our code.

    The configuration of an adapter, whose weights are not copied, is left out.

    Args:
        reader: The checkpoint to copy from.
        target: An existing directory.
        skip: Paths below the checkpoint's directory that are left out.
        renamed: New paths, by those below the checkpoint's directory.

    Raises:
        OSError: The disk is full or refuses.
        RequestError: As `CheckpointReader.other_files`.
    """
    for relative in reader.other_files():
        if relative.name in (*CODE_FILES, ADAPTER_CONFIG) or str(relative) in skip:
            continue
        copy = target / (renamed or {}).get(str(relative), str(relative))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reader.directory / relative, copy)


def fingerprint(reader: CheckpointReader, raw_config: Mapping[str, Any]) -> str:
    """Return a digest of a checkpoint that changes with its tensors' places, its files and its configuration.

    Args:
        reader: The checkpoint.
        raw_config: Its config.json.
    """
    digest = hashlib.sha256()
    for info in reader.tensors.values():
        digest.update(f"{info.name} {info.dtype} {info.shape} {info.file.name} {info.offset}\n".encode())
    files = [*reader.files, *_other_files(reader)]
    stats = [(os.path.relpath(file, reader.directory), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest.update(repr((sorted(stats), raw_config)).encode())
    return digest.hexdigest()


def _other_files(reader: CheckpointReader) -> list[Path]:
    return [reader.directory / relative for relative in reader.other_files()]


def auto_map(family: Family) -> dict[str, str]:
    """Return the section of config.json that tells transformers which of the code files has which class."""
    config, base, causal = family.classes
    classes = {"AutoConfig": f"configuration_mea.{config}", "AutoModel": f"modeling_mea.{base}"}
    return classes | dict.fromkeys(("AutoModelForCausalLM", *family.multimodal_classes), f"modeling_mea.{causal}")


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json and, where it names classes of ours, the code that has them.

    Raises:
        OSError: The disk is full or refuses.
        RequestError: As `write_text`.
    """
    # Infinity stays as it is in the configurations of some families, which Python's json reads.
    write_text(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if "auto_map" in config:
        write_code(directory)


__all__ = [
    "auto_map",
    "copy_other_files",
    "fingerprint",
    "other_bytes",
    "versions",
    "write_config",
]
