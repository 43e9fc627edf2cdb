"""Chapter 5 - the proof: class-conditional generation on ImageNet, its metrics, and the ablation.

LightningDiT over VA-VAE at 256 x 256 is warm-started to 512 x 512 at equal tokens, by chapter 4's functions:
encode pictures, train, sample, score (fid, recon); without --data on the embedded world. All of it runs under
torchrun, goes on where it was stopped, and leaves a JSON.

    python imagenet_eval.py ablate              # Tables 4 and 5 in miniature: 20 minutes on two CPU cores
    torchrun --nproc_per_node 8 imagenet_eval.py train --latents latents/ --init lightningdit-xl.pt --compile

References: DA-VAE (CVPR 2026), section 4.2, Tables 4 and 5; Yao et al. 2025 (VA-VAE, LightningDiT); Heusel et
al. 2017 (FID); Salimans et al. 2016 (IS); Szegedy et al. 2015 (Inception-v3); Dhariwal and Nichol 2021 (ADM).
"""
import argparse, json, math, time, zipfile, zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn, optim
from tqdm import tqdm

import align
from align import (ImageDataset, Log, StepBatches, atomic_write, check_finite, clip_gradients,
                   ema_weights, fetch, format_table, init_distributed, load_checkpoint, load_lpips, lock,
                   print0, psnr, save_checkpoint, set_lr, ssim, update_ema)
from assets.world import TEXTURES, World, load_classifier
from finetune_dit import LatentCache, fill_shards, flow_loss, omega, warm_start
from sample import MMDiT, fuse_details, timestep_embedding, shift_timesteps
from vae_expand import (TINY_MODEL, InputError, Parser, check_size, count_or_0, device_type, file_hash,
                        find_file, load_davae, load_strict, load_vae, non_negative, pick_dtype,
                        plot_curves, positive, positive_int, read_file, read_json, run, save_png, share,
                        time_in_flow, to_bytes, to_image, weights_hash)

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
        """Architecture of a state dict. Errors: KeyError or ValueError if it is another network's."""
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, head = state["feat_rope.freqs_cos"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        return LightningDiTArch(depth, width, head, channels, 0, patch, math.isqrt(tokens),
                                classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                                qk_norm="blocks.0.attn.q_norm.weight" in state)

def grid_angles(side, n):
    """Row and column of every token, row-major, times n frequencies from 1 down to 1/10000: two (N, n)"""
    angles = torch.arange(side)[:, None] * 10000**(-torch.arange(n) / n)    # (side, n)
    return angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)

def rotate(x, cos, sin):
    """Turn adjacent pairs (a, b) by their position's angle. (B, heads, N, head), (N, head) -> like x"""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin

