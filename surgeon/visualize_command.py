"""`surgeon visualize`: pictures of what varies in a model. Imports torch when it runs."""

import argparse

DESCRIPTION = "x"
EXAMPLES = "x"


def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def run(args: argparse.Namespace) -> int:
    return 0
