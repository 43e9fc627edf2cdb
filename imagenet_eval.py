"""Chapter 5 - the proof: class-conditional generation on ImageNet, its metrics, and the ablation.

LightningDiT over VA-VAE at 256 x 256 is warm-started to 512 x 512 at equal tokens, by chapter 4's
functions: encode pictures, train, sample, score (fid, recon); without --data on the embedded world.
All of it runs under torchrun and leaves a JSON; encode, train, sample and ablate go on where they
were stopped.

    python imagenet_eval.py ablate          # Tables 4 and 5 in miniature: 35 minutes of one core
    torchrun --nproc_per_node 8 imagenet_eval.py train --latents latents/ \\
        --init lightningdit-xl.pt --compile

References: DA-VAE (CVPR 2026), section 4.2, Tables 4 and 5; Yao et al. 2025 (VA-VAE, LightningDiT);
Heusel et al. 2017 (FID); Salimans et al. 2016 (IS); Szegedy et al. 2015 (Inception-v3); Dhariwal
and Nichol 2021 (ADM).
"""
import argparse, inspect, io, json, math, re, time, zipfile, zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import nn, optim
from tqdm import tqdm

import align
from align import (Checkpoints, ImageDataset, Log, StepBatches, Watch, atomic_write, barrier,
                   check_measurable, check_progress, clip_gradients, count_notes, damaged,
                   ema_weights, fetch, format_table, gather_dict, gather_objects,
                   init_distributed, load_checkpoint, load_lpips, lock, pick_autocast, print0, psnr,
                   read_batches, set_lr, ssim, step_generator, update_ema)
from assets.world import TEXTURES, World, load_classifier
from finetune_dit import (LatentCache, flow_loss, missing_shards, omega, split_batches, warm_start,
                          write_shard)
from sample import (CLIPLayer, CLIPText, CLIPTokenizer, MMDiT, clip_text_sizes, fuse_details,
                    mjhq_name, read_records, shape_of, shift_timesteps, timestep_embedding)
from vae_expand import (TINY_MODEL, InputError, Parser, Place, add_attention_flag, attention,
                        check_size, count_or_0, decode_text, device_type, file_hash, find_file,
                        folder_path, is_tiny, list_images, listing_digest, load_davae, load_strict,
                        load_vae, local_folder, non_negative, number, pick_dtype, plot_curves,
                        positive, positive_int, read_file, read_image, read_json, run,
                        save_overview, seed_int, share, time_in_flow, to_bytes, to_image,
                        weights_hash, write_json)

# ------------------------------------------------------------ LightningDiT
@dataclass(frozen=True)
class LightningDiTArch:
    """What the state dict's shapes say. Defaults: LightningDiT-XL/1, 675 M parameters."""
    depth: int = 28
    width: int = 1152
    head: int = 72                  # width of one
    in_channels: int = 32           # C, of VA-VAE
    detail_channels: int = 0        # D, once warm-started over a DA-VAE
    patch: int = 1
    side: int = 16                  # tokens a side: fixed, as the tables of positions are
    classes: int = 1000             # the embedding has one more, for dropped labels
    qk_norm: bool = False

    @staticmethod
    def from_state_dict(state):
        """Architecture of a state dict. Raises: KeyError or ValueError if it is another
        network's."""
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, head = state["feat_rope.freqs_cos"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        return LightningDiTArch(depth, width, head, channels, 0, patch, math.isqrt(tokens),
                                classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                                qk_norm="blocks.0.attn.q_norm.weight" in state)

def grid_angles(side, n):
    """The rotation angles of all tokens: the row and the column of each, row by row, times n frequencies
    from 1 down to 1/10000 -> two (N, n)"""
    angles = torch.arange(side)[:, None] * 10000**(-torch.arange(n) / n)    # (side, n)
    return angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)

def rotate(x, cos, sin):
    """Turn adjacent pairs (a, b) by their position's angle. (B, heads, N, head), (N, head)
    -> like x"""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin

class LightningBlock(nn.Module):
    """Attention with rotary positions, then SwiGLU, both under adaLN.
    (B, N, d), c (B, d) -> (B, N, d)"""
    def __init__(self, d, head, qk_norm):
        super().__init__()
        self.head = head
        self.norm1 = nn.RMSNorm(d, eps=1e-6)
        self.norm2 = nn.RMSNorm(d, eps=1e-6)
        norms = {n: nn.RMSNorm(head, eps=1e-6) for n in ("q_norm", "k_norm")} if qk_norm else {}
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)} | norms)
        hidden = 8 * d // 3
        self.mlp = nn.ModuleDict({"w12": nn.Linear(d, 2 * hidden), "w3": nn.Linear(hidden, d)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, c, cos, sin):
        modulation = self.adaLN_modulation(c)[:, None]                      # (B, 1, 6 d)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        h = self.attn.qkv(self.norm1(x) * (1 + scale) + shift)
        q, k, v = rearrange(h, "b n (three h d) -> three b h n d", three=3, d=self.head)
        if "q_norm" in self.attn:
            q = self.attn.q_norm(q)
            k = self.attn.k_norm(k)
        q, k = (rotate(u.type_as(v), cos.type_as(v), sin.type_as(v)) for u in (q, k))
        h = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate * self.attn.proj(h)                                    # (B, N, d)
        a, b = self.mlp.w12(self.norm2(x) * (1 + scale_mlp) + shift_mlp).chunk(2, dim=-1)
        return x + gate_mlp * self.mlp.w3(F.silu(a) * b)

class LightningDiT(nn.Module):
    """LightningDiT (Yao et al. 2025), under the released checkpoint's key names.
    Its time runs the other way than SD3's: t = 0 is noise, t = 1 is data, and the velocity is
    data - noise."""
    # P', O': the same
    add_details = MMDiT.add_details
    embed = MMDiT.embed
    velocity = MMDiT.velocity

    def __init__(self, arch=LightningDiTArch()):
        super().__init__()
        a = arch
        d = arch.width
        self.arch = arch
        row, column = grid_angles(a.side, d // 4)
        table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)        # (N, d)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.x_embedder = nn.ModuleDict({
            "proj": nn.Conv2d(a.in_channels, d, a.patch, stride=a.patch)})
        self.t_embedder = nn.ModuleDict({
            "mlp": nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(a.classes + 1, d)})
        angles = torch.cat(grid_angles(a.side, a.head // 4), dim=1).repeat_interleave(2, dim=1)
        self.feat_rope = nn.Module()                                    # (N, head), row then column
        self.feat_rope.register_buffer("freqs_cos", angles.cos())
        self.feat_rope.register_buffer("freqs_sin", angles.sin())
        self.blocks = nn.ModuleList(LightningBlock(d, a.head, a.qk_norm) for _ in range(a.depth))
        self.final_layer = nn.ModuleDict({"norm_final": nn.RMSNorm(d, eps=1e-6),
            "linear": nn.Linear(d, a.patch**2 * a.in_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))})

    def compile_blocks(self):
        """torch.compile every block by itself: one graph serves them all."""
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def initialise(self):
        """DiT's start for training from scratch: blocks are the identity, the output zero;
        in place"""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
                nn.init.zeros_(m.bias)
        for m in self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]:
            nn.init.normal_(m.weight, std=0.02)
        last = self.final_layer
        for m in [b.adaLN_modulation[1] for b in (*self.blocks, last)] + [last.linear]:
            nn.init.zeros_(m.weight)
        return self

    def forward(self, x, t, y):
        """x (B, C, h, w), t data + (1 - t) noise, normalised; or C + D channels: [z, z_d]; t (B,),
        float32 in [0, 1], 0 is noise; y (B,), class, or for none their number
        -> velocity data - noise, like x
        Raises: InputError for a latent of another size: its table of positions is fixed."""
        side = self.arch.side
        if x.shape[2:] != (side * self.arch.patch,) * 2:
            raise InputError(f"latent {tuple(x.shape[2:])}; this LightningDiT has {side}x{side}"
                             " tokens")
        tokens = self.embed(x) + self.pos_embed                             # (B, N, d)
        # 1000 t: SD3 alone
        c = self.t_embedder.mlp(timestep_embedding(t / 1000).type_as(self.pos_embed))
        c = c + self.y_embedder.embedding_table(y)                          # (B, d)
        for block in self.blocks:
            tokens = block(tokens, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        tokens = self.final_layer.norm_final(tokens) * (1 + scale) + shift
        return self.velocity(tokens, side, side).type_as(x)                 # (B, C + D, h, w)

def find_dit(source):
    """The weights file of a LightningDiT: `source` itself, or in a folder or repository our export or the
    released file."""
    names = "lightningdit.safetensors", "lightningdit-xl-imagenet256-800ep.pt"
    return Path(source) if Path(source).is_file() else find_file(source, *names)

def load_lightningdit(source, dtype=torch.float32, device="cpu"):
    """Strictly load a released checkpoint or one of our exports, frozen. The weights of a checkpoint may
    lie under `ema`, `model` or neither, with `module.` before their names or without.
    Raises: InputError for another network's file, naming keys; see load_strict."""
    path = find_dit(source)
    state = read_file(path)
    state = state.get("ema") or state.get("model") or state             # "ema" may be None
    state = {k.removeprefix("module."): v for k, v in state.items()}
    try:
        arch = LightningDiTArch.from_state_dict(state)
    except (LookupError, ValueError):
        raise InputError(f"{path}: not a LightningDiT: {', '.join(sorted(state)[:3])}"
                         " ...") from None
    return load_strict(lambda: LightningDiT(arch), state, path, dtype, device)

def export_lightningdit(folder, dit, mean, std):
    """Write lightningdit.safetensors, P' and O' fused in, and the statistics of its latents
    beside."""
    folder.mkdir(exist_ok=True)
    state = fuse_details(dit.state_dict(), dit.arch.patch)
    state = {k: v.cpu().contiguous() for k, v in state.items()}
    atomic_write(folder / "lightningdit.safetensors", partial(save_file, state))
    write_statistics(folder, mean, std)

def write_statistics(folder, mean, std):
    """Mean and standard deviation of each channel of the latents, (C,) or (1, C, 1, 1)"""
    tensors = {"mean": mean.flatten().float().cpu(), "std": std.flatten().float().cpu()}
    atomic_write(folder / "latents_stats.safetensors", partial(save_file, tensors))

def find_statistics(folder):
    """latents_stats.safetensors, or the released .pt, in a folder -> its path, or None"""
    for path in folder / "latents_stats.safetensors", folder / "latents_stats.pt":
        if path.is_file():
            return path
    return None

def read_statistics(folder):
    """What find_statistics finds -> [mean, std], (1, C, 1, 1), or None
    Raises: InputError for a file without both, or with what cannot be a mean and a deviation."""
    path = find_statistics(folder)
    if path is None:
        return None
    tensors = read_file(path)
    found = [tensors.get(name) for name in ("mean", "std")]
    if not all(isinstance(v, torch.Tensor) and v.isfinite().all() for v in found):
        raise InputError(f"{path}: no finite mean and std of latents' channels in it, but"
                         f" {', '.join(sorted(tensors))}")
    return [v.float().view(1, -1, 1, 1) for v in found]

@torch.no_grad()
def euler_sample(dit, x, y, steps, cfg=1.0, interval=0.0, guided=None, shift=0.3):
    """Euler along the flow from noise x (B, C, h, w) at t = 0 to data, over `steps` grid points
    -> like x
    Guidance, u + cfg (u_c - u), acts only from t = interval on, and only on the first `guided`
    channels (None: on all)."""
    ts = torch.linspace(0, 1, steps, dtype=torch.float64)
    ts = shift_timesteps(ts, shift).float().to(x.device)
    none = torch.full_like(y, dit.arch.classes)                     # the label that means no class
    for t, t_next in zip(ts, ts[1:]):
        if cfg > 1 and t >= interval:
            both = dit(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([y, none]))
            u_c, u = both.chunk(2)                                  # with the class, and without
            k = guided or u.shape[1]
            velocity = torch.cat([(u + cfg * (u_c - u))[:, :k], u_c[:, k:]], dim=1)
        else:
            velocity = dit(x, t.expand(len(x)), y)
        x = x + (t_next - t) * velocity
    return x

# ------------------------------------------------------------ metrics
class InceptionConv(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU. (B, c_in, H, W) -> (B, c, H', W')"""
    def __init__(self, c_in, c, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

def average_pool(x):
    """3x3 means that do not count the padding, as in FID's network. Shape kept."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

class InceptionA(nn.Module):
    """Mixed_5b to 5d: (B, c, 35, 35) -> (B, 224 + c_pool, 35, 35)"""
    def __init__(self, c, c_pool):
        super().__init__()
        self.branch1x1 = InceptionConv(c, 64, 1)
        self.branch5x5_1 = InceptionConv(c, 48, 1)
        self.branch5x5_2 = InceptionConv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = InceptionConv(c, 64, 1)
        self.branch3x3dbl_2 = InceptionConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = InceptionConv(96, 96, 3, padding=1)
        self.branch_pool = InceptionConv(c, c_pool, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], dim=1)

class InceptionB(nn.Module):
    """Mixed_6a, to half the size: (B, 288, 35, 35) -> (B, 768, 17, 17)"""
    def __init__(self, c):
        super().__init__()
        self.branch3x3 = InceptionConv(c, 384, 3, stride=2)
        self.branch3x3dbl_1 = InceptionConv(c, 64, 1)
        self.branch3x3dbl_2 = InceptionConv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = InceptionConv(96, 96, 3, stride=2)

    def forward(self, x):
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.max_pool2d(x, 3, stride=2)
        return torch.cat([branch3x3, branch3x3dbl, branch_pool], dim=1)

class InceptionC(nn.Module):
    """Mixed_6b to 6e, 7x7 convolutions as 1x7 and 7x1: (B, 768, 17, 17) -> (B, 768, 17, 17)"""
    def __init__(self, c, c7):
        super().__init__()
        row = dict(kernel=(1, 7), padding=(0, 3))
        column = dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = InceptionConv(c, 192, 1)
        self.branch7x7_1 = InceptionConv(c, c7, 1)
        self.branch7x7_2 = InceptionConv(c7, c7, **row)
        self.branch7x7_3 = InceptionConv(c7, 192, **column)
        self.branch7x7dbl_1 = InceptionConv(c, c7, 1)
        self.branch7x7dbl_2 = InceptionConv(c7, c7, **column)
        self.branch7x7dbl_3 = InceptionConv(c7, c7, **row)
        self.branch7x7dbl_4 = InceptionConv(c7, c7, **column)
        self.branch7x7dbl_5 = InceptionConv(c7, 192, **row)
        self.branch_pool = InceptionConv(c, 192, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], dim=1)

