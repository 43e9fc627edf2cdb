"""What the first real run meets, in the order in which it meets it: weights, data, training, scores."""
import argparse
import errno
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import align
import finetune_dit
import imagenet_eval
import sample
import vae_expand
from assets.world import World
from vae_expand import DAVAE, TINY_MODEL, InputError, load_vae, read_file

# ------------------------------------------------------------ weights as they are published

def test_the_published_lpips_file_loads():
    """vgg.pth of the package lpips is in torch's old format, with the digest that load_lpips asks for."""
    package = importlib.util.find_spec("lpips")
    if package is None:
        pytest.skip("the package lpips is not installed")
    folder = Path(package.submodule_search_locations[0]) / "weights" / "v0.1"
    address, kind, digest = align.LPIPS_FILES["vgg.pth"]
    state = read_file(align.fetch("vgg.pth", address, kind, digest, folder))
    assert [state[f"lin{i}.model.1.weight"].shape[1] for i in range(5)] == [64, 128, 256, 512, 512]

def old_format(path, state):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path

def test_networks_in_torchs_old_format_load(tmp_path):
    """VGG's and Inception's key lists, in the format in which both are published."""
    vgg = {k: v for k, v in align.LPIPS().state_dict().items() if k.startswith("features.")}
    assert read_file(old_format(tmp_path / "vgg16.pth", vgg)).keys() == vgg.keys()
    inception = imagenet_eval.Inception().state_dict()
    found = read_file(old_format(tmp_path / "inception.pth", inception))
    assert all(torch.equal(found[k], v) for k, v in inception.items())

@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.sft", "a.bin"])
def test_safetensors_are_known_by_content(name, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / name)
    assert read_file(tmp_path / name)["x"].tolist() == [1, 1]

@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin"])
def test_torch_files_with_an_optimizer_beside(name, tmp_path):
    torch.save({"state_dict": {"x": torch.ones(2)}, "optimizer": {"lr": 1e-4}, "epoch": 3}, tmp_path / name)
    assert list(read_file(tmp_path / name)) == ["x"]

def test_a_folder_with_its_incl_clips_twins(tmp_path):
    """What the hub download skips is skipped in a local folder too; macOS's droppings are no weights."""
    shutil.copy(f"{TINY_MODEL}/sd3.5_tiny.safetensors", tmp_path / "sd3_medium.safetensors")
    for twin in ("sd3_medium_incl_clips.safetensors", "sd3_medium_incl_clips_t5xxlfp8.safetensors"):
        shutil.copy(f"{TINY_MODEL}/sd3.5_tiny.safetensors", tmp_path / twin)
    (tmp_path / "._sd3_medium.safetensors").write_bytes(b"\0\5\26\7")
    assert load_vae(tmp_path).C == 16 and sample.load_mmdit(tmp_path).arch.depth == 4

# ------------------------------------------------------------ commands

def test_the_embedded_model_by_a_relative_path(monkeypatch):
    monkeypatch.chdir(Path(TINY_MODEL).parents[1])
    for module in (align, finetune_dit):
        assert module.parse_args(["--model", "assets/tiny"]).size == 64

def test_the_second_gpu_is_a_gpu():
    assert vae_expand.device_type("cuda:1") == "cuda" and vae_expand.device_type("cpu") == "cpu"

def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    align.lock(tmp_path)
    assert ".lock" in capsys.readouterr().out

FAILING = """
import argparse, sys
sys.path.insert(0, {root!r})
import align, vae_expand

def main(args):
    rank, ranks, device = align.init_distributed(args)
    if rank == 1:
        raise {error}("rank 1 has a fault")
    align.barrier()

vae_expand.run(main, argparse.Namespace(device="cpu"))
"""

