"""The command line: outcomes, exit codes, one clear sentence, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from polylens.cli import app
from polylens.corpora import starter_corpus
from polylens.run_folder import STAGES
from tiny import build, save_tiny, tiny_tokenizer

QUICK = [
    "probe.texts_per_language=4",
    "train.rows=4",
    "train.batch_size=2",
    "evaluate.rows=4",
    "evaluate.max_new_tokens=2",
    "gate.text_margin=9",
    "gate.choice_margin=9",  # so few rows of a random model, and its guesses, show nothing
    "gate.steps=1",
    "train.retain_choices=0",
]


COMMANDS = tuple(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that cannot work."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").write_text("")
    (folder / "no-centre.jsonl").write_text('{"sw": "Habari", "zh": "你好"}\n' * 5)
    (folder / "not-parallel.jsonl").write_text('{"en": "Hello"}\n{"sw": "Habari"}\n' * 5)
    (folder / "sparse.jsonl").write_text(
        '{"en": "Hello", "sw": "Habari"}\n'
        + "".join(f'{{"en": "Hello {n}", "zh": "你好{n}"}}\n' for n in range(9))
    )
    (folder / "unanswered.jsonl").write_text(
        "".join(f'{{"en": "Hello {n}", "sw": "Habari {n}"}}\n' for n in range(40))
    )
    (folder / "typo.yaml").write_text("languages: [sw]\ntrain:\n  epoch: 3\n")
    (folder / "no-weights").mkdir()
    build().config.save_pretrained(folder / "no-weights")
    (folder / "pickled").mkdir()
    build().config.save_pretrained(folder / "pickled")
    (folder / "pickled/config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (folder / "pickled/pytorch_model.bin").write_bytes(b"pickle")
    (folder / "no-weights/config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (folder / "encoder").mkdir()
    (folder / "encoder/config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
    )
    (folder / "used").mkdir()
    (folder / "used/thesis.tex").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--languages", "swahilli"], "got 'swahilli', did you mean 'swahili'?"),
        (["--languages", "en"], "target languages must differ from the central language"),
        (["--languages", ""], "languages"),
        ([], "languages is missing"),
        (["--languages", "sw", "--train-data", "{bad}/empty.jsonl"], "is empty"),
        (["--languages", "sw", "--train-data", "{bad}/none.jsonl"], "there is no"),
        (["--languages", "sw", "--train-data", "{bad}/no-centre.jsonl"], "has none in en"),
        (["--languages", "sw", "--probe-data", "{bad}/no-centre.jsonl"], "has none in en"),
        (
            ["--languages", "sw", "--train-data", "{bad}/not-parallel.jsonl"],
            "none holds both en and sw",
        ),
        (
            ["--languages", "sw", "--train-data", "{bad}/unanswered.jsonl", "--preset", "answers"],
            "must have answers in the target languages, but unanswered.jsonl has none",
        ),
        (["--languages", "sw", "train.max_tokens=3"], "none does in 3 tokens"),
        (["--languages", "sw", "probe.max_tokens=3"], "none does in 3 tokens"),
        (
            ["--languages", "sw", "--model", "smollm2-135m-instrukt"],
            "did you mean 'smollm2-135m-instruct'?",
        ),
        (["--languages", "sw", "--model", "{bad}/none"], "must be an existing folder"),
        (
            ["--languages", "sw", "--model", "owner/name"],
            "must be in the Hub cache to be used offline",
        ),
        (
            ["--languages", "sw", "--model", "gemma3-270m", "--offline"],
            "must be in the cache to be used offline",
        ),
        (["--languages", "sw", "--model", "{bad}/no-weights"], "holds none; copy the weights"),
        (["--languages", "sw", "--model", "{bad}/pickled"], "a pickle, which PolyLens never loads"),
        (
            ["--languages", "sw", "--model", "{bad}/encoder"],
            "must be a decoder-only language model",
        ),
        (
            ["--languages", "sw", "probe.rank=2"],
            "rank must be between 1 and 1 for 2 languages, got 2",
        ),
        (["--languages", "sw", "train.layers=9"], "train.layers must be between 1 and 4"),
        (["--languages", "sw", "probe.layers=[7]"], "layer must be between 0 and 3"),
        (
            ["--languages", "sw", "probe.layers=[1]"],
            "must hold layer 4, whose states training reads",
        ),
        (["{bad}/typo.yaml"], "unknown key train.epoch, did you mean 'epochs'?"),
        (["--languages", "sw", "epochs"], "one YAML file and settings as key=value, got 'epochs'"),
        (["--languages", "sw", "--out", "{bad}/used"], "holds other files"),
        (
            [
                "--languages",
                "sw,zh",
                "--train-data",
                "{bad}/sparse.jsonl",
                "evaluate.corpus=null",
                "evaluate.rows=2",
            ],
            "rows must hold each language",
        ),
        (["--languages", "sw", "evaluate.extra_languages=en"], "neither central nor trained"),
        (["--languages", "sw", "--device", "cuda:7"], "device must be"),
        (["--languages", "sw", "--dtype", "int4"], "dtype"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    run: Any, bad: Path, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.format(bad=bad) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_folder)]
    if "--out" not in arguments:
        arguments += ["--out", "run"]
    code, out, err = run("enhance", *arguments)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert os.listdir() == []  # nothing half-written
    assert os.listdir(bad / "used") == ["thesis.tex"]


def test_a_whole_run_then_each_command_on_its_results(run: Any, tiny_folder: Path) -> None:
    enhance = ["enhance", "--model", tiny_folder, "--languages", "sw,zh", "--out", "run", *QUICK]
    code, out, err = run(*enhance)
    assert code == 0, err
    assert "Swahili (sw)" in out
    assert "run/report.html" in out
    assert "[8/8] Writing the report" in err
    code, out, err = run(*enhance)
    assert code == 0
    assert "Nothing to do: run was finished before" in out
    code, out, _ = run(*enhance, "--json", "-q")
    assert json.loads(out)["languages"] == ["sw", "zh"]
    code, _, err = run(*enhance, "seed=5")
    assert code == 2
    assert "holds a run with other settings" in err

    code, out, _ = run("report", "run", "--out", "again.html")
    assert code == 0
    assert Path("again.html").read_bytes() == Path("run/report.html").read_bytes()
    code, out, err = run(
        "evaluate", "run", "-l", "sw,zh", "--rows", 4, "--strength", 0,
        "--max-new-tokens", 2, "--no-gate", "--out", "answers",
    )  # fmt: skip
    assert code == 0, err
    assert "answers/summary.json" in out
    measures = json.loads(Path("answers/summary.json").read_text())["measures"]["after"]
    assert {one["change"]["difference"] for one in measures} == {0}
    assert Path("answers/comparison.html").stat().st_size > 1_000_000
    code, out, err = run("compare", "answers/before", "answers/after", "--json")
    assert code == 0, err
    assert json.loads(out)["measures"]["after"] == measures
    other = save_tiny(Path("other"), "qwen2")
    code, _, err = run("evaluate", "run/delta.safetensors", "--against", other)
    assert code == 2
    assert "belongs to another one" in err
    code, _, err = run("train", "run/subspaces.safetensors", "--model", other)
    assert code == 2
    assert "probed on another one" in err


def test_harm_ends_in_exit_code_3(run: Any, taught_folder: Path) -> None:
    """And a model that harms is not saved."""
    code, out, err = run(
        "enhance", "--model", taught_folder, "--languages", "sw", "--out", "run", *QUICK,
        "gate.text_margin=0.01", "train.learning_rate=0.3", "train.retain_weight=0",
    )  # fmt: skip
    assert code == 3
    assert "It holds at no strength" in " ".join(err.split())
    assert "run/report.html" in out
    assert not Path("run/model").exists()
    code, out, err = run(
        "evaluate", "run", "-l", "sw", "-t", "bits_per_byte", "--rows", 4, "--out", "answers"
    )
    assert code == 3
    assert "Gate fails. English, bits per byte" in " ".join(err.split())
    assert "answers/summary.json" in out  # what was measured is kept


def test_one_strength_that_holds_is_enough(run: Any, taught_folder: Path) -> None:
    code, _, err = run(
        "enhance", "--model", taught_folder, "--languages", "sw", "--out", "run", *QUICK,
        "train.learning_rate=0.3",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run(
        "evaluate", "run", "-l", "sw", "-t", "bits_per_byte", "--rows", 16, "--strength", "0,1",
        "--out", "answers", "--json",
    )  # fmt: skip
    assert code == 0, err
    gate = json.loads(out)["gate"]
    assert (gate["after-0"]["holds"], gate["after-1"]["holds"]) == (True, False)


def write_copa(folder: Path, n: int = 8) -> Path:
    """Local copies of benchmarks, as small as they can be."""
    items = "".join(
        f'<item id="{k + 1}" asks-for="cause" most-plausible-alternative="{k % 2 + 1}">'
        f"<p>The lamp {k} broke.</p><a1>It fell.</a1><a2>It rained.</a2></item>"
        for k in range(n)
    )
    (folder / "copa").mkdir(parents=True)
    (folder / "copa/copa-dev.xml").write_text(f"<copa-corpus>{items}</copa-corpus>")
    return folder


def test_benchmarks(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    data = write_copa(tmp_path / "data")
    evaluate = [
        "evaluate", tiny_folder, "-l", "en", "-t", "xcopa,xcopa_letters", "--data-dir", data,
        "--out", "answers",
    ]  # fmt: skip
    code, out, err = run(*evaluate, "--json")
    assert code == 0, err
    figures = {one["name"]: one for one in json.loads(out)}
    assert figures.keys() == {"xcopa_en", "xcopa_en_letters"}
    assert figures["xcopa_en"]["n"] == 8
    code, out, _ = run(*evaluate)
    assert code == 0
    assert "95 % interval" in out
    (line, *_) = Path("answers/after/xcopa_en.jsonl").read_text().splitlines()
    assert "The lamp 0 broke because" in json.loads(line)["prompt"]
    code, out, _ = run("evaluate", "--list-tasks")
    assert code == 0
    assert "belebele" in out
    assert "retrieval" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "xcoppa"], "got 'xcoppa', did you mean 'xcopa'?"),
        (["-t", "xcopa"], "--data-dir is not given; fetch COPA"),
        (["-t", "xcopa", "--data-dir", "."], "is not there; fetch COPA"),
        (["-t", "mgsm", "--data-dir", "."], "is not there; git clone"),
        (["-l", "en"], "must have a language besides en"),
        (["-l", "swahilli"], "did you mean 'swahili'?"),
        (["--strength", "1"], "--strength must go with a run or a delta"),
        (["--strength", "much"], "--strength must be numbers by commas"),
        (["--strength", "-1"], "--strength must be at least 0"),
        (["--margin", "2"], "margin"),
        (["--against", "none/such"], "none/such"),
    ],
)
def test_faulty_evaluations_end_in_one_sentence(
    run: Any, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run("evaluate", tiny_folder, *arguments)
    assert message in " ".join(err.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert not list(Path().rglob("*.jsonl"))


def test_folders_that_hold_no_answers(run: Any) -> None:
    code, _, err = run("compare", "a", "b")
    assert code == 2
    assert "must hold scorecard.json, but a does not" in " ".join(err.split())


def test_probe_then_train(run: Any, tiny_folder: Path) -> None:
    code, out, err = run(
        "probe", "--model", tiny_folder, "--languages", "en,sw,bn", "--out", "probe"
    )
    assert code == 0, err
    assert "norm" in out
    assert Path("probe/probe.html").stat().st_size > 1_000_000
    code, out, err = run(
        "train", "probe/subspaces.safetensors", "-s", "rows=4", "-s", "epochs=2",
        "--model", tiny_folder, "--out", "d.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["log"]) == 2
    assert Path("d.safetensors").exists()


def test_a_faulty_probe_stops_before_the_trunk_pass(
    run: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the trunk ran")

    monkeypatch.setattr("polylens.states_cache.collect_hidden_states", never)
    for arguments, message in (
        (["--languages", "en"], "at least 2 languages, got 1"),
        (["--languages", "en,sw", "--rank", "2"], "rank must be between 1 and 1"),
    ):
        code, _, err = run("probe", "--model", tiny_folder, *arguments)
        assert code == 2
        assert message in " ".join(err.split())


def test_data(run: Any, tiny_folder: Path) -> None:
    code, out, err = run("data", "--model", tiny_folder, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["n_rows"] == 128
    assert report["languages"][0]["language"] == "en"
    assert report["languages"][0]["token_premium"] == 1
    Path("rows.jsonl").write_text(
        "".join(
            json.dumps(
                {"en": f"Question number {i} about rain", "sw": f"Question number {i} about rain"}
            )
            + "\n"
            for i in range(5)
        )
    )
    code, out, _ = run("data", "rows.jsonl")
    assert "sw: 5 of 5 texts equal the central language's text" in " ".join(out.split())


def test_models_and_doctor(run: Any, tiny_folder: Path) -> None:
    code, out, _ = run("models", "--json")
    assert code == 0
    assert {row["name"] for row in json.loads(out)} >= {"smollm2-135m-instruct", "gemma3-270m"}
    code, _, err = run("models", "fetch", "smolm2")
    assert code == 2
    assert "did you mean" in err or "must be one of" in err
    code, out, err = run("doctor", "--model", tiny_folder, "--languages", "sw", "--json")
    assert code == 0, err
    cost = json.loads(out)["run"]
    assert cost["flops"] > 0
    assert cost["memory_bytes"] > 0
    code, out, _ = run("doctor")
    assert code == 0
    assert "torch" in out


FORECAST = ["doctor", "--languages", "sw,zh", "train.rows=3", "evaluate.rows=2"]


def test_a_forecast(run: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polylens.forecast.MAX_NEW_TOKENS", 2)
    code, out, err = run(*FORECAST, "--model", tiny_folder, "--forecast", "--json")
    assert code == 0, err
    found = json.loads(out)["forecast"]
    assert list(found) == ["en", "sw", "zh"]
    for language, signs in found.items():
        assert signs["n_texts"] == signs["n_answers"] == 3
        assert signs["bits_per_byte"] > 0
        assert ("outlook" in signs) == ("sentence" in signs) == (language != "en")
    code, out, err = run(*FORECAST, "--model", tiny_folder, "--forecast")
    assert code == 0, err
    words = " ".join(out.split())
    for language, name in (("sw", "Swahili"), ("zh", "Chinese")):
        assert f"{name}: {found[language]['sentence']}." in words


def test_without_a_forecast_no_weights_are_loaded(
    run: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("polylens.cli.doctor.load_as_planned")
    code, out, err = run(*FORECAST, "--model", tiny_folder, "--json")
    assert code == 0, err
    assert "forecast" not in json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forecast"], "need its languages; add --languages"),
        (["--forecast", "--languages", "sw", "train.rows=1"], "at least two rows of each language"),
        (["--forecast", "--languages", "swa-hili"], "must be a BCP 47 code"),
    ],
)
def test_a_forecast_that_cannot_be_made(
    run: Any, tiny_folder: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run("doctor", "--model", tiny_folder, *arguments)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())


def test_an_unreadable_cache(
    run: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file where a folder should be")
    monkeypatch.setenv("POLYLENS_CACHE", str(cache))
    code, _, err = run(
        "enhance", "--model", tiny_folder, "--languages", "sw", "--out", "run", *QUICK
    )
    assert code == 2
    assert "must be a folder, but a file of that name is in the way" in " ".join(err.split())


def test_data_keeps_the_central_language(run: Any) -> None:
    code, out, err = run("data", "--languages", "sw,bn", "--json")
    assert code == 0, err
    assert {one["language"] for one in json.loads(out)["languages"]} == {"en", "sw", "bn"}


def test_brackets_in_an_error_are_kept(run: Any) -> None:
    code, _, err = run("enhance", "--languages", "sw", "--model", "a[b]c[/b]")
    assert code == 2
    assert "a[b]c[/b]" in err


def test_ctrl_c_ends_in_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polylens.cli.run.enhance_run", interrupted)
    code, out, err = run("enhance", "--languages", "sw")
    assert code == 130
    assert out == ""
    assert err.splitlines() == [
        "Interrupted. What was finished is kept; run the same command to go on."
    ]


def test_a_program_can_watch_a_run(run: Any, tiny_folder: Path) -> None:
    code, _, err = run(
        "enhance", "--model", tiny_folder, "--languages", "sw", "--out", "run", "--progress-lines",
        *QUICK,
    )  # fmt: skip
    assert code == 0, err
    told = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert tuple(dict.fromkeys(line["stage"] for line in told if line["stage"])) == STAGES
    training = [line for line in told if line.get("what") == "training"]
    assert (training[0]["done"], training[0]["seconds_left"]) == (0, None)
    assert training[-1]["done"] == training[-1]["total"] == 6
    assert all(line["seconds_left"] >= 0 for line in told if line.get("done"))


def test_help_of_every_command_has_examples(run: Any) -> None:
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"polylens {command}" in out


def test_truncated_prompts_still_end_in_the_template(tiny_folder: Path) -> None:
    """The starter corpus is long for a byte-level tokenizer, so the runs above truncate."""
    text = max((row["bn"] for row in starter_corpus().rows), key=len)
    assert len(tiny_tokenizer()(text)["input_ids"]) > 128