class InceptionD(nn.Module):
    """Mixed_7a, to half the size: (B, 768, 17, 17) -> (B, 1280, 8, 8)"""
    def __init__(self, c):
        super().__init__()
        self.branch3x3_1 = InceptionConv(c, 192, 1)
        self.branch3x3_2 = InceptionConv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = InceptionConv(c, 192, 1)
        self.branch7x7x3_2 = InceptionConv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = InceptionConv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = InceptionConv(192, 192, 3, stride=2)

    def forward(self, x):
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        branch_pool = F.max_pool2d(x, 3, stride=2)
        return torch.cat([branch3x3, branch7x7x3, branch_pool], dim=1)

class InceptionE(nn.Module):
    """Mixed_7b and 7c: (B, c, 8, 8) -> (B, 2048, 8, 8). In 7c the pooling takes the maximum, as in the
    network that was released for FID."""
    def __init__(self, c, max_pool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = InceptionConv(c, 320, 1)
        self.branch3x3_1 = InceptionConv(c, 384, 1)
        self.branch3x3_2a = InceptionConv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = InceptionConv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = InceptionConv(c, 448, 1)
        self.branch3x3dbl_2 = InceptionConv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = InceptionConv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = InceptionConv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = InceptionConv(c, 192, 1)

    def forward(self, x):
        branch1x1 = self.branch1x1(x)
        h = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(h), self.branch3x3_2b(h)], dim=1)
        h = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = torch.cat([self.branch3x3dbl_3a(h), self.branch3x3dbl_3b(h)], dim=1)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else average_pool(x)
        return torch.cat([branch1x1, branch3x3, branch3x3dbl, self.branch_pool(pooled)], dim=1)

class Inception(nn.Module):
    """Inception-v3 as FID uses it: images (B, 3, H, W) in [-1, 1], rounded to 8 bits
    -> pool3 (B, 2048), and class probabilities, computed without the bias of fc. resize: see
    inception_input."""
    resize = "adm"

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = InceptionConv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = InceptionConv(32, 32, 3)
        self.Conv2d_2b_3x3 = InceptionConv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = InceptionConv(64, 80, 1)
        self.Conv2d_4a_3x3 = InceptionConv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, c_pool=32)
        self.Mixed_5c = InceptionA(256, c_pool=64)
        self.Mixed_5d = InceptionA(288, c_pool=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, c7=128)
        self.Mixed_6c = InceptionC(768, c7=160)
        self.Mixed_6d = InceptionC(768, c7=160)
        self.Mixed_6e = InceptionC(768, c7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    @torch.no_grad()
    def forward(self, x):
        x = inception_input(to_bytes(x).to(x.device).movedim(-1, 1).float(), self.resize)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))   # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)                                    # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                       # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)                                    # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)                                                # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)                                                # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))                                 # (B, 2048, 8, 8)
        x = x.mean((2, 3))                                                  # (B, 2048)
        return x, F.linear(x, self.fc.weight).softmax(dim=1)

RESIZES = {"adm": "ADM's resize", "pytorch-fid": "pytorch-fid's resize",
           "clean-fid": "clean-fid's resize"}

def inception_input(x, resize):
    """Pictures (B, 3, H, W) of values 0 to 255
    -> Inception's input (B, 3, 299, 299), by one of RESIZES:
    TensorFlow 1's bilinear, as Heusel et al. and ADM's evaluator; torch's bilinear with half-pixel
    centres; or Pillow's bicubic in float32, antialiased (Parmar et al. 2022).
    Published figures use all three."""
    if resize == "adm":
        return (tf1_resize(x, 299) - 128) / 128
    if resize == "pytorch-fid":
        return F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
    channels = [np.asarray(Image.fromarray(channel.numpy()).resize((299, 299), Image.BICUBIC))
                for channel in x.flatten(0, 1).cpu()]
    resized = torch.from_numpy(np.stack(channels)).clamp(0, 255).unflatten(0, x.shape[:2])
    return (resized.to(x.device) - 128) / 128

def tf1_resize(x, size):
    """TensorFlow 1's bilinear: no half-pixel centres, no antialiasing. (B, C, H, W)
    -> (B, C, size, size)"""
    for dim in 3, 2:
        n = x.shape[dim]
        position = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = position.long()
        high = (low + 1).clamp(max=n - 1)
        share_of_high = (position - low).view((-1,) if dim == 3 else (-1, 1))
        below = x.index_select(dim, low)
        above = x.index_select(dim, high)
        x = below + (above - below) * share_of_high
    return x

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"

def load_inception(folder=None, device="cpu"):
    """The FID network from `folder`, or torch.hub's cache (fetched on first use),
    its digest checked."""
    state = read_file(fetch(INCEPTION, PUBLISHED, "sha256", "6726825d", folder))
    counters = [k.replace("running_mean", "num_batches_tracked") for k in state
                if "running_mean" in k]
    state = dict.fromkeys(counters, torch.tensor(0)) | state            # which not every copy has
    return load_strict(Inception, state, "Inception-v3", device=device)

def load_world_features(device):
    """The world's classifier in Inception's place: images -> features (B, 128), probabilities (B, 36)
    of the classes, each a shape with a texture."""
    net = load_classifier(device=device)

    @torch.no_grad()
    def read(x):
        x = to_bytes(x).to(device).movedim(-1, 1) / 127.5 - 1
        if x.shape[-1] != net.size:
            x = F.interpolate(x, size=(net.size, net.size), mode="bicubic")
        shape, _, texture, _ = (logits.softmax(dim=1) for logits in net(x))
        return net.features(x), (shape[:, :, None] * texture[:, None]).flatten(1)
    return read

