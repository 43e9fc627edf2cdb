"""assets/figures.py draws what it should, small enough for a page and for a projector."""
from pathlib import Path

import pytest
import torch
from PIL import Image

from assets import figures
from vae_expand import TINY_MODEL

ASSETS = Path(TINY_MODEL).parent

@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """draw(argument, ...): run the command in this process -> the picture that it wrote, what it printed"""
    monkeypatch.setattr(figures, "HERE", tmp_path)

    def call(*argv):
        figures.main(figures.parse_args([str(arg) for arg in argv]))
        [path] = tmp_path.glob("figure-*")
        return path, capsys.readouterr().out
    return call

def test_every_picture_is_small():
    for path in [*ASSETS.glob("*.png"), *ASSETS.glob("*.gif")]:
        assert path.stat().st_size < (1_000_000 if path.suffix == ".gif" else 200_000), path.name

def test_the_method_is_drawn_as_committed(draw):
    path, printed = draw("method")
    drawn, kept = (Image.open(place / "figure-method.png").convert("RGB") for place in (path.parent, ASSETS))
    assert drawn.size == kept.size and "C = 16, D = 48, s = 2" in printed
    assert path.stat().st_size < 200_000

def test_a_photograph_through_another_size(draw, tmp_path):
    """The widest square in the middle, a multiple of f s; a picture with much in it is made to fit."""
    torch.manual_seed(0)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 100, 137), (300, 410), mode="bilinear")
    Image.fromarray((255 * noise[0]).byte().permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    path, printed = draw("photograph", "--image", tmp_path / "noise.png")
    assert "the square in its middle, 296 x 296 pixels" in printed and "drawn 4 times as large" in printed
    assert path.stat().st_size < 200_000

def test_the_animation_shows_every_step(draw, tmp_path):
    """Of an untuned export, after which both of DA-VAE's columns are alike."""
    from finetune_dit import export, warm_start
    from sample import load_mmdit
    export(tmp_path / "dit.safetensors", warm_start(load_mmdit(TINY_MODEL), 48))
    path, printed = draw("denoising", "--dit", tmp_path / "dit.safetensors", "--steps", 3)
    film = Image.open(path)
    assert film.n_frames == 4 and film.size == (700, 484) and "3 steps" in printed

def test_refusals(refused, tmp_path):
    Image.new("RGB", (7, 300)).save(tmp_path / "thin.png")
    assert "7 x 300 pixels; expected at least 8" in refused(figures, "photograph", "--image", tmp_path / "thin.png")
    assert "this makes it: python finetune_dit.py" in refused(figures, "denoising", "--dit", tmp_path / "none")
