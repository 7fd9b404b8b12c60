"""A deterministic data set in RealIAD's layout that the program draws itself, so that everything runs offline."""

from training.synthetic.generate import SIZE, generate

__all__ = ["SIZE", "generate"]
