"""Which of a run's checkpoints it goes on from."""

from salience.hosts.resume import MARKER, last_checkpoint


def _checkpoint(folder, step, whole=True):
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    if whole:
        (place / MARKER).write_text("", encoding="utf-8")
    return place


def test_torn_checkpoints_are_removed(tmp_path):
    first = _checkpoint(tmp_path, 9)
    torn = _checkpoint(tmp_path, 10, whole=False)
    assert last_checkpoint(tmp_path, 24) == first
    assert first.is_dir() and not torn.exists()


def test_a_run_that_was_killed_behind_its_last_step_repeats_some_rather_than_taking_one_more(tmp_path):
    before, last = _checkpoint(tmp_path, 20), _checkpoint(tmp_path, 24)
    assert last_checkpoint(tmp_path, 24) == before
    assert not last.exists()
    assert last_checkpoint(tmp_path, 20) is None
    assert last_checkpoint(tmp_path, 20) is None
