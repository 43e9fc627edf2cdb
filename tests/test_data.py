"""A stranger's folder of pictures: what is read, what is passed over and counted, what is refused by name."""
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae_expand import (TINY_MODEL, ImageDataset, InputError, Place, adm_crop, list_images, listing_digest, read_image,
                        read_sides)

def picture(path, seed=0, size=(24, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path

def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()

def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, value in members:
            member = tarfile.TarInfo(name)
            if isinstance(value, tuple):
                member.type, member.linkname = value
                tar.addfile(member)
            else:
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    return path

def captions_of(folder):
    data = ImageDataset(folder, 16, "all", "adm", flip=False, shuffle=False)
    return dict(zip((item.name for item in data.items), data.sample(range(len(data.items)))[1]))

CAPTIONS = {    # picture: (file beside, its bytes, caption)
    "A.JPG": ("A.TXT", b"one", "one"),
    "b.jpg": ("b.jpg.txt", b"two\n", "two"),
    "c.png": ("c.caption", b"three", "three"),
    "d.png": ("d.txt", b"\xef\xbb\xbffour", "four"),
    unicodedata.normalize("NFD", "m\u00fcller.png"): (unicodedata.normalize("NFC", "m\u00fcller.txt"), b"five", "five"),
    "e.png": ("other.txt", b"six", "")}

def test_captions_beside_pictures(tmp_path):
    for name, (file, content, _) in CAPTIONS.items():
        picture(tmp_path / name)
        (tmp_path / file).write_bytes(content)
    assert captions_of(tmp_path) == {name: caption for name, (_, _, caption) in CAPTIONS.items()}
    summary = list_images(tmp_path).summary
    assert "6 pictures; captions 1 in .caption, 4 in .txt, 1 missing" in summary
    assert "1 captions of no picture" in summary

def test_metadata_names_are_normalised(tmp_path):
    for name in ("a.png", "sub/g.png", "sub/b.png", "z.png"):
        picture(tmp_path / name)
    lines = [{"file_name": "./a.png", "text": "a"}, {"file_name": "sub\\g.png", "text": "g"},
             {"file_name": str(tmp_path / "z.png"), "text": "line\u2028separator"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,\"b, with a comma\"\n")
    assert captions_of(tmp_path) == {
        "a.png": "a", "z.png": "line\u2028separator", "sub/b.png": "b, with a comma", "sub/g.png": "g"}

@pytest.mark.parametrize("line", [
    {"file_name": "gone.png", "text": "x"}, {"file_name": "a.png", "text": None}, {"file_name": "a.png", "text": ["x"]},
    {"file_name": "a.png"}, {"text": "x"}, ["a.png", "x"]])
def test_metadata_that_is_not_understood_is_refused(tmp_path, line):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match="metadata"):
        list_images(tmp_path)

@pytest.mark.parametrize("row", ["a.png,a cat, sitting\n", 'a.png,"a cat\n', 'a.png,"' + "a cat\n" * 30000])
def test_a_metadata_csv_that_would_lose_text_is_refused(row, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + row)
    with pytest.raises(InputError, match="metadata.csv: expected lines"):
        list_images(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a ""cat"", sitting",,\n')
    assert captions_of(tmp_path) == {"a.png": 'a "cat", sitting'}

def test_a_second_text_of_a_picture_is_refused(tmp_path):
    """A row a caption, as COCO's lists have them: all but the last would be lost. The same text twice loses nothing."""
    picture(tmp_path / "a.png")
    one, other = ('{"file_name": "%sa.png", "text": "%s"}\n' % pair for pair in (("", "one"), ("./", "two")))
    (tmp_path / "metadata.jsonl").write_text(one + one)
    assert captions_of(tmp_path) == {"a.png": "one"}
    (tmp_path / "metadata.jsonl").write_text(one + other)
    with pytest.raises(InputError, match='entry 2: a second text for ./a.png; .*"texts"'):
        list_images(tmp_path)

def test_empty_texts_of_metadata_are_counted_as_missing(tmp_path):
    for name, text in (("a.png", "a cat"), ("b.png", ""), ("c.png", " \n")):
        picture(tmp_path / name)
        with open(tmp_path / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    assert "captions 1 in metadata.jsonl, 2 missing in metadata.jsonl" in list_images(tmp_path).summary
    assert captions_of(tmp_path) == {"a.png": "a cat", "b.png": "", "c.png": ""}

@pytest.mark.parametrize("file, content", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "a cat \\ud83d"}'), ("a.json", '{"caption": "a cat \\ud83d"}')])
def test_half_a_character_in_a_caption_is_refused(file, content, tmp_path):
    """JSON that was cut inside an emoji; tokenizers would end in a traceback, hours later."""
    picture(tmp_path / "a.png")
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=f"{file}.*half a character at place 6"):
        list_images(tmp_path)

CLASSES = {     # files: their labels
    ("cat/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/0.png", ".trash/1.png"): [0, 1],
    ("n01/images/a.png", "n02/images/b.png"): [0, 1],
    ("0/a.png", "1/a.png", "10/a.png", "2/a.png"): [0, 1, 3, 2],
    ("a.png", "b.png"): [0, 0]}

@pytest.mark.parametrize("files", CLASSES)
def test_classes_are_first_folders_in_their_order(tmp_path, files):
    for file in files:
        picture(tmp_path / file)
    assert [item.label for item in list_images(tmp_path).items] == CLASSES[files]

def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    picture(tmp_path / "data" / "dog" / "a.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog" / "loop").symlink_to(tmp_path / "data")
    listing = list_images(tmp_path / "data")
    assert listing.classes == ["cat", "dog"] and len(listing.items) == 2
    # two folders, each linked inside the other: every picture once by either way, then the circle closes
    for one, other in (("a", "b"), ("b", "a")):
        picture(tmp_path / "both" / one / "x.png")
        (tmp_path / "both" / one / "link").symlink_to(tmp_path / "both" / other)
    names = [item.name for item in list_images(tmp_path / "both").items]
    assert names == ["a/x.png", "a/link/x.png", "b/x.png", "b/link/x.png"]

def test_json_files_that_are_not_read_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.json").write_text('{"caption": "of no picture"}')
    assert "1 missing" in list_images(tmp_path).summary and "passed over: 1 .json" in list_images(tmp_path).summary

def test_pipes_are_no_pictures(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert len(list_images(tmp_path).items) == 1

def test_tars_classes_links_and_names(tmp_path):
    tar = write_tar(tmp_path / "wds.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(1)), ("1.cls", b"3\n")])
    assert [item.label for item in list_images(tar).items] == [7, 3]
    tar = write_tar(tmp_path / "links.tar", [
        ("./a.png", png(0)), ("./a.txt", b"a"), ("./b.png", (tarfile.LNKTYPE, "./a.png")),
        ("./sub/c.png", (tarfile.SYMTYPE, "../a.png")), ("x.png", (tarfile.SYMTYPE, "y.png")),
        ("y.png", (tarfile.SYMTYPE, "x.png"))])
    assert [item.name for item in list_images(tar).items] == ["a.png", "b.png", "sub/c.png"]
    tar = write_tar(tmp_path / "names.tar", [(name, png(i)) for i, name in enumerate(("a.png", "../a.png", "/a.png"))])
    assert len({item.place.offset for item in list_images(tar).items}) == 3
    tar = write_tar(tmp_path / "mac.tar", [("a.png", png(0)), ("__MACOSX/._a.png", b"\0\5\26\7"), ("._a.png", b"\0\5")])
    assert len(list_images(tar).items) == 1 and "passed over: 2 hidden" in list_images(tar).summary
    tar = write_tar(tmp_path / "half.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(1))])
    with pytest.raises(InputError, match=".cls"):
        list_images(tar)
    for number in (b"2147483648", b"9" * 5000):                                         # an id, not a class
        with pytest.raises(InputError, match="expected the number of a class"):
            list_images(write_tar(tmp_path / "large.tar", [("0.png", png(0)), ("0.cls", number)]))

def test_a_tar_with_more_behind_its_end_is_refused(tmp_path):
    """Two tars in one file, a damaged header in the middle, a header cut short: pictures would be lost."""
    one = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1)), ("2.png", png(2))])
    good = one.read_bytes()
    header = list_images(one).items[1].place.offset - 512
    damaged = good[:header] + b"?" + good[header + 1:]
    for name, content in (("two", good + good), ("damaged", damaged), ("cut", good[:header + 100])):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.tar: members, or a damaged one, behind the end"):
            list_images(tmp_path / f"{name}.tar")
    (tmp_path / "unmarked.tar").write_bytes(good[:len(good.rstrip(b"\0")) // 512 * 512 + 512])
    assert len(list_images(tmp_path / "unmarked.tar").items) == 3

def test_tars_below_and_beside(tmp_path):
    (tmp_path / "deep" / "sub").mkdir(parents=True)
    write_tar(tmp_path / "deep" / "sub" / "A.TAR", [("x.png", png(9))])
    assert len(list_images(tmp_path / "deep").items) == 1
    picture(tmp_path / "deep" / "0.png")
    with pytest.raises(InputError, match="1 pictures and 1 tars"):
        list_images(tmp_path / "deep")

def test_one_bad_picture_of_200_is_named_not_fatal(tmp_path):
    for i in range(200):
        picture(tmp_path / f"{i:03d}.png", i, (8, 8))
    (tmp_path / "100.png").write_bytes(b"no picture")
    val = ImageDataset(tmp_path, 8, "val", "adm", flip=False)
    assert val.sample(range(8))[0].shape == (8, 3, 8, 8) and list(val.broken) == ["100.png"]

def test_odd_exif_blocks_do_not_end_a_run(tmp_path):
    import struct
    header = b"Exif\0\0II*\0"
    damaged = struct.pack("<IH", 8, 2) + struct.pack("<HHIIHHIII", 0x112, 3, 1, 6, 0x11A, 10, 1, 38, 0)
    text = struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x112, 2, 2, 0x36) + bytes(4)
    for i, block in enumerate((damaged + struct.pack("<ii", -1, 0), text)):
        path = tmp_path / f"{i}.jpg"
        Image.new("RGB", (32, 24)).save(path, exif=header + block)
        assert read_image(path).size in ((32, 24), (24, 32))

def test_pictures_out_of_range_are_refused(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "unit.tif")
    assert np.asarray(read_image(tmp_path / "unit.tif"))[-1, -1].tolist() == [255, 255, 255]
    for name, values in {"big": ramp * 65535, "nan": ramp * np.nan, "int": np.arange(64, dtype=np.int32).reshape(8, 8)}.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        with pytest.raises(InputError, match="save it with 8 or 16 bits"):
            read_image(tmp_path / f"{name}.tif")

def test_narrow_pictures_cost_no_gigabytes():
    with pytest.raises(InputError, match="1:50"):
        adm_crop(Image.new("RGB", (4000, 1)), 1024)
    assert adm_crop(Image.new("RGB", (4000, 100)), 256).size == (256, 256)

def test_a_wide_gamut_profile_is_converted(tmp_path):
    """lcms' own profile with primaries in another order stands in for a photograph's: red becomes what it means."""
    from PIL import ImageCms
    lab = ImageCms.createProfile("LAB")
    image = Image.new("LAB", (8, 8), (128, 200, 180))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(lab).tobytes()
    image.save(tmp_path / "a.tif", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())
    expected = ImageCms.profileToProfile(Image.open(tmp_path / "a.tif"), lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), np.asarray(expected))
    Image.new("RGB", (8, 8), (230, 60, 40)).save(tmp_path / "b.png", icc_profile=b"no profile at all")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (230, 60, 40)

@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
def test_sides_are_those_of_the_upright_picture(suffix, tmp_path):
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (40, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
        width, height = read_image(tmp_path / f"a.{suffix}").size
        assert read_sides(Place(tmp_path / f"a.{suffix}")) == (height, width) == ((20, 40) if turn < 5 else (40, 20))

def profile(space, name):
    """A small ICC profile whose numbers are proportional to light; for RGB with sRGB's primaries."""
    def xyz(*values):
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256)
    desc = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    tags = {b"desc": desc, b"wtpt": xyz(0.9642, 1, 0.8249)}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, primary in zip((b"r", b"g", b"b"), ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971),
                                                         (0.1431, 0.0606, 0.7142))):
            tags[letter + b"TRC"] = curve
            tags[letter + b"XYZ"] = xyz(*primary)
    table = struct.pack(">I", len(tags))
    data = b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s6H4s", 128 + len(table + data), b"lcms", 0x02400000, b"mntr", space.encode().ljust(4),
                       b"XYZ ", 2020, 1, 1, 0, 0, 0, b"acsp")
    return head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + table + data

