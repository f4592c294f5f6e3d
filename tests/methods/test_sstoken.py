"""SsToken: the formula, the checks of its definition, its sources of history, and that a run can go on."""

import math

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
from salience.core.budget import count
from salience.core.errors import ConflictError, ParameterError, StructureError, TrainingError
from salience.core.losses import IGNORE, token_losses
from salience.methods.tokens._history_losses import HistoryLosses, attended_tokens, history_losses
from salience.methods.tokens._history_sources import FrozenBase, MovingAverage, StoredLosses, adapters_off
from salience.methods.tokens.sstoken import mean_loss, prompt_share, score, selected_labels, spend

CONTRACT = {
    "method": sal.SsToken(keep=0.5),
    "model": tiny_llama,
    "bad": {
        "keep": (0.0, "keep must be a share in .0, 1. or a count >= 1, got 0.0"),
        "keep:2": (1.5, "keep must be a share in .0, 1. or a count >= 1, got 1.5"),
        "mix": (1.01, "mix must be in .0, 1., got 1.01"),
        "attention_layer": ("last", "attention_layer must be an int, got 'last'"),
        "attention_only_until": (-1, "attention_only_until must be >= 0, got -1"),
        "history": ("", "history must be 'base', 'ema' or a file of history losses, got ''"),
        "history:2": ("ema", "ema_decay must be in .0, 1. with history='ema', got None"),
        "ema_decay": (0.9, "ema_decay must be None unless history='ema', got 0.9"),
        "eps": (0.0, "eps must be > 0, got 0.0"),
    },
}


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


