"""What Lens minimises: the losses of a step's rows, from kept states through the crown.

`LensObjective` runs the crown on what a step's losses read, takes each prompt's states from it, and
adds the gradient to the crown's weights. The losses themselves are in `polylens.losses`.

Source: Zhao et al. 2024, Lens (arXiv 2410.04407), section 3.2; learning answers is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from polylens import distributed
from polylens.config import TrainSettings
from polylens.crown import Crown
from polylens.hidden_states import HiddenStates
from polylens.losses import AlignLoss, RetainDistributionLoss, RetainLoss, SeparateLoss
from polylens.models.structure import Calls
from polylens.optimization import LEAST_LOSS, add_up_step
from polylens.subspaces import Subspaces
from polylens.token_budget import LOGIT_ROWS, groups_within


@dataclass(frozen=True)
class ParallelStates:
    """Kept states of parallel prompts.

    Attributes:
        states: boundary and final states of all prompts, in any order.
        rows: for each parallel row, language → index of its prompt in `states`. A row has the
            central language and at least one target; other languages may be missing.
        central: the central language.
        n_answer: as `ParallelPrompts` has it.
        answers: as `ParallelPrompts` has them.
        choices: indices into `states` of prompts of no row, of which the last token is retained.
            The rows share them out, so that an epoch has each once.
    """

    states: HiddenStates
    rows: tuple[Mapping[str, int], ...]
    central: str
    n_answer: tuple[int, ...] | None = None
    answers: tuple[tuple[int, ...], ...] | None = None
    choices: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The target languages, in the order of their first appearance."""
        return tuple(dict.fromkeys(k for row in self.rows for k in row if k != self.central))

    def choices_beside(self, row: int) -> tuple[int, ...]:
        """Return the prompts of `choices` that are retained beside a row."""
        n_rows, n_choices = len(self.rows), len(self.choices)
        return self.choices[row * n_choices // n_rows : (row + 1) * n_choices // n_rows]


class LensObjective:
    """Loss of a batch of rows: forward through the crown, choice of states, the three losses."""

    def __init__(
        self,
        subspaces: Subspaces,
        parallel: ParallelStates,
        settings: TrainSettings,
        crown: Crown,
        token_budget: int,
        graph_tokens: int,
        layers: tuple[int, ...],
    ) -> None:
        structure = crown.structure_[0]
        self._layers = layers
        self._parallel = parallel
        self._settings = settings
        self._crown = crown
        self._token_budget = token_budget
        self._graph_tokens = graph_tokens
        offsets = parallel.states.offsets
        self._n_tokens = [
            sum(
                offsets[index + 1] - offsets[index]
                for index in (*row.values(), *parallel.choices_beside(number))
            )
            for number, row in enumerate(parallel.rows)
        ]
        assert settings.position != "answer" or parallel.n_answer is not None
        self._n_answer: Sequence[int] = parallel.n_answer or [1] * len(parallel.states.lengths)
        # The answers that are learned; none where the corpus has none.
        learned = settings.answer_weight > 0 and any(parallel.answers or ())
        self._answers = parallel.answers if learned else None
        self._n_prompt = [
            length - n + 1
            for length, n in zip(parallel.states.lengths.tolist(), self._n_answer, strict=True)
        ]
        self._compares = settings.align_weight > 0 or settings.separate_weight > 0
        self._retains_targets = settings.retain_weight > 0 and settings.retain_targets
        self._n_shared = parallel.states.prefix_length
        # How many of a prompt's last tokens the losses of targets read; None: all of them.
        self._n_read = self._n_answer if settings.position in ("last", "answer") else None
        self._calls = Calls(structure, parallel.states.prefix_length)
        self._device = structure.device
        self._align = {layer: AlignLoss(subspaces, layer) for layer in self._layers}
        self._separate = {
            (language, layer): SeparateLoss(
                subspaces, layer, language, settings.strength_of(language)
            )
            for language in parallel.targets
            for layer in self._layers
        }
        self._retain = RetainLoss()
        self._retain_distribution = RetainDistributionLoss()

    @property
    def reads_logits(self) -> bool:
        """Whether a loss needs the head; one for answers does only where there are any."""
        return self._settings.retains_distribution or self._answers is not None

    @property
    def usual_loss(self) -> float:
        """What a batch may lose though the first one lost next to nothing.

        A first batch may have no answers; one that has them loses up to what a model loses that
        knows nothing. Retained tokens lose nothing at first, and a tenth of their states' own
        square while the others still move fast.
        """
        usual = LEAST_LOSS
        n_targets = len(self._parallel.targets)
        if self._answers is not None:
            config = self._crown.structure_[0].causal_lm.config.get_text_config()
            n_nats = math.log(config.vocab_size)
            usual += self._settings.answer_weight * n_targets * n_nats
        if self._settings.retain_weight > 0 and self._settings.retain != "distribution":
            n_retained = len(self._parallel.choices) / len(self._parallel.rows)
            if self._settings.retain == "tokens":
                n_retained += 1 + n_targets * self._retains_targets
            states = self._reference(
                self._parallel.rows[0][self._parallel.central], self._layers[-1]
            )
            usual += 0.1 * self._settings.retain_weight * n_retained * float(states.square().mean())
        return usual

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Add the gradient of a step's loss to the crown's weights.

        Args:
            rows: of the step, over all processes.

        Returns:
            The loss, and each part's unweighted value, over all processes.
        """
        names = self._part_names()
        sums = torch.zeros(len(names), 2, dtype=torch.float64)  # sum over rows, and rows
        for group in groups_within(distributed.own(rows), self._n_tokens, self._graph_tokens):
            losses = self._losses(group)
            if not losses:  # of rows without answers, where nothing else is learned
                continue
            weighted = [
                self._weight(name) * values.sum() / len(rows) for name, values in losses.items()
            ]
            torch.stack(weighted).sum().backward()
            for name, values in losses.items():
                index = names.index(name)
                sums[index] += torch.tensor([float(values.detach().double().sum()), len(values)])
        sums = add_up_step(sums, dict(self._crown.named_trainable()))
        parts, loss = {}, 0.0
        for name, (total, count) in zip(names, sums.tolist(), strict=True):
            if count:
                # A row without this language adds nothing: the mean over rows shrinks with them.
                loss += self._weight(name) * total / len(rows)
                parts[name] = total / count
        return loss, parts

    def _part_names(self) -> list[str]:
        settings = self._settings
        names = ["retain", "retain.choices"] if settings.retain_weight > 0 else []
        for language in self._parallel.targets:
            names += [f"retain.{language}"] if self._retains_targets else []
            names += [f"align.{language}"] if settings.align_weight > 0 else []
            names += [f"separate.{language}"] if settings.separate_weight > 0 else []
            names += [f"answer.{language}"] if self._answers is not None else []
        return names

    def _weight(self, name: str) -> float:
        return float(getattr(self._settings, f"{name.partition('.')[0]}_weight"))

    def _losses(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the losses of each row, by part: (n_rows_with_the_language,) each."""
        of_row = [self._parallel.rows[row] for row in rows]
        beside = [prompt for row in rows for prompt in self._parallel.choices_beside(row)]
        by_part: dict[str, list[Tensor]] = {}
        for layer, now in self._states(of_row, beside).items():
            for name, values in self._losses_at(layer, now, of_row, beside).items():
                by_part.setdefault(name, []).append(values)
        return {name: torch.stack(values).mean(0) for name, values in by_part.items()}

    def _losses_at(
        self,
        layer: int,
        now: Mapping[int, Tensor],
        of_row: Sequence[Mapping[str, int]],
        beside: Sequence[int],
    ) -> dict[str, Tensor]:
        """Return the losses of each row, by part, of one layer's states.

        Args:
            layer: whose states.
            now: the states in training, by prompt: (n_tokens, hidden_size).
            of_row: language → prompt.
            beside: prompts that are retained beside the rows.
        """
        settings, central = self._settings, self._parallel.central
        result: dict[str, Tensor] = {}
        if settings.retain_weight > 0:
            held = {row[central]: self._tokens_held(row[central]) for row in of_row}
            result.update(self._retained("retain", layer, now, held))
            held = dict.fromkeys(beside, slice(-1, None))
            result.update(self._retained("retain.choices", layer, now, held))
        for language in self._parallel.targets:
            present = [row for row in of_row if language in row]
            if not present:
                continue
            indices = [row[language] for row in present]
            if self._retains_targets:
                # The last token is to move; a prompt of one token has no other.
                held = {
                    i: self._tokens_held(i, 1)
                    for i in indices
                    if self._n_prompt[i] - 1 > self._n_shared
                }
                result.update(self._retained(f"retain.{language}", layer, now, held))
            targets = [self._read(now[index], index) for index in indices if self._compares]
            if settings.align_weight > 0:
                # Tokens of parallel rows do not correspond, so their means are compared.
                goals = [self._read(now[row[central]], row[central]).mean(0) for row in present]
                means = torch.stack([states.mean(0) for states in targets])
                result[f"align.{language}"] = self._align[layer](means, torch.stack(goals))
            if settings.separate_weight > 0:
                before = [self._read(self._reference(index, layer), index) for index in indices]
                loss = self._separate[language, layer]
                values = loss(torch.cat(targets), torch.cat(before))
                result[f"separate.{language}"] = _mean_of_each(values, [*map(len, targets)])
            if self._answers is not None and layer == self._layers[-1]:
                answered = [row[language] for row in present if self._answers[row[language]]]
                if answered:
                    result[f"answer.{language}"] = self._nats(now, answered)
        return result

    def _tokens_held(self, prompt: int, n_less: int = 0) -> slice:
        """Return which of a prompt's tokens are retained: not its answer's, nor the last `n_less`.

        Distributions after the shared prefix are left out: they are the same in every row.
        """
        first = self._n_shared if self._settings.retain == "distribution" else 0
        return slice(first, self._n_prompt[prompt] - n_less)

    def _retained(
        self, name: str, layer: int, now: Mapping[int, Tensor], held: Mapping[int, slice]
    ) -> dict[str, Tensor]:
        """Return the retain loss of each prompt, (n_prompts,), by its name; none where none acts.

        Args:
            name: of the loss.
            layer: whose states.
            now: the states in training, by prompt: (n_tokens, hidden_size).
            held: for each prompt, which of its tokens are to stay.
        """
        if not held:
            return {}
        # Distributions are of the last layer alone.
        if self._settings.retain == "distribution" and layer != self._layers[-1]:
            return {}
        pairs = [(now[i][part], self._reference(i, layer)[part]) for i, part in held.items()]
        if self._settings.retain == "states":
            means = [
                torch.stack([one.mean(0) for one in each]) for each in zip(*pairs, strict=True)
            ]
            return {name: self._retain(*means)}
        if self._settings.retain == "tokens":
            return {name: torch.stack([self._retain(*pair).mean() for pair in pairs])}
        return {name: torch.stack([self._divergence(*pair) for pair in pairs])}

    def _nats(self, now: Mapping[int, Tensor], prompts: Sequence[int]) -> Tensor:
        """Return the cross-entropy of some prompts' answers in nats a token, (n_prompts,).

        Args:
            now: the last layer's states in training, by prompt, as `_final` left them.
            prompts: which ones; each has an answer.
        """
        assert self._answers is not None
        answers = [self._answers[prompt] for prompt in prompts]
        pairs = zip(prompts, answers, strict=True)
        states = self._normed(torch.cat([now[prompt][-len(ids) :] for prompt, ids in pairs]))
        tokens = torch.tensor([one for ids in answers for one in ids], device=states.device)

        def nats(states: Tensor, tokens: Tensor) -> Tensor:
            logits = self._logits(states).float()
            return functional.cross_entropy(logits, tokens, reduction="none")

        pieces = zip(states.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True)
        values = [checkpoint_activations(nats, *piece, use_reentrant=False) for piece in pieces]
        return _mean_of_each(torch.cat(values), [*map(len, answers)])

    def _divergence(self, now: Tensor, before: Tensor) -> Tensor:
        """Return how far the next tokens after some states are from the untouched model's.

        Logits are made again for the gradient rather than kept: a vocabulary is a hundred times as
        wide as the states.

        Args:
            now: (n_tokens, hidden_size), in training, as `_final` left them.
            before: the same shape, of the untouched model.
        """

        def divergence(states: Tensor, reference: Tensor) -> Tensor:
            return self._retain_distribution(self._logits(states), self._logits(reference))

        normed = [self._normed(states) for states in (now, before)]
        value: Tensor = checkpoint_activations(divergence, *normed, use_reentrant=False)
        return value

    def _normed(self, states: Tensor) -> Tensor:
        """Return states, as `_final` left them, after the final norm."""
        if self._settings.state == "residual":
            normed: Tensor = self._crown.final_norm(states)
            return normed
        return states

    def _logits(self, states: Tensor) -> Tensor:
        """Return the head's, (n_tokens, vocab_size), of states after the final norm."""
        structure = self._crown.structure_[0]
        return structure.logits(states[None].to(structure.dtype))[0]

    def _states(
        self, rows: Sequence[Mapping[str, int]], beside: Sequence[int]
    ) -> dict[int, dict[int, Tensor]]:
        """Run the crown on what losses read; return its states by layer, (n_tokens, hidden_size).

        Where the losses read the last tokens alone, those are the only ones returned.
        """
        settings, central = self._settings, self._parallel.central
        whole: list[int] = []
        last = [*beside] if settings.retain_weight > 0 else []
        for row in rows:
            for language, index in row.items():
                if settings.retain_weight > 0 and (language == central or self._retains_targets):
                    whole.append(index)
                elif settings.align_weight > 0 if language == central else self._is_read(index):
                    (whole if self._n_read is None else last).append(index)
        states = self._parallel.states
        *below, top = self._layers
        result: dict[int, dict[int, Tensor]] = {layer: {} for layer in self._layers}
        with self._crown.noting(below) as noted:
            prefix = self._crown.run_prefix(self._calls, states)
            of_prefix = {} if prefix is None else {k: one[0] for k, one in noted.items()}
            for prompts, n_last in ((whole, None), (last, self._n_answer)):
                for chosen, output, lengths in self._crown.run_kept(
                    self._calls,
                    states,
                    prompts,
                    prefix=prefix,
                    n_last=n_last,
                    token_budget=self._token_budget,
                ):
                    final = self._final(output)
                    for place, (index, length) in enumerate(
                        zip(chosen, lengths.tolist(), strict=True)
                    ):
                        result[top][index] = final[place, :length]
                        n_own = states.offsets[index + 1] - states.offsets[index]
                        for layer, batch in noted.items():
                            own = batch[place, :n_own]
                            if prefix is not None:
                                own = torch.cat([of_prefix[layer], own])
                            result[layer][index] = own[-length:]
        return result

    def _is_read(self, prompt: int) -> bool:
        """Whether a loss reads a target language's prompt."""
        return self._compares or (self._answers is not None and bool(self._answers[prompt]))

    def _final(self, states: Tensor) -> Tensor:
        """Apply the final norm if the losses read states after it."""
        if self._settings.state == "normed":
            normed: Tensor = self._crown.final_norm(states)
            return normed
        return states

    @torch.no_grad()
    def _reference(self, prompt: int, layer: int) -> Tensor:
        """The untouched model's states of a prompt after a layer, (n_tokens, hidden_size)."""
        states = self._parallel.states
        if layer != self._layers[-1]:
            kept = states.boundary[layer + 1]
            return states.tokens(kept, prompt).to(self._device).float()
        assert states.final is not None
        return self._final(states.tokens(states.final, prompt).to(self._device).float())

    def _read(self, states: Tensor, prompt: int) -> Tensor:
        """Return what align and separate read of a prompt's states, (n_read, hidden_size)."""
        if self._n_read is not None:
            own = states[-self._n_read[prompt] :]
            return own if self._settings.position == "answer" else own[:1]
        own = states[: self._n_prompt[prompt]]
        return own.mean(0, keepdim=True) if self._settings.position == "mean" else own


def _mean_of_each(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Average what lies end to end over each prompt's part: (n_prompts,)."""
    if len(values) == len(lengths):
        return values
    return torch.stack([part.mean() for part in values.split(list(lengths))])
