"""AttentionInfluence: the heads that copy are found, switched off without a trace, and missed where they matter."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from corpora import small_corpus, tiny_reader, tiny_tokenizer
from decoder_families import FAMILIES

import salience as sal
from salience.core.documents import Documents, Reading
from salience.core.errors import ParameterError, StructureError
from salience.core.token_scores import nll
from salience.hosts.head_masks import Fork, check_heads
from salience.hosts.language import TokenMeter
from salience.methods.samples._attention_influence_probes import probes
from salience.methods.samples.attention_influence import detect, hits, important, score

HEADS = ((0, 1), (1, 3))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / "cache"))


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(12)})


def _method(**settings):
    return sal.AttentionInfluence(
        **{"model": tiny_reader(), "heads": HEADS, "min_tokens": 2, "keep": 4, **settings}
    )


CONTRACT = {
    "method": sal.AttentionInfluence(keep=0.3, heads=((1, 0),), mask_mode="zero"),
    "picks": _method,
    "dataset": _dataset,
    "bad": {
        "keep": (1.5, r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"),
        "head_fraction": (1.0, r"head_fraction must be in \(0, 1\), got 1.0"),
        "heads": (((1, 2, 3),), "heads must be pairs of a layer and a head, both >= 0"),
        "mask_mode": ("uniform_full", "mask_mode must be one of uniform, zero, got 'uniform_full'"),
        "normalise": ("all", "normalise must be one of base, ref, none, got 'all'"),
        "loss_floor": (0.0, "loss_floor must be > 0 and finite, got 0.0"),
        "min_tokens": (1, "min_tokens must be >= 2, got 1"),
        "probes": (0, "probes must be >= 1, got 0"),
        "probe_length": (1, "probe_length must be >= 2, got 1"),
        "shots": (-1, "shots must be >= 0, got -1"),
        "seed": (-1, "seed must be >= 0, got -1"),
    },
}


def batch(lengths=(9, 14, 20), vocab=64, seed=0):
    """Right-padded ids and labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, vocab, (length,), generator=draw)
        labels[row, :length] = ids[row, :length]
    return ids, labels


