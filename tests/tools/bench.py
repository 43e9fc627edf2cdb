"""How fast is DA-VAE in sampling and in training, beside the stock model, and how much memory does it need?

    python tests/tools/bench.py sampling                    # of SD3.5 Medium's size on a GPU, tiny on a CPU
    python tests/tools/bench.py training --random large --compile

The weights are random: nothing is downloaded. The tables are printed, and OUT/bench.json holds their numbers
beside the machine that gave them. Both commands take the flags of `--help`'s first group, and one of the others.
"""
import argparse, gc, json, math, platform, re, statistics, sys, time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor.utils import fresh_cache
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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

def attention_flop(arch, side, text):
    """Those of closed_form's FLOP that are attention: products of queries and keys, weights and values."""
    n = side * side
    return 4 * arch.width * (arch.depth * (n + text)**2 + len(arch.dual) * n**2)

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
    if device != "cpu":
        torch.accelerator.synchronize()         # what was asked of the device before is not run()'s
    while len(times) < least or len(times) < most and sum(times) < budget:
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return times

KERNELS = {     # part of a CUDA kernel's name -> what it is called here
    "cudnn_generated": "cuDNN",
    "flash_fwd": "FA2",
    "FlashAttnFwdSm90": "FA3",
    "fmha_cutlassF": "efficient"}

def kernel_of(call):
    """Name of the attention kernel that a call really ran, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return name_kernels(event.key for event in profile.key_averages())

def name_kernels(names):
    """What a profile saw -> its attention kernels, by the names of KERNELS; else torch's operators."""
    names = list(names)
    known = {short for part, short in KERNELS.items() if any(part in name for name in names)}
    operators = {name for name in names if name.startswith("aten::_scaled_dot_product")}
    return ", ".join(sorted(known or operators)) or "none"

def quartiles(values):
    """-> first quartile, median, third quartile"""
    return statistics.quantiles(values, n=4, method="inclusive")

def measure(run, device, compiled=False, most=20):
    """Time and memory of run(), called `most` times at most -> {column: number}. cold_s: what its first call takes beyond the median one,
    with Inductor's cache empty; warm_s: the same from that cache, dynamo reset, in the same process."""
    first = []
    torch.compiler.reset()              # dynamo gives up at 8 graphs, and each row brings three
    with fresh_cache() if compiled else nullcontext():
        for _ in range(2 if compiled else 0):
            torch.compiler.reset()
            first += clock(run, device, 1, 1)
    gigabytes = memory(run, device)                     # warms up for the clock as well
    times = clock(run, device, most=most)
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

# ------------------------------------------------------------ what can be reached, and what shall be
# How fast attention is on an H100 SXM5 in bf16, head size 64, forward, without a mask, in TFLOP/s by the
# number of tokens: the charts of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).
ATTENTION_SPEED = {
    "FA2": {1024: 306, 4096: 321, 16384: 324},
    "cuDNN": {1024: 373, 4096: 408, 16384: 413},
    "FA3": {1024: 392, 4096: 476, 16384: 497}}
PRODUCTS = 700                  # TFLOP/s of large matrix products there, an assumption on the generous side
HOPPER = 1e12 * PEAKS["H200"]   # the peak of an H200 and of an H100 SXM5, of which MFU is a share

def ceiling(kernel, arch, side, text):
    """Highest MFU, in percent, of a forward on those cards whose attention runs in a kernel of that name
    -> None where no speed of it is known."""
    if kernel not in ATTENTION_SPEED:
        return None
    speeds = ATTENTION_SPEED[kernel]
    nearest = min(speeds, key=lambda tokens: abs(math.log(tokens / (side**2 + text))))
    flop = closed_form(arch, side, text)
    attention = attention_flop(arch, side, text)
    seconds = attention / (1e12 * speeds[nearest]) + (flop - attention) / (1e12 * PRODUCTS)
    return 100 * flop / seconds / HOPPER

class Target(NamedTuple):
    """What a column of a row shall reach, and what is thought possible there with the fastest kernel."""
    column: str
    goal: float                 # at least; of AT_MOST's columns at most
    bound: float = None

AT_MOST = {"GB", "cold_s", "warm_s"}
COMPILING = [Target("cold_s", 10), Target("warm_s", 3)]
TARGETS = {     # of SD3.5 Medium's size, bf16, on one H200: row -> targets. "x stock": of whole images, DA to stock
    "stock 2048 batch 1": [Target("MFU%", 45)],
    "DA s=2 1024 decode": [Target("GB", 7.5)],
    "DA s=2 1024 batch 1": [Target("MFU%", 42, 44), Target("x stock", 3.0, 3.1), Target("GB", 7.5), *COMPILING],
    "DA s=2 1024 batch 8": [Target("MFU%", 58, 60), Target("+VAE", 3.7), Target("x stock", 4.2, 4.4)],
    "DA s=2 2048 decode": [Target("GB", 13)],
    "DA s=2 2048 batch 1": [Target("MFU%", 54, 60), Target("+VAE", 1 / 1.35), Target("x stock", 7.4, 7.9),
                            Target("GB", 13), *COMPILING],
    "LoRA, cached": [Target("img/s", 80, 95), Target("cold_s", 25), Target("warm_s", 3)],
    "full, cached": [Target("img/s", 68, 81), Target("cold_s", 25), Target("warm_s", 3)]}

