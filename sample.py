"""Chapter 3 - Stable Diffusion 3.5 itself, and sampling from it.

Two tokenizers, three text encoders, one transformer (MMDiT), and the flow that turns noise into a latent: all
between a prompt and a picture but the VAE, which is chapter 1's. Real weights load strictly, under their own
key names; the embedded model in assets/tiny is the same network with fewer channels.

    python sample.py                                                # a picture in seconds, offline, on a CPU
    python sample.py --model stabilityai/stable-diffusion-3.5-medium "a lighthouse in a storm" --compile

References: Esser et al. 2024 (SD3: rectified flow, MMDiT, timestep shift); Stability AI 2024 (SD3.5: qk-norm,
MMDiT-X, skip-layer guidance); Radford et al. 2021 (CLIP); Raffel et al. 2020 (T5); Ho 2022 (guidance).
"""
import base64, bisect, functools, gc, json, math, re, struct, time, unicodedata
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import trange

from vae_expand import (SD35_MEDIUM, TINY_MODEL, InputError, Parser, check_size, file_hash, find_file, grid,
                        load_davae, load_strict, load_vae, local_folder, peak_memory,
                        pick_device, pick_dtype, read_json, read_metadata, read_weights, run, save_png)

# ------------------------------------------------------------ tokenizers: equal ids, plain Python
# the peers' character classes, all of Unicode, so that ids do not depend on Python's version of it
_U = json.loads((Path(TINY_MODEL).parent / "unicode.json").read_text())

def _classes(lines):
    """Runs "first:kind" of all characters, in hexadecimal -> a function: character -> its kind"""
    starts, kinds = zip(*(run.split(":") for run in " ".join(lines).split()))
    starts = [int(start, 16) for start in starts]
    return functools.cache(lambda char: kinds[bisect.bisect(starts, ord(char)) - 1])

KIND = _classes(_U["kinds"])                # L(etter), N(umber), S(pace), O(ther), as CLIP's pattern has them
CLUSTER_KIND = _classes(_U["clusters"])     # J(oins the one before), P(repends), C(ontrol), R, N (line ends)
CLUSTER = re.compile("RN|[RNC]|P*[.J]J*|P+")
LOWER = {int(c.split(":")[0], 16): int(c.split(":")[1], 16) for line in _U["lower"] for c in line.split()}
SPACE = "".join(char for char in map(chr, range(0x3001)) if KIND(char) == "S")      # \s has four more
SPACES = re.compile(f"[{SPACE}]+")

class Tokenizer:
    """What both have: list of B str -> ids (B, length), padded; what is too long keeps its end token."""
    def __call__(self, texts):
        rows = [self.encode(text) for text in texts]
        rows = [row if len(row) <= self.length else row[:self.length - 1] + row[-1:] for row in rows]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows], dtype=torch.long)

class AddedTokens:
    """Cuts a text at literal tokens, given as in tokenizer.json's "added_tokens": leftmost, then longest."""
    def __init__(self, tokens):
        self.tokens = {token["content"]: token for token in tokens}
        words = sorted(map(re.escape, self.tokens), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(words) or '(?!)'})")

    def split(self, text):
        """str -> [(piece, its id, or None for plain text), ...]; some swallow the spaces beside them."""
        pieces = self.pattern.split(text)                   # plain, token, plain, ..., token, plain
        for i in range(1, len(pieces), 2):
            token = self.tokens[pieces[i]]
            pieces[i - 1] = pieces[i - 1].rstrip(SPACE if token.get("lstrip") else "")
            pieces[i + 1] = pieces[i + 1].lstrip(SPACE if token.get("rstrip") else "")
        return [(p, self.tokens[p]["id"] if i % 2 else None) for i, p in enumerate(pieces) if p]

