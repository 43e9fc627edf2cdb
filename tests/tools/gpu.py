"""What does a GPU say? Everything that is to be measured on one, in parts of at most nine minutes.

    python tests/tools/gpu.py                               # all parts, one after another
    python tests/tools/gpu.py --part truth                  # one of them
    python tests/tools/gpu.py --dry-run                     # all of it in tiny sizes, on a CPU too: does it run?
    python tests/tools/gpu.py --fake                        # memory of the real sizes, counted without a GPU

Each measurement is a row: printed as Markdown with what it was taken on (device, torch, the attention kernel that
really ran, date), and written to OUT/NAME.json. A row that is there already is printed and not measured again, so
that a part that was cut off goes on; rows with a fault are, and with --again all. Utilisation stands beside what the
attention kernel allows, and SD3.5 Medium's figures beside their targets: met, missed, or out of that kernel's reach.
Weights are random: nothing is downloaded.
"""
import argparse, gc, importlib.util, json, shutil, subprocess, sys, time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench                                                                                     # noqa: E402
from align import PAPER, Stage1, objective                                                      # noqa: E402
from sample import MMDiT                                                                         # noqa: E402
from vae_expand import (DAVAE, VAE, InputError, Parser, VAEArch, add_attention_flag, attention_order,       # noqa: E402
                        pick_device, run, write_json)

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540                                     # seconds of one command: nine minutes

class Sheet:
    """The rows of one part, each measured once."""
    faults = []                                 # of all parts

    def __init__(self, args, device, part):
        self.args = args
        self.device = device
        self.part = part
        self.about = bench.taken_on(device) | {"dry": args.dry_run, "asked for": args.attention}

    def row(self, name, measure):
        """Measure a row, {column: value}, unless OUT holds it, taken on the like; print it as Markdown.
        Memory that does not suffice is a row as well."""
        path = self.args.out / f"{self.part}-{name.replace(' ', '-').replace('/', '-')}.json"
        known = json.loads(path.read_text()) if path.is_file() and not self.args.again else {}
        alike = all(known.get(key) == value for key, value in self.about.items() if key != "date")
        if alike and "fault" not in known:
            found = known
        else:
            start = time.time()
            free_memory(self.device)
            try:
                values = measure()
            except RuntimeError as e:
                if not bench.out_of_memory(e):
                    raise
                values = {"fault": "out of memory"}
            found = self.about | values | {"seconds of measuring": round(time.time() - start, 1)}
            write_json(path, found)
        if "fault" in found:
            Sheet.faults.append(f"{self.part}, {name}: {found['fault']}")
        cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
                 if k not in self.about]
        print(f"| {self.part} | {name} | {'; '.join(cells)} | {found['device']}, torch {found['torch']},"
              f" {found['date']} |", flush=True)
        return found

def free_memory(device):
    """Give back what rows before held: compiled graphs, models in reference cycles, torch's own reserve."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

@contextmanager
def full_float32():
    """Without TF32, in which CUDA's convolutions keep 10 bits of float32's 23: what bf16 is compared with."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept

def backend(args):
    """For torch.compile: a dry run traces, and does not pay for the code."""
    return "eager" if args.dry_run else "inductor"

def relative(a, b):
    """|a - b| / |b|"""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()

def sizes(args):
    """-> transformer, VAE, text tokens; latent side of a token grid, image side of the VAE; batch"""
    if args.dry_run:
        return replace(bench.SMALL, table=64), replace(bench.SMALL_VAE, widths=(16, 32)), 7, 16, 32, 2
    return bench.MEDIUM, VAEArch(), 333, 64, 1024, 6

def autoencoders_of(vae_arch):
    """{name: what makes it}"""
    return {"VAE": lambda: VAE(vae_arch), "DA-VAE": lambda: DAVAE(VAE(vae_arch))}

def most_runs(args):
    """Most runs of a measurement."""
    return 3 if args.dry_run else 20

