"""Chapter 3: the transformer equals diffusers', the sampler its pipeline, the command keeps its word."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from conftest import ROOT, peer_mmdit, peer_vae, relative_error
from sample import (MMDiT, MMDiTArch, generate, load_mmdit, get_sigmas, timestep_embedding, shift_timesteps,
                    mmdit_from_diffusers, mmdit_pairs, mmdit_to_diffusers)
from vae_expand import DAVAE, VAE, InputError, list_images, load_vae

KINDS = ["medium", "large", "sd3"]
FULL = {  # the peers' own configurations of the released models, and their sizes
    "SD3.5 Medium": (MMDiTArch(), dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))),
    "SD3.5 Large": (MMDiTArch(depth=38, width=2432, table=192, dual=()), dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm",
        pos_embed_max_size=192)),
    "SD3 Medium": (MMDiTArch(table=192, qk_norm=False, dual=()), dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192))}

def save_original(mmdit, folder):
    """As the hub's single file: one prefix, and the VAE's keys beside."""
    folder.mkdir()
    state = {"model.diffusion_model." + k: v.contiguous() for k, v in mmdit.state_dict().items()}
    save_file(state | {"first_stage_model.x": torch.ones(1)}, folder / "sd3.5_mini.safetensors")

def inputs(height, width, B=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x, context, pooled = (torch.randn(s, generator=rng) for s in ((B, 16, height, width), (B, 20, 96), (B, 48)))
    return x, torch.rand(B, generator=rng), context, pooled

# ------------------------------------------------------------ the transformer

@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_mmdit_equals_diffusers(kind, layout, tmp_path):
    peer = peer_mmdit(kind)
    peer.save_pretrained(tmp_path / "hub" / "transformer")
    mmdit = load_mmdit(tmp_path / "hub")
    if layout == "original":
        save_original(mmdit, tmp_path / "one")
        mmdit = load_mmdit(tmp_path / "one")
    half = load_mmdit(tmp_path / "hub", torch.bfloat16)
    for height, width in ((16, 16), (16, 40), (32, 8)):  # square, wide, tall
        x, sigma, context, pooled = inputs(height, width)
        for skip in ((), (1, 2)):
            with torch.no_grad():
                expected = peer(x, context, pooled, 1000 * sigma, skip_layers=skip).sample
                assert relative_error(mmdit(x, sigma, context, pooled, skip), expected) < 1e-5
                assert relative_error(half(x, sigma, context, pooled, skip), expected) < 2e-2

def test_every_parameter_matters(tmp_path):
    """None may be left out of the forward: each changes the output when it changes."""
    peer_mmdit("medium", depth=2).save_pretrained(tmp_path / "transformer")
    mmdit = load_mmdit(tmp_path)
    args = inputs(8, 8)
    before = mmdit(*args)
    for name, p in mmdit.named_parameters():
        p.mul_(1.5)
        # a constant added to every key drops out of the softmax, so a key's bias alone need not be seen
        assert not torch.equal(mmdit(*args), before), name
        p.div_(1.5)

@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes(name):
    """On the meta device: the same keys, shapes and parameter count as diffusers' released configuration."""
    diffusers = pytest.importorskip("diffusers")
    arch, config = FULL[name]
    with torch.device("meta"):
        peer = diffusers.SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
            joint_attention_dim=4096, pooled_projection_dim=2048, **config)
        mmdit = MMDiT(arch)
        theirs = {k: tuple(v.shape) for k, v in mmdit_from_diffusers(peer.state_dict()).items()}
    assert {k: tuple(v.shape) for k, v in mmdit.state_dict().items()} == theirs
    assert MMDiTArch.from_state_dict(mmdit.state_dict()) == arch
    count = sum(p.numel() for p in mmdit.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round(count / 1e9, 2) == {"SD3.5 Medium": 2.24, "SD3.5 Large": 8.06, "SD3 Medium": 2.03}[name]

def test_positions_are_cropped_from_the_centre():
    mmdit = MMDiT(MMDiTArch(depth=1, width=64, table=6, context_dim=8, pooled_dim=8, dual=()))
    mmdit.pos_embed.copy_(torch.arange(36.0)[None, :, None].expand(1, 36, 64))
    assert mmdit.positions(2, 4)[0, :, 0].tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    with pytest.raises(InputError, match="7x2 tokens"):
        mmdit.positions(2, 7)

def test_timesteps_cannot_round():
    """bf16 keeps 8 bits: neighbouring timesteps would meet, so the sinusoids insist on float32."""
    sigma = torch.tensor([0.5, 0.501])
    assert (timestep_embedding(sigma)[0] - timestep_embedding(sigma)[1]).abs().max() > 0.1
    with pytest.raises(AssertionError, match="float32"):
        timestep_embedding(sigma.bfloat16())

def test_compiled_blocks_are_three_graphs(tmp_path):
    """Dual, plain, last: whatever the depth, and none more at the next call."""
    peer_mmdit("medium", depth=5).save_pretrained(tmp_path / "transformer")
    mmdit, args = load_mmdit(tmp_path), inputs(8, 8)
    expected = mmdit(*args)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in mmdit.joint_blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    assert relative_error(mmdit(*args), expected) < 1e-6
    mmdit(*args)
    assert len(graphs) == 3
    torch._dynamo.reset()

def test_wrong_files_are_named(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(3)}, tmp_path / "flux.safetensors")
    with pytest.raises(InputError, match="not an SD3 transformer.*: double_blocks"):
        load_mmdit(tmp_path / "flux.safetensors")
    peer_mmdit("large").save_pretrained(tmp_path / "transformer")
    state = load_mmdit(tmp_path).state_dict()
    del state["joint_blocks.1.x_block.mlp.fc1.bias"]
    state["joint_blocks.0.x_block.attn.proj.bias"] = torch.ones(5)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError) as error:
        load_mmdit(tmp_path / "wrong.safetensors")
    assert "missing joint_blocks.1.x_block.mlp.fc1.bias" in str(error.value)
    assert "joint_blocks.0.x_block.attn.proj.bias is (5,), expected (128,)" in str(error.value)

