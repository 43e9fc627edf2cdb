"""Chapter 4: the warm start bit for bit, Eq. 12 and 13 by hand, LoRA, caches, one process or two, export."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune_dit
import sample
from align import save_checkpoint
from conftest import ROOT, peer_mmdit, randomise, relative_error
from finetune_dit import LoRA, add_lora, export, export_diffusers, flow_loss, merge_lora, min_snr_weight, omega, warm_start
from sample import MMDiT, MMDiTArch, fuse_details, generate, load_mmdit, split_details
from test_sample import KINDS, inputs
from vae_expand import DAVAE, TINY_MODEL, InputError, bucket_sizes, load_vae, read_metadata, save_davae

def mini(kind, tmp_path, **more):
    peer_mmdit(kind, **more).save_pretrained(tmp_path / "hub" / "transformer")
    return load_mmdit(tmp_path / "hub")

# ------------------------------------------------------------ warm start

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_pretrained_model_bit_for_bit(kind, dtype, tmp_path):
    """Whatever the detail channels hold, at many sizes; and the detail output is exactly 0."""
    stock = mini(kind, tmp_path).to(dtype)
    model = warm_start(load_mmdit(tmp_path / "hub"), 32).to(dtype)
    assert model.arch.detail_channels == 32
    for height, width in ((8, 8), (16, 24), (4, 40), (48, 48)):
        x, sigma, context, pooled = inputs(height, width)
        z_d = 100 * torch.randn(2, 32, height, width)
        with torch.no_grad():
            u = model(torch.cat([x, z_d], 1), sigma, context, pooled)
            assert torch.equal(u[:, :16], stock(x, sigma, context, pooled))
        assert u.shape == (2, 48, height, width) and not u[:, 16:].any()

def test_min_snr_is_the_released_weight():
    """t^2 times min(SNR, gamma) with SNR = (1 - t) / t; a weight of 1 changes nothing, one of a half halves."""
    t = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(min_snr_weight(t, 5.0), t**2 * torch.minimum((1 - t) / t, torch.tensor(5.0)))
    u_hat, u = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    plain = flow_loss(u_hat, u, 4, 0.3)
    assert torch.equal(flow_loss(u_hat, u, 4, 0.3, torch.ones(3)), plain)
    assert torch.allclose(flow_loss(u_hat, u, 4, 0.3, torch.full((3,), 0.5)), plain / 2)

def test_first_gradients(tmp_path):
    """At step 0 O' has a gradient and P' none at all; after one step both have."""
    model = warm_start(mini("medium", tmp_path), 16).requires_grad_(True)
    x, sigma, context, pooled = inputs(8, 8)
    x, u = torch.cat([x, torch.randn_like(x)], 1), torch.randn(2, 32, 8, 8)

    def backward():
        model.zero_grad()
        # eq. 13 without the base: what the details alone ask for
        flow_loss(model(x, sigma, context, pooled)[:, 16:], u[:, 16:], 0, 1.0).backward()
        return model.P_prime.weight.grad.abs().max().item(), model.O_prime.weight.grad.abs().max().item()

    p, o = backward()
    assert p == 0 and o > 0
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    p, o = backward()
    assert p > 0 and o > 0

def test_without_zero_init(tmp_path):
    model = warm_start(mini("large", tmp_path), 16, zero_init=False)
    assert model.P_prime.weight.std() > 0.01 and model.O_prime.weight.std() > 0.01

def test_fused_export_is_interleaved_per_patch(tmp_path):
    """One widened convolution and one widened linear, as diffusers' model with C + D channels has them."""
    diffusers = pytest.importorskip("diffusers")
    model = warm_start(mini("medium", tmp_path), 16)
    randomise(model)
    fused = fuse_details(model.state_dict())
    assert fused["x_embedder.proj.weight"].shape[1] == 32 and len(fused["final_layer.linear.weight"]) == 4 * 32
    # position 1 of the patch, detail channel 3: row 1 * 32 + 16 + 3 of the fused head, row 1 * 16 + 3 of O'
    assert torch.equal(fused["final_layer.linear.weight"][51], model.O_prime.weight[19])
    again = split_details(fused)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    export(tmp_path / "dit.safetensors", model, shift=2.0)
    loaded = load_mmdit(tmp_path / "dit.safetensors")
    export_diffusers(tmp_path / "peer", model)
    peer = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "peer" / "transformer").eval()
    x, sigma, context, pooled = inputs(16, 8)
    x = torch.cat([x, torch.randn_like(x)], 1)
    with torch.no_grad():
        ours = model(x, sigma, context, pooled)
        assert torch.equal(loaded(x, sigma, context, pooled), ours)
        assert relative_error(ours, peer(x, context, pooled, 1000 * sigma).sample) < 1e-5
    assert peer.config.in_channels == 32
    export_diffusers(tmp_path / "again", load_mmdit(tmp_path / "peer"))  # and the round trip
    a, b = (load_file(tmp_path / n / "transformer/diffusion_pytorch_model.safetensors") for n in ("peer", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_position_tables(monkeypatch):
    """DA-1024 has the tokens of stock 512 and uses the same crop of the table; DA-2048 that of stock 1024."""
    crops, arch = [], MMDiTArch(depth=1, width=64, table=384, context_dim=8, pooled_dim=8, dual=())
    stock, tuned = MMDiT(arch), warm_start(MMDiT(arch), 16)
    for model in (stock, tuned):
        model.pos_embed.copy_(torch.arange(384.0**2)[None, :, None].expand(1, -1, 64))
    positions = MMDiT.positions
    monkeypatch.setattr(MMDiT, "positions", lambda self, h, w: crops.append(positions(self, h, w)) or crops[-1])
    text = torch.zeros(1, 1, 8), torch.zeros(1, 8)

    class Autoencoder:
        def __init__(self, f):
            self.f = f

    for size in (512, 1024):
        for model, f, n in ((stock, 8, size), (tuned, 16, 2 * size)):
            generate(model, Autoencoder(f), text, ["x"], n, n, steps=1, cfg=1, return_latents=True)
        assert torch.equal(crops[-1], crops[-2]) and crops[-1].shape[1] == (size // 16) ** 2
    assert crops[0][0, 0, 0] == 384 * 176 + 176              # 32 of 384: from row and column 176 on

# ------------------------------------------------------------ the equations

def test_omega_by_hand():
    """Eq. (12)"""
    expected = [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]
    assert [omega(n, 4) for n in (0, 1, 2, 3, 4, 9)] == pytest.approx(expected)
    assert omega(0, 0) == 1.0

def test_flow_loss_by_hand():
    """Eq. (13), C = 1, D = 2, one position: squares 4 | 1, 9; w = 0.5 -> (4 + 5) / (1 + 1)"""
    u_hat, u = torch.tensor([2.0, 1.0, 3.0]).view(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    assert flow_loss(u_hat, u, 1, 0.5).item() == 4.5
    assert flow_loss(u_hat, u, 1, 0.0).item() == 4.0
    assert flow_loss(u_hat, u, 1, 1.0).item() == pytest.approx(((u_hat - u) ** 2).mean().item())

# ------------------------------------------------------------ LoRA

@pytest.mark.parametrize("parts, shape", [(1, (2, 48)), (3, (2, 5, 48))])
def test_lora_is_a_low_rank_change_of_each_part(parts, shape):
    """Output and gradients equal the formula written out part by part: W x + b, and beside it up (down x)."""
    torch.manual_seed(0)
    lora = LoRA(torch.nn.Linear(48, 32 * parts), 4, parts)
    torch.nn.init.normal_(lora.up)
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 32 * parts)
    change = torch.cat([x @ down.T @ up.T for down, up in zip(lora.down, lora.up)], dim=-1)
    expected = x @ lora.linear.weight.T + lora.linear.bias + change
    found = lora(x)
    inputs = x, lora.down, lora.up
    pairs = zip((found, *torch.autograd.grad((found * weights).sum(), inputs)),
                (expected, *torch.autograd.grad((expected * weights).sum(), inputs)))
    assert all(relative_error(ours, by_hand) < 1e-6 for ours, by_hand in pairs)

@pytest.mark.parametrize("kind", KINDS)
def test_lora(kind, tmp_path):
    """The identity at first; trains what the authors train and nothing else; merges to the same function."""
    stock = mini(kind, tmp_path)
    model = add_lora(warm_start(load_mmdit(tmp_path / "hub"), 16), rank=8)
    x, sigma, context, pooled = inputs(8, 8)
    wide = torch.cat([x, torch.randn_like(x)], 1)
    assert torch.equal(model(wide, sigma, context, pooled)[:, :16], stock(x, sigma, context, pooled))
    adapted = {name.split(".", 2)[2] for name, m in model.named_modules() if isinstance(m, LoRA)}
    expected = {"x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc2", "x_block.adaLN_modulation.1"}
    assert adapted == expected | ({"x_block.attn2.qkv", "x_block.attn2.proj"} if kind == "medium" else set())
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in training if not n.endswith((".down", ".up"))} == {
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "P_prime.weight",
        "O_prime.weight",
        "O_prime.bias",
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        flow_loss(model(wide, sigma, context, pooled), torch.randn_like(wide), 16, 1.0).backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == training
    with torch.no_grad():
        expected = model(wide, sigma, context, pooled)
        merge_lora(model)
        assert not any(isinstance(m, LoRA) for m in model.modules())
        assert relative_error(model(wide, sigma, context, pooled), expected) < 1e-5
    # q, k and v have factors of their own
    tuned, before = (m.get_parameter("joint_blocks.0.x_block.attn.qkv.weight").detach() for m in (model, stock))
    q, k, v = (tuned - before).chunk(3)
    assert all(torch.linalg.matrix_rank(d, rtol=1e-3) == 8 for d in (q, k, v))
    assert torch.linalg.matrix_rank(torch.cat([q, k, v], 1), rtol=1e-3) > 8

# ------------------------------------------------------------ runs, on the embedded model

@pytest.fixture(scope="module")
def davae(tmp_path_factory):
    """An untrained DA-VAE over the embedded VAE is enough for these."""
    path = tmp_path_factory.mktemp("davae") / "davae.safetensors"
    torch.manual_seed(0)
    save_davae(path, DAVAE(load_vae(TINY_MODEL)))
    return path

@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")

def flags(davae, cache, out, *args):
    small = ["--images", 300, "--batch", 4, "--every", 1, "--preview", 0, "--dtype", "fp32"]
    return [str(arg) for arg in ("--davae", davae, "--cache", cache, *small, "--out", out, *args)]

def tune(davae, cache, out, *args, ranks=1, ok=True, start=subprocess.run, **more):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, ROOT / "finetune_dit.py", *flags(davae, cache, out, *args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = start(command, env=env, **more or dict(capture_output=True, text=True))
    if start is subprocess.run:
        assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done

def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)

def same(a, b, tolerance=0.0):
    """Weights, averages and optimizer's moments of two checkpoints."""
    assert a["step"] == b["step"]
    pairs = [(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part]]
    for name, moments in a["optimizer"]["state"].items():
        pairs += [(moments[k], b["optimizer"]["state"][name][k]) for k in ("exp_avg", "exp_avg_sq")]
    assert len(pairs) > 100
    return max((x.double() - y.double()).abs().mean().item() for x, y in pairs) <= tolerance

def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["base"], line["detail"]) for line in lines if "base" in line]

@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.slow), ("--full",)])
def test_killed_and_resumed_equals_uninterrupted(more, davae, cache, tmp_path):
    """kill -9 in the middle: the resumed run's losses, weights, averages and moments are the same bits. (Of LoRA
    test_faults.py kills a run, too.)"""
    tune(davae, cache, tmp_path / "whole", "--steps", 30, *more)
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = tune(davae, cache, tmp_path / "parts", "--steps", 30, *more, start=subprocess.Popen, **silent)
    log = tmp_path / "parts" / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 14:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = tune(davae, cache, tmp_path / "parts", "--steps", 30, *more)
    assert "resumed at step" in done.stdout
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [step for step, *_ in losses(tmp_path / "parts")] == list(range(1, 31))

