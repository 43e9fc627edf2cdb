"""Makes assets/tiny from nothing: a stand-in for stabilityai/stable-diffusion-3.5-medium, of the same layout.

    python assets/make_tiny.py                      # every stage in turn: an hour and a half of two CPU cores
    python assets/make_tiny.py --quick --out NEW    # a few steps of every stage, into another folder: does it run?
    python assets/make_tiny.py --stage dit          # one stage, on what the earlier ones left

Stages: classifier (reads the world's pictures), text (vocabularies; random frozen encoders), vae, dit, lightningdit,
photographs (the VAE learns them as well), scores (generated pictures, read back), davae. All but photographs learn from
the training split of the procedural world of assets/world.py alone. An interrupted stage resumes from its checkpoint.
What a stage measured, and where, goes into figures.json.
"""
import json
import math
import os
import platform
import sys
import time
from copy import deepcopy
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import align                                                                                # noqa: E402
import imagenet_eval                                                                        # noqa: E402
from assets.world import COLOURS, SHAPES, TEXTURES, Classifier, World, load_classifier      # noqa: E402
from imagenet_eval import (LightningDiT, LightningDiTArch, sample_batches, load_lightningdit,         # noqa: E402
                           read_statistics, transport_loss, write_statistics)
from sample import (CLIPText, MMDiT, MMDiTArch, T5Encoder, generate, load_mmdit,             # noqa: E402
                    load_text_encoders, shift_timesteps)
from vae_expand import (TINY_MODEL, VAE, ImageDataset, InputError, Parser, VAEArch, downsample, is_tiny,     # noqa: E402
                        load_davae, load_vae, run, save_davae)

PHOTOGRAPHS = Path(__file__).with_name("photographs.tar")

# ------------------------------------------------------------ what every stage shares

def few(count, args):
    """`count` steps or pictures, or with --quick four."""
    return min(count, 4) if args.quick else count

