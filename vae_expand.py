"""Chapter 1 - weights, images, and the latent itself.

This file finds pretrained weights (a file, a folder, a hub id), reads them strictly, and holds the
autoencoder that latent diffusion models share (LDM layout: SD3.5's VAE, VA-VAE, SD-VAE), whose first
C channels DA-VAE keeps untouched.

    from vae_expand import load_vae
    vae = load_vae("assets/tiny")                                   # the embedded model
    vae = load_vae("stabilityai/stable-diffusion-3.5-medium")       # the real one, licence and token needed

References: Rombach et al. 2022 (LDM, the encoder and decoder); Esser et al. 2024 (SD3, 16 channels);
Yao et al. 2025 (VA-VAE); "DA-VAE: Plug-in Latent Compression for Diffusion via Detail Alignment", CVPR 2026.
"""
import argparse
import json
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import nn

try:
    import resource
except ImportError:             # Windows
    resource = None

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
TINY = str(Path(__file__).resolve().parent / "assets" / "tiny")    # the embedded model, laid out as the hub's

# ------------------------------------------------------------ faults and commands


class InputError(ValueError):
    """Bad input, in one line: what is wrong, what was expected, what to do. Commands exit with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a bad argument costs one line instead of the whole usage."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def run(main, args):
    """Run a command's main(args): InputError and exhausted memory become one line and exit code 2."""
    try:
        main(args)
    except InputError as e:
        fault, code = f"error: {e}", 2
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):  # the CPU allocator has no class
            raise
        fault, code = (f"error: out of memory ({str(e).splitlines()[0][:100]}); try --offload (one network at"
                       " a time), --tile 64 (decode in tiles), a smaller --batch or --size"), 2
    except KeyboardInterrupt:
        fault, code = "interrupted", 130
    else:
        return
    print(fault, file=sys.stderr)
    sys.exit(code)


def pick_device(name="auto"):
    """'auto' -> cuda, else mps, else cpu; any other name is checked by making a tensor there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0][:80]
        raise InputError(f"--device {name}: not usable here ({why}); use auto or cpu") from None
    return name


def pick_dtype(name, device):
    """'bf16' or 'fp32'; 'auto' -> bf16 on a GPU that has it, else float32."""
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bf16" or name == "auto" and bf16 else torch.float32


def peak_memory(device):
    """Most memory held so far, in GB: of the GPU's tensors, or of the whole process (0 if unknown)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024                       # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_size(size, multiple):
    """(height, width) must both be positive multiples of `multiple`; InputError names the nearest that is."""
    if any(n < 1 or n % multiple for n in size):
        near = [max(multiple, round(n / multiple) * multiple) for n in size]
        raise InputError(f"size {size[1]}x{size[0]} (width x height): both must be multiples of {multiple};"
                         f" the nearest is {near[1]}x{near[0]}")


# ------------------------------------------------------------ weights: find, read, load strictly

