"""Plausible wrong answers, four to six an exercise: the tests must tell them from the right ones.

Do the exercises first; then this is a list of what is easily confused.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

def mean_of_groups(z_d, C):
    return z_d.unflatten(1, (C, -1)).mean(2)

# ------------------------------------------------------------ project

def strided_groups(z_d, C):
    return z_d.unflatten(1, (-1, C)).mean(1)

def sum_of_each_group(z_d, C):
    return z_d.unflatten(1, (C, -1)).sum(2)

def first_of_all_channels(z_d, C):
    return z_d[:, :C]

def group_mean_over_the_grid(z_d, C):
    return z_d.unflatten(1, (C, -1)).mean((2, 3, 4), keepdim=True)[:, :, 0].expand(-1, -1, *z_d.shape[2:])

# ------------------------------------------------------------ align_loss

def sum_over_channels(z_d, z):
    return ((mean_of_groups(z_d, z.shape[1]) - z.detach())**2).sum(1).mean()

def sum_over_all(z_d, z):
    return ((mean_of_groups(z_d, z.shape[1]) - z.detach())**2).sum()

def gradient_to_both(z_d, z):
    return F.mse_loss(mean_of_groups(z_d, z.shape[1]), z)

def gradient_to_the_wrong_one(z_d, z):
    return F.mse_loss(mean_of_groups(z_d, z.shape[1]).detach(), z)

def both_normalised(z_d, z):
    return F.mse_loss(F.normalize(mean_of_groups(z_d, z.shape[1]), dim=1), F.normalize(z.detach(), dim=1))

def every_channel_aligned(z_d, z):
    return F.mse_loss(z_d, z.detach().repeat_interleave(z_d.shape[1] // z.shape[1], dim=1))

# ------------------------------------------------------------ omega

def without_the_half(n, n_warm):
    return 1 - math.cos(math.pi * n / n_warm) if n < n_warm else 1.0

def sine(n, n_warm):
    return math.sin(math.pi / 2 * n / n_warm) if n < n_warm else 1.0

def straight_line(n, n_warm):
    return min(1.0, n / n_warm)

def never_clamped(n, n_warm):
    return (1 - math.cos(math.pi * n / n_warm)) / 2

def falling(n, n_warm):
    return (1 + math.cos(math.pi * n / n_warm)) / 2 if n < n_warm else 1.0

# ------------------------------------------------------------ flow_loss

def unweighted_count(u_hat, u, C, w):
    square = (u_hat - u)**2
    return (square[:, :C].sum() + w * square[:, C:].sum()) / square.numel()

def mean_of_two_means(u_hat, u, C, w):
    square = (u_hat - u)**2
    return (square[:, :C].mean() + w * square[:, C:].mean()) / (1 + w)      # right if D = C, and only then

def details_first(u_hat, u, C, w):
    square = (u_hat - u)**2
    detail, base = square[:, :-C], square[:, -C:]
    return (base.sum() + w * detail.sum()) / (base.numel() + w * detail.numel())

def base_mean_plus_detail_mean(u_hat, u, C, w):
    square = (u_hat - u)**2
    return square[:, :C].mean() + w * square[:, C:].mean()

# ------------------------------------------------------------ interleave

def one_behind_the_other(base, detail, patch):
    return torch.cat([base, detail])

def patch_innermost(base, detail, patch):
    rows = [part.unflatten(0, (patch**2, -1)) for part in (base, detail)]
    return torch.cat(rows, dim=1).transpose(0, 1).flatten(0, 1)

def details_before_base(base, detail, patch):
    rows = [part.unflatten(0, (patch**2, -1)) for part in (detail, base)]
    return torch.cat(rows, dim=1).flatten(0, 1)

def by_rows_of_the_patch(base, detail, patch):
    rows = [part.unflatten(0, (patch, -1)) for part in (base, detail)]
    return torch.cat(rows, dim=1).flatten(0, 1)

def all_in_one_row(base, detail, patch):
    return torch.cat([part.reshape(patch**2, -1) for part in (base, detail)], dim=1).flatten()

# ------------------------------------------------------------ flow_step

def towards_the_noise(x, u, t, t_next):
    return x - (t_next - t) * u

def all_of_t(x, u, t, t_next):
    return x - t * u

def even_steps(x, u, t, t_next):
    return x - u / 28

def data_for_the_velocity(x, u, t, t_next):
    return (1 - t_next) * u + t_next / t * (x - (1 - t) * u)                # if u were a prediction of z

# ------------------------------------------------------------ guidance

def halves_swapped(u, cfg):
    negative, prompt = u.chunk(2)
    return negative + cfg * (prompt - negative)

def one_too_many(u, cfg):
    prompt, negative = u.chunk(2)
    return prompt + cfg * (prompt - negative)

def scale_on_both(u, cfg):
    prompt, negative = u.chunk(2)
    return cfg * prompt - cfg * negative

def neighbours_paired(u, cfg):
    prompt, negative = u[::2], u[1::2]
    return negative + cfg * (prompt - negative)

# ------------------------------------------------------------ frechet_distance

def without_a_root(mu1, s1, mu2, s2):
    return ((mu1 - mu2)**2).sum() + np.trace(s1 + s2 - 2 * s1 @ s2)

def root_of_each_element(mu1, s1, mu2, s2):
    return ((mu1 - mu2)**2).sum() + np.trace(s1 + s2 - 2 * np.sqrt(np.abs(s1 @ s2)))

def means_forgotten(mu1, s1, mu2, s2):
    return np.trace(s1) + np.trace(s2) - 2 * np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()

def means_not_squared(mu1, s1, mu2, s2):
    return np.linalg.norm(mu1 - mu2) + means_forgotten(mu1, s1, mu2, s2)

def zeros_may_turn_negative(mu1, s1, mu2, s2):
    values = np.linalg.eigvals(s1 @ s2).real
    with np.errstate(invalid="ignore"):
        return ((mu1 - mu2)**2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(values).sum()

WRONG = {
    "project": [strided_groups, sum_of_each_group, first_of_all_channels, group_mean_over_the_grid],
    "align_loss": [sum_over_channels, sum_over_all, gradient_to_both, gradient_to_the_wrong_one,
                   both_normalised, every_channel_aligned],
    "omega": [without_the_half, sine, straight_line, never_clamped, falling],
    "flow_loss": [unweighted_count, mean_of_two_means, details_first, base_mean_plus_detail_mean],
    "interleave": [one_behind_the_other, patch_innermost, details_before_base, by_rows_of_the_patch,
                   all_in_one_row],
    "flow_step": [towards_the_noise, all_of_t, even_steps, data_for_the_velocity],
    "guidance": [halves_swapped, one_too_many, scale_on_both, neighbours_paired],
    "frechet_distance": [without_a_root, root_of_each_element, means_forgotten, means_not_squared,
                         zeros_may_turn_negative],
}