def train(name, model, loss_at, steps, lr, ema, args, report=lambda model: ""):
    """AdamW, warm-up, cosine decay -> the EMA model, seconds. loss_at(model, progress in [0, 1)) -> scalar.

    The random numbers of a step depend on (seed, step) alone, so a resumed run is the uninterrupted one.
    """
    steps = few(steps, args)
    path = args.work / f"{name}-seed{args.seed}.ckpt"
    average = deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4)
    parts = {"model": model, "ema": average, "optimizer": optimizer}
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        first, seconds = saved["step"], saved["seconds"]
    start = time.time() - seconds
    for step in range(first, steps):
        warm, done = min(1, (step + 1) / 100), step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        torch.manual_seed(args.seed * 10**7 + step)
        loss = loss_at(model, done)
        if not loss.isfinite():
            raise SystemExit(f"{name}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 1 - decay)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.time() - start
            note = report(average)
            print(f"{name} {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f}s {note}", flush=True)
            state = {key: part.state_dict() for key, part in parts.items()}
            torch.save({**state, "step": step + 1, "seconds": seconds}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
    return average, seconds

def save(path, tensors, dtype):
    """Write tensors as safetensors; other tensors that the file holds already stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = load_file(path) if path.exists() else {}
    save_file({**held, **{k: v.detach().to(dtype).contiguous() for k, v in tensors.items()}}, path)

def record(stage, args, **figures):
    """Add one stage's figures, with command, machine and date, to figures.json, and print them."""
    path = args.out / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    known[stage] = {
        "command": f"python assets/make_tiny.py --stage {stage} --seed {args.seed}", "seed": args.seed,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__, "date": str(date.today()), **figures}
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps({stage: figures}), flush=True)

def shares(score):
    """(4,) accuracies -> a dict by attribute."""
    return dict(zip(("shape", "colour", "texture", "background"), [round(v, 4) for v in score.tolist()]))

def draw(world, count):
    """`count` random pictures of the world -> images, labels, from torch's global generator."""
    images, _, labels = world.sample(torch.randint(2**40, (count,)).numpy())
    return images, labels

def psnr(x, y):
    """Mean over images of the peak signal-to-noise ratio in dB; both (B, 3, H, W) in [-1, 1]."""
    return (-10 * ((x - y).pow(2).mean((1, 2, 3)) / 4).log10()).mean().item()

# ------------------------------------------------------------ the classifier

def train_classifier(args, name="classifier", steps=1500, textured=True):
    """Full-size pictures, faded and noisy (it is to read generated ones), and enlarged base pictures.

    textured=False is the probe of the world's promise: it sees base pictures alone, without noise, and of all
    combinations (with a sixth left out, shape and colour together would tell a little about the texture).
    """
    world = World(split="train" if textured else "all")

    def loss_at(model, done):
        images, labels = draw(world, 64)
        base = F.interpolate(downsample(images, 2), scale_factor=2, mode="bicubic")
        if textured:
            # the last quarter is enlarged base pictures; elsewhere the texture fades to between 50% and 110%
            keep = 0.5 + 0.6 * torch.rand(64, 1, 1, 1)
            keep[48:] = 0
            images = base + keep * (images - base)
            images = images * (1 + 0.1 * torch.randn(64, 1, 1, 1)) + 0.05 * torch.randn(64, 3, 1, 1)
            images = images + 0.12 * torch.rand(64, 1, 1, 1) * torch.randn_like(images)
        else:
            images = base
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        # no texture is left to read in the last quarter
        counts = (64, 64, 48 if textured else 64, 64)
        return sum(F.cross_entropy(logit[:n].float(), label[:n])
                   for logit, label, n in zip(logits, labels.T, counts))

    torch.manual_seed(args.seed)
    return train(name, Classifier(), loss_at, steps, 2e-3, 0.99, args)

def make_classifier(args):
    classifier, seconds = train_classifier(args)
    save(args.out / "classifier.safetensors", classifier.state_dict(), torch.float16)
    classifier = load_classifier(args.out)
    images, _, labels = World(split="val").sample(range(few(960, args)))
    base = downsample(images, 2)
    probe, _ = train_classifier(args, "probe", 600, textured=False)
    fresh, _, fresh_labels = World(split="all", seed=1).sample(range(few(960, args)))
    probed = probe.accuracy(F.interpolate(downsample(fresh, 2), scale_factor=2, mode="bicubic"), fresh_labels)
    record("classifier", args, steps=1500, seconds=seconds, heldout=shares(classifier.accuracy(images, labels)),
           heldout_base=shares(classifier.accuracy(base, labels)),
           probe_trained_on_base=shares(probed))

# ------------------------------------------------------------ text: vocabularies and frozen random encoders

def world_words():
    """Every word of the captions, sorted."""
    names = [*SHAPES, *COLOURS, *TEXTURES, "a an with on background"]
    return sorted({word for name in names for word in name.split()})

def byte_symbols():
    """GPT-2's 256 printable stand-ins for bytes, in CLIP's order: the printable bytes first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]

def learn_bpe(words):
    """Merge the most frequent adjacent pair until every word is one symbol -> the merges, in order."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(split) > 1 for split in splits):
        pairs = [pair for split in splits for pair in zip(split, split[1:])]
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for split in splits:
            for i in range(len(split) - 1, 0, -1):
                if tuple(split[i - 1:i + 1]) == best:
                    split[i - 1:i + 1] = ["".join(best)]
    return merges

def write_tokenizers(out, length):
    """The three vocabularies in the real file formats -> sizes of CLIP's and T5's."""
    symbols, merges = byte_symbols(), learn_bpe(world_words())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges),
              "<|startoftext|>", "<|endoftext|>"]

    def write(name, content):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad,
                   "unk_token": "<|endoftext|>"}
        write(f"{folder}/vocab.json", {token: i for i, token in enumerate(tokens)})
        write(f"{folder}/special_tokens_map.json", special)
        write(f"{folder}/tokenizer_config.json", {
            **special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace",
            "model_max_length": length, "tokenizer_class": "CLIPTokenizer"})
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (out / folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    # scores are log-probabilities: one whole word beats any spelling of it
    pieces = [[s, 0.0] for s in special.values()] + [["\u2581", -4.0]]
    pieces += [["\u2581" + word, -5.0] for word in world_words()] + [[chr(c), -8.0] for c in range(33, 127)]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": s, **plain, "special": True} for i, s in enumerate(special.values())]
    ending = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}
    write("tokenizer_3/tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": metaspace, "post_processor": ending, "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}})
    write("tokenizer_3/special_tokens_map.json", special)
    write("tokenizer_3/tokenizer_config.json", {
        **special, "add_prefix_space": True, "legacy": True, "extra_ids": 0, "model_max_length": length,
        "tokenizer_class": "T5Tokenizer"})
    return len(tokens), len(pieces)

@torch.no_grad()
def randomise(encoder):
    """Unit embeddings, linears that keep their input's scale: words, order, neighbours all leave a mark."""
    for name, p in encoder.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=1.0 if "embedding" in name or "shared" in name else p.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return encoder

def make_text(args):
    clip, t5_size = write_tokenizers(args.out, length=16)
    torch.manual_seed(args.seed)
    # like the real file, clip_l's has no projection
    clip_l = randomise(CLIPText(clip, 16, 64, 256, layers=2)).state_dict()
    clip_g = randomise(CLIPText(clip, 16, 64, 256, layers=2, projected=64)).state_dict()
    t5 = randomise(T5Encoder(t5_size, width=192, inner=192, hidden=192, heads=3, layers=1)).state_dict()
    for name in t5:
        # T5's attention does not divide by sqrt(64): its queries do
        t5[name] = t5[name] / 8 if name.endswith("SelfAttention.q.weight") else t5[name]
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    for name, state in (("clip_l", clip_l), ("clip_g", clip_g), ("t5xxl_fp16", t5)):
        save(args.out / "text_encoders" / f"{name}.safetensors", state, torch.float16)
    record("text", args, clip_tokens=clip, t5_tokens=t5_size)

# ------------------------------------------------------------ the VAE

def fine(x):
    """What down-sampling takes away. (B, 3, H, W) -> the same"""
    return x - F.interpolate(downsample(x, 2), scale_factor=2, mode="bicubic")

def vae_loss(vae, x, known=None):
    """L1 + MSE + MSE of the fine part (which finds the textures within 100 steps) + a mild KL.

    known: latents, not normalised, that the first pictures had and should keep, (n, C, h, w).
    """
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = (part.float() for part in vae.posterior(x))
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        error = vae.decoder(z).float() - x
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    moved = 0 if known is None else F.mse_loss(mean[:len(known)], known)
    return error.abs().mean() + error.pow(2).mean() + 4 * fine(error).pow(2).mean() + 5e-4 * kl + moved

@torch.no_grad()
def normalise(vae, images):
    """Fold an affine into the convolutions beside the latent: each channel gets mean shift, std 1 / scale."""
    latents = [vae.posterior(x)[0] for x in (images, downsample(images, 2))]
    latents = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1)             # (C, all)
    gain = 1 / (vae.scale * latents.std(1))
    offset = vae.shift - gain * latents.mean(1)
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:vae.C] *= gain[:, None, None, None]
    last.bias[:vae.C] = last.bias[:vae.C] * gain + offset
    last.bias[vae.C:] += 2 * gain.log()
    # zero padding of the decoder's input now stands for another value, so training goes on after this
    first.bias -= first.weight.sum((2, 3)) @ (offset / gain)
    first.weight /= gain[:, None, None]
    return vae