class CLIPTokenizer(Tokenizer):
    """Byte-level BPE of CLIP (Radford et al. 2021), from vocab.json and merges.txt; transformers' ids.
    <|startoftext|> ... <|endoftext|>, then padding: more <|endoftext|> for CLIP-L, id 0 for CLIP-G. That is
    "!", and so a special token of CLIP-G's: 0 wherever it stands, where CLIP-L ends a word with it (256)."""
    LITERALS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
    RUNS = re.compile("L+|N|O+|S+")
    MARKS = re.compile(f"([{''.join(_U['marks'])}])")

    def __init__(self, folder, length=77, pad="<|endoftext|>"):
        folder, self.length = Path(folder), length
        self.vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        self.ranks = {tuple(line.split(" ")): i for i, line in enumerate(merges)}   # "#version" is no pair
        prints = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's: they stand for themselves
        others = [b for b in range(256) if b not in prints]
        self.alphabet = {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(others)}
        bos, eos = "<|startoftext|>", "<|endoftext|>"
        config = ends = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
        for name in "special_tokens_map.json", "tokenizer_config.json":
            config = config | read_json(folder / name)
        named = [{"content": config[n]} if isinstance(config[n], str) else config[n] for n in ends]
        self.bos, self.eos, self.unk, self.pad = (self.vocab[token["content"]] for token in named)
        named += config.get("added_tokens_decoder", {}).values()        # the same again, with their flags
        added = {token["content"]: token | {"id": self.vocab[token["content"]]} for token in named}.values()
        self.raw_tokens = AddedTokens(token for token in added if not token.get("normalized"))
        self.normal_tokens = AddedTokens(token for token in added if token.get("normalized"))
        self.bpe = functools.lru_cache(maxsize=2 ** 16)(self._bpe)

    def encode(self, text):
        """str -> list of ids from end to end, neither cut nor padded."""
        ids = []
        for piece, token in self.raw_tokens.split(text):
            # "normalized" tokens are looked for after normalisation: <|StartOfText|> is one
            parts = self.normal_tokens.split(self.normalise(piece)) if token is None else [(piece, token)]
            for part, token in parts:
                ids += [token] if token is not None else [i for w in self.words(part) for i in self.bpe(w)]
        return [self.bos, *ids, self.eos]

    def normalise(self, text):
        """NFC, any run of spaces to one, lower case letter by letter (a final sigma is like any)."""
        text = "".join(unicodedata.normalize("NFC", part) for part in self.MARKS.split(text))
        return "".join(char.lower() for char in SPACES.sub(" ", text).translate(LOWER))

    def words(self, text):
        """Yields words: English endings, runs of letters, single digits, runs of anything else but spaces."""
        kinds, start = "".join(map(KIND, text)), 0
        while start < len(text):
            literal = self.LITERALS.match(text, start)
            end = (literal or self.RUNS.match(kinds, start)).end()
            if literal and text[start] == "<":          # as no token is written (<|EndOfText|>): three words
                yield from ("<|", text[start + 2:end - 2], "|>")
            elif kinds[start] != "S":
                yield text[start:end]
            start = end

    def _bpe(self, word):
        """str -> ids: merges the pair of lowest rank, the leftmost of equals, for as long as there is one."""
        parts = [self.alphabet[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            if min(ranks, default=math.inf) == math.inf:
                return [self.vocab.get(part, self.unk) for part in parts]
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

class T5Tokenizer(Tokenizer):
    """Unigram tokenizer of T5 (Kudo 2018), from tokenizer.json; transformers' (5.x) ids.
    ... </s>, then padding. `tokenizers` alone, on the same file, differs in two corners: U+0085 is no space
    there, and a literal U+2581 stays apart from a space before it. Errors: InputError for another make."""
    def __init__(self, folder, length=256):
        path, self.length = Path(folder) / "tokenizer.json", length
        spec = json.loads(path.read_text(encoding="utf-8"))
        model, normalizer = spec["model"], spec["normalizer"] or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        made_of = {model["type"], spec["pre_tokenizer"]["type"], *(step["type"] for step in steps)}
        if made_of - {"Precompiled", "Strip", "Replace"} != {"Unigram", "Metaspace"}:
            raise InputError(f"{path}: holds {', '.join(sorted(made_of))}; expected T5's Unigram, Metaspace")
        maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
        blob = base64.b64decode(maps[0]) if maps else bytes(4)
        size = int.from_bytes(blob[:4], "little")
        self.trie = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.targets = blob[4 + size:]                      # UTF-8 strings, each closed by a zero
        self.vocab = {piece: (i, score) for i, (piece, score) in enumerate(model["vocab"])}
        self.longest = max(map(len, self.vocab))
        self.unknown = (model["unk_id"], min(score for _, score in model["vocab"]) - 10)
        self.added = AddedTokens(spec["added_tokens"])
        self.eos, self.pad = self.vocab["</s>"][0], self.vocab["<pad>"][0]
        self.replacement = functools.lru_cache(maxsize=2 ** 16)(self._replacement)
        self.viterbi = functools.lru_cache(maxsize=2 ** 16)(self._viterbi)

    def encode(self, text):
        """str -> list of ids with the final </s>, neither cut nor padded."""
        ids = []
        for piece, token in self.added.split(text):
            words = filter(None, SPACES.split(self.normalise(piece)))
            marked = "".join(word if word[0] == "▁" else "▁" + word for word in words)
            parts = re.findall("▁[^▁]*", marked)
            ids += [token] if token is not None else [i for part in parts for i in self.viterbi(part)]
        return [*ids, self.eos]

    def normalise(self, text):
        """NFKC and clean-up as the file's map has them, by grapheme cluster where that is short."""
        if not self.trie or (text.isascii() and text.isprintable()):
            return text
        out = []
        for match in CLUSTER.finditer("".join(map(CLUSTER_KIND, text))):
            cluster = text[match.start():match.end()]
            whole = self.replacement(cluster) if len(cluster.encode("utf-8")) < 6 else cluster
            out += [whole] if whole != cluster else map(self.replacement, cluster)
        return "".join(out)

    def _replacement(self, chunk):
        """What the *shortest* known prefix of `chunk` maps to (the rest is lost), or `chunk` itself.
        The map is sentencepiece's double-array trie over bytes (darts-clone). Bits of a unit: 0-7 label,
        8 has a leaf, 10-31 offset, which bit 9 shifts by 8. A leaf holds a start in `targets`."""
        unit, node = self.trie[0], 0
        for byte in chunk.encode("utf-8"):
            node ^= (unit >> 10) << ((unit & 0x200) >> 6) ^ byte
            unit = self.trie[node]
            if byte == 0 or unit & 0x800000FF != byte:
                break
            if unit & 0x100:
                start = self.trie[node ^ (unit >> 10) << ((unit & 0x200) >> 6)] & 0x7FFFFFFF
                return self.targets[start:self.targets.index(0, start)].decode("utf-8")
        return chunk

    def _viterbi(self, word):
        """str -> ids of the split with the greatest sum of scores; unknown neighbours become one."""
        best = [(0.0, 0, None)] + [None] * len(word)        # at each end: score, last piece's start and id
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                piece = self.vocab.get(word[start:end], self.unknown if end == start + 1 else None)
                if piece and (best[end] is None or best[start][0] + piece[1] > best[end][0]):
                    best[end] = (best[start][0] + piece[1], start, piece[0])
        ids, end = [], len(word)
        while end > 0:
            _, end, token = best[end]
            ids += [token] if [token] != ids[-1:] or token != self.unknown[0] else []
        return ids[::-1]

# ------------------------------------------------------------ text encoders: CLIP-L, CLIP-G, T5
class CLIPLayer(nn.Module):
    """Pre-norm transformer layer with causal attention, head size 64. (B, N, d) -> (B, N, d)"""
    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{n}_proj"](h), "b n (h c) -> b h n c", c=64) for n in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)         # (B, d/64, N, 64)
        x = x + self.self_attn.out_proj(rearrange(h, "b h n c -> b n (h c)"))
        h = self.mlp.fc1(self.layer_norm2(x))                               # (B, N, hidden)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return x + self.mlp.fc2(h)

class CLIPText(nn.Module):
    """Text half of OpenAI's CLIP-L (quick_gelu) or OpenCLIP's bigG (gelu), under transformers' names."""
    def __init__(self, vocab, length, width, hidden, layers, projected=None, quick_gelu=False):
        super().__init__()
        layers = nn.ModuleList(CLIPLayer(width, hidden, quick_gelu) for _ in range(layers))
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab, width),
                                         "position_embedding": nn.Embedding(length, width)}),
            "encoder": nn.ModuleDict({"layers": layers}), "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Linear(width, projected, bias=False) if projected else nn.Identity()

    def forward(self, ids, eos):
        """ids (B, N), the end token's id -> last state but one (B, N, d), pooled (B, projected, or d)."""
        m = self.text_model
        x = m.embeddings.token_embedding(ids) + m.embeddings.position_embedding.weight[:ids.shape[1]]
        for layer in m.encoder.layers:
            before, x = x, layer(x)                                         # (B, N, d)
        first = (ids == eos).int().argmax(1)                                # padding may have the same id
        x = x[torch.arange(len(x), device=x.device), first]                 # (B, d)
        return before, self.text_projection(m.final_layer_norm(x))

