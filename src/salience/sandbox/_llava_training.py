"""How the model of the vision world is trained: the tower on what pictures hold, then the decoder on questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from salience.sandbox._llava import PATCHES, Recipe, blind
from salience.sandbox.shapes import COLOURS, GRID, SHAPES, WORDS, Question, Scene

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LETTERS = sorted(set("".join(WORDS)))
# fewest and most patches shown in the second part; beyond 144 is all, so all are shown often
_SHOWN = (40, 240)


def train_tower(
    model: Any,
    scenes: Sequence[Scene],
    pixels: Tensor,
    recipe: Recipe,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Teach patches what they hold and where they are, and the class token what the whole picture holds.

    The heads are thrown away. Without this the encoder, whose output no decoder reads here, would attend at random.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    tower = model.model.vision_tower
    content, objects, words = _contents(scenes)
    rows, columns = torch.arange(PATCHES) // GRID, torch.arange(PATCHES) % GRID
    classes = int(1 + objects.shape[1] + len(_LETTERS))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        patch_head = nn.Linear(recipe.width, classes + 2 * GRID)
        heads = nn.ModuleList(nn.Linear(recipe.width, objects.shape[1] + len(WORDS)) for _ in range(2))
    rare = torch.ones(classes)
    rare[0] = 0.05
    parameters = [*tower.parameters(), *patch_head.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.tower_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    tower.train()
    for step in range(recipe.tower_steps):
        optimizer.param_groups[0]["lr"] = recipe.tower_rate * _factor(step, recipe.tower_steps)
        picked = torch.randint(len(scenes), (recipe.batch,), generator=generator)
        output = tower(pixels[picked], output_hidden_states=True)
        what, row, column = patch_head(output.hidden_states[0][:, 1:]).split([classes, GRID, GRID], dim=-1)
        loss = F.cross_entropy(what.flatten(0, 1), content[picked].flatten(), weight=rare)
        # where counts most for what is asked about, too
        weight = rare[content[picked]] / rare[content[picked]].sum()
        for said, true in ((row, rows), (column, columns)):
            loss = (
                loss
                + (weight * F.cross_entropy(said.mT, true.expand(recipe.batch, -1), reduction="none")).sum()
            )
        # methods read the attention of the last layer but one, so the class token must know it all there as well
        for head, cls in zip(heads, (output.hidden_states[-2][:, 0], output.pooler_output)):
            seen, word = head(cls).split([objects.shape[1], len(WORDS)], dim=-1)
            loss = loss + F.binary_cross_entropy_with_logits(seen, objects[picked])
            loss = loss + F.cross_entropy(word, words[picked])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        advance()
    tower.eval()


def _contents(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """What each patch holds, int64 [N, 144], which coloured shapes there are, float32 [N, 24], and words [N]."""
    import torch

    things = {(name, colour): i for i, (name, colour) in enumerate((n, c) for n in SHAPES for c in COLOURS)}
    content = torch.zeros(len(scenes), GRID, GRID, dtype=torch.int64)
    objects = torch.zeros(len(scenes), len(things))
    for index, scene in enumerate(scenes):
        for shape in scene.shapes:
            thing = things[shape.name, shape.colour]
            content[index, shape.row, shape.column] = 1 + thing
            objects[index, thing] = 1
        row, column = scene.sign
        for step, letter in enumerate(scene.word):
            content[index, row, column + step] = 1 + len(things) + _LETTERS.index(letter)
    return content.flatten(1), objects, torch.tensor([WORDS.index(scene.word) for scene in scenes])


def train_reader(
    model: Any,
    tokenizer: Any,
    scenes: Sequence[Scene],
    pixels: Tensor,
    recipe: Recipe,
    seed: int,
    advance: Callable[[], None],
) -> None:
    """Train projector and decoder on the frozen tower. All questions about a scene share one reading of its image."""
    import torch
    from torch.nn import functional as F

    core = model.model
    with torch.no_grad():
        features = torch.cat(
            [
                core.vision_tower.pre_layrnorm(core.vision_tower.embeddings(few))[:, 1:]
                for few in pixels.split(100)
            ]
        )
    talks = [packed(tokenizer, scene.every_question) for scene in scenes]
    ids = torch.tensor([one[0] for one in talks])
    _, segment, positions, answered = (torch.tensor(row) for row in talks[0])
    content, _, _ = _contents(scenes)
    parameters = [*core.multi_modal_projector.parameters(), *core.language_model.parameters()]
    parameters += list(model.lm_head.parameters())
    optimizers = _optimizers(parameters, core.language_model, recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed + 1)
    embed = core.language_model.embed_tokens
    start = torch.full((recipe.batch, 1), tokenizer.bos_token_id)
    for step in range(recipe.steps):
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * _factor(step, recipe.steps)
        picked = torch.randint(len(scenes), (recipe.batch,), generator=generator)
        # all that matters, then others by chance: few are learned from at once, and numbers that change keep the
        # model from counting shapes by their share of the picture, which would make pruning anything a loss
        fewest, most = recipe.first_patches if step < recipe.first_steps else _SHOWN
        shown = min(int(torch.randint(fewest, most + 1, (), generator=generator)), PATCHES)
        rank = (content[picked] > 0) + torch.rand(recipe.batch, PATCHES, generator=generator)
        patches = rank.topk(shown, dim=1).indices.sort(dim=1).values
        image = core.multi_modal_projector(features[picked[:, None], patches])
        rows = torch.cat([embed(start), image, embed(ids[picked])], dim=1)
        columns = torch.cat([torch.zeros_like(start), patches + 1, positions.expand(recipe.batch, -1)], dim=1)
        segments = torch.cat([torch.zeros(1 + shown, dtype=torch.int64), segment])
        # as if each question were alone behind the image
        seen = ((segments == 0) | (segments == segments[:, None])).tril()
        hidden = core.language_model(
            inputs_embeds=rows,
            attention_mask=seen.expand(recipe.batch, 1, -1, -1),
            position_ids=columns,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, shown + answered])
        F.cross_entropy(logits.flatten(0, 1), ids[picked][:, answered].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        blind(model)
        advance()
    model.eval()


def packed(tokenizer: Any, asked: Sequence[Question]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Questions in a row: tokens, numbers of the questions from 1, positions, and which tokens are answers."""
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    answered: list[int] = []
    for number, question in enumerate(asked, start=1):
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"][1:]
        answer = [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        answered += range(len(ids) + len(prompt), len(ids) + len(prompt) + len(answer))
        ids += [*prompt, *answer]
        segments += [number] * (len(prompt) + len(answer))
        positions += range(1 + PATCHES, 1 + PATCHES + len(prompt) + len(answer))
    return ids, segments, positions, answered


def _optimizers(parameters: Sequence[Tensor], language: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    import torch

    # Muon is for matrices between layers only, and takes a fraction of AdamW's steps
    matrices = [p for layer in language.layers for p in layer.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, ns_steps=3),
        torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: a linear start, a plateau, a linear end."""
    return min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.5 * steps))
