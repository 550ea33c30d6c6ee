"""Noticing that a live tower is no longer what an encoder was made from."""

import torch


class TowerContents:
    """What an encoder was made from: the tower's modules and parameters, and their versions.

    Compared on every call in some tens of microseconds for a full tower; `tower.parameters()` would
    take several times that.
    """

    def __init__(self, tower: torch.nn.Module):
        """Take note of `tower` as it is now."""
        modules = list(tower.modules())
        self._children = [(m._modules, n, c) for m in modules for n, c in m._modules.items()]
        slots = [
            (m._parameters, n, p)
            for m in modules
            for n, p in m._parameters.items()
            if p is not None
        ]
        self._slots = slots
        self._parameters = [p for _, _, p in slots]
        # inference tensors have no version counter
        self._versioned = [p for p in self._parameters if not p.is_inference()]
        self._pointers = self._read_pointers()
        self._versions = self._read_versions()

    def change(self) -> str | None:
        """What has happened since: None, "values", "storage" or "modules", the gravest of them."""
        if not all(names.get(n) is c for names, n, c in self._children):
            return "modules"
        if not all(names.get(n) is p for names, n, p in self._slots):
            return "storage"
        if self._pointers != self._read_pointers():
            return "storage"
        return None if self._versions == self._read_versions() else "values"

    def place(self) -> tuple[str, torch.dtype]:
        """Device type and dtype of the first parameter."""
        first = self._parameters[0]
        return first.device.type, first.dtype

    def requires_grad(self) -> bool:
        """True if any parameter does: training one bias needs the whole graph."""
        return any(p.requires_grad for p in self._parameters)

    def _read_pointers(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters]

    def _read_versions(self) -> list[int]:
        return [p._version for p in self._versioned]
