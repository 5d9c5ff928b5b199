"""`python -m hf_specdec` is `hf-specdec`."""

from .cli import main

raise SystemExit(main())
