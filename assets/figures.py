"""Draws the figures, figure-NAME.png beside this file (denoising is a .gif), with Pillow and the project's own functions.

    python assets/figures.py method | latents | spectra | tokens | all       # tokens measures: two minutes
    python assets/figures.py losses | curve | denoising     # of a stage-2 run, python finetune_dit.py
    python assets/figures.py photograph --image photo.jpg --model VAE --davae FILE      # any VAE, any picture

Each prints a line of facts for its caption, and keeps it in the PNG. The DA-VAE without alignment is trained
once, in runs/unaligned: two to four minutes. Lengths are in points, 700 to a figure's width, two pixels each.
"""
import io, json, math, os, platform, re, statistics, sys, time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import align                                                                                # noqa: E402
from assets.world import World                                                            # noqa: E402
from finetune_dit import omega, warm_start                                                  # noqa: E402
from sample import (MMDiT, MMDiTArch, generate, get_sigmas, load_mmdit,                     # noqa: E402
                    load_text_encoders)
from vae_expand import (TINY_MODEL, InputError, Parser, downsample, load_davae, load_vae,   # noqa: E402
                        non_negative, pca_images, positive, positive_int, read_image, read_json, run,
                        save_png, to_image, to_tensor)

MOST = 195_000                          # bytes of a figure, less its facts: the tests allow 200,000
COLOURS = 64                            # of the animation
K = 4                                   # pixels a point while drawing; finish() halves them, for smooth edges
INK, GREY, PALE = "#222222", "#808080", "#e8e8e8"
BLUE, ORANGE, GREEN = "#1f5fbf", "#d0552b", "#2e8b57"       # base, z, stock; detail, z_d, DA; a third

# ------------------------------------------------------------ paper and axes
def sheet(height):
    """An empty figure: PIL image, 700 points wide."""
    return Image.new("RGB", (700 * K, height * K), "white")

def write(image, x, y, text, anchor="la", fill=INK, size=13):
    """Text at a point; anchor: l, m or r across, then a (top), m or s (base line) down, as Pillow has it."""
    ImageDraw.Draw(image).text((x * K, y * K), text, fill, ImageFont.load_default(size * K), anchor)

