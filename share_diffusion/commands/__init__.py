"""The commands of `share-diffusion`, one per file: HELP, `flags(parser)` and `run(arguments)`; listed in __main__."""
