"""Adapt-infinity: instruction sets arrive one after another; train on a fixed number, evenly of each skill.

Scored: every sample of the pool and of the set that arrives, by the current model, in one pass: a vector, the
direction of the gradient of its answer's mean loss with respect to one decoder layer, and the scores of several
experts (perplexity, image grounding, EL2N, entropy).
Spent: a fixed number of training samples a release. The vectors are clustered into pseudo-skills; each cluster gets
an equal share (what small ones cannot use goes to larger ones). In each that expert is asked whose scores have the
highest entropy `H = -sum p log2 p` over a histogram of the standardised scores, and samples are drawn evenly over the
range of its scores. Afterwards the pool is thinned for good: in each cluster those stay that repeat others least, by
`M_j = max_{i<j} cos(g_i, g_j)`.

Paper: arXiv 2410.10636 (ICLR 2025). Official code: adymaharana/adapt-inf (d1b1b2594637), scripts without a driver.

Differs from the official code in:
- an expert's histogram covers 4 standard deviations of the standardised score; the official one covers 4 of the raw
  score, so that the unit of a score decides, and an empty histogram wins as NaN. Constant scores and scores that are
  not finite for all samples of a cluster are not asked;
- perplexity is exp(mean loss), as its logarithm; the official "ppl" is the mean of exp(loss of a token);
- image grounding takes the image tokens out; the official code blacks the image out, and divides its perplexity by
  the other kind of perplexity. Text without an image has no grounding;
- entropy is that of the answer's tokens; the official one includes prompt, image and padding;
- exactly `keep` samples are chosen: shares that are rounded up chose too many, a cluster with equal scores none, and
  the tails were lost even where the budget had room for them;
- the draw is by a hash of seed and id, and k-means is seeded: the official code is not;
- vectors are always normalised; a sample whose gradient is not finite is in a cluster of its own; zero-order
  gradients along a direction of each sample's own, which are noise, are not offered.

Kept: the pool is scored and clustered anew at each release, because the model has changed. Where it has not, what was
measured stays. What was pruned is never looked at again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from salience.core.budget import check_keep, count
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.sample_meter import EXPERTS, Vectors
from salience.methods.samples._adapt_inf_clusters import cluster, groups
from salience.methods.samples._adapt_inf_release import Arrival, Chosen, Release
from salience.methods.samples._adapt_inf_spend import choose_expert, cover, priorities, prune, water_fill


@dataclass(frozen=True, kw_only=True)
class AdaptInf(Method):
    """From a pool of instructions that grows, choose samples of every skill to train on, and prune repetitions.

    Attributes:
        model (Any): what is tuned, as it is now: a causal language model, also one that sees images, bare or under
            PEFT, a pair of it and its tokenizer or processor, a checkpoint folder or a hub id.
        tokenizer (Any): tokenizer, or for samples with images the processor; None takes the model's own.
        keep (int | float): T, samples to train on: a count, all if there are fewer, or a share of the pool.
        pool_limit (int): D, samples that stay in the pool, >= 1.
        state (str | None): folder of the pool. None: one release alone, nothing is kept.
        clusters (int | tuple[int, ...]): k, >= 1; of several the one with the best silhouette.
        vectors (str): what is clustered: "gradient" or "hidden", the mean hidden state.
        layer (int): of the decoder, whose gradient or states; negative ones count from the end.
        dim (int): numbers of a vector, >= 1; 2 bytes each on the disk.
        experts (tuple[str, ...]): of perplexity, grounding, el2n, entropy, grand (the gradient's length).
        bins (int): of equal width, that samples are drawn from, >= 1.
        tail (float): share of a cluster left out at either end of the scores, in [0, 0.5).
        seed (int): >= 0; of projection, k-means and draws.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "peft", "datasets")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    arxiv: ClassVar[str] = "2410.10636"
    title: ClassVar[str] = (
        "Adapt-infinity: Scalable Continual Multimodal Instruction Tuning via Dynamic Data Selection"
    )

    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    keep: int | float = 25_000
    pool_limit: int = 100_000
    state: str | None = None
    clusters: int | tuple[int, ...] = 10
    vectors: Vectors = "gradient"
    layer: int = -1
    dim: int = 8192
    experts: tuple[str, ...] = ("perplexity", "grounding", "el2n", "entropy")
    bins: int = 50
    tail: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(_whole(self.pool_limit) and self.pool_limit >= 1, "pool_limit", ">= 1", self.pool_limit)
        several = self.clusters if isinstance(self.clusters, tuple) else (self.clusters,)
        require(
            bool(several) and all(_whole(k) and k >= 1 for k in several), "clusters", ">= 1", self.clusters
        )
        known = get_args(Vectors)
        require(self.vectors in known, "vectors", f"one of {', '.join(known)}", self.vectors)
        require(_whole(self.layer), "layer", "an int", self.layer)
        require(_whole(self.dim) and self.dim >= 1, "dim", ">= 1", self.dim)
        fit = bool(self.experts) and set(self.experts) <= set(EXPERTS)
        require(fit, "experts", f"at least one of {', '.join(EXPERTS)}", self.experts)
        measured = self.vectors == "gradient" or "grand" not in self.experts
        require(measured, "experts", "without grand unless vectors is 'gradient'", self.experts)
        require(_whole(self.bins) and self.bins >= 1, "bins", ">= 1", self.bins)
        require(0.0 <= self.tail < 0.5, "tail", "in [0, 0.5)", self.tail)
        require(_whole(self.seed) and self.seed >= 0, "seed", ">= 0", self.seed)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """One release: what arrives joins the pool, what to train on is chosen, what repeats leaves.

        Args:
            dataset (Dataset | IterableDataset): with prompt and completion, messages or text, and perhaps image.
            data (Reading | None): names of columns, longest sample, device.

        Returns:
            tuple: the part of a focus, and the `Dataset` of what was chosen of pool and arrivals, in their order.
        """
        temporary = tempfile.TemporaryDirectory(prefix="salience-") if self.state is None else None
        folder = Path(temporary.name if temporary is not None else str(self.state))
        with Arrival(self, dataset, data, folder) as arrival:
            if arrival.finished is None:
                chosen = choose(self, arrival.ids, arrival.scores, arrival.vectors)
                arrival.finish(chosen, lasting=self.state is not None)
            release: Release = arrival.release(keep_alive=temporary)
        return release, release.train


