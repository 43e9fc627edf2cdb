"""Random miniatures of the real networks, made by the peers (diffusers), under the real key names."""
import math
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"             # several at once: a core each, in processes they start too

import pytest                                                                                    # noqa: E402
import torch                                                                                     # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
os.environ["HF_HUB_OFFLINE"] = "1"      # no test may depend on a network

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with `pytest -m slow`")

def pytest_collection_modifyitems(config, items):
    if "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]

@pytest.fixture
def shared():
    """The folder with real tokenizer files and photographs; tests that want it skip without it."""
    if "DAVAE_TEST_DATA" not in os.environ:
        pytest.skip("DAVAE_TEST_DATA is not set")
    return Path(os.environ["DAVAE_TEST_DATA"])

@pytest.fixture
def refused(capsys):
    """refused(script's module, argument, ...): a command in this process, which must refuse -> its one line"""
    from vae_expand import run

    def refuse(module, *argv):
        with pytest.raises(SystemExit) as stop:
            run(module.main, module.parse_args([str(arg) for arg in argv]))
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len([text for text in said if "it/s" not in text]) == 1, (argv, said)
        return said[-1]
    return refuse

def randomise(model, seed=0, std=0.1):
    """Every parameter matters: the one-dimensional ones too."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if p.ndim == 1 and "norm" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=rng) * std + around)
    return model.eval()

def relative_error(ours, peers):
    return ((ours.double() - peers.double()).norm() / peers.double().norm()).item()

def trained_alike(one, other, mean, most):
    """Two lists of weights after the same few steps, summed in another order: the mean difference, and that of 999
    weights in 1000. Adam divides a gradient by its own size: where that is tiny, rounding shows up to the lr."""
    error = torch.cat([(a - b).abs().flatten() for a, b in zip(one, other, strict=True)]).double()
    found = error.mean().item(), error.kthvalue(math.ceil(0.999 * len(error))).values.item()
    assert found[0] < mean and found[1] < most, (found, error.max().item())

VAES = {    # kind: (widths, blocks, latent channels, quant convs, attention at the deepest level)
    "sd3.5": ((32, 64, 96, 96), 2, 16, False, False),
    "sd-vae": ((32, 64), 2, 4, True, False),
    "va-vae": ((32, 32, 64, 64, 128), 2, 32, True, True),
}

def peer_vae(kind):
    """diffusers' AutoencoderKL, small and random."""
    diffusers = pytest.importorskip("diffusers")
    widths, blocks, channels, quant, attention = VAES[kind]
    plain = len(widths) - attention
    scaling, shift = {"sd3.5": (1.5305, 0.0609), "sd-vae": (0.18215, None), "va-vae": (1.0, None)}[kind]
    return randomise(diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"] * attention,
        up_block_types=["AttnUpDecoderBlock2D"] * attention + ["UpDecoderBlock2D"] * plain,
        block_out_channels=widths, layers_per_block=blocks, latent_channels=channels, use_quant_conv=quant,
        use_post_quant_conv=quant, scaling_factor=scaling, shift_factor=shift), std=0.05)

def peer_mmdit(kind, depth=4, heads=2, in_channels=16, context_dim=96, pooled_dim=48, table=24):
    """diffusers' SD3Transformer2DModel, small and random: kind is "medium" (3.5), "large" (3.5) or "sd3"."""
    diffusers = pytest.importorskip("diffusers")
    norm = {} if kind == "sd3" else {"qk_norm": "rms_norm"}
    dual = {"dual_attention_layers": (0, 1)} if kind == "medium" else {}
    return randomise(diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=in_channels, out_channels=in_channels, num_layers=depth,
        attention_head_dim=64, num_attention_heads=heads, joint_attention_dim=context_dim,
        caption_projection_dim=64 * heads, pooled_projection_dim=pooled_dim, pos_embed_max_size=table, **norm,
        **dual), std=0.07)