def test_profiles_of_greys_and_of_linear_srgb_are_read(tmp_path):
    """60 of 255, as a share of the light, is 133 in sRGB: at 8 and at 16 bits, with alpha, in a float, in colour."""
    grey, colour = profile("GRAY", "linear grey"), profile("RGB ", "GIMP built-in Linear sRGB")
    named = profile("RGB ", "sRGB-elle-V2-g10.icc")                 # this name was taken for sRGB's own
    eight = np.full((8, 8), 60, np.uint8)
    pictures = {"a.png": (eight, grey), "b.png": (eight.astype(np.uint16) * 257, grey),
                "c.tif": (eight.astype(np.uint16) * 257, grey), "d.tif": (eight.astype(np.float32) / 255, grey),
                "e.png": (np.stack([eight, np.full_like(eight, 255)], 2), grey), "f.png": (np.stack([eight] * 3, 2), colour),
                "g.png": (np.stack([eight] * 3, 2), named)}
    for name, (values, icc) in pictures.items():
        Image.fromarray(values).save(tmp_path / name, icc_profile=icc)
        notes = set()
        assert read_image(tmp_path / name, notes=notes).getpixel((0, 0)) == (133, 133, 133) and not notes, name

def test_an_srgb_profile_changes_no_picture(tmp_path):
    """Also where a converter has left it in a grey one."""
    from PIL import ImageCms
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for name, values in ("a.png", pixels), ("b.png", pixels[:, :, 0]):
        Image.fromarray(values).save(tmp_path / name, icc_profile=icc)
        notes = set()
        read = np.asarray(read_image(tmp_path / name, notes=notes))
        assert not notes and np.array_equal(read, values if values.ndim == 3 else np.stack([values] * 3, 2))

