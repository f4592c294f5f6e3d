"""Random numbers that are a function of where they are used: no state that could move, be lost, or differ by rank.

A number depends on a seed, a counter (a step, say) and its own index. So a resumed run, a run under torch.compile and
the second rank of two get what one plain process gets, and one large batch gets what its slices get.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# an odd number near 2^31 / the golden ratio: neighbouring seeds start far apart
_SPREAD = 0x4F1BBCDD
_START = 0x3C6EF372


Counter = Tensor | int


def uniform(index: Tensor, *, seed: int, counter: Counter | tuple[Counter, ...] = ()) -> Tensor:
    """Uniform numbers in (0, 1), both ends excluded, with 23 random bits.

    Args:
        index (Tensor): int64 in [0, 2^32), any shape: which number; equal indices give equal numbers.
        seed (int): >= 0; another seed is another sequence.
        counter (Tensor | int | tuple): int64 in [0, 2^32), broadcast against `index`: the step; or several: the step,
            the row ...

    Returns:
        Tensor: fp32, of the broadcast shape, on the device of `index`.
    """
    # 0 maps to 0, so what could be 0 gets a constant first: zeros would not count as counters otherwise
    key = _mixed(torch.as_tensor(seed * _SPREAD + _START & _WORD, device=index.device)) + (seed >> 32 & _WORD)
    for one in counter if isinstance(counter, tuple) else (counter,):
        key = _mixed(_mixed(key) + one + _START)
    bits = _mixed(_mixed(index ^ _mixed(key)) + key) >> 9
    return (bits.float() + 0.5) / 2**23


def _mixed(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit (xor-shift and multiply).

    Both factors are below 2^31, so that products of 32-bit words fit into int64.
    """
    word = word & _WORD
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)