class T5Block(nn.Module):
    """Pre-norm attention with a position bias, then gated gelu. (B, N, d), (1, heads, N, N) -> (B, N, d)"""
    def __init__(self, width, inner, hidden):
        super().__init__()
        sizes = {"SelfAttention": dict.fromkeys("qkv", (width, inner)) | {"o": (inner, width)},
                 "DenseReluDense": {"wi_0": (width, hidden), "wi_1": (width, hidden), "wo": (hidden, width)}}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: nn.ModuleDict({n: nn.Linear(*size, bias=False) for n, size in part.items()}),
                           "layer_norm": nn.RMSNorm(width, eps=1e-6)}) for name, part in sizes.items())

    def forward(self, x, bias):
        attention, mlp = self.layer[0].SelfAttention, self.layer[1].DenseReluDense
        h = self.layer[0].layer_norm(x)
        q, k, v = (rearrange(attention[n](h), "b n (h c) -> b h n c", h=bias.shape[1]) for n in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)          # (B, heads, N, d_kv)
        x = x + attention.o(rearrange(h, "b h n c -> b n (h c)"))
        h = self.layer[1].layer_norm(x)
        return x + mlp.wo(F.gelu(mlp.wi_0(h), approximate="tanh") * mlp.wi_1(h))

class T5Encoder(nn.Module):
    """Encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020), under transformers' names. bf16 or float32."""
    def __init__(self, vocab, width, inner, hidden, heads, layers, buckets=32):
        super().__init__()
        self.shared = nn.Embedding(vocab, width)
        blocks = nn.ModuleList(T5Block(width, inner, hidden) for _ in range(layers))
        blocks[0].layer[0].SelfAttention["relative_attention_bias"] = nn.Embedding(buckets, heads)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": nn.RMSNorm(width, eps=1e-6)})

    def position_bias(self, n):
        """(1, heads, n, n), by signed distance: exact when near, logarithmic up to 128, one value beyond."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias    # all blocks use it
        positions = torch.arange(n, device=table.weight.device)
        away = positions - positions[:, None]                               # (n, n), key minus query
        half, exact = table.num_embeddings // 2, table.num_embeddings // 4
        far = torch.log(away.abs().clamp(min=1) / exact) / math.log(128 / exact) * (half - exact)
        bucket = torch.where(away.abs() < exact, away.abs(), (exact + far.long()).clamp(max=half - 1))
        return rearrange(table(bucket + half * (away > 0)), "q k h -> 1 h q k")

    def forward(self, ids):
        """ids (B, N) -> (B, N, d). Padding is not masked: SD3 was trained so."""
        x = self.shared(ids)                                                # (B, N, d), not scaled by sqrt(d)
        bias = self.position_bias(ids.shape[1])                             # (1, heads, N, N)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

def _size(state, key):
    return state[key].shape if key in state else (1, 1)     # so that load_strict can name all that is missing

def load_clip(source, part, dtype=torch.float32, device="cpu"):
    """`part` "clip_l" (without projection in the original layout) or "clip_g" of `source` -> CLIPText"""
    state = read_weights(source, part)
    state.pop("text_model.embeddings.position_ids", None)                   # 0, 1, 2, ... in old files
    vocab, width = _size(state, "text_model.embeddings.token_embedding.weight")
    length, _ = _size(state, "text_model.embeddings.position_embedding.weight")
    hidden, _ = _size(state, "text_model.encoder.layers.0.mlp.fc1.weight")
    layers = len({key.split(".")[3] for key in state if ".layers." in key})
    projected = len(state["text_projection.weight"]) if "text_projection.weight" in state else None
    sizes = vocab, length, width, hidden, layers, projected, part == "clip_l"
    return load_strict(lambda: CLIPText(*sizes), state, f"{part} of {source}", dtype, device)

def load_t5(source, dtype=torch.float32, device="cpu"):
    """T5 of `source` -> T5Encoder, sizes read off the shapes; plain fp8 weights are cast up to `dtype`.
    Errors: InputError for float16, scaled fp8, an embed_tokens that is not `shared`; see load_strict."""
    if dtype == torch.float16:
        raise InputError("T5 overflows in float16 (its activations pass 65504); use bfloat16 or float32")
    what, state = f"t5 of {source}", read_weights(source, "t5")
    for key in state:
        if key.endswith(("scaled_fp8", "scale_weight", "scale_input")):
            raise InputError(f"{what}: {key} means t5xxl_fp8_e4m3fn_scaled.safetensors; use t5xxl_fp16")
    twin = state.pop("encoder.embed_tokens.weight", None)
    if twin is not None and not torch.equal(twin.float(), state.setdefault("shared.weight", twin).float()):
        raise InputError(f"{what}: encoder.embed_tokens.weight differs from shared.weight; fetch it again")
    vocab, width = _size(state, "shared.weight")
    inner, _ = _size(state, "encoder.block.0.layer.0.SelfAttention.q.weight")
    buckets, heads = _size(state, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    hidden, _ = _size(state, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    layers = len({key.split(".")[2] for key in state if ".block." in key}) or 1
    sizes = vocab, width, inner, hidden, heads, layers, buckets
    return load_strict(lambda: T5Encoder(*sizes), state, what, dtype, device)

def load_text_encoders(source, max_t5=256, dtype=torch.float32, device="cpu", t5=True):
    """SD3's text embedding: text(list of B str) -> context (B, 77 + T, 4096), pooled (B, 2048). CLIP-L beside
    CLIP-G, then T5's T = min(max_t5, tokenizer_3's model_max_length) tokens; t5=False: zeros, as in training,
    as wide as the transformer expects. Errors: InputError for what is missing or does not fit."""
    clip_l, clip_g = clips = [load_clip(source, part, dtype, device) for part in ("clip_l", "clip_g")]
    lengths = [clip.text_model.embeddings.position_embedding.num_embeddings for clip in clips]
    files = "tokenizer/vocab.json", "tokenizer_2/vocab.json", "tokenizer_3/tokenizer.json"
    folders = [local_folder(source, f"{Path(f).parent}/*") and find_file(source, f).parent for f in files]
    tokenizers = [CLIPTokenizer(folders[0], lengths[0]), CLIPTokenizer(folders[1], lengths[1], pad="!")]
    max_t5 = min(max_t5, read_json(folders[2] / "tokenizer_config.json").get("model_max_length", max_t5))
    tokenizers += [T5Tokenizer(folders[2], max_t5)] if t5 else []
    encoder = load_t5(source, dtype, device) if t5 else None
    D = (encoder.shared.weight if t5 else read_weights(source, "dit")["context_embedder.weight"]).shape[1]
    width = sum(clip.text_model.embeddings.token_embedding.embedding_dim for clip in clips)
    if width > D:
        raise InputError(f"{source}: CLIP-L and CLIP-G are {width} wide together, the context {D}")

    @torch.no_grad()
    def text(prompts):
        assert not isinstance(prompts, str), f"expected a list of prompts, got the string {prompts[:40]!r}"
        ids = [tokenizer(prompts).to(device) for tokenizer in tokenizers]
        l, pooled_l = clip_l(ids[0], tokenizers[0].eos)                     # (B, L, d_l), (B, d_l)
        g, pooled_g = clip_g(ids[1], tokenizers[1].eos)                     # (B, L, d_g), (B, d_g)
        clip = F.pad(torch.cat([l, g], -1), (0, D - width))                 # (B, L, D)
        t5 = encoder(ids[2]) if encoder else clip.new_zeros(len(clip), max_t5, D)       # (B, T, D)
        return torch.cat([clip, t5], 1), torch.cat([pooled_l, pooled_g], -1)
    return text

# ------------------------------------------------------------ the diffusion transformer: MMDiT and MMDiT-X
@dataclass(frozen=True)
class MMDiTArch:
    """What the state dict's shapes say. Defaults: SD3.5 Medium, 2.24 B parameters. A head is 64 wide."""
    depth: int = 24
    width: int = 1536                   # SD3 Medium 1536, SD3.5 Large 2432
    in_channels: int = 16               # C
    detail_channels: int = 0            # D; not 0 once warm-started over a DA-VAE
    patch: int = 2
    table: int = 384                    # side of the square table of positions; SD3 Medium, SD3.5 Large: 192
    context_dim: int = 4096             # T5-XXL's width
    pooled_dim: int = 2048              # CLIP-L's and CLIP-G's together
    qk_norm: bool = True                # SD3 Medium: False
    dual: tuple = tuple(range(13))      # blocks with a second attention, image to image (SD3.5 Medium alone)

    @staticmethod
    def from_state_dict(state):
        """Architecture of a state dict in the original names. Errors: KeyError if it is another network's."""
        width, C, patch, _ = state["x_embedder.proj.weight"].shape
        D = state["P_prime.weight"].shape[1] if "P_prime.weight" in state else 0
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("joint_blocks."))
        return MMDiTArch(
            depth, width, C, D, patch, table=math.isqrt(state["pos_embed"].shape[1]),
            context_dim=state["context_embedder.weight"].shape[1],
            pooled_dim=state["y_embedder.mlp.0.weight"].shape[1],
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in state,
            dual=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state))

