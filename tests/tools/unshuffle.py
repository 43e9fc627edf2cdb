"""Why not simply pixel-unshuffle the latent? Stage 2 on the pretrained latent of the full-size image, s x s of it a token.

    python finetune_dit.py && python tests/tools/unshuffle.py     # five to ten minutes each
    python tests/tools/unshuffle.py --seed 1 --out runs/unshuffle-1 --beside runs/finetune-1    # finetune_dit.py's flags

As many tokens as DA-VAE, no stage 1, and a decoder that is the pretrained one: C channels of one sub-pixel in
the base's place, (s s - 1) C beside. Everything else is finetune_dit.py's: zero-init, schedule, LoRA, the table.
Last, of both runs' pictures and of three rivals', base pictures up-sampled and the stock model at full size, with as
many sampling steps and with as many as take DA-VAE's seconds: how often the classifier reads the texture that was asked
for, the Frechet distance to real ones in its features, the noise of their plain backgrounds in grey levels, and the
length of the shapes' outlines.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import finetune_dit                                                                              # noqa: E402
from align import format_table                                                                   # noqa: E402
from assets.world import COLOURS, World, load_classifier                                         # noqa: E402
from imagenet_eval import frechet_distance, load_world_features, measure                        # noqa: E402
from sample import load_mmdit                                                                    # noqa: E402
from vae_expand import TINY_MODEL, downsample, load_davae, load_vae, read_json, run, weights_hash       # noqa: E402

class Unshuffled(nn.Module):
    """A DAVAE's interface. encode: (B, 3, H, W) -> (B, s s C, H/(s f), W/(s f)), decode: back."""
    def __init__(self, vae, scale=2):
        super().__init__()
        self.vae, self.decoder, self.s, self.f = vae, vae.decoder, scale, vae.f * scale
        self.C, self.D = vae.C, vae.C * (scale**2 - 1)

    def encode(self, x, sample=False):
        return rearrange(self.vae.encode(x, sample), "b c (h p) (w q) -> b (p q c) h w", p=self.s, q=self.s)

    def decode(self, z):
        return self.vae.decode(rearrange(z, "b (p q c) h w -> b c (h p) (w q)", p=self.s, q=self.s))

def noise(x):
    """Mean distance to the mean of 5 x 5 pixels, of 255 levels, in a frame that no shape reaches. (B, 3, 64, 64)"""
    rough = (x - F.avg_pool2d(x, 5, 1, 2)).abs() * 127.5
    frame = torch.zeros(64, 64, dtype=torch.bool)
    frame[3:-3, 3:-3] = True
    frame[9:-9, 9:-9] = False
    return rough[:, :, frame].mean().item()

def outline(x, labels):
    """Mean length of the outline, in pixels of the base size, where no texture is to be seen.

    A pixel is the shape's if its colour is nearer to the shape's own than to the background's. (B, 3, 64, 64), (B, 4)
    """
    base = downsample(x, 2)                                                                 # (B, 3, 32, 32)
    palette = torch.tensor(list(COLOURS.values()))
    shape = palette[labels[:, 1]][..., None, None]
    behind = 0.45 * palette[labels[:, 3]][..., None, None] - 0.42                       # as World.sample has it
    inside = (base - shape).pow(2).sum(1) < (base - behind).pow(2).sum(1)                   # (B, 32, 32)
    turns = (inside[:, 1:] != inside[:, :-1]).sum((1, 2)) + (inside[:, :, 1:] != inside[:, :, :-1]).sum((1, 2))
    return turns.float().mean().item()

def draw_rivals(args, previews, ms):
    """{name: pictures of the same captions, milliseconds an image} by the stock model: of the base size, up-sampled;
    at full size; and that with as many steps as take `ms` milliseconds an image."""
    stock, vae = load_mmdit(args.model), load_vae(args.model)
    base, base_ms = finetune_dit.sample_previews(stock, vae, previews, args.size // 2, args)
    full, full_ms = finetune_dit.sample_previews(stock, vae, previews, args.size, args)
    fewer = argparse.Namespace(**vars(args) | {"sample_steps": max(1, round(args.sample_steps * ms / full_ms))})
    soon, soon_ms = finetune_dit.sample_previews(stock, vae, previews, args.size, fewer)
    return {"base, up-sampled": (finetune_dit.upsample(base, 2), base_ms), "stock at full size": (full, full_ms),
            f"stock, {fewer.sample_steps} steps": (soon, soon_ms)}

def main(args, beside):
    """beside: the folder of finetune_dit.py's run to compare with."""
    args.davae = args.out / "unshuffled.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    ae = Unshuffled(load_vae(args.model))
    about = dict(detail_channels=str(ae.D), scale=str(ae.s), base_vae=weights_hash(ae.vae))
    if not args.davae.is_file():                # its hash guards the cache, and metadata has no fixed order
        save_file({"none": torch.zeros(1)}, args.davae, metadata=about)
    finetune_dit.load_davae = lambda path, vae: Unshuffled(vae)
    finetune_dit.main(args)
    previews = finetune_dit.load_preview_inputs(args, "cpu")
    net = load_world_features("cpu")
    real = measure([World(split="val").sample(range(1000, 1960))[::2]], net, "cpu")[1:3]
    classifier = load_classifier()
    drawn = {}
    ms = 0
    for name, folder in {"pixel-unshuffle": args.out, "DA-VAE": beside}.items():
        if (folder / "dit.safetensors").is_file():
            if name == "DA-VAE":
                ae = load_davae(read_json(folder / "args.json")["davae"], load_vae(args.model))
            mmdit = load_mmdit(folder / "dit.safetensors")
            drawn[name] = finetune_dit.sample_previews(mmdit, ae, previews, args.size, args)
            ms = drawn[name][1]
    drawn |= draw_rivals(args, previews, ms) | {"real": (previews.images, None)}
    table = {}
    for name, (images, ms) in drawn.items():
        images = images.clamp(-1, 1)
        found = measure([(images, torch.zeros(len(images)))], net, "cpu")[1:3]
        table[name] = {"texture %": 100 * classifier.accuracy(images, previews.labels)[2].item(),
                       "noise": noise(images), "outline": outline(images, previews.labels),
                       "distance": frechet_distance(*found, *real)} | ({"ms/image": ms} if ms else {})
    print(f"{format_table(table)}\n{len(previews.images)} held-out captions, seed {args.seed}"
          "; sample.py cannot draw with this transformer, whatever is said above: its latents are no DA-VAE's")

if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--beside", type=Path, default=Path("runs/finetune"))
    known, flags = own.parse_known_args()
    args = finetune_dit.parse_args(["--davae", TINY_MODEL, "--out", "runs/unshuffle", *flags])
    run(partial(main, beside=known.beside), args)