def make_vae(args):
    torch.manual_seed(args.seed)
    vae = VAE(VAEArch(z_channels=16, widths=(32, 64, 64), blocks=1))
    world = World(split="train")
    images, _, labels = World(split="val").sample(range(few(96, args)))

    def crops_at(model, done):
        x, _ = draw(world, 32)
        top, left = torch.randint(33, (2,)).tolist()
        return vae_loss(model, torch.cat([downsample(x[:12], 2), x[12:, :, top:top + 32, left:left + 32]]))

    def both_at(model, done):
        x, _ = draw(world, 24)
        return vae_loss(model, x[:8]) + vae_loss(model, downsample(x[8:], 2))

    def report(model):
        base = downsample(images, 2)
        with torch.no_grad():
            full, small = model.decode(model.encode(images)), model.decode(model.encode(base))
        found = load_classifier(args.out).accuracy(full, labels)
        return f"psnr base {psnr(small, base):.2f} full {psnr(full, images):.2f} texture {found[2]:.3f}"

    # a crop costs a quarter of a full image; those come after, for group norm and attention see all of one
    vae, seconds = train("vae-crops", vae, crops_at, 1600, 1e-3, 0.999, args)
    vae = normalise(vae, world.sample(range(few(512, args)))[0]).train().requires_grad_(True)
    vae, more_seconds = train("vae", vae, both_at, 1500, 6e-4, 0.999, args, report)
    vae = normalise(vae, world.sample(range(few(512, args)))[0])
    state = {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    save(args.out / "sd3.5_tiny.safetensors", state, torch.bfloat16)

    vae, classifier = load_vae(args.out), load_classifier(args.out)
    images, _, labels = World(split="val").sample(range(few(960, args)))
    base = downsample(images, 2)
    with torch.no_grad():
        latents = [torch.cat([vae.encode(x) for x in xs.split(96)]) for xs in (images, base)]
        full, small = (torch.cat([vae.decode(z) for z in zs.split(96)]) for zs in latents)
    record("vae", args, steps=[1600, 1500], seconds=seconds + more_seconds,
           parameters=sum(p.numel() for p in vae.parameters()), psnr_full=psnr(full, images),
           psnr_base=psnr(small, base), latent_mean_base=latents[1].mean().item(),
           latent_std_base=latents[1].std().item(), latent_std_full=latents[0].std().item(),
           full=shares(classifier.accuracy(full, labels)), base=shares(classifier.accuracy(small, labels)))

# ------------------------------------------------------------ the DiT

@torch.no_grad()
def initialise(mmdit):
    """DiT's initialisation: every block starts as the identity, the output at zero; sine-cosine positions."""
    for m in mmdit.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.view(m.weight.shape[0], -1))
            nn.init.zeros_(m.bias)
    for m in [s.adaLN_modulation[1] for b in mmdit.joint_blocks for s in (b.x_block, b.context_block)]:
        nn.init.zeros_(m.weight)
    nn.init.zeros_(mmdit.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(mmdit.final_layer.linear.weight)
    side, quarter = mmdit.arch.table, mmdit.arch.width // 4
    at = torch.arange(side)[:, None] * torch.exp(torch.arange(quarter) * (-math.log(10000) / quarter))
    wave = torch.cat([at.sin(), at.cos()], dim=-1)                          # (side, d / 2)
    column, row = wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)
    mmdit.pos_embed.copy_(torch.cat([column, row], dim=-1).view(1, side * side, -1))
    return mmdit

