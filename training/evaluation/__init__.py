"""The parts of ``training.evaluate``: data sets, the plan of cells, running them, and what is written."""
