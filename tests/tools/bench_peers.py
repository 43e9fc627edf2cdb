"""How fast is this code beside diffusers? Equal weights, the same work, one process, ours and theirs in turns; and our own means.

    python tests/tools/bench_peers.py                             # a miniature of SD3.5 Medium on a CPU: minutes
    python tests/tools/bench_peers.py --means                     # what each means to speed is worth, by itself
    python tests/tools/bench_peers.py --device cuda --compile --out peers.json    # SD3.5 Medium's real shapes

A ratio is the median over pairs, with quartiles. Times are no base for a ratio to another run's or machine's.
"""
import argparse, copy, json, sys, tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.utils import logging
from torch._inductor.utils import fresh_cache

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]     # tools, tests, the root
from bench import (MEDIUM, SMALL, SMALL_VAE, LiveBytes, adapt, build, clock, closed_form,        # noqa: E402
                   quartiles, taken_on, trainer)
from conftest import relative_error                                                              # noqa: E402
from finetune_dit import merge_lora                                                              # noqa: E402
from sample import MMDiT, load_mmdit
from vae_expand import (DAVAE, VAE, Parser, VAEArch, add_attention_flag, attention, load_vae, pick_device, pick_dtype,
                        run)

logging.set_verbosity_error()           # it warns of a cast that changes nothing here
ARGS = dict(rank=256, compile=False, seed=0, lr=1e-5, warmup=0, shift=1.0, ema=0.99, out="")

class Table:
    """Lines of one thing against another: their ratio, its quartiles, whether it is on target."""
    def __init__(self, device, pairs):
        self.device, self.pairs, self.rows = device, pairs, {}
        print(f"{'':56}" + "".join(f"{c:>10}" for c in ("one", "other", "ratio", "q1", "q3")) + "  target")

    def add(self, name, one, other, ratios, least=None, most=None):
        """one, other: what was measured; the median ratio is to be `least` or `most`."""
        q1, ratio, q3 = quartiles(ratios) if len(ratios) > 1 else ratios * 3
        target = f"at least {least:.3g}" if least else f"at most {most:.3g}" if most else ""
        met = (ratio >= least if least else ratio <= most) if target else None
        numbers = "".join(f"{v:10.4g}" for v in (one, other)) + "".join(f"{v:10.3g}" for v in (ratio, q1, q3))
        print(f"{name:56}{numbers}  {target}{(', missed', ', met')[met] if target else ''}", flush=True)
        self.rows[name] = dict(one=one, other=other, ratio=ratio, q1=q1, q3=q3, target=target, met=met)

    def compare(self, name, one, other, dtype):
        """Norms of two outputs, and the relative error of the first."""
        a, b = one(), other()
        goal = {"most": 1e-5} if dtype == torch.float32 else {}
        norms = (v.float().norm().item() for v in (a, b))
        self.add(f"{name}, relative error", *norms, [relative_error(a, b)], **goal)

    def race(self, name, one, other, scale=1.0, **target):
        """one() and other() in turns, milliseconds; ratio: of one's time to the other's, over `scale`."""
        def both():
            return [clock(f, self.device, 1, 1)[0] for f in (one, other)]
        both()                          # warms up
        pairs = [both() for _ in range(self.pairs)]
        medians = (1000 * quartiles(times)[1] for times in zip(*pairs))
        self.add(f"{name}, ms", *medians, [a / b / scale for a, b in pairs], **target)

    def weigh(self, name, one, other, **target):
        """Peak of the bytes alive within one() and within other(), in MB."""
        peaks = []
        for f in one, other:
            with LiveBytes() as live:
                f()
            peaks.append(live.peak / 1e6)
        self.add(f"{name}, live MB", *peaks, [peaks[0] / peaks[1]], **target)

def inputs(arch, side, length, device, dtype, batch=1):
    """x, sigma, context, pooled for side x side tokens"""
    rng, wide = torch.Generator().manual_seed(0), arch.in_channels + arch.detail_channels
    shapes = (wide, 2 * side, 2 * side), (length, arch.context_dim), (arch.pooled_dim,)
    x, *text = (torch.randn(batch, *shape, generator=rng).to(device, dtype) for shape in shapes)
    return x, torch.full((batch,), 0.7, device=device), *text

# ------------------------------------------------------------ diffusers
def twins(arch, device, dtype):
    """-> our MMDiT, loaded from what diffusers' SD3Transformer2DModel of equal size saved; that one"""
    peer = build(lambda: SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=arch.in_channels, out_channels=arch.in_channels,
        num_layers=arch.depth, attention_head_dim=64, num_attention_heads=arch.width // 64,
        joint_attention_dim=arch.context_dim, caption_projection_dim=arch.width, qk_norm="rms_norm",
        pooled_projection_dim=arch.pooled_dim, pos_embed_max_size=arch.table,
        dual_attention_layers=arch.dual), device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(Path(folder) / "transformer")
        return load_mmdit(folder, dtype, device), peer

