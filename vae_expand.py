"""Chapter 1 - the latent itself.

The autoencoder that latent diffusion models share (LDM layout: SD3.5's VAE, VA-VAE, SD-VAE), and
DA-VAE over it, which keeps its C channels and adds D. Then what all chapters need: weights, found
anywhere and read strictly; images, and data sets of them; the plumbing of commands.

    vae = vae_expand.load_vae("assets/tiny")                                # the embedded model
    vae = vae_expand.load_vae("stabilityai/stable-diffusion-3.5-medium")    # licence and token

References: Rombach et al. 2022 (LDM, the encoder and decoder); Esser et al. 2024 (SD3, 16
channels); Yao et al. 2025 (VA-VAE); "DA-VAE: Plug-in Latent Compression for Diffusion via Detail
Alignment", CVPR 2026.
"""
import argparse, copy, csv, hashlib, io, json, math, os, pickle, posixpath, re, struct, sys
import tarfile, unicodedata
from array import array
from collections import Counter, OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (GatedRepoError, HFValidationError, HTTPError,
                                    RepositoryNotFoundError)
from PIL import (Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin,
                 UnidentifiedImageError)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
TINY_MODEL = str(Path(__file__).resolve().parent / "assets" / "tiny")   # laid out as the hub's

# ----------------------------------------------------- the autoencoder: SD3.5's, VA-VAE's, SD-VAE's
@dataclass(frozen=True)
class VAEArch:
    """Sizes of an autoencoder, as the shapes of its state dict say; the defaults are SD3.5's.
    The attention in the middle is always there."""
    z_channels: int = 16
    widths: tuple = (128, 256, 512, 512)    # channels a level; f = 2 ** (levels - 1)
    blocks: int = 2             # residual blocks a level in the encoder; the decoder has one more
    in_channels: int = 3
    quant: bool = False                     # 1x1 convolutions around the latent (VA-VAE, SD-VAE)
    attention: tuple = ()           # levels with attention after each block (VA-VAE: the deepest)
    groups: int = 32                        # of every GroupNorm; no shape tells it, config.json may

    @staticmethod
    def from_state_dict(state, groups=32):
        """Architecture of an LDM-layout state dict. Raises: InputError if it is another
        network's."""
        needed = [state.get(f"{name}.weight") for name in
                  ("decoder.conv_in", "encoder.conv_in", "encoder.down.0.block.0.conv1")]
        if any(tensor is None or tensor.ndim != 4 for tensor in needed):
            raise InputError(f"not an LDM autoencoder (encoder.*): {', '.join(sorted(state)[:3])}"
                             " ...")
        blocks = re.findall(r"^encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight$",
                            "\n".join(state), re.M)
        levels = range(sum(block == "0" for _, block in blocks))
        return VAEArch(
            z_channels=state["decoder.conv_in.weight"].shape[1],
            widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
            blocks=sum(level == "0" for level, _ in blocks),
            in_channels=state["encoder.conv_in.weight"].shape[1],
            quant="quant_conv.weight" in state,
            attention=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
            groups=groups)

class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). (B, c_in, h, w) -> (B, c, h, w)
    Where c differs from c_in, a 1x1 convolution brings x to c channels."""
    def __init__(self, c_in, c, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, c, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)

def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v. (B, heads, N, d) each -> like q
    In bf16 on a CPU, up to 256 tokens are computed in float32 while gradients are recorded: forward
    and backward of torch's bf16 kernel take up to five times as long there; with more, less."""
    bf16_on_cpu = v.device.type == "cpu" and v.dtype == torch.bfloat16
    if bf16_on_cpu and torch.is_grad_enabled() and v.shape[2] <= 256:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).type_as(v)
    return F.scaled_dot_product_attention(q, k, v)

class AttnBlock(nn.Module):
    """x + attention over all h*w positions, one head of width c. (B, c, h, w) -> the same
    q, k and v are made contiguous: torch's fused kernel takes no others, and the plain kernel would
    keep (h w)^2 scores."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def heads(self, x):
        """q, k, v, each (B, 1, h w, c)"""
        h = self.norm(x)
        return [rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous()
                for f in (self.q, self.k, self.v)]

    def forward(self, x):
        h = attention(*self.heads(x))                                       # (B, 1, h w, c)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))

def middle(c, groups):
    """The deepest level: residual block, attention, residual block. (B, c, h, w) -> the same"""
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c, groups), attn_1=AttnBlock(c, groups),
                                     block_2=ResBlock(c, c, groups)))

class Level(nn.Module):
    """One resolution: residual blocks, each with attention if the level has it; then a change of
    resolution down or up, or none."""
    def __init__(self, c_in, c, blocks, attention, groups, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c, c, groups)
                                   for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c, groups) if attention else nn.Identity()
                                  for _ in self.block)
        self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, stride=2)}) if down else None
        self.upsample = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, padding=1)}) if up else None

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        if self.downsample:
            x = self.downsample.conv(F.pad(x, (0, 1, 0, 1)))        # LDM pads right and bottom only
        if self.upsample:
            x = self.upsample.conv(F.interpolate(x, scale_factor=2.0))
        return x

class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2 C, H/f, W/f): mean and log-variance, before quant_conv."""
    def __init__(self, a):
        super().__init__()
        deepest = len(a.widths) - 1
        c_in = a.widths[0]
        self.conv_in = nn.Conv2d(a.in_channels, c_in, 3, padding=1)
        self.down = nn.Sequential()
        for i, c_out in enumerate(a.widths):
            self.down.append(Level(c_in, c_out, a.blocks, i in a.attention, a.groups,
                                   down=i < deepest))
            c_in = c_out
        self.mid = middle(c_out, a.groups)
        self.norm_out = nn.GroupNorm(a.groups, c_out, eps=1e-6)
        self.conv_out = nn.Conv2d(c_out, 2 * a.z_channels, 3, padding=1)

    def trunk(self, x):
        """All but conv_out: the features E_d starts from. (B, 3, H, W) -> (B, c, H/f, W/f)"""
        h = self.down(self.conv_in(x))
        return F.silu(self.norm_out(self.mid(h)))

    def forward(self, x):
        return self.conv_out(self.trunk(x))