class CLIP(CLIPText):
    """OpenAI's CLIP, text and pictures, under transformers' names: the text half is chapter 3's."""
    def __init__(self, text_sizes, width, hidden, layers, patch, positions, projected):
        super().__init__(*text_sizes, quick_gelu=True)
        self.patch = patch
        self.size = math.isqrt(positions - 1) * patch                   # of a picture, in pixels
        blocks = nn.ModuleList(CLIPLayer(width, hidden, True, causal=False) for _ in range(layers))
        self.vision_model = nn.Module()
        self.vision_model.embeddings = nn.Module()
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
        self.vision_model.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch,
                                                                 bias=False)
        self.vision_model.embeddings.position_embedding = nn.Embedding(positions, width)
        self.vision_model.pre_layrnorm = nn.LayerNorm(width)                # the name is theirs
        self.vision_model.encoder = nn.ModuleDict({"layers": blocks})
        self.vision_model.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, projected, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_images(self, x):
        """clip_pixels' (B, 3, size, size) -> features (B, projected)"""
        m = self.vision_model
        x = m.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)      # (B, N, d)
        first = m.embeddings.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + m.embeddings.position_embedding.weight   # (B, 1 + N, d)
        x = m.pre_layrnorm(x)
        for layer in m.encoder.layers:
            x = layer(x)
        return self.visual_projection(m.post_layernorm(x[:, 0]))

    def encode_texts(self, ids, eos):
        """ids (B, N), the end token's id -> features (B, projected)"""
        return self(ids, eos)[1]

def clip_pixels(image, size):
    """PIL RGB -> (3, size, size), normalised: bicubic to the short side, the centre,
    CLIP's mean and deviation"""
    short = min(image.size)
    sides = [size if n == short else int(size * n / short) for n in image.size]
    image = image.resize(sides, Image.BICUBIC)
    left, top = ((n - size) // 2 for n in image.size)
    x = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    x = (x - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)

def load_clip_model(source, device="cpu"):
    """CLIP and its tokenizer, of a folder or hub repository laid out as openai/clip-vit-large-patch14 is
    -> CLIP, CLIPTokenizer. Raises: InputError for keys that do not fit."""
    path = find_file(source, "model.safetensors", "pytorch_model.bin")
    state = read_file(path)
    for half in "text_model", "vision_model":
        state.pop(f"{half}.embeddings.position_ids", None)              # 0, 1, 2, ... in old files
    width, _, patch, _ = shape_of(state, "vision_model.embeddings.patch_embedding.weight")
    hidden, _ = shape_of(state, "vision_model.encoder.layers.0.mlp.fc1.weight")
    positions, _ = shape_of(state, "vision_model.embeddings.position_embedding.weight")
    projected, _ = shape_of(state, "visual_projection.weight")
    layers = len({k.split(".")[3] for k in state if k.startswith("vision_model.encoder.layers.")})
    text_sizes = clip_text_sizes(state)
    sizes = text_sizes, width, hidden, layers, patch, positions, projected
    model = load_strict(lambda: CLIP(*sizes), state, path, device=device)
    find_file(source, "merges.txt")
    local_folder(source, "*.json")                                  # fetches vocab.json and others
    return model, CLIPTokenizer(path.parent, text_sizes[1])

def check_one_model(items, source):
    """Raises: InputError for the pictures of sample.py --compare: a score of two models is neither's."""
    first = [items[i].name for i in range(min(2, len(items)))]             # sorted: two of one prompt
    if len(first) == 2 and first[0].endswith("-DA-VAE.png") and first[1].endswith("-stock.png"):
        raise InputError(f"{source}: pictures of two models, as sample.py --compare draws them; to"
                         " score one, sample without --compare, each model into a folder of its own")

def counted_name(name):
    """What names are sorted by, so that 9.png comes before 10.png, and 9999.png before 10000.png."""
    parts = re.split(r"(\d+)", name)                       # text, number, text, ..., text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name

class CaptionedPictures:
    """Pictures with the prompts that they were made of, for CLIP. The prompt is the PNG's own text, else
    the caption beside it. With a list, it is the entry of MJHQ's id, if pictures have such names,
    else the entry in the order of the pictures' names; see counted_name."""
    def __init__(self, source, size, prompt_file=None):
        self.listing = list_images(source)
        self.items = self.listing.items
        check_one_model(self.items, source)
        self.n = len(self.items)
        self.size = size
        self.broken = {}
        self.notes = set()
        self.by_id = None
        self.prompts = None
        if prompt_file:
            records = read_records(prompt_file)
            if all(map(mjhq_name, records)):
                self.by_id = {str(record["id"]): record["prompt"] for record in records}
                if len(self.by_id) < len(records):
                    raise InputError(f"{prompt_file}: {len(records)} entries, but"
                                     f" {len(self.by_id)} ids; each picture takes an id of its own")
            else:
                if len(records) != self.n:
                    raise InputError(f"{prompt_file}: {len(records)} prompts for {self.n} pictures"
                                     f" in {source}")
                order = sorted(range(self.n), key=lambda i: counted_name(self.items[i].name))
                self.prompts = {i: records[k]["prompt"] for k, i in enumerate(order)}

    def prompt_of(self, i, item, data):
        """The prompt of one picture. Raises: InputError if it has none."""
        if self.prompts:
            return self.prompts[i]
        if self.by_id:
            stem = Path(item.name).stem
            if stem not in self.by_id:
                raise InputError(f"{item.name}: no entry of the list has the id {stem}")
            return self.by_id[stem]
        if data.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(data)) as image:
                text = getattr(image, "text", {}).get("prompt")
            if text and not text.lstrip().startswith("{"):      # there ComfyUI keeps its graph, as JSON
                return text
        caption = item.caption
        if isinstance(caption, Place):
            caption = decode_text(caption.read(), item.name).strip()
        if not caption:
            raise InputError(f"{item.name}: no prompt in its PNG text, no caption beside; give"
                             " --prompts")
        return caption

    def sample(self, positions):
        """-> pixels (B, 3, size, size) as clip_pixels has them, prompts (list of B)
        Raises: InputError for an unreadable picture: none may stand in for another here."""
        pixels = []
        prompts = []
        for i in positions:
            item = self.items[i]
            data = item.place.read()
            pixels.append(clip_pixels(read_image(io.BytesIO(data), item.name), self.size))
            prompts.append(self.prompt_of(i, item, data))
        return torch.stack(pixels), prompts

class Moments:
    """Mean and covariance of features, streamed in float64."""
    def __init__(self):
        self.n = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(1, dtype=torch.float64)            # (d,) once there are features
        self.outer = torch.zeros(1, dtype=torch.float64)                    # (d, d)

    def add(self, h):
        """h (B, d)"""
        h = h.cpu().double()                                                # MPS has no float64
        self.n = self.n + len(h)
        self.total = self.total + h.sum(0)
        self.outer = self.outer + h.T @ h

    def result(self):
        """Of all ranks -> N, mean (d,), covariance (d, d) with ddof = 1, as numpy
        Raises: InputError for a single picture."""
        n, total, outer = (gather(v[None]).sum(0) for v in (self.n, self.total, self.outer))
        if n < 2:
            raise InputError(f"{int(n)} picture: a covariance takes two, and a Frechet distance"
                             " thousands")
        mu = total / n
        return int(n), mu.numpy(), ((outer - n * torch.outer(mu, mu)) / (n - 1)).numpy()

def gather(x):
    """Rows of every rank, in rank order, on the CPU. (n_r, ...) -> (sum of n_r, ...)"""
    return torch.cat(gather_objects(x.cpu()))

