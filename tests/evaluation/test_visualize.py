import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fcvit_jax.checkpoint import Checkpoint, abstract_params
from fcvit_jax.data.preprocess import Preprocess, decode, preset
from fcvit_jax.data.sources import open_images, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import visualize
from fcvit_jax.evaluation.visualize import (
    LINE,
    MARGIN,
    draw_gallery,
    draw_regions,
    fill,
    main,
    outline,
    regions,
    stage_layers,
)
from fcvit_jax.models.config import Rotary, ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT

# 4x6 patches of 4 pixels; a class token and two registers in front.
CONFIG = ViTConfig((16, 24), 4, 16, 3, 2, 32, num_classes=0, num_registers=2)
BARE = dataclasses.replace(CONFIG, class_token=False, num_registers=0, pool="avg")
NEWER = dataclasses.replace(CONFIG, learned_positions=False, rotary=Rotary(), gated=True, pool="map")


def checkpoint_of(config):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    return Checkpoint(Path(), config, params, preset("timm/augreg,crop_pct=1.0", config.image_size), {})


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoint_of(CONFIG)


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)


def enlarged(array, factor):
    return np.kron(array, np.ones((factor, factor, 1), array.dtype))


def test_a_region_is_filled_with_the_rounded_mean_of_its_pixels_wherever_they_lie():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :2] = [[[10, 0, 255], [20, 0, 255]], [[30, 0, 255], [41, 0, 255]]]
    image[2:, 4:] = [[[0, 1, 255], [0, 0, 254]], [[0, 0, 255], [0, 2, 255]]]
    image[:2, 2:4] = 7
    filled = fill(image, np.array([[0, 2, 1], [1, 1, 0]], np.int32), 2)
    # Region 0: red 101 / 8 = 12.6, green 3 / 8 = 0.4, blue 2039 / 8 = 254.9.
    zero, one, two = [13, 0, 255], [0, 0, 0], [7, 7, 7]
    np.testing.assert_array_equal(filled, enlarged(np.array([[zero, two, one], [one, one, zero]], np.uint8), 2))


def test_a_line_runs_inside_every_border_in_the_colour_of_its_region():
    picture = np.full((8, 12, 3), 40, np.uint8)
    picture[:4, 4:8] = 200
    lined = outline(picture, np.array([[3, 5, 0], [3, 0, 0]]))
    inside = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
    left = np.concatenate([inside, inside])
    left[3:5, 1:3] = False  # between two patches of one region there is no line
    np.testing.assert_array_equal((lined != picture).any(axis=-1)[:, :4], left)
    # Two patches above each other are red, the first colour; three in a corner pale blue, the second.
    assert {tuple(colour) for colour in lined[:, :4][left]} == {(255, 38, 38)}
    corner = lined[:, 4:].reshape(-1, 3)
    assert {tuple(colour) for colour in corner} == {(153, 183, 255), (40, 40, 40), (200, 200, 200), (167, 167, 167)}
    assert (lined[:4, 4:8][inside] == 167).all()  # a patch alone: its own colour, a sixth darker
    alone = outline(np.full((2, 2, 3), 40, np.uint8), np.array([[0]]))
    assert (alone == 40 + 215 // 6).all()  # or a sixth closer to white, if it is dark


def test_thick_lines_and_corners():
    # The corner of an L: the pixel that touches the other region diagonally belongs to the line.
    lined = outline(np.zeros((12, 12, 3), np.uint8), np.array([[0, 0], [0, 1]]), 2)
    drawn = lined.any(axis=-1)
    expected = np.ones((12, 12), bool)
    expected[2:10, 2:4] = expected[2:4, 2:10] = False
    expected[8:10, 8:10] = False
    np.testing.assert_array_equal(drawn, expected)


def test_all_regions_of_a_picture_have_colours_of_their_own():
    grid = np.repeat(np.arange(60).reshape(6, 10), 2, axis=1)
    lined = outline(np.zeros((12, 40, 3), np.uint8), grid)
    assert len(np.unique(lined.reshape(-1, 3), axis=0)) == 60


def test_pruned_patches_are_hatched_and_have_no_part_in_a_tokens_colour():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8], image[:, 8:] = 200, 100
    one_token, second = np.zeros((1, 2), int), np.array([[False, True]])
    drawn = draw_regions(image, one_token, second, 8, 4)
    left, right = drawn[:, :32], drawn[:, 32:]
    assert (left[2:-2, 2:-2] == 200).all()  # and not 150, the mean of both
    assert {tuple(colour) for colour in right.reshape(-1, 3)} == {(70,) * 3, (120,) * 3}
    assert (right[0] == 70).any()
    assert (right[0] == 120).any()
    np.testing.assert_array_equal(right[0, 1:], right[1, :-1])  # stripes run diagonally
    kept = draw_regions(image, one_token, np.zeros((1, 2), bool), 8, 4)
    assert (kept[2:-2, 2:-2] == 150).all()


