"""Which way to write LoRA's two products beside a frozen linear is the fastest? The ways in turns, forward and backward.

    python tests/tools/lora_forms.py            # width 1536, 1024 tokens, ranks 64 and 256, float32 and bf16: minutes

Printed of each way: its time to the first's, median of the rounds with quartiles; the operators that it launches;
the bytes that it keeps for backward beside its input and weights; how far its outputs and gradients are from the first's.
"""
import argparse, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]     # tools, tests, the root
from bench import clock, quartiles, taken_on                                                    # noqa: E402
from conftest import relative_error                                                             # noqa: E402
from finetune_dit import LoRA                                                                   # noqa: E402
from test_speed import Operations, saved_bytes                                                  # noqa: E402

def einsums(lora, x):
    """An einsum for each product."""
    h = torch.einsum("...i,pri->...pr", x, lora.down)
    return lora.linear(x) + torch.einsum("...pr,por->...po", h, lora.up).flatten(-2)

def down(lora, x):
    """All down factors as one product: (..., parts, rank)"""
    return F.linear(x, lora.down.flatten(0, 1)).unflatten(-1, lora.down.shape[:2])

def added_in_parts(lora, x):
    """The sum before the parts are flattened."""
    parts = len(lora.up)
    up = torch.einsum("...pr,por->...po", down(lora, x), lora.up)
    return (lora.linear(x).unflatten(-1, (parts, -1)) + up).flatten(-2)

def baddbmm(lora, x):
    """The up product and the sum in one."""
    parts = len(lora.up)
    y = lora.linear(x)
    y_parts = y.flatten(0, -2).unflatten(-1, (parts, -1)).transpose(0, 1)                   # (parts, N, out)
    h = down(lora, x).flatten(0, -3).transpose(0, 1)                                        # (parts, N, rank)
    return torch.baddbmm(y_parts, h, lora.up.mT.to(y.dtype)).transpose(0, 1).flatten(1).view_as(y)

def concatenated_up(lora, x):
    """A product for each part's up factor."""
    h = down(lora, x).unbind(-2)
    return lora.linear(x) + torch.cat([F.linear(part, up) for part, up in zip(h, lora.up)], dim=-1)

def block_diagonal(lora, x):
    """One up product, of a matrix that is zero off its blocks."""
    return lora.linear(x) + F.linear(down(lora, x).flatten(-2), torch.block_diag(*lora.up))

def with_the_weight(lora, x):
    """The down factors as more rows of the linear's weight."""
    weight = torch.cat([lora.linear.weight, lora.down.flatten(0, 1).to(lora.linear.weight.dtype)])
    inner = lora.down.shape[:2]
    y, h = F.linear(x, weight, F.pad(lora.linear.bias, (0, inner.numel()))).split(
        [lora.linear.out_features, inner.numel()], dim=-1)
    return y + torch.einsum("...pr,por->...po", h.unflatten(-1, inner), lora.up).flatten(-2)

WAYS = {"einsums": einsums, "LoRA.forward": LoRA.forward, "added in parts": added_in_parts, "baddbmm": baddbmm,
        "concatenated up": concatenated_up, "block-diagonal": block_diagonal, "with the weight": with_the_weight}

def compare(parts, rank, dtype, args):
    """Print a line for each way."""
    torch.manual_seed(0)
    lora = LoRA(nn.Linear(args.width, parts * args.width).to(dtype), rank, parts)
    nn.init.normal_(lora.up, std=0.02)
    x = nn.Parameter(torch.randn(1, args.tokens, args.width, dtype=dtype))
    gradient = torch.randn(1, args.tokens, parts * args.width, dtype=dtype)
    leaves = x, lora.down, lora.up

    def forward(way):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return way(lora, x)

    def step(way):
        """As a training's first micro-batch, which makes .grad: of another layout they are copied once more."""
        for leaf in leaves:
            leaf.grad = None
        y = forward(way)
        y.backward(gradient)
        return y, *(leaf.grad for leaf in leaves)
    expected = step(einsums)
    ways = [*WAYS.values()]
    rounds = [[clock(lambda: step(way), "cpu", 1, 1)[0] for way in ways] for _ in range(args.rounds)]
    for k, (name, way) in enumerate(WAYS.items()):
        error = max(relative_error(a.detach(), b.detach()) for a, b in zip(step(way), expected))
        with Operations() as launched:
            step(way)
        kept = saved_bytes(lambda: forward(way), nn.ParameterList([x, *lora.parameters()]))
        q1, ratio, q3 = quartiles([times[k] / times[0] for times in rounds])
        print(f"{parts} parts, rank {rank}, {str(dtype).removeprefix('torch.'):9}{name:18}{ratio:.2f}"
              f" ({q1:.2f}-{q3:.2f}); {launched.seen.total()} operators; {kept / 1e6:.2f} MB; error {error:.0e}",
              flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=11, help="of turns (default 11)")
    p.add_argument("--width", type=int, default=1536, help="of the linear (default 1536)")
    p.add_argument("--tokens", type=int, default=1024, help="rows of its input (default 1024)")
    args = p.parse_args()
    print("; ".join(f"{k} {v}" for k, v in taken_on("cpu").items()))
    for parts in 3, 1:
        for dtype in torch.float32, torch.bfloat16:
            for rank in 64, 256:
                compare(parts, rank, dtype, args)
