"""What the studio says, as HTML: tables, a run's progress, two answers side by side."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from polylens.cli.console import duration
from polylens.cli.run import EVALUATION_COLUMNS, STAGE_TITLES, evaluation_rows
from polylens.conversation import Reply
from polylens.languages import language_name
from polylens.report.page import ReportData, render_measures, summary
from polylens.run_folder import STAGES
from polylens.studio.jobs import STATES, Status


def alert(text: str) -> Markup:
    """Say what is wrong; read out by screen readers."""
    return Markup('<p class="alert" role="alert">{}</p>').format(text)


def note(text: str) -> Markup:
    """Say something."""
    return Markup('<p class="note" role="status">{}</p>').format(text)


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False
) -> Markup:
    """Write a table that scrolls sideways where it is too wide.

    Args:
        caption: what it shows.
        columns: heads; none for a list of pairs.
        rows: the first cell of each is its head.
        text: cells are sentences, and may break.
    """
    cell = Markup("<td>{}</td>")
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(cell.format(value) for value in row[1:])
        )
        for row in rows
    )
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in columns)
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table class="{}">'
        "<caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(caption, "sentences" if text else "figures", caption, head, body)


def progress(name: str, status: Status) -> Markup:
    """Say how far a run is."""
    parts = [
        Markup('<p><strong dir="auto">{}</strong> is {}; {} of {} stages are finished.</p>').format(
            name, STATES[status.state], status.n_finished, len(STAGES)
        )
    ]
    if status.state == "running":
        stage = STAGE_TITLES.get(status.stage or "", "Getting ready")
        parts.append(Markup("<p>{}.</p>").format(stage))
        if status.what is not None:
            left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
            text = f"{status.what}: {status.done:,} of {status.total:,}{left}"
            parts.append(
                Markup(
                    '<label class="bar">{}<progress max="{}" value="{}"></progress></label>'
                ).format(text, max(1, status.total), status.done)
            )
    if status.error is not None:
        parts.append(alert(status.error))
    return Markup('<div role="status" class="progress">{}</div>').format(Markup("").join(parts))


def answers(before: Reply, after: Reply, strength: float) -> Markup:
    """Write two answers side by side; each runs in the direction of its script."""
    sides = Markup("").join(
        Markup(
            '<section class="answer"><h3>{}</h3><p class="note">{}</p><div dir="auto">{}</div>'
            "</section>"
        ).format(title, _described(reply), reply.answer or "(no answer)")
        for title, reply in (("Before", before), (f"After, strength {strength:g}", after))
    )
    return Markup('<div class="answers" role="status">{}</div>').format(sides)


def _described(reply: Reply) -> str:
    is_known = reply.language not in ("unknown", "empty")
    language = f"in {language_name(reply.language)}" if is_known else reply.language
    return f"{language}, cut off" if reply.is_cut else language


def results(data: ReportData) -> Markup:
    """Write what a run changed: the decision, and figures with their intervals."""
    return Markup("<p>{}</p><p>{}</p>{}{}").format(
        summary(data.evaluation),
        data.dial.sentence(),
        table("Before and after", EVALUATION_COLUMNS, evaluation_rows(data.evaluation)),
        render_measures({"after": data.evaluation.measures}, {"after": None}),
    )


def downloads(name: str, offered: Sequence[str]) -> Markup:
    """Write links to a run's results."""
    if not offered:
        return note("There is nothing to download yet.")
    titles = {"report": "Report", "delta": "Delta (safetensors)", "model": "Merged model (tar)"}
    links = Markup("").join(
        Markup('<li><a href="/runs/{}/{}" {}>{}</a></li>').format(
            name,
            what,
            Markup('target="_blank" rel="noopener"' if what == "report" else "download"),
            titles[what],
        )
        for what in offered
    )
    return Markup('<ul class="downloads">{}</ul>').format(links)