def make_dit(args):
    world, vae, text = World(split="train"), load_vae(args.out), load_text_encoders(args.out)
    # latents of as many pictures as fit a laptop's memory, both sizes; the pictures then serve many times
    labels, base, full = [], [], []
    with torch.no_grad():
        for first in range(0, few(14400, args), 96):
            images, _, label = world.sample(range(first, first + 96))
            labels.append(label)
            base.append(vae.encode(downsample(images, 2)))
            full.append(vae.encode(images))
    latents = {"base": torch.cat(base), "full": torch.cat(full)}
    captions = [world.caption(label) for label in torch.cat(labels)]
    unique = sorted(set(captions)) + [""]                       # the last one: guidance's other half
    context, pooled = text(unique)
    index = {caption: i for i, caption in enumerate(unique)}
    rows = torch.tensor([index[caption] for caption in captions])
    print(f"dit: {len(rows)} latents, {len(unique)} captions", flush=True)

    def loss_at(model, done):
        # the base size first, then both by turns
        size, count = ("full", 32) if done > 0.25 and torch.rand(()) < 0.5 else ("base", 64)
        pick = torch.randint(len(rows), (count,))
        z = latents[size][pick]
        row = torch.where(torch.rand(count) < 0.1, len(unique) - 1, rows[pick])
        noise = torch.randn_like(z)
        t = shift_timesteps(torch.randn(count).sigmoid(), 3.0)             # logit-normal, shifted
        x_t = z + t[:, None, None, None] * (noise - z)
        # for so few tokens, plain attention is the fast one
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            u = model(x_t, t, context[row], pooled[row])
        return (u.float() - (noise - z)).pow(2).mean()

    torch.manual_seed(args.seed)
    mmdit = MMDiT(MMDiTArch(depth=4, width=192, in_channels=vae.C, table=16, context_dim=context.shape[2],
                            pooled_dim=pooled.shape[1], dual=(0,)))
    initialise(mmdit)
    mmdit, seconds = train("dit", mmdit, loss_at, 4000, 1e-3, 0.999, args)
    state = {f"model.diffusion_model.{k}": v for k, v in mmdit.state_dict().items()}
    save(args.out / "sd3.5_tiny.safetensors", state, torch.bfloat16)
    record("dit", args, steps=4000, seconds=seconds, parameters=sum(p.numel() for p in mmdit.parameters()))

