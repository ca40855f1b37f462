"""Steering equals patching a model's inputs by hand, in every way of running it; nothing is left.

The reference patches the input of the next layer in a plain forward of the whole model, in float64
and from the paper's formulas; the package changes outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from polylens.corpora import starter_corpus
from polylens.crown import run_crown
from polylens.errors import LanguageError, SubspaceError, UsageError
from polylens.evaluation import evaluate
from polylens.evaluation.generation import generate_answers
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import LanguageModel, load_model, wrap_model
from polylens.steering import Action, Removal, Steering, Towards, middle_layers, upper_layers
from polylens.subspaces import Subspaces, probe_subspaces
from tiny import EOS_ID, N_LAYERS, PAD_ID, SPECIAL_TOKENS, build, save_tiny, tiny_tokenizer

LANGUAGES = ("en", "sw", "zh")
IDS = torch.arange(5, 17)[None]
LAST = N_LAYERS - 1

# Taken in two layers and put back in the last, of which the engine runs a part where it can.
CARRIED = (Removal(0.7, (0, 2), reinsert=0.9, reinsert_at=LAST), Towards("sw", 1.5, (1, 2)))
EITHER = [CARRIED, (Towards("sw", 2.0, (1, LAST)), Removal(0.5, (1, LAST), reference="origin"))]


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    first = len(SPECIAL_TOKENS)
    return [torch.randint(first, 261, (n,), generator=generator).tolist() for n in lengths]


def probed(model: LanguageModel) -> Subspaces:
    """Subspaces of a tiny model, from random prompts."""
    states = collect_hidden_states(
        model.structure, random_prompts(7, [6] * 12), Keep(pooling="last")
    )
    assert states.pooled is not None
    pooled = dict(zip(LANGUAGES, states.pooled.split(4), strict=True))
    metadata = {"n_layers": N_LAYERS, "fingerprint": model.fingerprint, "model": model.name}
    return probe_subspaces(pooled, central="en", metadata=metadata)


def steered(model: LanguageModel, actions: Sequence[Action] = CARRIED) -> Steering:
    return Steering(probed(model), actions)


@torch.no_grad()
def logits(model: LanguageModel, ids: Tensor = IDS) -> Tensor:
    return model.causal_lm(ids, use_cache=False).logits


@contextlib.contextmanager
def patched(
    model: LanguageModel, change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[list[Tensor]]:
    """Change what follows each layer by patching what its successor is given; yield all of it."""
    successors = [*model.structure.layers[1:], model.structure.final_norm]
    seen: list[Tensor] = []
    hooks = []

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: Any, keywords: Any) -> Any:
            states = args[0] if args else keywords["hidden_states"]
            new = change(layer, states)
            seen.append(states if new is None else new)
            if new is None:
                return None
            if args:
                return (new, *args[1:]), keywords
            return args, {**keywords, "hidden_states": new}

        return hook

    for layer, successor in enumerate(successors):
        hooks.append(successor.register_forward_pre_hook(hook_of(layer), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(subspaces: Subspaces) -> Callable[[int, Tensor], Tensor]:
    """`CARRIED`, worked out layer by layer."""
    taken: list[Tensor] = []

    def change(layer: int, states: Tensor) -> Tensor:
        new = states.double()
        basis = subspaces.specific_basis[layer]
        if layer in (0, 2):
            mean = subspaces.language_means[layer].mean(0)
            part = 0.7 * (states.double() - mean) @ basis.T @ basis
            taken.append(part)
            new = new - part
        if layer in (1, 2):
            means = subspaces.language_means[layer]
            new = new + 1.5 / 2 * (means[1] - means[0]) @ basis.T @ basis
        if layer == LAST:
            new = new + 0.9 * sum(taken)
            taken.clear()
        return new.to(states.dtype)

    return change


def assert_unhooked(model: LanguageModel) -> None:
    for module in model.causal_lm.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_every_layer_is_as_patched_by_hand(tiny_model: LanguageModel) -> None:
    steering = steered(tiny_model)
    untouched = logits(tiny_model)
    with patched(tiny_model, by_hand(steering.subspaces)) as expected:
        expected_logits = logits(tiny_model)
    with steering.applied(tiny_model.structure), patched(tiny_model, lambda *_: None) as found:
        found_logits = logits(tiny_model)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_logits, expected_logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found_logits, untouched, rtol=1e-2, atol=1e-2)
    assert torch.equal(logits(tiny_model), untouched)


def test_an_addition_is_that_of_transformers_own_hidden_states(llama: LanguageModel) -> None:
    steering = steered(llama, [Towards("zh", -0.5, (1,))])
    with torch.no_grad():
        states = llama.causal_lm.model(IDS, output_hidden_states=True).hidden_states[2]
    vector = (-0.5 * steering.subspaces.direction("zh", 1)).float()
    with steering.applied(llama.structure), patched(llama, lambda *_: None) as found:
        logits(llama)
    assert torch.equal(found[1], states + vector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_steered_in_float32_and_rounded_once(
    dtype: torch.dtype, llama: LanguageModel
) -> None:
    subspaces = probed(llama)
    narrow = wrap_model(build().to(dtype), tiny_tokenizer())
    mean, basis = subspaces.language_means[1].mean(0), subspaces.specific_basis[1]
    with patched(narrow, lambda *_: None) as before:
        logits(narrow)
    h = before[1].double()
    for action, expected in (
        (Towards("sw", 1.0, (1,)), h + subspaces.direction("sw", 1)),
        (Removal(1.0, (1,)), h - (h - mean) @ basis.T @ basis),
    ):
        with (
            Steering(subspaces, [action]).applied(narrow.structure),
            patched(narrow, lambda *_: None) as after,
        ):
            logits(narrow)
        assert after[1].dtype == dtype
        rounded = expected.to(dtype)
        assert (after[1] == rounded).double().mean() > 0.99  # but where the last bit is a toss-up
        torch.testing.assert_close(after[1], rounded)


def test_the_engine_learns_of_attention_as_if_nothing_steered(llama: LanguageModel) -> None:
    expected = llama.structure.attention_name
    assert expected is not None
    with steered(llama, [Removal(1.0, (1,), reinsert=1.0, reinsert_at=LAST)]).applied(
        llama.structure
    ):
        assert dataclasses.replace(llama.structure).attention_name == expected


@pytest.mark.parametrize(
    ("actions", "strength"),
    [
        (CARRIED, 0.0),
        ((Towards("sw", 0.0, (1,)), Removal(0.0, (1,), reinsert=1.0, reinsert_at=2)), 1.0),
        ((Removal(0.7, (2,), reinsert=1.0, reinsert_at=2),), 0.3),
        ((Towards("sw", 0.3, (1, 2)), Towards("sw", -0.3, (1, 2))), 0.7),
        ((Removal(0.2, (1,)), Removal(-0.2, (1,))), 1.0),
    ],
)
def test_nothing_is_nothing_bit_for_bit(
    llama: LanguageModel, actions: Sequence[Action], strength: float
) -> None:
    untouched = logits(llama)
    with steered(llama, actions).applied(llama.structure, strength):
        assert_unhooked(llama)
        assert torch.equal(logits(llama), untouched)


def test_answers_are_the_same_with_and_without_cache_and_padding(tiny_model: LanguageModel) -> None:
    prompts = random_prompts(3, (5, 1, 9))
    untouched = generate_answers(tiny_model, prompts, max_new_tokens=4)
    with steered(tiny_model).applied(tiny_model.structure):
        batched = generate_answers(tiny_model, prompts, max_new_tokens=4)
        for use_cache in (True, False):
            assert batched == decode(tiny_model, prompts, use_cache=use_cache)
    assert batched != untouched
    assert generate_answers(tiny_model, prompts, max_new_tokens=4) == untouched


def test_beams_may_change_places(tiny_model: LanguageModel) -> None:
    """Without a cache, no step knows anything of the one before."""
    prompts = random_prompts(5, (7, 7))
    with steered(tiny_model).applied(tiny_model.structure):
        expected = decode(tiny_model, prompts, use_cache=False, num_beams=3)
        assert decode(tiny_model, prompts, use_cache=True, num_beams=3) == expected
        ids = torch.tensor([[PAD_ID] * 3 + prompts[0], [*random_prompts(6, (3,))[0], *prompts[1]]])
        padded = beam_search(tiny_model, ids, ids != PAD_ID, use_cache=True)
    assert padded[0] == expected[0]


def decode(model: LanguageModel, prompts: Sequence[Sequence[int]], **settings: Any) -> list[str]:
    """What transformers answers to each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found += beam_search(model, ids, torch.ones_like(ids), **{"num_beams": 1, **settings})
    return found