def judge(target, row):
    """A row, {column: value}, with what its kernel allows of the MFU as "ceil%" if known -> one phrase:
    met, missed, or out of that kernel's reach."""
    value = row[target.column]
    bound = target.bound
    if target.column == "MFU%" and "ceil%" in row:
        bound = min(row["ceil%"], bound or 100)
    if value <= target.goal if target.column in AT_MOST else value >= target.goal:
        verdict = "met"
    elif bound is not None and bound < target.goal:
        verdict = f"out of {row['kernel']}'s reach"
    else:
        verdict = "missed"
    wanted = f"{'at most' if target.column in AT_MOST else 'at least'} {target.goal:.3g}"
    possible = f" of {bound:.3g} possible" if bound is not None else ""
    return f"{target.column} {value:.3g}, {wanted}{possible}: {verdict}"

def judge_row(name, row):
    """-> a phrase for each target of the row of that name whose column was measured"""
    return [judge(target, row) for target in TARGETS.get(name, ()) if target.column in row]

class Report:
    """Rows of numbers, printed as they are measured, and written as JSON after each.
    On the hardware that the targets are for, rows are judged by them."""
    def __init__(self, args, device, dtype, columns, **about):
        peak, origin = pick_peak(device, dtype)
        self.out = args.out
        self.columns, self.rows, self.peak = columns.split(), {}, peak
        self.judged = peak == HOPPER and dtype == torch.bfloat16 and about.get("random") == "medium"
        self.about = taken_on(device) | {"dtype": str(dtype), "compile": args.compile, "seed": args.seed}
        self.about |= about | {"peak FLOP/s": peak, "peak": origin}
        print("; ".join(f"{k} {v:.4g}" if type(v) is float else f"{k} {v}" for k, v in self.about.items()))
        print(f"{'':22}" + "".join(f"{c:>10}" for c in self.columns), flush=True)

    def add(self, name, make):
        """Print and keep the row that make() measures, or that memory did not suffice -> the row"""
        gc.collect()                    # what an exception or a model before still holds
        try:
            row = make()
        except RuntimeError as e:       # torch.OutOfMemoryError is one; the CPU's allocator has no class
            if not out_of_memory(e):
                raise
            row = {"fault": "out of memory"}
        cells = "".join(f"{format(row[c], '.4g') if c in row else '':>10}" for c in self.columns)
        print(f"{name:22}{row.get('fault', cells)}", flush=True)
        if self.judged:
            row["targets"] = judge_row(name, row)
            for phrase in row["targets"]:
                print(f"    {phrase}", flush=True)
        self.rows[name] = row
        self.write()
        return row

    def write(self, **more):
        """OUT/bench.json: all rows so far, so that a command that is cut off leaves them."""
        self.out.mkdir(parents=True, exist_ok=True)
        everything = self.about | {"rows": self.rows} | more
        (self.out / "bench.json").write_text(json.dumps(everything, indent=2) + "\n")

