"""Every method on key blocks in every family of decoders: keeping all changes nothing, rows are on their own."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_llava
from decoder_families import FAMILIES, prompts

import salience as sal
from salience.core.errors import ConflictError, StructureError
from salience.core.registry import entries

sys.path.insert(0, str(Path(__file__).parent / "methods"))
SLUGS = sorted(slug for slug, entry in entries().items() if entry.unit == "key")


def contract(slug):
    return importlib.import_module(f"test_{slug.replace('-', '_')}").CONTRACT


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


def real(batch):
    return batch["attention_mask"].bool()


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_dense_attention(family, slug):
    """Ragged batches padded on either side, one row, a prompt in chunks, new tokens, and the model as it was."""
    model, method = FAMILIES[family](), contract(slug)["keep_all"]
    one = prompts((90,))
    for batch in (prompts(), prompts(side="right"), one):
        plain = logits(model, batch)
        with sal.focus(model, method) as handle:
            read = logits(model, batch)
            spent = handle.spent[slug]
        torch.testing.assert_close(read[real(batch)], plain[real(batch)], rtol=0, atol=2e-5)
        assert spent["prompts"] == len(plain) and spent["tokens"] == int(real(batch).sum())
        assert torch.equal(logits(model, batch), plain), "something was left behind"
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**prompts(), **options)
    with sal.focus(model, method):
        assert torch.equal(model.generate(**prompts(), **options), expected)
        chunked = chunks(model, one["input_ids"], (40, 1, 30))
    torch.testing.assert_close(chunked, plain[:, -19:], rtol=0, atol=2e-5)


def chunks(model, ids, cuts):
    """A prompt read in pieces into the same cache; the logits of the last."""
    from transformers import DynamicCache

    # a sliding window's own cache is part of what is tested
    cache, start = DynamicCache(config=model.config), 0
    with torch.no_grad():
        for cut in (*cuts, ids.shape[1] - sum(cuts)):
            out = model(input_ids=ids[:, start : start + cut], past_key_values=cache, use_cache=True)
            start += cut
    return out.logits


@pytest.mark.parametrize("slug", SLUGS)
def test_rows_do_not_see_padding_or_each_other(slug):
    """A ragged batch gives what each row gives alone."""
    model, method = contract(slug)["model"](), contract(slug)["method"]
    batch = contract(slug)["inputs"]()
    # as generate counts them: a row's own positions, so that rounded codes are the same alone and beside others
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    plain = logits(model, batch)
    with sal.focus(model, method) as handle:
        read = logits(model, batch)
        assert handle.spent[slug]["kept share"] < 1 or slug == "dense-attention"
        for row, mask in enumerate(real(batch)):
            alone = logits(model, {"input_ids": batch["input_ids"][row : row + 1, mask]})
            torch.testing.assert_close(read[row : row + 1, mask], alone, rtol=0, atol=2e-5)
    if slug != "dense-attention":
        assert (read - plain)[real(batch)].abs().max() > 1e-4, "the method drops nothing here"


# whose choice itself is causal from one block of queries to the next, and how far
CAUSAL = {
    "block-top-k": sal.BlockTopK(keep=0.3, q_block=16, k_block=8),
    "dense-attention": sal.DenseAttention(),
    "dhsa": sal.DHSA(
        chunks="uniform", budget=24, q_block=16, local=8, global_tokens=4, instruction_tokens=0, chunk_beta=4
    ),
    "hip": sal.HiP(mask_k=16, q_block=16, window=8, sink_tokens=2, dense_layers=0),
    "sale": sal.SALE(
        tau=0.5, q_block=16, k_block=8, local_window=24, segment=8, dense_below=0, centre="prefix"
    ),
    "streaming-llm": sal.StreamingLLM(sinks=2, window=12),
}


@pytest.mark.parametrize("slug", SLUGS)
def test_what_comes_later_changes_nothing(slug):
    """Later tokens, from the next block of queries on; what DHSA learns and SALE's means look at whole prompts."""
    model, batch = tiny_llama(layers=3).eval(), prompts((96, 96))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 64:] = 5
    with sal.focus(model, CAUSAL[slug]) as handle:
        before = logits(model, batch)
        assert slug == "dense-attention" or handle.spent[slug]["kept share"] < 0.9
        after = logits(model, changed)
    torch.testing.assert_close(after[:, :64], before[:, :64], rtol=0, atol=1e-6)
    assert (after[:, 64:] - before[:, 64:]).abs().max() > 1e-3


