"""``python -m incbak``."""

from incbak.cli.main import main

main()
