"""Chapter 2: the equations by hand, the losses against independent code, the data in order, the runs."""

import json
import os
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from align import (LPIPS_FILES, Stage1, StepBatches, align_loss, damaged, evaluate, gradient_ratio, hinge_loss, kl_loss, load_lpips,
                   objective, patch_gan, project, psnr, reconstructions, ssim)
from assets.world import COLOURS, World, load_classifier
from conftest import ROOT, peer_vae, relative_error, trained_alike
from vae_expand import (DAVAE, ImageDataset, TINY_MODEL, adm_crop, InputError, downsample, load_davae, load_vae, read_json, save_davae,
                        weights_hash)

@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a small random VAE of SD3.5's kind, stride 4."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=16,
        block_out_channels=(32, 32, 64), layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609).save_pretrained(folder / "vae")
    return folder

# ------------------------------------------------------------ DA-VAE

@pytest.mark.parametrize("kind", ["sd3.5", "va-vae", "sd-vae"])
@pytest.mark.parametrize("ratio, scale", [(1, 2), (2, 2), (3, 2), (4, 4)])
def test_base_channels_are_the_pretrained_encoders(kind, ratio, scale, tmp_path):
    """Bit for bit, of the down-sampled image; and a saved DA-VAE decodes the same."""
    peer_vae(kind).save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    davae = DAVAE(vae, ratio * vae.C, scale)
    x = torch.rand(2, 3, 2 * davae.f, 3 * davae.f) * 2 - 1
    with torch.no_grad():
        z_hr = davae.encode(x)
        assert z_hr.shape == (2, (1 + ratio) * vae.C, 2, 3)
        assert torch.equal(z_hr[:, : vae.C], vae.encode(downsample(x, scale)))
        davae.detail_mean.normal_()
        davae.detail_std.uniform_(0.5, 2)
        z_hr = davae.encode(x)
        z_d = davae.detail_posterior(x)[0]
        z, normed = z_hr.tensor_split([vae.C], dim=1)
        assert torch.allclose(davae.denormalise_detail(normed), z_d, atol=1e-5)
        assert torch.allclose(davae.normalise_detail(davae.denormalise_detail(normed)), normed, atol=1e-5)
        assert torch.allclose(davae.decode(z_hr), davae.join(z, z_d), atol=1e-4)
        save_davae(tmp_path / "davae.safetensors", davae)
        again = load_davae(tmp_path / "davae.safetensors", load_vae(tmp_path))
        assert torch.equal(again.decode(again.encode(x)), davae.decode(z_hr))

@pytest.mark.parametrize("ratio, scale", [(1, 2), (2, 2), (3, 2), (4, 4)])
def test_exact_start(ratio, scale, tmp_path):
    """The decoder begins as the pretrained one on the up-sampled base latent, and does not see z_d."""
    peer_vae("sd3.5").save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    davae = DAVAE(vae, ratio * vae.C, scale)
    z, z_d = torch.randn(1, vae.C, 5, 6), torch.randn(1, ratio * vae.C, 5, 6)
    up = F.interpolate(vae.denormalise(z), scale_factor=float(scale), mode="bilinear")
    expected = vae.decoder.conv_in(up)[..., scale:-scale, scale:-scale]
    got = davae.decoder.conv_in(torch.cat([vae.denormalise(z), z_d], 1))[..., scale:-scale, scale:-scale]
    assert (got - expected).abs().max() < 1e-4
    assert torch.allclose(davae.join(z, z_d), davae.join(z, -3 * z_d), atol=1e-3)

def test_detail_channels_must_fit(hub):
    vae = load_vae(hub)
    for D, scale in ((8, 2), (24, 2), (-16, 2), (16, 5)):
        with pytest.raises(InputError, match="multiple of the base's 16 channels"):
            DAVAE(vae, D, scale)

def test_another_base_is_refused_by_name(hub, tmp_path):
    vae = load_vae(hub)
    save_davae(tmp_path / "a.safetensors", DAVAE(vae))
    other = load_vae(hub)
    other.encoder.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=f"{weights_hash(vae)}, this one is {weights_hash(other)}"):
        load_davae(tmp_path / "a.safetensors", other)
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="not a DA-VAE file"):
        load_davae(tmp_path / "b.safetensors", vae)

