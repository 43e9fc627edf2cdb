"""The count of memory.py: on fake tensors it is that of a real run, to the byte."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import align
import bench
import finetune_dit
import memory
from vae_expand import SD35_MEDIUM, VAEArch

ARCH = replace(bench.SMALL, depth=2, width=64, dual=(0,))
VAE_ARCH = VAEArch(widths=(8, 16), blocks=1, groups=4)

def both(run, off=0):
    """run(held) on real and on fake tensors, whose counts are equal, or a share of `off` apart -> them"""
    found = []
    for fake in False, True:
        with memory.counting(fake, cuda=False) as held:
            found.append(run(held))
    assert found[0] == pytest.approx(found[1], rel=off, abs=0)
    return found[0]

@pytest.mark.parametrize("da", [False, True])
def test_sampling_counted_is_sampling_done(da):
    found = both(lambda held: memory.sampling(held, ARCH, VAE_ARCH, da, 128, 1, length=7))
    assert 0 < found["tiled"] != found["decode"] > 0

@pytest.mark.parametrize("flags", ["--freeze-trunk", "--accumulate 2"])
def test_stage_1_counted_is_stage_1_done(flags):
    args = align.parse_args(["--model", SD35_MEDIUM, "--size", "32", "--batch", "2", *flags.split()])
    found = both(lambda held: memory.stage1(held, args, VAE_ARCH, lpips=False, bf16=False))
    assert sum(found[k] for k in ("weights", "gradients", "Adam", "EMA")) < found["step"]
    if "freeze" in flags:           # for bf16 a real group norm keeps float32 statistics, the fake one bf16
        both(lambda held: memory.stage1(held, args, VAE_ARCH, lpips=False), off=1e-3)

@pytest.mark.parametrize("flags", ["--rank 4 --checkpoint", "--full"])
def test_stage_2_counted_is_stage_2_done(flags):
    args = finetune_dit.parse_args(["--model", SD35_MEDIUM, "--size", "64", "--batch", "2", *flags.split()])
    found = both(lambda held: memory.stage2(held, args, ARCH, VAE_ARCH, 7, ends=False))
    assert sum(found[k] for k in ("weights", "gradients", "Adam", "EMA")) < found["step"]

@pytest.mark.parametrize("how, on_top", [("fused", 0), ("foreach", 1)])
def test_the_optimizer_counted_is_the_optimizer_done(how, on_top):
    """Two moments a gradient; the fused step makes nothing else, torch's own choice without it a copy of all."""
    found = both(lambda held: memory.adamw(held, ARCH, True, how), off=1e-3)           # the steps' counters, too
    assert found["moments"] == pytest.approx(2 * found["gradients"], rel=1e-3)
    assert found["on top"] == on_top * found["gradients"]

def test_two_ways_of_counting_agree():
    """Storages that report their end, and bench.LiveBytes, which asks after every operation."""
    peaks = []
    for count in memory.Held, bench.LiveBytes:
        torch.manual_seed(0)
        with count() as live:
            mmdit = memory.MMDiT(ARCH)
            out = mmdit(torch.zeros(2, 16, 16, 16), torch.ones(2), torch.zeros(2, 7, 64), torch.zeros(2, 32))
            out.sum().backward()
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 2 * memory.nbytes(mmdit)

def test_autocast_is_that_of_cuda():
    """dtypes, of the patched functions and of CUDA's own autocast, which fake tensors obey without a GPU"""
    calls = {"layer_norm": ((64,),), "group_norm": (4,), "silu": (), "gelu": ()}

    def dtypes(device):
        x, weight = (torch.empty(*n, 64, device=device, dtype=torch.bfloat16) for n in ((2, 64, 8), ()))
        found = [getattr(F, name)(x, *args).dtype for name, args in calls.items()]
        found += [F.rms_norm(x, (64,), weight, 1e-6).dtype, F.interpolate(x, scale_factor=2.0).dtype]
        return found + [(x @ x.mT).dtype, F.linear(x, torch.empty(3, 64, device=device)).dtype]
    with memory.counting(), torch.autocast("cpu", torch.bfloat16):
        ours = dtypes("cpu")
    with FakeTensorMode(), memory.cuda_autocast():
        theirs = dtypes("cuda")
    assert ours == theirs and {torch.float32, torch.bfloat16} == set(ours)

def test_sizes_are_the_published_ones():
    with memory.counting():
        counts = [sum(p.numel() for p in m.parameters()) for m in memory.text_encoders().modules]
        mmdit = sum(p.numel() for p in memory.MMDiT(bench.MEDIUM).parameters())
    assert counts == [123_060_480, 694_659_840, 4_762_310_656] and mmdit == 2_243_171_520

def test_a_card_holds_what_is_said(capsys):
    assert [memory.fits(card, yes=30e9, tiled=20e9) for card in memory.CARDS] == ["tiled", "yes", "yes"]
    assert memory.fits(24, yes=30e9, preview_0=25e9) == "no"
    assert memory.fits(24, yes=30e9, preview_0=20e9) == "preview 0"
    rows = {}
    memory.show(rows, "row", {"step": 30e9}, yes=30e9)
    assert rows["row"]["cells"] == {"step": "30.00", "24 GB": "no", "48 GB": "yes", "80 GB": "yes"}
    assert "30.00" in capsys.readouterr().out