def choose(
    method: AdaptInf,
    ids: Sequence[str],
    scores: dict[str, Tensor],
    vectors: Any,
    *,
    skills: Tensor | None = None,
) -> Chosen:
    """What to train on and what stays, from what was measured.

    Args:
        method (AdaptInf): the settings.
        ids (Sequence[str]): [n], each once, in order of arrival.
        scores (dict[str, Tensor]): "loss" and each expert, [n], NaN where there is none; a sample without a loss has
            nothing to learn, is not chosen and leaves the pool.
        vectors (np.ndarray): [n, d] of length 1, 0 where there is none; may be memory-mapped.
        skills (Tensor | None): [n] int64 from 0, in the place of clusters of the vectors where skills are known.

    Returns:
        Chosen: decisions on all n.
    """
    table = torch.stack([scores[name].double() for name in method.experts])
    valid = scores["loss"].isfinite()
    if skills is None:
        labels = torch.from_numpy(cluster(vectors, method.clusters, method.seed, valid=valid.numpy()))
    else:
        labels = torch.where(valid, skills, -1)
    budget = count(method.keep, len(ids))
    shares = water_fill(torch.bincount(labels[valid]).tolist(), budget)
    priority = priorities(ids, method.seed)
    train, pool = (torch.zeros(len(ids), dtype=torch.bool) for _ in range(2))
    experts: list[int | None] = []
    bits: list[list[float]] = []
    for number, share in enumerate(shares):
        members = (labels == number).nonzero().squeeze(1)
        expert, entropy = choose_expert(table[:, members])
        experts.append(expert)
        bits.append(entropy)
        # where no expert tells the samples apart, chance does
        asked = table[expert, members] if expert is not None else torch.zeros(len(members))
        train[members[cover(asked, share, priority[members], bins=method.bins, tail=method.tail)]] = True
    near = torch.from_numpy(groups(vectors, labels.numpy(), method.seed))
    stays, most = prune(torch.from_numpy(vectors), labels, method.pool_limit, groups=near)
    pool[stays] = True
    return Chosen(train, pool, labels, most, experts, bits, shares)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