@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero_is_no_negative(bits, tmp_path):
    """As scanners write them. PhotometricInterpretation (tag 262) is written over: Pillow saves no such file."""
    values = np.array([[0, 1000, 65535]], np.uint16) >> 16 - bits
    Image.fromarray(values.astype(np.uint8 if bits == 8 else np.uint16)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    black_is_zero = struct.pack("<HHII", 262, 3, 1, 1)
    assert data.count(black_is_zero) == 1
    (tmp_path / "b.tif").write_bytes(data.replace(black_is_zero, struct.pack("<HHII", 262, 3, 1, 0)))
    for name, expected in (("a", [0, 4, 255]), ("b", [255, 251, 0])):
        greys = np.asarray(read_image(tmp_path / f"{name}.tif"))[0, :, 0]
        assert abs(greys.astype(int) - expected).max() <= 1

def test_labels_reach_the_batch(tmp_path):
    tar = write_tar(tmp_path / "wds.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(1)), ("1.cls", b"3")])
    data = ImageDataset(tar, 16, "all", "adm", flip=False, shuffle=False)
    assert torch.equal(data.sample(range(2))[2], torch.tensor([7, 3]))

def test_a_cache_knows_what_it_was_made_of(tmp_path):
    """Another caption, another picture, the same names: another digest; the same folder read twice: the same."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("one")
    digests = [listing_digest(list_images(tmp_path).items) for _ in range(2)]
    (tmp_path / "a.txt").write_text("two!")
    digests.append(listing_digest(list_images(tmp_path).items))
    picture(tmp_path / "b.png", seed=7, size=(32, 24))
    digests.append(listing_digest(list_images(f"{tmp_path}/").items))
    picture(tmp_path / "c.png")
    digests.append(listing_digest(list_images(tmp_path).items))
    assert digests[0] == digests[1] and len(set(digests)) == 4

def test_pictures_without_a_caption_are_refused(tmp_path, refused):
    import finetune_dit
    picture(tmp_path / "data" / "a.png", size=(64, 64))
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--davae", f"{TINY_MODEL}/davae.safetensors"]
    assert "--no-captions" in refused(finetune_dit, *flags)
    args = finetune_dit.parse_args([*map(str, flags), "--no-captions"])
    assert len(finetune_dit.open_data(args)[0].items) == 1

def test_classes_are_kept_beside_the_latents(tmp_path):
    import imagenet_eval
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / name / "a.png", size=(64, 64))
    imagenet_eval.main(imagenet_eval.parse_args(["encode", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]))
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"0": "cat", "1": "dog"}

def test_the_summary_says_where_captions_and_classes_came_from(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png"):
        picture(tmp_path / "data" / name)
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}')
    (tmp_path / "data" / "sub" / "metadata.csv").write_text("file_name,text\nd.png,two\n")
    (tmp_path / "data" / "b.caption").write_text("three")
    (tmp_path / "data" / "sub" / "loop").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    summary = list_images(tmp_path / "data").summary
    assert "captions 1 in .caption, 1 in metadata.csv, 1 in metadata.jsonl, 1 missing" in summary
    assert "1 folders linked in a circle" in summary and "1 no files (pipes and the like)" in summary
    tar = write_tar(tmp_path / "wds.tar", [("0.png", png(0)), ("0.cls", b"7")])
    assert "1 classes by .cls files" in list_images(tar).summary

def test_a_tar_may_hold_webdataset_captions(tmp_path):
    """img2dataset's .json has a caption; one without is counted, one that is no JSON refused by name."""
    members = [("0.png", png(0)), ("0.json", b'{"caption": "a cat", "width": 24}'), ("1.png", png(1)),
               ("1.json", b'{"text": "a dog"}'), ("2.png", png(2)), ("2.json", b'{"width": 24}'),
               ("3.png", png(3)), ("3.json", b'{"caption": "no"}'), ("3.txt", b"yes")]
    tar = write_tar(tmp_path / "wds.tar", members)
    assert captions_of(tar) == {"0.png": "a cat", "1.png": "a dog", "2.png": "", "3.png": "yes"}
    assert "captions 2 in .json, 1 in .txt, 1 missing in .json" in list_images(tar).summary
    for content in (b"{", b'{"caption": 5}', b'\xff\xfe'):
        with pytest.raises(InputError, match="0.json"):
            list_images(write_tar(tmp_path / "bad.tar", [("0.png", png(0)), ("0.json", content)]))

def test_our_own_overviews_are_no_data(tmp_path):
    """grid.png and previews, told apart by what their text says: a stranger's grid.png is a picture."""
    from vae_expand import save_overview
    picture(tmp_path / "0000.png")
    picture(tmp_path / "grid.png")
    assert len(list_images(tmp_path).items) == 2
    for name in ("grid.png", "preview-000200.png", "loss.png"):
        save_overview(tmp_path / name, torch.zeros(3, 24, 24))
    listing = list_images(tmp_path)
    assert [item.name for item in listing.items] == ["0000.png"] and "3 overviews of our own" in listing.summary

def test_small_pictures_are_counted_and_dropped_by_a_flag(tmp_path, capsys):
    import align
    for i in range(12):
        picture(tmp_path / f"{i:02d}.png", i, (12, 40) if i % 3 == 0 else (40, 40))
    for drop in (False, True):
        data = ImageDataset(tmp_path, 32, "all", "adm", flip=False, shuffle=False, drop_small=drop)
        images = torch.cat([batch[0] for batch in align.read_batches(data, [range(6), range(6, 12)], workers=2)])
        assert "4 pictures are smaller than --size" in capsys.readouterr().out
        assert torch.equal(images[0], images[1]) == drop                # the next one in its place
    with pytest.raises(InputError, match="no picture is left"):
        ImageDataset(tmp_path, 64, "all", "adm", drop_small=True).sample([0])

def test_small_pictures_are_told_where_they_are_encoded(tmp_path, capsys):
    """By the caches of stage 2, and by encode; the loader must reach its end for that."""
    import finetune_dit
    import imagenet_eval
    for i in range(6):
        picture(tmp_path / "data" / f"{i}.png", i, (40, 64) if i % 2 else (64, 64))
    flags = f"--data {tmp_path / 'data'} --size 64 --batch 4 --out {tmp_path / 'z'}"
    imagenet_eval.main(imagenet_eval.parse_args(["encode", *flags.split()]))
    assert "3 pictures are smaller than --size" in capsys.readouterr().out
    assert json.loads((tmp_path / "z" / "encode.json").read_text())["small"] == 3
    args = finetune_dit.parse_args([*flags.split(), "--no-captions"])
    args.data_digest = None
    data, count = finetune_dit.open_data(args)
    finetune_dit.build_cache(tmp_path / "cache", args, data, count, 0, 1, "cpu")
    assert "3 pictures are smaller than --size" in capsys.readouterr().out      # the first of six is held out

def test_damaged_profiles_are_counted(tmp_path):
    for i in range(3):
        profile = b"no profile at all" if i else None
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png", icc_profile=profile)
    data = ImageDataset(tmp_path, 16, "all", "adm", flip=False)
    data.sample(range(3))
    assert data.notes == {("damaged_profiles", "1.png"), ("damaged_profiles", "2.png")}

def test_what_was_read_stands_in_the_log(tmp_path):
    import align
    for i in range(4):
        picture(tmp_path / "data" / f"{i}.png", i, (12, 40))
    flags = f"--data {tmp_path / 'data'} --size 32 --steps 2 --every 1 --batch 2 --held 1 --out {tmp_path / 'run'}"
    align.train(align.parse_args(flags.split()), 0, 1, "cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and "4 pictures; captions 4 missing" in lines[0]["data"]
    assert lines[-1]["small"] == 3 and lines[-1]["skipped"] == 0

def test_a_run_goes_on_over_the_same_pictures_alone(tmp_path):
    """One picture more, or another caption, is another order and another run."""
    import align
    for i in range(4):
        picture(tmp_path / "data" / f"{i}.png", i, (40, 40))
    flags = f"--data {tmp_path / 'data'} --size 32 --batch 2 --held 1 --out {tmp_path / 'run'} --steps"
    align.train(align.parse_args(f"{flags} 1".split()), 0, 1, "cpu")
    align.train(align.parse_args(f"{flags} 2".replace("/data ", "/data/ ").split()), 0, 1, "cpu")
    picture(tmp_path / "data" / "4.png", 4, (40, 40))
    with pytest.raises(InputError, match="contents of --data"):
        align.train(align.parse_args(f"{flags} 3".split()), 0, 1, "cpu")

def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    root = Path(TINY_MODEL).parents[1]
    picture(tmp_path / "\u732b" / "m\u00fcller.png", size=(64, 64))
    (tmp_path / "\u732b" / "\u72ac.png").write_bytes(b"no picture")
    for i in range(30):
        picture(tmp_path / "\u732b" / f"{i}.png", i, (64, 64))
    command = [sys.executable, root / "imagenet_eval.py", "encode", "--data", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert rb"skipped: \u732b/\u72ac.png" in done.stdout

def mutated(kind, rng):
    """The bytes of a small picture with a header that something has damaged."""
    file = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = int(rng.integers(1, 9))
    exif[0x10F] = "a camera"
    from PIL import ImageCms
    more = dict(exif=exif.tobytes(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image.save(file, kind, **({} if kind == "GIF" else more))
    data = bytearray(file.getvalue())
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(0, min(len(data), 1000)))] = int(rng.integers(0, 256))
    if kind == "PNG":               # whole check sums, or Pillow looks no further
        start = 8
        while start + 12 <= len(data):
            end = start + 8 + int.from_bytes(data[start:start + 4], "big")
            data[end:end + 4] = zlib.crc32(data[start + 4:end]).to_bytes(4, "big")
            start = end + 4
    return bytes(data[:int(rng.integers(8, len(data)))] if rng.random() < 0.2 else data)

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_give_a_picture_or_one_line(kind):
    rng = np.random.default_rng(0)
    outcomes = {"picture": 0, "refused": 0}
    for i in range(500):
        try:
            image = read_image(io.BytesIO(mutated(kind, rng)), f"{i}.{kind}", set())
            assert image.mode == "RGB"
            outcomes["picture"] += 1
        except InputError as e:
            assert str(e).startswith(f"{i}.{kind}: ") and "\n" not in str(e)
            outcomes["refused"] += 1
    assert all(n >= 20 for n in outcomes.values()), outcomes

# ------------------------------------------------------------ the inputs of the public reports

OUTCOMES = {    # input: what listing or reading says, and of which commands; the others end well
    "metadata": ("text None; both are strings", "align finetune encode fid"),
    "stray-tar": ("5 pictures and 1 tars", "align finetune encode fid"),
    "strip.png": ("not a readable, uncompressed tar", "align finetune encode fid"),
    "float01.tif": ("not a readable, uncompressed tar", "align finetune encode fid"),
    "float65535.tif": ("not a readable, uncompressed tar", "align finetune encode fid"),
    "int32.tif": ("not a readable, uncompressed tar", "align finetune encode fid")}
SAID = {        # input: what the line about it holds
    "appledouble": "3 pictures; captions 3 missing; 1 classes; passed over: 1 hidden",
    "captions": "7 pictures; captions 1 in .caption, 4 in .txt, 2 missing",
    "hidden-folder": "2 classes (0 cat, 1 dog); passed over: 1 hidden",
    "inner-folder": "2 classes (0 n01, 1 n02)", "numeric": "(0 0, 1 1, 2 2, 3 10)",
    "linked-class": "2 classes (0 cat, 1 dog)", "links.tar": "3 pictures; captions 1 in .txt, 2 missing",
    "macos.tar": "1 pictures; captions 1 missing; 1 classes; passed over: 2 hidden",
    "metadata-csv": "captions 1 in metadata", "too-many": "42 classes", "webdataset": "2 classes",
    "one-name.tar": "3 pictures; captions 3 missing; 1 classes; passed over: 1 hidden",
    "one-bad-of-200": "skipped: 100.png: not a readable image (of no format that Pillow knows)"}

@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    root = os.environ.get("DAVAE_TEST_DATA")
    if not root:
        pytest.skip("DAVAE_TEST_DATA is not set")
    folder = tmp_path_factory.mktemp("reported")
    subprocess.run([sys.executable, f"{root}/reports/make_inputs.py", folder], check=True)
    return folder

def run_command(command, source, out):
    import align
    import finetune_dit
    import imagenet_eval
    lines = {"align": "--size 32 --steps 2 --every 2 --batch 2 --held 2", "encode": "encode --size 64",
             "finetune": "--steps 1 --batch 2 --preview 0"}
    if command == "align":
        align.train(align.parse_args([*lines[command].split(), "--data", source, "--out", out]), 0, 1, "cpu")
    elif command == "finetune":
        finetune_dit.main(finetune_dit.parse_args([*lines[command].split(), "--data", source, "--out", out]))
    elif command == "encode":
        imagenet_eval.main(imagenet_eval.parse_args([*lines[command].split(), "--data", source, "--out", out]))
    else:
        flags = f"fid {source} --ref world --size 64 --count 32 --features world --out {out}"
        imagenet_eval.main(imagenet_eval.parse_args(flags.split()))

@pytest.mark.parametrize("command", ["align", "finetune", "encode", "fid"])
def test_reported_inputs_are_read_or_refused_in_one_line(command, reported, tmp_path, capsys):
    for path in sorted(reported.iterdir()):
        if path.name.startswith("prompts"):
            continue
        refusal = ""
        try:
            run_command(command, str(path), str(tmp_path / path.name))
        except InputError as e:
            refusal = str(e)
        said = capsys.readouterr().out
        expected, commands = OUTCOMES.get(path.name, ("", ""))
        if command in commands:
            assert expected in refusal, (path.name, refusal)
        elif command == "finetune" and path.name not in ("captions", "metadata-csv"):
            assert "--no-captions if that is meant" in refusal, (path.name, refusal)
        elif command == "fid" and refusal:
            assert "1 picture: a covariance takes two" in refusal, (path.name, refusal)
        else:
            assert not refusal, (path.name, refusal)
            if command in ("encode", "fid"):
                assert SAID.get(path.name, "") in said, (path.name, said)

@pytest.mark.parametrize("seed", [4294967295, 2**63 - 1])
def test_large_seeds_are_seeds(seed, tmp_path):
    """Of every training and sampling; beyond 2^63 - 1 they are refused."""
    import align
    import finetune_dit
    import imagenet_eval
    import sample
    flags = ["--seed", str(seed), "--steps", "1", "--out", str(tmp_path / "a")]
    align.train(align.parse_args([*flags, "--batch", "2", "--held", "2"]), 0, 1, "cpu")
    flags[-1] = str(tmp_path / "b")
    finetune_dit.main(finetune_dit.parse_args([*flags, "--batch", "2", "--images", "4", "--preview", "0"]))
    flags[-1] = str(tmp_path / "c")
    sample.main(sample.parse_args([*flags, "--n", "1", "a"]))
    line = f"sample --dit {TINY_MODEL}/lightningdit --count 2 --steps 2 --seed {seed} --out {tmp_path / 'd'}"
    imagenet_eval.main(imagenet_eval.parse_args(line.split()))
    for module in (align, finetune_dit, sample):
        with pytest.raises(SystemExit):
            module.parse_args(["--seed", str(2**63)])

