"""Runs under attack: planted NaNs, changed arguments, two runs in one folder, lost ranks, full disks, long runs.

    pytest tests/test_runs.py                   # a share of each
    pytest tests/test_runs.py -m slow           # 10,000 steps, 60 random configurations
"""
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import align
import finetune_dit
import imagenet_eval
import sample
import vae_expand
from align import load_checkpoint, save_checkpoint
from assets.world import World
from conftest import ROOT
from vae_expand import TINY_MODEL, InputError, load_vae

resource = pytest.importorskip("resource")          # which Windows lacks, as it lacks SIGKILL and /proc
SCRIPTS = {module.__name__: module for module in (vae_expand, align, sample, finetune_dit, imagenet_eval)}
ALIGN = "align.py --every 1 --batch 2 --held 4"
TUNE = "finetune_dit.py --every 1 --batch 4 --images 8 --preview 0"

def start(line, **more):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, line.split())], cwd=ROOT, env=env, text=True,
                            start_new_session=True, **pipes | more)

def finish(line, **more):
    process = start(line, **more)
    out, errors = process.communicate(timeout=600)
    return process.returncode, out, errors

# ------------------------------------------------------------ arguments

@pytest.mark.parametrize("script, line, said", [
    ("vae_expand", "--davae x --scale 4", "--scale"), ("vae_expand", "--davae x --start residual", "--start"),
    ("finetune_dit", "--full --rank 8", "--rank"), ("sample", "--no-t5 --max-t5 8", "--max-t5"),
    ("sample", "--prompt-file p.txt prompt", "prompt"),
    ("sample", "--compare", "--dit"), ("sample", "--dit x", "--davae"), ("sample", "--device meta", "not usable here"),
    ("vae_expand", f"--davae {TINY_MODEL}", "a folder; expected a .safetensors file"),
    ("align", "--batch 3 --accumulate 2", "--accumulate"), ("align", "--dtype fp16", "float16 overflows"),
    ("finetune_dit", "--dtype fp16", "float16 overflows"), ("imagenet_eval", "train --dtype fp16", "overflows")])