# ------------------------------------------------------------ 1. is it right?
def truth(args, device):
    """bf16, compiled, against float32, eager: outputs, the losses of 50 steps; graphs."""
    sheet = Sheet(args, device, "truth")
    arch, vae_arch, length, side, pixels, _ = sizes(args)
    arch = replace(arch, detail_channels=arch.in_channels)
    torch.manual_seed(0)
    x = torch.randn(2, 2 * arch.in_channels, side, side, device=device)
    t = torch.rand(2, device=device)
    text = [torch.randn(2, length, arch.context_dim, device=device), torch.randn(2, arch.pooled_dim, device=device)]

    def transformer():
        exact = bench.build(lambda: MMDiT(arch), device, torch.float32)
        fast = bench.build(lambda: MMDiT(arch), device, torch.bfloat16).compile_blocks()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            expected = exact(x, t, *text)
            found = fast(x.bfloat16(), t, *(part.bfloat16() for part in text))
            kernel = bench.kernel_of(lambda: fast(x.bfloat16(), t, *(part.bfloat16() for part in text)))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return {"relative error": relative(found, expected), "graphs": graphs, "kernel": kernel}
    sheet.row("transformer bf16 compiled", transformer)

    image = torch.rand(1, 3, pixels, pixels, device=device) * 2 - 1
    for name, make in autoencoders_of(vae_arch).items():
        for how in "channels-last", "compiled":
            def autoencoder():
                exact = bench.build(make, device, torch.float32)
                fast = bench.build(make, device, torch.bfloat16).to(memory_format=torch.channels_last)
                encode, decode = fast.encode, fast.decode
                if how == "compiled":
                    encode, decode = (torch.compile(call, fullgraph=True, dynamic=False, backend=backend(args))
                                      for call in (encode, decode))
                with torch.no_grad(), full_float32():
                    z = exact.encode(image)
                    return {"encoding, relative error": relative(encode(image), z),
                            "decoding, relative error": relative(decode(z), exact.decode(z))}
            sheet.row(f"{name} bf16 {how}", autoencoder)

    for kind, full in (("LoRA", False), ("full", True)):
        def steps():
            losses = []
            for dtype in torch.float32, torch.bfloat16:
                flags = training_flags(compiled=dtype == torch.bfloat16 and not args.dry_run)
                step = bench.trainer(replace(arch, detail_channels=0), full, flags, device, dtype)
                torch.manual_seed(1)
                own = []
                for _ in range(3 if args.dry_run else 50):
                    step(x, *text)
                    own.append(step.watch.read()["loss"])
                losses.append(torch.tensor(own))
                del step                                # two models with their optimizers fit no card
                free_memory(device)
            return {"steps": len(losses[0]), "relative error of the losses": relative(losses[1], losses[0]),
                    "first loss": losses[0][0].item(), "last loss": losses[0][-1].item()}
        sheet.row(f"{kind} losses bf16", steps)

def training_flags(compiled, checkpoint=False):
    """What bench.trainer reads."""
    return argparse.Namespace(lr=1e-5, warmup=0, shift=2.0, ema=0.999, rank=256, seed=0, compile=compiled,
                              checkpoint=checkpoint)

# ------------------------------------------------------------ 2., 3., 6., 7.: other commands
def commands(part, args, device):
    """Command lines of a part that other tools measure: {name: words}"""
    dry = args.dry_run
    bench_py, peers_py = (ROOT / "tests" / "tools" / name for name in ("bench.py", "bench_peers.py"))
    common = ["--device", device, "--attention", args.attention]
    tiny = ["--random", "tiny", "--size", "64", "--runs", "3", *common]
    if part == "sampling":
        if dry:
            return {"tiny": [bench_py, "sampling", "--steps", "2", *tiny]}
        runs = {}
        for model in "medium", "large":
            for size in "1024", "2048":
                for how in [], ["--compile"]:
                    name = f"{model} {size}{' compiled' if how else ''}"
                    runs[name] = [bench_py, "sampling", "--random", model, "--size", size, *how, *common]
        return runs
    if part == "training":
        if dry:
            return {"tiny": [bench_py, "training", "--batch", "1", *tiny]}
        return {"eager": [bench_py, "training", *common], "compiled": [bench_py, "training", "--compile", *common]}
    if part == "peers":
        if dry:
            few = ["--tiny", "--pairs", "2", "--device", "cpu", "--dtype", "fp32", "--attention", args.attention]
            return {"diffusers": [peers_py, *few]}
        return {"diffusers": [peers_py, "--compile", *common], "means": [peers_py, "--means", *common]}
    few = ["--steps", "3", "--images", "8", "--batch", "4", "--held", "4", "--sample-steps", "2"] if dry else []
    return {"finetune_dit.py": [ROOT / "finetune_dit.py", *few, *common]}

