"""The solutions: the five scripts' own functions; where one is a line of a script, that line is run."""
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from align import align_loss, project                           # noqa: E402, F401
import finetune_dit                                             # noqa: E402
from finetune_dit import omega                                  # noqa: E402, F401
from imagenet_eval import frechet_distance                      # noqa: E402, F401
from sample import MMDiTArch, fuse_details, generate            # noqa: E402

def flow_loss(u_hat, u, C, w):
    return finetune_dit.flow_loss(u_hat, u, C, w)

def interleave(base, detail, patch):
    state = {"x_embedder.proj.weight": torch.zeros(1, 1), "P_prime.weight": torch.zeros(1, 1)}
    for leaf in "weight", "bias":
        state[f"final_layer.linear.{leaf}"] = base
        state[f"O_prime.{leaf}"] = detail
    return fuse_details(state, patch)["final_layer.linear.weight"]

def flow_step(x, u, t, t_next):
    return generated(x, u, t, t_next, cfg=1)

def guidance(u, cfg):
    if cfg > 1:
        return generated(torch.zeros_like(u[:len(u) // 2]), u, 0, 1, cfg)   # from 0, for a time of 1: u itself
    u_text, u_negative = u.chunk(2)                         # which generate does not ask for at cfg <= 1
    return u_negative + cfg * (u_text - u_negative)

def generated(x, u, t, t_next, cfg):
    """Where one step of generate leads from x, if the transformer answers u."""
    mmdit = Mock(return_value=u, arch=MMDiTArch(in_channels=x.shape[1], patch=1))
    mmdit.context_embedder.weight.device = "cpu"
    text = [torch.zeros(1, 1)] * (2 if cfg == 1 else 4)
    with patch("sample.get_sigmas", return_value=torch.tensor([t, t_next])):
        return generate(mmdit, Mock(f=1), text, [""] * len(x), *x.shape[2:], steps=1, cfg=cfg, noise=x,
                        return_latents=True)
