"""What stands around a text: which tokenizer has which template, and every form it is given in."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from unmasked.errors import ModelError
from unmasked.text.templates import PLAIN, Template, detect, named, read_template, shipped


def test_tokenizers_of_later_models_have_no_template_as_published():
    llama = "<|start_header_id|><|end_header_id|><|eot_id|>"
    assert detect(llama, {}) == named("llama3")
    assert detect(llama, {"<|python_tag|>": 9}) is None
    assert detect("<|im_start|><|im_end|>", {}) == named("chatml")
    assert detect("<|im_start|><|im_end|>", {"<tool_call>": 9}) is None
    assert detect(None, {}) is None


@pytest.mark.parametrize("name", shipped())
def test_every_row_is_complete_and_found_by_what_it_needs(name):
    row = shipped()[name]
    assert {*asdict(PLAIN), "needs", "lacks"} == set(row)
    assert detect(" ".join(row["needs"]), {}) == named(name) == read_template(row)
    assert detect(" ".join(row["needs"][1:]), {}) is None


def test_a_template_is_the_same_in_every_form_it_is_given_in():
    template = Template("<user>", "</user>", " ", pool_suffix=False)
    assert read_template(template) is template
    assert read_template(asdict(template)) == template
    assert read_template({"prefix": "<user>"}) == Template("<user>")
    assert read_template("none") == read_template(None) == read_template({}) == PLAIN
    with pytest.raises(ModelError, match="unknown template 'gema', did you mean 'gemma'"):
        read_template("gema")


@pytest.mark.parametrize(("instruction", "prompt"), [("", ""), ("a", "a\n"), ("a: ", "a: ")])
def test_an_instruction_ends_in_white_space(instruction, prompt):
    assert PLAIN.join(instruction) == prompt
