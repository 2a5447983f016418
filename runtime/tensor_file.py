"""Writing a safetensors file in a background thread: in chunks, checksummed as it goes, synced.

The format (github.com/huggingface/safetensors, "Format"): an unsigned 64-bit little-endian length, a
JSON header of that length (name -> dtype, shape, offsets into what follows), then the tensors' bytes
one after the other. Written here rather than by the library because the checksum then needs no
second reading, the interpreter is free for the training thread during every chunk, and a full disk
shows as the OSError it is. The library reads the files back.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

CHUNK_BYTES = 4 << 20
_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class FileRecord:
    """Size and CRC-32 of a file: what tells a whole file from a truncated or damaged one."""

    num_bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Writes contiguous host tensors to a safetensors file and syncs it. Raises OSError."""
    header: dict[str, object] = {}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    writer = _ChecksummedFile(path)
    with writer:
        writer.write(memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            writer.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return FileRecord(writer.num_bytes, writer.crc32)


def write_synced(path: Path, text: str) -> FileRecord:
    """Writes a text file and syncs it. Raises OSError."""
    writer = _ChecksummedFile(path)
    with writer:
        writer.write(memoryview(text.encode()))
    return FileRecord(writer.num_bytes, writer.crc32)


class _ChecksummedFile:
    """A new file that knows the size and CRC-32 of what was written, and syncs as it closes."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self.num_bytes = self.crc32 = 0

    def write(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            self.crc32 = zlib.crc32(chunk, self.crc32)
            while chunk:  # an unbuffered write may take less than it is given
                chunk = chunk[self._stream.write(chunk) or 0 :]
        self.num_bytes += len(content)

    def __enter__(self) -> _ChecksummedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stream:
            if kind is None:
                os.fsync(self._stream.fileno())


def sync_folder(path: Path) -> None:
    """Makes the folder's entries survive a power failure. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def measure_file(path: Path) -> FileRecord:
    """Size and CRC-32 of a file as it stands. Raises OSError."""
    num_bytes = crc32 = 0
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
            num_bytes += len(chunk)
    return FileRecord(num_bytes, crc32)