class Decoder(nn.Module):
    """(B, C, H/f, W/f) -> (B, 3, H, W)"""
    def __init__(self, a):
        super().__init__()
        self.rows = None                                                    # see in_strips
        deepest = len(a.widths) - 1
        self.conv_in = nn.Conv2d(a.z_channels, a.widths[deepest], 3, padding=1)
        self.mid = middle(a.widths[deepest], a.groups)
        self.up = nn.ModuleList()
        for i, c_out in enumerate(a.widths):                    # up.0 is the finest, it runs last
            c_in = a.widths[min(i + 1, deepest)]
            self.up.append(Level(c_in, c_out, a.blocks + 1, i in a.attention, a.groups, up=i > 0))
        self.norm_out = nn.GroupNorm(a.groups, a.widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(a.widths[0], a.in_channels, 3, padding=1)

    def forward(self, z):
        if self.rows:
            return decode_in_strips(self, z, self.rows)
        h = self.mid(self.conv_in(z))                                       # (B, c, H/f, W/f)
        for level in reversed(self.up):
            h = level(h)                                                # (B, c0, H, W) in the end
        return self.conv_out(F.silu(self.norm_out(h)))

    def in_strips(self, rows):
        """From now on work in strips of `rows` rows (0: whole): the same images, less memory."""
        self.rows = rows

def sample_normal(mean, logvar, sample=True):
    """One draw of a diagonal Gaussian, or without `sample` its mean. Shape kept."""
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean

class VAE(nn.Module):
    """The pretrained autoencoder E, Dec of Eq. (1), with the normalisation its DiT was trained on.
    encode: images (B, 3, H, W) in [-1, 1]
    -> z = (mean - shift) * scale (B, C, H/f, W/f); decode: back."""
    def __init__(self, arch=VAEArch(), shift=0.0609, scale=1.5305):
        super().__init__()
        self.arch = arch
        self.shift = shift
        self.scale = scale
        self.C = arch.z_channels
        self.f = 2 ** (len(arch.widths) - 1)
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        self.quant_conv = nn.Conv2d(2 * self.C, 2 * self.C, 1) if arch.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(self.C, self.C, 1) if arch.quant else nn.Identity()

    def posterior(self, x):
        """(B, 3, H, W) -> mean, log-variance, each (B, C, H/f, W/f), not normalised."""
        h = self.encoder(x.to(self.encoder.conv_in.weight.dtype))           # (B, 2 C, H/f, W/f)
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                                  # exp stays finite

    def encode(self, x, sample=False):
        """(B, 3, H, W) -> (B, C, H/f, W/f): the posterior's mean, or a sample of it, normalised."""
        check_size(x.shape[-2:], self.f)
        return (sample_normal(*self.posterior(x), sample) - self.shift) * self.scale

    def decode(self, z):
        """(B, C, H/f, W/f), normalised -> (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.denormalise(z.to(self.decoder.conv_in.weight.dtype)))

    def denormalise(self, z):
        """Normalised z -> what the decoder reads. Shape kept."""
        return self.post_quant_conv(z / self.scale + self.shift)

# ---------------------------------------------------- DA-VAE: D detail channels beside the base's C
def zero_conv(c_in, c):
    """A 1x1 convolution without bias that starts at zero. It is the shortcut where the numbers of
    channels do not divide."""
    conv = nn.Conv2d(c_in, c, 1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv

class DetailDown(nn.Module):
    """Trunk features -> mean and log-variance of z_d, s times coarser.
    (B, c, s h, s w) -> (B, 2 D, h, w)
    A 3x3 convolution, then pixel-unshuffle; the shortcut unshuffles, and averages groups of
    channels. The released code has the same block."""
    def __init__(self, c, c_out, s):
        super().__init__()
        self.s = s
        self.c_out = c_out
        self.conv = nn.Conv2d(c, c_out // s**2, 3, padding=1)
        self.shortcut = zero_conv(c * s**2, c_out) if c * s**2 % c_out else None

    def forward(self, h):
        skip = F.pixel_unshuffle(h, self.s)                                 # (B, c s s, h, w)
        skip = self.shortcut(skip) if self.shortcut else skip.unflatten(1, (self.c_out, -1)).mean(2)
        return F.pixel_unshuffle(self.conv(h), self.s) + skip

class DetailUp(nn.Module):
    """Takes the place of the decoder's conv_in: [z, z_d] -> its features, s times finer.
    (B, C + D, h, w) -> (B, c, s h, s w)"""
    def __init__(self, c_in, c, s):
        super().__init__()
        self.s = s
        self.repeat = c * s**2 // c_in
        self.conv = nn.Conv2d(c_in, c * s**2, 3, padding=1)
        self.shortcut = zero_conv(c_in, c * s**2) if c * s**2 % c_in else None

    def forward(self, z):
        skip = self.shortcut(z) if self.shortcut else z.repeat_interleave(self.repeat, dim=1)
        return F.pixel_shuffle(self.conv(z) + skip, self.s)                 # (B, c, s h, s w)

    @torch.no_grad()
    def start_exact(self, conv_in):
        """Make self([z, z_d]) equal conv_in(z up-sampled bilinearly), whatever z_d is. That is exact
        except at the border of the image.
        One kernel can do this, because each tap of the fine 3x3 kernel reads a point between the
        coarse pixels -1, 0 and 1: for each of the s x s sub-pixels, all taps together are one
        coarse 3x3 kernel."""
        taps = torch.arange(-1, 2)
        at = (torch.arange(self.s)[:, None, None] + taps + 0.5) / self.s - 0.5      # (s, 1, 3)
        # how much of each coarse pixel a fine tap of each sub-pixel reads: (s, 3 coarse, 3 fine)
        reads = (1 - (at - taps[:, None]).abs()).clamp(min=0).to(conv_in.weight)
        kernel = einsum(reads, reads, conv_in.weight,
                        "i row fine_row, j column fine_column, c_out c_in fine_row fine_column"
                        " -> c_out i j c_in row column")
        self.conv.weight.zero_()
        self.conv.weight[:, :conv_in.in_channels] = kernel.flatten(0, 2)
        self.conv.bias.copy_(conv_in.bias.repeat_interleave(self.s**2))
        if not self.shortcut:                   # what the shortcut adds, the middle tap takes away
            out = torch.arange(self.conv.out_channels)
            self.conv.weight[out, out // self.repeat, 1, 1] -= 1

class DAVAE(nn.Module):
    """z_hr = [z, z_d], Eq. (1): C channels of the frozen VAE, from the base-resolution copy, and D
    new channels beside them.
    encode: I_hr (B, 3, s H, s W) in [-1, 1] -> (B, C + D, H/f, W/f), base first, normalised;
    decode: the way back.
    E_d, the alignment loss and the decoder use z_d as it is (raw). The DiT sees it normalised:
    (z_d - mean) / std per channel.
    start: "exact", where the joint decoder begins as the pretrained one, or "residual", as released.
    Raises: InputError unless C divides D."""
    def __init__(self, vae, detail_channels=None, scale=2, start="exact"):
        super().__init__()
        self.C = vae.C
        self.D = detail_channels or vae.C
        self.s = scale
        self.f = vae.f * scale
        if self.D < 1 or self.D % self.C or 2 * self.D % scale**2:
            raise InputError(f"D = {self.D}: no multiple of the base's {self.C} channels, or"
                             f" {scale}^2 / 2")
        self.vae = vae.requires_grad_(False)
        self.detail_encoder = copy.deepcopy(vae.encoder).requires_grad_(True)
        del self.detail_encoder.conv_out                            # E_d: the pretrained trunk, and
        self.down = DetailDown(vae.arch.widths[-1], 2 * self.D, scale)      # a new last layer
        self.decoder = copy.deepcopy(vae.decoder).requires_grad_(True)
        self.decoder.conv_in = DetailUp(self.C + self.D, vae.arch.widths[-1], scale)
        if start == "exact":
            self.decoder.conv_in.start_exact(vae.decoder.conv_in)
        self.register_buffer("detail_mean", torch.zeros(self.D))
        self.register_buffer("detail_std", torch.ones(self.D))
        self.to(vae.decoder.conv_in.weight)                                 # its dtype and device

    def detail_posterior(self, x_hr):
        """E_d: (B, 3, s H, s W) -> mean and log-variance of the raw z_d, each (B, D, H/f, W/f)"""
        h = self.detail_encoder.trunk(x_hr.to(self.down.conv.weight.dtype)) # (B, c, s H/f, s W/f)
        mean, logvar = self.down(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def join(self, z, z_d):
        """The joint decoder: normalised z (B, C, h, w), raw z_d (B, D, h, w)
        -> I_hr (B, 3, s f h, s f w)"""
        return self.decoder(torch.cat([self.vae.denormalise(z), z_d.to(z.dtype)], dim=1))

    def encode(self, x_hr, sample=False):
        """(B, 3, s H, s W) -> z_hr (B, C + D, H/f, W/f), normalised: the posteriors' means, or samples
        of them."""
        check_size(x_hr.shape[-2:], self.f)
        z = self.vae.encode(downsample(x_hr, self.s), sample)               # (B, C, H/f, W/f)
        z_d = sample_normal(*self.detail_posterior(x_hr), sample)           # (B, D, H/f, W/f)
        return torch.cat([z, self.normalise_detail(z_d)], dim=1)            # Eq. (1)

    def decode(self, z_hr):
        """(B, C + D, H/f, W/f), normalised -> (B, 3, s H, s W)"""
        z_hr = z_hr.to(self.detail_mean.dtype)
        return self.join(z_hr[:, :self.C], self.denormalise_detail(z_hr[:, self.C:]))

    def normalise_detail(self, z_d):
        """Raw z_d -> mean 0 and variance 1 per channel, by the stored statistics. Shape kept."""
        return (z_d - self.detail_mean.view(-1, 1, 1)) / self.detail_std.view(-1, 1, 1)

    def denormalise_detail(self, z_d):
        """The inverse of normalise_detail."""
        return z_d * self.detail_std.view(-1, 1, 1) + self.detail_mean.view(-1, 1, 1)

# ------------------------------------------------------- the same decoder, layer by layer in strips
# The largest layers of a decoder work at the size of the image, and need the most memory. Strips of
# rows need less, and give the same image if two things are kept: a convolution sees one row above and
# one row below what it computes, and group norm uses the statistics of the whole image.
def decode_in_strips(decoder, z, rows):
    """decoder(z) in strips of `rows` rows. (B, C, H/f, W/f) -> (B, 3, H, W)"""
    h = decoder.conv_in(z)
    h = block_in_strips(decoder.mid.block_1, h, rows)
    h = attention_in_strips(decoder.mid.attn_1, h, rows)
    h = block_in_strips(decoder.mid.block_2, h, rows)
    for level in reversed(decoder.up):
        for block, attn in zip(level.block, level.attn):
            h = block_in_strips(block, h, rows)
            if isinstance(attn, AttnBlock):
                h = attention_in_strips(attn, h, rows)
        if level.upsample:
            h = conv_in_strips(level.upsample.conv, double, h, rows)
    return norm_silu_conv(decoder.norm_out, decoder.conv_out, h, rows)

def double(x):
    """Nearest neighbours at twice the size."""
    return F.interpolate(x, scale_factor=2.0)

def block_in_strips(block, x, rows):
    """A ResBlock's output."""
    h = norm_silu_conv(block.norm1, block.conv1, x, rows)
    h = norm_silu_conv(block.norm2, block.conv2, h, rows)
    return h + block.nin_shortcut(x)

def attention_in_strips(attn, x, rows):
    """An AttnBlock's output; the queries of one strip at a time."""
    q, k, v = attn.heads(x)
    strips = q.split(rows * x.shape[3], dim=2)
    h = torch.cat([F.scaled_dot_product_attention(strip, k, v) for strip in strips], dim=2)
    return x + attn.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))

