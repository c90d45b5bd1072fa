"""`python -m vllm_spec_plugins.zoo nano` builds a model and prints its folder."""

from __future__ import annotations

import argparse
import logging
import sys

from vllm_spec_plugins.errors import SpecPluginsError

from . import RECIPES, describe, ensure


def main() -> int:
    """The command line. Folders go to stdout, everything else to stderr."""
    known = "\n".join(f"  {describe(name)}" for name in RECIPES)
    parser = argparse.ArgumentParser(
        prog="python -m vllm_spec_plugins.zoo",
        description=f"Build models of the zoo and print their folders.\n\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="one of the above")
    parser.add_argument("--threads", type=int, help="for training (default: torch's own choice)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in arguments.models:
            print(ensure(name, arguments.threads), flush=True)
    except SpecPluginsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
