"""The Chinese texts have the code of the English ones, and links that lead somewhere."""

import json
import pathlib
import re
import shutil

import pytest

from tools import build_tutorials

ROOT = pathlib.Path(__file__).parent.parent
PAIRS = [("README.md", "README.zh-CN.md")]
TUTORIALS = sorted((ROOT / "tutorials" / "zh").glob("*.md"))
each_tutorial = pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)


def cells_of(path):
    return json.loads(path.with_suffix(".ipynb").read_text())["cells"]


def english_of(tutorial):
    return ROOT / "tutorials" / f"{tutorial.stem}.py"


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_code_is_the_same(english, chinese):
    codes = [re.findall(r"```.*?```", (ROOT / name).read_text(), flags=re.DOTALL) for name in (english, chinese)]
    assert codes[0]
    assert codes[0] == codes[1]


@pytest.mark.parametrize("chinese", [chinese for _, chinese in PAIRS])
def test_links_and_names_of_losses_exist(chinese):
    from keras_kd import losses

    text = (ROOT / chinese).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link
    assert set(re.findall(r"`([A-Z][A-Za-z]+Loss)`", text)) <= set(losses.__all__)


def test_the_chinese_readme_has_the_figures_of_the_english_one():
    english, chinese = ((ROOT / name).read_text() for name in PAIRS[0])
    captions = [text.split("results/quantization.png)")[1].split("```")[0] for text in (english, chinese)]
    figures = [sorted(re.findall(r"\d+\.\d %|\d+,\d{3}", text)) for text in captions]
    assert len(figures[0]) > 15
    assert figures[0] == figures[1]
    by_keras = re.search(r"([\d,]+) bytes of weights remain \(([\d.]+) %\)", english)
    assert by_keras.groups() == re.search(r"权重仍有 ([\d,]+) 字节\W*([\d.]+) %", chinese).groups()


def test_the_chinese_readme_has_the_statuses_of_the_english_one():
    def names(text, stable, experimental):
        part = text.split(stable)[1].split("\n\n")[0]
        return [re.findall(r"`([^`]+)`", half) for half in part.split(experimental)]

    english, chinese = ((ROOT / name).read_text() for name in PAIRS[0])
    assert names(english, "Stable (", "Experimental") == names(chinese, "| 稳定", "实验性")


def test_there_are_tutorials_and_the_gallery_names_each():
    gallery = (ROOT / "tutorials" / "README.md").read_text()
    assert TUTORIALS
    for tutorial in TUTORIALS:
        assert f"[中文](zh/{tutorial.stem}.ipynb)" in gallery


@each_tutorial
def test_a_tutorial_has_the_code_and_the_outputs_of_the_english_one(tutorial):
    ours, theirs = cells_of(tutorial), cells_of(english_of(tutorial))
    assert [cell["cell_type"] for cell in ours] == [cell["cell_type"] for cell in theirs]
    assert [cell for cell in ours if cell["cell_type"] == "code"] == [cell for cell in theirs if cell["cell_type"] == "code"]


@each_tutorial
def test_the_notebook_of_a_tutorial_holds_its_text(tutorial):
    texts = [part.strip() for part in tutorial.read_text().split("<!-- code -->")]
    assert texts == ["".join(cell["source"]) for cell in cells_of(tutorial) if cell["cell_type"] == "markdown"]


@each_tutorial
def test_a_tutorial_says_in_chinese_what_the_english_one_says(tutorial):
    pairs = zip(cells_of(tutorial), cells_of(english_of(tutorial)), strict=True)
    for ours, theirs in (["".join(cell["source"]) for cell in pair] for pair in pairs if pair[0]["cell_type"] == "markdown"):
        assert len(re.findall(r"[\u4e00-\u9fff]", ours)) > len(theirs) / 8  # two or three letters a character, and code
        headings = [re.findall(r"^(#+) ", text, flags=re.MULTILINE) for text in (ours, theirs)]
        assert headings[0] == headings[1]
        names = [set(re.findall(r"`([\w.=\"]+)`", text)) for text in (ours, theirs)]
        assert names[0] == names[1]
        numbers = [set(re.findall(r"\d+", text)) for text in (ours, theirs)]
        assert numbers[0] == numbers[1]
        for link in re.findall(r"\]\((?!http)([^)#]+)", ours):
            assert (tutorial.parent / link).exists(), link


def test_the_build_refuses_a_text_that_lacks_a_cell(tmp_path):
    (tmp_path / "zh").mkdir()
    tutorial = TUTORIALS[0]
    for name in (english_of(tutorial), english_of(tutorial).with_suffix(".ipynb")):
        shutil.copy(name, tmp_path)
    text = tmp_path / "zh" / tutorial.name
    text.write_text(tutorial.read_text().rsplit("<!-- code -->", 1)[0])
    with pytest.raises(SystemExit, match="needs a text for each of the tutorial's"):
        build_tutorials.main([str(text)])
    text.write_text(tutorial.read_text())
    build_tutorials.main([str(text)])
    assert text.with_suffix(".ipynb").read_text() == tutorial.with_suffix(".ipynb").read_text()
