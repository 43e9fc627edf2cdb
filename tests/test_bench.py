"""What bench.py and bench_peers.py print and write, in seconds; their figures are no matter of a unit test."""
import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from conftest import ROOT

import bench
import sample
from sample import MMDiT
from vae_expand import VAEArch

TINY_ARCH = replace(bench.SMALL, depth=2, width=64, dual=(0,))

@pytest.fixture
def quick(monkeypatch):
    """A miniature, one size, as few repeats as quartiles need."""
    clock = bench.clock
    monkeypatch.setattr(bench, "pick_peak", lambda device, dtype: (1e11, "given"))
    vae = VAEArch(widths=(8, 8, 8, 8), groups=4)
    monkeypatch.setattr(bench, "clock", lambda run, device, *how, **more: clock(run, device, *(how or (2, 2))))
    monkeypatch.setitem(bench.RANDOM, "tiny", (TINY_ARCH, vae, 7, (64, 128), (1, 2), 64, 2))

def test_live_bytes_of_a_known_case():
    """Each storage once, views free, what is gone is gone; what came from outside is not counted."""
    given, weight = torch.randn(10, 100), torch.randn(100, 50)
    with bench.LiveBytes() as live:
        x = given + 1                               # 4000 bytes
        y = x.view(1000)[:500] * 2                  # 2000 more; the view is none
        del x
        z = y.view(10, 50) - (given @ weight)       # 2000, beside y; then 2000 for z
        assert z.shape == (10, 50)
    assert live.peak == 6000
    with bench.LiveBytes() as live:
        given.t().contiguous()
        given.add_(1)
    assert live.peak == 4000

def test_live_bytes_of_a_linear_layer_backwards():
    linear, x = torch.nn.Linear(100, 50), torch.randn(10, 100)
    with bench.LiveBytes() as live:
        linear(x).sum().backward()
    gradients = 4 * (100 * 50 + 50)
    assert gradients < live.peak < gradients + 4 * (3 * 10 * 50 + 100)

@pytest.mark.parametrize("detail_channels", [0, 16])
def test_flops_counted_are_the_closed_form(detail_channels):
    arch = replace(TINY_ARCH, detail_channels=detail_channels)
    shapes = (1, 16 + detail_channels, 12, 12), (1,), (1, 7, 64), (1, 32)
    counted = bench.counted(lambda: MMDiT(arch).requires_grad_(False), *shapes)
    assert counted == bench.closed_form(arch, 6, 7)

def test_training_costs_what_is_published():
    """SD3.5 Medium, DA at 1024 pixels, 333 text tokens, TFLOP an image: LoRA of rank 256, and all of it."""
    shapes, args = ((1, 32, 64, 64), (1,), (1, 333, 4096), (1, 2048)), argparse.Namespace(rank=256)
    for full, tera in (False, 6.237), (True, 7.325):
        flop = bench.counted(lambda: bench.adapt(MMDiT(bench.MEDIUM), full, args), *shapes)
        assert flop / 1e12 == pytest.approx(tera, abs=0.0006)

@pytest.mark.parametrize("card, tera", [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989),
                                        ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312)])
