"""Speed that needs no clock: floating-point operations, graphs, kernels, and bytes kept for the backward pass."""
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import finetune_dit
from align import Stage1
from bench import LARGE, MEDIUM, build, closed_form
from conftest import peer_mmdit
from imagenet_eval import LightningDiT, LightningDiTArch
from sample import MMDiT, load_mmdit
from test_sample import inputs
from vae_expand import DAVAE, TINY_MODEL, VAE, VAEArch

@pytest.mark.parametrize("arch, text, table", [
    (MEDIUM, 333, {512: (2.443, 0.911), 1024: (11.250, 2.443), 2048: (89.384, 11.251)}),
    (MEDIUM, 154, {512: (2.138, 0.647), 1024: (10.783, 2.138), 2048: (88.268, 10.784)}),
    (LARGE, 333, {512: (7.978, 3.282), 1024: (31.121, 7.978), 2048: (193.466, 31.124)})])
def test_flops_are_the_closed_form(arch, text, table):
    """Stock and DA at three sizes; the full models, on the meta device."""
    for pixels, expected in table.items():
        for detail_channels, tera in zip((0, 16), expected):
            arch = replace(arch, detail_channels=detail_channels)
            side = pixels // 8 // (2 if detail_channels else 1)
            with torch.device("meta"):
                model = MMDiT(arch)
                given = (torch.empty(1, 16 + detail_channels, side, side), torch.empty(1),
                         torch.empty(1, text, 4096), torch.empty(1, 2048))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(*given)
            assert counter.get_total_flops() == closed_form(arch, side // 2, text)
            assert round(counter.get_total_flops() / 1e12, 3) == tera, (pixels, detail_channels)

def test_lightningdit_costs_what_its_paper_says():
    with torch.device("meta"):
        dit = LightningDiT(LightningDiTArch())
        x, t, y = torch.empty(1, 32, 16, 16), torch.empty(1), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        loss = dit(x, t, y).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    assert [round(f / 1e12, 3) for f in total] == [0.237, 0.712]

@pytest.fixture
def graphs(monkeypatch):
    """Counts what torch.compile captures, without paying for code generation."""
    torch._dynamo.reset()
    seen, compile_module = [], nn.Module.compile

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile",
                        lambda self, **options: compile_module(self, backend=backend, **options))
    yield seen
    torch._dynamo.reset()

def test_three_graphs_for_inference_whatever_the_depth(tmp_path, graphs):
    """Dual, plain and last block; the second call, and the second size but one, add nothing."""
    peer_mmdit("medium", depth=6).save_pretrained(tmp_path / "hub" / "transformer")
    model, given = load_mmdit(tmp_path / "hub"), inputs(8, 8)
    with torch.no_grad():
        plain = model(*given)
        compiled = model.compile_blocks()(*given)
        model(*given)
    assert len(graphs) == 3
    assert torch.allclose(compiled, plain, rtol=1e-4, atol=1e-5)

def test_no_new_graph_after_the_second_step_of_training(tmp_path, graphs):
    peer_mmdit("medium", depth=4).save_pretrained(tmp_path / "hub" / "transformer")
    model = load_mmdit(tmp_path / "hub").requires_grad_(True)
    model.compile_blocks()
    optimizer, counts = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(5):
        x, sigma, context, pooled = inputs(8, 8)
        model(x + step, sigma, context, pooled).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(graphs))
    assert counts[1:] == counts[1:2] * 4, counts

def test_checkpointing_and_compilation_go_together(graphs):
    """The recomputed forward is inside what is compiled, and gives the same gradients."""
    given, found = (torch.randn(2, 64, 8, 8), torch.rand(2)), []
    for flags in [], ["--checkpoint", "--compile"]:
        args = finetune_dit.parse_args(["--davae", f"{TINY_MODEL}/davae.safetensors", "--dtype", "fp32", *flags])
        model, _ = finetune_dit.build_model(args, 1, "cpu")
        a = model.arch
        context, pooled = torch.ones(2, 20, a.context_dim), torch.ones(2, a.pooled_dim)
        model(*given, context, pooled).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert graphs and len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found))

# ------------------------------------------------------------ the autoencoders
VAE_ARCH = VAEArch(widths=(16, 32), blocks=1, groups=4)

def autoencoder(make=lambda: VAE(VAE_ARCH)):
    return build(make, "cpu", torch.float32).to(memory_format=torch.channels_last)

