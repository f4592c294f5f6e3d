"""PRIOR: the formula, the checks of its definition, what the reference reads, and losses kept on disk."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    Listed,
    collate,
    losses_of,
    ragged_samples,
    tiny_gpt2,
    tiny_llama,
    tiny_trainer,
    with_lora,
)

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError, TrainingError
from salience.core.losses import IGNORE, token_losses
from salience.methods.tokens._history_losses import HistoryLosses
from salience.methods.tokens._reference_sources import LoadedText, OwnText, StoredText, reference_losses
from salience.methods.tokens._reference_text import PictureTokens, Texts
from salience.methods.tokens.prior import score, segments, spend

CONTRACT = {
    "method": sal.PRIOR(alpha=0.5),
    "model": tiny_llama,
    "bad": {
        "alpha": (-0.1, "alpha must be finite and >= 0, got -0.1"),
        "alpha:2": (math.inf, "alpha must be finite and >= 0, got inf"),
        "alpha:3": (math.nan, "alpha must be finite and >= 0, got nan"),
        "reference": ("", "reference must be 'base', a checkpoint folder, or a file or folder .*, got ''"),
        "normalise": ("row", "normalise must be one of caption, batch, got 'row'"),
        "eps": (0.0, "eps must be finite and > 0, got 0.0"),
    },
}
PICTURE = 60


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


def weights_of(probabilities, active=None, alpha=1.0, **settings):
    p = probabilities if isinstance(probabilities, torch.Tensor) else rows(*probabilities)
    active = torch.ones_like(p, dtype=torch.bool) if active is None else active
    return spend(score(p.log(), active, alpha), segments(active), **settings)


def random_case(batch=5, length=17, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(batch, length, generator=g, dtype=torch.float64)
    return p, torch.rand(batch, length, generator=g) < 0.7


def oracle(p, active, alpha):
    """The algorithm, caption by caption in Python floats."""
    out = torch.zeros_like(p)
    for b in range(len(p)):
        t = 0
        while t < p.shape[1]:
            run = []
            while t < p.shape[1] and active[b, t]:
                run.append(t)
                t += 1
            w = [(1 - float(p[b, i])) ** alpha for i in run]
            for i, value in zip(run, w):
                out[b, i] = len(w) * value / sum(w)
            t += 1
    return out


# --- the formula ---------------------------------------------------------------------------------------------------


def test_worked_examples():
    torch.testing.assert_close(weights_of([0.5, 0.9, 0.6]), rows(1.5, 0.3, 1.2))
    nll = rows(1, 2, 3)
    assert float((weights_of([0.5, 0.9, 0.6]) * nll).sum()) == pytest.approx(5.7)
    # the repository's figure shows parts of two captions: their factors k / sum w are read off
    for factor, nll, p, weighted in (
        (1.5, [0.68, 0.47, 0.71, 0.47, 0.65, 0.08], [0.01, 0.11, 0.47, 0.05, 0.48, 0.88],
         [1.01, 0.63, 0.56, 0.66, 0.51, 0.01]),
        (3.2, [0.72], [0.03], [2.24]),
    ):  # fmt: skip
        w = score(rows(*p).log(), torch.ones(1, len(p), dtype=torch.bool))
        torch.testing.assert_close(factor * w * rows(*nll), rows(*weighted), rtol=0, atol=0.015)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_agrees_with_the_oracle(alpha):
    p, active = random_case()
    got = weights_of(p, active, alpha)
    torch.testing.assert_close(got, oracle(p, active, alpha))
    owner = segments(active)
    for caption in range(int(owner.max()) + 1):
        values = got[owner == caption]
        assert float(values.mean()) == pytest.approx(1, abs=1e-6)
        assert bool((values >= 0).all()) and bool((values <= len(values) + 1e-9).all())
    assert not bool(got[~active].any())


def test_a_likelier_token_weighs_less_and_equal_ones_weigh_the_same():
    p = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)[None]
    assert bool((weights_of(p).diff() < 0).all())
    for alpha in (0.0, 0.5, 1.0, 2.0):
        torch.testing.assert_close(weights_of([0.3] * 7, alpha=alpha), torch.ones(1, 7, dtype=torch.float64))


def test_corner_cases():
    assert torch.equal(weights_of([1.0, 1.0, 1.0]), torch.ones(1, 3, dtype=torch.float64))  # sum w = 0
    for p in (0.0, 0.7, 1.0):
        assert weights_of([p]).tolist() == [[1.0]]  # k = 1
    torch.testing.assert_close(weights_of([0.0, 1.0, 1.0, 1.0]), rows(4, 0, 0, 0))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert segments(nothing).eq(-1).all() and not weights_of(torch.rand(2, 3), nothing).any()  # k = 0
    assert weights_of(torch.rand(0, 3), nothing[:0]).shape == (0, 3)
    # a log probability that rounding put above 0, and one that only fp32 tells from 0
    lp = torch.tensor([[1e-7, -1e-6, -1.0]])
    w = score(lp, torch.ones(1, 3, dtype=torch.bool))
    assert w[0, 0] == 0 and float(w[0, 1]) == pytest.approx(1e-6, rel=1e-4)
    half = score(torch.tensor([[-1e-3]], dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bool))
    assert half.dtype == torch.float32 and float(half) == pytest.approx(1e-3, rel=1e-2)
    assert weights_of([0.99999, 0.99999], alpha=1.0, eps=1.0).tolist() == [[1.0, 1.0]]


def test_padding_the_batch_and_packing_change_no_bit():
    g = torch.Generator().manual_seed(3)
    captions = [torch.rand(n, generator=g) for n in (1, 4, 9, 23)]
    alone = [weights_of(c[None]) for c in captions]
    longest = torch.zeros(4, 40)
    active = torch.zeros(4, 40, dtype=torch.bool)
    for row, c in enumerate(captions):
        longest[row, 3 : 3 + len(c)], active[row, 3 : 3 + len(c)] = c, True
    padded = weights_of(longest, active)
    gap = torch.zeros(1)
    packed = torch.cat([t for c in captions for t in (gap, c)])[None]
    runs = torch.cat([t for c in captions for t in (gap, torch.ones(len(c)))])[None].bool()
    together = weights_of(packed, runs)
    document = torch.cat([torch.full((len(c),), i) for i, c in enumerate(captions)])[None]
    close = torch.cat(captions)[None]
    everywhere = torch.ones_like(close, dtype=torch.bool)
    adjoining = spend(score(close.log(), everywhere), segments(everywhere, document))
    assert torch.equal(together[runs], torch.cat(alone, 1)[0])
    assert torch.equal(adjoining, torch.cat(alone, 1))
    for row, w in enumerate(alone):
        assert torch.equal(padded[row][active[row]], w[0])


# --- in a loop -----------------------------------------------------------------------------------------------------


def step(loop, *batches):
    loop.start_step(batches)
    losses = []
    for batch in batches:
        loss = loop.loss(batch)
        loss.backward()
        losses.append(loss)
    loop.finish_step()
    return losses[0]


def begun(model, method, **settings):
    loop = sal.loop(model, method, **settings)
    loop.begin()
    return loop


def test_alpha_zero_is_plain_training_bit_for_bit():
    batch = collate(ragged_samples(6))
    plain = tiny_llama()
    losses, active = token_losses(
        plain(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    )
    expected = losses.sum() / active.sum()
    expected.backward()
    model = tiny_llama()
    loop = begun(model, sal.PRIOR(alpha=0.0))  # needs no data
    assert torch.equal(step(loop, batch), expected)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(p.grad, q.grad), name
    assert loop.parts[0].spent()["reference passes"] == 0


def expected_loss(model, reference, batch, alpha=1.0):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses, active = token_losses(model(**inputs).logits, batch["labels"])
    p = (-token_losses(reference(**inputs).logits, batch["labels"])[0].detach()).exp()
    return (oracle(p, active, alpha) * losses).sum() / active.sum()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_loss_and_its_gradient_are_the_papers(alpha):
    model, other = tiny_gpt2(), tiny_gpt2(seed=5)
    batch = collate(ragged_samples(6))
    loop = begun(model, sal.PRIOR(alpha=alpha), data=[batch])
    loop.start_step([batch])  # measures the base
    model.load_state_dict(other.state_dict())
    loss = loop.loss(batch)
    expected = expected_loss(other, tiny_gpt2(), batch, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_micro_batches_are_one_batch():
    samples, grads = ragged_samples(6), []
    for cut in (6, 2):
        model = tiny_gpt2()
        loop = begun(model, sal.PRIOR(), data=[collate(samples)])
        step(loop, *(collate(samples[i : i + cut]) for i in range(0, 6, cut)))
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_turns_are_normalised_one_by_one_or_together():
    ids = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = labels[:, 8:11] = IGNORE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loop = begun(tiny_llama(), sal.PRIOR(), data=[batch])
    step(loop, batch)
    weight = loop.parts[0].scores()["weight"]
    for turn in (slice(4, 8), slice(11, 16)):
        assert float(weight[0, turn].mean()) == pytest.approx(1, abs=1e-6)
    assert loop.parts[0].spent()["captions"] == 2
    loop = begun(tiny_llama(), sal.PRIOR(normalise="batch"), data=[batch])
    step(loop, batch)
    weight = loop.parts[0].scores()["weight"][labels != IGNORE]
    assert float(weight.mean()) == pytest.approx(1, abs=1e-6)
    assert abs(float(weight[:4].mean()) - 1) > 1e-5


def test_a_batch_without_captions_has_loss_zero():
    batch = collate(ragged_samples(2))
    batch["labels"][:] = IGNORE
    model = tiny_llama()
    loop = begun(model, sal.PRIOR(), data=[batch])
    assert step(loop, batch).item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_heat_and_the_history_are_recorded():
    batch = collate(ragged_samples(6))
    loop = begun(tiny_llama(), sal.PRIOR(), data=[batch])
    step(loop, batch)
    part = loop.parts[0]
    assert len(part.heat) == 4
    assert {len(v) for k, v in part.heat[0].items() if k != "step"} == {int(batch["attention_mask"][0].sum())}
    (history,) = part.histories.values()
    assert history.values().shape == (1, 10)


# --- what the reference reads --------------------------------------------------------------------------------------


class Watched(torch.nn.Module):
    """A language model that keeps what it was called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, []

    def forward(self, **inputs):
        self.calls.append(inputs)
        return self.model(**inputs)


