"""convert, evaluate and doctor, as a user meets them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.metadata import version

import numpy as np
import pytest
from support.commands import COMMAND, listing


def test_convert_makes_what_stock_sentence_transformers_loads(cli, tiny_decoder, sentences):
    from sentence_transformers import SentenceTransformer

    from unmasked import LLM2Vec

    code, out, err = cli("convert", tiny_decoder, "-o", "model", "--max-length", 64)
    assert code == 0
    assert out.startswith("bidirectional: full (llama, sdpa)")
    assert "saved  model\nnext   unmasked encode model texts.txt -o vectors.npy\n" in out
    assert "Loading weights" not in err
    assert "Writing model shards" not in err
    stock = SentenceTransformer("model", device="cpu").encode(sentences, show_progress_bar=False)
    ours = LLM2Vec.from_pretrained("model", device="cpu").encode(sentences)
    np.testing.assert_allclose(stock, ours, atol=1e-5)


def test_convert_passes_on_no_notes_of_the_libraries(tmp_path, tiny_tokenizer):
    from support import tiny
    from support.tiny import save_random

    # Most decoders have a head of their own, which transformers reports as unexpected.
    save_random(tmp_path / "decoder", tiny.config("llama"), tiny_tokenizer)
    words = [*COMMAND, "convert", "decoder", "-o", "new"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["loading decoder", "saving"]


def test_convert_refuses_an_output_before_it_loads_anything(cli, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = listing(tmp_path)
    for output in ("full", "full/mine.txt"):
        code, out, err = cli("convert", "no/such-model", "-o", output)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {output} ")
        assert "Fix: give another name." in err
    assert listing(tmp_path) == before


def test_convert_refuses_a_model_without_attention(cli, tiny_mamba, tmp_path):
    code, _, err = cli("convert", tiny_mamba, "-o", "model")
    assert code == 2
    assert "'mamba' with eager attention is not bidirectional" in err
    assert "Traceback" not in err
    assert not listing(tmp_path)


def test_convert_names_what_a_folder_lacks(cli, tiny_decoder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_decoder / name).read_bytes())
    code, _, err = cli("convert", bare, "-o", "model")
    assert code == 2
    assert "has a model but no tokenizer" in err
    code, _, err = cli("convert", tmp_path / "none", "-o", "model")
    assert code == 2
    assert "none: no such folder, did you mean" in err


def test_convert_tells_weights_that_were_cut_off(cli, tiny_decoder, tmp_path):
    cut = shutil.copytree(tiny_decoder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = cli("convert", cut, "-o", "model")
    assert code == 2
    assert f"{cut}: a .safetensors file is broken" in err
    assert not (tmp_path / "model").exists()


def test_evaluate_against_the_causal_decoder(cli, tiny_decoder, tasks, tmp_path):
    options = [word for task in tasks for word in ("--tasks", task)]
    code, out, err = cli("convert", tiny_decoder, "-o", "model")
    assert code == 0, err
    code, out, _ = cli("evaluate", "model", *options)
    assert code == 0
    assert re.search(r"^sts +spearman +-?[\d.]+ +\[.+\]$", out, re.M)
    code, out, err = cli(
        "evaluate", "model", *options, "--against", "causal", "--base", tiny_decoder,
        "--json", "scores.json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert {row["encoder"] for row in rows} == {
        "model", "causal_mean", "causal_weighted_mean", "causal_last_token",
    }  # fmt: skip
    ours, theirs = rows[:2]
    assert ours["gain"] is None
    assert theirs["gain"]["difference"] == pytest.approx(ours["score"] - theirs["score"])
    assert theirs["gain"]["low"] <= theirs["gain"]["difference"] <= theirs["gain"]["high"]
    assert out.count("causal_weighted_mean") == 2
    code, _, err = cli("evaluate", "model", *options, "--against", "causal")
    assert code == 2
    assert "has no causal mask any more" in err
    assert "--base" in err


def test_evaluate_several_models(cli, tiny_decoder, tasks, tmp_path):
    options = [word for task in tasks for word in ("--tasks", task)]
    words = "The\tDET\ncat\tNOUN\n\nA\tDET\ndog\tNOUN\n"
    for split in ("train", "dev"):
        (tmp_path / f"w_{split}.tsv").write_text(words)
    code, _, err = cli("convert", tiny_decoder, "-o", "model")
    assert code == 0, err
    options += ["--tasks", "words:w_dev.tsv"]
    code, out, err = cli("evaluate", "model", tiny_decoder, *options)
    assert code == 0, err
    assert re.search(r"^sts\.spearman +model ", out, re.M)
    same = (
        rf"^sts\.spearman +{re.escape(str(tiny_decoder))} .*\+0\.00 +\S+ +not clear: may be chance"
    )
    assert re.search(same, out.replace("[0.00, 0.00]", "-"), re.M), out
    assert "w_dev.upos accuracy" in out and "upos before" not in out
    code, out, _ = cli("evaluate", "model", tiny_decoder, *options, "--all")
    assert "w_dev.upos before accuracy" in out and "sts.pearson" in out
    code, _, err = cli("evaluate", "model", "--tasks", "words:absent.tsv")
    assert (code, "absent.tsv: no such file" in err) == (2, True)


def test_evaluate_refuses_a_json_file_in_no_folder_before_it_scores(cli, tasks):
    code, out, err = cli("evaluate", "nano", "--tasks", tasks[0], "--json", "nowhere/a.json")
    assert (code, out) == (2, "")
    assert err == (
        "error: nowhere/a.json cannot be written: nowhere is not a folder. "
        "Fix: mkdir -p nowhere, or give another name.\n"
    )


def test_a_json_file_that_cannot_be_written_is_refused_before_anything_is_scored(
    cli, tasks, tmp_path
):
    (tmp_path / "folder").mkdir()
    code, out, err = cli("evaluate", "nano", "--tasks", tasks[0], "--json", "folder")
    assert (code, out) == (2, "")
    assert err == "error: folder cannot be written: it is a folder. Fix: give another name.\n"
    code, out, err = cli("evaluate", "nano", "--tasks", tasks[0], "--json", "/proc/a.json")
    assert (code, out) == (2, "")
    assert "/proc/a.json cannot be written" in err and "Fix: " in err


def test_a_folder_called_nano_is_not_the_bundled_decoder(cli, tiny_decoder, tmp_path):
    shutil.copytree(tiny_decoder, tmp_path / "nano")
    (tmp_path / "in.txt").write_text("one text\n")
    for name, width in (("nano", 256), ("./nano", 32)):
        code, out, err = cli("encode", name, "in.txt", "-o", f"{width}.npy")
        assert code == 0, err
        assert f"1 vectors of {width} numbers" in out


def test_a_run_folder_stands_for_the_encoder_that_was_made_in_it(cli, tiny_decoder, tmp_path):
    shutil.copytree(tiny_decoder, tmp_path / "runs" / "law" / "model")
    (tmp_path / "in.txt").write_text("one text\n")
    code, out, err = cli("encode", "runs/law", "in.txt", "-o", "v.npy")
    assert code == 0, err
    assert "1 vectors of 32 numbers" in out


def test_a_length_beyond_the_positions_is_refused(cli, tiny_decoder, tmp_path):
    code, _, err = cli("convert", tiny_decoder, "-o", "m", "--max-length", "100000")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: max_length 100,000: this model has 128 positions, and was trained on no longer "
        "input. Fix: max_length=128 (--max-length 128), or less."
    )
    assert not (tmp_path / "m").exists()


def test_every_example_of_a_task_file_is_read(cli, tmp_path):
    from unmasked.evaluate.scorer import make_scorer
    from unmasked.evaluate.tasks.formats import FORMATS

    code, out, _ = cli("evaluate", "--formats")
    assert code == 0
    for one in FORMATS:
        for name, content in one.files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")
            assert all(f"    {line}\n" in out for line in content.splitlines())
    make_scorer([one.given for one in FORMATS])


def test_doctor_knows_this_machine(cli):

    code, out, _ = cli("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["torch"] == version("torch")
    assert any(device.startswith("cpu ") for device in found["devices"])
    for extra in ("eval", "report", "corpus", "wandb"):
        assert re.match(rf"installed|pip install .*\[{extra}\]", found[f"extra_{extra}"])
    code, out, _ = cli("doctor")
    assert code == 0
    assert re.search(r"^torch +" + re.escape(version("torch")), out, re.M)


def test_doctor_examines_a_model(cli, tiny_decoder, tmp_path):
    from unmasked import LLM2Vec

    prompts = {"query": "Find the answer:\n", "bad": "query: "}
    LLM2Vec.from_pretrained(tiny_decoder, prompts=prompts, device="cpu").save(tmp_path / "model")
    code, out, _ = cli("doctor", "model", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["verdict"] == "full"
    assert found["bidirectional"] is True
    assert found["bos_added"] == ["<s>"]
    assert found["mntp_mask"] == "_"
    assert set(found["tokens_per_character"]) == {"English", "Korean"}
    assert (found["width"], found["layers"], found["max_positions"]) == (32, 2, 128)
    assert found["parameters"] == 31392
    assert found["prompt"]["query"].startswith("stable")
    assert found["prompt"]["bad"].startswith("UNSTABLE in stock loaders: 'query: ' merges with")


def test_doctor_ends_with_2_for_a_model_that_stays_causal(cli, tiny_mamba):
    code, out, _ = cli("doctor", tiny_mamba)
    assert code == 2
    assert re.search(r"^bidirectional +no$", out, re.M)
    assert re.search(r"^model type +mamba$", out, re.M)
