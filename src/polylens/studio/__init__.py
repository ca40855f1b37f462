"""The studio: a local web page to look inside models and runs, start runs, and compare answers.

`folders` says which paths it may touch, `jobs` runs the command line as processes of its own,
`drafts` turns a form into a configuration, `looking` and `dial` do what needs a model, `markup`
writes what is read, `pages` lays it out, `guard` keeps others out, and `app` serves it all. Only
`pages` and `app` need Gradio (extra `studio`).
"""