class Attention(nn.Module):
    """A stream's projections; `attend` makes the streams meet. (B, N, d) -> q, k, v (B, N, d/64, 64)"""
    def __init__(self, d, qk_norm, out=True):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d) if out else None
        self.ln_q, self.ln_k = (nn.RMSNorm(64, eps=1e-6) if qk_norm else None for _ in range(2))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, d=64)
        if self.ln_q:   # copies: backward keeps them, and views would keep v; a cast: autocast would be slow
            q = F.rms_norm(q.contiguous(), (64,), self.ln_q.weight.type_as(q), 1e-6)
            k = F.rms_norm(k.contiguous(), (64,), self.ln_k.weight.type_as(k), 1e-6)
        return q, k, v

def attend(*streams):
    """Attention over the tokens of all streams, each (q, k, v) (B, N_i, heads, 64) -> list of (B, N_i, d)"""
    q, k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*streams))      # (B, heads, N, 64)
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
    return out.split([stream[0].shape[1] for stream in streams], dim=1)

def modulate(h, shift, scale):
    """adaLN: a scale and a shift that depend on the condition, after a layer norm without weights."""
    return h * (1 + scale) + shift

class Stream(nn.Module):
    """The weights of one stream (image or text) in one block."""
    def __init__(self, d, qk_norm, dual=False, last=False):
        super().__init__()
        self.parts = 2 if last else 9 if dual else 6
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, self.parts * d))
        self.attn = Attention(d, qk_norm, out=not last)
        self.attn2 = Attention(d, qk_norm) if dual else None
        if not last:
            layers = dict(fc1=nn.Linear(d, 4 * d), gelu=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * d, d))
            self.mlp = nn.Sequential(OrderedDict(layers))

    def modulation(self, c):
        """(B, d) -> shifts, scales and gates, (B, 1, d) each"""
        return self.adaLN_modulation(c)[:, None].chunk(self.parts, dim=-1)

    def update(self, x, a, gate, shift_mlp, scale_mlp, gate_mlp):
        """Add the attention's answer `a` and the feed-forward's. (B, N, d) -> (B, N, d)"""
        x = x + gate * self.attn.proj(a)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))

