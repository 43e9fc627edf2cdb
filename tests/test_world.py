"""The procedural world, and what the tiny model in assets/tiny must do to be worth its bytes."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from align import psnr
from assets.world import COLOURS, SHAPES, TEXTURES, Classifier, World, load_classifier
from conftest import ROOT
from sample import generate, load_mmdit, load_text_encoders
from vae_expand import TINY_MODEL, ImageDataset, downsample, load_davae, load_vae

SHAPE, COLOUR, TEXTURE = 0, 1, 2

@pytest.fixture(scope="module")
def held_out():
    """images (480, 3, 64, 64), captions, labels: each held-out combination ten times."""
    return World(split="val").sample(range(480))

@pytest.fixture(scope="module")
def classifier():
    return load_classifier(TINY_MODEL)

def test_an_index_is_always_the_same_picture():
    images, captions, labels = World().sample([5, 123456789012, 7])
    again, captions_again, labels_again = World().sample(torch.tensor([7, 5]))
    assert torch.equal(images[[2, 0]], again) and torch.equal(labels[[2, 0]], labels_again)
    assert [captions[2], captions[0]] == captions_again
    assert images.shape == (3, 3, 64, 64) and labels.shape == (3, 4) and images.dtype == torch.float32
    other = World(seed=1).sample([5])[0]
    assert not torch.equal(images[:1], other)
    # same combination, another period of the index: another picture
    assert not torch.equal(World().sample([5])[0], World().sample([5 + len(World().combos)])[0])

def test_split_is_by_combination_and_hides_no_pair_of_values():
    train, val = ({tuple(c) for c in World(split=s).combos.tolist()} for s in ("train", "val"))
    assert not train & val
    assert train | val == {tuple(c) for c in World(split="all").combos.tolist()}
    assert len(train | val) == len(SHAPES) * len(COLOURS) * len(TEXTURES)
    for split in (train, val):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            pairs = {(c[a], c[b]) for c in train}
            assert len(pairs) == len({c[a] for c in split}) * len({c[b] for c in split})

def test_captions_say_what_the_labels_say(held_out):
    _, captions, labels = held_out
    for caption, (shape, colour, texture, background) in zip(captions[:48], labels.tolist()):
        assert f"{list(COLOURS)[colour]} {list(SHAPES)[shape]} with {list(TEXTURES)[texture]} on a" in caption
        assert caption.endswith(f"{list(COLOURS)[background]} background")
        assert colour != background and "a orange" not in caption

@pytest.mark.parametrize("size, scale", [(64, 2), (128, 4), (96, 2)])
def test_texture_is_obvious_at_full_size_and_gone_at_the_base_size(size, scale):
    world = World(size=size, scale=scale, split="all")
    images, _, labels = world.sample(range(144))
    plain = world.sample(range(144), textured=False)[0]
    assert images.abs().max() < 1, "a clamped texture leaves a trace"
    at_base = (downsample(images, scale) - downsample(plain, scale)).abs().max() * 127.5
    assert at_base < 0.01, f"{at_base:.3f} of 255 levels are left"
    for k in range(len(TEXTURES)):
        levels = (images - plain)[labels[:, TEXTURE] == k].pow(2).mean().sqrt() * 127.5
        assert levels > 8, f"{list(TEXTURES)[k]}: {levels:.1f} levels"

def test_a_probe_trained_on_noise_free_base_pictures_reads_no_texture():
    """It learns shapes and colours from the same pictures, so it could have learned textures, too.

    Of all combinations: memory of a split (never this texture with that shape and colour) would err always.
    """
    torch.manual_seed(0)
    images, _, labels = World(split="all").sample(range(1440))
    x = downsample(images, 2)
    fresh, _, fresh_labels = World(split="all", seed=1).sample(range(576))
    probe = Classifier(widths=(16, 32, 64), size=32)
    optimizer = torch.optim.AdamW(probe.parameters(), 4e-3)
    for step in range(120):
        pick = torch.randint(len(x), (48,))
        loss = sum(F.cross_entropy(logits, y) for logits, y in zip(probe(x[pick]), labels[pick].T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = probe.accuracy(downsample(fresh, 2), fresh_labels)
    assert found[COLOUR] > 0.9, f"colour {found[COLOUR]:.2f}: the probe has not learned"
    assert abs(found[TEXTURE] - 1 / 6) < 0.06, f"texture {found[TEXTURE]:.2f}, chance is 0.17"

def test_classifier_reads_held_out_pictures(held_out, classifier):
    images, _, labels = held_out
    found = classifier.accuracy(images, labels)
    assert (found >= 0.97).all(), f"shape, colour, texture, background: {found.tolist()}"
    base = classifier.accuracy(downsample(images, 2), labels)
    assert (base[:2] >= 0.97).all(), f"enlarged base pictures: {base.tolist()}"
    assert classifier.features(images[:2]).shape == (2, 128)

def test_vae_carries_textures_at_full_size_and_the_rest_at_both(held_out, classifier):
    images, labels = held_out[0][:96], held_out[2][:96]
    vae = load_vae(TINY_MODEL)
    with torch.no_grad():
        z = vae.encode(images)
        full = vae.decode(z)
        small = vae.decode(vae.encode(downsample(images, 2)))
    assert z.shape == (96, 16, 16, 16)
    assert abs(z.mean()) < 0.1 and 0.8 < z.std() < 1.3, f"mean {z.mean():.2f}, std {z.std():.2f}"
    assert (classifier.accuracy(full, labels) >= 0.97).all(), classifier.accuracy(full, labels).tolist()
    assert (classifier.accuracy(small, labels)[:2] >= 0.97).all(), classifier.accuracy(small, labels).tolist()

def read_back(count, size, cfg):
    """Shares of `count` generated pictures of held-out captions whose shape, colour, ... are as asked for."""
    vae, classifier = load_vae(TINY_MODEL), load_classifier(TINY_MODEL)
    mmdit, text = load_mmdit(TINY_MODEL), load_text_encoders(TINY_MODEL)
    _, captions, labels = World(split="val").sample(range(count))
    images = generate(mmdit, vae, text, captions, size, size, steps=28, cfg=cfg, seeds=range(count))
    return classifier.accuracy(images, labels)

def test_generated_pictures_show_their_captions():
    found = read_back(16, 32, cfg=4.5)
    assert (found[:2] >= 0.85).all(), f"shape, colour: {found[:2].tolist()}"

@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_generated_pictures_show_their_captions_200(size):
    found = read_back(200, size, cfg=4.5)
    assert (found[:2] >= 0.9).all(), f"shape, colour: {found[:2].tolist()}"

def test_figures_name_their_command_and_machine():
    figures = json.loads((Path(TINY_MODEL) / "figures.json").read_text())
    assert set(figures) >= {"classifier", "text", "vae", "dit", "scores"}
    for stage in figures.values():
        assert {"command", "seed", "hardware", "torch", "date"} <= set(stage)
    size = sum(p.stat().st_size for p in Path(TINY_MODEL).rglob("*") if p.is_file() and "davae" not in p.name)
    assert size < 20e6, f"{size / 1e6:.1f} MB"

# ------------------------------------------------------------ the photographs

def test_the_photographs_are_whole_and_small():
    """assets/photographs.tar: every picture reads and has a caption, the licence lies beside, 3 MB in all."""
    path = ROOT / "assets" / "photographs.tar"
    data = ImageDataset(str(path), 64, "all", crop="adm", flip=False, shuffle=False)
    images, captions, _ = data.sample(range(len(data)))
    assert images.shape == (750, 3, 64, 64) and not data.broken and not data.notes
    assert all(caption.startswith("a photo of ") for caption in captions)
    assert images.flatten(1).std(1).min() > 0.02                                        # none is a flat colour
    assert path.stat().st_size < 3e6 and "passed over" not in data.summary
    assert (path.parent / "LICENSE-CC0.txt").read_text().startswith("Creative Commons")

def test_the_tiny_vae_reads_photographs_and_still_knows_the_world():
    """A VAE of both: held-out photographs above 28 dB, and the transformers' latents hardly moved."""
    vae = load_vae(TINY_MODEL)
    x, _, _ = ImageDataset(str(ROOT / "assets" / "photographs.tar"), 64, "val", "adm", flip=False).sample(range(15))
    with torch.no_grad():
        assert psnr(x, vae.decode(vae.encode(x))).mean() > 28
    figures = json.loads((Path(TINY_MODEL) / "figures.json").read_text())["photographs"]
    assert figures["world"]["latent moved"] < 0.01 and figures["world"]["texture"] >= 0.97

def test_the_tiny_model_is_made_from_nothing_in_one_go(tmp_path):
    """Every stage, a few steps of each; one of the last used a flag that its options lacked, after an hour."""
    done = subprocess.run([sys.executable, ROOT / "assets/make_tiny.py", "--quick", "--out", tmp_path / "tiny", "--work",
                           tmp_path / "work"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path / "tiny") for path in (tmp_path / "tiny").rglob("*") if path.is_file()}
    assert made == {path.relative_to(TINY_MODEL) for path in Path(TINY_MODEL).rglob("*") if path.is_file()}
    for load in load_vae, load_mmdit, load_text_encoders, load_classifier:
        load(tmp_path / "tiny")
    load_davae(tmp_path / "tiny/davae.safetensors", load_vae(tmp_path / "tiny", torch.bfloat16))
    refused = subprocess.run([sys.executable, ROOT / "assets/make_tiny.py", "--quick"], capture_output=True, text=True)
    assert refused.returncode == 2 and "an --out of its own" in refused.stderr