# part -> (prefix in the original single file, a key that only this network has, file names of its own)
PARTS = {
    "dit": ("model.diffusion_model.", ("x_embedder.proj.weight", "pos_embed.proj.weight"),
            ["transformer/diffusion_pytorch_model.safetensors"]),
    "vae": ("first_stage_model.", ("decoder.conv_in.weight",), ["vae/diffusion_pytorch_model.safetensors"]),
    "clip_l": ("", (), ["text_encoders/clip_l.safetensors", "text_encoder/model.safetensors"]),
    "clip_g": ("", (), ["text_encoders/clip_g.safetensors", "text_encoder_2/model.safetensors"]),
    "t5": ("", (), ["text_encoders/t5xxl_fp16.safetensors", "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
                    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors", "text_encoder_3/model.safetensors"]),
}


def local_folder(source, pattern):
    """Folder where the files of `source` that match `pattern` lie: itself, or the hub's cache, once fetched.

    Errors: InputError for what is neither a folder nor a repository, for a gated one, for an unreachable hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise InputError(f"{source} is a file; expected a folder or hub id laid out as {SD35_MEDIUM}")
    # half-precision copies and all-in-one files would only cost gigabytes; a bare *.x means the top level
    skip = ["*.fp16*", "*incl_clips*"] + (["*/*"] if "/" not in pattern else [])
    page, fetch = f"https://huggingface.co/{source}", f"`hf download {source}`"
    try:
        return Path(snapshot_download(str(source), allow_patterns=[pattern], ignore_patterns=skip))
    except GatedRepoError:
        what = f"the repository is gated; accept its licence at {page}, set HF_TOKEN, then {fetch}"
    except HFValidationError:
        what = "no such file or folder, and not a hub id of the form owner/name; check the path"
    except RepositoryNotFoundError:
        what = f"no such file or folder, and no such repository on the hub (a private one needs HF_TOKEN)"
    except (HfHubHTTPError, OSError) as e:                          # OSError: no connection, nor in the cache
        what = (f"no such file or folder, not in the hub's cache, and the hub cannot be reached"
                f" ({type(e).__name__}); with a network: accept the licence at {page}, then {fetch}")
    raise InputError(f"{source}: {what}")


def find_file(source, *names):
    """Path of the first of the relative `names` that the folder or hub repository holds, fetched if need be.

    Errors: InputError that lists what was looked for and what was found.
    """
    for name in names:
        path = local_folder(source, name) / name
        if path.is_file():
            return path
    root = local_folder(source, names[0])
    held = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    found = ", ".join(held[:6]) + (f" and {len(held) - 6} more" if len(held) > 6 else "") or "nothing"
    raise InputError(f"{source}: looked for {', '.join(names)}; found {found};"
                     f" expected the layout of {SD35_MEDIUM}")


def find_weights(source, part):
    """Files that hold `part` ("dit", "vae", "clip_l", "clip_g", "t5") of `source`, original layout preferred.

    `source`: a weights file, a folder laid out as the hub's repository, or a hub id.
    Errors: InputError if nothing there holds the part, or several top-level files do.
    """
    if Path(source).is_file():
        return [Path(source)]
    prefix, marks, names = PARTS[part]
    if marks:
        top = sorted(local_folder(source, "*.safetensors").glob("*.safetensors"))
        some = [p for p in top if any(k.startswith(prefix) or k in marks for k in _open(p).keys())]
        if len(some) > 1:
            raise InputError(f"{source}: {len(some)} files hold the {part}: {', '.join(p.name for p in some)}"
                             "; give the path of one")
        if some:
            return some
    for name in names:
        folder = Path(name).parent
        original = str(folder) == "text_encoders"
        root = local_folder(source, name if original else f"{folder}/*")
        index = root / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [find_file(source, f"{folder}/{shard}") for shard in shards]
        if (root / name).is_file():
            return [root / name]
    wanted = [f"*.safetensors with {prefix}* keys", *names] if prefix else names
    return [find_file(source, *wanted)]                                     # not there: says what is


def _open(path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); fetch it again") from None


def read_file(path, prefix=""):
    """dict of the tensors in a .safetensors or weights-only torch file, memory-mapped.

    If any key starts with `prefix`, only those are read, and the prefix is dropped.
    Errors: InputError for a truncated file, and for a pickle that holds more than tensors (it is never run).
    """
    if Path(path).suffix == ".safetensors":
        file = _open(path)
        keys = {k: k for k in file.keys()}
        read = file.get_tensor
    else:
        try:
            keys = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as e:
            why = str(e).splitlines()[0][:90]
            raise InputError(f"{path}: torch.load(weights_only=True) refuses it ({why}); expected a dict of"
                             " tensors") from None
        keys = keys.get("state_dict", keys)
        read = keys.get
    wanted = [k for k in keys if prefix and k.startswith(prefix)] or keys
    return {k.removeprefix(prefix): read(k) for k in wanted}


def read_weights(source, part):
    """dict of the tensors of `part`, under the file's own key names without prefix; see find_weights."""
    return {k: v for path in find_weights(source, part) for k, v in read_file(path, PARTS[part][0]).items()}


def read_config(source, part):
    """The config.json beside the weights of `part` (diffusers layout), or {}: for what no shape tells."""
    path = find_weights(source, part)[0].parent / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def load_strict(module, state, what, dtype=torch.float32, device="cpu"):
    """Put `state` into `module` (built on the meta device): cast, moved, frozen, in eval mode.

    Errors: InputError naming the keys that are missing, unknown or misshapen. There is no lenient mode.
    """
    want = module.state_dict()
    wrong = ([f"missing {k}" for k in want if k not in state]
             + [f"unknown {k}" for k in state if k not in want]
             + [f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}" for k, v in want.items()
                if k in state and state[k].shape != v.shape])
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(f"{what}: not the weights expected here: {'; '.join(wrong[:4])}{more}")
    # copy=True: a tensor that needs no cast would otherwise stay a view of the file
    module.load_state_dict({k: v.to(device, dtype, copy=True) for k, v in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


# ------------------------------------------------------------ the LDM autoencoder


@dataclass(frozen=True)
class VAEArch:
    """What the state dict's shapes say. Defaults: SD3.5's VAE. The middle attention is always there."""
    z_channels: int = 16
    widths: tuple = (128, 256, 512, 512)    # channels a level; f = 2 ** (levels - 1)
    blocks: int = 2                         # residual blocks a level in the encoder; the decoder has one more
    in_channels: int = 3
    quant: bool = False                     # 1x1 convolutions around the latent (VA-VAE, SD-VAE)
    attention: tuple = ()                   # levels with attention after each block (VA-VAE: the deepest)
    groups: int = 32                        # of every GroupNorm; no shape tells it, config.json may

    @staticmethod
    def read(state, groups=32):
        """Architecture of an LDM-layout state dict."""
        if "decoder.conv_in.weight" not in state or "encoder.down.0.block.0.conv1.weight" not in state:
            some = ", ".join(sorted(state)[:3])
            raise InputError(f"not an LDM autoencoder: its keys are {some} ...; expected encoder.down.*"
                             " and decoder.conv_in.*")

        def count(pattern):
            return sum(bool(re.fullmatch(pattern, k)) for k in state)

        levels = range(count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight"))
        return VAEArch(
            z_channels=state["decoder.conv_in.weight"].shape[1],
            widths=tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels),
            blocks=count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
            in_channels=state["encoder.conv_in.weight"].shape[1],
            quant="quant_conv.weight" in state,
            attention=tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
            groups=groups)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). (B, c_in, h, w) -> (B, c, h, w), x then by a 1x1."""

    def __init__(self, c_in, c, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        if c_in != c:
            self.nin_shortcut = nn.Conv2d(c_in, c, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + attention over all h*w positions, one head of width c. (B, c, h, w) -> the same"""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                         # (B, 1, h*w, c)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Mid(nn.Module):
    """The deepest level: residual block, attention, residual block."""

    def __init__(self, c, groups):
        super().__init__()
        self.block_1 = ResBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Stride-2 convolution, padded right and bottom only, as LDM does. (B, c, h, w) -> (B, c, h/2, w/2)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, c, h, w) -> (B, c, 2h, 2w)"""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each with attention after it if the level has it, then resampling."""

    def __init__(self, c_in, c, blocks, attention, groups, **resample):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c, c, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c, groups) for _ in range(blocks if attention else 0))
        for name, module in resample.items():                               # "downsample" or "upsample"
            setattr(self, name, module)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        x = self.downsample(x) if hasattr(self, "downsample") else x
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2 C, H/f, W/f): mean and log-variance, before quant_conv."""

    def __init__(self, a):
        super().__init__()
        w, last = a.widths, len(a.widths) - 1
        self.conv_in = nn.Conv2d(a.in_channels, w[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(w[max(i - 1, 0)], w[i], a.blocks, i in a.attention, a.groups,
                  **({"downsample": Downsample(w[i])} if i < last else {})) for i in range(len(w)))
        self.mid = Mid(w[-1], a.groups)
        self.norm_out = nn.GroupNorm(a.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * a.z_channels, 3, padding=1)

    def trunk(self, x):
        """All but conv_out: the features E_d starts from. (B, 3, H, W) -> (B, c, H/f, W/f)"""
        h = self.conv_in(x)                                                 # (B, c0, H, W)
        for level in self.down:
            h = level(h)                                                    # (B, c, H/f, W/f) in the end
        return F.silu(self.norm_out(self.mid(h)))

    def forward(self, x):
        return self.conv_out(self.trunk(x))                                 # (B, 2 C, H/f, W/f)


class Decoder(nn.Module):
    """(B, C, H/f, W/f) -> (B, 3, H, W)"""

    def __init__(self, a):
        super().__init__()
        w, last = a.widths, len(a.widths) - 1
        self.conv_in = nn.Conv2d(a.z_channels, w[-1], 3, padding=1)
        self.mid = Mid(w[-1], a.groups)
        self.up = nn.ModuleList(                                            # up.0 is the finest and runs last
            Level(w[min(i + 1, last)], w[i], a.blocks + 1, i in a.attention, a.groups,
                  **({"upsample": Upsample(w[i])} if i > 0 else {})) for i in range(len(w)))
        self.norm_out = nn.GroupNorm(a.groups, w[0], eps=1e-6)
        self.conv_out = nn.Conv2d(w[0], a.in_channels, 3, padding=1)

    def body(self, h):
        """All but conv_in: what the joint decoder of DA-VAE keeps. (B, c, H/f, W/f) -> (B, 3, H, W)"""
        h = self.mid(h)
        for level in reversed(self.up):
            h = level(h)                                                    # (B, c0, H, W) in the end
        return self.conv_out(F.silu(self.norm_out(h)))

    def forward(self, z):
        return self.body(self.conv_in(z))                                   # (B, 3, H, W)


class VAE(nn.Module):
    """The pretrained autoencoder E, Dec of Eq. (1), with the normalisation its DiT was trained on.

    encode: images (B, 3, H, W) in [-1, 1] -> z = (mean - shift) * scale (B, C, H/f, W/f); decode inverts it.
    """

    def __init__(self, arch=VAEArch(), shift=0.0609, scale=1.5305):
        super().__init__()
        self.arch, self.shift, self.scale = arch, shift, scale
        self.C, self.f = arch.z_channels, 2 ** (len(arch.widths) - 1)
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        if arch.quant:
            self.quant_conv = nn.Conv2d(2 * self.C, 2 * self.C, 1)
            self.post_quant_conv = nn.Conv2d(self.C, self.C, 1)

    def posterior(self, x):
        """(B, 3, H, W) -> mean, log-variance, each (B, C, H/f, W/f), not normalised."""
        h = self.encoder(x.to(self.encoder.conv_in.weight.dtype))
        h = self.quant_conv(h) if self.arch.quant else h
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                                  # exp stays finite

    def encode(self, x, sample=False):
        """(B, 3, H, W) -> (B, C, H/f, W/f): the posterior's mean, or a sample of it, normalised."""
        check_size(x.shape[-2:], self.f)
        mean, logvar = self.posterior(x)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if sample else mean
        return (z - self.shift) * self.scale

    def decode(self, z):
        """(B, C, H/f, W/f), normalised -> (B, 3, H, W), about [-1, 1], not clamped."""
        z = z.to(self.decoder.conv_in.weight.dtype) / self.scale + self.shift
        return self.decoder(self.post_quant_conv(z) if self.arch.quant else z)


