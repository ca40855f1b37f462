"""Whatever a file holds, reading it gives a right result or one of our sentences, and runs nothing.

Every reader is given files that were made up, cut short, and changed in a bit; then, one by one,
the attacks that somebody might think of.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from polylens.artefacts import load_tensors, read_json, save_tensors
from polylens.cli.fidelity import _read, _require_prompts
from polylens.config import load_config
from polylens.corpora import read_parallel, read_texts
from polylens.corpora.readers import read_answered
from polylens.crown import CrownDelta
from polylens.errors import ConfigError, CorpusError, ModelError, PolyLensError
from polylens.evaluation.judgements import Judgements
from polylens.evaluation.measures import Scorecard
from polylens.evaluation.mt_bench import read_conversations, read_questions
from polylens.evaluation.results import read_answers
from polylens.export.gguf import save_gguf
from polylens.journal import Journal
from polylens.models import load_model
from polylens.models.gguf_header import check_header
from polylens.models.source import describe, resolve
from polylens.prompts import choose_format
from polylens.subspaces import Subspaces
from tiny import tiny_tokenizer

# A thousand times more are made where `FAULTS` says so; every reader was given those once.
N_EXAMPLES = int(os.environ.get("FAULTS", "1")) * 15

fuzzed = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextlib.contextmanager
def ours_alone() -> Iterator[None]:
    """Any error must be ours, and a sentence."""
    try:
        yield
    except PolyLensError as error:
        message = str(error)
    else:
        return
    assert 0 < len(message) < 5000
    assert "Traceback" not in message


def _scorecard(path: Path) -> None:
    card = Scorecard(path.parent)
    for name in card.tasks:
        card.examples(name)
    _ = card.figures(), card.finished, card.identity


def _examples(path: Path) -> None:
    Scorecard(path.parent).examples(path.stem)


def _journal(path: Path) -> None:
    journal = Journal(path)
    journal.finished("probe")
    journal.check([path.parent / "delta.safetensors"])


_ROW = '{"en": "Say it", "sw": "Sema", "id": 1, "output_en": "It.", "output_sw": "Hiyo."}\n'
_CHAT = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}\n'
_ALPACA = '{"instruction": "Sema", "input": "x", "output": "y"}'
_LONG = '{"language": "en", "text": "Rain", "id": 1}\n{"language": "sw", "text": "Mvua", "id": 1}\n'
_EXAMPLE = '{"key": "1", "value": 0.5}\n'
_ASKED = '{"question_id": 1, "category": "a", "language": "en", "turns": ["One?", "Two?"]'
_JUDGED = '{"key": "k", "reply": "[[5]]", "input_tokens": 1, "output_tokens": 1}\n'
_TASK = '{"name": "t", "language": "en", "protocol": "text", "metric": "acc", '
_TASK += '"higher_is_better": true}'
_CARD = '{"identity": {"model": "m", "tokenizer": "t"}, "tasks": {"t": {"part_of": "t", "n": 1, '
_CARD += f'"mean": 1.0, "low": 0.0, "high": 1.0, "task": {_TASK}}}}}}}'
_ANSWER = '{"language": "sw", "id": 0, "prompt": "p", "answer": "a", "detected": "sw", '
_ANSWER += '"passed": true}\n'

Reader = Callable[[Path], Any]

# Name of a file → what it holds where it is right, and what reads it.
TEXTS: dict[str, tuple[str, tuple[Reader, ...]]] = {
    "rows.jsonl": (_ROW * 2, (read_texts, read_parallel, read_answered)),
    "rows.json": (f"[{_ROW}]", (read_texts, read_parallel, read_answered)),
    "en.jsonl": (_CHAT, (read_texts, read_answered)),
    "sw.json": (
        '[{"instruction": "Sema", "input": "x", "output": "y"}]',
        (read_texts, read_answered),
    ),
    "long.jsonl": (_LONG, (read_texts, read_parallel, read_answered)),
    "en.txt": ("Rain\nSnow\n", (read_texts, read_parallel, read_answered)),
    "run.yaml": ("languages: [sw]\ntrain:\n  epochs: 2\n", (load_config,)),
    "artefact.json": ('{"a": [1, 2]}', (read_json,)),
    "journal.jsonl": ('{"stage": "probe", "files": {"delta.safetensors": "0"}}\n', (_journal,)),
    "scorecard.json": (_CARD, (_scorecard,)),
    "t.jsonl": (_EXAMPLE, (_examples,)),
    "before.jsonl": (_ANSWER, (read_answers,)),
    "answers.jsonl": ('{"language": "sw", "prompt": "p", "answer": "Mvua"}\n', (_read,)),
    "prompts.csv": ("prompt\nWhat?\n", (lambda path: _require_prompts([], path, path),)),
    "questions.jsonl": (_ASKED + "}\n", (read_questions,)),
    "graded.jsonl": (f'{_ASKED}, "answers": ["A", "B"]}}\n', (read_conversations,)),
    "judgements.jsonl": (_JUDGED, (Judgements,)),
    "template.jinja": (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        (lambda path: choose_format(tiny_tokenizer(), str(path)).render(tiny_tokenizer(), "Hi"),),
    ),
}

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_KEYS = st.sampled_from(
    [
        "en",
        "sw",
        "id",
        "language",
        "text",
        "conversations",
        "turns",
        "answers",
        "role",
        "from",
        "value",
        "content",
        "files",
        "stage",
        "tasks",
        "identity",
        "key",
        "train",
        "languages",
    ]
) | st.text(max_size=4)
_VALUES = st.recursive(
    _LEAVES | st.sampled_from(["en", "sw", "human", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut short, or with some bits flipped or bytes put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=6))
        else:
            changed += changed[place:]
    return bytes(changed)


def _holding(content: bytes) -> st.SearchStrategy[bytes]:
    lines = st.lists(_VALUES, max_size=3).map(
        lambda values: "".join(f"{json.dumps(one)}\n" for one in values).encode()
    )
    return damaged(content) | lines | _VALUES.map(lambda one: json.dumps(one).encode())


@pytest.mark.parametrize("name", TEXTS)
def test_text_files_of_any_contents(name: str, tmp_path: Path) -> None:
    right, readers = TEXTS[name]
    path = tmp_path / name
    path.write_text(right)
    (tmp_path / "t.jsonl").write_text(_EXAMPLE)
    for read in readers:  # what the damage is done to is right
        with contextlib.suppress(CorpusError) if name == "prompts.csv" else ours_alone():
            read(path)

    # Each template is tried in a process of its own.
    n_examples = N_EXAMPLES // 3 if name == "template.jinja" else N_EXAMPLES

    @settings(fuzzed, max_examples=n_examples)
    @given(_holding(right.encode()) | st.binary(max_size=60))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        for read in readers:
            with ours_alone():
                read(path)

    check()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_of_any_contents(suffix: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"en": ["Rain", "Snow"], "sw": ["Mvua", "Theluji"], "id": [1, 2]}
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_dict(rows)
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("en,sw,id\nRain,Mvua,1\nSnow,Theluji,2\n")
    right = path.read_bytes()

    @settings(fuzzed, max_examples=max(5, N_EXAMPLES // 5))
    @given(damaged(right) | st.binary(max_size=60))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with ours_alone():
            read_parallel(path)

    check()


ATTACKS = {
    "deep.json": "[" * 100_000 + "]" * 100_000,
    "deep.jsonl": '{"en":' * 100_000 + "1" + "}" * 100_000,
    "digits.jsonl": '{"en": ' + "9" * 5000 + ', "sw": "a"}',
    "half_a_pair.jsonl": '{"en": "\\ud800", "sw": "a"}',
    "half_a_pair_in_a_code.jsonl": '{"language": "en-\\uD800", "text": "x", "id": 1}',
    "no_texts.json": '[{"conversations": [1, "x", null]}]',
    "ids.jsonl": '{"language": "en", "text": "x", "id": {}}\n' * 2,
    "utf_16.json": '[{"en": "a", "sw": "b"}]'.encode("utf-16"),
    "names.jsonl": '{"language": "' + "e" * 100_000 + '", "text": "x", "id": 1}',
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("read", [read_texts, read_parallel])
def test_a_hostile_corpus(name: str, read: Reader, tmp_path: Path) -> None:
    content = ATTACKS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with ours_alone():
        read(path)
        assert name == "no_texts.json" or (name, read) == ("ids.jsonl", read_texts)


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"en": "a" * 10**8, "sw": "b"}))
    assert len(read_texts(path, ["en"]).texts["en"][0]) == 10**8


@pytest.mark.parametrize("spec", ["a\0b", "x" * 5000, "~nobody-of-that-name/x", "/dev/zero"])
def test_names_of_no_file(spec: str) -> None:
    for read in (read_texts, resolve, partial(choose_format, tiny_tokenizer())):
        with pytest.raises(PolyLensError):
            read(spec)  # type: ignore[operator]


YAML_ATTACKS = {
    "laughs": "a: &a [x, x]\n"
    + "".join(
        f"{k}: &{k} [{', '.join(['*' + j] * 9)}]\n"
        for j, k in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "languages: *i\n",
    "itself": "languages: &a [*a]",
    "deep": "languages: " + "[" * 5_000,
    "python": "!!python/object/apply:os.system ['touch owned']",
    "date": "seed: 2020-13-45",
    "half_a_pair": 'languages: [sw]\nmodel: "\\uD800"',
    "control": "languages: [sw]\nmodel: 'a\x07'",
}


@pytest.mark.parametrize("name", YAML_ATTACKS)
def test_a_hostile_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(YAML_ATTACKS[name])
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(str(error.value)) < 2000
    assert os.listdir(tmp_path) == ["run.yaml"]


class _Bomb:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.safetensors",
        "model.pt",
        "training_args.bin",
        "vocab.pkl",
        "tokenizer.model",
        "tokenizer.json",
        "adapter_model.bin",
        "generation_config.json",
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_in_a_model_folder_is_not_run(
    name: str, beside: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "owned"
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if not beside:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb(marker)))
    with ours_alone():
        load_model(folder, device="cpu")
    torch.save(_Bomb(marker), folder / name)
    with ours_alone():
        load_model(folder, device="cpu")
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Bomb(marker)))  # it is a bomb
    assert marker.exists()


@pytest.mark.parametrize("load", [load_tensors, Subspaces.load, CrownDelta.load, describe, resolve])
def test_a_pickle_under_any_other_name_is_not_run(load: Any, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    for name in ("delta.safetensors", "model.gguf", "subspaces.safetensors", "state.pt"):
        torch.save(_Bomb(marker), tmp_path / name)
        with pytest.raises(PolyLensError):
            load(str(tmp_path / name) if load is resolve else tmp_path / name)
    assert not marker.exists()


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "x.bin"])
def test_an_index_that_points_out_of_its_folder_is_refused(
    shard: str, model: Path, tmp_path: Path
) -> None:
    shutil.copy(model / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="files beside it"):
        resolve(str(model))


def test_links_in_a_model_folder(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(tmp_path / "blob")  # as the Hub's cache has them
    weights.symlink_to(tmp_path / "blob")
    assert describe(model).n_layers == 4
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(PolyLensError):
        describe(model)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(PolyLensError):
        describe(model)


def test_an_adapter_that_names_another_model_is_refused(model: Path) -> None:
    adapter = {"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ModelError, match="holds an adapter"):
        resolve(str(model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**10),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "many"),
        ("num_attention_heads", 0),
        ("model_type", ["llama"]),
        ("architectures", 5),
        ("text_config", 5),
        ("quantization_config", "yes"),
        ("auto_map", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
        ("attn_implementation", "somebody/kernels"),
        ("rope_parameters", {"rope_type": "yarn", "factor": "x"}),
    ],
)
def test_a_hostile_config(key: str, value: Any, model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))
    (model / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    with ours_alone():
        load_model(model, device="cpu")
    assert not (tmp_path / "owned").exists()
    if isinstance(value, int) and value > 10**8:
        with pytest.raises(ModelError, match="as many as its config"):
            describe(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_model_with_any_damage(name: str, model: Path) -> None:
    path = model / name
    right = path.read_bytes()
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000

    @settings(fuzzed, max_examples=max(10, N_EXAMPLES // 3))
    @given(damaged(right) | st.just(deep) | _VALUES.map(lambda one: json.dumps(one).encode()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with ours_alone():
            load_model(model, device="cpu")

    check()


def test_tensors_with_any_damage(model: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": torch.arange(6.0)}, {"kind": "polylens.delta"})
    right = (tmp_path / "t.safetensors").read_bytes()
    path = tmp_path / "damaged.safetensors"

    @fuzzed
    @given(damaged(right))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        for load in (load_tensors, Subspaces.load, CrownDelta.load):
            with ours_alone():
                load(path)
                assert content == right

    check()


@pytest.mark.parametrize("header", [2**60, 2**63 - 1, 10**8, 0])
def test_a_header_that_claims_more_than_there_is(header: int, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", header) + b"{}")
    with pytest.raises(PolyLensError):
        load_tensors(path)
    with pytest.raises(ModelError):
        describe(model)


@pytest.mark.parametrize("metadata", ["[]", "5", "{" * 50_000, '{"kind": "polylens.delta"}'])
def test_metadata_of_something_else(metadata: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"polylens": metadata})
    for load in (load_tensors, Subspaces.load, CrownDelta.load):
        with pytest.raises(PolyLensError):
            load(path)


@pytest.mark.parametrize("kind", ["polylens.subspaces", "polylens.delta"])
def test_a_right_checksum_over_wrong_contents(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {"kind": kind, "languages": 5, "layers": "x"})
    for load in (Subspaces.load, CrownDelta.load):
        with pytest.raises(PolyLensError):
            load(path)


@pytest.fixture(scope="module")
def gguf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(load_model(tiny_folder, device="cpu"), CrownDelta({}, {"layers": [3]}), path)
    return path


def test_a_gguf_file_with_any_damage(gguf: Path, tmp_path: Path) -> None:
    check_header(gguf)
    right = gguf.read_bytes()
    path = tmp_path / "damaged.gguf"
    head, tail = right[:4000], right[4000:]

    @settings(fuzzed, max_examples=4 * N_EXAMPLES)
    @given(damaged(head), st.booleans())
    def check(content: bytes, is_whole: bool) -> None:
        path.write_bytes(content + tail * is_whole)
        with ours_alone():
            check_header(path)

    check()


def test_a_gguf_array_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    key = b"tokenizer.ggml.scores"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + b"\0" * 64)
    with pytest.raises(ModelError, match="it ends before"):
        resolve(str(path))


def test_nothing_unpickles() -> None:
    """No source of ours imports pickle, or loads with torch."""
    import polylens

    for path in Path(polylens.__file__).parent.rglob("*.py"):
        words = path.read_text()
        assert "import pickle" not in words, path
        assert "torch.load(" not in words, path
    assert sys.version_info >= (3, 11)
