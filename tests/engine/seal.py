"""Checksums anew, after a test has changed a file on purpose: what it tests lies behind them."""

from __future__ import annotations

import json
from pathlib import Path

from pspg.engine.checkpoints.integrity import digest_of, sha256_of


def seal(folder: Path) -> None:
    """Write the present checksums of a folder's files into the JSON that keeps them."""
    for name in ("state.json", "model.json", "open_clip_config.json"):
        file = folder / name
        if file.is_file():
            document = json.loads(file.read_text())
            document["files"] = {name: sha256_of(folder / name) for name in document["files"]}
            if "sha256" in document:
                document["sha256"] = digest_of(document)
            file.write_text(json.dumps(document))