def test_a_known_card_has_its_datasheet_peak(card, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    peak, origin = bench.pick_peak("cuda", torch.bfloat16)
    assert peak == tera * 1e12 and "datasheet" in origin

def test_sampling_has_its_rows(quick, tmp_path, capsys):
    bench.sampling(bench.parse_args(["sampling", "--out", str(tmp_path / "new"), "--device", "cpu"]))
    report, said = json.loads((tmp_path / "new" / "bench.json").read_text()), capsys.readouterr().out
    sizes, batches = (64, 128), ("decode", "batch 1", "batch 2")
    names = [f"{kind} {size} {what}" for kind in ("stock", "DA s=2") for size in sizes for what in batches]
    assert [*report["rows"]] == names + ["DA s=4 128 decode", "DA s=4 128 batch 1"]
    assert all(name in said for name in names)
    rows = report["rows"]
    expected = {"stock 64": 16, "stock 128": 64, "DA s=2 64": 4, "DA s=2 128": 16, "DA s=4 128": 4}
    assert {k: rows[f"{k} batch 1"]["tokens"] for k in expected} == expected
    for name, row in rows.items():
        assert row["q1"] <= row["ms"] <= row["q3"] and row["GB"] > 0, name
    row = rows["stock 128 batch 2"]
    assert row["TFLOP"] == bench.closed_form(TINY_ARCH, 8, 7) / 1e12
    assert row["MFU%"] == pytest.approx(1e5 * row["TFLOP"] * 1e12 * 4 / row["ms"] / report["peak FLOP/s"])
    assert row["img/s"] == pytest.approx(2000 / (28 * row["ms"])) and row["+VAE"] < row["img/s"]
    assert [*report["ratios"]] == ["DA s=2 64 batch 1", "DA s=2 64 batch 2", "DA s=2 128 batch 1",
                                   "DA s=2 128 batch 2", "DA s=4 128 batch 1"]
    assert report["ratios"]["DA s=2 128 batch 1"]["FLOP"] == pytest.approx(
        bench.closed_form(TINY_ARCH, 8, 7) / bench.closed_form(replace(TINY_ARCH, detail_channels=16), 4, 7))
    assert {"device", "torch", "date", "dtype", "seed", "random", "peak"} <= {*report}

def test_what_does_not_fit_is_said_and_the_rest_goes_on(quick, tmp_path, capsys, monkeypatch):
    def generate(mmdit, vae, text, prompts, *rest, **more):
        if len(prompts) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample.generate(mmdit, vae, text, prompts, *rest, **more)
    monkeypatch.setattr(bench, "generate", generate)
    bench.sampling(bench.parse_args(["sampling", "--out", str(tmp_path), "--device", "cpu", "--size", "64"]))
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert rows["stock 64 batch 2"] == {"fault": "out of memory"} and rows["DA s=2 64 batch 1"]["ms"] > 0
    assert capsys.readouterr().out.count("out of memory") == 2

@pytest.mark.parametrize("message", ["shapes differ", "an illegal memory access was encountered"])
def test_other_faults_are_not_hidden(quick, tmp_path, message):
    def fail():
        raise RuntimeError(message)
    report = bench.Report(argparse.Namespace(compile=False, seed=0, out=tmp_path), "cpu", torch.float32, "ms")
    with pytest.raises(RuntimeError, match=message):
        report.add("row", fail)

# ------------------------------------------------------------ ceilings and targets

@pytest.mark.parametrize("detail_channels, side, expected", [(0, 64, (49, 56, 60)), (0, 128, (39, 48, 55))])
def test_the_ceilings_are_the_published_ones(detail_channels, side, expected):
    """MFU that FA2, cuDNN and FA3 allow SD3.5 Medium, at DA's and at stock's tokens of 2048 pixels"""
    found = [bench.ceiling(kernel, bench.MEDIUM, side, 333) for kernel in ("FA2", "cuDNN", "FA3")]
    assert [round(share) for share in found] == [*expected]
    assert bench.ceiling("efficient", bench.MEDIUM, side, 333) is None

@pytest.mark.parametrize("names, kernel", [
    (["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "aten::add"], "FA2"),
    (["void pytorch_flash::flash_fwd_splitkv_kernel<>", "aten::_scaled_dot_product_flash_attention"], "FA2"),
    (["void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<>>>"], "FA3"),
    (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_kernel0_0"], "cuDNN"),
    (["fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "aten::mm"], "efficient"),
    (["aten::_scaled_dot_product_attention_math", "aten::bmm"], "aten::_scaled_dot_product_attention_math"),
    (["aten::mm"], "none")])
def test_kernels_have_short_names(names, kernel):
    assert bench.name_kernels(names) == kernel

def made_up(tmp_path, monkeypatch, rows, random="medium"):
    """A report on the targets' hardware with rows of {column: value} -> it"""
    monkeypatch.setattr(bench, "pick_peak", lambda device, dtype: (989e12, "given"))
    args = argparse.Namespace(compile=True, seed=0, out=tmp_path)
    report = bench.Report(args, "cpu", torch.bfloat16, "MFU% ceil%", random=random)
    for name, row in rows.items():
        report.add(name, lambda: dict(row))
    return report

@pytest.mark.parametrize("share, kernel, verdict", [
    (55, "cuDNN", "met"), (50, "cuDNN", "missed"), (47, "FA2", "out of FA2's reach"), (55, "FA2", "met"),
    (47, "efficient", "missed")])
def test_a_row_is_judged_by_what_its_kernel_allows(share, kernel, verdict, tmp_path, monkeypatch, capsys):
    row = {"MFU%": share, "kernel": kernel}
    possible = bench.ceiling(kernel, bench.MEDIUM, 64, 333)
    if possible:
        row["ceil%"] = possible
    made_up(tmp_path, monkeypatch, {"DA s=2 2048 batch 1": row})
    [phrase] = json.loads((tmp_path / "bench.json").read_text())["rows"]["DA s=2 2048 batch 1"]["targets"]
    assert phrase.startswith(f"MFU% {share}, at least 54") and phrase.endswith(f": {verdict}")
    assert phrase in capsys.readouterr().out

def test_targets_are_at_least_or_at_most_and_of_one_size_of_model(tmp_path, monkeypatch):
    rows = {"DA s=2 1024 batch 1": {"MFU%": 43, "kernel": "FA3", "GB": 7.4, "cold_s": 12.0, "warm_s": 3.0},
            "LoRA, cached": {"img/s": 81.0, "MFU%": 50}, "full, cached": {"img/s": 60.0},
            "DA s=2 512 batch 1": {"MFU%": 1}}
    report = made_up(tmp_path, monkeypatch, rows)
    found = {name: [phrase.rpartition(": ")[2] for phrase in row["targets"]] for name, row in report.rows.items()}
    assert found == {"DA s=2 1024 batch 1": ["met", "met", "missed", "met"], "LoRA, cached": ["met"],
                     "full, cached": ["missed"], "DA s=2 512 batch 1": []}
    assert all("targets" not in row for row in made_up(tmp_path, monkeypatch, rows, random="large").rows.values())

@pytest.mark.parametrize("stock_share, da_rate, verdict", [
    (46, 7.5, "met"), (46, 7.0, "missed"), (38, 9.0, "does not count, for stock 2048 batch 1 has MFU% 38")])
def test_a_ratio_counts_only_beside_a_fast_stock(stock_share, da_rate, verdict, tmp_path, monkeypatch, capsys):
    stock = {"MFU%": stock_share, "kernel": "FA2", "ceil%": 39.0, "+VAE": 1.0, "TFLOP": 89.4}
    da = {"MFU%": 55, "kernel": "FA2", "+VAE": da_rate, "TFLOP": 11.25}
    report = made_up(tmp_path, monkeypatch, {"stock 2048 batch 1": stock, "DA s=2 2048 batch 1": da})
    phrase = bench.compare(report.rows, judged=True)["DA s=2 2048 batch 1"]["target"]
    assert (phrase.endswith(verdict) or phrase.startswith(verdict)) and phrase in capsys.readouterr().out

# ------------------------------------------------------------ the commands

def test_training_has_its_rows(quick, tmp_path):
    bench.training(bench.parse_args(["training", "--out", str(tmp_path), "--device", "cpu", "--dtype", "fp32",
                                     "--rank", "4", "--checkpoint"]))
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    assert [*rows] == ["LoRA, cached", "LoRA, encoded", "full, cached", "full, encoded"]
    assert report["batch"] == 2 and report["size"] == 64 and report["rank"] == 4
    encoding = [rows[f"{k}, encoded"]["TFLOP"] - rows[f"{k}, cached"]["TFLOP"] for k in ("LoRA", "full")]
    assert encoding[0] == pytest.approx(encoding[1]) and encoding[0] > 0
    assert rows["LoRA, cached"]["TFLOP"] < rows["full, cached"]["TFLOP"]
    for row in rows.values():
        assert row["img/s"] == pytest.approx(2000 / row["ms"]) and row["GB"] > 0

def test_the_command_runs_from_any_folder(tmp_path):
    """A size that is no square is refused, in one line; so is no command at all."""
    run = [sys.executable, ROOT / "tests/tools/bench.py", "sampling", "--device", "cpu", "--out", tmp_path]
    odd = subprocess.run([*run, "--size", "64x128"], cwd=tmp_path, capture_output=True, text=True)
    assert odd.returncode == 2 and odd.stderr.count("\n") == 1 and "squares" in odd.stderr

def test_nonsense_arguments_are_refused_in_one_line(capsys):
    numbers = ["--size", "--seed", "--steps", "--cfg", "--tile", "--batch", "--rank"]
    attempts = [["sampling", flag, value] for flag in numbers for value in ("many", "nan", "-3")]
    for argv in [], ["sleeping"], ["training", "--random", "huge"], *attempts:
        with pytest.raises(SystemExit) as stop:
            bench.parse_args(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1, argv

def test_peers_table(quick, tmp_path, capsys, monkeypatch):
    """The forward against diffusers', one pair: equal outputs, and no more bytes alive than theirs."""
    pytest.importorskip("diffusers")
    import bench_peers
    monkeypatch.setattr(bench_peers, "clock", bench.clock)
    table = bench_peers.Table("cpu", 2)
    ours, peer = bench_peers.twins(TINY_ARCH, "cpu", torch.float32)
    x, sigma, *text = bench_peers.inputs(TINY_ARCH, 8, 7, "cpu", torch.float32)
    with torch.no_grad():
        both = lambda: ours(x, sigma, *text), lambda: peer(x, *text, sigma * 1000, return_dict=False)[0]
        table.compare("forward", *both, torch.float32)
        table.weigh("forward", *both, most=1.0)
        table.race("forward", *both, most=1e9)
    assert all(row["met"] for row in table.rows.values())
    assert capsys.readouterr().out.count(", met") == 3 == len(table.rows)

def test_the_programme_for_a_gpu_runs_dry(tmp_path):
    """tests/tools/gpu.py in tiny sizes: every part, every row without a fault; what is there is not measured again."""
    command = [sys.executable, str(ROOT / "tests" / "tools" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "part | row" not in line]
    parts = {line.split(" | ")[0].strip("| ") for line in rows}
    assert {"truth", "attention", "sampling", "training", "stage1", "autoencoders", "peers", "tiny"} <= parts
    assert len(list(tmp_path.glob("*.json"))) >= 20 and any("kernel aten" in row for row in rows)
    start = time.time()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and time.time() - start < 30
    assert [line for line in again.stdout.splitlines() if line.startswith("| ") and "part | row" not in line] == rows