def random_case(batch=4, length=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    history, current, attention = (
        torch.rand(batch, length, generator=g, dtype=torch.float64) for _ in range(3)
    )
    labels = torch.randint(3, 20, (batch, length), generator=g)
    for row in range(batch):
        labels[row, : 2 + row] = IGNORE
        labels[row, length - row :] = IGNORE
    return 3 * history, 3 * current, attention, labels


def oracle(history, current, attention, labels, keep, mix):
    """The algorithm, one sample at a time in Python floats."""
    out = labels.clone()
    for b in range(len(labels)):
        response = [t for t in range(labels.shape[1]) if labels[b, t] != IGNORE]
        if not response:
            continue
        rel = {t: (history[b, t] - current[b, t]).item() for t in response}
        low, high = min(rel.values()), max(rel.values())
        s = {
            t: mix * (rel[t] - low) / (high - low + 1e-8) + (1 - mix) * attention[b, t].item()
            for t in response
        }
        k = math.ceil(keep * len(response) - 1e-9)
        best = sorted(response, key=lambda t: (-s[t], t))[:k]
        for t in response:
            if t not in best:
                out[b, t] = IGNORE
    return out


# --- the formula ---------------------------------------------------------------------------------------------------


def test_worked_example():
    response = torch.ones(1, 4, dtype=torch.bool)
    rel, attention = rows(0.0, 1.0, -1.0, 0.5), rows(0.2, 0.1, 0.9, 0.6)
    scores = score(rel, torch.zeros_like(rel), attention, response, mix=0.5)
    torch.testing.assert_close(scores, rows(0.35, 0.55, 0.45, 0.675), rtol=0, atol=1e-7)
    assert spend(scores, response, 0.5).tolist() == [[False, True, False, True]]
    assert spend(scores, response, 0.6).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_agrees_with_the_oracle_and_keeps_exactly_the_budget(keep, mix):
    history, current, attention, labels = random_case()
    got = selected_labels(history, current, attention, labels, keep=keep, mix=mix)
    assert torch.equal(got, oracle(history, current, attention, labels, keep, mix))
    for row, before in zip(got, labels):
        total = int((before != IGNORE).sum())
        assert int((row != IGNORE).sum()) == count(keep, total)
        assert ((row == before) | (row == IGNORE)).all() and (row[before == IGNORE] == IGNORE).all()


def test_a_whole_product_is_not_rounded_up():
    response = torch.ones(1, 5, dtype=torch.bool)
    assert int(spend(rows(1, 2, 3, 4, 5), response, 0.6).sum()) == 3  # 0.6 * 5 is 3.0000000000000004


def test_keeping_all_changes_no_label():
    *case, labels = random_case()
    assert torch.equal(selected_labels(*case, labels, keep=1.0, mix=0.5), labels)


def test_each_signal_alone_ignores_the_other():
    history, current, attention, labels = random_case()
    other = torch.rand_like(history)
    for mix, changed in ((0.0, (other, current, attention)), (1.0, (history, current, other))):
        whole = selected_labels(history, current, attention, labels, keep=0.4, mix=mix)
        assert torch.equal(selected_labels(*changed, labels, keep=0.4, mix=mix), whole)


def test_shifting_or_scaling_the_excess_losses_of_a_sample_changes_nothing():
    history, current, attention, labels = random_case()
    response = labels != IGNORE
    plain = score(history, current, attention, response, mix=0.5)
    shift = torch.tensor([[1.0], [-2.0], [3.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        score(history + shift, current, attention, response, mix=0.5), plain, rtol=0, atol=1e-7
    )
    scale = torch.tensor([[2.0], [0.5], [7.0], [1.0]], dtype=torch.float64)
    scaled = score(current + scale * (history - current), current, attention, response, mix=0.5)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-7)


def test_padding_and_the_order_of_samples_do_not_matter():
    history, current, attention, labels = random_case()
    order = torch.tensor([2, 0, 3, 1])
    whole = selected_labels(history, current, attention, labels, keep=0.5, mix=0.5)
    permuted = (t[order] for t in (history, current, attention, labels))
    assert torch.equal(selected_labels(*permuted, keep=0.5, mix=0.5), whole[order])
    wide = [torch.nn.functional.pad(t, (3, 2), value=9.0) for t in (history, current, attention)]
    padded = torch.nn.functional.pad(labels, (3, 2), value=IGNORE)
    assert torch.equal(selected_labels(*wide, padded, keep=0.5, mix=0.5)[:, 3:-2], whole)


def test_corner_cases():
    nothing = torch.full((1, 3), IGNORE)
    zeros = rows(0, 0, 0)
    assert torch.equal(selected_labels(zeros, zeros, zeros, nothing, keep=0.6, mix=0.5), nothing)
    assert math.isnan(float(mean_loss(zeros, nothing != IGNORE)))
    one = torch.tensor([[IGNORE, IGNORE, 5]])
    assert torch.equal(selected_labels(zeros, zeros, zeros, one, keep=0.1, mix=0.5), one)
    # equal excess losses: attention decides; all equal: the left ones
    response = torch.ones(1, 3, dtype=torch.bool)
    scores = score(rows(1, 1, 1), zeros, rows(0.1, 0.9, 0.5), response, mix=0.9)
    assert spend(scores, response, 1).tolist() == [[False, True, False]]
    assert spend(zeros, response, 0.5).tolist() == [[True, True, False]]


def test_prompt_share_sums_the_map_over_ignored_positions():
    attention = torch.tensor([[[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.2, 0.3]]])
    labels = torch.tensor([[IGNORE, 4, 5]])
    torch.testing.assert_close(prompt_share(attention, labels), torch.tensor([[1.0, 0.25, 0.5]]))


# --- in a loop -----------------------------------------------------------------------------------------------------


def attached(method, model, samples=None, side="right", **settings):
    samples = samples or ragged_samples(6)
    loop = sal.loop(model, method, data=[collate(samples, side=side)], **settings)
    loop.begin()
    return loop, collate(samples, side=side)


def step(loop, batch):
    loop.start_step([batch])
    loss = loop.loss(batch)
    loss.backward()
    loop.finish_step()
    return loss


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_the_loss_is_the_mean_over_what_the_oracle_keeps(side, mix):
    model, other = tiny_gpt2(), tiny_gpt2(seed=5)
    samples = ragged_samples(6, longest=14)
    batch = collate(samples, side=side)
    loop, _ = attached(sal.SsToken(keep=0.5, mix=mix), model, samples, side)
    loop.start_step([batch])  # measures the base
    history = token_losses(tiny_gpt2()(**batch).logits, batch["labels"])[0]
    model.load_state_dict(other.state_dict())
    loss = loop.loss(batch)
    other.set_attn_implementation("eager")
    outputs = other(**batch, output_attentions=True)
    current = token_losses(outputs.logits, batch["labels"])[0]
    prompt = (batch["labels"] == IGNORE) & batch["attention_mask"].bool()
    attention = (outputs.attentions[-1].mean(1) * prompt[:, None]).sum(-1)
    labels = oracle(history, current, attention, batch["labels"], 0.5, mix)
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    want = torch.autograd.grad(
        expected, [p for p in other.parameters() if p.requires_grad], allow_unused=True
    )
    for (name, _), a, b in zip(model.named_parameters(), got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_keeping_all_is_plain_fine_tuning():
    loop, batch = attached(sal.SsToken(keep=1.0), tiny_llama())
    torch.testing.assert_close(step(loop, batch), tiny_llama()(**batch).loss)


def chat(model_seed=0):
    """Two turns: the second prompt lies behind the first response."""
    ids = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(model_seed))
    labels = ids.clone()
    labels[:, :4] = labels[:, 8:11] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_later_turns_attend_to_every_earlier_prompt():
    model, batch = tiny_llama(), chat()
    loop = sal.loop(model, sal.SsToken(keep=0.5, mix=0.0))
    loop.begin()
    step(loop, batch)
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions[-1].mean(1)[0].detach()
    prompt = [0, 1, 2, 3, 8, 9, 10]
    scores = loop.parts[0].scores()["score"][0]
    for t in range(16):
        want = 0.0 if t in prompt else float(sum(maps[t, j] for j in prompt if j < t))
        assert float(scores[t]) == pytest.approx(want, abs=1e-6), t
    assert int(loop.parts[0].spent()["kept"]) == 5  # of nine


def test_a_batch_without_any_response_has_loss_zero_and_no_gradient():
    model = tiny_llama()
    batch = collate(ragged_samples(2))
    batch["labels"][:] = IGNORE
    loop = sal.loop(model, sal.SsToken(mix=0.0))
    loop.begin()
    assert step(loop, batch).item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_accumulated_micro_batches_are_one_batch():
    grads = []
    for cut in (6, 2):
        samples = ragged_samples(6)
        model = tiny_gpt2()
        loop = sal.loop(model, sal.SsToken(keep=0.5), data=[collate(samples)])
        loop.begin()
        batches = [collate(samples[i : i + cut]) for i in range(0, 6, cut)]
        loop.start_step(batches)
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
        for batch in batches:
            loop.loss(batch).backward()
        loop.finish_step()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_attention_alone_until_enough_samples_were_seen():
    loop, batch = attached(sal.SsToken(keep=0.5, mix=1.0, attention_only_until=7), tiny_llama())
    for index in range(3):
        step(loop, batch)  # six samples each
        with torch.no_grad():
            loop.model.lm_head.weight.mul_(1.5)
        newest = loop.parts[0].scores()
        same = torch.equal(newest["score"], newest["attention"] * (batch["labels"] != IGNORE))
        assert same == (index < 2)


def test_label_smoothing_is_no_part_of_the_excess_loss():
    loop, batch = attached(sal.SsToken(keep=0.5), tiny_llama(), smoothing=0.3)
    step(loop, batch)
    assert float(loop.parts[0].scores()["excess_loss"].abs().max()) < 1e-5


def test_a_clean_current_pass_takes_dropout_out_of_the_excess_loss():
    noise = {}
    for clean in (False, True):
        model = tiny_llama(attention_dropout=0.5).train()
        loop, batch = attached(sal.SsToken(keep=0.5, clean_current=clean), model)
        step(loop, batch)
        noise[clean] = float(loop.parts[0].scores()["excess_loss"].abs().max())
        assert loop.parts[0].spent()["extra forward passes"] == 1 + clean and model.training
    assert noise[True] == 0.0 < 1e-3 < noise[False]


def test_heat_and_the_picture_of_places():
    loop, batch = attached(sal.SsToken(keep=0.5), tiny_llama())
    part = loop.parts[0]
    for _ in range(27):
        step(loop, batch)
    assert [entry["step"] for entry in part.heat] == [25] * 4
    first, length = part.heat[0], int(batch["attention_mask"][0].sum())
    assert {len(v) for k, v in first.items() if k != "step"} == {length}
    assert first["tokens"] == batch["input_ids"][0, :length].tolist()
    assert sum(first["kept"]) == math.ceil(0.5 * sum(first["response"]))
    assert not any(p and r for p, r in zip(first["prompt"], first["response"]))
    (history,) = part.histories.values()
    assert history.steps == [0, 25] and history.values().shape == (2, 10)


# --- history -------------------------------------------------------------------------------------------------------


def test_peft_runs_the_base_beside_the_batch_and_restores_every_flag():
    model = with_lora(tiny_llama())
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    batch = collate(ragged_samples(6))
    loop = sal.loop(model, sal.SsToken(keep=0.5))  # without data
    loop.begin()
    step(loop, batch)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    excess = loop.parts[0].scores()["excess_loss"]
    base, now = (token_losses(m(**batch).logits, batch["labels"])[0] for m in (tiny_llama(), model))
    torch.testing.assert_close(excess, (base - now).detach(), rtol=0, atol=1e-5)
    assert loop.parts[0].spent()["extra forward passes"] == 1


def test_a_base_that_also_trains_is_measured_before():
    model = with_lora(tiny_llama())
    model.base_model.model.lm_head.weight.requires_grad_(True)
    part = sal.loop(model, sal.SsToken(), data=[]).parts[0]
    assert type(part._source) is StoredLosses
    assert type(sal.loop(with_lora(tiny_llama()), sal.SsToken()).parts[0]._source) is FrozenBase
    moved = with_lora(tiny_llama(), init_lora_weights="pissa")
    assert type(sal.loop(moved, sal.SsToken(), data=[]).parts[0]._source) is StoredLosses


def test_adapters_come_back_after_an_exception():
    model = with_lora(tiny_llama())
    batch = collate(ragged_samples(2))
    before = model(**batch).logits
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(model(**batch).logits, before)


def test_the_average_follows_the_weights_and_leaves_them_alone():
    model = tiny_gpt2()
    loop, batch = attached(sal.SsToken(keep=0.5, history="ema", ema_decay=0.5), model)
    source = loop.parts[0]._source
    assert type(source) is MovingAverage
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(loop, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-2)
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    loop.start_step([batch])
    loop.loss(batch)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, moved[name]), name
    middle = tiny_gpt2()
    middle.load_state_dict({n: (start[n] + moved[n]) / 2 for n in start}, strict=False)
    history, now = (token_losses(m(**batch).logits, batch["labels"])[0] for m in (middle, model))
    torch.testing.assert_close(
        loop.parts[0].scores()["excess_loss"], (history - now).detach(), rtol=0, atol=1e-5
    )


def test_losses_are_found_by_content_whatever_the_padding_and_order(tmp_path):
    samples, model = ragged_samples(7), tiny_llama()
    model.train()
    losses = history_losses(model, [collate(samples[:3]), collate(samples[3:])])
    assert len(losses) == 7 and model.training
    path = losses.save(tmp_path / "deep" / "base.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["base.safetensors"]
    read = HistoryLosses.load(path)
    assert read.digest() == losses.digest() and read.about == {"model": "llama of 2 layers, width 32"}
    batch = collate(samples[::-1], side="left")
    want = token_losses(tiny_llama()(**batch).logits, batch["labels"])[0].detach()
    torch.testing.assert_close(read.find(batch), want, rtol=0, atol=1e-5)
    loop = sal.loop(tiny_llama(), sal.SsToken(keep=0.5, history=str(path)))
    loop.begin()
    step(loop, batch)
    assert float(loop.parts[0].scores()["excess_loss"].abs().max()) < 1e-5
    assert loop.parts[0].spent()["extra forward passes"] == 0


def test_parts_of_a_folder_are_read_together(tmp_path):
    samples, model = ragged_samples(6), tiny_llama()
    for index in range(2):
        history_losses(model, [collate(samples[3 * index :][:3])]).save(
            tmp_path / f"part-{index}.safetensors"
        )
    whole = history_losses(model, [collate(samples[:3]), collate(samples[3:])])
    assert HistoryLosses.load(tmp_path).digest() == whole.digest()
    history_losses(tiny_llama(hidden=16), [collate(samples)]).save(tmp_path / "part-2.safetensors")
    with pytest.raises(ParameterError, match="history must come from one model, got"):
        HistoryLosses.load(tmp_path)


def test_wrong_history_is_refused(tmp_path):
    samples = ragged_samples(4)
    path = history_losses(tiny_llama(), [collate(samples)]).save(tmp_path / "h.safetensors")
    with pytest.raises(
        ParameterError, match="history must be measured with this run's model 'llama of 3 layers"
    ):
        sal.loop(tiny_llama(layers=3), sal.SsToken(history=str(path)))
    with pytest.raises(
        ParameterError, match="history must be 'base', 'ema' or a file of history losses, got"
    ):
        sal.loop(tiny_llama(), sal.SsToken(history=str(tmp_path / "none.safetensors")))
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ParameterError, match="history must be a file of history losses, got"):
        HistoryLosses.load(tmp_path / "x.safetensors")

    loop = sal.loop(tiny_llama(), sal.SsToken(history=str(path)))
    loop.begin()
    with pytest.raises(
        TrainingError, match="history losses must cover every training sample, got none for row 0"
    ):
        step(loop, collate(ragged_samples(4, seed=1)))
    truncated = [{name: values[:-1] for name, values in sample.items()} for sample in samples]
    with pytest.raises(TrainingError, match="history losses must cover every training sample"):
        step(loop, collate(truncated))


def test_damaged_history_is_refused():
    samples = ragged_samples(3)
    whole = history_losses(tiny_llama(), [collate(samples)])
    tensors = whole.tensors()
    with pytest.raises(ParameterError, match="history losses must be finite, got inf or nan"):
        HistoryLosses().take({**tensors, "values": tensors["values"] * torch.inf})
    with pytest.raises(ParameterError, match="history losses must have one offset more than keys"):
        HistoryLosses().take({**tensors, "values": tensors["values"][:-1]})
    short = HistoryLosses()
    short.take({**tensors, "offsets": torch.arange(4), "values": torch.ones(3)})
    with pytest.raises(
        TrainingError, match=r"history losses of a sample must have its \d response tokens, got 1"
    ):
        short.find(collate(samples))


def test_a_diverging_model_is_named():
    loop, batch = attached(sal.SsToken(keep=0.5), tiny_llama())
    loop.start_step([batch])
    with torch.no_grad():
        loop.model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(TrainingError, match="losses must be finite, got inf or nan at step 0"):
        loop.loss(batch)


def test_without_a_mask_padding_is_what_follows_the_last_label():
    batch = collate(ragged_samples(4))
    with_mask = attended_tokens(batch)
    del batch["attention_mask"]
    assert torch.equal(attended_tokens(batch), with_mask)
    batch["attention_mask"] = torch.ones(4, 1, 5, 5)
    with pytest.raises(
        StructureError, match=r"attention_mask must be \[4, \d+\] like the labels, got \[4, 1, 5, 5\]"
    ):
        attended_tokens(batch)


def test_samples_with_pictures_have_no_key():
    batch = {**collate(ragged_samples(2)), "pixel_values": torch.zeros(2, 3)}
    with pytest.raises(StructureError, match=r"stored for text alone, got samples with \['pixel_values'\]"):
        HistoryLosses().find(batch)


# --- on a Trainer --------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_a_stream_needs_lora_an_average_or_a_file(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train_dataset = Stream(ragged_samples(8))
    with pytest.raises(
        ConflictError, match="history must be 'ema' or a file when all weights train on a stream"
    ):
        sal.focus(trainer, sal.SsToken())
    trainer = tiny_trainer(tmp_path, with_lora(tiny_llama()))
    trainer.train_dataset = Stream(ragged_samples(8))
    with sal.focus(trainer, sal.SsToken()) as handle:
        trainer.train()
        assert handle.spent["sstoken"]["extra forward passes"] == 3


def test_a_model_that_classifies_has_no_response(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, pad_token_id=0)  # fmt: skip
    trainer = tiny_trainer(tmp_path, LlamaForSequenceClassification(config))
    with pytest.raises(
        StructureError, match="model must predict each token from those before it, got LlamaForSeq"
    ):
        sal.focus(trainer, sal.SsToken())
    loop = sal.loop(tiny_llama(), sal.SsToken(mix=0.0))
    loop.begin()
    with pytest.raises(StructureError, match=r"labels must be \[B, T\], one for each token .* got \[2\]"):
        loop.before_forward({"labels": torch.tensor([0, 1])})


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ParameterError, match=r"attention_layer must be in \[-2, 1\] for 2 layers .*, got 2"):
        sal.loop(tiny_llama(), sal.SsToken(attention_layer=2))


