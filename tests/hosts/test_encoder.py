"""What the vision tower attends to: pictures packed in one row are measured one by one."""

import torch

from salience.hosts.attention import AttentionCall, received
from salience.hosts.encoder import unpacked


def test_packed_pictures_do_not_see_each_other():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 11, 8, generator=draw).double() for _ in range(3))
    options = {"cu_seq_lens_q": torch.tensor([0, 4, 11]), "cu_seq_lens_k": torch.tensor([0, 4, 11])}
    call = AttentionCall(
        torch.nn.Identity(), query, key, value, None, 8**-0.5, {**options, "is_causal": False}
    )
    parts = unpacked(call)
    assert [part.query.shape[2] for part in parts] == [4, 7]
    for part, (start, end) in zip(parts, ((0, 4), (4, 11)), strict=True):
        rows = torch.ones(1, end - start, dtype=torch.bool)
        alone = torch.softmax(query[:, :, start:end] @ key[:, :, start:end].mT * 8**-0.5, -1).mean((1, 2))
        torch.testing.assert_close(received(part, rows, rows, causal=False), alone)
        torch.testing.assert_close(part.probabilities(0, end - start).mean((1, 2)), alone)
    assert unpacked(parts[0]) == [parts[0]]
