"""Chapter 2 - stage 1: train D detail channels beside the pretrained latent, and align them to it.

E_d and the joint decoder learn to reconstruct, Eq. (6), while Eq. (3) keeps z_d close to z. The
pictures come from a folder or, for the embedded model, from the procedural world of
assets/world.py. The file also holds the metrics of reconstructions, and what every run shares:
processes, folders, checkpoints, the log.

    python align.py                         # the embedded model on its world: minutes on two cores
    torchrun --nproc_per_node 8 align.py --model stabilityai/stable-diffusion-3.5-medium \\
        --data photographs/ --freeze-trunk

References: DA-VAE (CVPR 2026), Eq. (1), (3), (4), (6); Zhang et al. 2018 (LPIPS); Isola et al. 2017
(PatchGAN); Wang et al. 2004 (SSIM).
"""
import atexit, errno, hashlib, json, math, os, sys, threading, time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed as dist, nn, optim
from torch._functorch import config as compiler_config

from assets.world import World, load_classifier
from vae_expand import (DAVAE, SD35_MEDIUM, TINY_MODEL, ImageDataset, InputError, Parser,
                        add_attention_flag, atomic_write, check_size, count_or_0, device_type,
                        downsample, folder_path, grid, is_tiny, leave_at_once, listing_digest,
                        load_strict, load_vae, non_negative, peak_memory, pick_device, pick_dtype,
                        plot_curves, positive, positive_int, read_file, read_json, read_torch, run,
                        save_davae, save_overview, seed_int, share, write_json)

# ------------------------------------------------------------ the method: Eq. (4), (3), (6)
def project(z_d, C):
    """Proj of Eq. (4): z_d[i r], ..., z_d[i r + r - 1] -> mean, r = D / C.
    (B, D, h, w) -> (B, C, h, w)"""
    return z_d.unflatten(1, (C, -1)).mean(2)

def align_loss(z_d, z):
    """Eq. (3), mean (Proj(z_d) - z)^2, no gradient to z. Raw z_d (B, D, h, w),
    normalised z (B, C, h, w)"""
    return F.mse_loss(project(z_d, z.shape[1]).float(), z.detach().float())

def kl_loss(mean, logvar):
    """Twice the divergence of the posterior from a unit Gaussian, mean over elements:
    the ImageNet code's."""
    return (mean**2 + logvar.exp() - 1 - logvar).mean()

class Stage1(nn.Module):
    """What a step differentiates, as one forward, so that DDP sees one module."""
    def __init__(self, davae):
        super().__init__()
        self.davae = davae

    def forward(self, x_hr, noise, keep):
        """x_hr (B, 3, s H, s W), noise for z_d (B, D, h, w), keep (B,): detail dropout,
        0 or 1 / (1 - p)
        -> reconstruction like x_hr, z (B, C, h, w), z_d, its mean and log-variance (B, D, h, w)"""
        with torch.no_grad():
            z = self.davae.vae.encode(downsample(x_hr, self.davae.s))       # Eq. (1), frozen
        mean, logvar = self.davae.detail_posterior(x_hr)
        z_d = mean + (0.5 * logvar).exp() * noise
        return self.davae.join(z, z_d * keep.view(-1, 1, 1, 1)), z, z_d, mean, logvar

def objective(out, x, n, args, davae, lpips, gan):
    """Eq. (6), L = L_rec + lambda_align L_align, of Stage1's outputs for images x at step n,
    counted from 1.
    args: the weights of the terms; lpips, gan: those networks, or None
    -> loss, {name: detached scalar}"""
    x_hat, z, z_d, mean, logvar = (v.float() for v in out)
    rec = args.l1 * (x - x_hat).abs().mean()
    if args.mse:
        rec = rec + args.mse * F.mse_loss(x_hat, x)
    if lpips:
        rec = rec + args.lpips * lpips(x, x_hat).mean()
    align = align_loss(z_d, z)                                              # Eq. (3)
    lambda_align = args.align * min(1, n / max(args.ramp, 1))
    if args.adaptive_align and lambda_align:
        lambda_align = lambda_align * gradient_ratio(rec, align, davae.down.conv.weight)
    loss = rec + lambda_align * align + args.kl * kl_loss(mean, logvar)     # Eq. (6)
    if gan and n >= args.gan_start:
        fooled = -gan(x_hat).mean()
        loss = loss + args.gan * gradient_ratio(rec, fooled, davae.decoder.conv_out.weight) * fooled
    return loss, {"loss": loss.detach(), "rec": rec.detach(), "align": align.detach()}

def gradient_ratio(loss, other, weight):
    """|d loss / d weight| / |d other / d weight|: the factor that gives both an equal say there.
    Detached."""
    [g] = torch.autograd.grad(loss, weight, retain_graph=True)
    [g_other] = torch.autograd.grad(other, weight, retain_graph=True)
    return (g.norm() / (g_other.norm() + 1e-4)).clamp(0, 1e4).detach()