def losses(model, ids, labels, heads, mode="uniform"):
    """Of the intact and of the weakened pass, [B, T] each."""
    fork, meter = Fork(model, heads, mode), TokenMeter(model)
    with fork.intact():
        base = meter(ids, labels, {"loss": nll})["loss"]
    with fork.weakened():
        return base, meter(ids, labels, {"loss": nll})["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_intact_pass_is_the_plain_model_in_every_family(family):
    model = FAMILIES[family]()
    ids, labels = batch((60, 70, 80))
    plain = TokenMeter(model)(ids, labels, {"loss": nll})["loss"]
    base, ref = losses(model, ids, labels, check_heads(model, [(1, 2)]))
    real = ~plain.isnan()
    assert torch.equal(base[real], plain[real])
    assert int(real.sum()) == 60 + 70 + 80 - 3
    assert not torch.allclose(ref[real], plain[real], atol=1e-6)
    # without heads nothing changes, bit for bit
    for one in losses(model, ids, labels, {}):
        assert torch.equal(one[real], plain[real])
    again = TokenMeter(model)(ids, labels, {"loss": nll})["loss"]
    assert torch.equal(again[real], plain[real]), "the hooks are gone"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_masked_head_puts_out_the_mean_of_what_it_sees(family, rows):
    """Against the attention function itself: the head's output is captured in front of the output projection."""
    from salience.core.attach import Attachment
    from salience.hosts.attention import attention_module, intercept

    model = FAMILIES[family]()
    ids, labels = batch((70, 75, 80)[:rows])
    outputs, calls = [], []

    def seen(call, original):
        calls.append(call)
        output = original()
        outputs.append(output[0])
        return output

    record = Attachment()
    intercept(attention_module(model, 1), record, seen)
    losses(model, ids, labels, check_heads(model, [(1, 2)]))
    record.undo()
    # a model that caps its logits is run once more to see that it does
    call, intact, mixed = calls[0], outputs[0], outputs[-1]
    value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)[:, 2]
    length = value.shape[1]
    window = call.options.get("sliding_window")
    places = torch.arange(length)
    visible = places[None, :] <= places[:, None]
    if window is not None:
        visible &= places[None, :] > places[:, None] - window
    wanted = (visible / visible.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(mixed[:, :, 2], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(intact[:, :, 2], wanted, atol=1e-4), "the intact pass keeps its pattern"


def test_the_worked_mean():
    from salience.hosts.attention import AttentionCall
    from salience.hosts.head_masks import attend

    query, value = torch.randn(1, 1, 3, 4), torch.tensor([1.0, 3.0, 8.0]).view(1, 1, 3, 1)
    call = AttentionCall(torch.nn.Identity(), query, torch.randn(1, 1, 3, 4), value, None, 0.5, {})
    assert attend(call, off=[0]).flatten().tolist() == pytest.approx([1.0, 2.0, 4.0])


def test_zero_mode_takes_the_output_away():
    model = tiny_llama().eval()
    ids, labels = batch()
    _, ref = losses(model, ids, labels, {1: [2]}, "zero")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
    plain = TokenMeter(model)(ids, labels, {"loss": nll})["loss"]
    torch.testing.assert_close(ref, plain, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_later_tokens_change_nothing_before_them():
    model = tiny_llama().eval()
    ids, labels = batch((20,))
    _, ref = losses(model, ids, labels, {0: [1], 1: [3]})
    other = ids.clone()
    other[0, 15:] = 5
    _, changed = losses(model, other, other, {0: [1], 1: [3]})
    assert torch.equal(ref[0, 1:15], changed[0, 1:15]) and not torch.equal(ref[0, 15:], changed[0, 15:])


def test_attention_with_sinks_is_uniform_too():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention"] * 2, attn_implementation="eager",
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks.fill_(4.0)
    ids, labels = batch((20,))
    attention, values, outputs = model.model.layers[1].self_attn, [], []
    attention.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    attention.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    base, ref = losses(model, ids, labels, {1: [2]})
    value, (intact, output) = values[0][:, :, 8:], [one[:, :, 16:24] for one in outputs]
    uniform = value.cumsum(1) / torch.arange(1, value.shape[1] + 1).view(1, -1, 1)
    torch.testing.assert_close(output, uniform, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(intact, uniform, atol=1e-3), "the sink takes its share"
    assert not torch.allclose(base[:, 1:], ref[:, 1:])


def test_the_lower_layers_run_once_and_the_second_pass_is_of_the_same_batch():
    model = tiny_llama().eval()
    ids, labels = batch()
    runs = [0] * len(model.model.layers)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda *_, place=place: runs.__setitem__(place, runs[place] + 1)
        )
    last = len(runs) - 1
    fork, meter = Fork(model, {last: [2]}), TokenMeter(model)
    with pytest.raises(StructureError, match="must follow an intact one, got none"), fork.weakened():
        pass
    with fork.intact():
        meter(ids, labels, {"loss": nll})
    before = list(runs)
    with fork.weakened():
        meter(ids, labels, {"loss": nll})
    assert [after - some for after, some in zip(runs, before)] == [0] * last + [1]
    with pytest.raises(StructureError, match="must be of the intact one's batch"), fork.weakened():
        meter(ids[:2], labels[:2], {"loss": nll})
    # a masked head of every layer: the rest of the computation is a whole pass
    torch.testing.assert_close(
        losses(model, ids, labels, {0: [], last: [2]})[1], losses(model, ids, labels, {last: [2]})[1],
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


def test_after_an_exception_nothing_is_left():
    model = tiny_llama().eval()
    ids, _ = batch()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    fork = Fork(model, {1: [1]})
    with pytest.raises(RuntimeError, match="inside"), fork.intact():
        model(input_ids=ids)
        raise RuntimeError("inside")
    with pytest.raises(RuntimeError, match="inside"), fork.weakened():
        raise RuntimeError("inside")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_hits_are_counted_as_in_the_worked_example():
    prompt, produced = torch.tensor([9, 5, 6, 7, 8, 4, 3]), torch.tensor([5, 6, 7, 8, 4])
    strongest = torch.tensor([1, 2, 0, 6, 1]).view(
        5, 1, 1
    )  # two right, one outside, one outside, one wrong token
    assert hits(strongest, prompt, produced, (1, 6)).item() == pytest.approx(0.4)
    perfect = torch.tensor([1, 2, 3, 4, 5]).view(5, 1, 1)
    assert hits(perfect, prompt, produced, (1, 6)).item() == pytest.approx(1.0)


def test_the_important_heads_are_the_best_with_ties_to_the_front():
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.9, 0.1, 0.1]])
    assert important(scores, 0.05) == [(0, 1)]
    assert important(scores, 0.5) == [(0, 0), (0, 1), (1, 0)]
    assert important(torch.zeros(2, 3), 0.34) == [(0, 0), (0, 1)]
    with pytest.raises(
        ParameterError, match=r"head_fraction must leave heads of the model's 6 in force, got 0.95"
    ):
        important(scores, 0.95)


def test_probes_hold_the_answer_where_they_say():
    tokenizer = _word_tokenizer()
    made = probes(tokenizer, 5, 900, shots=3, seed=1)
    for probe in made:
        start, end = probe.passage
        assert (
            len(probe.ids) <= 900
            and probe.ids[start:end] == probe.ids[probe.answer :]
            and end <= probe.answer
        )
        text = tokenizer.decode(probe.ids)
        assert text.count("The value of") == 4 and text.startswith('<bos>{"')
    assert made == probes(tokenizer, 5, 900, shots=3, seed=1) != probes(tokenizer, 5, 900, shots=3, seed=2)
    with pytest.raises(
        ParameterError, match="probe_length must be enough for 4 pairs of keys and sentences, got 60"
    ):
        probes(tokenizer, 1, 60)


def _word_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: place for place, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    tokens = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", pad_token="<pad>")


def test_detection_counts_what_the_attention_rows_say():
    """Against transformers' own attention maps and the pure function."""
    from salience.methods.samples.attention_influence import retrieval_score

    model = tiny_llama(vocab=300, attn_implementation="eager").eval()
    model.config.max_position_embeddings = 600
    asked = probes(_word_tokenizer(), 3, 600, shots=0, seed=1)
    found = detect(model, asked)
    wanted = torch.zeros(2, 4)
    for probe in asked:
        ids = torch.tensor([probe.ids])
        with torch.no_grad():
            maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0]
        rows = maps[:, :, probe.answer - 1 : -1].permute(2, 0, 1, 3)
        wanted += retrieval_score(rows, ids[0, : probe.answer], ids[0, probe.answer :], probe.passage) / 3
    torch.testing.assert_close(found, wanted)
    assert found.shape == (2, 4) and float(found.min()) >= 0 and float(found.max()) <= 1