def test_key_pairs_cover_both_sides_once():
    pairs = mmdit_pairs(3)
    theirs = [name for names in pairs.values() for name in names]
    assert len(theirs) == len(set(theirs))

@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_names_and_back(kind):
    """Both ways, bit for bit: the export of what was read is the peer's own state dict."""
    theirs = peer_mmdit(kind).state_dict()
    ours = mmdit_from_diffusers(theirs)
    depth = MMDiTArch.from_state_dict(ours).depth
    exported = mmdit_to_diffusers(ours, depth)
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[name], theirs[name]) for name in theirs)
    assert all(tensor.is_contiguous() for tensor in exported.values())

# ------------------------------------------------------------ the flow

def test_schedule_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for steps, shift in ((28, 3.0), (6, 3.0), (50, 1.0), (1, 2.0)):
        peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(steps)
        assert torch.allclose(get_sigmas(steps, shift), peer.sigmas, atol=1e-6)

def test_warp_by_hand():
    assert shift_timesteps(0.5, 3.0) == 0.75 and shift_timesteps(0.0, 3.0) == 0 and shift_timesteps(1.0, 3.0) == 1 and shift_timesteps(0.3, 1.0) == 0.3

def test_euler_is_exact_on_a_straight_path(tmp_path):
    """With the true velocity noise - z of a single datum z, any number of steps ends at z."""
    z = torch.randn(1, 16, 4, 4)

    class Straight(torch.nn.Module):
        arch = MMDiTArch()
        context_embedder = torch.nn.Linear(1, 1)

        def forward(self, x, sigma, context, pooled):
            return (x - z) / sigma[:, None, None, None]

    peer_vae("sd3.5").save_pretrained(tmp_path / "vae")
    text = (torch.zeros(1, 1, 1), torch.zeros(1, 1))
    for steps in (1, 7):
        out = generate(Straight(), load_vae(tmp_path), text, ["x"], 32, 32, steps, cfg=1, return_latents=True)
        assert (out - z).abs().max() < 1e-5

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our networks and diffusers' pipeline of the same random weights."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("hub")
    vae, transformer = peer_vae("sd3.5"), peer_mmdit("medium")
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *[None] * 6)
    pipeline.set_progress_bar_config(disable=True)
    return load_mmdit(folder), load_vae(folder), pipeline

@pytest.mark.parametrize("slg", [0.0, 2.5])
def test_generate_equals_the_pipeline(pair, slg):
    mmdit, vae, pipeline = pair
    noise = torch.randn(2, 16, 8, 12)
    _, _, context, pooled = inputs(8, 12)
    _, _, no_context, no_pooled = inputs(8, 12, seed=2)
    steps = 20 if slg else 6            # of 20, three are in skip-layer guidance's window (1% to 20%)
    more = dict(skip_guidance_layers=[1, 2], skip_layer_guidance_scale=slg) if slg else {}
    expected = pipeline(
        prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_context,
        negative_pooled_prompt_embeds=no_pooled, latents=noise, height=64, width=96, num_inference_steps=steps,
        guidance_scale=4.5, output_type="pt", **more).images
    given = (context, pooled, no_context, no_pooled), ["a", "b"], 64, 96, steps, 4.5, 3.0
    ours = generate(mmdit, vae, *given, noise=noise, slg=slg, slg_layers=(1, 2))
    assert relative_error((ours.clamp(-1, 1) + 1) / 2, expected) < 1e-3
    if slg:
        assert relative_error(generate(mmdit, vae, *given, noise=noise), ours) > 1e-3