def beam_search(
    model: LanguageModel, ids: Tensor, mask: Tensor, num_beams: int = 3, use_cache: bool = True
) -> list[str]:
    config = GenerationConfig(
        max_new_tokens=4,
        do_sample=False,
        num_beams=num_beams,
        use_cache=use_cache,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    output = model.causal_lm.generate(
        input_ids=ids, attention_mask=mask.long(), generation_config=config
    )
    texts = model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_pass_of_the_engine_is_that_of_the_whole_model(
    tiny_model: LanguageModel, pooling: Any
) -> None:
    """All batches go through a layer before the next: each must get back what is its own."""
    shared = random_prompts(8, (6,))[0]  # long enough to be run once for all
    prompts = [[*shared, *own] for own in random_prompts(9, (3, 9, 3, 1, 3))]
    with steered(tiny_model).applied(tiny_model.structure):
        expected = []
        for prompt in prompts:
            with patched(tiny_model, lambda *_: None) as seen:
                logits(tiny_model, torch.tensor([prompt]))
            expected.append(torch.stack([one[0] for one in seen]))  # (n_layers, seq_len, d)
        for token_budget in (1, 20):
            states = collect_hidden_states(
                tiny_model.structure, prompts, Keep(pooling=pooling), token_budget=token_budget
            )
            for found, whole in zip(states.pooled, expected, strict=True):
                pooled = whole[:, -1] if pooling == "last" else whole.mean(1)
                torch.testing.assert_close(found[:N_LAYERS], pooled, rtol=1e-3, atol=1e-3)


def test_a_pass_that_begins_between_taking_and_putting_back_is_refused(
    llama: LanguageModel,
) -> None:
    states = collect_hidden_states(llama.structure, IDS.tolist(), Keep(boundary_layers=(2,)))
    steering = steered(llama, [Removal(1.0, (1,), reinsert=1.0, reinsert_at=LAST)])
    with (
        steering.applied(llama.structure),
        pytest.raises(UsageError, match="must have been taken from the same tokens"),
    ):
        list(run_crown(llama.structure, states))
    assert_unhooked(llama)


def test_hooks_are_removed_whatever_happens(tiny_model: LanguageModel) -> None:
    untouched, fingerprint = logits(tiny_model), tiny_model.fingerprint
    steering = steered(tiny_model)
    with pytest.raises(KeyboardInterrupt), steering.applied(tiny_model.structure):
        raise KeyboardInterrupt
    assert_unhooked(tiny_model)
    assert torch.equal(logits(tiny_model), untouched)
    assert wrap_model(tiny_model.causal_lm, tiny_model.tokenizer).fingerprint == fingerprint


def test_a_forward_that_failed_half_way_leaves_nothing_for_the_next(llama: LanguageModel) -> None:
    def fail(layer: int, states: Tensor) -> None:
        if layer == 1:
            raise MemoryError

    with steered(llama).applied(llama.structure):
        expected = logits(llama)
        with pytest.raises(MemoryError), patched(llama, fail):
            logits(llama, IDS + 1)
        assert torch.equal(logits(llama), expected)


def test_a_pass_that_stopped_half_way_leaves_nothing_for_the_next(llama: LanguageModel) -> None:
    prompts = random_prompts(3, (5, 9, 9))
    steering = steered(llama, [Removal(1.0, (1,), reinsert=1.0, reinsert_at=LAST)])

    def whole() -> Tensor:
        found = collect_hidden_states(llama.structure, prompts, Keep(pooling="last"))
        assert found.pooled is not None
        return found.pooled

    with steering.applied(llama.structure):
        expected = whole()
        others = [ids[::-1] for ids in prompts]  # as long, so that what is left over would fit
        collect_hidden_states(llama.structure, others, Keep(boundary_layers=(2,)))
        assert torch.equal(whole(), expected)
    assert llama.structure.on_pass == []


def test_a_streamed_model_is_steered_as_one_in_memory(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    found = []
    for streamed in (True, False):
        model = load_model(folder, dtype="float32", streamed=streamed)
        steering = steered(model)
        prompts = random_prompts(3, (5, 9))
        with steering.applied(model.structure):
            states = collect_hidden_states(model.structure, prompts, Keep(pooling="last"))
            answers = generate_answers(model, prompts, max_new_tokens=4)
        found.append((states.pooled, answers))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_steering_is_evaluated_as_a_delta_is(llama: LanguageModel) -> None:
    corpus = starter_corpus().limit(3)
    steering = steered(llama)
    found = [
        evaluate(
            llama, steering, corpus, languages=["sw"], strength=s, max_new_tokens=2, max_tokens=512
        )
        for s in (0.0, 1.0)
    ]
    assert found[0].bits_per_byte["sw"].before == found[0].bits_per_byte["sw"].after
    assert found[0].state_change["sw"].relative == 0
    assert found[1].state_change["sw"].relative > 0.01


def planted(apart: Sequence[float], separability: Sequence[float]) -> Subspaces:
    """Subspaces of `len(apart)` layers, whose languages lie so far apart at each."""
    n = len(apart)
    means = torch.zeros(n + 1, 2, 4, dtype=torch.float64)
    means[..., 0] = 10.0
    means[:, 1, 1] = torch.tensor([*apart, 1.0])
    # Layers of other scales are no farther apart.
    means *= torch.arange(1, n + 2, dtype=torch.float64)[:, None, None]
    pooled = {"en": means[:, 0][None], "sw": means[:, 1][None]}
    subspaces = probe_subspaces(pooled, central="en", metadata={"n_layers": n})
    object.__setattr__(subspaces, "separability", torch.tensor([*separability, 1.0]))
    return subspaces


def test_layers_are_chosen_where_languages_are_told_apart_and_lie_apart() -> None:
    found = planted([1, 1, 2, 2, 5, 8, 6, 9], [0.5, 0.94, 0.96, 0.7, 1, 1, 1, 1])
    assert upper_layers(found) == (5, 6)  # not the last, 7, nor 4, at 5 of 8
    assert middle_layers(found) == (2, 3, 4)
    steering = Steering(found, [Towards("sw"), Removal(reinsert=1.0)])
    assert [one.layers for one in steering.resolved] == [(5, 6), (2, 3, 4)]
    assert steering.resolved[1].reinsert_at == 5
    assert steering.layers == (2, 3, 4, 5, 6)
    assert Steering(found, [Removal()]).layers == (2, 3, 4)


def test_layers_that_cannot_be_chosen_must_be_named() -> None:
    with pytest.raises(SubspaceError, match="which begin at 0 here; name them"):
        Steering(planted([5, 5, 5], [1, 1, 1]), [Removal()])
    with pytest.raises(SubspaceError, match="none below layer 0 was probed"):
        Steering(planted([5], [1]), [Towards("sw")])


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        ([], UsageError, "at least one action"),
        ([Towards("fr", layers=(1,))], LanguageError, r"\(sw, zh\), got 'fr'; probe with it"),
        ([Towards("en", layers=(1,))], LanguageError, "push away from another by a negative"),
        ([Towards("sw", layers=())], SubspaceError, "at least one layer"),
        ([Towards("sw", layers=(4,))], SubspaceError, "decoder layers, 0 to 3, got 4"),
        ([Removal(layers=(-1,))], SubspaceError, "decoder layers, 0 to 3, got -1"),
        ([Towards("sw", float("nan"), (1,))], UsageError, "strength must be a finite number"),
        ([Removal(layers=(1,), reinsert=float("inf"))], UsageError, "reinsert must be a finite"),
        (
            [Removal(layers=(1, 3), reinsert=1, reinsert_at=2)],
            UsageError,
            "layer 3 takes and 2 puts back",
        ),
        ([Removal(layers=(1,), reinsert=1, reinsert_at=4)], SubspaceError, "0 to 3, got 4"),
    ],
)
def test_faulty_actions_are_refused_at_once(
    llama: LanguageModel, actions: list[Action], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        steered(llama, actions)


def test_subspaces_of_another_shape_or_unknown_depth_are_refused(llama: LanguageModel) -> None:
    with (
        pytest.raises(SubspaceError, match="of 3 layers of size 4 and it has 4 of size 32"),
        Steering(planted([1, 1, 1], [1, 1, 1]), [Towards("sw")]).applied(llama.structure),
    ):
        pass
    unknown = probe_subspaces({"en": torch.ones(1, 3, 4), "sw": torch.rand(1, 3, 4)}, central="en")
    with pytest.raises(SubspaceError, match="must tell n_layers"):
        Steering(unknown, [Towards("sw", layers=(1,))])
    with pytest.raises(SubspaceError, match="must be one of those probed"):
        some = probe_subspaces(
            {"en": torch.ones(1, 3, 4), "sw": torch.rand(1, 3, 4)},
            central="en",
            layers=[1],
            metadata={"n_layers": 2},
        )
        Steering(some, [Towards("sw", layers=(0,))])
