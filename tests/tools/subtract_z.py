"""Why does alignment cost texture accuracy in the embedded world? The ablation's full run, with z taken out of z_d.

    python imagenet_eval.py ablate && python tests/tools/subtract_z.py         # two runs, a minute each

The transformer sees (z_d - z), normalised again; the decoder gets z back. Nothing else changes.
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import imagenet_eval as ie                                                                       # noqa: E402
from vae_expand import TINY_MODEL, load_davae, load_vae                                           # noqa: E402

def main(folder):
    args = ie.parse_args(["ablate"])
    net = ie.load_world_features("cpu")
    ae = load_davae(folder / "lambda-0.5" / "davae.safetensors", load_vae(TINY_MODEL))
    out = folder / "z-subtracted"
    shards = [load_file(path) for path in sorted((folder / "lambda-0.5" / "latents").glob("shard-*"))]
    z, z_d = torch.cat([shard["latents"].float() for shard in shards]).split([ae.C, ae.D], dim=1)
    z_d = ae.denormalise_detail(z_d)
    residual = z_d - z
    print(f"variance of z_d - z: {residual.var() / z_d.var():.1%} of z_d's")
    mean, std = residual.mean((0, 2, 3), keepdim=True), residual.std((0, 2, 3), keepdim=True)
    latents = torch.cat([z, (residual - mean) / std], dim=1).half()
    (out / "latents").mkdir(parents=True, exist_ok=True)
    labels = torch.cat([shard["labels"] for shard in shards])
    save_file({"latents": latents, "latents_flip": latents.clone(), "labels": labels},
              out / "latents" / "shard-00000.safetensors")
    flat = latents.float().transpose(0, 1).flatten(1)
    ie.write_statistics(out / "latents", flat.mean(1), flat.std(1))

    class WithZ:
        """The DA-VAE, for latents that lack the copy."""
        def decode(self, x):
            z, residual = x.split([ae.C, ae.D], dim=1)
            return ae.join(z, residual * std + mean + z)

    real = ie.feature_statistics("world", net, args, 0, 1, "cpu", args.images)

    def score(dit, statistics):
        return ie.score(dit, WithZ(), statistics, net, real, args, 0, 1, "cpu")

    for seed in 0, 1:
        run = vars(args) | {"latents": out / "latents", "out": out / f"run-{seed}", "seed": seed}
        ie.train(argparse.Namespace(**run), 0, 1, "cpu", score)

if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/imagenet/ablate"))
