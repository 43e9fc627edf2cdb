"""How fast is DA-VAE in sampling and in training, beside the stock model, and how much memory does it need?

    python tests/tools/bench.py sampling                    # of SD3.5 Medium's size on a GPU, tiny on a CPU
    python tests/tools/bench.py training --random large --compile

The weights are random: nothing is downloaded. The tables are printed, and OUT/bench.json holds their numbers
beside the machine that gave them. Both commands take the flags of `--help`'s first group, and one of the others.
"""
import argparse, gc, json, platform, re, statistics, sys, time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._inductor.utils import fresh_cache
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from align import Watch, clip_gradients, set_lr, update_ema                                    # noqa: E402
from finetune_dit import add_lora, flow_loss, warm_start                                        # noqa: E402
from sample import MMDiT, MMDiTArch, generate, shift_timesteps                                  # noqa: E402
from vae_expand import (DAVAE, VAE, Parser, VAEArch, add_attention_flag, count_or_0, non_negative, pick_device,     # noqa: E402
                        pick_dtype, positive_int, run, seed_int)

MEDIUM, LARGE = MMDiTArch(), MMDiTArch(depth=38, width=2432, table=192, dual=())
SMALL = MMDiTArch(depth=4, width=256, table=64, context_dim=64, pooled_dim=32, dual=(0, 1))
SMALL_VAE = VAEArch(widths=(16, 16, 32, 32), blocks=1, groups=16)
RANDOM = {      # transformer, VAE, text tokens; sampling: sizes, batches; training: size, batch
    "tiny": (replace(SMALL, table=128), SMALL_VAE, 77, (256, 512, 1024), (1, 2), 512, 2),
    "medium": (MEDIUM, VAEArch(), 333, (512, 1024, 2048), (1, 8), 1024, 6),
    "large": (LARGE, VAEArch(), 333, (512, 1024, 2048), (1, 8), 1024, 2)}
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312}  # TFLOP/s of dense bf16

def closed_form(arch, side, text):
    """FLOP of a forward of one image, from the shapes alone; a multiply and an add are two."""
    d, n = arch.width, side * side
    both = arch.depth * (n * 12 * d * d + 2 * (n + text)**2 * d + 6 * d * d)    # image: qkv, out, MLP, adaLN
    both += (arch.depth - 1) * (text * 12 * d * d + 6 * d * d)                  # text
    both += text * 3 * d * d + 2 * d * d                                        # the last text: q, k, v
    both += len(arch.dual) * (n * 4 * d * d + 2 * n * n * d + 3 * d * d)        # the second attention
    channels = (arch.in_channels + arch.detail_channels) * arch.patch**2
    ends = 2 * n * channels * d + text * arch.context_dim * d
    return 2 * (both + ends + (256 + arch.pooled_dim + 2 * d + 2 * d) * d)      # embedders; final adaLN

