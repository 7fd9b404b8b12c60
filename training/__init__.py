"""Pretraining of ADPretrain features: run from a checkout, e.g. ``python -m training.pretrain``; never installed."""
