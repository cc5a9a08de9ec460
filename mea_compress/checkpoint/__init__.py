"""Safetensors checkpoints on disk, one tensor at a time; knows nothing of model families."""

from mea_compress.checkpoint.reader import CheckpointReader, TensorInfo, dtype_name, read_tensor, torch_dtype
from mea_compress.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    Entry,
    NewTensor,
    Shard,
    plan_shards,
    required_bytes,
    shard_finished,
    shard_steps,
    write_checkpoint,
    write_index,
    write_shard,
)

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "CheckpointReader",
    "Entry",
    "NewTensor",
    "Shard",
    "TensorInfo",
    "dtype_name",
    "plan_shards",
    "read_tensor",
    "required_bytes",
    "shard_finished",
    "shard_steps",
    "torch_dtype",
    "write_checkpoint",
    "write_index",
    "write_shard",
]