def test_an_image_depends_on_its_own_seed_alone(pair):
    mmdit, vae, _ = pair
    _, _, context, pooled = inputs(8, 8, B=3)
    call = dict(height=64, width=64, steps=4, cfg=1)
    three = generate(mmdit, vae, (context, pooled), ["a"] * 3, seeds=[5, 6, 7], **call)
    alone = generate(mmdit, vae, (context[1:2], pooled[1:2]), ["a"], seeds=[6], **call)
    assert relative_error(alone, three[1:2]) < 1e-5
    other = generate(mmdit, vae, (context[1:2], pooled[1:2]), ["a"], seeds=[5], **call)
    assert relative_error(other, alone) > 1e-2

def test_guidance_at_or_below_one_is_the_conditional_prediction(pair):
    """As diffusers has it: no picture is drawn from the negative alone, and each prompt has its own."""
    mmdit, vae, pipeline = pair
    _, _, context, pooled = inputs(8, 8)
    _, _, *negative = inputs(8, 8, seed=2)
    noise = torch.randn(2, 16, 8, 8)
    plain = generate(mmdit, vae, (context, pooled), ["a", "b"], 64, 64, 3, cfg=1, noise=noise)
    for cfg in (0, 0.5, 1):
        for text in ((context, pooled), (context, pooled, *negative)):
            assert torch.equal(generate(mmdit, vae, text, ["a", "b"], 64, 64, 3, cfg=cfg, noise=noise), plain)
    expected = pipeline(
        prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative[0],
        negative_pooled_prompt_embeds=negative[1], latents=noise, height=64, width=64, num_inference_steps=3,
        guidance_scale=0.0, output_type="pt").images
    assert relative_error((plain.clamp(-1, 1) + 1) / 2, expected) < 1e-3

def test_checkpointed_blocks_change_nothing(tmp_path):
    """Output and gradients are equal to the last bit, compiled or not; each block runs again in backward."""
    peer_mmdit("medium", depth=3).save_pretrained(tmp_path / "transformer")
    args = inputs(8, 8)

    def run(checkpoint, backend=None):
        torch._dynamo.reset()
        mmdit = load_mmdit(tmp_path).requires_grad_(True)
        mmdit.checkpoint_blocks = checkpoint
        for block in mmdit.joint_blocks if backend else ():
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        calls = []
        mmdit.joint_blocks[0].x_block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
        out = mmdit(*args)
        out.square().mean().backward()
        return len(calls), [out, *(p.grad for p in mmdit.parameters() if p.grad is not None)]

    (once, plain), (twice, again) = run(False), run(True)
    assert (once, twice) == (1, 2) and len(plain) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    (_, plain), (_, again) = run(False, "aot_eager"), run(True, "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    torch._dynamo.reset()

def test_generate_refuses(pair):
    mmdit, vae, _ = pair
    _, _, context, pooled = inputs(8, 8, B=1)
    with pytest.raises(InputError, match="the nearest is 1008x992"):
        generate(mmdit, vae, (context, pooled), ["a"], 1000, 1003, cfg=1)
    with pytest.raises(InputError, match="with cfg the negative's"):
        generate(mmdit, vae, (context, pooled), ["a"], 64, 64, cfg=4.5)
    with pytest.raises(InputError, match="layers \\[7, 8, 9\\] of 4"):
        generate(mmdit, vae, (context, pooled), ["a"], 64, 64, cfg=1, slg=2.5)

# ------------------------------------------------------------ the command

def command(*args):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, args)], capture_output=True, text=True)

def test_command_draws(tmp_path):
    done = command("--out", tmp_path, "--steps", 4, "--n", 2, "--tile", 8, "a red circle", "ein blauer Kreis")
    assert done.returncode == 0, done.stderr
    images = [Image.open(tmp_path / f"{i:04d}.png") for i in range(4)]
    assert all(image.size == (64, 64) for image in images)
    assert [(image.text["prompt"], image.text["seed"]) for image in images] == [
        (prompt, seed) for prompt in ("a red circle", "ein blauer Kreis") for seed in "01"]
    assert (tmp_path / "grid.png").is_file() and "peak memory" in done.stdout

