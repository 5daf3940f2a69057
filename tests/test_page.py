"""The page in a real browser: what is drawn and said is what the files say, by keyboard and by pointer, without a network."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from iared2.report import colours, page, pictures
from iared2.report.gallery import Gallery, GallerySettings
from iared2.tokens.grid import to_pixels

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METHODS = ("ours", "rollout", "gaussian")  # the last has a value per pixel
GRID, GROUPS, HEADS = (8, 8), 3, 5

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, and there is none here: apt install chromium")


@dataclass
class Run:
    """A finished run, and the browser's page on it."""

    folder: Path
    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def photo(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())["photos"][0]

    @property
    def viewer(self) -> Locator:
        return self.page.locator(".viewer").first

    def array(self, name: str) -> np.ndarray:
        return np.load(self.folder / name)

    def scores(self, group: int) -> np.ndarray:
        return self.array(self.photo["groups"][group]["scores"])

    def canvas(self) -> np.ndarray:
        """The pixels of the canvas, (height, width, 4)."""
        url = self.viewer.locator("canvas").evaluate("canvas => canvas.toDataURL('image/png')")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))

    def patch(self) -> dict[str, Any]:
        """What is said of the patch one points at; the table's rows are group, what became of it, mean and heads."""
        return self.viewer.evaluate(
            """viewer => {
                const text = (name) => viewer.querySelector(name).textContent;
                const active = viewer.querySelector(".patches").ariaActiveDescendantElement;
                return {
                    life: text(".life"), maps: text(".maps"), label: active.ariaLabel, active: active.className,
                    marks: [...viewer.querySelectorAll(".at, .carrier")].map(cell => [cell.className, Number(cell.id.split("-").pop())]),
                    table: [...viewer.querySelectorAll("tbody tr")].map(row => [...row.children].map(cell => cell.textContent)),
                };
            }"""
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def shows(self, values: np.ndarray) -> None:
        """The canvas has these values as colours, interpolated as in the pictures that are written."""
        drawn = self.canvas()
        wanted = colours.colour(to_pixels(torch.from_numpy(np.float32(values))[None], drawn.shape[:2])[0].numpy())
        off = np.abs(drawn[..., :3].astype(int) - wanted)
        assert (drawn[..., 3] == 255).all() and off.max() <= 6 and off.mean() < 0.3  # a step of the colour map, at edges of rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `iared2 explain --method ...` writes about two photos, with a merging model of random weights."""
    out = tmp_path_factory.mktemp("page")
    return explained(out)


def explained(out: Path, methods: tuple[str, ...] = METHODS, on_drop: str = "merge") -> Path:
    torch.manual_seed(1)
    interpreter = iared2.InterpreterConfig(init_score=0.5)
    model = iared2.reduce(timm.create_model("iared2_mini_patch8_64"), GROUPS, interpreter=interpreter, on_drop=on_drop).eval()
    model.labels = [f"<b>kind & {index}</b>" for index in range(model.num_classes)]
    for parameter in model.reducers.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    rng, paths = np.random.default_rng(0), []
    for name, size in (("first.png", (90, 60)), ("second.png", (64, 64))):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
        paths.append(out / name)
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    (out / "run").mkdir()
    outcome = Gallery(model, out / "run", GallerySettings("small", workers=0, methods=methods)).run(paths)
    assert outcome.exit_code == 0
    return out / "run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # in containers the tests run as root


def opened(browser: Browser, folder: Path, **settings) -> Run:
    run = Run(folder, browser.new_page(viewport={"width": 1300, "height": 900}, **settings))
    run.page.on("console", lambda message: run.said.append(message.text))
    run.page.on("pageerror", lambda error: run.said.append(str(error)))
    run.page.on("request", lambda request: run.asked.append(request.url))
    run.page.goto((folder / "index.html").as_uri())
    return run


@pytest.fixture
def run(browser, folder) -> Iterator[Run]:
    """The page as it opens; whatever a test did, nothing was complained of and nothing was asked of a network."""
    found = opened(browser, folder)
    found.viewer.locator("canvas[aria-label]").wait_for()  # drawn
    yield found
    assert not found.said
    assert [url for url in found.asked if not url.startswith("data:")] == [(folder / "index.html").as_uri()]
    found.page.close()


def test_the_group_slider_moves_heat_and_figures_by_keyboard(run):
    slider = run.viewer.get_by_role("slider", name="Group")
    slider.focus()
    run.press("Home")
    for group in range(GROUPS):
        entry, number = run.photo["groups"][group], group + 1
        run.shows(run.scores(group))
        assert run.viewer.locator("output.group").inner_text() == f"{number} of {GROUPS}"
        keeps, costs = run.viewer.locator(".keeps").inner_text(), run.viewer.locator(".costs").inner_text()
        assert f"after group {number}" in keeps and f"{100 * entry['keep_ratio']:.0f} %" in keeps
        assert f"{entry['kept']} of {entry['patches']}" in keeps
        assert f"{float(format(entry['macs'] / 1e6, '.3g')):g} M" in costs
        assert f"{100 * entry['macs'] / run.photo['dense_macs']:.0f} % of dense" in costs
        assert f"group {number} of {GROUPS}: " in slider.get_attribute("aria-valuetext")
        assert f"Scores of group {number} over the photo first" in run.viewer.locator("canvas").get_attribute("aria-label")
        run.press("ArrowRight")
    assert run.photo["groups"][-1]["macs"] == run.photo["macs"]
    assert slider.input_value() == str(GROUPS)  # there is no further one


def test_what_is_kept_is_pale_and_grey_where_the_files_say_dropped(run):
    run.viewer.get_by_role("radio", name="what is kept").check()
    assert run.viewer.get_by_role("combobox", name="Heat of").is_disabled()
    drawn, kept = run.canvas(), run.array(run.photo["kept"])[1]
    rows, columns = (pictures._cells(side, count) for side, count in zip(drawn.shape, GRID, strict=False))
    assert np.array_equal(drawn[..., 3] == 0, kept[np.ix_(rows, columns)])
    tones = drawn[drawn[..., 3] == 255][:, :3]
    low, high = (np.array(pictures.PALE) * pictures.FADE + grey * (1 - pictures.FADE) for grey in (0, 255))
    assert (tones >= low - 1).all() and (tones <= high + 1).all()
    assert "of its patches are kept" in run.viewer.locator("canvas").get_attribute("aria-label")
    assert run.viewer.locator(".frame img.grey").count() == 0


def test_opacity_is_remembered_for_heat_and_for_what_is_kept(run):
    slider, canvas = run.viewer.get_by_role("slider", name="Opacity"), run.viewer.locator("canvas")
    assert canvas.evaluate("c => getComputedStyle(c).opacity") == str(pictures.HEAT)
    slider.focus()
    run.press("ArrowRight", "ArrowRight")
    assert canvas.evaluate("c => getComputedStyle(c).opacity") == "0.7"
    assert run.viewer.locator("output.opacity").inner_text() == "70 %"
    run.viewer.get_by_role("radio", name="what is kept").check()
    assert slider.input_value() == "100"
    run.viewer.get_by_role("radio", name="heat").check()
    assert slider.input_value() == "70"


@pytest.mark.parametrize("method", METHODS)
def test_methods_show_their_stretched_maps_whatever_the_group(run, method):
    run.viewer.get_by_role("combobox", name="Heat of").select_option(label=method)
    values = run.array(run.photo["methods"][method])
    fine = values.shape != GRID
    values = values.reshape(8, 8, 8, 8).mean((1, 3)) if fine else values
    run.shows(pictures.stretched(values))
    slider = run.viewer.get_by_role("slider", name="Group")
    assert slider.is_disabled()
    note = run.page.locator("#" + slider.get_attribute("aria-describedby")).inner_text()
    assert "does not depend on the group" in note and ("mean over a patch" in note) == fine
    assert f"The map of {method} over" in run.viewer.locator("canvas").get_attribute("aria-label")
    run.viewer.get_by_role("combobox", name="Heat of").select_option(index=0)
    assert slider.is_enabled()
    run.shows(run.scores(1))


def fate(carriers: np.ndarray, place: int, group: int) -> str:
    carrier = carriers[group, place]
    if carrier == place:
        return "kept"
    before = "merged into" if group == 0 or carriers[group - 1, place] == place else "carried by"
    return f"{before} ({carrier // 8 + 1}, {carrier % 8 + 1})"


def test_patches_tell_every_heads_score_and_what_became_of_them(run):
    carriers, heads = run.array(run.photo["carriers"]).reshape(GROUPS, -1), run.array(run.photo["heads"]).reshape(GROUPS, HEADS, -1)
    assert np.array_equal(run.array(run.photo["kept"]).reshape(GROUPS, -1), carriers == np.arange(64))
    scores = [run.scores(group).reshape(-1) for group in range(GROUPS)]
    rollout = pictures.stretched(run.array(run.photo["methods"]["rollout"])).reshape(-1)
    grid = run.viewer.get_by_role("grid")
    assert "8 patches of first" in grid.get_attribute("aria-label")
    grid.focus()
    assert grid.evaluate("g => getComputedStyle(g).outlineStyle") == "solid"  # focus can be seen
    run.press("Control+Home")
    for place in range(64):
        row, column = divmod(place, 8)
        said = run.patch()
        assert said["life"].startswith(f"Row {row + 1}, column {column + 1}: ")
        for group, (number, became, *values) in enumerate(said["table"]):
            assert number == str(group + 1) and became == fate(carriers, place, group)
            if group and carriers[group - 1, place] != place:
                assert values == ["\u2013"] * (1 + HEADS)
                continue
            wanted = [scores[group][place], *heads[group, :, place]]
            assert np.abs(np.array(values, float) - wanted).max() < 6e-4
        values = dict(part.rsplit(" ", 1) for part in said["maps"].partition(": ")[2].rstrip(".").split(", "))
        assert list(values) == list(METHODS)
        assert float(values["rollout"]) == pytest.approx(rollout[place], abs=6e-4)
        assert said["label"].startswith(f"row {row + 1}, column {column + 1}: score ") and said["active"] == "at"
        merged = [["carrier", int(carriers[1, place])]] if carriers[1, place] != place else []
        assert sorted(said["marks"]) == [["at", place], *merged]
        run.press("ArrowRight" if column < 7 else "ArrowDown", *(["Home"] if column == 7 else []))
    assert (carriers[1] != np.arange(64)).any() and (carriers[2] == np.arange(64)).any()  # both kinds were seen
    run.press("Control+End", "ArrowRight", "ArrowDown")  # the grid has an end
    assert run.viewer.locator("h3.life").inner_text().startswith("Row 8, column 8")


def test_discarded_patches_are_dropped_and_then_gone_and_without_methods_there_is_no_switch(browser, tmp_path):
    run = opened(browser, explained(tmp_path, (), "discard"))
    run.viewer.locator("canvas[aria-label]").wait_for()
    assert run.viewer.locator("select").is_hidden() and not run.patch()["maps"]
    kept = run.array(run.photo["kept"]).reshape(GROUPS, -1)
    row, column = divmod(int((kept[0] & ~kept[1]).argmax()), 8)
    run.viewer.get_by_role("grid").focus()
    run.press("Control+Home", *["ArrowDown"] * row, *["ArrowRight"] * column)
    said = run.patch()
    assert said["life"] == f"Row {row + 1}, column {column + 1}: dropped in group 2."
    assert [line[1] for line in said["table"]] == ["kept", "dropped", "gone"]
    assert not run.said
    run.page.close()


def test_the_pointer_shows_a_patch_and_a_click_holds_it(run):
    life = run.viewer.locator("h3.life")
    start = life.inner_text()
    box = run.viewer.get_by_role("grid").bounding_box()

    def place(row, column):
        return box["x"] + (column + 0.5) * box["width"] / 8, box["y"] + (row + 0.5) * box["height"] / 8

    run.page.mouse.move(*place(2, 5))
    assert life.inner_text().startswith("Row 3, column 6")
    run.page.mouse.move(5, 5)
    assert life.inner_text() == start
    run.page.mouse.click(*place(6, 0))
    run.page.mouse.move(5, 5)
    assert life.inner_text().startswith("Row 7, column 1")


def test_the_page_opens_on_the_patch_that_the_last_group_scores_highest(run):
    row, column = divmod(int(run.scores(GROUPS - 1).argmax()), 8)
    assert run.viewer.locator("h3.life").inner_text() == f"Row {row + 1}, column {column + 1}: kept to the end."


def test_predictions_stand_in_the_viewer_and_names_are_text(run):
    best = run.photo["predictions"]
    assert len(best) == 5
    shown = run.viewer.locator(".predictions .label").all_inner_texts()
    assert shown == [prediction["label"] for prediction in best]


def test_everything_that_takes_focus_has_a_name(run):
    unnamed = "all => all.filter(e => !e.disabled && !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"
    assert run.page.locator("input, select, button, summary, a, [tabindex]").evaluate_all(unnamed) == []
    assert run.page.locator("img:not([alt])").count() == 0
    ids = run.page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    for other in run.page.locator("[aria-describedby], [aria-labelledby]").all():
        assert (other.get_attribute("aria-describedby") or other.get_attribute("aria-labelledby")) in ids


def test_each_photo_has_its_own_viewer(run):
    second = run.page.locator("article").nth(1)
    second.scroll_into_view_if_needed()
    second.get_by_role("slider", name="Group").fill("3")
    assert second.locator("output.group").inner_text() == "3 of 3"
    assert run.viewer.locator("output.group").inner_text() == "2 of 3"
    second.get_by_role("radio", name="what is kept").check()
    assert run.viewer.get_by_role("radio", name="heat").is_checked()


def test_nothing_can_be_loaded_from_elsewhere(browser, folder):
    run = opened(browser, folder, offline=True)
    violated = "new Promise(done => { addEventListener('securitypolicyviolation', event => done(event.violatedDirective)); })"
    run.page.evaluate(f"violated = {violated}; new Image().src = 'http://a.test/x';")
    assert run.page.evaluate("violated") == "img-src"
    run.page.close()


def test_without_scripts_and_on_paper_the_pictures_stand_in_rows(browser, folder):
    plain = opened(browser, folder, java_script_enabled=False)
    assert plain.page.locator(".viewer").count() == 0
    assert [one.is_visible() for one in plain.page.locator("article img").all()] == [True] * 2 * (1 + 2 * GROUPS)
    paper = opened(browser, folder)
    paper.viewer.wait_for()
    paper.page.locator(".overview > summary").first.click()  # closed on the screen
    paper.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    paper.page.emulate_media(media="print")
    assert paper.viewer.is_hidden()
    assert all(one.is_visible() for one in paper.page.locator("article .overview img").all())
    for run in (plain, paper):
        run.page.close()


def test_the_photo_stands_in_its_row_until_its_viewer_does(browser, folder):
    """Whoever takes a picture of the page before a card came near the screen misses nothing."""
    run = opened(browser, folder)
    run.viewer.wait_for()
    assert run.page.locator(".viewed .column.photo img").first.is_hidden()
    run.page.evaluate("document.querySelector('article').classList.remove('viewed')")
    assert run.page.locator("article:not(.viewed) .column.photo img").first.is_visible()
    run.page.close()


def test_narrow_and_dark_screens(browser, folder):
    run = opened(browser, folder, color_scheme="dark")
    run.page.set_viewport_size({"width": 400, "height": 800})
    run.viewer.locator("canvas[aria-label]").wait_for()
    assert run.page.evaluate("document.documentElement.scrollWidth") == 400
    ink, paper = (run.page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert max(int(x) for x in paper[4:-1].split(",")) < 40 and min(int(x) for x in ink[4:-1].split(",")) > 200
    run.page.close()


def test_pages_over_very_many_photos_leave_scores_per_head_to_the_files(browser, tmp_path, monkeypatch):
    side = page.thumbnail_side(401)
    monkeypatch.setattr(page, "thumbnail_side", lambda _: side)
    run = opened(browser, explained(tmp_path))
    run.viewer.locator("canvas[aria-label]").wait_for()
    assert [len(row) for row in run.patch()["table"]] == [3] * GROUPS
    assert "heads.npy" in run.viewer.locator(".patch").inner_text()
    assert run.array(run.photo["heads"]).shape == (GROUPS, HEADS, *GRID)
    assert not run.said
    run.page.close()
