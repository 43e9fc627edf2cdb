"""Right answers, written otherwise than the scripts': the tests must not ask for one way of writing.

Do the exercises first.
"""
import math

import numpy as np
import torch

def project(z_d, C):
    r = z_d.shape[1] // C
    return sum(z_d[:, k::r] for k in range(r)) / r

def align_loss(z_d, z):
    return (project(z_d, z.shape[1]) - z.detach()).square().mean()

def omega(n, n_warm):
    return math.sin(math.pi / 2 * min(1, n / n_warm))**2

def flow_loss(u_hat, u, C, w):
    weight = torch.ones(u.shape[1])
    weight[C:] = w
    weight = weight.view(-1, 1, 1).expand_as(u)
    return (weight * (u_hat - u)**2).sum() / weight.sum()

def interleave(base, detail, patch):
    parts = []
    for rows in zip(base.chunk(patch * patch), detail.chunk(patch * patch)):
        parts += rows
    return torch.cat(parts)

def flow_step(x, u, t, t_next):
    z, noise = x - t * u, x + (1 - t) * u
    return (1 - t_next) * z + t_next * noise

def guidance(u, cfg):
    prompts, negatives = u.chunk(2)
    return cfg * prompts + (1 - cfg) * negatives

def frechet_distance(mu1, s1, mu2, s2):
    eigenvalues = np.linalg.eigvals(s1 @ s2).real.clip(min=0)
    return np.sum((mu1 - mu2)**2) + np.trace(s1 + s2) - 2 * np.sqrt(eigenvalues).sum()