def ldm_names(state):
    """A VAE state dict in diffusers' names -> LDM's (which pass through). Linear q, k, v become 1x1 convs."""
    if not any("down_blocks" in k for k in state):
        # VA-VAE's training wrapper carries its losses and alignment networks along
        extra = ("loss", "foundation_model", "linear_proj")
        return {k: v for k, v in state.items() if not k.startswith(extra)}
    last = max(int(m[1]) for m in map(re.compile(r"decoder\.up_blocks\.(\d+)").match, state) if m)
    kinds = {"resnets": "block", "attentions": "attn", "downsamplers.0": "downsample",
             "upsamplers.0": "upsample"}
    rest = [("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
            ("conv_shortcut", "nin_shortcut"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
            ("to_out.0", "proj_out"), ("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")]

    def level(m):
        # diffusers counts the decoder's levels in running order, LDM by resolution
        return f"{m[1]}.{last - int(m[2]) if m[1] == 'up' else m[2]}.{kinds[m[3]]}"

    out = {}
    for k, v in state.items():
        k = re.sub(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers\.0|upsamplers\.0)", level, k)
        for old, new in rest:
            k = k.replace(old, new)
        out[k] = v[:, :, None, None] if re.search(r"\.(q|k|v|proj_out)\.weight$", k) and v.ndim == 2 else v
    return out


def load_vae(source=SD35_MEDIUM, dtype=torch.float32, device="cpu"):
    """Strictly load SD3.5's, VA-VAE's or SD-VAE's autoencoder, in either layout -> VAE, frozen.

    Normalisation: shift_factor and scaling_factor of config.json where there is one; else what the latent's
    shape implies: 16 channels SD3.5's (0.0609, 1.5305), 4 SD-VAE's (0, 0.18215), others VA-VAE's (0, 1).
    """
    state, config = ldm_names(read_weights(source, "vae")), read_config(source, "vae")
    arch = VAEArch.read(state, config.get("norm_num_groups", 32))
    shift, scale = {16: (0.0609, 1.5305), 4: (0.0, 0.18215)}.get(arch.z_channels, (0.0, 1.0))
    if "scaling_factor" in config:
        shift, scale = config.get("shift_factor") or 0.0, config["scaling_factor"]
    with torch.device("meta"):
        vae = VAE(arch, shift, scale)
    return load_strict(vae, state, source, dtype, device)


def decode_tiled(vae, z, tile=64, overlap=16):
    """vae.decode in overlapping square tiles of `tile` latent positions, cross-faded over `overlap` of them.

    Peak memory is one tile's. Statistics of normalisation and attention are each tile's own, so the result is
    close to vae.decode(z), not equal to it. (B, C', h, w) -> (B, 3, h f, w f)
    """
    if not 0 < overlap < tile:
        raise InputError(f"tile {tile}, overlap {overlap}: expected 0 < overlap < tile")
    h, w = z.shape[-2:]
    # the last tile is moved back to end at the border, so that all tiles have one shape
    rows, cols = ([*range(0, max(n - tile, 0), tile - overlap), max(n - tile, 0)] for n in (h, w))
    out = weight = 0
    for y in rows:
        for x in cols:
            part = vae.decode(z[..., y:y + tile, x:x + tile]).float()
            f = part.shape[-1] // min(tile, w)
            if isinstance(out, int):
                out, weight = (part.new_zeros(z.shape[0], c, h * f, w * f) for c in (3, 1))
            # a tent that is flat in the middle and falls towards the tile's edges
            ty, tx = (torch.arange(1, n + 1, device=z.device).minimum(torch.arange(n, 0, -1, device=z.device))
                      .clamp(max=overlap * f).float() for n in part.shape[-2:])
            tent = ty[:, None] * tx[None, :]                                # (tile f, tile f)
            at = (..., slice(y * f, y * f + part.shape[-2]), slice(x * f, x * f + part.shape[-1]))
            out[at] += part * tent
            weight[at] += tent
    return out / weight


# ------------------------------------------------------------ images


def downsample(x, s):
    """I from I_hr: bicubic with antialiasing. (B, 3, sH, sW) -> (B, 3, H, W)"""
    return F.interpolate(x.float(), scale_factor=1 / s, mode="bicubic", antialias=True)


def read_image(path):
    """Any image file -> PIL RGB, upright: EXIF rotation done, alpha on white, 16-bit and palette converted.

    Errors: InputError for what is no whole image, or so large that it looks like a decompression bomb.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):                                      # 16-bit grey, which Pillow clips
            grey = np.asarray(image).astype(np.float64) / 257
            image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise InputError(f"{path}: not a readable image ({str(e)[:100]})") from None


def to_tensor(image):
    """PIL RGB -> (3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x):
    """(3, H, W) in [-1, 1], clamped and rounded -> PIL RGB"""
    x = (x.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(x.round().byte().permute(1, 2, 0).cpu().numpy())


def save_png(path, image, **text):
    """Write a PIL image or a (3, H, W) tensor as PNG, with `text` (prompt, seed, ...) in its text chunks."""
    image = image if isinstance(image, Image.Image) else to_image(image)
    info = PngImagePlugin.PngInfo()
    for k, v in text.items():
        info.add_itxt(k, str(v))
    image.save(path, pnginfo=info)


def grid(images, columns, rows=None, heads=None, gap=4, least=128):
    """Images (N, 3, H, W) or a list of (3, H, W), in rows of `columns` -> one PIL image.

    Smaller images are enlarged (nearest) to the largest one's size, or to `least` pixels; `heads` label the
    columns, `rows` the rows.
    """
    tiles = [to_image(x) for x in images]
    side = max(max(t.width for t in tiles), least), max(max(t.height for t in tiles), least)
    tiles = [t.resize(side, Image.NEAREST) for t in tiles]
    left, top = (max((len(r) for r in rows), default=0) * 6 + 8 if rows else 0), (16 if heads else 0)
    n = -(-len(tiles) // columns)
    out = Image.new("RGB", (left + columns * (side[0] + gap), top + n * (side[1] + gap)), "white")
    draw = ImageDraw.Draw(out)
    for i, t in enumerate(tiles):
        out.paste(t, (left + i % columns * (side[0] + gap), top + i // columns * (side[1] + gap)))
    for i, text in enumerate(heads or []):
        draw.text((left + i * (side[0] + gap) + 2, 2), text, fill="black")
    for i, text in enumerate(rows or []):
        draw.text((4, top + i * (side[1] + gap) + side[1] // 2 - 6), text, fill="black")
    return out
