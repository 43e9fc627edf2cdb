"""Chapter 4 - stage 2: warm-start the pretrained transformer on C + D channels, and fine-tune it lightly.

P' and O' start at zero (the model starts as the pretrained one, bit for bit), the detail loss is faded in
(Eq. 12, 13), and LoRA or the whole transformer learns. Then 1024 x 1024 takes the tokens of 512 x 512.

    python finetune_dit.py                      # the embedded model on its world: minutes on two CPU cores
    torchrun --nproc_per_node 8 finetune_dit.py --model stabilityai/stable-diffusion-3.5-medium \\
        --davae davae.safetensors --data photographs/ --cache cache/ --compile

References: DA-VAE (CVPR 2026), section 3.3, Eq. (12), (13); Hu et al. 2021 (LoRA); Esser et al. 2024 (SD3).
"""
import json, math, time
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist, nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from align import (ImageDataset, Log, StepBatches, barrier, format_table, full_tensor, lock, load_checkpoint,
                   parse_run, print0, init_distributed, ema_weights, update, upsample, atomic_write, save_checkpoint)
from assets.world import World, load_classifier
from sample import fuse_details, generate, load_mmdit, load_text_encoders, mmdit_pairs, shift_timesteps
from vae_expand import (SD35_MEDIUM, TINY_MODEL, InputError, Parser, check_size, file_hash, grid, load_davae,
                        load_vae, peak_memory, pick_dtype, read_json, read_metadata, run,
                        save_png)

# ------------------------------------------------------------ the method
def warm_start(dit, detail_channels, zero_init=True):
    """Add P' and O' for D detail channels to an MMDiT or a LightningDiT, in place -> dit
    zero_init: whatever z_d holds, base output as pretrained bit for bit, detail output 0; False: ablation."""
    dit.add_details(detail_channels)
    for module in dit.P_prime, dit.O_prime:
        module.to(next(dit.parameters()).device)                            # float32: they train
        for p in module.parameters() if zero_init else ():
            nn.init.zeros_(p)
    return dit

def omega(n, n_warm):
    """Eq. (12): the detail loss's weight at step n, from 0 to 1 along half a cosine over n_warm steps."""
    return (1 - math.cos(math.pi * n / n_warm)) / 2 if n < n_warm else 1.0

def flow_loss(u_hat, u, C, w):
    """Eq. (13): (||u_hat - u||^2 + w ||u_hat_d - u_d||^2) / (|B| + w |R|), a weighted mean of squares.
    Velocities (B, C + D, h, w), base channels first; w = omega(n) -> scalar"""
    square = (u_hat.float() - u.float())**2
    base, detail = square[:, :C], square[:, C:]
    return (base.sum() + w * detail.sum()) / (base.numel() + w * detail.numel())