_MEMORY = """
import resource, sys, torch
import salience as sal
from salience import kernels
from salience.hosts.prefill import Prompt
torch.set_num_threads(1)
length, method = int(sys.argv[1]), eval("sal." + sys.argv[2])
draw = torch.Generator().manual_seed(0)
query, key, value = (torch.randn(1, heads, length, 16, generator=draw) for heads in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    blocks = method.choose(Prompt(query, key, value, 0.25, None, 9, 10, {}, {}))
    kernels.attend(query, key, value, blocks, scaling=0.25)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, float(blocks.share().mean()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "length", "most"),
    [
        (sal.StreamingLLM(), 131072, 300),
        (sal.BlockTopK(keep=16, q_block=128, k_block=128), 131072, 300),
        (sal.HiP(mask_k=256, q_stride=16, k_block=4), 131072, 300),
        (sal.DHSA(chunks="uniform", budget=512), 131072, 400),
        # every pair is estimated, which takes its time
        (sal.SALE(tau=1e6), 32768, 150),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, int) else "",
)
def test_memory_of_choosing_and_attending_is_linear(method, length, most):
    """128K tokens: a map of T x T in bits would take 2 GiB for each head, 4 GiB for both; in floats 128 GiB."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(length), repr(method)], capture_output=True, text=True, check=True
    )
    mebibytes, share = map(float, done.stdout.split())
    assert share < 0.05
    assert mebibytes < most, f"{mebibytes} MiB"


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_implementation_in_force_makes_no_difference(slug, attn):
    batch, method = contract(slug)["inputs"](), contract(slug)["method"]
    model = contract(slug)["model"]()
    with sal.focus(model, method):
        expected = logits(model, batch)
    model.set_attn_implementation(attn)
    with sal.focus(model, method):
        read = logits(model, batch)
    torch.testing.assert_close(read[real(batch)], expected[real(batch)], rtol=0, atol=2e-5)


