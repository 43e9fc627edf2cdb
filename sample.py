"""Chapter 3 - Stable Diffusion 3.5 itself, and sampling from it.

Two tokenizers, three text encoders, one transformer (MMDiT), and the flow that turns noise into a
latent: all between a prompt and a picture but the VAE, which is chapter 1's. Real weights load
strictly, under their own key names; the embedded model in assets/tiny is the same network with
fewer channels.

    python sample.py                                    # a picture in seconds, offline, on a CPU
    python sample.py --model stabilityai/stable-diffusion-3.5-medium "a lighthouse in a storm"

References: Esser et al. 2024 (SD3: rectified flow, MMDiT, timestep shift); Stability AI 2024
(SD3.5: qk-norm, MMDiT-X, skip-layer guidance); Radford et al. 2021 (CLIP); Raffel et al. 2020 (T5);
Ho 2022 (guidance).
"""
import base64, bisect, functools, gc, hashlib, heapq, json, math, os, re, struct, sys, time
import unicodedata
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm, trange

from align import barrier, init_distributed, lock, print0
from vae_expand import (DAVAE, GENEVAL_FIELDS, SD35_MEDIUM, TINY_MODEL, InputError, Parser,
                        add_attention_flag, attention, check_size, count_or_0, device_type,
                        file_hash, find_file, find_weights, folder_path, grid, is_safetensors,
                        is_tiny, load_davae, load_strict, load_vae, local_folder, non_negative,
                        peak_memory, pick_dtype, positive, positive_int, read_csv, read_file,
                        read_image, read_json, read_metadata, read_weights, run, save_overview,
                        save_png, seed_int, to_tensor, whole_text)

# ------------------------------------------------------------ tokenizers: equal ids, plain Python
# The peers' character classes, for all of Unicode: ids do not depend on Python's version of it.
UNICODE = json.loads((Path(TINY_MODEL).parent / "unicode.json").read_text())

def character_classes(lines):
    """Runs "first:kind" of characters, in hexadecimal
    -> a function from a character to its kind."""
    starts = []
    kinds = []
    for entry in " ".join(lines).split():
        start, kind = entry.split(":")
        starts.append(int(start, 16))
        kinds.append(kind)

    @functools.cache
    def kind_of(char):
        return kinds[bisect.bisect(starts, ord(char)) - 1]
    return kind_of

def lower_case_table(lines):
    """Pairs "upper:lower" in hexadecimal -> a table for str.translate."""
    pairs = [pair.split(":") for pair in " ".join(lines).split()]
    return {int(upper, 16): int(lower, 16) for upper, lower in pairs}

# L(etter), N(umber), S(pace), O(ther), as CLIP's pattern has them
KIND = character_classes(UNICODE["kinds"])
# of grapheme clusters: J(oins the one before), P(repends), C(ontrol), R and N (the line ends)
CLUSTER_KIND = character_classes(UNICODE["clusters"])
CLUSTER = re.compile("RN|[RNC]|P*[.J]J*|P+")
LOWER = lower_case_table(UNICODE["lower"])
SPACE = "".join(char for char in map(chr, range(0x3001)) if KIND(char) == "S")  # \s has four more
SPACES = re.compile(f"[{SPACE}]+")

class Tokenizer:
    """What both tokenizers share: a list of B texts -> ids (B, length), cut or padded."""
    def __call__(self, texts):
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > self.length:                      # the end token is kept
                ids = ids[:self.length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)         # (B, length)

    def lost(self, text):
        """What __call__ cuts off: the end of the text as its tokens spell it,
        "" where all of it fits."""
        ids = self.encode(text)
        if len(ids) <= self.length:
            return ""
        return self.decode(ids[self.length - 1:-1])

class AddedTokens:
    """Cuts a text at literal tokens, given as in tokenizer.json's "added_tokens": leftmost,
    then longest."""
    def __init__(self, tokens):
        self.tokens = {token["content"]: token for token in tokens}
        words = sorted(map(re.escape, self.tokens), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(words) or '(?!)'})")

    def split(self, text):
        """str -> [(piece, its id, or None for plain text), ...]; some swallow the spaces beside
        them."""
        pieces = self.pattern.split(text)                   # plain, token, plain, ..., token, plain
        for i in range(1, len(pieces), 2):
            token = self.tokens[pieces[i]]
            if token.get("lstrip"):
                pieces[i - 1] = pieces[i - 1].rstrip(SPACE)
            if token.get("rstrip"):
                pieces[i + 1] = pieces[i + 1].lstrip(SPACE)

        ids = [self.tokens[piece]["id"] if i % 2 else None for i, piece in enumerate(pieces)]
        return [(piece, token_id) for piece, token_id in zip(pieces, ids) if piece]

def special_token(entry):
    """A token as the tokenizers' files write it, a string or a dict -> the dict."""
    return {"content": entry} if isinstance(entry, str) else entry

