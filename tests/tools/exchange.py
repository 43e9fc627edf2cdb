"""Why does alignment decide in the ablation, and not in the text run? The ablation with one thing exchanged.

    python tests/tools/exchange.py textures                                 # two runs, one or two minutes each
    python tests/tools/exchange.py text-model --model runs/base-only        # what base_only.py wrote; ten minutes a run

A class of the ablation is a shape and a texture, with an embedding of its own: to learn one texture is to learn six
embeddings. In the text model, a texture is a word that all shapes share.

textures: the embedding of a class is the sum of one of its shape and one of its texture.
text-model: the text run's MMDiT in the place of LightningDiT; a class is the caption "a circle with checks".

Nothing else changes. All other flags are the ablation's: with those of an ablation that has run, its stage 1 is taken.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import imagenet_eval as ie                                                                       # noqa: E402
from assets.world import SHAPES, TEXTURES                                                        # noqa: E402
from finetune_dit import warm_start                                                              # noqa: E402
from sample import load_mmdit, load_text_encoders                                                # noqa: E402
from vae_expand import TINY_MODEL, Parser, load_davae, load_vae, run                             # noqa: E402

# ------------------------------------------------------------ what is exchanged

class SharedTextures(nn.Module):
    """A table of class embeddings as sums, which begins as near to `table` as sums can come. (B,) -> (B, d)"""
    def __init__(self, table):
        super().__init__()
        classes, none = table.detach().split([len(table) - 1, 1])
        classes = classes.view(len(SHAPES), len(TEXTURES), -1)
        self.shapes = nn.Parameter(classes.mean(1, keepdim=True))                           # (shapes, 1, d)
        self.textures = nn.Parameter(classes.mean(0, keepdim=True) - classes.mean((0, 1)))  # (1, textures, d)
        self.none = nn.Parameter(none)                                                      # of guidance, (1, d)

    def forward(self, y):
        return F.embedding(y, torch.cat([(self.shapes + self.textures).flatten(0, 1), self.none]))

class TextModel(nn.Module):
    """An MMDiT behind LightningDiT's interface: classes for captions, t = 0 for noise, data - noise for velocity."""
    def __init__(self, mmdit, text, latent_side):
        super().__init__()
        self.mmdit = mmdit
        captions = [f"a {shape} with {texture}" for shape in SHAPES for texture in TEXTURES] + [""]
        context, pooled = text(captions)
        self.register_buffer("context", context)                                            # (classes + 1, L, d)
        self.register_buffer("pooled", pooled)                                              # (classes + 1, d')
        patch = mmdit.arch.patch
        self.arch = SimpleNamespace(classes=len(captions) - 1, in_channels=mmdit.arch.in_channels, patch=patch,
                                    detail_channels=mmdit.arch.detail_channels, side=latent_side // patch)

    @property
    def pos_embed(self):
        return self.mmdit.pos_embed

    def forward(self, x, t, y):
        return -self.mmdit(x, 1 - t, self.context[y], self.pooled[y])

def share_textures(build, args, channels, statistics, device):
    """LightningDiT, warm-started, with the textures' embeddings in common."""
    dit, C = build(args, channels, statistics, device)
    table = dit.y_embedder["embedding_table"]
    dit.y_embedder["embedding_table"] = SharedTextures(table.weight)
    return dit, C

def take_text_model(model, args, channels, statistics):
    """The MMDiT of `model`, warm-started. It knows its latents as the VAE normalises them."""
    torch.manual_seed(args.seed)
    mmdit = load_mmdit(model)
    C = mmdit.arch.in_channels
    mean, std = statistics
    mean[:, :C] = 0
    std[:, :C] = 1
    warm_start(mmdit, channels - C, zero_init=not args.no_zero_init)
    return TextModel(mmdit, load_text_encoders(model), latent_side=args.size // 8), C       # f = 4, s = 2

# ------------------------------------------------------------ the two runs

def train_both(args, name):
    """Stage 2 over lambda 0.5 and over lambda 0, scored as the ablation scores; args: the ablation's."""
    net = ie.load_world_features("cpu")
    real = ie.feature_statistics("world", net, args, 0, 1, "cpu", args.images)
    for lambda_align in (0.5, 0.0):
        stage1 = ie.train_stage1(args, lambda_align, 0, 1, "cpu")
        ae = load_davae(stage1 / "davae.safetensors", load_vae(args.vae))
        shard = ie.LatentCache(stage1 / "latents", ("latents", "labels"), args.seed).shards[0]
        scoring = ie.Scoring(ae, net, real, shard["latents"][:240], shard["labels"][:240])

        def score(dit, statistics, last, scoring=scoring):
            return ie.score(dit, scoring, statistics, last, args, 0, 1, "cpu")

        out = args.out / name / f"lambda-{lambda_align:g}"
        lines = ie.train(ie.with_flags(args, latents=stage1 / "latents", out=out), 0, 1, "cpu", score)
        points = [f"{line['epoch']:g}: {line['texture']:.0f}%" for line in lines if "texture" in line]
        print(f"{name}, lambda {lambda_align:g}: textures after epoch {', '.join(points)}", flush=True)

def main(argv):
    p = Parser(__doc__)
    p.add_argument("what", choices=["textures", "text-model"], help="What to exchange.")
    p.add_argument("--model", default=TINY_MODEL, help="The folder of the text model (default: embedded).")
    given, flags = p.parse_known_args(argv)
    args = ie.parse_args(["ablate", *flags])
    build = ie.build_dit

    def build_exchanged(*inputs):
        if given.what == "textures":
            return share_textures(build, *inputs)
        return take_text_model(given.model, *inputs[:3])

    ie.build_dit = build_exchanged
    ie.export_lightningdit = lambda *inputs: None           # it would not be a file that others can load
    train_both(args, given.what)

if __name__ == "__main__":
    run(main, sys.argv[1:])
