"""Chapter 1: weights are found, read, refused; the autoencoder equals diffusers'; images come back whole."""

import json
import math
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import VAES, peer_vae, relative_error
from vae_expand import (
    DAVAE, InputError, TINY_MODEL, VAE, VAEArch, check_size, downsample, find_file, find_weights, grid, load_davae,
    load_vae, pca_images, plot_curves, read_image, read_weights, round_ticks, save_davae, save_png, to_image, to_tensor,
    weights_hash)

def save_original(vae, path, prefix="first_stage_model.", dtype=torch.float32, **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + k: v.to(dtype).contiguous() for k, v in vae.state_dict().items()} | extra, path)

# ------------------------------------------------------------ equal to the peer

@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_vae_equals_diffusers(kind, layout, tmp_path):
    peer = peer_vae(kind)
    peer.save_pretrained(tmp_path / "hub" / "vae")
    vae = load_vae(tmp_path / "hub")
    if layout == "original":
        save_original(vae, tmp_path / "one" / "sd3.5_mini.safetensors")
        vae = load_vae(tmp_path / "one")
    x = torch.rand(2, 3, 2 * vae.f, 3 * vae.f, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shift, scale = peer.config.shift_factor or 0.0, peer.config.scaling_factor
    with torch.no_grad():
        z = (peer.encode(x).latent_dist.mean - shift) * scale
        image = peer.decode(z / scale + shift).sample
        assert relative_error(vae.encode(x), z) < 1e-5
        assert relative_error(vae.decode(z), image) < 1e-5
        assert (vae.posterior(x)[1] - peer.encode(x).latent_dist.logvar).abs().max() < 1e-3
        half = load_vae(tmp_path / "hub", torch.bfloat16)
        assert relative_error(half.encode(x), z) < 2e-2
        assert relative_error(half.decode(z), image) < 2e-2

def test_sharded_weights(tmp_path):
    peer = peer_vae("sd3.5")
    peer.save_pretrained(tmp_path / "vae", max_shard_size="200KB")
    assert (tmp_path / "vae/diffusion_pytorch_model.safetensors.index.json").is_file()
    vae = load_vae(tmp_path)
    assert len(find_weights(tmp_path, "vae")) > 1
    assert torch.equal(vae.encoder.conv_in.weight, peer.encoder.conv_in.weight)

def test_va_vae_checkpoint_file(tmp_path):
    """VA-VAE is published as a .pt with its training's losses and alignment networks inside."""
    peer_vae("va-vae").save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    assert (vae.shift, vae.scale, vae.arch.attention, vae.f) == (0.0, 1.0, (4,), 16)
    extra = {
        "loss.logvar": torch.zeros(()),
        "foundation_model.w": torch.ones(2),
        "linear_proj.weight": torch.ones(2),
    }
    torch.save({"state_dict": vae.state_dict() | extra}, tmp_path / "vavae.pt")
    again = load_vae(tmp_path / "vavae.pt")
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.encode(x), vae.encode(x))

def test_full_size_vae_has_the_released_key_count():
    """SD3.5's VAE: 83,819,683 parameters in 244 tensors, as diffusers configures it."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = VAE()
        peer = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    assert sum(p.numel() for p in vae.parameters()) == sum(p.numel() for p in peer.parameters()) == 83_819_683
    assert len(vae.state_dict()) == len(peer.state_dict()) == 244

def test_encode_samples_the_posterior(tmp_path):
    peer_vae("sd-vae").save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    mean, logvar = vae.posterior(x)
    draws = torch.stack([vae.encode(x, sample=True) for _ in range(4000)])
    expected = (0.5 * logvar).exp() * vae.scale
    assert torch.equal(vae.encode(x), (mean - vae.shift) * vae.scale)
    assert (draws.std(0) / expected - 1).abs().max() < 0.06
    assert ((draws.mean(0) - vae.encode(x)).abs() < 5 * expected / 4000**0.5).all()

@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_decoding_in_strips_changes_nothing(kind, rows, tmp_path):
    """Whatever the remainder: the statistics are the whole image's, so there is no seam to look for."""
    peer_vae(kind).save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    z = torch.randn(2, vae.C, 7, 5)
    with torch.no_grad():
        whole = vae.decode(z)
        vae.decoder.in_strips(rows)
        assert relative_error(vae.decode(z), whole) < 1e-5

