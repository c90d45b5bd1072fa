"""Diffusion drafters: masked language models that draft a whole block of tokens in one pass.

`folder.py` is what such a model is on disk, `cache.py` what it remembers of each request's text,
`drafter.py` the model. `calibration/diffusion_training.py` trains one beside a target.
"""