class CLIPTokenizer(Tokenizer):
    """Byte-level BPE of CLIP (Radford et al. 2021), from vocab.json and merges.txt; the ids are those
    of transformers.
    <|startoftext|> ... <|endoftext|>, then padding: more <|endoftext|> for CLIP-L, id 0 for CLIP-G.
    Id 0 is the token "!". CLIP-G treats it as special, so "!" is 0 wherever it stands; CLIP-L
    has another id (256) for "!" at the end of a word."""
    LITERALS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
    RUNS = re.compile("L+|N|O+|S+")
    MARKS = re.compile(f"([{''.join(UNICODE['marks'])}])")

    def __init__(self, folder, length=77, pad="<|endoftext|>"):
        folder = Path(folder)
        self.length = length
        self.vocab = read_json(folder / "vocab.json")
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        # "#version" is no pair
        self.ranks = {tuple(line.split(" ")): i for i, line in enumerate(merges)}

        # GPT-2's alphabet: printable bytes stand for themselves, others for characters above 255
        prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in prints]
        self.alphabet = {byte: chr(byte) for byte in prints}
        self.alphabet |= {byte: chr(256 + i) for i, byte in enumerate(others)}

        # The special tokens: the later file has the last word.
        config = read_json(folder / "special_tokens_map.json")
        config |= read_json(folder / "tokenizer_config.json")
        bos = special_token(config.get("bos_token", "<|startoftext|>"))
        eos = special_token(config.get("eos_token", "<|endoftext|>"))
        unk = special_token(config.get("unk_token", "<|endoftext|>"))
        pad = special_token(config.get("pad_token", pad))
        self.bos = self.vocab[bos["content"]]
        self.eos = self.vocab[eos["content"]]
        self.unk = self.vocab[unk["content"]]
        self.pad = self.vocab[pad["content"]]

        # A text may hold them literally. The decoder's table has them again, with their flags.
        added = {}
        for token in bos, eos, unk, pad:
            added[token["content"]] = token | {"id": self.vocab[token["content"]]}
        for number, token in config.get("added_tokens_decoder", {}).items():    # not all in vocab.json
            added[token["content"]] = token | {"id": int(number)}
        self.added = {token["id"]: f"{content}</w>" for content, token in added.items()}
        self.raw_tokens = AddedTokens([token for token in added.values()
                                       if not token.get("normalized")])
        self.normal_tokens = AddedTokens([token for token in added.values()
                                          if token.get("normalized")])
        self.bpe = functools.lru_cache(maxsize=2 ** 16)(self.merge_pairs)

    def encode(self, text):
        """str -> list of ids from end to end, neither cut nor padded."""
        ids = []
        for piece, token in self.raw_tokens.split(text):
            if token is not None:
                ids.append(token)
                continue
            # "normalized" tokens are looked for after normalisation: <|StartOfText|> is one
            for part, token in self.normal_tokens.split(self.normalise(piece)):
                if token is not None:
                    ids.append(token)
                    continue
                for word in self.words(part):
                    ids += self.bpe(word)
        return [self.bos, *ids, self.eos]

    def decode(self, ids):
        """Ids -> text, its words set apart by one space; bytes that are no UTF-8 become U+FFFD."""
        pieces = self.added | {i: piece for piece, i in self.vocab.items()}
        bytes_of = {char: byte for byte, char in self.alphabet.items()}
        words = "".join(pieces[i] for i in ids).split("</w>")
        coded = [bytes(bytes_of[char] for char in word if char in bytes_of) for word in words]
        return " ".join(word.decode("utf-8", "replace") for word in coded).strip()

    def normalise(self, text):
        """NFC; any run of spaces becomes one; lower case letter by letter, so that a final sigma is a
        sigma like any other."""
        text = "".join(unicodedata.normalize("NFC", part) for part in self.MARKS.split(text))
        return "".join(char.lower() for char in SPACES.sub(" ", text).translate(LOWER))

    def words(self, text):
        """Yields words: English endings, runs of letters, single digits, runs of anything else but
        spaces."""
        kinds = "".join(map(KIND, text))
        start = 0
        while start < len(text):
            literal = self.LITERALS.match(text, start)
            end = (literal or self.RUNS.match(kinds, start)).end()
            # as no token is written (<|EndOfText|>): three words
            if literal and text[start] == "<":
                yield from ("<|", text[start + 2:end - 2], "|>")
            elif kinds[start] != "S":
                yield text[start:end]
            start = end

    def merge_pairs(self, word):
        """str -> ids: merges the pair of lowest rank, the leftmost of equals,
        for as long as there is one.
        A heap holds the ranked pairs of a linked list of parts: near-linear time in the word's
        length."""
        parts = [self.alphabet[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        left = list(range(-1, len(parts) - 1))              # each part's neighbours; -1: none
        right = [*range(1, len(parts)), -1]
        heap = []                                           # (rank, place of the pair's first part)

        def rank_at(i):
            """The rank of part i and its right neighbour, None where they do not merge."""
            if i == -1 or right[i] == -1:
                return None
            return self.ranks.get((parts[i], parts[right[i]]))

        def push(i):
            rank = rank_at(i)
            if rank is not None:
                heapq.heappush(heap, (rank, i))

        for i in range(len(parts)):
            push(i)
        while heap:
            rank, i = heapq.heappop(heap)
            if rank_at(i) != rank:                          # one of the two has merged since
                continue
            j = right[i]
            parts[i] += parts[j]
            parts[j] = None
            right[i] = right[j]
            right[j] = -1
            if right[i] != -1:
                left[right[i]] = i
            push(left[i])
            push(i)
        return [self.vocab.get(part, self.unk) for part in parts if part is not None]

class T5Tokenizer(Tokenizer):
    """Unigram tokenizer of T5 (Kudo 2018), from tokenizer.json; the ids are those of transformers 5.
    ... </s>, then padding. `tokenizers` alone, on the same file, differs in two rare cases:
    U+0085 is no space there, and a literal U+2581 stays apart from a space before it.
    Raises: InputError for a tokenizer.json of another kind."""
    def __init__(self, folder, length=256):
        path = Path(folder) / "tokenizer.json"
        self.length = length
        spec = read_json(path)
        model = spec["model"]
        normalizer = spec["normalizer"] or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        made_of = {model["type"], spec["pre_tokenizer"]["type"], *(step["type"] for step in steps)}
        if made_of - {"Precompiled", "Strip", "Replace"} != {"Unigram", "Metaspace"}:
            raise InputError(f"{path}: holds {', '.join(sorted(made_of))}; expected T5's Unigram,"
                             " Metaspace")

        # The normaliser: a trie over bytes, and the texts that it maps to, each closed by a zero.
        maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
        blob = base64.b64decode(maps[0]) if maps else bytes(4)
        size = int.from_bytes(blob[:4], "little")
        self.trie = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self.targets = blob[4 + size:]

        # The unigram model: pieces with the logarithms of their probabilities.
        self.vocab = {piece: (i, score) for i, (piece, score) in enumerate(model["vocab"])}
        self.longest = max(map(len, self.vocab))
        self.unknown = (model["unk_id"], min(score for _, score in model["vocab"]) - 10)
        self.added = AddedTokens(spec["added_tokens"])
        self.eos = self.vocab["</s>"][0]
        self.pad = self.vocab["<pad>"][0]
        self.replacement = functools.lru_cache(maxsize=2 ** 16)(self.mapped)
        self.viterbi = functools.lru_cache(maxsize=2 ** 16)(self.best_split)

    def encode(self, text):
        """str -> list of ids with the final </s>, neither cut nor padded."""
        ids = []
        for piece, token in self.added.split(text):
            if token is not None:
                ids.append(token)
                continue
            words = [word for word in SPACES.split(self.normalise(piece)) if word]
            marked = "".join(word if word[0] == "▁" else "▁" + word for word in words)
            for part in re.findall("▁[^▁]*", marked):
                ids += self.viterbi(part)
        return [*ids, self.eos]

    def decode(self, ids):
        """Ids -> text, its words set apart by one space."""
        pieces = {i: piece for piece, (i, _) in self.vocab.items()}
        return "".join(pieces.get(i, "") for i in ids).replace("▁", " ").strip()

    def normalise(self, text):
        """NFKC and clean-up as the file's map has them, by grapheme cluster where that is short."""
        if not self.trie or (text.isascii() and text.isprintable()):
            return text
        out = []
        for match in CLUSTER.finditer("".join(map(CLUSTER_KIND, text))):
            cluster = text[match.start():match.end()]
            whole = self.replacement(cluster) if len(cluster.encode("utf-8")) < 6 else cluster
            if whole != cluster:
                out.append(whole)
            else:
                out += map(self.replacement, cluster)
        return "".join(out)

    def mapped(self, chunk):
        """What the *shortest* known prefix of `chunk` maps to (the rest is lost),
        or `chunk` itself.
        The map is sentencepiece's double-array trie over bytes (darts-clone).
        A node is a place in it. The unit there has these bits: 0-7 label, the byte that leads to it;
        8 has a leaf; 10-31 offset, which bit 9 shifts by 8; 31 is a leaf itself (its offset is no
        longer one: the other bits are a start in `targets`)."""
        def children(node):
            """The place of its leaf; XOR a byte: the place of its child by that byte."""
            unit = self.trie[node]
            shift = 8 if unit & 0x200 else 0
            return node ^ (unit >> 10 << shift)

        node = 0
        for byte in chunk.encode("utf-8"):
            node = children(node) ^ byte
            unit = self.trie[node]
            is_leaf = unit & 0x80000000
            if byte == 0 or is_leaf or unit & 0xFF != byte:
                break
            if unit & 0x100:
                start = self.trie[children(node)] & 0x7FFFFFFF
                return self.targets[start:self.targets.index(0, start)].decode("utf-8")
        return chunk

    def best_split(self, word):
        """str -> ids of the split with the greatest sum of scores; unknown neighbours become
        one."""
        # at each end: score, last piece's start and id
        best = [(0.0, 0, None)] + [None] * len(word)
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                piece = self.vocab.get(word[start:end], self.unknown if end == start + 1 else None)
                if piece and (best[end] is None or best[start][0] + piece[1] > best[end][0]):
                    best[end] = (best[start][0] + piece[1], start, piece[0])
        ids = []
        end = len(word)
        while end > 0:
            _, end, token = best[end]
            if token != self.unknown[0] or ids[-1:] != [token]:
                ids.append(token)
        return ids[::-1]

# ------------------------------------------------------------ text encoders: CLIP-L, CLIP-G, T5
class CLIPAttention(nn.Module):
    """Self-attention, head size 64, causal in the text half. (B, N, d) -> (B, N, d)"""
    def __init__(self, width, causal):
        super().__init__()
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        """x (B, N, d) -> (B, N, d)"""
        q = rearrange(self.q_proj(x), "b n (h c) -> b h n c", c=64)         # (B, d/64, N, 64)
        k = rearrange(self.k_proj(x), "b n (h c) -> b h n c", c=64)
        v = rearrange(self.v_proj(x), "b n (h c) -> b h n c", c=64)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)      # (B, d/64, N, 64)
        return self.out_proj(rearrange(h, "b h n c -> b n (h c)"))          # (B, N, d)

class CLIPMLP(nn.Module):
    """Feed-forward with gelu, in OpenAI's models its quick approximation. (B, N, d) -> (B, N, d)"""
    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        """x (B, N, d) -> (B, N, d)"""
        h = self.fc1(x)                                                     # (B, N, hidden)
        h = h * torch.sigmoid(1.702 * h) if self.quick_gelu else F.gelu(h)
        return self.fc2(h)                                                  # (B, N, d)

class CLIPLayer(nn.Module):
    """Pre-norm transformer layer. (B, N, d) -> (B, N, d)"""
    def __init__(self, width, hidden, quick_gelu, causal=True):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = CLIPAttention(width, causal)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width, hidden, quick_gelu)

    def forward(self, x):
        """x (B, N, d) -> (B, N, d)"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))

class CLIPText(nn.Module):
    """Text half of OpenAI's CLIP-L (quick_gelu) or OpenCLIP's bigG (gelu), under transformers'
    names."""
    def __init__(self, vocab, length, width, hidden, layers, projected=None, quick_gelu=False):
        super().__init__()
        embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocab, width),
                                    "position_embedding": nn.Embedding(length, width)})
        layers = nn.ModuleList(CLIPLayer(width, hidden, quick_gelu) for _ in range(layers))
        self.text_model = nn.ModuleDict({"embeddings": embeddings,
                                         "encoder": nn.ModuleDict({"layers": layers}),
                                         "final_layer_norm": nn.LayerNorm(width)})
        self.text_projection = nn.Linear(width, projected,
                                         bias=False) if projected else nn.Identity()

    def forward(self, ids, eos):
        """ids (B, N), the end token's id
        -> last state but one (B, N, d), pooled (B, projected, or d)."""
        m = self.text_model
        positions = m.embeddings.position_embedding.weight[:ids.shape[1]]       # (N, d)
        x = m.embeddings.token_embedding(ids) + positions
        for layer in m.encoder.layers:
            before = x
            x = layer(x)                                                    # (B, N, d)
        first = (ids == eos).int().argmax(1)                        # padding may have the same id
        x = x[torch.arange(len(x), device=x.device), first]                 # (B, d)
        return before, self.text_projection(m.final_layer_norm(x))

class T5Attention(nn.Module):
    """Self-attention, not scaled, with a bias by relative position.
    All linear layers are without bias."""
    def __init__(self, width, inner):
        super().__init__()
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)

    def forward(self, x, bias):
        """x (B, N, d), bias (1, heads, N, N) -> (B, N, d)"""
        heads = bias.shape[1]
        q = rearrange(self.q(x), "b n (h c) -> b h n c", h=heads)           # (B, heads, N, d_kv)
        k = rearrange(self.k(x), "b n (h c) -> b h n c", h=heads)
        v = rearrange(self.v(x), "b n (h c) -> b h n c", h=heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(h, "b h n c -> b n (h c)"))                 # (B, N, d)

class T5FeedForward(nn.Module):
    """Gated gelu (Shazeer 2020). (B, N, d) -> (B, N, d)"""
    def __init__(self, width, hidden):
        super().__init__()
        self.wi_0 = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """x (B, N, d) -> (B, N, d)"""
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))         # (B, N, d)

class T5Block(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward. `layer` holds both, as transformers names
    them."""
    def __init__(self, width, inner, hidden):
        super().__init__()
        attention = nn.ModuleDict({"SelfAttention": T5Attention(width, inner),
                                   "layer_norm": nn.RMSNorm(width, eps=1e-6)})
        feed_forward = nn.ModuleDict({"DenseReluDense": T5FeedForward(width, hidden),
                                      "layer_norm": nn.RMSNorm(width, eps=1e-6)})
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x, bias):
        """x (B, N, d), bias (1, heads, N, N) -> (B, N, d)"""
        attention, feed_forward = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))