def frechet_distance(mu1, s1, mu2, s2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians (Heusel et al. 2017), float64
    -> float
    The root has the trace of the symmetric (S1^1/2 S2 S1^1/2)^1/2, so eigenvalues are enough.
    Raises: InputError for statistics of different networks."""
    mu1, s1, mu2, s2 = (np.asarray(v, dtype=np.float64) for v in (mu1, s1, mu2, s2))
    if s1.shape != s2.shape:
        raise InputError(f"statistics of {len(s1)} and of {len(s2)} features; expected those of one"
                         " network")
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                  # S1^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((mu1 - mu2)**2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)

def inception_score(probs, split=5000):
    """exp(mean KL(p(y|x) || p(y))) of consecutive splits, averaged (Salimans et al. 2016).
    (N, K) -> float"""
    scores = []
    for p in np.split(np.asarray(probs, dtype=np.float64), range(split, len(probs), split)):
        terms = p * (np.log(p.clip(1e-300)) - np.log(p.mean(0).clip(1e-300)))
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))

def mix_classes(probs, classes):
    """Rows (N, K) of pictures that lie sorted by their classes (N,), in a random order, always the same:
    a split of the inception score would hold a few classes of many. Other rows as they are."""
    if len(classes) <= 5000 or classes[0] == classes[-1] or (classes.diff() < 0).any():
        return probs
    return probs[torch.randperm(len(probs), generator=step_generator(0, 0))]

# ------------------------------------------------------------ pictures and their classes
class WorldPictures:
    """The embedded world; the class is shape and texture."""
    def __init__(self, size):
        self.world = World(size or 64)
        self.n = 5760
        self.broken = {}
        self.notes = set()  # of its files: it has none

    def sample(self, positions):
        """-> images (B, 3, H, W) in [-1, 1], classes (B,)"""
        x, _, labels = self.world.sample(positions)
        return x, labels[:, 0] * len(TEXTURES) + labels[:, 2]

class FolderPictures:
    """Images in class folders or tars, in the order of their classes. size: crop them as ADM does; None:
    leave them as they are."""
    def __init__(self, source, size, drop_small=False):
        self.data = ImageDataset(source, size, "all", "adm", flip=False, shuffle=False,
                                 drop_small=drop_small)
        check_one_model(self.data.items, source)
        self.n = len(self.data)
        self.broken = self.data.broken
        self.notes = self.data.notes

    def sample(self, positions):
        """-> images (B, 3, H, W) in [-1, 1], classes (B,). Raises: InputError, see ImageDataset."""
        x, _, y = self.data.sample(positions)
        return x, y

    def check_broken(self):
        """Raises: InputError if too many pictures are unreadable."""
        self.data.check_broken()

class SavedPictures:
    """The 8-bit shards that `sample` wrote; size: what they must have, or None.
    Raises: InputError for shards of latents, and for pictures of another size."""
    def __init__(self, folder, size=None):
        self.cache = LatentCache(Path(folder), ("images", "labels"))
        self.n = len(self.cache)
        first = self.cache.shards[0]
        if "images" not in first:
            raise InputError(f"{folder}: shards of {', '.join(sorted(first))}; expected pictures, as"
                             " imagenet_eval.py sample writes them")
        height, width = first["images"].shape[1:3]
        if size and (height, width) != (size, size):
            raise InputError(f"{folder}: pictures of {width}x{height} in shards, which are taken as"
                             f" they are; --size is {size}: give both sides of a comparison one size")
        self.broken = {}
        self.notes = set()

    def sample(self, positions):
        """-> images (B, 3, H, W) in [-1, 1], classes (B,)"""
        x, y = self.cache.sample(positions)
        return x.movedim(-1, 1) / 127.5 - 1, y

def open_pictures(source, size=None, drop_small=False):
    """"world", a folder of `sample`'s shards, or images in folders or tars
    -> one of the classes above"""
    if source == "world":
        return WorldPictures(size)
    shards = any(Path(source).glob("shard-*.safetensors"))
    pngs = any(Path(source).glob("*[0-9].png"))
    if shards and not pngs:                                             # beside PNGs: labels alone
        return SavedPictures(source, size)
    return FolderPictures(source, size, drop_small)

def choose(data, count):
    """Positions of `count` pictures (None: all), spread evenly over a set that is sorted by its
    classes."""
    count = min(count or data.n, data.n)
    return range(count) if isinstance(data, WorldPictures) else spread(count, data.n)

def spread(count, n):
    """`count` positions spread evenly over n sorted ones, so that they are a sample of every
    class."""
    return [i * n // count for i in range(count)]

def rank_share(n, rank, ranks):
    """This rank's part of range(n), in the order of the ranks.
    Raises: InputError if there is less than one for each rank."""
    if n < ranks:
        raise InputError(f"{n} pictures for {ranks} ranks: give each of them one, or start fewer")
    return range(n * rank // ranks, n * (rank + 1) // ranks)

# ------------------------------------------------------------ latents and samples
def load_autoencoder(args, device):
    """--vae, and --davae over it, if given -> VAE or DAVAE"""
    ae = load_vae(args.vae, pick_dtype(args.dtype, device), device)
    if args.davae:
        ae = load_davae(args.davae, ae)
    return ae.to(memory_format=torch.channels_last)

def provenance(args, *names):
    """What a result depends on, by name (none given: all flags); files by their hash."""
    values = {name: value for name, value in vars(args).items() if name in (names or vars(args))}
    for name in ("davae", "ref", "dit"):
        if values.get(name) and Path(values[name]).is_file():
            values[name] = file_hash(values[name])
    return values

@torch.no_grad()
def encode(args, rank, ranks, device):
    """Pictures -> shards with the latents in fp16, those of the mirror images, and the classes; and the
    mean and deviation of each channel."""
    data = open_pictures(args.data, args.size, args.drop_small)
    positions = choose(data, args.count)
    ae = load_autoencoder(args, device)
    check_size((args.size, args.size), ae.f)
    manifest = provenance(args, "data", "size", "davae", "batch", "drop_small")
    manifest["count"] = len(positions)
    bf16 = pick_dtype(args.dtype, device) == torch.bfloat16
    manifest["dtype"] = "bfloat16" if bf16 else None    # None: float32, as folders without it are
    manifest["vae"] = weights_hash(ae.vae if args.davae else ae)
    if isinstance(data, FolderPictures):
        print0(rank, data.data.summary)
        manifest["listing"] = listing_digest(data.data.items)

    with lock(args.out, rank):
        missing = missing_shards(args.out, manifest, len(positions), 16 * args.batch, rank, ranks)
        spans = {path: split_batches(positions[rows.start:rows.stop], args.batch)
                 for path, rows in missing.items()}
        batches = read_batches(data, [span for shard in spans.values() for span in shard],
                               args.workers)
        for path in tqdm(spans, args.out.name, disable=rank > 0, delay=1):
            latents = []
            flipped = []
            labels = []
            for _ in spans[path]:
                x, y = next(batches)
                x = x.to(device)
                latents.append(ae.encode(x).half().cpu())
                if args.data == "world":        # mirrored, its textures would be another class's
                    flipped.append(latents[-1])
                else:
                    flipped.append(ae.encode(x.flip(3)).half().cpu())
                labels.append(y)
            write_shard(path, manifest, rank, latents=torch.cat(latents),
                        latents_flip=torch.cat(flipped), labels=torch.cat(labels))
        next(batches, None)                             # read_batches tells at its end what it noted
        barrier()

    broken = gather_dict(data.broken)
    notes = set().union(*gather_objects(data.notes))
    if rank == 0:
        if isinstance(data, FolderPictures):
            classes = enumerate(data.data.classes)
            write_json(args.out / "classes.json", dict(classes))
        rows = spread(min(len(positions), 10_000), len(positions))          # of every class
        [z] = LatentCache(args.out, ["latents"]).sample(rows)
        z = z.double().transpose(0, 1).flatten(1)                           # (C + D, all)
        write_statistics(args.out, z.mean(1), z.std(1))
        write_json(args.out / "encode.json", manifest | {"channels": len(z), "skipped": broken}
                   | count_notes(notes))
        print(f"{args.out}: {len(positions)} latents of {len(z)} channels, {len(broken)} files"
              " skipped")

def load_sampled(path, ae, device):
    """The LightningDiT in a file, to sample over the autoencoder `ae`
    -> LightningDiT, [mean, std] of its latents
    Raises: InputError if it has other channels than `ae`, or no latents_stats beside."""
    dit = load_lightningdit(path, device=device)
    statistics = read_statistics(path.parent)
    channels = ae.C + getattr(ae, "D", 0)
    if statistics is None or not (channels == dit.arch.in_channels == statistics[0].shape[1]):
        raise InputError(f"{path}: {dit.arch.in_channels} channels (--vae, --davae {channels}), or no"
                         " latents_stats")
    return dit, [v.to(device) for v in statistics]

def sample_batches(dit, ae, statistics, span, args):
    """Batches of pictures, i of its own seed: class and noise
    -> images (B, 3, H, W), classes (B,)
    Raises: InputError for a picture that holds nan or inf, which would be saved as black."""
    arch = dit.arch
    mean, std = statistics
    side = arch.side * arch.patch
    # as it trains: float32 weights, products in bf16
    autocast = pick_autocast(args.dtype, mean.device)
    shape = arch.in_channels + arch.detail_channels, side, side
    for part in split_batches(span, args.batch):
        rngs = [torch.Generator().manual_seed((args.seed * 10**9 + i) % 2**63) for i in part]
        y = torch.stack([torch.randint(arch.classes, (), generator=rng)
                         for rng in rngs]).to(mean.device)
        x = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(mean.device)
        with autocast:
            x = euler_sample(dit, x, y, args.steps, args.cfg, args.interval, args.guided or None,
                             args.shift)
        images = ae.decode(x * std + mean).float()
        if not images.isfinite().all():
            raise InputError(f"a picture of {part[0]} to {part[-1]} holds nan or inf; try --dtype"
                             " fp32, or another --attention")
        yield images, y

@torch.no_grad()
def sample(args, rank, ranks, device):
    """Draw --count pictures of random classes, as 8-bit shards or PNGs; pictures that are there stay."""
    start = time.time()
    args.dit = find_dit(args.dit)
    ae = load_autoencoder(args, device)
    dit, statistics = load_sampled(args.dit, ae, device)
    if args.compile:
        dit.compile_blocks()

    names = "dit davae count steps cfg interval guided shift seed png batch dtype".split()
    manifest = provenance(args, *names) | {"sampler": "Euler", "device": device}
    manifest["vae"] = weights_hash(ae.vae if args.davae else ae)
    manifest["statistics"] = file_hash(find_statistics(args.dit.parent))
    with lock(args.out, rank):
        def png_of(i):
            return args.out / f"{i:06d}.png"
        missing = missing_shards(args.out, manifest, args.count, args.batch, rank, ranks,
                                 beside=png_of if args.png else None)
        for path, span in tqdm(missing.items(), args.out.name, disable=rank > 0, delay=1):
            [(x, labels)] = sample_batches(dit, ae, statistics, span, args)
            tensors = {"labels": labels.cpu()}
            if args.png:
                for i, image in zip(span, x):
                    atomic_write(png_of(i), partial(to_image(image).save, format="png"))
            else:
                tensors["images"] = to_bytes(x)                             # (n, H, W, 3)
            write_shard(path, manifest, rank, **tensors)
        barrier()
    if rank == 0:
        write_json(args.out / "sample.json", manifest | {"seconds": round(time.time() - start, 1)})
        print(f"{args.out}: {args.count} pictures; next: python imagenet_eval.py fid {args.out}"
              " --ref ...")

# ------------------------------------------------------------ scores
NETS = {"inception": ("FID", "Inception-v3"), "world": ("Frechet", "the world's classifier")}

def load_feature_net(features, folder, device, resize="adm"):
    """Inception from `folder`, with a resize of RESIZES, or for "world" the world's classifier:
    pictures -> features, probabilities.
    Its convolutions are in full float32, whatever the settings around them."""
    if features == "world":
        net = load_world_features(device)
    else:
        net = load_inception(folder, device)
        net.resize = resize
    def read(x):
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(device_type(device), enabled=False), exact:
            return net(x)
    return read

def describe_features(args):
    """"Inception-v3 by ADM's resize", which a figure must say."""
    if args.features == "world":
        return NETS["world"][1]
    return f"{NETS[args.features][1]} by {RESIZES[args.resize]}"

def metric_name(features, n):
    """FID-50k for 50,000 pictures, FID-1.5k for 1,500, FID-192 for 192; FID where n is 0: not known."""
    if not n:
        return NETS[features][0]
    return f"{NETS[features][0]}-{n / 1000:.10g}k" if n >= 1000 else f"{NETS[features][0]}-{n}"

class Features(NamedTuple):
    """What a network read from a set of pictures; of all ranks."""
    n: int                              # pictures; 0 where a file of statistics does not say
    mu: np.ndarray                      # mean of the features, (d,)
    sigma: np.ndarray                   # their covariance, (d, d)
    probs: torch.Tensor = None          # class probabilities, (n, K)
    classes: torch.Tensor = None        # the classes that the pictures were made of, (n,)

def measure(batches, net, device):
    """Batches of images (B, 3, H, W) and classes (B,) -> Features"""
    moments = Moments()
    probs = []
    classes = []
    for x, y in batches:
        h, p = net(x.to(device))
        moments.add(h)
        probs.append(p.cpu())
        classes.append(y.cpu())
    return Features(*moments.result(), gather(torch.cat(probs)), gather(torch.cat(classes)))

def read_npz(path):
    """An .npz of statistics, as this file's --save, pytorch-fid and ADM write them -> Features
    Raises: InputError for what is no whole .npz, lacks mu or sigma, or holds what cannot be
    statistics."""
    try:
        with np.load(path) as file:
            n = int(file["n"]) if "n" in file else 0
            mu = np.asarray(file["mu"], np.float64)
            sigma = np.asarray(file["sigma"], np.float64)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu is {mu.shape}, sigma {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mu or sigma holds nan or inf")
    except (OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile,
            zlib.error) as e:
        raise InputError(f"{path}: no statistics ({e}); expected an .npz with mu and"
                         " sigma") from None
    return Features(n, mu, sigma)

def write_npz(path, features):
    """Write the statistics of Features for read_npz."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, mu=features.mu, sigma=features.sigma, n=features.n)
    atomic_write(path, write)

def is_npz(source):
    """Whether a source is a file of statistics, by its name."""
    return str(source).endswith(".npz")

def feature_statistics(source, net, args, rank, ranks, device, count=None):
    """An .npz of statistics, or up to `count` pictures of args.size -> Features"""
    if is_npz(source):
        return read_npz(source)
    data = open_pictures(source, args.size, getattr(args, "drop_small", False))
    if isinstance(data, FolderPictures):
        print0(rank, data.data.summary)
    positions = choose(data, count)
    own = rank_share(len(positions), rank, ranks)
    spans = split_batches(positions[own.start:own.stop], args.batch)
    batches = read_batches(data, spans, args.workers)
    return measure(tqdm(batches, str(source), len(spans), disable=rank > 0), net, device)

def fid(args, rank, ranks, device):
    """Frechet distance of SOURCE to --ref, and SOURCE's inception score."""
    start = time.time()
    if args.save and not Path(args.save).parent.is_dir():
        raise InputError(f"--save {args.save}: no folder {Path(args.save).parent}; make it")
    net = None
    if not all(is_npz(source) for source in (args.source, args.ref) if source):
        net = load_feature_net(args.features, args.weights, device, args.resize)
    if args.ref:                                    # first: it may not be there
        ref = feature_statistics(args.ref, net, args, rank, ranks, device, args.count)
    found = feature_statistics(args.source, net, args, rank, ranks, device, args.count)
    name = metric_name(args.features, found.n)
    result = provenance(args, "source", "ref", "size")
    features = describe_features(args) if net else "as the files of statistics have them"
    result |= {"features": features, "N": found.n or None}
    # steps, guidance, weights' hashes
    result["sample"] = read_json(Path(args.source) / "sample.json")
    counts = [found.n]
    if args.ref:
        distance = frechet_distance(found.mu, found.sigma, ref.mu, ref.sigma)
        result |= {"N reference": ref.n or None, name: distance}
        counts.append(ref.n)
    if found.probs is not None and args.features == "inception":
        score = inception_score(mix_classes(found.probs, found.classes))
        result[name.replace("FID", "IS")] = score
    if any(0 < n < len(found.mu) for n in counts):
        print0(rank,
               f"warning: {' and '.join(map(str, counts))} pictures for {len(found.mu)} features:"
               " a rank-deficient covariance")
    if rank == 0:
        write_json(args.out / "fid.json", result | {"seconds": round(time.time() - start, 1)})
        if args.save:
            write_npz(args.save if is_npz(args.save) else f"{args.save}.npz", found)
        print(json.dumps(result, indent=2, default=str))

@torch.no_grad()
def clip(args, rank, ranks, device):
    """CLIP score of SOURCE's pictures and their prompts: the mean of 100 max(cosine, 0)."""
    start = time.time()
    model, tokenizer = load_clip_model(args.clip, device)
    data = CaptionedPictures(args.source, model.size, args.prompts)
    print0(rank, data.listing.summary)
    positions = spread(min(args.count or data.n, data.n), data.n)
    own = rank_share(len(positions), rank, ranks)
    spans = split_batches(positions[own.start:own.stop], args.batch)
    scores = []
    cut = 0
    batches = read_batches(data, spans, args.workers)
    for pixels, prompts in tqdm(batches, "pictures", len(spans), disable=rank > 0):
        cut += sum(bool(tokenizer.lost(prompt)) for prompt in prompts)
        images = model.encode_images(pixels.to(device))
        texts = model.encode_texts(tokenizer(prompts).to(device), tokenizer.eos)
        scores.append(100 * F.cosine_similarity(images, texts).clamp(min=0).cpu())
    scores = gather(torch.cat(scores))
    cut = sum(gather_objects(cut))
    result = provenance(args, "source", "prompts", "clip")
    result |= {"CLIP score": scores.mean().item(), "N": len(scores), "prompts cut": cut}
    if rank == 0:
        write_json(args.out / "clip.json", result | {"seconds": round(time.time() - start, 1)})
        print(json.dumps(result, indent=2, default=str))

@torch.no_grad()
def curve(args, rank, ranks, device):
    """Frechet distance to --ref of every LightningDiT that train --keep-every kept, against its epoch.

    Raises: InputError if RUN holds none."""
    found = args.run.glob("epoch-*/lightningdit.safetensors")
    named = re.compile(r"epoch-\d+(\.\d+)?")                # no "epoch-best" of somebody's own
    kept = sorted((path for path in found if named.fullmatch(path.parent.name)), key=kept_epoch)
    if not kept:
        raise InputError(f"{args.run}: no epoch-... in it; train with --keep-every")
    ae = load_autoencoder(args, device)
    load_sampled(kept[0], ae, device)                       # do they fit? --ref may take an hour to read
    net = load_feature_net(args.features, args.weights, device, args.resize)
    ref = feature_statistics(args.ref, net, args, rank, ranks, device, args.count)
    name = metric_name(args.features, args.count)
    table = {}
    for path in kept:
        dit, statistics = load_sampled(path, ae, device)
        span = rank_share(args.count, rank, ranks)
        found = measure(sample_batches(dit, ae, statistics, span, args), net, device)
        distance = frechet_distance(found.mu, found.sigma, ref.mu, ref.sigma)
        table[f"epoch {kept_epoch(path):g}"] = {name: distance}
        print0(rank, f"epoch {kept_epoch(path):g}: {name} {distance:.4g}")
    if rank == 0:
        points = [(kept_epoch(path), row[name]) for path, row in zip(kept, table.values())]
        save_overview(args.out / "distance.png", plot_curves({name: points}, "epochs", log=True))
        write_json(args.out / "curve.json", {"table": table, "features": describe_features(args)}
                   | provenance(args))
        best = min(points, key=lambda point: point[1])
        print(f"{format_table(table)}\n{args.out}: distance.png, curve.json; the best: epoch"
              f" {best[0]:g}")

def kept_epoch(path):
    """.../epoch-12.5/lightningdit.safetensors -> 12.5"""
    return float(path.parent.name.removeprefix("epoch-"))

@torch.no_grad()
def recon(args, rank, ranks, device):
    """rFID, PSNR, SSIM and LPIPS of a VAE's reconstructions; of a DA-VAE's also with z_d set to zero, and
    with z_d at random."""
    start = time.time()
    net = load_feature_net(args.features, args.weights, device, args.resize)
    lpips = load_lpips(args.weights, device) if args.features == "inception" else None
    ae = load_autoencoder(args, device)
    check_measurable(args.size)
    data = open_pictures(args.data, args.size, args.drop_small)
    positions = choose(data, args.count)
    own = rank_share(len(positions), rank, ranks)
    spans = split_batches(positions[own.start:own.stop], args.batch)

    moments = {}
    scores = {}  # of each row of the table
    rng = step_generator(args.seed, rank, device)
    for x, _ in tqdm(read_batches(data, spans, args.workers), total=len(spans), disable=rank > 0):
        x = x.to(device)
        z = ae.encode(x)
        rows = {"real": x, "DA-VAE" if args.davae else "VAE": ae.decode(z)}
        if args.davae:
            z, z_d = z.tensor_split([ae.C], dim=1)
            z_d = ae.denormalise_detail(z_d)
            rows["z_d = 0"] = ae.join(z, 0 * z_d)
            rows |= damaged(ae, z, z_d, rng)
        for row, y in rows.items():
            y = y.float().clamp(-1, 1)
            columns = [psnr(x, y), ssim(x, y)]
            if lpips:
                columns.append(lpips(x, y))
            if row not in moments:
                moments[row] = Moments()
                scores[row] = []
            moments[row].add(net(y)[0])
            scores[row].append(torch.stack(columns, dim=1))                 # (B, 2 or 3)

    n, *real = moments.pop("real").result()
    table = {}
    for row in moments:
        means = gather(torch.cat(scores[row])).mean(0).tolist()
        table[row] = dict(zip(("PSNR", "SSIM", "LPIPS"), means))
        _, mu, sigma = moments[row].result()
        table[row][f"r{metric_name(args.features, n)}"] = frechet_distance(*real, mu, sigma)
    if rank == 0:
        result = {"table": table, "N": n, "seconds": round(time.time() - start, 1)}
        write_json(args.out / "recon.json", result | provenance(args))
        print(f"{format_table(table)}\n{n} pictures; features of {describe_features(args)}")

# ------------------------------------------------------------ training
def transport_loss(model, x1, x0, t, y, C, detail_weight):
    """Eq. (13) and a cosine term, between noise x0 and data x1, (B, C + D, h, w); t (B,), classes y (B,)
    -> loss, {name: detached scalar}: the loss, the mean squares over base and over detail channels,
    the cosine term"""
    sigma = t.view(-1, 1, 1, 1)
    u = x1 - x0                                                             # the flow's velocity
    u_hat = model(sigma * x1 + (1 - sigma) * x0, t, y).float()
    cosine = (1 - F.cosine_similarity(u_hat, u, dim=1)).mean()
    loss = flow_loss(u_hat, u, C, detail_weight) + cosine
    square = (u_hat.detach() - u)**2
    terms = {"loss": loss.detach(), "base": square[:, :C].mean(), "cosine": cosine.detach()}
    if u.shape[1] > C:
        terms["detail"] = square[:, C:].mean()
    return loss, terms

def draw_noise(seed, step, rank, ranks, batch, latent_shape, device):
    """The whole global batch's draws, from the step's own seed, cut to this rank's part:
    any number of ranks draws the same -> noise (B, C + D, h, w), t (B,) logit-normal, flip (B,),
    drop (B,): the label?"""
    rng = step_generator(seed, step, device)
    own = slice(rank * batch, (rank + 1) * batch)
    noise = torch.randn(ranks * batch, *latent_shape, generator=rng, device=device)[own]
    t = torch.randn(ranks * batch, generator=rng, device=device)[own].sigmoid()
    flip, drop = torch.rand(2, ranks * batch, generator=rng, device=device)[:, own]
    return noise, t, flip < 0.5, drop < 0.1

def build_dit(args, channels, statistics, device):
    """--init warm-started to `channels` latent channels, or a new network -> LightningDiT and C.
    statistics, [mean, std] of the latents: the base channels' become those that --init knows,
    in place.
    Raises: InputError where no statistics lie beside --init, or where channels do not fit."""
    torch.manual_seed(args.seed)
    if args.init == "none":
        dit = LightningDiT(LightningDiTArch(in_channels=channels)).initialise()
        return dit.to(device), channels
    dit = load_lightningdit(args.init, device=device)
    C = dit.arch.in_channels
    folder = find_dit(args.init).parent
    learned = read_statistics(folder)
    if learned is None:
        raise InputError(f"{folder}: no latents_stats.safetensors or .pt by --init; the model knows"
                         " its latents by those statistics alone")
    if channels < C or learned[0].shape[1] != C:
        raise InputError(f"--latents {args.latents}: {channels} channels, --init {args.init}: {C}"
                         f" (its latents_stats {learned[0].shape[1]}); the first {C} must be those of"
                         " the VAE that --init was trained on")
    for measured, known in zip(statistics, learned):
        measured[:, :C] = known
    if channels > C:
        warm_start(dit, channels - C, zero_init=not args.no_zero_init)
    return dit, C

def list_keep_steps(epochs, every, steps_an_epoch):
    """{step: the epochs until then} of --keep-every; none where it is not given."""
    if not every:
        return {}
    count = int(epochs / every + 1e-6)                      # 1.2 / 0.4 is a little less than 3
    return {round(i * every * steps_an_epoch): i * every for i in range(1, count + 1)}

# on resume: none of these changes what is learned
MAY_CHANGE = {"device", "out", "ref", "weights", "seeds", "lambdas", "epochs", "compile",
              "save_minutes", "keep_every", "attention", "workers"}

def train(args, rank, ranks, device, score=None):
    """Fine-tune --init, or train from scratch, on `encode`'s latents of C + D channels; Eq. (12), (13).

    score(dit, statistics, last) -> {name: value}, if given, is logged of the averaged weights, at
    step 0 and at list_score_steps; last: is it the last time?
    Raises: InputError for latents that are not there, or whose classes or statistics --init
    lacks."""
    # the latents
    about = args.latents / "manifest.json", args.latents / "latents_stats.safetensors"
    args.latents_digest = " ".join(file_hash(path) for path in about if path.is_file())
    saved = load_checkpoint(args.out, args, MAY_CHANGE)
    data = LatentCache(args.latents, ("latents", "latents_flip", "labels"), args.seed)
    statistics = read_statistics(args.latents)
    if not len(data) or not statistics:
        raise InputError(f"--latents {args.latents}: no whole latents; make them: imagenet_eval.py"
                         " encode")
    channels = data.shards[0]["latents"].shape[1]

    # the model, its averaged weights, the optimizer
    dit, C = build_dit(args, channels, statistics, device)
    highest = max(int(shard["labels"].max()) for shard in data.shards)
    if highest >= dit.arch.classes:
        raise InputError(f"--latents {args.latents}: classes up to {highest}; {args.init} has"
                         f" {dit.arch.classes}, from 0 on")
    dit.requires_grad_(True)
    dit.pos_embed.requires_grad_(False)
    weights = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = optim.AdamW(weights.values(), args.lr, (0.9, 0.95), weight_decay=0, fused=True)

    # an earlier run's state
    first = saved["step"] if saved else 0
    if saved:
        for name in weights:
            weights[name].data.copy_(saved["weights"][name])
            ema[name].copy_(saved["ema"][name])
        optimizer.load_state_dict(saved["optimizer"])

    if args.compile:
        dit.compile_blocks()
    model = nn.parallel.DistributedDataParallel(dit) if ranks > 1 else dit
    autocast = pick_autocast(args.dtype, device)
    log = Log(args.out, first, rank)
    watch = Watch()
    checkpoints = Checkpoints(args.out, args, device, args.save_minutes)
    mean, std = (v.to(device) for v in statistics)
    global_batch = ranks * args.batch
    steps = max(1, round(args.epochs * len(data) / global_batch))
    check_progress(args.out, first, steps)
    score_steps = list_score_steps(steps, len(data) / global_batch) if score else ()
    keep_at = list_keep_steps(args.epochs, args.keep_every, len(data) / global_batch)
    print0(rank,
           f"{args.out}: {len(data)} latents, {C} + {channels - C} channels, step {first} to"
           f" {steps}")
    if score and first == 0 and not log.lines:                              # the warm start itself
        with autocast:
            log.add(step=0, epoch=0.0, **score(dit, (mean, std), False))
    batches = StepBatches(data, args.batch, rank, ranks).loader(first, steps)
    bar = tqdm(batches, initial=first, total=steps, disable=rank > 0, leave=False)
    for step, (x1, flipped, y) in enumerate(bar, first):
        last = step + 1 == steps

        # this step's noise, times, mirror images and dropped labels
        noise, t, flip, drop = draw_noise(args.seed, step, rank, ranks, args.batch, x1.shape[1:],
                                          device)
        x1 = torch.where(flip.view(-1, 1, 1, 1), flipped.to(device), x1.to(device)).float()
        x1 = (x1 - mean) / std
        y = torch.where(drop, dit.arch.classes, y.to(device))               # no class, for guidance
        detail_weight = 1.0 if args.no_schedule else omega(step, args.n_warm)           # Eq. (12)
        set_lr(optimizer, args.lr, step, warmup=0)

        # forward and backward
        with autocast:
            loss, terms = transport_loss(model, x1, noise, t, y, C, detail_weight)      # Eq. (13)
        loss.backward()

        # note whether all is finite; the gradients are not clipped, as released
        norm = clip_gradients(weights, max_norm=math.inf)
        watch.add(step + 1, terms, norm, weights, latents=x1)

        # update the weights, and their average
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, step, args.ema)

        # log; nothing that is not finite gets beyond this line
        if (step + 1) % 50 == 0 or step + 1 in score_steps or last:
            log.add(step=step + 1, **watch.read(), omega=detail_weight, seconds=log.seconds())

        # keep the averaged weights of this epoch, before the checkpoint: a run that goes on from that
        # one does not come here again
        if rank == 0 and step + 1 in keep_at:
            with ema_weights(weights, ema):
                export_lightningdit(args.out / f"epoch-{keep_at[step + 1]:g}", dit, mean, std)

        # score and checkpoint
        if step + 1 in score_steps:
            with ema_weights(weights, ema), autocast:
                scores = score(dit, (mean, std), last)
            log.add(step=step + 1, epoch=(step + 1) * global_batch / len(data), **scores)
        due = (step + 1) % 50 == 0 and checkpoints.due(planned=(step + 1) % 500 == 0)
        if rank == 0 and (due or step + 1 in score_steps or last):
            checkpoints.save(step=step + 1, weights=weights, ema=ema,
                             optimizer=optimizer.state_dict())
    if rank == 0:
        checkpoints.finish()
        with ema_weights(weights, ema):
            export_lightningdit(args.out, dit, mean, std)
        log.plot(args.out / "loss.png", ["base", "detail", "cosine"])
        print(f"{args.out}: lightningdit.safetensors, latents_stats.safetensors, loss.png")
    return log.lines

