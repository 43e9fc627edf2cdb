"""The procedural world of the embedded model: coloured shapes whose textures only a full-size image can show.

"a red circle with vertical stripes on a blue background": a shape, its colour, its texture, the colour behind it.
The textures lie in the null space of the down-sampling and are gone, to the last grey level, in a base-resolution
copy. A model that draws them had more than a base-resolution latent. The classifier reads all four attributes off
a picture, so that "texture accuracy" is a number.

    images, captions, labels = World(size=64, split="val").sample(range(8))
    load_classifier().accuracy(images, labels)          # shape, colour, texture, background: 1, 1, 1, 1

Reference: Steele et al. 2014 (SplitMix64, whose mixing makes every picture depend on its index alone).
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vae_expand import TINY_MODEL, check_size, downsample, find_file, load_strict, read_file

# ------------------------------------------------------------ what there is in the world
# RGB in [-1, 1], away from both ends: clamping colour + texture would leave a trace at the base size
COLOURS = {"red": (0.52, -0.50, -0.50), "orange": (0.52, 0.02, -0.52), "yellow": (0.52, 0.45, -0.45),
           "green": (-0.45, 0.35, -0.45), "cyan": (-0.50, 0.40, 0.50), "blue": (-0.50, -0.30, 0.52),
           "purple": (0.10, -0.50, 0.45), "pink": (0.52, 0.00, 0.30)}

def star(x, y, tip=1.25, valley=0.58):
    """Five-pointed: the line from valley to tip in a sector of 36 degrees, into which all ten fold."""
    sector = math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y), 2 * sector) - sector).abs()    # 0 at a valley, 36 at a tip
    r = torch.hypot(x, y)
    u, v = r * torch.cos(angle), r * torch.sin(angle)
    du, dv = tip * math.cos(sector) - valley, tip * math.sin(sector)
    return ((u - valley) * dv - v * du) / math.hypot(du, dv)

def circle(x, y):
    return torch.hypot(x, y) - 1

def square(x, y):
    return torch.maximum(x.abs(), y.abs()) - 0.88

def triangle(x, y):
    return torch.maximum(0.894 * x.abs() - 0.447 * (y + 1.1), y - 0.85)

def diamond(x, y):
    return (x.abs() + y.abs() - 1.25) / math.sqrt(2)

def cross(x, y):
    bars = torch.minimum(x.abs(), y.abs()) - 0.42
    ends = torch.maximum(x.abs(), y.abs()) - 1.1
    return torch.maximum(bars, ends)

# signed distance to the outline in units of the radius, negative inside; y points down
SHAPES = {"circle": circle, "square": square, "triangle": triangle, "diamond": diamond, "star": star, "cross": cross}

def horizontal_stripes(x, y):
    return 0.34 * torch.cos(y)

def vertical_stripes(x, y):
    return 0.34 * torch.cos(x)

def rising_stripes(x, y):
    return 0.34 * torch.cos(x + y)

def falling_stripes(x, y):
    return 0.34 * torch.cos(x - y)

def checks(x, y):
    return 0.38 * torch.cos(x) * torch.cos(y)

def tiles(x, y):
    return -0.20 * (torch.cos(x) + torch.cos(y))

# x and y are pixels times 2 pi / 3: the pitch is 3. A pitch that divides the VAE's stride of 4 would leave z flat
TEXTURES = {
    "horizontal stripes": horizontal_stripes, "vertical stripes": vertical_stripes,
    "rising stripes": rising_stripes, "falling stripes": falling_stripes, "checks": checks, "tiles": tiles}

# the names that the four labels count; the last is the background's colour
ATTRIBUTES = SHAPES, COLOURS, TEXTURES, COLOURS

# ------------------------------------------------------------ pictures
def uniform(indices, n, seed):
    """n numbers in [0, 1) for each index, from (seed, index, column) alone. (B,) -> (B, n) float32"""
    counter = np.asarray(indices).astype(np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64)
    with np.errstate(over="ignore"):                                # SplitMix64 works modulo 2 ** 64
        x = (counter + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float32)) / 2**24

class World:
    """Endless pictures with captions and labels, fixed by their index; size x size, the base size / scale.
    split: "train", "val" (a sixth of the 288 combinations; training has every pair of values) or "all"."""
    def __init__(self, size=64, scale=2, split="train", seed=0):
        check_size((size, size), scale)
        self.size, self.scale, self.seed = size, scale, seed
        self.broken, self.notes = {}, set()                     # of its files: it has none
        combos = torch.cartesian_prod(*(torch.arange(len(names)) for names in ATTRIBUTES[:3]))
        held = combos.sum(1) % len(TEXTURES) == 0
        combos = combos[{"train": ~held, "val": held, "all": torch.ones_like(held)}[split]]
        self.combos = combos[torch.randperm(len(combos), generator=torch.Generator().manual_seed(0))]
        phase = (torch.arange(size) * (2 * math.pi / 3)).expand(size, size)
        self.textures = torch.stack([draw(phase, phase.T) for draw in TEXTURES.values()])   # (6, size, size)
        self.centred = (torch.arange(size) + 0.5) / size - 0.5
        # Down-sampling is a matrix along each axis, (size / s, size); pinv(down) @ down projects on what it keeps.
        down = downsample(torch.eye(size)[:, None, :, None].expand(size, 1, size, size), scale)[:, 0, :, 0].T
        self.visible = torch.linalg.pinv(down) @ down                               # (size, size)

    def caption(self, label):
        shape, colour, texture, ground = (list(names)[i] for names, i in zip(ATTRIBUTES, label))
        return f"a {colour} {shape} with {texture} on a {ground} background".replace("a orange", "an orange")

    def sample(self, indices, textured=True):
        """-> images (B, 3, size, size) in [-1, 1], captions (list of B), labels (B, 4), places in ATTRIBUTES.
        textured=False draws the same pictures without their textures: the same base-resolution images."""
        u = uniform(indices, 14, self.seed)
        shape, colour, texture = self.combos[np.asarray(indices) % len(self.combos)].T
        background = (colour + 1 + (u[:, 0] * 7).long()) % 8                        # never the shape's own
        labels = torch.stack([shape, colour, texture, background], dim=1)
        u = 2 * u[:, :, None, None] - 1                                             # (B, 14, 1, 1), -1 to 1
        radius, turn = 0.33 + 0.025 * u[:, 1], 0.12 * u[:, 2]
        right = self.centred - 0.03 * u[:, 3]                                       # (B, 1, size)
        down = self.centred[:, None] - 0.03 * u[:, 4]                               # (B, size, 1)
        x = (right * turn.cos() + down * turn.sin()) / radius                       # (B, size, size)
        y = (down * turn.cos() - right * turn.sin()) / radius
        distance = torch.empty_like(x)
        for i, outline in enumerate(SHAPES.values()):
            distance[shape == i] = outline(x[shape == i], y[shape == i])
        mask = (0.5 - distance * radius * self.size).clamp(0, 1)[:, None]           # (B, 1, size, size)
        palette = torch.tensor(list(COLOURS.values()))[..., None, None]             # (8, 3, 1, 1)
        light = 0.16 * (u[:, 5] * self.centred + u[:, 6] * self.centred[:, None])[:, None]
        behind = 0.45 * palette[background] - 0.42 + 0.04 * u[:, 7:10] + light      # (B, 3, size, size)
        images = behind + mask * (palette[colour] + 0.04 * u[:, 10:13] - behind)
        if textured:
            detail = mask * self.textures[texture][:, None] * (1 + 0.1 * u[:, 13:14])
            # the edge of the shape cuts the texture, and that would show: take out what down-sampling keeps
            images = images + detail - self.visible @ detail @ self.visible.T
        return images.clamp(-1, 1), [self.caption(label) for label in labels], labels

# ------------------------------------------------------------ the classifier
class Classifier(nn.Module):
    """(B, 3, H, W) -> four logits: shape, colour, texture, background. Trained on the world's own images."""
    heads = tuple(map(len, ATTRIBUTES))

    def __init__(self, widths=(32, 48, 64, 96, 128), size=64):
        super().__init__()
        self.size = size
        self.conv = nn.ModuleList(nn.Conv2d(c_in, c, 3, stride=1 if c_in == 3 else 2, padding=1)
                                  for c_in, c in zip((3, *widths), widths))
        self.norm = nn.ModuleList(nn.GroupNorm(8, c) for c in widths)
        self.head = nn.Linear(widths[-1], sum(self.heads))

    def features(self, x):
        """(B, 3, H, W) -> (B, 128): the penultimate layer, for a Frechet distance."""
        for conv, norm in zip(self.conv, self.norm):
            x = F.silu(norm(conv(x)))
        return x.mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x)).split(self.heads, dim=1)

    @torch.no_grad()
    def predict(self, images):
        """Images of any size -> labels (B, 4). Smaller ones are enlarged, and their texture means nothing."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        return torch.stack([logits.argmax(1) for logits in self(images.clamp(-1, 1))], dim=1)

    def accuracy(self, images, labels):
        """Images (B, 3, H, W), labels (B, 4) -> (4,), the share of images read as labelled, by attribute."""
        return (self.predict(images) == labels).float().mean(0)

def load_classifier(source=TINY_MODEL, dtype=torch.float32, device="cpu"):
    """The classifier in a folder (classifier.safetensors) or a file, frozen."""
    path = source if str(source).endswith(".safetensors") else find_file(source, "classifier.safetensors")
    return load_strict(Classifier, read_file(path), source, dtype, device)