def test_a_second_run_into_a_folder_says_what_is_there(tmp_path, capsys, monkeypatch):
    """Pictures with the same settings stay; another run's are said, or refused where prompts are a file."""
    (tmp_path / "list.txt").write_text("a red circle\na blue square\na green star\n")
    run = ["--out", str(tmp_path / "out"), "--steps", "2", "--prompt-file", str(tmp_path / "list.txt"),
           "--batch", "2"]
    sample.main(sample.parse_args(run))
    files = sorted((tmp_path / "out").glob("0*.png"))
    whole = {file.name: file.read_bytes() for file in files}
    files[1].unlink()                                                           # as if stopped
    drawn = []
    real = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: drawn.append(a[3]) or real(*a, **k))
    sample.main(sample.parse_args(run))
    assert drawn == [["a red circle", "a blue square"]]                         # its batch, of two
    assert "2 of its pictures are there already" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in sorted((tmp_path / "out").glob("0*.png"))} == whole
    for changed in (["--seed", "1"], ["--cfg", "2"], ["--no-t5"], ["--max-t5", "4"]):
        with pytest.raises(InputError, match="holds 3 pictures of another run \\(0000.png"):
            sample.main(sample.parse_args(run + changed))
    sample.main(sample.parse_args(["--out", str(tmp_path / "out"), "--steps", "2", "--batch", "2", "a red circle", "a dog"]))
    said = capsys.readouterr().out
    assert "holds 2 pictures of another run (0001.png" in said and "replaced" in said
    files[0].write_bytes(b"half a picture")
    with pytest.raises(InputError, match="0000.png: not a whole PNG"):
        sample.main(sample.parse_args(run))

def test_settings_hold_all_that_a_picture_depends_on(tmp_path):
    """Two runs whose pictures differ have other settings; --slg-layers without --slg changes no picture."""
    dit = tmp_path / "dit.safetensors"

    def settings(*flags, weights=0.0, davae=0.0):
        for path, value in (dit, weights), (tmp_path / "davae.safetensors", davae):
            save_file({"x": torch.full((1,), value)}, path)
        args = sample.parse_args(["--dit", str(dit), "--davae", str(path), "--size", "64", *flags])
        args.max_t5 = args.max_t5 or 16
        found = {k: str(v) for k, v in sample.settings_of(args, args.dit, torch.float32).items()}
        return lambda other: all(other.get(k) == v for k, v in found.items()), found

    runs = [settings(), settings("--no-t5"), settings("--max-t5", "4"), settings(weights=1.0),
            settings(davae=1.0), settings("--model", "another/model"),
            settings("--slg", "2"), settings("--slg", "2", "--slg-layers", "1")]
    for i, (same, _) in enumerate(runs):
        assert [same(found) for _, found in runs] == [i == k for k in range(len(runs))]
    same, _ = runs[0]
    assert same(settings("--slg-layers", "1")[1])

def test_offload_changes_nothing_but_the_order(tmp_path):
    for name, more in (("a", []), ("b", ["--offload"])):
        done = command(
            "--out", tmp_path / name, "--steps", 3, "--batch", 1, "--size", "32x64", "x", "y", *more
        )
        assert done.returncode == 0, done.stderr
    for i in range(2):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{i:04d}.png")) for name in "ab")
        assert a.shape == (64, 32, 3) and np.array_equal(a, b)

def test_command_without_t5_says_so(tmp_path):
    done = command("--out", tmp_path, "--steps", 2, "--no-t5", "a red circle")
    assert done.returncode == 0 and "T5 is left out" in done.stdout, done.stderr

def test_real_weights_script_on_the_embedded_model(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/tools/real_weights.py", "--out", tmp_path / "x.png"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0 and "MMDiT" in done.stdout and Image.open(tmp_path / "x.png").size == (64, 64)
    ), done.stderr

@pytest.mark.parametrize(
    "args, said",
    [
        (["--model", "no/such/folder"], "no such file or folder"),
        (["--size", "1003"], "the nearest is 1000x1000"),
        (["--size", "12a"], "invalid size value: '12a'"),
        (["--steps", "0"], "at least 1"),
        (["--slg", "2.5"], "--slg-layers"),
        (["--device", "tpu"], "--device tpu: not usable"),
        (["--size", "640"], "in the table"),
        (["--negative", "grey", "--cfg", "1"], "--cfg 1 is none"),
        (["--compare"], "--dit and --davae go together"),
        (["--dit", "x.safetensors", "--davae", "no/where"], "no/where"),
    ],
)
def test_command_refuses_in_one_line(args, said, tmp_path):
    done = command(*args, "--out", tmp_path / "out", "a red circle")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list((tmp_path / "out").glob("*.png"))