def test_hash_agrees_between_layouts_and_dtypes(hub, tmp_path):
    vae = load_vae(hub)
    state = {"first_stage_model." + k: v.half() for k, v in vae.state_dict().items()}
    save_file(state, tmp_path / "one.safetensors")
    half = load_vae(tmp_path / "one.safetensors")
    assert weights_hash(half) == weights_hash(load_vae(tmp_path / "one.safetensors", torch.bfloat16))
    half.to(torch.float16)
    assert weights_hash(half) == weights_hash(load_vae(tmp_path / "one.safetensors"))
    assert weights_hash(vae) == weights_hash(load_vae(hub, torch.bfloat16))

def test_vae_expand_command(hub, tmp_path):
    command = [sys.executable, ROOT / "vae_expand.py", "--model", hub, "--detail-channels", "32", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32x32" in done.stdout and Image.open(tmp_path / "latents.png").width > 1000
    assert load_davae(tmp_path / "davae.safetensors", load_vae(hub)).D == 32

# ------------------------------------------------------------ the losses

def test_projection_by_hand():
    """Eq. (4), r = 3: channels 0, 1, 2 average to 0, and so on."""
    z_d = torch.arange(6.0).view(1, 6, 1, 1)
    assert project(z_d, 2).flatten().tolist() == [1.0, 4.0]
    assert torch.equal(project(z_d, 6), z_d)

def test_align_loss_by_hand():
    """Eq. (3): projections (1, 4), targets (0, 2): (1 + 4) / 2."""
    z_d = torch.arange(6.0).view(1, 6, 1, 1).requires_grad_()
    z = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    loss = align_loss(z_d, z)
    loss.backward()
    assert loss.item() == 2.5 and z.grad is None
    assert z_d.grad.flatten().tolist() == pytest.approx([1 / 3] * 3 + [2 / 3] * 3)

def test_kl_and_hinge_by_hand():
    assert kl_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 0
    assert kl_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(4 + np.e - 2)
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])).item() == 0.5 * (0.5 + 1.0)

def test_gradient_ratio_by_hand():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert gradient_ratio((3 * w[0] + 4 * w[1]), 2 * w[1], w).item() == pytest.approx(5 / 2.0001)

def test_objective_is_eq_6(hub):
    """Each weight in turn; 0 turns a term off."""
    davae = DAVAE(load_vae(hub))
    x = torch.rand(2, 3, 16, 16)
    out = Stage1(davae)(x, torch.randn(2, 16, 2, 2), torch.ones(2))
    x_hat, z, z_d, mean, logvar = out
    off = dict.fromkeys(("l1", "mse", "align", "kl", "lpips", "gan"), 0.0)
    off |= dict(gan_start=1, ramp=0, adaptive_align=False)
    terms = dict(l1=(x - x_hat).abs().mean(), mse=F.mse_loss(x, x_hat), align=align_loss(z_d, z),
                 kl=kl_loss(mean, logvar))
    for name, value in terms.items():
        loss, _ = objective(out, x, 1, Namespace(**off | {name: 0.5}), davae, None, None)
        assert loss.item() == pytest.approx(0.5 * value.item(), rel=1e-5)
    ramped, _ = objective(out, x, 3, Namespace(**off | dict(align=0.5, ramp=12)), davae, None, None)
    assert ramped.item() == pytest.approx(0.5 * 3 / 12 * terms["align"].item(), rel=1e-5)
    gan = patch_gan(8)
    big = torch.rand(2, 3, 64, 64)
    out = Stage1(davae)(big, torch.randn(2, 16, 8, 8), torch.ones(2))
    loss, _ = objective(out, big, 1, Namespace(**off | dict(l1=1.0, gan=0.1)), davae, None, gan)
    rec, fooled = (big - out[0]).abs().mean(), -gan(out[0]).mean()
    weight = 0.1 * gradient_ratio(rec, fooled, davae.decoder.conv_out.weight)
    assert loss.item() == pytest.approx((rec + weight * fooled).item(), rel=1e-4)
    late, _ = objective(out, big, 1, Namespace(**off | dict(l1=1.0, gan=0.1, gan_start=2)), davae, None, gan)
    assert late.item() == pytest.approx(rec.item(), rel=1e-5)