def test_the_autoencoders_are_one_graph_each():
    """No break in encoding and decoding, nor in what align.py --compile compiles, which trains."""
    vae = autoencoder()
    davae = autoencoder(lambda: DAVAE(VAE(VAE_ARCH)))
    stage = Stage1(davae.requires_grad_(True))
    image = torch.rand(1, 3, 32, 32)
    z = torch.randn(1, 16, 16, 16)
    z_hr = torch.randn(1, 32, 8, 8)
    calls = [(vae.encode, image), (vae.decode, z), (davae.encode, image), (davae.decode, z_hr),
             (stage, image, z_hr[:, 16:], torch.ones(1))]
    for call, *given in calls:
        torch._dynamo.reset()
        found = torch._dynamo.explain(call)(*given)
        assert (found.graph_count, found.graph_break_count) == (1, 0), (call, found.break_reasons)
    torch._dynamo.reset()

class Operations(TorchDispatchMode):
    """Counts what is launched inside: torch's operators but views."""
    def __enter__(self):
        self.seen = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if not func.is_view and name != "_unsafe_view":
            self.seen[name] += 1
        return func(*args, **kwargs or {})

def test_group_norm_and_silu_are_one_kernel_when_compiled():
    """By the code that Inductor writes for a decoder's last level, which is not compiled any further."""
    level = autoencoder().decoder.up[0]
    x = torch.randn(1, 32, 16, 16).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad(), Operations() as eager:
        level(x)
    # get_code leaves nothing that can run: no cache may keep it, no compiler need be tried
    with torch.no_grad(), config.patch({"force_disable_caches": True, "cpp.vec_isa_ok": True}):
        codes = get_code(torch.compile(level, fullgraph=True, dynamic=False), x)
    torch._dynamo.reset()
    kernels = max((re.findall(r"^ +(cpp_fused_\w+)\(", code, re.M) for code in codes), key=len)
    silus = [name for name in kernels if "silu" in name]
    del eager.seen["convolution"]
    assert eager.seen == {"native_group_norm": 4, "silu": 4, "add": 2}
    assert len(silus) == 4 and all("native_group_norm" in name for name in silus)
    assert len(kernels) <= 5, kernels

# ------------------------------------------------------------ bytes
def saved_bytes(run, model):
    """Bytes of the tensors that autograd keeps, each storage once, parameters aside."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)               # held, so that no pointer returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())

@pytest.mark.parametrize("kind", ["sd3", "medium", "large"])
def test_backward_keeps_no_more_bytes_than_diffusers_keeps(kind, tmp_path):
    peer = peer_mmdit(kind).requires_grad_(True)
    peer.save_pretrained(tmp_path / "hub" / "transformer")
    model = load_mmdit(tmp_path / "hub").requires_grad_(True)
    x, sigma, context, pooled = inputs(32, 32)
    ours = saved_bytes(lambda: model(x, sigma, context, pooled), model)
    theirs = saved_bytes(lambda: peer(x, context, pooled, sigma * 1000), peer)
    assert 0 < ours <= theirs, f"{ours / 1e6:.1f} MB, diffusers {theirs / 1e6:.1f} MB"

def test_the_attention_kernel_is_the_one_asked_for():
    """By what the profiler saw; one that cannot serve a call leaves it to the next."""
    from vae_expand import ATTENTION, attention_order
    q = torch.randn(1, 2, 64, 64)
    seen = {}
    for name in ("auto", *ATTENTION):
        with attention_order(name), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        seen[name] = {event.key for event in profile.key_averages() if "attention" in event.key}
        assert out.shape == q.shape
    assert "aten::_scaled_dot_product_attention_math" in seen["math"]
    assert any("flash" in kernel for kernel in seen["flash"]) and not any("flash" in kernel for kernel in seen["math"])
    assert any("flash" in kernel for kernel in seen["cudnn"])                   # a CPU has no cuDNN

@pytest.mark.parametrize("autocast", [False, True])
def test_a_cpu_attends_to_few_tokens_in_float32_while_it_records_gradients(autocast):
    """torch's bf16 kernel is slow backward there; outputs and gradients are float32's, rounded once."""
    from vae_expand import attention
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 36, generator=rng).bfloat16().requires_grad_() for _ in range(3))
    exact = [u.detach().float().requires_grad_() for u in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v)
        with torch.no_grad():                                                   # where torch's is the faster one
            sampled = attention(q, k, v)
            plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16()) and torch.equal(sampled, plain)
    weight = torch.randn(out.shape, generator=rng).bfloat16()
    (out * weight).sum().backward()
    (expected * weight.float()).sum().backward()
    for ours, theirs in zip((q, k, v), exact):
        assert torch.equal(ours.grad, theirs.grad.bfloat16())
    many = torch.randn(1, 1, 257, 8, generator=rng).bfloat16().requires_grad_()
    assert torch.equal(attention(many, many, many),
                       torch.nn.functional.scaled_dot_product_attention(many, many, many))
