"""``python -m adpretrain_hf.cli``."""

from adpretrain_hf.cli.main import main

raise SystemExit(main())
