"""The pages of the studio, as Gradio lays them out: a run is open, each tab shows a side of it.

What a tab does is in the other modules; here values go in and what is read comes out. Every value
that a browser sends is checked where it is used, since anything may come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from polylens.config import DEFAULT_MODEL, PRESETS, load_config
from polylens.corpora import starter_corpus
from polylens.corpora.readers import STARTER
from polylens.errors import PolyLensError
from polylens.evaluation import read_answers
from polylens.evaluation.sides import run_strength
from polylens.languages import language_name
from polylens.progress import Progress
from polylens.report import read_report_data
from polylens.report.plots import (
    difference_figure,
    loss_curves,
    probe_figure,
    strength_figure,
    subspace_map,
)
from polylens.studio import markup
from polylens.studio.dial import Dial
from polylens.studio.downloads import offered
from polylens.studio.drafts import FIELDS, compose, cost_rows, preset_values
from polylens.studio.folders import Folders
from polylens.studio.jobs import Jobs, training_log
from polylens.studio.looking import Look, look_into_model, look_into_run
from polylens.subspaces import Subspaces

_WATCH_SECONDS = 2.0

# Whatever loads a model waits its turn: a machine has memory for one.
_MODEL_WORK = {"concurrency_id": "model", "concurrency_limit": 1}


@dataclass
class Studio:
    """What all pages share.

    Attributes:
        folders: which paths may be touched.
        jobs: runs under way.
        dial: the model that answers.
    """

    folders: Folders
    jobs: Jobs = field(init=False)
    dial: Dial = field(default_factory=Dial)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.folders)


def build(studio: Studio) -> gr.Blocks:
    """Lay out all pages."""
    with gr.Blocks(title="PolyLens studio", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML("<h1>PolyLens studio</h1>")
        stage = gr.State(None)  # the run that is open, and how many stages of it are finished
        with gr.Row(elem_classes="open"):
            run = gr.Dropdown(label="Run", choices=[], value=None, scale=5, elem_id="run")
            again = gr.Button("Refresh", scale=1, min_width=90)
        with gr.Tabs(elem_id="pages") as tabs:
            with gr.Tab("Progress", id="progress"):
                _progress_page(studio, run, stage)
            with gr.Tab("New run", id="new"):
                _new_run_page(studio, run, tabs)
            with gr.Tab("Inside", id="inside"):
                _inside_page(studio, run, stage)
            with gr.Tab("Results", id="results"):
                _results_page(studio, run, stage)
            with gr.Tab("Answers", id="answers"):
                _answers_page(studio, run, stage)

        def names(current: str | None) -> Any:
            found = studio.jobs.names()
            chosen = current if current in found else next(iter(found), None)
            return gr.Dropdown(choices=found, value=chosen)

        _on(again.click, names, [run], [run])
        _on(blocks.load, names, [run], [run])
    return blocks


def _progress_page(studio: Studio, run: gr.Dropdown, stage: gr.State) -> None:
    shown = gr.HTML(markup.note("Open a run, or start a new one."), elem_id="progress")
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", interactive=False)
        resume = gr.Button("Resume", interactive=False)
    losses = _figure("Losses by step")
    drawn = gr.State(None)

    def watch(name: str | None, drawn: Any) -> Any:
        if not name:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), None, None
        status = studio.jobs.status(name)
        running = status.state == "running"
        log = training_log(studio.folders.run(name)) if name in studio.folders.runs_there() else []
        figure = gr.skip() if drawn == (name, len(log)) else loss_curves(log) if log else None
        return (
            markup.progress(name, status),
            gr.Button(interactive=running),
            gr.Button(interactive=status.state in ("stopped", "failed")),
            figure,
            (name, len(log)),
            (name, status.n_finished),
        )

    outputs = [shown, stop, resume, losses, drawn, stage]
    timer = gr.Timer(_WATCH_SECONDS)
    _on(timer.tick, watch, [run, drawn], outputs, show_progress="hidden")
    _on(run.change, watch, [run, drawn], outputs, show_progress="hidden")
    for button, act in ((stop, studio.jobs.stop), (resume, studio.jobs.resume)):

        def press(name: str, drawn: Any, act: Callable[[str], None] = act) -> Any:
            act(name)
            return watch(name, drawn)

        _on(button.click, press, [run, drawn], outputs)


def _new_run_page(studio: Studio, run: gr.Dropdown, tabs: gr.Tabs) -> None:
    with gr.Row():
        name = gr.Textbox(label="Name", placeholder="first", elem_id="name", min_width=240)
        model = _model_choice(studio)
        corpus = gr.Dropdown(
            label="Corpus", choices=studio.folders.corpora_there(), value=STARTER, min_width=240
        )
    with gr.Row():
        languages = gr.Textbox(
            label="Target languages (codes or names, by commas)",
            placeholder="sw, es",
            elem_id="languages",
            min_width=240,
        )
        central = gr.Textbox(label="Central language, to protect", value="en", min_width=240)
        preset = gr.Dropdown(label="Preset", choices=list(PRESETS), value="default", min_width=240)
    with gr.Accordion("Settings", open=False), gr.Row(equal_height=True):
        values = [
            gr.Textbox(label=one.label, value=start, min_width=240)
            if one.kind == "text"
            else gr.Number(
                label=one.label,
                value=start,
                precision=0 if one.kind == "count" else None,
                min_width=240,
            )
            for one, start in zip(FIELDS, preset_values("default"), strict=True)
        ]
    with gr.Row():
        check = gr.Button("Check, and estimate the cost")
        start = gr.Button("Start", variant="primary")
    said = gr.HTML(elem_id="said")
    form = [model, languages, central, corpus, preset, *values]

    def configure(form: tuple[Any, ...]) -> Any:
        model, languages, central, corpus, preset, *values = form
        return compose(
            studio.folders,
            model=model,
            languages=languages,
            central=central,
            corpus=corpus,
            preset=preset,
            values=values,
        )

    def estimate(*form: Any) -> Any:
        try:
            return markup.table(
                "What it would cost here", (), cost_rows(configure(form)), text=True
            )
        except PolyLensError as error:
            return markup.alert(str(error))

    def begin(name: str, *form: Any) -> Any:
        try:
            studio.jobs.start(name, configure(form))
        except PolyLensError as error:
            return markup.alert(str(error)), gr.skip(), gr.skip()
        chosen = gr.Dropdown(choices=studio.jobs.names(), value=name)
        return markup.note(f"{name} has started."), chosen, gr.Tabs(selected="progress")

    _on(preset.input, lambda preset: preset_values(preset), [preset], values)
    _on(check.click, estimate, form, [said], **_MODEL_WORK)
    _on(start.click, begin, [name, *form], [said, run, tabs])


def _inside_page(studio: Studio, run: gr.Dropdown, stage: gr.State) -> None:
    look = gr.State(None)
    said = gr.HTML(markup.note("Open a run, or probe a model."))
    with gr.Row():
        every = gr.Button("Show the run's held-out prompts at every layer")
    with gr.Accordion("A model without a run", open=False):
        with gr.Row():
            model = _model_choice(studio)
            languages = gr.Textbox(label="Languages", value="en, es, sw, zh", min_width=240)
            central = gr.Textbox(label="Central language", value="en", min_width=240)
            n_texts = gr.Slider(
                8, len(starter_corpus().rows), 48, step=8, label="Starter texts of each"
            )
        probe = gr.Button("Probe")
    layer = gr.Slider(0, 1, 0, step=1, label="Layer", visible=False, elem_id="layer")
    places = _figure("Where the languages are")
    curves = _figure("Layer by layer")
    outputs = [said, look, layer, places, curves]

    def opened(name: str | None) -> Any:
        if not name or name not in studio.folders.runs_there():
            return gr.skip(), None, gr.Slider(visible=False), None, None
        folder = studio.folders.run(name)
        if not folder.subspaces.exists():
            message = markup.note(f"{name} has not been probed yet.")
            return message, None, gr.Slider(visible=False), None, None
        subspaces, figure = Subspaces.load(folder.subspaces), None
        text = f"{name}, before training. The held-out prompts are drawn once it is evaluated."
        if folder.report.exists():
            data = read_report_data(folder)
            text = (
                f"{name}: the last token of each held-out prompt after the final norm, hollow "
                "before, filled after. Arrows join each language's means."
            )
            texts = {
                k: [one.prompt for one in data.answers_before if one.language == k]
                for k in data.map_states["before"]
            }
            if data.map_layer in subspaces.layers:
                before, after = data.map_states["before"], data.map_states["after"]
                figure = subspace_map(before, after, subspaces, data.map_layer, texts)
        return markup.note(text), None, gr.Slider(visible=False), figure, probe_figure(subspaces)

    def shown(found: Look) -> Any:
        layers = found.subspaces.layers
        n_texts = sum(map(len, found.texts.values()))
        text = (
            f"{found.subspaces.metadata['model']}, untouched: {n_texts} texts. The last of layers "
            f"{layers[0]} to {layers[-1]} is after the final norm."
        )
        slider = gr.Slider(
            minimum=layers[0], maximum=layers[-1], value=layers[-1], step=1, visible=True
        )
        figures = found.map_at(layers[-1]), probe_figure(found.subspaces)
        return markup.note(text), found, slider, *figures

    def every_layer(name: str, progress: Any = gr.Progress()) -> Any:  # noqa: B008 - as Gradio wants it
        folder = studio.folders.run(name)
        studio.dial.close()
        return shown(
            look_into_run(folder, studio.folders.config(folder), progress=_drawn(progress))
        )

    def probe_model(
        model: str,
        languages: str,
        central: str,
        n_texts: int,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        spec = studio.folders.model(model)
        studio.dial.close()
        return shown(
            look_into_model(
                spec, languages, central, n_texts=int(n_texts), progress=_drawn(progress)
            )
        )

    def at(look: Look | None, layer: float) -> Any:
        return gr.skip() if look is None else look.map_at(int(layer))

    _on(stage.change, opened, [run], outputs)
    _on(every.click, every_layer, [run], outputs, **_MODEL_WORK)
    _on(probe.click, probe_model, [model, languages, central, n_texts], outputs, **_MODEL_WORK)
    _on(
        layer.input, at, [look, layer], [places], show_progress="hidden", trigger_mode="always_last"
    )


def _results_page(studio: Studio, run: gr.Dropdown, stage: gr.State) -> None:
    files = gr.HTML(markup.note("Open a run."), elem_id="files")
    text = gr.HTML(elem_id="results")
    differences = _figure("What changed, with 95 % intervals")
    tradeoff = _figure("What each strength costs and brings")

    def opened(name: str | None) -> Any:
        if not name or name not in studio.folders.runs_there():
            return markup.note("Open a run."), "", None, None
        folder = studio.folders.run(name)
        links = markup.downloads(name, offered(folder))
        if not folder.report.exists():
            return links, markup.note(f"{name} has not been evaluated yet."), None, None
        data = read_report_data(folder)
        central = data.evaluation.central
        return (
            links,
            markup.results(data),
            difference_figure(data.evaluation.measures, central),
            strength_figure(data.dial.measures, central, chosen=data.dial.strength),
        )

    _on(stage.change, opened, [run], [files, text, differences, tradeoff])


def _answers_page(studio: Studio, run: gr.Dropdown, stage: gr.State) -> None:
    asked = gr.Dropdown(label="A held-out prompt", choices=[], value=None)
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
    with gr.Row():
        strength = gr.Slider(
            0, 2, 1, step=0.05, label="Strength of the delta", info="0 is the untouched model."
        )
        longest = gr.Slider(8, 256, 48, step=8, label="Longest answer, in tokens")
    with gr.Accordion("Steering", open=False), gr.Row():
        towards = gr.Dropdown(label="Push towards", choices=[("none", "")], value="")
        push = gr.Slider(-3, 3, 1, step=0.25, label="How far")
    ask = gr.Button("Answer", variant="primary")
    before = gr.State(None)
    shown = gr.HTML(elem_id="answers")
    dials = [strength, longest, towards, push]

    def opened(name: str | None) -> Any:
        found, targets, own = [], [], 1.0
        if name and name in studio.folders.runs_there():
            folder = studio.folders.run(name)
            if folder.answers("before").exists():
                found = [
                    (f"{language_name(one.language)}: {one.prompt}", one.prompt)
                    for one in read_answers(folder.answers("before"))
                ]
            config = load_config(folder.resolved)
            targets = [(language_name(k), k) for k in config.languages]
            own = run_strength(folder.path, config.output.strength)  # the dial begins at the model
        return (
            own,
            gr.Dropdown(choices=found, value=None),
            gr.Dropdown(choices=[("none", ""), *targets], value=""),
            None,
            "",
        )

    def answer(
        name: str,
        prompt: str,
        before: Any,
        strength: float,
        longest: float,
        towards: str,
        push: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> Any:
        folder = studio.folders.run(name)
        with studio.dial.open(folder, studio.folders.config(folder), _drawn(progress)) as model:
            known = (name, prompt, longest)
            if before is None or before[0] != known:
                untouched = model.reply(prompt, strength=0, max_new_tokens=int(longest))
                before = (known, untouched)
            after = model.reply(
                prompt,
                strength=strength,
                max_new_tokens=int(longest),
                towards=towards or None,
                push=push,
            )
        return before, markup.answers(before[1], after, strength)

    def turned(name: str, prompt: str, before: Any, *dials: Any) -> Any:
        if before is None:  # nothing was asked
            return gr.skip(), gr.skip()
        return answer(name, prompt, before, *dials)

    _on(stage.change, opened, [run], [strength, asked, towards, before, shown])
    _on(asked.input, lambda text: text, [asked], [prompt])
    inputs = [run, prompt, before, *dials]
    _on(ask.click, answer, inputs, [before, shown], **_MODEL_WORK)
    for dial in (strength, towards, push):  # while it turns, the newest position waits its turn
        _on(
            dial.input,
            turned,
            inputs,
            [before, shown],
            trigger_mode="always_last",
            **_MODEL_WORK,
        )


def _figure(title: str) -> gr.Plot:
    gr.HTML(f"<h2>{title}</h2>")
    return gr.Plot(label=title, show_label=False, container=False, elem_classes="figure")


def _model_choice(studio: Studio) -> gr.Dropdown:
    choices = studio.folders.models_there()
    return gr.Dropdown(label="Model", choices=choices, value=DEFAULT_MODEL, min_width=240)


def _on(event: Any, act: Callable[..., Any], inputs: Any, outputs: Any, **how: Any) -> None:
    """Let an event act; our errors are shown as the sentence they are, and the page stays."""

    @functools.wraps(act)
    def saying(*values: Any) -> Any:
        try:
            return act(*values)
        except PolyLensError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    event(saying, inputs, outputs, api_visibility="private", **how)


def _drawn(progress: Any) -> Progress:
    """Draw progress as Gradio does."""

    def draw(done: int, total: int, what: str) -> None:
        progress((done, total), desc=what)

    return draw