class LoRA(nn.Module):
    """up(down(x)) beside a frozen linear, alpha = rank; factors for each of its `parts` (q, k, v)."""
    def __init__(self, linear, rank, parts=1):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(parts, rank, linear.in_features, device=device) / rank)
        self.up = nn.Parameter(torch.zeros(parts, linear.out_features // parts, rank, device=device))

    def forward(self, x):
        h = torch.einsum("...i,pri->...pr", x, self.down)
        return self.linear(x) + torch.einsum("...pr,por->...po", h, self.up).flatten(-2)

    def delta(self):
        """What merging adds to the weight: (out, in)"""
        return torch.einsum("por,pri->poi", self.up, self.down).flatten(0, 1)

def add_lora(mmdit, rank):
    """Freeze an MMDiT but for patch embedders and heads, put LoRA on its image stream, in place -> mmdit
    As the authors did: q, k, v and out of attn and attn2, fc2, the modulation; rank: width / 4 at most."""
    rank = min(rank, mmdit.arch.width // 4)
    mmdit.requires_grad_(False)
    for block in mmdit.joint_blocks:
        stream = block.x_block
        for attn in [stream.attn] + ([stream.attn2] if block.dual else []):
            attn.qkv, attn.proj = LoRA(attn.qkv, rank, parts=3), LoRA(attn.proj, rank)
        stream.mlp.fc2 = LoRA(stream.mlp.fc2, rank)
        stream.adaLN_modulation[1] = LoRA(stream.adaLN_modulation[1], rank)
    for module in mmdit.x_embedder, mmdit.final_layer.linear, mmdit.P_prime, mmdit.O_prime:
        module.float().requires_grad_(True)
    return mmdit

def merge_lora(mmdit):
    """Fold every LoRA into its linear, in place -> mmdit, with the original module names."""
    for parent in list(mmdit.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoRA):
                weight = module.linear.weight
                weight.data = (weight.float() + module.delta()).to(weight.dtype)
                setattr(parent, name, module.linear)
    return mmdit

# ------------------------------------------------------------ caches of latents and text
def fill_shards(folder, manifest, count, rows, rank, ranks, make):
    """shard-00000.safetensors, ... of `rows` rows each, those that are missing, shared out over the ranks.
    make(range of rows) -> {name: tensor}. Errors: InputError if manifest.json says that others are there."""
    about, manifest = folder / "manifest.json", json.loads(json.dumps(manifest, default=str))
    held = read_json(about)                             # without it shards may be anyone's: all are made anew
    differ = [f"{k} {held.get(k)}, now {v}" for k, v in manifest.items() if held and held.get(k) != v]
    if differ:
        raise InputError(f"{folder} holds something else ({'; '.join(differ)}); give another folder")
    at = {i: folder / f"shard-{i // rows:05d}.safetensors" for i in range(0, count, rows)[rank::ranks]}
    for i in tqdm([i for i in at if not (held and at[i].is_file())], folder.name, disable=rank > 0, delay=1):
        tensors = {name: v.contiguous() for name, v in make(range(count)[i:i + rows]).items()}
        if rank == 0 and not about.is_file():           # not before something could be made
            atomic_write(about, lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))
        atomic_write(at[i], partial(save_file, tensors))
    barrier()

def load_encoders(args, device):
    """-> the DAVAE, and the text encoders: captions -> context (B, L, d), pooled (B, d')"""
    where = dict(dtype=pick_dtype(args.dtype, device), device=device)
    davae = load_davae(args.davae, load_vae(args.model, **where)).to(memory_format=torch.channels_last)
    check_size((args.size, args.size), 2 * davae.f)                         # the transformer's patch is 2
    return davae, load_text_encoders(args.model, max_t5=args.max_t5, **where)

def build_cache(folder, args, data, count, rank, ranks, device):
    """Encode `count` pictures and captions once, in bf16; the encoders are loaded if there is need.
    Rows: latents (C + D, h, w), context (L, d), pooled (d'); empty.safetensors: the empty caption's."""
    tools = cache(partial(load_encoders, args, device))

    def make(span):
        (davae, text), parts = tools(), []
        for some in (span[i:i + args.batch] for i in range(0, len(span), args.batch)):
            images, captions, _ = data.sample(some)
            with torch.no_grad():
                parts.append((davae.encode(images.to(device)), *text(captions)))
        latents, context, pooled = (torch.cat(rows).bfloat16().cpu() for rows in zip(*parts))
        return {"latents": latents, "context": context, "pooled": pooled}

    about = {"davae": file_hash(args.davae), "base_vae": read_metadata(args.davae).get("base_vae"),
             "model": args.model, "data": args.data, "size": args.size, "count": count, "max_t5": args.max_t5}
    with lock(folder, rank, wait=True):                                     # two runs may share a cache
        if rank == 0 and not {"manifest.json", "empty.safetensors"} <= {p.name for p in folder.iterdir()}:
            context, pooled = (e.to("cpu", torch.bfloat16).contiguous() for e in tools()[1]([""]))
            empty = partial(save_file, {"context": context, "pooled": pooled})
            atomic_write(folder / "empty.safetensors", empty)
        fill_shards(folder, about, count, 240, rank, ranks, make)           # 240 pictures a file
    for why in getattr(data, "broken", {}).values():                        # others stand in for them
        print(f"skipped: {why}", flush=True)

class LatentCache:
    """The rows of shards, memory-mapped, by align.StepBatches' interface; a seed: each epoch in its own order."""
    def __init__(self, folder, names, seed=None):
        self.shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        self.rows = [(k, i) for k, shard in enumerate(self.shards) for i in range(len(shard[names[-1]]))]
        self.names, self.seed, self.epoch, self.order = names, seed, None, range(len(self.rows))

    def sample(self, positions):
        """-> [a tensor (B, ...) for each name], None, None"""
        rows = []
        for p in positions:
            epoch, i = divmod(p, len(self.rows))
            if self.seed is not None and self.epoch != epoch:
                rng = torch.Generator().manual_seed(self.seed * 10**6 + epoch)
                self.epoch, self.order = epoch, torch.randperm(len(self.rows), generator=rng)
            rows.append(self.rows[self.order[i]])
        return [torch.stack([self.shards[k][name][i] for k, i in rows]) for name in self.names], None, None

# ------------------------------------------------------------ export
def export(path, mmdit, **about):
    """Merge LoRA and write one safetensors in the original key names, P' and O' fused in, for load_mmdit."""
    state = fuse_details(merge_lora(mmdit).state_dict(), mmdit.arch.patch)
    dtype = torch.bfloat16 if any(v.dtype == torch.bfloat16 for v in state.values()) else torch.float32
    state = {f"model.diffusion_model.{k}": v.to("cpu", dtype).contiguous() for k, v in state.items()}
    atomic_write(path, lambda p: save_file(state, p, metadata={k: str(v) for k, v in about.items()}))

def export_diffusers(folder, mmdit):
    """Write transformer/ for diffusers' SD3Transformer2DModel(in_channels=C + D). LoRA must be merged."""
    a, state = mmdit.arch, fuse_details(mmdit.state_dict(), mmdit.arch.patch)
    out = {"pos_embed.pos_embed": state["pos_embed"].contiguous()}
    last = f"joint_blocks.{a.depth - 1}.context_block.adaLN_modulation.1"
    for name, theirs in mmdit_pairs(a.depth).items():
        for leaf in ".weight", ".bias":
            if name + leaf in state:
                parts = state[name + leaf].chunk(len(theirs))               # q, k and v
                if name in ("final_layer.adaLN_modulation.1", last):        # scale before shift there
                    parts = [torch.cat(parts[0].chunk(2)[::-1])]
                out |= {t + leaf: part.contiguous() for t, part in zip(theirs, parts)}
    channels = a.in_channels + a.detail_channels
    config = dict(_class_name="SD3Transformer2DModel", sample_size=128, patch_size=a.patch,
                  num_layers=a.depth, in_channels=channels, out_channels=channels, attention_head_dim=64,
                  num_attention_heads=a.width // 64, joint_attention_dim=a.context_dim,
                  caption_projection_dim=a.width, pos_embed_max_size=a.table, dual_attention_layers=a.dual,
                  pooled_projection_dim=a.pooled_dim, qk_norm="rms_norm" if a.qk_norm else None)
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    save_file(out, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")

# ------------------------------------------------------------ the command
PAPER = dict(size=1024, batch=6, accumulate=2, steps=20_000, lr=1e-4, warmup=500, n_warm=10_000, shift=2.0,
             ema=0.999, every=50, preview=1000, sample_steps=30, images=None)
TINY = dict(size=64, batch=64, accumulate=1, steps=800, lr=2e-3, warmup=20, n_warm=100, shift=1.0,
                ema=0.99, every=20, preview=200, sample_steps=20, images=5760)

def parse_args(argv=None):
    """The command's arguments, as parse_run completes them."""
    p = Parser(__doc__)
    g = p.add_argument_group("model")
    g.add_argument("--model", default=TINY_MODEL, help=f"folder or hub id: {SD35_MEDIUM} (the embedded one)")
    g.add_argument("--davae", metavar="FILE", help="of align.py (runs/align/davae.safetensors, or embedded)")
    g.add_argument("--rank", type=int, default=256, help="of LoRA (256); a quarter of the width at most")
    g.add_argument("--full", action="store_true", help="train the whole transformer (FSDP2 under torchrun)")
    g.add_argument("--no-zero-init", action="store_true", help="ablation: P', O' start at random")
    g.add_argument("--no-schedule", action="store_true", help="ablation: omega = 1 from the first step")
    g = p.add_argument_group("data and training")
    g.add_argument("--data", metavar="PATH", help="images + captions, folder or tars (default: the world)")
    g.add_argument("--images", type=int, help="how many of them to cache (default all; embedded 5760)")
    g.add_argument("--cache", type=Path, help="folder of latents and text embeddings (default OUT/cache)")
    g.add_argument("--max-t5", type=int, default=256, help="T5 tokens (default 256)")
    g.add_argument("--dropout", type=float, default=0.1, help="share of empty captions (default 0.1)")
    g.add_argument("--batch", type=int, help="images a rank and backward pass (default 6; embedded 64)")
    g.add_argument("--accumulate", type=int, help="backward passes a step (default 2; embedded 1)")
    g.add_argument("--n-warm", type=int, help="N_warm of Eq. (12) (default 10000; embedded 100)")
    g.add_argument("--shift", type=float, help="of timesteps, here and in sampling (default 2; embedded 1)")
    g.add_argument("--ema", type=float, help="decay of the averaged weights (default 0.999; embedded 0.99)")
    g.add_argument("--checkpoint", action="store_true", help="recompute activations, to save memory")
    g.add_argument("--preview", type=int, help="steps between previews, 0: none (default 1000; embedded 200)")
    g.add_argument("--cfg", type=float, default=2.5, help="guidance of pictures and table (default 2.5)")
    g.add_argument("--sample-steps", type=int, help="Euler steps of theirs (default 30; embedded 20)")
    g.add_argument("--held", type=int, default=96, help="held-out captions of the table (default 96)")
    g.add_argument("--export-diffusers", type=Path, metavar="DIR", help="also write DIR/transformer/")
    args = parse_run(p, argv, "runs/finetune", PAPER, TINY)
    args.cache = args.cache or args.out / "cache"
    own, shipped = "runs/align/davae.safetensors", str(Path(TINY_MODEL) / "davae.safetensors")
    args.davae = args.davae or (shipped if args.model == TINY_MODEL and not Path(own).is_file() else own)
    return args

def prepare(args, ranks, device):
    """Pretrained transformer -> (mmdit, model): warm-started, LoRA or full; model: as the ranks share it."""
    bf16 = pick_dtype(args.dtype, device, autocast=True) == torch.bfloat16
    half = bf16 and device == "cuda" and not args.full                      # frozen weights need no more
    mmdit = load_mmdit(args.model, torch.bfloat16 if half else torch.float32, device)
    torch.manual_seed(args.seed)
    warm_start(mmdit, int(read_metadata(args.davae)["detail_channels"]), zero_init=not args.no_zero_init)
    mmdit = mmdit.requires_grad_(True) if args.full else add_lora(mmdit, args.rank)
    for block in mmdit.joint_blocks if args.checkpoint else ():
        block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=False)
    if args.compile:
        mmdit.compile_blocks()
    if ranks == 1:
        return mmdit, mmdit
    if not args.full:
        return mmdit, nn.parallel.DistributedDataParallel(mmdit, broadcast_buffers=False)
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device, (ranks,))
    for block in [*mmdit.joint_blocks, mmdit]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)     # sigma stays float32
    return mmdit, mmdit

