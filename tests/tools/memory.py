"""How much GPU memory does SD3.5 Medium need, by stage and by flag? In GB (1e9 bytes), without allocating any.

    python tests/tools/memory.py --out memory.json        # the tables; ten to thirty minutes of one CPU core
    python tests/tools/memory.py --optimizer              # what AdamW keeps and needs, and what others would: a minute
    python tests/tools/memory.py --check                  # a real run on this CPU, its count, what it really took

The scripts' own networks and functions run on fake tensors, each storage counted once while it lives:
weights, gradients, Adam's moments, EMA, activations, autocast's copies of weights. The CPU's autocast is made
to do what CUDA's does (norms and interpolation in float32), an RMS norm to be one kernel. Attention is the
fused one; where the kernels refuse q, k and v for their strides, here and on CUDA alike, its matrix counts.
FSDP2 is added up: a rank's share of the states, the root and two blocks gathered, in backward a block's
gradients in bf16 and float32. Not counted: the CUDA context (about 0.5 GB), workspaces of cuDNN, cuBLAS and
attention, NCCL, fragmentation, copies while a file is loaded; nor what --compile saves.
"""
import argparse, json, sys, weakref
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]
import align                                                                                    # noqa: E402
import finetune_dit                                                                             # noqa: E402
from bench import LARGE, MEDIUM, SMALL, SMALL_VAE, LiveBytes, adapt                             # noqa: E402
from imagenet_eval import LightningDiT, transport_loss                                          # noqa: E402
from sample import CLIPText, MMDiT, T5Encoder, generate                                         # noqa: E402
from vae_expand import DAVAE, SD35_MEDIUM, VAE, VAEArch, peak_memory                            # noqa: E402

LENGTH, CARDS, BF16 = 333, (24, 48, 80), torch.bfloat16     # tokens of text: CLIP's 77, T5's 256

# ------------------------------------------------------------ counting
class Held(LiveBytes):
    """LiveBytes for thousands of tensors, fake ones too: storages report when they go, rather than being
    asked after every operation. A number that is read out of a fake tensor is 1."""
    def note(self, tree, made):
        for tensor in (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, made * storage.nbytes()
            if key not in self.live:
                self.live[key] = weakref.ref(storage, partial(self.gone, key, size))
                self.now += size

    def gone(self, key, size, _):
        self.now -= size
        del self.live[key]

    def __enter__(self):
        self.now = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        self.note((args, kwargs), made=0)
        out = func(*args, **kwargs or {})
        self.note(out, made=1)
        self.peak = max(self.peak, self.now)
        return out

    def during(self, run, *args):
        """Most bytes alive at once while run(*args) runs, what was alive before included."""
        self.peak = self.now
        run(*args)
        return self.peak

class FusedRMSNorm(torch.autograd.Function):
    """What CUDA's kernel keeps for backward: its input and one number a row. Shapes alone, no values."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)

def in_float32(function):
    """`function`, given float32 for bf16 under autocast, as CUDA's autocast does and the CPU's does not."""
    def cast(v):
        return v.float() if isinstance(v, torch.Tensor) and torch.is_autocast_enabled("cpu") else v
    return lambda *args, **more: function(*map(cast, args), **{k: cast(v) for k, v in more.items()})

def replaced(module, fn, recurse=True):
    """nn.Module._apply (of .to and .float), but with new parameters: fake ones cannot be changed in place."""
    for m in module.modules():
        new = {k: torch.nn.Parameter(fn(p.detach()), p.requires_grad) for k, p in m._parameters.items()
               if p is not None}
        m._parameters.update(new)
        m._buffers.update({k: fn(v) for k, v in m._buffers.items() if v is not None})
    return module

@contextmanager
def cuda_autocast():
    """CUDA's own autocast to bf16, which fake tensors obey; torch.autocast refuses where there is no GPU."""
    kept = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", kept[0])
        torch.set_autocast_dtype("cuda", kept[1])

def is_rms_norm_in_float32():
    """Whether this torch's CUDA autocast computes rms_norm in float32; that of 2.11 leaves bf16 as it is."""
    with FakeTensorMode(), cuda_autocast():
        x, weight = (torch.empty(*n, 64, device="cuda", dtype=BF16) for n in ((2,), ()))
        return F.rms_norm(x, (64,), weight, 1e-6).dtype == torch.float32

@contextmanager
def counting(fake=True, cuda=True):
    """-> Held. fake: nothing is computed or allocated; cuda: autocast as CUDA does it (fake alone)."""
    rms_in_float32 = is_rms_norm_in_float32()
    with ExitStack() as stack:
        if fake:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", replaced))
            stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode,
                                                  create=True))
        if fake and cuda:
            kernels = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "interpolate")}
            kernels = {name: in_float32(kernel) for name, kernel in kernels.items()}
            def rms_norm(x, shape, weight=None, eps=None):
                return FusedRMSNorm.apply(x, weight)
            kernels["rms_norm"] = in_float32(rms_norm) if rms_in_float32 else rms_norm
            stack.enter_context(mock.patch.multiple(F, **kernels))
        yield stack.enter_context(Held())

