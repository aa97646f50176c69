"""The Chinese texts have the code of the English ones, and links that lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAIRS = [("README.md", "README.zh-CN.md")]


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