def test_a_single_file_is_no_model_folder(refused, tmp_path):
    """It holds no tokenizers, and was called a CLIP of which 265 keys are missing."""
    said = refused(sample, "--model", ROOT / "assets/tiny/sd3.5_tiny.safetensors", "--size", "64", "--out", tmp_path, "x")
    assert "sd3.5_tiny.safetensors is a file; expected a folder or hub id" in said

def test_prompt_files(tmp_path):
    (tmp_path / "good.txt").write_text("a red circle\n\n  a blue star \n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Köln".encode("latin-1"))
    assert sample.read_prompts(tmp_path / "good.txt") == ["a red circle", "a blue star"]
    for name, said in (("empty", "no prompt"), ("latin", "UTF-8"), ("absent", "cannot be read")):
        done = command("--prompt-file", tmp_path / f"{name}.txt", "--out", tmp_path / "out")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1

def test_prompt_files_of_other_makes(tmp_path):
    """A byte-order mark is no part of a prompt, and only line feeds end one."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n \r\na blue\u2028star\non a\x0cgreen\x85ground\x1c.\n".encode())
    assert sample.read_prompts(path) == ["a red circle", "a blue\u2028star", "on a\x0cgreen\x85ground\x1c."]

def run_main(*args):
    sample.main(sample.parse_args([str(arg) for arg in args]))

def test_the_embedded_model_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, path in (("a", "assets/tiny"), ("b", "assets/../assets/tiny/")):
        run_main("--model", path, "--steps", 1, "--out", tmp_path / name, "a red circle")
        assert Image.open(tmp_path / name / "0000.png").size == (64, 64)

def test_a_cut_prompt_is_said_in_one_line(tmp_path, capsys):
    """What CLIP and T5 do not read is named, once a prompt; prompts that fit say nothing."""
    run_main("--steps", 1, "--n", 2, "--out", tmp_path, "a red circle " * 5 + "a blue star", "a red circle")
    said = [line for line in capsys.readouterr().err.splitlines() if "is cut" in line]
    assert len(said) == 1 and "CLIP reads 16 tokens" in said[0] and "T5 reads 16 tokens" in said[0]
    assert said[0].count("a blue star'") == 2

def test_pictures_in_windows(tmp_path, monkeypatch, capsys):
    """Embeddings are held for a window of pictures, not for all of the list; the pictures are the same."""
    held = []
    encode = sample.encode_prompts

    def count(args, prompts, *more):
        held.append(len(set(prompts)))
        return encode(args, prompts, *more)

    monkeypatch.setattr(sample, "encode_prompts", count)
    words = "a red circle", "a blue star", "a green square"
    long = "a red circle " * 9
    for name, window in (("whole", 256), ("parts", 4)):
        monkeypatch.setattr(sample, "WINDOW", window)
        run_main("--steps", 1, "--n", 2, "--batch", 2, "--negative", long, "--out", tmp_path / name, *words)
        assert capsys.readouterr().err.count("is cut") == 1
    assert held == [3, 2, 1]
    for i in range(6):
        whole, parts = (Image.open(tmp_path / name / f"{i:04d}.png") for name in ("whole", "parts"))
        assert np.array_equal(np.asarray(whole), np.asarray(parts)) and whole.text == parts.text
    whole, parts = (Image.open(tmp_path / name / "grid.png") for name in ("whole", "parts"))
    assert np.array_equal(np.asarray(whole), np.asarray(parts))

def test_a_transformer_of_other_channels_is_refused(refused, tmp_path):
    """The stock transformer as --dit: it knows no z_d."""
    said = refused(sample, "--dit", ROOT / "assets/tiny/sd3.5_tiny.safetensors", "--davae",
                   ROOT / "assets/tiny/davae.safetensors", "--out", tmp_path, "x")
    assert "draws 16 + 0 channels, the autoencoder reads 16 + 48" in said

def test_a_transformer_that_has_lost_its_header_is_said(tmp_path, capsys):
    """As a conversion to float16 by other means leaves it: it was sampled with the stock model's shift, as if that had
    been its training's."""
    stock = load_mmdit(sample.TINY_MODEL)
    stock.add_details(48)
    state = {k: v.contiguous() for k, v in sample.fuse_details(stock.state_dict()).items()}
    for header in {}, {"shift": "1", "max_t5": "16", "davae": ""}:
        save_file(state, tmp_path / "dit.safetensors", metadata=header)
        run_main("--dit", tmp_path / "dit.safetensors", "--davae", ROOT / "assets/tiny/davae.safetensors", "--steps", 1,
                 "--out", tmp_path / str(len(header)), "x")
        assert ("has lost what finetune_dit.py wrote" in capsys.readouterr().out) == (not header)

