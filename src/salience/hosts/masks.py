"""What an attention mask of transformers says in few words: which rows of which length, or that it says more.

For plain causal attention transformers may build a map of all queries and keys, T x T, of which a kernel that takes
lists of keys needs two numbers a row: where its tokens begin and where they end. While a decoder runs, `light` puts a
function in the table of mask builders that keeps the mask of padding as it came, and nothing in it between two
forward passes. `stretches` reads either form back.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError

# rows of a map of queries and keys that are compared at a time
_ROWS = 1024


@dataclass(frozen=True)
class Stretch:
    """Samples whose tokens stand at the same places: keys `begin` to `end`, and the queries among them.

    Attributes:
        sample (int | None): number of the sample; None stands for the whole batch.
        rows (slice): its queries among all Q.
        keys (slice): its keys among all K.
    """

    sample: int | None
    rows: slice
    keys: slice

    @property
    def samples(self) -> slice:
        return slice(None) if self.sample is None else slice(self.sample, self.sample + 1)


class LightMasks:
    """The entry of transformers' table of mask builders for one name, while `with` lasts."""

    def __init__(self, name: str) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        self._table: MutableMapping[str, Any] = ALL_MASK_ATTENTION_FUNCTIONS
        self._name = name

    def __enter__(self) -> LightMasks:
        local = self._table._local_mapping  # type: ignore[attr-defined]
        self._before = local.get(self._name)
        self._table[self._name] = _light
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del self._table[self._name]
        else:
            self._table[self._name] = self._before


def stretches(mask: Tensor | None, queries: int, keys: int, window: int | None) -> list[Stretch]:
    """Where the tokens of each sample are, from a layer's mask.

    Args:
        mask (Tensor | None): None (all are tokens), [B, K'] that is True or 1 at tokens, K' <= K where a cache is
            longer than what it holds, or the whole map [B, 1, Q, K], bool or additive.
        queries (int): Q; row r stands at the key that is Q - r places before the last.
        keys (int): K.
        window (int | None): of the layer's sliding window.

    Returns:
        list[Stretch]: one for the whole batch without padding, else one for each sample that has tokens.

    Raises:
        StructureError: if tokens of a sample do not stand side by side, or the map is not that of causal attention.
    """
    if mask is None:
        return [Stretch(None, slice(0, queries), slice(0, keys))]
    if mask.dim() == 4:
        present, used = _read_map(mask, queries, window)
    elif mask.dim() == 2:
        used = min(mask.shape[1], keys)
        present = mask[:, -used:].bool()
    else:
        raise StructureError(f"attention mask must be [B, K] or [B, 1, Q, K], got {list(mask.shape)}")
    # padding is looked at once a layer, for all samples together
    counts = present.sum(-1)
    first = present.int().argmax(-1)
    last = used - present.flip(-1).int().argmax(-1)
    rows = torch.stack((counts, first, last), -1).tolist()
    if all(count == used for count, _, _ in rows):
        return [Stretch(None, slice(0, queries), slice(0, used))]
    found = []
    for sample, (count, begin, end) in enumerate(rows):
        if not count:
            continue
        if end - begin != count:
            raise StructureError(f"tokens of a sample must stand side by side, got gaps in sample {sample}")
        offset = used - queries
        found.append(Stretch(sample, slice(max(0, begin - offset), max(0, end - offset)), slice(begin, end)))
    return found


def given_padding(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The [B, K] mask that a decoder was called with, None if there is none or nothing is padded."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def _light(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = None,
    **_: Any,
) -> Tensor | None:
    """In the place of a mask builder: the mask of padding; None where there is none."""
    # a single query sees the whole past, whatever was asked for
    if not allow_is_causal_skip and q_length > 1:
        raise StructureError(
            "attention must be plain causal or sliding for chosen key blocks, got packed sequences, blocks that see "
            "both ways, or a mask function of the model's own"
        )
    used = kv_length if kv_offset else min(kv_length, int(q_offset) + q_length)
    if attention_mask is None:
        if used == kv_length:
            return None
        # the cache is longer than what it holds
        return torch.ones(batch_size, used, dtype=torch.bool, device=device)
    present = attention_mask[:, -kv_length:][:, :used].bool()
    return None if used == kv_length and bool(present.all()) else present


def _read_map(mask: Tensor, queries: int, window: int | None) -> tuple[Tensor, int]:
    """Padding [B, used] and the keys used, from a map that has to be causal or sliding."""
    seen = mask if mask.dtype == torch.bool else mask == 0
    if seen.shape[1] != 1:
        seen = seen[:, :1] if bool((seen == seen[:, :1]).all()) else seen
    if seen.shape[1] != 1:
        raise StructureError("attention mask must be the same for all heads, got one for each")
    seen = seen[:, 0]
    newest = seen[:, -1].int()
    used = seen.shape[2] - int(newest.flip(-1).argmax(-1).min())
    places = torch.arange(used, device=seen.device)
    offset = used - queries
    # a sliding row does not see all tokens before it: every key is a token that its own row sees
    present = seen[:, :, :used].any(1)
    for start in range(0, queries, _ROWS):
        stop = min(start + _ROWS, queries)
        at = torch.arange(offset + start, offset + stop, device=seen.device).unsqueeze(-1)
        plain = places <= at
        if window is not None:
            plain = plain & (places > at - window)
        wanted = plain & present.unsqueeze(1)
        # rows of padding may hold anything
        real = present.gather(1, at.view(1, -1).clamp_min(0).expand(len(present), -1))
        if not torch.equal(wanted & real.unsqueeze(-1), seen[:, start:stop, :used] & real.unsqueeze(-1)):
            raise StructureError(
                "attention mask must be that of causal or sliding attention with padding, got another map"
            )
    return present, used
