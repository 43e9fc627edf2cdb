"""What the first real run meets, in the order in which it meets it: weights, data, training, scores."""
import argparse
import errno
import importlib.util
import shutil
import subprocess
import sys
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

def test_a_run_older_than_a_flag_goes_on(tmp_path):
    """A flag that the run did not know is no contradiction while it is off; on, it is one."""
    align.save_checkpoint(tmp_path, argparse.Namespace(lr=1.0), step=3)
    assert align.load_checkpoint(tmp_path, argparse.Namespace(lr=1.0, min_snr=None, no_captions=False), set())["step"] == 3
    for changed in (dict(lr=2.0), dict(lr=1.0, min_snr=5.0), dict(lr=1.0, no_captions=True)):
        with pytest.raises(InputError, match="holds another run"):
            align.load_checkpoint(tmp_path, argparse.Namespace(**changed), set())

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
    latents = labels.view(-1, 1, 1, 1).expand(-1, 32, 8, 8).half().contiguous()
    save_file({"latents": latents, "latents_flip": latents.clone(), "labels": labels}, folder / "shard-00000.safetensors")
    imagenet_eval.write_statistics(folder, torch.zeros(32), torch.ones(32))
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