def test_detection_is_done_once_for_a_model(monkeypatch, tmp_path):
    from salience.methods.samples import attention_influence as module

    tokenizer = _word_tokenizer()
    model = tiny_llama(vocab=300).eval()
    model.config.max_position_embeddings = 600
    method = sal.AttentionInfluence(probes=2, shots=0, head_fraction=0.2)
    first = method.retrieval_heads(model, tokenizer)
    assert len(first) == 2
    stored = list((tmp_path / "cache" / "retrieval-heads").iterdir())
    assert len(stored) == 1 and torch.tensor(json.loads(stored[0].read_text())).shape == (2, 4)
    monkeypatch.setattr(module, "detect", lambda *_: pytest.fail("was found already"))
    assert method.retrieval_heads(model, tokenizer) == first
    monkeypatch.setattr(module, "detect", lambda model, asked: torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]]))
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    assert method.retrieval_heads(model, tokenizer) == [(0, 1), (1, 3)], "another model is asked anew"
    assert replace(method, seed=3).retrieval_heads(model, tokenizer) == [(0, 1), (1, 3)]


def test_scores_a_dataset_by_the_relative_rise():
    data = _dataset()
    handle = sal.focus(data, _method())
    model, tokenizer = tiny_reader()
    wanted = []
    for text in data["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        base, ref = (float(half[:, 1:].mean()) for half in losses(model, ids, ids, check_heads(model, HEADS)))
        wanted.append((ref - base) / base)
    found = handle.scores["attention-influence.score"].tolist()
    assert found == pytest.approx(wanted, rel=1e-2, abs=2e-6)
    ranked = sorted(range(12), key=lambda place: -found[place])
    assert [data["text"].index(text) for text in handle.dataset["text"]] == sorted(ranked[:4])


def test_packing_and_padding_change_nothing():
    data = _dataset()
    whole, alone = (
        sal.focus(data, _method(), data=Reading(batch_tokens=tokens)).scores["attention-influence.score"]
        for tokens in (8192, 1)
    )
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=2e-6)


def test_short_documents_are_left_out_and_counted():
    handle = sal.focus(_dataset(), _method(min_tokens=40, keep=1.0))
    spent = handle.spent["attention-influence"]
    tokenizer = tiny_tokenizer()
    short = sum(len(tokenizer(text)["input_ids"]) < 40 for text in small_corpus(12))
    assert 0 < short < 12 and spent["short"] == spent["unscored"] == short and spent["kept"] == 12 - short


def test_the_score_of_the_worked_example():
    base, ref = torch.tensor([2.0, 0.01, math.nan]), torch.tensor([2.3, 0.06, 1.0])
    assert score(base, ref)[:2].tolist() == pytest.approx([0.15, 1.0])
    assert float(score(base, ref, normalise="ref")[0]) == pytest.approx(0.3 / 2.3)
    assert float(score(base, ref, normalise="none")[0]) == pytest.approx(0.3)
    assert math.isnan(float(score(base, ref)[2]))
    draw = torch.Generator().manual_seed(0)
    base, ref = 1 + torch.rand(50, generator=draw), 1 + torch.rand(50, generator=draw)
    orders = [score(base, ref, normalise=name).argsort().tolist() for name in ("base", "ref")]
    assert orders[0] == orders[1]


def test_heads_that_are_not_there_are_refused():
    with pytest.raises(
        ParameterError, match=r"heads must be \(layer, head\) of a model of 2 layers with 4 heads, got"
    ):
        sal.focus(_dataset(), _method(heads=((2, 0),)))


def test_a_batch_scores_alone_as_it_does_in_a_dataset():
    model, tokenizer = tiny_reader()
    ids, labels = batch((9, 20), vocab=30)
    lengths = torch.tensor([9, 20])
    documents = Documents(ids, labels, lengths, lengths, torch.arange(2))
    found = _method().scorer(model, tokenizer)(documents)
    assert sorted(found) == ["floored", "loss", "masked_loss", "score", "short"]
    torch.testing.assert_close(found["score"], (found["masked_loss"] - found["loss"]) / found["loss"])