def test_packed_documents_are_read_alone_and_a_first_token_has_a_beginning_or_none():
    a, b = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    packed = {
        "input_ids": torch.cat((a, b))[None],
        "labels": torch.cat((torch.tensor([IGNORE]), a[1:], b))[None],
        "position_ids": torch.cat((torch.arange(6), torch.arange(6)))[None],
    }
    model = tiny_llama(bos_token_id=1)
    texts = Texts.of(packed, PictureTokens())
    assert torch.equal(texts.ids, torch.stack((a, b)))
    with torch.no_grad():
        got = texts.put_back(texts.losses(model, 1))[0]
        for at, ids in ((0, a), (6, b)):
            led = torch.cat((torch.tensor([1]), ids))[None] if at else ids[None]
            want = token_losses(model(led).logits, led)[0][0, -6:]
            torch.testing.assert_close(got[at + (not at) : at + 6], want[not at :], rtol=0, atol=1e-5)
        none = texts.put_back(texts.losses(model, None))[0]
    assert float(none[6]) == 1e4 and float(none[0]) == 0.0
    assert float(score(-none[None, 6:7], torch.ones(1, 1, dtype=torch.bool))) == 1.0


def test_left_padding_holes_and_numbering_do_not_matter():
    samples, model = ragged_samples(5, vocab=PICTURE), tiny_gpt2()
    plain = collate(samples)
    texts = Texts.of(plain, PictureTokens())
    want = texts.losses(model, None)[texts.mask].detach()
    left = Texts.of(collate(samples, side="left"), PictureTokens())
    torch.testing.assert_close(left.losses(model, None)[left.mask].detach(), want)
    pictured = [
        {"input_ids": [s["input_ids"][0], *[PICTURE] * 4, *s["input_ids"][1:]],
         "labels": [IGNORE] * 5 + s["labels"][1:]}
        for s in samples
    ]  # fmt: skip
    batch = collate(pictured)
    seen = Texts.of(batch, PictureTokens((PICTURE,)))
    torch.testing.assert_close(seen.losses(model, None)[seen.mask].detach(), want)
    back = seen.put_back(seen.losses(model, None))
    assert back.shape == batch["labels"].shape and not bool(back[batch["input_ids"] == PICTURE].any())