def test_lpips_equals_an_independent_forward(tmp_path, monkeypatch):
    """From the published formula, at random weights under torchvision's and richzhang's key names."""
    rng = torch.Generator().manual_seed(0)
    numbers = {
        0: (3, 64),
        2: (64, 64),
        5: (64, 128),
        7: (128, 128),
        10: (128, 256),
        12: (256, 256),
        14: (256, 256),
        17: (256, 512),
        19: (512, 512),
        21: (512, 512),
        24: (512, 512),
        26: (512, 512),
        28: (512, 512),
    }
    vgg = {"classifier.0.weight": torch.ones(1)}
    for i, (c_in, c) in numbers.items():
        vgg[f"features.{i}.weight"] = torch.randn(c, c_in, 3, 3, generator=rng) * (2 / (9 * c_in)) ** 0.5
        vgg[f"features.{i}.bias"] = torch.randn(c, generator=rng) * 0.1
    lin = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=rng)
        for i, c in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(lin, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match="expected 397923af"):
        load_lpips(tmp_path)
    monkeypatch.setattr("align.LPIPS_FILES", {name: (a, kind, "") for name, (a, kind, _) in LPIPS_FILES.items()})
    lpips = load_lpips(tmp_path)
    x, y = (torch.rand(2, 3, 48, 32, generator=rng) * 2 - 1 for _ in range(2))

    def features(v):
        mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        v, taps = (v - mean) / std, []
        for i in numbers:
            if i in (5, 10, 17, 24):
                v = F.max_pool2d(v, 2)
            v = F.relu(F.conv2d(v, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1))
            if i in (2, 7, 14, 21, 28):
                taps.append(v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    expected = sum(F.conv2d((a - b)**2, lin[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
                   for i, (a, b) in enumerate(zip(features(x), features(y))))
    assert relative_error(lpips(x, y), expected) < 1e-5
    assert lpips(x, x).abs().max() == 0

def test_lpips_without_network(tmp_path):
    with pytest.raises(InputError, match="--lpips 0"):
        load_lpips(tmp_path / "empty")

def test_patch_gan_is_pix2pix():
    gan = patch_gan()
    assert gan(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in gan.parameters()) == 2_765_633

def test_psnr_and_ssim(tmp_path):
    metrics = pytest.importorskip("skimage.metrics")
    x = torch.rand(3, 3, 40, 30) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    for i in range(3):
        a, b = (v[i].permute(1, 2, 0).double().numpy() for v in (x, y))
        _, full = metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2, channel_axis=2, full=True)
        assert ssim(x[i:i + 1], y[i:i + 1]).item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-5)
        eight = [np.round(v * 127.5 + 127.5) for v in (a, b)]
        theirs = metrics.peak_signal_noise_ratio(*eight, data_range=255)
        assert psnr(x[i:i + 1], y[i:i + 1]).item() == pytest.approx(theirs, abs=1e-3)
    assert ssim(x, x).min() > 0.9999

# ------------------------------------------------------------ data

def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i in range(7):
        name = tmp_path / "in" / ("deep" if i % 2 else ".") / f"{i}.png"
        picture(i).save(name)
        if i != 3:
            name.with_suffix(".txt").write_text(f"number {i} ü\n", encoding="utf-8")
    return tmp_path / "in"

def test_images_are_deterministic_and_complete(folder):
    data = ImageDataset(folder, 16, "all")
    images, captions, _ = data.sample(range(7))
    assert images.shape == (7, 3, 16, 16) and images.abs().max() <= 1
    assert sorted(captions) == [""] + [f"number {i} ü" for i in range(7) if i != 3]
    again, captions_again, _ = ImageDataset(folder, 16, "all").sample([6, 2])
    assert torch.equal(again, images[[6, 2]]) and captions_again == [captions[6], captions[2]]
    other, captions_other, _ = data.sample(range(7, 14))  # the next epoch: another order
    assert sorted(captions_other) == sorted(captions) and captions_other != captions
    assert not torch.equal(ImageDataset(folder, 16, "all", seed=1).sample(range(7))[0], images)

def test_tar_shards_and_metadata_agree_with_the_folder(folder, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(folder, arcname="../escape")  # never unpacked, so harmless
    data, tar_data = (ImageDataset(path, 16, "all", "adm", flip=False) for path in (folder, tmp_path / "shard.tar"))
    by_caption = lambda d: dict(zip(*d.sample(range(7))[1::-1]))  # noqa: E731
    a, b = by_caption(data), by_caption(tar_data)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for txt in folder.rglob("*.txt"):
        txt.unlink()
    lines = [json.dumps({"file_name": "deep/1.png", "text": "from the list"})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    captions = ImageDataset(folder, 16, "all").sample(range(7))[1]
    assert sorted(captions) == [""] * 6 + ["from the list"]

def test_real_photographs(shared):
    data = ImageDataset(shared / "data/clothing/val-256.tar", 64, "val", "adm", flip=False)
    images, captions, _ = data.sample(range(3))
    assert images.shape == (3, 3, 64, 64) and images.std() > 0.1 and all(captions)

def test_splits_are_disjoint(tmp_path):
    for i in range(101):
        (tmp_path / f"{i:03d}.png").touch()
    train, val = ([item[0] for item in ImageDataset(tmp_path, 16, split).items] for split in ("train", "val"))
    assert len(val) == 3 and len(train) == 98 and not set(train) & set(val)

def test_broken_files_are_named_skipped_and_fatal_above_one_percent(folder, tmp_path):
    with pytest.raises(InputError, match="no image in it"):
        (tmp_path / "empty").mkdir()
        ImageDataset(tmp_path / "empty", 16)
    with pytest.raises(InputError, match="no such file"):
        ImageDataset(tmp_path / "absent", 16)
    for i in range(200):
        picture(i, (16, 16)).save(tmp_path / "empty" / f"{i:03d}.png")
    (tmp_path / "empty" / "007.png").write_bytes(b"not a picture")
    (tmp_path / "empty" / "008.txt").write_bytes(b"\xff\xfe\xfa")
    data = ImageDataset(tmp_path / "empty", 16, "all")
    assert len(data.sample(range(200))[0]) == 200
    assert sorted(data.broken) == ["007.png", "008.png"]
    for i in range(9, 12):
        (tmp_path / "empty" / f"{i:03d}.png").write_bytes(b"")
    with pytest.raises(InputError, match="3 of 200 files cannot be read, above 1%"):
        ImageDataset(tmp_path / "empty", 16, "all").sample(range(200))

def test_ranks_share_the_work_without_overlap():
    seen = [n for rank in range(3) for step in (4, 5) for n in StepBatches(None, 2, rank, 3).span(step)]
    assert sorted(seen) == list(range(24, 36))

def test_adm_crop():
    """Halved with BOX while twice too large, then BICUBIC to the short side, then the centre."""
    image = picture(0, (100, 70))
    quarter = image.resize((50, 35), Image.BOX).resize((25, 17), Image.BOX)
    expected = quarter.resize((24, 16), Image.BICUBIC).crop((4, 0, 20, 16))
    assert np.array_equal(np.asarray(adm_crop(image, 16)), np.asarray(expected))

# ------------------------------------------------------------ the shipped DA-VAE, held-out pictures

@pytest.fixture(scope="module")
def shipped():
    return load_davae(Path(TINY_MODEL) / "davae.safetensors", load_vae(TINY_MODEL))

def test_shipped_davae_keeps_its_promises(shipped):
    table, error = evaluate(shipped, World(split="val"), 192, 32, load_classifier())
    assert table["DA-VAE"]["PSNR"] > table["base, up-sampled"]["PSNR"] + 6
    assert table["DA-VAE"]["texture"] > 0.95
    assert table["z_d = 0"]["PSNR"] < table["DA-VAE"]["PSNR"] - 4
    assert error < 0.15
    z_d = shipped.normalise_detail(shipped.detail_posterior(World().sample(range(512, 768))[0])[0])
    assert z_d.mean((0, 2, 3)).abs().max() < 0.2 and (z_d.std((0, 2, 3)) - 1).abs().max() < 0.2

def test_other_details_than_its_own_cost_what_they_should(shipped):
    """The paper's check, random z_d, and noise on z_d: the more, the worse, and none at all changes nothing."""
    x, _, _ = World(split="val").sample(range(16))
    rows, z, z_d = reconstructions(shipped, x)
    rows |= damaged(shipped, z, z_d, torch.Generator().manual_seed(0), (0.0, 0.05, 0.2))
    found = {row: psnr(x, y).mean().item() for row, y in rows.items()}
    assert found["z_d + 0% noise"] == pytest.approx(found["DA-VAE"], abs=1e-3)
    assert found["DA-VAE"] > found["z_d + 5% noise"] > found["z_d + 20% noise"] > found["z_d random"]
    noisy = damaged(shipped, z, z_d, torch.Generator().manual_seed(0))["z_d random"]
    assert torch.equal(noisy, rows["z_d random"])                           # of the generator alone

def test_constant_colours_reconstruct_without_a_grid(shipped):
    """No frequency of the up block's grid (period f) has an amplitude of 2 of 255 levels in the error."""
    colours = 0.5 * torch.tensor(list(COLOURS.values())) - 0.2
    x = colours[..., None, None].expand(-1, 3, 64, 64)
    with torch.no_grad():
        error = (shipped.decode(shipped.encode(x)) - x)[..., 16:48, 16:48]  # inside: borders ring by padding
    spectrum = torch.fft.fft2(error).abs().mean((0, 1)) / 32**2  # amplitude of each frequency
    step = 32 // shipped.f  # the grid's own frequency
    lines = torch.cat([spectrum[::step].flatten()[1:], spectrum[:, ::step].flatten()[1:]]) * 127.5
    assert lines.max() < 2, lines.max()

def test_numbers_are_written_as_people_write_them():
    """The tokens of 2048 px, and the seconds of a run of hours, once stood there as 1.638e+04 and 1.08e+05."""
    from align import format_table, short
    assert [short(v) for v in (0.0123456, 123.456, 9999.6, 108_012.3, 2e-5)] == ["0.01235", "123.5", "10000", "108012", "2e-05"]
    assert short(float("inf")) == "inf" and short(float("nan")) == "nan"
    assert "16384" in format_table({"stock at full size": {"tokens": 16384}})

# ------------------------------------------------------------ runs

def flags(hub, out, *args):
    small = ["--size", 32, "--batch", 4, "--lpips", 0, "--lr", 1e-3, "--warmup", 2, "--every", 1, "--held", 8]
    return [str(arg) for arg in ("--model", hub, *small, "--dtype", "fp32", "--out", out, *args)]

def align(hub, out, *args, ranks=1, ok=True):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run([sys.executable, *torchrun, ROOT / "align.py", *flags(hub, out, *args)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == ok, done.stderr[-2000:]
    return done

def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)

def test_interrupted_equals_uninterrupted(hub, tmp_path):
    """And the frozen base stays frozen, and every file that is promised is there."""
    before = weights_hash(load_vae(hub))
    align(hub, tmp_path / "whole", "--steps", 20)
    align(hub, tmp_path / "parts", "--steps", 10)
    done = align(hub, tmp_path / "parts", "--steps", 20)
    assert "resumed at step 10" in done.stdout
    a, b = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert a["step"] == b["step"] == 20
    assert all(torch.equal(x, y) for key in ("weights", "ema")
               for x, y in zip(a[key].values(), b[key].values()))
    logs = [read_json(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in log] for log in logs]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, 21))
    for name in ("davae.safetensors", "preview.png", "loss.png", "args.json", "result.json"):
        assert (tmp_path / "whole" / name).is_file()
    assert not list((tmp_path / "whole").glob("*.part"))
    vae = load_vae(hub)
    davae = load_davae(tmp_path / "whole/davae.safetensors", vae)
    assert weights_hash(davae.vae) == before
    z_d = davae.normalise_detail(davae.detail_posterior(World(32, 2).sample(range(128))[0])[0])
    assert z_d.mean((0, 2, 3)).abs().max() < 0.01 and (z_d.std((0, 2, 3)) - 1).abs().max() < 0.01
    refused = align(hub, tmp_path / "whole", "--steps", 30, "--align", 1, ok=False)
    assert refused.returncode == 2 and "--align 0.5, now 1.0" in refused.stderr and refused.stderr.count("\n") == 1

def test_two_processes_equal_one(hub, tmp_path):
    """The same global batch, noise and all: the same gradients, hence the same weights."""
    align(hub, tmp_path / "one", "--steps", 4, "--batch", 8)
    align(hub, tmp_path / "two", "--steps", 4, ranks=2)
    align(hub, tmp_path / "parts", "--steps", 4, "--batch", 8, "--accumulate", 2)
    one = saved(tmp_path / "one")["weights"].values()
    for other in ("two", "parts"):
        trained_alike(one, saved(tmp_path / other)["weights"].values(), 2e-6, 2e-5)

def test_discriminator_trains_on_two_ranks(hub, tmp_path):
    """Outside DDP, which allows no two forwards before a backward: its gradients are averaged by hand."""
    align(hub, tmp_path, "--steps", 3, "--gan", 0.1, "--gan-start", 2, "--size", 64, ranks=2)
    moved = saved(tmp_path)["gan_optimizer"]["state"]
    assert all(m["step"] == 2 and m["exp_avg"].abs().max() > 0 for m in moved.values())

@pytest.mark.parametrize("more", [
    ("--detail-channels", 32), ("--detail-channels", 48, "--freeze-trunk"), ("--scale", 4, "--detail-channels", 16),
    ("--start", "residual", "--adaptive-align"), ("--gan", 0.1, "--gan-start", 2, "--size", 64)])
def test_variants_train_and_load(more, hub, tmp_path):
    align(hub, tmp_path, "--steps", 3, *more)
    vae = load_vae(hub)
    davae = load_davae(tmp_path / "davae.safetensors", vae)
    frozen = all(torch.equal(p, q) for p, q in zip(davae.detail_encoder.parameters(), vae.encoder.parameters()))
    assert frozen == ("--freeze-trunk" in more)

def test_statistics_take_no_more_at_a_time_than_a_step(hub, monkeypatch):
    """--batch 64 --accumulate 64 trains picture by picture; 64 at a time after it would be out of memory, each time."""
    import align as script
    davae = DAVAE(load_vae(hub), 16)
    sizes, posterior = [], DAVAE.detail_posterior
    monkeypatch.setattr(DAVAE, "detail_posterior", lambda self, x: sizes.append(len(x)) or posterior(self, x))
    found = []
    for part in 6, 2:
        script.set_detail_statistics(davae, World(16, 2), 6, "cpu", part)
        found.append([davae.detail_mean.clone(), davae.detail_std.clone()])
    assert sizes == [6] * 32 + [2] * 96
    torch.testing.assert_close(*found)

def test_the_discriminator_may_join_a_compiled_training(tmp_path, monkeypatch):
    """From --gan-start on, gradients are taken twice through a graph that was compiled for once."""
    import align as script
    from vae_expand import VAE, VAEArch
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(
        self, backend="aot_eager", **options))                      # without the time of code generation
    monkeypatch.setattr(script, "load_vae", lambda *_, **__: VAE(VAEArch(4, (32, 32), blocks=1)))
    monkeypatch.setattr(script, "finish", lambda *_: None)
    more = ["--steps", 2, "--compile", "--gan", 0.1, "--gan-start", 2, "--batch", 1, "--detail-channels", 4]
    script.main(script.parse_args(flags(TINY_MODEL, tmp_path, *more)))
    assert saved(tmp_path)["step"] == 2

def test_parts_of_a_batch_with_ratios_of_their_own_may_not_change(hub, tmp_path):
    """A ratio of gradients is not that of the halves: with one, --accumulate is part of what is learned."""
    import align as script
    for more in ["--adaptive-align"], ["--gan", "0.1"]:
        out = tmp_path / more[0]
        out.mkdir()
        args = script.parse_args(flags(hub, out, "--steps", 2, *more))
        script.save_checkpoint(out, script.parse_args(flags(hub, out, *more)), step=1)
        args.accumulate = 2
        with pytest.raises(InputError, match="--accumulate 1, now 2"):
            script.train(args, 0, 1, "cpu")

def test_training_on_photographs(shared, hub, tmp_path):
    align(hub, tmp_path, "--steps", 2, "--data", shared / "data/clothing/val-256.tar")
    assert "texture" not in (tmp_path / "result.json").read_text()

@pytest.mark.parametrize("args, said", [
    (["--detail-channels", "7"], "multiple of the base's"), (["--size", "33"], "nearest"),
    (["--accumulate", "3"], "does not divide"), (["--data", "no/where"], "no such file"),
    (["--lpips", "1", "--lpips-dir", "no/where"], "--lpips 0")])
def test_command_refuses_in_one_line(args, said, hub, tmp_path, refused):
    assert said in refused(sys.modules["align"], *flags(hub, tmp_path / "run", "--steps", 2, *args))