# ------------------------------------------------------------ discriminator, LPIPS, PSNR, SSIM
def hinge_loss(real, fake):
    """The discriminator's loss: real logits above 1, fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

def patch_gan(width=64):
    """The discriminator of pix2pix (Isola et al. 2017), three layers.
    (B, 3, H, W) -> logits of patches"""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for c, stride in (2 * width, 2), (4 * width, 2), (8 * width, 1):
        layers += [nn.Conv2d(c // 2, c, 4, stride, 1, bias=False), nn.BatchNorm2d(c),
                   nn.LeakyReLU(0.2)]
    net = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
    for m in net:
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0.0, 0.02)
    return net

def train_discriminator(gan, gan_optimizer, images, fakes, ranks):
    """One optimizer step of the discriminator on a whole step's pictures; fakes:
    one tensor a micro-batch."""
    gan_optimizer.zero_grad()
    for real, fake in zip(images.chunk(len(fakes)), fakes):
        (hinge_loss(gan(real), gan(fake)) / len(fakes)).backward()
    if ranks > 1:                           # by hand: DDP allows no two forwards before a backward
        for p in gan.parameters():
            dist.all_reduce(p.grad.div_(ranks))
    gan_optimizer.step()

class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, VGG16, v0.1): (B, 3, H, W) twice,
    in [-1, 1] -> (B,)"""
    def __init__(self):
        super().__init__()
        layers = []
        c_in = 3
        for c in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()] if c else [nn.MaxPool2d(2)]
            c_in = c or c_in
        self.features = nn.Sequential(*layers)                          # torchvision's numbering
        self.lin = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in (64, 128, 256, 512, 512))
        self.taps = (3, 8, 15, 22, 29)                          # each last ReLU before a pooling

    def read(self, x):
        """(B, 3, H, W) -> five feature maps, each position's vector of length 1"""
        # of ImageNet's pixels, in [-1, 1]
        mean = x.new_tensor((-.030, -.088, -.188)).view(1, 3, 1, 1)
        std = x.new_tensor((.458, .448, .450)).view(1, 3, 1, 1)
        h = (x - mean) / std
        maps = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                maps.append(h / (h.norm(dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, x, y):
        """x, the real images, takes no gradient and costs no backward pass."""
        with torch.no_grad():
            real = self.read(x)
        total = 0
        for a, b, weight in zip(real, self.read(y), self.lin):
            total = total + ((a - b)**2 * weight).sum(1).mean((1, 2))
        return total                                                        # (B,)

LPIPS_FILES = {     # name: (address, digest that its content must begin with)
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth", "sha256",
                           "397923af"),
    "vgg.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/"
                "lpips/weights/v0.1/vgg.pth", "md5", "d507d7349b931f0638a25a48a722f98a")}

def fetch(name, address, kind, digest, folder=None):
    """Path of a published file, in `folder` or torch.hub's cache (fetched on first use).
    Raises: InputError if it is not there and cannot be fetched, or if its digest is another."""
    path = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    try:
        if not folder and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, path, progress=False)
        found = hashlib.new(kind, path.read_bytes()).hexdigest()
    except OSError as e:
        raise InputError(f"{path}: {e}; put {address} there, or give --lpips 0, --features"
                         " world") from None
    if not found.startswith(digest):
        raise InputError(f"{path}: {kind} {found[:16]}, expected {digest[:16]}; delete it to fetch"
                         " it again")
    return path

def load_lpips(folder=None, device="cpu"):
    """LPIPS with the published weights, from `folder` or torch.hub's cache, digests checked."""
    vgg, lin = (read_file(fetch(name, *rest, folder)) for name, rest in LPIPS_FILES.items())
    state = {k: v for k, v in vgg.items() if k.startswith("features.")}
    state |= {f"lin.{i}": lin[f"lin{i}.model.1.weight"] for i in range(5)}
    return load_strict(LPIPS, state, "LPIPS", device=device)

def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each image, after rounding to 8 bits.
    (B, 3, H, W) twice, in [-1, 1] -> (B,)"""
    x, y = ((v.float().clamp(-1, 1) * 127.5 + 127.5).round() for v in (x, y))
    return -10 * (((x - y) / 255)**2).mean((1, 2, 3)).clamp(min=1e-10).log10()

SSIM_WINDOW = 11                        # pixels a side

def check_measurable(size):
    """Raises: InputError for pictures that are smaller than SSIM's window."""
    if size < SSIM_WINDOW:
        raise InputError(f"--size {size}: SSIM looks through a window of {SSIM_WINDOW} pixels a side;"
                         " give a larger size")

def ssim(x, y):
    """Structural similarity (Wang et al. 2004), where the window lies wholly inside the image.
    (B, 3, H, W) twice, in [-1, 1] -> (B,)"""
    n = SSIM_WINDOW
    distance = torch.arange(n, device=x.device).float() - n // 2            # from its centre
    g = torch.exp(-distance**2 / (2 * 1.5**2))                              # sigma 1.5
    window = (g[:, None] * g / g.sum()**2).expand(3, 1, n, n)
    x = x.float()
    y = y.float()
    mu_x, mu_y, xx, yy, xy = (F.conv2d(v, window, groups=3) for v in (x, y, x * x, y * y, x * y))
    c1 = (0.01 * 2)**2                                                      # of a data range of 2
    c2 = (0.03 * 2)**2
    top = (2 * mu_x * mu_y + c1) * (2 * (xy - mu_x * mu_y) + c2)
    return (top / ((mu_x**2 + mu_y**2 + c1) * (xx - mu_x**2 + yy - mu_y**2 + c2))).mean((1, 2, 3))

# ------------------------------------------------------------ batches
class SpanReader(torch.utils.data.Dataset):
    """A data set for a DataLoader: item `span`, a run of positions, is data.sample(span) with what was
    found out about its files: {name: why it cannot be read}, {("small" or "damaged_profiles", name)}"""
    def __init__(self, data):
        self.data = data
        self.sent = set()                                   # what is known is not sent again

    def __getitem__(self, span):
        batch = self.data.sample(span)
        broken = {name: why for name, why in self.data.broken.items() if name not in self.sent}
        notes = self.data.notes - self.sent
        self.sent |= broken.keys() | notes
        return batch, broken, notes

