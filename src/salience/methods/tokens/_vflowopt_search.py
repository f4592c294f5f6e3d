"""The search of VFlowOpt: settings with which the last prompt token ends where it would end without pruning."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.core.attach import Attachment
from salience.core.errors import ParameterError, require
from salience.core.files import check_writable, write_json_atomic
from salience.core.loop import evaluating
from salience.core.progress import bar
from salience.core.spec import describe_method
from salience.hosts.vision import vision_language

if TYPE_CHECKING:
    from salience.methods.tokens.vflowopt import VFlowOpt

Settings = dict[str, float]
_SPACE = {"t": (0.0, 50.0), "alpha": (-1.0, 1.0), "cell": (3.0, 24.0)}
_NAMES = ("r1", "r2", *_SPACE)
_LOW_SECOND = 0.533
_STAGES = 3
# of settings that no third ratio can bring to the budget, so many in a row end the search
_INFEASIBLE = 200
_DIGITS = 6
_log = logging.getLogger(__name__)


class Objective:
    """`f = sum over prompts of cos(h_full, h_pruned)`; the states without pruning are computed once.

    Args:
        model (nn.Module): a vision-language model; runs in eval mode, its mode is put back.
        prompts (Sequence[Mapping]): keywords of its forward, with images.

    Attributes:
        full (list[Tensor]): for each prompt [B, C] fp32, the state of the last token behind the final norm.
        count (int): rows of all prompts together, the highest value that f can have.

    Raises:
        ParameterError: if there is no prompt, or one without image tokens.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> None:
        some = isinstance(prompts, Sequence) and bool(prompts)
        require(some, "prompts", "a list of at least one prompt (30 are usual)", prompts)
        self._found = vision_language(model)
        self._model = model
        device = next(model.parameters()).device
        self._prompts: list[dict[str, Any]] = []
        for number, prompt in enumerate(prompts):
            named = isinstance(prompt, Mapping) and isinstance(prompt.get("input_ids"), Tensor)
            require(named, f"prompt {number}", "keywords of the model with input_ids", type(prompt).__name__)
            pictured = bool(self._found.image_tokens(prompt["input_ids"]).any())
            require(pictured, f"prompt {number}", "one with image tokens", "none")
            # the inner model reads the prompt: no logits are needed, and no loss
            self._prompts.append(
                {
                    name: value.to(device) if isinstance(value, Tensor) else value
                    for name, value in prompt.items()
                    if name not in ("labels", "use_cache", "logits_to_keep")
                }
            )
        self.full = list(self._states())
        self.count = sum(map(len, self.full))

    def __call__(self, method: VFlowOpt) -> float:
        """f of these settings; states that are not finite count as 0."""
        record = Attachment()
        try:
            method.attach_model(self._model, record)
            cosines = [
                F.cosine_similarity(full, pruned, dim=-1).nan_to_num(nan=0.0).sum()
                for full, pruned in zip(self.full, self._states(), strict=True)
            ]
        finally:
            record.undo()
        return float(torch.stack(cosines).sum())

    @torch.no_grad()
    def _states(self) -> Iterator[Tensor]:
        seen: list[Tensor] = []

        def see(text: nn.Module, args: Any, output: Any) -> None:
            seen[:] = [output[0] if isinstance(output, tuple) else output["last_hidden_state"]]

        # registered behind the pruning's own hook, so the states have the prompt's length
        hook = self._found.text.register_forward_hook(see)
        try:
            with evaluating(self._model):
                for prompt in self._prompts:
                    self._found.core(**prompt, use_cache=False)
                    yield _last(seen[0], prompt.get("attention_mask")).float()
        finally:
            hook.remove()

    def signature(self) -> Tensor:
        """[rows * 8] a few numbers of each state, by which a model is known again."""
        return torch.cat([full[:, :8].flatten() for full in self.full]).cpu()

    def digest(self) -> str:
        """Tells these prompts from others."""
        digest = hashlib.blake2b(digest_size=12)
        for prompt in self._prompts:
            for name in sorted(prompt):
                value = prompt[name]
                digest.update(name.encode())
                if isinstance(value, Tensor):
                    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    digest.update(f"{value.dtype}{list(value.shape)}".encode() + flat.numpy().tobytes())
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()


