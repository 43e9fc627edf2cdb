"""What does torch.compile make of the networks? Counted in the code that Inductor writes, which is not compiled further.

    python tests/tools/kernels.py vae           # launches of SD3.5's decoder; bytes of its blocks, norms written two ways
    python tests/tools/kernels.py regions       # regional compilation, the whole model, nested_compile_region: seconds

Both run on a CPU in minutes. Seconds are of this process's own work, so that a busy machine does not lengthen them.
"""
import argparse, re, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.utils import get_code
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
from bench import SMALL, build, taken_on                                                        # noqa: E402
from sample import JointBlock, MMDiT                                                            # noqa: E402
from vae_expand import VAE, ResBlock, VAEArch                                                   # noqa: E402

APART = ("convolution", "_scaled_dot_product_flash_attention_for_cpu")      # kernels of libraries either way

class Launched(TorchDispatchMode):
    """Inside, without compilation: .count of operators and .bytes that they read and write, views, convolutions
    and attention aside. A group norm reads its input twice, for the statistics first."""
    def __enter__(self):
        self.count, self.bytes = Counter(), 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = func.__name__.split(".")[0]
        if not func.is_view and name not in APART:
            self.count[name] += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
            self.bytes += args[0].nbytes if name == "native_group_norm" else 0
        return out

def inductor(run, *given):
    """-> names of the kernels that Inductor would call, in order; bytes that they read and write; seconds"""
    moved = []
    codegen = GraphLowering.codegen

    def counting(graph):
        code = codegen(graph)
        with V.set_graph_handler(graph):
            moved.append(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes
                             if not isinstance(node, ExternKernelSchedulerNode)))
        return code
    torch._dynamo.reset()
    start = time.process_time()
    # get_code leaves nothing that can run: no cache may keep it, no compiler need be tried
    with (torch.no_grad(), mock.patch.object(GraphLowering, "codegen", counting),
          config.patch({"force_disable_caches": True, "cpp.vec_isa_ok": True})):
        codes = get_code(run, *given)
    seconds = time.process_time() - start
    calls = max((re.findall(r"^ +(cpp_fused_\w+)\(", code, re.M) for code in codes), key=len)
    return calls, moved[-1], seconds

def whole(module):
    return torch.compile(module, fullgraph=True, dynamic=False)

def written_out(norm, x):
    """silu(norm(x)) as a scale and a shift of each channel."""
    groups = norm.num_groups
    var, mean = torch.var_mean(x.float().unflatten(1, (groups, -1)), (2, 3, 4), correction=0, keepdim=True)
    scale = norm.weight.view(groups, -1, 1, 1) * (var + norm.eps).rsqrt()
    shift = norm.bias.view(groups, -1, 1, 1) - mean * scale
    return F.silu((x * scale.flatten(1, 2) + shift.flatten(1, 2)).to(x.dtype))

class WrittenOut(ResBlock):
    def forward(self, x):
        h = self.conv1(written_out(self.norm1, x))
        h = self.conv2(written_out(self.norm2, h))
        return h + self.nin_shortcut(x)

def vae():
    def channels_last(v):
        return v.to(memory_format=torch.channels_last)
    decoder = channels_last(build(lambda: VAE(VAEArch()), "cpu", torch.bfloat16)).decoder
    cases = {"SD3.5's decoder": (decoder, torch.randn(1, 16, 32, 32, dtype=torch.bfloat16))}
    for kind in ResBlock, WrittenOut:
        for dtype in torch.bfloat16, torch.float32:
            blocks = build(lambda: nn.Sequential(*(kind(128, 128, 32) for _ in range(3))), "cpu", dtype)
            x = channels_last(torch.randn(1, 128, 64, 64, dtype=dtype))
            cases[f"three {kind.__name__}s of 128 channels, {dtype}"] = channels_last(blocks), x
    for name, (network, x) in cases.items():
        with torch.no_grad(), Launched() as eager:
            network(x)
        calls, moved, seconds = inductor(whole(network), x)
        print(f"{name}: {eager.count.total()} operators, {eager.bytes / 1e6:.1f} MB; compiled {len(calls)} kernels,"
              f" {moved / 1e6:.1f} MB; one feature map has {x.nbytes / 1e6:.2f} MB; {seconds:.1f} s", flush=True)
        print(f"    {dict(eager.count)}")

def regions():
    plain = JointBlock.forward
    region = torch.compiler.nested_compile_region(plain)

    def nested(block, x, context, c):
        """The last block returns its context as it came, which a region may not."""
        return plain(block, x, context, c) if block.last else region(block, x, context, c)
    for depth, dual in (4, (0,)), (8, (0, 1, 2)):
        arch = replace(SMALL, width=64, depth=depth, dual=dual)
        mmdit = build(lambda: MMDiT(arch), "cpu", torch.float32)
        given = torch.randn(2, 16, 16, 16), torch.rand(2), torch.randn(2, 7, 64), torch.randn(2, 32)
        inductor(whole(nn.Linear(4, 4)), torch.randn(1, 4))                 # loads what is loaded once
        tokens = torch.randn(2, 64, 64), torch.randn(2, 7, 64), torch.randn(2, 64)
        three = [mmdit.joint_blocks[i] for i in (0, depth - 2, depth - 1)]

        def both(block):
            """A block as get_code can run it: it gives no outputs to unpack."""
            return torch.compile(lambda *inputs: torch.cat(block(*inputs), dim=1), fullgraph=True, dynamic=False)
        seconds = [inductor(both(block), *tokens)[2] for block in three]
        print(f"depth {depth}, regional: {len(three)} graphs, {sum(seconds):.1f} s", flush=True)
        print(f"depth {depth}, the whole model: 1 graph, {inductor(whole(mmdit), *given)[2]:.1f} s", flush=True)
        with mock.patch.object(JointBlock, "forward", nested):
            print(f"depth {depth}, nested regions: 1 graph, {inductor(whole(mmdit), *given)[2]:.1f} s", flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["vae", "regions"], help="which count")
    what = p.parse_args().what
    print("; ".join(f"{k} {v}" for k, v in taken_on("cpu").items()))
    vae() if what == "vae" else regions()