def read_batches(data, spans, workers=0):
    """data.sample(span) for each of `spans`, in order, read ahead by `workers` processes, in pinned
    memory for a GPU.
    Unreadable files are named once, kept in data.broken, and counted here, over all workers. What
    else was found is kept in data.notes, and told at the end.
    Raises: InputError when too many are unreadable; see ImageDataset.check_broken."""
    loader = torch.utils.data.DataLoader(SpanReader(data), batch_size=None, sampler=spans,
                                         num_workers=workers, pin_memory=torch.cuda.is_available())
    named = set()
    for batch, broken, notes in loader:
        for name in broken.keys() - named:
            print(f"skipped: {broken[name]}", flush=True)
            named.add(name)
        data.notes.update(notes)
        if broken:
            data.broken.update(broken)
            data.check_broken()
        yield batch
    for note, count in count_notes(data.notes).items():
        print(f"{count} {NOTES[note]}", flush=True)

NOTES = {"small": "pictures are smaller than --size (enlarged, or with --drop-small left out)",
         "damaged_profiles": "pictures have a colour profile that cannot be used (taken as sRGB)"}

def count_notes(notes):
    """{(note, name)} -> {note: how many}, for the log"""
    return dict(sorted(Counter(note for note, _ in notes).items()))

class StepBatches:
    """What this rank sees in step n: its part of positions n G ... n G + G - 1,
    G = ranks * per_rank"""
    def __init__(self, data, per_rank, rank=0, ranks=1):
        self.data = data
        self.per_rank = per_rank
        self.rank = rank
        self.ranks = ranks

    def span(self, n):
        """Positions of this rank in the zero-based step n."""
        first = (n * self.ranks + self.rank) * self.per_rank
        return range(first, first + self.per_rank)

    def loader(self, first, steps, workers=0):
        """Batches of steps first ... steps - 1."""
        return read_batches(self.data, map(self.span, range(first, steps)), workers)

# ------------------------------------------------------ runs: processes, folders, checkpoints, logs
STEP_TIMEOUT = timedelta(minutes=10)   # of what ranks do together in a step: one of them has failed
waiting_group = None                    # where ranks wait for hours: for a cache, or an evaluation

def init_distributed(args):
    """Join torchrun's process group, if there is one -> (rank, ranks, device)
    Raises: InputError if the ranks' arguments differ."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and torch.cuda.is_available():             # before anything touches the first GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(args.device)
    if ranks > 1:
        backend = "nccl" if device_type(device) == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
        global waiting_group
        waiting_group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)  # after a success: it waits for the other ranks
        sys.excepthook = fail_at_once                       # after a traceback nothing waits
        torch._dynamo.config.optimize_ddp = False       # which would cut blocks at DDP's buckets
        given = set(gather_objects(str(args)))
        if len(given) > 1:
            raise InputError(f"the ranks' arguments differ: {' | '.join(sorted(given))}")
    args.ranks = ranks              # part of the run: with another number, batches would be others
    return (dist.get_rank() if ranks > 1 else 0), ranks, device

def fail_at_once(kind, error, trace):
    """sys.excepthook of a rank: its traceback, then the end, with no collective on the way out."""
    sys.__excepthook__(kind, error, trace)
    leave_at_once(1)

def print0(rank, *text):
    """print on rank 0"""
    if rank == 0:
        print(*text, flush=True)

def barrier():
    """Wait for the other ranks, if there are any, however long they take."""
    if dist.is_initialized():
        dist.barrier(group=waiting_group)

def gather_objects(value):
    """Every rank's `value`, anything that can be pickled, in rank order; waits as `barrier`
    does."""
    parts = [value]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, value, group=waiting_group)
    return parts

def gather_dict(values):
    """The entries of every rank's dict in one."""
    return {name: value for part in gather_objects(values) for name, value in part.items()}

def pick_autocast(dtype, device):
    """torch.autocast in bfloat16 where pick_dtype says so; else a context that changes nothing."""
    bf16 = pick_dtype(dtype, device, autocast=True) == torch.bfloat16
    return torch.autocast(device_type(device), torch.bfloat16, enabled=bf16)

def add_run_flags(p, out, paper, tiny):
    """The flags of every training, on Parser p; `paper` and `tiny` hold the defaults of
    parse_run."""
    def default(name):
        return f"(default {paper[name]:g}; embedded {tiny[name]:g})"
    g = p.add_argument_group("every training")
    g.add_argument("--size", type=positive_int, help=f"Image side in pixels {default('size')}.")
    g.add_argument("--steps", type=positive_int,
                   help=f"Number of training steps {default('steps')}.")
    g.add_argument("--lr", type=positive, help=f"Learning rate {default('lr')}.")
    g.add_argument("--warmup", type=count_or_0,
                   help=f"Steps over which the learning rate grows {default('warmup')}.")
    g.add_argument("--every", type=positive_int,
                   help=f"Steps between two lines of the log {default('every')}; checkpoints are"
                        " ten times as far apart.")
    g.add_argument("--save-minutes", type=positive,
                   help="Minutes between two checkpoints (default: as --every says, or as seldom as"
                        " takes 4%% of the time).")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto).")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="Number format (default auto: bf16 where the device has it).")
    g.add_argument("--compile", action="store_true", help="Compile with torch.compile.")
    add_attention_flag(g)
    g.add_argument("--seed", type=seed_int, default=0, help="Of everything random (default 0).")
    g.add_argument("--out", type=folder_path, default=Path(out), help=f"Run folder (default {out}).")