def third_ratio(budget: float, first: float, second: float, layers: tuple[int, int], depth: int) -> float:
    """R3 with which `R1 L1 + R1 R2 L2 + R1 R2 R3 L3` is the budget times L, at most 1; <= 0 if none is.

    Args:
        budget (float): share of image token-layers.
        first, second (float): R1 and R2.
        layers (tuple[int, int]): where the second and the third stage start.
        depth (int): L layers.
    """
    one, two = layers
    left = budget * depth - first * one - first * second * (two - one)
    return min(1.0, left / (first * second * (depth - two)))


def average(ratios: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """The share of image token-layers that these ratios leave of a decoder of `depth` layers."""
    share, kept = 0.0, 1.0
    for ratio, start, end in zip(ratios, (0, *layers), (*layers, depth), strict=True):
        kept *= ratio
        share += kept * (end - start)
    return share / depth


def settle(base: VFlowOpt, values: Settings, budget: float, depth: int) -> VFlowOpt | None:
    """`base` with these settings and the third ratio that fits the budget; None if there is none."""
    one, two = base.stage_layers(depth)
    third = round(third_ratio(budget, values["r1"], values["r2"], (one, two), depth), _DIGITS)
    if third <= 0.0:
        return None
    ratios = (values["r1"], values["r2"], third)
    return replace(base, ratios=ratios, t=values["t"], alpha=values["alpha"], cell=values["cell"])


def bounds(budget: float, space: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    """(low, high) of every setting that is searched for.

    Raises:
        ParameterError: for unknown names, or bounds that are not a range of valid values.
    """
    require(0.0 < budget <= 1.0, "budget", "in (0, 1]", budget)
    found = {"r1": (budget, min(1.0, 1.5 * budget)), "r2": (_LOW_SECOND, 1.0), **_SPACE}
    lowest = {"r1": 0.0, "r2": 0.0, "t": 0.0, "alpha": -math.inf, "cell": 0.0}
    for name, pair in (space or {}).items():
        require(name in _NAMES, "space", f"of {', '.join(_NAMES)}", name)
        two = isinstance(pair, tuple | list) and len(pair) == 2
        require(two and all(map(math.isfinite, pair)), f"space of {name}", "(low, high)", pair)
        low, high = map(float, pair)
        most = 1.0 if name in ("r1", "r2") else math.inf
        above = low >= lowest[name] if name == "t" else low > lowest[name]
        require(above and low <= high <= most, f"space of {name}", "a rising range of valid values", pair)
        found[name] = (low, high)
    return found


@dataclass(frozen=True)
class Plan:
    """What is searched for and how; see `vflowopt.search_vflowopt`."""

    base: VFlowOpt
    budget: float
    within: Mapping[str, tuple[float, float]]
    evaluations: int
    random: int
    seed: int
    folder: str | Path | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("random", 1), ("seed", 0)):
            require(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))
        require(len(self.base.ratios) == _STAGES, "ratios", "three to be searched for", self.base.ratios)


