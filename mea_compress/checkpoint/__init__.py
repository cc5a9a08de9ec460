"""Safetensors checkpoints on disk, one tensor at a time; knows nothing of model families."""

from mea_compress.checkpoint.dtypes import array_dtype, as_array, as_tensor, dtype_name, torch_dtype
from mea_compress.checkpoint.layout import DEFAULT_SHARD_BYTES, Entry, NewTensor, Shard, TensorInfo, plan_shards
from mea_compress.checkpoint.reader import CheckpointReader, read_array, read_tensor
from mea_compress.checkpoint.writer import shard_finished, write_checkpoint, write_index, write_shard

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "CheckpointReader",
    "Entry",
    "NewTensor",
    "Shard",
    "TensorInfo",
    "array_dtype",
    "as_array",
    "as_tensor",
    "dtype_name",
    "plan_shards",
    "read_array",
    "read_tensor",
    "shard_finished",
    "torch_dtype",
    "write_checkpoint",
    "write_index",
    "write_shard",
]