def test_the_caption_counts_pruned_patches(checkpoint, monkeypatch):
    token, pruned = np.zeros((1, 4, 6), np.int32), np.zeros((1, 4, 6), bool)
    pruned[0, 1, :3] = True
    monkeypatch.setattr(visualize, "regions", lambda *args: [visualize.Regions(token, pruned)])
    (panel,) = visualize._panels(checkpoint, "tome_r5", MergeSchedule.dense(3), noise(1)[0], [1], 1)
    assert panel.detail == "1 of 24 tokens after layer 1, 3 pruned"
    pruned[:] = False
    (panel,) = visualize._panels(checkpoint, "tome_r5", MergeSchedule.dense(3), noise(1)[0], [1], 1)
    assert panel.detail == "1 of 24 tokens after layer 1"


@pytest.mark.parametrize(
    ("config", "schedule"),
    [(CONFIG, "tome_r5"), (CONFIG, "s2winc2_r6"), (BARE, "s2winc2_r6"), (NEWER, "s2winc2_r6")],
    ids=["global", "windows", "no prefix", "rotary, gate and probe"],
)
def test_regions_are_the_tokens_left_and_of_their_size(config, schedule):
    checkpoint, schedule = checkpoint_of(config), MergeSchedule.parse(schedule, 3)
    images = noise(2)
    maps = regions(checkpoint, schedule, images)
    _, out = jax.jit(ViT(config, schedule).apply)(
        {"params": checkpoint.params}, checkpoint.preprocess.normalize(images)
    )
    assert len(maps) == 3
    prefix = config.num_prefix_tokens
    for (grids, pruned), tokens, layer in zip(maps, schedule.tokens(config), out["layers"], strict=True):
        assert (grids.shape, grids.dtype) == ((2, 4, 6), np.int32)
        assert (pruned.shape, pruned.any()) == ((2, 4, 6), False)
        for grid, size in zip(grids, layer["size"], strict=True):
            np.testing.assert_array_equal(np.bincount(grid.flat, minlength=tokens - prefix), size[prefix:])
            assert grid.min() == 0


@pytest.mark.parametrize("schedule", ["dense", "tome_r0"])
def test_without_merging_every_patch_is_a_region(checkpoint, schedule):
    image = noise(1)
    for grid, _ in regions(checkpoint, MergeSchedule.parse(schedule, 3), image):
        np.testing.assert_array_equal(grid[0], np.arange(24).reshape(4, 6))
    means = image[0].reshape(4, 4, 6, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    np.testing.assert_array_equal(fill(image[0], grid[0], 4), enlarged(means, 4))


@pytest.mark.parametrize("windows", [(2, 2), (1, 3)])
def test_no_region_crosses_the_border_of_a_window_in_a_local_stage(checkpoint, windows):
    down, across = windows
    cells = np.arange(down * across).reshape(windows).repeat(4 // down, 0).repeat(6 // across, 1)
    maps = regions(checkpoint, MergeSchedule.parse(f"local:2:r8:w{down}x{across},global:1:r4", 3), noise(2))
    for grids, _ in maps[:2]:
        for grid in grids:
            pairs = np.unique(np.stack([grid.ravel(), cells.ravel()]), axis=1)
            assert pairs.shape[1] == grid.max() + 1 < 24  # each region with one window


def test_regions_follow_what_the_image_shows(checkpoint):
    """Two colours, split differently in each row: equal patches have equal keys, and merge."""
    flat = {
        **checkpoint.params,
        "embed": {**checkpoint.params["embed"], "pos_embed": np.zeros((1, 27, 16), np.float32)},
    }
    same = dataclasses.replace(checkpoint, params=flat)
    blue = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], np.uint8)
    image = enlarged(np.array([[250, 20, 20], [10, 30, 220]], np.uint8)[blue], 4)
    grid = regions(same, MergeSchedule.parse("global:1:r12,dense:2", 3), image[None])[-1].token[0]
    assert grid.max() + 1 == 12
    np.testing.assert_array_equal(fill(image, grid, 4), image)