def vae_twins(arch, device, dtype):
    """-> our VAE, loaded from what diffusers' AutoencoderKL of equal size saved; that one"""
    levels = len(arch.widths)
    peer = build(lambda: AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=arch.widths, layers_per_block=arch.blocks, latent_channels=arch.z_channels,
        norm_num_groups=arch.groups, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
        shift_factor=0.0609), device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(Path(folder) / "vae")
        return load_vae(folder, dtype, device), peer

def transformers(table, arch, length, dtype, compiled, sides):
    """The forward at two sizes of the token grid: equal outputs, time and memory; then compiled block by block,
    as both may be."""
    device, what = table.device, str(dtype).removeprefix("torch.")
    ours, peer = twins(arch, device, dtype)
    goals = dict(zip(sides, (1 / 2.5, 1 / 1.6) if device == "cuda" else (1.05, 1.05)))
    for side in sides:
        x, sigma, *text = inputs(arch, side, length, device, dtype)
        both = lambda: ours(x, sigma, *text), lambda: peer(x, *text, sigma * 1000, return_dict=False)[0]
        name = f"forward, {side**2} tokens, {what}"
        table.compare(name, *both, dtype)
        table.race(name, *both, most=goals[side])
        table.weigh(name, *both, most=1.0)
    small, large = sides
    stock, da = closed_form(arch, large, length), closed_form(arch, small, length)
    wide = build(lambda: MMDiT(replace(arch, detail_channels=arch.in_channels)), device, dtype)
    few = inputs(wide.arch, small, length, device, dtype)
    table.race(f"stock {large**2} : DA {small**2} tokens / {stock / da:.2f} of FLOP, {what}",
               lambda: ours(x, sigma, *text), lambda: wide(*few), scale=stock / da, least=0.88)
    if not compiled:
        return
    ours.compile_blocks()
    for block in peer.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)
    for side in sides:
        x, sigma, *text = inputs(arch, side, length, device, dtype)
        both = lambda: ours(x, sigma, *text), lambda: peer(x, *text, sigma * 1000, return_dict=False)[0]
        name, first = f"compiled, {side**2} tokens, {what}", []
        for f in both:
            torch.compiler.reset()
            with fresh_cache():
                first += clock(f, device, 1, 1)
        table.add(f"{name}: first call, s", *first, [first[0] / first[1]])
        torch.compiler.reset()
        table.race(name, *both, most=1 / 1.15 if device == "cuda" else 1.05)

def decoders(table, arch, side, dtype, compiled, goal):
    """Decoding a normalised latent: ours, with channels last as in every command, against theirs and without;
    compiled, against theirs as it comes. goal: how often as fast ours shall be."""
    device, what = table.device, str(dtype).removeprefix("torch.")
    plain, peer = vae_twins(arch, device, dtype)
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    z = torch.randn(1, arch.z_channels, side, side).to(device, dtype)
    name = f"decoding {8 * side} pixels, {what}"
    both = lambda: ours.decode(z), lambda: peer.decode(z / ours.scale + ours.shift, return_dict=False)[0]
    table.compare(name, lambda: plain.decode(z), both[1], dtype)        # channels last sums in another order
    table.race(name, *both, most=1 / goal)
    table.weigh(name, *both, most=1.0)
    table.race(f"{name}, channels last : not", both[0], lambda: plain.decode(z))
    if compiled:
        fused = torch.compile(ours.decode, fullgraph=True, dynamic=False)
        table.race(f"{name}, compiled : theirs not", lambda: fused(z), both[1], most=1 / goal)

# ------------------------------------------------------------ our own means
@torch.no_grad()
def means_of_inference(table, arch, length, dtype):
    """adaLN computed beforehand (what it takes of a forward bounds the gain); guidance as one batch; LoRA."""
    device, what = table.device, f"width {arch.width}"
    mmdit = build(lambda: MMDiT(replace(arch, detail_channels=arch.in_channels)), device, dtype)
    x, sigma, context, pooled = inputs(mmdit.arch, 32, length, device, dtype, batch=2)
    c = torch.randn(2, arch.width, device=device, dtype=dtype)
    adaln = [stream.adaLN_modulation for block in mmdit.joint_blocks
             for stream in (block.x_block, block.context_block)] + [mmdit.final_layer.adaLN_modulation]
    once = lambda: mmdit(x, sigma, context, pooled)
    table.race(f"all adaLN : a guided forward, {what}", lambda: [f(c) for f in adaln], once)
    table.race(f"guidance as a batch of 2 : two of 1, {what}", once,
               lambda: [mmdit(*(v[i:i + 1] for v in (x, sigma, context, pooled))) for i in (0, 1)])
    lora = adapt(build(lambda: MMDiT(arch), device, dtype), False, argparse.Namespace(**ARGS)).to(dtype)
    merged = merge_lora(copy.deepcopy(lora))
    table.race(f"LoRA merged : beside, {what}", lambda: merged(x, sigma, context, pooled),
               lambda: lora(x, sigma, context, pooled))

