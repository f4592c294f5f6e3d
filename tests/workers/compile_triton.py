"""Compile every Triton kernel for a GPU that is not there; prints names and shared memory."""

import json
import sys

import torch


def compile_all():
    """Every kernel as it would be launched, for compute capability 9.0: its name and its shared memory in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from salience.kernels import triton_attend, triton_hip, triton_sale
    from salience.kernels.blocks import KeyBlocks
    from salience.methods.keys._sale_scores import Grid

    class Absent:
        """A GPU that is not there: kernels are compiled for it and not launched."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    made = []
    launch = jit.JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **settings):
        compiled = launch(self, *arguments, grid=grid, warmup=True, **settings)
        made.append((self.fn.__name__, compiled.metadata.shared))

    driver.set_active(Absent())
    jit.JITFunction.run = compile_only
    for module in (triton_attend, triton_hip, triton_sale):
        module.available = lambda device: None
    half = torch.bfloat16
    # type, head size, q_block, k_block
    cases = [(half, 128, 64, 2), (half, 64, 128, 64), (half, 256, 64, 32), (half, 80, 1, 1)]
    cases += [(torch.float32, 64, 128, 64), (torch.float32, 256, 64, 16)]
    for dtype, width, q_block, k_block in cases:
        query, key = torch.zeros(1, 4, 256, width, dtype=dtype), torch.zeros(1, 2, 256, width, dtype=dtype)
        sizes = {"q_block": q_block, "k_block": k_block, "queries": 256, "keys": 256, "window": 3}
        mask = torch.ones(1, 4, -(-256 // q_block), -(-256 // k_block), dtype=torch.bool)
        blocks = KeyBlocks.from_mask(mask, **sizes)
        triton_attend.attend(query, key, key, blocks, scaling=0.1, softcap=2.0 if width == 80 else None)
    for dtype in (half, torch.float32):
        query, key = torch.zeros(1, 4, 1280, 128, dtype=dtype), torch.zeros(1, 2, 1280, 128, dtype=dtype)
        triton_sale.choose(query, key, torch.full((4,), 0.01), scaling=0.1, grid=Grid())
        triton_hip.search(query, key, scaling=0.1, mask_k=512, q_block=64, q_stride=2, k_block=2, window=256)
        triton_hip.search(query, key, scaling=0.1, mask_k=128, q_block=64, k_block=1, head_group=2)
    return made


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