@pytest.mark.parametrize("error", ["vae_expand.InputError", "KeyError"])
def test_a_rank_that_raises_ends_the_run(error, tmp_path):
    """The other waits for it in a collective, for two hours if nobody said that it had failed."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(Path(TINY_MODEL).parents[1]), error=error))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "rank 1 has a fault" in done.stderr

def two_ranks(script, text, **names):
    """Run a script on two ranks -> what they print, the seconds they took, exit code"""
    script.write_text(text.format(root=str(Path(TINY_MODEL).parents[1]), **names))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    start = time.time()
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=200)
    return done.stdout + done.stderr, time.time() - start, done.returncode

WAITING = """
import argparse, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import align, torch, vae_expand
align.STEP_TIMEOUT = timedelta(seconds=3)

def main(args):
    rank, ranks, device = align.init_distributed(args)
    time.sleep(7 * rank)
    {wait}
    print("met", flush=True)

vae_expand.run(main, argparse.Namespace(device="cpu"))
"""

def test_ranks_wait_for_hours_at_a_barrier_and_minutes_in_a_step(tmp_path):
    """A cache or an evaluation may take one rank long; in a step, a rank that is late has failed."""
    said, _, code = two_ranks(tmp_path / "a.py", WAITING, wait="align.barrier()")
    assert code == 0 and said.count("met") == 2
    said, seconds, code = two_ranks(tmp_path / "b.py", WAITING, wait="torch.distributed.all_reduce(torch.ones(1))")
    assert code != 0 and seconds < 60, said

WATCHING = """
import argparse, sys
sys.path.insert(0, {root!r})
import align, torch, vae_expand

def main(args):
    rank, ranks, device = align.init_distributed(args)
    watch = align.Watch()
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    watch.add(1, dict(loss=torch.tensor(1.0 + 2 * rank)), torch.tensor(4.0), dict(p=p))
    found = align.gather_dict({{f"file{{rank}}": "broken"}})
    print(f"{{watch.read()}} {{found}}", flush=True)

vae_expand.run(main, argparse.Namespace(device="cpu"))
"""

def test_the_logged_loss_is_the_mean_over_ranks(tmp_path):
    said, _, code = two_ranks(tmp_path / "watching.py", WATCHING)
    line = "{'loss': 2.0, 'norm': 4.0} {'file0': 'broken', 'file1': 'broken'}"
    assert code == 0 and said.count(line) == 2, said

GRAPHS = """
import argparse, sys
sys.path.insert(0, {root!r})
import align, torch, vae_expand
from sample import MMDiT, MMDiTArch
from torch._dynamo.utils import counters
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **more: compile(self, backend="eager", **more)

def main(args):
    rank, ranks, device = align.init_distributed(args)
    arch = MMDiTArch(depth=4, width=256, context_dim=32, pooled_dim=16, table=8, dual=(0, 1))
    mmdit = MMDiT(arch).compile_blocks()
    model = torch.nn.parallel.DistributedDataParallel(mmdit, bucket_cap_mb=0.5)
    x = torch.randn(2, arch.in_channels, 8, 8)
    model(x, torch.rand(2), torch.randn(2, 5, 32), torch.randn(2, 16)).mean().backward()
    graphs = counters["stats"]["unique_graphs"]
    print(f"graphs {{graphs}}\\n", end="", flush=True)         # one write: the ranks print at once

vae_expand.run(main, argparse.Namespace(device="cpu"))
"""

def test_ddp_does_not_cut_the_compiled_blocks(tmp_path):
    """Three whole-block graphs (dual, plain, last), also where DDP's buckets end inside a block."""
    said, _, code = two_ranks(tmp_path / "graphs.py", GRAPHS)
    assert code == 0 and said.count("graphs 3") == 2, said

def test_fewer_pictures_than_ranks_is_one_line():
    assert [len(imagenet_eval.rank_share(5, rank, 3)) for rank in range(3)] == [1, 2, 2]
    with pytest.raises(InputError, match="2 pictures for 3 ranks"):
        imagenet_eval.rank_share(2, 0, 3)