# ------------------------------------------------------------ found or refused

def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text

def test_no_such_folder():
    with pytest.raises(InputError) as error:
        load_vae("no/such/folder/here")
    assert "no such file or folder" in one_line(error)

def test_hub_unreachable(tmp_path, monkeypatch):
    """Offline and not in the cache (all tests run with HF_HUB_OFFLINE): the licence page and the command."""
    with pytest.raises(InputError) as error:
        load_vae("stabilityai/stable-diffusion-3.5-medium")
    text = one_line(error)
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium" in text and "hf download" in text

def hub_error(kind, status):
    """huggingface_hub's exceptions want a response, whose class differs between that library's versions."""
    from huggingface_hub import errors

    kind = getattr(errors, kind, RuntimeError)
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    return error

@pytest.mark.parametrize(
    "kind, said",
    [
        ("GatedRepoError", "gated; accept its licence at https://huggingface.co/a/b"),
        ("RepositoryNotFoundError", "no such repository on the hub"),
        ("HfHubHTTPError", "cannot be reached"),
        ("HTTPError", "cannot be reached"),     # where a connection breaks amid a file: of the HTTP library,
        ("RuntimeError", "cannot be reached"),  # or of hf_xet
    ],
)
def test_hub_refusals(kind, said, monkeypatch):
    def refuse(*args, **kwargs):
        raise hub_error(kind, 401)

    monkeypatch.setattr("vae_expand.snapshot_download", refuse)
    with pytest.raises(InputError) as error:
        load_vae("a/b")
    assert said in one_line(error)

def test_hub_fetches_only_what_is_needed(tmp_path, monkeypatch):
    """The same patterns, applied to a listing like the real repository's."""
    from huggingface_hub.utils import filter_repo_objects

    listing = [
        "LICENSE.md",
        "sd3.5_medium.safetensors",
        "sd3_medium_incl_clips.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoders/clip_l.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/vocab.json",
    ]
    fetched = []

    def snapshot(repo, allow_patterns, ignore_patterns):
        names = list(
            filter_repo_objects(listing, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        fetched.extend(names)
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {"first_stage_model.x": torch.ones(1), "model.diffusion_model.x": torch.ones(1)},
                tmp_path / name,
            )
        return str(tmp_path)

    monkeypatch.setattr("vae_expand.snapshot_download", snapshot)
    assert [p.name for p in find_weights("a/b", "vae")] == ["sd3.5_medium.safetensors"]
    assert [p.name for p in find_weights("a/b", "t5")] == ["t5xxl_fp16.safetensors"]
    assert find_file("a/b", "tokenizer/vocab.json").name == "vocab.json"
    assert sorted(set(fetched)) == [
        "sd3.5_medium.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "tokenizer/vocab.json",
    ]

def test_folder_without_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError) as error:
        load_vae(tmp_path)
    text = one_line(error)
    assert (
        "first_stage_model." in text
        and "vae/diffusion_pytorch_model.safetensors" in text
        and "notes.txt" in text
    )

def test_two_files_with_the_same_part(tmp_path):
    for name in ("a", "b"):
        save_file(
            {"first_stage_model.encoder.conv_in.weight": torch.ones(1)}, tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(InputError) as error:
        load_vae(tmp_path)
    assert "a.safetensors, b.safetensors" in one_line(error)

def test_truncated_file(tmp_path):
    peer_vae("sd-vae").save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError) as error:
        load_vae(tmp_path)
    assert str(file) in one_line(error) and "not a whole safetensors file" in str(error.value)

def test_a_weights_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError) as error:
        load_davae(tmp_path / "typo.safetensors", load_vae(TINY_MODEL))
    assert "typo.safetensors: no such file" in one_line(error)

