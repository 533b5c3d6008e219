"""Experiments: what is declared, what runs it, and what becomes of it.

- ``plan.yaml``: what is run, and nothing else: tasks, arms, seeds.
- ``runner/``: reads the plan; begins a run with what another one has learnt. ``__main__`` runs it.
- ``self_kd_controls/``: criteria that differ from ``self_kd`` in one thing, to tell what helps.
- ``figures/``: from the runs' folders to CSV, tables and plots.

Why no sweep of Hydra's: a run here is a recipe's scripts, as a user calls them, and not one Python
function of a configuration; runs share what they have in common (a trunk), wait for each other, go
on after an interruption, and are never trained twice side by side. A sweeper's launcher would do
none of this, and what it does, an arm times a seed, takes ten lines.
"""