@pytest.mark.parametrize("more", [(), ("--full",)])
def test_two_processes_equal_one(more, davae, cache, tmp_path):
    """DDP for LoRA, FSDP2 for --full, by torchrun; and a checkpoint of two ranks goes on with one. A preview amid,
    drawn by the averaged weights, leaves none of them behind."""
    amid = ["--preview", 4, "--held", 2, "--sample-steps", 2] if more else []
    tune(davae, cache, tmp_path / "one", "--steps", 10, "--accumulate", 2, *more)
    tune(davae, cache, tmp_path / "two", "--steps", 10, *more, *amid, ranks=2)
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    # rank 0 logs its half of the batch, so losses differ, gradients do not
    assert same(one, two, tolerance=1e-5), "weights"
    assert len(a) == len(b) == 10
    last = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    torch.save(last | {"args": last["args"] | {"accumulate": "2", "ranks": "1"}}, tmp_path / "two/checkpoint.pt")
    tune(davae, cache, tmp_path / "two", "--steps", 20, "--accumulate", 2, *more)
    tune(davae, cache, tmp_path / "one", "--steps", 20, "--accumulate", 2, *more)
    assert same(saved(tmp_path / "one"), saved(tmp_path / "two"), tolerance=3e-5)

def test_cache_is_made_once_and_guarded(davae, cache, tmp_path, monkeypatch):
    """A second run loads neither VAE nor text encoders; another VAE or size is refused; a shard is remade."""
    tune(davae, cache, tmp_path / "a", "--steps", 1)
    shards = {p.name: p.read_bytes() for p in cache.glob("*.safetensors")}
    assert sorted(shards) == ["empty.safetensors", "shard-00000.safetensors", "shard-00001.safetensors"]
    for loader in "load_vae", "load_davae", "load_text_encoders":
        monkeypatch.setattr(finetune_dit, loader, None)
    finetune_dit.main(finetune_dit.parse_args(flags(davae, cache, tmp_path / "b", "--steps", 1)))
    (cache / "shard-00001.safetensors").unlink()
    tune(davae, cache, tmp_path / "c", "--steps", 1, ranks=2)
    again = load_file(cache / "shard-00001.safetensors")
    (tmp_path / "old.safetensors").write_bytes(shards["shard-00001.safetensors"])
    assert all(torch.equal(v, load_file(tmp_path / "old.safetensors")[k]) for k, v in again.items())
    state = load_file(davae)
    state["detail_mean"] += 1
    save_file(state, tmp_path / "other.safetensors", metadata=read_metadata(davae))
    for args, said in ([tmp_path / "other.safetensors"], "davae"), ([davae, "--size", 32], "size 64, now 32"):
        done = tune(args[0], cache, tmp_path / "d", "--steps", 1, *args[1:], ok=False)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr

