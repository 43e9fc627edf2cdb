"""imagenet_eval.py: LightningDiT against a forward written from the facts, metrics against closed forms and peers."""
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import align
import imagenet_eval as ie
from align import LPIPS_FILES
from assets.world import World
from conftest import ROOT, peer_vae, trained_alike
from finetune_dit import warm_start
from imagenet_eval import (Inception, LightningDiT, LightningDiTArch, Moments, frechet_distance, inception_score,
                           euler_sample, load_inception, load_lightningdit, psnr, ssim, tf1_resize)
from vae_expand import (DAVAE, TINY_MODEL, InputError, adm_crop, load_vae, pick_dtype, save_davae, save_overview, save_png,
                        to_tensor)

SMALL = LightningDiTArch(depth=2, width=64, head=16, in_channels=8, side=4, classes=10)

def small(arch=SMALL, seed=0):
    """A random LightningDiT, no weight of which is zero."""
    torch.manual_seed(seed)
    dit = LightningDiT(arch).eval()
    for p in dit.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
    return dit

def inputs(arch=SMALL, n=3, channels=None, seed=1):
    rng = torch.Generator().manual_seed(seed)
    side = arch.side * arch.patch
    return (torch.randn(n, channels or arch.in_channels, side, side, generator=rng), torch.rand(n, generator=rng),
            torch.randint(arch.classes, (n,), generator=rng))

# ------------------------------------------------------------ LightningDiT