@pytest.mark.parametrize(
    "change, said",
    [
        ("missing", "missing decoder.conv_out.bias"),
        ("unknown", "unknown decoder.extra"),
        ("shape", "decoder.conv_out.bias is (7,), expected (3,)"),
    ],
)
def test_wrong_key_is_named(change, said, tmp_path):
    peer_vae("sd-vae").save_pretrained(tmp_path / "vae")
    state = load_vae(tmp_path).state_dict()
    if change == "missing":
        del state["decoder.conv_out.bias"]
    else:
        state["decoder.extra" if change == "unknown" else "decoder.conv_out.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError) as error:
        load_vae(tmp_path / "wrong.safetensors")
    assert said in one_line(error)

def test_sizes_and_numbers_that_make_no_network(tmp_path):
    """Widths that 32 groups do not divide were a traceback, and so was a matrix of one row; integers, which are
    quantised weights, were read as if they were the weights themselves."""
    state = VAE(VAEArch(widths=(32, 32))).state_dict()
    narrow = VAE(VAEArch(widths=(16, 32), groups=16)).state_dict()
    integers = {k: (100 * v).to(torch.int8) for k, v in state.items()}
    flat = state | {"decoder.conv_in.weight": torch.zeros(3)}
    for wrong, said in (narrow, "make no network"), (integers, "torch.int8"), (flat, "not an LDM autoencoder"):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(InputError) as error:
            load_vae(tmp_path / "wrong.safetensors")
        assert said in one_line(error)

@pytest.mark.parametrize("config, said", [
    ({"scaling_factor": 0.5, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, "latents_mean"), ([], "config.json")])
def test_a_normalisation_of_another_kind_is_refused(config, said, tmp_path):
    """A VAE with a mean and a deviation for each channel was read as if it had its scaling_factor alone."""
    peer_vae("sd-vae").save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config if config else config))
    with pytest.raises(InputError) as error:
        load_vae(tmp_path)
    assert said in one_line(error)

def test_another_models_file(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(3)}, tmp_path / "flux.safetensors")
    with pytest.raises(InputError) as error:
        load_vae(tmp_path / "flux.safetensors")
    assert "not an LDM autoencoder" in one_line(error) and "double_blocks" in str(error.value)