def test_shards_of_a_run_that_left_no_manifest_do_not_pass_for_another_runs(tmp_path):
    """Rank 1 of a first run wrote its shard, then all was killed, before rank 0 wrote the manifest; a run with other
    flags wrote one shard, and was killed too. The third made the rest, and took the first run's shard."""
    stale = tmp_path / "shard-00001.safetensors"
    save_file({"latents": torch.zeros(2)}, stale)
    missing = finetune_dit.missing_shards(tmp_path, {"cfg": 1}, 6, 2, 0, 1)
    finetune_dit.write_shard(next(iter(missing)), {"cfg": 1}, 0, latents=torch.ones(2))
    again = finetune_dit.missing_shards(tmp_path, {"cfg": 1}, 6, 2, 0, 1)
    assert [path.name for path in again] == ["shard-00001.safetensors", "shard-00002.safetensors"]

def test_checkpointing_and_ablations_run(davae, cache, tmp_path):
    plain = tune(davae, cache, tmp_path / "plain", "--steps", 2)
    tune(davae, cache, tmp_path / "check", "--steps", 2, "--checkpoint")
    assert same(saved(tmp_path / "plain"), saved(tmp_path / "check"), 1e-7)
    assert "LoRA of rank 48 on" in plain.stdout and "4 x_block.attn.qkv, 4 x_block.attn.proj" in plain.stdout
    tune(davae, cache, tmp_path / "none", "--steps", 2, "--no-zero-init", "--no-schedule")
    assert not same(saved(tmp_path / "plain"), saved(tmp_path / "none"), 1e-4)

