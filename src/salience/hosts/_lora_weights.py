"""A LoRA adapter on its base, read like the checkpoint that it merges to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from salience.core.errors import ParameterError
from salience.hosts._streaming import Stored, Weights, read_json


class LoRA:
    """A LoRA adapter on its base, read like the checkpoint that it merges to: rows of `base + scale B A`, in fp32.

    Args:
        folder (Path): of peft, with adapter_config.json and adapter_model.safetensors.
        base (Weights): the base.
    """

    def __init__(self, folder: Path, base: Weights) -> None:
        config = read_json(folder / "adapter_config.json", "tuned")
        _refuse_other_adapters(config, folder)
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise ParameterError(f"tuned must be an adapter with {path.name}, got {folder} without it")
        self._base, self._adapter = base, Weights([path], "tuned")
        self.paths = (path,)
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._scale = lambda r: config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
        self._pairs: dict[str, tuple[str, str]] = {}
        self._instead: dict[str, str] = {}
        for key in self._adapter.entries:
            plain = key.removeprefix("base_model.model.")
            if plain.endswith(".lora_A.weight"):
                name = self._named(plain.removesuffix(".lora_A.weight") + ".weight", key)
                self._pairs[name] = (key, key.replace(".lora_A.", ".lora_B."))
            elif not plain.endswith(".lora_B.weight"):
                if "lora_" in plain:
                    raise ParameterError(f"tuned must be LoRA on linear layers, got {key} in {folder}")
                self._instead[self._named(plain, key)] = key
        self.entries = dict(base.entries)
        for name, (down, up) in self._pairs.items():
            self.entries[name] = self._merged_entry(name, down, up)
        for name, key in self._instead.items():
            self.entries[name] = self._adapter.entries[key]
        self._held: tuple[str, Tensor, Tensor] | None = None

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """As of `Weights`."""
        if key in self._instead:
            return self._adapter.rows(self._instead[key], start, stop)
        rows = self._base.rows(key, start, stop)
        if key not in self._pairs:
            return rows
        if self._held is None or self._held[0] != key:
            down, up = (self._adapter.whole(part).float() for part in self._pairs[key])
            self._held = (key, up * self._scale(down.shape[0]), down)
        _, up, down = self._held
        change = down.T[start:stop] @ up.T if self._transposed else up[start:stop] @ down
        return rows.float() + change

    def close(self) -> None:
        self._adapter.close()

    def _named(self, wanted: str, key: str) -> str:
        """The base's name of a tensor; one of the two may have the prefix of a model with a head."""
        names = self._base.entries
        if wanted in names:
            return wanted
        fits = [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        if len(fits) != 1:
            raise ParameterError(
                f"tuned must be an adapter of the base, got {key}, which is {len(fits)} tensors of it"
            )
        return fits[0]

    def _merged_entry(self, name: str, down: str, up: str) -> Stored:
        if up not in self._adapter.entries:
            raise ParameterError(f"tuned must have both halves of each LoRA pair, got {down} without {up}")
        A, B, stored = (
            self._adapter.entries[down].shape,
            self._adapter.entries[up].shape,
            self._base.entries[name],
        )
        made = (A[-1], B[0]) if self._transposed else (B[0], A[-1])
        if made != stored.shape:
            raise ParameterError(
                f"tuned must fit the base, got an update {list(made)} for {name} of shape {list(stored.shape)}"
            )
        return Stored(stored.path, stored.offset, "F32", stored.shape)


def _refuse_other_adapters(config: dict[str, Any], folder: Path) -> None:
    for refused, got in (
        (config.get("peft_type") != "LORA", f"peft_type {config.get('peft_type')}"),
        (bool(config.get("use_dora")), "DoRA"),
        (bool(config.get("alpha_pattern")), "an alpha_pattern"),
        (config.get("bias", "none") != "none" or bool(config.get("lora_bias")), "biases"),
        (bool(config.get("layer_replication")), "replicated layers"),
    ):
        if refused:
            raise ParameterError(f"tuned must be a checkpoint or a plain LoRA adapter, got {got} in {folder}")