def test_a_labelled_place_of_an_image_and_missing_ids_are_refused():
    labels = torch.tensor([[IGNORE, PICTURE, 5]])
    with pytest.raises(StructureError, match=r"labels must be -100 on image tokens, got some .*60"):
        Texts.of({"input_ids": labels.clamp_min(1), "labels": labels}, PictureTokens((PICTURE,)))
    with pytest.raises(StructureError, match=r"input_ids must be \[1, 3\] like the labels, got none"):
        Texts.of({"labels": labels}, PictureTokens())


def tiny_llava(seed=0):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                              image_size=16, patch_size=4)  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE)
    )


def captioned(count=8, seed=0):
    """BOS, sixteen places of an image, a caption; with pixels."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        caption = torch.randint(3, 59, (int(torch.randint(3, 9, (1,), generator=g)),), generator=g).tolist()
        ids = [1, *[PICTURE] * 16, *caption]
        samples.append({"input_ids": ids, "labels": [IGNORE] * 17 + caption,
                        "pixel_values": torch.randn(3, 16, 16, generator=g)})  # fmt: skip
    return samples


def collate_pictures(samples):
    return {**collate(samples), "pixel_values": torch.stack([s["pixel_values"] for s in samples])}


def llava_trainer(folder, model, **settings):
    trainer = tiny_trainer(folder, model, captioned(), **settings)
    trainer.data_collator = collate_pictures
    return trainer


@pytest.mark.parametrize("kind", ["full", "projector", "lora"])
def test_a_vision_language_model_is_its_own_text_only_reference(kind, tmp_path):
    model, base = tiny_llava(), tiny_llava()
    if kind == "projector":
        for name, p in model.named_parameters():
            p.requires_grad_("projector" in name)
    if kind == "lora":
        model = with_lora(model, targets=("q_proj", "v_proj"))
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "projector" in name)
    trainer = llava_trainer(tmp_path, model)
    seen, whole = [], model.forward

    def watched(*args, **inputs):
        if "pixel_values" not in inputs:
            seen.append(inputs["input_ids"].clone())
        return whole(*args, **inputs)

    model.forward = watched
    handle = sal.focus(trainer, sal.PRIOR())
    assert type(handle.parts[0]._source) is (StoredText if kind == "full" else OwnText)
    batches, weigh = [], handle.parts[0].token_weights

    def kept(batch, loop):
        batches.append((dict(batch.inputs), weigh(batch, loop)))
        return batches[-1][1]

    handle.parts[0].token_weights = kept
    trainer.train()
    assert seen and not any(bool((ids == PICTURE).any()) for ids in seen)
    for batch, weights in batches:
        assert not bool(weights[batch["input_ids"] == PICTURE].any())
        for ids, labels, row in zip(batch["input_ids"], batch["labels"], weights):
            words = ids[(labels != IGNORE) | (ids == 1)][None]
            with torch.no_grad():
                p = (-token_losses(base(input_ids=words).logits, words)[0]).exp()
            want = oracle(p, torch.arange(words.shape[1])[None] > 0, 1.0)[0, 1:]
            torch.testing.assert_close(row[labels != IGNORE], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "projector", "file"])
def test_a_resumed_run_on_pictures_has_the_same_reference(kind, tmp_path):
    def trainer(name):
        model = tiny_llava()
        if kind == "projector":
            model.model.language_model.requires_grad_(False)
            model.lm_head.requires_grad_(False)
        made = llava_trainer(tmp_path / name, model, max_steps=4, save_strategy="steps", save_steps=2)
        reference = "base"
        if kind == "file":
            reference = str(
                reference_losses(
                    tiny_llava(), Listed(captioned()), tmp_path / "losses", collate=collate_pictures
                )
            )
        return made, sal.focus(made, sal.PRIOR(reference=reference))

    whole, handle = trainer("whole")
    whole.train()
    again, other = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    # transformers' Trainer does not find a LLaVA's weights under the names that it saved them by, so that losses
    # differ without salience too: what the method needs is there
    assert other.spent == handle.spent
    assert len(losses_of(again)) == 4
    for name, value in handle.scores.items():
        assert torch.equal(other.scores[name], value), name


# --- other references ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_run_beside_each_batch_without_gradient(checkpoint):
    batch = collate(ragged_samples(4))
    model = tiny_gpt2().float()
    loop = begun(model, sal.PRIOR(reference=str(checkpoint)))
    source = loop.parts[0]._source
    assert type(source) is LoadedText
    loss = step(loop, batch)
    torch.testing.assert_close(
        loss, expected_loss(tiny_gpt2().float(), tiny_llama(), batch), rtol=1e-5, atol=1e-6
    )
    assert all(p.grad is None and not p.requires_grad for p in source.reference.parameters())
    assert loop.parts[0].spent()["reference passes"] == 1


def test_a_reference_of_another_vocabulary_or_none_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        ParameterError, match="reference must be a model with the same vocabulary of 70 tokens"
    ):
        sal.loop(tiny_llama(vocab=70), sal.PRIOR(reference=str(checkpoint)))
    with pytest.raises(ParameterError, match="reference must be 'base', a checkpoint folder, or a file"):
        sal.loop(tiny_llama(), sal.PRIOR(reference=str(tmp_path / "none")))
    path = HistoryLosses({"model": "x"}).save(tmp_path / "history.safetensors")
    with pytest.raises(ParameterError, match="reference must be 'base', a checkpoint folder, or a file"):
        sal.loop(tiny_llama(), sal.PRIOR(reference=str(path)))


def test_a_tokenizer_that_means_other_words_is_refused(checkpoint, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = tiny_trainer(tmp_path, tiny_llama(vocab=70))
    trainer.processing_class = tokenizer
    sal.focus(trainer, sal.PRIOR(reference=str(checkpoint))).undo()  # the same words: sizes may differ
    tokenizer.add_tokens(["<image>"])
    sal.focus(trainer, sal.PRIOR(reference=str(checkpoint))).undo()
    other = AutoTokenizer.from_pretrained(checkpoint)
    words = other.get_vocab()
    words["cat"], words["dog"] = words["dog"], words["cat"]
    other.get_vocab = lambda: words
    trainer.processing_class = other
    with pytest.raises(
        ParameterError, match=r"the model's tokenizer, got one in which 2 tokens differ \('cat'"
    ):
        sal.focus(trainer, sal.PRIOR(reference=str(checkpoint)))


def test_a_stream_and_a_model_without_a_causal_loss_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ragged_samples(8))

    trainer = tiny_trainer(tmp_path)
    trainer.train_dataset = Stream()
    with pytest.raises(ConflictError, match=r"reference must be a checkpoint or a file .* on a stream"):
        sal.focus(trainer, sal.PRIOR())
    with pytest.raises(StructureError, match="model must predict each token from those before it"):
        sal.loop(tiny_llama(), sal.PRIOR(), shifted=False)


def test_losses_on_disk_are_found_by_content_and_resumed(tmp_path):
    samples = Listed(ragged_samples(10))
    folder = reference_losses(tiny_llama(), samples, tmp_path / "losses", batch_size=3, part_size=4)
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert parts == [f"part-0000{i}-of-00003.safetensors" for i in range(3)]
    batch = collate(samples.samples[::-1], side="left")
    loop = begun(tiny_llama(seed=4), sal.PRIOR(reference=str(folder)))
    loss = step(loop, batch)
    torch.testing.assert_close(
        loss, expected_loss(tiny_llama(seed=4), tiny_llama(), batch), rtol=1e-4, atol=1e-5
    )
    # a part that is there is left alone, a missing one is made again, what a kill left behind goes
    before = (folder / parts[0]).stat().st_mtime_ns
    whole = HistoryLosses.load(folder).digest()
    (folder / parts[1]).unlink()
    (folder / f".{parts[1]}.77").write_bytes(b"half")
    with pytest.raises(ParameterError, match="reference must be whole, got 2 of 3 parts"):
        sal.loop(tiny_llama(), sal.PRIOR(reference=str(folder)))
    reference_losses(tiny_llama(), samples, folder, batch_size=3, part_size=4)
    assert (folder / parts[0]).stat().st_mtime_ns == before and HistoryLosses.load(folder).digest() == whole
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *parts]
    with pytest.raises(TrainingError, match="losses must cover every training sample"):
        step(loop, collate(ragged_samples(3, seed=8)))


def test_mixed_parts_and_bad_data_are_refused(tmp_path):
    samples = Listed(ragged_samples(4))
    folder = reference_losses(tiny_llama(), samples, tmp_path / "losses")
    with pytest.raises(
        ParameterError, match=r"folder must hold parts of this reference and data, .* weights"
    ):
        reference_losses(tiny_llama(seed=1), samples, folder)
    with pytest.raises(ParameterError, match=r"folder must hold parts of this .* with other data"):
        reference_losses(tiny_llama(), Listed(ragged_samples(4, seed=1)), folder)
    with pytest.raises(ParameterError, match="reference must be measured with this run's vocabulary '70'"):
        sal.loop(tiny_llama(vocab=70), sal.PRIOR(reference=str(folder)))
    with pytest.raises(ParameterError, match="reference must be measured with this run's image tokens '60'"):
        sal.loop(tiny_llava(), sal.PRIOR(reference=str(folder)))
    with pytest.raises(
        ParameterError, match=r"dataset must have rows with input_ids and labels, got \['text'\]"
    ):
        reference_losses(tiny_llama(), Listed([{"text": "a"}]), tmp_path / "x")
    with pytest.raises(ParameterError, match="dataset must be rows with a length and indices"):
        reference_losses(tiny_llama(), iter([]), tmp_path / "x")
    for name in ("batch_size", "part_size"):
        with pytest.raises(ParameterError, match=f"{name} must be >= 1, got 0"):
            reference_losses(tiny_llama(), samples, tmp_path / "x", **{name: 0})


def test_ranks_share_the_parts(tmp_path, monkeypatch):
    samples = Listed(ragged_samples(10))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("1", [1, 3]), ("0", [0, 1, 2, 3, 4])):
        monkeypatch.setenv("RANK", rank)
        folder = reference_losses(tiny_llama(), samples, tmp_path / "losses", part_size=2)
        assert [int(p.name[5:10]) for p in sorted(folder.glob("*.safetensors"))] == names
    alone = reference_losses(with_lora(tiny_llama()), samples, tmp_path / "one")
    assert len(HistoryLosses.load(alone)) == len(HistoryLosses.load(folder)) == 10


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from conftest import Listed, ragged_samples, tiny_llama
from salience.methods.tokens import _reference_sources as sources
from salience.methods.tokens._history_losses import HistoryLosses
save = HistoryLosses.save
def slow(self, path):
    done = save(self, path)
    print("saved", flush=True)
    time.sleep({wait})
    return done
HistoryLosses.save = slow
sources.reference_losses(tiny_llama(), Listed(ragged_samples(8)), {folder!r}, part_size=2)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    folder, paths = tmp_path / "losses", [str(Path(__file__).parent.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = SCRIPT.format(paths=paths, folder=str(folder), wait=60)
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True)
    assert run.stdout.readline() == "saved\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    (part,) = folder.glob("*.safetensors")
    before = part.stat().st_mtime_ns
    time.sleep(0.01)
    reference_losses(tiny_llama(), Listed(ragged_samples(8)), folder, part_size=2)
    assert len(list(folder.glob("*.safetensors"))) == 4 and part.stat().st_mtime_ns == before
    whole = reference_losses(tiny_llama(), Listed(ragged_samples(8)), tmp_path / "whole", part_size=2)
    assert HistoryLosses.load(folder).digest() == HistoryLosses.load(whole).digest()