# ------------------------------------------------------------ the ablation
class Variant(NamedTuple):
    """One row of the ablation."""
    name: str
    lambda_align: float
    flags: dict = {}                    # of `train`, that differ

def list_variants(lambdas):
    """The paper's Table 5, then its Table 4: 0.5 is the method's lambda_align,
    0 leaves alignment out."""
    best = 0.5 if 0.5 in lambdas else lambdas[-1]
    variants = [Variant("full", best), Variant("without zero-init", best, {"no_zero_init": True}),
                Variant("without schedule", best, {"no_schedule": True})]
    return variants + [Variant(f"lambda {value:g}", value) for value in lambdas if value != best]

def with_flags(args, **changed):
    """A copy of a command's arguments with some of them changed."""
    return argparse.Namespace(**vars(args) | changed)

def train_stage1(args, lambda_align, rank, ranks, device):
    """A DA-VAE and its latents, for all variants of one lambda_align, in args.out / "lambda-..."
    -> folder"""
    folder = args.out / f"lambda-{lambda_align:g}"
    stage1 = with_flags(
        align.parse_args(["--model", args.vae]),
        align=lambda_align, steps=args.stage1, detail_channels=args.detail_channels,
        data=None if args.data == "world" else args.data, size=args.size,
        drop_small=args.drop_small, lpips_dir=args.weights, dtype=args.dtype,
        compile=args.compile, seed=args.seed, out=folder, ranks=ranks)
    load_checkpoint(folder, stage1, align.MAY_CHANGE)                       # is it of these flags?
    if read_json(folder / "result.json").get("steps") != args.stage1:
        align.train(stage1, rank, ranks, device)
    barrier()
    encoding = with_flags(args, davae=folder / "davae.safetensors", out=folder / "latents",
                          count=args.images)
    encode(encoding, rank, ranks, device)
    barrier()                                           # for rank 0's statistics
    return folder