def test_contradictions_are_refused(script, line, said, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(SCRIPTS[script], *line.split())
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("line", [
    "vae_expand --image", "align --data", "sample --prompt-file", "finetune_dit --data", "imagenet_eval encode --davae",
    "imagenet_eval fid world --ref"])
def test_a_flag_with_nothing_in_it_is_refused(line, refused, tmp_path, monkeypatch):
    """--data "$DATA", where DATA is not set, trained on the embedded world instead, as without the flag."""
    monkeypatch.chdir(tmp_path)
    script, *argv = line.split()
    assert f"{argv[-1]} is empty" in refused(SCRIPTS[script], *argv, "")
    assert sample.parse_args(["--negative", ""]).negative == ""

@pytest.mark.parametrize("line", ["sample --out=~/samples", "align --data=~", "imagenet_eval fid world --ref=~/a.npz"])
def test_a_home_folder_that_no_shell_has_put_in_is_refused(line, refused, tmp_path, monkeypatch):
    """A shell leaves the ~ of --out=~/samples as it is: the pictures went into a new folder of this name."""
    monkeypatch.chdir(tmp_path)
    script, *argv = line.split()
    assert "the place of ~" in refused(SCRIPTS[script], *argv)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("line", ["vae_expand --out", "align --out", "sample --out", "finetune_dit --cache",
                                  "imagenet_eval recon --out"])
def test_a_file_in_the_place_of_a_folder_is_refused(line, refused, tmp_path):
    """It said [Errno 17] File exists, after the loads, and not what to do."""
    (tmp_path / "notes").write_text("mine")
    script, *argv = line.split()
    assert "notes is a file, expected a folder" in refused(SCRIPTS[script], *argv, str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "mine"

@pytest.mark.parametrize("script, flags", [
    ("vae_expand", "--model --davae --image"), ("align", "--model --data"), ("sample", "--model --prompt-file"),
    (f"finetune_dit --davae {TINY_MODEL}/davae.safetensors", "--model --data"), ("finetune_dit", "--davae"),
    ("imagenet_eval encode", "--vae --davae --data"), ("imagenet_eval train", "--latents"),
    (f"imagenet_eval sample --dit {TINY_MODEL}/lightningdit", "--vae --davae"), ("imagenet_eval sample", "--dit"),
    ("imagenet_eval recon --features world", "--vae --davae --data"), ("imagenet_eval fid world --features world", "--ref")])
def test_paths_that_lead_nowhere_are_refused_by_name(script, flags, refused, tmp_path, monkeypatch):
    """And a folder that is a file; neither leaves more than an empty run folder behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    script, *command = script.split()
    for flag in flags.split():
        assert "no/where" in refused(SCRIPTS[script], *command, flag, "no/where")
    latents = ["--latents", TINY_MODEL] if "train" in command else []
    assert "file" in refused(SCRIPTS[script], *command, *latents, "--out", "file/out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("file", ".lock")]

@pytest.mark.parametrize("script, line, free", [
    ("align", "", "steps device every out"),
    ("finetune_dit", "", "steps device every preview out cache held cfg export_diffusers sample_steps"),
    ("imagenet_eval", "train", "device out ref weights seeds lambdas")])
def test_a_changed_argument_is_refused_by_name(script, line, free, tmp_path):
    args = SCRIPTS[script].parse_args([*line.split(), "--out", str(tmp_path)])
    save_checkpoint(tmp_path, args, step=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert load_checkpoint(tmp_path, args, set(free.split()))["step"] == 1
    for name in vars(args).keys() - set(free.split()):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} .*, now changed"):
            load_checkpoint(tmp_path, Namespace(**vars(args) | {name: "changed"}), set(free.split()))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before

def test_a_run_does_not_go_on_with_another_davae_under_the_same_name(tmp_path):
    """Stage 2 over a DA-VAE that was trained anew, train over latents that were encoded anew: other z_d, another run."""
    def make(seed):
        torch.manual_seed(seed)
        vae_expand.save_davae(tmp_path / "davae.safetensors", vae_expand.DAVAE(load_vae(TINY_MODEL), 48))

    def tune(steps, cache):
        flags = f"--davae {tmp_path / 'davae.safetensors'} --images 4 --batch 2 --preview 0 --steps {steps}"
        flags += f" --cache {tmp_path / cache} --out {tmp_path / 'tune'}"
        finetune_dit.main(finetune_dit.parse_args(flags.split()))

    def evaluate(line):
        imagenet_eval.main(imagenet_eval.parse_args([word.replace("TMP", str(tmp_path)) for word in line.split()]))

    encode = "encode --davae TMP/davae.safetensors --count 8 --batch 4 --out TMP/latents"
    train = "train --latents TMP/latents --batch 4 --n-warm 5 --out TMP/train --epochs"
    make(0)
    tune(1, "cache")
    evaluate(encode)
    evaluate(f"{train} 1")
    make(1)
    with pytest.raises(InputError, match="contents of --davae"):
        tune(2, "another-cache")                                    # as the refusal of the first cache advises
    for path in (tmp_path / "latents").iterdir():
        path.unlink()
    evaluate(encode)
    with pytest.raises(InputError, match="contents of --latents"):
        evaluate(f"{train} 2")

def test_nodes_that_do_not_share_the_run_folder_are_refused(tmp_path, monkeypatch):
    """Rank 0 once went on from its checkpoint, with the batches of another node's first steps."""
    args = align.parse_args(["--out", str(tmp_path)])
    save_checkpoint(tmp_path, args, step=1)
    monkeypatch.setattr(align, "gather_objects", lambda value: [value, value, not value])
    with pytest.raises(InputError, match="2 of 3 ranks find it; all nodes must share --out"):
        load_checkpoint(tmp_path, args, set())

def sweep(seed, tmp_path, capsys):
    """A random configuration: it works, with outputs of the right size, or is refused in one line."""
    rng, out = random.Random(seed), tmp_path / str(seed)
    pick = rng.choice
    line = pick([
        f"vae_expand --detail-channels {pick([8, 16, 32, 48])} --scale {pick([1, 2, 3, 4])}"
        f" --start {pick(['exact', 'residual'])}",
        f"align --steps {pick([1, 2, 3])} --batch {pick([1, 2, 3])} --size {pick([16, 24, 32, 40, 64])} --held 2"
        f" --detail-channels {pick([16, 24, 32])} --scale {pick([2, 3, 4])} --seed {pick([0, 7])} --accumulate"
        f" {pick([1, 2])}",
        f"sample --size {pick([8, 16, 30, 32])}x{pick([16, 40, 64, 4000])} --steps {pick([1, 3])} --n {pick([1, 2])}"
        f" --cfg {pick([0, 1, 4.5])} --batch {pick([1, 3])} --seed {pick([0, 5])} --tile {pick([0, 1, 5])}",
        f"finetune_dit --steps {pick([1, 2])} --batch {pick([1, 2])} --size {pick([32, 40, 64])} --images 4 --rank"
        f" {pick([1, 4, 999])} --preview 0 --accumulate {pick([1, 2])} --n-warm {pick([0, 1, 9])}",
        f"imagenet_eval sample --dit {TINY_MODEL}/lightningdit --count {pick([1, 3])} --batch {pick([1, 2])} --steps"
        f" {pick([1, 2, 4])} --cfg {pick([0, 1, 3])} --interval {pick([0, 0.5, 1])} --guided {pick([0, 3, 99])}"])
    script, *words = line.split()
    module = SCRIPTS[script]
    try:
        vae_expand.run(module.main, module.parse_args([*words, "--out", str(out)]))
    except SystemExit as stop:
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.code == 2 and len([text for text in said if "error" in text or "usage" in text]) <= 1, said
        assert said and not any("Traceback" in text for text in said), (line, said)
        return "refused"
    for path in out.rglob("*.safetensors"):
        assert all(torch.isfinite(v.float()).all() for v in load_file(path).values()), (line, path)
    assert list(out.rglob("*.png")) or list(out.rglob("*.safetensors")), line
    return "worked"

def test_eight_random_configurations(tmp_path, capsys):
    assert {sweep(seed, tmp_path, capsys) for seed in range(8)} == {"worked", "refused"}

@pytest.mark.slow
def test_sixty_random_configurations(tmp_path, capsys):
    outcomes = [sweep(seed, tmp_path, capsys) for seed in range(100, 160)]
    print(f"{outcomes.count('worked')} worked, {outcomes.count('refused')} were refused")
    assert outcomes.count("worked") >= 20 and outcomes.count("refused") >= 10, outcomes

# ------------------------------------------------------------ numbers

def tune(out, *more):
    finetune_dit.main(finetune_dit.parse_args([*TUNE.split()[1:], "--out", str(out), *map(str, more)]))

def test_a_nan_in_a_cached_latent_stops_the_step_that_meets_it(tmp_path):
    tune(tmp_path, "--steps", 10)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    [shard] = (tmp_path / "cache").glob("shard-*")
    held = load_file(shard)
    held["latents"][3, 20, 5, 5] = float("nan")
    save_file(held, shard)
    with pytest.raises(InputError, match=r"step 1[12]: loss nan.*: latents not finite; the last checkpoint"):
        tune(tmp_path, "--steps", 14)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before

@pytest.mark.parametrize("train", ["align", "finetune_dit"])
def test_a_run_that_is_further_than_asked_is_not_shown_as_a_shorter_one(train, tmp_path):
    flags = f"--out {tmp_path} --batch 4 --every 1 --steps"
    if train == "align":
        script, more, begin = align, "--held 2", lambda args: align.train(args, 0, 1, "cpu")
    else:
        script, more, begin = finetune_dit, f"--images 16 --held 2 --davae {TINY_MODEL}/davae.safetensors", finetune_dit.main
    begin(script.parse_args(f"{flags} 2 {more} --device cpu".split()))
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(InputError, match="has trained 2 steps, more than the 1 asked for"):
        begin(script.parse_args(f"{flags} 1 {more} --device cpu".split()))
    assert (tmp_path / "result.json").read_text() == before

def test_a_nan_in_the_weights_of_a_checkpoint_is_refused_by_name(tmp_path):
    def run(steps):
        align.main(align.parse_args([*ALIGN.split()[1:], "--out", str(tmp_path), "--steps", steps]))

    run("10")
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    last["weights"]["decoder.conv_out.weight"].data[0, 0, 0, 0] = float("inf")
    torch.save(last, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: decoder.conv_out.weight holds nan or inf"):
        run("12")

def test_a_nan_in_a_gradient_stops_the_step(tmp_path, monkeypatch):
    real = finetune_dit.warm_start

    def planted(*a, **k):
        dit = real(*a, **k)
        dit.O_prime.bias.register_hook(lambda grad: grad * float("nan"))
        return dit

    monkeypatch.setattr(finetune_dit, "warm_start", planted)
    with pytest.raises(InputError, match="step 1: .*the gradient of O_prime.bias not finite"):
        tune(tmp_path, "--steps", 2)

def test_a_nan_in_a_weights_file_is_refused_by_name(tmp_path):
    state = {k: v.clone() for k, v in load_vae(TINY_MODEL).state_dict().items()}
    state["decoder.norm_out.bias"][7] = float("nan")
    save_file({f"first_stage_model.{k}": v for k, v in state.items()}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="decoder.norm_out.bias holds nan or inf"):
        load_vae(tmp_path / "vae.safetensors")

# ------------------------------------------------------------ folders and disks

def until(found, seconds=60):
    limit = time.time() + seconds
    while not found():
        assert time.time() < limit, "it never came"
        time.sleep(0.05)

@pytest.mark.parametrize("line, file", [(f"{ALIGN} --steps 400", "log.jsonl"), (f"{TUNE} --steps 4000", "log.jsonl"),
                                        ("sample.py --n 4000 --steps 20 x", "0003.png")])
def test_a_second_run_in_the_same_folder_is_refused(line, file, tmp_path):
    """Two runs of sample.py replaced each other's pictures: the first ended with code 0 and the second's prompts."""
    first = start(f"{line} --out {tmp_path}")
    try:
        until(lambda: (tmp_path / file).is_file() and (tmp_path / file).stat().st_size > 200)
        code, _, errors = finish(f"{line} --out {tmp_path}")
        assert code == 2 and "another run is at work there" in errors and errors.count("\n") == 1, errors
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()

def test_two_runs_fill_one_cache(tmp_path):
    """The second waits for the first, and both end as one alone does."""
    line = "finetune_dit.py --steps 3 --every 1 --batch 8 --images 480 --preview 0"
    both = [start(f"{line} --cache {tmp_path}/cache --out {tmp_path}/{name}") for name in "ab"]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for it" in out for out, _ in said) == 1, said
    assert finish(f"{line} --out {tmp_path}/alone")[0] == 0
    for name in "shard-00000.safetensors", "shard-00001.safetensors", "empty.safetensors":
        one, two = load_file(tmp_path / "cache" / name), load_file(tmp_path / "alone" / "cache" / name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    dits = [load_file(tmp_path / name / "dit.safetensors") for name in ("a", "b", "alone")]
    assert all(torch.equal(dits[0][k], other[k]) for other in dits[1:] for k in other)

def test_a_picture_that_cannot_be_cached_is_named(tmp_path, capsys):
    x, _, _ = World().sample(range(120))
    (tmp_path / "data").mkdir()
    for i, image in enumerate(x):
        vae_expand.save_png(tmp_path / "data" / f"{i:04d}.png", image)
    (tmp_path / "data" / "0007.png").write_bytes(b"no picture")
    tune(tmp_path / "run", "--data", tmp_path / "data", "--no-captions", "--images", 117, "--steps", 1)
    assert "skipped: 0007.png" in capsys.readouterr().out

@pytest.mark.parametrize("line, file", [(ALIGN, "davae.safetensors"), (TUNE, "dit.safetensors")])
def test_a_disk_that_fills_keeps_the_last_checkpoint(line, file, tmp_path):
    """The kernel refuses to let a file grow: the run says so in one line; with room again it goes on."""
    assert finish(f"{line} --steps 10 --out {tmp_path}")[0] == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = 200_000
    assert len(before) > limit
    code, _, errors = finish(f"{line} --steps 20 --out {tmp_path}", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    said = errors.strip().splitlines()
    assert code == 2 and said[-1].startswith("error: ") and "Traceback" not in errors, errors
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert finish(f"{line} --steps 20 --out {tmp_path}")[0] == 0
    assert all(v.isfinite().all() for v in load_file(tmp_path / file).values())

# ------------------------------------------------------------ processes

def ranks(lines, port):
    """Rank r runs lines[r], without a launcher."""
    world = {"WORLD_SIZE": str(len(lines)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [start(line, env=world | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r, line in enumerate(lines)]

@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]

def test_ranks_see_different_parts_of_the_same_batches():
    class Positions:
        broken, notes = {}, set()

        def sample(self, span):
            return list(span)

    loaders = [align.StepBatches(Positions(), 4, rank, 3).loader(0, 5) for rank in range(3)]
    for n, parts in enumerate(zip(*loaders)):
        assert sum(parts, []) == list(range(12 * n, 12 * (n + 1)))

def test_ranks_that_disagree_are_refused(tmp_path, port):
    lines = [f"{ALIGN} --steps 2 --seed {seed} --out {tmp_path}" for seed in (0, 1)]
    for process in ranks(lines, port):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "the ranks' arguments differ" in errors, errors
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("launcher", ["torchrun", "none"])
def test_one_rank_is_killed_and_the_other_ends(launcher, tmp_path, port):
    """Within a minute, with a message; then two ranks go on from the checkpoint."""
    line = f"{ALIGN} --steps 4000 --out {tmp_path}"
    torchrun = f"-m torch.distributed.run --nproc_per_node 2 --master_port {port} "
    processes = [start(torchrun + line)] if launcher == "torchrun" else ranks([line, line], port)
    until(lambda: (tmp_path / "checkpoint.pt").is_file(), 120)
    if launcher == "torchrun":
        children = Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
    else:
        processes[1].kill()
    begun = time.time()
    _, errors = processes[0].communicate(timeout=60)
    assert time.time() - begun < 60 and processes[0].returncode != 0 and errors
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    code, out, errors = finish(f"{torchrun}{ALIGN} --steps {step + 2} --out {tmp_path}")
    assert code == 0 and f"resumed at step {step}" in out, errors

# ------------------------------------------------------------ long runs

def memory(steps, tmp_path):
    """The most memory held so far, and open files, in a run of the tiny loop: flat after a tenth of its steps,
    and 250. Not what is held at a moment: of what a checkpoint needs malloc may keep 30 MB for a while."""
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)         # a pipe that nobody reads fills
    line = f"finetune_dit.py --every {steps // 40} --batch 1 --images 8 --preview 0 --steps {steps}"
    process, seen = start(f"{line} --out {tmp_path}", **silent), []
    while process.poll() is None:
        try:
            held = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            lines = (tmp_path / "log.jsonl").read_text().splitlines()
            seen.append((json.loads(lines[-1])["step"] if lines else 0, held, files))
        except (FileNotFoundError, TypeError, ValueError):          # not begun, or ended
            pass
        time.sleep(0.1)
    assert process.returncode == 0
    warm = [row for row in seen if max(steps / 10, 250) <= row[0] < steps]
    early, late = warm[:len(warm) // 4], warm[-len(warm) // 4:]
    growth = late[-1][1] / early[-1][1] - 1
    print(f"{steps} steps: {early[-1][1] / 1024:.0f} MiB, growth {growth:.2%}, files"
          f" {max(f for *_, f in early)} to {max(f for *_, f in late)}")
    assert growth < 0.02 and statistics.median(f for *_, f in late) <= statistics.median(f for *_, f in early)

def test_500_steps_hold_no_more_memory_than_250(tmp_path):
    memory(500, tmp_path)

@pytest.mark.slow
def test_10000_steps_hold_no_more_memory_than_1000(tmp_path):
    memory(10_000, tmp_path)