def make_scores(args):
    """Pictures of held-out captions at both sizes, read by the classifier, at several guidances."""
    start = time.time()
    count = few(200, args)
    vae, classifier = load_vae(args.out), load_classifier(args.out)
    mmdit, text = load_mmdit(args.out), load_text_encoders(args.out)
    _, captions, labels = World(split="val").sample(range(count))
    figures = {}
    for size in (32, 64):
        for cfg in (1.0, 2.0, 3.0, 4.5):
            images = torch.cat([
                generate(mmdit, vae, text, captions[i:i + 50], size, size, steps=28, cfg=cfg, shift=3.0,
                         seeds=range(i, min(i + 50, count))) for i in range(0, count, 50)])
            name = f"{size} px, guidance {cfg}"
            figures[name] = shares(classifier.accuracy(images, labels))
            print(f"scores {name}: {figures[name]}", flush=True)
    record("scores", args, seconds=time.time() - start, pictures=count, steps=28, shift=3.0, **figures)

# ------------------------------------------------------------ the VAE learns photographs as well

def make_photographs(args, steps=1600):
    """The VAE goes on with the photographs of assets/photographs.tar beside the world, whose latents stay.

    The transformers know the world's latents: a penalty on what has changed of them holds the encoder there, so
    that this stage may come after theirs. Photographs are seen at both sizes, as E_d and E will see them.
    """
    world = World(split="train")
    vae = load_vae(args.out)
    learned = deepcopy(vae).eval().requires_grad_(False)                    # the encoder whose latents are known
    photographs, held = (ImageDataset(PHOTOGRAPHS, 64, split, crop) for split, crop in (("train", "random"),
                                                                                       ("val", "adm")))
    photographs, _, _ = photographs.sample(range(few(2 * len(photographs), args)))     # two crops of each
    held, _, _ = held.sample(range(few(len(held), args)))
    images, _, labels = World(split="val").sample(range(few(96, args)))

    @torch.no_grad()
    def latents_of(x):
        with torch.autocast("cpu", torch.bfloat16):
            return learned.posterior(x)[0].float()

    def loss_at(model, done):
        x, _ = draw(world, 10)
        photos = photographs[torch.randint(len(photographs), (14,))]
        full, base = x[:4], downsample(x[4:], 2)
        return (vae_loss(model, torch.cat([full, photos[:6]]), latents_of(full))
                + vae_loss(model, torch.cat([base, downsample(photos[6:], 2)]), latents_of(base)))

    def report(model):
        with torch.no_grad():
            full, photos, small = (psnr(model.decode(model.encode(x)), x) for x in
                                   (images, held, downsample(held, 2)))
            read = load_classifier(args.out).accuracy(model.decode(model.encode(images)), labels)
        return f"psnr world {full:.2f} photographs {photos:.2f} base {small:.2f} texture {read[2]:.3f}"

    torch.manual_seed(args.seed)
    vae, seconds = train("photographs", vae.train().requires_grad_(True), loss_at, steps, 1e-3, 0.999, args, report)
    state = {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    save(args.out / "sd3.5_tiny.safetensors", state, torch.bfloat16)

    vae, classifier = load_vae(args.out), load_classifier(args.out)
    images, _, labels = World(split="val").sample(range(few(960, args)))
    figures = {}
    with torch.no_grad():
        for name, x in {"world": images, "world base": downsample(images, 2), "photographs": held,
                        "photographs base": downsample(held, 2)}.items():
            z = torch.cat([vae.encode(part) for part in x.split(96)])
            known = torch.cat([learned.encode(part) for part in x.split(96)])
            y = torch.cat([vae.decode(part) for part in z.split(96)])
            figures[name] = {"psnr": round(psnr(y, x), 3), "latent moved": round(
                ((z - known).pow(2).mean() / known.var()).item(), 5)}
            if name == "world":
                figures[name] |= shares(classifier.accuracy(y, labels))
    record("photographs", args, steps=steps, seconds=seconds, held_photographs=len(held), **figures)

# ------------------------------------------------------------ the aligned DA-VAE

def make_davae(args):
    """Stage 1 by its own command, twice as long as its default, over the finished VAE; kept in bf16."""
    steps = few(1000, args)
    folder = args.work / f"davae-seed{args.seed}"
    flags = ["--model", str(args.out), "--detail-channels", "48", "--size", "64", "--batch", "16", "--lr", "2e-3",
             "--warmup", "20", "--ramp", "200", "--lpips", "0", "--mse", "1", "--steps", str(steps),
             "--seed", str(args.seed), "--held", str(few(192, args)), "--out", str(folder)]
    result = align.train(align.parse_args(flags), 0, 1, "cpu")
    davae = load_davae(folder / "davae.safetensors", load_vae(args.out, torch.bfloat16))
    save_davae(args.out / "davae.safetensors", davae)
    record("davae", args, **{k: result[k] for k in ("steps", "seconds", "lambda_align", "alignment error")},
           **{row: {k: round(v, 4) for k, v in values.items()} for row, values in result["table"].items()})

# ------------------------------------------------------------ a LightningDiT, for the class-conditional chapter

def make_lightningdit(args):
    """imagenet_eval.py's transformer on the same VAE, base size alone; class: shape and texture (not to be seen)."""
    count = few(200, args)
    world, vae = World(split="train"), load_vae(args.out)
    latents, classes = [], []
    with torch.no_grad():
        for first in range(0, few(14400, args), 96):
            images, _, labels = world.sample(range(first, first + 96))
            latents.append(vae.encode(downsample(images, 2)))
            classes.append(labels[:, 0] * len(TEXTURES) + labels[:, 2])
    latents, classes = torch.cat(latents), torch.cat(classes)
    mean, std = latents.mean((0, 2, 3)), latents.transpose(0, 1).flatten(1).std(1)
    data = (latents - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    def loss_at(model, done):
        pick = torch.randint(len(data), (64,))
        y = torch.where(torch.rand(64) < 0.1, model.arch.classes, classes[pick])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return transport_loss(model, data[pick], torch.randn_like(data[pick]), torch.randn(64).sigmoid(), y,
                                  vae.C, 1.0)[0]

    torch.manual_seed(args.seed)
    dit = LightningDiT(LightningDiTArch(depth=4, width=144, head=36, in_channels=vae.C, patch=2, side=4,
                                        classes=len(SHAPES) * len(TEXTURES))).initialise()
    dit, seconds = train("lightningdit", dit, loss_at, 4000, 1e-3, 0.999, args)
    folder = args.out / "lightningdit"
    state, tables = dit.state_dict(), ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    save(folder / "lightningdit.safetensors", {k: state.pop(k) for k in tables}, torch.float32)
    save(folder / "lightningdit.safetensors", state, torch.bfloat16)
    write_statistics(folder, mean, std)
    figures, dit, classifier = {}, load_lightningdit(folder), load_classifier(args.out)
    for cfg in (1.0, 2.5):
        options = imagenet_eval.parse_args(["sample", "--batch", "50", "--steps", "25", "--cfg", str(cfg)])
        x, y = zip(*sample_batches(dit, vae, read_statistics(folder), range(count), options))
        read = classifier.predict(torch.cat(x))
        figures[f"32 px, guidance {cfg}: shape"] = (read[:, 0] == torch.cat(y) // len(TEXTURES)).float().mean().item()
    record("lightningdit", args, steps=4000, seconds=seconds, parameters=sum(p.numel() for p in dit.parameters()),
           pictures=count, **figures)

# ------------------------------------------------------------ main

STAGES = {"classifier": make_classifier, "text": make_text, "vae": make_vae, "dit": make_dit,
          "lightningdit": make_lightningdit, "photographs": make_photographs, "scores": make_scores,
          "davae": make_davae}

def main(args):
    if args.quick and is_tiny(args.out):
        raise InputError("--quick makes a model that is of no use; give it an --out of its own")
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)

if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("--stage", choices=["all", *STAGES], default="all", help="what to make (default: all)")
    p.add_argument("--out", type=Path, default=Path(TINY_MODEL), help="the folder to fill (default: assets/tiny)")
    p.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints (default: runs/tiny)")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data and noise (default: 0)")
    p.add_argument("--quick", action="store_true", help="a few steps of every stage: does it run?")
    run(main, p.parse_args())
