"""Next-token training of the crown: cross-entropy on tokens, from kept states.

The trunk runs once over all rows; every epoch then costs the crown, and the head at the tokens that
are predicted. Embeddings, final norm and head are frozen. Which tokens are predicted is for
`polylens.baselines.supervised` and `polylens.baselines.pretraining` to say.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from polylens import distributed
from polylens.baselines.cost import Cost, count_operations
from polylens.baselines.settings import BaselineSettings
from polylens.corpora.corpus import sample
from polylens.crown import Crown, CrownDelta
from polylens.hidden_states import HiddenStates, Keep, collect_hidden_states
from polylens.journal import versions
from polylens.models.loading import LanguageModel
from polylens.models.structure import Calls
from polylens.optimization import add_up_step, optimize
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.token_budget import LOGIT_ROWS, best_graph_tokens, best_token_budget, groups_within

T = TypeVar("T")


@dataclass(frozen=True)
class Sequences:
    """Rows of tokens, the last of which are predicted.

    Attributes:
        ids: token ids of each row, at least two.
        n_scored: how many of each row's last tokens are predicted; at least one, and not the
            first, which has no context.
        languages: of each row.
    """

    ids: tuple[tuple[int, ...], ...]
    n_scored: tuple[int, ...]
    languages: tuple[str, ...]

    @classmethod
    def make(cls, rows: Sequence[tuple[Sequence[int], int, str]]) -> Sequences:
        """Build from (token ids, how many are predicted, language); rows without any go."""
        rows = [row for row in rows if row[1] > 0]
        return cls(
            tuple(tuple(ids) for ids, _, _ in rows),
            tuple(n_scored for _, n_scored, _ in rows),
            tuple(language for _, _, language in rows),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each language."""
        return {k: self.languages.count(k) for k in dict.fromkeys(self.languages)}

    def within_budget(self, settings: BaselineSettings, seed: int) -> Sequences:
        """Keep rows, in an order drawn by `seed`, until the budget is reached; at least one."""
        if settings.tokens is None:
            return self
        most = settings.tokens // settings.epochs
        order = list(range(len(self.ids)))
        random.Random(seed).shuffle(order)
        kept: list[int] = []
        total = 0
        for row in order:
            if kept and total + len(self.ids[row]) > most:
                break
            kept.append(row)
            total += len(self.ids[row])
        return Sequences.make(
            [(self.ids[row], self.n_scored[row], self.languages[row]) for row in sorted(kept)]
        )


def choose_rows(
    items: Mapping[str, Sequence[T]],
    targets: Sequence[str],
    central: str,
    settings: BaselineSettings,
    seed: int,
) -> dict[str, list[T]]:
    """Choose rows of each target language, and as many of the central one as are replayed."""
    chosen = {language: sample(items[language], settings.rows, seed) for language in targets}
    n_replayed = round(settings.replay_ratio * sum(map(len, chosen.values())))
    if n_replayed:
        chosen[central] = sample(items[central], n_replayed, seed)
    return chosen


