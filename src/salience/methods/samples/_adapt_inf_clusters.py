"""Pseudo-skills: clusters of unit vectors by scikit-learn's mini-batch k-means, from a file that is mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from salience.core.errors import SalienceError

_BATCH = 10240  # vectors that k-means reads at a time
_EPOCHS = 10
_JUDGED = 2000  # samples that a number of clusters is judged by
_LARGEST = 50_000  # of a group in which everything is compared with everything


def cluster(
    vectors: np.ndarray, counts: int | Sequence[int], seed: int, *, valid: np.ndarray | None = None
) -> np.ndarray:
    """Labels of vectors; those that are 0, which no gradient describes, form the last cluster of their own.

    Args:
        vectors (np.ndarray): [n, d] of length 1 or 0, any float dtype; may be memory-mapped.
        counts (int | Sequence[int]): k, or several to take the one with the best silhouette from; at most n.
        seed (int): of starting points and order.
        valid (np.ndarray | None): [n] bool, those that take part; None: all.

    Returns:
        np.ndarray: labels [n] int64, from 0 without gaps; -1 for those that take no part.
    """
    valid = np.ones(len(vectors), bool) if valid is None else valid
    directed = np.array([bool(part.any()) for part in vectors], bool)
    known, unknown = np.flatnonzero(directed & valid), ~directed & valid
    labels = np.full(len(vectors), -1, np.int64)
    tried = [min(k, len(known)) for k in ([counts] if isinstance(counts, int) else counts)]
    clusters = 0
    if len(known):
        found = [_labels(vectors, known, k, seed) for k in dict.fromkeys(tried)]
        labels[known] = (
            found[0] if len(found) == 1 else max(found, key=lambda one: _sharpness(vectors, known, one, seed))
        )
        # numbered without gaps: k-means may leave a cluster empty
        labels[known] = np.unique(labels[known], return_inverse=True)[1]
        clusters = int(labels[known].max()) + 1
    labels[unknown] = clusters
    return labels


def groups(vectors: np.ndarray, labels: np.ndarray, seed: int, largest: int = _LARGEST) -> np.ndarray:
    """Clusters cut into groups of about `largest` at most, in which duplicates are looked for; [n] int64.

    Vectors that are alike fall into one group, so that little is missed, and the work stays below n x largest.
    """
    found, number = np.full(len(labels), -1, np.int64), 0
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        parts = -(-len(members) // largest)
        own = np.zeros(len(members), np.int64) if parts == 1 else _labels(vectors, members, parts, seed)
        found[members] = own + number
        number += parts
    return found


def _labels(vectors: np.ndarray, members: np.ndarray, k: int, seed: int) -> np.ndarray:
    means = _library("cluster").MiniBatchKMeans(n_clusters=k, batch_size=_BATCH, random_state=seed, n_init=3)
    if len(members) <= 2 * _BATCH:
        means.fit(vectors[members].astype(np.float32))
    else:
        draw = np.random.default_rng(seed)
        for _ in range(_EPOCHS):
            # in rising order inside a batch, for the disk's sake; a last batch of few could not start k clusters
            for batch in np.array_split(draw.permutation(members), len(members) // _BATCH):
                means.partial_fit(vectors[np.sort(batch)].astype(np.float32))
    found = np.zeros(len(members), np.int64)
    for start in range(0, len(members), _BATCH):
        part = members[start : start + _BATCH]
        found[start : start + len(part)] = means.predict(vectors[part].astype(np.float32))
    return found


def _sharpness(vectors: np.ndarray, members: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """The silhouette of some of the samples; -1 where there are too few clusters or samples to tell."""
    draw = np.random.default_rng(seed)
    some = np.sort(draw.permutation(len(members))[:_JUDGED])
    if not 1 < len(np.unique(labels[some])) < len(some):
        return -1.0
    score = _library("metrics").silhouette_score
    return float(score(vectors[members[some]].astype(np.float32), labels[some]))


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise SalienceError(
            "AdaptInf finds its clusters with scikit-learn, which is not installed: pip install 'salience[cluster]'"
        ) from error