def test_a_gallery(checkpoint, tmp_path, monkeypatch):
    traced = []
    normalize = Preprocess.normalize
    monkeypatch.setattr(Preprocess, "normalize", lambda self, images: traced.append(1) or normalize(self, images))
    schedules = {name: MergeSchedule.parse(name, 3) for name in ("tome_r5", "local:1:r4:w2x2,global:2:r3")}
    images, names = noise(3), ["../up/päss wd.jpg", "digits/0004", "x" * 300 + ".v2"]
    draw_gallery(checkpoint, schedules, images, names, tmp_path / "first")
    draw_gallery(checkpoint, schedules, images, names, tmp_path / "again")
    assert len(traced) == 2  # once a schedule
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["000_..-up-p-ss-wd.png", "001_digits-0004.png", f"002_{'x' * 100}.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    # 24 pixels across are drawn as 336, fourteen times as large; the captions are narrower.
    sheet = np.asarray(Image.open(tmp_path / "first" / files[1]))
    assert sheet.shape == (2 * MARGIN + 2 * LINE + 224, MARGIN + 3 * (336 + MARGIN), 3)
    panels = [sheet[MARGIN + 2 * LINE :, MARGIN + i * (336 + MARGIN) :][:224, :336] for i in range(3)]
    np.testing.assert_array_equal(panels[0], enlarged(images[1], 14))
    for panel, schedule in zip(panels[1:], schedules.values(), strict=True):
        grid = regions(checkpoint, schedule, images[1:2])[-1].token[0]
        np.testing.assert_array_equal(panel, outline(enlarged(fill(images[1], grid, 4), 14), grid, 4))
        assert (panel[7::14, 7::14] == fill(images[1], grid, 4)).all()  # the line leaves the middle free
    assert all((sheet[MARGIN : MARGIN + LINE, x:][:, :60] < 128).any() for x in (MARGIN, 356, 702))  # captions


def test_rows_of_stages_and_of_columns(checkpoint, tmp_path):
    schedules = {name: MergeSchedule.parse(name, 3) for name in ("tome_r5", "local:1:r4:w2x2,global:2:r3", "dense")}
    draw_gallery(checkpoint, schedules, noise(1), ["a.png"], tmp_path, stages=True)
    width, height = 336 + MARGIN, 224 + 2 * LINE + MARGIN
    sheet = np.asarray(Image.open(tmp_path / "000_a.png"))
    # Layers 1 and 3 end a stage, 2 is half-way between them.
    assert sheet.shape == (MARGIN + 3 * height, MARGIN + 4 * width, 3)
    grid = regions(checkpoint, schedules["local:1:r4:w2x2,global:2:r3"], noise(1))[1].token[0]
    panel = sheet[MARGIN + height + 2 * LINE :, MARGIN + 2 * width :][:224, :336]
    np.testing.assert_array_equal(panel[7::14, 7::14], fill(noise(1)[0], grid, 4))
    draw_gallery(checkpoint, schedules, noise(1), ["a.png"], tmp_path, columns=3)
    sheet = np.asarray(Image.open(tmp_path / "000_a.png"))
    assert sheet.shape == (MARGIN + 2 * height, MARGIN + 3 * width, 3)
    assert (sheet[MARGIN + height :, MARGIN + width :] == 255).all()  # the fourth panel is alone in the second row


@pytest.mark.parametrize("stages", [False, True])
def test_without_schedules_there_is_the_original(checkpoint, tmp_path, stages):
    draw_gallery(checkpoint, {}, noise(1), ["a"], tmp_path, stages=stages)
    sheet = np.asarray(Image.open(tmp_path / "000_a.png"))
    assert sheet.shape == (2 * MARGIN + 2 * LINE + 224, 2 * MARGIN + 336, 3)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["dense"], [6, 12]),
        (["tome_r8"], [6, 12]),
        (["tome_r8", "s2dfe_r16", "s2winc7_r16"], [4, 7, 10, 12]),
        (["global:0:r3,dense:12"], [6, 12]),
        (["dense:2,local:3:r4:w2x2,dense:3,global:3:r2,dense:1"], [3, 5, 8, 11, 12]),
    ],
)
def test_the_layers_of_stages(names, layers):
    assert stage_layers([MergeSchedule.parse(name, 12) for name in names], 12) == layers


