"""The best share of many scores, exactly, from a file that need not fit into memory.

The threshold is found by counting: each pass over the scores settles a further 11, 11 and 10 bits of the score that
stands at the border, with 2048 counters for each domain. Nothing is sorted, nothing is estimated. Of equal scores at
the border a hash of the document's number in the corpus decides, in three more passes of the same kind, so the choice
does not depend on shards, machines or their order, and prefers no part of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from salience.core.budget import check_keep, count

_DIGITS = (11, 11, 10)  # bits of a float32, from the top, then of a hash as long
_BITS = 64
_CHUNK = 1 << 20  # scores looked at together


def keep_top(
    scores: np.ndarray,
    keep: float | int,
    *,
    domains: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Which documents are among the best of their domain.

    Args:
        scores (np.ndarray): [N] float32, may be memory-mapped; NaN cannot be ranked and is never kept.
        keep (float | int): share of the ranked documents of each domain, rounded up, or a count for each.
        domains (np.ndarray | None): [N] integers >= 0; None is one domain.
        out (np.ndarray | None): [N] bool or uint8 to write to, may be memory-mapped.

    Returns:
        np.ndarray: [N], `out` if it was given: nonzero where kept.
    """
    check_keep(keep)
    kept = np.zeros(len(scores), bool) if out is None else out
    number = 1 + max((int(part.max()) for part in _parts(domains) if len(part)), default=0)
    ranked = np.zeros(number, np.int64)
    for _, groups, valid in _keys(scores, domains):
        ranked += np.bincount(groups[valid], minlength=number)
    wanted = np.array([count(keep, int(total)) for total in ranked], np.int64)
    border, left = _border(scores, domains, wanted)
    start = 0
    for keys, groups, valid in _keys(scores, domains):
        chosen = valid & (keys > border[groups]) & (wanted[groups] > 0)
        tied = np.flatnonzero(valid & (keys == border[groups]) & (wanted[groups] > 0))
        # the first of each domain at its border, as many as are left for it
        for group in np.unique(groups[tied]):
            first = tied[groups[tied] == group][: left[group]]
            chosen[first] = True
            left[group] -= len(first)
        kept[start : start + len(keys)] = chosen
        start += len(keys)
    return kept


def threshold(scores: np.ndarray, kept: np.ndarray) -> float:
    """The lowest score that was kept; NaN if nothing was."""
    lowest = np.inf
    for start in range(0, len(scores), _CHUNK):
        part = np.asarray(scores[start : start + _CHUNK])[
            np.asarray(kept[start : start + _CHUNK]).astype(bool)
        ]
        lowest = min(lowest, float(part.min())) if len(part) else lowest
    return lowest if np.isfinite(lowest) else float("nan")


def lots(numbers: np.ndarray) -> np.ndarray:
    """32 bits of each number, mixed (the finisher of SplitMix64), as uint64: of equal scores the highest wins."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ mixed >> np.uint64(31)) >> np.uint64(32)


def _border(
    scores: np.ndarray, domains: np.ndarray | None, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each domain the key at its border [D], and how many with exactly this key are kept [D]."""
    border, left = np.zeros(len(wanted), np.uint64), wanted.copy()
    settled = 0
    for bits in (*_DIGITS, *_DIGITS):
        settled += bits
        counts = np.zeros((len(wanted), 1 << bits), np.int64)
        for keys, groups, valid in _keys(scores, domains):
            # those that agree with the border so far
            same = (
                valid & ((keys ^ border[groups]) >> np.uint64(_BITS - settled + bits) == 0)
                if (settled > bits)
                else valid
            )
            digit = (keys[same] >> np.uint64(_BITS - settled)) & np.uint64((1 << bits) - 1)
            place = groups[same] * (1 << bits) + digit.astype(np.int64)
            counts += np.bincount(place, minlength=counts.size).reshape(counts.shape)
        above = counts[:, ::-1].cumsum(1)[:, ::-1]  # with this digit or a higher one
        for group in range(len(wanted)):
            if wanted[group]:
                digit = int(np.flatnonzero(above[group] >= left[group])[-1])
                left[group] -= above[group, digit + 1] if digit + 1 < 1 << bits else 0
                border[group] |= np.uint64(digit << (_BITS - settled))
    return border, left


def _keys(
    scores: np.ndarray, domains: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """In chunks: whole numbers that sort as scores and lots do, domains, and which scores are numbers."""
    for start in range(0, len(scores), _CHUNK):
        # the sum turns -0.0 into 0.0, which equals it
        values = np.asarray(scores[start : start + _CHUNK], np.float32) + np.float32(0.0)
        bits = values.view(np.uint32)
        ranks = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
        keys = ranks.astype(np.uint64) << np.uint64(32) | lots(np.arange(start, start + len(values)))
        groups = (
            np.zeros(len(keys), np.int64)
            if domains is None
            else np.asarray(domains[start : start + _CHUNK], np.int64)
        )
        yield keys, groups, ~np.isnan(values)


def _parts(values: np.ndarray | None) -> Iterator[np.ndarray]:
    for start in range(0, 0 if values is None else len(values), _CHUNK):
        yield np.asarray(values[start : start + _CHUNK])  # type: ignore[index]