def test_sampling_the_export_beside_the_stock_model(davae, cache, tmp_path):
    """sample.py --compare: the same seeds, a quarter of the tokens, the shift of the training."""
    from PIL import Image

    tune(davae, cache, tmp_path / "run", "--steps", 1, "--shift", 1.5, "--export-diffusers", tmp_path / "peer")
    command = [sys.executable, ROOT / "sample.py", "--dit", tmp_path / "run/dit.safetensors", "--davae", davae,
               "--compare", "--steps", "3", "--out", tmp_path / "out", "--size", "128x64", "a red circle"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(said in done.stdout for said in ("16x8 tokens", "8x4 tokens", "guidance 2.5, shift 1.5"))
    for name in ("stock", "DA-VAE"):
        image = Image.open(tmp_path / "out" / f"0000-{name}.png")
        assert image.size == (128, 64) and image.text["seed"] == "0"
    assert (tmp_path / "peer/transformer/config.json").is_file()

def test_photographs_with_captions(shared, davae, tmp_path):
    done = tune(davae, tmp_path / "cache", tmp_path / "run", "--data", shared / "data/clothing/val-256.tar",
                "--images", 8, "--steps", 2, "--preview", 1, "--sample-steps", 2)
    assert (tmp_path / "run/result.png").is_file() and "stock at full size" in done.stdout

@pytest.mark.parametrize("args, said", [
    (["--size", "65"], "the nearest is 64x64"), (["--size", "72"], "the nearest is 64x64"),
    (["--davae", "no/where"], "no such file"), (["--data", "no/where"], "no such file"),
    (["--steps", "x"], "invalid int"), (["--model", "no/where"], "no such file")])
def test_command_refuses_in_one_line(args, said, davae, tmp_path, refused):
    assert said in refused(finetune_dit, *flags(davae, tmp_path / "cache", tmp_path / "run", *args))

@pytest.mark.slow
def test_the_default_run(tmp_path):
    """No arguments but a folder: minutes on two cores, and the textures are there."""
    command = [sys.executable, ROOT / "finetune_dit.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    table = result["table"]
    assert table["fine-tuned"]["texture %"] >= 80 and table["real"]["texture %"] >= 97
    assert max(table[row]["texture %"] for row in ("base, up-sampled", "warm start, step 0")) < 35      # chance: 17
    for name in "shape %", "colour %":
        assert table["fine-tuned"][name] >= table["base, up-sampled"][name] - 5
    base, tuned, full = (table[row]["tokens"] for row in ("base, up-sampled", "fine-tuned", "stock at full size"))
    assert tuned == base == full / 4
    assert result["seconds"] < 600 and (tmp_path / "result.png").is_file()

# ------------------------------------------------------------ adapters

def tuned_lora(seed=0):
    """The embedded transformer with random P', O' and LoRA -> mmdit, {name: tensor} of what trains"""
    torch.manual_seed(seed)
    mmdit = add_lora(warm_start(load_mmdit(TINY_MODEL), 16), 8)
    for name, p in mmdit.named_parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return mmdit, {name: p.detach().clone() for name, p in mmdit.named_parameters() if p.requires_grad}

def test_an_adapter_over_the_base_is_the_merged_transformer(tmp_path):
    mmdit, trained = tuned_lora()
    finetune_dit.export_adapter(tmp_path / "adapter.safetensors", trained, mmdit.arch, finetune_dit.adapter_base(mmdit))
    finetune_dit.export(tmp_path / "dit.safetensors", mmdit)
    merged, adapted = load_mmdit(tmp_path / "dit.safetensors"), load_mmdit(tmp_path / "adapter.safetensors", base=TINY_MODEL)
    assert adapted.arch == merged.arch
    for name, p in merged.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], p, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 0.5 * (tmp_path / "dit.safetensors").stat().st_size
    with pytest.raises(InputError, match="expected the --model"):
        load_mmdit(tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match="over another base"):
        load_mmdit(tmp_path / "adapter.safetensors", base=tmp_path / "dit.safetensors")
    half = load_file(tmp_path / "adapter.safetensors")          # with half of a pair of factors it was a traceback
    del half["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
    save_file(half, tmp_path / "half.safetensors", metadata=read_metadata(tmp_path / "adapter.safetensors"))
    with pytest.raises(InputError, match="blocks.0.attn.to_k lacks one of lora_A, lora_B"):
        load_mmdit(tmp_path / "half.safetensors", base=TINY_MODEL)

def test_diffusers_loads_our_adapter(tmp_path):
    """Its own loader, on its transformer widened by the adapter's patch embedder and head."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    mmdit, trained = tuned_lora()
    path = tmp_path / "adapter.safetensors"
    finetune_dit.export_adapter(path, trained, mmdit.arch, finetune_dit.adapter_base(mmdit))
    adapter = load_file(path)
    widened = warm_start(load_mmdit(TINY_MODEL), 16)
    state = sample.fuse_details(widened.state_dict(), 2)
    state |= {k.removeprefix("davae."): v for k, v in adapter.items() if k.startswith("davae.")}
    widened.load_state_dict(sample.split_details(state))
    finetune_dit.export_diffusers(tmp_path, widened)
    peer = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    peer.load_lora_adapter(adapter, prefix="transformer")
    merged = finetune_dit.merge_lora(mmdit)
    x, t = torch.randn(2, 32, 8, 8), torch.tensor([0.3, 0.8])
    context, pooled = torch.randn(2, 9, mmdit.arch.context_dim), torch.randn(2, mmdit.arch.pooled_dim)
    with torch.no_grad():
        ours = merged(x, t, context, pooled)
        theirs = peer(x, context, pooled, 1000 * t).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

def test_weights_are_kept_on_the_way(tmp_path):
    """--keep-every: adapters of a LoRA run, which sample.py draws with; whole transformers of a full one."""
    flags = f"--batch 4 --images 8 --preview 0 --steps 4 --keep-every 2 --every 2 --out {tmp_path / 'lora'}"
    finetune_dit.main(finetune_dit.parse_args(flags.split()))
    names = {path.name for path in (tmp_path / "lora").glob("*.safetensors")}
    assert names == {"adapter-000002.safetensors", "adapter-000004.safetensors", "adapter.safetensors", "dit.safetensors"}
    last, kept = (load_file(tmp_path / "lora" / name) for name in ("adapter.safetensors", "adapter-000004.safetensors"))
    assert last.keys() == kept.keys() and all(torch.equal(last[k], kept[k]) for k in last)
    davae = f"{TINY_MODEL}/davae.safetensors"
    for name in ("dit", "adapter-000004"):
        args = f"--dit {tmp_path / 'lora' / name}.safetensors --davae {davae} --steps 2 --out {tmp_path / name}"
        sample.main(sample.parse_args([*args.split(), "a red circle"]))
    pictures = [np.asarray(Image.open(tmp_path / name / "0000.png")).astype(int) for name in ("dit", "adapter-000004")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    flags = f"--batch 4 --images 8 --preview 0 --steps 2 --keep-every 2 --full --out {tmp_path / 'full'}"
    finetune_dit.main(finetune_dit.parse_args(flags.split()))
    last, kept = (load_file(tmp_path / "full" / name) for name in ("dit.safetensors", "dit-000002.safetensors"))
    assert last.keys() == kept.keys() and all(torch.equal(last[k], kept[k]) for k in last)

def test_a_kill_beside_a_checkpoint_loses_no_kept_weights(tmp_path, monkeypatch):
    """The next command goes on after that step, so that its file must be there first."""
    flags = f"--batch 4 --images 8 --preview 0 --steps 2 --keep-every 1 --out {tmp_path}".split()

    class Killed(BaseException):
        pass

    def save_and_die(self, **state):
        save_checkpoint(self.folder, self.args, **state)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finetune_dit.Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            finetune_dit.main(finetune_dit.parse_args([*flags, "--every", "1", "--save-minutes", "1e-9"]))
    finetune_dit.main(finetune_dit.parse_args(flags))
    assert {path.name for path in tmp_path.glob("adapter-*")} == {"adapter-000001.safetensors", "adapter-000002.safetensors"}

# ------------------------------------------------------------ mirror images, several captions

def pictures_with_captions(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        if i < 3:
            (folder / f"{i}.txt").write_text(f"a red circle {i}\na picture\nthree")
        else:
            entries.append({"file_name": f"{i}.png", "texts": [f"a blue star {i}", "another picture"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder

def test_mirror_images_and_captions_are_cached_and_drawn(tmp_path):
    folder = pictures_with_captions(tmp_path / "data")
    flags = f"--data {folder} --flip --captions 3 --batch 2 --steps 6 --every 1 --preview 0 --out"
    finetune_dit.main(finetune_dit.parse_args([*flags.split(), str(tmp_path / "run")]))
    [shard] = (tmp_path / "run" / "cache").glob("shard-*")
    cached = load_file(shard)
    assert cached["latents_flip"].shape == cached["latents"].shape and not torch.equal(*map(cached.get, ("latents", "latents_flip")))
    assert cached["context"].shape[:2] == (5, 3) and cached["pooled"].shape[:2] == (5, 3)
    text = sample.load_text_encoders(TINY_MODEL)
    data, _ = finetune_dit.open_data(finetune_dit.parse_args([*flags.split(), str(tmp_path / "run")]))
    _, captions, _ = data.sample(range(5))
    assert finetune_dit.spread_captions(["a\nb", "c", ""], 3) == ["a", "b", "a", "c", "c", "c", "", "", ""]
    blank_and_odd = ["a cat\r\n\r\na dog\u2028at rest\n"]          # an empty line is no caption, U+2028 no end
    assert finetune_dit.spread_captions(blank_and_odd, 2) == ["a cat", "a dog\u2028at rest"]
    for i, caption in enumerate(captions):
        lines = caption.splitlines()
        for k in range(3):
            context, _ = text([lines[k % len(lines)]])
            torch.testing.assert_close(cached["context"][i, k].float(), context[0].bfloat16().float(), rtol=0, atol=0.02)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for part in ("3", "6"):                                         # stopped and resumed: the same losses
        again = flags.replace("--steps 6", f"--steps {part}")
        finetune_dit.main(finetune_dit.parse_args([*again.split(), str(tmp_path / "parts")]))
    parts = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in found if "loss" in line] for found in (lines, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 6

def test_previews_of_several_captions_are_of_one_of_them(tmp_path):
    """The prompt is one caption, as in training, not all of them in one."""
    folder = pictures_with_captions(tmp_path / "data")
    args = finetune_dit.parse_args(["--data", str(folder), "--captions", "3"])
    assert finetune_dit.load_preview_inputs(args, "cpu").prompts == ["a red circle 0"]

def test_pictures_without_classes_have_no_curve_of_accuracy(tmp_path, capsys):
    """And the table counts each held-out picture once: of six, one is held out, not eight."""
    folder = pictures_with_captions(tmp_path / "data")
    flags = f"--data {folder} --batch 2 --steps 1 --sample-steps 1 --out {tmp_path / 'run'}"
    finetune_dit.main(finetune_dit.parse_args(flags.split()))
    said = capsys.readouterr().out
    assert "result.png, dit.safetensors; next" in said and "\n1 held-out captions" in said
    assert (tmp_path / "run" / "result.png").is_file() and not (tmp_path / "run" / "accuracy.png").exists()

def test_each_draw_of_a_step_is_uniform_and_the_same_for_any_number_of_ranks():
    def draws(ranks):
        parts = [finetune_dit.draw_noise(0, 7, rank, ranks, 1200 // ranks, (1, 1, 1), 1.0, 0.1, "cpu") for rank in range(ranks)]
        return [torch.cat(values) for values in zip(*parts)]
    one, three = draws(1), draws(3)
    for a, b in zip(one, three):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    _, _, drop, flip, caption = one
    assert 0.05 < drop.float().mean() < 0.15 and 0.45 < flip.float().mean() < 0.55 and 0.47 < caption.mean() < 0.53

def test_the_worlds_stripes_have_a_direction(refused, tmp_path):
    assert "rise or fall" in refused(finetune_dit, "--flip", "--out", tmp_path / "run")

def test_long_captions_are_counted(tmp_path, capsys):
    folder = pictures_with_captions(tmp_path / "data")
    (folder / "1.txt").write_text("a red circle " * 30)
    finetune_dit.main(finetune_dit.parse_args(
        f"--data {folder} --batch 2 --steps 1 --preview 0 --out {tmp_path / 'run'}".split()))
    said = capsys.readouterr().out
    assert "captions are longer than CLIP reads" in said and "captions are longer than T5 reads" in said

def test_a_cache_of_other_text_encoders_or_numbers_is_refused(tmp_path):
    """A key is contents: the same names with other weights, or another dtype, are another cache."""
    model = tmp_path / "model"
    shutil.copytree(TINY_MODEL, model)
    flags = f"--model {model} --davae {TINY_MODEL}/davae.safetensors --size 64 --images 4 --batch 2 --steps 1 --preview 0"
    def run(out, *more):
        args = f"{flags} --cache {tmp_path / 'cache'} --out {tmp_path / out}".split() + list(more)
        finetune_dit.main(finetune_dit.parse_args(args))
    run("a", "--dtype", "fp32")
    with pytest.raises(InputError, match="dtype torch.float32, now torch.bfloat16"):
        run("b", "--dtype", "bf16")
    [path] = (model / "text_encoders").glob("clip_l*")
    state = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(state, path)
    with pytest.raises(InputError, match="text_encoders"):
        run("c", "--dtype", "fp32")

# ------------------------------------------------------------ buckets of aspect ratios

def test_bucket_sizes_have_about_as_many_tokens():
    sizes = bucket_sizes(1024, 32)
    assert (1024, 1024) in sizes and len(sizes) > 15 and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % 32 == width % 32 == 0 and 0.5 <= width / height <= 2
        assert abs(height * width / 1024**2 - 1) < 0.03
    assert {(width, height) for height, width in sizes} == set(sizes)          # lying and standing alike

def mixed_shapes(folder, count=30):
    """Squares, lying and standing pictures, of which one is turned by EXIF, and one that is none."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = ((96, 96), (160, 80), (70, 140))[i % 3]
        exif = Image.Exif()
        if i == 1:
            width, height = height, width
            exif[0x112] = 6
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{i:02d}.jpg", exif=exif)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    (folder / "bad.jpg").write_bytes(b"no picture")
    return folder

def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

def test_buckets_over_mixed_shapes_on_one_and_two_ranks_and_resumed(tmp_path, capsys):
    folder = mixed_shapes(tmp_path / "data")
    common = f"--data {folder} --buckets --every 1 --preview 0 --dtype fp32 --dropout 0"
    flags = f"{common} --batch 4 --out"
    finetune_dit.main(finetune_dit.parse_args(f"{flags} {tmp_path / 'whole'} --steps 8".split()))
    said = capsys.readouterr().out
    assert "3 buckets" in said and "skipped: " in said
    sizes = {path.name for path in (tmp_path / "whole" / "cache").iterdir() if path.is_dir()}
    assert "64x64" in sizes and len(sizes) == 3
    for name in sizes:
        width, height = map(int, name.split("x"))
        [shard] = (tmp_path / "whole" / "cache" / name).glob("shard-*")
        latents = load_file(shard)["latents"]
        assert latents.shape[2:] == (height // 8, width // 8)
    for steps in 3, 8:                                                          # stopped, and resumed
        finetune_dit.main(finetune_dit.parse_args(f"{flags} {tmp_path / 'parts'} --steps {steps}".split()))
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert whole == parts and len(whole) == 8
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "finetune_dit.py"), *common.split(), "--batch", "2", "--steps", "8", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses_of(tmp_path / "two") == pytest.approx(whole, rel=1e-4)

def test_an_epoch_of_buckets_has_every_whole_batch_once():
    class Rows:
        def __init__(self, bucket, n):
            self.bucket, self.n = bucket, n

        def __len__(self):
            return self.n

        def sample(self, positions):
            return [(self.bucket, p % self.n) for p in positions]

    cache = finetune_dit.BucketCache([Rows(0, 9), Rows(1, 4), Rows(2, 13)], 4, seed=0)
    batches = [cache.sample(range(4 * n, 4 * n + 4)) for n in range(12)]       # two epochs of 2 + 1 + 3
    for epoch in batches[:6], batches[6:]:
        assert all(len({bucket for bucket, _ in batch}) == 1 for batch in epoch)
        assert sorted(batch[0][0] for batch in epoch) == [0, 0, 1, 2, 2, 2]
    assert batches[:6] != batches[6:]
    halves = [cache.sample(range(4 * n + 2, 4 * n + 4)) for n in range(12)]     # what the second of two ranks sees
    assert halves == [batch[2:] for batch in batches]