def list_score_steps(steps, steps_an_epoch):
    """After half an epoch, one, two, four and so on, and at the end: most happens at first -> set"""
    found = {steps}
    n = steps_an_epoch / 2
    while n < steps:
        found.add(max(1, round(n)))
        n *= 2
    return found

class Scoring(NamedTuple):
    """What a score of the ablation takes, loaded once for all seeds of a variant."""
    ae: nn.Module                       # the DA-VAE
    net: Callable                       # of load_feature_net
    real: Features                      # of real pictures
    latents: torch.Tensor               # some of those that were trained on, (n, C + D, h, w)
    labels: torch.Tensor                # their classes, (n,)

@torch.no_grad()
def base_loss(dit, scoring, statistics, args):
    """The base channels' part of Eq. (13), always with the same latents, noise and times: what has
    become of the pretrained model's own task? -> float"""
    mean, std = statistics
    x1 = (scoring.latents.to(mean.device).float() - mean) / std
    y = scoring.labels.to(mean.device)
    x0, t, _, _ = draw_noise(0, 0, 0, 1, len(x1), x1.shape[1:], mean.device)
    total = 0
    for part in zip(*(v.split(args.batch) for v in (x1, x0, t, y))):
        terms = transport_loss(dit, *part, dit.arch.in_channels, 1.0)[1]
        total += terms["base"].item() * len(part[0])
    return total / len(x1)