def counted(make, *shapes):
    """FLOP of what make() gives on tensors of `shapes`, and of its backward if it trains; on meta."""
    with torch.device("meta"):
        run, given = make(), [torch.empty(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        out = run(*given)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()

def build(make, device, dtype, seed=0):
    """make() -> its module, frozen, with random weights: made on the meta device, then filled in place."""
    with torch.device("meta"):
        module = make().to(dtype)
    rng = torch.Generator(device).manual_seed(seed)
    for name, p in module.to_empty(device=device).state_dict().items():
        p.normal_(std=0.02, generator=rng)
        if p.ndim == 1 and name.endswith(("weight", "std")):
            p.add_(1)
    return module.eval().requires_grad_(False)

# ------------------------------------------------------------ clocks and scales
class LiveBytes(TorchDispatchMode):
    """Inside, .peak is the most bytes alive at once of tensors made inside, each storage once. What came from
    outside (weights, inputs) counts nothing, nor what a kernel needs within. Compiled blocks run eagerly."""
    def __enter__(self):
        self.live, self.peak, self.eager = {}, 0, torch.compiler.set_stance("force_eager")
        self.eager.__enter__()
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.eager.__exit__(*fault)

    def note(self, tree, made):
        for tensor in (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)):
            ref = StorageWeakRef(tensor.untyped_storage())      # while it is kept no other gets its address
            self.live.setdefault(ref.cdata, (ref, made * tensor.untyped_storage().nbytes()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note((args, kwargs), made=0)
        out = func(*args, **kwargs or {})
        self.note(out, made=1)
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out

def memory(run, device):
    """Peak of one run(), in GB: all that the GPU holds; elsewhere live tensors, weights and inputs aside."""
    if device != "cuda":
        with LiveBytes() as live:
            run()
        return live.peak / 1e9
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e9

def clock(run, device, least=3, most=20, budget=2.0):
    """Seconds of each call of run(): `least` calls, up to `most` while the budget (seconds) lasts."""
    times = []
    while len(times) < least or len(times) < most and sum(times) < budget:
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return times

def kernel_of(call):
    """Name of the attention kernel that a call really ran, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = [event.key for event in profile.key_averages()]
    inner = [n for n in names if any(k in n for k in ("fmha", "flash_fwd", "cudnn_generated", "sdpa"))]
    chosen = [n for n in names if n.startswith("aten::_scaled_dot_product")]
    return ", ".join(sorted(inner or chosen)) or "none"

def quartiles(values):
    """-> first quartile, median, third quartile"""
    return statistics.quantiles(values, n=4, method="inclusive")

def measure(run, device, compiled=False):
    """Time and memory of run() -> {column: number}. cold_s: what its first call takes beyond the median one,
    with Inductor's cache empty; warm_s: the same from that cache, dynamo reset, in the same process."""
    first = []
    torch.compiler.reset()              # dynamo gives up at 8 graphs, and each row brings three
    with fresh_cache() if compiled else nullcontext():
        for _ in range(2 if compiled else 0):
            torch.compiler.reset()
            first += clock(run, device, 1, 1)
    gigabytes, times = memory(run, device), clock(run, device)          # the first warms up for the second
    q1, ms, q3 = (1000 * q for q in quartiles(times))
    compiling = {k: v - ms / 1000 for k, v in zip(("cold_s", "warm_s"), first)}
    return {"ms": ms, "q1": q1, "q3": q3, "GB": gigabytes, "runs": len(times), **compiling}

def taken_on(device):
    """What a reader needs beside a time."""
    cpus = Path("/proc/cpuinfo")
    found = re.findall(r"model name\s*: (.+)", cpus.read_text()) if cpus.is_file() else []
    cpu = f"{device}, {found[0] if found else platform.processor()}, {torch.get_num_threads()} threads"
    return {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}

def pick_random(args, device):
    """-> the name in RANDOM that --random gives, or fits the device"""
    return args.random or ("medium" if device == "cuda" else "tiny")

def pick_peak(device, dtype):
    """-> what counts as 100% utilisation, FLOP/s; where that is from"""
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    for known, tera in PEAKS.items() if dtype == torch.bfloat16 else ():
        if known in card:
            return tera * 1e12, f"{known}'s datasheet, bf16, dense"
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(clock(lambda: a @ a, device, 5)), f"measured, the best product of {n}x{n}, {dtype}"

class Report:
    """Rows of numbers, printed as they are measured, and in the end written as JSON."""
    def __init__(self, args, device, dtype, columns, **about):
        peak, origin = pick_peak(device, dtype)
        self.columns, self.rows, self.peak = columns.split(), {}, peak
        self.about = taken_on(device) | {"dtype": str(dtype), "compile": args.compile, "seed": args.seed}
        self.about |= about | {"peak FLOP/s": peak, "peak": origin}
        print("; ".join(f"{k} {v:.4g}" if type(v) is float else f"{k} {v}" for k, v in self.about.items()))
        print(f"{'':22}" + "".join(f"{c:>10}" for c in self.columns), flush=True)

    def add(self, name, make):
        """Print and keep the row that make() measures, or that memory did not suffice -> the row"""
        if torch.cuda.is_available():
            gc.collect()                # what an exception or a model before still holds
        try:
            row = make()
        except RuntimeError as e:       # torch.OutOfMemoryError is one; the CPU's allocator has no class
            if "memory" not in str(e):
                raise
            row = {"fault": "out of memory"}
        cells = "".join(f"{format(row[c], '.4g') if c in row else '':>10}" for c in self.columns)
        print(f"{name:22}{row.get('fault', cells)}", flush=True)
        self.rows[name] = row
        return row

    def write(self, out, **more):
        out.mkdir(parents=True, exist_ok=True)
        everything = self.about | {"rows": self.rows} | more
        (out / "bench.json").write_text(json.dumps(everything, indent=2) + "\n")
        print(out / "bench.json")

# ------------------------------------------------------------ sampling
@torch.no_grad()
def sampling(args):
    """Stock and DA at three sizes: decoding an image, a step of `generate`, whole images."""
    device = pick_device(args.device)
    dtype, name = pick_dtype(args.dtype, device), pick_random(args, device)
    arch, vae_arch, length, sizes, batches, *_ = RANDOM[name]
    sizes, steps, cfg = [args.size] if args.size else sizes, args.steps, args.cfg
    rows, at_once = 1 if cfg == 1 else 2, 4 if device == "cuda" else 1  # per image; steps a measured run
    report = Report(args, device, dtype, "tokens TFLOP ms q1 q3 MFU% GB img/s +VAE cold_s warm_s",
                    random=name, steps=steps, cfg=cfg, text_tokens=length)
    text = [torch.randn(1, length, arch.context_dim), torch.randn(1, arch.pooled_dim)] * rows
    text = [part.to(device, dtype) for part in text]
    for s in 1, 2, 4:
        kind, D, mmdit, vae = f"DA s={s}" if s > 1 else "stock", arch.in_channels * (s > 1), None, None
        mmdit = build(lambda: MMDiT(replace(arch, detail_channels=D)), device, dtype, args.seed)
        vae = build(lambda: DAVAE(VAE(vae_arch), scale=s) if D else VAE(vae_arch), device, dtype, args.seed)
        vae.decoder.in_strips(args.tile)
        if args.compile:
            mmdit.compile_blocks()
        for size in sizes if s < 4 else sizes[-1:]:
            side, flop = size // vae.f, closed_form(mmdit.arch, size // vae.f // arch.patch, length)
            z = torch.randn(max(batches), arch.in_channels + D, side, side).to(device)
            decode = report.add(f"{kind} {size} decode", lambda: measure(lambda: vae.decode(z[:1]), device))

            def denoise(batch):
                run = partial(generate, mmdit, vae, text, [""] * batch, size, size, at_once, cfg,
                              noise=z[:batch], return_latents=True)
                row = measure(run, device, args.compile)
                row |= {column: row[column] / at_once for column in ("ms", "q1", "q3")}
                row["kernel"] = kernel_of(run)
                row |= {"tokens": (side // arch.patch)**2, "TFLOP": flop / 1e12,
                        "MFU%": 1e5 * flop * rows * batch / row["ms"] / report.peak,
                        "img/s": 1000 * batch / (row["ms"] * steps)}
                if "ms" in decode:
                    row["+VAE"] = 1000 * batch / (row["ms"] * steps + decode["ms"] * batch)
                return row
            for batch in batches if s < 4 else batches[:1]:
                report.add(f"{kind} {size} batch {batch}", partial(denoise, batch))
    print(f"ms: a step of the whole batch, guided by {cfg:g}, or decoding an image; TFLOP: a forward of one\n"
          f"img/s: in {steps} steps; +VAE: decoding too; GB: {'all held' if device == 'cuda' else 'live'}")
    report.write(args.out, ratios=compare(report.rows))

def compare(rows):
    """Whole images, DA against stock of equal size and steps, beside the utilisation that both reached."""
    ratios = {}
    for name, da in rows.items():
        stock = rows.get(re.sub(r"^DA s=\d", "stock", name), {})
        if name.startswith("DA") and "+VAE" in stock and "+VAE" in da:
            found = da["+VAE"] / stock["+VAE"], stock["TFLOP"] / da["TFLOP"], stock["MFU%"], da["MFU%"]
            ratios[name] = dict(zip(("img/s", "FLOP", "stock MFU%", "DA MFU%"), found))
            print("{}: {:.2f}x stock's img/s, VAE included; FLOP of a forward {:.2f}x; MFU {:.1f}% stock,"
                  " {:.1f}% DA".format(name, *found))
    return ratios

# ------------------------------------------------------------ training
def adapt(mmdit, full, args):
    """A stock model, in place -> stage 2's: warm-started; all of it or LoRA learns."""
    warm_start(mmdit, mmdit.arch.in_channels)
    return mmdit.requires_grad_(True) if full else add_lora(mmdit, args.rank)

def trainer(arch, full, args, device, dtype):
    """-> step(z_hr, context, pooled), all that one step of finetune_dit does; with .weights, .optimizer"""
    frozen = dtype if device == "cuda" and not full else torch.float32
    mmdit = adapt(build(lambda: MMDiT(arch), device, frozen, args.seed), full, args)
    for block in mmdit.joint_blocks if args.checkpoint else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        mmdit.compile_blocks()
    weights = {name: p for name, p in mmdit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), args.lr, weight_decay=0.0, fused=device == "cuda")

    def step(z_hr, context, pooled):
        z_hr = z_hr.to(device).float()
        noise = torch.randn_like(z_hr)
        t = shift_timesteps(torch.randn(len(z_hr), device=device).sigmoid(), args.shift)
        sigma = t.view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
            u_hat = mmdit((1 - sigma) * z_hr + sigma * noise, t, context.to(device), pooled.to(device))
        loss = flow_loss(u_hat, noise - z_hr, arch.in_channels, 1.0)
        loss.backward()
        set_lr(optimizer, args.lr, 1, args.warmup)
        norm = clip_gradients(weights, 1.0)
        watch = Watch()
        watch.add(1, {"loss": loss.detach()}, norm, weights)
        step.loss = watch.read()["loss"]
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, 1, args.ema)
    step.weights, step.optimizer = weights, optimizer
    return step

def training(args):
    """A step of LoRA and of full fine-tuning, from cached latents and with encoding; text is always given."""
    device = pick_device(args.device)
    dtype, name = pick_dtype(args.dtype, device, autocast=True), pick_random(args, device)
    arch, vae_arch, length, *_, size, batch = RANDOM[name]
    size, batch = args.size or size, args.batch or batch
    report = Report(args, device, dtype, "TFLOP ms q1 q3 img/s MFU% GB cold_s warm_s", random=name, size=size,
                    batch=batch, rank=args.rank, checkpoint=args.checkpoint, text_tokens=length)
    davae = build(lambda: DAVAE(VAE(vae_arch)), device, pick_dtype(args.dtype, device), args.seed)
    images, side = torch.rand(batch, 3, size, size) * 2 - 1, size // davae.f
    shapes = (2 * arch.in_channels, side, side), (), (length, arch.context_dim), (arch.pooled_dim,)
    latents, _, *text = (torch.randn(batch, *shape).bfloat16() for shape in shapes)
    encode = torch.no_grad()(lambda: davae.encode(images.to(device)))
    encoding = counted(lambda: DAVAE(VAE(vae_arch)).requires_grad_(False).encode, (1, 3, size, size))
    for kind, full in ("LoRA", False), ("full", True):
        flop = counted(lambda: adapt(MMDiT(arch), full, args), *((1, *shape) for shape in shapes))
        for source, make, more in ("cached", lambda: latents, 0), ("encoded", encode, encoding):
            def row():
                step = trainer(arch, full, args, device, dtype)
                if not args.compile:
                    step(latents, *text)                                # makes the optimizer's state
                found = measure(lambda: step(make(), *text), device, args.compile)
                found["kernel"] = kernel_of(lambda: step(make(), *text))
                return found | {"TFLOP": (flop + more) / 1e12, "img/s": 1000 * batch / found["ms"],
                                "MFU%": 1e5 * (flop + more) * batch / found["ms"] / report.peak}
            report.add(f"{kind}, {source}", row)
    print("ms: a step of the batch; TFLOP: an image forward and backward, and its encoding where it is done")
    report.write(args.out)

# ------------------------------------------------------------ the command
def square_size(text):
    """A `type` for add_argument: the side of a square image, in pixels."""
    if "x" in text:
        raise argparse.ArgumentTypeError(f"{text}: only squares are measured, give one side")
    return positive_int(text)

def parse_args(argv=None):
    """The command's arguments."""
    p = Parser(__doc__)
    p.add_argument("what", choices=["sampling", "training"], help="What is measured.")
    g = p.add_argument_group("both")
    g.add_argument("--random", choices=[*RANDOM], help="Size of the networks (default medium on a GPU, else tiny).")
    g.add_argument("--size", type=square_size, help="Image side in pixels (default: by the size of the networks).")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto).")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="Precision (default auto).")
    g.add_argument("--compile", action="store_true", help="Use torch.compile, and time its start as well.")
    add_attention_flag(g)
    g.add_argument("--seed", type=seed_int, default=0, help="Seed of the weights (default 0).")
    g.add_argument("--out", type=Path, default=Path("runs/bench"), help="Folder of bench.json (default runs/bench).")
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=positive_int, default=28, help="Euler steps of a whole image (default 28).")
    g.add_argument("--cfg", type=non_negative, default=4.5, help="Guidance; 1 is none (default 4.5).")
    g.add_argument("--tile", type=count_or_0, default=0, help="Decode in strips of so many rows (default 0: whole).")
    g = p.add_argument_group("training")
    g.add_argument("--batch", type=positive_int, help="Images a step (default: by the size of the networks).")
    g.add_argument("--rank", type=positive_int, default=256, help="Rank of LoRA (default 256).")
    g.add_argument("--checkpoint", action="store_true", help="Recompute activations in backward.")
    p.set_defaults(lr=1e-5, warmup=0, shift=2.0, ema=0.999)         # of training: they do not change its speed
    return p.parse_args(argv)

def main(args):
    """Measure what the first argument names."""
    if args.what == "sampling":
        sampling(args)
    else:
        training(args)

if __name__ == "__main__":
    run(main, parse_args())