def parse_run(p, argv, paper, tiny):
    """Parse; flags left open take the values of `tiny` for the embedded model,
    else those of `paper`."""
    args = p.parse_args(argv)
    if args.data:
        args.data = str(Path(args.data).resolve())         # `data` and `data/` are one
    for name, value in (tiny if is_tiny(args.model) else paper).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args

def list_changes(before, now):
    """Settings {name: value} of what a folder holds, and those of now -> [(name, before, now)] of
    what differs. One that was not known then is no difference while it is off, nor is the digest of
    what a flag names."""
    changes = []
    for name, value in sorted(now.items()):
        unknown_then = name not in before and (not value or name.endswith("_digest"))
        if not unknown_then and str(before.get(name)) != str(value):
            changes.append((name, before.get(name), value))
    return changes

def load_checkpoint(folder, args, may_change):
    """Make the run folder, or find the last checkpoint of the same run in it -> checkpoint (dict) or None.
    All ranks call this.
    Raises: InputError if the folder's run had other arguments, naming them; those of `may_change` may
    differ. Also if the ranks do not see one folder: each would go on from a step of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    found = gather_objects(path.is_file())
    if len(set(found)) > 1:
        raise InputError(f"{path}: {sum(found)} of {len(found)} ranks find it; all nodes must share"
                         " --out")
    if not found[0]:
        return None
    saved = read_torch(path)
    differ = []
    for name, before, now in list_changes(saved.get("args", {}), vars(args)):
        flag = f"--{name.removesuffix('_digest').replace('_', '-')}"
        if name.endswith("_digest"):
            flag = f"contents of {flag}"
        if name not in may_change:
            differ.append(f"{flag} {before}, now {now}")
    if differ:
        raise InputError(f"{folder} holds another run ({'; '.join(differ)}); use its flags, or"
                         " another --out")
    for part in ("weights", "model", "ema"):
        for name, tensor in saved.get(part, {}).items():
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds nan or inf; delete the file to start anew")
    return saved

def check_progress(folder, first, steps):
    """Raises: InputError if the run in `folder` is further than `steps`: what it holds is not what was
    asked for."""
    if first > steps:
        raise InputError(f"{folder} has trained {first} steps, more than the {steps} asked for; ask for"
                         " as many, or give another --out")

def save_checkpoint(folder, args, **state):
    """Write args.json and the checkpoint, so that a kill leaves the old or the new, whole."""
    settings = {k: str(v) for k, v in sorted(vars(args).items())}
    write_json(folder / "args.json", settings)
    atomic_write(folder / "checkpoint.pt", lambda path: torch.save({"args": settings} | state,
                                                                   path))

def step_generator(seed, step, device="cpu"):
    """The random generator of a zero-based step, or of anything else that is counted. All trainings
    make theirs by this rule."""
    return torch.Generator(device).manual_seed((seed * 10**6 + step) % 2**63)

def to_cpu(state):
    """Nested dicts and lists with their tensors on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {name: to_cpu(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [to_cpu(value) for value in state]
    return state

class Checkpoints:
    """Says when a checkpoint is due, and writes it; with a GPU in a thread, beside the training."""
    def __init__(self, folder, args, device, minutes=None):
        """minutes: between two of them; None: as planned, but not so often that it costs over 4%"""
        self.folder = folder
        self.args = args
        self.minutes = minutes
        self.beside = device_type(device) == "cuda"  # on a CPU it would take the training's cores
        self.begun = self.ended = time.time()
        self.thread = self.error = None

    def due(self, planned):
        """Whether to write one now, the same on all ranks. planned: whether its step has come."""
        cost = self.ended - self.begun                  # of the last one, in seconds of training
        since = time.time() - self.ended
        if self.minutes:
            due = since >= 60 * self.minutes
        else:
            due = planned and (cost < 1 or since >= 25 * cost)
        if due:
            self.begun = time.time()
        return gather_objects(due)[0]

    def save(self, **state):
        """Write a checkpoint. Tensors of a GPU are copied first, so that they may change
        meanwhile."""
        self.finish()
        if self.beside:
            self.thread = threading.Thread(target=self.write, args=(to_cpu(state),))
            self.thread.start()
        else:
            save_checkpoint(self.folder, self.args, **state)
        self.ended = time.time()

    def write(self, state):
        try:
            save_checkpoint(self.folder, self.args, **state)
        except OSError as e:
            self.error = e

    def finish(self):
        """Wait until the last checkpoint is written. Raises: OSError if it could not be."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            raise self.error

def lock(folder, rank=0, wait=False):
    """Keep other runs out of `folder` until what is returned is closed, or the process ends. All ranks
    call this. wait: until the other run has ended.
    Raises: InputError, without `wait`, if another run is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = nullcontext()
    if rank == 0 and os.name == "posix":
        from fcntl import LOCK_EX, LOCK_NB, lockf       # which Windows lacks
        file = open(folder / ".lock", "w")
        try:
            lockf(file, LOCK_EX | LOCK_NB)
        except OSError as e:
            if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                print(f"warning: {folder / '.lock'}: this disk knows no locks; start no second run"
                      " here",
                      flush=True)
                return file
            if not isinstance(e, BlockingIOError):
                raise
            if not wait:
                raise InputError(f"{folder}: another run is at work there; give another"
                                 " --out") from None
            print(f"{folder}: another run is at work there; waiting for it", flush=True)
            lockf(file, LOCK_EX)
    barrier()
    return file

def full_tensor(tensor):
    """The whole of a tensor that FSDP2 may have sharded, detached."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()

def set_lr(optimizer, lr, step, warmup):
    """Learning rate of the zero-based `step`: it grows linearly to `lr` over `warmup` steps,
    then stays."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / max(warmup, 1))

@torch.no_grad()
def clip_gradients(weights, max_norm):
    """Scale the gradients of {name: parameter} to a norm of `max_norm` at most, in place -> the norm that
    they had. If it is not finite, nothing is scaled, so that Watch can name the gradient at fault."""
    gradients = [p.grad for p in weights.values() if p.grad is not None]
    norm = full_tensor(nn.utils.get_total_norm(gradients))
    bound = torch.where(norm.isfinite(), norm, 0)           # 0: the next line multiplies by 1
    nn.utils.clip_grads_with_norm_(weights.values(), max_norm, bound)
    return norm

class Watch:
    """The losses and gradient norms of the steps since the last line of the log. They stay on the
    device, since reading them makes the processor wait for it: that is done once an interval."""
    def __init__(self):
        self.rows = []      # of each step: (step, gradients' names, inputs' names, {name: scalar})

    @torch.no_grad()
    def add(self, step, values, norm, weights, **inputs):
        """Note a step, counted from 1, after its backward pass: values {name: scalar tensor},
        "loss" among them; weights {name: parameter}, of whose gradients the first that is not
        finite is remembered."""
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
        local = [getattr(gradient, "_local_tensor", gradient) for gradient in gradients.values()]
        not_finite = ~torch.stack(torch._foreach_norm(local)).isfinite()
        row = {**values, "norm": norm, "first bad gradient": not_finite.int().argmax(),
               "bad gradients": not_finite.sum()}
        for name, tensor in inputs.items():
            row[f"bad {name}"] = ~tensor.isfinite().all()
        self.rows.append((step, list(gradients), list(inputs), row))

    def read(self):
        """-> {name: value} of the last step, averaged over the ranks, the norm among them.
        Raises: InputError for the first step since the last call whose loss or gradient is not
        finite."""
        *_, row = self.rows[-1]
        names = list(row)
        table = torch.stack([torch.stack([row[name].float() for name in names])
                             for *_, row in self.rows])
        for (step, gradients, inputs, _), numbers in zip(self.rows, table.tolist()):
            row = dict(zip(names, numbers))
            culprits = [name for name in inputs if row[f"bad {name}"]]
            if row["bad gradients"]:
                culprits.append(f"the gradient of {gradients[int(row['first bad gradient'])]}")
            if not math.isfinite(row["loss"] + row["norm"]):
                culprits.append("the loss")
            if culprits:
                raise InputError(f"step {step}: loss {row['loss']}, norm {row['norm']}:"
                                 f" {culprits[0]} not finite; the last checkpoint is good")
        shown = names[:names.index("norm") + 1]             # the values, and the norm
        mean = table[-1, :len(shown)]
        self.rows.clear()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        return dict(zip(shown, mean.tolist()))

@torch.no_grad()
def update_ema(ema, weights, step, decay=0.999):
    """Move the average {name: tensor} towards the weights, in place, after the zero-based `step`.
    The decay starts at 1/11 and grows to `decay`, so that early averages forget the start quickly."""
    decay = min(decay, (step + 1) / (step + 11))
    torch._foreach_lerp_(list(ema.values()), list(weights.values()), 1 - decay)

@contextmanager
@torch.no_grad()
def ema_weights(weights, ema):
    """Inside, the averaged weights stand in for the trained ones."""
    trained = {name: p.clone() for name, p in weights.items()}
    try:
        for name, p in weights.items():
            p.copy_(ema[name])          # FSDP2's tensors ignore an assignment to .data
        yield
    finally:
        for name, p in weights.items():
            p.copy_(trained[name])

def short(value):
    """A float in four digits, or in as many as its whole part has: 0.01235, 123.5, 16384"""
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text else text

def drop_torn_line(path):
    """Cut off a last line that a kill or a full disk left without its end. No checkpoint is as young."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        atomic_write(path, lambda new: new.write_bytes(whole))

class Log:
    """Rank 0's record: a line an interval, on screen and in log.jsonl. When a run resumes, the lines
    after `step` are removed."""
    def __init__(self, folder, step, rank=0):
        self.path = folder / "log.jsonl"
        self.rank = rank
        self.lock = lock(folder, rank)
        if rank == 0:
            drop_torn_line(self.path)
        barrier()
        self.lines = [line for line in read_json(self.path) if line["step"] <= step]
        self.start = time.time() - max((line.get("seconds", 0) for line in self.lines), default=0)
        if rank == 0 and self.path.is_file():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            atomic_write(self.path, lambda path: path.write_text(text))

    def seconds(self):
        """Spent on this run, earlier sittings included."""
        return round(time.time() - self.start, 1)

    def add(self, **values):
        """One line."""
        self.lines.append(values)
        words = [f"{k} {short(v) if isinstance(v, float) else v}" for k, v in values.items()]
        print0(self.rank, *words)
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def plot(self, path, names, log=True):
        """Curves of the named values against the step."""
        curves = {n: [(x["step"], x[n]) for x in self.lines if n in x] for n in names}
        save_overview(path, plot_curves(curves, "step", log=log))

# ------------------------------------------------------------ the held-out table
def upsample(x, s):
    """Bicubic, what a base-resolution image gives at full size. (B, 3, H, W) -> (B, 3, s H, s W)"""
    return F.interpolate(x, scale_factor=float(s), mode="bicubic")

@torch.no_grad()
def reconstructions(davae, x):
    """Images (B, 3, s H, s W) -> {row of the table: images like x}, z (B, C, h, w),
    raw z_d (B, D, h, w)"""
    base = downsample(x, davae.s)
    z = davae.vae.encode(base)
    z_d, _ = davae.detail_posterior(x)
    rows = {"base, up-sampled": upsample(base, davae.s),
            "DA-VAE": davae.join(z, z_d),
            "z_d = 0": davae.join(z, 0 * z_d)}
    return rows, z, z_d

DETAIL_ERRORS = (0.05, 0.1, 0.2)        # in deviations of z_d: what a good transformer may be off by

@torch.no_grad()
def damaged(davae, z, z_d, rng, errors=()):
    """What the decoder makes of random details (the paper's check), and of z_d with noise on it.
    z (B, C, h, w), raw z_d (B, D, h, w); errors: the noise, as shares of z_d's deviation
    -> {row of the table: images (B, 3, s f h, s f w)}"""
    noise = torch.randn(z_d.shape, generator=rng, device=z_d.device)
    rows = {"z_d random": davae.join(z, davae.denormalise_detail(noise))}
    for error in errors:
        wrong = davae.normalise_detail(z_d) + error * noise
        rows[f"z_d + {error:.0%} noise"] = davae.join(z, davae.denormalise_detail(wrong))
    return rows

def score_images(x, y, labels, classifier, lpips):
    """Reconstructions y of images x, (B, 3, H, W) in [-1, 1] -> {column of the table: (B,)}
    classifier, with labels (B, 4), and lpips: those networks, or None to leave their columns out"""
    scores = {"PSNR": psnr(x, y), "SSIM": ssim(x, y)}
    if lpips:
        scores["LPIPS"] = lpips(x, y.clamp(-1, 1))
    if classifier:
        scores["texture"] = (classifier.predict(y.cpu())[:, 2] == labels[:, 2]).float()
    return scores

@torch.no_grad()
def evaluate(davae, data, count, batch, classifier=None, lpips=None):
    """`count` held-out images -> {row: {PSNR, SSIM, ...}}, and the alignment error relative to
    var(z)"""
    parts = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    if len(parts) > 1 and len(parts[-1]) == 1:      # a picture alone has no other to be shuffled with
        parts[-2:] = [range(parts[-2].start, count)]
    scores = []
    errors = []
    latents = []
    for part in parts:
        x, _, labels = data.sample(part)
        x = x.to(davae.detail_mean.device)
        rows, z, z_d = reconstructions(davae, x)
        rows["z_d shuffled"] = davae.join(z, z_d.roll(1, 0))
        rows |= damaged(davae, z, z_d, step_generator(0, part.start, x.device), DETAIL_ERRORS)
        errors.append(((project(z_d, davae.C) - z)**2).flatten(1).mean(1))
        latents.append(z)
        scores.append({row: score_images(x, y, labels, classifier, lpips)
                       for row, y in rows.items()})
    table = {}
    for row, columns in scores[0].items():
        table[row] = {name: torch.cat([part[row][name] for part in scores]).mean().item()
                      for name in columns}
    if count < 2:
        del table["z_d shuffled"]                           # there is no other picture
    return table, (torch.cat(errors).mean() / torch.cat(latents).var()).item()

def format_table(table):
    """{row: {column: number or text}} -> lines of text."""
    columns = list(dict.fromkeys(column for values in table.values() for column in values))
    cells = {}
    for row, values in table.items():
        numbers = {name: short(v) for name, v in values.items() if not isinstance(v, str)}
        cells[row] = values | numbers
    lines = [" " * (max(map(len, table)) + 2)]
    lines += [row.ljust(len(lines[0])) for row in table]
    for column in columns:
        texts = [column] + [values.get(column, "") for values in cells.values()]
        width = max(12, max(map(len, texts)) + 2)
        lines = [line + text.rjust(width) for line, text in zip(lines, texts)]
    return "\n".join(lines)

# ------------------------------------------------------------ the command
PAPER = dict(size=1024, batch=8, steps=100_000, lr=1e-4, warmup=500, every=50, ramp=0, lpips=1.0,
             mse=0.0)
TINY = dict(size=64, batch=16, steps=400, lr=2e-3, warmup=20, every=50, ramp=200, lpips=0.0,
            mse=1.0, detail_channels=48)

def parse_args(argv=None):
    """The command's arguments, as parse_run completes them."""
    p = Parser(__doc__)
    g = p.add_argument_group("model")
    g.add_argument("--model", default=TINY_MODEL,
                   help=f"File, folder or hub id, such as {SD35_MEDIUM} (default: the embedded"
                        " model).")
    g.add_argument("--detail-channels", type=positive_int,
                   help="D, a multiple of the base's C channels (default C; embedded 3 C).")
    g.add_argument("--scale", type=positive_int, default=2,
                   help="s, how many times the base resolution (default 2).")
    g.add_argument("--start", "--decoder-start", choices=["exact", "residual"], default="exact",
                   help="How the joint decoder begins, see DetailUp (default exact); torchrun"
                        " takes --start for its own.")
    g.add_argument("--freeze-trunk", action="store_true",
                   help="Keep E_d's trunk frozen: its new last layer and the joint decoder train, as"
                        " in the authors' SD3.5 run.")

    g = p.add_argument_group("losses: a weight of 0 turns a term off and costs nothing")
    g.add_argument("--align", type=non_negative, default=0.5,
                   help="lambda_align of Eq. (6) (default 0.5).")
    g.add_argument("--ramp", type=count_or_0,
                   help="Steps over which lambda_align grows from 0 (default 0; embedded 200).")
    g.add_argument("--adaptive-align", action="store_true",
                   help="Multiply lambda_align by a ratio of gradients, as the ImageNet code does.")
    g.add_argument("--l1", type=non_negative, default=1.0, help="Absolute error (default 1).")
    g.add_argument("--mse", type=non_negative, help="Squared error (default 0; embedded 1).")
    g.add_argument("--lpips", type=non_negative,
                   help="Perceptual distance (default 1; embedded 0: its weights are a download).")
    g.add_argument("--lpips-dir", metavar="DIR",
                   help=f"Folder that holds {', '.join(LPIPS_FILES)} (default: torch.hub's cache).")
    g.add_argument("--kl", type=non_negative, default=1e-6, help="KL divergence (default 1e-6).")
    g.add_argument("--gan", type=non_negative, default=0.0,
                   help="Adversarial, adaptive (default 0; ImageNet code 0.1).")
    g.add_argument("--gan-start", type=count_or_0, default=5001,
                   help="First step of the adversarial term (default 5001).")
    g.add_argument("--dropout", type=share, default=0.1,
                   help="Share of images whose z_d is hidden from the decoder (default 0.1).")

    g = p.add_argument_group("data and training")
    g.add_argument("--data", metavar="PATH",
                   help="Folder or tars of images (default: the embedded world).")
    g.add_argument("--drop-small", action="store_true",
                   help="Take another picture for one smaller than --size (default: enlarge it).")
    g.add_argument("--crop", choices=["random", "adm"], default="random",
                   help="Where a picture is cropped, adm: in its centre (default random).")
    g.add_argument("--held", type=positive_int, default=192,
                   help="Number of held-out images in the final table (default 192).")
    g.add_argument("--batch", type=positive_int,
                   help="Images on a rank in one step (default 8; embedded 16).")
    g.add_argument("--accumulate", type=positive_int, default=1,
                   help="Parts in which a batch is processed, to save memory (default 1).")
    add_run_flags(p, "runs/align", PAPER, TINY)
    return parse_run(p, argv, PAPER, TINY)

def draw_noise(seed, step, rank, ranks, batch, shape, dropout, device):
    """The whole global batch's draws, from the step's own seed, cut to this rank's part:
    any number of ranks draws the same -> noise for z_d (B, D, h, w), keep (B,): detail dropout,
    0 or 1 / (1 - p)"""
    rng = step_generator(seed, step, device)
    noise = torch.randn(ranks * batch, *shape, generator=rng, device=device)
    keep = (torch.rand(ranks * batch, generator=rng, device=device) >= dropout) / (1 - dropout)
    own = slice(rank * batch, (rank + 1) * batch)
    return noise[own], keep[own]

def flatten_some(images, first):
    """Make one picture in 16 a flat colour, in place: group norm has nothing to go by there,
    and must learn to show no grid. images (B, 3, H, W); first: the position of the first in the
    run"""
    flat = (torch.arange(len(images)) + first) % 16 == 0
    images[flat] = images[flat].mean((2, 3), keepdim=True).expand_as(images[flat])

@torch.no_grad()
def set_detail_statistics(davae, data, batch, device, part):
    """Measure mean and deviation of each channel of the raw z_d, on the training pictures of up to 32
    batches, about 512 at most, in place. part: how many are encoded at a time."""
    count = math.ceil(min(512, 32 * batch) / batch) * batch
    spans = (range(i, i + part) for i in range(0, count, part))
    z_d = torch.cat([davae.detail_posterior(data.sample(span)[0].to(device))[0] for span in spans])
    z_d = z_d.cpu().double().transpose(0, 1).flatten(1)                     # (D, all)
    davae.detail_mean.copy_(z_d.mean(1))
    davae.detail_std.copy_(z_d.std(1).clamp(min=1e-6))

def finish(args, davae, data, val_data, lpips, seconds, device):
    """The end of a run: z_d's statistics for the transformer, the weights, the held-out table
    -> {"table": {row: {column: value}}, "alignment error": ..., ...}, as in result.json"""
    part = args.batch // args.accumulate        # what a step holds at a time: memory is as scarce here
    set_detail_statistics(davae, data, args.batch, device, part)
    save_davae(args.out / "davae.safetensors", davae)
    classifier = load_classifier() if not args.data and args.size == 64 else None
    batch = max(2, part)                                    # two: z_d is shuffled among them
    count = min(args.held, len(val_data)) if args.data else args.held       # none of them twice
    table, error = evaluate(davae, val_data, count, batch, classifier, lpips)
    result = {"table": table, "alignment error": error, "lambda_align": args.align,
              "steps": args.steps, "images": count, "seconds": seconds, "GB": peak_memory(device),
              "seed": args.seed}
    write_json(args.out / "result.json", result)
    print(f"{format_table(table)}\nalignment error / var(z): {error:.4f}; {count} held-out images;"
          f" {seconds:.0f} s, {result['GB']:.2f} GB\n{args.out}: davae.safetensors, preview.png,"
          " loss.png")
    return result

# on resume: none of these changes what is learned
MAY_CHANGE = {"steps", "device", "every", "save_minutes", "out", "attention", "accumulate",
              "compile", "held", "lpips_dir"}

def train(args, rank, ranks, device):
    """One run of stage 1 in args.out -> {"table": ..., "alignment error": ...}
    (None on ranks but 0)."""
    # the data
    if args.data:
        data = ImageDataset(args.data, args.size, "train", args.crop, seed=args.seed,
                            drop_small=args.drop_small)
        val_data = ImageDataset(args.data, args.size, "val", "adm", flip=False,
                                listing=data.listing, drop_small=args.drop_small)
        args.data_digest = listing_digest(data.listing.items)
    else:
        data = World(args.size, args.scale, "train")
        val_data = World(args.size, args.scale, "val")
        args.data_digest = None

    # the model, its averaged weights, the optimizers
    # each part has a gradient_ratio of its own
    must_stay = {"accumulate"} if args.gan or args.adaptive_align else set()
    saved = load_checkpoint(args.out, args, MAY_CHANGE - must_stay)
    torch.manual_seed(args.seed)
    davae = DAVAE(load_vae(args.model, device=device), args.detail_channels, args.scale, args.start)
    check_size((args.size, args.size), davae.f)
    check_measurable(args.size)
    davae.detail_encoder.requires_grad_(not args.freeze_trunk)
    weights = {name: p for name, p in davae.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = optim.AdamW(weights.values(), args.lr, (0.9, 0.95), weight_decay=0, fused=True)
    lpips = load_lpips(args.lpips_dir, device) if args.lpips else None
    stateful = {"optimizer": optimizer}
    gan = None
    if args.gan:
        gan = patch_gan().to(device)
        gan_optimizer = optim.AdamW(gan.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
        stateful |= {"gan": gan, "gan_optimizer": gan_optimizer}

    # an earlier run's state
    first = saved["step"] if saved else 0
    check_progress(args.out, first, args.steps)
    if saved:
        for name in weights:
            weights[name].data.copy_(saved["weights"][name])
            ema[name].copy_(saved["ema"][name])
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        print0(rank, f"{args.out}: resumed at step {first}")

    stage = Stage1(davae)
    if args.compile:
        # gradient_ratio goes back through the graph before the loss does: what was kept for the way
        # back must last
        compiler_config.donated_buffer = not (args.gan or args.adaptive_align)
        stage.compile(dynamic=False)
    model = nn.parallel.DistributedDataParallel(stage) if ranks > 1 else stage
    autocast = pick_autocast(args.dtype, device)
    log = Log(args.out, first, rank)
    if args.data:
        log.add(step=first, data=data.summary)
    watch = Watch()
    notes = set()                                           # of the data, as all ranks know them
    checkpoints = Checkpoints(args.out, args, device, args.save_minutes)
    h = args.size // davae.f
    workers = min(4, os.cpu_count() or 1) if args.data else 0
    batches = StepBatches(data, args.batch, rank, ranks).loader(first, args.steps, workers)
    for step, (images, _, _) in enumerate(batches, first):
        last = step + 1 == args.steps
        gan_step = gan is not None and step + 1 >= args.gan_start

        # this step's pictures and draws
        flatten_some(images, (step * ranks + rank) * args.batch)
        images = images.to(device, non_blocking=True)
        noise, keep = draw_noise(args.seed, step, rank, ranks, args.batch, (davae.D, h, h),
                                 args.dropout, device)
        set_lr(optimizer, args.lr, step, args.warmup)

        # accumulate gradients over the micro-batches; ranks exchange them in the last one alone
        values = Counter()
        fakes = []
        micro_batches = zip(*(v.chunk(args.accumulate) for v in (images, noise, keep)))
        for k, (x, z_noise, kept) in enumerate(micro_batches, 1):
            with nullcontext() if ranks == 1 or k == args.accumulate else model.no_sync():
                with autocast:
                    out = model(x, z_noise, kept)
                loss, terms = objective(out, x, step + 1, args, davae, lpips, gan)      # Eq. (6)
                (loss / args.accumulate).backward()
            values.update({name: value / args.accumulate for name, value in terms.items()})
            if gan_step:
                fakes.append(out[0].detach().float())

        # the discriminator takes one step a step, whatever the number of micro-batches
        if gan_step:
            train_discriminator(gan, gan_optimizer, images, fakes, ranks)

        # clip the gradients, and note whether all is finite
        norm = clip_gradients(weights, max_norm=1.0)
        watch.add(step + 1, values, norm, weights, images=images)

        # update the weights, and their average
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, weights, step)

        # log; nothing that is not finite gets beyond this line
        if (step + 1) % args.every == 0 or last:
            values = watch.read()
            skipped = len(gather_dict(data.broken))         # files that others stand in for
            notes |= set().union(*gather_objects(data.notes - notes))       # new ones of all ranks
            log.add(step=step + 1, **values, skipped=skipped, **count_notes(notes),
                    seconds=log.seconds())

        # checkpoint and preview, by the averaged weights
        logged = (step + 1) % args.every == 0
        due = last or logged and checkpoints.due(planned=(step + 1) % (10 * args.every) == 0)
        if rank == 0 and due:
            states = {name: part.state_dict() for name, part in stateful.items()}
            checkpoints.save(step=step + 1, weights=weights, ema=ema, **states)
            log.plot(args.out / "loss.png", ["rec", "align"])
            x = val_data.sample(range(6))[0].to(device)
            with ema_weights(weights, ema), autocast:
                columns = {"real": x} | reconstructions(davae, x)[0]
            rows = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
            save_overview(args.out / "preview.png", grid(rows, len(columns), heads=list(columns)))
    if rank > 0:
        return None

    checkpoints.finish()
    with ema_weights(weights, ema), torch.no_grad():
        return finish(args, davae, data, val_data, lpips, log.seconds(), device)

def main(args):
    if args.batch % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate} does not divide --batch {args.batch}")
    train(args, *init_distributed(args))

if __name__ == "__main__":
    run(main, parse_args())