def nbytes(*modules):
    """Bytes of parameters and buffers, each once."""
    state = {id(v): v for m in modules for v in (*m.parameters(), *m.buffers())}
    return sum(v.nbytes for v in state.values())

def frozen(build, dtype=BF16):
    """build() -> its module, in `dtype`, as load_strict leaves it."""
    return build().to(dtype).eval().requires_grad_(False)

def autoencoder(da, arch, dtype=BF16):
    return frozen(lambda: DAVAE(VAE(arch)) if da else VAE(arch), dtype)

def text_encoders():
    """CLIP-L, CLIP-G and T5-XXL, its .modules -> text(B): the context and pooled of B captions"""
    l = frozen(lambda: CLIPText(49408, 77, 768, 3072, 12, None, True))
    g = frozen(lambda: CLIPText(49408, 77, 1280, 5120, 32, 1280))
    t5 = frozen(lambda: T5Encoder(32128, 4096, 4096, 10240, 64, 24))

    @torch.no_grad()
    def text(B):
        ids = torch.zeros(B, LENGTH, dtype=torch.long)
        (hl, pl), (hg, pg) = l(ids[:, :77], 0), g(ids[:, :77], 0)
        clip = F.pad(torch.cat([hl, hg], -1), (0, 4096 - 2048))
        return torch.cat([clip, t5(ids[:, 77:])], 1), torch.cat([pl, pg], -1)
    text.modules = l, g, t5
    return text

# ------------------------------------------------------------ the stages, as the scripts run them
def sampling(held, arch, vae_arch, da, size, batch, length=LENGTH):
    """sample.py's draw -> bytes of {dit, vae, step, decode, tiled}, the last three without any weights"""
    vae, D = autoencoder(da, vae_arch), arch.in_channels * da
    mmdit = frozen(lambda: MMDiT(arch))
    if da:
        finetune_dit.warm_start(mmdit, D).to(BF16)
    found, side = {"dit": nbytes(mmdit), "vae": nbytes(vae)}, size // vae.f
    shapes = (batch, length, arch.context_dim), (batch, arch.pooled_dim)
    text = [torch.zeros(shape, dtype=BF16) for shape in shapes] * 2
    z = torch.zeros(batch, arch.in_channels + D, side, side)
    with torch.no_grad():
        found["step"] = held.during(lambda: generate(mmdit, vae, text, [""] * batch, size, size, 2, 4.5,
                                                     noise=z, return_latents=True))
        for name, rows in ("decode", 0), ("tiled", 64):
            vae.decoder.in_strips(rows)
            found[name] = held.during(lambda: vae.decode(z[:1])[0].float())
    return found | {k: found[k] - found["dit"] - found["vae"] for k in ("step", "decode", "tiled")}

