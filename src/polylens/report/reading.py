"""From a run's folder to what its report shows: saved files alone are read."""

from __future__ import annotations

import torch

from polylens.artefacts import load_tensors, read_object, read_text
from polylens.config import TrainSettings, check
from polylens.crown import CrownDelta
from polylens.errors import RunError
from polylens.evaluation import Evaluation, read_answers
from polylens.evaluation.gate import Dial
from polylens.report.page import ReportData
from polylens.run_folder import RunFolder
from polylens.subspaces import Subspaces


def read_report_data(folder: RunFolder) -> ReportData:
    """Read what the report shows from a run's saved files.

    Raises:
        RunError: the run has not come that far.
        CorruptFileError: a file is damaged.
    """
    for path in (
        folder.summary,
        folder.gate,
        folder.subspaces,
        folder.delta,
        folder.plan,
        folder.resolved,
    ):
        if not path.exists():
            raise RunError(
                f"a report needs a run that has been evaluated, but {folder.path} has no "
                f"{path.name}; finish the run with `polylens enhance` first"
            )
    answers = (folder.answers("before"), folder.answers("after"))
    folder.journal.check((folder.summary, folder.gate, *answers))
    tensors, metadata = load_tensors(folder.map_states)
    states: dict[str, dict[str, torch.Tensor]] = {"before": {}, "after": {}}
    for name, tensor in tensors.items():
        when, _, language = name.partition(".")
        states[when][language] = tensor
    plan = folder.read_plan()
    evaluation = read_object(folder.summary, Evaluation.from_dict)
    trained = CrownDelta.load(folder.delta).metadata
    return ReportData(
        evaluation=evaluation,
        answers_before=read_answers(folder.answers("before")),
        answers_after=read_answers(folder.answers("after")),
        trained_with=check(TrainSettings, trained["settings"], folder.delta),
        training_log=trained["log"],
        subspaces=Subspaces.load(folder.subspaces),
        map_layer=metadata["layer"],
        map_states=states,
        resolved_yaml=read_text(folder.resolved),
        plan=plan,
        dial=read_object(folder.gate, Dial.from_dict),
        retrieval={
            when: {
                task.language: folder.scorecard(when).examples(name)
                for name, task in folder.scorecard(when).tasks.items()
                if task.protocol == "states" and task.language is not None
            }
            for when in ("before", "after")
        },
    )