@pytest.mark.parametrize("kind", ["base", "lora", "pissa", "ema", "file", "warm-up", "checkpointing"])
def test_a_resumed_run_continues_exactly(kind, tmp_path):
    samples = ragged_samples(8)
    method = {
        "ema": lambda: sal.SsToken(keep=0.5, history="ema", ema_decay=0.7),
        "file": lambda: sal.SsToken(keep=0.5, history=str(tmp_path / "h.safetensors")),
        "warm-up": lambda: sal.SsToken(keep=0.5, attention_only_until=9),
    }.get(kind, lambda: sal.SsToken(keep=0.5))()
    if kind == "file":
        history_losses(tiny_llama(seed=4), [collate(samples)]).save(tmp_path / "h.safetensors")
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings["gradient_checkpointing"] = kind == "checkpointing"

    def trainer(name):
        model = tiny_llama(attention_dropout=0.2)
        if kind in ("lora", "pissa"):
            model = with_lora(model, init_lora_weights="pissa" if kind == "pissa" else True)
        made = tiny_trainer(tmp_path / name, model, samples, **settings)
        return made, sal.focus(made, method)

    torch.manual_seed(11)
    whole, handle = trainer("whole")
    whole.train()
    torch.manual_seed(12)
    again, other = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_of(again)[-3:] == losses_of(whole)[-3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert other.spent == handle.spent
    (a,), (b,) = ([h.values() for h in part.histories.values()] for part in (*handle.parts, *other.parts))
    assert torch.equal(a, b)


def test_resuming_with_another_file_is_refused(tmp_path):
    samples, path = ragged_samples(8), tmp_path / "h.safetensors"
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    method = sal.SsToken(keep=0.5, history=str(path))
    history_losses(tiny_llama(seed=4), [collate(samples)]).save(path)
    trainer = tiny_trainer(tmp_path / "a", samples=samples, **settings)
    with sal.focus(trainer, method):
        trainer.train()
    history_losses(tiny_llama(seed=5), [collate(samples)]).save(path)
    again = tiny_trainer(tmp_path / "b", samples=samples, **settings)
    sal.focus(again, method)
    with pytest.raises(ParameterError, match="history must be the file that the stored run used"):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_the_whole_training_set_is_measured_once(tmp_path):
    trainer = tiny_trainer(tmp_path, samples=ragged_samples(7))
    with sal.focus(trainer, sal.SsToken(keep=0.5)) as handle:
        assert handle.spent["sstoken"] == {} and handle.scores == {}
        trainer.train()
        spent = handle.spent["sstoken"]
        assert spent["extra forward passes"] == 4
        assert spent["share kept"] == pytest.approx(spent["kept"] / spent["response tokens"], abs=1e-4)
        assert set(handle.scores) == {"sstoken.score", "sstoken.excess_loss", "sstoken.attention"}


def test_evaluation_does_not_move_the_counts(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with sal.focus(trainer, sal.SsToken(keep=0.5)) as handle:
        trainer.train()
        before = handle.spent
        trainer.evaluate(Listed(ragged_samples(4, seed=2)))
        assert handle.spent == before and handle.parts[0]._seen == 6