def facts_forward(w, x, t, y, heads):
    """LightningDiT on a state dict of plain arrays, patch 1, from the published facts; RoPE in complex numbers."""
    def lin(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(v, g):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * g

    B, C, h, _ = x.shape
    tokens = torch.einsum("bchw,dc->bhwd", x, w["x_embedder.proj.weight"][:, :, 0, 0]) + w["x_embedder.proj.bias"]
    d = tokens.shape[-1]
    col = torch.arange(h).repeat(h)
    row = torch.arange(h).repeat_interleave(h)
    freq = torch.tensor([10000**(-k / (d // 4)) for k in range(d // 4)])
    table = torch.cat([f(p[:, None] * freq) for p in (col, row) for f in (torch.sin, torch.cos)], dim=1)
    tokens = tokens.reshape(B, h * h, d) + table
    freq = torch.tensor([math.exp(-math.log(10000) * k / 128) for k in range(128)])
    emb = torch.cat([torch.cos(t[:, None] * freq), torch.sin(t[:, None] * freq)], dim=1)
    c = lin("t_embedder.mlp.2", F.silu(lin("t_embedder.mlp.0", emb))) + w["y_embedder.embedding_table.weight"][y]
    n = d // heads
    freq = torch.tensor([10000**(-2 * k / (n // 2)) for k in range(n // 4)])
    turn = torch.exp(1j * torch.cat([row[:, None] * freq, col[:, None] * freq], dim=1))     # (N, n / 2)
    i = 0
    while f"blocks.{i}.norm1.weight" in w:
        b = f"blocks.{i}"
        parts = lin(f"{b}.adaLN_modulation.1", F.silu(c))[:, None].split(d, dim=-1)
        v = rms(tokens, w[f"{b}.norm1.weight"]) * (1 + parts[1]) + parts[0]
        q, k, v = (lin(f"{b}.attn.qkv", v)[..., j * d:(j + 1) * d].view(B, -1, heads, n) for j in range(3))
        if f"{b}.attn.q_norm.weight" in w:
            q, k = rms(q, w[f"{b}.attn.q_norm.weight"]), rms(k, w[f"{b}.attn.k_norm.weight"])
        q, k = (torch.view_as_real(torch.view_as_complex(u.contiguous().view(B, -1, heads, n // 2, 2))
                                   * turn[:, None]).flatten(-2) for u in (q, k))
        score = torch.einsum("bqhn,bkhn->bhqk", q, k) / n**0.5
        a = torch.einsum("bhqk,bkhn->bqhn", score.softmax(-1), v).reshape(B, -1, d)
        tokens = tokens + parts[2] * lin(f"{b}.attn.proj", a)
        v = lin(f"{b}.mlp.w12", rms(tokens, w[f"{b}.norm2.weight"]) * (1 + parts[4]) + parts[3])
        half = v.shape[-1] // 2
        tokens = tokens + parts[5] * lin(f"{b}.mlp.w3", F.silu(v[..., :half]) * v[..., half:])
        i += 1
    shift, scale = lin("final_layer.adaLN_modulation.1", F.silu(c))[:, None].split(d, dim=-1)
    tokens = lin("final_layer.linear", rms(tokens, w["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    return tokens.view(B, h, h, C).permute(0, 3, 1, 2)

@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_is_the_one_of_the_facts(qk_norm):
    dit = small(replace(SMALL, qk_norm=qk_norm))
    x, t, y = inputs()
    ours, theirs = dit(x, t, y), facts_forward(dit.state_dict(), x, t, y, heads=4)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5

def test_parameter_counts_and_keys_of_the_released_model():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in LightningDiT(LightningDiTArch(in_channels=c, qk_norm=qk)).parameters())
                  for c, qk in ((32, False), (128, False), (32, True))]
        shapes = {k: tuple(v.shape) for k, v in LightningDiT(LightningDiTArch(qk_norm=True)).state_dict().items()}
    assert counts == [675_256_736, 675_478_016, 675_256_736 + 4032]
    block = {"norm1.weight": (1152,), "norm2.weight": (1152,), "attn.q_norm.weight": (72,), "attn.k_norm.weight": (72,)}
    for name, (n, m) in {"attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.w12": (6144, 1152),
                         "mlp.w3": (1152, 3072), "adaLN_modulation.1": (6912, 1152)}.items():
        block |= {f"{name}.weight": (n, m), f"{name}.bias": (n,)}
    facts = {f"blocks.{i}.{k}": v for i in range(28) for k, v in block.items()}
    facts |= {"pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 32, 1, 1), "x_embedder.proj.bias": (1152,),
              "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.0.bias": (1152,),
              "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
              "y_embedder.embedding_table.weight": (1001, 1152), "feat_rope.freqs_cos": (256, 72),
              "feat_rope.freqs_sin": (256, 72), "final_layer.norm_final.weight": (1152,),
              "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
              "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,)}
    assert shapes == facts

@pytest.mark.parametrize("wrap", [lambda s: {"ema": s, "model": {}}, lambda s: {"model": s}, lambda s: s,
                                  lambda s: {"ema": {f"module.{k}": v for k, v in s.items()}},
                                  lambda s: {"ema": None, "model": s}])
def test_loads_every_wrapping_of_the_checkpoint(tmp_path, wrap):
    dit = small()
    torch.save(wrap(dit.state_dict()), tmp_path / "a.pt")
    again = load_lightningdit(tmp_path / "a.pt")
    assert again.arch == SMALL
    assert all(torch.equal(v, dit.state_dict()[k]) for k, v in again.state_dict().items())

def test_wrong_keys_stop_the_load_and_are_named(tmp_path):
    state = small().state_dict()
    state["blocks.1.mlp.w4.weight"] = state.pop("blocks.1.mlp.w3.weight")
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="missing blocks.1.mlp.w3.weight; unknown blocks.1.mlp.w4.weight"):
        load_lightningdit(tmp_path / "a.pt")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="not a LightningDiT"):
        load_lightningdit(tmp_path / "b.pt")

@pytest.mark.parametrize("patch", [1, 2])
def test_warm_start_keeps_the_base_and_starts_the_details_at_zero(patch):
    base = small(replace(SMALL, patch=patch))
    wide = warm_start(small(replace(SMALL, patch=patch)), 24)
    x, t, y = inputs(base.arch, channels=32)
    u = wide(x, t, y)
    assert torch.equal(u[:, :8], base(x[:, :8], t, y)) and not u[:, 8:].any()
    u[:, 8:].sum().backward()
    assert wide.O_prime.weight.grad.abs().sum() > 0 and not wide.P_prime.weight.grad.any()

def test_an_export_with_details_computes_the_same(tmp_path):
    dit = warm_start(small(), 24, zero_init=False)
    ie.export_lightningdit(tmp_path, dit, torch.zeros(32), torch.ones(32))
    again = load_lightningdit(tmp_path)
    x, t, y = inputs(channels=32)
    assert again.arch.in_channels == 32
    torch.testing.assert_close(again(x, t, y), dit(x, t, y), rtol=1e-4, atol=1e-5)

def test_transport_runs_from_noise_to_data():
    """Training on one picture with the loop's own signs lets sampling find it again."""
    torch.manual_seed(0)
    dit = LightningDiT(SMALL).initialise()
    data = torch.randn(1, 8, 4, 4)
    optimizer = torch.optim.Adam(dit.parameters(), 3e-3)
    for _ in range(250):
        loss, _ = ie.transport_loss(dit, data.expand(16, -1, -1, -1), torch.randn(16, 8, 4, 4),
                                    torch.randn(16).sigmoid(), torch.zeros(16, dtype=torch.long), 8, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = euler_sample(dit, torch.randn(4, 8, 4, 4), torch.zeros(4, dtype=torch.long), 50)
    assert (found - data).abs().mean() < 0.15

class Field(torch.nn.Module):
    """u = class + 1 (0 for no class), whatever x is; remembers the times it was asked for."""

    arch = replace(SMALL, classes=10)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append((float(t[0]), len(x)))
        return torch.where(y == 10, 0.0, y + 1.0).view(-1, 1, 1, 1).expand_as(x)

def test_the_sampler_has_the_released_grid_guidance_and_interval():
    field = Field()
    x = euler_sample(field, torch.zeros(2, 8, 4, 4), torch.tensor([0, 1]), 250, cfg=4.0, interval=0.2, guided=3)
    at = [0.3 * s / (1 - 0.7 * s) for s in np.linspace(0, 1, 250)]
    assert len(field.seen) == 249 and np.allclose([t for t, _ in field.seen], at[:-1], atol=1e-6)
    assert all((n == 4) == (t >= 0.2) for t, n in field.seen)
    begin = next(t for t in at if t >= 0.2)
    assert torch.allclose(x[0, :3], torch.tensor(float(begin + 4 * (1 - begin))), atol=1e-4)       # 4 (1 - 0) from there on
    assert torch.allclose(x[1, 3:], torch.tensor(2.0), atol=1e-4)                           # unguided channels

# ------------------------------------------------------------ metrics

def test_frechet_closed_forms():
    d = np.diag([1.0, 4.0, 9.0])
    assert frechet_distance(np.zeros(3), d, np.array([1.0, 2.0, 3.0]), np.diag([4.0, 1.0, 16.0])) == pytest.approx(17)
    eye = np.eye(2048)
    assert frechet_distance(np.zeros(2048), eye, np.ones(2048), eye) == pytest.approx(2048)
    a = np.random.default_rng(0).normal(size=(50, 20))
    s = np.cov(a.T)
    assert abs(frechet_distance(a.mean(0), s, a.mean(0), s)) < 1e-9
    with pytest.raises(InputError, match="one network"):
        frechet_distance(np.zeros(3), d, np.zeros(2), np.eye(2))

def test_frechet_of_rank_deficient_covariances_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(30, 64)), rng.normal(size=(40, 64)) * 1.3 + 0.2
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(s1 @ s2).real
    theirs = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(a.mean(0), s1, b.mean(0), s2) == pytest.approx(theirs, rel=1e-5)

def test_moments_are_numpys_whatever_the_batches():
    h = torch.randn(97, 12, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for sizes in ([97], [1] * 97, [50, 47]):
        moments = Moments()
        for part in h.split(sizes):
            moments.add(part)
        n, mu, sigma = moments.result()
        assert n == 97
        np.testing.assert_allclose(mu, h.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(h.double().numpy().T), rtol=1e-9)

def test_inception_score_of_known_cases():
    assert inception_score(np.eye(10)[np.arange(5000) % 10]) == pytest.approx(10)
    assert inception_score(np.full((300, 7), 1 / 7)) == pytest.approx(1)
    halves = np.concatenate([np.eye(2)[np.arange(5000) % 2], np.eye(2)[np.zeros(5000, int)]])   # two splits: 2 and 1
    assert inception_score(halves) == pytest.approx(1.5)

def test_inception_score_of_class_folders_is_that_of_mixed_ones():
    """Ten classes of 1,000 in order: each split of 5,000 holds half of them, and would score 5 instead of 10."""
    classes = torch.arange(10).repeat_interleave(1000)
    probs = torch.eye(10)[classes]
    assert inception_score(probs) == pytest.approx(5)
    assert inception_score(ie.mix_classes(probs, classes)) == pytest.approx(10, abs=0.02)
    mixed = torch.randperm(10_000)
    for rows, labels in (probs[mixed], classes[mixed]), (probs[:5000], classes[:5000]), (probs, torch.zeros(10_000)):
        assert ie.mix_classes(rows, labels) is rows


def resize_by_hand(x, size):
    """TF1's bilinear with loops. (H, W) -> (size, size)"""
    h, w = x.shape
    out = np.zeros((size, size), np.float64)
    for i in range(size):
        for j in range(size):
            a, b = np.float32(i) * np.float32(h / size), np.float32(j) * np.float32(w / size)
            i0, j0 = int(a), int(b)
            i1, j1 = min(i0 + 1, h - 1), min(j0 + 1, w - 1)
            p, q = a - i0, b - j0
            top, low = x[i0, j0] * (1 - q) + x[i0, j1] * q, x[i1, j0] * (1 - q) + x[i1, j1] * q
            out[i, j] = top * (1 - p) + low * p
    return out

@pytest.mark.parametrize("h,w", [(10, 14), (40, 33), (17, 17)])
def test_resize_is_tensorflow_1s(h, w):
    x = torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(0)) * 255
    np.testing.assert_allclose(tf1_resize(x, 17)[0, 0], resize_by_hand(x[0, 0].numpy(), 17), atol=1e-3)

def random_inception(path):
    """Random weights under the released names, scaled so that features stay apart."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    for k, v in state.items():
        if k.endswith("running_var"):
            v.uniform_(0.5, 1.5)
        elif v.ndim > 1:
            v.normal_(0, (2 / v[0].numel())**0.5)
    state["fc.bias"].normal_(0, 5)                                              # must not matter
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path)
    return path

@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """In the place of the published one, whose digest it cannot have."""
    monkeypatch.setattr(ie, "fetch", lambda *of: random_inception(tmp_path / "random.pth"))
    return random_inception(tmp_path / "random.pth")

def test_another_file_in_the_place_of_inception_is_refused(tmp_path):
    random_inception(tmp_path / ie.INCEPTION)
    with pytest.raises(InputError, match="expected 6726825d"):
        load_inception(tmp_path)

def test_features_are_torch_fidelitys(inception_file):
    """The one file of it that holds the network: the package's own __init__ wants torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed")
    package = sys.modules["torch_fidelity"] = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    peer = module.FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"],
                                              feature_extractor_weights_path=str(inception_file))
    x = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs, logits = peer(x)
    ours, probs = load_inception()(x.float() / 127.5 - 1)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs, logits.softmax(1), rtol=1e-5, atol=1e-6)

def test_metrics_do_not_depend_on_the_batch(inception_file):
    net = load_inception()
    x = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    torch.testing.assert_close(net(x)[0], torch.cat([net(one[None])[0] for one in x]), rtol=1e-4, atol=1e-5)
    for metric in psnr, ssim:
        torch.testing.assert_close(metric(x, y), torch.cat([metric(a[None], b[None]) for a, b in zip(x, y)]))

def test_contract_names():
    assert ie.psnr is psnr and ie.ssim is ssim
    assert json.loads(json.dumps({"x": inception_score(np.eye(2))}))["x"] == pytest.approx(2)

# ------------------------------------------------------------ the commands

def run_main(*flags):
    ie.main(ie.parse_args([str(flag) for flag in flags]))

def shards(folder):
    return [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]

def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)

@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A hundred pictures of the world through the shipped DA-VAE."""
    folder = tmp_path_factory.mktemp("imagenet") / "latents"
    run_main("encode", "--davae", f"{TINY_MODEL}/davae.safetensors", "--count", 100, "--batch", 4, "--out", folder)
    return folder

def test_encode_writes_normalised_shards_and_resumes(latents, tmp_path):
    held = shards(latents)
    assert [len(shard["labels"]) for shard in held] == [64, 36] and held[0]["latents"].shape == (64, 64, 8, 8)
    z = torch.cat([shard["latents"] for shard in held]).double().transpose(0, 1).flatten(1)
    mean, std = ie.read_statistics(latents)
    torch.testing.assert_close(mean.flatten(), z.mean(1).float())
    torch.testing.assert_close(std.flatten(), z.std(1).float())
    _, _, labels = World().sample(range(100))
    assert torch.equal(torch.cat([s["labels"] for s in held]), labels[:, 0] * 6 + labels[:, 2])
    shutil.copytree(latents, tmp_path / "b")
    (tmp_path / "b" / "shard-00000.safetensors").unlink()
    (tmp_path / "b" / "shard-00000.part").write_bytes(b"half")
    flags = ["encode", "--davae", f"{TINY_MODEL}/davae.safetensors", "--batch", 4, "--out", tmp_path / "b", "--count"]
    run_main(*flags, 100)
    assert same(shards(tmp_path / "b"), held)
    with pytest.raises(InputError, match="count 100, now 90"):
        run_main(*flags, 90)

@pytest.mark.parametrize("change, said", [
    (lambda folder: (folder / "shard-00000.safetensors").unlink(), "36 rows in 1 shards, of 100 in manifest.json"),
    (lambda folder: shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00002.safetensors"), "164 rows in 3"),
    (lambda folder: shutil.copy(folder / "shard-00001.safetensors", folder / "shard-00001 (copy).safetensors"), "136 rows"),
    (lambda folder: os.truncate(folder / "shard-00001.safetensors", 9000), "shard-00001.*not a whole safetensors file")])
def test_shards_that_are_missing_cut_short_or_not_the_folders_own_are_refused(latents, tmp_path, change, said):
    """Half of the latents, copied before they were all made, were trained on without a word; strays as well."""
    shutil.copytree(latents, tmp_path / "latents")
    change(tmp_path / "latents")
    with pytest.raises(InputError, match=said):
        run_main("train", "--latents", tmp_path / "latents", "--out", tmp_path / "run")

def test_latents_of_two_precisions_are_not_mixed(latents, tmp_path):
    """A folder of float32 went on in bfloat16, with an error of 3% of a deviation in the rest of its latents."""
    shutil.copytree(latents, tmp_path / "latents")
    flags = ["encode", "--davae", f"{TINY_MODEL}/davae.safetensors", "--count", 100, "--batch", 4, "--out", tmp_path / "latents"]
    with pytest.raises(InputError, match="dtype None, now bfloat16"):
        run_main(*flags, "--dtype", "bf16")

def test_classes_are_folders_and_pictures_are_cropped_as_adm_does(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(["n02/b.png", "n01/a.png", "n02/a.png", "n01/z.JPEG"]):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (150, 100 + i, 3), dtype=np.uint8)).save(tmp_path / "train" / name)
    x, y = ie.open_pictures(tmp_path / "train", 32).sample(range(4))
    assert y.tolist() == [0, 0, 1, 1]
    assert torch.equal(x[0], to_tensor(adm_crop(Image.open(tmp_path / "train" / "n01" / "a.png"), 32)))
    with pytest.raises(InputError, match="several sizes"):
        ie.open_pictures(tmp_path / "train").sample(range(4))
    run_main("encode", "--data", tmp_path / "train", "--size", 32, "--batch", 2, "--out", tmp_path / "z")
    held = shards(tmp_path / "z")[0]
    vae = load_vae(TINY_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(held["latents_flip"].float(), vae.encode(x.flip(3)), rtol=2e-3, atol=2e-3)

def test_train_warm_starts_and_a_killed_run_ends_in_the_same_bits(latents, tmp_path):
    flags = ["train", "--latents", latents, "--batch", 20, "--n-warm", 5, "--dtype", "fp32", "--epochs"]
    run_main(*flags, 2, "--out", tmp_path / "whole")                            # 10 steps
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 10 and lines[-1]["omega"] == 1
    run_main(*flags, 1, "--out", tmp_path / "parts")                            # 5 steps, then as if killed
    last = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    torch.save(last | {"args": last["args"] | {"epochs": "2.0"}}, tmp_path / "parts" / "checkpoint.pt")
    run_main(*flags, 2, "--out", tmp_path / "parts")
    a, b = (load_file(tmp_path / name / "lightningdit.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    dit, base = load_lightningdit(tmp_path / "whole"), load_lightningdit(f"{TINY_MODEL}/lightningdit")
    assert dit.arch.in_channels == 64 and torch.equal(dit.pos_embed, base.pos_embed)
    own, theirs = ie.read_statistics(tmp_path / "whole"), ie.read_statistics(Path(TINY_MODEL) / "lightningdit")
    assert torch.equal(own[0][:, :16], theirs[0])                               # base channels: as it knows them
    with pytest.raises(InputError, match="--lr"):
        run_main(*flags, 2, "--lr", 1, "--out", tmp_path / "parts")

def test_channels_that_do_not_fit_are_refused(latents, tmp_path):
    """A DA-VAE that is not named, to curve; latents of fewer channels than --init has, to train."""
    run_main("train", "--latents", latents, "--batch", 50, "--epochs", 1, "--keep-every", 1, "--out", tmp_path / "run")
    with pytest.raises(InputError, match="64 channels .--vae, --davae 16."):
        run_main("curve", tmp_path / "run", "--ref", "no.npz", "--count", 4, "--out", tmp_path / "curve")
    few = {"latents": torch.zeros(8, 4, 8, 8), "latents_flip": torch.zeros(8, 4, 8, 8), "labels": torch.zeros(8).long()}
    (tmp_path / "few").mkdir()
    save_file(few, tmp_path / "few" / "shard-00000.safetensors")
    ie.write_statistics(tmp_path / "few", torch.zeros(4), torch.ones(4))
    with pytest.raises(InputError, match="few: 4 channels, --init .*: 16 "):
        run_main("train", "--latents", tmp_path / "few", "--out", tmp_path / "other")

def test_only_epochs_are_on_the_curve(tmp_path, monkeypatch):
    """Somebody's own copies of an epoch lie beside."""
    for name in "epoch-10", "epoch-2.5", "epoch-best", "epoch-10 (copy)":
        (tmp_path / name).mkdir()
        shutil.copy(Path(TINY_MODEL) / "lightningdit/lightningdit.safetensors", tmp_path / name)
        shutil.copy(Path(TINY_MODEL) / "lightningdit/latents_stats.safetensors", tmp_path / name)
    run_main("curve", tmp_path, "--ref", "world", "--size", 32, "--features", "world", "--count", 8, "--steps", 3,
             "--out", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "curve.json").read_text())["table"]
    assert list(table) == ["epoch 2.5", "epoch 10"]

def test_train_from_scratch_has_no_details_apart(latents, tmp_path, monkeypatch):
    """--init none: DiT's start on all channels alike, here in a small size."""
    monkeypatch.setattr(ie, "LightningDiTArch", lambda in_channels: replace(
        SMALL, in_channels=in_channels, side=8, classes=36))
    run_main("train", "--init", "none", "--latents", latents, "--batch", 25, "--epochs", 1, "--lr", 1e-3, "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and "detail" not in lines[-1] and 0 < lines[-1]["base"] < 4
    assert (tmp_path / "lightningdit.safetensors").is_file()

@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Pictures by the embedded LightningDiT, at the base size."""
    folder = tmp_path_factory.mktemp("imagenet") / "samples"
    run_main("sample", "--dit", f"{TINY_MODEL}/lightningdit", "--count", 24, "--batch", 8, "--steps", 6, "--out", folder)
    return folder

def test_sample_resumes_without_gap_or_duplicate(samples, tmp_path):
    held = shards(samples)
    assert [shard["images"].shape for shard in held] == [(8, 32, 32, 3)] * 3
    flags = ["sample", "--dit", f"{TINY_MODEL}/lightningdit", "--batch", 8, "--steps", 6]
    shutil.copytree(samples, tmp_path / "b")
    (tmp_path / "b" / "shard-00001.safetensors").unlink()
    run_main(*flags, "--count", 24, "--out", tmp_path / "b")
    assert same(shards(tmp_path / "b"), held)
    run_main(*flags, "--count", 12, "--png", "--out", tmp_path / "png")
    names = sorted(path.name for path in (tmp_path / "png").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(12)]
    images = torch.cat([shard["images"] for shard in held])
    assert all(np.array_equal(Image.open(tmp_path / "png" / n), images[i]) for i, n in enumerate(names))
    run_main("fid", tmp_path / "png", "--ref", samples, "--features", "world", "--out", tmp_path / "f")
    result = json.loads((tmp_path / "f" / "fid.json").read_text())              # reads the PNGs, not the shards
    assert result["N"] == 12 and result["sample"]["steps"] == 6 and len(result["sample"]["dit"]) == 16
    with pytest.raises(InputError, match="channels"):
        run_main(*flags, "--davae", f"{TINY_MODEL}/davae.safetensors", "--out", tmp_path / "c")

def test_a_deleted_png_is_drawn_again(tmp_path):
    """It was counted as there, for the labels of its batch were."""
    flags = ["sample", "--dit", f"{TINY_MODEL}/lightningdit", "--count", 5, "--batch", 2, "--steps", 2, "--png", "--out", tmp_path]
    run_main(*flags)
    whole = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.png"))}
    (tmp_path / "000003.png").unlink()
    run_main(*flags)
    assert len(whole) == 5 and {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.png"))} == whole

def test_pictures_are_of_one_models_statistics(samples, tmp_path):
    """The statistics say what the model's channels mean: with others, the rest of the pictures would be others."""
    shutil.copytree(samples, tmp_path / "samples")
    shutil.copytree(Path(TINY_MODEL) / "lightningdit", tmp_path / "dit")
    flags = ["sample", "--dit", tmp_path / "dit", "--batch", 8, "--steps", 6, "--count", 24, "--out", tmp_path / "samples"]
    run_main(*flags)                                                            # the same weights, in another folder
    mean, std = ie.read_statistics(tmp_path / "dit")
    ie.write_statistics(tmp_path / "dit", mean, 2 * std)
    with pytest.raises(InputError, match="holds something else .statistics"):
        run_main(*flags)

def test_statistics_that_are_none_are_refused(tmp_path):
    """With a nan in them every picture came out black, and was scored; without a mean there was a traceback."""
    shutil.copytree(Path(TINY_MODEL) / "lightningdit", tmp_path / "dit")
    (tmp_path / "dit" / "latents_stats.safetensors").unlink()
    for mean, said in ((torch.full((64,), torch.nan), "no finite mean and std"), (None, "no finite mean and std"),
                       (torch.zeros(1), "channels")):
        torch.save({"mean": mean, "std": torch.ones(1 if mean is None else len(mean))}, tmp_path / "dit" / "latents_stats.pt")
        with pytest.raises(InputError, match=said):
            run_main("sample", "--dit", tmp_path / "dit", "--count", 2, "--out", tmp_path / "out")

def test_a_sampled_picture_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    """As a diverged training or a broken attention kernel gives: it was saved as black, and scored."""
    monkeypatch.setattr(ie, "euler_sample", lambda dit, x, *_: x / 0)
    with pytest.raises(InputError, match="a picture of 0 to 1 holds nan or inf"):
        run_main("sample", "--dit", f"{TINY_MODEL}/lightningdit", "--count", 2, "--out", tmp_path)
    assert not list(tmp_path.glob("shard*"))

def test_pictures_through_another_vae_at_the_same_path_are_not_gone_on_with(tmp_path):
    """They were taken for this run's: the manifest held the path alone."""
    flags = ["sample", "--dit", f"{TINY_MODEL}/lightningdit", "--vae", tmp_path / "vae.safetensors", "--count", 2,
             "--steps", 2, "--out", tmp_path / "out"]
    weights = load_file(f"{TINY_MODEL}/sd3.5_tiny.safetensors")
    save_file(weights, tmp_path / "vae.safetensors")
    run_main(*flags)
    run_main(*flags)
    weights["first_stage_model.decoder.conv_out.bias"] += 1
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="vae"):
        run_main(*flags)

def test_a_disk_that_fills_keeps_the_last_statistics(samples, tmp_path, monkeypatch):
    """--save wrote over them in place: half a file was left of both."""
    flags = ["fid", samples, "--features", "world", "--save", tmp_path / "ref", "--out", tmp_path / "out"]
    run_main(*flags)
    whole = (tmp_path / "ref.npz").read_bytes()
    assert ie.read_npz(tmp_path / "ref.npz").n == 24

    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="ref.npz cannot be written: .*No space left"):
        run_main(*flags)
    assert (tmp_path / "ref.npz").read_bytes() == whole

def test_two_files_of_statistics_need_no_network(tmp_path, monkeypatch):
    """Inception is a download; to compare what others measured takes none. They may have read another network."""
    rng = np.random.default_rng(0)
    for name in "ab":
        features = rng.normal(size=(50, 8))
        np.savez(tmp_path / f"{name}.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), n=50)
    monkeypatch.setattr(ie, "load_feature_net", None)
    run_main("fid", tmp_path / "a.npz", "--ref", tmp_path / "b.npz", "--features", "inception", "--out", tmp_path / "s")
    result = json.loads((tmp_path / "s" / "fid.json").read_text())
    assert result["FID-50"] > 0 and "Inception" not in result["features"]

def test_fid_of_a_set_with_itself_is_0_in_any_order_and_batch(samples, tmp_path, inception_file, capsys):
    few = tmp_path / "few"                                                      # a shard of 8: Inception is slow
    few.mkdir()
    shutil.copy(samples / "shard-00000.safetensors", few)
    for features, name, whole, n in ("inception", "FID", few, 8), ("world", "Frechet", samples, 24):
        png, found = tmp_path / f"png{n}", []
        png.mkdir()
        for i, image in enumerate(torch.cat([shard["images"] for shard in shards(whole)])):
            Image.fromarray(image.numpy()).save(png / f"{(i * 7) % n:03d}.png")         # another order
        for source, batch in (whole, 8), (png, 5):
            run_main("fid", source, "--ref", whole, "--features", features, "--batch", batch, "--out", tmp_path / "s",
                     "--save", tmp_path / f"{features}.npz")
            found.append(json.loads((tmp_path / "s" / "fid.json").read_text())[f"{name}-{n}"])
        assert max(map(abs, found)) < 1e-3, found
        run_main("fid", "world", "--count", n + 3, "--size", 32, "--ref", tmp_path / f"{features}.npz", "--features",
                 features, "--out", tmp_path / "s")
        result = json.loads((tmp_path / "s" / "fid.json").read_text())
        assert result[f"{name}-{n + 3}"] > 1 and result["N"] == n + 3 and result["N reference"] == n
    assert "rank-deficient" in capsys.readouterr().out

def test_shards_are_pictures_of_the_size_that_is_asked_for(latents, samples):
    """--size was passed over where shards were scored: 32 px against a reference of 64."""
    assert ie.open_pictures(samples).n == ie.open_pictures(samples, 32).n == 24
    with pytest.raises(InputError, match="pictures of 32x32 in shards.*--size is 64"):
        ie.open_pictures(samples, 64)
    with pytest.raises(InputError, match="shards of labels, latents, latents_flip; expected pictures"):
        ie.open_pictures(latents)

def test_recon_tells_what_the_details_are_worth(tmp_path):
    run_main("recon", "--davae", f"{TINY_MODEL}/davae.safetensors", "--count", 16, "--batch", 8, "--out", tmp_path / "r")
    table = json.loads((tmp_path / "r" / "recon.json").read_text())["table"]
    assert table["DA-VAE"]["PSNR"] > table["z_d = 0"]["PSNR"] + 5
    assert table["DA-VAE"]["rFrechet-16"] < min(table[row]["rFrechet-16"] for row in ("z_d = 0", "z_d random"))

def test_pictures_too_small_to_be_measured_are_refused_before_anything_is_made(tmp_path):
    """SSIM's window has 11 pixels; a stage 1 at 8 ended in a traceback when it was trained."""
    with pytest.raises(InputError, match="--size 8: SSIM"):
        run_main("recon", "--size", 8, "--count", 4, "--out", tmp_path / "recon")
    with pytest.raises(InputError, match="--size 8: SSIM"):
        align.train(align.parse_args(["--size", "8", "--out", str(tmp_path / "align")]), 0, 1, "cpu")

@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0)])
def test_a_device_is_the_same_by_name_and_as_an_object(device, monkeypatch):
    """Training and sampling took another precision from one --dtype, for one of them was told torch.device("cpu")."""
    for has in True, False:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        wanted = torch.bfloat16 if has and torch.backends.mkldnn.is_available() else torch.float32
        assert pick_dtype("auto", device, autocast=True) == wanted
        assert pick_dtype("auto", device) == torch.float32

def random_lpips(path, rng):
    """Random weights in the published files' key names."""
    sizes = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
             17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    vgg = {f"features.{i}.weight": torch.randn(c, c_in, 3, 3, generator=rng) * (2 / (9 * c_in))**0.5
           for i, (c_in, c) in sizes.items()}
    vgg |= {f"features.{i}.bias": torch.zeros(c) for i, (_, c) in sizes.items()}
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng)
           for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, path / "vgg16-397923af.pth")
    torch.save(lin, path / "vgg.pth")

def test_recon_in_inceptions_features_has_lpips_and_fid(tmp_path, inception_file, monkeypatch):
    """On pictures from disk, with a VAE alone; by two workers, which change nothing."""
    random_lpips(tmp_path, torch.Generator().manual_seed(0))
    monkeypatch.setattr("align.LPIPS_FILES", {n: (a, kind, "") for n, (a, kind, _) in LPIPS_FILES.items()})
    x, _, _ = World().sample(range(6))
    for i, image in enumerate(x):
        (tmp_path / "val").mkdir(exist_ok=True)
        save_png(tmp_path / "val" / f"{i}.png", image)
    for workers in 0, 2:
        run_main("recon", "--data", tmp_path / "val", "--features", "inception", "--weights", tmp_path, "--batch", 3,
                 "--workers", workers, "--out", tmp_path / f"r{workers}")
    one, two = (json.loads((tmp_path / name / "recon.json").read_text())["table"]["VAE"] for name in ("r0", "r2"))
    assert one["PSNR"] > 35 and 0 < one["LPIPS"] < 1 and one["SSIM"] > 0.9 and one["rFID-6"] > 0
    assert two == pytest.approx(one)

def test_two_ranks_make_what_one_makes(latents, samples, tmp_path):
    """encode, train, sample and fid under torchrun, two gloo processes, against one."""
    script, env = str(ROOT / "imagenet_eval.py"), os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def torchrun(*flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
        subprocess.run(command + [str(flag) for flag in flags], check=True, env=env, cwd=tmp_path, timeout=300)

    torchrun("sample", "--dit", f"{TINY_MODEL}/lightningdit", "--count", 24, "--batch", 8, "--steps", 6, "--out", "samples")
    assert same(shards(tmp_path / "samples"), shards(samples))
    flags = ["train", "--latents", latents, "--n-warm", 5, "--dtype", "fp32", "--lr", 1e-3, "--epochs", 1]
    torchrun(*flags, "--batch", 10, "--out", "two")
    run_main(*flags, "--batch", 20, "--out", tmp_path / "one")
    a, b = (load_file(tmp_path / name / "lightningdit.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    trained_alike(a.values(), b.values(), 1e-6, 1e-5)
    for k in a:                         # a tensor that the ranks do not share is off by 3e-3 and more
        trained_alike([a[k]], [b[k]], 1e-5, 1e-4)
    flags = ["fid", samples, "--ref", "world", "--size", 32, "--count", 24, "--features", "world", "--out"]
    torchrun(*flags, "fid2")
    run_main(*flags, tmp_path / "fid1")
    one, two = (json.loads((tmp_path / name / "fid.json").read_text())["Frechet-24"] for name in ("fid1", "fid2"))
    assert two == pytest.approx(one, rel=1e-6)

def test_the_chain_from_va_vae_to_a_score(tmp_path):
    """The released shapes in small: VA-VAE (f16, 32 channels), 96 detail channels, LightningDiT/1, its own files."""
    peer_vae("va-vae").save_pretrained(tmp_path / "hub" / "vae")
    torch.manual_seed(0)
    save_davae(tmp_path / "davae.safetensors", DAVAE(load_vae(tmp_path / "hub"), 96))
    base = small(replace(SMALL, in_channels=32, classes=2))
    torch.save({"ema": base.state_dict()}, tmp_path / "lightningdit-xl-imagenet256-800ep.pt")
    released = {"mean": torch.full((1, 32, 1, 1), 0.5), "std": torch.full((1, 32, 1, 1), 2.0)}
    torch.save(released, tmp_path / "latents_stats.pt")
    x, _, _ = World(128).sample(range(12))
    for i, image in enumerate(x):
        (tmp_path / "train" / f"n0{i % 2}").mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / "train" / f"n0{i % 2}" / f"{i}.png", image)
    vae = ["--vae", tmp_path / "hub", "--davae", tmp_path / "davae.safetensors", "--batch", 4]
    run_main("encode", *vae, "--data", tmp_path / "train", "--size", 128, "--out", tmp_path / "latents")
    assert shards(tmp_path / "latents")[0]["latents"].shape == (12, 128, 4, 4)
    run_main("train", "--latents", tmp_path / "latents", "--init", tmp_path, "--batch", 4, "--epochs", 1, "--lr", 1e-3,
             "--n-warm", 2, "--out", tmp_path / "dit")
    mean, std = ie.read_statistics(tmp_path / "dit")
    assert torch.equal(mean[:, :32], released["mean"]) and torch.equal(std[:, :32], released["std"])
    assert load_lightningdit(tmp_path / "dit").arch == replace(base.arch, in_channels=128)
    run_main("sample", "--dit", tmp_path / "dit", *vae, "--count", 4, "--steps", 3, "--out", tmp_path / "samples")
    assert shards(tmp_path / "samples")[0]["images"].shape == (4, 128, 128, 3)
    run_main("fid", tmp_path / "samples", "--ref", tmp_path / "train", "--features", "world", "--out", tmp_path / "f")
    assert json.loads((tmp_path / "f" / "fid.json").read_text())["Frechet-4"] > 0

def test_fid_says_what_is_not_there_before_it_reads_any_picture(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(ie, "measure", None)
    for flag, value, said in ("--ref", tmp_path / "no.npz", "no.npz"), ("--save", tmp_path / "no" / "a.npz", "no folder"):
        assert said in refused(ie, "fid", "world", "--features", "world", flag, value, "--out", tmp_path)

def test_an_ablation_looks_for_its_dit_before_its_first_stage(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(ie, "load_feature_net", None)
    assert "no/where" in refused(ie, "ablate", "--init", "no/where", "--out", tmp_path)

def test_help_tells_the_defaults_that_are_taken(capsys):
    for flags, value, name, said in (
            ("ablate --vae a --init b", 80, "batch", "default 80; embedded 32"), ("ablate", 32, "batch", "default 80; embedded 32"),
            ("curve run --ref r --vae a", 1.0, "cfg", "curve and ablate on real data 1"), ("encode", 32, "batch", "(default 32)")):
        assert getattr(ie.parse_args(flags.split()), name) == value
        with pytest.raises(SystemExit):
            ie.parse_args([*flags.split(), "--help"])
        assert said in " ".join(capsys.readouterr().out.split()), flags

def test_help_says_of_each_command_a_whole_sentence(capsys):
    """Of its function's docstring, and nothing of what is meant for readers of the code."""
    with pytest.raises(SystemExit):
        ie.parse_args(["--help"])
    page = "".join(capsys.readouterr().out.split())          # a line may end within DA-VAE
    for command in "encode", "train", "sample", "fid", "clip", "curve", "recon", "ablate":
        with pytest.raises(SystemExit):
            ie.parse_args([command, "--help"])
        _, said, _ = capsys.readouterr().out.split("\n\n", 2)
        assert command + "".join(said.split()) in page and said.endswith("."), command
        assert "Raises" not in said

def test_a_trial_does_not_stand_in_the_way_of_the_ablation(tmp_path):
    """Both in one folder, the ablation was refused after its first stage 1: other latents lay there."""
    trial, whole = (ie.parse_args(["ablate", *flags]).out for flags in (["--quick"], []))
    assert (trial, whole) == (Path("runs/imagenet/quick"), Path("runs/imagenet/ablate"))
    assert ie.parse_args(["ablate", "--quick", "--out", str(tmp_path)]).out == tmp_path

def test_one_grid_point_is_no_sampling(refused):
    """It leads nowhere: the pictures were the noise that it starts from."""
    assert "--steps: 1, expected at least 2" in refused(ie, "sample", "--steps", "1")

def test_bad_input_is_one_line_and_code_2(tmp_path, refused):
    for flags in (["fid", tmp_path / "none"], ["train", "--latents", tmp_path], ["encode", "--size", "63"],
                  ["fid", "world", "--ref", tmp_path / "a.npz", "--features", "world"], ["fly"],
                  ["sample", "--dit", tmp_path], ["train", "--epochs", "many"], ["ablate", "--lambdas"]):
        refused(ie, *flags, "--out", tmp_path / "o")

# ------------------------------------------------------------ CLIP score

def clip_folder(folder, seed=0):
    """A random CLIP as openai/clip-vit-large-patch14 is laid out, written by transformers, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    vocab = len(json.loads((Path(TINY_MODEL) / "tokenizer" / "vocab.json").read_text()))
    text = dict(vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
                max_position_embeddings=16, projection_dim=48, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    vision = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, image_size=32,
                  patch_size=8, projection_dim=48)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))
    model.eval().save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        if (Path(TINY_MODEL) / "tokenizer" / name).is_file():
            shutil.copy(Path(TINY_MODEL) / "tokenizer" / name, folder)
    return model

def test_clip_features_are_transformers(tmp_path):
    peer = clip_folder(tmp_path)
    model, tokenizer = ie.load_clip_model(tmp_path)
    assert model.size == 32
    x, ids = torch.randn(3, 3, 32, 32), tokenizer(["a red circle", "a star", "a blue square with checks"])
    with torch.no_grad():
        images = peer.visual_projection(peer.vision_model(pixel_values=x).pooler_output)
        texts = peer.text_projection(peer.text_model(input_ids=ids).pooler_output)
        torch.testing.assert_close(model.encode_images(x), images, rtol=1e-5, atol=1e-5)
        if not torch.allclose(model.encode_texts(ids, tokenizer.eos), texts, atol=1e-5):
            assert tokenizer.eos != int(ids.max()), "transformers pools at the greatest id, OpenAI's end token"
            hidden = peer.text_model(input_ids=ids).last_hidden_state
            ends = (ids == tokenizer.eos).int().argmax(1)
            texts = peer.text_projection(hidden[torch.arange(3), ends])
            torch.testing.assert_close(model.encode_texts(ids, tokenizer.eos), texts, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("size", [(64, 48), (31, 90), (224, 224), (500, 333)])
def test_clip_pixels_are_the_processors(size):
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    module = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = module(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))[0]
    found = ie.clip_pixels(image, 56)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1.01 / 255 / 0.26                   # a grey level

def test_the_graph_in_a_comfyui_png_is_no_prompt(tmp_path):
    """The caption beside it is; without one, the picture is refused."""
    save_png(tmp_path / "a.png", torch.zeros(3, 40, 40), prompt='{"3": {"class_type": "KSampler"}}')
    save_png(tmp_path / "b.png", torch.zeros(3, 40, 40), prompt="a dog")
    with pytest.raises(InputError, match="a.png: no prompt in its PNG text"):
        ie.CaptionedPictures(tmp_path, 32).sample([0])
    (tmp_path / "a.txt").write_text("a cat")
    assert ie.CaptionedPictures(tmp_path, 32).sample([0, 1])[1] == ["a cat", "a dog"]

def test_a_list_of_prompts_follows_the_numbers_in_names(tmp_path):
    """Of more than 10,000 pictures 1000.png came before 10000.png, 10000.png before 1001.png: each picture behind the
    first 1001 was scored with the prompt of another. So was every picture of a folder that counts from 1.png on."""
    names = ["a1/9.png", "a1/10.png", "a10/1.png", "b/9999.png", "b/10000.png", "c.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_png(tmp_path / name, torch.zeros(3, 40, 40))
    (tmp_path / "list.txt").write_text("\n".join(names))
    data = ie.CaptionedPictures(tmp_path, 32, tmp_path / "list.txt")
    assert data.sample(range(6))[1] == [item.name for item in data.items]

def test_pictures_of_two_models_have_no_score(tmp_path):
    """sample.py --compare draws both models into one folder; a score of both, of twice as many pictures, said nothing."""
    for name in "0000-stock", "0000-DA-VAE", "0001-stock", "0001-DA-VAE":
        save_png(tmp_path / f"{name}.png", torch.zeros(3, 64, 64), prompt="a red circle")
    with pytest.raises(InputError, match="pictures of two models"):
        run_main("fid", tmp_path, "--ref", "world", "--features", "world", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="pictures of two models"):
        ie.CaptionedPictures(tmp_path, 224)

def test_clip_score_of_our_pictures_and_of_a_list(tmp_path, capsys):
    """Prompts come from the PNGs' text, from captions beside, or from a list by id or by order: one figure."""
    clip_folder(tmp_path / "clip")
    prompts = [f"a {colour} circle" for colour in ("red", "blue", "green", "yellow", "orange")]
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(prompts):
        image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        for kind in ("text", "beside", "list", "mjhq"):
            (tmp_path / kind).mkdir(exist_ok=True)
            save_png(tmp_path / kind / f"{i:04d}.png", image, **({"prompt": prompt} if kind == "text" else {}))
        (tmp_path / "beside" / f"{i:04d}.txt").write_text(prompt)
    save_overview(tmp_path / "text" / "grid.png", torch.zeros(3, 40, 56))
    (tmp_path / "list.txt").write_text("\n".join(prompts))
    entries = {f"{i:04d}": {"prompt": prompt, "category": "art"} for i, prompt in enumerate(prompts)}
    (tmp_path / "mjhq.json").write_text(json.dumps(dict(reversed(entries.items()))))
    found = []
    for kind, more in (("text", []), ("beside", []), ("list", ["--prompts", tmp_path / "list.txt"]),
                       ("mjhq", ["--prompts", tmp_path / "mjhq.json"])):
        run_main("clip", tmp_path / kind, "--clip", tmp_path / "clip", "--batch", 2, "--out", tmp_path / "out", *more)
        found.append(json.loads((tmp_path / "out" / "clip.json").read_text()))
    assert {result["N"] for result in found} == {5}
    assert max(abs(result["CLIP score"] - found[0]["CLIP score"]) for result in found) < 1e-4
    ours, tokenizer = ie.load_clip_model(tmp_path / "clip")
    pixels = torch.stack([ie.clip_pixels(Image.open(tmp_path / "text" / f"{i:04d}.png"), 32) for i in range(5)])
    with torch.no_grad():
        cosines = torch.cosine_similarity(ours.encode_images(pixels), ours.encode_texts(tokenizer(prompts), tokenizer.eos))
    assert found[0]["CLIP score"] == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-4)
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(InputError, match="1 prompts for 5 pictures"):
        run_main("clip", tmp_path / "list", "--clip", tmp_path / "clip", "--prompts", tmp_path / "short.txt")
    twice = [{"id": "0001", "category": category, "prompt": "a cat"} for category in ("art", "food")]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    with pytest.raises(InputError, match="2 entries, but 1 ids"):
        run_main("clip", tmp_path / "list", "--clip", tmp_path / "clip", "--prompts", tmp_path / "twice.json")
    with pytest.raises(InputError, match="no prompt in its PNG text"):
        run_main("clip", tmp_path / "list", "--clip", tmp_path / "clip", "--out", tmp_path / "out")

# ------------------------------------------------------------ three ways to 299 pixels

def test_resizes_are_what_they_say():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 64, 80)).float()
    half_pixel = torch.nn.functional.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ie.inception_input(x, "pytorch-fid"), 2 * half_pixel - 1, rtol=1e-5, atol=1e-5)
    clean = ie.inception_input(x, "clean-fid")
    channel = Image.fromarray(x[1, 2].numpy()).resize((299, 299), Image.BICUBIC)
    torch.testing.assert_close(clean[1, 2], (torch.tensor(np.asarray(channel)).clamp(0, 255) - 128) / 128)
    found = [ie.inception_input(x, resize) for resize in ie.RESIZES]
    assert all(y.shape == (2, 3, 299, 299) and y.abs().max() <= 1 for y in found)
    assert not torch.allclose(found[0], found[1], atol=0.01) and not torch.allclose(found[1], found[2], atol=0.01)


def test_drop_small_reaches_whatever_reads_the_pictures(monkeypatch, tmp_path):
    """recon, and the reference of ablate, once took the flag and enlarged small pictures all the same."""
    class Opened(Exception):
        pass

    def open_pictures(source, size=None, drop_small=False):
        raise Opened(drop_small)

    monkeypatch.setattr(ie, "open_pictures", open_pictures)
    for command in ("encode", "recon", "ablate"):
        args = ie.parse_args([command, "--drop-small", "--out", str(tmp_path)])
        with pytest.raises(Opened, match="True"):
            getattr(ie, command)(args, 0, 1, "cpu")

def test_a_metrics_name_has_the_whole_count(tmp_path):
    names = [ie.metric_name("inception", n) for n in (50_000, 1_999, 10_240, 192)]
    assert names == ["FID-50k", "FID-1.999k", "FID-10.24k", "FID-192"]
    for name in "one.npz", "two.npz":                           # as ADM's: without a count
        np.savez(tmp_path / name, mu=np.zeros(2), sigma=np.eye(2))
    run_main("fid", tmp_path / "one.npz", "--ref", tmp_path / "two.npz", "--features", "world", "--out", tmp_path)
    found = json.loads((tmp_path / "fid.json").read_text())
    assert found["Frechet"] == 0 and found["N"] is None and found["N reference"] is None

# ------------------------------------------------------------ the ablation

def test_scores_are_dense_at_first_and_come_once_at_the_end():
    assert sorted(ie.list_score_steps(540, 90)) == [45, 90, 180, 360, 540]
    assert sorted(ie.list_score_steps(720, 90)) == [45, 90, 180, 360, 720]
    assert ie.list_score_steps(1, 90) == {1} and min(ie.list_score_steps(8, 0.5)) == 1

def test_weights_are_kept_up_to_the_last_epoch():
    assert ie.list_keep_steps(1.2, 0.4, 10) == pytest.approx({4: 0.4, 8: 0.8, 12: 1.2})     # 1.2 / 0.4 = 2.9999999999999996
    assert ie.list_keep_steps(7, 3, 10) == {30: 3, 60: 6} and ie.list_keep_steps(7, None, 10) == {}

def test_means_are_told_apart_by_three_standard_errors():
    assert not ie.tell_apart([50, 60], [55, 65])
    assert ie.tell_apart([50, 51, 52], [60, 61, 62])
    assert not ie.tell_apart([100, 100], [100, 100])                        # no spread, no difference
    full = {"texture": [90.0, 91.0, 92.0]}
    assert ie.format_scores(full, full) == {"texture": "91 +- 1 "}          # the row that all are compared with
    assert ie.format_scores({"texture": [91.0, 92.0, 91.0]}, full)["texture"].endswith("=")
    assert not ie.format_scores({"texture": [40.0, 45.0, 41.0]}, full)["texture"].endswith("=")
    assert ie.format_scores({"texture": [40.0]}, full) == {"texture": "40"}                     # one seed: no spread

def test_seeds_are_averaged_where_all_were_scored():
    """One seed was trained to epoch 6, all were then asked for 8: the first has a point more."""
    points = [(0, 9.0), (4, 7.0), (6, 6.0), (8, 5.0)], [(0, 9.0), (4, 5.0), (8, 3.0)]
    runs = [[{"epoch": epoch, "base loss": value} for epoch, value in run] for run in points]
    row, curves = ie.tabulate(runs)
    assert row == {"base loss": [5.0, 3.0]} and curves == {"base loss": [(0, 9.0), (4, 6.0), (8, 4.0)]}

def test_an_ablation_takes_no_stage_1_of_other_flags(tmp_path, monkeypatch):
    """A finished one was taken whatever it was, and ablate.json gave it this command's --stage1."""
    args = ie.parse_args(["ablate", "--stage1", "5", "--out", str(tmp_path)])
    trained = []

    def train(args, *_):
        trained.append(args.steps)
        ie.align.save_checkpoint(args.out, args, step=args.steps)
        ie.write_json(args.out / "result.json", {"steps": args.steps})

    monkeypatch.setattr(ie.align, "train", train)
    monkeypatch.setattr(ie, "encode", lambda *_: None)
    for steps in 5, 5, 6:
        ie.train_stage1(ie.with_flags(args, stage1=steps), 0.5, 0, 1, "cpu")
    assert trained == [5, 6]
    with pytest.raises(InputError, match="--detail-channels 48, now 32"):
        ie.train_stage1(ie.with_flags(args, stage1=6, detail_channels=32), 0.5, 0, 1, "cpu")

def test_an_ablations_base_loss_is_of_every_class(latents, tmp_path, monkeypatch):
    """Folders are sorted by class: the first latents are all of one. The world's are not."""
    args = ie.parse_args(["ablate", "--quick", "--out", str(tmp_path / "o")])
    made = []
    monkeypatch.setattr(ie, "Scoring", lambda ae, net, real, latents, labels: made.append((latents, labels)))
    monkeypatch.setattr(ie, "train", lambda *_: [])
    held = [torch.cat([shard[name] for shard in shards(latents)]) for name in ("latents", "labels")]
    (tmp_path / "latents").mkdir()
    for n in range(6):                                                  # 6 x 50 latents, sorted by class
        labels = torch.arange(50 * n, 50 * n + 50) // 15                # 20 classes of 15
        ie.save_file({"latents": held[0][:50], "labels": labels}, tmp_path / "latents" / f"shard-{n:05d}.safetensors")
    shutil.copy(f"{TINY_MODEL}/davae.safetensors", tmp_path)
    for data in "world", "folder":
        ie.run_variant(ie.Variant("full", 0.5), tmp_path, None, None, ie.with_flags(args, data=data), 0, 1, "cpu")
    (world, world_labels), (_, labels) = made
    assert len(world_labels) == len(labels) == 240
    assert torch.equal(world[:50], held[0][:50]) and world_labels.max() == 15
    assert len(labels.unique()) == 20

def test_a_short_score_has_a_picture_for_every_rank(monkeypatch):
    """--quick draws 32 pictures, a fifth of them 6: on eight ranks that ended in a refusal, after stage 1."""
    args = ie.parse_args(["ablate", "--quick"])
    spans = []
    monkeypatch.setattr(ie, "sample_batches", lambda dit, ae, statistics, span, args: spans.append(span))
    monkeypatch.setattr(ie, "measure", lambda *_: None)
    monkeypatch.setattr(ie, "base_loss", lambda *_: 0.0)
    scoring = ie.Scoring(None, None, None, None, None)
    for rank in range(8):
        ie.score(None, scoring, None, False, ie.with_flags(args, data="folder"), rank, 8, "cpu")
    assert [len(span) for span in spans] == [1] * 8

def test_base_loss_is_the_pretrained_models_at_step_0():
    """With zero-init, whatever z_d holds; with random new layers it is not. The draws are always the same."""
    g = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(8, 64, 8, 8, generator=g), torch.arange(8)
    statistics = torch.zeros(1, 64, 1, 1), torch.ones(1, 64, 1, 1)
    scoring = ie.Scoring(None, None, None, latents, labels)
    losses = {}
    for zero_init in True, False:
        dit = load_lightningdit(f"{TINY_MODEL}/lightningdit")
        torch.manual_seed(0)
        warm_start(dit, 48, zero_init)
        losses[zero_init] = ie.base_loss(dit, scoring, statistics, ie.parse_args(["ablate"]))
        assert losses[zero_init] == ie.base_loss(dit, scoring, statistics, ie.parse_args(["ablate"]))
    noise, t, _, _ = ie.draw_noise(0, 0, 0, 1, 8, (64, 8, 8), "cpu")
    noise, z, sigma = noise[:, :16], latents[:, :16], t.view(-1, 1, 1, 1)
    with torch.no_grad():
        velocity = load_lightningdit(f"{TINY_MODEL}/lightningdit")(sigma * z + (1 - sigma) * noise, t, labels)
    assert losses[True] == pytest.approx(F.mse_loss(velocity, z - noise).item(), rel=1e-5)
    assert losses[False] > 1.02 * losses[True]

def test_the_worlds_classes_are_shape_and_texture():
    net = ie.load_world_features("cpu")
    images, _, labels = World(split="val").sample(range(48))
    features, probs = net(images)
    assert features.shape == (48, 128) and torch.allclose(probs.sum(1), torch.ones(48), atol=1e-5)
    assert (probs.argmax(1) == labels[:, 0] * 6 + labels[:, 2]).all()

def test_an_ablation_logs_the_warm_start_each_point_and_one_distance(tmp_path, monkeypatch):
    monkeypatch.setattr(ie.align, "evaluate", lambda *_: ({"DA-VAE": {"PSNR": 30.0}}, 0.1))     # stage 1's own matter
    args = ie.parse_args(["ablate", "--quick", "--dtype", "fp32", "--out", str(tmp_path), "--device", "cpu"])
    few = ie.with_flags(args, lambdas=[0.5], stage1=1, images=64, count=10, steps=2, seeds=1, ranks=1)
    ie.ablate(few, 0, 1, "cpu")
    table = json.loads((tmp_path / "ablate.json").read_text())["table"]
    assert list(table) == ["full", "without zero-init", "without schedule"]
    starts = {}
    for name in table:
        lines = (tmp_path / f"{name.replace(' ', '-')}-0" / "log.jsonl").read_text().splitlines()
        scored = [line for line in map(json.loads, lines) if "base loss" in line]
        assert [line["epoch"] for line in scored] == [0, 0.5, 1, 2]
        assert ["distance" in line for line in scored] == [False, False, False, True]
        assert table[name]["distance"] == [scored[-1]["distance"]]
        starts[name] = scored[0]["base loss"]
    assert starts["full"] == starts["without schedule"] < starts["without zero-init"]   # zero-init: the pretrained's
    assert all((tmp_path / f"{name}.png").is_file() for name in ("texture", "shape", "base-loss"))
    with pytest.raises(InputError, match="full-0 has trained 4 steps, more than the 2 asked for"):
        ie.ablate(ie.with_flags(few, epochs=1), 0, 1, "cpu")        # a longer run's figures are not a shorter one's
