"""The exact best share of scores, against sorting, with ties, domains, NaN and files."""

import numpy as np
import pytest

from salience.core import top_share
from salience.core.errors import ParameterError
from salience.core.top_share import keep_top, lots, threshold


def sorted_choice(scores, wanted, numbers=None):
    """Places of the best `wanted`, of equal ones by lot, NaN never."""
    drawn = lots(np.arange(len(scores)) if numbers is None else numbers).astype(np.int64)
    ranked = [place for place in np.lexsort((-drawn, -scores)) if not np.isnan(scores[place])]
    kept = np.zeros(len(scores), bool)
    kept[ranked[:wanted]] = True
    return kept


@pytest.mark.parametrize("keep", [0.2, 1.0, 1, 17, 0.001, 2000])
@pytest.mark.parametrize("kind", ["normal", "ties", "tiny differences", "signs"])
def test_is_what_sorting_gives(kind, keep):
    draw = np.random.default_rng(3)
    scores = draw.normal(size=1003).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "tiny differences":
        scores = (1.0 + 1e-7 * draw.integers(0, 5, 1003)).astype(np.float32)
    elif kind == "signs":
        scores = np.where(scores > 0, np.float32(0.0), np.float32(-0.0))
        scores[::7] = [np.inf, -np.inf, 3e38] * 48
    scores[5::100] = np.nan
    ranked = int((~np.isnan(scores)).sum())
    wanted = min(ranked, keep if isinstance(keep, int) else int(np.ceil(keep * ranked)))
    np.testing.assert_array_equal(keep_top(scores, keep), sorted_choice(scores, wanted))


def test_each_domain_keeps_its_share_and_chunks_change_nothing(monkeypatch):
    draw = np.random.default_rng(4)
    domains = draw.integers(0, 5, 2000).astype(np.uint16)
    scores = np.round(draw.normal(size=2000) + domains, 1).astype(np.float32)
    scores[domains == 3] = np.nan
    whole = keep_top(scores, 0.3, domains=domains)
    for domain in range(5):
        mine = domains == domain
        wanted = 0 if domain == 3 else int(np.ceil(0.3 * mine.sum()))
        np.testing.assert_array_equal(whole[mine], sorted_choice(scores[mine], wanted, np.flatnonzero(mine)))
    monkeypatch.setattr(top_share, "_CHUNK", 37)
    np.testing.assert_array_equal(keep_top(scores, 0.3, domains=domains), whole)


def test_of_equal_scores_no_part_of_the_corpus_is_preferred():
    kept = keep_top(np.zeros(10_000, np.float32), 0.2)
    assert kept.sum() == 2000
    tenths = kept.reshape(10, 1000).sum(1)
    assert tenths.min() > 150 and tenths.max() < 250
    assert len(np.unique(lots(np.arange(10_000)))) == 10_000 and int(lots(np.arange(10_000)).max()) < 1 << 32


def test_mapped_files_are_enough(tmp_path):
    scores = np.memmap(tmp_path / "scores", np.float32, "w+", shape=(500,))
    scores[:] = np.arange(500)[::-1]
    out = np.memmap(tmp_path / "kept", np.uint8, "w+", shape=(500,))
    assert keep_top(scores, 100, out=out) is out
    assert out[:100].all() and not out[100:].any()
    assert threshold(scores, out) == 400.0
    assert np.isnan(threshold(scores, np.zeros(500)))


def test_nothing_and_nothing_ranked():
    assert len(keep_top(np.zeros(0, np.float32), 0.5)) == 0
    assert not keep_top(np.full(3, np.nan, np.float32), 1.0).any()


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(ParameterError, match=r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"):
        keep_top(np.zeros(3, np.float32), 1.5)
