"""Random generators that a resumed run finds again: seeded by numbers, never by what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def number(*numbers: int) -> int:
    """32 bits for these numbers (a run's seed, a rank, a step, a micro-batch); neighbours give unrelated ones."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of one's own for these numbers, seeded with all the 32 bits that torch's generator reads.

    Args:
        numbers (int): in an order of the caller's; another order is another generator.
        device (torch.device | str): where it draws.

    Returns:
        torch.Generator: the same for the same numbers; global random states stay as they were.
    """
    return torch.Generator(device=device).manual_seed(number(*numbers))