def test_pickle_with_code_never_runs(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(InputError) as error:
        load_vae(tmp_path / "evil.pt")
    assert "weights_only" in one_line(error) and not (tmp_path / "ran").exists()

def test_weights_are_copies_not_views_of_the_file(tmp_path):
    peer_vae("sd-vae").save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    before = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"].clone()
    vae.encoder.conv_in.weight.add_(1)
    assert torch.equal(read_weights(tmp_path, "vae")["encoder.conv_in.weight"], before)

def test_size_names_the_nearest():
    with pytest.raises(InputError, match="multiples of 16; the nearest is 992x1008"):
        check_size((1003, 1000), 16)

# ------------------------------------------------------------ images

def test_images_of_every_kind(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    image.save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), rgb)
    # EXIF 6: the camera was turned; upright is a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "b.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "b.png")), np.rot90(rgb, -1))
    # alpha over white
    rgba = np.dstack([rgb, np.full((12, 20), 0, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "c.png")
    assert (np.asarray(read_image(tmp_path / "c.png")) == 255).all()
    # grey, 16-bit grey, palette, CMYK
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "d.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "e.png")
    for name in "de":
        assert np.array_equal(np.asarray(read_image(tmp_path / f"{name}.png")), np.dstack([grey] * 3)), name
    image.quantize(16).save(tmp_path / "f.png")
    assert read_image(tmp_path / "f.png").mode == "RGB"
    image.convert("CMYK").save(tmp_path / "g.jpg", quality=95)
    assert np.abs(np.asarray(read_image(tmp_path / "g.jpg")).astype(int) - rgb).mean() < 40
    (tmp_path / "h.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with pytest.raises(InputError, match="h.png: not a readable image"):
        read_image(tmp_path / "h.png")

def test_tensor_and_png_round_trip(tmp_path):
    rgb = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    image = Image.fromarray(rgb.permute(1, 2, 0).numpy())
    assert torch.equal(to_tensor(to_image(to_tensor(image))), to_tensor(image))
    save_png(tmp_path / "x.png", to_tensor(image), prompt="einé Katze", seed=7)
    again = Image.open(tmp_path / "x.png")
    assert again.text == {"prompt": "einé Katze", "seed": "7"} and np.array_equal(
        np.asarray(again), np.asarray(image)
    )

def test_a_latent_of_one_position_has_colours():
    """A picture as small as the DA-VAE's factor: the covariance of one value was nan, and its axes a traceback."""
    for image in pca_images(torch.randn(16, 1, 1), torch.randn(16, 1, 1)):
        assert image.shape == (3, 1, 1) and image.isfinite().all()

def test_grid_keeps_the_order():
    images = [torch.full((3, 4, 4), i / 3 * 2 - 1) for i in range(4)]
    picture = np.asarray(grid(images, columns=2, least=4, gap=0))
    assert [picture[y, x, 0] for y in (1, 5) for x in (1, 5)] == [0, 85, 170, 255]

def test_downsample_is_antialiased():
    """A pattern at the Nyquist frequency must vanish, not alias; constants stay."""
    x = torch.ones(1, 3, 32, 32)
    x[..., ::2] = -1
    assert downsample(x, 2)[..., 4:-4, 4:-4].abs().max() < 0.05
    assert torch.allclose(
        downsample(torch.full((1, 3, 16, 16), 0.3), 4), torch.full((1, 3, 4, 4), 0.3), atol=1e-6
    )

@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("curves", [
    {}, {"a": []}, {"a": [(1, 1.0)]}, {"a": [(0, math.inf), (1, math.nan)]}, {"a": [(3, -1.0), (5, -4.0)]},
    {"a": [(0, 0.5), (800, 0.25)], "b": [(400, 1.0)]}])
def test_curves_are_drawn_whatever_they_hold(curves, log):
    """A point is drawn where there is one that can be; the frame and its numbers always."""
    image = np.asarray(plot_curves(curves, "step", log=log)).astype(int)
    inside = image[24:384, 60:690]                          # without the names above
    colourful = (inside.max(2) - inside.min(2) > 40).sum()
    drawable = any(math.isfinite(y) and (y > 0 or not log) for points in curves.values() for _, y in points)
    assert image.shape == (420, 700, 3) and (image.sum(2) < 300).any()
    assert (colourful > 15) == drawable

def test_ticks_are_round():
    assert round_ticks(0, 1.05) == [0, 0.5, 1] and round_ticks(0, 800) == [0, 200, 400, 600, 800]
    assert round_ticks(1.5, 6) == [2, 3, 4, 5, 6]

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_davae_knows_its_base_in_a_published_fp16_copy(tmp_path, dtype):
    """Trained over the float32 file, used over its fp16 copy in any dtype, and the other way round."""
    state = {k: v.clone() for k, v in load_vae(TINY_MODEL).state_dict().items()}
    state = {k: v + 1e-3 * torch.rand_like(v) for k, v in state.items()}        # digits that fp16 lacks
    save_file({f"first_stage_model.{k}": v for k, v in state.items()}, tmp_path / "full.safetensors")
    save_file({f"first_stage_model.{k}": v.half() for k, v in state.items()}, tmp_path / "half.safetensors")
    full, half = load_vae(tmp_path / "full.safetensors"), load_vae(tmp_path / "half.safetensors")
    assert weights_hash(full) != weights_hash(half)
    save_davae(tmp_path / "over-full.safetensors", DAVAE(full))
    save_davae(tmp_path / "over-half.safetensors", DAVAE(half))
    load_davae(tmp_path / "over-full.safetensors", load_vae(tmp_path / "half.safetensors", dtype))
    load_davae(tmp_path / "over-half.safetensors", full)
    other = load_vae(TINY_MODEL)
    with pytest.raises(InputError, match="made over VAE"):
        load_davae(tmp_path / "over-full.safetensors", other)