def by_commands(part, args, device):
    """Run each command of a part, with its time limit, and keep the end of what it printed."""
    sheet = Sheet(args, device, part)
    for name, words in commands(part, args, device).items():
        def measure():
            if part == "peers" and importlib.util.find_spec("diffusers") is None:
                return {"skipped": "diffusers is not installed"}
            folder = args.out / f"{part}-{name.replace(' ', '-')}"
            out = folder / "rows.json" if part == "peers" else folder
            shutil.rmtree(folder, ignore_errors=True)           # a training that is there already would be resumed
            folder.mkdir(parents=True)
            start = time.time()
            said = folder / "said.txt"                          # a file keeps what a command printed before it ended
            with open(said, "w") as file:
                try:
                    done = subprocess.run([sys.executable, *map(str, words), "--out", str(out)], text=True,
                                          stdout=file, stderr=subprocess.PIPE, timeout=LIMIT)
                except subprocess.TimeoutExpired:
                    done = None
            print(said.read_text(), flush=True)
            if done is None:
                return {"fault": f"not done in {LIMIT} s"}
            if done.returncode:
                return {"fault": (done.stderr.strip() or "no message").splitlines()[-1][:200]}
            return {"seconds": time.time() - start, **count_verdicts(folder), "details": str(folder)}
        sheet.row(name, measure)

def count_verdicts(folder):
    """What bench.json of a folder says of targets -> {"targets": "3 met, 1 missed"}, empty without any"""
    file = folder / "bench.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    phrases = [phrase for row in report.get("rows", {}).values() for phrase in row.get("targets", [])]
    phrases += [ratio["target"] for ratio in report.get("ratios", {}).values() if "target" in ratio]
    kinds = Counter("does not count" if phrase.startswith("does not count") else phrase.rpartition(": ")[2]
                    for phrase in phrases)
    return {"targets": ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))} if kinds else {}