def out_of_memory(error):
    """Whether a RuntimeError says that memory did not suffice: an illegal access to it is another fault."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)

# ------------------------------------------------------------ sampling
@torch.no_grad()
def sampling(args):
    """Stock and DA at three sizes: decoding an image, a step of `generate`, whole images."""
    device = pick_device(args.device)
    dtype, name = pick_dtype(args.dtype, device), pick_random(args, device)
    arch, vae_arch, length, sizes, batches, *_ = RANDOM[name]
    sizes, steps, cfg = [args.size] if args.size else sizes, args.steps, args.cfg
    rows, at_once = 1 if cfg == 1 else 2, 4 if device == "cuda" else 1  # per image; steps a measured run
    report = Report(args, device, dtype, "tokens TFLOP ms q1 q3 MFU% ceil% GB img/s +VAE cold_s warm_s",
                    random=name, steps=steps, cfg=cfg, text_tokens=length)
    text = [torch.randn(1, length, arch.context_dim), torch.randn(1, arch.pooled_dim)] * rows
    text = [part.to(device, dtype) for part in text]
    for s in 1, 2, 4:
        kind, D, mmdit, vae = f"DA s={s}" if s > 1 else "stock", arch.in_channels * (s > 1), None, None
        mmdit = build(lambda: MMDiT(replace(arch, detail_channels=D)), device, dtype, args.seed)
        vae = build(lambda: DAVAE(VAE(vae_arch), scale=s) if D else VAE(vae_arch), device, dtype, args.seed)
        vae.to(memory_format=torch.channels_last).decoder.in_strips(args.tile)         # as sample.py has it
        if args.compile:
            mmdit.compile_blocks()
        for size in sizes if s < 4 else sizes[-1:]:
            side, flop = size // vae.f, closed_form(mmdit.arch, size // vae.f // arch.patch, length)
            z = torch.randn(max(batches), arch.in_channels + D, side, side).to(device)
            decode = report.add(f"{kind} {size} decode", lambda: measure(lambda: vae.decode(z[:1]), device, most=args.runs))

            def denoise(batch):
                run = partial(generate, mmdit, vae, text, [""] * batch, size, size, at_once, cfg,
                              noise=z[:batch], return_latents=True)
                row = measure(run, device, args.compile, args.runs)
                row |= {column: row[column] / at_once for column in ("ms", "q1", "q3")}
                row["kernel"] = kernel_of(run)
                row |= {"tokens": (side // arch.patch)**2, "TFLOP": flop / 1e12,
                        "MFU%": 1e5 * flop * rows * batch / row["ms"] / report.peak,
                        "img/s": 1000 * batch / (row["ms"] * steps)}
                possible = ceiling(row["kernel"], mmdit.arch, side // arch.patch, length)
                if report.peak == HOPPER and possible:
                    row["ceil%"] = possible
                if "ms" in decode:
                    row["+VAE"] = 1000 * batch / (row["ms"] * steps + decode["ms"] * batch)
                return row
            for batch in batches if s < 4 else batches[:1]:
                report.add(f"{kind} {size} batch {batch}", partial(denoise, batch))
    print(f"ms: a step of the whole batch, guided by {cfg:g}, or decoding an image; TFLOP: a forward of one\n"
          f"ceil%: the MFU that the attention kernel allows; img/s: in {steps} steps; +VAE: decoding too; GB: {'all held' if device == 'cuda' else 'live'}")
    report.write(ratios=compare(report.rows, report.judged))
    print(args.out / "bench.json")

def compare(rows, judged=False):
    """Whole images, DA against stock of equal size and steps, beside the utilisation that both reached.
    judged: also by TARGETS, unless the stock side misses its own, for slow attention inflates the ratio."""
    ratios = {}
    for name, da in rows.items():
        stock_name = re.sub(r"^DA s=\d", "stock", name)
        stock = rows.get(stock_name, {})
        if not name.startswith("DA") or "+VAE" not in stock or "+VAE" not in da:
            continue
        found = {"img/s": da["+VAE"] / stock["+VAE"], "FLOP": stock["TFLOP"] / da["TFLOP"],
                 "stock MFU%": stock["MFU%"], "DA MFU%": da["MFU%"]}
        print("{}: {:.2f}x stock's img/s, VAE included; FLOP of a forward {:.2f}x; MFU {:.1f}% stock,"
              " {:.1f}% DA".format(name, *found.values()))
        slow = [phrase for phrase in stock.get("targets", ()) if not phrase.endswith(": met")]
        for target in TARGETS.get(name, ()) if judged else ():
            if target.column == "x stock":
                phrase = judge(target, {"x stock": found["img/s"]})
                found["target"] = f"does not count, for {stock_name} has {slow[0]}" if slow else phrase
                print(f"    {found['target']}")
        ratios[name] = found
    return ratios

# ------------------------------------------------------------ training
def adapt(mmdit, full, args):
    """A stock model, in place -> stage 2's: warm-started; all of it or LoRA learns."""
    warm_start(mmdit, mmdit.arch.in_channels)
    return mmdit.requires_grad_(True) if full else add_lora(mmdit, args.rank)

def trainer(arch, full, args, device, dtype):
    """-> step(z_hr, context, pooled), all that one step of finetune_dit does; with .weights, .optimizer, .watch"""
    frozen = dtype if device == "cuda" and not full else torch.float32
    mmdit = adapt(build(lambda: MMDiT(arch), device, frozen, args.seed), full, args)
    mmdit.checkpoint_blocks = args.checkpoint
    if args.compile:
        mmdit.compile_blocks()
    weights = {name: p for name, p in mmdit.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), args.lr, weight_decay=0.0, fused=True)

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
        step.watch = Watch()            # read when asked for: that makes the processor wait
        step.watch.add(1, {"loss": loss.detach()}, norm, weights)
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
    davae.to(memory_format=torch.channels_last)                                         # as build_cache has it
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
                found = measure(lambda: step(make(), *text), device, args.compile, args.runs)
                found["kernel"] = kernel_of(lambda: step(make(), *text))
                return found | {"TFLOP": (flop + more) / 1e12, "img/s": 1000 * batch / found["ms"],
                                "MFU%": 1e5 * (flop + more) * batch / found["ms"] / report.peak}
            report.add(f"{kind}, {source}", row)
    print("ms: a step of the batch; TFLOP: an image forward and backward, and its encoding where it is done")
    print(args.out / "bench.json")

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
    g.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
                   help="Where it is measured (default auto).")
    g.add_argument("--runs", type=positive_int, default=20,
                   help="Most runs of a measurement; 2 seconds of them, or 3 runs, are enough (default 20).")
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
