"""Where chunks of keys begin: what a border is in a dense pass, the predictor that finds it, and their choice.

A gap after token t is a border if later queries treat the w tokens on its left otherwise than the w on its right:
with A the attention averaged over heads, `past = sum_{r >= t+w} sum_{j = t-w+1..t} A_rj`, future the same over
t+1..t+w, and `ratio = (max + e) / (min + e)`. The predictor sees only the 2 w keys around the gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.core.errors import ParameterError, require
from salience.core.files import write_bytes_atomic

_EPSILON = 1e-6
# logits of gaps without a whole window on both sides
_NEVER = -100.0
# gaps whose windows are laid out at a time
_GAPS = 512
# attention held at a time, in elements
_ELEMENTS = 1 << 22
_FORMAT = "salience dhsa boundary predictor"


@torch.no_grad()
def mass_ratio(query: Tensor, key: Tensor, *, window: int = 4, scaling: float | None = None) -> Tensor:
    """How differently later queries attend to the two sides of each gap, in slices of rows.

    Args:
        query (Tensor): [B, H, L, D].
        key (Tensor): [B, Hkv, L, D].
        window (int): w tokens on each side.
        scaling (float | None): of the logits; None is D^-0.5.

    Returns:
        Tensor: [B, L] float64, at t the ratio of the gap after token t, >= 1; 0 unless 2 w - 1 <= t < L - 2 w.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    precise = torch.promote_types(query.dtype, torch.float32)
    past, future = (torch.zeros(batch, length, dtype=torch.float64, device=query.device) for _ in "pf")
    step = max(1, _ELEMENTS // max(1, batch * heads * length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        rows = query[:, :, start:stop].to(precise).reshape(batch, groups, -1, width)
        logits = (rows @ key[:, :, :stop].to(precise).transpose(-1, -2)) * scaling
        logits = logits.view(batch, heads, stop - start, stop)
        place = torch.arange(start, stop, device=query.device).unsqueeze(-1)
        later = torch.arange(stop, device=query.device) > place
        mass = logits.masked_fill_(later, -torch.inf).softmax(-1).mean(1).double()
        total = F.pad(mass.cumsum(-1), (1, 0))
        sums = total[..., window:] - total[..., :-window]  # [B, R, e], of the w tokens that begin at e
        # the gap after t has its past at t - w + 1 and its future at t + 1, and counts from row t + w on
        gaps = sums.shape[-1] - window
        if gaps > 0:
            at = torch.arange(window - 1, window - 1 + gaps, device=query.device)
            counts = (at <= place - window).double()
            past[:, at] += torch.einsum("brg,rg->bg", sums[..., :gaps], counts)
            future[:, at] += torch.einsum("brg,rg->bg", sums[..., window:], counts)
    ratio = (torch.maximum(past, future) + _EPSILON) / (torch.minimum(past, future) + _EPSILON)
    return ratio * defined(length, window, device=query.device)


def defined(length: int, window: int, *, device: torch.device | str | None = None) -> Tensor:
    """[L] bool: gaps far enough from both ends to have a label, 2 w - 1 <= t < L - 2 w."""
    place = torch.arange(length, device=device)
    return (place >= 2 * window - 1) & (place < length - 2 * window)


def soft_label(ratio: Tensor, *, alpha: float = 2.0, beta: float | None = None) -> Tensor:
    """`sigmoid(alpha (ln(ratio + 1e-6) - beta))` with beta = ln(2 + 1e-6): .5 at a ratio of 2."""
    middle = torch.tensor(2.0 + _EPSILON).log().item() if beta is None else beta
    return torch.sigmoid(alpha * (torch.log(ratio + _EPSILON) - middle))


def focal_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, *, pos_weight: float = 1.3, gamma: float = 2.0
) -> Tensor:
    """`mean over valid of (1 - p_t)^gamma BCE(logit, y; pos_weight)`, p_t = p y + (1 - p)(1 - y).

    Args:
        logits (Tensor): [B, L].
        targets (Tensor): [B, L] in [0, 1].
        mask (Tensor): [B, L] bool, the gaps that count.
        pos_weight (float): of borders.
        gamma (float): how much easy gaps are discounted.

    Returns:
        Tensor: [], 0 if nothing counts.
    """
    targets = targets.to(logits.dtype)
    weight = torch.tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    chance = torch.sigmoid(logits)
    right = chance * targets + (1 - chance) * (1 - targets)
    loss = ((1 - right) ** gamma * loss).masked_fill(~mask, 0.0)
    return loss.sum() / mask.sum().clamp_min(1)