def studio(args, device):
    """What pictures need, loaded once: {"davae", "real", "prompts", "labels" or None, "embeddings"}"""
    davae, text = load_encoders(args, device)
    val = ImageDataset(args.data, args.size, "val", "adm", False) if args.data else World(args.size, davae.s, "val")
    real, prompts, labels = val.sample(range(8 if args.data else args.held))
    return {"davae": davae, "real": real, "prompts": prompts, "embeddings": (*text(prompts), *text([""])),
            "labels": None if args.data or args.size != 64 else labels}     # of what the classifier reads

def draw(mmdit, vae, scenes, size, args):
    """A picture of every prompt, each of its own seed -> images (N, 3, size, size), milliseconds an image"""
    start, images, prompts = time.time(), [], scenes["prompts"]
    context, pooled, *negative = scenes["embeddings"]
    for some in (slice(i, i + 16) for i in range(0, len(prompts), 16)):
        text = [context[some], pooled[some]] + (negative if args.cfg != 1 else [])
        latents = generate(mmdit, vae, text, prompts[some], size, size, args.sample_steps, args.cfg,
                           args.shift, range(len(prompts))[some], return_latents=True)
        images += [vae.decode(z[None]).float().cpu() for z in latents]      # one at a time, for memory
    return torch.cat(images), 1000 * (time.time() - start) / len(prompts)

