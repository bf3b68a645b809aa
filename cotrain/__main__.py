"""`python -m cotrain`, and under torchrun `torchrun … -m cotrain train …`: as the command `cotrain`."""

from cotrain.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
