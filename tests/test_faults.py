"""Nothing lost, nothing silent: kills, damaged pictures and weights, nonsense arguments.

    pytest tests/test_faults.py                 # a share of each attack
    pytest tests/test_faults.py -m slow         # the full figures: 20 kills a loop, 200 mutations a kind
"""
import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import align
import finetune_dit
import imagenet_eval
import sample
import vae_expand
from align import ImageDataset
from assets.world import World
from conftest import ROOT
from vae_expand import TINY_MODEL, InputError, load_davae, load_vae, read_file, read_image, save_png

# ------------------------------------------------------------ kills

@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    imagenet_eval.main(imagenet_eval.parse_args(
        ["encode", "--davae", f"{TINY_MODEL}/davae.safetensors", "--count", "64", "--batch", "8", "--out", str(folder)]))
    return folder

LOOPS = {       # command line, and what it must leave
    "align": ("align.py --steps 12 --every 1 --batch 2 --held 4", "davae.safetensors"),
    "finetune": ("finetune_dit.py --steps 24 --every 1 --batch 4 --images 8 --preview 0", "dit.safetensors"),
    "cache": ("finetune_dit.py --steps 1 --batch 8 --images 480 --preview 0", "cache/shard-*.safetensors"),
    "encode": ("imagenet_eval.py encode --count 96 --batch 1", "shard-*.safetensors"),
    "sample": (f"imagenet_eval.py sample --dit {TINY_MODEL}/lightningdit --count 48 --batch 4 --steps 6",
               "shard-*.safetensors"),
    "train": ("imagenet_eval.py train --latents {latents} --batch 8 --epochs 6", "lightningdit.safetensors")}

def start(line, out):
    """The command in a process group of its own, so that a kill takes its workers too."""
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, *line.split(), "--out", str(out)], cwd=ROOT, env=env,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)

def finish(line, out):
    """Run it to its end -> seconds"""
    begun, process = time.time(), start(line, out)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    return time.time() - begun

def attack(name, out, latents, kills, how):
    line, left = LOOPS[name][0].format(latents=latents), LOOPS[name][1]
    seconds, rng = finish(line, out / "whole"), random.Random(name)
    for _ in range(kills):
        process = start(line, out / "killed")
        time.sleep(rng.uniform(0.3, 1) * seconds)
        os.killpg(process.pid, how)
        process.communicate(timeout=60)
    finish(line, out / "killed")
    files = sorted(path.relative_to(out / "whole") for path in (out / "whole").glob(left))
    assert files and files == sorted(path.relative_to(out / "killed") for path in (out / "killed").glob(left))
    for file in files:
        whole, killed = load_file(out / "whole" / file), load_file(out / "killed" / file)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[k], killed[k]) for k in whole), file

@pytest.mark.parametrize("name", LOOPS)
def test_killed_twice_it_ends_in_the_same_bits(name, tmp_path, latents):
    attack(name, tmp_path, latents, 2, signal.SIGKILL)

@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", LOOPS)
def test_killed_twenty_times_it_ends_in_the_same_bits(name, how, tmp_path, latents):
    attack(name, tmp_path, latents, 20 if how == signal.SIGKILL else 4, how)

