"""Do the real weights load, and do they give the same numbers here as elsewhere? For whoever has them.

    python tests/tools/real_weights.py --model stabilityai/stable-diffusion-3.5-medium
    python tests/tools/real_weights.py                                    # the embedded model, to see the form

It loads every network strictly and prints, for each: parameter count, a hash of its weights, the norm of its output on a fixed input; then draws
one picture. Two machines, two layouts or two versions of this code should agree to the digits printed.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sample import generate, load_clip, load_mmdit, load_t5, load_text_encoders                 # noqa: E402
from vae_expand import (TINY_MODEL, Parser, load_vae, peak_memory, pick_device, pick_dtype, run, # noqa: E402
                        save_png, weights_hash)

def describe(name, module, **outputs):
    """One line: what a network is, and how large its outputs are."""
    count = sum(p.numel() for p in module.parameters())
    norms = "  ".join(f"|{k}| {v.float().norm().item():.6g} {tuple(v.shape)}" for k, v in outputs.items())
    print(f"{name:12} {count:>13,} parameters  {weights_hash(module)}  {norms}", flush=True)

def fixed(*shape):
    """The same numbers everywhere: no generator, sines of the index."""
    n = torch.tensor(shape).prod().item()
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.37).float().view(shape)

@torch.no_grad()
def main(args):
    device = pick_device(args.device)
    where = dict(dtype=pick_dtype(args.dtype, device), device=device)
    vae = load_vae(args.model, **where)
    x = fixed(1, 3, 16 * vae.f, 16 * vae.f).to(device)
    z = vae.encode(x)
    describe("VAE", vae, encode=z, decode=vae.decode(z))
    text = load_text_encoders(args.model, **where)
    context, pooled = text([args.prompt])
    for part in "clip_l", "clip_g":
        describe(part, load_clip(args.model, part, **where))
    describe("t5", load_t5(args.model, **where))
    norms = [f"|{n}| {v.float().norm():.6g} {tuple(v.shape)}" for n, v in (("context", context), ("pooled", pooled))]
    print(f"{'text':12} {'  '.join(norms)}")
    mmdit = load_mmdit(args.model, **where)
    latent = fixed(1, mmdit.arch.in_channels, 16, 16).to(device)
    velocity = mmdit(latent, torch.tensor([0.5], device=device), context, pooled)
    describe("MMDiT", mmdit, velocity=velocity)
    print(mmdit.arch)
    image = generate(mmdit, vae, text, [args.prompt], args.size, args.size, seeds=[0])[0]
    save_png(args.out, image, prompt=args.prompt, seed=0, model=args.model)
    print(f"{args.out}: {args.size}x{args.size}, peak memory {peak_memory(device):.2f} GB")

def parse_args():
    p = Parser(__doc__)
    p.add_argument("--model", default=TINY_MODEL, help="folder or hub id (default: the embedded model)")
    p.add_argument("--prompt", default="a red circle with vertical stripes on a blue background")
    p.add_argument("--size", type=int, default=64, help="of the picture (default 64; the real model: 1024)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on cuda")
    p.add_argument("--out", default="real_weights.png", help="the picture (default real_weights.png)")
    return p.parse_args()

if __name__ == "__main__":
    run(main, parse_args())
