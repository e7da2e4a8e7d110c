"""Runs of the command line: trained, evaluated, compared and exported from a folder, on anyone's data.

`settings` says what a run is, `folder` where it lies, `tasks` and `methods` what is trained, `stage` and `training`
how, `evaluation`, `comparison` and `exporting` what becomes of it.
"""
