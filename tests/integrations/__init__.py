"""Tests of adpretrain_hf.integrations."""