def test_killed_while_a_checkpoint_is_written(tmp_path):
    """Two kills, each with checkpoint.part half-written; the same bits as without."""
    line, times = LOOPS["align"][0].replace("--steps 12", "--steps 30"), 0
    finish(line, tmp_path / "whole")
    while times < 2:
        part, last = (tmp_path / "killed" / f"checkpoint.{end}" for end in ("part", "pt"))
        part.unlink(missing_ok=True)                            # of the kill before
        process = start(line, tmp_path / "killed")
        before = last.stat().st_mtime_ns if last.is_file() else 0
        while process.poll() is None and not part.is_file():
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        times += part.is_file() and (last.stat().st_mtime_ns if last.is_file() else 0) == before
        if last.is_file():
            assert torch.load(last, weights_only=True)["step"] % 10 == 0
    finish(line, tmp_path / "killed")
    whole, killed = (load_file(tmp_path / name / "davae.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)

def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A write that fails half-way: the error is said, the file that was good stays."""
    align.atomic_write(tmp_path / "a.pt", lambda path: torch.save({"step": 1}, path))

    def fails(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        align.atomic_write(tmp_path / "a.pt", fails)
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"step": 1}

# ------------------------------------------------------------ pictures

def picture_bytes(kind, rng):
    """One picture of a kind, before it is damaged."""
    pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = {"cmyk": lambda: Image.fromarray(pixels).convert("CMYK"), "palette": lambda: Image.fromarray(
        pixels).convert("P"), "wide": lambda: Image.new("RGB", (10000, 1)), "grey16": lambda: Image.fromarray(
        rng.integers(0, 65536, (40, 56), dtype=np.uint16))}.get(kind, lambda: Image.fromarray(pixels))()
    data = io.BytesIO()
    image.save(data, {"cmyk": "JPEG", "jpeg": "JPEG"}.get(kind, "PNG"))
    return data.getvalue()

def mutate(data, rng):
    """Cut short, emptied, or with up to 20 bits flipped."""
    how = rng.integers(0, 3)
    if how == 0:
        return data[:rng.integers(0, len(data))]
    data = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        data[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
    return bytes(data) if how == 1 else b""

def damage(kind, times):
    rng, refused = np.random.default_rng(0), 0
    for _ in range(times):
        try:
            image = read_image(io.BytesIO(mutate(picture_bytes(kind, rng), rng)), "picture")
            assert image.mode == "RGB" and min(image.size) >= 1
        except InputError as e:
            refused += 1
            assert str(e).startswith("picture: not a readable image") and "\n" not in str(e)
    assert refused > times / 10

KINDS = ["png", "jpeg", "cmyk", "palette", "grey16", "wide"]

@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_is_read_or_refused(kind):
    damage(kind, 20)

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_200_damaged_pictures_of_a_kind_are_read_or_refused(kind):
    damage(kind, 200)

def folder_of(path, good, bad=0):
    x, _, _ = World().sample(range(2))
    path.mkdir()
    for i in range(good):
        save_png(path / f"{i:04d}.png", x[i % 2])
    for i in range(bad):
        (path / f"{i:04d}-bad.png").write_bytes(b"no picture")
    return path

def test_few_bad_files_are_named_and_more_than_a_hundredth_is_fatal(tmp_path):
    data = ImageDataset(folder_of(tmp_path / "few", 199, 1), 64, "all")
    images, _, _ = data.sample(range(200))
    assert images.shape == (200, 3, 64, 64) and list(data.broken) == ["0000-bad.png"]
    with pytest.raises(InputError, match="3 of 203 files cannot be read, above 1%"):
        ImageDataset(folder_of(tmp_path / "many", 200, 3), 64, "all").sample(range(203))
    with pytest.raises(InputError, match="1 of 3 files"):
        ImageDataset(folder_of(tmp_path / "all", 0, 3), 64, "all").sample(range(1))

def test_tars_are_read_in_place_whatever_their_names(tmp_path):
    """Absolute and .. names write nothing, ./ keeps its caption, a truncated tar is refused."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("/tmp/evil.png", file.getvalue()), ("../evil.png", file.getvalue()),
                           ("./good.png", file.getvalue()), ("./good.txt", b"a caption")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.parent.rglob("*"))
    _, captions, _ = ImageDataset(tmp_path / "a.tar", 64, "all", shuffle=False, flip=False).sample(range(3))
    assert "a caption" in captions
    assert sorted(tmp_path.parent.rglob("*")) == before
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(InputError, match="b.tar"):
        ImageDataset(tmp_path / "b.tar", 64, "all")

def test_loops_of_links_and_unreadable_captions(tmp_path):
    folder = folder_of(tmp_path / "data", 3)
    (folder / "loop").symlink_to(folder)
    (folder / "0000.txt").write_bytes(b"\xff\xfe\xff")
    data = ImageDataset(folder, 64, "all")
    assert len(data.items) == 3
    with pytest.raises(InputError, match="0000.png"):
        data.sample(range(3))

def test_what_only_looks_like_a_picture(tmp_path):
    """A pipe (which would hang), a folder, a text: the first two are no files, the third is bad, and so is a
    lost link, called like an overview."""
    folder = folder_of(tmp_path / "data", 198)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "x.jpg").write_text("words")
    (folder / "grid.png").symlink_to(folder / "nowhere.png")
    data = ImageDataset(folder, 64, "all")
    assert len(data.items) == 200
    data.sample(range(200))
    assert sorted(data.broken) == ["grid.png", "x.jpg"]
    (folder / "0000.png").rename(folder / "0000.jpg")                           # a PNG by its content
    assert ImageDataset(folder, 64, "all").sample(range(200))[0].shape == (200, 3, 64, 64)