class BoundaryPredictor(nn.Module):
    """Says from the 2 w keys around each gap whether a chunk ends there.

    Window attention, layer norm without residual, the means a and b of the two sides, then an MLP of
    [a, b, |a - b|, a b, cos(a, b)]. Keys are projected once each and meet within windows; windows that reach over
    an end of the sequence are filled with zeros.

    Args:
        channels (int): C, all key heads of a layer side by side.
        hidden (int): width of the MLP.
        heads (int): of the window attention, a divisor of C.
        window (int): w.

    Attributes:
        losses (list[float]): of each step of its training.
    """

    def __init__(self, channels: int, *, hidden: int = 256, heads: int = 4, window: int = 4) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("hidden", hidden), ("heads", heads), ("window", window)):
            require(value >= 1, name, ">= 1", value)
        require(channels % heads == 0, "heads", f"a divisor of the keys' {channels} channels", heads)
        self.channels, self.hidden, self.heads, self.window = channels, hidden, heads, window
        # the names of the official weights
        self.enc = nn.ModuleDict(
            {"mha": nn.MultiheadAttention(channels, heads, batch_first=True), "norm": nn.LayerNorm(channels)}
        )
        self.losses: list[float] = []
        self.mlp = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the gap after each token, [B, L], of features [B, L, C]; the first w - 1 and last w are -100."""
        length = features.shape[1]
        parts = [logits for _, _, logits in self.slices(features)]
        logits = torch.cat(parts, 1) if parts else features.new_zeros(features.shape[:2])
        place = torch.arange(length, device=features.device)
        whole = (place >= self.window - 1) & (place < length - self.window)
        return logits.masked_fill(~whole, _NEVER)

    def slices(self, features: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, logits [B, stop - start]) of slices of gaps, so that not all windows are held at once."""
        span = 2 * self.window
        padded = F.pad(features.to(next(self.parameters()).dtype), (0, 0, self.window - 1, self.window))
        for start in range(0, features.shape[1], _GAPS):
            stop = min(start + _GAPS, features.shape[1])
            rows = [self._logits(row) for row in padded[:, start : stop + span - 1]]
            yield start, stop, torch.stack(rows)

    def _logits(self, keys: Tensor) -> Tensor:
        """[G] of keys [G + 2 w - 1, C]."""
        attention: Any = self.enc["mha"]
        norm: Any = self.enc["norm"]
        window, span, heads = self.window, 2 * self.window, self.heads
        projected = F.linear(keys, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.view(len(keys), 3, heads, -1).unbind(1)  # [T, h, d]
        weights = self._window_attention(query * query.shape[-1] ** -0.5, key)  # [G, i, j, h]
        # what a head writes of a key is computed once for each key, not once for each window that it is in
        written = attention.out_proj.weight.view(self.channels, heads, -1).permute(1, 2, 0)
        written = (value.transpose(0, 1) @ written).transpose(0, 1).flatten(0, 1)  # [T h, C]
        windows = written.unfold(0, span * heads, heads).transpose(1, 2)  # [G, j h, C]
        mixed = weights.flatten(2) @ windows + attention.out_proj.bias
        encoded = F.layer_norm(mixed, (self.channels,), eps=norm.eps)
        left, right = (
            side.mean(1) * norm.weight + norm.bias for side in (encoded[:, :window], encoded[:, window:])
        )
        alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6).unsqueeze(-1)
        made: Tensor = self.mlp(torch.cat((left, right, (left - right).abs(), left * right, alike), -1))
        return made.squeeze(-1)

    def _window_attention(self, query: Tensor, key: Tensor) -> Tensor:
        """[G, i, j, h]: what token i of each window of 2 w attends to, of [G + 2 w - 1, h, d]."""
        span = 2 * self.window
        around = F.pad(key, (0, 0, 0, 0, span - 1, span - 1))
        apart = [(query * around[step : step + len(query)]).sum(-1) for step in range(2 * span - 1)]
        band = torch.stack(apart, -1).unfold(0, span, 1)  # [G, h, 2 span - 1, i]
        place = torch.arange(span, device=key.device)
        logits = band[:, :, place.unsqueeze(1) - place + span - 1, place]  # [G, h, j, i]
        return logits.softmax(2).permute(0, 3, 2, 1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with its sizes in the metadata.

        Raises:
            FileError: if it cannot be written.
        """
        from safetensors.torch import save

        sizes = {name: getattr(self, name) for name in ("channels", "hidden", "heads", "window")}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = {"format": _FORMAT, "sizes": json.dumps(sizes)}
        write_bytes_atomic(path, save(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> BoundaryPredictor:
        """Read what `save` wrote.

        Raises:
            ParameterError: if the file is missing, unreadable or of something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ParameterError(
                f"predictor must be a file that train_dhsa wrote, got {path}: {error}"
            ) from error
        wanted = "a file that train_dhsa wrote"
        require(metadata.get("format") == _FORMAT, "predictor", wanted, str(path))
        # without drawing weights: the global random state stays where it is
        with torch.device("meta"):
            made = BoundaryPredictor(**json.loads(metadata["sizes"]))
        shapes = {name: list(value.shape) for name, value in made.state_dict().items()}
        found = {name: list(value.shape) for name, value in tensors.items()}
        require(found == shapes, "predictor", "of the sizes that it states", str(path))
        made.load_state_dict(tensors, assign=True)
        return made.eval().requires_grad_(False)


def features_of(key: Tensor) -> Tensor:
    """[B, L, Hkv D] of keys [B, Hkv, L, D], heads side by side, at least fp32."""
    flat = key.transpose(1, 2).flatten(2)
    return flat.to(torch.promote_types(key.dtype, torch.float32))


def select_boundaries(
    scores: Tensor, *, threshold: float, chunks: int, nms: int = 8, instruction_tokens: int = 0
) -> Tensor:
    """Where chunks begin and end: the highest scores above a threshold that lie apart.

    In falling order of score, a gap is taken if no taken one lies within `nms` tokens. The gap after token
    L - instruction_tokens is taken beforehand and nothing behind it is. Of equal scores the left goes first.

    Args:
        scores (Tensor): [L], of the gap after each token.
        threshold (float): gaps are borders above it.
        chunks (int): at most so many gaps, the one taken beforehand among them.
        nms (int): tokens, >= 0.
        instruction_tokens (int): at the end; 0 takes no gap beforehand.

    Returns:
        Tensor: [C + 1] int64, rising from 0 to L; only 0 and L if no score is above the threshold.
    """
    length = len(scores)
    (above,) = (scores > threshold).nonzero(as_tuple=True)
    order = above[scores[above].argsort(descending=True, stable=True)].tolist()
    last = length - instruction_tokens if 0 < instruction_tokens <= length else length
    # gaps within reach of a taken one
    near = bytearray(length)
    taken: list[int] = []

    def take(gap: int) -> None:
        taken.append(gap)
        low, high = max(0, gap - nms), min(length, gap + nms + 1)
        near[low:high] = b"\1" * (high - low)

    if order and last < length:
        take(last)
    for gap in order:
        if len(taken) >= chunks:
            break
        if gap < last and not near[gap]:
            take(gap)
    starts = sorted({0, *(gap + 1 for gap in taken), length})
    return torch.tensor(starts, dtype=torch.int64, device=scores.device)


def uniform_boundaries(length: int, chunk: int, *, device: torch.device | str | None = None) -> Tensor:
    """[C + 1] int64: chunks of so many tokens, the last one of what is left."""
    starts = torch.arange(0, length, chunk, device=device)
    return torch.cat((starts, starts.new_tensor([length])))


def stacked(rows: list[Tensor], length: int) -> Tensor:
    """[B, C + 1]: rows with fewer chunks are filled up with empty chunks at the end."""
    most = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, most - len(row)), value=length) for row in rows])