class T5Encoder(nn.Module):
    """Encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020), under transformers' names.
    bf16 or float32."""
    def __init__(self, vocab, width, inner, hidden, heads, layers, buckets=32):
        super().__init__()
        self.shared = nn.Embedding(vocab, width)
        blocks = nn.ModuleList(T5Block(width, inner, hidden) for _ in range(layers))
        blocks[0].layer[0].SelfAttention.relative_attention_bias = nn.Embedding(buckets, heads)
        self.encoder = nn.ModuleDict({"block": blocks,
                                      "final_layer_norm": nn.RMSNorm(width, eps=1e-6)})

    def position_bias(self, n):
        """(1, heads, n, n), by signed distance: exact when near, logarithmic up to 128,
        one value beyond."""
        # all blocks use it
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        positions = torch.arange(n, device=table.weight.device)
        away = positions - positions[:, None]                           # (n, n), key minus query
        half = table.num_embeddings // 2
        exact = table.num_embeddings // 4
        far = torch.log(away.abs().clamp(min=1) / exact) / math.log(128 / exact) * (half - exact)
        bucket = torch.where(away.abs() < exact, away.abs(),
                             (exact + far.long()).clamp(max=half - 1))
        return rearrange(table(bucket + half * (away > 0)), "q k h -> 1 h q k")

    def forward(self, ids):
        """ids (B, N) -> (B, N, d). Padding is not masked: SD3 was trained so."""
        x = self.shared(ids)                                    # (B, N, d), not scaled by sqrt(d)
        bias = self.position_bias(ids.shape[1])                             # (1, heads, N, N)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

def shape_of(state, key):
    """The shape of a matrix; (1, 1) where it is missing, so that load_strict can name everything that
    is missing."""
    return state[key].shape if key in state else (1, 1)

def clip_text_sizes(state):
    """What CLIPText is built with, but for its gelu, as the shapes of a state dict say."""
    vocab, width = shape_of(state, "text_model.embeddings.token_embedding.weight")
    length, _ = shape_of(state, "text_model.embeddings.position_embedding.weight")
    hidden, _ = shape_of(state, "text_model.encoder.layers.0.mlp.fc1.weight")
    layers = len({key.split(".")[3] for key in state
                  if key.startswith("text_model.encoder.layers.")})
    projected = len(state["text_projection.weight"]) if "text_projection.weight" in state else None
    return vocab, length, width, hidden, layers, projected

def load_clip(source, part, dtype=torch.float32, device="cpu"):
    """"clip_l" (without projection in the original layout) or "clip_g" of `source`
    -> CLIPText, frozen.
    Raises: InputError for what is missing or does not fit (load_strict)."""
    state = read_weights(source, part)
    state.pop("text_model.embeddings.position_ids", None)               # 0, 1, 2, ... in old files
    sizes = *clip_text_sizes(state), part == "clip_l"
    return load_strict(lambda: CLIPText(*sizes), state, f"{part} of {source}", dtype, device)

def load_t5(source, dtype=torch.float32, device="cpu"):
    """T5 of `source` -> T5Encoder, sizes read off the shapes; plain fp8 weights are cast up to
    `dtype`.
    Raises: InputError for float16, scaled fp8, an embed_tokens that is not `shared`;
    see load_strict."""
    if dtype == torch.float16:
        raise InputError("T5 overflows in float16 (its activations pass 65504); use bfloat16 or"
                         " float32")
    what = f"t5 of {source}"
    state = read_weights(source, "t5")

    for key in state:
        if key.endswith(("scaled_fp8", "scale_weight", "scale_input")):
            raise InputError(f"{what}: {key} means t5xxl_fp8_e4m3fn_scaled.safetensors; use"
                             " t5xxl_fp16")
    twin = state.pop("encoder.embed_tokens.weight", None)                   # the same table again
    if twin is not None:
        state.setdefault("shared.weight", twin)
    if twin is not None and not torch.equal(twin.float(), state["shared.weight"].float()):
        raise InputError(f"{what}: encoder.embed_tokens.weight differs from shared.weight; fetch it"
                         " again")

    vocab, width = shape_of(state, "shared.weight")
    inner, _ = shape_of(state, "encoder.block.0.layer.0.SelfAttention.q.weight")
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = shape_of(state, table)
    hidden, _ = shape_of(state, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    layers = len({key.split(".")[2] for key in state if ".block." in key}) or 1
    sizes = vocab, width, inner, hidden, heads, layers, buckets
    return load_strict(lambda: T5Encoder(*sizes), state, what, dtype, device)

class TextEncoders:
    """SD3's text embedding: CLIP-L beside CLIP-G, then T5 (Esser et al. 2024, figure 2)."""
    def __init__(self, tokenizers, clip_l, clip_g, t5, t5_tokens, D, device):
        self.tokenizers = tokenizers            # CLIP-L's, CLIP-G's, and T5's unless it is left out
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = t5                            # None: zeros in its place, as in training
        self.t5_tokens = t5_tokens              # T
        self.D = D                              # width of the context: T5-XXL's 4096
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts):
        """List of B str -> context (B, 77 + T, D), pooled (B, 2048)"""
        assert not isinstance(prompts,
                              str), f"expected a list of prompts, got the string {prompts[:40]!r}"
        ids = [tokenizer(prompts).to(self.device) for tokenizer in self.tokenizers]
        l, pooled_l = self.clip_l(ids[0], self.tokenizers[0].eos)           # (B, L, d_l), (B, d_l)
        g, pooled_g = self.clip_g(ids[1], self.tokenizers[1].eos)           # (B, L, d_g), (B, d_g)
        clip = torch.cat([l, g], -1)                                        # (B, L, d_l + d_g)
        clip = F.pad(clip, (0, self.D - clip.shape[-1]))                    # (B, L, D)
        if self.t5:
            t5 = self.t5(ids[2])                                            # (B, T, D)
        else:
            t5 = clip.new_zeros(len(clip), self.t5_tokens, self.D)
        return torch.cat([clip, t5], 1), torch.cat([pooled_l, pooled_g], -1)

    def lost(self, prompt):
        """What of a prompt is beyond the encoders' lengths -> {encoder: a sentence that says so},
        empty where all of it fits."""
        found = {}
        for name, tokenizer in zip(("CLIP", "T5"), self.tokenizers[::2]):   # CLIP-G cuts as CLIP-L
            rest = tokenizer.lost(prompt)
            if rest:
                found[name] = f"{name} reads {tokenizer.length} tokens, without {rest!r}"
        return found

def load_text_encoders(source, max_t5=256, dtype=torch.float32, device="cpu", t5=True):
    """The three encoders of `source` -> TextEncoders, frozen: text(prompts) -> context, pooled.
    T5 has T = min(max_t5, tokenizer_3's model_max_length) tokens; with t5=False they are zeros,
    as wide as the transformer expects. Raises: InputError for what is missing or does not fit,
    and for a single file: none holds the tokenizers."""
    folders = []
    for file in "tokenizer/vocab.json", "tokenizer_2/vocab.json", "tokenizer_3/tokenizer.json":
        local_folder(source, f"{Path(file).parent}/*")                  # fetches the whole folder
        folders.append(find_file(source, file).parent)
    clip_l = load_clip(source, "clip_l", dtype, device)
    clip_g = load_clip(source, "clip_g", dtype, device)
    embeddings_l = clip_l.text_model.embeddings
    embeddings_g = clip_g.text_model.embeddings
    tokenizers = [CLIPTokenizer(folders[0], embeddings_l.position_embedding.num_embeddings),
                  CLIPTokenizer(folders[1], embeddings_g.position_embedding.num_embeddings,
                                pad="!")]
    max_t5 = min(max_t5, read_json(folders[2] / "tokenizer_config.json").get("model_max_length",
                                                                             max_t5))

    if t5:
        tokenizers.append(T5Tokenizer(folders[2], max_t5))
        encoder = load_t5(source, dtype, device)
        D = encoder.shared.embedding_dim
    else:
        encoder = None
        D = read_weights(source, "dit")["context_embedder.weight"].shape[1]
    width = embeddings_l.token_embedding.embedding_dim + embeddings_g.token_embedding.embedding_dim
    if width > D:
        raise InputError(f"{source}: CLIP-L and CLIP-G are {width} wide together, the context {D}")
    return TextEncoders(tokenizers, clip_l, clip_g, encoder, max_t5, D, device)

