"""Cutting heads and channels: masked and sliced models agree in every family, and load where salience is not."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_llava, with_lora
from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, TargetError
from salience.hosts.cutting import (
    Originals,
    cut,
    dense_weight,
    find_units,
    hang_masks,
    refuse_saving,
    refuse_uncuttable,
    sayable,
)

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def randomised(model, seed=1):
    """Biases and norms are constant in a new model: make them count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()


def decoder(name, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, max_position_embeddings=64, **{**SIZES, "num_key_value_heads": 2, **settings}
    )
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return randomised(BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=64, **SIZES)))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return randomised(
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **SIZES))
    )


def gpt2():
    return randomised(tiny_gpt2(layers=3))


FAMILIES = {
    "llama": lambda: decoder("Llama", attention_bias=True, mlp_bias=True),
    "qwen2": lambda: decoder("Qwen2"),
    "qwen3": lambda: decoder("Qwen3", head_dim=12),
    "mistral": lambda: decoder("Mistral"),
    "phi3": lambda: decoder("Phi3", pad_token_id=0),
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
}
# families whose config ties the heads to the hidden size
ONLY_CHANNELS = {"gpt2", "bert"}


def inputs(name):
    draw = torch.Generator().manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    ids = torch.randint(3, 64, (2, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, name):
    return model(**inputs(name)).logits


def choice(units, seed=0):
    """Another half of the units in each layer."""
    draw = torch.Generator().manual_seed(seed)
    count = units.total // 2
    return [torch.randperm(units.total, generator=draw)[:count].sort().values for _ in units.groups]


@pytest.mark.parametrize("kind", ["heads", "channels"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_masked_model_and_a_cut_one_give_the_same(name, kind):
    model = FAMILIES[name]()
    whole = logits(model, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    units = find_units(model, kind)
    rows, record, own = choice(units), Attachment(), Attachment()
    masks = [torch.zeros(units.total, dtype=torch.bool).index_fill(0, row, True) for row in rows]
    hang_masks(units, masks, record)
    masked = logits(model, name)
    record.undo()
    assert not torch.allclose(masked, whole, atol=1e-3)
    config = model.config.to_dict()
    cut(model, {kind: rows}, Originals(own))
    torch.testing.assert_close(logits(model, name), masked, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(v.numel() for v in before.values())
    assert find_units(model, kind).total == units.total // 2
    own.undo()
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, name), whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_of_the_inputs_is_one_of_all_other_projections(name):
    """Rows of q, k, v (up and gate) set to 0, bias included, are what the mask stands for."""
    for kind in ("heads", "channels"):
        model = FAMILIES[name]()
        units = find_units(model, kind)
        rows = choice(units)
        masks = [torch.zeros(units.total, dtype=torch.bool).index_fill(0, row, True) for row in rows]
        record = Attachment()
        hang_masks(units, masks, record)
        masked = logits(model, name)
        record.undo()
        with torch.no_grad():
            for group, mask in zip(units.groups, masks):
                for side in group.sides[:-1]:
                    gone = side.index[~mask].flatten()
                    dense_weight(side.place.module)[gone] = 0
                    if side.place.module.bias is not None:
                        side.place.module.bias[gone] = 0
        torch.testing.assert_close(logits(model, name), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_can_say(name):
    model = FAMILIES[name]()
    random = torch.get_rng_state()
    heads, channels = (find_units(model, kind) for kind in ("heads", "channels"))
    assert sayable(model, channels, 16) == 16
    half = heads.total // 2
    assert sayable(model, heads, half) == (None if name in ONLY_CHANNELS else half)
    assert sayable(model, heads, heads.total) == heads.total
    assert torch.equal(torch.get_rng_state(), random)


def test_a_number_that_the_config_class_refuses_is_rounded_up():
    model = decoder("Llama", hidden_size=48, num_attention_heads=8, num_key_value_heads=8, head_dim=6)
    # Llama wants the hidden size to be a multiple of the heads: 5 and 7 are none, 8 is all
    units = find_units(model, "heads")
    assert [sayable(model, units, wanted) for wanted in (3, 4, 5, 7)] == [3, 4, 6, 8]


def test_groups_of_query_heads_go_together():
    model = decoder("Llama")
    units = find_units(model, "heads")
    assert (units.total, units.heads, units.dim) == (2, 2, 8)
    sides = {side.role: side.index.tolist() for side in units.groups[0].sides}
    assert sides["q"] == [list(range(16)), list(range(16, 32))] == sides["o"]
    assert sides["k"] == [list(range(8)), list(range(8, 16))] == sides["v"]


def test_fused_projections_are_cut_in_all_their_parts():
    model = gpt2()
    units = find_units(model, "heads")
    sides = {side.role: side.index[1].tolist() for side in units.groups[0].sides}
    assert sides["q"] == list(range(8, 16)) and sides["k"] == list(range(40, 48))
    assert sides["v"] == list(range(72, 80)) and sides["o"] == list(range(8, 16))


LOADS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "salience":
            raise ImportError("salience is not here")

sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file

try:
    import salience
    raise SystemExit("salience could be imported")
except ImportError:
    pass
for argument in sys.argv[1:]:
    folder, _, cls = argument.partition("=")
    model = getattr(transformers, cls).from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        found = model(**load_file(folder + "/inputs.st")).logits
    save_file({"logits": found}, folder + "/logits.st")
"""


@pytest.mark.slow
def test_cut_models_load_where_salience_is_not(tmp_path):
    from safetensors.torch import load_file, save_file

    models, arguments = {name: make() for name, make in FAMILIES.items()}, []
    for name, model in models.items():
        kinds = ("channels",) if name in ONLY_CHANNELS else ("heads", "channels")
        cut(model, {kind: choice(find_units(model, kind)) for kind in kinds}, Originals())
        model.save_pretrained(tmp_path / name)
        save_file(inputs(name), str(tmp_path / name / "inputs.st"))
        arguments.append(f"{tmp_path / name}={type(model).__name__}")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *arguments], check=False, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, model in models.items():
        found = load_file(str(tmp_path / name / "logits.st"))["logits"]
        torch.testing.assert_close(
            found, logits(model, name), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_tied_embeddings_stay_tied(tmp_path):
    from transformers import LlamaForCausalLM

    model = decoder("Llama", tie_word_embeddings=True)
    cut(model, {kind: choice(find_units(model, kind)) for kind in ("heads", "channels")}, Originals())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_key_value_heads == 1 and again.config.intermediate_size == 24
    assert again.config.head_dim == 8 and again.config.num_attention_heads == 2
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"), rtol=0, atol=1e-6)


def test_a_cut_model_generates():
    model = decoder("Qwen3", head_dim=12, eos_token_id=None)
    cut(model, {kind: choice(find_units(model, kind)) for kind in ("heads", "channels")}, Originals())
    ids = inputs("qwen3")["input_ids"][:1]
    whole = ids
    for _ in range(4):
        with torch.no_grad():
            whole = torch.cat((whole, model(input_ids=whole).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), whole)


def test_units_are_found_under_peft():
    model = with_lora(tiny_llama(), targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    units = find_units(model, "heads")
    assert units.total == 2 and units.groups[0].sides[0].place.path.startswith(
        "base_model.model.model.layers.0."
    )
    assert find_units(model, "channels").total == 64


# --- refusals ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(TargetError, match="model must be a transformers model"):
        refuse_uncuttable(nn.Linear(2, 2))
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ConflictError, match=r"float weights to be cut, got integers in model.layers.0.mlp.up_proj"
    ):
        refuse_uncuttable(model)
    model = tiny_llama()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ConflictError, match="got bitsandbytes weights"):
        refuse_uncuttable(model)


def test_layouts_that_are_not_understood_are_refused():
    import transformers

    neox = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=64, max_position_embeddings=64, **SIZES)
    )
    with pytest.raises(StructureError, match=r"all queries, then keys, then values.*query_key_value"):
        find_units(neox, "heads")
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **SIZES)
    )
    with pytest.raises(StructureError, match=r"one dense or gated feed-forward network.*got experts"):
        find_units(mixture, "channels")
    assert find_units(mixture, "heads").total == 2
    olmo = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(vocab_size=64, pad_token_id=0, **SIZES))
    with pytest.raises(StructureError, match=r"only projections and norms inside of one head.*q_norm.weight"):
        find_units(olmo, "heads")
    assert find_units(olmo, "channels").total == 48
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    )
    with pytest.raises(StructureError, match="to cut units out of it"):
        find_units(t5, "heads")


def test_weights_shared_between_layers_are_refused():
    model = decoder("Llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(StructureError, match=r"weights of their own in every layer.*layers.1.mlp.up_proj"):
        find_units(model, "channels")


def test_layers_of_different_widths_live_in_memory_and_are_not_saved(tmp_path):
    model = decoder("Llama")
    units, own = find_units(model, "channels"), Attachment()
    rows = [torch.arange(48), torch.arange(24), torch.arange(16)]
    originals = Originals(own)
    cut(model, {"channels": rows}, originals)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [48, 24, 16]
    assert model.config.intermediate_size == 48 and torch.isfinite(logits(model, "llama")).all()
    with pytest.raises(
        StructureError, match=r"every layer must have the same channels, got 48 in model.layers.0"
    ):
        find_units(model, "channels")
    refuse_saving(model, "layers of different widths", originals)
    with pytest.raises(
        ConflictError, match="sizes that its config can state to be saved, got layers of different"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    own.undo()
    assert find_units(model, "channels").total == units.total and "save_pretrained" not in vars(model)


def test_a_vision_language_model_is_cut_in_its_text_decoder():
    model = tiny_llava(layers=2)
    units = find_units(model, "channels")
    assert len(units.groups) == 2 and sayable(model, units, 32) == 32
    cut(model, {"channels": choice(units)}, Originals())
    assert (
        model.config.text_config.intermediate_size == 32
        and model.config.vision_config.intermediate_size == 64
    )
