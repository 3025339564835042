"""`cache.json`, the header of a pixel cache: what a cache holds, known without its pixels and without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from ...config import Resize
from ...utils.documents import Within, as_schema, parse_json
from ...utils.errors import UserError
from ...utils.files import write_text
from ...utils.text import printable

FORMAT = "pspg-engine pixel cache"
VERSION = 2
"""Raised when the layout, or the pixels that `images` makes of a file, change."""
AGAIN = "run pspg-engine prepare cache again"

Size = Annotated[int, Within(1, 65536)]


@dataclass(frozen=True)
class Shard:
    """Two complete files of the cache."""

    number: Annotated[int, Within(0, 10**6)]
    images: Annotated[int, Within(1, 10**7)]
    pixels_sha256: str
    index_sha256: str
    sums_sha256: str | None = None
    """None: an older version wrote the shard, without checksums of the images"""


@dataclass
class Header:
    """`cache.json`."""

    size: Size
    resize: Resize
    bit_depth: int | None = None
    finished: bool = False
    shards: list[Shard] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the folder's header in one step."""
        counts = {"images": sum(shard.images for shard in self.shards)}
        document = {"format": FORMAT, "version": VERSION, **counts, **asdict(self)}
        write_text(folder / "cache.json", json.dumps(document, indent=1) + "\n")

    def check_use(self, folder: Path, *, size: int, resize: Resize, bit_depth: int | None) -> None:
        """
        Args:
            folder: where the cache is.
            size, resize, bit_depth: what a run needs.

        Raises:
            UserError: the cache is not finished, or holds other images than these.
        """
        if not self.finished:
            raise UserError(f"{folder}: the cache is not finished; {AGAIN}, it goes on where it was")
        if (self.size, self.resize) != (size, resize):
            raise UserError(
                f"{folder}: holds images of {self.size} pixels ({self.resize}), the run needs {size} ({resize});"
                f" build another cache: pspg-engine prepare cache --image_size {size} --resize {resize}"
            )
        self.check_depth(folder, bit_depth)

    def check_depth(self, folder: Path, bit_depth: int | None) -> None:
        """
        Raises:
            UserError: the images were read with another bit_depth.
        """
        if self.bit_depth != bit_depth:
            raise UserError(
                f"{folder}: holds images read with bit_depth {_said(self.bit_depth)}, asked for is {_said(bit_depth)};"
                " build another cache, or set bit_depth so"
            )

    @classmethod
    def read(cls, folder: Path) -> Header:
        """
        Raises:
            UserError: no cache there, or one of another version.
        """
        path = folder / "cache.json"
        if not path.exists():
            raise UserError(f"{folder}: holds no cache; make it with pspg-engine prepare cache")
        try:
            document = parse_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: is not the header of a pixel cache ({error}); build it in a new folder") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UserError(f"{path}: is not the header of a pixel cache; build it in a new folder")
        if document.get("version") != VERSION:
            found = printable(str(document.get("version"))[:20])
            raise UserError(f"{path}: of version {found}, not {VERSION}; build the cache in a new folder")
        try:
            header = as_schema(cls, document)
            if len({shard.number for shard in header.shards}) < len(header.shards):
                raise ValueError("two shards have one number")
        except ValueError as error:
            raise UserError(f"{path}: is not the header of a pixel cache ({error}); build it in a new folder") from None
        return header


def _said(bit_depth: int | None) -> str:
    return "unset" if bit_depth is None else str(bit_depth)