def train_on_tokens(
    model: LanguageModel,
    crown: Crown,
    sequences: Sequences,
    settings: BaselineSettings,
    *,
    method: str,
    central: str,
    seed: int = 0,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> CrownDelta:
    """Train a crown to predict tokens.

    In a distributed run each process takes its share of the rows of a step.

    Args:
        model: the untouched model; it is not changed.
        crown: of this model; of no use afterwards.
        sequences: the rows, already within the budget.
        settings: of the optimizer, and for the record.
        method: name of the baseline, for the record.
        central: the central language, for the record.
        seed: order of the rows.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for states and the optimizer's moments; None takes memory without limit.
        checkpoint: a file to continue from after a kill, removed by the caller.
        progress: told the steps done.

    Returns:
        The change of the weights; its metadata holds the log, and the `Cost` as "cost".

    Raises:
        TrainingError: the loss is not finite or runs away.
        ConfigError: the checkpoint is of another training.
    """
    scratch = scratch or Scratch()
    structure = model.structure
    # Nothing follows a row's last token, so its states are not needed.
    inputs = [ids[:-1] for ids in sequences.ids]
    n_tokens = settings.epochs * sum(map(len, inputs))
    token_budget = token_budget or best_token_budget(structure, n_tokens, scratch.batch_bytes)
    states = collect_hidden_states(
        structure,
        inputs,
        Keep(boundary_layers=(crown.boundary_layer,)),
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
    graph_tokens = best_graph_tokens(structure, len(crown.layers), scratch.batch_bytes)
    named = dict(crown.named_trainable())
    cost = Cost(
        tokens=settings.epochs * sum(map(len, sequences.ids)),
        scored_tokens=settings.epochs * sum(sequences.n_scored),
        operations=count_operations(crown, states, sequences.n_scored, settings),
        trained_parameters=sum(weight.numel() for weight in named.values()),
    )
    log = optimize(
        named,
        NextTokenObjective(crown, states, sequences, token_budget, graph_tokens),
        len(sequences.ids),
        settings,
        identity=[method, dataclasses.astuple(sequences)],
        seed=seed,
        scratch=scratch,
        roomy=structure.streaming is None,
        checkpoint=checkpoint,
        progress=progress,
    )
    metadata = {
        "method": method,
        "fingerprint": model.fingerprint,
        "model": model.name,
        "central": central,
        "languages": [language for language in sequences.counts if language != central],
        "layers": crown.trainable,
        "n_rows": len(sequences.ids),
        "rows": sequences.counts,
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "cost": dataclasses.asdict(cost),
        "log": log,
        "versions": versions(),
    }
    return CrownDelta(crown.into_changes(), metadata)


class NextTokenObjective:
    """Cross-entropy of the predicted tokens, averaged over those of a step."""

    def __init__(
        self,
        crown: Crown,
        states: HiddenStates,
        sequences: Sequences,
        token_budget: int,
        graph_tokens: int,
    ) -> None:
        self._crown = crown
        self._named = dict(crown.named_trainable())
        self._states = states
        self._sequences = sequences
        self._languages = list(sequences.counts)
        self._token_budget = token_budget
        self._graph_tokens = graph_tokens
        self._n_tokens = (states.lengths - states.prefix_length).tolist()
        self._calls = Calls(crown.structure_[0], states.prefix_length)

    def backward(self, rows: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Add the gradient of a step's loss to the crown's weights.

        Args:
            rows: of the step, over all processes.

        Returns:
            The loss in nats a token, and that of each language as "nats.<language>".
        """
        n_scored = sum(self._sequences.n_scored[row] for row in rows)
        sums = torch.zeros(len(self._languages), 2, dtype=torch.float64)  # nats, and tokens
        # Held over the step: a streamed head is read from its file once.
        with self._crown.structure_[0].loaded_head():
            for group in groups_within(distributed.own(rows), self._n_tokens, self._graph_tokens):
                final, tokens, languages = self._run(group)
                nats, gradient = self._score(final, tokens)
                final.backward(gradient / n_scored)
                sums[:, 0].index_add_(0, languages, nats.double().cpu())
                sums[:, 1].index_add_(0, languages, torch.ones(len(languages)).double())
        sums = add_up_step(sums, self._named)
        parts = {
            f"nats.{language}": nats / count
            for language, (nats, count) in zip(self._languages, sums.tolist(), strict=True)
            if count
        }
        return float(sums[:, 0].sum()) / n_scored, parts

    def _run(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the crown on some rows.

        Returns:
            (n_scored, hidden_size) last layer's output, before the final norm, of the tokens that
            predict; (n_scored,) the tokens that they predict; (n_scored,) indices of languages.
        """
        prefix = self._crown.run_prefix(self._calls, self._states)
        outputs: list[Tensor] = []
        tokens: list[int] = []
        languages: list[int] = []
        for chosen, output, counts in self._crown.run_kept(
            self._calls,
            self._states,
            rows,
            prefix=prefix,
            n_last=self._sequences.n_scored,
            token_budget=self._token_budget,
        ):
            for row, states, count in zip(chosen, output, counts.tolist(), strict=True):
                outputs.append(states[:count])
                tokens += self._sequences.ids[row][-count:]
                languages += [self._languages.index(self._sequences.languages[row])] * count
        final = torch.cat(outputs)
        return final, torch.tensor(tokens, device=final.device), torch.tensor(languages)

    def _score(self, final: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, (n_scored,), and the gradient of their sum by `final`.

        Logits are made for some rows at a time and forgotten: those of a whole step would be the
        largest thing in memory.
        """
        structure = self._crown.structure_[0]
        losses, gradients = [], []
        pieces = final.detach().split(LOGIT_ROWS)
        for states, wanted in zip(pieces, tokens.split(LOGIT_ROWS), strict=True):
            leaf = states.clone().requires_grad_()
            normed = self._crown.final_norm(leaf).to(structure.dtype)
            logits = structure.logits(normed[None])[0].float()  # (n, vocab_size)
            loss = functional.cross_entropy(logits, wanted, reduction="none")
            loss.sum().backward(inputs=[leaf])  # and none of the head's weights
            assert leaf.grad is not None
            losses.append(loss.detach())
            gradients.append(leaf.grad)
        return torch.cat(losses), torch.cat(gradients)