def score(dit, scoring, statistics, last, args, rank, ranks, device):
    """{"base loss": base_loss; in the world "texture", "shape": per cent of pictures that are read
    as their class says; at last "distance": Frechet distance to real pictures}
    A fifth of args.count pictures (one for each rank at least), and all of them the last time."""
    count = args.count if last else max(2, ranks, args.count // 5)
    batches = sample_batches(dit, scoring.ae, statistics, rank_share(count, rank, ranks), args)
    found = measure(batches, scoring.net, device)
    scores = {"base loss": base_loss(dit, scoring, statistics, args)}
    if args.data == "world":
        read = found.probs.argmax(1)
        for name, right in {
                "texture": read % len(TEXTURES) == found.classes % len(TEXTURES),
                "shape": read // len(TEXTURES) == found.classes // len(TEXTURES)}.items():
            scores[name] = 100 * right.double().mean().item()
    if last:
        real = scoring.real
        scores["distance"] = frechet_distance(found.mu, found.sigma, real.mu, real.sigma)
    return scores

def run_variant(variant, folder, net, real, args, rank, ranks, device):
    """Stage 2 of one variant with every seed
    -> a list for each seed of logged {"epoch", "texture", ...}"""
    ae = load_autoencoder(with_flags(args, davae=folder / "davae.safetensors"), device)
    cache = LatentCache(folder / "latents", ("latents", "labels"))
    count = min(240, len(cache))
    rows = range(count) if args.data == "world" else spread(count, len(cache))      # of every class
    scoring = Scoring(ae, net, real, *cache.sample(rows))
    def score_variant(dit, statistics, last):
        return score(dit, scoring, statistics, last, args, rank, ranks, device)
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        out = args.out / f"{variant.name.replace(' ', '-')}-{seed}"
        training = with_flags(args, seed=seed, out=out, latents=folder / "latents", **variant.flags)
        lines = train(training, rank, ranks, device, score_variant)
        runs.append([line for line in lines if "base loss" in line])
    return runs

SCORES = ("distance", "texture", "shape", "base loss")

def tabulate(runs):
    """The runs of one variant -> {score: its last value with each seed}
    and {score: [(epoch, mean over seeds), ...]}"""
    row = {}
    curves = {}
    for name in SCORES:
        lines = [[line for line in run if name in line] for run in runs]
        if lines[0]:
            # a run that went on with more --epochs was also scored where it ended before
            shared = set.intersection(*({line["epoch"] for line in run} for run in lines))
            values = np.array([[line[name] for line in run if line["epoch"] in shared]
                               for run in lines])                           # (seeds, points)
            row[name] = values[:, -1].tolist()
            curves[name] = list(zip(sorted(shared), values.mean(0)))
    return row, curves

def tell_apart(values, others):
    """Do the means of two samples differ by more than three standard errors? Two values each
    at least."""
    error = math.sqrt(np.var(values, ddof=1) / len(values) + np.var(others, ddof=1) / len(others))
    return abs(np.mean(values) - np.mean(others)) > 3 * error

def format_scores(row, full):
    """{score: values} -> {score: "mean +- deviation"}, with = where it cannot be told from
    `full`'s."""
    cells = {}
    for name, values in row.items():
        cells[name] = f"{np.mean(values):.4g}"
        if len(values) > 1:
            told = row is full or tell_apart(values, full[name])
            cells[name] += f" +- {np.std(values, ddof=1):.2g}{' ' if told else '='}"
    return cells

def ablate(args, rank, ranks, device):
    """The paper's Tables 5 and 4: each part of the method left out, and lambda_align;
    several seeds."""
    if args.init != "none":
        load_lightningdit(args.init)                        # is it there? Stage 1 takes a day
    net = load_feature_net(args.features, args.weights, device, args.resize)
    real = feature_statistics(args.ref or args.data, net, args, rank, ranks, device, args.images)
    table = {}
    shown = {}
    curves = {name: {} for name in SCORES[1:]}                      # the distance has one point
    full = None
    for variant in list_variants(args.lambdas):
        folder = train_stage1(args, variant.lambda_align, rank, ranks, device)
        stage1 = read_json(folder / "result.json")
        runs = run_variant(variant, folder, net, real, args, rank, ranks, device)
        row, points = tabulate(runs)
        full = full or row
        about = {"PSNR": stage1["table"]["DA-VAE"]["PSNR"],
                 "align error": stage1["alignment error"]}
        table[variant.name] = about | row
        shown[variant.name] = about | format_scores(row, full)
        for name in curves.keys() & points.keys():
            curves[name][variant.name] = points[name]
    if rank == 0:
        for name, lines in curves.items():
            if lines:
                save_overview(args.out / f"{name.replace(' ', '-')}.png",
                              plot_curves(lines, "epochs", name, log=False))
        write_json(args.out / "ablate.json", {"table": table, "curves": curves} | provenance(args))
        spread = "one seed"
        if args.seeds > 1:
            spread = (f"{args.seeds} seeds, mean and deviation; =: not told from the first row,"
                      " within three standard errors")
        print(f"{format_table(shown)}\ndistance: {metric_name(args.features, args.count)}, of"
              f" {NETS[args.features][1]}; {spread}\n{args.out}: ablate.json, curves as .png")

# ------------------------------------------------------------ the commands
# what flags that are left open become: over the real models, and over the embedded ones
PAPER = {
    "encode": dict(size=512),
    "train": dict(n_warm=20_000, epochs=80, lr=2e-4, ema=0.999, batch=80),
    "sample": dict(count=50_000, steps=250, cfg=4.0, shift=0.3),
    "fid": dict(features="inception"),
    "clip": {},
    "curve": dict(count=10_000, steps=250, cfg=1.0, shift=0.3, features="inception"),
    "recon": dict(size=512, features="inception"),
    "ablate": dict(n_warm=20_000, epochs=25, lr=2e-4, ema=0.999, batch=80, size=512,
                   features="inception", count=10_000, steps=250, cfg=1.0, shift=0.3,
                   detail_channels=96, stage1=100_000)}
TINY = {
    "encode": dict(size=64, count=2880),
    "train": dict(n_warm=50, epochs=10, lr=4e-3, ema=0.98, batch=32),
    "sample": dict(count=192, steps=20, cfg=2.5, shift=1.0),
    "fid": dict(features="inception"),
    "clip": {},
    "curve": dict(count=192, steps=20, cfg=2.5, shift=1.0, features="world"),
    "recon": dict(size=64, count=192, features="world"),
    "ablate": dict(n_warm=50, epochs=6, lr=4e-3, ema=0.98, batch=32, size=64, features="world",
                   detail_channels=48, count=480, steps=20, cfg=2.5, shift=1.0, stage1=250,
                   images=2880)}
QUICK = dict(lambdas=[0.0, 0.5], stage1=5, images=128, epochs=2, count=32, steps=5, seeds=1)

def add_command(commands, function):
    """A parser for one command, with the flags that all have. Of the function's docstring, what stands
    after a blank line is for readers of the code alone."""
    doc = inspect.cleandoc(function.__doc__).split("\n\n")[0]
    p = commands.add_parser(function.__name__, doc=doc, help=" ".join(doc.split()))
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto).")
    p.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="Number format (default auto: bf16 on a GPU that has it; train and the"
                        " training of ablate also on a CPU that has it).")
    add_attention_flag(p)
    p.add_argument("--seed", type=seed_int, default=0, help="Of everything random (default 0).")
    p.add_argument("--out", type=folder_path,
                   help=f"Folder of the results (default runs/imagenet/{function.__name__}).")
    return p

