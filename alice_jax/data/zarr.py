"""How the arrays of a store lie in files: zarr3, one shard of small compressed chunks with checksums."""

from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 32  # voxels: a 64-voxel crop touches 8 to 27 chunks; 128 would decode eight times what it needs


def metadata(array: np.ndarray, fill: int, chunks: Sequence[int] | None) -> dict[str, Any]:
    """The zarr.json of an array; `chunks` is the unit of reading, by default `CHUNK` voxels with all their channels."""
    if chunks is None:  # channels, if any, stay together
        chunks = [min(CHUNK, n) if axis < 3 else n for axis, n in enumerate(array.shape)]
    shard = [-(-n // c) * c for n, c in zip(array.shape, chunks, strict=True)]
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}}
    sharding = {
        "chunk_shape": [int(c) for c in chunks],
        "codecs": [bytes_codec, blosc, {"name": "crc32c"}],
        "index_codecs": [bytes_codec, {"name": "crc32c"}],
    }
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "fill_value": array.dtype.type(fill).item(),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [int(n) for n in shard]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