def test_images_to_draw_are_a_file_a_folder_or_a_data_set(tmp_path):
    for place in ("b/deep/2.PNG", "b/1.png", "a.png", ".hidden/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), "red").save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "linked").symlink_to(tmp_path / "b" / "deep")
    (tmp_path / "folder.png").mkdir()
    source = open_images(str(tmp_path))
    names = ["a.png", "b/1.png", "b/deep/2.PNG", "linked/2.PNG"]
    assert [source[i].name for i in range(len(source))] == names
    single = open_images(str(tmp_path / "b" / "1.png"))
    assert len(single) == 1
    assert (single[0].name, single[0].image) == ("1.png", (tmp_path / "b" / "1.png").read_bytes())
    assert open_images(f"folder:{tmp_path}").class_names[0] == "b"


def test_a_bad_image_is_skipped_on_demand(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, colour in (("a.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(photos / name)
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:50])
    (photos / "d.heic").touch()
    ask = ["--images", str(photos), "--schedules", "tome_r2", "--workdir", str(tmp_path / "out")]
    main([*ask, "--on_bad", "skip"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"warning: {photos}: left out: 1 .heic"
    assert printed[1].startswith("skipped: image b.png cannot be decoded")
    assert printed[2:] == [f"written: 2 pictures in {tmp_path / 'out'}"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000_a.png", "001_c.png"]
    for name in ("a.png", "c.png"):
        (photos / name).unlink()
    with pytest.raises(SystemExit):
        main([*ask, "--on_bad", "skip", "--workdir", str(tmp_path / "none")])
    assert "none can be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_command_line_on_digits(tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    main(["--schedules", "s2winc5_r16", "--workdir", str(out), "--limit", "2", "--stages"])
    assert capsys.readouterr().out == f"written: 2 pictures in {out}\n"
    records = [open_source("digits:test")[index] for index in range(2)]
    expected = [f"{index:03}_digits-{record.name[-4:]}.png" for index, record in enumerate(records)]
    assert sorted(path.name for path in out.iterdir()) == expected
    sheet = np.asarray(Image.open(out / expected[1]))
    # The original and layers 3, 5 and 6; 32 pixels are drawn as 320, and what is drawn is the digit.
    assert sheet.shape[1] == MARGIN + 4 * (320 + MARGIN)
    shown = sheet[MARGIN + 2 * LINE :, MARGIN:][5:320:10, 5:320:10]
    digit = decode(records[1].image, "digit").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(shown, np.asarray(digit))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images {0}/none.png", "there is no such file or folder; give one, or a data set: folder:PATH"),
        ("--images {0}/empty", "none in this folder; accepted are .jpg"),
        ("--images digits:all", "no split 'all'"),
        ("--images {0}/broken.png", "image broken.png cannot be decoded"),
        ("--checkpoint {0}/none", "there is no such checkpoint directory"),
        ("--schedules tome", "'tome' is not a schedule"),
        ("--schedules dense:1,local:5:r4:w3x3", "3x3"),
        ("--workdir {0}/broken.png/x", "cannot be written"),
        ("--limit 0", "--limit: 0 is not positive"),
        ("--stages --columns 2", "not allowed with argument --stages"),
        ("--size 3", "unrecognized arguments"),
    ],
)
def test_bad_input_is_reported_in_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["--workdir", str(tmp_path / "out"), *arguments.format(tmp_path).split()])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_are_refused(checkpoint):
    with pytest.raises(InputError, match=r"this model takes \[batch, 16, 24, 3\]"):
        regions(checkpoint, MergeSchedule.dense(3), np.zeros((1, 24, 16, 3), np.uint8))
