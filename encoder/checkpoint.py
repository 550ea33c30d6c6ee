"""Local folders and Hub repositories: the config of a model, and the tensors of its tower alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .families import Family, family_of_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


class CheckpointError(ValueError):
    """A model that cannot be found or read; the message names it and the way out."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk or on the Hub, of which only what is asked for is fetched.

    Attributes:
        name: What the caller asked for.
        folder: Folder that holds config.json.
        revision: Commit on the Hub; None for a local folder.
    """

    name: str
    folder: Path
    revision: str | None
    fetch: Callable[[str], Path | None]

    @classmethod
    def open(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Checkpoint":
        """Find a model; its preprocessor settings come along where they exist.

        Raises:
            CheckpointError: no such folder or repository, no config.json, or no way to the Hub.
        """
        path = Path(path_or_id).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise CheckpointError(
                    f"{path}: no config.json in this folder; give a folder written by "
                    "`save_pretrained`"
                )

            def local(name: str) -> Path | None:
                return path / name if (path / name).is_file() else None

            return cls(str(path_or_id), path, None, local)

        is_offline = local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE

        def download(name: str, commit: str | None = None) -> Path | None:
            try:
                return Path(
                    huggingface_hub.hf_hub_download(
                        str(path_or_id), name, revision=commit or revision, token=token,
                        cache_dir=cache_dir, local_files_only=local_files_only,
                    )
                )  # fmt: skip
            except LocalEntryNotFoundError as error:
                if is_offline:
                    return None  # nothing says whether the file exists
                raise CheckpointError(
                    f"{path_or_id}: not a folder here, and {name} could not be fetched from the "
                    f"Hub ({error}); check the name and the connection, or set HF_HUB_OFFLINE=1 "
                    "to use what the cache holds"
                ) from error
            except EntryNotFoundError:
                return None
            except HFValidationError as error:
                raise CheckpointError(
                    f"{path_or_id}: neither an existing folder nor a Hub id of the form owner/name"
                ) from error
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path_or_id}: {name}: the Hub refused: {error}") from error

        config = download("config.json")
        if config is None:
            raise CheckpointError(
                f"{path_or_id}: not an existing folder, and config.json of this Hub id is neither "
                "in the local cache nor could it be fetched; check the name, the connection and "
                "HF_HUB_OFFLINE"
            )
        # one commit for all files, also if the branch moves meanwhile
        commit = config.parent.name
        for name in CONFIGS:
            download(name, commit)
        return cls(str(path_or_id), config.parent, commit, lambda name: download(name, commit))

    def raw_config(self) -> dict[str, Any]:
        """config.json as it is.

        Raises:
            CheckpointError: it, or a config of a tower in it, is no JSON object.
        """
        path = self.folder / "config.json"
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not a JSON object: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: not a JSON object but a {type(raw).__name__}")
        for key in ("vision_config", "text_config"):
            if not isinstance(raw.get(key) or {}, dict):
                raise CheckpointError(
                    f"{path}: {key} is a {type(raw[key]).__name__}, not a JSON object"
                )
        return raw

    def family_and_config(self) -> tuple[Family, Any]:
        """The tower's family and its vision config.

        Raises:
            CheckpointError: config.json cannot be read.
            ValueError: the model has no supported tower.
        """
        from transformers import AutoConfig

        raw = self.raw_config()
        family, inner = family_of_model(raw)
        if family.read_config is not None:
            return family, family.read_config(raw)
        config = AutoConfig.from_pretrained(self.folder)
        for name in inner:
            config = getattr(config, name)
        return family, config.vision_config

    def tower_tensors(self, family: Family, device: torch.device) -> dict[str, torch.Tensor]:
        """The tower's tensors on `device`, by Hugging Face's names without the tower's prefix.

        Raises:
            CheckpointError: no safetensors file, a missing or corrupt shard, or no tower inside.
        """
        return self.named_tensors(family.tower_key, family.prefixes, device)

    def named_tensors(
        self,
        tower_key: Callable[[str], str | None],
        prefixes: Sequence[str],
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        """The tensors on `device` for which `tower_key` gives a name, by that name.

        Only shards that hold such tensors are opened (and fetched), and only those tensors are
        read.

        Args:
            tower_key: A tensor's name to the one wanted, None for tensors that are not.
            prefixes: How the wanted ones begin, for messages.
            device: Where to.

        Raises:
            CheckpointError: no safetensors file, a missing or corrupt shard, or no such tensor.
        """
        tensors = {}
        for shard in self._shards(tower_key):
            path = self.fetch(shard)
            if path is None:
                raise CheckpointError(
                    f"{self.name}: {shard} is missing; download the checkpoint again"
                )
            try:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        if (name := tower_key(key)) is not None:
                            tensors[name] = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file ({error}); download it again"
                ) from error
        if not tensors:
            raise CheckpointError(
                f"{self.name}: no tensor named {'* or '.join(prefixes)}*; this checkpoint "
                "holds no vision tower"
            )
        return tensors

    def _shards(self, tower_key: Callable[[str], str | None]) -> list[str]:
        if (index := self.fetch(INDEX)) is not None:
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from error
            return sorted({s for key, s in weight_map.items() if tower_key(key) is not None})
        if self.fetch(SINGLE) is not None:
            return [SINGLE]
        raise CheckpointError(
            f"{self.name}: neither {SINGLE} nor {INDEX}; convert the checkpoint to safetensors "
            "(`save_pretrained` writes it)"
        )