# ------------------------------------------------------------ 4. stage 1
def stage1(args, device):
    """A step of align.py: images a second and memory; channels-last, cudnn.benchmark, compiled or not."""
    sheet = Sheet(args, device, "stage1")
    _, vae_arch, _, _, pixels, _ = sizes(args)
    batch = 1
    weights = argparse.Namespace(**PAPER | dict(lpips=0.0, l1=1.0, kl=1e-6, align=0.5, adaptive_align=False,
                                                gan=0.0, gan_start=1))
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    for how in "plain", "benchmark", "channels-last", "channels-last benchmark", "channels-last compiled":
        def measure():
            davae = bench.build(lambda: DAVAE(VAE(vae_arch)), device, torch.float32)
            if "channels-last" in how:
                davae.to(memory_format=torch.channels_last)
            davae.down.requires_grad_(True)
            davae.decoder.requires_grad_(True)
            stage = Stage1(davae)
            if "compiled" in how:
                stage.compile(dynamic=False, backend=backend(args))
            x = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1
            noise = torch.randn(batch, davae.D, pixels // davae.f, pixels // davae.f, device=device)

            def step():
                with autocast:
                    out = stage(x, noise, torch.ones(batch, device=device))
                loss, _ = objective(out, x, 1, weights, davae, None, None)
                loss.backward()
                davae.zero_grad()
            torch.backends.cudnn.benchmark = "benchmark" in how
            try:
                found = bench.measure(step, device, "compiled" in how, most_runs(args))
            finally:
                torch.backends.cudnn.benchmark = False
            columns = {key: found[key] for key in ("ms", "GB", "cold_s") if key in found}
            return columns | {"img/s": 1000 * batch / found["ms"]}
        sheet.row(f"{pixels} px {how}", measure)

# ------------------------------------------------------------ 5. the autoencoders
def autoencoders(args, device):
    """Encoding and decoding one image, by the VAE and by the DA-VAE: plain, channels-last as every command has
    it, and compiled, which makes one kernel of a group norm's scaling and the SiLU after it."""
    sheet = Sheet(args, device, "autoencoders")
    _, vae_arch, _, _, pixels, _ = sizes(args)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name, make in autoencoders_of(vae_arch).items():
        for size in [pixels] if args.dry_run else [pixels, 2 * pixels]:
            image = torch.rand(1, 3, size, size, device=device) * 2 - 1
            for what in "encode", "decode":
                for how in "plain", "channels-last", "compiled":
                    def measure():
                        ae = bench.build(make, device, dtype)
                        if how != "plain":
                            ae.to(memory_format=torch.channels_last)
                        call = getattr(ae, what)
                        if how == "compiled":
                            call = torch.compile(call, fullgraph=True, dynamic=False, backend=backend(args))
                        with torch.no_grad():
                            given = image if what == "encode" else ae.encode(image)
                            found = bench.measure(lambda: call(given), device, how == "compiled", most_runs(args))
                            kernel = bench.kernel_of(lambda: call(given))
                        columns = {key: found[key] for key in ("ms", "GB", "cold_s") if key in found}
                        return columns | {"kernel": kernel}
                    sheet.row(f"{name} {what} {size} px {how}", measure)

# ------------------------------------------------------------ 8. which attention kernel
def attention(args, device):
    """A transformer's forward under every --attention: its time, which kernel really ran, and what that allows."""
    sheet = Sheet(args, device, "attention")
    arch, _, length, side, _, batch = sizes(args)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak, _ = bench.pick_peak(device, dtype)
    mmdit = bench.build(lambda: MMDiT(arch), device, dtype)
    for tokens in [side // 2] if args.dry_run else [side // 2, side]:       # of a DA and of a stock image
        z = torch.randn(batch, arch.in_channels, 2 * tokens, 2 * tokens, device=device, dtype=dtype)
        text = [torch.randn(batch, length, arch.context_dim, device=device, dtype=dtype),
                torch.randn(batch, arch.pooled_dim, device=device, dtype=dtype)]
        for name in "auto", "cudnn", "flash", "efficient", "math":
            def measure():
                def forward():
                    with torch.no_grad():
                        return mmdit(z, torch.full((batch,), 0.5, device=device), *text)
                with attention_order(name):
                    found = bench.measure(forward, device, most=most_runs(args))
                    kernel = bench.kernel_of(forward)
                flop = bench.closed_form(arch, tokens, length) * batch
                rate = 1000 * flop / found["ms"]                                        # FLOP/s
                columns = {"ms": found["ms"], "TFLOP/s": rate / 1e12, "kernel": kernel}
                possible = bench.ceiling(kernel, arch, tokens, length)
                if peak == bench.HOPPER and possible:
                    columns |= {"MFU%": 100 * rate / peak, "ceil%": possible}
                return columns
            sheet.row(f"{tokens**2} tokens {name}", measure)

PARTS = {"truth": truth, "attention": attention, "sampling": by_commands, "training": by_commands,
         "stage1": stage1, "autoencoders": autoencoders, "peers": by_commands, "tiny": by_commands}

def parse_args(argv=None):
    """The command's arguments."""
    p = Parser(__doc__)
    p.add_argument("--part", choices=["all", *PARTS], default="all", help="What is measured (default all).")
    p.add_argument("--dry-run", action="store_true", help="Tiny sizes: does every line of it run?")
    p.add_argument("--fake", action="store_true", help="Count memory of the real sizes on fake tensors instead.")
    p.add_argument("--again", action="store_true", help="Measure anew what OUT already holds.")
    p.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
                   help="Where it is measured (default auto).")
    add_attention_flag(p)
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="Folder of the rows (default runs/gpu).")
    return p.parse_args(argv)

def main(args):
    if args.fake:
        return subprocess.run([sys.executable, str(ROOT / "tests" / "tools" / "memory.py")], check=True)
    device = pick_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| part | row | measured | on |\n|---|---|---|---|")
    for part in PARTS if args.part == "all" else [args.part]:
        start = time.time()
        if PARTS[part] is by_commands:
            by_commands(part, args, device)
        else:
            PARTS[part](args, device)
        print(f"{part}: {time.time() - start:.0f} s", file=sys.stderr)
    if args.dry_run and Sheet.faults:
        raise InputError(f"{len(Sheet.faults)} rows of the dry run have a fault; the first: {Sheet.faults[0]}")

if __name__ == "__main__":
    run(main, parse_args())