def smooth(image):
    """Two pixels a point"""
    return image.resize((image.width // 2, image.height // 2), Image.LANCZOS)

def few_colours(image):
    """An image in 256 colours, chosen on a sixteenth of its pixels."""
    sample = image.resize((image.width // 4, image.height // 4), Image.NEAREST)
    return image.quantize(palette=sample.quantize(256, kmeans=2), dither=Image.Dither.NONE)

def fitted(image):
    """An image that takes at most MOST bytes as PNG: itself, or in 256 colours, or those at half the size."""
    half = image.resize((image.width // 2, image.height // 2), Image.LANCZOS)
    for version in image, few_colours(image), few_colours(half), half.quantize(64, dither=Image.Dither.NONE):
        file = io.BytesIO()
        version.save(file, "PNG")
        if file.tell() < MOST:
            return version
    raise InputError(f"a figure of {file.tell()} bytes, expected at most {MOST}: draw less on it")

def finish(image, name, facts):
    """Write figure-NAME.png with its facts inside, and print them in one line."""
    path, facts = HERE / f"figure-{name}.png", f"`python assets/figures.py {name}`: {facts}"
    save_png(path, fitted(smooth(image)), facts=facts)
    print(f"{path.name}, {path.stat().st_size / 1000:.0f} KB, {facts}", flush=True)

def ticks(low, high, log, most):
    """Round values in [low, high]: a 1-2-5 step, `most` in all; log: 1-2-5, or powers of ten if 200-fold."""
    if log:
        digits = (1, 2, 5) if high < 200 * low else (1,)
        return [m * 10.0**k for k in range(-9, 10) for m in digits if low <= m * 10.0**k <= high]
    step = next(m * 10.0**k for k in range(-6, 9) for m in (1, 2, 5) if high - low <= most * m * 10.0**k)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]

class Axes:
    """A frame with ticks and labels. box: left, top, right, bottom in points; x, y: (low, high) of the data;
    log: which of the two are logarithmic."""
    def __init__(self, image, box, x, y, xlabel, ylabel, log=(False, False), xticks=None):
        self.image, self.box, self.spans, self.log, self.named = image, box, (x, y), log, {}
        left, top, right, bottom = box
        for v in xticks or ticks(*x, log[0], (right - left) / 100):
            self.line((v, y[0]), (v, y[1]), PALE, 0.7, False)
            write(image, self.at(v, y[0])[0], bottom + 6, f"{v:,g}", "ma")
        for v in ticks(*y, log[1], (bottom - top) / 40):
            self.line((x[0], v), (x[1], v), PALE, 0.7, False)
            write(image, left - 6, self.at(x[0], v)[1], f"{v:,g}", "rm")
        self.ink([(left, top), (left, bottom), (right, bottom)], GREY, 1)
        write(image, (left + right) / 2, bottom + 26, xlabel, "ma")
        write(image, 8, top - 27, ylabel)

    def at(self, x, y):
        """Data -> points"""
        left, top, right, bottom = self.box
        across, up = (math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)
                      for v, (low, high), log in zip((x, y), self.spans, self.log))
        return left + (right - left) * across, bottom - (bottom - top) * up

    def ink(self, points, colour, width, dots=0.0):
        """A line of that width through points (0: none), discs of radius `dots` at them (0: none)."""
        draw, flat = ImageDraw.Draw(self.image), [c * K for point in points for c in point]
        if width:
            draw.line(flat, colour, round(width * K), joint="curve")
        for x, y in points if dots else ():
            draw.ellipse([c * K for c in (x - dots, y - dots, x + dots, y + dots)], colour)

    def line(self, start, end, colour=GREY, width=1.0, dashed=True):
        """A straight line between two places of the data, in dashes of 4 points or solid."""
        a, b = self.at(*start), self.at(*end)
        n = math.ceil(math.dist(a, b) / 4) if dashed else 1
        cuts = [[p + (q - p) * k / n for p, q in zip(a, b)] for k in range(n + 1)]
        for piece in zip(cuts[::2], cuts[1::2]):
            self.ink(piece, colour, width)

    def curve(self, name, data, colour, width=2.0, dots=0.0):
        """A curve [(x, y), ...] of the data, for the legend to name."""
        self.named[name] = colour, width, dots
        self.ink([self.at(*point) for point in data], *self.named[name])

    def legend(self):
        """The curves' names, in the corner with the least ink under them, the upper right one first."""
        left, top, right, bottom = self.box
        wide = 42 + max(ImageFont.load_default(13).getlength(name) for name in self.named)
        high = 18 * len(self.named) + 6
        corners = [(x, y) for y in (top + 7, bottom - high - 7) for x in (right - wide - 7, left + 7)]
        boxes = [[round(c * K) for c in (x, y, x + wide, y + high)] for x, y in corners]
        dark = [sum(self.image.crop(box).convert("L").histogram()[:200]) for box in boxes]      # grid: paler
        best = dark.index(min(dark))
        ImageDraw.Draw(self.image).rectangle(boxes[best], "white", PALE, K)
        x, row = corners[best][0], corners[best][1] + 12
        for i, (name, (colour, width, dots)) in enumerate(self.named.items()):
            self.ink([(x + 6, row + 18 * i), (x + 28, row + 18 * i)], colour, width)
            self.ink([(x + 17, row + 18 * i)], colour, 0, dots)
            write(self.image, x + 36, row + 18 * i, name, "lm")

# ------------------------------------------------------------ boxes and arrows
BASE, DETAIL = ("#8db4ec", BLUE), ("#f3a78c", ORANGE)       # fill and outline of z's channels and of z_d's
FROZEN = "#dbe7f8", BLUE                        # fill and outline of what does not train,
TRAINED = "#fbe0d6", ORANGE                     # of what trains on from pretrained weights,
FRESH = "#eadff5", "#7d4bb0"                    # of what is new, and starts at random,
ZERO = "#d9f0e2", GREEN                         # and of what is new, and starts at zero

def label(image, x, y, text, size=13, fill=INK):
    """Text centred on a point, in which "z_d" gets a subscript: what follows "_", up to the next space or mark."""
    parts = [(part, i % 2) for i, part in enumerate(re.split(r"_(\w+)", text)) if part]
    fonts = [ImageFont.load_default((size * 0.72 if low else size) * K) for _, low in parts]
    left = x * K - sum(font.getlength(part) for font, (part, _) in zip(fonts, parts)) / 2
    for font, (part, low) in zip(fonts, parts):
        ImageDraw.Draw(image).text((left, (y + (0.36 if low else 0.34) * size + 2.6 * low) * K), part, fill, font, "ls")
        left += font.getlength(part)

def block(image, box, kind, *lines, size=13):
    """A box with round corners, in the colours of `kind`; its first line larger than those below it."""
    left, top, right, bottom = (c * K for c in box)
    ImageDraw.Draw(image).rounded_rectangle((left, top, right, bottom), 5 * K, kind[0], kind[1], round(1.4 * K))
    middle = (box[1] + box[3]) / 2 - 6.5 * (len(lines) - 1)
    for i, text in enumerate(lines):
        label(image, (box[0] + box[2]) / 2, middle + 13 * i + (1.5 if i else 0), text, size if i == 0 else 10)

def arrow(image, *points, colour=INK, width=1.5):
    """A line through points, with a head at its end."""
    (x, y), (tip_x, tip_y) = points[-2:]
    length = math.dist((x, y), (tip_x, tip_y))
    across, down = (tip_x - x) / length, (tip_y - y) / length
    neck = tip_x - 6 * across, tip_y - 6 * down
    for start, end in zip(points, [*points[1:-1], neck]):
        ImageDraw.Draw(image).line([c * K for c in (*start, *end)], colour, round(width * K))
    sides = [(neck[0] - k * down, neck[1] + k * across) for k in (3.6, -3.6)]
    ImageDraw.Draw(image).polygon([c * K for point in [(tip_x, tip_y), *sides] for c in point], colour)

def sheets(image, x, y, side, count, kind):
    """A latent as a stack of `count` square channels, the front one's left upper corner at (x, y)."""
    for k in reversed(range(count)):
        left, top = x + 3.2 * k, y - 3.2 * k
        box = [c * K for c in (left, top, left + side, top + side)]
        ImageDraw.Draw(image).rectangle(box, kind[0], kind[1], K)

def paste(image, tile, x, y, side):
    """An image tensor (3, H, W) as a square of `side` points, with a thin frame."""
    picture = to_image(tile).resize((side * K, side * K), Image.NEAREST)
    image.paste(picture, (x * K, y * K))
    ImageDraw.Draw(image).rectangle([c * K for c in (x, y, x + side, y + side)], outline=GREY, width=K // 2)

@torch.no_grad()
def method(args):
    """The whole method on one sheet: stage 1 above, stage 2 below, the legend at the foot."""
    vae = load_vae(TINY_MODEL)
    davae = load_davae(f"{TINY_MODEL}/davae.safetensors", vae)
    x, captions, _ = World(split="val").sample([9])
    z_hr = davae.encode(x)
    z, z_d = z_hr.split([davae.C, davae.D], dim=1)
    colours = pca_images(z[0], davae.denormalise_detail(z_d)[0])
    image = sheet(506)
    draw_stage_1(image, x[0], downsample(x, davae.s)[0], *colours, davae.decode(z_hr)[0])
    draw_stage_2(image)
    legend = {"frozen, pretrained": FROZEN, "trains, from pretrained weights": TRAINED,
              "trains, new: starts at zero": ZERO, "trains, new: starts at random": FRESH}
    left = 10
    for name, kind in legend.items():
        box = [c * K for c in (left, 486, left + 16, 498)]
        ImageDraw.Draw(image).rounded_rectangle(box, 3 * K, *kind, round(1.4 * K))
        write(image, left + 21, 492, name, "lm", size=11)
        left += 39 + ImageFont.load_default(11).getlength(name)
    finish(image, "method", f"the pictures are {captions[0]!r} of the embedded world and its latents, by the DA-VAE in"
           f" assets/tiny; C = {davae.C}, D = {davae.D}, s = {davae.s}")

def draw_stage_1(image, x, base, z, z_d, x_hat):
    """From the image to [z, z_d] and back."""
    write(image, 10, 4, "Stage 1 (align.py): detail channels beside the pretrained ones")
    paste(image, x, 10, 130, 78)
    label(image, 49, 218, "image I_hr", 12)
    arrow(image, (49, 129), (49, 94))
    write(image, 56, 110, "1/s of the size", "lm", GREY, 10)
    paste(image, base, 29, 53, 39)
    label(image, 49, 43, "base copy I", 12)
    arrow(image, (70, 72), (118, 72))
    block(image, (120, 50, 216, 94), FROZEN, "E", "pretrained encoder")
    arrow(image, (90, 169), (118, 169))
    block(image, (120, 147, 168, 191), TRAINED, "E_d", "copy of E")
    block(image, (170, 147, 216, 191), FRESH)
    label(image, 193, 163, "new last", 10)
    label(image, 193, 176, "layer", 10)
    arrow(image, (218, 72), (246, 72))
    arrow(image, (218, 169), (246, 169))
    paste(image, z, 248, 44, 56)
    paste(image, z_d, 248, 141, 56)
    label(image, 276, 34, "z, C channels", 12)
    label(image, 276, 208, "z_d, D channels", 12)
    arrow(image, (276, 121), (276, 138), colour=ORANGE)
    arrow(image, (276, 121), (276, 103), colour=ORANGE)
    write(image, 284, 114, "alignment, Eq. (3):", "lm", ORANGE, 10)
    label(image, 327, 127, "Proj(z_d) close to z", 10, ORANGE)
    arrow(image, (306, 72), (396, 72), (396, 94))
    arrow(image, (306, 169), (396, 169), (396, 147))
    sheets(image, 384, 111, 20, 3, BASE)
    sheets(image, 384, 126, 20, 3, DETAIL)
    label(image, 436, 120, "[z, z_d]", 13)
    arrow(image, (462, 120), (484, 120))
    block(image, (486, 90, 582, 150), TRAINED, "joint decoder", "starts as a copy,", "and ignores z_d")
    arrow(image, (584, 120), (606, 120))
    paste(image, x_hat, 608, 81, 78)
    label(image, 647, 170, "close to I_hr:", 11)
    label(image, 647, 184, "L1, LPIPS, GAN", 10, GREY)

def draw_stage_2(image):
    """From the noisy [z, z_d] to its velocity."""
    ImageDraw.Draw(image).line([c * K for c in (10, 238, 690, 238)], PALE, K)
    write(image, 10, 246, "Stage 2 (finetune_dit.py): the pretrained transformer on as many tokens as before")
    sheets(image, 24, 304, 34, 3, BASE)
    sheets(image, 24, 384, 34, 3, DETAIL)
    label(image, 46, 285, "noisy z", 12)
    label(image, 46, 434, "noisy z_d", 12)
    arrow(image, (68, 316), (108, 316))
    arrow(image, (68, 396), (108, 396))
    block(image, (110, 294, 196, 338), TRAINED, "P", "patch embedder")
    block(image, (110, 374, 196, 418), ZERO, "P'", "patch embedder")
    arrow(image, (198, 316), (222, 316), (222, 345))
    arrow(image, (198, 396), (222, 396), (222, 367))
    ImageDraw.Draw(image).ellipse([c * K for c in (212, 346, 232, 366)], "white", INK, round(1.4 * K))
    write(image, 222, 356, "+", "mm", size=15)
    arrow(image, (234, 356), (260, 356))
    block(image, (262, 278, 424, 434), FROZEN)
    label(image, 343, 294, "transformer blocks")
    for i in range(4):
        top = 308 + 30 * i
        block(image, (274, top, 368, top + 21), ("white", BLUE), "weights", size=10)
        block(image, (372, top, 412, top + 21), ZERO, "LoRA", size=10)
    arrow(image, (343, 456), (343, 437))
    label(image, 343, 464, "prompt, time t", 12)
    arrow(image, (426, 356), (438, 356), (438, 316), (460, 316))
    arrow(image, (426, 356), (438, 356), (438, 396), (460, 396))
    block(image, (462, 294, 536, 338), TRAINED, "O", "head")
    block(image, (462, 374, 536, 418), ZERO, "O'", "head")
    arrow(image, (538, 316), (566, 316))
    arrow(image, (538, 396), (566, 396))
    sheets(image, 570, 304, 34, 3, BASE)
    sheets(image, 570, 384, 34, 3, DETAIL)
    label(image, 592, 285, "velocity of z", 12)
    label(image, 592, 434, "velocity of z_d", 12)
    weights = {314: "its error", 328: "counts fully",
               381: "its error", 395: "times omega,", 409: "from 0 to 1"}
    for y, text in weights.items():
        write(image, 653, y, text, "mm", size=11)
    for y, text in (456, "Sampling follows the velocity from noise to"), (469, "[z, z_d]; the joint decoder makes the picture."):
        label(image, 584, y, text, 10, GREY)

# ------------------------------------------------------------ z and z_d
@torch.no_grad()
def encoded(indices):
    """Held-out pictures -> images (B, 3, 64, 64), captions, base copies (B, 3, 32, 32), z, z_d with alignment
    and z_d without, (B, 16, 8, 8) and twice (B, 48, 8, 8), raw. Trains the DA-VAE without alignment first, if there is none."""
    path = Path("runs/unaligned/davae.safetensors")
    if not path.is_file():
        one = align.parse_args(["--align", "0", "--steps", "250", "--out", str(path.parent)])
        with torch.enable_grad():
            align.train(one, *align.init_distributed(one))
    x, captions, _ = World(split="val").sample(indices)
    vae, base = load_vae(TINY_MODEL), downsample(x, 2)
    z_d = [load_davae(file, vae).detail_posterior(x)[0] for file in (f"{TINY_MODEL}/davae.safetensors", path)]
    return x, captions, base, vae.encode(base), *z_d

def latents(args):
    """Pictures down; image, base copy, z, z_d with alignment and z_d without across."""
    shown = [7, 3, 9]
    x, captions, base, z, aligned, free = encoded(shown)
    image = sheet(40 + 152 * len(shown))
    heads = {"image": "64 x 64 pixels", "base copy": "32 x 32 pixels", "z": "of the base copy, 8 x 8",
             "z_d, aligned": "of the image, lambda 0.5", "z_d, not aligned": "of the image, lambda 0"}
    for i, (head, below) in enumerate(heads.items()):
        write(image, 8 + 138 * i, 3, head)
        write(image, 8 + 138 * i, 21, below, fill=GREY, size=11)
    for j, caption in enumerate(captions):
        tiles = [x[j], base[j], *pca_images(z[j], aligned[j]), pca_images(z[j], free[j])[1]]
        for i, tile in enumerate(tiles):
            tile = to_image(tile).resize((132 * K, 132 * K), Image.NEAREST)
            image.paste(tile, ((8 + 138 * i) * K, (40 + 152 * j) * K))
        write(image, 8, 174 + 152 * j, caption, fill=GREY, size=11)
    errors = [((align.project(z_d, z.shape[1]) - z)**2).mean() / z.var() for z_d in (aligned, free)]
    error, other = (100 * share.item() for share in errors)
    finish(image, "latents", f"held-out pictures {shown} of the world, seed 0; each picture's three strongest"
           " directions of z as red, green, blue, in the range of z; (Proj(z_d) - z)^2, as a share of z's variance:"
           f" {error:.1f}% with alignment, {other:.0f}% without")

def spectrum(v):
    """Latents (B, c, n, n) -> [(cycles a latent pixel, mean |FFT|^2 of all waves of that length), ...]
    Each channel's mean over a picture is taken out; then the mean over all waves is set to 1."""
    n = v.shape[-1]
    power = torch.fft.fft2(v - v.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))    # (n, n)
    power = power / power.sum() * (n * n - 1)
    k = (torch.fft.fftfreq(n) * n).round().long()
    square = k[:, None]**2 + k**2                                           # of the radius: whole numbers
    return [(math.sqrt(q) / n, power[square == q].mean().item())
            for q in square.unique().tolist() if 0 < q <= (n // 2)**2]

def explained(z, z_d):
    """Percent of z_d's variance that the best linear map from z gives. (B, C, h, w) each -> float"""
    a, b = (v.transpose(0, 1).flatten(1).T.double() for v in (z, z_d))      # (B h w, C)
    a, b = a - a.mean(0), b - b.mean(0)
    return 100 * (1 - ((b - a @ torch.linalg.lstsq(a, b).solution)**2).sum() / (b**2).sum()).item()

def spectra(args, count=192):
    """Radial power spectra of z and of both z_d, with where the textures alias to."""
    *_, z, aligned, free = encoded(range(count))
    curves, image = [spectrum(v) for v in (z, aligned, free)], sheet(400)
    axes = Axes(image, (62, 36, 690, 346), (0.08, 0.52), (0.1, 12), "cycles a latent pixel",
                "power (white noise of the same variance: 1)", (False, True))
    for x in 1 / 3, math.sqrt(2) / 3:
        axes.line((x, 0.1), (x, 4))
    write(image, axes.at(1 / 3, 1)[0] + 10, 338, "where the textures alias to", "ls", GREY)
    axes.curve("z", curves[0], "#a9c3ec", 6.0, 6.5)
    axes.curve("z_d, aligned", curves[1], ORANGE, dots=3.5)
    axes.curve("z_d, not aligned", curves[2], GREEN, dots=3.5)
    axes.legend()
    like, unlike = torch.corrcoef(torch.tensor(curves)[:, :, 1].log())[0, 1:].tolist()
    finish(image, "spectra", f"{count} held-out pictures, seed 0, 64 x 64 pixels, latents of 8 x 8, C = 16"
           f" and D = {aligned.shape[1]} channels; log power of z and z_d correlates {like:.4f} with alignment, {unlike:.2f} without; of"
           f" z_d's variance a linear map of z gives {explained(z, aligned):.1f}% with alignment,"
           f" {explained(z, free):.1f}% without; textures repeat every 3 pixels, latent pixels are 8 apart"
           " and see 1/3 cycle along an axis, 0.471 along a diagonal")

# ------------------------------------------------------------ the price of tokens
@torch.no_grad()
def tokens(args, repeats=9):
    """Seconds of a forward against image tokens, log-log: measured, and what the FLOPs say."""
    arch = MMDiTArch(depth=4, width=256, table=128, context_dim=256, pooled_dim=256, dual=(0, 1))
    flops, sides = {}, (8, 12, 16, 24, 32, 48, 64)
    def given(side, device):
        shapes = (1, 16, 2 * side, 2 * side), (1,), (1, 77, 256), (1, 256)
        return [torch.ones(shape, device=device) for shape in shapes]
    with torch.device("meta"):
        model = MMDiT(arch)
    for side in (*sides, 96, 128):
        with FlopCounterMode(display=False) as counter:             # counts the closed form: test_speed.py
            model(*given(side, "meta"))
        flops[side**2] = counter.get_total_flops()
    torch.manual_seed(0)
    model, times = MMDiT(arch).eval(), {side**2: [] for side in sides}
    for _ in range(repeats + 1):        # in turn: what else the machine does hits all sizes alike
        for side in sides:
            inputs, calls = given(side, "cpu"), max(1, 2048 // side**2)
            start = time.perf_counter()
            for _ in range(calls):
                model(*inputs)
            times[side**2].append((time.perf_counter() - start) / calls)
    took = {n: statistics.median(some[1:]) for n, some in times.items()}    # the first warms up
    rate, best = max((flops[n] / took[n], n) for n in took)
    line = [(n, f / rate) for n, f in flops.items()]
    image = sheet(440)
    span = 10.0**math.floor(math.log10(line[0][1])), 10.0**math.ceil(math.log10(line[-1][1]))
    axes = Axes(image, (62, 36, 690, 386), (50, 20_000), span, "image tokens", "seconds a forward",
                (True, True), [64, 256, 1024, 4096, 16384])
    for n, names in {256: ("", "DA 512 px"), 1024: ("stock 512 px", "DA 1024 px"),
                     4096: ("stock 1024 px", "DA 2048 px"), 16384: ("stock 2048 px", "")}.items():
        axes.line((n, span[0]), (n, flops[n] / rate))
        for text, y, colour in zip(names, (361, 379), (BLUE, ORANGE)):
            write(image, axes.at(n, 1)[0] - 6, y, text, "rs", colour)
    axes.curve("FLOPs, at the speed of the fastest point", line, GREY, 1.5)
    axes.curve("measured (median)", list(took.items()), INK, 0, 4)
    axes.legend()
    finish(image, "tokens", "MMDiT of width 256, depth 4, two dual blocks, 77 text tokens, random, float32;"
           f" median of {repeats}; {platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()}"
           f" cores, torch {torch.__version__}; fastest at {best} tokens, {rate / 1e9:.0f} GFLOP/s; 4096"
           f" take {took[4096] / took[1024]:.1f} times as long as 1024, {flops[4096] / flops[1024]:.1f} times"
           f" the FLOPs; 16384 have {flops[16384] / flops[4096]:.1f} times the FLOPs of 4096")

# ------------------------------------------------------------ a run of stage 2
def read_run(path):
    """A run's log.jsonl -> its lines (dicts), its arguments (strings), its result ({} if it is unfinished)"""
    about, result = (read_json(path.with_name(name)) for name in ("args.json", "result.json"))
    if not path.is_file() or not {"n_warm", "every"} <= about.keys():
        raise InputError(f"{path}: expected the log of a stage-2 run, args.json beside it; this makes one:"
                         f" python finetune_dit.py --out {path.parent}")
    return [json.loads(line) for line in path.read_text().splitlines()], about, result

def losses(args):
    """The two means of squares in Eq. (13), logarithmic, over omega(n) of Eq. (12), with N_warm."""
    lines, about, _ = read_run(args.log)
    base, detail = ([(line["step"], line[k]) for line in lines if k in line] for k in ("base", "detail"))
    values, last, warm = [y for _, y in base + detail], base[-1][0], int(about["n_warm"])
    image = sheet(520)
    upper = Axes(image, (62, 36, 678, 306), (0, last), (0.9 * min(values), 1.15 * max(values)), "",
                 "mean squared error of the velocity", (False, True))
    lower = Axes(image, (62, 366, 678, 466), (0, last), (0, 1.1), "step", "omega(n), weight of the details")
    for axes in upper, lower:
        axes.line(*((warm, y) for y in axes.spans[1]))
    write(image, upper.at(warm, 1)[0] + 6, 38, f"N_warm = {warm}", fill=GREY)
    upper.curve("detail channels", detail, ORANGE)
    upper.curve("base channels", base, BLUE)
    upper.legend()
    weight = omega if about["no_schedule"] == "False" else lambda n, warm: 1.0
    lower.curve("omega", [(n, weight(n - 1, warm)) for n in range(1, last + 1)], INK)
    late = [statistics.mean(y for _, y in points[-10:]) for points in (base, detail)]
    finish(image, "losses", f"finetune_dit.py, {last} steps of {about['batch']}, seed {about['seed']}, N_warm"
           f" {warm}; one batch every {about['every']} steps; the first, the mean of the last ten: base"
           f" {base[0][1]:.3f}, {late[0]:.3f}, detail {detail[0][1]:.3f}, {late[1]:.3f}")

def curve(args):
    """Texture accuracy in percent against the step, and chance; both ends are the final table's."""
    runs, facts = {path.parent.name: read_run(path) for path in (args.log, args.also) if path}, []
    image = sheet(420)
    last = max(lines[-1]["step"] for lines, *_ in runs.values())
    axes = Axes(image, (62, 36, 678, 366), (0, last), (0, 105), "step", "textures read as asked for, %")
    axes.line((0, 100 / 6), (last, 100 / 6))
    write(image, 672, axes.at(0, 100 / 6)[1] - 5, "chance, 1 in 6", "rs", GREY)
    for (name, (lines, about, result)), colour in zip(runs.items(), (ORANGE, BLUE)):
        points = {line["step"]: 100 * line["texture"] for line in lines if "texture" in line}
        for n, row in {0: "warm start, step 0", int(about["steps"]): "fine-tuned"}.items() if result else ():
            points[n] = result["table"][row]["texture %"]
        points = sorted(points.items())
        axes.curve(name, points, colour, dots=4)
        facts += [f"{', '.join(f'{y:.1f}% at step {n}' for n, y in points)} ({name}, seed {about['seed']},"
                  f" {about['held']} held-out captions, guidance {about['cfg']})"]
    axes.legend()
    finish(image, "curve", "; ".join(facts))

# ------------------------------------------------------------ sampling, frame by frame
@torch.no_grad()
def on_the_way(mmdit, vae, text, prompts, size, args):
    """Sampling, step by step -> a list, one a step, of two pictures (3, size, size), of the first prompt:
    the latent x_t decoded as it is, and what the model believes to be at its end, x_t - t u, decoded."""
    seen = []
    hook = mmdit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:1].clone()))
    end = generate(mmdit, vae, text, prompts, size, size, args.steps, args.cfg, args.shift, return_latents=True)
    hook.remove()
    sigmas = get_sigmas(args.steps, args.shift).tolist()
    frames = []
    for x, x_next, t, t_next in zip(seen, [*seen[1:], end[:1]], sigmas, sigmas[1:]):
        u = (x_next - x) / (t_next - t)                                     # guidance is in it
        frames.append((vae.decode(x)[0], vae.decode(x - t * u)[0]))
    return frames + [(vae.decode(end)[0],) * 2]

def denoising(args):
    """An animation: stock at the full size, warm start, fine-tuned, from noise to picture."""
    if not args.dit.is_file():
        raise InputError(f"{args.dit}: no such file; this makes it: python finetune_dit.py --out {args.dit.parent}")
    vae = load_vae(TINY_MODEL)
    davae = load_davae(f"{TINY_MODEL}/davae.safetensors", vae)
    encode_text = load_text_encoders(TINY_MODEL)
    _, prompts, _ = World(split="val").sample([0])
    text = (*encode_text(prompts), *encode_text([""]))
    stock = load_mmdit(TINY_MODEL)
    warm = warm_start(load_mmdit(TINY_MODEL), davae.D)
    columns = {"stock": (stock, vae), "warm start, step 0": (warm, davae), "fine-tuned": (load_mmdit(args.dit), davae)}
    films = [on_the_way(mmdit, decoder, text, prompts, 64, args) for mmdit, decoder in columns.values()]
    tokens = [(64 // decoder.f // mmdit.arch.patch)**2 for mmdit, decoder in columns.values()]
    pages = []
    for i, pictures in enumerate(zip(*films)):
        image = sheet(484)
        for j, (name, count, (noisy, clean)) in enumerate(zip(columns, tokens, pictures)):
            write(image, 100 + 200 * j, 6, name, size=17)
            write(image, 100 + 200 * j, 28, f"64 x 64 pixels, {count} tokens", fill=GREY, size=12)
            paste(image, noisy, 100 + 200 * j, 48, 192)                     # 3 pixels a pixel
            paste(image, clean, 100 + 200 * j, 248, 192)
        for k, line in enumerate(("the noisy", "latent,", "decoded")):
            write(image, 8, 120 + 18 * k, line)
        for k, line in enumerate(("predicted", "end of the", "sampling,", "decoded")):
            write(image, 8, 308 + 18 * k, line)
        write(image, 100, 453, f"step {i} of {args.steps}", size=15)
        ImageDraw.Draw(image).rectangle([c * K for c in (200, 455, 692, 467)], PALE)
        ImageDraw.Draw(image).rectangle([c * K for c in (200, 455, 200 + 492 * i / args.steps, 467)], BLUE)
        pages.append(image.resize((700, 484), Image.BOX))
    path = HERE / "figure-denoising.gif"
    some = np.concatenate([np.array(pages[i]) for i in (0, len(pages) // 3, -1)])
    colours = Image.fromarray(some).quantize(COLOURS, kmeans=2)      # one palette: a smaller file
    pages = [page.quantize(palette=colours, dither=Image.Dither.NONE) for page in pages]
    waits = [200] * (len(pages) - 1) + [3000]                               # milliseconds
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=waits, loop=0)
    print(f"{path.name}, {path.stat().st_size / 1000:.0f} KB, `python assets/figures.py denoising`: {prompts[0]!r},"
          f" a held-out caption, {args.steps} steps, guidance {args.cfg:g}, shift {args.shift:g}, seed 0", flush=True)

# ------------------------------------------------------------ a picture of yours
@torch.no_grad()
def photograph(args, amplified=4):
    """A picture through any VAE and its DA-VAE: what the base copy keeps, what z_d adds, and both latents."""
    vae = load_vae(args.model)
    davae = load_davae(args.davae, vae)
    whole = to_tensor(read_image(args.image))[None]                         # (1, 3, H, W)
    side = min(whole.shape[-2:]) // davae.f * davae.f
    if side == 0:
        raise InputError(f"{args.image}: {whole.shape[-1]} x {whole.shape[-2]} pixels; expected at least {davae.f}")
    top, left = ((n - side) // 2 for n in whole.shape[-2:])
    x = whole[:, :, top:top + side, left:left + side]                       # the largest square in the middle
    base = downsample(x, davae.s)
    z, z_d = davae.encode(x).split([davae.C, davae.D], dim=1)
    up = align.upsample(vae.decode(z), davae.s)
    x_hat = davae.decode(torch.cat([z, z_d], dim=1))
    colours = pca_images(z[0], davae.denormalise_detail(z_d)[0])
    lost, left_over = ((amplified * (y - x).abs() - 1).clamp(max=1) for y in (up, x_hat))
    pixels = f"{side} x {side}"
    psnr = [10 * math.log10(4 / ((y.clamp(-1, 1) - x)**2).mean().item()) for y in (up, x_hat)]
    tiles = {"image": (x, f"{pixels} pixels"), "base, up-sampled": (up, f"{psnr[0]:.1f} dB"),
             "DA-VAE": (x_hat, f"{psnr[1]:.1f} dB"), "z": (colours[0][None], f"{davae.C} channels, as colours"),
             "base copy": (base, f"1/{davae.s} of the size"), "its error": (lost, f"times {amplified}"),
             "DA-VAE's error": (left_over, f"times {amplified}"), "z_d": (colours[1][None], f"{davae.D} channels, as colours")}
    image = sheet(440)
    for i, (name, (tile, below)) in enumerate(tiles.items()):
        across, down = 8 + 174 * (i % 4), 220 * (i // 4)
        write(image, across, down + 5, name, size=14)
        write(image, across, down + 24, below, fill=GREY, size=11)
        picture = to_image(tile[0])
        exact = Image.NEAREST if picture.width < 100 else Image.LANCZOS
        image.paste(picture.resize((166 * K, 166 * K), exact), (across * K, (down + 42) * K))
    finish(image, "photograph", f"{Path(args.image).name}, the square in its middle, {pixels} pixels, through the DA-VAE"
           f" {Path(args.davae).name} over {Path(args.model).name}: PSNR {psnr[0]:.2f} dB of the decoded base copy, up-sampled,"
           f" {psnr[1]:.2f} dB of DA-VAE; errors are absolute and drawn {amplified} times as large")

# ------------------------------------------------------------ the command
FIGURES = {f.__name__: f for f in (method, latents, spectra, tokens, losses, curve, denoising, photograph)}

def parse_args(argv=None):
    """The command's arguments."""
    p = Parser(__doc__)
    p.add_argument("figure", choices=[*FIGURES, "all"], help="which to draw")
    p.add_argument("--log", type=Path, default=Path("runs/finetune/log.jsonl"), help="of losses and curve")
    p.add_argument("--also", type=Path, metavar="LOG", help="a second run, for curve")
    p.add_argument("--dit", type=Path, default=Path("runs/finetune/dit.safetensors"), help="of denoising")
    p.add_argument("--steps", type=positive_int, default=20, help="of denoising")
    p.add_argument("--cfg", type=non_negative, default=2.5, help="guidance of denoising")
    p.add_argument("--shift", type=positive, default=1.0, help="timestep shift of denoising")
    p.add_argument("--image", default=str(HERE / "example.png"), help="of photograph")
    p.add_argument("--model", default=TINY_MODEL, help="of photograph: the VAE's file, folder or hub id")
    p.add_argument("--davae", default=f"{TINY_MODEL}/davae.safetensors", help="of photograph")
    return p.parse_args(argv)

def main(args):
    every = [name for name in FIGURES if name != "photograph"]              # that one is of your picture
    for name in every if args.figure == "all" else [args.figure]:
        FIGURES[name](args)

if __name__ == "__main__":
    run(main, parse_args())