def listed(path, rng):
    """Captions in a mutated metadata.jsonl."""
    lines = b"".join(json.dumps({"file_name": f"{i:04d}.png", "text": f"caption {i}"}).encode() + b"\n" for i in range(3))
    (path / "metadata.jsonl").write_bytes(mutate(lines, rng))

def beside(path, rng):
    """A mutated caption file."""
    (path / "0001.txt").write_bytes(mutate("a caption, \u00e9\u4e16".encode(), rng))

def tarred(path, rng):
    """The pictures as a mutated tar, alone in the folder."""
    source, out = path.parent / "source", io.BytesIO()
    if not source.exists():
        folder_of(source, 3)
    for picture in path.glob("*.png"):
        picture.unlink()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(3):
            tar.add(source / f"{i:04d}.png", f"{i:04d}.png")
    (path / "a.tar").write_bytes(mutate(out.getvalue(), rng))

def attack_data(tmp_path, put, times):
    """Read, with strings for captions, or refused in one line that names the file; nothing else is written."""
    folder, rng, refused = folder_of(tmp_path / "data", 3), np.random.default_rng(0), 0
    for _ in range(times):
        put(folder, rng)
        before = sorted(tmp_path.rglob("*"))
        try:
            images, captions, _ = ImageDataset(folder, 64, "all").sample(range(3))
            assert images.isfinite().all() and all(isinstance(caption, str) for caption in captions)
        except InputError as e:
            refused += 1
            assert str(folder) in str(e) or ".png" in str(e)
        assert sorted(tmp_path.rglob("*")) == before
    assert 0 < refused < times

@pytest.mark.parametrize("put", [listed, beside, tarred])
def test_damaged_captions_and_tars(put, tmp_path):
    attack_data(tmp_path, put, 20)

@pytest.mark.slow
@pytest.mark.parametrize("put", [listed, beside, tarred])
def test_200_damaged_captions_and_tars(put, tmp_path):
    attack_data(tmp_path, put, 200)

# ------------------------------------------------------------ weights

class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/davae-evil",)

def test_a_pickle_with_code_never_runs(tmp_path):
    torch.save({"encoder.conv_in.weight": Evil()}, tmp_path / "a.pt")
    with pytest.raises(InputError):
        load_vae(tmp_path / "a.pt")
    assert not os.path.exists("/tmp/davae-evil")