def test_a_checkpoint_costs_4_percent_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(align.time, "time", lambda: clock[0])
    monkeypatch.setattr(align, "save_checkpoint", lambda *_, **__: clock.__setitem__(0, clock[0] + 150))
    checkpoints = align.Checkpoints(tmp_path, None, "cpu")
    written = []
    for step in range(1, 11):                               # planned every 1000 s, each takes 150 s to write
        clock[0] += 1000
        if checkpoints.due(planned=True):
            checkpoints.save(step=step)
            written.append(step)
    assert written == [1, 5, 9]
    by_the_clock = align.Checkpoints(tmp_path, None, "cpu", minutes=30)
    assert not by_the_clock.due(planned=True)
    clock[0] += 1800
    assert by_the_clock.due(planned=False)

def test_a_checkpoint_beside_the_training_is_whole_or_said(tmp_path):
    checkpoints = align.Checkpoints(tmp_path, argparse.Namespace(lr=1.0), "cuda")
    checkpoints.save(step=3, weights={"w": torch.ones(1000)}, list=[torch.zeros(1), 5])
    checkpoints.finish()
    saved = align.load_checkpoint(tmp_path, argparse.Namespace(lr=1.0), set())
    assert saved["step"] == 3 and saved["weights"]["w"].sum() == 1000 and saved["list"][1] == 5
    lost = align.Checkpoints(tmp_path / "nowhere", argparse.Namespace(lr=1.0), "cuda")
    lost.save(step=3)
    with pytest.raises(OSError, match="cannot be written"):
        lost.finish()

@pytest.mark.parametrize("script, flags", [
    (align, "--batch 2 --steps 10 --every 5 --held 2"),
    (finetune_dit, "--batch 4 --images 8 --steps 10 --every 5 --preview 0")])
def test_the_processor_waits_for_the_device_once_an_interval(script, flags, tmp_path, monkeypatch):
    """No number is read back in a step: .item() and its like, in the loop and in what it calls."""
    calls = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        real = getattr(torch.Tensor, name)

        def counted(self, *more, name=name, real=real, **names):
            caller = sys._getframe(1).f_code
            loops = ("train", "main", "objective", "training_loss", "flow_loss", "clip_gradients", "add", "read",
                     "set_lr", "update_ema", "gradient_ratio")
            if caller.co_name in loops and Path(caller.co_filename).parent == Path(script.__file__).parent:
                calls.append((caller.co_name, name))
            return real(self, *more, **names)

        monkeypatch.setattr(torch.Tensor, name, counted)
    if script is align:
        align.train(align.parse_args([*flags.split(), "--out", str(tmp_path)]), 0, 1, "cpu")
    else:
        finetune_dit.main(finetune_dit.parse_args([*flags.split(), "--out", str(tmp_path)]))
    assert set(calls) == {("read", "tolist")} and len(calls) == 2 * 2      # two intervals: the check, the values

@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_checkpoint_is_not_held_where_that_would_keep_it_from_being_replaced(tmp_path, monkeypatch):
    """Windows refuses to replace a file that is mapped into memory."""
    align.save_checkpoint(tmp_path, argparse.Namespace(), step=3, weights={"w": torch.ones(10_000)})
    for mapped in (True, False):
        monkeypatch.setattr(vae_expand, "MAP_FILES", mapped)
        saved = align.load_checkpoint(tmp_path, argparse.Namespace(), set())
        assert saved["weights"]["w"].sum() == 10_000
        assert ("checkpoint.pt" in Path("/proc/self/maps").read_text()) == mapped
        del saved

def test_a_run_older_than_a_flag_goes_on(tmp_path):
    """A flag that the run did not know is no contradiction while it is off; on, it is one."""
    align.save_checkpoint(tmp_path, argparse.Namespace(lr=1.0), step=3)
    assert align.load_checkpoint(tmp_path, argparse.Namespace(lr=1.0, min_snr=None, no_captions=False), set())["step"] == 3
    for changed in (dict(lr=2.0), dict(lr=1.0, min_snr=5.0), dict(lr=1.0, no_captions=True)):
        with pytest.raises(InputError, match="holds another run"):
            align.load_checkpoint(tmp_path, argparse.Namespace(**changed), set())