def test_offload_and_compare_hold_one_network_at_a_time(tmp_path, monkeypatch):
    """The VAE is on the CPU whenever a transformer is loaded: also before the second one."""
    from safetensors import safe_open
    davae = ROOT / "assets/tiny/davae.safetensors"
    with safe_open(davae, "pt") as file:
        D = int(file.metadata()["detail_channels"])
    stock = load_mmdit(sample.TINY_MODEL)
    stock.add_details(D)
    path = tmp_path / "dit.safetensors"
    save_file({k: v.contiguous() for k, v in sample.fuse_details(stock.state_dict()).items()}, path)

    events = []
    original_load, original_to = sample.load_mmdit, torch.nn.Module.to

    def load(*args, **more):
        events.append("transformer")
        return original_load(*args, **more)

    def to(self, *args, **more):
        if isinstance(self, (VAE, DAVAE)) and args:
            events.append("back" if events[-1:] == ["vae"] else "vae")
        return original_to(self, *args, **more)

    monkeypatch.setattr(sample, "load_mmdit", load)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    run_main("--dit", path, "--davae", davae, "--compare", "--offload", "--steps", 1, "--out", tmp_path / "out", "x")
    moves = events[events.index("transformer"):]
    assert moves == ["transformer", "vae", "back"] * 2, events

def test_out_of_memory_says_what_helps(monkeypatch, capsys):
    from vae_expand import run

    def greedy(args):
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as error:
        run(greedy, None)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "--offload" in said and "--tile" in said and said.count("\n") == 1

# ------------------------------------------------------------ thousands of prompts

MJHQ = {"a1": {"category": "animals", "prompt": "a cat"}, "b2": {"category": "people", "prompt": "a crowd"}}
GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
           {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a blue cow"}]

def prompt_files(folder):
    """One of each make -> {name: (file, flags, the names of its pictures)}"""
    (folder / "list.txt").write_text("a cat\na crowd\n")
    (folder / "meta_data.json").write_text(json.dumps(MJHQ))
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)))
    (folder / "table.csv").write_text('id,caption\n1,"a cat, grey"\n2,a crowd\n')
    (folder / "table.tsv").write_text('Prompt\tCategory\na cat, grey\tanimals\n"a\tcrowd"\tpeople\n')
    (folder / "lines.ndjson").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    (folder / "lines.jsonl").write_text('{"prompt": "a cat"}\n\n{"prompt": "a crowd\u2028below"}\n')
    (folder / "strings.json").write_text('[{"prompt": "a cat"}]')
    return {"txt": ("list.txt", [], ["0000", "0001"]),
            "mjhq": ("meta_data.json", [], ["animals/a1", "people/b2"]),
            "geneval": ("geneval.jsonl", ["--n", "2"],
                        [f"{i:05d}/samples/{k:04d}" for i in range(2) for k in range(2)]),
            "csv": ("table.csv", ["--column", "caption"], ["0000", "0001"]),
            "tsv": ("table.tsv", ["--column", "Prompt"], ["0000", "0001"]),
            "jsonl": ("lines.jsonl", [], ["0000", "0001"]), "ndjson": ("lines.ndjson", [], ["0000", "0001"]),
            "json": ("strings.json", [], ["0000"])}

def test_prompt_files_of_every_make(tmp_path):
    """Prompts, the names under which their scorers look for pictures, and a seed of its own for each picture.
    A .tsv, as PartiPrompts is, was read as lines: its header and all its other fields were drawn too."""
    for kind, (file, flags, names) in prompt_files(tmp_path).items():
        args = sample.parse_args(["--prompt-file", str(tmp_path / file), "--seed", "5", *flags])
        jobs, geneval = sample.list_jobs(args)
        assert [job.name for job in jobs] == names, kind
        assert [job.seed for job in jobs] == list(range(5, 5 + len(jobs)))
        assert (geneval is not None) == (kind == "geneval")
    assert sample.read_prompts(tmp_path / "table.csv", "caption") == ["a cat, grey", "a crowd"]
    assert sample.read_prompts(tmp_path / "table.tsv", "Prompt") == ["a cat, grey", "a\tcrowd"]