class LightningBlock(nn.Module):
    """Attention with rotary positions, then SwiGLU, both under adaLN. (B, N, d), c (B, d) -> (B, N, d)"""
    def __init__(self, d, head, qk_norm):
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        norms = {n: nn.RMSNorm(head, eps=1e-6) for n in ("q_norm", "k_norm")} if qk_norm else {}
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)} | norms)
        hidden = 8 * d // 3
        self.mlp = nn.ModuleDict({"w12": nn.Linear(d, 2 * hidden), "w3": nn.Linear(hidden, d)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x, c, cos, sin):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        h = self.attn.qkv(self.norm1(x) * (1 + scale) + shift)
        q, k, v = rearrange(h, "b n (three h d) -> three b h n d", three=3, d=self.head)
        if "q_norm" in self.attn:
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        q, k = (rotate(u.type_as(v), cos.type_as(v), sin.type_as(v)) for u in (q, k))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate * self.attn.proj(h)                                    # (B, N, d)
        a, b = self.mlp.w12(self.norm2(x) * (1 + scale_mlp) + shift_mlp).chunk(2, dim=-1)
        return x + gate_mlp * self.mlp.w3(F.silu(a) * b)

class LightningDiT(nn.Module):
    """LightningDiT (Yao et al. 2025), under the released checkpoint's key names.
    Its time runs the other way than SD3's: t = 0 is noise, 1 is data, and the velocity is data - noise."""
    add_details, embed, velocity = MMDiT.add_details, MMDiT.embed, MMDiT.velocity      # P', O': the same

    def __init__(self, arch=LightningDiTArch()):
        super().__init__()
        a, d, self.arch = arch, arch.width, arch
        row, column = grid_angles(a.side, d // 4)
        table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)        # (N, d)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(a.in_channels, d, a.patch, stride=a.patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(a.classes + 1, d)})
        angles = torch.cat(grid_angles(a.side, a.head // 4), dim=1).repeat_interleave(2, dim=1)
        self.feat_rope = nn.Module()                                        # (N, head), row then column
        self.feat_rope.register_buffer("freqs_cos", angles.cos())
        self.feat_rope.register_buffer("freqs_sin", angles.sin())
        self.blocks = nn.ModuleList(LightningBlock(d, a.head, a.qk_norm) for _ in range(a.depth))
        self.final_layer = nn.ModuleDict({"norm_final": nn.RMSNorm(d, eps=1e-6),
            "linear": nn.Linear(d, a.patch**2 * a.in_channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))})

    def initialise(self):
        """DiT's start for training from scratch: blocks are the identity, the output zero; in place"""
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
        """x (B, C, h, w), t data + (1 - t) noise, normalised; or C + D channels: [z, z_d]; t (B,), float32 in
        [0, 1], 0 is noise; y (B,), class, or for none their number -> velocity data - noise, like x"""
        side = self.arch.side
        if x.shape[2:] != (side * self.arch.patch,) * 2:
            raise InputError(f"latent {tuple(x.shape[2:])}; this LightningDiT has {side}x{side} tokens")
        tokens = self.embed(x) + self.pos_embed                             # (B, N, d)
        c = self.t_embedder.mlp(timestep_embedding(t / 1000).type_as(self.pos_embed))   # 1000 t: SD3 alone
        c = c + self.y_embedder.embedding_table(y)                          # (B, d)
        for block in self.blocks:
            tokens = block(tokens, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        tokens = self.final_layer.norm_final(tokens) * (1 + scale) + shift
        return self.velocity(tokens, side, side).type_as(x)                 # (B, C + D, h, w)

def find_dit(source):
    """Weights file of a LightningDiT: `source`, or ours or the released one in a folder or repository."""
    names = "lightningdit.safetensors", "lightningdit-xl-imagenet256-800ep.pt"
    return Path(source) if Path(source).is_file() else find_file(source, *names)

def load_lightningdit(source, dtype=torch.float32, device="cpu"):
    """Strictly load a released checkpoint (`ema`, `model` or raw; `module.` or not) or an export, frozen."""
    path = find_dit(source)
    state = read_file(path)
    state = state.get("ema", state.get("model", state))
    state = {k.removeprefix("module."): v for k, v in state.items()}
    try:
        arch = LightningDiTArch.from_state_dict(state)
    except (KeyError, ValueError):
        raise InputError(f"{path}: not a LightningDiT: {', '.join(sorted(state)[:3])} ...") from None
    return load_strict(lambda: LightningDiT(arch), state, path, dtype, device)

def export_lightningdit(folder, dit, mean, std):
    """Write lightningdit.safetensors, P' and O' fused in, and the statistics of its latents beside."""
    state = {k: v.cpu().contiguous() for k, v in fuse_details(dit.state_dict(), dit.arch.patch).items()}
    atomic_write(folder / "lightningdit.safetensors", partial(save_file, state))
    write_statistics(folder, mean, std)

def write_statistics(folder, mean, std):
    """Mean and standard deviation of each channel of the latents, (C,) or (1, C, 1, 1)"""
    tensors = {name: v.flatten().float().cpu() for name, v in (("mean", mean), ("std", std))}
    atomic_write(folder / "latents_stats.safetensors", partial(save_file, tensors))

def read_statistics(folder):
    """latents_stats.safetensors, or the released .pt, in a folder -> [mean, std], (1, C, 1, 1), or None"""
    for path in folder / "latents_stats.safetensors", folder / "latents_stats.pt":
        if path.is_file():
            held = read_file(path)
            return [held[name].float().view(1, -1, 1, 1) for name in ("mean", "std")]

@torch.no_grad()
def euler_sample(dit, x, y, steps, cfg=1.0, interval=0.0, guided=None, shift=0.3):
    """Euler along the flow from noise x (B, C, h, w) at t = 0 to data, over `steps` grid points -> like x
    Guidance u + cfg (u_c - u) only from t = interval on, of the first `guided` channels (None: all)."""
    ts = shift_timesteps(torch.linspace(0, 1, steps, dtype=torch.float64), shift).float().to(x.device)
    none = torch.full_like(y, dit.arch.classes)                             # the label that means no class
    for t, t_next in zip(ts, ts[1:]):
        if cfg != 1 and t >= interval:
            both = dit(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([y, none]))
            u_c, u = both.chunk(2)                                          # with the class, and without
            k = guided or u.shape[1]
            u_c = torch.cat([(u + cfg * (u_c - u))[:, :k], u_c[:, k:]], dim=1)
        else:
            u_c = dit(x, t.expand(len(x)), y)
        x = x + (t_next - t) * u_c
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
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
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
    """Mixed_7b and 7c: (B, c, 8, 8) -> (B, 2048, 8, 8). 7c pools by maximum: so it was released for FID."""
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
    """Inception-v3 as FID has it: images (B, 3, H, W) in [-1, 1] -> pool3 (B, 2048), class probabilities.
    As ADM's evaluator: 8 bits, TF1's bilinear to 299, (x - 128) / 128; probabilities without fc's bias."""
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
        x = to_bytes(x).to(x.device).movedim(-1, 1).float()                 # (B, 3, H, W), 0 to 255
        x = (tf1_resize(x, 299) - 128) / 128                                # (B, 3, 299, 299)
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

def tf1_resize(x, size):
    """TensorFlow 1's bilinear: no half-pixel centres, no antialiasing. (B, C, H, W) -> (B, C, size, size)"""
    for dim in 3, 2:
        n = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = at.long()
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * (at - low).view((-1,) if dim == 3 else (-1, 1))
    return x

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"

def load_inception(folder=None, device="cpu"):
    """The FID network from `folder`, or torch.hub's cache (fetched on first use), its digest checked."""
    state = read_file(fetch(INCEPTION, PUBLISHED, "sha256", "6726825d", folder))
    counters = [k.replace("running_mean", "num_batches_tracked") for k in state if "running_mean" in k]
    state = dict.fromkeys(counters, torch.tensor(0)) | state                # which not every copy has
    return load_strict(Inception, state, "Inception-v3", device=device)

def load_world_features(device):
    """The world's classifier in Inception's place: images -> features (B, 128), texture's probabilities."""
    net = load_classifier(device=device)

    @torch.no_grad()
    def read(x):
        x = to_bytes(x).to(device).movedim(-1, 1) / 127.5 - 1
        x = F.interpolate(x, size=(net.size, net.size), mode="bicubic") if x.shape[-1] != net.size else x
        return net.features(x), net(x)[2].softmax(dim=1)
    return read

class Moments:
    """Mean and covariance of features, streamed in float64."""
    def __init__(self):
        self.n = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(1, dtype=torch.float64)                    # (d,) once there are features
        self.outer = torch.zeros(1, dtype=torch.float64)                    # (d, d)

    def add(self, h):
        """h (B, d)"""
        h = h.cpu().double()                                                # MPS has no float64
        self.n = self.n + len(h)
        self.total = self.total + h.sum(0)
        self.outer = self.outer + h.T @ h

    def result(self):
        """Of all ranks -> N, mean (d,), covariance (d, d) with ddof = 1, as numpy"""
        n, total, outer = (gather(v[None]).sum(0) for v in (self.n, self.total, self.outer))
        if n < 2:
            raise InputError(f"{int(n)} picture: a covariance takes two, and a Frechet distance thousands")
        mu = total / n
        return int(n), mu.numpy(), ((outer - n * torch.outer(mu, mu)) / (n - 1)).numpy()

def gather(x):
    """Rows of every rank, in rank order, on the CPU. (n_r, ...) -> (sum of n_r, ...)"""
    parts = [x.cpu()]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts)

def frechet_distance(mu1, s1, mu2, s2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians (Heusel et al. 2017), float64 -> float
    The root has the trace of the symmetric (S1^1/2 S2 S1^1/2)^1/2, so eigenvalues are enough."""
    mu1, s1, mu2, s2 = (np.asarray(v, dtype=np.float64) for v in (mu1, s1, mu2, s2))
    if s1.shape != s2.shape:
        raise InputError(f"statistics of {len(s1)} and of {len(s2)} features; expected those of one network")
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                  # S1^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(((mu1 - mu2)**2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)

def inception_score(probs, split=5000):
    """exp(mean KL(p(y|x) || p(y))) of consecutive splits, averaged (Salimans et al. 2016). (N, K) -> float"""
    scores = []
    for p in np.split(np.asarray(probs, dtype=np.float64), range(split, len(probs), split)):
        terms = p * (np.log(p.clip(1e-300)) - np.log(p.mean(0).clip(1e-300)))
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))

# ------------------------------------------------------------ pictures, latents, samples
class Pictures(torch.utils.data.Dataset):
    """The world (class: shape and texture), images in folders or tars (class: the folder), `sample`'s shards.
    Item span, a range: images (B, 3, H, W) in [-1, 1], classes (B,). size: ADM's crop; None: as they are."""
    def __init__(self, source, size=None, count=None):
        found = {path.suffix for path in Path(source).glob("*[0-9].*")}     # shards beside PNGs: labels alone
        self.world, self.shards = source == "world", ".safetensors" in found and ".png" not in found
        if self.world:
            self.data, n = World(size or 64), 5760
        elif self.shards:
            self.data = LatentCache(Path(source), ("images", "labels"))
            n = len(self.data.rows)
        else:
            self.data = ImageDataset(source, size, "all", "adm", flip=False, shuffle=False)
            n = len(self.data.items)
        self.n, self.broken = min(count or n, n), {}
        # pictures on disk lie in the order of their classes, the world's do not
        self.positions = range(self.n) if self.world else spread(self.n, n)

    def __getitem__(self, span):
        x, _, y = self.data.sample([self.positions[i] for i in span])
        if self.shards:
            return x[0].movedim(-1, 1) / 127.5 - 1, x[1], {}
        return (x, y[:, 0] * len(TEXTURES) + y[:, 2], {}) if self.world else (x, y, dict(self.data.broken))

    def batches(self, span, args):
        """Of args.batch pictures each, read by args.workers processes; skipped files are named."""
        spans = [span[i:i + args.batch] for i in range(0, len(span), args.batch)]
        for x, y, broken in torch.utils.data.DataLoader(self, None, sampler=spans, num_workers=args.workers):
            for name in broken.keys() - self.broken.keys():
                print(f"skipped: {broken[name]}", flush=True)
            self.broken |= broken
            yield x, y

def spread(count, n):
    """`count` positions spread evenly over n sorted ones, so that they are a sample of every class."""
    return [i * n // count for i in range(count)]

def rank_share(n, rank, ranks):
    """This rank's part of range(n); the first rank has the first."""
    return range(n * rank // ranks, n * (rank + 1) // ranks)

def autoencoder(args, device):
    """--vae, and --davae over it, if given -> VAE or DAVAE"""
    vae = load_vae(args.vae, pick_dtype(args.dtype, device), device)
    return (load_davae(args.davae, vae) if args.davae else vae).to(memory_format=torch.channels_last)

def about(args, *names):
    """What a result depends on, by name (none: all flags); files by their hash."""
    values = {name: value for name, value in vars(args).items() if name in (names or vars(args))}
    files = [n for n in ("davae", "ref", "dit") if values.get(n) and Path(values[n]).is_file()]
    return values | {name: file_hash(values[name]) for name in files}

def write_json(path, **result):
    """A result, for people and programs."""
    atomic_write(path, lambda part: part.write_text(json.dumps(result, indent=2, default=str) + "\n"))

@torch.no_grad()
def encode(args, rank, ranks, device):
    """Pictures -> shards of latents and their mirror images', fp16, classes; statistics of each channel."""
    data, ae = Pictures(args.data, args.size, args.count), autoencoder(args, device)
    check_size((args.size, args.size), ae.f)
    def make(span):
        rows = []
        for x, y in data.batches(span, args):
            z = ae.encode(x.to(device)).half().cpu()
            flipped = z if args.data == "world" else ae.encode(x.flip(3).to(device)).half().cpu()
            rows.append((z, flipped, y))            # mirrored, the world's textures would be another class's
        return dict(zip(("latents", "latents_flip", "labels"), map(torch.cat, zip(*rows))))
    manifest = about(args, "data", "size", "davae", "batch") | {"count": data.n}
    manifest["vae"] = weights_hash(ae.vae if args.davae else ae)
    with lock(args.out, rank):
        fill_shards(args.out, manifest, data.n, 16 * args.batch, rank, ranks, make)
    if rank == 0:
        if args.data != "world":
            print(data.data.summary, flush=True)
            classes = dict(enumerate(data.data.classes))
            write_json(args.out / "classes.json", **{str(i): name for i, name in classes.items()})
        rows = spread(min(data.n, 10_000), data.n)                          # of every class
        z = LatentCache(args.out, ["latents"]).sample(rows)[0][0]
        z = z.double().transpose(0, 1).flatten(1)
        write_statistics(args.out, z.mean(1), z.std(1))                     # (C + D,), of 10,000 latents
        write_json(args.out / "encode.json", **manifest, channels=len(z), skipped=data.broken)
        print(f"{args.out}: {data.n} latents of {len(z)} channels, {len(data.broken)} files skipped")

def sample_batches(dit, ae, statistics, span, args):
    """Batches of pictures, i of its own seed: class and noise -> images (B, 3, H, W), classes (B,)"""
    a, (mean, std) = dit.arch, statistics
    shape = a.in_channels + a.detail_channels, a.side * a.patch, a.side * a.patch
    for first in range(0, len(span), args.batch):
        rngs = [torch.Generator().manual_seed(args.seed * 10**9 + i) for i in span[first:first + args.batch]]
        y = torch.stack([torch.randint(a.classes, (), generator=rng) for rng in rngs]).to(mean.device)
        x = torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(mean.device)
        x = euler_sample(dit, x, y, args.steps, args.cfg, args.interval, args.guided or None, args.shift)
        yield ae.decode(x * std + mean).float(), y

@torch.no_grad()
def sample(args, rank, ranks, device):
    """--count pictures of random classes, as 8-bit shards or PNGs; those that are there stay."""
    start, args.dit, ae = time.time(), find_dit(args.dit), autoencoder(args, device)
    dit = load_lightningdit(args.dit, pick_dtype(args.dtype, device), device)
    statistics, channels = read_statistics(args.dit.parent), ae.C + (ae.D if args.davae else 0)
    if statistics is None or channels != dit.arch.in_channels:
        raise InputError(f"{args.dit}: {dit.arch.in_channels} channels (VAE {channels}), or no latents_stats")
    statistics = [v.to(device) for v in statistics]
    for block in dit.blocks if args.compile else ():
        block.compile(fullgraph=True, dynamic=False)

    def make(span):
        [(x, labels)] = sample_batches(dit, ae, statistics, span, args)
        for i, image in zip(span, x) if args.png else ():
            atomic_write(args.out / f"{i:06d}.png", partial(to_image(image).save, format="png"))
        return {"labels": labels.cpu()} | ({} if args.png else {"images": to_bytes(x)})     # (n, H, W, 3)
    names = f"dit vae davae count {DRAW} seed png batch dtype".split()
    manifest = about(args, *names) | {"sampler": "Euler", "device": device}
    with lock(args.out, rank):
        fill_shards(args.out, manifest, args.count, args.batch, rank, ranks, make)
    if rank == 0:
        write_json(args.out / "sample.json", **manifest, seconds=round(time.time() - start, 1))
        print(f"{args.out}: {args.count} pictures; next: python imagenet_eval.py fid {args.out} --ref ...")

# ------------------------------------------------------------ scores
NETS = {"inception": ("FID", "Inception-v3"), "world": ("Frechet", "the world's classifier")}

def load_feature_net(args, device):
    """Inception, or for the world its classifier: pictures -> features, probabilities; in full float32"""
    net = load_world_features(device) if args.features == "world" else load_inception(args.weights, device)
    def read(x):
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(device_type(device), enabled=False), exact:
            return net(x)
    return read

def metric_name(args, n):
    """FID-50k for 50,000 pictures, FID-192 for 192."""
    return f"{NETS[args.features][0]}-{n // 1000}k" if n >= 1000 else f"{NETS[args.features][0]}-{n}"

def measure(batches, net, device):
    """Batches of images and classes -> N, mu, sigma, probabilities (N, K), classes (N,), of all ranks"""
    moments, rows = Moments(), []
    for x, y in batches:
        h, p = net(x.to(device))
        moments.add(h)
        rows.append((p.cpu(), y.cpu()))
    return *moments.result(), *(gather(torch.cat(column)) for column in zip(*rows))

def feature_statistics(source, net, args, rank, ranks, device):
    """An .npz of statistics, or pictures -> N (0: not said), mu, sigma, probabilities or None"""
    if not str(source).endswith(".npz"):
        data = Pictures(source, args.size, args.count)
        batches = data.batches(rank_share(data.n, rank, ranks), args)
        return measure(tqdm(batches, desc=str(source), disable=rank > 0), net, device)[:4]
    try:
        with np.load(source) as file:
            n = int(file["n"]) if "n" in file else 0
            mu, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu is {mu.shape}, sigma {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mu or sigma holds nan or inf")
        return n, mu, sigma, None
    except (OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile,
            zlib.error) as e:
        raise InputError(f"{source}: no statistics ({e}); expected an .npz with mu and sigma") from None

def fid(args, rank, ranks, device):
    """Frechet distance of SOURCE to --ref, and SOURCE's inception score."""
    start, net, where = time.time(), load_feature_net(args, device), (rank, ranks, device)
    n_ref, *reference, _ = feature_statistics(args.ref, net, args, *where) if args.ref else [0] * 4
    n, mu, sigma, probs = feature_statistics(args.source, net, args, *where)
    result = about(args, "source", "ref", "size") | {"features": NETS[args.features][1], "N": n}
    result["sample"] = read_json(Path(args.source) / "sample.json")         # steps, guidance, weights' hashes
    if args.ref:
        result |= {"N reference": n_ref, metric_name(args, n): frechet_distance(mu, sigma, *reference)}
    if probs is not None and args.features == "inception":
        result[metric_name(args, n).replace("FID", "IS")] = inception_score(probs)
    if any(0 < m < len(mu) for m in (n, n_ref)):
        print0(rank, f"warning: {n} and {n_ref} pictures for {len(mu)} features: a rank-deficient covariance")
    if rank == 0:
        write_json(args.out / "fid.json", **result, seconds=round(time.time() - start, 1))
        if args.save:
            np.savez(args.save, mu=mu, sigma=sigma, n=n)
        print(json.dumps(result, indent=2, default=str))

@torch.no_grad()
def recon(args, rank, ranks, device):
    """rFID, PSNR, SSIM and LPIPS of a VAE's reconstructions; a DA-VAE's also with z_d zeroed, and random."""
    start, net, ae = time.time(), load_feature_net(args, device), autoencoder(args, device)
    lpips = load_lpips(args.weights, device) if args.features == "inception" else None
    data, moments, values = Pictures(args.data, args.size, args.count), {}, {}
    torch.manual_seed(args.seed + rank)
    for x, _ in tqdm(data.batches(rank_share(data.n, rank, ranks), args), disable=rank > 0):
        x = x.to(device)
        z = ae.encode(x)
        rows = {"real": x, "DA-VAE" if args.davae else "VAE": ae.decode(z)}
        if args.davae:
            z, z_d = z.tensor_split([ae.C], dim=1)
            rows["z_d = 0"] = ae.join(z, 0 * z_d)
            rows["z_d random"] = ae.decode(torch.cat([z, torch.randn_like(z_d)], dim=1))
        for row, y in rows.items():
            y = y.float().clamp(-1, 1)
            moments.setdefault(row, Moments()).add(net(y)[0])
            scores = [psnr(x, y), ssim(x, y)] + ([lpips(x, y)] if lpips else [])
            values.setdefault(row, []).append(torch.stack(scores, dim=1))               # (B, 2 or 3)
    found = {row: m.result() for row, m in moments.items()}
    n, *real = found.pop("real")
    table = {}
    for row, (_, *statistics) in found.items():
        means = gather(torch.cat(values[row])).mean(0).tolist()
        table[row] = dict(zip(("PSNR", "SSIM", "LPIPS"), means))
        table[row][f"r{metric_name(args, n)}"] = frechet_distance(*real, *statistics)
    if rank == 0:
        write_json(args.out / "recon.json", table=table, N=n, seconds=time.time() - start, **about(args))
        print(f"{format_table(table)}\n{n} pictures; features of {NETS[args.features][1]}")

# ------------------------------------------------------------ training, and the ablation
def transport_loss(model, x1, x0, t, y, C, w):
    """Eq. (13) and a cosine term, between noise x0 and data x1, (B, C + D, h, w) -> loss, {name: value}"""
    at = t.view(-1, 1, 1, 1)
    u, u_hat = x1 - x0, model(at * x1 + (1 - at) * x0, t, y).float()
    cosine = (1 - F.cosine_similarity(u_hat, u, dim=1)).mean()
    square, loss = (u_hat.detach() - u)**2, flow_loss(u_hat, u, C, w) + cosine
    parts = {"loss": loss, "base": square[:, :C].mean(), "detail": square[:, C:].mean(), "cosine": cosine}
    return loss, {name: v.item() for name, v in parts.items() if name != "detail" or u.shape[1] > C}

MAY_CHANGE = {"device", "out", "ref", "weights", "seeds", "lambdas", "epochs", "compile"}      # on resume

def train(args, rank, ranks, device, score=None):
    """Fine-tune --init, or train from scratch, on `encode`'s latents of C + D channels; Eq. (12), (13).
    score(dit, statistics) -> {name: value}, if given, is logged three times, of the averaged weights."""
    saved = load_checkpoint(args.out, args, MAY_CHANGE)
    data = LatentCache(args.latents, ("latents", "latents_flip", "labels"), args.seed)
    if not data.rows or not read_statistics(args.latents):
        raise InputError(f"--latents {args.latents}: no whole latents; make them: imagenet_eval.py encode")
    statistics, channels = read_statistics(args.latents), data.shards[0]["latents"].shape[1]
    torch.manual_seed(args.seed)
    if args.init == "none":
        C, dit = channels, LightningDiT(LightningDiTArch(in_channels=channels)).initialise().to(device)
    else:
        dit = load_lightningdit(args.init, device=device)
        C = dit.arch.in_channels
        learned = read_statistics(find_dit(args.init).parent)
        if learned is None:
            raise InputError(f"{find_dit(args.init).parent}: no latents_stats.safetensors or .pt by --init;"
                             " the model knows its latents by those statistics alone")
        for ours, theirs in zip(statistics, learned):
            ours[:, :C] = theirs                            # base channels stay what the model has learned
        if channels > C:
            warm_start(dit, channels - C, zero_init=not args.no_zero_init)
    most = max(int(shard["labels"].max()) for shard in data.shards)
    if most >= dit.arch.classes:
        raise InputError(f"--latents {args.latents}: classes up to {most}; {args.init} has"
                         f" {dit.arch.classes}, from 0 on")
    dit.requires_grad_(True).pos_embed.requires_grad_(False)
    weights = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = optim.AdamW(weights.values(), args.lr, (0.9, 0.95), weight_decay=0,
                            fused=device_type(device) == "cuda")
    first = saved["step"] if saved else 0
    if saved:
        for name in weights:
            weights[name].data.copy_(saved["weights"][name])
            ema[name].copy_(saved["ema"][name])
        optimizer.load_state_dict(saved["optimizer"])
    for block in dit.blocks if args.compile else ():
        block.compile(fullgraph=True, dynamic=False)
    model = nn.parallel.DistributedDataParallel(dit) if ranks > 1 else dit
    bf16 = pick_dtype(args.dtype, device, autocast=True) == torch.bfloat16
    autocast = torch.autocast(device_type(device), torch.bfloat16, enabled=bf16)
    log, (mean, std) = Log(args.out, first, rank), (v.to(device) for v in statistics)
    global_batch, mine = ranks * args.batch, slice(rank * args.batch, (rank + 1) * args.batch)
    steps = max(1, round(args.epochs * len(data.rows) / global_batch))
    points = {round(steps * i / 3) for i in (1, 2, 3)} if score else ()
    print0(rank, f"{args.out}: {len(data.rows)} latents, {C} + {channels - C} channels,"
           f" step {first} to {steps}")
    batches = StepBatches(data, args.batch, rank, ranks).loader(first, steps)
    for step, ((x1, flipped, y), _, _) in enumerate(tqdm(batches, disable=rank > 0, leave=False), first):
        last = step + 1 == steps

        # the whole global batch's draws, from the step's own seed: any number of ranks draws the same
        rng = torch.Generator(device).manual_seed(args.seed * 10**6 + step + 1)
        x0 = torch.randn(global_batch, *x1.shape[1:], generator=rng, device=device)[mine]   # noise
        t = torch.randn(global_batch, generator=rng, device=device)[mine].sigmoid()         # logit-normal
        flip, drop = torch.rand(2, global_batch, generator=rng, device=device)[:, mine]
        x1 = torch.where(flip.view(-1, 1, 1, 1) < 0.5, flipped.to(device), x1.to(device)).float()
        y = torch.where(drop < 0.1, dit.arch.classes, y.to(device))         # none, for guidance
        detail_weight = 1.0 if args.no_schedule else omega(step, args.n_warm)               # Eq. (12)
        set_lr(optimizer, args.lr, step, args.warmup)

        # forward and backward
        with autocast:
            loss, parts = transport_loss(model, (x1 - mean) / std, x0, t, y, C, detail_weight)
        loss.backward()

        # nothing that is not finite reaches the weights; the norm is not clipped, as released
        norm = clip_gradients(weights, max_norm=math.inf).item()
        check_finite(step + 1, parts["loss"], norm, weights, latents=x1)

        # update the weights, and their average
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, step, args.ema)

        # log, score, checkpoint
        if (step + 1) % 50 == 0 or last:
            log.add(step=step + 1, **parts, omega=detail_weight, norm=norm, seconds=log.seconds())
        if step + 1 in points:
            with ema_weights(weights, ema), autocast:
                epoch = (step + 1) * global_batch / len(data.rows)
                log.add(step=step + 1, epoch=epoch, **score(dit, (mean, std)))
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 in points or last):
            save_checkpoint(args.out, args, step=step + 1, weights=weights, ema=ema,
                            optimizer=optimizer.state_dict())
    if rank == 0:
        with ema_weights(weights, ema):
            export_lightningdit(args.out, dit, mean, std)
        log.plot(args.out / "loss.png", ["base", "detail", "cosine"])
        print(f"{args.out}: lightningdit.safetensors, latents_stats.safetensors, loss.png")
    return log.lines

def ablate(args, rank, ranks, device):
    """The paper's Tables 5 and 4: each part of the method left out, and lambda_align; several seeds."""
    def but(**more):
        return argparse.Namespace(**vars(args) | more)
    net, vae = load_feature_net(args, device), load_vae(args.vae, device=device)
    real = feature_statistics(args.ref or args.data, net, but(count=args.images), rank, ranks, device)[1:3]
    best = 0.5 if 0.5 in args.lambdas else args.lambdas[-1]
    variants = {"full": (best, {}), "without zero-init": (best, {"no_zero_init": True}),
                "without schedule": (best, {"no_schedule": True})}
    variants |= {f"lambda {lam:g}": (lam, {}) for lam in args.lambdas if lam != best}   # 0: without alignment
    rows, curves = {}, {"distance": {}, "texture": {}}
    for variant, (lam, flags) in variants.items():
        folder, runs = args.out / f"lambda-{lam:g}", []
        if not (folder / "result.json").is_file():                          # stage 1, once for each lambda
            one = align.parse_args(["--model", args.vae])
            vars(one).update(align=lam, steps=args.stage1, size=args.size, out=folder, dtype=args.dtype,
                             data=None if args.data == "world" else args.data, compile=args.compile,
                             detail_channels=args.detail_channels or vae.C, lpips_dir=args.weights)
            align.train(one, rank, ranks, device)
        align.barrier()
        davae, latents = folder / "davae.safetensors", folder / "latents"
        encode(but(davae=davae, out=latents, count=args.images), rank, ranks, device)
        align.barrier()                                                     # for rank 0's statistics
        ae, stage1 = load_davae(davae, vae), read_json(folder / "result.json")
        def score(dit, statistics):
            batches = sample_batches(dit, ae, statistics, rank_share(args.count, rank, ranks), args)
            _, *found, probs, y = measure(batches, net, device)
            right = (probs.argmax(1) == y % len(TEXTURES)).double().mean().item()
            texture = {"texture": 100 * right} if args.data == "world" else {}
            return {"distance": frechet_distance(*found, *real)} | texture
        for seed in range(args.seed, args.seed + args.seeds):
            more = flags | {"out": args.out / f"{variant.replace(' ', '-')}-{seed}", "latents": latents}
            lines = train(but(seed=seed, **more), rank, ranks, device, score)
            runs.append([line for line in lines if "distance" in line])
        rows[variant] = {"PSNR": stage1["table"]["DA-VAE"]["PSNR"], "align error": stage1["alignment error"]}
        for what in sorted(curves.keys() & runs[0][0].keys()):
            values = np.array([[line[what] for line in run] for run in runs])           # (seeds, points)
            curves[what][variant] = list(zip((line["epoch"] for line in runs[0]), values.mean(0)))
            last = values[:, -1]
            rows[variant] |= {what: last.mean(), f"+- {what}": last.std(ddof=int(args.seeds > 1))}
    if rank == 0:
        for what, lines in curves.items():
            save_png(args.out / f"{what}.png", plot_curves(lines, "epochs", what, log=what == "distance"))
        write_json(args.out / "ablate.json", table=rows, **about(args))
        print(f"{format_table(rows)}\ndistance: {metric_name(args, args.count)}, of {NETS[args.features][1]};"
              f" {args.seeds} seeds, mean and deviation\n{args.out}: distance.png, texture.png, ablate.json")

# ------------------------------------------------------------ the commands
FLAGS = {
    "source": dict(help="what to score: a folder, a tar, shards, world, or an .npz of statistics"),
    "data": dict(default="world", metavar="PATH", help="images in class folders, or tars (embedded world)"),
    "size": dict(type=positive_int, help="pixels a side, ADM's crop (default 512; embedded 64)"),
    "count": dict(type=positive_int,
                  help="how many pictures (all; sample 50000, ablate 10000; embedded 192)"),
    "images": dict(type=positive_int, help="how many pictures train (default all; embedded 2880)"),
    "vae": dict(default=TINY_MODEL, help="VA-VAE: file, folder or hub id (the embedded one)"),
    "davae": dict(metavar="FILE", help="the DA-VAE over it, of align.py"),
    "latents": dict(type=Path, default=Path("runs/imagenet/encode"), help="what encode wrote"),
    "init": dict(default=f"{TINY_MODEL}/lightningdit", help="LightningDiT: file, folder, hub id, or none"),
    "no-zero-init": dict(action="store_true", help="ablation: P', O' start at random"),
    "no-schedule": dict(action="store_true", help="ablation: omega = 1 from the first step"),
    "n-warm": dict(type=count_or_0, help="N_warm of Eq. (12) (default 20000; embedded 50)"),
    "epochs": dict(type=positive, help="(default 80; embedded 10; ablate 25, 6)"),
    "lr": dict(type=positive, help="constant (default 2e-4; embedded 4e-3)"),
    "ema": dict(type=share, help="decay of the averaged weights (default 0.999; embedded 0.98)"),
    "dit": dict(default="runs/imagenet/train", help="LightningDiT, its latents_stats beside"),
    "steps": dict(type=positive_int, help="grid points of Euler's method (default 250; embedded 20)"),
    "cfg": dict(type=non_negative, help="guidance (default 4; ablate 1; embedded 2.5)"),
    "interval": dict(type=time_in_flow, default=0.2, help="guidance from this t on (default 0.2)"),
    "guided": dict(type=count_or_0, default=0,
                   help="guide the first so many channels (0: all; LightningDiT: 3)"),
    "shift": dict(type=positive, help="timestep shift (default 0.3; embedded 1)"),
    "png": dict(action="store_true", help="PNGs instead of 8-bit shards"),
    "ref": dict(metavar="PATH", help="an .npz with mu and sigma, images, tars, shards, or world"),
    "features": dict(choices=list(NETS), help="world: of the embedded world's classifier, not FID"),
    "weights": dict(metavar="DIR", help=f"holds {INCEPTION} and LPIPS' two files (torch.hub's cache)"),
    "save": dict(metavar="NPZ", help="keep the statistics of SOURCE"),
    "detail-channels": dict(type=positive_int, help="D (default C; the paper's 96 for VA-VAE's 32)"),
    "lambdas": dict(type=non_negative, nargs="*", default=[0.0, 0.5, 1.0], help="lambda_align (0 0.5 1)"),
    "stage1": dict(type=positive_int, help="steps of each stage 1 (default 100000; embedded 250)"),
    "seeds": dict(type=positive_int, default=3, help="runs of each variant (default 3)"),
    "quick": dict(action="store_true", help="a few steps of everything: does it run?"),
    "batch": dict(type=positive_int, help="pictures a rank and step (default 32; train 80)"),
    "workers": dict(type=count_or_0, default=0, help="processes that read pictures (default 0)"),
    "compile": dict(action="store_true", help="torch.compile the blocks"),
    "device": dict(default="auto", help="auto, cuda, mps or cpu"),
    "dtype": dict(choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 if there is"),
    "seed": dict(type=count_or_0, default=0, help="(default 0)"),
    "out": dict(type=Path, help="folder (default runs/imagenet/COMMAND)")}
DATA, DRAW = "data size count vae davae batch workers", "steps cfg interval guided shift"
LEARN = "no-zero-init no-schedule n-warm epochs lr ema compile"
PAPER = dict(n_warm=20_000, epochs=80, lr=2e-4, ema=0.999, batch=80, size=512, features="inception",
            count=10_000, steps=250, cfg=1.0, shift=0.3, stage1=100_000)
TINY = dict(n_warm=50, epochs=10, lr=4e-3, ema=0.98, batch=32, size=64, features="world", count=192, steps=20,
            cfg=2.5, shift=1.0, stage1=250, images=2880)
COMMANDS = {    # function, flags, defaults if not PAPER's, those of the embedded world if not TINY's
    "encode": (encode, DATA, dict(count=None, batch=32), dict(count=2880)),
    "train": (train, f"latents init batch {LEARN}", {}, {}),
    "sample": (sample, f"dit vae davae count {DRAW} png batch compile",
               dict(count=50_000, cfg=4.0, batch=32), dict(count=192)),
    "fid": (fid, "source ref features weights size count save batch workers",
            dict(size=None, count=None, batch=32), {}),
    "recon": (recon, f"{DATA} features weights", dict(count=None, batch=32), dict(count=192)),
    "ablate": (ablate, "data size images vae init detail-channels lambdas stage1 seeds count batch"
               f" workers ref features weights quick {LEARN} {DRAW}", dict(epochs=25), dict(epochs=6))}
QUICK = dict(lambdas=[0.0, 0.5], stage1=5, images=128, epochs=2, count=32, steps=5, seeds=1)

def parse_args(argv=None):
    """The command and its flags, those left open from COMMANDS."""
    p = Parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (function, flags, _, _) in COMMANDS.items():
        sub = commands.add_parser(name, doc=function.__doc__, help=function.__doc__.splitlines()[0])
        for flag in f"{flags} device dtype seed out".split():
            sub.add_argument("source" if flag == "source" else f"--{flag}", **FLAGS[flag])
    args = p.parse_args(argv)
    _, _, real, mini = COMMANDS[args.command]
    embedded = TINY_MODEL in f"{vars(args).get('vae')} {vars(args).get('init')}"
    for name, value in (PAPER | real | (TINY | mini if embedded else {})).items():
        if vars(args).get(name, 0) is None:
            setattr(args, name, value)
    vars(args).update(QUICK if vars(args).get("quick") else {}, warmup=0)
    args.out = args.out or Path("runs/imagenet") / args.command
    return args

def main(args):
    rank, ranks, device = init_distributed(args)
    args.out.mkdir(parents=True, exist_ok=True)         # what cannot be written to is said before any work
    COMMANDS[args.command][0](args, rank, ranks, device)

if __name__ == "__main__":
    run(main, parse_args())