def test_a_torn_last_line_of_a_log_stops_no_resume(tmp_path):
    """A full disk cuts a line anywhere; what stands before it stays."""
    log = align.Log(tmp_path, 0)
    log.add(step=1, loss=0.5)
    log.add(step=2, loss=0.4)
    log.lock.close()
    whole = (tmp_path / "log.jsonl").read_bytes()
    for cut in range(1, 20):
        (tmp_path / "log.jsonl").write_bytes(whole[:-cut])
        again = align.Log(tmp_path, 1)
        assert again.lines == [{"step": 1, "loss": 0.5}]
        again.lock.close()
    (tmp_path / "log.jsonl").write_bytes(b"{}, " + whole)                   # no half line, but damage
    with pytest.raises(InputError, match="log.jsonl: not a whole JSON file"):
        align.Log(tmp_path, 1)

def test_an_ablations_first_stage_is_a_run_of_as_many_ranks_and_sees_the_same_pictures(tmp_path, monkeypatch):
    """It resumes on as many ranks as it began on, like every run, and leaves out what the ablation leaves out."""
    seen = {}
    args = imagenet_eval.parse_args(["ablate", "--quick", "--drop-small", "--out", str(tmp_path)])
    monkeypatch.setattr(align, "train", lambda args, *_: seen.update(vars(args)))
    monkeypatch.setattr(imagenet_eval, "encode", lambda *_: None)
    imagenet_eval.train_stage1(args, 0.5, 0, 3, "cpu")
    assert seen["ranks"] == 3 and seen["align"] == 0.5 and seen["steps"] == 5 and seen["drop_small"]

# ------------------------------------------------------------ stage 1

def test_shuffled_details_are_another_pictures():
    """However the table is batched, also with one picture left over."""
    torch.manual_seed(0)
    davae = DAVAE(load_vae(TINY_MODEL)).eval()
    torch.nn.init.normal_(davae.decoder.conv_in.conv.weight, std=0.1)           # so that z_d matters
    for count, batch in ((4, 2), (5, 2), (3, 2)):
        table, _ = align.evaluate(davae, World(64, 2, "val"), count, batch)
        assert table["DA-VAE"]["PSNR"] != table["z_d shuffled"]["PSNR"]
    assert "z_d shuffled" not in align.evaluate(davae, World(64, 2, "val"), 1, 2)[0]

def test_the_table_counts_each_held_out_picture_once(tmp_path, capsys):
    """150 pictures hold 3 out; the documented SD3.5 command evaluates one at a time (--accumulate = --batch)."""
    for i in range(150):
        x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
        vae_expand.save_png(tmp_path / f"{i:03d}.png", x)
    flags = f"--data {tmp_path} --size 16 --steps 2 --batch 2 --accumulate 2 --out {tmp_path / 'run'} --seed 1"
    result = align.train(align.parse_args(flags.split()), 0, 1, "cpu")
    assert result["images"] == 3 and "3 held-out images" in capsys.readouterr().out
    assert result["table"]["DA-VAE"] != result["table"]["z_d shuffled"]

@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_discriminator_takes_one_step_a_step(parts):
    torch.manual_seed(0)
    gan = align.patch_gan(8)
    steps = []
    optimizer = torch.optim.SGD(gan.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    images = torch.randn(4, 3, 64, 64)
    align.train_discriminator(gan, optimizer, images, list(torch.randn(4, 3, 64, 64).chunk(parts)), 1)
    assert len(steps) == 1

def test_trained_weights_come_back_when_drawing_fails():
    weights, ema = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="drawing"):
        with align.ema_weights(weights, ema):
            assert weights["w"].tolist() == [0, 0]
            raise RuntimeError("drawing")
    assert weights["w"].tolist() == [1, 1]

