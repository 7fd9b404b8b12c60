"""Writes the cards of the converted official releases, with the numbers that the paper prints.

Whether those are of the released files is not known, so no card has them in its front matter. Run it in a checkout:
``python hub_cards/render.py``.
"""

import json
from pathlib import Path

from adpretrain_hf import ADPretrainConfig
from adpretrain_hf.bundle import card_text
from adpretrain_hf.bundle.card import PUBLISHED, table
from adpretrain_hf.files import write_text

FOLDER = Path(__file__).parent


def published_cards() -> dict[str, str]:
    """The cards, by the name of their repository."""
    paper = json.loads((FOLDER / "reported.json").read_text(encoding="utf-8"))
    tables = {name: table(paper["columns"], rows) for name, rows in paper["rows"].items()}
    configs = {name: ADPretrainConfig.preset(name) for name in PUBLISHED}
    return {
        f"adpretrain-{name}": card_text(config, released=True, results=tables.get(name, ""))
        for name, config in configs.items()
    }


if __name__ == "__main__":
    for repository, text in published_cards().items():
        write_text(FOLDER / repository / "README.md", text)