# ----------------------------------------------------- the diffusion transformer: MMDiT and MMDiT-X
@dataclass(frozen=True)
class MMDiTArch:
    """Sizes of an MMDiT, as the shapes of its state dict say; the defaults are SD3.5 Medium's, 2.24 B
    parameters. A head is 64 wide."""
    depth: int = 24
    width: int = 1536                   # SD3 Medium 1536, SD3.5 Large 2432
    in_channels: int = 16               # C
    detail_channels: int = 0            # D; not 0 once warm-started over a DA-VAE
    patch: int = 2
    table: int = 384        # side of the square table of positions; SD3 Medium, SD3.5 Large: 192
    context_dim: int = 4096             # T5-XXL's width
    pooled_dim: int = 2048              # CLIP-L's and CLIP-G's together
    qk_norm: bool = True                # SD3 Medium: False
    # blocks with a second attention, image to image (SD3.5 Medium alone)
    dual: tuple = tuple(range(13))

    @staticmethod
    def from_state_dict(state):
        """Architecture of a state dict in the original names.
        Raises: KeyError if it is another network's."""
        width, C, patch, _ = state["x_embedder.proj.weight"].shape
        D = state["P_prime.weight"].shape[1] if "P_prime.weight" in state else 0
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("joint_blocks."))
        return MMDiTArch(
            depth, width, C, D, patch, table=math.isqrt(state["pos_embed"].shape[1]),
            context_dim=state["context_embedder.weight"].shape[1],
            pooled_dim=state["y_embedder.mlp.0.weight"].shape[1],
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in state,
            dual=tuple(i for i in range(depth)
                       if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state))

class Attention(nn.Module):
    """The projections of one stream; `attend` lets the streams attend to each other.
    (B, N, d) -> q, k, v (B, N, d/64, 64)"""
    def __init__(self, d, qk_norm, out=True):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d) if out else None
        self.ln_q = nn.RMSNorm(64, eps=1e-6) if qk_norm else None
        self.ln_k = nn.RMSNorm(64, eps=1e-6) if qk_norm else None

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, d=64)
        if self.ln_q:
            # Contiguous copies: backward keeps its inputs, and views would keep v too. The weight
            # is cast, because autocast would run the norm in float32, slowly.
            q = F.rms_norm(q.contiguous(), (64,), self.ln_q.weight.type_as(q), 1e-6)
            k = F.rms_norm(k.contiguous(), (64,), self.ln_k.weight.type_as(k), 1e-6)
        return q, k, v

def attend(*streams):
    """Attention over the tokens of all streams, each (q, k, v) (B, N_i, heads, 64)
    -> list of (B, N_i, d)"""
    # (B, heads, N, 64)
    q, k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*streams))
    out = rearrange(attention(q, k, v), "b h n d -> b n (h d)")
    return out.split([stream[0].shape[1] for stream in streams], dim=1)

def modulate(h, shift, scale):
    """adaLN: a scale and a shift that depend on the condition, after a layer norm without
    weights."""
    return h * (1 + scale) + shift

class Stream(nn.Module):
    """The weights of one stream (image or text) in one block."""
    def __init__(self, d, qk_norm, dual=False, last=False):
        super().__init__()
        self.parts = 2 if last else 9 if dual else 6        # of the modulation, each d wide
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, self.parts * d))
        self.attn = Attention(d, qk_norm, out=not last)
        self.attn2 = Attention(d, qk_norm) if dual else None
        if not last:
            layers = dict(fc1=nn.Linear(d, 4 * d), gelu=nn.GELU(approximate="tanh"),
                          fc2=nn.Linear(4 * d, d))
            self.mlp = nn.Sequential(OrderedDict(layers))

    def modulation(self, c):
        """(B, d) -> shifts, scales and gates, (B, 1, d) each"""
        return self.adaLN_modulation(c)[:, None].chunk(self.parts, dim=-1)

    def update(self, x, h, gate_msa, shift_mlp, scale_mlp, gate_mlp):
        """Add the attention's output h and the feed-forward's. x, h (B, N, d) -> (B, N, d)"""
        x = x + gate_msa * self.attn.proj(h)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))

class JointBlock(nn.Module):
    """Image and text tokens attend to both; each stream has weights of its own.
    The last block gives no text."""
    def __init__(self, d, qk_norm, dual, last):
        super().__init__()
        self.dual = dual
        self.last = last
        self.context_block = Stream(d, qk_norm, last=last)
        self.x_block = Stream(d, qk_norm, dual=dual)

    def forward(self, x, context, c):
        """x (B, N, d), context (B, L, d), c (B, d) -> x, context"""
        image = self.x_block
        text = self.context_block
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, *dual = image.modulation(c)
        h = image.norm(x)                                                   # (B, N, d)

        # MMDiT-X: image tokens also attend among themselves, from the same h.
        if self.dual:
            shift_msa2, scale_msa2, gate_msa2 = dual
            out, = attend(image.attn2(modulate(h, shift_msa2, scale_msa2)))             # (B, N, d)
            x = x + gate_msa2 * image.attn2.proj(out)
            del out                                     # not kept during the joint attention

        # Joint attention. The last block's text gives keys and values alone, and ends there.
        shift_msa_c, scale_msa_c, *rest_c = text.modulation(c)
        h = modulate(h, shift_msa, scale_msa)
        h_c = modulate(text.norm(context), shift_msa_c, scale_msa_c)        # (B, L, d)
        h, h_c = attend(image.attn(h), text.attn(h_c))                      # (B, N, d), (B, L, d)
        x = image.update(x, h, gate_msa, shift_mlp, scale_mlp, gate_mlp)
        if not self.last:
            gate_msa_c, shift_mlp_c, scale_mlp_c, gate_mlp_c = rest_c
            context = text.update(context, h_c, gate_msa_c, shift_mlp_c, scale_mlp_c, gate_mlp_c)
        return x, context

def timestep_embedding(sigma, dim=256):
    """Sinusoids of 1000 sigma, cosines first. (B,) float32 -> (B, dim)
    In bf16, neighbouring noise levels would round to the same number."""
    assert sigma.dtype in (torch.float32,
                           torch.float64), f"sigma is {sigma.dtype}, expected float32"
    freqs = torch.exp(torch.arange(dim // 2, device=sigma.device) * (-math.log(10000) / (dim // 2)))
    angles = 1000 * sigma.float()[:, None] * freqs                          # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

class TimestepEmbedder(nn.Module):
    """The noise level as a condition. (B,) float32 -> (B, d)"""
    def __init__(self, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, sigma, dtype):
        """sigma (B,), float32 in [0, 1]; dtype: of the embedding -> (B, d)"""
        return self.mlp(timestep_embedding(sigma).to(dtype))                # (B, d)

class PooledTextEmbedder(nn.Module):
    """The pooled text as a condition. (B, 2048) -> (B, d)"""
    def __init__(self, pooled_dim, d):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(pooled_dim, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, pooled):
        """pooled (B, 2048) -> (B, d)"""
        return self.mlp(pooled)

class FinalLayer(nn.Module):
    """The last norm and modulation. MMDiT.velocity applies `linear`, the output layer of z,
    beside O'."""
    def __init__(self, d, patch, C):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))
        self.linear = nn.Linear(d, patch**2 * C)

    def forward(self, tokens, c):
        """tokens (B, N, d), c (B, d) -> (B, N, d)"""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return modulate(self.norm(tokens), shift, scale)

