import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.evaluation import html
from fcvit_jax.evaluation.html import render_page
from fcvit_jax.evaluation.runs import Run
from fcvit_jax.evaluation.table import columns

NASTY = '</script><b title="x">&amp;{{plotly}}\''


class Page(HTMLParser):
    """A page's elements, with their attributes, and the text inside each kind."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [text for name, text in self.texts if name == tag]

    @property
    def data(self):
        return json.loads(self.text("script")[0])


CLASSES = {"classes": ["cat", "dog"], "images": [10, 20], "correct": {"dense": [9, 18], "tome_r8": [9, 12]}}


def test_the_page_requests_nothing_from_outside(make_run):
    text = render_page([make_run()])
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert len(page.text("script")) == 3
    for tag, attributes in page.elements:
        for key in ("src", "href", "action", "data"):
            assert attributes.get(key, "data:").startswith("data:"), (tag, attributes)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_the_table_and_the_text_of_each_point_agree(make_run):
    run = make_run()
    page = Page(render_page([run]))
    titles = ["schedule", *(column.title for column in columns(run))]
    assert page.text("button") == titles
    cells = page.text("td")
    rows = [cells[at : at + len(titles)] for at in range(0, 4 * len(titles), len(titles))]
    assert [row[0] for row in rows] == ["dense", "tome_r8", "tome_r13", "s2winc7_r16"]
    assert rows[2][1:4] == ["85.00", "82.70-87.10", "-5.00*"]
    texts = [point["text"] for line in page.data["lines"] for point in line["points"]]
    assert texts == [
        "<br>".join(
            [f"<b>{row[0]}</b>", *(f"{title}: {cell}" for title, cell in zip(titles[1:], row[1:], strict=True))]
        )
        for row in rows
    ]
    values = [float(attributes["data-value"]) for attributes in page.all("td")[1 : len(titles)]]
    assert values[:3] == pytest.approx([90, 0.88, 0])


def test_points_are_in_the_units_of_the_axes(make_run):
    data = Page(render_page([make_run()])).data
    assert [line["name"] for line in data["lines"]] == ["dense", "tome", "s2winc7"]
    point = data["lines"][1]["points"][1]
    assert point.pop("text").startswith("<b>tome_r13</b><br>top-1 %: 85.00<br>")
    assert {key: value for key, value in point.items() if value is not None} == pytest.approx(
        {
            "gmacs": 2.7,
            "images_per_second": 170,
            "speedup": 1.7,
            "tokens_out": 41,
            "top1": 85,
            "top1_low": 82.7,
            "top1_high": 87.1,
            "top5": 99,
            "drop": 5,
            "agreement": 95,
            "kl": 0.0125,
        }
    )
    assert [key for key, _ in data["x"]] == ["gmacs", "images_per_second", "speedup", "tokens_out"]
    assert [key for key, _ in data["y"]] == ["top1", "top5", "agreement", "kl", "drop"]
    assert data["budgets"] == pytest.approx([89])


def test_only_what_was_measured_is_offered(make_run):
    run = make_run(images_per_second=None, speedup=None, kl=None, agreement=None)
    data = Page(render_page([Run("r", run.rows[1:])])).data
    assert [key for key, _ in data["x"]] == ["gmacs", "tokens_out"]
    assert [key for key, _ in data["y"]] == ["top1", "top5"]
    assert data["budgets"] == []


def test_published_curves_are_thin_lines_of_their_own(make_run):
    run = make_run(model="vit_small_patch16_224.augreg_in21k_ft_in1k", reference_top1=0.814)
    lines = Page(render_page([run])).data["lines"]
    ours, theirs = [[line for line in lines if bool(line.get("published")) == published] for published in (False, True)]
    assert len(ours) == 3
    assert [line["name"] for line in theirs if line["legend"]] == [
        "published (Heo et al., digitised)",
        "published (Bolya et al.)",
    ]
    tome = next(line for line in theirs if line["colour"] == ours[1]["colour"])
    point = next(point for point in tome["points"] if point["text"].startswith("<b>tome_r13</b>"))
    assert point["top1"] == 79.32
    assert point["gmacs"] == pytest.approx(2.70, abs=0.01)


def test_the_page_warns_of_accuracies_far_from_the_reported_ones(make_run):
    warning = (
        '<p class="warning">Warning: dense has 90.00 %, published is 91.00 %, 3.5 standard errors apart (pixels: P).'
    )
    for sigmas, times in ((-3.5, 1), (-2.9, 0)):
        page = render_page([make_run(reference_top1=0.91, reference_sigmas=sigmas)])
        assert page.count(warning) == times
        assert page.count("standard errors apart") == 1
        assert page.count('<p class="warning">') == times


def test_text_from_data_is_escaped(make_rows, tmp_path):
    rows = make_rows(
        checkpoint=NASTY, dataset=NASTY, device=NASTY, preprocess=NASTY, versions={NASTY: NASTY}, model=NASTY
    )
    rows[1]["schedule"] = NASTY
    (tmp_path / "gallery").mkdir()
    picture = tmp_path / "gallery" / "<b>'\"&.png"
    Image.new("RGB", (2, 2)).save(picture)
    table = {"classes": [NASTY], "images": [3], "correct": {"dense": [2], NASTY: [1]}}
    runs = [Run(NASTY, tuple(rows), table, (picture,)), Run("b", tuple(rows), table)]
    page = Page(render_page(runs))
    plain = Page(render_page([Run("a", tuple(make_rows()), table, (picture,)), Run("b", tuple(make_rows()), table)]))
    kinds = [sorted({tag for tag, _ in other.elements}) for other in (page, plain)]
    assert kinds[0] == kinds[1]
    assert len(page.text("script")) == 3
    assert page.data["classes"][0]["classes"] == [NASTY]
    assert page.all("img")[0]["alt"] == f"{NASTY}: <b>'\"&"
    # The plotting library reads a few tags in the texts that it draws.
    texts = [point["text"] for line in page.data["lines"] for point in line["points"]]
    assert all(text.count("<b>") == text.count("</b>") == 1 for text in texts)
    assert any(f"{NASTY}" in cell for cell in page.text("td"))


def test_classes(make_run):
    data = Page(render_page([replace(make_run(), per_class=CLASSES)])).data
    assert data["classes"] == [
        {"classes": ["cat", "dog"], "images": [10, 20], "dense": [9, 18], "schedules": [["tome_r8", [9, 12]]]}
    ]
    without = {**CLASSES, "correct": {"tome_r8": [9, 12]}}
    assert Page(render_page([replace(make_run(), per_class=without)])).data["classes"] == []
    several = Page(render_page([replace(make_run(name), per_class=CLASSES) for name in "ab"])).data["classes"]
    assert [entry["schedules"][0][0] for entry in several] == ["a: tome_r8", "b: tome_r8"]


def test_pictures_are_inside_the_page(make_run, tmp_path, monkeypatch):
    paths = tuple(tmp_path / f"{index:03}_cat.png" for index in range(3))
    for index, path in enumerate(paths):
        Image.new("RGB", (4, 3), (index, 20, 30)).save(path)
    page = Page(render_page([replace(make_run(), gallery=paths)]))
    assert page.text("figcaption") == ["000_cat", "001_cat", "002_cat"]
    for path, image in zip(paths, page.all("img"), strict=True):
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert np.asarray(Image.open(io.BytesIO(paths[1].read_bytes())))[0, 0].tolist() == [1, 20, 30]
    monkeypatch.setattr(html, "GALLERY_BYTES", paths[0].stat().st_size * 2)
    page = render_page([replace(make_run(), gallery=paths)])
    assert "1 more in the folder gallery." in page
    assert len(Page(page).all("img")) == 2
    assert "<h2>Pictures" not in render_page([make_run()])


def test_conditions(make_rows):
    rows = make_rows(limit=None, seconds={"compiling": 1.23456, "computing": 2.0}, num_images=50_000)
    rows[3]["dtype"] = "bfloat16"
    page = Page(render_page([Run("r", tuple(rows))]))
    cells = page.text("td")[4 * (1 + len(columns(Run("r", tuple(rows))))) :]
    names = page.text("th")[-len(cells) :]
    told = dict(zip(names, cells, strict=True))
    assert told["weights sha256"] == "ab12"
    assert told["num images"] == "50,000"
    assert told["limit"] == "-"
    assert told["seconds"] == "compiling 1.235, computing 2"
    assert told["versions"] == "jax 1"
    assert told["dtype"] == "float32; bfloat16"
    assert not {"top1", "kl", "schedule"} & set(told)


def test_each_row_of_several_runs_names_its_run(make_run):
    page = Page(render_page([make_run("a"), make_run("b", preprocess="Q", images_per_second=None, speedup=None)]))
    assert page.text("title") == ["2 evaluations compared"]
    assert page.text("button")[:2] == ["run", "schedule"]
    width = len(page.text("button"))
    assert page.text("td")[: 8 * width : width] == ["a"] * 4 + ["b"] * 4
    assert page.text("p")[0] == "Warning: rows of different preprocessing are compared: P (a); Q (b)"
    texts = [point["text"] for line in page.data["lines"] for point in line["points"]]
    assert texts[0].startswith("<b>a: dense</b>")
    assert "images/s" in texts[0]
    assert "images/s" not in texts[-1]


def test_rules_are_lines_of_their_own(make_rows):
    rows = make_rows()
    rows[2]["schedule"], rows[3]["schedule"] = "tome_r13@nearest", "tome_r13@evit(fuse=true)"
    lines = Page(render_page([Run("r", tuple(rows))])).data["lines"]
    assert [line["name"] for line in lines] == ["dense", "tome", "tome@nearest", "tome@evit(fuse=true)"]
    assert len({line["colour"] for line in lines}) == 4