class JointBlock(nn.Module):
    """Image and text tokens, each with weights of their own, attend to both. The last block drops text."""
    def __init__(self, d, qk_norm, dual, last):
        super().__init__()
        self.dual, self.last = dual, last
        self.context_block = Stream(d, qk_norm, last=last)
        self.x_block = Stream(d, qk_norm, dual=dual)

    def forward(self, x, context, c):
        """x (B, N, d), context (B, L, d), c (B, d) -> x, context"""
        image, text = self.x_block, self.context_block
        shift, scale, *rest = image.modulation(c)
        shift_c, scale_c, *rest_c = text.modulation(c)
        h = image.norm(x)                                                   # (B, N, d)
        if self.dual:                       # MMDiT-X: image tokens also among themselves, from the same h
            *rest, shift_2, scale_2, gate_2 = rest
            x = x + gate_2 * image.attn2.proj(*attend(image.attn2(modulate(h, shift_2, scale_2))))
        h = modulate(h, shift, scale)                                       # the old h is held no longer
        h, h_c = attend(image.attn(h), text.attn(modulate(text.norm(context), shift_c, scale_c)))
        return image.update(x, h, *rest), context if self.last else text.update(context, h_c, *rest_c)

def timestep_embedding(sigma, dim=256):
    """Sinusoids of 1000 sigma, cosines first. (B,) float32 (bf16 would round near ones alike) -> (B, dim)"""
    assert sigma.dtype in (torch.float32, torch.float64), f"sigma is {sigma.dtype}, expected float32"
    freqs = torch.exp(torch.arange(dim // 2, device=sigma.device) * (-math.log(10000) / (dim // 2)))
    angles = 1000 * sigma.float()[:, None] * freqs                          # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer (Esser et al. 2024, figure 2) and 3.5 Medium's MMDiT-X."""
    def __init__(self, arch=MMDiTArch()):
        super().__init__()
        self.arch = arch
        a, d, n = arch, arch.width, arch.depth
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(a.in_channels, d, a.patch, stride=a.patch)})
        self.register_buffer("pos_embed", torch.zeros(1, a.table**2, d))
        self.t_embedder, self.y_embedder = (nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(width, d), nn.SiLU(), nn.Linear(d, d))}) for width in (256, a.pooled_dim))
        self.context_embedder = nn.Linear(a.context_dim, d)
        self.joint_blocks = nn.ModuleList(JointBlock(d, a.qk_norm, i in a.dual, i == n - 1) for i in range(n))
        self.final_layer = nn.ModuleDict({"norm": nn.LayerNorm(d, eps=1e-6, elementwise_affine=False),
                                          "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d)),
                                          "linear": nn.Linear(d, a.patch**2 * a.in_channels)})
        if a.detail_channels:
            self.add_details(a.detail_channels)

    def add_details(self, D):
        """P' and O': the patch embedder and the output layer of z_d, as modules of their own."""
        d, p = self.arch.width, self.arch.patch
        self.arch = replace(self.arch, detail_channels=D)
        self.P_prime = nn.Conv2d(D, d, p, stride=p, bias=False)             # x_embedder has the bias
        self.O_prime = nn.Linear(d, p * p * D)

    def positions(self, h, w):
        """The centre of the position table: (1, h * w, d). Errors: InputError beyond the table."""
        side = self.arch.table
        if max(h, w) > side:
            raise InputError(f"{w}x{h} tokens, but {side}x{side} positions in the table; ask for fewer")
        top, left = (side - h) // 2, (side - w) // 2
        return self.pos_embed.view(side, side, -1)[top:top + h, left:left + w].reshape(1, h * w, -1)

    def embed(self, x):
        """[z, z_d] -> tokens, without positions. (B, C + D, h p, w p) -> (B, h w, d)"""
        check_size(x.shape[-2:], self.arch.patch)
        z, z_d = x.type_as(self.x_embedder.proj.weight).tensor_split([self.arch.in_channels], dim=1)
        tokens = self.x_embedder.proj(z)
        if self.arch.detail_channels:                                       # warm start: P' begins at zero
            tokens = tokens + self.P_prime(z_d)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def velocity(self, tokens, h, w):
        """The output layers, unpatched: (B, h w, d) -> (B, C + D, h p, w p)"""
        p, heads = self.arch.patch, [self.final_layer.linear]
        heads += [self.O_prime] if self.arch.detail_channels else []
        u = [rearrange(head(tokens), "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p) for head in heads]
        return torch.cat(u, dim=1)

    def forward(self, x, sigma, context, pooled, skip_layers=()):
        """x (B, C, H, W), noised latent (1 - sigma) z + sigma noise, normalised; or C + D channels: [z, z_d];
        sigma (B,), float32 in [0, 1], 1 is pure noise; context (B, L, 4096), pooled (B, 2048): the text
        -> velocity noise - z, like x. Blocks in skip_layers are left out (skip-layer guidance)."""
        dtype, (h, w) = self.context_embedder.weight.dtype, (n // self.arch.patch for n in x.shape[-2:])
        tokens = self.embed(x) + self.positions(h, w)                       # (B, h w, d)
        context = self.context_embedder(context.to(dtype))                  # (B, L, d)
        c = self.t_embedder.mlp(timestep_embedding(sigma).to(dtype)) + self.y_embedder.mlp(pooled.to(dtype))
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                tokens, context = block(tokens, context, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        tokens = modulate(self.final_layer.norm(tokens), shift, scale)      # (B, h w, d)
        return self.velocity(tokens, h, w).to(x.dtype)                      # (B, C + D, H, W)

    def compile_blocks(self):
        """Regional compilation: three graphs (dual, plain, last) a shape, whatever the depth."""
        torch._dynamo.config.recompile_limit = 64                           # 8 would do for two shapes
        for block in self.joint_blocks:
            block.compile(fullgraph=True, dynamic=False)
        return self

def mmdit_pairs(depth):
    """Original module name -> diffusers' names: three where q, k and v are one linear in the original."""
    pairs = {"x_embedder.proj": ["pos_embed.proj"], "context_embedder": ["context_embedder"],
             "final_layer.linear": ["proj_out"], "final_layer.adaLN_modulation.1": ["norm_out.linear"]}
    pairs |= {f"{ours}_embedder.mlp.{2 * i - 2}": [f"time_text_embed.{theirs}_embedder.linear_{i}"]
              for ours, theirs in (("t", "timestep"), ("y", "text")) for i in (1, 2)}
    block = {"context_block.attn.qkv": [f"attn.add_{c}_proj" for c in "qkv"],
             "context_block.attn.proj": ["attn.to_add_out"]}
    block |= {f"context_block.attn.ln_{c}": [f"attn.norm_added_{c}"] for c in "qk"}
    for a in "attn", "attn2":
        block |= {f"x_block.{a}.qkv": [f"{a}.to_{c}" for c in "qkv"], f"x_block.{a}.proj": [f"{a}.to_out.0"],
                  f"x_block.{a}.ln_q": [f"{a}.norm_q"], f"x_block.{a}.ln_k": [f"{a}.norm_k"]}
    for stream, end in ("x_block", ""), ("context_block", "_context"):
        block |= {f"{stream}.adaLN_modulation.1": [f"norm1{end}.linear"],
                  f"{stream}.mlp.fc1": [f"ff{end}.net.0.proj"], f"{stream}.mlp.fc2": [f"ff{end}.net.2"]}
    return pairs | {f"joint_blocks.{i}.{name}": [f"transformer_blocks.{i}.{t}" for t in theirs]
                    for i in range(depth) for name, theirs in block.items()}

def mmdit_from_diffusers(state):
    """An MMDiT state dict in diffusers' names -> the original ones (one in the original passes through)."""
    if "pos_embed.proj.weight" not in state:
        return state
    state = dict(state)
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")), default=-1)
    # diffusers puts scale before shift in the two modulations that have no gate
    swapped = ("final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")
    out = {"pos_embed": state.pop("pos_embed.pos_embed")} if "pos_embed.pos_embed" in state else {}
    for name, theirs in mmdit_pairs(depth).items():
        for leaf in (".weight", ".bias"):
            parts = [state.pop(t + leaf) for t in theirs if t + leaf in state]
            if parts:
                out[name + leaf] = torch.cat(parts[0].chunk(2)[::-1] if name in swapped else parts)
    return out | state                                                      # load_strict names leftovers

def split_details(state, C=16):
    """An expanded model's fused x_embedder.proj and final_layer.linear -> the base's and P', O'.
    Rows of final_layer.linear are interleaved per position of the patch. Every SD3 has C = 16."""
    weight = state["x_embedder.proj.weight"]
    if weight.shape[1] <= C:
        return state
    state, sizes = dict(state), [C, weight.shape[1] - C]
    state["x_embedder.proj.weight"], state["P_prime.weight"] = weight.split(sizes, dim=1)
    for leaf in "weight", "bias":
        rows = state[f"final_layer.linear.{leaf}"].unflatten(0, (-1, sum(sizes)))       # (p p, C + D, ...)
        base, detail = (part.flatten(0, 1) for part in rows.split(sizes, dim=1))
        state[f"final_layer.linear.{leaf}"], state[f"O_prime.{leaf}"] = base, detail
    return state

def fuse_details(state, patch=2):
    """The inverse of split_details."""
    if "P_prime.weight" not in state:
        return state
    state, weight = dict(state), "x_embedder.proj.weight"
    state[weight] = torch.cat([state[weight], state.pop("P_prime.weight")], dim=1)
    for leaf in "weight", "bias":
        parts = state[f"final_layer.linear.{leaf}"], state.pop(f"O_prime.{leaf}")
        rows = [part.unflatten(0, (patch**2, -1)) for part in parts]
        state[f"final_layer.linear.{leaf}"] = torch.cat(rows, dim=1).flatten(0, 1)
    return state

def load_mmdit(source=SD35_MEDIUM, dtype=torch.float32, device="cpu"):
    """Strictly load SD3 Medium, SD3.5 Medium or Large, or our export, in either layout -> MMDiT, frozen."""
    state = mmdit_from_diffusers(read_weights(source, "dit"))
    try:
        state = split_details(state)
        arch = MMDiTArch.from_state_dict(state)
    except (KeyError, ValueError):
        raise InputError(f"{source}: not an SD3 transformer: {', '.join(sorted(state)[:3])} ...") from None
    return load_strict(lambda: MMDiT(arch), state, source, dtype, device)

# ------------------------------------------------------------ the flow, and sampling along it
def shift_timesteps(sigma, shift):
    """Timestep shift: more steps at high noise, as larger images need (Esser et al. 2024, Eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)

def get_sigmas(steps, shift):
    """The reference's noise levels, 1 to 0: even between *warped* ends, warped again. (steps + 1,) float32"""
    sigmas = shift_timesteps(torch.linspace(1, shift_timesteps(1 / 1000, shift), steps, dtype=torch.float64), shift)
    return F.pad(sigmas, (0, 1)).float()

@torch.no_grad()
def generate(mmdit, vae, text, prompts, height, width, steps=28, cfg=4.5, shift=3.0, seeds=None, noise=None,
             negative="", return_latents=False, slg=0.0, slg_layers=(7, 8, 9), slg_window=(0.01, 0.2),
             progress=False):
    """Images of `prompts`: Euler steps of the flow x_t = (1 - t) z + t noise from t = 1 to 0, with guidance.
    text:    the callable of load_text_encoders, or ready embeddings: (context, pooled) of the prompts, with
             cfg != 1 followed by the negative's (context, pooled), each (B, ...) or (1, ...)
    seeds:   one an image (default 0, 1, ...), each with a generator of its own, on the CPU: an image does not
             depend on its batch or device. noise: (B, C, height/f, width/f) instead.
    slg:     skip-layer guidance's scale (SD3.5 Medium: 2.5 with cfg 4), inside slg_window of the steps
    returns  (B, 3, height, width), about [-1, 1], or with return_latents the normalised latents, float32"""
    B, C, f = len(prompts), mmdit.arch.in_channels + mmdit.arch.detail_channels, vae.f
    check_size((height, width), f * mmdit.arch.patch)
    if slg and max(slg_layers, default=0) >= mmdit.arch.depth:
        raise InputError(f"skip-layer guidance of layers {[*slg_layers]} of {mmdit.arch.depth}: --slg-layers")
    if callable(text):
        text = (*text(prompts), *(text([negative]) if cfg != 1 else ()))
    elif len(text) != (2 if cfg == 1 else 4):
        raise InputError(f"{len(text)} embeddings; expected context, pooled, and with cfg the negative's")
    context, pooled = (torch.cat([e.expand(B, *e.shape[1:]) for e in es]) for es in (text[::2], text[1::2]))
    device = mmdit.context_embedder.weight.device
    if noise is None:
        rngs = [torch.Generator().manual_seed(s) for s in (range(B) if seeds is None else seeds)]
        noise = torch.stack([torch.randn(C, height // f, width // f, generator=rng) for rng in rngs])
    x, context, pooled = noise.to(device, torch.float32), context.to(device), pooled.to(device)
    sigmas = get_sigmas(steps, shift).to(device)
    for i in trange(steps, disable=not progress, desc="denoise", leave=False):
        u = mmdit(x.repeat(len(context) // B, 1, 1, 1), sigmas[i].expand(len(context)), context, pooled)
        u_text = u[:B]                                                      # 2 B rows with the unguided half
        u = u_text if cfg == 1 else u[B:] + cfg * (u_text - u[B:])          # classifier-free guidance
        if slg and slg_window[0] * steps < i < slg_window[1] * steps:
            u = u + slg * (u_text - mmdit(x, sigmas[i].expand(B), context[:B], pooled[:B], slg_layers))
        x = x + (sigmas[i + 1] - sigmas[i]) * u                             # dx/dt = u = noise - z
    return x if return_latents else vae.decode(x).float()

# ------------------------------------------------------------ the command
PROMPTS = [f"a {thing} background" for thing in (                           # of the embedded model's world
    "red circle with vertical stripes on a blue", "yellow star with checks on a green",
    "blue square with falling stripes on a pink", "green triangle with rising stripes on a purple")]

def parse_args(argv=None):
    """Arguments; those left at None have one default for stock models and another for DA-VAE."""
    def size(text):
        width, _, height = text.partition("x")
        return int(height or width), int(width)
    p = Parser(__doc__)
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: four of the embedded model's world")
    p.add_argument("--prompt-file", metavar="FILE", help="a file with one prompt a line, instead")
    g = p.add_argument_group("model")
    g.add_argument("--model", default=TINY_MODEL, help=f"folder or hub id: {SD35_MEDIUM} (the embedded one)")
    g.add_argument("--dit", metavar="FILE", help="a fine-tuned transformer, exported by finetune_dit.py")
    g.add_argument("--davae", metavar="FILE", help="the DA-VAE it was tuned over, of align.py")
    g.add_argument("--compare", action="store_true", help="draw with the stock model too, and time both")
    g.add_argument("--no-t5", action="store_true", help="leave T5 out: its tokens are zeros")
    g.add_argument("--max-t5", type=int, help="T5 tokens (default 256; DA-VAE its training's)")
    g = p.add_argument_group("picture")
    g.add_argument("--size", type=size, help="1024, or width x height: 1536x1024 (default 1024; embedded 64)")
    g.add_argument("--n", type=int, default=1, help="pictures a prompt (default 1)")
    g.add_argument("--steps", type=int, help="Euler steps (default 28; DA-VAE 30)")
    g.add_argument("--cfg", type=float, help="guidance; 1 is none, at half the cost (4.5; DA-VAE 2.5)")
    g.add_argument("--shift", type=float, help="timestep shift (default 3; DA-VAE its training's)")
    g.add_argument("--seed", type=int, default=0, help="of a prompt's first picture; the next has one more")
    g.add_argument("--negative", default="", metavar="PROMPT", help="what guidance leads away from (empty)")
    g.add_argument("--slg", type=float, default=0.0, help="skip-layer guidance: 2.5 with --cfg 4 (0, off)")
    g.add_argument("--slg-layers", type=int, nargs="*", default=[7, 8, 9], help="its layers (7 8 9)")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on cuda")
    g.add_argument("--batch", type=int, default=4, help="pictures at a time (default 4)")
    g.add_argument("--compile", action="store_true", help="torch.compile the blocks: slow start, fast steps")
    g.add_argument("--offload", action="store_true", help="one network in memory at a time")
    g.add_argument("--tile", type=int, default=0, help="decode in strips of so many rows, to save memory")
    g.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNGs (default samples)")
    return p.parse_args(argv)

def read_prompts(path):
    """One prompt a line, blank lines skipped. Errors: InputError if unreadable or without any."""
    try:
        prompts = list(filter(None, map(str.strip, Path(path).read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e}); expected one prompt a line") from None
    if not prompts:
        raise InputError(f"{path}: no prompt in it; expected one a line")
    return prompts

def draw(args, dit, vae, said, jobs, where):
    """Yields a picture (3, H, W) and its settings for each (prompt, seed); said: {prompt: embeddings}"""
    (height, width), da = args.size, dit == args.dit
    mmdit = load_mmdit(dit, **where)
    if args.compile:
        mmdit.compile_blocks()
    steps = args.steps or (30 if da else 28)
    cfg = args.cfg if args.cfg is not None else 2.5 if da else 4.5
    shift = args.shift or float(read_metadata(dit).get("shift", 3.0) if da else 3.0)
    used = dict(transformer=dit, steps=steps, cfg=cfg, shift=shift, slg=args.slg, negative=args.negative)
    h, w = height // vae.f // 2, width // vae.f // 2
    mmdit.positions(h, w)                               # beyond the table: said before any work
    print(f"{dit}: {len(jobs)} pictures, {width}x{height} pixels, {w}x{h} tokens, {steps} steps,"
          f" guidance {cfg:g}, shift {shift:g}{', T5 is left out' * args.no_t5}", flush=True)
    vae.to(memory_format=torch.channels_last).decoder.in_strips(args.tile)
    waiting = []            # latents; with --offload until the transformer has left the device to the VAE
    for first in trange(0, len(jobs), args.batch, desc="batches", disable=len(jobs) <= args.batch):
        prompts, seeds = zip(*jobs[first:first + args.batch])
        embeddings = [torch.cat(part) for part in zip(*[said[p] for p in prompts])]
        embeddings += said[args.negative] if cfg != 1 else ()
        waiting += generate(mmdit, vae, embeddings, prompts, height, width, steps, cfg, shift, seeds,
                            return_latents=True, slg=args.slg, slg_layers=args.slg_layers, progress=True)
        if args.offload and first + args.batch >= len(jobs):
            mmdit = None
            gc.collect()
            vae.to(where["device"])
        while waiting and not (args.offload and mmdit):
            yield vae.decode(waiting.pop(0)[None])[0].float().cpu(), used

def main(args):
    prompts = read_prompts(args.prompt_file) if args.prompt_file else args.prompts or PROMPTS
    if bool(args.dit) != bool(args.davae) or args.compare and not args.dit:
        raise InputError("--dit and --davae go together, and --compare with them: a transformer, its DA-VAE")
    args.size = args.size or ((64, 64) if args.model == TINY_MODEL else (1024, 1024))
    device = pick_device(args.device)
    where = dict(dtype=pick_dtype(args.dtype, device), device=device)
    vae = load_vae(args.model, where["dtype"], "cpu" if args.offload else device)
    runs = [("stock", args.model, vae)] if args.compare or not args.dit else []
    runs += [("DA-VAE", args.dit, load_davae(args.davae, vae))] if args.dit else []
    for _, _, vae in runs:
        check_size(args.size, 2 * vae.f)                # every SD3 has patch 2; known before the long loads
    about = read_metadata(args.dit) if args.dit else {}         # how it was trained
    if args.dit and about.get("davae", "") not in ("", file_hash(args.davae)):
        raise InputError(f"{args.dit} was not trained over {args.davae} (its hash: {about.get('davae')})")
    args.max_t5 = args.max_t5 or int(about.get("max_t5", 256))
    args.out.mkdir(parents=True, exist_ok=True)
    text = load_text_encoders(args.model, max_t5=args.max_t5, t5=not args.no_t5, **where)
    said = {p: [e.cpu() for e in text([p])] for p in dict.fromkeys([*prompts, args.negative])}
    text = None
    gc.collect()
    jobs, shown = [(p, args.seed + i) for p in prompts for i in range(args.n)], []
    for name, dit, vae in runs:
        start = time.time()
        for i, (image, used) in enumerate(draw(args, dit, vae, said, jobs, where)):
            file = args.out / (f"{i:04d}-{name}.png" if args.compare else f"{i:04d}.png")
            save_png(file, image, prompt=jobs[i][0], seed=jobs[i][1], **used)
            shown += [image] if i < 64 else []
        print(f"{name}: {len(jobs)} pictures in {time.time() - start:.1f} s, loading included,"
              f" peak memory {peak_memory(device):.2f} GB on {device}")
    if len(shown) > 1:
        file = args.out / "grid.png"
        columns = len(shown) // len(runs) if args.compare else args.n if args.n > 1 else min(4, len(shown))
        save_png(file, grid(shown, columns, rows=[r[0] for r in runs] if args.compare else None))
    print(file)

if __name__ == "__main__":
    run(main, parse_args())