def add_vae_flags(p):
    """The base VAE."""
    p.add_argument("--vae", default=TINY_MODEL,
                   help="The base VAE (VA-VAE): file, folder or hub id (default: the embedded"
                        " one).")

def add_davae_flag(p):
    """The DA-VAE over it."""
    p.add_argument("--davae", metavar="FILE", help="The DA-VAE over it that align.py wrote.")

def add_data_flags(p):
    """The pictures."""
    p.add_argument("--data", default="world", metavar="PATH",
                   help="Images in class folders, or tars (default: the embedded world).")
    p.add_argument("--size", type=positive_int,
                   help="Pixels a side, by ADM's crop (default 512; embedded 64).")
    p.add_argument("--drop-small", action="store_true",
                   help="Take another picture for one smaller than --size (default: enlarge it).")

def add_reading_flags(p, batch=32):
    """How they are read. batch: None where it is a training's too, and PAPER and TINY have it"""
    what = "Pictures on a rank at a time (default 32)."
    if batch is None:
        what = "Latents a rank and step, and pictures at a time (default 80; embedded 32)."
    p.add_argument("--batch", type=positive_int, default=batch, help=what)
    p.add_argument("--workers", type=count_or_0, default=0,
                   help="Processes that read pictures on each rank (default 0).")

def add_feature_flags(p):
    """The network whose features are compared."""
    p.add_argument("--features", choices=list(NETS),
                   help="world: the features of the embedded world's classifier, which give no"
                        " FID.")
    p.add_argument("--resize", choices=list(RESIZES), default="adm",
                   help="How pictures come to Inception's 299 pixels; figures of different ones"
                        " cannot be compared (default adm).")
    p.add_argument("--weights", metavar="DIR",
                   help=f"Folder with {INCEPTION} and the two files of LPIPS (default: torch.hub's"
                        " cache).")

def add_training_flags(p):
    """What is trained, and how."""
    p.add_argument("--init", default=f"{TINY_MODEL}/lightningdit",
                   help="LightningDiT to start from: file, folder, hub id, or none (default:"
                        " embedded).")
    p.add_argument("--no-zero-init", action="store_true", help="Ablation: P', O' start at random.")
    p.add_argument("--no-schedule", action="store_true",
                   help="Ablation: omega = 1 from the first step.")
    p.add_argument("--n-warm", type=count_or_0,
                   help="N_warm of Eq. (12) (default 20000; embedded 50).")
    p.add_argument("--epochs", type=positive,
                   help="Of training (default 80; embedded 10; ablate 25, 6).")
    p.add_argument("--lr", type=positive,
                   help="Constant learning rate (default 2e-4; embedded 4e-3).")
    p.add_argument("--ema", type=share,
                   help="Decay of the averaged weights (default 0.999; embedded 0.98).")
    p.add_argument("--save-minutes", type=positive,
                   help="Minutes between two checkpoints (default: every 500 steps, or as seldom as"
                        " takes 4%% of the time).")
    p.add_argument("--keep-every", type=positive, metavar="EPOCHS",
                   help="Also keep the averaged weights every so many epochs, in OUT/epoch-... .")
    p.add_argument("--compile", action="store_true", help="Compile the blocks with torch.compile.")

def add_sampling_flags(p):
    """How pictures are sampled."""
    p.add_argument("--steps", type=number(int, least=2, below=2**31),
                   help="Grid points of Euler's method, one more than steps (default 250; embedded 20).")
    p.add_argument("--cfg", type=non_negative,
                   help="Guidance, 1: none (default 4; embedded 2.5; curve and ablate on real"
                        " data 1).")
    p.add_argument("--interval", type=time_in_flow, default=0.2,
                   help="Guidance begins at this t, where 0 is noise (default 0.2).")
    p.add_argument("--guided", type=count_or_0, default=0,
                   help="Guide the first so many channels, 0: all (default 0; LightningDiT: 3).")
    p.add_argument("--shift", type=positive, help="Timestep shift (default 0.3; embedded 1).")

def parse_args(argv=None):
    """The command and its flags; what is left open comes from PAPER or TINY."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     parser_class=Parser)

    p = add_command(commands, encode)
    add_data_flags(p)
    add_vae_flags(p)
    add_davae_flag(p)
    add_reading_flags(p)
    p.add_argument("--count", type=positive_int,
                   help="How many pictures (default all; embedded 2880).")

    p = add_command(commands, train)
    add_training_flags(p)
    p.add_argument("--latents", type=Path, default=Path("runs/imagenet/encode"),
                   help="What encode wrote (default runs/imagenet/encode).")
    p.add_argument("--batch", type=positive_int,
                   help="Latents a rank and step (default 80; embedded 32).")

    p = add_command(commands, sample)
    p.add_argument("--dit", default="runs/imagenet/train",
                   help="LightningDiT, its latents_stats beside (default runs/imagenet/train).")
    add_vae_flags(p)
    add_davae_flag(p)
    add_sampling_flags(p)
    p.add_argument("--count", type=positive_int,
                   help="How many pictures (default 50000; embedded 192).")
    p.add_argument("--batch", type=positive_int, default=32,
                   help="Pictures at a time (default 32).")
    p.add_argument("--png", action="store_true", help="Write PNGs instead of 8-bit shards.")
    p.add_argument("--compile", action="store_true", help="Compile the blocks with torch.compile.")

    p = add_command(commands, fid)
    p.add_argument("source",
                   help="What to score: a folder, a tar, shards, world, or an .npz of statistics.")
    p.add_argument("--ref", metavar="PATH",
                   help="What to compare it with: an .npz with mu and sigma, images, tars, shards,"
                        " or world.")
    p.add_argument("--size", type=positive_int,
                   help="Pixels a side, by ADM's crop (default: pictures as they are).")
    p.add_argument("--count", type=positive_int,
                   help="How many pictures of SOURCE, and of --ref, spread over the set (default"
                        " all).")
    p.add_argument("--save", metavar="NPZ", help="Keep the statistics of SOURCE in this file.")
    add_feature_flags(p)
    add_reading_flags(p)

    p = add_command(commands, clip)
    p.add_argument("source",
                   help="What to score: pictures in a folder or tars, such as sample.py's.")
    p.add_argument("--prompts", metavar="FILE",
                   help="Their prompts, as sample.py --prompt-file takes them (default: those in"
                        " the PNGs' text, or captions beside).")
    p.add_argument("--clip", default="openai/clip-vit-large-patch14",
                   help="CLIP: folder or hub id (default openai/clip-vit-large-patch14).")
    p.add_argument("--count", type=positive_int,
                   help="How many pictures, spread over the set (default all).")
    add_reading_flags(p)

    p = add_command(commands, curve)
    p.add_argument("run", type=Path, help="The folder of a train --keep-every.")
    add_vae_flags(p)
    add_davae_flag(p)
    add_sampling_flags(p)
    p.add_argument("--ref", metavar="PATH", required=True, help="What to compare with, as of fid.")
    p.add_argument("--size", type=positive_int,
                   help="Pixels a side of --ref, by ADM's crop (default: as they are).")
    p.add_argument("--count", type=positive_int,
                   help="Pictures of each score, and of --ref (default 10000; embedded 192).")
    add_feature_flags(p)
    add_reading_flags(p)

    p = add_command(commands, recon)
    add_data_flags(p)
    add_vae_flags(p)
    add_davae_flag(p)
    add_feature_flags(p)
    add_reading_flags(p)
    p.add_argument("--count", type=positive_int,
                   help="How many pictures (default all; embedded 192).")

    p = add_command(commands, ablate)
    add_data_flags(p)
    add_vae_flags(p)
    p.add_argument("--detail-channels", type=positive_int,
                   help="D, a multiple of C (default 96, 3 C of VA-VAE; embedded 48, 3 C).")
    p.add_argument("--stage1", type=positive_int,
                   help="Steps of each stage 1 (default 100000; embedded 250).")
    p.add_argument("--images", type=positive_int,
                   help="Pictures to train on (default all; embedded 2880).")
    p.add_argument("--lambdas", type=non_negative, nargs="+", default=[0.0, 0.5, 1.0],
                   help="Values of lambda_align to compare (default 0 0.5 1).")
    p.add_argument("--seeds", type=positive_int, default=3,
                   help="Runs of each variant (default 3).")
    p.add_argument("--quick", action="store_true",
                   help="A few steps of everything: does it run? It sets"
                        f" {', '.join(f'--{name}' for name in QUICK)}, and --out, if it is not given,"
                        " to runs/imagenet/quick.")
    add_training_flags(p)
    add_sampling_flags(p)
    p.add_argument("--ref", metavar="PATH",
                   help="What to compare with, as of fid (default: --data).")
    p.add_argument("--count", type=positive_int,
                   help="Pictures of each score (default 10000; embedded 480).")
    add_feature_flags(p)
    add_reading_flags(p, batch=None)

    args = parser.parse_args(argv)
    given = vars(args)
    # the embedded VAE, or the embedded LightningDiT; a command has one of the two flags, both, or none
    embedded = is_tiny(given.get("vae", "")) or is_tiny(Path(given.get("init", "")).parent)
    for name, value in (TINY if embedded else PAPER)[args.command].items():
        if given[name] is None:
            given[name] = value
    if given.get("quick"):
        given.update(QUICK)
    # in a folder of its own: an ablation would be refused where the trial has been
    args.out = args.out or Path("runs/imagenet") / ("quick" if given.get("quick") else args.command)
    if given.get("data", "world") != "world":
        given["data"] = str(Path(given["data"]).resolve())              # `data` and `data/` are one
    return args

def main(args):
    rank, ranks, device = init_distributed(args)
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is said before any work
    commands = {f.__name__: f for f in (encode, train, sample, fid, clip, curve, recon, ablate)}
    commands[args.command](args, rank, ranks, device)

if __name__ == "__main__":
    run(main, parse_args())
