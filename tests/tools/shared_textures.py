"""Does alignment help because every class must learn its texture for itself? The ablation, with textures in common.

    python imagenet_eval.py ablate && python tests/tools/shared_textures.py    # two runs, a minute or two each
    python tests/tools/shared_textures.py FOLDER FLAGS                         # over another ablation, with its flags

A class of the ablation is a shape and a texture, with an embedding of its own: to learn one texture is to learn six
embeddings. In the text model, a texture is a word that all shapes share. Here the embedding of a class is the sum of
one of its shape and one of its texture. Nothing else changes.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import imagenet_eval as ie                                                                       # noqa: E402
from assets.world import SHAPES, TEXTURES                                                        # noqa: E402
from vae_expand import InputError, load_davae, load_vae, run                                     # noqa: E402

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

def main(argv):
    folder = Path(argv[0] if argv else "runs/imagenet/ablate")
    if not (folder / "lambda-0" / "latents").is_dir():
        raise InputError(f"{folder}: no ablation in it; run first: python imagenet_eval.py ablate")
    build = ie.build_dit

    def build_shared(*inputs):
        dit, C = build(*inputs)
        table = dit.y_embedder["embedding_table"]
        dit.y_embedder["embedding_table"] = SharedTextures(table.weight)
        return dit, C

    ie.build_dit = build_shared
    ie.export_lightningdit = lambda *inputs: None           # it would not be a file that others can load
    args = ie.parse_args(["ablate", *argv[1:]])
    net = ie.load_world_features("cpu")
    real = ie.feature_statistics("world", net, args, 0, 1, "cpu", args.images)
    for lambda_align in ("0.5", "0"):
        stage1 = folder / f"lambda-{lambda_align}"
        ae = load_davae(stage1 / "davae.safetensors", load_vae(args.vae))
        shard = ie.LatentCache(stage1 / "latents", ("latents", "labels"), args.seed).shards[0]
        scoring = ie.Scoring(ae, net, real, shard["latents"][:240], shard["labels"][:240])

        def score(dit, statistics, last, scoring=scoring):
            return ie.score(dit, scoring, statistics, last, args, 0, 1, "cpu")

        out = folder / "shared-textures" / f"lambda-{lambda_align}"
        ie.train(ie.with_flags(args, latents=stage1 / "latents", out=out), 0, 1, "cpu", score)

if __name__ == "__main__":
    run(main, sys.argv[1:])