def means_of_training(table, arch, vae_arch, length, dtype):
    """Recomputed activations; the fused optimizer; caches."""
    device, side, batch = table.device, 32 if table.device == "cuda" else 16, 4
    davae = build(lambda: DAVAE(VAE(vae_arch)), device, dtype if device == "cuda" else torch.float32)
    z_hr, _, *text = inputs(replace(arch, detail_channels=arch.in_channels), side, length, "cpu",
                            torch.bfloat16, batch)
    images = torch.rand(batch, 3, 2 * side * davae.f, 2 * side * davae.f)
    encode = torch.no_grad()(lambda: davae.encode(images.to(device)))
    plain, thrifty = (trainer(arch, False, argparse.Namespace(**ARGS, checkpoint=c), device, dtype)
                      for c in (False, True))
    both = lambda: thrifty(z_hr, *text), lambda: plain(z_hr, *text)
    table.race(f"LoRA step, {side**2} tokens: recomputing : not", *both)
    table.weigh(f"LoRA step, {side**2} tokens: recomputing : not", *both)
    table.race(f"LoRA step, {side**2} tokens: cached : encoding", both[1], lambda: plain(encode(), *text))
    optimizers = [torch.optim.AdamW(plain.weights.values(), 1e-5, fused=fused) for fused in (True, False)]
    for p in plain.weights.values():
        p.grad = torch.ones_like(p)
    table.race("AdamW alone: fused : not", *(optimizer.step for optimizer in optimizers))

def attention_of_a_cpu(table):
    """Forward and backward in bf16: ours, which computes up to 256 tokens in float32, and torch's."""
    for tokens in 16, 64, 256, 1024:
        q, k, v = torch.randn(3, 2048 // tokens, 4, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        both = [lambda f=f: torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
                for f in (attention, torch.nn.functional.scaled_dot_product_attention)]
        table.race(f"attention, forward and backward, {tokens} tokens, bf16: ours : torch's", *both)

def main(args):
    device = pick_device(args.device)
    dtypes = [torch.float32, torch.bfloat16] if device == "cpu" and args.dtype == "auto" else [
        pick_dtype(args.dtype, device)]
    real = device == "cuda"
    arch, vae_arch, length = (MEDIUM, VAEArch(), 333) if real else (SMALL, SMALL_VAE, 77)
    about = taken_on(device) | {"compile": args.compile, "pairs": args.pairs}
    print("; ".join(f"{k} {v}" for k, v in about.items()))
    table = Table(device, args.pairs)
    for dtype in dtypes:
        if args.means:
            means_of_inference(table, arch, length, dtype)
            means_of_training(table, arch, vae_arch, length, dtype)
        else:
            with torch.no_grad():
                transformers(table, arch, length, dtype, args.compile, (4, 8) if args.tiny else (32, 64))
                if real:
                    decoders(table, vae_arch, 128, dtype, args.compile, goal=3.3)
                    decoders(table, vae_arch, 256, dtype, args.compile, goal=2.6)
                else:
                    decoders(table, vae_arch, 8 if args.tiny else 64, dtype, args.compile, goal=1 / 1.05)
    if args.means and device == "cpu":
        attention_of_a_cpu(table)
    if args.means and not real:         # where linears are large beside the rest
        wide = replace(arch, width=MEDIUM.width, depth=2, dual=(0,))
        means_of_inference(table, wide, length, torch.float32)
    if args.out:
        args.out.write_text(json.dumps(about | {"rows": table.rows}, indent=2) + "\n")

def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--means", action="store_true", help="ours against ours, one means at a time, instead")
    p.add_argument("--compile", action="store_true", help="both compiled block by block, too")
    p.add_argument("--tiny", action="store_true", help="few tokens, on a CPU: does it run?")
    p.add_argument("--pairs", type=int, default=7, help="of turns; the ratio is their median (default 7)")
    p.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
                   help="where it is measured (default auto)")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: a CPU takes both")
    add_attention_flag(p)
    p.add_argument("--out", type=Path, metavar="FILE", help="the numbers as JSON")
    return p.parse_args(argv)

if __name__ == "__main__":
    run(main, parse_args())