@pytest.mark.parametrize("name, content, said", [
    ("a.csv", "id,text\n1,a cat\n", "no text under 'prompt', but id, text; --column names another"),
    ("a.jsonl", '{"prompt": 5}', "entry 1: no text under 'prompt'"), ("a.jsonl", "{", "not a whole .jsonl"),
    ("a.json", "[]", "no prompt in it"), ("a.json", '["a cat"]', "entry 1"), ("a.json", '{"a": 1}', "not a whole"),
    ("a.jsonl", '{"prompt": "a cat \\ud83d"}', "entry 1: 'a cat \\ud83d' holds half a character at place 6"),
    ("a.csv", "prompt,id\na cat,1\n ,2\n", "entry 2: no text under 'prompt'"),       # it drew the empty prompt
    ("a.tsv", "a cat\tanimals\na dog\tanimals\n", "no text under 'prompt', but a cat, animals"),
    ("a.csv", "prompt,id,prompt\na cat,1,a dog\n", "its header has 'prompt' twice"),    # the first one was lost
    ("a.csv", "prompt\n", "no prompt in it"), ("a.json", "null", "not a whole .json"),
    ("a.csv", "prompt\na cat, sitting\n", "entry 1 has more fields than the header"),
    ("a.csv", "caption,id\na cat, sitting,1\n", "entry 1 has more fields than the header"),
    ("a.csv", 'prompt\n"a cat\na dog\n', "is every quote closed?"),
    ("a.csv", 'prompt\n"a cat\n' + "a dog\n" * 30000, "is every quote closed?")])
def test_prompt_files_that_are_not_understood(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as e:
        sample.read_records(tmp_path / name)
    assert said in str(e.value)

@pytest.mark.parametrize("names, said", [
    ([("", 5)], "fill in both"), ([("a", "")], "fill in both"), ([("a", None)], "fill in both"), ([("a", "../../up")], "no file's name"),
    ([("a", "..\\..\\up")], "no file's name"),
    ([("/tmp", 5)], "no file's name"), ([("a", 1), ("b", 1), ("a", "1")], "2 pictures would be called a/1.png")])
def test_names_that_would_overwrite_or_leave_the_folder_are_refused(names, said, tmp_path):
    entries = [{"category": category, "id": name, "prompt": "x"} for category, name in names]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=said):
        sample.list_jobs(sample.parse_args(["--prompt-file", str(tmp_path / "a.json")]))

@pytest.mark.parametrize("kind", ["txt", "mjhq", "geneval"])
def test_pictures_of_a_longer_list_are_not_left_among_a_shorter_ones(kind, tmp_path):
    """A scorer reads all that lies in the folder."""
    file, flags, names = prompt_files(tmp_path)[kind]
    args = sample.parse_args(["--prompt-file", str(tmp_path / file), "--out", str(tmp_path / "out"), *flags])
    jobs, _ = sample.list_jobs(args)
    settings = {"cfg": 1.0}
    for job in jobs:
        path = sample.picture_file(args, "stock", job)
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.save_png(path, Image.new("RGB", (8, 8)), prompt=job.prompt, seed=job.seed, **settings)
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "grid.png")
    assert sample.find_done(args, ["stock"], {"stock": settings}, jobs) == {"stock": set(range(len(jobs)))}
    with pytest.raises(InputError, match=f"holds 1 pictures of another run \\({names[-1]}.png"):
        sample.find_done(args, ["stock"], {"stock": settings}, jobs[:-1])

def test_many_pictures_of_a_prompt_are_no_wide_overview(tmp_path):
    """The overview shows 64 pictures, and is no wider than they are."""
    args = sample.parse_args(["--n", "1000", "--out", str(tmp_path), "x"])
    jobs, _ = sample.list_jobs(args)
    for job in jobs[:64]:
        sample.save_png(sample.picture_file(args, "stock", job), Image.new("RGB", (8, 8)))
    sample.draw_overview(args, ["stock"], jobs)
    assert Image.open(tmp_path / "grid.png").size == (64 * 196, 196)

@pytest.mark.parametrize("argv", [["a caf\udce9"], ["x", "--negative", "caf\udce9"]])
def test_a_command_line_in_another_encoding_is_refused(argv, refused, tmp_path):
    assert "holds half a character" in refused(sample, "--out", tmp_path, *argv)

