"""What the Hub keeps large files in (Xet): takes what `hf_xet` uploads, and puts the files together again.

Files arrive as chunks in containers (xorbs) and a table (shard) that says which chunks make which file. The layouts
are those of the public specification of the protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

ENTRY = 48  # bytes of every entry of a shard
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30
END = b"\xff" * 32


@dataclass
class XetStore:
    """Containers by their hash as text; `objects` receives each file under its SHA-256."""

    objects: dict[str, bytes]
    xorbs: dict[str, list[bytes]] = field(default_factory=dict)

    def take(self, path: str, body: bytes) -> dict[str, object] | None:
        """Answer one request of `hf_xet`; None for what is not known, such as chunks somebody else has."""
        parts = path.strip("/").split("/")
        if parts[-3:-1] == ["xorbs", "default"]:
            self.xorbs[parts[-1]] = list(_chunks(body))
            return {"was_inserted": True}
        if parts[-1] == "shards":
            for digest, segments in _files(body):
                self.objects[digest] = b"".join(b"".join(self.xorbs[xorb][a:b]) for xorb, a, b in segments)
            return {"type": "result", "result": 1}
        return None


def _text(value: bytes) -> str:
    """A hash as the protocol writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", value))


def _chunks(body: bytes) -> Iterator[bytes]:
    """Chunks of a container: a version, length stored, scheme, length, then what is stored; a footer may follow."""
    at = 0
    while at + 8 <= len(body) and body[at] == 0:
        stored, scheme, length = int.from_bytes(body[at + 1 : at + 4], "little"), body[at + 4], body[at + 5 : at + 8]
        data = body[at + 8 : at + 8 + stored]
        if scheme:
            data = _lz4_frame(data)
        if scheme == 2:  # bytes of four-byte numbers, grouped by their place in the number
            data = _ungrouped(data)
        assert len(data) == int.from_bytes(length, "little"), "a chunk of another length than its header says"
        yield data
        at += 8 + stored


def _files(shard: bytes) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """SHA-256 of each file in a table, and its runs of chunks: container, first, end."""
    at = ENTRY  # behind the header
    while (head := shard[at : at + ENTRY])[:32] != END:
        flags, count = struct.unpack_from("<II", head, 32)
        at += ENTRY
        segments = []
        for position in range(at, at + count * ENTRY, ENTRY):
            first, end = struct.unpack_from("<II", shard, position + 40)
            segments.append((_text(shard[position : position + 32]), first, end))
        at += count * ENTRY * (2 if flags & WITH_VERIFICATION else 1)
        assert flags & WITH_METADATA, "a file without its SHA-256"
        yield _text(shard[at : at + 32]), segments
        at += ENTRY


def _lz4_frame(data: bytes) -> bytes:
    """The content of an LZ4 frame; blocks may look back into earlier ones."""
    flags, at, out = data[4], 7 + (8 if data[4] & 8 else 0), bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        at += 4
        plain, size = size >> 31, size & 0x7FFFFFFF
        block = data[at : at + size]
        out += block if plain else b""
        if not plain:
            _lz4_block(block, out)
        at += size + (4 if flags & 16 else 0)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    """Append the content of one block."""
    at = 0

    def length(begin: int) -> int:
        nonlocal at
        more = 255 if begin == 15 else 0
        while more == 255:
            more = block[at]
            begin, at = begin + more, at + 1
        return begin

    while at < len(block):
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        back = int.from_bytes(block[at : at + 2], "little")
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-back])


def _ungrouped(data: bytes) -> bytes:
    sizes = [(len(data) + 3 - place) // 4 for place in range(4)]
    out, at = bytearray(len(data)), 0
    for place, size in enumerate(sizes):
        out[place::4] = data[at : at + size]
        at += size
    return bytes(out)