class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer (Esser et al. 2024, figure 2) and 3.5 Medium's MMDiT-X.
    With checkpoint_blocks set, backward recomputes each block's activations instead of keeping
    them."""
    def __init__(self, arch=MMDiTArch()):
        super().__init__()
        self.arch = arch
        self.checkpoint_blocks = False
        d = arch.width
        patches = nn.Conv2d(arch.in_channels, d, arch.patch, stride=arch.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.register_buffer("pos_embed", torch.zeros(1, arch.table**2, d))
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = PooledTextEmbedder(arch.pooled_dim, d)
        self.context_embedder = nn.Linear(arch.context_dim, d)
        blocks = [JointBlock(d, arch.qk_norm, dual=i in arch.dual, last=i == arch.depth - 1)
                  for i in range(arch.depth)]
        self.joint_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(d, arch.patch, arch.in_channels)
        if arch.detail_channels:
            self.add_details(arch.detail_channels)

    def add_details(self, D):
        """P' and O': the patch embedder and the output layer of z_d, as modules of their own."""
        d = self.arch.width
        p = self.arch.patch
        self.arch = replace(self.arch, detail_channels=D)
        self.P_prime = nn.Conv2d(D, d, p, stride=p, bias=False)         # x_embedder has the bias
        self.O_prime = nn.Linear(d, p * p * D)

    def positions(self, h, w):
        """The centre of the position table: (1, h * w, d). Raises: InputError beyond the table."""
        side = self.arch.table
        if max(h, w) > side:
            raise InputError(f"{w}x{h} tokens, but {side}x{side} positions in the table; ask for"
                             " fewer")
        top = (side - h) // 2
        left = (side - w) // 2
        return self.pos_embed.view(side, side, -1)[top:top + h, left:left + w].reshape(1, h * w, -1)

    def embed(self, x):
        """[z, z_d] -> tokens, without positions. (B, C + D, h p, w p) -> (B, h w, d)"""
        check_size(x.shape[-2:], self.arch.patch)
        z, z_d = x.type_as(self.x_embedder.proj.weight).tensor_split([self.arch.in_channels], dim=1)
        tokens = self.x_embedder.proj(z)
        if self.arch.detail_channels:                               # warm start: P' begins at zero
            tokens = tokens + self.P_prime(z_d)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def velocity(self, tokens, h, w):
        """The output layers, unpatched: (B, h w, d) -> (B, C + D, h p, w p)"""
        p = self.arch.patch
        heads = [self.final_layer.linear]
        if self.arch.detail_channels:
            heads.append(self.O_prime)
        u = [rearrange(head(tokens), "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=p)
             for head in heads]
        return torch.cat(u, dim=1)                                          # (B, C + D, h p, w p)

    def forward(self, x, sigma, context, pooled, skip_layers=()):
        """x (B, C, H, W), noised latent (1 - sigma) z + sigma noise, normalised; or C + D channels:
        [z, z_d]; sigma (B,), float32 in [0, 1], 1 is pure noise; context (B, L, 4096),
        pooled (B, 2048): the text
        -> velocity noise - z, like x. Blocks in skip_layers are left out (skip-layer guidance)."""
        dtype = self.context_embedder.weight.dtype
        h, w = (side // self.arch.patch for side in x.shape[-2:])
        tokens = self.embed(x) + self.positions(h, w)                       # (B, h w, d)
        context = self.context_embedder(context.to(dtype))                  # (B, L, d)
        c = self.t_embedder(sigma, dtype) + self.y_embedder(pooled.to(dtype))           # (B, d)

        for i, block in enumerate(self.joint_blocks):
            if i in skip_layers:
                continue
            if self.checkpoint_blocks:
                tokens, context = checkpoint(block, tokens, context, c, use_reentrant=False)
            else:
                tokens, context = block(tokens, context, c)

        tokens = self.final_layer(tokens, c)                                # (B, h w, d)
        return self.velocity(tokens, h, w).to(x.dtype)                      # (B, C + D, H, W)

    def compile_blocks(self):
        """Regional compilation: three graphs (dual, plain, last) a shape, whatever the depth."""
        torch._dynamo.config.recompile_limit = 64                       # 8 would do for two shapes
        for block in self.joint_blocks:
            block.compile(fullgraph=True, dynamic=False)
        return self

# Original name -> diffusers' names, outside the blocks and in each block. Three names stand for q,
# k and v, which are one linear layer in the original.
MODEL_PAIRS = {
    "x_embedder.proj":                      ["pos_embed.proj"],
    "t_embedder.mlp.0":                     ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2":                     ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0":                     ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2":                     ["time_text_embed.text_embedder.linear_2"],
    "context_embedder":                     ["context_embedder"],
    "final_layer.adaLN_modulation.1":       ["norm_out.linear"],
    "final_layer.linear":                   ["proj_out"]}
BLOCK_PAIRS = {
    "x_block.adaLN_modulation.1":           ["norm1.linear"],
    "x_block.attn.qkv":                     ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn.ln_q":                    ["attn.norm_q"],
    "x_block.attn.ln_k":                    ["attn.norm_k"],
    "x_block.attn.proj":                    ["attn.to_out.0"],
    "x_block.attn2.qkv":                    ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.ln_q":                   ["attn2.norm_q"],
    "x_block.attn2.ln_k":                   ["attn2.norm_k"],
    "x_block.attn2.proj":                   ["attn2.to_out.0"],
    "x_block.mlp.fc1":                      ["ff.net.0.proj"],
    "x_block.mlp.fc2":                      ["ff.net.2"],
    "context_block.adaLN_modulation.1":     ["norm1_context.linear"],
    "context_block.attn.qkv":               ["attn.add_q_proj", "attn.add_k_proj",
                                             "attn.add_v_proj"],
    "context_block.attn.ln_q":              ["attn.norm_added_q"],
    "context_block.attn.ln_k":              ["attn.norm_added_k"],
    "context_block.attn.proj":              ["attn.to_add_out"],
    "context_block.mlp.fc1":                ["ff_context.net.0.proj"],
    "context_block.mlp.fc2":                ["ff_context.net.2"]}

def mmdit_pairs(depth):
    """Original module name -> list of diffusers' names, for a model of `depth` blocks."""
    pairs = dict(MODEL_PAIRS)
    for i in range(depth):
        for name, theirs in BLOCK_PAIRS.items():
            pairs[f"joint_blocks.{i}.{name}"] = [f"transformer_blocks.{i}.{part}"
                                                 for part in theirs]
    return pairs

def swap_scale_shift(name, depth, tensor):
    """Swap the halves of a modulation that has no gate: diffusers puts scale before shift there.
    Other tensors pass through. The rule is its own inverse."""
    last_context = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1"
    if name not in ("final_layer.adaLN_modulation.1", last_context):
        return tensor
    first, second = tensor.chunk(2)
    return torch.cat([second, first])

def mmdit_from_diffusers(state):
    """An MMDiT state dict in diffusers' names -> the original names. One that has the original names
    passes through."""
    if "pos_embed.proj.weight" not in state:
        return state
    state = dict(state)
    out = {}
    if "pos_embed.pos_embed" in state:
        out["pos_embed"] = state.pop("pos_embed.pos_embed")

    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")),
                    default=-1)
    for name, theirs in mmdit_pairs(depth).items():
        for leaf in ".weight", ".bias":
            parts = [state.pop(part + leaf) for part in theirs if part + leaf in state]
            if parts:
                out[name + leaf] = swap_scale_shift(name, depth, torch.cat(parts))
    return out | state                                              # load_strict names leftovers

def mmdit_to_diffusers(state, depth):
    """The inverse: original names -> diffusers', contiguous. P' and O' must be fused in
    (fuse_details)."""
    out = {"pos_embed.pos_embed": state["pos_embed"].contiguous()}
    for name, theirs in mmdit_pairs(depth).items():
        for leaf in ".weight", ".bias":
            if name + leaf not in state:                        # no qk-norm, no second attention
                continue
            tensor = swap_scale_shift(name, depth, state[name + leaf])
            for part, rows in zip(theirs, tensor.chunk(len(theirs))):       # q, k and v
                out[part + leaf] = rows.contiguous()
    return out

def split_details(state, C=16):
    """An expanded model's fused x_embedder.proj and final_layer.linear -> the base's and P', O'.
    Rows of final_layer.linear are interleaved per position of the patch. Every SD3 has C = 16."""
    weight = state["x_embedder.proj.weight"]
    if weight.shape[1] <= C:
        return state
    state = dict(state)
    sizes = [C, weight.shape[1] - C]
    state["x_embedder.proj.weight"], state["P_prime.weight"] = weight.split(sizes, dim=1)
    for leaf in "weight", "bias":
        # (p p, C + D, ...)
        rows = state[f"final_layer.linear.{leaf}"].unflatten(0, (-1, sum(sizes)))
        base, detail = (part.flatten(0, 1) for part in rows.split(sizes, dim=1))
        state[f"final_layer.linear.{leaf}"] = base
        state[f"O_prime.{leaf}"] = detail
    return state

def fuse_details(state, patch=2):
    """The inverse of split_details."""
    if "P_prime.weight" not in state:
        return state
    state = dict(state)
    base = state["x_embedder.proj.weight"]
    state["x_embedder.proj.weight"] = torch.cat([base, state.pop("P_prime.weight")], dim=1)
    for leaf in "weight", "bias":
        parts = [state[f"final_layer.linear.{leaf}"], state.pop(f"O_prime.{leaf}")]
        rows = [part.unflatten(0, (patch**2, -1)) for part in parts]        # (p p, C or D, ...)
        state[f"final_layer.linear.{leaf}"] = torch.cat(rows, dim=1).flatten(0, 1)
    return state

def adapter_pairs(depth):
    """Name of a linear layer -> its parts' names in an adapter, as diffusers' LoRA loader reads
    them."""
    return {name: [f"transformer.{part}" for part in theirs]
            for name, theirs in mmdit_pairs(depth).items()}

def base_hash(state):
    """What tells the base of an adapter from others: 16 hex digits of the first block's q, k, v."""
    weight = state["joint_blocks.0.x_block.attn.qkv.weight"]
    return hashlib.sha256(weight.to("cpu",
                                    torch.bfloat16).view(torch.int16).numpy()).hexdigest()[:16]

def is_adapter(source):
    """Whether a file is one that finetune_dit.py's export_adapter wrote."""
    if not Path(source).is_file() or not is_safetensors(source):
        return False
    return "adapter_over" in read_metadata(source)