def states(weights, *modules):
    """Bytes of {weights, gradients, Adam, EMA}: gradients, moments and EMA in float32"""
    trained = sum(p.nbytes for p in weights.values())
    return {"weights": nbytes(*modules), "gradients": trained, "Adam": 2 * trained, "EMA": trained}

def learner(module, lr, betas=(0.9, 0.999)):
    """-> what trains {name: parameter}, its EMA, its optimizer"""
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    return weights, ema, torch.optim.AdamW(weights.values(), lr, betas, weight_decay=0, fused=True)

def learn(n, loss, args, optimizer, weights, ema, decay, clip=1.0):
    """What the trainings do with the gradients of step n: clip them, check them, step, average the weights."""
    align.set_lr(optimizer, args.lr, n, args.warmup)
    norm = align.clip_gradients(weights, clip)
    align.Watch().add(n, {"loss": loss.detach()}, norm, weights)
    optimizer.step()
    optimizer.zero_grad()
    align.update_ema(ema, weights, n, decay)

def stage1(held, args, vae_arch, lpips=True, bf16=True):
    """align.py's train -> bytes of {weights, gradients, Adam, EMA, step, preview, end}"""
    davae = DAVAE(autoencoder(False, vae_arch, torch.float32))
    davae.detail_encoder.requires_grad_(not args.freeze_trunk)
    weights, ema, optimizer = learner(davae, args.lr, (0.9, 0.95))
    lpips = frozen(align.LPIPS, torch.float32) if lpips else None
    stage, h = align.Stage1(davae), args.size // davae.f
    inputs = [torch.zeros(args.batch, 3, args.size, args.size), torch.zeros(args.batch, davae.D, h, h),
              torch.ones(args.batch)]
    autocast = torch.autocast("cpu", BF16, bf16)

    def step(n):
        parts = zip(*(v.chunk(args.accumulate) for v in inputs))
        for x, *draws in parts:
            with autocast:
                out = stage(x, *draws)
            loss = align.objective(out, x, n, args, davae, lpips, None)[0]
            (loss / args.accumulate).backward()
        learn(n, loss, args, optimizer, weights, ema, 0.999)

    def end():                                      # evaluate's: four rows of a part, each compared
        x = inputs[0][:args.batch // args.accumulate]
        for y in align.reconstructions(davae, x)[0].values():
            align.ssim(x, y)
            if lpips:
                lpips(x, y.clamp(-1, 1))
    step(1)                                                                 # makes the optimizer's state
    found = states(weights, davae, *filter(None, [lpips])) | {"step": held.during(step, 2)}
    with align.ema_weights(weights, ema), torch.no_grad():
        six = torch.zeros(6, 3, args.size, args.size)
        with autocast:
            found["preview"] = held.during(align.reconstructions, davae, six)
        six = None
        return found | {"end": held.during(end)}

def stage2(held, args, arch, vae_arch, length=LENGTH, bf16=True, half=True, ranks=1, ends=True):
    """finetune_dit.py's main -> bytes of {weights, gradients, Adam, EMA, step, preview, end}
    half: as on CUDA, LoRA's frozen weights are bf16. ranks > 1: FSDP2, what one of them holds."""
    fsdp = ranks > 1
    mmdit = frozen(lambda: MMDiT(arch), BF16 if half and (fsdp or not args.full) else torch.float32)
    adapt(mmdit, args.full, args)
    mmdit.checkpoint_blocks = args.checkpoint
    if fsdp:                    # the whole weights as each layer sees them; their shards are added below
        mmdit.P_prime.to(BF16)
        mmdit.O_prime.to(BF16)
        mmdit.pos_embed = mmdit.pos_embed.float()
        for p in mmdit.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    weights, ema, optimizer = learner(mmdit, args.lr) if not fsdp else ({}, {}, None)
    side, C = args.size // (2 ** len(vae_arch.widths)), arch.in_channels
    n = args.batch * args.accumulate
    shapes = (2 * C, side, side), (2 * C, side, side), (), (length, arch.context_dim), (arch.pooled_dim,)
    inputs = [torch.zeros(n, *shape, dtype=BF16 if i > 2 else None) for i, shape in enumerate(shapes)]
    autocast = torch.autocast("cpu", BF16, bf16)

    def step(n):
        for z_hr, e, sigma, *text in zip(*(v.chunk(args.accumulate) for v in inputs)):
            at, u = sigma.view(-1, 1, 1, 1), e - z_hr
            with autocast:
                u_hat = mmdit((1 - at) * z_hr + at * e, sigma, *text)
            loss = finetune_dit.flow_loss(u_hat, u, C, 1.0)
            (loss / args.accumulate).backward()
        if not fsdp:
            learn(n, loss, args, optimizer, weights, ema, args.ema)
    step(1)
    found = states(weights, mmdit) | {"step": held.during(step, 2)}
    if ends:
        davae, text = autoencoder(True, vae_arch), text_encoders()
        found["preview"] = held.during(text, 8)                 # load_preview_inputs, amid training
        text = None
        embeddings = [torch.zeros(k, *shape, dtype=BF16) for k in (8, 1) for shape in shapes[3:]]
        previews = finetune_dit.PreviewInputs(davae, None, [""] * 8, None, embeddings)
        show = argparse.Namespace(cfg=2.5, sample_steps=2, shift=2.0)
        with align.ema_weights(weights, ema), autocast:
            drawing = held.during(finetune_dit.sample_previews, mmdit, davae, previews, args.size, show)
        found["preview"] = max(found["preview"], drawing)
        tuned = adapt(frozen(lambda: MMDiT(arch), torch.float32 if args.full else BF16), args.full, args)
        three = [frozen(lambda: MMDiT(arch)) for _ in range(3)]             # report's, beside main's `tuned`
        found["end"] = held.during(finetune_dit.sample_previews, three[0], davae.vae, previews, args.size, show)
        del tuned
    if fsdp:
        block, all_of = max(map(nbytes, mmdit.joint_blocks)), sum(p.nbytes for p in mmdit.parameters())
        root = all_of - sum(map(nbytes, mmdit.joint_blocks))
        shards = {k: times * all_of // ranks for k, times in (("gradients", 2), ("Adam", 4), ("EMA", 2))}
        # gathered: the root, a block and the next; and in backward a block's gradients, in bf16 and float32
        here = all_of * 2 // ranks + mmdit.pos_embed.nbytes + root + 2 * block
        rest = {k: found[k] - found["weights"] for k in ("step", "preview", "end") if k in found}
        extra = {"step": sum(shards.values()) + 3 * block, "preview": shards["Adam"] + 2 * shards["EMA"],
                 "end": shards["Adam"] + shards["EMA"]}
        found |= shards | {"weights": here} | {k: here + v + extra[k] for k, v in rest.items()}
    return found

def caching(held, args, vae_arch):
    """build_cache -> bytes: DA-VAE and text encoders held together, a batch encoded"""
    davae, text = autoencoder(True, vae_arch), text_encoders()
    images = torch.zeros(args.batch, 3, args.size, args.size)
    with torch.no_grad():
        return held.during(lambda: (davae.encode(images), text(args.batch)))

def lightning(held, batch=80):
    """imagenet_eval.py's train of LightningDiT-XL, 32 + 96 channels -> bytes as of stage2"""
    dit = finetune_dit.warm_start(frozen(LightningDiT, torch.float32), 96)
    dit.requires_grad_(True).pos_embed.requires_grad_(False)
    weights, ema, optimizer = learner(dit, 2e-4, (0.9, 0.95))
    x1, x0 = (torch.zeros(batch, 128, 16, 16) for _ in range(2))
    t, y = torch.zeros(batch), torch.zeros(batch, dtype=torch.long)
    args = argparse.Namespace(lr=2e-4, warmup=0)

    def step(n):
        with torch.autocast("cpu", BF16):
            loss, _ = transport_loss(dit, x1, x0, t, y, 32, 1.0)
        loss.backward()
        learn(n, loss, args, optimizer, weights, ema, 0.999, clip=float("inf"))
    step(1)
    return states(weights, dit) | {"step": held.during(step, 2)}

# ------------------------------------------------------------ the tables
def fits(card, **peaks):
    """The first name in `peaks` (bytes) with at most `card` * 1e9, or "no"."""
    return next((name.replace("_", " ") for name, peak in peaks.items() if peak <= card * 1e9), "no")

def show(rows, name, columns, **peaks):
    """Print and keep a row: bytes in GB, then, with peaks, what fits each card."""
    cells = {k: f"{v / 1e9:.2f}" for k, v in columns.items()}
    cells |= {f"{n} GB": fits(n, **peaks) for n in CARDS if peaks}
    if not rows or [*next(reversed(rows.values()))["cells"]] != [*cells]:
        print(f"\n{'':37}" + "".join(f"{k:>11}" for k in cells))
    print(f"{name:37}" + "".join(f"{v:>11}" for v in cells.values()), flush=True)
    rows[name] = {"cells": cells, "bytes": columns}

def sampling_rows(rows):
    with counting() as held:
        encoding = held.during(text_encoders(), 1)
    for da, size in (0, 1024), (1, 1024), (1, 2048), (0, 2048):
        for batch in 1, 4:
            with counting() as held:
                f = sampling(held, MEDIUM, VAEArch(), bool(da), size, batch)
            for offload in False, True:
                vae, dit = (0, 0) if offload else (f["vae"], f["dit"])          # in each other's company
                columns = {"weights": f["dit"] + vae, "text": encoding + vae}
                columns |= {"step": f["dit"] + vae + f["step"], "decode": f["vae"] + dit + f["decode"],
                            "--tile 64": f["vae"] + dit + f["tiled"]}
                least = max(columns["text"], columns["step"])
                columns["peak"], tiled = max(least, columns["decode"]), max(least, columns["--tile 64"])
                name = f"sample {'DA' if da else 'stock'} {size}, batch {batch}{', --offload' * offload}"
                show(rows, name, columns, yes=columns["peak"], tiled=tiled)

def training_rows(rows):
    def add(name, f):
        f |= {"rest": f["step"] - sum(f[k] for k in ("weights", "gradients", "Adam", "EMA"))}
        keys = ["weights", "gradients", "Adam", "EMA", "rest", "step", "cache", "preview", "end"]
        columns = {k: f[k] for k in keys if k in f}
        columns |= {"DDP": f["step"] + f["gradients"]} if "8 GPUs" not in name else {}
        columns["peak"] = max(f[k] for k in keys[5:] if k in f)
        less = {"preview_0": max(f["step"], f["cache"])} if "cache" in f else {}
        show(rows, name, columns, yes=columns["peak"], **less)

    model = ["--model", SD35_MEDIUM]
    for flags in "", "--freeze-trunk":
        for parts in 1, 2, 4, 8:
            args = align.parse_args([*model, *flags.split(), "--accumulate", str(parts)])
            with counting() as held:
                add(f"align 1024, 8 in {parts} {flags}", stage1(held, args, VAEArch()))
    for size in 1024, 2048:
        for flags, ranks in ("--batch 6", 1), ("--batch 1", 1), ("--full", 1), ("--full", 8):
            ends = {}
            for more in "", " --checkpoint":
                args = finetune_dit.parse_args([*model, "--size", str(size), *(flags + more).split()])
                if not ends:
                    with counting() as held:
                        ends["cache"] = caching(held, args, VAEArch())
                with counting() as held:
                    f = stage2(held, args, MEDIUM, VAEArch(), ranks=ranks, ends="end" not in ends)
                ends |= {k: f[k] for k in ("preview", "end") if k in f}
                kind = flags.replace("--batch", "LoRA") + f", {ranks} GPUs" * (ranks > 1)
                add(f"finetune {size}, {kind}{more}", f | ends)
    with counting() as held:
        add("LightningDiT-XL, batch 80", lightning(held))

def adamw(held, arch, full, how):
    """One step of finetune_dit.py's optimizer -> bytes of {gradients, moments, on top}, the last of what the
    step makes and drops. how: "fused", "foreach" or "single", torch's ways to write it."""
    mmdit = frozen(lambda: MMDiT(arch), torch.float32 if full else BF16)
    adapt(mmdit, full, argparse.Namespace(rank=256))
    weights = [p for p in mmdit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-4, weight_decay=0, fused=how == "fused", foreach=how == "foreach")
    for p in weights:
        p.grad = torch.zeros_like(p)
    gradients = sum(p.grad.nbytes for p in weights)
    before = held.now
    optimizer.step()                                                        # makes the moments
    moments = held.now - before
    before = held.now
    return {"gradients": gradients, "moments": moments, "on top": held.during(optimizer.step) - before}

def optimizer_rows(rows):
    """AdamW's moments, what they would be in bf16 or shared by eight, and what a step needs on top."""
    for name, arch in ("Medium", MEDIUM), ("Large", LARGE):
        for full in False, True:
            found = {}
            for how in "fused", "foreach", "single":
                with counting() as held:
                    found[how] = adamw(held, arch, full, how)
            moments = found["fused"]["moments"]
            columns = {"gradients": found["fused"]["gradients"], "moments": moments, "in bf16": moments // 2,
                       "of eight": moments // 8}
            columns |= {f"{how} +": f["on top"] for how, f in found.items()}
            show(rows, f"{name}, {'--full' if full else 'LoRA 256'}", columns)

FOOTER = """
GB are 1e9 bytes; eager, bf16 (autocast where trained). text: T5 and CLIP loaded; decode: one picture, whole,
and with --tile 64. step: the most that a training step holds; rest: the part of it that is neither weights
nor states; cache: the encoding before it (T5 and DA-VAE held); preview, end: what pictures amid and after
training, or align's table, hold; DDP: a step with gradient buckets. tiled: fits with --tile 64; preview 0:
with --preview 0. Not counted: the CUDA context (about 0.5 GB), workspaces of kernels, NCCL, fragmentation.
A card of n GB holds up to 1.07 n of these; that margin is all that is left for them here."""

def check(fake):
    """A step of --full, float32, 8 x 256 image tokens of width 512, counted or run on this CPU -> bytes"""
    args = finetune_dit.parse_args(["--model", SD35_MEDIUM, "--size", "512", "--batch", "8", "--full"])
    arch = replace(SMALL, width=512, depth=8)
    with counting(fake, cuda=False) as held:
        return stage2(held, args, arch, SMALL_VAE, 77, bf16=False, half=False, ends=False)["step"]

def main(args):
    if args.check:
        counted, before = check(True), peak_memory("cpu")
        held = check(False)
        print(f"counted {counted / 1e9:.3f} GB, held {held / 1e9:.3f}, the process grew by"
              f" {peak_memory('cpu') - before:.3f} GB")
        return
    rows = {}
    if args.optimizer:
        optimizer_rows(rows)
    else:
        sampling_rows(rows)
        training_rows(rows)
        print(FOOTER)
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the rows there, as JSON, in bytes")
    p.add_argument("--optimizer", action="store_true", help="AdamW's part alone")
    p.add_argument("--check", action="store_true", help="one real run beside its count")
    main(p.parse_args())
