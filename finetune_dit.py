"""Chapter 4 - stage 2: warm-start the pretrained transformer on C + D channels, and fine-tune it.

P' and O' start at zero (the model starts as the pretrained one, bit for bit), the detail loss is
faded in (Eq. 12, 13), and LoRA or the whole transformer learns. Then 1024 x 1024 takes the tokens
of 512 x 512.

    python finetune_dit.py                  # the embedded model on its world: minutes on two cores
    torchrun --nproc_per_node 8 finetune_dit.py --model stabilityai/stable-diffusion-3.5-medium \\
        --davae davae.safetensors --data photographs/ --cache cache/ --compile

References: DA-VAE (CVPR 2026), section 3.3, Eq. (12), (13); Hu et al. 2021 (LoRA); Esser et al.
2024 (SD3).
"""
import copy, hashlib, json, math, os, time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed as dist, nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from align import (Checkpoints, ImageDataset, Log, StepBatches, Watch, add_run_flags, atomic_write,
                   barrier, check_progress, clip_gradients, ema_weights, format_table, full_tensor,
                   gather_dict, init_distributed, list_changes, load_checkpoint, lock, parse_run,
                   pick_autocast, print0, read_batches, set_lr, step_generator, update_ema,
                   upsample)
from assets.world import World, load_classifier
from sample import (adapter_pairs, base_hash, fuse_details, generate, load_mmdit,
                    load_text_encoders, mmdit_to_diffusers, shift_timesteps)
from vae_expand import (DAVAE, SD35_MEDIUM, TINY_MODEL, InputError, Parser, bucket_sizes,
                        check_size, count_or_0, device_type, file_hash, find_weights, folder_path,
                        grid, is_tiny, listing_digest, load_davae, load_vae, non_negative,
                        peak_memory, pick_dtype, positive, positive_int, read_file, read_json,
                        read_metadata, read_sides, read_torch, run, save_overview, share,
                        write_json)

# ------------------------------------------------------------ the method
def warm_start(dit, detail_channels, zero_init=True):
    """Add P' and O' for D detail channels to an MMDiT or a LightningDiT, in place; returned too.
    zero_init: whatever z_d holds, the base output is the pretrained model's, bit for bit, and the
    detail output is 0. False is for the ablation."""
    dit.add_details(detail_channels)
    for module in dit.P_prime, dit.O_prime:
        module.to(next(dit.parameters()).device)                            # float32: they train
        for p in module.parameters() if zero_init else ():
            nn.init.zeros_(p)
    return dit

def omega(n, n_warm):
    """Eq. (12): the detail loss's weight at step n, from 0 to 1 along half a cosine over n_warm
    steps."""
    return (1 - math.cos(math.pi * n / n_warm)) / 2 if n < n_warm else 1.0

def flow_loss(u_hat, u, C, w, weight=None):
    """Eq. (13): (||u_hat - u||^2 + w ||u_hat_d - u_d||^2) / (|B| + w |R|), a weighted mean of squares.
    Velocities (B, C + D, h, w), base channels first; w = omega(n); weight (B,): a further weight for
    each picture -> scalar"""
    square = (u_hat.float() - u.float())**2
    if weight is not None:
        square = square * weight.view(-1, 1, 1, 1)
    base = square[:, :C]
    detail = square[:, C:]
    return (base.sum() + w * detail.sum()) / (base.numel() + w * detail.numel())

def min_snr_weight(t, gamma):
    """The weight that the released SD3.5 code gives a picture at time t; not in the paper.
    t (B,) -> (B,). That code's loss is on x_0, which is t^2 times the loss on u, and it is
    multiplied by min(SNR, gamma), with SNR = (1 - t) / t."""
    return torch.minimum(t * (1 - t), gamma * t**2)

class LoRA(nn.Module):
    """up(down(x)) beside a frozen linear, alpha = rank; factors for each of its `parts`
    (q, k, v)."""
    def __init__(self, linear, rank, parts=1):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(parts, rank, linear.in_features, device=device) / rank)
        self.up = nn.Parameter(torch.zeros(parts, linear.out_features // parts, rank,
                                           device=device))

    def forward(self, x):
        h = nn.functional.linear(x, self.down.flatten(0, 1))                # of all parts at once
        h = h.unflatten(-1, self.down.shape[:2])                            # (..., parts, rank)
        return self.linear(x) + torch.einsum("...pr,por->...po", h, self.up).flatten(-2)

    def delta(self):
        """What merging adds to the weight: (out, in)"""
        return torch.einsum("por,pri->poi", self.up, self.down).flatten(0, 1)