def apply_adapter(state, path):
    """The base transformer's state dict, in the original names
    -> the tuned one's, P' and O' fused in.
    Raises: InputError for an adapter over another base, with keys that the base does not have, or
    with half of a pair of factors."""
    if read_metadata(path)["adapter_over"] != base_hash(state):
        raise InputError(f"{path} was trained over another base than this --model")
    adapter = read_file(path)
    state = dict(state)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("joint_blocks."))
    for name, parts in adapter_pairs(depth).items():
        if f"{parts[0]}.lora_A.weight" in adapter:
            deltas = []
            for part in parts:                          # q, k and v have factors of their own
                down, up = (adapter.pop(f"{part}.lora_{letter}.weight", None) for letter in "AB")
                if down is None or up is None:
                    raise InputError(f"{path}: {part} lacks one of lora_A, lora_B; export it again")
                deltas.append(up.float() @ down.float())
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight.float() + torch.cat(deltas)
    for name in [name for name in adapter if name.startswith("davae.")]:
        state[name.removeprefix("davae.")] = adapter.pop(name)
    if adapter:
        raise InputError(f"{path}: unknown {min(adapter)}; it fits no layer of this --model")
    return state

def load_mmdit(source=SD35_MEDIUM, dtype=torch.float32, device="cpu", base=None):
    """Strictly load SD3 Medium, SD3.5 Medium or Large, or our export, in either layout
    -> MMDiT, frozen. An adapter is merged into the transformer of `base`.
    Raises: InputError for another network's weights, missing keys or other shapes."""
    if is_adapter(source):
        if base is None:
            raise InputError(f"{source} is an adapter; expected the --model that it was trained"
                             " over")
        state = apply_adapter(mmdit_from_diffusers(read_weights(base, "dit")), source)
    else:
        state = mmdit_from_diffusers(read_weights(source, "dit"))
    try:
        state = split_details(state)
        arch = MMDiTArch.from_state_dict(state)
    except (LookupError, ValueError):
        raise InputError(f"{source}: not an SD3 transformer: {', '.join(sorted(state)[:3])}"
                         " ...") from None
    return load_strict(lambda: MMDiT(arch), state, source, dtype, device)

# ------------------------------------------------------------ the flow, and sampling along it
def shift_timesteps(sigma, shift):
    """Timestep shift: more steps at high noise, as larger images need
    (Esser et al. 2024, Eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)

def get_sigmas(steps, shift):
    """Noise levels from 1 to 0, as the reference implementation has them: both ends are shifted, the
    levels between are evenly spaced, and then all are shifted again. (steps + 1,) float32"""
    last = shift_timesteps(1 / 1000, shift)
    even = torch.linspace(1, last, steps, dtype=torch.float64)
    return F.pad(shift_timesteps(even, shift), (0, 1)).float()

@torch.no_grad()
def generate(mmdit, vae, text, prompts, height, width, steps=28, cfg=4.5, shift=3.0, seeds=None,
             noise=None, negative="", return_latents=False, slg=0.0, slg_layers=(7, 8, 9),
             slg_window=(0.01, 0.2), progress=False):
    """Images of `prompts`: Euler steps of the flow x_t = (1 - t) z + t noise from t = 1 to 0,
    with guidance.
    text:    the TextEncoders of load_text_encoders, or ready embeddings: (context, pooled) of the
             prompts, with cfg > 1 followed by the negative's, each (B, ...) or (1, ...)
    cfg:     guidance scale (Ho 2022); at 1 or below it is off: the conditional prediction alone
    seeds:   one an image (default 0, 1, ...), each with a generator of its own, on the CPU, so
             that an image does not depend on its batch or device
    noise:   (B, C, height/f, width/f), instead of seeds
    slg:     skip-layer guidance's scale (SD3.5 Medium: 2.5 with cfg 4), in slg_window of the steps
    returns  (B, 3, height, width), about [-1, 1], or with return_latents the normalised latents
    Raises:  InputError for a size, a layer or a number of embeddings that does not fit."""
    B = len(prompts)
    C = mmdit.arch.in_channels + mmdit.arch.detail_channels
    check_size((height, width), vae.f * mmdit.arch.patch)
    if slg and max(slg_layers, default=0) >= mmdit.arch.depth:
        raise InputError(f"skip-layer guidance of layers {[*slg_layers]} of {mmdit.arch.depth}:"
                         " --slg-layers")

    # The text: with guidance, the negative's B rows follow the prompts' B rows.
    if callable(text):
        context, pooled = text(prompts)
        negatives = text([negative]) if cfg > 1 else ()
    else:
        if len(text) != 4 and (cfg > 1 or len(text) != 2):
            raise InputError(f"{len(text)} embeddings; expected context, pooled, and with cfg the"
                             " negative's")
        context, pooled, *negatives = text
    context = context.expand(B, -1, -1)                                     # (B, L, 4096)
    pooled = pooled.expand(B, -1)                                           # (B, 2048)
    if cfg > 1:
        no_context, no_pooled = negatives
        context = torch.cat([context, no_context.expand(B, -1, -1)])        # (2 B, L, 4096)
        pooled = torch.cat([pooled, no_pooled.expand(B, -1)])               # (2 B, 2048)

    # The start: noise of each image's own seed.
    if noise is None:
        shape = C, height // vae.f, width // vae.f
        rngs = [torch.Generator().manual_seed(seed)
                for seed in (range(B) if seeds is None else seeds)]
        noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])  # (B, C, H/f, W/f)
    device = mmdit.context_embedder.weight.device
    x = noise.to(device, torch.float32)
    context = context.to(device)
    pooled = pooled.to(device)
    rows = len(context)
    sigmas = get_sigmas(steps, shift).to(device)

    for i in trange(steps, disable=not progress, desc="denoise", leave=False):
        u = mmdit(x.repeat(rows // B, 1, 1, 1), sigmas[i].expand(rows), context, pooled)
        u_text = u[:B]
        if cfg > 1:                                                     # classifier-free guidance
            u = u[B:] + cfg * (u_text - u[B:])
        if slg and slg_window[0] * steps < i < slg_window[1] * steps:
            u = u + slg * (u_text - mmdit(x, sigmas[i].expand(B), context[:B], pooled[:B],
                                          slg_layers))
        x = x + (sigmas[i + 1] - sigmas[i]) * u                             # dx/dt = u = noise - z
    return x if return_latents else vae.decode(x).float()

# ------------------------------------------------------------ the command
PROMPTS = [                                     # of the embedded model's world
    "a red circle with vertical stripes on a blue background",
    "a yellow star with checks on a green background",
    "a blue square with falling stripes on a pink background",
    "a green triangle with rising stripes on a purple background"]
WINDOW = 256                                    # pictures whose embeddings are held at once

def size_of(text):
    """ "1024" or "1536x1024" (width x height) -> (height, width)"""
    width, _, height = text.partition("x")
    return positive_int(height or width), positive_int(width)
size_of.__name__ = "size"                       # argparse: "invalid size value: '12a'"

def parse_args(argv=None):
    """The command's arguments; those left at None have one default for stock models,
    another for DA-VAE."""
    p = Parser(__doc__)
    g = p.add_mutually_exclusive_group()
    g.add_argument("prompts", nargs="*", default=[], metavar="PROMPT",
                   help="What to draw (default: four prompts of the embedded model's world).")
    g.add_argument("--prompt-file", metavar="FILE",
                   help="Prompts from a file instead: one a line; .json as MJHQ-30K has it; .jsonl,"
                        " GenEval's among them; .csv; or .tsv, as PartiPrompts has it.")
    p.add_argument("--column", default="prompt",
                   help="Which field of a .json, .jsonl, .csv or .tsv is the prompt (default"
                        " prompt).")

    g = p.add_argument_group("model")
    g.add_argument("--model", default=TINY_MODEL,
                   help=f"Folder or hub id, such as {SD35_MEDIUM} (default: the embedded model).")
    g.add_argument("--dit", metavar="FILE",
                   help="A fine-tuned transformer of finetune_dit.py, or its adapter over --model.")
    g.add_argument("--davae", metavar="FILE",
                   help="The DA-VAE it was tuned over, made by align.py.")
    g.add_argument("--compare", action="store_true",
                   help="Draw with the stock model too, and time both.")
    g = g.add_mutually_exclusive_group()
    g.add_argument("--no-t5", action="store_true", help="Leave T5 out: its tokens are zeros.")
    g.add_argument("--max-t5", type=positive_int,
                   help="Number of T5 tokens (default 256; with DA-VAE as in its training).")

    g = p.add_argument_group("picture")
    g.add_argument("--size", type=size_of,
                   help="Image side in pixels, or width x height (default 1024; embedded model"
                        " 64).")
    g.add_argument("--n", "--per-prompt", type=positive_int, default=1,
                   help="Pictures a prompt (default 1); under torchrun --per-prompt, since torchrun"
                        " takes --n for its own.")
    g.add_argument("--steps", type=positive_int, help="Euler steps (default 28; with DA-VAE 30).")
    g.add_argument("--cfg", type=non_negative,
                   help="Guidance scale; 1 or less is none, at half the cost (default 4.5; with"
                        " DA-VAE 2.5).")
    g.add_argument("--shift", type=positive,
                   help="Timestep shift (default 3; with DA-VAE as in its training).")
    g.add_argument("--seed", type=seed_int, default=0,
                   help="Seed of a prompt's first picture; the next one has one more (default 0).")
    g.add_argument("--negative", default="", metavar="PROMPT",
                   help="What guidance leads away from (default: the empty prompt).")
    g.add_argument("--slg", type=non_negative, default=0.0,
                   help="Scale of skip-layer guidance; SD3.5 Medium: 2.5 with --cfg 4 (default 0,"
                        " off).")
    g.add_argument("--slg-layers", type=count_or_0, nargs="*", default=[7, 8, 9],
                   help="The layers that it skips (default 7 8 9).")

    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto).")
    g.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                   help="Number format (default auto: bf16 on cuda).")
    g.add_argument("--batch", type=positive_int, default=4, help="Pictures at a time (default 4).")
    g.add_argument("--compile", action="store_true",
                   help="Compile the blocks with torch.compile: a slow start, then fast steps.")
    add_attention_flag(g)
    g.add_argument("--offload", action="store_true",
                   help="Keep one network at a time on the device.")
    g.add_argument("--tile", type=count_or_0, default=0,
                   help="Decode in strips of so many rows, to save memory (default 0: whole).")
    g.add_argument("--out", type=folder_path, default=Path("samples"),
                   help="Folder for the PNGs (default samples).")
    return p.parse_args(argv)

def read_records(path, column="prompt"):
    """A prompt file -> list of dicts, each with its prompt under "prompt", and what else its entry
    holds.
    A text file has one prompt a line: blank lines and a byte-order mark are skipped,
    and only a line feed ends a line, with or without a carriage return.
    A .csv, .tsv, .jsonl or .json has the prompt under `column`; a .json is a list of entries,
    or as MJHQ-30K's meta_data.json {id: entry}.
    Raises: InputError if unreadable, without a prompt, or with an entry that has none."""
    suffix = Path(path).suffix.lower()
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if suffix in (".csv", ".tsv"):
            records = read_csv(text, "," if suffix == ".csv" else "\t")
        elif suffix in (".jsonl", ".ndjson"):
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif suffix == ".json":
            records = json.loads(text)
            if isinstance(records, dict):
                records = [entry | {"id": name} for name, entry in records.items()]
            if not isinstance(records, list):
                raise ValueError(f"it holds {text:.40}")
        else:
            lines = (line.strip() for line in re.split("\r?\n", text))
            return [{"prompt": line} for line in lines if line] or no_prompts(path)
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e}); expected one prompt a"
                         " line") from None
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: not a whole {suffix} file of entries ({e})") from None
    for number, record in enumerate(records, 1):
        prompt = record.get(column) if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            fields = ", ".join(record) if isinstance(record, dict) else f"{record!r:.40}"
            raise InputError(f"{path}, entry {number}: no text under {column!r}, but {fields};"
                             " --column names another")
        whole_text(prompt, f"{path}, entry {number}")
    return [record | {"prompt": record[column].strip()} for record in records] or no_prompts(path)

def no_prompts(path):
    """Raises: InputError."""
    raise InputError(f"{path}: no prompt in it; expected one a line")

def read_prompts(path, column="prompt"):
    """The prompts of read_records alone."""
    return [record["prompt"] for record in read_records(path, column)]

def mjhq_name(record):
    """category/id, as MJHQ-30K's pictures are called, of an entry that has both; else None
    Raises: InputError where that is no file below the folder: one of the two is empty, or leads up."""
    if not {"id", "category"} <= record.keys():
        return None
    name = f"{record['category']}/{record['id']}"
    parts = re.split(r"[/\\]", name)                       # Windows parts paths at both
    if None in (record["category"], record["id"]) or {"", ".", ".."} & set(parts):
        raise InputError(f"category {record['category']!r:.40}, id {record['id']!r:.40}: a picture is"
                         " called category/id, and this is no file's name; fill in both, or rename"
                         " one column")
    return name

class Job(NamedTuple):
    """One picture to draw."""
    prompt: str
    seed: int
    name: str                           # of its file in --out, without suffix

def list_jobs(args):
    """Every picture of the command, in order -> list of Job, and the records of a GenEval list or None
    Prompts given by hand share their seeds, so that they can be compared; each picture of a file has
    a seed of its own.
    Names are 0000, 0001, ...; MJHQ's category/id; or as GenEval's scorer reads them.
    Raises: InputError for two pictures of one name; see read_records and mjhq_name."""
    whole_text(args.negative, "--negative")
    if not args.prompt_file:
        prompts = [whole_text(prompt, "prompt") for prompt in args.prompts or PROMPTS]
        pairs = [(prompt, args.seed + k) for prompt in prompts for k in range(args.n)]
        return [Job(prompt, seed, f"{i:04d}") for i, (prompt, seed) in enumerate(pairs)], None
    records = read_records(args.prompt_file, args.column)
    geneval = records if all(GENEVAL_FIELDS <= record.keys() for record in records) else None
    jobs = []
    for number, record in enumerate(records):
        for k in range(args.n):
            name = f"{len(jobs):04d}"
            if geneval:
                name = f"{number:05d}/samples/{k:04d}"
            elif mjhq_name(record):
                name = mjhq_name(record) + (f"-{k}" if args.n > 1 else "")
            jobs.append(Job(record["prompt"], args.seed + len(jobs), name))
    name, times = Counter(job.name for job in jobs).most_common(1)[0]
    if times > 1:
        raise InputError(f"{args.prompt_file}: {times} pictures would be called {name}.png; give each"
                         " entry a category and id of its own")
    return jobs, geneval

def settings_of(args, dit, dtype):
    """What a picture by the transformer `dit` depends on besides its prompt and seed (dict),
    with what the arguments leave open; it is written into the picture."""
    da = dit == args.dit
    height, width = args.size
    cfg = args.cfg
    if cfg is None:
        cfg = 2.5 if da else 4.5
    shift = args.shift
    if shift is None:
        shift = float(read_metadata(dit).get("shift", 3.0)) if da else 3.0
    steps = args.steps or (30 if da else 28)
    settings = dict(transformer=dit, size=f"{width}x{height}", steps=steps, cfg=cfg, shift=shift,
                    slg=args.slg, negative=args.negative, dtype=str(dtype).removeprefix("torch."),
                    t5="left out" if args.no_t5 else f"{args.max_t5} tokens")
    if args.slg:
        settings["slg_layers"] = args.slg_layers
    if da:                                  # the same file may hold the weights of a later training
        settings |= {"weights": file_hash(dit), "davae": file_hash(args.davae), "model": args.model}
    return settings

def picture_file(args, model, job):
    """Where a job's picture by the model of that name lies."""
    return args.out / (f"{job.name}-{model}.png" if args.compare else f"{job.name}.png")

