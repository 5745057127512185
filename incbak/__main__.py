"""``python -m incbak``."""

from incbak.cli.start import main

main()