def norm_silu_conv(norm, conv, x, rows):
    """conv(silu(norm(x))), each strip normalised by the statistics of the whole."""
    if rows >= x.shape[2]:
        return conv(F.silu(norm(x)))
    def group_mean(f):
        """The mean of f(x) over each group of channels, strip by strip: (B, groups, 1, 1, 1)"""
        strips = (strip.float().unflatten(1, (norm.num_groups, -1))
                  for strip in x.split(rows, dim=2))
        total = sum(f(strip).sum((2, 3, 4), keepdim=True) for strip in strips)
        return total / (x[0].numel() // norm.num_groups)
    mean = group_mean(lambda strip: strip)
    variance = group_mean(lambda strip: (strip - mean)**2)
    scale = norm.weight.view(norm.num_groups, -1, 1, 1) * (variance + norm.eps).rsqrt()
    shift = (norm.bias.view(norm.num_groups, -1, 1, 1) - mean * scale).flatten(1, 2)
    scale = scale.flatten(1, 2)                                             # (B, c, 1, 1)
    return conv_in_strips(conv, lambda strip: F.silu((strip * scale + shift).to(x.dtype)), x, rows)

def conv_in_strips(conv, f, x, rows):
    """conv(f(x)) of a 3x3 `conv` and a pointwise f, which may double the size.
    A strip also has the row above and the row below it; zeros are padded beyond the image alone."""
    H = x.shape[2]
    if rows >= H:
        return conv(f(x))
    out = None
    for r in range(0, H, rows):
        n = min(rows, H - r)
        strip = x[:, :, max(r - 1, 0):r + rows + 1]
        h = f(strip)
        times = h.shape[2] // strip.shape[2]                            # 2 where f doubles the size
        h = F.conv2d(F.pad(h, (1, 1, int(r == 0), int(r + n == H))), conv.weight, conv.bias)
        if out is None:
            out = h.new_empty(*h.shape[:2], H * times, h.shape[3])
        skip = times - 1 if r else 0                            # the other half of the row above
        out[:, :, r * times:(r + n) * times] = h[:, :, skip:skip + n * times]
    return out

# --------------------------------------------------------- weights: find, read, load strictly, save
# part -> (prefix in the original single file, a key that only this network has, file names of its
# own)
PARTS = {
    "dit": ("model.diffusion_model.", ("x_embedder.proj.weight", "pos_embed.proj.weight"),
            ["transformer/diffusion_pytorch_model.safetensors"]),
    "vae": ("first_stage_model.", ("decoder.conv_in.weight",),
            ["vae/diffusion_pytorch_model.safetensors"]),
    "clip_l": ("", (), ["text_encoders/clip_l.safetensors", "text_encoder/model.safetensors"]),
    "clip_g": ("", (), ["text_encoders/clip_g.safetensors", "text_encoder_2/model.safetensors"]),
    "t5": ("", (), ["text_encoders/t5xxl_fp16.safetensors",
                    "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
                    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
                    "text_encoder_3/model.safetensors"])}

# half-precision copies, all-in-one files (both cost gigabytes and hold nothing new), macOS's
# droppings
NOT_WEIGHTS = ("*.fp16*", "*incl_clips*", "._*")

def local_folder(source, pattern):
    """Folder where the files of `source` that match `pattern` lie: itself, or the hub's cache,
    once fetched.
    Raises: InputError for what is neither folder nor repository, for a gated one,
    for an unreachable hub."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise InputError(f"{source} is a file; expected a folder or hub id laid out as"
                         f" {SD35_MEDIUM}")
    # a bare *.x means the top level
    skip = [*NOT_WEIGHTS] + (["*/*"] if "/" not in pattern else [])
    page = f"https://huggingface.co/{source}"
    fetch = f"`hf download {source}`"
    try:
        return Path(snapshot_download(str(source), allow_patterns=[pattern], ignore_patterns=skip))
    except GatedRepoError:
        what = f"the repository is gated; accept its licence at {page}, set HF_TOKEN, then {fetch}"
    except (HFValidationError, RepositoryNotFoundError):
        what = ("no such file or folder, and no such repository on the hub (owner/name; HF_TOKEN if"
                " private)")
    except (HTTPError, OSError, RuntimeError) as e:     # nor in the cache; amid a file, by either way
        what = (f"no such file or folder, not in the hub's cache, and the hub cannot be reached"
                f" ({type(e).__name__}); with a network: accept the licence at {page}, then"
                f" {fetch}")
    raise InputError(f"{source}: {what}")

def find_file(source, *names):
    """Path of the first of `names` in a folder or hub repository.
    Raises: InputError, with what is there."""
    for name in names:
        path = local_folder(source, name) / name
        if path.is_file():
            return path
    root = local_folder(source, names[0])
    there = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    found = f"{len(there)} files: {', '.join(there[:6])}" if there else "nothing"
    raise InputError(f"{source}: looked for {', '.join(names)}, as in {SD35_MEDIUM}; found {found}")

def find_weights(source, part):
    """Files of `source` (a weights file, a folder laid out as the hub's repository, or a hub id)
    that hold `part` of PARTS, the original layout's first. Raises: InputError if none does,
    or several at the top."""
    if Path(source).is_file():
        return [Path(source)]
    prefix, marks, names = PARTS[part]
    if marks:
        top = sorted(local_folder(source, "*.safetensors").glob("*.safetensors"))
        top = [path for path in top if not path.name.startswith("._")]
        plain = [path for path in top if not any(path.match(pattern) for pattern in NOT_WEIGHTS)]
        top = plain or top                              # a lone all-in-one file is taken as it is
        def holds_part(path):
            return any(key.startswith(prefix) or key in marks for key in _open(path).keys())
        holders = [path for path in top if holds_part(path)]
        if len(holders) > 1:
            names = ", ".join(path.name for path in holders)
            raise InputError(f"{source}: {part} in {names}; give the path of one")
        if holders:
            return holders
    for name in names:
        folder = Path(name).parent
        root = local_folder(source, name if str(folder) == "text_encoders" else f"{folder}/*")
        index = root / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set((read_json(index).get("weight_map") or {}).values()))
            if not shards:
                raise InputError(f"{index}: lists no files under weight_map; fetch it again")
            return [find_file(source, f"{folder}/{shard}") for shard in shards]
        if (root / name).is_file():
            return [root / name]
    wanted = [f"*.safetensors with {prefix}* keys"] if prefix else []
    return [find_file(source, *wanted, *names)]                         # not there: says what is

def _open(path):
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder; expected a .safetensors file, such as one in it")
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); fetch it again") from None

def read_metadata(path):
    """The header's {name: text} of a safetensors file."""
    return _open(path).metadata() or {}

def is_safetensors(path):
    """Whether a file's content, not its suffix, is safetensors: eight bytes of length,
    then JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"

# Windows lets nobody replace a checkpoint that is mapped into memory
MAP_FILES = os.name == "posix"

def read_torch(path):
    """The dict of a weights-only torch file: zipped (mapped into memory), or of torch's old format,
    as the published LPIPS, VGG and Inception weights are.
    Raises: InputError. A pickle of more than tensors is never run."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and MAP_FILES)
    except (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
            OSError, RuntimeError, TypeError, ValueError, pickle.PickleError, struct.error) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:90]
        other = re.search(r"GLOBAL (\S+)", str(e))      # torch says it last, behind much advice
        if other:
            why = f"it also holds a {other[1][:60]}; save the tensors alone"
        raise InputError(f"{path}: no dict of tensors to torch.load(weights_only=True)"
                         f" ({why})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content

def read_file(path, prefix=""):
    """dict of a weights file's tensors, whatever its suffix; of those under `prefix` alone,
    if there are any.
    A torch file's tensors may lie in its `state_dict`, with an optimizer's beside.
    Raises: InputError."""
    named = Path(path).suffix.lower() in (".safetensors", ".sft")
    if named or Path(path).is_file() and is_safetensors(path):
        file = _open(path)
        keys = file.keys()
        read = file.get_tensor
    else:
        content = read_torch(path)
        keys = content.get("state_dict", content)
        if not isinstance(keys, dict) or not all(isinstance(k, str) for k in keys):
            raise InputError(f"{path}: no tensors by name in it; expected a state dict, of a model")
        read = keys.get
    wanted = [k for k in keys if k.startswith(prefix)] or keys
    return {k.removeprefix(prefix): read(k) for k in wanted}

def read_weights(source, part):
    """dict of the tensors of `part`, under the file's own key names without prefix;
    see find_weights."""
    prefix, _, _ = PARTS[part]
    state = {}
    for path in find_weights(source, part):
        state |= read_file(path, prefix)
    return state

def read_json(path):
    """What a .json file holds ({} if there is none), or the lines of a .jsonl ([]).
    Raises: InputError, also for a .json of something else than names and values."""
    lines = path.suffix == ".jsonl"
    try:
        if not path.is_file():
            return [] if lines else {}
        data = path.read_bytes()
        if lines:
            return [json.loads(line) for line in data.splitlines() if line.strip()]
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {content!r:.40}")
        return content
    except ValueError as e:                             # not UTF-8, not JSON, or not of names
        raise InputError(f"{path}: not a whole JSON file ({e}); mend it, or delete it") from None

def write_json(path, content):
    """Write a dict as .json, for people and programs; what JSON does not know (paths) as text."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text))

VAE_NAMES = {       # diffusers' name: the original's, replaced in this order
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "conv_shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",                   # the last four: of older files
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out"}

def vae_from_diffusers(state):
    """A VAE state dict in diffusers' names -> LDM's (which pass through).
    Linear q, k, v become 1x1 convs."""
    if not any("down_blocks" in k for k in state):
        extra = ("loss", "foundation_model", "linear_proj")         # of VA-VAE's training wrapper
        return {k: v for k, v in state.items() if not k.startswith(extra)}
    last = max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks"))
    out = {}
    for key, tensor in state.items():
        for theirs, ours in VAE_NAMES.items():
            key = key.replace(theirs, ours)
        # diffusers counts the decoder's levels as they run, the original by resolution
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        if re.search(r"\.(q|k|v|proj_out)\.weight$", key) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[key] = tensor
    return out

def load_strict(build, state, what, dtype=torch.float32, device="cpu"):
    """build() -> module, made without memory, then given `state`: cast, moved, frozen,
    in eval mode.
    Raises: InputError naming keys that are missing, unknown, misshapen, no floats or not finite.
    Nothing is lenient."""
    try:
        with torch.device("meta"):
            module = build()
    except ValueError as e:                             # channels that group norm cannot divide
        raise InputError(f"{what}: its sizes make no network ({e})") from None
    have = {k: tuple(getattr(v, "shape", ())) for k, v in state.items()}    # not all may be tensors
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wrong = [f"missing {k}" for k in want if k not in have]
    wrong += [f"unknown {k}" for k in have if k not in want]
    wrong += [f"{k} is {have[k]}, expected {want[k]}" for k in want.keys() & have.keys()
              if have[k] != want[k]]
    if wrong:
        raise InputError(f"{what}: {len(wrong)} keys are not as expected here:"
                         f" {'; '.join(wrong[:4])}")
    wrong = [k for k, v in module.state_dict().items()
             if v.is_floating_point() and not state[k].is_floating_point()]
    if wrong:
        raise InputError(f"{what}: {wrong[0]} holds {state[wrong[0]].dtype} ({len(wrong)} such"
                         " tensors), expected floats; fetch weights that are not quantised")
    # copy=True: a tensor that needs no cast would otherwise stay a view of the file
    state = {k: v.to(device, dtype, copy=True) for k, v in state.items()}
    wrong = [k for k, v in state.items() if not torch.stack(v.aminmax()).isfinite().all()]
    if wrong:
        raise InputError(f"{what}: {wrong[0]} holds nan or inf ({len(wrong)} such tensors); fetch"
                         " it again")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

def load_vae(source=SD35_MEDIUM, dtype=torch.float32, device="cpu"):
    """Strictly load SD3.5's, VA-VAE's or SD-VAE's autoencoder, in either layout -> VAE, frozen.
    The normalisation is config.json's where there is one. Otherwise C tells: 16 channels are
    SD3.5's, 4 SD-VAE's, any other number VA-VAE's."""
    state = vae_from_diffusers(read_weights(source, "vae"))
    path = find_weights(source, "vae")[0].parent / "config.json"            # diffusers' layout
    config = read_json(path)
    if config.get("latents_mean") or config.get("latents_std"):
        raise InputError(f"{path}: normalises each channel by its own latents_mean, latents_std;"
                         " expected one scaling_factor, as of SD3.5, VA-VAE and SD-VAE")
    arch = VAEArch.from_state_dict(state, config.get("norm_num_groups") or 32)
    shift, scale = {16: (0.0609, 1.5305), 4: (0.0, 0.18215)}.get(arch.z_channels, (0.0, 1.0))
    if config.get("scaling_factor"):
        shift = config.get("shift_factor") or 0.0
        scale = config["scaling_factor"]
    return load_strict(lambda: VAE(arch, shift, scale), state, source, dtype, device)

def weights_hash(module, fp16=False):
    """16 hex digits of names and values in bf16: the same from either layout and in any dtype of
    loading. fp16: the hash of a copy in float16, as some models are published; it may differ."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.half() if fp16 else tensor
        values = values.to("cpu", torch.bfloat16).view(torch.int16).numpy()
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()[:16]

def file_hash(path):
    """16 hex digits of a file's bytes, read in parts of 16 MB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()[:16]

def atomic_write(path, write):
    """write(temporary path), then rename: nobody ever sees half a file."""
    path = Path(path)
    temporary = path.with_suffix(".part")
    try:
        write(temporary)
    except (OSError, RuntimeError, SafetensorError) as e:   # of a full disk each makes another
        raise OSError(f"{path} cannot be written: {str(e).splitlines()[0]}; its last state is"
                      " kept") from None
    temporary.replace(path)

def save_davae(path, davae):
    """Write what DA-VAE adds (E_d, joint decoder, statistics) and the base VAE's hashes."""
    state = {k: v.cpu().contiguous() for k, v in davae.state_dict().items()
             if not k.startswith("vae.")}
    metadata = dict(detail_channels=str(davae.D), scale=str(davae.s),
                    base_vae=weights_hash(davae.vae),
                    base_vae_fp16=weights_hash(davae.vae, fp16=True))
    atomic_write(path, lambda temporary: save_file(state, temporary, metadata=metadata))

def same_base(metadata, vae):
    """Whether `vae` is the VAE of `metadata`, or one of the two is a copy of the other in float16."""
    known = {metadata["base_vae"], metadata.get("base_vae_fp16")}
    return weights_hash(vae) in known or weights_hash(vae, fp16=True) == metadata["base_vae"]

def load_davae(path, vae):
    """DA-VAE of save_davae over its base `vae`, in that VAE's dtype and device, frozen.
    Raises: InputError for a file of another kind, and for a VAE other than it was trained over."""
    metadata = read_metadata(path)
    if "base_vae" not in metadata:
        raise InputError(f"{path}: not a DA-VAE file; expected one that vae_expand.py or align.py"
                         " wrote")
    if not same_base(metadata, vae):
        raise InputError(f"{path}: made over VAE {metadata['base_vae']}, this one is"
                         f" {weights_hash(vae)}")
    davae = DAVAE(vae, int(metadata["detail_channels"]), int(metadata["scale"]))
    state = read_file(path) | {f"vae.{k}": v for k, v in vae.state_dict().items()}
    return load_strict(lambda: davae, state, path, davae.detail_mean.dtype,
                       davae.detail_mean.device)

# ------------------------------------------------------------ images
def downsample(x, s):
    """I from I_hr: bicubic with antialiasing. (B, 3, sH, sW) -> (B, 3, H, W)"""
    return F.interpolate(x.float(), scale_factor=1 / s, mode="bicubic", antialias=True)

UPRIGHT = {     # EXIF's orientation: what undoes it
    2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
    6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}

@lru_cache(maxsize=8)
def is_srgb(profile):
    """Whether the bytes of an ICC profile make of RGB what sRGB makes of it, within 3 of 255. Names do
    not tell: "sRGB-elle-V2-g10.icc" is linear, "Rec2020-elle-V4-srgbtrc.icc" has other primaries."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if profile.profile.xcolor_space.strip() != "RGB":
        return False
    colours = np.indices((6, 6, 6), np.uint8).reshape(3, 6, 36).transpose(1, 2, 0) * np.uint8(51)
    converted = ImageCms.profileToProfile(Image.fromarray(colours), profile,
                                          ImageCms.createProfile("sRGB"))
    return np.abs(np.asarray(converted).astype(int) - colours).max() <= 3

def to_srgb(image, notes):
    """PIL image of any colour mode -> RGB, by its embedded ICC profile if it has one that can be
    read; if it has another, "damaged_profiles" is added to the set `notes`."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            if not is_srgb(profile):
                profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
                srgb = ImageCms.createProfile("sRGB")
                return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.add("damaged_profiles")       # or of another colour mode: it says nothing
    return image.convert("RGB")

def read_image(file, name=None, notes=None):
    """Any image file -> PIL RGB in sRGB, upright: EXIF's rotation done, alpha on white,
    palettes resolved.
    16-bit greys become 8-bit; floats are read as [0, 1]. notes: a set, see to_srgb.
    Raises: InputError for what is no whole image; for floats beyond [0, 1] and for 32-bit integers,
    whose white no file says; and for a picture so large that it looks like a decompression bomb."""
    try:
        image = Image.open(file)
        image.load()
        turn = UPRIGHT.get(image.getexif().get(0x0112))
        profile = image.info.get("icc_profile")
        if image.mode == "F":
            values = np.asarray(image)
            if not (values.min() >= 0 and values.max() <= 1):
                raise ValueError("floats outside [0, 1]; save it with 8 or 16 bits")
            image = Image.fromarray((values * 255).round().astype(np.uint8))
        elif image.mode == "I" and image.format == "TIFF":
            raise ValueError("32-bit integers, whose white is unknown; save it with 8 or 16 bits")
        elif image.mode.startswith("I"):                    # 16-bit grey, which Pillow would clip
            white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if white_is_zero:                               # Pillow inverts up to 8 bits alone
                image = ImageOps.invert(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            mode = "L" if image.mode in ("L", "LA") else "RGB"      # that of its profile
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"),
                                          image.convert("RGBA")).convert(mode)
        if image.mode not in ("RGB", "L", "CMYK", "LAB"):
            image = image.convert("RGB")
        image.info["icc_profile"] = profile
        image = to_srgb(image, set() if notes is None else notes)
        return image.transpose(turn) if turn is not None else image
    except UnidentifiedImageError:
        raise InputError(f"{name or file}: not a readable image (of no format that Pillow"
                         " knows)") from None
    except Exception as e:          # an image decoder may raise anything for a damaged file
        raise InputError(f"{name or file}: not a readable image ({str(e)[:100]})") from None

def to_tensor(image):
    """PIL RGB -> (3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

def to_bytes(x):
    """(..., 3, H, W) in [-1, 1], clamped and rounded -> (..., H, W, 3) uint8, on the CPU"""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu()

def to_image(x):
    """(3, H, W) in [-1, 1] -> PIL RGB"""
    return Image.fromarray(to_bytes(x).numpy())

def save_png(path, image, compress_level=6, **text):
    """Write a PIL image or a (3, H, W) tensor as PNG, with `text` (prompt, seed, ...) in its text
    chunks. compress_level: zlib's, from 0 to 9."""
    image = image if isinstance(image, Image.Image) else to_image(image)
    info = PngImagePlugin.PngInfo()
    for k, v in text.items():
        info.add_itxt(k, str(v))
    atomic_write(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info,
                                                    compress_level=compress_level))

def save_overview(path, image):
    """save_png for grids, previews and curves: list_images knows them, and never reads them as
    data."""
    save_png(path, image, Comment=OVERVIEW)

def is_overview(name, place_of):
    """Whether the file at place_of(name) is such a picture, by its name and its text."""
    if not OVERVIEW_NAMES.fullmatch(posixpath.basename(name)):
        return False
    try:
        return OVERVIEW.encode() in place_of(name).read(4096)
    except OSError:                                         # a dangling link: counted as broken later
        return False

def grid(images, columns, rows=None, heads=None, gap=4, least=192):
    """Images (N, 3, H, W) or a list of (3, H, W), in rows of `columns` -> one PIL image.
    Smaller ones are enlarged (nearest) to the largest, or to `least` pixels; `heads` label the
    columns, `rows` the rows."""
    tiles = [to_image(x) for x in images]
    size = tuple(max(least, *sides) for sides in zip(*(tile.size for tile in tiles)))
    w = size[0] + gap
    h = size[1] + gap
    letter = max(11, size[0] // 11)                                         # pixels high, for a projector
    font = ImageFont.load_default(letter)
    left = math.ceil(max(map(font.getlength, rows))) + 8 if rows else 0
    top = letter + 8 if heads else 0
    out = Image.new("RGB", (left + columns * w, top + -(-len(tiles) // columns) * h), "white")
    draw = ImageDraw.Draw(out)
    for i, tile in enumerate(tiles):
        out.paste(tile.resize(size, Image.NEAREST),
                  (left + i % columns * w, top + i // columns * h))
    for i, text in enumerate(heads or []):
        draw.text((left + i * w + 2, 2), text, "black", font)
    for i, text in enumerate(rows or []):
        draw.text((4, top + i * h + (size[1] - letter) // 2), text, "black", font)
    return out

CURVE_COLOURS = "#1f5fbf", "#d0552b", "#2e8b57", "#8a4fb0", "#b8860b", "#222222"

def round_ticks(low, high):
    """About five round numbers in [low, high], a step of 1, 2 or 5 times a power of ten apart."""
    power = 10.0**math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if high - low <= 5 * m * power * 1.001)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]

def plot_curves(curves, xlabel, ylabel="", log=False, size=(700, 420)):
    """{name: [(x, y), ...]} -> a PIL image with axes, their ranges and a legend.
    log: a logarithmic y axis.
    Values that cannot be shown (not finite, or not positive on a logarithmic axis) are left out."""
    lowest = 0 if log else -math.inf
    shown = {name: [(x, y) for x, y in points if lowest < y < math.inf]
             for name, points in curves.items()}
    xs = [x for points in shown.values() for x, _ in points] or [0]
    ys = [y for points in shown.values() for _, y in points] or [1]
    x_low = min(xs)
    x_high = max(max(xs), min(xs) + 1)
    if log:
        y_low = 0.9 * min(ys)
        y_high = 1.1 * max(ys)
    else:
        y_low = min(0, *ys)
        y_high = 1.05 * max(0, *ys) or 1

    left = 64
    top = 30
    right = size[0] - 16
    bottom = size[1] - 42
    def to_pixel(x, y):
        across = (x - x_low) / (x_high - x_low)
        if log:
            up = math.log(y / y_low) / math.log(y_high / y_low)
        else:
            up = (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for x in round_ticks(x_low, x_high):
        column, _ = to_pixel(x, y_high)
        draw.line([(column, top), (column, bottom)], "#e8e8e8")
        draw.text((column, bottom + 6), f"{x:.6g}", "black", anchor="ma")
    if log:
        ticks = [y_low * (y_high / y_low)**(i / 4) for i in range(5)]
    else:
        ticks = round_ticks(y_low, y_high)
    for y in ticks:
        _, row = to_pixel(x_low, y)
        draw.line([(left, row), (right, row)], "#e8e8e8")
        draw.text((left - 6, row), f"{y:.3g}", "black", anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], "#808080")
    draw.text(((left + right) / 2, bottom + 24), xlabel, "black", anchor="ma")
    draw.text((left, 2), ylabel, "black")
    legend = right                          # names stand above the frame, where no curve passes
    for i, (name, points) in enumerate(shown.items()):
        colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
        pixels = [to_pixel(x, y) for x, y in points]
        draw.line(pixels, colour, 2)
        for x, y in pixels if len(pixels) < 20 else ():
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((legend, top - 6), name, colour, anchor="rs")
        legend -= draw.textlength(name) + 16
    return image

def pca_images(z, z_d):
    """Both latents as colours: the three strongest directions of z are red, green and blue. Where
    z_d is aligned, it has the colours of z.
    z (C, h, w), raw z_d (D, h, w), in which a group of D / C channels stands for one channel of z
    -> two images (3, h, w)"""
    covariance = torch.cov(z.float().flatten(1), correction=int(z[0].numel() > 1))
    u = torch.linalg.svd(covariance)[0][:, :3]                              # (C, 3)
    # (3, h w)
    both = [u.T @ v.float().unflatten(0, (len(z), -1)).mean(1).flatten(1) for v in (z, z_d)]
    low, high = (torch.quantile(both[0], q, dim=1, keepdim=True) for q in (0.02, 0.98))
    return [((v - low) / (high - low + 1e-8) * 2 - 1).clamp(-1, 1).view(3, *z.shape[1:])
            for v in both]

# ------------------------------------------------------------ data sets of pictures
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif",
                  ".tiff", ".avif"}
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
GENEVAL_FIELDS = {"tag", "include"}     # by which an entry of GenEval's prompts is known
OVERVIEW = "an overview, made by DA-VAE's scripts: no data"     # in the text of such a PNG
OVERVIEW_NAMES = re.compile("(grid|preview.*|result|latents|loss|accuracy|distance|texture).png")

class Place(NamedTuple):
    """Where bytes lie: a file, or a member of an uncompressed tar."""
    path: Path
    offset: int = 0
    length: int = -1                    # -1: to the end of the file

    def read(self, most=-1):
        """All of them, or at most so many."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(most if self.length < 0 else self.length)

class Item(NamedTuple):
    """One picture of a data set, listed but not read."""
    name: str                           # its path inside the folder or the tar
    place: Place
    caption: str | Place            # the text, or the file that holds it; "" where there is none
    label: int                          # its class

class Strings:
    """Many strings in one run of bytes: no Python object for each."""
    def __init__(self):
        self.data = bytearray()
        self.ends = array("q", [0])

    def append(self, string):
        self.data += string.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.data))

    def __getitem__(self, i):
        return self.data[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogatepass")

NO_CAPTION, TEXT, CAPTION_FILE, CAPTION_IN_TAR = range(4)

class ItemTable:
    """Items in arrays, which read like a list of Item: a folder's picture costs some 50 bytes
    instead of 800, and worker processes share them. index: which rows are in it,
    so that splits share the rest."""
    def __init__(self, root):
        self.root = root
        self.names = Strings()
        self.labels = array("i")
        self.captions = Strings()       # texts, or names of files below root
        self.caption_kinds = bytearray()
        self.tars = []
        self.tar_numbers = array("i")   # of each row, if it lies in a tar
        self.spans = array("q")     # four numbers a row: offset and length of picture and caption
        self.index = np.zeros(0, np.int32)

    def append(self, name, place, caption, label):
        """The fields of an Item. Below a folder, its place is `name` there: place None says so."""
        self.names.append(name)
        self.labels.append(label)
        kind = TEXT if caption else NO_CAPTION
        text = caption
        span = 0, 0
        if isinstance(caption, Place):
            kind = CAPTION_FILE
            text = ""
            if place is None:
                text = os.path.relpath(caption.path, self.root)
            else:
                kind = CAPTION_IN_TAR
                span = (caption.offset, caption.length)
        self.captions.append(text)
        self.caption_kinds.append(kind)
        if place is not None:
            if not self.tars or self.tars[-1] != place.path:
                self.tars.append(place.path)
            self.tar_numbers.append(len(self.tars) - 1)
            self.spans.extend([place.offset, place.length, *span])

    def finish(self, numbers=None):
        """After the last row. numbers: {label so far: label} -> self"""
        if numbers:
            self.labels = array("i", [numbers[label] for label in self.labels])
        self.index = np.arange(len(self.labels), dtype=np.int32)
        return self

    def split(self, split):
        """"val": every 50th item; "train": the others; "all" -> ItemTable over the same arrays"""
        held_out = np.arange(len(self)) % 50 == 0
        table = copy.copy(self)
        if split != "all" and len(self) > 1:
            table.index = self.index[held_out if split == "val" else ~held_out]
        return table

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        row = int(self.index[i])
        name = self.names[row]
        kind = self.caption_kinds[row]
        caption = self.captions[row]
        if self.tars:
            tar = self.tars[self.tar_numbers[row]]
            offset, length, *caption_span = self.spans[4 * row:4 * row + 4]
            place = Place(tar, offset, length)
            if kind == CAPTION_IN_TAR:
                caption = Place(tar, *caption_span)
        else:
            place = Place(self.root / name)
            if kind == CAPTION_FILE:
                caption = Place(self.root / caption)
        return Item(name, place, caption, self.labels[row])

    def subset(self, numbers):
        """The items of those numbers -> ItemTable over the same arrays"""
        table = copy.copy(self)
        table.index = self.index[np.asarray(numbers, dtype=np.int64)]
        return table

    def has_captions(self):
        """Whether any item has one."""
        return bool(np.frombuffer(self.caption_kinds, np.uint8)[self.index].any())

class Listing(NamedTuple):
    """What a data set holds, and what of it was passed over."""
    items: ItemTable
    classes: list                       # names by label; empty where .cls files number them
    summary: str                        # one line that says all this

def file_key(name):
    """The form in which names are compared: NFC, forward slashes, no `./`, the suffix in lower
    case."""
    name = posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    stem, suffix = posixpath.splitext(name)
    return stem + suffix.lower()

def suffix_of(name):
    """Suffix in lower case: ".jpg"."""
    return posixpath.splitext(name)[1].lower()

def is_hidden(name):
    """Whether a file is a by-product that nobody put there on purpose: .ipynb_checkpoints,
    ._photo.jpg, __MACOSX."""
    if "/." not in name and "__MACOSX" not in name and not name.startswith("."):
        return False
    return any(part == "__MACOSX" or part.startswith(".") and part not in (".", "..")
               for part in name.split("/"))

def decode_text(data, name):
    """Bytes of a text file -> str, without a byte-order mark.
    Raises: InputError if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{name}: not UTF-8 text ({e}); save it as UTF-8") from None

def whole_text(text, where):
    """The text itself. Raises: InputError if it holds half a character, which no UTF-8 spells: JSON
    that was cut inside an emoji (\\ud83d alone), or a command line in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where}: {text[:60]!r} holds half a character at place {e.start}"
                         " (no UTF-8); write it anew") from None
    return text

def list_tar(path):
    """Members of an uncompressed tar -> {name: Place}; hard and symbolic links inside it are
    followed.
    Raises: InputError for a tar that is compressed, cut short, damaged, two in one, or no tar."""
    places = {}
    links = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isreg():
                    places[name] = Place(path, member.offset_data, member.size)
                elif member.islnk():
                    links[name] = member.linkname.removeprefix("./")
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name),
                                                                    member.linkname))
            # tarfile takes a damaged header for the end, as it does the end of the first of two tars
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(2**16).strip(b"\0"):
                raise InputError(f"{path}: members, or a damaged one, behind the end that byte"
                                 f" {tar.offset} marks; pack it anew")
    except (tarfile.TarError, OSError) as e:
        raise InputError(f"{path}: not a readable, uncompressed tar ({e})") from None
    for name, target in links.items():
        passed = {name}
        while target in links and target not in passed:         # links in a circle lead nowhere
            passed.add(target)
            target = links[target]
        if target in places:
            places[name] = places[target]
    return places

def list_folder(root, passed_over):
    """Names of the files below a folder, folder by folder. Linked folders are followed,
    but not into a circle; that, and what is no file (pipes and the like), is counted in
    `passed_over`. A link that leads nowhere is listed; reading it fails."""
    names = []
    above = {}                          # folder: the real folders that lead to it
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        real = os.path.realpath(folder)
        way = above.get(os.path.dirname(folder), frozenset())
        if real in way:
            folders.clear()
            passed_over["folders linked in a circle"] += 1
            continue
        above[folder] = way | {real}
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for file in sorted(files):
            path = os.path.join(folder, file)
            if os.path.isfile(path) or os.path.islink(path):
                names.append(prefix + file)
            else:
                passed_over["no files (pipes and the like)"] += 1
    return names

def read_csv(text, delimiter=","):
    """A .csv with a header -> list of dicts. delimiter: a tab, if it is a .tsv
    Raises: ValueError for a quote that is not closed, for a row with more fields than the header,
    as an unquoted comma makes, and for a name that heads two fields: a part of its text would be
    lost."""
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        rows = list(table)
    except csv.Error as e:
        raise ValueError(f"{e}: is every quote closed?") from None
    twice = [name for name, times in Counter(table.fieldnames).items() if name and times > 1]
    if twice:
        raise ValueError(f"its header has {twice[0]!r} twice; rename one")
    for number, row in enumerate(rows, 1):
        if any(row.pop(None, [])):                  # the fields without a name; empty ones are no loss
            raise ValueError(f"entry {number} has more fields than the header; put text that has"
                             f" {delimiter!r} in it between quotes")
    return rows

def text_of(row):
    """The caption in an entry of metadata: "text", or the list under "texts", a line each."""
    texts = row.get("texts")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return "\n".join(" ".join(text.split()) for text in texts)
    return row["text"]

def read_captions(names, place_of, root):
    """Every metadata.jsonl and metadata.csv
    -> {file_key of a picture: its text, ...}, {key: where it stood}
    Names count from the metadata's own folder. GenEval's metadata.jsonl, which sample.py writes
    beside its pictures, names none, and is passed over.
    Raises: InputError for an entry without file_name or text, for a text that is no string,
    for a second text of one picture, and for what read_csv refuses."""
    texts = {}
    entries = {}
    for name in names:
        folder, file = posixpath.split(name)
        if file not in METADATA_FILES or is_hidden(name):
            continue
        content = decode_text(place_of(name).read(), root / name)
        try:
            if file.endswith(".csv"):
                rows = read_csv(content)
            else:
                rows = [json.loads(line) for line in content.split("\n") if line.strip()]
            pairs = [(row["file_name"], text_of(row)) for row in rows
                     if not GENEVAL_FIELDS <= row.keys()]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            expected = 'expected lines of {"file_name": ..., "text": ...}'
            raise InputError(f"{root / name}: {expected} ({type(e).__name__}: {e})") from None
        for number, (file_name, text) in enumerate(pairs, 1):
            if not (isinstance(file_name, str) and isinstance(text, str)):
                what = f"file_name {file_name!r}, text {text!r}"[:90]
                raise InputError(f"{root / name}, entry {number}: {what}; both are strings")
            if os.path.isabs(file_name):
                file_name = os.path.relpath(os.path.realpath(file_name),
                                            os.path.realpath(root / folder))
            key = file_key(posixpath.join(folder, file_name.replace("\\", "/")))
            if texts.setdefault(key, whole_text(text, f"{root / name}, entry {number}")) != text:
                raise InputError(f"{root / name}, entry {number}: a second text for {file_name};"
                                 ' several captions of a picture go into one entry: {"file_name":'
                                 ' ..., "texts": [..., ...]} of a metadata.jsonl')
            entries[key] = f"{name}, entry {number}: {file_name}"
    return texts, entries

def read_json_caption(place, name):
    """The "caption" or "text" of a .json beside a picture, as webdatasets have it;
    "" without either.
    Raises: InputError if the file is no JSON, or that is no string; see whole_text."""
    try:
        content = json.loads(decode_text(place.read(), name))
    except ValueError as e:
        raise InputError(f"{name}: not a whole JSON file ({e}); mend it, or move it away") from None
    found = [content[key] for key in ("caption", "text") if isinstance(content, dict)
             and key in content]
    if found and not isinstance(found[0], str):
        raise InputError(f"{name}: caption {found[0]!r:.60}; expected a string")
    return whole_text(found[0], name).strip() if found else ""

def read_class(place, name):
    """The class in a webdataset's .cls file. Raises: InputError if that is no whole number below
    2^31."""
    text = decode_text(place.read(), name).strip()
    if not text.isdecimal() or int(text[:20]) >= 2**31:
        raise InputError(f"{name}: {text[:40]!r}; expected the number of a class")
    return int(text)

def list_group(group, names, places, root, table, classes, counts, passed_over):
    """List one folder or one tar: rows are added to `table`,
    {class, a name or a number: its label so far} to `classes`, and both Counters are added to.
    group: the class of pictures that lie in no folder; places: {name: Place} in a tar, else None.
    Raises: InputError for metadata that names no picture; see read_captions and read_class."""
    def place_of(name):
        return Place(root / name) if places is None else places[name]

    texts, entries = read_captions(names, place_of, root)
    beside_pictures = {}                # captions and classes: file_key of the file: its name
    for name in names:
        if suffix_of(name) in (*CAPTION_SUFFIXES, ".cls") and not is_hidden(name):
            beside_pictures[file_key(name)] = name
    used = set()
    for name in names:
        suffix = suffix_of(name)
        if is_hidden(name):
            passed_over["hidden"] += 1
            continue
        if suffix not in IMAGE_SUFFIXES:
            read_elsewhere = suffix in (*CAPTION_SUFFIXES, ".cls")
            if not read_elsewhere and posixpath.basename(name) not in METADATA_FILES:
                passed_over[suffix or "without a suffix"] += 1
            continue
        if is_overview(name, place_of):
            passed_over["overviews of our own"] += 1
            continue

        key = file_key(name) if texts or beside_pictures else ""
        stem = posixpath.splitext(key)[0]
        # a.txt, then a.jpg.txt, then the same with the next suffix: the first that is there counts
        candidates = [base + suffix for suffix in CAPTION_SUFFIXES for base in (stem, key)]
        beside = [candidate for candidate in candidates if candidate in beside_pictures]
        caption = ""
        if key in texts:
            caption = texts[key].strip()
            where = posixpath.basename(entries[key].split(", entry")[0])
            counts[f"in {where}" if caption else f"missing in {where}"] += 1
        elif beside and not beside[0].endswith(".json"):
            caption = place_of(beside_pictures[beside[0]])
            counts[f"in {suffix_of(beside[0])}"] += 1
        elif beside:
            json_file = beside_pictures[beside[0]]
            caption = read_json_caption(place_of(json_file), root / json_file)
            counts["in .json" if caption else "missing in .json"] += 1
        else:
            counts["missing"] += 1

        class_file = beside_pictures.get(stem + ".cls")
        if class_file:
            label = read_class(place_of(class_file), class_file)
            classes[label] = label
        else:
            folders = [part for part in name.split("/")[:-1] if part not in ("", ".", "..")]
            label = classes.setdefault(folders[0] if folders else group, len(classes))
        table.append(name, places and places[name], caption, label)
        if texts or beside_pictures:
            used.update([key, *beside])
    lost = [entry for key, entry in entries.items() if key not in used]
    if lost:
        raise InputError(f"{root}: {len(lost)} entries of metadata name no picture; the first is"
                         f" {lost[0]}")
    for key in beside_pictures.keys() - used:
        if key.endswith(".json"):
            passed_over[".json"] += 1
        elif key.endswith(CAPTION_SUFFIXES):
            passed_over["captions of no picture"] += 1

def list_images(source):
    """A folder of pictures (recursive), a tar, or a folder of tars -> Listing
    Captions come from metadata.jsonl or metadata.csv, else from name.txt, name.jpg.txt or
    name.caption.
    A class is a .cls file's number, else the first level of folders, else the tar.
    What is passed over is counted in the summary.
    Raises: InputError if there is no picture, or if pictures and tars lie together."""
    root = Path(source)
    if not root.exists():
        raise InputError(f"{source}: no such file or folder; expected images, or tar shards of jpg"
                         " + txt")
    counts = Counter()
    passed_over = Counter()
    table = ItemTable(root)
    found = {}
    tars = [root]
    if root.is_dir():
        names = list_folder(root, passed_over)
        seen = [name for name in names if not is_hidden(name)]
        tars = [root / name for name in seen if suffix_of(name) == ".tar"]
        loose = sum(suffix_of(name) in IMAGE_SUFFIXES for name in seen)
        if tars and loose:
            raise InputError(f"{source}: {loose} pictures and {len(tars)} tars ({tars[0].name}) lie"
                             " together; move those away that are not meant")
        if not tars:
            list_group("", names, None, root, table, found, counts, passed_over)
    for tar in tars:
        places = list_tar(tar)
        list_group(tar.stem, list(places), places, tar, table, found, counts, passed_over)
    if not table.labels:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{source}: no image in it; expected {suffixes} or tars")

    numbered = [label for label in found if isinstance(label, int)]
    if numbered and len(numbered) < len(found):
        raise InputError(f"{source}: some pictures have a .cls file, others none; give every one"
                         " its class")
    if numbered:
        classes = []
    elif all(label.isdecimal() for label in found):                         # 10 comes after 2
        classes = sorted(found, key=int)
    else:
        classes = sorted(found)
    items = table.finish({found[name]: i for i, name in enumerate(classes)})

    captions = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:4]))
    if len(classes) > 4:
        names += ", ..."
    summary = f"{source}: {len(items)} pictures; captions {captions}; {len(found)} classes"
    summary += " by .cls files" if numbered else ""
    summary += f" ({names})" if len(classes) > 1 else ""
    lost = ", ".join(f"{n} {what}" for what, n in sorted(passed_over.items()) if n)
    if lost:
        summary += f"; passed over: {lost}"
    return Listing(items, classes, summary)

def listing_digest(items):
    """16 hex digits of what a listing holds: names, places, captions, classes,
    sizes and times of the files.
    A cache made of other pictures or captions has another digest, whatever the folder is called."""
    digest = hashlib.sha256()
    times = {}
    for item in items:
        for place in (item.place, item.caption):
            if isinstance(place, Place) and place.path not in times and place.path.exists():
                status = place.path.stat()
                times[place.path] = status.st_size, status.st_mtime_ns
        caption = item.caption
        if isinstance(caption, Place):
            caption = caption.offset, caption.length, times.get(caption.path)
        place = item.place.offset, item.place.length, times.get(item.place.path)
        digest.update(repr((item.name, place, caption, item.label)).encode())
    return digest.hexdigest()[:16]

def adm_crop(image, size, at=(0.5, 0.5)):
    """PIL image -> size x size, or size = (height, width): halve it (BOX) while it is twice too large,
    resize it (BICUBIC) until it just covers that, crop.
    at: place of the crop in [0, 1] per axis; (0.5, 0.5) is ADM's centre crop
    (Dhariwal and Nichol 2021).
    Raises: InputError for a picture narrower than 1:50, which would have to grow to gigabytes."""
    short = min(image.size)
    long = max(image.size)
    if long > 50 * short:
        raise InputError(f"{image.width}x{image.height} pixels: narrower than 1:50")
    if long > 4 * short:                        # of a strip only what the crop can see is enlarged
        box = [min(n, 4 * short) for n in image.size]
        left, top = (int((n - b) * a) for n, b, a in zip(image.size, box, at))
        image = image.crop((left, top, left + box[0], top + box[1]))
    height, width = (size, size) if isinstance(size, int) else size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    ratio = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.BICUBIC)
    left, top = (int((n - m) * a) for n, m, a in zip(image.size, (width, height), at))
    return image.crop((left, top, left + width, top + height))

def bucket_sizes(size, multiple):
    """(height, width) of about size x size pixels, multiples of `multiple`, from 1:2 to 2:1,
    square among them, in the order of their ratios."""
    sizes = set()
    for short in range(multiple, size + 1, multiple):
        long = multiple * round(size * size / short / multiple)
        if long <= 2 * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda sides: sides[1] / sides[0])

def read_sides(place):
    """(height, width) of a picture, upright, from its header. Raises: InputError if it has none."""
    try:
        with open(place.path, "rb") as file:
            if place.length >= 0:
                file.seek(place.offset)
                file = io.BytesIO(file.read(place.length))
            with Image.open(file) as image:
                turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
                width, height = image.size
                if image.format == "TIFF":      # its `size` is upright in newer versions of Pillow
                    width = image.tag_v2[256]
                    height = image.tag_v2[257]
                return (width, height) if turned else (height, width)
    except Exception as e:          # as in read_image, an image decoder may raise anything
        raise InputError(f"{place.path}: not a readable image ({str(e)[:100]})") from None

class SmallPicture(ValueError):
    """A picture smaller than the crop, where such are dropped."""

class ImageDataset:
    """Pictures with captions and classes from disk; see list_images for what is read and how.
    Position p is item p % N of epoch p // N, each epoch in its own order (shuffle);
    crop ("random" or "adm"; size None: none) and flip depend on (seed, p) alone.
    split: "val" is every 50th item, "train" the others, or "all".
    An unreadable file is replaced by the next and named in `broken`; see check_broken.
    listing: another split's, so that the folder is read once.
    drop_small: take the next picture for one smaller than `size`, instead of enlarging it."""
    def __init__(self, source, size, split="train", crop="random", flip=True, seed=0, shuffle=True,
                 listing=None, drop_small=False):
        self.listing = listing or list_images(source)   # another split's, or read from disk
        self.items = self.listing.items.split(split)
        self.classes = self.listing.classes
        self.summary = self.listing.summary
        self.listed = len(self.listing.items)           # before the split: shares are of the whole
        self.source = source
        self.size = size
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self.shuffle = shuffle
        self.drop_small = drop_small
        self.broken = {}                                # name: why it could not be read
        self.notes = set()                              # of ("small" or "damaged_profiles", name)
        self.epoch = None
        self.order = range(len(self.items))

    def __len__(self):
        return len(self.items)

    def read(self, item, rng):
        """Item -> (3, size, size) in [-1, 1], caption, class.
        Raises: InputError if it cannot be read."""
        notes = set()
        try:
            image = read_image(io.BytesIO(item.place.read()), item.name, notes)
            caption = item.caption
            if isinstance(caption, Place):
                caption = decode_text(caption.read(), f"the caption of {item.name}").strip()
        except OSError as e:
            raise InputError(f"{item.name}: it or its caption cannot be read ({e})") from None
        at = rng.random(2) if self.crop == "random" else (0.5, 0.5)
        if self.size:
            height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
            if image.width < width or image.height < height:
                notes.add("small")
            try:
                image = adm_crop(image, self.size, at)
            except InputError as e:
                raise InputError(f"{item.name}: {e}") from None
        self.notes.update((note, item.name) for note in notes)
        if self.drop_small and "small" in notes:
            raise SmallPicture(f"{item.name}: {image.width}x{image.height} pixels")
        x = to_tensor(image)                                                # (3, size, size)
        if self.flip and rng.random() < 0.5:
            x = x.flip(2)
        return x, caption, item.label

    def item_at(self, position):
        """Index of the item that stands at a position of the endless sequence of epochs."""
        epoch, i = divmod(position, len(self.items))
        if self.shuffle and self.epoch != epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
            self.epoch = epoch
        return self.order[i]

    def check_broken(self):
        """Raises: InputError when more than 1% of the whole data set cannot be read. Of 20 pictures or
        more, one may always be unreadable."""
        allowed = max(self.listed / 100, 1 if self.listed >= 20 else 0)
        if len(self.broken) > allowed:
            bad = f"{len(self.broken)} of {self.listed} files cannot be read"
            raise InputError(f"{self.source}: {bad}, above 1%; the last:"
                             f" {list(self.broken.values())[-1]}")

    def sample(self, positions):
        """-> images (B, 3, size, size) in [-1, 1], captions (list of B), classes (B,)
        Raises: InputError if 16 files in a row, or too many of all, cannot be read,
        or if sizes differ."""
        rows = []
        for position in map(int, positions):
            rng_seed = [self.seed, position, 1]
            first = position - position % len(self.items)                   # of this epoch
            failed = 0
            for k in range(len(self.items)):
                item = self.items[self.item_at(first + (position + k) % len(self.items))]
                try:
                    rows.append(self.read(item, np.random.default_rng(rng_seed)))
                    break
                except SmallPicture:
                    continue
                except InputError as e:
                    self.broken[item.name] = str(e)
                    self.check_broken()
                    failed += 1
                    if failed == 16:
                        raise InputError(f"{self.source}: 16 files in a row cannot be read; the"
                                         f" last: {e}") from None
            else:
                raise InputError(f"{self.source}: no picture is left; {len(self.notes)} are smaller"
                                 f" than {self.size} pixels, {len(self.broken)} unreadable")
        images, captions, classes = zip(*rows)
        if len({image.shape for image in images}) > 1:
            raise InputError(f"{self.source}: pictures of several sizes; give --size to crop them"
                             " alike")
        return torch.stack(images), list(captions), torch.tensor(classes)

# ------------------------------------------------------------ commands: faults, flags, devices
class InputError(ValueError):
    """Bad input, in one line: what is wrong, what was expected, what to do.
    Commands exit with code 2."""

class Parser(argparse.ArgumentParser):
    """argparse, but a bad argument costs one line instead of a page, and an abbreviated flag is
    refused, not guessed."""
    def __init__(self, doc, **more):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **more)

    def parse_args(self, *argv):
        """argparse's, but two values are refused, except as --negative. An empty one, as --data "$DATA"
        gives where DATA is not set, would be taken for no flag at all. And the ~ of --out=~/x, which
        shells leave as it is, would be the name of a new folder."""
        args = super().parse_args(*argv)
        for name, value in vars(args).items():
            flag = f"--{name.replace('_', '-')}"
            if name == "negative" or not isinstance(value, (str, Path)):
                continue
            if not str(value):
                self.error(f"{flag} is empty; give its value, or no such flag")
            if re.match(r"~([/\\]|$)", str(value)):
                self.error(f"{flag}={value}: no shell has put your home folder in the place of ~;"
                           f" write {flag} {value}, or the whole path")
        return args

    def error(self, message):
        if "fp16" in message:
            message += "; float16 overflows, in T5 and in training"
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

def number(kind, least=-math.inf, most=math.inf, below=math.inf):
    """A `type` for add_argument: text -> int or float in [least, most], and smaller than
    `below`."""
    def parse(text):
        value = kind(text)
        if not (least <= value <= most and value < below):
            upper = ""
            if below < math.inf:
                upper = f" and below {below:g}"
            elif most < math.inf:
                upper = f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text}, expected at least {least:g}{upper}")
        return value
    parse.__name__ = kind.__name__              # argparse: "invalid int value: 'x'"
    return parse

def folder_path(text):
    """A `type` for add_argument: a folder that is there, or can be made -> Path"""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, expected a folder")
    return Path(text)

positive_int = number(int, least=1, below=2**31)
count_or_0 = number(int, least=0, below=2**31)          # where 0 means none
seed_int = number(int, least=0, most=2**63 - 1)
non_negative = number(float, least=0, below=2**31)
positive = number(float, least=1e-12, below=2**31)
share = number(float, least=0, below=1)                 # a probability or a decay, never the whole
time_in_flow = number(float, least=0, most=1)           # a point or interval end of the flow's t

def run(main, args):
    """Run a command's main(args): InputError and exhausted memory become one line and exit code
    2. What the terminal cannot show, such as names in another script, is printed escaped."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with attention_order(getattr(args, "attention", "auto")):
            return main(args)
    except InputError as e:         # a worker process of a DataLoader sends its traceback along
        fault = f"error: {str(e).splitlines()[-1].removeprefix('vae_expand.InputError: ')}"
        code = 2
    except OSError as e:                                    # a full disk, a folder that is a file
        fault = f"error: {e}"
        code = 2
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate memory", str(e)):
            raise
        advice = "less --batch, --accumulate, --offload, --tile"
        fault = f"error: out of memory ({e!s:.60}): {advice}"
        code = 2
    except KeyboardInterrupt:
        fault = "interrupted"
        code = 130
    print(fault.replace("\n", " "), file=sys.stderr)
    if torch.distributed.is_initialized():
        leave_at_once(code)
    sys.exit(code)

def leave_at_once(code):
    """End a failed rank without waiting for the others, which may wait for it;
    torchrun ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def pick_device(name="auto"):
    """'auto' -> cuda, else mps, else cpu; any other name is checked by a number that goes there and
    comes back. Raises: InputError if that fails."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0][:80]
        raise InputError(f"--device {name}: not usable here ({why}); use auto or cpu") from None
    return name

def device_type(device):
    """"cuda" for "cuda:1" too."""
    return torch.device(device).type

def is_tiny(model):
    """Whether a --model is the embedded one, however its path is written."""
    return Path(model).resolve() == Path(TINY_MODEL).resolve()

ATTENTION = {       # --attention: torch's kernel, which comes first of those that can serve a call
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}

def add_attention_flag(p):
    """--attention, on a Parser or a group of its flags."""
    p.add_argument("--attention", choices=["auto", *ATTENTION], default="auto",
                   help="Which of torch's attention kernels comes first (default auto: torch's own"
                        " choice, which on Hopper changes with its version).")

def attention_order(name="auto"):
    """A context in which the kernel of that name is asked first and the others follow,
    where it cannot serve; "math" is asked alone. "auto": torch's own order."""
    if name == "auto":
        return nullcontext()
    if name == "math":
        return sdpa_kernel([SDPBackend.MATH])
    first = ATTENTION[name]
    return sdpa_kernel([first, *(kernel for kernel in ATTENTION.values() if kernel != first)],
                       set_priority=True)

def pick_dtype(name, device, autocast=False):
    """'bf16' or 'fp32'; 'auto' -> bf16 on a GPU that has it (under autocast: or a CPU),
    else float32."""
    bf16 = device_type(device) == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if autocast and device_type(device) == "cpu" and torch.backends.mkldnn.is_available():
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if name == "bf16" or name == "auto" and bf16 else torch.float32

def peak_memory(device):
    """Most memory held so far, in GB: of the GPU's tensors, or of the whole process
    (0 if unknown)."""
    if device_type(device) == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return 0
    # which Windows lacks; macOS counts bytes, Linux KiB
    from resource import RUSAGE_SELF, getrusage
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

def check_size(size, multiple):
    """Raises: InputError unless (height, width) are multiples of `multiple`, naming the nearest
    that are."""
    if any(n < 1 or n % multiple for n in size):
        near = [max(multiple, round(n / multiple) * multiple) for n in size]
        size, near = (f"{width}x{height}" for height, width in (size, near))
        raise InputError(f"size {size}: width and height are multiples of {multiple}; the nearest"
                         f" is {near}")

# ------------------------------------------------------------ the command
def parse_args(argv=None):
    """The command's arguments."""
    p = Parser(__doc__)
    p.add_argument("--model", default=TINY_MODEL,
                   help=f"File, folder or hub id, such as {SD35_MEDIUM} (default: the embedded"
                        " model).")
    p.add_argument("--davae", metavar="FILE",
                   help="Show this trained DA-VAE instead of making a new one.")
    p.add_argument("--detail-channels", type=positive_int,
                   help="D, a multiple of the base's C channels (default C).")
    p.add_argument("--scale", type=positive_int,
                   help="s, how many times the base resolution (default 2).")
    p.add_argument("--start", "--decoder-start", choices=["exact", "residual"],
                   help="How the joint decoder begins, see DetailUp (default exact).")
    p.add_argument("--image", default=str(Path(TINY_MODEL).parent / "example.png"),
                   help="The picture to encode (default: one of the embedded world).")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto).")
    p.add_argument("--out", type=folder_path, default=Path("runs/expand"),
                   help="Folder of the results (default runs/expand).")
    args = p.parse_args(argv)
    new = {"--detail-channels": args.detail_channels, "--scale": args.scale, "--start": args.start}
    given = [flag for flag, value in new.items() if value is not None]
    if args.davae and given:
        p.error(f"--davae is a trained DA-VAE, {given[0]} is of a new one: give one of them")
    args.scale = args.scale or 2
    args.start = args.start or "exact"
    return args

def main(args):
    vae = load_vae(args.model, device=pick_device(args.device))
    davae = (load_davae(args.davae, vae) if args.davae
             else DAVAE(vae, args.detail_channels, args.scale, args.start).eval())
    x = to_tensor(read_image(args.image))
    height, width = (n // davae.f * davae.f for n in x.shape[-2:])
    x = x[None, :, :height, :width].to(davae.detail_mean.device)            # (1, 3, sH, sW)
    with torch.no_grad():
        z, z_d = davae.encode(x).split([davae.C, davae.D], dim=1)
        x_hat = davae.decode(torch.cat([z, z_d], dim=1))
    patch = 1 if vae.C == 32 else 2                                     # VA-VAE's DiT, all others'
    print(f"{'':18} {'image':>10} {'latent':>9} {'channels':>9} {'tokens':>9}   (patch {patch})")
    rows = [("stock, base size", davae.s, vae.f, vae.C), ("stock, full size", 1, vae.f, vae.C),
            ("DA-VAE, full size", 1, davae.f, davae.C + davae.D)]
    for name, s, f, channels in rows:
        image, latent, tokens = (f"{width // n}x{height // n}" for n in (s, s * f, s * f * patch))
        print(f"{name:18} {image:>10} {latent:>9} {channels:>9} {tokens:>9}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.davae:
        save_davae(args.out / "davae.safetensors", davae)
        print(f"{args.out / 'davae.safetensors'}: E_d, joint decoder, untrained; next: python"
              " align.py")
    heads = ["image", "base copy", "z (PCA)", "z_d (PCA)", "decoded"]
    images = [x[0], downsample(x, davae.s)[0], *pca_images(z[0], davae.denormalise_detail(z_d)[0]),
              x_hat[0]]
    save_overview(args.out / "latents.png", grid(images, columns=5, heads=heads, least=256))
    print(f"{args.out / 'latents.png'}: {', '.join(heads)}")

if __name__ == "__main__":
    run(main, parse_args())