def test_lpips_has_no_backward_pass_through_the_real_images():
    lpips = align.LPIPS()
    real, fake = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    for weight in lpips.lin:
        torch.nn.init.constant_(weight, 0.1)
    lpips(real, fake).sum().backward()
    assert real.grad is None and fake.grad.abs().sum() > 0

# ------------------------------------------------------------ data

def folder_of(path, good, bad=0):
    """A folder of `good` pictures with captions, and `bad` files that are none."""
    path.mkdir()
    for i in range(good):
        vae_expand.save_png(path / f"{i:04d}.png", torch.full((3, 16, 16), i / good * 2 - 1))
        (path / f"{i:04d}.txt").write_text(f"picture {i}")
    for i in range(bad):
        (path / f"bad{i}.png").write_bytes(b"no picture")
        (path / f"bad{i}.txt").write_text("no picture")
    return path

def test_a_listing_costs_less_than_100_bytes_a_picture(tmp_path):
    """ImageNet's names, captions beside and none; as a worker process receives it."""
    root = Path("imagenet/train")
    names = [f"n{c:08d}/n{c:08d}_{i}.JPEG" for c in range(20) for i in range(1000)]
    for beside in (False, True):
        rows = [(name, vae_expand.Place(root / name),
                 vae_expand.Place(root / name.replace("JPEG", "txt")) if beside else "", i)
                for i, name in enumerate(names)]
        table = vae_expand.ItemTable(root)
        for name, _, caption, label in rows:
            table.append(name, None, caption, label)
        table.finish()
        assert len(pickle.dumps(table)) < 100 * len(names)
        assert [tuple(item) for item in table] == rows
        parts = [table.split(part) for part in ("train", "val")]
        assert [len(part) for part in parts] == [19600, 400] and parts[1][1].name == names[50]
        assert sum(len(pickle.dumps(part)) for part in parts) < 200 * len(names)

@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_counted_over_all_workers(workers, tmp_path):
    data = vae_expand.ImageDataset(folder_of(tmp_path / "a", 194, 6), 16, "all")
    with pytest.raises(InputError, match="of 200 files cannot be read, above 1%"):
        list(align.read_batches(data, [range(i, i + 4) for i in range(0, 200, 4)], workers))

def test_a_cache_is_read_by_one_loader(tmp_path, monkeypatch):
    """One for the run, not one a shard; its pictures are decoded by other processes."""
    loaders = []
    real = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: loaders.append(k) or real(*a, **k))
    monkeypatch.setattr(finetune_dit, "SHARD_ROWS", 8)
    folder = folder_of(tmp_path / "data", 24)
    flags = f"--data {folder} --size 64 --batch 4 --steps 1 --preview 0 --out {tmp_path / 'run'}"
    finetune_dit.main(finetune_dit.parse_args(flags.split()))
    caching, *_ = loaders
    assert len(loaders) == 2 and caching["num_workers"] > 0                     # the second: of the training
    assert len(list((tmp_path / "run" / "cache").glob("shard-*"))) == 3

# ------------------------------------------------------------ ImageNet

def test_a_sample_is_spread_over_the_classes():
    assert imagenet_eval.spread(4, 100) == [0, 25, 50, 75]
    assert imagenet_eval.spread(7, 7) == list(range(7))
    positions = imagenet_eval.spread(10_000, 1_281_167)
    assert len(set(positions)) == 10_000 and positions[-1] > 1_281_000

def class_latents(folder, classes=4, each=8):
    """Latents whose mean is their class, in class order, as `encode` leaves them."""
    folder.mkdir()
    labels = torch.arange(classes).repeat_interleave(each)
    latents = labels.view(-1, 1, 1, 1).expand(-1, 64, 8, 8).half().contiguous()
    save_file({"latents": latents, "latents_flip": latents.clone(), "labels": labels}, folder / "shard-00000.safetensors")
    imagenet_eval.write_statistics(folder, torch.zeros(64), torch.ones(64))
    return folder

