"""Does it matter for alignment whether the transformer has seen full-size pictures? One that has not, to try it.

    python tests/tools/base_only.py                 # runs/base-only: assets/tiny, its transformer trained at 32 px alone

The embedded transformer learned at 32 and 64 px, as SD3.5 learned at many sizes; the embedded LightningDiT, like
the paper's on ImageNet, at the base size alone. Then, with and without alignment (align.py --align 0, 0.5):

    python finetune_dit.py --model runs/base-only --davae DAVAE --size 64 --batch 64 --accumulate 1 --steps 400 \\
        --lr 2e-3 --warmup 20 --n-warm 100 --shift 1 --ema 0.99 --every 20 --preview 100 --sample-steps 20
"""
import shutil
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from assets.make_tiny import initialise, save, train                                                # noqa: E402
from assets.world import World, load_classifier                                                     # noqa: E402
from sample import MMDiT, MMDiTArch, generate, load_mmdit, load_text_encoders, shift_timesteps      # noqa: E402
from vae_expand import TINY_MODEL, Parser, downsample, load_vae, run                                # noqa: E402

def encode_base(world, vae, text, count):
    """Latents (count, C, h, w) of base copies; context and pooled of each different caption, the empty one last;
    each picture's caption among those."""
    labels, latents = [], []
    with torch.no_grad():
        for first in range(0, count, 96):
            images, _, label = world.sample(range(first, first + 96))
            labels.append(label)
            latents.append(vae.encode(downsample(images, 2)))
    captions = [world.caption(label) for label in torch.cat(labels)]
    unique = sorted(set(captions)) + [""]
    context, pooled = text(unique)
    return torch.cat(latents), context, pooled, torch.tensor([unique.index(caption) for caption in captions])

def main(args):
    out = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(TINY_MODEL, out, dirs_exist_ok=True)
    args.work = out.parent / f"{out.name}-work"
    args.work.mkdir(exist_ok=True)
    world, vae, text = World(split="train"), load_vae(out), load_text_encoders(out)
    latents, context, pooled, rows = encode_base(world, vae, text, 5760)

    def loss_at(model, done):
        pick = torch.randint(len(rows), (64,))
        row = torch.where(torch.rand(64) < 0.1, len(context) - 1, rows[pick])
        z, noise = latents[pick], torch.randn_like(latents[pick])
        t = shift_timesteps(torch.randn(64).sigmoid(), 3.0)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            u = model(z + t[:, None, None, None] * (noise - z), t, context[row], pooled[row])
        return (u.float() - (noise - z)).pow(2).mean()

    torch.manual_seed(args.seed)
    mmdit = MMDiT(MMDiTArch(depth=4, width=192, in_channels=vae.C, table=16, context_dim=context.shape[2],
                            pooled_dim=pooled.shape[1], dual=(0,)))
    mmdit, seconds = train("base-only", initialise(mmdit), loss_at, args.steps, 1e-3, 0.99, args)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in mmdit.state_dict().items()}
    save(out / "sd3.5_tiny.safetensors", state, torch.bfloat16)
    _, captions, labels = World(split="val").sample(range(50))
    images = generate(load_mmdit(out), vae, text, captions, 32, 32, steps=28, cfg=2.5, shift=3.0, seeds=range(50))
    read = load_classifier().accuracy(images, labels)
    print(f"{out}: {seconds:.0f} s; 50 held-out captions at 32 px: shape {read[0]:.0%}, colour {read[1]:.0%}")

if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/base-only"), help="the folder to fill")
    p.add_argument("--steps", type=int, default=1500, help="of training (default 1500: ten minutes)")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data and noise (default 0)")
    p.set_defaults(quick=False)                 # of make_tiny's train: a few steps alone, whatever --steps says
    run(main, p.parse_args())