def test_a_picture_that_is_not_finite_is_not_written(tmp_path, monkeypatch):
    """As a broken attention kernel gives: a PNG would be black, and count as done."""
    monkeypatch.setattr(sample, "attend", lambda *streams: [torch.full_like(q.flatten(2), torch.nan) for q, _, _ in streams])
    with pytest.raises(InputError, match="prompt 'a red circle', seed 0: the picture holds nan"):
        run_main("--steps", 1, "--out", tmp_path, "a red circle")
    assert not list(tmp_path.glob("*.png"))

def test_geneval_gets_the_folders_that_its_scorer_reads(tmp_path):
    file, flags, names = prompt_files(tmp_path)["geneval"]
    run_main("--prompt-file", tmp_path / file, "--steps", 1, "--out", tmp_path / "out", *flags)
    for name in names:
        assert Image.open(tmp_path / "out" / f"{name}.png").text["prompt"] == GENEVAL[int(name[:5])]["prompt"]
    assert [json.loads((tmp_path / "out" / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(2)] == GENEVAL
    assert len(list_images(tmp_path / "out").items) == 4            # our own scores refused a folder with these files

def test_ranks_share_the_pictures_and_make_the_same_files(tmp_path):
    """One rank, two ranks, two ranks of which one is killed amid the work: the same bytes."""
    (tmp_path / "list.txt").write_text("".join(f"picture {i} of a circle\n" for i in range(11)))
    flags = ["--prompt-file", tmp_path / "list.txt", "--steps", 2, "--batch", 2, "--per-prompt", 1, "--out"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = {name: [*map(str, [ROOT / "sample.py", *flags, tmp_path / name])] for name in ("one", "two", "killed")}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *runs["one"]], check=True, env=env, capture_output=True)
    done = subprocess.run([*command, *runs["two"]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen([*command, *runs["killed"]], env=env, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list((tmp_path / "killed").glob("0*.png"))) < 3 and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "killed").glob("0*.png"))) < 12
    subprocess.run([*command, *runs["killed"]], check=True, env=env, capture_output=True)
    whole = {path.name: path.read_bytes() for path in sorted((tmp_path / "one").glob("0*.png"))}
    assert len(whole) == 11
    for name in ("two", "killed"):
        assert {path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("0*.png"))} == whole

def test_an_adapter_needs_the_room_of_the_whole_transformer(tmp_path, monkeypatch):
    """Its own file is small; and float32 needs twice a file of 16-bit numbers."""
    adapter = tmp_path / "adapter.safetensors"
    save_file({"x": torch.zeros(1)}, adapter, metadata={"adapter_over": "x"})
    base = tmp_path / "base.safetensors"
    with open(base, "wb") as file:
        file.truncate(5 * 10**9)                                # sparse: it takes no room on the disk
    args = sample.parse_args(["--model", str(base), "--dit", str(adapter), "--davae", "x", "x"])
    free = {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", free.__getitem__)
    for dtype, needed in ((torch.bfloat16, 9e9), (torch.float32, 14e9)):
        for free["SC_AVPHYS_PAGES"], fits in ((needed - 1, False), (needed + 1, True)):
            assert sample.all_fit(args, {"DA-VAE": (adapter, None)}, dict(dtype=dtype, device="cpu")) == fits

def test_memory_does_not_grow_with_the_list(tmp_path, monkeypatch):
    """A window's embeddings, and no picture, are held at once; the encoders are loaded once where all fits."""
    loads, alive = [], []
    real = sample.load_text_encoders
    monkeypatch.setattr(sample, "load_text_encoders", lambda *a, **k: loads.append(1) or real(*a, **k))
    monkeypatch.setattr(sample, "WINDOW", 8)
    encode = sample.encode_prompts

    def counted(*a):
        found = encode(*a)
        alive.append(sum(context.nbytes + pooled.nbytes for context, pooled in found[0]))
        return found

    monkeypatch.setattr(sample, "encode_prompts", counted)
    (tmp_path / "list.txt").write_text("".join(f"a circle {i}\n" for i in range(24)))
    for name, fits, expected in (("kept", True, 1), ("freed", False, 3)):
        monkeypatch.setattr(sample, "all_fit", lambda *_: fits)
        run_main("--prompt-file", tmp_path / "list.txt", "--steps", 1, "--out", tmp_path / name)
        assert len(loads) == expected and len(set(alive)) == 1 and len(alive) == 3
        loads.clear()
        alive.clear()
    kept, freed = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("0*.png")} for name in ("kept", "freed"))
    assert kept == freed