def read_settings(file):
    """The text of a PNG that save_png wrote: {"prompt": ..., "seed": ..., ...}, all str.
    Raises: InputError if it is not whole."""
    try:
        with Image.open(file) as image:
            return dict(image.text)
    except (OSError, ValueError, AttributeError) as e:
        raise InputError(f"{file}: not a whole PNG ({e}); delete it") from None

def find_done(args, models, settings, jobs):
    """{model: numbers of the `jobs` whose pictures are in --out already}
    Pictures of another run are named and left as they are. With a --prompt-file they are refused,
    so that pictures of two runs are never mixed.
    Raises: InputError for that."""
    done = {model: set() for model in models}
    others = []
    own = set()
    for model in models:
        for i, job in enumerate(jobs):
            file = picture_file(args, model, job)
            own.add(file)
            if file.is_file():
                expected = dict(prompt=job.prompt, seed=job.seed, **settings[model])
                found = read_settings(file)
                if all(found.get(k) == str(v) for k, v in expected.items()):
                    done[model].add(i)
                else:
                    others.append(str(file.relative_to(args.out)))
    numbered = re.compile(r"\d{4,}(-.+)?\.png")
    for depth in {job.name.count("/") for job in jobs}:     # category/id.png is one folder down
        for path in sorted(args.out.glob("*/" * depth + "*.png")):
            if path not in own and (depth > 0 or numbered.fullmatch(path.name)):
                others.append(str(path.relative_to(args.out)))
    if others:
        what = f"{args.out} holds {len(others)} pictures of another run ({others[0]}, ...)"
        if args.prompt_file:
            raise InputError(f"{what}; give another --out, or delete them")
        print(f"{what}; those of the same number are replaced, the others stay", flush=True)
    return done

def batches_left(count, batch, done, rank, ranks):
    """This rank's batches of numbers below `count` that are not all `done`.
    A batch is always drawn whole, however many ranks there are and whatever is there already: the
    last digits of the arithmetic depend on the size of a batch, and every run of the same command
    gives the same pictures."""
    batches = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
    return [numbers for numbers in batches[rank::ranks] if not set(numbers) <= done]

def encode_prompts(args, prompts, text, reported):
    """Embeddings of the prompts, batch by batch, and of the negative, on the CPU
    -> list of (context (B, L, 4096), pooled (B, 2048)), the negative's pair
    Prompts that are cut are named on stderr, unless the set `reported` has them;
    it gets them here."""
    for prompt in dict.fromkeys([*prompts, args.negative]):
        lost = text.lost(prompt)
        if lost and prompt not in reported:
            print(f"prompt {prompt[:40]!r}... is cut: {'; '.join(lost.values())}", file=sys.stderr)
            reported.add(prompt)
    embeddings = []
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first:first + args.batch]
        different = list(dict.fromkeys(batch))
        rows = [different.index(prompt) for prompt in batch]
        context, pooled = text(different)
        embeddings.append((context[rows].cpu(), pooled[rows].cpu()))
    context, pooled = text([args.negative])
    return embeddings, (context.cpu(), pooled.cpu())

