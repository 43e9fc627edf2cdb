"""Does the copy of z in an aligned z_d help stage 2? The ablation's full run, with z taken out of z_d.

    python imagenet_eval.py ablate && python tests/tools/subtract_z.py         # three runs, a minute or two each

Eq. (3) and (4) make the mean of each D / C detail channels a copy of one channel of z. Here the transformer sees
z_d without that copy, normalised again, and the decoder gets it back. Nothing else changes.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import imagenet_eval as ie                                                                       # noqa: E402
from vae_expand import TINY_MODEL, InputError, load_davae, load_vae, run                          # noqa: E402

class WithZ:
    """The DA-VAE, for latents that lack the copy of z."""
    def __init__(self, ae, mean, std):
        self.ae, self.mean, self.std = ae, mean, std

    def decode(self, x):
        z, residual = x.split([self.ae.C, self.ae.D], dim=1)
        return self.ae.join(z, residual * self.std + self.mean + copies(z, self.ae))

def copies(z, ae):
    """z as an aligned z_d holds it: each channel D / C times. (B, C, h, w) -> (B, D, h, w)"""
    return z.repeat_interleave(ae.D // ae.C, dim=1)

def write_residuals(folder, ae, out):
    """The latents in `folder` with z_d - z for z_d, in `out` -> mean and deviation of z_d - z"""
    shards = [load_file(path) for path in sorted(folder.glob("shard-*"))]
    z, z_d = torch.cat([shard["latents"].float() for shard in shards]).split([ae.C, ae.D], dim=1)
    z_d = ae.denormalise_detail(z_d)
    residual = z_d - copies(z, ae)
    print(f"variance of z_d - z: {residual.var() / z_d.var():.1%} of z_d's")
    mean, std = residual.mean((0, 2, 3), keepdim=True), residual.std((0, 2, 3), keepdim=True)
    latents = torch.cat([z, (residual - mean) / std], dim=1).half()
    labels = torch.cat([shard["labels"] for shard in shards])
    out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents, "latents_flip": latents.clone(), "labels": labels},
              out / "shard-00000.safetensors")
    flat = latents.float().transpose(0, 1).flatten(1)
    ie.write_statistics(out, flat.mean(1), flat.std(1))
    return mean, std

def main(folder):
    if not (folder / "lambda-0.5" / "latents").is_dir():
        raise InputError(f"{folder}: no ablation in it; run first: python imagenet_eval.py ablate")
    args = ie.parse_args(["ablate"])
    net = ie.load_world_features("cpu")
    ae = load_davae(folder / "lambda-0.5" / "davae.safetensors", load_vae(TINY_MODEL))
    out = folder / "z-subtracted"
    statistics = write_residuals(folder / "lambda-0.5" / "latents", ae, out / "latents")
    real = ie.feature_statistics("world", net, args, 0, 1, "cpu", args.images)
    shard = load_file(out / "latents" / "shard-00000.safetensors")
    scoring = ie.Scoring(WithZ(ae, *statistics), net, real, shard["latents"][:240], shard["labels"][:240])

    def score(dit, statistics, last):
        return ie.score(dit, scoring, statistics, last, args, 0, 1, "cpu")

    for seed in range(args.seeds):
        ie.train(ie.with_flags(args, latents=out / "latents", out=out / f"run-{seed}", seed=seed), 0, 1, "cpu", score)

if __name__ == "__main__":
    run(main, Path(sys.argv[1] if len(sys.argv) > 1 else "runs/imagenet/ablate"))