def add_lora(mmdit, rank):
    """Freeze an MMDiT but for patch embedders and heads, put LoRA on its image stream, in place.
    As the authors did: q, k, v and out of attn and attn2, fc2, the modulation; rank:
    width / 4 at most."""
    rank = min(rank, mmdit.arch.width // 4)
    mmdit.requires_grad_(False)
    for block in mmdit.joint_blocks:
        stream = block.x_block
        for attn in [stream.attn] + ([stream.attn2] if block.dual else []):
            attn.qkv = LoRA(attn.qkv, rank, parts=3)
            attn.proj = LoRA(attn.proj, rank)
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
def missing_shards(folder, manifest, count, rows, rank, ranks, beside=None):
    """What `folder` lacks of shard-00000.safetensors, ... of `rows` rows each, `count` in all; this rank's
    part -> {path: range of rows}
    beside: from a row to the path of a file of its own, without which its shard is not whole
    Raises: InputError if manifest.json says that the folder holds something else, naming what differs."""
    manifest = json.loads(json.dumps(manifest, default=str))
    known = read_json(folder / "manifest.json")
    if not known and rank == 0:     # the shards may be anyone's, and would later pass for this run's
        for path in folder.glob("shard-[0-9][0-9][0-9][0-9][0-9].safetensors"):
            path.unlink()
    barrier()                                           # before any rank writes it
    changes = list_changes(known, manifest) if known else []
    if changes:
        differ = "; ".join(f"{name} {before}, now {now}" for name, before, now in changes)
        raise InputError(f"{folder} holds something else ({differ}); give another folder")
    missing = {}
    for first in range(0, count, rows)[rank::ranks]:
        path = folder / f"shard-{first // rows:05d}.safetensors"
        span = range(first, min(first + rows, count))
        if not path.is_file() or beside and not all(beside(i).is_file() for i in span):
            missing[path] = span
    return missing

def write_shard(path, manifest, rank, **tensors):
    """Write one shard. Rank 0 writes the manifest before its first shard, and no earlier, so that a run
    that fails at once leaves none."""
    if rank == 0 and not (path.parent / "manifest.json").is_file():
        write_json(path.parent / "manifest.json", manifest)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write(path, partial(save_file, tensors))

def load_encoders(args, device):
    """-> the DAVAE, and the text encoders: captions -> context (B, L, d), pooled (B, d')"""
    dtype = pick_dtype(args.dtype, device)
    davae = load_davae(args.davae, load_vae(args.model, dtype, device))
    davae.to(memory_format=torch.channels_last)
    check_size((args.size, args.size), 2 * davae.f)                 # the transformer's patch is 2
    return davae, load_text_encoders(args.model, args.max_t5, dtype, device)

def text_hash(model):
    """What tells the text encoders of `model` from others: 16 hex digits of their files' sizes and of
    three parts of each file. The whole files are 11 GB, too much to read at every start."""
    digest = hashlib.sha256()
    for part in "clip_l", "clip_g", "t5":
        for path in find_weights(model, part):
            size = path.stat().st_size
            digest.update(f"{part} {size}".encode())
            with open(path, "rb") as file:
                for start in 0, size // 2, max(size - 2**20, 0):
                    file.seek(start)
                    digest.update(file.read(2**20))
    return digest.hexdigest()[:16]

SHARD_ROWS = 240                        # pictures a file of the cache

@torch.no_grad()
def build_cache(folder, args, data, count, rank, ranks, device, encoders=None):
    """Encode `count` pictures and captions once, in bf16. The encoders are loaded if anything is missing
    -> the two of load_encoders, for the next cache to use, or None if they were not needed.
    Rows: latents (C + D, h, w), context (L, d), pooled (d'). empty.safetensors holds the empty
    caption's context and pooled."""
    local = Path(args.model).exists()
    size = getattr(data, "size", args.size)
    manifest = {
        "davae": file_hash(args.davae),
        "base_vae": read_metadata(args.davae).get("base_vae"),
        "model": str(Path(args.model).resolve() if local else args.model),
        "text_encoders": text_hash(args.model),
        "max_t5": args.max_t5,
        "dtype": str(pick_dtype(args.dtype, device)),
        "data": args.data,
        "listing": args.data_digest,
        "count": count,
        "size": size if isinstance(size, int) else list(size),
        "drop_small": args.drop_small,
        "flip": args.flip,
        "captions": args.captions if args.captions > 1 else None}
    with lock(folder, rank, wait=True):                                 # two runs may share a cache
        missing = missing_shards(folder, manifest, count, SHARD_ROWS, rank, ranks)
        empty = folder / "empty.safetensors"
        empty_missing = rank == 0 and not (empty.is_file() and (folder / "manifest.json").is_file())
        if missing or empty_missing:
            encoders = encoders or load_encoders(args, device)
            davae, encode_text = encoders
        if empty_missing:
            context, pooled = encode_text([""])
            embeddings = {"context": context.bfloat16().cpu(), "pooled": pooled.bfloat16().cpu()}
            atomic_write(empty, partial(save_file, embeddings))

        # pictures are decoded by worker processes while the device encodes those before them
        spans = {path: split_batches(rows, args.batch) for path, rows in missing.items()}
        workers = min(4, os.cpu_count() or 1) if args.data else 0
        batches = read_batches(data, [span for shard in spans.values() for span in shard], workers)
        longest = Counter()                             # which text encoder cut how many captions
        for path in tqdm(spans, folder.name, disable=rank > 0, delay=1):
            rows = {"latents": [], "context": [], "pooled": []}
            if args.flip:
                rows["latents_flip"] = []
            for _ in spans[path]:
                images, captions, _ = next(batches)
                captions = spread_captions(captions, args.captions)
                for caption in captions:
                    longest.update(encode_text.lost(caption).keys())
                images = images.to(device)
                rows["latents"].append(davae.encode(images).bfloat16().cpu())
                if args.flip:
                    rows["latents_flip"].append(davae.encode(images.flip(3)).bfloat16().cpu())
                context, pooled = encode_text(captions)
                if args.captions > 1:                   # (B, captions, ...)
                    context = context.unflatten(0, (-1, args.captions))
                    pooled = pooled.unflatten(0, (-1, args.captions))
                rows["context"].append(context.bfloat16().cpu())
                rows["pooled"].append(pooled.bfloat16().cpu())
            write_shard(path, manifest, rank, **{name: torch.cat(parts)
                                                 for name, parts in rows.items()})
        next(batches, None)                             # read_batches tells at its end what it noted
        for name, number in longest.items():
            print(f"{number} captions are longer than {name} reads; their ends are lost",
                  flush=True)
        barrier()
    return encoders

def spread_captions(captions, count):
    """List of B captions -> list of B x count captions, picture by picture. With a count above 1 each
    line of a caption that is not blank is a caption of its own, and where there are too few, lines
    are repeated. Only a line feed ends a line, with or without a carriage return."""
    if count == 1:
        return captions
    lines = [[line.strip() for line in caption.split("\n") if line.strip()] or [""]
             for caption in captions]
    return [own[k % len(own)] for own in lines for k in range(count)]

def split_batches(positions, batch):
    """Consecutive parts of `batch` positions each; the last may have fewer."""
    return [positions[i:i + batch] for i in range(0, len(positions), batch)]

class LatentCache:
    """The rows of shards, memory-mapped, for StepBatches; with a seed, each epoch in its own order.
    Shards are opened by whichever process reads them: a worker is handed paths, not gigabytes.
    Raises: InputError for a broken shard, and for more or fewer rows than manifest.json counts."""
    def __init__(self, folder, names, seed=None):
        self.names = names
        self.seed = seed
        self.broken = {}                                # unreadable pictures: a cache has none
        self.notes = set()
        self.paths = sorted(folder.glob("shard-*.safetensors"))
        self.opened = None
        lengths = [len(shard[names[-1]]) for shard in self.shards]
        self.ends = np.cumsum([0, *lengths])  # the first row of each shard, and one beyond the last
        expected = read_json(folder / "manifest.json").get("count", len(self))
        if self.paths and len(self) != expected:
            raise InputError(f"{folder}: {len(self)} rows in {len(self.paths)} shards, of {expected}"
                             " in manifest.json; give the command that makes them again, or move away"
                             " the shards that are not its own")
        self.epoch = None
        self.order = None

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        return vars(self) | {"opened": None}

    @property
    def shards(self):
        """One {name: tensor} a file."""
        if self.opened is None:
            self.opened = [read_file(path) for path in self.paths]
        return self.opened

    def row_at(self, position):
        """The row at a position of the endless sequence of epochs -> its shard, its place in it."""
        epoch, row = divmod(position, len(self))
        if self.seed is not None:
            if self.epoch != epoch:
                rng = step_generator(self.seed, epoch)
                self.epoch = epoch
                self.order = torch.randperm(len(self), generator=rng)
            row = int(self.order[row])
        shard = int(np.searchsorted(self.ends, row, side="right")) - 1
        return self.shards[shard], row - int(self.ends[shard])

    def sample(self, positions):
        """-> a tensor (B, ...) for each name"""
        rows = [self.row_at(position) for position in positions]
        return [torch.stack([shard[name][i] for shard, i in rows]) for name in self.names]

# ------------------------------------------------------------ buckets of aspect ratios
def split_buckets(data, sizes, at_least, rank, ranks):
    """Sort pictures by shape, each to the size of the nearest ratio
    -> {(height, width): data set of those pictures}
    A size that gets fewer pictures than `at_least`, those of one step, gives them to the next nearest
    size. Files without a readable header are named, counted in data.broken, and left out.
    Raises: InputError if there are too many of those."""
    ratios = {}
    for number in tqdm(range(len(data))[rank::ranks], "headers", disable=rank > 0, delay=1):
        item = data.items[number]
        try:
            height, width = read_sides(item.place)
            ratios[number] = math.log(width / height)
        except InputError as e:
            print(f"skipped: {e}", flush=True)
            data.broken[item.name] = str(e)
    data.broken.update(gather_dict(data.broken))
    data.check_broken()
    ratios = dict(sorted(gather_dict(ratios).items()))
    sizes = list(sizes)
    while True:
        members = {size: [] for size in sizes}
        for number, ratio in ratios.items():
            distances = [abs(math.log(width / height) - ratio) for height, width in sizes]
            members[sizes[distances.index(min(distances))]].append(number)
        fewest = min(sizes, key=lambda size: len(members[size]))
        if len(members[fewest]) >= at_least or len(sizes) == 1:
            break
        sizes.remove(fewest)
    buckets = {}
    for size, numbers in members.items():
        buckets[size] = copy.copy(data)
        buckets[size].items = data.items.subset(numbers)
        buckets[size].size = size
        buckets[size].notes = set()
        buckets[size].order = range(len(numbers))
    return buckets

class BucketCache:
    """The caches of all buckets as one data set, for StepBatches. All pictures of a step are of one
    bucket, the same on all ranks. An epoch has every whole batch of every bucket, in an order of
    its own."""
    def __init__(self, caches, global_batch, seed):
        self.caches = caches
        self.global_batch = global_batch
        self.seed = seed
        self.broken = {}
        self.notes = set()
        self.batches = [(bucket, k) for bucket, cache in enumerate(caches)
                        for k in range(max(1, len(cache) // global_batch))]
        self.epoch = None
        self.order = None

    def __len__(self):
        return sum(map(len, self.caches))

    def sample(self, positions):
        """A range of positions of a step -> a tensor (B, ...) for each name of the caches"""
        step, offset = divmod(positions[0], self.global_batch)
        epoch, i = divmod(step, len(self.batches))
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = torch.randperm(len(self.batches),
                                        generator=step_generator(self.seed, epoch))
        bucket, k = self.batches[int(self.order[i])]
        cache = self.caches[bucket]
        first = epoch * len(cache) + k * self.global_batch + offset
        return cache.sample(range(first, first + len(positions)))

def open_cache(folder, args, count):
    """-> the LatentCache in a folder, with the names that `args` train on
    Raises: InputError if it does not hold `count` pictures: then nodes do not share the disk."""
    names = ("latents", "context", "pooled") + (("latents_flip",) if args.flip else ())
    cache = LatentCache(folder, names, args.seed)
    if len(cache) != count:
        raise InputError(f"{folder}: {len(cache)} of {count} pictures; do all nodes share it?")
    return cache

def make_caches(args, data, count, rank, ranks, device):
    """Build what is missing of the cache, or with --buckets of each bucket's
    -> LatentCache or BucketCache, {name: tensor} of the empty caption's embedding"""
    if not args.buckets:
        build_cache(args.cache, args, data, count, rank, ranks, device)
        return open_cache(args.cache, args, count), read_file(args.cache / "empty.safetensors")
    scale = int(read_metadata(args.davae)["scale"])
    multiple = 2 * scale * load_vae(args.model).f                   # the transformer's patch is 2
    global_batch = ranks * args.batch * args.accumulate
    data.items = data.items.subset(range(count))
    caches = {}
    encoders = None
    buckets = split_buckets(data, bucket_sizes(args.size, multiple), global_batch, rank, ranks)
    for (height, width), part in buckets.items():
        folder = args.cache / f"{width}x{height}"
        encoders = build_cache(folder, args, part, len(part), rank, ranks, device, encoders)
        caches[folder.name] = open_cache(folder, args, len(part))
    counts = ", ".join(f"{name} {len(cache)}" for name, cache in caches.items())
    print0(rank, f"{len(caches)} buckets ({counts}); --compile makes three graphs for each")
    return (BucketCache(list(caches.values()), global_batch, args.seed),
            read_file(folder / "empty.safetensors"))

# ------------------------------------------------------------ export
def export(path, mmdit, **metadata):
    """Merge LoRA and write one safetensors in the original key names, P' and O' fused in,
    for load_mmdit."""
    export_state(path, merge_lora(mmdit).state_dict(), mmdit.arch, **metadata)

def export_state(path, state, arch, **metadata):
    """Write the state dict of an MMDiT without LoRA; see export."""
    state = fuse_details(state, arch.patch)
    half = any(v.dtype == torch.bfloat16 for v in state.values())
    dtype = torch.bfloat16 if half else torch.float32
    state = {f"model.diffusion_model.{k}": v.to("cpu", dtype).contiguous()
             for k, v in state.items()}
    metadata = {k: str(v) for k, v in metadata.items()}
    atomic_write(path, partial(save_file, state, metadata=metadata))

def export_adapter(path, trained, arch, base, **metadata):
    """Write what LoRA training changed, for sample.py --dit over the base model, and for diffusers
    trained: {name: tensor} of the LoRA factors, patch embedders and heads; base:
    base_hash of the frozen model.
    Factors have the names of diffusers' LoRA loader; the widened patch embedder and head ours,
    under "davae."."""
    state = {}
    for name, parts in adapter_pairs(arch.depth).items():
        if f"{name}.down" in trained:
            for k, part in enumerate(parts):            # q, k and v have factors of their own
                state[f"{part}.lora_A.weight"] = trained[f"{name}.down"][k]
                state[f"{part}.lora_B.weight"] = trained[f"{name}.up"][k]
    rest = {name: tensor for name, tensor in trained.items() if not name.endswith((".down", ".up"))}
    state |= {f"davae.{name}": tensor for name, tensor in fuse_details(rest, arch.patch).items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {k: str(v) for k, v in metadata.items()} | {"adapter_over": base}
    atomic_write(path, partial(save_file, state, metadata=metadata))

def export_diffusers(folder, mmdit):
    """Write transformer/ for diffusers' SD3Transformer2DModel(in_channels=C + D).
    LoRA must be merged."""
    a = mmdit.arch
    state = mmdit_to_diffusers(fuse_details(mmdit.state_dict(), a.patch), a.depth)
    channels = a.in_channels + a.detail_channels
    config = dict(_class_name="SD3Transformer2DModel", sample_size=128, patch_size=a.patch,
                  num_layers=a.depth, in_channels=channels, out_channels=channels,
                  attention_head_dim=64, num_attention_heads=a.width // 64,
                  joint_attention_dim=a.context_dim, caption_projection_dim=a.width,
                  pos_embed_max_size=a.table, dual_attention_layers=a.dual,
                  pooled_projection_dim=a.pooled_dim, qk_norm="rms_norm" if a.qk_norm else None)
    (folder / "transformer").mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "transformer" / "diffusion_pytorch_model.safetensors",
                 partial(save_file, state))
    write_json(folder / "transformer" / "config.json", config)

# ------------------------------------------------------------ the command
PAPER = dict(size=1024, batch=6, accumulate=2, steps=20_000, lr=1e-4, warmup=500, n_warm=10_000,
             shift=2.0, ema=0.999, every=50, preview=1000, sample_steps=30)
TINY = dict(size=64, batch=64, accumulate=1, steps=800, lr=2e-3, warmup=20, n_warm=100, shift=1.0,
                ema=0.99, every=20, preview=200, sample_steps=20)

def parse_args(argv=None):
    """The command's arguments, as parse_run completes them."""
    p = Parser(__doc__)
    g = p.add_argument_group("model")
    g.add_argument("--model", default=TINY_MODEL,
                   help=f"Folder or hub id, such as {SD35_MEDIUM} (default: the embedded model).")
    g.add_argument("--davae", metavar="FILE",
                   help="DA-VAE of align.py (default runs/align/davae.safetensors, else the"
                        " embedded one).")
    what_trains = g.add_mutually_exclusive_group()
    what_trains.add_argument("--rank", type=positive_int, default=256,
                             help="LoRA rank (default 256, capped at width / 4).")
    what_trains.add_argument("--full", action="store_true",
                             help="Train the whole transformer, under torchrun by FSDP2.")
    g.add_argument("--no-zero-init", action="store_true",
                   help="Ablation: P' and O' start at random.")
    g.add_argument("--no-schedule", action="store_true",
                   help="Ablation: omega is 1 from the first step.")

    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="PATH",
                   help="Folder or tars of images with captions (default: the embedded world).")
    g.add_argument("--no-captions", action="store_true", help="Train on pictures without captions.")
    g.add_argument("--drop-small", action="store_true",
                   help="Skip pictures smaller than --size, and take others (default: enlarge them).")
    g.add_argument("--buckets", action="store_true",
                   help="Train on aspect ratios from 1:2 to 2:1, each picture at the nearest, with"
                        " about --size squared pixels (default: crop all to a square).")
    g.add_argument("--flip", action="store_true",
                   help="Cache mirror images too, and train on both; not for pictures that hold text"
                        " or show hands.")
    g.add_argument("--captions", type=positive_int, default=1, metavar="N",
                   help="Take N captions a picture, one of them a step: lines of its .txt, or a"
                        " list under \"texts\" in the metadata (default 1: all of its text).")
    g.add_argument("--images", type=positive_int,
                   help="Number of images to cache (default all; embedded 5760).")
    g.add_argument("--cache", type=folder_path,
                   help="Folder of the latents and text embeddings (default OUT/cache).")
    g.add_argument("--max-t5", type=positive_int, default=256,
                   help="Number of T5 tokens (default 256).")

    g = p.add_argument_group("training")
    g.add_argument("--batch", type=positive_int,
                   help="Images on a rank in one backward pass (default 6; embedded 64).")
    g.add_argument("--accumulate", type=positive_int,
                   help="Backward passes in one step (default 2; embedded 1).")
    g.add_argument("--dropout", type=share, default=0.1,
                   help="Share of captions replaced by the empty one, for guidance (default 0.1).")
    g.add_argument("--n-warm", type=count_or_0,
                   help="N_warm of Eq. (12) (default 10000; embedded 100).")
    g.add_argument("--min-snr", type=positive, metavar="GAMMA",
                   help="Weigh timesteps by min-SNR, as the released code does with GAMMA 5"
                        " (default: no weights).")
    g.add_argument("--shift", type=positive,
                   help="Timestep shift in training and in previews (default 2; embedded 1).")
    g.add_argument("--ema", type=share,
                   help="Decay of the averaged weights (default 0.999; embedded 0.99).")
    g.add_argument("--checkpoint", action="store_true",
                   help="Recompute activations in the backward pass, to save memory.")

    g = p.add_argument_group("previews and results")
    g.add_argument("--preview", type=count_or_0,
                   help="Steps between two previews, 0 for none (default 1000; embedded 200).")
    g.add_argument("--cfg", type=non_negative, default=2.5,
                   help="Guidance of previews and of the final table (default 2.5).")
    g.add_argument("--sample-steps", type=positive_int,
                   help="Euler steps of previews and of the final table (default 30; embedded 20).")
    g.add_argument("--held", type=positive_int, default=96,
                   help="Number of held-out captions in the final table (default 96).")
    g.add_argument("--keep-every", type=positive_int, metavar="STEPS",
                   help="Also keep the averaged weights every so many steps: OUT/adapter-..."
                        " .safetensors, with --full OUT/dit-... .")
    g.add_argument("--export-diffusers", type=Path, metavar="DIR",
                   help="Also write the result as DIR/transformer, for diffusers.")
    add_run_flags(p, "runs/finetune", PAPER, TINY)
    args = parse_run(p, argv, PAPER, TINY)
    args.cache = args.cache or args.out / "cache"
    if args.images is None and is_tiny(args.model) and not args.data:
        args.images = 5760                              # of a world without end
    if args.davae is None:
        args.davae = "runs/align/davae.safetensors"
        if is_tiny(args.model) and not Path(args.davae).is_file():
            args.davae = str(Path(TINY_MODEL) / "davae.safetensors")
    return args

def build_model(args, ranks, device):
    """Pretrained transformer -> (mmdit, model): warm-started, LoRA or full; model:
    as the ranks share it."""
    bf16 = pick_dtype(args.dtype, device, autocast=True) == torch.bfloat16
    half = bf16 and device_type(device) == "cuda" and not args.full    # frozen weights need no more
    mmdit = load_mmdit(args.model, torch.bfloat16 if half else torch.float32, device)
    torch.manual_seed(args.seed)
    warm_start(mmdit, int(read_metadata(args.davae)["detail_channels"]),
               zero_init=not args.no_zero_init)
    mmdit = mmdit.requires_grad_(True) if args.full else add_lora(mmdit, args.rank)
    mmdit.checkpoint_blocks = args.checkpoint
    if args.compile:
        mmdit.compile_blocks()
    if ranks == 1:
        return mmdit, mmdit
    if not args.full:
        return mmdit, nn.parallel.DistributedDataParallel(mmdit, broadcast_buffers=False)
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32,
                                  cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device_type(device), (ranks,))
    for block in [*mmdit.joint_blocks, mmdit]:
        # sigma stays float32
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return mmdit, mmdit

class Draws(NamedTuple):
    """What a step draws for this rank."""
    noise: torch.Tensor                 # like the latents
    t: torch.Tensor                     # (B,) in [0, 1]
    drop: torch.Tensor                  # (B,): the empty caption?
    flip: torch.Tensor                  # (B,): the mirror image, where there is one?
    caption: torch.Tensor               # (B,) in [0, 1), on the CPU: which of several captions

def draw_noise(seed, step, rank, ranks, batch, latent_shape, shift, dropout, device):
    """The whole global batch's draws, from the step's own seed, cut to this rank's part:
    any number of ranks draws the same. t is logit-normal, shifted (Esser et al. 2024)."""
    rng = step_generator(seed, step, device)
    own = slice(rank * batch, (rank + 1) * batch)
    # (B, C+D, h, w)
    noise = torch.randn(ranks * batch, *latent_shape, generator=rng, device=device)[own]
    t = torch.randn(ranks * batch, generator=rng, device=device)[own].sigmoid()              # (B,)
    drop = torch.rand(ranks * batch, generator=rng, device=device)[own] < dropout            # (B,)
    flip = torch.rand(ranks * batch, generator=rng, device=device)[own] < 0.5
    on_cpu = step_generator(seed, step)                                 # where the captions lie
    caption = torch.rand(ranks * batch, generator=on_cpu)[own]
    return Draws(noise, shift_timesteps(t, shift), drop, flip, caption)

def training_loss(model, z_hr, noise, t, context, pooled, C, detail_weight, autocast, min_snr=None):
    """Eq. (13) at x_t = (1 - t) z_hr + t noise. z_hr, noise (B, C + D, h, w), t (B,),
    text (B, L, d), (B, d')
    -> loss, {name: detached scalar}: the loss, and the mean square over base and over detail
    channels."""
    sigma = t.view(-1, 1, 1, 1)
    u = noise - z_hr                                                        # the flow's velocity
    with autocast:
        u_hat = model((1 - sigma) * z_hr + sigma * noise, t, context, pooled)
    weight = min_snr_weight(t, min_snr) if min_snr else None
    loss = flow_loss(u_hat, u, C, detail_weight, weight)
    square = (u_hat.detach().float() - u)**2
    return loss, {"loss": loss.detach(), "base": square[:, :C].mean(),
                  "detail": square[:, C:].mean()}

class PreviewInputs(NamedTuple):
    """What previews need, loaded once. labels: (N, 4) where the classifier reads such pictures,
    else None."""
    davae: DAVAE
    images: torch.Tensor            # real ones, (N, 3, size, size)
    prompts: list
    labels: torch.Tensor
    embeddings: tuple               # context, pooled of the prompts; then of the empty prompt

def load_preview_inputs(args, device):
    """Held-out captions with their pictures, and the networks around the transformer
    -> PreviewInputs"""
    davae, text = load_encoders(args, device)
    if args.data:
        val_data = ImageDataset(args.data, args.size, "val", "adm", flip=False)
        count = min(8, len(val_data))                   # none of them twice
    else:
        val_data = World(args.size, davae.s, "val")
        count = args.held
    images, prompts, labels = val_data.sample(range(count))
    prompts = spread_captions(prompts, args.captions)[::args.captions]      # the first of each
    if args.data or args.size != 64:
        labels = None
    return PreviewInputs(davae, images, prompts, labels, (*text(prompts), *text([""])))

def sample_previews(mmdit, vae, inputs, size, args):
    """A picture of every prompt, each of its own seed
    -> images (N, 3, size, size), milliseconds an image"""
    start = time.time()
    images = []
    context, pooled, *negative = inputs.embeddings
    for first in range(0, len(inputs.prompts), 16):
        span = slice(first, first + 16)
        text = [context[span], pooled[span]] + (negative if args.cfg > 1 else [])
        prompts = inputs.prompts[span]
        seeds = range(first, first + len(prompts))
        latents = generate(mmdit, vae, text, prompts, size, size, args.sample_steps, args.cfg,
                           args.shift, seeds, return_latents=True)
        images += [vae.decode(z[None]).float().cpu() for z in latents]  # one at a time, for memory
    return torch.cat(images), 1000 * (time.time() - start) / len(inputs.prompts)

def report(args, inputs, device, seconds):
    """The last picture and table: prompts down, what each model makes of them across."""
    dtype = pick_dtype(args.dtype, device)
    davae = inputs.davae
    size = args.size
    base = load_mmdit(args.model, dtype, device)
    warm = warm_start(load_mmdit(args.model, dtype, device), davae.D).to(dtype)
    tuned = load_mmdit(args.out / "dit.safetensors", dtype, device)
    runs = {"base, up-sampled": (base, davae.vae, size // davae.s),
            "warm start, step 0": (warm, davae, size),
            "fine-tuned": (tuned, davae, size), "stock at full size": (base, davae.vae, size)}
    table = {}
    columns = []
    for name, (mmdit, vae, side) in runs.items():
        images, ms = sample_previews(mmdit, vae, inputs, side, args)
        columns.append(images if side == size else upsample(images, davae.s))
        table[name] = {"ms/image": ms, "tokens": (side // vae.f // mmdit.arch.patch)**2}
    columns.append(inputs.images)
    if inputs.labels is not None:
        classifier = load_classifier()
        table["real"] = {}
        for row, images in zip(table.values(), columns):
            scores = 100 * classifier.accuracy(images.cpu(), inputs.labels)[[2, 0, 1]]
            row |= dict(zip(("texture %", "shape %", "colour %"), scores.tolist()))
    rows = torch.stack([c[:4] for c in columns], dim=1).flatten(0, 1)
    save_overview(args.out / "result.png", grid(rows, len(columns), heads=[*runs, "real"]))
    result = {"table": table, "pictures": len(inputs.prompts), "cfg": args.cfg, "steps": args.steps,
              "seconds": seconds, "GB": peak_memory(device), "seed": args.seed}
    write_json(args.out / "result.json", result)
    written = "result.png, dit.safetensors" + (", accuracy.png" if inputs.labels is not None else "")
    print(f"\n{format_table(table)}\n{len(inputs.prompts)} held-out captions, guidance"
          f" {args.cfg:g}; trained {args.steps} steps, {seconds:.0f} s, {result['GB']:.2f} GB\n"
          f"{args.out}: {written}; next:\n  python sample.py"
          f" --model {args.model} --dit {args.out / 'dit.safetensors'} --davae {args.davae}"
          " --compare")

def describe_trainable(weights, args, arch):
    """{name: parameter} that train -> a text: "LoRA of rank 48 on 5 x_block.attn.qkv, ..." or "all"."""
    factors = [name for name in weights if name.endswith(".down")]
    # joint_blocks.3.x_block.attn.qkv.down -> x_block.attn.qkv
    places = Counter(name.split(".", 2)[2].removesuffix(".down") for name in factors)
    if not places:
        return "all"
    listed = ", ".join(f"{count} {place}" for place, count in places.items())
    return f"LoRA of rank {min(args.rank, arch.width // 4)} on {listed}"

def open_data(args):
    """--data's pictures with captions, or the embedded world's
    -> data set, how many of it to cache.
    Raises: InputError if no picture has a caption and --no-captions does not say that this is
    meant."""
    if not args.data and args.buckets:
        raise InputError("--buckets: the embedded world is square; give --data")
    if not args.data and args.flip:
        raise InputError("--flip: the embedded world's stripes rise or fall, as their captions say;"
                         " give --data")
    if not args.data:
        scale = int(read_metadata(args.davae)["scale"])
        return World(args.size, scale), args.images or 5760
    data = ImageDataset(args.data, args.size, "train", "adm", flip=False,
                        drop_small=args.drop_small)
    if not args.no_captions and not data.items.has_captions():
        raise InputError(f"--data {args.data}: none of {len(data.items)} pictures has a caption"
                         " (name.txt or metadata.jsonl); give --no-captions if that is meant")
    return data, min(args.images or len(data), len(data))                   # none of them twice

def restore(saved, model, optimizer, ema, options, device):
    """Put a checkpoint's weights, optimizer state and averaged weights back, sharded as the model
    is."""
    set_state_dict(model, optimizer, model_state_dict=saved["model"],
                   optim_state_dict=saved["optimizer"], options=options)
    for name, average in ema.items():
        tensor = saved["ema"][name].to(device)
        if isinstance(average, DTensor):
            tensor = distribute_tensor(tensor, average.device_mesh, average.placements)
        average.copy_(tensor)

def preview(args, step, mmdit, inputs, rank, log):
    """Draw pictures by the averaged weights, above real ones; in the embedded world, log what the
    classifier reads in them."""
    images, _ = sample_previews(mmdit, inputs.davae, inputs, args.size, args)
    if rank > 0:
        return
    rows = torch.cat([images[:8].cpu(), inputs.images[:8]])
    save_overview(args.out / f"preview-{step:06d}.png", grid(rows, columns=min(8, len(images))))
    if inputs.labels is not None:
        accuracy = load_classifier().accuracy(images.cpu(), inputs.labels).tolist()
        log.add(step=step, shape=accuracy[0], colour=accuracy[1], texture=accuracy[2])

def adapter_base(mmdit):
    """base_hash of the frozen weights below an MMDiT's LoRA."""
    linear = mmdit.joint_blocks[0].x_block.attn.qkv.linear
    return base_hash({"joint_blocks.0.x_block.attn.qkv.weight": linear.weight})

def keep(args, step, mmdit, weights, ema, rank):
    """Write the averaged weights of this step as a file that stays: an adapter, or with --full a whole
    transformer. Every rank takes part, since FSDP2's shards must be gathered."""
    about = dict(shift=args.shift, max_t5=args.max_t5, davae=file_hash(args.davae))
    if args.full:
        with ema_weights(weights, ema):
            gathered = ((name, full_tensor(tensor)) for name, tensor in mmdit.state_dict().items())
            state = {name: tensor.cpu() for name, tensor in gathered if rank == 0}
            if rank == 0:
                export_state(args.out / f"dit-{step:06d}.safetensors", state, mmdit.arch, **about)
    elif rank == 0:
        export_adapter(args.out / f"adapter-{step:06d}.safetensors", ema, mmdit.arch,
                       adapter_base(mmdit), **about)

def finish(args, inputs, log, device):
    """After the last step, on rank 0: export the averaged weights, draw and score the final
    table."""
    tuned, _ = build_model(args, 1, device)
    saved = read_torch(args.out / "checkpoint.pt")
    for name, average in saved["ema"].items():
        tuned.get_parameter(name).data.copy_(average)
    about = dict(shift=args.shift, max_t5=args.max_t5, davae=file_hash(args.davae))
    if not args.full:
        export_adapter(args.out / "adapter.safetensors", saved["ema"], tuned.arch,
                       adapter_base(tuned), **about)
    export(args.out / "dit.safetensors", tuned, **about)
    if args.export_diffusers:
        export_diffusers(args.export_diffusers, tuned)
    if args.preview:
        inputs = inputs or load_preview_inputs(args, device)
        if inputs.labels is not None:
            log.plot(args.out / "accuracy.png", ["texture", "shape", "colour"], log=False)
        report(args, inputs, device, log.seconds())

# may differ when a run resumes: none of these changes what is learned
MAY_CHANGE = {"steps", "device", "every", "save_minutes", "preview", "out", "cache", "held", "cfg",
              "export_diffusers", "sample_steps", "checkpoint", "compile", "keep_every",
              "attention"}

def main(args):
    # the run: processes, the data, an earlier checkpoint, the log
    rank, ranks, device = init_distributed(args)
    if not Path(args.davae).is_file() or "detail_channels" not in read_metadata(args.davae):
        raise InputError(f"--davae {args.davae}: no such file, or no DA-VAE in it; make it with"
                         " align.py")
    data, count = open_data(args)
    args.data_digest = listing_digest(data.items) if args.data else None
    args.davae_digest = file_hash(args.davae)           # its z_d is what the transformer learns
    saved = load_checkpoint(args.out, args, MAY_CHANGE)
    first = saved["step"] if saved else 0
    check_progress(args.out, first, args.steps)
    log = Log(args.out, first, rank)

    # every picture and caption is encoded once
    if args.data:
        log.add(step=first, data=data.summary)
    cached, empty = make_caches(args, data, count, rank, ranks, device)
    empty = {name: tensor.to(device) for name, tensor in empty.items()}

    # the model: P' and O' at zero, LoRA or all of it, averaged weights beside
    mmdit, model = build_model(args, ranks, device)
    C = mmdit.arch.in_channels
    weights = {name: p for name, p in mmdit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = optim.AdamW(weights.values(), args.lr, weight_decay=0.0, fused=True)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True,
                               strict=False)
    if saved:
        restore(saved, model, optimizer, ema, options, device)
        print0(rank, f"{args.out}: resumed at step {first}")
    print0(rank,
           f"{len(cached)} cached pictures over {args.davae},"
           f" {sum(p.numel() for p in weights.values()) / 1e6:.1f} M"
           f" parameters train ({describe_trainable(weights, args, mmdit.arch)}), shift"
           f" {args.shift}")

    autocast = pick_autocast(args.dtype, device)
    watch = Watch()
    checkpoints = Checkpoints(args.out, args, device, args.save_minutes)
    batch = args.batch * args.accumulate                            # a step's pictures on this rank
    workers = 2 if device_type(device) == "cuda" else 0                     # a CPU needs its cores
    batches = StepBatches(cached, batch, rank, ranks).loader(first, args.steps, workers)
    bar = tqdm(batches, initial=first, total=args.steps, disable=rank > 0, leave=False)
    inputs = None                                               # of previews, loaded at the first
    for step, (z_hr, context, pooled, *mirrored) in enumerate(bar, first):
        last = step + 1 == args.steps

        # this step's noise, timesteps, mirror images and captions
        noise, t, drop, flip, caption = draw_noise(args.seed, step, rank, ranks, batch,
                                                   z_hr.shape[1:], args.shift, args.dropout, device)
        z_hr = z_hr.to(device, non_blocking=True).float()                           # (B, C+D, h, w)
        if args.flip:
            mirror = mirrored[0].to(device, non_blocking=True).float()
            z_hr = torch.where(flip[:, None, None, None], mirror, z_hr)
        if args.captions > 1:
            each = torch.arange(batch), (caption * args.captions).long()
            context, pooled = context[each], pooled[each]
        context = context.to(device, non_blocking=True)
        context = torch.where(drop[:, None, None], empty["context"], context)           # (B, L, d)
        pooled = pooled.to(device, non_blocking=True)
        pooled = torch.where(drop[:, None], empty["pooled"], pooled)                    # (B, d')
        detail_weight = 1.0 if args.no_schedule else omega(step, args.n_warm)           # Eq. (12)
        set_lr(optimizer, args.lr, step, args.warmup)

        # accumulate gradients over the micro-batches; ranks exchange them in the last one alone
        values = Counter()
        micro_batches = zip(*(v.chunk(args.accumulate) for v in (z_hr, noise, t, context, pooled)))
        for k, micro_batch in enumerate(micro_batches, 1):
            with nullcontext() if k == args.accumulate or model is mmdit else model.no_sync():
                loss, terms = training_loss(model, *micro_batch, C, detail_weight, autocast,
                                            args.min_snr)                   # Eq. (13)
                (loss / args.accumulate).backward()
            values.update({name: value / args.accumulate for name, value in terms.items()})

        # clip the gradients, and note whether all is finite
        norm = clip_gradients(weights, max_norm=1.0)
        watch.add(step + 1, values, norm, weights, latents=z_hr, context=context, pooled=pooled)

        # update the weights, and their average
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, step, args.ema)

        # log; nothing that is not finite gets beyond this line
        if (step + 1) % args.every == 0 or last:
            log.add(step=step + 1, **watch.read(), omega=detail_weight, seconds=log.seconds())

        # keep the averaged weights of this step, before the checkpoint: a run that goes on from that
        # one does not come here again
        if args.keep_every and (step + 1) % args.keep_every == 0:
            keep(args, step + 1, mmdit, weights, ema, rank)

        # checkpoint: every rank takes part, since FSDP2's shards must be gathered
        logged = (step + 1) % args.every == 0
        if last or logged and checkpoints.due(planned=(step + 1) % (10 * args.every) == 0):
            model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
            gathered = ((name, full_tensor(average)) for name, average in ema.items())
            ema_state = {name: average.cpu() for name, average in gathered if rank == 0}
            if rank == 0:
                checkpoints.save(step=step + 1, model=model_state, optimizer=optimizer_state,
                                 ema=ema_state)
                log.plot(args.out / "loss.png", ["base", "detail"])

        # preview, by the averaged weights
        if args.preview and (step + 1) % args.preview == 0 and not last:
            inputs = inputs or load_preview_inputs(args, device)
            with ema_weights(weights, ema), autocast:
                preview(args, step + 1, mmdit, inputs, rank, log)

    if rank == 0:
        checkpoints.finish()
        finish(args, inputs, log, device)
    barrier()

if __name__ == "__main__":
    run(main, parse_args())