def load_autoencoders(args, placement):
    """-> the models to draw with: {name: (the transformer's weights, VAE or DAVAE)}
    Raises: InputError for a size that is no multiple of theirs, or a --dit of another --davae."""
    device = "cpu" if args.offload else placement["device"]
    vae = load_vae(args.model, placement["dtype"], device)
    models = {}
    if args.compare or not args.dit:
        models["stock"] = args.model, vae
    if args.dit:
        models["DA-VAE"] = args.dit, load_davae(args.davae, vae)
        trained_over = read_metadata(args.dit).get("davae", "")
        if trained_over not in ("", file_hash(args.davae)):
            raise InputError(f"{args.dit} was not trained over {args.davae} (its hash:"
                             f" {trained_over})")
    for _, vae in models.values():
        check_size(args.size, 2 * vae.f)                # every SD3 has patch 2
        vae.to(memory_format=torch.channels_last).decoder.in_strips(args.tile)
    return models

def load_transformer(args, dit, vae, settings, placement):
    """-> the MMDiT, compiled if asked for. Raises: InputError for a size beyond its table of
    positions, and for latents of other channels than the autoencoder's."""
    mmdit = load_mmdit(dit, base=args.model, **placement)
    detail = vae.D if isinstance(vae, DAVAE) else 0
    if (mmdit.arch.in_channels, mmdit.arch.detail_channels) != (vae.C, detail):
        raise InputError(f"{dit}: draws {mmdit.arch.in_channels} + {mmdit.arch.detail_channels}"
                         f" channels, the autoencoder reads {vae.C} + {detail}; --dit and --davae are"
                         " of one training, --model is a stock model")
    if args.compile:
        mmdit.compile_blocks()
    height, width = args.size
    h = height // vae.f // mmdit.arch.patch
    w = width // vae.f // mmdit.arch.patch
    mmdit.positions(h, w)
    print(f"{dit}: {width}x{height} pixels, {w}x{h} tokens, {settings['steps']} steps, guidance"
          f" {settings['cfg']:g}, shift {settings['shift']:g}"
          f"{', T5 is left out' if args.no_t5 else ''}", flush=True)
    return mmdit

def all_fit(args, models, placement):
    """Whether the text encoders, which are loaded, may stay beside the transformers:
    they are then loaded once, not once a window. 4 GB are left for the work itself."""
    if args.offload:
        return False
    device = placement["device"]
    needed = 4e9
    for dit, _ in models.values():
        whole = args.model if is_adapter(dit) else dit      # an adapter holds only what was trained
        stored = sum(path.stat().st_size for path in find_weights(whole, "dit"))
        needed += stored * placement["dtype"].itemsize / 2  # at most: most files hold 16-bit numbers
    if device_type(device) == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return False
    return needed < free

class Writer:
    """Encodes and writes PNGs in threads, so that drawing goes on; at a low compression,
    which keeps up. Until the process ends no other run writes into `folder`: each would take the
    other's pictures for its own.
    Raises: InputError if another run is at work there."""
    def __init__(self, folder, rank):
        self.lock = lock(folder, rank)
        self.pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
        self.pending = deque()

    def add(self, file, image, **text):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.pending.append(self.pool.submit(save_png, file, image, compress_level=1, **text))
        while len(self.pending) > 32:                   # so that memory does not grow
            self.pending.popleft().result()

    def finish(self):
        """Wait for the last. Raises: OSError if one could not be written."""
        while self.pending:
            self.pending.popleft().result()

def draw(args, mmdit, vae, jobs, context, pooled, negative, settings):
    """A batch of jobs with its embeddings (B, L, 4096), (B, 2048) -> latents on the device"""
    height, width = args.size
    return generate(mmdit, vae, (context, pooled, *negative), [job.prompt for job in jobs], height,
                    width, settings["steps"], settings["cfg"], settings["shift"],
                    [job.seed for job in jobs], return_latents=True, slg=args.slg,
                    slg_layers=args.slg_layers, progress=True)

def draw_overview(args, models, jobs):
    """One picture of the first 64: models below each other, or a prompt's pictures side by side."""
    files = [picture_file(args, model, job) for model in models for job in jobs[:64]]
    if len(files) < 2:
        return
    images = [to_tensor(read_image(file)) for file in files]
    if args.compare:
        overview = grid(images, len(images) // len(models), rows=[*models])
    else:
        overview = grid(images, min(args.n if args.n > 1 else 4, len(images)))
    save_overview(args.out / "grid.png", overview)

def main(args):
    if bool(args.dit) != bool(args.davae) or args.compare and not args.dit:
        raise InputError("--dit and --davae go together, and --compare with them: a transformer,"
                         " its DA-VAE")
    if args.negative and args.cfg is not None and args.cfg <= 1:
        raise InputError(f"--negative is what guidance leads away from, and --cfg {args.cfg:g} is none;"
                         " give a larger one, or no --negative")
    args.size = args.size or ((64, 64) if is_tiny(args.model) else (1024, 1024))
    jobs, geneval = list_jobs(args)
    rank, ranks, device = init_distributed(args)
    placement = dict(dtype=pick_dtype(args.dtype, device), device=device)

    # the autoencoders, and the checks that are possible before the long loads
    models = load_autoencoders(args, placement)
    trained = read_metadata(args.dit) if args.dit else {}
    if args.dit and not {"shift", "max_t5", "davae"} <= trained.keys():
        print0(rank, f"warning: {args.dit} has lost what finetune_dit.py wrote into its header: the"
                     " shift, T5 tokens and DA-VAE of its training; give --shift and --max-t5, and"
                     " see that --davae is right")
    args.max_t5 = args.max_t5 or int(trained.get("max_t5", 256))
    writer = Writer(args.out, rank)

    # this rank's batches, without those that an earlier run with the same settings left
    settings = {model: settings_of(args, dit, placement["dtype"])
                for model, (dit, _) in models.items()}
    done = find_done(args, models, settings, jobs)
    left = {model: batches_left(len(jobs), args.batch, done[model], rank, ranks)
            for model in models}
    if any(done.values()):
        print0(rank,
               f"{args.out}: {sum(map(len, done.values()))} of its pictures are there already")
    if geneval and rank == 0:
        for number, record in enumerate(geneval):
            folder = args.out / f"{number:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            (folder / "metadata.jsonl").write_text(json.dumps(record))
    barrier()                                           # nobody writes before all have looked

    # In windows of batches, so that memory does not grow with the list of prompts. Networks are
    # loaded once if they all fit; else the text encoders leave before a transformer comes, and
    # come again for the next window.
    text = None
    transformers = {}
    reported = set()
    window = max(1, WINDOW // args.batch)
    for model, (dit, vae) in models.items():
        start = time.time()
        drawn = 0
        for first in range(0, len(left[model]), window):
            part = left[model][first:first + window]
            prompts = [jobs[i].prompt for numbers in part for i in numbers]
            if text is None:
                transformers.clear()
                gc.collect()                            # a compiled transformer is freed only so
                text = load_text_encoders(args.model, max_t5=args.max_t5, t5=not args.no_t5,
                                          **placement)
                keep = all_fit(args, models, placement)
                if len(left[model]) > window:
                    print0(rank, "the text encoders stay beside the transformer" if keep else
                           "the text encoders do not fit beside the transformer: they are loaded"
                           f" anew every {window * args.batch} pictures")
            embeddings, negative = encode_prompts(args, prompts, text, reported)
            if not keep:
                text = None
                transformers.clear()
            if model not in transformers:
                transformers[model] = load_transformer(args, dit, vae, settings[model], placement)

            latents = []
            for numbers, (context, pooled) in zip(tqdm(part, "batches", disable=len(part) < 2),
                                                  embeddings):
                batch = [jobs[i] for i in numbers]
                z = draw(args, transformers[model], vae, batch, context, pooled, negative,
                         settings[model])
                latents.append((batch, z.cpu() if args.offload else z))
                if not args.offload:
                    drawn += decode(args, model, vae, latents, settings[model], writer, device)
            if args.offload:                            # one network at a time
                transformers.clear()
                gc.collect()
                vae.to(device)
                drawn += decode(args, model, vae, latents, settings[model], writer, device)
                vae.to("cpu")
        writer.finish()
        print(f"{model}: {drawn} pictures in {time.time() - start:.1f} s, loading included, peak"
              f" memory {peak_memory(device):.2f} GB on {device}", flush=True)
    barrier()
    if rank == 0:
        draw_overview(args, models, jobs)
        only = picture_file(args, [*models][-1], jobs[-1])
        print(only if len(jobs) == 1 else args.out / "grid.png")

def decode(args, model, vae, latents, settings, writer, device):
    """Decode and write the (jobs, latents) of a list, which is emptied -> how many pictures
    Raises: InputError for a picture that holds nan or inf, which a PNG would show as black."""
    count = 0
    while latents:
        batch, z = latents.pop(0)
        for job, one in zip(batch, z):                  # one at a time, for memory
            image = vae.decode(one[None].to(device))[0].float().cpu()                   # (3, H, W)
            if not image.isfinite().all():
                raise InputError(f"{model}, prompt {job.prompt[:40]!r}, seed {job.seed}: the picture"
                                 " holds nan or inf; try --dtype fp32, or another --attention")
            writer.add(picture_file(args, model, job), image, prompt=job.prompt, seed=job.seed,
                       **settings)
            count += 1
    return count

if __name__ == "__main__":
    run(main, parse_args())