def report(args, scenes, device, seconds):
    """The last picture and table: prompts down, what each model makes of them across."""
    dtype, davae, size = pick_dtype(args.dtype, device), scenes["davae"], args.size
    base = load_mmdit(args.model, dtype, device)
    warm = warm_start(load_mmdit(args.model, dtype, device), davae.D).to(dtype)
    tuned = load_mmdit(args.out / "dit.safetensors", dtype, device)
    runs = {"base, up-sampled": (base, davae.vae, size // davae.s), "warm start, step 0": (warm, davae, size),
            "fine-tuned": (tuned, davae, size), "stock at full size": (base, davae.vae, size)}
    table, columns = {}, []
    for name, (mmdit, vae, side) in runs.items():
        images, ms = draw(mmdit, vae, scenes, side, args)
        columns.append(images if side == size else upsample(images, davae.s))
        table[name] = {"ms/image": ms, "tokens": (side // vae.f // mmdit.arch.patch)**2}
    columns.append(scenes["real"])
    if scenes["labels"] is not None:
        classifier, table["real"] = load_classifier(), {}
        for row, images in zip(table.values(), columns):
            scores = 100 * classifier.accuracy(images.cpu(), scenes["labels"])[[2, 0, 1]]
            row |= dict(zip(("texture %", "shape %", "colour %"), scores.tolist()))
    rows = torch.stack([c[:6] for c in columns], dim=1).flatten(0, 1)
    save_png(args.out / "result.png", grid(rows, len(columns), heads=[*runs, "real"]))
    result = {"table": table, "pictures": len(scenes["prompts"]), "cfg": args.cfg, "steps": args.steps,
              "seconds": seconds, "GB": peak_memory(device), "seed": args.seed}
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{format_table(table)}\n{len(scenes['prompts'])} held-out captions, guidance {args.cfg:g};"
          f" trained {args.steps} steps, {seconds:.0f} s, {result['GB']:.2f} GB\n"
          f"{args.out}: result.png, dit.safetensors, accuracy.png; next:\n  python sample.py --model"
          f" {args.model} --dit {args.out / 'dit.safetensors'} --davae {args.davae} --compare")

def main(args):
    rank, ranks, device = init_distributed(args)
    saved = load_checkpoint(args.out, args, {"steps", "device", "every", "preview", "out", "cache", "held", "cfg",
                                      "export_diffusers", "sample_steps", "checkpoint", "compile"})
    if not Path(args.davae).is_file() or "detail_channels" not in read_metadata(args.davae):
        raise InputError(f"--davae {args.davae}: no such file, or no DA-VAE in it; make it with align.py")
    first = saved["step"] if saved else 0
    log, scenes = Log(args.out, first, rank), None
    s = int(read_metadata(args.davae)["scale"])
    data = ImageDataset(args.data, args.size, "train", "adm", flip=False) if args.data else World(args.size, s)
    count = args.images or (len(data.items) if args.data else TINY["images"])
    build_cache(args.cache, args, data, count, rank, ranks, device)
    cached = LatentCache(args.cache, ("latents", "context", "pooled"), args.seed)
    if len(cached.rows) != count:
        raise InputError(f"{args.cache}: {len(cached.rows)} of {count} pictures; do all nodes share it?")
    empty = load_file(args.cache / "empty.safetensors")
    mmdit, model = prepare(args, ranks, device)
    weights = {name: p for name, p in mmdit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = optim.AdamW(weights.values(), args.lr, weight_decay=0.0, fused=device == "cuda")
    how = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    if saved:
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                       options=how)
        for name, e in ema.items():
            v = saved["ema"][name].to(device)
            e.copy_(distribute_tensor(v, e.device_mesh, e.placements) if isinstance(e, DTensor) else v)
        print0(rank, f"{args.out}: resumed at step {first}")
    lora = Counter(k.split(".", 2)[2][:-5] for k in weights if k.endswith(".down"))
    where = ", ".join(f"{count} {name}" for name, count in lora.items())
    where = f"LoRA of rank {min(args.rank, mmdit.arch.width // 4)} on {where}" if lora else "all"
    print0(rank, f"{len(cached.rows)} cached pictures, {sum(p.numel() for p in weights.values()) / 1e6:.1f} M"
        f" parameters train ({where}), shift {args.shift}")
    C, batch = mmdit.arch.in_channels, args.batch * args.accumulate
    autocast = torch.autocast(device, torch.bfloat16, pick_dtype(args.dtype, device, True) == torch.bfloat16)
    batches = StepBatches(cached, batch, rank, ranks).loader(first, args.steps)
    bar = tqdm(batches, initial=first, total=args.steps, disable=rank > 0, leave=False)
    for n, ((latents, context, pooled), _, _) in enumerate(bar, first + 1):
        # the whole global batch's draws, from the step's own seed, for any number of ranks; t: logit-normal
        rng, mine = torch.Generator(device), slice(rank * batch, (rank + 1) * batch)
        rng.manual_seed(args.seed * 10**6 + n - 1)
        noise = torch.randn(ranks * batch, *latents.shape[1:], generator=rng, device=device)[mine]
        t = shift_timesteps(torch.randn(ranks * batch, generator=rng, device=device)[mine].sigmoid(), args.shift)
        drop = torch.rand(ranks * batch, generator=rng, device=device)[mine] < args.dropout
        context = torch.where(drop[:, None, None], empty["context"].to(device), context.to(device))
        pooled = torch.where(drop[:, None], empty["pooled"].to(device), pooled.to(device))
        w, values = 1.0 if args.no_schedule else omega(n - 1, args.n_warm), Counter()       # Eq. (12)
        parts = (v.chunk(args.accumulate) for v in (latents.to(device).float(), noise, t, context, pooled))
        for k, (z_hr, e, sigma, *text) in enumerate(zip(*parts), 1):
            at, u = sigma.view(-1, 1, 1, 1), e - z_hr                       # u: the flow's velocity
            with nullcontext() if k == args.accumulate or model is mmdit else model.no_sync():
                with autocast:
                    u_hat = model((1 - at) * z_hr + at * e, sigma, *text)
                loss = flow_loss(u_hat, u, C, w)                            # Eq. (13)
                (loss / args.accumulate).backward()
            square = (u_hat.detach().float() - u)**2
            terms = {"loss": loss.detach(), "base": square[:, :C].mean(), "detail": square[:, C:].mean()}
            values.update({name: v.item() / args.accumulate for name, v in terms.items()})
        norm = update(n, values["loss"], args, optimizer, weights, ema, args.ema, latents=latents,
                      context=context, pooled=pooled)
        if n % args.every == 0 or n == args.steps:
            log.add(step=n, **values, omega=w, norm=norm, seconds=log.seconds())
        if n % (10 * args.every) == 0 or n == args.steps:
            states = get_state_dict(model, optimizer, options=how)          # on every rank: it gathers
            whole = {name: e.cpu() for name, e in ((k, full_tensor(e)) for k, e in ema.items()) if rank == 0}
            if rank == 0:
                save_checkpoint(args.out, args, step=n, model=states[0], optimizer=states[1], ema=whole)
                log.plot(args.out / "loss.png", ["base", "detail"])
        if args.preview and n % args.preview == 0 and n < args.steps:
            scenes = scenes or studio(args, device)
            with ema_weights(weights, ema), autocast:
                images, _ = draw(mmdit, scenes["davae"], scenes, args.size, args)
            if rank == 0:
                rows = torch.cat([images[:8].cpu(), scenes["real"][:8]])
                save_png(args.out / f"preview-{n:06d}.png", grid(rows, columns=min(8, len(images))))
                if scenes["labels"] is not None:
                    read = load_classifier().accuracy(images.cpu(), scenes["labels"])
                    log.add(step=n, **dict(zip(("shape", "colour", "texture"), read.tolist())))
    if rank == 0:
        tuned = prepare(args, 1, device)[0]
        for name, e in torch.load(args.out / "checkpoint.pt", weights_only=True, mmap=True)["ema"].items():
            tuned.get_parameter(name).data.copy_(e)
        export(args.out / "dit.safetensors", tuned, shift=args.shift, max_t5=args.max_t5,
               davae=file_hash(args.davae))
        if args.export_diffusers:
            export_diffusers(args.export_diffusers, tuned)
        if args.preview:
            scenes = scenes or studio(args, device)
            log.plot(args.out / "accuracy.png", ["texture", "shape", "colour"], log=False)
            report(args, scenes, device, log.seconds())
    barrier()

if __name__ == "__main__":
    run(main, parse_args())
