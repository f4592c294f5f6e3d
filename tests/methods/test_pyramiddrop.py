"""PyramidDrop: the worked example, counts and nesting, batches, caches, and training."""

import itertools

import pytest
import torch
from conftest import llava_batch, tiny_llava, tiny_trainer
from vision_families import FAMILIES

import salience as sal
from salience.core.budget import top_mask
from salience.core.errors import ParameterError
from salience.hosts.attention import AttentionCall
from salience.hosts.choices import equal_stages
from salience.methods.tokens.pyramiddrop import score, spend

CONTRACT = {
    "method": sal.PyramidDrop(ratios=(0.5, 0.25), layers=(2, 3)),
    "keep_all": sal.PyramidDrop(ratios=(1.0, 1.0, 1.0)),
    "model": tiny_llava,
    "inputs": llava_batch,
    # a Trainer cannot load its own checkpoint of a LLaVA again: the names of the weights differ in the file
    "trainer_model": FAMILIES["smolvlm"].make,
    "bad": {
        "ratios": ((0.5, 0.75), r"ratios must be in \[0, 1\] and not rising, got \(0.5, 0.75\)"),
        "ratios:2": ((1.5,), r"ratios must be in \[0, 1\] and not rising, got"),
        "ratios:3": ((), r"ratios must be in \[0, 1\] and not rising, got \(\)"),
        "layers": ((4, 2, 6), r"layers must be rising and >= 1, got \(4, 2, 6\)"),
        "layers:2": ((0, 1, 2), r"layers must be rising and >= 1, got \(0, 1, 2\)"),
        "layers:3": ((1, 2), r"layers must be one for each of the 3 ratios, got \(1, 2\)"),
        "query": ((0,), r"query must be negative places from the end, got \(0,\)"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
        "min_tokens": (-1, "min_tokens must be >= 0, got -1"),
    },
}


def test_worked_example():
    """Nine tokens, one head of width 1, image at 4..7: exp sum 36.19, the best two are 4 and 6."""
    logits = torch.tensor([0.0, 0, 0, 0, 2, 1, 3, 0, 0], dtype=torch.float64)
    call = AttentionCall(None, torch.ones(1, 1, 9, 1).double(), logits.view(1, 1, 9, 1), None, None, 1.0, {})
    rows = torch.zeros(1, 9, dtype=torch.bool)
    rows[0, 8] = True
    vision = torch.zeros(1, 9, dtype=torch.bool)
    vision[0, 4:8] = True
    scores = score(call, rows, torch.ones_like(rows))
    assert scores[0, 4:8].tolist() == pytest.approx([0.2042, 0.0751, 0.5550, 0.0276], abs=5e-5)
    kept = top_mask(scores, torch.tensor([2]), vision)
    assert (kept | ~vision)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 8]


def test_counts_are_cut_and_ties_go_left():
    assert spend(torch.tensor([576, 10, 0]), 0.3).tolist() == [172, 3, 0]
    assert spend(torch.tensor([576, 10, 1]), 0.0, 2).tolist() == [2, 2, 1]
    assert equal_stages(32, 3, name="ratios") == (8, 16, 24)
    with pytest.raises(ParameterError, match="ratios must be fewer than the decoder's 3 layers, got 3"):
        equal_stages(3, 3, name="ratios")


@torch.no_grad()
def test_scaling_queries_against_keys_and_permuting_heads_change_nothing():
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 9, 8, generator=draw).double() for heads in (4, 4))
    rows = torch.zeros(1, 9, dtype=torch.bool)
    rows[0, -1] = True
    valid = torch.ones_like(rows)
    valid[0, 0] = False

    def scored(q, k):
        return score(AttentionCall(None, q, k, None, None, 8**-0.5, {}), rows, valid)

    plain = scored(query, key)
    torch.testing.assert_close(scored(query * 3, key / 3), plain)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(scored(query[:, order], key[:, order]), plain)
    key[0, :, 0] = 50.0  # padding
    torch.testing.assert_close(scored(query, key), plain)
    assert plain[0, 0] == 0


@torch.no_grad()
def test_kept_sets_are_nested_and_as_large_as_stated():
    model, batch = tiny_llava(), llava_batch()
    with sal.focus(model, sal.PyramidDrop()) as handle:
        model(**batch)
        stages = handle.parts[0].stages
    assert [stage.layer for stage in stages] == [1, 3, 4]
    full = torch.tensor([16, 32, 0])
    for stage, ratio in zip(stages, (0.5, 0.25, 0.125), strict=True):
        assert stage.kept.sum(-1).tolist() == (full * ratio).long().tolist()
    for outer, inner in itertools.pairwise(stages):
        assert not bool((inner.kept & ~outer.kept).any())
    assert handle.spent["pyramiddrop"]["image tokens"] == 48


@torch.no_grad()
def test_everything_may_be_dropped():
    model, batch = tiny_llava(), llava_batch()
    with sal.focus(model, sal.PyramidDrop(ratios=(0.0,), layers=(1,))):
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_drops_by_every_answer_and_trains_on(tmp_path, checkpointing):
    model = tiny_llava()
    samples = []
    for seed in range(4):
        one = llava_batch((1,), seed=seed, labels=True)
        samples.append({name: value[0].tolist() for name, value in one.items() if name != "pixel_values"})
        samples[-1]["pixel_values"] = one["pixel_values"]

    def together(rows):
        from conftest import collate

        batch = collate(rows)
        return batch | {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    trainer = tiny_trainer(tmp_path, model, samples, gradient_checkpointing=checkpointing)
    trainer.data_collator = together
    before = {name: value.clone() for name, value in model.named_parameters()}
    with sal.focus(trainer, sal.PyramidDrop(ratios=(0.5, 0.25), layers=(2, 4))) as handle:
        trainer.train()
    spent = handle.spent["pyramiddrop"]
    assert spent["prompts"] == 6 and spent["kept from layer 4 on"] == 6 * 4
    moved = [name for name, value in model.named_parameters() if not torch.equal(before[name], value)]
    assert any("layers.5" in name for name in moved) and any("projector" in name for name in moved)


def test_gradients_are_those_of_the_short_sequence():
    """Dropped tokens get no gradient behind the drop; checkpointing changes nothing."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_llava().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = llava_batch((1, 2), labels=True, side="right")
        with sal.focus(model, sal.PyramidDrop(ratios=(0.25,), layers=(3,))):
            model(**batch).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_all_questions_of_a_chat_ask():
    """In training the rows in front of each answer are averaged; without labels the last token asks."""
    from salience.hosts.choices import View, questions

    labels = torch.tensor([[-100, -100, -100, 7, 8, -100, -100, 9], [-100] * 8])
    valid = torch.ones(2, 8, dtype=torch.bool)
    view = View(1, None, ~valid, valid, None, None, labels, {}, None)
    assert questions(view).nonzero().tolist() == [[0, 2], [0, 6], [1, 7]]