def test_what_a_checkpoint_holds_besides_tensors_is_named(tmp_path):
    """The arguments of a training, as DiT's checkpoints hold them: all that was said was the start of torch's advice."""
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="it also holds a argparse.Namespace; save the tensors alone"):
        read_file(tmp_path / "a.pt")

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_torch_files_are_refused_in_one_line(tmp_path):
    """Torch's two formats, cut and changed at random: the unpickler raises whatever it stumbles on."""
    torch.save({"a": torch.ones(3)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    rng = random.Random(0)
    for i in range(400):
        data = bytearray((tmp_path / ("new.pt" if i % 2 else "old.pt")).read_bytes())
        for _ in range(4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "bad.pt").write_bytes(data[:rng.randrange(len(data))] if i % 4 < 2 else data)
        try:
            read_file(tmp_path / "bad.pt")
        except InputError as e:
            assert "bad.pt" in str(e)

def test_files_of_another_content_are_refused(tmp_path):
    """An optimizer's dict, a list under state_dict, indices and configurations of nothing, vocabularies cut short."""
    for content in {0: torch.ones(1)}, {"state_dict": [1]}, {"state_dict": torch.ones(2)}:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match="no tensors by name"):
            load_vae(tmp_path / "a.pt")
    (tmp_path / "vae").mkdir()
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    for content, said in ("{}", "lists no files"), ('{"weight_map": null}', "lists no files"), ("[]", "not a whole JSON file"):
        index.write_text(content)
        with pytest.raises(InputError, match=said):
            load_vae(tmp_path)
    for file, load in (("vocab.json", sample.CLIPTokenizer), ("tokenizer.json", sample.T5Tokenizer)):
        (tmp_path / file).write_text('{"a": 1')
        with pytest.raises(InputError, match=f"{file}: not a whole JSON file"):
            load(tmp_path)

def test_other_models_and_damaged_headers_are_refused(tmp_path):
    torch.manual_seed(0)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}, tmp_path / "sdxl.safetensors")
    for file, key in ("flux", "double_blocks.0.img_attn.qkv.weight"), ("sdxl", "input_blocks.0.0.weight"):
        for load in sample.load_mmdit, load_vae, imagenet_eval.load_lightningdit:
            with pytest.raises(InputError, match=key):
                load(tmp_path / f"{file}.safetensors")
    with pytest.raises(InputError, match="not a DA-VAE"):
        load_davae(tmp_path / "flux.safetensors", load_vae(TINY_MODEL))
    good = (ROOT / "assets/tiny/davae.safetensors").read_bytes()
    rng = random.Random(0)
    for i in range(20):
        data = bytearray(good[:rng.randrange(len(good))] if i % 2 else good)
        for _ in range(20):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        (tmp_path / "bad.safetensors").write_bytes(data)
        with pytest.raises(InputError):
            load_davae(tmp_path / "bad.safetensors", load_vae(TINY_MODEL))

# ------------------------------------------------------------ arguments

SCRIPTS = {"vae_expand.py": vae_expand, "align.py": align, "sample.py": sample, "finetune_dit.py": finetune_dit}

def flags_of(module, *command):
    """Every flag of a script that takes a number, and every one with choices."""
    parsers = []
    original = argparse.ArgumentParser.parse_args

    def remember(self, *argv):
        parsers.append(self)
        return original(self, *argv)

    argparse.ArgumentParser.parse_args = remember
    try:
        module.parse_args(list(command))
    finally:
        argparse.ArgumentParser.parse_args = original
    actions = parsers[0]._actions
    if command:
        actions = next(a for a in actions if a.dest == "command").choices[command[0]]._actions
    flags = [a for a in actions if a.option_strings]
    assert not [a.option_strings for a in flags if a.type in (int, float)]         # they let nan and -3 through
    numbers = [a.option_strings[0] for a in flags if getattr(a.type, "__name__", "") in ("int", "float", "size")]
    return numbers, [a.option_strings[0] for a in actions if a.option_strings and a.choices]

@pytest.mark.parametrize("script, command", [(name, ()) for name in SCRIPTS] + [
    ("imagenet_eval.py", (name,)) for name in ("encode", "train", "sample", "recon", "ablate")] + [
    ("imagenet_eval.py", ("fid", "world"))])
def test_nonsense_numbers_are_refused_in_one_line(script, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = SCRIPTS.get(script, imagenet_eval)
    numbers, choices = flags_of(module, *command)
    assert numbers
    for flag in numbers + choices:
        for value in ("many", "nan", "-3") if flag in numbers else ("nonsense",):
            with pytest.raises(SystemExit) as stop:
                module.parse_args([*command, flag, value])
            errors = capsys.readouterr().err.strip().splitlines()
            assert stop.value.code == 2 and len(errors) == 1 and flag in errors[0], (flag, value, errors)
    assert not list(tmp_path.iterdir())
