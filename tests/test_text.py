"""Chapter 3, the text half: ids, encoders and joint embedding equal transformers' and diffusers'."""
import functools
import json
import random
import shutil
import time
import unicodedata

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, peer_mmdit, randomise, relative_error
from sample import (CLUSTER_KIND, KIND, LOWER, CLIPTokenizer, T5Tokenizer, load_clip, load_t5,
                    load_text_encoders)
from vae_expand import InputError, read_weights

TINY_MODEL = ROOT / "assets" / "tiny"         # its tokenizers are small enough for miniatures
WORDS = ["a red circle with vertical stripes on a blue background", "", "X", "It's  THE\ncat's 3rd café!"]

# ------------------------------------------------------------ tokenizers

def block(*ends):
    return [chr(c) for first, end in zip(ends[::2], ends[1::2]) for c in range(first, end)]

@functools.cache
def prompts(n=2000, seed=0):
    """Text of every kind: plain sentences, then draws from one to three pools."""
    rng = random.Random(seed)
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    category = {c: unicodedata.category(c) for c in every}
    pools = [
        every,
        [c for c in every if category[c] not in ("Cn", "Co")],
        [c for c in every if category[c][0] == "M"],
        [c for c in every if category[c] in ("Cc", "Cf", "Zl", "Zp", "Zs")],
        [c for c in every if not unicodedata.is_normalized("NFKC", c)],         # ligatures, full width, ...
        block(0, 0x80), block(0xA0, 0x600), block(0x900, 0xE00),                # ASCII, European, Indic
        block(0x1100, 0x1200, 0xA960, 0xA980, 0xD7B0, 0xD7FC, 0xAC00, 0xAC40),  # Hangul
        block(0x1F1E6, 0x1F200, 0x1F300, 0x1F700) + ["\u200d", "\ufe0f", "\u20e3"] * 50,
        # where versions of Unicode differ; clusters of less than 6 bytes that start with a mapped character
        [c for c in every if KIND(c) != (category[c][0] if category[c][0] in "LN" else "O")
         or (CLUSTER_KIND(c) in "JP") != (category[c][0] == "M") or ord(c) in LOWER],
        ["\xa0", "ª", "½", "ﬁ", "A", "\n", "\u0600", "\u200d", "\u0300", "\u0301", "\u0903", "\U000e0020"],
        ["<|endoftext|>", "<|StartOfText|>", "<|startoftext|>", "<|EndOfText|>", "</s>", "<pad>", "<unk>",
         "<extra_id_3>", " <extra_id_33> ", "!", "!!", "'s", "'LL", "▁", " ▁", "  ", "\t", "\r\n", "\0",
         "ﬁne", "！", "＜／ｓ＞", "Ａ", "\x85", "e\u0301", "A\u0300", "👨\u200d👩\u200d👧", "🇩🇪", "क्षि", "ΑΣ", "İ"],
    ]
    words = [w for text in WORDS for w in text.split()] + ["x" * 300, "photograph,", "8k", "(best:1.2)", "--"]
    out = ["", " ", "   a   ", "\n", "!", "a" * 300, "x" * 5000, *WORDS]
    out.append("".join("\xa0" + c for c in every if category[c][0] == "M" and CLUSTER_KIND(c) != "J"))
    out += [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(n // 10)]
    while len(out) < n:
        drawn = rng.choices(pools, k=rng.choice([1, 1, 2, 3]))
        out.append("".join(rng.choice(rng.choice(drawn)) for _ in range(rng.choice([1, 2, 3, 5, 10, 30]))))
    return out

def assert_same_ids(ours, peer, texts):
    theirs = peer(texts).input_ids
    wrong = [ascii(t) for t, ids in zip(texts, theirs) if ours.encode(t) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {sorted(wrong, key=len)[:5]}"
    normalizer = peer.backend_tokenizer.normalizer
    if normalizer is not None:
        assert [ours.normalise(t) for t in texts] == [normalizer.normalize_str(t) for t in texts]
    padded = peer(texts, padding="max_length", truncation=True, max_length=ours.length).input_ids
    assert ours(texts).tolist() == padded

@pytest.mark.parametrize("folder, pad", [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_clip_ids(shared, folder, pad):
    peer = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(shared / "hub" / folder)
    ours = CLIPTokenizer(shared / "hub" / folder)
    assert (ours.bos, ours.eos, ours.pad) == (49406, 49407, pad)
    assert_same_ids(ours, peer, prompts())

def test_t5_ids(shared):
    folder = shared / "hub" / "tokenizer_3"
    peer = pytest.importorskip("transformers").T5TokenizerFast.from_pretrained(folder)
    ours = T5Tokenizer(folder, length=64)
    assert_same_ids(ours, peer, prompts())
    # the file as `tokenizers` itself reads it, but for the two corners that T5Tokenizer names
    file = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [t for t in prompts() if "▁" not in t and "\x85" not in t]
    assert [ours.encode(t) for t in texts] == [file.encode(t).ids for t in texts]

@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_tiny_ids(folder):
    """Small vocabularies: unknown pieces, no normaliser."""
    transformers = pytest.importorskip("transformers")
    ours, peer = ((T5Tokenizer, transformers.T5TokenizerFast) if folder == "tokenizer_3"
                  else (CLIPTokenizer, transformers.CLIPTokenizer))
    assert_same_ids(ours(TINY_MODEL / folder, 16), peer.from_pretrained(TINY_MODEL / folder), prompts()[::4])

def test_a_token_that_is_not_in_the_vocabulary(tmp_path):
    """As textual inversion adds one: its id stands in the configuration alone, and looking for it in vocab.json was a
    traceback. The ids are transformers', and where it is cut off it is named."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(TINY_MODEL / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    number = len(json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()))
    token = dict(content="<cat-toy>", lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {number: token}}))
    ours = CLIPTokenizer(tmp_path / "tokenizer", 16)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert number in ours.encode("a <cat-toy> circle")
    assert_same_ids(ours, peer, ["a <cat-toy> circle", "a<cat-toy>b", "A <CAT-TOY> red", "<cat-toy>"])
    assert ours.lost("x " * 14 + "<cat-toy> <cat-toy>") == "<cat-toy> <cat-toy>"

def merged_by_search(tokenizer, word):
    """Byte-pair merges as Sennrich et al. (2016) have them: search all pairs before each merge."""
    parts = [tokenizer.alphabet[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while True:
        ranks = [tokenizer.ranks.get(pair, float("inf")) for pair in zip(parts, parts[1:])]
        if min(ranks, default=float("inf")) == float("inf"):
            return [tokenizer.vocab.get(part, tokenizer.unk) for part in parts]
        i = ranks.index(min(ranks))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]

def test_long_words_take_near_linear_time(shared):
    """The same merges as a search of all pairs, and a word of 64,000 letters within seconds."""
    tokenizer, rng = CLIPTokenizer(shared / "hub" / "tokenizer"), random.Random(0)
    for length in (1, 2, 3, 7, 20, 100, 400):
        for letters in ("a", "ab", "aeinorst", "the lazy fox".replace(" ", ""), "aé漢👨"):
            word = "".join(rng.choices(letters, k=length))
            assert tokenizer.merge_pairs(word) == merged_by_search(tokenizer, word), word

    def seconds(length):
        word = "".join(rng.choices("aeinorst", k=length))
        start = time.process_time()
        tokenizer.merge_pairs(word)
        return time.process_time() - start

    assert seconds(64_000) < max(1.0, 32 * seconds(8_000))      # quadratic: 64 times, and minutes

def test_lost_text_is_named():
    clip, t5 = CLIPTokenizer(TINY_MODEL / "tokenizer", 8), T5Tokenizer(TINY_MODEL / "tokenizer_3", 8)
    for tokenizer in (clip, t5):
        assert tokenizer.lost("a red circle") == ""
        lost = tokenizer.lost("a red circle " * 3 + "on a blue background")
        assert lost.endswith("on a blue background") and len(tokenizer.encode("a red circle " * 3)) > 8

def test_truncation_keeps_the_end():
    ids = CLIPTokenizer(TINY_MODEL / "tokenizer", 8)(["a red circle " * 9, "a"])
    assert ids.shape == (2, 8) and ids[0, -1] == ids[1, 2] and (ids[1, 2:] == ids[0, -1]).all()

def test_other_tokenizer_is_refused(tmp_path):
    text = (TINY_MODEL / "tokenizer_3" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"Unigram"', '"WordPiece"'))
    with pytest.raises(InputError, match="WordPiece.*expected T5's Unigram"):
        T5Tokenizer(tmp_path)

# ------------------------------------------------------------ encoders

@pytest.fixture(scope="module")
def peers():
    """transformers' CLIP-L, CLIP-G and T5, small and random, with the tiny model's vocabularies."""
    transformers = pytest.importorskip("transformers")
    tokenizers = [CLIPTokenizer(TINY_MODEL / "tokenizer"), T5Tokenizer(TINY_MODEL / "tokenizer_3")]

    def clip(width, layers, act, seed):
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizers[0].vocab), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=width // 64, projection_dim=width,
            max_position_embeddings=16, hidden_act=act, eos_token_id=tokenizers[0].eos)
        return randomise(transformers.CLIPTextModelWithProjection(config), seed)

    config = transformers.T5Config(vocab_size=len(tokenizers[1].vocab), d_model=224, d_kv=24, num_heads=3,
                                   d_ff=160, num_layers=3, feed_forward_proj="gated-gelu")
    # T5's attention is not scaled: with greater weights it would magnify bf16's rounding, the peer's too
    return {"clip_l": clip(64, 3, "quick_gelu", 1), "clip_g": clip(128, 4, "gelu", 2),
            "t5": randomise(transformers.T5EncoderModel(config), 3, std=0.03)}

FILES = {"clip_l": ("clip_l", "text_encoder"), "clip_g": ("clip_g", "text_encoder_2"),
         "t5": ("t5xxl_fp16", "text_encoder_3")}

def save(peers, root, layout):
    """A hub folder of either layout; in diffusers', T5 comes in shards."""
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(TINY_MODEL / folder, root / folder)
    (root / "text_encoders").mkdir()
    for part, (name, folder) in FILES.items():
        if layout == "diffusers":
            peers[part].save_pretrained(root / folder, max_shard_size="300KB" if part == "t5" else "1GB")
        else:
            state = {k: v.clone() for k, v in peers[part].state_dict().items()}
            save_file(state, root / "text_encoders" / f"{name}.safetensors")
    return root

def edit(root, name, change):
    """Rewrite a file of the original layout: change(its tensors)."""
    path = root / "text_encoders" / f"{name}.safetensors"
    state = {k: v.clone() for k, v in load_file(path).items()}
    change(state)
    save_file(state, path)

@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_encoders_equal_transformers(peers, tmp_path, layout, dtype, tolerance):
    source = save(peers, tmp_path / "hub", layout)
    tokenizer = CLIPTokenizer(TINY_MODEL / "tokenizer", 16)
    ids = tokenizer(WORDS + ["a <|endoftext|> in the middle"])
    for part in ("clip_l", "clip_g"):
        theirs = peers[part](ids, output_hidden_states=True)
        states, pooled = load_clip(source, part, dtype)(ids, tokenizer.eos)
        assert states.dtype == pooled.dtype == dtype
        assert relative_error(states, theirs.hidden_states[-2]) <= tolerance
        assert relative_error(pooled, theirs.text_embeds) <= tolerance
    # 200 tokens: past the distance of 128 from which on all biases are the same
    ids = torch.arange(400).reshape(2, 200) ** 2 % peers["t5"].config.vocab_size
    ours = load_t5(source, dtype)(ids)
    assert ours.dtype == dtype and relative_error(ours, peers["t5"](ids).last_hidden_state) <= tolerance

@pytest.mark.parametrize("with_t5", [True, False])
def test_joint_embedding_equals_diffusers(peers, tmp_path, with_t5):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    width = peers["t5"].config.d_model
    source = save(peers, tmp_path / "hub", "original")
    transformer = peer_mmdit("medium", depth=1, context_dim=width)
    transformer.save_pretrained(source / "transformer")         # without T5, only its shapes tell the width
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=None, vae=None,
        text_encoder=peers["clip_l"], text_encoder_2=peers["clip_g"],
        text_encoder_3=peers["t5"] if with_t5 else None,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(TINY_MODEL / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(TINY_MODEL / "tokenizer_2"),
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(TINY_MODEL / "tokenizer_3"))
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            WORDS, None, None, device="cpu", max_sequence_length=12, do_classifier_free_guidance=False)
    text = load_text_encoders(source, max_t5=12, t5=with_t5)
    ours, ours_pooled = text(WORDS)
    assert ours.shape == (len(WORDS), 16 + 12, width) and ours_pooled.shape == (len(WORDS), 64 + 128)
    assert relative_error(ours, context) <= 1e-5 and relative_error(ours_pooled, pooled) <= 1e-5
    assert with_t5 or not ours[:, 16:].any()
    # a prompt's embedding does not depend on its batch
    assert relative_error(text(WORDS[:1])[0][0], ours[0]) <= 1e-5

def test_t5_length_is_the_shorter(peers, tmp_path):
    source = save(peers, tmp_path / "hub", "original")
    assert load_text_encoders(source)(["a"])[0].shape == (1, 16 + 16, 224)      # model_max_length is 16 there
    peer_mmdit("medium", depth=1, context_dim=100).save_pretrained(source / "transformer")
    with pytest.raises(InputError, match="192 wide together, the context 100"):
        load_text_encoders(source, t5=False)

def test_clip_file_of_the_original_layout(peers, tmp_path):
    """No text_projection: the identity. position_ids: dropped."""
    source = save(peers, tmp_path / "hub", "original")
    whole = load_clip(source, "clip_l")
    edit(source, "clip_l", lambda s: s.pop("text_projection.weight"))
    edit(source, "clip_l", lambda s: s.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}))
    ids = torch.tensor([[0, 5, 9, 9]])
    pooled = load_clip(source, "clip_l")(ids, 9)[1]
    assert torch.equal(whole.text_projection(pooled), whole(ids, 9)[1])
    edit(source, "clip_l", lambda s: s.pop("text_model.encoder.layers.1.mlp.fc2.bias"))
    with pytest.raises(InputError, match="missing text_model.encoder.layers.1.mlp.fc2.bias"):
        load_clip(source, "clip_l")

def test_t5_files(peers, tmp_path):
    source = save(peers, tmp_path / "hub", "original")
    ids = torch.arange(20)[None]
    expected = load_t5(source)(ids)
    assert "encoder.embed_tokens.weight" in read_weights(source, "t5")          # as in the real file
    edit(source, "t5xxl_fp16", lambda s: s["encoder.embed_tokens.weight"][3, 2].add_(1))
    with pytest.raises(InputError, match="encoder.embed_tokens.weight differs from shared.weight"):
        load_t5(source)
    edit(source, "t5xxl_fp16", lambda s: s.pop("encoder.embed_tokens.weight"))
    assert torch.equal(load_t5(source)(ids), expected)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    edit(source, "t5xxl_fp16", lambda s: s.pop(table))
    with pytest.raises(InputError, match=table):
        load_t5(source)

def test_t5_fp8(peers, tmp_path):
    """Plain fp8 is cast up: the same as the rounded weights. Scaled fp8 is refused by name."""
    source = save(peers, tmp_path / "hub", "original")
    fp16 = source / "text_encoders" / "t5xxl_fp16.safetensors"
    state = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(fp16).items()}
    edit(source, "t5xxl_fp16", lambda s: s.update({k: v.float() for k, v in state.items()}))
    ids = torch.arange(20)[None]
    rounded = load_t5(source)(ids)
    fp16.unlink()
    save_file(state, source / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors")
    assert torch.equal(load_t5(source)(ids), rounded)
    assert load_t5(source, torch.bfloat16).shared.weight.dtype == torch.bfloat16
    (source / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors").unlink()
    state["encoder.block.0.layer.0.SelfAttention.q.scale_weight"] = torch.ones(())
    save_file(state, source / "text_encoders" / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    with pytest.raises(InputError, match="scale_weight.*t5xxl_fp8_e4m3fn_scaled.safetensors.*use t5xxl_fp16"):
        load_t5(source)

def test_t5_refuses_float16():
    with pytest.raises(InputError, match="overflows in float16.*bfloat16 or float32"):
        load_text_encoders(TINY_MODEL, dtype=torch.float16)
