"""The arrivals world: what its sets hold, and a base model that has to learn the skills first."""

import pytest

from salience.core.errors import ParameterError
from salience.sandbox.arrivals import accuracy, arrival_world, batch, pictured_arrivals


@pytest.fixture(scope="module")
def world():
    return arrival_world(sets=3, common=3, common_samples=40, rare_samples=10, test_samples=8)


def test_sets_hold_common_skills_and_a_rare_one_of_their_own(world):
    assert len(world.sets) == 3 and len(world.common) == 3 and len(world.rare) == 3
    for number, rows in enumerate(world.sets):
        skills = rows["skill"]
        assert set(skills) - set(world.common) == {world.rare[number]}
        assert list(skills).count(world.rare[number]) == 10 and len(rows) == 2 * 40 + 10
    ids = [name for rows in world.sets for name in rows["id"]]
    assert len(set(ids)) == len(ids)


def test_repetitions_and_wrong_answers_are_marked(world):
    by_id = {row["id"]: row for rows in world.sets for row in rows}
    copies = [row for row in by_id.values() if row["copy_of"]]
    assert 0.15 < len(copies) / len(by_id) < 0.4
    for row in copies:
        assert (
            row["prompt"] == by_id[row["copy_of"]]["prompt"]
            and row["skill"] == by_id[row["copy_of"]]["skill"]
        )
    clean: dict[tuple[str, str], str] = {}
    for row in [*world.test, *(row for row in by_id.values() if not row["wrong"])]:
        for letter, answer in zip(row["prompt"].split()[1:-1], row["completion"].split()):
            assert clean.setdefault((row["skill"], letter), answer) == answer
    wrong = [row for row in by_id.values() if row["wrong"]]
    assert 0.03 < len(wrong) / len(by_id) < 0.2


def test_the_same_arguments_give_the_same_world_and_another_seed_another(world):
    again = arrival_world(sets=3, common=3, common_samples=40, rare_samples=10, test_samples=8)
    other = arrival_world(sets=3, common=3, common_samples=40, rare_samples=10, test_samples=8, seed=1)
    assert [rows.to_list() for rows in again.sets] == [rows.to_list() for rows in world.sets]
    assert other.sets[0].to_list() != world.sets[0].to_list()


def test_the_base_model_knows_the_form_and_not_the_tables(world):
    model, tokenizer = world.model(), world.tokenizer()
    share = accuracy(model, tokenizer, world.test)
    assert set(share) == {*world.common, *world.rare}
    # one letter of sixteen by chance
    assert sum(share.values()) / len(share) < 0.3
    made = batch(tokenizer, world.test[:4])
    assert made["input_ids"].shape == (4, 14) and (made["labels"][:, :8] == -100).all()
    assert (made["labels"][:, 8:] == made["input_ids"][:, 8:]).all()


def test_pictures_arrive_with_their_questions():
    first, second = pictured_arrivals(scenes=4)
    assert set(first["skill"]) == {"colour", "position"} and {"count", "word"} < set(second["skill"])
    copies = [row for row in second if row["copy_of"]]
    assert len(copies) == 2 and first[0]["image"].size == (96, 96)
    assert copies[0]["image"].tobytes() == first[0]["image"].tobytes()


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("sets", 0, "sets must be >= 1, got 0"),
        ("sets", 9, "sets must be at most 12 with the common skills, got 9"),
        ("repeated", 1.0, r"repeated must be in \[0, 1\), got 1.0"),
        ("wrong", -0.1, r"wrong must be in \[0, 1\], got -0.1"),
        ("seed", -1, "seed must be >= 0, got -1"),
    ],
)
def test_bad_values_are_refused(name, value, text):
    with pytest.raises(ParameterError, match=text):
        arrival_world(**{name: value})