@pytest.mark.parametrize("slug", SLUGS)
def test_it_shows_what_was_kept(slug, tmp_path):
    from PIL import Image

    model, batch = contract(slug)["model"](), contract(slug)["inputs"]()
    with sal.focus(model, contract(slug)["method"]) as handle:
        logits(model, batch)
        for name, value in handle.scores.items():
            if name.endswith(("kept share", "recall")):
                assert bool(((value >= 0) & (value <= 1 + 1e-6)).all()), name
        spent = handle.spent[slug]
        assert 0 < spent["kept share"] <= 1 and 0 < spent["estimated recall"] <= 1 + 1e-6
        assert spent["kernel"]
        handle.plot(tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as picture:
        assert min(picture.size) > 200


def test_padding_is_seen_where_the_name_has_no_builder_of_masks():
    """An attention function of the user's own without its twin in the table of masks loses the padding; not here."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    batch, model = prompts(), FAMILIES["llama"]()
    expected = logits(model, batch)
    AttentionInterface.register("users_own", sdpa_attention_forward)
    try:
        model.set_attn_implementation("users_own")
        silent = logits(model, batch)
        assert (silent - expected)[real(batch)].abs().max() > 1e-2, (
            "the trap is gone: transformers masks by itself"
        )
        with sal.focus(model, sal.DenseAttention()):
            read = logits(model, batch)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["users_own"]
    torch.testing.assert_close(read[real(batch)], expected[real(batch)], rtol=0, atol=2e-5)


def test_another_model_of_the_same_config_is_left_alone():
    """Models made from one config object share its attention setting; a focus is on one model."""
    from transformers import LlamaForCausalLM

    first = FAMILIES["llama"]()
    second = LlamaForCausalLM(first.config).eval()
    assert second.config is first.config
    batch = prompts((200,))
    before = logits(second, batch)
    with sal.focus(first, sal.StreamingLLM(sinks=1, window=8)):
        assert torch.equal(logits(second, batch), before)
        twin = copy.deepcopy(first)
        focused = logits(first, batch)
    # a copy of a focused model is as the model was
    assert torch.equal(logits(twin, batch), logits(first, batch))
    assert not torch.allclose(focused, logits(first, batch))


def test_a_mask_of_all_rows_is_read_or_refused():
    model = FAMILIES["llama"]()
    batch = prompts()
    length = batch["input_ids"].shape[1]
    plain = real(batch)[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    additive = torch.zeros(plain.shape).masked_fill(~plain, torch.finfo(torch.float32).min)
    with sal.focus(model, sal.StreamingLLM(sinks=2, window=16)):
        expected = logits(model, batch)
        for mask in (plain, additive):
            read = logits(model, {**batch, "attention_mask": mask})
            torch.testing.assert_close(read[real(batch)], expected[real(batch)], rtol=0, atol=2e-5)
        other = plain.clone()
        other[0, 0, 60, 50] = False
        with pytest.raises(
            StructureError, match="attention mask must be that of causal or sliding attention"
        ):
            logits(model, {**batch, "attention_mask": other})


def test_a_cache_that_is_longer_than_what_it_holds():
    from transformers import StaticCache

    model, batch = FAMILIES["llama"](), prompts((90,))
    for method in (sal.StreamingLLM(sinks=2, window=16), sal.BlockTopK(keep=0.3, q_block=8, k_block=8)):
        with sal.focus(model, method):
            expected = logits(model, batch)
            cache = StaticCache(config=model.config, max_cache_len=128)
            read = logits(model, {"input_ids": batch["input_ids"]}, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(read, expected, rtol=0, atol=2e-5)


def test_a_slower_kernel_is_told_once(monkeypatch):
    from salience import kernels

    monkeypatch.setattr(kernels, "which", lambda *_, **__: ("gather", "triton is not installed"))
    model, batch = FAMILIES["llama"](), prompts()
    with sal.focus(model, sal.StreamingLLM(window=16)) as handle:
        with pytest.warns(UserWarning, match="runs by gather: triton is not installed") as told:
            logits(model, batch)
            logits(model, batch)
        assert handle.spent["streaming-llm"]["kernel"] == "gather"
    assert len([one for one in told if "runs by" in str(one.message)]) == 1


def test_gradients_flow_through_what_is_seen():
    model, batch = FAMILIES["llama"](), prompts()
    with sal.focus(model, sal.BlockTopK(keep=0.3, q_block=16, k_block=8)):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    assert float(gradients["model.layers.0.self_attn.k_proj.weight"].abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, batch = FAMILIES["llama"]().to(dtype), prompts()
    plain = logits(model, batch)
    with sal.focus(model, sal.DenseAttention(listed=True, block=16)):
        read = logits(model, batch)
    assert read.dtype == dtype
    torch.testing.assert_close(read[real(batch)], plain[real(batch)], rtol=0, atol=3e-2)


def _family(config, model, **settings):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


REFUSED = {
    "bidirectional": (
        lambda: _family(
            "BertConfig", "BertModel", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64,
        ),
        "got bidirectional attention in layer 0|bidirectional",
    ),
    "cross": (
        lambda: _family(
            "BartConfig", "BartForConditionalGeneration", vocab_size=64, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128,
        ),
        "with an encoder, whose attention is bidirectional",
    ),
    "ALiBi": (
        lambda: _family("BloomConfig", "BloomForCausalLM", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "BloomAttention computes it by itself",
    ),
    "latent": (
        lambda: _family(
            "DeepseekV3Config", "DeepseekV3ForCausalLM", vocab_size=64, hidden_size=32, intermediate_size=64,
            moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        ),
        r"latent attention \(MLA\)",
    ),
    "sinks": (
        lambda: _family(
            "GptOssConfig", "GptOssForCausalLM", vocab_size=64, hidden_size=32, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "learned attention sinks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_refused_at_once(kind):
    make, text = REFUSED[kind]
    with pytest.raises(StructureError, match=text):
        sal.focus(make(), sal.StreamingLLM())


def test_two_at_once_are_refused():
    model = tiny_llama().eval()
    with sal.focus(model, sal.StreamingLLM()), pytest.raises(ConflictError, match="one method at a time"):
        sal.focus(model, sal.BlockTopK())
    llava = tiny_llava()
    with sal.focus(llava, sal.FastV()), pytest.raises(ConflictError, match="one method at a time"):
        sal.focus(llava, sal.StreamingLLM())
    with sal.focus(llava, sal.StreamingLLM()), pytest.raises(ConflictError, match="one method at a time"):
        sal.focus(llava, sal.FastV())


def test_dropout_is_refused_when_it_acts():
    model = tiny_llama(attention_dropout=0.1).train()
    with (
        sal.focus(model, sal.StreamingLLM()),
        pytest.raises(ConflictError, match=r"attention dropout must be 0 .* got 0.1: model.eval\(\)"),
    ):
        model(**prompts())


def test_positions_of_ones_own_do_not_matter_to_gpt2_in_double():
    model = tiny_gpt2().eval()
    batch = prompts((100, 70))
    plain = logits(model, batch)
    with sal.focus(model, sal.DenseAttention(listed=True, block=16)):
        read = logits(model, batch)
    torch.testing.assert_close(read[real(batch)], plain[real(batch)], rtol=0, atol=1e-10)
