"""Folders on the Hugging Face Hub: fetched as data, in the layout that open_clip and this engine write."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..utils.errors import UserError, first_line
from ..utils.names import HUB

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""names of a folder's weights, the first that is there"""
FETCHED = ("*.json", "*.safetensors", "open_clip_pytorch_model.bin", "config.yaml", "checkpoints/*")


def local_folder(name: str | Path, key: str) -> Path:
    """The folder of a name: `hf-hub:OWNER/NAME`, with `@REVISION` behind it or not, is fetched; else it is a path.

    Weights are fetched and read as data; no code comes with them. What is in the Hub's cache needs no network.

    Args:
        name: folder or name.
        key: setting that names it, for messages.

    Raises:
        UserError: it cannot be fetched.
    """
    text = str(name)
    if not text.startswith(HUB):
        return Path(name)
    repository, _, revision = text.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FETCHED)))
    except HFValidationError:
        raise UserError(f"{key}: {text} is no name on the Hugging Face Hub; write {HUB}OWNER/NAME") from None
    except Exception as error:  # whatever the network or the hub's client raises
        reason = " ".join(first_line(error).split())
        raise UserError(
            f"{key}: cannot fetch {text} from the Hugging Face Hub ({reason}); give a local folder in its layout"
        ) from error


def hub_weights(folder: Path, key: str) -> Path | None:
    """Weights of a CLIP's folder in the Hub's layout; None: it is not one.

    Raises:
        UserError: open_clip_config.json without weights; names the setting `key`.
    """
    if not (folder / CONFIG).is_file():
        return None
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{key}: {folder} has {CONFIG} and none of {', '.join(WEIGHTS)}")
    return found