def test_a_model_without_statistics_is_refused(tmp_path, refused):
    latents = class_latents(tmp_path / "latents")
    shutil.copy(f"{TINY_MODEL}/lightningdit/lightningdit.safetensors", tmp_path / "dit.safetensors")
    said = refused(imagenet_eval, "train", "--latents", latents, "--init", tmp_path / "dit.safetensors",
                   "--out", tmp_path / "run", "--epochs", 1)
    assert "latents_stats" in said

def test_labels_that_the_model_has_not_are_refused(tmp_path, refused):
    latents = class_latents(tmp_path / "latents", classes=42, each=1)
    said = refused(imagenet_eval, "train", "--latents", latents, "--out", tmp_path / "run", "--epochs", 1)
    assert "41" in said and "36" in said

def damaged(path, kind):
    good = dict(mu=np.zeros(4), sigma=np.eye(4))
    if kind == "nan":
        good["mu"] = np.full(4, np.nan)
    elif kind == "shape":
        good["sigma"] = np.eye(3)
    elif kind == "missing":
        del good["sigma"]
    elif kind == "objects":
        good["mu"] = np.array([None] * 4, dtype=object)
    np.savez(path, **good)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "empty":
        path.write_bytes(b"")

@pytest.mark.parametrize("kind", ["nan", "shape", "missing", "objects", "truncated", "empty"])
def test_a_damaged_reference_is_one_line(kind, tmp_path):
    damaged(tmp_path / "ref.npz", kind)
    with pytest.raises(InputError, match="no statistics"):
        imagenet_eval.feature_statistics(tmp_path / "ref.npz", None, None, 0, 1, "cpu")

def test_one_picture_has_no_covariance():
    moments = imagenet_eval.Moments()
    moments.add(torch.ones(1, 4))
    with pytest.raises(InputError, match="1 picture"):
        moments.result()

def test_statistics_of_shards_are_of_all_classes(tmp_path):
    cache = finetune_dit.LatentCache(class_latents(tmp_path / "latents"), ["latents"])
    rows = imagenet_eval.spread(8, len(cache))
    assert cache.sample(rows)[0].mean().item() == 1.5
    assert load_file(tmp_path / "latents" / "shard-00000.safetensors")["latents"][:8].mean().item() == 0

def test_weights_are_kept_as_training_goes_on(tmp_path):
    """--keep-every: the paper's best point is not its last."""
    latents = class_latents(tmp_path / "latents")
    flags = f"train --latents {latents} --batch 8 --epochs 4 --keep-every 2 --out {tmp_path / 'run'}"
    imagenet_eval.main(imagenet_eval.parse_args(flags.split()))
    kept = [imagenet_eval.load_lightningdit(tmp_path / "run" / f"epoch-{n}") for n in (2, 4)]
    last = imagenet_eval.load_lightningdit(tmp_path / "run")
    assert torch.equal(kept[1].x_embedder["proj"].weight, last.x_embedder["proj"].weight)
    assert not torch.equal(kept[0].x_embedder["proj"].weight, last.x_embedder["proj"].weight)
    assert imagenet_eval.read_statistics(tmp_path / "run" / "epoch-2") is not None
    scored = f"curve {tmp_path / 'run'} --ref world --count 16 --steps 3 --davae {TINY_MODEL}/davae.safetensors"
    imagenet_eval.main(imagenet_eval.parse_args([*scored.split(), "--out", str(tmp_path / "curve")]))
    table = json.loads((tmp_path / "curve" / "curve.json").read_text())["table"]
    assert list(table) == ["epoch 2", "epoch 4"] and all(row["Frechet-16"] > 0 for row in table.values())
    more = flags.replace("--epochs 4 --keep-every 2", "--epochs 6 --keep-every 3")
    imagenet_eval.main(imagenet_eval.parse_args(more.split()))                  # a finished run goes on
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 24