def run_search(model: nn.Module, prompts: Sequence[Mapping[str, Any]], plan: Plan) -> VFlowOpt:
    """See `vflowopt.search_vflowopt`."""
    optuna = _optuna()
    if plan.folder is not None:
        check_writable(plan.folder, name="folder")
        Path(plan.folder).mkdir(parents=True, exist_ok=True)
    plan = replace(plan, base=replace(plan.base, search=0, folder=None, budget=plan.budget))
    objective = Objective(model, prompts)
    depth = len(vision_language(model).layers)
    about = {
        "settings": repr(plan.base),
        "layers": plan.base.stage_layers(depth),
        "space": plan.within,
        "random": plan.random,
        "seed": plan.seed,
        "prompts": objective.digest(),
    }
    with _quiet(optuna):
        study = _study(optuna, plan.folder, about, objective.signature())
        best = _improve(optuna, study, objective, plan, depth)
    found = settle(plan.base, _rounded(best.params), plan.budget, depth)
    assert found is not None  # it was evaluated
    _log.info("mean cosine %.4f with %s", best.value / objective.count, describe_method(found))
    if plan.folder is not None:
        write_json_atomic(Path(plan.folder) / "recipe.json", {"methods": [describe_method(found)]})
    return found


def _improve(optuna: Any, study: Any, objective: Objective, plan: Plan, depth: int) -> Any:
    """Evaluate until so many settings are done; the best trial."""
    states, base = optuna.trial.TrialState, plan.base
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)  # its process was stopped
    trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
    done, tried = sum(trial.state == states.COMPLETE for trial in trials), len(trials)
    if not tried and not study.get_trials(deepcopy=False, states=(states.WAITING,)):
        first = dict(zip(_NAMES, (*base.ratios[:2], base.t, base.alpha, base.cell), strict=True))
        if all(low <= first[name] <= high for name, (low, high) in plan.within.items()):
            study.enqueue_trial(first)
    with bar("vflowopt: settings tried", plan.evaluations, plan.progress, done=done) as advance:
        failed = 0
        while done < plan.evaluations:
            # a sampler for each trial, drawn from what is done: a search that goes on is the one that was stopped
            study.sampler = optuna.samplers.TPESampler(
                seed=plan.seed + 1_000_003 * tried, n_startup_trials=plan.random, multivariate=True
            )
            trial = study.ask()
            values = _rounded({name: trial.suggest_float(name, *pair) for name, pair in plan.within.items()})
            method = settle(base, values, plan.budget, depth)
            tried += 1
            if method is None:
                study.tell(trial, state=states.PRUNED)
                failed += 1
                require(failed < _INFEASIBLE, "budget", "within reach of some third ratio > 0", plan.budget)
                continue
            study.tell(trial, objective(method))
            done, failed = done + 1, 0
            advance()
    return study.best_trial


def _study(optuna: Any, folder: str | Path | None, about: Mapping[str, Any], signature: Tensor) -> Any:
    """The study of this search: a new one, or the one in the folder."""
    if folder is None:
        return optuna.create_study(direction="maximize")
    from sqlalchemy.exc import SQLAlchemyError

    path = Path(folder) / "study.db"
    try:
        study = optuna.create_study(
            direction="maximize", storage=f"sqlite:///{path}", study_name="vflowopt", load_if_exists=True
        )
        held = study.user_attrs
    except SQLAlchemyError as error:
        reason = str(error).partition("\n")[0]
        raise ParameterError(f"folder must hold a readable study.db or none, got {path}: {reason}") from error
    told = json.loads(json.dumps(about))
    if "about" not in held:
        study.set_user_attr("signature", signature.tolist())
        study.set_user_attr("about", told)  # last: without it the study counts as new
        return study
    differs = [name for name in told if held["about"].get(name) != told[name]]
    # other machines and precisions compute nearly the same, other weights do not
    if not differs and (signature - torch.tensor(held["signature"])).norm() > 0.05 * signature.norm():
        differs = ["model"]
    require(not differs, "folder", "new, or of the same search", f"{folder} with other {', '.join(differs)}")
    return study


def _rounded(values: Mapping[str, float]) -> Settings:
    return {name: round(value, _DIGITS) for name, value in values.items()}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ParameterError(
            "optuna must be installed to search for settings, got none: pip install 'salience[search]'"
        ) from error
    return optuna


def _last(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C] of [B, S, C]: the last token of each row that is no padding."""
    if mask is None:
        return hidden[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), places, -1).amax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna writes no line for each trial; afterwards as it was."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
